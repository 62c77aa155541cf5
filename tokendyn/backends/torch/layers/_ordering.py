"""How a mixer orders its tokens: one module a way, found by ``OrderConfig.method``.

A mixer asks ``self.order(x, *s_delta)`` for an :class:`~tokendyn.Order` (or None: leave the tokens as they are) and
applies it to what the configuration says. It knows nothing else of the way, so a new one is a subclass of
:class:`TokenOrdering` and a row of ``METHODS``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokendyn import _checks as check
from tokendyn import _operations as ops
from tokendyn._layers import OrderConfig
from tokendyn._order import Order
from tokendyn.backends.torch.ops._order import exact_scores
from tokendyn.backends.torch.ops._scan_plain import valid_tokens
from tokendyn.errors import DTypeError


class TokenOrdering(nn.Module):
    """Base of all ways to order tokens; ``forward(x, *s_delta, lengths=None) -> Order | None``.

    What ``forward`` takes:

    - x: (b, L, d) the tokens to be ordered.
    - s_delta: factors of S_Δ, left to right, the last one (·, d); none for mixers without a step size.
    - lengths: (b,) of sequences padded on the right: the padding stays behind the tokens and is averaged with none.

    Attributes:
        config: the :class:`~tokendyn.OrderConfig`; mixers read ``restore`` and ``reorder_gate`` from it.
    """

    def __init__(self, config: OrderConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, *s_delta: Tensor, lengths: Tensor | None = None) -> Order | None:
        """The order of the tokens ``x``, by ``s_delta`` where scores are made of it; see the class for ``lengths``."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return str(self.config)


class ScoreOrdering(TokenOrdering):
    """By the importance score ``s_l = (S_Δ x_l)ᵀ K``, computed as ``⟨(Kᵀ S_Δ)ᵀ, x_l⟩``: one vector, one product.

    Scores are made in float32 at least, also under autocast.

    Args:
        config: the order wanted.
        width: length of K, the number of rows of S_Δ.

    Attributes:
        K: (width,) the learnable direction, drawn from a normal of deviation 0.02 like the published one.
        tau: temperature, ``config.tau`` at first. Set it at any time: ``layer.order.tau = 0.1``. It is part of the
            configuration and not of the ``state_dict``; a schedule sets it from its own step.

    Source:
        Paper 1, Eq. (14).
    """

    def __init__(
        self,
        config: OrderConfig,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config)
        self.tau = config.tau
        self.K = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.K, std=0.02)

    def forward(self, x: Tensor, *s_delta: Tensor, lengths: Tensor | None = None) -> Order:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            direction = self.K.to(dtype)
            for factor in s_delta:
                direction = direction @ factor.to(dtype)
            scores = exact_scores(x, direction)
            if self.config.normalize:
                scores = unit_deviation(scores, lengths)
        return order_by(scores, lengths, self.config.method, self.tau, self.config.power, self.config.ascending)

    def extra_repr(self) -> str:
        return f"{self.config}, tau={self.tau}"


class RandomOrdering(TokenOrdering):
    """A fresh uniform permutation of every sequence in every training step; none in evaluation.

    Drawn from torch's generator of the tokens' device.
    """

    def __init__(self, config: OrderConfig, width: int, **_: object) -> None:
        super().__init__(config)

    def forward(self, x: Tensor, *s_delta: Tensor, lengths: Tensor | None = None) -> Order | None:
        if not self.training:
            return None
        return order_by(torch.rand(x.shape[:2], device=x.device), lengths, "hard")


class ReversedOrdering(TokenOrdering):
    """Last token first."""

    def __init__(self, config: OrderConfig, width: int, **_: object) -> None:
        super().__init__(config)

    def forward(self, x: Tensor, *s_delta: Tensor, lengths: Tensor | None = None) -> Order:
        places = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
        return order_by(places.expand(x.shape[:2]), lengths, "hard", ascending=False)


class MeanOrdering(TokenOrdering):
    """Every place holds the mean of all tokens: SoftSort of equal scores, whose matrix is 1/L throughout."""

    def __init__(self, config: OrderConfig, width: int, **_: object) -> None:
        super().__init__(config)

    def forward(self, x: Tensor, *s_delta: Tensor, lengths: Tensor | None = None) -> Order:
        scores = x.new_zeros(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))
        return order_by(scores, lengths, "softsort")


METHODS: dict[str, type[ScoreOrdering] | type[RandomOrdering] | type[ReversedOrdering] | type[MeanOrdering]] = {
    "softsort": ScoreOrdering,
    "hard": ScoreOrdering,
    "straight_through": ScoreOrdering,
    "random": RandomOrdering,
    "reversed": ReversedOrdering,
    "mean": MeanOrdering,
}


