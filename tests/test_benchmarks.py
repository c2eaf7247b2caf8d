"""The benchmarks run, and what they compare computes the same; no time is asserted."""

import pytest
import torch

from benchmarks import accuracy, pi_id_step, recipes, timing
from benchmarks import rollout as rollout_benchmark
from piflow_minimal import DXPolicy

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("recipe", recipes.RECIPES.values(), ids=recipes.RECIPES)
def test_recipes_are_settings_of_the_preset(recipe):
    preset = recipes.distill.PRESETS["tiny"]
    assert all(getattr(preset, name) != value for name, value in recipe.items())  # each changes it


@pytest.mark.parametrize("module, flags", [
    (rollout_benchmark, ["--rounds", "0"]), (pi_id_step, ["--batch", "0"]),
    (accuracy, ["--iterations", "0"]), (accuracy, ["--students", "./no-such-file"]),
    (recipes, ["--recipes", "none"]),
])  # fmt: skip
def test_bad_input(module, flags):
    with pytest.raises((ValueError, OSError)):
        module.main(flags)
