"""Makes docs/explorer.html, a page on which a policy can be touched: one file, no network.

    python -m docs.explorer            # from the students in assets/
    python -m docs.explorer --train    # trains both students anew, about two minutes of a core

A student is toy_2d's network with 10,000 weights. It is distilled for 1, 2 and 4 evaluations at
once: its policy at any of the four source levels covers all of [0, t_src], and a sampler with more
evaluations follows each policy less far.
"""

import base64
import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from common.cli import parse, run_cli, setting
from common.files import write_text, writing
from common.teachers import endpoint_rmse, integrate_teacher
from piflow_minimal import pi_id_loss, sample
from toy_2d import Student, make_density, stratified

DOCS = Path(__file__).parent
ASSETS = DOCS.parent / "assets"
SIZE = {"components": 16, "width": 64, "depth": 2, "frequencies": 16}
SOURCES = torch.tensor([1.0, 1.0, 0.75, 0.5, 0.25])  # t_src of 1, 2 and 4 evaluations; 1 most often
SUBSTEPS = 12  # of a rollout from t = 1, in training


@dataclass(frozen=True)
class Settings:
    """What the page is made from."""

    train: bool = setting(False, "training of both students, in place of those in assets/")
    iterations: int = setting(6000, "optimizer steps of each student", low=1)
    batch: int = setting(256, "points per iteration", low=1)
    seed: int = setting(0, "seed of weights, draws and noise", low=0)


def train(policy: str, settings: Settings) -> Student:
    """Distils the checkerboard's exact teacher: pi-ID from t_src to 0, x_src = data plus noise."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    density = make_density("checkerboard")
    student = Student(policy, **SIZE)
    student.frequencies.mul_(0.2)  # a small network learns slow waves
    kind, weights = student.kind, list(student.parameters())
    ema = copy.deepcopy(student).requires_grad_(False)
    averaged = list(ema.parameters())
    adam = torch.optim.Adam(weights, betas=(0.9, 0.99))
    # As in toy_2d: queries where the solver evaluates a policy, not within the last substep.
    grid = 1.5 if kind.solver == "deis" else 1.0
    lowest = 1 / SUBSTEPS if kind.solver == "deis" else 0.0
    options = {"total_substeps": SUBSTEPS, "solver": kind.solver, "batch_teacher": True}

    for i in range(settings.iterations):
        left = 1 - (1 - lowest) * stratified((settings.batch, 2), generator)
        uniforms = 1 - left**grid, left[:, 1:]
        t_src = SOURCES[torch.randint(len(SOURCES), (settings.batch,), generator=generator)]
        eps = torch.randn(settings.batch, 2, generator=generator)
        x_src = torch.lerp(density.sample(settings.batch, generator), eps, t_src[:, None])
        policy = student(x_src, t_src)
        out = pi_id_loss(policy, density.velocity, t_src, t_src, uniforms=uniforms, **options)
        adam.zero_grad()
        out.weighted(kind.t_power).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        done = i / settings.iterations
        schedule = min(1.0, 50 * done + 0.01) * (1 + math.cos(math.pi * done)) / 2
        adam.param_groups[0]["lr"] = 5e-3 * schedule
        adam.step()
        decay = (1 - 1 / (i + 1)) ** 8
        torch._foreach_lerp_(averaged, [w.detach() for w in weights], 1 - decay)
    return ema.eval()


def endpoint_errors(student: Student) -> list[float]:
    """Endpoint RMSE to the teacher (128 Euler steps each) with 1, 2 and 4 evaluations."""
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))
    reference = integrate_teacher(make_density("checkerboard").velocity, noise, 128)
    return [endpoint_rmse(sample(student, noise, nfe), reference) for nfe in (1, 2, 4)]


def student_file(policy: str) -> Path:
    """The student's weights in assets/, with its config in the header."""
    return ASSETS / f"explorer_{policy}.safetensors"


def save(student: Student) -> None:
    """Writes a student into assets/."""
    header = {"config": json.dumps(student.config)}
    with writing(student_file(student.config["policy"])) as path:
        save_file({k: v.contiguous() for k, v in student.state_dict().items()}, path, header)


def load(policy: str) -> Student:
    """The student of the page, in eval mode."""
    with safe_open(student_file(policy), "pt") as file:
        student = Student(**json.loads(file.metadata()["config"]))
        student.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    return student.eval().requires_grad_(False)


def make_page() -> str:
    """The page: the template with its scripts, and the students' files in base64."""
    files = {
        policy: base64.b64encode(student_file(policy).read_bytes()).decode()
        for policy in ("gmflow", "dx")
    }
    parts = {"STUDENTS": f"const STUDENT_FILES = {json.dumps(files)};"}
    for name in ("math", "draw", "page"):
        parts[name.upper()] = (DOCS / f"explorer_{name}.js").read_text(encoding="utf-8")
    page = (DOCS / "explorer_template.html").read_text(encoding="utf-8")
    for mark, text in parts.items():
        page = page.replace(f"/*{mark}*/", text)
    return page


def main(argv: list[str] | None = None) -> None:
    """With --train trains the students; writes docs/explorer.html."""
    torch.set_num_threads(1)  # a second one gains little on small tensors, and may cost much
    settings = parse(Settings, __doc__, argv)
    if settings.train:
        for policy in ("gmflow", "dx"):
            student = train(policy, settings)
            save(student)
            errors = ", ".join(f"{error:.3f}" for error in endpoint_errors(student))
            print(f"{policy}: endpoint RMSE {errors} with 1, 2, 4 evaluations", flush=True)
    page = make_page()
    write_text(DOCS / "explorer.html", page)
    print(f"wrote {DOCS / 'explorer.html'}, {len(page.encode()) / 1000:.0f} kB")


if __name__ == "__main__":
    run_cli(main)
