"""Prompts of files and of the Hub, and what token limits cut off."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers", reason="needs requirements-extra.txt (diffusers)")
pytest.importorskip("transformers", reason="needs requirements-extra.txt (transformers)")

from t2i_cases import tiny_pipeline  # noqa: E402

import text_to_image.families as dm  # noqa: E402
from text_to_image import cache_prompts, generate  # noqa: E402
from text_to_image.prompts import cut_off, read_source  # noqa: E402
from text_to_image.tiny import fashion_pipeline  # noqa: E402

ODD = ["a coat\u2028on a chair", "a bag\x0bmade of felt", "a shirt\x85plain", "a boot\x1cred",
       "a hat\u2029blue", "a\x0cb"]  # fmt: skip


def test_a_line_ends_at_a_newline_and_nowhere_else(tmp_path):
    """What `str.splitlines` would split stays one prompt, in text and in JSONL, in all commands."""
    text, lines = tmp_path / "p.txt", tmp_path / "p.JSONL"
    text.write_bytes(("\ufeff" + "\r\n".join(ODD) + "\r\n").encode())
    objects = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in ODD]
    lines.write_bytes("\n".join(objects).encode())
    for path in (text, lines):
        assert read_source(path) == [(prompt, None) for prompt in ODD]
        assert [p for p, _ in cache_prompts.read_prompts(cache_prompts.Settings(str(path)))] == ODD
        assert generate.read_prompts(generate.Settings(prompt_file=path)) == ODD


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".parquet", ".md", ""])
def test_another_kind_is_refused_with_the_kinds_that_are_known(tmp_path, suffix):
    path = tmp_path / f"prompts{suffix}"
    path.write_text("prompt,id\na coat,3\n")
    with pytest.raises(ValueError, match=r"not a known kind .*; known are \.txt .* and \.jsonl"):
        read_source(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": 5}', "line 2: .*int"),
        ('{"prompt": ["a"]}', "line 2: .*list"),
        ('{"prompt": null}', "line 2: .*NoneType"),
        ('{"caption": "a"}', "line 2: KeyError 'prompt'"),
        ('["a"]', "line 2: TypeError list"),
        ('"a coat"', "line 2: TypeError string"),
        ("a coat", "line 2: Expecting value"),
        ('{"prompt": "a"} {"prompt": "b"}', "line 2: Extra data"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a coat"}\n' + line + "\n")
    with pytest.raises(ValueError, match="p.jsonl, " + message):
        read_source(path)


def test_images_stand_beside_their_file(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": " a coat ", "file": "images/1.png"}\n\n')
    expected = [("a coat", tmp_path / "images/1.png")]
    assert read_source(str(path), "text", images="file") == expected
    (tmp_path / "p.txt").write_text("a coat\n")
    with pytest.raises(ValueError, match="--images file: only a .jsonl file"):
        read_source(str(tmp_path / "p.txt"), images="file")


def test_empty_prompts_are_counted_and_missing_files_named(tmp_path, capsys):
    path = tmp_path / "p.txt"
    path.write_text("a coat\n\n  \na bag\n")
    assert len(read_source(path)) == 2
    assert "p.txt: 2 empty prompts are left out" in capsys.readouterr().out
    path.write_text("a coat\n")
    read_source(path)
    assert capsys.readouterr().out == ""
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="p.txt: there is no prompt in it"):
        read_source(path)
    for source in ("data/missing.txt", "missing.jsonl", "data/sets/missing.txt"):
        with pytest.raises(OSError, match="missing.* No such file"):
            read_source(source)


def test_hub_names(monkeypatch):
    calls = []

    def load_dataset(name, split, **options):
        calls.append((name, split, options))
        return Columns({"caption": [" a coat", None, "", "a bag"]})

    class Columns(dict):
        column_names = property(lambda self: list(self))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("text_to_image.prompts.require_package", lambda *names: None)
    assert read_source("owner/set.v2", "caption") == [("a coat", None), ("a bag", None)]
    assert read_source("owner/set", "caption", "test")[0] == ("a coat", None)
    assert calls == [("owner/set.v2", "train", {}), ("owner/set", "test", {})]
    with pytest.raises(ValueError, match="dataset owner/set, column prompt: KeyError 'prompt'"):
        read_source("owner/set")


@pytest.mark.parametrize("name", dm.FAMILIES)
def test_what_is_cut_off_is_what_the_encoder_does_not_see(name):
    """Changing the part that is named changes nothing; changing the character before it does."""
    pipe, family = tiny_pipeline(dm.FAMILIES[name]), dm.FAMILIES[name]
    limit = {"qwen": 512, "flux": 48, "flux2": 512}[name]
    text = "".join(chr(97 + i % 7) for i in range(900))
    short, end = cut_off(pipe, family, ["a", text], limit)
    assert short == "" and text.endswith(end) and 300 < len(end) < 899
    kept = text[: len(text) - len(end)]
    variants = [text, kept + "z" * len(end), kept[:-1] + "z" + end]
    embeds = family.encode_prompts(pipe, variants, limit).embeds
    assert torch.equal(embeds[0], embeds[1])
    assert not torch.equal(embeds[0], embeds[2])


def test_the_model_of_clothes_has_no_limit():
    assert cut_off(fashion_pipeline(), dm.FAMILIES["qwen"], ["word " * 900]) == [""]
