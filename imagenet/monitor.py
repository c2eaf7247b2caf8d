"""What is measured while a student trains: loss by noise level, pictures of pairs."""

import json
import math
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

import imagenet.distributed as runs
from common.plots import image_rows
from common.teachers import endpoint_rmse, integrate_teacher
from imagenet.checkpoints import load_decoder, to_pixels
from imagenet.dit import DiT, dit_student, guided_teacher
from piflow_minimal import sample

if TYPE_CHECKING:
    from imagenet.distill import Run, Settings

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
    """x_0 (B, C, H, W) by config.nfe evaluations, the policy rolled out as in training."""
    student = dit_student(runs.AutocastModel(net, net.config, config.bf16), labels, 1 / config.nfe)
    rollout = {"total_substeps": config.total_substeps, "solver": config.solver}
    return sample(student, noise, config.nfe, **rollout)


class Monitor:
    """Measures a run and writes stats.jsonl and pictures. Every process calls every method."""

    def __init__(self, run: "Run", teacher: runs.AutocastModel):
        config, self.pairs = run.config, None
        self.log = runs.Log(config.out, run.iteration, config.logger, asdict(config))
        if runs.rank() == 0 and config.picture_every:
            runs.remove_leftovers(runs.join(config.out, "pictures"))
            self.pairs = PairedEval(config, teacher, run.device)
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
        pictures = due(run.iteration, run.config.picture_every, last)
        if not self.metrics.losses or not (
            pictures or due(run.iteration, run.config.log_every, last)
        ):
            return
        record = self.metrics.record(run)
        if pictures:
            average = run.average()
            if self.pairs:
                record["endpoint_rmse"] = self.pairs.compare(average, run.iteration)
        self.log(record)
        self.bar.set_postfix(loss=f"{record['loss']:.4f}")
        self.metrics = Metrics(run.device)


def due(iteration: int, every: int, last: bool) -> bool:
    """Whether something is due that happens every so many iterations, 0: never, and at the last."""
    return every > 0 and (last or iteration % every == 0)
