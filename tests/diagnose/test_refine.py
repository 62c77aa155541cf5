"""Refinements: the nearest spectrum of a regime, orders, and the way back."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.diagnose.models import VOCABULARY, hugging_face, small  # noqa: E402
from tokendyn import errors, io_projections  # noqa: E402
from tokendyn.diagnose import diagnose, load, refine  # noqa: E402
from tokendyn.diagnose._refine._spectrum import nearest, parts  # noqa: E402
from tokendyn.torch.models import MambaLM  # noqa: E402


def _outputs(model: Any, ids: Any) -> Any:
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.parametrize("regime", ["positive", "negative", "mixed"])
@pytest.mark.parametrize("state", [3, 4])
def test_the_nearest_point_is_nearest(regime: str, state: int) -> None:
    """Against the dense answer: the largest eigenvalues of each sign of the symmetric part."""
    for seed in range(4):
        rng = np.random.default_rng(10 * state + seed)
        S_B, S_C = (torch.tensor(rng.normal(size=(state, 9))) for _ in range(2))
        wanted = parts(regime, state)
        rows, q = nearest(S_B, S_C, wanted)
        assert bool((q > 0).all())
        signs = torch.cat([torch.full((count,), 1.0 if sign == "positive" else -1.0) for sign, count in wanted])
        start = 0
        for _, count in wanted:  # each triangle by itself
            block = rows[start : start + count]
            assert torch.equal(block.tril(-1), torch.zeros_like(block))
            assert torch.equal(block.diagonal(), torch.ones(count, dtype=torch.float64))
            start += count
        M = S_C.mT @ S_B
        values, vectors = torch.linalg.eigh((M + M.mT) / 2)
        kept = torch.zeros_like(values)
        for sign, count in wanted:
            part = slice(len(values) - count, None) if sign == "positive" else slice(0, count)
            kept[part] = values[part]
        assert int((kept > 0).sum()) == int((signs > 0).sum())
        dense = (vectors * kept) @ vectors.mT
        found = (rows.mT * (signs * q)) @ rows
        assert float((found - dense).abs().max()) < 1e-10
        best = (found - M).norm()
        for _ in range(20):  # no neighbour of this form is nearer
            other = rows + 1e-3 * torch.tensor(rng.normal(size=rows.shape))
            assert ((other.mT * (signs * q)) @ other - M).norm() >= best


@pytest.mark.parametrize("family", ["own", "hugging_face"])
@pytest.mark.parametrize("regime", ["positive", "negative", "mixed"])
def test_a_model_in_a_regime_and_back(family: str, regime: str) -> None:
    model, ids = small(60) if family == "own" else hugging_face("mamba", 3)
    before = _outputs(model, ids)
    keys = list(model.state_dict())
    done = refine(model, io_regime=regime, inputs=ids)
    assert done.function_change is not None
    changed = _outputs(model, ids)
    wanted = float((changed.double() - before.double()).norm() / before.double().norm())
    assert done.function_change == pytest.approx(wanted, rel=1e-6)
    assert wanted > 0
    for layer in diagnose(model, ids).layers:
        _expect_regime(layer, regime)
    done.undo()
    assert list(model.state_dict()) == keys
    assert torch.equal(before, _outputs(model, ids))


def _expect_regime(layer: dict[str, Any], regime: str) -> None:
    values = np.array(layer["spectrum"]["symmetric"])
    if regime == "mixed":
        values = values[np.abs(values) > 1e-5 * np.abs(values).max()]
        state = layer["state"]
        assert ((values > 0).sum(), (values < 0).sum()) == (-(-state // 2), state // 2)
    else:
        weight = layer["spectrum"]["positive_weight"]
        assert weight == pytest.approx(1.0 if regime == "positive" else 0.0, abs=1e-5)


@pytest.mark.parametrize("regime", ["positive", "mixed"])
def test_training_keeps_the_regime(regime: str) -> None:
    model, ids = small(61, layers=1)
    refine(model, io_regime=regime)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    start = _outputs(model, ids)
    for _ in range(5):
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()
    assert not torch.equal(start, _outputs(model, ids))
    _expect_regime(diagnose(model, ids).layers[0], regime)


@pytest.mark.parametrize("family", ["falcon_mamba", "jamba"])
def test_norms_after_the_projections_leave_the_signs(family: str) -> None:
    """x_lᵀ M x_l at the scan, norms included, has the sign asked for at every token, also after training."""
    model, ids = hugging_face(family, 1)
    before = _outputs(model, ids)
    done = refine(model, io_regime="negative", inputs=ids)
    assert "while the gains of these norms stay positive" in done.notes[0]
    for step in range(3):
        for layer in diagnose(model, ids).layers:
            assert layer["spectrum"]["normalised"]
            _expect_regime(layer, "negative")
            assert layer["regime"]["self_product"]["max"] < 0
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.02 * torch.randn_like(value) * (step + 1))
    model, ids = hugging_face(family, 1)
    refine(model, io_regime="negative").undo()
    assert torch.equal(before, _outputs(model, ids))


def test_norms_that_are_refused() -> None:
    model, ids = hugging_face("jamba", 0)
    before = _outputs(model, ids)
    mixer = next(module for module in model.modules() if hasattr(module, "b_layernorm"))
    gain = mixer.b_layernorm.weight
    with torch.no_grad():
        gain[0].neg_()
    with pytest.raises(errors.RegimeError, match="gains are not all of one sign"):
        refine(model, io_regime="positive")
    with torch.no_grad():
        gain[0].neg_()
    assert torch.equal(before, _outputs(model, ids))
    mixer.b_layernorm = torch.nn.LayerNorm(len(gain)).double()
    with pytest.raises(errors.RegimeError, match="something else than an RMS norm"):
        refine(model, io_regime="positive")
    layer = diagnose(model, ids).layers[0]
    assert layer["spectrum"] is None
    assert "no RMS norm" in layer["notes"][0]


def test_saved_and_loaded_by_the_models_own_format(tmp_path: Path) -> None:
    torch.manual_seed(62)
    ids = torch.randint(VOCABULARY, (2, 30))
    model = MambaLM(vocab_size=VOCABULARY, d_model=16, n_layer=2)
    keys = list(model.state_dict())
    done = refine(model, io_regime="positive", inputs=ids)
    refined = _outputs(model, ids)
    done.bake()
    assert list(model.state_dict()) == keys
    assert torch.equal(refined, _outputs(model, ids))
    model.save_pretrained(tmp_path)
    loaded = MambaLM.from_pretrained(tmp_path)
    assert torch.equal(refined, _outputs(loaded, ids))
    again = refine(loaded.double(), io_regime="positive", inputs=ids)
    assert again.function_change is not None
    assert again.function_change < 1e-6  # a point of the regime is its own nearest


def test_hugging_face_saves_what_was_refined(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, ids = hugging_face("mamba", 4)
    done = refine(model, io_regime="negative")
    refined = _outputs(model, ids)
    done.bake()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = transformers.MambaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(refined, _outputs(loaded, ids))


@pytest.mark.parametrize("family", ["own", "hugging_face"])
@pytest.mark.parametrize("order", ["hard", "reversed", "softsort"])
def test_orders_and_back(family: str, order: str) -> None:
    model, ids = small(63) if family == "own" else hugging_face("mamba", 6)
    before, keys = _outputs(model, ids), list(model.state_dict())
    done = refine(model, order=order, inputs=ids)
    assert done.function_change is not None
    assert done.function_change > 0
    assert any("not causal" in note for note in done.notes)
    done.undo()
    assert list(model.state_dict()) == keys
    assert torch.equal(before, _outputs(model, ids))


@pytest.mark.parametrize("family", ["own", "hugging_face"])
@pytest.mark.parametrize("asked", [{"io_regime": "mixed"}, {"order": "hard"}])
def test_a_refinement_is_saved_beside_the_model(family: str, asked: dict[str, Any], tmp_path: Path) -> None:
    """The model's files stay of its own format; the refinement comes back bit for bit."""
    ids = torch.randint(VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(66))
    if family == "own":
        torch.manual_seed(66)
        model: Any = MambaLM(vocab_size=VOCABULARY, d_model=16, n_layer=2).eval()
    else:
        model, _ = hugging_face("mamba", 9)
    plain, keys = _outputs(model, ids), set(model.state_dict())
    done = refine(model, **asked)
    parameters = list(model.parameters())
    with torch.no_grad():
        for value in parameters:
            value.add_(0.01 * torch.randn_like(value))
    wanted = _outputs(model, ids)
    done.save(tmp_path)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))  # an optimiser's are the same
    assert torch.equal(wanted, _outputs(model, ids))
    if family == "own":
        loaded: Any = MambaLM.from_pretrained(tmp_path)
    else:
        transformers = pytest.importorskip("transformers")
        loaded = transformers.MambaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert set(loaded.state_dict()) == keys
    refine(loaded, saved=tmp_path)
    assert torch.equal(wanted, _outputs(loaded, ids))
    assert not torch.equal(plain, wanted)
    if family == "own":
        again, _ = load(tmp_path)
        assert torch.equal(wanted, _outputs(again, ids))
        torch.manual_seed(67)
        other = MambaLM(vocab_size=VOCABULARY, d_model=24, n_layer=2)
        before = _outputs(other, ids)
        with pytest.raises(errors.CheckpointError, match="of another model"):
            refine(other, saved=tmp_path)
        assert torch.equal(before, _outputs(other, ids))


