"""Will a distillation run here, and for how long? Three steps with random weights, in seconds.

    python -m imagenet.smoke                                       # gm-repa-1nfe on this device
    python -m imagenet.smoke --preset gm-repa-2nfe --no-compile    # the flags of imagenet.distill
    torchrun --nproc-per-node 8 -m imagenet.smoke                  # all GPUs of a node

On a GPU: DiT-XL/2, one micro-batch per step and process, at the settings of the preset. On a CPU:
the tiny network, to see the program run; its times say nothing about a GPU. Nothing is downloaded
or written. Hours are arithmetic: the micro-batches of a preset's run times the seconds of a step.
"""

if not __package__:
    raise SystemExit("start it in the repository's root: python -m imagenet.smoke")

import math
import time
from dataclasses import replace

import torch
from torch import nn

from common.cli import compiled_policies, parse, run_cli
from common.log import Log, memory_gib
from common.memory import activation_bytes
from common.processes import Place, processes
from common.train import State, add_gradients
from imagenet.distill import PRESETS, Distillation, Settings
from imagenet.dit import PRESETS as NETWORKS
from imagenet.dit import DiT

STEPS = 2  # measured; one more before them warms up and compiles


def random_teacher(name: str, device: torch.device) -> DiT:
    """A network of NETWORKS with random weights that let everything through."""
    with torch.device(device):
        net = DiT(NETWORKS[name])
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.02)
    return net.eval()


def memory_formula(s: Settings, net: DiT, world: int = 1) -> float:
    """GiB that a process needs on a GPU, from the sizes of the student.

    Weights, gradient, average and AdamW's two states in float32, split by --shard; the teacher;
    activations, and ten times the policy.
    """
    c = net.config
    parameters = sum(p.numel() for p in net.parameters())
    weights = parameters * (20 / (world if s.shard else 1) + (2 if s.bf16 else 4))
    tokens = s.micro_batch * (c.latent_size // c.patch) ** 2
    activations = activation_bytes(tokens, c.hidden, c.depth, s.checkpointing, inside=25)
    activations *= 1 if s.bf16 else 2
    policy = 4 * s.micro_batch * c.components * c.channels * c.latent_size**2
    return (weights + activations + 10 * policy) / 2**30


def seconds_per_step(s: Settings, task: Distillation, place: Place) -> float:
    """Trains for three steps of one micro-batch per process. Every process calls this."""
    if s.shard:
        task.shard(task.net)
    state, log = State(task.net.train(), s), Log(s, 0, place.device)
    with compiled_policies(task.compile):
        for i in range(1 + STEPS):
            if i == 1:
                began = time.perf_counter()
            state.optimizer.zero_grad()
            add_gradients(s, task, i, place, log)
            nn.utils.clip_grad_norm_(state.weights, s.clip)
            state.step()
            if place.device.type == "cuda":
                torch.cuda.synchronize(place.device)
    return (time.perf_counter() - began) / STEPS


def hours(s: Settings, seconds: float, of: Settings, world: int) -> float:
    """Of a whole run of `s`, from the seconds of a step of the settings `of`."""
    segments = 1 if s.latents else s.nfe
    rounds = math.ceil(s.batch / (world * of.micro_batch)) * segments / of.nfe
    return rounds * seconds * s.iterations / 3600


def main(argv: list[str] | None = None) -> None:
    """Measures and prints; see the top of the file."""
    first = {"gm-repa-1nfe": PRESETS["gm-repa-1nfe"]}
    s = parse(Settings, __doc__, argv, first | PRESETS)
    with processes(s.device) as place:
        name = "xl2" if place.device.type == "cuda" and s.teacher != "tiny" else "tiny"
        if s.shard and place.world == 1:
            raise ValueError("--shard splits a run over processes: start several by torchrun")
        if name == "tiny" and s.teacher != "tiny":
            print("no GPU: the tiny network in place of XL/2")
            s = replace(PRESETS["tiny"], compile=s.compile, seed=s.seed)
        none = {"latents": None, "fid_images": 0, "eval_every": 0, "logger": None}
        s = replace(s, batch=s.micro_batch * place.world, **none)
        task = Distillation(s, place.device, random_teacher(name, place.device))
        seconds = seconds_per_step(s, task, place)
    if place.rank:
        return
    memory, formula = memory_gib(place.device), memory_formula(s, task.net, place.world)
    print(
        f"{place.world} x {place.device.type}: network {name}, {s.policy} {s.components}, "
        f"nfe {s.nfe}, micro-batch {s.micro_batch}, compiled: {task.compile}\n"
        f"peak memory   {memory:8.1f} GiB per process; the formula for a GPU: {formula:.1f}\n"
        f"step          {1e3 * seconds:8.1f} ms, {s.batch * s.nfe / seconds:.1f} images/s\n"
        "\npreset                  hours, with this micro-batch and policy"
    )
    for preset, other in PRESETS.items():
        if (other.teacher == "tiny") == (name == "tiny"):
            print(f"{preset:18s} {hours(other, seconds, s, place.world):10.1f}")


if __name__ == "__main__":
    run_cli(main)
