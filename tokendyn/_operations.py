"""The one table of operations.

Each function below is an operation: its signature and docstring are the public contract, its body checks
the arguments, and the decorator enters it into :data:`OPERATIONS` and sends the call to the backend that
owns the arrays. Dispatch, the equivalence tests, the support matrix in the docs and the benchmarks all
read this table. To add an operation: write it here, its spec and VJP in ``core``, and a function of the
same name in each ``backends/<name>/ops``; the equivalence tests then find it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

from tokendyn import _checks as check
from tokendyn._dispatch import backend_of, implementation
from tokendyn.errors import OptionError, RegimeError, ShapeError

if TYPE_CHECKING:
    from tokendyn._order import Order

P = ParamSpec("P")
R = TypeVar("R")

ALL_BACKENDS = ("numpy", "torch", "jax")

IO_REGIMES = ("free", "positive", "negative", "mixed")
IO_FORMS = ("paper", "published_code", "scale_matched")
ORDER_METHODS = ("softsort", "hard", "straight_through")
AGGREGATES = (None, "mean", "mean_abs")


@dataclass(frozen=True)
class Operation:
    """One row of the table.

    Attributes:
        name: the public name.
        arrays: the array arguments, in order; dispatch looks at these.
        differentiable: those of ``arrays`` with respect to which there is a gradient.
        backends: the backends that implement it.
        numbers: those of ``arrays`` that may also be Python numbers, on which dispatch then does not look.
        source: where its formula stands.
        function: the public function.
    """

    name: str
    arrays: tuple[str, ...]
    differentiable: tuple[str, ...]
    backends: tuple[str, ...]
    numbers: tuple[str, ...]
    source: str
    function: Callable[..., Any]


OPERATIONS: dict[str, Operation] = {}


def operation(
    *,
    arrays: str,
    differentiable: str,
    source: str,
    backends: tuple[str, ...] = ALL_BACKENDS,
    numbers: str = "",
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Enter the decorated function into :data:`OPERATIONS`; its body becomes the check before the call."""
    array_names = tuple(arrays.split())
    differentiable_names = tuple(differentiable.split())
    number_names = tuple(numbers.split())
    assert set(differentiable_names) <= set(array_names)
    assert set(number_names) <= set(array_names)

    def decorate(checks: Callable[P, R]) -> Callable[P, R]:
        name = checks.__name__
        signature = inspect.signature(checks)
        parameters = signature.parameters.values()
        positional = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        every = frozenset(signature.parameters)
        required = frozenset(p.name for p in parameters if p.default is p.empty)

        def call(fixed: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if len(args) > len(positional):
                signature.bind(*args, **kwargs)  # raises the TypeError that Python would
            named = dict(zip(positional, args, strict=False))
            if any(key in named for key in kwargs) or not every.issuperset(kwargs):
                signature.bind(*args, **kwargs)
            named.update(kwargs)
            if not required.issubset(named):
                signature.bind(*args, **kwargs)
            given = {key: named.get(key) for key in array_names}
            for key in number_names:
                if isinstance(given[key], (int, float)):
                    del given[key]
            chosen = backend_of(name, given, fixed)
            checks(**named)  # type: ignore[call-arg]
            return implementation(name, backends, chosen)(**named)

        @functools.wraps(checks)
        def public(*args: P.args, **kwargs: P.kwargs) -> R:
            return call(None, args, kwargs)

        def on_backend(fixed: str) -> Callable[P, R]:
            def bound(*args: P.args, **kwargs: P.kwargs) -> R:
                return call(fixed, args, kwargs)

            return bound

        public.on_backend = on_backend  # type: ignore[attr-defined]
        OPERATIONS[name] = Operation(name, array_names, differentiable_names, backends, number_names, source, public)
        return public

    return decorate


class IOSpectrum(NamedTuple):
    """Spectrum of the input-output matrix ``M = S_Cᵀ S_B``; see :func:`io_spectrum`.

    Attributes:
        eigenvalues: (min(N, D),) complex; those of M that are not zero by rank alone, by descending real
            part, of a conjugate pair the one with positive imaginary part first.
        symmetric: (min(2N, D),) real, descending; those of (M + Mᵀ)/2 that are not zero by rank alone.
    """

    eigenvalues: Any
    symmetric: Any


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
    shapes.expect("B", B, "b N L", "b G N L")
    shapes.expect("C", C, "b N L" if len(B.shape) == 3 else "b G N L")
    d, groups = shapes.sizes["d"], shapes.sizes.get("G", 1)
    if d % groups:
        raise ShapeError(f"{name}: B has G = {groups} groups, expected a divisor of d = {d}")
    shapes.expect("A", A, "d", "d 1" if len(A.shape) == 2 and A.shape[1] == 1 else "d N")
    for key, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None:
            shapes.expect(key, vector, "d")
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
            wherever the value differs from the one before it.
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


@operation(arrays="x s_delta k", differentiable="x s_delta k", source="paper 1, Eq. (14)")
def importance_score(x: Any, s_delta: Any, k: Any) -> Any:
    """Importance score of every token: ``s_l = (S_Δ x_l)ᵀ K``.

    Computed as ``⟨S_Δᵀ K, x_l⟩``: one vector, then one product, whatever the rank of S_Δ. A bias of Δ is
    left out, since it moves all scores alike and cannot change the order.

    Args:
        x: (b, L, Q) tokens, channels last. For a low-rank S_Δ = W_dt W_r give W_r x here and W_dt below.
        s_delta: (D, Q), or None for ``s_l = ⟨K, x_l⟩`` (mixers without a step size).
        k: (D,) learnable direction K; with ``s_delta=None`` (Q,).

    Returns:
        (b, L) scores in the dtype of x.

    Raises:
        ShapeError, DTypeError.

    Cost:
        O(D Q + b L Q).

    Source:
        Paper 1, Eq. (14).
    """
    shapes = check.Shapes("importance_score")
    shapes.expect("x", x, "b L Q")
    if s_delta is None:
        shapes.expect("k", k, "Q")
    else:
        shapes.expect("s_delta", s_delta, "D Q")
        shapes.expect("k", k, "D")
    check.expect_floats("importance_score", {"x": x, "s_delta": s_delta, "k": k})


def _check_order(name: str, scores: Any, x: Any, tau: float, power: float) -> None:
    shapes = check.Shapes(name)
    shapes.expect("scores", scores, "b L")
    if x is not None:
        shapes.expect("x", x, "b L D")
    check.expect_floats(name, {"scores": scores})
    if x is not None:
        check.expect_floats(name, {"x": x})
    check.expect_positive(name, "tau", tau)
    check.expect_positive(name, "power", power)
    check.expect_finite(name, "scores", scores)


@operation(arrays="scores x", differentiable="scores x", source="Prillo and Eisenschlos (2020); paper 1, Algorithm 1")
def softsort(scores: Any, x: Any, *, tau: float = 1.0, power: float = 1, ascending: bool = True) -> Any:
    """Tokens in soft order: ``P x`` with ``P_{kl} = softmax_l(-|s_l - s_[k]|^power / tau)``.

    s_[k] is the k-th score in the order wanted. Conventions, the same on every backend: equal keys keep
    their order (stable, also when descending), and the derivative of |·| at 0 is 0. As tau → 0, P becomes
    the permutation that sorts.

    With ``power=1`` no L x L matrix is made: after a sort ``exp(-|s_(j) - s_(i)|/tau)`` is semiseparable
    and P x is two decayed scans, exact for every tau, ties included.

    Args:
        scores: (b, L) finite.
        x: (b, L, D); its dtype may differ from that of scores.
        tau: temperature, above 0, in the units of the scores to the ``power``.
        power: exponent of the distance.
        ascending: smallest score first (paper 1).

    Returns:
        (b, L, D) in the dtype of x.

    Raises:
        ShapeError, DTypeError, OptionError; NonFiniteError for NaN or infinite scores where they can be
        seen (eager on the CPU). Elsewhere they give NaN, never a wrong order.

    Cost:
        power 1: O(b L log L + b L D) time, O(b L D) memory. Otherwise O(b L² D) and O(b L²).
    """
    _check_order("softsort", scores, x, tau, power)


@operation(arrays="scores y", differentiable="scores y", source="tokendyn; math of softsort, transposed")
def softsort_restore(scores: Any, y: Any, *, tau: float = 1.0, power: float = 1, ascending: bool = True) -> Any:
    """Undo a soft order after the mixer: ``x_l = Σ_k P_{kl} y_k / Σ_k P_{kl}``.

    The transposed, row-normalised SoftSort: each original place receives the average of the sorted places
    it was sent to. As tau → 0 it is the inverse permutation.

    Args:
        scores: (b, L), the scores that made the order.
        y: (b, L, D) in sorted order.
        tau, power, ascending: as given to :func:`softsort`.

    Returns:
        (b, L, D) in the original order and the dtype of y.

    Raises:
        As :func:`softsort`.

    Cost:
        As :func:`softsort`.
    """
    _check_order("softsort_restore", scores, y, tau, power)


@operation(arrays="scores", differentiable="scores", source="Prillo and Eisenschlos (2020)")
def softsort_matrix(scores: Any, *, tau: float = 1.0, power: float = 1, ascending: bool = True) -> Any:
    """The matrix P of :func:`softsort`, to look at: ``P_{kl} = softmax_l(-|s_l - s_[k]|^power / tau)``.

    Args:
        scores: (b, L) finite.
        tau, power, ascending: as in :func:`softsort`.

    Returns:
        (b, L, L); row k is a distribution over tokens, rows sum to 1.

    Raises:
        As :func:`softsort`.

    Cost:
        O(b L²) time and memory.
    """
    _check_order("softsort_matrix", scores, None, tau, power)


@operation(arrays="scores", differentiable="", source="spec of token dynamics, section 5")
def effective_tokens(scores: Any, *, tau: float = 1.0, power: float = 1, ascending: bool = True) -> Any:
    """How many tokens each row of SoftSort averages: ``1 / Σ_l P_{kl}²``, from 1 (a sort) to L (a mean).

    Args:
        scores: (b, L) finite.
        tau, power, ascending: as in :func:`softsort`.

    Returns:
        (b, L), one value a sorted place. No gradient.

    Raises:
        As :func:`softsort`.

    Cost:
        power 1: O(b L log L), for P² is the same kernel at tau/2. Otherwise O(b L²).
    """
    _check_order("effective_tokens", scores, None, tau, power)


@operation(arrays="scores", differentiable="", source="paper 1, Algorithm 1")
def hard_order(scores: Any, *, ascending: bool = True) -> Any:
    """Indices that sort the tokens by score; stable: equal scores keep their order, descending too.

    Args:
        scores: (b, L) finite.
        ascending: smallest score first.

    Returns:
        (b, L) integers: ``take_tokens(x, indices)`` is the sorted sequence.

    Raises:
        As :func:`softsort`.

    Cost:
        O(b L log L).
    """
    _check_order("hard_order", scores, None, 1.0, 1)


def _check_tokens(name: str, x_name: str, x: Any, indices: Any) -> None:
    shapes = check.Shapes(name)
    shapes.expect(x_name, x, "b L D")
    shapes.expect("indices", indices, "b L")
    check.expect_integers(name, "indices", indices)


@operation(arrays="x indices", differentiable="x", source="paper 1, Algorithm 1")
def take_tokens(x: Any, indices: Any) -> Any:
    """Permute tokens: ``out[b, k] = x[b, indices[b, k]]``.

    Args:
        x: (b, L, D).
        indices: (b, L) integers, a permutation of 0..L-1 in every row.

    Returns:
        (b, L, D).

    Raises:
        ShapeError, DTypeError.

    Cost:
        O(b L D).
    """
    _check_tokens("take_tokens", "x", x, indices)


@operation(arrays="y indices", differentiable="y", source="inverse of take_tokens")
def put_tokens(y: Any, indices: Any) -> Any:
    """Undo :func:`take_tokens`: ``out[b, indices[b, k]] = y[b, k]``.

    Args:
        y: (b, L, D) in sorted order.
        indices: (b, L) integers, a permutation of 0..L-1 in every row.

    Returns:
        (b, L, D) in the original order.

    Raises:
        ShapeError, DTypeError.

    Cost:
        O(b L D).
    """
    _check_tokens("put_tokens", "y", y, indices)


def token_order(
    scores: Any, method: str = "softsort", *, tau: float = 1.0, power: float = 1, ascending: bool = True
) -> Order:
    """The order of tokens by score, as one object to apply to everything indexed by token, and to undo.

    Args:
        scores: (b, L) finite.
        method: ``"softsort"``: soft order, ``P x``. ``"hard"``: a permutation; no gradient to the scores.
            ``"straight_through"``: the permutation in the forward pass, the gradient of ``"softsort"`` to
            the scores in the backward pass.
        tau, power: of SoftSort; no effect on ``"hard"``.
        ascending: smallest score first (paper 1).

    Returns:
        :class:`~tokendyn.Order` with ``apply``, ``restore``, ``matrix``, ``indices``.

    Raises:
        As :func:`softsort`.

    Cost:
        O(b L log L) here; the rest when it is applied.
    """
    from tokendyn._order import Order

    check.expect_choice("token_order", "method", method, ORDER_METHODS)
    _check_order("token_order", scores, None, tau, power)
    return Order(
        scores=scores,
        indices=hard_order(scores, ascending=ascending),
        method=method,
        tau=tau,
        power=power,
        ascending=ascending,
    )


@operation(arrays="weight_B weight_C diagonal", differentiable="weight_B weight_C diagonal", source="paper 1, App. C.1")
def io_projections(
    weight_B: Any, weight_C: Any = None, diagonal: Any = None, *, regime: str = "free", form: str = "paper"
) -> Any:
    """Projections S_B, S_C whose input-output matrix ``M = S_Cᵀ S_B`` has the spectrum asked for.

    LDLᵀ: with U the upper trapezoid of ``weight_B`` with ones on its diagonal (L = Uᵀ is unit lower
    triangular), ``S_C = U``, ``S_B = diag(q) U``, so ``M = L diag(q) Lᵀ`` has rank N and, by Sylvester's
    law, as many positive and negative eigenvalues as q has entries of each sign. With p = softplus(diagonal):

    ==================  =================  =================  ============================
    form                positive           negative           mixed (v = +1 on the first
                                                              ⌈N/2⌉ places, -1 on the rest)
    ==================  =================  =================  ============================
    ``paper``           q = p              q = -p             q = v ∘ p
    ``published_code``  q = p + 0.7        q = -(p + 0.7)     q = v ∘ p
    ``scale_matched``   q = p + 0.7        q = -(p + 0.7)     q = v ∘ (p + 0.7)
    ==================  =================  =================  ============================

    ``published_code`` starts its regimes at different scales (1.39 against 0.69 at diagonal = 0), a
    confound; ``scale_matched`` differs from it in that alone.

    Args:
        weight_B: (N, D), raw weights, N ≤ D unless free.
        weight_C: (N, D), used and required by ``regime="free"`` only.
        diagonal: (N,), raw D', required by the other regimes only.
        regime: ``"free"`` (S_B = weight_B, S_C = weight_C), ``"positive"``, ``"negative"``, ``"mixed"``.
        form: see the table; no effect on ``"free"``.

    Returns:
        (S_B, S_C), each (N, D).

    Raises:
        ShapeError, DTypeError, OptionError; RegimeError if the regime cannot be had with what was given.

    Cost:
        O(N D).

    Source:
        Paper 1, App. C.1, and the differences of its public code.
    """
    name = "io_projections"
    check.expect_choice(name, "regime", regime, IO_REGIMES)
    check.expect_choice(name, "form", form, IO_FORMS)
    shapes = check.Shapes(name)
    shapes.expect("weight_B", weight_B, "N D")
    if regime == "free":
        if weight_C is None or diagonal is not None:
            raise RegimeError(f"{name}: regime 'free' takes weight_B and weight_C and no diagonal")
        shapes.expect("weight_C", weight_C, "N D")
    else:
        if weight_C is not None or diagonal is None:
            raise RegimeError(f"{name}: regime {regime!r} takes weight_B and diagonal and no weight_C")
        shapes.expect("diagonal", diagonal, "N")
        if shapes.sizes["N"] > shapes.sizes["D"]:
            raise RegimeError(
                f"{name}: N = {shapes.sizes['N']} exceeds D = {shapes.sizes['D']}; a regime of N eigenvalues "
                f"of one sign needs N <= D, choose a smaller state or regime='free'"
            )
    check.expect_floats(name, {"weight_B": weight_B, "weight_C": weight_C, "diagonal": diagonal})


@operation(arrays="S_B S_C", differentiable="S_B S_C", source="spec of token dynamics, section 4")
def io_spectrum(S_B: Any, S_C: Any) -> Any:
    """Spectrum of the input-output matrix ``M = S_Cᵀ S_B`` and of its symmetric part.

    The eigenvalues of M that are not zero by rank are those of the N x N matrix ``S_B S_Cᵀ``; those of
    ``(M + Mᵀ)/2`` are those of the 2N x 2N matrix ``½ J Q``, ``Q = [S_C; S_B] [S_C; S_B]ᵀ``, J the swap of
    the two halves. No D x D matrix is made where D > 2N.

    For free projections with D ≥ 2N the symmetric part always has N positive and N negative eigenvalues
    (Sylvester's law): their count says nothing about a model, their magnitudes do.

    Args:
        S_B, S_C: (N, D) float32 or float64.

    Returns:
        :class:`IOSpectrum`. Differentiable where the eigenvalues are distinct.

    Raises:
        ShapeError, DTypeError.

    Cost:
        O(N² D + N³).
    """
    shapes = check.Shapes("io_spectrum")
    shapes.expect("S_B", S_B, "N D")
    shapes.expect("S_C", S_C, "N D")
    dtype = check.expect_floats("io_spectrum", {"S_B": S_B, "S_C": S_C})
    check.expect_choice("io_spectrum", "the dtype of S_B", dtype, ("float32", "float64"))


FLOW_DTYPES = ("float32", "float64")
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
    dtype = check.expect_floats(name, arrays)
    check.expect_choice(name, "the dtype of x", dtype, FLOW_DTYPES)


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
        ShapeError, DTypeError, OptionError.

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
    selective SSM. W is a value matrix, the identity by default. |x_l| = 1 is preserved, not enforced.

    Args:
        x: (L, D) or (b, L, D) tokens of unit norm, float32 or float64.
        s_delta, a, M, S_B, S_C, bias: as in :func:`flow_rhs`, D channels.
        W: (D, D), optional.

    Returns:
        dx/dt in the shape and dtype of x.

    Raises:
        ShapeError, DTypeError, OptionError.

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
        ShapeError, DTypeError, OptionError.

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
        ShapeError, DTypeError.

    Cost:
        O(b L D p).
    """
    _check_flow("autoregressive_flow", x, False, {"phi": (phi, ("p",))})
