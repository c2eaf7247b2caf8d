"""Samples a DiT student or teacher, and measures it: FID, IS, precision, recall, endpoint error.

    python -m imagenet.sample outputs/tiny                # a run of imagenet.distill
    python -m imagenet.sample tiny --nfe 8                # the teacher, 8 Euler steps
    torchrun --nproc-per-node 8 -m imagenet.sample MODEL --count 50000 --npz \\
        --reference VIRTUAL_imagenet256_labeled.npz           # FID of 50,000 images

MODEL is the folder of a run, a checkpoint file, owner/repository/path on the Hugging Face Hub
(Lakonik/pi-Flow-ImageNet/STUDENT/diffusion_pytorch_model.safetensors), or a teacher: tiny, repa,
fm. Image i depends on --seed + i alone (its noise) and on i (its class, in turn), whatever --batch
and the number of processes. Finished batches are kept: run the same command again to go on.

Metrics. The tiny model is judged by the feature network in assets/: a Frechet distance, and how
many images are recognised. For ImageNet this reads --reference, the .npz of the ADM evaluation
suite or a folder of images, and needs torch-fidelity: its Inception network carries the original
TensorFlow weights and resizes as TensorFlow did, so that its FID is the one that papers report; the
FID of torchmetrics is built upon it. Precision and recall are those of ADM: Inception features, the
3 nearest neighbours. --npz writes the images as the ADM suite itself reads them.

In --out: samples.png, metrics.json, with --npz samples.npz (uint8 NHWC in arr_0), and parts/.
"""

import argparse
import dataclasses
import json
import math
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import imagenet.distributed as runs
from common.cli import compiled_policies, run_cli, write_json
from imagenet import checkpoints, fashion
from imagenet.checkpoints import TEACHERS, Source, load_dit, to_pixels
from imagenet.dit import PIXELS, DiT, dit_student, guided_teacher
from piflow_minimal import sample

# ---------------------------------------------------------------------------------------------
# What is sampled
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the images; kept in --out, so that a continued run is the same run."""

    model: str
    nfe: int
    trained_nfe: int
    guidance: float
    interval: tuple[float, float]
    substeps: int
    solver: str
    h: float
    temperature: float
    bf16: bool
    seed: int
    classes: tuple[int, ...]  # empty: all, in turn
    batch: int  # images of a part
    teacher: str
    teacher_steps: int
    pairs: int


def open_model(name: str, num_heads: int, time_scale: float, device) -> DiT:
    """A run's student (local or remote), a file, a Hub path, or a teacher by its short name."""
    path, own_scale, *_ = TEACHERS.get(name, Source(name))
    if run_settings(name):
        path = runs.join(name, "student.safetensors")
    with runs.reading(path) as local:
        source = local if runs.is_remote(path) else path
        net = load_dit(source, num_heads or None, time_scale or own_scale or None, device=device)
    return net.requires_grad_(False)


def run_settings(name: str) -> dict:
    """config.json of a run of imagenet.distill; empty if `name` is something else."""
    if name in TEACHERS or not (runs.is_remote(name) or Path(name).is_dir()):
        return {}
    settings = json.loads(runs.read_text(runs.join(name, "config.json")) or "{}")
    if "guidance_interval" not in settings:
        raise FileNotFoundError(f"{name} is not the folder of a run: it has no config.json of one")
    return settings


Sampler = Callable[[Tensor, Tensor, list[torch.Generator]], Tensor]


def sampler(net: DiT, settings: Settings) -> Sampler:
    """-> (noise (B, C, H, W), labels (B,), a generator per image) -> x_0, by `nfe` evaluations.

    A guided step of a teacher counts as one, though it is two evaluations of its network. Students
    with h > 0 add noise, of the image's own generator: they sample one image after the other.
    """
    runner = runs.Runner(net, net.config, settings.bf16)
    options = {"h": settings.h, "temperature": settings.temperature}
    options |= {"total_substeps": settings.substeps, "solver": settings.solver}

    def teach(noise: Tensor, labels: Tensor, generators: list) -> Tensor:
        teacher = guided_teacher(runner, labels, settings.guidance, settings.interval)
        return runs.follow_teacher(teacher, noise, settings.nfe)

    def study(noise: Tensor, labels: Tensor, generators: list) -> Tensor:
        if settings.h and len(noise) > 1:
            rows = zip(noise.split(1), labels.split(1), generators, strict=True)
            return torch.cat([study(*row[:2], [row[2]]) for row in rows])
        student = dit_student(runner, labels, 1 / settings.trained_nfe)
        return sample(student, noise, settings.nfe, generator=generators[0], **options)

    return teach if net.config.head == "velocity" else study


