"""One base transformer as teacher and as student, and the student's adapter as a file.

roles = TwoRoles(pipe.transformer, settings)       # frozen base + LoRA, output norm, policy head
student = make_student(roles, conditions)          # (x, t) -> policy
teacher = make_teacher(roles, conditions, None)    # (x, t) -> u, of the base as it was loaded
export_adapter(folder, roles, weights)             # the published layout, for generate --adapter
"""

import contextlib
import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import imagenet.distributed as runs
import text_to_image.families as dm
from common.teachers import guided_velocity
from text_to_image.adapters import LORA_NAME, GMHead

if TYPE_CHECKING:
    from text_to_image.distill import Settings

LORA_TARGETS = {  # of the published adapters, as regular expressions
    "qwen": r"transformer_blocks\.\d+\.img_mlp\.net\.(0\.proj|2)|"
    r"transformer_blocks\.(?!{last}\.)\d+\.txt_mlp\.net\.(0\.proj|2)|"
    r"time_text_embed\.timestep_embedder\.linear_[12]",
    "flux": r"single_transformer_blocks\.\d+\.(proj_mlp|proj_out)|"
    r"transformer_blocks\.\d+\.(ff|ff_context)\.net\.(0\.proj|2)|"
    r"time_text_embed\.timestep_embedder\.linear_[12]",
    "flux2": r"single_transformer_blocks\.\d+\.attn\.to_out|"
    r"transformer_blocks\.\d+\.(ff|ff_context)\.linear_(in|out)|"
    r"time_guidance_embed\.timestep_embedder\.linear_[12]",
}


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
    `transformer`, which is changed in place, has a gradient.
    Raises: ValueError if the transformer is of another family, or the rank larger than a layer.
    """

    def __init__(self, transformer: nn.Module, settings: "Settings"):
        dm.require_package("peft", "distillation")
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.net, self.settings, config = transformer, settings, transformer.config
        self.kind, self.dtype = type(transformer).__name__, transformer.dtype  # of the base alone
        family = dm.FAMILIES[settings.family]
        if self.kind != family.transformer:
            raise ValueError(
                f"--family {family.name} needs a {family.transformer}, the base has a {self.kind}"
            )
        transformer.requires_grad_(False)
        pattern = LORA_TARGETS[settings.family].replace("{last}", str(config.num_layers - 1))
        targets = {k: m for k, m in transformer.named_modules() if re.fullmatch(pattern, k)}
        for name, layer in targets.items():
            if settings.lora_rank > min(layer.in_features, layer.out_features):
                sides = f"{layer.in_features} x {layer.out_features}"
                raise ValueError(f"--lora-rank {settings.lora_rank}: layer {name} is {sides}")
        lora = LoraConfig(
            r=settings.lora_rank, lora_alpha=settings.lora_rank, target_modules=list(targets),
            lora_dropout=settings.lora_dropout,
        )  # fmt: skip
        transformer.add_adapter(lora, LORA_NAME)
        norm, head = copy.deepcopy(transformer.norm_out), self._head(transformer.proj_out)
        if settings.policy == "gmflow":
            head.watch(norm)
        self.switches = Switch(transformer.norm_out, norm), Switch(transformer.proj_out, head)
        transformer.norm_out, transformer.proj_out = self.switches
        self.lora = [m for m in transformer.modules() if isinstance(m, BaseTunerLayer)]
        for switch in self.switches:
            switch.student.requires_grad_(True)
        for parameter in self.trained().values():
            parameter.data = parameter.data.float()

    def _head(self, proj_out: nn.Linear) -> nn.Module:
        """The policy head that repeats the base's velocity; noise tells the components apart."""
        s, width = self.settings, proj_out.in_features
        copies, bias = s.components, proj_out.bias is not None
        if s.policy == "dx":
            head = nn.Linear(width, copies * proj_out.out_features, bias)
            layer = head
        else:
            head = GMHead(width, proj_out.out_features, copies, s.logstd_width)
            layer = head.means
            for part in (head.logweights, head.logstds[-1]):
                nn.init.zeros_(part.weight)
                nn.init.zeros_(part.bias)
            nn.init.constant_(head.logstds[-1].bias, math.log(0.05))
        with torch.no_grad():
            layer.weight.copy_(proj_out.weight.repeat(copies, 1))
            if layer.bias is not None:
                layer.bias.copy_(proj_out.bias.repeat(copies) if bias else torch.zeros(()))
            if s.policy == "gmflow":  # one draw per component and channel, shared within a patch
                noise = 0.05 * torch.randn(layer.bias.numel() // dm.PATCH**2)
                layer.bias += noise.repeat_interleave(dm.PATCH**2)
        return head

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


def make_student(roles: TwoRoles, conditions: dm.Conditions) -> Callable:
    """The callable (x (B, C, H, W), t (B,)) -> policy."""
    s, family = roles.settings, dm.FAMILIES[roles.settings.family]
    embedded = s.guidance if family.guidance is not None else None
    bf16 = roles.dtype == torch.bfloat16

    def student(x: Tensor, t: Tensor):
        inputs = dm.network_inputs(family, x, t, conditions, embedded)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            output = roles.net(**inputs, return_dict=False)[0]
        return s.spec.build(output, x, t)

    return student


def make_teacher(
    roles: TwoRoles, conditions: dm.Conditions, negative: dm.Conditions | None
) -> Callable:
    """The callable (x (B, C, H, W), t (B,)) -> u: guidance embedded, or by one call of 2 B rows."""
    s, family = roles.settings, dm.FAMILIES[roles.settings.family]
    embedded, both = s.guidance, None
    if family.guidance is None:
        unguided = dm.Conditions(negative.embeds.expand(len(conditions.embeds), -1, -1))
        embedded, both = None, dm.Conditions.stack([conditions, unguided])

    @torch.no_grad()
    def teacher(x: Tensor, t: Tensor) -> Tensor:
        given = (x, t, conditions) if both is None else (torch.cat([x, x]), torch.cat([t, t]), both)
        with roles.teacher() as net:
            inputs = dm.network_inputs(family, *given, embedded)
            u = dm.unpack(net(**inputs, return_dict=False)[0], x).float()
        return u if both is None else guided_velocity(*u.chunk(2), s.guidance, t)

    return teacher


# ---- Processes and files -------------------------------------------------------------------------


def shard(roles: TwoRoles) -> None:
    """Splits frozen and trained parameters over all processes, block by block, in place."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    precision = MixedPrecisionPolicy(cast_forward_inputs=False)
    if roles.dtype == torch.bfloat16:  # LoRA travels as bfloat16, its gradients as float32
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for blocks in ("transformer_blocks", "single_transformer_blocks"):
        for block in getattr(roles.net, blocks, ()):
            fully_shard(block, mp_policy=precision)
    fully_shard(roles.net, mp_policy=precision)


def export_adapter(folder: str, roles: TwoRoles, weights: dict[str, Tensor]) -> None:
    """Writes config.json and diffusion_pytorch_model.safetensors in the published layout.

    weights: by the names of `roles.trained()`, whole tensors.
    """
    from safetensors.torch import save_file

    s, spec, config = roles.settings, roles.settings.spec, dict(roles.net.config)
    config = {key: value for key, value in config.items() if key[0] != "_"}
    config["_diffusers_version"] = dm.import_diffusers().__version__
    if s.policy == "gmflow":
        config["_class_name"] = "GM" + roles.kind
        config |= {"num_gaussians": s.components, "logstd_inner_dim": s.logstd_width}
        config |= {"gm_num_logstd_layers": 2, "logweights_channels": 4, "constant_logstd": None}
        policy = {"type": "GMFlow"}
    else:
        config |= {"out_channels": s.components * config["in_channels"], "patch_size": 1}
        config["_class_name"] = roles.kind
        policy = {"type": "DX", "segment_size": spec.segment_size, "shift": spec.shift}
    tensors = {
        adapter_key(name, s.policy): value.to("cpu", roles.dtype).contiguous()
        for name, value in weights.items()
    }
    with runs.writing(runs.join(folder, "diffusion_pytorch_model.safetensors")) as temporary:
        save_file(tensors, temporary, {"policy_config": json.dumps(policy)})
    runs.write_text(runs.join(folder, "config.json"), json.dumps(config, indent=2) + "\n")


def adapter_key(name: str, policy: str) -> str:
    """The name of a trained parameter in the published layout."""
    name = name.replace(f".{LORA_NAME}.", ".").replace("norm_out.student.", "norm_out.")
    return name.replace("proj_out.student.", "proj_out_" if policy == "gmflow" else "proj_out.")
