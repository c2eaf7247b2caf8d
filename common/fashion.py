"""Fashion-MNIST as a stand-in for ImageNet latents, and a feature network that judges samples.

An image (1, 28, 28) in [-1, 1] becomes a "latent" (4, 14, 14) by space-to-depth: the channel count
and the patch size of the ImageNet networks, with nothing to decode. `load_features` returns the
small classifier that ships in `assets/` with the training set's feature statistics, so that the
Frechet distance and the recognition rate need no data set. The distance is no FID: compare it only
with itself.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.frechet import gaussian_distance, moments

CLASSES = (
    "t-shirt/top", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
ASSETS = Path(__file__).parent.parent / "assets"
TEACHER = ASSETS / "tiny_teacher.safetensors"
FEATURES = ASSETS / "tiny_features.safetensors"
FEATURE_WIDTH = 64


def to_latents(images: Tensor) -> Tensor:
    """(B, 1, 28, 28) -> (B, 4, 14, 14): each 2 x 2 block of pixels becomes 4 channels."""
    return F.pixel_unshuffle(images, 2)


def to_images(latents: Tensor) -> Tensor:
    """(B, 4, 14, 14) -> (B, 1, 28, 28), the inverse of `to_latents`."""
    return F.pixel_shuffle(latents, 2)


class FeatureNet(nn.Module):
    """A small convolutional classifier: images (B, 1, 28, 28) in [-1, 1] -> logits (B, 10)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(),
            nn.Linear(64 * 7 * 7, FEATURE_WIDTH), nn.ReLU(),
        )  # fmt: skip
        self.classify = nn.Linear(FEATURE_WIDTH, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.body(images))


class Features(NamedTuple):
    """The classifier, with mean (64,) and covariance (64, 64) of its training set's features."""

    net: FeatureNet
    mean: Tensor
    covariance: Tensor
    accuracy: float  # on the test set, for reading the recognition rate

    def judge(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images (B, 1, 28, 28) -> features (B, 64), logits (B, 10)."""
        features = self.net.body(pixels / 127.5 - 1)
        return features, self.net.classify(features)


def load_features(path: str | Path = FEATURES, device: torch.device | str = "cpu") -> Features:
    """Reads the shipped feature network."""
    from safetensors.torch import load_file

    state = {key: value.float() for key, value in load_file(path).items()}
    mean, covariance = state.pop("statistics.mean"), state.pop("statistics.covariance")
    accuracy = state.pop("statistics.accuracy").item()
    net = FeatureNet().eval().requires_grad_(False)
    state |= {key: value for key, value in net.state_dict().items() if "num_batches" in key}
    net.load_state_dict(state)
    return Features(net.to(device), mean.to(device), covariance.to(device), accuracy)


@torch.no_grad()
def extract(net: FeatureNet, images: Tensor, batch: int = 1000) -> tuple[Tensor, Tensor]:
    """Images (B, 1, 28, 28) -> features (B, 64) and predicted classes (B,)."""
    features = torch.cat([net.body(part.clamp(-1, 1)) for part in images.split(batch)])
    return features, net.classify(features).argmax(dim=1)


def frechet_distance(images: Tensor, features: Features | None = None) -> float:
    """64-feature Frechet distance between images (B, 1, 28, 28) and the training set; B >> 64."""
    features = features or load_features(device=images.device)
    values, _ = extract(features.net, images)
    return gaussian_distance(*moments(values), features.mean, features.covariance)


def recognition_rate(images: Tensor, labels: Tensor, features: Features | None = None) -> float:
    """The fraction of images (B, 1, 28, 28) whose predicted class is labels (B,)."""
    features = features or load_features(device=images.device)
    _, predicted = extract(features.net, images)
    return (predicted == labels).float().mean().item()
