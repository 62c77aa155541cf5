"""The cuda engine: the CUDA kernels that PyTorch's engine of this name runs, launched on XLA's buffers.

They do all of a scan (step size, padding, skip, gate) and keep a state every few dozen tokens for the reverse pass.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tokendyn._checks import dtype_name
from tokendyn.backends.cuda._scan_cuda_layout import ARGUMENTS, PLACES
from tokendyn.backends.cuda._scan_cuda_plan import ELEMENTS, SINGLE, TOKEN_RUNS, Plan, divide
from tokendyn.backends.jax.ops import _scan_xla
from tokendyn.backends.jax.ops._cuda_calls import Call, wide
from tokendyn.backends.jax.ops._derivatives import change_of

Arrays = dict[str, jax.Array]

#: What the kernels call arguments of other names.
_FIELDS = {"delta_bias": "bias", "initial_state": "first_state"}


def gpu() -> tuple[int, int]:
    """Multiprocessors and compute capability, the whole number, of the device that JAX takes by default."""
    device = jax.local_devices()[0]
    return device.core_count, int(device.compute_capability.split(".")[0])


def compile_now(kernels: str, options: tuple[str, ...]) -> None:
    from tokendyn.backends.jax.ops import _cuda_kernels

    _cuda_kernels.compile_now(kernels, options)


class _Plan(Plan):
    """A pass over buffers that XLA places: names stand for their addresses until the call is run."""

    def __init__(self, given: Arrays, fixed: Arrays, softplus: bool, backward: bool) -> None:
        u, B = given["u"], given["B"]
        (batch, channels, length), (groups, state) = u.shape, B.shape[1:3]
        layout = divide(given["A"].shape[1] == 1, (batch, channels, length, groups, state), backward, *gpu())
        run = next((run for run in layout.token_runs if length % min(run, 16 // u.dtype.itemsize) == 0), 0)
        self.runs = bool(run)
        gated = backward and "z" in given
        owner = TOKEN_RUNS if self.runs else SINGLE
        options = layout.options(ELEMENTS[dtype_name(u)], gated, "seq_idx" in fixed, owner, (run, run))
        self.call = Call(layout.kernels, [0] * ARGUMENTS)
        self.arguments = self.call.arguments
        super().__init__((batch, channels, length, groups, state), layout, options, gated, softplus, self.runs)
        self.inputs: Arrays = {}
        self.results: dict[str, jax.ShapeDtypeStruct] = {}
        self.zeroed: dict[str, str] = {}
        self.offsets: list[tuple[int, str, int]] = []
        self.like = {_FIELDS.get(name, name): v for name, v in given.items()}
        for name, v in given.items():
            if name in ("u", "delta", "z"):
                self.activation(name, v)
            elif not (backward and name == "initial_state"):
                self.give(_FIELDS.get(name, name), v)
        for name in ("B", "C"):
            strides = (groups * state * length, state * length, length, 1)
            self.set(**{f"{name}_{axis}": s for axis, s in zip("bgnl", strides, strict=True)})
        for name, v in fixed.items():
            self.give(name, wide(v))

    def give(self, name: str, v: jax.Array) -> None:
        self.inputs[name] = v
        self.offsets.append((PLACES[name], name, 0))

    def activation(self, name: str, v: jax.Array | None = None, like: jax.Array | None = None) -> None:
        """An array of tokens: given, or a result."""
        _, channels, length, *_ = self.sizes
        strides = {f"{name}_b": channels * length, f"{name}_d": length, f"{name}_l": 1}
        self.set(**strides, **{f"{name}_runs": int(self.runs)})
        if v is not None:
            self.give(name, v)
        elif like is not None:
            self.result(name, like.shape, like.dtype)

    def result(self, name: str, shape: tuple[int, ...], dtype: Any = jnp.float32) -> None:
        self.results[name] = jax.ShapeDtypeStruct(shape, dtype)
        self.offsets.append((PLACES[name], name, 0))

    def floats(self, name: str, *shape: int) -> None:
        self.result(name, shape)

    def zeros(self, name: str, count: int) -> None:
        self.inputs["zeros"] = jnp.zeros(count, jnp.int32)
        self.result(name, (count,), jnp.int32)
        self.zeroed["zeros"] = name

    def total(self, name: str, place: int) -> bool:
        like, result = self.like[name], f"sum_{name}"
        self.results[result] = jax.ShapeDtypeStruct(like.shape, like.dtype)
        self.offsets.append((place, result, 0))
        return like.dtype != jnp.float32

    def address(self, place: int, name: str, offset: int) -> None:
        self.offsets.append((place, name, 4 * offset))

    def launch(self, name: str, shared: int, blocks: int) -> None:
        self.call.launches.append((name, self.options, self.layout.threads, shared, blocks))

    def run(self) -> Arrays:
        compile_now(self.layout.kernels, self.options)
        numbers = {name: i for i, name in enumerate((*self.inputs, *self.results))}
        self.call.pointers = [(place, numbers[name], offset) for place, name, offset in self.offsets]
        zeroed = {numbers[name]: numbers[result] - len(self.inputs) for name, result in self.zeroed.items()}
        found = self.call(list(self.inputs.values()), list(self.results.values()), zeroed)
        return dict(zip(self.results, found, strict=True))


def _forward(given: Arrays, fixed: Arrays, softplus: bool, keep: bool) -> Arrays:
    plan = _Plan(given, fixed, softplus, backward=False)
    batch, channels, _, _, state = plan.sizes
    plan.activation("y", like=given["u"])
    plan.floats("last_state", batch, channels, state)
    if keep:
        plan.set(keep=1)
        plan.floats("states", batch, plan.layout.chunks, channels, plan.layout.padded)
    plan.outputs()
    return plan.run()


def _backward(given: Arrays, fixed: Arrays, softplus: bool, states: Any, dy: Any, dlast: Any) -> Arrays:
    """The gradients of what is given, by name."""
    plan = _Plan(given, fixed, softplus, backward=True)
    batch, channels, _, _, state = plan.sizes
    plan.give("states", states)
    plan.activation("dy", dy)
    plan.give("last_gradient", dlast)
    for name in ("u", "delta", "z"):
        if name in given:
            plan.activation(f"d{name}", like=given[name])
    if "initial_state" in given:
        plan.floats("dfirst", batch, channels, state)
    plan.gradients(*(name for name in ("D", "bias") if name in plan.like))
    found = plan.run()
    names = {"u": "du", "delta": "ddelta", "z": "dz", "initial_state": "dfirst", "delta_bias": "sum_bias"}
    return {name: found[names.get(name, f"sum_{name}")] for name in given}


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _scan(given: Arrays, fixed: Arrays, softplus: bool, keep: bool) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """y, the last state, and with ``keep`` the states that the reverse pass starts from."""
    found = _forward(given, fixed, softplus, keep)
    return found["y"], found["last_state"], found.get("states")


@_scan.defjvp
def _changes(softplus: bool, keep: bool, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    given, fixed = primals
    *outputs, states = _scan(given, fixed, softplus, True)
    states = jax.lax.stop_gradient(states)  # how a system is solved has no derivative

    def apply(p: Arrays) -> list[jax.Array]:
        def plain(given: Arrays) -> Any:
            return _scan_xla.run(**given, **fixed, delta_softplus=softplus)

        return list(jax.jvp(plain, (given,), (p,))[1])

    def transpose(dy: jax.Array, dlast: jax.Array) -> Arrays:
        return _backward(given, fixed, softplus, states, dy, dlast)

    changes = change_of(outputs, tangents[0], apply, transpose)
    kept = (states, jnp.zeros_like(states)) if keep else (None, None)
    return (*outputs, kept[0]), (*changes, kept[1])


@functools.partial(jax.jit, static_argnames="delta_softplus")
def run(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: jax.Array | None = None,
    seq_idx: jax.Array | None = None,
    lengths: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output and last state; activations of several dtypes are computed in float32."""
    if B.ndim == 3:
        B, C = B[:, None], C[:, None]
    activations = {"u": u, "delta": delta, "z": z, "B": B, "C": C}
    dtypes = {v.dtype for v in activations.values() if v is not None}
    dtype = u.dtype if len(dtypes) == 1 else jnp.float32
    parameters = {"A": A.reshape(len(A), -1), "D": D, "delta_bias": delta_bias, "initial_state": initial_state}
    given = {name: v.astype(dtype) for name, v in activations.items() if v is not None}
    given |= {name: v.astype(jnp.float32) for name, v in parameters.items() if v is not None}
    fixed = {name: v for name, v in (("seq_idx", seq_idx), ("lengths", lengths)) if v is not None}
    y, last, _ = _scan(given, fixed, delta_softplus, False)
    return y.astype(u.dtype), last
