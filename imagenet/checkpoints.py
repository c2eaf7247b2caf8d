"""Files of the ImageNet networks: teachers, public layouts, student initialisation, decoder.

`load_dit` reads three checkpoint layouts: ours, that of the published pi-Flow ImageNet networks
(diffusers-style names), and that of the SiT/REPA project. `save_dit` writes the first two.
"""

import argparse
import dataclasses
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.cli import atomic
from imagenet import fashion
from imagenet.dit import INITIAL_STD, PIXELS, VAE, DiT, DiTConfig


class Source(NamedTuple):
    """A teacher: where it is, and the guidance that it was distilled with."""

    path: str
    time_scale: float | None = None  # None: as the file states
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)


HUB = "Lakonik/pi-Flow-ImageNet/"
TEACHERS = {
    "tiny": Source(str(fashion.TEACHER), None, 2.5, (0.0, 0.8)),
    "repa": Source(HUB + "teachers/repa_imagenet.pth", 1.0, 3.2, (0.0, 0.7)),
    "fm": Source(HUB + "teachers/flowdit_imagenet.pth", 1000.0, 2.7, (0.0, 0.6)),
}


# ---------------------------------------------------------------------------------------------
# Student initialisation
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def init_student_from_teacher(
    teacher: DiT,
    head: str,
    components: int,
    logstd_hidden: int = 1024,
    generator: torch.Generator | None = None,
) -> DiT:
    """A student that starts as its teacher: same backbone, the output head repeated for each map.

    gmflow: every component's mean is the teacher's velocity plus its own constant per channel,
    drawn from N(0, 0.05^2). Without that noise all components would get the same gradient and stay
    one for ever. The weights start equal, the standard deviation at 0.05. dx: N copies, no noise.

    Args: head "gmflow" or "dx"; components: K or N; generator: on the CPU.
    Raises: ValueError if the teacher has another head than velocity, or the student's is unknown.
    """
    if teacher.config.head != "velocity" or head == "velocity":
        raise ValueError(
            f"a student's head is gmflow or dx and its teacher's velocity; given {head!r} and "
            f"{teacher.config.head!r}"
        )
    config = dataclasses.replace(
        teacher.config, head=head, components=components, logstd_hidden=logstd_hidden
    )
    weight = teacher.final_layer.linear.weight
    student = DiT(config).to(weight.device, weight.dtype)
    own = ("final_layer.linear.", "final_layer.means.", "final_layer.log")
    kept = {k: v for k, v in teacher.state_dict().items() if not k.startswith(own)}
    student.load_state_dict(kept, strict=False)

    final, channels = student.final_layer, config.channels
    out = final.means if head == "gmflow" else final.linear  # rows: (p * p, components, channels)
    old = teacher.final_layer.linear
    repeat = (-1, components, -1)
    out.weight.copy_(old.weight.unflatten(0, (-1, 1, channels)).expand(*repeat, -1).flatten(0, 2))
    bias = old.bias.unflatten(0, (-1, 1, channels)).expand(repeat)
    if head == "gmflow":
        noise = torch.randn(components, channels, generator=generator).to(bias)
        bias = bias + INITIAL_STD * noise
    out.bias.copy_(bias.flatten())
    return student


# ---------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------

# Our names are those of SiT/REPA. The published pi-Flow layout has other names for the same tensors
# and keeps query, key and value apart; "blocks.*" stands for every block.
PUBLISHED_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "emb.class_embedder.embedding_table",
    "blocks.*.attn.proj": "transformer_blocks.*.attn1.to_out.0",
    "blocks.*.mlp.fc1": "transformer_blocks.*.ff.net.0.proj",
    "blocks.*.mlp.fc2": "transformer_blocks.*.ff.net.2",
    "blocks.*.adaLN_modulation.1": "transformer_blocks.*.norm1.linear",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
    "final_layer.means": "proj_out_means",
    "final_layer.logweights": "proj_out_logweights",
    "final_layer.logstds.1": "proj_out_logstds.1",
    "final_layer.logstds.3": "proj_out_logstds.3",
}
PUBLISHED_QKV = tuple(f"transformer_blocks.*.attn1.to_{part}" for part in "qkv")
OUR_QKV = "blocks.*.attn.qkv"


