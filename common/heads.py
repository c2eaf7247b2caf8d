"""How a student's output head starts: the teacher's velocity head, repeated."""

import torch
from torch import Tensor


@torch.no_grad()
def repeat_head(
    weight: Tensor, bias: Tensor | None, copies: int, channels: int, spread: float = 0.0,
    generator: torch.Generator | None = None, inner: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rows of a velocity head -> rows of a head that gives that velocity `copies` times.

    Every copy's bias is shifted by a constant per channel from N(0, spread^2). Without it the
    components of a mixture get the same gradient and stay one for ever.

    Args:
        weight: (outer * channels * inner, ...) of a linear layer or a convolution: outer counts
            what varies slower than the channel (the positions of a patch), inner what varies
            faster. bias: one number per row, or None: zeros.
        copies: K mixture components, or N grid points. generator: on the CPU.
    Returns: weight (outer * copies * channels * inner, ...), rows (outer, copies, channels, inner);
        bias, one number per row.
    """
    rows = channels * inner
    repeated = weight.unflatten(0, (-1, 1, rows)).repeat_interleave(copies, 1).flatten(0, 2)
    shift = spread * torch.randn(copies, channels, generator=generator).to(weight)
    if bias is None:
        bias = weight.new_zeros(len(weight))
    bias = bias.view(-1, 1, channels, inner) + shift[:, :, None]
    return repeated, bias.flatten()
