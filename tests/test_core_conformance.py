"""Numbers recorded from the public implementations of the method (tests/data/core): they pin the
conventions, not only the formulae. float32 on both sides."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.teachers import guided_velocity
from piflow_minimal import (
    DXPolicy,
    GaussianMixture,
    GMFlowPolicy,
    flow_map_schedule,
    pi_id_loss,
    rollout,
    segment_of,
)

DATA = Path(__file__).parent / "data" / "core"


def load(name: str) -> dict:
    """Arrays of one recording as tensors, its 0-d numbers as Python numbers."""
    with np.load(DATA / f"{name}.npz") as data:
        return {k: torch.from_numpy(v) if v.ndim else v.item() for k, v in data.items()}


def names(pattern: str) -> list[str]:
    found = sorted(path.stem for path in DATA.glob(f"{pattern}.npz"))
    assert found, f"no recording {pattern}"
    return found


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Equal up to `tolerance` times the largest entry."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def close_velocity(ours, theirs, x, t, tolerance: float = 1e-5) -> None:
    """Velocities, or below t = 0.01, where the recording's division by t magnified its rounding
    (a float64 evaluation differs from it as ours does), the denoised states x - t u."""
    near_data = (t < 0.01).view(-1, *[1] * (x.ndim - 1))
    t = t.view(near_data.shape)
    ours, theirs = (torch.where(near_data, x - t * u, u) for u in (ours, theirs))
    for b in range(len(x)):  # sample by sample: the samples' scales differ
        close(ours[b], theirs[b], tolerance)


def gmflow(d: dict) -> GMFlowPolicy:
    return GMFlowPolicy(
        GaussianMixture(d["means"], d["logstds"], d["logweights"]), d["x_src"], d["t_src"]
    )


def test_every_recording_is_used():
    used = ("gmflow_policy", "dx_", "rollout_", "pi_id_", "schedule_", "segments_", "guidance_")
    assert all(path.name.startswith(used) for path in DATA.iterdir())


@pytest.mark.parametrize("variant", ["u", "u_temperature_0p3", "u_dropped"])
def test_gmflow_velocity(variant):
    d = load("gmflow_policy")
    policy = gmflow(d)
    if variant == "u_temperature_0p3":
        policy = policy.temperature(0.3)
    if variant == "u_dropped":
        policy = policy.drop(d["dropped"].bool())
    for x, t, u in zip(d["x"], d["t"], d[variant], strict=True):
        close_velocity(policy.velocity(x, t), u, x, t)


@pytest.mark.parametrize("name", names("dx_policy_*"))
def test_dx_velocity(name):
    d = load(name)
    mode = "polynomial" if "polynomial" in name else "grid"
    policy = DXPolicy(
        d["velocities"], d["x_src"], d["t_src"], d["segment_size"], d["shift"], mode=mode
    )
    for x, t, u in zip(d["x"], d["t"], d["u"], strict=True):
        close_velocity(policy.velocity(x, t), u, x, t)


@pytest.mark.parametrize("total_substeps", [16, 128])
@pytest.mark.parametrize("name", names("rollout_*"))
def test_rollout(name, total_substeps):
    d = load(name)
    if "gmflow" in name:
        policy = gmflow(d)
    else:
        policy = DXPolicy(d["velocities"], d["x_src"], d["t_src"], d["segment_size"], d["shift"])
    args = (policy, d["x_src"], d["tau_src"], d["tau_end"], d["shift"], total_substeps)
    close(rollout(*args), d[f"x_end_{total_substeps}"], 1e-4)


@pytest.mark.parametrize("name", names("pi_id_*"))
def test_pi_id(name):
    d = load(name)
    mixture = GaussianMixture(*(d[k].requires_grad_() for k in GaussianMixture._fields))
    out = pi_id_loss(
        GMFlowPolicy(mixture, d["x_src"], d["t_src"]),
        lambda x, t: torch.tanh(x) * (1 + t).view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1),
        d["tau_src"],
        d["segment_size"],
        d["shift"],
        num_intermediates=d["num_intermediates"],
        teacher_ratio=d["teacher_ratio"],
        window_substeps=d["window_substeps"],
        uniforms=(d["student_uniforms"], d["teacher_uniforms"]),
    )
    out.loss.backward()
    close(out.t, d["t"], 1e-5)
    close(out.u_teacher, d["u_teacher"], 1e-4)
    close(out.u_policy, d["u_pred"], 1e-4)
    close(out.x_dst, d["x_dst"], 1e-4)
    assert out.loss.item() == pytest.approx(d["mse"], rel=1e-4)
    for key in GaussianMixture._fields:
        close(getattr(mixture, key).grad, d[f"grad_{key}"], 2e-4)


@pytest.mark.parametrize("name", names("schedule_*"))
def test_schedule(name):
    d = load(name)
    nfe, final, h = (part.lstrip("abcdefghijklmnopqrstuvwxyz") for part in name.split("_")[1:])
    h = "inf" if name.endswith("hinf") else h
    schedule = flow_map_schedule(int(nfe), d["shift"], float(final), float(h))
    for key in schedule._fields:
        assert torch.allclose(getattr(schedule, key), d[key], atol=1e-5), key


@pytest.mark.parametrize("name", names("segments_*"))
def test_segments(name):
    d = load(name)
    nfe, final = int(name.split("_")[1][3:]), float(name.split("_")[2][5:])
    tau_src, segment_size = segment_of(d["tau"], nfe, final)
    assert torch.allclose(tau_src, d["tau_src"], atol=1e-6)
    assert torch.allclose(segment_size, d["segment_size"], atol=1e-6)
    for i in range(0, len(d["tau"]), 17):  # floats in, floats out
        one = segment_of(d["tau"][i].item(), nfe, final)
        assert one == pytest.approx((d["tau_src"][i].item(), d["segment_size"][i].item()), abs=1e-6)


@pytest.mark.parametrize("name", names("guidance_*"))
def test_guidance(name):
    d = load(name)
    orthogonal = float(name.removeprefix("guidance_orthogonal"))
    u = guided_velocity(
        d["u_cond"], d["u_uncond"], d["scale"], d["t"], d["interval"].tolist(), d["x"], orthogonal
    )
    close(u, d["u"], 1e-5)
