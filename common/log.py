"""What a run writes down while it trains: stats.jsonl, TensorBoard or wandb.

`s` is a TrainSettings of common/train.py, `state` its State. A line of stats.jsonl is a JSON object
with means since the line before.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from common.files import join, read_text, write_text
from common.processes import rank, total
from piflow_minimal import PiIDLoss

BINS = 10  # of t, for the loss in stats.jsonl


class Log:
    """The log of a run that starts, or continues, at `iteration`; rank 0 writes."""

    def __init__(self, s: Any, iteration: int, device: torch.device):
        self.s, self.device, self.path = s, device, join(s.out, "stats.jsonl")
        self.clear()
        if rank() == 0:
            before = (read_text(self.path) or "").splitlines()
            self.lines = [line for line in before if json.loads(line)["iteration"] <= iteration]
            self.send = open_logger(s, iteration) if s.logger else None

    def clear(self) -> None:
        self.losses, self.norm, self.began = [], 0.0, time.monotonic()
        self.by_t = torch.zeros(2, BINS, device=self.device)  # squared errors by t, their number

    @torch.no_grad()
    def count(self, out: PiIDLoss) -> None:
        """Adds the squared errors of a loss to those of their bin of t; no synchronisation."""
        square = (out.u_policy - out.u_teacher).float().square().flatten(1).mean(1)
        square = torch.where(square.isfinite(), square, 0)
        bins = (out.t * BINS).long().clamp(max=BINS - 1)
        self.by_t[0].index_add_(0, bins, square)
        self.by_t[1].index_add_(0, bins, torch.ones_like(square))

    def add(self, loss: float, norm: float) -> None:
        self.losses.append(loss)
        self.norm = norm

    def write(self, state: Any, found: dict[str, float]) -> None:
        """One line of means since the last one. Every process calls this."""
        squares, counts = total(self.by_t)
        record = {
            "iteration": state.iteration,
            "loss": sum(self.losses) / len(self.losses) if self.losses else None,
            "loss_by_t": [round(value, 6) for value in (squares / counts.clamp(min=1)).tolist()],
            "grad_norm": self.norm,
            "lr": state.optimizer.param_groups[0]["lr"],
            "images_per_s": self.s.batch * len(self.losses) / (time.monotonic() - self.began),
            "memory_gib": memory_gib(self.device),
            "seconds": state.seconds,
            "skipped": state.skipped,
        } | found
        self.clear()
        if rank() == 0:
            self.lines.append(json.dumps(record))
            write_text(self.path, "\n".join(self.lines) + "\n")
        if rank() == 0 and self.send:
            scalars = {name: x for name, x in record.items() if isinstance(x, int | float)}
            self.send(scalars, state.iteration)


def open_logger(s: Any, iteration: int) -> Callable[[dict, int], None]:
    """-> send(scalars, iteration) to TensorBoard or wandb; it continues the run in s.out."""
    if s.logger == "wandb":
        import wandb

        path = join(s.out, "wandb_id.txt")
        known = read_text(path)
        options = {"name": s.out, "config": as_json(s), "id": known, "resume": "allow"}
        run = wandb.init(project="piflow", **options)
        if not known:
            write_text(path, run.id)
        return run.log
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(join(s.out, "tensorboard"), purge_step=iteration + 1)

    def send(scalars: dict, iteration: int) -> None:
        for key, value in scalars.items():
            writer.add_scalar(key, value, iteration)
        writer.flush()

    return send


def as_json(s: Any) -> dict:
    """Settings as JSON stores them: tuples are lists, paths are strings."""
    return json.loads(json.dumps(dataclasses.asdict(s), default=str))


def memory_gib(device: torch.device) -> float:
    """Peak memory of a GPU so far; 0 on another device."""
    if device.type != "cuda":
        return 0.0
    return torch.cuda.max_memory_allocated(device) / 2**30
