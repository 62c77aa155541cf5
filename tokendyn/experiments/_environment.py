"""What a run ran on: a fixed list of facts. No environment variables, host, user, or path."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tokendyn

PACKAGES = ("numpy", "scipy", "numba", "torch", "triton", "cuda-bindings", "torchvision", "timm", "tokenizers")
PACKAGES += ("safetensors", "pillow", "scikit-learn", "matplotlib", "mamba-ssm")


def describe_environment(command: list[str]) -> dict[str, Any]:
    """The record. ``command`` is what the user typed, and the only place where a path may stand."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "command": command,
        "tokendyn": tokendyn.__version__,
        "revision": package_revision(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda if cuda else None,
    }


def package_revision() -> str:
    """The Git commit of a source checkout, ``+changes`` added where files differ; without Git the digest of the
    package's sources, ``sha256:...``."""
    package = Path(tokendyn.__file__).resolve().parent
    commit = _git(package.parent, "rev-parse", "HEAD") if (package.parent / ".git").exists() else None
    if commit is not None:
        return commit + ("+changes" if _git(package.parent, "status", "--porcelain", "--", "tokendyn") else "")
    digest = hashlib.sha256()
    for file in sorted(file for suffix in ("py", "cu") for file in package.rglob(f"*.{suffix}")):
        digest.update(f"{file.relative_to(package).as_posix()}\n".encode() + file.read_bytes())
    return f"sha256:{digest.hexdigest()}"


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
