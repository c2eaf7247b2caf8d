"""Samples a DiT student or teacher, and measures it: FID, IS, precision, recall, endpoint RMSE.

    python -m imagenet.sample outputs/tiny                # a run of imagenet.distill
    python -m imagenet.sample outputs/tiny --iteration 4500        # a checkpoint that the run kept
    python -m imagenet.sample tiny --nfe 8                # the teacher, 8 Euler steps
    torchrun --nproc-per-node 8 -m imagenet.sample MODEL --count 50000 --labels published --npz \\
        --reference VIRTUAL_imagenet256_labeled.npz           # FID of 50,000 images

MODEL is the folder of a run, a checkpoint file, owner/repository/path on the Hugging Face Hub
(Lakonik/pi-Flow-ImageNet/STUDENT/diffusion_pytorch_model.safetensors), or a teacher: tiny, repa,
fm. Image i depends on --seed + i alone, whatever --batch and the number of processes:

    --labels balanced     class i modulo the number of classes, noise from the seed i
    --labels published    class randint(0, 1000) from the seed i, noise from the seed i + 1000: the
                          public evaluation, 29 to 80 images per class in 50,000

Finished batches are kept: run the same command again to go on. They are not used if the weights,
or another setting that decides the images, have changed. On CUDA an ImageNet network runs in
bfloat16 and its VAE in float16, as in the public evaluation. Metrics: imagenet/metrics.py.

In --out: samples.png, metrics.json, with --npz samples.npz (uint8 NHWC in arr_0, as the ADM
evaluation suite reads it), and parts/.
"""

import dataclasses
import hashlib
import json
import math
import re
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import imagenet.distributed as runs
from common import fashion, frechet
from common.cli import (
    DEVICE_HELP,
    check_interval,
    compiled_policies,
    parse,
    run_cli,
    setting,
    write_json,
)
from common.plots import image_rows, save_figure, save_image_grid
from common.teachers import integrate_teacher
from imagenet import checkpoints, metrics
from imagenet.checkpoints import TEACHERS, Source, load_dit, to_pixels, weights_hash
from imagenet.dit import PIXELS, DiT, dit_student, guided_teacher
from piflow_minimal import sample

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PUBLISHED_OFFSET = 1000  # of the noise seed to the label seed in the public evaluation

# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What is sampled, and how. `resolve_settings` fills in what is left open."""

    model: str = setting(
        dataclasses.MISSING, "run, file, owner/repository/path on the Hub, or tiny, repa, fm",
        positional=True,
    )  # fmt: skip
    out: str = setting("", "folder for the results; default: by model and nfe, in outputs/samples")
    count: int = setting(1000, "images", low=1, high=10_000_000)
    nfe: int = setting(0, "steps; 0: as trained, 64 for a teacher", low=0, high=10_000)
    iteration: int = setting(0, "checkpoint of a run; 0: its newest student", low=0)
    labels: str = setting("balanced", "classes and seeds", choices=("balanced", "published"))
    classes: tuple[int, ...] = setting((), "classes, in turn; default: all of them")
    seed: int = setting(0, "seed of image 0; image i has --seed + i", low=0)

    guidance: float | None = setting(None, "guidance of a teacher; default: the run's", low=0)
    guidance_interval: tuple[float, float] | None = setting(
        None, "noise levels with guidance; default: the run's", metavar=("LOW", "HIGH")
    )
    pairs: int = setting(-1, "images compared with a teacher; -1: 200 for tiny, else 0", low=-1)
    teacher: str = setting("", "teacher of the pairs; default: the run's, or tiny for a tiny model")
    teacher_steps: int = setting(64, "Euler steps of that teacher", low=1, high=10_000)

    total_substeps: int = setting(
        0, "substeps per unit of tau; 0: as run or file state, or 128", low=0, high=10_000
    )
    solver: str | None = setting(
        None, "solver of the rollout; default: as run or file state, else exact for dx, euler",
        choices=("euler", "deis", "exact"),
    )  # fmt: skip
    h: float = setting(0.0, "noise between a student's steps; inf: full", low=0, high=math.inf)
    temperature: float = setting(1.0, "of a gmflow student, in all steps but the last", above=0)
    trained_nfe: int = setting(0, "segments of a dx student; 0: as run or file state, or 1", low=0)
    num_heads: int = setting(0, "fallback if the file does not state it; 0: by width", low=0)
    time_scale: float = setting(0.0, "fallback if the file does not state it; 0: 1", low=0)
    head: str | None = setting(
        None, "reading of a head with twice the rows", choices=("velocity", "dx")
    )
    flip_time: bool = setting(False, "the network was trained with t = 1 as data (SiT)")
    decoder: str = setting("", "VAE (Hub name or folder); default: as the file states")

    batch: int = setting(100, "images at once, and of one part", low=1)
    dtype: str = setting(
        "auto", "weights of the network; auto: bfloat16 on CUDA for ImageNet",
        choices=("auto", "float32", "bfloat16"),
    )  # fmt: skip
    vae_dtype: str = setting(
        "auto", "weights of the VAE; auto: float16 on CUDA", choices=("auto", "float32", "float16")
    )
    compile: bool = setting(False, "torch.compile a student's policy")
    device: str = setting("auto", DEVICE_HELP)
    npz: bool = setting(False, "write samples.npz for the ADM evaluation suite")
    reference: str = setting("", "ImageNet: ADM's .npz of statistics, or a folder of images")
    inception: str = setting("", "weights of the Inception network; default: downloaded")


