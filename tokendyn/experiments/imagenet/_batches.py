"""Training batches of images as a function of the step: order, crops and mirrors follow from seed and epoch."""

from __future__ import annotations

import functools

import numpy as np

from tokendyn.errors import DataError
from tokendyn.experiments.imagenet._images import ImageSet

_ORDER, _AUGMENTATION = 0, 1  # streams of random numbers that must not meet


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """(count,) the order of the examples in one epoch: a permutation."""
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(count)


@functools.lru_cache(maxsize=2)
def epoch_augmentation(count: int, seed: int, epoch: int, padding: int) -> np.ndarray:
    """(count, 3) of every example: top and left of its crop, 0 to 2 padding, and whether it is mirrored."""
    generator = np.random.default_rng([seed, _AUGMENTATION, epoch])
    return generator.integers([2 * padding + 1, 2 * padding + 1, 2], size=(count, 3))


def training_batch(
    images: ImageSet, step: int, *, batch_size: int, seed: int, padding: int, flip: bool
) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """The batch of one step: ``batch_size`` of ``images``, each padded, cropped at random and maybe mirrored.

    Every epoch runs through the images in an order of its own and leaves out the last incomplete batch. An
    image that cannot be read is replaced by the next readable one in the order of the files, so batches keep
    their size.

    Returns:
        (pixels (b, size, size, 3) uint8, labels (b,) int64, name -> why for each image that was replaced)

    Raises:
        DataError: no image at all can be read.
    """
    epoch, place = divmod(step, len(images) // batch_size)
    indices = epoch_order(len(images), seed, epoch)[place * batch_size : (place + 1) * batch_size].copy()
    pixels, problems = images.read(indices)
    skipped = {images.names[indices[k]]: reason for k, reason in problems.items()}
    for k in problems:
        for distance in range(1, len(images)):
            substitute = np.array([(indices[k] + distance) % len(images)])
            found, unreadable = images.read(substitute)
            if not unreadable:
                pixels[k], indices[k] = found[0], substitute[0]
                break
            skipped[images.names[substitute[0]]] = unreadable[0]
        else:
            raise DataError(f"none of the {len(images)} training images can be read; {next(iter(skipped.values()))}")
    top, left, mirrored = epoch_augmentation(len(images), seed, epoch, padding)[indices].T
    return crop(pixels, padding, top, left, mirrored * flip), images.labels[indices], skipped


def crop(pixels: np.ndarray, padding: int, top: np.ndarray, left: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """Each image, after ``padding`` black pixels on all sides, cut back to its size at (top, left), and mirrored."""
    size = pixels.shape[1]
    padded = np.pad(pixels, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    along = np.arange(size)
    rows = top[:, None] + along
    columns = left[:, None] + np.where(mirrored[:, None] == 1, along[::-1], along)
    return padded[np.arange(len(pixels))[:, None, None], rows[:, :, None], columns[:, None, :]]