def rename(key: str, names: dict[str, str]) -> str:
    """Renames a parameter (module.weight or module.bias); a block's number takes the place of *."""
    module, _, kind = key.rpartition(".")
    number = module.split(".")[1] if "blocks." in module else ""
    pattern = module.replace(f"blocks.{number}.", "blocks.*.")
    return f"{names.get(pattern, pattern).replace('*', number)}.{kind}"


def to_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ours -> the published layout."""
    result = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            for name, part in zip(PUBLISHED_QKV, value.chunk(3), strict=True):
                result[rename(key, {OUR_QKV: name})] = part
        else:
            result[rename(key, PUBLISHED_NAMES)] = value
    return result


def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published layout -> a state dict of ours."""
    names = {theirs: ours for ours, theirs in PUBLISHED_NAMES.items()}
    state, result = dict(state), {}
    for key in [key for key in state if ".attn1.to_q." in key]:
        parts = [key.replace("to_q", f"to_{part}") for part in "qkv"]
        if all(part in state for part in parts):  # if not, they are reported as unexpected
            whole = torch.cat([state.pop(part) for part in parts])
            result[rename(key, {PUBLISHED_QKV[0]: OUR_QKV})] = whole
    return result | {rename(key, names): value for key, value in state.items()}


def save_dit(
    net: DiT, path: str | Path, dtype: torch.dtype = torch.float32, published: bool = False
) -> None:
    """Writes the weights as `dtype` in safetensors; the config goes as JSON into the file's header.

    `published`: under the names of the public pi-Flow ImageNet students and teachers.
    """
    from safetensors.torch import save_file

    state = to_published(net.state_dict()) if published else net.state_dict()
    state = {key: value.detach().to(dtype).cpu().contiguous() for key, value in state.items()}
    with atomic(path) as temporary:
        save_file(state, temporary, {"config": json.dumps(dataclasses.asdict(net.config))})


def load_dit(
    source: str | Path,
    num_heads: int | None = None,
    time_scale: float | None = None,
    latent_size: int = 32,
    device: torch.device | str = "cpu",
) -> DiT:
    """Reads a teacher or student; weights stored in half precision become float32; eval mode.

    Layout, width, depth, head and K or N are read from keys and shapes. What shapes do not tell
    comes from the arguments, else from the header of a file that `save_dit` wrote.

    Args:
        source: a file (.safetensors, .pt, .pth), or `owner/repository/path/in/repository` on the
            Hugging Face Hub.
        num_heads: of the attention; 16 if neither this nor the file says.
        time_scale: the network is told time_scale * t; 1.0 if neither this nor the file says. The
            published flow-matching teacher and its students need 1000, the REPA ones 1.
        latent_size: what the network was trained at, kept as information.
        device: where to put it.
    Raises: FileNotFoundError, or ValueError for a file that cannot be read or does not fit: the
        message names the keys. ImportError if the Hub is needed and huggingface_hub is missing.
    """
    path = find_file(source)
    state, header = read_state(path)
    state = {  # REPA's training targets are of no use here, and positions are computed
        key: value
        for key, value in state.items()
        if key != "pos_embed" and not key.startswith("projectors.")
    }
    if any(key.startswith("transformer_blocks.") for key in state):
        state = from_published(state)
    known = {"num_heads": 16, "time_scale": 1.0, "latent_size": latent_size} | header
    given = {"num_heads": num_heads, "time_scale": time_scale}
    known |= {key: value for key, value in given.items() if value is not None}
    try:
        config = infer_config(state, known)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source} is not a DiT in a known layout ({type(error).__name__}: {error}); "
            f"its keys are {listed(sorted(state)) or 'none'}"
        ) from error
    with torch.device("meta"):
        net = DiT(config)
    check_fit(source, net, state)
    net.load_state_dict(state, assign=True)
    return net.float().to(device).eval()


