"""The report of a language study: the table on stdout, ``result.json``, a page and the figure in its folder."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokendyn.experiments._files import write_json
from tokendyn.experiments._report import (
    cost,
    markdown_table,
    over_seeds,
    pictures,
    plus_minus,
    seeds_of,
    text_table,
    write_page,
)
from tokendyn.experiments._run_folder import RunRecord
from tokendyn.experiments._statistics import paired, summary
from tokendyn.experiments._text._sources import LETTERS, RANDOM
from tokendyn.experiments.wikitext103._arms import ORDERS, PAIRS, reads_future
from tokendyn.experiments.wikitext103._config import LanguageConfig
from tokendyn.experiments.wikitext103._task import Texts

FORMAT = 1
Result = dict[str, Any]


def write_report(folder: Path, preset: str, config: LanguageConfig, texts: Texts, runs: Sequence[RunRecord]) -> None:
    """Write ``result.json``, ``report.md`` and the figure, and print the table."""
    from tokendyn.experiments.wikitext103._figure import draw_figure  # only now: matplotlib takes a while to load

    result: Result = {
        "format": FORMAT,
        "experiment": "wikitext103",
        "preset": preset,
        "data": texts.fingerprint,
        **seeds_of(runs, config.seeds),
        "arms": summarise_arms(config, runs),
    }
    if config.data.text == RANDOM:
        result["entropy"] = math.log(len(LETTERS))
    result["comparisons"] = compare(config, runs)
    write_json(folder / "result.json", result)
    figures = draw_figure(folder / "figures", config, runs)
    page = write_page(folder, paragraphs(result, pictures(figures, folder)))
    print("\n" + format_table(result) + "\n")
    for sentence in conclusions(result):
        print(sentence)
    print("\n" + "\n".join(f"  {path}" for path in (folder / "result.json", page, *figures)))


def summarise_arms(config: LanguageConfig, runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Means and deviations over seeds of each arm, its paired differences from the first, and the blocks' measures."""
    arms: dict[str, Any] = {}
    models = config.models()
    reference = _held_out(runs, config.arms[0])
    tokens = config.train.batch_size * config.data.sequence_length
    for arm in config.arms:
        held_out = _held_out(runs, arm)
        scores = [key for key, value in held_out[0].items() if not isinstance(value, dict)]
        of_arm = [run for run in runs if run.arm == arm]
        arms[arm] = {
            "model": models[arm],
            "reads_future": reads_future(arm),
            "held_out": {key: summary([values[key] for values in held_out]) for key in scores},
            "blocks": [values["blocks"] for values in held_out if "blocks" in values],
            "parameters": of_arm[0].result["parameters"],
            "cost": cost(of_arm, tokens_per_second=lambda window: tokens * window["steps"] / window["seconds"]),
        }
        if arm != config.arms[0]:
            arms[arm]["difference"] = {
                key: paired([v[key] for v in held_out], [v[key] for v in reference]) for key in scores
            }
    return arms


