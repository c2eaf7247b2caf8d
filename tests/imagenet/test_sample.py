"""imagenet.sample: seeds, parts, layouts, metrics against their definitions."""

import dataclasses
import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from two_processes import run_two

import imagenet.distributed as runs
import imagenet.sample as sampling
from imagenet import checkpoints, fashion
from imagenet.checkpoints import init_student_from_teacher, save_dit
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


@pytest.fixture(autouse=True)
def no_vae(monkeypatch):
    """Latents of five classes are no Fashion-MNIST: a VAE would be loaded. Here they are images."""

    def decoder(config, device):
        return lambda latents: latents[:, :3].clamp(-1, 1)

    monkeypatch.setattr(checkpoints, "load_decoder", decoder)


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """A teacher file, a student file, and the folder of a run."""
    teacher, student = tmp_path / "teacher.safetensors", tmp_path / "student.safetensors"
    save_dit(small_net(), teacher)
    save_dit(small_net("gmflow", 3), student)
    run = {"nfe": 2, "teacher": str(teacher), "guidance": 1.5}
    run |= {"guidance_low": 0.0, "guidance_high": 0.5, "solver": "exact", "substeps": 24}
    folder = tmp_path / "run"
    save_dit(small_net("dx", 4), folder / "student.safetensors")
    (folder / "config.json").write_text(json.dumps(run))
    return {"teacher": str(teacher), "student": str(student), "run": str(folder)}


def images(out) -> np.ndarray:
    with np.load(out / "samples.npz") as file:
        return file["arr_0"]


