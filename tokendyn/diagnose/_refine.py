"""Refinements of an existing model: the nearest spectrum of a regime, or an order of the tokens; both can be undone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tokendyn import _checks as check
from tokendyn import _operations as ops
from tokendyn._layers import OrderConfig
from tokendyn._order import Order
from tokendyn.backends.torch.layers import S6
from tokendyn.backends.torch.layers._ordering import make_ordering
from tokendyn.diagnose._adapters import find_sites
from tokendyn.errors import OptionError, RegimeError

REGIMES = ("positive", "negative")


@dataclass
class Refinement:
    """What :func:`refine` did, and the way back.

    Attributes:
        layers: names of the layers changed.
        matrix_change: by layer ‖M' - M‖_F / ‖M‖_F, the change of the input-output matrix.
        function_change: relative change ‖f'(x) - f(x)‖ / ‖f(x)‖ of the model's output on the inputs given, or None.
        notes: what to know before using the model.
    """

    layers: tuple[str, ...]
    matrix_change: dict[str, float] = field(default_factory=dict)
    function_change: float | None = None
    notes: tuple[str, ...] = ()
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)
    _bake: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put everything back: weights bit for bit, hooks and parameters of orders removed."""
        for step in reversed(self._undo):
            step()
        self._undo.clear()
        self._bake.clear()

    def bake(self) -> None:
        """Write the refined projections out as ordinary weights, so that the model saves in its own format.

        Training then no longer keeps the regime; refining the saved model again changes its function by nothing but
        rounding, and keeps the regime from there on.
        """
        for step in self._bake:
            step()
        self._bake.clear()
        self._undo.clear()


def refine(
    model: nn.Module,
    *,
    io_regime: str | None = None,
    order: OrderConfig | str | None = None,
    inputs: Any = None,
) -> Refinement:
    """Turn the projections of a trained model into a spectrum regime, or let its layers reorder their tokens. In place.

    ``io_regime="positive"``: every layer's input-output matrix M = S_Cᵀ S_B is replaced by the nearest one (Frobenius
    norm) that is symmetric positive semidefinite of rank N: the N largest positive eigenvalues of (M + Mᵀ)/2 with their
    eigenvectors, written as ``S_C = Lᵀ``, ``S_B = diag(q) Lᵀ`` with L unit lower triangular and q > 0, as in paper 1's
    App. C.1. ``"negative"`` likewise. L and q are then what is trained, through a parametrisation of ``x_proj.weight``,
    so training keeps the regime. A free model has N eigenvalues of each sign, so half of its spectrum is given up: the
    change of the function is reported, and fine-tuning is meant to follow.

    Args:
        model: with layers as :func:`tokendyn.diagnose` finds them.
        io_regime: ``"positive"`` or ``"negative"``.
        order: as of :class:`tokendyn.torch.Mamba`. tokendyn's own layers order inside the mixer; others are wrapped by
            hooks that order before it by the score ⟨K, x⟩ and restore after it, K being a new parameter
            ``token_order.K`` of the mixer.
        inputs: as of :func:`tokendyn.diagnose`, to measure the change of the function on.

    Returns:
        :class:`Refinement`, with ``undo()`` and ``bake()``.

    Raises:
        OptionError: nothing is asked, there is no layer, or an option is unknown.
        RegimeError: a layer has N > d, a norm between its projections and the scan that a spectrum cannot pass, or its
            spectrum is held by a parametrisation of its own.

    Cost:
        O(N² d) a layer.

    Source:
        Paper 1, App. C.1 and Eq. (14); Higham (1988) for the nearest semidefinite matrix.
    """
    if (io_regime is None) == (order is None):
        raise OptionError("refine: expected one of io_regime and order")
    if io_regime is not None:
        check.expect_choice("refine", "io_regime", io_regime, REGIMES)
    sites = find_sites(model)
    if not sites:
        raise OptionError(f"refine: no selective (S6) layer found in {type(model).__name__}")
    before = None if inputs is None else _outputs(model, inputs)
    done = Refinement(tuple(site.name for site in sites))
    try:
        for site in sites:
            if io_regime is not None:
                done.matrix_change[site.name] = _constrain(site.name, site.module, io_regime, done)
            else:
                _reorder(site.module, order, done)
    except Exception:
        done.undo()
        raise
    if order is not None:
        done.notes = ("a model that orders its tokens is not causal: outputs depend on later tokens",)
    if before is not None:
        after = _outputs(model, inputs)
        done.function_change = float((after - before).norm() / before.norm().clamp_min(1e-300))
    return done


class _Regime(nn.Module):
    """(W_r rows, the rows of L, raw diagonal) → ``x_proj.weight``."""

    def __init__(self, rank: int, state: int, regime: str) -> None:
        super().__init__()
        self.rank, self.state, self.regime = rank, state, regime

    def forward(self, other: Tensor, rows: Tensor, diagonal: Tensor) -> Tensor:
        S_B, S_C = ops.io_projections(rows, diagonal=diagonal, regime=self.regime)
        return torch.cat([other, S_B, S_C])

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        other, S_B, S_C = weight.split([self.rank, self.state, self.state])
        rows, q = nearest(S_B, S_C, self.regime)
        # The inverse of softplus, without overflow for large q and without log(0) for small ones.
        diagonal = q + torch.log(-torch.expm1(-q))
        return other.clone(), rows.to(weight.dtype), diagonal.to(weight.dtype)


