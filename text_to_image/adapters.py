"""pi-Flow adapters: what turns a base transformer of diffusers into a few-step student.

An adapter is a LoRA, an output norm and an output head. With that head, one network evaluation
gives not a velocity but a policy: a Gaussian mixture per latent pixel (GMFlow), or velocities on a
grid of time (DX). The published files say which, and so do their names (gm..., dx...).

    adapter = read_adapter("folder, or user/repository/folder on the Hub")
    spec = policy_of(adapter)
    apply_adapter(pipe.transformer, adapter)       # checks everything first
    policy = spec.build(evaluate(pipe, family, x, t, conditions), x, t)
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from piflow_minimal import DXPolicy, GaussianMixture, GMFlowPolicy
from text_to_image.pipelines import PATCH, require_package, unpack

LORA_NAME = "piflow"


# ------------------------------------------------------------------------------------------------
# From network output to policy
# ------------------------------------------------------------------------------------------------


class GMHead(nn.Module):
    """The output head of a GMFlow student, in place of the transformer's `proj_out`.

    Means and log weights come from the image tokens; one log standard deviation per sample comes
    from the embedding of time and guidance, which `watch` picks up on its way into `norm_out`. No
    gradient goes back into that embedding.
    """

    def __init__(self, width: int, channels: int, components: int, inner: int, layers: int = 2):
        super().__init__()
        self.components = components
        self.means = nn.Linear(width, components * channels)
        self.logweights = nn.Linear(width, components * PATCH**2)
        widths = [width, *[inner] * (layers - 1), 1]
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.logstds = nn.Sequential(
            *(module for pair in pairs for module in (nn.SiLU(), nn.Linear(*pair)))
        )
        self.embedding = None  # (B, width)

    def watch(self, norm_out: nn.Module) -> None:
        """Keeps the embedding that every forward pass gives to `norm_out`."""

        def keep(module: nn.Module, inputs: tuple) -> None:
            self.embedding = inputs[1]

        norm_out.register_forward_pre_hook(keep)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, width) -> means (B, S, K 4C), log weights (B, S, K 4), log std (B, 1)."""
        return self.means(hidden), self.logweights(hidden), self.logstds(self.embedding.detach())


@dataclass(frozen=True)
class PolicySpec:
    """Which policy an adapter's head describes; a DX grid keeps the segment it was trained for."""

    kind: str  # "GMFlow" or "DX"
    segment_size: float = 1.0
    shift: float = 1.0
    mode: str = "grid"

    def build(self, output: Any, x: Tensor, t: Tensor) -> GMFlowPolicy | DXPolicy:
        """Head output at x (B, C, H, W), t (B,) -> policy."""
        parts = (-1, x.shape[1])  # K components or N grid points
        if self.kind == "DX":
            velocities = unpack(output, x).unflatten(1, parts)  #      (B, N, C, H, W)
            return DXPolicy(velocities, x, t, self.segment_size, self.shift, self.mode)
        means, logweights, logstds = output
        mixture = GaussianMixture(
            means=unpack(means, x).unflatten(1, parts),  #             (B, K, C, H, W)
            logstds=logstds.view(-1, 1, 1, 1, 1),
            logweights=unpack(logweights, x).float().log_softmax(1).unsqueeze(2),
        )  #                                                   logweights (B, K, 1, H, W)
        return GMFlowPolicy(mixture, x, t)


# ------------------------------------------------------------------------------------------------
# Adapters
# ------------------------------------------------------------------------------------------------


class Adapter(NamedTuple):
    """What an adapter's folder holds."""

    name: str
    config: dict
    tensors: dict[str, Tensor]
    policy: dict | None  # from the metadata of the tensor file

    @property
    def is_gm(self) -> bool:
        return "num_gaussians" in self.config


