"""Images as arrays: ImageFolder trees, the same packed into one file, and scikit-learn's digits.

An image is brought to one size when it is read (shorter side to that size, centre crop); what fits into
memory is read once, before the training, and everything else when it is needed. Decoding is Pillow's.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from tokendyn.errors import DataError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SPLITS = ("train", "val")
DIGITS_HELD_OUT = 360  # of 1,797


class Content(Protocol):
    """A file inside another one."""

    def read(self) -> bytes: ...


Source = Path | bytes | Content
# Split -> class -> files as (name, source).
Found = dict[str, dict[str, list[tuple[str, Source]]]]


@dataclass
class ImageSet:
    """One split: images of ``size`` x ``size`` pixels in RGB, read from memory or from files.

    Attributes:
        names: one a image, for messages.
        labels: (n,) int64.
        pixels: (n, size, size, 3) uint8 if all are in memory, else None.
        files: paths or contents of the files, if they are read when needed.
        unreadable: image -> why it cannot be read, of those in memory.
    """

    names: list[str]
    labels: np.ndarray
    size: int
    max_pixels: int
    pixels: np.ndarray | None = None
    files: Sequence[Source] = ()
    crop_share: float = 1.0
    interpolation: str = "bilinear"
    unreadable: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """(pixels (n, size, size, 3), place among ``indices`` -> why it cannot be read)."""
        if self.pixels is not None:
            problems = {}
            if self.unreadable:
                problems = {k: self.unreadable[i] for k, i in enumerate(indices.tolist()) if i in self.unreadable}
            return self.pixels[indices], problems
        out = np.zeros((len(indices), self.size, self.size, 3), np.uint8)
        problems = {}
        for place, index in enumerate(indices.tolist()):
            try:
                out[place] = self.decode(index)
            except DataError as problem:
                problems[place] = str(problem)
        return out, problems

    def decode(self, index: int) -> np.ndarray:
        """:func:`read_image` of one file."""
        return read_image(
            self.files[index],
            self.size,
            self.max_pixels,
            self.names[index],
            crop_share=self.crop_share,
            interpolation=self.interpolation,
        )

    def open(self, index: int) -> Image.Image:
        """:func:`open_image` of one file."""
        return open_image(self.files[index], self.max_pixels, self.names[index])


@dataclass(frozen=True)
class Images:
    """A data set: its classes, both splits, and what identifies it in ``config.json``."""

    classes: tuple[str, ...]
    train: ImageSet
    held_out: ImageSet
    fingerprint: dict[str, Any]


def read_image(
    source: Source,
    size: int,
    max_pixels: int,
    name: str | None = None,
    *,
    crop_share: float = 1.0,
    interpolation: str = "bilinear",
) -> np.ndarray:
    """The image as (size, size, 3) uint8: RGB, brought to size, centre crop.

    Args:
        source: a file, or its content, or what gives it.
        name: what messages call it; the path by default.
        crop_share: the crop's side over the image's shorter one.
        interpolation: ``"bilinear"`` or ``"bicubic"``, antialiased.

    Raises:
        DataError: see :func:`open_image`.
    """
    image = open_image(source, max_pixels, name)
    scale = size / crop_share / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling[interpolation.upper()])
    return np.asarray(image.crop((left, top, left + size, top + size)))


def open_image(source: Source, max_pixels: int, name: str | None = None) -> Image.Image:
    """The image, decoded and in RGB.

    Raises:
        DataError: it is missing, no image, truncated, or has more than ``max_pixels`` pixels.
    """
    file = str(source) if name is None else name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own warnings on size and odd metadata
            content = (
                source
                if isinstance(source, Path)
                else io.BytesIO(source if isinstance(source, bytes) else source.read())
            )
            with Image.open(content, formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise DataError(
                        f"{file} is {width} x {height} pixels, more than the limit of {max_pixels / 1e6:g} million; "
                        f"shrink it, or raise --max-megapixels"
                    )
                return image.convert("RGB")
    except DataError:
        raise
    except Image.DecompressionBombError as cause:
        raise DataError(
            f"{file} has far more pixels than the limit of {max_pixels / 1e6:g} million ({cause}); shrink it"
        ) from cause
    except UnidentifiedImageError as cause:
        raise DataError(f"{file} is no image that can be read ({', '.join(FORMATS)})") from cause
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as cause:  # what decoders raise on bad bytes
        raise DataError(f"{file} cannot be decoded ({cause}); replace or remove it") from cause


def load_folder(root: str, **options: Any) -> Images:
    """An ImageFolder tree: ``root/train/CLASS/*`` and ``root/val/CLASS/*``, in sorted order.

    If both splits fit into ``cache_mb`` they are decoded here. Otherwise the first image of every class is
    tried, and the others are decoded when needed.

    Args:
        options: see :func:`assemble`.

    Raises:
        DataError: a folder is missing or empty, the splits have different classes, or an image is bad.
    """
    base = Path(root)
    if not base.is_dir():
        raise DataError(f"--data-dir {root} is no folder; expected one that holds train/CLASS/* and val/CLASS/*")
    found = {split: image_files(base, split) for split in SPLITS}
    files: Found = {
        split: {name: [(file.relative_to(base).as_posix(), file) for file in entries] for name, entries in of.items()}
        for split, of in found.items()
    }
    return assemble(base, files, **options)


def assemble(
    base: Path,
    found: Found,
    *,
    size: int,
    cache_mb: int,
    max_pixels: int,
    skip_corrupt: bool,
    crop_share: float = 1.0,
    interpolation: str = "bilinear",
) -> Images:
    """Both splits of a data set.

    Args:
        found: split -> class -> files as (name below ``base``, source), all sorted.
        size, max_pixels, crop_share, interpolation: see :func:`read_image`.
        cache_mb: decode all now if both splits fit.
        skip_corrupt: go on without the images that cannot be read instead of raising for the first.

    Raises:
        DataError: the splits have different classes, or an image is bad.
    """
    classes = tuple(found["train"])
    if set(classes) != set(found["val"]):
        only_train = sorted(set(classes) - set(found["val"]))
        only_val = sorted(set(found["val"]) - set(classes))
        raise DataError(
            f"the classes of {base / 'train'} and {base / 'val'} differ: "
            + "; ".join(
                f"only in {split}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
                for split, names in (("train", only_train), ("val", only_val))
                if names
            )
        )
    if len(classes) < 2:
        raise DataError(f"{base / 'train'} holds one class only ({', '.join(classes)}), expected two or more")
    count = sum(len(files) for split in found.values() for files in split.values())
    cached = count * size * size * 3 <= cache_mb * 2**20
    sets = []
    for split in SPLITS:
        files = [entry for name in classes for entry in found[split][name]]
        labels = np.concatenate([np.full(len(found[split][name]), i, np.int64) for i, name in enumerate(classes)])
        names = [str(base / name) for name, _ in files]
        images = ImageSet(names, labels, size, max_pixels)
        images.files = [source for _, source in files]
        images.crop_share, images.interpolation = crop_share, interpolation
        if cached:
            _decode_all(images, skip_corrupt)
        elif not skip_corrupt:
            for name in classes:
                first, source = found[split][name][0]
                open_image(source, max_pixels, str(base / first))
        sets.append(images)
    fingerprint = {
        "kind": "folder",
        "classes": len(classes),
        "train": len(sets[0]),
        "held_out": len(sets[1]),
        "names": _digest([name for split in SPLITS for of in classes for name, _ in found[split][of]]),
    }
    return Images(classes, sets[0], sets[1], fingerprint)


def load_digits(size: int) -> Images:
    """scikit-learn's 1,797 handwritten digits (real scans, 8 x 8), enlarged to ``size``, in RGB.

    The split is fixed: 360 held-out images, drawn once for all runs and seeds.
    """
    from sklearn.datasets import load_digits as load

    bunch: Any = load()
    small = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    grey = np.stack([np.asarray(Image.fromarray(i).resize((size, size), Image.Resampling.BILINEAR)) for i in small])
    pixels = np.repeat(grey[..., None], 3, axis=-1)
    labels = bunch.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    parts = np.sort(order[DIGITS_HELD_OUT:]), np.sort(order[:DIGITS_HELD_OUT])
    train, held_out = (
        ImageSet([f"digit {i}" for i in part], labels[part], size, size * size, pixels=pixels[part]) for part in parts
    )
    fingerprint = {"kind": "digits", "classes": 10, "train": len(train), "held_out": len(held_out)}
    return Images(tuple("0123456789"), train, held_out, fingerprint)


def image_files(base: Path, split: str) -> dict[str, list[Path]]:
    """Class -> its image files, both sorted."""
    folder = base / split
    if not folder.is_dir():
        raise DataError(f"{base} has no folder {split}/; expected {base}/train/CLASS/* and {base}/val/CLASS/*")
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if not names:
            raise DataError(f"{folder} holds no class folders; expected {folder}/CLASS/*")
        classes = {name: _files_below(folder / name) for name in names}
    except OSError as cause:
        raise DataError(f"{folder} cannot be read ({cause})") from cause
    for name, files in classes.items():
        if not files:
            raise DataError(f"the class folder {folder / name} holds no images ({', '.join(SUFFIXES)})")
    return classes


def _files_below(folder: Path) -> list[Path]:
    files, visited = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(real)
        files += [Path(place, name) for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(files)


def _decode_all(images: ImageSet, skip_corrupt: bool) -> None:
    pixels = np.zeros((len(images), images.size, images.size, 3), np.uint8)
    for index in range(len(images)):
        try:
            pixels[index] = images.decode(index)
        except DataError as problem:
            if not skip_corrupt:
                raise DataError(f"{problem}; --skip-corrupt trains without such images") from problem
            images.unreadable[index] = str(problem)
    if len(images.unreadable) == len(images):
        raise DataError(f"none of the {len(images)} images beside {images.names[0]} can be read")
    images.pixels = pixels


def _digest(names: Iterable[str]) -> str:
    """SHA-256 of all names below the tree."""
    return hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()
