"""common/plots.py: figures without pyplot, and pictures of images with the right pixels."""

import os
import subprocess
import sys

import numpy as np
import torch
from PIL import Image

from common import plots

SCRIPT = """
import sys
from common.plots import new_figure, save_figure
figure, axis = new_figure()
axis.plot([0, 1], [0, 1])
save_figure(figure, sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
"""


def test_a_figure_does_not_need_the_backend_of_the_environment(tmp_path):
    env = {**os.environ, "MPLBACKEND": "module://no_such.backend"}
    run = [sys.executable, "-c", SCRIPT, str(tmp_path / "figure.png")]
    subprocess.run(run, env=env, check=True)
    assert Image.open(tmp_path / "figure.png").size == (8.6 * plots.DPI, 3.3 * plots.DPI)


def test_an_image_grid_has_the_pixels_of_its_images(tmp_path):
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    plots.save_image_grid(images, tmp_path / "grid.png", columns=3, padding=2)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 6 + 2, 3 * 6 + 2, 3)
    for i, image in enumerate(images):
        y, x = 2 + i // 3 * 6, 2 + i % 3 * 6
        assert (grid[y : y + 4, x : x + 4] == image.permute(1, 2, 0).numpy()).all()
    assert (grid[0] == 255).all()


def test_images_become_bytes_by_rounding():
    images = torch.tensor([-7.0, -1, 0.0039, 0, 1, 7])
    assert plots.to_uint8(images).tolist() == [0, 0, 128, 128, 255, 255]


def test_colors_follow_the_noise_smoothly():
    noise = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    colors = plots.colors_of(noise)
    assert colors.shape == (500, 3) and colors.min() >= 0 and colors.max() <= 1
    assert np.abs(plots.colors_of(noise + 1e-3) - colors).max() < 1e-2
    corners = plots.colors_of(torch.tensor([[-9.0, -9], [-9, 9], [9, -9], [9, 9]]))
    distances = np.abs(corners[:, None] - corners[None]).sum(-1) + 9 * np.eye(4)
    assert distances.min() > 0.5


def test_a_users_dollar_signs_are_no_mathematics():
    figure, axis = plots.new_figure()
    for text in ("costs $5 and $6", "a $ b", r"\$x^2$", "$\\bad{$"):
        axis.set_title(plots.plain(text))
        figure.canvas.draw()  # matplotlib raises ValueError for mathematics that it cannot read
        shown, is_math = axis.title._preprocess_math(axis.get_title())
        assert not is_math and shown == text


def test_image_rows_shows_every_image_at_its_place():
    rows = {"a": torch.full((3, 1, 4, 4), -1.0), "b": np.full((3, 4, 4, 3), 200, np.uint8)}
    rows["a"][2] = 1.0
    figure = plots.image_rows(rows, "title", columns=("x", "y", "z"))
    board = figure.axes[0].images[0].get_array()
    assert board.shape == (2 * 6, 3 * 6, 3)
    tiles = board.reshape(2, 6, 3, 6, 3)[:, 1:-1, :, 1:-1]  #  without the white between
    assert (tiles[0, :, :2] == 0).all() and (tiles[0, :, 2] == 255).all()
    assert (tiles[1] == 200).all()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["x", "y", "z"]
