"""The parts of a configuration that every experiment has, and what is done with a resolved one.

A configuration is a frozen dataclass of frozen dataclasses; a preset is a function that returns a complete
one. Field names are unique across the parts, so every field is one flag: ``learning_rate`` is
``--learning-rate``. The docstrings below are the help text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import tyro

from tokendyn.errors import OptionError

C = TypeVar("C")


class Presets(dict[str, Callable[[], C]]):
    """A study's presets by name: functions that return a complete configuration."""

    def enter(self, function: Callable[[], C]) -> Callable[[], C]:
        """Decorator: a preset has its function's name."""
        self[function.__name__] = function
        return function


@dataclass(frozen=True)
class TrainConfig:
    """Optimiser, schedule, and how often something is written. A step is one update."""

    epochs: int = 10
    """Passes over the training data."""
    steps: int | None = None
    """Train so many steps instead; the schedule is stretched or shrunk to them."""
    batch_size: int = 64
    """Training examples in one step."""
    learning_rate: float = 1e-3
    """Peak of the learning rate: linear warm-up to it, cosine decay from it (AdamW)."""
    initial_learning_rate: float = 0.0
    """Learning rate from which the warm-up starts."""
    final_learning_rate: float = 1e-5
    """Learning rate at the last step."""
    warmup: float = 0.05
    """Part of all steps spent on the warm-up, 0 to 1."""
    weight_decay: float = 0.05
    """Weight decay of matrices; vectors, biases and what a layer exempts have none."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.999
    """AdamW's decay of the mean squared gradient."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 leaves it as it is."""
    ema_decay: float = 0.0
    """Evaluate an exponential moving average of the weights with this decay a step; 0 does without."""
    log_every: int = 20
    """Steps between two lines on the training loss."""
    evaluate_every: int = 200
    """Steps between two evaluations on held-out data; the first and last step are always evaluated."""
    checkpoint_every: int = 200
    """Steps between two checkpoints; the last step always has one."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""

    def __post_init__(self) -> None:
        expect_at_least(self, 1, "epochs", "batch_size", "log_every", "evaluate_every", "checkpoint_every")
        expect_at_least(self, 1, "keep_checkpoints", "steps")
        expect_at_least(
            self, 0, "learning_rate", "initial_learning_rate", "final_learning_rate", "weight_decay", "clip_norm"
        )
        expect_within(self, 0, 1, "warmup", "beta1", "beta2", "ema_decay")


@dataclass(frozen=True)
class ComputeConfig:
    """Where and in what precision it is computed. Part of the result: bits depend on it."""

    device: str = "auto"
    """cpu, cuda, cuda:1, ... or auto: a GPU if there is one."""
    threads: int = 2
    """CPU threads. Fixed, because sums over another number of threads round differently."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products and activations (autocast); weights and optimiser stay float32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    cuda_graphs: bool = False
    """Replay training steps from CUDA graphs, which no longer wait for the host; for GPUs, and steps that are alike."""
    channels_last: bool = False
    """Keep images with channels last in memory: faster convolutions on GPUs."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With torchrun: a whole model in each process, or (FSDP2, for large models) a part."""
    sync_batch_norm: bool = True
    """With torchrun on GPUs: batch normalisation sees the batches of all processes, as one process would; off: each its
    own, as the public image recipes have it."""
    deterministic: bool = True
    """Allow only algorithms that give the same bits every time, where torch has them."""

    def __post_init__(self) -> None:
        expect_at_least(self, 1, "threads")


@dataclass(frozen=True)
class RunConfig:
    """Where results go. Nothing here changes them, so a run may be continued with other values."""

    out: str | None = None
    """Folder of the run; by default a new one under runs/, named after the preset."""
    resume: Literal["never", "auto"] = "never"
    """auto: continue what is in the folder, exactly, or start if nothing is."""
    jobs: int | None = 1
    """Runs trained at the same time, each in a process of its own, on all visible GPUs in turn. None: three for each
    GPU (for models that cannot fill one), one on a CPU."""
    workers: int = 0
    """Processes that prepare the batches of a run; 0 does it where it is trained."""
    log_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Tell the metrics to these too. One that fails is left behind; the training goes on."""
    max_minutes: float | None = None
    """Save and stop after so many minutes, with exit code 142; --resume auto goes on."""
    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the resolved configuration as JSON and stop."""

    def __post_init__(self) -> None:
        expect_at_least(self, 1, "jobs")
        expect_at_least(self, 0, "workers", "max_minutes")


def expect_at_least(config: Any, smallest: float, *names: str) -> None:
    """The named fields of ``config`` (None passes) are numbers of at least ``smallest``."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not smallest <= value < float("inf"):
            raise OptionError(f"{flag(name)} is {value}, expected at least {smallest}")


def expect_within(config: Any, smallest: float, largest: float, *names: str) -> None:
    """The named fields of ``config`` lie from ``smallest`` to ``largest``."""
    for name in names:
        value = getattr(config, name)
        if not smallest <= value <= largest:
            raise OptionError(f"{flag(name)} is {value}, expected {smallest} to {largest}")


def expect_arms_and_seeds(config: Any) -> None:
    """A study has arms and seeds, each once, and seeds that every generator takes."""
    for name in ("arms", "seeds"):
        values = getattr(config, name)
        if not values or len(set(values)) != len(values):
            raise OptionError(f"--{name} is {' '.join(map(str, values)) or 'empty'}, expected one or more, each once")
    if min(config.seeds) < 0 or max(config.seeds) >= 2**63:
        raise OptionError(f"--seeds is {' '.join(map(str, config.seeds))}, expected 0 to 2^63 - 1")


def flag(name: str) -> str:
    """The command line's flag of a field."""
    return "--" + name.replace("_", "-")


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as nested dictionaries and lists of JSON's types."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value

    return plain(dataclasses.asdict(config))


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, one line each: ``train.batch_size: 64 in the folder, 32 asked for``."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in [*old, *(key for key in new if key not in old)]:
            inner = f"{path}.{key}" if path else key
            if key not in new:
                lines.append(f"{inner}: {old[key]!r} in the folder, unknown here")
            elif key not in old:
                lines.append(f"{inner}: not in the folder, {new[key]!r} asked for")
            else:
                lines.extend(differences(old[key], new[key], inner))
        return lines
    return [] if old == new else [f"{path}: {old!r} in the folder, {new!r} asked for"]
