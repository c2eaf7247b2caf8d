"""Encodes prompts once, so that distillation never loads a text encoder.

    python -m text_to_image.cache_prompts prompts.txt --family qwen --out data/qwen
    python -m text_to_image.cache_prompts prompts.jsonl --column caption --images file
    torchrun --nproc-per-node 8 -m text_to_image.cache_prompts OWNER/DATASET --out s3://bucket/qwen

The source is a text file (a prompt per line), a JSONL file, or a dataset on the Hub. If a JSONL
file has a field of image files (--images), their latents are cached too, for Algorithm 2. Several
processes share the shards; the same command continues.

A shard is a safetensors file of at most about 1 GB. It holds the embeddings of its prompts one
after the other without padding, their lengths, for FLUX.1 the pooled vectors, for Qwen-Image the
unconditional prompt, and in its metadata the prompts and what encoded them. `PromptCache` reads
single rows of it, from a local or a remote folder.
"""

if not __package__:
    raise SystemExit("start it in the repository's root: python -m text_to_image.cache_prompts")

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.cli import DEVICE_HELP, keep_freed_memory, parse, run_cli, setting
from common.files import is_remote, join, list_files, remove_leftovers, writing
from common.images import read_image, square
from common.train import Place, processes
from text_to_image.families import FAMILIES, Conditions, Family
from text_to_image.loading import load_base, place
from text_to_image.prompts import KNOWN, MAX_TOKENS, Row, cut_off, read_source
from text_to_image.tiny import demo_pipeline

SHARD_BYTES = 1e9
LONGEST_HEADER = 100_000_000  # bytes, the limit of safetensors
FLOAT8_MAX = 448.0  # of float8_e4m3fn
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "F8_E4M3": torch.float8_e4m3fn}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What is encoded, and by which encoders."""

    source: str | None = setting(
        None, "text or JSONL file, or dataset on the Hub", positional=True, path=True
    )
    out: str = setting("data/prompts", "folder for the shards, local or s3://...", path=True)
    family: str = setting("qwen", "whose text encoders", choices=FAMILIES)
    base: str | None = setting(
        None, "folder or Hub name of the base pipeline; the published one", path=True
    )
    tiny: bool = setting(False, "small stand-ins in place of the real encoders")
    column: str = setting("prompt", "field of the prompts in a JSONL file or dataset")
    images: str | None = setting(None, "field of the image files in a JSONL file; no latents")
    size: int = setting(1024, "side of the images in pixels, after cropping to a square", low=16)
    split: str = setting("train", "split of a dataset on the Hub")
    limit: int | None = setting(None, "number of prompts to use; all of them", low=1)
    max_length: int = setting(MAX_TOKENS, "tokens per prompt, at most", low=1)
    float8: bool = setting(False, "embeddings as float8 with a scale per token: half the size")
    batch: int = setting(16, "prompts per call of the text encoder", low=1)
    device: str = setting("auto", DEVICE_HELP)


def read_prompts(settings: Settings) -> list[Row]:
    """The prompts of the source, with their images. Raises: ValueError, OSError: one line."""
    if settings.source is None:
        raise ValueError(f"source is missing: {KNOWN}, or a dataset on the Hub")
    rows = read_source(settings.source, settings.column, settings.split, settings.images)
    return rows[: settings.limit]


# ---- Writing -------------------------------------------------------------------------------------


def fingerprint(modules: Sequence[nn.Module]) -> str:
    """Identifies weights: a hash of every tensor's name, shape and first 16 values."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items():
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def to_float8(embeds: Tensor) -> tuple[Tensor, Tensor]:
    """(L, D) -> float8 (L, D), and a scale per token (L, 1) that multiplies it."""
    scale = embeds.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / FLOAT8_MAX
    return (embeds.float() / scale).to(torch.float8_e4m3fn), scale


def encode(
    pipe: Any, family: Family, prompts: Sequence[str], length: int
) -> tuple[list[Tensor], list[Tensor]]:
    """-> embeddings (L, D) of each prompt, and pooled vectors (P,) of each prompt, or none."""
    conditions = family.encode_prompts(pipe, prompts, length)
    if not conditions.embeds.isfinite().all():
        raise ValueError(f"the text encoder gives values that are not finite, from {prompts[0]!r}")
    embeds = list(conditions.embeds.cpu())
    if conditions.mask is not None:
        lengths = conditions.mask.sum(1).tolist()
        embeds = [row[:n].clone() for row, n in zip(embeds, lengths, strict=True)]
    return embeds, [] if conditions.pooled is None else list(conditions.pooled.cpu())


