"""Records of a run: one JSON object a line, cut back to a checkpoint when a run is continued.

``metrics.jsonl`` holds nothing that differs between two equal runs; seconds and memory go to
``timings.jsonl``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokendyn.errors import CheckpointError


class Records:
    """An append-only file of JSON lines with a position that a checkpoint can hold.

    Args:
        path: the file; made when missing.
        position: what :meth:`position` returned at the checkpoint to continue from, or None to begin anew.

    Raises:
        CheckpointError: the file does not begin with what was there at ``position``; later: it cannot be written.
    """

    def __init__(self, path: Path, position: dict[str, Any] | None = None) -> None:
        self.path = path
        self._file = path.open("r+b" if path.exists() else "w+b")
        size = 0 if position is None else position["bytes"]
        kept = self._file.read(size)
        self._digest = hashlib.sha256(kept)
        if position is not None and self._digest.hexdigest() != position["sha256"]:
            self._file.close()
            raise CheckpointError(
                f"{path} is not the file that the checkpoint was saved with (its first {size} bytes differ); "
                f"put the original back, or start a new run in another folder"
            )
        self._size = size
        self._file.seek(size)
        self._file.truncate()

    def append(self, record: dict[str, Any]) -> None:
        """Add one line. It reaches the disk for certain at the next :meth:`position`."""
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        with self._named():
            self._file.write(line)
            self._file.flush()
        self._digest.update(line)
        self._size += len(line)

    def position(self) -> dict[str, Any]:
        """Flush to the disk and say where the file ends: bytes, and SHA-256 of all of them."""
        with self._named():
            self._file.flush()
            os.fsync(self._file.fileno())
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        # What could not be written was said when it was tried.
        with contextlib.suppress(OSError):
            self._file.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Say what a full disk means here."""
        try:
            yield
        except OSError as cause:
            raise CheckpointError(
                f"{self.path} cannot be written ({cause}); make room or give permission and continue with --resume "
                f"auto: nothing up to the last checkpoint is lost"
            ) from cause


class NoRecords:
    """:class:`Records` of a process that leaves the writing to another."""

    def __init__(self, path: Path, position: dict[str, Any] | None = None) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        pass

    def position(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file that :class:`Records` wrote."""
    with path.open("rb") as file:
        return [json.loads(line) for line in file if line.endswith(b"\n")]
