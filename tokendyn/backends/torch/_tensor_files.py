"""Tensors in files: safetensors, never pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tokendyn.errors import BackendMissing, CheckpointError

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_PICKLE_STARTS = (b"\x80", b"PK\x03\x04")  # a pickle; the zip archive that torch.save writes


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. A pickle is refused, by name and by content.

    Raises:
        CheckpointError: it is a pickle, no safetensors file, or one that was cut short.
        BackendMissing: the package safetensors is not installed.
    """
    with file.open("rb") as opened:
        start = opened.read(9)
    # A safetensors file begins with the length of its header (8 bytes), then "{".
    if file.suffix.lower() in PICKLE_SUFFIXES or (start.startswith(_PICKLE_STARTS) and start[8:] != b"{"):
        raise CheckpointError(refusal(file))
    library = _safetensors()
    try:
        return library.torch.load_file(file)
    except library.SafetensorError as cause:
        raise CheckpointError(
            f"{file} is no safetensors file, or was cut short ({file.stat().st_size} bytes: {cause}); get it again"
        ) from cause


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write ``tensors`` as safetensors; tied ones under each of their names.

    The file is moved into place when it is whole: what was read from an older one may still lie in its pages.
    """
    aside = file.with_name(f".{os.getpid()}-{file.name}")
    try:
        _safetensors().torch.save_file(_separate(tensors), aside, metadata)
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def refusal(file: Path) -> str:
    """Why a pickle is not read, and what to do with it."""
    return (
        f"{file} is refused: it is a pickle (what torch.save writes), and reading one can run any code; "
        f'convert it to safetensors first, where you trust it: python -c "import torch, safetensors.torch as s; '
        f"w = torch.load('{file.name}', map_location='cpu', weights_only=True); "
        f"s.save_file({{k: v.clone().contiguous() for k, v in w.items()}}, 'model.safetensors')\""
    )


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as cause:
        raise BackendMissing(
            "weights are read and written with safetensors; run: pip install 'tokendyn[experiments]'"
        ) from cause
    return safetensors


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors that share no memory, as safetensors asks: tied weights are copied."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return separate