def nearest(S_B: Tensor, S_C: Tensor, regime: str) -> tuple[Tensor, Tensor]:
    """Rows U (N, d), unit upper triangular, and q > 0 (N,) with ``± Uᵀ diag(q) U`` the nearest matrix to S_Cᵀ S_B of
    its sign and of rank N, in float64. Missing eigenvalues are made as small as rounding allows."""
    S_B, S_C = S_B.detach().double(), S_C.detach().double()
    state = len(S_B)
    sign = 1.0 if regime == "positive" else -1.0
    Q, _ = torch.linalg.qr(torch.cat([S_C, S_B]).mT)  # (d, r) the row space of both
    half = sign * (S_C @ Q).mT @ (S_B @ Q) / 2
    values, vectors = torch.linalg.eigh(half + half.mT)
    top = values.abs().max().clamp_min(1e-300)
    kept = values[-state:].clamp_min(1e-12 * float(top))
    root = (Q @ vectors[:, -state:]) * kept.sqrt()  # (d, N), M' = root rootᵀ
    R = torch.linalg.qr(root.mT).R  # (N, d) upper trapezoid, M' = Rᵀ R
    pivots = R.diagonal()
    return R / pivots[:, None], pivots.square()


def _constrain(name: str, module: Any, regime: str, done: Refinement) -> float:
    projection = getattr(module, "x_proj", None)
    if not isinstance(projection, nn.Linear):
        raise RegimeError(f"refine: {name} has no x_proj to put into a regime")
    if getattr(module, "io_diagonal", None) is not None or parametrize.is_parametrized(projection, "weight"):
        raise RegimeError(f"refine: {name} has a parametrisation of its spectrum already; undo or bake it first")
    if hasattr(module, "b_layernorm"):
        raise RegimeError(
            f"refine: {name} normalises B and C after their projections, so that no spectrum of theirs reaches the scan"
        )
    rows, width = projection.weight.shape
    state = module.A_log.shape[1] if module.A_log.ndim == 2 and module.A_log.shape[1] > 1 else module.d_state
    if state > width:
        raise RegimeError(f"refine: {name} has N = {state} > d = {width}, and no matrix of that rank")
    rank = rows - 2 * state
    original = projection.weight.detach().clone()
    was_trained = projection.weight.requires_grad
    parametrize.register_parametrization(projection, "weight", _Regime(rank, state, regime), unsafe=True)

    def put_back() -> None:
        parametrize.remove_parametrizations(projection, "weight", leave_parametrized=True)
        with torch.no_grad():
            projection.weight.copy_(original)
        projection.weight.requires_grad_(was_trained)

    done._undo.append(put_back)

    def write_out() -> None:
        parametrize.remove_parametrizations(projection, "weight", leave_parametrized=True)

    done._bake.append(write_out)
    with torch.no_grad():
        return _change(original[rank:].double(), projection.weight[rank:].double(), state)


def _change(before: Tensor, after: Tensor, state: int) -> float:
    """‖M' - M‖_F / ‖M‖_F from the rows of S_B and S_C, without a d x d matrix."""

    def inner(left: Tensor, right: Tensor) -> Tensor:  # ⟨S_C'ᵀ S_B', S_Cᵀ S_B⟩
        return ((left[state:] @ right[state:].mT) * (left[:state] @ right[:state].mT)).sum()

    square = inner(after, after) - 2 * inner(after, before) + inner(before, before)
    return float((square.clamp_min(0) / inner(before, before).clamp_min(1e-300)).sqrt())


def _reorder(module: Any, order: OrderConfig | str | None, done: Refinement) -> None:
    if isinstance(module, S6):
        previous = module.order
        weight = module.x_proj.weight
        module.order = make_ordering(order, module.d_inner, device=weight.device, dtype=weight.dtype)

        def put_back() -> None:
            module.order = previous

        done._undo.append(put_back)
        return
    config = OrderConfig.of(order)
    assert config is not None
    if not config.restore:
        raise OptionError("refine: order has restore=False, expected an order that is undone after the mixer")
    weight = next(module.parameters())
    width = module.in_proj.in_features
    module.token_order = make_ordering(config, width, device=weight.device, dtype=weight.dtype)
    orders: list[Order | None] = []

    def enter(mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens = args[0] if args else kwargs["hidden_states"]
        found = mixer.token_order(tokens)
        orders.append(found)
        if found is None:
            return args, kwargs
        sorted_tokens = found.apply(tokens)
        return ((sorted_tokens, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": sorted_tokens})

    def leave(_mixer: Any, _args: Any, output: Tensor) -> Tensor:
        found = orders.pop()
        return output if found is None else found.restore(output)

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]

    def remove() -> None:
        for handle in handles:
            handle.remove()
        del module.token_order

    done._undo.append(remove)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Any) -> Tensor:
    from tokendyn.diagnose._diagnosis import Evaluating, model_arguments

    args, kwargs = model_arguments(inputs)
    with Evaluating(model):
        out = model(*args, **kwargs)
    for candidate in (out, getattr(out, "logits", None), getattr(out, "last_hidden_state", None)):
        if isinstance(candidate, Tensor):
            return candidate.detach().double()
    if isinstance(out, dict):
        return torch.cat([value.flatten().double() for value in out.values() if isinstance(value, Tensor)])
    raise OptionError(f"refine: the model returns {type(out).__name__}, expected a tensor, logits or a hidden state")
