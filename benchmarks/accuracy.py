"""Substeps against accuracy: how far the rollout of a trained policy is from the converged one.

    python -m benchmarks.accuracy                                   # some minutes on one CPU core
    python -m benchmarks.accuracy --students outputs/tiny-dx/student.safetensors

Policies: two students of toy_2d.py, trained here for --iterations, the student in assets/, and any
other tiny student that is named. Reference: the closed form for DX, else deis with 4096 substeps.
RMS distances of two kinds: `end`, at the end of a rollout from t = 1 to 0; `through`, over the end
and two states on the way, at random times of each sample, as the loss rolls out.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import print_table
from common import fashion
from common.cli import keep_freed_memory, parse, run_cli, setting
from common.teachers import endpoint_rmse
from imagenet.checkpoints import load_dit
from imagenet.dit import dit_student
from piflow_minimal import DXPolicy, Policy, rollout
from toy_2d import Settings as ToySettings
from toy_2d import make_density, train

STUDENT = fashion.ASSETS / "tiny_student.safetensors"
SUBSTEPS = (4, 8, 12, 16, 32, 64, 128, 256)
PUBLISHED = 128  # Euler substeps
LIMIT = 4096  # substeps that stand for infinitely many


@dataclass(frozen=True)
class Settings:
    """Flags of the benchmark."""

    students: tuple[Path, ...] = setting((), "files of more tiny students")
    iterations: int = setting(800, "training iterations of the two students of toy_2d.py", low=1)


def toy_policy(kind: str, iterations: int) -> Policy:
    """A student of the checkerboard, evaluated at 2000 noises."""
    settings = ToySettings(policy=kind, iterations=iterations, device="cpu")
    student = train(make_density("checkerboard"), settings)
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))
    return student(noise, torch.ones(2000))


def file_policy(path: Path) -> Policy:
    """A tiny DiT student, evaluated at 40 noises, four of every class."""
    net = load_dit(path)
    if net.config.num_classes != len(fashion.CLASSES):
        raise ValueError(f"{path} has {net.config.num_classes} classes; it must be a tiny student")
    shape = (40, net.config.channels, net.config.latent_size, net.config.latent_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return dit_student(net, torch.arange(40) % 10)(noise, torch.ones(40))


def errors(policy: Policy) -> dict[tuple[str, str], list[float]]:
    """(solver, "end" or "through") -> the errors for each of SUBSTEPS."""
    generator, size = torch.Generator().manual_seed(2), (2, len(policy.x_src))
    tau = torch.rand(size, generator=generator).sort(0, descending=True).values

    def follow(solver: str, n: int) -> tuple[Tensor, Tensor]:
        options = {"total_substeps": n, "solver": solver}
        x_0, states = rollout(policy, policy.x_src, 1.0, 0.0, through=tau, **options)
        return rollout(policy, policy.x_src, 1.0, 0.0, **options), torch.stack([x_0, *states])

    dx = isinstance(policy, DXPolicy)
    limit = follow("exact", 1) if dx else follow("deis", LIMIT)
    found = {}
    for solver in ("euler", "deis"):
        both = [follow(solver, n) for n in SUBSTEPS]
        for part, name in enumerate(("end", "through")):
            found[solver, name] = [endpoint_rmse(x[part], limit[part]) for x in both]
    return found


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Prints one table, and for how few substeps each solver is as good as the published Euler."""
    settings = parse(Settings, __doc__, argv)
    keep_freed_memory()
    policies = {path.stem: file_policy(path) for path in (STUDENT, *settings.students)}
    with torch.enable_grad():
        for kind in ("gmflow", "dx"):
            policies[f"toy_2d {kind}"] = toy_policy(kind, settings.iterations)
    rows = []
    for name, policy in policies.items():
        found = errors(policy)
        for (solver, part), values in found.items():
            published = found["euler", part][SUBSTEPS.index(PUBLISHED)]
            enough = next((n for n, e in zip(SUBSTEPS, values, strict=True) if e <= published), "-")
            rows.append([f"{name} {solver} {part}", *(f"{value:.1e}" for value in values), enough])
    print("RMS distance to the converged rollout; last column: substeps as good as Euler with 128")
    print_table(["", *map(str, SUBSTEPS), "as good"], rows)


if __name__ == "__main__":
    run_cli(main)
