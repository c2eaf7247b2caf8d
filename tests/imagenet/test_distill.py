"""distill, distributed, cache_latents: small runs of the real thing."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_cuda import backward as fake_backward
from fake_cuda import needs_fake_cuda
from torch._subclasses.fake_tensor import FakeTensorMode
from two_processes import ENVIRONMENT, run_two

import imagenet.distributed as runs
import imagenet.draws as draws_module
import imagenet.sample as sample_dit_imagenet
from common import fashion, frechet
from common.teachers import integrate_teacher
from imagenet import distill, metrics, monitor
from imagenet.checkpoints import TEACHERS, load_dit, save_dit
from imagenet.dit import PIXELS, DiT, DiTConfig, guided_teacher
from piflow_minimal import DXPolicy, GaussianMixture, GMFlowPolicy, pi_id_loss, sample, segment_of

SMALL = DiTConfig(hidden=16, depth=2, num_heads=2, latent_size=4, num_classes=10, decoder=PIXELS)
CPU = torch.device("cpu")


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
    options = {"teacher": teacher, "out": out, "components": 3, "batch": 5, "total_substeps": 4}
    options |= {"sample_substeps": 0}
    options |= {"warmup": 2, "iterations": 6, "log_every": 2, "save_every": 2, "picture_every": 0}
    options |= {"guidance": 1.5, "guidance_interval": (0, 0.8), "dropout": 0.3}
    options |= {"device": "cpu", "lr": 1e-3, "time_weight": 0.0, "loss_scale": 1.0}
    options |= {"num_intermediates": 2, "solver": "deis"}
    options |= {"query_times": "uniform", "min_query_time": 0.0}
    options |= {"beta2": 0.99, "clip": 1.0, "clip_start": 0, "ema_start": 0, "lr_decay": "none"}
    argv = []
    for name, value in (options | changes).items():
        values = value if isinstance(value, tuple) else (value,)
        argv += ["--" + name.replace("_", "-"), *map(str, values)]
    return argv


def settings(**changes) -> distill.Settings:
    return distill.read_settings(flags("teacher", changes.pop("out", "out"), **changes))


def start(config: distill.Settings) -> tuple[distill.Run, runs.AutocastModel, runs.AutocastModel]:
    teacher = small_teacher()
    run = distill.Run(config, teacher, CPU)
    student = runs.AutocastModel(run.student, run.student.config)
    return run, student, runs.AutocastModel(teacher, SMALL)


def gradients(config: distill.Settings, places=None) -> tuple[float, list[torch.Tensor]]:
    run, student, teacher = start(config)
    places = places or range(config.batch)
    draws = distill.draw(config, SMALL, None, 7, places)
    loss, _ = distill.backward(config, student, teacher, draws)
    return loss.item(), [p.grad for p in run.student.parameters()]


def stats(out) -> list[dict]:
    text = runs.read_text(runs.join(out, "stats.jsonl"))
    return [json.loads(line) for line in text.splitlines()]


def newest(out) -> dict:
    folder = runs.join(out, "checkpoints")
    return runs.read_checkpoint(runs.join(folder, runs.list_files(folder, "step_")[-1]))


def assert_same_weights(a: dict, b: dict, atol: float = 0.0) -> None:
    for part in ("student", "ema"):
        for key, value in a[part].items():
            assert (value - b[part][key]).abs().max() <= atol, (part, key)


# -- settings --------------------------------------------------------------------------------------


COMMON = dict(
    batch=4096, lr=5e-5, warmup=400, warmup_ratio=0.001, beta2=0.95, loss_scale=1.5, clip=50.0,
    clip_start=400, bf16=True, checkpointing=True, num_intermediates=2, total_substeps=128,
    ema_start=400, ema_gamma=7.0, solver="euler", time_weight=0.0, lr_decay="none", tf32=True,
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
    config = distill.read_settings(["--preset", name])
    assert {key: getattr(config, key) for key in PUBLISHED[name]} == PUBLISHED[name]


def test_time_inputs_of_the_published_teachers():
    assert TEACHERS["fm"][:2] == ("Lakonik/pi-Flow-ImageNet/teachers/flowdit_imagenet.pth", 1000.0)
    assert TEACHERS["repa"][:2] == ("Lakonik/pi-Flow-ImageNet/teachers/repa_imagenet.pth", 1.0)


def test_every_setting_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit) as end:
        distill.read_settings(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for field in dataclasses.fields(distill.Settings):
        assert "--" + field.name.replace("_", "-") in text
        assert field.metadata["help"]


def test_overrides_reach_the_config():
    argv = ["--preset", "gm-repa-1nfe", "--no-bf16", "--lr", "1e-4", "--nfe", "2"]
    config = distill.read_settings(argv)
    assert (config.bf16, config.lr, config.nfe, config.batch) == (False, 1e-4, 2, 4096)


@pytest.mark.parametrize(
    "given, named",
    [
        (["--preset", "huge"], "--preset is 'huge'"),
        (["--policy", "gm"], "--policy is 'gm'; choose one of gmflow, dx"),
        (["--solver", "exact"], "--solver is 'exact'; a gmflow policy takes euler or deis"),
        (["--policy", "dx", "--dropout", "0.1"], "--dropout is 0.1"),
        (["--dropout", "1"], "--dropout is 1"),
        (["--lr", "nan"], "--lr is nan"),
        (["--nfe", "0"], "--nfe is 0"),
        (["--guidance-interval", "0", "1.5"], "--guidance-interval is 0 1.5; it must be 0 <= LOW"),
        (["--latents", "x"], "--latents"),
        (["--micro-batch", "0"], "--micro-batch is '0'; it must be auto or a positive integer"),
        (["--shard"], "--shard splits a network over processes"),
        (["--teacher", "no/such"], "no file no/such"),
        (["--nfe", "2", "--latents", "nowhere"], "--latents nowhere"),
        (["--guidance-interval", "0.9", "0.8"], "--guidance-interval is 0.9 0.8; it must be"),
        (["--num-heads", "5"], "num_heads is 5"),
        (["--optimizer", "adamw8bit"], "pip install bitsandbytes"),
        (["--logger", "wandb"], "pip install wandb"),
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


# -- schedules -------------------------------------------------------------------------------------


def test_learning_rate():
    config = distill.PRESETS["gm-repa-1nfe"]
    rates = [distill.learning_rate(config, i) / config.lr for i in (0, 100, 200, 399, 400, 139_999)]
    assert rates == pytest.approx([0.001, 0.25075, 0.5005, 0.9975025, 1, 1])
    config = dataclasses.replace(config, lr_decay="cosine", iterations=1400)
    rates = [distill.learning_rate(config, i) / config.lr for i in (400, 900, 1400)]
    assert rates == pytest.approx([1, 0.5, 0], abs=1e-12)


def test_moving_average_is_a_power_of_time():
    """(1 - 1/i)^8 means that step i of n has the share (i^8 - (i - 1)^8) / n^8."""
    run, _, _ = start(settings(ema_start=3, lr=1e-9))
    parameter, average = next(run.student.parameters()), next(run.ema.parameters())
    values = torch.randn(9, generator=torch.Generator().manual_seed(0))
    for n, value in enumerate(values, 1):
        parameter.data.fill_(value.item())
        run.step(finite=True)
        if n <= 3:
            assert average.flatten()[0].item() == pytest.approx(value.item())
    assert not any(parameter.requires_grad for parameter in run.ema.parameters())
    share = torch.arange(1, 7).double() ** 8
    share = torch.diff(share, prepend=torch.zeros(1).double()) / 6**8
    assert average.flatten()[0].item() == pytest.approx((share * values[3:]).sum().item(), abs=1e-5)


# -- randomness ------------------------------------------------------------------------------------


def test_draws_depend_on_seed_iteration_and_place_alone():
    config = settings(batch=8, nfe=2)
    whole = distill.draw(config, SMALL, None, 4, range(8))
    parts = [distill.draw(config, SMALL, None, 4, places) for places in (range(3), range(3, 8))]
    for value, *rest in zip(whole[:-1], *(part[:-1] for part in parts), strict=True):
        assert torch.equal(value, torch.cat(rest))
    assert whole.noise.shape == (8, 4, 4, 4) and whole.uniforms.shape == (8, 2, 2)
    assert whole.dropped.shape == (8, 2, 3) and whole.dropped.dtype == torch.bool
    later = distill.draw(config, SMALL, None, 5, range(8))
    other = distill.draw(dataclasses.replace(config, seed=1), SMALL, None, 4, range(8))
    noises = torch.cat([whole.noise, later.noise, other.noise]).flatten(1)
    assert len(torch.unique(noises, dim=0)) == 24


def test_no_noise_of_an_evaluation_is_one_of_the_training():
    """An evaluation draws image i with a generator seeded with --seed + i, or i + 1000."""
    seeds = [draws_module.training_seed(seed, n) for seed in (0, 1, 12345) for n in range(3000)]
    seeds += [draws_module.training_seed(seed, 139_999 * 4096 + 4095) for seed in range(3000)]
    assert min(seeds) >= 2**31 and max(seeds) < 2**32
    assert len({draws_module.training_seed(0, n) for n in range(2**31 - 5000, 2**31)}) == 5000
    trained = distill.draw(settings(batch=200), SMALL, None, 0, range(200)).noise
    shape, evaluated = trained[0].shape, range(2000)
    evaluated = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in evaluated]
    both = torch.cat([trained, torch.stack(evaluated)]).flatten(1)
    assert len(torch.unique(both, dim=0)) == 2200


def test_draws_have_the_right_distribution():
    config = settings(batch=4000, dropout=0.3, components=5)
    draws = distill.draw(config, SMALL, None, 0, range(4000))
    assert draws.noise.mean().abs() < 0.01 and (draws.noise.std() - 1).abs() < 0.01
    uniform = draws.uniforms
    assert uniform.min() >= 0 and uniform.max() <= 1
    assert abs(uniform.mean() - 0.5) < 0.02 and abs(uniform.var() - 1 / 12) < 0.005
    assert torch.bincount(draws.labels, minlength=10).min() > 330
    assert not draws.dropped.all(2).any()
    assert abs(draws.dropped.float().mean() - (0.3 - 0.3**5 / 5)) < 0.01
    neighbours = (draws.noise[1:] * draws.noise[:-1]).mean()
    assert neighbours.abs() < 0.01


@pytest.mark.parametrize("nfe, lows", [(1, [0.125]), (2, [0.5, 0.125]), (8, [0.875, 0.125])])
def test_query_times_stratified_and_above_the_last_substep(nfe, lows):
    options = {"query_times": "stratified", "min_query_time": 0.125, "num_intermediates": 2}
    config = settings(batch=6, nfe=nfe, **options)
    draws = distill.draw(config, SMALL, None, 4, range(6))
    for s, low in ((0, lows[0]), (-2 if nfe == 8 else -1, lows[-1])):
        high = 1 - (s % nfe) / nfe
        strata = (high - draws.times[:, s]) / (high - low) * 12  #  one query in each of twelve
        assert sorted(strata.astype(int).flatten()) == list(range(12))
    if nfe == 8:  # its last segment lies below: one time, where it starts
        assert (draws.times[:, -1] == 0.125).all()
    parts = [distill.draw(config, SMALL, None, 4, places) for places in (range(2), range(2, 6))]
    assert torch.equal(draws.uniforms, torch.cat([part.uniforms for part in parts]))
    later = distill.draw(config, SMALL, None, 5, range(6))
    assert (draws.times[:, 0].argsort(0) != later.times[:, 0].argsort(0)).any()


# -- the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["gmflow", "dx"])
def test_loss_is_pi_id_sample_by_sample(policy):
    """The whole batch through `backward` against one sample after the other through the core."""
    changes = {"policy": "dx", "dropout": 0.0, "window_substeps": 1} if policy == "dx" else {}
    config = settings(time_weight=2.0, loss_scale=3.0, **changes)
    loss, grads = gradients(config)
    run, _, _ = start(config)
    draws, teacher, expected = distill.draw(config, SMALL, None, 7, range(5)), small_teacher(), 0.0
    for b in range(5):
        x, t, label = draws.noise[b : b + 1], torch.ones(1), draws.labels[b : b + 1]
        output = run.student(x, t, label)
        plain = GMFlowPolicy(output, x, t) if policy == "gmflow" else DXPolicy(output, x, t)
        velocity = guided_teacher(teacher, label, 1.5, (0.0, 0.8))
        detached = plain
        if policy == "gmflow":
            dropped = output.logweights.masked_fill(draws.dropped[b, 0].view(1, 3, 1, 1, 1), -1e9)
            detached = GMFlowPolicy(GaussianMixture(output.means, output.logstds, dropped), x, t)
        u = (draws.uniforms[b, 0][None], torch.zeros(1, 1))
        options = {"total_substeps": 4, "solver": "deis", "uniforms": u}
        options["window_substeps"] = config.window_substeps
        queries = []

        def remember(x, t, velocity=velocity, queries=queries):
            queries.append((x, t))
            return velocity(x, t)

        out = pi_id_loss(detached, remember, 1.0, 1.0, **options)
        ours = out.u_policy
        if policy == "gmflow":
            ours = torch.cat([plain.velocity(x, t) for x, t in queries])
        error = (ours - out.u_teacher).square().mean((1, 2, 3))
        expected = expected + (error * out.t**2).mean() / 5
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    (3 * expected).backward()
    for parameter, grad in zip(run.student.parameters(), grads, strict=True):
        assert torch.allclose(parameter.grad, grad, atol=1e-5 * grad.abs().max() + 1e-7)


@pytest.mark.parametrize("nfe", [1, 2])
def test_micro_batches_do_not_matter(nfe):
    loss, grads = gradients(settings(nfe=nfe))
    for micro in (2, 3):
        other, others = gradients(settings(nfe=nfe, micro_batch=micro))
        assert other == pytest.approx(loss, rel=1e-5)
        for a, b in zip(grads, others, strict=True):
            assert torch.allclose(a, b, atol=1e-5 * a.abs().max() + 1e-8)


def test_checkpointing_and_bfloat16_change_cost_not_the_result():
    loss, grads = gradients(settings())
    plain = torch.cat([grad.flatten() for grad in grads])
    for option, tolerance in (("checkpointing", 1e-6), ("bf16", 0.05)):
        config = dataclasses.replace(settings(), **{option: True})
        run, student, teacher = start(config)
        student.bf16 = teacher.bf16 = config.bf16
        draws = distill.draw(config, SMALL, None, 7, range(5))
        other, _ = distill.backward(config, student, teacher, draws)
        found = torch.cat([parameter.grad.flatten() for parameter in run.student.parameters()])
        assert run.student.checkpointing == config.checkpointing
        assert found.dtype == torch.float32 and other.item() == pytest.approx(loss, rel=tolerance)
        assert (found - plain).norm() < max(tolerance, 1e-5) * plain.norm()


def test_parts_of_the_batch_add_up():
    loss, grads = gradients(settings())
    parts = [gradients(settings(), places) for places in (range(2), range(2, 5))]
    assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-5)
    for whole, *pieces in zip(grads, *(grads for _, grads in parts), strict=True):
        assert torch.allclose(whole, sum(pieces), atol=1e-5 * whole.abs().max() + 1e-8)


def test_dropout_reaches_the_detached_policy_only():
    mixture = GaussianMixture(torch.randn(1, 3, 2, 1), torch.zeros(1, 1, 1, 1),
                              torch.zeros(1, 3, 1, 1))  # fmt: skip
    plain = GMFlowPolicy(mixture, torch.randn(1, 2, 1), torch.ones(1))
    policy = distill.WithDropout(plain, torch.tensor([[True, False, True]]))
    x, t = plain.x_src, torch.ones(1)
    assert torch.equal(policy.velocity(x, t), plain.velocity(x, t))
    assert torch.allclose(policy.detach().velocity(x, t), mixture.means[:, 1], atol=1e-5)


@pytest.mark.parametrize("policy", ["gmflow", "dx"])
@pytest.mark.parametrize("nfe, latents", [(1, ""), (2, ""), (2, "cached")])
def test_the_host_knows_the_query_times(policy, nfe, latents):
    """By them it leaves out the unconditional branch outside the guidance interval."""
    changes = {"policy": "dx", "dropout": 0.0, "window_substeps": 1} if policy == "dx" else {}
    config = dataclasses.replace(settings(nfe=nfe, **changes), latents=latents)
    draws, rows, queried = distill.draw(config, SMALL, None, 7, range(5)), [], []
    if latents:
        tau_src, _ = segment_of(torch.rand(5, 1), nfe)
        draws = draws._replace(tau_src=tau_src)
        draws = draws._replace(times=draws_module.query_times(config, tau_src, draws.uniforms))
    run, student, teacher = start(config)

    def count(x, t, labels):
        rows.append(int((labels == SMALL.num_classes).sum()))
        return teacher.net(x, t, labels)

    count.config = SMALL
    for out in distill.segment_losses(config, student, count, draws):
        queried.append(out.t)
        inside = (out.t <= config.guidance_interval[1]).sum()
        assert sum(rows) == inside
        rows.clear()
    times = [draws.times[:, s].T.reshape(-1) for s in range(config.segments)]
    assert np.allclose(np.concatenate(times), torch.cat(queried), atol=1e-6)


@needs_fake_cuda
@pytest.mark.parametrize("policy", ["gmflow", "dx"])
@pytest.mark.parametrize("nfe", [1, 2])
def test_loss_on_a_gpu_without_host_reads(policy, nfe):
    changes = {"policy": "dx", "dropout": 0.0, "window_substeps": 1} if policy == "dx" else {}
    config = settings(nfe=nfe, **changes)
    draws = distill.draw(config, SMALL, None, 0, range(5))
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            teacher = DiT(SMALL).requires_grad_(False)
            net = DiT(dataclasses.replace(SMALL, head=policy, components=3))
        student = runs.AutocastModel(net, net.config)
        draws = draws.part(0, 3, torch.device("cuda"))
        losses = distill.segment_losses(config, student, runs.AutocastModel(teacher, SMALL), draws)
        loss = sum(out.loss for out in losses)
        assert loss.device.type == "cuda" and loss.dtype == torch.float32
        found = fake_backward(loss)
        assert all(parameter in found for parameter in net.parameters())


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["free", "dependent"])
def test_two_evaluations_learn(tmp_path, teacher_file, data):
    changes = {"nfe": 2, "iterations": 60, "log_every": 20, "batch": 16, "lr_decay": "cosine"}
    if data == "dependent":
        generator = np.random.default_rng(0)
        moments = generator.normal(size=(12, 2, 4, 4, 4)).astype(np.float16)
        np.save(tmp_path / "latents_00000.npy", np.abs(moments) * 0.5)
        np.save(tmp_path / "labels_00000.npy", np.arange(12) % 10)
        (tmp_path / "settings.json").write_text(json.dumps({"vae": PIXELS, "scale": 1.0}))
        changes["latents"] = tmp_path
    out = tmp_path / "run"
    distill.main(flags(teacher_file, out, guidance=1.0, dropout=0.0, **changes))
    losses = [record["loss"] for record in stats(out)]
    assert len(losses) == 3 and losses[2] < 0.8 * losses[0]

    net, config = (
        load_dit(out / "student.safetensors"),
        json.loads((out / "config.json").read_text()),
    )
    assert (config["nfe"], config["guidance"], config["iterations"]) == (2, 1.0, 60)
    labels, noise = torch.arange(10), torch.randn(10, 4, 4, 4)
    student = distill.dit_student(net, labels)
    target = integrate_teacher(guided_teacher(small_teacher(), labels), noise, 64)
    untrained = distill.dit_student(start(settings(nfe=2))[0].student, labels)
    errors = [(sample(s, noise, 2) - target).square().mean() for s in (student, untrained)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_equals_uninterrupted(tmp_path, teacher_file, monkeypatch, capsys, number):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    distill.main(flags(teacher_file, whole, lr_decay="cosine"))
    original, calls = distill.backward, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return original(*args)

    monkeypatch.setattr(distill, "backward", interrupted)
    handler = signal.getsignal(number)
    distill.main(flags(teacher_file, parts, lr_decay="cosine"))
    assert signal.getsignal(number) == handler
    assert "iteration 3 of 6" in capsys.readouterr().out and newest(parts)["iteration"] == 3
    distill.main(flags(teacher_file, parts, lr_decay="cosine"))
    assert len(calls) == 6
    a, b = newest(whole), newest(parts)
    assert_same_weights(a, b)
    for key, state in a["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, b["optimizer"]["state"][key][name])
    assert stats(parts)[-1]["iteration"] == 6
    assert [r["loss"] for r in stats(whole) if r["iteration"] == 6] == [stats(parts)[-1]["loss"]]
    assert len(runs.list_files(parts / "checkpoints", "step_")) == 2  # --keep


def test_killed_between_checkpoint_and_student(tmp_path, teacher_file, monkeypatch):
    """At the end of the training: the same command again must leave the last student."""
    out = tmp_path / "run"
    for module, name in ((torch, "save"), (distill, "save_dit")):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(module, name, lambda *_: sys.exit("killed"))
            distill.main(flags(teacher_file, out, iterations=2))
    leftovers = [out / ".tmp-student.safetensors", out / "pictures" / ".tmp-step.png"]
    leftovers[1].parent.mkdir()
    for path in leftovers:
        path.write_bytes(b"half of it")
    distill.main(flags(teacher_file, out, iterations=2))
    student = load_dit(out / "student.safetensors").state_dict()
    assert not any(path.exists() for path in leftovers)
    assert all(torch.equal(student[key], value) for key, value in newest(out)["ema"].items())


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path, teacher_file):
    """kill -9 five times: once while it starts, then some time after a new checkpoint."""

    def start_run(out) -> subprocess.Popen:
        options = {"iterations": 90, "log_every": 2, "picture_every": 14}
        command = [sys.executable, "-m", "imagenet.distill"]
        command += flags(teacher_file, out, teacher_steps=2, lr_decay="cosine", **options)
        return subprocess.Popen(command, env=ENVIRONMENT)

    def checkpoints(out) -> list[str]:
        return runs.list_files(out / "checkpoints", "step_")

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start_run(whole).wait(timeout=300) == 0
    for delay in (None, *np.random.default_rng(0).uniform(0, 0.4, 4)):
        process, before = start_run(killed), checkpoints(killed)
        while delay is not None and checkpoints(killed)[-1:] == before[-1:]:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(1.5 if delay is None else delay)
        assert process.poll() is None  # else it had ended before it could be killed
        process.kill()
        process.wait()
    assert start_run(killed).wait(timeout=300) == 0

    assert_same_weights(newest(whole), newest(killed))
    a, b = ((out / "student.safetensors").read_bytes() for out in (whole, killed))
    assert a == b
    assert [(r["iteration"], r["loss"]) for r in stats(whole)] == [
        (r["iteration"], r["loss"]) for r in stats(killed)
    ]
    files = ({str(f.relative_to(out)) for f in out.rglob("*")} for out in (whole, killed))
    assert next(files) == next(files)  # nothing half written is left


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_torchrun(tmp_path, teacher_file, number):
    """Two processes stop after the same iteration and save; one process goes on from there."""
    out, options = tmp_path / "run", {"log_every": 1, "iterations": 100_000}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "imagenet.distill"]
    command += flags(teacher_file, out, save_every=1_000_000, **options)
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # `nohup` ignores it
    )  # fmt: skip
    try:
        while not (out / "stats.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        text = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert text.count("stopped; run the same command again to continue") == 1  # by rank 0
    stopped = newest(out)["iteration"]
    assert 0 < stopped < 100_000 and stats(out)[-1]["iteration"] == stopped
    options["iterations"] = stopped + 2
    distill.main(flags(teacher_file, out, **options))
    distill.main(flags(teacher_file, tmp_path / "whole", **options))
    losses = ([record["loss"] for record in stats(o)][-2:] for o in (out, tmp_path / "whole"))
    assert next(losses) == pytest.approx(next(losses), rel=1e-3)


def test_kill_while_a_checkpoint_is_written(tmp_path, teacher_file):
    out = tmp_path / "run"
    distill.main(flags(teacher_file, out, iterations=2))
    run, _, _ = start(settings(out=out))
    run.iteration = 4
    child = os.fork()
    if child == 0:
        torch.save = lambda state, path: (
            Path(path).write_bytes(b"PK\x03\x04 half of a checkpoint"),
            os.kill(os.getpid(), signal.SIGKILL),
        )
        run.save()
        run.checkpoints.wait()
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    files = runs.list_files(out / "checkpoints")
    assert len(files) == 2 and files[0].startswith(".tmp-") and files[1] == "step_00000002.pt"
    distill.main(flags(teacher_file, out))
    reference = tmp_path / "reference"
    distill.main(flags(teacher_file, reference))
    assert_same_weights(newest(out), newest(reference))
    files = runs.list_files(out / "checkpoints")
    assert files == ["step_00000004.pt", "step_00000006.pt"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path, capsys, damage):
    config = settings(out=tmp_path)
    run, _, _ = start(config)
    for run.iteration in (2, 4):
        run.save()
    run.checkpoints.wait()
    path = tmp_path / "checkpoints" / "step_00000004.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[:-500], "flipped": data, "empty": b""}[damage])
    other, _, _ = start(config)
    other.restore()
    assert other.iteration == 2
    assert "damaged checkpoint step_00000004.pt" in capsys.readouterr().out


def test_any_wrong_bit_of_a_checkpoint_is_found_or_harmless(tmp_path):
    run, _, _ = start(settings(out=tmp_path))
    run.save()
    run.checkpoints.wait()
    path = tmp_path / "checkpoints" / "step_00000000.pt"
    data, state, damaged = path.read_bytes(), newest(tmp_path), 0
    for place in np.random.default_rng(0).integers(len(data) - 5000, len(data), 100):
        wrong = bytearray(data)
        wrong[place] ^= 1 << int(place % 8)
        path.write_bytes(wrong)
        try:
            assert_same_weights(runs.read_checkpoint(path), state)
        except ValueError:
            damaged += 1
    assert damaged > 30


def test_pictures_need_not_wait_for_a_line_of_the_log(tmp_path, teacher_file):
    changes = {"iterations": 5, "log_every": 3, "picture_every": 2, "teacher_steps": 2}
    distill.main(flags(teacher_file, tmp_path, **changes))
    pictures = [f"step_0000000{i}.png" for i in (2, 4, 5)]
    assert runs.list_files(tmp_path / "pictures") == pictures
    lines = {record["iteration"]: "endpoint_rmse" in record for record in stats(tmp_path)}
    assert lines == {2: True, 3: False, 4: True, 5: True}


def test_not_finite_is_skipped_and_counted(tmp_path, teacher_file, monkeypatch):
    original, calls = distill.backward, []

    def sometimes(config, student, *rest):
        loss, by_t = original(config, student, *rest)
        calls.append(1)
        if len(calls) in (2, 4, 6):
            next(student.net.parameters()).grad.fill_(math.nan)
        return loss, by_t

    monkeypatch.setattr(distill, "backward", sometimes)
    distill.main(flags(teacher_file, tmp_path / "run"))
    assert stats(tmp_path / "run")[-1]["skipped"] == 3
    last = newest(tmp_path / "run")  # the last iteration's too, though it changed nothing
    assert (last["iteration"], last["skipped"]) == (6, 3)
    assert all(value.isfinite().all() for value in last["student"].values())


def test_never_finite_stops_with_the_weights_from_before(tmp_path, teacher_file, monkeypatch):
    out, original, calls = tmp_path / "run", distill.backward, []

    def broken(*args):
        calls.append(1)
        loss, by_t = original(*args)
        return loss * (math.nan if len(calls) > 4 else 1), by_t

    monkeypatch.setattr(distill, "backward", broken)
    with pytest.raises(ValueError, match="not finite in 10 iterations in a row.*iteration 4, are"):
        distill.main(flags(teacher_file, out, iterations=50, lr_decay="none"))
    monkeypatch.undo()
    kept = runs.read_checkpoint(out / "checkpoints" / "step_00000004.pt")
    distill.main(flags(teacher_file, tmp_path / "short", iterations=4, lr_decay="none"))
    assert_same_weights(kept, newest(tmp_path / "short"))


def test_remote_run(teacher_file, tmp_path):
    """fsspec's memory:// stands for s3://: no local file, one object per write."""
    out = "memory://bucket/run"
    distill.main(flags(teacher_file, out, iterations=2, picture_every=2))
    distill.main(flags(teacher_file, out))
    assert [record["iteration"] for record in stats(out)] == [2, 4, 6]
    files = runs.list_files(runs.join(out, "checkpoints"))
    assert files == ["step_00000004.pt", "step_00000006.pt"]
    distill.main(flags(teacher_file, tmp_path / "local"))
    assert_same_weights(newest(out), newest(tmp_path / "local"))
    assert runs.list_files(runs.join(out, "pictures"), "step_")


