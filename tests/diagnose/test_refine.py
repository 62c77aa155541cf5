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
from tokendyn.diagnose import diagnose, refine  # noqa: E402
from tokendyn.diagnose._refine import nearest  # noqa: E402
from tokendyn.torch.models import MambaLM  # noqa: E402


def _outputs(model: Any, ids: Any) -> Any:
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.parametrize("regime", ["positive", "negative"])
def test_the_nearest_point_is_nearest(regime: str) -> None:
    """Against the dense answer: the positive (negative) part of the symmetric part."""
    sign = 1.0 if regime == "positive" else -1.0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        S_B, S_C = (torch.tensor(rng.normal(size=(3, 8))) for _ in range(2))
        rows, q = nearest(S_B, S_C, regime)
        assert bool((q > 0).all())
        assert torch.equal(rows.tril(-1), torch.zeros_like(rows))
        found = sign * (rows.mT * q) @ rows
        M = S_C.mT @ S_B
        values, vectors = torch.linalg.eigh((M + M.mT) / 2)
        part = (sign * values).clamp_min(0) * sign
        dense = (vectors * part) @ vectors.mT
        assert float((found - dense).abs().max()) < 1e-10
        best = (found - M).norm()
        for _ in range(20):  # no neighbour of this sign is nearer
            other = rows + 1e-3 * torch.tensor(rng.normal(size=rows.shape)).triu()
            assert (sign * (other.mT * q) @ other - M).norm() >= best


@pytest.mark.parametrize("family", ["own", "hugging_face"])
@pytest.mark.parametrize("regime", ["positive", "negative"])
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
        weight = layer["spectrum"]["positive_weight"]
        assert weight == pytest.approx(1.0 if regime == "positive" else 0.0, abs=1e-5)
    done.undo()
    assert list(model.state_dict()) == keys
    assert torch.equal(before, _outputs(model, ids))


def test_training_keeps_the_regime() -> None:
    model, ids = small(61, layers=1)
    refine(model, io_regime="positive")
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    start = _outputs(model, ids)
    for _ in range(5):
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()
    assert not torch.equal(start, _outputs(model, ids))
    assert diagnose(model, ids).layers[0]["spectrum"]["positive_weight"] == pytest.approx(1.0, abs=1e-5)


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
    model, ids = small(64)
    with pytest.raises(errors.OptionError, match="one of io_regime and order"):
        refine(model)
    with pytest.raises(errors.OptionError, match="io_regime"):
        refine(model, io_regime="mixed")
    with pytest.raises(errors.OptionError, match="no selective"):
        refine(torch.nn.Linear(1, 1), order="hard")
    refine(model, io_regime="positive")
    with pytest.raises(errors.RegimeError, match="parametrisation of its spectrum already"):
        refine(model, io_regime="positive")
    falcon, ids = hugging_face("falcon_mamba", 1)
    before = _outputs(falcon, ids)
    with pytest.raises(errors.RegimeError, match="normalises B and C"):
        refine(falcon, io_regime="positive")
    assert torch.equal(before, _outputs(falcon, ids))


def test_the_parametrisation_is_that_of_the_layers() -> None:
    rng = np.random.default_rng(65)
    S_B, S_C = (torch.tensor(rng.normal(size=(3, 7))) for _ in range(2))
    rows, q = nearest(S_B, S_C, "positive")
    found_B, found_C = io_projections(rows, diagonal=q + torch.log(-torch.expm1(-q)), regime="positive")
    assert float((found_C.mT @ found_B - (rows.mT * q) @ rows).abs().max()) < 1e-12
