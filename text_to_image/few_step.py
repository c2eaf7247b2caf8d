"""A base pipeline with a pi-Flow adapter, as a function of prompts. `generate.load` makes one.

With an adapter, one network evaluation gives a policy; `piflow_minimal.sample` follows four of them
from noise to the picture.
"""

import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import text_to_image.families as dm
from common.images import read_image
from piflow_minimal import Policy, sample, x0_from_velocity
from text_to_image.adapters import PolicySpec, Sampling
from text_to_image.prompts import MAX_TOKENS, cut_off


class Result(NamedTuple):
    """Images of one call, in the order of the prompts; image i was made with seed + i."""

    images: list[Any]  # PIL; empty for output="latent"
    latents: Tensor  # (B, C, H, W), on the CPU
    seeds: list[int]
    times: list[float]  # noise levels t of the network evaluations
    estimates: list[Tensor]  # (B, C, H, W) for each of them: the x_0 that it expects


class FewStep:
    """A base pipeline with an adapter: call it with prompts.

    Args: nfe: evaluations of its training; elastic: more of them make sense; trained: what its file
        states of the training, in place of what all published adapters have in common.
    Attributes: h, shift: of the sampler, where a call does not give them.
    """

    def __init__(
        self, pipe: Any, family: dm.Family, policy: PolicySpec, nfe: int = 4, elastic: bool = False,
        trained: Sampling | None = None,
    ):  # fmt: skip
        self.pipe = pipe
        self.family = family
        self.policy = policy
        self.elastic = elastic
        embedded = family.embedded_guidance(pipe.transformer)
        published = (dm.SHIFT, dm.FINAL_STEP_SIZE_SCALE, 128, "euler")
        self.trained = trained or Sampling(family.name, nfe, embedded, *published)
        self.nfe = self.trained.nfe
        self.guidance = None if embedded is None else self.trained.guidance
        self.h = 0.0
        self.shift = self.trained.shift

    @property
    def device(self) -> torch.device:
        """Where the network runs (with offloading, not where its weights are)."""
        return torch.device(self.pipe._execution_device)

    def student(self, conditions: dm.Conditions, guidance: float | None = None) -> Callable:
        """The callable (x (B, C, H, W), t (B,)) -> policy that `piflow_minimal.sample` takes."""
        guidance = self.guidance if guidance is None else guidance

        def evaluate(x: Tensor, t: Tensor) -> Policy:
            output = self.family.evaluate(self.pipe.transformer, x, t, conditions, guidance)
            return self.policy.build(output, x, t)

        return evaluate

    @torch.no_grad()
    def sample(
        self, noise: Tensor, conditions: dm.Conditions, nfe: int | None = None,
        guidance: float | None = None, temperature: float | None = None,
        total_substeps: int | None = None, solver: str | None = None, h: float | None = None,
        shift: float | None = None, generator: Any = None, watch: Callable | None = None,
    ) -> Tensor:  # fmt: skip
        """Latents x_0 from noise (B, C, H, W).

        Args:
            nfe, guidance, total_substeps, solver: as in the training if not given.
            temperature: of a GMFlow policy on every step but the last, > 0; min(0.1 (nfe - 1), 1)
                if not given. Above 1 it has no effect, as in the published sampler.
            h: stochasticity of the sampler, 0 (deterministic) to infinity. generator: its noise.
            shift: of the times. watch: called at each evaluation with its state x (B, C, H, W), its
                noise level t (B,), and the x_0 that it expects.
        """
        trained = self.trained
        nfe = nfe or self.nfe
        if temperature is None:
            temperature = 0.1 * max(nfe - 1, 1)  # the last step has none anyhow
        if self.policy.kind == "DX":
            temperature = 1.0
        student = self.student(conditions, guidance)

        def watched(x: Tensor, t: Tensor) -> Policy:
            policy = student(x, t)
            if watch is not None:
                watch(x, t, x0_from_velocity(x, t, policy.velocity(x, t)))
            return policy

        return sample(
            watched, noise, nfe, shift or self.shift, trained.final_step_size_scale,
            self.h if h is None else h, min(temperature, 1.0),
            total_substeps or trained.total_substeps, generator, solver or trained.solver,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(
        self, prompts: str | Sequence[str] | None = None, images_per_prompt: int = 1,
        height: int | None = None, width: int | None = None, seed: int = 0, batch: int = 1,
        references: Sequence[Any] = (), output: str = "pil", latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None, prompt_embeds_mask: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None, callback: Callable | None = None,
        nfe: int | None = None, guidance: float | None = None, temperature: float | None = None,
        **options: Any,
    ) -> Result:  # fmt: skip
        """Draws len(prompts) * images_per_prompt pictures.

        Args:
            height, width: multiples of 16; by default those of the first reference image, or the
                model's (1024; --tiny less).
            seed: picture i starts from noise that depends on seed + i alone, so it is the same in
                every batch, and on every device up to rounding.
            batch: prompts per call of the text encoder, pictures per network evaluation.
            references: PIL images, or paths, to edit (FLUX.2 only).
            output: "pil", or "latent" to leave out the VAE.
            latents: noise of all pictures in place of the seeds': (B, C, H, W), or packed as the
                pipelines of diffusers take it: (B, S, 4 C), FLUX.2 (B, 4 C, H/2, W/2).
            prompt_embeds, prompt_embeds_mask (Qwen-Image), pooled_prompt_embeds (FLUX.1): what the
                pipeline's `encode_prompt` gives, in place of prompts.
            callback: called after each step with (step, noise level reached, latents).
            nfe, guidance, temperature, total_substeps, solver, h, shift: see `sample`.
        Raises: ValueError, one line: an option that the model has no use for, a size that it does
            not have, or a part of it that gives values that are not finite.
        Warns: if a prompt is cut, or guidance or nfe are not those of the training.
        """
        self._check_options(nfe, guidance, temperature, references)
        references = [read_reference(image) for image in references]
        shape = self._latent_shape(height, width, references)
        if latents is not None:
            latents = self._unpack(latents, shape)
            shape = latents.shape[1:]
        if prompt_embeds is None:
            texts = [prompts] if isinstance(prompts, str) else prompts or []
            conditions = self._encode(texts, batch)
        else:
            conditions = dm.Conditions(prompt_embeds, prompt_embeds_mask, pooled_prompt_embeds)
            conditions = conditions.to(self.device, self.pipe.transformer.dtype)
        rows = len(conditions.embeds)
        if references:
            tokens, ids = self.family.encode_references(self.pipe, references, rows)
            conditions = conditions._replace(references=tokens, reference_ids=ids)

        count = rows * images_per_prompt
        if latents is not None and len(latents) != count:
            raise ValueError(f"{len(latents)} latents for {count} pictures")
        starts = range(0, count, batch)
        finals, times, estimates = [], [], []
        nfe = nfe or self.nfe
        with tqdm(total=nfe * len(starts), desc="network evaluations") as progress:

            def watch(x: Tensor, t: Tensor, x_0: Tensor) -> None:
                step = len(times) % nfe
                times.append(t[0].item())
                estimates.append(x_0.cpu())
                progress.update()
                if callback is not None and step > 0:
                    callback(step - 1, times[-1], x)

            for start in starts:
                places = range(start, min(start + batch, count))
                generators = [torch.Generator().manual_seed(seed + i) for i in places]
                noise = torch.cat([self.family.draw_noise((1, *shape), g) for g in generators])
                if latents is not None:
                    noise = latents[places.start : places.stop].float()
                condition = conditions.rows([i // images_per_prompt for i in places])
                finals.append(self.sample(
                    noise.to(self.device), condition, nfe, guidance, temperature,
                    generator=generators, watch=watch, **options,
                ))  # fmt: skip
                if callback is not None:
                    callback(nfe - 1, 0.0, finals[-1])
        x = torch.cat(finals)
        check_finite("transformer", x)
        # after all samples: with offloading, VAE and transformer change places only once
        images = self.decode(x) if output == "pil" else []
        self.pipe.maybe_free_model_hooks()
        estimates = [torch.cat(estimates[i::nfe]) for i in range(nfe)]
        return Result(images, x.cpu(), [seed + i for i in range(count)], times[:nfe], estimates)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Any]:
        """Latents (B, C, H, W) -> PIL images. Raises: ValueError if they are not finite."""
        images = []
        for latent in latents.to(self.device).split(1):
            pixels = self.family.decode(self.pipe, latent)
            check_finite("VAE", pixels)
            images += self.pipe.image_processor.postprocess(pixels, output_type="pil")
        return images

    def _encode(self, prompts: Sequence[str], batch: int) -> dm.Conditions:
        if not prompts or not all(prompt.strip() for prompt in prompts):
            raise ValueError("prompts: at least one is needed, and none may be empty")
        for number, end in enumerate(cut_off(self.pipe, self.family, prompts), 1):
            if end:
                end = textwrap.shorten(end, 80, placeholder=" ...")
                read = f"the text encoder reads {MAX_TOKENS} tokens"
                warnings.warn(f"prompt {number}: {read}; cut off is {end!r}", stacklevel=4)
        batches = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
        parts = [self.family.encode_prompts(self.pipe, part) for part in batches]
        conditions = dm.Conditions.stack(parts)
        check_finite("text encoder", conditions.embeds)
        return conditions

    def _unpack(self, latents: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Latents as they are, or packed as in diffusers, -> (B, C, H, W)."""
        if latents.ndim == 3:
            return dm.unpack(latents, torch.empty(shape))
        if latents.shape[1] == shape[0] * dm.PATCH**2:
            return F.pixel_shuffle(latents, dm.PATCH)
        return latents

    def _latent_shape(
        self, height: int | None, width: int | None, references: Sequence[Any]
    ) -> tuple[int, int, int]:
        """(C, H, W) of the latents of pictures of this size."""
        own = [self.pipe.default_sample_size * self.pipe.vae_scale_factor] * 2
        if references:
            own = dm.reference_size(self.pipe, references[0])
        sides = height or own[0], width or own[1]
        if any(side % dm.STEP for side in sides):
            raise ValueError(f"height {sides[0]}, width {sides[1]}: must be multiples of {dm.STEP}")
        return dm.latent_shape(self.pipe, *sides)

    def _check_options(
        self, nfe: int | None, guidance: float | None, temperature: float | None, references: Any
    ) -> None:
        """Refuses what the model has no use for, and warns of what it was not trained for."""
        useless = {
            "temperature": temperature is not None and self.policy.kind == "DX",
            "guidance": guidance is not None and self.guidance is None,
            "references": references and not self.family.edits,
        }
        if any(useless.values()):
            names = ", ".join(name for name, is_given in useless.items() if is_given)
            raise ValueError(f"{names}: has no meaning for this model; leave it out")
        if guidance not in (None, self.guidance):
            trained = f"the adapter was distilled at {self.guidance}"
            warnings.warn(f"guidance {guidance}: {trained}; others can give noise", stacklevel=4)
        if nfe not in (None, self.nfe) and not (self.elastic and nfe > self.nfe):
            warnings.warn(f"nfe {nfe}: the adapter was trained for {self.nfe}", stacklevel=4)


def read_reference(image: Any) -> Any:
    """A path, or a PIL image -> PIL image. Raises: OSError or ValueError that names the file."""
    if not isinstance(image, str | Path):
        return image.convert("RGB")
    from PIL import Image

    return Image.fromarray(read_image(image).numpy())


def check_finite(part: str, values: Tensor) -> None:
    """Raises: ValueError that names the part of the model whose output is not finite."""
    if not values.isfinite().all():
        raise ValueError(f"the {part} gives values that are not finite (weights? dtype?)")
