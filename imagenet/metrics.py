"""FID, Inception Score, precision and recall of ImageNet samples (features: common/frechet.py).

The reference is the .npz of the ADM evaluation suite or a folder of images. Precision and recall
are those of ADM (arXiv 1904.06991): the same features, the 3 nearest neighbours. Inception Score:
in splits of 5000. Features stay on the device. The tiny model has a feature network of its own,
with the statistics of its training set (common/fashion.py).
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import fashion, frechet
from common.frechet import FEATURES, full_precision, gaussian_distance, inception_features, moments
from common.images import list_images, read_image

NEIGHBOURS = 3
SPLIT = 5000  # images of a split of the Inception Score
BATCH = 64  # images at once


class Reference(NamedTuple):
    """What samples are compared with: moments of features of real images, and the features."""

    name: str  # of the Frechet distance: "fid", for the tiny model "frechet_distance"
    judge: Callable  # uint8 (n, C, H, W) -> features (n, D), logits (n, classes)
    mean: Tensor  # (D,)
    covariance: Tensor  # (D, D)
    features: Tensor | None = None  # (m, D); precision and recall need them


def open_reference(path: str | Path | None, device: torch.device) -> Reference:
    """The Inception network and what a folder or .npz holds; None: those of the tiny model.

    path: a folder of images of one size, or an .npz with images (arr_0: uint8 (n, H, W, 3)),
        statistics (mu (2048,), sigma (2048, 2048)) or both.
    Raises: FileNotFoundError or ValueError, with the file's name, for what is something else.
    """
    if path is None:
        known = fashion.load_features(device=device)
        return Reference("frechet_distance", known.judge, known.mean, known.covariance)
    if Path(path).is_dir():
        batches, known = read_folder(path), None
    else:
        batches, known = read_npz(path)
    inception, features = frechet.load_inception(device), None
    if batches is not None:
        features, _ = inception_features(inception, batches, device)
    return Reference("fid", inception, *(known or moments(features)), features)


def read_folder(folder: str | Path) -> Iterator[Tensor]:
    """Yields batches uint8 (n, H, W, 3)."""
    files = list_images(folder)
    shape = read_image(files[0]).shape
    for i in range(0, len(files), BATCH):
        images = {file: read_image(file) for file in files[i : i + BATCH]}
        for file, image in images.items():
            if image.shape != shape:
                raise ValueError(f"{file} is {tuple(image.shape)}, the first is {tuple(shape)}")
        yield torch.stack(list(images.values()))


def read_npz(path: str | Path) -> tuple[list[Tensor] | None, tuple[Tensor, Tensor] | None]:
    """Batches of images uint8 (n, H, W, 3), and mean and covariance of features; None: not there.

    Raises: ValueError, with the file's name, for one that is damaged or holds something else.
    """
    try:
        with np.load(path) as file:  # allow_pickle stays off
            names = [name for name in ("arr_0", "mu", "sigma") if name in file]
            found = {name: torch.from_numpy(file[name]) for name in names}
    except FileNotFoundError:
        raise
    except Exception as error:  # each part of a damaged .npz has errors of its own
        raise ValueError(f"--reference {path} is no readable .npz: {error}") from error
    images = found.get("arr_0")
    known = (found["mu"], found["sigma"]) if {"mu", "sigma"} <= found.keys() else None
    wrong = images is None and known is None
    wrong |= images is not None and (images.dtype, images.shape[3:]) != (torch.uint8, (3,))
    shapes = [] if known is None else [tuple(value.shape) for value in known]
    wrong |= shapes not in ([], [(FEATURES,), (FEATURES, FEATURES)])
    if wrong:
        held = {name: (str(value.dtype), tuple(value.shape)) for name, value in found.items()}
        raise ValueError(
            f"--reference {path} holds {held}; it needs arr_0, uint8 (n, H, W, 3), "
            f"or mu ({FEATURES},) and sigma ({FEATURES}, {FEATURES})"
        )
    return images.split(BATCH) if images is not None else None, known


def measure(
    images: Tensor, labels: Tensor, reference: Reference, device: torch.device
) -> dict[str, float]:
    """The metrics of images uint8 (n, H, W, C) with labels (n,).

    ImageNet: FID and Inception Score, precision and recall where the reference has images. Tiny:
    Frechet distance, and the share of images that are recognised as their class.
    """
    features, logits = inception_features(reference.judge, images.split(BATCH), device)
    distance = gaussian_distance(*moments(features), reference.mean, reference.covariance)
    found = {reference.name: distance}
    if reference.name != "fid":
        recognised = logits.argmax(1).cpu() == labels
        return found | {"recognition_rate": recognised.float().mean().item()}
    found["inception_score"] = inception_score(logits)
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
    blocks of at most 0.5 GB.
    """
    if min(len(features), len(real)) <= NEIGHBOURS:
        raise ValueError(f"precision and recall need more than {NEIGHBOURS} images on both sides")
    size = max(1, 2**27 // len(real))
    with full_precision():
        near = [
            torch.cdist(part, real).kthvalue(NEIGHBOURS + 1).values for part in real.split(size)
        ]
        reach = torch.cat(near)  #  (m,); the nearest one is the point itself
        inside = [(torch.cdist(part, real) <= reach).any(1) for part in features.split(size)]
    return torch.cat(inside).float().mean().item()
