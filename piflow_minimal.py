"""pi-Flow in one file: policies, rollout, imitation distillation (pi-ID), few-step sampler.

A flow model moves noise to data along dx/dt = u(x, t) and needs a network evaluation for every
step. A pi-Flow student needs one evaluation for *many* steps: its output is a policy, a small
function without a network that gives the velocity at every later time. Equation, algorithm and
section numbers refer to arXiv 2510.14974v3.

    t = 1 is noise, t = 0 is data, x_0 is data.

    paper         here             shape            meaning
    t             t                (B,)             noise level; x_t = (1 - t) x_0 + t eps
    alpha, sigma  1 - t, t         (B,)
    tau           tau              (B,)             raw time; substeps are uniform in tau
    s             shift            float            t = s tau / (1 + (s - 1) tau)
    x_t           x                (B, C, *)        state; any number of spatial dims, also none
    u             u, velocity      (B, C, *)        dx/dt = eps - x_0, hence x_0 = x - t u
    x_src, t_src  x_src, t_src     (B, C, *), (B,)  where the network was evaluated
    pi(x, t)      policy.velocity  (B, C, *)        network-free velocity, for every t <= t_src
    A, mu, s      GaussianMixture  (B, K, ...)      K components per location, in velocity space
    x0_hat        DXPolicy.x0_hat  (B, C, *)        denoised state at tau, from N grid points

A *teacher* is any callable (x, t) -> u. A *student* is any callable (x_src, t_src) -> policy. The
caller closes over labels, prompts and guidance: nothing below knows what network is behind.
Policies compute in float32 whatever the network's dtype (float64 stays float64).

Reading order: time, policies (GMFlow, DX), rollout, guidance, pi-ID, sampler.
`python piflow_minimal.py` checks the chain on an exactly known density in two seconds.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-6  # the smallest t, and the smallest denominator, that anything here divides by

Time = float | Tensor  # a float for the whole batch, or a tensor of shape (B,)
Teacher = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> u
Callback = Callable[[int, Tensor, Tensor], None]  # (substep, tau, x)


# ==== Time ========================================================================================


def shift_time(tau: Time, shift: float = 1.0) -> Time:
    """Raw time tau in [0, 1] -> noise level t in [0, 1]; shift > 1 spends more steps near noise."""
    return shift * tau / (1 + (shift - 1) * tau)


def unshift_time(t: Time, shift: float = 1.0) -> Time:
    """Noise level t in [0, 1] -> raw time tau in [0, 1]; the inverse of `shift_time`."""
    return t / (shift + (1 - shift) * t)


def x0_from_velocity(x: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """The denoised state that a velocity points at, x_0 = x - t u. x, u: (B, C, *); t: (B,)."""
    return x - _expand(t, x) * u


def velocity_from_x0(x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """The velocity that leads from x to a denoised state, u = (x - x_0) / t. t at least EPS."""
    return (x - x0) / _expand(t, x).clamp(min=EPS)


def _expand(t: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, ...) with as many dims as x, so that it broadcasts."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def _wide(x: Tensor) -> Tensor:
    """The precision of policies: float32, or float64 for float64 inputs."""
    return x if x.dtype == torch.float64 else x.float()


def _batch(value: Time, x: Tensor, name: str) -> Tensor:
    """A time, float or tensor, -> (B,) tensor beside x. ValueError unless it lies in [0, 1]."""
    low, high = -EPS, 1 + EPS  # rounding is forgiven
    if not isinstance(value, Tensor):
        _require(low <= value <= high, f"{name} = {value}: must lie in [0, 1]")
        value = min(max(float(value), 0.0), 1.0)
        return torch.full((len(x),), value, dtype=_wide(x).dtype, device=x.device)
    fits = value.ndim == 0 or value.shape == (len(x),)
    _require(fits, f"{name} has shape {tuple(value.shape)}: must be a float or ({len(x)},)")
    if _readable(value):
        inside = bool(((value >= low) & (value <= high)).all())
        _require(inside, f"{name} = {value.tolist()}: must lie in [0, 1]")
    return value.to(x.device, _wide(x).dtype).clamp(0, 1).expand(len(x))


def _readable(x: Tensor) -> bool:
    """True where looking at a value costs nothing; on a GPU the host would have to wait for it."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _random(draw: Callable, shape, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """torch.rand or torch.randn on the generator's device, moved beside `like`."""
    device = like.device if generator is None else generator.device
    return draw(shape, generator=generator, device=device, dtype=_wide(like).dtype).to(like.device)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


# ==== Policies (section 3) ========================================================================


class GaussianMixture(NamedTuple):
    """A mixture of K isotropic Gaussians over the velocity, at every location of a sample."""

    means: Tensor  #      (B, K, C, *)
    logstds: Tensor  #    (B, 1, 1, *ones)  one per sample
    logweights: Tensor  # (B, K, 1, *)      log A_k; need not be normalised


