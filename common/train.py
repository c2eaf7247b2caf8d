"""One training loop for every pi-Flow student: one process or many, moving average, exact resume.

A task brings the network and the loss; everything else is here.

    net                        nn.Module; what requires a gradient is trained
    losses(net, iteration, rows) -> Iterator[(weight, PiIDLoss)]     rows: places in the batch
    evaluate(net, iteration)     -> dict of numbers                  with the average in place
    export(state, folder)        state: the average, whole tensors on the CPU
    shard(net)                   optional: fully_shard of its blocks, for --shard
    describe()                   optional: a JSON dict, kept in each checkpoint for whoever reads it

Every process calls these methods, except `export`, which rank 0 calls alone. torch.manual_seed
comes before each call of `losses`, so that what is drawn there, also on the device, depends on the
seed, the iteration and the first row alone. The number of processes changes no draw, as long as
each has a micro-batch; --micro-batch does.

The same command continues a run. Its folder, local or on s3://: config.json, stats.jsonl,
checkpoints/step_00001000.pt, and what the task exports.
"""

import contextlib
import dataclasses
import math
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from tqdm import tqdm

from common.cli import DEVICE_HELP, MAX_SEED, setting
from common.files import (
    check_same,
    is_remote,
    join,
    list_files,
    reading,
    remove,
    remove_leftovers,
    write_json,
    writing,
)
from common.log import Log, as_json
from common.processes import Place, from_first, rank, stop_signals, total
from common.processes import processes as processes  # beside `train`, for whoever trains

MOST_SKIPPED = 10  # iterations in a row without a finite gradient: then a run gives up


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """What all trainers share. free: may change when a run continues."""

    out: str = setting("outputs", "folder of the run, local or s3://...", path=True, free=True)
    iterations: int = setting(1000, "optimizer steps", low=1, free=True)
    batch: int = setting(256, "samples per step, over all processes", low=1)
    micro_batch: int = setting(
        32, "samples that a process handles at once; changed, a run does not continue bit for bit",
        low=1, free=True,
    )  # fmt: skip
    lr: float = setting(1e-4, "peak learning rate of AdamW", above=0)
    lr_decay: str = setting(
        "none", "after the warm-up; cosine: to 0 at --iterations", choices=("none", "cosine")
    )
    warmup: int = setting(100, "iterations of linear warm-up, from a thousandth of --lr", low=0)
    beta2: float = setting(0.95, "AdamW's beta2; beta1 is 0.9, no weight decay", low=0, high=1)
    optimizer: str = setting(
        "adamw", "adamw8bit needs bitsandbytes and CUDA", choices=("adamw", "adamw8bit")
    )
    clip: float = setting(50.0, "largest gradient norm", above=0)
    clip_start: int = setting(100, "iteration from which gradients are clipped", low=0)
    ema_start: int = setting(100, "iteration up to which the moving average copies", low=0)
    ema_gamma: float = setting(
        7.0, "decay (1 - 1/i)^(1 + gamma) of the moving average, i counted from its start", low=0
    )
    loss_scale: float = setting(1.0, "factor of the loss", above=0)
    time_weight: float = setting(0.0, "power of t that weights the squared error", low=0)
    shard: bool = setting(False, "split weights and optimizer over the processes (FSDP)", free=True)
    device: str = setting("auto", DEVICE_HELP, free=True)
    seed: int = setting(0, "seed of everything random", low=0, high=MAX_SEED)
    log_every: int = setting(50, "iterations between lines of stats.jsonl", low=1, free=True)
    save_every: int = setting(1000, "iterations between checkpoints", low=1, free=True)
    keep: int = setting(2, "newest checkpoints to keep", low=1, free=True)
    milestone_every: int | None = setting(
        None, "checkpoints of these multiples stay as well", low=1, free=True
    )
    eval_every: int = setting(2000, "iterations between evaluations; 0: none", low=0, free=True)
    logger: str | None = setting(
        None, "beside stats.jsonl", choices=("tensorboard", "wandb"), free=True
    )


