"""Overfit one trajectory of Qwen-Image with a static policy: 32 mixture components, no network.

    python toy_qwen.py                                          # 40 GB of GPU memory
    python toy_qwen.py --quantize nf4 --height 512 --width 512 --one-branch       # for less memory
    python toy_qwen.py --tiny                                   # a code-path check, under a minute

The same as toy_dit_imagenet.py with another teacher: Qwen-Image (20 billion parameters) with
classifier-free guidance, one prompt, one noise. The defaults are the published ones: K = 32, 5000
iterations, Adam 5e-3, 2 intermediates, guidance 4, shift 3.2, 1360 x 768, plain loss, 128 Euler
substeps. The policy, its training, the figures and metrics.json are those of common/static_policy.py.

The text encoder (7 billion parameters) is loaded first and freed before the transformer is loaded;
--prompt-cache keeps what it made of the prompt in a file, so that it is needed only once. --tiny
takes a small random transformer, VAE and text encoder in place of Qwen-Image: it runs the same
program offline and shows that it works, not what the method can do.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import text_to_image.pipelines as dm
from common.cli import atomic, pick_device, run_cli
from common.teachers import guided_velocity
from common.static_policy import ToySettings, add_arguments, run_sweep, run_toy, settings_from

SHIFT = 3.2
OFFLOADS = ("none", "group")  # there is only one large component at a time
QWEN = dm.FAMILIES["qwen"]
PUBLISHED = ToySettings(iters=5000, teacher_steps=128, solver="euler", time_weight=0.0)
TINY = dataclasses.replace(PUBLISHED, iters=100)


def encode(pipe: Any, prompts: Sequence[str]) -> list[dm.Conditions]:
    """Prompt and negative prompt, each on its own: no padding, no mask."""
    return [dm.encode_prompts(pipe, QWEN, [prompt]) for prompt in prompts]


def save_prompts(path: Path, prompts: Sequence[str], encoded: Sequence[dm.Conditions]) -> None:
    """Writes the embeddings of prompt and negative prompt, and the texts, to a safetensors file."""
    from safetensors.torch import save_file

    tensors = {str(i): part.embeds.cpu().contiguous() for i, part in enumerate(encoded)}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={str(i): text for i, text in enumerate(prompts)})


def load_prompts(path: Path, prompts: Sequence[str]) -> list[dm.Conditions]:
    """What `save_prompts` wrote. Raises: ValueError if it was written for other texts."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            texts = [(file.metadata() or {}).get(str(i)) for i in range(len(prompts))]
            if texts != list(prompts):
                raise ValueError(
                    f"--prompt-cache {path} is for the prompts {texts}, not {list(prompts)}: "
                    "give another file, or delete it"
                )
            return [dm.Conditions(file.get_tensor(str(i))) for i in range(len(prompts))]
    except SafetensorError as error:
        raise ValueError(f"--prompt-cache {path} is not a safetensors file: {error}") from error


