"""Measurements against independent computations, planted faults, bad inputs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import tokendyn  # noqa: E402
from tests.diagnose.models import VOCABULARY, hugging_face, small  # noqa: E402
from tokendyn import errors  # noqa: E402
from tokendyn.cli import main  # noqa: E402
from tokendyn.diagnose import capture, diagnose, load, save_projections  # noqa: E402
from tokendyn.diagnose._measure._regime import measure_regime  # noqa: E402
from tokendyn.torch.models import MambaLM  # noqa: E402


def _dense_check(spectrum: dict[str, Any], S_B: Any, S_C: Any) -> None:
    S_B, S_C = S_B.detach().double().numpy(), S_C.detach().double().numpy()
    M = S_C.T @ S_B
    scale = np.abs(M).max() * len(M)
    found = np.array([complex(*pair) for pair in spectrum["eigenvalues"]])
    dense = np.linalg.eigvals(M)
    for value in found:
        assert np.abs(dense - value).min() < 1e-10 * scale
    largest = sorted(np.abs(dense), reverse=True)[: len(found)]
    np.testing.assert_allclose(sorted(np.abs(found), reverse=True), largest, atol=1e-10 * scale)
    dense = np.linalg.eigvalsh((M + M.T) / 2)
    dense = np.sort(dense[np.argsort(np.abs(dense))[-len(spectrum["symmetric"]) :]])
    np.testing.assert_allclose(np.sort(spectrum["symmetric"]), dense, atol=1e-10 * scale)
    assert spectrum["norm"] == pytest.approx(np.linalg.norm(M, 2), rel=1e-10)
    assert spectrum["frobenius"] == pytest.approx(np.linalg.norm(M), rel=1e-10)
    assert spectrum["rank"] == np.linalg.matrix_rank(M)


@pytest.mark.parametrize("case", range(3))
def test_spectra_are_those_of_the_dense_matrix(case: int) -> None:
    model, ids = small(20 + case, layers=2)
    found = diagnose(model, ids)
    for layer, block in zip(found.layers, model.layers, strict=True):
        _dense_check(layer["spectrum"], *block.mixer.io_matrices())


def test_spectra_on_hugging_face() -> None:
    model, ids = hugging_face("mamba", 5)
    found = diagnose(model, ids)
    for layer, block in zip(found.layers, model.backbone.layers, strict=True):
        rank, state = model.config.time_step_rank, model.config.state_size
        weight = block.mixer.x_proj.weight
        _dense_check(layer["spectrum"], weight[rank : rank + state], weight[rank + state :])


def test_the_regime_follows_the_inputs_and_not_the_count_of_eigenvalues() -> None:
    """Same free projections, so the same counts of signs; S_C = ± S_B makes x_lᵀ M x_j of one sign or the other."""
    for sign, wanted in ((1.0, ("divergence", "slow divergence", "fast divergence")), (-1.0, ("convergence",))):
        model, ids = small(30, layers=1)
        mixer = model.layers[0].mixer
        rank, state = mixer.dt_rank, mixer.d_state
        with torch.no_grad():
            mixer.x_proj.weight[rank + state :] = sign * mixer.x_proj.weight[rank : rank + state]
            mixer.dt_proj.bias.fill_(8.0)  # forgets at once, so that x_lᵀ M x_l decides
        found = diagnose(model, ids).layers[0]
        assert found["regime"]["kind"] in wanted
        assert found["regime"]["self_product"]["positive"] == (1.0 if sign > 0 else 0.0)
        assert found["spectrum"]["positive_weight"] == pytest.approx(1.0 if sign > 0 else 0.0, abs=1e-6)


def test_slow_and_fast_divergence_are_told_apart_by_the_step_size() -> None:
    for sign, wanted in ((1.0, "fast divergence"), (-1.0, "slow divergence")):
        model, ids = small(31, layers=1)
        mixer = model.layers[0].mixer
        with torch.no_grad():
            mixer.x_proj.weight[mixer.dt_rank + mixer.d_state :] = mixer.x_proj.weight[
                mixer.dt_rank : mixer.dt_rank + mixer.d_state
            ]
            mixer.dt_proj.bias.fill_(8.0)
        with capture(model) as scans:
            model(ids)
        scan = scans[0]
        assert scan.pre is not None
        scan.pre = sign * scan.pre.abs()
        assert measure_regime(scan)["kind"] == wanted


def test_rates_are_those_of_the_flow() -> None:
    """A token's rate is ⟨x_l, (P x)_l⟩ / |x_l|² with P the dense hidden attention."""
    model, ids = small(32, layers=1)
    with capture(model.double()) as scans:
        model(ids)
    scan = scans[0]
    P = tokendyn.hidden_attention(scan.delta, scan.A, scan.B, scan.C)[0]  # (d, L, L)
    x = scan.u[0]
    velocity = torch.einsum("dlj,dj->dl", P, x)
    wanted = (x * velocity).sum(0) / x.square().sum(0)
    found = measure_regime(scan)
    np.testing.assert_allclose(found["rate"]["min"], float(_rates(scan).min()), rtol=1e-6)
    np.testing.assert_allclose(_rates(scan)[0].numpy(), wanted.detach().numpy(), rtol=1e-9, atol=1e-14)


