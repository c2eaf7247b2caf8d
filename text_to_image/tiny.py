"""Small stand-ins of the base models, for --tiny and the tests.

The model of clothes (for Qwen-Image) draws Fashion-MNIST from words: diffusers' own transformer
class, 1.4M parameters, trained by assets/train_tiny_text_teacher.py. In place of the VAE, the 2 x 2
blocks of pixels are the four channels of a latent pixel. Images are 112 x 112: 28 x 28, four times
enlarged. FLUX models have random weights: they draw noise.

In place of the text encoders every word has a fixed random vector, seeded by its letters: there is
no vocabulary, and a word that was never seen does little.
"""

import re
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.fashion import ASSETS
from text_to_image.families import SHIFT, Family, import_diffusers, naming

TEACHER = ASSETS / "tiny_text_teacher.safetensors"
ADAPTERS = {"gm-qwen": ASSETS / "tiny_gm_adapter", "dx-qwen": ASSETS / "tiny_dx_adapter"}
GUIDANCE = 2.5  # with which the adapters were distilled
SIDE = 112  # pixels of an image
ENLARGE = 4  # pixels of an image per pixel of the data set
WORD_WIDTH = 64
WORDS = 40  # to which the prompts of the FLUX models are padded: they take no mask
CONFIG = {
    "in_channels": 16, "out_channels": 4, "num_layers": 4, "num_attention_heads": 4,
    "attention_head_dim": 24, "joint_attention_dim": WORD_WIDTH, "axes_dims_rope": (4, 10, 10),
}  # fmt: skip
FLUX_CONFIG = {
    "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2,
    "attention_head_dim": 12, "joint_attention_dim": WORD_WIDTH,
}  # fmt: skip
FLUX_VAE = {
    "latent_channels": 4, "block_out_channels": (8,) * 4, "norm_num_groups": 4,
    "layers_per_block": 1, "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


def demo_pipeline(family: Family) -> Any:
    """What --tiny works on."""
    return fashion_pipeline() if family.name == "qwen" else random_pipeline(family)


# ---- Words in place of text encoders -------------------------------------------------------------


def word_vectors(prompt: str) -> Tensor:
    """Prompt -> (L, 64): a standard normal vector for each word, and one for the end."""
    words = [*re.findall(r"[\w-]+", prompt.lower()), "<end>"]
    generator, rows = torch.Generator(), []
    for word in words:
        generator.manual_seed(zlib.crc32(word.encode()))
        rows.append(torch.randn(WORD_WIDTH, generator=generator))
    return torch.stack(rows)


def encode_words(prompts: str | list[str]) -> tuple[Tensor, Tensor]:
    """Prompts -> embeddings (B, L, 64), padded with zeros, and their mask (B, L)."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    parts = [word_vectors(prompt) for prompt in prompts]
    lengths = torch.tensor([len(part) for part in parts])
    embeds = nn.utils.rnn.pad_sequence(parts, batch_first=True)
    return embeds, torch.arange(embeds.shape[1]) < lengths[:, None]


# ---- The model of clothes ------------------------------------------------------------------------


class BlockVAE(nn.Module):
    """Stands in for a VAE: latents (B, 4, 1, H, W) <-> images (B, 3, 1, 8 H, 8 W)."""

    dtype = torch.float32
    config = SimpleNamespace(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, z_dim=4)
    temperal_downsample = (False,) * 3  # from which the pipeline reads that 8 = 2^3

    def __init__(self):
        super().__init__()
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.anchor.device

    def encode(self, images: Tensor) -> Any:
        grey = F.avg_pool2d(images[:, :, 0].mean(1, keepdim=True), ENLARGE)
        latents = F.pixel_unshuffle(grey, 2)[:, :, None]
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        grey = F.interpolate(F.pixel_shuffle(z[:, :, 0], 2), scale_factor=ENLARGE)
        return (grey.expand(-1, 3, -1, -1)[:, :, None],)


def fashion_transformer(weights: Path = TEACHER) -> nn.Module:
    """The shipped transformer, frozen. Raises: OSError or ValueError for an unusable file."""
    from safetensors.torch import load_file

    net = import_diffusers().QwenImageTransformer2DModel(**CONFIG)
    with naming(f"{weights} does not hold the tiny transformer"):
        net.load_state_dict({key: value.float() for key, value in load_file(weights).items()})
    return net.eval().requires_grad_(False)


def fashion_pipeline() -> Any:
    """A Qwen-Image pipeline of these parts."""
    diffusers = import_diffusers()

    class FashionPipeline(diffusers.QwenImagePipeline):
        def encode_prompt(self, prompt, device=None, **_):
            embeds, mask = encode_words(prompt)
            device = device or self._execution_device
            mask = None if mask.all() else mask.to(device)
            return embeds.to(device, self.transformer.dtype), mask

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    pipe = FashionPipeline(scheduler, BlockVAE(), None, None, fashion_transformer())
    pipe.default_sample_size = SIDE // pipe.vae_scale_factor
    return pipe


# ---- FLUX ----------------------------------------------------------------------------------------


def random_pipeline(family: Family) -> Any:
    """A FLUX pipeline with small random weights. Images are 64 x 64."""
    diffusers = import_diffusers()

    class WordPipeline(getattr(diffusers, family.pipeline)):
        def encode_prompt(self, prompt, device=None, **_):
            embeds, _ = encode_words(prompt)
            pooled = embeds.sum(1)  # whatever the padding
            embeds = F.pad(embeds, (0, 0, 0, max(0, WORDS - embeds.shape[1])))
            embeds = embeds.to(device or self._execution_device, self.transformer.dtype)
            return embeds, pooled.to(embeds)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family.name == "flux":
            net = diffusers.FluxTransformer2DModel(
                **FLUX_CONFIG, pooled_projection_dim=WORD_WIDTH, axes_dims_rope=(2, 4, 6),
                guidance_embeds=True,
            )  # fmt: skip
            vae = diffusers.AutoencoderKL(**FLUX_VAE, scaling_factor=0.4, shift_factor=0.1)
        else:
            net = diffusers.Flux2Transformer2DModel(
                **FLUX_CONFIG, timestep_guidance_channels=64, axes_dims_rope=(2, 2, 4, 4)
            )
            vae = diffusers.AutoencoderKLFlux2(**FLUX_VAE)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts = {"transformer": net.eval().requires_grad_(False), "vae": vae.eval()}
    text = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    if family.name == "flux2":
        text = dict.fromkeys(["text_encoder", "tokenizer"])
    pipe = WordPipeline(scheduler=scheduler, **parts, **text)
    pipe.default_sample_size = 64 // pipe.vae_scale_factor
    return pipe
