"""Few-step text to image: Qwen-Image, FLUX.1 and FLUX.2 with the published pi-Flow adapters.

    python -m text_to_image.generate --model gm-qwen --prompt "a jay on a snowy branch"
    python -m text_to_image.generate --tiny --ui     # the page, with small random models, offline

In a notebook:

    from text_to_image.generate import load
    generate = load("gm-flux", offload="model")
    result = generate(["a jay", "a fox"], images_per_prompt=2, seed=7)
    result.images[0]

With an adapter, one network evaluation gives a policy; `piflow_minimal.sample` follows four of them
from noise to the picture. In reading order: which adapters there are; the student and the call;
loading; command line and page. The base models are in pipelines.py, the adapters (heads,
files, LoRA) in adapters.py.
"""

import argparse
import json
import math
import re
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import text_to_image.pipelines as dm
from common.cli import atomic, compiled_policies, pick_device, run_cli, write_json
from piflow_minimal import DXPolicy, GMFlowPolicy, sample
from text_to_image.adapters import (
    LORA_NAME,
    PolicySpec,
    apply_adapter,
    check_adapter,
    policy_of,
    read_adapter,
)
from text_to_image.tiny_models import tiny_adapter, tiny_pipeline

SHIFT = 3.2  # of the sampler's steps, and of the DX grids: the same for all adapters
FINAL_STEP_SIZE_SCALE = 0.5
DX_SETTINGS = {"type": "DX", "segment_size": 1 / 3.5, "shift": SHIFT}


@dataclass(frozen=True)
class Model:
    """A published adapter: where it is, and what it was trained for."""

    family: str
    repo: str
    subfolder: str
    steps: int
    elastic: bool = False  # whether more steps than that make sense
    policy: dict | None = None  # as its model card states, should the file not say it


MODELS = {
    "gm-qwen": Model("qwen", "Lakonik/pi-Qwen-Image", "gmqwen_k8_piid_4step", 4, elastic=True),
    "dx-qwen": Model(
        "qwen", "Lakonik/pi-Qwen-Image", "dxqwen_n10_piid_4step", 4, policy=DX_SETTINGS
    ),
    "gm-flux": Model("flux", "Lakonik/pi-FLUX.1", "gmflux_k8_piid_4step", 4),
    "gm-flux-8step": Model("flux", "Lakonik/pi-FLUX.1", "gmflux_k8_piid_8step", 8),
    "dx-flux": Model("flux", "Lakonik/pi-FLUX.1", "dxflux_n10_piid_4step", 4, policy=DX_SETTINGS),
    "gm-flux2": Model("flux2", "Lakonik/pi-FLUX.2", "gmflux2_k8_piid_4step", 4, elastic=True),
}


# ------------------------------------------------------------------------------------------------
# The student, and the call
# ------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """Images of one call, in the order of the prompts; image i was made with seed + i."""

    images: list[Any]  # PIL; empty for output="latent"
    latents: Tensor  # (B, C, H, W), on the CPU
    seeds: list[int]
    seconds: dict[str, float]  # per image: "network", "policy", "text", "vae"


