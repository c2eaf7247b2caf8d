"""The evaluation of text-to-image students, on the small model of clothes."""

import json
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="needs requirements-extra.txt (diffusers)")
transformers = pytest.importorskip("transformers", reason="needs requirements-extra.txt")
pytest.importorskip("peft", reason="needs requirements-extra.txt (peft)")

from t2i_cases import tiny_pipeline  # noqa: E402

import text_to_image.cache_prompts as cache_prompts  # noqa: E402
import text_to_image.evaluate as evaluation  # noqa: E402
from common import fashion  # noqa: E402
from common.cli import parse  # noqa: E402
from common.images import list_images  # noqa: E402
from common.train import Place  # noqa: E402
from text_to_image.evaluate import CLOTHES, Settings, evaluate, main, read_set  # noqa: E402
from text_to_image.families import FAMILIES  # noqa: E402
from text_to_image.generate import load  # noqa: E402
from text_to_image.tiny import ADAPTERS  # noqa: E402

ONE = Place(0, 1, torch.device("cpu"))
FOLDER = Path(evaluation.__file__).parent
TEXTS = [(FOLDER / name).read_text() for name in ("README.md", "evaluate.py", "cache_prompts.py")]
COMMAND = r"-m text_to_image\.(evaluate|cache_prompts) (.+?)(?:  +#.*)?$"
COMMANDS = re.findall(COMMAND, "\n".join(TEXTS), re.M)


@pytest.mark.parametrize(("script", "flags"), sorted(set(COMMANDS)))
def test_the_flags_of_the_documented_commands_exist(script, flags):
    assert len(COMMANDS) >= 8
    module = {"evaluate": evaluation, "cache_prompts": cache_prompts}[script]
    parse(module.Settings, "", shlex.split(flags))


@pytest.fixture
def settings(tmp_path):
    flags = ["--tiny", "--device", "cpu", "--limit", "70", "--batch", "35", "--total-substeps", "8"]
    return parse(Settings, "", [*flags, "--out", str(tmp_path / "out")])


def test_the_model_of_clothes(settings):
    """Metrics against those of the latents, which no file and no 8 bits came between."""
    metrics = evaluate(settings, ONE)
    assert json.loads((settings.out / "metrics.json").read_text()) == metrics
    names = {"model", "images", "clothes_frechet_distance", "recognition_rate"}
    assert metrics.keys() == names and metrics["images"] == 70
    prompts = [CLOTHES[i % 10] for i in range(70)]
    generate = load("gm-qwen", tiny=True, device="cpu")
    latents = generate(prompts, batch=35, total_substeps=8, output="latent").latents
    images = fashion.to_images(latents)
    expected = fashion.frechet_distance(images)
    assert metrics["clothes_frechet_distance"] == pytest.approx(expected, rel=0.02)
    labels = torch.arange(70) % 10
    assert metrics["recognition_rate"] == pytest.approx(
        fashion.recognition_rate(images, labels), abs=0.03
    )
    assert metrics["recognition_rate"] > 0.8


def test_the_same_command_continues_and_another_is_refused(settings, monkeypatch):
    few = replace(settings, limit=3)
    evaluate(few, ONE)
    files = sorted((few.out / "images").iterdir())
    before = [file.read_bytes() for file in files]
    assert len(files) == 3
    monkeypatch.setattr(evaluation, "CHUNK", 2)
    files[2].unlink()
    stamps = [files[i].stat().st_mtime_ns for i in (0, 1)]
    evaluate(few, ONE)
    assert [file.read_bytes() for file in files] == before
    assert [files[i].stat().st_mtime_ns for i in (0, 1)] == stamps
    monkeypatch.setattr(evaluation, "load_from", lambda s: pytest.fail("loads, nothing to draw"))
    evaluate(replace(few, batch=1), ONE)
    monkeypatch.setattr(evaluation, "measure", lambda s, *given: iter([("clip_score", 30.0)]))
    evaluate(replace(few, clip="a model"), ONE)
    monkeypatch.setattr(evaluation, "measure", lambda s, *given: iter([]))
    assert evaluate(few, ONE)["clip_score"] == 30.0  # of the same pictures: kept
    assert json.loads((few.out / "metrics.json").read_text())["clip_score"] == 30.0
    with pytest.raises(ValueError, match="--prompts is missing"):
        evaluate(replace(few, tiny=False), ONE)
    for other in ({"seed": 5}, {"limit": 4}, {"nfe": 2}):
        with pytest.raises(ValueError, match=f"pictures of other .*{[*other][0]}"):
            evaluate(replace(few, **other), ONE)


def test_an_adapter_that_was_trained_on_is_another_one(settings, tmp_path):
    copy = tmp_path / "adapter"
    shutil.copytree(ADAPTERS["gm-qwen"], copy)
    own = replace(settings, limit=2, adapter=str(copy))
    evaluate(own, ONE)
    about = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(about, indent=1))
    with pytest.raises(ValueError, match="pictures of other adapter_content"):
        evaluate(own, ONE)


