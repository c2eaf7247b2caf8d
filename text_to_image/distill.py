"""Distils Qwen-Image, FLUX.1 or FLUX.2 to a few network evaluations: the paper's main result.

    python -m text_to_image.distill --tiny                   # small stand-ins, under a minute
    python -m text_to_image.distill --tiny --preset dx-flux  # the same for any preset
    python -m text_to_image.cache_prompts Lakonik/t2i-prompts-3m --family qwen --out data/qwen
    torchrun --nproc-per-node 8 -m text_to_image.distill --preset gm-qwen --prompts data/qwen
    torchrun --nproc-per-node 8 -m text_to_image.distill --prompts data/qwen --shard
    python -m text_to_image.generate --adapter outputs/t2i/adapter --prompt "a jay"

One base, two roles (student.py). The base transformer is loaded once and frozen. Student: base with
LoRA, its own output norm and policy head; these alone are trained. Teacher: the base without them.

No images are needed (Algorithm 3): a sample starts from noise, its segments follow each other, and
their gradients are summed. With --data-dependent it starts from noisy image latents (Algorithm 2).

Run the same command again to continue: bit for bit as if nothing had happened. What is drawn for a
micro-batch depends on the seed, the iteration and its place in the batch, not on the number of
processes.

In --out: config.json, stats.jsonl, adapter/ (the moving average, in the published layout),
checkpoints/ (trained parameters only), pictures/ (student above teacher, for the same noise).
"""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import imagenet.distributed as runs
import text_to_image.families as dm
from common.cli import parse, run_cli, setting
from imagenet.monitor import due
from piflow_minimal import pi_id_data_dependent, pi_id_data_free, segment_of
from text_to_image import cache_prompts
from text_to_image.adapters import PolicySpec
from text_to_image.generate import FINAL_STEP_SIZE_SCALE, SHIFT
from text_to_image.monitor import Monitor, check_memory
from text_to_image.student import TwoRoles, export_adapter, make_student, make_teacher, shard
from text_to_image.tiny_fashion import GUIDANCE, SIDE

SIZES = (  # around one megapixel
    (1024, 1024), (896, 1152), (1152, 896), (832, 1216), (1216, 832), (768, 1344), (1344, 768)
)  # fmt: skip
TINY_SIZES = ((64, 64), (48, 64))
TINY_SCALE = 4.0  # of a random base's output layer, so that its trajectories bend
TINY_PROMPTS = [
    f"{start} {name}" for start in ("a", "a photo of a", "the picture of one")
    for name in ("t-shirt", "pair of trousers", "pullover", "dress", "coat",
                 "sandal", "shirt", "sneaker", "bag", "ankle boot")
]  # fmt: skip
MOST_SKIPPED = 10  # iterations in a row without a finite gradient before a run gives up


