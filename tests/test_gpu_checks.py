"""The checks for a GPU (tests/cuda), in small, on the CPU; and device syncs on a GPU that is not
there."""

import pytest
import torch
from fake_cuda import NoSync, needs_fake_cuda
from gpu_checks import CHECKS, core_steps
from torch._subclasses.fake_tensor import FakeTensorMode

SLOW = ("a_killed_run_continues", "the_text_to_image_trainer_runs")


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, marks=pytest.mark.slow if check.__name__ in SLOW else ())
        for check in CHECKS
    ],
    ids=lambda check: check.__name__,
)
def test_check_in_small(check):
    if check.__name__ == "the_text_to_image_trainer_runs":
        pytest.importorskip("diffusers")
    assert check(torch.device("cpu"), True)


@needs_fake_cuda
def test_core_forces_no_sync_on_a_fake_gpu():
    """Forward passes only: PyTorch's backward engine wants a real device."""
    with FakeTensorMode():
        made = [torch.randn(4, *rest, 16, 16, device="cuda") for rest in ((4,), (6, 4), (6, 1))]
        with NoSync():
            core_steps(made, train=False)


@needs_fake_cuda
@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: torch.as_tensor(0.5, device=x.device),
        lambda x: x.cpu(),
        lambda x: torch.arange(4.0, device="cpu").to(x.device),
    ],
)
def test_a_fake_gpu_notices_a_sync(sync):
    with (
        FakeTensorMode(),
        NoSync(),
        pytest.raises(RuntimeError, match="device sync|and waits|nonzero"),
    ):
        sync(torch.ones(4, device="cuda"))


@needs_fake_cuda
def test_a_fake_gpu_allows_what_does_not_wait():
    with FakeTensorMode(), NoSync():
        x = torch.ones(4, device="cuda")
        x.new_full((4,), 0.5), torch.where(x > 0, x, 0.0)
        torch.arange(4.0, device="cpu").to("cuda", non_blocking=True)