def noise_of(seed: int, numbers: range, net: DiT) -> tuple[Tensor, list[torch.Generator]]:
    """Noise (n, C, H, W) of the images with these numbers, each from its own generator; CPU."""
    shape = (net.config.channels, net.config.latent_size, net.config.latent_size)
    generators = [torch.Generator().manual_seed((seed + i) % 2**32) for i in numbers]
    return torch.stack([torch.randn(shape, generator=g) for g in generators]), generators


def labels_of(settings: Settings, numbers: range, net: DiT) -> Tensor:
    """Classes of the images with these numbers: the given ones, or all, in turn."""
    classes = torch.tensor(settings.classes or range(net.config.num_classes))
    return classes[torch.tensor(numbers) % len(classes)]


# ---------------------------------------------------------------------------------------------
# Sampling, part by part
# ---------------------------------------------------------------------------------------------


def sample_parts(
    settings: Settings, count: int, net: DiT, teacher: DiT | None, folder: Path, place: tuple
) -> None:  # fmt: skip
    """Writes parts/ that are not there yet; `place` is (rank, number of processes, device)."""
    rank, world, device = place
    decode = checkpoints.load_decoder(net.config, device)
    follow, follow_teacher = sampler(net, settings), None
    if teacher:
        steps = dataclasses.replace(settings, nfe=settings.teacher_steps)
        follow_teacher = sampler(teacher, steps)
    parts = [range(i, min(i + settings.batch, count)) for i in range(0, count, settings.batch)]
    missing = [numbers for numbers in parts[rank::world] if not is_whole(folder, numbers)]
    for numbers in tqdm(missing, disable=None if rank == 0 else True):
        noise, generators = noise_of(settings.seed, numbers, net)
        noise, labels = noise.to(device), labels_of(settings, numbers, net).to(device)
        began = time.perf_counter()
        x_0 = follow(noise, labels, generators)
        pixels = to_pixels(decode(x_0))  # on the CPU: the device is done
        part = {"images": pixels.numpy(), "seconds": time.perf_counter() - began}
        paired = max(0, min(settings.pairs - numbers.start, len(noise)))
        if follow_teacher and paired:
            target = follow_teacher(noise[:paired], labels[:paired], generators)
            part["teacher"] = to_pixels(decode(target)).numpy()
            error = (x_0[:paired] - target).square().flatten(1).mean(1)
            part["error"] = error.cpu().numpy()
        with runs.writing(part_file(folder, numbers.start)) as path, path.open("wb") as file:
            np.savez(file, **part)


def part_file(folder: Path, start: int) -> Path:
    """Where the part that begins with image `start` is kept."""
    return folder / f"part_{start:08d}.npz"


def is_whole(folder: Path, numbers: range) -> bool:
    """Whether the part with these images is there, can be read, and has all of them."""
    try:
        with np.load(part_file(folder, numbers.start)) as part:
            return len([part[name] for name in part.files]) and len(part["images"]) == len(numbers)
    except (FileNotFoundError, EOFError, ValueError, zipfile.BadZipFile):
        return False


def gather(folder: Path, count: int, batch: int, target: Path) -> tuple[np.ndarray, dict]:
    """All images, memory-mapped at `target`, and what else is known of them."""
    images, errors, teacher, seconds = None, [], [], []
    for start in range(0, count, batch):
        with np.load(part_file(folder, start)) as part:
            pixels = part["images"]
            if images is None:
                shape = (count, *pixels.shape[1:])
                images = np.lib.format.open_memmap(target, "w+", np.uint8, shape)
            images[start : start + len(pixels)] = pixels
            seconds.append(float(part["seconds"]) / len(pixels))
            if "error" in part:
                errors.append(part["error"])
                teacher.append(part["teacher"])
    known = {"seconds_per_image": float(np.median(seconds))}
    if errors:
        known["endpoint_rmse"] = float(np.sqrt(np.concatenate(errors).mean()))
        known["teacher_images"] = np.concatenate(teacher)
    return images, known


