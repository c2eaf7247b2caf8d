"""A GPU that is not there: FakeTensorMode on "cuda" runs no arithmetic, but raises on mixed devices
and on every value that the host would have to read.

PyTorch's own backward engine wants a real device, so `backward` calls the backward formula of every
graph node itself. A PyTorch that is built without CUDA, or an older one without a driver, cannot
index a tensor of a fake GPU: there `needs_fake_cuda` skips.
"""

from collections import defaultdict

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def _works() -> bool:
    try:
        with FakeTensorMode():
            return torch.ones(2, device="cuda")[:1].device.type == "cuda"
    except RuntimeError:
        return False


needs_fake_cuda = pytest.mark.skipif(not _works(), reason="this PyTorch cannot fake a GPU here")


def backward(loss: torch.Tensor) -> dict[torch.Tensor, torch.Tensor]:
    """The gradients of a scalar with respect to the leaves of its graph, {leaf: gradient}."""
    order, seen, stack = [], set(), [(loss.grad_fn, False)]
    while stack:  # depth first; afterwards `order` has every node behind those it feeds
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((following, False) for following, _ in node.next_functions if following)
    arriving = defaultdict(dict)  # node -> {output number: gradient}
    arriving[loss.grad_fn][0] = torch.ones_like(loss)
    gradients = {}
    with torch.no_grad():
        for node in reversed(order):
            inputs = arriving.pop(node, {})
            if hasattr(node, "variable"):  # AccumulateGrad: a leaf
                gradients[node.variable] = inputs[0]
                continue
            outputs = node(*(inputs.get(i) for i in range(max(inputs) + 1)))
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            for (following, number), gradient in zip(node.next_functions, outputs, strict=True):
                if following is not None and gradient is not None:
                    shape = following._input_metadata[number].shape  # undo broadcasting
                    gradient = gradient.sum_to_size(shape)
                    before = arriving[following].get(number)
                    arriving[following][number] = gradient if before is None else before + gradient
    return gradients
