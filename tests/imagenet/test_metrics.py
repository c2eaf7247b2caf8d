"""metrics.py and fashion.py: Frechet distance, Inception metrics, references, feature network."""

import fractions
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from common import fashion, frechet
from common.teachers import integrate_teacher
from imagenet import metrics
from imagenet.checkpoints import load_dit
from imagenet.dit import guided_teacher

CPU = torch.device("cpu")


def test_latents_are_two_by_two_blocks_of_pixels():
    images = torch.arange(28 * 28).float().view(1, 1, 28, 28)
    latents = fashion.to_latents(images)
    assert latents.shape == (1, 4, 14, 14)
    assert latents[0, 2, 3, 5] == images[0, 0, 2 * 3 + 1, 2 * 5]  # channel 2: lower left pixel
    assert torch.equal(fashion.to_images(latents), images)


def test_frechet_distance_of_commuting_gaussians():
    """For diagonal covariances it is |m1 - m2|^2 + sum (s1 - s2)^2."""
    mean, s1, s2 = torch.tensor([1.0, -2.0, 0.5]), torch.rand(3) + 1, torch.rand(3) + 1
    distance = frechet.gaussian_distance(mean, s1.square().diag(), 0 * mean, s2.square().diag())
    expected = mean.square().sum() + (s1 - s2).square().sum()
    assert distance == pytest.approx(expected.item(), rel=1e-5)


def test_shipped_teacher_draws_recognisable_classes():
    net, features = load_dit(fashion.TEACHER), fashion.load_features()
    assert features.accuracy > 0.9 and (net.config.latent_size, net.config.num_classes) == (14, 10)
    labels = torch.arange(40) % 10
    teacher = guided_teacher(net, labels, 2.5, (0.0, 0.8))
    noise = torch.randn(40, 4, 14, 14, generator=torch.Generator().manual_seed(0))
    images = fashion.to_images(integrate_teacher(teacher, noise, 12))
    assert fashion.recognition_rate(images, labels, features) > 0.85
    noise = torch.randn_like(images)
    assert fashion.frechet_distance(images) < fashion.frechet_distance(noise) / 10


# -- Inception metrics -----------------------------------------------------------------------------


