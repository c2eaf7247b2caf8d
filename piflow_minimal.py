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
    A_k, mu_k     GaussianMixture   (B, K, ...)      weights and means of K velocity components
    std           GaussianMixture   (B, 1, ...)      their common standard deviation
    x0_hat        policy.x0_hat     (B, C, *)        denoised state, from N outputs of the network
    K, N, M                         numbers          components, denoised states, teacher queries

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
NUMBER = (int, float)
Time = float | Tensor
Generator = torch.Generator | list[torch.Generator] | None  # a list: one for each sample
Teacher = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> u
Student = Callable[[Tensor, Tensor], "Policy"]  # (x_src, t_src) -> policy

# ==== Shapes, precision, random draws =============================================================
def _expand(t: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, ...) with as many dims as x, so that it broadcasts."""
    return t.reshape(-1, *[1] * (x.ndim - 1))

def _upcast(x: Tensor) -> Tensor:
    """The precision of policies: float32, or float64 for float64 inputs."""
    return x if x.dtype == torch.float64 else x.float()

def _per_sample(value: Time, x: Tensor) -> Tensor:
    """A number, () or (B,) -> (B,), of the dtype and on the device of x."""
    if isinstance(value, NUMBER):
        return x.new_full((len(x),), value)  #  a copy of the number would force a device sync
    return torch.as_tensor(value, device=x.device, dtype=x.dtype).expand(len(x))

def _check_shape(name: str, x: Tensor, like: Tensor) -> None:
    if x.shape != like.shape:
        raise ValueError(f"{name} {tuple(x.shape)}: must be {tuple(like.shape)}")

def _draw(draw: Callable, shape: tuple, x: Tensor, generator: Generator) -> Tensor:
    """torch.rand or torch.randn (B, ...) on each generator's device, moved beside x."""
    if isinstance(generator, list):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} samples")
        return torch.stack([_draw(draw, shape[1:], x, one) for one in generator])
    device = x.device if generator is None else generator.device
    return draw(shape, generator=generator, device=device, dtype=x.dtype).to(x.device)

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
    2. p(x_0 | x) is proportional to p(x_0 | x_src) p(x | x_0) / p(x_src | x_0), where p(x | x_0) is
       N(alpha x_0, t^2).
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
        shapes = [tuple(part.shape) for part in (*mixture, x_src)]
        ones = [1] * len(spatial)
        if shapes[1:] != [(b, 1, 1, *ones), (b, k, 1, *spatial), (b, c, *spatial)]:
            raise ValueError(f"means, logstds, logweights, x_src {shapes}: must be "
                             "(B, K, C, *), (B, 1, 1, *ones), (B, K, 1, *), (B, C, *)")  # fmt: skip
        self.mixture = mixture
        self.x_src = x_src
        means, logstds, logweights, x = (_upcast(part) for part in (*mixture, x_src))
        self.t_src = _per_sample(t_src, means)
        t = self.t_src.view(b, 1, 1)
        p = math.prod(spatial)  #  locations
        x = x.reshape(b, c, p)
        m = x[:, None] - t[:, None] * means.reshape(b, k, c, p)  #                (B, K, C, P)
        self.center = m.detach().mean(1)  #  x_0 is measured from here            (B, C, P)
        m = m - self.center[:, None]
        self.m = [m_c.contiguous() for m_c in m.unbind(2)]  #  by channel     C x (B, K, P)
        self.half_norm = m.square().sum(2) / 2  #  |m_k|^2 / 2                    (B, K, P)
        self.log_A = logweights.reshape(b, k, p)  #                               (B, K, P)
        self.var = (t * logstds.reshape(b, 1, 1).exp()) ** 2  #                   (B, 1, 1)
        self.zeta_src = ((1 - t) / t) ** 2  #                                     (B, 1, 1)
        self.nu_src = (1 - t) / t**2 * (x - (1 - t) * self.center)  #             (B, C, P)
        self.var_nu_src = self.var * self.nu_src

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """pi(x, t). x: (B, C, *), as x_src; t at most t_src. -> (B, C, *).

        `velocity` in the README's 40 lines is the readable form. As t -> 0 its x and x_0 cancel,
        and 1/t magnifies the rounding. Here x_0 is measured from the means' center, so that x
        becomes y = x - alpha center and u becomes u + center, and with ratio = alpha/t
            u + center = ((1 - var (ratio + zeta_src)) y + var nu_src - sum_k w_k m_k) / (d t),
        where what cancels is cancelled on paper. No result depends on the center, so it needs no
        gradient. d >= 1 for t <= t_src; the clamp is for a t above.
        """
        _check_shape("state x", x, self.x_src)
        t = _per_sample(t, self.center).view(-1, 1, 1).clamp(min=EPS)  #          (B, 1, 1)
        alpha = 1 - t
        ratio = alpha / t
        zeta = ratio**2 - self.zeta_src
        d = (1 + self.var * zeta).clamp(min=EPS)
        x_flat = _upcast(x).reshape(self.center.shape)
        y = torch.addcmul(x_flat, alpha, self.center, value=-1)  #                (B, C, P)
        # As attention over k: query nu/d, keys m_k, bias log A_k - zeta/d |m_k|^2/2, values m_k.
        query = ((ratio / t * y - self.nu_src) / d).unbind(1)  #              C x (B, P)
        logits = torch.addcmul(self.log_A, self.m[0], query[0][:, None])  #       (B, K, P)
        for m_c, query_c in zip(self.m[1:], query[1:], strict=True):  #  no (B, K, C, P) temporary
            logits.addcmul_(m_c, query_c[:, None])
        w = logits.addcmul_(zeta / d, self.half_norm, value=-1).softmax(1)
        mean = torch.stack([(w * m_c).sum(1) for m_c in self.m], dim=1)  #        (B, C, P)
        u = torch.addcmul(self.var_nu_src - mean, 1 - self.var * (ratio + self.zeta_src), y)
        return (u / (d * t) - self.center).reshape(x.shape)

    def detach(self) -> "GMFlowPolicy":
        """The same policy without a gradient."""
        mixture = GaussianMixture(*(part.detach() for part in self.mixture))
        return type(self)(mixture, self.x_src.detach(), self.t_src)

    def drop(self, mask: Tensor) -> "GMFlowPolicy":
        """Without the components where mask, (B, K) bool, is True; the other weights grow."""
        mask = mask.reshape(*mask.shape, *[1] * (self.mixture.means.ndim - 2))
        logweights = self.mixture.logweights.masked_fill(mask, -math.inf).log_softmax(1)
        return type(self)(self.mixture._replace(logweights=logweights), self.x_src, self.t_src)

    def dropout(self, p: float, generator: Generator = None) -> "GMFlowPolicy":
        """Drops each component, for the whole sample, with probability p in [0, 1); never all."""
        draws = _draw(torch.rand, self.mixture.means.shape[:2], self.center, generator)  # (B, K)
        return self.drop((draws < p) & (draws < draws.amax(1, keepdim=True)))

    def temperature(self, T: float) -> "GMFlowPolicy":
        """Sharper for T in (0, 1): weights A_k^(1/T), renormalised, and variance times T."""
        means, logstds, logweights = self.mixture
        logweights = (logweights / T).log_softmax(1)
        mixture = GaussianMixture(means, logstds + math.log(T) / 2, logweights)
        return type(self)(mixture, self.x_src, self.t_src)

