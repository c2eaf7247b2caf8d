"""Draws the moving picture of the README and its still for print: python -m docs.moving_picture

Left the teacher moves a point by 128 network calls; right one call, its policy, the same place.
Writes assets/policy.gif and assets/policy.png.
"""

import argparse
import io
from pathlib import Path

import torch
from matplotlib.patches import Circle, Rectangle
from PIL import Image

from common.files import writing
from common.plots import BLUE, GREY, colors_of, new_figure
from common.teachers import integrate_teacher
from docs.explorer import ASSETS, load
from piflow_minimal import rollout
from toy_2d import make_density

NOISE = torch.tensor([[2.0, -2.4]])
STEPS = 128  # of the teacher, and substeps of the policy
LIMIT = 2.8
FRAMES_PER_SECOND = 12.5
# Seconds: the network is called, its discs unfold, its arrows appear, the points move, they arrive.
CALL, ARROWS, MOVE, ARRIVE, END = 0.8, 1.8, 2.4, 6.2, 8.0
STILL = 4.4  # the second that is printed


def share(now: float, begin: float, end: float) -> float:
    """How far from begin to end, in [0, 1]."""
    return min(max((now - begin) / (end - begin), 0.0), 1.0)


class Scene:
    """Both trajectories, and what the policy says at any state."""

    def __init__(self):
        self.density = make_density("checkerboard")
        self.teacher, self.student = [], []
        integrate_teacher(
            self.density.velocity, NOISE, STEPS, callback=lambda i, t, x: self.teacher.append(x[0])
        )
        student = load("gmflow")
        policy = student(NOISE, torch.ones(1))
        rollout(
            policy, NOISE, 1.0, 0.0, total_substeps=STEPS,
            callback=lambda i, tau, x: self.student.append(x[0]),
        )  # fmt: skip
        means, _, self.logweights = policy.mixture
        self.points = NOISE - means[0]  #                                          (K, 2)
        self.variance = policy.var.flatten()
        self.colors = colors_of(self.points)
        line = torch.linspace(-LIMIT, LIMIT, 15)
        self.grid = torch.cartesian_prod(line, line)  #                            (225, 2)
        size = len(self.grid)
        self.policy_of_grid = student(NOISE.expand(size, 2), torch.ones(size))

    def weights(self, x: torch.Tensor, t: float) -> torch.Tensor:
        """The components' weights at (x, t), by Bayes' rule from t_src = 1. x: (2,) -> (K,)."""
        alpha = 1 - t
        zeta = (alpha / t) ** 2
        evidence = self.points @ (alpha * x / t**2) - zeta * self.points.square().sum(1) / 2
        return (self.logweights.flatten() + evidence / (1 + self.variance * zeta)).softmax(0)

    def field(self, t: float) -> torch.Tensor:
        """Arrows along -u on the grid, of length at most 1. -> (225, 2)."""
        move = -self.policy_of_grid.velocity(self.grid, t)
        speed = move.norm(dim=1, keepdim=True)
        return move / speed.clamp(min=1e-6) * (0.25 + speed / 4).clamp(max=1)


def draw_frame(scene: Scene, now: float, dpi: int) -> Image.Image:
    """The picture at a second in [0, END]."""
    figure, axes = new_figure(1, 2, (8.6, 4.75))
    moved = share(now, CALL, ARRIVE)
    left, right = axes
    draw_plane(left)
    draw_plane(right)
    calls = round(moved * STEPS)
    left.set_title(f"teacher: {calls} network call{'s' * (calls != 1)}", fontsize=15, color=GREY)
    draw_path(left, scene.teacher, calls, GREY)

    called = int(now >= CALL)
    right.set_title(f"student: {called} network call{'s' * (called != 1)}", fontsize=15, color=BLUE)
    substep = round(share(now, MOVE, ARRIVE) * STEPS)
    if called:
        draw_policy(right, scene, now, substep)
    draw_path(right, scene.student, substep, BLUE)
    words = "noise"
    if called:
        words = "its output is a policy: 16 points with weights"
    if now >= ARROWS:
        words = "which give a velocity everywhere, at every t"
    if substep:
        words = f"{substep} substeps, no further call"
    if now >= ARRIVE:
        words = "the same place (square: the teacher)"
        end = {"color": "white", "markeredgecolor": GREY, "markersize": 19, "zorder": 4.5}
        right.plot(*scene.teacher[-1], "s", markeredgewidth=3, **end)
    right.set_xlabel(words, fontsize=13, color=BLUE)
    left.set_xlabel("a call for each step" if calls else "noise", fontsize=13, color=GREY)
    memory = io.BytesIO()
    figure.savefig(memory, dpi=dpi)
    return Image.open(memory).convert("RGB")


