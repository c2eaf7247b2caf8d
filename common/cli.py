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
import difflib
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

from piflow_minimal import DXPolicy, GaussianMixture, GMFlowPolicy

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
    about = {"help": help, "low": low, "high": high, "above": above, "choices": choices}
    about |= {"flag": flag, "metavar": metavar, "positional": positional}
    about |= {"ordered": ordered, "path": path, "free": free}
    return dataclasses.field(default=default, metadata=about)


class _Parser(argparse.ArgumentParser):
    """Errors are ValueErrors of one line; an unknown flag is answered with the closest one."""

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            given = message.removeprefix("unrecognized arguments: ").split()[0]
            known = [name for action in self._actions for name in action.option_strings]
            close = difflib.get_close_matches(given.split("=")[0], known, 1)
            hint = f"; did you mean {close[0]}?" if close else "; --help lists the flags"
            message = f"unknown argument {given}{hint}"
        raise ValueError(message)


def parse(
    cls: type[T], description: str, argv: Sequence[str] | None = None,
    presets: Mapping[Any, T] | None = None, by: str = "preset",
) -> T:  # fmt: skip
    """Command line -> an instance of the settings dataclass `cls`.

    Flags are the fields' names with dashes. bool fields are --flag / --no-flag; tuple fields take
    several values. With `presets` the flag --`by` chooses the instance whose values are the
    defaults; the first one if it is not given. `by` may be a field of cls: then other values than
    the presets' names are values like any other.
    Raises: ValueError, one line: an unknown flag, a value of another type or out of range.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    defaults = {name: field.default for name, field in fields.items()}
    parser = _Parser(
        description=description.strip().split("\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    if presets:
        first = _Parser(add_help=False, allow_abbrev=False)
        if by in fields:
            _add(first, fields[by], hints[by], fields[by].default)
        else:
            first.add_argument(_flag(by), default=next(iter(presets)))
        chosen = getattr(first.parse_known_args(argv)[0], by)
        if chosen in presets:
            defaults = {name: getattr(presets[chosen], name) for name in fields}
        elif by not in fields:
            raise ValueError(f"{_flag(by)} is {chosen!r}; choose one of {', '.join(presets)}")
        if by not in fields:
            known = "one of " + ", ".join(map(str, presets))
            parser.add_argument(_flag(by), default=next(iter(presets)), help=known)
    for name, field in fields.items():
        _add(parser, field, hints[name], defaults[name])
    values = vars(parser.parse_args(argv))
    values = {name: values[name] for name in fields}
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    settings = cls(**values)
    check_settings(settings)
    return settings


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add(parser: argparse.ArgumentParser, field: dataclasses.Field, kind: Any, default: Any):
    """Adds one field's flag."""
    about = field.metadata
    options = {"help": about.get("help"), "default": default, "metavar": about.get("metavar")}
    if about.get("choices"):
        options["help"] += f": {', '.join(map(str, about['choices']))}"
    if isinstance(kind, types.UnionType):  # X | None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        options |= {"nargs": "*" if parts[-1] is Ellipsis else len(parts), "type": parts[0]}
    elif kind is bool:
        options["action"] = argparse.BooleanOptionalAction
        options.pop("metavar")
    elif about.get("path"):
        options["type"] = os.path.expanduser
    else:
        options["type"] = _local_path if kind is Path else kind
    if about.get("positional"):
        options.pop("default") if default is dataclasses.MISSING else options.update(nargs="?")
        parser.add_argument(field.name, **options)
    else:
        flag = "--" + about["flag"] if about.get("flag") else _flag(field.name)
        parser.add_argument(flag, dest=field.name, **options)


def _local_path(text: str) -> Path:
    return Path(text).expanduser()


def check_settings(settings: Any) -> None:
    """Raises: ValueError for a field outside the bounds or choices that `setting` states."""
    for field in dataclasses.fields(settings):
        about, given = field.metadata, getattr(settings, field.name)
        if not about or given is None:
            continue
        flag = "--" + about["flag"] if about["flag"] else _flag(field.name)
        flag = field.name if about["positional"] else flag
        for value in given if isinstance(given, tuple) else (given,):
            if about["choices"] and value not in about["choices"]:
                known = ", ".join(map(str, about["choices"]))
                raise ValueError(f"{flag} is {value!r}; choose one of {known}")
            if isinstance(value, int | float) and not isinstance(value, bool):
                _check_number(flag, value, about["low"], about["above"], about["high"])
        if about["ordered"] and list(given) != sorted(given):
            raise ValueError(f"{flag} is {' '.join(map(str, given))}; it must be LOW <= HIGH")


def _check_number(
    flag: str, value: float, low: float | None, above: float | None, high: float | None
) -> None:
    fits = math.isfinite(value) or (high is not None and not math.isnan(value))
    fits = fits and (low is None or value >= low)
    fits = fits and (above is None or value > above)
    fits = fits and (high is None or value <= high)
    if fits:
        return
    bounds = [f"at least {low:g}"] if low is not None else []
    bounds += [f"above {above:g}"] if above is not None else []
    bounds += [f"at most {high:g}"] if high is not None else []
    raise ValueError(f"{flag} is {value}; it must be {' and '.join(bounds or ['finite'])}")


def run_cli(main: Callable[[], Any]) -> None:
    """Runs a script's `main`; bad input ends it with one line on stderr and exit code 1.

    Errors of the kinds that our checks raise (ValueError, OSError, ImportError) are for the user;
    everything else is a bug and keeps its traceback. What a terminal cannot print becomes "?".
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


# ---- Devices and compilation ---------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA if there is one, then MPS, then the CPU; any other name is taken literally.

    Raises: ValueError if the device does not exist here.
    """
    if name == "auto":
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name!r} is not available here; use {DEVICE_HELP}") from error
    return torch.device(name)


def compiled(function: Callable, *example: Any) -> Callable:
    """torch.compile of a function; the function itself, with a warning, where that does not work.

    example: arguments of one call, to find out. Usage: `GMFlowPolicy.velocity = compiled(...)`.
    """
    fast = torch.compile(function)
    try:
        fast(*example)
    except Exception as error:  # every backend has exceptions of its own
        reason = str(error).strip().split("\n")[0]
        warnings.warn(f"torch.compile does not work here, going on without: {reason}", stacklevel=2)
        return function
    return fast


@contextlib.contextmanager
def compiled_policies(enabled: bool = True) -> Iterator[None]:
    """Within the block, `velocity` of both policies goes through torch.compile."""
    if not enabled:
        yield
        return
    x, means = torch.zeros(1, 2, 4), torch.zeros(1, 3, 2, 4)
    mixture = GaussianMixture(means, torch.zeros(1, 1, 1, 1), torch.zeros(1, 3, 1, 4))
    eager = {kind: kind.velocity for kind in (GMFlowPolicy, DXPolicy)}
    try:
        for policy in (GMFlowPolicy(mixture, x, 1.0), DXPolicy(means, x, 1.0)):
            kind = type(policy)
            kind.velocity = compiled(eager[kind], policy, x, torch.ones(1))
        yield
    finally:
        for kind, velocity in eager.items():
            kind.velocity = velocity


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within the block PyTorch uses one CPU thread.

    On small tensors a second thread gains a fifth, and much less than nothing on a busy machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """On Linux with glibc: freed memory stays with the process, for the next tensor of that size.

    By default tensors above some 100 kB come from the kernel and go back to it in every operation,
    page by page. benchmarks/README.md says what that costs on a CPU. Elsewhere this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: up to here from the heap (its maximum)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never give the heap back
