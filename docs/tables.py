"""Makes the tables of the results page from the JSON files of measured runs.

From the root of the repository::

    python docs/tables.py                                  # writes docs/_measured/results_*.md
    python docs/tables.py --check                          # exits with 1 if a table would change
    python docs/tables.py --take demo_imagenet runs/FOLDER # first takes over a run's result.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from tokendyn.experiments._report import markdown_table, plus_minus
from tokendyn.experiments._statistics import paired, summary

FOLDER = Path(__file__).parent / "_measured"
BENCHMARKS = Path(__file__).parents[1] / "benchmarks" / "results"


def table(header: list[str], rows: list[list[Any]]) -> str:
    return markdown_table(header, rows) + "\n"


def interval(difference: dict[str, Any], digits: int, scale: float = 1.0) -> str:
    low, high = (scale * end for end in difference["interval95"])
    return f"{scale * difference['mean']:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def paired_by_seed(one: dict[str, Any], other: dict[str, Any], key: str) -> dict[str, Any]:
    """:func:`paired` of a held-out measure of two arms, over the seeds that both have."""
    both = [seed for seed in one["seeds"] if seed in other["seeds"]]
    return paired(
        *([arm["held_out"][key]["values"][arm["seeds"].index(seed)] for seed in both] for arm in (one, other))
    )


def demo_imagenet() -> str:
    result = json.loads((FOLDER / "demo_imagenet.json").read_text(encoding="utf-8"))
    rows = []
    for name, arm in result["arms"].items():
        orders = list(arm["orders"].values())
        rows.append(
            [
                name,
                plus_minus(arm["held_out"]["accuracy"], 2, 100),
                interval(arm["difference"]["accuracy"], 2, 100) if "difference" in arm else "",
                ", ".join(f"{order['effective_tokens']['mean']:.1f}" for order in orders),
                ", ".join(f"{order['variance_kept']['mean']:.2g}" for order in orders),
            ]
        )
    header = ["arm", "accuracy, %", "difference (95 % interval)", "tokens averaged, of 64", "variance kept"]
    return table(header, rows)


def demo_wikitext103() -> str:
    result = json.loads((FOLDER / "demo_wikitext103.json").read_text(encoding="utf-8"))
    rows = [
        [
            name,
            plus_minus(arm["held_out"]["loss"], 3),
            interval(arm["difference"]["loss"], 3) if "difference" in arm else "",
            plus_minus(arm["held_out"]["bits_per_byte"], 3),
            f"{arm['parameters']:,}",
        ]
        for name, arm in result["arms"].items()
    ]
    header = ["arm", "loss, nats a byte", "difference to free (95 % interval)", "bits a byte", "parameters"]
    return table(header, rows)


def _scan(file: str, engine: str, compiler: str) -> str:
    measured = json.loads((BENCHMARKS / file).read_text(encoding="utf-8"))
    rows = []
    for case in measured["cases"]:
        ours, theirs = case["engines"][engine], case["engines"]["mamba_ssm"]
        cells = []
        for key in ("forward graph", "both graph"):
            cells.append(f"{ours[key]:.3f} / {theirs[key]:.3f} ({case['ratio'][key]:.2f})")
        rows.append([case["case"], *cells])
    header = ["case", "forward, ms", "forward + backward, ms"]
    versions = measured["versions"]
    return (
        table(header, rows)
        + f"\nOurs / mamba-ssm's, and in brackets how many times faster ours is. {measured['machine']}, "
        + f"torch {versions['torch']}, {compiler} {versions[compiler]}, mamba-ssm {versions['mamba_ssm']}, CUDA graphs "
        + "replayed, medians.\n"
    )


def scan() -> str:
    return _scan("scan.json", "cuda", "cuda.bindings")


def scan_triton() -> str:
    return _scan("scan_triton.json", "triton", "triton")


def _spectrum() -> tuple[dict[str, Any], dict[str, Any]]:
    files = (FOLDER / "spectrum" / name for name in ("result.json", "curves.json"))
    result, curves = (json.loads(path.read_text(encoding="utf-8")) for path in files)
    return result["arms"], curves


def spectrum() -> str:
    arms, curves = _spectrum()
    header = ["arm", "perplexity", "bits a byte", "word perplexity", "zero-shot word perplexity", "loss in training"]
    rows = [
        [
            f"`{name}`",
            plus_minus(arm["held_out"]["perplexity"], 1),
            plus_minus(arm["held_out"]["bits_per_byte"], 4),
            plus_minus(arm["held_out"]["word_perplexity"], 0),
            plus_minus(arm["held_out"]["zero_shot_word_perplexity"], 1),
            plus_minus(summary([run["training_loss"] for run in curves["arms"][name]]), 3),
        ]
        for name, arm in arms.items()
    ]
    return table(header, rows)


def spectrum_differences() -> str:
    """Pairs of arms in groups: signs at one scale, scales at one sign, and everything beside free."""
    arms, _ = _spectrum()
    groups = {
        "signs, as published": (("negative", "mixed"), ("mixed", "positive")),
        "signs, all at 1.39": (("negative", "mixed_matched"), ("mixed_matched", "positive"), ("negative", "positive")),
        "signs, all at 0.69": (
            *(("negative_paper", "mixed"), ("mixed", "positive_paper"), ("negative_paper", "positive_paper")),
        ),
        "1.39 against 0.69": (
            *(("negative", "negative_paper"), ("mixed_matched", "mixed"), ("positive", "positive_paper")),
        ),
        "against free": tuple((name, "free") for name in arms if name != "free"),
    }
    rows = []
    for group, pairs in groups.items():
        for place, (one, other) in enumerate(pairs):
            differences = (
                paired(*(arms[name]["held_out"][key]["values"] for name in (one, other)))
                for key in ("loss", "zero_shot_loss")
            )
            shown = (interval(difference, 3) for difference in differences)
            rows.append(["" if place else group, f"`{one}` − `{other}`", *shown])
    return table(["", "difference", "held-out loss, nats a token", "zero-shot"], rows)


def spectrum_blocks() -> str:
    arms, curves = _spectrum()
    rows = []
    for name, arm in arms.items():
        runs, layers = curves["arms"][name], [list(blocks["layers"].values()) for blocks in arm["blocks"]]
        pairs = [layer["positive_pairs"] for of_run in layers for layer in of_run]
        first, second, last = (
            fmean(run["positive_pairs"][step] for run in runs) for step in (0, 1, len(curves["steps"]) - 1)
        )
        largest = (fmean(run["largest_eigenvalue"][step] for run in runs) for step in (0, -1))
        own = fmean(layer["positive_self"] for of_run in layers for layer in of_run)
        norms = {key: [blocks[key] for blocks in arm["blocks"]] for key in ("norms", "norms_ode")}
        rows.append(
            [
                f"`{name}`",
                " → ".join(f"{value:.2f}" for value in largest),
                f"{100 * own:.0f} %",
                f"{100 * first:.0f} → {100 * second:.0f} → {100 * last:.0f} %",
                f"{100 * min(pairs):.1f} to {100 * max(pairs):.1f} %",
                f"{fmean(run[2] for run in norms['norms']):.2f}",
                plus_minus(summary([run[-1] for run in norms["norms"]]), 2),
                plus_minus(summary([run[-1] for run in norms["norms_ode"]]), 1),
            ]
        )
    header = ["arm", "largest magnitude", "own sign", "pairs", "pairs, by layer and seed"]
    return table([*header, "norm after 2", "norm after 12", "predicted"], rows)


def _study(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"study_{name}.json").read_text(encoding="utf-8"))["arms"]


def _accuracy(name: str) -> str:
    """Held-out accuracy of a study of orders, paired differences, and what shuffling the order at test time takes."""
    rows = [
        [
            f"`{arm}`",
            plus_minus(found["held_out"]["accuracy"], 2, 100),
            interval(found["difference"]["accuracy"], 2, 100) if "difference" in found else "",
            interval(found["shuffle_loss"], 2, 100) if arm != "mean" else "0, by construction",
        ]
        for arm, found in _study(name).items()
    ]
    return table(["arm", "accuracy, %", "minus `baseline`, points", "lost when shuffled, points"], rows)


def _mechanism(name: str) -> str:
    """What orders did at the end: stage 3 / stage 4, means over seeds."""
    columns = (("effective_tokens", ".1f"), ("variance_kept", ".2g"), ("score_gradient", ".2g"))
    columns += (("agreement_class", ".2f"), ("agreement_all", ".2f"))
    rows = []
    for arm, found in _study(name).items():
        orders = list(found["orders"].values())
        cells = [" / ".join(f"{o[key]['mean']:{form}}" for o in orders if key in o) for key, form in columns]
        if orders:
            rows.append([f"`{arm}`", *cells])
    return table(
        ["arm", "tokens averaged", "variance kept", "reaction", "agreement, one class", "any two images"], rows
    )


def _tokens(name: str) -> str:
    """How alike tokens were at the end: after stage 3 / stage 4, means over seeds."""
    columns = (("pairwise_cosine", ".2f"), ("first_cosine", ".2f"), ("clusters", ".1f"))
    rows = []
    for arm, found in _study(name).items():
        blocks = list(found["tokens"].values())
        ends = (blocks[-3], blocks[-1])
        rows.append([f"`{arm}`", *(" / ".join(f"{end[key]['mean']:{form}}" for end in ends) for key, form in columns)])
    return table(["arm", "cosine of two tokens", "with the first", "clusters"], rows)


def study_cifar10() -> str:
    return _accuracy("cifar10")


def study_cifar10_mechanism() -> str:
    return _mechanism("cifar10")


def study_cifar10_tokens() -> str:
    return _tokens("cifar10")


def study_imagenette() -> str:
    return _accuracy("imagenette")


def study_imagenette_mechanism() -> str:
    return _mechanism("imagenette")


def study_imagenette_tokens() -> str:
    return _tokens("imagenette")


def _orders() -> dict[str, Any]:
    return json.loads((FOLDER / "orders.json").read_text(encoding="utf-8"))["arms"]


def _arm(name: str) -> str:
    """An arm's name as code; what stands after a comma tells one run of it from another."""
    arm, comma, which = name.partition(",")
    return f"`{arm}`{comma}{which}"


