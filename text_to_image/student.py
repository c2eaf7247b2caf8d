"""One base transformer as teacher and as student, and the student's adapter.

The base is frozen; the student is the base with a LoRA, an output norm and a policy head. Teacher:
the base as it was loaded.
"""

import contextlib
import copy
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from common.heads import repeat_head
from common.teachers import guided_velocity
from common.train import read_checkpoint
from text_to_image.adapters import LORA_NAME, Adapter, GMHead, PolicySpec, Sampling
from text_to_image.families import (
    PATCH,
    Conditions,
    Family,
    import_diffusers,
    require_package,
    unpack,
)  # fmt: skip

INITIAL_STD = 0.05  # of a component, and of the noise that tells components apart


# ---- One base, two roles -------------------------------------------------------------------------


class Switch(nn.Module):
    """A frozen layer of the base and its trained counterpart; `trained` says which one runs."""

    def __init__(self, frozen: nn.Module, student: nn.Module):
        super().__init__()
        self.frozen, self.student, self.trained = frozen, student, True

    def forward(self, *inputs: Tensor) -> Any:
        return (self.student if self.trained else self.frozen)(*inputs)


class TwoRoles:
    """A base transformer as student (the default) and, inside `with roles.teacher():`, as itself.

    The student has LoRA, an output norm and a policy head of its own (float32); nothing else of
    `transformer`, which is changed in place, has a gradient. If the base is in bfloat16, what is
    trained runs under autocast. components: K, N or the number of orders.
    """

    def __init__(
        self, transformer: nn.Module, family: Family, spec: PolicySpec, components: int = 8,
        lora_rank: int = 256, lora_dropout: float = 0.05, logstd_width: int = 1024,
    ):  # fmt: skip
        require_package("peft", "distillation")
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.net, self.family, self.spec, self.dtype = transformer, family, spec, transformer.dtype
        transformer.requires_grad_(False)
        last = str(transformer.config.num_layers - 1)
        pattern = re.compile(family.lora_targets.replace("{last}", last))
        targets = [name for name, _ in transformer.named_modules() if pattern.fullmatch(name)]
        lora = LoraConfig(
            r=lora_rank, lora_alpha=lora_rank, target_modules=targets, lora_dropout=lora_dropout,
            init_lora_weights="gaussian",  # A: standard deviation 1/rank; B: 0
        )  # fmt: skip
        transformer.add_adapter(lora, LORA_NAME)
        norm = copy.deepcopy(transformer.norm_out)
        head = policy_head(transformer.proj_out, spec, components, logstd_width)
        if spec.kind == "GMFlow":
            head.watch(norm)
        self.switches = Switch(transformer.norm_out, norm), Switch(transformer.proj_out, head)
        transformer.norm_out, transformer.proj_out = self.switches
        self.lora = [m for m in transformer.modules() if isinstance(m, BaseTunerLayer)]
        for module in (norm, head):
            module.requires_grad_(True)
        for parameter in self.trained().values():
            parameter.data = parameter.data.float()
        if self.dtype == torch.bfloat16:
            for module in (*self.lora, norm, head):
                _autocast(module)

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name; `shard` replaces these parameters."""
        return {k: p for k, p in self.net.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def teacher(self) -> Iterator[nn.Module]:
        """The base as it was loaded, for the block."""
        self._set_role(False)
        try:
            yield self.net
        finally:
            self._set_role(True)

    def _set_role(self, student: bool) -> None:
        for switch in self.switches:
            switch.trained = student
        for layer in self.lora:  # peft's own enable_adapters would also change requires_grad
            layer._disable_adapters = not student

    def shard(self) -> None:
        """Splits frozen and trained parameters over all processes, block by block, in place."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        # LoRA travels in the base's dtype, its gradients as float32
        precision = MixedPrecisionPolicy(self.dtype, torch.float32, cast_forward_inputs=False)
        for blocks in ("transformer_blocks", "single_transformer_blocks"):
            for block in getattr(self.net, blocks, ()):
                fully_shard(block, mp_policy=precision)
        fully_shard(self.net, mp_policy=precision)


def _autocast(module: nn.Module) -> None:
    """Makes a module run under bfloat16 autocast."""
    forward = module.forward

    def under_autocast(*inputs: Any, **options: Any) -> Any:
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            return forward(*inputs, **options)

    module.forward = under_autocast


