"""Frechet distance between sets of features, and the Inception network behind the FID.

The network is that of torch-fidelity. It carries the original TensorFlow weights and resizes as
TensorFlow did, so that its FID is the one that papers report. Matrix products never use TF32.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

FEATURES = 2048  # of the Inception network


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Within the block, float32 matrix products and convolutions are float32, not TF32."""
    matmul = torch.get_float32_matmul_precision()
    convolution = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of features (n, D), in float64; on MPS on the CPU."""
    if features.device.type == "mps":  # it has no float64
        features = features.cpu()
    features = features.double()
    return features.mean(0), features.T.cov()


def gaussian_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Frechet distance of two Gaussians, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    In float64, on the device of mean1. Raises: ValueError if anything is not finite.
    """
    device = "cpu" if mean1.device.type == "mps" else mean1.device
    given = (mean1, cov1, mean2, cov2)
    mean1, cov1, mean2, cov2 = (value.to(device).double() for value in given)
    if not all(value.isfinite().all() for value in (mean1, cov1, mean2, cov2)):
        raise ValueError("mean or covariance of a set of features is not finite")
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross).item()


def load_inception(device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """uint8 images (B, 3, H, W) -> (features (B, 2048), logits (B, 1008)).

    Its weights are downloaded into the cache of torch.hub; they are not unpickled.
    """
    from torch_fidelity import FeatureExtractorInceptionV3

    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # whatever torch-fidelity passes to torch.load
    before = os.environ.get(variable, "0")
    os.environ[variable] = "1"
    try:
        net = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    finally:
        os.environ[variable] = before
    return net.to(device)


@torch.no_grad()
def inception_features(
    net: Callable, batches: Iterable[np.ndarray | Tensor], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Batches uint8 (n, H, W, C) -> features (N, D) and logits (N, classes), on the device.

    net: of `load_inception`, or another with its signature.
    """
    features, logits = [], []
    with full_precision():
        for pixels in tqdm(batches, desc="Features", disable=None):
            images = torch.as_tensor(pixels).permute(0, 3, 1, 2)
            found = net(images.to(device))
            features.append(found[0])
            logits.append(found[1])
    return torch.cat(features), torch.cat(logits)
