"""check_teacher: a right adapter passes; each mistake that it names is found when it is made."""

import pytest
import torch

from common.teachers import check_teacher, integrate_teacher
from toy_2d import make_density

DENSITY = make_density("ring")
CHECKS = ["t direction", "sign", "scale", "x_0 = x - t u", "near t = 1", "own sampler"]


def right(x, t):
    return DENSITY.velocity(x, t)


def column(t):
    return t[:, None]


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    x_0, noise = DENSITY.sample(1000, generator), torch.randn(100, 2, generator=generator)
    return x_0, noise, integrate_teacher(right, noise, 100, solver="heun")


def problems(teacher, data, **options):
    x_0, noise, end = data
    generator = torch.Generator().manual_seed(1)
    found = check_teacher(teacher, x_0, noise, end, generator=generator, **options)
    assert list(found) == CHECKS
    return {name: result for name, result in found.items() if result != "ok"}


@pytest.mark.parametrize("name", ["ring", "checkerboard", "spiral"])
def test_an_exact_teacher_passes(name):
    density, generator = make_density(name), torch.Generator().manual_seed(2)
    noise = torch.randn(100, 2, generator=generator)
    end = integrate_teacher(density.velocity, noise, 100, solver="heun")
    found = check_teacher(density.velocity, density.sample(1000, generator), noise, end)
    assert set(found.values()) == {"ok"}


MISTAKES = {
    "t runs the other way": (lambda x, t: right(x, 1 - t), {"t direction"}),
    "sign": (lambda x, t: -right(x, t), {"sign"}),
    "t = 1 is data": (lambda x, t: -right(x, 1 - t), {"t direction", "sign"}),
    "scale of the output": (lambda x, t: 2 * right(x, t), {"scale"}),
    "scale of t": (lambda x, t: right(x, t / 1000), {"scale"}),
    "output is eps": (lambda x, t: x + (1 - column(t)) * right(x, t), {"x_0 = x - t u"}),
    "output is x_0": (lambda x, t: x - column(t) * right(x, t), {"x_0 = x - t u"}),
    "another teacher": (lambda x, t: right(x, t) + 0.1, set()),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_finds_the_mistake(name, data):
    teacher, wrong = MISTAKES[name]
    found = problems(teacher, data)
    if wrong:
        assert found.pop("near t = 1").startswith("not checked")
    assert found.keys() == wrong | {"own sampler"}


def test_finds_an_input_that_is_not_scaled(data):
    assert "x_0 = x - t u" in problems(lambda x, t: right(2 * x, t), data)


def from_ddpm(x, t, error, limit):
    """A noise predictor that is off by `error`, as u; x_0 is clamped to [-limit, limit].

    Its largest noise level has alpha = 0.0064: that of 1000 steps of a linear schedule.
    """
    t = column(t)
    alpha = (1 - t).clamp(min=0.0064)
    eps = x + (1 - t) * right(x, t[:, 0]) + error
    x_0 = ((x - t * eps) / alpha).clamp(-limit, limit)
    return (x - x_0) / t


def test_near_noise_a_small_error_of_eps_is_a_large_one_of_x_0(data):
    x_0, _, _ = data
    limit = float(x_0.abs().max())
    assert "near t = 1" not in problems(lambda x, t: from_ddpm(x, t, 0.0, 1e9), data)
    # 0.05 / 0.0064 = 7.8 at t = 1; no coordinate of the ring is above 2.1.
    found = problems(lambda x, t: from_ddpm(x, t, 0.05, 1e9), data)["near t = 1"]
    assert "RMS 7.8" in found or "RMS 7.9" in found
    assert f"{limit:.3g}" in found
    assert "clamp" in found
    assert "near t = 1" not in problems(lambda x, t: from_ddpm(x, t, 0.05, limit), data)


def test_a_teacher_that_is_not_finite_at_noise(data):
    def teacher(x, t):
        y = x / (1 - column(t))  # the input of EDM
        return right((1 - column(t)) * y, t)

    assert problems(teacher, data)["near t = 1"].startswith("not finite at t = 1.0")


def test_own_sampler_is_compared_on_its_own_schedule(data):
    x_0, noise, _ = data
    end = integrate_teacher(right, noise, 6, shift=3.0)
    assert problems(right, (x_0, noise, end), steps=6, shift=3.0) == {}
    assert problems(right, (x_0, noise, end), steps=6).keys() == {"own sampler"}


def test_works_on_images_and_without_a_sampler():
    """Gaussian data: u is linear in x."""
    std, x_0 = 0.5, 0.5 * torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(3))

    def teacher(x, t):
        t = t[:, None, None, None]
        variance = ((1 - t) * std) ** 2 + t**2
        return (t - (1 - t) * std**2) / variance * x

    found = check_teacher(teacher, x_0, generator=torch.Generator().manual_seed(4))
    assert found.pop("own sampler").startswith("not checked")
    assert set(found.values()) == {"ok"}
