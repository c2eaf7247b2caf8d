"""Small stand-ins of the base models and of their adapters, for --tiny and the tests.

The model of clothes (for Qwen-Image) draws Fashion-MNIST from words: diffusers' own transformer
class, 1.4M parameters, trained by assets/train_tiny_text_teacher.py. In place of the text encoder
every word has a fixed random vector, seeded by its letters: there is no vocabulary, and a word that
was never seen does little. In place of the VAE, the 2 x 2 blocks of pixels are the four channels of
a latent pixel. Images are 112 x 112: 28 x 28, four times enlarged. FLUX models are random: noise.
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
from text_to_image.adapters import Adapter, expected_shapes
from text_to_image.families import SHIFT, Family, import_diffusers, naming

TEACHER = ASSETS / "tiny_text_teacher.safetensors"
ADAPTERS = {"gm-qwen": ASSETS / "tiny_gm_adapter", "dx-qwen": ASSETS / "tiny_dx_adapter"}
GUIDANCE = 2.5  # with which the adapters were distilled
SIDE = 112  # pixels of an image
ENLARGE = 4  # pixels of an image per pixel of the data set
CONFIG = {
    "in_channels": 16, "out_channels": 4, "num_layers": 4, "num_attention_heads": 4,
    "attention_head_dim": 24, "joint_attention_dim": 64, "axes_dims_rope": (4, 10, 10),
}  # fmt: skip


def demo_pipeline(family: Family) -> Any:
    """What --tiny works on: fashion_pipeline() for Qwen-Image, tiny_pipeline(family) for FLUX."""
    return fashion_pipeline() if family.name == "qwen" else tiny_pipeline(family)


# ---- The model of clothes ------------------------------------------------------------------------


def word_vectors(prompt: str) -> Tensor:
    """Prompt -> (L, 64): a standard normal vector for each word, and one for the end."""
    words = [*re.findall(r"[\w-]+", prompt.lower()), "<end>"]
    generator, rows = torch.Generator(), []
    for word in words:
        generator.manual_seed(zlib.crc32(word.encode()))
        rows.append(torch.randn(CONFIG["joint_attention_dim"], generator=generator))
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
            embeds, mask = encode_words([prompt] if isinstance(prompt, str) else prompt)
            device = device or self._execution_device
            mask = None if mask.all() else mask.to(device)
            return embeds.to(device, self.transformer.dtype), mask

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    pipe = FashionPipeline(scheduler, BlockVAE(), None, None, fashion_transformer())
    pipe.default_sample_size = SIDE // pipe.vae_scale_factor
    return pipe


# ---- Random models -------------------------------------------------------------------------------


def tiny_pipeline(family: Family, seed: int = 0) -> Any:
    """A complete pipeline of the family with small random weights: built in seconds, offline."""
    diffusers = import_diffusers()
    import transformers

    parts = {"qwen": _qwen_parts, "flux": _flux_parts, "flux2": _flux2_parts}[family.name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = parts(diffusers, transformers)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = getattr(diffusers, family.pipeline)(scheduler=scheduler, **parts)
    pipe.default_sample_size = 8  # images of 64 x 64
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return pipe


def tiny_adapter(
    transformer: nn.Module, gmflow: bool, policy: dict | None = None, seed: int = 0
) -> Adapter:
    """A random adapter for a tiny base: K = 8 or N = 10, LoRA rank 2."""
    config = {"_class_name": type(transformer).__name__}
    if gmflow:
        config |= {"num_gaussians": 8, "logstd_inner_dim": 12}
    else:
        config |= {"out_channels": 10 * transformer.config["in_channels"]}
    empty = Adapter("tiny", config, {"proj_out.bias": torch.empty(0)}, policy)
    shapes = expected_shapes(transformer, empty)
    for name, module in transformer.named_modules():
        if name.startswith("transformer_blocks") and isinstance(module, nn.Linear):
            shapes[f"{name}.lora_A.weight"] = (2, module.in_features)
            shapes[f"{name}.lora_B.weight"] = (module.out_features, 2)
    generator = torch.Generator().manual_seed(seed)
    tensors = {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return empty._replace(tensors=tensors)


NETWORK = {
    "in_channels": 16, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12,
    "joint_attention_dim": 24,
}  # fmt: skip
VAE = {
    "latent_channels": 4, "block_out_channels": (8,) * 4, "norm_num_groups": 4,
    "layers_per_block": 1, "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
IDS = {"vocab_size": 258, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
TEXT = IDS | {"num_attention_heads": 2, "num_key_value_heads": 2}


def _qwen_parts(diffusers: Any, transformers: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    text = TEXT | {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
        "max_position_embeddings": 2048, "rope_parameters": rope, "rope_scaling": rope,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision | {"out_hidden_size": 24}
    )
    return {
        "transformer": diffusers.QwenImageTransformer2DModel(
            **NETWORK, out_channels=4, axes_dims_rope=(2, 4, 6)
        ),
        "vae": diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 1.5, 0.5, 2.0],
        ),
        "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(config),
        "tokenizer": _byte_tokenizer(2048),
    }  # fmt: skip


def _flux_parts(diffusers: Any, transformers: Any) -> dict[str, Any]:
    clip = IDS | {"hidden_size": 20, "intermediate_size": 20, "num_hidden_layers": 1}
    clip = transformers.CLIPTextConfig(**clip, num_attention_heads=2)
    t5 = {"vocab_size": 258, "d_model": 24, "d_kv": 12, "d_ff": 32, "num_layers": 1}
    return {
        "transformer": diffusers.FluxTransformer2DModel(
            **NETWORK, num_single_layers=2, pooled_projection_dim=20, axes_dims_rope=(2, 4, 6),
            guidance_embeds=True,
        ),
        "vae": diffusers.AutoencoderKL(**VAE, scaling_factor=0.4, shift_factor=0.1),
        "text_encoder": transformers.CLIPTextModel(clip),
        "tokenizer": _byte_tokenizer(77),
        "text_encoder_2": transformers.T5EncoderModel(transformers.T5Config(**t5, num_heads=2)),
        "tokenizer_2": _byte_tokenizer(512),
    }  # fmt: skip


def _flux2_parts(diffusers: Any, transformers: Any) -> dict[str, Any]:
    size = {"hidden_size": 8, "intermediate_size": 8}
    text = TEXT | size | {"model_type": "mistral", "num_hidden_layers": 31, "head_dim": 4}
    vision = size | {"model_type": "pixtral", "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Mistral3Config(  # the pipeline reads the layers 10, 20 and 30
        text_config=text, vision_config=vision | {"image_size": 32, "patch_size": 16}
    )
    return {
        "transformer": diffusers.Flux2Transformer2DModel(
            **NETWORK, num_single_layers=2, axes_dims_rope=(2, 2, 4, 4),
            timestep_guidance_channels=64,
        ),
        "vae": diffusers.AutoencoderKLFlux2(**VAE),
        "text_encoder": transformers.Mistral3ForConditionalGeneration(config),
        "tokenizer": _byte_tokenizer(512),
    }  # fmt: skip


def _byte_tokenizer(max_length: int) -> Any:
    """A tokenizer whose tokens are bytes; 0 pads, 1 ends."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
        model_max_length=max_length, padding_side="right",
    )  # fmt: skip
    wrapped.chat_template = "{% for m in messages %}{{ m['content'][0]['text'] }}\n{% endfor %}"
    return wrapped
