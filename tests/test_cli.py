"""common/cli.py: flags of a dataclass, errors of one line, compilation."""

import importlib
from dataclasses import MISSING, dataclass
from pathlib import Path

import pytest
import torch

from common.cli import (
    can_compile,
    compiled_policies,
    parse,
    pick_device,
    run_cli,
    setting,
)
from piflow_minimal import GaussianMixture, GMFlowPolicy, rollout


@dataclass(frozen=True)
class Settings:
    model: str = setting(MISSING, "a name", positional=True)
    iterations: int = setting(10, "optimizer steps", low=1, high=100)
    lr: float = setting(0.1, "learning rate", above=0)
    policy: str = setting("gmflow", "kind of policy", choices=("gmflow", "dx"))
    interval: tuple[float, float] = setting(
        (0.0, 1.0), "two numbers", low=0, high=1, metavar=("LOW", "HIGH"), ordered=True
    )
    store: str = setting("", "a local or remote path", path=True)
    classes: tuple[int, ...] = setting((), "any number of them")
    steps: int | None = setting(None, "may stay open", low=1)
    fast: bool = setting(False, "a switch")
    label: str = setting("", "text", flag="class")
    out: Path = setting(Path("outputs"), "folder")


def test_flags_become_fields():
    argv = "net --iterations 3 --lr 1e-3 --policy dx --interval 0.2 0.7 --classes 1 2 --steps 4"
    argv += " --fast --class jay --out a/b"
    found = parse(Settings, "About.", argv.split())
    rest = ("", (1, 2), 4, True, "jay", Path("a/b"))
    assert found == Settings("net", 3, 1e-3, "dx", (0.2, 0.7), *rest)
    assert parse(Settings, "About.", ["net"]) == Settings("net")
    assert parse(Settings, "About.", ["net", "--no-fast"]).fast is False


@pytest.mark.parametrize("argv, message", [
    ("net --iterations 0", "--iterations is 0; it must be at least 1 and at most 100"),
    ("net --iterations 101", "--iterations is 101"),
    ("net --lr 0", "--lr is 0.0; it must be above 0"),
    ("net --lr nan", "--lr is nan"),
    ("net --lr inf", "--lr is inf"),
    ("net --policy mlp", "--policy: invalid choice: 'mlp'"),
    ("net --iteration 3", "unrecognized arguments: --iteration"),
    ("net --steps 0", "--steps is 0"),
    ("net --interval 0.5", "--interval"),
    ("net --interval 0.7 0.2", "--interval is 0.7 0.2; it must be LOW <= HIGH"),
    ("net --interval 0.2 1.5", "--interval is 1.5; it must be at least 0 and at most 1"),
    ("net --classes a", "--classes"),
    ("", "model"),
])  # fmt: skip
def test_what_is_refused(argv, message):
    with pytest.raises(ValueError) as error:
        parse(Settings, "About.", argv.split())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_home_is_expanded_in_paths_alone(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = parse(Settings, "About.", ["net", "--out=~/run", "--store=~/data", "--class=~/x"])
    assert found.out == Path("/home/me/run") and found.store == "/home/me/data"
    assert found.label == "~/x"


def test_presets_are_defaults_that_flags_override(capsys):
    presets = {"small": Settings("a", iterations=5), "large": Settings("b", iterations=50, lr=0.2)}
    assert parse(Settings, "About.", ["net"], presets).iterations == 5
    found = parse(Settings, "About.", ["net", "--preset", "large", "--lr", "0.3"], presets)
    assert (found.iterations, found.lr) == (50, 0.3)
    with pytest.raises(SystemExit):
        parse(Settings, "About.", ["--preset", "large", "--help"], presets)
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: 50)" in shown and "(default: 0.2)" in shown
    with pytest.raises(ValueError, match="--preset: invalid choice: 'huge'"):
        parse(Settings, "About.", ["net", "--preset", "huge"], presets)
    by_field = {"gmflow": Settings("a", lr=0.5), "dx": Settings("a", policy="dx", lr=0.7)}
    found = parse(Settings, "About.", ["net", "--policy", "dx"], by_field, by="policy")
    assert (found.policy, found.lr) == ("dx", 0.7)
    by_switch = {False: Settings("a", lr=0.5), True: Settings("a", fast=True, lr=0.7)}
    for argv, lr in ((["net", "--fast", "--iterations", "3"], 0.7), (["net"], 0.5)):
        assert parse(Settings, "About.", argv, by_switch, by="fast").lr == lr


def test_help_states_defaults_and_choices(capsys):
    with pytest.raises(SystemExit):
        parse(Settings, "About this.\nMore.", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "About this." in text and "More." not in text
    assert "{gmflow,dx} kind of policy (default: gmflow)" in text and "LOW HIGH" in text


def test_run_cli_is_one_line_for_users_and_a_traceback_for_bugs():
    def fail(error):
        raise error

    for error in (ValueError("a\n  b"), OSError("a b"), ImportError("a b")):
        with pytest.raises(SystemExit) as stop:
            run_cli(lambda error=error: fail(error))
        assert stop.value.code == "error: a b"
    with pytest.raises(SystemExit, match="^error: No module named 'nobody'; pip install nobody$"):
        run_cli(lambda: importlib.import_module("nobody"))
    with pytest.raises(KeyError):
        run_cli(lambda: fail(KeyError("bug")))


def test_devices():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="--device 'tpu' is not available here; use auto"):
        pick_device("tpu")


def test_without_a_compiler_there_is_a_warning(monkeypatch):
    def broken(function):
        def call(*args):
            raise RuntimeError("no compiler\nhere")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="going on without: no compiler$"):
        assert not can_compile()


@pytest.mark.slow
def test_compiled_policies_compute_the_same():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 4, 2, 3, 4, generator=generator)
    x = torch.randn(3, 2, 3, 4, generator=generator)
    mixture = GaussianMixture(means, torch.full((3, 1, 1, 1, 1), -1.5), torch.zeros(3, 4, 1, 3, 4))
    policy, before = GMFlowPolicy(mixture, x, 1.0), GMFlowPolicy.velocity
    eager = rollout(policy, x, 1.0, 0.25, 3.2, 16)
    if not can_compile():
        pytest.skip("no working compiler")
    with torch.no_grad(), compiled_policies(False):
        assert GMFlowPolicy.velocity is before
    with torch.no_grad(), compiled_policies():
        assert GMFlowPolicy.velocity is not before
        found = rollout(policy, x, 1.0, 0.25, 3.2, 16)
    assert GMFlowPolicy.velocity is before
    assert (found - eager).abs().max() < 1e-4 * eager.abs().max()
