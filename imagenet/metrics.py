"""FID, Inception Score, precision, recall; the Frechet distance of the tiny model.

ImageNet: features of the Inception network of torch-fidelity. It carries the original TensorFlow
weights and resizes as TensorFlow did, so that its FID is the one that papers report. The reference
is the .npz of the ADM evaluation suite or a folder of images. Precision and recall are those of ADM
(arXiv 1904.06991): the same features, the 3 nearest neighbours. Inception Score: in splits of 5000.

Tiny model: the feature network in assets/. Its distance is no FID: compare it only with itself.

Features stay on the device, and matrix products of metrics never use TF32.
"""

import math
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import fashion
from common.frechet import (
    FEATURES,
    full_precision,
    gaussian_distance,
    inception_features,
    moments,
)
from imagenet.cache_latents import image_size, is_image, open_image

NEIGHBOURS = 3
SPLIT = 5000  # images of a split of the Inception Score

# ---------------------------------------------------------------------------------------------
# Distances between sets of features
# ---------------------------------------------------------------------------------------------


def precision_recall(features: Tensor, real: Tensor) -> tuple[float, float]:
    """Shares of generated features (n, D) near a real one, and of real ones near a generated one.

    Near: not farther than that one's third neighbour in its own set. Distances are computed in
    blocks of at most 0.5 GB. Raises: ValueError for fewer than 4 of either.
    """
    if min(len(features), len(real)) <= NEIGHBOURS:
        given = f"{len(features)} images and {len(real)} references"
        raise ValueError(f"precision and recall of {given}: both need at least {NEIGHBOURS + 1}")

    def blocks(points: Tensor, centers: Tensor) -> Iterator[Tensor]:
        for part in points.split(max(1, 2**27 // len(centers))):
            yield torch.cdist(part, centers)  #                       (block, len(centers))

    def radii(centers: Tensor) -> Tensor:  # the nearest one is the centre itself
        near = [d.kthvalue(NEIGHBOURS + 1).values for d in blocks(centers, centers)]
        return torch.cat(near)

    def covered(points: Tensor, centers: Tensor) -> float:
        reach = radii(centers)
        inside = [(d <= reach).any(1) for d in blocks(points, centers)]
        return torch.cat(inside).float().mean().item()

    with full_precision():
        return covered(features, real), covered(real, features)


def inception_score(logits: Tensor) -> float:
    """exp(E KL(p(y|x) || p(y))) of logits (n, classes), averaged over splits of 5000, in order."""
    scores = []
    for part in logits.cpu().split(SPLIT):
        log_p = part.double().log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp().item())
    return sum(scores) / len(scores)


# ---------------------------------------------------------------------------------------------
# The tiny model
# ---------------------------------------------------------------------------------------------


def tiny_metrics(images: np.ndarray, labels: Tensor) -> dict[str, float]:
    """Frechet distance and recognition rate of images uint8 (n, 28, 28, 1), n > 64."""
    features = fashion.load_features()
    values = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2) / 127.5 - 1
    return {
        "frechet_distance": fashion.frechet_distance(values, features),
        "recognition_rate": fashion.recognition_rate(values, labels, features),
    }


# ---------------------------------------------------------------------------------------------
# ImageNet
# ---------------------------------------------------------------------------------------------


class Reference(NamedTuple):
    """What samples are compared with: features of its images, if it has any, and their moments."""

    features: Tensor | None  # (n, 2048)
    mean: Tensor  # (2048,)
    covariance: Tensor  # (2048, 2048)


def load_reference(
    net: Callable, path: str | Path, device: torch.device, batch: int = 64
) -> Reference:
    """Reads a reference that passed `check_reference`. net: of `load_inception`.

    Raises: ValueError, with the file's name, for what is damaged.
    """
    images, known = read_reference(path, batch)
    features = None if images is None else inception_features(net, images, device)[0]
    return Reference(features, *(known or moments(features)))


