"""common/train.py, once for all trainers: exact resume, processes, average, checkpoints, log."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_task import Task, flags, killed_while_saving, settings
from torch import nn
from two_processes import ENVIRONMENT, run_two, server

from common import train as engine
from common.cli import parse, run_cli
from common.files import join, list_files, read_text, write_text
from common.processes import Place, stop_signals
from common.train import TrainSettings, read_checkpoint, train
from piflow_minimal import PiIDLoss

CPU = torch.device("cpu")
PLAIN_OR_SHARDED = [
    False,
    pytest.param(True, marks=pytest.mark.skipif(
        torch.__version__.startswith("2.6"), reason="fully_shard of PyTorch 2.6 needs a GPU"
    )),
]  # fmt: skip
ONE = Place(0, 1, CPU)


def run(out, task=None, **changes) -> engine.State:
    s = settings(out=str(out), **changes)
    return train(s, task or Task(s), ONE)


def stats(out) -> list[dict]:
    return [json.loads(line) for line in read_text(join(out, "stats.jsonl")).splitlines()]


def newest(out) -> dict:
    folder = join(out, "checkpoints")
    return read_checkpoint(join(folder, list_files(folder, "step_")[-1]))


def assert_same(a: dict, b: dict, atol: float = 0.0) -> None:
    """Weights, average and moments of two checkpoints."""
    for part in ("net", "ema"):
        assert a[part].keys() == b[part].keys()
        for key, value in a[part].items():
            assert (value - b[part][key]).abs().max() <= atol, (part, key)
    for key, slot in a["optimizer"]["state"].items():
        for name, value in slot.items():
            other = b["optimizer"]["state"][key][name]
            assert torch.as_tensor(value).sub(other).abs().max() <= max(atol, 0), (key, name)


def assert_same_student(one, two) -> None:
    one, two = (torch.load(out / "student.pt", weights_only=True) for out in (one, two))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[key]) for key, value in one.items())


class Interrupted(Task):
    """Sends itself a signal in an iteration."""

    def __init__(self, s, iteration: int, number: int = signal.SIGTERM):
        super().__init__(s)
        self.at, self.number = iteration, number

    def losses(self, net, iteration, rows):
        if iteration == self.at and rows.start == 0:
            os.kill(os.getpid(), self.number)
        return super().losses(net, iteration, rows)


# -- gradients, schedules, average -----------------------------------------------------------------


class Linear(Task):
    """No draws: places in the batch are inputs, so that the whole loss is a formula."""

    def __init__(self, s):
        super().__init__(s)
        torch.manual_seed(1)
        self.net = nn.Linear(3, 3)

    def losses(self, net, iteration, rows):
        x = torch.arange(rows.start, rows.stop)[:, None] * torch.tensor([1.0, -0.5, 0.25])
        t = (torch.arange(rows.start, rows.stop) + 1) / 10
        for weight in (0.25, 0.75):
            u = net(x * weight)
            target = torch.ones_like(u)
            yield weight, PiIDLoss((u - target).square().mean(), u, target, t, x)


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 7])
def test_gradient_is_that_of_the_weighted_loss_of_the_batch(tmp_path, micro_batch):
    s = settings(batch=7, micro_batch=micro_batch, loss_scale=3.0, time_weight=2.0)
    task = Linear(s)
    log = engine.Log(settings(out=str(tmp_path)), 0, CPU)
    loss = engine.add_gradients(s, task, 0, ONE, log)
    found = [p.grad.clone() for p in task.net.parameters()]

    task.net.zero_grad()
    place = torch.arange(7.0)
    expected = 0.0
    for weight in (0.25, 0.75):
        x = place[:, None] * torch.tensor([1.0, -0.5, 0.25]) * weight
        error = (task.net(x) - 1).square() * ((place + 1) / 10)[:, None] ** 2
        expected = expected + weight * error.sum() / 21
    (3.0 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, p in zip(found, task.net.parameters(), strict=True):
        assert torch.allclose(gradient, p.grad, rtol=1e-4)
    counts = [2 * (1 <= b <= 7) for b in range(10)]  # t = 0.1 .. 0.7, two terms each
    assert log.by_t[1].tolist() == counts


def test_learning_rate():
    s = settings(lr=2.0, warmup=400, iterations=140_000)
    rates = [engine.learning_rate(s, i) / 2 for i in (0, 100, 200, 399, 400, 139_999)]
    assert rates == pytest.approx([0.001, 0.25075, 0.5005, 0.9975025, 1, 1])
    s = settings(lr=2.0, warmup=400, iterations=1400, lr_decay="cosine")
    rates = [engine.learning_rate(s, i) / 2 for i in (400, 900, 1150, 1400, 1500)]
    assert rates == pytest.approx([1, 0.5, (1 - math.sqrt(0.5)) / 2, 0, 0], abs=1e-12)


def test_the_average_is_a_power_of_time():
    """(1 - 1/i)^8 means that step i of n has the share (i^8 - (i - 1)^8) / n^8."""
    net = nn.Linear(1, 1, bias=False)
    state = engine.State(net, settings(ema_start=3, lr=1e-12))
    values = torch.randn(9, generator=torch.Generator().manual_seed(0))
    for n, value in enumerate(values, 1):
        net.weight.data.fill_(value.item())
        state.step()
        state.iteration = n
        if n <= 4:
            assert state.ema[0].item() == pytest.approx(value.item())
    share = torch.diff(torch.arange(0, 7).double() ** 8) / 6**8
    assert state.ema[0].item() == pytest.approx((share * values[3:]).sum().item(), abs=1e-5)
    kept = net.weight.item()
    with state.averaged() as average:
        assert average.weight.item() == pytest.approx((share * values[3:]).sum().item(), abs=1e-5)
        assert not average.training
    assert net.weight.item() == kept and net.training


def test_frozen_weights_are_neither_trained_nor_stored(tmp_path):
    s = settings(out=str(tmp_path))
    task = Task(s)
    before = {name: value.clone() for name, value in task.net.state_dict().items()}
    train(s, task, ONE)
    changed = {k for k, v in task.net.state_dict().items() if not torch.equal(v, before[k])}
    stored = newest(tmp_path)
    assert changed == set(stored["net"]) == set(stored["ema"])
    assert not any("frozen" in name for name in changed) and len(changed) == 6
    assert stored["export"] == {"points": 2}


def test_eight_bit_adam_is_imported_by_name(monkeypatch):
    given = {}
    optim = SimpleNamespace(AdamW8bit=lambda parameters, **options: given.update(options))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=optim))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    engine.State(nn.Linear(1, 1), settings(optimizer="adamw8bit", lr=0.5, beta2=0.99))
    assert given == {"lr": 0.5, "betas": (0.9, 0.99), "weight_decay": 0.0}
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match="bitsandbytes"):
        engine.State(nn.Linear(1, 1), settings(optimizer="adamw8bit"))


def test_clipping_begins_at_its_iteration(tmp_path):
    """Two runs, the same but for --clip-start: the same step before it, another one after it."""
    early = run(tmp_path / "a", clip=1e-3, clip_start=0, iterations=1)
    late = run(tmp_path / "b", clip=1e-3, clip_start=1, iterations=1)
    none = run(tmp_path / "c", clip=1e9, clip_start=0, iterations=1)
    moments = [s.optimizer.state[s.weights[-1]]["exp_avg"].norm() for s in (early, late, none)]
    assert moments[1] == moments[2] and moments[0] < 0.1 * moments[1]


# -- draws -----------------------------------------------------------------------------------------


def test_seeds_of_training_are_distinct_and_none_of_an_evaluation():
    seeds = [engine.training_seed(seed, n) for seed in (0, 1, 12345) for n in range(3000)]
    seeds += [engine.training_seed(seed, 139_999 * 4096 + 4095) for seed in range(3000)]
    assert min(seeds) >= 2**31 and max(seeds) < 2**32
    assert len({engine.training_seed(0, n) for n in range(2**31 - 5000, 2**31)}) == 5000
    assert len({engine.training_seed(s, n) for s in (0, 1, 2) for n in range(9000)}) == 27_000


@pytest.mark.parametrize("batch, micro, world, expected", [
    (6, 2, 1, [2, 2, 2]), (6, 2, 2, [2, 2, 2]), (6, 6, 2, [3, 3]), (5, 2, 2, [2, 2, 1]),
    (4096, 64, 8, [64] * 64), (3, 99, 1, [3]),
])  # fmt: skip
def test_micro_batches_cover_the_batch_once(batch, micro, world, expected):
    parts = engine.micro_batches(settings(batch=batch, micro_batch=micro), world)
    assert [len(part) for part in parts] == expected
    assert [row for part in parts for row in part] == list(range(batch))
    assert len(parts) >= world


# -- resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_equals_uninterrupted(tmp_path, capsys, number):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, lr_decay="cosine")
    s = settings(out=str(parts), lr_decay="cosine")
    handler = signal.getsignal(number)
    train(s, Interrupted(s, 2, number), ONE)
    assert signal.getsignal(number) == handler
    assert "iteration 3 of 6" in capsys.readouterr().out and newest(parts)["iteration"] == 3
    task = Task(s)
    train(s, task, ONE)
    assert {iteration for iteration, _ in task.seen} == {3, 4, 5}
    assert_same(newest(whole), newest(parts))
    assert_same_student(whole, parts)
    assert stats(parts)[-1]["iteration"] == 6
    assert stats(whole)[-1]["loss"] == stats(parts)[-1]["loss"]
    assert len(list_files(parts / "checkpoints", "step_")) == 2  # --keep


def test_killed_between_checkpoint_and_student(tmp_path, monkeypatch):
    """At the end of the training: the same command again must leave the last student."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Task, "export", lambda *_: sys.exit("killed"))
        run(tmp_path, iterations=2)
    leftovers = [tmp_path / ".tmp-student.pt", tmp_path / "checkpoints" / ".tmp-step.pt"]
    for path in leftovers:
        path.write_bytes(b"half of it")
    run(tmp_path, iterations=2)
    student = torch.load(tmp_path / "student.pt", weights_only=True)
    assert not any(path.exists() for path in leftovers)
    assert all(torch.equal(student[key], value) for key, value in newest(tmp_path)["ema"].items())


