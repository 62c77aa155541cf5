"""The entry: a trained model and inputs in, a diagnosis out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokendyn.diagnose._adapters import find_sites, other_layers
from tokendyn.diagnose._capture import Capture, watching
from tokendyn.diagnose._findings import Finding, find_findings
from tokendyn.diagnose._measure import measure
from tokendyn.diagnose._origin import bad_weights, origin_of_non_finite
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
                layer["name"],
                *map(
                    _cell,
                    (
                        _get(layer, "regime", "kind"),
                        _get(layer, "memory", "delta", "median"),
                        _get(layer, "memory", "horizon", "median"),
                        _get(layer, "spectrum", "norm"),
                        _get(layer, "attention", "entropy"),
                        _get(layer, "attention", "first_token_sink"),
                        _get(layer, "tokens", "cosine"),
                        _get(layer, "tokens", "effective_rank"),
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
        """Write ``report.html``, ``report.json`` and, with Matplotlib, ``*.png`` into ``folder``; its path."""
        from tokendyn.diagnose._pictures import save_pictures

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        content = self.to_json()
        (path / "report.json").write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
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

    Returns:
        :class:`Diagnosis`.

    Raises:
        OptionError: there is no selective layer that can be read, or an option is out of range.
        DataError: the inputs are empty.

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

    def receive(capture: Capture) -> None:
        layers.append(measure(capture, channels=channels, sequences=sequences))

    with Evaluating(model), torch.no_grad(), origin_of_non_finite(model) as origin, watching(model, sites, receive):
        model(*args, **kwargs)
    if not layers:
        raise OptionError(
            f"diagnose: none of the {len(sites)} selective layers of {type(model).__name__} ran a scan that hooks can "
            f"see on these inputs; call it on a whole sequence, without a cache, and without torch.compile"
        )
    first = next(_tensors((args, kwargs)))
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


def model_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        args, kwargs = (), dict(inputs)
    elif isinstance(inputs, tuple):
        args, kwargs = inputs, {}
    else:
        args, kwargs = (inputs,), {}
    tensors = list(_tensors((args, kwargs)))
    if not tensors:
        raise DataError("diagnose: inputs hold no tensor, expected token ids or features as a torch.Tensor")
    if any(0 in tensor.shape for tensor in tensors):
        shape = next(tuple(tensor.shape) for tensor in tensors if 0 in tensor.shape)
        raise DataError(f"diagnose: an input has shape {shape}, expected at least one token")
    return args, kwargs


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(entry)


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


class Evaluating:
    """The model in evaluation mode, every module's own mode restored afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        for module, training in self.modes:
            module.training = training


def _get(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


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
