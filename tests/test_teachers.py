"""check_teacher: a right adapter passes; each mistake that it names is found when it is made."""

import pytest
import torch

from common.teachers import check_teacher, integrate_teacher
from toy_2d import make_density

DENSITY = make_density("ring")


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
    assert list(found) == ["t direction", "sign", "scale", "x_0 = x - t u", "own sampler"]
    return {name for name, result in found.items() if result != "ok"}


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
    assert problems(teacher, data) == wrong | {"own sampler"}


def test_finds_an_input_that_is_not_scaled(data):
    assert "x_0 = x - t u" in problems(lambda x, t: right(2 * x, t), data)


def test_own_sampler_is_compared_on_its_own_schedule(data):
    x_0, noise, _ = data
    end = integrate_teacher(right, noise, 6, shift=3.0)
    assert problems(right, (x_0, noise, end), steps=6, shift=3.0) == set()
    assert problems(right, (x_0, noise, end), steps=6) == {"own sampler"}


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
