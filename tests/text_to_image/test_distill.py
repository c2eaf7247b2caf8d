"""LoRA distillation of the text-to-image families, on their small stand-ins."""

import copy
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs requirements-extra.txt (diffusers)")
pytest.importorskip("transformers", reason="needs requirements-extra.txt (transformers)")
pytest.importorskip("peft", reason="needs requirements-extra.txt (peft)")

from safetensors import safe_open  # noqa: E402

import text_to_image.distill as distill  # noqa: E402
import text_to_image.families as dm  # noqa: E402
from common.cli import parse  # noqa: E402
from common.teachers import guided_velocity  # noqa: E402
from imagenet.distributed import Place  # noqa: E402
from piflow_minimal import pi_id_loss, segment_of, shift_time  # noqa: E402
from tests.two_processes import run_two  # noqa: E402
from text_to_image import cache_prompts  # noqa: E402
from text_to_image.adapters import apply_adapter, policy_of, read_adapter  # noqa: E402
from text_to_image.distill import PRESETS, Settings  # noqa: E402
from text_to_image.monitor import memory_needed  # noqa: E402
from text_to_image.student import TwoRoles, export_adapter, make_student, make_teacher  # noqa: E402
from text_to_image.tiny_models import tiny_pipeline  # noqa: E402

DATA = Path(__file__).parent.parent / "data" / "t2i"
PLACE = Place(0, 1, torch.device("cpu"))
FAST = [
    "--tiny", "--iterations", "4", "--batch", "4", "--micro-batch", "2", "--picture-every", "0",
    "--total-substeps", "16", "--log-every", "1", "--save-every", "2", "--warmup", "1",
]  # fmt: skip


def small(preset: str, **changes) -> Settings:
    settings = distill.tiny(PRESETS[preset])
    return replace(settings, batch=2, micro_batch=2, total_substeps=16, **changes)


def random_conditions(net, rows: int = 2, length: int = 5, seed: int = 1) -> dm.Conditions:
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(rows, length, net.config.joint_attention_dim, generator=generator)
    width = net.config.get("pooled_projection_dim")
    return dm.Conditions(
        embeds, pooled=torch.randn(rows, width, generator=generator) if width else None
    )


class Setup:
    """Roles on a tiny base with a step or more behind them; `untouched` is the base alone."""

    def __init__(self, settings: Settings, steps: int = 0):
        self.family = dm.FAMILIES[settings.family]
        net = tiny_pipeline(self.family).transformer
        self.untouched, self.settings = copy.deepcopy(net), settings
        torch.manual_seed(0)
        self.roles = TwoRoles(net, settings)
        net.train()
        self.conditions = random_conditions(net)
        self.negative = random_conditions(net, 1, 3, 2)
        generator = torch.Generator().manual_seed(3)
        self.x, self.t = torch.randn(2, 4, 4, 6, generator=generator), torch.tensor([0.9, 0.4])
        self.student = make_student(self.roles, self.conditions)
        self.teacher = make_teacher(self.roles, self.conditions, self.negative)
        optimizer = torch.optim.AdamW(self.roles.trained().values(), 1e-2)
        for _ in range(steps):
            policy = self.student(self.x, self.t)
            size = segment_of(1.0, 4, 0.5)[1]
            loss = pi_id_loss(
                policy, self.teacher, 0.9, size, total_substeps=8, window_substeps=1
            ).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def base_velocity(setup: Setup, x, t, conditions, embedded):
    """The untouched base, by a call of its own."""
    inputs = dm.network_inputs(setup.family, x, t, conditions, embedded)
    with torch.no_grad():
        return dm.unpack(setup.untouched(**inputs, return_dict=False)[0], x)


