"""The whole of pi-Flow on points of the plane, with a teacher that is exact.

    python toy_2d.py                            # checkerboard, GMFlow policy, 1-NFE: about a minute
    python toy_2d.py --iters 9000               # three minutes: sharper
    python toy_2d.py --density pi --policy dx   # other densities and policies
    python toy_2d.py --nfe 4 --data-free        # four segments, trained without a single data point
    python toy_2d.py --compare                  # both policies beside the teacher's own few steps

For the densities below E[x_0 | x_t] has a closed form, and with it the teacher's velocity. So there
is nothing to download or to pretrain, and every error that you see is an error of the distillation.
Top to bottom: densities and teachers, student, training loop, metrics, figures, `main`.

Everything is written to `--out`: metrics.json, overview.png, training.png, student.pt.
"""

import argparse
import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common.cli import atomic, pick_device, run_cli, write_json
from common.plots import save_figure
from piflow_minimal import (
    EPS,
    DXPolicy,
    GaussianMixture,
    GMFlowPolicy,
    Policy,
    pi_id_data_dependent,
    pi_id_data_free,
    sample,
)

# ------------------------------------------------------------------------------------------------
# Densities. Each has sample(n, generator) -> x_0 (n, 2) and velocity(x, t) -> u, the exact teacher
# ------------------------------------------------------------------------------------------------


QUADRATURE = np.stack(np.polynomial.legendre.leggauss(8), 1).tolist()  # (node, weight) on [-1, 1]


class Board(nn.Module):
    """A mixture of uniform boxes: the filled cells of a board, all of equal density.

    Args: edges: (I + 1,) ascending, the same for both axes; filled: (I, I) of 0 and 1, at [ix, iy].
    """

    def __init__(self, edges, filled):
        super().__init__()
        edges, filled = torch.as_tensor(edges).float(), torch.as_tensor(filled).float()
        self.register_buffer("center", (edges[1:] + edges[:-1]) / 2)  #           (I,)
        self.register_buffer("half_width", (edges[1:] - edges[:-1]) / 2)  #       (I,)
        area = filled * self.half_width[:, None] * self.half_width
        self.register_buffer("mass", area / area.sum())  #                        (I, I)
        self.shares = self.mass.flatten()  # no buffer: stays on the CPU, for the draws

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n points, drawn on the CPU. -> (n, 2)."""
        cell = torch.multinomial(self.shares, n, True, generator=generator)
        cell = torch.stack([cell // len(self.mass), cell % len(self.mass)], 1).to(self.mass.device)
        offset = 2 * torch.rand(n, 2, generator=generator) - 1
        return self.center[cell] + self.half_width[cell] * offset.to(self.mass.device)

    def inside(self, x: Tensor) -> Tensor:
        """Which points lie in a filled cell. (B, 2) -> (B,) bool."""
        near = (x[..., None] - self.center).abs() <= self.half_width  #           (B, 2, I)
        return (near[:, 0, :, None] & near[:, 1, None] & (self.mass > 0)).any(2).any(1)

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """u = E[eps | x] - E[x_0 | x]. x: (B, 2), t: (B,) in [0, 1]. -> (B, 2).

        Within a cell the axes are independent, so that per axis only I intervals are looked at:
        their evidence gives the weights of the cells, their means the mean.
        """
        eps, offset, log_evidence = self._interval(x, t)  #                       (B, 2, I) each
        cells = log_evidence[:, 0, :, None] + log_evidence[:, 1, None] + self.mass.log()
        cells = cells.flatten(1).softmax(1).view_as(cells)  #                     (B, I, I)
        weights = torch.stack([cells.sum(2), cells.sum(1)], 1)  #                 (B, 2, I)
        return (weights * (eps - self.center - self.half_width * offset)).sum(-1)

    def _interval(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior of x_0 = center + half_width * s, s uniform in [-1, 1], per axis and interval.

        eps = z - k s is a standard normal truncated to [z - k, z + k]. Returns E[eps], E[s] and
        log E_s[exp(-eps^2 / 2)]. Mirrored to z >= 0, with erfcx(y) = exp(y^2) erfc(y), which is
        log_ndtr without its large part: nothing overflows or cancels, however far x lies outside.
        """
        t = t.view(-1, 1, 1).clamp(min=EPS)
        z = (x[..., None] - (1 - t) * self.center) / t  #                         (B, 2, I)
        k = ((1 - t) * self.half_width / t).expand_as(z)
        wide = k.clamp(min=EPS)
        near, far = (z.abs() - wide).clamp(min=-9), z.abs() + wide  # below -9 no mass is left
        gap = (far - near) * (far + near) / 2
        tail = torch.special.erfcx(torch.stack([near, far]) * math.sqrt(0.5))
        tail = (tail[0] - (-gap).exp() * tail[1]).clamp(min=1e-30)
        eps = z.sign() * math.sqrt(2 / math.pi) * -torch.expm1(-gap) / tail
        log_evidence = (math.sqrt(math.pi / 8) * tail / wide).log() - near**2 / 2

        # Near t = 1 the interval is narrow and the differences above cancel: 8-point quadrature.
        tilt, total, moment = (z * k).clamp(-4, 4), 0.0, 0.0
        for node, weight in QUADRATURE:
            part = weight / 2 * torch.exp(node * tilt - node**2 / 2 * k**2)
            total, moment = total + part, moment + node * part
        narrow = (k < 0.25) & ((z * k).abs() < 4)
        offset = torch.where(narrow, moment / total, (z - eps) / wide)
        eps = torch.where(narrow, z - k * offset, eps)
        return eps, offset, torch.where(narrow, total.log() - z**2 / 2, log_evidence)


