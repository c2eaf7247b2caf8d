"""imagenet.sample: seeds, processes, layouts, metrics against their definitions."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from two_processes import run_two

import imagenet.sample as sampling
from common import fashion
from common.files import writing
from common.teachers import integrate_teacher
from imagenet import checkpoints
from imagenet.checkpoints import init_student_from_teacher, load_dit, save_dit
from imagenet.dit import PIXELS, DiT, DiTConfig, guided_teacher
from piflow_minimal import DXPolicy, GMFlowPolicy, rollout
from piflow_minimal import sample as follow

SMALL = DiTConfig(hidden=16, depth=2, num_heads=2, latent_size=4, num_classes=5)
CPU = torch.device("cpu")


def small_net(head: str = "velocity", components: int = 1) -> DiT:
    torch.manual_seed(0)
    net = DiT(dataclasses.replace(SMALL, head=head, components=components))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval().requires_grad_(False)


def run_student() -> DiT:
    """What a run of two evaluations writes: its file states how it is sampled."""
    net = small_net("dx", 4)
    net.config = dataclasses.replace(net.config, nfe=2, solver="exact", total_substeps=24)
    return net


@pytest.fixture(autouse=True)
def no_vae(monkeypatch):
    """Latents of five classes are no Fashion-MNIST: a VAE would be loaded. Here they are images."""

    def decoder(config, device, dtype):
        return lambda latents: latents[:, :3].clamp(-1, 1)

    monkeypatch.setattr(checkpoints, "load_decoder", decoder)


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """A teacher file, a student file, and the folder of a run."""
    teacher, student = tmp_path / "teacher.safetensors", tmp_path / "student.safetensors"
    save_dit(small_net(), teacher)
    save_dit(small_net("gmflow", 3), student)
    run = {"teacher": str(teacher), "guidance": 1.5, "guidance_interval": [0.0, 0.5]}
    folder = tmp_path / "run"
    save_dit(run_student(), folder / "student.safetensors")
    (folder / "config.json").write_text(json.dumps(run))
    return {"teacher": str(teacher), "student": str(student), "run": str(folder)}


def images(out) -> np.ndarray:
    with np.load(out / "samples.npz") as file:
        return file["arr_0"]


def sample(model, out, *options) -> np.ndarray:
    small = ["--count", "7", "--batch", "3", "--total-substeps", "8", "--device", "cpu", "--npz"]
    sampling.main([str(model), "--out", str(out), *small, *options])
    return images(out)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to one grey level: batches of another size may round otherwise."""
    return a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).max() <= 1


# -- which image is which --------------------------------------------------------------------------


def resolved(model: str, net: DiT, *options: str) -> sampling.Settings:
    return sampling.resolve_settings(sampling.parse(sampling.Settings, "", [model, *options]), net)


def seeded_noise(seed: int) -> torch.Tensor:
    return torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_image_i_is_drawn_from_the_seed_i(files):
    net = small_net("gmflow", 3)
    settings = resolved(files["student"], net)
    noise, labels, _ = sampling.draws(settings, net, range(2, 9))
    assert all(torch.equal(noise[i], seeded_noise(2 + i)) for i in range(7))
    assert labels.tolist() == [2, 3, 4, 0, 1, 2, 3]


@pytest.mark.parametrize("labels", ["balanced", "published"])
def test_noises_of_different_seeds_are_disjoint(files, labels):
    """Also in the last images of the largest count: the CPU's generator keeps 32 bits of a seed."""
    net, found = small_net("gmflow", 3), []
    last = sampling.APART - sampling.PUBLISHED_OFFSET - 1
    for seed in ("0", "1", "2", "2000"):
        settings = resolved(files["student"], net, "--labels", labels, "--seed", seed)
        for numbers in (range(50), range(1000, 1050), range(last - 50, last)):
            found += list(sampling.draws(settings, net, numbers)[0].flatten(1))
    assert len(torch.stack(found).unique(dim=0)) == len(found) == 600
    assert sampling.APART * 2001 < 2**31


