"""Files of the ImageNet networks: teachers, students, initialisation, decoder.

    python -m imagenet.checkpoints outputs/tiny student.safetensors         # the student of a run
    python -m imagenet.checkpoints SiT-XL-2-256.pt sit.safetensors --head velocity --flip-time

`load_dit` reads three layouts (layouts.py): ours, that of the published pi-Flow ImageNet networks,
and that of the SiT/REPA project. What shapes do not tell stands as `DiTConfig` in the header of
.safetensors, and in a run's checkpoints/step_*.pt under the key "export". The command writes the
published layout and states there what a file of others does not.
"""

if not __package__:
    raise SystemExit("start it in the repository's root: python -m imagenet.checkpoints")

import argparse
import contextlib
import dataclasses
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common import fashion
from common.cli import parse, run_cli, setting
from common.files import is_remote, join, reading, writing
from common.heads import repeat_head
from imagenet.dit import INITIAL_STD, PIXELS, VAE, DiT, DiTConfig
from imagenet.layouts import VELOCITIES, to_ours, to_published


class Source(NamedTuple):
    """A network by name: where it is; of a teacher, the guidance that it was distilled with."""

    path: str
    time_scale: float | None = None  # None: as the file states
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    nfe: int | None = None  # of a student


HUB = "Lakonik/pi-Flow-ImageNet/"
FILE = "_imagenet_piid_{}step/diffusion_pytorch_model.safetensors"
TEACHERS = {
    "tiny": Source(str(fashion.TEACHER), None, 2.5, (0.0, 0.8)),
    "repa": Source(HUB + "teachers/repa_imagenet.pth", 1.0, 3.2, (0.0, 0.7)),
    "fm": Source(HUB + "teachers/flowdit_imagenet.pth", 1000.0, 2.7, (0.0, 0.6)),
}
STUDENTS = {
    "gm-fm-1nfe": Source(HUB + "gmdit_k32" + FILE.format(1), 1000.0, nfe=1),
    "gm-repa-1nfe": Source(HUB + "gmrepa_k32" + FILE.format(1), 1.0, nfe=1),
    "gm-repa-2nfe": Source(HUB + "gmrepa_k32" + FILE.format(2), 1.0, nfe=2),
}


# ---- Student initialisation ----------------------------------------------------------------------


@torch.no_grad()
def init_student_from_teacher(
    teacher: DiT, head: str, components: int, generator: torch.Generator | None = None
) -> DiT:
    """A student that starts as its teacher: same backbone, the output head repeated for each map.

    gmflow: every component's mean is the teacher's velocity plus its own constant per channel,
    drawn from N(0, 0.05^2). The weights start equal, the standard deviation at 0.05. dx: N copies.

    Args: teacher: with the velocity head; head: "gmflow" or "dx"; components: K or N; generator: on
        the CPU.
    """
    config = dataclasses.replace(teacher.config, head=head, components=components)
    velocity = teacher.final_layer.linear
    student = DiT(config).to(velocity.weight.device, velocity.weight.dtype)
    state = {k: v for k, v in teacher.state_dict().items() if not k.startswith(VELOCITIES)}
    student.load_state_dict(state, strict=False)  # the head's own parameters are new
    spread = INITIAL_STD if head == "gmflow" else 0.0
    weight, bias = repeat_head(
        velocity.weight, velocity.bias, components, config.channels, spread, generator
    )
    final = student.final_layer
    repeated = final.means if head == "gmflow" else final.linear
    repeated.weight.copy_(weight)
    repeated.bias.copy_(bias)
    return student


# ---- Writing and reading -------------------------------------------------------------------------


