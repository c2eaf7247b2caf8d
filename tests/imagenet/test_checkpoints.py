"""checkpoints.py: recorded outputs of the public files, round trips, files that cannot be used.

tests/data/dit: small random networks (hidden 24, 2 heads, 2 layers, 10 classes) in the published
layout and in that of SiT/REPA, with inputs and the outputs that those code bases gave.
"""

import argparse
import dataclasses
import math
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from imagenet.checkpoints import init_student_from_teacher, load_dit, save_dit
from imagenet.dit import DiT, DiTConfig, position_features
from piflow_minimal import GaussianMixture

DATA = Path(__file__).parent.parent / "data" / "dit"
SMALL = DiTConfig(hidden=24, depth=2, num_heads=2, num_classes=10, latent_size=8, logstd_hidden=16)


def recorded(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in np.load(DATA / name).items()}


def close(value: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> bool:
    """Agreement relative to the largest entry."""
    assert value.shape == expected.shape
    return bool((value - expected).abs().max() <= tolerance * expected.abs().max())


def random_net(**changes) -> DiT:
    """A network whose every weight is random, so that nothing is hidden behind a zero."""
    torch.manual_seed(0)
    net = DiT(dataclasses.replace(SMALL, **changes)).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def inputs(batch: int = 3, size: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, size, size, generator=generator)
    return x, torch.linspace(1, 0.1, batch), torch.arange(batch) * 3 % 11


# -- agreement with the public code bases --------------------------------------------------------


@pytest.mark.parametrize("time_scale, key", [(1.0, "velocity"), (1000.0, "velocity_t1000")])
def test_published_teacher(time_scale, key):
    data = recorded("io.npz")
    net = load_dit(DATA / "teacher.safetensors", num_heads=2, time_scale=time_scale)
    assert net.config.head == "velocity" and net.config.depth == 2 and net.config.hidden == 24
    assert close(net(data["x"], data["t"], data["labels"].long()), data[key])


def test_published_gmflow_student():
    data = recorded("io.npz")
    net = load_dit(DATA / "gm_student.safetensors", num_heads=2)
    assert (net.config.head, net.config.components, net.config.logstd_hidden) == ("gmflow", 4, 16)
    output = net(data["x"], data["t"], data["labels"].long())
    assert isinstance(output, GaussianMixture)
    for name in ("means", "logweights", "logstds"):
        assert close(getattr(output, name), data[name]), name


def test_published_dx_student():
    data = recorded("io.npz")
    net = load_dit(DATA / "dx_student.safetensors", num_heads=2)
    assert (net.config.head, net.config.components) == ("dx", 5)
    assert close(net(data["x"], data["t"], data["labels"].long()), data["dx_velocities"])


def test_repa_checkpoint_prefers_ema(tmp_path):
    data, state = recorded("repa_io.npz"), torch.load(DATA / "repa_sit.pt", weights_only=True)
    state["model"] = {key: value + 1 for key, value in state["model"].items()}
    state["args"] = argparse.Namespace(model="SiT-XL/2")  # REPA's files hold their flags
    torch.save(state, tmp_path / "sit.pt")
    net = load_dit(tmp_path / "sit.pt", num_heads=2)
    assert close(net(data["x"], data["t"], data["labels"].long()), data["velocity"])


def test_positions_are_those_stored_by_repa():
    state = torch.load(DATA / "repa_sit.pt", weights_only=True)["ema"]
    assert close(position_features(4, 24), state["pos_embed"][0], 1e-6)


# -- students ------------------------------------------------------------------------------------


def test_gmflow_student_starts_as_its_teacher():
    teacher, (x, t, labels) = random_net(), inputs()
    student = init_student_from_teacher(
        teacher, "gmflow", 64, generator=torch.Generator().manual_seed(5)
    )
    with torch.no_grad():
        u, mixture = teacher(x, t, labels), student(x, t, labels)
    offset = mixture.means - u[:, None]  # one constant per (k, channel)
    first = offset[:1, :, :, :1, :1]
    assert (offset - first).abs().max() < 1e-5
    assert first.std().item() == pytest.approx(0.05, rel=0.2)
    assert (mixture.logweights - math.log(1 / 64)).abs().max() < 1e-6
    assert (mixture.logstds - math.log(0.05)).abs().max() < 1e-6
    assert student.config.components == 64 and student.final_layer.logstds[1].out_features == 1024


def test_dx_student_starts_as_its_teacher():
    teacher, (x, t, labels) = random_net(), inputs()
    student = init_student_from_teacher(teacher, "dx", 5)
    with torch.no_grad():
        velocities, u = student(x, t, labels), teacher(x, t, labels)
    assert velocities.shape == (3, 5, 4, 8, 8)
    assert close(velocities, u[:, None].expand_as(velocities), 1e-6)


# -- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("head, size", [("velocity", 1), ("gmflow", 3), ("dx", 1), ("dx", 4)])
def test_round_trip(tmp_path, published, head, size):
    net, (x, t, labels) = random_net(head=head, components=size, time_scale=1000.0), inputs()
    save_dit(net, tmp_path / "net.safetensors", published=published)
    again = load_dit(tmp_path / "net.safetensors")
    assert again.config == net.config
    state, loaded = net.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[key]) for key, value in state.items())
    for one, two in zip(net(x, t, labels), again(x, t, labels), strict=True):
        assert close(one, two, 1e-5)  # where a tensor lies in memory decides its last bit