def test_published_labels_and_noise(files, tmp_path):
    """Image i: randint(0, 1000) of a generator seeded with i, noise of one seeded with i + 1000."""
    net = DiT(dataclasses.replace(SMALL, num_classes=1000))
    settings = resolved(files["student"], net, "--labels", "published")
    labels = sampling.draws(settings, net, range(50_000))[1]
    for i in (0, 1, 7, 49_999):
        generator = torch.Generator().manual_seed(i)
        assert labels[i] == torch.randint(0, 1000, (1,), generator=generator)
    counts = labels.bincount()
    assert (counts.min(), counts.max()) == (29, 80)  # the spread that the public evaluation has
    noise, *_ = sampling.draws(settings, net, range(3, 5))
    for row, seed in zip(noise, (1003, 1004), strict=True):
        assert torch.equal(row, seeded_noise(seed))
    sample(files["student"], tmp_path / "out", "--labels", "published")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["labels"] == "published"
    with np.load(tmp_path / "out" / "samples.npz") as file:
        expected = [torch.randint(5, (), generator=torch.Generator().manual_seed(i)).item()
                    for i in range(7)]  # fmt: skip
        assert file["arr_1"].tolist() == expected


@pytest.mark.parametrize("how", [[], ["--nfe", "3", "--h", "1.5", "--temperature", "0.5"]])
def test_images_do_not_depend_on_the_batch(files, tmp_path, how):
    a = sample(files["student"], tmp_path / "a", *how)
    b = sample(files["student"], tmp_path / "b", "--batch", "7", *how)
    later = sample(files["student"], tmp_path / "c", "--first", "5", *how)
    other = sample(files["student"], tmp_path / "d", "--seed", "5", *how)
    assert a.std() > 20 and close(a, b) and not close(a, other)
    assert close(a[5:7], later[:2])


@pytest.mark.slow
def test_two_processes_sample_what_one_does(tmp_path, monkeypatch):
    """The program itself, with a network of ten classes, whose latents need no VAE."""
    monkeypatch.undo()
    torch.manual_seed(0)
    net = DiT(dataclasses.replace(SMALL, decoder=PIXELS))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_dit(net, tmp_path / "ten.safetensors")
    argv = [str(tmp_path / "ten.safetensors"), "--nfe", "2", "--batch", "2", "--device", "cpu"]
    for count in (7, 9, 1):  # the last round is short: of the second process, of both, of all
        both = [*argv, "--count", str(count), "--npz", "--out"]
        sampling.main([*both, str(tmp_path / f"one{count}")])
        run_two("imagenet.sample", [*both, str(tmp_path / f"two{count}")])
        one, two = (images(tmp_path / f"{name}{count}") for name in ("one", "two"))
        assert len(np.unique(one.reshape(count, -1), axis=0)) == count and close(one, two)


# -- what is sampled -------------------------------------------------------------------------------


