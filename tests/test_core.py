"""The mathematics of piflow_minimal.py against independent truths: textbook formulae in float64,
closed-form solutions, autograd, counted calls."""

import ast
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_cuda import backward, needs_fake_cuda
from torch._subclasses.fake_tensor import FakeTensorMode

import piflow_minimal as piflow
from common.teachers import guided_velocity
from piflow_minimal import (
    DXPolicy,
    GaussianMixture,
    GMFlowPolicy,
    flow_map_schedule,
    pi_id_data_dependent,
    pi_id_data_free,
    pi_id_loss,
    rollout,
    sample,
    segment_of,
    shift_time,
    unshift_time,
)

SPATIAL = [(), (5,), (3, 4), (2, 3, 2)]


def random_mixture(b=3, k=4, c=2, spatial=(3, 4), dtype=torch.float64, seed=0) -> GaussianMixture:
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(b, k, c, *spatial, generator=g, dtype=dtype)
    logstds = torch.randn(b, 1, 1, *[1] * len(spatial), generator=g, dtype=dtype) * 0.3 - 1.5
    logweights = torch.randn(b, k, 1, *spatial, generator=g, dtype=dtype).log_softmax(1)
    return GaussianMixture(means, logstds, logweights)


def random_state(b=3, c=2, spatial=(3, 4), dtype=torch.float64, seed=1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, c, *spatial, generator=g, dtype=dtype)


class Teacher:
    """Exact flow of data drawn from K Gaussians of one std, in C dims; float64 textbook."""

    def __init__(self, k=4, c=2, std=0.3, seed=3):
        g = torch.Generator().manual_seed(seed)
        self.centers = torch.randn(k, c, generator=g, dtype=torch.float64)
        self.weights = torch.rand(k, generator=g, dtype=torch.float64)
        self.weights /= self.weights.sum()
        self.std = std

    def __call__(self, x, t):
        """Marginal velocity u = eps_hat - x0_hat; x (B, C), t (B,)."""
        a, s = (1 - t)[:, None, None], t[:, None, None]
        var = a**2 * self.std**2 + s**2  # of x_t around its component's mean
        gap = x[:, None] - a * self.centers
        w = torch.softmax(self.weights.log() - (gap**2).sum(-1) / (2 * var[..., 0]), 1)
        x0 = (w[..., None] * (self.centers + a * self.std**2 / var * gap)).sum(1)
        eps = (w[..., None] * (s / var * gap)).sum(1)
        return eps - x0

    def mixture(self, x, t) -> GaussianMixture:
        """The exact posterior over velocities at (x, t): what a perfect student would output."""
        a, s = (1 - t)[:, None, None], t[:, None, None]
        var = a**2 * self.std**2 + s**2
        gap = x[:, None] - a * self.centers
        means_x0 = self.centers + a * self.std**2 / var * gap
        logweights = self.weights.log()[:, None] - (gap**2).sum(-1, keepdim=True) / (2 * var)
        logstds = 0.5 * (self.std**2 * s**2 / var).log() - s.log()
        return GaussianMixture((x[:, None] - means_x0) / s, logstds, logweights.log_softmax(1))

    def student(self, x, t):
        return GMFlowPolicy(self.mixture(x, t), x, t)

    def draw(self, n, generator):
        index = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.centers.shape[1], generator=generator, dtype=torch.float64)
        return self.centers[index] + self.std * noise


def full(n, value):
    return torch.full((n,), value, dtype=torch.float64)


# ---- time ----------------------------------------------------------------------------------------


def test_time_shift_is_the_published_formula_and_inverts():
    tau = torch.linspace(0, 1, 11, dtype=torch.float64)
    expected = [3.2 * v / (1 + 2.2 * v) for v in tau.tolist()]
    assert torch.allclose(shift_time(tau, 3.2), torch.tensor(expected, dtype=torch.float64))
    assert torch.allclose(unshift_time(shift_time(tau, 3.2), 3.2), tau, atol=1e-15)
    assert shift_time(0.5) == 0.5 and unshift_time(shift_time(0.3, 3.2), 3.2) == pytest.approx(0.3)


def test_conversions_on_a_known_pair():
    x0, eps, t = random_state(seed=1), random_state(seed=2), torch.tensor([0.2, 0.7, 1.0]).double()
    wide = t.view(3, 1, 1, 1)
    x = (1 - wide) * x0 + wide * eps
    assert torch.allclose(piflow.x0_from_velocity(x, t, eps - x0), x0)
    assert torch.allclose(piflow.velocity_from_x0(x, t, x0), eps - x0)


# ---- policies ------------------------------------------------------------------------------------


def textbook_gmflow(mixture, x_src, t_src, x, t):
    """Bayes' rule by its definition: p(x_0|x) ~ p(x_0|x_src) N(x; a x_0, t^2) / N(x_src; ...).

    Every Gaussian is written with its precision and linear term; nothing is simplified.
    """
    b, k, c = mixture.means.shape[:3]
    shape = [b] + [1] * (x.ndim - 1)
    ts, tt = t_src.view(shape)[:, None], t.view(shape)[:, None]
    m = x_src[:, None] - ts * mixture.means
    v = (ts * mixture.logstds.exp()) ** 2
    precision = 1 / v + ((1 - tt) / tt) ** 2 - ((1 - ts) / ts) ** 2
    linear = m / v + (1 - tt) / tt**2 * x[:, None] - (1 - ts) / ts**2 * x_src[:, None]
    mean = linear / precision
    # log of each component's integral over x_0, up to what all components share
    log_mass = ((linear**2 / precision - m**2 / v) / 2).sum(2, keepdim=True)
    w = torch.softmax(mixture.logweights + log_mass, 1)
    return (x - (w * mean).sum(1)) / tt[:, 0]


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("t_scale", [1.0, 0.7, 0.2, 0.01])
def test_gmflow_velocity_is_bayes_rule(spatial, t_scale):
    mixture, x_src = random_mixture(spatial=spatial), random_state(spatial=spatial)
    t_src = torch.tensor([1.0, 0.8, 0.3]).double()
    x, t = random_state(spatial=spatial, seed=5), t_src * t_scale
    u = GMFlowPolicy(mixture, x_src, t_src).velocity(x, t)
    expected = textbook_gmflow(mixture, x_src, t_src, x, t)
    assert u.shape == x.shape
    assert (u - expected).abs().max() < 1e-9 * expected.abs().max()


def test_gmflow_float32_stays_exact_near_data():
    """The division by t does not magnify rounding: what cancels is cancelled on paper."""
    mixture, x_src = random_mixture(), random_state()
    t_src, t = full(3, 0.9), full(3, 1e-3)
    x = random_state(seed=6)
    exact = textbook_gmflow(mixture, x_src, t_src, x, t)
    single = GMFlowPolicy(GaussianMixture(*(v.float() for v in mixture)), x_src.float(), t_src)
    u = single.velocity(x.float(), t.float())
    assert (u - exact).abs().max() < 1e-5 * exact.abs().max()


def test_gmflow_at_its_source_is_the_mixture_mean():
    mixture, x_src = random_mixture(), random_state()
    t_src = torch.tensor([1.0, 0.6, 0.1]).double()
    expected = (mixture.logweights.exp() * mixture.means).sum(1)
    assert torch.allclose(GMFlowPolicy(mixture, x_src, t_src).velocity(x_src, t_src), expected)


@pytest.mark.parametrize("t_src", [1.0, 0.6])
def test_exact_posterior_as_policy_is_the_teacher_everywhere(t_src):
    teacher = Teacher()
    x_src = random_state(b=64, spatial=())
    policy = teacher.student(x_src, full(64, t_src))
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        x = 2 * torch.randn(64, 2, generator=g, dtype=torch.float64)
        t = t_src * (0.001 + 0.999 * torch.rand(64, generator=g, dtype=torch.float64))
        u = teacher(x, t)
        assert (policy.velocity(x, t) - u).abs().max() < 1e-12 * max(1, u.abs().max())


