"""Importance scores, SoftSort, and orders of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tokendyn import _checks as check
from tokendyn._dispatch import backend_of
from tokendyn._operations._table import operation

if TYPE_CHECKING:
    from tokendyn._order import Order

ORDER_METHODS = ("softsort", "hard", "straight_through")


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
        ShapeError, DTypeError: an argument has the wrong shape, or the wrong dtype.

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
def softsort(
    scores: Any, x: Any, *, tau: float = 1.0, power: float = 1, ascending: bool = True, engine: str = "auto"
) -> Any:
    """Tokens in soft order: ``P x`` with ``P_{kl} = softmax_l(-|s_l - s_[k]|^power / tau)``.

    s_[k] is the k-th score in the order wanted. Conventions, the same on every backend: equal keys keep
    their order (stable, also when descending), and the derivative of ``|·|`` at 0 is 0. As tau → 0, P becomes
    the permutation that sorts.

    With ``power=1`` no L x L matrix is made of a long sequence: after a sort ``exp(-|s_(j) - s_(i)|/tau)`` is
    semiseparable and P x is two decayed scans, exact for every tau, ties included.

    Args:
        scores: (b, L) finite.
        x: (b, L, D); its dtype may differ from that of scores.
        tau: temperature, above 0, in the units of the scores to the ``power``.
        power: exponent of the distance.
        ascending: smallest score first (paper 1).
        engine: ``"auto"`` or the name of one engine of the backend.

    Returns:
        (b, L, D) in the dtype of x.

    Raises:
        ShapeError, DTypeError, OptionError: an argument has the wrong shape, the wrong dtype, or a value out of range.
        NonFiniteError: NaN or infinite scores, where they can be seen (eager on the CPU). Elsewhere they give NaN,
            never a wrong order.

    Cost:
        power 1: O(b L log L + b L D) time, O(b L D) memory. Otherwise O(b L² D) and O(b L²); PyTorch's Triton
        engine, which takes short sequences and power 2, keeps no matrix: O(b L² D) and O(b L D).
    """
    _check_order("softsort", scores, x, tau, power)


@operation(arrays="scores y", differentiable="scores y", source="tokendyn; softsort transposed")
def softsort_restore(
    scores: Any, y: Any, *, tau: float = 1.0, power: float = 1, ascending: bool = True, engine: str = "auto"
) -> Any:
    """Undo a soft order after the mixer: ``x_l = Σ_k P_{kl} y_k / Σ_k P_{kl}``.

    The transposed, row-normalised SoftSort: each original place receives the average of the sorted places
    it was sent to. As tau → 0 it is the inverse permutation.

    Args:
        scores: (b, L), the scores that made the order.
        y: (b, L, D) in sorted order.
        tau, power, ascending: as given to :func:`softsort`.
        engine: ``"auto"`` or the name of one engine of the backend.

    Returns:
        (b, L, D) in the original order and the dtype of y.

    Raises:
        ShapeError, DTypeError, OptionError, NonFiniteError: as in :func:`softsort`.

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
        ShapeError, DTypeError, OptionError, NonFiniteError: as in :func:`softsort`.

    Cost:
        O(b L²) time and memory.
    """
    _check_order("softsort_matrix", scores, None, tau, power)


@operation(arrays="scores", differentiable="", source="tokendyn; inverse participation ratio of the rows of softsort")
def effective_tokens(scores: Any, *, tau: float = 1.0, power: float = 1, ascending: bool = True) -> Any:
    """How many tokens each row of SoftSort averages: ``1 / Σ_l P_{kl}²``, from 1 (a sort) to L (a mean).

    Args:
        scores: (b, L) finite.
        tau, power, ascending: as in :func:`softsort`.

    Returns:
        (b, L), one value a sorted place. No gradient.

    Raises:
        ShapeError, DTypeError, OptionError, NonFiniteError: as in :func:`softsort`.

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
        ShapeError, DTypeError, OptionError, NonFiniteError: as in :func:`softsort`.

    Cost:
        O(b L log L).
    """
    _check_order("hard_order", scores, None, 1.0, 1)


def _check_tokens(name: str, x_name: str, x: Any, indices: Any) -> None:
    shapes = check.Shapes(name)
    shapes.expect(x_name, x, "b L D")
    shapes.expect("indices", indices, "b L")
    check.expect_integers(name, "indices", indices)
    check.expect_permutations(name, "indices", indices)


@operation(arrays="x indices", differentiable="x", source="paper 1, Algorithm 1")
def take_tokens(x: Any, indices: Any) -> Any:
    """Permute tokens: ``out[b, k] = x[b, indices[b, k]]``.

    Args:
        x: (b, L, D).
        indices: (b, L) integers, a permutation of 0..L-1 in every row; see Raises.

    Returns:
        (b, L, D).

    Raises:
        DTypeError: an argument has the wrong dtype.
        ShapeError: also for indices that are no permutation, where their values can be seen at no cost. On an
            accelerator and under a tracer (``jit``, ``torch.compile``, ``vmap``) they cannot: there an index outside
            0..L-1, negative ones included, gives NaN in its place.

    Cost:
        O(b L D).
    """
    _check_tokens("take_tokens", "x", x, indices)


@operation(arrays="y indices", differentiable="y", source="inverse of take_tokens")
def put_tokens(y: Any, indices: Any) -> Any:
    """Undo :func:`take_tokens`: ``out[b, indices[b, k]] = y[b, k]``.

    Args:
        y: (b, L, D) in sorted order.
        indices: (b, L) integers, a permutation of 0..L-1 in every row; see Raises.

    Returns:
        (b, L, D) in the original order.

    Raises:
        DTypeError: an argument has the wrong dtype.
        ShapeError: also for indices that are no permutation, where their values can be seen at no cost. On an
            accelerator and under a tracer (``jit``, ``torch.compile``, ``vmap``) they cannot: there a token that no
            index names is NaN, and of two tokens with one index either is kept.

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
        ShapeError, DTypeError, OptionError, NonFiniteError: as in :func:`softsort`.

    Cost:
        O(b L log L) here for orders that permute; the rest when it is applied.
    """
    from tokendyn._order import Order

    backend_of("token_order", {"scores": scores})
    check.expect_choice("token_order", "method", method, ORDER_METHODS)
    _check_order("token_order", scores, None, tau, power)
    return Order(
        scores=scores,
        permutation=None if method == "softsort" else hard_order(scores, ascending=ascending),
        method=method,
        tau=tau,
        power=power,
        ascending=ascending,
    )


def _token_order_on(fixed: str) -> Callable[..., Order]:
    """:func:`token_order` for arrays of one backend only."""

    def bound(scores: Any, *args: Any, **kwargs: Any) -> Order:
        backend_of("token_order", {"scores": scores}, fixed)
        return token_order(scores, *args, **kwargs)

    return bound


token_order.on_backend = _token_order_on  # type: ignore[attr-defined]