def start_process(out, **changes) -> subprocess.Popen:
    command = [sys.executable, "-m", "engine_task", *flags(out=out, **changes)]
    tests = str(Path(__file__).parent)
    path = os.pathsep.join([ENVIRONMENT["PYTHONPATH"], tests])
    return subprocess.Popen(command, env=ENVIRONMENT | {"PYTHONPATH": path})


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    """kill -9 five times: once while it starts, then some time after a new checkpoint."""
    options = {"iterations": 120, "log_every": 2, "lr_decay": "cosine"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start_process(whole, **options).wait(timeout=300) == 0
    for delay in (None, *np.random.default_rng(0).uniform(0, 0.4, 4)):
        process = start_process(killed, slow=True, **options)
        before = list_files(killed / "checkpoints", "step_")[-1:]
        while delay is not None and list_files(killed / "checkpoints", "step_")[-1:] == before:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(1.5 if delay is None else delay)
        assert process.poll() is None  # else it had ended before it could be killed
        process.kill()
        process.wait()
    assert start_process(killed, **options).wait(timeout=300) == 0
    assert_same(newest(whole), newest(killed))
    assert_same_student(whole, killed)
    assert [(r["iteration"], r["loss"]) for r in stats(whole)] == [
        (r["iteration"], r["loss"]) for r in stats(killed)
    ]
    files = ({str(f.relative_to(out)) for f in out.rglob("*")} for out in (whole, killed))
    assert next(files) == next(files)  # nothing half written is left


def test_kill_while_a_checkpoint_is_written(tmp_path):
    out, reference = tmp_path / "run", tmp_path / "reference"
    run(out, iterations=2)
    process = server.Process(target=killed_while_saving, args=(flags(out=out),))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    files = list_files(out / "checkpoints")
    assert len(files) == 2 and files[0].startswith(".tmp-") and files[1] == "step_00000002.pt"
    run(out)
    run(reference)
    assert_same(newest(out), newest(reference))
    assert list_files(out / "checkpoints") == ["step_00000004.pt", "step_00000006.pt"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path, capsys, damage):
    run(tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step_00000006.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[:-500], "flipped": data, "empty": b""}[damage])
    s = settings(out=str(tmp_path / "run"))
    task = Task(s)
    train(s, task, ONE)
    assert {iteration for iteration, _ in task.seen} == {4, 5}
    assert "skipping the damaged checkpoint step_00000006.pt" in capsys.readouterr().out
    run(tmp_path / "whole")
    assert_same(newest(tmp_path / "run"), newest(tmp_path / "whole"))


