"""Whole-file writes and reads, local or remote, and JSON.

A path may be local or, through fsspec, remote (s3://bucket/run). Whoever reads a file that is
written here sees the old one or the whole new one, also after a power cut.
"""

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path


def is_remote(path: str | Path) -> bool:
    """Whether a path goes through fsspec, as s3://bucket/run does."""
    return "://" in str(path)


def join(folder: str | Path, *names: str) -> str:
    """A path below a local or remote folder."""
    return "/".join([(str(folder) or ".").rstrip("/"), *names])


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary local path. What the block writes there then appears at `path`, whole.

    Local: on the disk before it gets its name. Remote: uploaded as one object.
    Raises: OSError that names the path if it cannot be written; then the old file stays.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / str(path).rsplit("/", 1)[-1]
            yield temporary
            with _filesystem(path) as (filesystem, root):
                filesystem.makedirs(root.rsplit("/", 1)[0], exist_ok=True)
                filesystem.put_file(str(temporary), root)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{uuid.uuid4().hex}{path.suffix}"
    try:
        yield temporary
        # fsync of Windows demands a writable handle, and some mounts refuse it.
        with contextlib.suppress(OSError), open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:  # on a full disk torch.save and safetensors have their own kinds
        if type(error).__name__ in ("RuntimeError", "SafetensorError"):
            raise OSError(f"{path} cannot be written: {error}") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[Path]:
    """Yields a local path with the content of `path`; a remote file is fetched for the block.

    Raises: FileNotFoundError if there is no such file.
    """
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / str(path).rsplit("/", 1)[-1]
        with _filesystem(path) as (filesystem, root):
            filesystem.get_file(root, str(copy))
        yield copy


@contextlib.contextmanager
def _filesystem(path: str | Path) -> Iterator[tuple]:
    """Yields (fsspec's file system, path in it). Raises: OSError for what goes wrong in there."""
    import fsspec  # PyTorch depends on it

    if not is_remote(path):
        yield fsspec.filesystem("file"), os.path.abspath(path)
        return
    try:
        yield fsspec.core.url_to_fs(str(path))
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # no credentials, no connection: each storage has its own kinds
        raise OSError(f"{path}: {error}") from error


def list_files(folder: str | Path, prefix: str = "") -> list[str]:
    """Sorted names of the files in a folder that begin with `prefix`; [] if there is none."""
    with _filesystem(folder) as (filesystem, root):
        filesystem.invalidate_cache()
        paths = filesystem.ls(root, detail=False) if filesystem.isdir(root) else []
    names = [path.rstrip("/").rsplit("/", 1)[-1] for path in paths]
    return sorted(name for name in names if name.startswith(prefix))


def remove(path: str | Path) -> None:
    """Deletes a file; it may be gone already."""
    with contextlib.suppress(FileNotFoundError), _filesystem(path) as (filesystem, root):
        filesystem.rm_file(root)


def remove_leftovers(folder: str | Path) -> None:
    """Deletes the temporary files of a process that was killed while it wrote into `folder`."""
    for name in list_files(folder, ".tmp-"):
        remove(join(folder, name))


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file, as a whole, in UTF-8."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: str | Path) -> str | None:
    """The text of a UTF-8 file, or None if there is no such file."""
    try:
        with reading(path) as local:
            return local.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def write_json(path: str | Path, value: dict) -> None:
    """Writes `value` as indented JSON, as a whole."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | Path) -> dict:
    """A JSON object; {} if there is no such file. Raises: ValueError that names a damaged file."""
    try:
        return {} | json.loads(read_text(path) or "{}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error


def check_same(path: str | Path, made_from: dict) -> None:
    """Raises: ValueError if the JSON file of an earlier run states other values."""
    before = read_json(path)
    for name, value in made_from.items():
        if before.get(name, value) != value:
            raise ValueError(
                f"{path} is of a run with {name} = {before[name]!r}, this one has {value!r}; "
                "choose another output folder, or the same settings to continue"
            )
