"""What all scripts share and what is not pi-Flow: flags, error lines, devices, compilation.

A script's settings are one frozen dataclass, a line of help beside each field:

    @dataclass(frozen=True)
    class Settings:
        iterations: int = setting(1000, "optimizer steps", low=1)
        policy: str = setting("gmflow", "kind of policy", choices=("gmflow", "dx"))
        out: Path = setting(Path("outputs/toy"), "folder for the results")

    settings = parse(Settings, __doc__, argv)       # --iterations 500 --policy dx
"""

import argparse
import contextlib
import ctypes
import dataclasses
import math
import os
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from piflow_minimal import DXPolicy, GMFlowPolicy

T = TypeVar("T")

DEVICE_HELP = "auto, cpu, cuda, cuda:N or mps"
MAX_SEED = 2**63 - 1  # what every random generator takes


# ---- Settings and flags --------------------------------------------------------------------------


def setting(
    default: Any, help: str, *, low: float | None = None, high: float | None = None,
    above: float | None = None, choices: Sequence | Mapping | None = None, flag: str | None = None,
    metavar: Any = None, positional: bool = False, ordered: bool = False, path: bool = False,
    free: bool = False,
) -> Any:  # fmt: skip
    """A dataclass field with its help text and what it accepts.

    Args: low, high: inclusive bounds of numbers, which must be finite unless high=math.inf; above:
        exclusive lower bound; choices: all accepted values; flag: name of the flag, if it is not
        the field's; positional: no flag; ordered: values of a tuple must not fall; path: a str that
        is a local or remote path, ~ is expanded; free: may change when a run is continued.
        default=dataclasses.MISSING: it must be given.
    """
    about = locals()  # the arguments by name
    return dataclasses.field(default=about.pop("default"), metadata=about)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def parse(
    cls: type[T], description: str, argv: Sequence[str] | None = None,
    presets: Mapping[Any, T] | None = None, by: str = "preset",
) -> T:  # fmt: skip
    """Command line -> an instance of the settings dataclass `cls`.

    Flags are the fields' names with dashes. bool fields are --flag / --no-flag; tuple fields take
    several values. With `presets` the flag --`by` chooses the instance whose values are the
    defaults, also in --help; the first one if it is not given. `by` may be a field of cls: then
    other values than the presets' names are values like any other.
    Raises: ValueError, one line: an unknown flag, a value of another type or out of range.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    options = {"allow_abbrev": False, "argument_default": argparse.SUPPRESS}
    parser = _Parser(description=description.strip().split("\n")[0], **options)
    base = cls
    if presets:
        chooser = _Parser(add_help=False, **options)
        if by in fields:
            default = getattr(cls, by)
            _add(chooser, fields[by], hints[by], default)
        else:
            default = next(iter(presets))
            about = f"named settings, which the other flags change (default: {default})"
            for each in (chooser, parser):
                each.add_argument(f"--{by}", choices=list(presets), help=about)
        chosen = vars(chooser.parse_known_args(argv)[0]).get(by, default)
        base = presets.get(chosen, cls)
    for name, field in fields.items():
        _add(parser, field, hints[name], getattr(base, name, None))
    given = vars(parser.parse_args(argv))
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    given = {name: value for name, value in given.items() if name in fields}
    settings = cls(**given) if base is cls else dataclasses.replace(base, **given)
    check_settings(settings)
    return settings


def _flag(field: dataclasses.Field) -> str:
    return "--" + (field.metadata["flag"] or field.name).replace("_", "-")


def _add(parser: argparse.ArgumentParser, field: dataclasses.Field, kind: Any, default: Any):
    """Adds one field's flag, or its positional argument."""
    about = field.metadata
    options = {"help": about["help"], "choices": about["choices"], "metavar": about["metavar"]}
    if default not in (None, (), ""):
        options["help"] += f" (default: {default})"
    if isinstance(kind, types.UnionType):  # X | None
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        options |= {"nargs": "*" if parts[-1] is Ellipsis else len(parts), "type": parts[0]}
    elif kind is bool:
        options = {"help": options["help"], "action": argparse.BooleanOptionalAction}
    elif about["path"]:
        options["type"] = _any_path
    else:
        options["type"] = _local_path if kind is Path else kind
    if about["positional"]:
        parser.add_argument(field.name, **options)
    else:
        flag = _flag(field)
        if kind is not bool and not options["choices"]:
            options["metavar"] = options["metavar"] or flag[2:].upper().replace("-", "_")
        parser.add_argument(flag, dest=field.name, **options)