@pytest.fixture
def bucket(monkeypatch) -> str:
    """An S3 server on this machine with one empty bucket, and credentials that it takes."""
    server_of, s3fs = pytest.importorskip("moto.server"), pytest.importorskip("s3fs")
    server = server_of.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # one that was opened with other variables
    s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_run_in_an_s3_bucket(teacher_file, tmp_path, bucket, monkeypatch, capsys):
    """Interrupted, continued behind a damaged checkpoint, and its student sampled: as on a disk."""
    remote, local, original, calls = f"{bucket}/deep/run", tmp_path / "local", distill.backward, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(distill, "backward", interrupted)
        distill.main(flags(teacher_file, remote))
    checkpoints = runs.join(remote, "checkpoints")
    assert runs.list_files(checkpoints) == ["step_00000004.pt", "step_00000005.pt"]
    runs.write_text(runs.join(checkpoints, "step_00000005.pt"), "half a checkpoint")
    distill.main(flags(teacher_file, remote))
    assert "skipping the damaged checkpoint step_00000005.pt" in capsys.readouterr().out
    distill.main(flags(teacher_file, local))

    assert_same_weights(newest(remote), newest(local))
    assert [record["iteration"] for record in stats(remote)] == [2, 4, 6]
    assert runs.list_files(checkpoints) == ["step_00000005.pt", "step_00000006.pt"]
    there = ["checkpoints", "config.json", "stats.jsonl", "student.safetensors"]
    assert runs.list_files(remote) == there
    another = sys.modules["s3fs"].S3FileSystem(skip_instance_cache=True)
    another.pipe_file(f"{remote}/another", b"another machine wrote this")
    assert runs.list_files(remote) == ["another", *there]
    with pytest.raises(ValueError, match="is of a run with seed = 0"):
        distill.main(flags(teacher_file, remote, seed=1))

    images = []
    for name, model in (("a", remote), ("b", str(local))):
        options = ["--count", "4", "--total-substeps", "4", "--device", "cpu", "--npz"]
        sample_dit_imagenet.main([model, "--out", str(tmp_path / name), *options])
        images.append(np.load(tmp_path / name / "samples.npz")["arr_0"])
    assert images[0].std() > 10 and np.array_equal(*images)


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_equal_one(tmp_path, teacher_file, shard):
    """Six samples, two at a time, recomputed, data-free, on two processes: the same numbers.

    With --shard parameters, average and optimizer are split; files and pictures are not.
    """
    options = {"nfe": 2, "iterations": 3, "log_every": 1, "guidance": 1.5, "batch": 6}
    options |= {"picture_every": 3, "teacher_steps": 2}
    distill.main(flags(teacher_file, tmp_path / "one", **options))
    argv = [*flags(teacher_file, tmp_path / "two", micro_batch=2, **options), "--checkpointing"]
    run_two("imagenet.distill", argv + ["--shard"] * shard)
    one, two = stats(tmp_path / "one"), stats(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert b["loss_by_t"] == pytest.approx(a["loss_by_t"], rel=1e-4, abs=2e-6)
    assert two[-1]["endpoint_rmse"] == pytest.approx(one[-1]["endpoint_rmse"], rel=1e-4)
    assert_same_weights(newest(tmp_path / "one"), newest(tmp_path / "two"), atol=5e-5)
    if shard:  # one process continues what two have begun, sharded
        more = {"iterations": 5, "micro_batch": 3} | {k: options[k] for k in ("nfe", "batch")}
        losses = []
        for name in ("one", "two"):
            distill.main(flags(teacher_file, tmp_path / name, **options | more))
            losses.append(stats(tmp_path / name)[-1]["loss"])
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_frechet_distance_while_training(tmp_path):
    """Images of the average on two processes; the same images, drawn and measured here, in one."""
    argv = ["--iterations", "2", "--batch", "4", "--picture-every", "0", "--eval-every", "1"]
    argv += ["--eval-images", "81", "--device", "cpu", "--out", str(tmp_path)]
    run_two("imagenet.distill", argv)
    found = [record["frechet_distance"] for record in stats(tmp_path)]
    net, labels = load_dit(tmp_path / "student.safetensors"), torch.arange(81) % 10
    generators = [torch.Generator().manual_seed(i) for i in range(81)]
    noise = torch.stack([torch.randn(4, 14, 14, generator=g) for g in generators])
    with torch.no_grad():
        x_0 = sample(distill.dit_student(net, labels), noise, **distill.TINY.sampling)
    expected = fashion.frechet_distance(fashion.to_images(x_0).clamp(-1, 1))
    assert len(found) == 2 and found[1] == pytest.approx(expected, rel=1e-3)


def test_fid_while_training(tmp_path, monkeypatch):
    """A stand-in for Inception: three features of an image; its reference has moments only."""

    def inception(pixels):
        assert pixels.dtype == torch.uint8 and pixels.shape[1:] == (3, 8, 8)
        return pixels.double().flatten(2).mean(2) / 100, None

    def decode(latents):
        return fashion.to_images(latents).clamp(-1, 1).repeat(1, 3, 1, 1) * torch.ones(3, 1, 1)

    monkeypatch.setattr(metrics, "load_inception", lambda weights, device: inception)
    monkeypatch.setattr(monitor, "load_decoder", lambda net, device: decode)
    mean, covariance = torch.tensor([1.0, 2.0, 1.5]).double(), torch.eye(3).double()
    np.savez(tmp_path / "reference.npz", mu=mean.numpy(), sigma=covariance.numpy())
    config = dataclasses.replace(settings(), eval_images=150, components=3)
    config = dataclasses.replace(config, reference=str(tmp_path / "reference.npz"))
    net = dataclasses.replace(SMALL, decoder="some VAE")
    student = start(config)[0].student.eval()
    evaluation = monitor.FrechetEval(config, net, CPU)
    noise = [torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(150)]
    x_0 = sample(
        distill.dit_student(student, torch.arange(150) % 10), torch.stack(noise),
        total_substeps=4, solver="deis",
    )  # fmt: skip
    pixels = (decode(x_0) * 127.5 + 127.5).round().to(torch.uint8)
    ours = frechet.moments(inception(pixels)[0])
    expected = frechet.gaussian_distance(*ours, mean, covariance)
    assert evaluation.name == "fid"
    assert evaluation.distance(student) == pytest.approx(expected, rel=1e-4)


def test_fid_needs_a_reference_before_anything_is_trained(tmp_path):
    config = dataclasses.replace(settings(), eval_every=5)
    with pytest.raises(ValueError, match="--eval-every needs --reference"):
        monitor.FrechetEval(config, dataclasses.replace(SMALL, decoder="some VAE"), CPU)
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="--reference"):
        distill.main(["--eval-every", "5", "--reference", str(empty), "--out", str(out)])
    assert not out.exists()