def orders() -> str:
    """The study of orders in language; what is no perplexity stands in brackets."""
    rows = []
    for name, arm in _orders().items():
        found = arm["held_out"]
        shown = [
            plus_minus(found["perplexity"], 1),
            plus_minus(found["bits_per_byte"], 4),
            plus_minus(found["zero_shot_word_perplexity"], 0),
        ]
        cells = [f"[{cell}]" if arm["reads_future"] else cell for cell in shown]
        rows.append([_arm(name), *cells, f"{arm['parameters']:,}"])
    return table(["arm", "perplexity", "bits a byte", "zero-shot word perplexity", "parameters"], rows)


def orders_differences() -> str:
    arms = _orders()
    ablations = ("shared_layers", "no_norm", "no_convolution")
    groups = {
        "causal order": (
            *(("chunk_order", "free"), ("group_order", "free")),
            ("window_order", "free, again"),  # of a later run, with its own
        ),
        "chunks, ablated": tuple((f"chunk_order_{name}", name) for name in ablations),
        "reading the future": (
            *(("mamba_published_order", "free"), ("h3_published_order", "h3")),
            ("transformer_published_order", "transformer"),
        ),
        "other models": (("h3", "free"), ("transformer", "free")),
        "ablations": tuple((name, "free") for name in ablations),
        "signs": tuple((name, "free") for name in ("negative", "positive")),
        "signs, no norm": tuple((f"{name}:norm=none", "no_norm") for name in ("negative", "positive")),
    }
    rows = []
    for group, pairs in groups.items():
        first = True
        for one, other in pairs:
            if one not in arms or other not in arms:
                continue
            shown = (interval(paired_by_seed(arms[one], arms[other], key), 4) for key in ("loss", "zero_shot_loss"))
            rows.append([group if first else "", f"{_arm(one)} − {_arm(other)}", *shown])
            first = False
    return table(["", "difference", "held-out loss, nats a token", "zero-shot"], rows)