# ---- What is trained, its average, the optimizer -------------------------------------------------


class State:
    """Network, moving average of what is trained, optimizer, and how far they have come."""

    def __init__(self, net: nn.Module, s: TrainSettings):
        self.net, self.s = net, s
        self.iteration = 0
        self.skipped = 0
        self.seconds = 0.0
        self.weights = [p for p in net.parameters() if p.requires_grad]
        self.ema = [p.detach().clone() for p in self.weights]
        options = {"lr": s.lr, "betas": (0.9, s.beta2), "weight_decay": 0.0}
        if s.optimizer == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            self.optimizer = AdamW8bit(self.weights, **options)
        else:
            fused = self.weights[0].device.type == "cuda"
            self.optimizer = torch.optim.AdamW(self.weights, fused=fused, **options)

    @torch.no_grad()
    def step(self) -> None:
        """One optimizer step and one of the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.s, self.iteration)
        self.optimizer.step()
        decay = ema_decay(self.iteration + 1, self.s.ema_start, self.s.ema_gamma)
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.weights], 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The network with the average in place of its weights, in evaluation mode."""
        self._swap()
        try:
            yield self.net.eval()
        finally:
            for module in self.net.modules():
                if hasattr(module, "reshard"):  # fully_shard keeps gathered what a backward frees
                    module.reshard()
            self._swap()
            self.net.train()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in zip(self.weights, self.ema, strict=True):
            kept = weight.clone()  # in place: fully_shard holds on to the storage
            weight.copy_(average)
            average.copy_(kept)

    def whole(self) -> dict[str, Tensor]:
        """Trained weights by name as whole tensors, on the CPU of rank 0; elsewhere empty."""
        options = {"full_state_dict": True, "cpu_offload": True, "ignore_frozen_params": True}
        state = get_model_state_dict(self.net, options=StateDictOptions(**options))
        return {name: value.clone() for name, value in state.items()}

    def whole_average(self) -> dict[str, Tensor]:
        """The same of the average. Every process calls this."""
        with self.averaged():
            return self.whole()

    def as_dict(self) -> dict[str, Any]:
        """All that a checkpoint holds. Every process calls this."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return {
            "iteration": self.iteration,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "net": self.whole(),
            "ema": self.whole_average(),
            "optimizer": get_optimizer_state_dict(self.net, self.optimizer, options=options),
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continues from what `as_dict` gave on rank 0; None there: nothing to continue."""
        counts = from_first(state and [state[name] for name in ("iteration", "skipped", "seconds")])
        if counts is None:
            return
        self.iteration, self.skipped, self.seconds = counts
        state = state or {"net": {}, "ema": {}, "optimizer": {}}  # the others are sent the tensors
        options = {"full_state_dict": True, "strict": False}  # strict: frozen parts are not in it
        options = StateDictOptions(broadcast_from_rank0=dist.is_initialized(), **options)
        set_model_state_dict(self.net, state["ema"], options=options)
        self.ema = [p.detach().clone() for p in self.weights]
        set_model_state_dict(self.net, state["net"], options=options)
        set_optimizer_state_dict(self.net, self.optimizer, state["optimizer"], options=options)


def learning_rate(s: TrainSettings, iteration: int) -> float:
    """Linear warm-up from lr / 1000, then constant or a cosine to 0. iteration: counts from 0."""
    if iteration < s.warmup:
        return s.lr * (0.001 + 0.999 * iteration / s.warmup)
    if s.lr_decay == "none":
        return s.lr
    done = (iteration - s.warmup) / max(1, s.iterations - s.warmup)
    return s.lr * (1 + math.cos(math.pi * min(1.0, done))) / 2


def ema_decay(steps: int, start: int = 0, gamma: float = 7.0) -> float:
    """Share of the old average that stays after `steps` optimizer steps; 0 copies the weights.

    (1 - 1/i)^(1 + gamma), i counted from `start`: the power function of arXiv 2312.02696.
    """
    i = steps - start
    return (1 - 1 / i) ** (1 + gamma) if i > 0 else 0.0