def sample(model, out, *options) -> np.ndarray:
    small = ["--count", "7", "--batch", "3", "--substeps", "8", "--device", "cpu", "--npz"]
    sampling.main([str(model), "--out", str(out), *small, *options])
    return images(out)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to one grey level: batches of another size may round otherwise."""
    return a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).max() <= 1


# -- which image is which --------------------------------------------------------------------------


def test_image_i_is_drawn_from_seed_plus_i(files):
    net, labels = small_net("gmflow", 3), [0, 1, 2, 3, 4, 0, 1]
    noise, _ = sampling.noise_of(40, range(2, 5), net)
    for row, seed in zip(noise, (42, 43, 44), strict=True):
        torch.manual_seed(seed)
        assert torch.equal(row, torch.randn(4, 4, 4))
    args = sampling.parse([files["student"]])
    settings = sampling.settle(args, net)
    assert sampling.labels_of(settings, range(7), net).tolist() == labels
    settings = dataclasses.replace(settings, classes=(3, 1))
    assert sampling.labels_of(settings, range(1, 4), net).tolist() == [1, 3, 1]


@pytest.mark.parametrize("how", [[], ["--nfe", "3", "--h", "1.5", "--temperature", "0.5"]])
def test_images_do_not_depend_on_the_batch(files, tmp_path, how):
    a = sample(files["student"], tmp_path / "a", *how)
    b = sample(files["student"], tmp_path / "b", "--batch", "7", *how)
    shifted = sample(files["student"], tmp_path / "c", "--seed", "5", "--classes", "0", "1", *how)
    assert a.std() > 20 and close(a, b)
    assert close(a[5:7], shifted[:2])  # image 5 of seed 0, class 0, is image 0 of seed 5


def test_images_do_not_depend_on_the_number_of_processes(files, tmp_path):
    net = small_net("gmflow", 3)
    settings = sampling.settle(sampling.parse([files["student"], "--batch", "2"]), net)
    for world in (1, 2):
        for rank in range(world):
            place = (rank, world, CPU)
            sampling.sample_parts(settings, 7, net, None, tmp_path / str(world), place)
    one, two = (
        sampling.gather(tmp_path / world, 7, 2, tmp_path / f"{world}.npy")[0] for world in "12"
    )
    assert one.shape == (7, 4, 4, 3) and np.array_equal(one, two)


@pytest.mark.slow
def test_two_processes_sample_what_one_does(tmp_path, monkeypatch):
    """The program itself, with a network of ten classes, whose latents need no VAE."""
    monkeypatch.undo()
    torch.manual_seed(0)
    net = DiT(dataclasses.replace(SMALL, decoder=PIXELS))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_dit(net, tmp_path / "ten.safetensors")
    argv = [str(tmp_path / "ten.safetensors"), "--pairs", "0", "--nfe", "2", "--count", "7"]
    argv += ["--batch", "2", "--device", "cpu", "--npz", "--out"]
    sampling.main([*argv, str(tmp_path / "one")])
    run_two("imagenet.sample", [*argv, str(tmp_path / "two")])
    one, two = (images(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 7 and len(np.unique(one.reshape(7, -1), axis=0)) == 7 and close(one, two)


# -- what is sampled -------------------------------------------------------------------------------


def test_student_sample_is_the_policy_followed_to_the_end(files, tmp_path):
    pixels = sample(files["student"], tmp_path / "out")
    net, labels = small_net("gmflow", 3), torch.arange(7) % 5
    noise = torch.stack([torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(i))
                         for i in range(7)])  # fmt: skip
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
    """Euler and Adams-Bashforth approach the same images, the second one faster."""

    def images_by(solver: str, substeps: int) -> np.ndarray:
        how = ["--solver", solver, "--substeps", str(substeps)]
        return sample(files["student"], tmp_path / f"{solver}{substeps}", *how).astype(float)

    fine = images_by("euler", 1024)
    errors = [abs(images_by(*how) - fine).mean() for how in (("euler", 8), ("euler", 32))]
    assert errors[1] < 0.5 * errors[0] and abs(images_by("deis", 32) - fine).mean() < errors[1]


def test_compile_reaches_the_policy(files, tmp_path, monkeypatch):
    import common.cli

    found = []
    monkeypatch.setattr(common.cli, "compiled", lambda f, *_: found.append(f.__qualname__) or f)
    sample(files["student"], tmp_path / "plain")
    assert not found
    sample(files["student"], tmp_path / "compiled", "--compile")
    assert found == ["GMFlowPolicy.velocity", "DXPolicy.velocity"]


def test_dx_student_of_a_run_keeps_its_segments(files, tmp_path):
    """Trained with two segments, sampled in four steps: each grid still spans one half."""
    pixels = sample(files["run"], tmp_path / "out", "--nfe", "4", "--pairs", "0")
    net, labels = small_net("dx", 4), torch.arange(7) % 5
    noise, _ = sampling.noise_of(0, range(7), net)

    def student(x: torch.Tensor, t: torch.Tensor) -> DXPolicy:
        return DXPolicy(net(x, t, labels), x, t, segment_size=0.5)

    x_0 = follow(student, noise, 4, solver="exact")
    assert close(pixels, checkpoints.to_pixels(x_0[:, :3].clamp(-1, 1)).numpy())


def test_teacher_takes_guided_euler_steps(files, tmp_path, capsys):
    options = ["--nfe", "3", "--guidance", "2", "--interval", "0", "0.5"]
    pixels = sample(files["teacher"], tmp_path / "out", *options)
    net, labels = small_net(), torch.arange(7) % 5
    x, velocity = sampling.noise_of(0, range(7), net)[0], guided_teacher(net, labels, 2.0, (0, 0.5))
    for t in (1.0, 2 / 3, 1 / 3):
        x = x - velocity(x, torch.full((7,), t)) / 3
    expected = ((x[:, :3].clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert close(pixels, expected)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["nfe"] == 3 and metrics["count"] == 7 and metrics["seconds_per_image"] > 0
    assert "seconds_per_image" in capsys.readouterr().out


def test_settings_come_from_the_run(files):
    args = sampling.parse([files["run"], "--pairs", "2"])
    settings = sampling.settle(args, small_net("dx", 4))
    assert (settings.nfe, settings.trained_nfe, settings.solver) == (2, 2, "exact")
    assert settings.substeps == 24
    assert (settings.guidance, settings.interval) == (1.5, (0.0, 0.5))
    assert settings.teacher == files["teacher"]
    args = sampling.parse([files["run"], "--pairs", "2", "--solver", "deis", "--substeps", "8"])
    settings = sampling.settle(args, small_net("dx", 4))
    assert (settings.solver, settings.substeps) == ("deis", 8)
    args = sampling.parse([files["student"], "--pairs", "0"])  # a file does not say: as published
    settings = sampling.settle(args, small_net("gmflow", 3))
    assert (settings.solver, settings.substeps) == ("euler", 128)


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
    noise, velocity = sampling.noise_of(0, range(5), net)[0], guided_teacher(net, labels)
    ends = [runs.follow_teacher(velocity, noise, steps) for steps in (2, 4)]
    assert same < 1e-6
    assert other == pytest.approx((ends[0] - ends[1]).square().mean().sqrt().item(), rel=1e-4)
    assert (tmp_path / "same" / "pairs.png").is_file()


def test_remote_run(files, tmp_path):
    for name in ("config.json", "student.safetensors"):
        with runs.writing(f"memory://bucket/dx/{name}") as temporary:
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
        "metrics.json", "parts", "samples.npz", "samples.png", "settings.json"
    }  # fmt: skip


def test_finished_parts_are_kept_and_damaged_ones_redone(files, tmp_path):
    out = tmp_path / "out"
    before = sample(files["student"], out)
    parts = sorted((out / "parts").iterdir())
    assert [part.name[5:13] for part in parts] == ["00000000", "00000003", "00000006"]
    parts[1].unlink()
    parts[2].write_bytes(parts[2].read_bytes()[:-30])
    times = [part.stat().st_mtime_ns for part in (parts[0], parts[2])]
    assert np.array_equal(sample(files["student"], out), before)
    assert parts[0].stat().st_mtime_ns == times[0] and parts[2].stat().st_mtime_ns > times[1]
    longer = sample(files["student"], tmp_path / "longer", "--count", "8")
    assert close(longer[:7], before)


def test_more_images_may_follow(files, tmp_path):
    """Six images in two parts; then eight: the first two parts stay."""
    out = tmp_path / "out"
    first = sample(files["student"], out, "--count", "6")
    more = sample(files["student"], out, "--count", "8")
    assert len(more) == 8 and np.array_equal(more[:6], first)


def test_other_settings_are_refused(files, tmp_path):
    before = sample(files["student"], tmp_path)
    with pytest.raises(ValueError, match="is of a run with seed = 0, this one has 1"):
        sample(files["student"], tmp_path, "--seed", "1")
    assert np.array_equal(images(tmp_path), before)


@pytest.mark.parametrize(
    "given, named",
    [
        (["--count", "0"], "--count is 0"),
        (["--interval", "0.5", "0.2"], "--interval is 0.5 0.2"),
        (["--solver", "heun"], "--solver is 'heun'"),
        (["--reference", "nowhere.npz"], "--reference nowhere.npz"),
        (["--classes", "5"], "--classes has 5; use 0 .. 4"),
        (["--pairs", "3"], "--pairs is 3; it needs --teacher"),
        (["--h", "-1"], "--h is -1.0; it must be at least 0"),
        (["--h", "nan"], "--h is nan"),
        (["--temperature", "0"], "--temperature is 0.0"),
        (["--guidance", "nan"], "--guidance is nan"),
        (["--solver", "exact"], "--solver is exact; it is of dx students"),
        (["--inception", "broken.pth", "--reference", "adm.npz"], "no file of tensors"),
        (["--reference", "teacher.safetensors"], "is no readable .npz"),
        (["--reference", "empty.npz"], "neither images"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(files, tmp_path, monkeypatch, given, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch_fidelity", MagicMock())
    np.savez("adm.npz", mu=np.ones(2), sigma=np.eye(2))
    np.savez("empty.npz", x=np.ones(2))
    Path("broken.pth").write_text("no weights")
    with pytest.raises((ValueError, OSError)) as error:
        sampling.main([files["student"], "--out", "out", "--device", "cpu", *given])
    assert named in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "model, given, named",
    [
        ("teacher", ["--h", "1"], "--h is 1.0; it is of gmflow and dx students"),
        ("teacher", ["--compile"], "--compile is True; it is of gmflow and dx students"),
        ("teacher", ["--solver", "deis"], "--solver is deis; it is of gmflow and dx students"),
        ("run", ["--temperature", "0.5"], "--temperature is 0.5; it is of gmflow students"),
        ("student", ["--out", "s3://bucket/images"], "it must be a local folder"),
    ],
)
def test_settings_that_do_not_go_with_the_model(files, tmp_path, model, given, named):
    out = tmp_path / "out"
    with pytest.raises(ValueError) as error:
        sampling.main([files[model], "--out", str(out), "--device", "cpu", *given])
    assert named in str(error.value) and not out.exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not the folder of a run"):
        sampling.main([str(tmp_path), "--out", str(tmp_path / "out")])


# -- metrics ---------------------------------------------------------------------------------------


def stand_in_inception(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (B, 3, H, W) -> 6 "features" and 4 logits that depend on the image alone."""
    values = pixels.float().flatten(1) / 127.5 - 1
    mix = torch.sin(torch.arange(values.shape[1])[:, None] * torch.arange(1, 11) * 0.7)
    out = values @ mix
    return out[:, :6], out[:, 6:]


