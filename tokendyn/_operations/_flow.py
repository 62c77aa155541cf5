"""Right-hand sides of the token dynamics: depth as time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokendyn import _checks as check
from tokendyn._operations._table import operation
from tokendyn.errors import OptionError, ShapeError

ATTENTION_KINDS = ("softmax", "linear")


def _check_flow(name: str, x: Any, one_channel: bool, parameters: Mapping[str, tuple[Any, tuple[str, ...]]]) -> None:
    """Tokens x, (L,) or (b, L) in one channel, (L, D) or (b, L, D) in several, and their parameters.

    ``parameters`` gives a value and the shape patterns allowed for it; "" is a scalar.
    """
    shapes = check.Shapes(name)
    shapes.expect("x", x, *(("L", "b L") if one_channel else ("L D", "b L D")))
    arrays = {"x": x}
    for key, (value, patterns) in parameters.items():
        if isinstance(value, (int, float)):
            check.expect_number(name, key, value)
            if "" not in patterns:
                wanted = " or ".join(f"({pattern.replace(' ', ', ')})" for pattern in patterns)
                raise ShapeError(f"{name}: {key} is {value!r}, expected an array of shape {wanted}")
        elif value is not None:
            shapes.expect(key, value, *patterns)
            arrays[key] = value
    check.expect_floats(name, arrays, check.WIDE_FLOATS)


def _channel_parameters(
    name: str, M: Any, S_B: Any, S_C: Any, s_delta: Any, a: Any, bias: Any
) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """The parameters of D channels for :func:`_check_flow`; exactly one form of M must be given."""
    if (M is None) == (S_B is None and S_C is None) or (S_B is None) != (S_C is None):
        given = ", ".join(key for key, value in (("M", M), ("S_B", S_B), ("S_C", S_C)) if value is not None)
        raise OptionError(f"{name}: {given or 'no input-output matrix'} was given, expected M, or both S_B and S_C")
    shared = not isinstance(s_delta, (int, float)) and len(s_delta.shape) == 1
    return {
        "M": (M, ("D D",)),
        "S_B": (S_B, ("N D",)),
        "S_C": (S_C, ("N D",)),
        "s_delta": (s_delta, ("D", "D D")),
        "a": (a, ("", "D") if M is not None else ("", "D", "D N")),
        "bias": (bias, ("",) if shared else ("", "D")),
    }


@operation(
    arrays="x s_delta a mu M S_B S_C bias",
    differentiable="x s_delta a mu M S_B S_C bias",
    numbers="s_delta a mu bias",
    source="paper 1, Eqs. (7)-(12)",
)
def flow_rhs(
    x: Any,
    *,
    s_delta: Any,
    a: Any,
    mu: Any = None,
    M: Any = None,
    S_B: Any = None,
    S_C: Any = None,
    bias: Any = None,
) -> Any:
    """Right-hand side of the token dynamics, depth as time: every token moves by its hidden attention.

    ::

        dx_{dl}/dt = Σ_{j≤l} P_{dlj} x_{dj}
        P_{dlj} = (x_lᵀ M x_j) Δ_d(x_j) exp(-a_d Σ_{k=j+1..l} Δ_d(x_k)),    Δ_d(u) = softplus(S_{Δ,d} u + bias_d)

    computed as one selective scan of x with Δ(x), B = S_B x, C = S_C x, never through P. With ``mu`` tokens
    are real numbers (one channel): ``dx_l/dt = μ x_l w_l``, ``w_l = exp(-a Δ_l) w_{l-1} + x_l² Δ_l``.

    It may be handed to an ODE solver as it stands, and differentiated there::

        solve_ivp(lambda t, x: tokendyn.flow_rhs(x, mu=-1.5, s_delta=-0.4, a=1.0), (0, 10), x0)

    Args:
        x: (L,) or (b, L) in one channel, (L, D) or (b, L, D) in D channels. float32 or float64; every array
            below has the same dtype.
        s_delta: one channel: number or (b,). D channels: (D, D), row d is S_{Δ,d}; or (D,), one Δ shared by
            all channels.
        a: decay rate, A = -a. One channel: number or (b,). D channels: number, (D,), or with S_B and S_C also
            (D, N), the general form, where exp(-a_{dn} Σ Δ) acts on the n-th place of the state.
        mu: one channel: number or (b,). Exactly one of ``mu``, ``M``, (``S_B``, ``S_C``) is given.
        M: (D, D) input-output matrix.
        S_B, S_C: (N, D) each, M = S_Cᵀ S_B.
        bias: number, or (b,) in one channel, or (D,) with Δ per channel; 0 by default.

    Returns:
        dx/dt in the shape and dtype of x.

    Raises:
        ShapeError, DTypeError, OptionError: an argument has the wrong shape, the wrong dtype, or a value out of range.

    Cost:
        O(b L) in one channel, O(b L D N) in D channels (N = D with M, and D² more for each of S_Δ, S_B, S_C).

    Source:
        Paper 1, Eqs. (7)-(12).
    """
    if mu is None:
        parameters = _channel_parameters("flow_rhs", M, S_B, S_C, s_delta, a, bias)
    else:
        extra = ", ".join(key for key, value in (("M", M), ("S_B", S_B), ("S_C", S_C)) if value is not None)
        if extra:
            raise OptionError(f"flow_rhs: mu and {extra} were given, expected mu (one channel) or a matrix, not both")
        scalar = ("", "b") if len(x.shape) == 2 else ("",)
        parameters = {
            key: (value, scalar) for key, value in {"mu": mu, "s_delta": s_delta, "a": a, "bias": bias}.items()
        }
    _check_flow("flow_rhs", x, mu is not None, parameters)


@operation(
    arrays="x s_delta a M S_B S_C bias W",
    differentiable="x s_delta a M S_B S_C bias W",
    numbers="a bias",
    source="Token Dynamics on Spheres in Mamba Models; arXiv 2609.17997, Eq. (5)",
)
def sphere_flow(
    x: Any,
    *,
    s_delta: Any,
    a: Any,
    M: Any = None,
    S_B: Any = None,
    S_C: Any = None,
    bias: Any = None,
    W: Any = None,
) -> Any:
    """Right-hand side of the token dynamics on the unit sphere: :func:`flow_rhs`, projected.

    ::

        dx_l/dt = (I - x_l x_lᵀ) Σ_{j≤l} (x_lᵀ M x_j) D_{lj} W x_j
        D_{lj} = diag_d( Δ_d(x_j) exp(-a_d Σ_{k=j+1..l} Δ_d(x_k)) )

    With ``s_delta`` (D,) and one a, Δ is shared by all channels; with (D, D) each channel has its own, as in a
    selective SSM. W is a value matrix, the identity by default. ``|x_l| = 1`` is preserved, not enforced.

    Args:
        x: (L, D) or (b, L, D) tokens of unit norm, float32 or float64.
        s_delta, a, M, S_B, S_C, bias: as in :func:`flow_rhs`, D channels.
        W: (D, D), optional.

    Returns:
        dx/dt in the shape and dtype of x.

    Raises:
        ShapeError, DTypeError, OptionError: an argument has the wrong shape, the wrong dtype, or a value out of range.

    Cost:
        As :func:`flow_rhs`.
    """
    parameters = _channel_parameters("sphere_flow", M, S_B, S_C, s_delta, a, bias)
    _check_flow("sphere_flow", x, False, {**parameters, "W": (W, ("D D",))})


@operation(
    arrays="x Q K V",
    differentiable="x Q K V",
    source="Geshkovski, Letrouit, Polyanskiy, Rigollet, arXiv 2312.10794; paper 1, Remark 4",
)
def attention_flow(
    x: Any, *, Q: Any, K: Any, V: Any = None, kind: str = "softmax", causal: bool = True, sphere: bool = False
) -> Any:
    """Right-hand side of the token dynamics of self-attention, the control beside :func:`flow_rhs`.

    ::

        dx_l/dt = Σ_j w_{lj} V x_j,    w_{lj} = softmax_j(⟨Q x_l, K x_j⟩)  or  ⟨Q x_l, K x_j⟩

    the sum over j ≤ l, or over all j without ``causal``; with ``sphere`` projected by ``I - x_l x_lᵀ``.

    Args:
        x: (L, D) or (b, L, D), float32 or float64; every array below has the same dtype.
        Q, K: (N, D); an inverse temperature is a factor of Q.
        V: (D, D), the identity by default.
        kind: ``"softmax"`` or ``"linear"``.
        causal: attend to j ≤ l only.
        sphere: project on the tangent space of the unit sphere.

    Returns:
        dx/dt in the shape and dtype of x.

    Raises:
        ShapeError, DTypeError, OptionError: an argument has the wrong shape, the wrong dtype, or a value out of range.

    Cost:
        softmax: O(b L² (D + N)) time, in blocks of rows, so that L x L weights are never held at once.
        linear: O(b L D N), one scan.
    """
    check.expect_choice("attention_flow", "kind", kind, ATTENTION_KINDS)
    _check_flow("attention_flow", x, False, {"Q": (Q, ("N D",)), "K": (K, ("N D",)), "V": (V, ("D D",))})


@operation(
    arrays="x phi",
    differentiable="x phi",
    source="Token Dynamics on Spheres in Mamba Models, autoregressive sequence models",
)
def autoregressive_flow(x: Any, *, phi: Any, sphere: bool = True) -> Any:
    """Right-hand side of the token dynamics of an AR(p) model: ``dx_l/dt = Σ_{k=1..p} φ_k x_{l-k}``.

    Tokens before the first are 0; with ``sphere`` projected by ``I - x_l x_lᵀ``.

    Args:
        x: (L, D) or (b, L, D), float32 or float64.
        phi: (p,) coefficients φ_1, …, φ_p, in the dtype of x.
        sphere: project on the tangent space of the unit sphere.

    Returns:
        dx/dt in the shape and dtype of x.

    Raises:
        ShapeError, DTypeError: an argument has the wrong shape, or the wrong dtype.

    Cost:
        O(b L D p).
    """
    _check_flow("autoregressive_flow", x, False, {"phi": (phi, ("p",))})
