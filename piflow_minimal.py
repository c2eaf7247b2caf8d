"""pi-Flow in one file: policies, rollout, imitation distillation (pi-ID), few-step sampler.

A flow model moves noise to data along the ODE dx/dt = u(x, t), one network evaluation per step. A
pi-Flow student needs one evaluation for *many* steps: its network outputs a policy, a network-free
function that gives the velocity at every later time. Training is on-policy imitation, as in DAgger:
roll out the policy, query the teacher at the states that it visits, take the squared difference.
Equations, algorithms, sections: arXiv 2510.14974v3.

    t = 1 is noise, t = 0 is data, x_0 is data.

    paper         here              shape            meaning
    t             t                 (B,)             noise level: x_t = (1 - t) x_0 + t eps
    alpha, sigma  alpha = 1 - t, t  (B,)
    tau           tau               (B,)             raw time; schedules are uniform in tau
    s             shift             float            t = s tau / (1 + (s - 1) tau)
    x_t           x                 (B, C, *)        state; any number of spatial dims, also none
    u             u, velocity       (B, C, *)        dx/dt = eps - x_0, hence x_0 = x - t u
    x_src, t_src  x_src, t_src      (B, C, *), (B,)  where the network was evaluated
    pi(x, t)      policy.velocity   (B, C, *)        valid for every t <= t_src
    A, mu, s      log_A, means, std (B, K, ...)      mixture over velocities, see GaussianMixture
    x0_hat        policy.x0_hat     (B, C, *)        denoised state, interpolated between N of them

A *teacher* is any callable (x, t) -> u. A *student* is any callable (x_src, t_src) -> policy. The
caller closes over labels, prompts and guidance: nothing here knows which network is behind them.
Policies compute in float32 whatever the network's dtype; float64 inputs stay float64.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

EPS = 1e-6  # the smallest t, and the smallest denominator, that anything here divides by
Time = float | Tensor  # a number for the whole batch, or a tensor of shape () or (B,)


# ==== Time ========================================================================================


def shift_time(tau: Time, shift: float = 1.0) -> Time:
    """Raw time tau in [0, 1] -> noise level t in [0, 1]; shift > 1 spends more steps near noise."""
    return shift * tau / (1 + (shift - 1) * tau)


def unshift_time(t: Time, shift: float = 1.0) -> Time:
    """Noise level t in [0, 1] -> raw time tau in [0, 1]; the inverse of `shift_time`."""
    return t / (shift + (1 - shift) * t)


def x0_from_velocity(x: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """The denoised state x_0 = x - t u. x, u: (B, C, *); t: (B,)."""
    return torch.addcmul(x, _expand(t, x), u, value=-1)


def velocity_from_x0(x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """The velocity u = (x - x_0) / t that leads to a denoised state. x, x0: (B, C, *); t: (B,)."""
    return (x - x0) / _expand(t, x).clamp(min=EPS)


# ==== Policies (section 3) ========================================================================


class Policy(Protocol):
    """What rollout, loss and sampler need; any class with these four is a policy.

    Optional: flow(x, t, t_end) -> x_end, the exact solution of its ODE, for the solver "exact".
    """

    x_src: Tensor  # (B, C, *)
    t_src: Tensor  # (B,)

    def velocity(self, x: Tensor, t: Time) -> Tensor: ...  # pi(x, t): (B, C, *) -> (B, C, *)
    def detach(self) -> "Policy": ...  # the same policy without a gradient


class GaussianMixture(NamedTuple):
    """K isotropic Gaussians over the velocity, at every location of a sample."""

    means: Tensor  #      (B, K, C, *)      mu_k
    logstds: Tensor  #    (B, 1, 1, *ones)  log std, one per sample
    logweights: Tensor  # (B, K, 1, *)      log A_k; need not be normalised


class GMFlowPolicy:
    """The GMFlow policy: the network's posterior over x_0, updated by Bayes' rule (eq. 21 to 28).

    1. The output is a mixture over u at (x_src, t_src), so one over x_0 = x_src - t_src u: means
       m_k = x_src - t_src mu_k, variance var = (t_src std)^2. It is p(x_0 | x_src).
    2. p(x_0 | x) ~ p(x_0 | x_src) p(x | x_0) / p(x_src | x_0) with p(x | x_0) = N(alpha x_0, t^2).
    3. As a function of x_0 that ratio is a Gaussian factor exp(nu . x_0 - zeta |x_0|^2 / 2),
           zeta = (alpha/t)^2 - (alpha_src/t_src)^2,    nu = alpha x/t^2 - alpha_src x_src/t_src^2.
    4. N(m_k, var) times it has mean (m_k + var nu)/d and variance var/d, with d = 1 + var zeta.
    5. Its integral is the new weight; what all k share (because var is common) cancels:
           w_k = softmax_k( log A_k + m_k . (nu - zeta m_k/2) / d ).
    The policy is the posterior mean as a velocity, pi(x, t) = (x - (var nu + sum_k w_k m_k)/d) / t.
    This is attention at each location: query nu/d, keys and values m_k, bias log A_k - zeta |m_k|^2/2d.

    Args: mixture; x_src: (B, C, *); t_src: a number, () or (B,), in (0, 1].
    Raises: ValueError if the shapes do not fit together.
    """

    def __init__(self, mixture: GaussianMixture, x_src: Tensor, t_src: Time):
        shapes = [tuple(part.shape) for part in (*mixture, x_src)]
        (b, k, *rest), _, weights, state = shapes
        if state != (b, *rest) or weights != (b, k, 1, *rest[1:]) or mixture.logstds.numel() != b:
            raise ValueError(
                f"means, logstds, logweights, x_src have the shapes {shapes}: must be (B, K, C, *), "
                "(B, 1, 1, *ones), (B, K, 1, *), (B, C, *)"
            )
        means, logstds, logweights, x = (_upcast(part) for part in (*mixture, x_src))
        self.mixture, self.x_src, self.t_src = mixture, x_src, _per_sample(t_src, means)
        t = self.t_src.view(b, 1, 1)
        alpha, x = 1 - t, x.reshape(b, rest[0], -1)  #                            (B, C, P)
        m = x[:, None] - t[:, None] * means.reshape(b, k, rest[0], -1)  #         (B, K, C, P)
        self.c = m.detach().mean(1)  #  x_0 is measured from here, see `velocity` (B, C, P)
        m = m - self.c[:, None]
        self.m = [m_c.contiguous() for m_c in m.unbind(2)]  #  by channel     C x (B, K, P)
        self.half_norm = m.square().sum(2) / 2  #  |m_k|^2 / 2                    (B, K, P)
        self.log_A = logweights.reshape(b, k, -1)  #                              (B, K, P)
        self.var = (t * logstds.reshape(b, 1, 1).exp()) ** 2  #                   (B, 1, 1)
        self.zeta_src = (alpha / t) ** 2  #                                       (B, 1, 1)
        self.nu_src = alpha / t**2 * (x - alpha * self.c)  #                      (B, C, P)

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """pi(x, t). x: (B, C, *); t: a number, () or (B,), at most t_src. -> (B, C, *).

        With x_0 measured from the center c, x becomes y = x - alpha c and u becomes u + c. What
        cancels as t -> 0 is cancelled on paper: with r = alpha/t,
            u + c = ((1 - var (r + zeta_src)) y + var nu_src - sum_k w_k m_k) / (d t).
        """
        t = _per_sample(t, self.c).view(-1, 1, 1).clamp(min=EPS)  #               (B, 1, 1)
        r = (1 - t) / t
        zeta = r**2 - self.zeta_src
        d = (1 + self.var * zeta).clamp(min=EPS)
        y = torch.addcmul(_upcast(x).reshape(self.c.shape), 1 - t, self.c, value=-1)  # (B, C, P)
        query = (r / t * y - self.nu_src) / d  #  nu/d                            (B, C, P)
        logits = torch.addcmul(self.log_A, zeta / d, self.half_norm, value=-1)  # (B, K, P)
        for m_c, query_c in zip(self.m, query.unbind(1), strict=True):  #  no (B, K, C, P) temporary
            logits.addcmul_(m_c, query_c[:, None])
        w = logits.softmax(1)
        mean = torch.stack([(w * m_c).sum(1) for m_c in self.m], dim=1)  #        (B, C, P)
        u = (1 - self.var * (r + self.zeta_src)) * y + self.var * self.nu_src - mean
        return (u / (d * t) - self.c).reshape(x.shape)

    def detach(self) -> "GMFlowPolicy":
        """The same policy without a gradient."""
        mixture = GaussianMixture(*(part.detach() for part in self.mixture))
        return type(self)(mixture, self.x_src.detach(), self.t_src)

    def drop(self, mask: Tensor) -> "GMFlowPolicy":
        """Without the components where mask, (B, K) bool, is True; the other weights grow."""
        mask = mask.reshape(*mask.shape, *[1] * (self.mixture.means.ndim - 2))
        logweights = self.mixture.logweights.masked_fill(mask, -math.inf).log_softmax(1)
        return type(self)(self.mixture._replace(logweights=logweights), self.x_src, self.t_src)

    def dropout(self, p: float, generator: torch.Generator | None = None) -> "GMFlowPolicy":
        """Drops each component, for the whole sample, with probability p in [0, 1); never all."""
        draws = _draw(torch.rand, self.mixture.means.shape[:2], self.c, generator)  # (B, K)
        return self.drop((draws < p) & (draws < draws.amax(1, keepdim=True)))

    def temperature(self, T: float) -> "GMFlowPolicy":
        """Sharper for T in (0, 1): weights A_k^(1/T), renormalised, and variance times T."""
        means, logstds, logweights = self.mixture
        mixture = (means, logstds + math.log(T) / 2, (logweights / T).log_softmax(1))
        return type(self)(GaussianMixture(*mixture), self.x_src, self.t_src)


class DXPolicy:
    """The DX policy: pi(x, t) = (x - x0_hat(t)) / t, from N denoised states x_src - t_src v_i.

    mode="grid": they sit at equal distances of tau on [tau_src - segment_size, tau_src] (clamped at
        0), the first at the segment's end, the last at tau_src; linear between, constant outside.
    mode="polynomial": x0_hat = sum_i (tau_src - tau)^i (x_src - t_src v_i), i from 0.

    Args: velocities v_i: (B, N, C, *); x_src: (B, C, *); t_src: a number, () or (B,), in (0, 1];
        segment_size, in [0, 1] of tau, and shift: as trained, also where a sampler steps otherwise.
    Raises: ValueError if the shapes do not fit together, or for an unknown mode.
    """

    def __init__(
        self, velocities: Tensor, x_src: Tensor, t_src: Time, segment_size: Time = 1.0,
        shift: float = 1.0, mode: str = "grid",
    ):  # fmt: skip
        v, state = _upcast(velocities), tuple(x_src.shape)
        if v.ndim < 3 or (len(v), *v.shape[2:]) != state or not v.shape[1]:
            shapes = f"velocities {tuple(v.shape)}, x_src {state}"
            raise ValueError(f"{shapes}: must be (B, N, C, *) with N >= 1, and (B, C, *)")
        if mode not in ("grid", "polynomial"):
            raise ValueError(f"mode {mode!r}: must be 'grid' or 'polynomial'")
        self.velocities, self.x_src, self.t_src = velocities, x_src, _per_sample(t_src, v)
        self.segment_size, self.shift, self.mode = segment_size, shift, mode
        self.x0 = _upcast(x_src)[:, None] - _expand(self.t_src, v) * v  #         (B, N, C, *)
        self.tau_src = unshift_time(self.t_src, shift)
        self.tau_end = (self.tau_src - _per_sample(segment_size, v)).clamp(min=0)
        own = (type(self).x0_hat, type(self).velocity) != (DXPolicy.x0_hat, DXPolicy.velocity)
        if (mode != "grid" or own) and type(self).flow is DXPolicy.flow:
            self.flow = None  # it solves the grid, not a polynomial or a subclass's own x0_hat

    def x0_hat(self, t: Time) -> Tensor:
        """The denoised state at noise level t: a number, () or (B,). -> (B, C, *)."""
        tau, n = unshift_time(_per_sample(t, self.x0), self.shift), self.x0.shape[1]
        b, i = (torch.arange(size, device=tau.device) for size in (len(tau), n))
        if self.mode == "polynomial":
            powers = (self.tau_src - tau)[:, None] ** i  #                        (B, N)
            return (powers.reshape(-1, n, *[1] * (self.x0.ndim - 2)) * self.x0).sum(1)
        length = (self.tau_src - self.tau_end).clamp(min=EPS)
        place = ((tau - self.tau_end) / length).clamp(0, 1) * (n - 1)  #  in [0, N - 1]   (B,)
        left = place.floor().long().clamp(max=max(n - 2, 0))
        left_x0, right_x0 = self.x0[b, left], self.x0[b, (left + 1).clamp(max=n - 1)]
        return torch.lerp(left_x0, right_x0, _expand(place - left, left_x0))

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """pi(x, t). x: (B, C, *); t: a number, () or (B,), at most t_src. -> (B, C, *)."""
        return velocity_from_x0(_upcast(x), _per_sample(t, self.x0), self.x0_hat(t))

    def flow(self, x: Tensor, t: Time, t_end: Time) -> Tensor:
        """The exact solution of a grid policy's ODE. x: (B, C, *) at t -> (B, C, *) at t_end.

        d(x/t)/dt = -x0_hat/t^2 and dt/t^2 = dtau/(s tau^2). By parts, over the linear pieces j,
            x_end = t_end/t x + t_end/s (x0_hat/tau |_tau^tau_end + sum_j slope_j log(high_j/low_j)).
        """
        t, t_end = (_per_sample(v, self.x0).clamp(min=EPS) for v in (t, t_end))
        tau, tau_end, n = *(unshift_time(v, self.shift) for v in (t, t_end)), self.x0.shape[1]
        length = self.tau_src - self.tau_end
        knots = torch.linspace(0, 1, n, device=t.device, dtype=t.dtype)[:, None] * length
        logs = (knots + self.tau_end).minimum(tau).maximum(tau_end).log().diff(dim=0)  # (N - 1, B)
        logs = (logs * (n - 1) / length.clamp(min=EPS)).T.reshape(-1, n - 1, *[1] * (x.ndim - 1))
        ends = self.x0_hat(t_end) / _expand(tau_end, x) - self.x0_hat(t) / _expand(tau, x)
        integral = ends + (logs * self.x0.diff(dim=1)).sum(1)  #                  (B, C, *)
        return _expand(t_end / t, x) * _upcast(x) + _expand(t_end / self.shift, x) * integral

    def detach(self) -> "DXPolicy":
        """The same policy without a gradient."""
        settings = self.t_src, self.segment_size, self.shift, self.mode
        return type(self)(self.velocities.detach(), self.x_src.detach(), *settings)


Teacher = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> u
Student = Callable[[Tensor, Tensor], Policy]  # (x_src, t_src) -> policy


# ==== Rollout =====================================================================================


def rollout(
    policy: Policy, x: Tensor, tau_start: Time, tau_end: Time, shift: float = 1.0,
    total_substeps: int = 128, solver: str = "euler",
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    through: Tensor | None = None, longest: float | None = None,
) -> Tensor | tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Integrates a policy's ODE from raw time tau_start down to tau_end; no network evaluation.

    Takes max(1, ceil((tau_start - tau_end) total_substeps)) substeps, each sample its own number.

    Args:
        x: (B, C, *) at tau_start; tau_start, tau_end: a number, () or (B,), in [0, 1].
        total_substeps: substeps per unit of tau, at least 1.
        solver: "euler", uniform in tau: the published protocol. "deis", uniform in t^(1/1.5):
            second-order exponential multistep (arXiv 2204.13902). "exact": the policy's `flow`.
        callback: called with (substep, tau (B,), x) at the start and after each substep.
        through: (P, B) raw times on the way, descending, to return the states at as well.
        longest: bound of tau_start - tau_end; without it tensor times force a device sync.
    Returns: x_end (B, C, *); with `through` (x_end, list of P states).
    Raises: ValueError for an unknown solver, or "exact" where the policy has no `flow`.
    """
    if solver not in ("euler", "deis", "exact"):
        raise ValueError(f"solver {solver!r}: must be 'euler', 'deis' or 'exact'")
    if solver == "exact" and getattr(policy, "flow", None) is None:
        raise ValueError(f"solver 'exact': this {type(policy).__name__} has no closed form `flow`")
    if longest is None and not isinstance(tau_start, Tensor) and not isinstance(tau_end, Tensor):
        longest = tau_start - tau_end
    x = _upcast(x)
    stops = [_per_sample(tau_start, x), _per_sample(tau_end, x)]
    stops[1:1] = [] if through is None else through.to(stops[0])
    t, arrival = _substep_grid(torch.stack(stops), shift, total_substeps, solver, longest)
    dt, states = t.diff(dim=0), [x] * (len(stops) - 2)
    here, there = t[:-1].clamp(min=EPS), t[1:].clamp(min=EPS)  #                  (steps, B)
    bend = there * (here / there).log() + dt  #  see below
    bend[1:] /= dt[:-1].clamp(max=-1e-4)  #  a tiny substep gives no slope
    if callback:
        callback(0, stops[0], x)
    for i in range(len(dt)):
        if solver == "exact":
            x = policy.flow(x, t[i], t[i + 1])
        else:
            u = policy.velocity(x, t[i])
            x_next = torch.addcmul(x, _expand(dt[i], x), u)  #  Euler: exact for a constant x0_hat
            if solver == "deis":  #  exact for x0_hat linear in t, of slope b: from t to t' it adds
                x0 = x0_from_velocity(x, t[i], u)  #              b (t' log(t/t') + t' - t)
                if i:
                    x_next = torch.addcmul(x_next, _expand(bend[i], x), x0 - x0_before)
                x0_before = x0
            x = x_next
        states = [torch.where(_expand(n == i + 1, x), x, s) for n, s in zip(arrival, states)]
        if callback:
            callback(i + 1, unshift_time(t[i + 1], shift), x)
    return x if through is None else (x, states)