# ---- Settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """One run. The defaults are the published GM-Qwen."""

    out: str = setting("outputs/t2i", "folder of the run, local or remote (s3://...)")
    family: str = setting("qwen", "family of the base model", choices=dm.FAMILIES)
    base: str = setting(
        "", "folder or Hub name of the base pipeline, in place of the published one"
    )
    tiny: bool = setting(False, "small stand-ins for base and prompts: no download, no GPU")
    prompts: str = setting("", "folder of text_to_image.cache_prompts")
    data_dependent: bool = setting(False, "start from the image latents of --prompts (Algorithm 2)")

    policy: str = setting("gmflow", "kind of policy", choices=("gmflow", "dx"))
    components: int = setting(8, "mixture components K (gmflow), or grid points N (dx)", low=1)
    nfe: int = setting(4, "segments, one network evaluation each", low=1)
    lora_rank: int = setting(256, "rank of the LoRA", low=1)
    lora_dropout: float = setting(0.05, "dropout of the LoRA's inputs", low=0, high=0.99)
    logstd_width: int = setting(1024, "inner width of the log-std head (gmflow)", low=1)

    guidance: float = setting(4.0, "teacher's guidance; FLUX embeds it, in the student too", low=0)
    num_intermediates: int = setting(2, "teacher queries per segment and sample", low=1)
    mixing_iterations: int = setting(
        0, "teacher ratio falls from 1 to 0 over these; 0: none", low=0
    )
    window_substeps: int = setting(3, "micro-window of the prediction, in substeps", low=0)
    total_substeps: int = setting(128, "substeps of the rollout per unit of raw time", low=1)
    dropout: float = setting(0.1, "dropout of components in the rollout (gmflow)", low=0, high=0.99)
    loss_scale: float = setting(15.0, "factor of the mean squared error", above=0)

    iterations: int = setting(9000, "optimizer steps", low=1)
    batch: int = setting(256, "samples per optimizer step, over all processes", low=1)
    micro_batch: int = setting(2, "samples that a process handles at once", low=1)
    lr: float = setting(1e-4, "peak of the AdamW learning rate", above=0)
    warmup: int = setting(100, "iterations of linear warm-up, from a thousandth of --lr", low=0)
    optimizer: str = setting("adamw", "optimizer", choices=("adamw", "adamw8bit"))
    clip: float = setting(50.0, "largest gradient norm, from --clip-start on", above=0)
    clip_start: int = setting(100, "first iteration whose gradient is clipped", low=0)
    ema_start: int = setting(100, "iteration from which weights are averaged", low=0)
    ema_gamma: float = setting(7.0, "decay of the average (1 - 1/i)^(1 + gamma)", low=0)

    shard: bool = setting(False, "split all parameters over the processes (FSDP)")
    checkpointing: bool = setting(True, "recompute activations in the backward pass")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    seed: int = setting(0, "seed of everything random", low=0)
    log_every: int = setting(10, "iterations between lines of stats.jsonl", low=1)
    save_every: int = setting(250, "iterations between checkpoints", low=1)
    keep: int = setting(2, "newest checkpoints to keep", low=1)
    picture_every: int = setting(500, "iterations between pictures of pairs; 0: none", low=0)
    pictures: int = setting(4, "prompts and noises of the pictures", low=1)
    teacher_steps: int = setting(50, "Euler steps of the teacher in the pictures", low=1)
    logger: str = setting("none", "beside stats.jsonl", choices=("none", "tensorboard", "wandb"))

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of the images; a micro-batch has one of them."""
        if self.tiny:
            return ((SIDE, SIDE),) if self.family == "qwen" else TINY_SIZES
        return SIZES

    @property
    def spec(self) -> PolicySpec:
        """How the head's output becomes a policy."""
        if self.policy == "gmflow":
            return PolicySpec("GMFlow")
        return PolicySpec("DX", segment_of(1.0, self.nfe, FINAL_STEP_SIZE_SCALE)[1], SHIFT)

    def teacher_ratio(self, iteration: int) -> float:
        """Scheduled trajectory mixing: a linear decay from 1 to 0."""
        return max(0.0, 1 - iteration / self.mixing_iterations) if self.mixing_iterations else 0.0


_DX = {"policy": "dx", "components": 10, "dropout": 0.0}
_FLUX = {"family": "flux", "guidance": 3.5, "iterations": 3000, "num_intermediates": 4,
         "mixing_iterations": 2000}  # fmt: skip
PRESETS = {
    "gm-qwen": Settings(),
    "dx-qwen": Settings(**_DX),
    "gm-flux": Settings(**_FLUX),
    "gm-flux-8step": Settings(**_FLUX, nfe=8),
    "dx-flux": Settings(**_FLUX, **_DX),
}
# What may change when a run is continued; all else decides its numbers.
RESUMABLE = {"out", "iterations", "shard", "checkpointing", "device", "log_every"}
RESUMABLE |= {"save_every", "keep", "picture_every", "pictures", "teacher_steps", "logger"}


