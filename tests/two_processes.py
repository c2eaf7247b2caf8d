"""Runs the `main` of one of the modules in two processes, as torchrun would."""

import importlib
import multiprocessing
import os
import socket
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}

# One process imports PyTorch, what it imports late, and a trainer; all others are its copies.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "imagenet.distill"])


def main(module: str, argv: list[str], place: dict[str, str]) -> None:
    os.environ.update(place)
    importlib.import_module(module).main(argv)


def run_two(module: str, argv: list[str]) -> None:
    """Raises: AssertionError if one of them fails."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [place | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    started = [server.Process(target=main, args=(module, argv, rank)) for rank in ranks]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(300)
        assert [process.exitcode for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
