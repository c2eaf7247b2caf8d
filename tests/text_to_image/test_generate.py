"""Few-step text to image: whole runs against recorded latents, the call, loading, the command."""

import ast
import json
import math
import re
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from t2i_cases import (
    CASES,
    DATA,
    SIZE,
    Bare,
    FewStep,
    Recorded,
    close,
    few_step,
    load_random,
    random_models,
    tiny,
    tiny_adapter,
    tiny_pipeline,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import text_to_image.families as dm
import text_to_image.loading as loading
from common.cli import run_cli
from text_to_image.adapters import (
    PolicySpec,
    Sampling,
    apply_adapter,
    policy_of,
    read_adapter,
    write_adapter,
)
from text_to_image.generate import MODELS, load, main, write  # noqa: E402

ROOT = Path(__file__).parent.parent.parent


def arguments_of(tag: str, recorded: Recorded) -> dict:
    """n4_t0.3 -> nfe 4, temperature 0.3; n6_auto, n4_auto_sub32, n4_g1.5, n4_partialmask."""
    nfe, *options = tag.split("_")
    arguments = {"nfe": int(nfe[1:]), "guidance": recorded.guidance}
    for option in options:
        if option.startswith("t"):
            arguments["temperature"] = float(option[1:])
        elif option.startswith("sub"):
            arguments["total_substeps"] = int(option[3:])
        elif option.startswith("g"):
            arguments["guidance"] = float(option[1:])
    return arguments


def tolerance_of(case: str, tag: str) -> float:
    """1e-4; twice that where rounding is amplified 50 times: the float64 result is 1.2e-4 away, and
    float32 sums on another number of threads move it as far."""
    return 2e-4 if case == "gmqwen" and tag.startswith("n4") else 1e-4


@pytest.mark.parametrize("case", CASES)
def test_final_latents_are_those_recorded(case, recorded_frequencies):
    recorded, generate = Recorded(case), few_step(case)
    assert len(recorded.runs()) >= 5
    for tag in recorded.runs():
        mask = "prompt_embeds_mask_partial" if "partialmask" in tag else None
        conditions = recorded.conditions(mask=mask)
        final = generate.sample(recorded["latents"], conditions, **arguments_of(tag, recorded))
        close(final, recorded[f"run_{tag}_final"], tolerance_of(case, tag))


@pytest.mark.parametrize("case", CASES)
def test_final_latents_do_not_depend_on_the_batch(case, recorded_frequencies):
    """The recorded sample in the middle of a batch of other noises and prompts."""
    recorded, generate = Recorded(case), few_step(case)
    alone, others = recorded.conditions(), recorded.conditions("b2_")
    embeds = torch.cat([others.embeds[:1], alone.embeds, others.embeds[1:]])
    pooled = None
    if alone.pooled is not None:
        pooled = torch.cat([others.pooled[:1], alone.pooled, others.pooled[1:]])
    mask = None
    if CASES[case] == "qwen":
        mask = torch.tensor([[1, 1, 0, 0, 0, 0, 0], [1] * 7, [1, 1, 1, 1, 0, 0, 0]])
    noise = torch.cat([recorded["b2_latents"][:1], recorded["latents"], recorded["b2_latents"][1:]])
    for tag in sorted(recorded.runs(), key=len)[::-1][:3]:  # the longest names: most options
        masks = mask
        if "partialmask" in tag:
            masks = mask.clone()
            masks[1] = recorded["prompt_embeds_mask_partial"]
        batch = dm.Conditions(embeds, mask=masks, pooled=pooled)
        final = generate.sample(noise, batch, **arguments_of(tag, recorded))
        close(final[1:2], recorded[f"run_{tag}_final"], tolerance_of(case, tag))


def test_automatic_temperature():
    recorded, generate = Recorded("gmflux"), few_step("gmflux")
    x, conditions = recorded["latents"], recorded.conditions()

    def run(nfe, temperature):
        return generate.sample(x, conditions, nfe, 3.5, temperature, total_substeps=16)

    for nfe, temperature in ((4, 0.3), (6, 0.5), (12, 1.0), (1, 0.9)):
        close(run(nfe, None), run(nfe, temperature), 1e-5)
    assert not torch.allclose(run(4, None), run(4, 1.0), atol=1e-3)


# ------------------------------------------------------------------------------------------------
# The call
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gm-qwen", "dx-flux", "gm-flux2"])
def test_batches_and_seeds(model):
    """Picture i depends on its prompt and on seed + i, not on the others, nor on the batch size."""
    generate = tiny(model)
    prompts = ["a jay", "two long-tailed jays on a snowy branch", "a fox"]
    together = generate(prompts, 2, **SIZE, seed=5, batch=4, total_substeps=8)
    assert together.seeds == [5, 6, 7, 8, 9, 10] and together.latents.shape == (6, 4, 8, 6)
    assert [image.size for image in together.images] == [(48, 64)] * 6
    for i in (0, 3):
        one = generate(prompts[i // 2], **SIZE, seed=5 + i, total_substeps=8)
        close(together.latents[i], one.latents[0], 1e-3)
        difference = np.abs(np.subtract(together.images[i], one.images[0], dtype=float)).max()
        assert difference <= 1
    assert not torch.allclose(together.latents[0], together.latents[1], atol=0.1)


def test_batch_limits_text_encoder_and_vae(monkeypatch):
    generate, seen = tiny("gm-flux"), []
    for name in ("encode_prompts", "decode"):
        original = getattr(generate.family, name)

        def watched(pipe, given, *rest, name=name, original=original):
            seen.append((name, len(given)))
            return original(pipe, given, *rest)

        monkeypatch.setattr(generate.family, name, watched)
    generate(["a jay"] * 3, **SIZE, batch=2, total_substeps=8)
    assert seen == [("encode_prompts", 2), ("encode_prompts", 1), *[("decode", 1)] * 3]


def test_ten_thousand_runs_in_one_folder(tmp_path):
    (tmp_path / "9999.json").touch()
    names = [write(SimpleNamespace(images=[], seeds=[]), tmp_path, {}).name for _ in range(2)]
    assert names == ["10000.json", "10001.json"]


@pytest.mark.parametrize(
    ("part", "name"),
    [("transformer", "proj_out.means.bias"), ("VAE", "decoder.conv_out.bias"),
     ("text encoder", "final_layer_norm.weight")],
)  # fmt: skip
def test_what_is_not_finite_is_named(part, name):
    """No black picture: a NaN weight in one part of the model."""
    generate = load_random("gm-flux")
    parts = {"transformer": "transformer", "VAE": "vae", "text encoder": "text_encoder_2"}
    module, found = getattr(generate.pipe, parts[part]), 0
    for key, parameter in module.named_parameters():
        if key.endswith(name):
            parameter.data.fill_(math.nan)
            found += 1
    assert found == 1
    with pytest.raises(ValueError, match=f"the {part} gives values that are not finite"):
        generate("a jay", **SIZE)


def test_one_network_evaluation_per_step_and_batch(capsys):
    generate = load("gm-qwen", tiny=True, device="cpu")
    calls = []
    generate.pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["timestep"]), with_kwargs=True
    )
    result = generate(["a jay", "a fox"], 2, **SIZE, nfe=6, batch=3, total_substeps=16)
    assert [len(t) for t in calls] == [3] * 6 + [1] * 6
    tau = 1 - torch.arange(6) * 2 / 11
    close(torch.stack([t[0] for t in calls[:6]]), 3.2 * tau / (1 + 2.2 * tau), 1e-6)
    assert "12/12" in capsys.readouterr().err  # the bar counts network evaluations
    close(torch.tensor(result.times), torch.stack([t[0] for t in calls[:6]]), 1e-6)


def warned(generate, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        size = {key: options.pop(key, 16) for key in SIZE}
        generate("a jay", **size, total_substeps=4, output="latent", **options)
    messages = (str(note.message) for note in notes)
    return [text for text in messages if text.startswith(("guidance", "nfe"))]


def test_guidance():
    """The trained value by default; another gets a warning but is used."""
    generate, seen = load_random("gm-flux2"), []
    generate.pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["guidance"][0].item()), with_kwargs=True
    )
    assert warned(generate, nfe=4) == []
    assert warned(generate, guidance=4.0) == []
    (message,) = warned(generate, guidance=2.0)
    assert "distilled at 4.0" in message
    assert seen == [4.0] * 8 + [2.0] * 4