# ---------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------


def tiny_metrics(images: np.ndarray, labels: Tensor) -> dict:
    """Of images uint8 (n, 28, 28, 1), n > 64."""
    features = fashion.load_features()
    values = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2) / 127.5 - 1
    return {
        "frechet_distance": fashion.frechet_distance(values, features),
        "recognition_rate": fashion.recognition_rate(values, labels, features),
    }


def load_inception(weights: str, device: torch.device) -> Callable[[Tensor], tuple]:
    """uint8 images (B, 3, H, W) -> (features (B, 2048), logits (B, 1008))."""
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError("--reference needs: pip install torch-fidelity") from error
    if weights:
        try:
            torch.load(weights, weights_only=True)
        except Exception as error:  # whatever the unpickler stumbles over
            raise ValueError(f"--inception {weights} is no file of tensors") from error
    names = ["2048", "logits_unbiased"]
    return FeatureExtractorInceptionV3("inception", names, weights or None).to(device)


@torch.no_grad()
def inception_features(net: Callable, images: np.ndarray, device, batch: int = 64):
    """uint8 (n, H, W, 3) -> features (n, 2048), logits (n, 1008), on the CPU."""
    parts = []
    for start in tqdm(range(0, len(images), batch), desc="Inception", disable=None):
        pixels = torch.from_numpy(np.ascontiguousarray(images[start : start + batch]))
        parts.append([value.cpu() for value in net(pixels.permute(0, 3, 1, 2).to(device))])
    return (torch.cat(column) for column in zip(*parts, strict=True))


def reference_images(folder: str) -> list[Path]:
    """The image files below a folder, in a fixed order."""
    kinds = {".png", ".jpg", ".jpeg", ".JPEG", ".webp"}
    return sorted(file for file in Path(folder).rglob("*") if file.suffix in kinds)


def check_reference(path: str) -> None:
    """Raises: ValueError if it is neither a folder of images nor an .npz of images or statistics.

    Before anything is sampled; the images themselves are not read.
    """
    if Path(path).is_dir():
        if not reference_images(path):
            raise ValueError(f"--reference {path} is a folder without images")
        return
    try:
        with zipfile.ZipFile(path) as file:
            names = {name.removesuffix(".npy") for name in file.namelist()}
    except zipfile.BadZipFile as error:
        raise ValueError(f"--reference {path} is no readable .npz") from error
    if "arr_0" not in names and not {"mu", "sigma"} <= names:
        raise ValueError(f"--reference {path} has neither images (arr_0) nor mu and sigma")


def read_reference(path: str) -> tuple[np.ndarray | None, dict]:
    """Images and, where the file has them, mean `mu` and covariance `sigma` of their features."""
    if Path(path).is_dir():
        from PIL import Image

        files = reference_images(path)
        return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]), {}
    with np.load(path) as file:  # allow_pickle stays off
        images = file["arr_0"] if "arr_0" in file else None
        return images, {key: file[key].astype(np.float64) for key in ("mu", "sigma") if key in file}