def tiny(settings: Settings) -> Settings:
    """A preset's numbers for the small stand-ins."""
    guidance = GUIDANCE if settings.family == "qwen" else settings.guidance
    return replace(
        settings, tiny=True, guidance=guidance, out="outputs/t2i_tiny",
        lora_rank=8, lora_dropout=0.0, logstd_width=32,
        iterations=100, mixing_iterations=min(settings.mixing_iterations, 50), batch=4,
        micro_batch=4, lr=2e-3, warmup=10, clip_start=20, ema_start=20, total_substeps=32,
        checkpointing=False, save_every=100, device="cpu",
    )  # fmt: skip


# ---- The run -------------------------------------------------------------------------------------


class Run:
    """What is trained, its moving average and the optimizer, and how far they have come."""

    def __init__(self, settings: Settings, roles: TwoRoles, place: runs.Place):
        self.settings, self.roles, self.place = settings, roles, place
        self.iteration, self.skipped, self.bad, self.seconds = 0, 0, 0, 0.0
        if settings.shard:
            shard(roles)
        self.names = list(roles.trained())
        self.weights = nn.ParameterList(roles.trained().values())
        self.ema = nn.ParameterList(
            nn.Parameter(p.detach().clone(), requires_grad=False) for p in self.weights
        )
        self.optimizer = runs.make_optimizer(
            settings.optimizer, self.weights, settings.lr, (0.9, 0.95)
        )
        self.checkpoints = runs.Checkpoints(runs.join(settings.out, "checkpoints"), settings.keep)

    @property
    def parts(self) -> dict:
        return {"weights": self.weights, "ema": self.ema, "optimizer": self.optimizer}

    def clip_gradients(self) -> Tensor:
        """Averages the gradients over the processes and clips them. -> their norm before clipping.

        Without --shard by one all_reduce per tensor and iteration: what DistributedDataParallel
        does, at the only moment when it is needed. With it each backward pass has reduced its own.
        """
        s, world = self.settings, self.place.world
        for parameter in self.weights if world > 1 and not s.shard else ():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
        limit = s.clip if self.iteration >= s.clip_start else math.inf
        norm = nn.utils.clip_grad_norm_(list(self.weights), limit)
        return norm.full_tensor() if s.shard else norm

    @torch.no_grad()
    def step(self, finite: bool) -> None:
        """One optimizer step and one of the average; none of both if a gradient was not finite."""
        s = self.settings
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = runs.learning_rate(self.iteration, s.lr, s.warmup, 0.001)
            self.optimizer.step()
            decay = runs.ema_decay(self.iteration + 1, s.ema_start, s.ema_gamma)
            runs.update_ema(self.ema, self.weights, decay)
        self.bad = 0 if finite else self.bad + 1
        self.skipped += not finite
        self.iteration += 1
        self.seconds = time.monotonic() - self.began

    def check_progress(self) -> None:
        """Raises: ValueError after MOST_SKIPPED iterations in a row without a step."""
        if self.bad == MOST_SKIPPED:
            self.checkpoints.wait()
            raise ValueError(
                f"the gradient was not finite in {self.bad} iterations in a row; the last "
                f"checkpoint is kept; try a lower --lr than {self.settings.lr} in another --out"
            )

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The student with the average in place of its weights, in evaluation mode."""
        self._swap()
        self.roles.net.eval()
        try:
            yield
        finally:
            self.roles.net.train()
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self.weights, self.ema, strict=True):
            kept = parameter.clone()  # in place: fully_shard holds on to the storage
            parameter.copy_(average)
            average.copy_(kept)

    def save(self) -> None:
        """Writes a checkpoint and the adapter. Every process calls this."""

        def export(state: dict) -> None:
            average = dict(zip(self.names, state["ema"].values(), strict=True))
            export_adapter(runs.join(self.settings.out, "adapter"), self.roles, average)

        numbers = {"skipped": self.skipped, "seconds": self.seconds}
        self.checkpoints.save(self.iteration, self.parts, numbers, export)

    def restore(self) -> None:
        """Continues from the newest whole checkpoint, if there is one."""
        numbers = self.checkpoints.restore(self.parts, self.place.device)
        for name, value in (numbers or {}).items():
            setattr(self, name, value)
        self.began = time.monotonic() - self.seconds


def draw_generator(settings: Settings, iteration: int, micro: int) -> torch.Generator:
    """Seeds what is random in a micro-batch; LoRA dropout uses the global generators."""
    seed = (settings.seed * 1_000_003 + iteration) * 100_003 + micro
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def backward(run: Run, prompts: cache_prompts.PromptCache, pipe: Any) -> Tensor:
    """Adds up the gradients of this process' micro-batches. -> its part of the loss, by segment."""
    s, (rank, world, device) = run.settings, run.place
    segments = 1 if s.data_dependent else s.nfe
    losses = torch.zeros(segments, device=device)
    micro_batches = prompts.micro_batches(s.batch, s.micro_batch, s.seed, run.iteration)
    options = {
        "shift": SHIFT, "final_step_size_scale": FINAL_STEP_SIZE_SCALE, "dropout": s.dropout,
        "total_substeps": s.total_substeps, "num_intermediates": s.num_intermediates,
        "teacher_ratio": s.teacher_ratio(run.iteration), "window_substeps": s.window_substeps,
    }  # fmt: skip
    for number in range(rank, len(micro_batches), world):
        rows = micro_batches[number]
        generator = draw_generator(s, run.iteration, number)
        conditions = prompts.conditions(rows).to(device, run.roles.dtype)
        negative = prompts.negative and prompts.negative.to(device, run.roles.dtype)
        student = make_student(run.roles, conditions)
        teacher = make_teacher(run.roles, conditions, negative)
        if s.data_dependent:
            x_0, data = prompts.latents(rows).to(device), {"generator": generator, **options}
            outs = [(1.0, pi_id_data_dependent(student, teacher, x_0, s.nfe, **data))]
        else:
            size = s.sizes[int(torch.randint(len(s.sizes), (), generator=generator))]
            noise = torch.randn(len(rows), *dm.latent_shape(pipe, *size), generator=generator)
            options["generator"] = generator
            outs = pi_id_data_free(student, teacher, noise.to(device), s.nfe, **options)
        for i, (segment_size, out) in enumerate(outs):
            share = segment_size * out.loss * len(rows) / s.batch
            (s.loss_scale * world * share).backward()  # averaged over processes, so a sum
            losses[i] += share.detach()
    return losses