class DXPolicy:
    """The DX policy: pi(x, t) = (x - x0_hat(t)) / t, from N denoised states x_src - t_src v_i.

    mode="grid": they sit at equal distances of tau on [tau_src - segment_size, tau_src] (clamped at
        0), the first at the segment's end, the last at tau_src; linear between, constant outside.
    mode="polynomial": x0_hat = sum_i (tau_src - tau)^i (x_src - t_src v_i), i from 0 at tau_src.

    Args: velocities v_i: (B, N, C, *); x_src: (B, C, *); t_src in (0, 1]; segment_size, in [0, 1],
        and shift: those of training. Raises: ValueError if shapes do not fit, or for another mode.
    """

    def __init__(self, velocities: Tensor, x_src: Tensor, t_src: Time, segment_size: Time = 1.0,
                 shift: float = 1.0, mode: str = "grid"):
        shapes = tuple(velocities.shape), tuple(x_src.shape)
        b, n, *rest = shapes[0]
        if shapes[1] != (b, *rest) or n == 0:
            raise ValueError(f"velocities, x_src {shapes}: must be (B, N >= 1, C, *), (B, C, *)")
        if mode not in ("grid", "polynomial"):
            raise ValueError(f"mode {mode!r}: must be 'grid' or 'polynomial'")
        v = _upcast(velocities)
        self.velocities = velocities
        self.x_src = x_src
        self.t_src = _per_sample(t_src, v)
        self.segment_size = segment_size
        self.shift = shift
        self.mode = mode
        self.x0 = _upcast(x_src)[:, None] - _expand(self.t_src, v) * v  #         (B, N, C, *)
        self.row = torch.arange(b, device=v.device)  #  of each sample            (B,)
        self.tau_src = unshift_time(self.t_src, shift)
        self.tau_dst = (self.tau_src - _per_sample(segment_size, v)).clamp(min=0)
        self.length = (self.tau_src - self.tau_dst).clamp(min=EPS)

    def x0_hat(self, t: Time) -> Tensor:
        """The denoised state at noise level t. -> (B, C, *)."""
        tau = unshift_time(_per_sample(t, self.x0), self.shift)
        n = self.x0.shape[1]
        if self.mode == "polynomial":
            distance = _expand(self.tau_src - tau, self.x_src)
            return sum(distance**i * self.x0[:, i] for i in range(n))
        place = ((tau - self.tau_dst) / self.length).clamp(0, 1) * (n - 1)  #     (B,) in [0, N - 1]
        left = place.long().clamp(max=max(n - 2, 0))
        right = (left + 1).clamp(max=n - 1)
        share = _expand(place - left, self.x_src)
        return torch.lerp(self.x0[self.row, left], self.x0[self.row, right], share)

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """pi(x, t). x: (B, C, *), as x_src; t at most t_src. -> (B, C, *)."""
        _check_shape("state x", x, self.x_src)
        return velocity_from_x0(_upcast(x), _per_sample(t, self.x0), self.x0_hat(t))

    def flow(self, x: Tensor, t: Time, t_end: Time) -> Tensor:
        """The exact solution of a grid policy's ODE. x: (B, C, *) at t -> (B, C, *) at t_end.

        d(x/t)/dt = -x0_hat/t^2 and dt/t^2 = dtau/(s tau^2), so x_end/t_end = x/t + integral/s with
            integral of x0_hat/tau^2 = x0_hat_end/tau_end - x0_hat/tau + sum_j slope_j log_j
        by parts: x0_hat has slope_j on piece j, where tau runs over a ratio exp(log_j).
        Raises: ValueError for a polynomial, or a subclass, whose x0_hat may be another function.
        """
        if self.mode != "grid" or type(self) is not DXPolicy:
            raise ValueError(f"solver 'exact': {type(self)}, mode {self.mode!r}, has another flow")
        t = _per_sample(t, self.x0).clamp(min=EPS)
        t_end = _per_sample(t_end, self.x0).clamp(min=EPS)
        tau = unshift_time(t, self.shift)
        tau_end = unshift_time(t_end, self.shift)

        pieces = self.x0.shape[1] - 1
        grid = torch.linspace(0, 1, pieces + 1, device=t.device, dtype=t.dtype)[:, None]
        grid = self.tau_dst + grid * self.length  #                               (N, B)
        grid = grid.minimum(tau).maximum(tau_end)  #  a piece outside gets log 1 = 0
        logs = grid.log().diff(dim=0).T  #                                        (B, N - 1)
        weights = logs / (self.length[:, None] / pieces)  #  slope_j is a change over this length
        weights = weights.reshape(*weights.shape, *[1] * (x.ndim - 1))
        integral = (weights * self.x0.diff(dim=1)).sum(1)  #                      (B, C, *)
        integral += self.x0_hat(t_end) / _expand(tau_end, x) - self.x0_hat(t) / _expand(tau, x)
        return _expand(t_end / t, x) * _upcast(x) + _expand(t_end / self.shift, x) * integral

    def detach(self) -> "DXPolicy":
        """The same policy without a gradient."""
        velocities, x_src = self.velocities.detach(), self.x_src.detach()
        return type(self)(velocities, x_src, self.t_src, self.segment_size, self.shift, self.mode)

