"""Prompts from files and from the Hub, and what a text encoder does not read of them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from text_to_image.families import Family, naming, require_package

KNOWN = ".txt (a prompt per line) and .jsonl (an object per line)"
MAX_TOKENS = 512  # that a text encoder reads of a prompt

Row = tuple[str, Path | None]  # a prompt, and the file of its image


def read_source(
    source: str, column: str = "prompt", split: str = "train", images: str | None = None
) -> list[Row]:
    """The prompts of a file, or of a dataset on the Hub ("owner/name"), with their images.

    column, images: fields of a .jsonl file or a dataset. Raises: ValueError or OSError, one line.
    """
    is_file = Path(source).exists() or source.lower().endswith((".txt", ".jsonl"))
    if is_file or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return read_prompt_file(source, column, images)
    require_package("datasets", "a dataset on the Hub")
    import datasets

    with naming(f"dataset {source}"):
        texts = datasets.load_dataset(source, split=split)[column]
    return _without_empty([((text or "").strip(), None) for text in texts], source)


def read_prompt_file(
    path: str | Path, column: str = "prompt", images: str | None = None
) -> list[Row]:
    """The prompts of a .txt or .jsonl file; a line ends at a newline and nowhere else.

    Empty prompts are left out. Raises: ValueError or OSError that names the file, and the line.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".txt", ".jsonl") and not path.is_dir():
        raise ValueError(f"{path}: not a known kind of prompt file; known are {KNOWN}")
    if images and kind != ".jsonl":
        raise ValueError(f"--images {images}: only a .jsonl file names image files")
    with naming(f"{path}"):
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    if kind == ".txt":
        return _without_empty([(line.strip(), None) for line in lines], path)
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with naming(f"{path}, line {number}"):
            row = json.loads(line)
            fields = [field for field in (column, images) if field]
            values = [row.get(field) for field in fields] if isinstance(row, dict) else [None]
            if not all(isinstance(value, str) for value in values):
                needed = f"an object with a text in {' and '.join(fields)}"
                raise ValueError(f"{line.strip()[:60]} must be {needed}")
        rows.append((values[0].strip(), path.parent / values[1] if images else None))
    return _without_empty(rows, path)


def _without_empty(rows: list[Row], source: str | Path) -> list[Row]:
    kept = [row for row in rows if row[0]]
    if not kept:
        raise ValueError(f"{source}: there is no prompt in it")
    empty = len(rows) - len(kept) - (not rows[-1][0])  # the last newline ends a line
    if empty:
        print(f"{source}: {empty} empty prompts are left out")
    return kept


def cut_off(
    pipe: Any, family: Family, prompts: Sequence[str], max_tokens: int = MAX_TOKENS
) -> list[str]:
    """The end of each prompt that the text encoder does not read; "" if it reads all of it."""
    prompts = list(prompts)
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
        tokens = tokenizer(prompts, add_special_tokens=False, verbose=False)
    else:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        messages = format_input(prompts, system_message=pipe.system_message)
        tokens = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    ends = [row[limit:] for row in tokens["input_ids"]]
    return [tokenizer.decode(end, skip_special_tokens=True).strip() for end in ends]
