"""Quality against time of the two toys, to see whether their defaults sit at the knee.

    python -m benchmarks.toys                 # ten minutes on two CPU cores, one thread
    python -m benchmarks.toys --quick         # a fraction of every run: does it work?

toy_2d.py (checkerboard, 1-NFE) over iterations, beside plain regression: the same network, batch
and number of teacher evaluations, but these are spent on whole walks of the teacher, 64 Euler steps
each, whose ends the network learns from their noises. And toy_dit_imagenet.py (tiny teacher, ankle
boot) over iterations. One seed; both beside one Euler step of the teacher. Draws --out/toys.png.
"""

import argparse
import dataclasses
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import print_table
from common.cli import one_thread, run_cli
from common.plots import save_figure
from common.static_policy import psnr_db, run_fit, teacher_trajectory
from common.teachers import endpoint_rmse, integrate_teacher
from imagenet import fashion
from imagenet.checkpoints import load_dit
from imagenet.dit import guided_teacher
from toy_2d import Settings, Student, energy_distance, make_density, student_sample, train
from toy_dit_imagenet import PRESETS, fit

TINY = PRESETS["tiny"]
BATCH, LR = Settings.batch, Settings.lr
POINTS = 10_000  # noises that the metrics are taken over
PLANE = (250, 500, 1000, 2000, 4000)  # iterations
STATIC = (150, 300, 600, 1200, 2400)  # 1200 is the default


def regress(density, iters: int) -> tuple[Student, float]:
    """Plain regression of the teacher's endpoint. -> the network, seconds."""
    torch.manual_seed(0)
    start = time.perf_counter()
    noise = torch.randn(max(1, 2 * BATCH * iters // 64), 2)  # two evaluations per sample, as pi-ID
    end = integrate_teacher(density.velocity, noise, 64)
    student = Student("dx", 1)  # a constant x0_hat: the network's output is the end point
    adam = torch.optim.Adam(student.parameters(), lr=LR, betas=(0.9, 0.99))
    for i in range(iters):
        rows = torch.randint(len(noise), (BATCH,))
        x_0 = student(noise[rows], torch.ones(BATCH)).x0_hat(1.0)
        adam.zero_grad()
        (x_0 - end[rows]).square().mean().backward()
        adam.param_groups[0]["lr"] = LR * (1 + math.cos(math.pi * i / iters)) / 2
        adam.step()
    return student.eval().requires_grad_(False), time.perf_counter() - start


def plane(iterations: tuple[int, ...]) -> list[tuple[str, int, float, float, float]]:
    """(method, iterations, seconds, endpoint RMSE, energy distance) on the checkerboard."""
    density, generator = make_density("checkerboard"), torch.Generator().manual_seed(1)
    noise, data = torch.randn(POINTS, 2, generator=generator), density.sample(POINTS, generator)
    target = integrate_teacher(density.velocity, noise, 64, solver="heun")

    def row(method: str, iters: int, seconds: float, x_0: Tensor) -> tuple:
        return method, iters, seconds, endpoint_rmse(x_0, target), energy_distance(x_0, data)

    rows = [row("one Euler step", 0, 0.0, integrate_teacher(density.velocity, noise, 1))]
    for iters in iterations:
        for method in ("gmflow", "dx"):
            start = time.perf_counter()
            student = train(density, Settings(policy=method, iterations=iters, device="cpu"))
            seconds = time.perf_counter() - start
            rows.append(row(method, iters, seconds, student_sample(student, noise)))
        student, seconds = regress(density, iters)
        x_0 = student_sample(student, noise, solver="euler", total_substeps=1)
        rows.append(row("regression", iters, seconds, x_0))
    return sorted(rows, key=lambda row: (row[0], row[1]))


def static(iterations: tuple[int, ...]) -> list[tuple[str, int, float, float]]:
    """(method, iterations, seconds, endpoint PSNR in dB) on one trajectory of the tiny teacher."""
    net = load_dit(fashion.TEACHER).requires_grad_(False)
    teacher = guided_teacher(net, torch.tensor([9]), 2.5, (0.0, 0.8))
    noise = torch.randn(1, 4, 14, 14, generator=torch.Generator().manual_seed(42))
    reference = teacher_trajectory(teacher, noise, TINY.teacher_steps)
    euler = noise - teacher(noise, torch.ones(1))
    first = psnr_db(fashion.to_images(euler), fashion.to_images(reference[-1]))
    rows = [("one Euler step", 0, 0.0, first)]
    for iters in iterations:
        settings = dataclasses.replace(TINY, iterations=iters)
        metrics = run_fit(fit, teacher, reference, fashion.to_images, settings).metrics
        rows.append(("gmflow, K = 32", iters, metrics["seconds"], metrics["endpoint_psnr_db"]))
    return rows


def draw(path: Path, of_plane: list, of_static: list) -> None:
    """Both curves over seconds; the ring marks the default."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.3), layout="constrained")
    for method, color in (("gmflow", "#0072b2"), ("dx", "#d55e00"), ("regression", "0.45")):
        rows = [row for row in of_plane if row[0] == method]
        left.loglog([r[2] for r in rows], [r[3] for r in rows], ".-", color=color, label=method)
        at = [row for row in rows if row[1] == Settings.iterations and method != "regression"]
        left.scatter([r[2] for r in at], [r[3] for r in at], 70, "none", edgecolors=color)
    left.set(xlabel="seconds of training", ylabel="endpoint RMSE", title="toy_2d.py, checkerboard")
    left.legend(frameon=False)
    rows = of_static[1:]
    right.semilogx([r[2] for r in rows], [r[3] for r in rows], ".-", color="#0072b2")
    at = [row for row in rows if row[1] == 1200]
    right.scatter([r[2] for r in at], [r[3] for r in at], 70, "none", edgecolors="#0072b2")
    right.set(xlabel="seconds of fitting", ylabel="endpoint PSNR (dB)")
    right.set_title("toy_dit_imagenet.py, K = 32")
    for axis in (left, right):
        axis.grid(alpha=0.25, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, dpi=100)


@one_thread()
def main(argv: list[str] | None = None) -> None:
    """Prints both tables and draws both curves."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a twentieth of the iterations")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="a folder")
    args = parser.parse_args(argv)
    part = 20 if args.quick else 1
    of_plane = plane(tuple(n // part for n in PLANE))
    print_table(
        ["toy_2d.py", "iterations", "seconds", "endpoint RMSE", "energy distance"],
        [[m, n, f"{s:.1f}", f"{rmse:.3f}", f"{ed:.4f}"] for m, n, s, rmse, ed in of_plane],
    )
    of_static = static(tuple(n // part for n in STATIC))
    print_table(
        ["toy_dit_imagenet.py", "iterations", "seconds", "endpoint PSNR (dB)"],
        [[m, n, f"{s:.1f}", f"{db:.1f}"] for m, n, s, db in of_static],
    )
    draw(args.out / "toys.png", of_plane, of_static)
    print(f"written to {args.out}/toys.png")


if __name__ == "__main__":
    run_cli(main)
