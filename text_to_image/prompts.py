"""Prompts from files and from the Hub, and what a text encoder does not read of them."""

import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from text_to_image.families import Family, naming, require_package

KINDS = (".txt", ".jsonl")
KNOWN = ".txt (a prompt per line) and .jsonl (an object per line)"
MAX_TOKENS = 512  # that a text encoder reads of a prompt

Row = tuple[str, Path | None]  # a prompt, and the file of its image


def read_source(
    source: str, column: str = "prompt", split: str = "train", images: str | None = None
) -> list[Row]:
    """The prompts of a file, or of a dataset on the Hub ("owner/name"), with their images.

    column, images: fields of a .jsonl file or a dataset. Raises: ValueError or OSError, one line.
    """
    path = Path(source)
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and path.suffix.lower() not in KINDS
    if not is_hub_name or path.exists():
        return read_prompt_file(path, column, images)
    if images:
        raise ValueError(f"--images {images}: only a .jsonl file names image files")
    return read_hub(source, column, split)


def read_prompt_file(
    path: str | Path, column: str = "prompt", images: str | None = None
) -> list[Row]:
    """The prompts of a .txt or .jsonl file; a line ends at a newline and nowhere else.

    Empty prompts are left out. Raises: ValueError or OSError that names the file, and the line.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in KINDS and not path.is_dir():
        raise ValueError(f"{path}: not a known kind of prompt file; known are {KNOWN}")
    if images and kind != ".jsonl":
        raise ValueError(f"--images {images}: only a .jsonl file names image files")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if kind == ".txt":
        return _without_empty([(line.strip(), None) for line in lines], path)
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        image = path.parent / _text(row, images, where) if images else None
        rows.append((_text(row, column, where).strip(), image))
    return _without_empty(rows, path)


def _text(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict) or field not in row:
        raise ValueError(f"{where}: not an object with the field {field}")
    if not isinstance(row[field], str):
        raise ValueError(f"{where}: {field} is {row[field]!r:.60}; it must be a text")
    return row[field]


def read_hub(name: str, column: str = "prompt", split: str = "train", **options: Any) -> list[Row]:
    """The prompts of a dataset on the Hub; options: of `datasets.load_dataset`."""
    require_package("datasets", "a dataset on the Hub")
    import datasets

    with naming(f"dataset {name}"):
        data = datasets.load_dataset(name, split=split, **options)
    if column not in data.column_names:
        raise ValueError(f"--column {column!r}: {name} has {', '.join(data.column_names)}")
    return _without_empty([((text or "").strip(), None) for text in data[column]], name)


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
        tokens = tokenizer([template + text for text in prompts], verbose=False).input_ids
    elif family.name == "flux":
        tokenizer = pipe.tokenizer_2
        limit -= tokenizer.num_special_tokens_to_add()
        tokens = tokenizer(prompts, add_special_tokens=False, verbose=False).input_ids
    else:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        messages = format_input(prompts, system_message=pipe.system_message)
        tokens = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
        tokens = tokens["input_ids"]
    return [tokenizer.decode(row[limit:], skip_special_tokens=True).strip() for row in tokens]


def cut_message(number: int, end: str, max_tokens: int = MAX_TOKENS) -> str:
    """One line about a prompt, counted from 1, of which `end` was cut off."""
    end = textwrap.shorten(end, 80, placeholder=" ...")
    return f"prompt {number}: the text encoder reads {max_tokens} tokens; cut off is {end!r}"
