"""Distils a DiT teacher into a student of one or two network evaluations: the paper's main result.

    python -m imagenet.distill                               # tiny: Fashion-MNIST, on a CPU
    torchrun --nproc-per-node 2 -m imagenet.distill          # the same on two cores: faster
    python -m imagenet.distill --nfe 2 --components 32       # any setting can be overridden
    python -m imagenet.distill --preset tiny-dx              # the DX policy
    python -m imagenet.distill --preset gm-repa-1nfe         # ImageNet 256, one GPU
    torchrun --nproc-per-node 8 -m imagenet.distill --preset gm-repa-1nfe        # one node
    torchrun --nnodes 4 --node-rank R --nproc-per-node 8 --master-addr HOST \\
        -m imagenet.distill --preset gm-repa-1nfe --out s3://bucket/run          # several nodes
    torchrun --nproc-per-node 8 -m imagenet.distill --preset gm-repa-2nfe --latents LATENTS

`--preset` names the published runs; `--help` lists every setting. Run the same command again to
continue an interrupted run: it goes on as if nothing had happened. SIGTERM and Ctrl-C finish the
iteration and save; torchrun allows 30 seconds for that. Several nodes need an --out that all of
them see.

**One network evaluation needs no images.** The segment starts at t = 1, in pure noise: labels and
noise are all there is (Algorithms 2 and 3 are the same for nfe = 1). With more evaluations the
student learns from cached latents if there are any (--latents, see imagenet.cache_latents;
Algorithm 2), otherwise from its own trajectories (data-free, Algorithm 3).

A step sees --batch samples, whatever the number of processes and --micro-batch. What is drawn for a
sample depends on the seed, the iteration and the sample's place in the batch alone.

In --out: config.json, stats.jsonl, student.safetensors (the moving average, for
imagenet.sample), checkpoints/, pictures/.
"""

import argparse
import copy
import dataclasses
import json
import math
import time
import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import imagenet.distributed as runs
from common.cli import run_cli
from imagenet import checkpoints
from imagenet.checkpoints import (
    TEACHERS,
    Source,
    init_student_from_teacher,
    load_dit,
    save_dit,
    to_pixels,
)
from imagenet.dit import DiT, DiTConfig, dit_student, guided_teacher
from piflow_minimal import PiIDLoss, Policy, pi_id_loss, sample, segment_of

BINS = 10  # of t, for the loss in stats.jsonl
PAIRS = 10  # noises of the pictures
MOST_SKIPPED = 10  # iterations in a row without a finite gradient before a run gives up


# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------


def setting(default, about: str):
    """A field of `Config` with its help text."""
    return dataclasses.field(default=default, metadata={"help": about})