class Gaussians(nn.Module):
    """A mixture of equally likely Gaussians. centers: (K, 2); std: one for all, > 0."""

    def __init__(self, centers, std: float):
        super().__init__()
        self.register_buffer("centers", torch.as_tensor(centers).float())
        self.std = std

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n points, drawn on the CPU. -> (n, 2)."""
        component = torch.randint(len(self.centers), (n,), generator=generator)
        noise = torch.randn(n, 2, generator=generator).to(self.centers.device)
        return self.centers[component.to(self.centers.device)] + self.std * noise

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """u = E[eps | x] - E[x_0 | x]. x: (B, 2), t: (B,) in [0, 1]. -> (B, 2)."""
        t = t.view(-1, 1)
        alpha, var = 1 - t, ((1 - t) * self.std) ** 2 + t**2  #    of x_t, given the component
        square = self.centers.square().sum(1)  #                                  (K,)
        logits = (alpha / var * x) @ self.centers.T - alpha**2 / (2 * var) * square
        mean = logits.softmax(1) @ self.centers  #         of the components      (B, 2)
        rest = x - alpha * mean
        return t / var * rest - (mean + alpha * self.std**2 / var * rest)


def _checkerboard() -> Board:
    """Eight filled unit squares of a 4 x 4 board on [-2, 2]^2."""
    return Board([-2, -1, 0, 1, 2], (np.indices((4, 4)).sum(0) + 1) % 2)


def _ring() -> Gaussians:
    angle = torch.arange(8) * math.pi / 4
    return Gaussians(1.5 * torch.stack([angle.cos(), angle.sin()], 1), 0.15)


def _spiral() -> Gaussians:
    """Two turns, as a chain of Gaussians."""
    angle = torch.linspace(0, 4 * math.pi, 1000)
    radius = 0.25 + 0.15 * angle
    return _along([torch.stack([radius * angle.cos(), radius * angle.sin()], 1)], 128, 0.07)


def _pi() -> Gaussians:
    """The letter, as three strokes of Gaussians: its bar and its two legs, cubic Bezier curves."""
    strokes = [
        [(-1.95, 0.85), (-1.55, 1.75), (-1.1, 1.4), (1.95, 1.45)],
        [(-0.6, 1.4), (-0.65, 0.1), (-0.7, -1.0), (-1.35, -1.6)],
        [(0.65, 1.4), (0.5, -0.6), (0.5, -2.2), (1.6, -1.2)],
    ]
    s = torch.linspace(0, 1, 1000)[:, None]
    basis = torch.cat([(1 - s) ** 3, 3 * s * (1 - s) ** 2, 3 * s**2 * (1 - s), s**3], 1)
    return _along([basis @ torch.tensor(stroke) for stroke in strokes], 128, 0.09)


def _along(curves: list[Tensor], n: int, std: float) -> Gaussians:
    """About n Gaussians at equal distances along polylines, each (P, 2)."""
    steps = [(curve[1:] - curve[:-1]).norm(dim=1) for curve in curves]
    total, centers = sum(step.sum() for step in steps), []
    for curve, step in zip(curves, steps, strict=True):
        here = torch.cat([step.new_zeros(1), step.cumsum(0)])
        wanted = torch.linspace(0, float(here[-1]), max(2, round(n * float(here[-1] / total))))
        centers.append(curve[torch.searchsorted(here, wanted).clamp(max=len(curve) - 1)])
    centers = torch.cat(centers)
    return Gaussians(centers - centers.mean(0), std)


DENSITIES = {"checkerboard": _checkerboard, "ring": _ring, "spiral": _spiral, "pi": _pi}


def make_density(name: str) -> Board | Gaussians:
    """One of DENSITIES by name. Raises: ValueError for another name."""
    if name not in DENSITIES:
        raise ValueError(f"--density {name!r}: use one of {', '.join(DENSITIES)}")
    return DENSITIES[name]()


# ------------------------------------------------------------------------------------------------
# Student
# ------------------------------------------------------------------------------------------------

COMPONENTS = {"gmflow": 32, "dx": 20}  # K of a GMFlow, N of a DX policy
SOLVER = {"gmflow": "deis", "dx": "exact"}  # how a policy is followed


class Student(nn.Module):
    """An MLP on Fourier features: (x_src, t_src) -> policy.

    The network speaks of points x_0 of the plane, the policy of velocities: (x_src - x_0) / t_src.
    Outputs that ignore x_src are then already a sensible start: a fixed mixture over the plane.

    Args: policy: "gmflow" or "dx"; components: K or N, 0 for the default in COMPONENTS;
        nfe: number of equal segments that it is trained for; width, depth: of the MLP.
    Raises: ValueError for an unknown policy.
    """

    def __init__(self, policy="gmflow", components=0, nfe=1, width=256, depth=3, frequencies=64):
        super().__init__()
        if policy not in COMPONENTS:
            raise ValueError(f"--policy {policy!r}: use one of {', '.join(COMPONENTS)}")
        n = components or COMPONENTS[policy]
        self.config = {"policy": policy, "components": n, "nfe": nfe, "width": width}
        self.config |= {"depth": depth, "frequencies": frequencies}
        self.register_buffer("frequencies", math.pi * torch.randn(3, frequencies))
        widths = [3 + 2 * frequencies] + [width] * depth
        layers = [(nn.Linear(a, b), nn.SiLU()) for a, b in zip(widths, widths[1:], strict=False)]
        self.body = nn.Sequential(*(module for pair in layers for module in pair))
        self.head = nn.Linear(width, 3 * n + 1 if policy == "gmflow" else 2 * n)
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            self.head.bias.zero_()
            if policy == "gmflow":
                # Components that start alike get the same gradient and stay alike for ever.
                self.head.bias[: 2 * n].normal_()
                self.head.bias[-1] = math.log(0.3)

    def forward(self, x_src: Tensor, t_src: Tensor) -> Policy:
        """x_src: (B, 2), t_src: (B,) in (0, 1]. -> GMFlowPolicy or DXPolicy."""
        n, t = self.config["components"], t_src.view(-1, 1)
        inputs = torch.cat([x_src, t], 1)  #                                      (B, 3)
        waves = inputs @ self.frequencies
        output = self.head(self.body(torch.cat([inputs, waves.sin(), waves.cos()], 1)))
        x_0 = output[:, : 2 * n].unflatten(1, (n, 2))  #                          (B, n, 2)
        velocities = (x_src[:, None] - x_0) / t[..., None]
        if self.config["policy"] == "dx":
            return DXPolicy(velocities, x_src, t_src, segment_size=1 / self.config["nfe"])
        logstds, logweights = output[:, -1].view(-1, 1, 1), output[:, 2 * n : 3 * n, None]
        return GMFlowPolicy(GaussianMixture(velocities, logstds, logweights), x_src, t_src)


def load_student(path: str | Path) -> Student:
    """The student that a run left in student.pt, in eval mode."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    student = Student(**saved["config"])
    student.load_state_dict(saved["state"])
    return student.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------

