"""The stored notebooks: outputs present, no errors, small; each begins with what it promises."""

import ast
import base64
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LIMIT = 600_000  # bytes of one stored file
STEM = re.compile(r"\d\d_[a-z0-9_]+")

pytestmark = pytest.mark.skipif(not NOTEBOOKS, reason="no notebooks here")
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path: Path, kind: str) -> list[dict]:
    return [c for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


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
def test_three_exercises_that_check_themselves_with_solutions_at_the_end(path):
    if path.stem.startswith("05"):
        pytest.skip("no exercises")
    cells = json.loads(path.read_text("utf-8"))["cells"]
    text = "\n\n".join(source(cell) for cell in cells)
    exercises, solutions = text.split("## Exercises")[1].split("## Solutions")
    assert re.findall(r"^\*\*(\d)\. ", exercises, re.MULTILINE) == ["1", "2", "3"]
    assert exercises.count("<details><summary>Hint</summary>") == 3
    for n in "123":
        check = exercises.split(f"def check_{n}(")[1].split("\n\n\n")[0]
        assert "assert " in check, "a check that cannot fail"
        assert f"\ncheck_{n}(my_" in exercises or n == "3" and "\ncheck_3(" in exercises
        assert re.search(rf"^check_{n}\(", solutions, re.MULTILINE), f"no solution of {n}"
    printed = [o["text"] for cell in cells for o in cell.get("outputs", []) if "text" in o]
    printed = "".join("".join(part) for part in printed)
    for n in "123":
        assert f"exercise {n}: no answer yet" in printed
        assert f"exercise {n}: right" in printed, "the stored solution does not pass its check"


@each_notebook
def test_mentions_no_machine(path):
    text = path.read_text("utf-8")
    assert not re.search(r"/(work|home|root|tmp|Users)/", text), "a path of one computer"
