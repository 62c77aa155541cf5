"""The exponential moving average of a model's weights."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class MovingAverage(AveragedModel):
    """torch's, with an update that walks over the model once instead of in every step, and that a CUDA graph can hold.

    The first update copies the model; later ones move each parameter and floating-point buffer by 1 - ``decay`` of
    what it is apart from the model's. Counts among the buffers are the model's.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self._part = 1 - decay
        self._pairs: list[tuple[list[Tensor], list[Tensor]]] = []  # ours and the model's: numbers, then counts

    def update_parameters(self, model: nn.Module) -> None:
        self.blend(model)
        self.count()

    @torch.no_grad()
    def blend(self, model: nn.Module) -> None:
        """The update without :meth:`count`, which is the host's part."""
        if not self._pairs:
            ours, theirs = (list(chain(of.parameters(), of.buffers())) for of in (self.module, model))
            self._pairs = [(_those(ours, floating), _those(theirs, floating)) for floating in (True, False)]
        numbers, counts = self._pairs
        if self.n_averaged == 0:
            torch._foreach_copy_(*numbers)  # type: ignore[attr-defined]
        else:
            torch._foreach_lerp_(*numbers, self._part)  # type: ignore[attr-defined]
        if counts[0]:
            torch._foreach_copy_(*counts)  # type: ignore[attr-defined]

    def count(self) -> None:
        """Note that a model was taken into the average."""
        self.n_averaged += 1


def _those(tensors: list[Tensor], floating: bool) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors if tensor.is_floating_point() == floating]
