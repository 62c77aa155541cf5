"""Where text comes from, and how it becomes streams of tokens in a cache."""

from __future__ import annotations

import gzip
import hashlib
import importlib.resources
import lzma
import os
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokendyn.errors import DataError
from tokendyn.experiments._text._streams import TokenStream, open_stream, write_stream
from tokendyn.experiments._text._tokenizers import Tokenizer
from tokendyn.experiments._text._wikitext import detokenize

HUGGING_FACE = "hf:"
RANDOM = "random"
LETTERS = string.ascii_letters + string.digits + "+-"  # 64: ln 64 nats each, drawn at random
_PLAIN = (".txt", ".raw", ".tokens", ".text")
_PACKED = {".xz": lzma.open, ".gz": gzip.open}
_DRAWN = (("train", 1 << 20), ("held_out", 1 << 16))  # random letters
_SPLITS = {"train": ("train",), "held_out": ("valid", "validation", "val", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class Text:
    """Documents with a name for messages; ``words`` of the text as published, where it was changed since."""

    name: str
    documents: Sequence[str]
    words: int | None = None


def read_split_text(source: str | None, held_out_part: float) -> dict[str, Text]:
    """Texts by split, ``train`` and ``held_out`` among them.

    Args:
        source: a folder with files (or folders) of text named train, valid and maybe test; one text file, whose last
            part is held out; ``hf:NAME`` or ``hf:NAME:CONFIGURATION`` of Hugging Face's datasets; ``random`` for
            independent uniform :data:`LETTERS`; None for the text that comes with the package. Files may end in .xz or
            .gz.
        held_out_part: part of a single file that is held out.

    Raises:
        DataError: it cannot be read.
    """
    if source is None:
        place = importlib.resources.files("tokendyn.experiments._text") / "data" / "wikipedia.txt.xz"
        text = lzma.decompress(place.read_bytes()).decode()
        return _cut("43 articles of Wikipedia", text, held_out_part)
    if source == RANDOM:
        return {name: Text("random letters", [_letters(place, count)]) for place, (name, count) in enumerate(_DRAWN)}
    if source.startswith(HUGGING_FACE):
        return _hugging_face(source.removeprefix(HUGGING_FACE))
    place = Path(source)
    if place.is_file():
        return _cut(str(place), read_text(place), held_out_part)
    if not place.is_dir():
        raise DataError(f"--text {source}: no such file or folder")
    found = {split: _files_of(place, names) for split, names in _SPLITS.items()}
    missing = [split for split in ("train", "held_out") if not found[split]]
    if missing:
        names = ", ".join(sorted(entry.name for entry in place.iterdir())[:8]) or "nothing"
        raise DataError(
            f"--text {source}: no text for {' and '.join(missing)}; expected files or folders of text whose names hold "
            f"train and valid, and maybe test ({names} is there)"
        )
    return {split: Text(str(place), [read_text(file) for file in files]) for split, files in found.items() if files}


def read_text(file: Path) -> str:
    """The text of a file, unpacked if it ends in .xz or .gz.

    Raises:
        DataError: it cannot be read, or is no UTF-8.
    """
    try:
        opened = _PACKED.get(file.suffix, open)(file, "rt", encoding="utf-8")
        with opened as readable:
            return str(readable.read())
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as cause:
        raise DataError(f"{file} cannot be read as UTF-8 text ({cause})") from cause


def published_text(file: Path, *, wikitext: bool) -> Text:
    """A text to be measured on; with ``wikitext`` its spacing is undone, and its words counted before that."""
    text = read_text(file)
    return Text(file.name, [detokenize(text)], count_words(text)) if wikitext else Text(file.name, [text])


def encoded(text: Text, tokenizer: Tokenizer, cache: Path) -> TokenStream:
    """``text`` as a stream of tokens below ``cache``; made only if the same text was not encoded before.

    Raises:
        DataError: the text is empty, or the cache cannot be written.
    """
    digest = hashlib.sha256(repr(sorted(tokenizer.identity.items())).encode())
    for document in text.documents:
        digest.update(hashlib.sha256(document.encode()).digest())
    folder = cache / digest.hexdigest()[:32]

    def pieces() -> Iterator[np.ndarray]:
        for document in text.documents:
            yield from tokenizer.encode(document)
            yield np.array([tokenizer.end])

    if not any(text.documents):
        raise DataError(f"{text.name} holds no text")
    stream = open_stream(folder) or write_stream(
        folder,
        pieces(),
        vocab_size=tokenizer.vocab_size,
        text_bytes=sum(len(document.encode()) for document in text.documents),
        words=sum(map(count_words, text.documents)),
        source={"name": Path(text.name).name, "tokenizer": tokenizer.identity},
    )
    if text.words is not None:
        stream = TokenStream(stream.folder, stream.header | {"words": text.words})
    return stream


def default_cache() -> Path:
    """Where encoded texts are kept unless ``--cache-dir`` says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokendyn" / "tokens"


def count_words(text: str) -> int:
    """Words between white space, and one for the end of each line: WikiText's customary count, 217,646 in its
    validation split."""
    return sum(len(line.split()) + 1 for line in text.splitlines())


def _letters(seed: int, count: int) -> str:
    return "".join(np.random.default_rng([seed, count]).choice(list(LETTERS), count))


def _cut(name: str, text: str, part: float) -> dict[str, Text]:
    """``text`` in two, before the paragraph nearest to where ``part`` of it is left."""
    breaks = [found.start() + 1 for found in re.finditer(r"\n\s*\S", text)]
    if not breaks:
        raise DataError(f"{name} is one line, so no part can be held out; give a folder with train and valid")
    wanted = round(len(text) * (1 - part))
    cut = min(breaks, key=lambda place: abs(place - wanted))
    return {"train": Text(name, [text[:cut]]), "held_out": Text(name, [text[cut:]])}


def _files_of(folder: Path, names: Sequence[str]) -> list[Path]:
    """Text files of one split: those whose name holds one of ``names``, or all in a folder of that name."""
    for name in names:
        inner = folder / name
        entries = sorted(inner.rglob("*") if inner.is_dir() else folder.iterdir())
        texts = [entry for entry in entries if entry.is_file() and _is_text(entry)]
        if not inner.is_dir():
            texts = [entry for entry in texts if name in re.split(r"[^a-z]+", entry.name.lower())]
        if texts:
            return texts
    return []


def _is_text(file: Path) -> bool:
    inner = file.with_suffix("") if file.suffix in _PACKED else file
    return inner.suffix in _PLAIN


def load_hugging_face(option: str, name: str) -> Any:
    """The splits of a data set ``NAME`` or ``NAME:CONFIGURATION``, given as ``option``.

    Raises:
        DataError: it cannot be had.
    """
    try:
        import datasets
    except ImportError as cause:
        raise DataError(f"{option} hf:{name} needs the package datasets; run: pip install datasets") from cause
    path, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(path, configuration or None)
    except Exception as cause:  # network, permission, unknown name: the package has many errors
        raise DataError(f"{option} hf:{name} cannot be had ({cause})") from cause


def _hugging_face(name: str) -> dict[str, Text]:
    found = load_hugging_face("--text", name)
    texts = {}
    for split, names in _SPLITS.items():
        rows = next((found[key] for key in names if key in found), None)
        if rows is not None:
            texts[split] = Text(f"hf:{name}", ["".join(rows["text"])])
    if not {"train", "held_out"} <= set(texts):
        raise DataError(f"--text hf:{name} has the splits {', '.join(found)}; expected train and validation")
    return texts
