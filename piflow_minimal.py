"""pi-Flow in one file: policies, rollout, imitation distillation (pi-ID), few-step sampler.

A flow model moves noise to data along the ODE dx/dt = u(x, t), one network evaluation per step. A
pi-Flow student needs one evaluation for *many* steps: its network outputs a policy, a network-free
function that gives the velocity at every later time. Training is on-policy imitation, as in DAgger:
roll out the policy, query the teacher at the states that it visits, take the squared difference.
t = 1 is noise, t = 0 is data, x_0 is data. Equations, algorithms: arXiv 2510.14974v3.

    paper         here              shape            meaning
    t, alpha_t    t, alpha = 1 - t  (B,)             noise level: x_t = alpha x_0 + t eps
    tau           tau               (B,)             raw time; schedules are uniform in tau
    s             shift             number           t = s tau / (1 + (s - 1) tau)
    x_t           x                 (B, C, *)        state; any number of spatial dims, also none
    u             u, velocity       (B, C, *)        dx/dt = eps - x_0, hence x_0 = x - t u
    x_src, t_src  x_src, t_src      (B, C, *), (B,)  where the network was evaluated
    pi(x, t)      policy.velocity   (B, C, *)        valid for every t <= t_src
    A, mu, std    GaussianMixture   (B, K, ...)      weights, means, std of K velocity components
    x0_hat        policy.x0_hat     (B, C, *)        denoised state, interpolated between N of them

A *teacher* is any callable (x, t) -> u. A *student* is any callable (x_src, t_src) -> policy. The
caller closes over labels, prompts and guidance: nothing here knows which network is behind them.
A time is a number, or a tensor of shape () or (B,). Policies compute in float32 (float64 stays).
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

EPS = 1e-6  # the smallest t, and the smallest denominator, of velocities and rollouts
Time, Generator = float | Tensor, torch.Generator | None
Teacher = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> u
Student = Callable[[Tensor, Tensor], "Policy"]  # (x_src, t_src) -> policy

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
    """Any class with these four; `flow(x, t, t_end) -> x_end`, an exact rollout, is optional."""
    x_src: Tensor  # (B, C, *)
    t_src: Tensor  # (B,)
    def velocity(self, x: Tensor, t: Time) -> Tensor: ...  # pi(x, t), (B, C, *) -> (B, C, *)
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

    Args: mixture; x_src: (B, C, *); t_src in (0, 1]. Raises: ValueError if shapes do not fit.
    """

    def __init__(self, mixture: GaussianMixture, x_src: Tensor, t_src: Time):
        b, k, c, *spatial = mixture.means.shape
        shapes, ones = [(*part.shape,) for part in (*mixture, x_src)], [1] * len(spatial)
        if shapes[1:] != [(b, 1, 1, *ones), (b, k, 1, *spatial), (b, c, *spatial)]:
            form = "(B, K, C, *), (B, 1, 1, *ones), (B, K, 1, *), (B, C, *)"
            raise ValueError(f"means, logstds, logweights, x_src {shapes}: must be {form}")
        means, logstds, logweights, x = (_upcast(part) for part in (*mixture, x_src))
        self.mixture, self.x_src, self.t_src = mixture, x_src, _per_sample(t_src, means)
        t, x = self.t_src.view(b, 1, 1), x.reshape(b, c, -1)  #                   (B, C, P)
        m = x[:, None] - t[:, None] * means.reshape(b, k, c, -1)  #               (B, K, C, P)
        self.c = m.detach().mean(1)  #  x_0 is measured from here, see `velocity` (B, C, P)
        m = m - self.c[:, None]
        self.m = [m_c.contiguous() for m_c in m.unbind(2)]  #  by channel     C x (B, K, P)
        self.half_norm = m.square().sum(2) / 2  #  |m_k|^2 / 2                    (B, K, P)
        self.log_A = logweights.reshape(b, k, -1)  #                              (B, K, P)
        self.var = (t * logstds.reshape(b, 1, 1).exp()) ** 2  #                   (B, 1, 1)
        self.zeta_src = ((1 - t) / t) ** 2  #                                     (B, 1, 1)
        self.nu_src = (1 - t) / t**2 * (x - (1 - t) * self.c)  #                  (B, C, P)
        self.var_nu_src = self.var * self.nu_src

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """pi(x, t). x: (B, C, *); t at most t_src. -> (B, C, *).

        With x_0 measured from the center c, x becomes y = x - alpha c and u becomes u + c. What
        cancels as t -> 0 is cancelled on paper: with r = alpha/t,
            u + c = ((1 - var (r + zeta_src)) y + var nu_src - sum_k w_k m_k) / (d t).
        """
        t = _per_sample(t, self.c).view(-1, 1, 1).clamp(min=EPS)  #               (B, 1, 1)
        alpha = 1 - t
        r = alpha / t
        zeta = r**2 - self.zeta_src
        d = (1 + self.var * zeta).clamp(min=EPS)
        y = torch.addcmul(_upcast(x).reshape(self.c.shape), alpha, self.c, value=-1)  # (B, C, P)
        query = (r / t * y - self.nu_src) / d  #  nu/d; attention over k          (B, C, P)
        logits = torch.addcmul(self.log_A, zeta / d, self.half_norm, value=-1)  # (B, K, P)
        for m_c, query_c in zip(self.m, query.unbind(1), strict=True):  #  no (B, K, C, P) temporary
            logits.addcmul_(m_c, query_c[:, None])
        w = logits.softmax(1)
        mean = torch.stack([(w * m_c).sum(1) for m_c in self.m], dim=1)  #        (B, C, P)
        u = torch.addcmul(self.var_nu_src - mean, 1 - self.var * (r + self.zeta_src), y)
        return (u / (d * t) - self.c).reshape(x.shape)

    def detach(self) -> "GMFlowPolicy":
        """The same policy without a gradient."""
        mixture = (part.detach() for part in self.mixture)
        return type(self)(GaussianMixture(*mixture), self.x_src.detach(), self.t_src)

    def drop(self, mask: Tensor) -> "GMFlowPolicy":
        """Without the components where mask, (B, K) bool, is True; the other weights grow."""
        mask = mask.reshape(*mask.shape, *[1] * (self.mixture.means.ndim - 2))
        logweights = self.mixture.logweights.masked_fill(mask, -math.inf).log_softmax(1)
        return type(self)(self.mixture._replace(logweights=logweights), self.x_src, self.t_src)

    def dropout(self, p: float, generator: Generator = None) -> "GMFlowPolicy":
        """Drops each component, for the whole sample, with probability p in [0, 1); never all."""
        draws = _draw(torch.rand, self.mixture.means.shape[:2], self.c, generator)  # (B, K)
        return self.drop((draws < p) & (draws < draws.amax(1, keepdim=True)))

    def temperature(self, T: float) -> "GMFlowPolicy":
        """Sharper for T in (0, 1): weights A_k^(1/T), renormalised, and variance times T."""
        means, logstds, logweights = self.mixture
        parts = means, logstds + math.log(T) / 2, (logweights / T).log_softmax(1)
        return type(self)(GaussianMixture(*parts), self.x_src, self.t_src)

