"""Time to the published accuracy: the textbook formula, the policies here, and torch.compile.

    python -m benchmarks.rollout                       # some minutes on two CPU cores
    python -m benchmarks.rollout --no-keep-memory      # with the C library's own memory handling
    python -m benchmarks.rollout --device cuda --threads 1

Two jobs, each from t = 1 to 0: a rollout without a gradient, and a pi-ID loss with its backward
pass (two queries, a teacher that costs nothing). Sizes: four ImageNet latents (K = 32), one
Qwen-Image latent of 1360 x 768 (K = 8); DX with N = 10.

`plain` is the formula of the papers as it stands, with (B, K, C, H, W) tensors made anew in every
substep. Euler takes 128 substeps, the published protocol; deis takes the fewest that are as
accurate on this policy. `error` is the RMS distance to the converged rollout in float64. The time
is the fastest of --rounds, all ways in turns; with one CPU thread CPU time, else wall-clock.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.timing import in_turns, print_table
from common.cli import DEVICE_HELP, keep_freed_memory, parse, pick_device, run_cli, setting
from piflow_minimal import DXPolicy, GaussianMixture, GMFlowPolicy, Policy, pi_id_loss, rollout

PUBLISHED = 128  # Euler substeps
FEW = (6, 8, 10, 12, 14, 16, 18, 20, 24, 32, 48, 64, 128)  # deis substeps to choose from
LIMIT = 2048  # deis substeps that stand for infinitely many
SIZES = {"ImageNet": (4, 32, 4, 32, 32), "Qwen-Image": (1, 8, 16, 96, 170)}  # B, K, C, H, W
QUERIES = (0.4, 0.7)  # where the loss compares, in 1 - t; for all samples, as plain code would


@dataclass(frozen=True)
class Settings:
    """Flags of the benchmark."""

    device: str = setting("auto", DEVICE_HELP)
    threads: tuple[int, ...] = setting((1, 2), "numbers of CPU threads to measure with", low=1)
    rounds: int = setting(7, "measurements of each way", low=1)
    policies: tuple[str, ...] = setting(("gmflow", "dx"), "policies", choices=("gmflow", "dx"))
    compile: bool = setting(True, "measure torch.compile as well")
    keep_memory: bool = setting(True, "freed memory stays with the process, as in all scripts here")


class CompiledGMFlow(GMFlowPolicy):
    """GMFlowPolicy through torch.compile."""

    velocity = torch.compile(GMFlowPolicy.velocity)


class CompiledDX(DXPolicy):
    """DXPolicy through torch.compile."""

    velocity = torch.compile(DXPolicy.velocity)


class PlainGMFlow(GMFlowPolicy):
    """arXiv 2504.05304 and 2510.14974, without any rearrangement."""

    def __init__(self, mixture: GaussianMixture, x_src: Tensor, t_src: float):
        self.mixture, self.x_src = mixture, x_src
        self.t_src = x_src.new_full((len(x_src),), t_src)

    def velocity(self, x: Tensor, t: float | Tensor) -> Tensor:
        """pi(x, t). t: a number, or (B,) with one value."""
        t = t if isinstance(t, float) else t.view(-1, 1, 1, 1, 1).clamp(min=1e-6)
        (means, logstds, logweights), t_src = self.mixture, self.t_src.view(-1, 1, 1, 1, 1)
        x, x_src, alpha, alpha_src = x[:, None], self.x_src[:, None], 1 - t, 1 - t_src
        m, var = x_src - t_src * means, (t_src * logstds.exp()) ** 2
        zeta = (alpha / t) ** 2 - (alpha_src / t_src) ** 2
        nu = alpha * x / t**2 - alpha_src * x_src / t_src**2
        d = 1 + var * zeta
        logits = logweights + (m * (nu - zeta * m / 2)).sum(2, keepdim=True) / d
        x_0 = (logits.softmax(1) * (var * nu + m) / d).sum(1, keepdim=True)
        return ((x - x_0) / t)[:, 0]


class PlainDX(DXPolicy):
    """The hat function and the denoised state of every grid point made anew."""

    def velocity(self, x: Tensor, t: float | Tensor) -> Tensor:
        """pi(x, t). t: a number, or (B,) with one value."""
        t = torch.as_tensor(t).reshape(-1)[:1].to(x).clamp(min=1e-6)
        n, t_src = self.velocities.shape[1], self.t_src.view(-1, 1, 1, 1, 1)
        x0 = self.x_src[:, None] - t_src * self.velocities
        hats = (1 - (t - torch.linspace(0, 1, n).to(x)).abs() * (n - 1)).clamp(min=0)
        return (x - (hats.view(1, n, 1, 1, 1) * x0).sum(1)) / t


KINDS = {
    "gmflow": {"plain": PlainGMFlow, "eager": GMFlowPolicy, "compiled": CompiledGMFlow},
    "dx": {"plain": PlainDX, "eager": DXPolicy, "compiled": CompiledDX},
}


def outputs(kind: str, size: tuple, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """x_src and a random network output. size: (B, K or N, C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    x, values = (torch.randn(s, generator=generator) for s in ((size[0], *size[2:]), size))
    if kind == "dx":
        return x.to(device), [values.to(device)]
    logweights = torch.randn(*size[:2], 1, *size[3:], generator=generator).log_softmax(1)
    logstds = torch.full((size[0], 1, 1, 1, 1), -1.0)
    return x.to(device), [part.to(device) for part in (0.3 * values, logstds, logweights)]


def make(cls: type, x: Tensor, parts: list[Tensor]) -> Policy:
    """The policy at t = 1."""
    return cls(*parts if len(parts) == 1 else [GaussianMixture(*parts)], x, 1.0)


def plain_rollout(policy: Policy, stops: tuple[float, ...] = (1.0,)) -> list[Tensor]:
    """Euler from t = 1; the states at 1 - t in `stops`."""
    x, t, states = policy.x_src, 1.0, []
    for stop in stops:
        n = max(1, round((stop - 1 + t) * PUBLISHED))
        dt = (1 - stop - t) / n
        for i in range(n):
            x = x + dt * policy.velocity(x, t + i * dt)
        t = 1 - stop
        states.append(x)
    return states


def plain_loss(policy: Policy, teacher: Callable) -> Tensor:
    """Algorithm 1 for query times that all samples share."""
    with torch.no_grad():
        states = plain_rollout(policy, (*QUERIES, 1.0))[:-1]
    pairs = [(x, 1 - stop) for x, stop in zip(states, QUERIES, strict=True)]
    return sum((policy.velocity(x, t) - teacher(x, t)).square().mean() for x, t in pairs) / 2


def jobs(way: str, cls: type, x: Tensor, parts: list[Tensor], solver: str, n: int) -> dict:
    """-> {"rollout": function, "loss + backward": function}, each of which returns a tensor."""

    def follow() -> Tensor:
        with torch.no_grad():
            policy = make(cls, x, parts)
            if way == "plain":
                return plain_rollout(policy)[0]
            return rollout(policy, x, 1.0, 0.0, total_substeps=n, solver=solver)

    leaves = [part.clone().requires_grad_(True) for part in parts]
    uniforms = x.new_tensor(QUERIES).expand(len(x), 2), x.new_zeros(len(x), 1)

    def train() -> Tensor:
        policy, teacher = make(cls, x, leaves), lambda x, t: x
        if way == "plain":
            loss = plain_loss(policy, teacher)
        else:
            options = {"total_substeps": n, "solver": solver, "uniforms": uniforms}
            loss = pi_id_loss(policy, teacher, 1.0, 1.0, **options).loss
        loss.backward()
        for leaf in leaves:
            leaf.grad = None
        return loss.detach()

    return {"rollout": follow, "loss + backward": train}


@torch.no_grad()
def accuracies(kind: str, x: Tensor, parts: list[Tensor]) -> tuple[int, dict[str, float]]:
    """The fewest deis substeps that are as accurate as the published Euler; RMS error of both."""
    small, wide = slice(0, 1), [part[:1].double() for part in parts]
    limit = make(KINDS[kind]["eager"], x[small].double(), wide)
    limit = rollout(limit, limit.x_src, 1.0, 0.0, total_substeps=LIMIT, solver="deis")
    policy = make(KINDS[kind]["eager"], x[small], [part[small] for part in parts])

    def error(n: int, solver: str) -> float:
        x_0 = rollout(policy, policy.x_src, 1.0, 0.0, total_substeps=n, solver=solver)
        return (x_0 - limit).square().mean().sqrt().item()

    euler = error(PUBLISHED, "euler")
    few = next((n for n in FEW if error(n, "deis") <= euler), FEW[-1])
    return few, {"euler": euler, "deis": error(few, "deis")}


def compare(kind: str, name: str, size: tuple, settings: Settings, device: torch.device) -> list:
    """Rows (job, way, solver, substeps, error, ms, times plain) for one policy and size."""
    x, parts = outputs(kind, size, device)
    few, error = accuracies(kind, x, parts)
    ways = {("plain", "euler"): PUBLISHED, ("eager", "euler"): PUBLISHED, ("eager", "deis"): few}
    if settings.compile:
        ways |= {("compiled", "euler"): PUBLISHED, ("compiled", "deis"): few}
    if kind == "dx":
        ways[("eager", "exact")] = 1
    made = {key: jobs(key[0], KINDS[kind][key[0]], x, parts, key[1], n) for key, n in ways.items()}
    rows = []
    for job in ("rollout", "loss + backward"):
        seconds = in_turns({key: made[key][job] for key in ways}, device, settings.rounds)
        for (way, solver), n in ways.items():
            ms, times = seconds[way, solver] * 1e3, seconds["plain", "euler"] / seconds[way, solver]
            off = "0" if solver == "exact" else f"{error[solver]:.1e}"
            rows.append([f"{kind} {name}", job, way, solver, n, off, f"{ms:.1f}", f"{times:.1f}"])
    return rows


def main(argv: list[str] | None = None) -> None:
    """Prints one table for every number of threads."""
    settings = parse(Settings, __doc__, argv)
    device = pick_device(settings.device)
    if settings.keep_memory:
        keep_freed_memory()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    kept = "kept by the process" if settings.keep_memory else "as the C library does"
    before = torch.get_num_threads()
    for threads in settings.threads:
        torch.set_num_threads(threads)
        print(f"{where}, PyTorch {torch.__version__}, CPU threads {threads}, freed memory {kept}")
        rows = []
        for kind in settings.policies:
            for name, size in SIZES.items():
                size = (size[0], 10, *size[2:]) if kind == "dx" else size
                rows += compare(kind, name, size, settings, device)
        print_table(["", "job", "way", "solver", "substeps", "error", "ms", "times plain"], rows)
    torch.set_num_threads(before)


if __name__ == "__main__":
    run_cli(main)
