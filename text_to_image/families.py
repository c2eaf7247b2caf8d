"""Qwen-Image, FLUX.1 and FLUX.2 through diffusers: one class per family.

The base pipeline of diffusers does prompts, reference images, VAE, quantisation and offloading. A
family says how its parts are called. Latents are NCHW in all three, x (B, C, H, W):

    conditions = family.encode_prompts(pipe, prompts)              text encoder
    tokens = family.evaluate(pipe.transformer, x, t, conditions)   one network evaluation
    velocity = unpack(tokens, x)                                   tokens -> NCHW
    images = family.decode(pipe, x)                                VAE

Nothing here knows about policies. Latent tokens are 2 x 2 patches, row by row; the channels of a
token are (channel, row in patch, column in patch), slowest first, in all three families.
"""

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

PATCH = 2  # latent pixels per token and side
STEP = 16  # sides of images are multiples of it: 8 pixels per latent pixel, 2 of these per token
SHIFT = 3.2  # of the sampler's steps, and of the DX grids, in all published adapters
FINAL_STEP_SIZE_SCALE = 0.5  # the last step is half as long


# ---- Packages and errors -------------------------------------------------------------------------


def require_package(name: str, why: str, install: str | None = None) -> None:
    """Raises: ImportError, one line that says what to install, if a package is missing."""
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"{why} needs the package {name!r}: pip install {install or name}")