@pytest.mark.parametrize("name", ["teacher", "gm_student", "dx_student"])
def test_export_is_the_published_file(tmp_path, name):
    source = DATA / f"{name}.safetensors"
    save_dit(load_dit(source, num_heads=2), tmp_path / "out.safetensors", published=True)
    theirs, ours = load_file(source), load_file(tmp_path / "out.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_into_float32(tmp_path, dtype):
    save_dit(random_net(), tmp_path / "half.safetensors", dtype)
    assert load_file(tmp_path / "half.safetensors")["final_layer.linear.weight"].dtype == dtype
    net = load_dit(tmp_path / "half.safetensors")
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert close(net.final_layer.linear.weight, random_net().final_layer.linear.weight, 1e-2)


def test_pth_with_and_without_wrapper(tmp_path):
    data, state = recorded("io.npz"), load_file(DATA / "teacher.safetensors")
    for name, content in (("bare.pth", state), ("wrapped.pth", {"state_dict": state})):
        torch.save(content, tmp_path / name)
        net = load_dit(tmp_path / name, num_heads=2)
        assert close(net(data["x"], data["t"], data["labels"].long()), data["velocity"])


class Malice:
    """Unpickling this would create a file."""

    def __reduce__(self):
        return (Path.touch, (Path("malice"),))


def test_files_that_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = (DATA / "teacher.safetensors").read_bytes()
    state = load_file(DATA / "teacher.safetensors")
    key = "transformer_blocks.1.ff.net.2.weight"
    Path("cut.safetensors").write_bytes(whole[: len(whole) // 2])
    Path("text.pth").write_text("no checkpoint")
    Path("list.pth").write_text("a list of files\n")  # another kind of error in the unpickler
    Path("evil.pth").write_bytes(pickle.dumps({"state_dict": Malice()}, protocol=2))
    torch.save({"state_dict": {"weight": 3}}, "numbers.pth")
    save_file({"decoder.weight": torch.zeros(2)}, "other.safetensors")
    save_file({k: v for k, v in state.items() if k != key}, "missing.safetensors")
    save_file({**state, "extra.weight": torch.zeros(2)}, "extra.safetensors")
    save_file({**state, key: torch.zeros(3, 96)}, "shape.safetensors")
    for name, message in {
        "nothing.safetensors": "no file nothing.safetensors",
        "cut.safetensors": "not a readable safetensors",
        "text.pth": "not a readable PyTorch checkpoint",
        "list.pth": "not a readable PyTorch checkpoint",
        "evil.pth": "not a readable PyTorch checkpoint",
        "numbers.pth": "not hold a dict of tensors",
        "other.safetensors": "not a DiT in a known layout.*decoder.weight",
        "missing.safetensors": "missing: blocks.1.mlp.fc2.weight",
        "extra.safetensors": "unexpected: extra.weight",
        "shape.safetensors": r"another shape: blocks.1.mlp.fc2.weight \(3, 96\) instead of",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            load_dit(name, num_heads=2)
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="num_heads is 16 and hidden 24"):
        load_dit(DATA / "teacher.safetensors")
    assert not Path("malice").exists()


def test_hub_sources_need_the_hub_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        load_dit("owner/repository/folder/net.safetensors")


def test_hub_sources_are_split_into_repository_and_path(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repository, path):
        asked.append((repository, path))
        return str(DATA / "teacher.safetensors")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert load_dit("owner/repository/folder/net.safetensors", num_heads=2).config.depth == 2
    assert asked == [("owner/repository", "folder/net.safetensors")]
