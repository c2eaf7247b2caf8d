"""checkpoints.py: recorded outputs of the public files, round trips, files that cannot be used.

tests/data/dit: small random networks (hidden 24, 2 heads, 2 layers, 10 classes) in the published
layout and in that of SiT/REPA, with inputs and the outputs that those code bases gave.
"""

import argparse
import dataclasses
import math
import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from imagenet import checkpoints
from imagenet.checkpoints import init_student_from_teacher, load_decoder, load_dit, save_dit
from imagenet.dit import PIXELS, DiT, DiTConfig, position_features
from imagenet.layouts import to_published
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
    net = load_dit(DATA / "gm_student.safetensors", num_heads=2, time_scale=1.0)
    assert (net.config.head, net.config.components, net.config.logstd_hidden) == ("gmflow", 4, 16)
    output = net(data["x"], data["t"], data["labels"].long())
    assert isinstance(output, GaussianMixture)
    for name in ("means", "logweights", "logstds"):
        assert close(getattr(output, name), data[name]), name


def test_published_dx_student():
    data = recorded("io.npz")
    net = load_dit(DATA / "dx_student.safetensors", num_heads=2, time_scale=1.0)
    assert (net.config.head, net.config.components) == ("dx", 5)
    assert close(net(data["x"], data["t"], data["labels"].long()), data["dx_velocities"])


def test_second_layernorm_is_that_of_the_layout():
    """Agreement to float32 rounding, which the other eps misses by ten times."""
    files = ("teacher.safetensors", "io.npz", 1e-5), ("repa_sit.pt", "repa_io.npz", 1e-6)
    for file, io, eps in files:
        data, net = recorded(io), load_dit(DATA / file, num_heads=2, time_scale=1.0)
        assert net.config.norm2_eps == eps
        assert close(net(data["x"], data["t"], data["labels"].long()), data["velocity"], 1e-6)


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
    assert student.config.components == 64 and student.final_layer.logstds[1].out_features == 16


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
    net = load_dit(source, num_heads=2, time_scale=1.0)
    save_dit(net, tmp_path / "out.safetensors", published=True)
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
        net = load_dit(tmp_path / name, num_heads=2, time_scale=1.0)
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
        "cut.safetensors": "cannot be read as a checkpoint of tensors",
        "text.pth": "cannot be read as a checkpoint of tensors",
        "list.pth": "cannot be read as a checkpoint of tensors",
        "evil.pth": "cannot be read as a checkpoint of tensors: it holds more than tensors",
        "numbers.pth": "not hold a dict of tensors",
        "other.safetensors": "no network of a known layout.*decoder.weight",
        "missing.safetensors": r"Missing key\(s\).*blocks.1.mlp.fc2.weight",
        "extra.safetensors": r"Unexpected key\(s\).*extra.weight",
        "shape.safetensors": "size mismatch for blocks.1.mlp.fc2.weight",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            load_dit(name, num_heads=2)
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="its width is 24, and num_heads is not stated"):
        load_dit(DATA / "teacher.safetensors")
    assert not Path("malice").exists()


def test_hub_sources_need_the_hub_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="huggingface_hub"):
        load_dit("owner/repository/folder/net.safetensors")


