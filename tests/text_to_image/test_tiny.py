"""The small model of clothes behind --tiny: words, its VAE, what it draws, its adapters."""

import pytest

pytest.importorskip("diffusers", reason="needs requirements-extra.txt (diffusers)")
pytest.importorskip("peft", reason="needs requirements-extra.txt (peft)")

import torch  # noqa: E402

from common import fashion  # noqa: E402
from common.teachers import guided_velocity, integrate_teacher  # noqa: E402
from text_to_image.adapters import Sampling  # noqa: E402
from text_to_image.families import FAMILIES, SHIFT, pack, unpack  # noqa: E402
from text_to_image.generate import load  # noqa: E402
from text_to_image.tiny import (  # noqa: E402
    ADAPTERS,
    GUIDANCE,
    SIDE,
    BlockVAE,
    encode_words,
    fashion_pipeline,
    fashion_transformer,
    random_pipeline,
    word_vectors,
)

QWEN = FAMILIES["qwen"]
NAMES = ("t-shirt", "trousers", "pullover", "dress", "coat",
         "sandal", "shirt", "sneaker", "bag", "ankle boot")  # fmt: skip


def test_a_word_has_one_vector():
    """Wherever it stands, in upper or lower case; another word has another."""
    dark, coat, end = word_vectors("Dark coat")
    torch.testing.assert_close(word_vectors("a coat, dark.")[[2, 1]], torch.stack([dark, coat]))
    assert torch.equal(word_vectors("  "), end[None])
    assert (dark - coat).norm() > 5
    embeds, mask = encode_words(["dark coat", ""])
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    assert torch.equal(embeds[1, 0], end) and not embeds[1, 1:].any()


def test_vae_is_blocks_of_pixels():
    latents = torch.randn(2, 4, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    images = BlockVAE().decode(latents)[0]
    assert images.shape == (2, 3, 1, SIDE, SIDE)
    torch.testing.assert_close(images[:, 0, 0, ::4, ::4], fashion.to_images(latents[:, :, 0])[:, 0])
    torch.testing.assert_close(BlockVAE().encode(images).latent_dist.mode(), latents)


def test_pipeline_of_diffusers_draws_the_same():
    """Its own loop, without guidance, against our Euler steps: the interface is the real one."""
    pipe = fashion_pipeline()
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 14, 14, generator=torch.Generator().manual_seed(3))
    conditions = QWEN.encode_prompts(pipe, ["a dark coat"])

    def teacher(x, t):
        return unpack(QWEN.evaluate(pipe.transformer, x, t, conditions), x)

    with torch.no_grad():
        expected = QWEN.decode(pipe, integrate_teacher(teacher, noise, 8, SHIFT))
    image = pipe("a dark coat", num_inference_steps=8, latents=pack(noise), height=SIDE,
                 width=SIDE, true_cfg_scale=1.0, output_type="pt").images  # fmt: skip
    torch.testing.assert_close(image * 2 - 1, expected.clamp(-1, 1), atol=1e-3, rtol=0)


def guided_teacher(pipe, prompts):
    """The base with guidance GUIDANCE, as the adapters were distilled."""
    both = QWEN.encode_prompts(pipe, [*prompts, *[""] * len(prompts)])

    @torch.no_grad()
    def teacher(x, t):
        x, t = torch.cat([x, x]), torch.cat([t, t])
        u = unpack(QWEN.evaluate(pipe.transformer, x, t, both), x)
        return guided_velocity(*u.chunk(2), GUIDANCE, t.chunk(2)[0])

    return teacher


def noises(n):
    return torch.stack(
        [torch.randn(4, 14, 14, generator=torch.Generator().manual_seed(i)) for i in range(n)]
    )


def shade(latents):
    """Mean brightness of what is not background. (B, 4, 14, 14) -> scalar."""
    grey = fashion.to_images(latents) / 2 + 0.5
    inside = grey > 0.1
    return (grey * inside).sum() / inside.sum()


@pytest.mark.parametrize("model", ADAPTERS)
def test_shipped_adapters_draw_what_the_words_say(model):
    """Classes are recognised, a dark one is darker, and the end is nearer to the teacher's than
    four Euler steps come (the classifier is right on 93% of real images)."""
    generate = load(model, tiny=True, device="cpu")
    assert generate.trained == Sampling("qwen", 4, None, 3.2, 0.5, 32, "euler")
    prompts = [f"a photo of a {name}" for name in NAMES for _ in range(4)]
    drawn = generate(prompts, batch=40, output="latent").latents
    rate = fashion.recognition_rate(fashion.to_images(drawn), torch.arange(40) // 4)
    assert rate >= 0.85
    dark, white = (
        generate([f"a {word} {name}" for name in NAMES], batch=10, output="latent").latents
        for word in ("dark", "white")
    )
    assert shade(dark) < shade(white) - 0.15
    teacher = guided_teacher(fashion_pipeline(), prompts[:8])
    target, euler = (integrate_teacher(teacher, noises(8), n, SHIFT) for n in (32, 4))
    rms = [(end - target).square().mean().sqrt() for end in (drawn[:8], euler)]
    assert rms[0] < rms[1]


def test_a_damaged_teacher_is_refused(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="does not hold the tiny transformer"):
        fashion_transformer(tmp_path / "weights.safetensors")


def test_the_pooled_vector_of_the_small_flux_does_not_depend_on_padding():
    family = FAMILIES["flux"]
    pipe = random_pipeline(family)
    short = family.encode_prompts(pipe, ["a dark coat"], 40).pooled
    both = family.encode_prompts(pipe, ["a dark coat", "one two three four five six"], 512).pooled
    assert torch.allclose(short[0], both[0])
