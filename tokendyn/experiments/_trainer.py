"""The trainer: one model, one seed, from its first step to its last, in as many sittings as it takes.

What is trained is a :class:`Task`; the trainer owns the rest: optimiser, schedule, precision, random
states, metrics, checkpoints. A batch is a function of the step alone, so the data's position is the step,
and a run that was killed and continued ends with the same bits as one that was not (on a CPU, with the
same number of threads).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tokendyn.backends.torch.ops._engines import engines_taken
from tokendyn.errors import CheckpointError, NonFiniteError, OptionError, TokendynError
from tokendyn.experiments import _random
from tokendyn.experiments._checkpoint import Checkpoint, load_newest, save_checkpoint
from tokendyn.experiments._cli import Stopped
from tokendyn.experiments._config import ComputeConfig, TrainConfig
from tokendyn.experiments._distributed import (
    average_buffers,
    current_group,
    like,
    part_of,
    spread_model,
    whole,
)
from tokendyn.experiments._faults import faulty_parameters, first_faulty_output
from tokendyn.experiments._files import remove_unfinished, write_json, write_with
from tokendyn.experiments._graphs import GradientExchange, Recorded, expect_recordable
from tokendyn.experiments._loggers import Loggers
from tokendyn.experiments._moving_average import MovingAverage
from tokendyn.experiments._optim import (
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_rate,
)
from tokendyn.experiments._progress import Listener
from tokendyn.experiments._records import NoRecords, Records
from tokendyn.experiments._signals import StopRequest, leave_signals_to_parent
from tokendyn.experiments._task import KEEPSAKES, Alike, Batch, Divisible, Keeping, Scheduled, Task


class Trainer:
    """One run: a task trained with one seed into one folder.

    Args:
        task: what is trained.
        name: how messages call the run, for example ``"baseline, seed 0"``.
        seed: of initialisation, dropout and whatever else draws from the global generators.
        folder: of the run: ``metrics.jsonl``, ``timings.jsonl``, ``checkpoints/``, ``result.json``.
        train, compute: the configuration; ``compute.device`` resolved.
        workers: processes that prepare batches.
        progress: told of steps and evaluations.
        signals: asked after every step whether to stop.
        initialise_like: a task whose model, built with the same seed, gives its values to all parameters
            of the same name and shape: arms that differ in one part then start equal in all others.
        log_to: names of :data:`._loggers.LOGGERS` that are told the metrics too.
    """

    def __init__(
        self,
        task: Task,
        *,
        name: str,
        seed: int,
        folder: Path,
        train: TrainConfig,
        compute: ComputeConfig,
        workers: int,
        progress: Listener,
        signals: StopRequest,
        initialise_like: Task | None = None,
        log_to: Sequence[str] = (),
    ) -> None:
        self.log_to = log_to
        self.task, self.name, self.seed, self.folder = task, name, seed, folder
        self.train_config, self.compute = train, compute
        self.workers, self.progress, self.signals = workers, progress, signals
        self.device = torch.device(compute.device)
        self.total = total_steps(task, train)
        self.group = current_group()
        self.part = part_of(train.batch_size, self.group)
        if self.group.size > 1 and not isinstance(task, Divisible):
            raise OptionError(f"{type(task).__name__} trains in one process; start it without torchrun")
        if compute.parallel == "fsdp" and train.ema_decay:
            raise OptionError("--ema-decay cannot be had with --parallel fsdp; choose ddp, or 0")
        if compute.cuda_graphs:
            expect_recordable(task, self.device, self.group, compute)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.step = 0
        self.skipped: dict[str, str] = {}
        self._sums: dict[str, float] = {}
        self._summed = 0
        self._stops = [0] * self.group.size

        model = _build(task, seed, initialise_like).to(self.device)
        if compute.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model, self._forward = spread_model(model, self.device, self.group, compute)
        _random.seed_everything(seed + self.group.rank)  # each part of a batch with dropout of its own
        self.optimizer = make_optimizer(self.model, train, recordable=compute.cuda_graphs)
        self._differentiate, self._apply = self._make_gradients, self._apply_gradients
        self._exchange = GradientExchange(self.group)
        if compute.cuda_graphs:
            self._differentiate, self._apply = Recorded(self._make_new_gradients), Recorded(self._apply_gradients)
        self.average: MovingAverage | None = None
        if train.ema_decay:
            self.average = MovingAverage(self.model, train.ema_decay)

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that is evaluated: the moving average of the weights, if there is one."""
        return self.model if self.average is None else self.average.module

    def run(self) -> dict[str, Any]:
        """Train from the newest checkpoint, or from the start, to the last step; return ``result.json``.

        Raises:
            Stopped: a signal came; everything is saved.
            NonFiniteError: the loss or the gradient is NaN or infinite; the update was not made.
            CheckpointError: a checkpoint cannot be read or written.
        """
        if self.group.leads:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.folder)
            remove_unfinished(self._checkpoints)
        self.group.told(None)
        checkpoint = load_newest(self._checkpoints, self.progress.say)
        positions = {} if checkpoint is None else checkpoint.state["records"]
        records = Records if self.group.leads else NoRecords
        self.metrics = records(self.folder / "metrics.jsonl", positions.get("metrics"))
        self.timings = records(self.folder / "timings.jsonl", positions.get("timings"))
        log_to = self.log_to if self.group.leads else ()
        self.loggers = Loggers(log_to, self.folder, self.name, self.progress.say)
        try:
            if checkpoint is not None:
                self._restore(checkpoint)
            self.progress.start(self.name, self.total, self.step)
            if checkpoint is None:
                self._evaluate()
            return self._train()
        finally:
            self.metrics.close()
            self.timings.close()
            self.loggers.close()

    def _train(self) -> dict[str, Any]:
        config = self.train_config
        began, began_at = time.perf_counter(), self.step
        self.model.train()  # what evaluates it puts it back
        for batch in self._batches():
            if isinstance(batch, TokendynError):
                raise batch
            self._update(batch)
            self.step += 1
            self.progress.advance()
            last = self.step == self.total
            if last or self.step % config.log_every == 0:
                self._log_training()
                seconds = time.perf_counter() - began
                timing = {"step": self.step, "steps": self.step - began_at, "seconds": seconds, **self._memory()}
                self.timings.append(timing | {"engines": engines_taken()})
                began, began_at = time.perf_counter(), self.step
            if last or self.step % config.evaluate_every == 0:
                self._evaluate()
                began += self._evaluation_seconds
            stopping = self._stop_asked()
            if last or stopping is not None or self.step % config.checkpoint_every == 0:
                saving = time.perf_counter()
                self._save()
                began += time.perf_counter() - saving
            if stopping is not None and not last:
                raise Stopped(stopping, f"{self.name} stopped after step {self.step} of {self.total}; it is saved")
        self._keep()
        result = {
            "name": self.name,
            "seed": self.seed,
            "steps": self.step,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "held_out": self._held_out,
            "skipped": self.skipped,
        }
        if self.group.leads:
            write_json(self.folder / "result.json", result)
        self.group.told(None)
        return result

    def _stop_asked(self) -> int | None:
        """The signal that any of the processes got: they stop together."""
        return self.signals.received if self.group.size == 1 else max(self._stops) or None

    def _batches(self) -> Iterator[Batch | TokendynError]:
        loader = DataLoader(
            _Steps(self.task, self.step, self.total, self.part if self.group.size > 1 else None),
            batch_size=None,  # one item is one whole batch
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=leave_signals_to_parent,
            generator=torch.Generator(),  # or the loader would draw from the global generator
        )
        return iter(loader)

    def _update(self, batch: Batch) -> None:
        self._note_skipped(batch.skipped)
        set_rate(self.optimizer, learning_rate(self.step, self.total, self.train_config))
        self._set_progress(self.model)
        tensors = {key: value.to(self.device, non_blocking=True) for key, value in batch.tensors.items()}
        prepared = self._prepare(tensors)
        loss, logged = self._differentiate(prepared)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        if self.compute.cuda_graphs:
            self._exchange(gradients)
        norm = nn.utils.get_total_norm(gradients)
        values = self._gather({"loss": loss, "gradient_norm": whole(norm), **logged})
        self._expect_finite(values, tensors, prepared)
        self._apply({"norm": norm})
        if not self.compute.cuda_graphs:  # whose gradients keep their memory
            self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.count()
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        self._summed += 1

    def _prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not isinstance(self.task, Alike):
            return tensors
        with self._autocast(), self._named():
            return self.task.prepare(tensors)

    def _make_gradients(self, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, what else is logged, and every parameter's gradient, added to what it has."""
        with self._autocast(), self._named():
            loss, logged = self.task.loss(self._forward, tensors)
        loss.backward()
        return loss.detach(), {key: value.detach() for key, value in logged.items()}

    def _make_new_gradients(self, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The same where the gradients of the last step are still there: in memory of their own, to be written anew."""
        self.optimizer.zero_grad(set_to_none=True)
        return self._make_gradients(tensors)

    def _apply_gradients(self, tensors: dict[str, Tensor]) -> None:
        if self.train_config.clip_norm:
            parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
            nn.utils.clip_grads_with_norm_(parameters, self.train_config.clip_norm, tensors["norm"])
        self.optimizer.step()
        if self.average is not None:
            self.average.blend(self.model)

    def _gather(self, measured: dict[str, Tensor]) -> dict[str, float]:
        """Means over all processes, by one transfer a step: all that must be known before the update, or is logged. The
        signals that the processes have got come with it."""
        vector = torch.stack([value.detach().to(self.device, torch.float64) for value in measured.values()])
        size = self.group.size
        if size == 1:
            return dict(zip(measured, vector.tolist(), strict=True))
        signals = vector.new_zeros(size)
        signals[self.group.rank] = self.signals.received or 0
        found = self.group.sum(torch.cat([vector / size, signals])).tolist()
        self._stops = [int(number) for number in found[-size:]]
        return dict(zip(measured, found, strict=False))

    def _set_progress(self, model: nn.Module) -> None:
        if isinstance(self.task, Scheduled):
            self.task.set_progress(model, self.step / self.total)

    def _keep(self) -> None:
        if not isinstance(self.task, Keeping):
            return
        with self._evaluating() as model:
            kept = self.task.keepsakes(model, self.device)
        if self.group.leads:
            write_with(self.folder / KEEPSAKES, lambda place: save_file(kept, place))

    def _memory(self) -> dict[str, int]:
        if self.device.type != "cuda":
            return {}
        return {"gpu_memory_bytes": torch.cuda.max_memory_allocated(self.device)}

    def _note_skipped(self, skipped: dict[str, str]) -> None:
        for name, reason in skipped.items():
            if name not in self.skipped:
                self.skipped[name] = reason
                self.progress.say(f"skipped: {reason}")

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Say in which run and step a non-finite value was met inside the model."""
        try:
            yield
        except NonFiniteError as error:
            raise NonFiniteError(f"{self.name}, after {self.step} of {self.total} steps: {error}") from error

    def _expect_finite(self, values: dict[str, float], tensors: dict[str, Tensor], prepared: dict[str, Tensor]) -> None:
        """Stop before the update if the loss or the gradient is not finite; say where it began, keep the batch."""
        if math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"]):
            return
        if not math.isfinite(values["loss"]):
            what, where = f"the loss is {values['loss']}", None
            if broken := faulty_parameters(self.model, gradients=False):
                where = f"the parameter {broken[-1]}"
            else:
                with self._autocast():
                    where = first_faulty_output(self.model, lambda: self.task.loss(self.model, prepared))
            found = f"first found in {where}" if where else "in a second pass no layer's output is, so the loss itself"
        else:
            what = f"the norm of the gradient is {values['gradient_norm']}"
            culprits = faulty_parameters(self.model, gradients=True)
            found = f"first found in {culprits[0]}, in {len(culprits)} parameters in all" if culprits else "an overflow"
        raise NonFiniteError(
            f"{self.name}, step {self.step + 1} of {self.total}: {what} ({found}); the update was not made. "
            f"{self._keep_batch(tensors)}. Lower --learning-rate, or look at this batch"
        )

    def _keep_batch(self, tensors: dict[str, Tensor]) -> str:
        process = f"-process-{self.group.rank}" if self.group.size > 1 else ""
        place = self.folder / f"non-finite-step-{self.step + 1:08d}{process}.safetensors"
        try:
            kept = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            write_with(place, lambda temporary: save_file(kept, temporary))
        except (OSError, SafetensorError) as cause:
            return f"The batch could not be kept ({cause})"
        return f"The batch is kept in {place}"

    def _log_training(self) -> None:
        means = {key: value / self._summed for key, value in self._sums.items()}
        rate = learning_rate(self.step - 1, self.total, self.train_config)
        self._record({"step": self.step, "split": "train", **means, "learning_rate": rate})
        self._sums, self._summed = {}, 0

    def _record(self, record: dict[str, Any]) -> None:
        self.metrics.append(record)
        self.loggers.log(self.step, record)

    def _evaluate(self) -> None:
        began = time.perf_counter()
        with self._evaluating() as model:
            self._held_out, skipped = self.task.evaluate(model, self.device)
        self._note_skipped(skipped)
        if not math.isfinite(self._held_out["loss"]):
            raise NonFiniteError(
                f"{self.name}, after {self.step} of {self.total} steps: the held-out loss is {self._held_out['loss']}"
            )
        self._evaluation_seconds = time.perf_counter() - began
        self._record({"step": self.step, "split": "held_out", **self._held_out})
        measures = self._held_out
        self.progress.evaluated(self.name, self.step, self.total, measures["loss"], measures.get("accuracy"))

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[nn.Module]:
        """The model that is evaluated, as an evaluation wants it."""
        model = self.evaluated_model
        average_buffers(model, self.group)
        self._set_progress(model)
        was_training = model.training
        model.eval()
        with torch.no_grad(), self._autocast(), self._named():
            yield model
        model.train(was_training)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.compute.precision == "bfloat16")

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _save(self) -> None:
        random_tensors, random_numbers = _random.capture(self.device)
        average_buffers(self.model, self.group)
        tensors = {
            "model": {name: whole(value) for name, value in self.model.state_dict().items()},
            "optimizer": {name: whole(value) for name, value in optimizer_tensors(self.model, self.optimizer).items()},
        }
        if self.average is not None:
            average_buffers(self.average, self.group)
            tensors["average"] = self.average.state_dict()
        generators = self.group.gathered((random_tensors, random_numbers))
        tensors |= {_generators_of(rank): states for rank, (states, _) in enumerate(generators)}
        for skipped in self.group.gathered(self.skipped):
            self.skipped |= skipped
        state = {
            "random": [numbers for _, numbers in generators],
            "sums": self._sums,
            "summed": self._summed,
            "skipped": self.skipped,
            "held_out": self._held_out,
            "records": {"metrics": self.metrics.position(), "timings": self.timings.position()},
        }
        if self.group.leads:
            self._checkpoints.mkdir(exist_ok=True)
            save_checkpoint(
                self._checkpoints, Checkpoint(self.step, tensors, state), keep=self.train_config.keep_checkpoints
            )
        self.group.told(None)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.step = checkpoint.step
        current = self.model.state_dict()
        saved = checkpoint.tensors["model"].items()
        load_weights(self.model, {name: like(current[name], x) if name in current else x for name, x in saved})
        load_optimizer_tensors(self.model, self.optimizer, checkpoint.tensors["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(checkpoint.tensors["average"])
        state = checkpoint.state
        self._sums, self._summed = state["sums"], state["summed"]
        self.skipped, self._held_out = state["skipped"], state["held_out"]
        rank = self.group.rank
        if rank < len(state["random"]):
            _random.restore(checkpoint.tensors[_generators_of(rank)], state["random"][rank], self.device)
        else:  # saved by fewer processes: what this one draws is new
            _random.seed_everything(self.seed + rank + self.step * self.group.size)


def _generators_of(rank: int) -> str:
    """The group of a checkpoint's tensors that holds the states of a process's generators."""
    return "random" if rank == 0 else f"random-{rank}"


def total_steps(task: Task, train: TrainConfig) -> int:
    """Updates of a whole run."""
    return train.steps if train.steps is not None else train.epochs * task.steps_per_epoch


def load_trained(task: Task, folder: Path) -> nn.Module:
    """The model of a finished run, on the CPU, in evaluation mode; the moving average if there is one.

    Raises:
        CheckpointError: there is no good checkpoint.
    """
    messages: list[str] = []
    checkpoint = load_newest(folder / "checkpoints", messages.append)
    if checkpoint is None:
        raise CheckpointError(f"{folder / 'checkpoints'} holds no checkpoint; delete {folder} to train the run anew")
    model = task.build_model()
    weights = checkpoint.tensors["model"]
    if "average" in checkpoint.tensors:
        inner = checkpoint.tensors["average"].items()
        weights = {name.removeprefix("module."): value for name, value in inner if name.startswith("module.")}
    load_weights(model, weights)
    if isinstance(task, Scheduled):
        task.set_progress(model, 1.0)
    return model.eval()


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Set the model's state.

    Raises:
        CheckpointError: names or shapes are not the model's.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as cause:
        raise CheckpointError(
            f"the checkpoint does not fit the model, which may be of another version ({' '.join(str(cause).split())})"
        ) from cause


def _build(task: Task, seed: int, like: Task | None) -> nn.Module:
    _random.seed_everything(seed)
    model = task.build_model()
    if like is not None:
        _random.seed_everything(seed)
        source = like.build_model().state_dict()
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if name in source and source[name].shape == value.shape:
                    value.copy_(source[name])
    return model


class _Steps(Dataset["Batch | TokendynError"]):
    """The batches of steps ``start`` to ``stop``, or one part of each, as a data set, so that worker processes can make
    them.

    An error of ours is an item like any other: raised in a worker it would arrive wrapped in a traceback.
    """

    def __init__(self, task: Task, start: int, stop: int, part: slice | None) -> None:
        self.task, self.start, self.stop, self.part = task, start, stop, part

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, place: int) -> Batch | TokendynError:
        step = self.start + place
        try:
            if self.part is not None and isinstance(self.task, Divisible):
                return self.task.batch_part(step, self.part)
            return self.task.batch(step)
        except TokendynError as error:
            return error