# What does not decide an image: a continued run may have other values.
RESUMABLE = {"out", "count", "device", "compile", "npz", "reference", "inception"}


def parse_settings(argv: list[str] | None) -> Settings:
    """The flags. Raises: ValueError or OSError, one line, for a value that no run could use."""
    settings = parse(Settings, __doc__, argv)
    if settings.guidance_interval:
        check_interval("--guidance-interval", settings.guidance_interval)
    if runs.is_remote(settings.out):
        raise ValueError(f"--out is {settings.out}; it must be a local folder")
    if settings.classes and settings.labels == "published":
        raise ValueError("--labels published draws from all classes; leave out --classes")
    for name in ("reference", "inception"):
        path = getattr(settings, name)
        if path and not Path(path).exists():
            raise FileNotFoundError(f"--{name} {path}: no such file or folder")
    if settings.reference:
        if settings.count <= metrics.NEIGHBOURS:
            raise ValueError(f"--count is {settings.count}; --reference needs at least 4 images")
        metrics.check_reference(settings.reference)
    return settings


def run_settings(model: str) -> dict:
    """config.json of a run of imagenet.distill; empty if `model` is something else."""
    if model in TEACHERS or not (runs.is_remote(model) or Path(model).is_dir()):
        return {}
    settings = runs.read_json(runs.join(model, "config.json"))
    if "guidance_interval" not in settings:
        raise FileNotFoundError(f"{model} is not the folder of a run: it has no config.json of one")
    return settings


def resolve_settings(settings: Settings, net: DiT, device: torch.device) -> Settings:
    """Fills in what the command line leaves open, from the model and the run it comes from.

    A policy is rolled out as the run, or else the file, states. Where neither does, it gets the
    published protocol, Euler with 128 substeps, or for dx its closed form.

    Raises: ValueError for a setting that does not go with the model.
    """
    run = run_settings(settings.model)
    tiny, head = net.config.decoder == PIXELS, net.config.head
    is_teacher = head == "velocity"
    teacher = settings.teacher or run.get("teacher", "tiny" if tiny else "")
    source = TEACHERS.get(settings.model if is_teacher else teacher, Source(""))
    guidance = run.get("guidance", source.guidance)
    interval = tuple(run.get("guidance_interval", source.guidance_interval))
    trained = settings.trained_nfe or run.get("nfe") or net.config.nfe or 1
    pairs = settings.pairs if settings.pairs >= 0 else 200 if tiny else 0
    if pairs and not teacher:
        raise ValueError(f"--pairs is {pairs}; it needs --teacher")
    if settings.iteration and not run:
        raise ValueError(f"--iteration is {settings.iteration}; {settings.model} is not a run")
    wrong = [label for label in settings.classes if not 0 <= label < net.config.num_classes]
    if wrong:
        raise ValueError(f"--classes has {wrong[0]}; use 0 .. {net.config.num_classes - 1}")
    for name, given, heads in (
        ("h", settings.h > 0, ("gmflow", "dx")),
        ("temperature", settings.temperature != 1, ("gmflow",)),
        ("solver", settings.solver == "exact", ("dx",)),
        ("solver", settings.solver is not None, ("gmflow", "dx")),
        ("compile", settings.compile, ("gmflow", "dx")),
    ):
        if given and head not in heads:
            value = getattr(settings, name)
            what = "a teacher" if is_teacher else f"a {head} student"
            raise ValueError(f"--{name} is {value}; it is of {' and '.join(heads)} students, "
                             f"{settings.model} is {what}")  # fmt: skip
    if settings.reference and tiny:
        raise ValueError("--reference is for ImageNet; the tiny model has its own in assets/")
    stated = net.config.total_substeps or 128  # 0 where the file does not state it
    stated = run.get("sample_substeps") or run.get("total_substeps", stated)
    solver = net.config.solver or ("exact" if head == "dx" else "euler")
    half = device.type == "cuda" and not tiny
    dtype, vae_dtype = ("bfloat16", "float16") if half else ("float32", "float32")
    return replace(
        settings,
        nfe=settings.nfe or (64 if is_teacher else trained),
        trained_nfe=trained,
        guidance=guidance if settings.guidance is None else settings.guidance,
        guidance_interval=tuple(settings.guidance_interval or interval),
        total_substeps=settings.total_substeps or stated,
        solver=settings.solver or run.get("solver", solver),
        teacher=teacher,
        pairs=pairs,
        decoder=net.config.decoder,
        dtype=dtype if settings.dtype == "auto" else settings.dtype,
        vae_dtype=vae_dtype if settings.vae_dtype == "auto" else settings.vae_dtype,
    )


