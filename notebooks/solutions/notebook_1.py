"""Solutions of notebook 1."""


def velocity(means, std, log_A, x_src, t_src, x, t):
    """Exercise 1: the GMFlow policy as lines 1 to 5 write it.

    means: (B, K, C); std, t_src, t: numbers; log_A: (B, K); x_src, x: (B, C). -> (B, C).
    """
    alpha_src = 1 - t_src
    alpha = 1 - t
    m = x_src[:, None] - t_src * means  #                                   (B, K, C)
    var = (t_src * std) ** 2
    zeta = (alpha / t) ** 2 - (alpha_src / t_src) ** 2
    nu = alpha / t**2 * x - alpha_src / t_src**2 * x_src  #                 (B, C)
    d = 1 + var * zeta
    log_w = log_A + (m * (nu[:, None] - zeta * m / 2)).sum(2) / d
    w = log_w.softmax(1)  #                                                 (B, K)
    x_0 = (var * nu + (w[..., None] * m).sum(1)) / d  #                     (B, C)
    return (x - x_0) / t


def fewest_substeps(error, limit=0.01):
    """Exercise 2: the smallest power of two whose error is at most `limit`."""
    n = 1
    while error(n) > limit:
        n *= 2
    return n


def remaining(delta, t, t_end):
    """Exercise 3: the difference obeys d(delta)/dt = delta / t, so that delta / t is constant."""
    return delta * t_end / t
