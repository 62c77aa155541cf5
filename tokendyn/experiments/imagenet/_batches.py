"""Training batches of images as a function of the step: order, crops and mirrors follow from seed and epoch.

A batch is planned first (which images, which part of each) and cut out afterwards, by the same code on the CPU and on
a device that holds all images.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokendyn.errors import DataError
from tokendyn.experiments.imagenet._images import ImageSet

_ORDER, _AUGMENTATION, _ZOOM = 0, 1, 2  # streams of random numbers that must not meet
ASPECT = 4 / 3  # largest ratio of the sides of a zoomed crop, both ways


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image.

    Attributes:
        padding: a crop of full size may lie so many pixels off the image, padded with black.
        flip: mirror half of the images.
        smallest_area: below 1, crops are instead of a share of the area between this and 1 and of sides up to
            :data:`ASPECT` apart, enlarged to full size.
    """

    padding: int
    flip: bool
    smallest_area: float = 1.0


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """(count,) the order of the examples in one epoch: a permutation."""
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(count)


@functools.lru_cache(maxsize=2)
def epoch_augmentation(count: int, seed: int, epoch: int, padding: int) -> np.ndarray:
    """(count, 3) of every example: top and left of its crop, 0 to 2 padding, and whether it is mirrored."""
    generator = np.random.default_rng([seed, _AUGMENTATION, epoch])
    return generator.integers([2 * padding + 1, 2 * padding + 1, 2], size=(count, 3))


@functools.lru_cache(maxsize=2)
def epoch_zoom(count: int, seed: int, epoch: int, smallest_area: float) -> np.ndarray:
    """(count, 4) of every example: top, left, height and width of its crop as shares of the image, float32."""
    area, aspect, top, left = np.random.default_rng([seed, _ZOOM, epoch]).random((4, count))
    area = smallest_area + (1 - smallest_area) * area
    ratio = ASPECT ** (2 * aspect - 1)
    height, width = np.minimum(1, np.sqrt(area / ratio)), np.minimum(1, np.sqrt(area * ratio))
    return np.stack([top * (1 - height), left * (1 - width), height, width], axis=1).astype(np.float32)


def plan_batch(
    images: ImageSet, step: int, *, batch_size: int, seed: int, augmentation: Augmentation
) -> tuple[np.ndarray, np.ndarray]:
    """Which images a step sees, and which part of each.

    Every epoch runs through the images in an order of its own and leaves out the last incomplete batch.

    Returns:
        (indices (b,), crops (b, 3): see :func:`epoch_augmentation`; or (b, 5): mirrored, then :func:`epoch_zoom`)
    """
    epoch, place = divmod(step, len(images) // batch_size)
    indices = epoch_order(len(images), seed, epoch)[place * batch_size : (place + 1) * batch_size].copy()
    crops = epoch_augmentation(len(images), seed, epoch, augmentation.padding)[indices]
    if augmentation.smallest_area < 1:
        zoom = epoch_zoom(len(images), seed, epoch, augmentation.smallest_area)[indices]
        crops = np.concatenate([crops[:, 2:].astype(np.float32), zoom], axis=1)
    if not augmentation.flip:
        crops = crops.copy()
        crops[:, 0 if crops.shape[1] == 5 else 2] = 0
    return indices, crops


def readable_batch(images: ImageSet, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """The images of a batch. One that cannot be read is replaced by the next readable one in the order of the files,
    so batches keep their size.

    Returns:
        (pixels (b, size, size, 3) uint8, indices of the images taken, name -> why for each that was replaced)

    Raises:
        DataError: no image at all can be read.
    """
    indices = indices.copy()
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
    return pixels, indices, skipped


def crop(pixels: Tensor, crops: Tensor, padding: int) -> Tensor:
    """Cut the planned part out of each image (b, size, size, 3).

    Args:
        crops: (b, 3) top, left and mirrored: a crop of full size from the image padded with black, uint8; or (b, 5)
            mirrored, top, left, height, width as shares: enlarged bilinearly, float32.
    """
    if crops.shape[1] == 5:
        return _zoom(pixels, crops)
    size = pixels.shape[1]
    along = torch.arange(size, device=pixels.device)
    top, left, mirrored = crops[:, :, None].unbind(1)
    rows = top - padding + along
    columns = left - padding + torch.where(mirrored == 1, along.flip(0), along)
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
    batch = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    found = pixels[batch, rows.clamp(0, size - 1)[:, :, None], columns.clamp(0, size - 1)[:, None, :]]
    return found * inside[..., None]


def _zoom(pixels: Tensor, crops: Tensor) -> Tensor:
    mirrored, top, left, height, width = crops.unbind(1)
    zero = torch.zeros_like(top)
    # affine_grid's coordinates run from -1 to 1 over the image.
    across = torch.stack([width * (1 - 2 * mirrored), zero, 2 * left + width - 1], dim=1)
    down = torch.stack([zero, height, 2 * top + height - 1], dim=1)
    images = pixels.permute(0, 3, 1, 2).float()
    with torch.autocast(pixels.device.type, enabled=False):  # coordinates in bfloat16 would miss by whole pixels
        grid = F.affine_grid(torch.stack([across, down], dim=1), list(images.shape), align_corners=False)
        sampled = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.permute(0, 2, 3, 1)
