"""Image classification as a task of the trainer, with the measures of what the orders do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tokendyn.backends.torch import models
from tokendyn.backends.torch.layers import record_orders
from tokendyn.errors import DataError, OptionError
from tokendyn.experiments._distributed import Group, current_group
from tokendyn.experiments._order_arms import Arm, resolve_arm
from tokendyn.experiments._order_measures import measure_orders
from tokendyn.experiments._signals import leave_signals_to_parent
from tokendyn.experiments._task import Batch
from tokendyn.experiments.imagenet._batches import Augmentation, crop, plan_batch, readable_batch
from tokendyn.experiments.imagenet._config import ImageNetConfig
from tokendyn.experiments.imagenet._images import Images, ImageSet
from tokendyn.experiments.imagenet._measures import (
    expected_places,
    measure_mechanism,
    shuffled_orders,
)
from tokendyn.experiments.imagenet._timm import augment, mix, timm_data

# Mean and deviation of ImageNet's channels: the customary scale of inputs, used for all data here.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)

EVALUATION_BATCH = 256
MEASURED_IMAGES = 128  # held-out images on which the orders are measured
EXAMPLES = 6  # held-out images whose order maps are drawn


class ImageTask:
    """MambaVision on an image set, with one arm and one seed (:class:`~.._trainer.Task`).

    Args:
        images: the data.
        config: the study's configuration.
        arm: the order, and its schedule.
        seed: decides the order of the data, crops and mirrors.
    """

    def __init__(self, images: Images, config: ImageNetConfig, arm: Arm, seed: int) -> None:
        self.images, self.config, self.arm, self.seed = images, config, arm, seed
        if config.model.eval_only is None and len(images.train) < config.train.batch_size:
            raise OptionError(
                f"--batch-size is {config.train.batch_size}, but there are only {len(images.train)} training images; "
                f"choose a smaller one"
            )
        if config.data.on_device and images.train.pixels is None:
            raise OptionError("--on-device was given, but the images do not fit into --cache-mb; raise it")
        if config.model.eval_only is None and (
            config.data.augment == "timm" or config.data.mixup or config.data.cutmix
        ):
            timm_data()  # what is missing is said before the training
        self._resident: Tensor | None = None

    @property
    def steps_per_epoch(self) -> int:
        return len(self.images.train) // self.config.train.batch_size

    def build_model(self) -> nn.Module:
        options = self.config.model
        return getattr(models, options.model)(
            num_classes=len(self.images.classes),
            drop_path_rate=options.drop_path,
            parity=options.parity,
            order=self.arm.order,
        )

    def set_progress(self, model: nn.Module, progress: float) -> None:
        """Set the temperature that the arm's schedule asks for."""
        self.arm.set_progress(model, progress)

    @property
    def _augmentation(self) -> Augmentation:
        data = self.config.data
        return Augmentation(data.crop_padding, data.flip, data.crop_area)

    def batch(self, step: int) -> Batch:
        return self.batch_part(step, slice(None))

    def batch_part(self, step: int, part: slice) -> Batch:
        train, augmentation = self.images.train, self._augmentation
        indices, crops = plan_batch(
            train, step, batch_size=self.config.train.batch_size, seed=self.seed, augmentation=augmentation
        )
        indices, crops = indices[part], crops[part]
        if self.config.data.augment == "timm":
            return self._augmented(step // self.steps_per_epoch, indices)
        if self.config.data.on_device and not train.unreadable:
            tensors = {"indices": torch.from_numpy(indices), "crops": torch.from_numpy(crops)}
            return Batch(tensors | {"labels": torch.from_numpy(train.labels[indices])})
        pixels, indices, skipped = readable_batch(train, indices)
        cut = crop(torch.from_numpy(pixels), torch.from_numpy(crops), augmentation.padding)
        return Batch({"pixels": cut, "labels": torch.from_numpy(train.labels[indices])}, skipped)

    def _augmented(self, epoch: int, indices: np.ndarray) -> Batch:
        """Images as timm's chain makes them; one that cannot be read is replaced by its successor."""
        data, train, skipped = self.config.data, self.images.train, {}
        pixels, labels = np.zeros((len(indices), data.image_size, data.image_size, 3), np.uint8), []
        for place, index in enumerate(indices.tolist()):
            for distance in range(len(train)):
                taken = (index + distance) % len(train)
                try:
                    image = train.open(taken)
                except DataError as problem:
                    skipped[train.names[taken]] = str(problem)
                    continue
                break
            else:
                raise DataError(f"none of the {len(train)} training images can be read; {next(iter(skipped.values()))}")
            pixels[place] = augment(
                image,
                (self.seed, epoch, index),
                size=data.image_size,
                rand_augment=data.rand_augment,
                color_jitter=data.color_jitter,
                smallest_area=data.crop_area,
                flip=data.flip,
            )
            labels.append(train.labels[taken])
        return Batch({"pixels": torch.from_numpy(pixels), "labels": torch.tensor(labels)}, skipped)

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """``inputs``, ``labels`` and ``targets``: the images as the model wants them, cut out and mixed."""
        labels = tensors["labels"]
        if "pixels" in tensors:
            pixels = tensors["pixels"]
        else:
            pixels = crop(
                self._pixels_on(labels.device)[tensors["indices"]], tensors["crops"], self._augmentation.padding
            )
        data = self.config.data
        inputs, targets = to_input(pixels), labels
        if data.mixup or data.cutmix:  # the targets that come back are smooth already
            inputs, targets = mix(
                inputs,
                labels,
                mixup=data.mixup,
                cutmix=data.cutmix,
                smoothing=self.config.model.label_smoothing,
                classes=len(self.images.classes),
            )
        return {"inputs": inputs, "targets": targets, "labels": labels}

    def steps_differ(self) -> str | None:
        """An arm's temperature may move with the steps."""
        return None if self.arm.final_tau is None else "the temperature of this arm moves"

    def loss(self, model: Callable[..., Any], tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        labels, targets = tensors["labels"], tensors["targets"]
        logits = model(tensors["inputs"]).float()
        smoothing = 0.0 if targets.is_floating_point() else self.config.model.label_smoothing
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        return loss, {"accuracy": (logits.detach().argmax(dim=1) == labels).float().mean()}

    def _pixels_on(self, device: torch.device) -> Tensor:
        """All training images on the device, brought there once."""
        if self._resident is None or self._resident.device != device:
            assert self.images.train.pixels is not None
            self._resident = torch.from_numpy(self.images.train.pixels).to(device)
        return self._resident

    def evaluate(self, model: nn.Module, device: torch.device) -> tuple[dict[str, Any], dict[str, str]]:
        """Held-out loss and accuracy (top-5 too where there are more than 10 classes), and the orders' measures; with
        ``--mechanism`` those of :func:`~._measures.measure_mechanism` and the accuracy with shuffled orders."""
        measures, skipped = self.held_out(model, device)
        pixels, labels = self._measured(device)
        if not self.config.data.mechanism:
            orders = measure_orders(model, to_input(pixels))
            return (measures | {"orders": orders} if orders else measures), skipped
        with shuffled_orders(model, self.seed):
            measures["accuracy_shuffled"] = self.held_out(model, device)[0]["accuracy"]
        found = measure_mechanism(model, to_input(pixels), labels)
        return measures | {key: value for key, value in found.items() if value}, skipped

    def held_out(self, model: nn.Module, device: torch.device) -> tuple[dict[str, Any], dict[str, str]]:
        """Loss and accuracy, top-5 too where there are more than 10 classes; several processes share the images."""
        images, group = self.images.held_out, current_group()
        top = 5 if len(self.images.classes) > 10 else 1
        skipped: dict[str, str] = {}
        sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, hits, hits among the top, images
        workers = self.config.run.workers if images.pixels is None else 0
        for pixels, labels, unreadable in DataLoader(
            _HeldOut(images, group),
            batch_size=None,
            num_workers=workers,
            worker_init_fn=leave_signals_to_parent,
            generator=torch.Generator(),  # or the loader would draw from the global generator
        ):
            skipped |= unreadable
            if not len(labels):
                if group.size > 1:  # FSDP2's processes must go through the model together
                    model(to_input(pixels.new_zeros(1, *pixels.shape[1:]).to(device)))
                continue
            logits, targets = model(to_input(pixels.to(device))).float(), labels.to(device)
            hits = logits.topk(top, dim=1).indices == targets[:, None]
            loss = F.cross_entropy(logits, targets, reduction="sum")
            sums += torch.stack([loss.double(), hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels), device=device)])
        loss, correct, among_top, count = group.sum(sums).tolist()
        if not count:
            raise DataError(f"none of the {len(images)} held-out images can be read; {next(iter(skipped.values()))}")
        measures: dict[str, Any] = {"loss": loss / count, "accuracy": correct / count}
        if top > 1:
            measures["accuracy_top5"] = among_top / count
        return measures, skipped

    def _measured(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Pixels and labels of the images that orders are measured on: spread over all held-out ones."""
        held_out = self.images.held_out
        spread = np.linspace(0, len(held_out) - 1, min(MEASURED_IMAGES, len(held_out))).astype(np.int64)
        pixels, labels = _readable(held_out, spread, {})
        return torch.from_numpy(pixels).to(device), torch.from_numpy(labels).to(device)

    def keepsakes(self, model: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """Order maps of the first ordering block, for the figure: of example images, and means over classes.

        ``examples`` (EXAMPLES or fewer, H, W), ``classes`` (C, H, W), ``mean`` (H, W): the place in the scan to which
        each token goes; ``tokens``, ``effective_tokens``: in a sequence, and averaged by a place.
        """
        pixels, labels = self._measured(device)
        shown, _ = self.images.held_out.read(example_images(self.images))
        with torch.no_grad(), record_orders(model) as records:
            if not records:
                return {}
            model(to_input(torch.cat([torch.from_numpy(shown).to(device), pixels])))
        record = next((found[0] for found in records.values() if found), None)
        if record is None:  # an order for training only
            return {}
        maps = mosaic(expected_places(record.order), len(shown) + len(pixels)).float().cpu()
        measured, labels = maps[len(shown) :], labels.cpu()
        classes = [measured[labels == label].mean(dim=0) for label in labels.unique()]
        return {
            "examples": maps[: len(shown)].contiguous(),
            "classes": torch.stack(classes),
            "mean": measured.mean(dim=0),
            "tokens": torch.tensor(record.order.scores.shape[1]),
            "effective_tokens": record.effective_tokens.mean().cpu(),
        }


def example_images(images: Images) -> np.ndarray:
    """Held-out images for a figure: the first of each of the first :data:`EXAMPLES` classes."""
    labels = images.held_out.labels
    return np.array([np.flatnonzero(labels == label)[0] for label in np.unique(labels)[:EXAMPLES]])


def mosaic(values: Tensor, count: int) -> Tensor:
    """(count, H, W) from (count · windows, L): windows of side √L, laid row by row into a square."""
    side = math.isqrt(values.shape[1])
    across = math.isqrt(values.shape[0] // count)
    squares = values.reshape(count, across, across, side, side)
    return squares.transpose(2, 3).reshape(count, across * side, across * side)


class _HeldOut(Dataset["tuple[Tensor, Tensor, dict[str, str]]"]):
    """This process's batches of held-out images: pixels, labels, what cannot be read. Each process has as many."""

    def __init__(self, images: ImageSet, group: Group) -> None:
        self.images, self.group = images, group

    def __len__(self) -> int:
        return math.ceil(len(self.images) / (EVALUATION_BATCH * self.group.size))

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor, dict[str, str]]:
        start = min((place * self.group.size + self.group.rank) * EVALUATION_BATCH, len(self.images))
        indices = np.arange(start, min(start + EVALUATION_BATCH, len(self.images)))
        skipped: dict[str, str] = {}
        pixels, labels = _readable(self.images, indices, skipped)
        return torch.from_numpy(pixels), torch.from_numpy(labels), skipped


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
    kept = np.array([k not in problems for k in range(len(indices))], bool)
    return pixels[kept], images.labels[indices[kept]]