@dataclass(frozen=True, eq=False)
class GMFlowPolicy:
    """The GMFlow policy: a Gaussian-mixture posterior over x_0, carried along by Bayes' rule.

    At (x_src, t_src) the network gives p(x_0 | x_src). Divided by the likelihood of x_src and
    multiplied by that of x it becomes p(x_0 | x) at any later (x, t), again a mixture; the policy
    is its mean, as a velocity (section 3, eq. 21 to 28, appendix F). Per location this is
    attention: the query is made of x, keys and values are the component means.

    Args:
        mixture: `GaussianMixture` over velocities.
        x_src: (B, C, *), where the network was evaluated; t_src: its noise level, in (0, 1].
    Raises: ValueError if shapes do not fit together or t_src is out of range.
    """

    mixture: GaussianMixture
    x_src: Tensor
    t_src: Time

    def __post_init__(self):
        means, logstds, logweights = (_wide(part) for part in self.mixture)
        x_src, b, k = _wide(self.x_src), len(means), means.shape[1]
        _require(
            means.shape == (len(x_src), k, *x_src.shape[1:])
            and logweights.shape == (b, k, 1, *x_src.shape[2:])
            and logstds.numel() == b,
            f"means {tuple(means.shape)}, logweights {tuple(logweights.shape)}, logstds "
            f"{tuple(logstds.shape)}, x_src {tuple(x_src.shape)}: must be (B, K, C, *), "
            "(B, K, 1, *), (B, 1, 1, *ones), (B, C, *)",
        )
        t_src = _batch(self.t_src, x_src, "t_src")
        t, x = t_src.view(b, 1, 1), x_src.reshape(*x_src.shape[:2], -1)  #        (B, C, P)
        m = x[:, None] - t[:, None] * means.reshape(b, k, x.shape[1], -1)  #      (B, K, C, P)
        center = m.detach().mean(1)
        m = m - center[:, None]
        precision = (1 - t) / t.clamp(min=EPS) ** 2  #     alpha_src / t_src^2    (B, 1, 1)
        self.__dict__.update(  # what depends on the source alone; P = all spatial dims in one
            t_src=t_src,
            _center=center,  #                                                    (B, C, P)
            _means=[m_c.contiguous() for m_c in m.unbind(2)],  #              C x (B, K, P)
            _half_norm=m.square().sum(2) / 2,  #                                  (B, K, P)
            _logweights=logweights.reshape(b, k, -1),  #                          (B, K, P)
            _var=(t * logstds.reshape(b, 1, 1).exp()) ** 2,  #                    (B, 1, 1)
            _zeta_src=(1 - t) * precision,  #                                     (B, 1, 1)
            _query_src=precision * (x - (1 - t) * center),  #                     (B, C, P)
        )

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """pi(x, t), eq. 21 to 28. x: (B, C, *); t: float or (B,), at most t_src. -> (B, C, *).

            zeta = (alpha/t)^2 - (alpha_src/t_src)^2
            nu   = alpha x/t^2 - alpha_src x_src/t_src^2,    d = 1 + var zeta
            w_k  = softmax_k( log A_k + m_k . (nu - zeta m_k/2) / d )
            x_0  = (var nu + sum_k w_k m_k) / d,             pi = (x - x_0) / t

        Means and states are measured from one center c, which shifts nu to nu - zeta c (`query`
        is that over d) and leaves the result as it is; and in the last line what cancels as t -> 0
        is cancelled on paper. Both keep float32 exact where zeta is huge.
        """
        t = _batch(t, x, "t") if not isinstance(t, Tensor) else t
        t = t.reshape(-1, 1, 1).clamp(min=EPS)
        ratio = (1 - t) / t  #                             alpha / t              (B, 1, 1)
        zeta = ratio**2 - self._zeta_src
        d = (1 + self._var * zeta).clamp(min=EPS)
        y = _wide(x).reshape(*x.shape[:2], -1) - self._center  #                  (B, C, P)
        rest = torch.addcmul(self._query_src, ratio, self._center, value=-1)
        query = (ratio / t * y - rest) / d

        # Channel by channel: no (B, K, C, P) tensor is made, and every line is one kernel.
        logits = torch.addcmul(self._logweights, zeta / d, self._half_norm, value=-1)  # (B, K, P)
        for m_c, query_c in zip(self._means, query.unbind(1), strict=True):
            logits.addcmul_(m_c, query_c[:, None])
        w = torch.softmax(logits, dim=1)
        mean = torch.stack([(w * m_c).sum(1) for m_c in self._means], dim=1)  #   (B, C, P)

        factor = 1 - self._var * (self._zeta_src + ratio)
        return ((factor * y + self._var * rest - mean) / (d * t)).reshape(x.shape)

    def detach(self) -> "GMFlowPolicy":
        """The same policy without a gradient."""
        mixture = GaussianMixture(*(part.detach() for part in self.mixture))
        return replace(self, mixture=mixture, x_src=self.x_src.detach())

    def drop(self, mask: Tensor) -> "GMFlowPolicy":
        """Without the components where mask, (B, K) bool, is True; the other weights grow.

        Raises: ValueError for another shape or dtype, or (on a CPU) if a sample would lose all.
        """
        means, logstds, logweights = self.mixture
        fits = mask.dtype == torch.bool and mask.shape == means.shape[:2]
        _require(fits, f"mask {mask.dtype} {tuple(mask.shape)}: must be bool (B, K)")
        if _readable(mask):
            _require(not bool(mask.all(1).any()), "mask drops all components of a sample")
        mask = mask.reshape(*mask.shape, *[1] * (means.ndim - 2))
        logweights = logweights.masked_fill(mask, -math.inf).log_softmax(1)
        return replace(self, mixture=GaussianMixture(means, logstds, logweights))

    def dropout(self, p: float, generator: torch.Generator | None = None) -> "GMFlowPolicy":
        """Drops each component, for the whole sample, with probability p in [0, 1).

        Never all of them: the component with the largest draw stays.
        """
        _require(0 <= p < 1, f"dropout p = {p}: must lie in [0, 1)")
        draws = _random(torch.rand, self.mixture.means.shape[:2], self.x_src, generator)  # (B, K)
        return self.drop((draws < p) & (draws < draws.amax(1, keepdim=True)))

    def temperature(self, T: float) -> "GMFlowPolicy":
        """Sharper for T < 1: weights A_k^(1/T) renormalised, variance times T. T > 0."""
        _require(T > 0, f"temperature T = {T}: must be positive")
        means, logstds, logweights = self.mixture
        logweights = (logweights / T).log_softmax(1)
        return replace(self, mixture=GaussianMixture(means, logstds + math.log(T) / 2, logweights))


