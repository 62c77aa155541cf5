"""Text classification as a task of the trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendyn.backends.torch.models import MambaClassifier
from tokendyn.errors import OptionError
from tokendyn.experiments._order_arms import Arm, resolve_arm
from tokendyn.experiments._order_measures import measure_orders
from tokendyn.experiments._task import Batch
from tokendyn.experiments.text_classification._config import TextConfig
from tokendyn.experiments.text_classification._texts import UNKNOWN, Texts

EVALUATION_BATCH = 256
MEASURED_TEXTS = 32  # held-out texts on which the orders are measured
_POOL = 32  # batches that are filled from one pool of texts, by length
_ORDER, _UNKNOWN = 0, 1  # streams of random numbers that must not meet


class TextTask:
    """A classifier on labelled texts, with one arm and one seed (:class:`~.._trainer.Task`).

    Args:
        texts: the data.
        config: the study's configuration.
        arm: the order, and its schedule.
        seed: decides the order of the texts and the words that are dropped.
    """

    def __init__(self, texts: Texts, config: TextConfig, arm: Arm, seed: int) -> None:
        self.texts, self.config, self.arm, self.seed = texts, config, arm, seed
        if self.steps_per_epoch < 1:
            raise OptionError(
                f"--batch-size is {config.train.batch_size}, but there are only {len(texts.train)} training texts; "
                f"choose a smaller one"
            )

    @property
    def steps_per_epoch(self) -> int:
        return len(self.texts.train) // self.config.train.batch_size

    def build_model(self) -> nn.Module:
        options = {name: getattr(self.config.model, name) for name in self.config.model.__dataclass_fields__}
        return MambaClassifier(
            len(self.texts.classes), vocab_size=self.texts.vocab_size, order=self.arm.order, **options
        )

    def set_progress(self, model: nn.Module, progress: float) -> None:
        """Set the temperature that the arm's schedule asks for."""
        self.arm.set_progress(model, progress)

    def batch(self, step: int) -> Batch:
        epoch, place = divmod(step, self.steps_per_epoch)
        indices = self._epoch(epoch)[place]
        ids, lengths = self.texts.train.padded(indices)
        rate = self.config.data.word_dropout
        dropped = np.random.default_rng([self.seed, _UNKNOWN, step]).random(ids.shape) < rate
        ids[dropped & (np.arange(ids.shape[1]) < lengths[:, None])] = UNKNOWN
        tensors = {"ids": ids, "lengths": lengths, "labels": self.texts.train.labels[indices]}
        return Batch({name: torch.from_numpy(array) for name, array in tensors.items()})

    def _epoch(self, epoch: int) -> np.ndarray:
        return _batches(self.texts.train.lengths.tobytes(), self.config.train.batch_size, self.seed, epoch)

    def loss(self, model: Callable[..., Any], tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits, labels = model(tensors["ids"], tensors["lengths"]).float(), tensors["labels"]
        accuracy = (logits.detach().argmax(dim=1) == labels).float().mean()
        return F.cross_entropy(logits, labels), {"accuracy": accuracy}

    def evaluate(self, model: nn.Module, device: torch.device) -> tuple[dict[str, Any], dict[str, str]]:
        """Loss and accuracy on all test texts, and the measures of the orders."""
        texts = self.texts.held_out
        by_length = np.argsort(texts.lengths, kind="stable")
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for start in range(0, len(texts), EVALUATION_BATCH):
            indices = by_length[start : start + EVALUATION_BATCH]
            ids, lengths = (torch.from_numpy(array).to(device) for array in texts.padded(indices))
            labels = torch.from_numpy(texts.labels[indices]).to(device)
            logits = model(ids, lengths).float()
            loss = F.cross_entropy(logits, labels, reduction="sum").double()
            sums += torch.stack([loss, (logits.argmax(dim=1) == labels).sum().double()])
        loss, correct = (sums / len(texts)).tolist()
        measures: dict[str, Any] = {"loss": loss, "accuracy": correct}
        orders = self._orders(model, device)
        return (measures | {"orders": orders} if orders else measures), {}

    def _orders(self, model: nn.Module, device: torch.device) -> dict[str, dict[str, float]]:
        """Means over texts that are spread over the test texts, each by itself, so without padding."""
        texts = self.texts.held_out
        spread = np.linspace(0, len(texts) - 1, min(MEASURED_TEXTS, len(texts))).astype(np.int64)
        found = []
        for index in spread:
            measured = measure_orders(model, torch.from_numpy(texts.padded(np.array([index]))[0]).to(device))
            if not measured:
                return {}
            found.append(measured)
        return {
            module: {key: float(np.mean([one[module][key] for one in found])) for key in found[0][module]}
            for module in found[0]
        }


@functools.lru_cache(maxsize=2)
def _batches(lengths: bytes, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """(steps, batch_size) the texts of each batch of an epoch: of similar length, in an order of the epoch's own.

    The texts are shuffled and dealt to pools; a pool is sorted by length and cut into batches, and the batches of all
    pools are shuffled.
    """
    draw = np.random.default_rng([seed, _ORDER, epoch])
    sizes = np.frombuffer(lengths, np.int64)
    order = draw.permutation(len(sizes))
    order = order[: len(order) // batch_size * batch_size]
    pools = [order[i : i + _POOL * batch_size] for i in range(0, len(order), _POOL * batch_size)]
    rows = [pool[np.argsort(sizes[pool], kind="stable")].reshape(-1, batch_size) for pool in pools]
    return draw.permutation(np.concatenate(rows))


@dataclass(frozen=True)
class TextTasks:
    """The task of (arm, seed): what a study asks for. Can be pickled."""

    texts: Texts
    config: TextConfig

    def __call__(self, arm: str, seed: int) -> TextTask:
        return TextTask(self.texts, self.config, resolve_arm(arm), seed)


def block_of(module: str) -> str:
    """``backbone.layers.2.mixer.order`` as a reader counts: block 3."""
    return f"block {int(module.split('.')[2]) + 1}"
