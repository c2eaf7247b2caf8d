"""Prompts from files and from the Hub, and what a text encoder does not read of them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.files import reading
from text_to_image.families import Family, naming, require_package

KNOWN = ".txt (a prompt per line) and .jsonl (an object per line)"
MAX_TOKENS = 512  # that a text encoder reads of a prompt

Row = tuple[str, Path | None]  # a prompt, and the file of its image


def read_source(
    source: str | Path, column: str = "prompt", split: str = "train", images: str | None = None
) -> list[Row]:
    """The prompts of a file, or of a dataset on the Hub ("owner/name"), with their images.

    A line ends at a newline and nowhere else. Empty prompts are left out, and counted.

    Args: column, images: fields of a .jsonl file; column: also of a dataset.
    Raises: ValueError or OSError that names the file, and the line.
    """
    path = Path(source)
    if images and path.suffix.lower() != ".jsonl":
        raise ValueError(f"--images {images}: only a .jsonl file names images, not {source}")
    if path.suffix.lower() in (".txt", ".jsonl"):
        rows = _read_file(source, column, images)
    elif path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise ValueError(f"{source}: not a known kind of prompt file; known are {KNOWN}")
    else:
        require_package("datasets", "a dataset on the Hub")
        import datasets

        with naming(f"dataset {source}, column {column}"):
            texts = datasets.load_dataset(source, split=split)[column]
            rows = [((text or "").strip(), None) for text in texts]
    kept = [(text.strip(), image) for text, image in rows if text.strip()]
    if not kept:
        raise ValueError(f"{source}: there is no prompt in it")
    if len(kept) < len(rows):
        print(f"{source}: {len(rows) - len(kept)} empty prompts are left out")
    return kept


def _read_file(source: str | Path, column: str, images: str | None) -> list[Row]:
    path = Path(source)
    with naming(str(source)), reading(source) as local:
        lines = local.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
    if path.suffix.lower() == ".txt":
        return [(line, None) for line in lines]
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            with naming(f"{path}, line {number}"):
                row = json.loads(line)
                image = path.parent / row[images] if images else None
                rows.append((row[column].strip(), image))
    return rows


def cut_off(
    pipe: Any, family: Family, prompts: Sequence[str], max_tokens: int = MAX_TOKENS
) -> list[str]:
    """The end of each prompt that the text encoder does not read; "" if it reads all of it."""
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None:  # the small model of clothes has no limit
        return [""] * len(prompts)
    limit = max_tokens
    if family.name == "qwen":  # its template is dropped after encoding
        limit += pipe.prompt_template_encode_start_idx
        template = pipe.prompt_template_encode.partition("{}")[0]
        tokens = tokenizer([template + text for text in prompts], verbose=False)
    elif family.name == "flux":
        tokenizer = pipe.tokenizer_2
        limit -= tokenizer.num_special_tokens_to_add()
        tokens = tokenizer(list(prompts), add_special_tokens=False, verbose=False)
    else:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        messages = format_input(list(prompts), system_message=pipe.system_message)
        tokens = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    ends = [row[limit:] for row in tokens["input_ids"]]
    return [tokenizer.decode(end, skip_special_tokens=True).strip() for end in ends]
