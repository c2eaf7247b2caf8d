"""GMFlow with drifting weights, against the textbook posterior in float64."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from imagenet import distill, fashion
from imagenet import sample as sampling
from imagenet.checkpoints import init_student_from_teacher, load_dit, save_dit
from imagenet.dit import PRESETS, DiTConfig, dit_student
from imagenet.drifting import KNOTS, DriftingPolicy
from piflow_minimal import GaussianMixture, GMFlowPolicy, rollout


def random_parts(t_src: float, generator: torch.Generator):
    """(mixture, drift, x_src, x), float64: B = 2, K = 3, C = 2, five locations."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixture = GaussianMixture(randn(2, 3, 2, 5), 0.3 * randn(2, 1, 1, 1) - 1, randn(2, 3, 1, 5))
    return mixture, randn(2, 3, 4, 5), randn(2, 2, 5), randn(2, 2, 5)


def textbook(mixture: GaussianMixture, drift, x_src, x, t_src: float, t: float) -> np.ndarray:
    """Posterior mean of x_0, component by component, with the weights interpolated by numpy."""
    means, logstds, logweights = (part.numpy() for part in mixture)
    u = np.empty(x.shape)
    for b, p in np.ndindex(len(x), x.shape[2]):
        source, state = x_src[b, :, p].numpy(), x[b, :, p].numpy()
        var = (t_src * np.exp(logstds[b, 0, 0, 0])) ** 2
        zeta = ((1 - t) / t) ** 2 - ((1 - t_src) / t_src) ** 2
        nu = (1 - t) * state / t**2 - (1 - t_src) * source / t_src**2
        logits, centers = [], []
        for k in range(means.shape[1]):
            m = source - t_src * means[b, k, :, p]
            values = [0.0, *drift[b, k, :, p].tolist()]
            extra = np.interp(t / t_src, KNOTS[::-1], values[::-1])
            center = (m + var * nu) / (1 + var * zeta)
            # Integral of N(x_0; m, var) exp(nu x_0 - zeta x_0^2 / 2), but for a common factor.
            logits.append(
                logweights[b, k, 0, p] + extra
                + (center @ center) * (1 + var * zeta) / (2 * var) - (m @ m) / (2 * var)
            )  # fmt: skip
            centers.append(center)
        weights = np.exp(np.array(logits) - max(logits))
        u[b, :, p] = (state - weights @ np.array(centers) / weights.sum()) / t
    return u


@pytest.mark.parametrize("t_src", [1.0, 0.5])
@pytest.mark.parametrize("share", [1.0, 0.95, 0.9, 0.55, 0.2, 0.15, 0.05])
def test_velocity_is_the_textbook_posterior(t_src, share):
    mixture, drift, x_src, x = random_parts(t_src, torch.Generator().manual_seed(0))
    policy = DriftingPolicy(GMFlowPolicy(mixture, x_src, t_src), drift)
    expected = textbook(mixture, drift, x_src, x, t_src, t_src * share)
    np.testing.assert_allclose(policy.velocity(x, t_src * share).numpy(), expected, atol=1e-9)


def test_times_of_each_sample_are_its_own():
    mixture, drift, x_src, x = random_parts(1.0, torch.Generator().manual_seed(1))
    policy = DriftingPolicy(GMFlowPolicy(mixture, x_src, 1.0), drift)
    times = torch.tensor([0.8, 0.3], dtype=torch.float64)
    u = policy.velocity(x, times)
    for b, t in enumerate(times.tolist()):
        np.testing.assert_allclose(u[b], textbook(mixture, drift, x_src, x, 1.0, t)[b], atol=1e-9)


