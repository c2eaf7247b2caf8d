"""Encodes an image folder with the VAE, for imagenet.distill with more than one evaluation.

    python -m imagenet.cache_latents IMAGENET/train LATENTS
    torchrun --nproc-per-node 8 -m imagenet.cache_latents IMAGENET/train LATENTS

The folder has one subfolder per class; sorted by name they are the classes 0, 1, 2, ... Hidden
files and folders are left out. Every image is decoded once before the VAE is loaded, so that a
damaged one is named at the start. Then each is turned upright by its EXIF orientation, cropped to
the central square, resized to --size, and encoded twice, as it is and mirrored. One shard holds
--shard images:

    latents_00000.npy   (2 n, 2, C, H, W) float16: mean and standard deviation of the posterior,
                        with offset and scale of the VAE applied; the mirrored images are last
    labels_00000.npy    (2 n,) int64
                        with offset and scale of the VAE applied; mirrored images are last

ImageNet's training set takes 42 GB. A shard that is there is not made again, so the same command
continues an interrupted run. Needs diffusers (the VAE) and Pillow.
"""

import contextlib
import dataclasses
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import imagenet.distributed as runs
from common.cli import DEVICE_HELP, parse, run_cli, setting, write_json
from imagenet import checkpoints
from imagenet.dit import LATENT_SCALE, VAE, DiTConfig

KINDS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
HIDDEN = (".", "@", "__MACOSX")  # .ipynb_checkpoints, ._files of macOS, @eaDir of a NAS


@dataclass(frozen=True)
class Settings:
    """What is encoded, and how."""

    images: Path = setting(
        dataclasses.MISSING, "folder with one subfolder per class", positional=True
    )
    out: str = setting(dataclasses.MISSING, "folder for the shards", positional=True)
    size: int = setting(256, "side of the images, a multiple of 8", low=8, high=4096)
    shard: int = setting(10_000, "images per shard", low=1)
    batch: int = setting(64, "images that are encoded at once", low=1)
    workers: int = setting(8, "processes that read images; 0: none", low=0, high=256)
    vae: str = setting(VAE, "name on the Hub, or folder, of the VAE")
    device: str = setting("auto", DEVICE_HELP)


# ---------------------------------------------------------------------------------------------
# Image files
# ---------------------------------------------------------------------------------------------


def hidden(name: str) -> bool:
    """Whether people see no such file or folder: of a notebook, an archive, a NAS."""
    return name.startswith(HIDDEN)


def is_image(file: Path, root: Path) -> bool:
    """Whether a path below root is an image by its suffix (in any case), and not hidden."""
    parts = file.relative_to(root).parts
    return file.suffix.lower() in KINDS and not any(map(hidden, parts)) and file.is_file()


def list_images(folder: Path) -> list[tuple[Path, int]]:
    """(file, class) in a fixed order, as torchvision's ImageFolder numbers the classes.

    Raises: ValueError for no image, a class without one, or a folder that is nested deeper.
    """
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    classes = [path for path in entries if path.is_dir() and not hidden(path.name)]
    found, skipped = [], sum(path.is_file() and not hidden(path.name) for path in entries)
    for label, path in enumerate(classes):
        before = len(found)
        for file in sorted(path.iterdir()):
            if file.is_dir() and not hidden(file.name):
                raise ValueError(
                    f"images is {folder}, and {file} is a folder in a class; give the folder whose "
                    "subfolders are the classes"
                )
            if is_image(file, folder):
                found.append((file, label))
            else:
                skipped += not hidden(file.name)
        if len(found) == before:
            raise ValueError(f"images: the class {path} has no image; remove it or fill it")
    if not found:
        raise ValueError(f"images is {folder}; it must hold one subfolder of images per class")
    if skipped:
        print(f"{skipped} files in {folder} are no images of a class", file=sys.stderr)
    return found


