"""imagenet.smoke: the tiny network on a CPU; the arithmetic of its projections and of memory."""

from dataclasses import replace

import pytest
import torch

from imagenet import distill, smoke
from imagenet.dit import PRESETS, DiT


def test_smoke_on_a_cpu(capsys, monkeypatch, tmp_path):
    """XL/2's settings are given; it says what it runs instead, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    smoke.main(["--device", "cpu", "--preset", "gm-repa-2nfe"])
    text = capsys.readouterr().out
    first = "no GPU: the tiny network in place of XL/2\n"
    first += "1 x cpu: network tiny, gmflow 16, nfe 1, micro-batch 16, compiled: False"
    assert text.startswith(first)
    values = {line[:13].strip(): line[13:].split() for line in text.splitlines()}
    assert values["peak memory"][0] == "0.0"  # a CPU's is not measured
    assert float(values["peak memory"][-1]) > 0 and float(values["step"][0]) > 0
    assert "tiny-2nfe" in values and "gm-repa-1nfe" not in values  # another network
    assert not list(tmp_path.iterdir())


def test_projection():
    """512 samples for each of 8 GPUs, 64 at once, twice for the two segments of a data-free run."""
    one, two = distill.PRESETS["gm-repa-1nfe"], distill.PRESETS["gm-repa-2nfe"]
    for s, seconds in ((one, 8 * 0.5), (two, 16 * 0.5), (replace(two, latents="latents"), 8 * 0.5)):
        assert smoke.hours(s, 0.5, one, 8) == pytest.approx(seconds * s.iterations / 3600)
    # measured with two segments: half of it is one segment's
    assert smoke.hours(one, 0.5, two, 8) == pytest.approx(4 * 0.5 * one.iterations / 3600)


def test_memory_formula():
    """XL/2, 676M parameters: 12.6 GiB of student and 1.3 of teacher; --shard splits the former."""
    s = replace(distill.PRESETS["gm-repa-1nfe"], micro_batch=1)
    with torch.device("meta"):
        net = DiT(replace(PRESETS["xl2"], head="gmflow", components=32))
    alone = smoke.memory_formula(s, net)
    assert 13.5 < alone < 14.5
    split = smoke.memory_formula(replace(s, shard=True), net, world=8)
    assert alone - split == pytest.approx(12.6 * 7 / 8, rel=0.03)
    more = smoke.memory_formula(replace(s, micro_batch=65), net) - alone
    plain = smoke.memory_formula(replace(s, micro_batch=65, checkpointing=False), net)
    assert 1 < more < 4 and plain - alone > 10 * more