def _substep_grid(
    stops: Tensor, shift: float, total_substeps: int, solver: str, longest: float | None
) -> tuple[Tensor, Tensor]:
    """stops: raw times (P + 1, B). -> t (steps + 1, B); the substep that ends at each stop (P, B).

    Substeps are uniform in z between two stops. A sample that has arrived at its last stop stays.
    """
    z = shift_time(stops, shift) ** (1 / 1.5) if solver == "deis" else stops
    gap, rate = z[:-1] - z[1:], total_substeps  #                                 (P, B)
    if solver == "deis":  # as many substeps in all as "euler"
        n = ((stops[0] - stops[-1]) * total_substeps - 1e-4).ceil().clamp(min=1)
        rate = n / (z[0] - z[-1]).clamp(min=EPS)
    n = (gap * (0 if solver == "exact" else rate) - 1e-4).ceil().clamp(min=1)  # forgives rounding
    arrival = n.cumsum(0)
    if solver == "exact":
        steps = len(n)
    elif longest is None or n.device.type == "cpu":
        steps = int(arrival[-1].max())
    else:
        steps = max(1, math.ceil(longest * total_substeps - 1e-4)) + len(n) - 1
    i = torch.arange(steps + 1, device=n.device)[:, None, None]
    z = (z[0] - (gap * ((i - arrival + n) / n).clamp(0, 1)).sum(1)).clamp(min=0)  # (steps + 1, B)
    return (z**1.5 if solver == "deis" else shift_time(z, shift)), arrival


