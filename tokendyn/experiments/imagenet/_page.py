"""The report page of a study: Markdown made from ``result.json``, with a conclusion that follows from its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokendyn.experiments._order_arms import describe_order, resolve_arm
from tokendyn.experiments._report import markdown_table, of_planned, plus_minus
from tokendyn.experiments.imagenet._task import stage_of

Result = dict[str, Any]


def page(result: Result) -> list[str]:
    """The paragraphs of the page."""
    arms, seeds = result["arms"], len(result["seeds"])
    reference = next(iter(arms))
    return [
        f"# Does order help? {result['data']['train']:,} training images, {result['data']['classes']} classes",
        f"{result['data']['held_out']:,} held-out images; {seeds} seed{'s' if seeds > 1 else ''}{of_planned(result)}, "
        f"each with the same data order, crops and initial weights in all arms. Differences are taken seed by seed; "
        f"the interval is the 95 % one of their mean (Student's t). Each misses the truth with a chance of 5 %, so at "
        f"least one of the {len(arms) - 1} does with a chance of up to {min(100, 5 * (len(arms) - 1))} %.",
        " ".join(conclusion(result)),
        markdown_table(
            ["arm", "order", "accuracy %", f"minus {reference}, points", "95 % interval", "shuffled at test time %"],
            [_row(arm, values) for arm, values in arms.items()],
        ),
        "## What the orders did",
        markdown_table(
            [
                "arm",
                "stage",
                "tokens averaged",
                "variance kept",
                "reaction of the loss",
                "agreement, one class",
                "agreement, all",
            ],
            [
                [arm, stage_of(module), *(_number(order.get(key)) for key in _ORDER_COLUMNS)]
                for arm, values in arms.items()
                for module, order in values["orders"].items()
            ],
        ),
        "Tokens averaged by a sorted place: 1 is a sort. Reaction: norm of the gradient of an image's loss towards its "
        "scores, times their deviation. Agreement: mean rank correlation of the tokens' places between two images.",
        "## What the tokens did",
        markdown_table(
            ["arm", "after", "cosine of two tokens", "cosine with the first", "clusters"],
            [
                [arm, stage_of(f"{block}.x"), *(_number(measures[key]) for key in _TOKEN_COLUMNS)]
                for arm, values in arms.items()
                for block, measures in _ends_of_stages(values["tokens"]).items()
            ],
        ),
    ]


_ORDER_COLUMNS = ("effective_tokens", "variance_kept", "score_gradient", "agreement_class", "agreement_all")
_TOKEN_COLUMNS = ("pairwise_cosine", "first_cosine", "clusters")


def conclusion(result: Result) -> list[str]:
    """Sentences that follow from the intervals, whichever way they fall."""
    arms, seeds = result["arms"], len(result["seeds"])
    reference = next(iter(arms))
    if seeds < 2:
        return ["**One seed tells nothing about differences between arms.**"]
    verdicts: dict[str, list[str]] = {"helps": [], "hurts": [], "unclear": []}
    widest = 0.0
    for arm, values in arms.items():
        if arm == reference:
            continue
        low, high = (100 * end for end in values["difference"]["accuracy"]["interval95"])
        verdicts["helps" if low > 0 else "hurts" if high < 0 else "unclear"].append(arm)
        widest = max(widest, (high - low) / 2)
    sentences = []
    if verdicts["helps"]:
        sentences.append(f"**Better than {reference}: {_names(verdicts['helps'])}.**")
    else:
        sentences.append(f"**No arm is better than {reference} beyond chance.**")
    if verdicts["hurts"]:
        sentences.append(f"Worse: {_names(verdicts['hurts'])}.")
    if verdicts["unclear"]:
        sentences.append(
            f"No difference can be told for {_names(verdicts['unclear'])}: intervals reach up to {widest:.2f} points "
            f"to either side, and a smaller effect would not be seen."
        )
    for arm, values in arms.items():
        lost = values.get("shuffle_loss")
        if lost is not None and lost["interval95"] is not None and values["orders"]:
            low, high = (100 * end for end in lost["interval95"])
            if low <= 0 <= high:
                sentences.append(f"{arm} loses nothing that can be told when its order is shuffled at test time.")
            else:
                sentences.append(
                    f"{arm} loses {100 * lost['mean']:.2f} points when its order is shuffled at test time."
                )
    controls = ("mean", "reversed")
    helped = [arm for arm in verdicts["helps"] if arms[arm]["order"]["method"] not in controls]
    sentences.append(
        f"On such data switch on {_names(helped)}." if helped else "On such data leave the tokens in their order."
    )
    return sentences


def _row(arm: str, values: dict[str, Any]) -> list[str]:
    held_out, difference = values["held_out"], values.get("difference", {}).get("accuracy")
    interval = difference and difference["interval95"]
    return [
        arm,
        describe_order(resolve_arm(arm)),
        plus_minus(held_out["accuracy"], 2, 100),
        f"{100 * difference['mean']:+.2f}" if difference else "",
        f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}" if interval else "",
        f"{100 * held_out['accuracy_shuffled']['mean']:.2f}",
    ]


def _ends_of_stages(tokens: dict[str, Any]) -> dict[str, Any]:
    """The last block of each stage."""
    last = {name.split(".")[1]: name for name in tokens}
    return {name: tokens[name] for name in last.values()}


def _number(value: dict[str, Any] | None) -> str:
    return "" if value is None else f"{value['mean']:.3g}"


def _names(arms: Sequence[str]) -> str:
    return ", ".join(arms)
