"""LoRA distillation of the text-to-image families, on their small stand-ins."""

import copy
import json
import math
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs requirements-extra.txt (diffusers)")
pytest.importorskip("transformers", reason="needs requirements-extra.txt (transformers)")
pytest.importorskip("peft", reason="needs requirements-extra.txt (peft)")

import diffusers  # noqa: E402
from safetensors import safe_open  # noqa: E402
from t2i_cases import tiny_pipeline  # noqa: E402

import text_to_image.distill as distill  # noqa: E402
from common.cli import parse  # noqa: E402
from common.processes import Place  # noqa: E402
from common.teachers import guided_velocity  # noqa: E402
from piflow_minimal import pi_id_loss, segment_of, shift_time  # noqa: E402
from tests.two_processes import run_two  # noqa: E402
from text_to_image import cache_prompts  # noqa: E402
from text_to_image.adapters import (  # noqa: E402
    PolicySpec,
    Sampling,
    apply_adapter,
    policy_of,
    read_adapter,
    write_adapter,  # noqa: E402
)
from text_to_image.distill import PRESETS, Settings  # noqa: E402
from text_to_image.families import FAMILIES, Conditions, latent_shape, unpack  # noqa: E402
from text_to_image.student import (  # noqa: E402
    TwoRoles,
    adapter_key,
    adapter_of,
    make_student,
    make_teacher,
)

DATA = Path(__file__).parent.parent / "data" / "t2i"
PLACE = Place(0, 1, torch.device("cpu"))
FAST = [
    "--tiny", "--iterations", "4", "--batch", "4", "--micro-batch", "2", "--picture-every", "0",
    "--total-substeps", "16", "--log-every", "1", "--save-every", "2", "--warmup", "1",
]  # fmt: skip


def small(preset: str, **changes) -> Settings:
    settings = distill.tiny(PRESETS[preset])
    changes = {"batch": 2, "micro_batch": 2, "total_substeps": 16} | changes
    settings = replace(settings, **changes)
    return replace(settings, guidance=FAMILIES[settings.family].guidance)


def random_conditions(net, rows: int = 2, length: int = 5, seed: int = 1) -> Conditions:
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(rows, length, net.config.joint_attention_dim, generator=generator)
    width = net.config.get("pooled_projection_dim")
    return Conditions(
        embeds, pooled=torch.randn(rows, width, generator=generator) if width else None
    )


class Setup:
    """Roles on a tiny base with a step or more behind them; `untouched` is the base alone."""

    def __init__(self, settings: Settings, steps: int = 0, dtype=torch.float32):
        self.family, self.settings = FAMILIES[settings.family], settings
        net = tiny_pipeline(self.family).transformer.to(dtype)
        self.untouched = copy.deepcopy(net)
        torch.manual_seed(0)
        self.roles = distill.two_roles(settings, net)
        net.train()
        self.conditions = random_conditions(net).to("cpu", dtype)
        self.negative = random_conditions(net, 1, 3, 2).to("cpu", dtype)
        self.embedded = settings.guidance if self.family.embeds_guidance else None
        generator = torch.Generator().manual_seed(3)
        self.x, self.t = torch.randn(2, 4, 4, 6, generator=generator), torch.tensor([0.9, 0.4])
        self.student = make_student(self.roles, self.conditions, settings.guidance)
        self.teacher = make_teacher(self.roles, self.conditions, self.negative, settings.guidance)
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

    @torch.no_grad()
    def base_velocity(self, x, t, conditions, embedded):
        """The untouched base, by a call of its own."""
        return unpack(self.family.evaluate(self.untouched, x, t, conditions, embedded), x)


