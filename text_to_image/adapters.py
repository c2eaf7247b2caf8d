"""pi-Flow adapters: what turns a base transformer of diffusers into a few-step student.

An adapter is a LoRA, an output norm and an output head. With that head, one network evaluation
gives not a velocity but a policy: a Gaussian mixture per latent pixel (GMFlow), or velocities on a
grid of time (DX). The published files say which, and so do their names (gm..., dx...).

    adapter = read_adapter("folder, or user/repository/folder on the Hub")
    spec = policy_of(adapter)
    apply_adapter(pipe.transformer, adapter)       # checks everything first
    policy = spec.build(evaluate(pipe, family, x, t, conditions), x, t)

Style LoRAs of the base model go beside the adapter's own (`read_style`). Adapters and LoRAs are
data: safetensors and JSON; a file that could hold a program is not opened.
"""

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common import files
from piflow_minimal import DXPolicy, GaussianMixture, GMFlowPolicy
from text_to_image.families import PATCH, naming, require_package, unpack

LORA_NAME = "piflow"
REPLACED = ("transformer.norm_out", "transformer.proj_out")  # by an adapter
MODES = ("grid", "polynomial")
RANGES = {"segment_size": 1.0, "shift": 1000.0}  # of a DX policy: above 0, at most this
WEIGHTS = "diffusion_pytorch_model.safetensors"


# ---- From network output to policy ---------------------------------------------------------------


class GMHead(nn.Module):
    """The output head of a GMFlow student, in place of the transformer's `proj_out`.

    Means and log weights come from the image tokens; one log standard deviation per sample comes
    from the embedding of time and guidance, which `watch` picks up on its way into `norm_out`. No
    gradient goes back into that embedding.
    """

    def __init__(self, width: int, channels: int, components: int, inner: int, layers: int = 2):
        super().__init__()
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

    def settings(self) -> dict:
        """As the published files state them."""
        if self.kind == "GMFlow":
            return {"type": "GMFlow"}
        if self.mode == "polynomial":
            return {"type": "DX", "mode": "polynomial", "shift": self.shift}
        return {"type": "DX", "segment_size": self.segment_size, "shift": self.shift}


# ---- Adapters ------------------------------------------------------------------------------------


class Sampling(NamedTuple):
    """What sampling needs beside the weights: "_sampling" in the config.json that a run writes."""

    family: str
    nfe: int
    guidance: float | None  # embedded
    shift: float
    final_step_size_scale: float
    total_substeps: int
    solver: str


class Adapter(NamedTuple):
    """What an adapter's folder holds."""

    name: str
    config: dict
    tensors: dict[str, Tensor]
    policy: dict | None = None  # from the metadata of the tensor file
    sampling: Sampling | None = None

    @property
    def is_gm(self) -> bool:
        return "num_gaussians" in self.config


def read_adapter(where: str) -> Adapter:
    """Reads an adapter from a folder, or from the Hub: "user/repository[/folder]".

    Raises: OSError if it cannot be read, ValueError if its metadata are not understood.
    """
    from safetensors import safe_open

    what = f"adapter {where}"
    config_file, weights = (_find(where, name, what) for name in ("config.json", WEIGHTS))
    config = _json_object(config_file.read_bytes(), f"{what}: config.json")
    with naming(f"{what}: {WEIGHTS} is damaged"), safe_open(weights, "pt") as file:
        tensors = {k.removeprefix("transformer."): file.get_tensor(k) for k in file.keys()}
        text = (file.metadata() or {}).get("policy_config")
    policy = None if text is None else _json_object(text.encode(), f"{what}: policy_config")
    sampling = config.pop("_sampling", None)
    if sampling is not None:
        with naming(f"{what}: _sampling in its config.json"):
            sampling = Sampling(**sampling)
    return Adapter(where, config, tensors, policy, sampling)


def write_adapter(folder: str, adapter: Adapter) -> None:
    """Writes config.json and the tensors in the published layout, the weights last."""
    from safetensors.torch import save_file

    config = adapter.config
    if adapter.sampling is not None:
        config = config | {"_sampling": adapter.sampling._asdict()}  # diffusers skips such a name
    files.write_json(files.join(folder, "config.json"), config)
    with files.writing(files.join(folder, WEIGHTS)) as temporary:
        save_file(adapter.tensors, temporary, {"policy_config": json.dumps(adapter.policy)})


def _find(where: str, file: str, what: str) -> Path:
    """A file of a folder, or of a folder on the Hub. Raises: OSError or ValueError."""
    if Path(where).exists():
        if not (Path(where) / file).is_file():
            raise OSError(f"{what}: there is no {file}")
        return Path(where) / file
    require_package("huggingface_hub", "downloading an adapter")
    from huggingface_hub import hf_hub_download

    repository, folder = _on_hub(where, what)
    with naming(what):
        return Path(hf_hub_download(repository, file, subfolder=folder))


def _on_hub(where: str, what: str) -> tuple[str, str | None]:
    """ "user/repository[/folder]" -> repository, folder. Raises: OSError for another form."""
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/(.+))?", where)
    if not match:
        raise OSError(f"{what} is no folder here, and not on the Hub (user/repository[/folder])")
    return match[1], match[2]


def _json_object(text: bytes, what: str) -> dict:
    with naming(f"{what} is not a JSON object"):
        return dict(json.loads(text.decode("utf-8-sig")))


