"""Draws the pictures of method.md, and the one of text_to_image/README.md: python -m docs.figures

The last needs requirements-extra.txt.
"""

import argparse
from pathlib import Path

import torch

from common.plots import (
    BLUE,
    COLORS,
    GREEN,
    LIGHT,
    LINES,
    image_rows,
    new_figure,
    save_figure,
)
from common.teachers import guided_velocity, integrate_teacher
from piflow_minimal import rollout
from toy_2d import Settings, make_density, train

FOLDER = Path(__file__).parent
WORDS = (
    "a patterned dress", "a printed t-shirt", "a patterned shirt", "a printed pullover",
    "a patterned bag", "a patterned coat", "a white sneaker", "a dark boot",
)  # fmt: skip


def segment() -> None:
    """One segment of raw time: source, rollout of the detached policy, queries, window, end."""
    figure, axis = new_figure(size=(8.6, 3.0))
    axis.set(xlim=(1.06, -0.06), ylim=(-1.5, 2.1))
    axis.set_xlabel(r"raw time $\tau$ (1 is noise, 0 is data)")
    axis.set(yticks=[], xticks=[1, 0.75, 0.5, 0.25, 0])
    axis.spines["left"].set_visible(False)
    axis.grid(False)
    source, end, queries, window = 0.75, 0.25, (0.62, 0.42), 0.06
    axis.plot([1, 0], [0, 0], color="0.8", linewidth=2)
    axis.plot([source, end], [0, 0], color=BLUE, linewidth=4, solid_capstyle="butt")
    for i in range(17):
        tau = source + (end - source) * i / 16
        axis.plot([tau, tau], [-0.1, 0.1], color=BLUE, linewidth=1)
    text = {"ha": "center", "fontsize": 10}
    axis.annotate(
        r"$x_{src}$: the network" "\nis evaluated once", (source, 0.12), (source + 0.1, 1.1),
        arrowprops={"arrowstyle": "->"}, **text,
    )  # fmt: skip
    axis.annotate(
        r"$x_{dst}$: end of the" "\nsegment", (end, 0.12), (end - 0.1, 1.1),
        arrowprops={"arrowstyle": "->"}, **text,
    )  # fmt: skip
    for m, tau in enumerate(queries, 1):
        axis.plot(tau, 0, "o", color=GREEN, markersize=8, zorder=3)
        axis.plot([tau, tau - window], [0.3, 0.3], color=GREEN, linewidth=3)
        label = rf"query {m} at $\tau_{m}$"
        axis.text(tau, -0.62, label, color=GREEN, **text)
    axis.text(0.52, 0.45, "micro-window", color=GREEN, **text)
    compared = "the teacher's velocity and the policy's (with gradient)\nare compared at each query"
    axis.text(0.5, 1.55, compared, color=GREEN, **text)
    substeps = "substeps of the detached policy: no network, no gradient"
    axis.text(0.5, -1.2, substeps, color=BLUE, **text)
    save_figure(figure, FOLDER / "segment.png")


