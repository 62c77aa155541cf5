"""Selective scan: the recurrence (1)-(3) of paper 1, one token after another, and its reverse pass.

Arguments and results are those of :func:`tokendyn.selective_scan`; everything is computed in float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tokendyn.core._activations import sigmoid, silu, silu_derivative, softplus


class Scan(NamedTuple):
    """The arguments of a scan, written out: every default filled in, every group and scalar spread.

    Attributes:
        u: (b, d, L) input.
        raw: (b, d, L) step size before softplus.
        step: (b, d, L) step size Δ (3).
        A: (d, N).
        B, C: (b, G, N, L); channel d reads group ``group[d]``.
        group: (d,) integers.
        D: (d,) or None.
        z: (b, d, L) or None.
        initial_state: (b, d, N).
        starts: (b, L) booleans: the state is reset to 0 before this token.
        lengths: (b,) integers: tokens from here on are padding.
    """

    u: Any
    raw: Any
    step: Any
    A: Any
    B: Any
    C: Any
    group: Any
    D: Any
    z: Any
    initial_state: Any
    starts: Any
    lengths: Any


def spread(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    delta_bias: Any,
    delta_softplus: bool,
    initial_state: Any,
    seq_idx: Any,
    lengths: Any,
) -> Scan:
    """Fill in the defaults of a scan's arguments; see :class:`Scan`."""
    raw = np.array(delta, np.float64)
    batch, d, length = raw.shape
    if delta_bias is not None:
        raw += np.asarray(delta_bias, np.float64)[:, None]
    B, C = (np.asarray(v, np.float64) for v in (B, C))
    if B.ndim == 3:
        B, C = B[:, None], C[:, None]
    groups, state = B.shape[1:3]
    A = np.asarray(A, np.float64)
    return Scan(
        u=np.zeros_like(raw) if u is None else np.asarray(u, np.float64),
        raw=raw,
        step=softplus(raw) if delta_softplus else raw,
        A=np.broadcast_to(A if A.ndim == 2 else A[:, None], (d, state)),
        B=B,
        C=C,
        group=np.arange(d) // (d // groups),
        D=None if D is None else np.asarray(D, np.float64),
        z=None if z is None else np.asarray(z, np.float64),
        initial_state=(np.zeros((batch, d, state)) if initial_state is None else np.asarray(initial_state, np.float64)),
        starts=sequence_starts(seq_idx, batch, length),
        lengths=np.full(batch, length) if lengths is None else np.asarray(lengths).astype(np.int64),
    )


def sequence_starts(seq_idx: Any, batch: int, length: int) -> np.ndarray:
    """(b, L) booleans: a packed sequence begins at this token, and the state before it is not its own."""
    starts = np.zeros((batch, length), bool)
    if seq_idx is not None:
        starts[:, 1:] = np.asarray(seq_idx)[:, 1:] != np.asarray(seq_idx)[:, :-1]
    return starts


@np.errstate(over="ignore", invalid="ignore")  # infinities and NaN travel on, as in any engine
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
) -> Any:
    """Spec of :func:`tokendyn.selective_scan`. Paper 1, (1)-(3)."""
    s = spread(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx, lengths)
    y = np.zeros_like(s.u)
    last_state = np.empty_like(s.initial_state)
    for b, d in np.ndindex(s.u.shape[:2]):
        g = s.group[d]
        h = s.initial_state[b, d].copy()
        for l in range(s.lengths[b]):
            if s.starts[b, l]:
                h = np.zeros_like(h)
            step = s.step[b, d, l]
            h = np.exp(step * s.A[d]) * h + step * s.B[b, g, :, l] * s.u[b, d, l]  # (1), (2)
            y[b, d, l] = s.C[b, g, :, l] @ h  # (1)
            if s.D is not None:
                y[b, d, l] += s.D[d] * s.u[b, d, l]
            if s.z is not None:
                y[b, d, l] *= silu(s.z[b, d, l])
        last_state[b, d] = h
    return (y, last_state) if return_last_state else y