def test_hub_sources_are_split_into_repository_and_path(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    requested = []

    def download(repository, path):
        requested.append((repository, path))
        return str(DATA / "teacher.safetensors")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    net = load_dit("owner/repository/folder/net.safetensors", num_heads=2, time_scale=1.0)
    assert net.config.depth == 2
    assert requested == [("owner/repository", "folder/net.safetensors")]


# -- files as people have them ---------------------------------------------------------------------


def head_rows(state: dict, extra: torch.Tensor) -> dict:
    """A velocity head with more rows per pixel: (4, C) -> (4, C + extra)."""
    weight, bias = (state[f"final_layer.linear.{kind}"] for kind in ("weight", "bias"))
    weight = torch.cat([weight.unflatten(0, (4, -1)), extra], dim=1).flatten(0, 1)
    bias = torch.cat([bias.unflatten(0, (4, -1)), extra[..., 0]], dim=1).flatten()
    return state | {"final_layer.linear.weight": weight, "final_layer.linear.bias": bias}


def positions(rows: int = 4) -> dict[str, torch.Tensor]:
    return {"pos_embed": position_features(rows, 24)[None]}


def saved(tmp_path, state: dict, name: str = "net.pt") -> Path:
    torch.save(state, tmp_path / name)
    return tmp_path / name


def outputs(net: DiT) -> torch.Tensor:
    x, t, labels = inputs()
    with torch.no_grad():
        return net(x, t, labels)


@pytest.mark.parametrize("extra, rows", [(4, 32), (1, 20)])
def test_a_second_half_of_the_head_is_left_out(tmp_path, extra, rows):
    """SiT's and DiT's learn_sigma; one Gaussian with its log std. Never N = 2 of dx."""
    net = random_net()
    state = head_rows(net.state_dict(), torch.randn(4, extra, 24)) | positions()
    head = "velocity" if extra == 4 else None
    with pytest.warns(UserWarning, match=f"read as a velocity: 16 of {rows} rows"):
        found = load_dit(saved(tmp_path, {"ema": state, "args": None}), num_heads=2, head=head)
    assert found.config == dataclasses.replace(net.config, logstd_hidden=1024)
    assert torch.equal(outputs(found), outputs(net))


def test_twice_the_rows_without_a_sign_of_either_are_refused(tmp_path):
    net = random_net(head="dx", components=2)
    path = saved(tmp_path, net.state_dict())
    with pytest.raises(ValueError, match="a velocity with a variance half, or dx with N = 2"):
        load_dit(path, num_heads=2)
    assert torch.equal(outputs(load_dit(path, num_heads=2, head="dx")), outputs(net))
    with pytest.warns(UserWarning, match="16 of 32 rows"):
        assert load_dit(path, num_heads=2, head="velocity").config.head == "velocity"
    save_dit(net, tmp_path / "net.safetensors")  # its header says
    assert torch.equal(outputs(load_dit(tmp_path / "net.safetensors")), outputs(net))
    with pytest.raises(ValueError, match="head is 'velocity', the file states 'dx'"):
        load_dit(tmp_path / "net.safetensors", head="velocity")
    with pytest.raises(ValueError, match="head is 'velocity', the file states 'gmflow'"):
        load_dit(DATA / "gm_student.safetensors", num_heads=2, head="velocity")
    odd = head_rows(random_net().state_dict(), torch.randn(4, 3, 24))
    with pytest.raises(ValueError, match="size mismatch for final_layer.linear.weight"):
        load_dit(saved(tmp_path, odd), num_heads=2)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "net.", "model.diffusion_model."]
)
@pytest.mark.parametrize("published", [False, True])
def test_prefixes_are_removed(tmp_path, prefix, published):
    net = random_net(norm2_eps=1e-5 if published else 1e-6)
    state = to_published(net.state_dict()) if published else net.state_dict()
    path = saved(tmp_path, {prefix + key: value for key, value in state.items()})
    with pytest.warns(UserWarning, match="prefix.* removed"):
        assert torch.equal(outputs(load_dit(path, num_heads=2)), outputs(net))


def test_blocks_that_were_compiled_and_checkpointed_one_by_one(tmp_path):
    state = random_net().state_dict()
    inner = {
        key.replace(".attn.", "._orig_mod._checkpoint_wrapped_module.attn."): value
        for key, value in state.items()
    }
    with pytest.warns(UserWarning, match="prefix of wrappers removed"):
        net = load_dit(saved(tmp_path, inner), num_heads=2)
    assert torch.equal(outputs(net), outputs(random_net()))
    both = {f"{name}.{k}": v for name in ("student", "teacher") for k, v in state.items()}
    with pytest.raises(ValueError, match="no network of a known layout, or several"):
        load_dit(saved(tmp_path, both), num_heads=2)


@pytest.mark.parametrize("name", ["pos_embed", "pos_embed.pos_embed", "x_embedder.positions", "pe"])
@pytest.mark.parametrize("shape", [(1, 64, 24), (64, 24), (1, 8, 8, 24)])
def test_latent_size_is_that_of_stored_positions(tmp_path, name, shape):
    net = random_net(latent_size=16)
    stored = {name: position_features(8, 24).half().reshape(shape)}
    path = saved(tmp_path, net.state_dict() | stored)
    assert load_dit(path, num_heads=2).config.latent_size == 16


def test_other_positions_are_refused_and_empty_ones_are_not_used(tmp_path):
    state, net = random_net().state_dict(), random_net()
    learned = {"pos_embed": torch.randn(1, 16, 24)}
    with pytest.raises(ValueError, match="positions pos_embed differ from the sin-cos ones by"):
        load_dit(saved(tmp_path, state | learned), num_heads=2)
    empty = {"pos_embed": torch.zeros(1, 16, 24)}
    assert torch.equal(outputs(load_dit(saved(tmp_path, state | empty), num_heads=2)), outputs(net))


