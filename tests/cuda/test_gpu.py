"""On a GPU, in less than ten minutes: python -m pytest -m cuda."""

import pytest
import torch
from gpu_checks import CHECKS

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_gpu(check, record):
    record(check, torch.device("cuda"), False)
