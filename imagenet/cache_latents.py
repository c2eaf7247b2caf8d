"""Encodes an image folder with the VAE, for imagenet.distill with more than one evaluation.

    python -m imagenet.cache_latents IMAGENET/train LATENTS
    torchrun --nproc-per-node 8 -m imagenet.cache_latents IMAGENET/train LATENTS

The folder has one subfolder per class; sorted by name they are the classes 0, 1, 2, ... Each image
is cropped to the central square, resized to --size, and encoded twice, as it is and mirrored. One
shard holds --shard images:

    latents_00000.npy   (2 n, 2, C, H, W) float16: mean and standard deviation of the posterior,
                        with offset and scale of the VAE applied; the mirrored images are last
    labels_00000.npy    (2 n,) int64

ImageNet's training set takes 42 GB. The same command continues an interrupted run.
"""

if not __package__:
    raise SystemExit("start it in the repository's root: python -m imagenet.cache_latents")

import dataclasses
import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.cli import DEVICE_HELP, parse, run_cli, setting
from common.files import check_same, read_json, remove_leftovers, write_json, writing
from common.fingerprint import fingerprint
from common.images import HIDDEN, is_turned, list_images, read_image, square
from common.processes import from_first, processes, total
from imagenet import checkpoints
from imagenet.dit import LATENT_SCALE, VAE, DiTConfig


@dataclass(frozen=True)
class Settings:
    """What is encoded, and how."""

    images: Path = setting(
        dataclasses.MISSING, "folder with one subfolder per class", positional=True
    )
    out: Path = setting(dataclasses.MISSING, "folder for the shards", positional=True)
    size: int = setting(256, "side of the images, a multiple of 8", low=8, high=4096)
    shard: int = setting(10_000, "images per shard", low=1)
    batch: int = setting(64, "images that are encoded at once", low=1)
    workers: int = setting(8, "threads that read images", low=1)
    vae: str = setting(VAE, "name on the Hub, or folder, of the VAE", path=True)
    device: str = setting("auto", DEVICE_HELP)


# ---- Writing -------------------------------------------------------------------------------------


def labelled_images(folder: Path) -> list[tuple[Path, int]]:
    """(file, class) in the same order on every platform, as torchvision's ImageFolder on Linux.

    Raises: ValueError for no image, a class without one, or images that are no child of a class.
    """
    files = list_images(folder)
    folders = [path for path in folder.iterdir() if path.is_dir()]
    classes = sorted(path.name for path in folders if not path.name.startswith(HIDDEN))
    number = {folder / name: i for i, name in enumerate(classes)}
    odd = number.keys() ^ {file.parent for file in files}
    if odd:
        raise ValueError(
            f"images is {folder}, and {min(odd)} is not one of its subfolders, or has no image; "
            "give the folder whose subfolders are the classes"
        )
    others = sum(len(names) for *_, names in os.walk(folder, followlinks=True)) - len(files)
    if others:
        print(f"{others} files in {folder} are hidden or no images", file=sys.stderr)
    return [(file, number[file.parent]) for file in files]


@torch.no_grad()
def encode(vae: nn.Module, images: Tensor) -> Tensor:
    """(n, 3, S, S) -> mean and standard deviation (n, 2, C, S / 8, S / 8), float16 on the CPU.

    Raises: ValueError if they are not finite.
    """
    posterior = vae.encode(images).latent_dist
    scale, offset = checkpoints.latent_scale(vae)
    moments = torch.stack([posterior.mean - offset, posterior.std], dim=1) * scale
    moments = moments.half().cpu()
    if not moments.isfinite().all():
        raise ValueError("the VAE gives latents that are not finite")
    return moments


def write_shard(
    number: int, images: list[tuple[Path, int]], vae: nn.Module, s: Settings, device: torch.device
) -> int:
    """Latents and labels of some images, plain and mirrored. -> images that EXIF turned."""

    def read(item: tuple[Path, int]) -> tuple[Tensor, bool]:
        return square(read_image(item[0]), s.size), is_turned(item[0])

    plain, mirrored, turned = [], [], 0
    with ThreadPoolExecutor(s.workers) as pool:
        coming = pool.map(read, images[: s.batch])
        for i in range(s.batch, len(images) + s.batch, s.batch):
            pixels, turns = zip(*coming, strict=True)
            coming = pool.map(read, images[i : i + s.batch])  # while the VAE works
            pixels = torch.stack(pixels).to(device).permute(0, 3, 1, 2) / 127.5 - 1
            plain.append(encode(vae, pixels))
            mirrored.append(encode(vae, pixels.flip(3)))
            turned += sum(turns)
    labels = np.array([label for _, label in images] * 2)
    content = {"labels": labels, "latents": torch.cat(plain + mirrored).numpy()}
    for name, array in content.items():  # the latents last: they say that the shard is whole
        with writing(s.out / f"{name}_{number:05d}.npy") as temporary:
            np.save(temporary, array)
    return turned


