"""Trains what `assets/` ships: a small flow model of Fashion-MNIST, a feature network to judge it.

    python -m assets.train_tiny_teacher               # 12000 iterations, under an hour on one core
    python -m assets.train_tiny_teacher --iterations 200 --work outputs/try --out outputs/try

Flow matching (x_t = (1 - t) x_0 + t eps, u = eps - x_0) on latents 4 x 14 x 14, with class labels,
label dropout for guidance, and an exponential moving average of the weights. No flips: all shoes
of the data set point to the left. Run the same command again to continue an interrupted run; the
random numbers of an iteration depend on the seed and the iteration alone. A feature network that
is already in --out is kept, so that distances stay comparable.

The data set: --data, else Debian's package dataset-fashion-mnist, else a download by torchvision.
"""

if not __package__:
    raise SystemExit("start it in the repository's root: python -m assets.train_tiny_teacher")

import copy
import gzip
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import fashion, frechet
from common.cli import DEVICE_HELP, parse, pick_device, run_cli, setting
from common.files import writing
from common.plots import image_rows, save_figure
from common.teachers import integrate_teacher
from common.train import ema_decay
from imagenet.checkpoints import save_dit
from imagenet.dit import PRESETS, DiT, guided_teacher

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
GUIDANCE, INTERVAL, STEPS = 2.5, (0.0, 0.8), 64  # of the samples that judge the teacher
EMA_GAMMA = 15  # the average looks back over about 1/16 of the run so far
LABEL_DROPOUT = 0.1


@dataclass(frozen=True)
class Settings:
    """Flags of the script."""

    data: Path | None = setting(None, "folder with the four Fashion-MNIST .gz files")
    iterations: int = setting(12_000, "optimizer steps", low=1)
    batch: int = setting(64, "images per optimizer step", low=1)
    lr: float = setting(2e-3, "peak learning rate: linear warm-up, then a cosine", above=0)
    seed: int = setting(0, "seed of weights and batches", low=0)
    every: int = setting(500, "iterations between checkpoints", low=1)
    epochs: int = setting(4, "epochs of the feature network", low=1)
    judged: int = setting(2000, "samples that are judged at the end", low=10)
    compile: bool = setting(False, "torch.compile: a tenth faster on a CPU")
    device: str = setting("cpu", DEVICE_HELP)
    work: Path = setting(Path("outputs/tiny_teacher"), "folder for checkpoints and pictures")
    out: Path = setting(fashion.ASSETS, "folder for the two files")


def load_data(folder: Path | None, train: bool) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) in [-1, 1] and labels (N,)."""
    folder = folder or (DEBIAN if DEBIAN.is_dir() else None)
    if folder is None:
        from torchvision.datasets import FashionMNIST

        data = FashionMNIST("data", train=train, download=True)
        pixels, labels = data.data, data.targets
    else:
        name = "train" if train else "t10k"
        read = [folder / f"{name}-{part}.gz" for part in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        for path in read:
            if not path.is_file():
                raise FileNotFoundError(f"--data: no file {path}")
        raw = [np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8) for path in read]
        pixels = torch.from_numpy(raw[0][16:].copy()).view(-1, 28, 28)
        labels = torch.from_numpy(raw[1][8:].copy())
    return pixels[:, None].float() / 127.5 - 1, labels.long()


def train_features(
    images: Tensor, labels: Tensor, test: tuple[Tensor, Tensor], epochs: int
) -> dict:
    """Trains the classifier; returns its fp16 weights and the statistics of its features."""
    torch.manual_seed(0)
    net, batch = fashion.FeatureNet(), 100
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    steps = epochs * len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for epoch in range(epochs):
        for index in torch.randperm(len(images)).split(batch):
            loss = F.cross_entropy(net(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"feature network: epoch {epoch + 1}/{epochs}, loss {loss.item():.3f}", flush=True)

    net = net.half().float().eval()  # the statistics are those of the weights as they are stored
    values, _ = fashion.extract(net, images)
    test_values, predicted = fashion.extract(net, test[0])
    accuracy = (predicted == test[1]).float().mean()
    statistics = {"mean": values.mean(dim=0), "covariance": values.T.cov(), "accuracy": accuracy}
    floor = frechet.gaussian_distance(
        test_values.mean(dim=0), test_values.T.cov(), statistics["mean"], statistics["covariance"]
    )
    print(f"feature network: test accuracy {accuracy:.4f}, Frechet distance train-test {floor:.2f}")
    state = {
        key: value.half() for key, value in net.state_dict().items() if value.is_floating_point()
    }
    return state | {f"statistics.{key}": value for key, value in statistics.items()}


def draw_batch(latents: Tensor, labels: Tensor, batch: int, seed: int, step: int):
    """One batch (x_t, t, labels, target). t is logit-normal, every fifth one uniform."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    index = torch.randint(len(latents), (batch,), generator=generator)
    x_0, label = latents[index], labels[index].clone()
    eps = torch.randn(x_0.shape, generator=generator)
    t = torch.sigmoid(torch.randn(batch, generator=generator))
    uniform = torch.rand(batch, generator=generator)
    t = torch.where(torch.arange(batch) % 5 == 0, uniform, t)
    label[torch.rand(batch, generator=generator) < LABEL_DROPOUT] = len(fashion.CLASSES)
    x_t = torch.lerp(x_0, eps, t[:, None, None, None])
    return x_t, t, label, eps - x_0


