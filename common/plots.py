"""Figures, in the same style everywhere.

    figure, axes = new_figure(1, 2, size=(8.6, 3.3))
    axes[0].plot(t, error, **LINES["gmflow"], label="GMFlow")
    save_figure(figure, "curve.png")

Neither pyplot nor a display nor a backend is involved: the MPLBACKEND of a notebook or desktop does
not matter, if matplotlib knows its name or it begins with module://. In a notebook,
`display(figure)` shows a figure.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from common.files import writing

# Colours of Okabe and Ito, which every kind of colour vision tells apart.
BLUE, VERMILION, ORANGE, GREEN = "#0072b2", "#d55e00", "#e69f00", "#009e73"
SKY, PINK, GREY, LIGHT = "#56b4e9", "#cc79a7", "#7f7f7f", "#d0d0d0"

# One colour and one line style for one thing, in every figure.
COLORS = {"teacher": GREY, "gmflow": BLUE, "dx": VERMILION, "data": LIGHT}
STYLES = {"teacher": "--", "gmflow": "-", "dx": "-."}
LINES = {name: {"color": COLORS[name], "linestyle": style} for name, style in STYLES.items()}
DPI = 120
FINE = 200  # dpi of a notebook's figure with four or more panels
STYLE = {
    "font.size": 10,
    "axes.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def new_figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (8.6, 3.3),
    mosaic: Sequence | None = None, **options: Any,
) -> tuple[Figure, Any]:  # fmt: skip
    """A figure of `size` inches and its axes, as `Figure.subplots` or `subplot_mosaic` gives them.

    options: of these functions (sharex, squeeze, width_ratios, ...).
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        if mosaic:
            return figure, figure.subplot_mosaic(mosaic, **options)
        return figure, figure.subplots(rows, columns, **options)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure, atomically; the suffix chooses the format."""
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=DPI)


def plain(text: str) -> str:
    """A user's text as a title or label: dollar signs do not start mathematics."""
    return text.replace("$", r"\$")


