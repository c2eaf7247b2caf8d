"""A model of one's own on the engine: the printed listings train, continue, and run in parallel."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "06b_your_own_on_the_engine.ipynb"
FEW = ["--iterations", "60", "--save-every", "20", "--eval-every", "60", "--device", "cpu"]


README = (ROOT / "README.md").read_text("utf-8")


def from_readme(name):
    """The listing under a marker of the README."""
    found = re.search(rf"<!-- {name} -->\n```python\n(.*?)```", README, re.S)
    assert found, f"README.md has no listing under <!-- {name} -->"
    return found[1]


def from_notebook(name):
    """What the notebook writes into a file."""
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    written = [s for s in sources if re.match(rf"%%writefile (-a )?{name}\n", s)]
    assert written, f"no cell writes {name}"
    return "".join(source.split("\n", 1)[1] + "\n" for source in written)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    for name in ("my_model.py", "own_model.py"):
        (folder / name).write_text(from_readme(name), encoding="utf-8")
    return folder


def start(folder, out, *launcher):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, "own_model.py", "--out", out, *FEW]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


def finish(process):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    return output


def student(folder, out):
    return torch.load(folder / out / "student.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(folder):
    finish(start(folder, "whole"))
    return student(folder, "whole")


def test_the_notebook_writes_what_the_readme_prints():
    assert from_notebook("own_model.py") == from_readme("own_model.py")


@pytest.mark.slow
def test_trains(folder, whole):
    """Better than the start: an untrained toy student ends 1.3 from its teacher."""
    last = json.loads((folder / "whole" / "stats.jsonl").read_text().splitlines()[-1])
    assert last["iteration"] == 60
    assert last["endpoint_rmse"] < 0.4


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_killed_half_way_it_continues_to_the_same_student(folder, whole):
    process = start(folder, "killed")
    while not (folder / "killed" / "checkpoints" / "step_00000020.pt").exists():
        assert process.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was already done"
    assert not (folder / "killed" / "checkpoints" / "step_00000060.pt").exists()
    assert "iteration 60 of 60" in finish(start(folder, "killed"))
    continued = student(folder, "killed")
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


@pytest.mark.slow
def test_two_processes_train_the_same_student(folder, whole):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finish(start(folder, "two", *launcher))
    two = student(folder, "two")
    assert two.keys() == whole.keys()
    assert max((two[name] - whole[name]).abs().max() for name in whole) < 1e-3
