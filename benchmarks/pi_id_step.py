"""Where the time of one pi-ID training step goes: teacher, student, rollout, policy gradient.

    python -m benchmarks.pi_id_step                 # a minute and a half of one CPU core
    python -m benchmarks.pi_id_step --device cuda --batch 32

Two networks with random weights: the tiny DiT of assets/ with the settings of the preset `tiny`,
and two of the 28 layers of DiT-XL/2 with the published settings (K = 32, Euler, 128 substeps). With
all 28 layers the share of the networks is larger still.
"""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.timing import clock, peak_memory, print_table
from common.cli import DEVICE_HELP, keep_freed_memory, parse, pick_device, run_cli, setting
from imagenet import distill
from imagenet.checkpoints import init_student_from_teacher
from imagenet.dit import PRESETS, DiT, dit_student, guided_teacher
from piflow_minimal import Policy, pi_id_loss


@dataclasses.dataclass(frozen=True)
class Settings:
    """Flags of the benchmark."""

    device: str = setting("auto", DEVICE_HELP)
    batch: int = setting(4, "batch of the XL/2 case; tiny has 32", low=1)
    rounds: int = setting(5, "steps of which the median is taken", low=1)


PARTS = ("teacher", "student forward", "student backward", "rollout", "policy gradient", "adam")


class Clock:
    """Seconds per part of a step; waits for the device at every boundary."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, defaultdict(float)

    @contextmanager
    def __call__(self, part: str, within: str | None = None) -> Iterator[None]:
        """Counts the block for `part`, and not for the part `within` which it stands."""
        start = clock(self.device)
        yield
        seconds = clock(self.device) - start
        self.seconds[part] += seconds
        if within:
            self.seconds[within] -= seconds


class Timed(NamedTuple):
    """A policy whose velocities with gradient are timed; its detached copy is the plain policy."""

    policy: Policy
    clock: Clock

    x_src = property(lambda self: self.policy.x_src)
    t_src = property(lambda self: self.policy.t_src)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        with self.clock("policy gradient", within="rollout"):
            return self.policy.velocity(x, t)

    def detach(self) -> Policy:
        return self.policy.detach()


class Case(NamedTuple):
    """One training step, ready to be taken."""

    teacher: DiT
    student: DiT
    adam: torch.optim.Optimizer
    batch: int
    options: dict  # of pi_id_loss


def make(depth: int, components: int, batch: int, options: dict, device: torch.device) -> Case:
    """depth 0: the tiny network, else so many layers of XL/2; random weights."""
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["xl2"], depth=depth) if depth else PRESETS["tiny"]
    teacher = DiT(config).to(device).requires_grad_(False)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    student = init_student_from_teacher(teacher, "gmflow", components).requires_grad_(True)
    adam = torch.optim.AdamW(student.parameters(), fused=device.type == "cuda")
    return Case(teacher, student, adam, batch, options)


def step(case: Case, device: torch.device, clock: Clock) -> None:
    """What imagenet.distill does for one micro-batch, in parts."""
    config = case.teacher.config
    noise = torch.randn(case.batch, config.channels, config.latent_size, config.latent_size)
    labels = torch.arange(case.batch, device=device) % config.num_classes
    t_src, noise = torch.ones(case.batch, device=device), noise.to(device)
    guided = guided_teacher(case.teacher, labels, 2.5, (0.0, 0.8))

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        with clock("teacher", within="rollout"):
            return guided(x, t)

    with clock("student forward"):
        policy = dit_student(case.student, labels)(noise, t_src)
    with clock("rollout"):  # what is left of pi_id_loss without its inner parts
        loss = pi_id_loss(Timed(policy, clock), teacher, 1.0, 1.0, **case.options).loss
    outputs = list(policy.mixture)
    with clock("policy gradient"):
        gradients = torch.autograd.grad(loss, outputs)
    with clock("student backward"):
        case.adam.zero_grad()
        torch.autograd.backward(outputs, gradients)
    with clock("adam"):
        case.adam.step()


def measure(case: Case, device: torch.device, rounds: int) -> tuple[dict[str, float], float]:
    """Median seconds of every part after a warm-up, and the peak memory of a step in MiB."""
    found = []
    for _ in range(rounds + 1):
        clock = Clock(device)
        step(case, device, clock)
        found.append(clock.seconds)
    seconds = {part: statistics.median(one[part] for one in found[1:]) for part in PARTS}
    return seconds, peak_memory(device, lambda: step(case, device, Clock(device)))


def main(argv: list[str] | None = None) -> None:
    """Prints the shares of a step."""
    settings = parse(Settings, __doc__, argv)
    device = pick_device(settings.device)
    keep_freed_memory()
    tiny, euler = distill.PRESETS["tiny"], {"total_substeps": 128}
    own = {name: getattr(tiny, name) for name in ("total_substeps", "solver", "num_intermediates")}
    k, batch = tiny.components, tiny.batch
    cases = {
        f"tiny, K = {k}, {tiny.solver}, {tiny.total_substeps}": make(0, k, batch, own, device),
        f"tiny, K = {k}, euler, 128": make(0, k, batch, euler, device),
        "2 layers of XL/2, K = 32, euler, 128": make(2, 32, settings.batch, euler, device),
    }
    rows = []
    for name, case in cases.items():
        seconds, memory = measure(case, device, settings.rounds)
        whole = sum(seconds.values())
        shares = [f"{100 * seconds[part] / whole:.1f}%" for part in PARTS]
        size = f"{1000 * whole:.0f} ms", f"{memory:.0f} MiB"
        rows.append([f"{name}, batch {case.batch}", *size, *shares])
    print_table(["", "step", "peak", *PARTS], rows)


if __name__ == "__main__":
    run_cli(main)