# ==== pi-ID: imitation distillation ===============================================================


class PiIDLoss(NamedTuple):
    """What `pi_id_loss` returns. M intermediates of B samples: sample b of m is row m * B + b."""

    loss: Tensor  #       scalar, mean squared error
    u_policy: Tensor  #   (M * B, C, *)
    u_teacher: Tensor  #  (M * B, C, *)
    t: Tensor  #          (M * B,)   noise levels of the queries
    x_dst: Tensor  #      (B, C, *)  where the detached policy ends the segment


def pi_id_loss(
    policy: Policy, teacher: Teacher, tau_src: Time, segment_size: Time, shift: float = 1.0,
    total_substeps: int = 128, num_intermediates: int = 2, teacher_ratio: float = 0.0,
    window_substeps: int = 0, dropout: float = 0.0,
    uniforms: tuple[Tensor, Tensor] | None = None, generator: torch.Generator | None = None,
    solver: str = "euler", batch_teacher: bool = False,
) -> PiIDLoss:  # fmt: skip
    """On-policy imitation of the teacher over one segment of raw time (Algorithm 1).

    Args:
        policy: starts the segment [tau_src - segment_size, tau_src] at policy.x_src.
        tau_src, segment_size: a number, () or (B,), in [0, 1]; a tensor segment_size forces a sync.
        total_substeps, solver: of the rollout. num_intermediates: M >= 1, queries per sample.
        teacher_ratio, window_substeps: see `_mixed_queries`; 0 and 0 are the plain algorithm.
        dropout: in [0, 1), of the detached policy's components (GMFlow).
        uniforms: ((B, M), (B, M - 1)) in [0, 1) replace the random draws: replays a loss.
        batch_teacher: one query of M * B states in place of M of B; not with teacher_ratio.
    Raises: ValueError if the teacher's velocity has another shape than the state.
    """
    x_src, M = _upcast(policy.x_src).detach(), num_intermediates
    tau, segment = _per_sample(tau_src, x_src), _per_sample(segment_size, x_src)
    if uniforms is None:
        uniforms = [_draw(torch.rand, (len(x_src), n), x_src, generator) for n in (M, M - 1)]
    uniforms = [draws.to(x_src).T.sort(0).values for draws in uniforms]  #        (M, B), (M - 1, B)
    longest = None if isinstance(segment_size, Tensor) else segment_size
    solve = partial(rollout, shift=shift, total_substeps=total_substeps, solver=solver)

    def query(states: list[Tensor], times: Tensor) -> Tensor:
        if batch_teacher:
            states, times = [torch.cat(states)], times.reshape(1, -1)
        velocities = [teacher(x, t) for x, t in zip(states, times, strict=True)]
        for u, x in zip(velocities, states, strict=True):
            if u.shape != x.shape:
                given = f"the teacher's velocity has the shape {tuple(u.shape)}"
                raise ValueError(f"{given}: must be that of the state, {tuple(x.shape)}")
        return _upcast(torch.cat(velocities))

    with torch.no_grad():
        detached = policy.detach()
        detached = detached.dropout(dropout, generator) if dropout else detached
    if teacher_ratio or window_substeps:
        mix = (tau, segment, uniforms, teacher_ratio, window_substeps, total_substeps, longest)
        return _pi_id_mixed(policy, detached, query, solve, shift, *mix)
    with torch.no_grad():
        tau_m = tau - segment * uniforms[0]  #                                    (M, B)
        t_m, tau_dst = shift_time(tau_m, shift), (tau - segment).clamp(min=0)
        x_dst, x_m = solve(detached, x_src, tau, tau_dst, through=tau_m, longest=longest)
        u_teacher = query(x_m, t_m)
    u_policy = torch.cat([policy.velocity(x, t) for x, t in zip(x_m, t_m, strict=True)])
    loss = (u_policy - u_teacher).square().mean()
    return PiIDLoss(loss, u_policy, u_teacher, t_m.flatten(), x_dst)


