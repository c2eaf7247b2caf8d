"""The stored notebooks: outputs present, no errors, small; each begins with what it promises."""

import ast
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from docs.notebooks import ADDRESS, FIRST_CELL, badge
from notebooks.solutions import notebook_1, notebook_2, notebook_2b
from piflow_minimal import (
    DXPolicy,
    GaussianMixture,
    GMFlowPolicy,
    flow_map_schedule,
    pi_id_loss,
    rollout,
)

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LIMIT = 750_000  # bytes of one stored file
STEM = re.compile(r"\d\db?_[a-z0-9_]+")

pytestmark = pytest.mark.skipif(not NOTEBOOKS, reason="no notebooks here")
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path: Path, kind: str) -> list[dict]:
    return [c for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == kind]


def source(cell: dict) -> str:
    """The code or text of a cell; without a first line `%%writefile name`, which keeps the rest."""
    text = "".join(cell["source"])
    return text.partition("\n")[2] if text.startswith("%%writefile ") else text


def code(path: Path) -> str:
    return "\n".join(source(cell) for cell in cells_of(path, "code"))


@each_notebook
def test_is_small_and_of_the_plain_format(path):
    notebook = json.loads(path.read_text("utf-8"))
    assert notebook["nbformat"] == 4
    assert STEM.fullmatch(path.stem)
    assert path.stat().st_size <= LIMIT, f"{path.stat().st_size} bytes: smaller figures, please"
    assert "widgets" not in notebook["metadata"], "stored widget state is large and stale"
    assert not any("execution" in cell["metadata"] for cell in notebook["cells"]), "timing metadata"


@each_notebook
def test_ran_from_top_to_bottom_without_an_error(path):
    cells = [cell for cell in cells_of(path, "code") if source(cell).strip()]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs), "warnings in the stored file"


@each_notebook
def test_stores_pictures_and_what_it_prints(path):
    pictures = 0
    for cell in cells_of(path, "code"):
        kinds = [output["output_type"] for output in cell["outputs"]]
        top = [node.value for node in ast.parse(source(cell)).body if isinstance(node, ast.Expr)]
        calls = {ast.unparse(node.func) for node in top if isinstance(node, ast.Call)}
        if "print" in calls:
            assert "stream" in kinds, f"no output of\n{source(cell)}"
        data = [output["data"] for output in cell["outputs"] if "data" in output]
        shown = [entry["image/png"] for entry in data if "image/png" in entry]
        if "plt.show" in calls:
            assert shown, f"no figure of\n{source(cell)}"
        for image in shown:
            assert base64.b64decode("".join(image)).startswith(b"\x89PNG")
        pictures += len(shown)
    assert pictures >= 2


@each_notebook
def test_begins_with_a_promise_and_imports_the_real_code(path):
    first = source(cells_of(path, "markdown")[0])
    assert first.startswith("# "), "the first cell is the title"
    assert re.search(r"at the end of this notebook you can", first, re.IGNORECASE)
    assert len(re.findall(r"^\* ", first, re.MULTILINE)) >= 2, "what the reader will be able to do"
    assert "from piflow_minimal import" in code(path)
    redefined = {node.name for node in ast.parse(code(path)).body if isinstance(node, ast.ClassDef)}
    assert not redefined & {"GMFlowPolicy", "DXPolicy", "Student", "DiT"}


@each_notebook
def test_has_a_short_run_and_needs_no_install(path):
    text = code(path)
    assert "PIFLOW_QUICK" in text
    assert not re.search(r"^\s*[!%]", text, re.MULTILINE), "shell and magic lines"


@each_notebook
def test_cells_are_short_and_there_is_not_too_much_code(path):
    cells = [source(cell).splitlines() for cell in cells_of(path, "code")]
    longest = max(cells, key=len)
    assert len(longest) <= 30, "\n".join(longest)
    lines = [line.strip() for cell in cells for line in cell]
    assert len([line for line in lines if line and not line.startswith("#")]) <= 350


@each_notebook
def test_has_the_badge_and_the_first_cell_of_all(path):
    assert badge(path.name) in source(cells_of(path, "markdown")[0])
    assert source(cells_of(path, "code")[0]) == FIRST_CELL


def run_first_cell(folder: Path) -> subprocess.CompletedProcess:
    """In a process of its own, without this repository on its path."""
    code = FIRST_CELL + "\nimport common\nprint(common.__file__)"
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "JPY_SESSION_NAME")}
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", code]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_the_first_cell_finds_the_repository_or_says_how_to_get_it(tmp_path):
    for folder in (FOLDER.parent, FOLDER, FOLDER / "solutions"):
        here = str(FOLDER.parent / "common" / "__init__.py")
        assert run_first_cell(folder).stdout.strip() == here
    missing = run_first_cell(tmp_path)
    assert missing.returncode == 1 and missing.stderr.strip().endswith(f"!git clone {ADDRESS}")
    clone = tmp_path / "a clone" / "common"
    shutil.copytree(FOLDER.parent / "common", clone)
    assert run_first_cell(tmp_path).stdout.strip() == str(clone / "__init__.py")


