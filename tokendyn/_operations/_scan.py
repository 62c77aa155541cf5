"""The selective scan, its hidden attention, and its single step."""

from __future__ import annotations

from typing import Any

from tokendyn import _checks as check
from tokendyn._operations._table import operation
from tokendyn.errors import OptionError, ShapeError

AGGREGATES = (None, "mean", "mean_abs")


def _check_maps(name: str, shapes: check.Shapes, A: Any, B: Any, C: Any, tokens: str, vectors: dict[str, Any]) -> None:
    """B and C with their axis of ``tokens``, if any, and the parameters of channels: A, and ``vectors`` (d,)."""
    A_pattern = "d 1" if len(A.shape) == 2 and A.shape[1] == 1 else "d N"
    state = -1 - len(tokens.split())
    if len(B.shape) == len(C.shape) >= 2 and B.shape[state:] != C.shape[state:] and len(A.shape) == 2:
        shapes.expect("A", A, "d", A_pattern)  # which of B and C it contradicts is the one to name
    shapes.expect("B", B, f"b N {tokens}", f"b G N {tokens}")
    shapes.expect("C", C, f"b N {tokens}" if len(B.shape) == len(tokens.split()) + 2 else f"b G N {tokens}")
    d, groups = shapes.sizes["d"], shapes.sizes.get("G", 1)
    if d % groups:
        raise ShapeError(f"{name}: B has G = {groups} groups, expected a divisor of d = {d}")
    shapes.expect("A", A, "d", A_pattern)
    for key, vector in vectors.items():
        if vector is not None:
            shapes.expect(key, vector, "d")


def _check_scan(
    name: str,
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    *,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    initial_state: Any = None,
    seq_idx: Any = None,
    lengths: Any = None,
) -> check.Shapes:
    """Shapes and dtypes common to the scan and its hidden attention (which has no u)."""
    shapes = check.Shapes(name)
    if u is not None:
        shapes.expect("u", u, "b d L")
    shapes.expect("delta", delta, "b d L")
    if z is not None:
        shapes.expect("z", z, "b d L")
    _check_maps(name, shapes, A, B, C, "L", {"D": D, "delta_bias": delta_bias})
    if initial_state is not None:
        shapes.expect("initial_state", initial_state, "b d N")
    activation = check.expect_floats(name, {"u": u, "delta": delta, "z": z, "B": B, "C": C})
    check.expect_parameters(
        name, activation, {"A": A, "D": D, "delta_bias": delta_bias, "initial_state": initial_state}
    )
    if seq_idx is not None:
        shapes.expect("seq_idx", seq_idx, "b L")
        check.expect_integers(name, "seq_idx", seq_idx)
    if lengths is not None:
        shapes.expect("lengths", lengths, "b")
        check.expect_integers(name, "lengths", lengths)
        check.expect_lengths(name, lengths, shapes.sizes["L"])
    return shapes


@operation(
    arrays="u delta A B C D z delta_bias initial_state seq_idx lengths",
    differentiable="u delta A B C D z delta_bias initial_state",
    source="paper 1, Eqs. (1)-(3)",
)
def selective_scan(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: bool = False,
    *,
    initial_state: Any = None,
    return_last_state: bool = False,
    seq_idx: Any = None,
    lengths: Any = None,
    engine: str = "auto",
) -> Any:
    """Selective scan: the recurrence of a selective state space layer (S6).

    For every batch entry and channel d, with ``Δ = softplus(delta + delta_bias)`` (softplus only if
    ``delta_softplus``)::

        h_l = exp(Δ_l A_d) ∘ h_{l-1} + Δ_l B_l u_l          h_0 = initial_state or 0
        y_l = ⟨C_l, h_l⟩ + D_d u_l
        y_l = y_l · silu(z_l)                               if z is given

    Zero-order hold for A, Euler for B, as in Mamba. Argument names and layouts are those of mamba-ssm's
    ``selective_scan_fn``. b batch, d channels, L tokens, N state size, G groups.

    Args:
        u: (b, d, L) input. float64, float32, bfloat16 or float16; delta, z, B, C have the same dtype.
        delta: (b, d, L) step size before bias and softplus.
        A: (d, N) real decay rates, negative in a stable layer; or (d,) or (d, 1), the scalar form
            ``A_d I_N``, which some engines run much faster. Parameters (A, D, delta_bias, states) may be
            float32 beside half-precision activations.
        B: (b, N, L), or (b, G, N, L) with channel d in group ``d // (d_total / G)``.
        C: like B.
        D: (d,) skip connection, optional.
        z: (b, d, L) gate, optional.
        delta_bias: (d,) added to delta, optional.
        delta_softplus: apply softplus to the step size.
        initial_state: (b, d, N) state before the first token, optional; only the first packed sequence
            receives it.
        return_last_state: also return the state after the last token.
        seq_idx: (b, L) integers, optional: several sequences packed end to end. The state is reset to 0
            wherever the value differs from the one before it: nothing passes on, not even infinity or NaN.
        lengths: (b,) integers in [0, L], optional: right-padded sequences. Tokens at and past the length
            leave the state as it is and give y = 0; no gradient reaches them.
        engine: ``"auto"`` or the name of one engine of the backend.

    Returns:
        y (b, d, L) in the dtype of u; with ``return_last_state`` the pair (y, last_state), last_state
        (b, d, N) in float32 for half-precision inputs, else in the dtype of u. It is the state of the
        last packed sequence. Both are differentiable.

    Raises:
        ShapeError, DTypeError, OptionError: the arguments contradict each other or the above.

    Cost:
        O(b d L N) operations. Memory beyond inputs and outputs depends on the engine.

    Source:
        Paper 1, Eqs. (1)-(3); Gu and Dao (2023), Algorithm 2.
    """
    _check_scan(
        "selective_scan",
        u,
        delta,
        A,
        B,
        C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        initial_state=initial_state,
        seq_idx=seq_idx,
        lengths=lengths,
    )


