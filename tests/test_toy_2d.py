"""toy_2d.py: exact teachers against quadrature, metrics against numpy, and short whole runs."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import toy_2d
from common.cli import run_cli
from common.teachers import endpoint_rmse, integrate_teacher
from piflow_minimal import velocity_from_x0
from toy_2d import Settings


def checkerboard_cells() -> list[tuple[float, float]]:
    """Lower left corners of the eight filled unit squares, written down by hand."""
    return [(-2, -2), (-2, 0), (-1, -1), (-1, 1), (0, -2), (0, 0), (1, -1), (1, 1)]


def oracle_board_velocity(x: np.ndarray, t: float) -> np.ndarray:
    """(x - E[x_0 | x]) / t for one point: Gauss-Legendre on 60 pieces per interval, in numpy."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    logs, means = [], []
    for corner in checkerboard_cells():
        log_mass, mean = 0.0, []
        for axis in range(2):
            left = corner[axis] + np.arange(60)[:, None] / 60
            y = (left + (nodes + 1) / 120).ravel()
            log_density = -(((x[axis] - (1 - t) * y) / t) ** 2) / 2
            density = np.exp(log_density - log_density.max()) * np.tile(weights, 60)
            log_mass += log_density.max() + math.log(density.sum())
            mean.append((density * y).sum() / density.sum())
        logs.append(log_mass)
        means.append(mean)
    share = np.exp(np.array(logs) - max(logs))
    return (x - share @ np.array(means) / share.sum()) / t


@pytest.mark.parametrize("t", [1.0, 0.99, 0.85, 0.67, 0.5, 0.1, 0.02])
@pytest.mark.parametrize("scale", [1.0, 8.0])  # 8: far out in the tails
def test_checkerboard_teacher_equals_quadrature(t, scale):
    x = np.random.default_rng(0).normal(size=(12, 2)) * scale
    want = np.stack([oracle_board_velocity(point, t) for point in x])
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 2e-6)):
        teacher = toy_2d.make_density("checkerboard").to(dtype)
        got = teacher.velocity(torch.tensor(x, dtype=dtype), torch.full((12,), t, dtype=dtype))
        assert got.dtype == dtype
        error = np.abs(got.double().numpy() - want).max()
        assert error < tolerance * max(1, np.abs(want).max()) / min(1, t)


@pytest.mark.parametrize("name", toy_2d.DENSITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_teachers_are_finite_everywhere(name, dtype):
    teacher = toy_2d.make_density(name).to(dtype)
    x = torch.cat([torch.linspace(-1, 1, 51), torch.linspace(-60, 60, 50)]).to(dtype)
    x = torch.cartesian_prod(x, x)
    for t in (0.0, 1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0):
        u = teacher.velocity(x, torch.full((len(x),), t, dtype=dtype))
        assert u.isfinite().all()
        if t >= 0.1 and name == "checkerboard":  # the posterior mean cannot leave the board
            assert (x - t * u).abs().max() < 2.001


@pytest.mark.parametrize("name", ["checkerboard", "ring", "spiral", "pi"])
def test_teacher_is_the_score_of_the_noised_density(name):
    """u = -(x + t score) / (1 - t), with the score from autograd through a plain log density."""
    density = toy_2d.make_density(name).double()
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(64, generator=generator).double() * 0.9 + 0.05
    x = density.sample(64, generator).double() * (1 - t[:, None])
    x = (x + t[:, None] * torch.randn(64, 2, generator=generator)).requires_grad_()
    alpha, sigma = 1 - t[:, None, None], t[:, None, None]
    if name == "checkerboard":
        low = torch.tensor(checkerboard_cells()).double()  #                      (8, 2)
        upper = torch.special.ndtr((x[:, None] - alpha * low) / sigma)
        lower = torch.special.ndtr((x[:, None] - alpha * (low + 1)) / sigma)
        log_p = (upper - lower).clamp(min=1e-300).log().sum(2).logsumexp(1)
    else:
        var = (alpha * density.std) ** 2 + sigma**2
        square = (x[:, None] - alpha * density.centers).square().sum(2, keepdim=True)
        log_p = (-square / (2 * var) - var.log()).logsumexp(1)[:, 0]
    (score,) = torch.autograd.grad(log_p.sum(), x)
    want = -(x + t[:, None] * score) / (1 - t[:, None])
    torch.testing.assert_close(density.velocity(x.detach(), t), want.detach(), rtol=0, atol=1e-7)


def test_densities_are_of_unit_scale_and_where_they_should_be():
    generator = torch.Generator().manual_seed(0)
    points = {n: toy_2d.make_density(n).sample(20_000, generator) for n in toy_2d.DENSITIES}
    for x in points.values():
        assert (x.std(0) - 1.05).abs().max() < 0.15 and x.mean(0).abs().max() < 0.05
    board = points["checkerboard"]
    cells, counts = board.floor().unique(dim=0, return_counts=True)
    assert {tuple(c) for c in cells.tolist()} == set(checkerboard_cells())
    assert (counts - 2500).abs().max() < 250  #  five standard deviations
    assert toy_2d.make_density("checkerboard").inside(board).all()
    shifted = board + torch.tensor([1.0, 0.0])  # every filled square becomes an empty one
    assert not toy_2d.make_density("checkerboard").inside(shifted).any()
    angle = torch.atan2(*points["ring"].flip(1).T) / (math.pi / 4)
    assert (points["ring"].norm(dim=1) - 1.5).abs().mean() < 0.2
    assert (angle - angle.round()).abs().mean() < 0.15  #  0.25 if angles were even


def test_the_teacher_reaches_the_data():
    density = toy_2d.make_density("checkerboard")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1000, 2, generator=generator)
    x_0 = integrate_teacher(density.velocity, noise, toy_2d.STEPS, solver="heun")
    assert density.inside(x_0).float().mean() > 0.98
    assert toy_2d.energy_distance(x_0, density.sample(1000, generator)) < 0.01
    # At t = 1 the noise says nothing about x_0: one step ends at the mean of the data.
    assert integrate_teacher(density.velocity, noise, 1).abs().max() < 1e-5