def _any_path(text: str) -> str:
    return os.path.expanduser(text.rstrip("/") or text)  # a folder has one spelling


def _local_path(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is remote; it must be a local path")
    return Path(text).expanduser()


def check_settings(settings: Any) -> None:
    """Raises: ValueError for a number outside the bounds that `setting` states."""
    for field in dataclasses.fields(settings):
        about, given = field.metadata, getattr(settings, field.name)
        values = given if isinstance(given, tuple) else (given,)
        for value in values:
            if isinstance(value, int | float):
                _check_number(_flag(field), value, about["low"], about["above"], about["high"])
        if about["ordered"] and list(values) != sorted(values):
            given = " ".join(map(str, values))
            raise ValueError(f"{_flag(field)} is {given}; it must be LOW <= HIGH")


def _check_number(
    flag: str, value: float, low: float | None, above: float | None, high: float | None
) -> None:
    if (
        (low is None or value >= low)
        and (above is None or value > above)
        and (math.isfinite(value) if high is None else value <= high)
    ):
        return
    bounds = {"at least": low, "above": above, "at most": high}
    bounds = [f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None]
    raise ValueError(f"{flag} is {value}; it must be {' and '.join(bounds or ['finite'])}")


def run_cli(main: Callable[[], Any]) -> None:
    """Runs a script's `main`; bad input ends it with one line on stderr and exit code 1.

    ValueError, OSError and a package that is missing are for the user; everything else is a bug and
    keeps its traceback. What a terminal cannot print becomes "?".
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    try:
        main()
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}; pip install {error.name}")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except torch.OutOfMemoryError:
        helps = "a smaller --micro-batch or --batch, or --shard on several GPUs"
        sys.exit(f"error: the GPU is out of memory; try {helps}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


# ---- Devices and compilation ---------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA or MPS if it is there, otherwise the CPU; other names are taken literally.

    Raises: ValueError if the device does not exist here.
    """
    if name == "auto":
        available = torch.accelerator.is_available()
        return torch.accelerator.current_accelerator() if available else torch.device("cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name!r} is not available here; use {DEVICE_HELP}") from error
    return torch.device(name)


def can_compile(device: torch.device | str = "cpu") -> bool:
    """Whether torch.compile works on a device; a warning says why not."""
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # every backend has exceptions of its own
        reason = str(error).strip().split("\n")[0]
        warnings.warn(f"torch.compile does not work here, going on without: {reason}", stacklevel=2)
        return False
    return True


@contextlib.contextmanager
def compiled_policies(enabled: bool = True) -> Iterator[None]:
    """Within the block, `velocity` of both policies goes through torch.compile, if enabled."""
    kinds = (GMFlowPolicy, DXPolicy) if enabled else ()
    eager = {kind: kind.velocity for kind in kinds}
    for kind in kinds:
        kind.velocity = torch.compile(kind.velocity)
    try:
        yield
    finally:
        for kind, velocity in eager.items():
            kind.velocity = velocity


def keep_freed_memory() -> None:
    """On Linux with glibc: freed memory stays with the process, for the next tensor of that size.

    By default tensors above some 100 kB come from the kernel and go back to it in every operation,
    page by page. benchmarks/README.md says what that costs on a CPU. Elsewhere this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: up to here from the heap (its maximum)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never give the heap back
