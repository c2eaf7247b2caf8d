"""The three base families behind one interface, against the base pipelines of diffusers."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from t2i_cases import (
    CASES,
    SIZE,
    Bare,
    Recorded,
    close,
    diffusers,
    transformer,
)

import text_to_image.families as dm
from text_to_image.tiny_models import tiny_pipeline


@pytest.mark.parametrize("case", CASES)
def test_base_velocity_is_that_recorded(case):
    recorded, family = Recorded(case), dm.FAMILIES[CASES[case]]
    x, conditions = recorded["b2_latents"], recorded.conditions("b2_")
    pipe = Bare(transformer(case))
    tokens = dm.evaluate(pipe, family, x, recorded["b2_sigma"], conditions, recorded.guidance)
    close(tokens, recorded["b2_base_direct_sample_packed"], 1e-5)
    close(dm.pack(dm.unpack(tokens, x)), tokens, 0)


@pytest.mark.parametrize("name", dm.FAMILIES)
@pytest.mark.parametrize("editing", [False, True])
def test_network_and_vae_see_what_the_base_pipeline_gives_them(name, editing):
    """One step of the pipeline of diffusers; its transformer's arguments and its pictures."""
    if editing and name != "flux2":
        return
    family, pipe = dm.FAMILIES[name], tiny_pipeline(dm.FAMILIES[name])
    prompts, seen = ["a jay", "two long-tailed jays on a snowy branch"], {}
    noise = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))

    def keep(module, args, kwargs):
        seen.update(kwargs)

    handle = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    options = {"true_cfg_scale": 1.0} if name == "qwen" else {"guidance_scale": 2.5}
    pixels = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels), Image.fromarray(pixels[:66, :80])]
    options |= {"image": images} if editing else {}
    packed = torch.nn.functional.pixel_unshuffle(noise, 2) if name == "flux2" else dm.pack(noise)
    common = {"prompt": prompts, "num_inference_steps": 1, "latents": packed, **SIZE, **options}
    latents = pipe(**common, output_type="latent").images
    pictures = pipe(**common, output_type="pt").images
    handle.remove()

    conditions = dm.encode_prompts(pipe, family, prompts)
    if editing:
        tokens, ids = dm.encode_references(pipe, images, samples=2)
        conditions = conditions._replace(references=tokens, reference_ids=ids)
    guidance = None if name == "qwen" else 2.5
    ours = dm.network_inputs(family, noise, torch.ones(2), conditions, guidance)
    for key, value in ours.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, seen[key].to(value), atol=1e-6, rtol=0)
        elif key == "img_shapes":
            assert value[0] == seen[key][0]
    tensors = {key for key, value in seen.items() if isinstance(value, torch.Tensor)}
    assert tensors <= ours.keys()
    if name == "qwen":
        assert conditions.mask is not None and not conditions.mask.all()
    decoded = dm.decode(pipe, family, dm.unpack(latents, noise))
    close((decoded / 2 + 0.5).clamp(0, 1), pictures, 1e-5)


def test_a_prompt_is_encoded_alike_in_every_batch():
    for family in dm.FAMILIES.values():
        pipe = tiny_pipeline(family)
        together = dm.encode_prompts(pipe, family, ["a jay", "two long-tailed jays on a branch"])
        alone = dm.encode_prompts(pipe, family, ["a jay"])
        length = alone.embeds.shape[1]
        close(together.embeds[:1, :length], alone.embeds, 1e-5)
        if together.mask is not None:
            assert together.mask[0].sum() == length


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("qwen", 20.4e9), ("flux", 11.9e9), ("flux2", 32.2e9)],
)
def test_parameter_counts_of_the_real_transformers(name, parameters):
    """From diffusers' default configs, which are those of the published models (20B, 12B, 32B)."""
    cls = getattr(diffusers, dm.FAMILIES[name].transformer)
    options = {"guidance_embeds": True} if name == "flux" else {}
    with torch.device("meta"):
        counts = dm.count_parameters({"transformer": cls(**options)})
    assert counts["transformer"][0] == pytest.approx(parameters, rel=0.01)


def test_memory_estimate(monkeypatch):
    family = dm.FAMILIES["qwen"]
    counts = {"transformer": (20_000_000_000, 50_000_000), "text_encoder": (8_000_000_000, 10**8)}
    counts["vae"] = (10**8, 10**7)

    def need(quantize, offload):
        return dm.memory_needed(family, counts, quantize, offload, 1024 * 1024, 1) / 1e9

    work = (4096 + 512) * 3072 * 80 / 1e9 + 0.7
    assert need("none", "none") == pytest.approx(56.2 + work)
    assert need("none", "model") == pytest.approx(40 + work)
    assert need("none", "group") == pytest.approx(0.8 + work)
    assert need("nf4", "none") == pytest.approx(28 * 0.57 + 0.2 + work)
    cuda = torch.device("cuda")
    arguments = (family, counts, "none", "none", 1024 * 1024, 1, cuda)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80e9, 80e9))
    assert "58 GB" in dm.check_memory(*arguments) and "80 GB are free" in dm.check_memory(
        *arguments
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24e9, 24e9))
    with pytest.raises(ValueError) as error:
        dm.check_memory(*arguments)
    message = str(error.value)
    assert "not enough GPU memory" in message and "24 GB are free" in message
    assert (
        "--quantize nf4 --offload none" in message
        and "--quantize none --offload none" not in message
    )
    assert "--offload group" in message
    assert "memory: about 58 GB" in dm.check_memory(*arguments[:-1], torch.device("cpu"))