def test_energy_distance_equals_the_numpy_formula():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(130, 2)), rng.normal(size=(77, 2)) + 0.3

    def mean_distance(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)).mean()

    want = 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)
    x_t, y_t = torch.tensor(x), torch.tensor(y)
    assert toy_2d.energy_distance(x_t, y_t) == pytest.approx(want, abs=1e-12)
    assert toy_2d.energy_distance(x_t.float(), y_t.float()) == pytest.approx(want, abs=1e-5)
    assert toy_2d.energy_distance(x_t, x_t) == pytest.approx(0, abs=1e-12)


def test_stratified_draws_fall_into_every_interval_once_in_any_order():
    generator = torch.Generator().manual_seed(0)
    draws = toy_2d.stratified((50, 4), generator)
    assert draws.shape == (50, 4)
    assert ((draws.flatten() * 200).floor().sort().values == torch.arange(200)).all()
    assert (draws.flatten().diff() < 0).float().mean() > 0.3
    assert not torch.equal(draws, toy_2d.stratified((50, 4), generator))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"policy": "dx"},
        {"nfe": 2},
        {"nfe": 2, "data_free": True},
        {"policy": "dx", "nfe": 2, "data_free": True},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()) or "default",
)
def test_short_training_approaches_the_teacher(options):
    density = toy_2d.make_density("ring")
    noise = torch.randn(500, 2, generator=torch.Generator().manual_seed(5))
    want = integrate_teacher(density.velocity, noise, 24, solver="heun")
    losses, errors = [], []  #  losses: squared errors of x_0
    for iterations in (1, 80):
        settings = Settings(iterations=iterations, batch=64, device="cpu", **options)
        student = toy_2d.train(density, settings, lambda i, out: losses.append(weighted(out)))
        errors.append(endpoint_rmse(toy_2d.student_sample(student, noise), want))
    assert errors[1] < 0.4 * errors[0], errors
    assert np.median(losses[-20:]) < 0.3 * np.median(losses[:10])


@pytest.mark.parametrize("policy, solver, lowest", [
    ("gmflow", "", 1 / 27), ("gmflow", "euler", 1 / 9), ("dx", "", 0.0),
])  # fmt: skip
def test_queries_stay_where_the_solver_evaluates_a_policy(policy, solver, lowest):
    """Not within the last of 9 substeps; deis: uniform in t^(1/1.5); exact: down to t = 0."""
    options = {"iterations": 2, "batch": 256, "total_substeps": 9, "device": "cpu"}
    settings, times = Settings(policy=policy, solver=solver, **options), []
    toy_2d.train(toy_2d.make_density("ring"), settings, lambda i, out: times.append(out.t))
    times = torch.cat(times)
    assert lowest - 1e-6 <= times.min() < lowest + 0.01 and 0.99 < times.max() <= 1


