"""Solutions of notebook 6."""


def x_0_of_v(a, b, x_vp, v):
    """Exercise 1: a x_vp - b v = (a^2 + b^2) x_0. Nothing is divided by a small number."""
    return a * x_vp - b * v


DIAGNOSIS = {"A": "sign", "B": "x_0 = x - t u", "C": "scale"}  # exercise 2


def shift_of(t, tau):
    """Exercise 3: t = s tau / (1 + (s - 1) tau), solved for s."""
    return t * (1 - tau) / (tau * (1 - t))
