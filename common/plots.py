"""Figures, in the same style everywhere.

    figure, axes = new_figure(1, 2, size=(8.6, 3.3))
    axes[0].plot(x, y, color=COLORS["gmflow"])
    save_figure(figure, "curve.png")

Figures have an Agg canvas of their own: neither pyplot nor a display nor MPLBACKEND is involved, so
that the setting of a notebook or desktop cannot end a script. `display(figure)` shows one there.
"""

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from common.cli import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of Okabe and Ito, which every kind of colour vision tells apart.
BLUE, VERMILION, ORANGE, GREEN = "#0072b2", "#d55e00", "#e69f00", "#009e73"
SKY, PINK, GREY = "#56b4e9", "#cc79a7", "#7f7f7f"
COLORS = {"gmflow": BLUE, "dx": VERMILION, "teacher": GREY}
DPI = 120
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def new_figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (8.6, 3.3), **options: Any
) -> tuple["Figure", Any]:
    """A figure of `size` inches and its axes, as `Figure.subplots` returns them.

    options: of `Figure.subplots` (sharex, squeeze, gridspec_kw, ...). rows=0: no axes, None.
    """
    matplotlib = _matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.subplots(rows, columns, **options) if rows else None


def _matplotlib() -> ModuleType:
    """matplotlib, also where MPLBACKEND names a backend that is not installed."""
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    import matplotlib

    if backend:
        os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend  # for the pyplot of a notebook
    return matplotlib