@dataclass(frozen=True, eq=False)
class DXPolicy:
    """The DX policy: N denoised states on a grid of tau, interpolated (section 3).

    The N velocities v_i that the network gives at (x_src, t_src) are read as denoised states
    x_src - t_src v_i, and pi(x, t) = (x - x0_hat(tau)) / t.
    mode="grid": they sit at equal distances of tau on [tau_src - segment_size, tau_src] (clamped
        at 0), the first at the segment's end, the last at tau_src; x0_hat is linear between them
        and constant outside. N = 1 is a constant x0_hat.
    mode="polynomial": x0_hat(tau) = sum_i (tau_src - tau)^i (x_src - t_src v_i), i from 0.

    Args:
        velocities: (B, N, C, *), N >= 1; x_src, t_src: as for `GMFlowPolicy`.
        segment_size: float or (B,) in [0, 1], the segment it was trained for, in tau; it and
            `shift` belong to the policy and stay when a sampler takes other steps.
    Raises: ValueError if shapes do not fit together, a range is left, or the mode is unknown.
    """

    velocities: Tensor
    x_src: Tensor
    t_src: Time
    segment_size: Time = 1.0
    shift: float = 1.0
    mode: str = "grid"

    def __post_init__(self):
        v, x_src = _wide(self.velocities), _wide(self.x_src)
        fits = v.ndim == x_src.ndim + 1 and (len(v), *v.shape[2:]) == tuple(x_src.shape)
        shapes = f"velocities {tuple(v.shape)}, x_src {tuple(x_src.shape)}"
        _require(fits and v.shape[1] > 0, f"{shapes}: must be (B, N, C, *) with N >= 1, (B, C, *)")
        known = self.mode in ("grid", "polynomial")
        _require(known, f"mode {self.mode!r}: must be 'grid' or 'polynomial'")
        t_src = _batch(self.t_src, x_src, "t_src")
        tau_src = unshift_time(t_src, self.shift)
        tau_end = (tau_src - _batch(self.segment_size, x_src, "segment_size")).clamp(min=0)
        x0 = x_src[:, None] - _expand(t_src, v) * v
        self.__dict__.update(t_src=t_src, _x0=x0, _tau_src=tau_src, _tau_end=tau_end)

    def x0_hat(self, t: Time) -> Tensor:
        """The denoised state at noise level t, float or (B,). -> (B, C, *)."""
        t = torch.full_like(self._tau_src, t) if not isinstance(t, Tensor) else t
        tau, n = unshift_time(t, self.shift), self._x0.shape[1]
        if self.mode == "polynomial":
            distance, x0 = _expand(self._tau_src - tau, self.x_src), self._x0[:, -1]
            for i in range(n - 2, -1, -1):  # Horner's rule
                x0 = self._x0[:, i] + distance * x0
            return x0
        length = (self._tau_src - self._tau_end).clamp(min=EPS)
        position = ((tau - self._tau_end) / length).clamp(0, 1) * (n - 1)  #  in 0 .. N-1   (B,)
        left = position.floor().long().clamp(max=max(n - 2, 0))
        right = (left + 1).clamp(max=n - 1)
        b = torch.arange(len(left), device=left.device)
        fraction = _expand(position - left, self.x_src)
        return torch.lerp(self._x0[b, left], self._x0[b, right], fraction)

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """pi(x, t) = (x - x0_hat(t)) / t. x: (B, C, *); t: float or (B,), at most t_src."""
        t = torch.full_like(self._tau_src, t) if not isinstance(t, Tensor) else t
        return velocity_from_x0(_wide(x), t, self.x0_hat(t))

    def flow(self, x: Tensor, t: Tensor, t_end: Tensor) -> Tensor:
        """Follows a grid policy from t to t_end exactly. x: (B, C, *); t, t_end: (B,).

        dx/dt = (x - x0_hat)/t is d(x/t)/dt = -x0_hat/t^2. Where x0_hat = a + b tau,
            integral of x0_hat/t^2 dt over [t_1, t_2] = a (1/t_1 - 1/t_2) + b/s log(tau_2/tau_1)
        since dt/t^2 = dtau/(s tau^2). Piece by piece this gives one weight per grid point.
        """
        t, t_end, n = t.clamp(min=EPS), t_end.clamp(min=EPS), self._x0.shape[1]
        length = self._tau_src - self._tau_end
        steps = torch.linspace(0, 1, n, device=x.device, dtype=length.dtype)
        knots = self._tau_end + length * steps[:, None]  #                        (N, B)
        edges = torch.cat([torch.zeros_like(knots[:1]), knots, torch.ones_like(knots[:1])])
        tau, tau_end = unshift_time(t, self.shift), unshift_time(t_end, self.shift)
        edges = torch.maximum(torch.minimum(edges, tau), tau_end)  #   constant, linear.., constant
        low, high = edges[:-1], edges[1:]  #                                      (N + 1, B)
        area = t_end / shift_time(low, self.shift) - t_end / shift_time(high, self.shift)
        moment = t_end / self.shift * (high / low).log()  #  t_end times integrals of 1/t^2, tau/t^2
        spacing = (length / max(n - 1, 1)).clamp(min=EPS)
        slope = (moment[1:-1] - knots[:-1] * area[1:-1]) / spacing  #             (N - 1, B)
        weights = torch.zeros_like(knots)  #                                      (N, B)
        weights[0] += area[0]
        weights[:-1] += area[1:-1] - slope
        weights[1:] += slope
        weights[-1] += area[-1]
        weights = weights.T.reshape(*self._x0.shape[:2], *[1] * (x.ndim - 1))
        return _expand(t_end / t, x) * _wide(x) + (weights * self._x0).sum(1)

    def detach(self) -> "DXPolicy":
        """The same policy without a gradient."""
        return replace(self, velocities=self.velocities.detach(), x_src=self.x_src.detach())