@torch.no_grad()
def draw_samples(net: DiT, labels: Tensor, seed: int = 0) -> Tensor:
    """Labels (B,) on the network's device -> images (B, 1, 28, 28), by guided Euler steps."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(labels), 4, 14, 14, generator=generator).to(labels.device)
    images = []
    for x, label in zip(noise.split(250), labels.split(250), strict=True):
        teacher = guided_teacher(net, label, GUIDANCE, INTERVAL)
        images.append(fashion.to_images(integrate_teacher(teacher, x, STEPS)))
    return torch.cat(images).clamp(-1, 1)


def save_grid(images: Tensor, path: Path, columns: int = 10) -> None:
    """Images (B, 1, 28, 28) -> one grey PNG, twice enlarged."""
    from PIL import Image

    grid = (
        images[:, 0].cpu().unflatten(0, (-1, columns)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    )
    pixels = (grid * 127.5 + 127.5).round().to(torch.uint8).numpy()
    with writing(path) as temporary:
        Image.fromarray(pixels).resize((2 * grid.shape[1], 2 * grid.shape[0])).save(temporary)


def train_teacher(settings: Settings, latents: Tensor, labels: Tensor) -> DiT:
    """Flow matching; returns the averaged network."""
    device = pick_device(settings.device)
    torch.manual_seed(settings.seed)
    net = DiT(PRESETS["tiny"]).to(device)
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0
    )
    start, before, resume = 0, 0.0, settings.work / "resume.pt"
    if resume.is_file():
        state = torch.load(resume, map_location=device, weights_only=True)
        net.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start, before = state["step"], state["seconds"]
    forward = torch.compile(net) if settings.compile else net
    began, losses = time.monotonic(), []

    for step in range(start, settings.iterations):
        rate = min(1, (step + 1) / 300) * 0.5 * (1 + math.cos(math.pi * step / settings.iterations))
        optimizer.param_groups[0]["lr"] = settings.lr * rate
        x, t, label, target = (
            value.to(device)
            for value in draw_batch(latents, labels, settings.batch, settings.seed, step)
        )
        loss = F.mse_loss(forward(x, t, label), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        decay = ema_decay(step + 1, gamma=EMA_GAMMA)
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
        losses.append(loss.detach())

        if (step + 1) % settings.every == 0 or step + 1 == settings.iterations:
            seconds = before + time.monotonic() - began
            mean = torch.stack(losses).mean().item()
            losses = []
            print(
                f"{step + 1:6d}/{settings.iterations}  loss {mean:.4f}  {seconds:6.0f} s",
                flush=True,
            )
            with writing(resume) as temporary:
                torch.save(
                    {"net": net.state_dict(), "ema": ema.state_dict(), "step": step + 1,
                     "optimizer": optimizer.state_dict(), "seconds": seconds},
                    temporary,
                )  # fmt: skip
            save_dit(ema, settings.work / f"ema_{step + 1:06d}.safetensors", torch.float16)
    return ema


def main(argv: list[str] | None = None) -> None:
    """Trains and judges; see the top of the file."""
    settings = parse(Settings, __doc__, argv)
    images, labels = load_data(settings.data, train=True)

    features = settings.out / fashion.FEATURES.name
    if not features.is_file():
        from safetensors.torch import save_file

        state = train_features(
            images, labels, load_data(settings.data, train=False), settings.epochs
        )
        with writing(features) as temporary:
            save_file(state, temporary)

    net = train_teacher(settings, fashion.to_latents(images), labels).eval()
    save_dit(net, settings.out / fashion.TEACHER.name, torch.float16)
    device = next(net.parameters()).device
    labels = (torch.arange(settings.judged) % 10).to(device)
    samples = draw_samples(net, labels)
    shown = samples[:80].split(10)
    rows = {f"sample {i + 1}": part for i, part in enumerate(shown) if len(part) == 10}
    columns = [name.split("/")[0] for name in fashion.CLASSES]
    save_figure(image_rows(rows, columns=columns), settings.work / "samples.png")
    judge = fashion.load_features(features, device)
    print(
        f"{len(samples)} samples, guidance {GUIDANCE} on t <= {INTERVAL[1]}, {STEPS} Euler steps:"
    )
    print(f"  Frechet distance {fashion.frechet_distance(samples, judge):.2f}")
    print(f"  recognised {fashion.recognition_rate(samples, labels, judge):.3f}")


if __name__ == "__main__":
    run_cli(main)