# ==== Rollout =====================================================================================
def rollout(policy: Policy, x: Tensor, tau_start: Time, tau_end: Time, shift: float = 1.0,
            total_substeps: int = 128, solver: str = "euler", callback: Callable | None = None,
            through: Tensor | None = None, longest: float | None = None,
            ) -> Tensor | tuple[Tensor, list[Tensor]]:
    """Integrates a policy's ODE from raw time tau_start down to tau_end; no network evaluation.

    Args:
        x: (B, C, *) at tau_start; tau_start and tau_end in [0, 1].
        total_substeps: per unit of tau: a length takes max(1, ceil(length * this)) equal substeps.
        solver: "euler", uniform in tau: the published protocol. "deis", uniform in t^(1/1.5):
            second-order exponential multistep (arXiv 2204.13902). "exact": the policy's `flow`.
        callback: called with (substep, tau (B,), x) at the start and after each substep.
        through: (M, B) raw times on the way, descending, where each sample stops too.
        longest: an upper bound of tau_start - tau_end. Tensor times without it force a device sync,
            which `torch.export` and fullgraph=True refuse.
    Returns: x_end (B, C, *); with `through` (x_end, list of M states).
    Raises: ValueError for an unknown solver, or "exact" without `flow`.
    """
    x = _upcast(x)
    if solver not in ("euler", "deis") and not (solver == "exact" and hasattr(policy, "flow")):
        raise ValueError(f"solver {solver!r}: must be euler, deis, or exact for a policy with flow")
    if isinstance(tau_start, NUMBER) and isinstance(tau_end, NUMBER):
        longest = tau_start - tau_end
    between = [] if through is None else list(through.to(x))
    stops = [_per_sample(tau_start, x), *between, _per_sample(tau_end, x)]
    stops = torch.stack(stops).clamp(min=0)  #                                    (M + 2, B)
    t, reached = _substeps(stops, shift, total_substeps, solver, longest)
    dt = t.diff(dim=0)
    bend = _deis_bends(t) if solver == "deis" else None
    x0_before = 0
    reached = reached.view(*reached.shape, *[1] * (x.ndim - 1))
    states = x.expand(len(between), *x.shape)  #                                  (M, B, C, *)

    if callback:
        callback(0, stops[0], x)
    for i in range(len(dt)):
        if solver == "exact":
            x = policy.flow(x, t[i], t[i + 1])
        else:
            u = policy.velocity(x, t[i])
            x_next = torch.addcmul(x, _expand(dt[i], x), u)  #  x + dt u
            if solver == "deis":  #  x0_hat goes on as it changed in the last substep
                x0 = x0_from_velocity(x, t[i], u)
                x_next = torch.addcmul(x_next, _expand(bend[i], x), x0 - x0_before)
                x0_before = x0
            x = x_next
        if through is not None:
            states = torch.where(reached[i], x, states)
        if callback:
            callback(i + 1, unshift_time(t[i + 1], shift), x)
    return x if through is None else (x, list(states))

