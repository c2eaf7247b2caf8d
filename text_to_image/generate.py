"""Few-step text to image: Qwen-Image, FLUX.1 and FLUX.2 with the published pi-Flow adapters.

    python -m text_to_image.generate --model gm-qwen --prompt "a jay on a snowy branch"
    python -m text_to_image.generate --tiny --prompt "a dark coat"
    python -m text_to_image.generate --tiny --ui

The second and third run offline on a small model of clothes: a picture, and the page.
In a notebook:

    from text_to_image.generate import load
    generate = load("gm-flux", offload="model")
    result = generate(["a jay", "a fox"], images_per_prompt=2, seed=7)
    result.images[0]

With an adapter, one network evaluation gives a policy; `piflow_minimal.sample` follows four of them
from noise to the picture.
"""

import dataclasses
import itertools
import json
import math
import os
import re
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import text_to_image.families as dm
from common.cli import (
    DEVICE_HELP,
    atomic,
    compiled_policies,
    parse,
    pick_device,
    run_cli,
    setting,
    write_json,
)
from piflow_minimal import Policy, sample
from text_to_image.adapters import (
    LORA_NAME,
    PolicySpec,
    apply_adapter,
    check_adapter,
    policy_of,
    read_adapter,
    read_style,
)
from text_to_image.tiny_fashion import ADAPTERS
from text_to_image.tiny_models import demo_pipeline, tiny_adapter

SHIFT = 3.2  # of the sampler's steps, and of the DX grids: the same for all adapters
FINAL_STEP_SIZE_SCALE = 0.5
DX_SETTINGS = {"type": "DX", "segment_size": 1 / 3.5, "shift": SHIFT}
MOST = {"images_per_prompt": 10_000, "batch": 1000, "nfe": 1000, "total_substeps": 100_000}
LONGEST_SIDE = 8192  # pixels
OUT_OF_MEMORY = (
    "the GPU ran out of memory: try --batch 1, a smaller --height and --width, --offload model or "
    "group, or --quantize int8 or nf4"
)