def test_what_a_file_does_not_state_is_not_guessed_in_silence(tmp_path):
    """Heads by the widths of DiT-S to XL; the factor of t with a warning; dx or variance half."""
    wide = DiT(DiTConfig(hidden=384, depth=1, num_heads=6, latent_size=8, num_classes=10))
    assert load_dit(saved(tmp_path, wide.state_dict())).config.num_heads == 6
    with pytest.warns(UserWarning, match="factor of t not stated, taken as 1"):
        load_dit(DATA / "teacher.safetensors", num_heads=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_dit(DATA / "teacher.safetensors", num_heads=2, time_scale=1.0)
        load_dit(DATA / "repa_sit.pt", num_heads=2)
    state = to_published(random_net(head="dx", components=2).state_dict())
    stored = {"pos_embed.pos_embed": position_features(4, 24)}
    with pytest.raises(ValueError, match="or dx with N = 2"):
        load_dit(saved(tmp_path, state | stored), num_heads=2)
    save_file(random_net().state_dict(), tmp_path / "x.safetensors", {"config": "[1]"})
    with pytest.raises(ValueError, match="x.safetensors cannot be read"):
        load_dit(tmp_path / "x.safetensors")


def test_embeddings_repeated_in_each_block(tmp_path):
    """As diffusers' own DiT stores them; with them, twice the rows are a variance half."""
    net = random_net(norm2_eps=1e-5)
    state = to_published(head_rows(net.state_dict(), torch.randn(4, 4, 24)))
    embedding = {key: state.pop(key) for key in list(state) if key.startswith("emb.")}
    for i in range(2):
        repeated = {f"transformer_blocks.{i}.norm1.{k}": v.clone() for k, v in embedding.items()}
        state |= repeated
    save_file(state, tmp_path / "net.safetensors")
    with pytest.warns(UserWarning, match="16 of 32 rows"):
        found = load_dit(tmp_path / "net.safetensors", num_heads=2, head="velocity")
    assert torch.equal(outputs(found), outputs(net))
    state["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="each has its own embedding"):
        load_dit(tmp_path / "net.safetensors", num_heads=2, head="velocity")


@pytest.mark.parametrize("head, size", [("velocity", 1), ("gmflow", 3)])
def test_a_clock_that_runs_the_other_way(tmp_path, head, size):
    """v(x, s) with s = 1 at the data is -u(x, 1 - s); a second round does not turn it again."""
    net, (x, t, labels) = random_net(head=head, components=size), inputs()
    path = saved(tmp_path, net.state_dict())
    flipped = load_dit(path, num_heads=2, flip_time=True)
    save_dit(flipped, tmp_path / "flipped.safetensors")
    for found in (flipped, load_dit(tmp_path / "flipped.safetensors"),
                  load_dit(tmp_path / "flipped.safetensors", flip_time=True)):  # fmt: skip
        with torch.no_grad():
            ours, theirs = found(x, t, labels), net(x, 1 - t, labels)
        if head == "gmflow":
            assert close(ours.logweights, theirs.logweights, 1e-6)
            ours, theirs = ours.means, theirs.means
        assert close(ours, -theirs, 1e-6)


def test_weights_that_are_not_finite_are_named(tmp_path):
    net = random_net()
    net.blocks[1].mlp.fc2.weight.data[0, 0] = float("nan")
    save_dit(net, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="1 tensors are not finite, as blocks.1.mlp.fc2.weight"):
        load_dit(tmp_path / "net.safetensors")


# -- what training writes --------------------------------------------------------------------------


def rollout_config() -> dict:
    return {"nfe": 2, "solver": "deis", "total_substeps": 6, "time_scale": 1000.0}


def test_a_checkpoint_of_a_run_states_what_its_student_does(tmp_path):
    """step_*.pt: the average with the config of `export`, as student.safetensors has it."""
    average = random_net(head="gmflow", components=3, **rollout_config())
    trained = {key: value + 1 for key, value in average.state_dict().items()}
    state = {"iteration": 5, "numbers": {}, "net": trained, "ema": average.state_dict()}
    state |= {"optimizer": {}, "settings": {}, "export": dataclasses.asdict(average.config)}
    save_dit(average, tmp_path / "student.safetensors")
    checkpoint = load_dit(saved(tmp_path, state, "step_00000005.pt"))
    for found in (checkpoint, load_dit(tmp_path)):  # the second is the folder of the run
        assert found.config == average.config
        assert all(torch.equal(found.state_dict()[k], v) for k, v in average.state_dict().items())
    with pytest.raises(ValueError, match=r"time_scale is 1.0, the file states 1000.0"):
        load_dit(tmp_path / "step_00000005.pt", time_scale=1.0)


@pytest.mark.parametrize("inside", ["diffusion.denoising.", "diffusion."])
def test_a_public_training_checkpoint_is_its_average(tmp_path, inside):
    """Student, moving average and teacher in one state dict, distinguished by their prefixes."""
    average, student = random_net(head="gmflow", components=3, norm2_eps=1e-5), {}
    published = to_published(average.state_dict())
    student = {f"{inside}{key}": value + 1 for key, value in published.items()}
    ema = {f"{inside.replace('diffusion', 'diffusion_ema')}{k}": v for k, v in published.items()}
    teacher = {f"teacher.{key}": value - 1 for key, value in published.items()}
    content = {"meta": {"iter": 3}, "state_dict": student | ema | teacher, "optimizer": {}}
    path = saved(tmp_path, content, "iter_3.pth")
    others = f"{2 * len(published)} other tensors left out"
    with pytest.warns(UserWarning, match=f"prefix diffusion_ema.* removed, {others}"):
        found = load_dit(path, num_heads=2, time_scale=1.0)
    x, t, labels = inputs()
    assert torch.equal(found(x, t, labels).means, average(x, t, labels).means)


def test_export_of_a_run_is_the_published_layout(tmp_path, capsys):
    net = random_net(head="dx", components=5, norm2_eps=1e-5, **rollout_config())
    save_dit(net, tmp_path / "run" / "student.safetensors")
    checkpoints.main([str(tmp_path / "run"), str(tmp_path / "out.safetensors")])
    with pytest.raises(ValueError, match="out.safetensors exists; name a new file"):
        checkpoints.main([str(tmp_path / "run"), str(tmp_path / "out.safetensors")])
    ours, theirs = (
        load_file(tmp_path / "out.safetensors"),
        load_file(DATA / "dx_student.safetensors"),
    )
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    again = load_dit(tmp_path / "out.safetensors")
    assert again.config == net.config and torch.equal(outputs(again), outputs(net))
    assert "dx network in the published layout" in capsys.readouterr().out


def test_what_a_file_does_not_state_is_stated_once(tmp_path):
    """By the command, in the header of what it writes; then the file needs no argument."""
    net, (x, t, labels) = random_net(), inputs()
    path = saved(tmp_path, head_rows(net.state_dict(), torch.randn(4, 4, 24)))
    out = tmp_path / "out.safetensors"
    flags = ["--num-heads", "2", "--time-scale", "1000", "--head", "velocity", "--flip-time"]
    flags += ["--decoder", "another/vae"]
    with pytest.warns(UserWarning, match="16 of 32 rows"):
        checkpoints.main([str(path), str(out), *flags])
    found = load_dit(out)
    assert (found.config.time_scale, found.config.flip_time) == (1000.0, True)
    assert found.config.decoder == "another/vae"
    with pytest.raises(ValueError, match="must end in .safetensors"):
        checkpoints.main([str(path), str(tmp_path / "out.bin"), *flags])
    net.config = dataclasses.replace(net.config, time_scale=1000.0)
    with torch.no_grad():
        assert close(found(x, t, labels), -net(x, 1 - t, labels), 1e-5)


@pytest.mark.parametrize("name", checkpoints.STUDENTS)
def test_published_students_by_name(name):
    source = checkpoints.STUDENTS[name]
    kind = "gmdit" if "fm" in name else "gmrepa"
    folder = f"{kind}_k32_imagenet_piid_{name[-4]}step"
    file = "diffusion_pytorch_model.safetensors"
    assert source.path == f"Lakonik/pi-Flow-ImageNet/{folder}/{file}"
    assert source.time_scale == (1000.0 if "fm" in name else 1.0)
    assert source.nfe == int(name[-4])


# -- decoder ---------------------------------------------------------------------------------------


def test_decoder_is_what_the_config_states():
    config, latents = DiTConfig(num_classes=1000, decoder=PIXELS), torch.randn(2, 4, 3, 3)
    images = load_decoder(config, torch.device("cpu"))(latents)
    assert torch.equal(images, torch.nn.functional.pixel_shuffle(latents, 2).clamp(-1, 1))


def test_vae_is_checked_and_what_is_not_finite_is_refused(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.5,
        shift_factor=0.25, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    ).eval()  # fmt: skip
    vae.save_pretrained(tmp_path)
    config, latents = DiTConfig(decoder=str(tmp_path)), torch.randn(3, 4, 4, 4)
    with torch.no_grad():
        expected = vae.decode(latents / 0.5 + 0.25).sample.clamp(-1, 1)
    assert close(load_decoder(config, torch.device("cpu"))(latents), expected, 1e-5)
    with pytest.raises(ValueError, match="in torch.float32 are not finite"):
        load_decoder(config, torch.device("cpu"))(latents * torch.nan)
