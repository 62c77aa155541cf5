"""WebDataset shards: ``train/*.tar`` and ``val/*.tar`` that hold ``KEY.jpg`` beside ``KEY.cls``, the class's number.

Shards are local files, and read by position, so a batch follows from its step like everywhere else. Nothing in them is
run: no ``pipe:`` addresses, no pickles, no decoders but Pillow's.
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokendyn.errors import DataError
from tokendyn.experiments.imagenet._images import SPLITS, SUFFIXES, Found, Images, assemble


@dataclass(frozen=True)
class Member:
    """A file inside a shard."""

    shard: str
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def holds_shards(root: Path) -> bool:
    """Whether the folder is of shards."""
    return any((root / SPLITS[0]).glob("*.tar"))


def load_shards(root: Path, **options: Any) -> Images:
    """All shards below ``root``; ``options``: see :func:`._images.assemble`. Headers alone are read here.

    Raises:
        DataError: a shard is damaged, or an image has no class.
    """
    found: Found = {}
    for split in SPLITS:
        by_class: dict[int, list[tuple[str, Any]]] = {}
        for shard in sorted((root / split).glob("*.tar")):
            for key, label, member in _examples(shard):
                by_class.setdefault(label, []).append((f"{split}/{shard.name}/{key}", member))
        width = len(str(max(by_class, default=0)))
        found[split] = {f"{label:0{width}d}": by_class[label] for label in sorted(by_class)}
        if not by_class:
            raise DataError(f"{root / split} holds no shards with images; expected {split}/*.tar with KEY.jpg, KEY.cls")
    return assemble(root, found, **options)


def _examples(shard: Path) -> list[tuple[str, int, Member]]:
    """(name, class, member) of every image of a shard."""
    images: dict[str, tuple[str, Member]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for entry in archive:
                key, suffix = os.path.splitext(entry.name)
                if not entry.isfile():
                    continue
                if suffix.lower() in SUFFIXES:
                    images[key] = entry.name, Member(str(shard), entry.offset_data, entry.size)
                elif suffix == ".cls":
                    content = archive.extractfile(entry)
                    assert content is not None
                    labels[key] = int(content.read(32))
    except (OSError, tarfile.TarError, ValueError) as cause:
        raise DataError(f"the shard {shard} cannot be read ({cause}); get it again") from cause
    for key, (name, _) in images.items():
        if labels.get(key, -1) < 0:
            raise DataError(f"the shard {shard} holds {name} but no {key}.cls with its class")
    return [(name, labels[key], member) for key, (name, member) in images.items()]
