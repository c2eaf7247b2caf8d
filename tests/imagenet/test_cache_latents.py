"""cache_latents.py: image files as people have them, shards, what they are compared with."""

import dataclasses
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from imagenet import cache_latents, checkpoints, distill
from imagenet.cache_latents import list_images, open_image, open_shards, read_image
from imagenet.dit import VAE, DiTConfig

NET = DiTConfig(hidden=16, depth=2, num_heads=2, latent_size=2, num_classes=10)


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
    options = ["--size", "16", "--shard", "2", "--batch", "1", "--workers", "0", "--device", "cpu"]
    command = [str(tmp_path / "images"), str(tmp_path / "latents"), *options]
    return lambda *flags: cache_latents.main([*command, *flags])


# -- shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["0", "1"])
def test_cached_latents_come_back(tmp_path, cache, capsys, workers):
    cache("--workers", workers)
    assert "2 classes, 5 images" in capsys.readouterr().out
    out = tmp_path / "latents"
    moments, labels = open_shards(out, NET)
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


def test_a_training_sample_is_drawn_from_the_posterior(tmp_path, cache):
    cache()
    latents = distill.Latents(str(tmp_path / "latents"), NET)
    rows = np.concatenate(latents.moments)
    for item in range(10):
        mean, std = torch.from_numpy(rows[item].astype(np.float32))
        noise = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(3))
        x_0, label = latents.draw(item, torch.Generator().manual_seed(3))
        assert x_0.dtype == torch.float32 and torch.allclose(x_0, mean + std * noise)
        assert label == latents.labels[item]


def test_an_interrupted_cache_is_continued(tmp_path, cache):
    out = tmp_path / "latents"
    cache()
    (out / "latents_00001.npy").unlink()
    before = (out / "latents_00000.npy").stat().st_mtime_ns
    content = (out / "latents_00002.npy").read_bytes()
    cache()
    assert (out / "latents_00000.npy").stat().st_mtime_ns == before
    assert (out / "latents_00002.npy").read_bytes() == content
    assert len(open_shards(out, NET)[1]) == 10


def test_another_cache_in_the_same_folder_is_refused(tmp_path, cache):
    cache()
    with pytest.raises(ValueError, match="with shard = 2, this one has 3"):
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
        ({"latent_size": 4}, r"images of \(2, 4, 2, 2\); this teacher needs \(2, 4, 4, 4\)"),
        ({"channels": 16}, r"images of \(2, 4, 2, 2\); this teacher needs \(2, 16, 2, 2\)"),
        ({"num_classes": 1}, r"has the label 1; the teacher knows 0 .. 0"),
        ({"decoder": "other/vae"}, f"is of the VAE {VAE}, the network's is other/vae"),
    ):
        with pytest.raises(ValueError, match=named):
            open_shards(out, dataclasses.replace(NET, **changes))
    open_shards(out, dataclasses.replace(NET, decoder="/a/copy/of/sd-vae-ft-ema"))
    made_from = json.loads((out / "settings.json").read_text())
    assert made_from["scale"] == 0.18215 and made_from["classes"] == 2
    (out / "settings.json").write_text(json.dumps(made_from | {"scale": 1.0}))
    with pytest.raises(ValueError, match="has the scale 1.0, the network's is 0.18215"):
        open_shards(out, NET)
    (out / "settings.json").write_text(json.dumps({"images": 5}))
    with pytest.raises(ValueError, match="does not say which VAE made them"):
        open_shards(out, NET)


@pytest.mark.parametrize("name", ["latents_00001.npy", "labels_00001.npy"])
def test_a_short_file_is_named(tmp_path, cache, name):
    cache()
    path = tmp_path / "latents" / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        open_shards(tmp_path / "latents", NET)