def open_image(path: str | Path):
    """A PIL image, RGB, upright by its EXIF orientation; 16 bits become 8, alpha is dropped.

    Raises: ValueError that names the file if it cannot be read.
    """
    from PIL import Image, ImageOps

    with readable(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits, in the mode I or I;16
            values = np.asarray(image).astype(np.int64)
            if values.min() < 0 or values.max() > 65535:
                raise ValueError(f"grey values {values.min()} to {values.max()}")
            image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("floating-point grey values")
        elif "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of an upright image, from its header. Raises: as `open_image`."""
    with readable(path) as image:
        return image.size[:: -1 if turned(image) else 1]


@contextlib.contextmanager
def readable(path: str | Path) -> Iterator:
    """Yields an opened PIL image. Raises: ValueError that names the file for whatever fails."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise nearly any kind
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def turned(image) -> bool:
    """Whether its EXIF orientation exchanges width and height of a PIL image."""
    return image.getexif().get(0x0112, 1) >= 5


def read_image(path: str | Path, size: int) -> Tensor:
    """The central square, as in ADM: halved by boxes while it is large, then bicubic. -> (3, S, S).

    Values in [-1, 1]. Raises: ValueError that names the file if it cannot be read.
    """
    from PIL import Image

    image = open_image(path)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    shape = (round(image.width * scale), round(image.height * scale))
    image = image.resize(shape, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1


class Check(Dataset):
    """Decodes each image, at an eighth of the size where JPEG allows it. -> (error, turned)."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[str, bool]:
        try:
            with readable(self.files[i]) as image:
                image.draft("RGB", (1, 1))
                image.load()
                if image.mode not in ("L", "RGB"):
                    open_image(self.files[i])
                return "", turned(image)
        except ValueError as error:
            return str(error), False


class Images(Dataset):
    """(image (3, S, S), label) of (file, class)."""

    def __init__(self, files: list[tuple[Path, int]], size: int):
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        file, label = self.files[i]
        return read_image(file, self.size), label


def loader(data: Dataset, settings: Settings, device: torch.device) -> DataLoader:
    """Batches in order, read by worker processes into pinned memory."""
    pinned = device.type == "cuda"
    return DataLoader(data, settings.batch, num_workers=settings.workers, pin_memory=pinned)


def check_images(files: list[Path], settings: Settings, place: runs.Place) -> None:
    """Raises: ValueError that names the damaged files among this process's share."""
    mine, damaged = files[place.rank :: place.world], []
    sideways = torch.zeros(1, dtype=torch.long, device=place.device)
    batches = loader(Check(mine), settings, torch.device("cpu"))
    for errors, rotated in tqdm(batches, "checking images", disable=place.rank > 0 or None):
        damaged += [error for error in errors if error]
        sideways += rotated.sum()
    if damaged:
        more = f"; and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        raise ValueError(
            f"{len(damaged)} of {len(mine)} images are damaged, remove or repair them: "
            f"{'; '.join(damaged[:3])}{more}"
        )
    count = runs.total(sideways).item()
    if count and place.rank == 0:
        print(f"{count} images are turned upright by their EXIF orientation")


# ---------------------------------------------------------------------------------------------
# Latents
# ---------------------------------------------------------------------------------------------


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


def write_shard(number: int, images: list, vae: nn.Module, settings: Settings, device) -> None:
    """Latents and labels of some images, plain and mirrored."""
    plain, mirrored, labels = [], [], []
    for batch, label in loader(Images(images, settings.size), settings, device):
        batch = batch.to(device, non_blocking=True)
        plain.append(encode(vae, batch))
        mirrored.append(encode(vae, batch.flip(3)))
        labels.append(label)
    labels = torch.cat(labels * 2).numpy()
    content = {"labels": labels, "latents": torch.cat(plain + mirrored).numpy()}
    for name, array in content.items():  # the latents last: they say that the shard is whole
        with runs.writing(Path(settings.out) / f"{name}_{number:05d}.npy") as temporary:
            with temporary.open("wb") as file:
                np.save(file, array)


