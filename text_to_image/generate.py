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
"""

if not __package__:
    raise SystemExit("start it in the repository's root: python -m text_to_image.generate")

import dataclasses
import json
import math
import os
import re
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import text_to_image.families as dm
import text_to_image.loading as loading
from common.cli import (
    DEVICE_HELP,
    MAX_SEED,
    keep_freed_memory,
    parse,
    pick_device,
    run_cli,
    setting,
)
from common.files import write_json, writing
from text_to_image.adapters import (
    LORA_NAME,
    apply_adapter,
    check_adapter,
    policy_of,
    read_adapter,
    read_style,
)
from text_to_image.few_step import FewStep, Result, read_reference
from text_to_image.page import open_page
from text_to_image.prompts import KNOWN, read_source
from text_to_image.tiny import ADAPTERS, demo_pipeline


@dataclass(frozen=True)
class Model:
    """A published adapter: where it is, and what its model card says."""

    family: str
    repo: str
    subfolder: str
    nfe: int = 4
    elastic: bool = False  # whether more evaluations than that make sense
    policy: dict | None = None  # if the file does not state it


QWEN, FLUX, FLUX2 = "Lakonik/pi-Qwen-Image", "Lakonik/pi-FLUX.1", "Lakonik/pi-FLUX.2"
GRID = {"type": "DX", "segment_size": 1 / 3.5, "shift": dm.SHIFT}
POLYNOMIAL = {"type": "DX", "mode": "polynomial", "shift": dm.SHIFT}
MODELS = {
    "gm-qwen": Model("qwen", QWEN, "gmqwen_k8_piid_4step", elastic=True),
    "gm-qwen-datafree": Model("qwen", QWEN, "gmqwen_k8_datafree_piid_4step", elastic=True),
    "dx-qwen": Model("qwen", QWEN, "dxqwen_n10_piid_4step", policy=GRID),
    "dx-qwen-p10": Model("qwen", QWEN, "dxqwen_p10_piid_4step", policy=POLYNOMIAL),
    "gm-flux": Model("flux", FLUX, "gmflux_k8_piid_4step"),
    "gm-flux-8step": Model("flux", FLUX, "gmflux_k8_piid_8step", nfe=8),
    "gm-flux-datafree": Model("flux", FLUX, "gmflux_k8_datafree_piid_4step"),
    "dx-flux": Model("flux", FLUX, "dxflux_n10_piid_4step", policy=GRID),
    "gm-flux2": Model("flux2", FLUX2, "gmflux2_k8_piid_4step", elastic=True),
}


# ---- Loading -------------------------------------------------------------------------------------


def load(
    model: str = "gm-qwen", adapter: str | None = None, base: str | None = None,
    policy: dict | None = None, loras: Iterable[tuple[str, float]] = (), device: str = "auto",
    dtype: torch.dtype = torch.bfloat16, quantize: str = "none", offload: str = "none",
    tiny: bool = False, pixels: int = 1024 * 1024, batch: int = 1, h: float = 0.0,
    shift: float | None = None,
) -> FewStep:  # fmt: skip
    """A base model with an adapter, ready to be called.

    Args:
        model: a name from `MODELS`; it settles what is not given.
        adapter, base: folder or Hub name, in place of the published adapter or base pipeline.
        policy: settings that replace those in the adapter's file: type, segment_size, shift, mode.
        loras: (file, folder or Hub name, strength) of style LoRAs for the base model.
        dtype: of the networks.
        quantize, offload: see `QUANTIZE_HELP` and `OFFLOAD_HELP` in loading.py.
        tiny: a small base in float32, see tiny.py, in place of `base`, `dtype` and `quantize`.
        pixels, batch: of the pictures to come, for the memory estimate.
        h, shift: of the sampler, where a call does not give them; shift: as trained if not given.
    Raises: ValueError, OSError, ImportError: one line.
    Warns: if an adapter that is given does not state what it was trained at.
    """
    device = pick_device(device)
    card = MODELS[model]
    family = dm.FAMILIES[card.family]
    loras = list(loras)
    pipeline = loading.pipeline_class(family)
    dm.require_package("peft", "an adapter's LoRA")
    where = adapter or (ADAPTERS.get(model) if tiny else f"{card.repo}/{card.subfolder}")
    if where is None:
        raise ValueError(f"tiny: no small adapter of {model} ships; give one of distill.py")
    found = read_adapter(str(where))
    if tiny:
        pipe = demo_pipeline(family)
        modules = {k: part for k, part in pipe.components.items() if isinstance(part, nn.Module)}
    else:
        modules = loading.empty_components(family, base)
    # all that can be checked is, before tens of GB are loaded
    spec = policy_of(found, policy, None if adapter else card.policy)
    check_adapter(modules["transformer"], found)
    styles = [read_style(pipeline, modules, style) for style, _ in loras]
    if not tiny:
        weights = loading.weights_on_gpu(family, modules, quantize, offload)
        need = loading.memory_needed(weights, family, pixels, batch)
        helps = "--offload model or group, --quantize int8 or nf4, or --batch 1"
        print(loading.check_memory(need, device, helps))
        pipe = loading.load_base(family, base, dtype, quantize)
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():  # several LoRAs are what we want
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for i, style in enumerate(styles):
            with dm.naming(f"LoRA {loras[i][0]}"):
                pipe.load_lora_weights(**style, adapter_name=f"style{i}")
        apply_adapter(pipe.transformer, found)
    if styles:
        strengths = {f"style{i}": strength for i, (_, strength) in enumerate(loras)}
        if LORA_NAME in pipe.transformer.peft_config:
            strengths[LORA_NAME] = 1.0
        pipe.set_adapters(list(strengths), list(strengths.values()))
    loading.place(pipe, device, offload)
    generate = FewStep(pipe, family, spec, card.nfe, card.elastic, found.sampling)
    generate.h = h
    generate.shift = shift or generate.shift
    if adapter and found.sampling is None:
        known = f"{generate.nfe} evaluations, guidance {generate.guidance or 'none'}"
        given = f"adapter {adapter} does not state what it was trained at"
        warnings.warn(f"{given}; it is used as {model}: {known}", stacklevel=2)
    return generate


# ---- Command line --------------------------------------------------------------------------------


OWN = "default: the model's"


@dataclass(frozen=True)
class LoadSettings:
    """The flags that say what draws. Without a value: as published, or as trained."""

    model: str = setting("gm-qwen", "published adapter", choices=MODELS)
    adapter: str | None = setting(None, "adapter: a folder, or user/repo[/folder] (Hub)", path=True)
    policy: str | None = setting(None, "JSON that replaces policy settings in the adapter's file")
    lora: tuple[str, ...] = setting((), "style LoRAs: file or Hub name", metavar="LORA[=STRENGTH]")
    base: str | None = setting(None, "base pipeline: a folder or Hub name", path=True)
    quantize: str = setting("none", loading.QUANTIZE_HELP, choices=loading.BYTES_PER_WEIGHT)
    offload: str = setting("none", loading.OFFLOAD_HELP, choices=loading.OFFLOADS)
    device: str = setting("auto", DEVICE_HELP)
    tiny: bool = setting(False, "offline: a small model; --base and --quantize have no effect")
    height: int | None = setting(None, f"a multiple of 16; {OWN}", low=16, high=8192)
    width: int | None = setting(None, f"a multiple of 16; {OWN}", low=16, high=8192)
    batch: int = setting(1, "pictures per network evaluation", low=1, high=1000)
    seed: int = setting(0, "picture i starts from the noise of seed + i", low=0, high=MAX_SEED)
    nfe: int | None = setting(None, f"network evaluations; {OWN}", low=1, high=1000)
    guidance: float | None = setting(None, f"embedded guidance; {OWN}", low=0)
    temperature: float | None = setting(None, "GM temperature, without effect above 1", above=0)
    h: float = setting(0.0, "stochasticity of the sampler, up to inf", low=0, high=math.inf)
    shift: float | None = setting(None, f"shift of the sampler's times; {OWN}", above=0)
    total_substeps: int | None = setting(None, f"substeps per unit of tau; {OWN}", low=1)
    solver: str | None = setting(
        None, f"solver of the policy rollout; {OWN}", choices=("euler", "deis")
    )


@dataclass(frozen=True)
class Settings(LoadSettings):
    """The flags."""

    prompt: tuple[str, ...] = setting((), "prompts, at least one picture for each")
    prompt_file: Path | None = setting(None, f"prompts: {KNOWN}, or a Hub dataset")
    images: int = setting(1, "pictures per prompt", low=1, high=10_000)
    reference: tuple[Path, ...] = setting((), "images to edit (FLUX.2)")
    out: Path = setting(Path("outputs/text_to_image"), "folder for the pictures")
    ui: bool = setting(False, "a page in the browser in place of files")
    host: str = setting("127.0.0.1", "address of the page; 0.0.0.0 lets other machines in")
    port: int = setting(7860, "port of the page", low=1, high=65535)
    share: bool = setting(False, "a public address for the page, through Gradio's servers")


def read_prompts(settings: Settings) -> list[str]:
    """The prompts of --prompt and --prompt-file. Raises: ValueError or OSError."""
    prompts = list(settings.prompt)
    if settings.prompt_file is not None:
        prompts += [prompt for prompt, _ in read_source(settings.prompt_file)]
    if not all(prompt.strip() for prompt in prompts) or not prompts:
        raise ValueError("--prompt: at least one is needed, and none may be empty")
    return prompts


def load_from(settings: LoadSettings) -> FewStep:
    """`load` with the flags of the command line."""
    s, policy, loras = settings, None, []
    if s.policy is not None:
        with dm.naming(f"--policy {s.policy!r}: must be a JSON object"):
            policy = dict(json.loads(s.policy))
    for text in s.lora:
        where, _, strength = text.rpartition("=")
        with dm.naming(f"--lora {text}: {strength!r} is not a strength"):
            loras.append((os.path.expanduser(where or text), float(strength) if where else 1.0))
    return load(
        s.model, s.adapter, s.base, policy, loras, s.device, quantize=s.quantize,
        offload=s.offload, tiny=s.tiny, pixels=(s.height or 1024) * (s.width or 1024),
        batch=s.batch, h=s.h, shift=s.shift,
    )  # fmt: skip


def draw(
    generate: FewStep, settings: LoadSettings, prompts: Sequence[str], images: int = 1,
    references: Sequence[Any] = (),
) -> Result:  # fmt: skip
    """One call with the flags of the command line. Raises: ValueError for too little memory."""
    s = settings
    try:
        return generate(
            prompts, images, s.height, s.width, s.seed, s.batch, references, nfe=s.nfe,
            guidance=s.guidance, temperature=s.temperature, total_substeps=s.total_substeps,
            solver=s.solver,
        )  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "the GPU ran out of memory: try --batch 1, a smaller --height and --width, --offload "
            "model or group, or --quantize int8 or nf4"
        ) from error


def write(result: Result, out: Path, about: dict[str, Any]) -> Path:
    """Writes pictures, and a JSON file about them, beside those of earlier runs -> that file."""
    runs = [int(re.match(r"\d+", path.name)[0]) for path in out.glob("[0-9][0-9][0-9][0-9]*")]
    run = max(runs, default=-1) + 1
    for image, seed in zip(result.images, result.seeds, strict=True):
        with writing(out / f"{run:04d}_seed{seed}.png") as path:
            image.save(path)
    write_json(out / f"{run:04d}.json", about)
    return out / f"{run:04d}.json"


def main(argv: Sequence[str] | None = None) -> None:
    """The command: draws pictures into a folder, or opens the page."""
    keep_freed_memory()
    settings = parse(Settings, __doc__, argv)
    if settings.ui:
        dm.require_package("gradio", "--ui")
        return open_page(settings, load_from(settings), draw)
    prompts = read_prompts(settings)
    references = [read_reference(path) for path in settings.reference]
    generate = load_from(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    result = draw(generate, settings, prompts, settings.images, references)
    seconds = (time.perf_counter() - start) / len(result.images)
    about = dataclasses.asdict(settings) | {"prompt": prompts, "nfe": len(result.times)}
    about |= {"seeds": result.seeds, "size": result.images[0].size, "seconds_per_image": seconds}
    path = write(result, settings.out, json.loads(json.dumps(about, default=str)))
    print(f"{len(result.images)} images, {seconds:.2f} s each; wrote {path} and its pictures")


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    run_cli(main)
