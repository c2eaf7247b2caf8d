"""The benchmarks run, and what they compare computes the same; no time is asserted."""

import math

import pytest
import torch

from benchmarks import accuracy, cloning, pi_id_step, policies, recipes, timing
from benchmarks import rollout as rollout_benchmark
from common.teachers import integrate_teacher
from piflow_minimal import DXPolicy, pi_id_loss, rollout

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def policies_of_the_toy_stay(monkeypatch):
    """benchmarks.policies replaces some of them."""
    monkeypatch.setattr(policies.toy_2d, "POLICIES", dict(policies.toy_2d.POLICIES))


@pytest.mark.parametrize("kind", ["gmflow", "dx"])
def test_plain_and_fast_ways_agree(kind, monkeypatch):
    monkeypatch.setattr(rollout_benchmark, "PUBLISHED", 10)
    x, parts = rollout_benchmark.outputs(kind, (2, 3, 2, 4, 4), CPU)
    ways = rollout_benchmark.KINDS[kind]
    plain, eager = (
        rollout_benchmark.jobs(way, ways[way], x, parts, "euler", 10) for way in ("plain", "eager")
    )
    for job in ("rollout", "loss + backward"):
        expected = plain[job]()
        assert (eager[job]() - expected).abs().max() < 1e-4 * expected.abs().max()


def test_rollout_prints_its_table(monkeypatch, capsys):
    monkeypatch.setattr(rollout_benchmark, "PUBLISHED", 4)
    monkeypatch.setattr(rollout_benchmark, "LIMIT", 64)
    monkeypatch.setattr(rollout_benchmark, "SIZES", {"small": (2, 3, 2, 4, 4)})
    threads = torch.get_num_threads()
    rollout_benchmark.main(["--rounds", "1", "--no-compile", "--device", "cpu", "--threads", "1"])
    text = capsys.readouterr().out
    assert "gmflow small" in text and "dx small" in text and "exact" in text
    assert torch.get_num_threads() == threads


def test_deis_gets_the_fewest_substeps_that_are_enough(monkeypatch):
    monkeypatch.setattr(rollout_benchmark, "LIMIT", 256)
    few, error = rollout_benchmark.accuracies(
        "gmflow", *rollout_benchmark.outputs("gmflow", (1, 4, 2, 4, 4), CPU)
    )
    assert few <= 32 and error["deis"] <= error["euler"]


def test_shares_of_a_step_add_up():
    case = pi_id_step.make(0, 2, 2, {"total_substeps": 2}, CPU)
    before = [parameter.clone() for parameter in case.student.parameters()]
    seconds, memory = pi_id_step.measure(case, CPU, 1)
    assert set(seconds) == set(pi_id_step.PARTS) and min(seconds.values()) >= 0
    assert any((a != b).any() for a, b in zip(before, case.student.parameters(), strict=True))
    assert memory > 0


def test_peak_memory_sees_what_lives_at_once():
    def function():
        a = torch.ones(2**20)  # 4 MiB
        b = a + 1  # 4 more
        del a
        return b * 2  # and 4 for 4

    assert 8 <= timing.peak_memory(CPU, function) < 9


def test_errors_shrink_with_substeps(monkeypatch):
    monkeypatch.setattr(accuracy, "SUBSTEPS", (4, 64))
    monkeypatch.setattr(accuracy, "LIMIT", 256)
    for policy in (accuracy.toy_policy("dx", 2), accuracy.file_policy(accuracy.STUDENT)):
        with torch.no_grad():
            found = accuracy.errors(policy)
        assert len(found) == 4
        assert all(few > many for few, many in found.values())
        assert isinstance(policy, DXPolicy) or found["deis", "end"][1] < found["euler", "end"][1]


def test_recipes_are_trained_and_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(recipes, "TEACHER_STEPS", 2)
    flags = ["--recipes", "k8", "--iterations", "2", "--samples", "65", "--out", str(tmp_path)]
    recipes.main(flags)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    (row,) = [row for row in rows if row[:1] == ["k8"]]
    assert row[1:3] == ["0", "2"] and row[5] == row[7] == "x" and float(row[8]) > 0
    assert recipes.load_dit(tmp_path / "k8-seed0-2" / "student.safetensors").config.components == 8


def test_heun_follows_the_teacher_of_one_gaussian():
    """Data N(0, std^2): the trajectory is x sqrt(var(t) / var(1)), var(t) of x_t."""
    std = 0.5

    def var(t):
        return ((1 - t) * std) ** 2 + t**2

    def teacher(x, t):
        return x * ((t - (1 - t) * std**2) / var(t)).view(-1, 1, 1, 1)

    x, t, t_end = torch.rand(3, 2, 4, 4), torch.ones(3), torch.tensor([0.9, 0.5, 0.1])
    expected = x * (var(t_end) / var(t)).sqrt().view(-1, 1, 1, 1)
    assert (recipes.heun(teacher, x, t, t_end) - expected).abs().max() < 0.01


