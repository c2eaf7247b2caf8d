"""Samples a DiT student or teacher, and measures it: FID, IS, precision, recall, endpoint RMSE.

    python -m imagenet.sample outputs/tiny                # a run of imagenet.distill
    python -m imagenet.sample outputs/tiny/checkpoints/step_00004500.pt
    python -m imagenet.sample tiny --nfe 8                # the teacher, 8 Euler steps
    torchrun --nproc-per-node 8 -m imagenet.sample MODEL --count 50000 --labels published --npz \\
        --reference VIRTUAL_imagenet256_labeled.npz           # FID of 50,000 images

MODEL is the folder of a run, a checkpoint file, owner/repository/path on the Hugging Face Hub
(Lakonik/pi-Flow-ImageNet/STUDENT/diffusion_pytorch_model.safetensors), or a teacher: tiny, repa,
fm. Image i depends on --seed and i alone, whatever --batch and the number of processes:

    --labels balanced     class i modulo the number of classes, noise from the seed i
    --labels published    class randint(0, 1000) from the seed i, noise from the seed i + 1000: the
                          public evaluation, 29 to 80 images per class in 50,000

These are the seeds for --seed 0; --seed S adds S million to them, so that the noises of different
--seed are disjoint. On CUDA an ImageNet network runs in bfloat16 and its VAE in float16, as in the
public evaluation. Metrics: imagenet/metrics.py, for the tiny model common/fashion.py.

In --out: samples.png, metrics.json, pairs.png beside a teacher, with --npz samples.npz (uint8 NHWC
in arr_0, labels in arr_1, as the ADM evaluation suite reads it).
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
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from common import fashion
from common.cli import DEVICE_HELP, compiled_policies, keep_freed_memory, parse, run_cli, setting
from common.files import is_remote, join, read_json, write_json, writing
from common.plots import image_rows, save_figure, save_image_grid
from common.processes import Place, processes
from common.teachers import endpoint_rmse, integrate_teacher
from imagenet import checkpoints, metrics
from imagenet.checkpoints import TEACHERS, Source, load_dit, to_pixels
from imagenet.dit import PIXELS, DiT, dit_student, guided_teacher
from piflow_minimal import sample

APART = 1_000_000  # seeds of the images of one --seed
PUBLISHED_OFFSET = 1000  # of the noise seed to the label seed in the public evaluation
SHOWN = 10  # pairs in pairs.png


# ---- Settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What is sampled, and how. `resolve_settings` fills in what is left open."""

    model: str = setting(
        dataclasses.MISSING, "run, file, owner/repository/path on the Hub, or tiny, repa, fm",
        positional=True, path=True,
    )  # fmt: skip
    out: Path | None = setting(
        None, "folder for the results; default: by model, in outputs/samples"
    )
    count: int = setting(1000, "images", low=1, high=APART - PUBLISHED_OFFSET)
    first: int = setting(0, "number i of the first image", low=0, high=APART)
    nfe: int | None = setting(None, "steps; default: as trained, 64 for a teacher", low=1)
    labels: str = setting("balanced", "classes and seeds", choices=("balanced", "published"))
    classes: tuple[int, ...] = setting((), "classes, in turn; default: all of them", low=0)
    seed: int = setting(0, "which million of noises", low=0, high=2000)

    guidance: float | None = setting(None, "guidance of a teacher; default: the run's", low=0)
    guidance_interval: tuple[float, float] | None = setting(
        None, "noise levels with guidance; default: the run's",
        low=0, high=1, ordered=True, metavar=("LOW", "HIGH"),
    )  # fmt: skip
    pairs: int | None = setting(
        None, "images compared with a teacher; default: 200 for tiny, else 0", low=0
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
    temperature: float | None = setting(
        None, "of a gmflow student, in all steps but the last", above=0
    )
    num_heads: int | None = setting(None, "if the file does not state it", low=1)
    time_scale: float | None = setting(
        None, "factor of t, if the file does not state it; default: 1", above=0
    )
    head: str | None = setting(
        None, "reading of a head with twice the rows", choices=("velocity", "dx")
    )
    flip_time: bool = setting(False, "the network was trained with t = 1 as data (SiT)")
    decoder: str | None = setting(
        None, "VAE (Hub name or folder); default: as the file states", path=True
    )

    batch: int = setting(100, "images that a process samples at once", low=1)
    dtype: str | None = setting(
        None, "weights; default on CUDA for ImageNet: bfloat16, the VAE in float16",
        choices=("float32", "bfloat16"),
    )  # fmt: skip
    compile: bool = setting(False, "torch.compile a student's policy")
    device: str = setting("auto", DEVICE_HELP)
    npz: bool = setting(False, "write samples.npz for the ADM evaluation suite")
    reference: Path | None = setting(None, "ImageNet: ADM's .npz, or a folder of images")
    inception: Path | None = setting(None, "weights of the Inception network; default: downloaded")


def is_fashion(net: DiT) -> bool:
    """Whether a network draws the images of Fashion-MNIST, whose metrics ship in assets/."""
    config = net.config
    return (config.decoder, config.channels, config.latent_size) == (PIXELS, 4, 14)


def resolve_settings(settings: Settings, net: DiT) -> Settings:
    """Fills in what the command line leaves open, from the network's file and the run around it.

    A policy is rolled out as the file states. If it does not: Euler with 128 substeps, the
    published protocol, or for dx its closed form.

    Raises: ValueError for a setting that does not go with the model.
    """
    config, is_teacher = net.config, net.config.head == "velocity"
    run = {}
    if settings.model not in TEACHERS and (
        Path(settings.model).is_dir() or is_remote(settings.model)
    ):
        run = read_json(join(settings.model, "config.json"))
    given = {"--h": settings.h, "--temperature": settings.temperature}
    given |= {"--solver": settings.solver, "--compile": settings.compile}
    wrong = [flag for flag, value in given.items() if value and is_teacher]
    if wrong:
        raise ValueError(f"{wrong[0]} is for students; {settings.model} is a teacher")
    if settings.classes and settings.labels == "published":
        raise ValueError("--labels published draws from all classes; leave out --classes")
    if settings.temperature and config.head == "dx":
        raise ValueError(f"--temperature is for gmflow students; {settings.model} is a dx student")
    if settings.classes and max(settings.classes) >= config.num_classes:
        raise ValueError(
            f"--classes has {max(settings.classes)}; use 0 .. {config.num_classes - 1}"
        )
    if settings.reference and config.decoder == PIXELS:
        raise ValueError("--reference is for ImageNet; the tiny model has its own in assets/")
    teacher = settings.teacher or run.get("teacher", "tiny" if is_fashion(net) else None)
    pairs = settings.pairs
    if pairs is None:
        pairs = min(200, settings.count) if is_fashion(net) else 0
    if pairs and not teacher:
        raise ValueError(f"--pairs is {pairs}; it needs --teacher")
    source = TEACHERS.get(settings.model if is_teacher else teacher, Source(""))
    interval = settings.guidance_interval or run.get("guidance_interval", source.guidance_interval)
    guidance = settings.guidance
    if guidance is None:
        guidance = run.get("guidance", source.guidance)
    nfe = settings.nfe or (64 if is_teacher else config.nfe or 1)
    return replace(
        settings,
        nfe=nfe,
        guidance=guidance,
        guidance_interval=tuple(interval),
        total_substeps=settings.total_substeps or config.total_substeps or 128,
        solver=settings.solver or config.solver or ("exact" if config.head == "dx" else "euler"),
        teacher=teacher,
        pairs=pairs,
        out=settings.out or default_folder(settings.model, config.head, nfe),
    )


def default_folder(model: str, head: str, nfe: int) -> Path:
    """outputs/samples/NAME; NAME has the model's whole path, because many share a file name."""
    name = re.sub(r"\W+", "-", re.sub(r"\.\w+$", "", model)).strip("-")[-150:]
    return Path("outputs/samples") / f"{name}-{head}-nfe{nfe}"


# ---- Sampling ------------------------------------------------------------------------------------

Sampler = Callable[[Tensor, Tensor, list[torch.Generator]], Tensor]


def open_model(settings: Settings, device: torch.device) -> DiT:
    """A student or teacher, frozen."""
    path, time_scale, *_ = TEACHERS.get(settings.model, Source(settings.model))
    net = load_dit(
        path, settings.num_heads, settings.time_scale or time_scale, device, settings.head,
        settings.flip_time,
    )  # fmt: skip
    if settings.decoder:
        net.config = replace(net.config, decoder=settings.decoder)
    return net.requires_grad_(False)


def draws(
    settings: Settings, net: DiT, numbers: range
) -> tuple[Tensor, Tensor, list[torch.Generator]]:
    """Noise (n, C, H, W), labels (n,) and a generator for each of the images with these numbers.

    On the CPU. The generator has drawn the image's noise.
    """
    config = net.config
    seeds = [APART * settings.seed + i for i in numbers]
    classes = torch.tensor(settings.classes or range(config.num_classes))
    labels = classes[torch.tensor(numbers) % len(classes)]
    if settings.labels == "published":
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        drawn = [torch.randint(config.num_classes, (), generator=g) for g in generators]
        labels = torch.stack(drawn)
        seeds = [seed + PUBLISHED_OFFSET for seed in seeds]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (config.channels, config.latent_size, config.latent_size)
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
    return noise, labels, generators


def sampler(net: DiT, settings: Settings) -> Sampler:
    """-> (noise (B, C, H, W), labels (B,), a generator per image) -> x_0, by `nfe` evaluations.

    A guided step of a teacher counts as one, though it is two evaluations of its network. The
    noise of h > 0 comes from the image's own generator.
    """

    def sample_teacher(noise: Tensor, labels: Tensor, generators: list) -> Tensor:
        teacher = guided_teacher(net, labels, settings.guidance, settings.guidance_interval)
        return integrate_teacher(teacher, noise, settings.nfe)

    def sample_student(noise: Tensor, labels: Tensor, generators: list) -> Tensor:
        return sample(
            dit_student(net, labels, segment_size=1 / (net.config.nfe or 1)), noise, settings.nfe,
            h=settings.h, temperature=settings.temperature or 1.0, generator=generators,
            total_substeps=settings.total_substeps, solver=settings.solver,
        )  # fmt: skip

    return sample_teacher if net.config.head == "velocity" else sample_student


def sample_images(
    settings: Settings, net: DiT, decode: Callable, place: Place
) -> tuple[Tensor | None, float]:
    """All images, uint8 (count, H, W, C) on rank 0, and seconds per image. Processes take turns.

    Raises: ValueError if images are not finite.
    """
    to_data, images, began = sampler(net, settings), None, time.perf_counter()
    end = settings.first + settings.count
    batch = min(settings.batch, -(-settings.count // place.world))
    rounds = range(settings.first, end, batch * place.world)
    for start in tqdm(rounds, disable=True if place.rank else None):
        mine = min(start + place.rank * batch, end - 1)
        numbers = range(mine, min(mine + batch, end))
        noise, labels, generators = draws(settings, net, numbers)
        x_0 = to_data(noise.to(place.device), labels.to(place.device), generators)
        if not x_0.isfinite().all():
            raise ValueError(f"images {mine} to {numbers[-1]} are not finite; damaged weights?")
        pixels = gather(to_pixels(decode(x_0)), batch, place)
        if place.rank == 0:
            if images is None:
                images = torch.empty(settings.count, *pixels.shape[1:], dtype=torch.uint8)
            done = start - settings.first
            images[done : done + len(pixels)] = pixels[: settings.count - done]
    return images, (time.perf_counter() - began) / settings.count


def gather(pixels: Tensor, batch: int, place: Place) -> Tensor:
    """The images (at most `batch`) of all processes, in the order of their ranks, on the CPU."""
    if place.world == 1:
        return pixels
    padded = pixels.new_zeros(batch, *pixels.shape[1:])
    padded[: len(pixels)] = pixels
    padded = padded.to(place.device)
    parts = [torch.empty_like(padded) for _ in range(place.world)]
    dist.all_gather(parts, padded)
    return torch.cat(parts).cpu()


def compare(
    settings: Settings, net: DiT, teacher: DiT, decode: Callable, device: torch.device
) -> tuple[float, dict[str, Tensor]]:
    """The first --pairs images beside the teacher's, from the same noise.

    -> endpoint RMSE in latents; some images of both (n, H, W, C).
    """
    to_target = sampler(teacher, replace(settings, nfe=settings.teacher_steps))
    ends, targets = [], []
    for part in torch.arange(settings.first, settings.first + settings.pairs).split(settings.batch):
        noise, labels, generators = draws(settings, net, range(part[0], part[-1] + 1))
        noise, labels = noise.to(device), labels.to(device)
        ends.append(sampler(net, settings)(noise, labels, generators))
        targets.append(to_target(noise, labels, generators))
    ends, targets = torch.cat(ends), torch.cat(targets)
    role = "teacher" if net.config.head == "velocity" else "student"
    rows = {
        f"teacher, {settings.teacher_steps} steps": to_pixels(decode(targets[:SHOWN])),
        f"{role}, nfe {settings.nfe}": to_pixels(decode(ends[:SHOWN])),
    }
    return endpoint_rmse(ends, targets), rows


# ---- Results -------------------------------------------------------------------------------------


def measure(
    settings: Settings, net: DiT, images: Tensor, labels: Tensor, inception: Callable | None,
    reference: metrics.Reference | None, device: torch.device,
) -> dict[str, float]:  # fmt: skip
    """The metrics of images uint8 (n, H, W, C) that there are for this model."""
    if reference:
        return metrics.imagenet_metrics(inception, images, reference, device)
    if not is_fashion(net) or len(images) <= fashion.FEATURE_WIDTH:
        return {}
    features = fashion.load_features()
    values = images.permute(0, 3, 1, 2) / 127.5 - 1
    return {
        "frechet_distance": fashion.frechet_distance(values, features),
        "recognition_rate": fashion.recognition_rate(values, labels, features),
    }


def main(argv: list[str] | None = None) -> None:
    """Samples and measures; see the top of the file."""
    keep_freed_memory()
    settings = parse(Settings, __doc__, argv)
    with processes(settings.device) as place:
        device = place.device
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as in the public evaluation
        net = open_model(settings, device)
        settings = resolve_settings(settings, net)
        half = device.type == "cuda" and net.config.decoder != PIXELS and not settings.dtype
        dtype = torch.bfloat16 if half or settings.dtype == "bfloat16" else torch.float32
        vae_dtype = torch.float16 if half else torch.float32
        decode = checkpoints.load_decoder(net.config, device, vae_dtype)
        net.to(dtype)
        teacher = inception = reference = None
        if place.rank == 0:
            if settings.pairs:
                other = Settings(model=settings.teacher)
                teacher = open_model(other, device).to(dtype)
            if settings.reference:
                inception, reference = metrics.open_reference(
                    settings.reference, settings.inception, device
                )
            settings.out.mkdir(parents=True, exist_ok=True)
        with compiled_policies(settings.compile):
            images, seconds = sample_images(settings, net, decode, place)
            if place.rank:
                return
            found = {"model": settings.model, "nfe": settings.nfe, "count": settings.count}
            found |= {"labels": settings.labels, "seconds_per_image": seconds}
            numbers = range(settings.first, settings.first + settings.count)
            labels = draws(settings, net, numbers)[1]
            if settings.npz:
                with writing(settings.out / "samples.npz") as temporary:
                    with temporary.open("wb") as file:
                        np.savez(file, arr_0=images.numpy(), arr_1=labels.numpy())
            grid = images[:100].permute(0, 3, 1, 2)
            save_image_grid(grid, settings.out / "samples.png", min(10, len(grid)), padding=0)
            if teacher:
                found["endpoint_rmse"], rows = compare(settings, net, teacher, decode, device)
                save_figure(image_rows(rows, "the same noise"), settings.out / "pairs.png")
        found |= measure(settings, net, images, labels, inception, reference, device)
    for name, value in found.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}; the images are in {settings.out}")
    known = {key: str(v) if isinstance(v, Path) else v for key, v in vars(settings).items()}
    write_json(settings.out / "metrics.json", found | {"settings": known})
    for name, value in found.items():
        print(f"{name:20s} {value:.4f}" if isinstance(value, float) else f"{name:20s} {value}")


if __name__ == "__main__":
    run_cli(main)