@dataclass(frozen=True)
class Model:
    """A published adapter: where it is, and what it was trained for."""

    family: str
    repo: str
    subfolder: str
    nfe: int
    elastic: bool = False  # whether more evaluations than that make sense
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

    def __init__(self, pipe: Any, family: dm.Family, policy: PolicySpec, nfe: int, elastic: bool):
        self.pipe, self.family, self.policy = pipe, family, policy
        self.nfe, self.elastic = nfe, elastic
        self.guidance = dm.trained_guidance(pipe.transformer, family)
        self.network_seconds = 0.0

    @property
    def device(self) -> torch.device:
        """Where the network runs (with offloading, not where its weights are)."""
        return torch.device(self.pipe._execution_device)

    def student(self, conditions: dm.Conditions, guidance: float | None = None, progress=None):
        """The callable (x (B, C, H, W), t (B,)) -> policy that `piflow_minimal.sample` takes."""
        guidance = self.guidance if guidance is None or self.guidance is None else guidance

        def evaluate(x: Tensor, t: Tensor) -> Policy:
            start = self._clock()
            output = dm.evaluate(self.pipe, self.family, x, t, conditions, guidance)
            self.network_seconds += self._clock() - start
            if progress is not None:
                progress.update()
            return self.policy.build(output, x, t)

        return evaluate

    def sample(
        self, noise: Tensor, conditions: dm.Conditions, nfe: int | None = None,
        guidance: float | None = None, temperature: float | None = None,
        total_substeps: int = 128, solver: str = "euler", progress: Any = None,
    ) -> Tensor:  # fmt: skip
        """Latents x_0 from noise (B, C, H, W); the arguments are those of the call below."""
        nfe = self.nfe if nfe is None else nfe
        if self.policy.kind == "DX":
            temperature = 1.0
        elif temperature is None:
            temperature = min(max(0.1 * (nfe - 1), 0.1), 1.0)  # the last step has none anyhow
        return sample(
            self.student(conditions, guidance, progress), noise, nfe, SHIFT, FINAL_STEP_SIZE_SCALE,
            temperature=temperature, total_substeps=total_substeps, solver=solver,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(
        self, prompts: str | Sequence[str], images_per_prompt: int = 1, height: int | None = None,
        width: int | None = None, nfe: int | None = None, seed: int = 0,
        guidance: float | None = None, temperature: float | None = None,
        total_substeps: int = 128, solver: str = "euler", batch: int = 1,
        references: Sequence[Any] = (), output: str = "pil",
    ) -> Result:  # fmt: skip
        """Draws len(prompts) * images_per_prompt pictures.

        Args:
            height, width: multiples of 16, else the next smaller ones are used; by default the size
                of the first reference image, or the model's own (1024; --tiny less).
            nfe: network evaluations; what the adapter was trained for if not given.
            seed: picture i starts from noise that depends on seed + i alone, so it is the same in
                every batch, and on every device up to rounding.
            guidance: embedded guidance; the value the adapter was trained at if not given.
            temperature: of a GMFlow policy on every step but the last, > 0;
                min(0.1 (nfe - 1), 1) if not given.
            total_substeps, solver: of the policy rollout, see `piflow_minimal.rollout`.
            batch: pictures per network evaluation.
            references: PIL images, or paths, to edit (FLUX.2 only).
            output: "pil", or "latent" to leave out the VAE.
        Raises: ValueError, one line, for what is not accepted, or if a part of the model gives
            values that are not finite.
        Warns: if the size is changed, or settings are not those the adapter was trained for.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        nfe = self.nfe if nfe is None else nfe
        counts = {"images_per_prompt": images_per_prompt, "nfe": nfe}
        counts |= {"total_substeps": total_substeps, "batch": batch}
        self._check(prompts, counts, seed, temperature, guidance)
        _one_of("output", output, ("pil", "latent"))
        if references and self.family.name != "flux2":
            raise ValueError(f"references: only FLUX.2 edits images, not {self.family.name}")
        references = [dm.read_image(image) for image in references]
        size = (self.pipe.default_sample_size * self.pipe.vae_scale_factor,) * 2
        size = dm.reference_size(self.pipe, references[0]) if references else size
        size = size[0] if height is None else height, size[1] if width is None else width
        height, width = self._size(*size)
        self._warn_if_unusual(nfe, guidance)

        start = self._clock()
        conditions = dm.encode_prompts(self.pipe, self.family, prompts)
        _check_finite("text encoder", conditions.embeds)
        if references:
            tokens, ids = dm.encode_references(self.pipe, references, len(prompts))
            _check_finite("VAE, of the reference images,", tokens)
            conditions = conditions._replace(references=tokens, reference_ids=ids)
        encoded = self._clock()

        count = len(prompts) * images_per_prompt
        shape, latents = dm.latent_shape(self.pipe, height, width), []
        batches = [range(i, min(i + batch, count)) for i in range(0, count, batch)]
        self.network_seconds = 0.0
        with tqdm(total=nfe * len(batches), desc="network evaluations") as progress:
            for rows in batches:
                condition = conditions.rows([i // images_per_prompt for i in rows])
                x = torch.stack([_noise(shape, seed + i) for i in rows])  #  (B, C, H, W)
                settings = nfe, guidance, temperature, total_substeps, solver, progress
                latents.append(self.sample(x.to(self.device), condition, *settings))
        x = torch.cat(latents)
        _check_finite("transformer", x)
        sampled, images = self._clock(), []

        # after all samples: with offloading, VAE and transformer change places only once
        if output == "pil":
            pixels = dm.decode(self.pipe, self.family, x)
            _check_finite("VAE", pixels)
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
        if not prompts or not all(isinstance(text, str) and text.strip() for text in prompts):
            raise ValueError("prompt: at least one is needed, and none may be empty")
        for name, value in counts.items():
            if not isinstance(value, int) or not 1 <= value <= MOST[name]:
                raise ValueError(f"{name} {value!r}: must be a whole number, 1 to {MOST[name]}")
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed!r}: must be a whole number from 0 to 2^63 - 1")
        if guidance is not None and not 0 <= guidance < math.inf:
            raise ValueError(f"guidance {guidance!r}: must be a number, 0 or more")
        if temperature is not None:
            if not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
                raise ValueError(f"temperature {temperature!r}: must be a number above 0")
            if self.policy.kind == "DX":
                raise ValueError("temperature: a DX policy has none; leave it out")

    def _warn_if_unusual(self, nfe: int, guidance: float | None) -> None:
        notes = []
        if guidance is not None and self.guidance is None:
            notes.append(f"guidance {guidance} is not used: this base has no guidance embedding")
        elif guidance not in (None, self.guidance):
            trained = f"the adapter was distilled at {self.guidance}"
            notes.append(f"guidance {guidance}: {trained}; other values can give noise")
        if nfe != self.nfe and not (self.elastic and nfe > self.nfe):
            others = "or more" if self.elastic else "and no other number"
            notes.append(f"nfe {nfe}: the adapter was trained for {self.nfe} {others}")
        for note in notes:
            warnings.warn(note, stacklevel=4)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        step, sides = dm.size_step(self.pipe), (height, width)
        if not all(isinstance(side, int) and step <= side <= LONGEST_SIDE for side in sides):
            accepted = f"whole numbers from {step} to {LONGEST_SIDE}"
            raise ValueError(f"height {height!r}, width {width!r}: must be {accepted}")
        used = height // step * step, width // step * step
        if used != sides:
            given = f"height {height}, width {width}: must be multiples of {step}"
            warnings.warn(f"{given}; {used[0]} x {used[1]} is used", stacklevel=4)
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


def _check_finite(part: str, values: Tensor) -> None:
    """Raises: ValueError that names the part of the model whose output is not finite."""
    if not values.isfinite().all():
        raise ValueError(f"the {part} gives values that are not finite (weights? dtype?)")


def load(
    model: str = "gm-qwen", adapter: str | None = None, base: str | None = None,
    policy: dict | None = None, adapter_scale: float = 1.0, loras: Iterable[tuple[str, float]] = (),
    device: str = "auto", dtype: torch.dtype | None = None, quantize: str = "none",
    offload: str = "none", tiny: bool = False, pixels: int = 1024 * 1024, batch: int = 1,
) -> FewStep:  # fmt: skip
    """A base model with an adapter, ready to be called.

    Args:
        model: a name from `MODELS`; it settles what is not given.
        adapter: folder, or Hub name "user/repo[/folder]", in place of the published one.
        base: folder or Hub name of the base pipeline in place of the published one.
        policy: settings that replace those in the adapter's file: type, segment_size, shift, mode.
        adapter_scale: strength of the adapter's LoRA; head and norm are always replaced.
        loras: (file, folder or Hub name, strength) of style LoRAs for the base model.
        dtype: of the networks; bfloat16 if not given (float32 with `tiny`).
        quantize, offload: see `QUANTIZE_HELP` and `OFFLOADS` in pipelines.py.
        tiny: small models in place of the real ones, see `demo_pipeline`; `adapter` may be given.
        pixels, batch: of the pictures to come, for the memory estimate.
    Raises: ValueError, OSError, ImportError: one line.
    """
    _one_of("model", model, MODELS)
    _one_of("quantize", quantize, dm.BYTES_PER_WEIGHT)
    _one_of("offload", offload, dm.OFFLOADS)
    device, preset, loras = pick_device(device), MODELS[model], list(loras)
    family = dm.FAMILIES[preset.family]
    dtype = dtype or (torch.float32 if tiny else torch.bfloat16)
    if offload != "none" and device.type == "cpu":
        raise ValueError(f"offload {offload!r} needs a GPU; on a CPU use none")
    if tiny and (base or quantize != "none"):
        raise ValueError("tiny: builds its own base, unquantised; leave out base and quantize")
    for name, scale in (("adapter_scale", adapter_scale), *loras):
        if not math.isfinite(scale):
            raise ValueError(f"{name}: strength {scale}; it must be finite")
    pipeline = dm.library_class(dm.import_diffusers(), family.pipeline)
    dm.require_package("peft", "an adapter's LoRA")
    shipped = str(ADAPTERS.get(model, "")) if tiny else f"{preset.repo}/{preset.subfolder}"
    found = read_adapter(adapter or shipped) if adapter or shipped else None
    if tiny:
        pipe = demo_pipeline(family)
        pipe = pipe if dtype == torch.float32 else pipe.to(dtype)
        modules = {k: part for k, part in pipe.components.items() if isinstance(part, nn.Module)}
        # of the models here, the GMFlow ones are those whose policy has no settings
        found = found or tiny_adapter(pipe.transformer, preset.policy is None, preset.policy)
    else:
        modules = dm.empty_components(family, base)
    # all that can be checked is, before tens of GB are loaded
    spec = policy_of(found, policy, None if adapter else preset.policy)
    check_adapter(modules["transformer"], found)
    styles = [read_style(pipeline, modules, where) for where, _ in loras]
    if not tiny:
        counts = dm.count_parameters(modules)
        own = sum(2 * tensor.numel() for tensor in found.tensors.values())
        memory = quantize, offload, pixels, batch, device, tuple(dm.OFFLOADS), own
        print(dm.check_memory(family, counts, *memory))
        pipe = dm.load_base(family, base, dtype, quantize)
    pipe.set_progress_bar_config(disable=True)
    scales = {}
    with warnings.catch_warnings():  # several LoRAs are what we want
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for (where, scale), style in zip(loras, styles, strict=True):
            name = f"style{len(scales)}"
            with dm.naming(f"LoRA {where}"):
                pipe.load_lora_weights(style, adapter_name=name, use_safetensors=True)
            scales[name] = scale
        apply_adapter(pipe.transformer, found, adapter_scale)
    if scales:
        if LORA_NAME in pipe.transformer.peft_config:
            scales[LORA_NAME] = adapter_scale
        pipe.set_adapters(list(scales), list(scales.values()))
    dm.place(pipe, device, offload)
    nfe = re.search(r"(\d+)step", Path(found.name).name)
    generate = FewStep(pipe, family, spec, int(nfe[1]) if nfe else preset.nfe, preset.elastic)
    if family.guidance is not None and generate.guidance is None:
        warnings.warn("this base has no guidance embedding: guidance is not used", stacklevel=2)
    return generate


def _one_of(name: str, value: str, accepted: Iterable[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} {value!r}: must be one of {', '.join(accepted)}")


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The flags."""

    model: str = setting("gm-qwen", "published adapter", choices=MODELS)
    prompt: tuple[str, ...] = setting((), "prompts, at least one picture for each")
    prompt_file: Path | None = setting(None, "UTF-8 text file with one prompt per line")
    images: int = setting(1, "pictures per prompt", low=1, high=MOST["images_per_prompt"])
    height: int | None = setting(
        None, "multiple of 16; that of the first reference, or 1024", low=16, high=LONGEST_SIDE
    )
    width: int | None = setting(None, "as --height", low=16, high=LONGEST_SIDE)
    nfe: int | None = setting(
        None, "network evaluations; that of the adapter's training", low=1, high=MOST["nfe"]
    )
    seed: int = setting(0, "picture i starts from the noise of seed + i", low=0, high=2**63 - 1)
    guidance: float | None = setting(
        None, "embedded guidance; that of the adapter's training", low=0
    )
    temperature: float | None = setting(
        None, "temperature of GMFlow policies; min(0.1 (nfe - 1), 1)", above=0, high=1000
    )
    total_substeps: int = setting(
        128, "substeps of the policy rollout per unit of tau", low=1, high=MOST["total_substeps"]
    )
    solver: str = setting("euler", "solver of the policy rollout", choices=("euler", "deis"))
    compile: bool = setting(False, "torch.compile of the policy")
    batch: int = setting(1, "pictures per network evaluation", low=1, high=MOST["batch"])
    reference: tuple[Path, ...] = setting((), "images to edit (FLUX.2)")
    adapter: str | None = setting(None, "folder or Hub name user/repo[/folder]; the published one")
    adapter_scale: float = setting(1.0, "strength of the adapter's LoRA", low=-10, high=10)
    policy: str | None = setting(None, "JSON that replaces policy settings in the adapter's file")
    lora: tuple[str, ...] = setting(
        (), "style LoRAs, a file, folder or Hub name each", metavar="WHERE[=STRENGTH]"
    )
    base: str | None = setting(None, "folder or Hub name of the base pipeline; the published one")
    quantize: str = setting("none", dm.QUANTIZE_HELP, choices=dm.BYTES_PER_WEIGHT)
    offload: str = setting("none", dm.offload_help(dm.OFFLOADS), choices=dm.OFFLOADS)
    device: str = setting("auto", DEVICE_HELP)
    tiny: bool = setting(
        False, "offline: a small model of clothes (qwen), or small random models (flux)"
    )
    out: Path = setting(Path("outputs/text_to_image"), "folder for the pictures")
    ui: bool = setting(False, "a page in the browser in place of files")
    host: str = setting("127.0.0.1", "address of the page; 0.0.0.0 lets other machines in")
    port: int = setting(7860, "port of the page", low=1, high=65535)


def read_prompts(settings: Settings) -> list[str]:
    """The prompts of --prompt and --prompt-file. Raises: ValueError or OSError."""
    prompts, path = list(settings.prompt), settings.prompt_file
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompt-file {path} is not UTF-8 text: {error}") from error
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"--prompt-file {path} is empty: give a prompt per line")
    if not all(prompt.strip() for prompt in prompts) or not (prompts or settings.ui):
        raise ValueError("--prompt: at least one is needed, and none may be empty")
    return prompts