# Anything with x_src, t_src, velocity(x, t) and detach() will do.
Policy = GMFlowPolicy | DXPolicy
Student = Callable[[Tensor, Tensor], Policy]  # (x_src, t_src) -> policy


# ==== Rollout =====================================================================================


def rollout(
    policy: Policy, x: Tensor, tau_start: Time, tau_end: Time, shift: float = 1.0,
    total_substeps: int = 128, solver: str = "euler", callback: Callback | None = None,
    compile: bool = False,
) -> Tensor:  # fmt: skip
    """Follows a policy from raw time tau_start down to tau_end; no network (Algorithm 1).

    Takes max(1, ceil((tau_start - tau_end) * total_substeps)) equal steps of tau. Samples may have
    different times; each stops at its own. Tensor times cost one host read, floats none.

    Args:
        x: (B, C, *) at tau_start.
        tau_start, tau_end: float or (B,) in [0, 1], tau_end <= tau_start.
        total_substeps: substeps per unit of tau, at least 1.
        solver: "euler", the published protocol; "ab2", two-step Adams-Bashforth in t, of second
            order at the same cost; "exact", the closed form of a DX grid policy, in one step.
        callback: called with (substep, tau (B,), x): first 0 and the start, then after each step.
        compile: `velocity` through torch.compile, about twice as fast after some seconds of
            compilation; without a working compiler a warning, and eager all the same.
    Returns: (B, C, *) at tau_end.
    Raises: ValueError for times out of range or order, or a solver that the policy lacks.
    """
    start, end = _batch(tau_start, x, "tau_start"), _batch(tau_end, x, "tau_end")
    length, ordered = None, True  # length: of the longest way, where the host knows it
    if not isinstance(tau_start, Tensor) and not isinstance(tau_end, Tensor):
        length, ordered = tau_start - tau_end, tau_end <= tau_start + EPS
    elif _readable(start) and _readable(end):
        ordered = bool((end <= start + EPS).all())
    _require(ordered, f"tau_end = {tau_end} lies above tau_start = {tau_start}: time runs down")
    waypoints = torch.stack([start, end])
    options = (shift, total_substeps, solver, length, callback, compile)
    return _walk(policy, x, waypoints, *options)[-1]


def _walk(
    policy: Policy, x: Tensor, waypoints: Tensor, shift: float, total_substeps: int,
    solver: str, length: float | None, callback: Callback | None = None, compile: bool = False,
) -> list[Tensor]:  # fmt: skip
    """One pass from waypoints[0] to waypoints[P], (P + 1, B). -> the P states at waypoints 1 .. P.

    length: an upper bound of waypoints[0] - waypoints[P], or None and the host reads it.
    """
    _require(total_substeps >= 1, f"total_substeps = {total_substeps}: must be at least 1")
    _require(solver in ("euler", "ab2", "exact"), f"solver {solver!r}: use euler, ab2 or exact")
    if solver == "exact":
        fits = isinstance(policy, DXPolicy) and policy.mode == "grid"
        _require(fits, "solver 'exact': for DX policies of mode 'grid' only")
        total_substeps = 1
    tau, arrival = _substep_grid(waypoints, total_substeps, length)
    t = shift_time(tau, shift)  #                                                 (steps + 1, B)
    dt = t.diff(dim=0)
    x, u_before = _wide(x), None
    fast = compile and solver != "exact"  # which takes one step, and no velocity
    velocity = _compiled(policy, x, t[0]) if fast else policy.velocity
    states = [x] * (len(arrival) - 1)
    if callback:
        callback(0, tau[0], x)
    for i in range(len(dt)):
        if solver == "exact":
            x = policy.flow(x, t[i], t[i + 1])
        else:
            u = slope = velocity(x, t[i])
            if solver == "ab2" and i > 0:
                # Adams-Bashforth: u extrapolated to the middle of the step. A step much longer
                # than the one before it (behind a waypoint) would magnify rounding: hence 4.
                before = dt[i - 1].masked_fill(dt[i - 1] == 0, -math.inf)
                slope = u + _expand((dt[i] / before).clamp(0, 4) / 2, x) * (u - u_before)
            x, u_before = torch.addcmul(x, _expand(dt[i], x), slope), u
        for p in range(len(states)):
            states[p] = torch.where(_expand(arrival[p] == i + 1, x), x, states[p])
        if callback:
            callback(i + 1, tau[i + 1], x)
    return [*states, x]


