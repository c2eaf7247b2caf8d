"""What a GPU must do. Each check takes a device and returns, in a few words, what came out.

`small` runs the same code in seconds on a CPU: tests/test_gpu_checks.py does, so that a check is
right before it meets a GPU.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from common.cli import can_compile, compiled_policies
from common.log import Log, memory_gib
from common.processes import Place
from common.train import add_gradients
from imagenet import distill, smoke
from imagenet.dit import PRESETS as NETWORKS
from imagenet.dit import DiT, dit_student
from piflow_minimal import (
    DXPolicy,
    GaussianMixture,
    GMFlowPolicy,
    Policy,
    pi_id_data_dependent,
    pi_id_data_free,
    pi_id_loss,
    rollout,
    sample,
)

ROOT = Path(__file__).parent.parent
POLICIES = ("gmflow", "dx")


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What a network would give: a state and K = N = 6 velocities, leaves; log weights."""
    shapes = (4, 4, 16, 16), (4, 6, 4, 16, 16), (4, 6, 1, 16, 16)
    made = [values(*shape, seed=seed).to(device) for seed, shape in enumerate(shapes)]
    made[1].requires_grad_(True)
    return made[0], made[1], made[2]


def policy_of(kind: str, x: Tensor, velocities: Tensor, logits: Tensor, t_src: float) -> Policy:
    if kind == "dx":
        return DXPolicy(velocities, x, t_src)
    logstds = x.new_full((len(x), 1, 1, 1, 1), -1.0)
    return GMFlowPolicy(GaussianMixture(velocities, logstds, logits.log_softmax(1)), x, t_src)


def teacher(x: Tensor, t: Tensor) -> Tensor:
    t = t[:, None, None, None]
    return torch.tanh(x) * (1 + t) + t


def difference(a: Tensor, b: Tensor) -> float:
    """Relative to the largest entry."""
    a, b = a.detach().cpu(), b.detach().cpu()
    return ((a - b).abs().max() / b.abs().max()).item()


def both(function: Callable[[torch.device], list[Tensor]], device: torch.device) -> float:
    """The largest difference between the results on the device and on the CPU."""
    pairs = zip(function(device), function(torch.device("cpu")), strict=True)
    return max(difference(a, b) for a, b in pairs)


# ---- The core ------------------------------------------------------------------------------------


def policies_equal_the_cpu(device: torch.device, small: bool) -> str:
    def velocities(device: torch.device) -> list[Tensor]:
        found = []
        for kind in POLICIES:
            policy = policy_of(kind, *outputs(device), 0.9)
            x = values(4, 4, 16, 16, seed=3).to(device)
            found += [policy.velocity(x, t) * t for t in (0.9, 0.5, 0.01)]
        return found

    found = both(velocities, device)
    assert found < 1e-4
    return f"largest difference {found:.0e}"


def rollouts_losses_and_gradients_equal_the_cpu(device: torch.device, small: bool) -> str:
    def losses(device: torch.device) -> list[Tensor]:
        found = []
        for kind, solver in (("gmflow", "euler"), ("gmflow", "deis"), ("dx", "exact")):
            x, velocities, logits = outputs(device)
            policy = policy_of(kind, x, velocities, logits, 1.0)
            found.append(rollout(policy.detach(), x, 1.0, 0.1, total_substeps=16, solver=solver))
            draws = torch.rand(4, 2, generator=torch.Generator().manual_seed(4)).to(device)
            options = {"total_substeps": 16, "solver": solver, "uniforms": (draws, draws[:, 1:])}
            out = pi_id_loss(policy, teacher, 1.0, 1.0, window_substeps=3, **options)
            out.loss.backward()
            found += [out.loss[None], out.x_dst, velocities.grad]
        return found

    found = both(losses, device)
    assert found < 1e-3
    return f"largest difference {found:.0e}"


def core_steps(made: tuple[Tensor, Tensor, Tensor], train: bool = True) -> None:
    """Rollouts, all losses (`train`: with their backward pass) and the sampler, once."""
    x, velocities, logits = made
    for kind in POLICIES:

        def student(x: Tensor, t: Tensor) -> Policy:
            return policy_of(kind, x, velocities, logits, t)  # noqa: B023

        options = {"total_substeps": 8, "num_intermediates": 2}
        losses = [
            w * out.weighted(0.5) for w, out in pi_id_data_free(student, teacher, x, 2, **options)
        ]
        losses.append(pi_id_data_dependent(student, teacher, x, 2, **options).loss)
        if train:
            sum(losses).backward()
        sample(student, x, nfe=2, h=1.0, total_substeps=8)


def core_forces_no_device_sync(device: torch.device, small: bool) -> str:
    made = outputs(device)
    core_steps(made)  # the first call of a kernel may synchronise
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        core_steps(made)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return "none in rollout, loss, backward and sampler"


# ---- Training ------------------------------------------------------------------------------------


def random_task(name: str, s: distill.Settings, device: torch.device) -> distill.Distillation:
    return distill.Distillation(s, device, smoke.random_teacher(name, device))


