"""Samples a DiT student or teacher, and measures it: FID, IS, precision, recall, endpoint RMSE.

    python -m imagenet.sample outputs/tiny                # a run of imagenet.distill
    python -m imagenet.sample outputs/tiny/checkpoints/step_00004500.pt
    python -m imagenet.sample tiny --nfe 8                # the teacher, 8 Euler steps
    torchrun --nproc-per-node 8 -m imagenet.sample gm-repa-1nfe --count 50000 --labels published \\
        --npz --reference VIRTUAL_imagenet256_labeled.npz           # FID of 50,000 images

MODEL is the folder of a run, a checkpoint file, owner/repository/path on the Hugging Face Hub, a
published student (gm-fm-1nfe, gm-repa-1nfe, gm-repa-2nfe), or a teacher (tiny, repa, fm). Image i
depends on --seed and i alone, whatever --batch and the number of processes:

    --labels balanced     class i modulo the number of classes, noise from the seed i
    --labels published    class randint(0, 1000) from the seed i, noise from the seed i + 1000

--seed S adds S million to these seeds. In --out: samples.png, metrics.json, pairs.png beside a
teacher, with --npz samples.npz (uint8 NHWC in arr_0, labels in arr_1, for the ADM suite).
"""

if not __package__:
    raise SystemExit("start it in the repository's root: python -m imagenet.sample")

import dataclasses
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import fashion
from common.cli import (
    DEVICE_HELP,
    can_compile,
    compiled_policies,
    keep_freed_memory,
    parse,
    run_cli,
    setting,
)
from common.files import join, read_json, write_json, writing
from common.plots import image_rows, save_figure, save_image_grid
from common.processes import Place, processes, total
from common.teachers import endpoint_rmse, integrate_teacher
from imagenet import checkpoints, metrics
from imagenet.checkpoints import STUDENTS, TEACHERS, Source, load_dit, to_pixels
from imagenet.dit import PIXELS, DiT, dit_student, guided_teacher
from piflow_minimal import sample

APART = 1_000_000  # seeds of the images of one --seed
PUBLISHED_OFFSET = 1000  # of the noise seed to the label seed in the public evaluation
SHOWN = 10  # pairs in pairs.png
NAMES = TEACHERS | STUDENTS


# ---- Settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What is sampled, and how. `resolve_settings` fills in what is left open."""

    model: str = setting(
        dataclasses.MISSING, f"run, file, owner/repository/path on the Hub, {', '.join(NAMES)}",
        positional=True, path=True,
    )  # fmt: skip
    out: Path | None = setting(
        None, "folder for the results; default: by model, in outputs/samples"
    )
    count: int = setting(1000, "images", low=1, high=APART - PUBLISHED_OFFSET)
    first: int = setting(0, "number i of the first image", low=0, high=APART)
    nfe: int | None = setting(None, "steps; default: as trained, 64 for a teacher", low=1)
    labels: str = setting("balanced", "classes and seeds", choices=("balanced", "published"))
    seed: int = setting(0, "which million of noises", low=0, high=2000)

    guidance: float | None = setting(None, "guidance of a teacher; default: the run's", low=0)
    guidance_interval: tuple[float, float] | None = setting(
        None, "noise levels with guidance; default: the run's",
        low=0, high=1, ordered=True, metavar=("LOW", "HIGH"),
    )  # fmt: skip
    pairs: int | None = setting(
        None, "images compared with the teacher; default: 200 of a tiny model, else 0", low=0
    )
    teacher: str | None = setting(
        None, "teacher of the pairs; default: the run's, or tiny for a tiny model", path=True
    )
    teacher_steps: int = setting(64, "Euler steps of that teacher", low=1)

    total_substeps: int | None = setting(
        None, "substeps per unit of tau; default: as the file states, or 128", low=1
    )
    solver: str | None = setting(
        None, "solver of the rollout; default: as the file states, else exact for dx, euler",
        choices=("euler", "deis", "exact"),
    )  # fmt: skip
    h: float = setting(0.0, "noise between a student's steps; inf: full", low=0, high=math.inf)
    temperature: float = setting(
        1.0, "temperature of a gmflow student, in all steps but the last", above=0
    )

    batch: int = setting(100, "images that a process samples at once", low=1)
    bf16: bool | None = setting(
        None, "bfloat16 weights, VAE in float16; default: on CUDA for ImageNet"
    )
    compile: bool = setting(False, "torch.compile a student's policy")
    device: str = setting("auto", DEVICE_HELP)
    npz: bool = setting(False, "write samples.npz for the ADM evaluation suite")
    reference: Path | None = setting(None, "ImageNet: ADM's .npz, or a folder of images")


def is_fashion(net: DiT) -> bool:
    """Whether a network draws the images of Fashion-MNIST, whose metrics ship in assets/."""
    config = net.config
    return (config.decoder, config.channels, config.latent_size) == (PIXELS, 4, 14)


