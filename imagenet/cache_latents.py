"""Encodes an image folder with the VAE, for imagenet.distill with more than one evaluation.

    python -m imagenet.cache_latents IMAGENET/train LATENTS
    torchrun --nproc-per-node 8 -m imagenet.cache_latents IMAGENET/train LATENTS

The folder has one subfolder per class; sorted by name they are the classes 0, 1, 2, ... Every image
is cropped to a centred square, resized to --size, and encoded twice, as it is and mirrored. One
shard holds --shard images:

    latents_00000.npy   (2 n, 2, C, H, W) float16: mean and standard deviation of the posterior,
                        times the latent scale; the mirrored images follow the others
    labels_00000.npy    (2 n,) int64

ImageNet's training set takes 42 GB. A shard that is there is not made again, so the same command
continues an interrupted run. Needs diffusers (the VAE) and Pillow.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import imagenet.distributed as runs
from common.cli import run_cli, write_json
from imagenet import checkpoints

KINDS = {".jpg", ".jpeg", ".png", ".webp"}


def list_images(folder: Path) -> list[tuple[Path, int]]:
    """(file, class) in a fixed order. Raises: ValueError if there is no image."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    found = [
        (file, label)
        for label, path in enumerate(classes)
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in KINDS
    ]
    if not found:
        raise ValueError(f"images is {folder}; it must hold one subfolder of images per class")
    return found


def read_image(path: Path, size: int) -> Tensor:
    """The central square, as in ADM: halved by boxes while it is large, then bicubic. -> (3, S, S).

    Values in [-1, 1].
    """
    from PIL import Image

    image = Image.open(path).convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    shape = (round(image.width * scale), round(image.height * scale))
    image = image.resize(shape, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1


@torch.no_grad()
def encode(vae: nn.Module, images: Tensor) -> Tensor:
    """(n, 3, S, S) -> mean and standard deviation (n, 2, C, S / 8, S / 8) of the latents."""
    posterior = vae.encode(images).latent_dist
    return torch.stack([posterior.mean, posterior.std], dim=1) * vae.config.scaling_factor


def write_shard(out: Path, number: int, images: list, vae: nn.Module, args, device) -> None:
    """Latents and labels of some images, plain and mirrored."""
    plain, mirrored = [], []
    for begin in range(0, len(images), args.batch):
        batch = [read_image(file, args.size) for file, _ in images[begin : begin + args.batch]]
        batch = torch.stack(batch).to(device)
        plain.append(encode(vae, batch).half().cpu())
        mirrored.append(encode(vae, batch.flip(3)).half().cpu())
    labels = np.array([label for _, label in images] * 2, dtype=np.int64)
    content = {"labels": labels, "latents": torch.cat(plain + mirrored).numpy()}
    for name, array in content.items():  # the latents last: they say that the shard is whole
        with runs.writing(out / f"{name}_{number:05d}.npy") as temporary:
            with temporary.open("wb") as file:
                np.save(file, array)


def main(argv: list[str] | None = None) -> None:
    """Image folder -> shards of latents and labels; see the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("images", type=Path, help="folder with one subfolder per class")
    parser.add_argument("out", help="folder for the shards")
    parser.add_argument("--size", type=int, default=256, help="of the images, a multiple of 8")
    parser.add_argument("--shard", type=int, default=10_000, help="images per shard")
    parser.add_argument("--batch", type=int, default=64, help="images that are encoded at once")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    args = parser.parse_args(argv)
    for name in ("shard", "batch", "size"):
        if getattr(args, name) < 1 or name == "size" and args.size % 8:
            wanted = "a positive multiple of 8" if name == "size" else "at least 1"
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be {wanted}")
    if runs.is_remote(args.out):
        raise ValueError(f"out is {args.out}; it must be a local folder")
    args.out, found = Path(args.out), list_images(args.images)
    settings = {"images": len(found), "size": args.size, "shard": args.shard}
    runs.check_same(args.out / "settings.json", settings)
    with runs.processes(args.device) as (rank, world, device):
        numbers = range(0, -(-len(found) // args.shard))[rank::world]
        there = set(runs.list_files(args.out, "latents_"))
        missing = [number for number in numbers if f"latents_{number:05d}.npy" not in there]
        vae = checkpoints.load_vae(device) if missing else None
        if rank == 0:
            write_json(args.out / "settings.json", settings)
            runs.remove_leftovers(args.out)
        runs.from_first(None)  # only then may others write
        for number in tqdm(missing, disable=None if rank == 0 else True):
            shard = found[number * args.shard : (number + 1) * args.shard]
            write_shard(args.out, number, shard, vae, args, device)
    if rank == 0:
        print(f"{len(found)} images, plain and mirrored, in {args.out}")


if __name__ == "__main__":
    run_cli(main)