@torch.no_grad()
def policy_head(proj_out: nn.Linear, spec: PolicySpec, copies: int, logstd_width: int) -> nn.Module:
    """The base's velocity, for every component or grid point; polynomial orders above 0 are zero.

    GMFlow: noise on the bias tells the components apart; equal weights, one standard deviation.
    """
    width, rows = proj_out.in_features, proj_out.out_features
    spread = INITIAL_STD if spec.kind == "GMFlow" else 0.0
    weight, bias = repeat_head(
        proj_out.weight.float(), proj_out.bias, copies, rows // PATCH**2, spread, inner=PATCH**2
    )
    if spec.options.get("mode") == "polynomial":
        weight[rows:] = 0
        bias[rows:] = 0
    if spec.kind == "DX":
        head = layer = nn.Linear(width, copies * rows, proj_out.bias is not None).to(weight.device)
    else:
        head = GMHead(width, rows, copies, logstd_width).to(weight.device)
        layer, (hidden, last) = head.means, (head.logstds[1], head.logstds[3])
        nn.init.xavier_uniform_(hidden.weight)
        for parameter in (*head.logweights.parameters(), hidden.bias, last.weight):
            nn.init.zeros_(parameter)
        nn.init.constant_(last.bias, math.log(INITIAL_STD))
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(bias)
    return head


def make_student(roles: TwoRoles, conditions: Conditions, guidance: float) -> Callable:
    """The callable (x (B, C, H, W), t (B,)) -> policy. guidance: embedded, in FLUX."""

    def student(x: Tensor, t: Tensor):
        output = roles.family.evaluate(roles.net, x, t, conditions, guidance)
        return roles.spec.build(output, x, t)

    return student


def make_teacher(
    roles: TwoRoles, conditions: Conditions, negative: Conditions | None, guidance: float
) -> Callable:
    """The callable (x (B, C, H, W), t (B,)) -> u: guidance embedded, or by one call of 2 B rows.

    negative: of one row, for a family that does not embed its guidance.
    """
    family, copies = roles.family, 1
    if not family.embeds_guidance:
        unguided = Conditions(negative.embeds.expand(len(conditions.embeds), -1, -1))
        conditions, copies = Conditions.stack([conditions, unguided]), 2

    @torch.no_grad()
    def teacher(x: Tensor, t: Tensor) -> Tensor:
        inputs = x.repeat(copies, 1, 1, 1), t.repeat(copies)
        with roles.teacher() as net:
            tokens = family.evaluate(net, *inputs, conditions, guidance)
        u = unpack(tokens, x).float()
        return u if family.embeds_guidance else guided_velocity(*u.chunk(2), guidance, t)

    return teacher


# ---- Its adapter ---------------------------------------------------------------------------------


def adapter_of(roles: TwoRoles, weights: dict[str, Tensor], sampling: Sampling) -> Adapter:
    """The adapter in the published layout. weights: whole, by the names of `roles.trained()`."""
    config = {key: value for key, value in roles.net.config.items() if key[0] != "_"}
    config["_diffusers_version"] = import_diffusers().__version__
    config["_class_name"] = roles.family.transformer
    tensors = {
        adapter_key(name, roles.spec): value.to("cpu", roles.dtype).contiguous()
        for name, value in weights.items()
    }
    if roles.spec.kind == "GMFlow":
        config["_class_name"] = "GM" + roles.family.transformer
        config["num_gaussians"] = len(tensors["proj_out_logweights.weight"]) // PATCH**2
        config["logstd_inner_dim"] = len(tensors["proj_out_logstds.1.weight"])
        config |= {"gm_num_logstd_layers": 2, "logweights_channels": 4, "constant_logstd": None}
    else:
        config |= {"out_channels": len(tensors["proj_out.weight"]), "patch_size": 1}
    policy = {"type": roles.spec.kind, **roles.spec.options}
    return Adapter("", config, tensors, policy, sampling)


def adapter_key(name: str, spec: PolicySpec) -> str:
    """The name of a trained parameter in the published layout."""
    head = "proj_out_" if spec.kind == "GMFlow" else "proj_out."
    name = name.replace(f".{LORA_NAME}.", ".").replace("norm_out.student.", "norm_out.")
    return name.replace("proj_out.student.", head)


def read_trained(path: str, roles: TwoRoles, about: dict) -> dict[str, Tensor]:
    """What is trained, by the names of `roles.trained()`, from a checkpoint: the moving average.

    path: checkpoints/step_*.pt of a run, or a public .pth, which holds student and average under
        the names of the published layout behind a prefix (diffusion_ema.denoising. and others).
    Raises: ValueError that names what is missing or does not belong to this student.
    """
    state, trained = read_checkpoint(path), roles.trained()
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not the dict of a checkpoint")
    if state.get("export", about) != about:
        raise ValueError(f"{path} is of a run with {state['export']}, the flags say {about}")
    found = state.get("ema")
    if found is None:
        state = state.get("state_dict", state)
        averaged = {k: v for k, v in state.items() if k.split(".")[0].endswith("_ema")}
        known = {"." + adapter_key(name, roles.spec): name for name in trained}
        found = {}
        for key, value in (averaged or state).items():
            end = "." + key.replace(".default.", ".")
            found[next((known[name] for name in known if end.endswith(name)), key)] = value
    if differ := sorted(trained.keys() ^ found.keys()):
        raise ValueError(f"{path}: {len(differ)} tensors are missing or unknown: {differ[:4]}")
    return found
