"""The order of tokens as one object, the same for every backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokendyn import _operations as ops
from tokendyn._dispatch import backend_of, kind_of, load_backend
from tokendyn.errors import ShapeError


@dataclass(frozen=True, eq=False)
class Order:
    """An order of tokens and its inverse; made by :func:`tokendyn.token_order`.

    Apply it to everything that is indexed by token (the tokens, a gate, a residual, positions), or undo it
    before sorted and unsorted tensors meet. It is a pytree under JAX.

    Attributes:
        scores: (b, L) the scores that made it.
        permutation: :attr:`indices` where it moves whole tokens, None for ``"softsort"``, which does without.
        method: ``"softsort"``, ``"hard"`` or ``"straight_through"``.
        tau, power, ascending: see :func:`tokendyn.softsort`.
    """

    scores: Any
    permutation: Any
    method: str
    tau: float
    power: float
    ascending: bool

    @property
    def indices(self) -> Any:
        """(b, L) integers, the hard order: see :func:`tokendyn.hard_order`. Made anew for ``"softsort"``."""
        if self.permutation is not None:
            return self.permutation
        return load_backend(_kind(self.scores)).hard_order(self.scores, ascending=self.ascending)

    def apply(self, x: Any, *, axis: int = -2) -> Any:
        """``x`` in this order.

        Args:
            x: three axes, the first of them b.
            axis: the axis of its tokens, 1 (-2) or 2 (-1).

        Returns:
            As ``x``.

        Raises:
            ShapeError: ``x`` has another number of axes, sequences or tokens.
            DTypeError: ``x`` is no array of the kind of the scores.

        Cost:
            See :func:`tokendyn.softsort` and :func:`tokendyn.take_tokens`.
        """
        return self._run("apply", "x", x, axis, ops.softsort, ops.take_tokens)

    def restore(self, y: Any, *, axis: int = -2) -> Any:
        """``y`` back in the original order: the inverse permutation, or the normalised transpose of P.

        Args:
            y: three axes, the first of them b, in this order.
            axis: the axis of its tokens, 1 (-2) or 2 (-1).

        Returns:
            As ``y``.

        Raises:
            ShapeError: ``y`` has another number of axes, sequences or tokens.
            DTypeError: ``y`` is no array of the kind of the scores.
        """
        return self._run("restore", "y", y, axis, ops.softsort_restore, ops.put_tokens)

    def matrix(self) -> Any:
        """(b, L, L) the matrix that :meth:`apply` multiplies with. O(b L²): to look at, not to run."""
        if self.method == "softsort":
            return ops.softsort_matrix(self.scores, **self._softsort_options)
        return load_backend(_kind(self.scores)).permutation_matrix(self.permutation, self.scores)

    @property
    def _softsort_options(self) -> dict[str, Any]:
        return {"tau": self.tau, "power": self.power, "ascending": self.ascending}

    def _run(self, method: str, name: str, x: Any, axis: int, soft: Any, hard: Any) -> Any:
        backend_of(f"Order.{method}", {"scores": self.scores, name: x})
        if len(x.shape) != 3 or not -3 <= axis < 3 or axis % 3 == 0:
            raise ShapeError(
                f"Order.{method}: {name} has shape {tuple(x.shape)} and axis is {axis}, expected three axes, batch "
                f"first, and tokens along axis 1 (-2) or 2 (-1)"
            )
        b, L = self.scores.shape
        if x.shape[0] != b or x.shape[axis] != L:
            elsewhere = [other for other in (1, 2) if x.shape[0] == b and x.shape[other] == L]
            raise ShapeError(
                f"Order.{method}: {name} has shape {tuple(x.shape)}, expected b = {b} and L = {L} tokens along axis "
                f"{axis}, as the scores that made this order" + (f"; give axis={elsewhere[0]}" if elsewhere else "")
            )
        if axis % 3 == 2:
            return self._permuted(x.swapaxes(1, 2), soft, hard).swapaxes(1, 2)
        return self._permuted(x, soft, hard)

    def _permuted(self, x: Any, soft: Any, hard: Any) -> Any:
        """``x`` (b, L, D) by ``soft``, ``hard``, or both."""
        if self.method == "softsort":
            return soft(self.scores, x, **self._softsort_options)
        permuted = hard(x, self.permutation)
        if self.method == "hard":
            return permuted
        # Value: exactly the permuted tokens. Gradient: to x by the permutation, to the scores by SoftSort.
        stop_gradient = load_backend(_kind(x)).stop_gradient
        through = soft(self.scores, stop_gradient(x), **self._softsort_options)
        return permuted + (through - stop_gradient(through))


def _kind(array: Any) -> str:
    kind = kind_of(array)
    assert kind is not None
    return kind
