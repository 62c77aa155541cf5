"""Checkpoints: safetensors and JSON in a folder with a manifest, never pickle.

::

    checkpoints/step-00000120/
        <group>.safetensors   one file a group of tensors (model, optimizer, random, ...)
        state.json            everything that is not a tensor
        manifest.json         format, step, size and SHA-256 of each file, SHA-256 of the manifest itself

The folder appears at once and whole (:func:`._files.new_folder`). A checkpoint is used only if every byte
agrees with its manifest; if the newest one does not, the newest good one is used, in words.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tokendyn.backends.torch._tensor_files import PICKLE_SUFFIXES, read_tensors, refusal, write_tensors
from tokendyn.errors import CheckpointError
from tokendyn.experiments._files import encode_json, new_folder, sha256

FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory: tensors by group and name, and the JSON state."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write ``checkpoint`` below ``folder`` atomically, then remove all but the newest ``keep``.

    Raises:
        CheckpointError: it cannot be written (disk full, no permission); older ones are left as they are.
    """
    place = folder / f"step-{checkpoint.step:08d}"
    try:
        with new_folder(place) as temporary:
            for group, tensors in checkpoint.tensors.items():
                write_tensors(temporary / f"{group}.safetensors", tensors)
            (temporary / "state.json").write_bytes(encode_json(checkpoint.state))
            files = {
                file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}
                for file in sorted(temporary.iterdir())
            }
            manifest = {"format": FORMAT, "step": checkpoint.step, "files": files}
            manifest["sha256"] = _digest(manifest)
            (temporary / "manifest.json").write_bytes(encode_json(manifest))
    except (OSError, SafetensorError) as cause:
        older = ", ".join(str(step) for step, _ in _found(folder)) or "none"
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} cannot be written to {folder} ({cause}); make room or give "
            f"permission and continue with --resume auto (whole checkpoints there: steps {older})"
        ) from cause
    for _, old in _found(folder)[keep:]:
        shutil.rmtree(old)
    return place


def load_newest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest good checkpoint below ``folder``, or None if none was ever saved.

    Args:
        say: told one sentence for everything that is passed over: damaged checkpoints, pickles.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    if not folder.is_dir():
        return None
    for stranger in sorted(folder.iterdir()):
        if stranger.suffix.lower() in PICKLE_SUFFIXES:
            say(refusal(stranger))
    candidates = _found(folder)
    for place in (path for _, path in candidates):
        try:
            checkpoint = load_checkpoint(place)
        except CheckpointError as problem:
            say(f"{problem}; looking for an older one")
            continue
        if place != candidates[0][1]:
            say(f"continuing from the last good checkpoint, step {checkpoint.step}")
        return checkpoint
    if candidates:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged ({', '.join(path.name for _, path in candidates)}); "
            f"restore one from a copy, or start a new run in another folder"
        )
    return None


def load_checkpoint(place: Path) -> Checkpoint:
    """Read the checkpoint folder ``place``, having verified every file against the manifest.

    Raises:
        CheckpointError: something is missing, damaged, of a newer format, or a pickle.
    """
    manifest = _read_manifest(place)
    for name, promised in manifest["files"].items():
        file = place / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {place} is damaged: {name} is missing")
        size = file.stat().st_size
        if size != promised["bytes"]:
            raise CheckpointError(
                f"checkpoint {place} is damaged: {name} has {size} bytes, its manifest says {promised['bytes']}"
            )
        if sha256(file) != promised["sha256"]:
            raise CheckpointError(f"checkpoint {place} is damaged: the content of {name} does not match its manifest")
    tensors = {
        Path(name).stem: read_tensors(place / name) for name in manifest["files"] if name.endswith(".safetensors")
    }
    return Checkpoint(manifest["step"], tensors, json.loads((place / "state.json").read_bytes()))


def _read_manifest(place: Path) -> dict[str, Any]:
    file = place / "manifest.json"
    try:
        manifest = json.loads(file.read_bytes())
        intact = manifest.pop("sha256") == _digest(manifest)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as cause:
        raise CheckpointError(f"checkpoint {place} is damaged: manifest.json cannot be read ({cause!r})") from cause
    if not intact:
        raise CheckpointError(f"checkpoint {place} is damaged: manifest.json does not match its own digest")
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {place} has format {manifest['format']}, this version of tokendyn reads format {FORMAT}"
        )
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _found(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints below ``folder`` as (step, path), newest first."""
    places = [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(((int(path.name[5:]), path) for path in places), reverse=True)
