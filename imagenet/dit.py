"""DiT, the transformer behind the ImageNet experiments: network, heads, checkpoints, guidance.

One backbone (Peebles & Xie 2023, in the form that SiT and REPA use: patch 2, adaLN-Zero, sin-cos
positions, a null class for guidance) with one of three output heads:

    head        output of net(x, t, labels)                                        used as
    velocity    u (B, C, H, W)                                                     teacher
    gmflow      GaussianMixture: means (B, K, C, H, W), logstds (B, 1, 1, 1, 1),
                logweights (B, K, 1, H, W)                                         student
    dx          velocities (B, N, C, H, W)                                         student

Time runs from t = 1 (noise) to t = 0 (data); u = eps - x_0. `load_dit` reads three checkpoint
layouts: ours, that of the published pi-Flow ImageNet networks (diffusers-style names), and that of
the SiT/REPA project. Training, sampling and the method itself are elsewhere.
"""

import argparse
import dataclasses
import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.cli import atomic
from common.teachers import guided_velocity
from piflow_minimal import DXPolicy, GaussianMixture, GMFlowPolicy

HEADS = ("velocity", "gmflow", "dx")
FREQUENCIES = 256  # width of the sinusoidal embedding of t
MAX_PERIOD = 10000.0
INITIAL_STD = 0.05  # of a new gmflow head, and of the noise that tells its components apart


# ---------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiTConfig:
    """Everything that fixes a network. Defaults are XL/2 on ImageNet 256 (latents 4 x 32 x 32)."""

    hidden: int = 1152
    depth: int = 28
    num_heads: int = 16
    patch: int = 2
    channels: int = 4
    latent_size: int = 32  # the size that it was trained at; any square size runs
    num_classes: int = 1000  # the null class has the index num_classes
    time_scale: float = 1.0  # the network is told time_scale * t
    head: str = "velocity"
    components: int = 1  # K of the gmflow head, N of the dx head
    logstd_hidden: int = 1024  # gmflow only


PRESETS = {
    "xl2": DiTConfig(),
    "tiny": DiTConfig(hidden=96, depth=6, num_heads=4, latent_size=14, num_classes=10),
}


def time_features(t: Tensor) -> Tensor:
    """(B,) -> (B, 256): cosines, then sines, of t at geometrically spaced frequencies."""
    half = FREQUENCIES // 2
    steps = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = t.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def position_features(rows: int, hidden: int, device: torch.device | None = None) -> Tensor:
    """(rows * rows, hidden): half of the features encode the column, half the row of a token."""
    quarter = hidden // 4
    steps = torch.arange(quarter, device=device, dtype=torch.float32) / quarter
    places = torch.arange(rows, device=device, dtype=torch.float32)
    angles = places[:, None] * MAX_PERIOD**-steps  #                       (rows, hidden / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  #               (rows, hidden / 2)
    column = line[None].expand(rows, -1, -1)  #                            token (i, j) -> line[j]
    row = line[:, None].expand(-1, rows, -1)  #                            token (i, j) -> line[i]
    return torch.cat([column, row], dim=2).flatten(0, 1)


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """h (B, T, hidden), scaled and shifted by (B, hidden) each."""
    return h * (1 + scale[:, None]) + shift[:, None]


