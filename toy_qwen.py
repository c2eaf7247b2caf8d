"""Overfit one trajectory of Qwen-Image with a static policy: 32 mixture components, no network.

    python toy_qwen.py                                          # 40 GB of GPU memory
    python toy_qwen.py --quantize nf4 --height 512 --width 512 --one-branch       # for less memory
    python toy_qwen.py --tiny --prompt "a dark coat"            # a small model of clothes: offline

The same as toy_dit_imagenet.py with another teacher: Qwen-Image (20 billion parameters) with
classifier-free guidance, one prompt, one noise. The defaults are published: K = 32, 5000
iterations, Adam 5e-3, 2 intermediates, guidance 4, unconditional prompt "", shift 3.2, 1360 x 768,
plain loss, 128 Euler substeps, a bf16 teacher; but for the rate: published is a constant one
(--lr-decay none). The fit is in common/static_policy.py.

The text encoder (7 billion parameters) is loaded first and freed before the transformer is loaded;
--prompt-cache keeps the prompt embeddings in a file, so that it is needed only once. --tiny takes a
transformer of Qwen-Image's class, trained on Fashion-MNIST (text_to_image/tiny.py), and
the settings of the tiny DiT: the same program, offline, on a CPU.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import text_to_image.families as dm
from common.cli import keep_freed_memory, parse, pick_device, run_cli, setting
from common.files import writing
from common.static_policy import ToySettings, run_toy
from common.teachers import guided_velocity
from text_to_image import loading
from text_to_image.tiny import GUIDANCE, SIDE, fashion_pipeline

SHIFT = 3.2
OFFLOADS = ("none", "group")  # there is only one large component at a time
QWEN = dm.FAMILIES["qwen"]


@dataclasses.dataclass(frozen=True)
class Settings(ToySettings):
    """Those of both toys, with the published values as defaults, and the teacher."""

    out: Path = setting(Path("outputs/toy_qwen"), "folder for figures and metrics")
    tiny: bool = setting(False, "a small model of clothes in place of Qwen-Image, offline")
    prompt: str = setting("a blue jay on a snowy branch, photograph", "prompt of the one picture")
    negative_prompt: str = setting("", "prompt of the unconditional branch")
    guidance: float = setting(4.0, "classifier-free guidance scale; 1: none", low=0)
    height: int = setting(768, "multiple of 16; smaller: less memory", low=16)
    width: int = setting(1360, "multiple of 16", low=16)
    prompt_cache: Path | None = setting(None, "file of the prompt embeddings, read if it exists")
    base: str | None = setting(None, "folder or Hub name in place of " + QWEN.repo)
    quantize: str = setting("none", loading.QUANTIZE_HELP, choices=loading.BYTES_PER_WEIGHT)
    offload: str = setting("none", loading.OFFLOAD_HELP, choices=OFFLOADS)
    one_branch: bool = setting(
        False, "one guidance branch at a time: half the activation memory, more time"
    )

    def __post_init__(self):
        for name in ("height", "width"):
            if getattr(self, name) % 16:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be a multiple of 16")
        if self.tiny and (self.base or self.quantize != "none"):
            raise ValueError("--tiny builds its own model: leave out --base and --quantize")
        if not self.prompt.strip():
            raise ValueError("--prompt is empty")


PRESETS = {
    False: Settings(),
    True: Settings(
        tiny=True, prompt="a dark coat", guidance=GUIDANCE, height=SIDE, width=SIDE,
        cloning=1500, iterations=150, lr=3e-4, num_intermediates=4, total_substeps=24,
        solver="deis", time_weight=1.0, stratified=True,
    ),
}  # fmt: skip


def encode(pipe: Any, prompts: Sequence[str]) -> list[dm.Conditions]:
    """Prompt and negative prompt, each on its own: no padding, no mask."""
    return [QWEN.encode_prompts(pipe, [prompt]) for prompt in prompts]


def save_prompts(path: Path, prompts: Sequence[str], encoded: Sequence[dm.Conditions]) -> None:
    """Writes the embeddings of prompt and negative prompt, and the texts, to a safetensors file."""
    from safetensors.torch import save_file

    tensors = {str(i): part.embeds.cpu().contiguous() for i, part in enumerate(encoded)}
    with writing(path) as temporary:
        save_file(tensors, temporary, metadata={str(i): text for i, text in enumerate(prompts)})


def load_prompts(path: Path, prompts: Sequence[str]) -> list[dm.Conditions]:
    """What `save_prompts` wrote. Raises: ValueError if it was written for other texts."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            texts = [(file.metadata() or {}).get(str(i)) for i in range(len(prompts))]
            if texts != list(prompts):
                raise ValueError(
                    f"--prompt-cache {path} is for the prompts {texts}, not {list(prompts)}: "
                    "give another file, or delete it"
                )
            return [dm.Conditions(file.get_tensor(str(i))) for i in range(len(prompts))]
    except SafetensorError as error:
        raise ValueError(f"--prompt-cache {path} is not a safetensors file: {error}") from error