@pytest.mark.parametrize("data_free", [False, True])
def test_every_segment_gets_a_batch(data_free):
    """With data a point is in one of two segments; from noise in both, and `out` is the last."""
    options = {"nfe": 2, "iterations": 1, "batch": 200, "num_intermediates": 1, "device": "cpu"}
    settings, times = Settings(data_free=data_free, **options), []
    toy_2d.train(toy_2d.make_density("ring"), settings, lambda i, out: times.extend(out.t))
    assert len(times) == (200 if data_free else 400)
    assert 160 <= sum(t <= 0.5 for t in times) <= 240


@pytest.mark.parametrize("policy", ["gmflow", "dx"])
def test_student_starts_with_components_that_differ_where_they_must(policy):
    torch.manual_seed(0)
    student = toy_2d.Student(policy)
    start = student(torch.randn(6, 2), torch.ones(6))
    x = torch.randn(6, 2)
    assert start.velocity(x, torch.full((6,), 0.5)).isfinite().all()
    if policy == "gmflow":
        means = start.mixture.means
        assert torch.pdist(means[0]).min() > 1e-3 and means.std(1).min() > 0.5
        assert start.mixture.logweights.shape == (6, 64, 1)
        assert start.mixture.logstds.shape == (6, 1, 1)
    else:
        assert start.velocities.shape == (6, toy_2d.POLICIES["dx"].components, 2)


def run_tiny(folder, *extra) -> dict:
    arguments = ["--iterations", "6", "--batch", "32", "--points", "200", "--device", "cpu"]
    toy_2d.main([*arguments, "--out", str(folder), *extra])
    return json.loads((folder / "metrics.json").read_text())


class Steps:
    """A policy of the reader's own: x0_hat is piecewise constant in t, on n equal intervals."""

    def __init__(self, points, x_src, t_src):
        self.points, self.x_src, self.t_src = points, x_src, t_src  #  (B, n, 2), (B, 2), (B,)

    def velocity(self, x, t):
        t, n = torch.as_tensor(t).expand(len(x)), self.points.shape[1]
        piece = (t * n).long().clamp(max=n - 1)
        return velocity_from_x0(x, t, self.points[torch.arange(len(x)), piece])

    def detach(self):
        return Steps(self.points.detach(), self.x_src.detach(), self.t_src)


def test_a_third_policy_is_one_entry_of_the_table(monkeypatch, tmp_path):
    def make(velocities, others, x_src, t_src, segment_size):
        return Steps(x_src[:, None] - t_src[:, None, None] * velocities, x_src, t_src)

    kind = toy_2d.PolicyKind(8, lambda n: 2 * n, make, solver="euler", t_power=2.0)
    monkeypatch.setitem(toy_2d.POLICIES, "steps", kind)
    metrics = run_tiny(tmp_path, "--policy", "steps", "--density", "ring", "--components", "6")
    assert metrics["policy"] == "steps"

    losses, density = [], toy_2d.make_density("ring")
    settings = Settings(policy="steps", iterations=80, batch=64, device="cpu")
    toy_2d.train(density, settings, lambda i, out: losses.append(weighted(out)))
    assert np.median(losses[-20:]) < 0.5 * np.median(losses[:10])
    with pytest.raises(ValueError, match="'exact'.*flow"):
        toy_2d.train(density, replace(settings, solver="exact"))


def weighted(out) -> float:
    """Squared error of x_0."""
    return ((out.u_policy - out.u_teacher).square().mean(1) * out.t**2).mean().item()


def test_run_writes_what_it_says(tmp_path, capsys):
    metrics = run_tiny(tmp_path, "--nfe", "2")
    assert metrics["iterations"] == 6 and metrics["nfe"] == 2
    assert metrics["data"]["energy_distance"] > 0
    for name in ("student", "teacher"):
        row = metrics[name]
        assert row.keys() == {"endpoint_rmse", "energy_distance", "inside"}
        assert 0 <= row["inside"] <= 1
    assert metrics["few_steps"].keys() == {"endpoint_rmse", "energy_distance"}
    assert metrics["teacher"]["endpoint_rmse"] == 0
    files = {"metrics.json", "overview.png", "student.pt"}
    assert {path.name for path in tmp_path.iterdir()} == files
    printed = capsys.readouterr().out
    assert str(tmp_path) in printed and re.search("few_steps +endpoint_rmse", printed)


