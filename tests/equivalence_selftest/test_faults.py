"""Every planted fault must be caught by the equivalence cases of its operation, in float64 and in float32."""

from __future__ import annotations

import pytest

from ..equivalence.cases import CASES
from ..equivalence.check import Case, check
from ..equivalence.compare import Mismatch
from ..equivalence.frameworks import Implementation, implementation_of
from ..equivalence.subjects import SUBJECTS
from .conftest import SURVIVED, Catch
from .faults import FAULTS
from .planting import Fault

pytestmark = pytest.mark.usefixtures("quick_compilation")

PLANTED = [
    pytest.param(fault, backend, dtype, id=f"{fault.subject}-{fault.name.replace(' ', '_')}-{backend}-{dtype}")
    for fault in FAULTS
    for backend in fault.backends
    # JAX would compile every fault twice.
    for dtype in (("float64",) if backend == "jax" else ("float64", "float32"))
]


@pytest.mark.parametrize(("fault", "backend", "dtype"), PLANTED)
def test_fault_is_caught(
    fault: Fault, backend: str, dtype: str, caught: list[Catch], backends: tuple[str, ...]
) -> None:
    if backend not in backends:
        pytest.skip(f"--backends leaves out {backend}")
    subject = SUBJECTS[fault.subject]
    faulty = fault.plant(implementation_of(subject.name, subject.call, backend))
    cases = [case for case in CASES if case.subject == fault.subject and (backend, dtype) in case.runs()]
    assert fault.where is None or fault.where in [case.name for case in cases]
    for case in sorted(cases, key=lambda case: case.name != fault.where):
        found = _mismatch(case, backend, dtype, faulty)
        if found is not None:
            assert fault.caught_by in (None, found.check), found
            caught.append((fault.name, fault.subject, backend, dtype, found.check, case.name))
            return
    caught.append((fault.name, fault.subject, backend, dtype, SURVIVED, ""))
    pytest.fail(f"{fault.name!r} in {fault.subject} survived on {backend} in {dtype}")


def _mismatch(case: Case, backend: str, dtype: str, faulty: Implementation) -> Mismatch | None:
    try:
        check(case, backend, dtype, faulty)
    except Mismatch as found:
        return found
    return None


def test_every_subject_has_a_fault_on_every_backend() -> None:
    planted = {(fault.subject, backend) for fault in FAULTS for backend in fault.backends}
    assert planted == {(name, backend) for name, subject in SUBJECTS.items() for backend in subject.backends}


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_nothing_is_caught_where_nothing_is_planted(backend: str, backends: tuple[str, ...]) -> None:
    """The way through a replacement implementation itself raises no alarm."""
    if backend not in backends:
        pytest.skip(f"--backends leaves out {backend}")
    for name, subject in SUBJECTS.items():
        right = implementation_of(name, subject.call, backend)
        case = next(case for case in CASES if case.subject == name)
        assert check(case, backend, "float64", right)
