"""On which arguments every implementation must agree with the spec.

One generator for each subject; a case is its name (what is awkward) and what differs from the subject's ordinary
arguments. Sizes are small, since the spec's loops are slow; odd, since engines work in tiles; and few, since JAX
compiles for every new shape.
"""

from __future__ import annotations

from ..check import Case
from . import flows, maps, orders, scans

GENERATORS = (
    scans.selective_scan,
    scans.selective_state_update,
    scans.hidden_attention,
    scans.reordered_scan,
    orders.importance_score,
    orders.softsort,
    orders.softsort_restore,
    orders.softsort_matrix,
    orders.effective_tokens,
    orders.hard_order,
    orders.take_tokens,
    orders.put_tokens,
    maps.io_projections,
    maps.io_spectrum,
    flows.flow_rhs,
    flows.sphere_flow,
    flows.attention_flow,
    flows.autoregressive_flow,
)

CASES: tuple[Case, ...] = tuple(case for generator in GENERATORS for case in generator())

assert len({case.id for case in CASES}) == len(CASES), "two cases have one name"