class DXPolicy:
    """The DX policy: pi(x, t) = (x - x0_hat(t)) / t, from N denoised states x_src - t_src v_i.

    mode="grid": they sit at equal distances of tau on [tau_src - segment_size, tau_src] (clamped at
        0), the first at the segment's end, the last at tau_src; linear between, constant outside.
    mode="polynomial": x0_hat = sum_i (tau_src - tau)^i (x_src - t_src v_i), i from 0.

    Args: velocities v_i: (B, N, C, *); x_src: (B, C, *); t_src in (0, 1]; segment_size in [0, 1]
        and shift stay as trained. Raises: ValueError if shapes do not fit, or for another mode.
    """

    def __init__(self, velocities: Tensor, x_src: Tensor, t_src: Time, segment_size: Time = 1.0,
                 shift: float = 1.0, mode: str = "grid"):
        v, shapes = _upcast(velocities), ((*velocities.shape,), (*x_src.shape,))
        if v.ndim < 3 or (len(v), *v.shape[2:]) != shapes[1] or not v.shape[1]:
            raise ValueError(f"velocities, x_src {shapes}: must be (B, N >= 1, C, *), (B, C, *)")
        if mode not in ("grid", "polynomial"):
            raise ValueError(f"mode {mode!r}: must be 'grid' or 'polynomial'")
        self.velocities, self.x_src, self.t_src = velocities, x_src, _per_sample(t_src, v)
        self.segment_size, self.shift, self.mode = segment_size, shift, mode
        self.x0 = _upcast(x_src)[:, None] - _expand(self.t_src, v) * v  #         (B, N, C, *)
        self.tau_src, self.row = unshift_time(self.t_src, shift), torch.arange(len(v)).to(v.device)
        self.tau_end = (self.tau_src - _per_sample(segment_size, v)).clamp(min=0)
        self.length = (self.tau_src - self.tau_end).clamp(min=EPS)
        own = (type(self).x0_hat, type(self).velocity) != (DXPolicy.x0_hat, DXPolicy.velocity)
        if (mode != "grid" or own) and type(self).flow is DXPolicy.flow:
            self.flow = None  # it solves the grid, not a polynomial or a subclass's own x0_hat

    def x0_hat(self, t: Time) -> Tensor:
        """The denoised state at noise level t. -> (B, C, *)."""
        tau, n = unshift_time(_per_sample(t, self.x0), self.shift), self.x0.shape[1]
        if self.mode == "polynomial":
            distance = _expand(self.tau_src - tau, self.x_src)
            return sum(distance**i * self.x0[:, i] for i in range(n))
        place = ((tau - self.tau_end) / self.length).clamp(0, 1) * (n - 1)  #     (B,)
        left = place.long().clamp(max=max(n - 2, 0))
        low, high = self.x0[self.row, left], self.x0[self.row, (left + 1).clamp(max=n - 1)]
        return torch.lerp(low, high, _expand(place - left, low))

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """pi(x, t). x: (B, C, *); t at most t_src. -> (B, C, *)."""
        return velocity_from_x0(_upcast(x), _per_sample(t, self.x0), self.x0_hat(t))

    def flow(self, x: Tensor, t: Time, t_end: Time) -> Tensor:
        """The exact solution of a grid policy's ODE. x: (B, C, *) at t -> (B, C, *) at t_end.

        d(x/t)/dt = -x0_hat/t^2, dt/t^2 = dtau/(s tau^2). By parts, with slope_j on linear piece j:
            x_end = t_end/t x + t_end/s (x0_hat_end/tau_end - x0_hat/tau + sum_j slope_j log(..)_j)
        """
        t, t_end = (_per_sample(v, self.x0).clamp(min=EPS) for v in (t, t_end))
        tau, tau_end, n = *(unshift_time(v, self.shift) for v in (t, t_end)), self.x0.shape[1]
        knots = torch.linspace(0, 1, n, device=t.device, dtype=t.dtype)[:, None] * self.length
        logs = (knots + self.tau_end).minimum(tau).maximum(tau_end).log().diff(dim=0)  # (N - 1, B)
        logs = (logs * (n - 1) / self.length).T.reshape(len(x), n - 1, *[1] * (x.ndim - 1))
        ends = self.x0_hat(t_end) / _expand(tau_end, x) - self.x0_hat(t) / _expand(tau, x)
        integral = ends + (logs * self.x0.diff(dim=1)).sum(1)  #                  (B, C, *)
        return _expand(t_end / t, x) * _upcast(x) + _expand(t_end / self.shift, x) * integral

    def detach(self) -> "DXPolicy":
        """The same policy without a gradient."""
        settings = self.t_src, self.segment_size, self.shift, self.mode
        return type(self)(self.velocities.detach(), self.x_src.detach(), *settings)

