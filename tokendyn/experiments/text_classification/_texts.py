"""Labelled texts: JSON lines or Hugging Face's datasets, as word ids."""

from __future__ import annotations

import collections
import hashlib
import importlib.resources
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokendyn.errors import DataError
from tokendyn.experiments._text._sources import HUGGING_FACE, load_hugging_face, read_text
from tokendyn.experiments.text_classification._config import DataConfig

PADDING, UNKNOWN = 0, 1  # the ids before those of words
SPLITS = ("train", "test")
_WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")
_TAG = re.compile(r"<br\s*/?>")  # IMDB's line breaks
_SUFFIXES = (".jsonl", ".jsonl.xz", ".jsonl.gz", ".ndjson", ".json")


@dataclass(frozen=True)
class Labelled:
    """Texts with labels, as they were read."""

    texts: list[str]
    labels: list[str]


@dataclass(frozen=True)
class TextSet:
    """One split as ids.

    Attributes:
        ids: all texts end to end, int32.
        starts: (n + 1,) where each begins.
        labels: (n,) numbers of classes.
        texts: the texts themselves, for a reference that reads them.
    """

    ids: np.ndarray
    starts: np.ndarray
    labels: np.ndarray
    texts: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def padded(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids (n, longest), padded on the right, and lengths (n,)) of these texts."""
        lengths = self.lengths[indices]
        ids = np.full((len(indices), lengths.max()), PADDING, np.int64)
        for row, index in zip(ids, indices, strict=True):
            text = self.ids[self.starts[index] : self.starts[index + 1]]
            row[: len(text)] = text
        return ids, lengths


@dataclass(frozen=True)
class Texts:
    """A data set: its classes, its words, both splits, and what identifies it in ``config.json``."""

    classes: tuple[str, ...]
    vocab_size: int
    train: TextSet
    held_out: TextSet
    fingerprint: dict[str, Any]


def load_texts(data: DataConfig) -> Texts:
    """The texts that ``data`` names.

    Raises:
        DataError: they cannot be read, or the splits do not fit together.
    """
    splits = _read(data)
    classes = tuple(sorted(set(splits["train"].labels), key=lambda name: (len(name), name)))
    strangers = sorted(set(splits["test"].labels) - set(classes))
    if len(classes) < 2 or strangers:
        found = f"the label {strangers[0]!r} of the test texts is none of the training texts'" if strangers else ""
        raise DataError(f"{found or 'the training texts have one label only'}; expected the same classes in both")
    words = {name: [_words(text)[: data.max_length] for text in split.texts] for name, split in splits.items()}
    counts = collections.Counter(word for text in words["train"] for word in text)
    ranked = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))[: data.vocabulary]
    numbers = {word: place + UNKNOWN + 1 for place, (word, _) in enumerate(ranked)}
    sets = {}
    for name, split in splits.items():
        ids = [[numbers.get(word, UNKNOWN) for word in text] or [UNKNOWN] for text in words[name]]
        starts = np.concatenate([[0], np.cumsum([len(text) for text in ids])])
        labels = np.array([classes.index(label) for label in split.labels], np.int64)
        sets[name] = TextSet(np.concatenate([np.array(text, np.int32) for text in ids]), starts, labels, split.texts)
    digest = hashlib.sha256()
    for name in SPLITS:
        for text, label in zip(splits[name].texts, splits[name].labels, strict=True):
            digest.update(f"{label}\0{text}\0".encode())
    fingerprint = {
        "classes": list(classes),
        "train": len(sets["train"]),
        "test": len(sets["test"]),
        "words": len(numbers),
        "sha256": digest.hexdigest(),
    }
    return Texts(classes, len(numbers) + UNKNOWN + 1, sets["train"], sets["test"], fingerprint)


def _words(text: str) -> list[str]:
    return _WORD.findall(_TAG.sub(" ", text).lower())


def _read(data: DataConfig) -> dict[str, Labelled]:
    if data.data is None:
        if data.test is not None:
            raise DataError("--test was given without --data; give both")
        folder = importlib.resources.files("tokendyn.experiments.text_classification") / "data"
        with ExitStack() as stack:
            files = [stack.enter_context(importlib.resources.as_file(folder / f"ag_news_{s}.jsonl.xz")) for s in SPLITS]
            return {split: _read_lines(file) for split, file in zip(SPLITS, files, strict=True)}
    if data.data.startswith(HUGGING_FACE):
        return _hugging_face(data.data.removeprefix(HUGGING_FACE))
    place = Path(data.data)
    train = _one_file(place, "train") if place.is_dir() else place
    if not train.is_file():
        raise DataError(f"--data {data.data}: no such file or folder")
    if data.test is not None:
        test = Path(data.test)
    else:
        stem = train.name.partition("train")[0]
        test = _one_file(train.parent, "test", stem)
    return {"train": _read_lines(train), "test": _read_lines(test)}


def _one_file(folder: Path, split: str, stem: str = "") -> Path:
    """The file of JSON lines in ``folder`` whose name has ``split`` in it and begins with ``stem``."""
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.name.endswith(_SUFFIXES) and split in file.name and file.name.startswith(stem)
    ]
    if len(files) != 1:
        named = f" that begins with {stem!r}" if stem else ""
        raise DataError(
            f"{folder} holds {len(files)} files of JSON lines named {split}{named} "
            f"({', '.join(file.name for file in files) or 'none'}), expected one; name the files with --data and --test"
        )
    return files[0]


def _read_lines(file: Path) -> Labelled:
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), start=1):  # splitlines would also cut at U+2028, U+0085
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as cause:
            raise DataError(f"{file}, line {number} is no JSON ({cause})") from cause
        rows.append((f"{file}, line {number}", row))
    return _labelled(str(file), rows)


def _labelled(name: str, rows: Iterable[tuple[str, Any]]) -> Labelled:
    found = Labelled([], [])
    for place, row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or "label" not in row:
            raise DataError(f"{place}: expected an object with text and label, and maybe title")
        found.texts.append(f"{row['title']}. {row['text']}" if row.get("title") else row["text"])
        found.labels.append(str(row["label"]))
    if not found.texts:
        raise DataError(f"{name} holds no texts")
    return found


def _hugging_face(name: str) -> dict[str, Labelled]:
    found = load_hugging_face("--data", name)
    if not set(SPLITS) <= set(found):
        raise DataError(f"--data hf:{name} has the splits {', '.join(found)}; expected train and test")
    return {
        split: _labelled(f"hf:{name}", ((f"hf:{name}, {split} {i}", row) for i, row in enumerate(found[split])))
        for split in SPLITS
    }