def cache(settings: Settings, here: Place, pipe: Any = None) -> None:
    """Writes the shards that are missing; every process takes its share of them."""
    from safetensors.torch import save_file

    s, family = settings, FAMILIES[settings.family]
    rows = read_prompts(s)
    if pipe is None and s.tiny:
        pipe = demo_pipeline(family)
    elif pipe is None:
        without = ["transformer"] if s.images else ["transformer", "vae"]
        pipe = load_base(family, s.base, without=without)
    place(pipe, here.device)
    negative = encode(pipe, family, [family.negative_prompt or ""], s.max_length)[0][0]
    value_bytes = 1 if s.float8 else negative.element_size()
    per_shard = max(1, int(SHARD_BYTES / (s.max_length * negative.shape[1] * value_bytes)))
    count = math.ceil(len(rows) / per_shard)
    encoders = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    content = json.dumps(rows, default=str).encode()
    about = {
        "family": family.name, "base": "tiny" if s.tiny else s.base or family.repo,
        "negative": repr(family.negative_prompt), "encoder": fingerprint(encoders),
        "max_length": s.max_length, "images": s.size if s.images else None, "float8": s.float8,
        "source": hashlib.sha256(content).hexdigest()[:16], "shards": count,
    }  # fmt: skip
    about = {key: str(value) for key, value in about.items()}
    if here.rank == 0:
        remove_leftovers(s.out)
    cut, errors = 0, []
    numbers = range(here.rank, count, here.world)
    for number in tqdm(numbers, desc="shards", disable=here.rank > 0 or None):
        path = join(s.out, f"shard_{number:05d}.safetensors")
        if check_shard(path, about):
            continue
        part = rows[number * per_shard : (number + 1) * per_shard]
        prompts = [prompt for prompt, _ in part]
        embeds, pooled = [], []
        for start in range(0, len(part), s.batch):
            batch = prompts[start : start + s.batch]
            cut += sum(map(bool, cut_off(pipe, family, batch, s.max_length)))
            new = encode(pipe, family, batch, s.max_length)
            embeds += new[0]
            pooled += new[1]
        tensors = {"lengths": torch.tensor([len(row) for row in embeds])}
        tensors["embeds"] = exact = torch.cat(embeds)
        if s.float8:
            tensors["embeds"], tensors["scales"] = to_float8(exact)
            difference = tensors["embeds"].float() * tensors["scales"] - exact.float()
            errors.append((difference.norm() / exact.float().norm()).item())
        if pooled:
            tensors["pooled"] = torch.stack(pooled)
        if family.negative_prompt is not None:
            tensors["negative"] = negative
        if s.images:
            squares = [square(read_image(image), s.size).permute(2, 0, 1) for _, image in part]
            latents = [family.encode(pipe, image[None] / 127.5 - 1) for image in squares]
            tensors["latents"] = torch.cat(latents).cpu()
        with writing(path) as temporary:
            save_file(tensors, temporary, about | {"prompts": json.dumps(prompts)})
    if cut:
        print(f"{cut} prompts of this process have more than {s.max_length} tokens and were cut")
    if errors:
        print(f"float8: relative RMS error of the embeddings {max(errors):.3f} or less")
    if here.rank == 0:
        print(f"{len(rows)} prompts, {count} shards in {s.out}")


def check_shard(path: str, about: dict[str, str]) -> bool:
    """Whether a shard is there and whole. Raises: ValueError if it was made from something else."""
    try:
        before = Shard(path).about
    except (ValueError, OSError):
        return False
    for key, value in about.items():
        if before.get(key) != value:
            given = f"{path} was made with {key} {before.get(key)}, this command has {value}"
            raise ValueError(f"{given}; choose another --out")
    return True


# ---- Reading -------------------------------------------------------------------------------------


def read_bytes(path: str, start: int, stop: int) -> bytes:
    """Bytes start to stop of a local or remote file."""
    if is_remote(path):
        import fsspec

        filesystem, name = fsspec.core.url_to_fs(path)
        return filesystem.cat_file(name, start=start, end=stop)
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(stop - start)