@torch.no_grad()
def arrows() -> None:
    """One rollout of a student after 60 iterations, with both velocities at two queried states."""
    density = make_density("checkerboard")
    settings = Settings(iterations=60, batch=256, components=8, device="cpu")
    with torch.enable_grad():
        student = train(density, settings)
    noise = torch.tensor([[0.88, 2.34]])
    policy = student(noise, torch.ones(1))
    paths = {"teacher": [], "gmflow": []}
    keep = {name: (lambda i, t, x, p=path: p.append(x)) for name, path in paths.items()}
    integrate_teacher(density.velocity, noise, 128, callback=keep["teacher"])
    rollout(policy, noise, 1.0, 0.0, callback=keep["gmflow"])

    figure, axis = new_figure(size=(7.6, 4.4))
    data = density.sample(12000, torch.Generator().manual_seed(0))
    axis.scatter(*data.T, s=2, color=LIGHT, rasterized=True, label="data")
    names = {"teacher": "teacher's trajectory", "gmflow": "rollout of the policy"}
    for kind, name in names.items():
        x = torch.cat(paths[kind])
        axis.plot(*x.T, **LINES[kind], linewidth=2, label=name)
        axis.plot(*x[-1], "o", color=COLORS[kind], markersize=7)
    axis.plot(*noise[0], "o", color="white", markeredgecolor="black", markersize=9, label="noise")
    for level, place in ((0.6, (-58, -2)), (0.3, (-4, -18))):
        x = paths["gmflow"][round((1 - level) * 128)]
        t = torch.tensor([level])
        axis.plot(*x[0], "o", color="black", markersize=6, zorder=5)
        axis.annotate(f"t = {level}", x[0].tolist(), place, textcoords="offset points")
        for kind, velocity in (("teacher", density.velocity), ("gmflow", policy.velocity)):
            ahead = (x - t * velocity(x, t))[0].tolist()  # where it points: x_0 = x - t u
            arrow = {"arrowstyle": "-|>", "color": COLORS[kind], "linewidth": 2, "shrinkA": 0}
            axis.annotate("", ahead, x[0].tolist(), zorder=4, arrowprops=arrow)
    axis.plot([], [], "o", color="black", markersize=6, label="queried states")
    axis.plot([], [], color=COLORS["teacher"], linewidth=2, label="$-t\\,u$ of the teacher")
    axis.plot([], [], color=COLORS["gmflow"], linewidth=2, label="$-t\\,u$ of the policy")
    axis.set(xlim=(0.4, 2.9), ylim=(1.3, 2.55), aspect="equal", xlabel="$x$", ylabel="$y$")
    axis.grid(False)
    axis.legend(loc="upper right")
    save_figure(figure, FOLDER / "rollout.png")


@torch.no_grad()
def words() -> None:
    """The shipped adapters of the small text-to-image model beside the model's own Euler steps.

    The same noises; rows ordered by network evaluations (a step with guidance takes two), each with
    its endpoint RMSE to 50 steps over these prompts.
    """
    from text_to_image.families import FAMILIES, SHIFT, unpack
    from text_to_image.generate import load
    from text_to_image.tiny import GUIDANCE, fashion_pipeline

    pipe, qwen = fashion_pipeline(), FAMILIES["qwen"]
    both = qwen.encode_prompts(pipe, [*WORDS, *[""] * len(WORDS)])

    def teacher(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        twice = torch.cat([x, x])
        u = unpack(qwen.evaluate(pipe.transformer, twice, torch.cat([t, t]), both), twice)
        return guided_velocity(*u.chunk(2), GUIDANCE, t)

    def steps(count: int) -> torch.Tensor:
        return integrate_teacher(teacher, noise, count, SHIFT)

    def adapter(model: str) -> torch.Tensor:
        generate = load(model, tiny=True, device="cpu")
        return generate(WORDS, batch=len(WORDS), output="latent").latents

    seeds = (torch.Generator().manual_seed(i) for i in range(len(WORDS)))
    noise = torch.stack([torch.randn(4, 14, 14, generator=seed) for seed in seeds])
    target = steps(50)
    ends = {
        "2 evaluations:\n1 Euler step": steps(1),
        "4 evaluations:\n2 Euler steps": steps(2),
        "4 evaluations:\ngm-qwen adapter": adapter("gm-qwen"),
        "4 evaluations:\ndx-qwen adapter": adapter("dx-qwen"),
        "8 evaluations:\n4 Euler steps": steps(4),
        "100 evaluations:\n50 Euler steps": target,
    }
    rows = {}
    for name, x in ends.items():
        rmse = (x - target).square().mean().sqrt().item()
        rows[f"{name}\nRMSE {rmse:.2f}"] = qwen.decode(pipe, x)
    figure = image_rows(rows, columns=[text.removeprefix("a ") for text in WORDS])
    save_figure(figure, FOLDER.parent / "assets" / "tiny_text.png")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    segment()
    arrows()
    words()
