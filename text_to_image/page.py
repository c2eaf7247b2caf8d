"""The page of `python -m text_to_image.generate --ui`: prompts and pictures in a browser."""

import base64
import html
import io
import sys
import warnings
from typing import Any

import torch

from text_to_image.families import import_diffusers, release_memory, require_package
from text_to_image.generate import MODELS, OUT_OF_MEMORY, FewStep, Result, load_from, report
from text_to_image.tiny_fashion import SIDE


def build_page(settings: Any) -> Any:
    """The Gradio page for the flags of generate.py. A model is loaded when it is first drawn with.

    Pictures are sent inside the page, so none is left on disk; what concerns local files (errors
    and warnings of loading) goes to the terminal.
    """
    require_package("gradio", "--ui")
    import gradio as gr

    loaded: dict[str, FewStep] = {}

    def model_named(name: str) -> FewStep:
        if name not in loaded:
            loaded.clear()  # one model at a time fits
            release_memory()
            try:
                loaded[name] = load_from(settings, name)
            except (ValueError, OSError, ImportError) as error:
                print(f"error: {error}", file=sys.stderr)
                raise gr.Error(f"{name} could not be loaded; the terminal says why") from error
        return loaded[name]

    def draw(prompt, model, nfe, temperature, seed, images, width, height):
        try:
            generate = model_named(model)
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always", UserWarning)
                result = generate(
                    prompt, int(images), int(height), int(width), int(nfe), int(seed),
                    temperature=temperature or None, total_substeps=settings.total_substeps,
                    solver=settings.solver, batch=settings.batch,
                )  # fmt: skip
        except torch.OutOfMemoryError as error:
            raise gr.Error(OUT_OF_MEMORY) from error
        except (ValueError, TypeError) as error:
            raise gr.Error(str(error)) from error
        notes = [str(note.message) for note in notes if note.category is UserWarning]
        return gallery(result), "\n".join([report(result), *notes])

    side = SIDE if settings.tiny else 1024
    with gr.Blocks(title="pi-Flow text to image", analytics_enabled=False) as page:
        note = " (a small model of clothes; FLUX is random)" * settings.tiny
        gr.Markdown("## Few-step text to image" + note)
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(" ".join(settings.prompt), label="Prompt", lines=3)
                model = gr.Dropdown(list(MODELS), value=settings.model, label="Model")
                with gr.Row():
                    trained = settings.nfe or MODELS[settings.model].nfe
                    nfe = gr.Slider(1, 32, trained, step=1, label="Network evaluations")
                    label = "Temperature (0: automatic)"
                    temperature = gr.Number(settings.temperature, label=label, minimum=0)
                with gr.Row():
                    seed = gr.Number(settings.seed, label="Seed", precision=0, minimum=0)
                    images = gr.Slider(1, 8, settings.images, step=1, label="Images")
                with gr.Row():
                    width = gr.Number(settings.width or side, label="Width", precision=0)
                    height = gr.Number(settings.height or side, label="Height", precision=0)
                button = gr.Button("Draw", variant="primary")
            with gr.Column():
                pictures = gr.HTML(label="Pictures")
                status = gr.Textbox(label="Status", lines=2, interactive=False)
        model.change(lambda name: MODELS[name].nfe, model, nfe, api_visibility="private")
        inputs = [prompt, model, nfe, temperature, seed, images, width, height]
        button.click(draw, inputs, [pictures, status], api_name="draw", concurrency_limit=1)
    return page


def gallery(result: Result) -> str:
    """The pictures as HTML that holds them, each with its seed; a click saves one."""
    figures = []
    for image, seed in zip(result.images, result.seeds, strict=True):
        file = io.BytesIO()
        image.save(file, "png")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        name = html.escape(f"seed {seed}")
        figures.append(
            f'<a href="{url}" download="seed{seed}.png" title="save {name}">'
            f'<img src="{url}" alt="{name}" style="max-width: 100%"><br>{name}</a>'
        )
    return '<div style="display: flex; flex-wrap: wrap; gap: 1em">' + "".join(figures) + "</div>"


def open_page(settings: Any) -> None:
    """Serves the page on --host, by default the loopback address, until Ctrl-C."""
    import_diffusers()
    page = build_page(settings).queue()
    _, address, _ = page.launch(
        server_name=settings.host, server_port=settings.port, share=False, quiet=True,
        prevent_thread_lock=True,
    )  # fmt: skip
    print(f"the page is at {address}; Ctrl-C ends it", flush=True)
    page.block_thread()