def save_figure(figure: "Figure", path: str | Path, dpi: int = DPI) -> None:
    """Writes a figure, atomically; the suffix chooses the format."""
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=dpi)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8 on the CPU, by rounding. Any shape."""
    return images.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def show_image(axis: "Axes", image: Tensor | np.ndarray, title: str = "") -> None:
    """One image without ticks: uint8 (H, W, 1 or 3), or a Tensor (1 or 3, H, W) in [-1, 1]."""
    if isinstance(image, Tensor) and image.dtype != torch.uint8:
        image = to_uint8(image).permute(1, 2, 0)
    axis.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=255)
    axis.set(title=title, xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)


def image_rows(rows: Mapping[str, Sequence], title: str = "") -> "Figure":
    """A labelled row of images for every entry; what an image may be: see `show_image`."""
    count = len(next(iter(rows.values())))
    size = (8.6, 0.4 + 8.6 / count * 1.05 * len(rows) + 0.22 * len(rows))
    figure, axes = new_figure(len(rows), count, size, squeeze=False)
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            show_image(axis, image)
        place = {"transform": line[0].transAxes, "va": "bottom"}
        line[0].text(0, 1.04, label, **place).set_in_layout(False)  # it may be wider than an image
    figure.get_layout_engine().set(h_pad=0.14)  # inches, room for the labels
    figure.suptitle(title, fontsize=11)
    return figure


def save_image_grid(images: Tensor, path: str | Path, columns: int, padding: int = 2) -> None:
    """Writes uint8 images (B, 1 or 3, H, W) as one picture, `columns` in a row, white between."""
    from torchvision.utils import make_grid, save_image

    grid = make_grid(images.float() / 255, nrow=columns, padding=padding, pad_value=1.0)
    with atomic(path) as temporary:
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


def plane(axis: "Axes", title: str = "", limit: float = 3.0) -> None:
    """Equal axes on [-limit, limit]^2."""
    ticks = [-2, 0, 2] if limit > 2 else [-1, 0, 1]
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=ticks, yticks=ticks)
    axis.set(xlabel="$x$", ylabel="$y$", title=title)
    axis.grid(False)
    axis.label_outer()


def draw_points(axis: "Axes", x: Tensor, colors: Any, title: str = "", size: float = 1.2) -> None:
    """Points of the plane, (N, 2)."""
    axis.scatter(*x.cpu().T, s=size, c=colors, linewidths=0, rasterized=True)
    plane(axis, title)


def draw_paths(axis: "Axes", states: Sequence[Tensor], colors: Any, title: str = "") -> None:
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
    plt.rcParams.update(STYLE | {"figure.dpi": 110, "figure.constrained_layout.use": True})


def image_board(rows: Mapping[str, Tensor], columns: Sequence[str] = ()) -> None:
    """A labelled line of images, (n, 1, H, W) in [-1, 1], for every entry, in one picture."""
    import matplotlib.pyplot as plt

    board = torch.stack(list(rows.values()))[:, :, 0]  #                          (lines, n, H, W)
    board = torch.nn.functional.pad(board, (1, 1, 1, 1), value=1.0)
    lines, count, height, width = board.shape
    size = min(0.95, 4.5 / lines)  # inches of an image
    figure, axis = plt.subplots(figsize=(2.2 + size * count, 0.4 + size * lines))
    board = board.permute(0, 2, 1, 3).flatten(2, 3).flatten(0, 1)
    axis.imshow(board, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    axis.set_yticks([height * (i + 0.5) for i in range(lines)], list(rows))
    axis.set_xticks([width * (i + 0.5) for i in range(len(columns))], list(columns))
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    axis.grid(False)
    plt.show()


def draw_field(axis: "Axes", velocity, t: float, limit: float = 3.0, color: Any = GREY) -> None:
    """Unit arrows along -u on [-limit, limit]^2: where a state at noise level t is about to move.

    velocity: (x (B, 2), t (B,)) -> u (B, 2).
    """
    line = torch.linspace(-limit, limit, 17)
    x = torch.cartesian_prod(line, line)  #                                       (289, 2)
    u = velocity(x, torch.full((len(x),), t))
    move = -u / u.norm(dim=1, keepdim=True).clamp(min=1e-6)
    axis.quiver(*x.T, *move.T, color=color, scale=26, width=0.004)


# ---- The static policy of toy_dit_imagenet.py and toy_qwen.py ------------------------------------

SHOWN = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0)  # noise levels


@torch.no_grad()
def static_policy(teacher, run, reference: Tensor, decode, title: str) -> "Figure":
    """Teacher's and policy's trajectory for one noise, images of both; their distance; the loss.

    Args: teacher: (x, t) -> u; run: a `common.static_policy.Run`; reference: the teacher's states
        at the times of run.metrics["t"]; decode: latents -> images in [-1, 1].
    """
    t, color = run.metrics["t"], COLORS[run.metrics["settings"]["policy"]]
    columns = [min(range(len(t)), key=lambda i: abs(t[i] - level)) for level in SHOWN]
    rows = {
        "teacher\n$x_t$": (reference, None),
        "policy\n$x_t$": (run.states, None),
        "teacher\n$x_0$ estimate": (reference, teacher),
        "policy\n$x_0$ estimate": (run.states, run.policy.velocity),
    }
    figure, _ = new_figure(0, 0, (8.6, 8.0))
    grid = figure.add_gridspec(5, len(columns), height_ratios=[1, 1, 1, 1, 2.0])
    for i, (label, (states, velocity)) in enumerate(rows.items()):
        for j, index in enumerate(columns):
            x, level = states[index], states.new_tensor([t[index]])
            if velocity and t[index] > 0:
                x = x - t[index] * velocity(x, level)
            axis = figure.add_subplot(grid[i, j])
            show_image(axis, decode(x)[0], f"t = {t[index]:.1f}" if i == 0 else "")
            if j == 0:
                axis.set_ylabel(label)

    with _matplotlib().rc_context(STYLE):
        parts = grid[4, :].subgridspec(1, 3)
        left, middle, right = (figure.add_subplot(part) for part in parts)
    show_image(left, decode(run.states[-1])[0], "|endpoint difference|")
    difference = (decode(run.states[-1]) - decode(reference[-1]))[0].abs().mean(0).cpu().numpy()
    figure.colorbar(left.imshow(difference, cmap="magma", vmin=0), ax=left, shrink=0.85)
    middle.plot(t, run.metrics["trajectory_rmse"], color=color)
    middle.set(title="RMSE, policy to teacher", xlabel="noise level t", xlim=(1, 0), ylim=(0, None))
    width = min(25, len(run.losses))
    smooth = run.losses.unfold(0, width, 1).mean(1).numpy()
    right.plot(run.losses.numpy(), color=color, alpha=0.3, linewidth=0.8, label="loss")
    right.plot(range(width - 1, len(run.losses)), smooth, color=color, label=f"mean of {width}")
    right.set(title="loss", xlabel="iteration", yscale="log")
    right.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def policy_sizes(runs: Sequence[Mapping], title: str) -> "Figure":
    """Endpoint PSNR over the size of the policy. runs: rows of `common.static_policy.run_sweep`."""
    figure, axis = new_figure(size=(7.0, 3.8))
    labels = {"gmflow": "GMFlow, K components", "dx": "DX, N grid points"}
    for (policy, label), style in zip(labels.items(), ("o-", "s--"), strict=True):
        chosen = [run for run in runs if run["policy"] == policy]
        psnr = [run["endpoint_psnr_db"] for run in chosen]
        axis.plot([run["size"] for run in chosen], psnr, style, color=COLORS[policy], label=label)
    axis.set_xscale("log", base=2)
    sizes = sorted({run["size"] for run in runs})
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.set(title=title, ylabel="endpoint PSNR (dB)")
    axis.set_xlabel("size of the policy, K or N")
    axis.legend()
    return figure
