"""Qwen-Image, FLUX.1 and FLUX.2 through diffusers, behind one interface.

The base pipeline of diffusers does prompts, reference images, VAE, quantisation and offloading.
Latents are NCHW in all three families, x (B, C, H, W):

    conditions = encode_prompts(pipe, family, prompts)       text encoder
    tokens = evaluate(pipe, family, x, t, conditions)        one network evaluation
    velocity = unpack(tokens, x)                             tokens -> NCHW
    images = decode(pipe, family, x)                         VAE

Nothing here knows about policies. Latent tokens are 2 x 2 patches, row by row; the channels of a
token are (channel, row in patch, column in patch), slowest first, in all three families.
"""

import contextlib
import gc
import importlib.util
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH = 2  # latent pixels per token and side
REFERENCE_AREA = 1024 * 1024  # in pixels; larger reference images are shrunk to it
BYTES_PER_WEIGHT = {"none": 2.0, "int8": 1.01, "nf4": 0.57}  # with the scales of the blocks
GB = 1e9


@dataclass(frozen=True)
class Family:
    """One base model: where it is and what its pipeline and network are called."""

    name: str
    repo: str
    pipeline: str
    transformer: str
    big_text_encoder: str  # the component worth quantising beside the transformer
    guidance: float | None = None  # the embedded guidance that adapters were distilled at


FAMILIES = {
    "qwen": Family(
        "qwen", "Qwen/Qwen-Image", "QwenImagePipeline", "QwenImageTransformer2DModel",
        "text_encoder",
    ),
    "flux": Family(
        "flux", "black-forest-labs/FLUX.1-dev", "FluxPipeline", "FluxTransformer2DModel",
        "text_encoder_2", guidance=3.5,
    ),
    "flux2": Family(
        "flux2", "black-forest-labs/FLUX.2-dev", "Flux2Pipeline", "Flux2Transformer2DModel",
        "text_encoder", guidance=4.0,
    ),
}  # fmt: skip


def require_package(name: str, why: str, install: str | None = None) -> None:
    """Raises ImportError, one line that says what to install, if a package is missing."""
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"{why} needs the package {name!r}: pip install {install or name}")


def import_diffusers() -> Any:
    """The diffusers module, or an ImportError that says what to install."""
    for name in ("diffusers", "transformers"):
        require_package(name, "text to image", "-r requirements-extra.txt")
    import diffusers

    return diffusers


