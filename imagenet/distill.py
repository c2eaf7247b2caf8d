"""Distils a DiT teacher into a student of one or two network evaluations: the paper's main result.

    python -m imagenet.distill                               # tiny: Fashion-MNIST, on a CPU
    torchrun --nproc-per-node 2 -m imagenet.distill          # the same on two cores: faster
    python -m imagenet.distill --nfe 2 --components 32       # any setting can be overridden
    python -m imagenet.smoke --preset gm-repa-1nfe           # will it run here, and for how long?
    python -m imagenet.distill --preset gm-repa-1nfe --micro-batch 64            # ImageNet 256
    torchrun --nproc-per-node 8 -m imagenet.distill --preset gm-repa-1nfe        # one node
    torchrun --nnodes 4 --node-rank R --nproc-per-node 8 --master-addr HOST \\
        -m imagenet.distill --preset gm-repa-1nfe --out s3://bucket/run          # several nodes
    torchrun --nproc-per-node 8 -m imagenet.distill --preset gm-repa-2nfe --latents LATENTS

`--preset` names the published runs; `--help` lists every setting. Run the same command again to
continue an interrupted run, bit for bit. In --out: config.json, stats.jsonl, student.safetensors
(the moving average, for imagenet.sample), checkpoints/, pictures/.

**One network evaluation needs no images.** The segment starts at t = 1, in pure noise: labels and
noise are all there is (Algorithms 2 and 3 are the same for nfe = 1). With more evaluations the
student learns from cached latents (--latents, Algorithm 2), or else from its own trajectories
(data-free, Algorithm 3).
"""

if not __package__:
    raise SystemExit("start it in the repository's root: python -m imagenet.distill")

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from common import fashion, frechet
from common.cli import can_compile, compiled_policies, keep_freed_memory, parse, run_cli, setting
from common.files import join
from common.plots import image_rows, save_figure
from common.processes import rank, total, world
from common.teachers import endpoint_rmse, integrate_teacher
from common.train import TrainSettings, processes, train
from imagenet import metrics
from imagenet.cache_latents import Latents
from imagenet.checkpoints import (
    TEACHERS,
    Source,
    init_student_from_teacher,
    load_decoder,
    load_dit,
    save_dit,
    to_pixels,
)
from imagenet.dit import PIXELS, DiT, dit_student, guided_teacher
from piflow_minimal import PiIDLoss, pi_id_data_dependent, pi_id_data_free, sample

PAIRS = 10  # noises of the pictures
TEACHER_STEPS = 64  # Euler, in the pictures
FID_BATCH = 100  # images at once


