"""The one table of operations.

Each operation is a function whose signature and docstring are the public contract and whose body checks the
arguments; the decorator ``@operation`` enters it into :data:`OPERATIONS` and sends the call to the backend
that owns the arrays. Dispatch, the equivalence tests, the support matrix in the docs and the benchmarks all
read this table. To add an operation: write it here, its spec and VJP in ``core``, and a function of the
same name in each ``backends/<name>/ops``; the equivalence tests then find it.
"""

# The order of these imports is the order of the rows.
# isort: off
from tokendyn._operations._scan import AGGREGATES, hidden_attention, selective_scan, selective_state_update
from tokendyn._operations._order import (
    ORDER_METHODS,
    effective_tokens,
    hard_order,
    importance_score,
    put_tokens,
    softsort,
    softsort_matrix,
    softsort_restore,
    take_tokens,
    token_order,
)
from tokendyn._operations._input_output import IO_FORMS, IO_REGIMES, IOSpectrum, io_projections, io_spectrum
from tokendyn._operations._flow import (
    ATTENTION_KINDS,
    attention_flow,
    autoregressive_flow,
    flow_rhs,
    sphere_flow,
)
from tokendyn._operations._table import ALL_BACKENDS, OPERATIONS, Operation
# isort: on

__all__ = [
    "AGGREGATES",
    "ALL_BACKENDS",
    "ATTENTION_KINDS",
    "IO_FORMS",
    "IO_REGIMES",
    "OPERATIONS",
    "ORDER_METHODS",
    "IOSpectrum",
    "Operation",
    "attention_flow",
    "autoregressive_flow",
    "effective_tokens",
    "flow_rhs",
    "hard_order",
    "hidden_attention",
    "importance_score",
    "io_projections",
    "io_spectrum",
    "put_tokens",
    "selective_scan",
    "selective_state_update",
    "softsort",
    "softsort_matrix",
    "softsort_restore",
    "sphere_flow",
    "take_tokens",
    "token_order",
]
