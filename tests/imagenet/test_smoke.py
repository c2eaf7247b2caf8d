"""imagenet.smoke: the tiny network on a CPU; the arithmetic of its projections."""

import time

import pytest
import torch

from imagenet import distill, smoke


def test_smoke_on_a_cpu(capsys, monkeypatch):
    """XL/2's settings are asked for; it says what it runs instead, and prints every phase."""
    monkeypatch.setattr(smoke, "NETWORKS", dict(smoke.NETWORKS))
    smoke.main(["--device", "cpu", "--preset", "gm-repa-2nfe"])
    text = capsys.readouterr().out
    assert text.startswith("No GPU: this is the tiny network on cpu, not XL/2.")
    assert "tiny network, gmflow 16, nfe 2, micro-batch 32" in text
    times = {line[:18].strip(): line[18:].split() for line in text.splitlines()}
    for phase in (*smoke.PHASES, *smoke.ONCE):
        assert float(times[phase][0]) >= 0
    assert float(times["backward"][0]) > 0 and float(times["tiny"][2]) > 0
    assert "gm-repa-1nfe" not in times  # another network: not projected


def test_inner_phases_do_not_count_twice():
    clock = smoke.Clock(torch.device("cpu"))
    with clock("outer"):
        with clock("inner"):
            time.sleep(0.2)
    assert clock.seconds["inner"] >= 0.2 and clock.seconds["outer"] < clock.seconds["inner"]


def test_projection():
    """512 samples for each of 8 GPUs, 128 at once; drawing is hidden unless it is slower."""
    seconds = dict.fromkeys(smoke.PHASES, 0.1) | {"optimizer": 0.05, "communication": 0.03}
    config = distill.PRESETS["gm-repa-1nfe"]
    assert smoke.step_seconds(seconds, 128, config, 8) == pytest.approx(4 * 0.4 + 0.08)
    two = distill.PRESETS["gm-repa-2nfe"]  # data-free: two segments per sample
    assert smoke.step_seconds(seconds, 128, two, 8) == pytest.approx(8 * 0.4 + 0.08)
    seconds["draw"] = 2.0
    assert smoke.step_seconds(seconds, 128, config, 8) == pytest.approx(8.0)
