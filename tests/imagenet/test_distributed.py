"""Processes, files, checkpoints, schedules and logs that the training scripts share."""

import copy
import errno
import fcntl
import json
import math
import os
import signal
import stat
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import imagenet.distributed as runs

CPU = torch.device("cpu")


def parts(seed: int = 0) -> dict[str, runs.Part]:
    torch.manual_seed(seed)
    net = nn.Linear(3, 2)
    optimizer = runs.make_optimizer("adamw", net.parameters(), 0.1, (0.9, 0.99))
    return {"net": net, "ema": copy.deepcopy(net), "optimizer": optimizer}


def train(state: dict, steps: int = 1) -> None:
    for _ in range(steps):
        state["optimizer"].zero_grad()
        state["net"](torch.ones(1, 3)).square().sum().backward()
        state["optimizer"].step()


def same(a: dict, b: dict) -> bool:
    pairs = zip(a["net"].parameters(), b["net"].parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


# -- checkpoints -----------------------------------------------------------------------------------


def test_a_checkpoint_continues_bit_for_bit(tmp_path):
    checkpoints, whole = runs.Checkpoints(str(tmp_path)), parts()
    train(whole, 3)
    checkpoints.save(3, whole, {"skipped": 2})
    train(whole, 2)  # while the thread writes: the checkpoint is of before
    checkpoints.wait()
    other = parts(seed=1)
    assert not same(whole, other)
    numbers = runs.Checkpoints(str(tmp_path)).restore(other, CPU)
    assert numbers == {"iteration": 3, "skipped": 2}
    train(other, 2)
    assert same(whole, other)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The writer is held up: `save` has returned, the next `save` waits for it."""
    go, order, original = threading.Event(), [], torch.save

    def slow(value, path):
        assert go.wait(30)
        original(value, path)

    monkeypatch.setattr(torch, "save", slow)
    checkpoints, state = runs.Checkpoints(str(tmp_path)), parts()
    checkpoints.save(1, state, {}, lambda written: order.append(sorted(written)))
    assert runs.list_files(tmp_path, "step_") == [] and not order
    go.set()
    checkpoints.save(2, state, {}, lambda _: order.append("second"))
    assert order[0] == ["ema", "net", "optimizer"]
    checkpoints.wait()
    assert order[1] == "second" and len(runs.list_files(tmp_path, "step_")) == 2


def test_errors_of_the_writing_thread_surface(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints, state = runs.Checkpoints(str(tmp_path)), parts()
    checkpoints.save(1, state, {})
    checkpoints.wait()
    monkeypatch.setattr(torch, "save", full)
    checkpoints.save(2, state, {})
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(3, state, {})
    assert runs.list_files(tmp_path) == ["step_00000001.pt"]


def test_the_newest_and_the_milestones_stay(tmp_path):
    checkpoints, state = runs.Checkpoints(str(tmp_path), keep=2, milestone_every=4), parts()
    for i in range(1, 12):
        checkpoints.save(i, state, {})
    checkpoints.wait()
    kept = [int(name[5:13]) for name in runs.list_files(tmp_path)]
    assert kept == [4, 8, 10, 11]


def test_half_checkpoints_are_smaller_and_close(tmp_path):
    state = parts()
    train(state, 3)
    state["ema"].load_state_dict(state["net"].state_dict())
    half = runs.Checkpoints(str(tmp_path), half=("ema", "optimizer"))
    half.save(3, state, {})
    half.wait()
    stored = runs.read_checkpoint(tmp_path / "step_00000003.pt")
    assert stored["net"]["weight"].dtype == torch.float32
    assert stored["ema"]["weight"].dtype == torch.bfloat16
    assert stored["optimizer"]["state"][0]["exp_avg"].dtype == torch.bfloat16
    assert stored["optimizer"]["state"][0]["step"] == 3
    other = parts(seed=1)
    half.restore(other, CPU)
    assert same(state, other) and other["ema"].weight.dtype == torch.float32
    assert torch.allclose(other["ema"].weight, state["ema"].weight, rtol=2**-8)
    slots = [part["optimizer"].state_dict()["state"][0] for part in (state, other)]
    assert slots[1]["exp_avg_sq"].dtype == torch.float32
    assert torch.allclose(slots[0]["exp_avg_sq"], slots[1]["exp_avg_sq"], rtol=2**-8)


# -- schedules, average, optimizer -----------------------------------------------------------------


def test_the_average_is_a_power_of_time():
    """(1 - 1/i)^(1 + gamma) means that step i of n has the share (i^g - (i - 1)^g) / n^g."""
    net, values = nn.Linear(1, 1, bias=False), torch.randn(9, generator=torch.manual_seed(0))
    average = copy.deepcopy(net)
    for n, value in enumerate(values, 1):
        net.weight.data.fill_(value.item())
        runs.update_ema(average, net, runs.ema_decay(n, start=3, gamma=7.0))
        if n <= 4:
            assert average.weight.item() == pytest.approx(value.item())
    share = torch.diff(torch.arange(0, 7).double() ** 8) / 6**8
    assert average.weight.item() == pytest.approx((share * values[3:]).sum().item(), abs=1e-5)


def test_learning_rate():
    rates = [runs.learning_rate(i, 2.0, 10, 0.1) for i in (0, 5, 10, 99)]
    assert rates == pytest.approx([0.2, 1.1, 2.0, 2.0])
    rates = [runs.learning_rate(i, 2.0, 10, 0.1, "cosine", 110) for i in (10, 60, 85, 110)]
    assert rates == pytest.approx([2, 1, 1 - math.sqrt(0.5), 0])


def test_eight_bit_adam_is_imported_by_name(monkeypatch):
    given, net = {}, nn.Linear(1, 1)
    optim = SimpleNamespace(AdamW8bit=lambda parameters, **options: given.update(options))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=optim))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    runs.make_optimizer("adamw8bit", net.parameters(), 0.5, (0.9, 0.99))
    assert given == {"lr": 0.5, "betas": (0.9, 0.99), "weight_decay": 0.0}
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        runs.make_optimizer("adamw8bit", net.parameters(), 0.5, (0.9, 0.99))


# -- processes and signals -------------------------------------------------------------------------


def test_ahead_is_one_ahead_and_in_order():
    started, released = [], threading.Event()

    def compute(i: int) -> int:
        started.append(i)
        if i == 1:
            released.set()
        return 10 * i

    results = runs.ahead(compute, range(4))
    assert next(results) == 0 and released.wait(10)  # 1 is computed while 0 is used
    assert started == [0, 1] and list(results) == [10, 20, 30]
    assert list(runs.ahead(compute, range(0))) == []


def test_errors_of_the_worker_thread_surface():
    def compute(i: int) -> int:
        if i == 1:
            raise ValueError("no label 5")
        return i

    with pytest.raises(ValueError, match="no label 5"):
        list(runs.ahead(compute, range(3)))


def test_the_second_ctrl_c_kills_the_second_sigterm_does_not(monkeypatch):
    """Also where SIGINT was ignored when the program started, as by `nohup ... &`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with runs.Stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.requested
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    with runs.Stop() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and not stop.agreed
        assert stop.agree(torch.tensor(2.5), torch.tensor(4.0)) == [2.5, 4.0] and stop.agreed


def test_on_first_raises_the_error_of_rank_0():
    def fail():
        raise ValueError("another run is in there")

    assert runs.on_first(lambda: 5) == 5
    with pytest.raises(ValueError, match="another run"):
        runs.on_first(fail)


# -- logs ------------------------------------------------------------------------------------------


def stats(out) -> list[dict]:
    return [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]


def test_a_cut_line_of_the_log_is_dropped(tmp_path):
    lines = [json.dumps({"iteration": i}) for i in (1, 2, 3)]
    (tmp_path / "stats.jsonl").write_text("\n".join(lines) + '\n{"itera')
    log = runs.Log(str(tmp_path), 2)
    log({"iteration": 3, "loss": 0.5})
    assert stats(tmp_path) == [{"iteration": 1}, {"iteration": 2}, {"iteration": 3, "loss": 0.5}]


def test_wandb_continues_its_run(tmp_path, monkeypatch):
    given, logged = [], []

    def init(**options):
        given.append((options["id"], options["resume"]))
        return SimpleNamespace(id="abc123")

    wandb = SimpleNamespace(init=init, log=lambda scalars, step: logged.append((step, scalars)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for iteration in (0, 7):
        runs.Log(str(tmp_path), iteration, "wandb", {})({"iteration": iteration + 1, "loss": 0.5})
    assert given == [(None, "allow"), ("abc123", "allow")]
    assert [step for step, _ in logged] == [1, 8]


def test_tensorboard_drops_what_comes_again(tmp_path, monkeypatch):
    """Events after the checkpoint that a run continues from are written a second time."""
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, key, value, iteration):
            calls.append((key, value, iteration))

        def flush(self):
            pass

    stand_in = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    runs.Log(str(tmp_path), 7, "tensorboard", {})({"iteration": 8, "loss": 0.5, "loss_by_t": [1]})
    folder = str(tmp_path / "tensorboard")
    assert calls == [(folder, 8), ("iteration", 8, 8), ("loss", 0.5, 8)]


def test_a_missing_logger_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        runs.open_logger("wandb", str(tmp_path), {})


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["local", "memory://files"])
def test_a_failed_write_leaves_the_old_file(tmp_path, folder):
    path = runs.join(tmp_path / folder if folder == "local" else folder, "deep", "text")
    runs.write_text(path, "old")
    with pytest.raises(KeyError), runs.writing(path) as temporary:
        temporary.write_text("new")
        raise KeyError
    assert runs.read_text(path) == "old"
    assert runs.list_files(path.rsplit("/", 1)[0]) == ["text"]
    runs.remove(path)
    runs.remove(path)
    assert runs.read_text(path) is None


def test_files_are_synced_by_a_writable_descriptor(tmp_path, monkeypatch):
    """As Windows demands; a folder has none and is synced on POSIX alone."""
    real, synced = os.fsync, []

    def like_windows(descriptor: int) -> None:
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if regular and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        synced.append(regular)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", like_windows)
    runs.write_text(tmp_path / "text", "content")
    assert synced == [True, False]


def test_errors_of_a_storage_are_for_the_user(monkeypatch):
    """Whatever kind its library raises, as without credentials."""
    import fsspec

    class NoCredentials(Exception):
        pass

    def fail(*_):
        raise NoCredentials("unable to locate credentials")

    for name in ("get_file", "exists", "put_file", "rm_file"):
        monkeypatch.setattr(fsspec.get_filesystem_class("memory"), name, fail)
    path = "memory://bucket/file"
    calls = [runs.read_text, runs.list_files, runs.remove, lambda p: runs.write_text(p, "text")]
    for call in calls:
        with pytest.raises(OSError, match="memory://bucket/.*unable to locate credentials"):
            call(path)


def test_check_same_names_what_differs(tmp_path):
    runs.write_text(tmp_path / "config.json", json.dumps({"lr": 0.1, "interval": [0, 1], "x": 1}))
    before = runs.check_same(tmp_path / "config.json", {"lr": 0.1, "interval": (0, 1)})
    assert before["x"] == 1 and runs.check_same(tmp_path / "none.json", {"lr": 3}) == {}
    with pytest.raises(ValueError, match="is of a run with lr = 0.1, this one has 0.2"):
        runs.check_same(tmp_path / "config.json", {"lr": 0.2})
