"""Distils Qwen-Image, FLUX.1 or FLUX.2 to a few network evaluations: the paper's main result.

    python -m text_to_image.distill --tiny                   # small stand-ins, under a minute
    python -m text_to_image.distill --tiny --preset dx-flux --out outputs/dx_flux     # any preset
    python -m text_to_image.cache_prompts Lakonik/t2i-prompts-3m --family qwen --out data/qwen
    torchrun --nproc-per-node 8 -m text_to_image.distill --preset gm-qwen --prompts data/qwen
    torchrun --nproc-per-node 8 -m text_to_image.distill --prompts data/qwen --shard
    python -m text_to_image.generate --adapter outputs/t2i/adapter --prompt "a jay"

The base transformer is loaded once and frozen: the teacher. The student is the base with a LoRA, an
output norm and a policy head, which alone are trained (student.py). No images are needed: segments
follow each other from noise (Algorithm 3). With --data-dependent they start from noisy image
latents (Algorithm 2), as the published adapters did.

The loop is common/train.py: the same command continues a run. In --out: config.json, stats.jsonl,
adapter/ (the moving average, in the published layout), checkpoints/ (what is trained), pictures/
(student above teacher, for the same noise).
"""

if not __package__:
    raise SystemExit("start it in the repository's root: python -m text_to_image.distill")

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.cli import keep_freed_memory, parse, run_cli, setting
from common.files import join, write_text, writing
from common.plots import image_rows
from common.processes import Place, from_first, processes, rank
from common.teachers import endpoint_rmse, integrate_teacher
from common.train import TrainSettings, train
from piflow_minimal import PiIDLoss, pi_id_data_dependent, pi_id_data_free, sample, segment_of
from text_to_image import cache_prompts, loading
from text_to_image.adapters import PolicySpec, Sampling, write_adapter
from text_to_image.families import FAMILIES, FINAL_STEP_SIZE_SCALE, SHIFT, latent_shape
from text_to_image.student import TwoRoles, adapter_of, make_student, make_teacher, read_trained
from text_to_image.tiny import GUIDANCE, demo_pipeline

PICTURES = 4  # prompts and noises of an evaluation
TINY_SCALE = 4.0  # of a random base's output layer, so that its trajectories bend
TINY_PROMPTS = [
    f"{start} {name}" for start in ("a", "a photo of a", "the picture of one")
    for name in ("t-shirt", "pair of trousers", "pullover", "dress", "coat",
                 "sandal", "shirt", "sneaker", "bag", "ankle boot")
]  # fmt: skip


# ---- Settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings(TrainSettings):
    """One run."""

    family: str = setting("qwen", "family of the base model", choices=FAMILIES)
    base: str | None = setting(None, "folder or Hub name of another base pipeline", path=True)
    tiny: bool = setting(False, "small stand-ins: no download, no GPU; other defaults")
    prompts: str | None = setting(None, "folder of text_to_image.cache_prompts", path=True)
    data_dependent: bool = setting(False, "start from image latents (Algorithm 2); batch 256")

    policy: str = setting("gmflow", "kind of policy", choices=("gmflow", "dx", "dx-polynomial"))
    components: int = setting(8, "mixture components K, grid points N, or orders", low=1)
    nfe: int = setting(4, "segments, one network evaluation each", low=1)
    lora_rank: int = setting(256, "rank of the LoRA", low=1)
    lora_dropout: float = setting(0.05, "dropout of the LoRA's inputs", low=0, high=0.99)

    guidance: float | None = setting(None, "teacher's guidance; default: that of the family", low=0)
    num_intermediates: int = setting(2, "teacher queries per segment and sample", low=1)
    mixing_iterations: int | None = setting(
        None, "iterations over which the teacher ratio falls from 1 to 0", low=1
    )
    window_substeps: int = setting(3, "micro-window of the prediction, in substeps", low=0)
    total_substeps: int = setting(128, "substeps of the rollout per unit of raw time", low=1)
    dropout: float = setting(0.1, "dropout of components in the rollout (gmflow)", low=0, high=0.99)

    checkpointing: bool = setting(True, "recompute activations in the backward pass", free=True)
    eval_every: int = setting(
        500, "iterations between pictures; 0: none", low=0, free=True, flag="picture-every"
    )
    teacher_steps: int = setting(50, "Euler steps of the teacher in the pictures", low=1, free=True)
    export: str | None = setting(
        None, "file of a checkpoint, or public .pth, of which to write the adapter", path=True,
        free=True,
    )  # fmt: skip

    @property
    def spec(self) -> PolicySpec:
        """How the head's output becomes a policy."""
        if self.policy == "gmflow":
            return PolicySpec("GMFlow")
        if self.policy == "dx-polynomial":
            return PolicySpec("DX", {"mode": "polynomial", "shift": SHIFT})
        segment_size = segment_of(1.0, self.nfe, FINAL_STEP_SIZE_SCALE)[1]
        return PolicySpec("DX", {"segment_size": segment_size, "shift": SHIFT})

    def teacher_ratio(self, iteration: int) -> float:
        """Scheduled trajectory mixing: a linear decay from 1 to 0."""
        if self.mixing_iterations is None:
            return 0.0
        return max(0.0, 1 - iteration / self.mixing_iterations)


