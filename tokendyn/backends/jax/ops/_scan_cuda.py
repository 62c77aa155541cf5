"""The cuda engine: the CUDA kernels that PyTorch's engine of this name runs, launched on XLA's buffers.

They do all of a scan (step size, padding, skip, gate) and keep a state every few dozen tokens for the reverse pass.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tokendyn._checks import dtype_name
from tokendyn.backends.cuda import _scan_cuda_layout
from tokendyn.backends.cuda._scan_cuda_layout import ARGUMENTS, PLACES, SUM, SUMS_FROM
from tokendyn.backends.jax.ops import _scan_xla
from tokendyn.backends.jax.ops._cuda_calls import Call, wide
from tokendyn.backends.jax.ops._derivatives import change_of

Arrays = dict[str, jax.Array]

_ELEMENTS = {"float32": 0, "bfloat16": 1, "float16": 2}
_TOKEN_RUNS, _SINGLE = 0, 1


def processors() -> int:
    """Multiprocessors of the device that JAX takes by default."""
    return jax.local_devices()[0].core_count


def compile_now(kernels: str, options: tuple[str, ...]) -> None:
    from tokendyn.backends.jax.ops import _cuda_kernels

    _cuda_kernels.compile_now(kernels, options)


class _Plan:
    """The launches of one pass: sizes, buffers by name, and the kernels' arguments."""

    def __init__(self, given: Arrays, fixed: Arrays, softplus: bool, backward: bool) -> None:
        u, A, B = given["u"], given["A"], given["B"]
        (batch, channels, length), (groups, state) = u.shape, B.shape[1:3]
        self.sizes = batch, channels, length, groups, state
        self.scalar_A = A.shape[1] == 1
        fill = _scan_cuda_layout.BLOCKS_A_PROCESSOR["scalar" if self.scalar_A else "general"]
        self.layout = layout = _scan_cuda_layout.layout(
            self.scalar_A, batch, groups, channels // groups, length, state, processors(), fill
        )
        self.blocks = batch * groups * layout.tiles * layout.segments
        self.gated = backward and "z" in given
        in_word = min(layout.token_run, 16 // u.dtype.itemsize)
        self.runs = int(length % in_word == 0)
        owner = _TOKEN_RUNS if self.runs else _SINGLE
        element = _ELEMENTS[dtype_name(u)]
        self.options = layout.options(element, self.gated, "seq_idx" in fixed, owner)
        self.call = Call(layout.kernels, [0] * ARGUMENTS)
        self.set(
            batch=batch, channels=channels, length=length, groups=groups, group_size=channels // groups, state=state,
            block_rows=layout.block_rows, tiles=layout.tiles, segments=layout.segments,
            segment_tokens=layout.segment_tokens, chunks=layout.chunks, parts=layout.parts, chain=layout.chain,
            softplus=int(softplus), matrix_runs=self.runs,
        )  # fmt: skip
        self.inputs: Arrays = {}
        self.results: dict[str, jax.ShapeDtypeStruct] = {}
        self.zeroed: dict[str, str] = {}
        self.offsets: list[tuple[int, str, int]] = []
        names = {"delta_bias": "bias", "initial_state": "first_state"}
        for name, v in given.items():
            if name in ("u", "delta", "z"):
                self.activation(name, v)
            elif not (backward and name == "initial_state"):
                self.give(names.get(name, name), v)
        for name in ("B", "C"):
            strides = (groups * state * length, state * length, length, 1)
            self.set(**{f"{name}_{axis}": s for axis, s in zip("bgnl", strides, strict=True)})
        for name, v in fixed.items():
            self.give(name, wide(v))

    def set(self, **values: int) -> None:
        for name, value in values.items():
            self.call.arguments[PLACES[name]] = value

    def give(self, name: str, v: jax.Array) -> None:
        self.inputs[name] = v
        self.offsets.append((PLACES[name], name, 0))

    def activation(self, name: str, v: jax.Array | None = None, like: jax.Array | None = None) -> None:
        """An array of tokens: given, or a result."""
        _, channels, length, *_ = self.sizes
        self.set(**{f"{name}_b": channels * length, f"{name}_d": length, f"{name}_l": 1, f"{name}_runs": self.runs})
        if v is not None:
            self.give(name, v)
        elif like is not None:
            self.result(name, like.shape, like.dtype)

    def result(self, name: str, shape: tuple[int, ...], dtype: Any = jnp.float32) -> None:
        self.results[name] = jax.ShapeDtypeStruct(shape, dtype)
        if name in PLACES:
            self.offsets.append((PLACES[name], name, 0))

    def segment_buffers(self) -> None:
        batch, channels = self.sizes[:2]
        for name, more in (("ends", 0), ("decays", 0), ("slots", 1)):
            self.result(name, (batch, self.layout.segments + more, channels, self.layout.padded))

    def launch(self, name: str, blocks: int | None = None, **changes: int) -> None:
        small, large = self.layout.shared_bytes(self.gated)
        shared = large if name == "gradients" else 0 if name in ("join_segments", "add_parts") else small
        places = [(PLACES[field], value) for field, value in changes.items()]
        blocks = self.blocks if blocks is None else blocks
        self.call.launches.append((name, self.options, self.layout.threads, shared, blocks, places))

    def join(self, backward: bool) -> None:
        batch, channels = self.sizes[:2]
        blocks = -(-batch * channels * self.layout.padded // self.layout.threads)
        self.launch("join_segments", blocks, backwards=int(backward))

    def sum(self, *wanted: tuple[str, int, str, jax.Array | None, tuple[int, ...]]) -> None:
        """Sums in one launch: of blocks' floats from an offset on, its name, like what, (outer, parts, inner, ...)."""
        place, blocks = SUMS_FROM, 0
        for source, offset, name, like, numbers in wanted:
            if like is None:
                continue
            self.result(f"sum_{name}", like.shape, like.dtype)
            self.offsets += [(place, source, 4 * offset), (place + 1, f"sum_{name}", 0)]
            self.call.arguments[place + 2 : place + len(SUM)] = [*numbers, int(like.dtype != jnp.float32)]
            outer, parts, inner = numbers[:3]
            place += len(SUM)
            blocks += _scan_cuda_layout.sum_blocks(outer, parts, inner, self.layout.threads)
        self.launch("add_parts", blocks)

    def run(self) -> Arrays:
        compile_now(self.layout.kernels, self.options)
        numbers = {name: i for i, name in enumerate((*self.inputs, *self.results))}
        self.call.pointers = [(place, numbers[name], offset) for place, name, offset in self.offsets]
        zeroed = {}
        for name in self.zeroed:
            zeroed[numbers[name]] = numbers[self.zeroed[name]] - len(self.inputs)
        found = self.call(list(self.inputs.values()), list(self.results.values()), zeroed)
        return dict(zip(self.results, found, strict=True))


def _forward(given: Arrays, fixed: Arrays, softplus: bool, keep: bool) -> Arrays:
    plan = _Plan(given, fixed, softplus, backward=False)
    batch, channels, _, _, state = plan.sizes
    plan.activation("y", like=given["u"])
    plan.result("last_state", (batch, channels, state))
    if keep:
        plan.set(keep=1)
        plan.result("states", (batch, plan.layout.chunks, channels, plan.layout.padded))
    if plan.layout.segments > 1:
        plan.segment_buffers()
        plan.launch("segment_ends")
        plan.join(backward=False)
    plan.launch("outputs")
    return plan.run()


def _backward(given: Arrays, fixed: Arrays, softplus: bool, states: Any, dy: Any, dlast: Any) -> Arrays:
    """The gradients of what is given, by name."""
    plan = _Plan(given, fixed, softplus, backward=True)
    batch, channels, length, groups, state = plan.sizes
    layout, A, B = plan.layout, given["A"], given["B"]
    plan.give("states", states)
    plan.activation("dy", dy)
    plan.give("last_gradient", dlast)
    for name in ("u", "delta", "z"):
        if name in given:
            plan.activation(f"d{name}", like=given[name])
    if "initial_state" in given:
        plan.result("dfirst", (batch, channels, state))
    if layout.segments > 1:
        plan.segment_buffers()
        plan.launch("segment_coends")
        plan.join(backward=True)
    copies, rates = batch * layout.segments, 1 if plan.scalar_A else state
    plan.result("dA", (copies, channels, rates))
    for name, field in (("D", "dD"), ("delta_bias", "dbias")):
        if name in given:
            plan.result(field, (copies, channels))
    columns = layout.padded if plan.scalar_A else 0  # parts are (L, columns) there, (N, L) else
    plan.result("parts_out", (batch, groups, layout.parts, 2, columns or state, length))
    if layout.chain > 1:
        flags = jnp.zeros(layout.counters(batch * groups), jnp.int32)
        plan.inputs["flags"] = flags
        plan.result("counters", flags.shape, flags.dtype)
        plan.zeroed["flags"] = "counters"
    plan.launch("gradients")
    per_matrix = (columns or state) * length
    matrix = (batch * groups, layout.parts, per_matrix, 2 * per_matrix, columns)
    plan.sum(
        ("dA", 0, "A", A, (1, copies, channels * rates, channels * rates, 0)),
        ("parts_out", 0, "B", B, matrix),
        ("parts_out", per_matrix, "C", given["C"], matrix),
        ("dD", 0, "D", given.get("D"), (1, copies, channels, channels, 0)),
        ("dbias", 0, "delta_bias", given.get("delta_bias"), (1, copies, channels, channels, 0)),
    )
    found = plan.run()
    names = {"u": "du", "delta": "ddelta", "z": "dz", "initial_state": "dfirst"}
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
