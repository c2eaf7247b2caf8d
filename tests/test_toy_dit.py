"""common/static_policy.py and toy_dit_imagenet.py: small runs, known teachers, bad input."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from common import fashion
from common.cli import parse
from common.static_policy import (
    INTERVALS,
    StaticPolicy,
    TeacherPath,
    fit,
    policy_trajectory,
    psnr_db,
    run_fit,
    run_toy,
    stratified,
    teacher_trajectory,
)
from imagenet.checkpoints import init_student_from_teacher, load_dit, save_dit
from imagenet.dit import DiTConfig
from piflow_minimal import DXPolicy, GMFlowPolicy, pi_id_loss, shift_time
from toy_dit_imagenet import PRESETS, Settings, class_names, find_class, main

QUICK = Settings(
    components=4, iterations=20, lr=3e-2, total_substeps=16, solver="deis", teacher_steps=32,
    time_weight=1.0,
)  # fmt: skip
SHORT = [
    "--cloning", "5", "--iterations", "20", "--total-substeps", "8", "--teacher-steps", "32",
    "--device", "cpu",
]  # fmt: skip


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def decay(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """dx/dt = x: from t = 1 to t = 0 every state shrinks by e."""
    return x


# ---- Trajectories and metrics --------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.2])
def test_reference_follows_a_known_solution(shift):
    x = noise()
    states = teacher_trajectory(decay, x, 256, shift)
    t = shift_time(torch.linspace(1, 0, INTERVALS + 1), shift)
    assert states.shape == (INTERVALS + 1, 1, 2, 4, 4)
    assert (states - x * (t - 1).exp().view(-1, 1, 1, 1, 1)).abs().max() < 1e-3


@pytest.mark.parametrize("solver", ["euler", "exact"])
def test_policy_states_end_at_a_constant_x0(solver):
    x, u = noise(), noise(1)
    states = policy_trajectory(StaticPolicy(x, u, "dx", 2)(), 1.0, 64, solver)
    assert states.shape == (INTERVALS + 1, 1, 2, 4, 4) and torch.equal(states[0], x)
    t = torch.linspace(1, 0, INTERVALS + 1).view(-1, 1, 1, 1, 1)
    assert (states - (x - (1 - t) * u)).abs().max() < 1e-5  # a straight line to x_0 = x - u


def test_metrics_of_known_trajectories():
    a = torch.zeros(1, 1, 8, 8)
    assert psnr_db(a, a + 0.02) == pytest.approx(40.0, abs=1e-3)  # 20 log10(2 / 0.02)
    assert psnr_db(a + 1.5, a + 1.0) > 100  # outside [-1, 1] is clipped


# ---- The static policy and its training ----------------------------------------------------------


def test_initial_policies():
    x, u = noise(), noise(1)
    policy = StaticPolicy(x, u, components=256)()
    assert isinstance(policy, GMFlowPolicy)
    means, logstds, logweights = policy.mixture
    spread = means - u[:, None]
    assert spread.std().item() == pytest.approx(0.5, rel=0.05) and abs(spread.mean()) < 0.05
    assert logstds.shape == (1, 1, 1, 1, 1) and logstds.item() == pytest.approx(math.log(0.05))
    assert (logweights - math.log(1 / 256)).abs().max() < 1e-5
    dx = StaticPolicy(x, u, "dx", 4, shift=3.2)()
    assert isinstance(dx, DXPolicy) and dx.shift == 3.2
    assert torch.equal(dx.velocities, u[:, None].expand(1, 4, 2, 4, 4))


def test_stratified_query_times():
    times = stratified(7, 5, torch.Generator().manual_seed(0))
    assert torch.equal((times * 5).floor(), torch.arange(5.0).expand(7, 5))  # one in each fifth


@pytest.mark.parametrize("policy", ["gmflow", "dx"])
def test_fit_lowers_the_loss(policy):
    settings, x = dataclasses.replace(QUICK, policy=policy), noise()
    static = StaticPolicy(x, x, policy, 4, generator=torch.Generator().manual_seed(0))

    def loss() -> float:  # always at the same 32 times
        generator = torch.Generator().manual_seed(2)
        options = {"num_intermediates": 32, "window_substeps": 3, "generator": generator}
        return pi_id_loss(static(), decay, 1.0, 1.0, **options).loss.item()

    before, generator = loss(), torch.Generator().manual_seed(1)
    losses = fit(static, decay, x[None], settings, generator)
    assert losses.shape == (20,) and losses.isfinite().all() and loss() < 0.8 * before


def test_learning_rate_is_constant_or_falls_to_zero():
    """Adam moves a parameter by at most about the rate: the last steps say what it was."""
    x, moved = noise(), {}
    for lr_decay in ("none", "cosine"):
        settings = dataclasses.replace(QUICK, lr_decay=lr_decay, lr=1e-2, iterations=40)
        static = StaticPolicy(x, x, components=4, generator=torch.Generator().manual_seed(0))
        weights = []

        def teacher(x, t, weights=weights, static=static):
            weights.append(static.velocities.detach().clone())
            return torch.sin(3 * x)

        fit(static, teacher, x[None], settings, torch.Generator().manual_seed(1))
        steps = torch.stack(weights[::2]).diff(dim=0).abs().flatten(1).amax(1)
        moved[lr_decay] = (steps[-1] / steps[:10].mean()).item()
    assert moved["cosine"] < 0.05 and moved["none"] > 0.2


@pytest.mark.parametrize("shift", [1.0, 3.2])
def test_cloning_compares_on_the_teachers_trajectory(shift):
    """Between the stored states too: dx/dt = x has the solution x(t) = x(1) exp(t - 1)."""
    x = noise()
    path = TeacherPath(decay, teacher_trajectory(decay, x, 256, shift), shift)
    for place in (0.0, 0.4, 7.5, 31.9):
        state, t, u = path.at(place)
        i, a = int(place), place % 1  # linear in t between the stored times
        low, high = (shift_time(torch.tensor(1 - j / INTERVALS), shift) for j in (i + 1, i))
        assert t.item() == pytest.approx((high + a * (low - high)).item(), abs=1e-6)
        assert (state - x * (t - 1).exp()).abs().max() < 1e-4
        assert (u - x * (t - 1).exp()).abs().max() < 1e-3


def test_loss_of_cloning():
    """A policy with x0_hat = 0 has pi = x/t, the teacher x: t^2 |pi - u|^2 = (1 - t)^2 |x(t)|^2."""
    x = noise()
    path, policy = TeacherPath(decay, teacher_trajectory(decay, x, 256)), StaticPolicy(x, x, "dx")()
    settings = dataclasses.replace(QUICK, num_intermediates=500, time_weight=2.0)
    loss = path.loss(policy.detach(), settings, torch.Generator().manual_seed(0))
    t = (torch.arange(500) + 0.5) / 500
    expected = ((1 - t) * (t - 1).exp()).square().mean() * x.square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)


@pytest.mark.parametrize("policy", ["gmflow", "dx"])
def test_cloning_leads_to_the_teachers_end(policy):
    reference = teacher_trajectory(decay, noise(), 256)
    settings = dataclasses.replace(QUICK, policy=policy, cloning=300, iterations=1, lr=1e-6)
    run = run_fit(decay, reference, torch.tanh, settings)
    distances = (run.states - reference).square().mean((1, 2, 3, 4)).sqrt().tolist()
    assert run.metrics["trajectory_rmse"] == pytest.approx(distances, abs=1e-6)
    assert run.metrics["endpoint_rmse"] == run.metrics["trajectory_rmse"][-1]
    assert run.metrics["t"][8] == 0.75
    moved = (reference[-1] - reference[0]).square().mean().sqrt().item()
    assert run.metrics["endpoint_rmse"] < 0.1 * moved  # 0.58 before


def test_same_seed_same_run():
    reference = teacher_trajectory(decay, noise(), 32)
    settings = dataclasses.replace(QUICK, cloning=10)
    first, second = (run_fit(decay, reference, torch.tanh, settings) for _ in range(2))
    assert torch.equal(first.states, second.states) and torch.equal(first.losses, second.losses)


def test_sweep_in_miniature(tmp_path, monkeypatch):
    monkeypatch.setattr("common.static_policy.SIZES", {"gmflow": (1, 8), "dx": (2, 8)})
    settings = dataclasses.replace(QUICK, iterations=40, sweep=True, out=tmp_path)
    run_toy(decay, noise(), lambda x: x, settings, "a decay", about={"class": "none"})
    result = json.loads((tmp_path / "sweep.json").read_text())
    psnr = {(run["policy"], run["size"]): run["endpoint_psnr_db"] for run in result["runs"]}
    assert list(psnr) == [("gmflow", 1), ("gmflow", 8), ("dx", 2), ("dx", 8)]
    assert psnr["gmflow", 8] > psnr["gmflow", 1] + 5  # one component cannot bend its path so far
    assert result["class"] == "none" and result["runs"][0]["settings"]["iterations"] == 40
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


# ---- What is not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["teacher", "decoder"])
def test_what_is_not_finite_is_an_error_and_nothing_is_written(tmp_path, what):
    def broken(x: torch.Tensor, t: torch.Tensor | None = None) -> torch.Tensor:
        return x / 0 if t is None or t[0] < 0.5 else x

    settings = dataclasses.replace(QUICK, iterations=2, out=tmp_path / "out")
    teacher, decode = (broken, torch.tanh) if what == "teacher" else (decay, broken)
    with pytest.raises(ValueError, match="not finite"):
        run_toy(teacher, noise(), decode, settings, "broken")
    assert not any(settings.out.iterdir())


def test_metrics_are_there_although_the_figure_fails(tmp_path, monkeypatch):
    def fails(*args):
        raise OSError("no space left")

    monkeypatch.setattr("common.plots.static_policy", fails)
    settings = dataclasses.replace(QUICK, iterations=2, out=tmp_path)
    with pytest.raises(OSError, match="no space left"):
        run_toy(decay, noise(), torch.tanh, settings, "decay")
    assert math.isfinite(json.loads((tmp_path / "metrics.json").read_text())["endpoint_psnr_db"])
    weights = torch.load(tmp_path / "policy.pt", weights_only=True)
    assert weights["velocities"].shape == (1, 4, 2, 4, 4)


# ---- The script ----------------------------------------------------------------------------------


def test_script_with_the_shipped_teacher(tmp_path, capsys):
    main([*SHORT, "--class", "Bag", "--out", str(tmp_path)])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    settings = metrics["settings"]
    assert metrics["class"] == "bag" and settings["teacher"] == "tiny"
    assert settings["components"] == 32 and settings["seed"] == 42
    assert len(metrics["t"]) == len(metrics["trajectory_rmse"]) == INTERVALS + 1
    assert metrics["trajectory_rmse"][0] == 0 and metrics["trajectory_rmse"][-1] > 0
    assert metrics["trajectory_rmse"][-1] == metrics["endpoint_rmse"]
    assert "endpoint PSNR" in capsys.readouterr().out
    assert (tmp_path / "toy.png").read_bytes()[:4] == b"\x89PNG"


def test_damaged_teacher(tmp_path):
    net = load_dit(fashion.TEACHER)
    net.blocks[3].mlp.fc2.weight.data[0, 0] = float("nan")
    save_dit(net, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="not finite"):
        main([*SHORT, "--teacher", str(tmp_path / "nan.safetensors"), "--class", "bag",
              "--out", str(tmp_path / "out")])  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ankle boot", "trouser"])
def test_default_run_reaches_40_db(tmp_path, name):
    main(["--class", name, "--out", str(tmp_path)])
    assert json.loads((tmp_path / "metrics.json").read_text())["endpoint_psnr_db"] > 40


@pytest.mark.parametrize("teacher", ["repa", "fm"])
def test_published_defaults_of_the_real_teachers(teacher):
    settings = parse(Settings, "", ["--teacher", teacher], PRESETS, by="teacher")
    expected = {
        "policy": "gmflow", "components": 32, "iterations": 5000, "lr": 5e-3, "seed": 42,
        "num_intermediates": 2, "total_substeps": 128, "solver": "euler", "time_weight": 0.0,
        "guidance": 4.0, "guidance_interval": (0.0, 1.0), "class_name": "jay", "stratified": False,
    }  # fmt: skip
    assert expected.items() <= dataclasses.asdict(settings).items()


def test_defaults_of_the_tiny_teacher_and_of_a_file():
    tiny = parse(Settings, "", [], PRESETS, by="teacher")
    assert (tiny.guidance, tiny.guidance_interval) == (2.5, (0.0, 0.8))
    file = parse(Settings, "", ["--teacher", "my.pt"], PRESETS, by="teacher")
    assert (file.teacher, file.iterations, file.guidance) == ("my.pt", 5000, 4.0)


def test_class_names():
    names = class_names(DiTConfig(num_classes=1000))
    assert find_class("jay", names) == 17 and find_class("980", names) == 980
    assert find_class("Trouser", class_names(load_dit(fashion.TEACHER).config)) == 1
    assert class_names(DiTConfig(num_classes=10)) == [str(i) for i in range(10)]
    for unknown in ("jai", "1000"):
        with pytest.raises(ValueError, match=f"--class '{unknown}' is unknown.*index below 1000"):
            find_class(unknown, names)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--iterations", "0"], "--iterations is 0; it must be at least 1"),
        (["--components", "-1"], "--components is -1"),
        (["--lr", "nan"], "--lr is nan"),
        (["--policy", "mlp"], "--policy: invalid choice: 'mlp'"),
        (["--solver", "rk4"], "--solver: invalid choice: 'rk4'"),
        (["--solver", "exact"], "--solver: invalid choice: 'exact'"),
        (["--teacher-steps", "100"], "--teacher-steps: invalid choice: 100"),
        (["--time-weight", "-1"], "--time-weight is -1"),
        (["--lr-decay", "linear"], "--lr-decay: invalid choice: 'linear'"),
        (["--seed", str(2**64)], "--seed is 18446744073709551616; it must be"),
        (["--guidance-interval", "0.8", "0.1"], "--guidance-interval is 0.8 0.1"),
        (["--guidance", "-1"], "--guidance is -1"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--device", "abacus"], "abacus"),
        (["--class", "hat"], "--class 'hat' is unknown"),
        (["--teacher", "nothing.pt"], "no file nothing.pt"),
        (["--iters", "5"], "unrecognized arguments: --iters"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, arguments, message):
    out = tmp_path / "out"
    with pytest.raises((ValueError, OSError), match=message) as error:
        main([*arguments, "--out", str(out)])
    assert "\n" not in str(error.value) and not out.exists()


def test_students_and_foreign_files_are_no_teachers(tmp_path):
    student = init_student_from_teacher(load_dit(fashion.TEACHER), "dx", 2)
    save_dit(student, tmp_path / "student.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="head is 'velocity', the file states 'dx'"):
        main(["--teacher", str(tmp_path / "student.safetensors")])
    with pytest.raises(ValueError, match="no network of a known layout"):
        main(["--teacher", str(tmp_path / "other.safetensors")])
    with pytest.raises(FileExistsError, match="File exists.*file"):
        main(["--out", str(tmp_path / "file")])
