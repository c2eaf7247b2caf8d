"""Trains the text-conditioned teacher that `python -m text_to_image.generate --tiny` draws with.

    python -m assets.train_tiny_text_teacher                                  # 54 core-minutes
    python -m assets.train_tiny_text_teacher --iterations 200 --work outputs/try \\
        --out outputs/try/teacher.safetensors                                 # a look

A small transformer of Qwen-Image's class learns flow matching on Fashion-MNIST. A prompt is a class
name or a synonym, words for shade and pattern that the pixels justify, and up to three random words
that teach the network to skip what it does not know. One prompt in ten is empty, for guidance. Run
the same command again to continue.
"""

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assets.train_tiny_teacher import load_data, save_grid
from common import fashion
from common.cli import parse, run_cli, setting
from common.fashion import frechet_distance, recognition_rate
from common.files import writing
from common.teachers import guided_velocity, integrate_teacher
from text_to_image.families import FAMILIES, SHIFT, Conditions, unpack
from text_to_image.tiny import CONFIG, GUIDANCE, TEACHER, encode_words, word_vectors

NAMES = (
    ("t-shirt", "t-shirt top", "tee"),
    ("trousers", "trouser", "pants", "jeans"),
    ("pullover", "sweater", "jumper"),
    ("dress", "gown"),
    ("coat", "jacket"),
    ("sandal", "sandals"),
    ("shirt", "blouse"),
    ("sneaker", "sneakers", "trainer"),
    ("bag", "handbag", "purse"),
    ("boot", "ankle boot", "boots", "ankle boots"),
)  # fmt: skip  in the order of fashion.CLASSES
LOOKS = (  # words, and between which quantiles of its class an image has to be
    ("dark", "shade", 0, 0.3), ("black", "shade", 0, 0.3), ("white", "shade", 0.7, 1),
    ("light", "shade", 0.7, 1), ("plain", "pattern", 0, 0.3), ("patterned", "pattern", 0.8, 1),
    ("printed", "pattern", 0.8, 1),
)  # fmt: skip
OTHER_WORDS = 3  # at most, in a prompt
EMA_GAMMA = 15  # the average looks back over about 1/16 of the run so far


@dataclass(frozen=True)
class Settings:
    """Flags of the script."""

    iterations: int = setting(13_000, "optimizer steps", low=1)
    batch: int = setting(32, "images per optimizer step", low=1)
    lr: float = setting(
        2e-3, "peak of the AdamW learning rate: linear warm-up, then a cosine", above=0
    )
    every: int = setting(500, "iterations between checkpoints and pictures", low=1)
    guidance: float = setting(GUIDANCE, "guidance scale of the pictures", low=0)
    judged: int = setting(1000, "samples that are judged at the end", low=10)
    seed: int = setting(0, "seed of weights, batches and samples", low=0)
    data: Path | None = setting(None, "folder with the four Fashion-MNIST .gz files")
    work: Path = setting(Path("outputs/tiny_text_teacher"), "folder for checkpoints and pictures")
    out: Path = setting(TEACHER, "file for the averaged weights (fp16)")


class Data(NamedTuple):
    """The training set."""

    latents: Tensor  # (N, 4, 14, 14)
    labels: Tensor  # (N,)
    looks: dict[str, Tensor]  # (N,) each, see `describe`