def library_class(module: Any, name: str) -> type:
    """A class of diffusers or transformers. Raises: ImportError if this version has none."""
    if not hasattr(module, name):
        package, version = module.__name__, module.__version__
        raise ImportError(f"{package} {version} has no {name}: pip install -U {package}")
    return getattr(module, name)


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Errors of a library, of whatever type, become one that begins with `what`: the file at fault.

    Raises: OSError for an OSError, else ValueError; ImportError and lack of memory as they are.
    """
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        known = isinstance(error, OSError | ValueError) and str(error)
        reason = error if known else f"{type(error).__name__} {error}"
        raise kind(f"{what}: {reason}") from error


# ------------------------------------------------------------------------------------------------
# Latents as images, and as tokens
# ------------------------------------------------------------------------------------------------


def pack(x: Tensor) -> Tensor:
    """Latents (B, C, H, W) -> tokens (B, S, 4 C), S = H/2 W/2."""
    return F.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, x: Tensor) -> Tensor:
    """The first H/2 W/2 tokens (B, >= S, 4 M) -> (B, M, H, W), with H, W of x."""
    h, w = x.shape[-2] // PATCH, x.shape[-1] // PATCH
    grid = tokens[:, : h * w].transpose(1, 2).unflatten(2, (h, w))  #     (B, 4 M, H/2, W/2)
    return F.pixel_shuffle(grid, PATCH)


def latent_shape(pipe: Any, height: int, width: int) -> tuple[int, int, int]:
    """(C, H, W) of the latents of an image whose sides are multiples of `size_step`."""
    scale = pipe.vae_scale_factor
    return pipe.transformer.config.in_channels // PATCH**2, height // scale, width // scale


def size_step(pipe: Any) -> int:
    """Image sides must be multiples of this: 16 for all three families."""
    return pipe.vae_scale_factor * PATCH


def check_channels(transformer: torch.nn.Module, vae: torch.nn.Module) -> None:
    """Raises: ValueError unless a transformer's tokens are 2 x 2 patches of a VAE's latents."""
    tokens = transformer.config["in_channels"]
    latents = vae.config.get("latent_channels") or vae.config["z_dim"]
    if tokens != PATCH**2 * latents:
        given = f"the transformer takes {tokens} channels per token"
        raise ValueError(f"{given}, the VAE gives {PATCH**2} x {latents}")


def trained_guidance(transformer: torch.nn.Module, family: Family) -> float | None:
    """The embedded guidance of a family's adapters; None if the transformer embeds none.

    Raises: ValueError if it embeds one although the family has none.
    """
    embeds = transformer.config.get("guidance_embeds", False)
    if embeds and family.guidance is None:
        raise ValueError(f"the transformer embeds a guidance; {family.name} adapters have none")
    return family.guidance if embeds else None


# ------------------------------------------------------------------------------------------------
# Conditions and the network
# ------------------------------------------------------------------------------------------------


class Conditions(NamedTuple):
    """What the network gets beside x and t, one row per sample."""

    embeds: Tensor  #                          (B, L, D)  prompt
    mask: Tensor | None = None  #              (B, L)     Qwen: which of the L are text; None = all
    pooled: Tensor | None = None  #            (B, P)     FLUX.1
    references: Tensor | None = None  #        (B, R, 4 C)  FLUX.2: tokens of the input images
    reference_ids: Tensor | None = None  #     (B, R, 4)    and their positions

    def rows(self, index: Any) -> "Conditions":
        """The samples that `index` (a slice or list) picks."""
        return Conditions(*(None if value is None else value[index] for value in self))

    def to(self, device: torch.device, dtype: torch.dtype) -> "Conditions":
        """The same there; floating-point parts in `dtype`, but positions."""
        moved = (None if value is None else value.to(device) for value in self)
        kinds = (dtype, None, dtype, dtype, None)
        return Conditions(*(
            value if kind is None or value is None else value.to(kind)
            for value, kind in zip(moved, kinds, strict=True)
        ))  # fmt: skip

    @staticmethod
    def stack(parts: Sequence["Conditions"]) -> "Conditions":
        """Prompts of different lengths as one batch, padded and masked (Qwen)."""
        length = max(part.embeds.shape[1] for part in parts)
        embeds, masks = [], []
        for embed, mask, *_ in parts:
            mask = embed.new_ones(embed.shape[:2], dtype=torch.bool) if mask is None else mask
            embeds.append(F.pad(embed, (0, 0, 0, length - embed.shape[1])))
            masks.append(F.pad(mask.bool(), (0, length - mask.shape[1])))
        mask = torch.cat(masks)
        return Conditions(torch.cat(embeds), None if mask.all() else mask)


@torch.no_grad()
def encode_prompts(
    pipe: Any, family: Family, prompts: Sequence[str], max_length: int = 512
) -> Conditions:
    """Prompts -> `Conditions`, by the text encoders of the pipeline, on its execution device."""
    device = pipe._execution_device
    encoded = pipe.encode_prompt(
        prompt=list(prompts), device=device, max_sequence_length=max_length
    )
    if family.name == "qwen":
        embeds, mask = encoded  # mask is None where no prompt is padded
        return Conditions(embeds, mask=mask)
    if family.name == "flux":
        return Conditions(encoded[0], pooled=encoded[1])
    return Conditions(encoded[0])


def read_image(image: Any) -> Any:
    """A PIL image, or a path to one, as diffusers reads it: upright, RGB, 8 bits.

    16-bit images are scaled, transparent ones are put on white (diffusers shows what is hidden).
    Warns: once, about what was changed. Raises: OSError or ValueError that names the file.
    """
    require_package("PIL", "reading images", "pillow")
    import numpy as np
    from PIL import Image, ImageOps

    name, notes = f"image {image if isinstance(image, str | Path) else ''}".strip(), []
    with naming(name), contextlib.ExitStack() as files:
        if isinstance(image, str | Path):
            image = files.enter_context(Image.open(image))
        image.load()
        if getattr(image, "n_frames", 1) > 1:
            notes.append(f"first of {image.n_frames} frames")
        if image.getexif().get(0x0112, 1) != 1:  # orientation
            image = ImageOps.exif_transpose(image)
            notes.append("turned upright (EXIF)")
        if image.mode == "F":
            raise ValueError("floating-point pixels; use 8 or 16 bits")
        if image.mode.startswith("I"):
            values = np.asarray(image).astype(np.int64)
            if values.min() < 0 or values.max() > 65535:
                raise ValueError(f"pixels {values.min()} to {values.max()}; use 8 or 16 bits")
            image = Image.fromarray((values / 257).round().astype(np.uint8))
            notes.append("16 bits scaled to 8")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if image.getextrema()[3][0] < 255:
                notes.append("transparent pixels on white")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    if notes:
        warnings.warn(f"{name}: {', '.join(notes)}", stacklevel=2)
    return image


def reference_size(pipe: Any, image: Any) -> tuple[int, int]:
    """(height, width) that a PIL image has as a reference: at most a megapixel, multiples of 16."""
    image, step = _shrunk(pipe, image), size_step(pipe)
    return image.height // step * step, image.width // step * step


def _shrunk(pipe: Any, image: Any) -> Any:
    if image.width * image.height <= REFERENCE_AREA:
        return image
    return pipe.image_processor._resize_to_target_area(image, REFERENCE_AREA)


@torch.no_grad()
def encode_references(pipe: Any, images: Sequence[Any], samples: int) -> tuple[Tensor, Tensor]:
    """FLUX.2 editing: PIL images -> tokens (B, R, 4 C) and their ids (B, R, 4), B = samples.

    Prepared as the base pipeline does: shrunk to a megapixel if larger, cropped to the size step.
    Raises: ValueError if an image is too small or too narrow for it.
    """
    processor, tensors = pipe.image_processor, []
    for i, image in enumerate(images):
        with naming(f"reference image {i + 1}"):
            processor.check_image_input(image)
            size = reference_size(pipe, image)
            tensors.append(processor.preprocess(_shrunk(pipe, image), *size, resize_mode="crop"))
    return pipe.prepare_image_latents(
        tensors, samples, None, pipe._execution_device, pipe.vae.dtype
    )


def _grid(rows: int, columns: int, device: torch.device) -> Tensor:
    """Positions (S, 2) of the tokens, row by row."""
    axes = torch.arange(rows, device=device), torch.arange(columns, device=device)
    return torch.cartesian_prod(*axes).view(-1, 2)


def network_inputs(
    family: Family, x: Tensor, t: Tensor, conditions: Conditions, guidance: float | None
) -> dict[str, Any]:
    """Keyword arguments of the family's transformer for x (B, C, H, W), t (B,)."""
    embeds, (b, length) = conditions.embeds, conditions.embeds.shape[:2]
    h, w = x.shape[-2] // PATCH, x.shape[-1] // PATCH
    tokens = pack(x).to(embeds.dtype)  #                                  (B, S, 4 C)
    inputs = {"hidden_states": tokens, "encoder_hidden_states": embeds, "timestep": t}
    if family.name == "qwen":
        return inputs | {
            "encoder_hidden_states_mask": conditions.mask,
            "img_shapes": [[(1, h, w)]] * b,
        }
    if guidance is not None:
        inputs["guidance"] = t.new_full((b,), guidance)
    positions = _grid(h, w, x.device)
    if family.name == "flux":  # ids (0, row, column), no batch axis; all text tokens at 0
        inputs["pooled_projections"] = conditions.pooled
        inputs["img_ids"] = F.pad(positions, (1, 0)).float()
        inputs["txt_ids"] = torch.zeros(length, 3, device=x.device)
        return inputs
    # FLUX.2: ids (image, row, column, position in the text)
    image_ids = F.pad(positions, (1, 1)).expand(b, -1, -1)
    text_ids = F.pad(torch.arange(length, device=x.device)[:, None], (3, 0))
    if conditions.references is not None:
        inputs["hidden_states"] = torch.cat([tokens, conditions.references.to(tokens)], 1)
        image_ids = torch.cat([image_ids, conditions.reference_ids], 1)
    return inputs | {"img_ids": image_ids, "txt_ids": text_ids.expand(b, -1, -1)}


