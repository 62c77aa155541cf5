"""Tokenizers: bytes, and GPT-2's byte pair encoding from its two local files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tokendyn.errors import DataError
from tokendyn.experiments._files import sha256

_PIECE = 1 << 20  # characters that are encoded at one time


class Tokenizer(Protocol):
    """Text to ids. ``identity`` is what must be equal for two tokenizers to give the same ids."""

    vocab_size: int
    end: int  # the id that follows every document
    identity: dict[str, Any]

    def encode(self, text: str) -> Iterator[np.ndarray]:
        """The ids of ``text``, piece by piece; together those of the whole."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; what is no whole character becomes U+FFFD."""
        ...


class Bytes:
    """UTF-8: an id for each byte; 0, which is in no text, ends a document."""

    vocab_size = 256
    end = 0
    identity: dict[str, Any] = {"kind": "bytes"}  # noqa: RUF012 - never changed

    def encode(self, text: str) -> Iterator[np.ndarray]:
        yield np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


class GPT2:
    """GPT-2's byte pair encoding, from a folder with its ``vocab.json`` and ``merges.txt``.

    Raises:
        DataError: the files, or the package tokenizers, are missing.
    """

    vocab_size = 50_257
    end = 50_256

    def __init__(self, folder: str | Path) -> None:
        files = [Path(folder) / name for name in ("vocab.json", "merges.txt")]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise DataError(
                f"--tokenizer-dir: {', '.join(missing)} missing; expected GPT-2's vocab.json and merges.txt"
            )
        try:
            from tokenizers import ByteLevelBPETokenizer
        except ImportError as cause:
            raise DataError("--tokenizer gpt2 needs the package tokenizers; run: pip install tokenizers") from cause
        try:
            self._encoder = ByteLevelBPETokenizer.from_file(*map(str, files))
        except Exception as cause:  # the package raises bare Exceptions
            raise DataError(f"--tokenizer-dir: {folder} cannot be read ({cause})") from cause
        if self._encoder.get_vocab_size() != self.vocab_size:
            raise DataError(
                f"--tokenizer-dir: {files[0]} holds {self._encoder.get_vocab_size()} ids, GPT-2's holds "
                f"{self.vocab_size}"
            )
        self.identity = {"kind": "gpt2", "vocab": sha256(files[0]), "merges": sha256(files[1])}

    def encode(self, text: str) -> Iterator[np.ndarray]:
        for piece in _pieces(text, _PIECE):
            yield np.array(self._encoder.encode(piece).ids, np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoder.decode(list(ids))


def load_tokenizer(name: str, folder: str | None) -> Tokenizer:
    """The tokenizer that ``--tokenizer`` names.

    Raises:
        DataError: its files are missing or not given.
    """
    if name == "bytes":
        return Bytes()
    if folder is None:
        raise DataError("--tokenizer gpt2 needs --tokenizer-dir, a folder with GPT-2's vocab.json and merges.txt")
    return GPT2(folder)


def _pieces(text: str, size: int) -> Iterator[str]:
    """``text`` cut where GPT-2's tokens never cross: before a line break that follows no white space."""
    start = 0
    cut = re.compile(r"(?<=\S)\n")
    while start < len(text):
        found = cut.search(text, start + size)
        stop = found.start() if found else len(text)
        yield text[start:stop]
        start = stop
