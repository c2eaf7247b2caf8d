"""Bad input, in every script: one line on stderr that names what was given, exit status 1, and no
file written or changed. Most rows follow from the bounds that the settings state."""

import dataclasses
import importlib
import math
import os
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest

from common.cli import run_cli

ROOT = Path(__file__).parent.parent
SCRIPTS = {  # module: arguments without which it would stop for another reason
    "toy_2d": [],
    "toy_dit_imagenet": [],
    "toy_qwen": ["--tiny"],
    "imagenet.distill": [],
    "imagenet.sample": ["tiny"],
    "imagenet.cache_latents": ["images", "latents"],
    "text_to_image.generate": ["--tiny", "--prompt", "a jay"],
    "text_to_image.distill": ["--tiny"],
    "text_to_image.cache_prompts": ["prompts.txt", "--tiny"],
}
FILES = {
    "text.txt": b"a jay\n",
    "empty.txt": b"",
    "noise.safetensors": bytes(range(200)),
    "latin.txt": "caf\xe9\n".encode("latin-1"),
    "noise.pt": b"PK\x03\x04 no archive",
}


def kind_of(hint):
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def rows_of_bounds():
    """(module, argv, what the message names): out of bounds, nan, no number, no choice."""
    for module, others in SCRIPTS.items():
        settings = importlib.import_module(module).Settings
        hints = typing.get_type_hints(settings)
        for field in dataclasses.fields(settings):
            about, kind = field.metadata, kind_of(hints[field.name])
            if not about or about["positional"]:
                continue
            flag = "--" + (about["flag"] or field.name.replace("_", "-"))
            wrong = []
            if kind in (int, float):
                wrong.append("many")
                wrong += [about["low"] - 1] if about["low"] is not None else []
                wrong += [about["above"] - 1] if about["above"] is not None else []
                wrong += [about["high"] + 1] if about["high"] not in (None, math.inf) else []
                wrong += ["nan"] if kind is float else ["1.5"]
                wrong += ["inf"] if kind is float and about["high"] is None else []
            if about["choices"]:
                wrong.append("nonsense")
            for value in wrong:
                value = int(value) if kind is int and isinstance(value, float) else value
                yield module, [*others, f"{flag}={value}"], flag
        yield module, [*others, "--no-such-flag", "1"], "--no-such-flag"
        yield module, [*others, "--device", "tpu"], "tpu"