# ---- Images --------------------------------------------------------------------------------------


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8 on the CPU, by rounding. Any shape."""
    return images.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def image_rows(
    rows: Mapping[str, Sequence], title: str = "", columns: Sequence[str] = ()
) -> Figure:
    """A labelled row of images for every entry, all of one size; columns: labels on top.

    An image is uint8 (H, W, 1 or 3), or a Tensor (1 or 3, H, W) in [-1, 1].
    """
    count = len(next(iter(rows.values())))
    side = min(2.0, 7.1 / count)  # inches of an image
    figure, axis = new_figure(size=(1.5 + side * count, 0.5 + side * len(rows)))
    _draw_board(axis, rows, columns)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_board(axis: Axes, rows: Mapping[str, Sequence], columns: Sequence[str]) -> None:
    """All images of `image_rows` in one picture, white between, labels at the left and on top."""
    lines = []
    for images in rows.values():
        tiles = [np.pad(_pixels(x), ((1, 1), (1, 1), (0, 0)), constant_values=255) for x in images]
        lines.append(np.concatenate(tiles, axis=1))
    height, width, _ = tiles[0].shape
    axis.imshow(np.concatenate(lines))
    names = [name if "\n" in name else textwrap.fill(name, 18) for name in rows]
    above = [textwrap.fill(name, 12) for name in columns]
    axis.set_yticks([height * (i + 0.5) for i in range(len(names))], names)
    axis.set_xticks([width * (i + 0.5) for i in range(len(above))], above)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    axis.grid(False)
    axis.figure.draw_without_rendering()  # room for these labels takes the layout two passes


def _pixels(image: Tensor | np.ndarray) -> np.ndarray:
    """-> uint8 (H, W, 3)."""
    if isinstance(image, Tensor) and image.dtype != torch.uint8:
        image = to_uint8(image).permute(1, 2, 0)
    pixels = np.asarray(image)
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def save_image_grid(images: Tensor, path: str | Path, columns: int, padding: int = 2) -> None:
    """Writes uint8 images (B, 1 or 3, H, W) as one picture, `columns` in a row, white between."""
    from torchvision.utils import make_grid, save_image

    grid = make_grid(images.float() / 255, nrow=columns, padding=padding, pad_value=1.0)
    with writing(path) as temporary:
        save_image(grid, temporary)


# ---- The plane -----------------------------------------------------------------------------------

# Corners of the color map over noise: left to right from blue to orange, bottom to top from dark
# to light. Two directions that every kind of color vision tells apart.
CORNERS = (((0.00, 0.18, 0.45), (0.45, 0.76, 0.98)), ((0.55, 0.16, 0.02), (1.00, 0.74, 0.22)))


def colors_of(noise: Tensor) -> np.ndarray:
    """A color for every starting noise, which shows pairs. (N, 2) -> (N, 3) in [0, 1]."""
    u, v = torch.special.ndtr(noise.float().cpu()).unbind(1)  # uniform on [0, 1]^2
    shares = torch.stack([1 - u, u], 1)[:, :, None] * torch.stack([1 - v, v], 1)[:, None]
    return torch.einsum("nij,ijc->nc", shares, torch.tensor(CORNERS)).numpy()


def plane(axis: Axes, title: str = "", limit: float = 3.0) -> None:
    """Equal axes on [-limit, limit]^2."""
    ticks = [-2, 0, 2] if limit > 2 else [-1, 0, 1]
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=ticks, yticks=ticks)
    axis.set(xlabel="$x$", ylabel="$y$", title=title)
    axis.grid(False)
    axis.label_outer()


def draw_points(axis: Axes, x: Tensor, colors: Any, title: str = "", size: float = 1.2) -> None:
    """Points of the plane, (N, 2)."""
    axis.scatter(*x.cpu().T, s=size, c=colors, linewidths=0, rasterized=True)
    plane(axis, title)


def draw_paths(axis: Axes, states: Sequence[Tensor], colors: Any, title: str = "") -> None:
    """Trajectories from noise (open) to data (full). states: (n, 2) at every time."""
    paths = torch.stack([state.cpu() for state in states], 1)  #                  (n, steps, 2)
    for path, color in zip(paths, colors, strict=True):
        axis.plot(*path.T, color=color, linewidth=1.2)
    axis.scatter(*paths[:, 0].T, s=14, facecolors="white", edgecolors=colors, zorder=3)
    axis.scatter(*paths[:, -1].T, s=14, c=colors, zorder=3)
    plane(axis, title)


# ---- Notebooks -----------------------------------------------------------------------------------


def notebook_style() -> None:
    """STYLE for every figure of the notebook that calls it, at a size that can be projected."""
    import matplotlib.pyplot as plt

    plt.switch_backend(plt.get_backend())  # else figures without pyplot are shown as text
    more = {"font.size": 13, "figure.dpi": 110, "figure.constrained_layout.use": True}
    plt.rcParams.update(STYLE | more)


def image_board(rows: Mapping[str, Sequence], columns: Sequence[str] = ()) -> None:
    """Shows `image_rows` in a notebook."""
    from IPython.display import display

    display(image_rows(rows, columns=columns))


# ---- The static policy of toy_dit_imagenet.py and toy_qwen.py ------------------------------------

SHOWN = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0)  # noise levels


@torch.no_grad()
def static_policy(teacher, run, reference: Tensor, decode, title: str) -> Figure:
    """Teacher's and policy's trajectory for one noise, as images; their distance; the loss.

    Args: teacher: (x, t) -> u; run: a `common.static_policy.Run`; reference: the teacher's states
        at the times of run.metrics["t"]; decode: latents -> images in [-1, 1].
    """
    times = run.metrics["t"]
    line = LINES[run.metrics["settings"]["policy"]]
    shown = [min(range(len(times)), key=lambda i: abs(times[i] - level)) for level in SHOWN]

    def images(states: Tensor, velocity=None) -> list[Tensor]:
        """Of the states that are shown, or of the x_0 = x - t u that a velocity expects there."""
        found = []
        for i in shown:
            x, t = states[i], states.new_tensor([times[i]])
            if velocity and times[i] > 0:
                x = x - t * velocity(x, t)
            found.append(decode(x)[0])
        return found

    rows = {
        "teacher\n$x_t$": images(reference),
        "policy\n$x_t$": images(run.states),
        "teacher\n$x_0$ estimate": images(reference, teacher),
        "policy\n$x_0$ estimate": images(run.states, run.policy.velocity),
    }
    mosaic = [["board", "board"], ["distance", "loss"]]
    figure, axes = new_figure(size=(8.6, 7.4), mosaic=mosaic, height_ratios=[4, 1.9])
    _draw_board(axes["board"], rows, [f"t = {times[i]:.1f}" for i in shown])
    axes["distance"].plot(times, run.metrics["trajectory_rmse"], **line)
    axes["distance"].set(title="RMSE, policy to teacher", xlabel="noise level t")
    axes["distance"].set(xlim=(1, 0), ylim=(0, None))
    width = min(25, len(run.losses))
    smooth = run.losses.unfold(0, width, 1).mean(1).numpy()
    axes["loss"].plot(range(width - 1, len(run.losses)), smooth, **line)
    axes["loss"].set(title=f"loss, mean of {width}", xlabel="iteration", yscale="log")
    figure.suptitle(title, fontsize=11)
    return figure


def policy_sizes(runs: Sequence[Mapping], title: str) -> Figure:
    """Endpoint PSNR over the size of the policy. runs: rows of `common.static_policy.run_sweep`."""
    figure, axis = new_figure(size=(7.0, 3.8))
    labels = {"gmflow": "GMFlow, K components", "dx": "DX, N grid points"}
    for policy, label in labels.items():
        psnr = {run["size"]: run["endpoint_psnr_db"] for run in runs if run["policy"] == policy}
        axis.plot(psnr.keys(), psnr.values(), marker="o", **LINES[policy], label=label)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(title=title, xlabel="size of the policy, K or N", ylabel="endpoint PSNR (dB)")
    axis.legend()
    return figure