@np.errstate(over="ignore", invalid="ignore")
def selective_scan_vjp(
    dout: Any,
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
) -> dict[str, np.ndarray]:
    """Gradients of ``⟨dout, selective_scan(...)⟩`` by argument name.

    With G_l the gradient that reaches h_l (from y_l and from h_{l+1}), ȳ_l that of y_l before the gate, and
    ā_l = exp(Δ_l A_d)::

        G_l = ȳ_l C_l + ā_{l+1} ∘ G_{l+1}
        dC_l = Σ_d ȳ_l h_l            dB_l = Σ_d Δ_l u_l G_l
        dΔ_l = ⟨G_l, A_d ∘ ā_l ∘ h_{l-1} + u_l B_l⟩
        dA_d = Σ_l Δ_l ā_l ∘ h_{l-1} ∘ G_l
        du_l = Δ_l ⟨G_l, B_l⟩ + D_d ȳ_l

    Args:
        dout: gradient of the output, or the pair (of y, of the last state) with ``return_last_state``;
            either of the pair may be None.
    """
    dy, dlast_state = dout if return_last_state else (dout, None)
    s = spread(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx, lengths)
    dy = np.zeros_like(s.u) if dy is None else np.asarray(dy, np.float64)
    du, draw, dz = np.zeros_like(s.u), np.zeros_like(s.u), np.zeros_like(s.u)
    dA, dB, dC, dD = np.zeros(s.A.shape), np.zeros_like(s.B), np.zeros_like(s.C), np.zeros(len(s.A))
    dinitial = np.zeros_like(s.initial_state)
    for b, d in np.ndindex(s.u.shape[:2]):
        g = s.group[d]
        before, after = _states(s, b, d)
        G = np.zeros(s.A.shape[1]) if dlast_state is None else np.array(dlast_state[b, d], np.float64)
        for l in reversed(range(s.lengths[b])):
            step, x = s.step[b, d, l], s.u[b, d, l]
            B_l, C_l = s.B[b, g, :, l], s.C[b, g, :, l]
            decay = np.exp(step * s.A[d])
            dout_l = dy[b, d, l]
            if s.z is not None:
                ungated = C_l @ after[l] + (0.0 if s.D is None else s.D[d] * x)
                dz[b, d, l] = dout_l * ungated * silu_derivative(s.z[b, d, l])
                dout_l = dout_l * silu(s.z[b, d, l])
            G = dout_l * C_l + G
            dC[b, g, :, l] += dout_l * after[l]
            dB[b, g, :, l] += step * x * G
            draw[b, d, l] = G @ (s.A[d] * decay * before[l] + x * B_l)
            dA[d] += step * decay * before[l] * G
            du[b, d, l] = step * (G @ B_l)
            if s.D is not None:
                du[b, d, l] += s.D[d] * dout_l
                dD[d] += dout_l * x
            G = np.zeros_like(G) if s.starts[b, l] else decay * G
        dinitial[b, d] = G
    if delta_softplus:
        draw = through_softplus(s, draw)
    gradients = {
        "u": du,
        "delta": draw,
        "A": like_decay(dA, A),
        "B": dB.reshape(np.shape(B)),
        "C": dC.reshape(np.shape(C)),
    }
    if D is not None:
        gradients["D"] = dD
    if z is not None:
        gradients["z"] = dz
    if delta_bias is not None:
        gradients["delta_bias"] = draw.sum(axis=(0, 2))
    if initial_state is not None:
        gradients["initial_state"] = dinitial
    return gradients


def through_softplus(s: Scan, dstep: np.ndarray) -> np.ndarray:
    """The gradient of the raw step sizes from that of the steps; padding, which may hold anything, keeps its 0."""
    draw = np.zeros_like(dstep)
    for b, length in enumerate(s.lengths):
        draw[b, :, :length] = dstep[b, :, :length] * sigmoid(s.raw[b, :, :length])
    return draw


def like_decay(dA: Any, A: Any) -> np.ndarray:
    """The gradient (d, N) of A in the shape in which A was given: a scalar A collects its row."""
    shape = np.shape(A)
    if len(shape) == 2 and shape[1] == dA.shape[1]:
        return dA
    return dA.sum(axis=1).reshape(shape)


def _states(s: Scan, b: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """The states (L, N) before (after a reset) and after every token of one channel."""
    before, after = (np.zeros((s.u.shape[2], s.A.shape[1])) for _ in range(2))
    h = s.initial_state[b, d]
    for l in range(s.lengths[b]):
        before[l] = 0.0 if s.starts[b, l] else h
        step = s.step[b, d, l]
        h = np.exp(step * s.A[d]) * before[l] + step * s.B[b, s.group[d], :, l] * s.u[b, d, l]
        after[l] = h
    return before, after