def open_shards(folder: str | Path, net: DiTConfig) -> tuple[list[np.ndarray], np.ndarray]:
    """-> memory-mapped moments (n, 2, C, H, W) of each shard, and all labels (n,).

    Raises: ValueError, with the file's name, for what is damaged, or was not made for such a
        network: another VAE, scale, number of channels, size or number of classes.
    """
    made_from = runs.read_json(Path(folder) / "settings.json")
    shards, moments, labels = sorted(Path(folder).glob("latents_*.npy")), [], []
    if not shards:
        raise ValueError(f"--latents {folder}: no latents_*.npy in it")
    if "vae" not in made_from:
        raise ValueError(f"--latents {folder}: its settings.json does not say which VAE made them")
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
        names = shard, shard.with_name(shard.name.replace("latents", "labels"))
        try:
            moments.append(np.load(names[0], mmap_mode="r"))
            labels.append(np.load(names[1]))
        except (ValueError, EOFError) as error:
            which = names[len(moments) > len(labels)]
            raise ValueError(f"--latents: {which} is damaged: {error}") from error
        if moments[-1].shape[1:] != expected:
            found = f"--latents: {shard} has images of {moments[-1].shape[1:]}"
            raise ValueError(f"{found}; this teacher needs {expected}")
        if len(moments[-1]) != len(labels[-1]):
            counts = f"{len(moments[-1])} latents, {len(labels[-1])} labels"
            raise ValueError(f"--latents: {shard} and its labels: {counts}")
    labels = np.concatenate(labels)
    if not 0 <= labels.min() <= labels.max() < net.num_classes:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        known = f"the teacher knows 0 .. {net.num_classes - 1}"
        raise ValueError(f"--latents {folder} has the label {wrong}; {known}")
    return moments, labels


def main(argv: list[str] | None = None) -> None:
    """Image folder -> shards of latents and labels; see the top of the file."""
    settings = parse(Settings, __doc__, argv)
    if settings.size % 8:
        raise ValueError(f"--size is {settings.size}; it must be a multiple of 8")
    if runs.is_remote(settings.out):
        raise ValueError(f"out is {settings.out}; it must be a local folder")
    with runs.processes(settings.device) as place:
        rank, world, device = place
        found, out = list_images(settings.images), Path(settings.out)
        files = [str(file.relative_to(settings.images)) for file, _ in found]
        classes = found[-1][1] + 1
        if rank == 0:
            print(f"{classes} classes, {len(found)} images")
        made_from = {
            "images": len(found), "classes": classes, "size": settings.size,
            "files": hashlib.blake2b("\n".join(files).encode(), digest_size=8).hexdigest(),
            "shard": settings.shard, "vae": settings.vae,
        }  # fmt: skip
        runs.check_same(out / "settings.json", made_from)
        numbers = range(0, -(-len(found) // settings.shard))[rank::world]
        there = set(runs.list_files(out, "latents_"))
        missing = [number for number in numbers if f"latents_{number:05d}.npy" not in there]
        if not there:
            check_images([file for file, _ in found], settings, place)
        if missing:
            vae = checkpoints.load_vae(device, settings.vae)
            made_from["scale"], made_from["offset"] = checkpoints.latent_scale(vae)
            made_from["weights"] = checkpoints.weights_hash(vae)
            runs.check_same(out / "settings.json", made_from)
            if rank == 0:
                write_json(out / "settings.json", made_from)
                runs.remove_leftovers(out)
        runs.from_first(None)  # only then may others write
        for number in tqdm(missing, disable=rank > 0 or None):
            shard = found[number * settings.shard : (number + 1) * settings.shard]
            write_shard(number, shard, vae, settings, device)
    if rank == 0:
        print(f"{len(found)} images, plain and mirrored, in {out}")


if __name__ == "__main__":
    run_cli(main)
