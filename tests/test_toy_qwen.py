"""The static toy on Qwen-Image: teacher, prompts and program, on small random models.

The policy and its evaluation are those of common/static_policy.py, tested in test_toy_dit.py.
"""

import dataclasses
import json
import math

import pytest
import torch

pytest.importorskip("diffusers", reason="needs requirements-extra.txt (diffusers)")
pytest.importorskip("transformers", reason="needs requirements-extra.txt (transformers)")

from PIL import Image  # noqa: E402
from t2i_cases import tiny_pipeline  # noqa: E402

import text_to_image.families as dm  # noqa: E402
import toy_qwen  # noqa: E402
from common.cli import parse  # noqa: E402
from text_to_image import loading  # noqa: E402
from toy_qwen import PRESETS, QWEN, Settings, guided_qwen, main  # noqa: E402

PROMPTS = ["a blue jay on a branch", ""]
SHORT = ["--device", "cpu", "--height", "64", "--width", "48", "--cloning", "2",
         "--iterations", "2",
         "--total-substeps", "16", "--teacher-steps", "32"]  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(QWEN)


@pytest.fixture(scope="module")
def encoded(pipe):
    return [QWEN.encode_prompts(pipe, [prompt]) for prompt in PROMPTS]


def test_defaults_are_the_published_settings():
    settings = parse(Settings, "", [], PRESETS, by="tiny")
    published = {"policy": "gmflow", "components": 32, "iterations": 5000, "lr": 5e-3, "seed": 42}
    published |= {"num_intermediates": 2, "total_substeps": 128, "solver": "euler"}
    published |= {
        "negative_prompt": "",
        "guidance": 4.0,
        "width": 1360,
        "height": 768,
        "time_weight": 0.0,
    }
    assert published.items() <= dataclasses.asdict(settings).items()
    assert (toy_qwen.SHIFT, QWEN.repo) == (3.2, "Qwen/Qwen-Image")
    tiny = parse(Settings, "", ["--tiny", "--width", "32"], PRESETS, by="tiny")
    assert (tiny.tiny, tiny.height, tiny.width, tiny.iterations) == (True, 112, 32, 150)


def test_prompts_of_different_lengths_stack_with_a_mask():
    long, short = torch.randn(1, 7, 24), torch.randn(1, 4, 24)
    both = dm.Conditions.stack([dm.Conditions(short), dm.Conditions(long)])
    assert torch.equal(both.embeds[1], long[0]) and torch.equal(both.embeds[0, :4], short[0])
    assert both.mask.tolist() == [[True] * 4 + [False] * 3, [True] * 7]
    assert dm.Conditions.stack([dm.Conditions(long), dm.Conditions(long)]).mask is None


@pytest.mark.parametrize("batch", [1, 2])
def test_teacher_is_the_guided_transformer_of_diffusers(pipe, encoded, batch):
    """u_uncond + s (u_cond - u_uncond), each branch by a direct call with its unpadded text."""
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(batch, 4, 8, 6, generator=generator), torch.tensor([0.9, 0.3])[:batch]
    assert encoded[0].embeds.shape[1] != encoded[1].embeds.shape[1]
    branches = []
    for part in encoded:
        tokens = pipe.transformer(
            hidden_states=pipe._pack_latents(x, batch, 4, 8, 6), timestep=t,
            encoder_hidden_states=part.embeds.expand(batch, -1, -1),
            img_shapes=[[(1, 4, 3)]] * batch, return_dict=False,
        )[0]  # fmt: skip
        branches.append(pipe._unpack_latents(tokens, 64, 48, 8)[:, :, 0])
    cond, uncond = branches
    assert (cond - uncond).abs().max() > 1e-3
    for scale in (4.0, 1.0):
        u = guided_qwen(pipe.transformer, encoded, scale)(x, t)
        torch.testing.assert_close(u, uncond + scale * (cond - uncond), atol=2e-5, rtol=0)


def test_one_branch_at_a_time(pipe, encoded):
    sizes = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["timestep"])), with_kwargs=True
    )
    for scale, expected in ((4, [1, 1]), (1, [1])):
        sizes.clear()
        guided_qwen(pipe.transformer, encoded, scale)(torch.randn(1, 4, 8, 6), torch.ones(1))
        assert sizes == expected
    handle.remove()


def test_program_end_to_end(tmp_path, capsys):
    """The prompt is the figure's title, and no formula: matplotlib stumbles over this one."""
    prompt = "a dark coat, $_^$ pattern"
    main(["--tiny", *SHORT, "--prompt", prompt, "--out", str(tmp_path)])
    assert f"{prompt}: endpoint PSNR" in capsys.readouterr().out
    assert Image.open(tmp_path / "toy.png").size[0] > 800
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    settings = metrics["settings"]
    assert (settings["shift"], settings["width"], settings["height"]) == (3.2, 48, 64)
    assert len(metrics["trajectory_rmse"]) == 33 and metrics["trajectory_rmse"][0] == 0
    assert math.isfinite(metrics["endpoint_psnr_db"])


def test_text_encoder_is_gone_before_the_transformer(tmp_path, monkeypatch, capsys):
    """The program on a base in a folder."""
    tiny_pipeline(QWEN).save_pretrained(tmp_path / "base")
    loads, load_base = [], loading.load_base

    def watched(family, base, dtype, quantize, without):
        loads.append(without)
        return load_base(family, base, dtype, quantize, without)

    monkeypatch.setattr(loading, "load_base", watched)
    main([*SHORT, "--base", str(tmp_path / "base"), "--out", str(tmp_path / "out")])
    assert loads == [("transformer", "vae"), ("text_encoder", "tokenizer")]
    assert "of GPU memory are needed" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert math.isfinite(metrics["endpoint_psnr_db"])


def test_estimate_before_loading(tmp_path, monkeypatch):
    """Too little GPU memory: an error with the options that help, and nothing is loaded."""
    parts = {"transformer": None, "text_encoder": None, "vae": None}
    monkeypatch.setattr(loading, "empty_components", lambda *args: parts)

    def weights(family, modules, quantize, offload):
        assert "text_encoder" not in modules  # it is gone by then
        assert (quantize, offload) == ("int8", "group")
        return 40e9

    monkeypatch.setattr(loading, "weights_on_gpu", weights)
    monkeypatch.setattr(loading, "load_base", lambda *args: pytest.fail("loads the base"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24e9, 24e9))
    with pytest.raises(ValueError, match="24 GB are free; try --quantize nf4") as error:
        toy_qwen.load_teacher(Settings(quantize="int8", offload="group"), torch.device("cuda"))
    assert "--offload model" not in str(error.value)  # not an option of this program


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "70"], "--height and --width must be multiples of 16"),
        (["--width", "0"], "--width is 0"),
        (["--guidance", "-1"], "--guidance is -1"),
        (["--guidance", "nan"], "--guidance is nan"),
        (["--components", "0"], "--components is 0"),
        (["--policy", "gaussian"], "--policy: invalid choice: 'gaussian'"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        main(["--tiny", "--device", "cpu", *arguments, "--out", str(tmp_path / "out")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_tiny_run_comes_close_to_its_teacher(tmp_path):
    """The default tiny run: the policy ends nearer to the teacher than one that is not trained."""
    main(["--tiny", "--device", "cpu", "--out", str(tmp_path / "long")])
    short = ["--cloning", "1", "--iterations", "1", "--out", str(tmp_path / "short")]
    main(["--tiny", "--device", "cpu", *short])
    ends = [json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("long", "short")]
    assert ends[0]["endpoint_rmse"] < 0.2 * ends[1]["endpoint_rmse"]
