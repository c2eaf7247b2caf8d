"""Cached prompts against the text encoders that they replace."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers", reason="needs requirements-extra.txt (diffusers)")
pytest.importorskip("transformers", reason="needs requirements-extra.txt (transformers)")

import text_to_image.cache_prompts as cache_prompts  # noqa: E402
import text_to_image.families as dm  # noqa: E402
from imagenet.distributed import Place  # noqa: E402
from text_to_image.cache_prompts import PromptCache, Settings  # noqa: E402
from text_to_image.tiny_models import tiny_pipeline  # noqa: E402

CPU = torch.device("cpu")
ONE = Place(0, 1, CPU)
PROMPTS = ["a bag", "a long red coat on a chair", "boots", "a shirt, folded", "sandals by the sea"]
WIDTH = 24


@pytest.fixture(scope="module")
def pipes():
    return {name: tiny_pipeline(family) for name, family in dm.FAMILIES.items()}


@pytest.fixture
def settings(tmp_path):
    source = tmp_path / "prompts.txt"
    source.write_text("\ufeff" + "\n\n".join(PROMPTS) + "\n", "utf-8")
    return Settings(str(source), tmp_path / "cache", "qwen", tiny=True, batch=2)


def shards(settings) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in sorted(settings.out.glob("*"))}


@pytest.mark.parametrize("name", dm.FAMILIES)
def test_rows_are_what_the_text_encoder_gives(name, settings, pipes):
    family, pipe = dm.FAMILIES[name], pipes[name]
    settings = replace(settings, family=name, max_length=512 if name == "qwen" else 48)
    cache_prompts.cache(settings, ONE, pipe)
    cache = PromptCache(settings.out, family, "tiny", WIDTH)
    assert cache.prompts == PROMPTS and len(cache) == 5
    actual = cache.conditions([3, 1])
    expected = dm.encode_prompts(pipe, family, [PROMPTS[3], PROMPTS[1]], settings.max_length)
    torch.testing.assert_close(actual.embeds, expected.embeds, atol=1e-5, rtol=1e-5)
    if name == "qwen":
        assert torch.equal(actual.mask, expected.mask.bool())
        negative = dm.encode_prompts(pipe, family, [" "])
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
        PromptCache(settings.out, dm.FAMILIES["qwen"], "tiny", WIDTH)
    cache_prompts.cache(settings, Place(0, 2, CPU), pipes["qwen"])
    before = shards(settings)
    assert len(before) == 3 and all(
        path.stat().st_size < 2 * 512 * WIDTH * 4 for path in settings.out.glob("*.safetensors")
    )
    (settings.out / "shard_00000.safetensors").write_bytes(b"half a file")
    cache_prompts.cache(settings, ONE, pipes["qwen"])
    after = shards(settings)
    assert [name for name in before if before[name] != after[name]] == ["shard_00000.safetensors"]
    assert PromptCache(settings.out, dm.FAMILIES["qwen"], "tiny", WIDTH).prompts == PROMPTS


def test_another_encoder_or_source_is_refused(settings, pipes, tmp_path):
    cache_prompts.cache(settings, ONE, pipes["qwen"])
    other = tiny_pipeline(dm.FAMILIES["qwen"], seed=1)
    with pytest.raises(ValueError, match="made with encoder"):
        cache_prompts.cache(settings, ONE, other)
    with pytest.raises(ValueError, match="made with max_length 512"):
        cache_prompts.cache(replace(settings, max_length=300), ONE, pipes["qwen"])
    with pytest.raises(ValueError, match="is of family qwen, needed is flux"):
        PromptCache(settings.out, dm.FAMILIES["flux"], "tiny", WIDTH)
    with pytest.raises(ValueError, match="is of base tiny, needed is Qwen/Qwen-Image"):
        PromptCache(settings.out, dm.FAMILIES["qwen"], "Qwen/Qwen-Image", WIDTH)
    with pytest.raises(ValueError, match="embeddings"):
        PromptCache(settings.out, dm.FAMILIES["qwen"], "tiny", 3584)
    second = replace(settings, out=tmp_path / "second")
    cache_prompts.cache(second, ONE, other)
    name = "shard_00000.safetensors"
    shutil.copy(second.out / name, settings.out / "shard_00001.safetensors")
    with pytest.raises(ValueError, match="shard_00001.safetensors is of encoder"):
        PromptCache(settings.out, dm.FAMILIES["qwen"], "tiny", WIDTH)
    (settings.out / name).write_bytes((settings.out / name).read_bytes()[:-100])
    with pytest.raises(ValueError, match="shard_00000.safetensors is damaged"):
        PromptCache(settings.out, dm.FAMILIES["qwen"], "tiny", WIDTH)


def test_every_epoch_sees_every_prompt_in_micro_batches_of_similar_length(settings, pipes):
    cache_prompts.cache(settings, ONE, pipes["qwen"])
    cache = PromptCache(settings.out, dm.FAMILIES["qwen"], "tiny", WIDTH)
    seen = [row for i in range(5) for part in cache.micro_batches(4, 2, 0, i) for row in part]
    assert sorted(seen) == sorted(list(range(5)) * 4)  # 20 places are 4 epochs of 5
    for i in range(5):
        parts = cache.micro_batches(4, 2, 0, i)
        lengths = [[cache.lengths[row] for row in part] for part in parts]
        assert max(lengths[0]) <= min(lengths[1])
    assert len({str(cache.micro_batches(4, 2, seed, 0)) for seed in range(5)}) > 1


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
    cache = PromptCache(settings.out, dm.FAMILIES["qwen"], "tiny", WIDTH)
    latents = cache.latents([1, 0])
    assert latents.shape == (2, 4, 4, 4) and not torch.equal(latents[0], latents[1])
    source.write_text("\n".join([*lines, '{"text": "no file"}']))
    with pytest.raises(ValueError, match="prompts.jsonl, line 3: not an object with text and file"):
        cache_prompts.read_prompts(settings)


@pytest.mark.parametrize("name", dm.FAMILIES)
def test_image_latents_are_those_that_decode_takes(name, pipes, tmp_path, monkeypatch):
    """`decode` hands the VAE back what the VAE's encoder gave."""
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    pipe, family = pipes[name], dm.FAMILIES[name]
    z = torch.randn(1, 4, *(() if name != "qwen" else (1,)), 4, 4)
    got = []
    found = SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: z))
    monkeypatch.setattr(pipe.vae, "encode", lambda pixels: found)

    def decode(latent, return_dict):
        got.append(latent)
        return (torch.zeros(1, 3, *(() if name != "qwen" else (1,)), 32, 32),)

    monkeypatch.setattr(pipe.vae, "decode", decode)
    latent = cache_prompts.encode_image(pipe, family, str(tmp_path / "a.png"), 32)
    dm.decode(pipe, family, latent[None])
    torch.testing.assert_close(got[0], z, atol=1e-5, rtol=1e-5)


def test_bad_sources(tmp_path, settings):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(ValueError, match="empty.txt: there is no prompt in it"):
        cache_prompts.read_prompts(Settings(str(empty)))
    with pytest.raises(FileNotFoundError, match="no such file"):
        cache_prompts.read_prompts(Settings(str(tmp_path / "missing.txt")))
    with pytest.raises(ValueError, match="only a JSONL file"):
        cache_prompts.read_prompts(replace(settings, images="file"))
    with pytest.raises(ValueError, match="no shards"):
        PromptCache(tmp_path, dm.FAMILIES["qwen"], "tiny", WIDTH)
