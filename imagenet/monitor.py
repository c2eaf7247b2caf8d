"""What is measured while a student trains: loss by t, pictures of pairs, Frechet distance."""

import json
import math
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

import imagenet.distributed as runs
from common import fashion, frechet
from common.plots import image_rows
from common.teachers import endpoint_rmse, integrate_teacher
from imagenet import metrics
from imagenet.checkpoints import load_decoder, to_pixels
from imagenet.dit import PIXELS, DiT, DiTConfig, dit_student, guided_teacher
from piflow_minimal import sample

if TYPE_CHECKING:
    from imagenet.distill import Run, Settings

EVAL_BATCH = 100  # images at once
BINS = 10  # of t, for the loss in stats.jsonl
PAIRS = 10  # noises of the pictures


class Metrics:
    """Losses since the last line of stats.jsonl."""

    def __init__(self, device: torch.device):
        self.losses, self.norm, self.began = [], 0.0, time.monotonic()
        self.by_t = torch.zeros(2, BINS, device=device)

    def add(self, loss: float, norm: float, by_t: Tensor) -> None:
        """by_t: (2, BINS) squared errors by t, summed, and their number, of this process."""
        if math.isfinite(loss + norm):
            self.losses.append(loss)
            self.norm = norm
            self.by_t += by_t

    def record(self, run: "Run") -> dict:
        """One line of stats.jsonl. Every process has to call this."""
        squares, counts = runs.total(self.by_t)
        elapsed = time.monotonic() - self.began
        return {
            "iteration": run.iteration,
            "loss": sum(self.losses) / len(self.losses),
            "loss_by_t": [round(value, 6) for value in (squares / counts.clamp(min=1)).tolist()],
            "grad_norm": self.norm,
            "lr": run.optimizer.param_groups[0]["lr"],
            "images_per_s": run.config.batch * len(self.losses) / elapsed,
            "memory_gib": runs.memory_gib(run.device),
            "seconds": run.seconds,
            "skipped": run.skipped,
        }


