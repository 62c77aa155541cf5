"""Train a small language model, measure it and the public one, write what was found."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokendyn.errors import OptionError, TokendynError
from tokendyn.experiments._files import write_json
from tokendyn.experiments.sinks._interventions import INTERVENTIONS
from tokendyn.experiments.sinks._measure import EXPLANATIONS, Row, explain, measure_sequences
from tokendyn.experiments.sinks._texts import cut_sequences, read_bytes, split
from tokendyn.experiments.sinks._typeseg import load_typeseg

VOCABULARY = 129
#: Sequences on which the interventions are made.
_INTERVENED = 4


def main(arguments: list[str] | None = None) -> int:
    """Run the study; 2 for a mistake in the call."""
    parser = argparse.ArgumentParser(
        prog="python -m tokendyn.experiments.sinks",
        description="Does attraction to the first token predict attention sinks? With controls.",
    )
    parser.add_argument("--typeseg", type=Path, metavar="FILE", help="mamba_al.npz of the package typeseg 0.2.7")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="measure this MambaLM over bytes, train none")
    parser.add_argument("--text", type=Path, help="text to train and measure on (default: tokendyn.core's source)")
    parser.add_argument("--out", type=Path, default=Path("runs/sinks"), metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=400, help="training steps of the language model (default 400)")
    parser.add_argument("--sequences", type=int, default=24, help="sequences measured (default 24)")
    parser.add_argument("--length", type=int, default=192, help="bytes in a sequence (default 192)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="one language model each (default 0); those in OUT are kept"
    )
    options = parser.parse_args(arguments)
    try:
        study(options)
    except (TokendynError, OSError) as error:
        print(f"sinks: {error}", file=sys.stderr)
        return 2
    return 0


def study(options: argparse.Namespace) -> dict[str, Any]:
    """Everything; returns what ``result.json`` holds."""
    for name in ("steps", "sequences", "length"):
        if getattr(options, name) < (least := {"length": 8, "sequences": 2, "steps": 1}[name]):
            raise OptionError(f"--{name} is {getattr(options, name)}, expected {least} or more")
    train, held_out = split(read_bytes(options.text))
    sequences = cut_sequences(held_out, options.sequences, options.length, options.seeds[0])
    options.out.mkdir(parents=True, exist_ok=True)
    if options.model is not None:
        from tokendyn.backends.torch.models import MambaLM

        models, losses = [MambaLM.from_pretrained(options.model)], None
    else:
        trained = [trained_model(train, options, seed) for seed in options.seeds]
        models, losses = [model for model, _ in trained], [loss for _, loss in trained]
    found: dict[str, Any] = {"settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}}
    print(f"measuring {len(sequences)} sequences of {options.length} bytes", flush=True)
    found["mamba_lm"] = {"losses": losses, **_arms(models, sequences)}
    found["mamba_lm_untrained"] = _arms([make_model(seed) for seed in options.seeds], sequences)
    if options.typeseg is not None:
        found["typeseg"] = _arms([load_typeseg(options.typeseg)], sequences)
    write_json(options.out / "result.json", found)
    text = table(found)
    (options.out / "result.md").write_text(text, encoding="utf-8")
    print(text)
    if importlib.util.find_spec("matplotlib") is not None:
        from tokendyn.experiments.sinks._figure import draw

        draw(found, options.out)
    return found


def trained_model(data: np.ndarray, options: argparse.Namespace, seed: int) -> tuple[Any, list[float]]:
    """The language model of this seed and its losses: the one in ``out`` if it was made by the same call, else trained
    and saved there."""
    from tokendyn.backends.torch.models import MambaLM

    folder = options.out / f"mamba_lm_seed{seed}"
    made = {"steps": options.steps, "length": options.length, "text": str(options.text), "bytes": len(data)}
    record = folder / "training.json"
    if record.is_file() and (kept := json.loads(record.read_bytes()))["made"] == made:
        return MambaLM.from_pretrained(folder), kept["losses"]
    model, losses = train_language_model(data, options.steps, options.length, seed, print)
    model.save_pretrained(folder)
    write_json(record, {"made": made, "losses": losses})
    return model, losses


def make_model(seed: int) -> Any:
    """A fresh MambaLM over bytes, 4 blocks of width 96."""
    from tokendyn.backends.torch.models import MambaLM

    torch.manual_seed(seed)
    return MambaLM(vocab_size=VOCABULARY, d_model=96, n_layer=4)


def train_language_model(
    data: np.ndarray, steps: int, length: int, seed: int, say: Callable[[str], Any]
) -> tuple[Any, list[float]]:
    """A fresh model trained on ``data`` by AdamW with a linear warm-up and a cosine to 0; its losses by step."""
    model = make_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    warm = max(1, steps // 20)

    def rate(step: int) -> float:
        return min((step + 1) / warm, 0.5 * (1 + np.cos(np.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    rng = np.random.default_rng(seed)
    losses = []
    begun = time.perf_counter()
    for step in range(steps):
        starts = rng.integers(len(data) - length - 1, size=8)
        batch = torch.from_numpy(np.stack([data[s : s + length + 1] for s in starts]))
        logits = model(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % max(1, steps // 5) == 0:
            say(f"step {step + 1}: loss {np.mean(losses[-20:]):.3f} nat/byte, {time.perf_counter() - begun:.0f} s")
    return model.eval(), losses


def _arms(models: list[Any], sequences: list[Any]) -> dict[str, Any]:
    """The sequences as they are, and begun at their middle; the scans of all ``models`` together."""
    arms: dict[str, Any] = {}
    for name, rolled in (("plain", False), ("rolled", True)):
        rows: list[Row] = []
        for number, model in enumerate(models):
            intervened = 0 if rolled else _INTERVENED
            rows += measure_sequences(model, sequences, rolled, first_depth=100 * number, intervened=intervened)
        arms[name] = {
            "sinks": _sink_summary(rows),
            "explains_attention": explain(rows),
            "explains_contribution": explain(rows, "contribution"),
        }
        if not rolled:
            arms["interventions"] = {
                change: {"mean": float(np.mean(values)), "least": min(values), "most": max(values)}
                for change in INTERVENTIONS
                if (values := [row.interventions[change] for row in rows if row.interventions])
            }
    return arms


def _sink_summary(rows: list[Row]) -> list[dict[str, Any]]:
    """By scan: the first token's sink score and contribution, beside an even spread."""
    found = []
    for depth in sorted({row.depth for row in rows}):
        mine = [row for row in rows if row.depth == depth]
        found.append(
            {
                "layer": mine[0].layer,
                "model": depth // 100,
                "place": depth % 100,
                "sink": float(np.mean([row.sink for row in mine])),
                "contribution": float(np.mean([row.contribution for row in mine])),
                "even": mine[0].even,
                **{name: float(np.mean([row.values[name] for row in mine])) for name in EXPLANATIONS},
            }
        )
    return found