@dataclass(frozen=True)
class Config:
    """One run. The defaults are what all published ImageNet runs have in common."""

    out: str = setting("outputs", "folder of the run, local or remote (s3://...)")
    teacher: str = setting("repa", "tiny, repa, fm, a file, or owner/repository/path on the Hub")
    num_heads: int = setting(0, "of a teacher whose file does not say; 0: as the file says, or 16")
    time_scale: float = setting(0.0, "the network is told this times t; 0: as the teacher's file")
    guidance: float = setting(3.2, "classifier-free guidance of the teacher; 1 is none")
    guidance_low: float = setting(0.0, "guidance acts from this noise level ...")
    guidance_high: float = setting(0.7, "... to this one")

    policy: str = setting("gmflow", "gmflow or dx")
    components: int = setting(32, "K of a gmflow policy, N of a dx policy")
    nfe: int = setting(1, "segments, one network evaluation each")
    latents: str = setting("", "of imagenet.cache_latents, for nfe > 1; empty: data-free")

    iterations: int = setting(140_000, "optimizer steps")
    batch: int = setting(4096, "samples per step, over all processes")
    micro_batch: int = setting(128, "samples that a process handles at once; 0: its whole share")
    intermediates: int = setting(2, "times per segment at which the teacher is asked")
    substeps: int = setting(128, "of the walking policy, per unit of time")
    solver: str = setting("euler", "of the walking policy: euler, deis, or exact (dx only)")
    window_substeps: int = setting(0, "micro-window for dx: compares mean velocities over it")
    dropout: float = setting(0.05, "of components, while the policy walks (gmflow)")
    time_weight: float = setting(0.0, "weight the squared error at t by t to this power")
    loss_scale: float = setting(3.0, "factor of the loss")

    lr: float = setting(5e-5, "peak learning rate")
    lr_decay: str = setting("none", "after the warm-up: none, or cosine (to zero)")
    warmup: int = setting(400, "iterations of linear warm-up")
    warmup_ratio: float = setting(0.001, "of the peak, where the warm-up begins")
    beta2: float = setting(0.95, "of AdamW; beta1 is 0.9, there is no weight decay")
    optimizer: str = setting("adamw", "adamw, or adamw8bit (needs bitsandbytes and CUDA)")
    clip: float = setting(50.0, "largest gradient norm ...")
    clip_start: int = setting(400, "... from this iteration on")
    ema_start: int = setting(400, "the average follows the weights up to this iteration")
    ema_gamma: float = setting(7.0, "then it decays by (1 - 1/i)^(1 + gamma), i counted from there")

    bf16: bool = setting(True, "bfloat16 autocast around the networks; weights stay float32")
    checkpointing: bool = setting(True, "recompute activations: less memory, a third more time")
    compile: bool = setting(False, "torch.compile both networks")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    seed: int = setting(0, "of everything random")

    log_every: int = setting(50, "iterations between lines of stats.jsonl")
    save_every: int = setting(1000, "iterations between checkpoints")
    keep: int = setting(2, "newest checkpoints to keep")
    picture_every: int = setting(2000, "iterations between pictures of pairs; 0: none")
    teacher_steps: int = setting(64, "Euler steps of the teacher in the pictures")
    logger: str = setting("none", "none, tensorboard or wandb, beside stats.jsonl")

    @property
    def segments(self) -> int:
        """How many segments one training sample walks through."""
        return 1 if self.latents else self.nfe


# What may change when a run is continued; all else decides its numbers.
FREE = {"out", "iterations", "micro_batch", "checkpointing", "compile", "device", "log_every"}
FREE |= {"save_every", "keep", "picture_every", "teacher_steps", "logger"}

TINY = Config(
    teacher="tiny", guidance=2.5, guidance_high=0.8, components=8, iterations=8000, batch=32,
    micro_batch=32, intermediates=1, substeps=16, solver="deis", time_weight=1.0, loss_scale=1.0,
    lr=2e-3, lr_decay="cosine", warmup=100, beta2=0.99, clip=1.0, clip_start=0, ema_start=0,
    bf16=False, checkpointing=False, save_every=500, picture_every=1000,
)  # fmt: skip
TINY_DX = replace(TINY, policy="dx", dropout=0.0, components=10, solver="exact", time_weight=2.0)
DX = Config(policy="dx", dropout=0.0, iterations=40_000)
PRESETS = {
    "tiny": TINY,
    "tiny-2nfe": replace(TINY, nfe=2, iterations=4000),  # two segments cost twice as much
    "tiny-dx": TINY_DX,
    "gm-fm-1nfe": Config(teacher="fm", guidance=2.7, guidance_high=0.6),
    "gm-repa-1nfe": Config(),
    "gm-repa-2nfe": Config(nfe=2, guidance=2.8, iterations=24_000),
    "dx-repa-1nfe-n10": replace(DX, components=10, window_substeps=10),
    "dx-repa-1nfe-n20": replace(DX, components=20, window_substeps=5),
    "dx-repa-1nfe-n40": replace(DX, components=40, window_substeps=3),
}
PRESETS = {name: replace(preset, out=f"outputs/{name}") for name, preset in PRESETS.items()}