# ------------------------------------------------------------------------------------------------
# Images and bases as people have them
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (6, 1), (3, 2), (8, 3)])
def test_photos_are_turned_upright(orientation, turns, tmp_path):
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:8, :8, 0] = 255  # a red corner
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "phone.png", exif=exif)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        read = np.asarray(dm.read_image(tmp_path / "phone.png"))
    assert (read == np.rot90(pixels, -turns)).all()
    expected = diffusers.utils.load_image(str(tmp_path / "phone.png"))
    assert (read == np.asarray(expected)).all()
    said = [f"image {tmp_path / 'phone.png'}: turned upright (EXIF)"] if turns else []
    assert [str(note.message) for note in notes] == said


def images(tmp_path):
    """name -> (image file, the RGB values of its one colour, what is said)."""
    sixteen = Image.fromarray(np.full((4, 4), 128 * 257, np.uint16))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    glass = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    grey_glass = Image.new("LA", (4, 4), (100, 255))
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    palette.save(tmp_path / "hole.png", transparency=1)
    frames[0].save(tmp_path / "frames.gif", save_all=True, append_images=frames[1:])
    sixteen.save(tmp_path / "16.png")
    sixteen.save(tmp_path / "16.tiff")
    for name, image in (("palette", palette), ("glass", glass), ("grey", grey_glass)):
        image.save(tmp_path / f"{name}.png")
    Image.new("1", (4, 4), 1).save(tmp_path / "bits.png")
    Image.new("RGBA", (4, 4), (1, 2, 3, 255)).save(tmp_path / "opaque.png")
    return {
        "16.png": (128, 128, 128, "16 bits scaled to 8"),
        "16.tiff": (128, 128, 128, "16 bits scaled to 8"),
        "palette.png": (10, 20, 30, None),
        "hole.png": (255, 255, 255, "transparent pixels on white"),
        "glass.png": (255, 255, 255, "transparent pixels on white"),
        "grey.png": (100, 100, 100, None),
        "bits.png": (255, 255, 255, None),
        "opaque.png": (1, 2, 3, None),
        "frames.gif": (255, 0, 0, "first of 2 frames"),
    }


def test_images_of_every_mode_are_read(tmp_path):
    for name, (*color, said) in images(tmp_path).items():
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            image = dm.read_image(tmp_path / name)
        assert image.mode == "RGB" and image.getpixel((1, 2)) == tuple(color), name
        given = [] if said is None else [f"image {tmp_path / name}: {said}"]
        assert [str(note.message) for note in notes] == given


def test_unreadable_images_are_named(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-400])
    (tmp_path / "text.png").write_text("no picture")
    Image.new("F", (4, 4)).save(tmp_path / "float.tiff")
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "32.tiff")
    for name, message in (
        ("cut.jpg", "truncated"), ("text.png", "cannot identify"), ("missing.png", "No such file"),
        ("float.tiff", "floating-point"), ("32.tiff", "pixels 70000 to 70000"), (".", "directory"),
    ):  # fmt: skip
        with pytest.raises((ValueError, OSError), match=f"image .*{name}: .*{message}") as error:
            dm.read_image(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_base_with_other_latents_is_refused_with_the_numbers(tmp_path):
    family = dm.FAMILIES["flux"]
    tiny_pipeline(family).save_pretrained(tmp_path)
    config = tmp_path / "vae" / "config.json"
    config.write_text(config.read_text().replace('"latent_channels": 4', '"latent_channels": 16'))
    with pytest.raises(ValueError, match="takes 16 channels per token, the VAE gives 4 x 16"):
        dm.empty_components(family, str(tmp_path))


def test_a_damaged_base_is_named(tmp_path):
    family = dm.FAMILIES["flux"]
    tiny_pipeline(family).save_pretrained(tmp_path)
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises((ValueError, OSError), match=f"base {tmp_path}: "):
        dm.load_base(family, str(tmp_path))
    weights.rename(weights.with_suffix(".bin"))  # never unpickled
    with pytest.raises((ValueError, OSError), match=f"base {tmp_path}: .*safetensors"):
        dm.load_base(family, str(tmp_path))
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace('"AutoencoderKL"', '"AutoencoderOfTomorrow"'))
    with pytest.raises(ImportError, match="has no AutoencoderOfTomorrow: pip install -U diffusers"):
        dm.empty_components(family, str(tmp_path))
    index.write_text("{")
    with pytest.raises(OSError, match=f"base {tmp_path}: "):
        dm.empty_components(family, str(tmp_path))


def test_guidance_of_a_base_that_embeds_none():
    """FLUX.1 without a guidance embedding is evaluated without one; Qwen with one is refused."""

    def guidance_of(name, embeds):
        network = getattr(diffusers, dm.FAMILIES[name].transformer)
        with torch.device("meta"):
            base = network(num_layers=1, guidance_embeds=embeds)
        return dm.trained_guidance(base, dm.FAMILIES[name])

    assert [guidance_of("flux", embeds) for embeds in (True, False)] == [3.5, None]
    assert [guidance_of("flux2", embeds) for embeds in (True, False)] == [4.0, None]
    assert guidance_of("qwen", False) is None
    with pytest.raises(ValueError, match="embeds a guidance; qwen adapters have none"):
        guidance_of("qwen", True)


def test_missing_packages_and_versions_are_one_line(monkeypatch):
    with pytest.raises(ImportError, match="diffusers [0-9.]+ has no FluxPipeline9: pip install -U"):
        dm.library_class(diffusers, "FluxPipeline9")
    monkeypatch.setattr(dm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="diffusers.*pip install -r requirements-extra.txt"):
        dm.import_diffusers()
