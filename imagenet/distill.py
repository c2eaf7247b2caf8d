"""Distils a DiT teacher into a student of one or two network evaluations: the paper's main result.

    python -m imagenet.distill                               # tiny: Fashion-MNIST, on a CPU
    torchrun --nproc-per-node 2 -m imagenet.distill          # the same on two cores: faster
    python -m imagenet.distill --nfe 2 --components 32       # any setting can be overridden
    python -m imagenet.distill --preset tiny-dx              # the DX policy
    python -m imagenet.smoke --preset gm-repa-1nfe           # will it run here, and for how long?
    python -m imagenet.distill --preset gm-repa-1nfe         # ImageNet 256, one GPU
    torchrun --nproc-per-node 8 -m imagenet.distill --preset gm-repa-1nfe        # one node
    torchrun --nnodes 4 --node-rank R --nproc-per-node 8 --master-addr HOST \\
        -m imagenet.distill --preset gm-repa-1nfe --out s3://bucket/run          # several nodes
    torchrun --nproc-per-node 8 -m imagenet.distill --preset gm-repa-2nfe --latents LATENTS

`--preset` names the published runs; `--help` lists every setting. Run the same command again to
continue an interrupted run, bit for bit. SIGTERM and Ctrl-C finish the iteration and save.

**One network evaluation needs no images.** The segment starts at t = 1, in pure noise: labels and
noise are all there is (Algorithms 2 and 3 are the same for nfe = 1). With more evaluations the
student learns from cached latents if there are any (--latents, see imagenet.cache_latents;
Algorithm 2), otherwise from its own trajectories (data-free, Algorithm 3).

A step sees --batch samples, whatever the number of processes and --micro-batch. What is drawn for a
sample depends on the seed, the iteration and the sample's place in the batch alone.

In --out: config.json, stats.jsonl, student.safetensors (the moving average, for
imagenet.sample), checkpoints/, pictures/. imagenet/README.md has the recipes.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

import imagenet.distributed as runs
from common.cli import check_interval, compiled, compiled_policies, parse, run_cli, setting
from imagenet.checkpoints import (
    TEACHERS,
    Source,
    init_student_from_teacher,
    load_dit,
    save_dit,
)
from imagenet.dit import DiT, dit_student, guided_teacher
from imagenet.draws import Draws, Latents, draw
from imagenet.metrics import check_reference
from imagenet.monitor import BINS, Monitor, due
from piflow_minimal import PiIDLoss, Policy, pi_id_loss

MOST_SKIPPED = 10  # iterations in a row without a finite gradient before a run gives up


# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """One run. The defaults are what all published ImageNet runs have in common."""

    out: str = setting("outputs", "folder of the run, local or remote (s3://...)")
    teacher: str = setting("repa", "tiny, repa, fm, a file, or owner/repository/path on the Hub")
    num_heads: int = setting(0, "teacher's attention heads; 0: as its file states", low=0)
    time_scale: float = setting(
        0.0, "factor applied to t before the time embedding; 0: as the teacher's file states", low=0
    )
    flip_time: bool = setting(False, "teacher trained with t = 1 as data (SiT)")
    guidance: float = setting(3.2, "classifier-free guidance of the teacher; 1: none", low=0)
    guidance_interval: tuple[float, float] = setting(
        (0.0, 0.7), "noise levels t with guidance", metavar=("LOW", "HIGH")
    )

    policy: str = setting("gmflow", "kind of policy", choices=("gmflow", "dx"))
    components: int = setting(32, "K of a gmflow policy, N of a dx policy", low=1)
    nfe: int = setting(1, "segments, one network evaluation each", low=1)
    latents: str = setting("", "folder of imagenet.cache_latents, for nfe > 1; empty: data-free")

    iterations: int = setting(140_000, "optimizer steps", low=1)
    batch: int = setting(4096, "samples per step, over all processes", low=1)
    micro_batch: str = setting(
        "auto", "samples that a process handles at once; auto: as many as the GPU's memory takes"
    )
    num_intermediates: int = setting(2, "teacher queries per segment", low=1)
    query_times: str = setting(
        "uniform", "query times; stratified: one per stratum over the batch",
        choices=("uniform", "stratified"),
    )  # fmt: skip
    min_query_time: float = setting(
        0.0, "smallest t of a query: the last substep's start, below which nothing is evaluated",
        low=0, high=1,
    )  # fmt: skip
    total_substeps: int = setting(128, "substeps of the policy rollout, per unit of tau", low=1)
    sample_substeps: int = setting(
        0, "the same for sampling the student, which its file states; 0: as in training", low=0
    )
    solver: str = setting(
        "euler", "solver of the rollout, exact for dx only", choices=("euler", "deis", "exact")
    )
    window_substeps: int = setting(0, "micro-window of the mean velocities, for dx", low=0)
    dropout: float = setting(0.05, "of components in the rollout (gmflow)", low=0, high=0.99)
    time_weight: float = setting(0.0, "power of t that weights the squared error", low=0)
    loss_scale: float = setting(1.5, "factor of the loss", above=0)

    lr: float = setting(5e-5, "peak learning rate", above=0)
    lr_decay: str = setting("none", "after the warm-up; cosine: to 0", choices=("none", "cosine"))
    warmup: int = setting(400, "iterations of linear warm-up", low=0)
    warmup_ratio: float = setting(0.001, "first learning rate, as a share", low=0, high=1)
    beta2: float = setting(0.95, "AdamW's beta2; beta1 is 0.9, no weight decay", low=0, high=1)
    optimizer: str = setting(
        "adamw", "adamw8bit needs bitsandbytes and CUDA", choices=("adamw", "adamw8bit")
    )
    clip: float = setting(50.0, "largest gradient norm", above=0)
    clip_start: int = setting(400, "iteration from which gradients are clipped", low=0)
    ema_start: int = setting(400, "iteration up to which the moving average copies", low=0)
    ema_gamma: float = setting(
        7.0, "decay (1 - 1/i)^(1 + gamma) of the moving average, i counted from its start", low=0
    )

    bf16: bool = setting(True, "bfloat16: teacher's weights, autocast around the student")
    tf32: bool = setting(True, "TF32 matrix products on CUDA where float32 remains")
    checkpointing: bool = setting(True, "recompute activations: less memory, a third more time")
    shard: bool = setting(False, "split weights and optimizer over the processes (FSDP)")
    compile: bool | None = setting(None, "torch.compile blocks and policies; default: on CUDA")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    seed: int = setting(0, "seed of everything random", low=0)

    log_every: int = setting(50, "iterations between lines of stats.jsonl", low=1)
    save_every: int = setting(1000, "iterations between checkpoints", low=1)
    keep: int = setting(2, "newest checkpoints to keep", low=1)
    milestone_every: int = setting(0, "checkpoints of these multiples stay; 0: none", low=0)
    half_checkpoints: bool = setting(
        False, "store the average and AdamW's state in bfloat16; resuming is then not bit for bit"
    )
    picture_every: int = setting(2000, "iterations between pictures of pairs; 0: none", low=0)
    teacher_steps: int = setting(64, "Euler steps of the teacher in the pictures", low=1)
    eval_every: int = setting(0, "iterations between Frechet distances (FID); 0: none", low=0)
    eval_images: int = setting(10_000, "images of a Frechet distance, over all processes", low=65)
    reference: str = setting("", "FID: the .npz of the ADM suite, or a folder of images")
    inception: str = setting("", "FID: weights file of the Inception network; empty: download")
    logger: str = setting("none", "beside stats.jsonl", choices=("none", "tensorboard", "wandb"))

    @property
    def segments(self) -> int:
        """Segments that one training sample passes through."""
        return 1 if self.latents else self.nfe

    @property
    def sampling(self) -> dict[str, int | str]:
        """How the student's policy is rolled out when it is sampled."""
        substeps = self.sample_substeps or self.total_substeps
        return {"total_substeps": substeps, "solver": self.solver}


