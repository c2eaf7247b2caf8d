"""The whole of pi-Flow on points of the plane, with a teacher that is exact.

    python toy_2d.py                            # checkerboard, GMFlow policy, 1-NFE
    python toy_2d.py --density pi --policy dx   # another density, another policy
    python toy_2d.py --nfe 4 --data-free        # four segments, trained without data

For the densities below E[x_0 | x_t] has a closed form, and with it the teacher's velocity. Nothing
is downloaded or pretrained, and every error that you see is an error of the distillation.
Writes student.pt, metrics.json and overview.png to `--out`.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common import plots
from common.cli import DEVICE_HELP, MAX_SEED, parse, pick_device, run_cli, setting
from common.files import write_json, writing
from common.teachers import endpoint_rmse, integrate_teacher
from piflow_minimal import (
    EPS,
    DXPolicy,
    GaussianMixture,
    GMFlowPolicy,
    PiIDLoss,
    Policy,
    pi_id_data_dependent,
    pi_id_data_free,
    sample,
)

# ==== Densities: sample(n, generator) -> x_0 (n, 2), and the exact teacher velocity(x, t) -> u ====

QUADRATURE = np.stack(np.polynomial.legendre.leggauss(8), 1).tolist()  # (node, weight) on [-1, 1]


class Checkerboard(nn.Module):
    """Uniform on eight of the sixteen unit squares that make up [-2, 2]^2."""

    def __init__(self):
        super().__init__()
        i = torch.arange(4)
        self.register_buffer("center", i - 1.5)  #  of the intervals of an axis   (4,)
        self.register_buffer("filled", (i[:, None] + i) % 2 == 0)  #              (4, 4) at [ix, iy]

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n points, drawn on the CPU. -> (n, 2)."""
        squares = self.filled.nonzero().cpu() - 2  #  lower left corners          (8, 2)
        square = squares[torch.randint(len(squares), (n,), generator=generator)]
        return (square + torch.rand(n, 2, generator=generator)).to(self.center)

    def inside(self, x: Tensor) -> Tensor:
        """Which points lie in a filled square. (B, 2) -> (B,) bool."""
        ix, iy = (x + 2).floor().long().clamp(0, 3).unbind(1)
        return self.filled[ix, iy] & (x.abs() <= 2).all(1)

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """u = E[eps | x] - E[x_0 | x]. x: (B, 2), t: (B,) in [0, 1]. -> (B, 2).

        Within a square the axes are independent, so that four intervals per axis suffice: their
        evidence gives the weights of the squares, their means the mean.
        """
        eps, offset, log_evidence = self._intervals(x, t)  #                      (B, 2, 4) each
        logits = log_evidence[:, 0, :, None] + log_evidence[:, 1, None]  #        (B, 4, 4)
        logits = logits.masked_fill(~self.filled, -math.inf)
        squares = logits.flatten(1).softmax(1).view_as(logits)
        weights = torch.stack([squares.sum(2), squares.sum(1)], 1)  #             (B, 2, 4)
        return (weights * (eps - self.center - offset / 2)).sum(-1)

    def _intervals(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior of x_0 = center + s/2, s uniform in [-1, 1], per axis and interval.

        eps = z - k s is a standard normal truncated to [z - k, z + k]. Returns E[eps], E[s] and
        log E_s[exp(-eps^2 / 2)]. Mirrored to z >= 0, with erfcx(y) = exp(y^2) erfc(y), which is
        log_ndtr without its large part: nothing overflows or cancels, however far x lies outside.
        """
        t = t.view(-1, 1, 1).clamp(min=EPS)
        z = (x[..., None] - (1 - t) * self.center) / t  #                         (B, 2, 4)
        k = (1 - t) / (2 * t)  #                                                  (B, 1, 1)
        wide = k.clamp(min=EPS)
        near, far = (z.abs() - wide).clamp(min=-9), z.abs() + wide  # below -9 no mass is left
        gap = (far - near) * (far + near) / 2
        tail = torch.special.erfcx(torch.stack([near, far]) * math.sqrt(0.5))
        tail = (tail[0] - (-gap).exp() * tail[1]).clamp(min=1e-30)
        eps = z.sign() * math.sqrt(2 / math.pi) * -torch.expm1(-gap) / tail
        log_evidence = (math.sqrt(math.pi / 8) * tail / wide).log() - near**2 / 2

        # Near t = 1 the interval is narrow and the differences above cancel: 8-point quadrature.
        tilt = (z * k).clamp(-4, 4)
        total = moment = 0.0
        for node, weight in QUADRATURE:
            part = weight / 2 * torch.exp(node * tilt - node**2 / 2 * k**2)
            total = total + part
            moment = moment + node * part
        narrow = (k < 0.25) & ((z * k).abs() < 4)
        offset = torch.where(narrow, moment / total, (z - eps) / wide)
        eps = torch.where(narrow, z - k * offset, eps)
        return eps, offset, torch.where(narrow, total.log() - z**2 / 2, log_evidence)


class Gaussians(nn.Module):
    """A mixture of equally likely Gaussians. centers: (K, 2); std: one for all, > 0."""

    def __init__(self, centers: Tensor, std: float):
        super().__init__()
        self.register_buffer("centers", centers - centers.mean(0))
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
        alpha = 1 - t
        var = (alpha * self.std) ** 2 + t**2  #  of x_t, given the component
        square = self.centers.square().sum(1)  #                                  (K,)
        logits = (alpha / var * x) @ self.centers.T - alpha**2 / (2 * var) * square
        mean = logits.softmax(1) @ self.centers  #         of the components      (B, 2)
        rest = x - alpha * mean
        return t / var * rest - (mean + alpha * self.std**2 / var * rest)


def _ring() -> Gaussians:
    angle = torch.arange(8) * math.pi / 4
    return Gaussians(torch.stack([1.5 * angle.cos(), 1.5 * angle.sin()], 1), 0.15)


def _spiral() -> Gaussians:
    """Two turns; the root makes distances along it equal."""
    angle = 4 * math.pi * torch.linspace(0, 1, 128).sqrt()
    radius = 0.25 + 0.15 * angle
    return Gaussians(torch.stack([radius * angle.cos(), radius * angle.sin()], 1), 0.07)


def _pi() -> Gaussians:
    """The letter: its bar and its two legs, cubic Bezier curves."""
    bar = (-1.95, 0.85), (-1.55, 1.75), (-1.1, 1.4), (1.95, 1.45)
    left = (-0.6, 1.4), (-0.65, 0.1), (-0.7, -1.0), (-1.35, -1.6)
    right = (0.65, 1.4), (0.5, -0.6), (0.5, -2.2), (1.6, -1.2)
    s = torch.linspace(0, 1, 44)[:, None]
    basis = torch.cat([(1 - s) ** 3, 3 * s * (1 - s) ** 2, 3 * s**2 * (1 - s), s**3], 1)
    return Gaussians((basis @ torch.tensor([bar, left, right])).flatten(0, 1), 0.09)


DENSITIES = {"checkerboard": Checkerboard, "ring": _ring, "spiral": _spiral, "pi": _pi}


def make_density(name: str) -> Checkerboard | Gaussians:
    """One of DENSITIES by name."""
    return DENSITIES[name]()


# ==== Policies and student ========================================================================


class PolicyKind(NamedTuple):
    """How the output of a network becomes a policy."""

    components: int  #             default of n: mixture components K, grid points N, ...
    width: Callable[[int], int]  # n -> number of outputs; the first 2 n are points x_0
    make: Callable[..., Policy]  # (velocities (B, n, 2), other outputs, x_src, t_src, segment_size)
    solver: str = "deis"  #        of the rollout
    t_power: float = 0.0  #        a squared velocity error counts t^t_power in the loss
    spread: float = 0.0  #         of the points before training; equal components stay equal


def _gmflow(velocities, others, x_src, t_src, segment_size) -> GMFlowPolicy:
    logweights = others[:, :-1, None]
    logstds = math.log(0.3) + others[:, -1].view(-1, 1, 1)
    return GMFlowPolicy(GaussianMixture(velocities, logstds, logweights), x_src, t_src)


def _dx(velocities, others, x_src, t_src, segment_size) -> DXPolicy:
    return DXPolicy(velocities, x_src, t_src, segment_size)


# A velocity is (x - x_0)/t: a fixed error of x_0 costs 1/t^2 as t -> 0. GMFlow's x_0 follows x,
# which corrects it. The x0_hat(t) of DX is the same for every x: its error stays, and a few huge
# numbers from small t drown the rest of the loss. Times t^2 it is the squared error of x_0 itself.
POLICIES = {
    "gmflow": PolicyKind(64, lambda n: 3 * n + 1, _gmflow, spread=1.0),
    "dx": PolicyKind(20, lambda n: 2 * n, _dx, solver="exact", t_power=2.0),
}


class Student(nn.Module):
    """An MLP on Fourier features: (x_src, t_src) -> policy.

    The network outputs points x_0 of the plane, policies take velocities (x_src - x_0) / t_src.
    Outputs that ignore x_src are then already a sensible start: a fixed mixture over the plane.

    Args: policy: a name in POLICIES; components: n, by default the one there; nfe: equal segments.
    """

    def __init__(self, policy="gmflow", components=None, nfe=1, width=256, depth=3, frequencies=64):
        super().__init__()
        self.kind = POLICIES[policy]
        n = components or self.kind.components
        self.config = {"policy": policy, "components": n, "nfe": nfe, "width": width}
        self.config |= {"depth": depth, "frequencies": frequencies}
        self.register_buffer("frequencies", 5 * torch.randn(3, frequencies))
        widths = [3 + 2 * frequencies] + [width] * depth
        layers = [(nn.Linear(a, b), nn.SiLU()) for a, b in zip(widths, widths[1:], strict=False)]
        self.body = nn.Sequential(*(module for pair in layers for module in pair))
        self.head = nn.Linear(width, self.kind.width(n))
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            self.head.bias.zero_()[: 2 * n].normal_(std=self.kind.spread)

    def forward(self, x_src: Tensor, t_src: Tensor) -> Policy:
        """x_src: (B, 2), t_src: (B,) in (0, 1]. -> a policy of this kind."""
        n = self.config["components"]
        inputs = torch.cat([x_src, t_src[:, None]], 1)
        waves = inputs @ self.frequencies
        output = self.head(self.body(torch.cat([inputs, waves.sin(), waves.cos()], 1)))
        x_0 = output[:, : 2 * n].unflatten(1, (n, 2))
        others = output[:, 2 * n :]
        velocities = (x_src[:, None] - x_0) / t_src[:, None, None]  #             (B, n, 2)
        return self.kind.make(velocities, others, x_src, t_src, 1 / self.config["nfe"])


def load_student(path: str | Path) -> Student:
    """The student that a run left in student.pt, in eval mode."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    student = Student(**saved["config"])
    student.load_state_dict(saved["state"])
    return student.eval().requires_grad_(False)


# ==== Training ====================================================================================


@dataclass(frozen=True)
class Settings:
    """What a run depends on."""

    density: str = setting("checkerboard", "density of the data", choices=DENSITIES)
    policy: str = setting("gmflow", "kind of policy", choices=POLICIES)
    components: int | None = setting(None, "K of GMFlow (64) or N of DX (20)", low=1)
    nfe: int = setting(1, "network evaluations, one segment of time each", low=1)
    data_free: bool = setting(False, "training from noise through all segments (Algorithm 3)")
    iterations: int = setting(2000, "optimizer steps", low=1)
    batch: int = setting(128, "points per iteration and segment", low=1)
    lr: float = setting(3e-3, "peak learning rate of Adam", above=0)
    num_intermediates: int = setting(2, "queries per point and segment", low=1)
    total_substeps: int | None = setting(None, "substeps from t = 1 to 0 (10 a segment)", low=1)
    solver: str | None = setting(
        None, "solver of the rollout (deis, for DX exact)", choices=("euler", "deis", "exact")
    )
    points: int = setting(10_000, "points of the metrics: all pairs", low=100, high=50_000)
    seed: int = setting(0, "seed of weights, draws and noise", low=0, high=MAX_SEED)
    device: str = setting("auto", DEVICE_HELP)
    out: Path = setting(Path("outputs/toy_2d"), "folder for the results")


def stratified(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform draws in [0, 1), one in each of as many equal intervals, in random order."""
    n = math.prod(shape)
    order = torch.randperm(n, generator=generator)
    place = torch.rand(n, generator=generator)
    return ((order + place) / n).view(shape)


def train(density, settings: Settings, callback: Callable | None = None) -> Student:
    """Distils the exact teacher of a density into a student (Algorithms 1 to 3). -> its EMA.

    From data plus noise at one random segment per point (Algorithm 2) or, with data_free, from
    noise through all segments (Algorithm 3). For nfe = 1 both are the same and no data is drawn.
    callback: called with (iteration, PiIDLoss of the last segment).
    """
    s = settings
    torch.manual_seed(s.seed)
    generator = torch.Generator().manual_seed(s.seed)  # on the CPU: the same draws on every device
    student = Student(s.policy, s.components, s.nfe).to(s.device)
    ema = copy.deepcopy(student).requires_grad_(False)
    weights = list(student.parameters())
    adam = torch.optim.Adam(weights, betas=(0.9, 0.99), fused=True)
    solver = s.solver or student.kind.solver
    substeps = s.total_substeps or 10 * s.nfe
    options = {"num_intermediates": s.num_intermediates, "total_substeps": substeps}
    options |= {"solver": solver, "batch_teacher": True, "generator": generator}
    from_noise = s.data_free or s.nfe == 1
    batch = s.batch if from_noise else s.batch * s.nfe  #  where a point is in one segment only

    for i in range(s.iterations):
        options["uniforms"] = query_times(batch, s, solver, substeps, generator)
        if from_noise:
            noise = torch.randn(batch, 2, generator=generator).to(s.device)
            segments = pi_id_data_free(student, density.velocity, noise, s.nfe, **options)
        else:
            x_0 = density.sample(batch, generator)
            out = pi_id_data_dependent(student, density.velocity, x_0, s.nfe, **options)
            segments = [(1.0, out)]

        adam.zero_grad()
        for segment_size, out in segments:
            (segment_size * out.weighted(student.kind.t_power)).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        done = i / s.iterations  #  warm-up over the first fiftieth, then a cosine to 0
        schedule = min(1.0, 50 * done + 0.01) * (1 + math.cos(math.pi * done)) / 2
        adam.param_groups[0]["lr"] = s.lr * schedule
        adam.step()
        decay = (1 - 1 / (i + 1)) ** 8  #  power EMA: averages over the last ninth, whatever i
        torch._foreach_lerp_([*ema.parameters()], [w.detach() for w in weights], 1 - decay)
        if callback:
            callback(i, out)
    return ema.eval()


def query_times(batch, settings: Settings, solver: str, substeps: int, generator) -> tuple:
    """Where the loss queries the teacher: argument `uniforms` of `pi_id_loss`.

    Where the solver evaluates a policy: not within the last substep, and uniform in the coordinate
    in which its substeps are.
    """
    last_substep = 0.0 if solver == "exact" else 1 / math.ceil(substeps / settings.nfe)
    grid = 1.5 if solver == "deis" else 1.0  #  substeps are uniform in t^(1/grid)
    left = 1 - (1 - last_substep) * stratified((batch, settings.num_intermediates), generator)
    return 1 - left**grid, left[:, 1:]


# ==== Metrics =====================================================================================

STEPS = 64  # of Heun's method, for the teacher: nearer to the converged ODE than 512 Euler steps


def student_sample(student: Student, noise: Tensor, nfe: int | None = None, **options) -> Tensor:
    """The student's x_0 for noise (N, 2). nfe: by default as trained; options: of `sample`."""
    options = {"solver": student.kind.solver} | options
    return sample(student, noise, nfe or student.config["nfe"], **options)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| over all pairs, the diagonal included. (N, 2), (M, 2).

    Zero only for the same points; E|x - x'| (1/N + 1/M) on average for draws from one density.
    """

    def mean_distance(x: Tensor, y: Tensor, exact="donot_use_mm_for_euclid_dist") -> float:
        rows = [torch.cdist(part, y, compute_mode=exact).mean(1) for part in x.split(64)]
        return float(torch.cat(rows).cpu().double().mean())

    return 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)


# ==== Figure and main =============================================================================


def draw_overview(path: Path, student: Student, teacher, noise, data, ends: dict, rows: dict):
    """Data, teacher and student as points (ends, with metrics rows), and the paths of both."""
    nfe = student.config["nfe"]
    colors = plots.colors_of(noise)
    few_steps = "1 step: all at the mean" if nfe == 1 else f"{nfe} Euler steps"
    titles = {"teacher": f"teacher, {STEPS} Heun steps", "few_steps": f"teacher, {few_steps}"}
    titles["student"] = f"student, {nfe} evaluation{'s' * (nfe > 1)}"
    figure, axes = plots.new_figure(2, 3, (8.6, 6.1))
    plots.draw_points(axes[0, 0], data, plots.GREY, "data\n")
    for axis, (name, title) in zip(axes.flat[[1, 3, 4]], titles.items(), strict=True):
        title += f"\nenergy distance {rows[name]['energy_distance']:.4f}"
        plots.draw_points(axis, ends[name], colors, title, 40 if "mean" in title else 1.2)
    few = noise[:36]
    of_teacher, of_policy = [], []
    integrate_teacher(teacher, few, 256, callback=lambda i, t, x: of_teacher.append(x))
    student_sample(student, few, total_substeps=256, callback=lambda i, t, x: of_policy.append(x))
    name = "paths of the teacher,\nnoise (open) to data"
    plots.draw_paths(axes[0, 2], of_teacher, colors[:36], name)
    plots.draw_paths(axes[1, 2], of_policy, colors[:36], "paths of the policy,\nfor the same noise")
    plots.save_figure(figure, path)


def choose_device(name: str) -> str:
    """The CPU where MPS lacks the teacher's erfcx (PyTorch before 2.11)."""
    device = pick_device(name)
    try:
        torch.special.erfcx(torch.ones(1, device=device))
    except NotImplementedError:
        print(f"This PyTorch lacks erfcx on {device.type}: running on the CPU.")
        return "cpu"
    return str(device)


def main(argv: list[str] | None = None) -> None:
    """Trains, measures, draws. Raises: ValueError, OSError for bad input, before anything slow."""
    torch.set_num_threads(1)  # a second one gains little on small tensors, and may cost much
    s = parse(Settings, __doc__, argv)
    s = replace(s, device=choose_device(s.device))
    s.out.mkdir(parents=True, exist_ok=True)
    density = make_density(s.density).to(s.device)

    def progress(i: int, out: PiIDLoss) -> None:
        if (i + 1) % max(1, s.iterations // 10) == 0:  #  reading the loss forces a device sync
            loss = out.loss.item()
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss} at iteration {i + 1}; try a smaller --lr")
            print(f"iteration {i + 1:6d}   loss {loss:.4f}", flush=True)

    start = time.perf_counter()
    student = train(density, s, progress)
    seconds = round(time.perf_counter() - start, 1)
    with writing(s.out / "student.pt") as temporary:
        torch.save({"config": student.config, "state": student.state_dict()}, temporary)

    teacher = density.velocity
    generator = torch.Generator().manual_seed(s.seed + 1)
    noise = torch.randn(s.points, 2, generator=generator).to(s.device)
    data, more_data = (density.sample(s.points, generator) for _ in range(2))
    ends = {"student": student_sample(student, noise)}
    ends["teacher"] = integrate_teacher(teacher, noise, STEPS, solver="heun")
    ends["few_steps"] = integrate_teacher(teacher, noise, s.nfe)
    rows = {"data": {"energy_distance": energy_distance(more_data, data)}}
    for name, x_0 in ends.items():
        rows[name] = {"endpoint_rmse": endpoint_rmse(x_0, ends["teacher"])}
        rows[name] |= {"energy_distance": energy_distance(x_0, data)}
        # One step ends at a corner of four squares, for every noise: there "inside" misleads.
        if isinstance(density, Checkerboard) and name != "few_steps":
            rows[name] |= {"inside": float(density.inside(x_0).float().mean())}
    for name, row in rows.items():
        for metric, value in row.items():
            if not math.isfinite(value):
                raise ValueError(f"{metric} of the {name} is {value}")
        print(f"{name:<10}", "  ".join(f"{metric} {value:<8.2g}" for metric, value in row.items()))
    write_json(s.out / "metrics.json", asdict(s) | {"out": str(s.out), "seconds": seconds} | rows)
    draw_overview(s.out / "overview.png", student, teacher, noise, data, ends, rows)
    print(f"trained in {seconds} s; written to {s.out}/")


if __name__ == "__main__":
    run_cli(main)
