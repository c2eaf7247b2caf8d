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
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common import files
from piflow_minimal import DXPolicy, GaussianMixture, GMFlowPolicy
from text_to_image.families import PATCH, naming, unpack

LORA_NAME = "piflow"
REPLACED = ("transformer.norm_out", "transformer.proj_out")  # by an adapter
WEIGHTS = "diffusion_pytorch_model.safetensors"


# ---- From network output to policy ---------------------------------------------------------------


class GMHead(nn.Module):
    """The output head of a GMFlow student, in place of the transformer's `proj_out`.

    One log standard deviation per sample comes from the embedding of time and guidance, which
    `watch` picks up on its way into `norm_out`. No gradient goes back into it.
    """

    def __init__(self, width: int, channels: int, components: int, inner: int):
        super().__init__()
        self.means = nn.Linear(width, components * channels)
        self.logweights = nn.Linear(width, components * PATCH**2)
        self.logstds = nn.Sequential(
            nn.SiLU(), nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, 1)
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


class PolicySpec(NamedTuple):
    """Which policy an adapter's head describes; a DX grid keeps the segment it was trained for."""

    kind: str  # "GMFlow" or "DX"
    options: dict = {}  # of DXPolicy: segment_size and shift, or shift and mode "polynomial"

    def build(self, output: Any, x: Tensor, t: Tensor) -> GMFlowPolicy | DXPolicy:
        """Head output at x (B, C, H, W), t (B,) -> policy."""
        parts = (-1, x.shape[1])  # K components or N grid points
        if self.kind == "DX":
            velocities = unpack(output, x).unflatten(1, parts)  #      (B, N, C, H, W)
            return DXPolicy(velocities, x, t, **self.options)
        means, logweights, logstds = output
        mixture = GaussianMixture(
            means=unpack(means, x).unflatten(1, parts),  #             (B, K, C, H, W)
            logstds=logstds.view(-1, 1, 1, 1, 1),
            logweights=unpack(logweights, x).float().log_softmax(1).unsqueeze(2),
        )  #                                                   logweights (B, K, 1, H, W)
        return GMFlowPolicy(mixture, x, t)


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

    Raises: OSError or ValueError that names the file.
    """
    from safetensors import safe_open

    path = _find(where, "config.json")
    with naming(f"{path}"):
        config = dict(json.loads(path.read_bytes()))
        sampling = config.pop("_sampling", None)
        sampling = sampling and Sampling(**sampling)
    path = _find(where, WEIGHTS)
    with naming(f"{path}"), safe_open(path, "pt") as file:
        tensors = {k.removeprefix("transformer."): file.get_tensor(k) for k in file.keys()}
        policy = (file.metadata() or {}).get("policy_config")
        policy = policy and dict(json.loads(policy))
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


def _find(where: str, file: str) -> Path:
    """A file of a folder, or of a folder on the Hub."""
    if Path(where).exists():
        return Path(where) / file
    from huggingface_hub import hf_hub_download

    repository, folder = _on_hub(where)
    with naming(f"adapter {where}"):
        return Path(hf_hub_download(repository, file, subfolder=folder))


def _on_hub(where: str) -> tuple[str, str | None]:
    """ "user/repository[/folder]" -> repository, folder. Raises: OSError for another form."""
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/(.+))?", where)
    if not match:
        raise OSError(f"{where} is neither here nor of the form user/repository[/folder] (Hub)")
    return match[1], match[2]


def policy_of(
    adapter: Adapter, override: dict | None = None, known: dict | None = None
) -> PolicySpec:
    """The policy of an adapter: `override` before its own metadata, before what is `known` of it.

    Raises: ValueError for settings that its head does not have, or that are missing.
    """
    kind = "GMFlow" if adapter.is_gm else "DX"
    policy = {"type": kind, **(known or {}), **(adapter.policy or {}), **(override or {})}
    options = {key: value for key, value in policy.items() if key != "type"}
    required, allowed = set(), set()
    if kind == "DX":
        required = {"shift"} if options.get("mode") == "polynomial" else {"segment_size", "shift"}
        allowed = {"segment_size", "shift", "mode"}
    with naming(f"adapter {adapter.name}: policy {policy}"):
        if policy["type"] != kind or not required <= options.keys() <= allowed:
            example = 'settings as in --policy \'{"segment_size": 0.2857, "shift": 3.2}\''
            raise ValueError(f"its {kind} head needs {example if allowed else 'no settings'}")
        in_range = 0 < options.get("segment_size", 1) <= 1 and 0 < options.get("shift", 1) <= 1000
        if options.get("mode", "grid") not in ("grid", "polynomial") or not in_range:
            raise ValueError(
                "segment_size must be in (0, 1], shift in (0, 1000], mode grid or polynomial"
            )
    return PolicySpec(kind, options)


def check_adapter(transformer: nn.Module, adapter: Adapter) -> None:
    """Whether an adapter fits a base transformer, which may be on the meta device.

    Raises: ValueError that names the setting or the tensors that differ.
    """
    name, made_for = f"adapter {adapter.name}", adapter.config.get("_class_name", "")
    own = {"class": type(transformer).__name__, **transformer.config}
    for key, value in {"class": re.sub("^(GM|DX)", "", made_for), **adapter.config}.items():
        # the exporters write these two of the head, not of the base
        if key in own and key[0] != "_" and key not in ("patch_size", "out_channels"):
            here = list(own[key]) if isinstance(own[key], tuple) else own[key]
            if value != here:
                raise ValueError(f"{name} is for a base with {key} {value}, this one has {here}")
    needed = expected_shapes(transformer, adapter)
    given = {key: tuple(tensor.shape) for key, tensor in adapter.tensors.items()}
    wrong = [
        f"{key} is {given.get(key, 'missing')}, needed is {needed.get(key, 'nothing')}"
        for key in sorted(given | needed)
        if given.get(key) != needed.get(key)
    ]
    if wrong:
        raise ValueError(f"{name}: {len(wrong)} tensors do not fit: {'; '.join(wrong[:8])}")


def expected_shapes(transformer: nn.Module, adapter: Adapter) -> dict[str, tuple]:
    """Names and shapes of the tensors that an adapter for this transformer must have.

    Which layers have a LoRA or are overwritten is the adapter's choice, except that a LoRA has two
    halves, and that output norm and head must be there.
    """
    modules, parameters, expected = dict(transformer.named_modules()), _parameters(transformer), {}
    for key, tensor in adapter.tensors.items():
        if key in parameters:
            expected[key] = tuple(parameters[key].shape)
        layer = modules.get(key.removesuffix(".lora_A.weight"))
        if hasattr(layer, "in_features"):
            expected[key] = (len(tensor), layer.in_features)
            expected[key.replace("lora_A", "lora_B")] = (layer.out_features, len(tensor))
    for prefix, part in _new_parts(transformer, adapter).items():
        expected |= {prefix + key: tuple(p.shape) for key, p in part.state_dict().items()}
    return expected


def _parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """What an adapter may overwrite, by the names that it has where no LoRA is loaded."""
    parameters = {k.replace(".base_layer.", "."): p for k, p in transformer.named_parameters()}
    return {k: p for k, p in parameters.items() if not k.startswith(("norm_out.", "proj_out."))}


def _new_parts(transformer: nn.Module, adapter: Adapter) -> dict[str, nn.Module]:
    """The layer of the output norm and the head, on the meta device, by prefixes of their names."""
    old, config = transformer.norm_out.linear, adapter.config
    width, channels = old.in_features, transformer.config["in_channels"]
    with naming(f"adapter {adapter.name}: config.json"), torch.device("meta"):
        norm = nn.Linear(width, old.out_features, old.bias is not None)
        if adapter.is_gm:
            inner = config.get("logstd_inner_dim", 1024)
            head = GMHead(width, channels, config["num_gaussians"], inner)
        else:
            head = nn.Linear(width, config["out_channels"], "proj_out.bias" in adapter.tensors)
    return {"norm_out.linear.": norm, "proj_out_" if adapter.is_gm else "proj_out.": head}


def apply_adapter(transformer: nn.Module, adapter: Adapter, scale: float = 1.0) -> None:
    """Puts an adapter on a base transformer, in place.

    Output norm and head are replaced, so that the base may be quantised. The LoRA, of strength
    `scale`, stays beside the weights: in bfloat16 fusing would round small updates away.

    Raises: ValueError as `check_adapter`, before anything is changed.
    """
    check_adapter(transformer, adapter)
    place = {"device": transformer.norm_out.linear.weight.device, "dtype": transformer.dtype}
    tensors = {key: value.to(**place) for key, value in sorted(adapter.tensors.items())}
    for key, parameter in _parameters(transformer).items():
        if key in tensors:
            parameter.data.copy_(tensors[key])
    lora = {key: value for key, value in tensors.items() if ".lora_" in key}
    if lora:
        transformer.load_lora_adapter(lora, prefix=None, adapter_name=LORA_NAME)
        transformer.set_adapters([LORA_NAME], [scale])
    parts = _new_parts(transformer, adapter)
    for prefix, part in parts.items():
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        part.load_state_dict(own, assign=True)
    transformer.norm_out.linear, transformer.proj_out = parts.values()
    if adapter.is_gm:
        transformer.proj_out.watch(transformer.norm_out)
    transformer.eval().requires_grad_(False)


# ---- Style LoRAs ---------------------------------------------------------------------------------


def read_style(pipeline: type, modules: dict[str, nn.Module], where: str) -> dict[str, Any]:
    """Finds a style LoRA and compares it with the base. -> what `load_lora_weights` takes.

    Args: pipeline: class of the base pipeline; modules: its transformer and text encoders, which
        may be on the meta device; where: a file, a folder with one, or on the Hub
        "user/repository[/folder/file.safetensors]".
    Raises: OSError or ValueError if it cannot be read, if no layer of the base uses it, or if a
        layer has another size or one half.
    Warns: once, if layers are not used.
    """
    place, folder, name = where, None, None
    if not Path(where).exists():
        place, folder = _on_hub(where)
        name = "pytorch_lora_weights.safetensors"
        if folder is not None and folder.endswith(".safetensors"):
            folder, _, name = folder.rpartition("/")
    elif len(list(Path(where).glob("*.safetensors"))) > 1:
        raise ValueError(f"LoRA {where}: it has several .safetensors files; name one")
    source = {"pretrained_model_name_or_path_or_dict": place, "use_safetensors": True}
    source |= {"subfolder": folder or None, "weight_name": name}
    with naming(f"LoRA {where}"):
        tensors = pipeline.lora_state_dict(**source)
    layers = {
        f"{part}.{layer.removeprefix('text_model.')}": module
        for part in pipeline._lora_loadable_modules
        if part in modules
        for layer, module in modules[part].named_modules()
    }
    halves = defaultdict(dict)  # layer -> {"A": (rank, in), "B": (out, rank)}
    for key, tensor in tensors.items():
        if not key.endswith(".alpha"):
            half = key.removesuffix(".weight").rpartition(".lora_")[2]
            halves[_layer_of(key)][half] = tuple(tensor.shape)
    unused = sorted(name for name in halves if name not in layers or name.startswith(REPLACED))
    for name in halves.keys() - set(unused):
        layer = getattr(layers[name], "base_layer", layers[name])
        if isinstance(layer, nn.Linear) and halves[name].keys() & {"A", "B"}:
            rank = halves[name].get("A", (1,))[0]
            needed = {"A": (rank, layer.in_features), "B": (layer.out_features, rank)}
            given = {half: halves[name].get(half) for half in needed}
            if given != needed:
                raise ValueError(f"LoRA {where}: {name} has {given}, needed is {needed}")
    used = len(halves) - len(unused)
    parts = {
        "not in this base": [name for name in unused if name not in layers],
        "replaced by the adapter": [name for name in unused if name in layers],
    }
    found = [f"{why}: {', '.join(names[:4])}" for why, names in parts.items() if names]
    note = "; ".join([f"LoRA {where}: {used} of {len(halves)} layers are used", *found])
    if used == 0:
        raise ValueError(note)
    if unused:
        warnings.warn(note, stacklevel=3)
    return source


def _layer_of(key: str) -> str:
    """The layer of a tensor of a LoRA, in the names of diffusers."""
    key = re.sub(r"\.to_(q|k|v|out)_lora\.", r".\1_proj.lora_", key)  # of kohya's text encoders
    return key.partition(".lora_")[0].replace("text_encoder.text_model.", "text_encoder.")