PUBLISHED = {
    "out": "outputs/t2i", "iterations": 9000, "batch": 64, "micro_batch": 2, "loss_scale": 15.0,
    "log_every": 10, "save_every": 250,
}  # fmt: skip
FLUX = PUBLISHED | {
    "family": "flux", "iterations": 3000, "num_intermediates": 4, "mixing_iterations": 2000
}  # fmt: skip
DX = {"policy": "dx", "components": 10, "dropout": 0.0}
PRESETS = {
    "gm-qwen": Settings(**PUBLISHED),
    "dx-qwen": Settings(**PUBLISHED, **DX),
    "dx-qwen-p10": Settings(**PUBLISHED, **DX | {"policy": "dx-polynomial"}),
    "gm-flux": Settings(**FLUX),
    # 32 noises of 8 segments: 256 student evaluations per iteration, as in all published runs
    "gm-flux-8step": Settings(**FLUX | {"nfe": 8, "batch": 32}),
    "dx-flux": Settings(**FLUX, **DX),
}


def tiny(settings: Settings) -> Settings:
    """A preset's numbers for the small stand-ins."""
    return replace(
        settings, tiny=True, out="outputs/t2i_tiny", lora_rank=8, lora_dropout=0.0, iterations=100,
        mixing_iterations=settings.mixing_iterations and 50, batch=4, micro_batch=4, lr=2e-3,
        warmup=10, clip_start=20, ema_start=20, total_substeps=32, checkpointing=False,
        save_every=100, device="cpu",
    )  # fmt: skip


# ---- The task ------------------------------------------------------------------------------------


