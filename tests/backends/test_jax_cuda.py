"""The cuda engine of JAX: XLA calls the handler as on a GPU, the kernels run on the CPU (``cuda_emulator.py``)."""

from __future__ import annotations

import functools
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokendyn.backends.cuda import _scan_cuda_layout
from tokendyn.backends.cuda._scan_cuda_plan import CLUSTERS_FROM
from tokendyn.backends.jax.ops import _cuda_calls, _scan_cuda, _scan_xla

pytest.importorskip("torch")

from . import cuda_emulator
from .test_jax_pallas import arguments, error, results

if cuda_emulator.COMPILER is None:
    pytest.skip("no C++ compiler to build the kernels for the CPU", allow_module_level=True)
if jax.default_backend() != "cpu":
    pytest.skip("on a GPU the engine itself is tested", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("quick_compilation")

#: The emulated kernels keep a block's threads in static memory, and XLA may run two calls at a time.
_LOCK = threading.Lock()
_cuda_calls.register("cpu")


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*given: Any) -> None:
        with _LOCK:
            cuda_emulator.launch(*given)

    monkeypatch.setattr(_cuda_calls, "launch", launch)
    monkeypatch.setattr(_cuda_calls, "stream_of", lambda frame: 0)
    monkeypatch.setattr(_scan_cuda, "gpu", lambda: (1, CLUSTERS_FROM))
    monkeypatch.setattr(_scan_cuda, "compile_now", lambda *given: None)


CASES: dict[str, tuple[dict[str, Any], float]] = {
    "everything": ({"dtype": jnp.float32}, 1e-6),
    "scalar A, whole runs": ({"scalar": True, "L": 32, "N": 5, "given": False, "dtype": jnp.bfloat16}, 2**-8),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_plain_engine(name: str) -> None:
    sizes, bound = CASES[name]
    made = arguments(**sizes)
    options = {}
    if sizes.get("given", True):
        options = {"seq_idx": jnp.asarray([[0] * 8 + [1] * 13, [3] * 9 + [0] * 12]), "lengths": jnp.asarray([21, 17])}
    errors = jax.tree.leaves(
        jax.tree.map(error, results(_scan_cuda.run, made, **options), results(_scan_xla.run, made, **options))
    )
    assert len(errors) == 2 + len(made)
    assert max(errors) < bound


def test_all_derivatives_of_sequences_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences are cut, clusters of blocks add to one copy in turn; both modes, second derivatives, vmap, remat."""
    monkeypatch.setattr(_scan_cuda_layout, "BLOCKS_A_PROCESSOR", {"general": 1000, "scalar": 1000})
    monkeypatch.setattr(_scan_cuda_layout, "PARTS", 1)
    monkeypatch.setattr(_scan_cuda_layout, "CLUSTERS", (2,))
    made = arguments(d=102, L=72, N=13, groups=1, given=False, dtype=jnp.float32)

    def everything(run: Any) -> Any:
        def loss(made: Any) -> Any:
            y, last = run(**made, delta_softplus=True)
            return jnp.sin(y).sum() + jnp.sin(last).sum()

        direction = jax.tree.map(jnp.cos, made)
        some = jax.grad(jax.checkpoint(lambda C, u: loss(made | {"C": C, "u": u})))
        return {
            "jvp": jax.jvp(loss, (made,), (direction,)),
            "jvp of grad": jax.jvp(jax.grad(loss), (made,), (direction,))[1],
            "vmap of grad": jax.vmap(some, (None, 0))(made["C"], jnp.stack([made["u"], 1.1 * made["u"]])),
        }

    got = jax.jit(functools.partial(everything, _scan_cuda.run))()
    want = jax.jit(functools.partial(everything, _scan_xla.run))()
    assert max(jax.tree.leaves(jax.tree.map(error, got, want))) < 2e-5


def test_activations_of_two_dtypes_are_computed_in_float32() -> None:
    made = arguments(d=3, L=16, N=2, groups=1, given=False, dtype=jnp.float32)
    mixed = made | {"u": made["u"].astype(jnp.bfloat16)}
    got = _scan_cuda.run(**mixed)
    want = _scan_cuda.run(**made | {"u": mixed["u"].astype(jnp.float32)})
    assert got[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(got[0], want[0].astype(jnp.bfloat16))
    np.testing.assert_array_equal(got[1], want[1])
    compiled = _scan_cuda.run._cache_size()  # type: ignore[attr-defined]
    _scan_cuda.run(**{name: 2 * v for name, v in mixed.items()})
    assert _scan_cuda.run._cache_size() == compiled  # type: ignore[attr-defined]


def test_what_goes_wrong_in_the_handler_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*given: Any) -> None:
        raise ValueError("no such kernel")

    monkeypatch.setattr(_cuda_calls, "launch", launch)
    made = arguments(d=3, L=16, N=2, groups=1, given=False, dtype=jnp.float32)
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="INTERNAL: ValueError: no such kernel"):
        jax.block_until_ready(_scan_cuda.run(**made))
