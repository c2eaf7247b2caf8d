"""Solutions of notebook 4."""

from piflow_minimal import flow_map_schedule


def bill(n):
    """Exercise 1: n steps, and a second evaluation of each inside the guidance interval.

    0.8 itself is inside: in float32, 1 - 1/5 would have to be compared with care.
    """
    return n + sum(1 - i / n <= 0.8 for i in range(n))


def substeps(error):
    """Exercise 2: the smallest power of two whose error is at most 0.02."""
    n = 1
    while error(n) > 0.02:
        n *= 2
    return n


def t_dst_and_m():
    """Exercise 3: the last step goes to t = 0, and keeps nothing of the noise there."""
    schedule = flow_map_schedule(1, h=1.0)
    return float(schedule.t_dst[0]), float(schedule.m[0])