def test_one_component_of_zero_variance_is_a_dx_policy_of_one_point():
    v, x_src, t_src = random_mixture(k=1).means, random_state(), full(3, 0.8)
    zero = torch.full((3, 1, 1, 1, 1), -math.inf, dtype=torch.float64)
    mixture = GaussianMixture(v, zero, torch.zeros(3, 1, 1, 3, 4).double())
    x, t = random_state(seed=7), torch.tensor([0.8, 0.3, 0.02]).double()
    u_gm = GMFlowPolicy(mixture, x_src, t_src).velocity(x, t)
    u_dx = DXPolicy(v, x_src, t_src).velocity(x, t)
    assert torch.allclose(u_gm, u_dx, rtol=1e-10)
    x0 = x_src - 0.8 * v[:, 0]
    assert torch.allclose(u_dx, (x - x0) / t.view(3, 1, 1, 1))


@pytest.mark.parametrize("spatial", SPATIAL)
def test_dx_grid_interpolates_and_is_constant_outside(spatial):
    v, x_src = random_mixture(k=3, spatial=spatial).means, random_state(spatial=spatial)
    t_src = full(3, shift_time(0.9, 3.2))
    policy = DXPolicy(v, x_src, t_src, segment_size=0.4, shift=3.2)
    x0 = [x_src - t_src[0] * v[:, i] for i in range(3)]  # at tau = 0.5, 0.7, 0.9
    for tau, expected in [
        (0.9, x0[2]), (0.7, x0[1]), (0.5, x0[0]), (0.6, (x0[0] + x0[1]) / 2),
        (0.75, 0.75 * x0[1] + 0.25 * x0[2]), (0.2, x0[0]), (0.95, x0[2]),
    ]:  # fmt: skip
        t, x = full(3, shift_time(tau, 3.2)), random_state(spatial=spatial, seed=8)
        assert torch.allclose(policy.x0_hat(t), expected, atol=1e-12)
        assert torch.allclose(policy.velocity(x, t), (x - expected) / t[0], atol=1e-11)


def test_dx_segment_is_clamped_at_data():
    v, x_src = random_mixture(k=3).means, random_state()
    policy = DXPolicy(v, x_src, full(3, 0.2), segment_size=0.5)  # grid on tau = 0, 0.1, 0.2
    assert torch.allclose(policy.x0_hat(full(3, 0.1)), x_src - 0.2 * v[:, 1], atol=1e-12)


def test_dx_polynomial():
    v, x_src = random_mixture(k=4).means, random_state()
    policy = DXPolicy(v, x_src, full(3, 0.8), shift=2.0, mode="polynomial")
    tau_src, tau = unshift_time(0.8, 2.0), 0.2
    t = shift_time(tau, 2.0)
    expected = sum((tau_src - tau) ** i * (x_src - 0.8 * v[:, i]) for i in range(4))
    assert torch.allclose(policy.x0_hat(full(3, t)), expected)


