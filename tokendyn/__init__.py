"""tokendyn: the token dynamics of selective state space models.

Operations follow the arrays they are given (NumPy, PyTorch or JAX). ``use`` and ``backend`` choose where
things made from nothing live. Importing this package loads no framework and touches no device; every name
below is loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tokendyn._dispatch import backend, use

if TYPE_CHECKING:
    from tokendyn import core, errors, jax, torch
    from tokendyn._causality import causality, expect_causal
    from tokendyn._citation import citation
    from tokendyn._dynamics import classify, classify_sphere, simulate, simulate_sphere
    from tokendyn._inputs import random_inputs
    from tokendyn._layers import OrderConfig
    from tokendyn._operations import (
        IOSpectrum,
        attention_flow,
        autoregressive_flow,
        effective_tokens,
        flow_rhs,
        hard_order,
        hidden_attention,
        importance_score,
        io_projections,
        io_spectrum,
        put_tokens,
        selective_scan,
        selective_state_update,
        softsort,
        softsort_matrix,
        softsort_restore,
        sphere_flow,
        take_tokens,
        token_order,
    )
    from tokendyn._order import Order
    from tokendyn.core._regime import Regime
    from tokendyn.core._sphere import SphereRegime
    from tokendyn.core._trajectory import Trajectory
    from tokendyn.diagnose import diagnose, refine  # the module, which can be called like its function

    # The constructors follow the backend chosen; a type checker is shown PyTorch's.
    from tokendyn.torch import (
        H3,
        H3LM,
        S6,
        CausalAttention,
        Mamba,
        MambaLM,
        MambaVision,
        TokenReorder,
        TransformerLM,
        mamba_lm_130m,
        mambavision_t,
    )

__version__ = "0.1.0"

_LAZY = {
    **dict.fromkeys(
        (
            "IOSpectrum",
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
        ),
        "tokendyn._operations",
    ),
    "Order": "tokendyn._order",
    "Regime": "tokendyn.core._regime",
    "SphereRegime": "tokendyn.core._sphere",
    "Trajectory": "tokendyn.core._trajectory",
    "OrderConfig": "tokendyn._layers",
    "citation": "tokendyn._citation",
    "random_inputs": "tokendyn._inputs",
    "refine": "tokendyn.diagnose._refine",
    **dict.fromkeys(("causality", "expect_causal"), "tokendyn._causality"),
    **dict.fromkeys(("classify", "classify_sphere", "simulate", "simulate_sphere"), "tokendyn._dynamics"),
}
_MODULES = ("core", "diagnose", "errors", "jax", "torch")
_CONSTRUCTORS = (
    "CausalAttention",
    "H3",
    "H3LM",
    "Mamba",
    "MambaLM",
    "MambaVision",
    "S6",
    "TokenReorder",
    "TransformerLM",
    "mamba_lm_130m",
    "mambavision_t",
)

__all__ = [
    "H3",
    "H3LM",
    "S6",
    "CausalAttention",
    "IOSpectrum",
    "Mamba",
    "MambaLM",
    "MambaVision",
    "Order",
    "OrderConfig",
    "Regime",
    "SphereRegime",
    "TokenReorder",
    "Trajectory",
    "TransformerLM",
    "__version__",
    "attention_flow",
    "autoregressive_flow",
    "backend",
    "causality",
    "citation",
    "classify",
    "classify_sphere",
    "core",
    "diagnose",
    "effective_tokens",
    "errors",
    "expect_causal",
    "flow_rhs",
    "hard_order",
    "hidden_attention",
    "importance_score",
    "io_projections",
    "io_spectrum",
    "jax",
    "mamba_lm_130m",
    "mambavision_t",
    "put_tokens",
    "random_inputs",
    "refine",
    "selective_scan",
    "selective_state_update",
    "simulate",
    "simulate_sphere",
    "softsort",
    "softsort_matrix",
    "softsort_restore",
    "sphere_flow",
    "take_tokens",
    "token_order",
    "torch",
    "use",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    elif name in _MODULES:
        return importlib.import_module(f"tokendyn.{name}")
    elif name in _CONSTRUCTORS:
        from tokendyn._layers import Constructor

        value = Constructor(name)
    else:
        raise AttributeError(f"module 'tokendyn' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
