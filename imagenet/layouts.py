"""Layouts of DiT checkpoints: state dicts under public names, and what they tell of the network.

ours                         SiT/REPA's names; query, key and value in one matrix
published                    pi-Flow's ImageNet networks: diffusers' names
prefixes                     DistributedDataParallel, torch.compile, training classes
stored positions             SiT/REPA: compared with the sin-cos ones
norm1.emb in each block      diffusers' DiT: kept once
more output rows             a variance half, a log standard deviation: left out
"""

import math
import re

import torch
from torch import Tensor

from imagenet.dit import DiTConfig, position_features

# Ours and the published names of the same tensors, replaced one after the other, in this order.
PUBLISHED_NAMES = (
    ("x_embedder.", "pos_embed."),
    ("t_embedder.mlp.0.", "emb.timestep_embedder.linear_1."),
    ("t_embedder.mlp.2.", "emb.timestep_embedder.linear_2."),
    ("y_embedder.", "emb.class_embedder."),
    ("final_layer.adaLN_modulation.1.", "proj_out_1."),
    ("final_layer.linear.", "proj_out_2."),
    ("final_layer.means.", "proj_out_means."),
    ("final_layer.logweights.", "proj_out_logweights."),
    ("final_layer.logstds.", "proj_out_logstds."),
    ("blocks.", "transformer_blocks."),
    (".attn.proj.", ".attn1.to_out.0."),
    (".mlp.fc1.", ".ff.net.0.proj."),
    (".mlp.fc2.", ".ff.net.2."),
    (".adaLN_modulation.1.", ".norm1.linear."),
)
PATCHES = ("x_embedder.proj.weight", "pos_embed.proj.weight")  # one of them is in every DiT
VELOCITIES = ("final_layer.linear.", "final_layer.means.")  # the rows that predict velocities
WRAPPING = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
NUM_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of DiT-S, B, L, XL, by width
PUBLISHED_NORM2_EPS = 1e-5  # the networks there are built on diffusers' transformer block


def to_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ours -> the published layout."""
    result = {}
    for key, value in state.items():
        for ours, theirs in PUBLISHED_NAMES:
            key = key.replace(ours, theirs)
        if ".attn.qkv." in key:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                result[key.replace("attn.qkv", f"attn1.to_{name}")] = part
        else:
            result[key] = value
    return result


def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published layout -> a state dict of ours."""
    result = {}
    for key, value in state.items():
        if ".attn1.to_q." in key:
            parts = [state[key.replace("to_q", f"to_{name}")] for name in "qkv"]
            key, value = key.replace("attn1.to_q", "attn.qkv"), torch.cat(parts)
        elif re.search(r"\.attn1\.to_[kv]\.", key):
            continue
        for ours, theirs in PUBLISHED_NAMES:
            key = key.replace(theirs, ours)
        result[key] = value
    return result


