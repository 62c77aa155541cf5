"""Every operation, backend and dtype against the spec, on every case."""

from __future__ import annotations

import pytest

from tokendyn._operations import OPERATIONS

from .cases import CASES
from .check import Case, check
from .frameworks import FRAMEWORKS
from .record import Record
from .subjects import SUBJECTS

#: Compiled with all optimisations, and less often: test_golden.py.
pytestmark = pytest.mark.usefixtures("quick_compilation")

RUNS = [
    pytest.param(case, backend, dtype, id=f"{case.id}-{backend}-{dtype}")
    for case in CASES
    for backend, dtype in case.runs()
]


@pytest.mark.parametrize(("case", "backend", "dtype"), RUNS)
def test_agrees_with_the_spec(case: Case, backend: str, dtype: str, backends: tuple[str, ...], record: Record) -> None:
    if backend not in backends:
        pytest.skip(f"--backends leaves out {backend}")
    record.add(case.subject, backend, dtype, check(case, backend, dtype))


def test_every_operation_and_backend_of_the_table_has_cases() -> None:
    assert set(OPERATIONS) <= set(SUBJECTS), "operations without a row in subjects.py"
    wanted = {(name, backend) for name, subject in SUBJECTS.items() for backend in subject.backends}
    covered = {(run.values[0].subject, run.values[1]) for run in RUNS}
    assert covered == wanted
    assert {backend for _, backend in covered} == set(FRAMEWORKS)


def test_every_gradient_of_the_table_is_compared() -> None:
    """Each differentiable argument, on each dtype that counts, in at least one case."""
    from .check import reference

    for name, subject in SUBJECTS.items():
        cases = [case for case in CASES if case.subject == name and "float64" in case.dtypes]
        compared = {argument for case in cases for argument in reference(case, "float64").gradients}
        assert compared == set(subject.differentiable), name
