"""Pack an ImageFolder tree into one file: ``python -m tokendyn.experiments.imagenet.pack TREE FILE.safetensors``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tokendyn.experiments import _cli


def command(arguments: list[str]) -> None:
    """Parse ``arguments`` and pack."""
    from tokendyn.experiments.imagenet._packed import SUFFIX, pack_folder

    parser = argparse.ArgumentParser(
        prog="python -m tokendyn.experiments.imagenet.pack",
        description="Write all image files of an ImageFolder tree, as they are, into one safetensors file, for "
        "--data-dir: one file to copy instead of many.",
    )
    parser.add_argument("tree", type=Path, help="folder that holds train/CLASS/* and val/CLASS/*")
    parser.add_argument("file", type=Path, help=f"the file to write, NAME{SUFFIX}")
    given = parser.parse_args(arguments)
    if given.file.suffix != SUFFIX:
        parser.error(f"the file is {given.file}, expected a name that ends in {SUFFIX}")
    count = pack_folder(given.tree, given.file)
    print(f"{count} images, {given.file.stat().st_size / 2**20:.1f} MiB in {given.file}")


if __name__ == "__main__":
    sys.exit(_cli.run(command, sys.argv[1:]))