class TimestepEmbedder(nn.Module):
    """t (B,), already times time_scale -> (B, hidden)."""

    def __init__(self, hidden: int):
        super().__init__()
        first, second = nn.Linear(FREQUENCIES, hidden), nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(time_features(t).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Labels (B,), the null class last -> (B, hidden)."""

    def __init__(self, num_classes: int, hidden: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Block(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the condition (adaLN-Zero)."""

    def __init__(self, hidden: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        gelu = lambda: nn.GELU(approximate="tanh")  # noqa: E731
        self.mlp = Mlp(hidden, hidden_features=4 * hidden, act_layer=gelu)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(condition).chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        h = h + gate1[:, None] * self.attn(modulate(self.norm1(h), shift1, scale1))
        return h + gate2[:, None] * self.mlp(modulate(self.norm2(h), shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens -> the head's output. `maps` counts images per sample: 1, K or N."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        hidden, pixels = config.hidden, config.patch**2
        self.norm_final = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))
        if config.head == "gmflow":
            self.means = nn.Linear(hidden, pixels * config.components * config.channels)
            self.logweights = nn.Linear(hidden, pixels * config.components)
            self.logstds = nn.Sequential(
                nn.SiLU(),
                nn.Linear(hidden, config.logstd_hidden),
                nn.SiLU(),
                nn.Linear(config.logstd_hidden, 1),
            )
        else:
            self.linear = nn.Linear(hidden, pixels * config.components * config.channels)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor | GaussianMixture:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        h = modulate(self.norm_final(h), shift, scale)
        if self.config.head == "gmflow":
            logweights = self.unpatchify(self.logweights(h), channels=1)
            return GaussianMixture(
                means=self.unpatchify(self.means(h), self.config.channels),
                logstds=self.logstds(condition.detach())[:, :, None, None, None],
                logweights=logweights.float().log_softmax(dim=1),
            )
        velocities = self.unpatchify(self.linear(h), self.config.channels)
        return velocities[:, 0] if self.config.head == "velocity" else velocities

    def unpatchify(self, tokens: Tensor, channels: int) -> Tensor:
        """(B, T, p*p * maps * channels) -> (B, maps, channels, H, W)."""
        p, maps, rows = self.config.patch, self.config.components, math.isqrt(tokens.shape[1])
        images = tokens.unflatten(2, (p, p, maps, channels)).unflatten(1, (rows, rows))
        images = images.permute(0, 5, 6, 1, 3, 2, 4)  #   (B, maps, channels, rows, p, rows, p)
        return images.flatten(5, 6).flatten(3, 4)


class DiT(nn.Module):
    """The network. Called as net(x, t, labels); `net.config` says what it is.

    `checkpointing = True` recomputes each block in the backward pass instead of storing it.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        check_config(config)
        self.config, self.checkpointing = config, False
        self.x_embedder = PatchEmbed(None, config.patch, config.channels, config.hidden)
        self.t_embedder = TimestepEmbedder(config.hidden)
        self.y_embedder = LabelEmbedder(config.num_classes, config.hidden)
        self.blocks = nn.ModuleList(
            [Block(config.hidden, config.num_heads) for _ in range(config.depth)]
        )
        self.final_layer = FinalLayer(config)
        self.initialize()

    def initialize(self) -> None:
        """DiT's initialisation: every block is the identity and the head's output is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.config.hidden, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        final = self.final_layer
        zeros = [block.adaLN_modulation[1] for block in self.blocks] + [final.adaLN_modulation[1]]
        if self.config.head == "gmflow":
            zeros += [final.means, final.logweights, final.logstds[3]]
        else:
            zeros += [final.linear]
        for layer in zeros:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if self.config.head == "gmflow":
            nn.init.constant_(final.logstds[3].bias, math.log(INITIAL_STD))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor | GaussianMixture:
        """x (B, C, H, H), t (B,) in [0, 1], labels (B,) in 0..num_classes -> the head's output."""
        size, patch, channels = x.shape[-1], self.config.patch, self.config.channels
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] != size or size % patch:
            raise ValueError(
                f"x has the shape {tuple(x.shape)}; expected (B, {channels}, H, H) with H a "
                f"multiple of {patch}"
            )
        dtype = self.x_embedder.proj.weight.dtype
        positions = position_features(size // patch, self.config.hidden, x.device)
        h = self.x_embedder(x.to(dtype)) + positions.to(dtype)  #           (B, T, hidden)
        condition = self.t_embedder(self.config.time_scale * t) + self.y_embedder(labels)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, condition, use_reentrant=False)
            else:
                h = block(h, condition)
        return self.final_layer(h, condition)


def check_config(config: DiTConfig) -> None:
    """Raises ValueError if no such network exists."""
    if config.head not in HEADS:
        raise ValueError(f"head is {config.head!r}; choose one of {', '.join(HEADS)}")
    if config.head == "velocity" and config.components != 1:
        raise ValueError(f"components is {config.components}; the velocity head has exactly 1")
    if config.components < 1:
        raise ValueError(f"components is {config.components}; it must be at least 1")
    if config.num_heads < 1 or config.hidden % 4 or config.hidden % config.num_heads:
        raise ValueError(
            f"num_heads is {config.num_heads} and hidden {config.hidden}; hidden must be a "
            "multiple of num_heads and of 4"
        )


# ---------------------------------------------------------------------------------------------
# Teachers and students
# ---------------------------------------------------------------------------------------------


def guided_teacher(
    net: DiT,
    labels: Tensor,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    orthogonal: float = 0.0,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A teacher (x, t) -> u with classifier-free guidance; labels (B,) belong to the samples of x.

    Both branches are one batched call of the network. With scale 1 there is one branch only.
    x may hold several samples per label: (M * B, ...) with the labels repeating M times.
    """
    null = torch.full_like(labels, net.config.num_classes)

    @torch.no_grad()
    def teacher(x: Tensor, t: Tensor) -> Tensor:
        repeats = x.shape[0] // labels.shape[0]
        cond = labels.repeat(repeats)
        if scale == 1.0:
            return net(x, t, cond).to(x.dtype)
        both = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([cond, null.repeat(repeats)]))
        u_cond, u_uncond = both.to(x.dtype).chunk(2)
        return guided_velocity(u_cond, u_uncond, scale, t, interval, x, orthogonal)

    return teacher


def dit_student(
    net: DiT, labels: Tensor, segment_size: float | Tensor = 1.0, shift: float = 1.0
) -> Callable[[Tensor, Tensor], GMFlowPolicy | DXPolicy]:
    """A student (x_src, t_src) -> policy from a network with a gmflow or dx head; labels (B,).

    segment_size and shift are the dx policy's, as it was trained; gmflow has no such thing.
    """

    def student(x_src: Tensor, t_src: Tensor) -> GMFlowPolicy | DXPolicy:
        output = net(x_src, t_src, labels)
        if isinstance(output, GaussianMixture):
            return GMFlowPolicy(output, x_src, t_src)
        return DXPolicy(output, x_src, t_src, segment_size=segment_size, shift=shift)

    if net.config.head == "velocity":
        raise ValueError("a network with the velocity head is a teacher, no student")
    return student


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