@pytest.mark.parametrize(
    ("model", "nfe", "accepted"),
    [
        ("gm-qwen", 4, True), ("gm-qwen", 9, True), ("gm-qwen", 3, False),
        ("dx-qwen", 4, True), ("dx-qwen", 5, False),
        ("gm-flux", 4, True), ("gm-flux", 8, False),
        ("gm-flux-8step", 8, True), ("gm-flux-8step", 4, False),
        ("gm-flux2", 6, True),
    ],
)  # fmt: skip
def test_unusual_numbers_of_evaluations_are_said(model, nfe, accepted, monkeypatch):

    def sample(self, noise, conditions, nfe, *settings, watch, **options):
        for _ in range(nfe):
            watch(noise, torch.ones(1), noise)
        return noise

    monkeypatch.setattr(FewStep, "sample", sample)
    messages = warned(tiny(model), nfe=nfe)
    assert len(messages) == (0 if accepted else 1)
    if not accepted:
        assert f"trained for {MODELS[model].nfe}" in messages[0]
    assert tiny(model).nfe == MODELS[model].nfe


def test_editing_uses_the_reference():
    generate = tiny("gm-flux2")
    dark, light = (Image.new("RGB", (90, 70), color) for color in ("black", "white"))
    results = [
        generate("a jay", references=images, total_substeps=8)
        for images in ([dark], [light], [light, dark])
    ]
    assert results[0].images[0].size == (80, 64)  # that of the reference, cropped
    for a, b in ((0, 1), (1, 2)):
        assert not torch.allclose(results[a].latents, results[b].latents, atol=1e-3)
    with pytest.raises(ValueError, match="reference image 1: .*too small"):
        generate("a jay", references=[Image.new("RGB", (20, 20))])


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("gm-qwen", {"height": 72}, "height 72, width 48: must be multiples of 16"),
        ("gm-qwen", {"references": [Image.new("RGB", (64, 64))]}, "references: has no meaning"),
        ("gm-qwen", {"guidance": 4.0}, "guidance: has no meaning"),
        ("dx-qwen", {"guidance": 4.0, "temperature": 0.5}, "temperature, guidance: has no meaning"),
    ],
)
def test_what_a_model_has_no_use_for_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        tiny(model)("a jay", **SIZE | options)


