"""Encodes prompts once, so that distillation never loads a text encoder.

    python -m text_to_image.cache_prompts prompts.txt --family qwen --out data/qwen
    python -m text_to_image.cache_prompts prompts.jsonl --column caption --out data/qwen
    torchrun --nproc-per-node 8 -m text_to_image.cache_prompts OWNER/DATASET --out data/qwen

The source is a text file (a prompt per line), a JSONL file, or a dataset on the Hub. If a JSONL
file has a field of image files (--images), their latents are cached too, for Algorithm 2. Several
processes share the shards; run the same command again to continue.

A shard is a safetensors file of at most about 1 GB. It holds the embeddings of its prompts one
after the other without padding, their lengths, for FLUX.1 the pooled vectors, for Qwen-Image the
negative prompt, and in its metadata the prompts and what encoded them. `PromptCache` reads it.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import text_to_image.families as dm
from common.cli import atomic, parse, run_cli, setting
from imagenet.distributed import Place, processes, remove_leftovers

SHARD_BYTES = 1e9
NEGATIVE_PROMPT = " "  # of Qwen-Image's second branch, as in its pipeline


@dataclass(frozen=True)
class Settings:
    """What is encoded, and by which encoders."""

    source: str = setting("", "text or JSONL file, or dataset on the Hub", positional=True)
    out: Path = setting(Path("data/prompts"), "folder for the shards")
    family: str = setting("qwen", "whose text encoders", choices=dm.FAMILIES)
    base: str = setting(
        "", "folder or Hub name of the base pipeline, in place of the published one"
    )
    tiny: bool = setting(False, "small stand-ins in place of the real encoders")
    column: str = setting("prompt", "field of the prompts in a JSONL file or dataset")
    images: str = setting("", "field of the image files in a JSONL file; empty: no image latents")
    size: int = setting(1024, "side of the images in pixels, after cropping to a square", low=16)
    split: str = setting("train", "split of a dataset on the Hub")
    limit: int = setting(0, "number of prompts to use; 0: all", low=0)
    max_length: int = setting(512, "tokens per prompt, at most", low=1)
    batch: int = setting(16, "prompts per call of the text encoder", low=1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")


# ---- Sources -------------------------------------------------------------------------------------


def read_prompts(settings: Settings) -> list[tuple[str, str]]:
    """-> (prompt, image file or "") of every line. Raises: ValueError, OSError: one line."""
    path, rows = Path(settings.source), []
    try:
        lines = path.read_text("utf-8-sig").splitlines() if path.is_file() else []
    except UnicodeDecodeError as error:
        raise ValueError(f"source {path} is not UTF-8 text: {error}") from error
    if path.suffix == ".jsonl" and path.is_file():
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                image = str(path.parent / row[settings.images]) if settings.images else ""
                rows.append((row[settings.column], image))
            except (ValueError, KeyError, TypeError) as error:
                fields = " and ".join(filter(None, (settings.column, settings.images)))
                raise ValueError(f"{path}, line {number}: not an object with {fields}") from error
    elif path.is_file():
        rows = [(line, "") for line in lines]
    elif path.suffix in (".txt", ".jsonl") or not settings.source:
        raise FileNotFoundError(f"source {settings.source!r}: no such file")
    else:
        dm.require_package("datasets", "a dataset on the Hub")
        import datasets

        data = datasets.load_dataset(settings.source, split=settings.split)
        if settings.column not in data.column_names:
            raise ValueError(f"--column {settings.column!r}: {path} has {data.column_names}")
        rows = [(prompt, "") for prompt in data[settings.column]]
    if settings.images and path.suffix != ".jsonl":
        raise ValueError("--images: only a JSONL file names image files")
    kept = [(prompt.strip(), image) for prompt, image in rows if prompt and prompt.strip()]
    if not kept:
        raise ValueError(f"source {settings.source}: there is no prompt in it")
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} empty prompts are left out")
    return kept[: settings.limit or None]


# ---- Encoding ------------------------------------------------------------------------------------


def fingerprint(modules: Sequence[nn.Module]) -> str:
    """Identifies weights: a hash of every tensor's name, shape and first 16 values."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items():
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def encode(pipe: Any, family: dm.Family, prompts: Sequence[str], length: int) -> dict[str, list]:
    """-> embeds: (L, D) of each prompt; pooled: (P,) of each prompt, or nothing."""
    conditions = dm.encode_prompts(pipe, family, prompts, length)
    if not conditions.embeds.isfinite().all():
        raise ValueError(f"the text encoder gives values that are not finite, from {prompts[0]!r}")
    lengths = [conditions.embeds.shape[1]] * len(prompts)
    if conditions.mask is not None:
        lengths = conditions.mask.sum(1).tolist()
    embeds = [row[:n].cpu() for row, n in zip(conditions.embeds, lengths, strict=True)]
    pooled = [] if conditions.pooled is None else list(conditions.pooled.cpu())
    return {"embeds": embeds, "pooled": pooled}


