"""Processes that torchrun starts, what they tell each other, and signals that stop them.

A plain `python script.py` is one process, and everything here works there too.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from common.cli import pick_device


class Place(NamedTuple):
    """Which process this is, of how many, and its device."""

    rank: int
    world: int
    device: torch.device


@contextlib.contextmanager
def processes(device: str = "auto") -> Iterator[Place]:
    """One process, or those that torchrun started: NCCL on CUDA, otherwise Gloo."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Place(0, 1, pick_device(device))
        return
    if torch.cuda.is_available():  # before anything else touches a GPU
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    chosen = pick_device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", torch.cuda.current_device())
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    # An hour: the other processes wait while rank 0 reads a checkpoint or draws pictures.
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    try:
        yield Place(rank(), world(), chosen)
        dist.barrier()  # none leaves while another one still needs it
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def from_first(value: Any) -> Any:
    """What rank 0 passes here, on every process."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yields a list that SIGTERM or Ctrl-C makes non-empty; the second Ctrl-C kills.

    (A second SIGTERM does not: where a scheduler stops all processes, torchrun repeats it.)
    """
    received = []

    def note(number, frame):
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