def test_a_temperature_above_one_has_no_effect():
    """As in the published sampler."""
    generate = tiny("gm-qwen")
    runs = [
        generate("a jay", **SIZE, temperature=t, total_substeps=8, output="latent").latents
        for t in (1.0, 2.5, 0.5)
    ]
    close(runs[0], runs[1], 0)
    assert not torch.allclose(runs[0], runs[2], atol=1e-3)


@pytest.mark.parametrize("model", ["gm-qwen", "dx-flux", "gm-flux2"])
def test_latents_as_the_pipelines_of_diffusers_draw_them(model):
    """Their own packed noise of a seed gives the picture of that seed; so does ours."""
    generate = tiny(model)
    pipe, name = generate.pipe, generate.family.name
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    channels = pipe.transformer.config.in_channels // 4
    arguments = (2, channels, 64, 48, torch.float32, torch.device("cpu"), generators)
    packed = pipe.prepare_latents(*arguments, None)
    packed = packed if name == "qwen" else packed[0]
    options = {**SIZE, "total_substeps": 8, "output": "latent", "batch": 2}
    expected = generate("a jay", 2, seed=3, **options).latents
    close(generate("a jay", 2, latents=packed, **options).latents, expected, 1e-5)
    with pytest.raises(ValueError, match="2 latents for 3 pictures"):
        generate("a jay", 3, latents=packed, **options)
    own = dm.unpack(packed, torch.empty(2, channels, 8, 6))
    del options["height"], options["width"]  # they follow from the latents
    close(generate("a jay", 2, latents=own, **options).latents, expected, 1e-5)
    if name == "flux2":
        own = torch.nn.functional.pixel_unshuffle(own, 2)
        close(generate("a jay", 2, latents=own, **options).latents, expected, 1e-5)


@pytest.mark.parametrize("model", ["gm-qwen", "dx-flux", "gm-flux2"])
def test_prompt_embeds_as_the_pipelines_of_diffusers_encode_them(model):
    generate = tiny(model)
    prompts = ["a jay", "two long-tailed jays on a snowy branch"]
    encoded = generate.pipe.encode_prompt(prompt=prompts, max_sequence_length=512)
    given = {"prompt_embeds": encoded[0]}
    if model == "gm-qwen":
        given["prompt_embeds_mask"] = encoded[1]
    if model == "dx-flux":
        given["pooled_prompt_embeds"] = encoded[1]
    options = {**SIZE, "total_substeps": 8, "output": "latent", "batch": 2}
    expected = generate(prompts, **options).latents
    close(generate(**given, **options).latents, expected, 1e-5)
    doubles = {k: v if v.dtype == torch.bool else v.double() for k, v in given.items()}
    close(generate(**doubles, **options).latents, expected, 1e-5)  # as stored in another precision