def parse(argv: list[str] | None) -> Config:
    """Command line -> Config: a preset, then whatever is overridden."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", default="tiny", help="one of " + ", ".join(PRESETS))
    name = first.parse_known_args(argv)[0].preset
    if name not in PRESETS:
        raise ValueError(f"--preset is {name!r}; choose one of {', '.join(PRESETS)}")
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--preset NAME] [--SETTING VALUE ...]",
        description=__doc__.split("\n")[0],
        parents=[first],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    types = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        kind, boolean = types[field.name], {"action": argparse.BooleanOptionalAction}
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            default=getattr(PRESETS[name], field.name),
            help=field.metadata["help"],
            **(boolean if kind is bool else {"type": kind}),
        )
    options = vars(parser.parse_args(argv))
    del options["preset"]
    config = Config(**options)
    check(config)
    return config


def check(config: Config) -> None:
    """Raises: ValueError that names the setting, what was given and what is accepted."""
    choices = {
        "policy": ("gmflow", "dx"),
        "solver": ("euler", "deis", "exact") if config.policy == "dx" else ("euler", "deis"),
        "lr_decay": ("none", "cosine"),
        "optimizer": ("adamw", "adamw8bit"),
        "logger": ("none", "tensorboard", "wandb"),
    }
    ranges = {"dropout": (0, 0.99), "guidance_low": (0, 1), "guidance_high": (0, 1)}
    ranges |= {"warmup_ratio": (0, 1), "beta2": (0, 1)}
    positive = "components nfe iterations batch intermediates substeps loss_scale lr clip"
    positive += " log_every save_every keep teacher_steps"
    for name, value in asdict(config).items():
        flag = "--" + name.replace("_", "-")
        if name in choices and value not in choices[name]:
            raise ValueError(f"{flag} is {value!r}; choose one of {', '.join(choices[name])}")
        low, high = ranges.get(name, (0, math.inf))
        if isinstance(value, int | float) and not low <= value <= high:
            raise ValueError(f"{flag} is {value}; it must be in {low} .. {high}")
        if name in positive.split() and value <= 0:
            raise ValueError(f"{flag} is {value}; it must be positive")
    if config.dropout and config.policy == "dx":
        raise ValueError(f"--dropout is {config.dropout}; a dx policy has none, it must be 0")
    if config.guidance_low > config.guidance_high:
        raise ValueError(f"--guidance-low is {config.guidance_low}; it must not be above "
                         f"--guidance-high, {config.guidance_high}")  # fmt: skip
    if not config.out.strip("/ "):
        raise ValueError(f"--out is {config.out!r}; it must name a folder")
    if config.latents and config.nfe == 1:
        raise ValueError("--latents is of no use with --nfe 1: the segment starts in pure noise")


# ---------------------------------------------------------------------------------------------
# Randomness: all that one sample needs, from (seed, iteration, place in the batch)
# ---------------------------------------------------------------------------------------------


class Draws(NamedTuple):
    """n samples. S: segments that each walks through, M: intermediates, K: components."""

    labels: Tensor  #   (n,)
    noise: Tensor  #    (n, C, H, W)
    x_0: Tensor  #      (n, C, H, W), of no meaning without cached latents
    tau: Tensor  #      (n,) in (0, 1]
    walk: Tensor  #     (n, S, M) in [0, 1), where on a segment the teacher is asked
    dropped: Tensor  #  (n, S, K) bool, components that do not walk

    def part(self, begin: int, end: int, device: torch.device) -> "Draws":
        return Draws(*(value[begin:end].to(device, non_blocking=True) for value in self))


class Latents:
    """Latents that imagenet.cache_latents wrote, memory-mapped.

    Raises: ValueError if there are none, or if they are not what the network `net` works on.
    """

    def __init__(self, folder: str, net: DiTConfig):
        shards = sorted(Path(folder).glob("latents_*.npy"))
        if not shards:
            raise ValueError(f"--latents {folder}: no latents_*.npy in it")
        self.moments = [np.load(shard, mmap_mode="r") for shard in shards]  #   (n, 2, C, H, W) each
        names = [shard.name.replace("latents", "labels") for shard in shards]
        self.labels = np.concatenate([np.load(Path(folder) / name) for name in names])
        self.ends = np.cumsum([len(shard) for shard in self.moments])
        if len(self.labels) != self.ends[-1]:
            counts = f"{self.ends[-1]} latents, {len(self.labels)} labels"
            raise ValueError(f"--latents {folder}: {counts}")
        expected = (2, net.channels, net.latent_size, net.latent_size)
        for shard, moments in zip(shards, self.moments, strict=True):
            if moments.shape[1:] != expected:
                found = f"--latents: {shard} has images of {moments.shape[1:]}"
                raise ValueError(f"{found}; this teacher needs {expected}")
        if self.labels.max() >= net.num_classes:
            known = f"the teacher knows 0 .. {net.num_classes - 1}"
            raise ValueError(f"--latents {folder} has the label {self.labels.max()}; {known}")

    def draw(self, item: int, generator: torch.Generator) -> tuple[Tensor, int]:
        """A sample (C, H, W) of the VAE's posterior for one image, and its label."""
        shard = int(np.searchsorted(self.ends, item, side="right"))
        mean, std = torch.from_numpy(
            self.moments[shard][item - self.ends[shard]].astype(np.float32)  # counted from its end
        )
        return mean + std * torch.randn(mean.shape, generator=generator), int(self.labels[item])


