"""Small stand-ins of the three base models and of their adapters, for --tiny and the tests.

    pipe = demo_pipeline(FAMILIES["qwen"])  # Qwen-Image: a trained model of clothes; FLUX: random
    pipe = tiny_pipeline(FAMILIES["qwen"])  # random weights, with text encoder and VAE
    apply_adapter(pipe.transformer, tiny_adapter(pipe.transformer, gmflow=True))

They go through the same code as the real ones. The pictures of random weights are noise.
"""

from typing import Any

import torch
from torch import nn

from text_to_image.adapters import Adapter, expected_shapes
from text_to_image.families import Family, import_diffusers
from text_to_image.tiny_fashion import fashion_pipeline


def demo_pipeline(family: Family) -> Any:
    """What --tiny works on: fashion_pipeline() for Qwen-Image, tiny_pipeline(family) for FLUX."""
    return fashion_pipeline() if family.name == "qwen" else tiny_pipeline(family)


def tiny_pipeline(family: Family, seed: int = 0) -> Any:
    """A complete pipeline of the family with small random weights: built in seconds, offline.

    It goes through the same code as the real one. Its pictures are noise.
    """
    diffusers = import_diffusers()
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = _TINY[family.name](diffusers, transformers)
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
    config = {"_class_name": type(transformer).__name__, "num_gaussians": 8, "logstd_inner_dim": 12}
    if not gmflow:
        config = config | {"out_channels": 10 * transformer.config["in_channels"]}
        del config["num_gaussians"]
    empty = Adapter("tiny", config, {"proj_out.bias": torch.empty(0)}, None)
    shapes = expected_shapes(transformer, empty)
    for name, module in transformer.named_modules():
        if name.startswith("transformer_blocks") and isinstance(module, nn.Linear):
            shapes[f"{name}.lora_A.weight"] = (2, module.in_features)
            shapes[f"{name}.lora_B.weight"] = (module.out_features, 2)
    generator = torch.Generator().manual_seed(seed)
    tensors = {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return Adapter(empty.name, config, tensors, policy)


_NETWORK = {
    "in_channels": 16, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12,
    "joint_attention_dim": 24,
}  # fmt: skip
_VAE = {
    "latent_channels": 4, "block_out_channels": (8,) * 4, "norm_num_groups": 4,
    "layers_per_block": 1, "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
_LANGUAGE = {
    "vocab_size": 258, "num_attention_heads": 2, "num_key_value_heads": 2,
    "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def _tiny_qwen(diffusers: Any, transformers: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    text = {
        **_LANGUAGE, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
        "max_position_embeddings": 2048, "rope_parameters": rope, "rope_scaling": rope,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
        "out_hidden_size": 24,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return {
        "transformer": diffusers.QwenImageTransformer2DModel(
            **_NETWORK, out_channels=4, axes_dims_rope=(2, 4, 6)
        ),
        "vae": diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 1.5, 0.5, 2.0],
        ),
        "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(config),
        "tokenizer": _byte_tokenizer(2048),
    }  # fmt: skip


def _tiny_flux(diffusers: Any, transformers: Any) -> dict[str, Any]:
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    clip = transformers.CLIPTextConfig(
        vocab_size=258, hidden_size=20, intermediate_size=20, num_hidden_layers=1,
        num_attention_heads=2, **ids,
    )  # fmt: skip
    t5 = transformers.T5Config(
        vocab_size=258, d_model=24, d_kv=12, d_ff=32, num_layers=1, num_heads=2
    )
    return {
        "transformer": diffusers.FluxTransformer2DModel(
            **_NETWORK, num_single_layers=2, pooled_projection_dim=20, axes_dims_rope=(2, 4, 6),
            guidance_embeds=True,
        ),
        "vae": diffusers.AutoencoderKL(**_VAE, scaling_factor=0.4, shift_factor=0.1),
        "text_encoder": transformers.CLIPTextModel(clip),
        "tokenizer": _byte_tokenizer(77),
        "text_encoder_2": transformers.T5EncoderModel(t5),
        "tokenizer_2": _byte_tokenizer(512),
    }  # fmt: skip


def _tiny_flux2(diffusers: Any, transformers: Any) -> dict[str, Any]:
    size = {"hidden_size": 8, "intermediate_size": 8}
    text = {  # the pipeline reads the layers 10, 20 and 30
        **_LANGUAGE, **size, "model_type": "mistral", "num_hidden_layers": 31, "head_dim": 4,
    }  # fmt: skip
    vision = {
        **size, "model_type": "pixtral", "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    config = transformers.Mistral3Config(text_config=text, vision_config=vision)
    return {
        "transformer": diffusers.Flux2Transformer2DModel(
            **_NETWORK, num_single_layers=2, axes_dims_rope=(2, 2, 4, 4),
            timestep_guidance_channels=64,
        ),
        "vae": diffusers.AutoencoderKLFlux2(**_VAE),
        "text_encoder": transformers.Mistral3ForConditionalGeneration(config),
        "tokenizer": _byte_tokenizer(512),
    }  # fmt: skip


_TINY = {"qwen": _tiny_qwen, "flux": _tiny_flux, "flux2": _tiny_flux2}


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