@each_notebook
def test_three_exercises_that_check_themselves_and_solutions_that_pass(path):
    if path.stem.startswith(("05", "06b")):
        pytest.skip("no exercises")
    cells = json.loads(path.read_text("utf-8"))["cells"]
    exercises, solutions = "\n\n".join(source(cell) for cell in cells).split("## Solutions")
    assert re.findall(r"^\*\*(\d)\. ", exercises, re.MULTILINE) == ["1", "2", "3"]
    assert exercises.count("<details><summary>Hint</summary>") == 3
    for n in "123":
        check = exercises.split(f"def check_{n}(")[1].split("\n\n\n")[0]
        assert "assert " in check, "a check that cannot fail"
        tried = rf"\bcheck_{n}\(my_" if n != "3" else r"\bcheck_3\(\w"
        assert re.search(tried, exercises)
        assert re.search(rf"^check_{n}\(", solutions, re.MULTILINE), f"no solution of {n}"
    printed = [o["text"] for cell in cells for o in cell.get("outputs", []) if "text" in o]
    printed = "".join("".join(part) for part in printed)
    for n in "123":
        assert f"exercise {n}: no answer yet" in printed
        assert f"exercise {n}: right" in printed, "the stored solution does not pass its check"


def test_notebook_2_shows_the_training_loop_that_2b_imports():
    def loop(text: str) -> str:
        functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        train = next(node for node in functions if node.name == "train")
        return ast.unparse(train.body).replace("torch.nn.", "nn.")

    stored = next(path for path in NOTEBOOKS if path.stem.startswith("02_"))
    assert loop(code(stored)) == loop((FOLDER / "helpers.py").read_text())


# ---- The solutions of notebooks 1 and 2, and what the text claims --------------------------------


def test_the_velocity_of_notebook_1_is_the_gmflow_policy():
    g = torch.Generator().manual_seed(3)
    means, log_A, x_src, x = (
        torch.randn(shape, generator=g, dtype=torch.float64)
        for shape in ((7, 4, 3), (7, 4), (7, 3), (7, 3))
    )
    log_std = torch.full((7, 1, 1), 0.4, dtype=torch.float64).log()
    policy = GMFlowPolicy(GaussianMixture(means, log_std, log_A[..., None]), x_src, 0.9)
    for t in (0.9, 0.5, 0.01):
        u = notebook_1.velocity(means, 0.4, log_A, x_src, 0.9, x, t)
        assert torch.allclose(u, policy.velocity(x, t), rtol=1e-9, atol=1e-9)


def test_gmflow_with_one_narrow_component_is_dx_with_one_point():
    """docs/faq.md."""
    g = torch.Generator().manual_seed(0)
    u, x_src, x = (torch.randn(5, 2, generator=g, dtype=torch.float64) for _ in range(3))
    log_std = torch.full((5, 1, 1), -18.0, dtype=torch.float64)
    mixture = GaussianMixture(u[:, None], log_std, torch.zeros(5, 1, 1, dtype=torch.float64))
    for t in (0.8, 0.3, 0.02):
        gm, dx = GMFlowPolicy(mixture, x_src, 0.8), DXPolicy(u[:, None], x_src, 0.8)
        assert torch.allclose(gm.velocity(x, t), dx.velocity(x, t), atol=1e-9)


def test_h_of_one_is_the_ancestral_step():
    """docs/faq.md: sigma_dst = sigma_to^2 / sigma_src with sigma = t / alpha; h = inf: 0."""
    for nfe in (2, 4, 8):
        s = flow_map_schedule(nfe, h=1.0)
        sigma = [t / (1 - t) for t in (s.t_src[1:-1], s.t_to[1:-1], s.t_dst[1:-1])]
        assert torch.allclose(sigma[2], sigma[1] ** 2 / sigma[0], rtol=1e-5)
        assert flow_map_schedule(nfe, h=float("inf")).t_dst.abs().max() == 0


@pytest.mark.parametrize("solution", [notebook_2.pi_id, notebook_2.attached])
def test_the_loss_of_notebook_2_is_pi_id(solution):
    g = torch.Generator().manual_seed(1)
    means = torch.randn(6, 3, 2, generator=g, requires_grad=True)
    noise, draws = torch.randn(6, 2, generator=g), torch.rand(6, 2, generator=g)

    def student(x, t):
        return GMFlowPolicy(GaussianMixture(means, torch.zeros(6, 1, 1), means[..., :1]), x, t)

    def teacher(x, t):
        return x - t[:, None]

    uniforms = draws, draws[:, :1]
    expected = pi_id_loss(student(noise, torch.ones(6)), teacher, 1.0, 1.0, total_substeps=16,
                          uniforms=uniforms).loss  # fmt: skip
    loss = solution(student, teacher, noise, draws)
    assert torch.allclose(loss, expected, rtol=1e-5)
    same = torch.allclose(
        *(torch.autograd.grad(value, means)[0] for value in (loss, expected)), rtol=1e-4
    )
    assert same == (solution is notebook_2.pi_id)


def test_solutions_of_notebook_2b():
    trained, used = (set(flow_map_schedule(nfe).t_src.tolist()) for nfe in (4, 8))
    assert notebook_2b.new_times == used - trained
    last = flow_map_schedule(4, final_step_size_scale=0.5).t_src[-1]
    assert notebook_2b.last_segment(4, 0.5) == pytest.approx(float(last))


def test_a_displacement_under_dx_shrinks_with_t():
    g = torch.Generator().manual_seed(2)
    v, x = torch.randn(4, 3, 2, generator=g), torch.randn(4, 2, generator=g)
    policy, push = DXPolicy(v, x, 1.0), torch.randn(4, 2, generator=g)
    ends = [rollout(policy, x + d, 0.8, 0.2, solver="exact") for d in (0.0, push)]
    assert torch.allclose(ends[1] - ends[0], notebook_1.remaining(push, 0.8, 0.2), atol=1e-5)


@each_notebook
def test_mentions_no_machine(path):
    text = path.read_text("utf-8")
    assert not re.search(r"/(work|home|root|tmp|Users)/", text), "a path of one computer"
