"""Adapters: recorded network calls, what is refused, and style LoRAs."""

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file
from t2i_cases import (
    CASES,
    DATA,
    DX,
    SIZE,
    FewStep,
    Recorded,
    close,
    few_step,
    load_random,
    transformer,
)

from text_to_image.adapters import (
    apply_adapter,
    check_adapter,
    policy_of,
    read_adapter,
    read_style,
)


def check_direct(
    generate: FewStep, recorded: Recorded, prefix: str, mask: str | None = None, tag=""
):
    """One network call on the `prefix` inputs against the arrays of `tag`."""
    x = recorded[f"{prefix}latents"]
    t = recorded["b2_sigma"] if prefix else torch.ones(1)
    conditions = recorded.conditions(prefix, mask)
    net = generate.pipe.transformer
    with torch.no_grad():
        output = generate.family.evaluate(net, x, t, conditions, recorded.guidance)
    tag = tag or f"{prefix}direct"
    if generate.policy.kind == "DX":
        return close(output, recorded[f"{tag}_sample_packed"], 1e-5)
    means, logweights, logstds = output
    close(means, recorded[f"{tag}_means_packed"].flatten(2), 1e-5)
    logweights = logweights.unflatten(-1, (4, 4)).log_softmax(2)  # components, pixels of a patch
    close(logweights, recorded[f"{tag}_logweights_packed"], 1e-5)
    close(logstds, recorded[f"{tag}_logstds_packed"].flatten(1), 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_direct_calls_are_those_recorded(case, recorded_frequencies):
    recorded, generate = Recorded(case), few_step(case)
    check_direct(generate, recorded, "")
    check_direct(generate, recorded, "b2_")
    if CASES[case] == "qwen":
        check_direct(generate, recorded, "b2_", "b2_prompt_embeds_mask", "b2_masked_direct")


@pytest.mark.parametrize("case", CASES)
def test_the_scale_of_an_adapter_is_that_of_its_lora(case, recorded_frequencies):
    check_direct(few_step(case, scale=0.0), Recorded(case), "b2_", tag="b2_nolora_direct")


@pytest.mark.parametrize("case", CASES)
def test_unpacked_policy_parameters_are_those_recorded(case, recorded_frequencies):
    recorded, generate = Recorded(case), few_step(case)
    student = generate.student(recorded.conditions(), recorded.guidance)
    policy = student(recorded["latents"], torch.ones(1))
    if generate.policy.kind == "DX":
        return close(policy.velocities, recorded["step0_output"], 1e-5)
    for name, value in policy.mixture._asdict().items():
        close(value, recorded[f"step0_{name}"], 1e-5)


@pytest.mark.parametrize("case", DX)
def test_both_class_names_of_dx_adapters_are_accepted(case, edited, recorded_frequencies):
    verbatim = json.loads((DATA / case / "adapter" / "config.exporter_verbatim.json").read_text())
    assert verbatim["_class_name"].startswith("DX")
    check_direct(few_step(case, folder=edited(case, config=verbatim)), Recorded(case), "")


def test_key_prefix_is_accepted(edited, recorded_frequencies):
    def prefix(values):
        for key in list(values):
            values[f"transformer.{key}"] = values.pop(key)

    check_direct(few_step("gmqwen", folder=edited("gmqwen", prefix)), Recorded("gmqwen"), "")


def rename(old, new):
    return lambda values: values.__setitem__(new, values.pop(old))


def resize(name, *shape):
    return lambda values: values.__setitem__(name, torch.zeros(shape))


LORA = "transformer_blocks.0.img_mlp.net.2.lora_A.weight"


@pytest.mark.parametrize(
    ("case", "tensors", "parts"),
    [
        ("gmqwen", lambda v: v.pop("proj_out_means.weight"), ["proj_out_means.weight is missing"]),
        ("gmqwen", lambda v: v.pop("norm_out.linear.bias"), ["norm_out.linear.bias is missing"]),
        ("gmqwen", lambda v: v.pop(LORA), ["lora_B.weight is (24, 2), needed is nothing"]),
        ("dxqwen", lambda v: v.pop("proj_out.weight"), ["proj_out.weight is missing"]),
        (
            "gmqwen",
            rename(LORA, "transformer_blocks.7.img_mlp.net.2.lora_A.weight"),
            ["2 tensors", "transformer_blocks.7.img_mlp", "needed is nothing"],
        ),
        ("gmqwen", rename(LORA, LORA.replace("lora_A", "lora_C")), ["lora_C", "needed is nothing"]),
        ("gmqwen", resize("extra.weight", 3), ["extra.weight is (3,), needed is nothing"]),
        ("gmqwen", resize("proj_out_means.weight", 64, 23), ["(64, 23), needed is (64, 24)"]),
        ("gmqwen", resize(LORA, 2, 95), [LORA + " is (2, 95), needed is (2, 96)"]),
        ("gmqwen", resize(LORA, 3, 96), ["lora_B.weight is (24, 2), needed is (24, 3)"]),
        ("gmflux2", resize("norm_out.linear.bias", 48), ["bias is (48,), needed is nothing"]),
        ("dxflux", resize("proj_out.bias", 150), ["proj_out.bias is (150,), needed is (160,)"]),
    ],
)
def test_unfit_tensors_are_named_and_nothing_is_changed(case, tensors, parts, edited):
    network = transformer(case)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError) as error:
        apply_adapter(network, read_adapter(str(edited(case, tensors))))
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert network.state_dict().keys() == before.keys()