def _substeps(stops: Tensor, shift: float, total_substeps: int, solver: str,
              longest: float | None) -> tuple[Tensor, Tensor]:
    """When the solver steps. stops: (M + 2, B) raw times, descending.

    Each sample cuts each gap between its stops into equal substeps of z = tau (Euler) or of
    z = t^(1/1.5) (DEIS: denser near data), and waits at its last stop until the others are there.
    Returns: t (steps + 1, B) noise levels; reached (steps, M, B): does substep i end at stop m + 1?
    """
    if solver == "exact":  #  one step for each gap
        reached = torch.eye(len(stops) - 1, len(stops) - 2, device=stops.device).bool()
        return shift_time(stops, shift), reached[..., None]
    if solver == "euler":
        z = stops
        substeps_per_z = total_substeps
    else:  #  as many in all as Euler takes
        z = shift_time(stops, shift) ** (1 / 1.5)
        in_all = _round_up((stops[0] - stops[-1]) * total_substeps)
        substeps_per_z = in_all / (z[0] - z[-1]).clamp(min=EPS)
    gap = z[:-1] - z[1:]  #                                                       (M + 1, B)
    substeps = _round_up(gap * substeps_per_z)
    arrival = substeps.cumsum(0)  #  substeps from the start to the end of each gap
    departure = arrival - substeps
    if longest is None:
        steps = int(max(arrival[-1].tolist(), default=1))
    else:  #  rounding up adds at most one for each stop on the way
        steps = max(1, math.ceil(longest * total_substeps - 1e-4)) + len(gap) - 1
    i = torch.arange(steps + 1, device=stops.device)[:, None, None]
    done = ((i - departure) / substeps).clamp(0, 1)  #  share of each gap  (steps + 1, M + 1, B)
    z = (z[0] - (gap * done).sum(1)).clamp(min=0)  #                              (steps + 1, B)
    t = z**1.5 if solver == "deis" else shift_time(z, shift)
    return t, arrival[:-1] == i[1:]