def test_compile_is_per_block_and_not_of_the_average(monkeypatch, recwarn):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    monkeypatch.setattr(distill, "compiled", lambda function, *example: lambda x: x)
    config, teacher = dataclasses.replace(settings(), compile=True), small_teacher()
    run = distill.Run(config, teacher, CPU)
    distill.models(run, teacher, runs.Place(0, 1, CPU))
    assert compiled == [*run.student.blocks, *teacher.blocks] and run.compile
    monkeypatch.setattr(distill, "compiled", lambda function, *example: function)  # no compiler
    assert not distill.Run(config, teacher, CPU).compile
    assert not distill.Run(dataclasses.replace(config, compile=None), teacher, CPU).compile


@pytest.mark.slow
def test_compiled_training_is_the_same(tmp_path, teacher_file):
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        distill.main([*flags(teacher_file, tmp_path / name, iterations=3, log_every=1), *more])
    plain, fast = stats(tmp_path / "plain"), stats(tmp_path / "compiled")
    assert [r["loss"] for r in fast] == pytest.approx([r["loss"] for r in plain], rel=1e-3)


def test_published_precision(monkeypatch):
    """Teacher with bfloat16 weights, student with float32 weights under autocast."""
    seen = []
    config, teacher = settings(), small_teacher()
    config = dataclasses.replace(config, bf16=True)
    run = distill.Run(config, teacher, CPU)
    student, queried = distill.models(run, teacher, runs.Place(0, 1, CPU))
    assert {p.dtype for p in queried.net.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in run.student.parameters()} == {torch.float32}
    run.student.blocks[0].attn.register_forward_hook(lambda *given: seen.append(given[2].dtype))
    draws = distill.draw(config, SMALL, None, 7, range(5))
    loss, _ = distill.backward(config, student, queried, draws)
    assert set(seen) == {torch.bfloat16} and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(gradients(settings())[0], rel=0.05)