def test_adapters_for_another_base_are_refused(edited):
    for case, other in (("gmqwen", "gmflux"), ("gmflux2", "gmflux"), ("dxflux", "dxqwen")):
        with pytest.raises(ValueError, match="is for a base with class .*, this one has "):
            check_adapter(transformer(other), read_adapter(str(DATA / case / "adapter")))
    for key, value in (
        ("num_layers", 3),
        ("attention_head_dim", 128),
        ("axes_dims_rope", [8, 2, 2]),
    ):
        adapter = read_adapter(str(edited("gmqwen", config={key: value})))
        with pytest.raises(ValueError, match=f"base with {key}"):
            check_adapter(transformer("gmqwen"), adapter)


def test_other_tensors_of_the_base_may_be_overwritten(edited):
    value = torch.randn(24, 16)
    folder = edited("gmqwen", lambda v: v.__setitem__("img_in.weight", value))
    network = transformer("gmqwen")
    apply_adapter(network, read_adapter(str(folder)))
    close(network.img_in.weight, value, 0)


def test_policy_settings():
    def read(case):
        return read_adapter(str(DATA / case / "adapter"))

    assert policy_of(read("gmqwen")).kind == "GMFlow"
    spec = policy_of(read("dxqwen"))
    assert spec.kind == "DX"
    assert spec.options == pytest.approx({"segment_size": 1 / 3.5, "shift": 3.2})
    assert policy_of(read("dxqwen_poly")).options == {"mode": "polynomial", "shift": 3.2}
    bare = read("dxqwen")._replace(policy=None)
    assert policy_of(bare, {"segment_size": 0.5, "shift": 2}).options["segment_size"] == 0.5
    assert policy_of(bare, None, {"segment_size": 0.25, "shift": 2}).options["shift"] == 2
    spec = policy_of(read("dxqwen"), {"segment_size": 0.5}, {"segment_size": 0.25, "shift": 1})
    assert spec.options == {"segment_size": 0.5, "shift": 3.2}


@pytest.mark.parametrize(
    ("case", "own", "override", "message"),
    [
        ("dxqwen", None, None, "its DX head needs settings as in --policy"),
        ("dxqwen", {"type": "DX", "shift": 3.2}, None, "its DX head needs settings as in"),
        ("dxqwen", {"type": "DX", "mode": "polynomial"}, None, "its DX head needs settings"),
        ("dxqwen", {"type": "GMFlow"}, None, "GMFlow.*its DX head"),
        ("gmqwen", {"type": "DX", "shift": 3.2}, None, "DX.*its GMFlow head needs no settings"),
        ("gmqwen", ..., {"segment_size": 0.2}, "0.2.: its GMFlow head needs no settings"),
        ("dxqwen", ..., {"segments": 0.2}, "'segments': 0.2"),
        ("dxqwen", ..., {"mode": "cubic"}, "'mode': 'cubic'"),
        ("dxqwen", ..., {"segment_size": 0}, "'segment_size': 0,"),
        ("dxqwen", ..., {"segment_size": "big"}, "'segment_size': 'big'"),
        ("dxqwen", ..., {"shift": -1}, "'shift': -1"),
    ],
)
def test_unfit_policy_settings_are_refused(case, own, override, message):
    adapter = read_adapter(str(DATA / case / "adapter"))
    adapter = adapter if own is ... else adapter._replace(policy=own)
    with pytest.raises(ValueError, match=message):
        policy_of(adapter, override)