# ==== Rollout =====================================================================================
def rollout(policy: Policy, x: Tensor, tau_start: Time, tau_end: Time, shift: float = 1.0,
            total_substeps: int = 128, solver: str = "euler", callback: Callable | None = None,
            through: Tensor | None = None, longest: float | None = None,
            ) -> Tensor | tuple[Tensor, list[Tensor]]:
    """Integrates a policy's ODE from raw time tau_start down to tau_end; no network evaluation.

    Args:
        x: (B, C, *) at tau_start; tau_start and tau_end in [0, 1].
        total_substeps: per unit of tau; max(1, ceil(length * this)) between any two stops.
        solver: "euler", uniform in tau: the published protocol. "deis", uniform in t^(1/1.5):
            second-order exponential multistep (arXiv 2204.13902). "exact": the policy's `flow`.
        callback: called with (substep, tau (B,), x) at the start and after each substep.
        through: (P, B) raw times on the way, descending: returns (x_end, list of P states).
        longest: bound of tau_start - tau_end; without it tensor times force a device sync.
    Returns: x_end (B, C, *). Raises: ValueError for an unknown solver, or "exact" without `flow`.
    """
    flow = getattr(policy, "flow", None)
    if solver not in ("euler", "deis") and (solver != "exact" or flow is None):
        raise ValueError(f"solver {solver!r}: must be euler, deis, or exact for a policy with flow")
    if longest is None and isinstance(tau_start, int | float) and isinstance(tau_end, int | float):
        longest = tau_start - tau_end
    x, S = _upcast(x), 0 if solver == "exact" else total_substeps  #  0: one step to each stop
    way = [] if through is None else [*through.to(x)]  #                          P x (B,)
    stops = torch.stack([_per_sample(tau_start, x), *way, _per_sample(tau_end, x)]).clamp(min=0)

    # Between stops substeps are uniform in z: n of them, the last of which is number `arrival`.
    z, rate = stops, S
    if solver == "deis":  # as many in all as uniform ones in tau
        z = shift_time(stops, shift) ** (1 / 1.5)
        rate = ((stops[0] - stops[-1]) * S - 1e-4).ceil().clamp(min=1)
        rate = rate / (z[0] - z[-1]).clamp(min=EPS)
    gap = z[:-1] - z[1:]  #                                                       (P + 1, B)
    n = (gap * rate - 1e-4).ceil().clamp(min=1)  # 0.25 of 128 is 32, whatever rounding says
    arrival = n.cumsum(0)
    at_most = max(1, math.ceil((longest or 0) * S - 1e-4)) + len(n) - 1
    steps = int(arrival[-1].max()) if longest is None or x.device.type == "cpu" else at_most
    step = torch.arange(steps + 1, device=x.device)[:, None, None]
    z = (z[0] - (gap * ((step - arrival + n) / n).clamp(0, 1)).sum(1)).clamp(min=0)
    t = z**1.5 if solver == "deis" else shift_time(z, shift)  #                   (steps + 1, B)
    dt, there, x0, states = t.diff(dim=0), t[1:].clamp(min=EPS), x, x.expand(len(way), *x.shape)
    reached = (arrival[:-1] == step[1:]).view(steps, *states.shape[:2], *[1] * (x.ndim - 1))
    bend = there * (t[:-1].clamp(min=EPS) / there).log() + dt
    bend[1:] /= dt[:-1].clamp(max=-1e-4)  #  a tiny substep gives no slope
    if callback:
        callback(0, stops[0], x)
    for i in range(steps):
        if solver == "exact":
            x = flow(x, t[i], t[i + 1])
        else:
            u, x_i, x0_before = policy.velocity(x, t[i]), x, x0
            x = torch.addcmul(x, _expand(dt[i], x), u)  #  Euler: exact for a constant x0_hat
            if solver == "deis":  #  exact for x0_hat of slope b in t, which adds
                x0 = x0_from_velocity(x_i, t[i], u)  #  b (t' log(t/t') + t' - t) at t' = t + dt
                x = torch.addcmul(x, _expand(bend[i], x), x0 - x0_before) if i else x
        states = torch.where(reached[i], x, states)  #                            (P, B, C, *)
        if callback:
            callback(i + 1, unshift_time(t[i + 1], shift), x)
    return x if through is None else (x, [*states])