# ---- One base, two roles -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, family", [("gm-qwen", "qwen"), ("dx-flux", "flux"), ("gm-flux", "flux2")]
)
def test_the_teacher_is_the_base_before_and_after_training(preset, family):
    setup = Setup(small(preset, family=family))
    x, t = setup.x, setup.t

    def check():
        if setup.family.embeds_guidance:
            expected = setup.base_velocity(x, t, setup.conditions, setup.settings.guidance)
        else:
            unguided = Conditions(setup.negative.embeds.expand(2, -1, -1))
            both = Conditions.stack([setup.conditions, unguided])
            u = setup.base_velocity(torch.cat([x, x]), torch.cat([t, t]), both, None)
            expected = guided_velocity(*u.chunk(2), setup.settings.guidance, t)
        assert torch.equal(setup.teacher(x, t), expected)

    check()
    before = {k: v.clone() for k, v in setup.roles.net.state_dict().items()}
    optimizer = torch.optim.AdamW(setup.roles.trained().values(), 1e-2)
    for _ in range(2):
        out = pi_id_loss(setup.student(x, t), setup.teacher, 0.9, 0.2, total_substeps=8)
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
    u = setup.base_velocity(setup.x, setup.t, setup.conditions, setup.embedded)
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


def test_the_untrained_polynomial_has_order_0_alone():
    """Orders above 0 are zero; the public code then adds x_src to each coefficient."""
    setup = Setup(small("dx-qwen-p10"))
    u = setup.base_velocity(setup.x, setup.t, setup.conditions, None)
    policy = setup.student(setup.x, setup.t)
    torch.testing.assert_close(policy.velocities[:, 0], u)
    assert policy.velocities.shape[1] == 10 and not policy.velocities[:, 1:].any()
    t = torch.tensor([0.5, 0.2])
    tau_src, tau = (v / (v + 3.2 * (1 - v)) for v in (setup.t, t))
    powers = sum((tau_src - tau) ** i for i in range(1, 10)).view(-1, 1, 1, 1)
    x0_hat = setup.x - setup.t.view(-1, 1, 1, 1) * u + powers * setup.x
    torch.testing.assert_close(policy.x0_hat(t), x0_hat, atol=1e-5, rtol=1e-5)


def test_the_initial_weights_are_the_published_ones():
    """A ~ N(0, 1/rank) with 1/rank as the standard deviation (peft's "gaussian"), at any width."""
    with torch.device("meta"):
        net = diffusers.QwenImageTransformer2DModel(num_layers=2, joint_attention_dim=64)
    net.to_empty(device="cpu")  # pages that nobody touches cost nothing
    torch.nn.init.zeros_(net.proj_out.weight)
    torch.nn.init.zeros_(net.proj_out.bias)
    torch.manual_seed(0)
    roles = TwoRoles(net, FAMILIES["qwen"], PolicySpec("GMFlow"), lora_rank=256)
    mlp = net.transformer_blocks[0].img_mlp.net
    embedder = net.time_text_embed.timestep_embedder.linear_1
    for layer, width in ((mlp[0].proj, 3072), (mlp[2], 12288), (embedder, 256)):
        a, b = (part["piflow"].weight for part in (layer.lora_A, layer.lora_B))
        assert a.shape == (256, width) and not b.any()
        assert a.std().item() == pytest.approx(1 / 256, rel=0.01)
        assert layer.scaling == {"piflow": 1.0}
        assert layer.lora_dropout["piflow"].p == 0.05
    hidden, last = net.proj_out.student.logstds[1], net.proj_out.student.logstds[3]
    assert hidden.weight.shape == (1024, 3072) and not hidden.bias.any()  # Xavier:
    assert hidden.weight.std().item() == pytest.approx(math.sqrt(2 / (1024 + 3072)), rel=0.01)
    assert not last.weight.any() and last.bias.item() == pytest.approx(math.log(0.05))
    assert "transformer_blocks.1.txt_mlp.net.2.lora_A.piflow.weight" not in roles.trained()
    assert "transformer_blocks.0.txt_mlp.net.2.lora_A.piflow.weight" in roles.trained()


