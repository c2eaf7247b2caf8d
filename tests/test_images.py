"""common/images.py: one reader of image files."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.images import list_images, read_image, square


def test_order_is_that_of_code_points_and_hidden_folders_are_skipped(tmp_path):
    names = "b/1.jpeg B/1.png a.PNG ._a.png .hidden/1.png @eaDir/1.png b/png"
    for name in names.split():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    found = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert found == ["B/1.png", "a.PNG", "b/1.jpeg"]
    with pytest.raises(ValueError, match="holds no image"):
        list_images(tmp_path / ".hidden" / "none")


def test_sixteen_bits_alpha_and_orientation(tmp_path):
    wide = np.array([[0, 257, 65535]], np.uint16)
    Image.fromarray(wide).save(tmp_path / "16.png")
    assert read_image(tmp_path / "16.png")[..., 0].tolist() == [[0, 1, 255]]

    clear = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    Image.fromarray(clear).save(tmp_path / "alpha.png")
    assert read_image(tmp_path / "alpha.png").tolist() == [
        [[255, 0, 0], [255, 255, 255], [204, 204, 204]]
    ]

    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    palette.save(tmp_path / "palette.png", transparency=1)
    assert read_image(tmp_path / "palette.png").tolist() == [[[10, 20, 30], [255, 255, 255]]]

    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)).save(
        tmp_path / "turned.png", exif=exif
    )
    assert read_image(tmp_path / "turned.png")[..., 0].tolist() == [[3, 0], [4, 1], [5, 2]]


@pytest.mark.parametrize("kind", ["cut", "text", "float"])
def test_the_file_at_fault_is_named(tmp_path, kind):
    path = tmp_path / "bad.tif"
    Image.fromarray(np.zeros((64, 64), np.float32)).save(path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-8000])
    if kind == "text":
        path.write_text("no image")
    with pytest.raises(ValueError, match="bad.tif cannot be read as an image"):
        read_image(path)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.png")


def test_the_centre_square():
    """A constant per column keeps its order; the middle of a wide image stays in the middle."""
    ramp = torch.arange(0, 240, dtype=torch.uint8).repeat(80, 1)[..., None].expand(-1, -1, 3)
    found = square(ramp, 40)
    assert found.shape == (40, 40, 3) and found.dtype == torch.uint8
    assert found[:, :, 0].float().mean().item() == pytest.approx(119.5, abs=1)
    assert (found[0, :, 0].diff() > 0).all()
    assert torch.equal(square(ramp[:, 80:160], 80), ramp[:, 80:160])