def find_file(source: str | Path) -> Path:
    """A local file, or one fetched from the Hub (kept in its cache)."""
    path = Path(source)
    if path.is_file():
        return path
    parts = str(source).split("/")
    if len(parts) < 3 or path.is_dir() or path.is_absolute() or parts[0] in (".", "..", "~"):
        raise FileNotFoundError(
            f"no file {source}; give a checkpoint file or owner/repository/path/in/repository"
        )
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise ImportError(
            f"{source} is no local file; to fetch it from the Hub: pip install huggingface_hub"
        ) from error
    try:
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
    except (HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{source} is no local file, and the Hub did not give it: {error}"
        ) from error


def read_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """All tensors of a checkpoint, and the config in its header (empty if there is none)."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("config", "{}"))
                return {key: file.get_tensor(key) for key in file.keys()}, header  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # REPA stores its flags
            state = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # no pickle at all: the unpickler stumbles over nearly anything
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is not a readable PyTorch checkpoint: {reason}") from error
    for wrapper in ("ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            break
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} is not a DiT checkpoint: it does not hold a dict of tensors")
    return state, {}


def infer_config(state: dict[str, Tensor], known: dict) -> DiTConfig:
    """Sizes and head from shapes. Raises: KeyError for a parameter that any DiT has."""
    hidden, channels, patch, _ = state["x_embedder.proj.weight"].shape
    blocks = [int(key.split(".")[1]) for key in state if key.startswith("blocks.")]
    shapes = {
        "hidden": hidden,
        "channels": channels,
        "patch": patch,
        "depth": max(blocks, default=-1) + 1,
        "num_classes": len(state["y_embedder.embedding_table.weight"]) - 1,
    }
    if "final_layer.means.weight" in state:
        shapes["head"] = "gmflow"
        shapes["components"] = len(state["final_layer.means.weight"]) // (patch**2 * channels)
        shapes["logstd_hidden"] = len(state["final_layer.logstds.1.weight"])
    else:
        shapes["components"] = len(state["final_layer.linear.weight"]) // (patch**2 * channels)
        many = shapes["components"] > 1 or known.get("head") == "dx"  # N = 1 looks like a velocity
        shapes["head"] = "dx" if many else "velocity"
    return DiTConfig(**{**known, **shapes})


def check_fit(source: str | Path, net: DiT, state: dict[str, Tensor]) -> None:
    """Raises ValueError that names what is missing, unexpected or of another shape."""
    expected = net.state_dict()
    wrong = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
            for key, value in expected.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    told = [f"{what}: {listed(keys)}" for what, keys in wrong.items() if keys]
    if told:
        raise ValueError(f"{source} does not fit a DiT; {'; '.join(told)}")


def listed(keys: list[str], most: int = 4) -> str:
    """The first few keys, and how many more there are."""
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


# ---------------------------------------------------------------------------------------------
# Decoder
# ---------------------------------------------------------------------------------------------


def load_decoder(config: DiTConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Latents (B, C, H, W) -> images (B, 1 or 3, 8H or 2H, ...) in [-1, 1], by `config.decoder`.

    Raises: ValueError if the decoder takes another number of channels; ImportError if diffusers is
        needed and missing.
    """
    if config.decoder == PIXELS:
        if config.channels not in (4, 12):
            raise ValueError(
                f"the network has {config.channels} latent channels, the decoder {PIXELS} takes 4 "
                "(grey) or 12 (RGB)"
            )
        return lambda latents: fashion.to_images(latents).clamp(-1, 1)
    vae = load_vae(device, config.decoder)
    if vae.config.latent_channels != config.channels:
        raise ValueError(
            f"the network has {config.channels} latent channels, the VAE {config.decoder} has "
            f"{vae.config.latent_channels}"
        )

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        parts = (latents.float() / vae.config.scaling_factor).split(16)
        return torch.cat([vae.decode(part).sample for part in parts]).clamp(-1, 1)

    return decode


def load_vae(device: torch.device, name: str = VAE) -> nn.Module:
    """An autoencoder by its name on the Hub or its folder. ImportError if diffusers is missing."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError("ImageNet latents need the VAE: pip install diffusers") from error
    return AutoencoderKL.from_pretrained(name).to(device).eval().requires_grad_(False)


def to_pixels(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] -> uint8 (B, H, W, C) on the CPU."""
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()