def test_unreadable_adapters(tmp_path, edited):
    with pytest.raises(OSError, match="neither here nor of the form user/repository"):
        read_adapter(str(tmp_path / "nowhere"))
    with pytest.raises(OSError, match="No such file .*config.json"):
        read_adapter(str(tmp_path))
    for text in ("{shift", "[3.2]"):
        with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors: "):
            read_adapter(str(edited("dxqwen", metadata={"policy_config": text})))
    folder = edited("dxqwen")
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="model.safetensors: SafetensorError"):
        read_adapter(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: "):
        read_adapter(str(folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_gaussians": "four"}, "config.json: "),
        ({"num_gaussians": 5}, r"proj_out_means.weight is \(64, 24\), needed is \(80, 24\)"),
        (
            {"logstd_inner_dim": 10**9},
            r"proj_out_logstds.1.weight .* needed is \(1000000000, 24\)",
        ),
    ],
)
def test_unfit_heads_are_refused(config, message, edited):
    with pytest.raises(ValueError, match=message):
        check_adapter(transformer("gmqwen"), read_adapter(str(edited("gmqwen", config=config))))


def test_config_files_with_a_byte_order_mark(edited):
    folder = edited("gmqwen")
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_adapter(str(folder)).config["num_gaussians"] == 4


def test_nothing_but_safetensors_is_read(edited, monkeypatch):
    """An adapter or LoRA in a format that can hold programs is refused, not unpickled."""
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("unpickles"))
    folder = edited("gmqwen")
    for name in ("diffusion_pytorch_model.bin", "pytorch_lora_weights.bin", "style.PT"):
        (folder / name).write_bytes(b"code")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="No such file .*diffusion_pytorch_model.safetensors"):
        read_adapter(str(folder))
    for where in (folder, folder / "style.PT", folder / "pytorch_lora_weights.bin", "u/r/a.bin"):
        with pytest.raises((OSError, ValueError), match=f"LoRA {where}"):
            load_random("gm-qwen", loras=[(str(where), 1.0)])


# ---- Style LoRAs ---------------------------------------------------------------------------------

DOWN = torch.randn(2, 24, generator=torch.Generator().manual_seed(1))
UP = torch.randn(72, 2, generator=torch.Generator().manual_seed(2))
TEXT = torch.randn(2, 20, generator=torch.Generator().manual_seed(3))
LAYER = "transformer_blocks.0.attn.to_q"


def lora(layer, alpha=None, up=UP[:24], down=DOWN, halves=("lora_A.weight", "lora_B.weight")):
    pairs = zip(halves, (down, up), strict=True)
    tensors = {f"{layer}.{half}": value.contiguous().clone() for half, value in pairs}
    return tensors | ({} if alpha is None else {f"{layer}.alpha": torch.tensor(alpha)})