def table(found: dict[str, Any]) -> str:
    """The study's numbers as Markdown."""
    lines = []
    for model in (key for key in found if key != "settings"):
        for arm in ("plain", "rolled"):
            part = found[model][arm]
            head = "| model | layer | sink | contribution | even spread | x_1ᵀ M x_1 |"
            lines += ["", f"### {model}, {arm}", "", head, "|---|---|---|---|---|---|"]
            lines += [
                f"| {row['model']} | {row['layer']} | {row['sink']:.4f} | {row['contribution']:.4f} | "
                f"{row['even']:.4f} | {row['attraction']:.3g} |"
                for row in part["sinks"]
            ]
            lines += ["", "| explanation | with the sink | 95 % | p | p, Holm | with contribution | between layers |"]
            lines.append("|---|---|---|---|---|---|---|")
            for name, entry in part["explains_attention"].items():
                low, high = entry["interval"]
                other = part["explains_contribution"][name]["correlation"]
                between = entry["between_layers"]
                last = "–" if between is None else f"{between:+.2f}"
                lines.append(
                    f"| {name} | {entry['correlation']:+.2f} | {low:+.2f} to {high:+.2f} | {entry['p']:.3f} | "
                    f"{entry['p_holm']:.3f} | "
                    f"{other:+.2f} | {last} |"
                )
        lines += ["", f"### {model}, interventions", "", "| change | sink, mean | least | most |", "|---|---|---|---|"]
        lines += [
            f"| {change} | {entry['mean']:.4f} | {entry['least']:.4f} | {entry['most']:.4f} |"
            for change, entry in found[model]["interventions"].items()
        ]
    return "\n".join(lines).strip() + "\n"
