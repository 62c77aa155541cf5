"""The NNX layers and models against their torch twins, from one file of weights; and what only JAX has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file

import tokendyn
import tokendyn.jax as tj
import tokendyn.torch as tt
from tokendyn._tolerances import DEFAULT
from tokendyn.errors import CheckpointError, DataError, OptionError, RegimeError, ShapeError

from .layers_reference import randomize, tokens

pytestmark = pytest.mark.usefixtures("quick_compilation")


TINY = {
    "dims": (4, 6, 8, 8),
    "in_dim": 4,
    "depths": (1, 1, 2, 2),
    "num_heads": (2, 2),
    "window_size": (3, 2),
    "stem_stride": 2,
    "downsample": (True, False, False),
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.0,
    "num_classes": 5,
}
LM = {"vocab_size": 11, "d_model": 6, "n_layer": 2, "d_state": 3, "pad_vocab_size_multiple": 4}


@dataclass(frozen=True)
class Case:
    """A module of both backends, and its input."""

    make: Callable[[Any], Any]
    input: tuple[int, ...] | np.ndarray


def both(name: str, *args: Any, **options: Any) -> Callable[[Any], Any]:
    """Make ``name`` of the namespace given; with ``rngs`` in JAX."""

    def make(space: Any) -> Any:
        extra = {"rngs": nnx.Rngs(0), "param_dtype": jnp.float64} if space is tj else {}
        found = getattr(space, name, None) or getattr(space.models, name)
        return found(*args, **options, **extra)

    return make


def reorder(space: Any) -> Any:
    extra = {"rngs": nnx.Rngs(0), "param_dtype": jnp.float64} if space is tj else {}
    config = tokendyn.OrderConfig(tau=0.3, normalize=True)
    return space.TokenReorder(space.S6(6, 3, **extra), 6, config, **extra)


ordered = tokendyn.OrderConfig(tau=0.2, restore=False, reorder_gate=True)
ids = np.random.default_rng(3).integers(0, 11, (2, 7))
CASES = {
    "S6": Case(both("S6", 6, 3), (2, 9, 6)),
    "S6, dense, scalar, negative": Case(
        both("S6", 6, 3, dt_rank=None, scalar_A=True, io_regime="negative", dt_bias=False, skip=False), (2, 9, 6)
    ),
    "Mamba": Case(both("Mamba", 5, 3, bias=True), (2, 9, 5)),
    "Mamba, sorted": Case(both("Mamba", 5, 3, order=ordered, io_regime="mixed", io_form="scale_matched"), (2, 9, 5)),
    "Mamba, no convolution, hard": Case(both("Mamba", 5, 3, None, order="straight_through"), (2, 9, 5)),
    "TokenReorder": Case(reorder, (2, 9, 6)),
    "MambaVision": Case(both("MambaVision", **TINY, order="published", parity="published"), (2, 3, 14, 10)),
    "MambaLM": Case(both("MambaLM", **LM), ids),
    "MambaLM, head of its own, shared and ordered blocks": Case(
        both("MambaLM", **LM, tie_embeddings=False, share_layers=True, norm="layer", order="published"), ids
    ),
}


#: Compiled once more in float32 by the tests.
IN_FLOAT32 = ("Mamba, sorted", "MambaVision", "MambaLM")


def converted(case: Case, path: Path) -> tuple[Any, Any]:
    """The torch module with generic weights, and the JAX module that read them from its file; both in float64."""
    mine = randomize(case.make(tt), seed=1)
    theirs = case.make(tj)
    save_file({k: v.clone() for k, v in mine.state_dict().items()}, path)
    tj.load_weights(theirs, path)
    return mine, theirs


def in_dtype(module: nnx.Module, dtype: str) -> nnx.Module:
    """A copy whose floating parameters are rounded to ``dtype``; computations follow them."""
    graph, state = nnx.split(nnx.clone(module))
    state = jax.tree.map(lambda v: v.astype(dtype) if v.dtype == "float64" else v, state)
    module = nnx.merge(graph, state)
    for _, part in nnx.iter_modules(module):
        if getattr(part, "dtype", None) is not None:
            part.dtype = jnp.dtype(dtype)
    return module


def run(module: nnx.Module, x: Any, cotangent: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Output, running statistics and gradients (``input`` that of x), in one compiled call."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    @jax.jit
    def call(params: Any, rest: Any, x: Any) -> Any:
        def output(params: Any, x: Any) -> Any:
            live = nnx.merge(graph, params, rest, copy=True)
            return live(x), nnx.state(live, nnx.BatchStat)

        integers = jnp.issubdtype(x.dtype, jnp.integer)
        y, pull, statistics = jax.vjp(
            lambda p, *v: output(p, *(v or (x,))), params, *([] if integers else [x]), has_aux=True
        )
        return y, statistics, pull(cotangent.astype(y.dtype))

    y, statistics, (gradients, *of_x) = call(params, rest, x)
    by_name = {".".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(gradients)}
    if of_x:
        by_name["input"] = of_x[0]
    return y, {".".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(statistics)}, by_name


def normwise(got: Any, want: torch.Tensor) -> float:
    got, want = np.asarray(got, np.float64), want.detach().double().numpy()
    assert got.shape == want.shape
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def errors(case: Case, folder: Path, dtypes: tuple[str, ...]) -> Iterator[tuple[str, str, str, float, float]]:
    """Dtype, kind, name, error and bound of everything that JAX and torch (in float64) compute from one file."""
    mine, theirs = converted(case, folder / "weights.safetensors")
    x = torch.from_numpy(case.input) if isinstance(case.input, np.ndarray) else tokens(*case.input, seed=5)
    if x.is_floating_point():
        x.requires_grad_()
    y = mine(x)
    cotangent = tokens(*y.shape, seed=6)
    leaves = dict(mine.named_parameters()) | ({"input": x} if x.requires_grad else {})
    wanted = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), cotangent), strict=True))
    statistics = {k: v for k, v in mine.state_dict().items() if "running" in k or "tracked" in k}
    size = max(float(gradient.norm()) for gradient in wanted.values())
    for dtype in dtypes:
        allowed = DEFAULT[dtype]
        module = theirs if dtype == "float64" else in_dtype(theirs, dtype)
        given = jnp.asarray(x.detach().numpy())
        given = given.astype(dtype) if x.is_floating_point() else given
        got, moved, gradients = run(module, given, jnp.asarray(cotangent.numpy()))
        assert got.dtype == dtype
        assert set(moved) == set(statistics)
        assert set(gradients) == set(wanted)
        yield dtype, "values", "output", normwise(got, y), allowed.values
        for key, value in moved.items():
            yield dtype, "values", key, normwise(value, statistics[key]), allowed.values
        for key, value in gradients.items():
            # A sum of terms that cancel, as of a bias before a batch norm, is judged by the largest of all.
            floor = 1e-2 * size
            error = float(np.linalg.norm(np.asarray(value, np.float64) - wanted[key].numpy()))
            yield dtype, "gradients", key, error / max(floor, float(wanted[key].norm())), allowed.gradients


@pytest.mark.parametrize("name", CASES)
def test_equals_torch_from_the_same_file(name: str, tmp_path: Path) -> None:
    """Output, running statistics and every gradient; in float64, and in float32 where rounding alone differs."""
    dtypes = ("float64", "float32") if name in IN_FLOAT32 else ("float64",)
    for dtype, kind, key, error, allowed in errors(CASES[name], tmp_path, dtypes):
        assert error < allowed, (dtype, kind, key)


def test_evaluation_uses_the_running_statistics(tmp_path: Path) -> None:
    """And what the other case of MambaVision leaves out: scaled branches, normed queries, no order in evaluation."""
    options = {**TINY, "layer_scale": 0.5, "layer_scale_conv": 0.5, "qk_norm": True, "order": "random"}
    mine, theirs = converted(Case(both("MambaVision", **options), ()), tmp_path / "weights.safetensors")
    mine.eval()
    theirs.eval()
    images = tokens(1, 3, 14, 10)
    got = nnx.jit(lambda model, x: model(x))(theirs, jnp.asarray(images.numpy()))
    assert normwise(got, mine(images)) < 1e-12


@pytest.mark.parametrize("name", ["Mamba, sorted", "MambaVision", "MambaLM"])
def test_weights_go_both_ways_without_loss(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    mine, theirs = converted(case, tmp_path / "there.safetensors")
    tj.save_weights(theirs, tmp_path / "back.safetensors")
    back, there = load_file(tmp_path / "back.safetensors"), mine.state_dict()
    assert back.keys() == there.keys()
    assert all(torch.equal(back[key], there[key]) and back[key].dtype == there[key].dtype for key in there)
    case.make(tt).double().load_state_dict(back)


def test_half_precision_weights_go_through_a_file(tmp_path: Path) -> None:
    module = tj.Mamba(4, 2, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert module.A_log.dtype == module.D.dtype == jnp.float32
    tj.save_weights(module, tmp_path / "half.safetensors")
    mine = tt.Mamba(4, 2, dtype=torch.bfloat16)
    mine.load_state_dict(load_file(tmp_path / "half.safetensors"))
    assert mine.in_proj.weight.dtype == torch.bfloat16
    other = tj.Mamba(4, 2, rngs=nnx.Rngs(1))
    tj.load_weights(other, tmp_path / "half.safetensors")
    for key, value in tj.state_dict(other).items():
        assert value.dtype == tj.state_dict(module)[key].dtype
        assert np.array_equal(value.astype(np.float64), mine.state_dict()[key].double().numpy())


def test_loaded_weights_are_copies() -> None:
    mine, theirs = tt.S6(64, 16), tj.S6(64, 16, rngs=nnx.Rngs(0))
    tj.load_state_dict(theirs, mine.state_dict())
    before = tj.state_dict(theirs)["x_proj.weight"].copy()
    with torch.no_grad():
        mine.x_proj.weight.add_(1)
    np.testing.assert_array_equal(tj.state_dict(theirs)["x_proj.weight"], before)


def test_weights_that_do_not_fit_are_told(tmp_path: Path) -> None:
    module = tj.S6(4, 2, rngs=nnx.Rngs(0))
    state = tj.state_dict(module)
    before = state["A_log"].copy()
    with pytest.raises(CheckpointError, match=r"missing \['D'\], unknown \['E'\]"):
        tj.load_state_dict(module, {**{k: v for k, v in state.items() if k != "D"}, "E": state["D"]})
    with pytest.raises(CheckpointError, match=r"A_log has shape \(4, 3\), expected \(4, 2\)"):
        tj.load_state_dict(module, state | {"A_log": np.ones((4, 3)), "D": 2 * state["D"]})
    np.testing.assert_array_equal(tj.state_dict(module)["A_log"], before)
    (tmp_path / "broken").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        tj.load_weights(module, tmp_path / "broken")
    lm = tj.MambaLM(**LM, rngs=nnx.Rngs(0))
    assert lm.causal
    with pytest.raises(CheckpointError, match="are one parameter"):
        tj.load_state_dict(lm, tj.state_dict(lm) | {"lm_head.weight": np.zeros((12, 6), np.float32)})


@pytest.mark.parametrize("name", ["Mamba", "Mamba, no convolution, hard"])
def test_decoding_is_the_whole_pass(name: str, tmp_path: Path) -> None:
    """A prompt, then token by token; also prompts in two pieces, and the states as torch has them."""
    case = Case(both("Mamba", 5, 3, *([None] if "no conv" in name else [])), (2, 9, 5))
    mine, theirs = converted(case, tmp_path / "w.safetensors")
    x = tokens(2, 9, 5)
    h = jnp.asarray(x.numpy())

    @nnx.jit
    def decode(block: Any, h: Any) -> Any:
        out, *states = block.prefill(h[:, :2], *block.allocate_inference_cache(2))
        more, *states = block.prefill(h[:, 2:6], *states)
        outs = [out, more]
        for t in range(6, 9):
            out, *states = block.step(h[:, t : t + 1], *states)
            outs.append(out)
        return jnp.concatenate(outs, 1), states

    out, states = decode(theirs, h)
    assert normwise(out, mine(x)) < 1e-12
    _, *wanted = mine.prefill(x, *mine.allocate_inference_cache(2, 9))
    for got, want in zip(states, wanted, strict=True):
        assert got.shape == want.shape
        assert got.size == 0 or normwise(got, want) < 1e-12


def test_generation_is_that_of_torch(tmp_path: Path) -> None:
    mine, theirs = converted(CASES["MambaLM"], tmp_path / "w.safetensors")
    prompt = ids[:, :3]
    generate = nnx.jit(lambda model, tokens: model.generate(tokens, 6))
    got = np.asarray(generate(theirs, jnp.asarray(prompt)))
    assert got.tolist() == mine.generate(torch.from_numpy(prompt), 6).tolist()
    drawn = nnx.jit(lambda model, tokens, key: model.generate(tokens, 6, temperature=2.0, top_k=3, key=key))
    one, same, other = (drawn(theirs, jnp.asarray(prompt), jax.random.key(seed)).tolist() for seed in (0, 0, 1))
    assert one == same != other
    assert np.asarray(one).max() < LM["vocab_size"]
    with pytest.raises(OptionError, match="a key was not given"):
        theirs.generate(jnp.asarray(prompt), 2, temperature=1.0)


def test_losses_are_those_of_torch(tmp_path: Path) -> None:
    mine, theirs = converted(CASES["MambaLM"], tmp_path / "w.safetensors")
    targets = np.roll(ids, -1, 1)
    got = nnx.jit(lambda m, t, g: m(t, g))(in_dtype(theirs, "float32"), jnp.asarray(ids), jnp.asarray(targets))
    assert got.dtype == jnp.float32
    assert normwise(got, mine(torch.from_numpy(ids), torch.from_numpy(targets))) < 5e-6


def test_transformations_of_a_layer() -> None:
    """vmap over weights, grad of remat within scan, jvp: against each other."""
    layers = [tj.Mamba(4, 2, order="softsort", param_dtype=jnp.float64, rngs=nnx.Rngs(seed)) for seed in (0, 1)]
    graph = nnx.split(layers[0])[0]
    states = [nnx.split(layer)[1] for layer in layers]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *states)
    x = jnp.asarray(tokens(2, 5, 4).numpy())

    def loss(state: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(nnx.merge(graph, state)(x)))

    @jax.jit
    def everything(stacked: Any, x: Any) -> Any:
        of_batch = jax.vmap(jax.value_and_grad(loss), in_axes=(0, None))(stacked, x)
        scanned = jax.lax.scan(lambda c, s: (c, jax.value_and_grad(jax.checkpoint(loss))(s, x)), None, stacked)[1]
        tangents = jax.tree.map(jnp.cos, stacked)
        forward = jax.vmap(lambda s, t: jax.jvp(lambda s: loss(s, x), (s,), (t,))[1])(stacked, tangents)
        pairs = zip(jax.tree.leaves(of_batch[1]), jax.tree.leaves(tangents), strict=True)
        return of_batch, scanned, forward, sum(jnp.sum((g * t).reshape(2, -1), axis=1) for g, t in pairs)

    of_batch, scanned, forward, reverse = everything(stacked, x)
    for one, other in zip(jax.tree.leaves(of_batch), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(forward, reverse, rtol=1e-10)
    assert abs(float(of_batch[0][0] - of_batch[0][1])) > 1e-3


def test_dtypes_are_kept_and_second_calls_compile_nothing() -> None:
    """Half-precision computation on float32 weights, and half-precision weights; no compilation for new values."""
    x = jnp.asarray(tokens(1, 5, 4).numpy(), jnp.float32)
    for options, given, out in (
        ({}, "float32", "float32"),
        ({"dtype": jnp.bfloat16}, "float32", "bfloat16"),
        ({"param_dtype": jnp.bfloat16}, "bfloat16", "bfloat16"),
    ):
        layer = tj.Mamba(4, 2, rngs=nnx.Rngs(0), **options)
        graph, state = nnx.split(layer)
        shapes = jax.eval_shape(
            jax.grad(lambda s, v, g=graph: nnx.merge(g, s)(v).astype("float32").sum(), (0, 1)), state, x.astype(given)
        )
        assert jax.tree.map(lambda v: v.dtype, shapes[0]) == jax.tree.map(lambda v: v.dtype, state)
        assert jax.eval_shape(lambda s, v, g=graph: nnx.merge(g, s)(v), state, x.astype(given)).dtype == out
    compiled: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    call = nnx.jit(lambda layer, x: layer(x))
    layer = tj.Mamba(4, 2, order="random", rngs=nnx.Rngs(0))
    jax.monitoring.register_event_duration_secs_listener(listen)
    first, second = call(layer, x), call(layer, x)
    assert not np.array_equal(first, second)  # the stream of random orders moved on
    count = len(compiled)
    assert count > 0
    call(layer, x)
    layer.eval()
    evaluated = call(layer, x)
    assert np.array_equal(evaluated, call(layer, x))
    total = len(compiled)
    call(layer, x)
    jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == total


def test_dropout_and_stochastic_depth() -> None:
    from tokendyn.backends.jax.models._norms import Dropout

    drop = Dropout(0.25, whole_samples=True, rngs=nnx.Rngs(0))
    out = np.asarray(drop(jnp.ones((4000, 3))))
    assert sorted(set(out.ravel().tolist())) == pytest.approx([0.0, 4 / 3])
    assert (out == out[:, :1]).all()
    assert (out == 0).mean() == pytest.approx(0.25, abs=0.03)
    drop.eval()
    assert np.array_equal(drop(jnp.ones((4, 3))), np.ones((4, 3)))
    model = tj.MambaVision(**{**TINY, "drop_path_rate": 0.2}, rngs=nnx.Rngs(0))
    rates = [m.p for _, m in nnx.iter_modules(model) if isinstance(m, Dropout) and m.whole_samples]
    assert sorted(rates) == pytest.approx([0.2 * i / 5 for i in range(6)])


def test_sizes_and_starting_values_are_those_of_torch() -> None:
    for name in ("mambavision_16px", "mambavision_32px", "mambavision_64px", "mambavision_t"):
        with torch.device("meta"):
            mine = getattr(tt.models, name)(order="published").state_dict()
        theirs = nnx.eval_shape(lambda name=name: getattr(tj.models, name)(order="published", rngs=nnx.Rngs(0)))
        flat = nnx.to_flat_state(nnx.state(theirs, nnx.Any(nnx.Param, nnx.BatchStat)))
        assert {".".join(map(str, p)): v.shape for p, v in flat} == {k: tuple(v.shape) for k, v in mine.items()}
    torch.manual_seed(0)
    mine, theirs = tt.Mamba(64, 8, bias=True), tj.Mamba(64, 8, bias=True, rngs=nnx.Rngs(0))
    for name, value in mine.state_dict().items():
        got = tj.state_dict(theirs)[name]
        assert got.mean() == pytest.approx(value.mean().item(), abs=0.35 * value.std().item()), name
        assert got.std() == pytest.approx(value.std().item(), rel=0.2), name


def test_constructors_follow_the_backend_chosen() -> None:
    rngs = nnx.Rngs(0)
    with tokendyn.backend("jax"):
        for made, kind in (
            (tokendyn.S6(4, 2, rngs=rngs), tj.S6),
            (tokendyn.Mamba(4, 2, rngs=rngs), tj.Mamba),
            (tokendyn.TokenReorder(lambda x: x, 4, rngs=rngs), tj.TokenReorder),
            (tokendyn.MambaLM(**LM, rngs=rngs), tj.MambaLM),
        ):
            assert isinstance(made, kind)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda r: tj.S6(4, 8, io_regime="positive", rngs=r), RegimeError, "needs N <= d"),
        (lambda r: tj.S6(4, 2, io_form="best", rngs=r), OptionError, "io_form is 'best'"),
        (lambda r: tj.S6(4, 2, rngs=r)(jnp.ones((1, 3, 5))), ShapeError, "with D = 4"),
        (
            lambda r: tj.S6(4, 2, order="hard", rngs=r)(jnp.ones((1, 3, 4)), lengths=jnp.ones(1, int)),
            OptionError,
            "order each sequence by itself",
        ),
        (lambda r: tj.Mamba(4, order="hard", rngs=r).prefill(jnp.ones((1, 3, 4)), 0, 0), OptionError, "cannot be"),
        (lambda r: tj.Mamba(4, rngs=r).step(jnp.ones((1, 3, 4)), 0, 0), ShapeError, "expected one token"),
        (lambda r: tj.TokenReorder(lambda x: x, 4, tokendyn.OrderConfig(restore=False, reorder_gate=True), rngs=r),
         OptionError, "without reorder_gate"),
        (lambda r: tj.MambaVision(**{**TINY, "num_heads": (3, 2)}, rngs=r), OptionError, "a divisor of the width"),
        (lambda r: tj.MambaVision(**TINY, rngs=r)(jnp.ones((1, 4, 8, 8))), ShapeError, r"\(b, 3, H, W\)"),
        (lambda r: tj.MambaLM(**{**LM, "norm": "batch"}, rngs=r), OptionError, "norm is 'batch'"),
        (lambda r: tj.MambaLM(**LM, order="hard", rngs=r).generate(jnp.ones((1, 3), int), 2), OptionError,
         "cannot be decoded"),
        (lambda r: tj.MambaLM(**LM, rngs=r)(jnp.ones((1, 3))), ShapeError, "of an integer dtype"),
        (lambda r: tj.MambaLM(**LM, rngs=r)(jnp.full((1, 3), -1)), DataError, "tokens hold the id -1, expected"),
        (lambda r: tj.MambaLM(**LM, rngs=r)(jnp.ones((1, 3), int), jnp.full((1, 3), 99)), DataError,
         "targets hold the id 99"),
    ],
)  # fmt: skip
def test_wrong_use_is_told(make: Callable[[nnx.Rngs], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(nnx.Rngs(0))