def test_autocast_is_around_the_trained_modules_alone():
    """Base in bfloat16: teacher and frozen layers run as they were loaded, the head in bfloat16."""
    setup = Setup(small("gm-flux"), dtype=torch.bfloat16)
    enabled = {}

    def note(name):
        def hook(module, inputs, output):
            enabled[name] = torch.is_autocast_enabled("cpu"), output.dtype

        return hook

    block = setup.roles.net.transformer_blocks[0]
    hooks = {
        "frozen": block.attn.to_q, "norm": block.norm2,
        "head": setup.roles.switches[1].student.means, "lora": block.ff.net[2].lora_A["piflow"],
    }  # fmt: skip
    for name, module in hooks.items():
        module.register_forward_hook(note(name))
    setup.student(setup.x, setup.t)
    bf16 = torch.bfloat16
    assert enabled == {
        "frozen": (False, bf16), "norm": (False, bf16), "head": (True, bf16), "lora": (True, bf16)
    }  # fmt: skip
    u = setup.base_velocity(setup.x, setup.t, setup.conditions, setup.embedded).float()
    assert torch.equal(setup.teacher(setup.x, setup.t), u)
    assert {p.dtype for p in setup.roles.trained().values()} == {torch.float32}


# ---- Presets and export --------------------------------------------------------------------------


def test_presets_are_the_published_table():
    rows = {
        name: (s.family, s.policy, s.components, s.nfe, s.iterations, s.batch, s.num_intermediates,
               s.mixing_iterations, s.dropout)
        for name, s in PRESETS.items()
    }  # fmt: skip
    assert rows == {
        "gm-qwen": ("qwen", "gmflow", 8, 4, 9000, 64, 2, None, 0.1),
        "dx-qwen": ("qwen", "dx", 10, 4, 9000, 64, 2, None, 0.0),
        "dx-qwen-p10": ("qwen", "dx-polynomial", 10, 4, 9000, 64, 2, None, 0.0),
        "gm-flux": ("flux", "gmflow", 8, 4, 3000, 64, 4, 2000, 0.1),
        "gm-flux-8step": ("flux", "gmflow", 8, 8, 3000, 32, 4, 2000, 0.1),
        "dx-flux": ("flux", "dx", 10, 4, 3000, 64, 4, 2000, 0.0),
    }
    common = {
        "loss_scale": 15.0, "window_substeps": 3, "total_substeps": 128, "lr": 1e-4, "beta2": 0.95,
        "warmup": 100, "clip": 50.0, "clip_start": 100, "ema_start": 100, "ema_gamma": 7.0,
        "lr_decay": "none", "time_weight": 0.0, "lora_rank": 256, "lora_dropout": 0.05,
    }  # fmt: skip
    for preset in PRESETS.values():
        assert {name: getattr(preset, name) for name in common} == common
    assert (distill.SHIFT, distill.FINAL_STEP_SIZE_SCALE) == (3.2, 0.5)
    assert PRESETS["dx-qwen"].spec.options["segment_size"] == pytest.approx(1 / 3.5)
    flux = PRESETS["gm-flux"]
    assert [flux.teacher_ratio(i) for i in (0, 1000, 2000, 2999)] == [1.0, 0.5, 0.0, 0.0]
    assert PRESETS["gm-qwen"].teacher_ratio(0) == 0.0


@pytest.mark.parametrize(
    "argv, guidance, batch",
    [
        ("", 4.0, 64),
        ("--preset gm-flux", 3.5, 64),
        ("--family flux", 3.5, 64),
        ("--preset gm-flux --family flux2", 4.0, 64),
        ("--preset dx-flux --guidance 2", 2.0, 64),
        ("--tiny", 2.5, 4),
        ("--tiny --family flux", 3.5, 4),
        ("--preset gm-flux-8step --data-dependent", 3.5, 256),
    ],
)
def test_a_family_brings_its_guidance_and_images_their_batch(argv, guidance, batch):
    settings = distill.parse_arguments(argv.split())
    assert (settings.guidance, settings.batch) == (guidance, batch)


CASES = {
    "gm-qwen": "gmqwen", "dx-qwen": "dxqwen", "dx-qwen-p10": "dxqwen_poly", "gm-flux": "gmflux",
    "gm-flux-8step": "gmflux", "dx-flux": "dxflux", "flux2": "gmflux2",
}  # fmt: skip


