"""Encodes prompts once, so that distillation never loads a text encoder.

    python -m text_to_image.cache_prompts prompts.txt --family qwen --out data/qwen
    python -m text_to_image.cache_prompts prompts.jsonl --column caption --images file
    torchrun --nproc-per-node 8 -m text_to_image.cache_prompts OWNER/DATASET --out s3://bucket/qwen

If a JSONL file has a field of image files (--images), their latents are cached too, for Algorithm
2. Several processes share the shards; the same command continues.

A shard is a safetensors file of at most about 1 GB: the embeddings of its prompts one after the
other without padding, their lengths, for FLUX.1 the pooled vectors, for Qwen-Image the
unconditional prompt, and in its metadata the prompts and what encoded them. `PromptCache` reads
single rows of it, from a local or a remote folder.
"""

if not __package__:
    raise SystemExit("start it in the repository's root: python -m text_to_image.cache_prompts")

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.cli import DEVICE_HELP, keep_freed_memory, parse, run_cli, setting
from common.files import join, list_files, remove_leftovers, writing
from common.fingerprint import fingerprint
from common.images import read_image, square
from common.processes import Place, from_first, processes
from text_to_image.families import FAMILIES, STEP, Conditions, Family, naming
from text_to_image.loading import load_base, place
from text_to_image.prompts import MAX_TOKENS, Row, cut_off, read_source
from text_to_image.tiny import demo_pipeline

SHARD_BYTES = 1e9
FLOAT8_MAX = 448.0  # of float8_e4m3fn
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "F8_E4M3": torch.float8_e4m3fn}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What is encoded, and by which encoders."""

    source: str = setting(dataclasses.MISSING, "file of prompts, or dataset on the Hub",
                          positional=True, path=True)  # fmt: skip
    out: str = setting("data/prompts", "folder for the shards, local or s3://...", path=True)
    family: str = setting("qwen", "whose text encoders", choices=FAMILIES)
    base: str | None = setting(None, "folder or Hub name of another base pipeline", path=True)
    tiny: bool = setting(False, "small stand-ins in place of the real encoders")
    column: str = setting("prompt", "field of the prompts in a JSONL file or dataset")
    images: str | None = setting(None, "field of image files in a JSONL file; default: no latents")
    size: int = setting(1024, "side of the images in pixels, after cropping to a square", low=16)
    split: str = setting("train", "split of a dataset on the Hub")
    limit: int | None = setting(None, "number of prompts to use; default: all", low=1)
    max_length: int = setting(MAX_TOKENS, "tokens per prompt, at most", low=1)
    float8: bool = setting(False, "embeddings as float8 with a scale per token: half the size")
    batch: int = setting(16, "prompts per call of the text encoder", low=1)
    device: str = setting("auto", DEVICE_HELP)

    def __post_init__(self):
        if self.size % STEP:
            raise ValueError(f"--size {self.size}: must be a multiple of {STEP}")


def read_prompts(settings: Settings) -> list[Row]:
    """The prompts of the source, with their images. Raises: ValueError, OSError: one line."""
    s = settings
    return read_source(s.source, s.column, s.split, s.images)[: s.limit]


# ---- Writing -------------------------------------------------------------------------------------


def to_float8(embeds: Tensor) -> tuple[Tensor, Tensor]:
    """(L, D) -> float8 (L, D), and a scale per token (L, 1) that multiplies it."""
    scale = embeds.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / FLOAT8_MAX
    return (embeds.float() / scale).to(torch.float8_e4m3fn), scale


def encode(pipe: Any, family: Family, prompts: Sequence[str], s: Settings) -> dict[str, Tensor]:
    """-> lengths (n,), embeddings without padding (sum of lengths, D), FLUX.1's pooled (n, P)."""
    parts = {"lengths": [], "embeds": [], "pooled": []}
    for start in range(0, len(prompts), s.batch):
        batch = prompts[start : start + s.batch]
        embeds, mask, pooled, *_ = family.encode_prompts(pipe, batch, s.max_length)
        if not embeds.isfinite().all():
            raise ValueError(f"the text encoder's values are not finite, from {batch[0]!r}")
        mask = torch.ones_like(embeds[..., 0]) if mask is None else mask
        parts["lengths"].append(mask.long().sum(1).cpu())
        parts["embeds"].append(embeds[mask.bool()].cpu())
        parts["pooled"] += [] if pooled is None else [pooled.cpu()]
    return {key: torch.cat(values) for key, values in parts.items() if values}