def _pi_id_mixed(
    policy: Policy, detached: Policy, query: Callable, solve: Callable, shift: float, tau: Tensor,
    segment: Tensor, uniforms: list[Tensor], r: float, window_substeps: int, S: int,
    longest: float | None,
) -> PiIDLoss:  # fmt: skip
    """Algorithm 1 with scheduled trajectory mixing and the micro-window.

    r = teacher_ratio: M teacher Euler steps take this share of the segment, between the detached
        policy's rollouts. From 1 to 0 early in training, for guidance-distilled teachers.
    window_substeps: the prediction is the policy's mean velocity from tau_a, over the teacher's step
        and a window W of so many substeps. DX needs it: 1/t magnifies errors of its velocity.
    """
    W = (window_substeps * segment / (segment * S).round().clamp(min=1)).minimum(segment)
    zero, one = torch.zeros_like(tau)[None], torch.ones_like(tau)[None]
    by_student = (1 - r) * (segment - W) * uniforms[0].diff(dim=0, prepend=zero)  # lengths (M, B)
    by_teacher = r * (segment - W) * torch.cat([zero, uniforms[1], one]).diff(dim=0)
    tau_b = (tau - (by_student + by_teacher).cumsum(0)).clamp(min=0)  #  where the teacher's step ends
    tau_a, tau_w = (tau_b + by_teacher).minimum(tau), (tau_b - W).clamp(min=0)  #  queries, window's end
    t_a, t_b, t_w = (shift_time(v, shift) for v in (tau_a, tau_b, tau_w))
    tau_dst, x, x_a = (tau - segment).clamp(min=0), policy.x_src, []
    with torch.no_grad():
        if r == 0:
            x_dst, x_a = solve(detached, x, tau, tau_dst, through=tau_a, longest=longest)
            u_teacher = query(x_a, t_a)
        else:
            targets, longest = [], None if longest is None else (1 - r) * longest
            for start, a in zip([tau, *tau_b], range(len(tau_b))):
                x_a.append(solve(detached, x, start, tau_a[a], longest=longest))
                targets.append(query(x_a[-1:], t_a[a : a + 1]))
                x = x_a[-1] + _expand(t_b[a] - t_a[a], x) * targets[-1]
            x_dst, u_teacher = solve(detached, x, tau_b[-1], tau_dst), torch.cat(targets)
    predictions = []
    for m, x in enumerate(x_a):
        x_w = solve(policy, x, tau_a[m], tau_w[m], longest=longest)
        mean = (x - x_w) / _expand(t_a[m] - t_w[m], x).clamp(min=EPS)
        short = ((tau_a[m] - tau_b[m] + W) * S).round() < 2  #  there the local velocity
        predictions.append(torch.where(_expand(short, x), policy.velocity(x, t_a[m]), mean))
    u_policy = torch.cat(predictions)
    return PiIDLoss((u_policy - u_teacher).square().mean(), u_policy, u_teacher, t_a.flatten(), x_dst)


