"""timm's augmentation for training at full scale. timm and torchvision are imported when they are asked for."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokendyn.errors import OptionError
from tokendyn.experiments import _random


def timm_data() -> Any:
    """``timm.data``.

    Raises:
        OptionError: timm or torchvision is missing, or does not fit this torch.
    """
    try:
        return importlib.import_module("timm.data")
    except Exception as cause:  # torchvision beside a torch that it was not built for raises RuntimeError
        raise OptionError(
            f"--augment timm and --mixup need timm and torchvision, which cannot be imported here "
            f"({' '.join(str(cause).split())}); run: pip install 'tokendyn[vision]' (torchvision must be the one made "
            f"for the installed torch {torch.__version__})"
        ) from cause


@functools.lru_cache(maxsize=2)
def _transform(size: int, rand_augment: str, color_jitter: float, smallest_area: float, flip: bool) -> Any:
    return timm_data().create_transform(
        size,
        is_training=True,
        auto_augment=rand_augment or None,
        color_jitter=color_jitter,
        scale=(smallest_area, 1.0),
        hflip=0.5 if flip else 0.0,
        interpolation="bicubic",
        normalize=False,  # uint8, which is a quarter to send
    )


def augment(
    image: Image.Image,
    seed: tuple[int, ...],
    *,
    size: int,
    rand_augment: str,
    color_jitter: float,
    smallest_area: float,
    flip: bool,
) -> np.ndarray:
    """A random crop of ``image``, enlarged, mirrored, distorted: (size, size, 3) uint8, a function of ``seed``.

    timm draws from the global generators; they go on afterwards as if nothing had been drawn.
    """
    transform = _transform(size, rand_augment, color_jitter, smallest_area, flip)
    with _random.isolated(int(np.random.SeedSequence(seed).generate_state(1)[0])):
        return transform(image).permute(1, 2, 0).numpy()


@functools.lru_cache(maxsize=2)
def _mixup(mixup: float, cutmix: float, smoothing: float, classes: int) -> Any:
    return timm_data().Mixup(
        mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=smoothing, num_classes=classes, mode="batch"
    )


def mix(
    images: Tensor, labels: Tensor, *, mixup: float, cutmix: float, smoothing: float, classes: int
) -> tuple[Tensor, Tensor]:
    """Images mixed with others of the batch, and their soft targets (b, classes). Draws from NumPy's generator."""
    return _mixup(mixup, cutmix, smoothing, classes)(images, labels)