@pytest.mark.parametrize("preset", CASES)
def test_export_round_trip(preset, tmp_path):
    """The exported adapter, put on a fresh base by `generate`'s code, is the trained student."""
    settings = small("gm-flux", family="flux2") if preset == "flux2" else small(preset)
    setup = Setup(settings, steps=2)
    setup.roles.net.eval()
    weights = {k: p.detach() for k, p in setup.roles.trained().items()}
    write_adapter(str(tmp_path), adapter_of(setup.roles, weights, distill.sampling(settings)))

    published = DATA / CASES[preset] / "adapter"
    with safe_open(published / "diffusion_pytorch_model.safetensors", "pt") as f:
        names, policy = set(f.keys()), json.loads(f.metadata()["policy_config"])
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as f:
        assert set(f.keys()) == names
        assert json.loads(f.metadata()["policy_config"]) == policy
    config = json.loads((tmp_path / "config.json").read_text())
    recorded = json.loads((published / "config.json").read_text())
    assert recorded.keys() <= config.keys() and config["_class_name"] == recorded["_class_name"]

    adapter = read_adapter(str(tmp_path))
    guidance = {"qwen": None, "flux": 3.5, "flux2": 4.0}[settings.family]
    nfe = 8 if "8step" in preset else 4
    assert adapter.sampling == Sampling(settings.family, nfe, guidance, 3.2, 0.5, 16, "euler")
    apply_adapter(setup.untouched, adapter)
    with torch.no_grad():
        output = setup.family.evaluate(
            setup.untouched, setup.x, setup.t, setup.conditions, setup.embedded
        )
        policy = policy_of(adapter).build(output, setup.x, setup.t)
        trained = setup.student(setup.x, setup.t)
        at = shift_time(torch.tensor(0.1), 3.2)
        actual, expected = (p.velocity(setup.x, at) for p in (policy, trained))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    fresh = Setup(settings).student(setup.x, setup.t).velocity(setup.x, at)
    assert (fresh - expected).abs().max() > 1e-3  # training changed something


def test_a_sampling_block_that_is_not_understood_is_named(tmp_path):
    adapter = read_adapter(str(DATA / "gmqwen" / "adapter"))
    assert adapter.sampling is None
    write_adapter(str(tmp_path), adapter._replace(sampling=distill.sampling(small("gm-qwen"))))
    assert read_adapter(str(tmp_path)).sampling.nfe == 4
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"nfe"', '"nef"'))
    with pytest.raises(ValueError, match="config.json: .*nef"):
        read_adapter(str(tmp_path))


# ---- The gradient of an iteration ----------------------------------------------------------------


def test_gradients_are_summed_over_segments_weighted_by_size(tmp_path):
    """One iteration's losses against Algorithm 3 written out."""
    settings = small("gm-qwen", out=str(tmp_path), dropout=0.0, window_substeps=2)
    task = distill.prepare(settings, PLACE)
    weights = list(task.roles.trained().values())
    torch.manual_seed(5)
    losses = [(size, out.loss) for size, out in task.losses(task.net, 0, range(2))]
    actual = torch.autograd.grad(sum(size * loss for size, loss in losses), weights)

    torch.manual_seed(5)
    places = task.prompts.rows_of(0, 2, 0)
    x = torch.randn(2, *latent_shape(task.pipe, 112, 112))
    student, teacher = task.student_and_teacher(places)
    total = 0.0
    for i in range(4):
        length = (1 if i < 3 else 0.5) / 3.5
        tau = 1 - i / 3.5
        policy = student(x, torch.full((2,), 3.2 * tau / (1 + 2.2 * tau)))
        out = pi_id_loss(policy, teacher, tau, length, 3.2, 16, 2, window_substeps=2)
        total = total + length * out.loss
        assert losses[i][0] == pytest.approx(length)
        torch.testing.assert_close(losses[i][1], out.loss, atol=1e-7, rtol=1e-4)
        x = out.x_dst
    expected = torch.autograd.grad(total, weights)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