def stand_in_inception(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (B, 3, H, W) -> 6 "features" and 4 logits that depend on the image alone."""
    values = pixels.float().flatten(1) / 127.5 - 1
    mix = torch.sin(torch.arange(values.shape[1])[:, None] * torch.arange(1, 11) * 0.7)
    out = values @ mix
    return out[:, :6], out[:, 6:]


def numpy_fid(mean1, cov1, mean2, cov2) -> float:
    """tr((C1 C2)^(1/2)) is the sum of the square roots of the eigenvalues of C1 C2."""
    root = np.sqrt(np.linalg.eigvals(cov1 @ cov2).astype(complex)).real.sum()
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * root)


def moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return values.mean(0), np.cov(values, rowvar=False)


def radius(x: np.ndarray) -> np.ndarray:
    return np.sort(np.linalg.norm(x[:, None] - x, axis=2), axis=1)[:, 3]


def test_inception_metrics(tmp_path, monkeypatch):
    """Against FID by eigenvalues, precision and recall by all distances, the score by its sum."""
    generator = np.random.default_rng(0)
    ours = generator.integers(0, 256, (70, 4, 4, 3), np.uint8)
    real = generator.integers(0, 200, (50, 4, 4, 3), np.uint8)
    (f, logits), (g, _) = (
        [part.double().numpy() for part in stand_in_inception(torch.tensor(x).permute(0, 3, 1, 2))]
        for x in (ours, real)
    )
    np.savez(tmp_path / "images.npz", arr_0=real)
    (tmp_path / "images").mkdir()
    for i, image in enumerate(real):
        Image.fromarray(image).save(tmp_path / "images" / f"{i:02d}.png")

    def measure(name: str) -> dict:
        reference = metrics.open_reference(tmp_path / name, CPU)
        return metrics.measure(torch.from_numpy(ours), torch.zeros(70), reference, CPU)

    monkeypatch.setattr(metrics, "FEATURES", 6)
    monkeypatch.setattr(frechet, "load_inception", lambda *_: stand_in_inception)
    found = measure("images.npz")
    monkeypatch.setattr(metrics, "BATCH", 16)
    folder = measure("images")
    assert folder == pytest.approx(found, rel=1e-5)
    assert found["fid"] == pytest.approx(numpy_fid(*moments(f), *moments(g)), rel=1e-4)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    score = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    assert found["inception_score"] == pytest.approx(score, rel=1e-5)
    distance = np.linalg.norm(f[:, None] - g, axis=2)
    assert found["precision"] == pytest.approx((distance <= radius(g)).any(1).mean(), abs=1e-6)
    recall = (distance.T <= radius(f)).any(1).mean()
    assert found["recall"] == pytest.approx(recall, abs=1e-6)

    np.savez(tmp_path / "statistics.npz", mu=g.mean(0), sigma=np.cov(g, rowvar=False))
    only = measure("statistics.npz")
    assert only["fid"] == pytest.approx(found["fid"], rel=1e-5) and "recall" not in only


def test_blocks_change_nothing_and_torch_fidelity_agrees(monkeypatch):
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    isc = pytest.importorskip("torch_fidelity.metric_isc")
    torch.manual_seed(0)
    f, g = torch.randn(300, 16), torch.randn(200, 16) * 1.1
    whole = metrics.precision(f, g), metrics.precision(g, f)
    options = {"prc_neighborhood": 3, "prc_batch_size": 100, "save_cpu_ram": True}
    theirs = prc.prc_features_to_metric(f, g, verbose=False, **options)
    assert whole == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    split = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda x, n: split(x, min(n, 7)))
    parts = metrics.precision(f, g), metrics.precision(g, f)
    assert parts == pytest.approx(whole, abs=1e-6)
    monkeypatch.undo()
    logits = torch.randn(10_000, 12) * 3
    theirs = isc.isc_features_to_metric(logits, splits=2, shuffle=False)["inception_score_mean"]
    assert metrics.inception_score(logits) == pytest.approx(theirs, rel=1e-6)


def test_what_is_not_finite_is_an_error():
    eye, mean = torch.eye(3), torch.zeros(3)
    with pytest.raises(ValueError, match="not finite"):
        frechet.gaussian_distance(mean * torch.nan, eye, mean, eye)


# -- references ------------------------------------------------------------------------------------


def test_reference_layouts(tmp_path, monkeypatch):
    monkeypatch.setattr(frechet, "load_inception", lambda *_: stand_in_inception)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    for i, name in enumerate(("a.png", "b.PNG", "sub/c.png", "sub/d.Png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels[i]).save(tmp_path / name)
    for name in (".ipynb_checkpoints/a-checkpoint.png", "._a.png", "@eaDir/a.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    assert np.array_equal(np.concatenate(list(metrics.read_folder(tmp_path))), pixels)
    Image.fromarray(pixels[0, :6]).save(tmp_path / "sub" / "e.png")
    with pytest.raises(ValueError, match=r"e.png is \(6, 8, 3\), the first is \(8, 8, 3\)"):
        list(metrics.read_folder(tmp_path))
    (tmp_path / "sub" / "e.png").unlink()
    both = {"mu": np.ones(2048), "sigma": np.eye(2048)}
    np.savez(tmp_path / "adm.npz", arr_0=pixels, mu_s=np.ones(9), **both)
    found, statistics = metrics.read_npz(tmp_path / "adm.npz")
    assert np.array_equal(np.concatenate(found), pixels)
    assert [part.shape for part in statistics] == [(2048,), (2048, 2048)]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="nothing holds no image"):
        metrics.open_reference(tmp_path / "nothing", CPU)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="a.png cannot be read as an image"):
        metrics.open_reference(tmp_path, CPU)


def test_precision_of_three_images_is_refused():
    with pytest.raises(ValueError, match="more than 3 images on both sides"):
        metrics.precision(torch.randn(10, 8), torch.randn(3, 8))


@pytest.mark.parametrize(
    "content, named",
    [
        ({"arr_0": np.zeros((9, 8, 8, 3), np.float32)}, r"holds .*float32', \(9, 8, 8, 3\)"),
        ({"arr_0": np.zeros((9, 3, 8, 8), np.uint8)}, r"holds .*uint8', \(9, 3, 8, 8\)"),
        ({"arr_0": np.zeros((9, 8, 8, 1), np.uint8)}, r"holds .*uint8', \(9, 8, 8, 1\)"),
        ({"mu": np.zeros(768), "sigma": np.eye(768)}, r"\(768,\).* it needs .* mu \(2048,\)"),
        ({"mu": np.zeros(2048), "sigma": np.eye(3)}, r"\(3, 3\).* sigma \(2048, 2048\)"),
        ({"mu": np.zeros(2048)}, "it needs arr_0"),
        ({"x": np.zeros(2)}, "holds {}; it needs arr_0"),
        ({"arr_0": np.array([{}], dtype=object)}, "no readable .npz"),
    ],
)
def test_npz_of_other_layouts_are_refused(tmp_path, content, named):
    np.savez(tmp_path / "reference.npz", **content)
    with pytest.raises(ValueError, match=f"reference.npz.*{named}"):
        metrics.read_npz(tmp_path / "reference.npz")


def test_a_damaged_npz_is_named(tmp_path):
    path = tmp_path / "reference.npz"
    np.savez(path, arr_0=np.ones((9, 64, 64, 3), np.uint8))
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 255
    np.save(tmp_path / "array.npy", np.ones(3))
    contents = bytes(whole), whole[:-50], b"text", (tmp_path / "array.npy").read_bytes()
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="reference.npz is no readable .npz"):
            metrics.read_npz(path)


def test_inception_weights_are_not_unpickled(monkeypatch, tmp_path):
    """torch-fidelity itself unpickles its download; within load_inception torch.load cannot."""
    fidelity = types.ModuleType("torch_fidelity")
    torch.save(fractions.Fraction(1, 2), tmp_path / "code.pth")

    def extractor(*given):
        with pytest.raises(pickle.UnpicklingError, match="fractions"):
            torch.load(tmp_path / "code.pth", weights_only=False)
        return torch.nn.Identity()

    fidelity.FeatureExtractorInceptionV3 = extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", fidelity)
    frechet.load_inception(CPU)
    assert torch.load(tmp_path / "code.pth", weights_only=False) == fractions.Fraction(1, 2)
