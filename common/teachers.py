"""Teachers: callables (x, t) -> u, with u = dx/dt = eps - x_0, t = 1 noise and t = 0 data."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from piflow_minimal import EPS, Teacher, Time, shift_time, x0_from_velocity


def guided_velocity(
    u_cond: Tensor, u_uncond: Tensor, scale: float, t: Time,
    interval: tuple[float, float] = (0.0, 1.0), x: Tensor | None = None, orthogonal: float = 0.0,
) -> Tensor:  # fmt: skip
    """Classifier-free guidance within an interval of noise levels (arXiv 2207.12598, 2404.07724).

    u = u_cond + (scale - 1)(u_cond - u_uncond) where interval[0] <= t <= interval[1], else u_cond.
    orthogonal in [0, 1] removes that share of the correction's component along the conditional
    x_0 estimate (projection over all dims of a sample; arXiv 2410.02416).

    Args: u_cond, u_uncond: (B, C, *); t: a number, () or (B,); x: (B, C, *), for orthogonal > 0.
    """
    t = torch.as_tensor(t, device=u_cond.device, dtype=u_cond.dtype).expand(len(u_cond))
    correction, ones = (scale - 1) * (u_cond - u_uncond), [1] * (u_cond.ndim - 1)
    if orthogonal:
        x0, dims = x0_from_velocity(x, t, u_cond), tuple(range(1, u_cond.ndim))
        along = (correction * x0).sum(dims) / x0.square().sum(dims).clamp(min=EPS)  #  (B,)
        correction = correction - orthogonal * along.view(-1, *ones) * x0
    inside = ((t >= interval[0]) & (t <= interval[1])).view(-1, *ones)
    return u_cond + torch.where(inside, correction, 0.0)


@torch.no_grad()
def integrate_teacher(
    teacher: Teacher, x: Tensor, steps: int, shift: float = 1.0, solver: str = "euler",
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:  # fmt: skip
    """Integrates a teacher's ODE from noise at t = 1 to data, steps uniform in tau. -> x_0.

    Args:
        x: (B, C, *) noise. steps: at least 1.
        solver: "euler", one query per step; or "heun", two, except in the last step (t = 0 is never
            queried).
        callback: called with (step, t (), x) at the start and after each step.
    Raises: ValueError for another solver or fewer than one step.
    """
    if solver not in ("euler", "heun") or steps < 1:
        raise ValueError(f"solver {solver!r}, {steps} steps: must be 'euler' or 'heun', 1 or more")
    t = shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).to(x)
    if callback:
        callback(0, t[0], x)
    for i in range(steps):
        dt = t[i + 1] - t[i]
        u = teacher(x, t[i].expand(len(x)))
        if solver == "heun" and i + 1 < steps:
            u = (u + teacher(x + dt * u, t[i + 1].expand(len(x)))) / 2
        x = x + dt * u
        if callback:
            callback(i + 1, t[i + 1], x)
    return x


def endpoint_rmse(a: Tensor, b: Tensor) -> float:
    """Square root of the mean squared difference over all entries. a, b: of one shape."""
    return float((a - b).square().mean().sqrt())


@torch.no_grad()
def check_teacher(
    teacher: Teacher, x_0: Tensor, noise: Tensor | None = None, end: Tensor | None = None,
    steps: int = 64, shift: float = 1.0, generator: torch.Generator | None = None,
) -> dict[str, str]:  # fmt: skip
    """Six checks of an adapter to (x, t) -> u, on data. -> {check: "ok", or what is wrong}.

    A trained u is E[eps - x_0 | x_t]. So eps - x_0, regressed on u, has the slope 1, and no other
    reading of the teacher's output comes closer to it. Guidance breaks this: check without it. And
    x_0 = x - t u is a mean of data: it stays in their range, also at t = 1, where a student starts.

    Args:
        x_0: (B, C, *) data, some hundred numbers or more. Noise levels are uniform in [0.1, 0.9].
        noise, end: (B, C, *) noise, and where the model's own sampler takes it: compared with
            `integrate_teacher` (steps, shift), within a tenth of the RMS of `end`.
    """
    eps = torch.randn(x_0.shape, generator=generator).to(x_0)
    t = 0.1 + 0.8 * torch.rand(len(x_0), generator=generator).to(x_0)
    t_x = t.view(-1, *[1] * (x_0.ndim - 1))
    x = (1 - t_x) * x_0 + t_x * eps
    v = eps - x_0

    def error(u: Tensor) -> float:
        return float((u - v).square().mean())

    # At which time, and read as what, the output comes closest to eps - x_0.
    slopes, errors = {}, {}
    times = {"t": t, "1 - t": 1 - t, "1000 t": 1000 * t, "1000 (1 - t)": 1000 * (1 - t)}
    for name, time in times.items():
        output = teacher(x, time)
        slopes[name] = float((output * v).sum() / output.square().sum().clamp(min=EPS))
        errors[name, "u"] = error(slopes[name] * output)
        errors[name, "eps"] = error((output - x) / (1 - t_x))
        errors[name, "x_0"] = error((x - output) / t_x)
    name, kind = min(errors, key=errors.get)
    slope, size = slopes[name], f"{abs(slopes[name]):.3g}"
    # What knows t and nothing of the data's shape: the best multiple of x, for data of this size.
    a = (1 - t_x) * x_0.square().mean()
    linear = error((t_x - a) / ((1 - t_x) * a + t_x**2) * x)

    checks = "t direction", "sign", "scale", "x_0 = x - t u", "near t = 1", "own sampler"
    found = dict.fromkeys(checks, "ok")
    if "1 - t" in name:
        found["t direction"] = f"the model fits better at {name}: pass it 1 - t"
    if kind == "u" and slope < 0:
        found["sign"] = "the output is x_0 - eps: negate it"
    if "1000" in name:
        found["scale"] = f"the model fits better at {name}: multiply the time by 1000"
    elif kind == "u" and abs(abs(slope) - 1) > 0.1:
        found["scale"] = f"eps - x_0 is {size} times the output on average: multiply it by {size}"
    if kind != "u":
        convert = {"eps": "(output - x) / (1 - t)", "x_0": "(x - output) / t"}[kind]
        found["x_0 = x - t u"] = f"the output is {kind}, not a velocity: u = {convert}"
    elif errors[name, kind] > 1.02 * linear:
        found["x_0 = x - t u"] = (
            "the best multiple of x is closer to eps - x_0: "
            "look at the scale of the model's input, its conditioning, its training"
        )
    if set(found.values()) == {"ok"}:
        found["near t = 1"] = _check_start(teacher, x_0, eps)
    else:
        found["near t = 1"] = "not checked: the conversion to u comes first"
    if end is None:
        found["own sampler"] = "not checked: no noise and end"
        return found
    off = endpoint_rmse(integrate_teacher(teacher, noise, steps, shift), end)
    off /= max(endpoint_rmse(end, torch.zeros_like(end)), EPS)
    if not off < 0.1:
        found["own sampler"] = (
            f"{off:.0%} away from where it ends: compare schedule, shift, conditioning, dropout"
        )
    return found


def _check_start(teacher: Teacher, x_0: Tensor, eps: Tensor) -> str:
    """x_0 = x - t u near t = 1 against the largest number in the data."""
    largest = float(x_0.abs().max())
    for t in (1.0, 0.99, 0.95):
        x = (1 - t) * x_0 + t * eps
        x0_hat = x - t * teacher(x, x.new_full((len(x),), t))
        rms = float(x0_hat.square().mean().sqrt())
        if not math.isfinite(rms):
            return f"not finite at t = {t}: clamp t to the largest noise level of the model"
        if rms > 1.05 * largest:
            return (
                f"x - t u has RMS {rms:.3g} at t = {t}, and no number in the data is above "
                f"{largest:.3g}: clamp it to their range, and let the student predict x_0"
            )
    return "ok"
