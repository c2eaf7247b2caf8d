"""text_to_image/README.md: its commands exist, and those with --tiny run as printed."""

import re
import shlex
from pathlib import Path

import pytest

from common.cli import parse

pytest.importorskip("diffusers", reason="needs requirements-extra.txt (diffusers)")
pytest.importorskip("transformers", reason="needs requirements-extra.txt (transformers)")
pytest.importorskip("peft", reason="needs requirements-extra.txt (peft)")

from text_to_image.generate import MODELS, Settings, main, read_prompts  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "text_to_image" / "README.md").read_text()
DOCSTRING = (ROOT / "text_to_image" / "generate.py").read_text().split('"""')[1]
COMMANDS = re.findall(r"^ *python -m text_to_image\.generate (.+)$", README + DOCSTRING, re.M)


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_commands_run_as_printed(command, tmp_path, monkeypatch):
    assert len(COMMANDS) >= 6
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a jay\n")
    settings = parse(Settings, "", shlex.split(command))
    assert settings.ui or read_prompts(settings)
    if settings.tiny and not settings.ui:
        main(shlex.split(command))
        pictures = list(Path("outputs/text_to_image").glob("0000_seed*.png"))
        assert len(pictures) == len(settings.prompt)


def test_the_table_has_every_model_as_the_code_has_it():
    rows = dict(re.findall(r"^\| `([a-z].+?)` \|(.+)\|$", README, re.M))
    assert rows.keys() == MODELS.keys()
    for name, model in MODELS.items():
        nfe = f"| {model.nfe}{' or more' if model.elastic else ''} |"
        assert f"{model.repo}, {model.subfolder}" in rows[name] and nfe in rows[name]


def test_every_flag_that_it_names_exists():
    flags = set(re.findall(r"(?<!-)--[a-z][a-z-]*", README.partition("## Distillation")[0]))
    known = {"--" + name.replace("_", "-") for name in Settings.__dataclass_fields__}
    assert {"--lora", "--offload", "--host"} <= flags <= known