def _round_up(substeps: Tensor) -> Tensor:
    """At least 1; forgives rounding: 0.25 of 128 is 32."""
    return (substeps - 1e-4).ceil().clamp(min=1)

def _deis_bends(t: Tensor) -> Tensor:
    """What a change of x0_hat since the last substep adds to an Euler step. t: (steps + 1, B).

    With x0_hat = a + b t, dx/dt = (x - x0_hat)/t has the exact step from t to t'
        x' = x + (t' - t) u + b (t' log(t/t') + t' - t),    b = change / (t - t_before).
    """
    dt = t.diff(dim=0)
    t = t.clamp(min=EPS)
    bend = t[1:] * (t[:-1] / t[1:]).log() + dt
    bend[1:] /= dt[:-1].clamp(max=-1e-4)  #  a tiny substep gives no slope
    bend[:1] = 0  #  the first substep has none before it
    return bend  #                                                                (steps, B)

# ==== pi-ID: imitation distillation ===============================================================
def segment_of(tau: Time, nfe: int, final_step_size_scale: float = 1.0) -> tuple[Time, Time]:
    """The segment of raw time tau, in (0, 1]: tau rounded up to the grid of segment ends.

    nfe segments of 1 / (nfe - 1 + f) each, f = final_step_size_scale > 0; the last is f times that.
    Returns: (tau_src, segment_size), numbers or (B,) as tau is. Raises: ValueError for nfe < 1.
    """
    if nfe < 1:
        raise ValueError(f"nfe = {nfe}: must be at least 1")
    base = 1 / (nfe - 1 + final_step_size_scale)
    i = (1 - tau) / base + 1e-6  #  segments above tau; a tau on the grid starts its own segment
    if isinstance(i, Tensor):
        i = i.floor().clamp(max=nfe - 1)
        is_last = (i == nfe - 1).to(i.dtype)
    else:
        i = min(math.floor(i), nfe - 1)
        is_last = i == nfe - 1
    return 1 - i * base, base * (1 + (final_step_size_scale - 1) * is_last)

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
        teacher_ratio: r, the share of the segment that M Euler steps of the teacher take, between
            rollouts of the detached policy (scheduled trajectory mixing): from 1 to 0 early in
            training, for guidance-distilled teachers.
        window_substeps: the policy's mean velocity over the teacher's step and this micro-window is
            compared, if either is there. DX needs it: 1/t magnifies its velocity's errors.
        dropout: in [0, 1), of the detached policy's components (GMFlow).
        uniforms: ((B, M), (B, M - 1)) in [0, 1) replace the random draws: replays a loss. Or a
            function (tau_src (B,), segment_size (B,)) -> such a pair: query times of one's own.
        batch_teacher: one query of M * B states in place of M of B; not with teacher_ratio.
    Raises: ValueError if the teacher's velocity has another shape than the state.
    """
    x = _upcast(policy.x_src).detach()
    tau = _per_sample(tau_src, x)
    segment = _per_sample(segment_size, x)
    r = teacher_ratio
    detached = policy.detach()
    if dropout:
        detached = detached.dropout(dropout, generator)
    options = {"shift": shift, "total_substeps": total_substeps, "solver": solver}
    options["longest"] = segment_size if isinstance(segment_size, NUMBER) else None

    # 1. When: the teacher is queried at tau_a, and its Euler step ends at tau_b. Rollouts and these
    # steps share the segment less the window: they have covered (1 - r) place and r cuts of it.
    if uniforms is None:
        shapes = (len(x), num_intermediates), (len(x), num_intermediates - 1)
        uniforms = [_draw(torch.rand, shape, x, generator) for shape in shapes]
    if callable(uniforms):
        uniforms = uniforms(tau, segment)
    place, cuts = (draws.to(x).T.sort(0).values for draws in uniforms)  #         (M, B), (M - 1, B)
    zero = torch.zeros_like(tau)[None]
    cuts = torch.cat([zero, cuts, zero + 1])  #                                   (M + 1, B)
    substep = segment / (segment * total_substeps).round().clamp(min=1)
    window = (window_substeps * substep).minimum(segment)
    tau_a = tau - (segment - window) * ((1 - r) * place + r * cuts[:-1])  #       (M, B)
    tau_b = tau - (segment - window) * ((1 - r) * place + r * cuts[1:])  #        (M, B)
    tau_end = tau_b - window
    tau_dst = tau - segment
    t_a, t_b, t_end = (shift_time(v.clamp(min=0), shift) for v in (tau_a, tau_b, tau_end))

    # 2. Where: the detached policy moves the state there, and the teacher gives its velocity.
    with torch.no_grad():
        if r == 0:
            x_dst, x_a = rollout(detached, x, tau, tau_dst, through=tau_a, **options)
            if batch_teacher:
                u_a = [teacher(torch.cat(x_a), t_a.flatten())]
            else:
                u_a = [teacher(x, t) for x, t in zip(x_a, t_a, strict=True)]
        else:  #  trajectory mixing: rollout, Euler step of the teacher, rollout, ...
            x_a = []
            u_a = []
            for i in range(num_intermediates):
                x_a.append(rollout(detached, x, tau, tau_a[i], **options))
                u_a.append(teacher(x_a[i], t_a[i]))
                x = x_a[i] + _expand(t_b[i] - t_a[i], x) * u_a[i]
                tau = tau_b[i]
            x_dst = rollout(detached, x, tau, tau_dst, **options)
        u_teacher = _upcast(torch.cat(u_a))
    _check_shape("velocity of the teacher", u_teacher, torch.cat(x_a))

    # 3. Compare: the policy, with gradient, at the same states.
    if options["longest"]:
        substeps = max(1, round(segment_size * total_substeps))
        options["longest"] = (r + window_substeps / substeps) * segment_size
    u_policy = []
    for i, x in enumerate(x_a):
        u = policy.velocity(x, t_a[i])
        if r > 0 or window_substeps > 0:  #  the mean velocity down to tau_end
            x_end = rollout(policy, x, tau_a[i], tau_end[i], **options)
            mean = (x - x_end) / _expand(t_a[i] - t_end[i], x).clamp(min=EPS)
            short = ((tau_a[i] - tau_end[i]) * total_substeps).round() < 2  #  all rounding error
            u = torch.where(_expand(short, x), u, mean)
        u_policy.append(u)
    u_policy = torch.cat(u_policy)
    loss = (u_policy - u_teacher).square().mean()
    return PiIDLoss(loss, u_policy, u_teacher, t_a.flatten(), x_dst)

def pi_id_data_dependent(student: Student, teacher: Teacher, x_0: Tensor, nfe: int = 1,
                         shift: float = 1.0, final_step_size_scale: float = 1.0,
                         generator: Generator = None, **loss_options) -> PiIDLoss:
    """Algorithm 2: `pi_id_loss` on a random segment; x_src is data x_0 (B, C, *) plus noise.

    For nfe = 1 every segment starts in pure noise: x_0 only supplies the shape.
    """
    x_0 = _upcast(x_0)
    tau = 1 - _draw(torch.rand, (len(x_0),), x_0, generator)  #                   in (0, 1]
    tau_src, segment_size = segment_of(tau if nfe != 1 else 1.0, nfe, final_step_size_scale)
    if final_step_size_scale == 1:
        segment_size = 1 / nfe  #  a number, which forces no device sync
    t_src = _per_sample(shift_time(tau_src, shift), x_0)
    eps = _draw(torch.randn, x_0.shape, x_0, generator)
    x_src = torch.lerp(x_0, eps, _expand(t_src, x_0))  #  (1 - t) x_0 + t eps
    policy = student(x_src, t_src)
    return pi_id_loss(policy, teacher, tau_src, segment_size, shift, generator=generator,
                      **loss_options)  # fmt: skip

def pi_id_data_free(student: Student, teacher: Teacher, noise: Tensor, nfe: int = 1,
                    shift: float = 1.0, final_step_size_scale: float = 1.0,
                    generator: Generator = None, **loss_options) -> Iterator[tuple]:
    """Algorithm 3: `pi_id_loss` on every segment in turn, from noise (B, C, *); no data needed.

    Yields (segment_size, PiIDLoss); the detached policy carries x to the next segment. Call
    (segment_size * out.loss).backward() for each, and then take one optimizer step.
    """
    tau = 1.0
    x_src = _upcast(noise)
    for _ in range(nfe):
        tau_src, segment_size = segment_of(tau, nfe, final_step_size_scale)
        policy = student(x_src, _per_sample(shift_time(tau_src, shift), x_src))
        out = pi_id_loss(policy, teacher, tau_src, segment_size, shift, generator=generator,
                         **loss_options)  # fmt: skip
        yield segment_size, out
        x_src = out.x_dst
        tau = tau_src - segment_size

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
    levels = [*_levels(nfe, shift, final_step_size_scale, h)]
    return FlowMapSchedule(*torch.tensor(levels, dtype=torch.float32).unbind(1))

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
        shift, final_step_size_scale, h: see `flow_map_schedule`.
        temperature: > 0, of GMFlow policies on every step but the last.
        generator: of the noise for h > 0; one, or a list with one for each sample.
        total_substeps, solver, callback: see `rollout`; substeps count from 0 in each segment.
    Returns: x_0 (B, C, *) in the precision of policies. Raises: ValueError for nfe < 1.
    """
    x = _upcast(noise)
    for i, (t_src, t_to, t_dst, m) in enumerate(_levels(nfe, shift, final_step_size_scale, h)):
        policy = student(x, _per_sample(t_src, x))
        if temperature != 1 and i < nfe - 1:
            policy = policy.temperature(temperature)
        tau_src = unshift_time(t_src, shift)
        tau_dst = unshift_time(t_dst, shift)
        x = rollout(policy, x, tau_src, tau_dst, shift, total_substeps, solver, callback)
        if m < 1:
            eps = _draw(torch.randn, x.shape, x, generator)
            x = (1 - t_to + t_to * m) * x + t_to * math.sqrt(1 - m * m) * eps  #  at t_to
    return x
