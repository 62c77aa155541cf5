"""Orders within the past in JAX's language model: torch's numbers from one file, decoding, and the causality check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file

import tokendyn
import tokendyn.jax as tj
import tokendyn.torch as tt
from tokendyn import OrderConfig
from tokendyn.backends.jax.layers._chunk_order import ChunkOrderMamba
from tokendyn.backends.jax.layers._group_order import GroupOrderMamba
from tokendyn.backends.jax.layers._window_order import WindowOrderMamba
from tokendyn.errors import CausalityError, DTypeError, NonFiniteError, OptionError, ShapeError

from .test_jax_layers import Case, both, converted, errors

pytestmark = pytest.mark.usefixtures("quick_compilation")

SORTED = OrderConfig("straight_through", tau=0.1, normalize=True)
LM: dict[str, Any] = {"vocab_size": 11, "d_model": 4, "n_layer": 1, "d_state": 2}
SCOPES: dict[str, dict[str, Any]] = {
    "chunks": {"order": SORTED, "order_scope": "chunks", "order_chunk": 5, "scalar_A": True},
    "groups": {"order": OrderConfig(tau=0.3, restore=False), "order_scope": "groups", "order_groups": 4},
    "window": {"order": SORTED, "order_scope": "window"},
}
IDS = np.random.default_rng(3).integers(0, 11, (2, 13))


def case(scope: str) -> Case:
    return Case(both("MambaLM", **LM, **SCOPES[scope]), IDS)


@pytest.mark.parametrize("scope", SCOPES)
def test_equals_torch_from_the_same_file(scope: str, tmp_path: Path) -> None:
    found = list(errors(case(scope), tmp_path, ("float64",)))
    assert {key for _, kind, key, *_ in found if kind == "gradients"} >= {"backbone.layers.0.mixer.order.K"}
    for dtype, kind, key, error, bound in found:
        assert error <= bound, (dtype, kind, key, error)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_file_of_one_is_a_file_of_the_other(scope: str, tmp_path: Path) -> None:
    mine, theirs = converted(case(scope), tmp_path / "torch.safetensors")
    tj.save_weights(theirs, tmp_path / "jax.safetensors")
    back = case(scope).make(tt).double()
    back.load_state_dict(load_file(tmp_path / "jax.safetensors"))
    assert all(torch.equal(value, mine.state_dict()[name]) for name, value in back.state_dict().items())


@pytest.mark.parametrize("scope", SCOPES)
def test_decoding_is_the_whole_pass(scope: str, tmp_path: Path) -> None:
    """A prompt, in pieces that end anywhere in a chunk, then token by token."""
    mine, model = converted(case(scope), tmp_path / "weights.safetensors")
    pieces = (3, 1, 4) if scope == "chunks" else (3,)  # chunks of 5: in the first, in the first, in the second

    @nnx.jit
    def decode(model: tj.MambaLM, ids: jax.Array) -> jax.Array:
        cache, found, at = model.allocate_inference_cache(2), [], 0
        for piece in pieces:
            logits, cache = model.prefill(ids[:, at : at + piece], cache)
            found.append(logits)
            at += piece

        def step(cache: Any, token: jax.Array) -> Any:
            logits, cache = model.step(token, cache)
            return cache, logits

        _, rest = jax.lax.scan(step, cache, ids[:, at:].T)
        return jnp.concatenate([jnp.stack(found), rest])

    whole = mine(torch.from_numpy(IDS)).detach().numpy()
    places = [*(np.cumsum(pieces) - 1), *range(sum(pieces), 13)]
    np.testing.assert_allclose(decode(model, jnp.asarray(IDS)), whole[:, places].swapaxes(0, 1), rtol=1e-11, atol=1e-11)


def test_orders_within_the_past_are_causal() -> None:
    models = {scope: tj.MambaLM(**LM, **SCOPES[scope], dropout=0.2, rngs=nnx.Rngs(3)) for scope in SCOPES}
    assert all(model.causal for model in models.values())
    model = models["chunks"]  # the others order within a token, and within a convolution
    found = tj.expect_causal(model, 13, perturbed=[0, 4, 5, 6, 12], modes=("train",))
    assert found.causal
    assert found.comparisons == 5 + 4
    assert "float32, equal to the last bit" in found.explain()


class Leaky(nnx.Module):
    """A causal sum, and beside it the mean of all tokens."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x.cumsum(1) + 1e-3 * x.mean(1, keepdims=True)


def test_leaks_are_found() -> None:
    features = jnp.asarray(np.random.default_rng(4).normal(size=(1, 6, 3)))
    found = tj.causality(Leaky(), 6, tokens=features, modes=("eval",))
    assert {(leak.kind, leak.token) for leak in found.leaks} == {
        (k, t) for k in ("value", "gradient") for t in range(1, 6)
    }
    with pytest.raises(CausalityError, match="Leaky: The model reads the future: in eval mode"):
        tj.expect_causal(Leaky(), 6, tokens=features, modes=("eval",))
    published = tj.MambaLM(**LM, order="published", rngs=nnx.Rngs(0))
    with pytest.raises(CausalityError, match="MambaLM declares causal = False"):
        tokendyn.expect_causal(published, 9)
    found = tokendyn.causality(published, 9, perturbed=[8], modes=("eval",))
    assert not found.declared
    assert {leak.kind for leak in found.leaks} == {"value", "gradient"}


class Constant(nnx.Module):
    def __init__(self, value: float, ndim: int = 3) -> None:
        self.value, self.ndim = value, ndim

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.full(x.shape[: self.ndim], self.value)


FEATURES = {"tokens": jnp.ones((1, 4, 2))}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda r: tj.MambaLM(**LM, order="hard", order_scope="all", rngs=r), OptionError, "order_scope is 'all'"),
        (lambda r: GroupOrderMamba(4, groups=3, order="hard", rngs=r), OptionError, "a divisor of the 8 channels"),
        (lambda r: GroupOrderMamba(4, groups=2, order=None, rngs=r), OptionError, "order is None"),  # type: ignore[arg-type]
        (lambda r: WindowOrderMamba(4, order="hard", d_conv=None, rngs=r), OptionError, "d_conv is None"),
        (lambda r: ChunkOrderMamba(4, chunk=0, order="hard", rngs=r), OptionError, "chunk is 0"),
        (lambda r: tj.causality(len, 3), DTypeError, "expected a flax.nnx.Module"),  # type: ignore[arg-type]
        (lambda r: tj.causality(Constant(1.0), 4), OptionError, "the model has no embedding"),
        (lambda r: tj.causality(Constant(1.0), 4, **FEATURES), OptionError, "no output changed"),
        (lambda r: tj.causality(Constant(jnp.nan), 4, **FEATURES), NonFiniteError, "NaN or infinite"),
        (lambda r: tj.causality(Constant(1.0, 1), 4, **FEATURES), ShapeError, "the model's output has shape"),
        (lambda r: tj.causality(Constant(1.0), 5, **FEATURES), ShapeError, "with L = 5"),
        (lambda r: tj.causality(Constant(1.0), 4, perturbed=[4], **FEATURES), OptionError, "places from 0 to 3"),
    ],
)
def test_wrong_use_is_told(call: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        call(nnx.Rngs(0))