class Distillation:
    """The task of `common.train.train`: the network is the base with a student's parts in it."""

    def __init__(self, s: Settings, pipe: Any, prompts: Any, device: torch.device):
        self.s, self.pipe, self.prompts, self.device = s, pipe, prompts, device
        self.family, self.net, self.pairs = FAMILIES[s.family], pipe.transformer, None
        torch.manual_seed(s.seed)
        self.roles = two_roles(s, self.net)
        side = pipe.default_sample_size * pipe.vae_scale_factor  # 1024, --tiny less
        self.shape = latent_shape(pipe, side, side)
        if s.data_dependent and (given := prompts.latents([0]).shape[1:]) != self.shape:
            given = f"{tuple(given)} in {s.prompts}, the model has {self.shape}"
            raise ValueError(f"--data-dependent: latents {given}; cache_prompts --size {side}")
        if not s.shard:  # `shard` moves block by block
            self.net.to(device)
        if s.checkpointing:
            self.net.enable_gradient_checkpointing()

    def losses(
        self, net: nn.Module, iteration: int, rows: range
    ) -> Iterator[tuple[float, PiIDLoss]]:
        """pi-ID on all segments of every sample (Algorithm 3), or on a random one (Algorithm 2)."""
        s = self.s
        places = self.prompts.rows_of(iteration, s.batch, s.seed)[rows.start : rows.stop]
        student, teacher = self.student_and_teacher(places)
        options = {
            "shift": SHIFT, "final_step_size_scale": FINAL_STEP_SIZE_SCALE, "dropout": s.dropout,
            "total_substeps": s.total_substeps, "num_intermediates": s.num_intermediates,
            "teacher_ratio": s.teacher_ratio(iteration), "window_substeps": s.window_substeps,
        }  # fmt: skip
        if s.data_dependent:
            x_0 = self.prompts.latents(places).to(self.device)
            yield 1.0, pi_id_data_dependent(student, teacher, x_0, s.nfe, **options)
        else:
            noise = self.family.draw_noise((len(rows), *self.shape))
            yield from pi_id_data_free(student, teacher, noise.to(self.device), s.nfe, **options)

    def student_and_teacher(self, places: list[int]) -> tuple:
        """Both roles for the prompts in these places of the cache."""
        conditions = self.prompts.conditions(places).to(self.device, self.roles.dtype)
        negative = self.prompts.negative
        if negative is not None:
            negative = negative.to(self.device, self.roles.dtype)
        student = make_student(self.roles, conditions, self.s.guidance)
        return student, make_teacher(self.roles, conditions, negative, self.s.guidance)

    def evaluate(self, net: nn.Module, iteration: int) -> dict[str, float]:
        """Fixed prompts and noises: student beside teacher. -> endpoint RMSE in latents."""
        s = self.s
        first = len(self.prompts) - self.prompts.held_out
        places = [(first + i) % len(self.prompts) for i in range(PICTURES)]
        student, teacher = self.student_and_teacher(places)
        if self.pairs is None:
            generator = torch.Generator().manual_seed(s.seed)
            noise = self.family.draw_noise((PICTURES, *self.shape), generator).to(self.device)
            ends = (integrate_teacher(teacher, noise, n, SHIFT) for n in (s.teacher_steps, s.nfe))
            self.pairs = noise, *ends
        noise, target, euler = self.pairs
        x_0 = sample(student, noise, s.nfe, SHIFT, FINAL_STEP_SIZE_SCALE,
                     total_substeps=s.total_substeps)  # fmt: skip
        if rank() == 0:
            rows = {f"student, {s.nfe} evaluations": self.decode(x_0)}
            rows[f"teacher, {s.teacher_steps} steps"] = self.decode(target)
            figure = image_rows(rows, f"the same prompts and noise, iteration {iteration}")
            with writing(join(s.out, "pictures", f"step_{iteration:08d}.png")) as temporary:
                figure.savefig(temporary, format="png")
        found = {"endpoint_rmse": endpoint_rmse(x_0, target)}
        return found | {"euler_rmse": endpoint_rmse(euler, target)}  # teacher in nfe steps

    def decode(self, x: Tensor) -> Tensor:
        """Latents -> uint8 (B, H, W, 3)."""
        self.pipe.vae.to(x.device)
        images = self.family.decode(self.pipe, x)
        return images.clamp(-1, 1).mul(127.5).add(127.5).byte().permute(0, 2, 3, 1).cpu()

    def export(self, state: dict[str, Tensor], folder: str | Path) -> None:
        write_adapter(join(folder, "adapter"), adapter_of(self.roles, state, sampling(self.s)))

    def shard(self, net: nn.Module) -> None:
        self.roles.shard()

    def describe(self) -> dict:
        """What a checkpoint states about its policy and its sampling."""
        return about(self.s)


def two_roles(s: Settings, net: nn.Module) -> TwoRoles:
    """A base transformer with a student's parts in it."""
    logstd_width = 32 if s.tiny else 1024
    return TwoRoles(
        net, FAMILIES[s.family], s.spec, s.components, s.lora_rank, s.lora_dropout, logstd_width
    )


def sampling(s: Settings) -> Sampling:
    """What the adapter's file says about sampling."""
    guidance = s.guidance if FAMILIES[s.family].embeds_guidance else None
    return Sampling(
        s.family, s.nfe, guidance, SHIFT, FINAL_STEP_SIZE_SCALE, s.total_substeps, "euler"
    )


def about(s: Settings) -> dict:
    """What a checkpoint states, and --export compares with its flags."""
    return {"policy": s.spec._asdict(), "sampling": sampling(s)._asdict()}


# ---- The run -------------------------------------------------------------------------------------