@pytest.mark.parametrize("prompts", [None, [], "", " ", ["a jay", ""]])
def test_an_empty_prompt_draws_nothing(prompts):
    with pytest.raises(ValueError, match="prompts: at least one is needed, and none may be empty"):
        tiny("gm-qwen")(prompts)


def test_callback_and_estimates():
    """States after each step, and what each evaluation expects: by hand, from the policies."""
    generate, seen = tiny("gm-qwen"), []
    options = {**SIZE, "seed": 5, "output": "latent", "total_substeps": 8}
    result = generate(
        ["a jay"], 3, batch=2, callback=lambda *given: seen.append(given), **options
    )  # fmt: skip
    tau = [1 - i / 3.5 for i in range(4)]
    times = [3.2 * value / (1 + 2.2 * value) for value in tau]
    close(torch.tensor(result.times), torch.tensor(times), 1e-6)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3] * 2
    close(torch.tensor([t for _, t, _ in seen]), torch.tensor([*times[1:], 0.0] * 2), 1e-6)
    close(torch.cat([seen[3][2], seen[7][2]]), result.latents, 0)
    conditions = generate.family.encode_prompts(generate.pipe, ["a jay"])
    student = generate.student(conditions)
    noise = torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(7))
    states = [noise, *(x for _, _, x in seen[4:7])]
    for x, t, expected in zip(states, result.times, result.estimates, strict=True):
        t = torch.tensor([t])
        with torch.no_grad():
            policy = student(x, t)
        close(expected[2:], x - t * policy.velocity(x, t), 1e-4)
    assert generate.decode(result.estimates[0])[0].size == (48, 64)


def test_shift_of_the_sampler():
    """In a call, and of `load`; by default that of the training."""
    generate, shifted = tiny("gm-qwen"), load_random("gm-qwen", shift=1.5)
    options = {**SIZE, "total_substeps": 8, "output": "latent"}
    a, b = generate("a jay", **options, shift=1.5), shifted("a jay", **options)
    close(a.latents, b.latents, 0)
    tau = torch.tensor([1 - i / 3.5 for i in range(4)])
    close(torch.tensor(a.times), 1.5 * tau / (1 + 0.5 * tau), 1e-6)
    assert not torch.allclose(a.latents, generate("a jay", **options).latents, atol=1e-3)


@pytest.mark.parametrize("h", [0.7, math.inf])
def test_stochasticity_of_the_sampler(h):
    """Fresh noise of seed + i: the same in every batch, in a call and of `load`."""
    generate, noisy = tiny("gm-qwen"), load_random("gm-qwen", h=h)
    options = {**SIZE, "total_substeps": 8, "output": "latent"}
    together = noisy("a jay", 3, seed=5, batch=3, **options).latents
    close(together[2:], generate("a jay", seed=7, h=h, **options).latents, 1e-3)
    assert not torch.allclose(together, generate("a jay", 3, seed=5, **options).latents, atol=1e-3)


def test_what_a_prompt_loses_is_said():
    pipe = tiny_pipeline(dm.FAMILIES["qwen"])
    apply_adapter(pipe.transformer, tiny_adapter(pipe.transformer, gmflow=True))
    generate = FewStep(pipe, dm.FAMILIES["qwen"], PolicySpec("GMFlow"), 4, True)
    with pytest.warns(UserWarning, match="prompt 2: .* reads 512 tokens; cut off is 'ord word"):
        generate(["a", "word " * 130 + "a red coat"], **SIZE, output="latent", total_substeps=4)


# ------------------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "case"), [("gm-qwen", "gmqwen"), ("gm-flux2", "gmflux2")])
def test_a_base_and_an_adapter_from_folders(model, case, tmp_path, capsys):
    """The same as putting the adapter on that base by hand; in bfloat16, about the same."""
    family, adapter = dm.FAMILIES[CASES[case]], str(DATA / case / "adapter")
    tiny_pipeline(family, seed=3).save_pretrained(tmp_path / "base")
    options = {"adapter": adapter, "base": str(tmp_path / "base"), "device": "cpu"}
    loaded = load(model, **options, dtype=torch.float32)
    assert "GB of GPU memory are needed" in capsys.readouterr().out
    by_hand = tiny_pipeline(family, seed=3)
    apply_adapter(by_hand.transformer, read_adapter(adapter))
    by_hand = FewStep(by_hand, family, policy_of(read_adapter(adapter)), 4, True)
    call = {"prompts": "a jay", **SIZE, "total_substeps": 8}
    expected = by_hand(**call, output="latent").latents
    close(loaded(**call).latents, expected, 1e-5)

    half = load(model, **options)
    assert half.pipe.transformer.dtype == torch.bfloat16
    latents = half(**call, output="latent").latents
    assert latents.dtype == torch.float32 and (latents - expected).square().mean() < 0.05