# ---- Settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings(TrainSettings):
    """One run: what trains it (TrainSettings), teacher, policy, loss."""

    teacher: str = setting(
        "repa", "tiny, repa, fm, a file, or owner/repository/path on the Hub", path=True
    )
    guidance: float = setting(3.2, "classifier-free guidance of the teacher; 1: none", low=0)
    guidance_interval: tuple[float, float] = setting(
        (0.0, 0.7), "noise levels t with guidance", low=0, high=1, ordered=True,
        metavar=("LOW", "HIGH"),
    )  # fmt: skip

    policy: str = setting("gmflow", "kind of policy", choices=("gmflow", "dx"))
    components: int = setting(32, "K of a gmflow policy, N of a dx policy", low=1)
    nfe: int = setting(1, "segments, one network evaluation each", low=1)
    latents: str | None = setting(
        None, "folder of imagenet.cache_latents, for nfe > 1; default: data-free", path=True
    )
    num_intermediates: int = setting(2, "teacher queries per segment", low=1)
    query_times: str = setting(
        "uniform", "query times; stratified: one per stratum over a micro-batch",
        choices=("uniform", "stratified"),
    )  # fmt: skip
    min_query_time: float = setting(
        0.0, "smallest t of a query: the last substep's start, below which nothing is evaluated",
        low=0, high=1,
    )  # fmt: skip
    total_substeps: int = setting(128, "substeps of the policy rollout, per unit of tau", low=1)
    sample_substeps: int | None = setting(
        None, "the same for sampling the student, which its file states; default: as in training",
        low=1, free=True,
    )  # fmt: skip
    solver: str = setting(
        "euler", "solver of the rollout, exact for dx only", choices=("euler", "deis", "exact")
    )
    window_substeps: int = setting(0, "micro-window of the mean velocities, for dx", low=0)
    dropout: float = setting(0.05, "of components in the rollout (gmflow)", low=0, high=0.99)

    bf16: bool = setting(
        True, "bfloat16: teacher's weights, autocast around the student; TF32 for the rest"
    )
    checkpointing: bool = setting(
        True, "recompute activations: less memory, a third more time", free=True
    )
    compile: bool | None = setting(
        None, "torch.compile blocks and policies; default: on CUDA", free=True
    )
    eval_every: int = setting(
        2000, "iterations between pictures of pairs and their endpoint RMSE; 0: none",
        low=0, free=True, flag="picture-every",
    )  # fmt: skip
    fid_images: int = setting(
        0, "images of a Frechet distance (FID) beside each picture; 0: none", low=0, free=True
    )
    reference: str | None = setting(
        None, "FID: the .npz of the ADM suite, or a folder of images", path=True, free=True
    )

    def __post_init__(self):
        dx = self.policy == "dx"
        if (dx and self.dropout) or (self.solver == "exact" and not dx):
            given = f"--policy {self.policy} --solver {self.solver} --dropout {self.dropout}"
            raise ValueError(f"{given}: solver exact is for dx, a dropout above 0 for gmflow")
        if self.fid_images and (self.fid_images <= fashion.FEATURE_WIDTH or not self.eval_every):
            raise ValueError(
                f"--fid-images {self.fid_images}: must be 0 or above {fashion.FEATURE_WIDTH}, and "
                "is measured beside a picture (--picture-every)"
            )

    @property
    def sampling(self) -> dict[str, int | str]:
        """How the student's policy is rolled out when it is sampled."""
        substeps = self.sample_substeps or self.total_substeps
        return {"total_substeps": substeps, "solver": self.solver}


# What all published ImageNet runs have in common.
COMMON = {
    "iterations": 140_000, "batch": 4096, "micro_batch": 64, "lr": 5e-5, "warmup": 400,
    "clip_start": 400, "ema_start": 400, "loss_scale": 1.5,
}  # fmt: skip
DX = Settings(policy="dx", dropout=0.0, **COMMON | {"iterations": 40_000})
TINY = Settings(
    teacher="tiny", guidance=2.5, guidance_interval=(0.0, 0.8), components=16, iterations=5000,
    batch=32, micro_batch=16, num_intermediates=1, query_times="stratified", min_query_time=0.068,
    total_substeps=6, sample_substeps=3, solver="deis", time_weight=0.25, lr=2e-3,
    lr_decay="cosine", warmup=100, beta2=0.99, clip=1.0, clip_start=0, ema_start=0, bf16=False,
    checkpointing=False, save_every=500, eval_every=1000,
)  # fmt: skip
PRESETS = {
    "tiny": TINY,
    "tiny-2nfe": replace(  # an iteration costs twice as much
        TINY, nfe=2, total_substeps=8, sample_substeps=4, min_query_time=0.0625, iterations=2500
    ),
    "tiny-dx": replace(  # queries down to t = 0
        TINY, policy="dx", dropout=0.0, components=10, query_times="uniform", min_query_time=0.0,
        total_substeps=16, sample_substeps=None, solver="exact", time_weight=2.0, iterations=8000,
    ),
    "gm-fm-1nfe": Settings(teacher="fm", guidance=2.7, guidance_interval=(0.0, 0.6), **COMMON),
    "gm-repa-1nfe": Settings(**COMMON),
    "gm-repa-2nfe": Settings(nfe=2, guidance=2.8, **COMMON | {"iterations": 24_000}),
    "dx-repa-1nfe-n10": replace(DX, components=10, window_substeps=10),
    "dx-repa-1nfe-n20": replace(DX, components=20, window_substeps=5),
    "dx-repa-1nfe-n40": replace(DX, components=40, window_substeps=3),
}  # fmt: skip
PRESETS = {name: replace(preset, out=f"outputs/{name}") for name, preset in PRESETS.items()}


