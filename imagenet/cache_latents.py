"""Encodes an image folder with the VAE, for imagenet.distill with more than one evaluation.

    python -m imagenet.cache_latents IMAGENET/train LATENTS
    torchrun --nproc-per-node 8 -m imagenet.cache_latents IMAGENET/train LATENTS

The folder has one subfolder per class; sorted by name they are the classes 0, 1, 2, ... Hidden
files and folders are left out. Each image is turned upright by its EXIF orientation, cropped to the
central square, resized to --size, and encoded twice, as it is and mirrored. One shard holds --shard
images:

    latents_00000.npy   (2 n, 2, C, H, W) float16: mean and standard deviation of the posterior,
                        with offset and scale of the VAE applied; the mirrored images are last
    labels_00000.npy    (2 n,) int64

ImageNet's training set takes 42 GB. A shard that is there is not made again, so the same command
continues an interrupted run. Needs diffusers (the VAE) and Pillow.
"""

if not __package__:
    raise SystemExit("start it in the repository's root: python -m imagenet.cache_latents")

import dataclasses
import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common.cli import DEVICE_HELP, parse, run_cli, setting
from common.files import read_json, remove_leftovers, write_json, writing
from common.fingerprint import fingerprint
from common.images import HIDDEN, list_images, read_image, square
from common.processes import from_first, processes
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
    workers: int = setting(8, "processes that read images; 0: none", low=0, high=256)
    vae: str = setting(VAE, "name on the Hub, or folder, of the VAE", path=True)
    device: str = setting("auto", DEVICE_HELP)


# ---- Images --------------------------------------------------------------------------------------


def labelled_images(folder: Path) -> list[tuple[Path, int]]:
    """(file, class) in the same order on every platform, as torchvision's ImageFolder on Linux.

    Raises: ValueError for no image, a class without one, or images that are no child of a class.
    """
    if not folder.is_dir():
        raise ValueError(f"images is {folder}; it must hold one subfolder of images per class")
    files = list_images(folder)
    wrong = [file for file in files if file.parent.parent != folder]
    if wrong:
        raise ValueError(
            f"images is {folder}, and {wrong[0]} is not in a subfolder of it; give the folder "
            "whose subfolders are the classes"
        )
    folders = [path.name for path in folder.iterdir() if path.is_dir()]
    classes = sorted(name for name in folders if not name.startswith(HIDDEN))
    empty = set(classes) - {file.parent.name for file in files}
    if empty:
        raise ValueError(f"images: the class {folder / min(empty)} has no image; remove or fill it")
    others = sum(len(names) for *_, names in os.walk(folder)) - len(files)
    if others:
        print(f"{others} files in {folder} are hidden or no images", file=sys.stderr)
    number = {name: i for i, name in enumerate(classes)}
    return [(file, number[file.parent.name]) for file in files]


class Images(Dataset):
    """(image (S, S, 3) uint8, label) of (file, class)."""

    def __init__(self, files: list[tuple[Path, int]], size: int):
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        file, label = self.files[i]
        return square(read_image(file), self.size).numpy(), label


def stack(items: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, list[int]]:
    """A batch as arrays: they come through a pipe, not through shared memory as tensors do."""
    return np.stack([pixels for pixels, _ in items]), [label for _, label in items]


# ---- Latents -------------------------------------------------------------------------------------


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
    number: int, images: list[tuple[Path, int]], vae: nn.Module, settings: Settings,
    device: torch.device,
) -> None:  # fmt: skip
    """Latents and labels of some images, plain and mirrored.

    Raises: ValueError for a damaged image, or if the processes that read images fail.
    """
    plain, mirrored, labels = [], [], []
    data = Images(images, settings.size)
    loader = DataLoader(data, settings.batch, num_workers=settings.workers, collate_fn=stack)
    try:
        for pixels, label in loader:
            pixels = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2) / 127.5 - 1
            plain.append(encode(vae, pixels))
            mirrored.append(encode(vae, pixels.flip(3)))
            labels += label
    except ValueError as error:  # from a process: its traceback, the message last
        raise ValueError(str(error).strip().split("\n")[-1]) from error
    except RuntimeError as error:
        if "shared memory" not in str(error) and "worker" not in str(error):
            raise
        reason = str(error).strip().split("\n")[-1]
        raise ValueError(f"--workers is {settings.workers}, try fewer or 0: {reason}") from error
    labels = np.array(labels * 2)
    content = {"labels": labels, "latents": torch.cat(plain + mirrored).numpy()}
    for name, array in content.items():  # the latents last: they say that the shard is whole
        with writing(settings.out / f"{name}_{number:05d}.npy") as temporary:
            with temporary.open("wb") as file:
                np.save(file, array)


