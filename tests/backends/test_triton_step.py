"""The Triton kernel of the single step against the spec; see ``triton_session`` for where it runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tokendyn
from tokendyn import core
from tokendyn._tolerances import HALF_EPS, HALF_FACTOR, tolerance
from tokendyn.backends.torch.ops import _engines, _step_plain
from tokendyn.errors import EngineError

from .triton_session import DEVICE, ON_GPU

# isort: split
from tokendyn.backends.torch.ops import _step_triton

PARAMETERS = ("state", "A", "D", "dt_bias")
SIZES = {
    "one of everything": {"batch": 1, "channels": 1, "state": 1},
    "groups, an odd state": {"batch": 2, "channels": 6, "state": 5, "groups": 3},
    "two blocks of channels": {"batch": 2, "channels": 70, "state": 16},
    "a wide state": {"batch": 1, "channels": 3, "state": 200},
    "scalar A, bare": {"batch": 2, "channels": 5, "state": 4, "scalar_a": True, "with_d": False, "with_z": False},
    **(
        {
            "a language model's": {"batch": 8, "channels": 1536, "state": 16},
            "large": {"batch": 128, "channels": 1536, "state": 16, "groups": 2, "scalar_a": True},
        }
        if ON_GPU
        else {}
    ),
}


def tensors(name, dtype, strided=False):
    values = {
        key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for key, value in tokendyn.random_inputs("selective_state_update", dtype="float64", **SIZES[name]).items()
    }
    found = {}
    for key, value in values.items():
        if isinstance(value, torch.Tensor):
            value = value.to(DEVICE, torch.float32 if key in PARAMETERS else dtype)
            if strided:
                value = torch.stack([value, torch.full_like(value, float("nan"))], -1)[..., 0]
        found[key] = value
    return found


def by_spec(given):
    return core.selective_state_update(
        **{key: t.double().cpu().numpy() if isinstance(t, torch.Tensor) else t for key, t in given.items()}
    )


def error(got, want):
    return float(np.linalg.norm(got.double().cpu().numpy() - want) / np.linalg.norm(want))


def run(engine, given):
    absent = dict.fromkeys(("D", "z", "dt_bias"))
    return engine.run(**{"dt_softplus": False, **absent, **given})


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_kernel_agrees_with_the_spec(name, dtype, strided):
    given = tensors(name, dtype, strided)
    before = given["state"].clone()
    got, want = run(_step_triton, given), by_spec(given)
    assert torch.equal(given["state"], before)
    assert (got[0].dtype, got[1].dtype) == (dtype, torch.float32)
    bound = tolerance("selective_state_update", "float32").values
    for g, w, plain in zip(got, want, run(_step_plain, given), strict=True):
        half = HALF_FACTOR * error(plain, w) + HALF_EPS * torch.finfo(dtype).eps
        assert error(g, w) <= (half if g.dtype != torch.float32 else bound)


def test_kernel_takes_a_state_in_half_precision():
    given = tensors("two blocks of channels", torch.bfloat16)
    given["state"] = given["state"].bfloat16()
    y, new_state = run(_step_triton, given)
    assert new_state.dtype == torch.bfloat16
    for g, w, plain in zip((y, new_state), by_spec(given), run(_step_plain, given), strict=True):
        assert error(g, w) <= HALF_FACTOR * error(plain, w) + HALF_EPS * torch.finfo(torch.bfloat16).eps


def test_operator_is_registered_rightly():
    given = tensors("groups, an odd state", torch.float32)
    args = tuple(given.get(key) for key in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias"))
    torch.library.opcheck(
        torch.ops.tokendyn.selective_state_update.default, (*args, True), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.skipif(ON_GPU, reason="says why the kernel declines on a CPU")
def test_what_the_kernel_declines():
    given = tensors("groups, an odd state", torch.float32)
    with pytest.raises(EngineError, match="'triton' cannot take this call: the arrays are on cpu"):
        tokendyn.selective_state_update(**given, engine="triton")
    call = _engines.StepCall(dtype=torch.float32, device="cuda", state=4, needs_grad=True, transformed=False)
    assert "no gradient" in str(_engines.ENGINES["selective_state_update"][0].declines(call))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
def test_decoding_is_captured_in_a_graph():
    given = tensors("a language model's", torch.bfloat16)
    state = given.pop("state")
    with torch.no_grad():
        want = tokendyn.selective_state_update(state, **given, engine="triton")
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            tokendyn.selective_state_update(state, **given)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            got = tokendyn.selective_state_update(state, **given)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
