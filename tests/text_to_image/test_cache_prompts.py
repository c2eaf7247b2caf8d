"""Cached prompts against the text encoders that they replace."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs requirements-extra.txt (diffusers)")
pytest.importorskip("transformers", reason="needs requirements-extra.txt (transformers)")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from t2i_cases import tiny_pipeline  # noqa: E402

import text_to_image.cache_prompts as cache_prompts  # noqa: E402
import text_to_image.families as dm  # noqa: E402
from common.train import Place  # noqa: E402
from text_to_image.cache_prompts import PromptCache, Settings  # noqa: E402

CPU = torch.device("cpu")
ONE = Place(0, 1, CPU)
PROMPTS = ["a bag", "a long red coat on a chair", "boots", "a shirt, folded", "sandals by the sea"]
WIDTH = 24
QWEN = dm.FAMILIES["qwen"]


@pytest.fixture(scope="module")
def pipes():
    return {name: tiny_pipeline(family) for name, family in dm.FAMILIES.items()}


@pytest.fixture
def settings(tmp_path):
    source = tmp_path / "prompts.txt"
    source.write_text("\ufeff" + "\n".join(PROMPTS) + "\n", "utf-8")
    return Settings(str(source), str(tmp_path / "cache"), "qwen", tiny=True, batch=2)


def prompts_in(settings) -> list[str]:
    prompts = []
    for path in sorted(Path(settings.out).glob("*")):
        with safe_open(path, "pt") as file:
            prompts += json.loads(file.metadata()["prompts"])
    return prompts


def shards(settings) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in sorted(Path(settings.out).glob("*"))}


@pytest.mark.parametrize("name", dm.FAMILIES)
def test_rows_are_what_the_text_encoder_gives(name, settings, pipes):
    family, pipe = dm.FAMILIES[name], pipes[name]
    settings = replace(settings, family=name, max_length=512 if name == "qwen" else 48)
    cache_prompts.cache(settings, ONE, pipe)
    cache = PromptCache(settings.out, family, "tiny")
    assert prompts_in(settings) == PROMPTS and len(cache) == 5
    actual = cache.conditions([3, 1])
    expected = family.encode_prompts(pipe, [PROMPTS[3], PROMPTS[1]], settings.max_length)
    torch.testing.assert_close(actual.embeds, expected.embeds, atol=1e-5, rtol=1e-5)
    if name == "qwen":
        assert torch.equal(actual.mask, expected.mask.bool())
        negative = family.encode_prompts(pipe, [""])
        torch.testing.assert_close(cache.negative.embeds, negative.embeds)
    else:
        assert actual.mask is None and cache.negative is None
    if name == "flux":
        torch.testing.assert_close(actual.pooled, expected.pooled, atol=1e-5, rtol=1e-5)


def test_shards_are_small_shared_by_processes_and_resumable(settings, pipes, monkeypatch):
    monkeypatch.setattr(cache_prompts, "SHARD_BYTES", 2 * 512 * WIDTH * 4)  # two prompts each
    cache_prompts.cache(settings, Place(1, 2, CPU), pipes["qwen"])
    assert list(shards(settings)) == ["shard_00001.safetensors"]
    with pytest.raises(ValueError, match="1 of 3 shards"):
        PromptCache(settings.out, QWEN, "tiny")
    cache_prompts.cache(settings, Place(0, 2, CPU), pipes["qwen"])
    before = shards(settings)
    assert len(before) == 3 and all(
        path.stat().st_size < 2 * 512 * WIDTH * 4
        for path in Path(settings.out).glob("*.safetensors")
    )
    Path(settings.out, "shard_00000.safetensors").write_bytes(b"half a file")
    cache_prompts.cache(settings, ONE, pipes["qwen"])
    after = shards(settings)
    assert [name for name in before if before[name] != after[name]] == ["shard_00000.safetensors"]
    assert prompts_in(settings) == PROMPTS


def test_another_encoder_or_source_is_refused(settings, pipes, tmp_path):
    cache_prompts.cache(settings, ONE, pipes["qwen"])
    other = tiny_pipeline(QWEN, seed=1)
    with pytest.raises(ValueError, match="has encoder"):
        cache_prompts.cache(settings, ONE, other)
    with pytest.raises(ValueError, match="has max_length 512, needed is 300"):
        cache_prompts.cache(replace(settings, max_length=300), ONE, pipes["qwen"])
    with pytest.raises(ValueError, match="has family qwen, needed is flux"):
        PromptCache(settings.out, dm.FAMILIES["flux"], "tiny")
    with pytest.raises(ValueError, match="has base tiny, needed is Qwen-Image"):
        PromptCache(settings.out, QWEN, "Qwen/Qwen-Image")
    second = replace(settings, out=str(tmp_path / "second"))
    cache_prompts.cache(second, ONE, other)
    name = "shard_00000.safetensors"
    shutil.copy(Path(second.out, name), Path(settings.out, "shard_00001.safetensors"))
    with pytest.raises(ValueError, match="shard_00001.safetensors has encoder"):
        PromptCache(settings.out, QWEN, "tiny")
    first = Path(settings.out, name)
    first.write_bytes(first.read_bytes()[:-100])
    with pytest.raises(ValueError, match="shard_00000.safetensors cannot .* end is missing"):
        PromptCache(settings.out, QWEN, "tiny")


def test_every_epoch_sees_every_prompt_sorted_by_length(settings, pipes):
    cache_prompts.cache(settings, ONE, pipes["qwen"])
    cache = PromptCache(settings.out, QWEN, "tiny")
    parts = [cache.rows_of(i, 4, seed=0) for i in range(5)]
    assert sorted(sum(parts, [])) == sorted(list(range(5)) * 4)  # 20 places are 4 epochs of 5
    assert len(set(parts[0])) == 4
    for part in parts:
        lengths = [int(cache.lengths[row]) for row in part]
        assert lengths == sorted(lengths)
    again = PromptCache(settings.out, QWEN, "tiny")
    assert again.rows_of(3, 4, seed=0) == parts[3]  # from the iteration alone
    assert len({str(cache.rows_of(0, 4, seed)) for seed in range(5)}) > 1


def test_an_old_cache_with_another_unconditional_prompt_is_refused(settings, pipes):
    """Qwen-Image's is the empty string; earlier caches had a space and did not say so."""
    cache_prompts.cache(settings, ONE, pipes["qwen"])
    path = Path(settings.out, "shard_00000.safetensors")
    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    for negative in (None, "' '"):
        old = {key: value for key, value in about.items() if key != "negative"}
        save_file(tensors, path, old if negative is None else old | {"negative": negative})
        with pytest.raises(ValueError, match=f"has negative {negative}, needed is ''"):
            PromptCache(settings.out, QWEN, "tiny")
        with pytest.raises(ValueError, match=f"has negative {negative}, needed is ''"):
            cache_prompts.cache(settings, ONE, pipes["qwen"])


