"""Will a distillation run here, and for how long? Two iterations with random weights, in seconds.

    python -m imagenet.smoke                                       # gm-repa-1nfe on this device
    python -m imagenet.smoke --preset gm-repa-2nfe --no-compile    # the flags of imagenet.distill
    torchrun --nproc-per-node 8 -m imagenet.smoke                  # all GPUs of a node

On a GPU: DiT-XL/2, one micro-batch per iteration and process, at the settings of the preset. On a
CPU: the tiny network, to see the program run; its times say nothing about a GPU. Nothing is
downloaded or written. Prints milliseconds of each phase, memory, images per second, and what they
mean for each preset by arithmetic: micro-batches times their time, plus draws, optimizer and
communication once per step.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

import imagenet.distributed as runs
from common.cli import compiled_policies, run_cli
from imagenet.distill import (
    PRESETS,
    Run,
    Settings,
    fit_micro_batch,
    models,
    places_of,
    read_settings,
    segment_losses,
)
from imagenet.dit import PRESETS as NETWORKS
from imagenet.dit import DiT
from imagenet.draws import Draws, draw

PHASES = ("draw", "teacher", "student forward", "rollout", "backward")  # per micro-batch
ONCE = ("optimizer", "communication")  # per step
ITERATIONS = 2  # measured; one more before them warms up and compiles


class Clock:
    """Seconds of each phase, with the device synchronised around it; inner phases do not count."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.inner = device, defaultdict(float), [0.0]

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = self.now()
        self.inner.append(0.0)
        yield
        elapsed = self.now() - began
        self.seconds[phase] += elapsed - self.inner.pop()
        self.inner[-1] += elapsed


class TimedModel(runs.AutocastModel):
    """A network whose calls are a phase."""

    def __init__(self, model: runs.AutocastModel, clock: Clock, phase: str):
        super().__init__(model.net, model.config, model.bf16)
        self.clock, self.phase = clock, phase

    def __call__(self, *inputs):
        with self.clock(self.phase):
            return super().__call__(*inputs)


def random_teacher(config: Settings, device: torch.device) -> DiT:
    """XL/2, or the tiny network, with random weights that let everything through."""
    with torch.device(device):
        net = DiT(NETWORKS["tiny" if config.teacher == "tiny" else "xl2"])
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.02)
    return net.eval().requires_grad_(False)


def iteration(
    config: Settings, run: Run, student: TimedModel, teacher: TimedModel, draws: Draws, clock: Clock
) -> None:
    """What imagenet.distill does with one micro-batch, and an optimizer step."""
    run.optimizer.zero_grad()
    losses = segment_losses(config, student, teacher, draws.part(0, len(draws.labels), run.device))
    for _ in range(config.segments):
        with clock("rollout"):  # what is left of pi_id_loss without the networks
            out = next(losses)
        with clock("backward"):
            out.loss.backward()
    with clock("optimizer"):
        run.clip_gradients()
        run.step(finite=True)


def measure(config: Settings, place: runs.Place) -> tuple[dict[str, float], Settings, Run]:
    """-> seconds of each phase of an iteration with one micro-batch per process."""
    clock, net = Clock(place.device), random_teacher(config, place.device)
    run = Run(config, net, place.device)
    student, teacher = models(run, net, place)
    places, pin = places_of(config, place), place.device.type == "cuda"
    draws = draw(config, net.config, None, 0, places, pin)
    config = fit_micro_batch(config, run, student, teacher, draws, place.world)
    size = len(places)
    if config.micro_batch != "auto":
        size = min(int(config.micro_batch), size)
    student = TimedModel(student, clock, "student forward")
    teacher = TimedModel(teacher, clock, "teacher")
    with compiled_policies(run.compile):
        for i in range(1 + ITERATIONS):
            if i == 1:
                clock.seconds.clear()
            with clock("draw"):
                draws = draw(config, net.config, None, i, places[:size], pin)
            iteration(config, run, student, teacher, draws, clock)
    gradient = torch.zeros(sum(p.numel() for p in run.student.parameters()), device=place.device)
    runs.total(gradient)
    with clock("communication"):  # an all-reduce of the gradient, alone
        for _ in range(ITERATIONS):
            runs.total(gradient)
    seconds = {phase: clock.seconds[phase] / ITERATIONS for phase in (*PHASES, *ONCE)}
    return seconds, replace(config, micro_batch=str(size)), run


def step_seconds(seconds: dict[str, float], size: int, config: Settings, world: int) -> float:
    """Of a whole batch: the worker thread draws meanwhile, so that the slower of both counts."""
    share = config.batch / world * config.segments
    device = sum(seconds[phase] for phase in PHASES[1:]) * share / size
    return max(device + sum(seconds[phase] for phase in ONCE), seconds["draw"] * share / size)


def report(config: Settings, run: Run, seconds: dict[str, float], world: int) -> None:
    """Prints the tables."""
    size, device = int(config.micro_batch), run.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    tiny = run.student.config.latent_size != NETWORKS["xl2"].latent_size
    compiled = "on" if run.compile else "off, or does not work here (a warning above)"
    print(f"{world} x {name}, torch {torch.__version__}, {'tiny network' if tiny else 'DiT-XL/2'}, "
          f"{config.policy} {config.components}, nfe {config.nfe}, micro-batch {size}")  # fmt: skip
    print(f"torch.compile: {compiled}")
    print(f"peak memory: {runs.memory_gib(device):.1f} GiB per process")
    print(f"\n{'phase':18s} {'ms':>9s}")
    for phase, value in seconds.items():
        print(f"{phase:18s} {1e3 * value:9.1f}")
    per_sample = sum(seconds[phase] for phase in PHASES[1:]) / (size * config.segments)
    print(f"\nimages per second, all processes: {world / per_sample:.1f} of one segment")
    print(f"\n{'preset':18s} {'s/step':>9s} {'iterations':>11s} {'hours':>9s}")
    for preset, other in PRESETS.items():
        if (other.teacher == "tiny") != tiny:
            continue  # another network
        scaled = {phase: value / config.segments for phase, value in seconds.items()}
        scaled |= {phase: seconds[phase] for phase in ONCE}
        step = step_seconds(scaled, size, other, world)
        hours = step * other.iterations / 3600
        print(f"{preset:18s} {step:9.2f} {other.iterations:11d} {hours:9.1f}")
    print(f"The rollout of all of them is counted as that of {config.policy} {config.components}.")


def main(argv: list[str] | None = None) -> None:
    """Measures and prints; see the top of the file."""
    config = read_settings(argv, __doc__, "gm-repa-1nfe")
    with runs.processes(config.device) as place:
        if place.device.type != "cuda" and config.teacher != "tiny":
            if place.rank == 0:
                print(f"No GPU: this is the tiny network on {place.device.type}, not XL/2.")
            tiny = "tiny-dx" if config.policy == "dx" else "tiny-2nfe" if config.nfe > 1 else "tiny"
            kept = {"compile": config.compile, "shard": config.shard, "seed": config.seed}
            config = replace(PRESETS[tiny], device=config.device, **kept)
        config = replace(config, latents="")
        seconds, config, run = measure(config, place)
        if place.rank == 0:
            report(config, run, seconds, place.world)


if __name__ == "__main__":
    run_cli(main)