# What may change when a run is continued; all else decides its numbers.
RESUMABLE = {"out", "iterations", "micro_batch", "checkpointing", "shard", "compile", "device"}
RESUMABLE |= {"log_every", "save_every", "keep", "milestone_every", "half_checkpoints"}
RESUMABLE |= {"picture_every", "teacher_steps", "logger", "eval_every", "eval_images"}
RESUMABLE |= {"reference", "inception", "sample_substeps"}

TINY = Settings(
    teacher="tiny", guidance=2.5, guidance_interval=(0.0, 0.8), components=16, iterations=5000,
    batch=32, num_intermediates=1, query_times="stratified", min_query_time=0.068,
    total_substeps=6, sample_substeps=3, solver="deis", time_weight=0.25, loss_scale=1.0, lr=2e-3,
    lr_decay="cosine", warmup=100, beta2=0.99, clip=1.0, clip_start=0, ema_start=0, bf16=False,
    tf32=False, checkpointing=False, save_every=500, picture_every=1000,
)  # fmt: skip
TINY_DX = replace(  # queries down to t = 0
    TINY, policy="dx", dropout=0.0, components=10, query_times="uniform", min_query_time=0.0,
    total_substeps=16, sample_substeps=0, solver="exact", time_weight=2.0, iterations=8000,
)  # fmt: skip
DX = Settings(policy="dx", dropout=0.0, iterations=40_000)
PRESETS = {
    "tiny": TINY,
    "tiny-2nfe": replace(  # an iteration costs twice as much
        TINY, nfe=2, total_substeps=8, sample_substeps=4, min_query_time=0.0625, iterations=2500
    ),
    "tiny-dx": TINY_DX,
    "gm-fm-1nfe": Settings(teacher="fm", guidance=2.7, guidance_interval=(0.0, 0.6)),
    "gm-repa-1nfe": Settings(),
    "gm-repa-2nfe": Settings(nfe=2, guidance=2.8, iterations=24_000),
    "dx-repa-1nfe-n10": replace(DX, components=10, window_substeps=10),
    "dx-repa-1nfe-n20": replace(DX, components=20, window_substeps=5),
    "dx-repa-1nfe-n40": replace(DX, components=40, window_substeps=3),
}
PRESETS = {name: replace(preset, out=f"outputs/{name}") for name, preset in PRESETS.items()}


