"""toy_2d.py: exact teachers against quadrature, metrics against numpy, and short whole runs."""

import json
import math
import re

import numpy as np
import pytest
import torch

import common.cli as helpers
import toy_2d


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


def test_teacher_sampler_reaches_the_data():
    density = toy_2d.make_density("checkerboard")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1000, 2, generator=generator)
    x_0 = toy_2d.teacher_sample(density, noise, 128)
    assert density.inside(x_0).float().mean() > 0.98
    assert toy_2d.energy_distance(x_0, density.sample(1000, generator)) < 0.01
    # At t = 1 the noise says nothing about x_0: one step ends at the mean of the data.
    assert toy_2d.teacher_sample(density, noise, 1).abs().max() < 1e-5


def test_metrics_equal_the_numpy_formulas():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(130, 2)), rng.normal(size=(77, 2)) + 0.3

    def mean_distance(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)).mean()

    want = 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)
    x_t, y_t = torch.tensor(x), torch.tensor(y)
    assert toy_2d.energy_distance(x_t, y_t) == pytest.approx(want, abs=1e-12)
    assert toy_2d.energy_distance(x_t.float(), y_t.float()) == pytest.approx(want, abs=1e-5)
    assert toy_2d.energy_distance(x_t, x_t) == pytest.approx(0, abs=1e-12)
    rmse = toy_2d.endpoint_rmse(x_t, x_t + torch.tensor([3.0, 4.0]))
    assert rmse == pytest.approx(5.0)


def test_colors_follow_the_noise_smoothly():
    noise = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    colors = toy_2d.colors_of(noise)
    assert colors.shape == (500, 3) and colors.min() >= 0 and colors.max() <= 1
    assert np.abs(toy_2d.colors_of(noise + 1e-3) - colors).max() < 1e-2
    corners = toy_2d.colors_of(torch.tensor([[-9.0, -9], [-9, 9], [9, -9], [9, 9]]))
    distances = np.abs(corners[:, None] - corners[None]).sum(-1) + 9 * np.eye(4)
    assert distances.min() > 0.5


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
    want = toy_2d.teacher_sample(density, noise, 64)
    few, more = (toy_2d.train(density, iters=n, batch=64, **options) for n in (1, 80))
    errors = [
        toy_2d.endpoint_rmse(toy_2d.student_sample(run.student, noise), want) for run in (few, more)
    ]
    assert errors[1] < 0.4 * errors[0], errors
    assert more.losses.shape == (80,) and more.losses.isfinite().all()
    assert more.losses[-20:].median() < 0.3 * more.losses[:10].median()
    assert more.loss_by_t.shape == (toy_2d.PERIODS, toy_2d.BINS)
    assert more.loss_by_t[-1].nanmean() > 0


@pytest.mark.parametrize("policy, power", [("gmflow", 0), ("dx", 2)])
def test_loss_by_t_adds_up_to_the_loss(policy, power):
    """Intermediate times are uniform, so the loss is the mean over bins, times t^2 for DX."""
    run = toy_2d.train(toy_2d.make_density("ring"), policy, iters=1, batch=8192)
    t = (torch.arange(toy_2d.BINS) + 0.5) / toy_2d.BINS
    want = (run.loss_by_t[0] * t**power).mean()
    assert float(run.losses[0]) == pytest.approx(float(want), rel=0.15)
    assert run.loss_by_t[1:].isnan().all()


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
        assert start.mixture.logweights.shape == (6, 32, 1)
        assert start.mixture.logstds.shape == (6, 1, 1)
    else:
        assert start.velocities.shape == (6, toy_2d.COMPONENTS["dx"], 2)


def run_tiny(folder, *extra) -> dict:
    toy_2d.main(["--iters", "6", "--batch", "32", "--points", "200", "--out", str(folder), *extra])
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture
def short_teacher(monkeypatch):
    monkeypatch.setattr(toy_2d, "TEACHER_STEPS", 24)
    original = toy_2d.teacher_sample

    def teacher_sample(density, noise, steps=24, callback=None):
        return original(density, noise, steps, callback)

    monkeypatch.setattr(toy_2d, "teacher_sample", teacher_sample)