def segment_of(tau: Time, nfe: int, final_step_size_scale: float = 1.0) -> tuple[Time, Time]:
    """The segment that holds raw time tau, in (0, 1]: tau rounded up to the grid of segment ends.

    nfe segments of length 1 / (nfe - 1 + f), f = final_step_size_scale > 0; the last is f times that.
    Returns: (tau_src, segment_size), numbers or (B,) as tau is. Raises: ValueError for nfe < 1.
    """
    if nfe < 1:
        raise ValueError(f"nfe = {nfe}: must be at least 1")
    f, base = final_step_size_scale, 1 / (nfe - 1 + final_step_size_scale)
    i = (1 - tau) / base + 1e-6  #  segments above tau; a tau on the grid starts its own segment
    i = i.floor().clamp(max=nfe - 1) if isinstance(i, Tensor) else min(math.floor(i), nfe - 1)
    return 1 - i * base, base * (1 + (f - 1) * (i == nfe - 1))


def pi_id_data_dependent(
    student: Student, teacher: Teacher, x_0: Tensor, nfe: int = 1, shift: float = 1.0,
    final_step_size_scale: float = 1.0, generator: torch.Generator | None = None, **loss_options,
) -> PiIDLoss:  # fmt: skip
    """Algorithm 2: the loss on a random segment, whose start x_src is data plus noise.

    For nfe = 1 every segment starts in pure noise: x_0, (B, C, *), only gives the shape, and
    distillation needs no data. loss_options: of `pi_id_loss`.
    """
    tau_src, segment_size = 1.0, 1.0
    if nfe != 1:
        tau = 1 - _draw(torch.rand, (len(x_0),), x_0, generator)  #               in (0, 1]
        tau_src, segment_size = segment_of(tau, nfe, final_step_size_scale)
        segment_size = 1 / nfe if final_step_size_scale == 1 else segment_size  #  a number: no sync
    t_src = _per_sample(shift_time(tau_src, shift), x_0)
    eps = _draw(torch.randn, x_0.shape, x_0, generator)
    x_src = torch.lerp(_upcast(x_0), eps, _expand(t_src, x_0))  #  (1 - t) x_0 + t eps
    draws = {"shift": shift, "generator": generator}
    return pi_id_loss(student(x_src, t_src), teacher, tau_src, segment_size, **draws, **loss_options)


