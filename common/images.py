"""The one reader of image files."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
HIDDEN = (".", "__MACOSX", "@eaDir")  # files and folders of notebooks, archives, a NAS


def list_images(folder: str | Path) -> list[Path]:
    """The images below a folder, in the same order on every platform; hidden ones are skipped.

    Raises: ValueError if there is none.
    """
    found = []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        names = [name for name in names if not name.startswith(HIDDEN)]
        found += [Path(root, name) for name in names if name.lower().endswith(SUFFIXES)]
    if not found:
        raise ValueError(f"{folder} holds no image; known are {', '.join(SUFFIXES)}")
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def read_image(path: str | Path) -> Tensor:
    """A file -> (H, W, 3) uint8: upright by its EXIF orientation, 16 bits as 8, alpha on white.

    Raises: ValueError that names the file if it cannot be read.
    """
    with open(path, "rb") as file:
        try:
            return torch.from_numpy(np.array(_rgb(ImageOps.exif_transpose(Image.open(file)))))
        except Exception as error:  # decoders raise nearly any kind
            raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    """16 bits as 8, alpha on white."""
    if image.mode[0] in "IF":  # I or I;16 is grey of 16 bits
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"grey values {values.min()} to {values.max()}, not of 8 or 16 bits")
        image = Image.fromarray(((values.astype(int) * 255 + 32767) // 65535).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def square(image: Tensor, side: int) -> Tensor:
    """The centre square (side, side, 3) of an image (H, W, 3) uint8.

    As in the evaluation suite of ADM: halved by boxes while it is large, then bicubic.
    """
    image = Image.fromarray(image.numpy())
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    shape = (round(image.width * scale), round(image.height * scale))
    image = image.resize(shape, Image.Resampling.BICUBIC)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    return torch.from_numpy(np.array(image.crop((left, top, left + side, top + side))))


def is_turned(path: str | Path) -> bool:
    """Whether `read_image` turns a file by its EXIF orientation."""
    with Image.open(path) as image:
        return image.getexif().get(0x0112) in range(2, 9)
