"""What the README promises: names, files and commands exist, and its 40 lines are the method."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from piflow_minimal import GaussianMixture, GMFlowPolicy, pi_id_loss, rollout

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted(p for p in ROOT.rglob("*.md") if not {".venv", "outputs"} & set(p.parts))


def section(title: str) -> str:
    """The text of one section."""
    return re.search(rf"\n## {re.escape(title)}\n(.*?)(?=\n## |\Z)", README, re.S).group(1)


def forty_lines() -> str:
    return re.search(r"<!-- forty lines -->\n```python\n(.*?)```", README, re.S).group(1)


def test_every_name_in_the_paper_map_exists():
    rows = re.findall(r"^\|[^|]+\|([^|]+)\|$", section("From the paper to the code"), re.M)
    names = [name for row in rows[2:] for name in re.findall(r"`([\w.]+)`", row)]
    assert len(names) > 20
    core = importlib.import_module("piflow_minimal")
    for name in names:
        if name.startswith(("common.", "imagenet.", "text_to_image.")):
            module, _, rest = name.rpartition(".")
            if module.count("."):
                assert hasattr(importlib.import_module(module), rest), name
            else:
                importlib.import_module(name)
        elif "." in name:
            kind, _, method = name.partition(".")
            assert hasattr(getattr(core, kind), method), name
        else:
            assert hasattr(core, name) or name in core.pi_id_loss.__annotations__, name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_modules_that_a_page_names_are_there(page):
    text = page.read_text()
    links = set(re.findall(r"\]\((?!http|#)([^)#]+)(?:#[^)]*)?\)", text))
    missing = [name for name in links if not (page.parent / name).exists()]
    commands = set(re.findall(r"(?:python3?|nproc-per-node \w+) (\w+\.py)", text))
    listed = set(re.findall(r"<!-- (\w+\.py) -->", text))  # for the reader to write
    missing += [name for name in commands - listed if not (ROOT / name).exists()]
    packages = "imagenet|text_to_image|benchmarks|docs|assets"
    for module in set(re.findall(rf"-m ((?:{packages})\.\w+)", text)):
        if not (ROOT / (module.replace(".", "/") + ".py")).exists():
            missing.append(module)
    assert not missing


def test_anchors_of_the_method_page_exist():
    text = (ROOT / "docs" / "method.md").read_text()
    heads = {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-")
             for h in re.findall(r"^#+ (.+)$", text, re.M)}  # fmt: skip
    used = {a for page in PAGES for a in re.findall(r"method\.md#([\w-]+)", page.read_text())}
    used |= set(re.findall(r"\]\(#([\w-]+)\)", text))
    assert used and used <= heads


def test_the_minutes_of_a_session_add_up_to_90():
    sessions = (ROOT / "docs" / "teaching.md").read_text().split("## Session")[1:]
    tables = [part.split("\n## ")[0] for part in sessions]
    minutes = [sum(map(int, re.findall(r"^\| (\d+) \|", table, re.M))) for table in tables]
    assert minutes == [90, 90, 90]


@pytest.mark.parametrize("which", ["main", "test"])
def test_ci_runs_the_commands_that_it_prints(which):
    """`.ci/run` reads the command from the line below the marker and the fence."""
    lines = README.splitlines()
    at = lines.index(f"<!-- {which} command -->")
    assert lines[at + 1] == "```" and lines[at + 3] == "```"
    assert lines[at + 2].startswith("pip install -r requirements.txt")
    assert f"from_readme '{which} command'" in (ROOT / ".ci" / "run").read_text()


def test_the_root_shows_the_design():
    modules = {path.name for path in ROOT.glob("*.py")}
    assert modules == {"piflow_minimal.py", "toy_2d.py", "toy_dit_imagenet.py", "toy_qwen.py"}
    assert len(README.splitlines()) < 300  # with the 50 lines of one's own model
    for page in PAGES:
        assert "{{" not in page.read_text() and "TODO" not in page.read_text()


def test_forty_lines_equal_the_module():
    """Velocity, loss and sample of the README's plain code, with its own untrained network."""
    code = forty_lines()
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    plain = {}
    exec(code[: code.index("adam = ")], plain)
    torch.manual_seed(1)
    x_src, x = torch.randn(2, 64, 2)
    with torch.no_grad():
        means, log_A, log_std = plain["student"](x_src)
        log_std = log_std - 1.5
        mixture = GaussianMixture(means, log_std[:, :, None], log_A[:, :, None])
        policy, S = GMFlowPolicy(mixture, x_src, 1.0), plain["S"]
        parts = means, log_A, log_std
        for t in (1.0, 0.6, 0.1):
            u = plain["velocity"](*parts, x_src, x, t)
            assert torch.allclose(u, policy.velocity(x, t), rtol=1e-4, atol=1e-4)
        end = rollout(policy, x_src, 1.0, 0.0, total_substeps=S)
        assert torch.allclose(plain["rollout"](parts, x_src, S), end, atol=1e-4)
        plain["student"] = lambda x_src: parts

        for steps in (0, 9, 31):
            uniforms = torch.full((64, 1), steps / S), torch.zeros(64, 0)
            teacher, options = plain["teacher"], {"num_intermediates": 1, "total_substeps": S}
            out = pi_id_loss(policy, teacher, 1.0, 1.0, uniforms=uniforms, **options)
            assert torch.allclose(plain["pi_id_loss"](x_src, steps), out.loss, rtol=1e-3)


@pytest.mark.slow
def test_forty_lines_print_the_error_that_the_readme_states():
    run = subprocess.run([sys.executable, "-c", forty_lines()], capture_output=True, text=True)
    error = float(re.search(r"endpoint RMSE ([\d.]+)", run.stdout).group(1))
    stated = float(re.search(r"endpoint RMSE ([\d.]+)`", README).group(1))
    assert error == pytest.approx(stated, rel=0.5)