# ==== pi-ID: imitation distillation ===============================================================
class PiIDLoss(NamedTuple):
    """What `pi_id_loss` returns. M intermediates of B samples: sample b of m is row m * B + b."""
    loss: Tensor  #       scalar, mean squared error
    u_policy: Tensor  #   (M * B, C, *)
    u_teacher: Tensor  #  (M * B, C, *)
    t: Tensor  #          (M * B,)   noise levels of the queries
    x_dst: Tensor  #      (B, C, *)  where the detached policy ends the segment

    def weighted(self, power: float) -> Tensor:
        """The mean of t^power times the squared error, a scalar; `loss` is weighted(0)."""
        square = (self.u_policy - self.u_teacher).square().flatten(1).mean(1)  #  (M * B,)
        return (self.t**power * square).mean()

def pi_id_loss(policy: Policy, teacher: Teacher, tau_src: Time, segment_size: Time,
               shift: float = 1.0, total_substeps: int = 128, num_intermediates: int = 2,
               teacher_ratio: float = 0.0, window_substeps: int = 0, dropout: float = 0.0,
               uniforms: tuple | Callable | None = None, generator: Generator = None,
               solver: str = "euler", batch_teacher: bool = False) -> PiIDLoss:
    """On-policy imitation of the teacher over one segment of raw time (Algorithm 1).

    Args:
        policy: starts the segment [tau_src - segment_size, tau_src] at policy.x_src.
        tau_src, segment_size: in [0, 1]; a tensor segment_size forces a device sync.
        total_substeps, solver: of the rollout. num_intermediates: M >= 1, queries per sample.
        teacher_ratio, window_substeps: see `_pi_id_mixed`; 0 and 0 are the plain algorithm.
        dropout: in [0, 1), of the detached policy's components (GMFlow).
        uniforms: ((B, M), (B, M - 1)) in [0, 1) replace the random draws: replays a loss. Or a
            function (tau_src (B,), segment_size (B,)) -> such a pair: query times of one's own.
        batch_teacher: one query of M * B states in place of M of B; not with teacher_ratio.
    Raises: ValueError if the teacher's velocity has another shape than the state.
    """
    x_src, M = _upcast(policy.x_src).detach(), num_intermediates
    tau, segment = _per_sample(tau_src, x_src), _per_sample(segment_size, x_src)
    longest = segment_size if isinstance(segment_size, int | float) else None
    if uniforms is None:
        uniforms = [_draw(torch.rand, (len(x_src), n), x_src, generator) for n in (M, M - 1)]
    if callable(uniforms):
        uniforms = uniforms(tau, segment)
    uniforms = [draws.to(x_src).T.sort(0).values for draws in uniforms]  #        (M, B), (M - 1, B)
    steps = {"shift": shift, "total_substeps": total_substeps, "solver": solver}
    detached = policy.detach()
    detached = detached.dropout(dropout, generator) if dropout else detached

    def query(x: Tensor, t: Tensor) -> Tensor:
        n = 1 if batch_teacher else len(x) // len(x_src)
        u = torch.cat([teacher(*part) for part in zip(x.chunk(n), t.chunk(n), strict=True)])
        if u.shape != x.shape:
            raise ValueError(f"velocity of the teacher {(*u.shape,)}: must be {(*x.shape,)}")
        return _upcast(u)

    if teacher_ratio or window_substeps:
        mix = (segment, uniforms, teacher_ratio, window_substeps, steps, longest)
        return _pi_id_mixed(policy, detached, query, x_src, tau, *mix)
    with torch.no_grad():
        tau_m, tau_dst = tau - segment * uniforms[0], tau - segment  #            (M, B), (B,)
        x_dst, x_m = rollout(detached, x_src, tau, tau_dst, through=tau_m, longest=longest, **steps)
        t_m = shift_time(tau_m, shift)
        u_teacher = query(torch.cat(x_m), t_m.flatten())  #                       (M * B, C, *)
    u_policy = torch.cat([policy.velocity(x, t) for x, t in zip(x_m, t_m, strict=True)])
    loss = (u_policy - u_teacher).square().mean()
    return PiIDLoss(loss, u_policy, u_teacher, t_m.flatten(), x_dst)

