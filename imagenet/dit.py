"""DiT, the transformer behind the ImageNet experiments: network, heads, guided teacher, student.

One backbone (Peebles & Xie 2023, in the form of SiT and REPA) with one of three output heads:

    head        output of net(x, t, labels)                                        used as
    velocity    u (B, C, H, W)                                                     teacher
    gmflow      GaussianMixture: means (B, K, C, H, W), logstds (B, 1, 1, 1, 1),
                logweights (B, K, 1, H, W)                                         student
    dx          velocities (B, N, C, H, W)                                         student

t = 1 is noise, t = 0 is data; u = eps - x_0. Files are read and written in checkpoints.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.teachers import guided_velocity
from piflow_minimal import DXPolicy, GaussianMixture, GMFlowPolicy, Time

FREQUENCIES = 256  # width of the sinusoidal embedding of t
MAX_PERIOD = 10000.0
INITIAL_STD = 0.05  # of a new gmflow head, and of the noise that separates its components
VAE = "stabilityai/sd-vae-ft-ema"
LATENT_SCALE = 0.18215  # of its latents
PIXELS = "pixel-shuffle"  # latents are images, 2 x 2 pixels in four channels


# ---- The network ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiTConfig:
    """Everything that fixes a network, and how it is sampled: each file of weights has it.

    Defaults are XL/2 on ImageNet 256 (latents 4 x 32 x 32).
    """

    hidden: int = 1152
    depth: int = 28
    num_heads: int = 16
    patch: int = 2
    channels: int = 4
    latent_size: int = 32  # the size that it was trained at; any square size runs
    num_classes: int = 1000  # the null class has the index num_classes
    time_scale: float = 1.0  # factor applied to t before the time embedding
    flip_time: bool = False  # the time embedding gets 1 - t: trained with t = 1 as data
    norm2_eps: float = 1e-6  # of the LayerNorm before the MLP; published networks: 1e-5
    head: str = "velocity"
    components: int = 1  # K of the gmflow head, N of the dx head
    logstd_hidden: int = 1024  # gmflow only
    nfe: int | None = None  # evaluations that a student was trained for; None: not stated
    solver: str | None = None  # of the rollouts with which a student is sampled; None: not stated
    total_substeps: int | None = None  # of these rollouts; None: not stated
    decoder: str = VAE  # latents -> images: a VAE (Hub name or folder), or PIXELS


PRESETS = {
    "xl2": DiTConfig(),
    "tiny": DiTConfig(
        hidden=96, depth=6, num_heads=4, latent_size=14, num_classes=10, decoder=PIXELS
    ),
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


class Block(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the condition (adaLN-Zero)."""

    def __init__(self, hidden: int, num_heads: int, norm2_eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden, elementwise_affine=False, eps=norm2_eps)
        gelu = partial(nn.GELU, approximate="tanh")
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
        p = self.config.patch
        maps = self.config.components
        rows = math.isqrt(tokens.shape[1])
        images = tokens.unflatten(2, (p, p, maps, channels)).unflatten(1, (rows, rows))
        images = images.permute(0, 5, 6, 1, 3, 2, 4)  #   (B, maps, channels, rows, p, rows, p)
        return images.flatten(5, 6).flatten(3, 4)


class DiT(nn.Module):
    """The network. Called as net(x, t, labels); `net.config` states what it is.

    `checkpointing = True` recomputes each block in the backward pass instead of storing it.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.x_embedder = PatchEmbed(None, config.patch, config.channels, config.hidden)
        hidden = config.hidden
        mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        labels = nn.Embedding(config.num_classes + 1, hidden)  # the null class is last
        self.t_embedder = nn.ModuleDict({"mlp": mlp})  # the names of the public files
        self.y_embedder = nn.ModuleDict({"embedding_table": labels})
        self.blocks = nn.ModuleList(
            [Block(hidden, config.num_heads, config.norm2_eps) for _ in range(config.depth)]
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
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for part in (*self.blocks, self.final_layer):
            nn.init.zeros_(part.adaLN_modulation[1].weight)
        final = self.final_layer
        if self.config.head == "gmflow":
            heads = [final.means, final.logweights, final.logstds[3]]
            nn.init.constant_(final.logstds[3].bias, math.log(INITIAL_STD))
        else:
            heads = [final.linear]
        for layer in heads:
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, t: Time, labels: Tensor) -> Tensor | GaussianMixture:
        """-> the head's output.

        Args: x: (B, C, H, H); t: in [0, 1], a number, () or (B,); labels: integers in
            0..num_classes, () or (B,).
        """
        t = torch.as_tensor(t, device=x.device).float().expand(len(x))
        labels = torch.as_tensor(labels, device=x.device).expand(len(x))
        if self.config.flip_time:
            t = 1 - t
        dtype = self.x_embedder.proj.weight.dtype
        h = self.x_embedder(x.to(dtype))  #                                    (B, T, hidden)
        positions = position_features(math.isqrt(h.shape[1]), self.config.hidden, x.device)
        h = h + positions.to(h.dtype)
        condition = self.t_embedder.mlp(time_features(self.config.time_scale * t).to(dtype))
        condition = condition + self.y_embedder.embedding_table(labels)  #     (B, hidden)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, condition, use_reentrant=False)
            else:
                h = block(h, condition)
        return self.final_layer(h, condition)


# ---- Teachers and students -----------------------------------------------------------------------


def guided_teacher(
    net: DiT, labels: Tensor, scale: float = 1.0, interval: tuple[float, float] = (0.0, 1.0)
) -> Callable[[Tensor, Time], Tensor]:
    """A teacher (x, t) -> u with classifier-free guidance; labels (B,) belong to the samples of x.

    One batched call of the network: all rows with their labels, and the rows whose t is inside the
    guidance interval again, with the null class. x may hold several samples per label: (M * B, ...)
    with the labels repeating M times. Which rows are inside forces one device sync per query.
    """

    @torch.no_grad()
    def teacher(x: Tensor, t: Time) -> Tensor:
        cond = labels.repeat(len(x) // len(labels))
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        if scale == 1.0:
            return net(x, t, cond).to(x.dtype)
        inside = ((t >= interval[0]) & (t <= interval[1])).nonzero()[:, 0]
        rows = torch.cat([torch.arange(len(x), device=x.device), inside])
        null = torch.full_like(inside, net.config.num_classes)
        both = net(x[rows], t[rows], torch.cat([cond, null])).to(x.dtype)
        u, u_uncond = both.split([len(x), len(inside)])
        u_guided = guided_velocity(u[inside], u_uncond, scale, t[inside])
        return u.index_copy(0, inside, u_guided)

    return teacher


def dit_student(
    net: DiT, labels: Tensor, segment_size: float = 1.0, bf16: bool = False
) -> Callable[[Tensor, Tensor], GMFlowPolicy | DXPolicy]:
    """A student (x_src, t_src) -> policy from a network with a gmflow or dx head; labels (B,).

    segment_size: of the dx policy, as it was trained; bf16: the network runs under autocast.
    """

    def student(x_src: Tensor, t_src: Tensor) -> GMFlowPolicy | DXPolicy:
        with torch.autocast(x_src.device.type, torch.bfloat16, enabled=bf16):
            output = net(x_src, t_src, labels)
        if isinstance(output, GaussianMixture):
            return GMFlowPolicy(output, x_src, t_src)
        return DXPolicy(output, x_src, t_src, segment_size=segment_size)

    return student
