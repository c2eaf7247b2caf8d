"""A small text-to-image model of Fashion-MNIST behind the interface of Qwen-Image, for --tiny.

The transformer is diffusers' own class, 1.4M parameters, from assets/train_tiny_text_teacher.py. In
place of the text encoder every word has a fixed random vector, seeded by its letters: there is no
vocabulary, and a word that was never seen does little. In place of the VAE, the 2 x 2 blocks of
pixels are the four channels of a latent pixel. Images are 112 x 112: 28 x 28, four times enlarged.
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
from text_to_image.families import import_diffusers

TEACHER = ASSETS / "tiny_text_teacher.safetensors"
ADAPTERS = {"gm-qwen": ASSETS / "tiny_gm_adapter", "dx-qwen": ASSETS / "tiny_dx_adapter"}
GUIDANCE = 2.5  # with which the adapters were distilled
SIDE = 112  # pixels of an image
CONFIG = {
    "in_channels": 16, "out_channels": 4, "num_layers": 4, "num_attention_heads": 4,
    "attention_head_dim": 24, "joint_attention_dim": 64, "axes_dims_rope": (4, 10, 10),
}  # fmt: skip
_ENLARGE = 4  # pixels of an image per pixel of the data set


def word_vectors(prompt: str) -> Tensor:
    """Prompt -> (L, 64): a standard normal vector for each word, and one for the end."""
    words, width = [*re.findall(r"[\w-]+", prompt.lower()), "<end>"], CONFIG["joint_attention_dim"]
    generator, rows = torch.Generator(), []
    for word in words:
        generator.manual_seed(zlib.crc32(word.encode()))
        rows.append(torch.randn(width, generator=generator))
    return torch.stack(rows)


def encode_words(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Prompts -> embeddings (B, L, 64), padded with zeros, and their mask (B, L)."""
    parts = [word_vectors(prompt) for prompt in prompts]
    lengths = torch.tensor([len(part) for part in parts])
    embeds = nn.utils.rnn.pad_sequence(parts, batch_first=True)
    return embeds, torch.arange(embeds.shape[1]) < lengths[:, None]


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
        grey = F.avg_pool2d(images[:, :, 0].mean(1, keepdim=True), _ENLARGE)
        latents = F.pixel_unshuffle(grey, 2)[:, :, None]
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        grey = F.interpolate(F.pixel_shuffle(z[:, :, 0], 2), scale_factor=_ENLARGE)
        return (grey.expand(-1, 3, -1, -1)[:, :, None],)


def fashion_transformer(weights: Path = TEACHER) -> nn.Module:
    """The shipped transformer, frozen. Raises: OSError or ValueError for an unusable file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    net = import_diffusers().QwenImageTransformer2DModel(**CONFIG)
    try:
        net.load_state_dict({key: value.float() for key, value in load_file(weights).items()})
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{weights} does not hold the tiny transformer: {error}") from error
    return net.eval().requires_grad_(False)


def fashion_pipeline() -> Any:
    """A Qwen-Image pipeline of these parts."""
    diffusers = import_diffusers()

    class FashionPipeline(diffusers.QwenImagePipeline):
        def encode_prompt(self, prompt, device=None, **_):
            embeds, mask = encode_words([prompt] if isinstance(prompt, str) else prompt)
            device = device or self._execution_device
            mask = None if mask.all() else mask.to(device)
            return embeds.to(device, self.transformer.dtype), mask

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.2)
    pipe = FashionPipeline(scheduler, BlockVAE(), None, None, fashion_transformer())
    pipe.default_sample_size = SIDE // pipe.vae_scale_factor
    return pipe
