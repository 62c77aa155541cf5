"""Where the tests of Triton kernels run: on a GPU if there is one, else in Triton's interpreter on the CPU.

Importing this skips a test module where neither is possible.
"""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU:
    if tuple(map(int, triton.__version__.split(".")[:3])) < (3, 7, 1):
        pytest.skip("Triton's interpreter before 3.7.1 fails with NumPy 2.4", allow_module_level=True)
    if not triton.knobs.runtime.interpret:
        pytest.skip("no GPU, and TRITON_INTERPRET=1 was not set before Triton was imported", allow_module_level=True)