class PairedEval:
    """Fixed noises, and where the teacher takes them in many steps: the student should follow."""

    def __init__(self, config: "Settings", teacher: runs.AutocastModel, device: torch.device):
        net, self.config = teacher.config, config
        generator = torch.Generator().manual_seed(config.seed)
        shape = (PAIRS, net.channels, net.latent_size, net.latent_size)
        self.noise = torch.randn(shape, generator=generator).to(device)
        self.labels = (torch.arange(PAIRS) * net.num_classes // PAIRS).to(device)
        velocity = guided_teacher(teacher, self.labels, config.guidance, config.guidance_interval)
        self.target = integrate_teacher(velocity, self.noise, config.teacher_steps)
        self.decode = load_decoder(net, device)
        self.images = to_pixels(self.decode(self.target))

    def compare(self, average: DiT, iteration: int) -> float:
        """Draws the pairs. -> endpoint RMSE, in latents."""
        x_0 = sample_student(self.config, average, self.noise, self.labels)
        rows = {f"teacher, {self.config.teacher_steps} steps": self.images}
        rows[f"student, nfe {self.config.nfe}"] = to_pixels(self.decode(x_0))
        path = runs.join(self.config.out, "pictures", f"step_{iteration:08d}.png")
        figure = image_rows(rows, f"the same noise, iteration {iteration}")
        with runs.writing(path) as temporary:
            figure.savefig(temporary, format="png")
        return endpoint_rmse(x_0, self.target)


def sample_student(config: "Settings", net: DiT, noise: Tensor, labels: Tensor) -> Tensor:
    """x_0 (B, C, H, W) by config.nfe evaluations, rolled out as the student's file states."""
    student = dit_student(runs.AutocastModel(net, net.config, config.bf16), labels, 1 / config.nfe)
    return sample(student, noise, config.nfe, **config.sampling)


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU, seeded."""
    return torch.Generator().manual_seed(seed)


class FrechetEval:
    """Frechet distance of new images of the average, on all processes; image i has the seed i.

    FID against --reference; for the tiny model the distance of its own feature network.
    Raises: ValueError if there is no reference.
    """

    def __init__(self, config: "Settings", net: DiTConfig, device: torch.device):
        if net.decoder != PIXELS and not config.reference:
            raise ValueError("--eval-every needs --reference: what the FID compares with")
        self.config, self.net, self.device = config, net, device
        self.decode = load_decoder(net, device)
        if net.decoder == PIXELS:
            known = fashion.load_features(device=device)
            self.name, self.moments = "frechet_distance", (known.mean, known.covariance)
            self.features = lambda images: fashion.extract(known.net, images)[0]
            return
        inception = frechet.load_inception(config.inception, device)
        images, known = metrics.read_reference(config.reference)
        if known is None:
            known = frechet.moments(frechet.inception_features(inception, images, device)[0])
        self.name, self.moments = "fid", known

        def features(images: Tensor) -> Tensor:
            return inception(to_pixels(images).permute(0, 3, 1, 2).to(device))[0]

        self.features = features

    @torch.no_grad()
    def distance(self, average: DiT) -> float:
        """Every process calls this, and gets the distance of all images."""
        device = "cpu" if self.device.type == "mps" else self.device  # MPS has no float64
        width = len(self.moments[0])
        sums = torch.zeros(width + 1, width, device=device, dtype=torch.float64)
        numbers = torch.arange(self.config.eval_images)[runs.rank() :: runs.world()]
        shape = (self.net.channels, self.net.latent_size, self.net.latent_size)
        for part in numbers.split(EVAL_BATCH):
            draws = [torch.randn(shape, generator=seeded(i)) for i in part.tolist()]
            noise, labels = torch.stack(draws).to(self.device), part.to(self.device)
            x_0 = sample_student(self.config, average, noise, labels % self.net.num_classes)
            with frechet.full_precision():
                features = self.features(self.decode(x_0)).to(device).double()
            sums[0] += features.sum(0)
            sums[1:] += features.T @ features
        sums = runs.total(sums) / self.config.eval_images
        covariance = sums[1:] - torch.outer(sums[0], sums[0])
        covariance *= self.config.eval_images / (self.config.eval_images - 1)
        return frechet.gaussian_distance(sums[0], covariance, *self.moments)


class Monitor:
    """Measures a run and writes stats.jsonl and pictures. Every process calls every method."""

    def __init__(self, run: "Run", teacher: runs.AutocastModel):
        config, self.pairs, self.frechet = run.config, None, None
        self.log = runs.Log(config.out, run.iteration, config.logger, asdict(config))
        if runs.rank() == 0 and config.picture_every:
            self.pairs = PairedEval(config, teacher, run.device)
        if config.eval_every:
            self.frechet = FrechetEval(config, teacher.config, run.device)
        if runs.rank() == 0:  # all that may be wrong with the settings has shown by now
            settings = json.dumps(asdict(config), indent=2) + "\n"
            runs.write_text(runs.join(config.out, "config.json"), settings)
        self.metrics, hidden = Metrics(run.device), runs.rank() > 0 or None
        self.bar = tqdm(total=config.iterations, initial=run.iteration, disable=hidden)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def report(self, run: "Run", last: bool, loss: float, norm: float, by_t: Tensor) -> None:
        """After an iteration: what is due at this one, and all of it at the last."""
        self.metrics.add(loss, norm, by_t)
        self.bar.update()
        c, iteration = run.config, run.iteration
        pictures, frechet = (due(iteration, n, last) for n in (c.picture_every, c.eval_every))
        line = pictures or frechet or due(iteration, c.log_every, last)
        if not self.metrics.losses or not line:
            return
        record = self.metrics.record(run)
        average = run.average() if pictures or frechet else None
        if pictures and self.pairs:
            record["endpoint_rmse"] = self.pairs.compare(average, iteration)
        if frechet:
            record[self.frechet.name] = self.frechet.distance(average)
        self.log(record)
        self.bar.set_postfix(loss=f"{record['loss']:.4f}")
        self.metrics = Metrics(run.device)


def due(iteration: int, every: int, last: bool) -> bool:
    """Whether something is due that happens every so many iterations, 0: never, and at the last."""
    return every > 0 and (last or iteration % every == 0)
