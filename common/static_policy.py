"""The static toy: a policy with no network behind it overfits one trajectory of a teacher.

Its means, log weights and standard deviation (GMFlow) or its grid of velocities (DX) are plain
parameters, trained by on-policy imitation exactly as a student network would be. What it reaches is
what the policy family can express; whatever a distilled student lacks beyond that is the network's.

`toy_dit_imagenet.py` and `toy_qwen.py` load a teacher and call `run_toy` or `run_sweep`; the
training loop is `fit`. Everything starts from noise at tau = 1; one policy goes all the way to 0.

What limits the fit: pi = (x - x0_hat)/t, so an error of x0_hat counts 1/t^2 in the squared error of
the velocity. The few draws with t < 0.02 rule Adam's step sizes, although that part of the path
hardly moves the endpoint. Weighting each squared error by t removes the stall (`time_weight`).
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.cli import write_json
from common.plots import save_figure
from piflow_minimal import DXPolicy, GaussianMixture, GMFlowPolicy, pi_id_loss, rollout, shift_time

Teacher = Callable[[Tensor, Tensor], Tensor]
Decode = Callable[[Tensor], Tensor]  # latents (B, C, *) -> images (B, 1 or 3, H, W) in [-1, 1]

COMPONENTS = (1, 2, 4, 8, 16, 32)  # K of the sweep
POINTS = (2, 4, 8, 16, 32, 64)  # N of the sweep
SHOWN = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0)  # noise levels of the figure
DX_WINDOW = 3  # substeps over which the DX policy's mean velocity is compared
COLORS = {"gmflow": "#0072B2", "dx": "#D55E00"}


# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ToySettings:
    """One run; `add_arguments` makes a flag of each field."""

    policy: str = "gmflow"  # or "dx"
    components: int = 32  # K of gmflow, N of dx
    iters: int = 1000
    lr: float = 5e-3  # of Adam; a cosine takes it to zero
    intermediates: int = 2  # teacher calls per iteration
    substeps: int = 128  # of the policy's rollout
    solver: str = "deis"  # of the policy's rollout
    time_weight: float = 1.0  # squared errors count t ** time_weight; 0 is the published loss
    batch_teacher: bool = False  # one teacher call for all intermediates: more memory, less time
    teacher_steps: int = 512  # Heun steps of the reference trajectory
    seed: int = 42

    def __post_init__(self):
        for name in ("components", "iters", "intermediates", "substeps", "teacher_steps", "lr"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be positive")
        if not self.time_weight >= 0:
            raise ValueError(f"--time-weight is {self.time_weight}; it must be at least 0")
        for name, accepted in (("policy", ("gmflow", "dx")), ("solver", ("euler", "deis"))):
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"--{name} is {getattr(self, name)!r}; choose one of {', '.join(accepted)}"
                )
        if self.teacher_steps % self.substeps:
            raise ValueError(
                f"--teacher-steps is {self.teacher_steps}; it must be a multiple of --substeps, "
                f"{self.substeps}"
            )


def add_arguments(parser: argparse.ArgumentParser, defaults: ToySettings) -> None:
    """Adds the flags that both toys share: those of `ToySettings`, --sweep, --every, --out."""
    told = {
        "policy": "gmflow or dx",
        "components": "mixture components (gmflow) or grid points (dx)",
        "iters": "optimizer steps",
        "lr": "of Adam; a cosine takes it to zero",
        "intermediates": "times per iteration at which the teacher is asked",
        "substeps": "of the policy's rollout",
        "solver": "of the policy's rollout: euler or deis",
        "time_weight": "squared errors count t to this power; 0 is the published loss",
        "batch_teacher": "one teacher call for all intermediates: more memory, less time",
        "teacher_steps": "Heun steps of the reference trajectory",
        "seed": "of the noise and of the training",
    }
    for name, default in dataclasses.asdict(defaults).items():
        flag = "--" + name.replace("_", "-")
        boolean = {"action": argparse.BooleanOptionalAction}
        kind = boolean if isinstance(default, bool) else {"type": type(default)}
        parser.add_argument(flag, default=default, help=told[name], **kind)
    parser.add_argument("--sweep", action="store_true", help="one run per policy size, one plot")
    parser.add_argument(
        "--every", type=int, default=200, help="iterations between pictures; 0: none"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--out", type=Path, default=None, help="folder for figures and metrics")


def settings_from(args: argparse.Namespace) -> ToySettings:
    """The parsed flags as settings. Raises: ValueError for what is not accepted."""
    names = [field.name for field in dataclasses.fields(ToySettings)]
    return ToySettings(**{name: getattr(args, name) for name in names})


# ------------------------------------------------------------------------------------------------
# The policy and its training
# ------------------------------------------------------------------------------------------------


class StaticPolicy(nn.Module):
    """The parameters of a policy for each sample of x_src. Calling it gives the policy.

    gmflow: means u_src + 0.5 N(0, 1), equal weights, standard deviation 0.05.
    dx: N copies of u_src.

    Args:
        settings: which policy, and its size.
        x_src: (B, C, *) noise, the state at t = 1.
        u_src: (B, C, *) the teacher's velocity there.
        generator: of the spread of the means, on the CPU.
    """

    def __init__(
        self,
        settings: ToySettings,
        x_src: Tensor,
        u_src: Tensor,
        shift: float = 1.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.kind, self.x_src, self.shift = settings.policy, x_src, shift
        size, ones = settings.components, [1] * (x_src.ndim - 2)
        velocities = u_src[:, None].repeat_interleave(size, dim=1)  #              (B, K, C, *)
        if self.kind == "gmflow":
            noise = torch.randn(velocities.shape, generator=generator).to(velocities)
            logweights = torch.zeros_like(velocities[:, :, :1])  #                 (B, K, 1, *)
            self.logweights = nn.Parameter(logweights)
            self.logstds = nn.Parameter(x_src.new_full((len(x_src), 1, 1, *ones), math.log(0.05)))
            velocities = velocities + 0.5 * noise
        self.velocities = nn.Parameter(velocities)

    def forward(self) -> GMFlowPolicy | DXPolicy:
        if self.kind == "dx":
            return DXPolicy(self.velocities, self.x_src, 1.0, shift=self.shift)
        mixture = GaussianMixture(self.velocities, self.logstds, self.logweights.log_softmax(1))
        return GMFlowPolicy(mixture, self.x_src, 1.0)


def fit(
    static: StaticPolicy,
    teacher: Teacher,
    settings: ToySettings,
    generator: torch.Generator | None = None,
    callback: Callable[[int, StaticPolicy], None] | None = None,
    label: str = "fit",
) -> Tensor:
    """Trains a static policy on its own trajectory (pi-ID) -> the unweighted losses, (iters,).

    In every step the detached policy walks from the noise to a few random times; the teacher says
    what the velocity should be there; the policy's own velocity is pulled towards that.
    callback(step, static) is called after every step.
    """
    optimizer = torch.optim.Adam(static.parameters(), lr=settings.lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.iters)
    window = DX_WINDOW if static.kind == "dx" else 0
    losses = torch.zeros(settings.iters, device=static.x_src.device)

    bar = tqdm(range(settings.iters), desc=label, mininterval=1.0)
    for step in bar:
        pair = pi_id_loss(
            static(),
            teacher,
            tau_src=1.0,
            segment_size=1.0,
            shift=static.shift,
            total_substeps=settings.substeps,
            num_intermediates=settings.intermediates,
            window_substeps=window,
            generator=generator,
            solver=settings.solver,
            batch_teacher=settings.batch_teacher,
        )
        error = (pair.u_policy - pair.u_teacher).square().flatten(1).mean(1)  #    (M B,)
        loss = (error * pair.t**settings.time_weight).mean()
        optimizer.zero_grad()
        loss.backward()
        for parameter in static.parameters():  # at t below 1e-6 a derivative may overflow float32
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        optimizer.step()
        cosine.step()

        losses[step] = pair.loss.detach()
        if step % 50 == 49:  # the only place where the host waits for the device
            bar.set_postfix(loss=f"{losses[step - 49 : step + 1].mean().item():.2e}")
        if callback:
            callback(step, static)
    return losses


# ------------------------------------------------------------------------------------------------
# Trajectories
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def follow_teacher(
    teacher: Teacher, x: Tensor, settings: ToySettings, shift: float = 1.0
) -> Tensor:
    """The reference: Heun steps from tau = 1 to 0 -> states at tau = 1, ..., 1/substeps, 0.

    x: (B, C, *) noise. -> (substeps + 1, B, C, *), every (teacher_steps / substeps)-th state.
    """
    steps = settings.teacher_steps
    t = shift_time(torch.linspace(1, 0, steps + 1, device=x.device), shift)
    states = [x]
    for i in tqdm(range(steps), desc="teacher", mininterval=1.0, leave=False):
        dt, now, then = t[i + 1] - t[i], t[i].expand(len(x)), t[i + 1].expand(len(x))
        u = teacher(x, now)
        if i + 1 < steps:  # the last step is Euler's: teachers are not asked at t = 0
            u = (u + teacher(x + dt * u, then)) / 2
        x = x + dt * u
        if (i + 1) % (steps // settings.substeps) == 0:
            states.append(x)
    return torch.stack(states)


@torch.no_grad()
def follow_policy(
    policy: GMFlowPolicy | DXPolicy, settings: ToySettings, shift: float = 1.0
) -> Tensor:
    """The policy's rollout at the same times -> (substeps + 1, B, C, *)."""
    states = []
    rollout(
        policy, policy.x_src, 1.0, 0.0, shift, settings.substeps, settings.solver,
        callback=lambda step, tau, x: states.append(x),
    )  # fmt: skip
    return torch.stack(states)