def imagenet_metrics(
    net: Callable, images: np.ndarray, reference: Reference, device: torch.device, batch: int = 64
) -> dict[str, float]:
    """FID and Inception Score of images uint8 (n, H, W, 3); precision and recall where the
    reference has images. net: of `load_inception`.
    """
    batches = [images[i : i + batch] for i in range(0, len(images), batch)]
    features, logits = inception_features(net, batches, device)
    metrics = {
        "fid": gaussian_distance(*moments(features), reference.mean, reference.covariance),
        "inception_score": inception_score(logits),
    }
    if reference.features is not None:
        near = precision_recall(features, reference.features)
        metrics |= dict(zip(("precision", "recall"), near, strict=True))
    return metrics


# ---------------------------------------------------------------------------------------------
# Reference of the FID
# ---------------------------------------------------------------------------------------------


def reference_images(folder: str | Path) -> list[Path]:
    """The image files below a folder, in a fixed order; hidden files and folders are left out."""
    return sorted(file for file in Path(folder).rglob("*") if is_image(file, Path(folder)))


def check_reference(path: str | Path) -> None:
    """Before anything is sampled: image headers, or the layout of an .npz. Nothing large is read.

    Raises: ValueError, with the file's name, if it is neither a folder of images of one size nor an
        .npz of images (arr_0: uint8 (n, H, W, 3)) or statistics (mu (2048,), sigma (2048, 2048)).
    """
    if Path(path).is_dir():
        sizes = {}
        for file in reference_images(path):
            sizes.setdefault(image_size(file), file)
        if not sizes:
            raise ValueError(f"--reference {path} is a folder without images")
        if len(sizes) > 1:
            found = [f"{file.name} {w} x {h}" for (w, h), file in sizes.items()]
            raise ValueError(f"--reference {path}: images of several sizes: {', '.join(found[:3])}")
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            found = {name.removesuffix(".npy"): _npy_header(archive, name) for name in names}
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ValueError(f"--reference {path} is no readable .npz: {error}") from error
    if "arr_0" not in found and not {"mu", "sigma"} <= found.keys():
        raise ValueError(
            f"--reference {path} has neither images (arr_0) nor mu and sigma; it has "
            f"{', '.join(found) or 'nothing'}"
        )
    accepted = {"mu": (FEATURES,), "sigma": (FEATURES, FEATURES)}
    for name, (shape, dtype) in found.items():
        image = len(shape) == 4 and shape[0] > NEIGHBOURS and shape[3] == 3 and dtype == np.uint8
        if name == "arr_0" and not image:
            raise ValueError(
                f"--reference {path}: arr_0 is {dtype} {shape}; images are uint8 (n, H, W, 3)"
            )
        if name in accepted and (shape != accepted[name] or dtype.kind != "f"):
            raise ValueError(
                f"--reference {path}: {name} is {dtype} {shape}; statistics of the Inception "
                f"network are floats {accepted[name]}"
            )


def _npy_header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array in an .npz, without its content."""
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}
        shape, _, dtype = read.get(version, np.lib.format.read_array_header_2_0)(file)
    return shape, dtype


def read_reference(
    path: str | Path, batch: int = 64
) -> tuple[Iterable[np.ndarray] | None, tuple[Tensor, Tensor] | None]:
    """Batches of images uint8 (n, H, W, 3), and mean and covariance of features; None: not there.

    Raises: ValueError, with the file's name, for one that is damaged.
    """
    if Path(path).is_dir():
        files = reference_images(path)
        parts = (files[i : i + batch] for i in range(0, len(files), batch))
        return (np.stack([np.asarray(open_image(file)) for file in part]) for part in parts), None
    try:
        with np.load(path) as file:  # allow_pickle stays off
            images = file["arr_0"] if "arr_0" in file else None
            known = [file[key] for key in ("mu", "sigma") if key in file]
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ValueError(f"--reference {path} is damaged: {error}") from error
    if images is not None:
        images = [images[i : i + batch] for i in range(0, len(images), batch)]
    return images, tuple(map(torch.from_numpy, known)) if len(known) == 2 else None
