"""What is estimated before a distillation, and measured during it."""

import json
import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import imagenet.distributed as runs
import text_to_image.families as dm
from common.plots import image_rows
from common.teachers import endpoint_rmse, integrate_teacher
from imagenet.monitor import due
from piflow_minimal import sample
from text_to_image.generate import FINAL_STEP_SIZE_SCALE, SHIFT
from text_to_image.student import TwoRoles, make_student, make_teacher

if TYPE_CHECKING:
    from text_to_image.cache_prompts import PromptCache
    from text_to_image.distill import Run, Settings


PIXELS = 1024 * 1024  # of a training sample


class Monitor:
    """Writes stats.jsonl and pictures. Every process calls every method."""

    def __init__(self, run: "Run", prompts: "PromptCache", pipe: Any):
        s, self.run, self.losses, self.pairs = run.settings, run, [], None
        self.log = runs.Log(s.out, run.iteration, s.logger, asdict(s))
        if s.picture_every:
            self.pairs = PairedEval(run, prompts, pipe)
        if run.place.rank == 0:  # all that may be wrong with the settings has shown by now
            text = json.dumps(asdict(s), indent=2) + "\n"
            runs.write_text(runs.join(s.out, "config.json"), text)
        if self.pairs and run.iteration == 0:
            euler = endpoint_rmse(self.pairs.few_steps, self.pairs.target)
            self.log({"iteration": 0, "endpoint_rmse": self.pairs.compare(), "euler_rmse": euler})
        hidden = run.place.rank > 0 or None
        self.bar = tqdm(total=s.iterations, initial=run.iteration, disable=hidden)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def report(self, last: bool, losses: list[float], norm: float) -> None:
        """After an iteration: what is due at this one, and all of it at the last.

        losses: by segment, each weighted by its size; they add up to the loss.
        """
        run, s = self.run, self.run.settings
        self.bar.update()
        if math.isfinite(norm):
            self.losses.append(losses)
        pictures = self.pairs and due(run.iteration, s.picture_every, last)
        if not self.losses or not (pictures or due(run.iteration, s.log_every, last)):
            return
        means = [sum(values) / len(self.losses) for values in zip(*self.losses, strict=True)]
        record = {
            "iteration": run.iteration,
            "loss": sum(means),
            "loss_by_segment": [round(value, 6) for value in means],
            "grad_norm": norm,
            "lr": run.optimizer.param_groups[0]["lr"],
            "teacher_ratio": s.teacher_ratio(run.iteration - 1),
            "memory_gib": runs.memory_gib(run.place.device),
            "seconds": run.seconds,
            "skipped": run.skipped,
        }
        if pictures:
            record["endpoint_rmse"] = self.pairs.compare()
        self.log(record)
        self.bar.set_postfix(loss=f"{record['loss']:.4f}")
        self.losses = []


class PairedEval:
    """Fixed prompts and noises, and where the teacher takes them in many steps."""

    def __init__(self, run: "Run", prompts: "PromptCache", pipe: Any):
        s, device, dtype = run.settings, run.place.device, run.roles.dtype
        self.run, self.pipe, rows = run, pipe, [i % len(prompts) for i in range(s.pictures)]
        shape = dm.latent_shape(pipe, *s.sizes[0])
        generator = torch.Generator().manual_seed(s.seed)
        self.noise = torch.randn(len(rows), *shape, generator=generator).to(device)
        self.conditions = prompts.conditions(rows).to(device, dtype)
        negative = prompts.negative and prompts.negative.to(device, dtype)
        teacher = make_teacher(run.roles, self.conditions, negative)
        self.target = integrate_teacher(teacher, self.noise, s.teacher_steps, SHIFT)
        self.few_steps = integrate_teacher(teacher, self.noise, s.nfe, SHIFT)

    @torch.no_grad()
    def compare(self) -> float:
        """Draws the pairs. -> endpoint RMSE in latents. Every process calls this."""
        s, run = self.run.settings, self.run
        with run.averaged():
            student = make_student(run.roles, self.conditions)
            x_0 = sample(student, self.noise, s.nfe, SHIFT, FINAL_STEP_SIZE_SCALE,
                         total_substeps=s.total_substeps)  # fmt: skip
        if run.place.rank == 0:
            rows = {f"student, {s.nfe} evaluations": self.decode(x_0)}
            rows[f"teacher, {s.teacher_steps} steps"] = self.decode(self.target)
            path = runs.join(s.out, "pictures", f"step_{run.iteration:08d}.png")
            figure = image_rows(rows, f"the same prompts and noise, iteration {run.iteration}")
            with runs.writing(path) as temporary:
                figure.savefig(temporary, format="png")
        return endpoint_rmse(x_0, self.target)

    def decode(self, x: Tensor) -> Tensor:
        """Latents -> uint8 (B, H, W, 3); the VAE is on the device for this moment alone."""
        self.pipe.vae.to(x.device)
        images = dm.decode(self.pipe, dm.FAMILIES[self.run.settings.family], x)
        self.pipe.vae.to("cpu")
        return images.clamp(-1, 1).mul(127.5).add(127.5).byte().permute(0, 2, 3, 1).cpu()


# ---- Memory --------------------------------------------------------------------------------------


def memory_needed(
    settings: "Settings", base: int, trained: int, width: int, layers: int, world: int
) -> float:
    """Estimate of the bytes per GPU, from counts of parameters and the size of the network.

    Base at 2 bytes; trained parameters at 4 each for weight, gradient and average, and 8 (2 with
    8-bit AdamW) for the moments; sharded parts divided by the processes. Activations: with
    checkpointing the input of each block, and 40 values per token and channel inside one.
    """
    per_trained = 12 + (8 if settings.optimizer == "adamw" else 2)
    split = world if settings.shard else 1
    tokens = settings.micro_batch * (PIXELS / 256 + 512)
    kept = 1 if settings.checkpointing else 40
    work = tokens * width * 2 * (kept * layers + 40)
    if settings.shard:  # two gathered blocks
        work += 2 * 2 * base / layers
    return (2 * base + per_trained * trained) / split + work + 1.5 * dm.GB


def check_memory(settings: "Settings", place: runs.Place, net: nn.Module) -> str:
    """One line, printed before anything is loaded. net: on the meta device; gets a student's parts.

    Raises: ValueError if the GPU has less.
    """
    base = sum(p.numel() for p in net.parameters())
    with torch.device("meta"):
        trained = sum(p.numel() for p in TwoRoles(net, settings).trained().values())
    layers = net.config.num_layers + net.config.get("num_single_layers", 0)
    width = net.config.num_attention_heads * net.config.attention_head_dim
    sizes = (base, trained, width, layers)
    need = memory_needed(settings, *sizes, place.world) / dm.GB
    line = f"about {need:.0f} GB per GPU ({base / 1e9:.1f}e9 frozen, {trained / 1e9:.2f}e9 trained)"
    if place.device.type != "cuda":
        return f"memory: {line}"
    free = torch.cuda.mem_get_info(place.device)[0] / dm.GB
    if need > free:
        less = replace(settings, shard=True, micro_batch=1, checkpointing=True)
        counts = {n: memory_needed(less, *sizes, n) / dm.GB for n in (2, 4, 8, 16)}
        fits = [f"{n} GPUs {size:.0f} GB" for n, size in counts.items() if size <= free]
        raise ValueError(
            f"not enough GPU memory: {line} are needed, {free:.0f} GB are free; with --shard "
            f"--micro-batch 1: {', '.join(fits) or 'more than 16 GPUs'}"
        )
    return f"GPU memory: {line}; {free:.0f} GB are free"