def _rates(scan: Any) -> Any:
    moved = (scan.source * scan.state_output()).sum(1)
    return (moved / scan.source.square().sum(1)).detach()


def test_attention_measures() -> None:
    model, ids = small(33, layers=1)
    found = diagnose(model, ids, channels=(0, 7)).layers[0]["attention"]
    with capture(model) as scans:
        model(ids)
    P = tokendyn.hidden_attention(
        *(t[:1] if t.ndim == 3 else t for t in (scans[0].delta, scans[0].A, scans[0].B, scans[0].C))
    )
    weights = P[0].abs().mean(0)
    alpha = (weights / weights.sum(-1, keepdim=True)).detach().double().numpy()
    length = len(alpha)
    for j in range(length - 1):
        assert found["sink"][j] == pytest.approx(alpha[j + 1 :, j].mean(), abs=2e-6)
    entropy = [-(row[: l + 1] * np.log(row[: l + 1])).sum() / np.log(l + 1) for l, row in enumerate(alpha) if l]
    assert found["entropy"] == pytest.approx(np.mean(entropy), rel=1e-5)
    cells = np.array(found["picture"]["cells"])
    np.testing.assert_allclose(cells, alpha, atol=1e-5)
    assert set(found["of_channel"]) == {"0", "7"}
    assert found["reconstruction"] < 1e-5


def test_a_planted_sink_is_found() -> None:
    """Δ next to 0 for all but one token: the state holds that token alone."""
    model, ids = small(34, layers=1)
    from tokendyn.diagnose._measure._attention import measure_attention

    with capture(model) as scans:
        model(ids)
    scan = scans[0]
    scan.delta = torch.full_like(scan.delta, 1e-6)
    scan.delta[:, :, 3] = 1.0
    found = measure_attention(scan)
    assert found["sinks"] == [3]
    assert found["top_token"] == 3
    assert found["top_sink"] > 0.9


def test_tokens_that_are_one_have_collapsed() -> None:
    from tokendyn.diagnose._measure import measure_tokens

    one = torch.ones(2, 20, 8) * torch.arange(1, 21)[:, None]
    found = measure_tokens(one)
    assert found["cosine"] == pytest.approx(1.0)
    assert found["effective_rank"] == pytest.approx(1.0)
    assert found["clusters"] == 1
    apart = measure_tokens(torch.eye(8)[None] * 1e30)
    assert apart["effective_rank"] == pytest.approx(8.0)
    assert apart["clusters"] == 8
    assert apart["cosine"] == pytest.approx(0.0)


def test_stable_poles_are_those_of_the_sphere_classification() -> None:
    """A first token next to a stable pole stays; the eigenvalues there are those of the classification."""
    from tokendyn.diagnose._capture import Projections
    from tokendyn.diagnose._measure._sphere import stable_poles

    for seed in range(4):
        rng = np.random.default_rng(seed)
        S_B, S_C = rng.normal(size=(2, 2, 3))
        s_delta, bias = rng.normal(size=(3, 3)), rng.normal(size=3)
        maps = Projections(torch.tensor(S_B), torch.tensor(S_C), (torch.tensor(s_delta),))
        poles = {(channel, sign): rate for channel, sign, rate in stable_poles(maps, torch.tensor(bias))}
        M = S_C.T @ S_B
        for pole in range(3):
            for sign in (1, -1):
                e = sign * np.eye(3)[pole]
                step = np.log1p(np.exp(s_delta @ e + bias))
                eigenvalues = -M[pole, pole] * (step[pole] - np.delete(step, pole))
                assert ((pole, sign) in poles) == bool((eigenvalues < 0).all())
                if (pole, sign) in poles:
                    assert poles[pole, sign] == pytest.approx(-eigenvalues.max(), rel=1e-5)


FAULTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "A pushed to 0-": (lambda m: m.A_log.fill_(-25.0), r"A has been pushed to 0"),
    "exploding bias of the step": (lambda m: m.dt_proj.bias.fill_(2e4), r"the step size Δ explodes, up to 20,"),
    "exploding weight of the step": (lambda m: m.dt_proj.weight.mul_(1e9), r"the step size Δ explodes"),
    "infinite step": (
        lambda m: m.dt_proj.weight.mul_(3e38),
        r"the step size Δ (is not finite|explodes)|weight .* infinite",
    ),
    "NaN in x_proj": (lambda m: m.x_proj.weight[2, 3:4].fill_(float("nan")), r"x_proj\.weight holds 1 NaN entry"),
    "A pushed to 0- in one channel of sixteen": (
        lambda m: m.A_log[::16].fill_(-25.0),
        r"^warning: .*A has been pushed to 0 in 6% of its entries",
    ),
    "NaN in A_log": (lambda m: m.A_log[0].fill_(float("nan")), r"A_log holds \d+ NaN entries"),
    "infinite out_proj": (
        lambda m: m.out_proj.weight[0, :1].fill_(float("inf")),
        r"out_proj\.weight holds 1 infinite entry",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("family", ["own", "hugging_face"])
def test_planted_faults_are_named_in_the_first_line(fault: str, family: str) -> None:
    plant, cause = FAULTS[fault]
    torch.manual_seed(40)
    ids = torch.randint(VOCABULARY, (2, 40))
    if family == "own":
        model: Any = MambaLM(vocab_size=VOCABULARY, d_model=16, n_layer=3)
    else:
        transformers = pytest.importorskip("transformers")
        config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3, state_size=4)
        model = transformers.MambaForCausalLM(config)
    assert "critical" not in str(diagnose(model, ids))
    with torch.no_grad():
        plant(model.backbone.layers[1].mixer)
    found = diagnose(model, ids)
    first = str(found).splitlines()[0]
    assert first.startswith(("critical" if "one channel" not in fault else "warning") + ": backbone.layers.1.mixer: ")
    assert re.search(cause, first)
    page = found.to_html()
    listed = re.findall(r"<b>(.*?)</b>", page)
    assert listed[0].startswith("backbone.layers.1.mixer: ")


def test_a_fault_outside_the_scans_is_placed() -> None:
    model, ids = small(41)
    with torch.no_grad():
        model.layers[2].norm.bias.fill_(3e38)
        model.layers[2].norm.weight.fill_(3e38)
    first = diagnose(model, ids).findings[0]
    assert first.severity == "critical"
    assert "layers.2" in first.title


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.zeros(1, 0, dtype=torch.long), "at least one token"),
        ((), "hold no tensor"),
        ({}, "hold no tensor"),
        ("text", "hold no tensor"),
    ],
)
def test_empty_inputs(inputs: Any, words: str) -> None:
    model, _ = small(42)
    with pytest.raises(errors.DataError, match=words):
        diagnose(model, inputs)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.tensor([[3, VOCABULARY]]), f"ids go from 3 to {VOCABULARY}, expected 0 to {VOCABULARY - 1}"),
        (torch.tensor([[-1, 0]]), "ids go from -1 to 0"),
        (torch.zeros(2, 5), r"Tiny cannot be called on these inputs \(\(2, 5\) float32\): "),
        ({"ids": torch.zeros(1, 4, dtype=torch.long), "colour": "red"}, "unexpected keyword"),
        ((torch.zeros(1, 4, dtype=torch.long),) * 3, "positional arguments"),
        (np.zeros((1, 4), np.int64), r"inputs \(ndarray\) hold no tensor"),
        ([[1, 2]], r"inputs \(list\) hold no tensor"),
    ],
)
def test_inputs_that_the_model_does_not_take(inputs: Any, words: str) -> None:
    model, _ = small(42)
    model.train()
    with pytest.raises(errors.DataError, match=words) as raised:
        diagnose(model, inputs)
    assert "\n" not in str(raised.value)
    with pytest.raises(errors.ShapeError, match=r"Mamba: x has shape \(2, 3, 4, 16\)"):
        diagnose(model, torch.zeros(2, 3, 4, dtype=torch.long))  # said by the layer itself
    assert model.training
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_an_error_of_a_measurement_is_not_laid_on_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokendyn.diagnose import _diagnosis

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(_diagnosis, "measure", fail)
    model, ids = small(42)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        diagnose(model, ids)