KOHYA = {"halves": ("lora_down.weight", "lora_up.weight")}
QKV = "double_blocks.0.img_attn.qkv"  # of Black Forest Labs; LAYER is the first third
FLAT, FLAT_QKV = (f"lora_unet_{name.replace('.', '_')}" for name in (LAYER, QKV))
FLAT_TEXT = "lora_te1_text_model_encoder_layers_0_self_attn_out_proj"
DEFAULT = {"halves": ("lora_A.default.weight", "lora_B.default.weight")}
STYLES = {  # family, tensors, strength that the file itself has
    "diffusers": ("qwen", lora(f"transformer.{LAYER}"), 1.0),
    "diffusers with alpha": ("flux", lora(f"transformer.{LAYER}", 1.0), 0.5),
    "its own metadata": ("qwen", lora(f"transformer.{LAYER}"), 4.0),
    "kohya": ("qwen", lora(FLAT, 1.0, **KOHYA), 0.5),
    "kohya, joint layers": ("flux", lora(FLAT_QKV, 1.0, UP, **KOHYA), 0.5),
    "ComfyUI": ("qwen", lora(f"diffusion_model.{LAYER}"), 1.0),
    "Black Forest Labs": ("flux2", lora(f"diffusion_model.{QKV}", None, UP), 1.0),
    "DiffSynth": ("qwen", lora(LAYER, **DEFAULT), 1.0),
}  # fmt: skip


