"""How much memory the cuda engine takes: its allocations, counted without a GPU, with the kernels left out."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tokendyn.backends.cuda._scan_cuda_plan import CLUSTERS_FROM
from tokendyn.backends.torch.ops import _scan_cuda

CASES = {
    case["case"]: case
    for case in json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "scan.json").read_text())["cases"]
}


class _Allocations(TorchDispatchMode):
    """Bytes that tensors made inside hold, in the steps of PyTorch's allocator on a GPU, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.held: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, self.note, made)
        return made

    def note(self, made: torch.Tensor) -> None:
        storage = made.untyped_storage()
        key = storage._cdata
        if key not in self.held:
            self.held[key] = -(-storage.nbytes() // 512) * 512
            self.now += self.held[key]
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.now -= self.held.pop(key)


@pytest.mark.parametrize("name", CASES)
def test_memory_is_at_most_a_twentieth_more_than_mamba_ssms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """mamba-ssm's was measured on a GPU (`benchmarks/scan.py`), and so was ours, which is what is counted here."""
    monkeypatch.setattr(_scan_cuda, "launch", lambda *call: None)
    monkeypatch.setattr(_scan_cuda, "_gpu", lambda device: (132, CLUSTERS_FROM))  # an H100
    b, d, length, n = (int(size) for size in re.findall(r"[bdLN](\d+)", name))
    dtype = getattr(torch, name.split()[4])
    ours, theirs = (CASES[name]["engines"][engine]["bytes"] for engine in ("cuda", "mamba_ssm"))

    def activation() -> torch.Tensor:
        return (
            torch.empty(b, length, d, dtype=dtype).mT if "(b, L, d)" in name else torch.empty(b, d, length, dtype=dtype)
        )

    u, delta, dy = activation(), activation(), torch.empty_like(activation())
    A = torch.empty(d, 1 if "scalar A" in name else n)
    B, C = (torch.empty(b, 1, n, length, dtype=dtype) for _ in range(2))
    given = (u, delta, A, B, C, torch.empty(d), None, torch.empty(d))
    with torch.no_grad(), _Allocations() as allocations:
        y, last, states = _scan_cuda.forward(*given, None, None, None, True, False, True)
        gradients = _scan_cuda.backward(dy, None, states, *given, None, None, True, False)
    assert y.shape == gradients[0].shape
    assert last is None
    assert allocations.most <= 1.05 * theirs
    assert abs(allocations.most / ours - 1) < 0.01