# ---- One base, two roles -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, family", [("gm-qwen", "qwen"), ("dx-flux", "flux"), ("gm-flux", "flux2")]
)
def test_the_teacher_is_the_base_before_and_after_training(preset, family):
    setup = Setup(small(preset, family=family))

    def check():
        if setup.family.guidance is None:
            unguided = dm.Conditions(setup.negative.embeds.expand(2, -1, -1))
            both = dm.Conditions.stack([setup.conditions, unguided])
            twice = torch.cat([setup.x, setup.x]), torch.cat([setup.t, setup.t])
            u = base_velocity(setup, *twice, both, None)
            expected = guided_velocity(*u.chunk(2), setup.settings.guidance, setup.t)
        else:
            expected = base_velocity(
                setup, setup.x, setup.t, setup.conditions, setup.settings.guidance
            )
        assert torch.equal(setup.teacher(setup.x, setup.t), expected)

    check()
    before = {k: v.clone() for k, v in setup.roles.net.state_dict().items()}
    optimizer = torch.optim.AdamW(setup.roles.trained().values(), 1e-2)
    for _ in range(2):
        out = pi_id_loss(setup.student(setup.x, setup.t), setup.teacher, 0.9, 0.2, total_substeps=8)
        out.loss.backward()
        optimizer.step()
    check()
    trained = setup.roles.trained()
    for name, parameter in setup.roles.net.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
    after = setup.roles.net.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and changed <= trained.keys()  # no buffer either
    for name, value in setup.untouched.state_dict().items():  # and the base is all still there
        mapped = name.replace("norm_out.", "norm_out.frozen.").replace(
            "proj_out.", "proj_out.frozen."
        )
        found = [after[k] for k in (name, mapped, _in_lora(name)) if k in after]
        assert found and torch.equal(found[0], value), name


def _in_lora(name: str) -> str:
    module, _, last = name.rpartition(".")
    return f"{module}.base_layer.{last}"


def test_an_error_inside_the_block_leaves_the_student_on():
    setup = Setup(small("gm-qwen"), steps=1)
    before = setup.student(setup.x, setup.t).mixture.means
    with pytest.raises(RuntimeError), setup.roles.teacher():
        raise RuntimeError
    assert torch.equal(setup.student(setup.x, setup.t).mixture.means, before)


@pytest.mark.parametrize("preset", ["gm-flux", "dx-qwen"])
def test_the_untrained_student_repeats_the_base(preset):
    setup = Setup(small(preset))
    embedded = setup.settings.guidance if setup.family.guidance else None
    u = base_velocity(setup, setup.x, setup.t, setup.conditions, embedded)
    policy = setup.student(setup.x, setup.t)
    if preset.startswith("dx"):
        torch.testing.assert_close(policy.velocities, u[:, None].expand(-1, 10, -1, -1, -1))
        return
    means, logstds, logweights = policy.mixture
    noise = means - u[:, None]
    per_channel = noise[:1, :, :, :1, :1]
    torch.testing.assert_close(noise, per_channel.expand_as(noise), atol=1e-5, rtol=0)
    assert 0.03 < per_channel.std() < 0.08  # K C draws of std 0.05
    torch.testing.assert_close(logstds.flatten(), torch.full((2,), math.log(0.05)))
    torch.testing.assert_close(logweights, torch.full_like(logweights, -math.log(8)))


def test_lora_rank_larger_than_a_layer():
    with pytest.raises(ValueError, match="--lora-rank 25: layer .* is 256 x 24"):
        TwoRoles(tiny_pipeline(dm.FAMILIES["flux"]).transformer, small("gm-flux", lora_rank=25))


def test_a_base_of_another_family():
    net = tiny_pipeline(dm.FAMILIES["qwen"]).transformer
    with pytest.raises(ValueError, match="--family flux needs a FluxTransformer2DModel, the base"):
        TwoRoles(net, small("gm-flux"))


# ---- Presets and export --------------------------------------------------------------------------


def test_presets_are_the_published_table():
    rows = {
        name: (s.family, s.policy, s.components, s.nfe, s.iterations, s.num_intermediates,
               s.mixing_iterations, s.guidance, s.dropout)
        for name, s in PRESETS.items()
    }  # fmt: skip
    assert rows == {
        "gm-qwen": ("qwen", "gmflow", 8, 4, 9000, 2, 0, 4.0, 0.1),
        "dx-qwen": ("qwen", "dx", 10, 4, 9000, 2, 0, 4.0, 0.0),
        "gm-flux": ("flux", "gmflow", 8, 4, 3000, 4, 2000, 3.5, 0.1),
        "gm-flux-8step": ("flux", "gmflow", 8, 8, 3000, 4, 2000, 3.5, 0.1),
        "dx-flux": ("flux", "dx", 10, 4, 3000, 4, 2000, 3.5, 0.0),
    }
    assert PRESETS["dx-qwen"].spec.segment_size == pytest.approx(1 / 3.5)
    flux = PRESETS["gm-flux"]
    assert [flux.teacher_ratio(i) for i in (0, 1000, 2000, 2999)] == [1.0, 0.5, 0.0, 0.0]