@pytest.mark.parametrize("budget, size", [(552, 512), (551, 256), (100, 32), (48, 8), (1, 1)])
def test_micro_batch_by_memory(budget, size):
    """40 for the weights, one for each sample."""
    assert distill.largest_micro_batch(lambda n: 40 + n, budget, 512) == size
    assert distill.largest_micro_batch(lambda n: 40 + n, 1000, 3) == 3


def test_more_iterations_of_a_cosine_say_what_happens_to_the_rate(tmp_path, teacher_file, capsys):
    options = {"log_every": 1, "lr_decay": "cosine", "warmup": 1}
    distill.main(flags(teacher_file, tmp_path, iterations=3, **options))
    assert "rate" not in capsys.readouterr().out
    distill.main(flags(teacher_file, tmp_path, iterations=6, **options))
    said = capsys.readouterr().out
    rates = [record["lr"] for record in stats(tmp_path)]
    assert "--iterations is 6 and was 3: the cosine ends at 6" in said
    assert f"the learning rate is {rates[3]:.1e} in place of 0.0e+00" in said
    assert len(rates) == 6 and rates[3] > rates[2]


def test_the_tiny_preset_runs(tmp_path):
    """The shipped teacher, the real preset; only fewer and smaller steps."""
    options = ["--iterations", "2", "--batch", "4", "--teacher-steps", "4", "--device", "cpu"]
    distill.main(["--out", str(tmp_path), *options])
    record = stats(tmp_path)[-1]
    assert record["iteration"] == 2 and math.isfinite(record["loss"])
    assert len(record["loss_by_t"]) == 10 and record["images_per_s"] > 0
    assert 0 < record["endpoint_rmse"] < 2
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "stats.jsonl", "student.safetensors", "checkpoints", "pictures"
    }  # fmt: skip
    assert load_dit(tmp_path / "student.safetensors").config.components == distill.TINY.components


def test_the_students_file_states_how_it_is_sampled(teacher_file, tmp_path):
    for name, substeps, nfe in (("as trained", 0, 1), ("with fewer", 3, 2)):
        options = {"sample_substeps": substeps, "nfe": nfe}
        argv = flags(teacher_file, tmp_path / name, iterations=1, **options)
        distill.main(argv)
        net = load_dit(tmp_path / name / "student.safetensors")
        assert (net.config.solver, net.config.total_substeps) == ("deis", substeps or 4)
        assert net.config.nfe == nfe


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