# ---- Training ------------------------------------------------------------------------------------


def check(settings: Settings, world: int) -> None:
    """Raises: ValueError, one line, for settings that do not fit together."""
    s = settings
    if not s.prompts and not s.tiny:
        raise ValueError("--prompts is missing: a folder of text_to_image.cache_prompts")
    if s.prompts and not any(Path(s.prompts).glob("shard_*.safetensors")):
        raise ValueError(f"--prompts {s.prompts}: no shards; see text_to_image.cache_prompts")
    if s.batch % (s.micro_batch * world):
        raise ValueError(
            f"--batch {s.batch}: must be a multiple of --micro-batch {s.micro_batch} times "
            f"{world} processes"
        )
    if s.shard and world == 1:
        raise ValueError("--shard splits parameters over processes: start several with torchrun")
    if s.shard and s.optimizer != "adamw":
        raise ValueError(
            "--optimizer adamw8bit: not with --shard, whose parameters it cannot handle"
        )
    if s.policy == "dx" and s.dropout:
        raise ValueError(f"--dropout {s.dropout}: a dx policy has no components to drop; use 0")


def prepare(settings: Settings, place: runs.Place) -> tuple[Run, cache_prompts.PromptCache, Any]:
    """-> the run, as far as it has come; the prompts; the pipeline without text encoders."""
    s, family = settings, dm.FAMILIES[settings.family]
    check(s, place.world)
    decisive = {name: value for name, value in asdict(s).items() if name not in RESUMABLE}
    runs.on_first(runs.check_same, runs.join(s.out, "config.json"), decisive)
    if s.tiny:
        pipe, folder = tiny_base(s, family, place)
        config = pipe.transformer.config
    else:
        empty, folder = dm.empty_components(family, s.base or None)["transformer"], s.prompts
        config, line = empty.config, check_memory(s, place, empty)
        if place.rank == 0:
            print(line)
    base = "tiny" if s.tiny else s.base or family.repo
    network = pipe.transformer if s.tiny else empty
    if family.guidance is not None and dm.trained_guidance(network, family) is None:
        raise ValueError(f"--base {base} embeds no guidance, with which its teacher is queried")
    prompts = cache_prompts.PromptCache(folder, family, base, config.joint_attention_dim)
    if s.data_dependent and not prompts.has_latents:
        raise ValueError(f"--data-dependent: {folder} has no latents; cache_prompts --images")
    if not s.tiny:
        pipe = dm.load_base(family, s.base or None, without=text_parts(family, s.base))
    torch.manual_seed(s.seed)
    net = pipe.transformer
    roles = TwoRoles(net, s)
    net.train()
    if not s.shard:  # `shard` moves block by block
        net.to(place.device)
    if s.checkpointing:
        net.enable_gradient_checkpointing()
    run = Run(s, roles, place)
    run.restore()
    return run, prompts, pipe