CASES = {
    "gm-qwen": "gmqwen", "dx-qwen": "dxqwen", "gm-flux": "gmflux", "gm-flux-8step": "gmflux",
    "dx-flux": "dxflux", "flux2": "gmflux2",
}  # fmt: skip


@pytest.mark.parametrize("preset", CASES)
def test_export_round_trip(preset, tmp_path):
    """The exported adapter, put on a fresh base by `generate`'s code, is the trained student."""
    settings = small("gm-flux", family="flux2") if preset == "flux2" else small(preset)
    setup = Setup(settings, steps=2)
    setup.roles.net.eval()
    weights = {k: p.detach() for k, p in setup.roles.trained().items()}
    export_adapter(str(tmp_path), setup.roles, weights)

    with safe_open(
        DATA / CASES[preset] / "adapter" / "diffusion_pytorch_model.safetensors", "pt"
    ) as f:
        published, policy = set(f.keys()), json.loads(f.metadata()["policy_config"])
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as f:
        assert set(f.keys()) == published
        assert json.loads(f.metadata()["policy_config"]) == policy
    config = json.loads((tmp_path / "config.json").read_text())
    recorded = json.loads((DATA / CASES[preset] / "adapter" / "config.json").read_text())
    assert recorded.keys() <= config.keys() and config["_class_name"] == recorded["_class_name"]

    adapter = read_adapter(str(tmp_path))
    apply_adapter(setup.untouched, adapter)
    embedded = settings.guidance if setup.family.guidance else None
    inputs = dm.network_inputs(setup.family, setup.x, setup.t, setup.conditions, embedded)
    with torch.no_grad():
        output = setup.untouched(**inputs, return_dict=False)[0]
        policy = policy_of(adapter).build(output, setup.x, setup.t)
        trained = setup.student(setup.x, setup.t)
        at = shift_time(torch.tensor(0.3), 3.2)
        actual, expected = (p.velocity(setup.x, at) for p in (policy, trained))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    fresh = Setup(settings).student(setup.x, setup.t).velocity(setup.x, at)
    assert (fresh - expected).abs().max() > 1e-3  # training changed something


# ---- The gradient of an iteration ----------------------------------------------------------------


def test_gradients_are_summed_over_segments_weighted_by_size(tmp_path, monkeypatch):
    """One iteration of `backward` against Algorithm 3 written out."""
    sizes = distill.TINY_SIZES
    monkeypatch.setattr(distill.Settings, "sizes", sizes)
    settings = small("gm-qwen", out=str(tmp_path), dropout=0.0, window_substeps=2)
    run, prompts, pipe = distill.prepare(settings, PLACE)
    losses = distill.backward(run, prompts, pipe)
    actual = [p.grad.clone() for p in run.weights]

    rows = prompts.micro_batches(2, 2, 0, 0)[0]
    generator = distill.draw_generator(settings, 0, 0)
    size = sizes[int(torch.randint(len(sizes), (), generator=generator))]
    x = torch.randn(2, *dm.latent_shape(pipe, *size), generator=generator)
    student = make_student(run.roles, prompts.conditions(rows))
    teacher = make_teacher(run.roles, prompts.conditions(rows), prompts.negative)
    total, expected_losses = 0.0, []
    for i in range(4):
        length = (1 if i < 3 else 0.5) / 3.5
        tau = 1 - i / 3.5
        policy = student(x, torch.full((2,), 3.2 * tau / (1 + 2.2 * tau)))
        out = pi_id_loss(
            policy, teacher, tau, length, 3.2, 16, 2, window_substeps=2, generator=generator
        )
        total = total + length * out.loss
        expected_losses.append(length * out.loss.detach())
        x = out.x_dst
    expected = torch.autograd.grad(15 * total, list(run.weights))
    torch.testing.assert_close(losses, torch.stack(expected_losses), atol=1e-7, rtol=1e-4)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


def test_micro_batches_and_checkpointing_do_not_change_the_gradient(tmp_path):
    gradients = []
    for name, checkpointing in (("a", False), ("b", True)):
        settings = small("gm-flux", out=str(tmp_path / name), checkpointing=checkpointing)
        run, prompts, pipe = distill.prepare(replace(settings, lora_dropout=0.3), PLACE)
        distill.backward(run, prompts, pipe)
        gradients.append([p.grad for p in run.weights])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


# ---- Runs ----------------------------------------------------------------------------------------


