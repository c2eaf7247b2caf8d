"""What the README promises about the code exists, and its commands are the ones that CI runs."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    """The text of one section, without its sub-sections' headings."""
    return re.search(rf"\n## {re.escape(title)}\n(.*?)(?=\n## |\Z)", README, re.S).group(1)


def test_every_name_in_the_paper_map_exists():
    rows = re.findall(r"^\|[^|]+\|([^|]+)\|$", section("From the paper to the code"), re.M)
    names = [name for row in rows[2:] for name in re.findall(r"`([\w.]+)`", row)]
    assert len(names) > 20
    core = importlib.import_module("piflow_minimal")
    for name in names:
        module, _, rest = name.partition(".")
        if (ROOT / f"{module}.py").is_file():
            found = importlib.import_module(module)
            assert hasattr(found, rest), name
        elif "." in name:
            assert hasattr(getattr(core, module), rest), name
        else:
            loss = core.pi_id_loss.__annotations__
            assert hasattr(core, name) or name in loss, name


def test_every_file_that_it_names_is_there():
    names = set(re.findall(r"`([\w./-]+\.(?:py|txt|md|ipynb))`", README))
    names |= set(re.findall(r"\]\((?!http)([^)#]+)\)", README))  # links and pictures
    names |= set(re.findall(r"(?:python|1|8|2) (\w+\.py)", README))  # commands
    names |= set(re.findall(r"^    ([\w./]+\.py|\w+/) {2,}", README, re.M))  # the layout
    assert {"piflow_minimal.py", "toy_2d.py", "notebooks/", "assets/toy_2d.png"} <= names
    missing = sorted(name for name in names if not (ROOT / name).exists())
    assert not missing


@pytest.mark.parametrize("which", ["main", "test"])
def test_ci_runs_the_commands_that_it_prints(which):
    """`.ci/run` reads the command from the line below the marker and the fence."""
    lines = README.splitlines()
    at = lines.index(f"<!-- {which} command -->")
    assert lines[at + 1] == "```" and lines[at + 3] == "```"
    assert lines[at + 2].startswith("pip install -r requirements.txt")
    assert f"from_readme '{which} command'" in (ROOT / ".ci" / "run").read_text()


def test_nothing_is_left_to_fill_in():
    assert "{{" not in README and "TODO" not in README