PERIODS, BINS = 10, 20  # loss by t is kept per tenth of the training


class Training(NamedTuple):
    """What `train` returns."""

    student: Student  #   the moving average (EMA)
    losses: Tensor  #     (iters,) on the CPU
    loss_by_t: Tensor  #  (PERIODS, BINS) mean loss per bin of t in [0, 1], NaN where nothing fell
    seconds: float


def train(
    density: Board | Gaussians,
    policy: str = "gmflow",
    nfe: int = 1,
    iters: int = 3000,
    batch: int = 512,
    lr: float = 2e-3,
    components: int = 0,
    data_free: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[int, Tensor], None] | None = None,
) -> Training:
    """Distils the exact teacher of `density` into a student (Algorithms 1, 2 and 3).

    Args:
        nfe: number of segments, one network evaluation each.
        data_free: start every iteration from noise and walk through all segments (Algorithm 3);
            otherwise from data plus noise, at one random segment per sample (Algorithm 2). With
            nfe = 1 both are the same, and no data is drawn.
        components: see `Student`.
        progress: called as (iteration, loss) after every iteration.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device
    density = density.to(device)
    student = Student(policy, components, nfe).to(device)
    ema = copy.deepcopy(student).requires_grad_(False)
    weights, averaged = list(student.parameters()), list(ema.parameters())
    optimizer = torch.optim.Adam(weights, betas=(0.9, 0.99))
    losses = torch.zeros(iters, device=device)
    sums, counts = torch.zeros(2, PERIODS * BINS, device=device)
    options = {"generator": generator, "total_substeps": 16, "solver": SOLVER[policy]}
    start = time.perf_counter()

    for i in range(iters):
        if data_free or nfe == 1:  # one segment starts from pure noise: no data either way
            noise = torch.randn(batch, 2, generator=generator).to(device)
            segments = pi_id_data_free(student, density.velocity, noise, nfe, **options)
        else:
            x_0 = density.sample(batch, generator)
            loss = pi_id_data_dependent(student, density.velocity, x_0, nfe, **options)
            segments = [(1.0, loss)]

        optimizer.zero_grad()
        for segment_size, out in segments:
            square = (out.u_policy - out.u_teacher).square().mean(1)  #           (M B,)
            # A velocity is (x - x_0)/t, so a fixed error of x_0 costs 1/t^2 as t -> 0. GMFlow can
            # afford that: its x_0 follows x. The x0_hat(t) of DX is the same for every x: its
            # error stays, and the plain loss is a few huge numbers from small t that drown the
            # rest (endpoint error 1.4 after 1000 iterations instead of 0.08; the micro-window,
            # 2 substeps of 16, reaches 0.24). Times t^2, it is the squared error of x_0 itself.
            loss = (square * out.t**2 if policy == "dx" else square).mean()
            (segment_size * loss).backward()
            losses[i] += segment_size * loss.detach()
            bins = (out.t * BINS).long().clamp(max=BINS - 1) + i * PERIODS // iters * BINS
            sums.index_add_(0, bins, square.detach())  # stays on the device: nobody waits for it
            counts.index_add_(0, bins, torch.ones_like(square))

        # Once in millions of draws t is so close to 0 that a derivative overflows float32.
        for weight in weights:
            weight.grad.nan_to_num_(0.0, 0.0, 0.0)
        nn.utils.clip_grad_norm_(weights, 1.0)
        warm_up = min(1.0, (i + 1) / (0.02 * iters))
        optimizer.param_groups[0]["lr"] = lr * warm_up * (1 + math.cos(math.pi * i / iters)) / 2
        optimizer.step()
        decay = (1 - 1 / (i + 1)) ** 8  # power EMA: averages over the last ninth, whatever i
        with torch.no_grad():
            torch._foreach_lerp_(averaged, weights, 1 - decay)
        if progress:
            progress(i, losses[i])

    losses, by_t = losses.cpu(), (sums / counts).view(PERIODS, BINS).cpu()
    return Training(ema.eval(), losses, by_t, time.perf_counter() - start)


# ------------------------------------------------------------------------------------------------
# Metrics
# ------------------------------------------------------------------------------------------------

TEACHER_STEPS = 512


@torch.no_grad()
def teacher_sample(
    density: Board | Gaussians,
    noise: Tensor,
    steps: int = TEACHER_STEPS,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """The teacher's own sampler: Euler steps from t = 1 to 0. noise: (B, 2). -> (B, 2)."""
    ends = []
    for x in noise.split(2048):  # fits the cache of a CPU
        for i in range(steps):
            t = torch.full((len(x),), 1 - i / steps, dtype=x.dtype, device=x.device)
            if callback:
                callback(i, t, x)
            x = x - density.velocity(x, t) / steps
        if callback:
            callback(steps, torch.zeros_like(t), x)
        ends.append(x)
    return torch.cat(ends)


