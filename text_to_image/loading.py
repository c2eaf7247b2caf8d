"""Base models of the families: loading, quantisation, offloading, and how much memory they need."""

import gc
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from text_to_image.families import (
    PATCH,
    Family,
    import_diffusers,
    naming,
    require_package,
)

GB = 1e9
BYTES_PER_WEIGHT = {"none": 2.0, "int8": 1.01, "nf4": 0.57}  # with the scales of the blocks
QUANTIZE_HELP = (
    "none: as the base is stored, 2 bytes per weight. int8 (torchao): 1 byte, slightly other "
    "pictures. nf4 (bitsandbytes, CUDA only): 0.6 bytes, visibly other details. Both apply to the "
    "transformer and the large text encoder, and cost some time per evaluation"
)
OFFLOADS = {
    "none": "everything stays on the GPU",
    "model": "one component at a time on the GPU, each moved there once per call",
    "group": "one layer at a time; a few GB suffice, but all weights cross the bus in every "
    "network evaluation, and main memory must hold them",
}


def offload_help(names: Iterable[str]) -> str:
    """What the named ways of offloading do and cost."""
    return "; ".join(f"{name}: {OFFLOADS[name]}" for name in names)


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
        for name, part in index.items():
            if not isinstance(part, list | tuple) or part[1] is None:
                continue
            if name in ("transformer", "vae"):
                cls = getattr(diffusers, part[1])
                config = cls.load_config(base, subfolder=name)
                quantized = config.pop("quantization_config", None)
                modules[name] = cls.from_config(config)
            elif name.startswith("text_encoder"):
                cls = getattr(transformers, part[1])
                config = cls.config_class.from_pretrained(base, subfolder=name)
                quantized = getattr(config, "quantization_config", None)
                modules[name] = cls(config)
            else:
                continue
            modules[name].quantized = quantized is not None
        vae = modules["vae"].config
        tokens = modules["transformer"].config["in_channels"]
        latents = vae.get("latent_channels") or vae["z_dim"]
        if tokens != PATCH**2 * latents:
            given = f"the transformer takes {tokens} channels per token"
            raise ValueError(f"{given}, the VAE gives {PATCH**2} x {latents}")
    return modules


def quantization_config(family: Family, quantize: str, dtype: torch.dtype) -> Any:
    """The diffusers config that quantises transformer and large text encoder while loading."""
    diffusers = import_diffusers()
    import transformers

    keep = list(family.keep)
    if quantize == "int8":
        require_package("torchao", "--quantize int8")
        from torchao.quantization import Int8WeightOnlyConfig

        for_network = diffusers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=keep)
        for_text = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        require_package("bitsandbytes", "--quantize nf4")
        if not torch.cuda.is_available():
            raise ValueError("--quantize nf4 needs a CUDA GPU; use int8 or none")
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        options["bnb_4bit_compute_dtype"] = dtype
        for_network = diffusers.BitsAndBytesConfig(**options, llm_int8_skip_modules=keep)
        for_text = transformers.BitsAndBytesConfig(**options)
    return diffusers.PipelineQuantizationConfig(
        quant_mapping={"transformer": for_network, family.big_text_encoder: for_text}
    )


def load_base(
    family: Family, base: str | None = None, dtype: torch.dtype = torch.bfloat16,
    quantize: str = "none", without: Sequence[str] = (),
) -> Any:  # fmt: skip
    """The base pipeline of diffusers, on the CPU; `without` names components to leave out.

    A base that is stored quantised (FLUX.2-dev-bnb-4bit) is loaded as it is. Only safetensors files
    are read. Raises: OSError or ValueError that names the base.
    """
    pipeline, base = pipeline_class(family), base or family.repo
    options = dict.fromkeys(without)
    if quantize != "none":
        options["quantization_config"] = quantization_config(family, quantize, dtype)
    with warnings.catch_warnings(), naming(f"base {base}"):
        # the argument's new name, dtype, is unknown to diffusers 0.37
        warnings.filterwarnings("ignore", message=".*torch_dtype.*")
        return pipeline.from_pretrained(base, torch_dtype=dtype, use_safetensors=True, **options)


def place(pipe: Any, device: torch.device, offload: str = "none") -> None:
    """Moves a pipeline to its device, or sets up offloading ("model" or "group")."""
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        stream = device.type == "cuda"
        pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=stream)
    else:
        pipe.to(device)


def release_memory() -> None:
    """Hands the GPU memory of components that nothing refers to any more back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- Memory --------------------------------------------------------------------------------------


def component_sizes(
    family: Family, modules: dict[str, nn.Module], base: str | None = None, quantize: str = "none"
) -> dict[str, tuple[float, float]]:
    """Component -> (bytes of its weights, bytes of its largest layer). modules: see above.

    A component that is stored quantised has the size of its files, the others 2 bytes per weight
    or what `quantize` leaves.
    Raises: ValueError if a component is to be quantised once more.
    """
    sizes = {}
    for name, module in modules.items():
        layers = [parameter.numel() for parameter in module.parameters()]
        quantizes = quantize != "none" and name in ("transformer", family.big_text_encoder)
        per_weight = BYTES_PER_WEIGHT[quantize if quantizes else "none"]
        if getattr(module, "quantized", False):
            if quantizes:
                raise ValueError(f"--quantize {quantize}: the base's {name} is quantised already")
            per_weight = stored_bytes(base or family.repo, name) / sum(layers)
        sizes[name] = sum(layers) * per_weight, max(layers) * per_weight
    return sizes


def stored_bytes(base: str, component: str) -> int:
    """Size of a component's safetensors files, in a folder or on the Hub."""
    folder = Path(base)
    if not folder.is_dir():
        from huggingface_hub import HfApi

        files = HfApi().list_repo_tree(base, component)
        return sum(file.size for file in files if file.path.endswith(".safetensors"))
    return sum(path.stat().st_size for path in (folder / component).glob("*.safetensors"))


def memory_needed(
    weights: float, family: Family, pixels: int, batch: int, kept_layers: int = 0
) -> float:
    """Estimate, in bytes, of the GPU memory for images of `pixels`, `batch` at a time.

    40 values of 2 bytes per token and hidden channel inside a block, one more for each layer whose
    input is kept for the backward pass. 0.7 GB for CUDA itself.
    """
    tokens = batch * (pixels / 256 + 512)
    return weights + tokens * family.width * 2 * (40 + kept_layers) + 0.7 * GB


def weights_on_gpu(sizes: dict[str, tuple[float, float]], offload: str = "none") -> float:
    """Bytes: all components, the largest one (offload "model"), or four layers ("group")."""
    totals, layers = zip(*sizes.values(), strict=True)
    return {"none": sum(totals), "model": max(totals), "group": 4 * max(layers)}[offload]


def check_memory(need: float, device: torch.device, parts: str, helps: str) -> str:
    """One line about the memory that a run needs, to be printed before anything is loaded.

    Args: parts: what the bytes are for; helps: flags that need less.
    Raises: ValueError if the GPU has less free memory.
    """
    line = f"about {need / GB:.0f} GB for {parts}"
    if device.type != "cuda":
        return f"memory: {line}"
    free = torch.cuda.mem_get_info(device)[0] / GB
    if need > free * GB:
        raise ValueError(
            f"not enough GPU memory: {line} are needed, {free:.0f} GB are free; try {helps}"
        )
    return f"GPU memory: {line}; {free:.0f} GB are free"
