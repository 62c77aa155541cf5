"""What there is to compare: every operation of the table, and compositions of operations.

A subject knows its spec and the spec's VJP, what a user would call, the names of its outputs, and which axis of
each array counts tokens. Nothing here computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tokendyn
from tokendyn import core
from tokendyn._checks import state_dtype
from tokendyn._operations import ALL_BACKENDS, OPERATIONS

from . import compositions

#: Axes of every array by name and number of axes: t tokens, f what makes up one token, k others.
AXES: dict[str, dict[int, str]] = {
    # scans: channels first
    "u": {3: "kft"},
    "delta": {3: "kft"},
    "z": {3: "kft"},
    "B": {3: "kft", 4: "kkft"},
    "C": {3: "kft", 4: "kkft"},
    "y_scan": {3: "kft"},
    # attention and order matrices: a row is a token's
    "attention": {4: "kktf", 3: "ktf"},
    "P": {3: "ktf"},
    # orders: channels last
    "x": {3: "ktf", 2: "kt", 1: "t"},
    "y": {3: "ktf"},
    "scores": {2: "kt"},
    "effective": {2: "kt"},
}


#: The same for a single step, where each batch entry is one token.
STEP_AXES: dict[str, dict[int, str]] = {
    **{name: {2: "tf"} for name in ("x", "dt", "z", "y")},
    **{name: {2: "tf", 3: "tff"} for name in ("B", "C")},
    **{name: {3: "tff"} for name in ("state", "new_state")},
}


@dataclass(frozen=True)
class Subject:
    """One thing to compare.

    Attributes:
        name: of the operation, or of the composition.
        outputs: names of the outputs in order; a call may return fewer (no last state).
        spec: the spec, on float64 NumPy arrays.
        spec_vjp: ``spec_vjp(dout, **arguments)``, gradients by argument name; None if there is no gradient.
        call: what a user calls.
        differentiable: arguments with a gradient.
        backends: backends that implement it.
        dtypes: of outputs, by name; see :data:`SUBJECTS`.
        named_axes: the axes of every array by name and number of axes.
    """

    name: str
    outputs: tuple[str, ...]
    spec: Callable[..., Any]
    spec_vjp: Callable[..., dict[str, Any]] | None
    call: Callable[..., Any]
    differentiable: tuple[str, ...]
    backends: tuple[str, ...] = ALL_BACKENDS
    dtypes: dict[str, str] = field(default_factory=dict)
    named_axes: dict[str, dict[int, str]] = field(default_factory=lambda: AXES)

    def axes(self, name: str, ndim: int) -> str | None:
        """The axes of array ``name``, or None if it has no tokens (parameters, states)."""
        found = self.named_axes.get(name, {}).get(ndim)
        assert found is not None or name not in self.named_axes, f"{name} with {ndim} axes: enter it in AXES"
        return found

    def output_dtype(self, output: str, argument_dtypes: dict[str, str]) -> str:
        """The dtype that ``output`` must have: by default that of the first array argument."""
        rule = self.dtypes.get(output, "first")
        dtype = next(iter(argument_dtypes.values())) if rule in ("first", "state", "complex") else rule
        if rule == "state":
            return state_dtype(dtype)
        if rule == "complex":
            return {"float32": "complex64", "float64": "complex128"}[dtype]
        return argument_dtypes.get(rule, dtype)


def _operation(name: str, *outputs: str, named_axes: dict[str, dict[int, str]] = AXES, **dtypes: str) -> Subject:
    row = OPERATIONS[name]
    return Subject(
        name=name,
        outputs=outputs,
        spec=getattr(core, name),
        spec_vjp=getattr(core, f"{name}_vjp") if row.differentiable else None,
        call=getattr(tokendyn, name),
        differentiable=row.differentiable,
        backends=row.backends,
        dtypes=dtypes,
        named_axes=named_axes,
    )


#: The dtype of an output: "first" argument's, an argument's name, "state", "complex", or "integer".
SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        _operation("selective_scan", "y_scan", "last_state", last_state="state"),
        _operation("selective_state_update", "y", "new_state", named_axes=STEP_AXES, y="x"),
        _operation("hidden_attention", "attention"),
        _operation("importance_score", "scores"),
        _operation("softsort", "x", x="x"),
        _operation("softsort_restore", "x", x="y"),
        _operation("softsort_matrix", "P"),
        _operation("effective_tokens", "effective"),
        _operation("hard_order", "indices", indices="integer"),
        _operation("take_tokens", "x"),
        _operation("put_tokens", "y"),
        _operation("io_projections", "S_B", "S_C"),
        _operation("io_spectrum", "eigenvalues", "symmetric", eigenvalues="complex"),
        _operation("flow_rhs", "x"),
        _operation("sphere_flow", "x"),
        _operation("attention_flow", "x"),
        _operation("autoregressive_flow", "x"),
        Subject(
            name="reordered_scan",
            outputs=("y_scan",),
            spec=compositions.reordered_scan_spec,
            spec_vjp=compositions.reordered_scan_spec_vjp,
            call=compositions.reordered_scan,
            differentiable=("u", "scores", "delta", "A", "B", "C", "D", "z"),
        ),
    )
}
