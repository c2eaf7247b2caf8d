"""common/static_policy.py and toy_dit_imagenet.py: small real runs, exactly known teachers, bad input."""

import dataclasses
import json
import math
import sys

import pytest
import torch
from safetensors.torch import save_file

import toy_dit_imagenet
from common.static_policy import (
    StaticPolicy,
    ToySettings,
    fit,
    fit_and_compare,
    follow_policy,
    follow_teacher,
    psnr_db,
    run_sweep,
)
from imagenet import fashion
from imagenet.checkpoints import load_dit, save_dit
from imagenet.dit import DiTConfig
from piflow_minimal import DXPolicy, GMFlowPolicy, pi_id_loss
from toy_dit_imagenet import class_names, find_class, main

QUICK = ToySettings(components=4, iters=20, substeps=16, teacher_steps=32)


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def decay(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """dx/dt = x: from t = 1 to t = 0 every state shrinks by e."""
    return x


# -- trajectories and metrics --------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.2])
def test_reference_follows_a_known_solution(shift):
    settings, x = dataclasses.replace(QUICK, substeps=8, teacher_steps=256), noise()
    states = follow_teacher(decay, x, settings, shift)
    tau = torch.linspace(1, 0, 9)
    t = shift * tau / (1 + (shift - 1) * tau)
    expected = x * (t - 1).exp().view(-1, 1, 1, 1, 1)
    assert states.shape == (9, 1, 2, 4, 4)
    assert (states - expected).abs().max() < 1e-3


def test_policy_states_end_at_a_constant_x0():
    x, u = noise(), noise(1)
    policy = StaticPolicy(dataclasses.replace(QUICK, policy="dx", components=1), x, u)()
    states = follow_policy(policy, dataclasses.replace(QUICK, solver="euler"))
    assert states.shape == (17, 1, 2, 4, 4) and torch.equal(states[0], x)
    assert (states[-1] - (x - u)).abs().max() < 1e-5  # a straight line to x_0 = x - u
    assert (states[8] - (x - u / 2)).abs().max() < 1e-5


def test_psnr():
    a = torch.zeros(1, 1, 8, 8)
    assert psnr_db(a, a + 0.02) == pytest.approx(40.0, abs=1e-3)  # 20 log10(2 / 0.02)
    assert psnr_db(a + 1.5, a + 1.0) > 100  # outside [-1, 1] is clipped


# -- the static policy and its training ----------------------------------------------------------


def test_initial_policies():
    x, u = noise(), noise(1)
    gm = StaticPolicy(dataclasses.replace(QUICK, components=256), x, u)
    policy = gm()
    assert isinstance(policy, GMFlowPolicy)
    means, logstds, logweights = policy.mixture
    spread = means - u[:, None]
    assert spread.std().item() == pytest.approx(0.5, rel=0.05) and abs(spread.mean()) < 0.05
    assert logstds.shape == (1, 1, 1, 1, 1) and logstds.item() == pytest.approx(math.log(0.05))
    assert (logweights - math.log(1 / 256)).abs().max() < 1e-5
    dx = StaticPolicy(dataclasses.replace(QUICK, policy="dx"), x, u, shift=3.2)()
    assert isinstance(dx, DXPolicy) and dx.shift == 3.2
    assert torch.equal(dx.velocities, u[:, None].expand(1, 4, 2, 4, 4))


@pytest.mark.parametrize("policy", ["gmflow", "dx"])
def test_fit_lowers_the_loss(policy):
    settings, x = dataclasses.replace(QUICK, policy=policy, lr=3e-2), noise()
    static = StaticPolicy(settings, x, x, generator=torch.Generator().manual_seed(0))

    def loss() -> float:  # always at the same 32 times
        generator = torch.Generator().manual_seed(2)
        pair = pi_id_loss(
            static(), decay, 1.0, 1.0, num_intermediates=32, window_substeps=3, generator=generator
        )
        return pair.loss.item()

    before, steps = loss(), []
    generator = torch.Generator().manual_seed(1)
    losses = fit(static, decay, settings, generator, lambda step, policy: steps.append(step))
    assert losses.shape == (20,) and steps == list(range(20))
    assert loss() < 0.8 * before


def test_same_seed_same_run():
    x = noise()
    reference = follow_teacher(decay, x, QUICK)
    results = [fit_and_compare(decay, x, torch.tanh, QUICK, reference)[0] for _ in range(2)]
    for metrics in results:
        metrics.pop("seconds")
    assert results[0] == results[1]


def test_sweep_in_miniature(tmp_path):
    settings = dataclasses.replace(QUICK, iters=60, lr=3e-2)
    result = run_sweep(decay, noise(), lambda x: x, settings, tmp_path, "", 1.0, (1, 8), (1, 8))
    psnr = {(run["policy"], run["size"]): run["endpoint_psnr_db"] for run in result["runs"]}
    assert list(psnr) == [("gmflow", 1), ("gmflow", 8), ("dx", 1), ("dx", 8)]
    assert psnr["gmflow", 8] > psnr["gmflow", 1] + 5  # one component cannot bend its path so far
    assert json.loads((tmp_path / "sweep.json").read_text()) == result
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


# -- the script ----------------------------------------------------------------------------------


def test_script_with_the_shipped_teacher(tmp_path, capsys):
    main(["--iters", "20", "--substeps", "16", "--teacher-steps", "32", "--class", "Bag",
          "--every", "10", "--device", "cpu", "--out", str(tmp_path)])  # fmt: skip
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["class"] == "bag" and metrics["teacher"] == "tiny"
    assert metrics["settings"]["components"] == 32 and metrics["settings"]["seed"] == 42
    assert len(metrics["t"]) == len(metrics["trajectory_rmse"]) == 17
    assert metrics["trajectory_rmse"][0] == 0 and metrics["trajectory_rmse"][-1] > 0
    assert metrics["trajectory_rmse"][-1] == metrics["endpoint_rmse"]
    assert "endpoint PSNR" in capsys.readouterr().out
    for name in ("toy.png", "progress.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@pytest.mark.parametrize("name, seed", [("ankle boot", 42), ("bag", 42), ("t-shirt/top", 42)])
def test_default_run_reaches_40_db(tmp_path, name, seed):
    main(["--class", name, "--seed", str(seed), "--every", "0", "--out", str(tmp_path)])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["endpoint_psnr_db"] > 40


def test_published_defaults_of_the_real_teachers():
    args = toy_dit_imagenet.parse_arguments(["--teacher", "fm"])
    settings = toy_dit_imagenet.check_arguments(args)
    assert args.source == "Lakonik/pi-Flow-ImageNet/teachers/flowdit_imagenet.pth"
    assert (args.time_scale, args.cfg, args.class_name) == (1000.0, 4.0, "jay")
    assert (settings.components, settings.iters, settings.lr, settings.seed) == (32, 5000, 5e-3, 42)
    assert (settings.intermediates, settings.substeps, settings.solver) == (2, 128, "euler")
    assert settings.time_weight == 0
    assert toy_dit_imagenet.parse_arguments(["--teacher", "repa"]).time_scale == 1.0


def test_class_names():
    names = class_names(1000)
    assert find_class("jay", names) == 17 and find_class("980", names) == 980
    assert find_class("Trouser", class_names(10)) == 1
    with pytest.raises(ValueError, match="--class 'jai' is unknown; closest: .*jay"):
        find_class("jai", names)
    with pytest.raises(ValueError, match="--class is 1000; an index must be below 1000"):
        find_class("1000", names)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--iters", "0"], "--iters is 0; it must be positive"),
        (["--components", "-1"], "--components is -1"),
        (["--lr", "nan"], "--lr is nan"),
        (["--policy", "mlp"], "--policy is 'mlp'; choose one of gmflow, dx"),
        (["--solver", "rk4"], "--solver is 'rk4'; choose one of"),
        (["--teacher-steps", "100"], "--teacher-steps is 100; it must be a multiple"),
        (["--time-weight", "-1"], "--time-weight is -1"),
        (["--every", "-1"], "--every is -1"),
        (["--interval", "0.8", "0.1"], "--interval is 0.8 0.1"),
        (["--cfg", "-1"], "--cfg is -1"),
        (["--dtype", "int8"], "--dtype is 'int8'; choose one of float32"),
        (["--device", "abacus"], "abacus"),
        (["--class", "hat"], "--class 'hat' is unknown"),
        (["--teacher", "nothing.pt"], "no file nothing.pt"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, arguments, message):
    out = tmp_path / "out"
    with pytest.raises((ValueError, OSError), match=message):
        main([*arguments, "--out", str(out)])
    assert not out.exists()


def test_students_and_foreign_files_are_no_teachers(tmp_path):
    from imagenet.checkpoints import init_student_from_teacher

    student = init_student_from_teacher(load_dit(fashion.TEACHER), "dx", 2)
    save_dit(student, tmp_path / "student.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="dx head: it is a student"):
        main(["--teacher", str(tmp_path / "student.safetensors")])
    with pytest.raises(ValueError, match="not a DiT in a known layout"):
        main(["--teacher", str(tmp_path / "other.safetensors")])


def test_imagenet_latents_need_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="pip install diffusers"):
        toy_dit_imagenet.load_decoder(DiTConfig(), torch.device("cpu"))