def describe(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Images (N, 1, 28, 28) -> for shade and pattern, the quantile (N,) of each among its class.

    Shade is the mean brightness of the object, pattern the mean step between neighbouring pixels.
    """
    grey = images / 2 + 0.5
    inside = (grey > 0.1).float()
    inner = inside * inside.roll(1, 2) * inside.roll(1, 3)
    steps = (grey - grey.roll(1, 2)).abs() + (grey - grey.roll(1, 3)).abs()
    total = inside.sum(dim=(1, 2, 3)), inner.sum(dim=(1, 2, 3)).clamp(1)
    looks = {
        "shade": (grey * inside).sum(dim=(1, 2, 3)) / total[0],
        "pattern": (steps * inner).sum(dim=(1, 2, 3)) / total[1],
    }
    for value in looks.values():
        for label in labels.unique():
            index = torch.nonzero(labels == label)[:, 0]
            value[index] = value[index].argsort().argsort() / len(index)
    return looks


def draw_prompts(
    labels: Tensor, looks: dict[str, Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Labels (B,), looks (B,) each -> embeddings (B, L, 64) and mask (B, L) of prompts that fit."""
    vectors = {name: word_vectors(name) for names in NAMES for name in names}
    vectors |= {word: word_vectors(word) for word, *_ in LOOKS}
    parts = []
    for place, label in enumerate(labels.tolist()):
        pick, count, empty, *use = torch.rand(3 + len(LOOKS), generator=generator).tolist()
        name = vectors[NAMES[label][int(pick * len(NAMES[label]))]]  # its last vector marks the end
        words = [
            vectors[word][:1]
            for (word, look, low, high), chance in zip(LOOKS, use, strict=True)
            if chance < 0.35 and low <= looks[look][place] < high
        ]
        others = torch.randn(int(count * (OTHER_WORDS + 1)), name.shape[1], generator=generator)
        pieces = [*words, name[:-1], *others.split(1)]
        order = torch.randperm(len(pieces), generator=generator).tolist()
        prompt = torch.cat([*(pieces[i] for i in order), name[-1:]])
        parts.append(name[-1:] if empty < 0.1 else prompt)
    lengths = torch.tensor([len(part) for part in parts])
    embeds = nn.utils.rnn.pad_sequence(parts, batch_first=True)
    return embeds, (torch.arange(embeds.shape[1]) < lengths[:, None]).long()


def draw_batch(data: Data, batch: int, seed: int, step: int):
    """One batch (x_t, t, Conditions, target). t is logit-normal, every fifth one uniform."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    index = torch.randint(len(data.latents), (batch,), generator=generator)
    x_0 = data.latents[index]
    eps = torch.randn(x_0.shape, generator=generator)
    t = torch.sigmoid(torch.randn(batch, generator=generator))
    uniform = torch.rand(batch, generator=generator)
    t = torch.where(torch.arange(batch) % 5 == 0, uniform, t)
    looks = {name: value[index] for name, value in data.looks.items()}
    conditions = Conditions(*draw_prompts(data.labels[index], looks, generator))
    return torch.lerp(x_0, eps, t[:, None, None, None]), t, conditions, eps - x_0


def velocity(net: nn.Module, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
    """u at x (B, 4, 14, 14), t (B,)."""
    return unpack(FAMILIES["qwen"].evaluate(net, x, t, conditions), x)


@torch.no_grad()
def draw_samples(net: nn.Module, prompts: list[str], guidance: float, seed: int) -> Tensor:
    """Prompts -> images (B, 1, 28, 28), by 50 guided Euler steps with shift 3.2."""
    generator, images = torch.Generator().manual_seed(seed), []
    for start in range(0, len(prompts), 250):
        part = prompts[start : start + 250]
        noise = torch.randn(len(part), 4, 14, 14, generator=generator)
        both = Conditions(*encode_words(part + [""] * len(part)))

        def teacher(x: Tensor, t: Tensor) -> Tensor:
            u = velocity(net, torch.cat([x, x]), torch.cat([t, t]), both)  # noqa: B023
            return guided_velocity(*u.chunk(2), guidance, t)

        images.append(fashion.to_images(integrate_teacher(teacher, noise, 50, SHIFT)))
    return torch.cat(images).clamp(-1, 1)


def train(settings: Settings, data: Data) -> nn.Module:
    """Flow matching; returns the averaged network."""
    import diffusers

    torch.manual_seed(settings.seed)
    net = diffusers.QwenImageTransformer2DModel(**CONFIG)
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        net.parameters(), settings.lr, (0.9, 0.99), weight_decay=0.0, fused=True
    )
    resume, first, losses = settings.work / "resume.pt", 0, []
    if resume.is_file():
        state = torch.load(resume, weights_only=True)
        for part, name in ((net, "net"), (ema, "ema"), (optimizer, "optimizer")):
            part.load_state_dict(state[name])
        first = state["step"]
    began = time.monotonic()

    for step in range(first, settings.iterations):
        rate = min(1, (step + 1) / 300) * 0.5 * (1 + math.cos(math.pi * step / settings.iterations))
        optimizer.param_groups[0]["lr"] = settings.lr * rate
        x, t, conditions, target = draw_batch(data, settings.batch, settings.seed, step)
        loss = F.mse_loss(velocity(net, x, t, conditions), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        beta = (1 - 1 / (step + 1)) ** (1 + EMA_GAMMA)
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - beta)
        losses.append(loss.item())

        if (step + 1) % settings.every == 0 or step + 1 == settings.iterations:
            mean, losses = sum(losses) / len(losses), []
            seconds = time.monotonic() - began
            print(f"{step + 1}/{settings.iterations}  loss {mean:.4f}  {seconds:.0f} s", flush=True)
            state = {name: part.state_dict() for name, part in
                     (("net", net), ("ema", ema), ("optimizer", optimizer))}  # fmt: skip
            with writing(resume) as temporary:
                torch.save(state | {"step": step + 1}, temporary)
            prompts = [names[0] for names in NAMES for _ in range(4)]
            images = draw_samples(ema, prompts, settings.guidance, settings.seed)
            save_grid(images.unflatten(0, (10, 4)).transpose(0, 1).flatten(0, 1),
                      settings.work / "samples.png")  # fmt: skip
    return ema


def main(argv: list[str] | None = None) -> None:
    """Trains and judges; see the top of the file."""
    from safetensors.torch import save_file

    settings = parse(Settings, __doc__, argv)
    images, labels = load_data(settings.data, train=True)
    data = Data(fashion.to_latents(images), labels, describe(images, labels))
    net = train(settings, data).eval()
    with writing(settings.out) as temporary:
        save_file({key: value.half() for key, value in net.state_dict().items()}, temporary)

    labels = torch.arange(settings.judged) % len(NAMES)
    prompts = [f"a photo of a {NAMES[label][0]}" for label in labels.tolist()]
    samples = draw_samples(net, prompts, settings.guidance, settings.seed)
    judge = fashion.load_features()
    print(f"{len(samples)} samples, guidance {settings.guidance}, 50 Euler steps:")
    print(f"  Frechet distance {frechet_distance(samples, judge):.2f}")
    print(f"  recognised {recognition_rate(samples, labels, judge):.3f}")


if __name__ == "__main__":
    run_cli(main)