def text_parts(family: dm.Family, base: str) -> list[str]:
    """The components of the pipeline that only encode prompts."""
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "processor")
    pipeline = getattr(dm.import_diffusers(), family.pipeline)
    return [name for name in names if name in pipeline.load_config(base or family.repo)]


def tiny_base(settings: Settings, family: dm.Family, place: runs.Place) -> tuple[Any, str]:
    """A small pipeline, and a folder with a few cached prompts."""
    from text_to_image.tiny_models import demo_pipeline

    pipe, folder = demo_pipeline(family), settings.prompts or str(Path(settings.out) / "prompts")
    if family.name != "qwen":  # random weights
        pipe.transformer.proj_out.weight.data *= TINY_SCALE
    if not settings.prompts and place.rank == 0:
        source = Path(settings.out) / "prompts.txt"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("\n".join(TINY_PROMPTS) + "\n")
        length = 32 if family.guidance else 512  # Qwen-Image's template comes before the prompt
        cache_prompts.cache(
            cache_prompts.Settings(str(source), Path(folder), family.name, tiny=True,
                                   max_length=length),
            runs.Place(0, 1, place.device), pipe)  # fmt: skip
    runs.from_first(None)
    return pipe, folder


def train(settings: Settings, place: runs.Place) -> Run:
    """The training loop. Every process runs it; rank 0 writes."""
    run, prompts, pipe = prepare(settings, place)
    with runs.Stop() as stop, Monitor(run, prompts, pipe) as monitor:
        while run.iteration < settings.iterations and not stop.agreed:
            run.optimizer.zero_grad()
            losses = backward(run, prompts, pipe)
            norm = run.clip_gradients()
            *losses, norm = stop.agree(*losses, norm / place.world)  # the only device sync
            run.step(finite=math.isfinite(norm))
            last = stop.agreed or run.iteration == settings.iterations
            monitor.report(last, losses, norm)
            if due(run.iteration, settings.save_every, last) and not run.bad:
                run.save()
            run.check_progress()
    run.checkpoints.wait()
    return run


def parse_arguments(argv: list[str] | None = None) -> Settings:
    """The flags of the command line; --tiny changes the presets' values."""
    argv = sys.argv[1:] if argv is None else argv
    presets = {k: tiny(preset) if "--tiny" in argv else preset for k, preset in PRESETS.items()}
    return parse(Settings, __doc__, argv, presets)


def main(argv: list[str] | None = None) -> None:
    """Trains, or continues, the run that the command line describes."""
    settings = parse_arguments(argv)
    with runs.processes(settings.device) as place:
        try:
            run = train(settings, place)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                "the GPU ran out of memory: try --micro-batch 1, --optimizer adamw8bit, or more "
                "GPUs with --shard"
            ) from error
    if place.rank == 0:
        done = run.iteration == settings.iterations
        print(f"iteration {run.iteration} of {settings.iterations}, {run.seconds:.0f} s; "
              + (f"the adapter is {runs.join(settings.out, 'adapter')}" if done
                 else "stopped; run the same command again to continue"))  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