def policy_of(
    adapter: Adapter, override: dict | None = None, known: dict | None = None
) -> PolicySpec:
    """The policy of an adapter: `override` before its own metadata, before what is `known` of it.

    Raises: ValueError for unknown or missing settings, or a type that its head does not have.
    """
    kind = "GMFlow" if adapter.is_gm else "DX"
    settings = {"type": kind, **(known or {}), **(adapter.policy or {}), **(override or {})}
    name = f"adapter {adapter.name}"
    if settings.pop("type") != kind:
        raise ValueError(f"{name}: its head is of type {kind!r}, its policy is not")
    needed = []
    if kind == "DX":
        needed = ["shift"] if settings.get("mode") == "polynomial" else ["segment_size", "shift"]
    if missing := [key for key in needed if key not in settings]:
        raise ValueError(
            f"{name} is a DX adapter, and its file does not say its {missing}: give them as "
            '--policy \'{"segment_size": 0.2857, "shift": 3.2}\''
        )
    allowed = ["segment_size", "shift", "mode"] if kind == "DX" else []
    fits = settings.keys() <= set(allowed) and settings.get("mode", "grid") in MODES
    for key, high in RANGES.items():
        value = settings.get(key, 1.0)
        fits = fits and isinstance(value, int | float) and 0 < value <= high
    if not fits:
        accepted = "segment_size in (0, 1], shift in (0, 1000], mode grid or polynomial"
        raise ValueError(f"policy {settings}: {kind} has {accepted if allowed else 'no settings'}")
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
        own = list(base[key]) if isinstance(base[key], tuple) else base[key]
        if value != own:
            raise ValueError(f"{name} is for a base with {key} {value}, this one has {base[key]}")

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
        "not finite": sorted(k for k, v in adapter.tensors.items() if not v.isfinite().all()),
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
    """The head that an adapter's config describes. Raises: ValueError if it describes none."""
    width, channels = transformer.norm_out.linear.in_features, transformer.config["in_channels"]
    config = adapter.config
    with naming(f"adapter {adapter.name}: config.json"):
        if adapter.is_gm:
            inner = config.get("logstd_inner_dim", 1024)
            layers = config.get("gm_num_logstd_layers", 2)
            return GMHead(width, channels, config["num_gaussians"], inner, layers)
        if config["out_channels"] % channels:
            given = f"out_channels {config['out_channels']}"
            raise ValueError(f"{given}, not a multiple of the base's {channels} channels")
        return nn.Linear(width, config["out_channels"], bias="proj_out.bias" in adapter.tensors)


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


# ---- Style LoRAs ---------------------------------------------------------------------------------


def read_style(pipeline: type, modules: dict[str, nn.Module], where: str) -> dict[str, Any]:
    """Finds a style LoRA and compares it with the base. -> what `load_lora_weights` takes.

    diffusers reads its own names and those of kohya, ComfyUI, DiffSynth and Black Forest Labs, from
    safetensors alone.

    Args: pipeline: class of the base pipeline; modules: its transformer and text encoders, which
        may be on the meta device; where: a file, a folder with one, or on the Hub
        "user/repository[/folder/file.safetensors]".
    Raises: OSError or ValueError if it cannot be read, fits no layer, or a layer of another size.
    Warns: once, if layers are not used, because the base has none or the adapter replaces them.
    """
    what, place, folder, name = f"LoRA {where}", where, None, None
    if not Path(where).exists():
        place, folder = _on_hub(where, f"{what}: it")
        name = "pytorch_lora_weights.safetensors"
        if folder is not None and folder.endswith(".safetensors"):
            folder, _, name = folder.rpartition("/")
    elif Path(where).is_dir():
        count = len(list(Path(where).glob("*.safetensors")))
        if count > 1:
            raise ValueError(f"{what}: the folder has {count} .safetensors files; name one")
    source = {"pretrained_model_name_or_path_or_dict": place, "use_safetensors": True}
    source |= {"subfolder": folder or None, "weight_name": name}
    layers = {
        f"{part}.{name.removeprefix('text_model.')}": getattr(layer, "base_layer", layer)
        for part in pipeline._lora_loadable_modules
        for name, layer in modules[part].named_modules()
    }
    with naming(what):
        tensors = pipeline.lora_state_dict(**source)
    halves: dict[str, set] = {}  # layer -> names of its tensors
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            continue
        if "lora" not in key:
            raise ValueError(f"{what}: {key} is no part of a LoRA that diffusers reads")
        key = re.sub(r"\.to_(q|k|v|out)_lora\.", r".\1_proj.lora_", key)  # of kohya's text encoders
        name, _, half = key.removesuffix(".weight").rpartition(".lora_")
        name = name.replace("text_encoder.text_model.", "text_encoder.")  # as of transformers 5
        halves.setdefault(name or key, set()).add(half)
        if not tensor.isfinite().all():
            raise ValueError(f"{what}: {key} is not finite")
        layer = layers.get(name)
        if half in ("A", "B") and isinstance(layer, nn.Linear):
            given = tensor.shape[1] if half == "A" else tensor.shape[0]
            own = layer.in_features if half == "A" else layer.out_features
            if given != own:
                raise ValueError(f"{what}: {name} has a side of {given}, in this base it has {own}")
    if single := sorted(name for name in halves if halves[name] in ({"A"}, {"B"})):
        raise ValueError(f"{what}: lora_A or lora_B is missing in {_first(single, 4)}")
    other = sorted(halves.keys() - layers.keys())
    replaced = sorted(name for name in halves.keys() & layers.keys() if name.startswith(REPLACED))
    used = len(halves) - len(other) - len(replaced)
    parts = {"not in this base": other, "replaced by the adapter": replaced}
    notes = "; ".join(f"{kind}: {_first(names, 4)}" for kind, names in parts.items() if names)
    if not used:
        raise ValueError(f"{what}: none of its {len(halves)} layers is used; {notes}")
    if notes:
        counts = f"{used} of {len(halves)} layers are used"
        warnings.warn(f"{what}: {counts}; {notes}", stacklevel=3)
    return source