def resolve_settings(s: Settings, net: DiT) -> Settings:
    """Fills in what the command line leaves open, from the network's file and the run around it.

    A policy is rolled out as the file states. If it does not: Euler with 128 substeps, the
    published protocol, or for dx its closed form.

    Raises: ValueError for a setting that does not go with the model.
    """
    config, is_teacher = net.config, net.config.head == "velocity"
    for_students = s.h or s.solver or s.compile
    if (is_teacher and for_students) or (s.temperature != 1 and config.head != "gmflow"):
        raise ValueError(
            f"{s.model} has a {config.head} head: --h, --solver and --compile are for students, "
            "--temperature for gmflow students"
        )
    if s.reference and is_fashion(net):
        raise ValueError(f"--reference {s.reference}: a tiny model has its own features and no FID")
    folder = s.model
    if Path(folder).suffix in (".pt", ".safetensors"):  # of a run: OUT/checkpoints/ or OUT/
        folder = re.sub(r"(/checkpoints)?/?[^/]*$", "", folder) or "."
    run = {} if s.model in NAMES else read_json(join(folder, "config.json"))
    teacher = s.teacher or run.get("teacher", "tiny" if is_fashion(net) else None)
    source = TEACHERS.get(s.model if is_teacher else teacher, Source(""))
    guidance = run.get("guidance", source.guidance) if s.guidance is None else s.guidance
    interval = s.guidance_interval or run.get("guidance_interval", source.guidance_interval)
    pairs = s.pairs
    if pairs is None:
        pairs = 200 if is_fashion(net) else 0
    if pairs and not teacher:
        raise ValueError(f"--pairs {pairs} needs a --teacher")
    nfe = s.nfe or (64 if is_teacher else config.nfe or 1)
    # The model's whole path, because many share a file name.
    name = re.sub(r"\W+", "-", re.sub(r"\.\w+$", "", s.model)).strip("-")[-150:]
    return replace(
        s,
        nfe=nfe,
        guidance=guidance,
        guidance_interval=tuple(interval),
        total_substeps=s.total_substeps or config.total_substeps or 128,
        solver=s.solver or config.solver or ("exact" if config.head == "dx" else "euler"),
        teacher=teacher,
        pairs=min(pairs, s.count),
        out=s.out or Path(f"outputs/samples/{name}-{config.head}-nfe{nfe}"),
    )


# ---- Sampling ------------------------------------------------------------------------------------


def open_model(name: str, device: torch.device, head: str | None = None) -> DiT:
    """A student or teacher by its name or path, frozen."""
    source = NAMES.get(name, Source(name))
    net = load_dit(source.path, time_scale=source.time_scale, device=device, head=head)
    net.config = replace(net.config, nfe=net.config.nfe or source.nfe)
    return net.requires_grad_(False)


def draws(s: Settings, net: DiT, numbers: range) -> tuple[Tensor, Tensor, list[torch.Generator]]:
    """Noise (n, C, H, W), labels (n,) and a generator for each of the images with these numbers.

    On the CPU. The generator has drawn the image's noise.
    """
    config = net.config
    seeds = [APART * s.seed + i for i in numbers]
    labels = torch.tensor(numbers) % config.num_classes
    if s.labels == "published":
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        drawn = [torch.randint(config.num_classes, (), generator=g) for g in generators]
        labels = torch.stack(drawn)
        seeds = [seed + PUBLISHED_OFFSET for seed in seeds]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (config.channels, config.latent_size, config.latent_size)
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
    return noise, labels, generators


def sampler(net: DiT, s: Settings) -> Callable[[Tensor, Tensor, list[torch.Generator]], Tensor]:
    """-> (noise (B, C, H, W), labels (B,), a generator per image) -> x_0, by `nfe` evaluations.

    A guided step of a teacher counts as one, though it is two evaluations of its network. The
    noise of h > 0 comes from the image's own generator.
    """

    def sample_teacher(noise: Tensor, labels: Tensor, generators: list) -> Tensor:
        teacher = guided_teacher(net, labels, s.guidance, s.guidance_interval)
        return integrate_teacher(teacher, noise, s.nfe)

    def sample_student(noise: Tensor, labels: Tensor, generators: list) -> Tensor:
        return sample(
            dit_student(net, labels, segment_size=1 / (net.config.nfe or 1)), noise, s.nfe,
            h=s.h, temperature=s.temperature, generator=generators,
            total_substeps=s.total_substeps, solver=s.solver,
        )  # fmt: skip

    return sample_teacher if net.config.head == "velocity" else sample_student