def test_an_unfit_adapter_is_refused_before_weights_are_loaded(tmp_path, monkeypatch):
    tiny_pipeline(dm.FAMILIES["flux"]).save_pretrained(tmp_path / "base")
    monkeypatch.setattr(loading, "load_base", lambda *args: pytest.fail("loads the base"))
    options = {"base": str(tmp_path / "base"), "device": "cpu"}
    with pytest.raises(ValueError, match="is for a base with class QwenImage"):
        load("gm-flux", **options, adapter=str(DATA / "gmqwen" / "adapter"))


def test_a_base_without_a_guidance_embedding(tmp_path, edited):
    """Refused if the adapter was made with an embedding; else there is no guidance."""
    pipe = tiny_pipeline(dm.FAMILIES["flux"])
    config = dict(pipe.transformer.config) | {"guidance_embeds": False}
    pipe.transformer = type(pipe.transformer).from_config(config)
    pipe.save_pretrained(tmp_path / "base")
    options = {"base": str(tmp_path / "base"), "device": "cpu", "dtype": torch.float32}
    with pytest.raises(ValueError, match="base with guidance_embeds True, this one has False"):
        load("gm-flux", adapter=str(DATA / "gmflux" / "adapter"), **options)
    folder = edited("gmflux", config={"guidance_embeds": False})
    generate = load("gm-flux", adapter=str(folder), **options)
    options = SIZE | {"output": "latent", "total_substeps": 8}
    assert generate.guidance is None and generate("a jay", **options).latents.isfinite().all()
    with pytest.raises(ValueError, match="guidance: has no meaning"):
        generate("a jay", **options, guidance=3.5)


def saying(function, word: str = "adapter") -> tuple:
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        value = function()
    return value, [str(note.message) for note in notes if word in str(note.message)]


def test_an_adapter_is_drawn_as_its_file_states(tmp_path):
    """Evaluations, guidance, shift, substeps and solver come from the block that the trainer
    writes; another value is called unusual, these are not."""
    found = read_adapter(str(DATA / "gmflux" / "adapter"))
    trained = Sampling("flux", 8, 5.0, 2.0, 1.0, 32, "deis")
    write_adapter(str(tmp_path / "a"), found._replace(policy={"type": "GMFlow"}, sampling=trained))
    pipe = tiny_pipeline(dm.FAMILIES["flux"])
    pipe.save_pretrained(tmp_path / "base")
    options = {"base": str(tmp_path / "base"), "device": "cpu", "dtype": torch.float32}
    generate, said = saying(lambda: load("gm-flux", adapter=str(tmp_path / "a"), **options))
    assert said == [] and (generate.nfe, generate.guidance, generate.shift) == (8, 5.0, 2.0)
    assert warned(generate) == [] and warned(generate, nfe=8, guidance=5.0) == []
    messages = warned(generate, nfe=4, guidance=3.5)
    assert "distilled at 5.0" in messages[0] and "trained for 8" in messages[1]
    call = {"prompts": "a jay", **SIZE, "output": "latent"}
    explicit = generate(**call, nfe=8, guidance=5.0, shift=2.0, total_substeps=32, solver="deis")
    close(generate(**call).latents, explicit.latents, 0)
    tau = torch.tensor([1 - i / 8 for i in range(8)])
    close(torch.tensor(explicit.times), 2 * tau / (1 + tau), 1e-6)


def test_an_adapter_that_states_nothing_is_drawn_as_the_model_card_says(tmp_path):
    """Its folder's name says nothing about evaluations; that it states nothing is said once."""
    folder = tmp_path / "coats_500steps"
    shutil.copytree(DATA / "gmflux2" / "adapter", folder)
    tiny_pipeline(dm.FAMILIES["flux2"]).save_pretrained(tmp_path / "base")
    options = {"base": str(tmp_path / "base"), "device": "cpu", "dtype": torch.float32}
    generate, (said,) = saying(lambda: load("gm-flux2", adapter=str(folder), **options))
    assert "does not state what it was trained at; it is used as gm-flux2: 4 evaluations" in said
    assert (generate.nfe, generate.guidance, generate.shift) == (4, 4.0, 3.2)


def test_models_of_every_published_kind():
    kinds = {name: model.subfolder for name, model in MODELS.items()}
    assert kinds["dx-qwen-p10"].startswith("dxqwen_p10")
    assert MODELS["dx-qwen-p10"].policy == {"type": "DX", "mode": "polynomial", "shift": 3.2}
    assert "datafree" in kinds["gm-qwen-datafree"] and "datafree" in kinds["gm-flux-datafree"]