def main(argv: list[str] | None = None) -> None:
    """Image folder -> shards of latents and labels; see the top of the file."""
    s = parse(Settings, __doc__, argv)
    if s.size % 8:
        raise ValueError(f"--size is {s.size}; it must be a multiple of 8")
    with processes(s.device) as place:
        found = labelled_images(s.images)
        classes = found[-1][1] + 1
        if place.rank == 0:
            print(f"{classes} classes, {len(found)} images")
        files = [file.relative_to(s.images).as_posix() for file, _ in found]
        made_from = {
            "images": len(found), "classes": classes, "size": s.size, "shard": s.shard,
            "files": hashlib.blake2b("\n".join(files).encode(), digest_size=8).hexdigest(),
            "vae": s.vae,
        }  # fmt: skip
        vae = checkpoints.load_vae(place.device, s.vae)
        made_from["scale"], made_from["offset"] = checkpoints.latent_scale(vae)
        made_from["weights"] = fingerprint(vae)
        check_same(s.out / "settings.json", made_from)
        if place.rank == 0:
            write_json(s.out / "settings.json", made_from)
            remove_leftovers(s.out)
        from_first(None)  # only then may others write
        numbers = range(-(-len(found) // s.shard))[place.rank :: place.world]
        turned = 0
        for number in tqdm(numbers, disable=place.rank > 0 or None):
            if not (s.out / f"latents_{number:05d}.npy").exists():
                images = found[number * s.shard : (number + 1) * s.shard]
                turned += write_shard(number, images, vae, s, place.device)
        turned = int(total(torch.tensor(turned, device=place.device)))
    if place.rank == 0:
        print(f"{len(found)} images, plain and mirrored, in {s.out}")
        if turned:
            print(f"{turned} images were turned upright by their EXIF orientation")


# ---- Reading -------------------------------------------------------------------------------------


class Latents:
    """The shards of a folder, memory-mapped, and samples of them.

    Raises: ValueError for what is damaged, or was not made for such a network.
    """

    def __init__(self, folder: str | Path, net: DiTConfig):
        made_from = read_json(Path(folder) / "settings.json")
        shards = sorted(Path(folder).glob("latents_*.npy"))
        if not shards or "vae" not in made_from:
            raise ValueError(f"--latents {folder} is no folder of imagenet.cache_latents")
        self.moments, labels = [], []  #  (n, 2, C, H, W), (n,) of each shard
        for shard in shards:
            try:
                self.moments.append(np.load(shard, mmap_mode="r"))
                labels.append(np.load(shard.with_name(shard.name.replace("latents", "labels"))))
            except (ValueError, EOFError) as error:
                raise ValueError(f"{shard} or its labels are damaged: {error}") from error
        self.labels = np.concatenate(labels)
        self.ends = np.cumsum([len(moments) for moments in self.moments])
        if len(self.labels) != self.ends[-1]:
            given = f"{len(self.labels)} labels for {self.ends[-1]} images"
            raise ValueError(f"--latents {folder} has {given}")
        found = {
            "images": len(self.labels) // 2,
            "shape": self.moments[0].shape[2:],
            "classes": made_from["classes"],
            "VAE": Path(made_from["vae"]).name,
            "scale": made_from["scale"],
        }
        needed = {
            "images": made_from["images"],
            "shape": (net.channels, net.latent_size, net.latent_size),
            "classes": net.num_classes,
            "VAE": Path(net.decoder).name,
            "scale": LATENT_SCALE if net.decoder == VAE else made_from["scale"],
        }
        if found != needed:
            raise ValueError(f"--latents {folder} has {found}, this teacher needs {needed}")

    def draw(self, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """n samples of the VAE's posterior, (n, C, H, W), of random images, and labels (n,)."""
        items = torch.randint(len(self.labels), (n,)).numpy()
        shards = np.searchsorted(self.ends, items, side="right")
        rows = [self.moments[k][item - self.ends[k]] for k, item in zip(shards, items, strict=True)]
        mean, std = torch.from_numpy(np.stack(rows)).to(device).float().unbind(1)
        labels = torch.from_numpy(self.labels[items]).to(device)
        return mean + std * torch.randn_like(mean), labels


if __name__ == "__main__":
    run_cli(main)