def pi_id_data_free(
    student: Student, teacher: Teacher, noise: Tensor, nfe: int = 1, shift: float = 1.0,
    final_step_size_scale: float = 1.0, generator: torch.Generator | None = None, **loss_options,
) -> Iterator[tuple[float, PiIDLoss]]:  # fmt: skip
    """Algorithm 3: from noise (B, C, *) through every segment in turn; no data at any nfe.

    Yields (segment_size, PiIDLoss); the detached policy carries x to the next segment.
        for segment_size, out in pi_id_data_free(...):
            (segment_size * out.loss).backward()      # and then one optimizer step
    """
    tau, x_src = 1.0, _upcast(noise)
    for _ in range(nfe):
        tau_src, segment_size = segment_of(tau, nfe, final_step_size_scale)
        policy = student(x_src, _per_sample(shift_time(tau_src, shift), x_src))
        draws = {"shift": shift, "generator": generator}
        out = pi_id_loss(policy, teacher, tau_src, segment_size, **draws, **loss_options)
        yield segment_size, out
        tau, x_src = tau_src - segment_size, out.x_dst


# ==== Sampler =====================================================================================


class FlowMapSchedule(NamedTuple):
    """Levels of the few-step sampler, (nfe,) each."""

    t_src: Tensor  #  where the network is evaluated
    t_to: Tensor  #   the next level, 0 at the end
    t_dst: Tensor  #  where the policy is followed to; fresh noise leads back up to t_to
    m: Tensor  #      share of the old noise that is kept; 1 is deterministic


