"""Five policies under one protocol: the same network, loss, iterations and teacher queries.

    python -m benchmarks.policies                          # about twenty core-minutes
    python -m benchmarks.policies --policies gmflow momentum --nfe 1 --iterations 4000

The policies differ in how they react to the state x (state feedback):
    gmflow       a mixture over x_0, updated by x: x0_hat depends on x and t
    dx           x0_hat(t), linear between N points; the velocity is (x - x0_hat(t)) / t
    polynomial   x0_hat(t), a polynomial of tau with N coefficients
    constant     x0_hat(t), constant on N equal pieces
    momentum     the velocity is a function of t alone (ArcFlow, arXiv 2602.09014)
The column `push` measures it for one segment: the state at t = 0.5 is displaced by 0.02, `push` is
what is left of the displacement at t = 0, relative to it (10% and 90% quantiles over 1000 noises,
first seed). 1.00 is no reaction at all, 0.00 an end that is fixed at the source.

Trained by toy_2d.train on a density of the plane. The endpoint RMSE is over 10,000 noises, to 64
Heun steps of the teacher; mean and standard deviation over the seeds of weights and draws.
"""

import math
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

import toy_2d
from benchmarks.timing import print_table
from common.cli import keep_freed_memory, parse, run_cli, setting
from common.teachers import endpoint_rmse, integrate_teacher
from piflow_minimal import DXPolicy, Time, rollout, unshift_time


class ConstantPolicy(DXPolicy):
    """x0_hat is constant on N equal pieces of the segment; the first piece is the last in time."""

    def x0_hat(self, t: Time) -> Tensor:
        """The denoised state at noise level t. -> (B, 2)."""
        t = torch.as_tensor(t).to(self.x0).expand(len(self.x0))
        place = (unshift_time(t, self.shift) - self.tau_dst) / self.length  #     (B,) in [0, 1]
        n = self.x0.shape[1]
        piece = (place * n).floor().long().clamp(0, n - 1)
        return self.x0[torch.arange(len(piece)), piece]


class MomentumPolicy:
    """ArcFlow's policy: pi(t) = sum_k v_k exp(gamma_k (t_src - t)), the same for every state.

    Args: v: (B, K, 2); gamma: (B, K), any sign; x_src: (B, 2); t_src: (B,) in (0, 1].
    """

    def __init__(self, v: Tensor, gamma: Tensor, x_src: Tensor, t_src: Tensor):
        self.v, self.gamma = v, gamma
        self.x_src, self.t_src = x_src, t_src

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """pi(t). -> (B, 2)."""
        growth = torch.exp(self.gamma * (self.t_src - t)[:, None])  #             (B, K)
        return (growth[..., None] * self.v).sum(1)

    def flow(self, x: Tensor, t: Time, t_end: Time) -> Tensor:
        """The exact rollout: x minus the integral of pi from t_end to t. -> (B, 2)."""
        z = self.gamma * (t - t_end)[:, None]
        small = z.abs() < 1e-3
        mean = torch.where(small, 1 + z / 2, torch.expm1(z) / torch.where(small, 1.0, z))
        mean = mean * torch.exp(self.gamma * (self.t_src - t)[:, None])  #        (B, K)
        return x - (t - t_end)[:, None] * (mean[..., None] * self.v).sum(1)

    def detach(self) -> "MomentumPolicy":
        """The same policy without a gradient."""
        return MomentumPolicy(self.v.detach(), self.gamma.detach(), self.x_src, self.t_src)


def _polynomial(velocities, others, x_src, t_src, segment_size) -> DXPolicy:
    return DXPolicy(velocities, x_src, t_src, segment_size, mode="polynomial")


def _constant(velocities, others, x_src, t_src, segment_size) -> ConstantPolicy:
    return ConstantPolicy(velocities, x_src, t_src, segment_size)


def _momentum(velocities, others, x_src, t_src, segment_size) -> MomentumPolicy:
    """The first component starts as the way to one point, the others at zero; gamma_1 = 0."""
    n = velocities.shape[1]
    start = torch.linspace(-3, 3, n - 1).to(others)  #  equal components would stay equal
    gamma = torch.cat([torch.zeros_like(others[:, :1]), start + others], 1)
    v = velocities - (torch.arange(n) > 0).to(x_src)[:, None] * (x_src / t_src[:, None])[:, None]
    return MomentumPolicy(v, gamma, x_src, t_src)


# The weight t^t_power of the loss is the best of 0, 1 and 2 for each, on another seed.
KINDS = {
    "gmflow": toy_2d.POLICIES["gmflow"]._replace(components=32, t_power=1.0),
    "dx": toy_2d.POLICIES["dx"],
    "polynomial": toy_2d.PolicyKind(10, lambda n: 2 * n, _polynomial, t_power=2.0),
    "constant": toy_2d.PolicyKind(20, lambda n: 2 * n, _constant, t_power=2.0),
    "momentum": toy_2d.PolicyKind(16, lambda n: 3 * n - 1, _momentum, "exact", t_power=1.0),
}


