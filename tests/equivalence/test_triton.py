"""The Triton kernels, in Triton's interpreter, on the cases of their operations; all they allocate is NaN first."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
import triton

from tokendyn.backends.torch.ops import _engines

from .cases import CASES
from .check import Case, check
from .frameworks import Implementation
from .subjects import SUBJECTS

if torch.cuda.is_available():
    pytest.skip("a GPU runs the kernels themselves: tests/backends/test_triton_*.py", allow_module_level=True)
if not triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1 was not set before Triton was imported", allow_module_level=True)
if tuple(map(int, triton.__version__.split(".")[:3])) < (3, 7, 1):
    pytest.skip("Triton's interpreter before 3.7.1 fails with NumPy 2.4", allow_module_level=True)

OPERATIONS = ("selective_state_update", "softsort", "softsort_restore", "take_tokens", "put_tokens")
RUNS = [
    pytest.param(case, dtype, id=f"{case.id}-{dtype}")
    for case in CASES
    if case.subject in OPERATIONS and case.id != "softsort_restore-L=197"  # slow; the tiles of L=63, more of them
    for backend, dtype in case.runs()
    if backend == "torch" and dtype != "float64"
]


@pytest.fixture
def triton_takes_all(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The triton engine takes calls on a CPU, of any length. Returns whom ``engine="auto"`` chose, by operation."""
    chosen: dict[str, list[str]] = {}
    monkeypatch.setattr(_engines, "_ALL_PAIRS_UP_TO", 10**9)
    declines = _engines._triton_declines
    monkeypatch.setattr(_engines, "_triton_declines", lambda call: None if call.device == "cpu" else declines(call))
    choose = _engines.choose

    def recorded(operation: str, name: str, call: _engines.Call) -> _engines.Engine:
        engine = choose(operation, name, call)
        chosen.setdefault(operation, []).append(engine.name)
        return engine

    for module in ("_order", "_step"):
        monkeypatch.setattr(f"tokendyn.backends.torch.ops.{module}.choose", recorded)
    return chosen


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("case", "dtype"), RUNS)
def test_kernels_agree_with_the_spec(
    case: Case, dtype: str, triton_takes_all: dict[str, list[str]], backends: tuple[str, ...]
) -> None:
    if "torch" not in backends:
        pytest.skip("--backends leaves out torch")
    subject = SUBJECTS[case.subject]
    if case.subject == "selective_state_update":
        # It has no gradient: what can be compared are its values. Under a name of its own: references are kept by name.
        values = replace(case, name=f"{case.name}, values", gradients=False)
        assert check(values, "torch", dtype, Implementation(torch.no_grad()(subject.call)))
    else:
        assert check(case, "torch", dtype)
    taken = set(triton_takes_all[case.subject])
    power = case.name.startswith("power ") and not case.name.startswith("power 2")
    assert taken == ({"plain"} if power else {"triton"})