def token_norms() -> str:
    """Paper 1's Figures 7 and 8: log2 of the norm of the residual stream, before the blocks, after two, after all."""
    rows = []
    arms = _orders()
    for name in ("free", "negative", "positive", "no_norm", "negative:norm=none", "positive:norm=none"):
        norms = arms[name]["norms"]
        measured = [summary([run[place] for run in norms["norms"]]) for place in (0, 2, -1)]
        predicted = summary([run[-1] - run[0] for run in norms["norms_ode"]])
        grown = summary([run[-1] - run[0] for run in norms["norms"]])
        rows.append([f"`{name}`", *(plus_minus(found, 2) for found in (*measured, grown)), plus_minus(predicted, 2)])
    header = ["arm", "before", "after 2 blocks", "after all", "growth", "growth predicted"]
    return table(header, rows)


def _classified(name: str) -> str:
    result = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    rows = [
        [
            f"`{arm}`",
            plus_minus(found["held_out"]["accuracy"], 2, 100),
            interval(found["difference"]["accuracy"], 2, 100) if "difference" in found else "",
            plus_minus(found["held_out"]["loss"], 4),
            ", ".join(f"{order['effective_tokens']['mean']:.1f}" for order in found["orders"].values()),
        ]
        for arm, found in result["arms"].items()
    ]
    rows.append([result["reference"]["name"], f"{100 * result['reference']['accuracy']:.2f}", "", "", ""])
    header = ["arm", "accuracy, %", "minus `baseline`, points (95 % interval)", "loss", "tokens averaged, by block"]
    return table(header, rows)


