"""GMFlow with weights that drift along the trajectory: an extension, not in the paper.

    python -m imagenet.distill --preset tiny-drift

Bayes' rule moves the weights of a location by what x shows at that location: four numbers, little
near t = 1. The teacher sees the whole image, and its x_0 changes there by more. Without drift the
policy cannot follow. But it starts from one known state, so the network can tell how the weights
of each location will change: it adds a function of t to each log weight, zero at t_src.
"""

import copy
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from piflow_minimal import GaussianMixture, GMFlowPolicy, Time

KNOTS = (1.0, 0.9, 0.7, 0.4, 0.15)  # of t / t_src
DRIFTS = len(KNOTS) - 1  # values for each component and location


class DriftingMixture(NamedTuple):
    """Output of a network whose config says `drift`."""

    mixture: GaussianMixture
    drift: Tensor  # (B, K, 4, *), what is added to the log weights at KNOTS[1:]


class DriftingPolicy(NamedTuple):
    """A GMFlow policy whose log weights change linearly between KNOTS, and not below the last."""

    policy: GMFlowPolicy
    drift: Tensor  # (B, K, 4, *)

    x_src = property(lambda self: self.policy.x_src)
    t_src = property(lambda self: self.policy.t_src)

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """pi(x, t). x: (B, C, *); t at most t_src, a number, () or (B,). -> (B, C, *)."""
        t_src = self.t_src
        share = torch.as_tensor(t, device=t_src.device, dtype=t_src.dtype) / t_src  #  (B,)
        place = sum(((high - share) / (high - low)).clamp(0, 1) for high, low in pairwise(KNOTS))
        hats = [(1 - (place - i).abs()).clamp(min=0) for i in range(1, DRIFTS + 1)]
        at_t, drift = copy.copy(self.policy), self.drift.to(t_src.dtype).flatten(3)
        at_t.log_A = at_t.log_A + torch.einsum("bkip,ib->bkp", drift, torch.stack(hats))
        return at_t.velocity(x, t)

    def detach(self) -> "DriftingPolicy":
        """The same policy without a gradient."""
        return DriftingPolicy(self.policy.detach(), self.drift.detach())

    def drop(self, mask: Tensor) -> "DriftingPolicy":
        """Without the components where mask, (B, K) bool, is True."""
        return DriftingPolicy(self.policy.drop(mask), self.drift)

    def temperature(self, T: float) -> "DriftingPolicy":
        """Sharper for T in (0, 1): weights to the power 1/T at every t."""
        return DriftingPolicy(self.policy.temperature(T), self.drift / T)
