"""The page of `python -m text_to_image.generate --ui`: prompts and pictures in a browser."""

import dataclasses
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from common.cli import check_settings


def build_page(settings: Any, generate: Any, draw: Callable) -> Any:
    """The Gradio page that draws with one model; its values start as the command's flags.

    Args: settings: of generate.py; generate: a FewStep; draw(generate, settings, prompts, images,
        references) -> Result.
    """
    import gradio as gr

    def on_draw(
        prompt: str, nfe: int, seed: int, images: int, width: int, height: int,
        references: Sequence[str] | None,
    ) -> tuple[list, list, str]:  # fmt: skip
        chosen = dataclasses.replace(
            settings, nfe=nfe or None, seed=seed or 0, width=width or None, height=height or None
        )
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always", UserWarning)
            try:
                check_settings(chosen)
                result = draw(generate, chosen, [prompt], images, references or ())
            except (ValueError, OSError) as error:
                raise gr.Error(str(error)) from error
        pictures = zip(result.images, (f"seed {number}" for number in result.seeds), strict=True)
        expected = [
            (generate.decode(x_0[:1])[0], f"t = {t:.2f}")
            for t, x_0 in zip(result.times, result.estimates, strict=True)
        ]
        messages = [str(note.message) for note in notes if note.category is UserWarning]
        return list(pictures), expected, "\n".join(messages)

    def random_seed() -> int:
        return random.randrange(2**31)

    title = f"Few-step text to image: {settings.model}"
    # Gradio deletes pictures and references after an hour
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"## {title}")
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(" ".join(settings.prompt), label="Prompt", lines=3)
                label = "Evaluations, 0: as trained"
                nfe = gr.Slider(0, 32, settings.nfe or 0, step=1, label=label)
                seed = gr.Number(settings.seed, label="Seed", precision=0)
                gr.Button("Random seed").click(random_seed, None, seed)
                images = gr.Slider(1, 8, settings.images, step=1, label="Images")
                label = "Width and height, 0: automatic"
                width = gr.Number(settings.width or 0, label=label, precision=0)
                height = gr.Number(settings.height or 0, show_label=False, precision=0)
                references = gr.File(
                    label="Images to edit", file_count="multiple", file_types=["image"],
                    visible=generate.family.edits,
                )  # fmt: skip
                button = gr.Button("Draw", variant="primary")
            with gr.Column():
                outputs = [
                    gr.Gallery(label="Pictures", format="png"),
                    gr.Gallery(label="The first one, as each evaluation expects it", columns=4),
                    gr.Textbox(label="Warnings", interactive=False),
                ]
        inputs = [prompt, nfe, seed, images, width, height, references]
        button.click(on_draw, inputs, outputs, api_name="draw", concurrency_limit=1)
    return page


def open_page(settings: Any, generate: Any, draw: Callable) -> None:
    """Serves the page on --host, by default the loopback address, until Ctrl-C."""
    page = build_page(settings, generate, draw)
    _, address, public = page.launch(
        server_name=settings.host, server_port=settings.port, share=settings.share, quiet=True,
        prevent_thread_lock=True,
    )  # fmt: skip
    print(f"the page is at {public or address}; Ctrl-C ends it", flush=True)
    page.block_thread()