def test_progress_is_told() -> None:
    model, ids = small(42)
    said: list[str] = []
    diagnose(model, ids, progress=said.append)
    assert [text.split(",")[0] for text in said] == ["1 of 3 layers", "2 of 3 layers", "3 of 3 layers"]
    assert said[2].endswith("layers.2.mixer")


def test_models_without_selective_layers() -> None:
    with pytest.raises(errors.OptionError, match=r"no selective \(S6\) layer found in Linear"):
        diagnose(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(errors.OptionError, match=r"expected a torch\.nn\.Module"):
        diagnose("model", torch.zeros(1, 2))  # type: ignore[arg-type]
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(
        vocab_size=16, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=4, n_groups=1
    )
    with pytest.raises(errors.OptionError, match=r"Mamba-2 \(SSD\)"):
        diagnose(transformers.Mamba2Model(config), torch.zeros(1, 4, dtype=torch.long))


def test_one_token_is_enough() -> None:
    model, ids = small(43)
    found = diagnose(model, ids[:1, :1])
    assert found.layers[0]["regime"]["kind"]
    found.to_html()


def test_mode_and_weights_stay() -> None:
    model, ids = small(44)
    model.train()
    model.layers[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    diagnose(model, ids)
    assert model.training
    assert model.layers[0].training
    assert not model.layers[1].mixer.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


HOSTILE = '</script><img src=x onerror="alert(1)">'


def test_hostile_names_are_harmless_text(tmp_path: Path) -> None:
    torch.manual_seed(45)
    layers = {HOSTILE: _entries(8, 3)}
    save_projections(tmp_path, layers)
    model, inputs = load(tmp_path)
    found = diagnose(model, inputs, name=HOSTILE)
    assert found.layers[0]["name"] == HOSTILE
    page = found.to_html()
    assert "<img" not in page
    assert page.count("</script>") == 2
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data.group(1))["layers"][0]["name"] == HOSTILE
    found.save(tmp_path / "report")  # the name is in the pictures too


def test_names_do_not_write_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Escapes of a terminal, a mark that turns the direction of writing, a line break, a very long name."""
    torch.manual_seed(51)
    wild = "a\x1b[2J\x9b31m\u202eb\nc" + "d" * 500
    entries = _entries(8, 3)
    entries["S_B"][0, 0] = float("nan")
    save_projections(tmp_path, {wild: entries})
    for arguments in ([], ["--json"], ["--out", str(tmp_path / "report")]):
        assert main(["diagnose", str(tmp_path), *arguments]) == 0
        printed = capsys.readouterr().out
        assert all(c.isprintable() or c == "\n" for c in printed)
        assert "\n" not in printed.strip() or printed.startswith("critical: a\\x1b[2J\\x9b31m\\u202eb\\ncddd")
    assert json.loads((tmp_path / "report" / "report.json").read_text())["layers"][0]["name"] == wild
    page = (tmp_path / "report" / "report.html").read_text()
    assert not any(mark in page for mark in ("\x1b", "\x9b", "\u202e"))


def _entries(d: int, state: int, **more: Any) -> dict[str, Any]:
    return {
        "S_B": torch.randn(state, d),
        "S_C": torch.randn(state, d),
        "S_delta": torch.randn(d, d) / d,
        "A": -torch.rand(d, state),
        **more,
    }


def test_projections_with_biases(tmp_path: Path) -> None:
    torch.manual_seed(46)
    entries = _entries(6, 3, B_bias=torch.randn(3), C_bias=torch.randn(3), delta_bias=torch.randn(6), D=torch.randn(6))
    save_projections(tmp_path, {"a": {**entries, "x": torch.randn(1, 30, 6)}, "b": _entries(6, 3)})
    model, inputs = load(tmp_path, dtype=torch.float64)
    found = diagnose(model, inputs)
    assert [layer["name"] for layer in found.layers] == ["a", "b"]
    assert found.layers[0]["shape"]["tokens"] == 30
    with capture(model) as scans:
        model(**inputs)
    wanted = scans[0].y[0]
    assert float((scans[0].reconstruct() - wanted).abs().max()) < 1e-10
    _dense_check(found.layers[0]["spectrum"], entries["S_B"], entries["S_C"])


BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {}


def _bad(words: str) -> Callable[[Callable[[Path], Any]], Callable[[Path], Any]]:
    def enter(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
        BAD_FOLDERS[make.__name__] = (make, words)
        return make

    return enter


def _saved(folder: Path) -> Path:
    torch.manual_seed(47)
    MambaLM(vocab_size=VOCABULARY, d_model=16, n_layer=1).save_pretrained(folder)
    return folder


@_bad("cut short")
def truncated(folder: Path) -> None:
    file = _saved(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@_bad("cut short")
def truncated_projections(folder: Path) -> None:
    save_projections(folder, {"a": _entries(4, 2)})
    file = folder / "layers.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


@_bad("is refused: it is a pickle")
def pickle_beside_a_config(folder: Path) -> None:
    _saved(folder)
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@_bad("is refused: it is a pickle")
def pickle_alone(folder: Path) -> None:
    torch.save({"a": torch.ones(1)}, folder / "model.pt")


@_bad("do not fit config.json")
def mismatching_config(folder: Path) -> None:
    file = _saved(folder) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "n_layer": 2}))


@_bad("cannot be read")
def broken_config(folder: Path) -> None:
    (_saved(folder) / "config.json").write_text("{")


@_bad("is a run of the experiment wikitext103; give one of its models: .*free, .*mixed$")
def run_of_an_experiment(folder: Path) -> None:
    (folder / "config.json").write_text('{"format": 1, "experiment": "wikitext103"}')
    for arm in ("mixed", "free"):
        _saved(folder / "models" / arm)


@_bad("is a run of the experiment imagenet; it holds no saved model")
def run_without_models(folder: Path) -> None:
    (folder / "config.json").write_text('{"format": 1, "experiment": "imagenet"}')


@_bad("holds neither config.json nor safetensors")
def empty(folder: Path) -> None:
    pass


@_bad(r"no selective \(S6\) layer")
def other_tensors(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, folder / "a.safetensors")


@_bad("lacks S_C")
def half_a_layer(folder: Path) -> None:
    from safetensors.torch import save_file

    entries = _entries(4, 2)
    del entries["S_C"]
    save_file({f"a.{key}": value for key, value in entries.items()}, folder / "a.safetensors")


@_bad("S_B is torch.int64, expected a tensor of floating numbers")
def whole_numbers(folder: Path) -> None:
    from safetensors.torch import save_file

    entries = {**_entries(4, 2), "S_B": torch.ones(2, 4, dtype=torch.long)}
    save_file({f"a.{key}": value for key, value in entries.items()}, folder / "a.safetensors")


@_bad("x has shape")
def tokens_of_another_width(folder: Path) -> None:
    from safetensors.torch import save_file

    entries = {**_entries(4, 2), "x": torch.ones(2, 5)}
    save_file({f"a.{key}": value for key, value in entries.items()}, folder / "a.safetensors")


@_bad("S_C has shape")
def contradicting_shapes(folder: Path) -> None:
    from safetensors.torch import save_file

    entries = {**_entries(4, 2), "S_C": torch.ones(2, 5)}
    save_file({f"a.{key}": value for key, value in entries.items()}, folder / "a.safetensors")


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_end_in_one_sentence(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, words = BAD_FOLDERS[case]
    make(tmp_path)
    assert main(["diagnose", str(tmp_path)]) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(words, said)
    assert said.count("\n") == 0


def test_no_such_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(tmp_path / "no" / "where")]) == 2
    assert "there is no" in capsys.readouterr().err


def test_command_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    _saved(tmp_path / "model")
    out = tmp_path / "report"
    assert main(["diagnose", str(tmp_path / "model"), "--length", "40", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "backbone.layers.0.mixer" in printed
    assert {file.name for file in out.iterdir()} == {
        "report.html",
        "report.json",
        "attention.png",
        "regimes.png",
        "spectra.png",
        "tokens.png",
    }
    assert all(file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for file in out.glob("*.png"))
    content = json.loads((out / "report.json").read_text())
    assert content["layers"][0]["attention"]["reconstruction"] < 1e-4
    page = (out / "report.html").read_text()
    assert not re.search(r"(src|href)=.?(https?:)?//", page)  # nothing is fetched


def test_command_takes_token_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _saved(tmp_path / "model")
    ids = tmp_path / "ids.json"
    ids.write_text("[1, 2, 3, 4]")
    assert main(["diagnose", str(tmp_path / "model"), "--tokens", str(ids), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["inputs"] == [1, 4]
    for text, words in (
        ("[1, 999]", "0 to 47"),
        ("[]", "at least one token"),
        ("no", "no JSON list"),
        ("[[1, 2], [3]]", "no JSON list"),
        ('["a"]', "no JSON list"),
        ("[1.5]", "expected a JSON list of whole numbers"),
        ("[true]", "expected a JSON list of whole numbers"),
        ("7", "expected a JSON list of whole numbers"),
        ("[[[1]]]", "expected a JSON list of whole numbers"),
        ("[99999999999999999999]", "no JSON list"),
    ):
        ids.write_text(text)
        assert main(["diagnose", str(tmp_path / "model"), "--tokens", str(ids)]) == 2
        said = capsys.readouterr().err.strip()
        assert words in said
        assert "\n" not in said
    assert main(["diagnose", str(tmp_path / "model"), "--tokens", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["diagnose", str(tmp_path / "model"), "--length", "9", "--out", str(ids)]) == 2
    assert "cannot be made a folder" in capsys.readouterr().err
    assert main(["diagnose", str(tmp_path / "model"), "--length", "9", "--channels", "99"]) == 2
    assert "channel is 99, expected 0 to 31" in capsys.readouterr().err


def test_layers_of_transformers_in_a_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(48)
    config = transformers.FalconMambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)
    transformers.FalconMambaForCausalLM(config).save_pretrained(tmp_path)
    model, inputs = load(tmp_path)
    assert inputs is None
    found = diagnose(model, torch.randint(VOCABULARY, (1, 30)))
    assert found.layers[0]["spectrum"]["normalised"]
    assert found.layers[0]["family"] == "falcon_mamba"


def test_every_entry_is_documented() -> None:
    """docs/diagnose.md promises every entry of a layer's dictionary, and names none that is not there."""
    text = (Path(__file__).parents[2] / "docs" / "diagnose.md").read_text(encoding="utf-8")
    table = text.split("## Every entry")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|$", table, re.MULTILINE)
    model, ids = small(52, layers=1)
    layer = diagnose(model, ids).layers[0]
    told = {name: row for head, row in rows for name in re.findall(r"`(\w+)`", head)}
    assert set(told) == set(layer)
    for name, row in told.items():
        known = layer[name]
        if isinstance(known, dict) and "median" not in known:
            mentioned = set(re.findall(r"`(\w+)`", row))
            assert set(known) <= mentioned | {"tokens"}, name


def test_growth_is_that_of_the_streams() -> None:
    model, ids = small(53, layers=2)
    with capture(model.double()) as scans:
        model(ids)
    found = diagnose(model, ids).layers[1]["growth"]
    scan = scans[1]
    assert scan.tokens_in is not None
    assert scan.tokens_out is not None
    measured = (scan.tokens_out.norm(dim=-1) / scan.tokens_in.norm(dim=-1)).log().detach()
    predicted = _rates(scan)
    assert found["measured"]["max"] == pytest.approx(float(measured.max()), rel=1e-5)
    assert found["predicted"]["min"] == pytest.approx(float(predicted.min()), rel=1e-5)
    same = (measured.sign() == predicted.sign()).double().mean()
    assert found["sign_agreement"] == pytest.approx(float(same))
    from scipy.stats import spearmanr

    wanted = np.mean([spearmanr(p, m).statistic for p, m in zip(predicted, measured, strict=True)])
    assert found["correlation"] == pytest.approx(wanted, abs=1e-10)
    # Theory without what it knows nothing of: a block that adds a small step of the flow itself grows as predicted.
    scan.tokens_in = scan.u.mT
    scan.tokens_out = (scan.u + 1e-6 * scan.state_output()).mT
    from tokendyn.diagnose._measure._growth import measure_growth

    exact = measure_growth(scan, scan.state_output())
    assert exact is not None
    assert exact["sign_agreement"] == 1.0
    assert exact["correlation"] == pytest.approx(1.0, abs=1e-3)
    scan.reorders = True
    assert measure_growth(scan, scan.state_output()) is None


def test_distances_to_the_limit_points() -> None:
    model, ids = small(54, layers=1)
    with capture(model.double()) as scans:
        model(ids[:1])
    sphere = diagnose(model, ids[:1]).layers[0]["sphere"]
    scan = scans[0]
    assert scan.projections is not None
    unit = torch.nn.functional.normalize(scan.u[0].detach(), dim=0).numpy()
    points = {point["point"]: point for point in sphere["limit_points"]}
    later = unit[:, 1:]
    M = (scan.projections.S_C.mT @ scan.projections.S_B).numpy()
    normal = M @ unit[:, 0]
    distances = {
        "+x₁": 1 - later.T @ unit[:, 0],
        "−x₁": 1 + later.T @ unit[:, 0],
        "hyperplane xᵀMx₁ = 0": np.abs(later.T @ normal) / np.linalg.norm(normal),
    }
    attracted = unit[:, 0] @ M @ unit[:, 0] > 0
    for name, distance in distances.items():
        assert points[name]["distance"]["max"] == pytest.approx(distance.max(), rel=1e-5)
        assert points[name]["distance"]["median"] == pytest.approx(np.median(distance), rel=1e-4)
        assert points[name]["predicted"] == (attracted != name.startswith("hyper"))
    poles = {name: point for name, point in points.items() if name[1] == "e"}
    assert len(poles) == min(16, sphere["stable_pole_count"])
    for name, point in poles.items():
        sign, channel = 1 if name[0] == "+" else -1, int(name[2:])
        assert point["distance"]["min"] == pytest.approx((1 - sign * unit[channel]).min(), rel=1e-5)
        assert {"channel": channel, "sign": sign, "rate": point["rate"]} in sphere["stable_poles"]


def test_module_is_callable() -> None:
    model, ids = small(49)
    assert str(tokendyn.diagnose(model, ids)) == str(diagnose(model, ids))
    assert tokendyn.diagnose.capture is capture  # type: ignore[attr-defined]


TYPESEG = Path(__file__).parents[1] / "data" / "typeseg_projections"


def test_a_real_trained_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six layers of a published model, with biases on their projections; numbers known from elsewhere."""
    assert main(["diagnose", str(TYPESEG), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    model, _ = load(TYPESEG)
    assert [layer["name"] for layer in content["layers"]] == [f"layers.{i}.mixer" for i in range(6)]
    for layer in content["layers"]:
        spectrum = layer["spectrum"]
        values = np.array(spectrum["symmetric"])
        assert ((values > 0).sum(), (values < 0).sum()) == (16, 16)  # Sylvester's law, and nothing more
        assert spectrum["biased"]
        assert layer["attention"]["reconstruction"] < 1e-5
        assert layer["regime"]["kind"] == "divergence"
        _dense_check(spectrum, *model.layer(layer["name"]).io_matrices())  # type: ignore[operator]
        assert layer["tokens"] is layer["tokens_in"] is None  # side by side: there is no residual stream
    assert [finding["severity"] for finding in content["findings"]] == ["note"] * len(content["findings"])
    largest = [layer["spectrum"]["largest"] for layer in content["layers"]]
    assert largest[0] == pytest.approx(0.66, abs=0.005)
    assert largest[5] == pytest.approx(4.92, abs=0.005)
