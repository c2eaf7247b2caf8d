"""pi-ID against behaviour cloning on the plane: where on-policy queries pay, and where not.

    python -m benchmarks.cloning                             # about ten core-minutes
    python -m benchmarks.cloning --cases "DX, N = 20" --iterations 4000

Both train the same student with the same loss and the same iterations. They differ in the states
at which the teacher is queried: pi-ID's lie on the rollout of the detached policy, cloning's on
the teacher's own trajectory from the same noise. Cloning pays for that trajectory, 16 teacher
evaluations per unit of time and two for the loss, against two in all: the row `equal cost` gives it
a ninth of the iterations. On images an evaluation is what costs: see benchmarks.recipes.

The endpoint RMSE (to 64 Heun steps of the teacher) measures the pairing, the energy distance to
data the distribution; mean and standard deviation over seeds of weights and draws.
"""

import copy
import statistics
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import toy_2d
from benchmarks.timing import print_table
from common.cli import keep_freed_memory, parse, run_cli, setting
from common.teachers import endpoint_rmse, integrate_teacher
from piflow_minimal import Policy, Teacher, Time, pi_id_data_free

TEACHER_SUBSTEPS = 16  # deis, per unit of time: cloning's trajectory
BATCH = 128


class Case(NamedTuple):
    """What a case changes."""

    policy: str = "gmflow"
    components: int = 32
    nfe: int = 1
    width: int = 256
    depth: int = 3
    t_power: float = 1.0  # a squared velocity error counts t^t_power
    dropout: float = 0.0  # of components in pi-ID's rollout
    length: float = 1.0  #  times the iterations
    density: str = "checkerboard"
    cloning: float = 1.0  # times the iterations, for cloning


CASES = {
    "GMFlow, K = 32": Case(),
    "equal cost": Case(cloning=1 / 9),
    "four times as long": Case(length=4.0),
    "K = 4": Case(components=4),
    "weak: K = 4, width 8": Case(components=4, width=8, depth=1),
    "dropout 0.1": Case(dropout=0.1),
    "two segments": Case(nfe=2),
    "four segments": Case(nfe=4),
    "DX, N = 20": Case("dx", 20, t_power=2.0),
    "DX, four segments": Case("dx", 20, nfe=4, t_power=2.0),
    "density pi": Case(density="pi"),
}


@dataclass(frozen=True)
class Settings:
    """Flags of the benchmark."""

    cases: tuple[str, ...] = setting(tuple(CASES), "cases to train", choices=CASES)
    seeds: tuple[int, ...] = setting((0, 1, 2), "seeds of weights and draws", low=0)
    iterations: int = setting(400, "optimizer steps of each run", low=1)
    points: int = setting(4000, "noises of the metrics", low=100)


class TeacherAsPolicy:
    """A teacher where a policy is expected: its rollout is the teacher's trajectory."""

    def __init__(self, teacher: Teacher):
        self.velocity = teacher


class Cloned:
    """A policy whose detached copy is the teacher: `pi_id_loss` of it is behaviour cloning."""

    def __init__(self, policy: Policy, teacher: Teacher):
        self.policy, self.teacher = policy, teacher
        self.x_src, self.t_src = policy.x_src, policy.t_src

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """The policy's."""
        return self.policy.velocity(x, t)

    def detach(self) -> TeacherAsPolicy:
        """What rolls out: the teacher."""
        return TeacherAsPolicy(self.teacher)


def train(case: Case, cloning: bool, seed: int, iterations: int) -> toy_2d.Student:
    """One student, from noise through all segments (Algorithm 3). -> its moving average."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    teacher = toy_2d.make_density(case.density).velocity
    student = toy_2d.Student(case.policy, case.components, case.nfe, case.width, case.depth)
    ema = copy.deepcopy(student).requires_grad_(False)
    weights, averaged = list(student.parameters()), list(ema.parameters())
    adam = torch.optim.Adam(weights, lr=3e-3, betas=(0.9, 0.99))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, iterations)
    options = {"solver": student.kind.solver, "total_substeps": 10 * case.nfe}
    if cloning:
        options = {"solver": "deis", "total_substeps": TEACHER_SUBSTEPS}
    elif case.dropout:
        options["dropout"] = case.dropout

    def learner(x_src: Tensor, t_src: Tensor) -> Policy:
        policy = student(x_src, t_src)
        return Cloned(policy, teacher) if cloning else policy

    for i in range(iterations):
        left = 1 - 0.9 * toy_2d.stratified((BATCH, 2), generator)
        uniforms = 1 - left**1.5, left[:, 1:]  #  denser near data, as the substeps of deis
        noise = torch.randn(BATCH, 2, generator=generator)
        segments = pi_id_data_free(
            learner, teacher, noise, case.nfe, uniforms=uniforms, generator=generator,
            batch_teacher=True, **options,
        )  # fmt: skip
        adam.zero_grad()
        for size, out in segments:
            square = (out.u_policy - out.u_teacher).square().mean(1)
            (size * (out.t**case.t_power * square).mean()).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()
        cosine.step()
        torch._foreach_lerp_(averaged, [w.detach() for w in weights], 1 - (1 - 1 / (i + 1)) ** 8)
    return ema.eval()


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation; the value alone if there is one."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} +- {statistics.stdev(values):.{digits}f}"


def measure(case: Case, cloning: bool, settings: Settings) -> list[str]:
    """-> endpoint RMSE and energy distance of one case."""
    density, generator = toy_2d.make_density(case.density), torch.Generator().manual_seed(1)
    noise = torch.randn(settings.points, 2, generator=generator)
    data = density.sample(settings.points, generator)
    end = integrate_teacher(density.velocity, noise, toy_2d.STEPS, solver="heun")
    iterations = max(1, round(settings.iterations * case.length * (case.cloning if cloning else 1)))
    students = [train(case, cloning, seed, iterations) for seed in settings.seeds]
    ends = [toy_2d.student_sample(student, noise).detach() for student in students]
    distances = [toy_2d.energy_distance(x, data) for x in ends]
    return [spread([endpoint_rmse(x, end) for x in ends], 3), spread(distances, 4)]


def main(argv: list[str] | None = None) -> None:
    """Trains every case in both ways and prints the table after each."""
    torch.set_num_threads(1)  # a second one gains little on small tensors, and may cost much
    settings = parse(Settings, __doc__, argv)
    keep_freed_memory()
    header = ["case", "RMSE, pi-ID", "RMSE, cloning", "distance, pi-ID", "distance, cloning"]
    rows = []
    for name in settings.cases:
        imitation, cloning = (measure(CASES[name], way, settings) for way in (False, True))
        rows.append([name, imitation[0], cloning[0], imitation[1], cloning[1]])
        print_table(header, rows)


if __name__ == "__main__":
    run_cli(main)
