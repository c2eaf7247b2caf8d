"""Files of the ImageNet networks: teachers, public layouts, student initialisation, decoder.

`load_dit` reads three checkpoint layouts: ours, that of the published pi-Flow ImageNet networks
(diffusers-style names), and that of the SiT/REPA project. `save_dit` writes the first two.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common import fashion
from common.cli import atomic
from imagenet.dit import INITIAL_STD, PIXELS, VAE, DiT, DiTConfig, position_features


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
# Writing and reading
# ---------------------------------------------------------------------------------------------


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
    latent_size: int | None = None,
    device: torch.device | str = "cpu",
    head: str | None = None,
    flip_time: bool = False,
) -> DiT:
    """Reads a teacher or student; weights stored in half precision become float32; eval mode.

    Layout, width, depth, head and K or N are read from keys and shapes. What shapes do not tell
    comes from the arguments, else from the header of a file that `save_dit` wrote. Prefixes, stored
    positions, an unused variance half and embeddings repeated in each block are converted, with a
    warning that tells it.

    Args:
        source: a file (.safetensors, .pt, .pth), or `owner/repository/path/in/repository` on the
            Hugging Face Hub.
        num_heads: of the attention; known for the widths of DiT-S, B, L and XL.
        time_scale: factor applied to t before the time embedding; 1.0 if neither this nor the file
            states it. The published flow-matching teacher and its students need 1000, REPA's 1.
        latent_size: that it was trained at; as the stored positions or the header say, else 32.
        device: where to put it.
        head: "velocity" or "dx", where the number of output rows allows both.
        flip_time: for a network that was trained with t = 1 as data (SiT): it gets 1 - t, and the
            sign of its output changes.
    Raises: FileNotFoundError, or ValueError for a file that cannot be read or does not fit: the
        message names the keys. ImportError if the Hub is needed and huggingface_hub is missing.
    """
    state, header = read_state(find_file(source))
    keys = sorted(state)
    given = {"num_heads": num_heads, "time_scale": time_scale, "latent_size": latent_size}
    given |= {"head": head, "flip_time": flip_time or None}
    known = header | {key: value for key, value in given.items() if value is not None}
    try:
        if head and header.get("head", head) != head:
            raise ValueError(f"head is {head!r}, its header says {header['head']!r}")
        state, facts, notes = to_ours(state)
        config, state = infer_config(state, known, facts, notes)
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{source} is not a DiT in a known layout ({reason}); its keys are "
            f"{listed(keys) or 'none'}"
        ) from error
    if config.flip_time and not header.get("flip_time"):
        for key in [key for key in state if key.startswith(MEANS)]:
            state[key] = -state[key]
    with torch.device("meta"):
        net = DiT(config)
    check_fit(source, net, state)
    net.load_state_dict(state, assign=True)
    net.positions = position_features(config.latent_size // config.patch, config.hidden)
    if notes:
        warnings.warn(f"{source}: {'; '.join(notes)}", stacklevel=2)
    return net.float().to(device).eval()


def weights_hash(net: nn.Module) -> str:
    """Identifies a network by content: 16 hex digits of its weights (and a DiT's config)."""
    config = repr(net.config) if isinstance(net, DiT) else ""
    digest = hashlib.blake2b(config.encode(), digest_size=8)
    for key, value in net.state_dict().items():
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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


WRAPPERS = ("ema", "ema_state_dict", "model_ema", "state_dict", "model", "module", "net")


def read_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """All tensors of a checkpoint, and the config in its header (empty if there is none).

    Nothing is unpickled but tensors, numbers, strings, containers and flags (argparse.Namespace).
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("config", "{}"))
                if not isinstance(header, dict):
                    raise ValueError(f"{path} has a config in its header that is no dict")
                return {key: file.get_tensor(key) for key in file.keys()}, header  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # REPA stores its flags
            state = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # no pickle at all: the unpickler stumbles over nearly anything
        refused = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        if refused:
            raise ValueError(
                f"{path} is not a readable PyTorch checkpoint: it holds a {refused[1]}, only "
                "tensors are read; save its state dict alone"
            ) from error
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is not a readable PyTorch checkpoint: {reason}") from error
    while isinstance(state, dict):
        inner = [state[name] for name in WRAPPERS if isinstance(state.get(name), dict)]
        if not inner:
            break
        state = inner[0]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} is not a DiT checkpoint: it does not hold a dict of tensors")
    return state, {}


def check_fit(source: str | Path, net: DiT, state: dict[str, Tensor]) -> None:
    """Raises ValueError that names what is missing, unexpected, of another shape, or not finite."""
    expected = net.state_dict()
    wrong = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
            for key, value in expected.items()
            if key in state and state[key].shape != value.shape
        ],
        "not finite": [key for key, value in state.items() if not value.isfinite().all()],
    }
    found = [f"{what}: {listed(keys)}" for what, keys in wrong.items() if keys]
    if found:
        raise ValueError(f"{source} does not fit a DiT; {'; '.join(found)}")


def listed(keys: list[str], most: int = 4) -> str:
    """The first few keys, and how many more there are."""
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


# ---------------------------------------------------------------------------------------------
# Layouts
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
NUM_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of DiT-S, B, L, XL, by width
PUBLISHED_NORM2_EPS = 1e-5  # the networks there are built on diffusers' transformer block
MEANS = ("final_layer.linear.", "final_layer.means.")  # the rows that predict velocities
WRAPPING = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def pattern_of(key: str) -> tuple[str, str, str]:
    """A parameter's module with * for the block, the block's number, and weight or bias."""
    module, _, kind = key.rpartition(".")
    number = module.split(".")[1] if module.startswith(("blocks.", "transformer_blocks.")) else ""
    return module.replace(f"blocks.{number}.", "blocks.*.", 1), number, kind


def rename(key: str, names: dict[str, str]) -> str:
    """Renames a parameter (module.weight or module.bias); a block's number takes the place of *."""
    pattern, number, kind = pattern_of(key)
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


def to_ours(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict, list[str]]:
    """Any known layout -> ours.

    Returns: the state; what the layout tells of the config, with "foreign" if it cannot be a file
        of pi-Flow; what was converted, in words.
    Raises: ValueError for several networks in one file, an embedding of its own in each block, or
        positions that are not the sin-cos ones.
    """
    state, notes = remove_prefixes(state)
    facts = {}
    repeated = [key for key in state if ".norm1.emb." in key]
    for key in repeated:  # as diffusers' own DiT stores them
        one, value = "emb." + key.split(".norm1.emb.")[1], state.pop(key)
        if not torch.equal(state.setdefault(one, value), value):
            raise ValueError(f"{key} is not that of the other blocks: each has its own embedding")
    if repeated:
        notes.append(f"{len(repeated)} embeddings repeated in the blocks are kept once")
        facts["foreign"] = True
    published = any(key.startswith("transformer_blocks.") for key in state)
    if published:
        state, facts["norm2_eps"] = from_published(state), PUBLISHED_NORM2_EPS
    state = {key: value for key, value in state.items() if not key.startswith("projectors.")}
    known = {*PUBLISHED_NAMES, OUR_QKV}
    hidden, _, patch, _ = state["x_embedder.proj.weight"].shape
    for key in [key for key in state if pattern_of(key)[0] not in known]:
        value = state[key]
        rows = math.isqrt(value.numel() // hidden)
        if value.ndim > 1 and value.shape[-1] == hidden and rows**2 * hidden == value.numel():
            check_positions(key, state.pop(key).reshape(-1, hidden))
            facts["latent_size"] = rows * patch
            facts["foreign"] = facts.get("foreign", not published)
    return state, facts, notes


def remove_prefixes(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Keys without what DistributedDataParallel, torch.compile or a training class put before."""
    short = {".".join(p for p in key.split(".") if p not in WRAPPING): key for key in state}
    if len(short) < len(state):
        twice = next(key for key in state if key not in short.values())
        raise ValueError(f"{twice} is there twice, with and without a prefix")
    ends = ("x_embedder.proj.weight", "pos_embed.proj.weight")
    found = {key.removesuffix(end) for key in short for end in ends if key.endswith(end)}
    if len(found) > 1:
        several = ", ".join(repr(prefix) for prefix in sorted(found))
        raise ValueError(f"it holds several networks, with the prefixes {several}; save one alone")
    prefix = found.pop() if found else ""
    parts = {part for key in state for part in key.split(".") if part in WRAPPING}
    removed = sorted(part + "." for part in parts) + [prefix] * bool(prefix)
    notes = [f"prefix {' '.join(removed)} removed"] if removed else []
    return {name.removeprefix(prefix): state[key] for name, key in short.items()}, notes


def check_positions(key: str, stored: Tensor) -> None:
    """Raises: ValueError unless stored positions (T, hidden) are the computed ones, or all zero."""
    expected = position_features(math.isqrt(len(stored)), stored.shape[1])
    difference = (stored.float() - expected).abs().max().item()
    if not difference < 0.01 and stored.any():  # bfloat16 rounds by 0.004
        raise ValueError(
            f"its positions {key} differ from the sin-cos ones by {difference:.2g}: no such network"
        )


def infer_config(
    state: dict[str, Tensor], known: dict, facts: dict, notes: list[str]
) -> tuple[DiTConfig, dict[str, Tensor]]:
    """Sizes and head from shapes. -> the config, and the state with the head that belongs to it.

    known: from the header and the caller; facts, notes: of `to_ours`.
    Raises: KeyError for a parameter that any DiT has, ValueError for what contradicts.
    """
    hidden, channels, patch, _ = state["x_embedder.proj.weight"].shape
    if known.get("latent_size", size := facts.get("latent_size")) != size and size:
        raise ValueError(f"latent_size is {known['latent_size']}, its positions are of {size}")
    blocks = [int(key.split(".")[1]) for key in state if key.startswith("blocks.")]
    shapes = {
        "hidden": hidden,
        "channels": channels,
        "patch": patch,
        "depth": max(blocks, default=-1) + 1,
        "num_classes": len(state["y_embedder.embedding_table.weight"]) - 1,
    }
    unit = patch**2 * channels
    if "final_layer.means.weight" in state:
        rows = len(state["final_layer.means.weight"])
        if rows % unit:
            raise ValueError(f"final_layer.means has {rows} rows, which is no multiple of {unit}")
        shapes |= {"head": "gmflow", "components": rows // unit}
        shapes["logstd_hidden"] = len(state["final_layer.logstds.1.weight"])
    else:
        state, maps = cut_head(state, patch**2, channels, known, facts, notes)
        many = maps > 1 or known.get("head") == "dx"  # N = 1 looks like a velocity
        shapes |= {"head": "dx" if many else "velocity", "components": maps}
    if known.get("head", shapes["head"]) != shapes["head"]:
        raise ValueError(f"head is {known['head']!r}, its output layer is a {shapes['head']} head")
    if "num_heads" not in known and hidden not in NUM_HEADS:
        raise ValueError(f"its width is {hidden}, and num_heads (--num-heads) is not stated")
    if "time_scale" not in known and "norm2_eps" in facts:
        notes.append("factor of t not stated, taken as 1 (--time-scale; the fm networks need 1000)")
    facts = {key: value for key, value in facts.items() if key != "foreign"}
    config = {"num_heads": NUM_HEADS.get(hidden)} | facts | known | shapes
    fields = {field.name for field in dataclasses.fields(DiTConfig)}
    if unknown := sorted(config.keys() - fields):
        raise ValueError(f"its header has the unknown fields {', '.join(unknown)}")
    return DiTConfig(**config), state


def cut_head(
    state: dict[str, Tensor], pixels: int, channels: int, known: dict, facts: dict,
    notes: list[str],
) -> tuple[dict[str, Tensor], int]:  # fmt: skip
    """Drops output rows that no velocity needs. -> the state, and velocities per sample: 1 or N.

    Rows are (pixels, channels) of a velocity, (pixels, N, channels) of a dx head, (pixels, 2
    channels) with a variance half, (pixels, channels + 1) with a log standard deviation.
    Raises: ValueError if twice the rows could be either, or for any other number.
    """
    unit, names = pixels * channels, ("final_layer.linear.weight", "final_layer.linear.bias")
    rows, head = len(state[names[0]]), known.get("head")
    if rows == pixels * (channels + 1) and rows % unit:
        what = "its log standard deviation is left out"
    elif rows == 2 * unit and (head == "velocity" or head is None and facts.get("foreign")):
        what = "its variance half is left out (SiT's own networks also need flip_time)"
    elif rows == 2 * unit and head is None:
        raise ValueError(
            f"its head has {rows} rows: either a velocity with a variance half, or dx with N = 2; "
            "say which with head='velocity' or 'dx' (--head)"
        )
    elif rows % unit:
        raise ValueError(f"its head has {rows} rows, which is no multiple of {unit}")
    else:
        return state, rows // unit
    notes.append(f"its head has {rows} rows instead of {unit}: read as a velocity, {what}")
    cut = {key: state[key].unflatten(0, (pixels, -1))[:, :channels].flatten(0, 1) for key in names}
    return state | cut, 1


# ---------------------------------------------------------------------------------------------
# Decoder
# ---------------------------------------------------------------------------------------------


def load_decoder(
    config: DiTConfig, device: torch.device, dtype: torch.dtype = torch.float32
) -> Callable[[Tensor], Tensor]:
    """Latents (B, C, H, W) -> images (B, 1 or 3, 8H or 2H, ...) in [-1, 1], by `config.decoder`.

    dtype: of the VAE. The returned function raises a ValueError for images that are not finite.
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
    vae = load_vae(device, config.decoder, dtype)
    if vae.config.latent_channels != config.channels:
        raise ValueError(
            f"the network has {config.channels} latent channels, the VAE {config.decoder} has "
            f"{vae.config.latent_channels}"
        )
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
    """An autoencoder by its name on the Hub or its folder. ImportError if diffusers is missing."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError("ImageNet latents need the VAE: pip install diffusers") from error
    return AutoencoderKL.from_pretrained(name).to(device, dtype).eval().requires_grad_(False)


def latent_scale(vae: nn.Module) -> tuple[float, float]:
    """(scale, offset): the network's latents are (the VAE's - offset) * scale."""
    return vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0


def to_pixels(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] -> uint8 (B, H, W, C) on the CPU, by rounding."""
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()