def read_adapter(where: str) -> Adapter:
    """Reads an adapter from a folder, or from the Hub: "user/repository[/folder]".

    Raises: OSError if it cannot be read, ValueError if its metadata are not understood.
    """
    from safetensors import SafetensorError, safe_open

    name, files = "diffusion_pytorch_model", {}
    if Path(where).is_dir():
        files = {suffix: Path(where) / suffix for suffix in ("config.json", f"{name}.safetensors")}
        for path in files.values():
            if not path.is_file():
                raise OSError(f"adapter {where}: there is no {path.name}")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)*", where):
        from huggingface_hub import hf_hub_download

        repo, folder = "/".join(where.split("/")[:2]), "/".join(where.split("/")[2:]) or None
        for file in ("config.json", f"{name}.safetensors"):
            files[file] = hf_hub_download(repo, file, subfolder=folder)
    else:
        raise OSError(f"adapter {where!r} is neither a folder nor a Hub name (user/repo[/folder])")

    config = _json_object(Path(files["config.json"]).read_text(), f"adapter {where}: config.json")
    try:
        with safe_open(files[f"{name}.safetensors"], "pt") as file:
            tensors = {k.removeprefix("transformer."): file.get_tensor(k) for k in file.keys()}
            text = (file.metadata() or {}).get("policy_config")
    except SafetensorError as error:
        raise ValueError(f"adapter {where}: {name}.safetensors is damaged ({error})") from error
    policy = None if text is None else _json_object(text, f"adapter {where}: policy_config")
    return Adapter(where, config, tensors, policy)


