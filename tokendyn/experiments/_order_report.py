"""The numbers of a study that compares orders of tokens: what is summed up over seeds, and its table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tokendyn.experiments._order_arms import describe_order, resolve_arm
from tokendyn.experiments._report import cost, over_seeds, plus_minus, text_table
from tokendyn.experiments._run_folder import RunRecord
from tokendyn.experiments._statistics import paired, summary


def summarise_arms(orders: dict[str, Any], runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Means and deviations over seeds of each arm, and its paired differences from the first; ``orders`` by arm."""
    arms: dict[str, Any] = {}
    reference = [run for run in runs if run.arm == next(iter(orders))]
    for arm in orders:
        of_arm = [run for run in runs if run.arm == arm]
        held_out = [run.result["held_out"] for run in of_arm]
        scores = [key for key, value in held_out[0].items() if not isinstance(value, dict)]
        arms[arm] = {
            "order": orders[arm],
            "held_out": {key: summary([values[key] for values in held_out]) for key in scores},
            "orders": _nested(held_out, "orders"),
            "tokens": _nested(held_out, "tokens"),
            "parameters": of_arm[0].result["parameters"],
            "cost": cost(of_arm, seconds_per_step=lambda window: window["seconds"] / window["steps"]),
        }
        if "accuracy_shuffled" in scores:
            arms[arm]["shuffle_loss"] = paired(
                [values["accuracy"] for values in held_out], [values["accuracy_shuffled"] for values in held_out]
            )
        if arm != next(iter(orders)):
            before = [run.result["held_out"] for run in reference]
            arms[arm]["difference"] = {
                key: paired([v[key] for v in held_out], [v[key] for v in before]) for key in scores if key in before[0]
            }
    return arms


def _nested(held_out: Sequence[dict[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """Summaries over seeds of the measures that are kept by module."""
    return {
        module: {name: summary([values[key][module][name] for values in held_out]) for name in measures}
        for module, measures in held_out[0].get(key, {}).items()
    }


def format_table(result: dict[str, Any], place_of: Callable[[str], str]) -> str:
    """The table as text, one row an arm, and below it what the arms' orders are; ``place_of`` names a module."""
    header = ["arm", "accuracy %", "loss", "tokens averaged", "variance kept", "ms/step", "parameters"]
    rows: list[list[str]] = []
    notes = []
    for arm, values in result["arms"].items():
        held_out, orders = values["held_out"], values["orders"].values()
        memory = values["cost"]["gpu_memory_bytes"]
        rows.append(
            [
                arm,
                plus_minus(held_out["accuracy"], 2, 100),
                plus_minus(held_out["loss"], 4),
                ", ".join(f"{order['effective_tokens']['mean']:.1f}" for order in orders) or "-",
                ", ".join(f"{order['variance_kept']['mean']:.2g}" for order in orders) or "-",
                f"{1000 * values['cost']['seconds_per_step']:.0f}",
                f"{values['parameters']:,}",
                *([f"{memory / 2**20:,.0f}"] if memory is not None else []),
            ]
        )
        where = [f"{place_of(name)} ({o['tokens']['mean']:.0f} tokens)" for name, o in values["orders"].items()]
        notes.append(f"{arm}: {describe_order(resolve_arm(arm))}" + (f"; {', '.join(where)}" if where else ""))
    if len(rows[0]) > len(header):
        header.append("GPU MiB")
    table = text_table(f"held-out results, {over_seeds(result)}", header, rows)
    return "\n".join([table, "", *notes])


def conclusions(result: dict[str, Any]) -> list[str]:
    """One sentence an arm on its paired difference from the first."""
    reference = next(iter(result["arms"]))
    sentences = []
    for arm, values in result["arms"].items():
        if "difference" not in values:
            continue
        difference = values["difference"]["accuracy"]
        sentence = f"{arm} - {reference}: {100 * difference['mean']:+.2f} points of accuracy"
        if difference["interval95"] is not None:
            low, high = (100 * end for end in difference["interval95"])
            verdict = "no difference can be told" if low <= 0 <= high else "a difference"
            sentence += (
                f" (95 % interval {low:+.2f} to {high:+.2f} over {len(result['seeds'])} paired seeds: {verdict})"
            )
        sentences.append(sentence)
    return sentences
