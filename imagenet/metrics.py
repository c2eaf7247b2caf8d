"""FID, Inception Score, precision and recall of ImageNet samples (features: common/frechet.py).

The reference is the .npz of the ADM evaluation suite or a folder of images. Precision and recall
are those of ADM (arXiv 1904.06991): the same features, the 3 nearest neighbours. Inception Score:
in splits of 5000. Features stay on the device.
"""

import math
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import frechet
from common.frechet import FEATURES, full_precision, gaussian_distance, inception_features, moments
from common.images import list_images, read_image

NEIGHBOURS = 3
SPLIT = 5000  # images of a split of the Inception Score
BATCH = 64  # images at once


class Reference(NamedTuple):
    """What samples are compared with: features of its images, if it has any, and their moments."""

    features: Tensor | None  # (n, 2048)
    mean: Tensor  # (2048,)
    covariance: Tensor  # (2048, 2048)


def open_reference(
    path: str | Path, weights: str | Path | None, device: torch.device
) -> tuple[Callable, Reference]:
    """The Inception network of `load_inception`, and what a folder or .npz holds.

    path: a folder of images of one size, or an .npz with images (arr_0: uint8 (n, H, W, 3)),
        statistics (mu (2048,), sigma (2048, 2048)) or both.
    Raises: FileNotFoundError or ValueError, with the file's name, for what is something else.
    """
    if Path(path).is_dir():
        images, known = read_folder(path), None
    else:
        images, known = read_npz(path)
    inception = frechet.load_inception(weights, device)
    features = None
    if images is not None:
        features, _ = inception_features(inception, images, device)
    return inception, Reference(features, *(known or moments(features)))


def read_folder(folder: str | Path) -> Iterator[Tensor]:
    """Yields batches uint8 (n, H, W, 3). Raises: ValueError for images of several sizes."""
    files = list_images(folder)
    first = read_image(files[0]).shape
    for i in range(0, len(files), BATCH):
        images = [read_image(file) for file in files[i : i + BATCH]]
        for file, image in zip(files[i : i + BATCH], images, strict=True):
            if image.shape != first:
                raise ValueError(
                    f"--reference: {files[0]} is {first[1]} x {first[0]}, {file} is "
                    f"{image.shape[1]} x {image.shape[0]}; all images must be of one size"
                )
        yield torch.stack(images)


def read_npz(
    path: str | Path,
) -> tuple[Iterable[np.ndarray] | None, tuple[Tensor, Tensor] | None]:
    """Batches of images uint8 (n, H, W, 3), and mean and covariance of features; None: not there.

    Raises: ValueError, with the file's name, for one that is damaged or holds something else.
    """
    try:
        with np.load(path) as file:  # allow_pickle stays off
            found = {name: file[name] for name in ("arr_0", "mu", "sigma") if name in file}
    except (zipfile.BadZipFile, ValueError, EOFError, TypeError, AttributeError) as error:
        raise ValueError(f"--reference {path} is no readable .npz: {error}") from error
    images = found.get("arr_0")
    shapes = {"mu": (FEATURES,), "sigma": (FEATURES, FEATURES)}
    known = [found[name] for name in shapes if name in found]
    if images is None and len(known) < 2:
        raise ValueError(f"--reference {path} has neither images (arr_0) nor mu and sigma")
    if images is not None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(
                f"--reference {path}: arr_0 is {images.dtype} {images.shape}; images are uint8 "
                "(n, H, W, 3)"
            )
        images = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
    for name, shape in shapes.items():
        if name in found and found[name].shape != shape:
            raise ValueError(f"--reference {path}: {name} is {found[name].shape}, must be {shape}")
    return images, tuple(map(torch.from_numpy, known)) if len(known) == 2 else None


def imagenet_metrics(
    inception: Callable, images: Tensor, reference: Reference, device: torch.device
) -> dict[str, float]:
    """FID and Inception Score of images uint8 (n, H, W, 3); precision and recall where the
    reference has images.
    """
    features, logits = inception_features(inception, images.split(BATCH), device)
    found = {
        "fid": gaussian_distance(*moments(features), reference.mean, reference.covariance),
        "inception_score": inception_score(logits),
    }
    if reference.features is not None:
        found["precision"] = precision(features, reference.features)
        found["recall"] = precision(reference.features, features)
    return found


def inception_score(logits: Tensor) -> float:
    """exp(E KL(p(y|x) || p(y))) of logits (n, classes), averaged over splits of 5000, in order."""
    scores = []
    for part in logits.cpu().split(SPLIT):
        log_p = part.double().log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp().item())
    return sum(scores) / len(scores)


def precision(features: Tensor, real: Tensor) -> float:
    """The share of features (n, D) near one of `real` (m, D); recall with both exchanged.

    Near: not farther than that one's third neighbour in its own set. Distances are computed in
    blocks of at most 0.5 GB. Raises: ValueError for fewer than 4 of either.
    """
    if min(len(features), len(real)) <= NEIGHBOURS:
        given = f"{len(features)} images and {len(real)} references"
        raise ValueError(f"precision and recall of {given}: both need at least {NEIGHBOURS + 1}")
    size = max(1, 2**27 // len(real))
    with full_precision():
        near = [
            torch.cdist(part, real).kthvalue(NEIGHBOURS + 1).values for part in real.split(size)
        ]
        reach = torch.cat(near)  #  (m,); the nearest one is the point itself
        inside = [(torch.cdist(part, real) <= reach).any(1) for part in features.split(size)]
    return torch.cat(inside).float().mean().item()
