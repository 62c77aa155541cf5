"""The entry: a trained model and inputs in, a diagnosis out."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from tokendyn.diagnose._adapters import find_sites, other_layers
from tokendyn.diagnose._capture import Capture, watching
from tokendyn.diagnose._findings import Finding, find_findings
from tokendyn.diagnose._inputs import NotOfTheModel, model_arguments, run_model, tensors
from tokendyn.diagnose._measure import entry, measure
from tokendyn.diagnose._origin import bad_weights, origin_of_non_finite
from tokendyn.diagnose._words import printable
from tokendyn.errors import DataError, OptionError


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        findings: :class:`Finding` s, the gravest first.
        layers: a dictionary of measurements a scan; see ``docs/diagnose.md`` for every entry.
        model: name, class, number of parameters, the inputs' shape, dtype, seconds taken.
    """

    findings: tuple[Finding, ...]
    layers: tuple[dict[str, Any], ...]
    model: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings]
        return "\n".join([*lines, "", self.table()])

    def table(self) -> str:
        """A row a layer, as text."""
        header = ["layer", "regime", "Δ median", "horizon", "‖M‖", "entropy", "sink 1st", "cosine", "rank"]
        rows = [
            [
                printable(layer["name"], 60),
                *map(
                    _cell,
                    (
                        entry(layer, "regime", "kind"),
                        entry(layer, "memory", "delta", "median"),
                        entry(layer, "memory", "horizon", "median"),
                        entry(layer, "spectrum", "norm"),
                        entry(layer, "attention", "entropy"),
                        entry(layer, "attention", "first_token_sink"),
                        entry(layer, "tokens", "cosine"),
                        entry(layer, "tokens", "effective_rank"),
                    ),
                ),
            ]
            for layer in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON's own types; what is not finite is null."""
        return _plain(
            {
                "model": self.model,
                "findings": [finding.to_json() for finding in self.findings],
                "layers": list(self.layers),
            }
        )

    def to_html(self) -> str:
        """One page that needs nothing else."""
        from tokendyn.diagnose._report_html import render

        return render(self.to_json())

    def save(self, folder: str | Path, *, pictures: bool = True) -> Path:
        """Write ``report.html``, ``report.json`` and, with Matplotlib, ``*.png`` into ``folder``; its path.

        Raises:
            DataError: the folder cannot be made.
        """
        from tokendyn.diagnose._pictures import save_pictures

        path = make_folder(folder)
        content = self.to_json()
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        (path / "report.json").write_text(f"{text}\n", encoding="utf-8")
        (path / "report.html").write_text(self.to_html(), encoding="utf-8")
        if pictures:
            save_pictures(content, path)
        return path


def diagnose(
    model: nn.Module,
    inputs: Any,
    *,
    channels: tuple[int, ...] = (),
    sequences: int = 1,
    name: str | None = None,
    progress: Callable[[str], Any] | None = None,
) -> Diagnosis:
    """In which regime every selective layer of a trained model works on these inputs, and what is wrong with it.

    ::

        diagnosis = tokendyn.diagnose(model, input_ids)
        print(diagnosis.findings[0])
        diagnosis.save("report")            # report.html, report.json, pictures

    The model runs once, in evaluation mode and without gradients, as it is: hooks watch its layers, nothing of it is
    computed in another way, and its outputs, its mode and its weights are what they were. Every layer is measured when
    its block is through and then let go, so the memory needed is that of one layer beside the model.

    Args:
        model: a PyTorch module with selective (S6) layers: tokendyn's own, Hugging Face's Mamba, Falcon-Mamba and
            Jamba, mamba-ssm's Mamba, MambaVision, or any module that calls :func:`tokendyn.selective_scan` and has
            ``io_matrices``.
        inputs: what the model is called with: a tensor, a tuple of positional or a dictionary of keyword arguments.
        channels: channels whose own hidden attention is to be in the report.
        sequences: how many sequences of the batch the attention is averaged over.
        name: the model's name in the report; its class by default.
        progress: called with a sentence after every layer.

    Returns:
        :class:`Diagnosis`.

    Raises:
        OptionError: there is no selective layer that can be read, or an option is out of range.
        DataError: the inputs are empty, hold ids outside an embedding, or are refused by the model.

    Cost:
        One forward pass, and a layer about O(c L² N) for the hidden attention of c channels; c is all of them up to
        1.5e9 multiplications a layer, evenly spaced ones beyond, as the report says.

    Source:
        Paper 1, Eqs. (4)-(8); Ali, Zimerman and Wolf (2024) for the hidden attention.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"diagnose: model is {type(model).__name__}, expected a torch.nn.Module")
    args, kwargs = model_arguments(inputs)
    sites = find_sites(model)
    if not sites:
        raise OptionError(_nothing_found(model))
    if sequences < 1:
        raise OptionError(f"diagnose: sequences is {sequences}, expected 1 or more")
    _expect_channels(channels)
    begun = time.perf_counter()
    weights = bad_weights(model)
    layers: list[dict[str, Any]] = []
    failed: list[Exception] = []

    def receive(capture: Capture) -> None:
        try:
            layers.append(measure(capture, channels=channels, sequences=sequences))
        except Exception as error:  # not to be mistaken for one of the model, whose forward this is called from
            failed.append(error)
            raise NotOfTheModel from error
        if progress is not None:
            seconds = time.perf_counter() - begun
            progress(f"{len(layers)} of {max(len(sites), len(layers))} layers, {seconds:.0f} s: {capture.title}")

    with origin_of_non_finite(model) as origin, watching(sites, receive), contextlib.suppress(NotOfTheModel):
        run_model(model, args, kwargs)
    if failed:
        raise failed[0]
    if not layers:
        raise OptionError(
            f"diagnose: none of the {len(sites)} selective layers of {type(model).__name__} ran a scan that hooks can "
            f"see on these inputs; call it on a whole sequence, without a cache, and without torch.compile"
        )
    first = next(tensors((args, kwargs)))
    parameters = list(model.parameters())
    described = {
        "name": name or type(model).__name__,
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "parameters": sum(p.numel() for p in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch.") if parameters else None,
        "inputs": list(first.shape),
        "layers": len(layers),
        "seconds": round(time.perf_counter() - begun, 2),
    }
    return Diagnosis(tuple(find_findings(layers, weights, origin)), tuple(layers), described)


def make_folder(folder: str | Path) -> Path:
    """``folder``, made if missing."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise DataError(f"diagnose: {path} cannot be made a folder for the report ({cause.strerror})") from cause
    return path


def _expect_channels(channels: tuple[int, ...]) -> None:
    if not all(isinstance(channel, int) and channel >= 0 for channel in channels):
        raise OptionError(f"diagnose: channels is {channels!r}, expected numbers from 0")


def _nothing_found(model: nn.Module) -> str:
    others = other_layers(model)
    looks = f"; it has {', '.join(others[:3])}, which are not selective (S6) layers that can be read" if others else ""
    return (
        f"diagnose: no selective (S6) layer found in {type(model).__name__}{looks}; expected modules with in_proj, "
        f"x_proj, dt_proj, A_log and out_proj, or tokendyn's own layers"
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
