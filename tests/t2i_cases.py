"""What the tests of text_to_image/ share: the recorded cases, small models, comparisons.

tests/data/t2i: tiny random transformers (2 layers, 24 wide) with adapters in the published layout,
and what a public implementation computed with them on a CPU in float32: direct calls (`direct_*`,
`b2_*`: a batch of two) and the final latents of whole runs (`run_*`).
"""

import contextlib
import functools
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs requirements-extra.txt (diffusers)")
pytest.importorskip("transformers", reason="needs requirements-extra.txt (transformers)")
pytest.importorskip("peft", reason="needs requirements-extra.txt (peft)")

import diffusers  # noqa: E402
import transformers  # noqa: E402

import text_to_image.families as dm  # noqa: E402
from text_to_image.adapters import (  # noqa: E402
    Adapter,
    apply_adapter,
    expected_shapes,
    policy_of,
    read_adapter,
    write_adapter,
)
from text_to_image.few_step import FewStep  # noqa: E402
from text_to_image.generate import MODELS, load  # noqa: E402

DATA = Path(__file__).parent / "data" / "t2i"
CASES = {
    "gmqwen": "qwen",
    "dxqwen": "qwen",
    "dxqwen_poly": "qwen",
    "gmflux": "flux",
    "dxflux": "flux",
    "gmflux2": "flux2",
}
GM = [case for case in CASES if case.startswith("gm")]
DX = [case for case in CASES if case.startswith("dx")]
SIZE = {"height": 64, "width": 48}


def transformer(case: str) -> torch.nn.Module:
    cls = getattr(diffusers, dm.FAMILIES[CASES[case]].transformer)
    folder = DATA / case.removesuffix("_poly") / "base_transformer"
    return cls.from_pretrained(folder, local_files_only=True)


class Bare:
    """What of a pipeline a network call needs."""

    _execution_device = torch.device("cpu")

    def __init__(self, network):
        self.transformer = network


@functools.cache
def few_step(case: str, scale: float = 1.0, folder: Path | None = None) -> FewStep:
    """A recorded adapter on its base; shared by tests, which leave it as it is."""
    adapter = read_adapter(str(folder or DATA / case / "adapter"))
    network = transformer(case)
    apply_adapter(network, adapter, scale)
    return FewStep(Bare(network), dm.FAMILIES[CASES[case]], policy_of(adapter), 4, True)


@functools.cache
def tiny(model: str) -> FewStep:
    """A random model; shared by tests, which leave it as it is."""
    return load_random(model)


def load_random(model: str, **options) -> FewStep:
    """`load` on a random base with text encoders; a random adapter if none is given."""
    with random_models(model):
        return load(model, tiny=True, device="cpu", **options)


@contextlib.contextmanager
def random_models(*models: str):
    """Within the block --tiny stands for random models with text encoders, 24 wide."""
    with tempfile.TemporaryDirectory() as folder:
        for name in models:
            card = MODELS[name]
            net = tiny_pipeline(dm.FAMILIES[card.family]).transformer
            adapter = tiny_adapter(net, card.policy is None, card.policy or {"type": "GMFlow"})
            write_adapter(f"{folder}/{name}", adapter)
        adapters = {name: f"{folder}/{name}" for name in models}
        with (
            mock.patch("text_to_image.generate.demo_pipeline", tiny_pipeline),
            mock.patch("text_to_image.generate.ADAPTERS", adapters),
        ):
            yield


class Recorded:
    """The arrays of one case."""

    def __init__(self, case: str):
        self.arrays = dict(np.load(DATA / case / "io.npz"))
        guidance = self.arrays.get("guidance_scale")
        self.guidance = None if guidance is None else float(guidance)

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key])

    def runs(self) -> list[str]:
        return [key[4:-6] for key in self.arrays if key.startswith("run_")]

    def conditions(self, prefix: str = "", mask: str | None = None) -> dm.Conditions:
        pooled = f"{prefix}pooled_prompt_embeds"
        return dm.Conditions(
            self[f"{prefix}prompt_embeds"],
            mask=None if mask is None else self[mask],
            pooled=self[pooled] if pooled in self.arrays else None,
        )


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


# ---- Random models -------------------------------------------------------------------------------


def tiny_pipeline(family: dm.Family, seed: int = 0):
    """A complete pipeline of the family with small random weights: built in seconds, offline."""
    parts = {"qwen": _qwen_parts, "flux": _flux_parts, "flux2": _flux2_parts}[family.name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = parts()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = getattr(diffusers, family.pipeline)(scheduler=scheduler, **parts)
    pipe.default_sample_size = 8  # images of 64 x 64
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe


def tiny_adapter(
    transformer: torch.nn.Module, gmflow: bool, policy: dict | None = None, seed: int = 0
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
        if name.startswith("transformer_blocks") and isinstance(module, torch.nn.Linear):
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


def _qwen_parts() -> dict:
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


def _flux_parts() -> dict:
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


def _flux2_parts() -> dict:
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


def _byte_tokenizer(max_length: int):
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
