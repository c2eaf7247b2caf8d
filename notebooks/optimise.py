"""The training loop of notebooks 6 and 6b for their small teachers and students."""

import torch
from torch import nn


def optimise(net, iterations, loss_of, lr=2e-3, seed=0):
    """Adam with a cosine; loss_of(generator) -> scalar. -> the network, frozen."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.9, 0.99))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        loss = loss_of(generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        cosine.step()
    return net.eval().requires_grad_(False)