def one_network(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """-> the tensors of one network under names without prefixes, and what was converted, in words.

    Of several networks it is the moving average, whose prefix has "ema" in it.
    Raises: ValueError if that does not say which.
    """
    plain = {}
    for key, value in state.items():
        plain[".".join(part for part in key.split(".") if part not in WRAPPING)] = value
    prefixes = {key.removesuffix(end) for key in plain for end in PATCHES if key.endswith(end)}
    averages = {prefix for prefix in prefixes if "ema" in re.split(r"[._]", prefix)}
    if len(prefixes) > 1 and len(averages) != 1:
        several = ", ".join(map(repr, sorted(prefixes)))
        raise ValueError(f"it holds several networks, with the prefixes {several}; save one alone")
    prefix = "".join(averages or prefixes)
    found = {key.removeprefix(prefix): plain[key] for key in plain if key.startswith(prefix)}
    notes = []
    if plain.keys() != state.keys():
        notes.append("prefixes of wrappers removed")
    if prefix:
        notes.append(f"prefix {prefix} removed")
    if len(found) < len(state):
        notes.append(f"{len(state) - len(found)} other tensors left out")
    return found, notes


def to_ours(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict, list[str]]:
    """Any known layout -> ours.

    Returns: the state; what the layout tells of the config, with "foreign" if it cannot be a file
        of pi-Flow; what was converted, in words.
    Raises: ValueError for several networks in one file, an embedding of its own in each block, or
        positions that are not the sin-cos ones.
    """
    state, notes = one_network(state)
    facts = {}
    repeated = [key for key in state if ".norm1.emb." in key]
    for key in repeated:
        once, value = "emb." + key.split(".norm1.emb.")[1], state.pop(key)
        if not torch.equal(state.setdefault(once, value), value):
            raise ValueError(f"{key} is not that of the other blocks: each has its own embedding")
    if repeated:
        notes.append(f"{len(repeated)} embeddings repeated in the blocks are kept once")
    published = any(key.startswith("transformer_blocks.") for key in state)
    if published:
        state = from_published(state)
        facts["norm2_eps"] = PUBLISHED_NORM2_EPS
    state = {key: value for key, value in state.items() if not key.startswith("projectors.")}
    hidden, _, patch, _ = state["x_embedder.proj.weight"].shape
    positions = [key for key in state if re.search(r"(^|\.)(pe|pos\w*)$", key)]
    for key in positions:
        stored = state.pop(key).reshape(-1, hidden).float()
        rows = math.isqrt(len(stored))
        off = (stored - position_features(rows, hidden)).abs().max().item()
        if not off < 0.01 and stored.any():  # bfloat16 rounds by 0.004; some store zeros
            raise ValueError(
                f"its positions {key} differ from the sin-cos ones by {off:.2g}: no such network"
            )
        facts["latent_size"] = rows * patch
    facts["foreign"] = bool(repeated or (positions and not published))
    return state, facts, notes


def infer_config(
    state: dict[str, Tensor], known: dict, facts: dict, notes: list[str]
) -> tuple[DiTConfig, dict[str, Tensor]]:
    """Sizes and head from shapes. -> the config, and the state with the head that belongs to it.

    known: from the file and the caller; facts, notes: of `to_ours`.
    Raises: KeyError for a parameter that any DiT has, ValueError for what contradicts.
    """
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
        state, maps = cut_head(state, patch**2, channels, known.get("head"), facts, notes)
        is_dx = maps > 1 or known.get("head") == "dx"  # N = 1 looks like a velocity
        shapes["head"] = "dx" if is_dx else "velocity"
        shapes["components"] = maps
    if known.get("head", shapes["head"]) != shapes["head"]:
        raise ValueError(f"head is {known['head']!r}, its output layer is a {shapes['head']} head")
    heads = known.get("num_heads", NUM_HEADS.get(hidden))
    if heads is None:
        raise ValueError(f"its width is {hidden}, and num_heads (--num-heads) is not stated")
    if hidden % heads:
        raise ValueError(f"its width, {hidden}, is no multiple of num_heads, {heads}")
    if "time_scale" not in known and "norm2_eps" in facts:
        notes.append("factor of t not stated, taken as 1 (--time-scale; the fm networks need 1000)")
    facts = {key: value for key, value in facts.items() if key != "foreign"}
    return DiTConfig(**facts | known | shapes | {"num_heads": heads}), state


def cut_head(
    state: dict[str, Tensor], pixels: int, channels: int, head: str | None, facts: dict,
    notes: list[str],
) -> tuple[dict[str, Tensor], int]:  # fmt: skip
    """Drops output rows that no velocity needs. -> the state, and velocities per sample: 1 or N.

    Rows are (pixels, channels) of a velocity, (pixels, N, channels) of a dx head, (pixels, 2
    channels) with a variance half, (pixels, channels + 1) with a log standard deviation.
    Raises: ValueError if twice the rows could be either, or for any other number.
    """
    unit = pixels * channels
    rows = len(state["final_layer.linear.weight"])
    if rows == pixels * (channels + 1) and rows % unit:
        what = "its log standard deviation is left out"
    elif rows == 2 * unit and (head == "velocity" or head is None and facts["foreign"]):
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
    state = dict(state)
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[key] = state[key].unflatten(0, (pixels, -1))[:, :channels].flatten(0, 1)
    return state, 1
