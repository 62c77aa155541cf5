"""The image study trained in JAX.

The same images, batches, crops, models, optimiser and schedule as ``python -m tokendyn.experiments.imagenet``, in a
loop small enough to read: what a training in JAX needs, and a check of one framework by the other. No checkpoints.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tokendyn.backends.jax import models
from tokendyn.errors import OptionError
from tokendyn.experiments._config import TrainConfig
from tokendyn.experiments._optim import learning_rate
from tokendyn.experiments._order_arms import Arm, resolve_arm
from tokendyn.experiments._trainer import total_steps
from tokendyn.experiments.imagenet._config import PRESETS, ImageNetConfig
from tokendyn.experiments.imagenet._images import Images, ImageSet
from tokendyn.experiments.imagenet._run import load_images
from tokendyn.experiments.imagenet._task import DEVIATION, EVALUATION_BATCH, MEAN, ImageTask

Batch = tuple[np.ndarray, np.ndarray]  # pixels (b, H, W, 3) uint8, labels (b,)


def make_optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """AdamW as the torch trainer has it: matrices decay, vectors and the decay rates of a scan do not."""
    rates = jnp.asarray([learning_rate(step, steps, config) for step in range(steps)], jnp.float32)

    def decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, p: p.ndim > 1 and "A_log" not in jax.tree_util.keystr(path), params
        )

    adamw = optax.adamw(
        lambda count: rates[jnp.minimum(count, steps - 1)],
        config.beta1,
        config.beta2,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw


def to_input(pixels: jax.Array) -> jax.Array:
    """(b, H, W, 3) uint8 pixels as the model's input (b, 3, H, W), of about mean 0 and deviation 1."""
    scaled = (pixels.astype(jnp.float32) / 255 - jnp.asarray(MEAN, jnp.float32)) / jnp.asarray(DEVIATION, jnp.float32)
    return scaled.transpose(0, 3, 1, 2)


class Training:
    """One model in training, whole on every device of a mesh; each batch is divided among them.

    What a step computes is that of one device: the loss and the batch statistics are means over the whole batch, and
    the compiler adds the communication.

    Args:
        model: in training mode.
        optimizer: of its parameters.
        devices: some devices, whose number divides the batch size.
        label_smoothing: part of the target spread over all classes.
    """

    def __init__(
        self,
        model: nnx.Module,
        optimizer: optax.GradientTransformation,
        devices: list[Any],
        label_smoothing: float = 0.0,
    ) -> None:
        mesh = Mesh(np.array(devices), ("data",))
        self._whole = NamedSharding(mesh, PartitionSpec())
        self._divided = NamedSharding(mesh, PartitionSpec("data"))
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        self.state = jax.device_put((params, rest, optimizer.init(params)), self._whole)
        self._static = graph, optimizer, label_smoothing

    def step(self, batch: Batch) -> jax.Array:
        """One update; the loss before it."""
        self.state, loss = _update(self._static, self.state, *jax.device_put(batch, self._divided))
        return loss

    def logits(self, pixels: np.ndarray) -> jax.Array:
        """Of images, in evaluation mode."""
        return _evaluate(self._static, self.state, jax.device_put(pixels, self._divided))


# Compiled by what is static, so that runs which differ in their seed share the code.
@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _update(static: Any, state: Any, pixels: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array]:
    graph, optimizer, label_smoothing = static
    params, rest, moments = state

    def loss(params: Any) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, params, rest, copy=True)
        logits = model(to_input(pixels)).astype(jnp.float32)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[1]), label_smoothing)
        return optax.softmax_cross_entropy(logits, targets).mean(), nnx.state(model, nnx.Not(nnx.Param))

    (value, rest), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    updates, moments = optimizer.update(gradients, moments, params)
    return (optax.apply_updates(params, updates), rest, moments), value


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(static: Any, state: Any, pixels: jax.Array) -> jax.Array:
    graph, _, _ = static
    params, rest, _ = state
    model = nnx.merge(graph, params, rest, copy=True)
    model.eval()
    return model(to_input(pixels)).astype(jnp.float32)


