"""The static policy of the toys: parameters in place of a network, fitted to one trajectory.

Its means, log weights and standard deviation (GMFlow) or its grid of velocities (DX) are trained as
a student network is. What it reaches is what the policy family can express; what a distilled
student lacks beyond that is the network's. One policy covers the whole path, t = 1 to 0.

Two phases. Cloning compares with the teacher on the teacher's own trajectory: with one trajectory
its stored states are all that there is to know. pi-ID compares on the trajectory of the policy.
Alone it may settle elsewhere: where the teacher's flow amplifies early errors, the policy's own
states lead to another picture, and there the teacher confirms it. --cloning 0 shows that.
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
from common.cli import DEVICE_HELP, MAX_SEED, setting
from common.files import write_json, writing
from common.teachers import endpoint_rmse, integrate_teacher
from piflow_minimal import (
    DXPolicy,
    GaussianMixture,
    GMFlowPolicy,
    Policy,
    Teacher,
    pi_id_loss,
    rollout,
    shift_time,
)

Decode = Callable[[Tensor], Tensor]  # latents (B, C, *) -> images (B, 1 or 3, H, W) in [-1, 1]

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
    lr: float = setting(5e-3, "Adam learning rate", above=0)
    lr_decay: str = setting("cosine", "to 0; published: none", choices=("none", "cosine"))
    num_intermediates: int = setting(2, "teacher queries per iteration", low=1)
    total_substeps: int = setting(128, "substeps of the GMFlow policy rollout", low=1)
    solver: str = setting(
        "euler", "solver of the GMFlow policy rollout (DX: closed form)", choices=("euler", "deis")
    )
    time_weight: float = setting(
        0.0, "squared errors are weighted by t to this power; 0 is the published loss", low=0
    )
    stratified: bool = setting(False, "one query time in each M-th of the path: less variance")
    teacher_steps: int = setting(
        512, "Heun steps of the reference", choices=[INTERVALS * 2**i for i in range(6)]
    )
    seed: int = setting(42, "seed of the noise and of the training", low=0, high=MAX_SEED)
    sweep: bool = setting(False, "one run per policy and size, in place of one run")
    device: str = setting("auto", DEVICE_HELP)
    out: Path = setting(Path("outputs/toy"), "folder for figures and metrics")

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
        self.policy = policy
        self.x_src = x_src
        self.shift = shift
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


# ---- Training ------------------------------------------------------------------------------------


def stratified(batch: int, M: int, generator: torch.Generator) -> Tensor:
    """Uniform draws in [0, 1), one in each M-th. -> (batch, M)."""
    return (torch.arange(M) + torch.rand(batch, M, generator=generator)) / M


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
        i = int(place)
        a = place % 1
        x, x_end = self.x[i : i + 2]
        u, u_end = self.u[i : i + 2]
        t, t_end = self.t[i : i + 2]
        h = t_end - t  # Hermite: both states and both velocities
        move = x_end - x
        here = x + a * a * (3 - 2 * a) * move + h * a * (1 - a) * ((1 - a) * u - a * u_end)
        slope = 6 * a * (1 - a) / h * move + (1 - a) * (1 - 3 * a) * u + a * (3 * a - 2) * u_end
        return here, x.new_full((len(x),), t + a * h), slope

    def loss(self, policy: Policy, settings: ToySettings, generator: torch.Generator) -> Tensor:
        """Mean squared error at one place in each M-th of the path, weighted as in pi-ID."""
        losses = []
        places = stratified(1, settings.num_intermediates, generator)[0].clamp(max=1 - 1e-6)
        for place in (places * (len(self.x) - 1)).tolist():
            x, t, u = self.at(place)
            error = (policy.velocity(x, t) - u).square().flatten(1).mean(1)
            losses.append((error * t**settings.time_weight).mean())
        return torch.stack(losses).mean()


def fit(
    static: StaticPolicy, teacher: Teacher, reference: Tensor, settings: ToySettings,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Cloning on the teacher's trajectory, then pi-ID on the policy's own (Algorithm 1).

    Each phase has an Adam and a schedule of its own. -> the losses, (cloning + iterations,).
    """
    s = settings
    path = TeacherPath(teacher, reference, static.shift) if s.cloning else None
    bar = tqdm(total=s.cloning + s.iterations, desc=f"{s.policy} {s.components}", mininterval=1.0)
    losses = []
    for steps, lr, cloning in ((s.cloning, s.cloning_lr, True), (s.iterations, s.lr, False)):
        optimizer = torch.optim.Adam(static.parameters(), lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        for i in range(steps):
            if cloning:
                loss = path.loss(static(), s, generator)
            else:  # rollout of the detached policy from the noise; the teacher at M times of it
                uniforms = None
                if s.stratified:
                    times = stratified(len(static.x_src), s.num_intermediates, generator)
                    uniforms = times, times[:, 1:]
                out = pi_id_loss(
                    static(), teacher, tau_src=1.0, segment_size=1.0, shift=static.shift,
                    num_intermediates=s.num_intermediates, uniforms=uniforms, generator=generator,
                    batch_teacher=True, **s.rollout,
                )  # fmt: skip
                loss = out.weighted(s.time_weight)
            optimizer.zero_grad()
            loss.backward()
            for parameter in static.parameters():  # at t < 1e-6 a derivative may overflow
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
            optimizer.step()
            if s.lr_decay == "cosine":
                schedule.step()
            losses.append(loss.detach())
            bar.update()
            if i % 50 == 49:  # forces a device sync
                bar.set_postfix(loss=f"{torch.stack(losses[-50:]).mean():.2e}", refresh=False)
    bar.close()
    return torch.stack(losses).cpu()


# ---- Evaluation ----------------------------------------------------------------------------------


def teacher_trajectory(teacher: Teacher, x: Tensor, steps: int, shift: float = 1.0) -> Tensor:
    """The reference: Heun steps from noise x (B, C, *) -> (INTERVALS + 1, B, C, *), uniform in tau.

    Raises: ValueError if a state is not finite.
    """
    states = []
    with tqdm(total=steps, desc="teacher", mininterval=1.0, leave=False) as bar:

        def keep(step: int, t: Tensor, x: Tensor) -> None:
            bar.update(min(step, 1))
            if step % (steps // INTERVALS) == 0:
                states.append(x)

        integrate_teacher(teacher, x, steps, shift, "heun", keep)
    for i, state in enumerate(states):
        if not state.isfinite().all():
            raise ValueError(
                f"the teacher's state is not finite at tau = {1 - i / INTERVALS:.2f}: its weights "
                "are damaged, or its precision is too low"
            )
    return torch.stack(states)


@torch.no_grad()
def policy_trajectory(
    policy: Policy, shift: float = 1.0, total_substeps: int = 128, solver: str = "euler"
) -> Tensor:
    """The policy's rollout at the same times -> (INTERVALS + 1, B, C, *)."""
    x = policy.x_src
    through = torch.linspace(1, 0, INTERVALS + 1).to(x)[1:-1, None].expand(-1, len(x))
    end, states = rollout(policy, x, 1.0, 0.0, shift, total_substeps, solver, through=through)
    return torch.stack([x, *states, end])


def psnr_db(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of images in [-1, 1] (peak 2), in dB."""
    return 20 * math.log10(2 / max(endpoint_rmse(a.clamp(-1, 1), b.clamp(-1, 1)), 1e-9))


# ---- One run, and the sweep ----------------------------------------------------------------------


class Run(NamedTuple):
    """What one fit leaves."""

    metrics: dict[str, Any]  # as metrics.json states them
    policy: Policy
    states: Tensor  # (INTERVALS + 1, B, C, *), of the policy
    losses: Tensor  # (iterations,)
    weights: dict[str, Tensor]  # state dict of the StaticPolicy


def run_fit(
    teacher: Teacher, reference: Tensor, decode: Decode, settings: ToySettings, shift: float = 1.0
) -> Run:
    """One fit, measured against the teacher's trajectory (INTERVALS + 1, B, C, *).

    Raises: ValueError if a decoded image is not finite.
    """
    x_src = reference[0]
    generator = torch.Generator().manual_seed(settings.seed + 1)  # `seed` itself gave the noise
    with torch.no_grad():
        u_src = teacher(x_src, x_src.new_ones(len(x_src)))
    static = StaticPolicy(x_src, u_src, settings.policy, settings.components, shift, generator)
    began = time.perf_counter()
    losses = fit(static, teacher, reference, settings, generator)
    seconds = time.perf_counter() - began
    policy = static().detach()
    options = settings.rollout
    states = policy_trajectory(policy, shift, options["total_substeps"], options["solver"])
    image = decode(states[-1])
    target = decode(reference[-1])
    if not (image.isfinite().all() and target.isfinite().all()):
        raise ValueError("the decoded image of the policy or of the teacher is not finite")
    error = [endpoint_rmse(a, b) for a, b in zip(states, reference, strict=True)]
    metrics = {
        "endpoint_psnr_db": psnr_db(image, target),
        "endpoint_rmse": error[-1],
        "trajectory_rmse": error,
        "t": shift_time(torch.linspace(1, 0, len(states)), shift).tolist(),
        "seconds": seconds,
        "settings": dataclasses.asdict(settings) | {"out": str(settings.out), "shift": shift},
    }
    return Run(metrics, policy, states, losses, static.state_dict())


def run_toy(
    teacher: Teacher, x_src: Tensor, decode: Decode, settings: ToySettings, name: str,
    shift: float = 1.0, about: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Fits one policy, or one per size with --sweep -> metrics and figures in settings.out.

    Args:
        teacher: (x, t) -> u, guidance included. x_src: (1, C, *) noise.
        decode: latents -> images in [-1, 1]. name: of the picture. shift: of the schedule.
        about: what else metrics.json says about the run.
    Raises: ValueError, before anything is written, if a state or an image is not finite.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    about = {**(about or {}), "reference": f"{settings.teacher_steps} Heun steps of the teacher"}
    reference = teacher_trajectory(teacher, x_src, settings.teacher_steps, shift)
    if settings.sweep:
        runs = run_sweep(teacher, reference, decode, settings, shift, about)
        steps = settings.cloning + settings.iterations
        figure = plots.policy_sizes(runs, f"{plots.plain(name)}, {steps} iterations a run")
        plots.save_figure(figure, settings.out / "sweep.png")
        print(f"wrote {settings.out}/sweep.json and sweep.png")
        return
    run = run_fit(teacher, reference, decode, settings, shift)
    write_json(settings.out / "metrics.json", about | run.metrics)
    with writing(settings.out / "policy.pt") as temporary:
        torch.save(run.weights, temporary)
    psnr, rmse, seconds = (run.metrics[k] for k in ("endpoint_psnr_db", "endpoint_rmse", "seconds"))
    print(f"{name}: endpoint PSNR {psnr:.1f} dB, endpoint RMSE {rmse:.4f}, {seconds:.0f} s")
    kind = {"gmflow": "GMFlow policy, K", "dx": "DX policy, N"}[settings.policy]
    title = f"{kind} = {settings.components}: {plots.plain(name)}, endpoint PSNR {psnr:.1f} dB"
    figure = plots.static_policy(teacher, run, reference, decode, title)
    plots.save_figure(figure, settings.out / "toy.png")
    print(f"wrote {settings.out}/metrics.json, policy.pt and toy.png")


def run_sweep(
    teacher: Teacher, reference: Tensor, decode: Decode, settings: ToySettings, shift: float = 1.0,
    about: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One fit per K (gmflow) and per N (dx), same noise -> a row of metrics for each.

    sweep.json, in settings.out, grows with every fit; about: what else it says.
    """
    rows = []
    for policy, sizes in SIZES.items():
        for size in sizes:
            one = dataclasses.replace(settings, policy=policy, components=size)
            metrics = run_fit(teacher, reference, decode, one, shift).metrics
            rows.append({"policy": policy, "size": size} | metrics)
            write_json(settings.out / "sweep.json", (about or {}) | {"runs": rows})
            print(f"{policy:6s} {size:3d}  {metrics['endpoint_psnr_db']:5.1f} dB", flush=True)
    return rows