@pytest.mark.parametrize(("model", "case"), [("gm-qwen", "gmqwen"), ("dx-flux", "dxflux")])
def test_quantised_base(model, case, tmp_path):
    """All linear layers but the output are quantised; the LoRA works beside them."""
    pytest.importorskip("torchao", reason="needs torchao (optional)")
    tiny_pipeline(dm.FAMILIES[CASES[case]]).save_pretrained(tmp_path / "base")
    options = {"adapter": str(DATA / case / "adapter"), "base": str(tmp_path / "base")}
    full, quantised = (load(model, **options, device="cpu", quantize=q) for q in ("none", "int8"))
    layers = {
        name: type(getattr(layer, "base_layer", layer).weight).__name__
        for name, layer in quantised.pipe.transformer.named_modules()
        if isinstance(getattr(layer, "base_layer", layer), torch.nn.Linear) and "lora_" not in name
    }
    plain = {name for name, kind in layers.items() if kind == "Parameter"}
    assert all(name.startswith(("norm_out.", "proj_out")) or "base_layer" in name for name in plain)
    assert len(layers) - len(plain) > 30
    options = SIZE | {"output": "latent", "total_substeps": 8}
    a, b = (generate("a jay", **options).latents for generate in (full, quantised))
    assert 0 < (a - b).square().mean() < 0.05


@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloading_gives_the_same(offload):
    """From the CPU to the CPU: the hooks of diffusers run, with our head among the layers."""
    plain, offloaded = (load_random("gm-flux") for _ in range(2))
    loading.place(offloaded.pipe, torch.device("cpu"), offload)
    options = SIZE | {"total_substeps": 8}
    close(offloaded("a jay", **options).latents, plain("a jay", **options).latents, 0)


@pytest.mark.parametrize("model", ["gm-qwen", "dx-flux"])
def test_a_run_never_reads_the_device_back(model):
    """On a device that computes nothing: nothing is mixed with the CPU, no value is looked at."""
    generate = load_random(model)
    network, name = generate.pipe.transformer, generate.family.name
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for module in network.modules():
            for values in (module._parameters, module._buffers):
                for key, value in values.items():
                    if value is not None:
                        fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                        values[key] = (
                            torch.nn.Parameter(fake) if values is module._parameters else fake
                        )
        generate.pipe = Bare(network)
        generate.pipe._execution_device = torch.device("cuda")
        conditions = dm.Conditions(
            torch.randn(2, 7, network.config.joint_attention_dim, device="cuda"),
            mask=torch.ones(2, 7, dtype=torch.bool, device="cuda") if name == "qwen" else None,
            pooled=torch.randn(2, 20, device="cuda") if name == "flux" else None,
        )
        x = generate.sample(torch.randn(2, 4, 8, 6, device="cuda"), conditions, 2, total_substeps=4)
    assert x.device.type == "cuda" and x.shape == (2, 4, 8, 6)


def test_load_refuses(monkeypatch):
    for options, message in (
        ({"device": "tpu"}, "tpu"),
        ({"model": "gm-flux", "tiny": True}, "no small adapter of gm-flux ships"),
    ):
        with pytest.raises(ValueError, match=message):
            load(**options)
    for package in ("diffusers", "peft"):
        monkeypatch.setattr(
            dm.importlib.util, "find_spec", lambda name, missing=package: name != missing or None
        )
        with pytest.raises(ImportError, match=f"{package}.*pip install"):
            load("gm-qwen", tiny=True, device="cpu")
    monkeypatch.setattr(dm.importlib.util, "find_spec", lambda name: name != "gradio" or None)
    with pytest.raises(ImportError, match="gradio.*pip install"):
        main(["--ui", "--tiny"])


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


TINY = ["--tiny", "--device", "cpu", "--height", "64", "--width", "48", "--total-substeps", "8"]