def test_any_wrong_bit_of_a_checkpoint_is_found_or_harmless(tmp_path):
    run(tmp_path, iterations=2)
    path = tmp_path / "checkpoints" / "step_00000002.pt"
    data, state, damaged = path.read_bytes(), newest(tmp_path), 0
    for place in np.random.default_rng(0).integers(len(data) - 5000, len(data), 100):
        wrong = bytearray(data)
        wrong[place] ^= 1 << int(place % 8)
        path.write_bytes(wrong)
        try:
            assert_same(read_checkpoint(path), state)
        except ValueError:
            damaged += 1
    assert damaged > 30


def test_the_newest_and_the_milestones_stay(tmp_path):
    run(tmp_path, iterations=11, save_every=1, milestone_every=4)
    kept = [int(name[5:13]) for name in list_files(tmp_path / "checkpoints")]
    assert kept == [4, 8, 10, 11]


def test_other_settings_are_refused_free_ones_are_not(tmp_path):
    run(tmp_path, iterations=2)
    before = newest(tmp_path)
    with pytest.raises(ValueError, match="is of a run with lr = 0.01, this one has 0.1"):
        run(tmp_path, iterations=2, lr=0.1)
    run(tmp_path, iterations=2, micro_batch=3, log_every=1, keep=1)
    assert_same(before, newest(tmp_path))


