"""The report's plots as PNG files, for papers and for places without a browser."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from tokendyn.diagnose._measure import entry
from tokendyn.diagnose._words import printable

_KINDS = (("convergence", "#3a6fb5"), ("slow divergence", "#c98a10"), ("fast divergence", "#c4452c"))


def save_pictures(content: dict[str, Any], folder: Path) -> list[Path]:
    """``regimes.png``, ``tokens.png``, ``attention.png`` and ``spectra.png``; nothing where Matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    layers = content["layers"]
    drawn = {"regimes": _regimes, "attention": _attention, "spectra": _spectra}
    if any(layer["tokens"] for layer in layers):
        drawn["tokens"] = _tokens
    return [draw(layers, folder / f"{name}.png") for name, draw in drawn.items()]


def _figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 4)) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _number(layer: dict[str, Any], *keys: str) -> float:
    value = entry(layer, *keys)
    return float("nan") if value is None else float(value)


def _regimes(layers: list[dict[str, Any]], path: Path) -> Path:
    figure, axes = _figure()
    ax, base = axes[0, 0], [0.0] * len(layers)
    for kind, colour in _KINDS:
        shares = [_number(layer, "regime", "shares", kind) for layer in layers]
        shares = [0.0 if share != share else share for share in shares]
        ax.bar(range(len(layers)), shares, bottom=base, color=colour, label=kind)
        base = [b + s for b, s in zip(base, shares, strict=True)]
    ax.set(xlabel="layer", ylabel="share of the movement", ylim=(0, 1), title="Regime of every layer")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    figure.savefig(path, dpi=140)
    return path


def _tokens(layers: list[dict[str, Any]], path: Path) -> Path:
    figure, axes = _figure(1, 2, (10, 4))
    depth = range(len(layers))
    for keys, name, style in (
        (("tokens", "cosine"), "any two", "-"),
        (("tokens", "cosine_with_first"), "with first", "--"),
    ):
        axes[0, 0].plot(depth, [_number(layer, *keys) for layer in layers], style, marker="o", ms=3, label=name)
    axes[0, 0].set(xlabel="layer", ylabel="cosine", title="Similarity of tokens")
    axes[0, 0].legend(frameon=False)
    for quantile in ("p05", "median", "p95"):
        axes[0, 1].plot(
            depth, [_number(layer, "tokens", "norm", quantile) for layer in layers], marker="o", ms=3, label=quantile
        )
    axes[0, 1].set(xlabel="layer", ylabel="norm", title="Token norms")
    axes[0, 1].legend(frameon=False)
    figure.savefig(path, dpi=140)
    return path


def _grid(count: int) -> tuple[int, int]:
    columns = min(4, max(1, count))
    return -(-count // columns), columns


def _attention(layers: list[dict[str, Any]], path: Path) -> Path:
    import numpy as np

    shown = layers[:24]
    rows, columns = _grid(len(shown))
    figure, axes = _figure(rows, columns, (2.6 * columns, 2.7 * rows))
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, layer in zip(axes.flat, shown, strict=False):
        ax.set_title(_short(layer["name"]), fontsize=8, parse_math=False)
        if layer["attention"] is not None:
            cells = np.array(layer["attention"]["picture"]["cells"])
            floor = max(float(cells.max()) * 1e-4, 1e-12)
            ax.imshow(np.log10(np.maximum(cells, floor)), cmap="Blues")
    figure.suptitle("Hidden attention, mean of |P| over channels (logarithmic)", fontsize=10)
    figure.savefig(path, dpi=140)
    return path


def _spectra(layers: list[dict[str, Any]], path: Path) -> Path:
    figure, axes = _figure()
    ax = axes[0, 0]
    for place, layer in enumerate(layers):
        if layer["spectrum"] is not None:
            values = layer["spectrum"]["symmetric"]
            colours = ["#c4452c" if value >= 0 else "#3a6fb5" for value in values]
            ax.scatter([place] * len(values), values, c=colours, s=9)
    ax.axhline(0, color="#888888", linewidth=0.6)
    ax.set(xlabel="layer", ylabel="σ", title="Eigenvalues of the symmetric part of M")
    figure.savefig(path, dpi=140)
    return path


def _short(name: str) -> str:
    return printable(name, 30)
