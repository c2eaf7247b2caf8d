"""Solutions of notebook 3."""

import torch

# Exercise 1: a Heun step; one velocity; one a query; two queries in each of four segments; guidance
# doubles (c).
COUNTS = (2, 1, 3, 8, 6)


def average_velocity(teacher, x, t, r, steps=64):
    """Exercise 2: the average velocity from t to r. x: (B, 2); t, r: numbers. -> (B, 2)."""
    start = x
    for i in range(steps):
        now = torch.full((len(x),), t - (t - r) * i / steps)
        x = x - (t - r) / steps * teacher(x, now)
    return (start - x) / (t - r)


def optimum(a, b, q):
    """Exercise 3: the mean, and the root of its variance over two entries."""
    return q * a + (1 - q) * b, (q * (1 - q) * (a - b).square().sum() / 2).sqrt()