@contextlib.contextmanager
def one_process(device: torch.device) -> Iterator[None]:
    """A process group of this process alone, for FSDP."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def ways_to_train_agree(device: torch.device, small: bool) -> str:
    """The loss of one DiT step in float32, and with each of what makes it faster or smaller."""
    plain = replace(
        distill.PRESETS["gm-repa-1nfe"], batch=4, micro_batch=2, components=4, total_substeps=8,
        bf16=False, checkpointing=False, compile=False, loss_scale=1.0, dropout=0.0,
    )  # fmt: skip
    ways = {
        "float32": {},
        "bf16": {"bf16": True},
        "checkpointing": {"checkpointing": True},
        "FSDP": {"shard": True},
        "compile": {"compile": True},
    }
    if small:
        del ways["compile"]  # it takes minutes on a CPU
    losses = {}
    for name, changes in ways.items():
        s = replace(plain, **changes)
        torch.manual_seed(0)
        task = random_task("tiny", s, device)
        with one_process(device) if s.shard else contextlib.nullcontext():
            if s.shard:
                task.shard(task.net)
            with compiled_policies(task.compile):
                loss = add_gradients(
                    s, task, 0, Place(0, 1, device), Log(replace(s, out="none"), 0, device)
                )
        losses[name] = loss.item()
        assert abs(losses[name] / losses["float32"] - 1) < (0.05 if s.bf16 else 1e-3), losses
    return ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())


def start_training(out: Path, device: torch.device) -> subprocess.Popen:
    flags = ["--iterations", "12", "--save-every", "2", "--picture-every", "0", "--keep", "9"]
    command = [sys.executable, "-m", "imagenet.distill", "--out", str(out), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*command, "--device", str(device)], cwd=ROOT, env=environment)


def a_killed_run_continues(device: torch.device, small: bool) -> str:
    """SIGKILL after the second checkpoint; the same command again; the student of a whole run."""
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        assert start_training(whole, device).wait(timeout=300) == 0
        process = start_training(killed, device)
        while not (killed / "checkpoints/step_00000004.pt").exists():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert start_training(killed, device).wait(timeout=300) == 0
        a, b = (load_file(out / "student.safetensors") for out in (whole, killed))
    found = max(difference(a[key], b[key]) for key in a if b[key].abs().max() > 0)
    assert found < 1e-3
    return "bit for bit" if found == 0 else f"largest difference {found:.0e}"


def the_tiny_student_learns(device: torch.device, small: bool) -> str:
    with tempfile.TemporaryDirectory() as out:
        flags = ["--iterations", "3" if small else "500", "--log-every", "1" if small else "50"]
        flags += ["--picture-every", "1000000"]
        flags += ["--device", str(device), "--out", out]
        distill.main(flags)
        lines = [json.loads(line) for line in Path(out, "stats.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    if not small:
        assert last["loss"] < first["loss"] / 2 and last["endpoint_rmse"] < 0.3
    return (f"loss {first['loss']:.3f} to {last['loss']:.3f}, endpoint RMSE "
            f"{last['endpoint_rmse']:.3f}, {last['images_per_s']:.0f} images/s")  # fmt: skip


def three_steps_of_xl2(device: torch.device, small: bool) -> str:
    """Time and memory of the published preset at 64 samples per micro-batch, random weights."""
    size = 4 if small else 64
    s = replace(distill.PRESETS["gm-repa-1nfe"], batch=size, micro_batch=size, out="none")
    if small:
        s = replace(s, components=4, total_substeps=8)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    task = random_task("tiny" if small else "xl2", s, device)
    seconds = smoke.seconds_per_step(s, task, Place(0, 1, device))
    formula = smoke.memory_formula(s, task.net)
    gib = memory_gib(device)
    if not small:
        assert gib < 1.5 * formula
    return f"{size / seconds:.1f} images/s, {gib:.1f} GiB (formula: {formula:.1f})"


# ---- Sampling, text to image -------------------------------------------------------------------


@torch.no_grad()
def sampling_xl2(device: torch.device, small: bool) -> str:
    """One evaluation, bfloat16 weights, the policy compiled or not: the same images."""
    size, found, seconds = 2 if small else 64, {}, {}
    with torch.device(device):
        config = replace(NETWORKS["tiny" if small else "xl2"], head="gmflow", components=32)
        net = DiT(config).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    net.bfloat16()
    noise = values(size, 4, config.latent_size, config.latent_size).to(device)
    labels = torch.arange(size, device=device) % config.num_classes
    for name in ("plain",) if small else ("plain", "compiled"):
        with compiled_policies(name == "compiled" and can_compile(device)):
            for _ in range(2):  # the first time compiles
                began = time.perf_counter()
                found[name] = sample(dit_student(net, labels), noise, 1).cpu()
                seconds[name] = time.perf_counter() - began
        assert found[name].isfinite().all()
        assert difference(found[name], found["plain"]) < 0.02
    return ", ".join(f"{name} {size / value:.0f} images/s" for name, value in seconds.items())


def the_text_to_image_trainer_runs(device: torch.device, small: bool) -> str:
    from text_to_image import distill as text_distill

    with tempfile.TemporaryDirectory() as out:
        flags = ["--tiny", "--iterations", "2" if small else "20", "--batch", "2"]
        text_distill.main([*flags, "--device", str(device), "--out", out])
        lines = Path(out, "stats.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    return f"loss {last['loss']:.3f} after {last['iteration']} iterations"


CHECKS = (
    policies_equal_the_cpu,
    rollouts_losses_and_gradients_equal_the_cpu,
    core_forces_no_device_sync,
    ways_to_train_agree,
    a_killed_run_continues,
    the_tiny_student_learns,
    three_steps_of_xl2,
    sampling_xl2,
    the_text_to_image_trainer_runs,
)