def test_cloning_trains_on_the_states_of_the_teacher(monkeypatch):
    flags = ["--dropout", "0", "--nfe", "2", "--device", "cpu"]
    s = recipes.parse(recipes.distill.Settings, "", flags, recipes.distill.PRESETS)
    task = recipes.Cloning(s, CPU)
    seen = []
    monkeypatch.setattr(task, "guided", lambda labels: lambda x, t: seen.append((x, t)) or 0 * x)
    sizes, outs = zip(*task.losses(task.net, 0, range(4)), strict=True)
    noise = seen[0][0]
    assert sizes == (0.5, 0.5)
    assert all((x == noise).all() for x, _ in seen), "a teacher at rest stays where it starts"
    assert (outs[0].t > 0.5).all() and (outs[1].t < 0.5).all() and (outs[1].t >= 0.068).all()
    for out in outs:
        assert out.loss.isclose(out.u_policy.square().mean())
        out.loss.backward()
    assert all(p.grad is not None for p in task.net.parameters() if p.requires_grad)


def test_cloned_policies_roll_out_the_teacher():
    density = cloning.toy_2d.make_density("pi")
    noise = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    student = cloning.toy_2d.Student("gmflow", 4)(noise, torch.ones(50))
    policy = cloning.Cloned(student, density.velocity)
    out = pi_id_loss(policy, density.velocity, 1.0, 1.0, total_substeps=64, solver="deis")
    end = integrate_teacher(density.velocity, noise, 64, solver="heun")
    assert (out.x_dst - end).abs().mean() < 0.01
    own = pi_id_loss(student, density.velocity, 1.0, 1.0, total_substeps=64, solver="deis")
    assert (own.x_dst - end).abs().mean() > 0.1, "the untrained policy ends elsewhere"


def test_cloning_prints_its_table(capsys):
    flags = ["--cases", "K = 4", "two segments", "--seeds", "0", "--iterations", "2"]
    cloning.main([*flags, "--points", "100"])
    text = capsys.readouterr().out
    assert "two segments" in text and "+-" not in text  # one seed has no spread


def momentum(gamma):
    g = torch.Generator().manual_seed(0)
    v, x = torch.randn(5, 3, 2, generator=g), torch.randn(5, 2, generator=g)
    return policies.MomentumPolicy(v, torch.tensor(gamma).expand(5, 3), x, torch.ones(5))


def test_momentum_flow_is_its_converged_rollout():
    policy = momentum([0.0, -2.0, 4.0])
    end = rollout(policy, policy.x_src, 1.0, 0.3, total_substeps=2000)
    assert (
        policy.flow(policy.x_src, torch.ones(5), torch.full((5,), 0.3)) - end
    ).abs().max() < 0.05
    exact = rollout(policy, policy.x_src, 1.0, 0.3, total_substeps=1, solver="exact")
    assert (exact - end).abs().max() < 0.05
    still = momentum([0.0, 0.0, 0.0])  #  constant velocities
    end = still.x_src - 0.7 * still.v.sum(1)
    assert torch.allclose(still.flow(still.x_src, torch.ones(5), torch.full((5,), 0.3)), end)


def test_constant_policy_has_n_pieces():
    points = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]]])
    x = torch.zeros(1, 2)
    policy = policies.ConstantPolicy(x[:, None] - points, x, torch.ones(1))
    values = [float(policy.x0_hat(torch.tensor([t]))[0, 0]) for t in (0.1, 0.3, 0.6, 0.9, 1.0)]
    assert values == [1.0, 2.0, 3.0, 4.0, 4.0]


def test_push_is_one_without_feedback_and_zero_with_a_fixed_end():
    noise = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(20, 3)
    no_feedback = policies.MomentumPolicy(
        zeros[..., None] * noise[:, None], zeros, noise, zeros[:, 0] + 1
    )
    assert policies.limits(policies.push(no_feedback, noise)) == "1.00 to 1.00"
    fixed = DXPolicy(noise[:, None], noise, 1.0)
    assert policies.limits(policies.push(fixed, noise)) == "0.00 to 0.00"


def test_policies_print_their_table(capsys):
    policies.main(["--nfe", "1", "2", "--seeds", "0", "--iterations", "2", "--points", "100"])
    table = capsys.readouterr().out.split("\n\n")[-2]
    for name in policies.KINDS:
        rows = [line.split() for line in table.splitlines() if line.startswith(f"{name} ")]
        assert len(rows) == 2 and all(math.isfinite(float(row[4])) for row in rows)
    assert "+-" not in table


@pytest.mark.parametrize("recipe", recipes.RECIPES.values(), ids=recipes.RECIPES)
def test_recipes_are_settings_of_the_preset(recipe):
    preset = recipes.distill.PRESETS["tiny"]
    assert all(getattr(preset, name) != value for name, value in recipe.items())  # each changes it


@pytest.mark.parametrize("module, flags", [
    (rollout_benchmark, ["--rounds", "0"]), (pi_id_step, ["--batch", "0"]),
    (accuracy, ["--iterations", "0"]), (accuracy, ["--students", "./no-such-file"]),
    (recipes, ["--recipes", "none"]), (cloning, ["--cases", "none"]),
    (policies, ["--nfe", "0"]),
])  # fmt: skip
def test_bad_input(module, flags):
    with pytest.raises((ValueError, OSError)):
        module.main(flags)
