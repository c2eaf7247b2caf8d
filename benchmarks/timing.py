"""What the benchmarks share: timing in turns, and tables."""

import time
from collections.abc import Callable

import torch


def in_turns(
    functions: dict[str, Callable[[], object]], device: torch.device, rounds: int = 7
) -> dict[str, float]:
    """Fewest seconds of each function, after a warm-up, all in every round: A B C, A B C, ...

    What slows the machine down for a while so falls on all of them; compare within one call only.
    """
    times = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, function in functions.items():
            start = clock(device)
            function()
            if round_ > 0:
                times[name].append(clock(device) - start)
    return {name: min(values) for name, values in times.items()}


def clock(device: torch.device) -> float:
    """Seconds: on one CPU thread its CPU time, which other jobs hardly change; else wall-clock."""
    synchronize(device)
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device, function: Callable[[], object]) -> float:
    """The most memory in MiB that tensors made by `function` hold at once.

    On a GPU the allocator knows. On a CPU the profiler's list of allocations is added up.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if device.type != "cpu":
        return float("nan")
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


def print_table(header: list[str], rows: list[list]) -> None:
    """Columns as wide as their widest cell; the first one to the left, the others to the right."""
    cells = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        first, *others = (cell.ljust(w) if i == 0 else cell.rjust(w)
                          for i, (cell, w) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        print("  ".join([first, *others]))
    print()
