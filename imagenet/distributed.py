"""What training and sampling share: processes, files, checkpoints of a run, logs.

Paths may be local or, through fsspec, remote (`s3://bucket/run`). A reader of a file that is
written here sees the old one or the whole new one, also after a power cut. Only rank 0 reads and
writes the folder of a run; it sends what the other processes need.
"""

import contextlib
import json
import math
import os
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common.cli import atomic, pick_device

# ---------------------------------------------------------------------------------------------
# Processes. A plain `python script.py` is one process; `torchrun` starts several
# ---------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Which process this is, of how many, and its device."""

    rank: int
    world: int
    device: torch.device


@contextlib.contextmanager
def processes(device: str = "auto") -> Iterator[Place]:
    """Yields the place of this process and closes the process group in the end.

    On CUDA each process gets the GPU of its local rank and communicates by NCCL, otherwise by Gloo.
    """
    count, chosen = int(os.environ.get("WORLD_SIZE", 1)), pick_device(device)
    if count == 1:
        yield Place(0, 1, chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    # An hour: the other processes wait while rank 0 reads a checkpoint or draws pictures.
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    try:
        yield Place(dist.get_rank(), count, chosen)
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


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


def on_first(function: Callable, *args):
    """Calls a function on rank 0; every process returns its result, or raises its error."""
    outcome = None
    if rank() == 0:
        try:
            outcome = function(*args), None
        except (ValueError, OSError, ImportError) as error:
            outcome = None, error
    result, error = from_first(outcome)
    if error:
        raise error
    return result


def ahead(function: Callable[[int], object], numbers: range) -> Iterator:
    """Yields function(i) for every i; a worker thread computes the next one meanwhile."""
    with ThreadPoolExecutor(1) as worker:
        pending = [worker.submit(function, i) for i in numbers[:1]]
        for i in numbers[1:]:
            pending.append(worker.submit(function, i))
            yield pending.pop(0).result()
        yield from (last.result() for last in pending)


class AutocastModel:
    """A network as the functions of dit.py call it, under bfloat16 autocast if wanted.

    net: a DiT, also one of `parallel`; config: the DiT's. While `sync` is False, a backward pass
    skips gradient synchronisation: the gradients add up until the next one with it.
    """

    def __init__(self, net: nn.Module, config, bf16: bool = False):
        self.net, self.config, self.bf16, self.sync = net, config, bf16, True

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor):
        alone = contextlib.nullcontext()
        if hasattr(self.net, "set_requires_gradient_sync"):  # fully_shard
            self.net.set_requires_gradient_sync(self.sync)
        elif isinstance(self.net, DistributedDataParallel) and not self.sync:
            alone = self.net.no_sync()
        with alone, torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self.net(x, t, labels)


def shard(net: nn.Module) -> None:
    """Splits the parameters of a network over all processes (fully_shard, FSDP2), in place.

    Each of `net.blocks` is gathered when it is needed. Make the optimizer afterwards.
    """
    from torch.distributed.fsdp import fully_shard

    for block in net.blocks:
        fully_shard(block)
    fully_shard(net)


def parallel(net: nn.Module, place: Place, sharded: bool = False) -> nn.Module:
    """The network whose backward pass averages gradients over all processes."""
    if place.world == 1 or sharded:
        return net
    devices = [place.device] if place.device.type == "cuda" else None
    return DistributedDataParallel(net, devices)


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
        _to_disk(temporary, os.O_RDWR)  # Windows: fsync needs a writable descriptor
    if os.name == "posix":
        _to_disk(Path(path).parent, os.O_RDONLY)


def _to_disk(path: Path, mode: int) -> None:
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


def read_json(path: str | Path) -> dict:
    """A JSON object; {} if there is no such file. Raises: ValueError that names a damaged file."""
    try:
        value = json.loads(read_text(path) or "{}")
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def check_same(path: str | Path, settings: dict) -> dict:
    """Compares `settings` with those that an earlier run left in a JSON file, if there is one.

    Returns: the earlier ones, all of them; empty if there is no such file.
    Raises: ValueError that names the first one that differs.
    """
    before = read_json(path)
    for name, value in json.loads(json.dumps(settings)).items():
        if before.get(name, value) != value:
            raise ValueError(
                f"{path} is of a run with {name} = {before[name]!r}, this one has {value!r}; "
                "choose another output folder, or the same settings to continue"
            )
    return before


# ---------------------------------------------------------------------------------------------
# Schedules, moving average, optimizer
# ---------------------------------------------------------------------------------------------