def flow_map_schedule(
    nfe: int, shift: float = 1.0, final_step_size_scale: float = 1.0, h: float = 0.0
) -> FlowMapSchedule:
    """Source levels uniform in tau, from 1 with step 1 / (nfe - 1 + f), then shifted.

    With stochasticity h in [0, inf] a step goes on to t_dst < t_to and returns by fresh noise:
        m = (t_to alpha_src / (t_src alpha_to))^(h^2),    t_dst = t_to m / (alpha_to + t_to m).
    Raises: ValueError for nfe < 1.
    """
    return FlowMapSchedule(*torch.tensor(_levels(nfe, shift, final_step_size_scale, h)).unbind(1))


def _levels(nfe: int, shift: float, f: float, h: float) -> list[tuple[float, ...]]:
    """(t_src, t_to, t_dst, m) of each step as Python numbers, which force no device sync."""
    tau = [segment_of(1.0, nfe, f)[0] - i / (nfe - 1 + f) for i in range(nfe)]
    levels = []
    for t_src, t_to in zip(*([shift_time(v, shift) for v in part] for part in (tau, [*tau[1:], 0.0]))):
        m = (t_to * (1 - t_src) / (t_src * (1 - t_to))) ** (h * h)
        levels.append((t_src, t_to, t_to * m / (1 - t_to + t_to * m), m))
    return levels