def _pi_id_mixed(policy: Policy, detached: Policy, query: Callable, x: Tensor, tau: Tensor,
                 segment: Tensor, uniforms: list[Tensor], r: float, window: int, steps: dict,
                 longest: float | None) -> PiIDLoss:
    """Algorithm 1 with scheduled trajectory mixing and the micro-window.

    r = teacher_ratio: the share of the segment that M teacher Euler steps take, between rollouts
        of the detached policy; from 1 to 0 early in training, for guidance-distilled teachers.
    window = window_substeps: the prediction is the policy's mean velocity over the teacher's step
        and a window W behind it. DX needs it most: 1/t magnifies the errors of its velocity.
    """
    shift, S = steps["shift"], steps["total_substeps"]
    W = (window * segment / (segment * S).round().clamp(min=1)).minimum(segment)
    zero, one, tau_dst = 0 * tau[None], 0 * tau[None] + 1, tau - segment
    by_policy = (1 - r) * (segment - W) * uniforms[0].diff(dim=0, prepend=zero)  # lengths  (M, B)
    by_teacher = r * (segment - W) * torch.cat([zero, uniforms[1], one]).diff(dim=0)
    tau_b = (tau - (by_policy + by_teacher).cumsum(0)).clamp(min=0)  #  ends of the teacher's steps
    tau_a, tau_w = (tau_b + by_teacher).minimum(tau), (tau_b - W).clamp(min=0)  #  queries, windows
    t_a, t_b, t_w = (shift_time(v, shift) for v in (tau_a, tau_b, tau_w))
    with torch.no_grad():
        if r == 0:
            x_dst, x_a = rollout(detached, x, tau, tau_dst, through=tau_a, longest=longest, **steps)
            u_teacher = query(torch.cat(x_a), t_a.flatten())
        else:
            x_a, targets = [], []
            for m in range(len(tau_a)):
                x_a.append(rollout(detached, x, tau, tau_a[m], longest=longest, **steps))
                targets.append(query(x_a[m], t_a[m]))
                x, tau = x_a[m] + _expand(t_b[m] - t_a[m], x) * targets[m], tau_b[m]
            x_dst = rollout(detached, x, tau, tau_dst, longest=longest, **steps)
            u_teacher = torch.cat(targets)
    longest = longest and r * longest + window * longest / max(1, round(longest * S))
    u_policy = []
    for m, x in enumerate(x_a):
        x_w = rollout(policy, x, tau_a[m], tau_w[m], longest=longest, **steps)
        mean = (x - x_w) / _expand(t_a[m] - t_w[m], x).clamp(min=EPS)
        short = ((tau_a[m] - tau_w[m]) * S).round() < 2  #  there the local velocity
        u_policy.append(torch.where(_expand(short, x), policy.velocity(x, t_a[m]), mean))
    u_policy = torch.cat(u_policy)
    loss = (u_policy - u_teacher).square().mean()
    return PiIDLoss(loss, u_policy, u_teacher, t_a.flatten(), x_dst)

