"""The spec and every backend against answers written down once: the spec's own, and mamba-ssm's reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tokendyn._operations import OPERATIONS

from .check import Reference, compare_all
from .frameworks import FRAMEWORKS, Framework, Implementation, Jax, implementation_of
from .golden import load
from .subjects import SUBJECTS, Subject

GOLDEN = [
    pytest.param(source, case, subject, dtype, want, id=f"{source}-{case}")
    for source in ("spec", "mamba_ssm")
    for case, (subject, dtype, want) in load(source).items()
]
#: Here XLA compiles every operation as it does for users, whatever the session has asked of it.
AS_USED: dict[str, Framework] = {**FRAMEWORKS, "jax": Jax(xla_cpu_use_fusion_emitters=True)}


def in_dtype(subject: Subject, want: Reference) -> Implementation:
    """The spec, its float64 answers given in the dtypes that the golden file has."""

    def narrow(array: Any, dtype: str) -> np.ndarray:
        return array if dtype == "integer" else array.astype(dtype)

    def call(**arguments: Any) -> tuple[np.ndarray, ...]:
        outputs = subject.spec(**arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(narrow(o, dtype) for o, dtype in zip(outputs, want.output_dtypes.values(), strict=True))

    def vjp(dout: Any, **arguments: Any) -> dict[str, np.ndarray]:
        assert subject.spec_vjp is not None
        return {name: narrow(g, want.dtypes[name]) for name, g in subject.spec_vjp(dout, **arguments).items()}

    return Implementation(call, vjp if subject.spec_vjp else None)


@pytest.mark.parametrize(("source", "case", "name", "dtype", "want"), GOLDEN)
def test_spec_says_what_it_said(source: str, case: str, name: str, dtype: str, want: Reference) -> None:
    subject = SUBJECTS[name]
    measured = compare_all(f"{source} {case}", subject, "numpy", dtype, in_dtype(subject, want), want)
    assert len(measured) == len(want.outputs) + len(want.gradients)


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
@pytest.mark.parametrize(("source", "case", "name", "dtype", "want"), GOLDEN)
def test_backend_agrees(
    source: str, case: str, name: str, dtype: str, want: Reference, backend: str, backends: tuple[str, ...]
) -> None:
    if backend not in backends:
        pytest.skip(f"--backends leaves out {backend}")
    subject = SUBJECTS[name]
    implementation = implementation_of(name, subject.call, backend)
    frameworks = AS_USED if source == "spec" else FRAMEWORKS
    assert compare_all(f"{source} {case}", subject, backend, dtype, implementation, want, frameworks=frameworks)


def test_every_operation_is_written_down() -> None:
    assert set(OPERATIONS) <= {subject for subject, _, _ in load("spec").values()}