def batches(images: ImageSet) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All images in batches of one size, and their labels; the last batch repeats its last image."""
    for start in range(0, len(images), EVALUATION_BATCH):
        indices = np.arange(start, min(start + EVALUATION_BATCH, len(images)))
        filled = np.concatenate([indices, np.full(EVALUATION_BATCH - len(indices), indices[-1])])
        pixels, unreadable = images.read(filled)
        if unreadable:
            raise OptionError(f"an image cannot be read: {next(iter(unreadable.values()))}")
        yield pixels, images.labels[indices]


def train(
    config: ImageNetConfig,
    images: Images,
    arm: str,
    seed: int,
    optimizer: optax.GradientTransformation,
    devices: list[Any],
    log: Callable[[str], None],
) -> dict[str, float]:
    """Train one model; its held-out loss and accuracy, and the seconds that it took, compilation included.

    Raises:
        OptionError: no such arm, or one with a schedule of the temperature.
    """
    resolved = _resolve(arm)
    task = ImageTask(images, config, resolved, seed)
    options = config.model
    model = getattr(models, options.model)(
        num_classes=len(images.classes),
        drop_path_rate=options.drop_path,
        parity=options.parity,
        order=resolved.order,
        rngs=nnx.Rngs(seed),
    )
    steps = total_steps(task, config.train)
    training = Training(model, optimizer, devices, options.label_smoothing)
    start = time.perf_counter()
    for step in range(steps):
        tensors = task.batch(step).tensors
        loss = training.step((tensors["pixels"].numpy(), tensors["labels"].numpy().astype(np.int32)))
        if (step + 1) % config.train.log_every == 0 or step + 1 == steps:
            log(f"{arm}, seed {seed}: step {step + 1} of {steps}, loss {float(loss):.4f}")
    loss_sum, correct = 0.0, 0
    for pixels, labels in batches(images.held_out):
        logits = np.asarray(training.logits(pixels))[: len(labels)].astype(np.float64)
        chosen = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        loss_sum += float((np.logaddexp.reduce(logits, axis=1) - chosen).sum())
        correct += int((logits.argmax(1) == labels).sum())
    count = len(images.held_out)
    return {"loss": loss_sum / count, "accuracy": correct / count, "seconds": time.perf_counter() - start}


def _resolve(name: str) -> Arm:
    """The arm of that name, unless it has a schedule of the temperature, which would compile every step anew."""
    arm = resolve_arm(name)
    if arm.final_tau is not None:
        raise OptionError(f"{name}: a schedule of tau is not for JAX, where each value is compiled anew")
    return arm


def command(arguments: list[str]) -> None:
    """Parse ``arguments``, train, and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m tokendyn.experiments.imagenet.jax",
        description="Train the image study's models in JAX, on the same images, batches and schedule as in torch.",
    )
    parser.add_argument("--preset", default="demo", choices=sorted(PRESETS), help="as for the torch command")
    parser.add_argument("--data-dir", help="folder that holds train/CLASS/* and val/CLASS/*; the demo needs none")
    parser.add_argument("--arms", nargs="+", default=["baseline", "sorted"], help="orders to compare")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run of every arm for each")
    parser.add_argument("--epochs", type=int, help="instead of the preset's")
    parser.add_argument("--devices", type=int, default=1, help="divide each batch among so many")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args(arguments)
    arms = [_resolve(arm) for arm in given.arms]  # what is wrong is said before the arms ahead of it are trained
    config = PRESETS[given.preset]()
    training = dataclasses.replace(config.train, epochs=given.epochs or config.train.epochs)
    data = dataclasses.replace(config.data, data_dir=given.data_dir)
    config = dataclasses.replace(config, data=data, train=training)
    devices = jax.devices()
    if not 1 <= given.devices <= len(devices) or config.train.batch_size % given.devices:
        raise OptionError(
            f"--devices is {given.devices}, expected 1 to {len(devices)} and a divisor of the batch size "
            f"{config.train.batch_size}"
        )
    images = load_images(given.preset, config)
    print(
        f"{given.preset}: {len(images.train)} training and {len(images.held_out)} held-out images, JAX on {devices[0]}"
    )
    optimizer = make_optimizer(config.train, total_steps(ImageTask(images, config, arms[0], 0), config.train))
    devices = devices[: given.devices]
    log = functools.partial(print, file=sys.stderr)
    results = {
        arm: [train(config, images, arm, seed, optimizer, devices, log) for seed in given.seeds] for arm in given.arms
    }
    print(f"{'arm':20}{'accuracy %':>12}{'deviation':>11}{'loss':>9}{'seconds':>9}")
    for arm, runs in results.items():
        accuracies = [100 * run["accuracy"] for run in runs]
        deviation = f"{statistics.stdev(accuracies):.2f}" if len(runs) > 1 else "-"
        loss, seconds = (statistics.mean(run[key] for run in runs) for key in ("loss", "seconds"))
        print(f"{arm:20}{statistics.mean(accuracies):12.2f}{deviation:>11}{loss:9.4f}{seconds:9.1f}")
    if given.json:
        about = {"jax": jax.__version__, "device": str(devices[0]), "devices": given.devices, "seeds": given.seeds}
        given.json.write_text(json.dumps({"preset": given.preset, **about, "results": results}, indent=2) + "\n")