def load_from(settings: Settings, model: str) -> FewStep:
    """`load` with the flags of the command line."""
    policy, loras = None, []
    if settings.policy is not None:
        try:
            policy = dict(json.loads(settings.policy))
        except (ValueError, TypeError) as error:
            raise ValueError(f"--policy {settings.policy!r}: must be a JSON object") from error
    for text in settings.lora:
        where, _, strength = text.rpartition("=")
        try:
            loras.append((where or text, float(strength) if where else 1.0))
        except ValueError as error:
            raise ValueError(f"--lora {text}: {strength!r} is not a strength") from error
    s, pixels = settings, (settings.height or 1024) * (settings.width or 1024)
    return load(
        model, s.adapter, s.base, policy, s.adapter_scale, loras, s.device, None, s.quantize,
        s.offload, s.tiny, pixels, s.batch,
    )  # fmt: skip


def report(result: Result) -> str:
    """One line: how many pictures, and seconds per picture by part."""
    parts = ", ".join(f"{part} {value:.2f}" for part, value in result.seconds.items())
    total = sum(result.seconds.values())
    return f"{len(result.seeds)} images: {total:.2f} s per image ({parts})"


def write(result: Result, out: Path, about: dict[str, Any]) -> Path:
    """Writes pictures, and a JSON file about them, beside those of earlier runs -> that file."""
    out.mkdir(parents=True, exist_ok=True)
    for run in itertools.count():  # the first number that no run has, or is taking just now
        try:
            notes = out / f"{run:04d}.json"
            notes.touch(exist_ok=False)
            break
        except FileExistsError:
            continue
    try:
        for image, seed in zip(result.images, result.seeds, strict=True):
            with atomic(out / f"{run:04d}_seed{seed}.png") as path:
                image.save(path)
        write_json(notes, about)
    except OSError:
        notes.unlink()
        raise
    return notes


def main(argv: Sequence[str] | None = None) -> None:
    """The command: draws pictures into a folder, or opens the page."""
    settings = parse(Settings, __doc__, argv)
    prompts = read_prompts(settings)
    if settings.ui:
        from text_to_image.page import open_page

        return open_page(settings)
    nearest = next(path for path in (settings.out, *settings.out.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"--out {settings.out}: {nearest} is not a folder, or is read-only")
    references = [dm.read_image(path) for path in settings.reference]
    try:
        generate = load_from(settings, settings.model)
        with compiled_policies(settings.compile):
            result = generate(
                prompts, settings.images, settings.height, settings.width, settings.nfe,
                settings.seed, settings.guidance, settings.temperature, settings.total_substeps,
                settings.solver, settings.batch, references,
            )  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise ValueError(OUT_OF_MEMORY) from error
    about = dataclasses.asdict(settings) | {"prompt": prompts, "nfe": settings.nfe or generate.nfe}
    about |= {"seeds": result.seeds, "size": result.images[0].size, "seconds": result.seconds}
    path = write(result, settings.out, json.loads(json.dumps(about, default=str)))
    print(f"{report(result)}; wrote {path} and its pictures")


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    run_cli(main)