@dataclass(frozen=True)
class Settings:
    """Flags of the benchmark."""

    policies: tuple[str, ...] = setting(tuple(KINDS), "policies to train", choices=KINDS)
    nfe: tuple[int, ...] = setting((1, 2, 4), "network evaluations, one segment each", low=1)
    seeds: tuple[int, ...] = setting((0, 1, 2), "seeds of weights and draws", low=0)
    iterations: int = setting(1000, "optimizer steps of each run", low=1)
    density: str = setting("checkerboard", "density of the data", choices=toy_2d.DENSITIES)
    points: int = setting(10_000, "noises of the metrics", low=100)


def train(density, name: str, nfe: int, seed: int, iterations: int) -> toy_2d.Student:
    """One student of toy_2d with the policy `name`."""
    toy_2d.POLICIES[name] = KINDS[name]  #  the whole of what a new policy needs
    settings = toy_2d.Settings(policy=name, nfe=nfe, seed=seed, iterations=iterations, device="cpu")
    return toy_2d.train(density, settings)


class AsPolicy:
    """A teacher where `rollout` expects a policy: every substep is an evaluation."""

    def __init__(self, teacher):
        self.velocity = teacher


@torch.no_grad()
def push(policy, noise: Tensor, size: float = 0.02) -> Tensor:
    """Displacements at t = 0.5 and what is left of them at t = 0, relative. -> (N,), one each."""
    angle = 2 * math.pi * torch.rand(len(noise), generator=torch.Generator().manual_seed(2))
    step = size * torch.stack([angle.cos(), angle.sin()], 1)
    middle = rollout(policy, noise, 1.0, 0.5, solver="deis")
    ends = [rollout(policy, x, 0.5, 0.0, solver="deis") for x in (middle, middle + step)]
    return (ends[1] - ends[0]).norm(dim=1) / size


def limits(pushed: Tensor) -> str:
    """The 10% and 90% quantiles."""
    low, high = pushed.quantile(torch.tensor([0.1, 0.9])).tolist()
    return f"{low:.2f} to {high:.2f}"


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation; the value alone if there is one."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} +- {statistics.stdev(values):.{digits}f}"


HEADER = ["policy", "n", "outputs", "nfe", "endpoint RMSE", "energy distance", "push", "CPU s"]


def compare(settings: Settings, report=lambda rows: None) -> list[list]:
    """Trains everything. -> the rows of the table; `report` gets them after each row."""
    s, density = settings, toy_2d.make_density(settings.density)
    generator = torch.Generator().manual_seed(1)
    noise, data = torch.randn(s.points, 2, generator=generator), density.sample(s.points, generator)
    end = integrate_teacher(density.velocity, noise, toy_2d.STEPS, solver="heun")
    teacher, few_noises = AsPolicy(density.velocity), noise[:1000]

    def measured(name, size, outputs, nfe, ends, pushed, seconds) -> list:
        rmse = spread([endpoint_rmse(x, end) for x in ends], 3) if nfe else ""
        distance = spread([toy_2d.energy_distance(x, data) for x in ends], 4)
        return [name, size, outputs, nfe, rmse, distance, pushed, seconds]

    rows = [measured("teacher", "", "", "", [end], limits(push(teacher, few_noises)), "")]
    for nfe in s.nfe:
        few = rollout(teacher, noise, 1.0, 0.0, total_substeps=nfe, solver="deis")
        rows.append(measured("teacher, DEIS", "", "", nfe, [few], "", ""))
        for name in s.policies:
            start = time.process_time()
            students = [train(density, name, nfe, seed, s.iterations) for seed in s.seeds]
            seconds = f"{(time.process_time() - start) / len(s.seeds):.1f}"
            ends = [toy_2d.student_sample(student, noise).detach() for student in students]
            pushed = ""
            if nfe == 1:
                policy = students[0](few_noises, torch.ones(len(few_noises)))
                pushed = limits(push(policy, few_noises))
            size, outputs = KINDS[name].components, students[0].head.out_features
            rows.append(measured(name, size, outputs, nfe, ends, pushed, seconds))
            report(rows)
    return rows


def main(argv: list[str] | None = None) -> None:
    """Prints the table after each of its rows."""
    torch.set_num_threads(1)  # a second one gains little on small tensors, and may cost much
    keep_freed_memory()
    compare(parse(Settings, __doc__, argv), lambda rows: print_table(HEADER, rows))


if __name__ == "__main__":
    run_cli(main)