def learning_rate(
    iteration: int, peak: float, warmup: int, warmup_ratio: float, decay: str = "none",
    iterations: int = 0,
) -> float:  # fmt: skip
    """Linear warm-up from warmup_ratio * peak, then constant or a cosine to 0 at `iterations`.

    iteration: counts from 0. decay: "none" or "cosine".
    """
    if iteration < warmup:
        return peak * (warmup_ratio + (1 - warmup_ratio) * iteration / warmup)
    if decay == "none":
        return peak
    done = (iteration - warmup) / max(1, iterations - warmup)
    return peak * (1 + math.cos(math.pi * done)) / 2


def ema_decay(steps: int, start: int = 0, gamma: float = 7.0) -> float:
    """Share of the old average that stays after `steps` optimizer steps; 0 copies the weights.

    (1 - 1/i)^(1 + gamma), i counted from `start`: the power function of arXiv 2312.02696.
    """
    i = steps - start
    return (1 - 1 / i) ** (1 + gamma) if i > 0 else 0.0


@torch.no_grad()
def update_ema(average: nn.Module, net: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * net, parameter by parameter."""
    update = get_ema_multi_avg_fn(decay)
    update(list(average.parameters()), list(net.parameters()), None)


def make_optimizer(
    name: str, parameters: Iterator[nn.Parameter], lr: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """AdamW without weight decay, fused on CUDA. name: adamw or adamw8bit.

    Raises: ImportError if bitsandbytes is missing.
    """
    parameters = list(parameters)
    options = {"lr": lr, "betas": betas, "weight_decay": 0.0}
    if name == "adamw":
        return torch.optim.AdamW(parameters, fused=parameters[0].is_cuda, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError("--optimizer adamw8bit needs: pip install bitsandbytes") from error
    return AdamW8bit(parameters, **options)


# ---------------------------------------------------------------------------------------------
# Checkpoints of a run
# ---------------------------------------------------------------------------------------------

Part = nn.Module | torch.optim.Optimizer


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


class Checkpoints:
    """FOLDER/step_00001000.pt and so on, local or remote: parts of a run by name, and numbers.

    Every process calls `save` and `restore`; rank 0 writes and reads. The newest `keep` files stay,
    and those whose iteration is a multiple of milestone_every (0: none). A file does not depend on
    the number of processes or on `shard`.

    half: names of parts that are written in bfloat16; what continues from it is not bit for bit
        the uninterrupted run.
    """

    def __init__(
        self, folder: str, keep: int = 2, milestone_every: int = 0, half: tuple[str, ...] = ()
    ):
        self.folder, self.keep, self.milestone_every = folder, keep, milestone_every
        self.half, self.writer, self.pending = half, ThreadPoolExecutor(1), None

    def save(
        self, iteration: int, parts: dict[str, Part], numbers: dict,
        then: Callable[[dict], None] = lambda state: None,
    ) -> None:  # fmt: skip
        """Copies the state to the CPU and returns; a thread writes it, then calls then(state)."""
        state = {name: part.state_dict() for name, part in parts.items()}
        self.background(state, partial(self._write, iteration, numbers, then))

    def background(self, state: dict, function: Callable[[dict], None]) -> None:
        """Calls function(copy of the state on the CPU) in the thread, on rank 0."""
        self.wait()
        state = _snapshot(state)
        if rank() == 0:
            self.pending = self.writer.submit(function, state)

    def _write(self, iteration: int, numbers: dict, then: Callable, state: dict) -> None:
        stored = {k: _map_tensors(_halve, v) if k in self.half else v for k, v in state.items()}
        with writing(join(self.folder, f"step_{iteration:08d}.pt")) as temporary:
            torch.save(numbers | {"iteration": iteration} | stored, temporary)
        then(state)
        every = self.milestone_every
        numbered = {name: int(name[5:13]) for name in list_files(self.folder, "step_")}
        passing = [name for name, i in numbered.items() if not every or i % every]
        for name in passing[: -self.keep]:
            remove(join(self.folder, name))

    def wait(self) -> None:
        """Waits until the last checkpoint is written. Raises: the error of the thread."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()

    def restore(self, parts: dict[str, Part], device: torch.device) -> dict | None:
        """Loads the newest whole checkpoint into `parts`. -> its numbers; None if there is none."""
        state = self._newest() if rank() == 0 else None
        numbers = from_first(state and {k: v for k, v in state.items() if k not in parts})
        for name, part in parts.items() if numbers else ():
            _load(part, _broadcast(state and state.pop(name), device))
        return numbers

    def _newest(self) -> dict | None:
        remove_leftovers(self.folder)
        for name in reversed(list_files(self.folder, "step_")):
            try:
                return read_checkpoint(join(self.folder, name))
            except ValueError as error:
                reason = " ".join(str(error).split())[:100]
                print(f"skipping the damaged checkpoint {name}: {reason}")
        return None


def _map_tensors(function: Callable[[Tensor], object], value):
    """The same nested dicts and lists, with function(tensor) for every tensor."""
    if isinstance(value, dict):
        return {key: _map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(function, item) for item in value)
    return function(value) if isinstance(value, Tensor) else value


def _snapshot(state: dict) -> dict:
    """A copy on the CPU, of sharded tensors as a whole; empty tensors on ranks other than 0."""
    first = rank() == 0

    def copy(value: Tensor) -> Tensor:
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        return value.detach().to("cpu", copy=True) if first else value.new_empty(0)

    return _map_tensors(copy, state)


def _halve(value: Tensor) -> Tensor:
    return value.bfloat16() if value.is_floating_point() and value.ndim else value


def _broadcast(state: dict | None, device: torch.device) -> dict:
    """A nested dict of tensors from rank 0, on the device of every process."""
    if not dist.is_initialized():
        return state
    tensors = []
    outline = from_first(_map_tensors(lambda v: tensors.append(v) or v.to("meta"), state))
    waiting = iter(tensors)

    def receive(meta: Tensor) -> Tensor:
        value = next(waiting).to(device) if rank() == 0 else torch.empty_like(meta, device=device)
        dist.broadcast(value, src=0)
        return value

    return _map_tensors(receive, outline)


def _load(part: Part, state: dict) -> None:
    """load_state_dict of whole tensors into a network or optimizer, whose own may be sharded."""
    if isinstance(part, nn.Module):
        own = part.state_dict()
        part.load_state_dict({key: _like(value, own.get(key)) for key, value in state.items()})
        return
    parameters = [p for group in part.param_groups for p in group["params"]]
    slots = {
        i: {key: _like(value, parameters[i]) for key, value in slot.items()}
        for i, slot in state["state"].items()
    }
    part.load_state_dict(state | {"state": slots})


def _like(value, own: Tensor | None):
    if hasattr(own, "full_tensor") and isinstance(value, Tensor) and value.shape == own.shape:
        from torch.distributed.tensor import distribute_tensor

        value = value.to(own.device)
        return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)
    return value