def save_dit(
    net: DiT, path: str | Path, dtype: torch.dtype = torch.float32, published: bool = False
) -> None:
    """Writes the weights as `dtype` in safetensors; the config goes as JSON into the file's header.

    `published`: under the names of the public pi-Flow ImageNet students and teachers.
    """
    from safetensors.torch import save_file

    state = to_published(net.state_dict()) if published else net.state_dict()
    state = {key: value.detach().to(dtype).cpu().contiguous() for key, value in state.items()}
    with writing(path) as temporary:
        save_file(state, temporary, {"config": json.dumps(dataclasses.asdict(net.config))})


def load_dit(
    source: str | Path, num_heads: int | None = None, time_scale: float | None = None,
    device: torch.device | str = "cpu", head: str | None = None, flip_time: bool = False,
) -> DiT:  # fmt: skip
    """Reads a teacher or student; weights stored in half precision become float32; eval mode.

    What shapes tell is read from them, the rest from the config that a file of ours states; the
    arguments are for files that do not. What is converted or left out is said in a warning. Of a
    file with a network and its moving average, the average is read.

    Args:
        source: a file (.safetensors, .pt, .pth), the folder of a run, local or remote, or
            `owner/repository/path/in/repository` on the Hugging Face Hub.
        num_heads: of the attention; known for the widths of DiT-S, B, L and XL.
        time_scale: factor applied to t before the time embedding, 1 if nothing states it. The
            published flow-matching teacher and its students need 1000, REPA's 1.
        head: "velocity" or "dx", where the number of output rows allows both.
        flip_time: for a network that was trained with t = 1 as data (SiT): it gets 1 - t, and the
            sign of its output changes.
    Raises: FileNotFoundError, or ValueError for a file that cannot be read, does not fit, is not
        finite, or states another value than an argument.
    """
    given = {"num_heads": num_heads, "time_scale": time_scale, "head": head}
    given |= {"flip_time": flip_time or None}
    given = {key: value for key, value in given.items() if value is not None}
    with local_file(source) as path:
        state, stated = read_state(path)
        try:
            config, state = to_ours(state, stated | given)
            facts = {"head": config.head} | stated
            for key, value in given.items():
                if facts.get(key, value) != value:
                    raise ValueError(f"{key} is {value!r}, the file states {facts[key]!r}")
            if flip_time and not stated.get("flip_time"):
                turned = {key: -state[key] for key in state if key.startswith(VELOCITIES)}
                state |= turned
            with torch.device("meta"):
                net = DiT(config)
            net.load_state_dict(state, assign=True)
            broken = [key for key, value in state.items() if not value.isfinite().all()]
            if broken:
                raise ValueError(f"{len(broken)} tensors are not finite, as {broken[0]}")
        except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:500]
            raise ValueError(f"{source} does not fit a DiT: {reason}") from error
        return net.float().to(device).eval()


@contextlib.contextmanager
def local_file(source: str | Path) -> Iterator[Path]:
    """Yields the file of a run, of a remote path, or of the Hub (kept in its cache)."""
    path = Path(source)
    if path.is_dir() or (is_remote(source) and path.suffix not in SUFFIXES):
        source = join(source, "student.safetensors")
    if is_remote(source) or Path(source).is_file():
        with reading(source) as local:
            yield local
        return
    owner, _, rest = str(source).partition("/")
    name, _, inside = rest.partition("/")
    if not inside or path.is_dir() or path.is_absolute() or owner in (".", "..", "~"):
        raise FileNotFoundError(
            f"no file {source}; give a checkpoint, a run or owner/repository/path/in/repository"
        )
    from huggingface_hub import hf_hub_download

    try:
        fetched = hf_hub_download(f"{owner}/{name}", inside)
    except OSError as error:
        raise FileNotFoundError(f"no file {source}, and not on the Hub: {error}") from error
    yield Path(fetched)


SUFFIXES = (".safetensors", ".pt", ".pth")
WRAPPERS = ("ema", "ema_state_dict", "model_ema", "state_dict", "model", "module", "net")


