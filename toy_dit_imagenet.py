"""Overfit one trajectory of a DiT teacher with a static policy: 32 mixture components, no network.

    python toy_dit_imagenet.py                          # the tiny teacher: offline, half a minute
    python toy_dit_imagenet.py --class bag --policy dx  # another class, the DX policy
    python toy_dit_imagenet.py --sweep                  # endpoint error over K and over N
    python toy_dit_imagenet.py --cloning 0 --iterations 1200 --lr 5e-2      # pi-ID alone
    python toy_dit_imagenet.py --teacher repa           # ImageNet 256: GPU, download, diffusers

toy.png shows the teacher's trajectory above the policy's for the same noise; metrics.json says how
far apart they end. The defaults of --teacher repa and fm are published: K = 32, 5000 iterations of
pi-ID, Adam 5e-3, 2 intermediates, guidance 4, seed 42, class "jay", 128 Euler substeps, plain loss;
but for two: published are a constant rate (--lr-decay none) and a bf16 teacher (--dtype bfloat16).
The tiny teacher is a stand-in trained on Fashion-MNIST (assets/README.md); with it 1500 iterations
of cloning go first, why is said in common/static_policy.py.

What limits the published loss: pi = (x - x0_hat)/t, so an error of x0_hat counts 1/t^2 in the
squared error of the velocity, and the few queries at t < 0.02 rule Adam's step sizes. Weighting
squared errors by t removes the stall (--time-weight 1, the default for the tiny teacher).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from common import fashion
from common.cli import keep_freed_memory, parse, pick_device, run_cli, setting
from common.static_policy import ToySettings, run_toy
from imagenet.checkpoints import TEACHERS, Source, load_decoder, load_dit
from imagenet.dit import PIXELS, DiTConfig, guided_teacher

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings(ToySettings):
    """Those of both toys, with the published values as defaults, and the teacher."""

    out: Path = setting(Path("outputs/toy_dit"), "folder for figures and metrics")
    teacher: str = setting("tiny", "tiny, repa, fm, a file, or owner/repository/path (Hub)")
    class_name: str = setting("jay", "name or index", flag="class")
    guidance: float = setting(4.0, "classifier-free guidance scale; 1: none", low=0)
    guidance_interval: tuple[float, float] = setting(
        (0.0, 1.0), "noise levels with guidance", low=0, high=1, metavar=("LOW", "HIGH"),
        ordered=True,
    )  # fmt: skip
    dtype: str = setting("float32", "precision of the teacher", choices=DTYPES)


PRESETS = {
    "tiny": Settings(
        teacher="tiny", class_name="ankle boot", guidance=TEACHERS["tiny"].guidance,
        guidance_interval=TEACHERS["tiny"].guidance_interval, cloning=1500, iterations=150, lr=3e-4,
        num_intermediates=4, total_substeps=24, solver="deis", time_weight=1.0, stratified=True,
    ),
    "repa": Settings(teacher="repa"),
    "fm": Settings(teacher="fm"),
}  # fmt: skip


def class_names(config: DiTConfig) -> list[str]:
    """Names by index: Fashion-MNIST's, ImageNet's (with synonyms), or the numbers."""
    if config.decoder == PIXELS and config.num_classes == len(fashion.CLASSES):
        return list(fashion.CLASSES)
    if config.num_classes == 1000:
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        return [info.index_to_description(index) for index in range(1000)]
    return [str(index) for index in range(config.num_classes)]


def find_class(text: str, names: list[str]) -> int:
    """A class by index or by one of its names. Raises: ValueError."""
    for index, synonyms in enumerate(names):
        if text.lower() in (str(index), synonyms.lower(), *synonyms.lower().split(", ")):
            return index
    raise ValueError(f"--class {text!r} is unknown; a name, or an index below {len(names)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Loads the teacher, fits, draws. Raises: ValueError, OSError, ImportError for bad input."""
    keep_freed_memory()
    settings = parse(Settings, __doc__, argv, PRESETS, by="teacher")
    source = TEACHERS.get(settings.teacher, Source(settings.teacher))
    device = pick_device(settings.device)
    net = load_dit(source.path, None, source.time_scale, device, head="velocity")
    names = class_names(net.config)
    index = find_class(settings.class_name, names)
    decode = load_decoder(net.config, device)
    net = net.to(DTYPES[settings.dtype]).requires_grad_(False)
    labels = torch.tensor([index], device=device)
    teacher = guided_teacher(net, labels, settings.guidance, settings.guidance_interval)
    size, generator = net.config.latent_size, torch.Generator().manual_seed(settings.seed)
    x_src = torch.randn(1, net.config.channels, size, size, generator=generator).to(device)
    run_toy(teacher, x_src, decode, settings, names[index], about={"class": names[index]})


if __name__ == "__main__":
    run_cli(main)
