"""The study of orders: its measures against plain definitions, its report, and images kept on the device."""

from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.experiments.trees import write_tree
from tokendyn import token_order
from tokendyn.backends.torch import models
from tokendyn.experiments import _cli
from tokendyn.experiments._checkpoint import read_tensors
from tokendyn.experiments._order_arms import ARMS
from tokendyn.experiments._order_measures import measure_orders
from tokendyn.experiments._records import read_records
from tokendyn.experiments._signals import StopSignals
from tokendyn.experiments.imagenet.__main__ import main
from tokendyn.experiments.imagenet._measures import (
    CLUSTER_COSINE,
    measure_mechanism,
    shuffled_orders,
)
from tokendyn.experiments.imagenet._page import conclusion

SETTINGS = (
    "study --model mambavision_16px --image-size 16 --steps 2 --batch-size 8 --log-every 1 --evaluate-every 1 "
    "--checkpoint-every 1 --jobs 1 --device cpu"
)
LABELS = torch.tensor([0, 0, 0, 1, 1, 2])


def make(arm: str) -> models.MambaVision:
    torch.manual_seed(1)
    model = models.mambavision_16px(num_classes=3, order=ARMS[arm].order).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("order.K"):
                value.normal_()
    return model


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(len(LABELS), 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_the_reaction_to_scores_is_that_of_finite_differences() -> None:
    """Each token's score moved by hand, in all images at once: images do not see each other."""
    model, inputs = make("annealed").double(), images().double()
    name, shift = "levels.3.blocks.0.mixer.order", torch.zeros(len(LABELS), 64, dtype=torch.float64)
    found = measure_mechanism(model, inputs, LABELS)["orders"][name]
    scores = []

    def move(_: Any, __: Any, order: Any) -> Any:
        scores.append(order.scores)
        return token_order(order.scores + shift, "softsort", tau=order.tau)

    handle = model.get_submodule(name).register_forward_hook(move)
    slopes = []
    with torch.no_grad():
        for token in range(64):
            losses = []
            for step in (1e-5, -1e-5):
                shift[:, token] = step
                losses.append(F.cross_entropy(model(inputs), LABELS, reduction="none"))
                shift[:, token] = 0
            slopes.append((losses[0] - losses[1]) / 2e-5)
    handle.remove()
    reach = torch.stack(slopes, dim=1).norm(dim=1) * scores[0].std(dim=1, correction=0)
    np.testing.assert_allclose(found["score_gradient"], reach.mean().item(), rtol=1e-4)
    assert 0 < found["direction_share"] < 1


def test_measures_of_tokens_follow_their_definitions() -> None:
    model, outputs = make("baseline"), []
    block = model.levels[3].blocks[1]  # type: ignore[union-attr,index]
    handle = block.register_forward_hook(lambda _, __, out: outputs.append(out.detach().double()))
    found = measure_mechanism(model, images(), LABELS)["tokens"]["levels.3.blocks.1"]
    handle.remove()
    pairs, first, counts = [], [], []
    for tokens in outputs[0].numpy():
        unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
        cosines = unit @ unit.T
        pairs.append(np.mean([cosines[i, j] for i, j in combinations(range(64), 2)]))
        first.append(cosines[0, 1:].mean())
        leaders: list[int] = []
        for l in range(64):
            if not any(cosines[l, leader] >= CLUSTER_COSINE for leader in leaders):
                leaders.append(l)
        counts.append(len(leaders))
    expected = {"pairwise_cosine": np.mean(pairs), "first_cosine": np.mean(first), "clusters": np.mean(counts)}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)


def test_agreement_is_the_mean_rank_correlation() -> None:
    from scipy.stats import spearmanr

    model, orders = make("straight_through"), []
    name = "levels.2.blocks.0.mixer.order"
    handle = model.get_submodule(name).register_forward_hook(lambda _, __, order: orders.append(order.indices))
    found = measure_mechanism(model, images(), LABELS)["orders"][name]
    handle.remove()
    places = orders[0].argsort(dim=1).numpy()
    same = [(0, 1), (0, 2), (1, 2)], [(3, 4)]
    correlation = {pair: spearmanr(places[pair[0]], places[pair[1]]).statistic for pair in combinations(range(6), 2)}
    by_class = [np.mean([correlation[pair] for pair in pairs]) for pairs in same]
    np.testing.assert_allclose(found["agreement_class"], np.mean(by_class), atol=1e-12)
    np.testing.assert_allclose(found["agreement_all"], np.mean(list(correlation.values())), atol=1e-12)
    raster = [spearmanr(row, np.arange(64)).statistic for row in places]
    np.testing.assert_allclose(found["agreement_raster"], np.mean(raster), atol=1e-12)


@pytest.mark.parametrize("arm", ["baseline", "straight_through", "published", "random", "mean", "reversed"])
def test_shuffling_acts_inside_the_block_only(arm: str) -> None:
    model, inputs = make(arm), images()
    before = torch.get_rng_state()
    with torch.no_grad():
        plain = model(inputs)
        orders = measure_orders(model, inputs)
        with shuffled_orders(model, 7):
            shuffled = model(inputs)
            during = measure_orders(model, inputs)
        with shuffled_orders(model, 7):
            assert torch.equal(model(inputs), shuffled)
        assert torch.equal(model(inputs), plain)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(shuffled, plain) == (arm == "mean")  # means know no order
    for name, order in orders.items():
        np.testing.assert_allclose(during[name]["effective_tokens"], order["effective_tokens"], rtol=1e-4)
    assert len(during) == 2