def ag_news() -> str:
    return _classified("ag_news")


def imdb() -> str:
    return _classified("imdb")


def text_leak() -> str:
    """The published order on short sequences of bytes; what is no perplexity stands in brackets."""
    rows = []
    for arm, found in json.loads((FOLDER / "text_leak.json").read_text(encoding="utf-8"))["arms"].items():
        cells = [plus_minus(found["held_out"][key], 2) for key in ("perplexity", "bits_per_byte")]
        rows.append([f"`{arm}`", *(f"[{cell}]" if arm.endswith("published_order") else cell for cell in cells)])
    return table(["arm", "perplexity of a byte", "bits a byte"], rows)


def mamba_lm() -> str:
    measured = json.loads((BENCHMARKS / "mamba_lm.json").read_text(encoding="utf-8"))
    names = {"auto": "tokendyn's", "mamba_ssm": "mamba-ssm's"}
    rows = []
    for mode, of_mode in measured["modes"].items():
        slowest = of_mode["mamba_ssm"]["step_ms"]
        for engine, row in of_mode.items():
            low, high = row["step_ms_quartiles"]
            rows.append(
                [
                    {"eager": "eager", "graph": "one CUDA graph"}[mode],
                    names[engine],
                    f"{row['tokens_per_second']:,.0f}",
                    f"{row['step_ms']:.1f} ({low:.1f} to {high:.1f})",
                    f"{row['busy_ms']:.1f}" if "busy_ms" in row else "",
                    f"{slowest / row['step_ms']:.2f}",
                    "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**30:.1f}",
                ]
            )
    header = ["step", "scan", "tokens/s", "ms a step (quartiles)", "GPU busy, ms", "times mamba-ssm's", "peak GiB"]
    return table(header, rows)


#: MambaVision's rows: their name on the page and in the benchmark's JSON.
VISION = {
    "baseline": "baseline",
    "with reordering": "published order, ours",
    "with dense reordering": "published order, dense",
    "PyPI `mambavision`": "PyPI mambavision",
}
#: Multiply-adds of attention's two products: in stage 3 four layers of 196 tokens, in stage 4 two of 49.
VISION_ATTENTION = 4 * 2 * 196**2 * 320 + 2 * 2 * 49**2 * 640


def _vision() -> dict[str, Any]:
    return json.loads((BENCHMARKS / "mambavision_cost.json").read_text(encoding="utf-8"))


