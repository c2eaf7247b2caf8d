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
from torch.utils._python_dispatch import TorchDispatchMode


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


class NoSync(TorchDispatchMode):
    """Inside FakeTensorMode: raises where a GPU would have to wait for the host or the other way.

    That is: reading a value or a shape that depends on values, and copying between host and device
    without non_blocking=True; torch.cuda.set_sync_debug_mode("error") does the same on a GPU.
    """

    READS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.equal.default,
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.READS:
            raise RuntimeError(f"{function} forces a device sync")
        result = function(*args, **kwargs)
        copied = [args[0]]
        if function is torch.ops.aten.copy_.default:
            copied = [args[1]]
        elif function is not torch.ops.aten._to_copy.default:
            return result
        blocking = not kwargs.get("non_blocking") and not (len(args) > 2 and args[2])
        if blocking and copied[0].device.type != result.device.type:
            raise RuntimeError(f"{function} copies between host and device and waits for it")
        return result