def read_settings(
    argv: list[str] | None = None, about: str = __doc__, preset: str = "tiny"
) -> Settings:  # fmt: skip
    """Command line -> Settings: a preset, then whatever is overridden.

    Raises: ValueError that names the setting, what was given and what is accepted.
    """
    config = parse(Settings, about, argv, {preset: PRESETS[preset]} | PRESETS)
    check_interval("--guidance-interval", config.guidance_interval)
    if config.solver == "exact" and config.policy != "dx":
        raise ValueError("--solver is 'exact'; a gmflow policy takes euler or deis")
    if config.dropout and config.policy == "dx":
        raise ValueError(f"--dropout is {config.dropout}; a dx policy has none, it must be 0")
    if not config.out.strip("/ "):
        raise ValueError(f"--out is {config.out!r}; it must name a folder")
    if config.eval_every and config.reference:
        check_reference(config.reference)
    if config.latents and config.nfe == 1:
        raise ValueError("--latents is of no use with --nfe 1: the segment starts in pure noise")
    given = config.micro_batch
    if given != "auto" and not (given.isdecimal() and int(given) > 0):
        raise ValueError(f"--micro-batch is {given!r}; it must be auto or a positive integer")
    return config


# ---------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------


class WithDropout(NamedTuple):
    """A policy whose detached copy lacks some components in the rollout."""

    policy: Policy
    dropped: Tensor  # (B, K) bool

    x_src = property(lambda self: self.policy.x_src)
    t_src = property(lambda self: self.policy.t_src)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        return self.policy.velocity(x, t)

    def detach(self) -> Policy:
        return self.policy.detach().drop(self.dropped)


def segment_losses(
    config: Settings, student: runs.AutocastModel, teacher: runs.AutocastModel, draws: Draws,
    sync: bool = True,
) -> Iterator[PiIDLoss]:  # fmt: skip
    """pi-ID on one random segment of every sample (Algorithm 2), or on all in turn (Algorithm 3).

    sync: whether the backward pass of the last loss adds up gradients over the processes.
    """
    size = 1 / config.nfe  # of a segment
    policy_at = dit_student(student, draws.labels, segment_size=size)
    x_src = draws.noise
    times = draws.times.transpose(1, 2, 0).reshape(-1, len(x_src))  #  in the order of the queries
    guidance = config.guidance, config.guidance_interval
    velocity = guided_teacher(teacher, draws.labels, *guidance, times=times)
    if config.latents:
        x_src = torch.lerp(draws.x_0, draws.noise, draws.tau_src[:, :1, None, None])
    for s in range(config.segments):
        student.sync = sync and s == config.segments - 1
        tau_src = draws.tau_src[:, s]
        policy = policy_at(x_src, tau_src)
        if config.dropout:
            policy = WithDropout(policy, draws.dropped[:, s])
        out = pi_id_loss(
            policy, velocity, tau_src, size,
            total_substeps=config.total_substeps, solver=config.solver,
            num_intermediates=config.num_intermediates, window_substeps=config.window_substeps,
            uniforms=(draws.uniforms[:, s], draws.uniforms[:, s, 1:]),  # the second is not used
        )  # fmt: skip
        yield out
        x_src = out.x_dst