def read_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """All tensors of a checkpoint, and the config that it states (empty if there is none).

    Nothing is unpickled but tensors, numbers, strings, containers and flags (argparse.Namespace).
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                stated = dict(json.loads((file.metadata() or {}).get("config", "{}")))
                return {key: file.get_tensor(key) for key in file.keys()}, stated  # noqa: SIM118
        with torch.serialization.safe_globals([argparse.Namespace]):  # REPA stores its flags
            zipped = zipfile.is_zipfile(path)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        stated = state.get("export", {})
        while inner := [state[name] for name in WRAPPERS if isinstance(state.get(name), dict)]:
            state = inner[0]
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("it does not hold a dict of tensors")
        return state, stated
    except Exception as error:  # the readers stumble over nearly anything
        reason = str(error).strip().split("\n")[0]
        if reason.startswith("Weights only load failed"):  # the advice that follows is to unpickle
            reason = "it holds more than tensors, numbers and containers"
        raise ValueError(f"{path} cannot be read as a checkpoint of tensors: {reason}") from error


# ---- Decoder -------------------------------------------------------------------------------------


def load_decoder(
    config: DiTConfig, device: torch.device, dtype: torch.dtype = torch.float32
) -> Callable[[Tensor], Tensor]:
    """Latents (B, C, H, W) -> images (B, 1 or 3, 8H or 2H, ...) in [-1, 1], by `config.decoder`.

    dtype: of the VAE. The returned function raises a ValueError for images that are not finite.
    """
    if config.decoder == PIXELS:
        return lambda latents: fashion.to_images(latents).clamp(-1, 1)
    vae = load_vae(device, config.decoder, dtype)
    scale, offset = latent_scale(vae)

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        parts = (latents.float() / scale + offset).to(dtype).split(16)
        images = torch.cat([vae.decode(part).sample.float() for part in parts])
        if not images.isfinite().all():
            raise ValueError(f"images of the VAE {config.decoder} in {dtype} are not finite")
        return images.clamp(-1, 1)

    return decode


def load_vae(
    device: torch.device, name: str = VAE, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """An autoencoder by its name on the Hub or its folder."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(name).to(device, dtype).eval().requires_grad_(False)


def latent_scale(vae: nn.Module) -> tuple[float, float]:
    """(scale, offset): the network's latents are (the VAE's - offset) * scale."""
    return vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0


def to_pixels(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] -> uint8 (B, H, W, C) on the CPU, by rounding."""
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()


# ---- The command ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is written, and what its file does not state."""

    model: str = setting(
        dataclasses.MISSING, "run, file, or owner/repository/path on the Hub",
        positional=True, path=True,
    )  # fmt: skip
    out: Path = setting(dataclasses.MISSING, "file, .safetensors", positional=True)
    num_heads: int | None = setting(None, "attention heads", low=1)
    time_scale: float | None = setting(
        None, "factor applied to t before the time embedding; default: 1", above=0
    )
    head: str | None = setting(
        None, "what a head with twice the rows is", choices=("velocity", "dx")
    )
    flip_time: bool = setting(False, "trained with t = 1 as data (SiT)")
    decoder: str | None = setting(None, f"VAE, a folder or Hub name; default: {VAE}", path=True)


def main(argv: list[str] | None = None) -> None:
    """Writes a network under the names of the published pi-Flow ImageNet networks."""
    s = parse(Settings, __doc__, argv)
    if s.out.suffix != ".safetensors":
        raise ValueError(f"{s.out}: the new file must end in .safetensors")
    if s.out.exists():
        raise ValueError(f"{s.out} exists; name a new file")
    net = load_dit(s.model, s.num_heads, s.time_scale, head=s.head, flip_time=s.flip_time)
    net.config = dataclasses.replace(net.config, decoder=s.decoder or net.config.decoder)
    save_dit(net, s.out, published=True)
    print(f"{net.config.head} network in the published layout: {s.out}")


if __name__ == "__main__":
    run_cli(main)
