"""What the layers of every backend share: the constructors' dispatch and the configuration of an order."""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tokendyn import _checks as check
from tokendyn._dispatch import current_backend, load_backend
from tokendyn._operations import IO_FORMS, IO_REGIMES
from tokendyn.errors import NotImplementedForBackend, OptionError, RegimeError

#: Constructor -> the backends that have it.
CONSTRUCTORS: dict[str, tuple[str, ...]] = {
    "S6": ("torch", "jax"),
    "Mamba": ("torch", "jax"),
    "TokenReorder": ("torch", "jax"),
    "CausalAttention": ("torch",),
    "H3": ("torch",),
    "H3LM": ("torch",),
    "MambaLM": ("torch", "jax"),
    "TransformerLM": ("torch",),
    "mamba_lm_130m": ("torch", "jax"),
    "MambaVision": ("torch", "jax"),
    "mambavision_t": ("torch", "jax"),
}

OrderMethod = Literal["softsort", "hard", "straight_through", "random", "reversed", "mean"]


@dataclass(frozen=True)
class OrderConfig:
    """How a layer orders its tokens before mixing them, and what it does with the order afterwards.

    Attributes:
        method: ``"softsort"``, ``"hard"``, ``"straight_through"``: by the importance score (14), see
            :func:`tokendyn.token_order`. ``"random"``: a fresh permutation of every sequence in every training
            step, no reordering in evaluation. ``"reversed"``: last token first. ``"mean"``: every token replaced by
            the mean of its sequence, the limit of SoftSort for a large ``tau``: a control, for it knows no order.
        tau, power: temperature and exponent of SoftSort. At ``tau=1`` and the scores of a freshly made layer
            SoftSort averages nearly all tokens instead of sorting them; look at it with ``record_orders``, and use
            ``normalize``, a smaller ``tau`` or another method to get an order.
        ascending: smallest score first (paper 1).
        normalize: bring the scores of every sequence to unit standard deviation first, so that ``tau`` has the same
            meaning whatever their scale.
        restore: undo the order after the scan, before the result meets anything in the original order. With False
            the result stays sorted while the residual stream does not, as in the published code.
        reorder_gate: without ``restore``, bring the gate into the same order as the scan's output; with False the
            sorted output meets the gate of other tokens, as in the published code.

    Raises:
        OptionError: an unknown method, a temperature or power that is not above 0, or ``reorder_gate`` with
            ``restore``, which would sort the gate against an output that is sorted no longer.
    """

    method: OrderMethod = "softsort"
    tau: float = 1.0
    power: float = 1.0
    ascending: bool = True
    normalize: bool = False
    restore: bool = True
    reorder_gate: bool = False

    def __post_init__(self) -> None:
        check.expect_choice("OrderConfig", "method", self.method, get_args(OrderMethod))
        check.expect_positive("OrderConfig", "tau", self.tau)
        check.expect_positive("OrderConfig", "power", self.power)
        if self.restore and self.reorder_gate:
            raise OptionError(
                "OrderConfig: restore and reorder_gate are both True; with the order undone the gate is in place as it "
                "is, set one of the two"
            )

    @classmethod
    def published(cls) -> OrderConfig:
        """As in paper 1's public code: SoftSort at temperature 1, soft, not undone, the gate left unsorted."""
        return cls(method="softsort", tau=1.0, power=1.0, restore=False, reorder_gate=False)

    @classmethod
    def of(cls, value: OrderConfig | str | None) -> OrderConfig | None:
        """``value`` as a layer's ``order=`` takes it: a configuration, ``"published"``, a method's name, or None."""
        if value is None or isinstance(value, cls):
            return value
        check.expect_choice("order", "the name given", value, ("published", *get_args(OrderMethod)))
        return cls.published() if value == "published" else cls(method=value)  # type: ignore[arg-type]


def expect_selective(
    layer: str, d_model: int, d_state: int, dt_rank: int | str | None, dt_init: str, io_regime: str, io_form: str
) -> int | None:
    """Check what a selective layer of ``d_model`` channels is made with; the rank of its S_Δ, None for a dense one.

    Raises:
        OptionError: an option is out of range.
        RegimeError: the regime needs a smaller state.
    """
    check.expect_size(layer, "d_model", d_model)
    check.expect_size(layer, "d_state", d_state)
    if dt_rank == "auto":
        dt_rank = math.ceil(d_model / 16)
    check.expect_choice(layer, "dt_init", dt_init, ("random", "constant"))
    check.expect_choice(layer, "io_regime", io_regime, IO_REGIMES)
    check.expect_choice(layer, "io_form", io_form, IO_FORMS)
    if io_regime != "free" and d_state > d_model:
        raise RegimeError(
            f"{layer}: d_state = {d_state} exceeds the {d_model} channels of the scan; io_regime={io_regime!r} needs "
            f"N <= d, choose a smaller d_state or io_regime='free'"
        )
    return None if dt_rank is None else check.expect_size(layer, "dt_rank", dt_rank)


def expect_order_without_gate(layer: str, order: OrderConfig | str | None) -> None:
    """``order=`` of a ``layer`` that orders tokens where no gate can be brought into the same order.

    Raises:
        OptionError: there is no order, or one with ``reorder_gate``.
    """
    config = OrderConfig.of(order)
    if config is None or config.reorder_gate:
        raise OptionError(f"{layer}: order is {order!r}, expected an order without reorder_gate, for it meets no gate")


class Constructor:
    """``tokendyn.NAME``: the class or function NAME of the current backend, which is looked up when it is used."""

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name
        self.__doc__ = f"``{name}`` of the current backend; see ``tokendyn.{CONSTRUCTORS[name][0]}.{name}``."

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make the layer or model.

        Raises:
            NotImplementedForBackend: the current backend has no such layer.
            BackendMissing, BackendBroken: see :mod:`tokendyn.errors`.
        """
        return self._of_current_backend()(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return getattr(self._of_current_backend(), attribute)

    def __instancecheck__(self, value: object) -> bool:
        """Whether ``value`` is of this class on any backend in use."""
        loaded = (sys.modules.get(f"tokendyn.{backend}") for backend in CONSTRUCTORS[self.__name__])
        return any(isinstance(value, getattr(module, self.__name__)) for module in loaded if module is not None)

    def __repr__(self) -> str:
        return f"<tokendyn.{self.__name__}, of the current backend>"

    def _of_current_backend(self) -> Any:
        name, chosen = self.__name__, current_backend()
        if chosen not in CONSTRUCTORS[name]:
            choices = " or ".join(f"tokendyn.use({b!r})" for b in CONSTRUCTORS[name])
            raise NotImplementedForBackend(
                f"{name} is not implemented for the current backend {chosen!r}; choose another with {choices}, "
                f"or name it: tokendyn.{CONSTRUCTORS[name][0]}.{name}"
            )
        load_backend(chosen)
        return getattr(importlib.import_module(f"tokendyn.{chosen}"), name)