class Shard:
    """A safetensors file of which single rows are read. Raises: ValueError if it is damaged."""

    def __init__(self, path: str):
        self.path = path
        try:
            self.start = 8 + int.from_bytes(read_bytes(path, 0, 8), "little")
            if self.start > LONGEST_HEADER:
                raise ValueError("it does not begin with a header")
            self.tensors = json.loads(read_bytes(path, 8, self.start))
            self.about = self.tensors.pop("__metadata__")
            self.prompts = json.loads(self.about.pop("prompts"))
            end = self.start + max(value["data_offsets"][1] for value in self.tensors.values())
            if not read_bytes(path, end - 1, end):
                raise ValueError("its end is missing")
            self.lengths = self.rows("lengths")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged, delete it and run again: {error}") from error

    def rows(self, key: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows begin to end of a tensor."""
        about = self.tensors[key]
        count, *shape = about["shape"]
        end = count if end is None else end
        dtype = _TYPES[about["dtype"]]
        row_bytes = math.prod(shape) * dtype.itemsize
        start = self.start + about["data_offsets"][0]
        data = read_bytes(self.path, start + begin * row_bytes, start + end * row_bytes)
        return torch.frombuffer(bytearray(data), dtype=dtype).view(-1, *shape)


class PromptCache:
    """A folder of shards, local or remote; rows are read from the files when they are needed.

    Raises: ValueError if the folder is empty or incomplete, or a shard is damaged, of another
    encoder than the others, or not of this family, base, width and unconditional prompt.
    """

    def __init__(self, folder: str | Path, family: Family, base: str, width: int):
        names = list_files(folder, "shard_")
        if not names:
            raise ValueError(f"--prompts {folder}: no shards; see text_to_image.cache_prompts")
        shards = [Shard(join(folder, name)) for name in names]
        needed = {"family": family.name, "base": base, "width": width}
        needed |= {"negative": repr(family.negative_prompt)}
        wanted = needed | shards[0].about | needed  # what is needed is compared first
        for shard in shards:
            given = shard.about | {"width": shard.tensors["embeds"]["shape"][1]}
            for key, value in wanted.items():
                if given.get(key) != value:
                    found = f"{shard.path} is of {key} {given.get(key)}"
                    raise ValueError(f"{found}, needed is {value}")
        if len(names) != int(wanted["shards"]):
            raise ValueError(f"--prompts {folder}: {len(names)} of {wanted['shards']} shards")
        self.shards = shards
        self.prompts = [prompt for shard in shards for prompt in shard.prompts]
        self.lengths = torch.cat([shard.lengths for shard in shards])
        self.starts = torch.cat([shard.lengths.cumsum(0) - shard.lengths for shard in shards])
        self.firsts = torch.tensor([0, *(len(shard.prompts) for shard in shards)]).cumsum(0)
        self.has_latents = "latents" in shards[0].tensors
        self.negative = None
        if family.negative_prompt is not None:
            self.negative = Conditions(shards[0].rows("negative")[None])
        self._epoch, self._order = None, None

    def __len__(self) -> int:
        return len(self.lengths)

    def _shard(self, row: int) -> tuple[Shard, int]:
        """The shard of a row, and its place in it."""
        number = int(torch.searchsorted(self.firsts, row, right=True)) - 1
        return self.shards[number], row - int(self.firsts[number])

    def _embeds(self, row: int) -> Tensor:
        shard, _ = self._shard(row)
        start = int(self.starts[row])
        span = start, start + int(self.lengths[row])
        embeds = shard.rows("embeds", *span)
        return embeds.float() * shard.rows("scales", *span) if "scales" in shard.tensors else embeds

    def _stack(self, key: str, rows: Sequence[int]) -> Tensor:
        places = [self._shard(row) for row in rows]
        return torch.cat([shard.rows(key, i, i + 1) for shard, i in places])

    def conditions(self, rows: Sequence[int]) -> Conditions:
        """The prompts of these rows, padded to the longest."""
        conditions = Conditions.stack([Conditions(self._embeds(row)[None]) for row in rows])
        if "pooled" in self.shards[0].tensors:
            conditions = conditions._replace(pooled=self._stack("pooled", rows))
        return conditions

    def latents(self, rows: Sequence[int]) -> Tensor:
        """(B, C, H, W) of the images of these rows."""
        return self._stack("latents", rows)

    def rows_of(self, iteration: int, batch: int, seed: int) -> list[int]:
        """The rows of one iteration, sorted by length.

        Every epoch has an order of its own; the position follows from the iteration alone.
        """
        rows = []
        for i in range(iteration * batch, (iteration + 1) * batch):
            epoch, index = divmod(i, len(self))
            if self._epoch != (seed, epoch):
                generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                self._order = torch.randperm(len(self), generator=generator)
                self._epoch = (seed, epoch)
            rows.append(int(self._order[index]))
        return sorted(rows, key=lambda row: int(self.lengths[row]))


def main(argv: list[str] | None = None) -> None:
    """The command; see the top of the file."""
    keep_freed_memory()
    settings = parse(Settings, __doc__, argv)
    with processes(settings.device) as here:
        cache(settings, here)


if __name__ == "__main__":
    run_cli(main)
