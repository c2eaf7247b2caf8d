"""Solutions of notebook 2b."""

# Exercise 1: the source times of 8 evaluations that 4 evaluations do not have.
new_times = {0.875, 0.625, 0.375, 0.125}


def window_bias(u_start, u_end):
    """Exercise 2: half the change of the velocity over the window, to first order."""
    return (u_end - u_start) / 2


def last_segment(nfe, f):
    """Exercise 3: nfe - 1 segments of one length and one of f times that length fill [0, 1]."""
    return f / (nfe - 1 + f)