def cache(settings: Settings, here: Place, pipe: Any = None) -> None:
    """Writes the shards that are missing; every process takes its share of them."""
    from safetensors.torch import save_file

    s, family = settings, FAMILIES[settings.family]
    if here.rank == 0:
        remove_leftovers(s.out)
    if here.world > 1:  # before another process writes there
        from_first(None)
    rows = read_prompts(s)
    missing = [str(image) for _, image in rows if image and not image.is_file()]
    if missing:
        raise ValueError(f"{s.source} names {len(missing)} images that are not there: {missing[0]}")
    if pipe is None and s.tiny:
        pipe = demo_pipeline(family)
    elif pipe is None:
        without = ["transformer"] if s.images else ["transformer", "vae"]
        pipe = load_base(family, s.base, without=without)
    place(pipe, here.device)
    negative = encode(pipe, family, [family.negative_prompt or ""], s)["embeds"]
    value_bytes = 1 if s.float8 else negative.element_size()
    per_shard = max(1, int(SHARD_BYTES / (s.max_length * negative.shape[1] * value_bytes)))
    count = math.ceil(len(rows) / per_shard)
    encoders = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    content = json.dumps(rows, default=str).encode()
    about = {
        "family": family.name, "base": "tiny" if s.tiny else Path(s.base or family.repo).name,
        "negative": repr(family.negative_prompt), "encoder": fingerprint(*encoders),
        "max_length": s.max_length, "images": s.size if s.images else None, "float8": s.float8,
        "source": hashlib.sha256(content).hexdigest()[:16], "shards": count,
    }  # fmt: skip
    about = {key: str(value) for key, value in about.items()}
    cut = 0
    numbers = range(here.rank, count, here.world)
    for number in tqdm(numbers, desc="shards", disable=here.rank > 0 or None):
        path = join(s.out, f"shard_{number:05d}.safetensors")
        if is_written(path, about):
            continue
        part = rows[number * per_shard : (number + 1) * per_shard]
        prompts = [prompt for prompt, _ in part]
        cut += sum(map(bool, cut_off(pipe, family, prompts, s.max_length)))
        tensors = encode(pipe, family, prompts, s)
        if s.float8:
            tensors["embeds"], tensors["scales"] = to_float8(tensors["embeds"])
        if s.images:
            squares = [square(read_image(image), s.size).permute(2, 0, 1) for _, image in part]
            latents = [family.encode(pipe, image[None] / 127.5 - 1) for image in squares]
            tensors["latents"] = torch.cat(latents).cpu()
        if family.negative_prompt is not None:
            tensors["negative"] = negative
        with writing(path) as temporary:
            save_file(tensors, temporary, about | {"prompts": json.dumps(prompts)})
    if cut:
        print(f"{cut} prompts of this process have more than {s.max_length} tokens and were cut")
    if here.rank == 0:
        print(f"{len(rows)} prompts, {count} shards in {s.out}")


def is_written(path: str, about: dict[str, str]) -> bool:
    """Whether a shard is there and whole. Raises: ValueError if it was made from something else."""
    try:
        shard = Shard(path)
    except (ValueError, OSError):
        return False
    shard.expect(about)
    return True


# ---- Reading -------------------------------------------------------------------------------------


