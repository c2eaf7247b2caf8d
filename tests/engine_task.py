"""A small task for common/train.py: points of R^3, teacher in closed form, one frozen layer.

    python -m engine_task --out OUT --iterations 6 --batch 6     (tests/ is on the path)
"""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from common.cli import parse, run_cli
from common.files import join, writing
from common.train import TrainSettings, processes, train
from piflow_minimal import DXPolicy, pi_id_data_free, sample

SMALL = TrainSettings(
    iterations=6, batch=6, micro_batch=2, lr=1e-2, warmup=2, clip_start=2, ema_start=1, log_every=2,
    save_every=2, eval_every=0, device="cpu",
)  # fmt: skip


def teacher(x: Tensor, t: Tensor) -> Tensor:
    """Data: N(0, 0.25). u = E[eps - x_0 | x]."""
    t = t[:, None]
    alpha = 1 - t
    return (t - 0.25 * alpha) / (0.25 * alpha**2 + t**2) * x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(4, 16).requires_grad_(False)
        self.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.frozen(torch.cat([x, t[:, None]], 1)).relu()
        for block in self.blocks:
            h = h + self.dropout(block(h).relu())
        return self.head(h).view(-1, 2, 3)


class Task:
    """`slow`: seconds that an iteration takes, so that a test can kill it in between."""

    slow = 0.0

    def __init__(self, s: TrainSettings):
        torch.manual_seed(s.seed)
        self.s, self.net = s, Net()
        self.seen = []

    def student(self, net):
        return lambda x, t: DXPolicy(net(x, t), x, t, 0.5)

    def losses(self, net, iteration, rows):
        time.sleep(self.slow)
        self.seen.append((iteration, rows))
        noise = torch.randn(len(rows), 3)
        yield from pi_id_data_free(self.student(net), teacher, noise, 2, total_substeps=8)

    def evaluate(self, net, iteration):
        noise = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        x_0 = sample(self.student(net), noise, 2, total_substeps=8)
        return {"rmse": (x_0 - noise / 2).square().mean().sqrt().item()}

    def export(self, state, folder):
        with writing(join(folder, "student.pt")) as temporary:
            torch.save(state, temporary)

    def describe(self):
        return {"points": 2}

    def shard(self, net):
        from torch.distributed.fsdp import fully_shard

        for block in net.blocks:
            fully_shard(block)
        fully_shard(net)


def settings(**changes) -> TrainSettings:
    return replace(SMALL, **changes)


def flags(**changes) -> list[str]:
    """A command line of the settings."""
    argv = []
    for name, value in changes.items():
        flag = "--" + name.replace("_", "-")
        argv += [flag] * value if isinstance(value, bool) else [flag, str(value)]
    return argv


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if "--slow" in argv:
        argv.remove("--slow")
        Task.slow = 0.02
    s = parse(TrainSettings, __doc__, argv, {"small": SMALL})
    with processes(s.device) as place:
        train(s, Task(s), place)


def killed_while_saving(argv: list[str]) -> None:
    """The same; half a checkpoint is its last act."""

    def save(state: dict, path: Path) -> None:
        path.write_bytes(b"PK half of a checkpoint")
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save
    Task.export = lambda *_: None
    main(argv)


if __name__ == "__main__":
    run_cli(main)
