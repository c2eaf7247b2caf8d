"""Base models of the families: loading, quantisation, offloading, and how much memory they need."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from common.memory import activation_bytes
from text_to_image.families import Family, import_diffusers, naming, require_package

BYTES_PER_WEIGHT = {"none": 2.0, "int8": 1.01, "nf4": 0.57}  # with the scales of the blocks
QUANTIZE_HELP = (
    "none: as the base is stored, 2 bytes per weight. int8 (torchao): 1 byte, slightly other "
    "pictures. nf4 (bitsandbytes, CUDA only): 0.6 bytes, visibly other details. Both apply to the "
    "transformer and the large text encoder, and cost some time per evaluation"
)
OFFLOADS = ("none", "model", "group")
OFFLOAD_HELP = (
    "none: everything stays on the GPU. model: one component at a time. group: one layer at a "
    "time; a few GB suffice, but all weights cross the bus in every network evaluation. "
    "On a CPU both only cost time"
)


# ---- Loading -------------------------------------------------------------------------------------


def pipeline_class(family: Family) -> type:
    """The family's pipeline in diffusers."""
    return getattr(import_diffusers(), family.pipeline)


def empty_components(family: Family, base: str | None = None) -> dict[str, nn.Module]:
    """Transformer, VAE and text encoders on the meta device, from the configs alone.

    Raises: OSError or ValueError that names the base.
    """
    diffusers = import_diffusers()
    import transformers

    base, modules = base or family.repo, {}
    with naming(f"base {base}"), torch.device("meta"):
        index = pipeline_class(family).load_config(base)
        if index["_class_name"] != family.pipeline:
            raise ValueError(f"it is of a {index['_class_name']}, not a {family.pipeline}")
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
            library, kind = index.get(name) or (None, None)
            if library == "diffusers":
                cls = getattr(diffusers, kind)
                config = cls.load_config(base, subfolder=name)
                stored = config.pop("quantization_config", None)
                modules[name] = cls.from_config(config)
            elif library == "transformers":
                cls = getattr(transformers, kind)
                config = cls.config_class.from_pretrained(base, subfolder=name)
                stored = getattr(config, "quantization_config", None)
                modules[name] = cls(config)
            if name in modules:
                modules[name].stored = stored  # None, or how the weights are quantised
        if "transformer" not in modules:
            raise ValueError("its model_index.json names no transformer")
    return modules


def quantization_config(family: Family, quantize: str, dtype: torch.dtype) -> Any:
    """The diffusers config that quantises transformer and large text encoder while loading."""
    diffusers = import_diffusers()
    import transformers

    keep = list(family.keep)
    if quantize == "int8":
        require_package("torchao", "--quantize int8")
        from torchao.quantization import Int8WeightOnlyConfig

        network = diffusers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=keep)
        text = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        require_package("bitsandbytes", "--quantize nf4")
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        options["bnb_4bit_compute_dtype"] = dtype
        network = diffusers.BitsAndBytesConfig(**options, llm_int8_skip_modules=keep)
        text = transformers.BitsAndBytesConfig(**options)
    return diffusers.PipelineQuantizationConfig(
        quant_mapping={"transformer": network, family.text_parts[0]: text}
    )


def load_base(
    family: Family, base: str | None = None, dtype: torch.dtype = torch.bfloat16,
    quantize: str = "none", without: Sequence[str] = (),
) -> Any:  # fmt: skip
    """The base pipeline of diffusers, on the CPU; `without` names components to leave out.

    A base that is stored quantised (FLUX.2-dev-bnb-4bit) is loaded as it is. Only safetensors files
    are read. Raises: OSError or ValueError that names the base.
    """
    options = dict.fromkeys(without)
    if quantize != "none":
        options["quantization_config"] = quantization_config(family, quantize, dtype)
    base = base or family.repo
    with warnings.catch_warnings(), naming(f"base {base}"):
        # the argument's new name, dtype, is unknown to diffusers 0.37
        warnings.filterwarnings("ignore", message=".*torch_dtype.*")
        return pipeline_class(family).from_pretrained(
            base, torch_dtype=dtype, use_safetensors=True, **options
        )


def place(pipe: Any, device: torch.device, offload: str = "none") -> None:
    """Moves a pipeline to its device, or sets up offloading ("model" or "group")."""
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        stream = device.type == "cuda"
        pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=stream)
    else:
        pipe.to(device)


# ---- Memory --------------------------------------------------------------------------------------


def weights_on_gpu(
    family: Family, modules: dict[str, nn.Module], quantize: str = "none", offload: str = "none"
) -> float:
    """Bytes: all components, the largest one (offload "model"), or four layers ("group")."""
    totals, layers = [], []
    for name, module in modules.items():
        kind = quantize if name in ("transformer", family.text_parts[0]) else "none"
        stored = getattr(module, "stored", None)
        if stored is not None:
            kind = "nf4" if stored.get("load_in_4bit") else "int8"
        sizes = [BYTES_PER_WEIGHT[kind] * parameter.numel() for parameter in module.parameters()]
        totals.append(sum(sizes))
        layers.append(max(sizes))
    return {"none": sum(totals), "model": max(totals), "group": 4 * max(layers)}[offload]


def memory_needed(
    weights: float, family: Family, pixels: int, batch: int, layers: int = 0,
    checkpointing: bool = True,
) -> float:  # fmt: skip
    """Estimate, in bytes, of the GPU memory for images of `pixels`, `batch` at a time.

    Weights, activations (layers, checkpointing: see common.memory), and 0.7 GB for CUDA itself.
    """
    tokens = batch * (pixels / 256 + 512)
    return weights + activation_bytes(tokens, family.width, layers, checkpointing) + 0.7e9


def check_memory(need: float, device: torch.device, helps: str) -> str:
    """One line about the memory that a run needs, to be printed before anything is loaded.

    Raises: ValueError if the GPU has less free memory; helps: flags that need less.
    """
    line = f"about {need / 1e9:.0f} GB of GPU memory are needed"
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        line += f", {free / 1e9:.0f} GB are free"
        if need > free:
            raise ValueError(f"{line}; try {helps}")
    return line
