"""The Fashion-MNIST stand-in and the numbers that judge samples."""

import pytest
import torch
from safetensors.torch import save_file

from imagenet import fashion
from imagenet.checkpoints import load_dit
from imagenet.dit import guided_teacher


def test_latents_are_two_by_two_blocks_of_pixels():
    images = torch.arange(28 * 28).float().view(1, 1, 28, 28)
    latents = fashion.to_latents(images)
    assert latents.shape == (1, 4, 14, 14)
    assert latents[0, 2, 3, 5] == images[0, 0, 2 * 3 + 1, 2 * 5]  # channel 2: lower left pixel
    assert torch.equal(fashion.to_images(latents), images)


def test_frechet_distance_of_commuting_gaussians():
    """For diagonal covariances it is |m1 - m2|^2 + sum (s1 - s2)^2."""
    mean, s1, s2 = torch.tensor([1.0, -2.0, 0.5]), torch.rand(3) + 1, torch.rand(3) + 1
    distance = fashion.gaussian_distance(mean, s1.square().diag(), 0 * mean, s2.square().diag())
    expected = mean.square().sum() + (s1 - s2).square().sum()
    assert distance == pytest.approx(expected.item(), rel=1e-5)


def test_shipped_teacher_draws_recognisable_classes():
    net, features = load_dit(fashion.TEACHER), fashion.load_features()
    assert features.accuracy > 0.9 and (net.config.latent_size, net.config.num_classes) == (14, 10)
    labels = torch.arange(60) % 10
    teacher = guided_teacher(net, labels, 2.5, (0.0, 0.8))
    x = torch.randn(60, 4, 14, 14, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(1, 0, 21)
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        x = x + (t_next - t) * teacher(x, t.expand(60))
    images = fashion.to_images(x)
    assert fashion.recognition_rate(images, labels, features) > 0.85
    noise = torch.randn_like(images)
    assert fashion.frechet_distance(images) < fashion.frechet_distance(noise) / 10


def test_features_that_cannot_be_used(tmp_path):
    with pytest.raises(FileNotFoundError, match="no feature network"):
        fashion.load_features(tmp_path / "features.safetensors")
    whole = fashion.FEATURES.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="cut.safetensors is not a readable safetensors"):
        fashion.load_features(tmp_path / "cut.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors does not hold"):
        fashion.load_features(tmp_path / "other.safetensors")