def test_fewer_iterations_than_done(tmp_path):
    run(tmp_path, iterations=6)
    with pytest.raises(ValueError, match="--iterations 4: .* is at iteration 6"):
        run(tmp_path, iterations=4)
    assert json.loads((tmp_path / "config.json").read_text())["iterations"] == 6


def test_damaged_checkpoints_do_not_push_out_new_ones(tmp_path):
    """A run falls back behind two damaged checkpoints; those that it writes then stay."""
    run(tmp_path, iterations=6, save_every=2, keep=3)
    for number in (4, 6):
        (tmp_path / "checkpoints" / f"step_{number:08d}.pt").write_bytes(b"damaged")
    run(tmp_path, iterations=5, save_every=1, keep=2)
    assert engine.newest(str(tmp_path))["iteration"] == 5


def test_a_failing_evaluation_costs_no_iteration(tmp_path):
    """The checkpoint is written before; evaluate fails at iteration 3."""
    s = settings(out=str(tmp_path), iterations=4, eval_every=3, save_every=3)
    task = Task(s)
    task.evaluate = lambda net, iteration: pytest.fail("no picture")
    with pytest.raises(pytest.fail.Exception):
        train(s, task, ONE)
    assert newest(tmp_path)["iteration"] == 3


# -- what is not finite, what does not fit ---------------------------------------------------------


class Broken(Task):
    """The gradient is NaN in some iterations."""

    def __init__(self, s, when):
        super().__init__(s)
        self.when = when

    def losses(self, net, iteration, rows):
        for weight, out in super().losses(net, iteration, rows):
            factor = math.nan if self.when(iteration) else 1.0
            yield weight, out._replace(u_policy=out.u_policy * factor)


def test_not_finite_is_skipped_and_counted(tmp_path):
    s = settings(out=str(tmp_path))
    train(s, Broken(s, lambda i: i % 2 == 1), ONE)
    last = newest(tmp_path)  # the last iteration's too, though it changed nothing
    assert stats(tmp_path)[-1]["skipped"] == 3 and (last["iteration"], last["skipped"]) == (6, 3)
    assert all(value.isfinite().all() for value in last["net"].values())
    assert all(math.isfinite(v) for record in stats(tmp_path) for v in record["loss_by_t"])


def test_never_finite_stops_with_the_weights_from_before(tmp_path):
    s = settings(out=str(tmp_path / "run"), iterations=50)
    with pytest.raises(ValueError, match="not finite in 10 iterations in a row.*iteration 4, are"):
        train(s, Broken(s, lambda i: i >= 4), ONE)
    kept = read_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000004.pt")
    run(tmp_path / "short", iterations=4)
    assert_same(kept, newest(tmp_path / "short"))


def test_out_of_memory_says_what_to_do(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Task, "losses", full)
    with pytest.raises(SystemExit, match="error: the GPU is out of memory; try a smaller --micro-"):
        run_cli(lambda: run(tmp_path))