class FewStep:
    """A base pipeline with an adapter: call it with prompts. Made by `load`."""

    def __init__(self, pipe: Any, family: dm.Family, policy: PolicySpec, steps: int, elastic: bool):
        self.pipe, self.family, self.policy = pipe, family, policy
        self.steps, self.elastic = steps, elastic
        self.network_seconds = 0.0

    @property
    def device(self) -> torch.device:
        """Where the network runs (with offloading, not where its weights are)."""
        return torch.device(self.pipe._execution_device)

    def student(self, conditions: dm.Conditions, guidance: float | None = None, progress=None):
        """The callable (x (B, C, H, W), t (B,)) -> policy that `piflow_minimal.sample` asks for."""

        def evaluate(x: Tensor, t: Tensor) -> GMFlowPolicy | DXPolicy:
            start = self._clock()
            output = dm.evaluate(self.pipe, self.family, x, t, conditions, guidance)
            self.network_seconds += self._clock() - start
            if progress is not None:
                progress.update()
            return self.policy.build(output, x, t)

        return evaluate

    def sample(
        self,
        noise: Tensor,
        conditions: dm.Conditions,
        steps: int | None = None,
        guidance: float | None = None,
        temperature: float | str = "auto",
        total_substeps: int = 128,
        progress: Any = None,
    ) -> Tensor:
        """Latents x_0 from noise (B, C, H, W), with `steps` network evaluations of the batch."""
        steps = self.steps if steps is None else steps
        guidance = self.family.guidance if guidance is None else guidance
        if self.policy.kind == "DX":
            temperature = 1.0
        elif temperature == "auto":
            temperature = min(max(0.1 * (steps - 1), 0.1), 1.0)  # the last step has none anyhow
        return sample(
            self.student(conditions, guidance, progress), noise, steps, SHIFT,
            FINAL_STEP_SIZE_SCALE, temperature=temperature, total_substeps=total_substeps,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
        images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        guidance: float | None = None,
        temperature: float | str = "auto",
        total_substeps: int = 128,
        batch_size: int = 1,
        references: Sequence[Any] = (),
        output: str = "pil",
    ) -> Result:
        """Draws len(prompts) * images_per_prompt pictures.

        Args:
            height, width: multiples of 16, else the next smaller ones are used; 1024 if not given,
                with reference images the size of the first.
            steps: network evaluations; what the adapter was trained for if not given.
            seed: picture i starts from noise that depends on seed + i alone, so it is the same in
                every batch, and on every device up to rounding.
            guidance: embedded guidance; the value the adapter was trained at if not given.
            temperature: of a GMFlow policy on every step but the last, > 0, or "auto":
                min(max(0.1 (steps - 1), 0), 1).
            total_substeps: of the policy's rollout, per unit of tau.
            batch_size: pictures per network evaluation.
            references: PIL images to edit (FLUX.2 only).
            output: "pil", or "latent" to leave out the VAE.
        Raises: ValueError, one line, for what is not accepted, or if a part of the model gives
            values that are not finite.
        Warns: if the size is changed, or settings are not those the adapter was trained for.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        steps = self.steps if steps is None else steps
        counts = {"images_per_prompt": images_per_prompt, "steps": steps}
        counts |= {"total_substeps": total_substeps, "batch_size": batch_size}
        self._check(prompts, counts, seed, temperature, guidance)
        _one_of("output", output, ("pil", "latent"))
        if references and self.family.name != "flux2":
            raise ValueError(f"references: only FLUX.2 edits images, not {self.family.name}")
        size = dm.reference_size(self.pipe, references[0]) if references else (1024, 1024)
        height, width = self._size(
            size[0] if height is None else height, size[1] if width is None else width
        )
        self._warn_if_unusual(steps, guidance)

        start = self._clock()
        conditions = dm.encode_prompts(self.pipe, self.family, prompts)
        if references:
            tokens, ids = dm.encode_references(self.pipe, references, len(prompts))
            check_finite("VAE (reference images)", tokens)
            conditions = conditions._replace(references=tokens, reference_ids=ids)
        check_finite("text encoder", conditions.embeds)
        encoded = self._clock()

        count = len(prompts) * images_per_prompt
        shape, latents = dm.latent_shape(self.pipe, height, width), []
        batches = [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
        self.network_seconds = 0.0
        with tqdm(total=steps * len(batches), desc="network evaluations") as progress:
            for batch in batches:
                rows = conditions.rows([i // images_per_prompt for i in batch])
                x = torch.stack([_noise(shape, seed + i) for i in batch])  #  (B, C, H, W)
                arguments = rows, steps, guidance, temperature, total_substeps, progress
                latents.append(self.sample(x.to(self.device), *arguments))
        sampled, x = self._clock(), torch.cat(latents)
        check_finite("transformer", x)

        # after all samples: with offloading, VAE and transformer change places only once
        images = []
        if output == "pil":
            pixels = dm.decode(self.pipe, self.family, x)
            check_finite("VAE", pixels)
            images = dm.to_pil(self.pipe, pixels)
        decoded = self._clock()
        self.pipe.maybe_free_model_hooks()
        seconds = {
            "text": encoded - start,
            "network": self.network_seconds,
            "policy": sampled - encoded - self.network_seconds,
            "vae": decoded - sampled,
        }
        seconds = {part: value / count for part, value in seconds.items()}
        return Result(images, x.cpu(), [seed + i for i in range(count)], seconds)

    def _check(self, prompts: list, counts: dict, seed, temperature, guidance) -> None:
        if not prompts or any(not prompt.strip() for prompt in prompts):
            raise ValueError("prompt: at least one is needed, and none may be empty")
        for name, value in counts.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} {value!r}: must be a whole number, 1 or more")
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed!r}: must be a whole number from 0 to 2^63 - 1")
        if guidance is not None and not 0 <= guidance < math.inf:
            raise ValueError(f"guidance {guidance!r}: must be a number, 0 or more")
        if temperature != "auto":
            if not isinstance(temperature, int | float) or not 0 < temperature:
                raise ValueError(f"temperature {temperature!r}: must be above 0, or 'auto'")
            if self.policy.kind == "DX":
                raise ValueError("temperature: a DX policy has none; leave it at 'auto'")

    def _warn_if_unusual(self, steps: int, guidance: float | None) -> None:
        trained = self.family.guidance
        if guidance is not None and trained is None:
            warnings.warn(f"guidance {guidance} is not used: Qwen-Image has none", stacklevel=4)
        elif guidance is not None and guidance != trained:
            warnings.warn(
                f"guidance {guidance}: the adapter was distilled at {trained}; other values can "
                "give noise",
                stacklevel=4,
            )
        if steps != self.steps and not (self.elastic and steps > self.steps):
            warnings.warn(
                f"steps {steps}: the adapter was trained for {self.steps}"
                + (" or more" if self.elastic else " and no other number"),
                stacklevel=4,
            )

    def _size(self, height: int, width: int) -> tuple[int, int]:
        step = dm.size_step(self.pipe)
        if not all(isinstance(side, int) and side >= step for side in (height, width)):
            raise ValueError(f"height {height!r}, width {width!r}: must be whole numbers >= {step}")
        used = height // step * step, width // step * step
        if used != (height, width):
            warnings.warn(
                f"height {height}, width {width}: must be multiples of {step}; {used[0]} x "
                f"{used[1]} is used",
                stacklevel=4,
            )
        return used

    def _clock(self) -> float:
        """Seconds, once the device has finished what it was given."""
        if self.device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Drawn on the CPU: the same numbers for every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_finite(part: str, values: Tensor) -> None:
    """Raises: ValueError that names the part of the model whose output is not finite."""
    if not values.isfinite().all():
        raise ValueError(f"the {part} gives values that are not finite (its weights, or its dtype)")


def load(
    model: str = "gm-qwen",
    adapter: str | None = None,
    base: str | None = None,
    policy: dict | None = None,
    adapter_scale: float = 1.0,
    loras: Iterable[tuple[str, float]] = (),
    device: str = "auto",
    dtype: torch.dtype | None = None,
    quantize: str = "none",
    offload: str = "none",
    tiny: bool = False,
    pixels: int = 1024 * 1024,
    batch_size: int = 1,
) -> FewStep:
    """A base model with an adapter, ready to be called.

    Args:
        model: a name from `MODELS`; it settles what is not given.
        adapter: folder, or Hub name "user/repo[/folder]", in place of the published one.
        base: folder or Hub name of the base pipeline in place of the published one.
        policy: settings that replace those in the adapter's file: type, segment_size, shift, mode.
        adapter_scale: strength of the adapter's LoRA; head and norm are always replaced.
        loras: (folder, file or Hub name, strength) of further LoRAs for the base model.
        dtype: of the networks; bfloat16 if not given (float32 with `tiny`).
        quantize, offload: see `QUANTIZE_HELP` and `OFFLOADS` in pipelines.py.
        tiny: small random models in place of the real ones; `adapter` may still be given.
        pixels, batch_size: of the pictures to come, for the memory estimate.
    Raises: ValueError, OSError, ImportError: one line.
    """
    _one_of("model", model, MODELS)
    _one_of("quantize", quantize, dm.BYTES_PER_WEIGHT)
    _one_of("offload", offload, dm.OFFLOADS)
    device, preset = pick_device(device), MODELS[model]
    family = dm.FAMILIES[preset.family]
    dtype = dtype or (torch.float32 if tiny else torch.bfloat16)
    if offload != "none" and device.type == "cpu":
        raise ValueError(f"offload {offload!r} needs a GPU; on a CPU use none")
    if tiny and (base or quantize != "none"):
        raise ValueError("tiny: builds its own base, unquantised; leave out base and quantize")
    dm.import_diffusers()
    if tiny:
        pipe, published = tiny_pipeline(family), None
        pipe = pipe if dtype == torch.float32 else pipe.to(dtype)
        # of the models here, the GMFlow ones are those whose policy has no settings
        found = tiny_adapter(pipe.transformer, preset.policy is None, preset.policy)
    else:
        published = f"{preset.repo}/{preset.subfolder}"
    if adapter or published:
        found = read_adapter(adapter or published)
    spec = policy_of(found, policy, None if adapter else preset.policy)
    if not tiny:  # all that can be checked is, before tens of GB are loaded
        modules = dm.empty_components(family, base)
        check_adapter(modules["transformer"], found)
        counts = dm.count_parameters(modules)
        own = sum(2 * tensor.numel() for tensor in found.tensors.values())
        memory = quantize, offload, pixels, batch_size, device, tuple(dm.OFFLOADS), own
        print(dm.check_memory(family, counts, *memory))
        pipe = dm.load_base(family, base, dtype, quantize)
    pipe.set_progress_bar_config(disable=True)
    loras = list(loras)
    names = {f"style{i}": scale for i, (_, scale) in enumerate(loras)}
    for name, (where, _) in zip(names, loras, strict=True):
        pipe.load_lora_weights(where, adapter_name=name)
    if hasattr(pipe.transformer.proj_out, "lora_A"):
        warnings.warn(
            "a LoRA changes the output layer, which the adapter replaces: that part is not used",
            stacklevel=2,
        )
    apply_adapter(pipe.transformer, found, adapter_scale)
    if names:
        scales = names | {LORA_NAME: adapter_scale}
        pipe.transformer.set_adapters(list(scales), list(scales.values()))
    dm.place(pipe, device, offload)
    steps = re.search(r"(\d+)step", Path(found.name).name)
    steps = int(steps[1]) if steps else preset.steps
    return FewStep(pipe, family, spec, steps, preset.elastic)


def _one_of(name: str, value: str, accepted: Iterable[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} {value!r}: must be one of {', '.join(accepted)}")


# ------------------------------------------------------------------------------------------------
# Command line and page
# ------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags as a namespace, checked as far as that goes without a model.

    Raises: ValueError or OSError, one line, for what is not accepted.
    """
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="gm-qwen", choices=MODELS, help="published adapter")
    add("--prompt", nargs="+", default=[], help="one or more prompts")
    add("--prompt-file", help="text file with one prompt per line")
    add("--images", type=int, default=1, help="pictures per prompt")
    add("--height", type=int, help="multiple of 16; 1024, or that of the first reference")
    add("--width", type=int, help="multiple of 16; 1024, or that of the first reference")
    add("--steps", type=int, help="network evaluations; default: what the adapter was trained for")
    add("--seed", type=int, default=0, help="picture i starts from seed + i")
    add("--guidance", type=float, help="embedded guidance; default: as the adapter was trained")
    add("--temperature", default="auto", help="of GMFlow policies: a number above 0, or auto")
    add("--substeps", type=int, default=128, help="of the policy, per unit of time")
    add("--compile", action="store_true", help="torch.compile the policy")
    add("--batch-size", type=int, default=1, help="pictures per network evaluation")
    add("--reference", nargs="+", default=[], help="pictures to edit (FLUX.2)")
    add("--adapter", help="folder or Hub name user/repo[/folder], in place of the published one")
    add("--adapter-scale", type=float, default=1.0, help="strength of the adapter's LoRA")
    add("--policy", help="JSON: policy settings in place of those in the adapter's file")
    add("--lora", nargs="+", action="append", default=[], metavar=("WHERE", "STRENGTH"),
        help="a further LoRA and its strength (1 if not given); may be repeated")  # fmt: skip
    add("--base", help="folder or Hub name of the base pipeline, in place of the published one")
    add("--quantize", default="none", choices=dm.BYTES_PER_WEIGHT, help=dm.QUANTIZE_HELP)
    add("--offload", default="none", choices=dm.OFFLOADS, help=dm.offload_help(dm.OFFLOADS))
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--tiny", action="store_true", help="small random models: pictures of noise, offline")
    add("--out", default="outputs/text_to_image", help="folder for the pictures")
    add("--ui", action="store_true", help="open a page on 127.0.0.1 instead")
    add("--port", type=int, default=7860, help="of the page")
    args = parser.parse_args(argv)
    if args.prompt_file is not None:
        lines = Path(args.prompt_file).read_text().splitlines()
        args.prompt = [*args.prompt, *(line.strip() for line in lines if line.strip())]
        if not args.prompt:
            raise ValueError(f"--prompt-file {args.prompt_file} is empty: give a prompt per line")
    if not args.ui and not args.prompt:
        raise ValueError("--prompt: at least one is needed (or --prompt-file, or --ui)")
    if args.temperature != "auto":
        args.temperature = _number("--temperature", args.temperature)
    if args.policy is not None:
        try:
            args.policy = dict(json.loads(args.policy))
        except (ValueError, TypeError) as error:
            raise ValueError(f"--policy {args.policy!r}: must be a JSON object") from error
    for lora in args.lora:
        if len(lora) > 2:
            raise ValueError(f"--lora {' '.join(lora)}: give one place and at most one number")
    args.lora = [(where, _number("--lora", *rest) if rest else 1.0) for where, *rest in args.lora]
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise ValueError(f"--out {args.out} is a file: give a folder")
    args.reference = [_read_image(path) for path in args.reference]
    return args