@torch.no_grad()
def encode_image(pipe: Any, family: dm.Family, path: str, size: int) -> Tensor:
    """Image file -> latent (C, H, W) of its centre square, the inverse of `families.decode`."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size))
    except OSError as error:
        raise OSError(f"{path} is not a readable image: {error}") from error
    pixels = pipe.image_processor.preprocess(image, size, size)
    pixels = pixels.to(pipe._execution_device, pipe.vae.dtype)
    pixels = pixels[:, :, None] if family.name == "qwen" else pixels
    latent = pipe.vae.encode(pixels).latent_dist.mode().float()
    config = pipe.vae.config
    if family.name == "qwen":
        mean, std = (
            torch.tensor(v).view(-1, 1, 1) for v in (config.latents_mean, config.latents_std)
        )
        return (latent[0, :, 0].cpu() - mean) / std
    if family.name == "flux":
        return (latent[0].cpu() - config.shift_factor) * config.scaling_factor
    bn, patches = (
        pipe.vae.bn,
        F.pixel_unshuffle(latent, dm.PATCH),
    )  # FLUX.2: patches of 4 C channels
    mean, var = (value.to(patches).view(-1, 1, 1) for value in (bn.running_mean, bn.running_var))
    patches = (patches - mean) / (var + config.batch_norm_eps).sqrt()
    return F.pixel_shuffle(patches, dm.PATCH)[0].cpu()


def cache(settings: Settings, place: Place, pipe: Any = None) -> None:
    """Writes the shards that are missing; every process takes its share of them."""
    from safetensors.torch import save_file

    family, rows = dm.FAMILIES[settings.family], read_prompts(settings)
    rank, world, device = place
    if pipe is None:
        pipe = load_encoders(settings, family, with_vae=bool(settings.images))
    dm.place(pipe, device)
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    about = {
        "family": family.name, "base": "tiny" if settings.tiny else settings.base or family.repo,
        "max_length": settings.max_length, "images": settings.size if settings.images else 0,
        "source": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16],
        "encoder": fingerprint(modules),
    }  # fmt: skip
    negative = encode(pipe, family, [NEGATIVE_PROMPT], settings.max_length)["embeds"][0]
    row_bytes = settings.max_length * negative.shape[1] * negative.element_size()
    per_shard = max(1, int(SHARD_BYTES / row_bytes))
    count = -(-len(rows) // per_shard)
    about = {key: str(value) for key, value in (about | {"shards": count}).items()}
    if rank == 0:
        remove_leftovers(settings.out)
    for number in tqdm(range(rank, count, world), desc="shards", disable=rank > 0 or None):
        path = settings.out / f"shard_{number:05d}.safetensors"
        if path.is_file() and check_shard(path, about):
            continue
        part, values = rows[number * per_shard : (number + 1) * per_shard], {}
        for start in range(0, len(part), settings.batch):
            prompts = [prompt for prompt, _ in part[start : start + settings.batch]]
            for key, new in encode(pipe, family, prompts, settings.max_length).items():
                values.setdefault(key, []).extend(new)
        lengths = torch.tensor([len(row) for row in values["embeds"]])
        tensors = {"embeds": torch.cat(values["embeds"]), "lengths": lengths}
        if values["pooled"]:
            tensors["pooled"] = torch.stack(values["pooled"])
        if family.guidance is None:
            tensors["negative"] = negative
        if settings.images:
            latents = [encode_image(pipe, family, image, settings.size) for _, image in part]
            tensors["latents"] = torch.stack(latents)
        prompts = json.dumps([prompt for prompt, _ in part])
        with atomic(path) as temporary:
            save_file(tensors, temporary, about | {"prompts": prompts})
    if rank == 0:
        print(f"{len(rows)} prompts, {count} shards in {settings.out}")


def load_encoders(settings: Settings, family: dm.Family, with_vae: bool) -> Any:
    """The pipeline without its transformer."""
    if settings.tiny:
        from text_to_image.tiny_models import demo_pipeline

        return demo_pipeline(family)
    without = ["transformer"] if with_vae else ["transformer", "vae"]
    return dm.load_base(family, settings.base or None, without=without)


def check_shard(path: Path, about: dict[str, str]) -> bool:
    """Whether a shard is whole. Raises: ValueError if it was made from something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            before = file.metadata() or {}
    except (SafetensorError, OSError):
        return False
    for key, value in about.items():
        if before.get(key) != value:
            raise ValueError(
                f"{path} was made with {key} {before.get(key)}, this command has {value}; "
                "choose another --out"
            )
    return True


