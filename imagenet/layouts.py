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
import warnings

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


def to_ours(state: dict[str, Tensor], known: dict) -> tuple[DiTConfig, dict[str, Tensor]]:
    """Any known layout -> the config and a state dict of ours. Warns of what is left out.

    known: what the file or the caller states of the config; the rest is read from names and shapes.
    Raises: ValueError or KeyError for what is no DiT, or does not tell which.
    """
    state = one_network(state)
    merge_repeated(state)
    facts = {}
    published = any(key.startswith("transformer_blocks.") for key in state)
    if published:
        state = from_published(state)
        facts["norm2_eps"] = PUBLISHED_NORM2_EPS
    hidden, channels, patch, _ = state["x_embedder.proj.weight"].shape
    rows = drop_positions(state, hidden)
    if rows:
        facts["latent_size"] = rows * patch
    facts |= {"num_heads": NUM_HEADS.get(hidden)} | known
    if not facts["num_heads"]:
        raise ValueError(
            f"its width is {hidden}, and num_heads is not stated; "
            "python -m imagenet.checkpoints FILE OUT --num-heads states it"
        )
    depth = max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")) + 1
    shapes = {"hidden": hidden, "channels": channels, "patch": patch, "depth": depth}
    shapes["num_classes"] = len(state["y_embedder.embedding_table.weight"]) - 1
    if "final_layer.means.weight" in state:
        shapes["head"] = "gmflow"
        shapes["components"] = len(state["final_layer.means.weight"]) // (patch**2 * channels)
        shapes["logstd_hidden"] = len(state["final_layer.logstds.1.weight"])
    else:
        shapes["components"] = cut_head(state, patch**2, channels, known.get("head"))
        is_dx = shapes["components"] > 1 or known.get("head") == "dx"  # N = 1 looks like a velocity
        shapes["head"] = "dx" if is_dx else "velocity"
    if published and "time_scale" not in known:
        warnings.warn("factor of t not stated, taken as 1 (fm networks: 1000)", stacklevel=3)
    return DiTConfig(**facts | shapes), state


def one_network(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one network, under names without prefixes.

    Of several networks it is the moving average, whose prefix has "ema" in it.
    """
    plain = {}
    for key, value in state.items():
        plain[".".join(part for part in key.split(".") if part not in WRAPPING)] = value
    prefixes = {key.removesuffix(end) for key in plain for end in PATCHES if key.endswith(end)}
    if len(prefixes) > 1:
        prefixes = {prefix for prefix in prefixes if "ema" in re.split(r"[._]", prefix)}
    if len(prefixes) != 1:
        first = ", ".join(sorted(state)[:4])
        raise ValueError(f"it holds no network of a known layout, or several; its keys: {first}")
    prefix = prefixes.pop()
    found = {key.removeprefix(prefix): plain[key] for key in plain if key.startswith(prefix)}
    if found.keys() != state.keys():
        others = f"{len(state) - len(found)} other tensors left out"
        warnings.warn(f"prefix {prefix or 'of wrappers'} removed, {others}", stacklevel=4)
    return {key: value for key, value in found.items() if not key.startswith("projectors.")}


def merge_repeated(state: dict[str, Tensor]) -> None:
    """Keeps once the embeddings that diffusers' DiT stores in each block; they have to be equal."""
    repeated = [key for key in state if ".norm1.emb." in key]
    for key in repeated:
        value = state.pop(key)
        once = "emb." + key.split(".norm1.emb.")[1]
        if not torch.equal(state.setdefault(once, value), value):
            raise ValueError(f"{key} is not that of the other blocks: each has its own embedding")


def drop_positions(state: dict[str, Tensor], hidden: int) -> int:
    """Drops stored positions, which have to be the sin-cos ones. -> their rows; 0: none stored."""
    rows = 0
    for key in [key for key in state if re.search(r"(^|\.)(pe|pos\w*)$", key)]:
        stored = state.pop(key).reshape(-1, hidden).float()
        rows = math.isqrt(len(stored))
        off = (stored - position_features(rows, hidden)).abs().max().item()
        if not off < 0.01 and stored.any():  # bfloat16 rounds by 0.004; some store zeros
            raise ValueError(f"its positions {key} differ from the sin-cos ones by {off:.2g}")
    return rows


def cut_head(state: dict[str, Tensor], pixels: int, channels: int, head: str | None) -> int:
    """Drops output rows that no velocity needs. -> velocities per sample: 1, or N of a dx head.

    Rows are (pixels, channels) of a velocity, (pixels, N, channels) of a dx head, (pixels, 2
    channels) with a variance half, (pixels, channels + 1) with a log standard deviation.
    """
    unit = pixels * channels
    rows = len(state["final_layer.linear.weight"])
    if head == "dx" or rows not in (2 * unit, pixels * (channels + 1)):
        return rows // unit
    if rows == 2 * unit and head is None:
        raise ValueError(
            f"its head has {rows} rows: a velocity with a variance half, or dx with N = 2; "
            "python -m imagenet.checkpoints FILE OUT --head states which"
        )
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[key] = state[key].unflatten(0, (pixels, -1))[:, :channels].flatten(0, 1)
    warnings.warn(f"its head is read as a velocity: {unit} of {rows} rows", stacklevel=4)
    return 1