def test_saved_student_is_the_one_that_was_measured(tmp_path):
    metrics = run_tiny(tmp_path, "--density", "ring", "--policy", "dx", "--data-free", "--nfe", "2")
    assert "inside" not in metrics["student"]
    student = toy_2d.load_student(tmp_path / "student.pt")
    assert student.config["policy"] == "dx" and student.config["nfe"] == 2
    noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
    teacher = toy_2d.make_density("ring").velocity
    want = integrate_teacher(teacher, noise, toy_2d.STEPS, solver="heun")
    got = endpoint_rmse(toy_2d.student_sample(student, noise), want)
    assert got == pytest.approx(metrics["student"]["endpoint_rmse"], rel=1e-5)


def test_weights_and_metrics_survive_a_figure_that_fails(tmp_path, monkeypatch):
    def fails(*args):
        raise RuntimeError("no canvas")

    monkeypatch.setattr(toy_2d, "draw_overview", fails)
    with pytest.raises(RuntimeError, match="no canvas"):
        run_tiny(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "student.pt"}


def test_a_result_that_is_not_finite_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_2d, "student_sample", lambda student, noise: noise * math.nan)
    with pytest.raises(ValueError, match="endpoint_rmse of the student is nan"):
        run_tiny(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["student.pt"]


def test_seed_decides_the_result():
    def trained(seed):
        settings = Settings(iterations=5, batch=32, seed=seed, device="cpu")
        student = toy_2d.train(toy_2d.make_density("pi"), settings)
        return torch.cat([p.flatten() for p in student.parameters()])

    assert torch.equal(trained(3), trained(3))
    assert not torch.equal(trained(3), trained(4))


def test_the_device_is_the_cpu_where_mps_lacks_an_operator(monkeypatch, capsys):
    """PyTorch 2.5 to 2.10: there is an MPS device, but no erfcx on it."""

    def erfcx(x):
        raise NotImplementedError("The operator 'aten::special_erfcx.out' is not implemented")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda n, device: torch.full((n,), 1.0))
    monkeypatch.setattr(torch.special, "erfcx", erfcx)
    assert toy_2d.choose_device("auto") == "cpu"
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["--density", "squares"], "--density.*'squares'.*checkerboard.*ring.*spiral.*pi"),
        (["--policy", "gm"], "--policy.*'gm'.*gmflow.*dx"),
        (["--solver", "rk4"], "--solver.*'rk4'.*euler.*deis.*exact"),
        (["--solver", "exact"], "solver 'exact'.*flow"),
        (["--nfe", "0"], "--nfe .*0.*at least 1"),
        (["--iterations", "-5"], "--iterations .*-5.*at least 1"),
        (["--batch", "0"], "--batch .*0.*at least 1"),
        (["--lr", "0"], "--lr .*0.*above 0"),
        (["--lr", "nan"], "--lr .*nan.*above 0"),
        (["--components", "0"], "--components .*0.*at least 1"),
        (["--points", "1"], "--points .*1.*at least 100"),
        (["--points", "200000"], "--points .*200000.*at most 50000"),  # all pairs: hours
        (["--seed", str(2**64)], "--seed .*18446744073709551616.*at most"),
        (["--device", "abacus"], "--device 'abacus'"),
        (["--lr", "1e30", "--iterations", "3"], "loss is .*--lr"),
    ],
)
def test_bad_arguments_end_in_one_line_and_write_nothing(tmp_path, arguments, wanted):
    out = tmp_path / "new"
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: toy_2d.main([*arguments, "--out", str(out)]))
    message = str(stopped.value)  # a string: Python prints it and exits with 1
    assert re.search(wanted, message) and "\n" not in message
    assert not list(out.glob("*"))


def test_out_must_not_be_a_file(tmp_path):
    file = tmp_path / "taken"
    file.write_text("mine")
    with pytest.raises(OSError, match="taken"):
        toy_2d.main(["--out", str(file)])
    assert file.read_text() == "mine"
