"""What several scripts need and what is not pi-Flow: devices, error lines, files, bars.

Nothing here knows about flows or policies; `piflow_minimal.py` does not import it.
"""

import contextlib
import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA if there is one, then MPS, then the CPU; any other name is taken literally.

    Raises: ValueError if the device does not exist here.
    """
    if name == "auto":
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {name!r} is not available here; use auto, cpu, cuda, cuda:N or mps"
        ) from error
    return torch.device(name)


def keep_freed_memory() -> None:
    """On Linux with glibc: freed memory stays with the process, for the next tensor of that size.

    By default tensors above some 100 kB come from the kernel and go back to it in every operation,
    page by page. benchmarks/README.md says what that costs on a CPU. Elsewhere this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: up to here from the heap (its maximum)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never give the heap back


def run_cli(main: Callable[[], None]) -> None:
    """Runs a script's `main`; bad input ends it with one line on stderr and exit code 1.

    Errors of the kinds that our checks raise (ValueError, OSError, ImportError) are for the user;
    everything else is a bug and keeps its traceback.
    """
    keep_freed_memory()
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, renamed to `path` if the block succeeds.

    Whoever reads `path` sees the old file or the whole new one, never a half.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".tmp-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_json(path: str | Path, value: dict) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def save_figure(figure, path: str | Path, dpi: int = 110) -> None:
    """Writes a matplotlib figure, atomically, and closes it."""
    import matplotlib.pyplot as plt

    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
    plt.close(figure)


def sliders(draw: Callable, **ranges) -> None:
    """In a notebook: sliders that call draw(**values). Without ipywidgets, a line that says so.

    ranges: as `ipywidgets.interact` takes them, (low, high, step) or a list of choices.
    """
    try:
        from ipywidgets import interact
    except ImportError:
        print("No sliders here (pip install ipywidgets); the figure above shows some positions.")
        return
    interact(draw, **ranges)