def compare(config: LanguageConfig, runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The questions that the arms at hand can answer: is the loss of one higher than that of another?

    Each holds ``question``, ``higher``, ``lower`` (arms), and the paired difference of their held-out losses.
    """
    asked = [(name, order[i], order[i + 1]) for name, order in ORDERS for i in range(len(order) - 1)]
    asked += [("free against the rest", arm, "free") for arm in config.arms if arm != "free" and not reads_future(arm)]
    asked += PAIRS
    return [
        {
            "question": name,
            "higher": higher,
            "lower": lower,
            "difference": paired(
                [values["loss"] for values in _held_out(runs, higher)],
                [values["loss"] for values in _held_out(runs, lower)],
            ),
        }
        for name, higher, lower in asked
        if higher in config.arms and lower in config.arms
    ]


def conclusions(result: Result) -> list[str]:
    """A sentence on each question, whichever way the numbers fall."""
    sentences = []
    for name in dict.fromkeys(comparison["question"] for comparison in result["comparisons"]):
        parts = []
        for comparison in result["comparisons"]:
            if comparison["question"] != name:
                continue
            difference = comparison["difference"]
            words = f"{comparison['higher']} - {comparison['lower']} = {difference['mean']:+.4f}"
            if difference["interval95"] is None:
                parts.append(f"{words} (one seed: no verdict)")
                continue
            low, high = difference["interval95"]
            verdict = "higher" if low > 0 else "lower" if high < 0 else "cannot be told"
            parts.append(f"{words} (95 % {low:+.4f} to {high:+.4f}: {verdict})")
        sentences.append(f"{name}: held-out loss, nats a token: " + "; ".join(parts))
    future = [arm for arm, values in result["arms"].items() if values["reads_future"]]
    if future:
        sentences.append(
            f"{', '.join(future)}: sorting lets the outputs see the tokens that they have to predict, so these losses "
            f"are no likelihoods, and what stands in brackets is no perplexity."
        )
    if "entropy" in result:
        sentences.append(_against_entropy(result))
    return sentences


def _against_entropy(result: Result) -> str:
    """Whose loss is below the entropy of letters drawn at random, the least that honest predictions can have."""
    entropy, below, above = result["entropy"], [], []
    for arm, values in result["arms"].items():
        loss = values["held_out"]["loss"]["mean"]
        (below if loss < entropy else above).append(f"{arm} ({loss - entropy:+.4f})")
    return (
        f"The letters are drawn at random: no prediction from the past has a smaller loss than their entropy, "
        f"{entropy:.4f} nats, but for the chance of {result['data']['held_out']['tokens']:,} letters. Below it: "
        f"{', '.join(below) or 'none'}. Not below: {', '.join(above) or 'none'}."
    )


def format_table(result: Result) -> str:
    """The table as text, one row an arm."""
    return text_table(f"held-out results, {over_seeds(result)}", *_rows(result))


def paragraphs(result: Result, shown: Sequence[str]) -> list[str]:
    """``report.md``: the question, the answer as far as the numbers go, the table, ``shown``, what the blocks did."""
    data = result["data"]
    layers = [
        [arm, index, *(_mean_of(values["blocks"], index, key) for key in ("eigenvalues", "positive_pairs", "ode_rate"))]
        for arm, values in result["arms"].items()
        for index in (values["blocks"][0].get("layers", {}) if values["blocks"] else {})
    ]
    page = [
        f"# What the spectrum does: {data['train']['tokens']:,} training tokens",
        f"{data['held_out']['tokens']:,} held-out tokens; {over_seeds(result)}, each with the same windows of text in "
        f"the same order in all arms, and the same initial weights where names and shapes agree. Differences are taken "
        f"seed by seed; the interval is the 95 % one of their mean (Student's t). One in twenty of such intervals "
        f"misses the truth by chance; there are {len(result['comparisons'])} here.",
        "\n".join(f"- {sentence}" for sentence in conclusions(result)) or "No two arms have a question between them.",
        markdown_table(*_rows(result)),
        *shown,
    ]
    if layers:
        page += [
            "## The layers of Mamba at the end",
            markdown_table(["arm", "layer", "largest eigenvalue", "positive x_lᵀ M x_j", "rate of the ODE"], layers),
            "Largest magnitude of the eigenvalues of M that are not 0 by rank; part of all pairs j < l of held-out "
            "tokens with x_lᵀ M x_j > 0; mean of d ln‖x_l‖/dt by the token dynamics, a block being one unit of time. "
            "In a free layer the symmetric part of M always has as many positive as negative eigenvalues: their count "
            "says nothing.",
        ]
    return page


def _rows(result: Result) -> tuple[list[str], list[list[str]]]:
    others = [name for name in ("test", "zero_shot") if name in result["data"]]
    header = ["arm", "perplexity", "bits/byte", "word perplexity"]
    header += [f"{name} word perplexity" for name in others]
    header += ["largest |λ|", "x_lᵀMx_j > 0", "tokens/s", "parameters"]
    rows = []
    for arm, values in result["arms"].items():
        held_out = values["held_out"]
        perplexity = plus_minus(held_out["perplexity"], 2)
        words = ["word_perplexity", *(f"{name}_word_perplexity" for name in others)]
        layers = [layer for blocks in values["blocks"] for layer in blocks.get("layers", {}).values()]
        rows.append(
            [
                arm,
                f"[{perplexity}]" if values["reads_future"] else perplexity,
                plus_minus(held_out["bits_per_byte"], 4),
                *(f"{held_out[key]['mean']:,.4g}" for key in words),
                f"{statistics.fmean(layer['eigenvalues'][0] for layer in layers):.3g}" if layers else "-",
                f"{100 * statistics.fmean(layer['positive_pairs'] for layer in layers):.0f} %" if layers else "-",
                f"{values['cost']['tokens_per_second']:,.0f}",
                f"{values['parameters']:,}",
            ]
        )
    return header, rows


def _held_out(runs: Sequence[RunRecord], arm: str) -> list[dict[str, Any]]:
    return [run.result["held_out"] for run in runs if run.arm == arm]


def _mean_of(blocks: Sequence[dict[str, Any]], index: str, key: str) -> str:
    values = [found["layers"][index][key] for found in blocks]
    return f"{statistics.fmean(value[0] if isinstance(value, list) else value for value in values):.3g}"