def test_command_draws_pictures(tmp_path, capsys):
    """A prompts file as Windows writes it: a byte order mark, CR LF, blank lines."""
    (tmp_path / "prompts.txt").write_bytes("\ufeffa jay\r\n\r\n  ein Häher \r\n".encode())
    command = [
        *TINY, "--model", "dx-qwen", "--prompt-file", str(tmp_path / "prompts.txt"), "--images",
        "2", "--seed", "3", "--batch", "4", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    main(command)
    names = ["0000.json", *(f"0000_seed{seed}.png" for seed in range(3, 7))]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert Image.open(tmp_path / "out" / names[1]).size == (48, 64)
    noted = json.loads((tmp_path / "out" / "0000.json").read_text())
    assert noted["prompt"] == ["a jay", "ein Häher"] and noted["seeds"] == [3, 4, 5, 6]
    assert noted["nfe"] == 4
    output = capsys.readouterr().out
    assert "4 images" in output and "s each; wrote" in output

    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "0001.json").touch()  # another process is writing its pictures
    main([*command, "--images", "1"])
    assert {path: path.read_bytes() for path in before} == before  # nothing is overwritten
    new = {path.name for path in (tmp_path / "out").iterdir()} - {path.name for path in before}
    assert new == {"0001.json", "0002.json", "0002_seed3.png", "0002_seed4.png"}


def test_command_with_adapter_policy_and_reference(tmp_path):
    Image.new("RGB", (80, 64)).save(tmp_path / "input.png")
    with random_models("gm-flux2"):
        main([*TINY[:3], "--model", "gm-flux2", "--prompt", "a jay", "--reference",
              str(tmp_path / "input.png"), "--out", str(tmp_path / "edit")])  # fmt: skip
        main([*TINY, "--model", "dx-qwen", "--adapter", str(DATA / "dxqwen" / "adapter"),
              "--policy", '{"segment_size": 0.25}', "--prompt", "a jay", "--out",
              str(tmp_path / "own")])  # fmt: skip
    assert Image.open(tmp_path / "edit" / "0000_seed0.png").size == (80, 64)
    assert (tmp_path / "own" / "0000_seed0.png").exists()