def _number(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{flag} {text!r}: must be a number") from error


def _read_image(path: str) -> Any:
    from PIL import Image

    return Image.open(path).convert("RGB")


def load_from(args: argparse.Namespace, model: str) -> FewStep:
    """`load` with the flags of the command line."""
    pixels = (args.height or 1024) * (args.width or 1024)
    return load(
        model, args.adapter, args.base, args.policy, args.adapter_scale, args.lora, args.device,
        None, args.quantize, args.offload, args.tiny, pixels, args.batch_size,
    )  # fmt: skip


def report(result: Result) -> str:
    """One line: how many pictures, and seconds per picture by part."""
    parts = ", ".join(f"{part} {value:.2f}" for part, value in result.seconds.items())
    total = sum(result.seconds.values())
    return f"{len(result.seeds)} images, {total:.2f} s per image ({parts})"


def main(argv: Sequence[str] | None = None) -> None:
    """The command: draws pictures into a folder, or opens the page."""
    args = parse_arguments(argv)
    if args.ui:
        dm.require_package("gradio", "--ui")
        dm.import_diffusers()
        from text_to_image.page import build_page

        page = build_page(args).queue()
        _, address, _ = page.launch(
            server_name="127.0.0.1", server_port=args.port, share=False, quiet=True,
            prevent_thread_lock=True,
        )  # fmt: skip
        print(f"the page is at {address}; Ctrl-C ends it", flush=True)
        page.block_thread()
        return
    try:
        generate = load_from(args, args.model)
        with compiled_policies(args.compile):
            result = generate(
                args.prompt, args.images, args.height, args.width, args.steps, args.seed,
                args.guidance, args.temperature, args.substeps, args.batch_size, args.reference,
            )  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "the GPU ran out of memory: try --batch-size 1, a smaller --height and --width, "
            "--offload model or group, or --quantize int8 or nf4"
        ) from error
    out = Path(args.out)
    for i, (image, seed) in enumerate(zip(result.images, result.seeds, strict=True)):
        with atomic(out / f"{i:03d}_seed{seed}.png") as path:
            image.save(path)
    settings = {
        "model": args.model, "adapter": args.adapter, "prompts": args.prompt, "seeds": result.seeds,
        "size": result.images[0].size, "steps": args.steps or generate.steps, "tiny": args.tiny,
        "seconds_per_image": result.seconds,
    }  # fmt: skip
    write_json(out / "run.json", settings)
    print(f"{report(result)}; written to {out}")


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    run_cli(main)