def test_processes_share_the_pictures(settings, monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK", 2)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    prompts = [CLOTHES[i] for i in range(5)]
    drawn = []
    for rank in (1, 0):
        files = evaluation.draw_missing(settings, prompts, Place(rank, 2, ONE.device))
        drawn.append([i for i, file in enumerate(files) if file.is_file()])
    assert drawn == [[2, 3], [0, 1, 2, 3, 4]]
    shared = [file.read_bytes() for file in files]
    alone = replace(settings, out=settings.out / "alone")
    files = evaluation.draw_missing(alone, prompts, ONE)
    for a, b in zip(shared, (file.read_bytes() for file in files), strict=True):
        assert a == b


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random CLIP model for pictures of 32 x 32, and the bytes as its vocabulary."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    common = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    common["num_attention_heads"] = 2
    text = {**common, "vocab_size": 258, "max_position_embeddings": 24}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    vision = {**common, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():  # its own initialisation makes all embeddings alike
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    size = {"shortest_edge": 32}
    processor = transformers.CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    tokenizer = tiny_pipeline(FAMILIES["flux2"]).tokenizer
    tokenizer.model_max_length = 24
    transformers.CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder, model


def test_clip_score_by_hand(clip, tmp_path, capsys):
    """Pixels normalised by hand, towers called one by one, cosines summed."""
    folder, model = clip
    tokenizer = transformers.CLIPProcessor.from_pretrained(folder).tokenizer
    prompts, files, cosines = ["a coat", "a long prompt " * 4], [], []
    generator = torch.Generator().manual_seed(0)
    for i, prompt in enumerate(prompts):
        pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels.numpy()).save(files[-1])
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
        image = ((pixels / 255 - mean) / std).permute(2, 0, 1)[None]
        tokens = torch.tensor([[tokenizer(c).input_ids[0] for c in prompt][:24]])
        with torch.no_grad():
            a = model.visual_projection(model.vision_model(image).pooler_output)
            b = model.text_projection(model.text_model(tokens).pooler_output)
        cosines.append(torch.cosine_similarity(a, b).item())
    score = evaluation.clip_score(files, prompts, str(folder), ONE.device, batch=1)
    assert score == pytest.approx(100 * sum(cosines) / 2, abs=1e-3)
    assert abs(score) > 1 and abs(cosines[0] - cosines[1]) > 1e-3
    assert "1 prompts have more than 24 tokens and are cut" in capsys.readouterr().out


def test_fid_of_shifted_pictures(tmp_path):
    """Features are mean colours: pictures that are lighter by 10 have distance 3 x 10^2."""

    def net(images):
        colours = images.float().mean((2, 3))
        return colours, colours

    generator, files = np.random.default_rng(0), []
    (tmp_path / "real" / "deeper").mkdir(parents=True)
    for i in range(8):
        colour = generator.integers(0, 200, (1, 1, 3))
        picture = np.broadcast_to(colour, (16, 16, 3)).astype(np.uint8)
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(picture).save(files[-1])
        wide = np.pad(picture + 10, ((0, 0), (4, 4), (0, 0)))  # cut to a square
        Image.fromarray(wide).save(tmp_path / "real" / "deeper" / f"{i}.png")
    found = evaluation.fid(files, list_images(tmp_path / "real"), net, ONE.device)
    assert found == pytest.approx(300, rel=1e-4)


def test_hps_score_by_its_package(monkeypatch):
    """Version 2.1, each picture with its prompt; weights are read once, as tensors."""
    calls, loads = [], []

    def score(path, prompt, hps_version):
        torch.load("weights", map_location="cpu")
        calls.append((path, prompt, hps_version))
        return [0.25 + 0.01 * len(calls)]

    monkeypatch.setattr(torch, "load", lambda *args, **options: loads.append(args))
    monkeypatch.setitem(sys.modules, "hpsv2", SimpleNamespace(score=score))
    assert evaluation.hps_score(["a.png", "b.png"], ["a", "b"]) == pytest.approx(26.5)
    assert calls == [("a.png", "a", "v2.1"), ("b.png", "b", "v2.1")] and len(loads) == 1


def test_prompt_sets(tmp_path, monkeypatch):
    def hf_hub_download(repo, file, repo_type):
        assert (repo, repo_type) == ("zhwang/HPDv2", "dataset")
        path = tmp_path / "set.json"
        path.write_text(json.dumps([f"{file} {i}" for i in range(3)]))
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    prompts = read_set(Settings(prompts="hpsv2"))
    assert len(prompts) == 12 and prompts[3] == "benchmark/concept-art.json 0"
    assert read_set(Settings(prompts="hpsv2", limit=4)) == prompts[:4]
    rows = [(f"caption {i}", None) for i in range(10_005)]
    queries = []
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "read_source", lambda *given: queries.append(given) or rows)
        assert len(read_set(Settings(prompts="coco-10k"))) == 10_000
    assert queries == [("sayakpaul/coco-30-val-2014", "caption")]
    (tmp_path / "p.jsonl").write_text('{"text": "a coat"}\n{"text": "a bag"}\n')
    path = str(tmp_path / "p.jsonl")
    assert read_set(Settings(prompts=path, column="text")) == ["a coat", "a bag"]
    assert read_set(Settings(limit=12))[9:] == ["a photo of a ankle boot", *CLOTHES[:2]]


def test_what_is_missing_is_said_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "load_from", lambda s: pytest.fail("loads"))
    flags = ["--tiny", "--limit", "4", "--out", str(tmp_path / "out")]
    with pytest.raises(ImportError, match="--hps needs the package 'hpsv2': pip install hpsv2"):
        main([*flags, "--hps"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no image"):
        main([*flags, "--reference", str(tmp_path / "empty")])
    assert not (tmp_path / "out").exists()
