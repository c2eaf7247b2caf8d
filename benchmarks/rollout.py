"""What following a policy for 128 substeps costs, against the formula written down plainly.

    python -m benchmarks.rollout              # two minutes on two CPU cores
    python -m benchmarks.rollout --no-scaling --device cuda

Sizes: a batch of four ImageNet latents (K = 32), one Qwen-Image latent of 1360 x 768 (K = 8), and
DX (N = 10). `plain` evaluates the formula of GMFlowPolicy.velocity as it stands in the papers, with
its (B, K, C, H, W) tensors made anew in every substep; `eager` and `compiled` are the policy, the
latter with rollout(...). `floor` is 128 times the time in which this machine reads
the means once: no method that reads them in every substep can be faster.

Also: kernels per substep, as the profiler counts them, and time over K, N, C, size and batch.
"""

import argparse
import json
import os
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import in_turns, print_table
from common.cli import keep_freed_memory, pick_device, run_cli
from piflow_minimal import DXPolicy, GaussianMixture, GMFlowPolicy, Policy, rollout

SUBSTEPS = 128
SIZES = {"ImageNet": (4, 32, 4, 32, 32), "Qwen-Image": (1, 8, 16, 96, 170)}  # B, K, C, H, W


def make(kind: str, size: tuple, device: torch.device) -> Policy:
    """A policy with random content at t = 1. size: (B, K or N, C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    x, values = (torch.randn(s, generator=generator) for s in ((size[0], *size[2:]), size))
    x, values = x.to(device), values.to(device)
    if kind == "dx":
        return DXPolicy(values, x, 1.0)
    logweights = torch.randn(*size[:2], 1, *size[3:], generator=generator).to(device)
    logstds = torch.full((size[0], 1, 1, 1, 1), -1.0, device=device)
    return GMFlowPolicy(GaussianMixture(0.3 * values, logstds, logweights.log_softmax(1)), x, 1.0)


def plain_gmflow(policy: GMFlowPolicy, x: Tensor, t: float) -> Tensor:
    """pi(x, t), transcribed from arXiv 2504.05304 and 2510.14974, without any rearrangement."""
    (means, logstds, logweights), t_src = policy.mixture, policy.t_src.view(-1, 1, 1, 1, 1)
    x, x_src, alpha, alpha_src = x[:, None], policy.x_src[:, None], 1 - t, 1 - t_src
    m, var = x_src - t_src * means, (t_src * logstds.exp()) ** 2
    zeta = (alpha / t) ** 2 - (alpha_src / t_src) ** 2
    nu = alpha * x / t**2 - alpha_src * x_src / t_src**2
    d = 1 + var * zeta
    logits = logweights + (m * (nu - zeta * m / 2)).sum(2, keepdim=True) / d
    x_0 = (logits.softmax(1) * (var * nu + m) / d).sum(1)
    return (x[:, 0] - x_0) / t


def plain_dx(policy: DXPolicy, x: Tensor, t: float) -> Tensor:
    """pi(x, t), every grid point's denoised state and hat function made anew."""
    n, t_src = policy.velocities.shape[1], policy.t_src.view(-1, 1, 1, 1, 1)
    x0 = policy.x_src[:, None] - t_src * policy.velocities
    grid = torch.linspace(0, 1, n, device=x.device)
    hats = (1 - (t - grid).abs() * (n - 1)).clamp(min=0)
    return (x - (hats.view(1, n, 1, 1, 1) * x0).sum(1)) / t


def plain_rollout(velocity: Callable, policy: Policy) -> Tensor:
    """Euler from t = 1 to 0."""
    x = policy.x_src
    for i in range(SUBSTEPS):
        x = x - velocity(policy, x, 1 - i / SUBSTEPS) / SUBSTEPS
    return x


def to_float64(policy: Policy) -> Policy:
    """The same policy in float64, on the CPU."""
    wide = lambda values: values.cpu().double()  # noqa: E731
    if isinstance(policy, DXPolicy):
        return DXPolicy(wide(policy.velocities), wide(policy.x_src), 1.0)
    mixture = GaussianMixture(*(wide(part) for part in policy.mixture))
    return GMFlowPolicy(mixture, wide(policy.x_src), 1.0)