def prepare(s: Settings, place: Place) -> Distillation:
    """Loads prompts and base; what can be checked before is."""
    family = FAMILIES[s.family]
    if s.policy != "gmflow" and s.dropout:
        raise ValueError(f"--dropout {s.dropout}: a dx policy has no components to drop; use 0")
    if s.prompts is None and not s.tiny:
        raise ValueError("--prompts is missing: a folder of text_to_image.cache_prompts")
    folder = s.prompts or tiny_prompts(s, place)
    prompts = cache_prompts.PromptCache(folder, family, "tiny" if s.tiny else s.base or family.repo)
    if s.data_dependent and not prompts.has_latents:
        raise ValueError(f"--data-dependent: {folder} has no latents; cache_prompts --images")
    if s.tiny:
        pipe = demo_pipeline(family)
        if s.family != "qwen":  # random weights
            pipe.transformer.proj_out.weight.data *= TINY_SCALE
    else:
        net = loading.empty_components(family, s.base)["transformer"]
        if net.stored or (family.embeds_guidance and family.embedded_guidance(net) is None):
            needed = "a teacher needs its full weights and, in FLUX, its embedded guidance"
            raise ValueError(f"--base {s.base or family.repo}: {needed}")
        helps = "--shard on several GPUs, --micro-batch 1, --checkpointing or --optimizer adamw8bit"
        line = loading.check_memory(memory_needed(s, net, place.world), place.device, helps)
        if place.rank == 0:
            print(line)
        pipe = loading.load_base(family, s.base, without=family.text_parts)
    return Distillation(s, pipe, prompts, place.device)


def memory_needed(s: Settings, net: nn.Module, world: int) -> float:
    """Bytes per GPU. net: the base on the meta device; it gets a student's parts.

    2 for a frozen parameter; 4 each for weight, gradient and average of a trained one, 8 (2 in 8
    bits) for its moments; divided by the processes if sharded, but for two blocks.
    """
    frozen = sum(p.numel() for p in net.parameters())
    layers = net.config.num_layers + net.config.get("num_single_layers", 0)
    with torch.device("meta"):
        trained = sum(p.numel() for p in two_roles(s, net).trained().values())
    weights = 2 * frozen + trained * (20 if s.optimizer == "adamw" else 14)
    if s.shard:
        weights = weights / world + 2 * 2 * frozen / layers
    family = FAMILIES[s.family]
    copies = 1 if family.embeds_guidance else 2
    inference = copies * max(s.micro_batch, PICTURES if s.eval_every else 0)  # rows of the teacher
    training = s.micro_batch, layers, s.checkpointing
    return max(
        loading.memory_needed(weights, family, 1024**2, *options)
        for options in (training, (inference,))
    )


def tiny_prompts(s: Settings, place: Place) -> str:
    """A folder with a few cached prompts, written by the first process."""
    source, folder = join(s.out, "prompts.txt"), join(s.out, f"prompts_{s.family}")
    if place.rank == 0:
        write_text(source, "\n".join(TINY_PROMPTS) + "\n")
        cached = cache_prompts.Settings(source, folder, s.family, tiny=True)
        cache_prompts.cache(cached, Place(0, 1, place.device))
    from_first(None)
    return folder


def export_checkpoint(s: Settings) -> str:
    """Writes the adapter of a checkpoint, the moving average. -> its folder."""
    family, folder = FAMILIES[s.family], join(s.out, "adapter")
    if s.tiny:
        net = demo_pipeline(family).transformer.to("meta")
    else:
        net = loading.empty_components(family, s.base)["transformer"]
    with torch.device("meta"):
        roles = two_roles(s, net)
    write_adapter(folder, adapter_of(roles, read_trained(s.export, roles, about(s)), sampling(s)))
    return folder


def parse_arguments(argv: list[str] | None = None) -> Settings:
    """The flags of the command line; --tiny and --data-dependent change the presets' values."""
    argv = sys.argv[1:] if argv is None else argv
    presets = PRESETS
    if "--data-dependent" in argv:  # as published: 256 images, one segment each
        presets = {name: replace(preset, batch=256) for name, preset in presets.items()}
    if "--tiny" in argv:
        presets = {name: tiny(preset) for name, preset in presets.items()}
    s = parse(Settings, __doc__, argv, presets)
    if s.guidance is None:
        clothes = s.tiny and s.family == "qwen"
        s = replace(s, guidance=GUIDANCE if clothes else FAMILIES[s.family].guidance)
    return s


def main(argv: list[str] | None = None) -> None:
    """Trains, or continues, the run that the command line describes."""
    keep_freed_memory()
    s = parse_arguments(argv)
    if s.export is not None:
        print(f"the adapter is {export_checkpoint(s)}")
        return
    with processes(s.device) as place:
        train(s, prepare(s, place), place)


if __name__ == "__main__":
    run_cli(main)