@pytest.mark.parametrize("changes, world, message", [
    ({"batch": 3}, 4, "--batch 3 makes 3 micro-batches for 4 processes: each needs one"),
    ({"batch": 5}, 4, "--batch 5 makes 3 micro-batches for 4 processes: each needs one"),
    ({"shard": True}, 1, "--shard splits a run over processes"),
    ({"shard": True, "batch": 6}, 2, "--batch 6 makes 3 micro-batches .* the same number"),
    ({"shard": True, "batch": 8, "optimizer": "adamw8bit"}, 2, "--optimizer adamw8bit"),
])  # fmt: skip
def test_what_does_not_fit(tmp_path, changes, world, message):
    s = settings(out=str(tmp_path / "run"), **changes)
    with pytest.raises(ValueError, match=message):
        train(s, Task(s), Place(0, world, CPU))
    assert not (tmp_path / "run").exists()


def test_a_missing_package_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="wandb"):
        run(tmp_path / "run", logger="wandb")
    assert not (tmp_path / "run").exists()


# -- processes and signals -------------------------------------------------------------------------


@pytest.mark.parametrize("shard", PLAIN_OR_SHARDED)
def test_two_processes_equal_one(tmp_path, shard):
    """Six samples, two at a time, on two processes; and one process continues what they began."""
    options = {"iterations": 3, "log_every": 1, "eval_every": 1, "batch": 8}
    run(tmp_path / "one", **options)
    run_two("engine_task", flags(out=tmp_path / "two", shard=shard, **options))
    one, two = stats(tmp_path / "one"), stats(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert b["loss_by_t"] == pytest.approx(a["loss_by_t"], rel=1e-4, abs=2e-6)
    assert two[-1]["rmse"] == pytest.approx(one[-1]["rmse"], rel=1e-4)
    assert_same(newest(tmp_path / "one"), newest(tmp_path / "two"), atol=5e-5)
    run_two("engine_task", flags(out=tmp_path / "two", shard=shard, **options | {"iterations": 5}))
    losses = []
    for name in ("one", "two"):
        run(tmp_path / name, **options | {"iterations": 6})
        losses.append(stats(tmp_path / name)[-1]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("shard", PLAIN_OR_SHARDED)
def test_two_processes_continue_bit_for_bit(tmp_path, shard):
    options = {"batch": 8, "shard": shard}
    run_two("engine_task", flags(out=tmp_path / "whole", **options))
    run_two("engine_task", flags(out=tmp_path / "parts", iterations=3, **options))
    run_two("engine_task", flags(out=tmp_path / "parts", **options))
    assert_same(newest(tmp_path / "whole"), newest(tmp_path / "parts"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_torchrun(tmp_path, number):
    """Two processes stop after the same iteration and save; one process goes on from there."""
    out, options = tmp_path / "run", {"log_every": 1, "iterations": 100_000}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "engine_task", *flags(out=out, save_every=1_000_000, **options)]
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
    assert text.count("stopped: run the same command again to continue") == 1  # by rank 0
    stopped = newest(out)["iteration"]
    assert 0 < stopped < 100_000 and stats(out)[-1]["iteration"] == stopped
    options["iterations"] = stopped + 2
    run(out, **options)
    run(tmp_path / "whole", **options)
    losses = ([record["loss"] for record in stats(o)][-2:] for o in (out, tmp_path / "whole"))
    assert next(losses) == pytest.approx(next(losses), rel=1e-3)


def test_the_second_ctrl_c_kills_the_second_sigterm_does_not():
    """Also where SIGINT was ignored when the program started, as by `nohup ... &`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_signals() as received:
            os.kill(os.getpid(), signal.SIGINT)
            assert received == [signal.SIGINT]
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    with stop_signals() as received:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM] * 3


# -- log -------------------------------------------------------------------------------------------


def test_evaluations_need_not_wait_for_a_line_of_the_log(tmp_path):
    run(tmp_path, iterations=5, log_every=3, eval_every=2)
    lines = {record["iteration"]: "rmse" in record for record in stats(tmp_path)}
    assert lines == {2: True, 3: False, 4: True, 5: True}


def test_a_failing_evaluation_loses_no_training(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no font for the picture")

    monkeypatch.setattr(Task, "evaluate", fail)
    with pytest.raises(OSError, match="no font"):
        run(tmp_path, eval_every=4)
    assert newest(tmp_path)["iteration"] == 4


def test_a_signal_does_not_wait_for_an_evaluation(tmp_path):
    s = settings(out=str(tmp_path), eval_every=6)
    train(s, Interrupted(s, 2), ONE)
    assert newest(tmp_path)["iteration"] == 3 and "rmse" not in stats(tmp_path)[-1]


def test_an_evaluation_sees_the_average_and_changes_nothing(tmp_path):
    plain, evaluated = run(tmp_path / "a"), run(tmp_path / "b", eval_every=1)
    for a, b in zip(plain.weights, evaluated.weights, strict=True):
        assert torch.equal(a, b)
    s = settings()
    task = Task(s)
    task.net.load_state_dict(newest(tmp_path / "b")["ema"], strict=False)
    expected = task.evaluate(task.net.eval(), 6)["rmse"]
    assert stats(tmp_path / "b")[-1]["rmse"] == pytest.approx(expected, rel=1e-5)


def test_lines_that_will_come_again_are_dropped(tmp_path):
    lines = [json.dumps({"iteration": i}) for i in (1, 2, 3)]
    (tmp_path / "stats.jsonl").write_text("\n".join(lines) + "\n")
    log = engine.Log(settings(out=str(tmp_path)), 2, CPU)
    assert [json.loads(line)["iteration"] for line in log.lines] == [1, 2]


def test_wandb_continues_its_run(tmp_path, monkeypatch):
    given, logged = [], []

    def init(**options):
        given.append((options["id"], options["resume"]))
        return SimpleNamespace(id="abc123", log=lambda found, step: logged.append((step, found)))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for iterations in (1, 8):
        run(tmp_path, iterations=iterations, log_every=8, logger="wandb")
    assert given == [(None, "allow"), ("abc123", "allow")]
    assert [step for step, _ in logged] == [1, 8] and "loss_by_t" not in logged[0][1]


def test_tensorboard_drops_what_comes_again(tmp_path, monkeypatch):
    """Events after the checkpoint that a run continues from are written a second time."""
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, key, value, iteration):
            calls.append((key, iteration))

        def flush(self):
            pass

    stand_in = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    send = engine.Log(settings(out=str(tmp_path), logger="tensorboard"), 7, CPU).send
    send({"loss": 0.5}, 8)
    assert calls == [(str(tmp_path / "tensorboard"), 8), ("loss", 8)]


# -- remote folders --------------------------------------------------------------------------------


def test_remote_run(tmp_path):
    """fsspec's memory:// stands for s3://: no local file, one object per write."""
    out = "memory://bucket/run"
    run(out, iterations=2)
    run(out)
    assert [record["iteration"] for record in stats(out)] == [2, 4, 6]
    files = list_files(join(out, "checkpoints"))
    assert files == ["step_00000004.pt", "step_00000006.pt"]
    run(tmp_path / "local")
    assert_same(newest(out), newest(tmp_path / "local"))


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


def test_run_in_an_s3_bucket(tmp_path, bucket, capsys):
    """Interrupted, continued behind a damaged checkpoint: as on a disk."""
    remote = f"{bucket}/deep/run"
    s = settings(out=remote)
    train(s, Interrupted(s, 4), ONE)
    checkpoints = join(remote, "checkpoints")
    assert list_files(checkpoints) == ["step_00000004.pt", "step_00000005.pt"]
    write_text(join(checkpoints, "step_00000005.pt"), "half a checkpoint")
    run(remote)
    assert "skipping the damaged checkpoint step_00000005.pt" in capsys.readouterr().out
    run(tmp_path / "local")
    assert_same(newest(remote), newest(tmp_path / "local"))
    assert [record["iteration"] for record in stats(remote)] == [2, 4, 6]
    there = ["checkpoints", "config.json", "stats.jsonl", "student.pt"]
    assert list_files(remote) == there
    another = sys.modules["s3fs"].S3FileSystem(skip_instance_cache=True)
    another.pipe_file(f"{remote}/another", b"another machine wrote this")
    assert list_files(remote) == ["another", *there]
    with pytest.raises(ValueError, match="is of a run with seed = 0"):
        run(remote, seed=1)


def test_a_full_disk_keeps_the_checkpoints_before(tmp_path, monkeypatch):
    run(tmp_path, iterations=2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(torch, "save", full)
        run(tmp_path)
    assert list_files(tmp_path / "checkpoints") == ["step_00000002.pt"]


def test_every_setting_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit):
        parse(TrainSettings, "About.", ["--help"])
    text = capsys.readouterr().out
    assert "--micro-batch" in text and "bit for bit" in " ".join(text.split())
