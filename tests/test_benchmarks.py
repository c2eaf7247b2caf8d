"""The benchmarks run, and what they compare computes the same; no time is asserted."""

import dataclasses

import pytest
import torch

import piflow_minimal
from benchmarks import accuracy, pi_id_step, timing, toys
from benchmarks import rollout as rollout_benchmark
from piflow_minimal import DXPolicy

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["gmflow", "dx"])
def test_plain_and_fast_rollouts_agree(kind, monkeypatch):
    monkeypatch.setattr(rollout_benchmark, "SUBSTEPS", 8)
    policy = rollout_benchmark.make(kind, (2, 3, 2, 4, 4), CPU)
    functions = rollout_benchmark.ways(policy)
    plain = rollout_benchmark.plain_dx if kind == "dx" else rollout_benchmark.plain_gmflow
    exact = rollout_benchmark.plain_rollout(plain, rollout_benchmark.to_float64(policy))
    for way in ("plain", "eager"):
        assert (functions[way]() - exact).abs().max() < 1e-4 * exact.abs().max()


def test_rollout_prints_its_tables(monkeypatch, capsys):
    monkeypatch.setattr(rollout_benchmark, "SUBSTEPS", 2)
    monkeypatch.setattr(rollout_benchmark, "SIZES", {"small": (2, 3, 2, 4, 4)})
    monkeypatch.setattr(piflow_minimal, "_compile", lambda function: function)
    rollout_benchmark.main(["--rounds", "1", "--no-scaling", "--device", "cpu"])
    text = capsys.readouterr().out
    assert "gmflow small" in text and "dx small" in text and "floor" in text


def test_kernels_are_counted():
    x = torch.ones(3, 4)
    found = rollout_benchmark.kernels(lambda: x.exp().view(4, 3).add(1).sum(0))
    assert found == 3 / rollout_benchmark.SUBSTEPS


def test_shares_of_a_step_add_up(monkeypatch):
    walk = {"total_substeps": 2}
    case = pi_id_step.make(0, 2, 2, walk, CPU)
    before = [parameter.clone() for parameter in case.student.parameters()]
    seconds, memory = pi_id_step.measure(case, CPU, 1)
    assert set(seconds) == set(pi_id_step.PARTS) and min(seconds.values()) > 0
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
    monkeypatch.setattr(accuracy, "LIMIT", 512)
    for policy in (accuracy.policy_of_toy("dx", 2), accuracy.policy_of_file(accuracy.STUDENT)):
        found = accuracy.errors(policy)
        assert found["euler"][1] < found["euler"][0] and found["deis"][1] < found["deis"][0]
        assert ("exact" in found) == isinstance(policy, DXPolicy)


def test_toys_measures_everything(monkeypatch, tmp_path):
    monkeypatch.setattr(toys, "POINTS", 100)
    monkeypatch.setattr(toys, "PLANE", (40,))
    monkeypatch.setattr(toys, "STATIC", (40,))
    monkeypatch.setattr(toys, "TINY", dataclasses.replace(toys.TINY, teacher_steps=32))
    toys.main(["--quick", "--out", str(tmp_path)])
    assert (tmp_path / "toys.png").stat().st_size > 1000


@pytest.mark.parametrize("module, flags", [
    (rollout_benchmark, ["--rounds", "0"]), (pi_id_step, ["--batch", "0"]),
    (accuracy, ["--iters", "0"]), (accuracy, ["./no-such-file"]),
])  # fmt: skip
def test_bad_input(module, flags):
    with pytest.raises((ValueError, OSError)):
        module.main(flags)