# ---- The task ------------------------------------------------------------------------------------


class Distillation:
    """The task of common/train.py: a DiT student that imitates a DiT teacher."""

    def __init__(self, s: Settings, device: torch.device, teacher: DiT | None = None):
        self.s, self.device = s, device
        torch.manual_seed(s.seed)
        if teacher is None:
            source = TEACHERS.get(s.teacher, Source(s.teacher))
            teacher = load_dit(source.path, None, source.time_scale, device, head="velocity")
        self.teacher = teacher.requires_grad_(False)
        self.net = init_student_from_teacher(
            teacher, s.policy, s.components, generator=torch.Generator().manual_seed(s.seed)
        ).to(device)
        self.net.config = replace(self.net.config, nfe=s.nfe, **s.sampling)
        self.net.requires_grad_(True).checkpointing = s.checkpointing
        if s.bf16:
            self.teacher.bfloat16()
        self.compile = device.type == "cuda" if s.compile is None else s.compile
        self.compile = self.compile and can_compile(device)
        if self.compile:
            for block in (*self.net.blocks, *self.teacher.blocks):
                block.compile()
        config = teacher.config
        self.shape = (config.channels, config.latent_size, config.latent_size)
        self.latents = Latents(s.latents, config) if s.latents else None
        self.pairs = self.reference = None
        tiny = config.decoder == PIXELS
        if s.fid_images and not (tiny or s.reference):
            raise ValueError("--fid-images needs --reference: what the FID compares with")
        if s.fid_images:
            self.reference = metrics.open_reference(None if tiny else s.reference, device)
        self.decode = load_decoder(config, device) if s.eval_every else None

    def shard(self, net: nn.Module) -> None:
        """Each block is gathered when it is needed."""
        from torch.distributed.fsdp import fully_shard

        for block in net.blocks:
            fully_shard(block)
        fully_shard(net)

    def losses(
        self, net: nn.Module, iteration: int, rows: range
    ) -> Iterator[tuple[float, PiIDLoss]]:
        """pi-ID on one random segment of every sample (Algorithm 2), or on all (Algorithm 3)."""
        s, n = self.s, len(rows)
        options = {
            "num_intermediates": s.num_intermediates, "window_substeps": s.window_substeps,
            "total_substeps": s.total_substeps, "solver": s.solver, "dropout": s.dropout,
            "uniforms": self.query_times,
        }  # fmt: skip
        if self.latents:
            x_0, labels = self.latents.draw(n, self.device)
        else:
            labels = torch.randint(self.teacher.config.num_classes, (n,), device=self.device)
            noise = torch.randn(n, *self.shape, device=self.device)
        student, teacher = self.student(net, labels), self.guided(labels)
        if self.latents:
            yield 1.0, pi_id_data_dependent(student, teacher, x_0, s.nfe, **options)
        else:
            yield from pi_id_data_free(student, teacher, noise, s.nfe, **options)

    def student(self, net: nn.Module, labels: Tensor) -> Callable:
        """(x_src, t_src) -> policy, under autocast with --bf16."""
        return dit_student(net, labels, 1 / self.s.nfe, self.s.bf16)

    def guided(self, labels: Tensor) -> Callable:
        """The teacher (x, t) -> u with the guidance of the settings."""
        return guided_teacher(self.teacher, labels, self.s.guidance, self.s.guidance_interval)

    def query_times(self, tau_src: Tensor, segment_size: Tensor) -> tuple[Tensor, Tensor]:
        """Uniforms (n, M), (n, M - 1) by --query-times and --min-query-time."""
        s, n = self.s, len(tau_src)
        uniforms = torch.rand(n, s.num_intermediates, device=tau_src.device)
        if s.query_times == "stratified":
            strata = torch.randperm(uniforms.numel(), device=tau_src.device).view_as(uniforms)
            uniforms = (strata + uniforms) / uniforms.numel()
        below = (s.min_query_time - (tau_src - segment_size)).clamp(min=0)  #  of the segment (n,)
        uniforms = uniforms * (1 - below / segment_size).clamp(min=0)[:, None]
        return uniforms, uniforms[:, 1:]  #  the second is of no use without a teacher ratio

    def sample(self, net: nn.Module, noise: Tensor, labels: Tensor) -> Tensor:
        """x_0 (B, C, H, W) of the student, rolled out as its file states."""
        return sample(self.student(net, labels), noise, self.s.nfe, **self.s.sampling)

    def evaluate(self, net: nn.Module, iteration: int) -> dict[str, float]:
        """A picture of ten pairs and their endpoint RMSE; with --fid-images a Frechet distance."""
        s = self.s
        if self.pairs is None:
            generator = torch.Generator().manual_seed(s.seed)
            noise = torch.randn(PAIRS, *self.shape, generator=generator).to(self.device)
            labels = torch.arange(PAIRS, device=self.device)
            labels = labels * self.teacher.config.num_classes // PAIRS
            target = integrate_teacher(self.guided(labels), noise, TEACHER_STEPS)
            self.pairs = noise, labels, target
        noise, labels, target = self.pairs
        x_0 = self.sample(net, noise, labels)
        if rank() == 0:
            rows = {f"teacher, {TEACHER_STEPS} steps": to_pixels(self.decode(target))}
            rows[f"student, nfe {s.nfe}"] = to_pixels(self.decode(x_0))
            figure = image_rows(rows, f"the same noise, iteration {iteration}")
            save_figure(figure, join(s.out, "pictures", f"step_{iteration:08d}.png"))
        found = {"endpoint_rmse": endpoint_rmse(x_0, target)}
        if self.reference:
            found[self.reference.name] = self.frechet_distance(net)
        return found

    def frechet_distance(self, net: nn.Module) -> float:
        """Of new images of the average, on all processes; image i has the seed i."""
        reference = self.reference
        features = torch.zeros(self.s.fid_images, len(reference.mean), device=self.device)
        size = FID_BATCH * world()
        for start in range(0, len(features), size):
            mine = range(start + rank(), min(start + size, len(features)), world())
            part = torch.tensor(mine or [start])  # sharded: all processes run the network as often
            seeds = [torch.Generator().manual_seed(i) for i in part.tolist()]
            noise = torch.stack([torch.randn(self.shape, generator=seed) for seed in seeds])
            labels = part.to(self.device) % self.teacher.config.num_classes
            pixels = to_pixels(self.decode(self.sample(net, noise.to(self.device), labels)))
            with frechet.full_precision():
                found = reference.judge(pixels.permute(0, 3, 1, 2).to(self.device))
            features[part] = found[0].float() * bool(mine)
        moments = frechet.moments(total(features))  #  the others have zeros there
        return frechet.gaussian_distance(*moments, reference.mean, reference.covariance)

    def export(self, state: dict[str, Tensor], folder: str | Path) -> None:
        """student.safetensors, for imagenet.sample."""
        with torch.device("meta"):
            net = DiT(self.net.config)
        net.load_state_dict(state, assign=True)
        save_dit(net, join(folder, "student.safetensors"))

    def describe(self) -> dict:
        """What a checkpoint states about the network and its sampling."""
        return asdict(self.net.config)


def main(argv: list[str] | None = None) -> None:
    """Trains, or continues, the run that the command line describes."""
    keep_freed_memory()
    s = parse(Settings, __doc__, argv, PRESETS)
    with processes(s.device) as place:
        if s.bf16 and place.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        task = Distillation(s, place.device)
        if s.nfe > 1 and not s.latents and place.rank == 0:
            print(f"data-free (Algorithm 3): {s.nfe} times the cost of a run with --latents")
        with compiled_policies(task.compile):
            train(s, task, place)


if __name__ == "__main__":
    run_cli(main)