def default_folder(settings: Settings, head: str) -> Path:
    """outputs/samples/NAME; NAME has the model's whole path, because many share a file name."""
    name = re.sub(r"\W+", "-", re.sub(r"\.\w+$", "", settings.model)).strip("-")[-150:]
    at = f"-at{settings.iteration}" if settings.iteration else ""
    return Path("outputs/samples") / f"{name}{at}-{head}-nfe{settings.nfe}"


# ---------------------------------------------------------------------------------------------
# What is sampled
# ---------------------------------------------------------------------------------------------


def open_model(name: str, settings: Settings, device: torch.device) -> DiT:
    """A run's student (local or remote), a file, a Hub path, or a teacher by its short name.

    The name is settings.model, or that of the teacher of the pairs, which states all about itself.
    Raises: FileNotFoundError if a run has no checkpoint of settings.iteration.
    """
    path, time_scale, *_ = TEACHERS.get(name, Source(name))
    own = {"num_heads": settings.num_heads or None, "device": device}
    iteration = 0
    if name == settings.model:
        own |= {"head": settings.head, "flip_time": settings.flip_time}
        time_scale, iteration = settings.time_scale or time_scale, settings.iteration
    if run_settings(name):
        path = runs.join(name, "student.safetensors")
    with runs.reading(path) as local:
        source = local if runs.is_remote(path) else path
        net = load_dit(source, time_scale=time_scale, **own)
    if iteration:
        file = f"step_{iteration:08d}.pt"
        if file not in (kept := runs.list_files(runs.join(name, "checkpoints"), "step_")):
            known = ", ".join(str(int(one[5:13])) for one in kept) or "none"
            raise FileNotFoundError(f"--iteration is {iteration}; {name} has kept {known}")
        state = runs.read_checkpoint(runs.join(name, "checkpoints", file))
        net.load_state_dict(state["ema"])
    if settings.decoder and name == settings.model:
        net.config = replace(net.config, decoder=settings.decoder)
    return net.requires_grad_(False)


Sampler = Callable[[Tensor, Tensor, list[torch.Generator]], Tensor]


def sampler(net: DiT, settings: Settings) -> Sampler:
    """-> (noise (B, C, H, W), labels (B,), a generator per image) -> x_0, by `nfe` evaluations.

    A guided step of a teacher counts as one, though it is two evaluations of its network. Students
    with h > 0 add noise, of the image's own generator: they sample one image after the other.
    """
    options = {"h": settings.h, "temperature": settings.temperature}
    options |= {"total_substeps": settings.total_substeps, "solver": settings.solver}

    def sample_teacher(noise: Tensor, labels: Tensor, generators: list) -> Tensor:
        times = torch.linspace(1, 0, settings.nfe + 1, dtype=torch.float64)[:-1]
        guidance = settings.guidance, settings.guidance_interval
        teacher = guided_teacher(net, labels, *guidance, times=times)
        return integrate_teacher(teacher, noise, settings.nfe)

    def sample_student(noise: Tensor, labels: Tensor, generators: list) -> Tensor:
        if settings.h and len(noise) > 1:
            rows = zip(noise.split(1), labels.split(1), generators, strict=True)
            return torch.cat([sample_student(*row[:2], [row[2]]) for row in rows])
        student = dit_student(net, labels, 1 / settings.trained_nfe)
        return sample(student, noise, settings.nfe, generator=generators[0], **options)

    return sample_teacher if net.config.head == "velocity" else sample_student


