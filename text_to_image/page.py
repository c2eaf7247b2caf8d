"""The Gradio page of text_to_image/generate.py (--ui)."""

import argparse
import warnings
from typing import Any

import torch

from text_to_image.generate import MODELS, FewStep, _number, load_from, report
from text_to_image.pipelines import release_memory


def build_page(args: argparse.Namespace) -> Any:
    """The Gradio page. Models are loaded when they are first drawn with, one at a time."""
    import gradio as gr

    loaded: dict[str, FewStep] = {}

    def draw(prompt, model, steps, temperature, seed, images, width, height):
        try:
            if model not in loaded:
                loaded.clear()  # one model at a time fits
                release_memory()
                loaded[model] = load_from(args, model)
            if temperature != "auto":
                temperature = _number("temperature", temperature)
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always", UserWarning)
                result = loaded[model](
                    prompt, int(images), int(height), int(width), int(steps), int(seed),
                    temperature=temperature, batch_size=args.batch_size,
                )  # fmt: skip
        except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
            raise gr.Error(str(error)) from error
        captions = [f"seed {seed}" for seed in result.seeds]
        status = [report(result), *(str(note.message) for note in notes)]
        return list(zip(result.images, captions, strict=True)), "\n".join(status)

    side = 64 if args.tiny else 1024
    with gr.Blocks(title="pi-Flow text to image", analytics_enabled=False) as page:
        gr.Markdown("## Few-step text to image" + (" (small random models)" if args.tiny else ""))
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(label="Prompt", value=" ".join(args.prompt), lines=3)
                model = gr.Dropdown(list(MODELS), value=args.model, label="Model")
                with gr.Row():
                    steps = gr.Slider(
                        1, 32, args.steps or MODELS[args.model].steps, step=1, label="Steps"
                    )
                    temperature = gr.Textbox(str(args.temperature), label="Temperature")
                with gr.Row():
                    seed = gr.Number(args.seed, label="Seed", precision=0, minimum=0)
                    images = gr.Slider(1, 8, args.images, step=1, label="Images")
                with gr.Row():
                    width = gr.Number(args.width or side, label="Width", precision=0)
                    height = gr.Number(args.height or side, label="Height", precision=0)
                button = gr.Button("Draw", variant="primary")
            with gr.Column():
                gallery = gr.Gallery(label="Pictures", columns=2, height=560, format="png")
                status = gr.Textbox(label="Status", lines=2, interactive=False)
        model.change(lambda name: MODELS[name].steps, model, steps, api_name=False)
        inputs = [prompt, model, steps, temperature, seed, images, width, height]
        button.click(draw, inputs, [gallery, status], api_name="draw", concurrency_limit=1)
    return page