def segment_of(tau: Time, nfe: int, final_step_size_scale: float = 1.0) -> tuple[Time, Time]:
    """The segment of raw time tau, in (0, 1]: tau rounded up to the grid of segment ends.

    nfe segments of 1 / (nfe - 1 + f) each, f = final_step_size_scale > 0; the last is f times that.
    Returns: (tau_src, segment_size), numbers or (B,) as tau is. Raises: ValueError for nfe < 1.
    """
    if nfe < 1:
        raise ValueError(f"nfe = {nfe}: must be at least 1")
    f, base = final_step_size_scale, 1 / (nfe - 1 + final_step_size_scale)
    i = (1 - tau) / base + 1e-6  #  segments above tau; a tau on the grid starts its own segment
    i = i.floor().clamp(max=nfe - 1) if isinstance(i, Tensor) else min(math.floor(i), nfe - 1)
    return 1 - i * base, base * (1 + (f - 1) * (i == nfe - 1))

def pi_id_data_dependent(student: Student, teacher: Teacher, x_0: Tensor, nfe: int = 1,
                         shift: float = 1.0, final_step_size_scale: float = 1.0,
                         generator: Generator = None, **loss_options) -> PiIDLoss:
    """Algorithm 2: `pi_id_loss` on a random segment; x_src is data x_0 (B, C, *) plus noise.
    For nfe = 1 every segment starts in pure noise: x_0 only supplies the shape."""
    x_0, options = _upcast(x_0), {"shift": shift, "generator": generator} | loss_options
    tau = 1 - _draw(torch.rand, (len(x_0),), x_0, generator)  #                   in (0, 1]
    tau_src, segment_size = segment_of(tau if nfe != 1 else 1.0, nfe, final_step_size_scale)
    segment_size = segment_size if final_step_size_scale != 1 else 1 / nfe  #  a number: no sync
    t_src = _per_sample(shift_time(tau_src, shift), x_0)
    eps = _draw(torch.randn, x_0.shape, x_0, generator)
    x_src = torch.lerp(x_0, eps, _expand(t_src, x_0))  #  (1 - t) x_0 + t eps
    return pi_id_loss(student(x_src, t_src), teacher, tau_src, segment_size, **options)