def backward(
    config: Settings, student: runs.AutocastModel, teacher: runs.AutocastModel, draws: Draws,
    world: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums the gradient of this process's samples, micro-batch by micro-batch.

    Returns: their part of the loss, and (2, BINS) squared errors by t, summed, and their number.
    """
    device, n = next(student.net.parameters()).device, len(draws.labels)
    part = n if config.micro_batch == "auto" else int(config.micro_batch)
    loss, by_t = torch.zeros((), device=device), torch.zeros(2, BINS, device=device)
    for begin in range(0, n, part):
        piece = draws.part(begin, begin + part, device)
        for out in segment_losses(config, student, teacher, piece, begin + part >= n):
            square = (out.u_policy - out.u_teacher).square().flatten(1).mean(1)  #     (M n,)
            weighted = (square * out.t**config.time_weight).sum()
            share = weighted / (config.batch * config.num_intermediates * config.segments)
            # Gradients are averaged over the processes; this makes it a sum.
            (config.loss_scale * world * share).backward()
            loss += share.detach()
            bins = (out.t * BINS).long().clamp(max=BINS - 1)
            by_t[0].index_add_(0, bins, square.detach())
            by_t[1].index_add_(0, bins, torch.ones_like(square))
    return loss, by_t


# ---------------------------------------------------------------------------------------------
# The run: what is trained, how it is kept
# ---------------------------------------------------------------------------------------------


def learning_rate(config: Settings, iteration: int) -> float:
    """Linear warm-up, then constant or a cosine to zero. iteration: counts from 0."""
    schedule = (config.lr, config.warmup, config.warmup_ratio, config.lr_decay, config.iterations)
    return runs.learning_rate(iteration, *schedule)


def compiles(device: torch.device) -> bool:
    """Whether torch.compile works here; a warning if not."""

    def probe(x: Tensor) -> Tensor:
        return x + 1

    return compiled(probe, torch.zeros(2, device=device)) is not probe


def compile_blocks(net: DiT) -> None:
    """torch.compile of each block: inside the activation checkpoint, one graph for all blocks."""
    for block in net.blocks:
        block.compile()


class Run:
    """Student, its moving average and the optimizer, and how far they have come."""

    def __init__(self, config: Settings, teacher: DiT, device: torch.device):
        torch.manual_seed(config.seed)
        generator = torch.Generator().manual_seed(config.seed)
        self.config, self.device, self.started = config, device, time.monotonic()
        self.iteration, self.skipped, self.bad, self.seconds = 0, 0, 0, 0.0
        self.student = init_student_from_teacher(
            teacher, config.policy, config.components, generator=generator
        ).to(device)
        self.student.config = replace(self.student.config, nfe=config.nfe, **config.sampling)
        self.student.requires_grad_(True).train()
        self.student.checkpointing = config.checkpointing
        self.compile = device.type == "cuda" if config.compile is None else config.compile
        self.compile = self.compile and compiles(device)
        self.ema = copy.deepcopy(self.student).requires_grad_(False).eval()
        if self.compile:  # the average stays as it is, for pictures of other sizes
            compile_blocks(self.student)
        if config.shard:
            runs.shard(self.student)
            runs.shard(self.ema)
        parameters, betas = self.student.parameters(), (0.9, config.beta2)
        self.optimizer = runs.make_optimizer(config.optimizer, parameters, config.lr, betas)
        self.checkpoints = runs.Checkpoints(
            runs.join(config.out, "checkpoints"), config.keep, config.milestone_every,
            half=("ema", "optimizer") if config.half_checkpoints else (),
        )  # fmt: skip

    def clip_gradients(self) -> Tensor:
        """-> the norm before clipping, a scalar on the device."""
        limit = self.config.clip if self.iteration >= self.config.clip_start else math.inf
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), limit)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def step(self, finite: bool) -> None:
        """One optimizer step and one of the average; neither if a number was not finite."""
        self.bad = 0 if finite else self.bad + 1
        self.skipped += not finite
        self.iteration += 1
        self.seconds = time.monotonic() - self.started
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.config, self.iteration - 1)
            self.optimizer.step()
            decay = runs.ema_decay(self.iteration, self.config.ema_start, self.config.ema_gamma)
            runs.update_ema(self.ema, self.student, decay)

    @property
    def parts(self) -> dict[str, runs.Part]:
        return {"student": self.student, "ema": self.ema, "optimizer": self.optimizer}

    def save(self) -> None:
        """Writes a checkpoint, then student.safetensors, while the training goes on."""
        numbers = {name: getattr(self, name) for name in ("skipped", "seconds")}
        self.checkpoints.save(self.iteration, self.parts, numbers, self.write_student)

    def write_student(self, state: dict) -> None:
        """student.safetensors from the average in a checkpoint."""
        with torch.device("meta"):
            net = DiT(self.ema.config)
        net.load_state_dict(state["ema"], assign=True)
        with runs.writing(runs.join(self.config.out, "student.safetensors")) as temporary:
            save_dit(net, temporary)

    def restore(self) -> None:
        """Continues from the newest whole checkpoint, if there is one."""
        if runs.rank() == 0:
            for folder in (self.config.out, runs.join(self.config.out, "pictures")):
                runs.remove_leftovers(folder)
        numbers = self.checkpoints.restore(self.parts, self.device) or {}
        for name, value in numbers.items():
            setattr(self, name, value)
        self.started = time.monotonic() - self.seconds
        if numbers:  # a run that was killed in between has an older student
            self.checkpoints.background({"ema": self.ema.state_dict()}, self.write_student)

    def average(self) -> DiT:
        """The moving average as a whole network, on every process; a copy if it is sharded."""
        if not self.config.shard:
            return self.ema
        with torch.device("meta"):
            net = DiT(self.ema.config).eval().requires_grad_(False)
        state = {key: value.full_tensor() for key, value in self.ema.state_dict().items()}
        net.load_state_dict(state, assign=True)
        net.positions = self.ema.positions  # not in the state
        return net

    def check_progress(self) -> None:
        """Raises: ValueError after MOST_SKIPPED iterations in a row without a step."""
        if self.bad < MOST_SKIPPED:
            return
        self.iteration -= self.bad
        self.save()
        self.checkpoints.wait()
        raise ValueError(
            f"loss or gradient was not finite in {self.bad} iterations in a row; the weights from "
            f"before, iteration {self.iteration}, are saved; try a lower --lr than "
            f"{self.config.lr} in another --out"
        )


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def check_run(config: Settings) -> dict:
    """config.json of the run that is continued, empty for a new one. On rank 0.

    Raises: ValueError if a setting that decides numbers differs.
    """
    decisive = {name: value for name, value in asdict(config).items() if name not in RESUMABLE}
    return runs.check_same(runs.join(config.out, "config.json"), decisive)


def say_new_schedule(run: Run, before: dict) -> None:
    """One line if --iterations moves the learning rate of a run that is continued."""
    old = before.get("iterations", run.config.iterations)
    if run.iteration and run.config.lr_decay != "none" and old != run.config.iterations:
        configs = (replace(run.config, iterations=n) for n in (old, run.config.iterations))
        rates = [learning_rate(config, run.iteration) for config in configs]
        new, rate = run.config.iterations, f"{rates[1]:.1e} in place of {rates[0]:.1e}"
        print(
            f"--iterations is {new} and was {old}: the cosine ends at {new}, and from here the "
            f"learning rate is {rate}"
        )


def load_teacher(config: Settings, device: torch.device) -> DiT:
    """The teacher, frozen, with float32 weights."""
    source = TEACHERS.get(config.teacher, Source(config.teacher))
    time_scale = config.time_scale or source.time_scale
    options = {"device": device, "head": "velocity", "flip_time": config.flip_time}
    net = load_dit(source.path, config.num_heads or None, time_scale, **options)
    return net.requires_grad_(False)


def models(
    run: Run, net: DiT, place: runs.Place
) -> tuple[runs.AutocastModel, runs.AutocastModel]:  # fmt: skip
    """-> student and teacher as the loss calls them: precision, compilation, processes."""
    if run.config.tf32 and place.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if run.config.bf16:
        net.bfloat16()
    if run.compile:
        compile_blocks(net)
    student = runs.AutocastModel(run.student, run.student.config, run.config.bf16)
    student.net = runs.parallel(run.student, place, run.config.shard)
    return student, runs.AutocastModel(net, net.config)


def largest_micro_batch(measure: Callable[[int], float], budget: float, share: int) -> int:
    """The most samples at once, in as many equal parts of `share` as a power of two allows.

    measure(n): peak memory with n samples at once, linear in n; budget: what there is.
    """
    few, more = min(4, share), min(8, share)
    low, high = measure(few), measure(more)
    slope, parts = (high - low) / max(1, more - few), 1
    while parts < share and low + slope * (math.ceil(share / parts) - few) > budget:
        parts *= 2
    return math.ceil(share / parts)


def fit_micro_batch(
    config: Settings, run: Run, student: runs.AutocastModel, teacher: runs.AutocastModel,
    draws: Draws, world: int,
) -> Settings:  # fmt: skip
    """--micro-batch auto as a number: what fits into a GPU; elsewhere the share of a process."""
    if config.micro_batch != "auto" or run.device.type != "cuda":
        return config

    def measure(n: int) -> float:
        torch.cuda.reset_peak_memory_stats(run.device)
        piece = Draws(*(value[:n] for value in draws))
        backward(config, student, teacher, piece, world)
        return torch.cuda.max_memory_allocated(run.device)

    free, _ = torch.cuda.mem_get_info(run.device)
    budget = 0.85 * (free + torch.cuda.memory_reserved(run.device))
    if not run.optimizer.state:  # the first step will add it
        parameters = sum(p.numel() for p in run.student.parameters())
        budget -= 8 * parameters / (world if config.shard else 1)
    size = largest_micro_batch(measure, budget, len(draws.labels))
    run.optimizer.zero_grad()
    return replace(config, micro_batch=str(runs.from_first(size)))


def prepare(
    config: Settings, place: runs.Place
) -> tuple[Run, runs.AutocastModel, runs.AutocastModel, Callable[[int], Draws]]:
    """-> the run, as far as it has come; student and teacher; the draws of an iteration."""
    before = runs.on_first(check_run, config)
    net = load_teacher(config, place.device)
    latents = Latents(config.latents, net.config) if config.latents else None
    run = Run(config, net, place.device)
    run.restore()
    if place.rank == 0:
        say_new_schedule(run, before)
    rest = places_of(config, place), place.device.type == "cuda"
    return run, *models(run, net, place), lambda i: draw(config, net.config, latents, i, *rest)


def places_of(config: Settings, place: runs.Place) -> range:
    """The places in the batch that are this process's."""
    return range(*(rank * config.batch // place.world for rank in (place.rank, place.rank + 1)))


def train(config: Settings, place: runs.Place) -> Run:
    """The training loop. Every process runs it; rank 0 writes."""
    run, student, teacher, draws_of = prepare(config, place)
    config = fit_micro_batch(config, run, student, teacher, draws_of(0), place.world)
    monitor = Monitor(run, teacher)
    with runs.Stop() as stop, compiled_policies(run.compile), monitor:
        for draws in runs.ahead(draws_of, range(run.iteration, config.iterations)):
            run.optimizer.zero_grad()
            loss, by_t = backward(config, student, teacher, draws, place.world)
            norm = run.clip_gradients()
            loss, norm = stop.agree(loss, norm / place.world)  # the only device sync
            run.step(finite=math.isfinite(loss + norm))
            last = stop.agreed or run.iteration == config.iterations
            monitor.report(run, last, loss, norm, by_t)
            if due(run.iteration, config.save_every, last) and (last or not run.bad):
                run.save()
            run.check_progress()
            if last:
                break
    run.checkpoints.wait()
    return run


def main(argv: list[str] | None = None) -> None:
    """Trains, or continues, the run that the command line describes."""
    config = read_settings(argv)
    with runs.processes(config.device) as place:
        if config.batch < place.world:
            needed = f"{place.world} processes need at least {place.world}"
            raise ValueError(f"--batch is {config.batch}; {needed}")
        if config.shard and place.world == 1:
            raise ValueError("--shard splits a network over processes: start several by torchrun")
        if config.shard and config.batch % place.world:
            needed = f"a multiple of the number of processes, {place.world}"
            raise ValueError(f"--batch is {config.batch}; with --shard it must be {needed}")
        run = train(config, place)
    if place.rank == 0:
        done = run.iteration == config.iterations
        print(f"iteration {run.iteration} of {config.iterations}, {run.seconds:.0f} s; "
              + (f"the student is {runs.join(config.out, 'student.safetensors')}" if done
                 else "stopped; run the same command again to continue"))  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