@torch.no_grad()
def evaluate(
    pipe: Any, family: Family, x: Tensor, t: Tensor, conditions: Conditions,
    guidance: float | None = None,
) -> Any:  # fmt: skip
    """One network evaluation. x: (B, C, H, W), t: (B,) noise level -> what its head returns.

    For a base model that is tokens (B, >= S, 4 C) of the velocity: give them to `unpack`. All three
    networks take t in [0, 1] and scale it themselves. guidance: if the transformer embeds one.
    """
    inputs = network_inputs(family, x, t, conditions, guidance)
    return pipe.transformer(**inputs, return_dict=False)[0]


@torch.no_grad()
def decode(pipe: Any, family: Family, x: Tensor) -> Tensor:
    """Latents (B, C, H, W) -> images (B, 3, 8 H, 8 W) in about [-1, 1], by the pipeline's VAE.

    One at a time: at this size the VAE needs more memory per image than the transformer.
    """
    vae, images = pipe.vae, []
    for latent in x.split(1):
        if family.name == "qwen":
            mean, std = (
                torch.tensor(values, device=x.device, dtype=x.dtype).view(1, -1, 1, 1)
                for values in (vae.config.latents_mean, vae.config.latents_std)
            )
            latent = (latent * std + mean)[:, :, None]  #                 (1, C, 1, H, W)
        elif family.name == "flux":
            latent = latent / vae.config.scaling_factor + vae.config.shift_factor
        else:  # FLUX.2 normalises patches of 4 C channels
            mean, var = (
                value.to(x).view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var)
            )
            patches = F.pixel_unshuffle(latent, PATCH)
            latent = patches * (var + vae.config.batch_norm_eps).sqrt() + mean
            latent = F.pixel_shuffle(latent, PATCH)
        image = vae.decode(latent.to(vae.dtype), return_dict=False)[0]
        images.append((image[:, :, 0] if family.name == "qwen" else image).float())
    return torch.cat(images)