BAD = [
    ([], "--prompt: at least one"),
    (["--prompt"], "--prompt: at least one"),
    (["--prompt", " "], "none may be empty"),
    (["--prompt-file", "EMPTY"], "empty.txt: there is no prompt in it"),
    (["--prompt-file", "missing.txt"], "missing.txt"),
    (["--prompt-file", "FOLDER"], "folder: not a known kind"),
    (["--prompt-file", "UTF16"], "utf16.txt: 'utf-8' codec can't decode"),
    (["--prompt", "a", "--model", "gm-sdxl"], "--model: invalid choice: 'gm-sdxl'"),
    (["--prompt", "a", "--images", "0"], "--images is 0; it must be at least 1"),
    (["--prompt", "a", "--images", "1000000000"], "--images is 1000000000; .* at most 10000"),
    (["--prompt", "a", "--images", "two"], "--images: invalid int value: 'two'"),
    (["--prompt", "a", "--height", "-64"], "--height is -64; it must be at least 16"),
    (["--prompt", "a", "--width", "1000000"], "--width is 1000000; .* at most 8192"),
    (["--prompt", "a", "--nfe", "0"], "--nfe is 0; it must be at least 1"),
    (["--prompt", "a", "--nfe", "2.5"], "--nfe: invalid int value: '2.5'"),
    (["--prompt", "a", "--steps", "4"], "unrecognized arguments: --steps"),
    (["--prompt", "a", "--seed", "-1"], "--seed is -1; it must be at least 0"),
    (["--prompt", "a", "--guidance", "-1"], "--guidance is -1.0; it must be at least 0"),
    (["--prompt", "a", "--guidance", "nan"], "--guidance is nan"),
    (["--prompt", "a", "--guidance", "inf"], "--guidance is inf"),
    (["--prompt", "a", "--temperature", "hot"], "--temperature: invalid float value: 'hot'"),
    (["--prompt", "a", "--temperature", "0"], "--temperature is 0.0; it must be above 0"),
    (["--prompt", "a", "--total-substeps", "0"], "--total-substeps is 0; it must be at least 1"),
    (["--prompt", "a", "--solver", "heun"], "--solver: invalid choice: 'heun'"),
    (["--prompt", "a", "--batch", "0"], "--batch is 0; it must be at least 1"),
    (["--prompt", "a", "--policy", "{"], "--policy '{': must be a JSON object"),
    (["--prompt", "a", "--policy", "[1]"], "--policy .*: must be a JSON object"),
    (["--prompt", "a", "--policy", '{"shift": 2}'], "2.: its GMFlow head needs no settings"),
    (["--prompt", "a", "--lora", "style=much"], "--lora style=much: 'much' is not a strength"),
    (["--prompt", "a", "--lora", "missing.safetensors"], "missing.safetensors is neither"),
    (["--prompt", "a", "--lora", "./missing.safetensors"], "./missing.safetensors is neither"),
    (["--prompt", "a", "--adapter", "../missing"], "../missing is neither here nor"),
    (["--prompt", "a", "--lora", "EMPTY"], "LoRA .*empty.txt: SafetensorError"),
    (["--prompt", "a", "--lora", "style.pt"], "style.pt is neither here"),
    (["--prompt", "a", "--lora", "FOLDER"], "LoRA .*folder: .*no file named pytorch_lora_w"),
    (["--prompt", "a", "--out", "EMPTY"], "File exists: .*empty.txt"),
    (["--prompt", "a", "--out", "UNDER_A_FILE"], "Not a directory: .*empty.txt"),
    (["--prompt", "a", "--reference", "missing.png"], "missing.png"),
    (["--prompt", "a", "--reference", "FOLDER"], "Is a directory: .*folder"),
    (["--prompt", "a", "--reference", "EMPTY"], "empty.txt cannot be read as an image: "),
    (["--prompt", "a", "--reference", "PICTURE"], "references: has no meaning"),
    (["--prompt", "a", "--adapter", "EMPTY"], "empty.txt/config.json"),
    (["--prompt", "a", "--adapter", "FOLDER"], "No such file .*folder/config.json"),
    (["--prompt", "a", "--adapter", "GM_ON_FLUX", "--model", "gm-flux"], "with class QwenImage"),
    (["--prompt", "a", "--adapter", "NO_POLICY", "--model", "dx-qwen"], "--policy '"),
    (["--prompt", "a", "--quantize", "int3"], "--quantize: invalid choice: 'int3'"),
    (["--prompt", "a", "--offload", "disk"], "--offload: invalid choice: 'disk'"),
    (["--prompt", "a", "--device", "tpu"], "--device 'tpu' is not available here"),
    (["--ui", "--port", "0"], "--port is 0; it must be at least 1"),
    (["--ui", "--port", "100000"], "--port is 100000; .* at most 65535"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_command_refuses_in_one_line_and_writes_nothing(arguments, message, tmp_path, edited):
    files, out = tmp_path / "files", tmp_path / "out"
    (files / "folder").mkdir(parents=True)
    (files / "empty.txt").write_text("\n  \n")
    (files / "utf16.txt").write_text("a jay", encoding="utf-16")
    Image.new("RGB", (64, 64)).save(files / "picture.png")
    stand_ins = {
        "EMPTY": lambda: files / "empty.txt",
        "UTF16": lambda: files / "utf16.txt",
        "FOLDER": lambda: files / "folder",
        "PICTURE": lambda: files / "picture.png",
        "UNDER_A_FILE": lambda: files / "empty.txt" / "out",
        "GM_ON_FLUX": lambda: DATA / "gmqwen" / "adapter",
        "NO_POLICY": lambda: edited("dxqwen", metadata={}),
    }
    arguments = [str(stand_ins.get(word, lambda word=word: word)()) for word in arguments]
    before = {path: path.stat().st_mtime_ns for path in files.rglob("*")}
    with pytest.raises((ValueError, OSError), match=message) as error:
        main([*TINY, *([] if "--out" in arguments else ["--out", str(out)]), *arguments])
    assert "\n" not in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in files.rglob("*")} == before
    assert not list(out.glob("*"))


def test_errors_end_the_command_with_one_line(tmp_path):
    """Exit status 1 (that of a text), one line, no traceback."""
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: main([*TINY, "--prompt", "a", "--out", str(tmp_path), "--nfe", "0"]))
    assert end.value.code == "error: --nfe is 0; it must be at least 1 and at most 1000"


def test_nothing_optional_is_imported_before_it_is_used():
    """Outside functions the files import requirements.txt, the standard library and each other."""
    known = {"common", "imagenet", "piflow_minimal", "text_to_image", *sys.stdlib_module_names}
    known |= set(re.findall(r"^\w+", (ROOT / "requirements.txt").read_text(), re.M))
    files = list((ROOT / "text_to_image").glob("*.py"))
    assert len(files) >= 6
    for file in files:
        for node in ast.parse(file.read_text()).body:
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= known, (file.name, names)


def test_a_full_disk_leaves_no_notes(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        main([*TINY, "--prompt", "a", "--out", str(tmp_path / "out")])
    assert list((tmp_path / "out").iterdir()) == []


def test_running_out_of_memory_is_explained(tmp_path, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dm.Family, "evaluate", out_of_memory)
    with pytest.raises(ValueError, match="ran out of memory.*--offload"):
        main([*TINY, "--prompt", "a jay", "--out", str(tmp_path / "out")])