def import_diffusers() -> Any:
    """The diffusers module. Raises: ImportError that says what to install."""
    for name in ("diffusers", "transformers"):
        require_package(name, "text to image", "-r requirements-extra.txt")
    import diffusers

    return diffusers


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Errors in the block, of whatever type, become one that begins with `what`: the file at fault.

    Raises: OSError for an OSError, else ValueError; ImportError and lack of memory as they are.
    """
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        known = isinstance(error, OSError | ValueError)
        reason = error if known else f"{type(error).__name__} {error}"
        raise kind(f"{what}: {reason}") from error


# ---- Latents as images, and as tokens ------------------------------------------------------------


def pack(x: Tensor) -> Tensor:
    """Latents (B, C, H, W) -> tokens (B, S, 4 C), S = H/2 W/2."""
    return F.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, x: Tensor) -> Tensor:
    """The first H/2 W/2 tokens (B, >= S, 4 M) -> (B, M, H, W), with H, W of x."""
    h = x.shape[-2] // PATCH
    w = x.shape[-1] // PATCH
    grid = tokens[:, : h * w].transpose(1, 2).unflatten(2, (h, w))  #     (B, 4 M, H/2, W/2)
    return F.pixel_shuffle(grid, PATCH)


def latent_shape(pipe: Any, height: int, width: int) -> tuple[int, int, int]:
    """(C, H, W) of the latents of an image whose sides are multiples of STEP."""
    scale = pipe.vae_scale_factor
    return pipe.transformer.config.in_channels // PATCH**2, height // scale, width // scale


def _positions(x: Tensor) -> Tensor:
    """(row, column) of the tokens of x, row by row: (S, 2)."""
    rows = torch.arange(x.shape[-2] // PATCH, device=x.device)
    columns = torch.arange(x.shape[-1] // PATCH, device=x.device)
    return torch.cartesian_prod(rows, columns).view(-1, 2)


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
        """The same there; floating-point parts in `dtype`."""
        moved = {}
        for name, value in self._asdict().items():
            if value is not None:
                moved[name] = value.to(device, dtype if value.is_floating_point() else value.dtype)
        return Conditions(**moved)

    @staticmethod
    def stack(parts: Sequence["Conditions"]) -> "Conditions":
        """Prompts of different lengths as one batch, padded and masked (Qwen)."""
        embeds, masks = [], []
        for part in parts:
            ones = torch.ones_like(part.embeds[..., 0])
            embeds.extend(part.embeds)
            masks.extend((ones if part.mask is None else part.mask).bool())
        mask = pad_sequence(masks, batch_first=True)
        pooled = None if parts[0].pooled is None else torch.cat([part.pooled for part in parts])
        embeds = pad_sequence(embeds, batch_first=True)
        return Conditions(embeds, None if mask.all() else mask, pooled)


# ---- The families --------------------------------------------------------------------------------


class Family:
    """One base model: what its parts are called, and how they are used."""

    name: str
    repo: str  # on the Hub
    pipeline: str  # classes of diffusers
    transformer: str
    text_parts = ("text_encoder", "tokenizer")  # that only encode prompts, the largest one first
    keep = ("norm_out", "proj_out")  # modules that are never quantised
    encodes = ("embeds",)  # what the pipeline's encode_prompt returns first
    width: int  # of the transformer's hidden state
    guidance: float  # the teacher's, at which the published adapters were distilled
    embeds_guidance = True  # else two branches: with the prompt, and with negative_prompt
    negative_prompt: str | None = None
    edits = False  # takes reference images
    vae_of_videos = False  # (B, C, frames, H, W)
    vae_of_patches = False  # latents are scaled as patches of 4 C channels
    lora_targets: str  # of the published adapters; {last}: number of the last block

    @torch.no_grad()
    def encode_prompts(
        self, pipe: Any, prompts: Sequence[str], max_length: int = 512
    ) -> Conditions:
        """By the pipeline's text encoders, on its execution device."""
        encoded = pipe.encode_prompt(
            prompt=list(prompts), device=pipe._execution_device, max_sequence_length=max_length
        )
        return Conditions(**dict(zip(self.encodes, encoded, strict=False)))

    def embedded_guidance(self, transformer: nn.Module) -> float | None:
        """The guidance to embed by default; None if this transformer embeds none."""
        embeds = self.embeds_guidance and transformer.config.get("guidance_embeds", False)
        return self.guidance if embeds else None

    def draw_noise(self, shape: Sequence[int], generator: Any = None) -> Tensor:
        """Standard normal latents (B, C, H, W), drawn on the CPU in the order of the pipeline."""
        return torch.randn(tuple(shape), generator=generator)

    def network_inputs(
        self, x: Tensor, t: Tensor, conditions: Conditions, guidance: float | None = None
    ) -> dict[str, Any]:
        """Keyword arguments of the family's transformer for x (B, C, H, W), t (B,)."""
        embeds = conditions.embeds
        inputs = {"hidden_states": pack(x).to(embeds.dtype), "timestep": t}  #  (B, S, 4 C), (B,)
        inputs["encoder_hidden_states"] = embeds
        if self.embeds_guidance and guidance is not None:
            inputs["guidance"] = t.new_full((len(x),), guidance)
        self._add_inputs(inputs, x, conditions)
        return inputs

    def evaluate(
        self, net: nn.Module, x: Tensor, t: Tensor, conditions: Conditions,
        guidance: float | None = None,
    ) -> Any:  # fmt: skip
        """One network evaluation. x: (B, C, H, W), t: (B,) noise level -> what the head returns.

        For a base model that is tokens (B, >= S, 4 C) of the velocity: give them to `unpack`. All
        three networks take t in [0, 1] and scale it themselves. guidance: if it embeds one.
        """
        return net(**self.network_inputs(x, t, conditions, guidance), return_dict=False)[0]

    def vae_scaling(self, vae: nn.Module) -> tuple[Any, Any]:
        """(mean, std): the VAE takes x * std + mean; numbers, or one for each channel."""
        raise NotImplementedError

    def _scaled(self, vae: nn.Module, x: Tensor, backward: bool = False) -> Tensor:
        mean, std = (torch.as_tensor(v).to(x).view(1, -1, 1, 1) for v in self.vae_scaling(vae))
        x = F.pixel_unshuffle(x, PATCH) if self.vae_of_patches else x
        x = (x - mean) / std if backward else x * std + mean
        return F.pixel_shuffle(x, PATCH) if self.vae_of_patches else x

    @torch.no_grad()
    def decode(self, pipe: Any, x: Tensor) -> Tensor:
        """Latents (B, C, H, W) -> images (B, 3, 8 H, 8 W) in about [-1, 1], by the pipeline's VAE.

        One at a time: at this size the VAE needs more memory per image than the transformer.
        """
        images = []
        for latent in self._scaled(pipe.vae, x).to(pipe.vae.dtype).split(1):
            latent = latent[:, :, None] if self.vae_of_videos else latent
            image = pipe.vae.decode(latent, return_dict=False)[0].float()
            images.append(image[:, :, 0] if self.vae_of_videos else image)
        return torch.cat(images)

    @torch.no_grad()
    def encode(self, pipe: Any, images: Tensor) -> Tensor:
        """The inverse of `decode`: images (B, 3, 8 H, 8 W) in [-1, 1] -> latents (B, C, H, W)."""
        images = images.to(pipe.vae.device, pipe.vae.dtype)
        images = images[:, :, None] if self.vae_of_videos else images
        x = pipe.vae.encode(images).latent_dist.mode().float()
        x = x[:, :, 0] if self.vae_of_videos else x
        return self._scaled(pipe.vae, x, backward=True)