def to_pil(pipe: Any, images: Tensor) -> list[Any]:
    """Images (B, 3, H, W) in [-1, 1] -> PIL images."""
    return pipe.image_processor.postprocess(images, output_type="pil")


# ------------------------------------------------------------------------------------------------
# Loading and memory
# ------------------------------------------------------------------------------------------------

QUANTIZE_HELP = (
    "none: 2 bytes per weight. int8 (torchao): 1 byte, slightly other pictures. nf4 (bitsandbytes, "
    "CUDA only): 0.6 bytes, visibly other details. Both apply to the transformer and the large "
    "text encoder, and cost some time per evaluation"
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


def quantization_config(family: Family, quantize: str, dtype: torch.dtype) -> Any:
    """The diffusers config that quantises transformer and large text encoder while loading.

    The output norm stays as it is, and the output layer where its name is unique.
    Raises: ImportError if the backend is missing; ValueError for nf4 without CUDA.
    """
    if quantize == "none":
        return None
    diffusers = import_diffusers()
    import transformers

    # of FLUX.1 that name would also match the largest layers of its single blocks
    keep = ["norm_out"] if family.name == "flux" else ["norm_out", "proj_out"]
    if quantize == "int8":
        require_package("torchao", "--quantize int8")
        from torchao.quantization import Int8WeightOnlyConfig

        for_network = diffusers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=keep)
        for_text = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        require_package("bitsandbytes", "--quantize nf4")
        if not torch.cuda.is_available():
            raise ValueError("--quantize nf4 needs a CUDA GPU; use int8 or none")
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": dtype,
        }
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

    Weights are read from safetensors files alone: nothing is unpickled.

    Args: base: Hub repository or folder in place of the family's.
    Raises: OSError or ValueError that names the base; ImportError for a missing package.
    """
    pipeline = library_class(import_diffusers(), family.pipeline)
    config, base = quantization_config(family, quantize, dtype), base or family.repo
    options = {} if config is None else {"quantization_config": config}
    with warnings.catch_warnings(), naming(f"base {base}"):
        # the argument's new name, dtype, is unknown to diffusers 0.37
        warnings.filterwarnings("ignore", message=".*torch_dtype.*")
        return pipeline.from_pretrained(
            base, torch_dtype=dtype, use_safetensors=True, **options, **dict.fromkeys(without)
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


def release_memory() -> None:
    """Hands the GPU memory of components that nothing refers to any more back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def empty_components(family: Family, base: str | None = None) -> dict[str, torch.nn.Module]:
    """Transformer, VAE and text encoders on the meta device: shapes without weights.

    Made from the configs alone; nothing large is fetched and no memory is used.
    Raises: OSError or ValueError that names the base; ImportError for an unknown class.
    """
    diffusers = import_diffusers()
    import transformers

    base, modules = base or family.repo, {}
    with naming(f"base {base}"), torch.device("meta"):
        index = library_class(diffusers, family.pipeline).load_config(base)
        for name, part in index.items():
            if not isinstance(part, list | tuple) or part[1] is None:
                continue
            if name in ("transformer", "vae"):
                cls = library_class(diffusers, part[1])
                modules[name] = cls.from_config(cls.load_config(base, subfolder=name))
            elif name.startswith("text_encoder"):
                cls = library_class(transformers, part[1])
                modules[name] = cls(cls.config_class.from_pretrained(base, subfolder=name))
        if missing := {"transformer", "vae"} - modules.keys():
            raise ValueError(f"no {' and '.join(sorted(missing))} in its model_index.json")
        check_channels(modules["transformer"], modules["vae"])
    return modules


