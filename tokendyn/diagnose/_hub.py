"""A model's files from the Hugging Face hub: safetensors, their configuration and tokenizer, and nothing that runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tokendyn.backends.torch._tensor_files import PICKLE_SUFFIXES, refusal
from tokendyn.diagnose._words import printable
from tokendyn.errors import BackendMissing, CheckpointError

#: Of a repository's top folder; neither pickles nor code.
_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.txt", "*.model"]


def fetch(name: str) -> Path:
    """The folder with the files of repository ``name``, fetched now or earlier.

    Raises:
        BackendMissing: huggingface_hub is not installed.
        CheckpointError: no network, no such repository, or no safetensors in it.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise BackendMissing(f"diagnose: {name} is fetched by huggingface_hub; run: pip install 'tokendyn[diagnose]'")
    import huggingface_hub  # type: ignore[import-not-found]
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError  # type: ignore[import-not-found]

    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES, ignore_patterns=["*/*"]))
    except LocalEntryNotFoundError as cause:
        raise CheckpointError(
            f"diagnose: {name} is neither a folder here nor in the hub's cache, and the hub cannot be reached (no "
            f"network, or HF_HUB_OFFLINE is set); fetch it where there is one: hf download {name}"
        ) from cause
    except RepositoryNotFoundError as cause:
        raise CheckpointError(
            f"diagnose: {name} is neither a folder here nor a repository of the hub that may be read; look at its name"
        ) from cause
    except Exception as cause:
        said = str(cause).strip().splitlines() or [type(cause).__name__]
        raise CheckpointError(f"diagnose: {name} cannot be fetched from the hub: {printable(said[0], 300)}") from cause
    if not list(folder.glob("*.safetensors")):
        raise CheckpointError(_without_safetensors(name))
    return folder


def _without_safetensors(name: str) -> str:
    """Why there is nothing to read; what else is there is looked up for the words alone."""
    import huggingface_hub  # type: ignore[import-not-found]

    try:
        files = [Path(file) for file in huggingface_hub.list_repo_files(name)]
    except Exception:
        files = []
    pickles = [file for file in files if file.suffix.lower() in PICKLE_SUFFIXES]
    if pickles:
        return refusal(Path(name) / pickles[0])
    return f"diagnose: {name} holds no safetensors on the hub, expected the weights of a model in this format"
