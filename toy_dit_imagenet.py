"""Overfit one trajectory of a DiT teacher with a static policy: 32 mixture components, no network.

    python toy_dit_imagenet.py                          # the tiny teacher: offline, about a minute
    python toy_dit_imagenet.py --class bag --policy dx  # another class, the DX policy
    python toy_dit_imagenet.py --sweep                  # endpoint error over K and over N
    python toy_dit_imagenet.py --teacher repa           # ImageNet 256: GPU, download, diffusers

The picture shows the teacher's trajectory above the policy's for the same noise; metrics.json says
how far apart they end. With --teacher repa or fm the defaults are the published ones: K = 32, 5000
iterations, Adam 5e-3, 2 intermediates, guidance 4, seed 42, class "jay", 128 Euler substeps, plain
loss. The tiny teacher is a stand-in trained on Fashion-MNIST (see assets/README.md), on the same
code path. The training loop is `fit` in common/static_policy.py.
"""

import argparse
import difflib
from dataclasses import dataclass
from pathlib import Path

import torch

from common.cli import pick_device, run_cli
from common.static_policy import ToySettings, add_arguments, run_sweep, run_toy, settings_from
from imagenet import fashion
from imagenet.checkpoints import load_decoder, load_dit
from imagenet.dit import guided_teacher

HUB = "Lakonik/pi-Flow-ImageNet/teachers/"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """Where a teacher is, and the defaults that suit it."""

    path: str
    time_scale: float | None = None
    class_name: str = "jay"
    cfg: float = 4.0
    interval: tuple[float, float] = (0.0, 1.0)
    settings: ToySettings = ToySettings(iters=5000, solver="euler", time_weight=0.0)


TEACHERS = {
    "tiny": Source(
        path=str(fashion.TEACHER),
        class_name="ankle boot",
        cfg=2.5,
        interval=(0.0, 0.8),
        settings=ToySettings(iters=1200, lr=2e-2, intermediates=4, batch_teacher=True),
    ),
    "repa": Source(HUB + "repa_imagenet.pth", time_scale=1.0),
    "fm": Source(HUB + "flowdit_imagenet.pth", time_scale=1000.0),
}


def class_names(num_classes: int) -> list[str]:
    """Names by index: Fashion-MNIST's for 10 classes, ImageNet's (with synonyms) for 1000."""
    if num_classes == len(fashion.CLASSES):
        return list(fashion.CLASSES)
    if num_classes == 1000:
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        return [info.index_to_description(index) for index in range(num_classes)]
    return [str(index) for index in range(num_classes)]


def find_class(text: str, names: list[str]) -> int:
    """A class by index or by one of its names. Raises: ValueError with the closest names."""
    if text.isdecimal():
        if int(text) < len(names):
            return int(text)
        raise ValueError(f"--class is {text}; an index must be below {len(names)}")
    known = {}
    for index, synonyms in enumerate(names):
        for name in [synonyms, *synonyms.split(", ")]:
            known.setdefault(name.lower(), index)
    if text.lower() in known:
        return known[text.lower()]
    close = difflib.get_close_matches(text.lower(), known, n=3, cutoff=0.4)
    hint = f"closest: {', '.join(close)}" if close else f"for example: {', '.join(list(known)[:3])}"
    raise ValueError(f"--class {text!r} is unknown; {hint}; or an index below {len(names)}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags; the defaults are those of the teacher that --teacher names."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument(
        "--teacher", default="tiny", help="tiny, repa, fm, a file, or owner/repository/path (Hub)"
    )
    name = first.parse_known_args(argv)[0].teacher
    source = TEACHERS.get(name, Source(name))

    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        parents=[first],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--class", dest="class_name", default=source.class_name, help="name or index"
    )
    parser.add_argument("--cfg", type=float, default=source.cfg, help="guidance scale; 1: none")
    parser.add_argument(
        "--interval", type=float, nargs=2, default=source.interval, metavar=("LOW", "HIGH"),
        help="noise levels at which guidance is on",
    )  # fmt: skip
    parser.add_argument("--num-heads", type=int, help="of a file that does not say (default: 16)")
    parser.add_argument(
        "--time-scale", type=float, default=source.time_scale,
        help="the teacher is told this times t; for a file that does not say",
    )  # fmt: skip
    parser.add_argument("--dtype", default="float32", help="of the teacher: " + ", ".join(DTYPES))
    add_arguments(parser, source.settings)
    args = parser.parse_args(argv)
    args.source = source.path
    args.out = args.out or Path("outputs/toy_dit") / Path(name).stem
    return args


def check_arguments(args: argparse.Namespace) -> ToySettings:
    """Raises: ValueError for what is not accepted, before anything slow happens."""
    settings = settings_from(args)
    low, high = args.interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"--interval is {low:g} {high:g}; it must be 0 <= LOW <= HIGH <= 1")
    if not args.cfg >= 0:
        raise ValueError(f"--cfg is {args.cfg:g}; it must be at least 0 (1 is no guidance)")
    if args.every < 0:
        raise ValueError(f"--every is {args.every}; it must be at least 0")
    if args.dtype not in DTYPES:
        raise ValueError(f"--dtype is {args.dtype!r}; choose one of {', '.join(DTYPES)}")
    return settings


def main(argv: list[str] | None = None) -> None:
    """Loads the teacher, fits, draws. Raises: ValueError, OSError, ImportError for bad input."""
    args = parse_arguments(argv)
    settings = check_arguments(args)
    device = pick_device(args.device)
    net = load_dit(args.source, args.num_heads, args.time_scale, device=device)
    if net.config.head != "velocity":
        raise ValueError(f"--teacher {args.teacher} has a {net.config.head} head: it is a student")
    names = class_names(net.config.num_classes)
    index = find_class(args.class_name, names)
    decode = load_decoder(net.config, device)

    net = net.to(DTYPES[args.dtype]).requires_grad_(False)
    labels = torch.tensor([index], device=device)
    teacher = guided_teacher(net, labels, args.cfg, tuple(args.interval))
    size, generator = net.config.latent_size, torch.Generator().manual_seed(settings.seed)
    x_src = torch.randn(1, net.config.channels, size, size, generator=generator).to(device)

    about = {
        "teacher": args.teacher,
        "class": names[index],
        "cfg": args.cfg,
        "interval": list(args.interval),
        "reference": f"{settings.teacher_steps} Heun steps of the teacher",
    }
    if args.sweep:
        title = f"How large must a policy be? Teacher {args.teacher}, {names[index]}"
        run_sweep(teacher, x_src, decode, settings, args.out, title, extra=about)
        print(f"wrote {args.out}/sweep.png and sweep.json")
        return
    kind = {"gmflow": "K", "dx": "N"}[settings.policy]
    title = f"{settings.policy} policy, {kind} = {settings.components}: {names[index]}"
    metrics = run_toy(
        teacher, x_src, decode, settings, args.out, title, every=args.every, extra=about
    )
    print(
        f"{names[index]}: endpoint PSNR {metrics['endpoint_psnr_db']:.1f} dB, RMSE "
        f"{metrics['endpoint_rmse']:.4f} in {metrics['seconds']:.0f} s; wrote {args.out}/toy.png",
    )


if __name__ == "__main__":
    run_cli(main)