def test_refinements_that_cannot_be_saved_or_read(tmp_path: Path) -> None:
    model, _ = small(67, layers=1)
    done = refine(model, order="hard")
    with pytest.raises(errors.OptionError, match="Tiny has no save_pretrained"):
        done.save(tmp_path)
    with pytest.raises(errors.OptionError, match="an order is no weight"):
        done.bake()
    done.undo()
    with pytest.raises(errors.OptionError, match="undone or baked"):
        done.save(tmp_path)
    with pytest.raises(errors.CheckpointError, match=r"holds no refinement\.json"):
        refine(model, saved=tmp_path)
    (tmp_path / "refinement.json").write_text("[")
    with pytest.raises(errors.CheckpointError, match="cannot be read"):
        refine(model, saved=tmp_path)


def test_an_order_around_a_mixer_is_the_sorted_mixer() -> None:
    model, ids = hugging_face("mamba_headless", 7)
    mixer = model.layers[0].mixer
    x = torch.randn(1, 12, model.config.hidden_size, dtype=torch.float64)
    plain = copy.deepcopy(mixer)
    done = refine(model, order="reversed")
    with torch.no_grad():
        assert torch.allclose(mixer(x), plain(x.flip(1)).flip(1), atol=1e-14)
    done.undo()
    assert ids.shape


def test_what_cannot_be_refined_is_said() -> None:
    model, _ids = small(64)
    with pytest.raises(errors.OptionError, match="one of io_regime, order and saved"):
        refine(model)
    with pytest.raises(errors.OptionError, match="io_regime"):
        refine(model, io_regime="free")
    with pytest.raises(errors.OptionError, match="no selective"):
        refine(torch.nn.Linear(1, 1), order="hard")
    refine(model, io_regime="positive")
    with pytest.raises(errors.RegimeError, match="parametrisation of its spectrum already"):
        refine(model, io_regime="positive")


def test_the_parametrisation_is_that_of_the_layers() -> None:
    rng = np.random.default_rng(65)
    S_B, S_C = (torch.tensor(rng.normal(size=(3, 7))) for _ in range(2))
    rows, q = nearest(S_B, S_C, parts("positive", 3))
    found_B, found_C = io_projections(rows, diagonal=q + torch.log(-torch.expm1(-q)), regime="positive")
    assert float((found_C.mT @ found_B - (rows.mT * q) @ rows).abs().max()) < 1e-12
