"""Evaluates a few-step student: pictures of many prompts, CLIP score, HPSv2.1, Frechet distance.

    python -m text_to_image.evaluate --tiny                                # offline, on clothes
    python -m text_to_image.evaluate --prompts coco-10k --reference data/coco --batch 4
    torchrun --nproc-per-node 8 -m text_to_image.evaluate --prompts hpsv2 --hps
    python -m text_to_image.evaluate --prompts prompts.txt --clip openai/clip-vit-large-patch14

One picture per prompt, picture i from seed + i, drawn with all settings as trained. --clip, --hps
and --reference (FID) ask for a metric each.

In --out: images/, drawn.json (settings, prompts and seeds) and metrics.json, written after each
metric. The same command continues: pictures that are there are kept.
"""

if not __package__:
    raise SystemExit("start it in the repository's root: python -m text_to_image.evaluate")

import dataclasses
import hashlib
import json
import unittest.mock
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import fashion
from common.cli import keep_freed_memory, parse, run_cli, setting
from common.files import read_json, write_json, writing
from common.frechet import gaussian_distance, inception_features, load_inception, moments
from common.images import list_images, read_image, square
from common.train import Place, processes
from text_to_image.adapters import WEIGHTS
from text_to_image.families import naming, require_package
from text_to_image.generate import LoadSettings, draw, load_from
from text_to_image.prompts import KNOWN, read_source

COCO = "sayakpaul/coco-30-val-2014"
STYLES = ("anime", "concept-art", "paintings", "photo")  # of the benchmark HPSv2
CLOTHES = [f"a photo of a {name}" for name in fashion.CLASSES]
CHUNK = 64  # pictures between two writes


@dataclass(frozen=True)
class Settings(LoadSettings):
    """What is drawn and measured."""

    prompts: str = setting("clothes", f"{KNOWN}, a dataset, clothes, coco-10k or hpsv2", path=True)
    column: str = setting("prompt", "field of the prompts in a JSONL file or dataset")
    split: str = setting("train", "split of a dataset on the Hub")
    limit: int | None = setting(None, "number of prompts to use; default: all", low=2)
    out: Path = setting(Path("outputs/t2i_evaluation"), "folder for pictures and metrics")
    clip: str | None = setting(None, "CLIP score by this model: a folder or Hub name", path=True)
    hps: bool = setting(False, "HPSv2.1, by the package hpsv2")
    reference: Path | None = setting(None, "FID to a folder of real images")


def read_set(settings: Settings) -> list[str]:
    """The prompts, by name or from their source. Raises: ValueError, OSError: one line."""
    s = settings
    if s.prompts == "clothes":
        prompts = 20 * CLOTHES
    elif s.prompts == "hpsv2":  # the benchmark of that metric, 3,200 prompts
        from huggingface_hub import hf_hub_download

        prompts = []
        for style in STYLES:
            file = f"benchmark/{style}.json"
            path = Path(hf_hub_download("zhwang/HPDv2", file, repo_type="dataset"))
            prompts += json.loads(path.read_text("utf-8"))
    elif s.prompts == "coco-10k":  # of a set of COCO 2014 validation images
        prompts = [prompt for prompt, _ in read_source(COCO, "caption")][:10_000]
    else:
        prompts = [prompt for prompt, _ in read_source(s.prompts, s.column, s.split)]
    return prompts[: s.limit]


def draw_missing(settings: Settings, prompts: Sequence[str], here: Place) -> list[Path]:
    """Draws the pictures that are not there; every process takes its share. -> all files."""
    s, generate = settings, None
    files = [s.out / "images" / f"{i:06d}.png" for i in range(len(prompts))]
    for start in range(here.rank * CHUNK, len(prompts), here.world * CHUNK):
        places = range(start, min(start + CHUNK, len(prompts)))
        if all(files[i].is_file() for i in places):
            continue
        generate = generate or load_from(dataclasses.replace(s, device=str(here.device)))
        chosen = dataclasses.replace(s, seed=s.seed + start)
        result = draw(generate, chosen, [prompts[i] for i in places])
        for i, image in zip(places, result.images, strict=True):
            with writing(files[i]) as temporary:
                image.save(temporary)
    if here.world > 1:
        torch.distributed.barrier()
    return files


