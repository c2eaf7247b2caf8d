"""Recipes for students of the tiny teacher, side by side at a small budget.

    python -m benchmarks.recipes                                 # a few core-minutes a row
    python -m benchmarks.recipes --recipes tiny k8 --seeds 0 1 2 --iterations 1000
    python -m benchmarks.recipes --recipes tiny --iterations 5000 --sets A B C D

A recipe is what it changes in the preset `tiny` of imagenet.distill: add a row to RECIPES and
compare. `cloning` is behaviour cloning: the same student, queries and loss, but the teacher is
queried on its own trajectory, which costs eleven guided evaluations a sample where pi-ID costs one:
compare at equal core-minutes. Frechet distances are multiples of the teacher's (64 Euler steps) on
the same noises: set A has the seeds from 0, B from 10000, C from 20000, D from 30000. Their noises
are disjoint: the spread over sets is that of sampling, the spread over --seeds that of training.
Choose on B, report A. The endpoint RMSE is over the first 200 noises of the first set.
Short runs can rank wrongly: confirm with --iterations 5000.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.timing import print_table
from common import fashion
from common.cli import keep_freed_memory, parse, run_cli, setting
from common.fashion import frechet_distance
from common.files import writing
from common.teachers import endpoint_rmse, integrate_teacher
from common.train import processes, train
from imagenet import distill
from imagenet.checkpoints import load_dit
from imagenet.dit import dit_student, guided_teacher
from piflow_minimal import PiIDLoss, Teacher, sample

RECIPES = {
    "tiny": {},
    "before": {
        "components": 8, "query_times": "uniform", "min_query_time": 0.0, "time_weight": 1.0,
        "total_substeps": 16, "sample_substeps": 16,
    },
    "k8": {"components": 8},
    "uniform-times": {"query_times": "uniform"},
    "no-floor": {"min_query_time": 0.0},
    "weight-t": {"time_weight": 1.0},
    "4-substeps": {"total_substeps": 4, "sample_substeps": 4, "min_query_time": 0.125},
    "3-substeps": {"total_substeps": 3, "min_query_time": 0.192},
    "12-substeps": {"total_substeps": 12, "min_query_time": 0.024},
    "no-dropout": {"dropout": 0.0},
    "two-queries": {"num_intermediates": 2, "batch": 16},
    "dx": {"policy": "dx", "dropout": 0.0, "components": 10, "time_weight": 2.0},
    "cloning": {"dropout": 0.0},
    "2nfe": {"nfe": 2, "total_substeps": 8, "sample_substeps": 4, "min_query_time": 0.0625},
}  # fmt: skip
TEACHER_STEPS = 64  # Euler
HEUN_STEPS = 5  # of cloning, from the source to the query
SETS = {"A": 0, "B": 10_000, "C": 20_000, "D": 30_000}  # seed of the first noise


@dataclass(frozen=True)
class Settings:
    """Flags of the benchmark."""

    recipes: tuple[str, ...] = setting(tuple(RECIPES), "recipes to train", choices=RECIPES)
    seeds: tuple[int, ...] = setting((0,), "training seeds", low=0)
    iterations: int = setting(500, "optimizer steps of each run", low=1)
    sets: tuple[str, ...] = setting(("A", "B"), "sets of noises", choices=SETS)
    samples: int = setting(1000, "images of a distance, more than 64", low=65)
    out: Path = setting(Path("outputs/recipes"), "folder for the runs")


class Cloning(distill.Distillation):
    """Behaviour cloning: pi-ID with queries at states of the teacher's own trajectory."""

    def losses(
        self, net: nn.Module, iteration: int, rows: range
    ) -> Iterator[tuple[float, PiIDLoss]]:
        """One query of every segment, at the time that pi-ID would take."""
        s, n = self.s, len(rows)
        labels = torch.randint(self.teacher.config.num_classes, (n,), device=self.device)
        x_src = torch.randn(n, *self.shape, device=self.device)
        student, teacher = self.student(net, labels), self.guided(labels)
        size = 1 / s.nfe
        for segment in range(s.nfe):
            t_src = torch.full((n,), 1 - segment * size, device=self.device)
            uniforms, _ = self.query_times(t_src, torch.full_like(t_src, size))
            t = t_src - size * uniforms[:, 0]
            policy = student(x_src, t_src)
            x = heun(teacher, x_src, t_src, t)
            with torch.no_grad():
                u_teacher = teacher(x, t)
            u_policy = policy.velocity(x, t)
            loss = (u_policy - u_teacher).square().mean()
            if segment + 1 < s.nfe:
                x_src = heun(teacher, x, t, t_src - size)
            yield size, PiIDLoss(loss, u_policy, u_teacher, t, x_src)