@pytest.mark.parametrize("kind", STYLES)
def test_a_style_lora_adds_its_product_whatever_its_names(kind, tmp_path):
    family, tensors, own = STYLES[kind]
    options = {"r": 2, "lora_alpha": 8, "target_modules": ["to_q"]}
    options = {f"transformer.{key}": value for key, value in options.items()}
    metadata = {"lora_adapter_metadata": json.dumps(options)} if "metadata" in kind else None
    save_file(tensors, tmp_path / "style.safetensors", metadata=metadata)
    styles = [(str(tmp_path), 0.3)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LoRA .*")  # all of it is used
        styled = load_random(f"gm-{family}", loras=styles)
    layer, x = styled.pipe.transformer.get_submodule(LAYER), torch.randn(3, 24)
    layer.set_scale("piflow", 0.0)  # without the adapter's own LoRA
    close(layer(x) - layer.base_layer(x), 0.3 * own * x @ DOWN.T @ UP[:24].T, 1e-4)


@pytest.mark.parametrize(
    "tensors",
    [
        lora(f"transformer.{LAYER}")
        | lora("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", None, TEXT.T, TEXT),
        lora(FLAT_QKV, 2.0, UP, **KOHYA) | lora(FLAT_TEXT, 2.0, TEXT.T, TEXT, **KOHYA),
    ],
    ids=["diffusers", "kohya"],
)
def test_the_strength_of_a_style_lora_is_also_that_of_its_text_encoder_part(tensors, tmp_path):
    save_file(tensors, tmp_path / "style.safetensors")
    styles = [(str(tmp_path / "style.safetensors"), 0.3)]
    styled = load_random("gm-flux", loras=styles)
    layers = [m for m in styled.pipe.text_encoder.modules() if hasattr(m, "base_layer")]
    x = torch.randn(3, 20)
    (delta,) = (layer(x) - layer.base_layer(x) for layer in layers)
    close(delta, 0.3 * x @ TEXT.T @ TEXT, 1e-4)
    layer, x = styled.pipe.transformer.get_submodule(LAYER), torch.randn(3, 24)
    layer.set_scale("piflow", 0.0)  # without the adapter's own LoRA
    close(layer(x) - layer.base_layer(x), 0.3 * x @ DOWN.T @ UP[:24].T, 1e-4)


def test_a_style_may_have_more_than_two_halves(tmp_path):
    """A DoRA has a vector of magnitudes beside them, which diffusers reads."""
    magnitude = {f"transformer.{LAYER}.lora_magnitude_vector": torch.ones(24)}
    save_file(lora(f"transformer.{LAYER}") | magnitude, tmp_path / "dora.safetensors")
    styled = load_random("gm-flux", loras=[(str(tmp_path / "dora.safetensors"), 1.0)])
    assert "style0" in styled.pipe.transformer.get_submodule(LAYER).lora_magnitude_vector


def test_two_styles_change_the_picture_as_changed_weights_do(tmp_path):
    for i, layer in enumerate((LAYER, "transformer_blocks.1.attn.to_k")):
        save_file(lora(f"transformer.{layer}"), tmp_path / f"{i}.safetensors")
    styles = [(str(tmp_path / "0.safetensors"), 0.3), (str(tmp_path / "1.safetensors"), -0.2)]
    plain, styled = (load_random("gm-flux", loras=i) for i in ((), styles))
    before = plain("a jay", **SIZE, output="latent").latents
    after = styled("a jay", **SIZE, output="latent").latents
    assert not torch.allclose(before, after, atol=1e-2)
    blocks = plain.pipe.transformer.transformer_blocks
    blocks[0].attn.to_q.base_layer.weight.data += 0.3 * UP[:24] @ DOWN
    blocks[1].attn.to_k.base_layer.weight.data -= 0.2 * UP[:24] @ DOWN
    close(plain("a jay", **SIZE, output="latent").latents, after, 1e-4)


OTHER = lora("transformer.transformer_blocks.9.attn.to_q")
HEAD = lora("transformer.proj_out", up=UP[:16]) | lora("transformer.norm_out.linear", up=UP[:48])


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        (OTHER, ["1 of 2 layers are used", "transformer.transformer_blocks.9.attn.to_q"]),
        (HEAD, ["1 of 3 layers are used", "transformer.norm_out.linear, transformer.proj_out"]),
        (OTHER | HEAD, ["1 of 4 layers are used; not in this base: transformer.tr"]),
        (OTHER | HEAD, ["; replaced by the adapter: transformer.norm_out.linear"]),
    ],
)
def test_layers_of_a_style_lora_that_are_not_used_are_said(tensors, parts, tmp_path):
    save_file(lora(f"transformer.{LAYER}") | tensors, tmp_path / "style.safetensors")
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        load_random("gm-qwen", loras=[(str(tmp_path), 1.0)])
    (message,) = (str(note.message) for note in notes)
    assert all(part in message for part in [f"LoRA {tmp_path}", *parts])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (OTHER, "0 of 1 layers are used; .*: transformer.transformer_blocks.9"),
        (HEAD, "0 of 2 layers are used; replaced by the adapter"),
        (lora("lora_unet_double_blocks_7_img_attn_qkv", **KOHYA), "0 of 1 layers are used"),
        ({"noise": DOWN}, "0 of 1 layers are used; .*: noise"),
        ({}, "0 of 0 layers are used"),
        (lora(f"transformer.{LAYER}", down=torch.zeros(2, 30)), r"\(2, 30\).*needed .*\(2, 24\)"),
        (lora(f"transformer.{LAYER}", up=torch.zeros(8, 2)), r"\(8, 2\).*needed is .*\(24, 2\)"),
        ({f"transformer.{LAYER}.lora_A.weight": DOWN}, "has {'A': .*needed is .*'B'"),
        (lora(f"base_model.model.{LAYER}"), "0 of 1 layers are used; .*: base_"),
        (None, "SafetensorError"),
    ],
)
def test_a_style_lora_that_does_not_fit_is_refused_by_name(tensors, message, tmp_path):
    path = tmp_path / "style.safetensors"
    path.write_bytes(b"half a file") if tensors is None else save_file(tensors, path)
    with pytest.raises(ValueError, match=f"LoRA .*style.safetensors: .*{message}") as error:
        load_random("gm-qwen", loras=[(str(path), 1.0)])
    if tensors is not None:
        assert "\n" not in str(error.value)


def test_a_folder_of_several_style_loras_is_not_guessed(tmp_path):
    for name in ("a", "b"):
        save_file(lora(f"transformer.{LAYER}"), tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="several .safetensors files; name one"):
        load_random("gm-qwen", loras=[(str(tmp_path), 1.0)])


@pytest.mark.parametrize(("where", "folder", "file"), [
    ("user/repo", None, "pytorch_lora_weights.safetensors"),
    ("user/repo/styles", "styles", "pytorch_lora_weights.safetensors"),
    ("user/repo/styles/ink.safetensors", "styles", "ink.safetensors"),
])  # fmt: skip
def test_places_of_style_loras_on_the_hub(where, folder, file):
    class Pipeline:
        @staticmethod
        def lora_state_dict(**source):
            assert (source["subfolder"], source["weight_name"]) == (folder, file)
            assert source["pretrained_model_name_or_path_or_dict"] == "user/repo"
            raise ImportError("found")  # what `naming` leaves as it is

    with pytest.raises(ImportError, match="found"):
        read_style(Pipeline, {}, where)