class Qwen(Family):
    """Qwen-Image: guidance by a second, unconditional branch."""

    name = "qwen"
    repo = "Qwen/Qwen-Image"
    pipeline = "QwenImagePipeline"
    transformer = "QwenImageTransformer2DModel"
    encodes = ("embeds", "mask")  # None where no prompt is padded
    width = 3072
    guidance = 4.0
    embeds_guidance = False
    negative_prompt = ""
    vae_of_videos = True
    lora_targets = (
        r"transformer_blocks\.\d+\.img_mlp\.net\.(0\.proj|2)|"
        r"transformer_blocks\.(?!{last}\.)\d+\.txt_mlp\.net\.(0\.proj|2)|"
        r"time_text_embed\.timestep_embedder\.linear_[12]"
    )

    def _add_inputs(self, inputs: dict, x: Tensor, conditions: Conditions) -> None:
        inputs["encoder_hidden_states_mask"] = conditions.mask
        inputs["img_shapes"] = [[(1, x.shape[-2] // PATCH, x.shape[-1] // PATCH)]] * len(x)

    def vae_scaling(self, vae: nn.Module) -> tuple[Any, Any]:
        return vae.config.latents_mean, vae.config.latents_std


class Flux(Family):
    """FLUX.1 [dev]: guidance is embedded."""

    name = "flux"
    repo = "black-forest-labs/FLUX.1-dev"
    pipeline = "FluxPipeline"
    transformer = "FluxTransformer2DModel"
    text_parts = ("text_encoder_2", "text_encoder", "tokenizer", "tokenizer_2")
    encodes = ("embeds", "pooled")
    keep = ("norm_out",)  # proj_out would also match the largest layers of the single blocks
    width = 3072
    guidance = 3.5
    lora_targets = (
        r"single_transformer_blocks\.\d+\.(proj_mlp|proj_out)|"
        r"transformer_blocks\.\d+\.(ff|ff_context)\.net\.(0\.proj|2)|"
        r"time_text_embed\.timestep_embedder\.linear_[12]"
    )

    def _add_inputs(self, inputs: dict, x: Tensor, conditions: Conditions) -> None:
        """Ids (0, row, column), no batch axis; all text tokens are at 0."""
        length = conditions.embeds.shape[1]
        inputs["pooled_projections"] = conditions.pooled
        inputs["img_ids"] = F.pad(_positions(x), (1, 0)).float()
        inputs["txt_ids"] = torch.zeros(length, 3, device=x.device)

    def vae_scaling(self, vae: nn.Module) -> tuple[Any, Any]:
        return vae.config.shift_factor, 1 / vae.config.scaling_factor


class Flux2(Family):
    """FLUX.2 [dev]: guidance is embedded; reference images are tokens beside the noise."""

    name = "flux2"
    repo = "black-forest-labs/FLUX.2-dev"
    pipeline = "Flux2Pipeline"
    transformer = "Flux2Transformer2DModel"
    width = 6144
    guidance = 4.0
    edits = True
    vae_of_patches = True
    lora_targets = (
        r"single_transformer_blocks\.\d+\.attn\.to_out|"
        r"transformer_blocks\.\d+\.(ff|ff_context)\.linear_(in|out)|"
        r"time_guidance_embed\.timestep_embedder\.linear_[12]"
    )

    def draw_noise(self, shape: Sequence[int], generator: Any = None) -> Tensor:
        b, c, h, w = shape
        packed = (b, c * PATCH**2, h // PATCH, w // PATCH)
        return F.pixel_shuffle(torch.randn(packed, generator=generator), PATCH)

    def _add_inputs(self, inputs: dict, x: Tensor, conditions: Conditions) -> None:
        """Ids (image, row, column, position in the text)."""
        length = conditions.embeds.shape[1]
        image_ids = F.pad(_positions(x), (1, 1)).expand(len(x), -1, -1)
        text_ids = F.pad(torch.arange(length, device=x.device)[:, None], (3, 0))
        if conditions.references is not None:
            tokens = inputs["hidden_states"]
            inputs["hidden_states"] = torch.cat([tokens, conditions.references.to(tokens)], 1)
            image_ids = torch.cat([image_ids, conditions.reference_ids], 1)
        inputs["img_ids"] = image_ids
        inputs["txt_ids"] = text_ids.expand(len(x), -1, -1)

    @torch.no_grad()
    def encode_references(
        self, pipe: Any, images: Sequence[Any], samples: int
    ) -> tuple[Tensor, Tensor]:
        """Editing: PIL images -> tokens (B, R, 4 C) and their ids (B, R, 4), B = samples.

        As the base pipeline does it: shrunk to a megapixel if larger, cropped to multiples of STEP.
        Raises: ValueError if an image is too small or too narrow.
        """
        processor, tensors = pipe.image_processor, []
        for i, image in enumerate(images, 1):
            with naming(f"reference image {i}"):
                processor.check_image_input(image)
            size = reference_size(pipe, image)
            image = processor._resize_if_exceeds_area(image)
            tensors.append(processor.preprocess(image, *size, resize_mode="crop"))
        return pipe.prepare_image_latents(
            tensors, samples, None, pipe._execution_device, pipe.vae.dtype
        )

    def vae_scaling(self, vae: nn.Module) -> tuple[Any, Any]:
        var = vae.bn.running_var + vae.config.batch_norm_eps
        return vae.bn.running_mean, var.sqrt()


FAMILIES = {family.name: family for family in (Qwen(), Flux(), Flux2())}


def reference_size(pipe: Any, image: Any) -> tuple[int, int]:
    """(height, width) that a PIL image has as a reference: at most a megapixel, multiples of 16."""
    image = pipe.image_processor._resize_if_exceeds_area(image)
    return image.height // STEP * STEP, image.width // STEP * STEP
