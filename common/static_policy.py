"""The static policy of the toys: parameters in place of a network, fitted to one trajectory.

Its means, log weights and standard deviation (GMFlow) or its grid of velocities (DX) are trained as
a student network is. What it reaches is what the policy family can express; what a distilled
student lacks beyond that is the network's. One policy covers the whole path, t = 1 to 0.

Two phases. Cloning compares with the teacher on the teacher's own trajectory: with one trajectory
its stored states are all that there is to know. pi-ID compares on the trajectory of the policy.
Alone it may settle elsewhere: where the teacher's flow amplifies early errors, the policy's own
states lead to another picture, and there the teacher confirms it. --cloning 0 shows that.

The training loop, `fit`, stands in each toy. Everything around it is here: settings, evaluation,
one run, a sweep over the policy's size. The figures are in common/plots.py.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import plots
from common.cli import DEVICE_HELP, atomic, check_settings, setting, write_json
from common.teachers import endpoint_rmse, integrate_teacher
from piflow_minimal import (
    DXPolicy,
    GaussianMixture,
    GMFlowPolicy,
    Policy,
    Teacher,
    rollout,
    shift_time,
)

Decode = Callable[[Tensor], Tensor]  # latents (B, C, *) -> images (B, 1 or 3, H, W) in [-1, 1]
Monitor = Callable[[int, Tensor, "StaticPolicy"], None]  # (iteration, loss, static)
Fit = Callable[["StaticPolicy", Teacher, Tensor, "ToySettings", torch.Generator, Monitor], None]

SIZES = {"gmflow": (1, 2, 4, 8, 16, 32), "dx": (2, 4, 8, 16, 32, 64)}  # K and N of the sweep
INTERVALS = 32  # of raw time, at whose ends trajectories are compared


@dataclasses.dataclass(frozen=True)
class ToySettings:
    """The flags that both toys share."""

    policy: str = setting("gmflow", "kind of policy", choices=("gmflow", "dx"))
    components: int = setting(32, "mixture components K (gmflow) or grid points N (dx)", low=1)
    cloning: int = setting(
        0, "optimizer steps on the teacher's trajectory, before pi-ID; 0 as published", low=0
    )
    cloning_lr: float = setting(5e-2, "as --lr, of the cloning", above=0)
    iterations: int = setting(5000, "optimizer steps of pi-ID", low=1)
    lr: float = setting(5e-3, "Adam learning rate, decays to 0 along a cosine", above=0)
    num_intermediates: int = setting(2, "teacher queries per iteration", low=1)
    total_substeps: int = setting(128, "substeps of the GMFlow policy rollout", low=1)
    solver: str = setting(
        "euler", "solver of the GMFlow policy rollout (DX: closed form)", choices=("euler", "deis")
    )
    time_weight: float = setting(
        0.0, "squared errors are weighted by t to this power; 0 is the published loss", low=0
    )
    stratified: bool = setting(False, "one query time in each M-th of the path: less variance")
    batch_teacher: bool = setting(False, "one batched teacher query for all intermediates")
    teacher_steps: int = setting(
        512, f"Heun steps of the reference, a multiple of {INTERVALS}", low=1
    )
    seed: int = setting(42, "seed of the noise and of the training", low=0)
    sweep: bool = setting(False, "one run per policy size, in place of one run")
    picture_every: int = setting(0, "iterations between two progress.png; 0: none", low=0)
    device: str = setting("auto", DEVICE_HELP)
    out: Path = setting(Path("outputs/toy"), "folder for figures and metrics")

    def __post_init__(self):
        """Raises: ValueError, one line, for settings that do not apply together."""
        check_settings(self)
        if self.teacher_steps % INTERVALS:
            raise ValueError(
                f"--teacher-steps is {self.teacher_steps}; it must be a multiple of {INTERVALS}"
            )
        if self.sweep and self.picture_every:
            raise ValueError("--picture-every is for one run; leave it out with --sweep")
        if self.sweep and self.policy == "dx":
            raise ValueError("--policy dx is for one run; --sweep fits both policies")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out {self.out} is a file; it must be a folder")

    @property
    def rollout(self) -> dict[str, Any]:
        """Options of `pi_id_loss`. The micro-window of DX is 3/128 of the path."""
        if self.policy == "dx":
            return {"solver": "exact", "total_substeps": 128, "window_substeps": 3}
        return {"solver": self.solver, "total_substeps": self.total_substeps}


class StaticPolicy(nn.Module):
    """The parameters of a policy for each sample of x_src. Calling it gives the policy.

    gmflow: means u_src + 0.5 N(0, 1), equal weights, standard deviation 0.05.
    dx: N copies of u_src.

    Args:
        x_src: (B, C, *) noise, the state at t = 1. u_src: (B, C, *) the teacher's velocity there.
        policy: "gmflow" or "dx"; components: K or N.
        generator: of the spread of the means, on the CPU.
    """

    def __init__(
        self, x_src: Tensor, u_src: Tensor, policy: str = "gmflow", components: int = 32,
        shift: float = 1.0, generator: torch.Generator | None = None,
    ):  # fmt: skip
        super().__init__()
        self.policy, self.x_src, self.shift = policy, x_src, shift
        velocities = u_src[:, None].repeat_interleave(components, dim=1)  #        (B, K, C, *)
        if policy == "gmflow":
            spread = torch.randn(velocities.shape, generator=generator).to(velocities)
            velocities = velocities + 0.5 * spread
            self.logweights = nn.Parameter(torch.zeros_like(velocities[:, :, :1]))  # (B, K, 1, *)
            ones = [1] * (x_src.ndim - 2)
            self.logstds = nn.Parameter(x_src.new_full((len(x_src), 1, 1, *ones), math.log(0.05)))
        self.velocities = nn.Parameter(velocities)

    def forward(self) -> GMFlowPolicy | DXPolicy:
        if self.policy == "dx":
            return DXPolicy(self.velocities, self.x_src, 1.0, shift=self.shift)
        mixture = GaussianMixture(self.velocities, self.logstds, self.logweights.log_softmax(1))
        return GMFlowPolicy(mixture, self.x_src, 1.0)


def query_times(
    batch: int, settings: ToySettings, generator: torch.Generator
) -> tuple[Tensor, Tensor] | None:
    """Argument `uniforms` of `pi_id_loss`: one in each M-th of [0, 1), or None: independent."""
    M = settings.num_intermediates
    if not settings.stratified:
        return None
    times = (torch.arange(M) + torch.rand(batch, M, generator=generator)) / M  #   (B, M)
    return times, times[:, 1:]


class TeacherPath:
    """The teacher's trajectory, for cloning: the stored states, and a cubic between each two.

    reference: (INTERVALS + 1, B, C, *), uniform in tau from 1 to 0; the teacher is queried at each.
    """

    def __init__(self, teacher: Teacher, reference: Tensor, shift: float = 1.0):
        self.t = shift_time(torch.linspace(1, 0, len(reference)), shift).tolist()
        self.x = reference
        with torch.no_grad():
            times = (x.new_full((len(x),), t) for x, t in zip(reference, self.t, strict=True))
            self.u = torch.stack([teacher(x, t) for x, t in zip(reference, times, strict=True)])

    def at(self, place: float) -> tuple[Tensor, Tensor, Tensor]:
        """-> x (B, C, *), t (B,), u (B, C, *) at place in [0, INTERVALS), counted from t = 1."""
        i, a = int(place), place % 1
        (t, t_end), (x, x_end), (u, u_end) = (part[i : i + 2] for part in (self.t, self.x, self.u))
        h = t_end - t  # Hermite: both states and both velocities
        move = x_end - x
        here = x + a * a * (3 - 2 * a) * move + h * a * (1 - a) * ((1 - a) * u - a * u_end)
        slope = 6 * a * (1 - a) / h * move + (1 - a) * (1 - 3 * a) * u + a * (3 * a - 2) * u_end
        return here, x.new_full((len(x),), t + a * h), slope

    def loss(self, policy: Policy, settings: ToySettings, generator: torch.Generator) -> Tensor:
        """Mean squared error at one place in each M-th of the path, weighted as in pi-ID."""
        M, losses = settings.num_intermediates, []
        places = (torch.arange(M) + torch.rand(M, generator=generator)) / M
        for place in (places.clamp(max=1 - 1e-6) * (len(self.x) - 1)).tolist():
            x, t, u = self.at(place)
            error = (policy.velocity(x, t) - u).square().flatten(1).mean(1)
            losses.append((error * t**settings.time_weight).mean())
        return torch.stack(losses).mean()


# ---- Evaluation ----------------------------------------------------------------------------------


def teacher_trajectory(teacher: Teacher, x: Tensor, steps: int, shift: float = 1.0) -> Tensor:
    """The reference: Heun steps from noise x (B, C, *) -> (INTERVALS + 1, B, C, *), uniform in tau.

    Raises: ValueError if a state is not finite.
    """
    states, every = [], steps // INTERVALS
    with tqdm(total=steps, desc="teacher", mininterval=1.0, leave=False) as bar:

        def keep(step: int, t: Tensor, x: Tensor) -> None:
            bar.update(min(step, 1))
            if step % every == 0:
                states.append(x)

        integrate_teacher(teacher, x, steps, shift, "heun", keep)
    for i, state in enumerate(states):
        if not state.isfinite().all():
            raise ValueError(
                f"the teacher's state is not finite at tau = {1 - i / INTERVALS:.2f}: its weights "
                "are damaged, or its precision is too low"
            )
    return torch.stack(states)


def policy_trajectory(
    policy: Policy, shift: float = 1.0, total_substeps: int = 128, solver: str = "euler"
) -> Tensor:
    """The policy's rollout at the same times -> (INTERVALS + 1, B, C, *)."""
    tau = torch.linspace(1, 0, INTERVALS + 1).to(policy.x_src)
    through = tau[1:-1, None].expand(-1, len(policy.x_src))
    with torch.no_grad():
        options = {"solver": solver, "through": through, "longest": 1.0}
        end, states = rollout(policy, policy.x_src, 1.0, 0.0, shift, total_substeps, **options)
    return torch.stack([policy.x_src, *states, end])


