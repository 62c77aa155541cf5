"""What all cases share."""

from __future__ import annotations

import numpy as np

Rng = np.random.Generator

WIDE = ("float64", "float32")
#: Half precision costs a run of its own, so only the cases that say something new about it have it.
ALL = (*WIDE, "bfloat16", "float16")
#: For ``Case.compiled``. NEVER is for what the same JAX code does in another case, in another shape.
ONCE = ("float64",)
NEVER = ()
#: Values or gradients leave float16's range (65504; smallest normal number 6e-5).
NO_FLOAT16 = (*WIDE, "bfloat16")