# ---- Checkpoints ---------------------------------------------------------------------------------


def save(s: TrainSettings, state: State, task: Any) -> None:
    """Writes a checkpoint, then the student; the newest s.keep checkpoints and milestones stay."""
    whole = state.as_dict()
    if rank():
        return
    if hasattr(task, "describe"):
        whole["export"] = task.describe()
    folder = join(s.out, "checkpoints")
    with writing(join(folder, f"step_{state.iteration:08d}.pt")) as temporary:
        torch.save(whole, temporary)
    export(s, task, whole["ema"])
    names = list_files(folder, "step_")  # above this iteration they are damaged: see `newest`
    names = [name for name in names if int(name[5:13]) <= state.iteration]
    if s.milestone_every:
        names = [name for name in names if int(name[5:13]) % s.milestone_every]
    for name in names[: -s.keep]:
        remove(join(folder, name))


def export(s: TrainSettings, task: Any, average: dict[str, Tensor]) -> None:
    """Lets the task write its student; on rank 0."""
    if rank() == 0:
        task.export(average, s.out if is_remote(s.out) else Path(s.out))


def read_checkpoint(path: str) -> dict[str, Any]:
    """Raises: ValueError if it is damaged, OSError if there is none or it cannot be fetched."""
    with reading(path) as local, open(local, "rb") as file:
        try:
            wrong = zipfile.ZipFile(file).testzip()
            if wrong:
                raise ValueError(f"wrong checksum of {wrong}")
            return torch.load(local, map_location="cpu", weights_only=True)
        except Exception as error:  # one wrong bit in the directory of a zip: nearly any kind
            raise ValueError(f"{path} is damaged: {error}") from error


def newest(out: str) -> dict[str, Any] | None:
    """The newest checkpoint of a run that is whole; damaged ones are named and skipped."""
    folder = join(out, "checkpoints")
    for place in (out, folder, join(out, "adapter"), join(out, "pictures")):
        remove_leftovers(place)
    for name in reversed(list_files(folder, "step_")):
        try:
            return read_checkpoint(join(folder, name))
        except ValueError as error:
            print(f"skipping the damaged checkpoint {name}: {error}")
    return None


# ---- The loop ------------------------------------------------------------------------------------


def start(s: TrainSettings, task: Any, place: Place) -> State:
    """The state of a new run, or of the one that is continued. Every process calls this.

    Raises: ValueError if settings, processes and an earlier run in s.out do not fit together.
    """
    parts = len(micro_batches(s, place.world))
    if parts < place.world or (s.shard and parts % place.world):
        raise ValueError(
            f"--batch {s.batch} makes {parts} micro-batches for {place.world} processes: each "
            "needs one at least, with --shard all need the same number"
        )
    if s.shard and place.world == 1:
        raise ValueError("--shard splits a run over processes: start several by torchrun")
    if s.shard and s.optimizer != "adamw":
        raise ValueError(f"--optimizer {s.optimizer} cannot handle the parameters of --shard")
    decisive = [field.name for field in dataclasses.fields(s) if not field.metadata.get("free")]
    check_same(join(s.out, "config.json"), {name: as_json(s)[name] for name in decisive})
    if s.shard:
        task.shard(task.net)
    state = State(task.net.train(), s)
    state.restore(newest(s.out) if place.rank == 0 else None)
    if state.iteration > s.iterations:
        raise ValueError(f"--iterations {s.iterations}: {s.out} is at iteration {state.iteration}")
    if state.iteration:  # a run that was killed after its checkpoint has an older student
        export(s, task, state.whole_average())
    return state