@operation(
    arrays="delta A B C delta_bias seq_idx lengths",
    differentiable="delta A B C delta_bias",
    source="paper 1, Eqs. (4)-(6)",
)
def hidden_attention(
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    delta_bias: Any = None,
    delta_softplus: bool = False,
    *,
    seq_idx: Any = None,
    lengths: Any = None,
    channel: int | None = None,
    aggregate: str | None = None,
    rows: tuple[int, int] | None = None,
) -> Any:
    """Hidden attention: the lower-triangular matrices that the selective scan applies to its input.

    ::

        P_{dlj} = Σ_n C_{ln} exp(A_{dn} Σ_{k=j+1..l} Δ_{dk}) B_{jn} Δ_{dj}    for j ≤ l, else 0

    so that ``selective_scan(u, ...)_d = P_d u_d + D_d u_d`` before the gate. The sums of Δ are made of
    positive terms, never as differences of cumulative sums nor as ratios of products, so no precision is
    lost at long range.

    Args:
        delta, A, B, C, delta_bias, delta_softplus, seq_idx, lengths: as in :func:`selective_scan`.
            Attention does not cross packed sequences; rows past a length are 0.
        channel: one channel instead of all.
        aggregate: ``"mean"`` over channels, ``"mean_abs"`` (mean of absolute values), or None. Made
            channel by channel, so (b, d, L, L) never exists.
        rows: (start, stop): only these rows, so that long sequences can be walked in blocks.

    Returns:
        (b, d, R, L), or (b, R, L) if ``channel`` or ``aggregate`` is given; R = L or stop - start.

    Raises:
        ShapeError, DTypeError, OptionError: as in :func:`selective_scan`; ``channel`` and ``aggregate``
            together; rows outside 0 ≤ start < stop ≤ L.

    Cost:
        O(b d R L N) time, O(b d R L) memory (O(b R L) with ``channel`` or ``aggregate``). For looking, not
        for running a layer: beyond L of a few thousand walk it by ``rows``.

    Source:
        Paper 1, Eqs. (4)-(6); Ali, Zimerman and Wolf (2024).
    """
    shapes = _check_scan(
        "hidden_attention", None, delta, A, B, C, delta_bias=delta_bias, seq_idx=seq_idx, lengths=lengths
    )
    check.expect_choice("hidden_attention", "aggregate", aggregate, AGGREGATES)
    if channel is not None and aggregate is not None:
        raise OptionError("hidden_attention: channel and aggregate were both given, expected at most one")
    d, length = shapes.sizes["d"], shapes.sizes["L"]
    if channel is not None and not 0 <= channel < d:
        raise OptionError(f"hidden_attention: channel is {channel}, expected 0 to {d - 1}")
    if rows is not None and not 0 <= rows[0] < rows[1] <= length:
        raise OptionError(f"hidden_attention: rows is {rows}, expected 0 <= start < stop <= L = {length}")


@operation(
    arrays="state x dt A B C D z dt_bias",
    differentiable="state x dt A B C D z dt_bias",
    source="paper 1, Eqs. (1)-(3)",
)
def selective_state_update(
    state: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    dt_bias: Any = None,
    dt_softplus: bool = False,
    *,
    engine: str = "auto",
) -> Any:
    """One step of :func:`selective_scan`, for decoding token by token at a cost that does not grow.

    With ``Δ = softplus(dt + dt_bias)`` (softplus only if ``dt_softplus``)::

        h' = exp(Δ A_d) ∘ h + Δ B x
        y  = ⟨C, h'⟩ + D_d x
        y  = y · silu(z)                                    if z is given

    Argument names and layouts are those of mamba-ssm's ``selective_state_update``, which however overwrites
    ``state`` and returns y alone. This is a function: ``state`` is left as it is and the new one returned.

    Args:
        state: (b, d, N), the state before the token, in the dtype of x or in float32 beside half precision,
            which loses nothing from token to token.
        x: (b, d) one token. float64, float32, bfloat16 or float16; dt, z, B, C have the same dtype.
        dt: (b, d) step size before bias and softplus.
        A: (d, N) real decay rates, or (d,) or (d, 1), the scalar form. Parameters (A, D, dt_bias) may be float32
            beside half-precision activations.
        B: (b, N), or (b, G, N) with channel d in group ``d // (d_total / G)``.
        C: like B.
        D: (d,) skip connection, optional.
        z: (b, d) gate, optional.
        dt_bias: (d,) added to dt, optional.
        dt_softplus: apply softplus to the step size.
        engine: ``"auto"`` or the name of one engine of the backend.

    Returns:
        (y, new_state): y (b, d) in the dtype of x, new_state (b, d, N) in that of ``state``.

    Raises:
        ShapeError, DTypeError, OptionError: an argument has the wrong shape, the wrong dtype, or a value out of range.
        EngineError: the engine named cannot take the call.

    Cost:
        O(b d N) time, whatever came before; the state is read and written once.

    Source:
        Paper 1, Eqs. (1)-(3).
    """
    name = "selective_state_update"
    shapes = check.Shapes(name)
    shapes.expect("state", state, "b d N")
    for key, array in (("x", x), ("dt", dt), ("z", z)):
        if array is not None:
            shapes.expect(key, array, "b d")
    _check_maps(name, shapes, A, B, C, "", {"D": D, "dt_bias": dt_bias})
    activation = check.expect_floats(name, {"x": x, "dt": dt, "z": z, "B": B, "C": C})
    check.expect_parameters(name, activation, {"A": A, "D": D, "dt_bias": dt_bias, "state": state})
