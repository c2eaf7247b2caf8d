"""Collects what the checks found, and prints it as a table for docs/verified.md."""

import time

import pytest
import torch

ROWS = []


@pytest.fixture
def record(request):
    """record(check, *arguments): calls it and keeps a row for the table."""

    def run(check, *arguments):
        began, found = time.perf_counter(), "failed"
        try:
            found = check(*arguments)
        finally:
            seconds = time.perf_counter() - began
            ROWS.append(f"| {check.__name__.replace('_', ' ')} | {found} | {seconds:.0f} |")

    return run


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    terminalreporter.section("for docs/verified.md")
    head = f"| {name}, PyTorch {torch.__version__}, CUDA {torch.version.cuda} | result | seconds |"
    for line in (head, "|---|---|---|", *ROWS):
        terminalreporter.write_line(line)