def open_shards(folder: str | Path, net: DiTConfig) -> tuple[list[np.ndarray], np.ndarray]:
    """-> memory-mapped moments (n, 2, C, H, W) of each shard, and all labels (n,).

    Raises: ValueError, with the file's name, for what is damaged, or was not made for such a
        network: another VAE, scale, number of channels, size or number of classes.
    """
    made_from = read_json(Path(folder) / "settings.json")
    shards, moments, labels = sorted(Path(folder).glob("latents_*.npy")), [], []
    if not shards or "vae" not in made_from:
        raise ValueError(f"--latents {folder} is no folder of imagenet.cache_latents")
    if Path(made_from["vae"]).name != Path(net.decoder).name:
        raise ValueError(
            f"--latents {folder} is of the VAE {made_from['vae']}, the network's is {net.decoder}"
        )
    if net.decoder == VAE and made_from["scale"] != LATENT_SCALE:
        raise ValueError(
            f"--latents {folder} has the scale {made_from['scale']}, the network's is "
            f"{LATENT_SCALE}"
        )
    expected = (2, net.channels, net.latent_size, net.latent_size)
    for shard in shards:
        try:
            moments.append(np.load(shard, mmap_mode="r"))
            labels.append(np.load(shard.with_name(shard.name.replace("latents", "labels"))))
        except (ValueError, EOFError) as error:
            raise ValueError(f"--latents: {shard} or its labels are damaged: {error}") from error
        if moments[-1].shape[1:] != expected:
            found = f"--latents: {shard} has images of {moments[-1].shape[1:]}"
            raise ValueError(f"{found}; this teacher needs {expected}")
        if len(moments[-1]) != len(labels[-1]):
            counts = f"{len(moments[-1])} latents, {len(labels[-1])} labels"
            raise ValueError(f"--latents: {shard} and its labels: {counts}")
    labels = np.concatenate(labels)
    if not 0 <= labels.min() <= labels.max() < net.num_classes:
        found = f"labels {labels.min()} .. {labels.max()}"
        raise ValueError(
            f"--latents {folder} has the {found}; the teacher knows 0 .. {net.num_classes - 1}"
        )
    return moments, labels


def check_same(path: Path, made_from: dict) -> None:
    """Raises: ValueError if shards of something else are in the folder."""
    before = read_json(path)
    for name, value in made_from.items():
        if before.get(name, value) != value:
            raise ValueError(
                f"{path}: the shards there have {name} = {before[name]!r}, these {value!r}; "
                "choose another folder, or the same settings to continue"
            )


def main(argv: list[str] | None = None) -> None:
    """Image folder -> shards of latents and labels; see the top of the file."""
    settings = parse(Settings, __doc__, argv)
    if settings.size % 8:
        raise ValueError(f"--size is {settings.size}; it must be a multiple of 8")
    with processes(settings.device) as place:
        found = labelled_images(settings.images)
        classes = found[-1][1] + 1
        if place.rank == 0:
            print(f"{classes} classes, {len(found)} images")
        files = [file.relative_to(settings.images).as_posix() for file, _ in found]
        made_from = {
            "images": len(found), "classes": classes, "size": settings.size,
            "files": hashlib.blake2b("\n".join(files).encode(), digest_size=8).hexdigest(),
            "shard": settings.shard, "vae": settings.vae,
        }  # fmt: skip
        vae = checkpoints.load_vae(place.device, settings.vae)
        made_from["scale"], made_from["offset"] = checkpoints.latent_scale(vae)
        made_from["weights"] = fingerprint(vae)
        check_same(settings.out / "settings.json", made_from)
        if place.rank == 0:
            write_json(settings.out / "settings.json", made_from)
            remove_leftovers(settings.out)
        from_first(None)  # only then may others write
        numbers = range(-(-len(found) // settings.shard))[place.rank :: place.world]
        for number in tqdm(numbers, disable=place.rank > 0 or None):
            if not (settings.out / f"latents_{number:05d}.npy").exists():
                shard = found[number * settings.shard : (number + 1) * settings.shard]
                write_shard(number, shard, vae, settings, place.device)
    if place.rank == 0:
        print(f"{len(found)} images, plain and mirrored, in {settings.out}")


if __name__ == "__main__":
    run_cli(main)
