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
    return "/".join([str(folder).rstrip("/"), *names])


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
            with _remote(path) as (filesystem, root):
                filesystem.makedirs(root.rsplit("/", 1)[0], exist_ok=True)
                filesystem.put_file(str(temporary), root)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{uuid.uuid4().hex}{path.suffix}"
    try:
        yield temporary
        _to_disk(temporary, os.O_RDWR)  # Windows: fsync needs a writable descriptor
        os.replace(temporary, path)
        _to_disk(path.parent, os.O_RDONLY)
    except Exception as error:  # on a full disk torch.save and safetensors have their own kinds
        if isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError":
            reason = str(error).split("\n")[0]
            raise OSError(f"{path} cannot be written: {reason}") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _to_disk(path: Path, mode: int) -> None:
    """Asks the system to write a file or folder out; some mounts and Windows refuse, no harm."""
    with contextlib.suppress(OSError):
        handle = os.open(path, mode)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


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
        with _remote(path) as (filesystem, root):
            filesystem.get_file(root, str(copy))
        yield copy


@contextlib.contextmanager
def _remote(path: str | Path) -> Iterator[tuple]:
    """Yields (filesystem, path in it). What goes wrong in the block is for the user: an OSError."""
    try:
        import fsspec
    except ImportError as error:
        raise ImportError(f"{path} is remote: pip install fsspec (and s3fs for s3://)") from error
    try:
        yield fsspec.core.url_to_fs(str(path))
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # no credentials, no connection: each storage has its own kinds
        raise OSError(f"{path}: {error}") from error


def list_files(folder: str | Path, prefix: str = "") -> list[str]:
    """Sorted names of the files in a folder that begin with `prefix`; [] if there is none."""
    if is_remote(folder):
        with _remote(folder) as (filesystem, root):
            filesystem.invalidate_cache()
            names = filesystem.ls(root, detail=False) if filesystem.exists(root) else []
        names = [name.rstrip("/").rsplit("/", 1)[-1] for name in names]
    else:
        names = os.listdir(folder) if Path(folder).is_dir() else []
    return sorted(name for name in names if name.startswith(prefix))


def remove(path: str | Path) -> None:
    """Deletes a file; it may be gone already."""
    if is_remote(path):
        with contextlib.suppress(FileNotFoundError), _remote(path) as (filesystem, root):
            filesystem.rm_file(root)
    else:
        Path(path).unlink(missing_ok=True)


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
        value = json.loads(read_text(path) or "{}")
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value
