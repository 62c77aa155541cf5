"""One case, one dtype, one backend (or any replacement for it) against the spec."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tokendyn._checks import HALVES
from tokendyn._dispatch import BACKENDS
from tokendyn._tolerances import GRADIENT_WORST_TOKEN, HALF_EPS, HALF_FACTOR, tolerance

from .compare import Bound, Errors, Mismatch, Outcome, compare, normwise, worst_token
from .frameworks import FRAMEWORKS, Framework, Implementation, as_tuple, implementation_of, rounded
from .subjects import SUBJECTS, Subject

#: Arguments that may stay in float32 beside half-precision activations, as a trained model keeps them.
PARAMETERS = ("A", "D", "delta_bias", "initial_state", "dt_bias", "state")


@dataclass(frozen=True)
class Case:
    """Arguments on which every implementation of a subject must agree with its spec.

    Attributes:
        subject: a name in ``SUBJECTS``.
        name: what is awkward about the arguments.
        make: the arguments, arrays in float64 and integers, options as they are.
        dtypes: the dtypes to run in.
        gradients: compare gradients too; False only where the mathematics has none, with a reason at the case.
        strided: hand over views that are not contiguous.
        fixed_dtypes: dtypes by argument that do not follow the run's.
        constant: differentiable arguments that have no gradient with these options.
        half_parameters: in half precision, give the parameters in it too; else they stay in float32.
        compiled: the dtypes in which JAX runs it, all by default. JAX compiles every structure anew for every dtype,
            so where the structure is what is awkward, not the numbers, ``ONCE`` is enough.
    """

    subject: str
    name: str
    make: Callable[[np.random.Generator], dict[str, Any]]
    dtypes: tuple[str, ...] = ("float64", "float32")
    gradients: bool = True
    strided: bool = False
    fixed_dtypes: dict[str, str] = field(default_factory=dict)
    constant: tuple[str, ...] = ()
    half_parameters: bool = False
    compiled: tuple[str, ...] | None = None

    @property
    def id(self) -> str:
        return f"{self.subject}-{self.name.replace(' ', '_')}"

    def runs(self) -> Iterator[tuple[str, str]]:
        """(backend, dtype) in which the case is run."""
        for backend in SUBJECTS[self.subject].backends:
            if self.strided and backend == "jax":
                continue  # JAX arrays have no strides
            for dtype in self.dtypes:
                left_out = backend == "jax" and self.compiled is not None and dtype not in self.compiled
                if dtype in BACKENDS[backend].dtypes and not left_out:
                    yield backend, dtype

    def argument_dtypes(self, arguments: dict[str, Any], dtype: str) -> dict[str, str]:
        """The dtype of every floating array argument when the run is in ``dtype``."""
        wide = () if self.half_parameters or dtype not in HALVES else PARAMETERS
        return {
            name: self.fixed_dtypes.get(name, "float32" if name in wide else dtype)
            for name, value in arguments.items()
            if isinstance(value, np.ndarray) and value.dtype == np.float64
        }


@dataclass(frozen=True)
class Reference:
    """What the spec says about a case in a dtype.

    Attributes:
        arguments: float64 arrays that hold values of the dtype under test, and options.
        dtypes: of the floating arguments.
        outputs: by name.
        output_dtypes: by name.
        cotangents: one an output, or None.
        gradients: by argument name.
    """

    arguments: dict[str, Any]
    dtypes: dict[str, str]
    outputs: dict[str, np.ndarray]
    output_dtypes: dict[str, str]
    cotangents: list[np.ndarray] | None
    gradients: dict[str, np.ndarray]


def _generator(case: Case, purpose: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(f"{case.id}/{purpose}".encode()))


_references: dict[tuple[str, str], Reference] = {}


def reference(case: Case, dtype: str) -> Reference:
    """The spec's answer; computed once, for all backends. Its plain loops are slow."""
    found = _references.get((case.id, dtype))
    if found is None:
        found = _references[case.id, dtype] = _compute_reference(case, dtype)
    return found


