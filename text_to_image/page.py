"""The page of `python -m text_to_image.generate --ui`: prompts and pictures in a browser."""

import base64
import dataclasses
import html
import io
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from common.cli import check_settings
from text_to_image.families import import_diffusers, require_package
from text_to_image.loading import release_memory

LARGEST = 2**53 - 1  # whole number that a browser can send


def build_page(settings: Any, editing: dict[str, bool], load: Callable, draw: Callable) -> Any:
    """The Gradio page for the flags of generate.py. A model is loaded when it is first drawn with.

    Pictures are sent inside the page, so none is left on disk; what concerns local files (errors
    and warnings of loading) goes to the terminal.

    Args: editing: model -> whether it takes reference images; load(settings) -> FewStep;
        draw(generate, settings, prompts, images, references) -> Result.
    """
    require_package("gradio", "--ui")
    import gradio as gr

    loaded: dict[str, Any] = {}

    def model_of(chosen: Any) -> Any:
        if chosen.model not in loaded:
            loaded.clear()  # one model at a time fits
            release_memory()
            try:
                loaded[chosen.model] = load(chosen)
            except (ValueError, OSError, ImportError) as error:
                print(f"error: {error}", file=sys.stderr)
                said = f"{chosen.model} could not be loaded; the terminal says why"
                raise gr.Error(said) from error
        return loaded[chosen.model]

    def on_draw(
        prompt, model, nfe, temperature, seed, images, width, height, references, with_trajectory
    ):
        chosen = dataclasses.replace(
            settings, model=model, prompt=(prompt,), seed=seed, images=images,
            width=width or None, height=height or None, nfe=nfe or None,
            temperature=temperature or None,
        )  # fmt: skip
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always", UserWarning)
            try:
                if not prompt.strip():
                    raise ValueError("prompt: it is empty")
                check_settings(chosen)  # before a model is loaded
                generate = model_of(chosen)
                references = references if editing[model] and references else ()
                result = draw(generate, chosen, [prompt], images, references)
                pictures = gallery(result.images, [f"seed {seed}" for seed in result.seeds])
                trajectory = ""
                if with_trajectory:
                    trajectory = trajectory_of(generate, result)
            except (ValueError, OSError, TypeError) as error:
                raise gr.Error(str(error)) from error
        seeds = f"seed {result.seeds[0]}"
        if len(result.seeds) > 1:
            seeds = f"seeds {result.seeds[0]} to {result.seeds[-1]}"
        notes = [str(note.message) for note in notes if note.category is UserWarning]
        return pictures, trajectory, "\n".join([f"{len(result.seeds)} images, {seeds}", *notes])

    with gr.Blocks(
        title="pi-Flow text to image", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        note = " (a small model of clothes; FLUX is random)" * settings.tiny
        gr.Markdown("## Few-step text to image" + note)
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(" ".join(settings.prompt), label="Prompt", lines=3)
                model = gr.Dropdown(list(editing), value=settings.model, label="Model")
                references = gr.File(
                    label="Reference images to edit (FLUX.2)", file_count="multiple",
                    file_types=["image"], visible=editing[settings.model],
                )  # fmt: skip
                with gr.Row():
                    label = "Evaluations (0: as trained)"
                    nfe = gr.Slider(0, 32, settings.nfe or 0, step=1, label=label)
                    label = "Temperature (0: automatic)"
                    temperature = gr.Number(settings.temperature or 0, label=label, minimum=0)
                with gr.Row():
                    seed = gr.Number(
                        settings.seed, label="Seed", precision=0, minimum=0, maximum=LARGEST
                    )
                    dice = gr.Button("Random seed")
                    images = gr.Slider(1, 8, settings.images, step=1, label="Images")
                with gr.Row():
                    label = "{} (0: automatic)"
                    width = gr.Number(settings.width or 0, label=label.format("Width"), precision=0)
                    height = gr.Number(
                        settings.height or 0, label=label.format("Height"), precision=0
                    )
                button = gr.Button("Draw", variant="primary")
            with gr.Column():
                pictures = gr.HTML(label="Pictures")
                show = gr.Checkbox(True, label="Show the x_0 that each network evaluation expects")
                trajectory = gr.HTML(label="Trajectory")
                status = gr.Textbox(label="Status", lines=2, interactive=False)
        private = {"api_visibility": "private"}
        model.change(lambda name: gr.File(visible=editing[name]), model, references, **private)
        dice.click(lambda: random.randrange(2**31), None, seed, **private)
        inputs = [prompt, model, nfe, temperature, seed, images, width, height, references, show]
        outputs = [pictures, trajectory, status]
        button.click(on_draw, inputs, outputs, api_name="draw", concurrency_limit=1)
    return page


def trajectory_of(generate: Any, result: Any) -> str:
    """The first picture as each network evaluation expects it, from noise to the end."""
    thumbnails = []
    for estimate in result.estimates:
        (image,) = generate.decode(estimate[:1])
        image.thumbnail((112, 112))
        thumbnails.append(image)
    return gallery(thumbnails, [f"t = {t:.2f}" for t in result.times])


def gallery(images: Sequence[Any], captions: Sequence[str]) -> str:
    """Pictures as HTML that holds them, each with its caption; a click saves one."""
    figures = []
    for image, caption in zip(images, captions, strict=True):
        file = io.BytesIO()
        image.save(file, "png")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        name = html.escape(caption)
        figures.append(
            f'<a href="{url}" download="{name.replace(" ", "_")}.png" title="save {name}">'
            f'<img src="{url}" alt="{name}" style="max-width: 100%"><br>{name}</a>'
        )
    return '<div style="display: flex; flex-wrap: wrap; gap: 1em">' + "".join(figures) + "</div>"


def open_page(settings: Any, editing: dict[str, bool], load: Callable, draw: Callable) -> None:
    """Serves the page on --host, by default the loopback address, until Ctrl-C."""
    import_diffusers()
    page = build_page(settings, editing, load, draw).queue()
    _, address, public = page.launch(
        server_name=settings.host, server_port=settings.port, share=settings.share, quiet=True,
        prevent_thread_lock=True,
    )  # fmt: skip
    print(f"the page is at {public or address}; Ctrl-C ends it", flush=True)
    page.block_thread()