@torch.no_grad()
def clip_score(
    files: Sequence[Path], prompts: Sequence[str], name: str, device: torch.device, batch: int = 32
) -> float:
    """100 times the mean cosine similarity of pictures and prompts, by a CLIP model."""
    from transformers import CLIPModel, CLIPProcessor

    with naming(f"--clip {name}"):
        model = CLIPModel.from_pretrained(name, use_safetensors=True).to(device).eval()
        processor = CLIPProcessor.from_pretrained(name)
    length = model.config.text_config.max_position_embeddings
    tokens = processor.tokenizer(list(prompts), verbose=False).input_ids
    if cut := sum(len(row) > length for row in tokens):
        print(f"CLIP score: {cut} prompts have more than {length} tokens and are cut")
    total = 0.0
    for i in range(0, len(files), batch):
        inputs = processor(
            text=list(prompts[i : i + batch]), return_tensors="pt", padding=True, truncation=True,
            images=[read_image(file).numpy() for file in files[i : i + batch]], max_length=length,
        )  # fmt: skip
        output = model(**inputs.to(device))
        total += (output.image_embeds * output.text_embeds).sum().item()  # both have norm 1
    return 100 * total / len(files)


def hps_score(files: Sequence[Path], prompts: Sequence[str]) -> float:
    """100 times the mean HPSv2.1, by the package hpsv2."""
    import hpsv2

    scores = []
    with unittest.mock.patch.object(torch, "load", cache(torch.load)):  # it loads for each picture
        for file, prompt in zip(files, prompts, strict=True):
            scores += hpsv2.score(str(file), prompt, hps_version="v2.1")
    return 100 * float(sum(scores)) / len(scores)


def fid(files: Sequence[Path], real: Sequence[Path], net: Any, device: torch.device) -> float:
    """Frechet distance of Inception features, images cut to squares of the pictures' size."""
    side = min(read_image(files[0]).shape[:2])

    def batches(paths: Sequence[Path]) -> Iterator[Tensor]:
        for i in range(0, len(paths), 16):
            yield torch.stack([square(read_image(path), side) for path in paths[i : i + 16]])

    drawn = moments(inception_features(net, batches(files), device)[0])
    return gaussian_distance(*drawn, *moments(inception_features(net, batches(real), device)[0]))


def measure(
    settings: Settings, files: Sequence[Path], prompts: Sequence[str], device: torch.device
) -> Iterator[tuple[str, float]]:
    """Yields (name, value) of each metric, the cheap ones first."""
    s = settings
    if s.tiny and s.model.endswith("qwen"):
        pixels = torch.stack([read_image(file)[::4, ::4, 0] for file in files])
        images = pixels[:, None] / 127.5 - 1  #                               (B, 1, 28, 28)
        yield "clothes_frechet_distance", fashion.frechet_distance(images)  # no FID
        if s.prompts == "clothes":
            labels = torch.arange(len(files)) % len(CLOTHES)
            yield "recognition_rate", fashion.recognition_rate(images, labels)
    if s.clip is not None:
        yield "clip_score", clip_score(files, prompts, s.clip, device)
    if s.reference is not None:
        yield "fid", fid(files, list_images(s.reference), load_inception(device), device)
    if s.hps:
        yield "hpsv2.1", hps_score(files, prompts)


def evaluate(settings: Settings, here: Place) -> dict[str, Any]:
    """Draws and measures. Raises: ValueError if --out holds pictures of other settings."""
    s = settings
    if s.prompts == "clothes" and not s.tiny:
        raise ValueError("--prompts is missing; clothes are for --tiny")
    prompts = read_set(s)
    if s.hps:
        require_package("hpsv2", "--hps")
    if s.reference is not None:
        list_images(s.reference)  # before anything is drawn
    measured = {"clip", "hps", "reference", "out", "batch", "device"}
    drawn = {k: v for k, v in dataclasses.asdict(s).items() if k not in measured}
    drawn |= {"prompts": prompts, "seeds": [s.seed + i for i in range(len(prompts))]}
    local = [Path(s.adapter, name) for name in ("config.json", WEIGHTS) if s.adapter]
    content = [path.read_bytes() for path in local if path.is_file()]
    drawn["adapter_content"] = [hashlib.sha256(data).hexdigest()[:16] for data in content]
    drawn = json.loads(json.dumps(drawn))  # tuples become lists
    before = read_json(s.out / "drawn.json")
    if before not in ({}, drawn):
        differ = ", ".join(key for key in drawn if before.get(key) != drawn[key])
        raise ValueError(f"--out {s.out} has pictures of other {differ}; choose another")
    if here.rank == 0:
        write_json(s.out / "drawn.json", drawn)
    files = draw_missing(s, prompts, here)
    metrics = read_json(s.out / "metrics.json") if before else {}  # of the same pictures
    metrics |= {"model": s.model, "images": len(files)}
    if here.rank == 0:
        write_json(s.out / "metrics.json", metrics)
        for name, value in measure(s, files, prompts, here.device):
            metrics[name] = value
            write_json(s.out / "metrics.json", metrics)
            print(f"{name}: {value:.3f}", flush=True)
    return metrics


def main(argv: list[str] | None = None) -> None:
    """The command; see the top of the file."""
    keep_freed_memory()
    settings = parse(Settings, __doc__, argv)
    with processes(settings.device) as here:
        evaluate(settings, here)


if __name__ == "__main__":
    run_cli(main)