def count_parameters(modules: dict[str, torch.nn.Module]) -> dict[str, tuple[int, int]]:
    """Component -> (parameters, those of its largest layer)."""
    sizes = {k: [p.numel() for p in module.parameters()] for k, module in modules.items()}
    return {name: (sum(layers), max(layers)) for name, layers in sizes.items()}


def memory_needed(
    family: Family, counts: dict[str, tuple[int, int]], quantize: str, offload: str, pixels: int,
    batch: int,
) -> float:  # fmt: skip
    """Estimate, in bytes, of the GPU memory for images of `pixels`, `batch` at a time.

    Weights from `count_parameters` at 2 bytes (less if quantised): all components, the largest one
    (offload "model") or a few layers ("group"). Activations as 40 values per token and hidden
    channel. 0.7 GB for CUDA itself.
    """
    width = {"qwen": 3072, "flux": 3072, "flux2": 6144}[family.name]
    tokens = pixels / 256 + 512
    working = batch * tokens * width * 40 * 2 + 0.7 * GB
    small = ("transformer", family.big_text_encoder)
    sizes, layers = {}, {}
    for name, (total, largest) in counts.items():
        per_weight = BYTES_PER_WEIGHT[quantize if name in small else "none"]
        sizes[name], layers[name] = total * per_weight, largest * per_weight
    weights = {"none": sum(sizes.values()), "model": max(sizes.values())}
    weights["group"] = 4 * max(layers.values())
    return weights[offload] + working


def check_memory(
    family: Family, counts: dict[str, tuple[int, int]], quantize: str, offload: str, pixels: int,
    batch: int, device: torch.device, offloads: Sequence[str] = tuple(OFFLOADS), extra: float = 0.0,
) -> str:  # fmt: skip
    """One line about the memory that a run needs, to be printed before anything is loaded.

    Args: offloads: those to suggest; extra: bytes for other things than the networks.
    Raises: ValueError if the GPU has less free memory, with the options that would help.
    """

    def need(quantize: str, offload: str) -> float:
        return (memory_needed(family, counts, quantize, offload, pixels, batch) + extra) / GB

    parts = ", ".join(f"{name} {total / 1e9:.1f}" for name, (total, _) in counts.items())
    line = f"about {need(quantize, offload):.0f} GB for weights (10^9 parameters: {parts}) and work"
    if device.type != "cuda":
        return f"memory: {line}"
    available = torch.cuda.mem_get_info(device)[0] / GB
    if need(quantize, offload) <= available:
        return f"GPU memory: {line}; {available:.0f} GB are free"
    options = sorted(
        (need(q, o), f"--quantize {q} --offload {o} {need(q, o):.0f} GB")
        for q in BYTES_PER_WEIGHT
        for o in offloads
    )
    helps = [text for size, text in reversed(options) if size <= available]
    raise ValueError(
        f"not enough GPU memory: {line} are needed, {available:.0f} GB are free; "
        + (f"these would fit: {'; '.join(helps)}" if helps else "no option makes it fit")
    )
