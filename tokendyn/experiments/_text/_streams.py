"""Streams of tokens in memory-mapped files, and the windows that a training step reads.

::

    NAME/tokens.bin      ids, uint8, uint16 or uint32, little endian, one after another
    NAME/header.json     format, dtype, tokens, vocab_size, text_bytes, words, sha256 of the ids, and where it is from
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokendyn.errors import DataError
from tokendyn.experiments._files import encode_json, new_folder

FORMAT = 1
_ORDER, _OFFSET = 0, 1  # streams of random numbers that must not meet


@dataclass(frozen=True)
class TokenStream:
    """A text as ids.

    Attributes:
        folder: where the two files lie.
        header: the content of ``header.json``.
    """

    folder: Path
    header: dict[str, Any]

    def __len__(self) -> int:
        return self.header["tokens"]

    @property
    def ids(self) -> np.ndarray:
        """All ids, as a map of the file: nothing is read before it is used, and nothing of it is pickled."""
        return _map(self.folder / "tokens.bin", self.header["dtype"], len(self))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What two equal streams have in common, wherever they lie."""
        return {key: self.header[key] for key in ("tokens", "vocab_size", "text_bytes", "words", "sha256")}


@functools.lru_cache(maxsize=8)
def _map(file: Path, dtype: str, count: int) -> np.ndarray:
    return np.memmap(file, np.dtype(dtype).newbyteorder("<"), "r", shape=(count,))


def write_stream(
    folder: Path, pieces: Iterable[np.ndarray], *, vocab_size: int, text_bytes: int, words: int, source: dict[str, Any]
) -> TokenStream:
    """Write the ids of ``pieces``, one after another, into the new folder ``folder``; it appears at once and whole.

    Raises:
        DataError: there are no ids, an id is out of range, or the folder cannot be written.
    """
    dtype = np.dtype(np.uint8 if vocab_size <= 2**8 else np.uint16 if vocab_size <= 2**16 else np.uint32)
    count, digest = 0, hashlib.sha256()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as temporary:
            with (temporary / "tokens.bin").open("wb") as file:
                for piece in pieces:
                    if len(piece) and (piece.min() < 0 or piece.max() >= vocab_size):
                        raise DataError(f"a token id lies outside 0 ... {vocab_size - 1}: the tokenizer is not the one")
                    content = np.ascontiguousarray(piece, dtype.newbyteorder("<")).tobytes()
                    file.write(content)
                    digest.update(content)
                    count += len(piece)
            if not count:
                raise DataError(f"{source} holds no text")
            header = {
                "format": FORMAT,
                "dtype": dtype.name,
                "tokens": count,
                "vocab_size": vocab_size,
                "text_bytes": text_bytes,
                "words": words,
                "sha256": digest.hexdigest(),
                "source": source,
            }
            (temporary / "header.json").write_bytes(encode_json(header))
    except OSError as cause:
        raise DataError(f"tokens cannot be written to {folder} ({cause}); choose another --cache-dir") from cause
    return TokenStream(folder, header)


def open_stream(folder: Path) -> TokenStream | None:
    """The stream in ``folder``, or None if there is none, or one of another format or length."""
    try:
        header = json.loads((folder / "header.json").read_bytes())
        whole = header["format"] == FORMAT
        size = header["tokens"] * np.dtype(header["dtype"]).itemsize
        whole = whole and (folder / "tokens.bin").stat().st_size == size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return TokenStream(folder, header) if whole else None


def windows_per_epoch(tokens: int, length: int) -> int:
    """Windows of ``length`` tokens, and the one after each, that fit wherever an epoch's first one begins."""
    return (tokens - length) // length


@functools.lru_cache(maxsize=2)
def _epoch(windows: int, length: int, seed: int, epoch: int) -> tuple[np.ndarray, int]:
    order = np.random.default_rng([seed, _ORDER, epoch]).permutation(windows)
    return order, int(np.random.default_rng([seed, _OFFSET, epoch]).integers(length))


def training_windows(stream: TokenStream, step: int, *, length: int, batch_size: int, seed: int) -> np.ndarray:
    """(batch_size, length + 1) ids: the batch of one step, a function of the step and the seed alone.

    An epoch cuts the stream into windows that do not overlap, from an offset of its own, and takes them in an order
    of its own; the last incomplete batch is left out.
    """
    windows = windows_per_epoch(len(stream), length)
    epoch, place = divmod(step, windows // batch_size)
    order, offset = _epoch(windows, length, seed, epoch)
    starts = offset + length * order[place * batch_size : (place + 1) * batch_size]
    return stream.ids[starts[:, None] + np.arange(length + 1)].astype(np.int64)