def _json_object(text: str, what: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not a JSON object: {text[:60]!r}")
    return value


def policy_of(
    adapter: Adapter, override: dict | None = None, known: dict | None = None
) -> PolicySpec:
    """The policy of an adapter: `override` before its own metadata, before what is `known` of it.

    Raises: ValueError for unknown or missing settings, or a type that its head does not have.
    """
    kind = "GMFlow" if adapter.is_gm else "DX"
    settings = {"type": kind, **(known or {}), **(adapter.policy or {}), **(override or {})}
    if settings.pop("type") != kind:
        raise ValueError(f"adapter {adapter.name}: its head is of type {kind!r}, its policy is not")
    if kind == "GMFlow":
        needed, allowed = set(), set()
    else:
        needed = {"shift"} if settings.get("mode") == "polynomial" else {"segment_size", "shift"}
        allowed = {"segment_size", "shift", "mode"}
    if unknown := sorted(set(settings) - allowed):
        raise ValueError(f"policy settings {unknown}: {kind} has {sorted(allowed) or 'none'}")
    if missing := sorted(needed - set(settings)):
        raise ValueError(
            f"adapter {adapter.name} is a DX adapter, and its file does not say its {missing}: "
            'give them as --policy \'{"segment_size": 0.2857, "shift": 3.2}\''
        )
    if settings.get("mode", "grid") not in ("grid", "polynomial"):
        raise ValueError(f"policy mode {settings['mode']!r}: use 'grid' or 'polynomial'")
    for key, high in (("segment_size", 1.0), ("shift", 1000.0)):
        value = settings.get(key, 1.0)
        if not isinstance(value, int | float) or not 0 < value <= high:
            raise ValueError(f"policy {key} {value!r}: must be a number in (0, {high:g}]")
    return PolicySpec(kind, **settings)


def check_adapter(transformer: nn.Module, adapter: Adapter) -> None:
    """Whether an adapter fits a base transformer, which may be on the meta device.

    Raises: ValueError that names the base it belongs to, or the settings or tensors that differ.
    """
    base, config, name = transformer.config, adapter.config, f"adapter {adapter.name}"
    made_for = re.sub("^(GM|DX)", "", config.get("_class_name", "an unknown class"))
    if made_for != type(transformer).__name__:
        raise ValueError(f"{name} is for {made_for}, the base is a {type(transformer).__name__}")
    for key, value in config.items():
        # the exporters write these three of the head, not of the base
        if key.startswith("_") or key in ("patch_size", "out_channels") or key not in base:
            continue
        as_list = [list(v) if isinstance(v, list | tuple) else v for v in (value, base[key])]
        if as_list[0] != as_list[1]:
            raise ValueError(f"{name} is for a base with {key} {value}, this one has {base[key]}")
    channels = base["in_channels"]
    if not adapter.is_gm and (config.get("out_channels") or 1) % channels:
        raise ValueError(f"{name}: out_channels must be a multiple of {channels}")

    expected = expected_shapes(transformer, adapter)
    given = {key: tuple(tensor.shape) for key, tensor in adapter.tensors.items()}
    problems = {
        "unknown": sorted(given.keys() - expected.keys()),
        "missing": sorted(expected.keys() - given.keys()),
        "of another shape": [
            f"{key} {given[key]} in place of {shape}"
            for key, shape in expected.items()
            if given.get(key, shape) != shape
        ],
    }
    if any(problems.values()):
        lists = (f"{kind}: {_first(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"{name} does not fit; tensors {'; '.join(lists)}")


def _first(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def expected_shapes(transformer: nn.Module, adapter: Adapter) -> dict[str, tuple]:
    """Names and shapes of the tensors that an adapter for this transformer must have.

    Which layers have a LoRA or are overwritten is the adapter's choice, except that a LoRA has two
    halves, and that output norm and head must be there.
    """
    modules, parameters, expected = dict(transformer.named_modules()), _parameters(transformer), {}
    for key, tensor in adapter.tensors.items():
        if key in parameters and not key.startswith("proj_out."):
            expected[key] = tuple(parameters[key].shape)
        target, _, half = key.rpartition(".lora_")
        layer = modules.get(target)
        if half in ("A.weight", "B.weight") and hasattr(layer, "in_features") and tensor.ndim == 2:
            rank = tensor.shape[0 if half == "A.weight" else 1]
            expected.setdefault(f"{target}.lora_A.weight", (rank, layer.in_features))
            expected.setdefault(f"{target}.lora_B.weight", (layer.out_features, rank))
    linear = transformer.norm_out.linear
    expected["norm_out.linear.weight"] = (linear.out_features, linear.in_features)
    if linear.bias is not None:
        expected["norm_out.linear.bias"] = (linear.out_features,)
    with torch.device("meta"):
        head = _empty_head(transformer, adapter)
    prefix = "proj_out_" if adapter.is_gm else "proj_out."
    return expected | {prefix + key: tuple(p.shape) for key, p in head.state_dict().items()}


def _parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """By the names they have where no LoRA is loaded."""
    return {k.replace(".base_layer.", "."): p for k, p in transformer.named_parameters()}


def _empty_head(transformer: nn.Module, adapter: Adapter) -> nn.Module:
    channels, width = transformer.config["in_channels"], transformer.norm_out.linear.in_features
    config = adapter.config
    if not adapter.is_gm:
        return nn.Linear(width, config["out_channels"], bias="proj_out.bias" in adapter.tensors)
    if config.get("constant_logstd") is not None or config.get("logweights_channels", 4) != 4:
        raise ValueError(
            f"adapter {adapter.name}: heads with constant_logstd, or with logweights_channels "
            "other than 4, are not supported"
        )
    layers = config.get("gm_num_logstd_layers", 2)
    return GMHead(
        width, channels, config["num_gaussians"], config.get("logstd_inner_dim", 1024), layers
    )


def apply_adapter(transformer: nn.Module, adapter: Adapter, scale: float = 1.0) -> None:
    """Puts an adapter on a base transformer, in place.

    Output norm and head are replaced, not overwritten, so that it does not matter whether the base
    is quantised. The LoRA stays beside the weights, through diffusers and peft: it cannot be fused
    into quantised weights, in bfloat16 fusing would round small updates away, and `scale` (of the
    LoRA alone) and further LoRAs can be set later.

    Raises: ValueError as `check_adapter`, before anything is changed; ImportError without peft.
    """
    require_package("peft", "an adapter's LoRA")
    check_adapter(transformer, adapter)
    old = transformer.norm_out.linear
    place = {"device": old.weight.device, "dtype": transformer.dtype}
    tensors = {key: value.to(**place) for key, value in sorted(adapter.tensors.items())}

    for key, parameter in _parameters(transformer).items():
        if key in tensors and not key.startswith(("proj_out.", "norm_out.")):
            parameter.data.copy_(tensors[key])
    lora = {key: value for key, value in tensors.items() if ".lora_" in key}
    if lora:
        transformer.load_lora_adapter(lora, prefix=None, adapter_name=LORA_NAME)
        transformer.set_adapters([LORA_NAME], [scale])
    bias = "norm_out.linear.bias" in tensors
    transformer.norm_out.linear = nn.Linear(old.in_features, old.out_features, bias).to(**place)
    transformer.proj_out = _empty_head(transformer, adapter).to(**place)
    prefix = "proj_out_" if adapter.is_gm else "proj_out."
    for path, start in (("norm_out.linear", "norm_out.linear."), ("proj_out", prefix)):
        own = {key[len(start) :]: v for key, v in tensors.items() if key.startswith(start)}
        transformer.get_submodule(path).load_state_dict(own)
    if adapter.is_gm:
        transformer.proj_out.watch(transformer.norm_out)
    transformer.eval().requires_grad_(False)