def losses_of(folder: Path) -> list[float]:
    lines = (folder / "stats.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]


def checkpoint(folder: Path) -> dict:
    newest = max((folder / "checkpoints").iterdir())
    return torch.load(newest, weights_only=True)


def test_resume_is_bit_for_bit(tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    argv = [*FAST, "--preset", "gm-flux", "--lora-dropout", "0.1", "--ema-start", "1"]
    distill.main([*argv, "--out", str(whole)])
    distill.main([*argv, "--out", str(halves), "--iterations", "2"])
    distill.main([*argv, "--out", str(halves)])
    assert losses_of(whole) == losses_of(halves) and len(losses_of(whole)) == 4
    a, b = checkpoint(whole), checkpoint(halves)
    for part in ("weights", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    names = "adapter/diffusion_pytorch_model.safetensors"
    assert (whole / names).read_bytes() == (halves / names).read_bytes()
    trained = sum(value.numel() for value in a["weights"].values())
    assert (max((whole / "checkpoints").iterdir())).stat().st_size < 4 * 4.5 * trained + 400_000
    with pytest.raises(ValueError, match="lr"):
        distill.main([*argv, "--out", str(halves), "--lr", "0.5"])


@pytest.mark.slow
def test_two_processes_with_and_without_shard_give_the_losses_of_one(tmp_path):
    argv = [*FAST, "--preset", "gm-qwen", "--iterations", "3", "--ema-start", "1"]
    argv += ["--picture-every", "3", "--pictures", "1", "--teacher-steps", "2"]
    distill.main([*argv, "--out", str(tmp_path / "one")])
    run_two("text_to_image.distill", [*argv, "--out", str(tmp_path / "two")])
    run_two("text_to_image.distill", [*argv, "--shard", "--out", str(tmp_path / "sharded")])
    ends = [
        json.loads((tmp_path / name / "stats.jsonl").read_text().splitlines()[-1])["endpoint_rmse"]
        for name in ("one", "two", "sharded")
    ]
    assert ends[1:] == pytest.approx(ends[:1] * 2, rel=1e-3)
    one = losses_of(tmp_path / "one")
    assert losses_of(tmp_path / "two") == pytest.approx(one, rel=1e-4)
    assert losses_of(tmp_path / "sharded") == pytest.approx(one, rel=1e-4)
    a, b = (checkpoint(tmp_path / name)["ema"] for name in ("one", "sharded"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-4, rtol=1e-3)
    configs = [(tmp_path / name / "adapter/config.json").read_text() for name in ("one", "sharded")]
    assert configs[0] == configs[1]
    distill.main(
        [*argv, "--out", str(tmp_path / "sharded"), "--iterations", "4"]
    )  # fewer processes


def test_data_dependent(tmp_path):
    """Algorithm 2 from cached image latents: one random segment per sample."""
    from PIL import Image

    Image.new("RGB", (40, 32), (200, 30, 90)).save(tmp_path / "a.png")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a bag", "file": "a.png"}\n' * 2)
    cache_prompts.main([
        str(tmp_path / "prompts.jsonl"), "--family", "flux", "--tiny", "--images", "file",
        "--size", "32", "--max-length", "16", "--device", "cpu", "--out", str(tmp_path / "cache"),
    ])  # fmt: skip
    argv = [*FAST, "--preset", "dx-flux", "--iterations", "2", "--prompts", str(tmp_path / "cache")]
    distill.main([*argv, "--data-dependent", "--out", str(tmp_path / "run")])
    lines = (tmp_path / "run" / "stats.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["loss_by_segment"]) for line in lines] == [1, 1]
    assert all(0 < loss < 10 for loss in losses_of(tmp_path / "run"))


def test_generate_draws_with_the_adapter(tmp_path):
    from text_to_image.generate import main as generate

    argv = [*FAST, "--preset", "dx-qwen", "--iterations", "2", "--picture-every", "2"]
    distill.main([*argv, "--teacher-steps", "4", "--pictures", "2", "--out", str(tmp_path / "run")])
    assert (tmp_path / "run" / "pictures" / "step_00000002.png").is_file()
    first, last = ((tmp_path / "run" / "stats.jsonl").read_text().splitlines()[i] for i in (0, -1))
    assert json.loads(first).keys() == {"iteration", "endpoint_rmse", "euler_rmse"}
    assert json.loads(last)["endpoint_rmse"] > 0
    generate([
        "--tiny", "--model", "dx-qwen", "--adapter", str(tmp_path / "run" / "adapter"), "--prompt",
        "a bag", "--height", "64", "--width", "64", "--out", str(tmp_path / "pictures"),
    ])  # fmt: skip
    assert list((tmp_path / "pictures").glob("*.png"))


def test_a_base_from_a_folder_in_bfloat16(tmp_path, monkeypatch, capsys):
    """What a real run does: prompts cached beforehand, no text encoder, bfloat16 base."""
    base, cache = str(tmp_path / "base"), tmp_path / "prompts"
    tiny_pipeline(dm.FAMILIES["flux"]).save_pretrained(base)
    (tmp_path / "prompts.txt").write_text("a bag\na coat\n")
    cache_prompts.main([
        str(tmp_path / "prompts.txt"), "--family", "flux", "--base", base, "--out", str(cache),
        "--max-length", "16", "--device", "cpu",
    ])  # fmt: skip
    shutil.rmtree(Path(base) / "text_encoder_2")
    monkeypatch.setattr(distill, "SIZES", ((64, 64),))
    distill.main([
        "--preset", "dx-flux", "--base", base, "--prompts", str(cache), "--lora-rank", "4",
        "--iterations", "2", "--batch", "2", "--total-substeps", "16", "--log-every", "1",
        "--pictures", "1", "--teacher-steps", "2", "--device", "cpu",
        "--out", str(tmp_path / "run"),
    ])  # fmt: skip
    assert "memory: about" in capsys.readouterr().out
    assert all(math.isfinite(loss) for loss in losses_of(tmp_path / "run"))
    assert {v.dtype for v in checkpoint(tmp_path / "run")["ema"].values()} == {torch.float32}
    with safe_open(tmp_path / "run/adapter/diffusion_pytorch_model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}
    config = tmp_path / "base" / "transformer" / "config.json"  # as FLUX.1-schnell has it
    config.write_text(json.dumps(json.loads(config.read_text()) | {"guidance_embeds": False}))
    with pytest.raises(ValueError, match="embeds no guidance"):
        distill.main([
            "--preset", "dx-flux", "--base", base, "--prompts", str(cache), "--lora-rank", "4",
            "--batch", "2", "--device", "cpu", "--out", str(tmp_path / "other"),
        ])  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_sigterm_saves(tmp_path):
    argv = [*FAST, "--iterations", "100000", "--save-every", "100000", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "text_to_image.distill", *argv]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
    )
    while not (tmp_path / "stats.jsonl").is_file():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "run the same command again" in output
    assert checkpoint(tmp_path)["iteration"] == len(losses_of(tmp_path))


def test_documented_commands_parse():
    folder = Path(distill.__file__).parent
    text = "".join((folder / name).read_text() for name in ("README.md", "distill.py"))
    pattern = r"-m (text_to_image\.(?:distill|cache_prompts))( --.*| [A-Z]\w+/.*|)$"
    commands = re.findall(pattern, re.sub(r" +# .*", "", text), re.M)
    assert len(commands) >= 8
    for module, flags in commands:
        if module.endswith("cache_prompts"):
            parse(cache_prompts.Settings, "", flags.split())
        else:
            distill.parse_arguments(flags.split())


# ---- Bad input and memory ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "--prompts is missing"),
        (["--tiny", "--batch", "6", "--micro-batch", "4"], "--batch 6: must be a multiple"),
        (["--tiny", "--shard"], "--shard splits parameters over processes"),
        (["--tiny", "--policy", "dx"], "--dropout 0.1: a dx policy has no components"),
        (["--preset", "gm-sana"], "--preset is 'gm-sana'; choose one of gm-qwen"),
        (["--tiny", "--data-dependent"], "has no latents"),
    ],
)
def test_bad_settings(argv, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        distill.main([*argv, "--out", str(tmp_path)])
    assert not (tmp_path / "config.json").exists()


def test_memory_is_near_the_published():
    """Published, Qwen: 70 GB on each of many GPUs, 40 and 20 sharded over 2 and 8."""
    qwen = (20_430_401_088, 1_000_000_000, 3072, 60)
    s = replace(PRESETS["gm-qwen"], optimizer="adamw8bit")
    assert 50e9 < memory_needed(s, *qwen, world=1) < 80e9
    sharded = replace(PRESETS["gm-qwen"], shard=True)
    sizes = [memory_needed(sharded, *qwen, world) for world in (2, 8)]
    assert 30e9 < sizes[0] < 45e9 and 10e9 < sizes[1] < 25e9