def psnr_db(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of images in [-1, 1] (peak 2), in dB."""
    return 20 * math.log10(2 / max(endpoint_rmse(a.clamp(-1, 1), b.clamp(-1, 1)), 1e-9))


def compare(
    states: Tensor, reference: Tensor, decode: Decode, shift: float = 1.0
) -> dict[str, Any]:
    """Two trajectories (INTERVALS + 1, B, C, *) -> what metrics.json says about their distance.

    Raises: ValueError if a number is not finite.
    """
    t = shift_time(torch.linspace(1, 0, len(states)), shift)
    error = [endpoint_rmse(a, b) for a, b in zip(states, reference, strict=True)]
    images = decode(states[-1]), decode(reference[-1])
    for name, image in zip(("policy", "teacher"), images, strict=True):
        if not image.isfinite().all():
            raise ValueError(f"the decoded image of the {name} is not finite")
    return {
        "endpoint_psnr_db": psnr_db(*images),
        "endpoint_rmse": error[-1],
        "trajectory_rmse": error,
        "t": t.tolist(),
    }


# ---- One run, and the sweep ----------------------------------------------------------------------


class Run(NamedTuple):
    """What one fit leaves."""

    metrics: dict[str, Any]  # of `compare`, seconds, settings
    policy: Policy
    states: Tensor  # (INTERVALS + 1, B, C, *), of the policy
    losses: Tensor  # (iterations,)
    weights: dict[str, Tensor]  # state dict of the StaticPolicy


def run_fit(
    fit: Fit, teacher: Teacher, reference: Tensor, decode: Decode, settings: ToySettings,
    shift: float = 1.0,
) -> Run:  # fmt: skip
    """One fit, measured against the teacher's trajectory (INTERVALS + 1, B, C, *)."""
    x_src, total = reference[0], settings.cloning + settings.iterations
    losses = reference.new_zeros(total)
    generator = torch.Generator().manual_seed(settings.seed + 1)  # `seed` itself gave the noise
    with torch.no_grad():
        u_src = teacher(x_src, x_src.new_ones(len(x_src)))
    kind, size, options = settings.policy, settings.components, settings.rollout
    static = StaticPolicy(x_src, u_src, kind, size, shift, generator)

    def trajectory(policy: Policy) -> Tensor:
        return policy_trajectory(policy, shift, options["total_substeps"], options["solver"])

    def monitor(i: int, loss: Tensor, static: StaticPolicy) -> None:
        losses[i], done = loss, i + 1
        if done % 50 == 0:  # the only device sync
            bar.set_postfix(loss=f"{losses[i - 49 : done].mean().item():.2e}", refresh=False)
            bar.update(50)
        if settings.picture_every and done % settings.picture_every == 0:
            end = trajectory(static().detach())[-1]
            pair = [decode(x)[0] for x in (reference[-1], end)]
            figure = plots.image_rows({f"teacher, and the policy after {done} iterations": pair})
            plots.save_figure(figure, settings.out / "progress.png")

    began = time.perf_counter()
    with tqdm(total=total, desc=f"{kind} {size}", mininterval=1.0) as bar:
        fit(static, teacher, reference, settings, generator, monitor)
        bar.update(total - bar.n)
    seconds, policy = time.perf_counter() - began, static().detach()
    states = trajectory(policy)
    metrics = compare(states, reference, decode, shift) | {"seconds": seconds}
    metrics["settings"] = describe(settings, shift)
    return Run(metrics, policy, states, losses.cpu(), static.state_dict())


def run_toy(
    fit: Fit, teacher: Teacher, x_src: Tensor, decode: Decode, settings: ToySettings, name: str,
    shift: float = 1.0, about: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Fits one policy, or one per size with --sweep -> metrics and figures in settings.out.

    Args:
        fit: the training loop. teacher: (x, t) -> u, guidance included. x_src: (1, C, *) noise.
        decode: latents -> images in [-1, 1]. name: of the picture. shift: of the schedule.
        about: what else metrics.json says about the run.
    Raises: ValueError, before anything is written, if a state or an image is not finite.
    """
    about = {**(about or {}), "reference": f"{settings.teacher_steps} Heun steps of the teacher"}
    reference = teacher_trajectory(teacher, x_src, settings.teacher_steps, shift)
    if settings.sweep:
        runs = run_sweep(fit, teacher, reference, decode, settings, shift)
        metrics = about | {"runs": runs, "settings": describe(settings, shift)}
        write_json(settings.out / "sweep.json", metrics)
        steps = settings.cloning + settings.iterations
        figure = plots.policy_sizes(runs, f"{name}, {steps} iterations a run")
        plots.save_figure(figure, settings.out / "sweep.png")
        print(f"wrote {settings.out}/sweep.json and sweep.png")
        return
    run = run_fit(fit, teacher, reference, decode, settings, shift)
    write_json(settings.out / "metrics.json", about | run.metrics)
    with atomic(settings.out / "policy.pt") as temporary:
        torch.save(run.weights, temporary)
    psnr, rmse, seconds = (run.metrics[k] for k in ("endpoint_psnr_db", "endpoint_rmse", "seconds"))
    print(f"{name}: endpoint PSNR {psnr:.1f} dB, endpoint RMSE {rmse:.4f}, {seconds:.0f} s")
    kind = {"gmflow": "GMFlow policy, K", "dx": "DX policy, N"}[settings.policy]
    title = f"{kind} = {settings.components}: {name}, endpoint PSNR {psnr:.1f} dB"
    figure = plots.static_policy(teacher, run, reference, decode, title)
    plots.save_figure(figure, settings.out / "toy.png")
    print(f"wrote {settings.out}/metrics.json, policy.pt and toy.png")


def run_sweep(
    fit: Fit, teacher: Teacher, reference: Tensor, decode: Decode, settings: ToySettings,
    shift: float = 1.0,
) -> list[dict[str, Any]]:  # fmt: skip
    """One fit per K (gmflow) and per N (dx), same noise -> a row of metrics for each."""
    rows = []
    for policy, size in [(policy, size) for policy, sizes in SIZES.items() for size in sizes]:
        one = dataclasses.replace(settings, policy=policy, components=size, sweep=False)
        metrics = run_fit(fit, teacher, reference, decode, one, shift).metrics
        kept = {key: metrics[key] for key in ("endpoint_psnr_db", "endpoint_rmse", "seconds")}
        rows.append({"policy": policy, "size": size, **kept})
        print(f"{policy:6s} {size:3d}  {kept['endpoint_psnr_db']:5.1f} dB", flush=True)
    return rows


def describe(settings: ToySettings, shift: float) -> dict[str, Any]:
    """The settings as metrics.json keeps them."""
    values = {**dataclasses.asdict(settings), "shift": shift}
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}
