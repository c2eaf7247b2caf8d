"""A base pipeline with a pi-Flow adapter, as a function of prompts. `generate.load` makes one.

With an adapter, one network evaluation gives a policy; `piflow_minimal.sample` follows four of them
from noise to the picture.
"""

import contextlib
import itertools
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import text_to_image.families as dm
from common.images import read_image
from piflow_minimal import Policy, flow_map_schedule, sample
from text_to_image.adapters import PolicySpec, Sampling
from text_to_image.prompts import MAX_TOKENS, cut_off

TOTAL_SUBSTEPS = 128  # of the published adapters


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
        states of the training; h, shift: of the sampler, where a call does not give them.
    """

    def __init__(
        self, pipe: Any, family: dm.Family, policy: PolicySpec, nfe: int = 4, elastic: bool = False,
        trained: Sampling | None = None, h: float = 0.0, shift: float | None = None,
    ):  # fmt: skip
        self.pipe = pipe
        self.family = family
        self.policy = policy
        self.elastic = elastic
        self.h = h
        embedded = family.embedded_guidance(pipe.transformer)
        published = (dm.SHIFT, dm.FINAL_STEP_SIZE_SCALE, TOTAL_SUBSTEPS, "euler")
        self.trained = trained or Sampling(family.name, nfe, embedded, *published)
        self.nfe = self.trained.nfe
        self.guidance = None if embedded is None else self.trained.guidance
        self.shift = shift or self.trained.shift

    @property
    def device(self) -> torch.device:
        """Where the network runs (with offloading, not where its weights are)."""
        return torch.device(self.pipe._execution_device)

    def student(self, conditions: dm.Conditions, guidance: float | None = None) -> Callable:
        """The callable (x (B, C, H, W), t (B,)) -> policy that `piflow_minimal.sample` takes."""
        if guidance is None or self.guidance is None:
            guidance = self.guidance

        def evaluate(x: Tensor, t: Tensor) -> Policy:
            output = self.family.evaluate(self.pipe.transformer, x, t, conditions, guidance)
            return self.policy.build(output, x, t)

        return evaluate

    @torch.no_grad()
    def sample(
        self, noise: Tensor, conditions: dm.Conditions, nfe: int | None = None,
        guidance: float | None = None, temperature: float | None = None,
        total_substeps: int | None = None, solver: str | None = None, h: float | None = None,
        shift: float | None = None, generator: Any = None, callback: Callable | None = None,
        watch: Callable | None = None,
    ) -> Tensor:  # fmt: skip
        """Latents x_0 from noise (B, C, H, W).

        Args:
            nfe, guidance, total_substeps, solver, shift: as in the training if not given.
            temperature: of a GMFlow policy on every step but the last, > 0; min(0.1 (nfe - 1), 1)
                if not given. Above 1 it has no effect, as in the published sampler.
            h: stochasticity of the sampler, 0 (deterministic) to infinity. generator: its noise.
            callback: callback(step, t, latents) after each step; t is the noise level reached.
            watch: watch(x_0) with what each evaluation expects, (B, C, H, W).
        """
        nfe = nfe or self.nfe
        shift = shift or self.shift
        h = self.h if h is None else h
        if temperature is None:
            temperature = 0.1 * max(nfe - 1, 1)  # the last step has none anyhow
        if self.policy.kind == "DX":
            temperature = 1.0
        student = self.student(conditions, guidance)
        final_step = self.trained.final_step_size_scale
        levels = []
        if callback is not None:
            levels = flow_map_schedule(nfe, shift, final_step, h).t_to.tolist()
        steps = itertools.count()

        def watched(x: Tensor, t: Tensor) -> Policy:
            step = next(steps)
            if callback is not None and step > 0:
                callback(step - 1, levels[step - 1], x)
            policy = student(x, t)
            if watch is not None:
                watch(x - t.view(-1, 1, 1, 1) * policy.velocity(x, t))
            return policy

        x = sample(
            watched, noise, nfe, shift, final_step, h, min(temperature, 1.0),
            total_substeps or self.trained.total_substeps, generator,
            solver or self.trained.solver,
        )  # fmt: skip
        if callback is not None:
            callback(nfe - 1, 0.0, x)
        return x

    @torch.no_grad()
    def __call__(
        self, prompts: str | Sequence[str] | None = None, images_per_prompt: int = 1,
        height: int | None = None, width: int | None = None, seed: int = 0, batch: int = 1,
        references: Sequence[Any] = (), output: str = "pil", latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None, prompt_embeds_mask: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None, nfe: int | None = None,
        guidance: float | None = None, temperature: float | None = None, **options: Any,
    ) -> Result:  # fmt: skip
        """Draws len(prompts) * images_per_prompt pictures.

        Args:
            height, width: multiples of 16, else the next smaller ones are used; by default those of
                the latents, of the first reference image, or the model's (1024; --tiny less).
            seed: picture i starts from noise that depends on seed + i alone, so it is the same in
                every batch, and on every device up to rounding.
            batch: pictures per network evaluation.
            references: PIL images, or paths, to edit (FLUX.2 only).
            output: "pil", or "latent" to leave out the VAE.
            latents: noise of all pictures in place of the seeds': (B, C, H, W), or packed as the
                pipelines of diffusers take it: (B, S, 4 C), FLUX.2 (B, 4 C, H/2, W/2).
            prompt_embeds, prompt_embeds_mask (Qwen-Image), pooled_prompt_embeds (FLUX.1): what the
                pipeline's `encode_prompt` gives, in place of prompts.
            nfe, guidance, temperature, total_substeps, solver, h, shift, callback: see `sample`.
        Raises: ValueError, one line: a prompt is empty, references or a temperature that the model
            has no use for, or a part of it gives values that are not finite.
        Warns: if the size is changed, a prompt is cut, or settings are not those of the training.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if prompt_embeds is None and not (prompts and all(text.strip() for text in prompts)):
            raise ValueError("prompt: at least one is needed, and none may be empty")
        if temperature is not None and self.policy.kind == "DX":
            raise ValueError("temperature: a DX policy has none; leave it out")
        if references and not self.family.edits:
            raise ValueError(f"references: only FLUX.2 edits images, not {self.family.name}")
        references = [read_reference(image) for image in references]
        height, width = self._size(height, width, references, latents)
        shape = 1, *dm.latent_shape(self.pipe, height, width)
        nfe = nfe or self.nfe
        self._warn_if_unusual(nfe, guidance)

        if prompt_embeds is None:
            conditions = self._encode(prompts)
        else:
            conditions = dm.Conditions(prompt_embeds, prompt_embeds_mask, pooled_prompt_embeds)
            conditions = conditions.to(self.device, self.pipe.transformer.dtype)
        rows = len(conditions.embeds)
        count = rows * images_per_prompt
        if latents is not None:
            latents = self._unpack(latents, shape)
            if len(latents) != count:
                raise ValueError(f"latents: {len(latents)} of them for {count} pictures")
        if references:
            tokens, ids = self.family.encode_references(self.pipe, references, rows)
            check_finite("VAE, of the reference images,", tokens)
            conditions = conditions._replace(references=tokens, reference_ids=ids)
        starts = range(0, count, batch)
        finals, estimates = [], []
        with tqdm(total=nfe * len(starts), desc="network evaluations") as progress:

            def watch(x_0: Tensor) -> None:
                estimates.append(x_0.cpu())
                progress.update()

            for start in starts:
                places = range(start, min(start + batch, count))
                generators = [torch.Generator().manual_seed(seed + i) for i in places]
                noise = torch.cat([self.family.draw_noise(shape, g) for g in generators])
                if latents is not None:
                    noise = latents[places.start : places.stop].float()
                condition = conditions.rows([i // images_per_prompt for i in places])
                finals.append(self.sample(
                    noise.to(self.device), condition,
                    nfe, guidance, temperature, generator=generators, watch=watch, **options,
                ))  # fmt: skip
        x = torch.cat(finals)
        check_finite("transformer", x)
        # after all samples: with offloading, VAE and transformer change places only once
        images = self.decode(x) if output == "pil" else []
        self.pipe.maybe_free_model_hooks()
        seeds = [seed + i for i in range(count)]
        estimates = [torch.cat(estimates[i::nfe]) for i in range(nfe)]
        shift = options.get("shift") or self.shift
        times = flow_map_schedule(nfe, shift, self.trained.final_step_size_scale).t_src.tolist()
        return Result(images, x.cpu(), seeds, times, estimates)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Any]:
        """Latents (B, C, H, W) -> PIL images. Raises: ValueError if they are not finite."""
        pixels = self.family.decode(self.pipe, latents.to(self.device))
        check_finite("VAE", pixels)
        return dm.to_pil(self.pipe, pixels)

    def _encode(self, prompts: Sequence[str]) -> dm.Conditions:
        for number, end in enumerate(cut_off(self.pipe, self.family, prompts), 1):
            if end:
                end = textwrap.shorten(end, 80, placeholder=" ...")
                read = f"the text encoder reads {MAX_TOKENS} tokens"
                warnings.warn(f"prompt {number}: {read}; cut off is {end!r}", stacklevel=3)
        conditions = self.family.encode_prompts(self.pipe, prompts)
        check_finite("text encoder", conditions.embeds)
        return conditions

    def _unpack(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Latents as they are, or packed as in diffusers, -> (B, C, H, W) of shape (1, C, H, W)."""
        if latents.ndim == 3:
            return dm.unpack(latents, torch.empty(shape))
        if latents.shape[1] == shape[1] * dm.PATCH**2:
            return F.pixel_shuffle(latents, dm.PATCH)
        return latents

    def _size(
        self, height: int | None, width: int | None, references: list, latents: Tensor | None
    ) -> tuple[int, int]:
        """(height, width) of the pictures in pixels."""
        scale, step = self.pipe.vae_scale_factor, dm.size_step(self.pipe)
        own = (self.pipe.default_sample_size * scale,) * 2
        if references:
            own = dm.reference_size(self.pipe, references[0])
        if latents is not None and latents.ndim == 4:
            scale *= dm.PATCH if latents.shape[1] == self.pipe.transformer.config.in_channels else 1
            own = latents.shape[2] * scale, latents.shape[3] * scale
        sides = height or own[0], width or own[1]
        used = sides[0] // step * step, sides[1] // step * step
        if min(used) < step:
            raise ValueError(f"height {sides[0]}, width {sides[1]}: must be at least {step}")
        if used != sides:
            given = f"height {sides[0]}, width {sides[1]}: must be multiples of {step}"
            warnings.warn(f"{given}; {used[0]} x {used[1]} is used", stacklevel=4)
        return used

    def _warn_if_unusual(self, nfe: int, guidance: float | None) -> None:
        notes = []
        if guidance is not None and self.guidance is None:
            notes.append(f"guidance {guidance} is not used: this base has no guidance embedding")
        elif guidance not in (None, self.guidance):
            trained = f"the adapter was distilled at {self.guidance}"
            notes.append(f"guidance {guidance}: {trained}; other values can give noise")
        if nfe != self.nfe and not (self.elastic and nfe > self.nfe):
            others = "or more" if self.elastic else "and no other number"
            notes.append(f"nfe {nfe}: the adapter was trained for {self.nfe} {others}")
        for note in notes:
            warnings.warn(note, stacklevel=4)


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


@contextlib.contextmanager
def memory_advice() -> Iterator[None]:
    """A lack of GPU memory in the block becomes a ValueError that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "the GPU ran out of memory: try --batch 1, a smaller --height and --width, --offload "
            "model or group, or --quantize int8 or nf4"
        ) from error
