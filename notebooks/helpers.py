"""What the notebooks share: checks, states of a rollout, and the small students of notebook 2."""

import numpy as np
import torch
from matplotlib.colors import to_rgb

from piflow_minimal import GaussianMixture, GMFlowPolicy, pi_id_loss, rollout


def check(claim, a, b, tolerance=1e-9):
    """Prints the largest difference of a and b. Raises: AssertionError above the tolerance."""
    difference = float((torch.as_tensor(a) - torch.as_tensor(b)).abs().max())
    assert difference < tolerance, (claim, difference)
    print(f"{claim}: largest difference {difference:.0e}")


def normal(x, mean, std):
    """The density of a Gaussian at x."""
    return torch.exp(-((x - mean) ** 2) / (2 * std**2)) / (std * (2 * torch.pi) ** 0.5)


def normalised(density, step):
    """The values of a density on a grid, divided by their integral."""
    return density / (density.sum() * step)


def trajectory(policy, x, tau_start=1.0, substeps=512):
    """All states of a rollout by Euler down to t = 0, no network. -> (steps + 1, B, ...)."""
    states = []
    keep = lambda i, tau, x: states.append(x)  # noqa: E731
    rollout(policy, x, tau_start, 0.0, total_substeps=substeps, callback=keep)
    return torch.stack(states)


def shade(axis, best, colors, limit=1.9):
    """Shades the plane by best: (P, 2) -> (P,), the index of a colour."""
    line = torch.linspace(-limit, limit, 96)
    index = best(torch.cartesian_prod(line, line)).view(96, 96).T  #  rows: y
    pixels = np.array([to_rgb(color) for color in colors])[index]
    axis.imshow(pixels, extent=(-limit, limit) * 2, origin="lower", alpha=0.45)


def nonnegative(A, b, tolerance=1e-10):
    """w >= 0 that minimises |A w - b| (Lawson and Hanson), rows of A scaled to 1. float64 tensors.

    At most as many weights are positive as A has rows.
    """
    size = A.abs().amax(1)
    A = (A / size[:, None]).numpy()
    b = (b / size).numpy()
    w = np.zeros(A.shape[1])
    used = []
    while True:
        gradient = A.T @ (b - A @ w)
        gradient[used] = -np.inf
        if gradient.max() < tolerance or len(used) == len(A):
            return torch.from_numpy(w)
        used.append(int(gradient.argmax()))
        while True:
            z = np.linalg.lstsq(A[:, used], b, rcond=None)[0]
            if z.min() > 0:
                break
            below, old = z <= 0, w[used]
            z = old + (z - old) * (old[below] / (old[below] - z[below])).min()
            used = [k for k, value in zip(used, z, strict=True) if value > 1e-14]
            w = np.where(np.isin(np.arange(len(w)), used), w, 0)
        w = np.zeros(len(w))
        w[used] = z


def overfit(k, teacher, x_src, iterations):
    """GMFlow policies with free parameters for each row of x_src, trained by pi-ID."""
    generator = torch.Generator().manual_seed(1)
    b, u = len(x_src), teacher(x_src, torch.ones(len(x_src)))
    means = u[:, None] + 0.5 * torch.randn(b, k, 2, generator=generator)
    parameters = [means, torch.full((b, 1, 1), 0.05).log(), torch.zeros(b, k, 1)]
    parameters = [p.requires_grad_() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    options = {"total_substeps": 32, "solver": "deis", "generator": generator}
    for _ in range(iterations):
        policy = GMFlowPolicy(GaussianMixture(*parameters), x_src, 1.0)
        loss = pi_id_loss(policy, teacher, 1.0, 1.0, **options).loss * b  # rows are separate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return GMFlowPolicy(GaussianMixture(*parameters), x_src, 1.0).detach()
