"""cache_latents.py: image files as people have them, shards, what they are compared with."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from imagenet import cache_latents, checkpoints
from imagenet.cache_latents import Latents, labelled_images
from imagenet.dit import VAE, DiTConfig

NET = DiTConfig(hidden=16, depth=2, num_heads=2, latent_size=2, num_classes=2)


class StandInVAE(torch.nn.Module):
    """ "Encodes" by picking every eighth pixel: position survives, so that flips can be seen."""

    config = SimpleNamespace(scaling_factor=0.18215)

    def encode(self, images):
        mean = images[:, [0, 1, 2, 0], ::8, ::8]
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=mean.abs() + 0.5))


def write_images(root, names, size=(16, 16)) -> None:
    generator = np.random.default_rng(0)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (*size, 3), np.uint8)).save(root / name)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """-> make(*flags): five images of two classes, encoded by the stand-in."""
    write_images(tmp_path / "images", [f"n{i % 2}/{i}.png" for i in range(5)])
    monkeypatch.setattr(checkpoints, "load_vae", lambda device, name: StandInVAE())
    options = ["--size", "16", "--shard", "2", "--batch", "1", "--workers", "2", "--device", "cpu"]
    command = [str(tmp_path / "images"), str(tmp_path / "latents"), *options]
    return lambda *flags: cache_latents.main([*command, *flags])


# -- shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["1", "2"])
def test_cached_latents_come_back(tmp_path, cache, capsys, batch):
    cache("--batch", batch)
    text = capsys.readouterr().out
    assert "2 classes, 5 images" in text and "EXIF" not in text
    latents = Latents(tmp_path / "latents", NET)
    moments, labels = latents.moments, latents.labels
    assert labels.tolist() == [0, 0, 0, 0, 0, 1, 0, 1, 1, 1]
    shards, found = ([(0, 0), (0, 2)], [(0, 4), (1, 1)], [(1, 3)]), []  # (class, image)
    for shard in shards:
        names = [tmp_path / "images" / f"n{label}" / f"{i}.png" for label, i in shard]
        plain = [np.asarray(Image.open(name)) for name in names]
        found += [*plain, *(image[:, ::-1] for image in plain)]
    for pixels, (mean, std) in zip(found, np.concatenate(moments), strict=True):
        expected = (pixels[::8, ::8] / 127.5 - 1).transpose(2, 0, 1)[[0, 1, 2, 0]]
        assert np.allclose(mean, expected * 0.18215, atol=1e-3)
        assert np.allclose(std, (abs(expected) + 0.5) * 0.18215, atol=1e-3)


def test_an_interrupted_cache_is_continued(tmp_path, cache):
    out = tmp_path / "latents"
    cache()
    (out / "latents_00001.npy").unlink()
    before = (out / "latents_00000.npy").stat().st_mtime_ns
    content = (out / "latents_00002.npy").read_bytes()
    cache()
    assert (out / "latents_00000.npy").stat().st_mtime_ns == before
    assert (out / "latents_00002.npy").read_bytes() == content
    assert len(Latents(out, NET).labels) == 10


def test_another_cache_in_the_same_folder_is_refused(tmp_path, cache):
    cache()
    with pytest.raises(ValueError, match="is of a run with shard = 2, this one has 3"):
        cache("--shard", "3")
    with pytest.raises(ValueError, match=f"with vae = '{VAE}', this one has 'other'"):
        cache("--vae", "other")
    (tmp_path / "images/n0/0.png").rename(tmp_path / "images/n0/00.png")
    with pytest.raises(ValueError, match="with files = "):
        cache()


def test_latents_are_compared_with_the_network(tmp_path, cache):
    cache()
    out = tmp_path / "latents"
    for changes, named in (
        ({"latent_size": 4}, r"'shape': \(4, 2, 2\).* needs .*'shape': \(4, 4, 4\)"),
        ({"channels": 16}, r"'shape': \(4, 2, 2\).* needs .*'shape': \(16, 2, 2\)"),
        ({"num_classes": 3}, r"'classes': 2.* needs .*'classes': 3"),
        ({"decoder": "other/vae"}, "'VAE': 'sd-vae-ft-ema'.* needs .*'VAE': 'vae'"),
    ):
        with pytest.raises(ValueError, match=named):
            Latents(out, dataclasses.replace(NET, **changes))
    Latents(out, dataclasses.replace(NET, decoder="/a/copy/of/sd-vae-ft-ema"))
    last = max(path.name for path in out.glob("l*.npy"))[-9:]
    for name in ("latents_", "labels_"):  # the last shard is not there yet
        (out / (name + last)).rename(tmp_path / (name + last))
    with pytest.raises(ValueError, match="'images': .* needs .*'images': 5"):
        Latents(out, NET)
    for name in ("latents_", "labels_"):
        (tmp_path / (name + last)).rename(out / (name + last))
    made_from = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps(made_from | {"scale": 1.0}))
    with pytest.raises(ValueError, match="'scale': 1.0.* needs .*'scale': 0.18215"):
        Latents(out, NET)
    (out / "settings.json").write_text(json.dumps({"images": 5}))
    with pytest.raises(ValueError, match="is no folder of imagenet.cache_latents"):
        Latents(out, NET)


@pytest.mark.parametrize("name", ["latents_00001.npy", "labels_00001.npy"])
def test_a_short_file_is_named(tmp_path, cache, name):
    cache()
    path = tmp_path / "latents" / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="latents_00001.npy or its labels are damaged"):
        Latents(tmp_path / "latents", NET)


def test_latents_that_are_not_finite_are_an_error(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(StandInVAE.config, "scaling_factor", 1e6)  # beyond float16
    with pytest.raises(ValueError, match="the VAE gives latents that are not finite"):
        cache()
    assert not list((tmp_path / "latents").glob("*.npy"))


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--size", "4"], "--size is 4; it must be at least 8"),
        (["--size", "20"], "--size is 20; it must be a multiple of 8"),
        (["--shard", "0"], "--shard is 0"),
        (["--workers", "0"], "--workers is 0"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, cache, flags, named):
    with pytest.raises(ValueError, match=named):
        cache(*flags)
    assert not (tmp_path / "latents").exists()


def test_paths_that_are_of_another_kind(tmp_path, cache):
    (tmp_path / "latents").write_text("mine")
    with pytest.raises(OSError, match="latents"):
        cache()
    assert (tmp_path / "latents").read_text() == "mine"
    for wrong in (tmp_path / "latents", tmp_path / "nothing"):
        with pytest.raises(ValueError, match=f"{wrong} holds no image"):
            cache_latents.main([str(wrong), str(tmp_path / "out"), "--device", "cpu"])
    with pytest.raises(ValueError, match="is no folder of imagenet.cache_latents"):
        Latents(tmp_path / "images", NET)
    (tmp_path / "images/settings.json").write_text("{")
    with pytest.raises(ValueError, match="settings.json is not readable JSON"):
        Latents(tmp_path / "images", NET)


# -- folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [".ipynb_checkpoints", "@eaDir", "__MACOSX"])
def test_hidden_folders_do_not_shift_the_labels(tmp_path, extra):
    write_images(tmp_path, ["n01440764/a.png", "n01443537/b.PNG", f"{extra}/c.png"])
    write_images(tmp_path, [f"n01440764/{extra}/a.png", "n01440764/._a.png"])
    found = {path.name: label for path, label in labelled_images(tmp_path)}
    assert found == {"a.png": 0, "b.PNG": 1}


def test_classes_are_those_of_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder

    write_images(tmp_path, ["b/2.png", "b/1.jpg", "a/3.png", "A/4.png", "10/5.png", "9/6.png"])
    theirs = [(path, label) for path, label in ImageFolder(tmp_path).samples]
    assert [(str(path), label) for path, label in labelled_images(tmp_path)] == theirs


def test_folders_that_are_no_classes_are_refused(tmp_path, capsys):
    for name, files, named in (
        ("high", ["train/n0/a.png", "val/n0/b.png"], "high/train is not one of its subfolders, or"),
        ("flat", ["a.png", "b.png"], "flat is not one of its subfolders"),
        ("none", [], "holds no image"),
    ):
        (tmp_path / name).mkdir()
        write_images(tmp_path / name, files)
        with pytest.raises(ValueError, match=named):
            labelled_images(tmp_path / name)
    write_images(tmp_path / "one", ["n0/a.png", "n1/b.png"])
    for name in ("n0/notes.txt", "list.txt", ".hidden"):
        (tmp_path / "one" / name).write_text("text")
    assert len(labelled_images(tmp_path / "one")) == 2
    assert "3 files in" in capsys.readouterr().err
    (tmp_path / "one/n1/b.png").unlink()
    with pytest.raises(ValueError, match="n1 is not one of its subfolders, or has no image"):
        labelled_images(tmp_path / "one")


# -- reading ---------------------------------------------------------------------------------------


def test_a_damaged_image_is_named_in_one_line(tmp_path, cache):
    path = tmp_path / "images/n1/1.png"
    path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(ValueError, match="n1/1.png cannot be read as an image") as caught:
        cache()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "latents/latents_00001.npy").exists()


def test_images_that_exif_turns_are_counted(tmp_path, cache, capsys):
    exif = Image.Exif()
    for orientation, name in ((6, "n0/0.png"), (3, "n1/1.png"), (1, "n1/3.png")):
        exif[0x0112] = orientation
        path = tmp_path / "images" / name
        Image.open(path).save(path, exif=exif)
    cache()
    assert "2 images were turned upright by their EXIF orientation" in capsys.readouterr().out


def test_images_are_cropped_to_the_centre(tmp_path, cache):
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 255
    for path in (tmp_path / "images").glob("*/*.png"):
        Image.fromarray(pixels).save(path)
    cache()
    mean = np.concatenate(Latents(tmp_path / "latents", NET).moments)[:, 0] / 0.18215
    assert mean.min() > 0.9