def noise_of(
    settings: Settings, numbers: range, net: DiT
) -> tuple[Tensor, list[torch.Generator]]:  # fmt: skip
    """Noise (n, C, H, W) of the images with these numbers, each from its own generator; CPU."""
    shape = (net.config.channels, net.config.latent_size, net.config.latent_size)
    first = settings.seed + PUBLISHED_OFFSET * (settings.labels == "published")
    generators = [torch.Generator().manual_seed((first + i) % 2**31) for i in numbers]
    return torch.stack([torch.randn(shape, generator=g) for g in generators]), generators


def labels_of(settings: Settings, numbers: range, net: DiT) -> Tensor:
    """Classes of the images with these numbers: drawn as published, or the given ones in turn."""
    if settings.labels == "published":
        seeds = [(settings.seed + i) % 2**31 for i in numbers]
        drawn = [
            torch.randint(net.config.num_classes, (), generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        return torch.stack(drawn)
    classes = torch.tensor(settings.classes or range(net.config.num_classes))
    return classes[torch.tensor(numbers) % len(classes)]


# ---------------------------------------------------------------------------------------------
# Sampling, part by part
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """parts/ of a folder: files of settings.batch images, and the content that they belong to."""

    folder: Path
    count: int
    batch: int
    made_from: str  # a hash of the weights and of all settings that decide an image

    def numbers(self) -> list[range]:
        """The images of each part."""
        starts = range(0, self.count, self.batch)
        return [range(i, min(i + self.batch, self.count)) for i in starts]

    def file(self, start: int) -> Path:
        """Where the part that begins with image `start` is kept."""
        return self.folder / f"part_{start:08d}.npz"

    def is_whole(self, numbers: range) -> bool:
        """Whether this part is there, can be read, has all its images, and belongs here."""
        try:
            with np.load(self.file(numbers.start)) as part:
                content = {name: part[name] for name in part.files}
            same = str(content.get("made_from")) == self.made_from
            return same and len(content["images"]) == len(numbers)
        except (FileNotFoundError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
            return False


def sample_parts(
    settings: Settings, net: DiT, teacher: DiT | None, decode: Callable, parts: Parts,
    place: runs.Place,
) -> None:  # fmt: skip
    """Writes the parts of this process that are not there yet.

    Raises: ValueError if images or latents are not finite.
    """
    rank, world, device = place
    to_data, to_target = sampler(net, settings), None
    if teacher:
        to_target = sampler(teacher, replace(settings, nfe=settings.teacher_steps))
    missing = [part for part in parts.numbers()[rank::world] if not parts.is_whole(part)]
    for numbers in tqdm(missing, disable=None if rank == 0 else True):
        noise, generators = noise_of(settings, numbers, net)
        noise, labels = noise.to(device), labels_of(settings, numbers, net).to(device)
        began = time.perf_counter()
        x_0 = to_data(noise, labels, generators)
        pixels = decoded(decode, x_0, f"images {numbers.start} to {numbers[-1]}")
        part = {"images": pixels, "seconds": time.perf_counter() - began}
        part["made_from"] = np.array(parts.made_from)
        paired = max(0, min(settings.pairs - numbers.start, len(noise)))
        if to_target and paired:
            target = to_target(noise[:paired], labels[:paired], generators)
            part["teacher"] = decoded(decode, target, "the teacher's images")
            error = (x_0[:paired] - target).square().flatten(1).mean(1)
            part["error"] = error.cpu().numpy()
        with runs.writing(parts.file(numbers.start)) as path, path.open("wb") as file:
            np.savez(file, **part)


def decoded(decode: Callable, x_0: Tensor, what: str) -> np.ndarray:
    """Latents -> uint8 (B, H, W, C). Raises: ValueError for latents that are not finite."""
    if not x_0.isfinite().all():
        raise ValueError(f"{what} are not finite; damaged weights, or another --dtype is needed")
    return to_pixels(decode(x_0)).numpy()


def gather(parts: Parts, target: Path) -> tuple[np.ndarray, dict]:
    """All images, memory-mapped at `target`, and what else is known of them."""
    images, errors, teacher, seconds = None, [], [], []
    for numbers in parts.numbers():
        with np.load(parts.file(numbers.start)) as part:
            pixels = part["images"]
            if images is None:
                shape = (parts.count, *pixels.shape[1:])
                images = np.lib.format.open_memmap(target, "w+", np.uint8, shape)
            images[numbers.start : numbers.stop] = pixels
            seconds.append(float(part["seconds"]) / len(pixels))
            if "error" in part:
                errors.append(part["error"])
                teacher.append(part["teacher"])
    known = {"seconds_per_image": float(np.median(seconds))}
    if errors:  # over all entries: every image has as many
        known["endpoint_rmse"] = float(np.sqrt(np.concatenate(errors).mean()))
        known["teacher_images"] = np.concatenate(teacher)
    return images, known


# ---------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------


def report(
    settings: Settings, net: DiT, inception: Callable | None,
    reference: metrics.Reference | None, parts: Parts, out: Path, device: torch.device,
) -> dict:  # fmt: skip
    """Gathers the parts; writes metrics.json, samples.npz and pictures; prints the table."""
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        images, known = gather(parts, Path(scratch) / "images.npy")
        teacher_images = known.pop("teacher_images", None)
        labels = labels_of(settings, range(settings.count), net)
        found = {"model": settings.model, "nfe": settings.nfe, "count": settings.count}
        found |= {"labels": settings.labels} | known
        if settings.npz:
            with runs.writing(out / "samples.npz") as temporary, temporary.open("wb") as file:
                np.savez(file, arr_0=images, arr_1=labels.numpy())
        if net.config.decoder == PIXELS and settings.count > fashion.FEATURE_WIDTH:
            found |= metrics.tiny_metrics(images, labels)
        elif inception:
            found |= metrics.imagenet_metrics(inception, images, reference, device)
        for name, value in found.items():
            if isinstance(value, float) and not np.isfinite(value):
                raise ValueError(f"{name} is {value}; the images are kept in {out}/parts")
        write_json(out / "metrics.json", found | {"settings": dataclasses.asdict(settings)})
        first = torch.from_numpy(images[:100].copy()).permute(0, 3, 1, 2)
        save_image_grid(first, out / "samples.png", columns=min(10, len(first)), padding=0)
        if teacher_images is not None:
            shown = min(10, len(teacher_images))
            rows = {f"teacher, {settings.teacher_steps} steps": teacher_images[:shown]}
            rows[f"{Path(settings.model).name}, nfe {settings.nfe}"] = images[:shown]
            save_figure(image_rows(rows, "the same noise"), out / "pairs.png")
        del images  # the memory map, before its file
    for name, value in found.items():
        print(f"{name:20s} {value:.4f}" if isinstance(value, float) else f"{name:20s} {value}")
    return found


def main(argv: list[str] | None = None) -> None:
    """Samples and measures; see the top of the file."""
    settings = parse_settings(argv)
    with runs.processes(settings.device) as place:
        rank, _, device = place
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as in the public evaluation
        net = open_model(settings.model, settings, device)
        settings = resolve_settings(settings, net, device)
        out = Path(settings.out or default_folder(settings, net.config.head))
        decode = checkpoints.load_decoder(net.config, device, DTYPES[settings.vae_dtype])
        decisive = {k: v for k, v in dataclasses.asdict(settings).items() if k not in RESUMABLE}
        decisive["weights"] = weights_hash(net)
        teacher = inception = reference = None
        if settings.pairs:
            teacher = open_model(settings.teacher, settings, device).to(DTYPES[settings.dtype])
            decisive["teacher_weights"] = weights_hash(teacher)
        net.to(DTYPES[settings.dtype])
        runs.check_same(out / "settings.json", decisive)
        made_from = hashlib.blake2b(json.dumps(decisive).encode(), digest_size=8).hexdigest()
        parts = Parts(out / "parts", settings.count, settings.batch, made_from)
        if rank == 0:
            if settings.reference:
                inception = frechet.load_inception(settings.inception, device)
                reference = metrics.load_reference(inception, settings.reference, device)
            write_json(out / "settings.json", decisive)
            runs.remove_leftovers(parts.folder)
        runs.from_first(None)  # only then may others write
        with compiled_policies(settings.compile):
            sample_parts(settings, net, teacher, decode, parts, place)
        runs.total(torch.zeros(1, device=device)).item()  # all parts are there
    if rank == 0:
        report(settings, net, inception, reference, parts, out, device)


if __name__ == "__main__":
    run_cli(main)