def rmse(a: Tensor, b: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """Root mean square difference over dims, by default over all."""
    return (a - b).square().mean(dims).sqrt()


def psnr_db(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of images in [-1, 1] (peak 2), in dB."""
    return (20 * torch.log10(2 / rmse(a.clamp(-1, 1), b.clamp(-1, 1)).clamp(min=1e-9))).item()


def compare(states: Tensor, reference: Tensor, decode: Decode) -> dict:
    """Two trajectories (S + 1, B, C, *) -> what metrics.json says about their distance."""
    error = rmse(states, reference, tuple(range(1, states.ndim)))  #               (S + 1,)
    return {
        "endpoint_psnr_db": psnr_db(decode(states[-1]), decode(reference[-1])),
        "endpoint_rmse": error[-1].item(),
        "trajectory_rmse": error.tolist(),
    }


# ------------------------------------------------------------------------------------------------
# One run, and the sweep
# ------------------------------------------------------------------------------------------------


def run_toy(
    teacher: Teacher,
    x_src: Tensor,
    decode: Decode,
    settings: ToySettings,
    out: Path,
    title: str,
    shift: float = 1.0,
    every: int = 0,
    extra: dict | None = None,
) -> dict:
    """Follows the teacher, fits a policy, writes out/toy.png and out/metrics.json.

    Args:
        teacher: (x, t) -> velocity, guidance included. x_src: (1, C, *) noise.
        decode: latents -> images in [-1, 1]. title: of the figure. shift: of the schedule.
        every: > 0 draws out/progress.png every so many iterations.
        extra: what else metrics.json should say about the run.
    Returns: the metrics: endpoint_psnr_db (decoded images, peak 2), endpoint_rmse (latents),
        trajectory_rmse (per time in `t`), seconds of fitting, settings.
    """
    reference = follow_teacher(teacher, x_src, settings, shift)

    def progress(step: int, static: StaticPolicy) -> None:
        if every and (step + 1) % every == 0:
            states = follow_policy(static().detach(), settings, shift)
            plot_pair(decode(reference[-1]), decode(states[-1]), step + 1, out / "progress.png")

    metrics, states, policy, losses = fit_and_compare(
        teacher, x_src, decode, settings, reference, shift, progress
    )
    metrics = {**(extra or {}), **metrics}
    plot_toy(teacher, policy, reference, states, losses, decode, metrics, title, out / "toy.png")
    write_json(out / "metrics.json", metrics)
    return metrics


def fit_and_compare(
    teacher: Teacher,
    x_src: Tensor,
    decode: Decode,
    settings: ToySettings,
    reference: Tensor,
    shift: float = 1.0,
    callback: Callable[[int, StaticPolicy], None] | None = None,
) -> tuple[dict, Tensor, GMFlowPolicy | DXPolicy, Tensor]:
    """One fit, compared with a reference trajectory -> metrics, states, the policy, losses."""
    generator = torch.Generator().manual_seed(settings.seed + 1)  # the noise is drawn from `seed`
    u_src = teacher(x_src, torch.ones(len(x_src), device=x_src.device))
    static = StaticPolicy(settings, x_src, u_src, shift, generator)
    began = time.perf_counter()
    label = f"{settings.policy} {settings.components}"
    losses = fit(static, teacher, settings, generator, callback, label).tolist()
    seconds = time.perf_counter() - began
    policy = static().detach()
    states = follow_policy(policy, settings, shift)
    t = shift_time(torch.linspace(1, 0, settings.substeps + 1), shift)
    metrics = {
        **compare(states, reference, decode),
        "t": t.tolist(),
        "seconds": seconds,
        "settings": {**dataclasses.asdict(settings), "shift": shift},
    }
    return metrics, states, policy, torch.tensor(losses)


def run_sweep(
    teacher: Teacher,
    x_src: Tensor,
    decode: Decode,
    settings: ToySettings,
    out: Path,
    title: str,
    shift: float = 1.0,
    components: tuple[int, ...] = COMPONENTS,
    points: tuple[int, ...] = POINTS,
    extra: dict | None = None,
) -> dict:
    """One run per K (gmflow) and per N (dx), same noise -> out/sweep.png and out/sweep.json."""
    reference = follow_teacher(teacher, x_src, settings, shift)
    runs = []
    for policy, sizes in (("gmflow", components), ("dx", points)):
        for size in sizes:
            one = dataclasses.replace(settings, policy=policy, components=size)
            metrics, *_ = fit_and_compare(teacher, x_src, decode, one, reference, shift)
            kept = ("endpoint_psnr_db", "endpoint_rmse", "seconds")
            runs.append({"policy": policy, "size": size, **{key: metrics[key] for key in kept}})
            print(f"{policy:6s} {size:3d}  {metrics['endpoint_psnr_db']:5.1f} dB", flush=True)
    result = {
        **(extra or {}),
        "runs": runs,
        "settings": {**dataclasses.asdict(settings), "shift": shift},
    }
    plot_sweep(runs, x_src.shape[1], settings.substeps, title, out / "sweep.png")
    write_json(out / "sweep.json", result)
    return result


# ------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------


def show(axis, image: Tensor, title: str = "") -> None:
    """One image (C, H, W) in [-1, 1], grey or colour, without ticks."""
    pixels = image.detach().float().cpu().clamp(-1, 1).permute(1, 2, 0) / 2 + 0.5
    axis.imshow(pixels.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    axis.set(title=title, xticks=[], yticks=[])


def plot_pair(teacher_image: Tensor, policy_image: Tensor, step: int, path: Path) -> None:
    """Endpoints of teacher and policy, (1, C, H, W) each, side by side."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(5, 2.8), layout="constrained")
    show(axes[0], teacher_image[0], "teacher")
    show(axes[1], policy_image[0], f"policy, iteration {step}")
    save_figure(figure, path)


@torch.no_grad()
def plot_toy(
    teacher: Teacher,
    policy: GMFlowPolicy | DXPolicy,
    reference: Tensor,
    states: Tensor,
    losses: Tensor,
    decode: Decode,
    metrics: dict,
    title: str,
    path: Path,
) -> None:
    """Teacher's and policy's states and x_0 estimates for the same noise, error map, curves."""
    import matplotlib.pyplot as plt

    times = torch.tensor(metrics["t"])
    columns = [(times - t).abs().argmin().item() for t in SHOWN]
    figure = plt.figure(figsize=(8.5, 8.2), layout="constrained")
    grid = figure.add_gridspec(5, len(columns), height_ratios=[1, 1, 1, 1, 2.1])
    rows = (
        ("teacher\n$x_t$", reference, None),
        ("policy\n$x_t$", states, None),
        ("teacher\n$x_0$ estimate", reference, teacher),
        ("policy\n$x_0$ estimate", states, policy.velocity),
    )
    for i, (name, path_states, velocity) in enumerate(rows):
        for j, index in enumerate(columns):
            x, t = path_states[index], times[index].to(reference.device).expand(len(reference[0]))
            if velocity and t[0] > 0:
                x = x - t[0] * velocity(x, t)
            axis = figure.add_subplot(grid[i, j])
            show(axis, decode(x)[0], f"t = {times[index]:.1f}" if i == 0 else "")
            if j == 0:
                axis.set_ylabel(name, fontsize=9)

    bottom = grid[4, :].subgridspec(1, 3)
    error = (decode(states[-1]) - decode(reference[-1]))[0].abs().mean(0).cpu()
    axis = figure.add_subplot(bottom[0])
    picture = axis.imshow(error.numpy(), cmap="magma", vmin=0)
    axis.set(title="endpoint error", xticks=[], yticks=[])
    figure.colorbar(picture, ax=axis, shrink=0.8)

    color = COLORS[metrics["settings"]["policy"]]
    axis = figure.add_subplot(bottom[1])
    axis.plot(metrics["t"], metrics["trajectory_rmse"], color=color)
    axis.set(title="distance of the paths", xlabel="noise level t", ylabel="RMSE")
    axis.set(xlim=(1, 0), ylim=(0, None))

    axis = figure.add_subplot(bottom[2])
    axis.plot(losses.numpy(), color=color, alpha=0.3, linewidth=0.8)
    width = min(25, len(losses))
    smooth = losses.unfold(0, width, 1).mean(1).numpy()
    axis.plot(range(width - 1, len(losses)), smooth, color=color)
    axis.set(title="pi-ID loss", xlabel="iteration", yscale="log")
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def plot_sweep(runs: list[dict], channels: int, substeps: int, title: str, path: Path) -> None:
    """Endpoint PSNR over the size of the policy, with the size at which Theorem 1 is exact."""
    import matplotlib.pyplot as plt

    names = {"gmflow": "GMFlow, K components", "dx": "DX, N grid points"}
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for policy in dict.fromkeys(run["policy"] for run in runs):
        chosen = [run for run in runs if run["policy"] == policy]
        axis.plot(
            [run["size"] for run in chosen],
            [run["endpoint_psnr_db"] for run in chosen],
            "o-" if policy == "gmflow" else "s--",
            color=COLORS[policy],
            label=names[policy],
        )
    axis.axvline(substeps * channels, color="0.4", linestyle=":")
    axis.text(
        substeps * channels * 0.93, 0.03, f"Theorem 1: K = {substeps} x {channels}", color="0.3",
        rotation=90, ha="right", va="bottom", transform=axis.get_xaxis_transform(),
    )  # fmt: skip
    axis.set_xscale("log", base=2)
    ticks = sorted({run["size"] for run in runs} | {substeps * channels})
    axis.set_xticks(ticks, [str(size) for size in ticks])
    axis.set(title=title, xlabel="size of the policy", ylabel="endpoint PSNR (dB)")
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path)