@torch.no_grad()
def heun(teacher: Teacher, x: Tensor, t: Tensor, t_end: Tensor) -> Tensor:
    """The teacher's trajectory from t to t_end, (B,) each, in HEUN_STEPS steps of Heun's method."""
    dt = (t_end - t) / HEUN_STEPS
    dt_x = dt.view(-1, 1, 1, 1)
    for _ in range(HEUN_STEPS):
        u = teacher(x, t)
        u_next = teacher(x + dt_x * u, t + dt)
        x = x + dt_x * (u + u_next) / 2
        t = t + dt
    return x


def noises(first: int, n: int) -> tuple[Tensor, Tensor]:
    """Noise (n, 4, 14, 14), each from a generator of its own as in imagenet.sample, and labels."""
    draws = [torch.Generator().manual_seed(first + i) for i in range(n)]
    return torch.stack([torch.randn(4, 14, 14, generator=g) for g in draws]), torch.arange(n) % 10


@torch.no_grad()
def teacher_ends(first: int, n: int, folder: Path) -> Tensor:
    """The teacher's x_0 for n noises, kept in the folder: core-minutes for 1,000."""
    path = folder / f"teacher_{first}_{n}.pt"
    if path.is_file():
        return torch.load(path, weights_only=True)
    config, net = distill.PRESETS["tiny"], load_dit(fashion.TEACHER)
    ends = []
    for x, labels in zip(*(part.split(100) for part in noises(first, n)), strict=True):
        teacher = guided_teacher(net, labels, config.guidance, config.guidance_interval)
        ends.append(integrate_teacher(teacher, x, TEACHER_STEPS))
    ends = torch.cat(ends)
    with writing(path) as temporary:
        torch.save(ends, temporary)
    return ends


@torch.no_grad()
def student_ends(path: Path, config: distill.Settings, first: int, n: int) -> Tensor:
    """The student's x_0, sampled as its file states."""
    net, ends = load_dit(path), []
    for x, labels in zip(*(part.split(100) for part in noises(first, n)), strict=True):
        student = dit_student(net, labels, 1 / config.nfe)
        ends.append(sample(student, x, config.nfe, **config.sampling))
    return torch.cat(ends)


def distance(x_0: Tensor) -> float:
    """Frechet distance of the images, as imagenet.sample rounds them, to the training set."""
    pixels = (fashion.to_images(x_0) * 127.5 + 127.5).round().clamp(0, 255)
    return frechet_distance(pixels / 127.5 - 1)


def run(name: str, seed: int, settings: Settings) -> tuple[distill.Settings, Path, float]:
    """Trains one recipe. -> its settings, the student's file, core-minutes."""
    out = settings.out / f"{name}-seed{seed}-{settings.iterations}"
    changes = RECIPES[name] | {"out": out, "seed": seed, "iterations": settings.iterations}
    changes |= {"device": "cpu", "picture_every": 0}
    argv = [part for key, value in changes.items()
            for part in ("--" + key.replace("_", "-"), str(value))]  # fmt: skip
    config = parse(distill.Settings, "", argv, distill.PRESETS)
    start = time.process_time()
    with processes("cpu") as place:
        task = Cloning if name == "cloning" else distill.Distillation
        train(config, task(config, place.device), place)
    return config, out / "student.safetensors", (time.process_time() - start) / 60


def main(argv: list[str] | None = None) -> None:
    """Trains every recipe and prints the table."""
    keep_freed_memory()
    settings = parse(Settings, __doc__, argv)
    out, n, sets = settings.out, settings.samples, settings.sets
    ends = {name: teacher_ends(SETS[name], n, out) for name in sets}
    unit = {name: distance(x_0) for name, x_0 in ends.items()}
    header = ["recipe", "seed", "iterations", "core-minutes", *sets, "endpoint RMSE"]
    rows = [["teacher", "", "", "", *(f"{unit[name]:.1f}" for name in sets), ""]]
    for recipe in settings.recipes:
        for seed in settings.seeds:
            config, path, minutes = run(recipe, seed, settings)
            found = {name: student_ends(path, config, SETS[name], n) for name in sets}
            times = [f"{distance(found[name]) / unit[name]:.2f} x" for name in sets]
            rmse = endpoint_rmse(found[sets[0]][:200], ends[sets[0]][:200])
            rows.append(
                [recipe, seed, settings.iterations, f"{minutes:.1f}", *times, f"{rmse:.3f}"]
            )
            print_table(header, rows)


if __name__ == "__main__":
    run_cli(main)