def draw(
    config: Config, net: DiTConfig, latents: Latents | None, iteration: int, places: range
) -> Draws:
    """What the samples at `places` of the batch need in this iteration, on the CPU."""
    S, M = config.segments, config.intermediates
    K = config.components if config.dropout else 1
    shape = (net.channels, net.latent_size, net.latent_size)
    items = len(latents.labels) if latents else net.num_classes
    generator, rows = torch.Generator(), []
    for place in places:
        number = iteration * config.batch + place  # of the sample, in the whole run
        generator.manual_seed((config.seed * 0x9E3779B1 + number) % 2**32)
        noise = x_0 = torch.randn(shape, generator=generator)
        uniforms = torch.rand(1 + S * (M + K), generator=generator)
        item = torch.randint(items, (), generator=generator)
        if latents:
            x_0, item = latents.draw(int(item), generator)
        rows.append((torch.as_tensor(item), noise, x_0, uniforms))
    labels, noise, x_0, uniforms = (torch.stack(column) for column in zip(*rows, strict=True))
    tau, walk, chance = uniforms.split([1, S * M, S * K], dim=1)
    chance = chance.unflatten(1, (S, K))
    dropped = (chance < config.dropout) & (chance < chance.amax(2, keepdim=True))  # never all
    return Draws(labels, noise, x_0, 1 - tau[:, 0], walk.unflatten(1, (S, M)), dropped)


# ---------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------


class WithDropout(NamedTuple):
    """A policy whose detached copy, the one that walks, lacks some components."""

    policy: Policy
    dropped: Tensor  # (B, K) bool

    x_src = property(lambda self: self.policy.x_src)
    t_src = property(lambda self: self.policy.t_src)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        return self.policy.velocity(x, t)

    def detach(self) -> Policy:
        return self.policy.detach().drop(self.dropped)


def segment_losses(
    config: Config, student: runs.Runner, teacher: runs.Runner, draws: Draws, sync: bool = True
) -> Iterator[PiIDLoss]:
    """pi-ID on one random segment of every sample (Algorithm 2), or on all in turn (Algorithm 3).

    sync: whether DistributedDataParallel may add up gradients, at the last of the losses.
    """
    size = 1 / config.nfe  # of a segment
    policy_at = dit_student(student, draws.labels, segment_size=size)
    interval = (config.guidance_low, config.guidance_high)
    velocity = guided_teacher(teacher, draws.labels, config.guidance, interval)
    x_src, tau_src = draws.noise, torch.ones_like(draws.tau)
    if config.latents:
        tau_src, _ = segment_of(draws.tau, config.nfe)
        x_src = torch.lerp(draws.x_0, draws.noise, tau_src[:, None, None, None])
    for s in range(config.segments):
        student.sync = sync and s == config.segments - 1
        policy = policy_at(x_src, tau_src)
        if config.dropout:
            policy = WithDropout(policy, draws.dropped[:, s])
        out = pi_id_loss(
            policy, velocity, tau_src, size,
            total_substeps=config.substeps, solver=config.solver,
            num_intermediates=config.intermediates, window_substeps=config.window_substeps,
            uniforms=(draws.walk[:, s], draws.walk[:, s, 1:]),  # the second: teacher steps, unused
        )  # fmt: skip
        yield out
        x_src, tau_src = out.x_dst, (tau_src - size).clamp(min=0)