@torch.no_grad()
def sample(
    student: Student, noise: Tensor, nfe: int = 1, shift: float = 1.0,
    final_step_size_scale: float = 1.0, h: float = 0.0, temperature: float = 1.0,
    total_substeps: int = 128, generator: torch.Generator | None = None, solver: str = "euler",
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:  # fmt: skip
    """Few-step sampling (section 3): nfe evaluations of the student, rollouts between them.

    Args:
        noise: (B, C, *), the state at t = 1. nfe: may exceed what was trained ("elastic inference").
        shift, final_step_size_scale, h: see `flow_map_schedule`. generator: of the noise for h > 0.
        temperature: > 0, of GMFlow policies on every step but the last.
        total_substeps, solver, callback: see `rollout`; substeps count from 0 in each segment.
    Returns: x_0 (B, C, *) in the precision of policies. Raises: ValueError for nfe < 1.
    """
    x = _upcast(noise)
    for i, (t_src, t_to, t_dst, m) in enumerate(_levels(nfe, shift, final_step_size_scale, h)):
        policy = student(x, _per_sample(t_src, x))
        if temperature != 1 and i < nfe - 1:
            policy = policy.temperature(temperature)
        tau_src, tau_dst = unshift_time(t_src, shift), unshift_time(t_dst, shift)
        x = rollout(policy, x, tau_src, tau_dst, shift, total_substeps, solver, callback)
        if m < 1:
            eps = _draw(torch.randn, x.shape, x, generator)
            x = (1 - t_to + t_to * m) * x + t_to * math.sqrt(1 - m * m) * eps
    return x


# ==== Helpers =====================================================================================


def _expand(t: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, ...) with as many dims as x, so that it broadcasts."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def _upcast(x: Tensor) -> Tensor:
    """The precision of policies: float32, or float64 for float64 inputs."""
    return x if x.dtype == torch.float64 else x.float()


def _per_sample(value: Time, x: Tensor) -> Tensor:
    """A number, () or (B,) -> (B,), beside x in the precision of policies."""
    return torch.as_tensor(value, device=x.device, dtype=_upcast(x[:0]).dtype).expand(len(x))


def _draw(draw: Callable, shape: tuple, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """torch.rand or torch.randn on the generator's device, moved beside x."""
    device = x.device if generator is None else generator.device
    return draw(shape, generator=generator, device=device, dtype=_upcast(x[:0]).dtype).to(x.device)
