"""What the big ImageNet scripts share around the network: processes, files, pictures.

Paths may be local or, through fsspec, remote (`s3://bucket/run`). Whoever reads a file that was
written here sees the old one or the whole new one, also after a power cut.
"""

import contextlib
import json
import os
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.cli import atomic, pick_device

# ---------------------------------------------------------------------------------------------
# Processes. A plain `python script.py` is one process; `torchrun` starts several
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def processes(device: str = "auto") -> Iterator[tuple[int, int, torch.device]]:
    """Yields (rank, number of processes, device) and closes the process group in the end.

    With CUDA each process gets the GPU of its local rank and talks through NCCL, otherwise Gloo.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield 0, 1, pick_device(device)
        return
    chosen = pick_device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    # An hour: the others wait while rank 0 uploads a large checkpoint or draws.
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    try:
        yield dist.get_rank(), world, chosen
    finally:
        dist.destroy_process_group()


def total(values: Tensor) -> Tensor:
    """The sum of `values` over all processes (in place)."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def from_first(value):
    """What rank 0 passes here, on every process. Waits for rank 0."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


# ---------------------------------------------------------------------------------------------
# Files, local or remote
# ---------------------------------------------------------------------------------------------


def is_remote(path: str | Path) -> bool:
    """Whether a path goes through fsspec, as s3://bucket/run does."""
    return "://" in str(path)


def join(folder: str | Path, *names: str) -> str:
    """A path below a local or remote folder."""
    return "/".join([str(folder).rstrip("/"), *names])


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
    """Sorted names of the files in a folder that begin with `prefix`; empty if there is none."""
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


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary local path. What the block writes there then appears at `path`, whole.

    Local: on the disk before it gets its name. Remote: uploaded as one object.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / str(path).rsplit("/", 1)[-1]
            yield temporary
            with _remote(path) as (filesystem, root):
                filesystem.makedirs(root.rsplit("/", 1)[0], exist_ok=True)
                filesystem.put_file(str(temporary), root)
        return
    with atomic(path) as temporary:
        yield temporary
        _to_disk(temporary)
    if os.name == "posix":
        _to_disk(Path(path).parent)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
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


def write_text(path: str | Path, text: str) -> None:
    """Writes a file, local or remote, as a whole."""
    with writing(path) as temporary:
        temporary.write_text(text)


def read_text(path: str | Path) -> str | None:
    """The text of a file, or None if there is no such file."""
    try:
        with reading(path) as local:
            return local.read_text()
    except FileNotFoundError:
        return None


def check_same(path: str | Path, settings: dict) -> None:
    """Compares `settings` with those that an earlier run left in a JSON file, if there is one.

    Raises: ValueError that names the first one that differs.
    """
    before = json.loads(read_text(path) or "{}")
    for name, value in json.loads(json.dumps(settings)).items():
        if before.get(name, value) != value:
            raise ValueError(
                f"{path} is of a run with {name} = {before[name]!r}, this one has {value!r}; "
                "choose another output folder, or the same settings to continue"
            )


def read_checkpoint(path: str) -> dict:
    """Raises: ValueError if it is damaged, OSError if there is none or it cannot be fetched."""
    with reading(path) as local:
        try:
            with zipfile.ZipFile(local) as archive:
                wrong = archive.testzip()
            if wrong:
                raise ValueError(f"wrong checksum of {wrong}")
            return torch.load(local, map_location="cpu", weights_only=True)
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # one wrong bit in the directory of a zip: nearly any kind
            raise ValueError(f"{path} is damaged: {error}") from error


# ---------------------------------------------------------------------------------------------
# Networks and pictures
# ---------------------------------------------------------------------------------------------


class Runner:
    """A network as the functions of dit.py call it, under bfloat16 autocast if wanted.

    net: a DiT, or what DistributedDataParallel makes of one; config: the DiT's. While `sync` is
    False, DistributedDataParallel keeps gradients to itself: they are summed up at the last call.
    """

    def __init__(self, net: nn.Module, config, bf16: bool = False):
        self.net, self.config, self.bf16, self.sync = net, config, bf16, True

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor):
        apart = not self.sync and isinstance(self.net, DistributedDataParallel)
        quiet = self.net.no_sync() if apart else contextlib.nullcontext()
        with quiet, torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self.net(x, t, labels)