def test_checkpointing_does_not_change_the_gradient(tmp_path):
    gradients = []
    for name, checkpointing in (("a", False), ("b", True)):
        settings = small("gm-flux", out=str(tmp_path / name), checkpointing=checkpointing)
        task = distill.prepare(replace(settings, lora_dropout=0.3), PLACE)
        task.net.train()
        torch.manual_seed(1)
        for size, out in task.losses(task.net, 0, range(2)):
            (size * out.loss).backward()
        gradients.append([p.grad for p in task.roles.trained().values()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


# ---- Runs ----------------------------------------------------------------------------------------


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


def losses_of(folder: Path) -> list[float]:
    return [line["loss"] for line in lines_of(folder)]


def checkpoint(folder: Path) -> dict:
    newest = max((folder / "checkpoints").iterdir())
    return torch.load(newest, weights_only=True)


def test_resume_is_bit_for_bit(tmp_path):
    """With dropout in the LoRA; a checkpoint holds what is trained and nothing of the base."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    argv = [*FAST, "--preset", "gm-flux", "--lora-dropout", "0.1", "--ema-start", "1"]
    argv += ["--iterations", "2", "--save-every", "1"]
    distill.main([*argv, "--out", str(whole)])
    distill.main([*argv, "--out", str(halves), "--iterations", "1"])
    distill.main([*argv, "--out", str(halves)])
    assert losses_of(whole) == losses_of(halves) and len(losses_of(whole)) == 2
    names = "adapter/diffusion_pytorch_model.safetensors"
    assert (whole / names).read_bytes() == (halves / names).read_bytes()
    state = checkpoint(whole)
    trained = Setup(small("gm-flux")).roles.trained().keys()
    assert state["net"].keys() == trained and state["ema"].keys() == trained
    with pytest.raises(ValueError, match="lr"):
        distill.main([*argv, "--out", str(halves), "--lr", "0.5"])


@pytest.mark.slow
def test_two_processes_with_and_without_shard_give_the_losses_of_one(tmp_path):
    argv = [*FAST, "--preset", "gm-qwen", "--iterations", "3", "--ema-start", "1"]
    argv += ["--picture-every", "3", "--teacher-steps", "2"]
    distill.main([*argv, "--out", str(tmp_path / "one")])
    run_two("text_to_image.distill", [*argv, "--out", str(tmp_path / "two")])
    run_two("text_to_image.distill", [*argv, "--shard", "--out", str(tmp_path / "sharded")])
    ends = [lines_of(tmp_path / name)[-1]["endpoint_rmse"] for name in ("one", "two", "sharded")]
    assert ends[1:] == pytest.approx(ends[:1] * 2, rel=1e-3)
    one = losses_of(tmp_path / "one")
    assert losses_of(tmp_path / "two") == pytest.approx(one, rel=1e-4)
    assert losses_of(tmp_path / "sharded") == pytest.approx(one, rel=1e-4)
    a, b = (checkpoint(tmp_path / name)["ema"] for name in ("one", "sharded"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-4, rtol=1e-3)
    configs = [(tmp_path / name / "adapter/config.json").read_text() for name in ("one", "sharded")]
    assert configs[0] == configs[1]


def test_data_dependent(tmp_path):
    """Algorithm 2 from cached image latents: one random segment per sample."""
    from PIL import Image

    Image.new("RGB", (40, 32), (200, 30, 90)).save(tmp_path / "a.png")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a bag", "file": "a.png"}\n' * 2)
    flags = ["--family", "flux", "--tiny", "--images", "file", "--device", "cpu"]
    for size, out in (("64", "cache"), ("32", "small")):
        out = ["--size", size, "--out", str(tmp_path / out)]
        cache_prompts.main([str(tmp_path / "prompts.jsonl"), *flags, *out])
    settings = small("dx-flux", out=str(tmp_path), prompts=str(tmp_path / "cache"))
    task = distill.prepare(replace(settings, data_dependent=True), PLACE)
    ((weight, out),) = task.losses(task.net, 0, range(2))
    assert weight == 1.0 and 0 < out.loss < 10 and out.u_policy.shape == (2 * 4, 4, 8, 8)
    argv = [*FAST, "--preset", "dx-flux", "--iterations", "2", "--prompts", str(tmp_path / "cache")]
    distill.main([*argv, "--data-dependent", "--out", str(tmp_path / "run")])
    assert all(0 < loss < 10 for loss in losses_of(tmp_path / "run"))
    small_latents = replace(settings, data_dependent=True, prompts=str(tmp_path / "small"))
    with pytest.raises(ValueError, match=r"latents \(4, 4, 4\) in .*; cache_prompts --size 64"):
        distill.prepare(small_latents, PLACE)


@pytest.mark.parametrize(
    "model, flags, nfe, guidance",
    [
        ("dx-qwen", "--preset dx-qwen --nfe 8", 8, None),
        ("dx-qwen", "--preset dx-qwen-p10 --picture-every 1", 4, None),
        ("gm-flux", "--preset gm-flux --guidance 5", 4, 5.0),
        ("gm-flux2", "--preset gm-flux --family flux2", 4, 4.0),
    ],
)
def test_generate_draws_as_the_adapter_was_trained(model, flags, nfe, guidance, tmp_path):
    """Evaluations and guidance come from the adapter's file, and giving them is no surprise."""
    from text_to_image.generate import load

    argv = [*FAST, *flags.split(), "--iterations", "1", "--teacher-steps", "8"]
    distill.main([*argv, "--out", str(tmp_path / "500steps")])
    if "picture" in flags:
        assert (tmp_path / "500steps" / "pictures" / "step_00000001.png").is_file()
        (line,) = lines_of(tmp_path / "500steps")
        assert line["endpoint_rmse"] > 0 and line["euler_rmse"] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate = load(model, adapter=str(tmp_path / "500steps" / "adapter"), tiny=True)
        assert (generate.nfe, generate.guidance) == (nfe, guidance)
        options = {} if guidance is None else {"guidance": guidance}
        size = {"height": 64, "width": 64}
        plain, given = (
            generate("a bag", **size, output="latent", **given).latents
            for given in ({}, {"nfe": nfe} | options)
        )
    assert torch.equal(plain, given) and plain.isfinite().all()


def test_an_adapter_is_written_from_a_checkpoint(tmp_path):
    """Ours, and a public .pth with student and moving average: the average is what is read."""
    argv = [*FAST, "--iterations", "2", "--ema-start", "0", "--ema-gamma", "0"]
    distill.main([*argv, "--out", str(tmp_path / "run")])
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    state = torch.load(newest, weights_only=True)
    assert any(not torch.equal(state["net"][key], state["ema"][key]) for key in state["net"])
    wanted = tmp_path / "run" / "adapter" / "diffusion_pytorch_model.safetensors"
    distill.main(["--tiny", "--export", str(newest), "--total-substeps", "16", "--out",
                  str(tmp_path / "ours")])  # fmt: skip
    exported = tmp_path / "ours" / "adapter" / wanted.name
    assert exported.read_bytes() == wanted.read_bytes()
    with pytest.raises(ValueError, match="is of a run with .*'nfe': 4.* the flags say .*'nfe': 2"):
        distill.main(["--tiny", "--export", str(newest), "--total-substeps", "16", "--nfe", "2"])

    spec, public = small("gm-qwen").spec, {}
    for part, prefix in (("net", "diffusion."), ("ema", "diffusion_ema.")):
        for name, value in state[part].items():
            key = adapter_key(name, spec).replace(".weight", ".default.weight")
            key = key if "lora_" in key else adapter_key(name, spec)
            public[f"{prefix}denoising.{key}"] = value
    torch.save({"state_dict": public, "meta": {"iter": 2}}, tmp_path / "public.pth")
    distill.main(["--tiny", "--export", str(tmp_path / "public.pth"), "--total-substeps", "16",
                  "--out", str(tmp_path / "public")])  # fmt: skip
    assert (tmp_path / "public" / "adapter" / wanted.name).read_bytes() == wanted.read_bytes()

    public.pop("diffusion_ema.denoising.proj_out_means.weight")
    torch.save({"state_dict": public}, tmp_path / "half.pth")
    with pytest.raises(ValueError, match="half.pth: 1 tensors are missing .*student.means"):
        distill.main(["--tiny", "--export", str(tmp_path / "half.pth"), "--out", str(tmp_path)])


def test_a_base_from_a_folder_in_bfloat16(tmp_path, monkeypatch, capsys):
    """What a real run does: prompts cached beforehand, no text encoder, bfloat16 base."""
    base, cache = str(tmp_path / "base"), tmp_path / "prompts"
    tiny_pipeline(FAMILIES["flux"]).save_pretrained(base)
    (tmp_path / "prompts.txt").write_text("a bag\na coat\n")
    cache_prompts.main([
        str(tmp_path / "prompts.txt"), "--family", "flux", "--base", base, "--out", str(cache),
        "--max-length", "16", "--device", "cpu",
    ])  # fmt: skip
    shutil.rmtree(Path(base) / "text_encoder_2")
    config = tmp_path / "base" / "model_index.json"  # the encoder's config is gone as well
    index = json.loads(config.read_text()) | {"text_encoder_2": [None, None]}
    config.write_text(json.dumps(index))
    sides = []

    def small_shape(pipe, *given):
        sides.append(given)
        return latent_shape(pipe, 64, 64)

    monkeypatch.setattr(distill, "latent_shape", small_shape)
    argv = ["--preset", "dx-flux", "--base", base, "--prompts", str(cache), "--lora-rank", "4",
            "--batch", "2", "--device", "cpu"]  # fmt: skip
    distill.main([
        *argv, "--iterations", "2", "--total-substeps", "16", "--log-every", "1",
        "--teacher-steps", "2", "--out", str(tmp_path / "run"),
    ])  # fmt: skip
    assert "GPU memory are needed" in capsys.readouterr().out
    assert sides == [(1024, 1024)]
    assert all(math.isfinite(loss) for loss in losses_of(tmp_path / "run"))
    assert {v.dtype for v in checkpoint(tmp_path / "run")["ema"].values()} == {torch.float32}
    with safe_open(tmp_path / "run/adapter/diffusion_pytorch_model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}
    path = tmp_path / "base" / "transformer" / "config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"guidance_embeds": False}, "its embedded guidance"),  # as FLUX.1-schnell has it
        ({"quantization_config": {"load_in_4bit": True}}, "needs its full weights"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            distill.main([*argv, "--out", str(tmp_path / "other")])


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
        (["--tiny", "--policy", "dx"], "--dropout 0.1: a dx policy has no components"),
        (["--preset", "gm-sana"], "--preset: invalid choice: 'gm-sana'"),
        (["--tiny", "--data-dependent"], "has no latents"),
    ],
)
def test_bad_settings(argv, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        distill.main([*argv, "--out", str(tmp_path)])
    assert not (tmp_path / "config.json").exists()


def test_memory_is_near_the_published(monkeypatch):
    """Published, Qwen: 70 GB on each of many GPUs, 40 and 20 sharded over 2 and 8."""
    with torch.device("meta"):
        net = diffusers.QwenImageTransformer2DModel()
        roles = distill.two_roles(PRESETS["gm-qwen"], diffusers.QwenImageTransformer2DModel())
    monkeypatch.setattr(distill, "two_roles", lambda *given: roles)  # once: it takes a second

    def needed(world, **changes):
        return distill.memory_needed(replace(PRESETS["gm-qwen"], **changes), net, world)

    assert roles.net.proj_out.student.logstds[1].out_features == 1024  # as in all public files
    assert 50e9 < needed(1, optimizer="adamw8bit") < 80e9
    needed = needed(2, shard=True), needed(8, shard=True)
    assert 30e9 < needed[0] < 45e9 and 10e9 < needed[1] < 25e9
