"""An ImageFolder tree in one file: safetensors that hold the image files as they are, end to end.

``python -m tokendyn.experiments.imagenet.pack TREE FILE.safetensors`` writes one; ``--data-dir FILE.safetensors`` reads
it. It holds ``bytes`` (uint8), ``offsets`` (n + 1, int64) of the files in it, and ``names`` (uint8): their paths below
the tree, one a line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tokendyn.errors import DataError
from tokendyn.experiments._files import write_with
from tokendyn.experiments.imagenet._images import SPLITS, Found, Images, assemble, image_files

SUFFIX = ".safetensors"


def pack_folder(tree: Path, file: Path) -> int:
    """Write the image files of ``tree`` into ``file``; how many there were.

    Raises:
        DataError: ``tree`` is no ImageFolder tree.
    """
    files = [entry for split in SPLITS for of_class in image_files(tree, split).values() for entry in of_class]
    contents = [entry.read_bytes() for entry in files]
    names = "\n".join(entry.relative_to(tree).as_posix() for entry in files)
    tensors = {
        "bytes": np.frombuffer(b"".join(contents), np.uint8),
        "offsets": np.cumsum([0, *map(len, contents)], dtype=np.int64),
        "names": np.frombuffer(names.encode(), np.uint8),
    }
    write_with(file, lambda place: save_file(tensors, place))
    return len(files)


def load_packed(file: Path, **options: Any) -> Images:
    """The tree that was packed into ``file``; ``options``: see :func:`._images.assemble`.

    Raises:
        DataError: it is no such file, or what :func:`._images.load_folder` raises.
    """
    try:
        tensors = load_file(file)
        content, offsets = tensors["bytes"].tobytes(), tensors["offsets"].tolist()
        names = tensors["names"].tobytes().decode().split("\n")
        paths = [name.split("/", 2) for name in names]
        known = all(len(path) == 3 and path[0] in SPLITS for path in paths)
        if not known or len(offsets) != len(names) + 1 or offsets != sorted(offsets) or offsets[-1] != len(content):
            raise ValueError("names and offsets do not fit")
    except (OSError, SafetensorError, KeyError, ValueError) as cause:
        raise DataError(
            f"--data-dir {file} is no packed tree ({cause}); write one with "
            f"python -m tokendyn.experiments.imagenet.pack TREE {file}"
        ) from cause
    found: Found = {split: {} for split in SPLITS}
    for name, (split, label, _), start, end in zip(names, paths, offsets, offsets[1:], strict=False):
        found[split].setdefault(label, []).append((name, content[start:end]))
    return assemble(file, found, **options)
