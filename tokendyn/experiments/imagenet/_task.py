"""Image classification as a task of the trainer, with the measures of what the orders do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendyn._layers import OrderConfig
from tokendyn.backends.torch import models
from tokendyn.backends.torch.layers import record_orders
from tokendyn.errors import DataError, OptionError
from tokendyn.experiments._trainer import Batch
from tokendyn.experiments.imagenet._arms import resolve_arm
from tokendyn.experiments.imagenet._batches import training_batch
from tokendyn.experiments.imagenet._config import ImageNetConfig
from tokendyn.experiments.imagenet._images import Images, ImageSet

# Mean and deviation of ImageNet's channels: the customary scale of inputs, used for all data here.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)

EVALUATION_BATCH = 256
MEASURED_IMAGES = 128  # held-out images on which the orders are measured


class ImageTask:
    """MambaVision on an image set, with one order and one seed (:class:`~.._trainer.Task`).

    Args:
        images: the data.
        config: the study's configuration.
        order: the arm.
        seed: decides the order of the data, crops and mirrors.
    """

    def __init__(self, images: Images, config: ImageNetConfig, order: OrderConfig | None, seed: int) -> None:
        self.images, self.config, self.order, self.seed = images, config, order, seed
        if len(images.train) < config.train.batch_size:
            raise OptionError(
                f"--batch-size is {config.train.batch_size}, but there are only {len(images.train)} training images; "
                f"choose a smaller one"
            )

    @property
    def steps_per_epoch(self) -> int:
        return len(self.images.train) // self.config.train.batch_size

    def build_model(self) -> nn.Module:
        options = self.config.model
        return getattr(models, options.model)(
            num_classes=len(self.images.classes),
            drop_path_rate=options.drop_path,
            parity=options.parity,
            order=self.order,
        )

    def batch(self, step: int) -> Batch:
        data = self.config.data
        pixels, labels, skipped = training_batch(
            self.images.train,
            step,
            batch_size=self.config.train.batch_size,
            seed=self.seed,
            padding=data.crop_padding,
            flip=data.flip,
        )
        return Batch({"pixels": torch.from_numpy(pixels), "labels": torch.from_numpy(labels)}, skipped)

    def loss(self, model: Callable[..., Any], tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(to_input(tensors["pixels"])).float()
        labels = tensors["labels"]
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.model.label_smoothing)
        return loss, {"accuracy": (logits.detach().argmax(dim=1) == labels).float().mean()}

    def evaluate(self, model: nn.Module, device: torch.device) -> tuple[dict[str, Any], dict[str, str]]:
        """Held-out loss and accuracy (top-5 too where there are more than 10 classes), and the orders' measures."""
        held_out = self.images.held_out
        top = 5 if len(self.images.classes) > 10 else 1
        skipped: dict[str, str] = {}
        loss = correct = among_top = count = 0.0
        for start in range(0, len(held_out), EVALUATION_BATCH):
            indices = np.arange(start, min(start + EVALUATION_BATCH, len(held_out)))
            pixels, labels = _readable(held_out, indices, skipped)
            if not len(labels):
                continue
            targets = torch.from_numpy(labels).to(device)
            logits = model(to_input(torch.from_numpy(pixels).to(device))).float()
            loss += F.cross_entropy(logits, targets, reduction="sum").item()
            hits = logits.topk(top, dim=1).indices == targets[:, None]
            correct += hits[:, 0].sum().item()
            among_top += hits.sum().item()
            count += len(labels)
        if not count:
            raise DataError(f"none of the {len(held_out)} held-out images can be read; {next(iter(skipped.values()))}")
        measures: dict[str, Any] = {"loss": loss / count, "accuracy": correct / count}
        if top > 1:
            measures["accuracy_top5"] = among_top / count
        orders = self._measure_orders(model, device)
        return (measures | {"orders": orders} if orders else measures), skipped

    def _measure_orders(self, model: nn.Module, device: torch.device) -> dict[str, dict[str, float]]:
        """By ordering module: tokens, effective tokens averaged, variance kept, deviation of the scores."""
        held_out = self.images.held_out
        spread = np.linspace(0, len(held_out) - 1, min(MEASURED_IMAGES, len(held_out))).astype(np.int64)
        pixels, _ = _readable(held_out, spread, {})
        with record_orders(model) as records:
            if not records:
                return {}
            model(to_input(torch.from_numpy(pixels).to(device)))
        return {
            name: {
                "tokens": record.order.scores.shape[1],
                "effective_tokens": record.effective_tokens.mean().item(),
                "variance_kept": record.variance_kept.mean().item(),
                "score_deviation": record.order.scores.std(dim=1, correction=0).mean().item(),
            }
            for name, (record, *_) in ((name, found) for name, found in records.items() if found)
        }


@dataclass(frozen=True)
class ImageTasks:
    """The task of (arm, seed): what a study asks for. Can be pickled."""

    images: Images
    config: ImageNetConfig

    def __call__(self, arm: str, seed: int) -> ImageTask:
        return ImageTask(self.images, self.config, resolve_arm(arm), seed)


def stage_of(module: str) -> str:
    """``levels.2.blocks.0.mixer.order`` as readers of the papers call it: stage 3."""
    parts = module.split(".")
    stage = f"stage {int(parts[1]) + 1}"
    return stage if parts[3] == "0" else f"{stage} block {int(parts[3]) + 1}"


def to_input(pixels: Tensor) -> Tensor:
    """(b, H, W, 3) uint8 pixels as the model's input (b, 3, H, W), of about mean 0 and deviation 1."""
    mean = torch.tensor(MEAN, device=pixels.device)
    deviation = torch.tensor(DEVIATION, device=pixels.device)
    return ((pixels / 255 - mean) / deviation).permute(0, 3, 1, 2)


def _readable(images: ImageSet, indices: np.ndarray, skipped: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels of those ``indices`` that can be read; the others are entered into ``skipped``."""
    pixels, problems = images.read(indices)
    skipped.update({images.names[indices[k]]: reason for k, reason in problems.items()})
    kept = np.array([k not in problems for k in range(len(indices))])
    return pixels[kept], images.labels[indices[kept]]