class Shard:
    """A local or remote safetensors file of which single rows are read.

    Raises: ValueError or OSError that names the file, if it is damaged or not there.
    """

    def __init__(self, path: str):
        import fsspec

        self.path = path
        with naming(f"{path} cannot be read; if it is damaged, delete it and run again"):
            self.filesystem, self.name = fsspec.core.url_to_fs(path)
            size = self.filesystem.size(self.name)
            self.start = 8 + int.from_bytes(self.read(0, 8), "little")
            if self.start > size:  # a damaged length would be allocated
                raise ValueError("its header is missing")
            self.tensors = json.loads(self.read(8, self.start))
            self.about = self.tensors.pop("__metadata__")
            self.about.pop("prompts")
            end = self.start + max(value["data_offsets"][1] for value in self.tensors.values())
            if end > size:
                raise ValueError("its end is missing")
            self.lengths = self.rows("lengths")
        self.starts = self.lengths.cumsum(0) - self.lengths

    def read(self, start: int, end: int) -> bytes:
        """Bytes start to end of the file."""
        return self.filesystem.cat_file(self.name, start=start, end=end)

    def expect(self, about: dict[str, str]) -> None:
        """Raises: ValueError that names the first thing that the shard states otherwise."""
        for key, value in about.items():
            if self.about.get(key) != value:
                raise ValueError(f"{self.path} has {key} {self.about.get(key)}, needed is {value}")

    def rows(self, key: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows begin to end of a tensor."""
        about = self.tensors[key]
        count, *shape = about["shape"]
        end = count if end is None else end
        dtype = DTYPES[about["dtype"]]
        row_bytes = math.prod(shape) * dtype.itemsize
        start = self.start + about["data_offsets"][0]
        data = self.read(start + begin * row_bytes, start + end * row_bytes)
        return torch.frombuffer(bytearray(data), dtype=dtype).view(-1, *shape)

    def conditions(self, i: int) -> Conditions:
        """Its prompt i."""
        span = int(self.starts[i]), int(self.starts[i] + self.lengths[i])
        embeds = self.rows("embeds", *span)
        if "scales" in self.tensors:
            embeds = embeds.float() * self.rows("scales", *span)
        pooled = self.rows("pooled", i, i + 1) if "pooled" in self.tensors else None
        return Conditions(embeds[None], pooled=pooled)


class PromptCache:
    """A folder of shards, local or remote; rows are read from the files when they are needed.

    Raises: ValueError if the folder is empty or incomplete, or a shard is damaged, of another
    encoder than the others, or not of this family, base and unconditional prompt.
    """

    def __init__(self, folder: str | Path, family: Family, base: str):
        needed = {"family": family.name, "negative": repr(family.negative_prompt)}
        needed["base"] = Path(base).name  # of a Hub name or folder
        paths = [join(folder, name) for name in list_files(folder, "shard_")]
        with ThreadPoolExecutor(32) as pool:  # thousands on s3://
            shards = list(pool.map(Shard, paths))
        for shard in shards:
            shard.expect(needed)
            shard.expect(shards[0].about)
        count = shards[0].about["shards"] if shards else "?"
        if str(len(shards)) != count:
            given = f"--prompts {folder}: {len(shards)} of {count} shards"
            raise ValueError(f"{given}; run text_to_image.cache_prompts")
        self.shards = shards
        self.lengths = torch.cat([shard.lengths for shard in shards])
        self.firsts = [0, *itertools.accumulate(len(shard.lengths) for shard in shards)]
        self.held_out = 128 if len(self) > 1280 else 0  # the last ones, for pictures; as published
        self.has_latents = "latents" in shards[0].tensors
        self.negative = None
        if family.negative_prompt is not None:
            self.negative = Conditions(shards[0].rows("negative")[None])

    def __len__(self) -> int:
        return len(self.lengths)

    def _place(self, row: int) -> tuple[Shard, int]:
        """The shard of a row, and its place in it."""
        number = bisect.bisect(self.firsts, row) - 1
        return self.shards[number], row - self.firsts[number]

    def conditions(self, rows: Sequence[int]) -> Conditions:
        """The prompts of these rows, padded to the longest."""
        return Conditions.stack([shard.conditions(i) for shard, i in map(self._place, rows)])

    def latents(self, rows: Sequence[int]) -> Tensor:
        """(B, C, H, W) of the images of these rows."""
        return torch.cat([shard.rows("latents", i, i + 1) for shard, i in map(self._place, rows)])

    def rows_of(self, iteration: int, batch: int, seed: int) -> list[int]:
        """The rows of one iteration, sorted by length.

        Every epoch has an order of its own; the position follows from the iteration alone.
        """
        rows = []
        count = len(self) - self.held_out
        for i in range(iteration * batch, (iteration + 1) * batch):
            epoch, index = divmod(i, count)
            rows.append(int(epoch_order(count, (seed * 1_000_003 + epoch) % 2**63)[index]))
        return sorted(rows, key=lambda row: int(self.lengths[row]))


@functools.lru_cache(1)
def epoch_order(count: int, seed: int) -> Tensor:
    """A permutation (count,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def main(argv: list[str] | None = None) -> None:
    """The command; see the top of the file."""
    keep_freed_memory()
    settings = parse(Settings, __doc__, argv)
    with processes(settings.device) as here:
        cache(settings, here)


if __name__ == "__main__":
    run_cli(main)