def pi_id_data_free(student: Student, teacher: Teacher, noise: Tensor, nfe: int = 1,
                    shift: float = 1.0, final_step_size_scale: float = 1.0,
                    generator: Generator = None, **loss_options) -> Iterator[tuple]:
    """Algorithm 3: `pi_id_loss` on every segment in turn, from noise (B, C, *); no data needed.

    Yields (segment_size, PiIDLoss); the detached policy carries x to the next segment. Call
    (segment_size * out.loss).backward() for each, and then take one optimizer step.
    """
    tau, x_src, options = 1.0, _upcast(noise), {"shift": shift, "generator": generator}
    for _ in range(nfe):
        tau_src, segment_size = segment_of(tau, nfe, final_step_size_scale)
        policy = student(x_src, _per_sample(shift_time(tau_src, shift), x_src))
        out = pi_id_loss(policy, teacher, tau_src, segment_size, **options, **loss_options)
        yield segment_size, out
        tau, x_src = tau_src - segment_size, out.x_dst

# ==== Sampler =====================================================================================
class FlowMapSchedule(NamedTuple):
    """Levels of the few-step sampler, (nfe,) each."""
    t_src: Tensor  #  where the network is evaluated
    t_to: Tensor  #   the next level, 0 at the end
    t_dst: Tensor  #  where the policy is followed to; fresh noise leads back up to t_to
    m: Tensor  #      share of the old noise that is kept; 1 is deterministic

def flow_map_schedule(nfe: int, shift: float = 1.0, final_step_size_scale: float = 1.0,
                      h: float = 0.0) -> FlowMapSchedule:
    """Source levels uniform in tau, from 1 with step 1 / (nfe - 1 + f), then shifted.

    With stochasticity h in [0, inf] a step goes on to t_dst < t_to and returns by fresh noise:
        m = (t_to alpha_src / (t_src alpha_to))^(h^2),    t_dst = t_to m / (alpha_to + t_to m).
    Raises: ValueError for nfe < 1.
    """
    levels = torch.tensor([*_levels(nfe, shift, final_step_size_scale, h)])  #    (nfe, 4)
    return FlowMapSchedule(*levels.unbind(1))

def _levels(nfe: int, shift: float, f: float, h: float) -> Iterator[tuple[float, ...]]:
    """(t_src, t_to, t_dst, m) of each step as Python numbers: they force no device sync."""
    segment_of(1.0, nfe, f)  #  checks nfe
    t = [shift_time(1 - i / (nfe - 1 + f), shift) for i in range(nfe)]
    for t_src, t_to in zip(t, [*t[1:], 0.0], strict=True):
        m = (t_to * (1 - t_src) / (t_src * (1 - t_to))) ** (h * h)
        yield t_src, t_to, t_to * m / (1 - t_to + t_to * m), m

@torch.no_grad()
def sample(student: Student, noise: Tensor, nfe: int = 1, shift: float = 1.0,
           final_step_size_scale: float = 1.0, h: float = 0.0, temperature: float = 1.0,
           total_substeps: int = 128, generator: Generator = None, solver: str = "euler",
           callback: Callable | None = None) -> Tensor:
    """Few-step sampling: nfe evaluations of the student, rollouts between them.

    Args:
        noise: (B, C, *) at t = 1. nfe: may exceed what was trained ("elastic inference").
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
    """A number, () or (B,) -> (B,), of the dtype and on the device of x."""
    return torch.as_tensor(value, device=x.device, dtype=x.dtype).expand(len(x))

def _draw(draw: Callable, shape: tuple, x: Tensor, generator: Generator) -> Tensor:
    """torch.rand or torch.randn on the generator's device, moved beside x."""
    device = x.device if generator is None else generator.device
    return draw(shape, generator=generator, device=device, dtype=x.dtype).to(x.device)