def numpy_fid(mean1, cov1, mean2, cov2) -> float:
    """tr((C1 C2)^(1/2)) is the sum of the square roots of the eigenvalues of C1 C2."""
    root = np.sqrt(np.linalg.eigvals(cov1 @ cov2).astype(complex)).real.sum()
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * root)


def moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return values.mean(0), np.cov(values, rowvar=False)


def test_inception_metrics(tmp_path, monkeypatch):
    """Against FID by eigenvalues, precision and recall by all distances."""
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr(sampling, "load_inception", lambda weights, device: stand_in_inception)
    generator = np.random.default_rng(0)
    ours = generator.integers(0, 256, (70, 4, 4, 3), np.uint8)
    real = generator.integers(0, 200, (50, 4, 4, 3), np.uint8)
    f, g = (
        stand_in_inception(torch.tensor(pixels).permute(0, 3, 1, 2))[0].double().numpy()
        for pixels in (ours, real)
    )
    np.savez(tmp_path / "images.npz", arr_0=real)
    net = sampling.load_inception("", CPU)
    found = sampling.imagenet_metrics(net, ours, str(tmp_path / "images.npz"), CPU)
    assert found["fid"] == pytest.approx(numpy_fid(*moments(f), *moments(g)), rel=1e-4)
    assert found["inception_score"] >= 1

    def radius(x: np.ndarray) -> np.ndarray:
        return np.sort(np.linalg.norm(x[:, None] - x, axis=2), axis=1)[:, 3]

    distance = np.linalg.norm(f[:, None] - g, axis=2)
    assert found["precision"] == pytest.approx((distance <= radius(g)).any(1).mean(), abs=1e-6)
    recall = (distance.T <= radius(f)).any(1).mean()
    assert found["recall"] == pytest.approx(recall, abs=1e-6)

    statistics = {"mu": g.mean(0), "sigma": np.cov(g, rowvar=False)}
    np.savez(tmp_path / "statistics.npz", **statistics)
    only = sampling.imagenet_metrics(net, ours, str(tmp_path / "statistics.npz"), CPU)
    assert only["fid"] == pytest.approx(found["fid"], rel=1e-5) and "recall" not in only


