"""The language study from command to report, small; its measures; its presets."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tokendyn import core
from tokendyn.backends.torch.models import MambaLM, TransformerLM
from tokendyn.errors import OptionError
from tokendyn.experiments import _cli
from tokendyn.experiments._records import read_records
from tokendyn.experiments.wikitext103.__main__ import main
from tokendyn.experiments.wikitext103._arms import ARMS, ORDERS, reads_future, resolve_arm
from tokendyn.experiments.wikitext103._config import PRESETS
from tokendyn.experiments.wikitext103._measures import measure_blocks

SETTINGS = (
    "--d-model 16 --n-layer 2 --d-state 4 --sequence-length 32 --batch-size 2 --steps 4 --log-every 1 "
    "--evaluate-every 2 --checkpoint-every 2 --evaluation-tokens 300 --measured-tokens 40 --threads 1 --jobs 1"
)
SHRUNK = SETTINGS.split()
WORDS = "the tokens of a model move and some stay near each other while others go"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    generator = np.random.default_rng(11)
    words = np.array(WORDS.split(" "))
    for name, count in (("wiki.train.raw", 600), ("wiki.valid.raw", 120)):
        (folder / name).write_text("\n".join(" ".join(line) for line in generator.choice(words, (count // 10, 10))))
    (folder / "other.txt").write_text(' = Title = \n\n " Some " words , 10 @,@ 000 of them . \n' * 8)
    return folder


def command(text: Path, out: Path, *more: str) -> list[str]:
    places = ["--text", str(text), "--tokenizer", "bytes", "--cache-dir", str(out.parent / "cache"), "--out", str(out)]
    return [*places, *SHRUNK, *more]


def read(place: Path) -> Any:
    return json.loads(place.read_bytes())


def test_study_and_report(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "out"
    arms = ["free", "negative", "mixed", "positive", "no_norm", "transformer"]
    given = command(text, out, "--arms", *arms, "--seeds", "0", "1", "--zero-shot", str(text / "other.txt"))
    assert main([*given, "--n-head", "2"]) == 0
    printed = capsys.readouterr()
    result = read(out / "result.json")
    assert list(result["arms"]) == arms
    assert set(result["data"]) == {"train", "held_out", "zero_shot"}
    for arm in arms:
        values = result["arms"][arm]
        runs = [read(out / arm / f"seed-{seed}" / "result.json")["held_out"] for seed in (0, 1)]
        assert values["held_out"]["perplexity"]["values"] == [run["perplexity"] for run in runs]
        assert values["held_out"]["zero_shot_word_perplexity"]["mean"] > 1
        assert values["cost"]["tokens_per_second"] > 0
        assert arm in printed.out
        lines = [line for line in read_records(out / arm / "seed-0" / "metrics.jsonl") if line["split"] == "held_out"]
        assert [line["step"] for line in lines] == [0, 2, 4]
        assert lines[-1]["loss"] < lines[0]["loss"]
        for line in lines:
            assert len(line["blocks"]["norms"]) == 3
            assert set(line["blocks"].get("layers", {})) == (set() if arm == "transformer" else {"0", "1"})
    signs = {
        arm: [layer["positive_self"] for layer in result["arms"][arm]["blocks"][0]["layers"].values()]
        for arm in ("negative", "positive")
    }
    assert signs == {"negative": [0.0, 0.0], "positive": [1.0, 1.0]}
    largest, smallest = result["arms"]["mixed"]["blocks"][0]["layers"]["0"]["symmetric"]
    assert largest > 0 > smallest

    asked = [(c["question"], c["higher"], c["lower"]) for c in result["comparisons"]]
    assert asked[:2] == [("as published", "negative", "mixed"), ("as published", "mixed", "positive")]
    assert {(higher, lower) for _, higher, lower in asked[2:]} == {(arm, "free") for arm in arms[1:]}
    first = result["comparisons"][0]["difference"]
    losses = {arm: np.array(result["arms"][arm]["held_out"]["loss"]["values"]) for arm in arms}
    np.testing.assert_allclose(first["values"], losses["negative"] - losses["mixed"])
    assert len(first["interval95"]) == 2
    assert "as published: held-out loss, nats a token: negative - mixed = " in printed.out

    for arm, kind in (("positive", MambaLM), ("no_norm", MambaLM), ("transformer", TransformerLM)):
        model = kind.from_pretrained(out / "models" / arm)
        ids = torch.arange(97, 122)[None]
        assert model(ids[:, :-1], ids[:, 1:]).isfinite().all()
        weights = load_file(out / arm / "seed-0" / "checkpoints" / "step-00000004" / "model.safetensors")
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())

    page = (out / "report.md").read_text()
    assert page.count("\n| ") > 6
    for name in ("study", "layers"):
        assert f"figures/{name}.png" in page
        with Image.open(out / "figures" / f"{name}.png") as image:
            assert image.width > 1000

    before = {place: place.read_bytes() for place in out.rglob("*.json*") if place.name != "environment.json"}
    request.getfixturevalue("undrawn")
    assert main([*given, "--n-head", "2", "--resume", "auto"]) == 0
    assert {place: place.read_bytes() for place in before} == before


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_was_cut_off_ends_with_the_same_bits(text: Path, tmp_path: Path) -> None:
    more = ("--arms", "positive", "--seeds", "3", "--head-dropout", "0.2", "--recompute")
    assert main(command(text, tmp_path / "whole", *more)) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    run = tmp_path / "cut" / "positive" / "seed-3"
    for place in (tmp_path / "cut" / "result.json", run / "result.json"):
        place.unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    assert main([*command(text, tmp_path / "cut", *more), "--resume", "auto"]) == 0
    for name in ("metrics.jsonl", "result.json", "checkpoints/step-00000004/model.safetensors"):
        place = Path("positive", "seed-3", name)
        assert (tmp_path / "whole" / place).read_bytes() == (tmp_path / "cut" / place).read_bytes()


@pytest.mark.usefixtures("undrawn")
def test_arms_begin_equal_where_they_can(text: Path, tmp_path: Path) -> None:
    arms = ["negative", "positive", "negative_matched", "no_convolution"]
    assert main(command(text, tmp_path / "out", "--arms", *arms, "--seeds", "0")) == 0
    metrics = {arm: (tmp_path / "out" / arm / "seed-0" / "metrics.jsonl").read_bytes() for arm in arms}
    assert metrics["negative"] == metrics["negative_matched"]  # one and the same parametrisation
    first = {arm: json.loads(content.splitlines()[0])["loss"] for arm, content in metrics.items()}
    assert first["negative"] != first["positive"]
    assert abs(first["negative"] - first["positive"]) < 0.05


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("preset", ["table2_negative", "table2_mixed", "table2_positive", "table2_free", "spectrum"])
def test_presets_run_shrunk(preset: str, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ["--steps", "2", "--seeds", "0", "--device", "cpu"]
    if preset == "spectrum":
        more += ["--arms", "free", "mixed_matched"]
    assert main([preset, *command(text, out, *more)]) == 0
    for arm in read(out / "result.json")["arms"]:
        losses = [line["loss"] for line in read_records(out / arm / "seed-0" / "metrics.jsonl")]
        assert np.isfinite(losses).all()


def test_table2_has_the_published_settings() -> None:
    for name, arm in (("negative", "negative"), ("mixed", "mixed"), ("positive", "positive"), ("free", "free")):
        config = PRESETS[f"table2_{name}"]()
        train, model = config.train, config.model
        assert config.arms == (arm,)
        assert (train.epochs, train.batch_size, train.steps, config.data.sequence_length) == (25, 128, None, 1024)
        assert (train.learning_rate, train.final_learning_rate, train.warmup) == (1.5e-3, 1.5e-4, 0.01)
        assert (train.weight_decay, train.beta1, train.beta2, train.clip_norm) == (0.25, 0.9, 0.999, 1.0)
        assert (model.d_model, model.n_layer, model.d_state, model.dropout) == (768, 24, 16, 0.25)
        assert (config.data.tokenizer, config.compute.precision) == ("gpt2", "bfloat16")
        with torch.device("meta"):
            kind, options = resolve_arm(arm, model.options())
            made = kind(vocab_size=50_257, **options)
        assert 127e6 < made.parameter_count() < 130e6
        assert made.backbone.layers[0].mixer.d_inner == 1536


def test_spectrum_is_within_its_budget_and_crosses_regime_with_scale() -> None:
    config = PRESETS["spectrum"]()
    with torch.device("meta"):
        kind, options = resolve_arm("free", config.model.options())
        model = kind(vocab_size=50_257, **options)
    assert model.parameter_count(embedding=False) < 12e6
    tokens = config.train.steps * config.train.batch_size * config.data.sequence_length  # type: ignore[operator]
    assert 20e6 <= tokens <= 30e6
    assert (len(config.arms), len(config.seeds)) == (7, 3)
    assert config.run.max_minutes is None  # only a user knows how long a machine is to be had
    for _, order in ORDERS:
        assert set(order) <= set(config.arms)
    scales = {}
    for arm in config.arms[1:]:
        options = ARMS[arm][1]
        S_B, _ = core.io_projections(
            np.zeros((4, 8)), diagonal=np.zeros(4), regime=options["io_regime"], form=options["io_form"]
        )
        scales[arm] = (options["io_regime"], round(float(np.abs(S_B).max()), 2))
    regimes = ("negative", "mixed", "positive")
    assert sorted(scales.values()) == sorted((r, s) for r in regimes for s in (0.69, 1.39))


def test_arms_that_read_the_future_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arms = ["free", "chunk_order:order_chunk=4", "mamba_published_order"]
    assert main(["leak", "--cache-dir", str(tmp_path / "cache"), "--out", str(out), *SHRUNK, "--arms", *arms]) == 0
    result, printed = read(out / "result.json"), capsys.readouterr().out
    assert [values["reads_future"] for values in result["arms"].values()] == [False, False, True]
    assert result["entropy"] == pytest.approx(np.log(64))
    asked = {(c["question"], c["higher"], c["lower"]) for c in result["comparisons"]}
    assert asked == {("free against the rest", arms[1], "free"), ("reading the future", "free", arms[2])}
    rows = {line.split()[0]: line.split()[1] for line in printed.splitlines() if line.startswith(tuple(arms))}
    assert rows["mamba_published_order"].startswith("[")
    assert not rows["free"].startswith("[")
    assert re.search(r"Below it: none\. Not below: free \(\+", printed)


def test_presets_of_orders_are_of_one_size() -> None:
    models = {}
    for name in ("order", "table6", "table10"):
        config = PRESETS[name]()
        assert (config.data, config.train) == (PRESETS["spectrum"]().data, PRESETS["spectrum"]().train)
        assert config.arms[0] == "free"
        models |= config.models()
    assert sum(reads_future(arm) for arm in models) == 3
    for arm, options in models.items():
        with torch.device("meta"):
            kind, _ = resolve_arm(arm, {})
            model = kind(vocab_size=50_257, **{key: value for key, value in options.items() if key != "model"})
        assert model.causal is not reads_future(arm)
    assert {f"chunk_order{rest}" for rest in ("", "_shared_layers", "_no_norm", "_no_convolution")} <= set(models)


def test_orders_is_all_three_studies_in_one_that_sees_its_text_once() -> None:
    config = PRESETS["orders"]()
    assert {arm for name in ("order", "table6", "table10") for arm in PRESETS[name]().arms} < set(config.arms)
    tokens = config.train.steps * config.train.batch_size * config.data.sequence_length  # type: ignore[operator]
    assert tokens < 6.87e6  # what the text of the spectrum study has


def test_measures_of_the_blocks_are_those_of_their_definitions() -> None:
    torch.manual_seed(1)
    model = MambaLM(vocab_size=13, d_model=8, n_layer=2, d_state=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    tokens = torch.randint(13, (2, 6))
    with torch.no_grad():
        found = measure_blocks(model, tokens)
        stream = model.backbone.embedding(tokens)
        for index, block in enumerate(model.backbone.layers):
            mixer, layer = block.mixer, found["layers"][str(index)]
            h = mixer.in_proj(block.norm(stream))[..., :16]
            x = torch.nn.functional.silu(mixer.conv1d(h.mT)[..., :6].mT).double().numpy()
            S_B, S_C = (S.double().numpy() for S in mixer.io_matrices())
            M = S_C.T @ S_B
            magnitudes = np.sort(np.abs(np.linalg.eigvals(M)))[::-1]
            np.testing.assert_allclose(layer["eigenvalues"], magnitudes[:3], rtol=1e-4)
            assert magnitudes[3:].max() < 1e-6
            symmetric = np.linalg.eigvalsh((M + M.T) / 2)
            np.testing.assert_allclose(layer["symmetric"], [symmetric[-1], symmetric[0]], rtol=1e-4)
            scores = np.einsum("bld,de,bje->blj", x, M, x)
            pairs = np.array([scores[b, l, j] > 0 for b in range(2) for l in range(6) for j in range(l)])
            assert layer["positive_pairs"] == pytest.approx(pairs.mean())
            assert layer["positive_self"] == pytest.approx(
                np.mean([scores[b, l, l] > 0 for b in (0, 1) for l in range(6)])
            )
            s_delta = (mixer.dt_proj.weight @ mixer.x_proj.weight[:1]).double().numpy()
            step = np.log1p(np.exp(x @ s_delta.T + mixer.dt_proj.bias.double().numpy()))
            a = np.exp(mixer.A_log.double().numpy())
            rates = []
            for b in range(2):
                for l in range(6):
                    moved = np.zeros(16)
                    for j in range(l + 1):
                        decay = np.exp(-a * step[b, j + 1 : l + 1].sum(0)[:, None])  # (d, N)
                        P = (decay * ((S_C @ x[b, l]) * (S_B @ x[b, j]))).sum(1) * step[b, j]
                        moved += P * x[b, j]
                    rates.append(x[b, l] @ moved / (x[b, l] @ x[b, l]))
            assert layer["ode_rate"] == pytest.approx(np.mean(rates), rel=1e-4)
            np.testing.assert_allclose(found["norms"][index], stream.norm(dim=-1).log2().mean().item(), rtol=1e-5)
            rise = found["norms_ode"][index + 1] - found["norms_ode"][index]
            assert rise == pytest.approx(np.mean(rates) / np.log(2), rel=1e-4)
            stream = block(stream)


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("free", {"dropout": 0.1}),
        ("free:norm=none,n_layer=6", {"norm": "none", "n_layer": 6}),
        ("positive:io_form=paper,dropout=0", {"io_regime": "positive", "io_form": "paper", "dropout": 0.0}),
        ("free:d_conv=none,dt_rank=5,share_layers=true", {"d_conv": None, "dt_rank": 5, "share_layers": True}),
        ("h3", {"d_model": 8, "dropout": 0.1}),
        ("transformer:n_head=4,mlp_ratio=2.5", {"n_head": 4, "mlp_ratio": 2.5}),
        ("chunk_order_no_norm:order_chunk=16", {"norm": "none", "order_scope": "chunks", "order_chunk": 16}),
        ("mamba_published_order:order=softsort", {"order": "softsort"}),
    ],
)
def test_arms_are_models_with_changes(arm: str, expected: dict[str, Any]) -> None:
    kind, options = resolve_arm(arm, {"d_model": 8, "n_layer": 1, "dropout": 0.1, "n_head": 2})
    assert expected.items() <= options.items()
    assert all(type(options[key]) is type(value) for key, value in expected.items())
    kind(vocab_size=5, **options)


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ("positve", r"unknown arm 'positve' \(did you mean 'positive'\?\)"),
        ("free:dmodel=3", "'dmodel=3' in .* is no change; expected FIELD=VALUE of vocab_size, d_model"),
        ("free:n_layer=three", "'three' in .*, expected a whole number"),
        ("free:norm=batch", "'batch' in .*, expected rms, layer, none"),
        ("free:order=published", "sorts whole sequences, so it would read .* called mamba_published_order, h3_pub"),
        ("chunk_order:order_scope=sequence", "sorts whole sequences"),
        ("h3_published_order:order_scope=chunks", "sorts no whole sequence"),
    ],
)
def test_arms_that_are_none_are_told(arm: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        resolve_arm(arm, {})


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--sequence-length", "5000"], r"2 sequences .* of 5000 tokens .* more than the [\d,]+ training tokens hold"),
        (["--evaluation-stride", "33"], "--evaluation-stride is 33, expected at most"),
        (["--zero-shot", "nowhere.txt"], r"needs the text of --zero-shot: nowhere\.txt is no file"),
        (["--arms", "free", "free"], "expected one or more, each once"),
        (["--cuda-graphs", "--device", "cpu"], "--cuda-graphs needs an NVIDIA GPU, and --device is cpu"),
        (["--tokenizer", "gpt2"], "needs GPT-2's tokenizer: give --tokenizer-dir"),
    ],
)
def test_mistakes_are_one_sentence(
    more: list[str], words: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(text, tmp_path / "out", *more)) == _cli.MISTAKE
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(words, error)
    assert not (tmp_path / "out").exists()


def test_other_presets_ask_for_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spectrum"]) == _cli.MISTAKE
    error = capsys.readouterr().err
    assert re.search("needs a text: give --text .*; and GPT-2's tokenizer: give --tokenizer-dir", error)