def sample_images(s: Settings, net: DiT, decode: Callable, place: Place) -> Tensor | None:
    """All images, uint8 (count, H, W, C) on the CPU of rank 0. Processes take turns.

    Raises: ValueError if images are not finite.
    """
    to_data, images = sampler(net, s), []
    end = s.first + s.count
    batch = min(s.batch, -(-s.count // place.world))
    rounds = range(s.first, end, batch * place.world)
    for start in tqdm(rounds, disable=True if place.rank else None):
        mine = min(start + place.rank * batch, end - 1)  # none is without an image
        numbers = range(mine, min(mine + batch, end))
        noise, labels, generators = draws(s, net, numbers)
        x_0 = to_data(noise.to(place.device), labels.to(place.device), generators)
        if not x_0.isfinite().all():
            raise ValueError(f"images {mine} to {numbers[-1]} are not finite; damaged weights?")
        pixels = to_pixels(decode(x_0))
        whole = pixels.new_zeros(place.world, batch, *pixels.shape[1:])
        whole[place.rank, : len(pixels)] = pixels
        whole = total(whole.to(place.device)).flatten(0, 1)  # the others have zeros there
        if place.rank == 0:
            images.append(whole[: end - start].cpu())
    return torch.cat(images) if images else None


def compare(
    s: Settings, net: DiT, teacher: DiT, decode: Callable, device: torch.device
) -> tuple[float, dict[str, Tensor]]:
    """The first --pairs images beside the teacher's, from the same noise.

    -> endpoint RMSE in latents; some images of both (n, H, W, C).
    """
    to_x0, to_target = sampler(net, s), sampler(teacher, replace(s, nfe=s.teacher_steps))
    ends, targets = [], []
    for part in torch.arange(s.first, s.first + s.pairs).split(s.batch):
        noise, labels, generators = draws(s, net, range(part[0], part[-1] + 1))
        noise, labels = noise.to(device), labels.to(device)
        ends.append(to_x0(noise, labels, generators))
        targets.append(to_target(noise, labels, generators))
    ends, targets = torch.cat(ends), torch.cat(targets)
    rows = {
        f"teacher, {s.teacher_steps} steps": to_pixels(decode(targets[:SHOWN])),
        f"{net.config.head}, nfe {s.nfe}": to_pixels(decode(ends[:SHOWN])),
    }
    return endpoint_rmse(ends, targets), rows


def main(argv: list[str] | None = None) -> None:
    """Samples and measures; see the top of the file."""
    keep_freed_memory()
    s = parse(Settings, __doc__, argv)
    with (
        processes(s.device) as place,
        compiled_policies(s.compile and can_compile(place.device)),
    ):
        device, on_cuda = place.device, place.device.type == "cuda"
        if on_cuda:
            torch.set_float32_matmul_precision("high")  # TF32, as in the public evaluation
        net = open_model(s.model, device)
        s = resolve_settings(s, net)
        half = s.bf16
        if half is None:
            half = on_cuda and net.config.decoder != PIXELS
        dtype, vae_dtype = torch.float32, torch.float32
        if half:  # as in the public evaluation
            dtype, vae_dtype = torch.bfloat16, torch.float16
        decode = checkpoints.load_decoder(net.config, device, vae_dtype)
        net.to(dtype)
        teacher = reference = None
        if place.rank == 0:
            if s.pairs:
                teacher = open_model(s.teacher, device, "velocity").to(dtype)
            if s.reference or is_fashion(net) and s.count > fashion.FEATURE_WIDTH:
                reference = metrics.open_reference(s.reference, device)
            s.out.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        images = sample_images(s, net, decode, place)
        if place.rank:
            return
        found = {"model": s.model, "nfe": s.nfe, "count": s.count, "labels": s.labels}
        found["seconds_per_image"] = (time.perf_counter() - began) / s.count
        numbers = range(s.first, s.first + s.count)
        labels = torch.cat([draws(s, net, range(i, i + 1))[1] for i in numbers])
        if s.npz:
            with writing(s.out / "samples.npz") as temporary:
                np.savez(temporary, arr_0=images.numpy(), arr_1=labels.numpy())
        grid = images[:100].permute(0, 3, 1, 2)
        save_image_grid(grid, s.out / "samples.png", min(10, len(grid)), padding=0)
        (s.out / "pairs.png").unlink(missing_ok=True)  # of an earlier model
        if teacher:
            found["endpoint_rmse"], rows = compare(s, net, teacher, decode, device)
            save_figure(image_rows(rows, "the same noise"), s.out / "pairs.png")
        if reference:
            found |= metrics.measure(images, labels, reference, device)
    for name, value in found.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}; the images are in {s.out}")
    known = {key: str(v) if isinstance(v, Path) else v for key, v in vars(s).items()}
    write_json(s.out / "metrics.json", found | {"settings": known})
    for name, value in found.items():
        print(f"{name:20s} {value:.4f}" if isinstance(value, float) else f"{name:20s} {value}")
    print(f"wrote {s.out}")


if __name__ == "__main__":
    run_cli(main)
