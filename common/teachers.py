"""Teachers: callables (x, t) -> u, with u = dx/dt = eps - x_0, t = 1 noise and t = 0 data."""

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
    Raises: ValueError if x is missing.
    """
    t = torch.as_tensor(t, device=u_cond.device, dtype=u_cond.dtype).expand(len(u_cond))
    correction, ones = (scale - 1) * (u_cond - u_uncond), [1] * (u_cond.ndim - 1)
    if orthogonal:
        if x is None:
            raise ValueError("x is missing: orthogonal guidance needs the state")
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
    if solver not in ("euler", "heun"):
        raise ValueError(f"solver {solver!r}: must be 'euler' or 'heun'")
    if steps < 1:
        raise ValueError(f"steps = {steps}: must be at least 1")
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