def student_sample(
    student: Student,
    noise: Tensor,
    nfe: int | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """The student's sampler: nfe network evaluations, by default as many as it was trained for."""
    solver = SOLVER[student.config["policy"]]
    return sample(student, noise, nfe or student.config["nfe"], solver=solver, callback=callback)


def mean_distance(x: Tensor, y: Tensor) -> float:
    """E|x - y| over all pairs, the diagonal included. (N, 2), (M, 2) -> float."""
    exact = "donot_use_mm_for_euclid_dist"
    sums = [torch.cdist(part, y, compute_mode=exact).mean(1).sum() for part in x.split(64)]
    return float(torch.stack(sums).cpu().double().sum()) / len(x)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| over all pairs, the diagonal included.

    Zero only if x and y are the same points; between two finite sets of draws from one density it
    is E|x - x'| (1/N + 1/M) on average.
    """
    return 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)


def endpoint_rmse(x: Tensor, y: Tensor) -> float:
    """Root mean square of the distance |x_i - y_i|. (N, 2), (N, 2) -> float."""
    return float((x - y).square().sum(1).mean().sqrt())


def measure(ends: dict[str, tuple[int, Tensor]], density, data: Tensor) -> dict[str, dict]:
    """Metrics of several samplers that started from the same noise.

    Args: ends: name -> (nfe, x_0 (N, 2)), with the many-step "teacher" among them; data: (N, 2).
    """
    results = {}
    for name, (nfe, x_0) in ends.items():
        results[name] = {
            "nfe": nfe,
            "endpoint_rmse": endpoint_rmse(x_0, ends["teacher"][1]),
            "energy_distance": energy_distance(x_0, data),
        }
        if isinstance(density, Board):
            results[name]["inside_fraction"] = float(density.inside(x_0).float().mean())
    return results


# ------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------

# Corners of the colour map over the noise: left to right from blue to orange, bottom to top from
# dark to light. Two directions that every kind of colour vision can tell apart.
CORNERS = torch.tensor(
    [[[0.00, 0.18, 0.45], [0.45, 0.76, 0.98]], [[0.55, 0.16, 0.02], [1.00, 0.74, 0.22]]]
)
LIMIT = 3.0  # the plane is shown on [-LIMIT, LIMIT]^2


def colors_of(noise: Tensor) -> np.ndarray:
    """A colour for every starting noise, so that pairs can be seen. (N, 2) -> (N, 3) in [0, 1]."""
    u, v = torch.special.ndtr(noise.cpu()).clamp(0, 1).unbind(1)  # even over [0, 1]^2
    corner_weights = torch.stack([1 - u, u], 1)[:, :, None] * torch.stack([1 - v, v], 1)[:, None]
    return torch.einsum("nij,ijc->nc", corner_weights, CORNERS).numpy()


def _panel(axis, title: str) -> None:
    axis.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal", xlabel="$x$", ylabel="$y$")
    axis.set(xticks=[-2, 0, 2], yticks=[-2, 0, 2])
    axis.set_title(title, fontsize=10)
    axis.label_outer()


def _scatter(axis, x: Tensor, colors, title: str) -> None:
    axis.scatter(*x.cpu().T, s=1.2, c=colors, linewidths=0, rasterized=True)
    _panel(axis, title)


def _paths(axis, states: list[Tensor], colors, title: str) -> None:
    """states: the (n, 2) points of every time, from noise to data."""
    paths = torch.stack([state.cpu() for state in states], 1)  #                  (n, steps, 2)
    for path, color in zip(paths, colors, strict=True):
        axis.plot(*path.T, color=color, linewidth=1.2)
    axis.scatter(*paths[:, 0].T, s=14, facecolors="white", edgecolors=colors, zorder=3)
    axis.scatter(*paths[:, -1].T, s=14, c=colors, zorder=3)
    _panel(axis, title)


def draw_overview(path, density, student: Student, noise, data, ends, results) -> None:
    """The method at a glance: data, teacher with few and with many steps, student, and the paths.

    noise, data: (N, 2); ends, results: of `measure`, with student, teacher and teacher_same_nfe.
    """
    import matplotlib.pyplot as plt

    noise, colors, nfe = noise[:6000], colors_of(noise[:6000]), student.config["nfe"]
    steps = "1 step" if nfe == 1 else f"{nfe} steps"
    titles = {
        "teacher": f"teacher, {TEACHER_STEPS} Euler steps",
        "teacher_same_nfe": f"teacher, {steps}",
        "student": f"student, {nfe} network evaluation{'s' * (nfe > 1)}",
    }
    figure, axes = plt.subplots(2, 3, figsize=(8.6, 6.1), layout="constrained")
    for axis, name in zip(axes.flat[[1, 3, 4]], titles, strict=True):
        title = f"{titles[name]}\nenergy distance {results[name]['energy_distance']:.4f}"
        _scatter(axis, ends[name][1][:6000], colors, title)
    _scatter(axes[0, 0], data[:6000], "0.45", "data\n")
    if nfe == 1:  # at t = 1 the noise says nothing about x_0, and E[x_0 | x_1] is the same for all
        note = "every noise ends here,\nat the mean of the data"
        mean = ends["teacher_same_nfe"][1].mean(0).tolist()
        arrow = {"arrowstyle": "->", "color": "0.3"}
        axes[1, 0].annotate(note, mean, (mean[0], mean[1] + 1.2), ha="center", arrowprops=arrow)

    few, teacher_path, policy_path = noise[:36], [], []
    teacher_sample(density, few, callback=lambda i, t, x: teacher_path.append(x))
    student_sample(student, few, callback=lambda i, tau, x: policy_path.append(x))
    policy = {"gmflow": "GMFlow", "dx": "DX"}[student.config["policy"]]
    _paths(axes[0, 2], teacher_path, colors[:36], "teacher's paths\nnoise (open) to data (full)")
    _paths(axes[1, 2], policy_path, colors[:36], f"paths of the {policy} policy\nsame noises")
    save_figure(figure, path, dpi=100)


def draw_training(path, training: Training) -> None:
    """Loss over iterations, and by t early and late in the training."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.2), layout="constrained")
    size = max(1, len(training.losses) // 100)  # the median of a stretch: single losses are noisy
    stretches = training.losses[: len(training.losses) // size * size].view(-1, size)
    left.semilogy(np.arange(1, len(stretches) + 1) * size, stretches.median(1).values, "#0072b2")
    left.set(xlabel="iteration", ylabel=f"loss (median of {size})")
    t = (torch.arange(BINS) + 0.5) / BINS
    curves = [(0, "#b8b8b8", "first tenth"), (4, "#e69f00", "fifth"), (9, "#0072b2", "last tenth")]
    for period, color, label in curves:
        right.semilogy(t, training.loss_by_t[period], ".-", color=color, label=label)
    right.set(xlabel="noise level $t$", ylabel="mean squared velocity error")
    right.legend(title="of the training", frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, dpi=100)


def draw_comparison(path, noise: Tensor, ends, results) -> None:
    """One panel per sampler, same noise everywhere."""
    import matplotlib.pyplot as plt

    colors, columns = colors_of(noise[:6000]), 4
    rows = math.ceil(len(ends) / columns)
    size = {"figsize": (8.6, 2.5 * rows), "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, squeeze=False, **size)
    for axis in axes.flat[len(ends) :]:
        axis.remove()
    for axis, (name, (nfe, x_0)) in zip(axes.flat, ends.items(), strict=False):
        row = results[name]
        numbers = f"ED {row['energy_distance']:.4f}, rmse {row['endpoint_rmse']:.3f}"
        _scatter(axis, x_0[:6000], colors, f"{name.split(' ')[0]}, {nfe} NFE\n{numbers}")
        axis.title.set_fontsize(8.5)
    save_figure(figure, path, dpi=100)


# ------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Raises: ValueError, one line, for a value that no run could use."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--density", default="checkerboard", help=", ".join(DENSITIES))
    add("--policy", default="gmflow", help="gmflow or dx")
    add("--nfe", type=int, default=1, help="network evaluations, one segment of time for each")
    add("--data-free", action="store_true", help="train on the student's own walks from noise")
    add("--iters", type=int, default=3000, help="training iterations")
    add("--batch", type=int, default=512, help="points per iteration")
    add("--lr", type=float, default=2e-3, help="Adam's peak learning rate")
    add("--components", type=int, default=0, help=f"K or N; 0: {COMPONENTS}")
    add("--points", type=int, default=10_000, help="points that the metrics are taken over")
    add("--compare", action="store_true", help="both policies and the teacher's few steps as well")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--out", type=Path, default=Path("outputs/toy_2d"), help="folder for what is written")
    args = parser.parse_args(argv)

    make_density(args.density)
    if args.policy not in COMPONENTS:
        raise ValueError(f"--policy {args.policy!r}: use one of {', '.join(COMPONENTS)}")
    lowest = {"nfe": 1, "iters": 1, "batch": 1, "components": 0, "points": 100, "seed": 0}
    for name, low in lowest.items():
        if getattr(args, name) < low:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least {low}")
    if not 0 < args.lr < math.inf:
        raise ValueError(f"--lr {args.lr}: must be a positive number")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: is a file, must be a folder")
    args.device = pick_device(args.device)
    return args


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread for PyTorch. Tensors here are so small that a second one gains a fifth, and on
    a machine that does something else as well the two wait for each other: several times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_training(args: argparse.Namespace, density, policy: str) -> Training:
    """`train` behind a progress bar that shows the loss; it looks at the loss once in 50."""
    from tqdm import tqdm

    names = ("nfe", "iters", "batch", "lr", "data_free", "seed", "device")
    options = {name: getattr(args, name) for name in names}
    options["components"] = args.components if policy == args.policy else 0
    with tqdm(total=args.iters, desc=f"{policy}, {args.nfe}-NFE", unit="it") as bar:

        def progress(i: int, loss: Tensor) -> None:
            if (i + 1) % 50 == 0 or i + 1 == args.iters:
                bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
                bar.update(i + 1 - bar.n)

        return train(density, policy, progress=progress, **options)


def print_table(results: dict[str, dict]) -> None:
    """One line per sampler."""
    columns = list(next(iter(results.values())))
    print(" " * 20 + "".join(f"{column:>17}" for column in columns))
    for name, row in results.items():
        values = (f"{v:>17d}" if isinstance(v, int) else f"{v:>17.4f}" for v in row.values())
        print(f"{name:<20}" + "".join(values))


@one_thread()
def main(argv: list[str] | None = None) -> None:
    """Trains, measures, draws. Raises: ValueError, OSError for bad input, before anything slow."""
    args = parse_arguments(argv)
    density = make_density(args.density).to(args.device)
    training = run_training(args, density, args.policy)
    student = training.student

    generator = torch.Generator().manual_seed(args.seed + 1)  # not the draws of the training
    noise = torch.randn(args.points, 2, generator=generator).to(args.device)
    data, other_data = (density.sample(args.points, generator) for _ in range(2))
    ends = {
        "student": (args.nfe, student_sample(student, noise)),
        "teacher": (TEACHER_STEPS, teacher_sample(density, noise)),
        "teacher_same_nfe": (args.nfe, teacher_sample(density, noise, args.nfe)),
    }
    results = measure(ends, density, data)
    metrics = {
        "density": args.density, "policy": args.policy, "nfe": args.nfe, "iters": args.iters,
        "train_seconds": round(training.seconds, 1), "seed": args.seed,
        **results, "noise_floor": energy_distance(other_data, data),
    }  # fmt: skip

    if args.compare:
        other = "dx" if args.policy == "gmflow" else "gmflow"
        students = {args.policy: student, other: run_training(args, density, other).student}
        few = {f"Euler {n}": (n, teacher_sample(density, noise, n)) for n in (1, 2, 4, 8, 16)}
        both = {name: (args.nfe, student_sample(s, noise)) for name, s in students.items()}
        compared = {**few, **both, "teacher": ends["teacher"]}
        metrics["compare"] = measure(compared, density, data)
        draw_comparison(args.out / "compare.png", noise, compared, metrics["compare"])

    draw_overview(args.out / "overview.png", density, student, noise, data, ends, results)
    draw_training(args.out / "training.png", training)
    with atomic(args.out / "student.pt") as temporary:
        torch.save({"config": student.config, "state": student.state_dict()}, temporary)
    write_json(args.out / "metrics.json", metrics)

    print_table(results | metrics.get("compare", {}))
    print(f"two data sets of {args.points} points: energy distance {metrics['noise_floor']:.4f}")
    print(f"trained in {training.seconds:.0f} s; written to {args.out}/")


if __name__ == "__main__":
    run_cli(main)
