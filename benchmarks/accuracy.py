"""How many substeps a trained policy needs: error at the end over substeps, for every solver.

    python -m benchmarks.accuracy                                   # a minute on two CPU cores
    python -m benchmarks.accuracy outputs/tiny-dx/student.safetensors

The policies: two students of toy_2d.py, trained here for --iters iterations, the student that ships
in assets/, and any other tiny student whose file is named. The error is the root mean square
distance to where the same policy leads in the limit (deis with 4096 substeps; the closed form for
DX), from the same noises, after one network evaluation.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import print_table
from common.cli import keep_freed_memory, run_cli
from imagenet import fashion
from imagenet.checkpoints import load_dit
from imagenet.dit import dit_student
from piflow_minimal import DXPolicy, Policy, rollout
from toy_2d import Settings, make_density, train

STUDENT = fashion.ASSETS / "tiny_student.safetensors"
SUBSTEPS = (4, 8, 16, 32, 64, 128, 256)
LIMIT = 4096  # substeps that stand for infinitely many


def policy_of_toy(kind: str, iters: int) -> Policy:
    """A student of the checkerboard, asked at 2000 noises."""
    settings = Settings(policy=kind, iterations=iters, device="cpu")
    student = train(make_density("checkerboard"), settings)
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))
    return student(noise, torch.ones(2000))


def policy_of_file(path: Path) -> Policy:
    """A tiny DiT student, asked at 40 noises, four of every class."""
    net = load_dit(path)
    if net.config.num_classes != len(fashion.CLASSES):
        raise ValueError(f"{path} has {net.config.num_classes} classes; give a tiny student")
    shape = (40, net.config.channels, net.config.latent_size, net.config.latent_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return dit_student(net, torch.arange(40) % 10)(noise, torch.ones(40))


def errors(policy: Policy) -> dict[str, list[float]]:
    """solver -> the errors for each of SUBSTEPS."""

    def walk(**options) -> Tensor:
        return rollout(policy, policy.x_src, 1.0, 0.0, **options)

    dx = isinstance(policy, DXPolicy)
    limit = walk(solver="exact") if dx else walk(total_substeps=LIMIT, solver="deis")
    found = {
        solver: [
            (walk(total_substeps=n, solver=solver) - limit).square().mean().sqrt().item()
            for n in SUBSTEPS
        ]
        for solver in ("euler", "deis")
    }
    return found | ({"exact": [0.0] * len(SUBSTEPS)} if dx else {})


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Prints one table, and for how few substeps each solver is as good as Euler with 128."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("students", nargs="*", type=Path, default=[], help="more tiny students")
    parser.add_argument("--iters", type=int, default=800, help="of training, for toy_2d.py")
    args = parser.parse_args(argv)
    if args.iters < 1:
        raise ValueError(f"--iters is {args.iters}; it must be at least 1")
    keep_freed_memory()
    policies = {path.stem: policy_of_file(path) for path in (STUDENT, *args.students)}
    with torch.enable_grad():
        toys = {f"toy_2d {kind}": policy_of_toy(kind, args.iters) for kind in ("gmflow", "dx")}
    rows = []
    for name, policy in (toys | policies).items():
        found = errors(policy)
        published = found["euler"][SUBSTEPS.index(128)]
        for solver, values in found.items():
            enough = [n for n, e in zip(SUBSTEPS, values, strict=True) if e <= published]
            few = "1" if solver == "exact" else str(enough[0]) if enough else "-"
            rows.append([f"{name} {solver}", *(f"{value:.1e}" for value in values), few])
    print("RMS error at the end over substeps; last: substeps for the accuracy of Euler with 128")
    print_table(["", *map(str, SUBSTEPS), "as good"], rows)


if __name__ == "__main__":
    run_cli(main)