def _compute_reference(case: Case, dtype: str) -> Reference:
    subject = SUBJECTS[case.subject]
    arguments = case.make(_generator(case, "arguments"))
    dtypes = case.argument_dtypes(arguments, dtype)
    arguments = {name: rounded(v, dtypes[name]) if name in dtypes else v for name, v in arguments.items()}
    outputs = as_tuple(subject.spec(**arguments))
    names = subject.outputs[: len(outputs)]
    output_dtypes = {name: subject.output_dtype(name, dtypes) for name in names}
    by_name = dict(zip(names, outputs, strict=True))
    if subject.spec_vjp is None or not case.gradients:
        return Reference(arguments, dtypes, by_name, output_dtypes, None, {})
    rng = _generator(case, "cotangents")
    cotangents, dout = [], []
    for name, output in by_name.items():
        if np.iscomplexobj(output):
            pair = rounded(rng.standard_normal((*output.shape, 2)), dtype)
            cotangents.append(pair)
            dout.append(pair[..., 0] + 1j * pair[..., 1])
        else:
            cotangents.append(rounded(rng.standard_normal(output.shape), output_dtypes[name]))
            dout.append(cotangents[-1])
    gradients = subject.spec_vjp(tuple(dout) if len(dout) > 1 else dout[0], **arguments)
    given = {name for name in subject.differentiable if arguments.get(name) is not None}
    assert set(gradients) == given - set(case.constant), f"{case.id}: the spec's VJP gives {sorted(gradients)}"
    return Reference(arguments, dtypes, by_name, output_dtypes, cotangents, gradients)


@dataclass(frozen=True)
class Measured:
    """One comparison that was made and passed."""

    label: str
    gradient: bool
    errors: Errors


def check(case: Case, backend: str, dtype: str, implementation: Implementation | None = None) -> list[Measured]:
    """Compare an implementation with the spec on one case: outputs, states, and every gradient.

    Args:
        case: the case.
        backend: whose arrays are handed over.
        dtype: in which dtype.
        implementation: what to run instead of the backend's own; the self-test plants its faults here.

    Raises:
        Mismatch: the first comparison that fails.
    """
    subject = SUBJECTS[case.subject]
    implementation = implementation or implementation_of(subject.name, subject.call, backend)
    return compare_all(case.id, subject, backend, dtype, implementation, reference(case, dtype), strided=case.strided)


def compare_all(
    label: str,
    subject: Subject,
    backend: str,
    dtype: str,
    implementation: Implementation,
    want: Reference,
    *,
    strided: bool = False,
    frameworks: Mapping[str, Framework] = FRAMEWORKS,
) -> list[Measured]:
    """Run ``implementation`` on the arguments of ``want`` and compare all that it has to say."""
    framework = frameworks[backend]
    arguments = {
        name: framework.array(value, want.dtypes.get(name), strided=strided) if isinstance(value, np.ndarray) else value
        for name, value in want.arguments.items()
    }
    differentiates = backend != "numpy" or implementation.vjp is not None
    wrt = tuple(want.gradients) if differentiates else ()
    outputs, gradients = framework.run(implementation, arguments, wrt, want.cotangents if wrt else None)
    label = f"{label} {backend} {dtype}"
    if len(outputs) != len(want.outputs):
        raise Mismatch("structure", f"{label}: {len(outputs)} outputs, expected {', '.join(want.outputs)}")
    measured = []

    def measure(
        what: str, got: Outcome, expected: np.ndarray, array_dtype: str, axis: str | None, gradient: bool
    ) -> None:
        bound = _bound(subject, dtype, array_dtype, expected, axis, gradient=gradient)
        errors = compare(f"{label}: {what}", got, expected, array_dtype, bound, axis)
        measured.append(Measured(what, gradient, errors))

    for (name, expected), got in zip(want.outputs.items(), outputs, strict=True):
        measure(name, got, expected, want.output_dtypes[name], subject.axes(name, expected.ndim), False)
    for name, expected in want.gradients.items() if wrt else ():
        got = gradients[name]
        if got is None:
            raise Mismatch("gradient missing", f"{label}: there is no gradient of {name}")
        measure(f"gradient of {name}", got, expected, want.dtypes[name], subject.axes(name, expected.ndim), True)
    if not measured:
        raise Mismatch("empty", f"{label}: nothing was compared")
    return measured


def _bound(
    subject: Subject, dtype: str, array_dtype: str, want: np.ndarray, axis: str | None, *, gradient: bool
) -> Bound:
    """The errors allowed, from the one table of tolerances.

    In half precision the rule allows twice the error of plain framework code. No code that returns this dtype can
    err less than rounding the exact answer once, so that error stands in for plain code's: the bound is at most
    what the rule allows, and needs no second implementation to be measured.
    """
    if array_dtype == "integer":
        return Bound(0.0, 0.0)
    if dtype in HALVES:
        once = rounded(want, array_dtype)
        slack = HALF_EPS * _machine_epsilon(dtype)
        return Bound(
            HALF_FACTOR * normwise(once, want) + slack,
            HALF_FACTOR * (worst_token(once, want, axis) if axis else 0.0) + slack,
        )
    row = tolerance(subject.name, dtype)
    if gradient:
        return Bound(row.gradients, GRADIENT_WORST_TOKEN * row.gradients)
    return Bound(row.values, row.worst_token)


@functools.cache
def _machine_epsilon(dtype: str) -> float:
    if dtype == "bfloat16":
        return 2.0**-7
    return float(np.finfo(dtype).eps)
