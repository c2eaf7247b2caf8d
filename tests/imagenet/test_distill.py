"""imagenet.distill: presets, the task, small runs of the real thing. (Loop: test_train.py.)"""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch
from fake_cuda import backward as fake_backward
from fake_cuda import needs_fake_cuda
from torch._subclasses.fake_tensor import FakeTensorMode
from two_processes import run_two

from common import fashion, frechet
from common.cli import parse
from common.files import join, list_files, read_text
from common.teachers import integrate_teacher
from common.train import read_checkpoint
from imagenet import distill, metrics
from imagenet.checkpoints import TEACHERS, load_dit, save_dit, to_pixels
from imagenet.dit import PIXELS, DiT, DiTConfig, guided_teacher
from piflow_minimal import (
    DXPolicy,
    GMFlowPolicy,
    pi_id_data_dependent,
    pi_id_data_free,
    sample,
)

SMALL = DiTConfig(hidden=16, depth=2, num_heads=2, latent_size=4, num_classes=10, decoder=PIXELS)
CPU = torch.device("cpu")


def read_settings(argv: list[str]) -> distill.Settings:
    return parse(distill.Settings, "", argv, distill.PRESETS)


def small_teacher(scale: float = 0.15) -> DiT:
    torch.manual_seed(0)
    net = DiT(SMALL)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return net.eval().requires_grad_(False)


@pytest.fixture
def teacher_file(tmp_path) -> str:
    save_dit(small_teacher(), tmp_path / "teacher.safetensors")
    return str(tmp_path / "teacher.safetensors")


def flags(teacher: str, out, **changes) -> list[str]:
    """The tiny preset, made smaller; whatever a test relies on is said here, not there."""
    options = {"teacher": teacher, "out": out, "components": 3, "batch": 5, "micro_batch": 5}
    options |= {"warmup": 2, "iterations": 6, "log_every": 2, "save_every": 2, "picture_every": 0}
    options |= {"guidance": 1.5, "guidance_interval": (0, 0.8), "dropout": 0.3}
    options |= {"device": "cpu", "lr": 1e-3, "time_weight": 0.0, "loss_scale": 1.0}
    options |= {"num_intermediates": 2, "solver": "deis", "total_substeps": 4, "sample_substeps": 4}
    options |= {"query_times": "uniform", "min_query_time": 0.0}
    options |= {"beta2": 0.99, "clip": 1.0, "clip_start": 0, "ema_start": 0, "lr_decay": "none"}
    argv = []
    for name, value in (options | changes).items():
        values = value if isinstance(value, tuple) else (value,)
        argv += ["--" + name.replace("_", "-"), *map(str, values)]
    return argv


def task_of(teacher_file: str, more: tuple[str, ...] = (), **changes) -> distill.Distillation:
    s = read_settings([*flags(teacher_file, "out", **changes), *more])
    return distill.Distillation(s, CPU)


def stats(out) -> list[dict]:
    return [json.loads(line) for line in read_text(join(out, "stats.jsonl")).splitlines()]


def newest(out) -> dict:
    folder = join(out, "checkpoints")
    return read_checkpoint(join(folder, list_files(folder, "step_")[-1]))


def assert_same_weights(a: dict, b: dict, atol: float = 0.0) -> None:
    for part in ("net", "ema"):
        for key, value in a[part].items():
            assert (value - b[part][key]).abs().max() <= atol, (part, key)


def loss_and_gradient(task: distill.Distillation, n: int = 5) -> tuple[float, torch.Tensor]:
    torch.manual_seed(3)
    task.net.zero_grad()
    total = 0.0
    for weight, out in task.losses(task.net, 0, range(n)):
        (weight * out.weighted(task.s.time_weight)).backward()
        total += weight * out.weighted(task.s.time_weight).item()
    return total, torch.cat([p.grad.flatten() for p in task.net.parameters()])


# -- settings --------------------------------------------------------------------------------------


