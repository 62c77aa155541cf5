"""Text to train on and to measure on: the package's own source, or a file; one byte a token."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokendyn.errors import DataError


def read_bytes(path: Path | None) -> np.ndarray:
    """The ids of a text file; without one those of the Python files of tokendyn.core, in order of their names."""
    if path is not None:
        if not path.is_file():
            raise DataError(f"--text {path} is no file")
        text = path.read_bytes()
    else:
        folder = files("tokendyn.core")
        names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".py"))
        text = b"".join((folder / name).read_bytes() for name in names)
    return to_ids(text)


def to_ids(text: bytes) -> np.ndarray:
    """The ids (L,) of a text's bytes: ASCII as it is, all else one id."""
    data = np.frombuffer(text, np.uint8)
    return np.where(data < 128, data, 128).astype(np.int64)


def split(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nine tenths to train on and the last tenth to measure on."""
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def cut_sequences(data: np.ndarray, count: int, length: int, seed: int) -> list[Tensor]:
    """``count`` sequences (1, length) from places drawn without overlap where there is room."""
    rooms = len(data) // length
    if rooms < 2:
        raise DataError(f"the text has {len(data)} bytes, expected at least {2 * length}")
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(rooms)[: min(count, rooms)]
    return [torch.from_numpy(data[r * length : (r + 1) * length].copy())[None] for r in chosen]