@pytest.mark.parametrize("name", dm.FAMILIES)
def test_float8_is_half_as_large_and_close(name, settings, pipes):
    family, pipe = dm.FAMILIES[name], pipes[name]
    length = 512 if name == "qwen" else 48
    settings = replace(settings, family=name, max_length=length, float8=True)
    cache_prompts.cache(settings, ONE, pipe)
    cache = PromptCache(settings.out, family, "tiny")
    actual = cache.conditions(range(5)).embeds
    expected = family.encode_prompts(pipe, PROMPTS, length).embeds
    error = (actual - expected).norm() / expected.norm()
    assert 0.005 < error < 0.04
    tensors = load_file(Path(settings.out, "shard_00000.safetensors"))
    assert tensors["embeds"].dtype == torch.float8_e4m3fn
    assert tensors["embeds"].shape[0] == len(tensors["scales"])
    with pytest.raises(ValueError, match="has float8 True, needed is False"):
        cache_prompts.cache(replace(settings, float8=False), ONE, pipe)


def test_a_remote_cache(settings, pipes):
    """Written to and read from a filesystem of fsspec, row by row."""
    fsspec = pytest.importorskip("fsspec", reason="needs fsspec (optional)")
    local, remote = settings, replace(settings, out="memory://bucket/cache")
    for chosen in (local, remote):
        cache_prompts.cache(chosen, ONE, pipes["qwen"])
    memory = fsspec.filesystem("memory")
    assert [name.rsplit("/")[-1] for name in memory.ls("/bucket/cache", detail=False)] == [
        "shard_00000.safetensors"
    ]
    memory.ls("/bucket/cache")
    caches = [PromptCache(chosen.out, QWEN, "tiny") for chosen in (local, remote)]
    near, far = (cache.conditions([4, 0]) for cache in caches)
    assert torch.equal(near.embeds, far.embeds) and torch.equal(near.mask, far.mask)
    before = memory.modified("/bucket/cache/shard_00000.safetensors")
    cache_prompts.cache(remote, ONE, pipes["qwen"])  # nothing to do
    assert memory.modified("/bucket/cache/shard_00000.safetensors") == before


def test_prompts_that_are_cut_are_counted(settings, pipes, capsys, tmp_path):
    source = tmp_path / "long.txt"
    source.write_text("a bag\n" + "word " * 300 + "end\n" + "word " * 400 + "\n")
    cache_prompts.cache(replace(settings, source=str(source)), ONE, pipes["qwen"])
    said = capsys.readouterr().out
    assert "2 prompts of this process have more than 512 tokens and were cut" in said


def test_limit_takes_the_first(settings, pipes):
    cache_prompts.cache(replace(settings, limit=3), ONE, pipes["qwen"])
    assert prompts_in(settings) == PROMPTS[:3]


def test_jsonl_with_images(settings, pipes, tmp_path):
    from PIL import Image

    lines = []
    for i in range(2):
        Image.new("RGB", (40 + 20 * i, 50), (90 * i, 30, 200)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"text": PROMPTS[i], "file": f"{i}.png"}))
    source = tmp_path / "prompts.jsonl"
    source.write_text("\n".join(lines))
    settings = replace(settings, source=str(source), column="text", images="file", size=32)
    cache_prompts.cache(settings, ONE, pipes["qwen"])
    cache = PromptCache(settings.out, QWEN, "tiny")
    latents = cache.latents([1, 0])
    assert latents.shape == (2, 4, 4, 4) and not torch.equal(latents[0], latents[1])


def test_bad_sources(tmp_path, settings):
    with pytest.raises(ValueError, match="required: source"):
        cache_prompts.main([])
    with pytest.raises(ValueError, match="0 of . shards"):
        PromptCache(tmp_path, QWEN, "tiny")
