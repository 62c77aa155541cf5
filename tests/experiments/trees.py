"""ImageFolder trees of noise, in which every class has a brightness of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_image(file: Path, *, width: int = 20, height: int = 16, level: int = 100, seed: int = 0) -> None:
    """Noise around a grey level."""
    noise = np.random.default_rng([seed, level]).integers(0, 40, (height, width, 3))
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((level + noise).astype(np.uint8)).save(file)


def write_tree(root: Path, *, classes: int = 2, train: int = 8, val: int = 3) -> Path:
    """A tree of PNG images; returned for convenience."""
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            for i in range(count):
                seed = 1000 * label + 10 * i + len(split)
                write_image(root / split / f"class{label}" / f"{i:03d}.png", level=60 * label, seed=seed)
    return root
