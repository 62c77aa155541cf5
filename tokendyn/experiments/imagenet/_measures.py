"""What an order does to the tokens of a trained model, and what the tokens do: measures on held-out images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendyn import Order, token_order
from tokendyn._layers import OrderConfig
from tokendyn.backends.torch.layers import TokenOrdering, record_orders
from tokendyn.backends.torch.layers._ordering import RandomOrdering, ScoreOrdering
from tokendyn.backends.torch.models._mambavision_blocks import MixerBlock
from tokendyn.experiments._order_measures import of_order

CLUSTER_COSINE = 0.9  # tokens at least so alike to the first of a cluster belong to it


def measure_mechanism(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, dict[str, dict[str, float]]]:
    """More on the orders, and on the tokens, from one forward and backward pass over ``inputs``.

    Returns:
        ``orders``: by ordering module, for orders by score, :func:`~.._order_measures.of_order` and

        - ``score_gradient``: how the loss of an image reacts to its scores: norm over the tokens of its gradient
          towards them, times their deviation (so that their scale does not matter); mean over sequences.
        - ``direction_share``: norm of the gradient towards K over the norm towards all parameters.
        - ``agreement_class``, ``agreement_all``, ``agreement_raster``: mean rank correlation of the tokens' places
          between two images of one class, any two images, and an image and the row-by-row order.

        ``tokens``: by block of stages 3 and 4, of the tokens that it puts out

        - ``pairwise_cosine``, ``first_cosine``: mean cosine of two different tokens; of a token and the first one.
        - ``clusters``: greedy clusters of cosine :data:`CLUSTER_COSINE` in a sequence.
    """
    live: dict[str, Order] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, ScoreOrdering):
            handles.append(module.register_forward_hook(_keep(live, name)))
        elif isinstance(module, MixerBlock):
            handles.append(module.register_forward_hook(_keep(outputs, name)))
    kind = inputs.device.type
    # Without the cache: an evaluation before may have left copies of the weights in it that carry no gradient.
    exact = torch.autocast(
        kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
    )
    try:
        with torch.enable_grad(), exact, record_orders(model) as records:
            loss = F.cross_entropy(model(inputs).float(), labels, reduction="sum")
    finally:
        for handle in handles:
            handle.remove()
    orders = {name: of_order(found[0]) for name, found in records.items() if found}
    if live:
        named = {name: value for name, value in model.named_parameters() if value.requires_grad}
        wanted = [*(order.scores for order in live.values()), *named.values()]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        towards = dict(zip(named, gradients[len(live) :], strict=True))
        whole = torch.stack([g.norm() for g in towards.values() if g is not None]).norm().item()
        for (name, order), gradient in zip(live.items(), gradients, strict=False):
            scores, direction = order.scores.detach(), towards[f"{name}.K"]
            reach = gradient.norm(dim=1) * scores.std(dim=1, correction=0)
            orders[name]["score_gradient"] = reach.mean().item()
            orders[name]["direction_share"] = direction.norm().item() / whole if whole > 0 else 0.0
            orders[name] |= _agreement(order.indices, labels)
    with torch.autocast(kind, enabled=False):
        return {"orders": orders, "tokens": {name: _of_tokens(out.detach()) for name, out in outputs.items()}}


@contextlib.contextmanager
def shuffled_orders(model: nn.Module, seed: int) -> Iterator[None]:
    """While the block runs, the places that arms order hold a random order instead, drawn from ``seed``.

    Where scores make the order they are dealt anew to the tokens of each sequence, so that only the relation of token
    and score is lost, not the temperature. Where tokens come as they are, or at random in training only, they are
    permuted and put back after the scan. The generators outside go on as if nothing had been drawn.
    """
    handles, attached, random = [], [], []
    stages: Any = model.levels
    for stage in stages[2:]:
        mixer = stage.blocks[0].mixer
        if mixer.order is None:
            mixer.order = RandomOrdering(OrderConfig("random"), 0)
            attached.append(mixer)
        elif isinstance(mixer.order, RandomOrdering):
            random.append(mixer.order.train())
    for module in model.modules():
        if isinstance(module, TokenOrdering) and not isinstance(module, RandomOrdering):
            handles.append(module.register_forward_hook(_deal))
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        for handle in handles:
            handle.remove()
        for mixer in attached:
            mixer.order = None
        for module in random:
            module.eval()


def expected_places(order: Order) -> Tensor:
    """(b, L) the place to which each token goes: Σ_k k P_kl / Σ_k P_kl; its place if the order is hard.

    A SoftSort that averages everything gives (L - 1)/2 everywhere: no token has a place of its own.
    """
    matrix = order.matrix().double()
    places = torch.arange(matrix.shape[1], device=matrix.device, dtype=torch.float64)
    return torch.einsum("k,bkl->bl", places, matrix) / matrix.sum(dim=1)


def _keep(place: dict[str, Any], name: str) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that enters the output into ``place``."""

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        place[name] = output

    return hook


def _deal(_: nn.Module, __: Any, order: Order) -> Order:
    dealt = order.scores.gather(1, torch.rand_like(order.scores).argsort(dim=1))
    return token_order(dealt, order.method, tau=order.tau, power=order.power, ascending=order.ascending)


def _agreement(indices: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean rank correlations of the places; ``indices`` (b · windows, L), ``labels`` (b,)."""
    places = indices.argsort(dim=1).double().reshape(len(labels), -1)
    unit = _unit(places - places.mean(dim=1, keepdim=True))
    raster = torch.arange(indices.shape[1], device=indices.device, dtype=torch.float64)
    raster = raster.repeat(places.shape[1] // indices.shape[1])
    by_class = [_mean_pair(unit[labels == label]) for label in labels.unique() if (labels == label).sum() > 1]
    return {
        "agreement_class": sum(by_class) / len(by_class) if by_class else 0.0,
        "agreement_all": _mean_pair(unit),
        "agreement_raster": (unit @ _unit(raster - raster.mean())).mean().item(),
    }


def _of_tokens(tokens: Tensor) -> dict[str, float]:
    unit = _unit(tokens.float())
    cosines = unit @ unit.mT
    count = tokens.shape[1]
    return {
        "pairwise_cosine": ((cosines.sum(dim=(1, 2)) - count) / (count * (count - 1))).mean().item(),
        "first_cosine": cosines[:, 0, 1:].mean().item(),
        "clusters": _clusters(cosines).mean().item(),
    }


def _clusters(cosines: Tensor) -> Tensor:
    """(b,) number of clusters: going through the tokens, one that is near no leader so far leads a new cluster."""
    near = cosines >= CLUSTER_COSINE
    leads = torch.zeros(cosines.shape[:2], dtype=torch.bool, device=cosines.device)
    for l in range(cosines.shape[1]):
        leads[:, l] = ~(near[:, l] & leads).any(dim=1)
    return leads.sum(dim=1).double()


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def _mean_pair(unit: Tensor) -> float:
    """Mean product of two different rows of ``unit`` (n, d), whose rows have norm 1."""
    count = len(unit)
    return 0.0 if count < 2 else ((unit.sum(dim=0).square().sum().item() - count) / (count * (count - 1)))