def test_run_writes_what_it_says(tmp_path, capsys, short_teacher):
    metrics = run_tiny(tmp_path, "--device", "cpu", "--compare", "--nfe", "2")
    assert {"density", "policy", "nfe", "iters", "train_seconds", "seed"} <= metrics.keys()
    assert (metrics["density"], metrics["policy"], metrics["nfe"]) == ("checkerboard", "gmflow", 2)
    assert metrics["noise_floor"] > 0
    for name, nfe in (("student", 2), ("teacher", 24), ("teacher_same_nfe", 2)):
        row = metrics[name]
        assert row.keys() == {"nfe", "endpoint_rmse", "energy_distance", "inside_fraction"}
        assert row["nfe"] == nfe and 0 <= row["inside_fraction"] <= 1
    assert metrics["teacher"]["endpoint_rmse"] == 0
    assert {"Euler 1", "Euler 4", "gmflow", "dx", "teacher"} <= metrics["compare"].keys()
    files = {"metrics.json", "overview.png", "training.png", "student.pt", "compare.png"}
    assert {path.name for path in tmp_path.iterdir()} == files
    printed = capsys.readouterr().out
    assert str(tmp_path) in printed and re.search(r"teacher_same_nfe +2 ", printed)


def test_saved_student_is_the_one_that_was_measured(tmp_path, short_teacher):
    metrics = run_tiny(tmp_path, "--density", "ring", "--policy", "dx", "--data-free", "--nfe", "2")
    assert "inside_fraction" not in metrics["student"]
    student = toy_2d.load_student(tmp_path / "student.pt")
    assert student.config["policy"] == "dx" and student.config["nfe"] == 2
    noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
    want = toy_2d.teacher_sample(toy_2d.make_density("ring"), noise)
    got = toy_2d.endpoint_rmse(toy_2d.student_sample(student, noise), want)
    assert got == pytest.approx(metrics["student"]["endpoint_rmse"], rel=1e-5)


def test_seed_decides_the_result():
    def trained(seed):
        run = toy_2d.train(toy_2d.make_density("pi"), iters=5, batch=32, seed=seed)
        return torch.cat([p.flatten() for p in run.student.parameters()])

    assert torch.equal(trained(3), trained(3))
    assert not torch.equal(trained(3), trained(4))


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["--density", "squares"], "--density 'squares'.*checkerboard, ring, spiral, pi"),
        (["--policy", "gm"], "--policy 'gm'.*gmflow, dx"),
        (["--nfe", "0"], "--nfe 0.*at least 1"),
        (["--iters", "-5"], "--iters -5.*at least 1"),
        (["--batch", "0"], "--batch 0.*at least 1"),
        (["--lr", "0"], "--lr 0.*positive"),
        (["--lr", "nan"], "--lr nan.*positive"),
        (["--components", "-1"], "--components -1.*at least 0"),
        (["--points", "1"], "--points 1.*at least 100"),
        (["--device", "abacus"], "--device 'abacus'"),
    ],
)
def test_bad_arguments_end_in_one_line_and_write_nothing(tmp_path, capsys, arguments, wanted):
    out = tmp_path / "new"
    with pytest.raises(SystemExit) as stopped:
        helpers.run_cli(lambda: toy_2d.main([*arguments, "--out", str(out)]))
    message = str(stopped.value)  # a string: Python prints it and exits with 1
    assert re.search(wanted, message) and "\n" not in message
    assert not out.exists() and capsys.readouterr().out == ""


def test_out_must_not_be_a_file(tmp_path):
    file = tmp_path / "taken"
    file.write_text("mine")
    with pytest.raises(ValueError, match="--out .*taken.*folder"):
        toy_2d.main(["--out", str(file)])
    assert file.read_text() == "mine"


def test_an_overflowed_gradient_does_not_end_the_training(monkeypatch):
    density = toy_2d.make_density("ring")
    plain, calls = density.velocity, []

    def velocity(x, t):
        calls.append(t)
        return plain(x, t) * (math.inf if len(calls) == 5 else 1.0)

    monkeypatch.setattr(density, "velocity", velocity)
    training = toy_2d.train(density, iters=8, batch=32)
    assert len(calls) == 16
    assert not training.losses.isfinite().all()  # it did happen
    assert all(weight.isfinite().all() for weight in training.student.parameters())