def backward(
    config: Config, student: runs.Runner, teacher: runs.Runner, draws: Draws, world: int = 1
) -> tuple[Tensor, Tensor]:
    """Sums the gradient of this process's samples, micro-batch by micro-batch.

    Returns: their part of the loss, and (2, BINS) squared errors by t, summed, and their number.
    """
    device, n = next(student.net.parameters()).device, len(draws.labels)
    part = config.micro_batch or n
    loss, by_t = torch.zeros((), device=device), torch.zeros(2, BINS, device=device)
    for begin in range(0, n, part):
        piece = draws.part(begin, begin + part, device)
        for out in segment_losses(config, student, teacher, piece, begin + part >= n):
            square = (out.u_policy - out.u_teacher).square().flatten(1).mean(1)  #     (M n,)
            weighted = (square * out.t**config.time_weight).sum()
            share = weighted / (config.batch * config.intermediates * config.segments)
            # DistributedDataParallel averages over processes; this makes it a sum.
            (config.loss_scale * world * share).backward()
            loss += share.detach()
            bins = (out.t * BINS).long().clamp(max=BINS - 1)
            by_t[0].index_add_(0, bins, square.detach())
            by_t[1].index_add_(0, bins, torch.ones_like(square))
    return loss, by_t


# ---------------------------------------------------------------------------------------------
# The run: what is trained, how it is kept
# ---------------------------------------------------------------------------------------------


def learning_rate(config: Config, iteration: int) -> float:
    """Linear warm-up, then constant or a cosine to zero. Iterations count from 0."""
    if iteration < config.warmup:
        ratio = config.warmup_ratio
        return config.lr * (ratio + (1 - ratio) * iteration / config.warmup)
    if config.lr_decay == "none":
        return config.lr
    done = (iteration - config.warmup) / max(1, config.iterations - config.warmup)
    return config.lr * (1 + math.cos(math.pi * done)) / 2


def ema_decay(config: Config, steps: int) -> float:
    """Share of the old average that stays after `steps` optimizer steps: 0 copies the weights."""
    i = steps - config.ema_start
    return (1 - 1 / i) ** (1 + config.ema_gamma) if i > 0 else 0.0