# ---------------------------------------------------------------------------------------------
# Logs and signals
# ---------------------------------------------------------------------------------------------


class Log:
    """stats.jsonl, one JSON object per line; TensorBoard or wandb by `logger`; all on rank 0."""

    def __init__(self, folder: str, iteration: int, logger: str = "none", settings=None):
        self.path, self.lines, self.send = join(folder, "stats.jsonl"), [], None
        if rank():
            return
        self.send = open_logger(logger, folder, settings or {}, iteration)
        for line in (read_text(self.path) or "").splitlines():
            try:
                if json.loads(line)["iteration"] <= iteration:  # later ones will come again
                    self.lines.append(line)
            except ValueError:  # a line that a power cut left unfinished
                break

    def __call__(self, record: dict) -> None:
        if self.send is None:
            return
        self.lines.append(json.dumps(record))
        write_text(self.path, "\n".join(self.lines) + "\n")
        scalars = {k: v for k, v in record.items() if isinstance(v, int | float)}
        self.send(scalars, record["iteration"])


def open_logger(
    name: str, folder: str, settings: dict, iteration: int = 0
) -> Callable[[dict, int], None]:
    """-> send(scalars, iteration). name: none, tensorboard or wandb. Continues the run in `folder`.

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
        identity = join(folder, "wandb_id.txt")
        known = read_text(identity)
        run = wandb.init(project="piflow", name=folder, config=settings, id=known, resume="allow")
        if not known:
            write_text(identity, run.id)
        return lambda scalars, iteration: wandb.log(scalars, step=iteration)
    writer = SummaryWriter(join(folder, "tensorboard"), purge_step=iteration + 1)

    def send(scalars: dict, iteration: int) -> None:
        for key, value in scalars.items():
            writer.add_scalar(key, value, iteration)
        writer.flush()

    return send


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the GPU, otherwise of the process."""
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
    requested: this process got a signal; agreed: all processes know that one of them did.
    """

    def __init__(self):
        self.requested, self.agreed, self.before = False, False, {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def agree(self, *values: Tensor) -> list[float]:
        """Scalars on the device -> their sums over all processes, as numbers; updates `agreed`.

        The only device sync and the only wait for other processes in an iteration.
        """
        requested = torch.full_like(values[0], float(self.requested))
        *sums, requested = total(torch.stack([*values, requested])).tolist()
        self.agreed = requested > 0
        return sums

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