COMMON = dict(
    batch=4096, lr=5e-5, warmup=400, beta2=0.95, loss_scale=1.5, clip=50.0,
    clip_start=400, bf16=True, checkpointing=True, num_intermediates=2, total_substeps=128,
    ema_start=400, ema_gamma=7.0, solver="euler", time_weight=0.0, lr_decay="none",
)  # fmt: skip
GM = COMMON | dict(policy="gmflow", components=32, dropout=0.05, window_substeps=0)
DX = COMMON | dict(policy="dx", dropout=0.0, nfe=1, iterations=40_000, guidance=3.2)
DX |= dict(guidance_interval=(0.0, 0.7), teacher="repa")
PUBLISHED = {
    "gm-fm-1nfe": GM
    | dict(nfe=1, iterations=140_000, guidance=2.7, guidance_interval=(0.0, 0.6), teacher="fm"),
    "gm-repa-1nfe": GM
    | dict(nfe=1, iterations=140_000, guidance=3.2, guidance_interval=(0.0, 0.7), teacher="repa"),
    "gm-repa-2nfe": GM
    | dict(nfe=2, iterations=24_000, guidance=2.8, guidance_interval=(0.0, 0.7), teacher="repa"),
    "dx-repa-1nfe-n10": DX | dict(components=10, window_substeps=10),
    "dx-repa-1nfe-n20": DX | dict(components=20, window_substeps=5),
    "dx-repa-1nfe-n40": DX | dict(components=40, window_substeps=3),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_settings(name):
    config = read_settings(["--preset", name])
    assert {key: getattr(config, key) for key in PUBLISHED[name]} == PUBLISHED[name]


def test_time_inputs_of_the_published_teachers():
    assert TEACHERS["fm"][:2] == ("Lakonik/pi-Flow-ImageNet/teachers/flowdit_imagenet.pth", 1000.0)
    assert TEACHERS["repa"][:2] == ("Lakonik/pi-Flow-ImageNet/teachers/repa_imagenet.pth", 1.0)


def test_every_setting_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit) as end:
        read_settings(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for field in dataclasses.fields(distill.Settings):
        flag = field.metadata["flag"] or field.name.replace("_", "-")
        assert "--" + flag in text
        assert field.metadata["help"]


def test_overrides_reach_the_config():
    argv = ["--preset", "gm-repa-1nfe", "--no-bf16", "--lr", "1e-4", "--nfe", "2"]
    config = read_settings(argv)
    assert (config.bf16, config.lr, config.nfe, config.batch) == (False, 1e-4, 2, 4096)


@pytest.mark.parametrize(
    "given, named",
    [
        (["--preset", "huge"], "--preset: invalid choice: 'huge'"),
        (["--policy", "gm"], "--policy: invalid choice: 'gm'"),
        (["--solver", "exact"], "solver exact is for dx"),
        (["--policy", "dx", "--dropout", "0.1"], "--dropout 0.1: "),
        (["--dropout", "1"], "--dropout is 1"),
        (["--lr", "nan"], "--lr is nan"),
        (["--nfe", "0"], "--nfe is 0"),
        (["--guidance-interval", "0", "1.5"], "--guidance-interval is 1.5; it must be"),
        (["--micro-batch", "0"], "--micro-batch is 0; it must be at least 1"),
        (["--teacher", "no/such"], "no file no/such"),
        (["--nfe", "2", "--latents", "nowhere"], "--latents nowhere"),
        (["--guidance-interval", "0.9", "0.8"], "--guidance-interval is 0.9 0.8; it must be"),
        (["--optimizer", "adamw8bit"], "bitsandbytes"),
        (["--logger", "wandb"], "wandb"),
        (["--device", "cuda:99"], "--device 'cuda:99' is not available"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, given, named):
    out = tmp_path / "run"
    for package in ("wandb", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises((ValueError, OSError, ImportError)) as error:
        distill.main(["--out", str(out), "--device", "cpu", *given])
    assert named in str(error.value) and not out.exists()


def test_a_run_with_other_settings_is_not_continued(tmp_path, teacher_file):
    distill.main(flags(teacher_file, tmp_path / "run", iterations=1))
    before = newest(tmp_path / "run")
    with pytest.raises(ValueError, match="is of a run with lr = 0.001, this one has 0.1"):
        distill.main(flags(teacher_file, tmp_path / "run", iterations=1, lr=0.1))
    distill.main(flags(teacher_file, tmp_path / "run", iterations=1, micro_batch=2))  # may change
    assert_same_weights(before, newest(tmp_path / "run"))


# -- the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["gmflow", "dx"])
@pytest.mark.parametrize("nfe", [1, 2])
def test_data_free_losses_are_those_of_the_core(teacher_file, policy, nfe):
    """The draws again, in their order, and Algorithm 3 on a student that is written out here."""
    dx = policy == "dx"
    changes = {"policy": "dx", "dropout": 0.0, "window_substeps": 1} if dx else {}
    task = task_of(teacher_file, nfe=nfe, **changes)
    torch.manual_seed(3)
    found = [(weight, out.loss.item()) for weight, out in task.losses(task.net, 0, range(5))]

    torch.manual_seed(3)
    labels, noise = torch.randint(10, (5,)), torch.randn(5, 4, 4, 4)

    def student(x, t):
        output = task.net(x, t, labels)
        return DXPolicy(output, x, t, 1 / nfe) if dx else GMFlowPolicy(output, x, t)

    def uniforms(tau, segment):
        return torch.rand(5, 2), torch.zeros(5, 1)

    teacher = guided_teacher(task.teacher, labels, 1.5, (0.0, 0.8))
    options = {"total_substeps": 4, "solver": "deis", "dropout": 0.0 if dx else 0.3}
    options |= {"window_substeps": int(dx), "uniforms": uniforms}
    expected = pi_id_data_free(student, teacher, noise, nfe, **options)
    expected = [(weight, out.loss.item()) for weight, out in expected]
    assert np.allclose(found, expected, rtol=1e-5) and sum(w for w, _ in found) == 1


def write_latents(folder) -> np.ndarray:
    """Twelve images in two shards; each is constant, so that it can be recognised."""
    moments = np.zeros((12, 2, 4, 4, 4), np.float16)
    moments[:, 0] = np.arange(12)[:, None, None, None] / 4
    for number, part in enumerate((slice(0, 5), slice(5, 12))):
        np.save(folder / f"latents_{number:05d}.npy", moments[part])
        np.save(folder / f"labels_{number:05d}.npy", np.arange(12)[part] % 10)
    about = {"vae": PIXELS, "scale": 1.0, "classes": 10, "images": 6}  # and mirrored
    (folder / "settings.json").write_text(json.dumps(about))
    return moments


def test_data_dependent_losses_are_those_of_the_core(teacher_file, tmp_path):
    write_latents(tmp_path)
    task = task_of(teacher_file, nfe=2, latents=tmp_path)
    torch.manual_seed(3)
    ((weight, found),) = task.losses(task.net, 0, range(5))
    torch.manual_seed(3)
    items = torch.randint(12, (5,))
    x_0 = (items / 4).view(5, 1, 1, 1).expand(5, 4, 4, 4) + 0 * torch.randn(5, 4, 4, 4)
    labels = items % 10

    def student(x, t):
        return GMFlowPolicy(task.net(x, t, labels), x, t)

    teacher = guided_teacher(task.teacher, labels, 1.5, (0.0, 0.8))
    options = {"total_substeps": 4, "solver": "deis", "dropout": 0.3}
    options |= {"uniforms": lambda tau, segment: (torch.rand(5, 2), torch.zeros(5, 1))}
    expected = pi_id_data_dependent(student, teacher, x_0, 2, **options)
    assert weight == 1 and found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert len(set(found.t.tolist())) > 5


@pytest.mark.parametrize("tau_src, size, low", [
    (1.0, 1.0, 0.125), (1.0, 0.5, 0.5), (0.5, 0.5, 0.125), (0.125, 0.125, 0.125),
])  # fmt: skip
def test_query_times_stratified_and_above_the_last_substep(teacher_file, tau_src, size, low):
    options = {"query_times": "stratified", "min_query_time": 0.125, "num_intermediates": 2}
    task = task_of(teacher_file, **options)
    tau = torch.full((6,), tau_src)
    uniforms, _ = task.query_times(tau, torch.full((6,), size))
    t = tau[:, None] - size * uniforms
    if low == tau_src:  # the segment lies below: one time, where it starts
        assert (t == low).all()
        return
    strata = (tau_src - t) / (tau_src - low) * 12  #  one query in each of twelve
    assert sorted(strata.int().flatten().tolist()) == list(range(12))


def test_checkpointing_and_bfloat16_change_cost_not_the_result(teacher_file):
    """Published precision: a teacher with bfloat16 weights, a float32 student under autocast."""
    loss, plain = loss_and_gradient(task_of(teacher_file))
    for more, tolerance in (("--checkpointing", 1e-6), ("--bf16", 0.05)):
        task, seen = task_of(teacher_file, (more,)), []
        task.net.blocks[0].attn.register_forward_hook(lambda *call, to=seen: to.append(call[2]))
        other, found = loss_and_gradient(task)
        kind = torch.bfloat16 if more == "--bf16" else torch.float32
        assert {output.dtype for output in seen} == {kind}
        assert {p.dtype for p in task.teacher.parameters()} == {kind}
        assert {p.dtype for p in task.net.parameters()} == {torch.float32}
        assert found.dtype == torch.float32 and other == pytest.approx(loss, rel=tolerance)
        assert (found - plain).norm() < max(tolerance, 1e-5) * plain.norm()


@needs_fake_cuda
@pytest.mark.parametrize("policy", ["gmflow", "dx"])
@pytest.mark.parametrize("nfe", [1, 2])
def test_loss_on_a_gpu_without_host_reads(teacher_file, policy, nfe):
    """Without guidance, whose choice of rows is one device sync per query."""
    changes = {"policy": "dx", "dropout": 0.0, "window_substeps": 1} if policy == "dx" else {}
    task = task_of(teacher_file, nfe=nfe, guidance=1.0, **changes)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            task.teacher = DiT(SMALL).requires_grad_(False)
            net = DiT(dataclasses.replace(SMALL, head=policy, components=3))
        task.device = torch.device("cuda")
        loss = sum(weight * out.loss for weight, out in task.losses(net, 0, range(3)))
        assert loss.device.type == "cuda" and loss.dtype == torch.float32
        found = fake_backward(loss)
        assert all(parameter in found for parameter in net.parameters())


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["free", "dependent"])
def test_two_evaluations_learn(tmp_path, teacher_file, data, capsys):
    changes = {"nfe": 2, "iterations": 42, "log_every": 14, "batch": 16, "lr_decay": "cosine"}
    changes |= {"micro_batch": 16, "guidance": 1.0, "dropout": 0.0}
    if data == "dependent":
        write_latents(tmp_path)
        changes["latents"] = tmp_path
    out = tmp_path / "run"
    distill.main(flags(teacher_file, out, **changes))
    assert ("data-free (Algorithm 3)" in capsys.readouterr().out) == (data == "free")
    losses = [record["loss"] for record in stats(out)]
    assert len(losses) == 3 and losses[2] < 0.8 * losses[0]

    net, config = load_dit(out / "student.safetensors"), json.loads(read_text(out / "config.json"))
    assert (config["nfe"], config["guidance"], config["iterations"]) == (2, 1.0, 42)
    if data == "free":
        labels, noise = torch.arange(10), torch.randn(10, 4, 4, 4)
        target = integrate_teacher(guided_teacher(small_teacher(), labels), noise, 64)
        untrained = task_of(teacher_file, nfe=2).net
        errors = [
            (sample(distill.dit_student(n, labels), noise, 2) - target).square().mean()
            for n in (net, untrained)
        ]
        assert errors[0] < errors[1]


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_equal_one(tmp_path, teacher_file, shard):
    """The DiT, recomputed, data-free, with pictures; with --shard its blocks are split."""
    options = {"nfe": 2, "iterations": 3, "log_every": 1, "guidance": 1.5, "batch": 8}
    options |= {"picture_every": 3, "micro_batch": 2}
    distill.main(flags(teacher_file, tmp_path / "one", **options))
    argv = [*flags(teacher_file, tmp_path / "two", **options), "--checkpointing"]
    run_two("imagenet.distill", argv + ["--shard"] * shard)
    one, two = stats(tmp_path / "one"), stats(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    assert two[-1]["endpoint_rmse"] == pytest.approx(one[-1]["endpoint_rmse"], rel=1e-4)
    assert list_files(tmp_path / "two" / "pictures") == ["step_00000003.png"]
    assert_same_weights(newest(tmp_path / "one"), newest(tmp_path / "two"), atol=5e-5)
    students = [load_dit(tmp_path / name / "student.safetensors") for name in ("one", "two")]
    for a, b in zip(*(net.parameters() for net in students), strict=True):
        assert torch.allclose(a, b, atol=5e-5)


def test_frechet_distance_while_training(tmp_path):
    """Images of the average on two processes; the same images, drawn and measured here, in one."""
    argv = ["--iterations", "2", "--batch", "4", "--picture-every", "2"]
    argv += ["--fid-images", "81", "--device", "cpu"]
    run_two("imagenet.distill", [*argv, "--out", str(tmp_path)])
    found = [record["frechet_distance"] for record in stats(tmp_path)]
    net, labels = load_dit(tmp_path / "student.safetensors"), torch.arange(81) % 10
    generators = [torch.Generator().manual_seed(i) for i in range(81)]
    noise = torch.stack([torch.randn(4, 14, 14, generator=g) for g in generators])
    with torch.no_grad():
        x_0 = sample(distill.dit_student(net, labels), noise, **distill.TINY.sampling)
    pixels = to_pixels(fashion.to_images(x_0).clamp(-1, 1)).permute(0, 3, 1, 2)
    expected = fashion.frechet_distance(pixels / 127.5 - 1)
    assert len(found) == 1 and found[0] == pytest.approx(expected, rel=1e-3)


def test_fid_while_training(teacher_file, monkeypatch):
    """A stand-in for Inception: three features of an image; its reference has moments only."""

    def inception(pixels):
        assert pixels.dtype == torch.uint8 and pixels.shape[1:] == (3, 8, 8)
        return pixels.double().flatten(2).mean(2) / 100, None

    def decode(latents):
        return fashion.to_images(latents).clamp(-1, 1).repeat(1, 3, 1, 1)

    def scaled(x, labels):
        return x * 0.3 + (labels / 20)[:, None, None, None]

    mean, covariance = torch.tensor([1.0, 2.0, 1.5]).double(), torch.eye(3).double()
    reference = metrics.Reference("fid", inception, mean, covariance)
    monkeypatch.setattr(metrics, "open_reference", lambda *given: reference)
    task = task_of(teacher_file, fid_images=150, picture_every=1)
    task.decode = decode
    monkeypatch.setattr(task, "sample", lambda net, x, labels: scaled(x, labels))
    noise = [torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(150)]
    pixels = to_pixels(decode(scaled(torch.stack(noise), torch.arange(150) % 10)))
    ours = frechet.moments(inception(pixels.permute(0, 3, 1, 2))[0])
    expected = frechet.gaussian_distance(*ours, mean, covariance)
    assert task.frechet_distance(None) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("wrong", [{"fid_images": 64}, {"fid_images": 100, "eval_every": 0}])
def test_a_distance_that_would_not_be_measured_is_refused(wrong):
    with pytest.raises(ValueError, match="--fid-images .* above 64.*--picture-every"):
        distill.Settings(**wrong)


def test_fid_needs_a_reference_before_anything_is_trained():
    s = read_settings(flags("teacher", "out", fid_images=100, picture_every=1))
    teacher = small_teacher()
    teacher.config = dataclasses.replace(SMALL, decoder="some VAE")
    with pytest.raises(ValueError, match="--fid-images needs --reference"):
        distill.Distillation(s, CPU, teacher)


def test_compile_is_per_block_where_it_works(teacher_file, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    monkeypatch.setattr(distill, "can_compile", lambda device: True)
    task = task_of(teacher_file, ("--compile",))
    assert compiled == [*task.net.blocks, *task.teacher.blocks] and task.compile
    monkeypatch.setattr(distill, "can_compile", lambda device: False)
    assert not task_of(teacher_file, ("--compile",)).compile
    assert not task_of(teacher_file).compile


@pytest.mark.slow
def test_compiled_training_is_the_same(tmp_path, teacher_file):
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        distill.main([*flags(teacher_file, tmp_path / name, iterations=3, log_every=1), *more])
    plain, fast = stats(tmp_path / "plain"), stats(tmp_path / "compiled")
    assert [r["loss"] for r in fast] == pytest.approx([r["loss"] for r in plain], rel=1e-3)


def test_the_tiny_preset_runs(tmp_path):
    """The shipped teacher, the real preset; only fewer and smaller steps."""
    options = ["--iterations", "2", "--batch", "4", "--device", "cpu"]
    distill.main(["--out", str(tmp_path), *options])
    record = stats(tmp_path)[-1]
    assert record["iteration"] == 2 and math.isfinite(record["loss"])
    assert len(record["loss_by_t"]) == 10 and record["images_per_s"] > 0
    assert 0 < record["endpoint_rmse"] < 2
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "stats.jsonl", "student.safetensors", "checkpoints", "pictures"
    }  # fmt: skip
    assert load_dit(tmp_path / "student.safetensors").config.components == distill.TINY.components


def test_every_file_of_a_run_states_how_it_is_sampled(teacher_file, tmp_path):
    for name, substeps, nfe in (("as trained", 4, 1), ("with fewer", 3, 2)):
        options = {"sample_substeps": substeps, "nfe": nfe}
        distill.main(flags(teacher_file, tmp_path / name, iterations=1, **options))
        net = load_dit(tmp_path / name / "student.safetensors")
        assert (net.config.solver, net.config.total_substeps) == ("deis", substeps)
        assert net.config.nfe == nfe
        assert newest(tmp_path / name)["export"] == dataclasses.asdict(net.config)


def test_the_shipped_student_follows_the_shipped_teacher():
    """Its one evaluation against one and 32 guided steps of the teacher from the same noises."""
    net, teacher = load_dit(fashion.ASSETS / "tiny_student.safetensors"), load_dit(fashion.TEACHER)
    noise = torch.randn(20, 4, 14, 14, generator=torch.Generator().manual_seed(5))
    labels, tiny = torch.arange(20) % 10, distill.PRESETS["tiny"]
    velocity = guided_teacher(teacher, labels, tiny.guidance, tiny.guidance_interval)
    few, many = (integrate_teacher(velocity, noise, steps) for steps in (1, 32))
    with torch.no_grad():
        x_0 = sample(distill.dit_student(net, labels), noise, **tiny.sampling)
    errors = [(x - many).square().mean().sqrt().item() for x in (few, x_0)]
    assert net.config.components == tiny.components and errors[1] < 0.6 * errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("preset, limit", [("tiny", 100), ("tiny-2nfe", 100), ("tiny-dx", 150)])
def test_tiny_student_leaves_one_euler_step_behind(tmp_path, preset, limit):
    """200 iterations. One Euler step of the teacher has a Frechet distance of about 400."""
    options = ["--iterations", "200", "--picture-every", "0", "--device", "cpu"]
    distill.main(["--preset", preset, "--out", str(tmp_path), *options])
    net, labels = load_dit(tmp_path / "student.safetensors"), torch.arange(500) % 10
    nfe = distill.PRESETS[preset].nfe
    noise = torch.randn(500, 4, 14, 14, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        student = distill.dit_student(net, labels, 1 / nfe)
        x_0 = sample(student, noise, nfe, total_substeps=64, solver="deis")
    images = fashion.to_images(x_0).clamp(-1, 1)
    assert fashion.frechet_distance(images) < limit
    assert fashion.recognition_rate(images, labels) > 0.8
