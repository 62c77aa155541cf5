"""The Triton kernels of the selective scan against the spec.

On a GPU they run there; elsewhere Triton's interpreter runs them on the CPU, with small sizes. Everything that
they allocate is filled with NaN first, so that an element which no kernel writes shows. On a machine with a GPU:
``pytest tests/backends/test_triton_scan.py`` (all), or ``-m gpu`` (the real sizes alone).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .scan_cases import CASES, arguments, check, check_apart, evaluate, tensors

# isort: split
from tokendyn.backends.torch.ops import _scan_triton, _scan_triton_launch

#: Scalar A runs as matrix products in bfloat16 and as a recurrence in the other dtypes.
RUNS = [(name, "float32") for name in CASES if not name.startswith("scalar A,")] + [
    (name, dtype)
    for name in ("plain", "scalar A", "scalar A, packed and padded", "scalar A, groups, channels last")
    for dtype in ("bfloat16", "float16")
    if dtype == "bfloat16" or name == "plain"
]
RUNS.append(("scalar A, large steps", "bfloat16"))


@pytest.fixture
def _small_chunks(monkeypatch):
    monkeypatch.setattr(_scan_triton_launch, "CHUNK_TILES", 1)
    monkeypatch.setattr(_scan_triton_launch, "BLOCKS_A_BAND", 2)
    monkeypatch.setattr(_scan_triton_launch, "SCALAR_PROGRAMS", 8)


@pytest.mark.usefixtures("_small_chunks", "poisoned")
@pytest.mark.filterwarnings("ignore:overflow encountered in matmul:RuntimeWarning")  # in entries that a mask discards
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=[f"{n}-{d}" for n, d in RUNS])
def test_kernels_agree_with_the_spec(name, dtype):
    options = dict(CASES[name])
    last = options.get("last", False)
    check(_scan_triton.run, arguments(name, **options), getattr(torch, dtype), last)


@pytest.mark.usefixtures("_small_chunks")
def test_gradients_are_the_same_bits_again():
    values = arguments("again", 1, 2, 18, 1)
    first, second = (evaluate(_scan_triton.run, tensors(values, torch.float32, False)) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_padding_reaches_nothing():
    values = arguments("padding", 1, 2, 8, 2, padded=True)
    clean = evaluate(_scan_triton.run, tensors(values, torch.float32, False))
    for key in ("u", "delta", "B", "C", "z"):
        values[key][..., values["lengths"][0] :] = np.nan
    given = tensors(values, torch.float32, False)
    dirty = evaluate(_scan_triton.run, given)
    assert all(torch.equal(clean[key], dirty[key]) for key in clean)


@pytest.mark.usefixtures("_small_chunks")
def test_packed_sequences_are_apart_even_in_what_is_not_a_number():
    check_apart(_scan_triton.run, arguments("apart", 1, 2, 36, 2), 21)


def test_second_derivative_is_an_error():
    given = tensors(arguments("twice", 1, 1, 2, 1), torch.float32, False)
    y = _scan_triton.run(**given)
    (du,) = torch.autograd.grad(y.sum(), given["u"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(du.sum(), given["delta"])


def test_operator_is_registered_rightly():
    given = tensors(arguments("opcheck", 1, 2, 4, 1), torch.float32, False)
    B, C = given["B"].unsqueeze(1), given["C"].unsqueeze(1)
    args = (given["u"], given["delta"], given["A"], B, C, given["D"], None, None, None, None, None, True, True, True)
    torch.library.opcheck(
        torch.ops.tokendyn.selective_scan_triton.default, args, test_utils=("test_schema", "test_faketensor")
    )