def test_reference_layouts(tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    found, statistics = sampling.read_reference(str(tmp_path))
    assert np.array_equal(found, pixels) and statistics == {}
    np.savez(tmp_path / "adm.npz", arr_0=pixels, mu=np.ones(4), sigma=np.eye(4), mu_s=np.ones(9))
    found, statistics = sampling.read_reference(str(tmp_path / "adm.npz"))
    assert np.array_equal(found, pixels) and statistics["sigma"].shape == (4, 4)
    for reference in (tmp_path, tmp_path / "adm.npz"):
        sampling.check_reference(str(reference))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="a folder without images"):
        sampling.check_reference(str(tmp_path / "nothing"))


def test_missing_torch_fidelity_is_one_line_before_anything_is_sampled(
    files, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    np.savez(tmp_path / "adm.npz", mu=np.ones(2), sigma=np.eye(2))
    argv = [files["student"], "--reference", str(tmp_path / "adm.npz"), "--device", "cpu"]
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        sampling.main([*argv, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_inception_weights_are_not_unpickled(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch_fidelity", MagicMock())

    class Bomb:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"weight": Bomb()}, tmp_path / "inception.pth")
    with pytest.raises(ValueError, match="is no file of tensors"):
        sampling.load_inception(str(tmp_path / "inception.pth"), CPU)
    assert "executed" not in capsys.readouterr().out


def test_tiny_student_is_judged_by_the_shipped_features(tmp_path, monkeypatch):
    """An untrained student of the shipped teacher: pixels in, the distance of those pixels out."""
    monkeypatch.undo()
    teacher = sampling.open_model("tiny", 0, 0.0, CPU)
    student = tmp_path / "student.safetensors"
    save_dit(init_student_from_teacher(teacher, "gmflow", 2), student)
    options = ["--count", "70", "--batch", "35", "--substeps", "4", "--pairs", "2", "--npz"]
    options += ["--teacher-steps", "2", "--device", "cpu"]
    sampling.main([str(student), "--out", str(tmp_path / "out"), *options])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    pixels = torch.tensor(images(tmp_path / "out"))
    assert pixels.shape == (70, 28, 28, 1)
    features = fashion.load_features()
    values = features.net.body(pixels.permute(0, 3, 1, 2) / 127.5 - 1).numpy().astype(np.float64)
    mean, covariance = features.mean.double().numpy(), features.covariance.double().numpy()
    expected = numpy_fid(*moments(values), mean, covariance)
    assert metrics["frechet_distance"] == pytest.approx(expected, rel=1e-3)
    assert 0 <= metrics["recognition_rate"] <= 1 and metrics["endpoint_rmse"] > 0