def imagenet_metrics(net: Callable, images: np.ndarray, reference: str, device) -> dict:
    """FID and Inception Score; precision and recall if the reference has images.

    net: of `load_inception`.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    real_images, known = read_reference(reference)
    features, logits = inception_features(net, images, device)
    real = None if real_images is None else next(inception_features(net, real_images, device))
    if len(known) < 2:
        known = {"mu": real.double().mean(0), "sigma": real.double().T.cov()}
    mean, covariance = (torch.as_tensor(known[key]) for key in ("mu", "sigma"))
    ours = features.double()
    metrics = {
        "fid": fashion.gaussian_distance(ours.mean(0), ours.T.cov(), mean, covariance),
        "inception_score": isc_features_to_metric(logits)["inception_score_mean"],
    }
    if real is not None:
        options = {"prc_neighborhood": 3, "prc_batch_size": 10000, "save_cpu_ram": True}
        found = prc_features_to_metric(features, real, verbose=False, **options)
        metrics |= {key: found[key] for key in ("precision", "recall")}
    return metrics


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags. Raises: ValueError or OSError, one line, for a value that no run could use."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s MODEL [--SETTING VALUE ...]",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="folder of a run, file, owner/repository/path on the Hub; tiny, repa, fm")
    add("--out", help="folder for the results; default: in outputs/samples, by model and nfe")
    add("--count", type=int, default=1000, help="images")
    add("--nfe", type=int, default=0, help="steps; 0: as trained, 64 for a teacher")
    add("--seed", type=int, default=0, help="image i is drawn with the seed --seed + i")
    add("--classes", type=int, nargs="+", default=[], help="in turn; default: all of them")
    add("--guidance", type=float, help="of a teacher; default: what the run or teacher has")
    add("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="where guidance acts")
    add("--pairs", type=int, default=-1, help="images to compare with a teacher; -1: 200 for tiny")
    add("--teacher", default="", help="of the pairs; default: the run's, or tiny for a tiny model")
    add("--teacher-steps", type=int, default=64, help="Euler steps of the teacher of the pairs")
    add("--substeps", type=int, default=0, help="per unit of tau; 0: as trained, or 128")
    add("--solver", default="", help="euler, deis, exact; default: as trained, or exact, euler")
    add("--h", type=float, default=0.0, help="noise between a student's steps: 0 none, inf full")
    add("--temperature", type=float, default=1.0, help="of a gmflow student, before the last step")
    add("--compile", action="store_true", help="torch.compile a student's policy")
    add("--trained-nfe", type=int, default=0, help="of a dx student whose folder does not say")
    add("--num-heads", type=int, default=0, help="of a file that does not say; 0: 16")
    add("--time-scale", type=float, default=0.0, help="of a file that does not say; 0: 1")
    add("--batch", type=int, default=100, help="images at once, and of one part")
    add("--bf16", action="store_true", help="bfloat16 autocast around the network")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--npz", action="store_true", help="write samples.npz for the ADM evaluation suite")
    add("--reference", default="", help="ImageNet: ADM's .npz statistics, or a folder of images")
    add("--inception", default="", help="its weights, if they are not to be downloaded")
    args = parser.parse_args(argv)
    least = dict.fromkeys(("count", "batch", "teacher_steps"), 1)
    others = ("substeps", "nfe", "trained_nfe", "num_heads", "time_scale", "h", "guidance")
    least |= dict.fromkeys(others, 0)
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not value >= low:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is {value}; it must be at least {low}")
    if not 0 < args.temperature < math.inf:
        raise ValueError(f"--temperature is {args.temperature}; it must be positive and finite")
    if runs.is_remote(args.out or ""):
        raise ValueError(f"--out is {args.out}; it must be a local folder")
    low, high = args.interval or (0, 1)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"--interval is {low:g} {high:g}; it must be 0 <= LOW <= HIGH <= 1")
    if args.solver not in ("", "euler", "deis", "exact"):
        raise ValueError(f"--solver is {args.solver!r}; choose euler, deis or exact")
    for name in ("reference", "inception"):
        if getattr(args, name) and not Path(getattr(args, name)).exists():
            raise FileNotFoundError(f"--{name} {getattr(args, name)}: no such file or folder")
    if args.reference:
        check_reference(args.reference)
    return args


def settle(args: argparse.Namespace, net: DiT) -> Settings:
    """Fills in what the command line leaves open, from the model and the run it comes from.

    A policy is followed as it was in training. A file of weights does not say: it gets the
    published protocol, Euler with 128 substeps, or for dx its closed form.

    Raises: ValueError for a setting that does not go with the model.
    """
    run = run_settings(args.model)
    tiny, head = net.config.decoder == PIXELS, net.config.head
    is_teacher = head == "velocity"
    teacher = args.teacher or run.get("teacher", "tiny" if tiny else "")
    guidance, interval = TEACHERS.get(args.model if is_teacher else teacher, Source(""))[2:]
    if run:
        guidance, interval = run["guidance"], tuple(run["guidance_interval"])
    trained = args.trained_nfe or run.get("nfe", 1)
    pairs = args.pairs if args.pairs >= 0 else 200 if tiny else 0
    if pairs and not teacher:
        raise ValueError(f"--pairs is {pairs}; it needs --teacher")
    wrong = [label for label in args.classes if not 0 <= label < net.config.num_classes]
    if wrong:
        raise ValueError(f"--classes has {wrong[0]}; use 0 .. {net.config.num_classes - 1}")
    for name, given, heads in (
        ("h", args.h > 0, ("gmflow", "dx")),
        ("temperature", args.temperature != 1, ("gmflow",)),
        ("solver", args.solver == "exact", ("dx",)),
        ("solver", args.solver != "", ("gmflow", "dx")),
        ("compile", args.compile, ("gmflow", "dx")),
    ):
        if given and head not in heads:
            value, what = getattr(args, name), "a teacher" if is_teacher else f"a {head} student"
            raise ValueError(f"--{name} is {value}; it is of {' and '.join(heads)} students, "
                             f"{args.model} is {what}")  # fmt: skip
    if args.reference and tiny:
        raise ValueError("--reference is for ImageNet; the tiny model has its own in assets/")
    return Settings(
        model=args.model,
        nfe=args.nfe or (64 if is_teacher else trained),
        trained_nfe=trained,
        guidance=guidance if args.guidance is None else args.guidance,
        interval=tuple(args.interval or interval),
        substeps=args.substeps or run.get("total_substeps", 128),
        solver=args.solver or run.get("solver", "exact" if head == "dx" else "euler"),
        h=args.h,
        temperature=args.temperature,
        bf16=args.bf16,
        seed=args.seed,
        classes=tuple(args.classes),
        batch=args.batch,
        teacher=teacher,
        teacher_steps=args.teacher_steps,
        pairs=min(pairs, args.count),
    )


def report(
    args: argparse.Namespace, settings: Settings, net: DiT, inception, out: Path, device
) -> dict:
    """Gathers the parts; writes pictures, samples.npz and metrics.json; prints the table."""
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        target = Path(scratch) / "images.npy"
        images, known = gather(out / "parts", args.count, settings.batch, target)
        teacher_images = known.pop("teacher_images", None)
        runs.save_grid(torch.from_numpy(images[:100].copy()), out / "samples.png", 10)
        if teacher_images is not None:
            shown = min(10, len(teacher_images))
            rows = {f"teacher, {settings.teacher_steps} steps": teacher_images[:shown]}
            rows[f"{Path(args.model).name}, nfe {settings.nfe}"] = images[:shown]
            runs.draw_rows(out / "pairs.png", rows, "the same noise")
        labels = labels_of(settings, range(args.count), net)
        metrics = {"model": args.model, "nfe": settings.nfe, "count": args.count} | known
        if net.config.decoder == PIXELS:
            if args.count > fashion.FEATURE_WIDTH:
                metrics |= tiny_metrics(images, labels)
        elif inception:
            metrics |= imagenet_metrics(inception, images, args.reference, device)
        if args.npz:
            with runs.writing(out / "samples.npz") as temporary, temporary.open("wb") as file:
                np.savez(file, arr_0=images, arr_1=labels.numpy())
        del images  # the memory map, before its file
    write_json(out / "metrics.json", metrics | {"settings": dataclasses.asdict(settings)})
    for name, value in metrics.items():
        print(f"{name:20s} {value:.4f}" if isinstance(value, float) else f"{name:20s} {value}")
    return metrics


def main(argv: list[str] | None = None) -> None:
    """Samples and measures; see the top of the file."""
    args = parse(argv)
    with runs.processes(args.device) as place:
        rank, _, device = place
        net = open_model(args.model, args.num_heads, args.time_scale, device)
        settings = settle(args, net)
        name = f"{Path(args.model.rstrip('/')).stem}-{net.config.head}-nfe{settings.nfe}"
        out = Path(args.out or Path("outputs/samples") / name)
        teacher = inception = None
        if settings.pairs:
            teacher = open_model(settings.teacher, args.num_heads, 0.0, device)
        runs.check_same(out / "settings.json", dataclasses.asdict(settings))
        if rank == 0:
            if args.reference:
                inception = load_inception(args.inception, device)
            write_json(out / "settings.json", dataclasses.asdict(settings))
            runs.remove_leftovers(out / "parts")
        runs.from_first(None)  # only then may others write
        with compiled_policies(args.compile):
            sample_parts(settings, args.count, net, teacher, out / "parts", place)
        runs.total(torch.zeros(1, device=device)).item()  # all parts are there
    if rank == 0:
        report(args, settings, net, inception, out, device)


if __name__ == "__main__":
    run_cli(main)