def test_a_study_from_command_to_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    tree, out = write_tree(tmp_path / "tree", classes=3, train=8, val=4), tmp_path / "out"
    arms = ["baseline", "published", "annealed", "random"]
    command = [*SETTINGS.split(), "--data-dir", str(tree), "--out", str(out), "--arms", *arms, "--seeds", "0", "1"]
    assert main([*command, "--max-minutes", "0"]) == 128 + 14
    assert "stopped by --max-minutes: " in capsys.readouterr().err
    assert main([*command, "--resume", "auto"]) == 0
    result = json.loads((out / "result.json").read_bytes())
    for arm in arms:
        values = result["arms"][arm]
        assert values["held_out"].keys() == {"loss", "accuracy", "accuracy_shuffled"}
        assert len(values["shuffle_loss"]["values"]) == 2
        assert len(values["tokens"]) == 4
        assert bool(values["orders"]) == (arm in ("published", "annealed"))
    averaged = [
        line["orders"]["levels.2.blocks.0.mixer.order"]["effective_tokens"]
        for line in read_records(out / "annealed" / "seed-0" / "metrics.jsonl")
        if line["split"] == "held_out"
    ]
    assert averaged[0] > 30 > 4 * averaged[2] > averaged[2]  # the schedule: from a mean to a sort
    kept = read_tensors(out / "annealed" / "seed-0" / "keepsakes.safetensors")
    assert kept["classes"].shape == (3, 8, 8)
    text = (out / "report.md").read_text()
    assert "| annealed | SoftSort, τ = 1 to 0.02, unit scores, restored |" in text
    for name in ("study", "differences", "mechanism", "class_maps"):
        assert f"](figures/{name}.png)" in text
        with Image.open(out / "figures" / f"{name}.png") as image:
            assert np.asarray(image.convert("L")).std() > 5
    assert str(out / "report.md") in capsys.readouterr().out

    shutil.rmtree(out / "annealed" / "seed-1")  # as if time had been up before this run
    request.getfixturevalue("undrawn")
    assert main([*command, "--resume", "auto", "--max-minutes", "0"]) == 128 + 14
    printed = capsys.readouterr()
    assert "1 of 2 seeds are finished in all arms" in printed.err
    assert "held-out results, one seed (of 2 planned)" in printed.out
    result = json.loads((out / "result.json").read_bytes())
    assert (result["seeds"], result["seeds_planned"]) == ([0], [0, 1])
    assert len(result["arms"]["published"]["held_out"]["accuracy"]["values"]) == 1
    assert "; 1 seed (of 2 planned), each with" in (out / "report.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_where_images_are_kept_changes_no_bit(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", classes=3)
    command = [*SETTINGS.split(), "--data-dir", str(tree), "--seeds", "0", "--arms", "annealed", "--no-mechanism"]
    for name, options in {"device": [], "host": ["--no-on-device"]}.items():
        assert main([*command, "--crop-area", "0.4", "--out", str(tmp_path / name), *options]) == 0
    for file in ("metrics.jsonl", "checkpoints/step-00000002/model.safetensors"):
        place = Path("annealed", "seed-0", file)
        assert (tmp_path / "device" / place).read_bytes() == (tmp_path / "host" / place).read_bytes()


def test_images_that_do_not_fit_cannot_be_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = write_tree(tmp_path / "tree")
    assert main([*SETTINGS.split(), "--data-dir", str(tree), "--cache-mb", "0"]) == _cli.MISTAKE
    assert "--on-device was given, but the images do not fit into --cache-mb" in capsys.readouterr().err


def test_time_is_up() -> None:
    with StopSignals(minutes=60) as long, StopSignals(minutes=0) as short, StopSignals() as never:
        assert (long.received, short.received, never.received) == (None, 14, None)


def study_result(differences: dict[str, list[float]], lost: float) -> dict[str, Any]:
    def arm(interval: list[float] | None) -> dict[str, Any]:
        values: dict[str, Any] = {
            "order": {"method": "softsort"},
            "orders": {"levels.2.blocks.0.mixer.order": {}},
            "shuffle_loss": {"mean": lost, "interval95": [lost - 0.01, lost + 0.01]},
        }
        if interval is not None:
            values["difference"] = {"accuracy": {"interval95": interval}}
        return values

    return {"seeds": [0, 1, 2], "arms": {"baseline": arm(None), **{k: arm(v) for k, v in differences.items()}}}


def test_the_conclusion_follows_the_intervals() -> None:
    text = " ".join(conclusion(study_result({"a": [0.01, 0.02], "b": [-0.02, -0.01], "c": [-0.03, 0.01]}, 0.2)))
    assert "**Better than baseline: a.**" in text
    assert "Worse: b." in text
    assert "No difference can be told for c: intervals reach up to 2.00 points" in text
    assert "a loses 20.00 points when its order is shuffled" in text
    assert text.endswith("On such data switch on a.")
    text = " ".join(conclusion(study_result({"a": [-0.01, 0.02]}, 0.0)))
    assert "**No arm is better than baseline beyond chance.**" in text
    assert "a loses nothing that can be told" in text
    assert text.endswith("On such data leave the tokens in their order.")
