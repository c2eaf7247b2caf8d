"""What one training sample needs, by seed, iteration and place in the batch; cached latents."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from imagenet.cache_latents import open_shards
from imagenet.dit import DiTConfig
from piflow_minimal import segment_of

if TYPE_CHECKING:
    from imagenet.distill import Settings


class Draws(NamedTuple):
    """n samples. S: segments of each, M: intermediates, K: components."""

    labels: Tensor  #    (n,)
    noise: Tensor  #     (n, C, H, W)
    x_0: Tensor  #       (n, C, H, W), of no meaning without cached latents
    tau_src: Tensor  #   (n, S) in (0, 1], where each segment starts
    uniforms: Tensor  #  (n, S, M) in [0, 1), query times within each segment
    dropped: Tensor  #   (n, S, K) bool, components that the rollout lacks
    times: np.ndarray  # (n, S, M) t of the queries, for the host

    def part(self, begin: int, end: int, device: torch.device) -> "Draws":
        piece = [value[begin:end] for value in self]
        return Draws(*(value.to(device, non_blocking=True) for value in piece[:-1]), piece[-1])


class Latents:
    """Latents that imagenet.cache_latents wrote, memory-mapped.

    Raises: ValueError if there are none, or if they are not what the network `net` works on.
    """

    def __init__(self, folder: str, net: DiTConfig):
        self.moments, self.labels = open_shards(folder, net)  #         (n, 2, C, H, W) each, (N,)
        self.ends = np.cumsum([len(shard) for shard in self.moments])

    def draw(self, item: int, generator: torch.Generator) -> tuple[Tensor, int]:
        """A sample (C, H, W) of the VAE's posterior for one image, and its label."""
        shard = int(np.searchsorted(self.ends, item, side="right"))
        mean, std = torch.from_numpy(
            self.moments[shard][item - self.ends[shard]].astype(np.float32)  # counted from its end
        )
        return mean + std * torch.randn(mean.shape, generator=generator), int(self.labels[item])


def training_seed(seed: int, number: int) -> int:
    """The seed of sample `number` of a run, in [2^31, 2^32): evaluation seeds are below 2^31.

    Distinct for 2^31 samples in a row, 524,000 iterations of the published batch.
    """
    return 2**31 + (seed * 0x9E3779B1 + number) % 2**31


def draw(
    config: "Settings", net: DiTConfig, latents: Latents | None, iteration: int, places: range,
    pin: bool = False,
) -> Draws:  # fmt: skip
    """What the samples at `places` of the batch need in this iteration, on the CPU."""
    S, M = config.segments, config.num_intermediates
    K = config.components if config.dropout else 1
    shape = (net.channels, net.latent_size, net.latent_size)
    items = len(latents.labels) if latents else net.num_classes
    generator, rows = torch.Generator(), []
    for place in places:
        generator.manual_seed(training_seed(config.seed, iteration * config.batch + place))
        noise = x_0 = torch.randn(shape, generator=generator)
        uniforms = torch.rand(1 + S * (M + K), generator=generator)
        item = torch.randint(items, (), generator=generator)
        if latents:
            x_0, item = latents.draw(int(item), generator)
        rows.append((torch.as_tensor(item), noise, x_0, uniforms))
    labels, noise, x_0, uniforms = (torch.stack(column) for column in zip(*rows, strict=True))
    tau, uniforms, chance = uniforms.split([1, S * M, S * K], dim=1)
    tau_src = (1 - torch.arange(S) / config.nfe).expand(len(labels), S)
    if latents:
        tau_src = segment_of(1 - tau, config.nfe)[0]
    chance = chance.unflatten(1, (S, K))
    dropped = (chance < config.dropout) & (chance < chance.amax(2, keepdim=True))  # never all
    uniforms = place_queries(config, tau_src, uniforms.unflatten(1, (S, M)), iteration, places)
    times = query_times(config, tau_src, uniforms)
    tensors = (labels, noise, x_0, tau_src, uniforms, dropped)
    return Draws(*(value.pin_memory() if pin else value for value in tensors), times)


def place_queries(
    config: "Settings", tau_src: Tensor, uniforms: Tensor, iteration: int, places: range
) -> Tensor:
    """Uniforms (n, S, M) as --query-times and --min-query-time want them, still in [0, 1)."""
    _, S, M = uniforms.shape
    if config.query_times == "stratified":
        generator = torch.Generator().manual_seed(training_seed(config.seed, iteration))
        strata = [torch.randperm(config.batch * M, generator=generator) for _ in range(S)]
        strata = torch.stack(strata).view(S, -1, M)[:, list(places)].transpose(0, 1)
        uniforms = (strata + uniforms) / (config.batch * M)
    size = 1 / config.nfe
    below = (config.min_query_time - (tau_src - size)).clamp(0, size)  #           (n, S)
    return uniforms * (1 - below / size)[..., None]


def query_times(config: "Settings", tau_src: Tensor, uniforms: Tensor) -> np.ndarray:
    """Where pi_id_loss queries the teacher. tau_src (n, S), uniforms (n, S, M) -> t (n, S, M)."""
    size = 1 / config.nfe
    window = config.window_substeps * size / max(1, round(size * config.total_substeps))
    return (tau_src[..., None] - (size - min(window, size)) * uniforms.sort(2).values).numpy()
