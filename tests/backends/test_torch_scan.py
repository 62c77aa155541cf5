"""The engines of the PyTorch scan against the spec: sizes that make them work in several pieces, padding that holds
anything, values at the edge of the dtype, memory, and how an engine is chosen."""

from __future__ import annotations

import functools
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import tokendyn
from tokendyn import core
from tokendyn.backends.torch.ops import _engines, _recurrence, _scan_chunked
from tokendyn.backends.torch.ops._recurrence import linear_recurrence
from tokendyn.errors import EngineError, OptionError

from .scan_cases import arguments as scan_arguments
from .scan_cases import check_apart

pytestmark = pytest.mark.usefixtures("one_thread")

ENGINES = ("chunked", "plain")
CASES = {
    "ordinary": {},
    "one token": {"length": 1},
    "groups": {"groups": 2},
    "scalar A": {"scalar_a": True, "groups": 4},
    "state": {"with_state": True},
    "packed": {"packed": True, "with_state": True},
    "padded": {"padded": True, "with_state": True},
    "packed and padded, scalar A": {"packed": True, "padded": True, "with_state": True, "scalar_a": True},
    "bare": {"with_d": False, "with_z": False},
}


@pytest.fixture(params=["whole", "in pieces"])
def pieces(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines as they come, which take short sequences whole; and in chunks of 3 and blocks of 2."""
    if request.param == "in pieces":
        monkeypatch.setattr(_scan_chunked, "_CHUNK_ELEMENTS", 0)
        monkeypatch.setattr(_scan_chunked, "_SHORTEST_CHUNK", 3)
        monkeypatch.setattr(_recurrence, "_block_length", lambda x: min(2, len(x)))


def arguments(name: str, **more: Any) -> dict[str, Any]:
    sizes = {"batch": 3, "channels": 4, "length": 11, "state": 3} | CASES[name] | more
    with tokendyn.backend("torch"):
        return tokendyn.random_inputs("selective_scan", seed=zlib.crc32(name.encode()), dtype="float64", **sizes)


def as_numpy(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def gradients(outputs: Any, cotangents: Any, given: dict[str, Any]) -> dict[str, Any]:
    inputs = {name: value for name, value in given.items() if isinstance(value, torch.Tensor) and value.requires_grad}
    return dict(zip(inputs, torch.autograd.grad(outputs, list(inputs.values()), cotangents), strict=True))


def tracked(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` with gradients wanted for all floating arrays."""
    return {
        name: value.clone().requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in values.items()
    }


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("pieces")
def test_engine_is_the_spec(name: str, engine: str) -> None:
    given = tracked(arguments(name))
    y, last = tokendyn.selective_scan(**given, return_last_state=True, engine=engine)
    plain = as_numpy({key: value.detach() if hasattr(value, "detach") else value for key, value in given.items()})
    expected = core.selective_scan(**plain, return_last_state=True)
    np.testing.assert_allclose(y.detach().numpy(), expected[0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(last.detach().numpy(), expected[1], rtol=1e-12, atol=1e-13)
    rng = np.random.default_rng(len(name))
    dy, dlast = rng.standard_normal(y.shape), rng.standard_normal(last.shape)
    for wanted in ((dy, dlast), (dy, None), (None, dlast)):  # either output alone, too
        outs, cots = zip(
            *((o, torch.from_numpy(c)) for o, c in zip((y, last), wanted, strict=True) if c is not None), strict=True
        )
        inputs = [value for value in given.values() if isinstance(value, torch.Tensor) and value.requires_grad]
        found = torch.autograd.grad(outs, inputs, cots, retain_graph=True, allow_unused=True)
        reference = core.selective_scan_vjp(wanted, **plain, return_last_state=True)
        names = [key for key, value in given.items() if isinstance(value, torch.Tensor) and value.requires_grad]
        for key, gradient in zip(names, found, strict=True):
            actual = np.zeros_like(reference[key]) if gradient is None else gradient.numpy()
            np.testing.assert_allclose(actual, reference[key], rtol=1e-10, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("length", [1, 2, 5, 12, 50])
def test_recurrence_in_blocks_is_the_loop(length: int, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Growth, decay to nothing and resets, for every length of block."""
    rng = np.random.default_rng((length, transposed))
    a = torch.from_numpy(rng.choice([0.0, 1e-300, 0.5, 1.0, 3.0], (length, 2, 1, 2)))
    x = torch.from_numpy(rng.standard_normal((length, 2, 3, 2)))
    h0 = None if transposed else torch.from_numpy(rng.standard_normal((2, 3, 2)))
    expected = torch.empty_like(x)
    state = torch.zeros_like(x[0]) if h0 is None else h0
    for l in reversed(range(length)) if transposed else range(length):
        factor = a[l] if not transposed else a[l + 1] if l + 1 < length else 0.0
        state = factor * state + x[l]
        expected[l] = state
    for block in range(1, length + 1):
        monkeypatch.setattr(_recurrence, "_block_length", lambda x, block=block: block)
        actual = linear_recurrence(a, x, h0, transposed=transposed)
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), 1e300])
def test_padding_reaches_nothing(engine: str, rubbish: float) -> None:
    given = arguments("packed", padded=True)
    padding = torch.arange(11) >= given["lengths"].unsqueeze(-1)
    assert padding.any()
    assert not padding.all(1).all()
    filled = {
        name: value.masked_fill(padding.view(3, *[1] * (value.ndim - 2), 11), rubbish)
        if name in ("u", "delta", "B", "C", "z")
        else value
        for name, value in given.items()
    }
    clean, dirty = tracked(given), tracked(filled)
    outs = [tokendyn.selective_scan(**v, return_last_state=True, engine=engine) for v in (clean, dirty)]
    assert torch.equal(outs[0][0], outs[1][0])
    assert torch.equal(outs[0][1], outs[1][1])
    assert (outs[1][0].masked_select(padding[:, None]) == 0).all()
    cotangents = [torch.ones_like(out) for out in outs[0]]
    of_clean, of_dirty = gradients(outs[0], cotangents, clean), gradients(outs[1], cotangents, dirty)
    for name, gradient in of_dirty.items():
        assert torch.equal(gradient, of_clean[name]), name
        if name in ("u", "delta", "B", "C", "z"):
            assert (gradient.masked_select(padding.view(3, *[1] * (gradient.ndim - 2), 11)) == 0).all()


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.usefixtures("pieces")
def test_packed_sequences_are_apart_even_in_what_is_not_a_number(engine: str, scalar: bool) -> None:
    run = functools.partial(tokendyn.selective_scan, engine=engine)
    check_apart(run, scan_arguments("apart", 2, 3, 14, 2, scalar=scalar), 8)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_decay_of_0_is_no_reset(engine: str) -> None:
    """One packed sequence is the bare one, though decays underflow: NaN stays."""
    u = torch.tensor([[[torch.nan, 1.0, 1.0, 1.0]]])
    ones, steps = torch.ones(1, 1, 4), torch.full((1, 1, 4), 2000.0)
    alone = torch.zeros(1, 4, dtype=torch.int64)
    y = tokendyn.selective_scan(u, steps, -torch.ones(1, 1), ones, ones, seq_idx=alone, engine=engine)
    assert torch.isnan(y).all()


def test_packed_calls_have_a_shape_without_values() -> None:
    given = arguments("packed")
    with FakeTensorMode() as mode:
        fake = {key: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for key, v in given.items()}
        assert tokendyn.selective_scan(**fake).shape == given["u"].shape


@pytest.mark.filterwarnings("ignore:.torch.jit.script.*deprecated:DeprecationWarning")  # of torch's own imports
def test_forward_mode_keeps_packed_sequences_apart() -> None:
    given = {**arguments("bare", batch=1), "seq_idx": torch.tensor([[0] * 6 + [1] * 5])}
    u, delta = given.pop("u"), given.pop("delta")
    spoiled = delta.index_fill(-1, torch.tensor(3), torch.nan)

    def tangent(delta: torch.Tensor) -> torch.Tensor:
        of_delta = functools.partial(tokendyn.selective_scan, u, **given, engine="plain")
        return torch.func.jvp(of_delta, (delta,), (torch.ones_like(delta),))[1]

    assert torch.equal(tangent(spoiled)[..., 6:], tangent(delta)[..., 6:])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("delta", "decay"),
    [(1e3, -1.0), (-1e3, -1.0), (40.0, -1e30), (-60.0, -1.0), (0.0, -1e-30), (0.0, 0.0), (1.0, 2.0), (30.0, -1.0)],
)
def test_gradients_are_finite_at_extremes(delta: float, decay: float, engine: str, dtype: str) -> None:
    given = arguments("packed")
    given["delta"] = given["delta"] * 0 + delta
    given["A"] = torch.full_like(given["A"], decay)
    given = tracked({k: v.to(getattr(torch, dtype)) if hasattr(v, "dtype") and v.is_floating_point() else v
                     for k, v in given.items()})  # fmt: skip
    given["delta_softplus"] = True
    y = tokendyn.selective_scan(**given, engine=engine)
    assert y.isfinite().all()
    for name, gradient in gradients([y], [torch.ones_like(y)], given).items():
        assert gradient.isfinite().all(), name


def test_softplus_is_exact_in_float64() -> None:
    v = torch.tensor([-745.0, -40.0, -1.0, 0.0, 1.0, 19.9, 20.1, 25.0, 36.0, 800.0], dtype=torch.float64)
    u, B = torch.ones(1, 1, 10, dtype=torch.float64), torch.ones(1, 1, 10, dtype=torch.float64)
    C = torch.ones(1, 1, 10, dtype=torch.float64)
    decay = torch.full((1, 1), -1e6, dtype=torch.float64)  # no memory: y is the step size itself
    y = tokendyn.selective_scan(u, v.view(1, 1, 10), decay, B, C, delta_softplus=True)
    forgotten = v[1:] > -1  # beyond, exp(Δ A) is not 0
    expected = np.logaddexp(0.0, v.numpy())
    np.testing.assert_allclose(y.flatten()[1:][forgotten], expected[1:][forgotten], rtol=1e-15)


@pytest.mark.parametrize("scalar_a", [False, True])
def test_chunked_engine_keeps_few_states(scalar_a: bool) -> None:
    kept = []
    with tokendyn.backend("torch"):
        given = tracked(
            tokendyn.random_inputs(
                "selective_scan", batch=2, channels=16, length=256, state=8, scalar_a=scalar_a, seed=3
            )
        )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        tokendyn.selective_scan(**given, engine="chunked")
    states = 2 * 16 * 256 * 8
    assert sum(kept) < 2 * states, "the plain engine keeps at least exp(Δ A), the sources and the states"
    assert max(kept) < states


def test_an_engine_is_asked_for_by_name() -> None:
    given = arguments("ordinary")
    with pytest.raises(OptionError, match=r"engine is 'fast', expected one of 'auto', .*'plain'"):
        tokendyn.selective_scan(**given, engine="fast")
    with pytest.raises(EngineError, match=r"'chunked' cannot take this call: .*torch\.func"):
        torch.func.grad(lambda u: tokendyn.selective_scan(**{**given, "u": u}, engine="chunked").sum())(given["u"])
    assert [engine.name for engine in _engines.ENGINES["selective_scan"]][-1] == "plain", (
        "it takes every call, so it must come last"
    )


def test_auto_takes_the_first_that_does_not_decline(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def engine(name: str, reason: str | None) -> _engines.Engine:
        def run(*args: Any, **options: Any) -> str:
            return name

        return _engines.Engine(name, lambda call: (seen.append(name), reason)[1], run)

    engines = (engine("a", "too small"), engine("b", None), engine("c", None))
    monkeypatch.setitem(_engines.ENGINES, "selective_scan", engines)
    given = arguments("ordinary")
    assert tokendyn.selective_scan(**given) == "b"
    assert seen == ["a", "b"]
    assert tokendyn.selective_scan(**given, engine="c") == "c"
    with pytest.raises(EngineError, match="'a' cannot take this call: too small"):
        tokendyn.selective_scan(**given, engine="a")


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_the_compiled_scan_is_one_node_however_long() -> None:
    counts = []

    def backend(graph: Any, inputs: Any) -> Any:
        from functorch.compile import make_boxed_func
        from torch._functorch.aot_autograd import aot_module_simplified

        def count(module: Any, inputs: Any) -> Any:
            counts.append(sum(node.op == "call_function" for node in module.graph.nodes))
            return make_boxed_func(module)

        return aot_module_simplified(graph, inputs, fw_compiler=count, bw_compiler=count)

    for length in (8, 64):
        torch.compiler.reset()
        given = tracked(arguments("ordinary", length=length))
        torch.compile(lambda g: tokendyn.selective_scan(**g), fullgraph=True, backend=backend)(given).sum().backward()
    forward, backward = counts[:2]
    assert counts[2:] == [forward, backward]
    assert max(counts) < 150


def test_aggregated_attention_never_keeps_all_channels() -> None:
    with tokendyn.backend("torch"):
        given = tracked(tokendyn.random_inputs("hidden_attention", batch=1, channels=64, length=48, seed=1))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        mean = tokendyn.hidden_attention(**given, aggregate="mean_abs")
    assert sum(kept) < 64 * 48 * 48 / 2
    every = tokendyn.hidden_attention(**given).abs().mean(1)
    torch.testing.assert_close(mean, every)
    names = gradients([mean], [torch.ones_like(mean)], given)
    for name, gradient in gradients([every], [torch.ones_like(every)], given).items():
        torch.testing.assert_close(names[name], gradient, rtol=1e-4, atol=1e-4)