# ---- Reading -------------------------------------------------------------------------------------


class PromptCache:
    """A folder of shards; rows are read from the files when they are needed.

    Raises: ValueError if the folder is empty or incomplete, or a shard is damaged, of another
    encoder than the others, or not of this family, base and width.
    """

    def __init__(self, folder: str | Path, family: dm.Family, base: str, width: int):
        from safetensors import SafetensorError, safe_open

        paths = sorted(Path(folder).glob("shard_*.safetensors"))
        if not paths:
            raise ValueError(f"--prompts {folder}: no shards; see text_to_image.cache_prompts")
        self.files, self.places, self.lengths, self.prompts, first = [], [], [], [], None
        for path in paths:
            try:
                file = safe_open(path, "pt")
                lengths, about = file.get_tensor("lengths"), dict(file.metadata())
                self.prompts += json.loads(about.pop("prompts"))
            except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
                raise ValueError(f"{path} is damaged, delete it and run again: {error}") from error
            first = first or about
            wanted = first | {"family": family.name, "base": base}
            for key, value in wanted.items():
                if about.get(key) != value:
                    raise ValueError(f"{path} is of {key} {about.get(key)}, needed is {value}")
            ends = lengths.cumsum(0)
            stored = file.get_slice("embeds").get_shape()
            if stored[1] != width or stored[0] != ends[-1]:
                raise ValueError(
                    f"{path}: embeddings {stored} in place of {[int(ends[-1]), width]}"
                )
            self.files.append(file)
            starts = (ends - lengths).tolist()
            self.places += [(len(self.files) - 1, i, start) for i, start in enumerate(starts)]
            self.lengths += lengths.tolist()
        if len(paths) != int(first["shards"]):
            raise ValueError(f"--prompts {folder}: {len(paths)} of {first['shards']} shards")
        keys = set(self.files[0].keys())
        self.has_pooled, self.has_latents = "pooled" in keys, "latents" in keys
        self.negative = None
        if "negative" in keys:
            self.negative = dm.Conditions(self.files[0].get_tensor("negative")[None])

    def __len__(self) -> int:
        return len(self.lengths)

    def _read(self, key: str, rows: Sequence[int]) -> Iterator[Tensor]:
        for row in rows:
            file, i, start = self.places[row]
            begin, end = (start, start + self.lengths[row]) if key == "embeds" else (i, i + 1)
            yield self.files[file].get_slice(key)[begin:end]

    def conditions(self, rows: Sequence[int]) -> dm.Conditions:
        """The prompts of these rows, padded to the longest."""
        parts = dm.Conditions.stack([dm.Conditions(e[None]) for e in self._read("embeds", rows)])
        pooled = torch.cat(list(self._read("pooled", rows))) if self.has_pooled else None
        return parts._replace(pooled=pooled)

    def latents(self, rows: Sequence[int]) -> Tensor:
        """(B, C, H, W) of the images of these rows."""
        return torch.cat(list(self._read("latents", rows)))

    def micro_batches(self, batch: int, micro_batch: int, seed: int, iteration: int) -> list[list]:
        """The rows of one iteration, in micro-batches of prompts of similar lengths.

        Every epoch has an order of its own; the position follows from the iteration alone.
        """
        rows, orders = [], {}
        for place in range(iteration * batch, (iteration + 1) * batch):
            epoch, index = divmod(place, len(self))
            if epoch not in orders:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                orders[epoch] = torch.randperm(len(self), generator=generator)
            rows.append(int(orders[epoch][index]))
        rows.sort(key=lambda row: self.lengths[row])
        return [rows[i : i + micro_batch] for i in range(0, batch, micro_batch)]


def main(argv: list[str] | None = None) -> None:
    """The command; see the top of the file."""
    settings = parse(Settings, __doc__, argv)
    with processes(settings.device) as place:
        cache(settings, place)


if __name__ == "__main__":
    run_cli(main)
