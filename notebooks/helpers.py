"""What the notebooks share: checks, states of a rollout, and the small students of notebook 2."""

import math

import numpy as np
import torch
from matplotlib.colors import to_rgb
from torch import nn

from common.teachers import endpoint_rmse
from piflow_minimal import GaussianMixture, GMFlowPolicy, pi_id_loss, rollout, sample
from toy_2d import Student, energy_distance


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


def draw_field(axis, velocity, t, color, limit=3.0):
    """Unit arrows along -u on [-limit, limit]^2: where a state at noise level t is about to move.

    velocity: (x (B, 2), t (B,)) -> u (B, 2).
    """
    line = torch.linspace(-0.9 * limit, 0.9 * limit, 15)
    x = torch.cartesian_prod(line, line)  #                                       (225, 2)
    u = velocity(x, torch.full((len(x),), t))
    move = -u / u.norm(dim=1, keepdim=True).clamp(min=1e-6)
    options = {"angles": "xy", "scale_units": "xy", "scale": 11 / limit, "pivot": "mid"}
    axis.quiver(*x.T, *move.T, color=color, width=0.005, **options)


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


# ---- Notebooks 2 and 2b --------------------------------------------------------------------------


def small_student(seed=0, policy="gmflow", n=8, width=64, depth=2, nfe=1):
    """The student of `toy_2d`, small: an MLP, (x_src (B, 2), t_src (B,)) -> policy."""
    torch.manual_seed(seed)
    return Student(policy, n, nfe, width, depth, frequencies=32)


def train(student, loss_of, iterations, lr=2e-3, seed=0):
    """Adam with a cosine. loss_of(student, generator, progress in [0, 1)) -> scalar."""
    generator = torch.Generator().manual_seed(100 + seed)
    optimizer = torch.optim.Adam(student.parameters(), lr=lr, betas=(0.9, 0.99))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for i in range(iterations):
        loss = loss_of(student, generator, i / iterations)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        cosine.step()
    return student.eval()


@torch.no_grad()
def measure(student, density, noise, teacher_end, nfe=1):
    """Endpoint RMSE to the teacher, energy distance to its ends and, if known, the share inside."""
    solver = student.kind.solver
    end = sample(student, noise, nfe, total_substeps=64, solver=solver)
    row = {"endpoint RMSE": endpoint_rmse(end, teacher_end)}
    row["energy distance"] = energy_distance(end, teacher_end)
    if hasattr(density, "inside"):
        row["inside"] = float(density.inside(end).float().mean())
    return row


def report(name, rows):
    """Prints mean ± standard deviation of measurements, one for every seed."""
    cells = []
    for key in rows[0]:
        values = torch.tensor([row[key] for row in rows])
        spread = f" ± {values.std():.4f}" if len(rows) > 1 else ""
        cells.append(f"{key} {values.mean():.4f}{spread}")
    print(f"{name:42s}" + "   ".join(cells))


class Curves:
    """Eight smooth curves of 32 points, each with Gaussian noise of std 0.1. States: (B, 1, 32)."""

    def __init__(self, std=0.1):
        g = torch.Generator().manual_seed(0)
        z = torch.linspace(0, 2 * math.pi, 32)
        a = torch.randn(8, 3, generator=g)
        phase = 2 * math.pi * torch.rand(8, 3, generator=g)
        c = sum(a[:, i : i + 1] * torch.sin((i + 1) * z + phase[:, i : i + 1]) for i in range(3))
        self.curves = c / c.std()  #                                               (8, 32)
        self.std = std

    def velocity(self, x, t):
        """The exact teacher. x: (B, 1, 32), t: (B,) -> u."""
        x, t = x[:, 0], t.view(-1, 1).clamp(min=1e-6)
        alpha = 1 - t
        var = (alpha * self.std) ** 2 + t**2
        square = self.curves.square().sum(1)
        mean = (alpha / var * x @ self.curves.T - alpha**2 / (2 * var) * square).softmax(1)
        mean = mean @ self.curves
        x_0 = mean + alpha * self.std**2 / var * (x - alpha * mean)
        return ((x - x_0) / t)[:, None]


class PixelStudent(nn.Module):
    """An MLP -> a GMFlow policy with K = 4 components at each of the 32 pixels by itself."""

    def __init__(self, seed, k=4, width=64):
        super().__init__()
        torch.manual_seed(seed)
        self.k = k
        hidden = [nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.body = nn.Sequential(*hidden)
        self.head = nn.Linear(width, 64 * k + 1)
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            self.head.bias[: 32 * k] = torch.randn(k, 1).expand(k, 32).flatten()
            self.head.bias[32 * k :] = 0
            self.head.bias[-1] = math.log(0.3)

    def forward(self, x_src, t_src):
        output, k = self.head(self.body(x_src[:, 0])), self.k
        x_0, log_weights = output[:, :-1].view(-1, 2, k, 1, 32).unbind(1)  #       (B, K, 1, 32)
        u = (x_src[:, None] - x_0) / t_src.view(-1, 1, 1, 1)
        mixture = GaussianMixture(u, output[:, -1].view(-1, 1, 1, 1), log_weights)
        return GMFlowPolicy(mixture, x_src, t_src)