def add_gradients(s: TrainSettings, task: Any, iteration: int, place: Place, log: Log) -> Tensor:
    """Sums the gradient over micro-batches and processes. -> this process's part of the loss."""
    scale = s.loss_scale * (place.world if s.shard else 1)  # fully_shard averages over processes
    loss = torch.zeros((), device=place.device)
    for rows in micro_batches(s, place.world)[place.rank :: place.world]:
        torch.manual_seed(training_seed(s.seed, iteration * s.batch + rows.start))
        for weight, out in task.losses(task.net, iteration, rows):
            share = weight * out.weighted(s.time_weight) * len(rows) / s.batch
            (scale * share).backward()
            loss += share.detach()
            log.count(out)
    if place.world > 1 and not s.shard:
        gradients = [p.grad for p in task.net.parameters() if p.grad is not None]
        for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
            work.wait()
    return loss


def micro_batches(s: TrainSettings, world: int) -> list[range]:
    """The places in the batch that are handled at once; at least one such range per process."""
    size = min(s.micro_batch, math.ceil(s.batch / world))
    return [range(i, min(i + size, s.batch)) for i in range(0, s.batch, size)]


def training_seed(seed: int, number: int) -> int:
    """The seed of sample `number` of a run, in [2^31, 2^32): evaluation seeds are below 2^31.

    Distinct for 2^31 samples in a row, 524,000 iterations of the published batch.
    """
    return 2**31 + (seed * 0x9E3779B1 + number) % 2**31


def train(s: TrainSettings, task: Any, place: Place) -> State:
    """Trains, or continues, the run in s.out. Every process calls this; rank 0 writes.

    Raises: ValueError after MOST_SKIPPED iterations in a row without a finite gradient; the weights
        from before are saved then.
    """
    state = start(s, task, place)
    log = Log(s, state.iteration, place.device)
    if place.rank == 0:  # all that may be wrong with the settings has shown by now
        write_json(join(s.out, "config.json"), as_json(s))
    began = time.monotonic() - state.seconds
    bad = 0  # iterations in a row without a finite gradient
    last = state.iteration >= s.iterations
    bar = tqdm(total=s.iterations, initial=state.iteration, disable=place.rank > 0 or None)
    with stop_signals() as received, bar:
        while not last:
            state.optimizer.zero_grad()
            loss = add_gradients(s, task, state.iteration, place, log)
            limit = s.clip if state.iteration >= s.clip_start else math.inf
            norm = nn.utils.clip_grad_norm_(state.weights, limit)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # the same on all
            stop = torch.full_like(loss, len(received))
            numbers = total(torch.stack([loss, norm / place.world, stop]))
            loss, norm, stop = numbers.tolist()  #  the only device sync of the loop itself

            if math.isfinite(loss + norm):
                state.step()
                log.add(loss, norm)
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bad = 0
            else:
                state.skipped += 1
                bad += 1
            state.iteration += 1
            state.seconds = time.monotonic() - began
            done = state.iteration == s.iterations
            last = done or stop > 0
            bar.update()

            if bad == MOST_SKIPPED:
                state.iteration -= bad
                save(s, state, task)
                raise ValueError(
                    f"loss or gradient was not finite in {bad} iterations in a row; the weights "
                    f"from before, iteration {state.iteration}, are saved; try a lower --lr than "
                    f"{s.lr} in another --out"
                )
            if due(state.iteration, s.save_every, last) and (last or not bad):
                save(s, state, task)  # before the evaluation, which may take minutes, or fail
            found = {}
            if due(state.iteration, s.eval_every, done) and not stop:
                with state.averaged() as net, torch.no_grad():
                    found = task.evaluate(net, state.iteration)
            if found or due(state.iteration, s.log_every, last):
                log.write(state, found)
    if place.rank == 0:
        print(f"iteration {state.iteration} of {s.iterations}, {state.seconds:.0f} s; in {s.out}")
        if state.iteration < s.iterations:
            print("stopped: run the same command again to continue")
    return state


def due(iteration: int, every: int, last: bool = False) -> bool:
    """Whether something is due that happens every so many iterations, 0: never, and at the last."""
    return every > 0 and (last or iteration % every == 0)