@torch.no_grad()
def follow_teacher(teacher: Callable, noise: Tensor, steps: int) -> Tensor:
    """Euler steps of a teacher (x, t) -> u from t = 1 to t = 0. noise (B, C, H, W) -> x_0."""
    x = noise
    for i in range(steps):
        t = torch.full((len(x),), 1 - i / steps, device=x.device)
        x = x - teacher(x, t) / steps
    return x


def save_grid(pixels: Tensor, path: str | Path, columns: int) -> None:
    """uint8 (B, H, W, 1 or 3) -> one PNG, row by row; an unfinished last row is left out."""
    from PIL import Image

    columns = min(columns, len(pixels))
    rows = len(pixels) // columns
    grid = pixels[: rows * columns].unflatten(0, (rows, columns))
    grid = grid.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)  #       (rows H, columns W, C)
    with writing(path) as temporary:
        Image.fromarray(grid.squeeze(2).numpy()).save(temporary, "png")


def draw_rows(path: str | Path, rows: dict[str, Tensor | np.ndarray], title: str) -> None:
    """A row of images (uint8, (B, H, W, C)) for every label."""
    import matplotlib.pyplot as plt

    count = len(next(iter(rows.values())))
    figure, axes = plt.subplots(
        len(rows), count, figsize=(8.5, 1 + 0.85 * len(rows)), squeeze=False
    )
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=255)
            axis.axis("off")
        line[0].set_title(label, fontsize=9, loc="left")
    figure.suptitle(title, fontsize=10)
    top = 1 - 0.55 / figure.get_figheight()  # half an inch for the title
    figure.subplots_adjust(0.01, 0.02, 0.99, top, wspace=0.05, hspace=0.35)
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


# ---------------------------------------------------------------------------------------------
# Logs and signals
# ---------------------------------------------------------------------------------------------


class Log:
    """stats.jsonl, one JSON object per line, and TensorBoard or wandb if asked for."""

    def __init__(self, folder: str, iteration: int, logger: str = "none", settings=None):
        self.path, self.lines = join(folder, "stats.jsonl"), []
        self.send = open_logger(logger, folder, settings or {})
        for line in (read_text(self.path) or "").splitlines():
            try:
                if json.loads(line)["iteration"] <= iteration:  # later ones will come again
                    self.lines.append(line)
            except ValueError:  # a line that a power cut left unfinished
                break

    def __call__(self, record: dict) -> None:
        self.lines.append(json.dumps(record))
        write_text(self.path, "\n".join(self.lines) + "\n")
        scalars = {k: v for k, v in record.items() if isinstance(v, int | float)}
        self.send(scalars, record["iteration"])


def open_logger(name: str, folder: str, settings: dict) -> Callable[[dict, int], None]:
    """-> send(scalars, iteration). name: none, tensorboard or wandb.

    Raises: ImportError if the package is missing.
    """
    if name == "none":
        return lambda scalars, iteration: None
    try:
        if name == "wandb":
            import wandb
        else:
            from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(f"--logger {name} needs: pip install {name}") from error
    if name == "wandb":
        wandb.init(project="piflow", name=folder, config=settings)
        return lambda scalars, iteration: wandb.log(scalars, step=iteration)
    writer = SummaryWriter(join(folder, "tensorboard"))

    def send(scalars: dict, iteration: int) -> None:
        for key, value in scalars.items():
            writer.add_scalar(key, value, iteration)
        writer.flush()

    return send


def memory_gib(device: torch.device) -> float:
    """The most memory that was used so far: of the GPU, otherwise of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Stop:
    """Notes SIGTERM and Ctrl-C, so that the iteration can be finished; the second Ctrl-C kills.

    (A second SIGTERM does not: where a scheduler stops all processes, torchrun repeats it.)
    asked: 1.0 if this process was; agreed: for the loop, when all processes know.
    """

    def __init__(self):
        self.asked, self.agreed, self.before = 0.0, False, {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame) -> None:
        self.asked = 1.0
        if number == signal.SIGINT:
            signal.signal(number, self.before[number])

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
