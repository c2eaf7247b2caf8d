"""Overfit one trajectory of Qwen-Image with a static policy: 32 mixture components, no network.

    python toy_qwen.py                                          # 45 GB of GPU memory
    python toy_qwen.py --quantize nf4 --height 512 --width 512  # for less memory
    python toy_qwen.py --tiny --prompt "a dark coat"            # a small model of clothes: offline

The same as toy_dit_imagenet.py with another teacher: Qwen-Image (20 billion parameters) with
classifier-free guidance, one prompt, one noise. The defaults are published: K = 32, 5000
iterations, Adam 5e-3, 2 intermediates, guidance 4, unconditional prompt "", shift 3.2, 1360 x 768,
plain loss, 128 Euler substeps, a bf16 teacher; but for the rate: published is a constant one
(--lr-decay none). The fit is in common/static_policy.py.

The text encoder (7 billion parameters) is loaded first and freed before the transformer is loaded.
--tiny takes a transformer of Qwen-Image's class, trained on Fashion-MNIST (text_to_image/tiny.py),
and the settings of the tiny DiT: the same program, offline, on a CPU.
"""

import dataclasses
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import text_to_image.families as dm
from common.cli import keep_freed_memory, parse, pick_device, run_cli, setting
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
    tiny: bool = setting(False, "offline: a small model of clothes, with other defaults")
    prompt: str = setting("a blue jay on a snowy branch, photograph", "prompt of the one picture")
    negative_prompt: str = setting("", "prompt of the unconditional branch")
    guidance: float = setting(4.0, "classifier-free guidance scale; 1: none", low=0)
    height: int = setting(768, "multiple of 16; smaller: less memory", low=16)
    width: int = setting(1360, "multiple of 16", low=16)
    base: str | None = setting(None, "folder or Hub name in place of " + QWEN.repo)
    quantize: str = setting("none", loading.QUANTIZE_HELP, choices=loading.BYTES_PER_WEIGHT)
    offload: str = setting(
        "none", "group: one layer at a time on the GPU, which is slow; none: all", choices=OFFLOADS
    )

    def __post_init__(self):
        if self.height % 16 or self.width % 16:
            raise ValueError("--height and --width must be multiples of 16")
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


def guided_qwen(
    transformer: nn.Module, encoded: Sequence[dm.Conditions], guidance: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """The teacher (x (B, C, H, W), t (B,)) -> u with classifier-free guidance.

    One branch after the other: no padding, half the activations. encoded: prompt and negative
    prompt, one row each.
    """

    def branch(x: Tensor, t: Tensor, conditions: dm.Conditions) -> Tensor:
        tokens = QWEN.evaluate(transformer, x, t, conditions.rows([0] * len(x)))
        return dm.unpack(tokens.float(), x)

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        u_cond = branch(x, t, encoded[0])
        if guidance == 1:
            return u_cond
        return guided_velocity(u_cond, branch(x, t, encoded[1]), guidance, t)

    return teacher


def load_teacher(settings: Settings, device: torch.device) -> tuple[Any, list[dm.Conditions]]:
    """Text encoder, freed again, then transformer and VAE -> pipeline, encoded prompts."""
    s = settings

    def encode(pipe: Any) -> list[dm.Conditions]:  # each on its own: no padding, no mask
        return [QWEN.encode_prompts(pipe, [prompt]) for prompt in (s.prompt, s.negative_prompt)]

    def load(without: tuple[str, str]) -> Any:
        pipe = loading.load_base(QWEN, s.base, torch.bfloat16, s.quantize, without)
        loading.place(pipe, device, s.offload)
        return pipe

    if s.tiny:
        pipe = fashion_pipeline().to(device)
        return pipe, encode(pipe)
    modules = loading.empty_components(QWEN, s.base)
    del modules["text_encoder"]  # smaller than the transformer, and freed before
    policy = 12 * 4 * s.components * s.height * s.width / 4  # its parameters, Adam, rollout
    weights = loading.weights_on_gpu(QWEN, modules, s.quantize, s.offload) + policy
    need = loading.memory_needed(weights, QWEN, s.height * s.width, s.num_intermediates)
    print(loading.check_memory(need, device, "--quantize nf4, --offload group"))
    encoded = encode(load(("transformer", "vae")))
    gc.collect()
    torch.cuda.empty_cache()
    return load(("text_encoder", "tokenizer")), encoded


def main(argv: Sequence[str] | None = None) -> None:
    """The command: fits, then writes metrics and figures into a folder."""
    keep_freed_memory()
    settings = parse(Settings, __doc__, argv, PRESETS, by="tiny")
    device = pick_device(settings.device)
    pipe, encoded = load_teacher(settings, device)
    teacher = guided_qwen(pipe.transformer, encoded, settings.guidance)
    shape = dm.latent_shape(pipe, settings.height, settings.width)
    generator = torch.Generator().manual_seed(settings.seed)
    x_src = torch.randn(1, *shape, generator=generator).to(device)

    def decode(x: Tensor) -> Tensor:
        return QWEN.decode(pipe, x)

    name = settings.prompt if settings.tiny else settings.base or QWEN.repo
    run_toy(teacher, x_src, decode, settings, name, SHIFT)


if __name__ == "__main__":
    run_cli(main)