HAND = [
    # a file in place of a folder
    ("toy_2d", ["--iterations", "1", "--out", "text.txt"], "text.txt"),
    ("toy_dit_imagenet", ["--iterations", "1", "--out", "text.txt"], "text.txt"),
    ("imagenet.sample", ["tiny", "--out", "text.txt", "--count", "2"], "text.txt"),
    ("imagenet.distill", ["--out", "text.txt", "--iterations", "1"], "text.txt"),
    ("text_to_image.distill", ["--tiny", "--out", "text.txt", "--iterations", "1"], "text.txt"),
    # missing, empty or damaged files, a folder in place of a file
    ("imagenet.distill", ["--teacher", "missing.safetensors"], "missing.safetensors"),
    ("imagenet.distill", ["--teacher", "folder"], "folder"),
    ("imagenet.distill", ["--teacher", "noise.safetensors"], "noise.safetensors"),
    ("imagenet.distill", ["--teacher", "noise.pt"], "noise.pt"),
    ("imagenet.distill", ["--nfe", "2", "--latents", "folder"], "folder"),
    ("imagenet.sample", ["folder"], "folder"),
    ("imagenet.sample", ["missing.pt"], "missing.pt"),
    ("imagenet.sample", ["noise.pt"], "noise.pt"),
    ("imagenet.sample", ["tiny", "--reference", "missing.npz"], "missing.npz"),
    ("imagenet.sample", ["tiny", "--guidance-interval", "0.9", "0.1"], "--guidance-interval"),
    ("imagenet.sample", ["tiny", "--solver", "deis"], "--solver"),
    ("imagenet.cache_latents", ["folder", "out"], "folder"),
    ("imagenet.cache_latents", ["text.txt", "out"], "text.txt"),
    ("imagenet.cache_latents", ["missing", "out"], "missing"),
    ("toy_dit_imagenet", ["--teacher", "missing.safetensors"], "missing.safetensors"),
    ("toy_dit_imagenet", ["--teacher", "noise.safetensors"], "noise.safetensors"),
    ("toy_dit_imagenet", ["--class", "spoon"], "spoon"),
    ("toy_dit_imagenet", ["--class", "10"], "10"),
    ("toy_dit_imagenet", ["--guidance-interval", "0.8", "0.2"], "--guidance-interval"),
    ("toy_qwen", ["--tiny", "--height", "40"], "--height"),
    ("imagenet.sample", ["tiny", "--out", "s3://bucket/x"], "s3://bucket/x"),
    ("toy_qwen", ["--tiny", "--prompt", " "], "--prompt"),
    ("text_to_image.cache_prompts", ["empty.txt", "--size", "40"], "--size 40"),
    ("text_to_image.generate", ["--tiny"], "prompt"),
    ("text_to_image.generate", ["--tiny", "--prompt", ""], "prompt"),
    ("text_to_image.generate", ["--tiny", "--prompt-file", "missing.txt"], "missing.txt"),
    ("text_to_image.generate", ["--tiny", "--prompt-file", "empty.txt"], "empty.txt"),
    ("text_to_image.generate", ["--tiny", "--prompt-file", "latin.txt"], "latin.txt"),
    ("text_to_image.generate", ["--tiny", "--prompt-file", "folder"], "folder"),
    ("text_to_image.generate", ["--tiny", "--prompt", "a", "--adapter", "folder"], "folder"),
    ("text_to_image.generate", ["--tiny", "--prompt", "a", "--policy", "{"], "--policy"),
    ("text_to_image.generate", ["--tiny", "--prompt", "a", "--reference", "text.txt"], "text.txt"),
    ("text_to_image.distill", ["--tiny", "--preset", "nonsense"], "--preset"),
    ("text_to_image.distill", ["--prompts", "folder"], "folder"),
    ("text_to_image.cache_prompts", ["empty.txt", "--tiny", "--out", "p"], "empty.txt"),
    ("text_to_image.cache_prompts", ["latin.txt", "--tiny", "--out", "p"], "latin.txt"),
    ("text_to_image.cache_prompts", ["missing.txt", "--tiny", "--out", "p"], "missing.txt"),
]
ROWS = [*rows_of_bounds(), *HAND]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with the files that the rows name."""
    place = tmp_path_factory.mktemp("work")
    (place / "folder").mkdir()
    for name, content in FILES.items():
        (place / name).write_bytes(content)
    return place


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_there_are_enough_rows():
    assert len(ROWS) > 300 and {module for module, *_ in ROWS} == set(SCRIPTS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {' '.join(row[1])}")
def test_one_line_status_one_nothing_written(row, folder, monkeypatch):
    module, argv, named = row
    monkeypatch.chdir(folder)
    before = snapshot(folder)
    main = importlib.import_module(module).main
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: main(argv))
    message = str(stop.value.code)
    assert message.startswith("error: ") and "\n" not in message  # a string: exit status 1
    assert named in message
    assert snapshot(folder) == before


@pytest.mark.parametrize("module", [
    "toy_2d", "text_to_image.generate", pytest.param("imagenet.distill", marks=pytest.mark.slow)
])  # fmt: skip
def test_as_a_process(module, folder):
    """The same from the shell: exit status and one line."""
    command = [sys.executable, "-m", module, *SCRIPTS[module], "--seed", "many"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert run.returncode == 1 and not run.stdout
    assert len(run.stderr.strip().splitlines()) == 1 and "--seed" in run.stderr


FULL = """
import resource, signal, sys
import {module} as script
from common.cli import run_cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is an OSError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
run_cli(lambda: script.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name != "posix", reason="limits of a process")
@pytest.mark.parametrize("module, argv, kept", [
    ("toy_2d", ["--iterations", "1", "--points", "100"], "student.pt"),
    pytest.param(
        "imagenet.distill", ["--iterations", "1", "--batch", "2", "--picture-every", "0"],
        "student.safetensors", marks=pytest.mark.slow,
    ),
])  # fmt: skip
def test_a_disk_that_is_full(module, argv, kept, tmp_path):
    """No file may exceed 20 kB: one line, exit status 1, the old file whole, no half one."""
    out = tmp_path / "out"
    out.mkdir()
    (out / kept).write_bytes(b"what was there")
    command = [sys.executable, "-c", FULL.format(module=module), *argv, "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True,
                         env=environment | {"PYTHONDONTWRITEBYTECODE": "1"})  # fmt: skip
    assert run.returncode == 1 and run.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in run.stderr
    assert (out / kept).read_bytes() == b"what was there"
    assert not [p for p in out.rglob("*") if p.name.startswith(".tmp-")]