_compile = lru_cache(torch.compile)  # one compiled function per kind of policy


def _compiled(policy: Policy, x: Tensor, t: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """policy.velocity, compiled; as it is, with a warning, where that does not work."""
    velocity = partial(_compile(type(policy).velocity), policy)
    try:
        velocity(x, t)
    except Exception as error:  # every backend has exceptions of its own
        reason = str(error).strip().split("\n")[0]
        warnings.warn(f"torch.compile does not work here, going on without: {reason}", stacklevel=4)
        return policy.velocity
    return velocity


def _substep_grid(
    waypoints: Tensor, total_substeps: int, length: float | None
) -> tuple[Tensor, Tensor]:
    """Times of all substeps (steps + 1, B), and the substeps (P, B) that end at waypoints 1 .. P.

    Each sample takes equal steps of tau between its waypoints; one that has arrived stays there.
    """
    n = _substeps(waypoints[:-1] - waypoints[1:], total_substeps)  #              (P, B)
    arrival = n.cumsum(0)
    if length is None:
        steps = int(arrival[-1].max())
    else:
        steps = _substeps(length, total_substeps) + len(n) - 1
    i = torch.arange(steps + 1, device=n.device)[:, None]  #                      (steps + 1, 1)
    p = (i[:, None] >= arrival).sum(1).clamp(max=len(n) - 1)  #  stretch of each  (steps + 1, B)
    fraction = ((i - (arrival - n).gather(0, p)) / n.gather(0, p)).clamp(max=1)
    tau = torch.lerp(waypoints.gather(0, p), waypoints.gather(0, p + 1), fraction)
    tau[-1] = waypoints[-1]
    return tau, arrival


def _substeps(length: Time, total_substeps: int):
    """How many substeps a stretch of tau takes; 0.25 of 128 is 32, whatever rounding says."""
    n = length * total_substeps - 1e-4
    return n.ceil().clamp(min=1) if isinstance(n, Tensor) else max(1, math.ceil(n))


# ==== Teacher guidance ============================================================================


def guided_velocity(
    u_cond: Tensor, u_uncond: Tensor, scale: float, t: Time,
    interval: tuple[float, float] = (0.0, 1.0), x: Tensor | None = None, orthogonal: float = 0.0,
) -> Tensor:  # fmt: skip
    """Classifier-free guidance of a teacher within an interval of noise levels.

    u = u_cond + (scale - 1)(u_cond - u_uncond) where interval[0] <= t <= interval[1], else u_cond.
    orthogonal in [0, 1] takes away that share of the correction's component along the conditional
    x_0 estimate (projection over all dims of a sample).

    Args: u_cond, u_uncond: (B, C, *); t: float or (B,); x: (B, C, *), needed if orthogonal > 0.
    Raises: ValueError if x is missing or t is out of range.
    """
    t = _batch(t, u_cond, "t")
    correction = (scale - 1) * (u_cond - u_uncond)
    if orthogonal:
        _require(x is not None, "x is missing: orthogonal guidance needs the state")
        x0, dims = x0_from_velocity(x, t, u_cond), tuple(range(1, u_cond.ndim))
        along = (correction * x0).sum(dims) / x0.square().sum(dims).clamp(min=EPS)  #  (B,)
        correction = correction - orthogonal * _expand(along, x0) * x0
    inside = _expand((t >= interval[0]) & (t <= interval[1]), u_cond)
    return u_cond + torch.where(inside, correction, 0.0)


# ==== pi-ID: imitation distillation ===============================================================


class PiIDLoss(NamedTuple):
    """What `pi_id_loss` returns. M intermediates of B samples: sample b of m is row m * B + b."""

    loss: Tensor  #       scalar, mean squared error
    u_policy: Tensor  #   (M * B, C, *)
    u_teacher: Tensor  #  (M * B, C, *)
    t: Tensor  #          (M * B,)  noise levels of the comparison
    x_dst: Tensor  #      (B, C, *) where the detached policy ended the segment


def pi_id_loss(
    policy: Policy, teacher: Teacher, tau_src: Time, segment_size: Time, shift: float = 1.0,
    total_substeps: int = 128, num_intermediates: int = 2, teacher_ratio: float = 0.0,
    window_substeps: int = 0, dropout: float = 0.0,
    uniforms: tuple[Tensor, Tensor] | None = None, generator: torch.Generator | None = None,
    solver: str = "euler", one_call: bool = False,
) -> PiIDLoss:  # fmt: skip
    """On-policy imitation of the teacher over one segment of raw time (Algorithm 1).

    The detached policy walks from (policy.x_src, tau_src) to M random times of the segment
    [tau_src - segment_size, tau_src]. There the teacher is asked for its velocity, and the policy,
    with gradient, for its own. No gradient reaches the walk or the teacher.

    Args:
        policy, teacher: see the module; the teacher is called M times with B states, see one_call.
        tau_src, segment_size: float or (B,) in [0, 1]. A tensor segment_size costs host reads.
        total_substeps, solver: of the walk, see `rollout`.
        num_intermediates: M >= 1.
        teacher_ratio: in [0, 1], the share of the segment that teacher steps walk ("scheduled
            trajectory mixing", for guidance-distilled teachers: from 1 to 0 early in training).
        window_substeps: >= 0; compares the policy's mean velocity over this micro-window instead
            of its velocity at a point. DX needs it: there (x - x0_hat)/t magnifies errors of x.
        dropout: of components, on the walking policy only (GMFlow), in [0, 1).
        uniforms: ((B, M), (B, M - 1)) in [0, 1), replaces the random draws: replays a loss.
        one_call: asks the teacher once, with all M * B states; its labels must repeat. Faster
            where a batch is too small for the device. For teacher_ratio = 0.
    Raises: ValueError for arguments out of range.
    """
    x, M, S, r = _wide(policy.x_src).detach(), num_intermediates, total_substeps, teacher_ratio
    _require(M >= 1, f"num_intermediates = {M}: must be at least 1")
    _require(0 <= r <= 1, f"teacher_ratio = {r}: must lie in [0, 1]")
    _require(window_substeps >= 0, f"window_substeps = {window_substeps}: must not be negative")
    _require(not (one_call and r), f"teacher_ratio = {r}: must be 0 with one_call")
    drops = dropout == 0 or isinstance(policy, GMFlowPolicy)
    _require(drops, f"dropout = {dropout}: for GMFlow policies only")

    tau, segment = _batch(tau_src, x, "tau_src"), _batch(segment_size, x, "segment_size")
    substep = segment / (segment * S).round().clamp(min=1)
    window = torch.minimum(window_substeps * substep, segment)
    if uniforms is None:
        uniforms = [_random(torch.rand, (len(x), n), x, generator) for n in (M, M - 1)]
    by_student, by_teacher = (u.to(x).T.sort(0).values for u in uniforms)  #  (M, B), (M - 1, B)
    zero, one = torch.zeros_like(tau)[None], torch.ones_like(tau)[None]
    walked = (1 - r) * (segment - window) * by_student.diff(dim=0, prepend=zero)  #     (M, B)
    jumped = r * (segment - window) * torch.cat([zero, by_teacher, one]).diff(dim=0)  # (M, B)
    tau_b = (tau - (walked + jumped).cumsum(0)).clamp(min=0)  #  behind the teacher's step
    tau_a = torch.minimum(tau_b + jumped, tau)  #                where teacher and policy are asked
    tau_w = (tau_b - window).clamp(min=0)  #                     where the window ends
    tau_dst = (tau - segment).clamp(min=0)
    t_a, t_b, t_w = (shift_time(tau_m, shift) for tau_m in (tau_a, tau_b, tau_w))

    def bound(share: float, windows: int = 0) -> float | None:
        """Upper bound of a stretch's length, so that no loop below has to ask the device."""
        if isinstance(segment_size, Tensor):
            return None
        one_window = window_substeps * segment_size / max(1, round(segment_size * S))
        return share * segment_size + windows * one_window

    with torch.no_grad():
        actor = policy.detach()
        actor = actor.dropout(dropout, generator) if dropout else actor
        if r == 0:  # the policy walks alone: one pass through all intermediate times
            waypoints = torch.cat([tau[None], tau_a, tau_dst[None]])
            *states, x_dst = _walk(actor, x, waypoints, shift, S, solver, bound(1))
            asked = zip(states, t_a, strict=True)
            if one_call:
                asked = [(torch.cat(states), t_a.flatten())]
            targets = [_wide(teacher(x_a, t)) for x_a, t in asked]
        else:  # in turns: the policy walks to tau_a, one Euler step of the teacher leads to tau_b
            states, targets, tau_before = [], [], tau
            for m in range(M):
                waypoints = torch.stack([tau_before, tau_a[m]])
                (x_a,) = _walk(actor, x, waypoints, shift, S, solver, bound(1 - r))
                states.append(x_a)
                targets.append(_wide(teacher(x_a, t_a[m])))
                x = x_a + _expand(t_b[m] - t_a[m], x) * targets[m]
                tau_before = tau_b[m]
            waypoints = torch.stack([tau_before, tau_dst])
            (x_dst,) = _walk(actor, x, waypoints, shift, S, solver, bound(1 - r, 1))

    predictions = [policy.velocity(x_a, t) for x_a, t in zip(states, t_a, strict=True)]
    if window_substeps or r:  # mean velocity over [tau_w, tau_a], where that is 2 substeps or more
        for m, x_a in enumerate(states):
            waypoints = torch.stack([tau_a[m], tau_w[m]])
            (x_w,) = _walk(policy, x_a, waypoints, shift, S, solver, bound(r, 1))
            mean_velocity = (x_a - x_w) / _expand(t_a[m] - t_w[m], x).clamp(min=EPS)
            short = ((tau_a[m] - tau_b[m] + window) * S).round() < 2
            predictions[m] = torch.where(_expand(short, x), predictions[m], mean_velocity)

    u_policy, u_teacher = torch.cat(predictions), torch.cat(targets)  #           (M * B, C, *)
    loss = (u_policy - u_teacher).square().mean()
    return PiIDLoss(loss, u_policy, u_teacher, t_a.flatten(), x_dst)


def segment_of(tau: Time, nfe: int, final_step_size_scale: float = 1.0) -> tuple[Time, Time]:
    """The segment that contains raw time tau: tau rounded up to the grid of segment ends.

    There are nfe segments, each 1 / (nfe - 1 + f) long with f = final_step_size_scale, the last
    one f times that. tau: float or (B,) in (0, 1]. Returns (tau_src, segment_size), as tau is.
    Raises: ValueError for nfe < 1 or f <= 0.
    """
    f = final_step_size_scale
    _require(nfe >= 1, f"nfe = {nfe}: must be at least 1")
    _require(f > 0, f"final_step_size_scale = {f}: must be positive")
    base = 1 / (nfe - 1 + f)
    i = (1 - tau) / base + 1e-6  # segments above tau; a tau on the grid starts its own segment
    i = i.floor().clamp(max=nfe - 1) if isinstance(i, Tensor) else min(math.floor(i), nfe - 1)
    return 1 - i * base, base * (1 + (f - 1) * (i == nfe - 1))


def pi_id_data_dependent(
    student: Student, teacher: Teacher, x_0: Tensor, nfe: int = 1, shift: float = 1.0,
    final_step_size_scale: float = 1.0, generator: torch.Generator | None = None, **loss_options,
) -> PiIDLoss:  # fmt: skip
    """Algorithm 2: the loss on a random segment, whose start x_src is data plus noise.

    For nfe = 1 every segment starts at t = 1 in pure noise: x_0 gives but the shape, and
    distillation needs no data. x_0: (B, C, *). loss_options: of `pi_id_loss`.
    """
    tau_src, segment_size = 1.0, 1.0
    if nfe > 1:
        tau = 1 - _random(torch.rand, (len(x_0),), x_0, generator)  #             in (0, 1]
        tau_src, segment_size = segment_of(tau, nfe, final_step_size_scale)
        if final_step_size_scale == 1:
            segment_size = 1 / nfe  # as a float it costs no host read
    eps = _random(torch.randn, x_0.shape, x_0, generator)
    t_src = _batch(shift_time(tau_src, shift), x_0, "t_src")
    x_src = torch.lerp(_wide(x_0), eps, _expand(t_src, x_0))  #  (1 - t) x_0 + t eps
    policy, draws = student(x_src, t_src), {"generator": generator}
    return pi_id_loss(policy, teacher, tau_src, segment_size, shift, **draws, **loss_options)


def pi_id_data_free(
    student: Student, teacher: Teacher, noise: Tensor, nfe: int = 1, shift: float = 1.0,
    final_step_size_scale: float = 1.0, generator: torch.Generator | None = None, **loss_options,
) -> Iterator[tuple[float, PiIDLoss]]:  # fmt: skip
    """Algorithm 3: from noise through every segment in turn; no data at any nfe.

    Yields (segment_size, PiIDLoss) for each segment; the detached policy carries x to the next.
        for weight, out in pi_id_data_free(...):
            (weight * out.loss).backward()      # and then one optimizer step
    noise: (B, C, *). loss_options: of `pi_id_loss`.
    """
    tau, x_src = 1.0, _wide(noise)
    for _ in range(nfe):
        tau_src, segment_size = segment_of(tau, nfe, final_step_size_scale)
        t_src = _batch(shift_time(tau_src, shift), x_src, "t_src")
        policy, draws = student(x_src, t_src), {"generator": generator}
        out = pi_id_loss(policy, teacher, tau_src, segment_size, shift, **draws, **loss_options)
        yield segment_size, out
        tau, x_src = tau_src - segment_size, out.x_dst


# ==== Sampler =====================================================================================


class FlowMapSchedule(NamedTuple):
    """Levels of the few-step sampler, one entry for each network evaluation, all (nfe,)."""

    t_src: Tensor  # where the network is evaluated
    t_to: Tensor  #  the next level, 0 at the end
    t_dst: Tensor  # where the policy is followed to; noise is added from there to t_to
    m: Tensor  #     the share of the old noise that is kept, 1 is deterministic


def flow_map_schedule(
    nfe: int, shift: float = 1.0, final_step_size_scale: float = 1.0, h: float = 0.0
) -> FlowMapSchedule:
    """Source levels uniform in tau, from 1 with step 1 / (nfe - 1 + f), then shifted.

    With stochasticity h > 0 (inf: full) a step goes on to t_dst < t_to and returns to t_to by
    fresh noise:
        m = (t_to alpha_src / (t_src alpha_to))^(h^2),    t_dst = t_to m / (alpha_to + t_to m)
    Raises: ValueError for nfe < 1, f = final_step_size_scale <= 0 or h < 0.
    """
    columns = zip(*_levels(nfe, shift, final_step_size_scale, h), strict=True)
    return FlowMapSchedule(*(torch.tensor(column) for column in columns))


def _levels(nfe: int, shift: float, f: float, h: float) -> list[tuple[float, float, float, float]]:
    """(t_src, t_to, t_dst, m) of each step as Python floats: the sampler asks no device."""
    _require(h >= 0, f"h = {h}: must not be negative")
    tau, levels = 1.0, []
    for i in range(max(nfe, 1)):
        tau_src, segment_size = segment_of(tau, nfe, f)
        tau = tau_src - segment_size if i < nfe - 1 else 0.0
        t_src, t_to = shift_time(tau_src, shift), shift_time(tau, shift)
        m = (t_to * (1 - t_src) / (t_src * (1 - t_to))) ** (h * h)
        levels.append((t_src, t_to, t_to * m / (1 - t_to + t_to * m), m))
    return levels


@torch.no_grad()
def sample(
    student: Student, noise: Tensor, nfe: int = 1, shift: float = 1.0,
    final_step_size_scale: float = 1.0, h: float = 0.0, temperature: float = 1.0,
    total_substeps: int = 128, generator: torch.Generator | None = None, solver: str = "euler",
    callback: Callback | None = None, compile: bool = False,
) -> Tensor:  # fmt: skip
    """Few-step sampling: nfe calls of the student, and policies between them.

    Args:
        noise: (B, C, *), the state at t = 1.
        nfe: >= 1; may exceed the number that was trained ("elastic inference").
        shift, final_step_size_scale, h: see `flow_map_schedule`.
        temperature: > 0, of GMFlow policies on every step but the last.
        generator: of the noise that h > 0 adds.
        total_substeps, solver, callback, compile: see `rollout`; substeps count from 0 in each
            segment.
    Returns: x_0 (B, C, *), in the precision of policies.
    Raises: ValueError for arguments out of range, or if the result is not finite.
    """
    x = _wide(noise)
    for i, (t_src, t_to, t_dst, m) in enumerate(_levels(nfe, shift, final_step_size_scale, h)):
        policy = student(x, _batch(t_src, x, "t_src"))
        if temperature != 1 and i < nfe - 1:
            gmflow = isinstance(policy, GMFlowPolicy)
            _require(gmflow, f"temperature = {temperature}: for GMFlow policies only, leave it 1")
            policy = policy.temperature(temperature)
        tau_src, tau_dst = unshift_time(t_src, shift), unshift_time(t_dst, shift)
        steps = (shift, total_substeps, solver, callback, compile)
        x = rollout(policy, x, tau_src, tau_dst, *steps)
        if m < 1:
            eps = _random(torch.randn, x.shape, x, generator)
            x = (1 - t_to + t_to * m) * x + t_to * math.sqrt(1 - m * m) * eps
    finite = type(x) is not Tensor or bool(x.isfinite().all())
    _require(finite, "the sample is not finite (NaN or inf): check the student and its weights")
    return x


def _self_check() -> None:
    """Checks the chain on a mixture of Gaussians, whose posterior the textbook gives."""
    torch.manual_seed(0)
    B, K, C, std = 256, 5, 2, 0.1
    centers, noise = torch.randn(K, C).double(), torch.randn(B, C).double()

    def student(x: Tensor, t: Tensor) -> GMFlowPolicy:
        alpha, t = 1 - t[:, None, None], t[:, None, None]  #                      (B, 1, 1)
        total, residual = alpha**2 * std**2 + t**2, x[:, None] - alpha * centers
        m = centers + alpha * std**2 / total * residual  #  means of x_0          (B, K, C)
        logweights = -residual.square().sum(2, keepdim=True) / (2 * total)
        mixture = GaussianMixture((x[:, None] - m) / t, (std / total.sqrt()).log(), logweights)
        return GMFlowPolicy(mixture, x, t.flatten())

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        means, _, logweights = student(x, t).mixture
        return (logweights.softmax(1) * means).sum(1)

    policy, t = student(noise, torch.ones(B).double()), torch.rand(B).double()
    dx = DXPolicy(policy.mixture.means, noise, 1.0)
    walk = partial(rollout, x=noise, tau_start=1.0, tau_end=0.0)
    end = walk(policy, total_substeps=4096, solver="ab2")
    checks = [
        ("GMFlow policy = exact teacher", policy.velocity(noise, t) - teacher(noise, t), 1e-9),
        ("pi-ID loss of the exact policy", pi_id_loss(policy, teacher, 1.0, 1.0).loss, 1e-9),
        ("rollout, Euler, 128 substeps", walk(policy) - end, 0.02),
        ("rollout, AB2, 32 substeps", walk(policy, total_substeps=32, solver="ab2") - end, 0.02),
        ("sampler, 4 network evaluations", sample(student, noise, 4, solver="ab2") - end, 0.02),
        ("DX, closed form = 4096 substeps",
         walk(dx, solver="exact") - walk(dx, total_substeps=4096), 0.02),
    ]  # fmt: skip
    for name, gap, limit in checks:
        gap = gap.abs().mean().item()
        print(f"{name:36s} {gap:8.1e}  {'ok' if gap <= limit else 'WRONG'}")
        _require(gap <= limit, f"self-check failed: {name}")


if __name__ == "__main__":
    _self_check()