def test_dx_filled_from_a_trajectory_reproduces_it():
    """The error half way falls as 1/N^2, as linear interpolation of a smooth x0_hat must; the end
    is x0_hat(0) itself, a grid point."""
    teacher, n_fine = Teacher(std=0.5), 1920
    noise = random_state(b=32, spatial=())
    x, path = noise, [noise]
    for i in range(n_fine):  # the midpoint rule: a solver that piflow_minimal does not have
        t, dt = full(32, 1 - i / n_fine), -1 / n_fine
        x = x + dt * teacher(x + dt / 2 * teacher(x, t), t + dt / 2)
        path.append(x)
    errors = []
    for n in (6, 11, 21, 41):
        v = []
        for i in range(n):  # the first grid point is the segment's end, the last tau = 1
            t = max(i / (n - 1), 1e-9)
            x_t = path[n_fine - i * n_fine // (n - 1)]
            v.append(noise - (x_t - t * teacher(x_t, full(32, t))))  # t_src = 1
        dx = DXPolicy(torch.stack(v, 1), noise, 1.0)
        half, end = (rollout(dx, noise, 1.0, tau, solver="exact") for tau in (0.5, 0.0))
        errors.append((half - path[n_fine // 2]).abs().mean().item())
        assert (end - path[-1]).abs().mean() < 1e-5
    assert errors[-1] < 1e-4
    for coarse, fine in zip(errors[1:-1], errors[2:], strict=True):
        assert math.log2(coarse / fine) == pytest.approx(2, abs=0.2)


def test_policies_share_nothing_between_samples():
    mixture, x_src, t_src = random_mixture(), random_state(), torch.tensor([1.0, 0.7, 0.4]).double()
    x, t, end = random_state(seed=9), t_src * 0.6, torch.tensor([0.0, 0.3, 0.1]).double()
    policies = {
        "gm": lambda i: GMFlowPolicy(GaussianMixture(*(p[i] for p in mixture)), x_src[i], t_src[i]),
        "dx": lambda i: DXPolicy(mixture.means[i], x_src[i], t_src[i], 0.5, 3.2),
    }
    everyone = slice(None)
    for make in policies.values():
        batch = make(everyone)
        for b in range(3):
            i = slice(b, b + 1)
            alone = make(i)
            assert torch.allclose(alone.velocity(x[i], t[i]), batch.velocity(x, t)[i], rtol=1e-12)
            for solver in ("euler", "deis"):
                args = {"shift": 3.2, "total_substeps": 16, "solver": solver}
                tau = unshift_time(t_src, 3.2)
                whole = rollout(batch, x_src, tau, end * tau, **args)
                one = rollout(alone, x_src[i], tau[i], (end * tau)[i], **args)
                assert torch.allclose(one, whole[i], rtol=1e-12)


def test_gradients_reach_means_logstds_and_logweights():
    """autograd against finite differences, through construction and velocity."""
    mixture, x_src = random_mixture(b=2, k=3, spatial=(2,)), random_state(b=2, spatial=(2,))
    t_src, t, x = full(2, 0.9), full(2, 0.4), random_state(b=2, spatial=(2,), seed=4)

    def velocity(*parts):
        return GMFlowPolicy(GaussianMixture(*parts), x_src, t_src).velocity(x, t)

    parts = [part.clone().requires_grad_() for part in mixture]
    assert torch.autograd.gradcheck(velocity, parts)
    grads = torch.autograd.grad(velocity(*parts).square().sum(), parts)
    assert all(g.abs().max() > 0 for g in grads)
    v = mixture.means.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: DXPolicy(v, x_src, t_src, 0.7).velocity(x, t), (v,))


def test_temperature_is_its_definition():
    mixture, x_src, t_src = random_mixture(), random_state(), full(3, 0.9)
    cold = GMFlowPolicy(mixture, x_src, t_src).temperature(0.3).mixture
    powers = mixture.logweights.exp() ** (1 / 0.3)
    assert torch.allclose(cold.logweights.exp(), powers / powers.sum(1, keepdim=True))
    assert torch.allclose(cold.logstds.exp() ** 2, mixture.logstds.exp() ** 2 * 0.3)


def test_drop_removes_components():
    mixture, x_src, t_src = random_mixture(k=4), random_state(), full(3, 0.9)
    mask = torch.tensor([[True, False, False, True]] * 3)
    kept = GaussianMixture(mixture.means[:, 1:3], mixture.logstds, mixture.logweights[:, 1:3])
    x, t = random_state(seed=3), full(3, 0.5)
    dropped = GMFlowPolicy(mixture, x_src, t_src).drop(mask)
    assert torch.allclose(dropped.velocity(x, t), GMFlowPolicy(kept, x_src, t_src).velocity(x, t))
    total = dropped.mixture.logweights.exp().sum(1)
    assert torch.allclose(total, torch.ones_like(total))


def test_dropout_has_its_rate_and_never_drops_all():
    b, k = 4000, 3
    mixture = GaussianMixture(torch.zeros(b, k, 1), torch.zeros(b, 1, 1), torch.zeros(b, k, 1))
    policy = GMFlowPolicy(mixture, torch.zeros(b, 1), 1.0)
    g = torch.Generator().manual_seed(0)
    rate = (policy.dropout(0.2, g).mixture.logweights == -math.inf).double().mean()
    assert rate == pytest.approx(0.2 - 0.2**k / k, abs=0.01)  # one is kept where all would go
    gone = (policy.dropout(0.97, g).mixture.logweights == -math.inf).sum(1)
    assert gone.max() == k - 1
    assert policy.dropout(0.0, g).mixture.logweights.isfinite().all()


def test_detach_and_precision():
    mixture, x_src = random_mixture(dtype=torch.float32), random_state(dtype=torch.float32)
    mixture = GaussianMixture(*(part.requires_grad_() for part in mixture))
    policies = [GMFlowPolicy(mixture, x_src, 1.0), DXPolicy(mixture.means, x_src, 1.0)]
    for policy in policies:
        assert policy.velocity(x_src, 0.5).requires_grad
        detached = policy.detach().velocity(x_src, 0.5)
        assert not detached.requires_grad
        assert torch.equal(detached, policy.velocity(x_src, 0.5))
        assert policy.t_src.shape == (3,) and policy.x_src is x_src
    half = GaussianMixture(*(part.detach().bfloat16() for part in mixture))
    for policy in (GMFlowPolicy(half, x_src.bfloat16(), 1.0), DXPolicy(half.means, x_src, 1.0)):
        assert policy.velocity(x_src.bfloat16(), 0.5).dtype == torch.float32
    assert GMFlowPolicy(random_mixture(), random_state(), 1.0).velocity(x_src, 0.5).dtype == (
        torch.float64
    )
    with torch.autocast("cpu", torch.bfloat16):  # a caller's autocast does not reach a policy
        assert torch.equal(policies[0].velocity(x_src, 0.5), policies[0].velocity(x_src, 0.5))
        inside = [policy.velocity(x_src, 0.5) for policy in policies]
    for policy, u in zip(policies, inside, strict=True):
        assert torch.equal(policy.velocity(x_src, 0.5), u)


# ---- rollout -------------------------------------------------------------------------------------


def count_substeps(start, end, total_substeps=128) -> int:
    steps = []
    policy = DXPolicy(torch.zeros(2, 1, 3), torch.zeros(2, 3), 1.0)
    rollout(policy, torch.zeros(2, 3), start, end, 1.0, total_substeps,
            callback=lambda i, tau, x: steps.append(i))  # fmt: skip
    assert steps == list(range(len(steps)))
    return len(steps) - 1


def test_number_of_substeps():
    for start, end, n in [
        (1.0, 0.75, 32), (1.0, 0.0, 128), (0.5, 0.25, 32), (1.0, 5 / 7, 37), (1 / 7, 0.0, 19),
        (0.3, 0.3, 1), (0.3, 0.2999, 1), (0.75, 0.5 - 1e-3, 33),
    ]:  # fmt: skip
        assert count_substeps(start, end) == n
        assert count_substeps(torch.tensor([start] * 2), torch.tensor([end] * 2)) == n
    assert count_substeps(torch.tensor([1.0, 0.5]), torch.tensor([0.75, 0.45])) == 32
    assert count_substeps(1.0, 0.0, 16) == 16


def one_of(policy: GMFlowPolicy, b: int) -> GMFlowPolicy:
    mixture = GaussianMixture(*(part[b : b + 1] for part in policy.mixture))
    return GMFlowPolicy(mixture, policy.x_src[b : b + 1], policy.t_src[b : b + 1])


def follow(policy, x, times, solver):
    """The textbook, one step after the other. deis: x0_hat is the line a + b t through its last two
    values, and d(x/t)/dt = -x0_hat/t^2 is integrated by hand."""
    t_old = x0_old = None
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        u = policy.velocity(x, t)
        x0 = x - t * u
        if solver == "euler" or t_old is None:
            x_next = x + (t_next - t) * u
        else:
            b = (x0 - x0_old) / (t - t_old)
            a, ratio = x0 - b * t, t_next / t
            logs = t_next * math.log(1 / ratio) if t_next > 0 else 0.0
            x_next = ratio * x + a * (1 - ratio) + b * logs
        x, t_old, x0_old = x_next, t, x0
    return x


@pytest.mark.parametrize("solver", ["euler", "deis"])
def test_rollout_is_the_solver_of_the_textbook(solver):
    """Against a plain loop over one sample with its own number of substeps."""
    mixture, x_src = random_mixture(), random_state()
    start = torch.tensor([1.0, 0.75, 0.5]).double()
    end = torch.tensor([0.0, 0.3, 0.49]).double()
    policy = GMFlowPolicy(mixture, x_src, shift_time(start, 3.2))
    ours = rollout(policy, x_src, start, end, 3.2, 16, solver)
    for b, n in enumerate([16, 8, 1]):
        first, last = start[b].item(), end[b].item()
        if solver == "euler":
            times = [shift_time(first + (last - first) * i / n, 3.2) for i in range(n + 1)]
        else:  # uniform in t^(2/3)
            first, last = (shift_time(v, 3.2) ** (2 / 3) for v in (first, last))
            times = [max(0.0, first + (last - first) * i / n) ** 1.5 for i in range(n + 1)]
        x = follow(one_of(policy, b), x_src[b : b + 1], times, solver)
        assert torch.allclose(ours[b], x[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "deis", "exact"])
def test_states_on_the_way(solver):
    """`through` reports where rollouts to these times end; the end stays where it was."""
    mixture, x = random_mixture(), random_state()
    policy = GMFlowPolicy(mixture, x, 1.0) if solver != "exact" else DXPolicy(mixture.means, x, 1.0)
    way = torch.tensor([[0.9, 0.5, 0.7], [0.3, 0.45, 0.05]]).double()
    end, states = rollout(policy, x, 1.0, 0.0, 3.2, 2000, solver, through=way)
    assert (end - rollout(policy, x, 1.0, 0.0, 3.2, 2000, solver)).abs().max() < 2e-2
    for tau, state in zip(way, states, strict=True):
        assert (state - rollout(policy, x, 1.0, tau, 3.2, 2000, solver)).abs().max() < 2e-2


def test_deis_keeps_its_order_where_samples_stop_on_the_way():
    std, x = 0.6, random_state(b=8, spatial=())
    teacher = Teacher(k=1, std=std)
    policy, way = teacher.student(x, full(8, 1.0)), torch.linspace(0.95, 0.15, 16).view(2, 8)
    way = way.flip(0) if way[0, 0] < way[1, 0] else way
    exact = (1 - 0.1) * teacher.centers + math.sqrt(0.9**2 * std**2 + 0.1**2) * x
    errors = []
    for n in (40, 80, 160, 320):
        end, _ = rollout(policy, x, 1.0, 0.1, 1.0, n, "deis", through=way.double())
        errors.append((end - exact).abs().max().item())
    assert math.log2(errors[0] / errors[-1]) / 3 == pytest.approx(2, abs=0.35)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("deis", 2)])
@pytest.mark.parametrize("shift", [1.0, 3.2])
def test_convergence_order(solver, order, shift):
    """Against the exact solution for Gaussian data: x_t = sqrt(a^2 s^2 + t^2) eps."""
    std, x = 0.6, random_state(b=8, spatial=())
    policy = Teacher(k=1, std=std).student(x, full(8, 1.0))
    center = Teacher(k=1, std=std).centers
    t_end = shift_time(0.1, shift)
    exact = (1 - t_end) * center + math.sqrt((1 - t_end) ** 2 * std**2 + t_end**2) * x
    errors = [
        (rollout(policy, x, 1.0, 0.1, shift, n, solver) - exact).abs().max().item()
        for n in (40, 80, 160)
    ]
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("shift", [1.0, 3.2])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_exact_solver_is_the_limit_of_substeps(n, shift):
    """Substeps converge to it with their own order, so it is what they approximate."""
    v, x_src = random_mixture(k=n).means, random_state()
    tau_src = torch.tensor([1.0, 0.7, 0.3]).double()
    policy = DXPolicy(v, x_src, shift_time(tau_src, shift), 0.5, shift)
    for end in (torch.tensor([0.7, 0.15, 0.02]).double(), torch.tensor([0.2, 0.1, 0.1]).double()):
        exact = rollout(policy, x_src, tau_src, end, shift, solver="exact")
        for substeps in (500, 2000):
            fine = rollout(policy, x_src, tau_src, end, shift, substeps, solver="deis")
            assert (exact - fine).abs().max() < (500 / substeps) ** 2 * 2e-4
    data = rollout(policy, x_src, tau_src, 0.0, shift, solver="exact")  # ends on x0_hat(0)
    assert torch.allclose(data, policy.x0_hat(full(3, 0.0)), atol=1e-3)


@pytest.mark.parametrize("solver", ["euler", "exact"])
def test_rollouts_compose_on_aligned_grids(solver):
    mixture, x = random_mixture(), random_state()
    policy = GMFlowPolicy(mixture, x, 1.0) if solver == "euler" else DXPolicy(mixture.means, x, 1.0)
    whole = rollout(policy, x, 1.0, 0.25, 3.2, solver=solver)
    half = rollout(policy, x, 1.0, 0.5, 3.2, solver=solver)
    assert torch.allclose(rollout(policy, half, 0.5, 0.25, 3.2, solver=solver), whole, rtol=1e-9)


def test_callback_sees_the_whole_trajectory():
    policy, x = Teacher().student(random_state(b=4, spatial=()), full(4, 1.0)), None
    seen = []
    x = rollout(policy, policy.x_src, 1.0, 0.5, 1.0, 8, callback=lambda *a: seen.append(a))
    assert [i for i, _, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.allclose(torch.stack([tau for _, tau, _ in seen])[:, 0],
                          torch.tensor([1, 0.875, 0.75, 0.625, 0.5]).double())  # fmt: skip
    assert seen[0][2] is policy.x_src and seen[-1][2] is x


KINDS = {
    "float": float,
    "int": int,
    "numpy number": np.float64,
    "() float64": lambda t: torch.tensor(t).double(),
    "(B,) float16": lambda t: torch.full((3,), t).half(),
    "(B,) bfloat16": lambda t: torch.full((3,), t).bfloat16(),
    "(B,) numpy": lambda t: np.full(3, t),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["gmflow", "dx", "polynomial"])
def test_times_of_any_kind(kind, policy):
    """Numbers, () and (B,) tensors of any float dtype, NumPy: the same velocity and rollout."""
    mixture, x = random_mixture(dtype=torch.float32), random_state(dtype=torch.float32)

    def make(t):
        if policy == "gmflow":
            return GMFlowPolicy(mixture, x, t)
        return DXPolicy(mixture.means, x, t, t, mode="grid" if policy == "dx" else policy)

    cast, plain = KINDS[kind], make(torch.ones(3))
    for t in (1.0,) if kind == "int" else (1.0, 0.5):
        u = make(cast(1.0)).velocity(x, cast(t))
        assert u.dtype == torch.float32
        assert torch.equal(u, plain.velocity(x, torch.full((3,), t)))
    end = rollout(make(cast(1.0)), x, cast(1.0), cast(0.0), total_substeps=8)
    assert torch.equal(end, rollout(plain, x, 1.0, 0.0, total_substeps=8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_are_upcast(dtype):
    mixture, x = random_mixture(dtype=torch.float32), random_state(dtype=torch.float32).to(dtype)
    ends = [rollout(GMFlowPolicy(mixture, v, 1.0), v, 1.0, 0.0) for v in (x, x.float())]
    assert ends[0].dtype == torch.float32 and torch.equal(*ends)


# ---- in company: shapes, transforms, empty batches -----------------------------------------------


def policies_of(x: torch.Tensor, k=4, shift=1.0) -> dict:
    """One policy of every kind at the states x, (B, C, *), from random outputs."""
    b, c, *spatial = x.shape
    mixture = random_mixture(b, k, c, spatial, x.dtype)
    return {
        "gmflow": GMFlowPolicy(mixture, x, 1.0),
        "dx": DXPolicy(mixture.means, x, 1.0, 1.0, shift),
        "polynomial": DXPolicy(mixture.means, x, 1.0, 1.0, shift, mode="polynomial"),
    }


@pytest.mark.parametrize("kind", ["gmflow", "dx", "polynomial"])
def test_a_state_of_another_shape_is_refused(kind):
    """Also one with as many numbers, and one that would broadcast."""
    x = random_state(b=2, c=4, spatial=(6, 8))
    policy = policies_of(x)[kind]
    others = [x.transpose(2, 3), x.movedim(1, 3), x.transpose(0, 1), x[:1], x[..., :1]]
    for other in others:
        with pytest.raises(ValueError) as error:
            policy.velocity(other, 0.5)
        expected = f"state x {tuple(other.shape)}: must be (2, 4, 6, 8)"
        assert str(error.value) == expected


@pytest.mark.parametrize("kind", ["gmflow", "dx", "polynomial"])
@pytest.mark.parametrize("spatial", SPATIAL)
def test_vmap_over_states_and_times(kind, spatial):
    x = random_state(spatial=spatial)
    policy = policies_of(x)[kind]
    states = torch.stack([random_state(spatial=spatial, seed=s) for s in range(5)])
    times = torch.linspace(0.1, 1, 5).double()[:, None].expand(5, 3)

    def follow(x):
        return rollout(policy, x, 1.0, 0.0, total_substeps=4, solver="deis")

    for function, arguments in [
        (lambda x: policy.velocity(x, 0.5), (states,)),
        (policy.velocity, (states, times)),
        (lambda t: policy.velocity(x, t), (times,)),
        (follow, (states,)),
    ]:
        expected = torch.stack([function(*one) for one in zip(*arguments, strict=True)])
        assert torch.allclose(torch.func.vmap(function)(*arguments), expected, rtol=1e-10)


@pytest.mark.parametrize("kind", ["gmflow", "dx", "polynomial"])
@pytest.mark.parametrize("spatial", SPATIAL)
def test_an_empty_batch(kind, spatial):
    def student(x, t):
        return policies_of(x)[kind]

    x = random_state(b=0, spatial=spatial)
    policy, none = student(x, 1.0), torch.ones(0)
    assert policy.velocity(x, 0.5).shape == policy.velocity(x, none).shape == x.shape
    for solver in ("euler", "deis", *["exact"] * (kind == "dx")):
        end, (half,) = rollout(policy, x, none, 0.0, solver=solver, through=none[None] / 2)
        assert end.shape == half.shape == sample(student, x, 2, h=1.0, solver=solver).shape
        assert end.shape == x.shape
    out = pi_id_loss(policy, lambda x, t: x, 1.0, 1.0, teacher_ratio=0.5)
    assert out.x_dst.shape == x.shape and out.t.shape == (0,)


@pytest.mark.parametrize("solver", ["euler", "deis", "exact"])
@pytest.mark.parametrize("kind", ["gmflow", "dx"])
def test_a_rollout_between_numbers_is_one_graph(kind, solver):
    """torch.compile(fullgraph=True) and torch.export: nothing in it depends on a tensor's value."""
    if kind == "gmflow" and solver == "exact":
        return
    x = random_state(dtype=torch.float32)
    mixture = random_mixture(dtype=torch.float32)

    class Rollout(torch.nn.Module):
        def forward(self, x, *parts):
            if kind == "gmflow":
                policy = GMFlowPolicy(GaussianMixture(*parts), x, 1.0)
            else:
                policy = DXPolicy(parts[0], x, 1.0)
            return rollout(policy, x, 1.0, 0.0, total_substeps=3, solver=solver)

    module, inputs = Rollout(), (x, *mixture)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    exported = torch.export.export(module, inputs).module()
    for one in (compiled, exported):
        assert torch.allclose(one(*inputs), module(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [np.int64, np.int32, np.float32, np.float64])
def test_numpy_numbers_as_settings(number):
    noise = random_state(b=4, spatial=())
    nfe = number(3) if issubclass(number, np.integer) else 3
    student, teacher = Teacher().student, Teacher()

    def draw(nfe, one):
        g = torch.Generator().manual_seed(0)
        x = sample(student, noise, nfe, one, one, one, total_substeps=8, generator=g)
        segments = pi_id_data_free(student, teacher, noise, nfe, one, one, g, total_substeps=8)
        losses = [out.loss for _, out in segments]
        out = pi_id_data_dependent(student, teacher, noise, nfe, one, generator=g)
        ends = rollout(student(noise, full(4, 1.0)), noise, one, 0 * one, one)
        return [x, *losses, out.loss, ends, *flow_map_schedule(nfe, one)]

    for ours, plain in zip(draw(nfe, number(1)), draw(3, 1.0), strict=True):
        assert ours.dtype == plain.dtype
        assert torch.allclose(ours, plain, atol=1e-5)  # single numbers are added in single


def test_a_list_of_generators_has_one_for_each_sample():
    """As in diffusers: a sample is the same, whatever the batch that it is in."""
    noise, student = random_state(spatial=()), Teacher().student

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(3)]

    together = sample(student, noise, 3, h=1.0, total_substeps=8, generator=generators())
    for i, one in enumerate(generators()):
        alone = sample(student, noise[i : i + 1], 3, h=1.0, total_substeps=8, generator=one)
        assert torch.allclose(alone[0], together[i], rtol=1e-12)
    options = {"dropout": 0.5, "total_substeps": 8}
    policy = GMFlowPolicy(random_mixture(spatial=()), noise, 1.0)
    together = pi_id_loss(policy, Teacher(), 1.0, 1.0, generator=generators(), **options)
    for i, one in enumerate(generators()):
        alone = pi_id_loss(one_of(policy, i), Teacher(), 1.0, 1.0, generator=one, **options)
        assert torch.equal(alone.t, together.t.view(2, 3)[:, i])
        assert torch.allclose(alone.x_dst[0], together.x_dst[i], rtol=1e-12)


# ---- a third policy ------------------------------------------------------------------------------


class Constant:
    """The smallest policy: one denoised state. Not derived from anything."""

    def __init__(self, x0, x_src, t_src):
        self.x0, self.x_src, self.t_src = x0, x_src, t_src

    def velocity(self, x, t):
        return (x - self.x0) / t.view(-1, 1)

    def detach(self):
        return Constant(self.x0.detach(), self.x_src, self.t_src)


class ConstantWithFlow(Constant):
    def flow(self, x, t, t_end):
        return self.x0 + (t_end / t).view(-1, 1) * (x - self.x0)


class Sharpened(DXPolicy):
    def x0_hat(self, t):
        return 2 * super().x0_hat(t)


class Halved(DXPolicy):
    def flow(self, x, t, t_end):
        return x / 2


class Clipped(DXPolicy):
    def velocity(self, x, t):
        return super().velocity(x, t).clamp(-1, 1)


def test_any_object_with_four_attributes_is_a_policy():
    x, x0 = random_state(spatial=()), random_state(spatial=(), seed=2).requires_grad_()
    teacher, student = Teacher(), lambda x, t: Constant(x0, x, t)  # noqa: E731
    for options in ({}, {"window_substeps": 4}, {"teacher_ratio": 0.5}, {"solver": "deis"}):
        out = pi_id_loss(student(x, full(3, 1.0)), teacher, 1.0, 1.0, **options)
        (grad,) = torch.autograd.grad(out.loss, x0)
        assert grad.abs().max() > 0
    for solver in ("euler", "deis"):  # a constant x0_hat is a straight line: both are exact
        end = sample(student, x, 2, total_substeps=8, solver=solver)
        assert torch.allclose(end, x0.detach(), atol=1e-5)


def test_the_exact_solver_is_for_policies_that_have_a_flow():
    v, x = random_mixture(spatial=()).means, random_state(spatial=())
    x0 = x[[1, 2, 0]]
    end, (half,) = rollout(ConstantWithFlow(x0, x, full(3, 1.0)), x, 1.0, 0.0, solver="exact",
                           through=full(3, 0.5)[None])  # fmt: skip
    assert torch.allclose(half, (x + x0) / 2) and torch.allclose(end, x0)
    without = [Constant(x0, x, full(3, 1.0)), GMFlowPolicy(random_mixture(spatial=()), x, 1.0)]
    without += [Sharpened(v, x, 1.0), Clipped(v, x, 1.0), DXPolicy(v, x, 1.0, mode="polynomial")]
    for policy in without:
        for one in (policy, policy.detach()):
            with pytest.raises(ValueError, match="solver 'exact'"):
                rollout(one, x, 1.0, 0.0, solver="exact")
    own = Halved(v, x, 1.0)  # a subclass that brings a flow of its own
    assert torch.equal(rollout(own, x, 1.0, 0.0, solver="exact"), x / 2)


# ---- pi-ID ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"num_intermediates": 4}, {"solver": "deis"}, {"tau_src": 0.5, "segment_size": 0.5},
])  # fmt: skip
def test_loss_is_zero_where_the_policy_is_the_teacher(options):
    teacher = Teacher()
    options = {"tau_src": 1.0, "segment_size": 1.0, "shift": 3.2} | options
    x = random_state(b=16, spatial=())
    policy = teacher.student(x, full(16, shift_time(options["tau_src"], 3.2)))
    out = pi_id_loss(policy, teacher, **options)
    assert out.loss < 1e-20
    assert out.u_policy.abs().max() > 0.1


def test_states_and_targets_by_hand():
    """r = 0, W = 0: states at the sorted times from separate plain rollouts, sample by sample."""
    mixture, x, seen = random_mixture(spatial=()), random_state(spatial=()), []

    def teacher(x, t):
        seen.append((x, t))
        return torch.sin(3 * x) + t[:, None]

    uniforms = torch.rand(3, 3, generator=torch.Generator().manual_seed(1)).double()
    policy = GMFlowPolicy(mixture, x, shift_time(full(3, 0.9), 3.2))
    out = pi_id_loss(policy, teacher, 0.9, 0.6, 3.2, 64, 3, uniforms=(uniforms, uniforms[:, :2]))
    assert len(seen) == 3
    squares = []
    for b in range(3):
        one = GMFlowPolicy(GaussianMixture(*(p[b : b + 1] for p in mixture)), x[b : b + 1],
                           policy.t_src[b : b + 1])  # fmt: skip
        state, tau = x[b : b + 1], 0.9
        for m, u in enumerate(sorted(uniforms[b].tolist())):
            state, tau = rollout(one, state, tau, 0.9 - 0.6 * u, 3.2, 64), 0.9 - 0.6 * u
            t = torch.tensor([shift_time(tau, 3.2)]).double()
            assert torch.allclose(seen[m][0][b], state[0], rtol=1e-9)
            assert torch.allclose(out.t.view(3, 3)[m, b], t[0])
            squares.append((one.velocity(state, t) - torch.sin(3 * state) - t) ** 2)
        assert torch.allclose(out.x_dst[b], rollout(one, state, tau, 0.3, 3.2, 64)[0], rtol=1e-9)
    assert torch.allclose(out.loss, torch.cat(squares).mean())


def test_uniforms_may_be_a_function_of_the_segment():
    seen = []

    def early(tau_src, segment_size):
        seen.append((tau_src.tolist(), segment_size.tolist()))
        return segment_size[:, None].expand(3, 2) / 2, segment_size[:, None] / 2

    options = {"total_substeps": 8, "uniforms": early}
    noise = random_state(spatial=())
    segments = list(pi_id_data_free(Teacher().student, Teacher(), noise, 2, 1.0, 0.5, **options))
    ends = [(1, 2 / 3), (1 / 3, 1 / 3)]
    for (tau, size), (_, out), (end, length) in zip(seen, segments, ends, strict=True):
        assert tau == pytest.approx([end] * 3) and size == pytest.approx([length] * 3)
        assert out.t.tolist() == pytest.approx([end - length * length / 2] * 6)


@pytest.mark.parametrize("window", [0, 2])
def test_batch_teacher_queries_all_intermediates_at_once(window):
    policy, queries = GMFlowPolicy(random_mixture(), random_state(), full(3, 1.0)), []

    def teacher(x, t):
        queries.append(len(x))
        return torch.sin(3 * x) * t.view(-1, 1, 1, 1)

    def loss(**options):
        generator = torch.Generator().manual_seed(0)
        options |= {"num_intermediates": 4, "window_substeps": window, "generator": generator}
        return pi_id_loss(policy, teacher, 1.0, 1.0, total_substeps=16, **options)

    one, many = loss(batch_teacher=True), loss()
    assert queries == [12, 3, 3, 3, 3]
    for a, b in zip(one, many, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_full_teacher_ratio_is_the_teachers_own_rollout():
    """r = 1: the states are those of the teacher's own Euler steps, whatever the policy."""
    teacher, x = Teacher(), random_state(b=3, spatial=())
    cuts = torch.tensor([[0.3, 0.6], [0.9, 0.1], [0.5, 0.7]]).double()
    policy = GMFlowPolicy(random_mixture(spatial=()), x, 1.0)
    out = pi_id_loss(policy, teacher, 1.0, 1.0, num_intermediates=3, teacher_ratio=1.0,
                     uniforms=(torch.rand(3, 3).double(), cuts))  # fmt: skip
    times = torch.cat([full(3, 1.0)[:, None], 1 - cuts.sort(1).values, full(3, 0.0)[:, None]], 1)
    state = x
    for m in range(3):
        u = teacher(state, times[:, m])
        assert torch.allclose(out.u_teacher.view(3, 3, 2)[m], u)
        state = state + (times[:, m + 1] - times[:, m])[:, None] * u
    assert torch.allclose(out.x_dst, state)


def test_window_compares_mean_velocities():
    """DX with one point: x0_hat is constant, so x is linear in t."""
    x, v = random_state(b=3, spatial=()), random_state(b=3, spatial=(), seed=2)[:, None]
    uniforms = torch.tensor([[0.5], [0.2], [0.9]]).double(), torch.zeros(3, 0).double()
    wrong = 0.1  # the window sees a policy that is off its trajectory: x0_hat is not what it was
    policy = DXPolicy(v, x, 1.0)
    out = pi_id_loss(policy, lambda x, t: x * 0 + wrong, 1.0, 1.0, total_substeps=16,
                     num_intermediates=1, window_substeps=4, uniforms=uniforms)  # fmt: skip
    assert torch.allclose(out.u_policy, v[:, 0])  # the mean of a constant velocity
    assert torch.allclose(out.t, 1 - 0.75 * uniforms[0][:, 0])
    assert torch.allclose(out.loss, (v[:, 0] - wrong).square().mean())


@pytest.mark.parametrize("solver", ["euler", "deis"])
@pytest.mark.parametrize("ratio, window", [(0.0, 0), (0.0, 3), (0.7, 0), (0.7, 3), (0.0, 1000)])
@pytest.mark.parametrize("nfe", [7, 30])
def test_a_segment_size_that_is_a_number_gives_no_rollout_too_few_substeps(
    solver, ratio, window, nfe
):
    """A number bounds the number of substeps; a tensor lets them be counted."""
    torch.manual_seed(0)
    uniforms = torch.rand(5, 3).double(), torch.rand(5, 2).double()
    x, size = random_state(b=5), 1 / (nfe - 0.5)
    options = {"num_intermediates": 3, "teacher_ratio": ratio, "window_substeps": window}
    options |= {"uniforms": uniforms, "solver": solver}

    def loss(size):
        policy = GMFlowPolicy(random_mixture(b=5), x, 1.0)
        return pi_id_loss(policy, lambda x, t: torch.sin(x), 1.0, size, **options)

    for a, b in zip(loss(size), loss(full(5, size)), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_weighted_is_the_mean_of_t_to_a_power_times_the_squared_error():
    policy = GMFlowPolicy(random_mixture(), random_state(), 1.0)
    out = pi_id_loss(policy, lambda x, t: torch.sin(x), 1.0, 1.0, num_intermediates=3)
    assert torch.allclose(out.weighted(0.0), out.loss)
    for power in (1.0, 2.0, 0.5):
        total = 0.0
        for t, ours, theirs in zip(out.t, out.u_policy, out.u_teacher, strict=True):
            total += t.item() ** power * ((ours - theirs) ** 2).mean().item()
        assert out.weighted(power).item() == pytest.approx(total / 9)


def test_gradients_only_where_they_belong():
    mixture = GaussianMixture(*(p.requires_grad_() for p in random_mixture(spatial=())))
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    queries = []

    def teacher(x, t):
        assert not torch.is_grad_enabled() and not x.requires_grad
        queries.append(len(x))
        return scale * x

    x_src = random_state(spatial=()).requires_grad_()
    for options in ({}, {"teacher_ratio": 0.5}, {"window_substeps": 20, "dropout": 0.3}):
        out = pi_id_loss(GMFlowPolicy(mixture, x_src, 1.0), teacher, 1.0, 1.0, **options)
        assert not out.u_teacher.requires_grad and not out.x_dst.requires_grad
        assert out.u_policy.requires_grad and not out.t.requires_grad
        grads = torch.autograd.grad(out.loss, [*mixture, scale], allow_unused=True)
        assert all(g.abs().max() > 0 for g in grads[:3]) and grads[3] is None
    assert queries == [3] * 6


def test_loss_gradient_is_that_of_a_fixed_target():
    """The states are constants: d loss / d means by finite differences with the states held."""
    mixture, x = random_mixture(b=2, k=3, spatial=()), random_state(b=2, spatial=())
    means = mixture.means.clone().requires_grad_()
    uniforms = (torch.rand(2, 2).double(), torch.rand(2, 1).double())
    seen = []

    def teacher(x, t):
        seen.append((x, t))
        return -x

    policy = GMFlowPolicy(mixture._replace(means=means), x, 1.0)
    out = pi_id_loss(policy, teacher, 1.0, 1.0, uniforms=uniforms)
    (ours,) = torch.autograd.grad(out.loss, means)

    def held(means):
        policy = GMFlowPolicy(mixture._replace(means=means), x, 1.0)
        return torch.stack([(policy.velocity(x, t) + x).square().mean() for x, t in seen]).mean()

    expected = torch.zeros_like(means)
    for i in range(means.numel()):
        step = torch.zeros(means.numel()).double()
        step[i] = 1e-5
        step = step.view_as(means)
        expected.view(-1)[i] = (held(mixture.means + step) - held(mixture.means - step)) / 2e-5
    assert torch.allclose(ours, expected, atol=1e-8)


def test_dropout_is_for_the_detached_policy_only():
    mixture, x = random_mixture(spatial=()), random_state(spatial=())
    policy, teacher = GMFlowPolicy(mixture, x, 1.0), Teacher()
    uniforms = torch.zeros(3, 2).double(), torch.zeros(3, 1).double()  # at the source itself
    plain = pi_id_loss(policy, teacher, 1.0, 1.0, uniforms=uniforms)
    dropped = pi_id_loss(policy, teacher, 1.0, 1.0, uniforms=uniforms, dropout=0.9)
    assert torch.allclose(dropped.u_policy, plain.u_policy)  # all components, at the same states
    assert not torch.allclose(dropped.x_dst, plain.x_dst)


def test_data_dependent_and_data_free():
    teacher, starts = Teacher(), []

    def student(x, t):
        starts.append((x, t))
        return teacher.student(x, t)

    x_0, g = random_state(b=500, spatial=()), torch.Generator().manual_seed(0)
    # 1-NFE starts in pure noise, whatever x_0 is
    for data in (x_0, 1e3 * torch.ones_like(x_0)):
        out = pi_id_data_dependent(student, teacher, data, generator=g.manual_seed(0))
        assert out.loss < 1e-20
    assert torch.equal(starts[0][0], starts[1][0]) and (starts[0][1] == 1).all()
    assert starts[0][0].std() == pytest.approx(1, abs=0.1)

    starts.clear()
    pi_id_data_dependent(student, teacher, 0 * x_0, nfe=4, shift=3.2, generator=g)
    x_src, t_src = starts[0]  # for data at 0, x_src = t_src eps
    levels = {round(shift_time(i / 4, 3.2), 6) for i in (1, 2, 3, 4)}
    assert {round(t, 6) for t in t_src.tolist()} == levels
    assert (x_src / t_src[:, None]).std() == pytest.approx(1, abs=0.1)

    starts.clear()
    noise = random_state(b=16, spatial=())
    segments = list(pi_id_data_free(student, teacher, noise, 3, 3.2, 0.5))
    assert [w for w, _ in segments] == pytest.approx([0.4, 0.4, 0.2])
    assert torch.equal(starts[0][0], noise)
    for (x, t), (_, out), i in zip(starts[1:], segments[:-1], (1, 2), strict=True):
        assert torch.equal(x, out.x_dst)
        assert t[0].item() == pytest.approx(shift_time(1 - 0.4 * i, 3.2))
    # the exact policy of each segment continues the one before: all of it is one rollout
    whole = rollout(teacher.student(noise, full(16, 1.0)), noise, 1.0, 0.0, 3.2, 640, "deis")
    options = {"total_substeps": 640, "solver": "deis"}
    segments = list(pi_id_data_free(student, teacher, noise, 3, 3.2, 0.5, **options))
    assert torch.allclose(segments[-1][1].x_dst, whole, atol=1e-3)


def test_generator_makes_the_loss_repeatable():
    policy = GMFlowPolicy(random_mixture(), random_state(), 1.0)

    def draw(seed):
        g = torch.Generator().manual_seed(seed)
        out = pi_id_loss(policy, lambda x, t: x, 1.0, 1.0, dropout=0.5, generator=g)
        return out.loss, out.t

    assert draw(0)[0] == draw(0)[0] and torch.equal(draw(0)[1], draw(0)[1])
    assert draw(0)[0] != draw(1)[0] and not torch.equal(draw(0)[1], draw(1)[1])


def train_components(spread: float) -> tuple[float, int]:
    """Trains a tiny student on a two-sided density from heads that start `spread` apart.

    Returns the largest distance between two means, and how many components ever lead."""
    torch.manual_seed(0)
    k = 4
    data = Teacher(k=2, std=0.2)
    data.centers, data.weights = torch.tensor([[-1.5, 0], [1.5, 0]]).double(), full(2, 0.5)
    net = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.SiLU(), torch.nn.Linear(32, k * 3))
    with torch.no_grad():  # k equal heads; the noise on the bias is the only difference
        net[2].weight.copy_(net[2].weight[:3].repeat(k, 1))
        net[2].bias.copy_(net[2].bias[:3].repeat(k) + spread * torch.randn(k * 3))
    net.double()

    def student(x, t):
        out = net(x).view(-1, k, 3)
        logstds = full(len(x), math.log(0.2))[:, None, None]
        return GMFlowPolicy(GaussianMixture(out[..., :2], logstds, out[..., 2:]), x, t)

    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(150):
        out = pi_id_data_dependent(student, data, torch.zeros(64, 2).double(), total_substeps=16)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    with torch.no_grad():
        policy = student(torch.randn(64, 2).double(), full(64, 1.0))
    means, _, logweights = policy.mixture
    distance = (means[:, :, None] - means[:, None]).norm(dim=-1).max().item()
    return distance, len(logweights[..., 0].exp().gt(0.1).any(0).nonzero())


def test_components_separate_only_from_different_starts():
    distance, used = train_components(spread=0.05)
    assert distance > 1.0 and used > 1
    distance, _ = train_components(spread=0.0)
    assert distance < 1e-9


# ---- segments, schedule, guidance, sampler -------------------------------------------------------


@pytest.mark.parametrize("nfe", [1, 2, 4, 7])
@pytest.mark.parametrize("f", [1.0, 0.5, 2.0])
def test_segments_tile_raw_time(nfe, f):
    base = 1 / (nfe - 1 + f)
    ends = [1 - i * base for i in range(nfe)]
    sizes = [base] * (nfe - 1) + [f * base]
    assert ends[-1] - sizes[-1] == pytest.approx(0)
    for end, size in zip(ends, sizes, strict=True):
        for inside in (end, end - 0.01 * size, end - 0.5 * size, end - 0.99 * size):
            assert segment_of(inside, nfe, f) == pytest.approx((end, size))
    tau = torch.rand(100)
    for value, src, size in zip(tau.tolist(), *(v.tolist() for v in segment_of(tau, nfe, f)),
                                strict=True):  # fmt: skip
        assert src >= value - 1e-6 and src - size <= value + 1e-6


@pytest.mark.parametrize("h", [0.0, 0.7, 1.0, math.inf])
def test_schedule_keeps_the_noise_level(h):
    """After the noise is added the state has t_to: alpha = 1 - t_to, sigma = t_to."""
    s = flow_map_schedule(4, 3.2, 0.5, h)
    tau = [1, 5 / 7, 3 / 7, 1 / 7]
    assert s.t_src.tolist() == pytest.approx([shift_time(v, 3.2) for v in tau], abs=1e-6)
    assert s.t_to.tolist() == pytest.approx([*s.t_src.tolist()[1:], 0])
    scale = 1 - s.t_to + s.t_to * s.m
    assert torch.allclose(scale * (1 - s.t_dst), 1 - s.t_to, atol=1e-6)
    sigma = ((scale * s.t_dst) ** 2 + s.t_to**2 * (1 - s.m**2)).sqrt()
    assert torch.allclose(sigma, s.t_to, atol=1e-6)
    if h == 0:
        assert torch.equal(s.m, torch.ones(4)) and torch.equal(s.t_dst, s.t_to)
    if h == math.inf:
        assert torch.equal(s.m, torch.zeros(4))
    if h == 1:  # m is the ratio of signal-to-noise ratios of t_src and t_to
        ratio = (1 - s.t_src) / s.t_src / ((1 - s.t_to) / s.t_to)
        assert torch.allclose(s.m, ratio, atol=1e-6)


def test_guidance():
    u_cond, u_uncond, x = (random_state(seed=i) for i in (1, 2, 3))
    t = torch.tensor([0.9, 0.5, 0.1]).double()
    u = guided_velocity(u_cond, u_uncond, 3.0, t, (0.2, 0.7))
    assert torch.equal(u[[0, 2]], u_cond[[0, 2]])
    assert torch.allclose(u[1], 3 * u_cond[1] - 2 * u_uncond[1])
    assert torch.equal(guided_velocity(u_cond, u_uncond, 1.0, 0.5), u_cond)
    change = guided_velocity(u_cond, u_uncond, 3.0, t, x=x, orthogonal=1.0) - u_cond
    x0 = (x - t.view(3, 1, 1, 1) * u_cond).flatten(1)
    change = change.flatten(1)
    assert (change * x0).sum(1).abs().max() < 1e-12
    removed = 2 * (u_cond - u_uncond).flatten(1) - change  # and what was taken away is along x0
    cosine = torch.nn.functional.cosine_similarity(removed, x0)
    assert torch.allclose(cosine.abs(), torch.ones(3).double())


def gaussian_student(calls):
    def student(x, t):
        calls.append(t)
        return Teacher().student(x, t)

    return student


def test_sample_calls_the_student_nfe_times_at_the_schedule():
    for nfe, f in [(1, 1.0), (3, 0.5), (4, 1.0)]:
        calls = []
        sample(gaussian_student(calls), random_state(spatial=()), nfe, 3.2, f, total_substeps=8)
        assert [t[0].item() for t in calls] == pytest.approx(
            flow_map_schedule(nfe, 3.2, f).t_src.tolist(), abs=1e-6
        )


def test_sample_with_an_exact_student_is_the_teachers_ode():
    noise = random_state(b=32, spatial=())
    x = rollout(Teacher().student(noise, full(32, 1.0)), noise, 1.0, 0.0, 1.0, 4096)
    for nfe in (1, 2, 5):
        assert (sample(gaussian_student([]), noise, nfe, solver="deis") - x).abs().max() < 0.02


def test_any_shift_starts_at_pure_noise():
    """s / (1 + (s - 1)) is 1 up to rounding, on either side of it."""
    noise = random_state(b=1, spatial=())
    for i in range(200):
        shift, calls = 1 + i * 0.037, []
        student = gaussian_student(calls)
        sample(student, noise, 2, shift, total_substeps=1)
        next(pi_id_data_free(student, Teacher(), noise, 2, shift, total_substeps=1))
        assert calls[0] == calls[2] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("h", [0.7, math.inf])
def test_stochastic_sampling_keeps_the_distribution(h):
    n, g = 4000, torch.Generator().manual_seed(0)
    noise = torch.randn(n, 2, generator=g, dtype=torch.float64)
    x = sample(gaussian_student([]), noise, 4, h=h, generator=g, total_substeps=64, solver="deis")
    data = Teacher().draw(200_000, g)
    assert torch.allclose(x.mean(0), data.mean(0), atol=0.08)
    assert torch.allclose(torch.cov(x.T), torch.cov(data.T), atol=0.08)
    deterministic = sample(gaussian_student([]), noise, 4, total_substeps=64, solver="deis")
    assert (x - deterministic).abs().mean() > 0.1  # and it is not the ODE


def test_sample_respects_the_generator():
    noise = random_state(spatial=())

    def draw(seed):
        g = torch.Generator().manual_seed(seed)
        return sample(gaussian_student([]), noise, 3, h=1.0, total_substeps=8, generator=g)

    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


def test_temperature_on_every_step_but_the_last(monkeypatch):
    steps, plain = [], GMFlowPolicy.temperature

    def recorded(self, T):
        steps.append((self.t_src[0].item(), T))
        return plain(self, T)

    monkeypatch.setattr(GMFlowPolicy, "temperature", recorded)
    noise = random_state(spatial=())
    sample(gaussian_student([]), noise, 4, temperature=0.5, total_substeps=8)
    assert steps == [(1.0, 0.5), (0.75, 0.5), (0.5, 0.5)]
    warm, cold = (
        sample(gaussian_student([]), noise, 1, temperature=T, total_substeps=8) for T in (1.0, 0.5)
    )
    assert torch.equal(cold, warm)


# ---- devices -------------------------------------------------------------------------------------


def fake_cuda_mixture(spatial, grad=False):
    ones = [1] * len(spatial)
    shapes = (2, 4, 3, *spatial), (2, 1, 1, *ones), (2, 4, 1, *spatial)
    leaves = [torch.randn(shape, device="cuda").requires_grad_(grad) for shape in shapes]
    return GaussianMixture(*leaves)


@needs_fake_cuda
@pytest.mark.parametrize("spatial", [pytest.param((), marks=pytest.mark.slow), (4, 5)])
@pytest.mark.parametrize("kind, options", [
    *[(kind, options) for kind in ("gmflow", "dx", "polynomial") for options in (
        {}, {"solver": "deis"}, {"batch_teacher": True},
        {"teacher_ratio": 0.5, "window_substeps": 4},
    )],
    ("gmflow", {"dropout": 0.2}), ("dx", {"solver": "exact"}),
])  # fmt: skip
def test_loss_and_backward_on_a_fake_gpu(spatial, kind, options):
    """FakeTensorMode raises on mixed devices and on any value that the host would have to read."""
    with FakeTensorMode():
        mixture = fake_cuda_mixture(spatial, grad=True)
        x, t_src = torch.randn(2, 3, *spatial, device="cuda"), torch.ones(2, device="cuda")
        if kind == "gmflow":
            policy = GMFlowPolicy(mixture, x, t_src)
        else:
            mode = "grid" if kind == "dx" else kind
            policy = DXPolicy(mixture.means, x, t_src, 1.0, 3.2, mode=mode)
        out = pi_id_loss(policy, lambda x, t: x, t_src, 1.0, 3.2, total_substeps=8, **options)
        gradients = backward(out.loss)
        parts = mixture if kind == "gmflow" else mixture[:1]
        assert all(gradients[part].shape == part.shape for part in parts)
        assert all(gradients[part].device.type == "cuda" for part in parts)
        assert out.x_dst.device.type == "cuda" and out.u_policy.shape == (4, 3, *spatial)


@needs_fake_cuda
@pytest.mark.parametrize("solver", ["euler", "deis", "exact"])
def test_a_rollout_between_numbers_forces_no_device_sync(solver):
    with FakeTensorMode():
        x = torch.randn(2, 3, 4, 5, device="cuda")
        policy = DXPolicy(torch.randn(2, 4, 3, 4, 5, device="cuda"), x, 1.0)
        for start, end in ((1.0, 0.0), (1, 0), (torch.ones(2, device="cuda"), 0.5)):
            longest = 0.5 if end == 0.5 else None  # tensor times need the bound
            rollout(policy, x, start, end, total_substeps=4, solver=solver, longest=longest)


def test_the_fake_backward_is_autograd():
    mixture = GaussianMixture(*(part.requires_grad_() for part in random_mixture()))
    out = pi_id_loss(GMFlowPolicy(mixture, random_state(), 1.0), lambda x, t: x, 1.0, 1.0)
    expected = torch.autograd.grad(out.loss, mixture, retain_graph=True)
    ours = backward(out.loss)
    for part, gradient in zip(mixture, expected, strict=True):
        assert torch.allclose(ours[part], gradient)


@needs_fake_cuda
@pytest.mark.parametrize("h, temperature, f", [(0.0, 1.0, 1.0), (1.0, 0.5, 0.5)])
def test_sampler_and_both_algorithms_on_a_fake_gpu(h, temperature, f):
    def student(x, t):
        assert x.device.type == t.device.type == "cuda"
        return GMFlowPolicy(fake_cuda_mixture((4, 5)), x, t)

    def teacher(x, t):
        return guided_velocity(x, -x, 2.0, t, (0.1, 0.7), x, 1.0)

    with FakeTensorMode():
        noise = torch.randn(2, 3, 4, 5, device="cuda", dtype=torch.bfloat16)
        args = {"nfe": 3, "shift": 3.2, "final_step_size_scale": f}
        x = sample(student, noise, h=h, temperature=temperature, total_substeps=8, **args)
        assert x.device.type == "cuda" and x.dtype == torch.float32
        for _, out in pi_id_data_free(student, teacher, noise, total_substeps=8, **args):
            assert out.loss.device.type == "cuda"
        args["final_step_size_scale"] = 1.0
        out = pi_id_data_dependent(student, teacher, noise, total_substeps=8, **args)
        assert out.loss.device.type == "cuda"


# ---- bad input and the file itself ---------------------------------------------------------------


def bad_calls():
    mixture, x = random_mixture(), random_state()
    policy = GMFlowPolicy(mixture, x, 1.0)

    def loss(teacher=lambda x, t: x, **options):
        return pi_id_loss(policy, teacher, 1.0, 1.0, **options)

    return {
        "(3, 4, 2, 3, 4)": lambda: GMFlowPolicy(mixture, x[:, :1], 1.0),
        "(1, 1, 1, 1, 1)": lambda: GMFlowPolicy(
            mixture._replace(logstds=mixture.logstds[:1]), x, 1.0),
        "velocities, x_src ((3, 4, 2, 3, 4)": lambda: DXPolicy(mixture.means, x[:, :, :1], 1.0),
        "must be (B, N >= 1, C, *)": lambda: DXPolicy(mixture.means[:, :0], x, 1.0),
        "mode 'cubic'": lambda: DXPolicy(mixture.means, x, 1.0, mode="cubic"),
        "solver 'rk4'": lambda: rollout(policy, x, 1.0, 0.0, solver="rk4"),
        "solver 'ab2'": lambda: loss(solver="ab2"),
        "teacher (6, 1, 3, 4): must be (6, 2, 3, 4)": lambda: loss(lambda x, t: x[:, :1]),
        "teacher (6, 2, 3, 1)": lambda: loss(lambda x, t: x[..., :1], batch_teacher=True),
        "teacher (6, 2, 3, 1): must": lambda: loss(lambda x, t: x[..., :1], teacher_ratio=0.5),
        "2 generators for 3 samples": lambda: loss(generator=[torch.Generator()] * 2),
        "nfe = 0": lambda: sample(lambda x, t: policy, x, nfe=0),
        "nfe = -1": lambda: flow_map_schedule(-1),
        "nfe = 0:": lambda: pi_id_data_dependent(Teacher().student, Teacher(), x, nfe=0),
    }  # fmt: skip


@pytest.mark.parametrize("message", list(bad_calls()))
def test_bad_input_is_named_in_one_line(message):
    with pytest.raises(ValueError) as error:
        bad_calls()[message]()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_file_needs_torch_only():
    tree = ast.parse(Path(piflow.__file__).read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"torch"}