def mambavision_cost() -> str:
    """Table 8 beside paper 1's: a training step replayed from a CUDA graph, its memory when it is launched eagerly."""
    measured = _vision()
    rows = [
        ["published, 4 A100, baseline", "31.79 M", "8.93", "308 s an epoch", "", "7,232", ""],
        ["published, with reordering", "31.79 M", "8.94", "322 s an epoch", "+4.5 %", "7,334", "+1.4 %"],
    ]
    base: dict[str, float] = {}
    for shown, name in VISION.items():
        eager, replayed = measured["models"][name], measured["models"][f"{name}, CUDA graph"]
        found = {"ms": replayed["training_ms"], "bytes": eager["training_bytes"]}
        base = base or found
        more = {key: f"{100 * (found[key] / base[key] - 1):+z.1f} %" if found is not base else "" for key in found}
        flops = 2 * eager["gflops"]
        rows.append(
            [
                shown if shown.startswith("PyPI") else f"ours, 1 H100, {shown}",
                f"{eager['parameters']:,}",
                f"{flops:.2f} ({flops - 2e-9 * VISION_ATTENTION:.2f})",
                f"{1e3 * measured['batch'] / found['ms']:,.0f} images/s",
                more["ms"],
                f"{found['bytes'] / 1e6:,.0f}",
                more["bytes"],
            ]
        )
    return table(["MambaVision-T", "parameters", "GFLOPs", "training", "time", "MB a GPU", "memory"], rows)


def mambavision_modes() -> str:
    """Images/s of every way to launch a training step and a forward pass, in one run."""
    measured = _vision()
    modes = {
        "eager": "",
        "replayed": ", CUDA graph",
        "compiled": ", compiled",
        "compiled and replayed": ", compiled, CUDA graph",
    }
    rows = []
    for kind in ("training", "forward"):
        for shown, ending in modes.items():
            times = [measured["models"].get(f"{name}{ending}", {}).get(f"{kind}_ms") for name in VISION.values()]
            if any(times):
                rows.append(
                    [f"{kind}, {shown}", *(f"{1e3 * measured['batch'] / ms:,.0f}" if ms else "not run" for ms in times)]
                )
    return table(["images/s", *VISION], rows)


def mambavision_gpus() -> str:
    """The trainer's images/s and milliseconds a step on one GPU and on two of the same host, in one run."""
    runs: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for run in _vision()["trainings"]:
        if "mode" in run and "images_per_second" in run:
            runs.setdefault((run["mode"], run["revision"]), {})[run["gpus"]] = run
    rows = []
    for (mode, revision), found in runs.items():
        if 2 in found:
            images = {gpus: run["images_per_second"] for gpus, run in found.items()}
            cells = [f"{images[gpus]:,.0f} ({1e3 * found[gpus]['batch'] / images[gpus]:.1f})" for gpus in (1, 2)]
            rows.append([mode, revision, *cells, f"{images[2] / images[1]:.2f}"])
    header = ["one GPU, images/s (ms a step)", "two GPUs, images/s (ms a step)"]
    return table(["the trainer's steps", "revision", *header, "times"], rows)


TABLES: dict[str, Callable[[], str]] = {
    make.__name__: make
    for make in (
        *(demo_imagenet, demo_wikitext103, scan, scan_triton, spectrum, spectrum_differences, spectrum_blocks),
        *(study_cifar10, study_cifar10_mechanism, study_cifar10_tokens),
        *(study_imagenette, study_imagenette_mechanism, study_imagenette_tokens),
        *(ag_news, imdb, mamba_lm, orders, orders_differences, token_norms, text_leak),
        *(mambavision_cost, mambavision_modes, mambavision_gpus),
    )
}


def take(name: str, run: Path) -> None:
    """Keep a run's result.json here, without what was measured block by block."""
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    for arm in result["arms"].values():
        arm.pop("blocks", None)
    (FOLDER / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table would change")
    parser.add_argument("--take", nargs=2, metavar=("NAME", "RUN"), help="take over a run's result.json first")
    options = parser.parse_args(arguments)
    if options.take:
        take(options.take[0], Path(options.take[1]))
    stale = []
    for name, make in TABLES.items():
        path, text = FOLDER / f"results_{name}.md", make()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not options.check:
                path.write_text(text, encoding="utf-8")
    print(f"{'stale' if options.check else 'written'}: {', '.join(stale) or 'none'}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
