"""An order of the tokens around, or inside, the mixers of a model that has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tokendyn._layers import OrderConfig
from tokendyn._order import Order
from tokendyn.backends.torch.layers import S6
from tokendyn.backends.torch.layers._ordering import make_ordering
from tokendyn.errors import OptionError


def reorder(name: str, module: Any, config: OrderConfig) -> tuple[str, nn.Module, Callable[[], None]]:
    """Let ``module`` order its tokens; the ordering's name in it, itself, and what removes it."""
    if isinstance(module, S6):
        previous = module.order
        weight = module.x_proj.weight
        ordering = make_ordering(config, module.d_inner, device=weight.device, dtype=weight.dtype)
        assert ordering is not None
        module.order = ordering

        def put_back() -> None:
            module.order = previous

        return "order", ordering, put_back
    if not config.restore:
        raise OptionError("refine: order has restore=False, expected an order that is undone after the mixer")
    if getattr(module, "token_order", None) is not None:
        raise OptionError(f"refine: {name} orders its tokens already; undo that first")
    weight = next(module.parameters())
    ordering = make_ordering(config, module.in_proj.in_features, device=weight.device, dtype=weight.dtype)
    assert ordering is not None
    module.token_order = ordering
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

    return "token_order", ordering, remove