def guided_qwen(
    pipe: Any, encoded: Sequence[dm.Conditions], guidance: float, one_branch: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """The teacher (x (B, C, H, W), t (B,)) -> u with classifier-free guidance.

    Args:
        encoded: prompt and negative prompt, one row each.
        one_branch: evaluates them one after the other: half the activations, more time.
    """
    both = dm.Conditions.stack(encoded)

    def velocity(x: Tensor, t: Tensor, conditions: dm.Conditions) -> Tensor:
        return dm.unpack(dm.evaluate(pipe, QWEN, x, t, conditions).float(), x)

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        b = len(x)
        if guidance == 1:
            return velocity(x, t, encoded[0].rows([0] * b))
        if one_branch:
            u_cond, u_uncond = (velocity(x, t, part.rows([0] * b)) for part in encoded)
        else:
            rows = both.rows([0] * b + [1] * b)
            u_cond, u_uncond = velocity(x.repeat(2, 1, 1, 1), t.repeat(2), rows).chunk(2)
        return guided_velocity(u_cond, u_uncond, guidance, t)

    return teacher


def load_teacher(
    args: argparse.Namespace, settings: ToySettings, device: torch.device
) -> tuple[Any, list[dm.Conditions]]:
    """Text encoder, freed again, then transformer and VAE -> pipeline, encoded prompts."""
    prompts, cache = (args.prompt, args.negative_prompt), args.prompt_cache
    cached = load_prompts(cache, prompts) if cache and cache.exists() else None
    if args.tiny:
        pipe = dm.tiny_pipeline(QWEN).to(device)
        encoded = cached or encode(pipe, prompts)
    else:
        dtype, counts = torch.bfloat16, dm.count_parameters(dm.empty_components(QWEN, args.base))
        text = {"text_encoder": counts.pop("text_encoder")}
        pixels, batch = args.height * args.width, 1 if args.one_branch else 2
        policy = 12 * 4 * settings.components * 16 * pixels / 64  # its parameters, Adam, rollout
        memory = args.quantize, args.offload, pixels, batch, device, OFFLOADS
        if cached is None:
            print("text encoder:", dm.check_memory(QWEN, text, *memory))
        print("transformer:", dm.check_memory(QWEN, counts, *memory, policy))
        if cached is None:
            pipe = dm.load_base(QWEN, args.base, dtype, args.quantize, ("transformer", "vae"))
            dm.place(pipe, device, args.offload)
            encoded = encode(pipe, prompts)
            del pipe
            dm.release_memory()
        else:
            encoded = cached
        pipe = dm.load_base(QWEN, args.base, dtype, args.quantize, ("text_encoder", "tokenizer"))
        dm.place(pipe, device, args.offload)
    if cache and cached is None:
        save_prompts(cache, prompts, encoded)
    return pipe, [dm.Conditions(part.embeds.to(device)) for part in encoded]


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, ToySettings]:
    """Flags, and the run's settings. Raises: ValueError, one line, for what is not accepted."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument(
        "--tiny", action="store_true", help="small random models: checks the code path, offline"
    )
    tiny = first.parse_known_args(argv)[0].tiny
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        parents=[first],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--prompt", default="a blue jay on a snowy branch, photograph", help="of the one picture")
    add("--negative-prompt", default=" ", help="of the unconditional branch")
    add("--guidance", type=float, default=4.0, help="classifier-free guidance scale; 1: none")
    add(
        "--height",
        type=int,
        default=64 if tiny else 768,
        help="multiple of 16; smaller: less memory",
    )
    add("--width", type=int, default=64 if tiny else 1360, help="multiple of 16")
    add("--prompt-cache", type=Path, help="file for the prompt embeddings, read if it is there")
    add("--base", help="folder or Hub name in place of " + QWEN.repo)
    add("--quantize", default="none", choices=dm.BYTES_PER_WEIGHT, help=dm.QUANTIZE_HELP)
    add("--offload", default="none", choices=OFFLOADS, help=dm.offload_help(OFFLOADS))
    add("--one-branch", action="store_true",
        help="one guidance branch at a time: half the activation memory, more time")  # fmt: skip
    add_arguments(parser, TINY if tiny else PUBLISHED)
    args = parser.parse_args(argv)
    args.out = args.out or Path("outputs/toy_qwen")
    for name in ("height", "width"):
        side = getattr(args, name)
        if side < 16 or side % 16:
            raise ValueError(f"--{name} is {side}; it must be a multiple of 16")
    if not args.guidance >= 0:
        raise ValueError(f"--guidance is {args.guidance:g}; it must be at least 0 (1 is none)")
    if tiny and (args.base or args.quantize != "none"):
        raise ValueError("--tiny builds its own model: leave out --base and --quantize")
    if not args.prompt.strip():
        raise ValueError("--prompt is empty")
    return args, settings_from(args)


def main(argv: Sequence[str] | None = None) -> None:
    """The command: fits, then writes figures and metrics.json into a folder."""
    args, settings = parse_arguments(argv)
    device = pick_device(args.device)
    if args.offload != "none" and device.type == "cpu":
        raise ValueError(f"--offload {args.offload} needs a GPU; on a CPU use none")
    dm.import_diffusers()
    pipe, encoded = load_teacher(args, settings, device)
    if args.tiny:
        print("--tiny: small random models. This checks the code path; its pictures mean nothing.")
    teacher = guided_qwen(pipe, encoded, args.guidance, args.one_branch)
    shape = dm.latent_shape(pipe, args.height, args.width)
    generator = torch.Generator().manual_seed(settings.seed)
    x_src = torch.randn(1, *shape, generator=generator).to(device)

    def decode(x: Tensor) -> Tensor:
        return dm.decode(pipe, QWEN, x)

    about = {
        "teacher": "tiny random model" if args.tiny else args.base or QWEN.repo,
        "prompt": args.prompt, "guidance": args.guidance, "size": [args.width, args.height],
        "quantize": args.quantize,
        "reference": f"{settings.teacher_steps} Heun steps of the teacher",
    }  # fmt: skip
    name = "random tiny model" if args.tiny else "Qwen-Image"
    if args.sweep:
        title = f"How large must a policy be? {name}"
        run_sweep(teacher, x_src, decode, settings, args.out, title, SHIFT, extra=about)
        print(f"wrote {args.out}/sweep.png and sweep.json")
        return
    kind = {"gmflow": "K", "dx": "N"}[settings.policy]
    title = f"{settings.policy} policy, {kind} = {settings.components}: {name}"
    metrics = run_toy(
        teacher, x_src, decode, settings, args.out, title, SHIFT, args.every, extra=about
    )
    print(
        f"endpoint PSNR {metrics['endpoint_psnr_db']:.1f} dB, RMSE {metrics['endpoint_rmse']:.4f} "
        f"in {metrics['seconds']:.0f} s; wrote {args.out}/toy.png"
    )


if __name__ == "__main__":
    run_cli(main)