def draw_plane(axis) -> None:
    """The frame and the squares of the data."""
    axis.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal", xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_color("0.8")
    for ix in range(4):
        for iy in range(4):
            if (ix + iy) % 2 == 0:
                axis.add_patch(Rectangle((ix - 2, iy - 2), 1, 1, color="0.91", zorder=0))


def draw_path(axis, states: list[torch.Tensor], reached: int, color: str) -> None:
    """The noise (open), the states until now, the point (full)."""
    axis.plot(*states[0], "o", color="white", markeredgecolor=color, markersize=11, zorder=4.2)
    axis.plot(*torch.stack(states[: reached + 1]).T, color=color, linewidth=3, zorder=4)
    axis.plot(*states[reached], "o", color=color, markeredgecolor="white", markersize=12, zorder=5)


def draw_policy(axis, scene: Scene, now: float, substep: int) -> None:
    """Discs of the components, from the noise to their places; arrows; the flash of the call."""
    unfolded = share(now, CALL, ARROWS) ** 0.5
    t = max(1 - substep / STEPS, 1 / STEPS)
    weights = scene.weights(scene.student[substep], t)
    places = NOISE + unfolded * (scene.points - NOISE)
    for place, weight, color in zip(places, weights, scene.colors, strict=True):
        radius = max(0.55 * float(weight) ** 0.5, 0.03)
        axis.add_patch(Circle(place.tolist(), radius, facecolor=(*color, 0.6), edgecolor="0.2"))
    flash = share(now, CALL, CALL + 0.6)
    if flash < 1:
        ring = Circle(NOISE[0].tolist(), 0.15 + flash, fill=False, edgecolor=BLUE, linewidth=4)
        ring.set_alpha(1 - flash)
        axis.add_patch(ring)
    visible = share(now, ARROWS, MOVE)
    if visible:
        axis.quiver(
            *scene.grid.T, *scene.field(t).T, color="0.35", alpha=visible, scale=19, width=0.004,
            pivot="mid", zorder=2,
        )  # fmt: skip


def save_gif(frames: list[Image.Image], path: Path) -> None:
    """One palette for all frames, so that what stands still costs nothing."""
    width, height = frames[0].size
    sheet = Image.new("RGB", (width, 4 * height))
    for i in range(4):
        sheet.paste(frames[(i + 1) * len(frames) // 4 - 1], (0, i * height))
    palette = sheet.quantize(64)
    paletted = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    options = {"duration": round(1000 / FRAMES_PER_SECOND), "loop": 0, "optimize": False}
    with writing(path) as temporary:
        paletted[0].save(temporary, save_all=True, append_images=paletted[1:], **options)


@torch.no_grad()
def main() -> None:
    """Writes assets/policy.gif and assets/policy.png."""
    scene = Scene()
    seconds = [i / FRAMES_PER_SECOND for i in range(round(END * FRAMES_PER_SECOND))]
    save_gif([draw_frame(scene, now, dpi=100) for now in seconds], ASSETS / "policy.gif")
    with writing(ASSETS / "policy.png") as temporary:
        draw_frame(scene, STILL, dpi=220).quantize(128).save(temporary, optimize=True)
    for name in ("policy.gif", "policy.png"):
        print(f"wrote assets/{name}, {(ASSETS / name).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