def test_student_sample_is_the_policy_followed_to_the_end(files, tmp_path):
    pixels = sample(files["student"], tmp_path / "out")
    net, labels = small_net("gmflow", 3), torch.arange(7) % 5
    noise = torch.stack([seeded_noise(i) for i in range(7)])
    policy = GMFlowPolicy(net(noise, torch.ones(7), labels), noise, 1.0)
    x_0 = rollout(policy, noise, 1.0, 0.0, total_substeps=8)
    expected = ((x_0[:, :3].clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert close(pixels, expected)


def test_noise_and_temperature_are_those_of_the_core(files, tmp_path):
    """h > 0: the noise that image i gets comes from its generator, behind its first noise."""
    pixels = sample(files["student"], tmp_path / "out", "--nfe", "2", "--h", "2",
                    "--temperature", "0.3")  # fmt: skip
    net, rows = small_net("gmflow", 3), []
    for i in range(7):
        generator = torch.Generator().manual_seed(i)
        noise = torch.randn(1, 4, 4, 4, generator=generator)
        student = sampling.dit_student(net, torch.tensor([i % 5]))
        options = {"h": 2.0, "temperature": 0.3, "total_substeps": 8, "generator": generator}
        rows.append(follow(student, noise, 2, **options))
    expected = checkpoints.to_pixels(torch.cat(rows)[:, :3].clamp(-1, 1)).numpy()
    assert close(pixels, expected)
    for options in (["--h", "0"], ["--temperature", "1"]):  # both matter
        other = ["--nfe", "2", "--h", "2", "--temperature", "0.3", *options]
        assert not close(sample(files["student"], tmp_path / options[0], *other), pixels)


def test_solver_and_substeps_reach_the_policy(files, tmp_path):
    """Euler and DEIS approach the same images, the second one faster."""

    def images_by(solver: str, substeps: int) -> np.ndarray:
        how = ["--solver", solver, "--total-substeps", str(substeps)]
        return sample(files["student"], tmp_path / f"{solver}{substeps}", *how).astype(float)

    fine = images_by("euler", 1024)
    errors = [abs(images_by(*how) - fine).mean() for how in (("euler", 8), ("euler", 32))]
    assert errors[1] < 0.5 * errors[0] and abs(images_by("deis", 32) - fine).mean() < errors[1]


def test_compile_reaches_the_policy(files, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(torch, "compile", lambda f: found.append(f) or f)
    sample(files["student"], tmp_path / "plain")
    assert not found
    sample(files["student"], tmp_path / "compiled", "--compile")
    assert found == [torch.sin, GMFlowPolicy.velocity, DXPolicy.velocity]
    monkeypatch.setattr(sampling, "can_compile", lambda device: False)
    sample(files["student"], tmp_path / "no compiler", "--compile")
    assert len(found) == 3


def test_dx_student_of_a_run_keeps_its_segments(files, tmp_path):
    """Trained with two segments, sampled in four steps: each grid still spans one half."""
    pixels = sample(files["run"], tmp_path / "out", "--nfe", "4", "--pairs", "0")
    net, labels = small_net("dx", 4), torch.arange(7) % 5
    noise = torch.stack([seeded_noise(i) for i in range(7)])

    def student(x: torch.Tensor, t: torch.Tensor) -> DXPolicy:
        return DXPolicy(net(x, t, labels), x, t, segment_size=0.5)

    x_0 = follow(student, noise, 4, solver="exact")
    assert close(pixels, checkpoints.to_pixels(x_0[:, :3].clamp(-1, 1)).numpy())


def test_teacher_takes_guided_euler_steps(files, tmp_path, capsys):
    options = ["--nfe", "3", "--guidance", "2", "--guidance-interval", "0", "0.5"]
    pixels = sample(files["teacher"], tmp_path / "out", *options)
    net, labels = small_net(), torch.arange(7) % 5
    x = torch.stack([seeded_noise(i) for i in range(7)])
    velocity = guided_teacher(net, labels, 2.0, (0, 0.5))
    for t in (1.0, 2 / 3, 1 / 3):
        x = x - velocity(x, torch.full((7,), t)) / 3
    expected = ((x[:, :3].clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert close(pixels, expected)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["nfe"] == 3 and metrics["count"] == 7 and metrics["seconds_per_image"] > 0
    assert "seconds_per_image" in capsys.readouterr().out


def test_settings_come_from_the_file_and_the_run(files):
    settings = resolved(files["run"], run_student(), "--pairs", "2")
    assert (settings.nfe, settings.solver, settings.total_substeps) == (2, "exact", 24)
    assert (settings.guidance, settings.guidance_interval) == (1.5, (0.0, 0.5))
    assert settings.teacher == files["teacher"]
    options = ["--pairs", "2", "--solver", "deis", "--total-substeps", "8", "--nfe", "1"]
    settings = resolved(files["run"], run_student(), *options)
    assert (settings.nfe, settings.solver, settings.total_substeps) == (1, "deis", 8)
    settings = resolved(files["student"], small_net("gmflow", 3))  # nothing stated: as published
    assert (settings.nfe, settings.solver, settings.total_substeps) == (1, "euler", 128)
    assert resolved(files["student"], small_net("dx", 3)).solver == "exact"


def test_every_file_of_a_run_is_sampled_alike(files, tmp_path):
    """The folder, student.safetensors and checkpoints/step_*.pt state the same."""
    net, run = run_student(), Path(files["run"])
    trained = {key: value + 1 for key, value in net.state_dict().items()}
    content = {"iteration": 20, "net": trained, "ema": net.state_dict(), "settings": {}}
    content |= {"export": dataclasses.asdict(net.config)}
    (run / "checkpoints").mkdir()
    torch.save(content, run / "checkpoints/step_00000020.pt")
    names = ("", "student.safetensors", "checkpoints/step_00000020.pt")
    small = ["--count", "3", "--pairs", "0", "--device", "cpu", "--npz", "--out"]
    found = []
    for i, name in enumerate(names):
        sampling.main([str(run / name), *small, str(tmp_path / str(i))])
        found.append(images(tmp_path / str(i)))
        settings = json.loads((tmp_path / str(i) / "metrics.json").read_text())["settings"]
        stated = (settings["nfe"], settings["solver"], settings["total_substeps"])
        assert stated == (2, "exact", 24)
        assert (settings["guidance"], settings["teacher"]) == (1.5, files["teacher"])
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


def test_endpoint_error_is_the_distance_of_pairs(files, tmp_path):
    """A teacher compared with itself: zero at the same number of steps."""
    options = ["--pairs", "5", "--teacher", files["teacher"], "--teacher-steps", "4"]
    sample(files["teacher"], tmp_path / "same", "--nfe", "4", *options)
    sample(files["teacher"], tmp_path / "other", "--nfe", "2", *options)
    same, other = (
        json.loads((tmp_path / name / "metrics.json").read_text())["endpoint_rmse"]
        for name in ("same", "other")
    )
    net, labels = small_net(), torch.arange(5)
    noise = torch.stack([seeded_noise(i) for i in range(5)])
    velocity = guided_teacher(net, labels)
    ends = [integrate_teacher(velocity, noise, steps) for steps in (2, 4)]
    assert same < 1e-6
    assert other == pytest.approx((ends[0] - ends[1]).square().mean().sqrt().item(), rel=1e-4)
    assert (tmp_path / "same" / "pairs.png").is_file()


def test_remote_run(files, tmp_path):
    for name in ("config.json", "student.safetensors"):
        with writing(f"memory://bucket/dx/{name}") as temporary:
            temporary.write_bytes((tmp_path / "run" / name).read_bytes())
    remote = sample("memory://bucket/dx", tmp_path / "remote")
    assert np.array_equal(remote, sample(files["run"], tmp_path / "local"))


# -- files -----------------------------------------------------------------------------------------


def test_npz_is_what_the_adm_suite_reads(files, tmp_path):
    pixels = sample(files["student"], tmp_path / "out")
    assert pixels.dtype == np.uint8 and pixels.shape == (7, 4, 4, 3)
    with np.load(tmp_path / "out" / "samples.npz") as file:
        assert file.files == ["arr_0", "arr_1"]
        assert file["arr_1"].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "metrics.json", "samples.npz", "samples.png"
    }  # fmt: skip


@pytest.mark.parametrize(
    "given, named",
    [
        (["--count", "0"], "--count is 0"),
        (["--guidance-interval", "0.5", "0.2"], "--guidance-interval is 0.5 0.2"),
        (["--seed", "2001"], "--seed is 2001; it must be at least 0 and at most 2000"),
        (["--solver", "heun"], "--solver: invalid choice: 'heun'"),
        (["--reference", "nowhere.npz"], "nowhere.npz"),
        (["--labels", "random"], "--labels: invalid choice: 'random'"),
        (["--h", "-1"], "--h is -1.0; it must be at least 0"),
        (["--h", "nan"], "--h is nan"),
        (["--temperature", "0"], "--temperature is 0.0"),
        (["--guidance", "nan"], "--guidance is nan"),
        (["--reference", "teacher.safetensors"], "is no readable .npz"),
        (["--reference", "empty.npz"], "it needs arr_0"),
        (["--nfee", "1"], "unrecognized arguments: --nfee"),
        (["--pairs", "3"], "--pairs 3 needs a --teacher"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(files, tmp_path, monkeypatch, given, named):
    monkeypatch.chdir(tmp_path)
    np.savez("empty.npz", x=np.ones(2))
    with pytest.raises((ValueError, OSError)) as error:
        sampling.main([files["student"], "--out", "out", "--device", "cpu", *given])
    assert named in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "model, given, named",
    [
        ("teacher", ["--h", "1"], "has a velocity head: --h, --solver and --compile are for"),
        ("teacher", ["--compile"], "has a velocity head: --h, --solver and --compile are for"),
        ("teacher", ["--solver", "deis"], "has a velocity head: --h, --solver"),
        ("teacher", ["--temperature", "0.5"], "--temperature for gmflow students"),
        ("run", ["--temperature", "0.5"], "has a dx head: "),
    ],
)
def test_settings_that_do_not_go_with_the_model(files, tmp_path, model, given, named):
    out = tmp_path / "out"
    with pytest.raises(ValueError) as error:
        sampling.main([files[model], "--out", str(out), "--device", "cpu", *given])
    assert named in str(error.value) and not out.exists()


@pytest.mark.parametrize(
    "model, named",
    [
        ("", "no file ./student.safetensors"),
        ("nothing.safetensors", "no file nothing.safetensors"),
        ("empty.safetensors", "empty.safetensors cannot be read as a checkpoint"),
        ("text.safetensors", "text.safetensors cannot be read as a checkpoint"),
        ("empty.pt", "empty.pt cannot be read as a checkpoint"),
        ("text.pt", "text.pt cannot be read as a checkpoint"),
        ("image.png", "image.png cannot be read as a checkpoint"),
        ("half_run", "no file half_run/student.safetensors"),
    ],
)
def test_models_that_cannot_be_read_are_named(tmp_path, monkeypatch, model, named):
    monkeypatch.chdir(tmp_path)
    for name in ("empty.safetensors", "empty.pt"):
        Path(name).touch()
    for name in ("text.safetensors", "text.pt", "image.png"):
        Path(name).write_bytes(b"\x89PNG no network, but long enough to be one")
    Path("half_run").mkdir()
    Path("half_run/config.json").write_text("{}")
    before = sorted(Path().rglob("*"))
    with pytest.raises((ValueError, OSError)) as error:
        sampling.main([model or ".", "--out", "out", "--device", "cpu"])
    assert named in str(error.value) and sorted(Path().rglob("*")) == before


def test_the_teacher_of_pairs_may_have_a_variance_half(files):
    """Twice the rows are a velocity there, as for the run that it trained."""
    path = Path(files["teacher"])
    state, net = load_file(path), small_net()
    for name in ("weight", "bias"):
        rows = state[f"final_layer.linear.{name}"].unflatten(0, (-1, SMALL.channels))
        state[f"final_layer.linear.{name}"] = torch.cat([rows, rows + 1], 1).flatten(0, 1)
    stated = dataclasses.asdict(SMALL)
    del stated["head"]
    save_file(state, path, {"config": json.dumps(stated)})
    with pytest.raises(ValueError, match="imagenet.checkpoints FILE OUT --head"):
        sampling.open_model(str(path), CPU)
    with pytest.warns(UserWarning, match="read as a velocity"):
        found = sampling.open_model(str(path), CPU, "velocity")
    assert torch.equal(found.final_layer.linear.weight, net.final_layer.linear.weight)


def test_published_students_by_name(monkeypatch):
    """Their factor of t and their number of evaluations, which their files do not state."""
    loaded = []

    def load(path, **options):
        loaded.append((path, options["time_scale"]))
        return small_net("gmflow", 3)

    monkeypatch.setattr(sampling, "load_dit", load)
    for name, nfe in (("gm-fm-1nfe", 1), ("gm-repa-1nfe", 1), ("gm-repa-2nfe", 2)):
        net = sampling.open_model(name, CPU)
        assert resolved(name, net).nfe == nfe
    paths, factors = zip(*loaded, strict=True)
    assert factors == (1000.0, 1.0, 1.0) and len(set(paths)) == 3


def test_an_out_that_is_a_file_is_left_alone(files, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OSError, match="out"):
        sample(files["student"], tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_default_folders_of_models_with_one_file_name_differ(files, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name = "diffusion_pytorch_model.safetensors"
    for student in ("gm_1step", "gm_2step"):
        save_dit(small_net("gmflow", 3), Path("hub") / student / name)
        sampling.main([f"hub/{student}/{name}", "--count", "2", "--device", "cpu"])
    assert {path.name for path in Path("outputs/samples").iterdir()} == {
        "hub-gm_1step-diffusion_pytorch_model-gmflow-nfe1",
        "hub-gm_2step-diffusion_pytorch_model-gmflow-nfe1",
    }


# -- not finite, precision -------------------------------------------------------------------------


def test_images_that_are_not_finite_are_an_error(files, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "sample", lambda student, noise, *_, **__: noise * torch.nan)
    with pytest.raises(ValueError, match="images 0 to 2 are not finite"):
        sample(files["student"], tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_bfloat16_weights_give_nearly_the_same_images(files, tmp_path):
    plain = sample(files["student"], tmp_path / "a").astype(float)
    half = sample(files["student"], tmp_path / "b", "--bf16").astype(float)
    assert 0 < abs(plain - half).mean() < 3


# -- metrics --------------------------------------------------------------------------------------


def test_missing_torch_fidelity_is_one_line_before_anything_is_sampled(
    files, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    np.savez(tmp_path / "adm.npz", mu=np.ones(2048), sigma=np.eye(2048))
    argv = [files["student"], "--reference", str(tmp_path / "adm.npz"), "--device", "cpu"]
    with pytest.raises(ImportError, match="torch_fidelity"):
        sampling.main([*argv, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_tiny_student_is_judged_by_the_shipped_features(tmp_path, monkeypatch):
    """An untrained student of the shipped teacher: pixels in, the distance of those pixels out."""
    monkeypatch.undo()
    teacher = load_dit(fashion.TEACHER)
    student = tmp_path / "student.safetensors"
    save_dit(init_student_from_teacher(teacher, "gmflow", 2), student)
    options = ["--count", "70", "--batch", "35", "--total-substeps", "4", "--pairs", "2", "--npz"]
    options += ["--teacher-steps", "2", "--device", "cpu"]
    sampling.main([str(student), "--out", str(tmp_path / "out"), *options])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    pixels = torch.tensor(images(tmp_path / "out"))
    assert pixels.shape == (70, 28, 28, 1)
    features = fashion.load_features()
    values = features.net.body(pixels.permute(0, 3, 1, 2) / 127.5 - 1).double()
    mean, covariance = features.mean.double().numpy(), features.covariance.double().numpy()
    ours = values.mean(0).numpy(), np.cov(values.numpy(), rowvar=False)
    root = np.sqrt(np.linalg.eigvals(ours[1] @ covariance).astype(complex)).real.sum()
    traces = np.trace(ours[1]) + np.trace(covariance) - 2 * root
    expected = ((ours[0] - mean) ** 2).sum() + traces
    assert metrics["frechet_distance"] == pytest.approx(expected, rel=1e-3)
    assert 0 <= metrics["recognition_rate"] <= 1 and metrics["endpoint_rmse"] > 0