def guided_qwen(
    pipe: Any, encoded: Sequence[dm.Conditions], guidance: float, one_branch: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """The teacher (x (B, C, H, W), t (B,)) -> u with classifier-free guidance.

    Args:
        encoded: prompt and negative prompt, one row each.
        one_branch: evaluates them one after the other: half the activations, more time.
    """
    both = dm.Conditions.stack(encoded)

    def velocity(x: Tensor, t: Tensor, conditions: dm.Conditions) -> Tensor:
        return dm.unpack(QWEN.evaluate(pipe.transformer, x, t, conditions).float(), x)

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        b = len(x)
        if guidance == 1:
            return velocity(x, t, encoded[0].rows([0] * b))
        if one_branch:
            u_cond, u_uncond = (velocity(x, t, part.rows([0] * b)) for part in encoded)
        else:
            rows = both.rows([0] * b + [1] * b)
            u_cond, u_uncond = velocity(x.repeat(2, 1, 1, 1), t.repeat(2), rows).chunk(2)
        return guided_velocity(u_cond, u_uncond, guidance, t)

    return teacher


def load_teacher(settings: Settings, device: torch.device) -> tuple[Any, list[dm.Conditions]]:
    """Text encoder, freed again, then transformer and VAE -> pipeline, encoded prompts."""
    s = settings
    prompts = s.prompt, s.negative_prompt
    known = s.prompt_cache is not None and s.prompt_cache.exists()
    encoded = load_prompts(s.prompt_cache, prompts) if known else None

    def load(without: tuple[str, str]) -> Any:
        pipe = loading.load_base(QWEN, s.base, torch.bfloat16, s.quantize, without)
        loading.place(pipe, device, s.offload)
        return pipe

    if s.tiny:
        pipe = fashion_pipeline().to(device)
        encoded = encoded or encode(pipe, prompts)
    else:
        modules = loading.empty_components(QWEN, s.base)
        text = {"text_encoder": modules.pop("text_encoder")}
        rows = 1 if s.one_branch else 2
        pixels = s.height * s.width
        policy = 12 * 4 * s.components * 16 * pixels / 64  # its parameters, Adam, rollout
        for part, nets, other in (("text encoder", text, 0.0), ("transformer", modules, policy)):
            if part == "transformer" or encoded is None:
                weights = loading.weights_on_gpu(QWEN, nets, s.quantize, s.offload)
                need = loading.memory_needed(weights + other, QWEN, pixels, rows)
                helps = "--quantize nf4, --offload group or --one-branch"
                print(f"{part}:", loading.check_memory(need, device, helps))
        if encoded is None:
            encoded = encode(load(("transformer", "vae")), prompts)
            loading.release_memory()
        pipe = load(("text_encoder", "tokenizer"))
    if s.prompt_cache and not known:
        save_prompts(s.prompt_cache, prompts, encoded)
    return pipe, [dm.Conditions(part.embeds.to(device)) for part in encoded]


def main(argv: Sequence[str] | None = None) -> None:
    """The command: fits, then writes metrics and figures into a folder."""
    keep_freed_memory()
    settings = parse(Settings, __doc__, argv, PRESETS, by="tiny")
    device = pick_device(settings.device)
    if settings.offload != "none" and device.type == "cpu":
        raise ValueError(f"--offload {settings.offload} needs a GPU; on a CPU use none")
    dm.import_diffusers()
    pipe, encoded = load_teacher(settings, device)
    teacher = guided_qwen(pipe, encoded, settings.guidance, settings.one_branch)
    shape = dm.latent_shape(pipe, settings.height, settings.width)
    generator = torch.Generator().manual_seed(settings.seed)
    x_src = torch.randn(1, *shape, generator=generator).to(device)

    def decode(x: Tensor) -> Tensor:
        return QWEN.decode(pipe, x)

    name = settings.prompt if settings.tiny else settings.base or QWEN.repo
    run_toy(teacher, x_src, decode, settings, name, SHIFT)


if __name__ == "__main__":
    run_cli(main)
