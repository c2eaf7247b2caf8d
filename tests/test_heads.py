"""The student's initial head: every component gives the teacher's velocity, moved by a constant."""

import pytest
import torch

from common.heads import repeat_head


@pytest.mark.parametrize("inner, outer", [(4, 1), (1, 4), (1, 1)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_copies_of_a_head(inner, outer, with_bias):
    """Row by row: (position of the patch, component, channel) wherever the layout puts it."""
    channels, copies, width = 3, 5, 7
    weight = torch.randn(outer * channels * inner, width)
    bias = torch.randn(len(weight)) if with_bias else None
    generator = torch.Generator().manual_seed(2)
    new_weight, new_bias = repeat_head(weight, bias, copies, channels, 0.5, generator, inner)
    shift = 0.5 * torch.randn(copies, channels, generator=torch.Generator().manual_seed(2))
    assert new_weight.shape == (outer * copies * channels * inner, width)
    for o in range(outer):
        for k in range(copies):
            for c in range(channels):
                for i in range(inner):
                    old = (o * channels + c) * inner + i
                    new = ((o * copies + k) * channels + c) * inner + i
                    assert torch.equal(new_weight[new], weight[old])
                    expected = shift[k, c] + (bias[old] if with_bias else 0)
                    torch.testing.assert_close(new_bias[new], expected)


def test_convolutions_and_no_spread():
    layer = torch.nn.Conv1d(4, 2, 1)
    weight, bias = repeat_head(layer.weight, layer.bias, 3, 2)
    assert weight.shape == (6, 4, 1) and not weight.requires_grad
    assert torch.equal(weight, layer.weight.repeat(3, 1, 1))
    assert torch.equal(bias, layer.bias.repeat(3))