def make_ordering(
    order: OrderConfig | str | None,
    width: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> TokenOrdering | None:
    """The module for a layer's ``order=`` argument; None for None. ``width``: rows of S_Δ."""
    config = OrderConfig.of(order)
    return None if config is None else METHODS[config.method](config, width, device=device, dtype=dtype)


def order_by(
    scores: Tensor,
    lengths: Tensor | None,
    method: str,
    tau: float = 1.0,
    power: float = 1.0,
    ascending: bool = True,
) -> Order:
    """:func:`tokendyn.token_order`; with ``lengths`` the padding lies behind all tokens, so far off that it has no part
    in their averages: its weights are 0 exactly, in float64 too."""
    if lengths is not None:
        valid = valid_tokens(lengths, scores.shape[1])
        largest = torch.where(valid, scores.detach(), 0.0).abs().amax(dim=1, keepdim=True)
        behind = 2 * largest + (1000 * tau) ** (1 / power)  # e^-1000 is 0
        scores = torch.where(valid, scores, behind if ascending else -behind)
    return ops.token_order(scores, method, tau=tau, power=power, ascending=ascending)


def unit_deviation(scores: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Scores (b, L) moved to mean 0 and standard deviation 1 in every sequence, the padding behind it left out.

    Where a sequence's scores differ by no more than rounding, as on a uniform image, they are centred only: no noise is
    blown up into an order, and value and gradient stay finite.
    """
    if lengths is None:
        centred = scores - scores.mean(dim=1, keepdim=True)
        variance = centred.square().mean(dim=1, keepdim=True)
    else:
        valid, count = valid_tokens(lengths, scores.shape[1]), lengths.clamp(min=1).unsqueeze(1)
        scores = torch.where(valid, scores, 0.0)
        centred = torch.where(valid, scores - scores.sum(dim=1, keepdim=True) / count, 0.0)
        variance = centred.square().sum(dim=1, keepdim=True) / count
    with torch.no_grad():
        rounding = 8 * torch.finfo(scores.dtype).eps * scores.abs().amax(dim=1, keepdim=True)
        spread = variance > rounding.square()
    # The inner `where` keeps the square root's infinite derivative at 0 out of the gradient.
    deviation = torch.where(spread, variance, 1.0).sqrt()
    return centred / deviation


@dataclass(frozen=True, eq=False)
class OrderRecord:
    """What one ordering did in one forward pass; made by :func:`record_orders`.

    Attributes:
        order: the :class:`~tokendyn.Order`, detached.
        effective_tokens: (b, L) how many tokens each sorted place averages: 1 for a permutation.
        variance_kept: (b,) variance of the ordered tokens over that of the tokens, each over the sequence and summed
            over channels: 1 for a permutation, 0 when all places hold the same mean; 1 where there was none to keep.
    """

    order: Order
    effective_tokens: Tensor
    variance_kept: Tensor


@contextlib.contextmanager
def record_orders(model: nn.Module) -> Iterator[dict[str, list[OrderRecord]]]:
    """Record what every ordering inside ``model`` does, without changing a forward pass.

    >>> with record_orders(model) as orders:
    ...     model(images)
    >>> orders["levels.2.blocks.0.mixer.order"][0].effective_tokens

    Args:
        model: any module. A compiled one runs eagerly meanwhile, since its graph calls no hooks.

    Yields:
        By the module's name, one :class:`OrderRecord` a forward pass that ordered anything.
    """
    records: dict[str, list[OrderRecord]] = {}
    handles = []
    for name, module in getattr(model, "_orig_mod", model).named_modules():
        if isinstance(module, TokenOrdering):

            def hook(_: nn.Module, args: tuple[Tensor, ...], order: Order | None, name: str = name) -> None:
                if order is not None:
                    records[name].append(_record(args[0], order))

            records[name] = []
            handles.append(module.register_forward_hook(hook))
    try:
        with torch.compiler.set_stance("force_eager"):
            yield records
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _record(x: Tensor, order: Order) -> OrderRecord:
    scores = order.scores.detach()
    detached = Order(scores, order.permutation, order.method, order.tau, order.power, order.ascending)
    if order.method == "softsort":
        effective = ops.effective_tokens(scores, tau=order.tau, power=order.power, ascending=order.ascending)
    else:
        effective = torch.ones_like(scores)
    before = x.to(scores.dtype)
    after = detached.apply(before)
    variances = [tokens.var(dim=1, correction=0).sum(dim=1) for tokens in (before, after)]
    kept = torch.where(variances[0] > 0, variances[1] / variances[0], 1.0)
    return OrderRecord(detached, effective, kept)


def expect_tokens(layer: str, x: Tensor, width: int, parameter: Tensor | None = None) -> None:
    """``x`` is (b, L, D) with D = ``width`` and can meet the layer's ``parameter``.

    Only what fails under autocast too is refused: integers, and float64 beside anything narrower.
    """
    shapes = check.Shapes(layer)
    shapes.sizes["D"] = width
    shapes.expect("x", x, "b L D")
    wide = torch.float64
    if parameter is None:
        return
    if not x.is_floating_point() or (x.dtype == wide) != (parameter.dtype == wide):
        given, expected = check.dtype_name(x), check.dtype_name(parameter)
        raise DTypeError(
            f"{layer}: x has dtype {given}, expected {expected}, as the layer's parameters have; convert one of them: "
            f"x.to(torch.{expected}), or layer.to(torch.{given if x.is_floating_point() else 'float64'})"
        )