def ways(policy: Policy) -> dict[str, Callable[[], Tensor]]:
    """All ways to follow it from t = 1 to 0."""
    dx = isinstance(policy, DXPolicy)
    walk = {"x": policy.x_src, "tau_start": 1.0, "tau_end": 0.0, "total_substeps": SUBSTEPS}
    functions = {
        "plain": lambda: plain_rollout(plain_dx if dx else plain_gmflow, policy),
        "eager": lambda: rollout(policy, **walk),
        "compiled": lambda: rollout(policy, compile=True, **walk),
    }
    if dx:
        functions["exact (one step)"] = lambda: rollout(policy, solver="exact", **walk)
    return functions


def kernels(function: Callable[[], Tensor]) -> float:
    """Kernels per substep: operators that call no other one and do more than look at a tensor."""
    looks = ("view", "strided", "empty", "select", "expand", "reshape", "unsqueeze", "slice", "to",
             "transpose", "detach", "resolve_conj", "resolve_neg", "unbind")  # fmt: skip
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    names = [event.name for event in profile.events() if not event.cpu_children]
    names = [name[6:] for name in names if name.startswith("aten::")]
    return sum(not name.endswith(looks) for name in names) / SUBSTEPS


def compare(device: torch.device, rounds: int) -> dict:
    """The main table: time, ratios, distance from the formula in float64, kernels."""
    rows, found = [], {}
    cases = [("gmflow", name, size) for name, size in SIZES.items()]
    cases += [("dx", name, (size[0], 10, *size[2:])) for name, size in SIZES.items()]
    for kind, name, size in cases:
        policy = make(kind, size, device)
        functions = ways(policy)
        values = policy.velocities if kind == "dx" else policy.mixture.means
        exact = plain_rollout(plain_dx if kind == "dx" else plain_gmflow, to_float64(policy))
        reads = {"floor": lambda values=values: [values.sum() for _ in range(SUBSTEPS)]}
        seconds = in_turns(functions | reads, device, rounds)
        for way, function in functions.items():
            gap = (function().cpu() - exact).abs().max() / exact.abs().max()
            rows.append([
                f"{kind} {name}", way, f"{1000 * seconds[way]:.1f}",
                f"{seconds['plain'] / seconds[way]:.1f}", f"{seconds[way] / seconds['floor']:.1f}",
                "" if "exact" in way else f"{gap:.0e}",
                "" if way == "compiled" else f"{kernels(function):.0f}",
            ])  # fmt: skip
        rows.append([f"{kind} {name}", "floor", f"{1000 * seconds['floor']:.1f}", "", "1", "", ""])
        found[f"{kind} {name}"] = seconds
    header = ["", "way", "ms per 128 substeps", "times plain", "of the floor", "error", "kernels"]
    print_table(header, rows)
    return found


def scaling(device: torch.device, rounds: int) -> None:
    """Time over each of the sizes, all else equal; linear means 2.0 in every column."""
    axes = {"B": (0, 1), "K": (1, 8), "C": (2, 4), "H": (3, 32)}
    rows = []
    for kind, axis in [("gmflow", name) for name in axes] + [("dx", "K")]:
        at, first = axes[axis]
        factors, functions = (1, 2, 4, 8), {}
        for factor in factors:
            size = [2, 16, 4, 64, 64]
            size[at] = first * factor
            policy = make(kind, tuple(size), device)
            functions[str(factor)] = ways(policy)["eager"]
        seconds = list(in_turns(functions, device, rounds).values())
        label = f"dx, N from {first}" if kind == "dx" else f"gmflow, {axis} from {first}"
        growth = [f"{b / a:.2f}" for a, b in zip(seconds, seconds[1:], strict=False)]
        rows.append([label, f"{1000 * seconds[0]:.1f}", *growth])
    print("Growth of the time at every doubling (else B 2, K 16, C 4, 64 x 64):")
    print_table(["", "ms at first", "x 2", "x 4", "x 8"], rows)


def main(argv: list[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--rounds", type=int, default=7, help="of which the median is taken")
    parser.add_argument("--scaling", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", default="", help="a file for the seconds of the main table")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise ValueError(f"--rounds is {args.rounds}; it must be at least 1")
    device = pick_device(args.device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's
    keep_freed_memory()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{where}, {torch.get_num_threads()} CPU threads, PyTorch {torch.__version__}\n")
    with torch.no_grad():
        found = compare(device, args.rounds)
        if args.scaling:
            scaling(device, args.rounds)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    run_cli(main)