def test_latents_that_are_not_finite_are_an_error(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(StandInVAE.config, "scaling_factor", 1e6)  # beyond float16
    with pytest.raises(ValueError, match="the VAE gives latents that are not finite"):
        cache()
    assert not list((tmp_path / "latents").glob("*.npy"))


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--size", "20"], "--size is 20; it must be a multiple of 8"),
        (["--size", "4"], "--size is 4; it must be at least 8"),
        (["--shard", "0"], "--shard is 0"),
        (["--workers", "-1"], "--workers is -1"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, cache, flags, named):
    with pytest.raises(ValueError, match=named):
        cache(*flags)
    assert not (tmp_path / "latents").exists()
    with pytest.raises(ValueError, match="it must be a local folder"):
        cache_latents.main([str(tmp_path), "s3://bucket/latents"])


def test_paths_that_are_of_another_kind(tmp_path, cache):
    (tmp_path / "latents").write_text("mine")
    with pytest.raises(OSError, match="latents"):
        cache()
    assert (tmp_path / "latents").read_text() == "mine"
    for wrong in (tmp_path / "latents", tmp_path / "nothing"):
        with pytest.raises(ValueError, match=f"images is {wrong}; it must hold one subfolder"):
            cache_latents.main([str(wrong), str(tmp_path / "out"), "--device", "cpu"])
    with pytest.raises(ValueError, match="no latents_.*.npy in it"):
        open_shards(tmp_path / "images", NET)
    (tmp_path / "images/settings.json").write_text("{")
    with pytest.raises(ValueError, match="settings.json is not readable JSON"):
        open_shards(tmp_path / "images", NET)


# -- folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [".ipynb_checkpoints", "@eaDir", "__MACOSX"])
def test_hidden_folders_do_not_shift_the_labels(tmp_path, extra):
    write_images(tmp_path, ["n01440764/a.png", "n01443537/b.PNG", f"{extra}/c.png"])
    write_images(tmp_path, [f"n01440764/{extra}/a.png", "n01440764/._a.png"])
    found = {path.name: label for path, label in list_images(tmp_path)}
    assert found == {"a.png": 0, "b.PNG": 1}


def test_classes_are_those_of_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder

    write_images(tmp_path, ["b/2.png", "b/1.jpg", "a/3.png", "A/4.png", "10/5.png", "9/6.png"])
    theirs = [(path, label) for path, label in ImageFolder(tmp_path).samples]
    assert [(str(path), label) for path, label in list_images(tmp_path)] == theirs


def test_folders_that_are_no_classes_are_refused(tmp_path, capsys):
    for name, files, named in (
        ("high", ["train/n0/a.png", "val/n0/b.png"], "is a folder in a class"),
        ("flat", ["a.png", "b.png"], "one subfolder of images per class"),
        ("none", [], "one subfolder of images per class"),
    ):
        (tmp_path / name).mkdir()
        write_images(tmp_path / name, files)
        with pytest.raises(ValueError, match=named):
            list_images(tmp_path / name)
    write_images(tmp_path / "one", ["n0/a.png", "stray.png", "n1/b.png"])
    (tmp_path / "one/n0/notes.txt").write_text("text")
    assert len(list_images(tmp_path / "one")) == 2
    assert "2 files in" in capsys.readouterr().err
    (tmp_path / "one/n1/b.png").unlink()
    with pytest.raises(ValueError, match="the class .*n1 has no image"):
        list_images(tmp_path / "one")


# -- images ----------------------------------------------------------------------------------------


def damaged() -> dict[str, bytes]:
    """By name: what people's folders hold that is not, or no longer, an image."""
    image, files = Image.effect_noise((64, 64), 50).convert("RGB"), {}
    for kind in ("jpeg", "png", "webp"):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        files[f"truncated.{kind}"] = buffer.getvalue()[: buffer.tell() // 2]
    return files | {"empty.jpg": b"", "page.jpg": b"<html>404</html>", "zeros.png": b"\0" * 99}


@pytest.mark.parametrize("name", damaged())
def test_a_damaged_image_is_named_before_the_vae_is_loaded(tmp_path, cache, monkeypatch, name):
    path = tmp_path / "images/n1" / name
    path.write_bytes(damaged()[name])
    with pytest.raises(ValueError, match=f"{name} cannot be read as an image"):
        read_image(path, 32)
    monkeypatch.setattr(checkpoints, "load_vae", None)  # it would be a TypeError
    with pytest.raises(ValueError, match=f"1 of 6 images are damaged.*n1/{name} cannot be read"):
        cache()
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize(
    "name, image",
    [
        ("grey.png", Image.new("L", (64, 64), 128)),
        ("alpha.png", Image.new("LA", (64, 64), (128, 255))),
        ("rgba.webp", Image.new("RGBA", (64, 64), (128, 128, 128, 255))),
        ("palette.png", Image.new("RGB", (64, 64), (128,) * 3).quantize()),
        ("cmyk.JPEG", Image.new("RGB", (64, 64), (128,) * 3).convert("CMYK")),
        ("16bit.png", Image.fromarray(np.full((64, 64), 128 * 257, np.uint16))),
        ("16bit.tif", Image.fromarray(np.full((64, 64), 128 * 257, np.uint16))),
        ("32bit.tiff", Image.fromarray(np.full((64, 64), 128 * 257, np.int32))),
        ("thin.bmp", Image.new("L", (3, 500), 128)),
    ],
)
def test_a_mid_grey_of_any_mode_is_mid_grey(tmp_path, name, image):
    image.save(tmp_path / name)
    found = read_image(tmp_path / name, 32)
    assert found.shape == (3, 32, 32) and (found - 0.004).abs().max() < 0.01


def test_grey_values_without_a_range_are_refused(tmp_path):
    for values in (np.full((8, 8), 0.5, np.float32), np.full((8, 8), 70_000, np.int32)):
        Image.fromarray(values).save(tmp_path / "grey.tif")
        with pytest.raises(ValueError, match="grey.tif cannot be read as an image: .*grey values"):
            open_image(tmp_path / "grey.tif")


def test_photos_are_turned_upright_and_counted(tmp_path, cache, capsys):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 16:] = 255  # white on the right; upright it is at the bottom
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "images/n0/phone.png", exif=exif)
    upright = np.asarray(open_image(tmp_path / "images/n0/phone.png"))
    assert upright.shape == (32, 16, 3) and upright[:16].max() == 0 and upright[16:].min() == 255
    assert cache_latents.image_size(tmp_path / "images/n0/phone.png") == (16, 32)
    cache()
    assert "1 images are turned upright" in capsys.readouterr().out


def test_images_are_cropped_to_the_centre(tmp_path):
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = read_image(tmp_path / "wide.png", 16)
    assert image.shape == (3, 16, 16) and image.min() > 0.99