def test_dropped_components_and_temperature():
    mixture, drift, x_src, x = random_parts(1.0, torch.Generator().manual_seed(2))
    policy = DriftingPolicy(GMFlowPolicy(mixture, x_src, 1.0), drift)
    dropped = policy.drop(torch.tensor([[False, True, False]] * 2)).velocity(x, 0.3)
    left = GaussianMixture(mixture.means[:, ::2], mixture.logstds, mixture.logweights[:, ::2])
    expected = textbook(left, drift[:, ::2], x_src, x, 1.0, 0.3)
    np.testing.assert_allclose(dropped.numpy(), expected, atol=1e-9)
    cold = policy.temperature(0.5).velocity(x, 0.3)  # weights squared, variance halved
    parts = mixture.means, mixture.logstds + np.log(0.5) / 2, 2 * mixture.logweights
    expected = textbook(GaussianMixture(*parts), 2 * drift, x_src, x, 1.0, 0.3)
    np.testing.assert_allclose(cold.numpy(), expected, atol=1e-9)


def test_gradient_reaches_the_drift_and_detach_stops_it():
    mixture, drift, x_src, x = random_parts(1.0, torch.Generator().manual_seed(3))

    def velocity(drift: torch.Tensor) -> torch.Tensor:
        return DriftingPolicy(GMFlowPolicy(mixture, x_src, 1.0), drift).velocity(x, 0.5)

    drift.requires_grad_(True)
    assert torch.autograd.gradcheck(velocity, drift)
    policy = DriftingPolicy(GMFlowPolicy(mixture, x_src, 1.0), drift)
    assert not policy.detach().velocity(x, 0.5).requires_grad


def drifting_net(seed: int = 0):
    """The tiny teacher's student with a random drift."""
    teacher = load_dit(fashion.TEACHER)
    net = init_student_from_teacher(teacher, "gmflow", 4, drift=True)
    return teacher, net


def test_student_starts_as_gmflow():
    teacher, net = drifting_net()
    plain = init_student_from_teacher(teacher, "gmflow", 4)
    plain.load_state_dict(net.state_dict(), strict=False)
    noise = torch.randn(2, 4, 14, 14, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 7])
    with torch.no_grad():
        one, other = (dit_student(each, labels)(noise, 1.0) for each in (net, plain))
        ends = [rollout(policy, noise, 1.0, 0.0, total_substeps=4) for policy in (one, other)]
    assert type(one) is DriftingPolicy and type(other) is GMFlowPolicy
    torch.testing.assert_close(*ends)


def test_file_keeps_the_drift(tmp_path):
    _, net = drifting_net()
    torch.nn.init.normal_(net.final_layer.drift.weight)
    save_dit(net, tmp_path / "net.safetensors")
    again = load_dit(tmp_path / "net.safetensors")
    assert again.config == net.config and again.config.drift
    assert torch.equal(again.final_layer.drift.weight, net.final_layer.drift.weight)
    with pytest.raises(ValueError, match="published layout does not know"):
        save_dit(net, tmp_path / "published.safetensors", published=True)
    assert not (tmp_path / "published.safetensors").exists()


def test_bad_settings(tmp_path):
    with pytest.raises(ValueError, match="only a gmflow head"):
        dit = dataclasses.replace(PRESETS["tiny"], drift=True)
        assert isinstance(dit, DiTConfig)
        init_student_from_teacher(load_dit(fashion.TEACHER), "dx", 4, drift=True)
    with pytest.raises(ValueError, match="--drift is of gmflow policies"):
        distill.read_settings(["--preset", "tiny-dx", "--drift", "--out", str(tmp_path)])


def test_training_and_sampling(tmp_path):
    """Three iterations move the drift; a drifting student is sampled as any other."""
    argv = ["--preset", "tiny-drift", "--iterations", "3", "--batch", "4", "--picture-every", "0"]
    distill.main([*argv, "--components", "4", "--device", "cpu", "--out", str(tmp_path / "run")])
    net = load_dit(tmp_path / "run/student.safetensors")
    assert net.final_layer.drift.weight.abs().max() > 0
    out = tmp_path / "samples"
    sampling.main([str(tmp_path / "run"), "--count", "65", "--device", "cpu", "--out", str(out)])
    assert json.loads((out / "metrics.json").read_text())