def make_optimizer(config: Config, net: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """AdamW, fused on CUDA, or 8-bit. Raises: ImportError without bitsandbytes."""
    options = {"lr": config.lr, "betas": (0.9, config.beta2), "weight_decay": 0.0}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(net.parameters(), fused=device.type == "cuda", **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError("--optimizer adamw8bit needs: pip install bitsandbytes") from error
    return AdamW8bit(net.parameters(), **options)


class Run:
    """Student, its moving average and the optimizer, and how far they have come."""

    def __init__(self, config: Config, teacher: DiT, device: torch.device):
        torch.manual_seed(config.seed)
        generator = torch.Generator().manual_seed(config.seed)
        self.config, self.iteration, self.skipped, self.seconds = config, 0, 0, 0.0
        self.student = init_student_from_teacher(
            teacher, config.policy, config.components, generator=generator
        ).to(device)
        self.student.requires_grad_(True).train()
        self.student.checkpointing = config.checkpointing
        self.ema = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.optimizer = make_optimizer(config, self.student, device)
        self.folder = runs.join(config.out, "checkpoints")

    @torch.no_grad()
    def step(self) -> None:
        """One optimizer step, and one of the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.iteration)
        self.optimizer.step()
        decay = ema_decay(self.config, self.iteration + 1)
        averaged, weights = list(self.ema.parameters()), list(self.student.parameters())
        torch._foreach_lerp_(averaged, weights, 1 - decay)

    def save(self) -> None:
        """Writes the student and a checkpoint, then deletes the oldest checkpoints.

        In this order: a run that is killed in between writes the same student again.
        """
        with runs.writing(runs.join(self.config.out, "student.safetensors")) as temporary:
            save_dit(self.ema, temporary)
        counts = {name: getattr(self, name) for name in ("iteration", "skipped", "seconds")}
        parts = {name: getattr(self, name).state_dict() for name in ("student", "ema", "optimizer")}
        with runs.writing(runs.join(self.folder, f"step_{self.iteration:08d}.pt")) as temporary:
            torch.save(counts | parts, temporary)
        for name in runs.list_files(self.folder, "step_")[: -self.config.keep]:
            runs.remove(runs.join(self.folder, name))

    def restore(self, rank: int) -> None:
        """Continues from the newest whole checkpoint, if there is one.

        Raises: FileNotFoundError if rank 0 has a checkpoint that this process does not see.
        """
        state, out = None, self.config.out
        if rank == 0:
            for folder in (self.folder, out, runs.join(out, "pictures")):
                runs.remove_leftovers(folder)
            state = self.newest()
        name = runs.from_first(state and state["name"])
        if name is None:
            return
        try:
            state = state or runs.read_checkpoint(runs.join(self.folder, name))
        except FileNotFoundError as error:
            reason = f"rank {rank} does not see {name}; all nodes must see the same folder"
            raise FileNotFoundError(f"--out {out}: {reason}") from error
        for part in ("student", "ema", "optimizer"):
            getattr(self, part).load_state_dict(state[part])
        self.iteration, self.skipped = state["iteration"], state["skipped"]
        self.seconds = state["seconds"]

    def give_up(self, bad: int, rank: int) -> None:
        """Raises: ValueError, after `bad` iterations in a row without a step; saves what was."""
        self.iteration -= bad
        if rank == 0:
            self.save()
        raise ValueError(
            f"loss or gradient was not finite in {bad} iterations in a row; the weights from "
            f"before, iteration {self.iteration}, are saved; try a lower --lr than "
            f"{self.config.lr} in another --out"
        )

    def newest(self) -> dict | None:
        """The newest checkpoint that can be read; the damaged ones above it are named."""
        for name in reversed(runs.list_files(self.folder, "step_")):
            try:
                return runs.read_checkpoint(runs.join(self.folder, name)) | {"name": name}
            except ValueError as error:
                reason = " ".join(str(error).split())[:100]
                print(f"skipping the damaged checkpoint {name}: {reason}")
        return None


# ---------------------------------------------------------------------------------------------
# Logs and pictures
# ---------------------------------------------------------------------------------------------


class Recent:
    """Losses since the last line of stats.jsonl."""

    def __init__(self, device: torch.device):
        self.losses, self.norm, self.began = [], 0.0, time.monotonic()
        self.by_t = torch.zeros(2, BINS, device=device)

    def add(self, loss: float, norm: float, by_t: Tensor) -> None:
        self.losses.append(loss)
        self.norm = norm
        self.by_t += by_t

    def record(self, run: Run, device: torch.device) -> dict:
        """One line of stats.jsonl. Every process has to call this."""
        squares, counts = runs.total(self.by_t)
        elapsed = time.monotonic() - self.began
        return {
            "iteration": run.iteration,
            "loss": sum(self.losses) / len(self.losses),
            "loss_by_t": [round(value, 6) for value in (squares / counts.clamp(min=1)).tolist()],
            "grad_norm": self.norm,
            "lr": learning_rate(run.config, run.iteration - 1),
            "images_per_s": run.config.batch * len(self.losses) / elapsed,
            "memory_gib": runs.memory_gib(device),
            "seconds": run.seconds,
            "skipped": run.skipped,
        }


class Pairs:
    """Fixed noises, and where the teacher takes them in many steps: the student should follow."""

    def __init__(self, config: Config, teacher: runs.Runner, device: torch.device):
        net, self.config = teacher.config, config
        generator = torch.Generator().manual_seed(config.seed)
        shape = (PAIRS, net.channels, net.latent_size, net.latent_size)
        self.noise = torch.randn(shape, generator=generator).to(device)
        self.labels = (torch.arange(PAIRS) * net.num_classes // PAIRS).to(device)
        interval = (config.guidance_low, config.guidance_high)
        velocity = guided_teacher(teacher, self.labels, config.guidance, interval)
        self.target = runs.follow_teacher(velocity, self.noise, config.teacher_steps)
        self.decode = checkpoints.load_decoder(net, device)
        self.images = to_pixels(self.decode(self.target))

    def compare(self, ema: DiT, iteration: int) -> float:
        """Draws the pairs. -> root mean square of the endpoint error, in latents."""
        config = self.config
        net = runs.Runner(ema, ema.config, config.bf16)
        student = dit_student(net, self.labels, 1 / config.nfe)
        steps = {"total_substeps": config.substeps, "solver": config.solver}
        x_0 = sample(student, self.noise, config.nfe, **steps)
        rows = {f"teacher, {config.teacher_steps} steps": self.images}
        rows[f"student, nfe {config.nfe}"] = to_pixels(self.decode(x_0))
        path = runs.join(config.out, "pictures", f"step_{iteration:08d}.png")
        runs.draw_rows(path, rows, f"the same noise, iteration {iteration}")
        return (x_0 - self.target).square().mean().sqrt().item()


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def prepare(
    config: Config, rank: int, world: int, device: torch.device
) -> tuple[Run, runs.Runner, runs.Runner, Latents | None]:
    """-> the run, as far as it has come; student and teacher; cached latents."""
    decisive = {name: value for name, value in asdict(config).items() if name not in FREE}
    runs.check_same(runs.join(config.out, "config.json"), decisive)
    source = TEACHERS.get(config.teacher, Source(config.teacher))
    time_scale = config.time_scale or source.time_scale
    net = load_dit(source.path, config.num_heads or None, time_scale, device=device)
    net.requires_grad_(False)
    latents = Latents(config.latents, net.config) if config.latents else None
    run = Run(config, net, device)
    run.restore(rank)
    if config.compile:
        net.compile()
        run.student.compile()
    teacher = runs.Runner(net, net.config, config.bf16)
    student = runs.Runner(run.student, run.student.config, config.bf16)
    if world > 1:
        devices = [device] if device.type == "cuda" else None
        student.net = DistributedDataParallel(run.student, devices)
    return run, student, teacher, latents


def train(config: Config, rank: int, world: int, device: torch.device) -> Run:
    """The training loop. Every process runs it; rank 0 writes."""
    run, student, teacher, latents = prepare(config, rank, world, device)
    log = runs.Log(config.out, run.iteration, config.logger, asdict(config)) if rank == 0 else None
    pairs = Pairs(config, teacher, device) if rank == 0 and config.picture_every else None
    if rank == 0:  # all that may be wrong with the settings has shown by now
        settings = json.dumps(asdict(config), indent=2) + "\n"
        runs.write_text(runs.join(config.out, "config.json"), settings)
    weights, recent, bad = list(run.student.parameters()), Recent(device), 0
    places = range(rank * config.batch // world, (rank + 1) * config.batch // world)
    draws = draw(config, run.student.config, latents, run.iteration, places)
    bar = tqdm(total=config.iterations, initial=run.iteration, disable=rank > 0 or None)
    start = time.monotonic() - run.seconds

    def last() -> bool:
        return run.iteration == config.iterations or stop.agreed

    def due(every: int) -> bool:
        return last() or every > 0 and run.iteration % every == 0

    with runs.Stop() as stop, bar:
        while run.iteration < config.iterations and not stop.agreed:
            run.optimizer.zero_grad()
            loss, by_t = backward(config, student, teacher, draws, world)
            limit = config.clip if run.iteration >= config.clip_start else math.inf
            norm = nn.utils.clip_grad_norm_(weights, limit)
            draws = draw(config, run.student.config, latents, run.iteration + 1, places)

            # The only moment at which a process waits for its device and for the others.
            asked = torch.full_like(loss, float(stop.requested))
            loss, norm, asked = runs.total(torch.stack([loss, norm / world, asked])).tolist()
            stop.agreed = asked > 0
            if math.isfinite(loss + norm):
                run.step()
                recent.add(loss, norm, by_t)
                bad = 0
            else:
                run.skipped, bad = run.skipped + 1, bad + 1
            run.iteration += 1
            run.seconds = time.monotonic() - start
            bar.update()
            if recent.losses and (due(config.log_every) or due(config.picture_every)):
                record = recent.record(run, device)
                if pairs and due(config.picture_every):
                    record["endpoint_rmse"] = pairs.compare(run.ema, run.iteration)
                if rank == 0:
                    log(record)
                    bar.set_postfix(loss=f"{record['loss']:.4f}")
                recent = Recent(device)
            if due(config.save_every) and rank == 0 and (not bad or last()):
                run.save()
            if bad == MOST_SKIPPED:
                run.give_up(bad, rank)
    return run


def main(argv: list[str] | None = None) -> None:
    """Trains, or continues, the run that the command line describes."""
    config = parse(argv)
    with runs.processes(config.device) as (rank, world, device):
        if config.batch < world:
            raise ValueError(f"--batch is {config.batch}; {world} processes need at least {world}")
        run = train(config, rank, world, device)
    if rank == 0:
        done = run.iteration == config.iterations
        print(f"iteration {run.iteration} of {config.iterations}, {run.seconds:.0f} s; "
              + (f"the student is {runs.join(config.out, 'student.safetensors')}" if done
                 else "stopped; run the same command again to continue"))  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
