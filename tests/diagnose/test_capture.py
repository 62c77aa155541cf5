"""What the hooks see is what the layers compute, and the layers do not notice."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import tokendyn  # noqa: E402
from tests.diagnose.models import (  # noqa: E402
    VOCABULARY,
    PublicVisionMixer,
    SlowPathMamba,
    Tiny,
    hugging_face,
    small,
)
from tokendyn.diagnose import capture  # noqa: E402
from tokendyn.torch import Mamba, models  # noqa: E402
from tokendyn.torch.models import MambaVisionMixer  # noqa: E402

HUGGING_FACE = [(family, case) for family in ("mamba", "falcon_mamba", "jamba") for case in (0, 1)] + [
    ("mamba_headless", 2)
]


def _output(model: Any, ids: Any) -> Any:
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, torch.Tensor) else out[0]


def _expect_reconstruction(scans: list[Any], bound: float) -> None:
    assert scans
    for scan in scans:
        for sequence in range(scan.u.shape[0]):
            wanted = scan.y[sequence].double()
            found = scan.reconstruct(sequence)
            assert found.shape == wanted.shape
            assert float((found - wanted).abs().max() / wanted.abs().max()) < bound, scan.title


@pytest.mark.parametrize(("family", "case"), HUGGING_FACE)
def test_hidden_attention_reconstructs_hugging_face_layers(family: str, case: int) -> None:
    model, ids = hugging_face(family, case)
    plain = _output(model, ids)
    with capture(model) as scans:
        watched = _output(model, ids)
    assert torch.equal(plain, watched)
    assert torch.equal(plain, _output(model, ids))
    _expect_reconstruction(scans, 1e-10)
    assert {scan.family for scan in scans} == {family.removesuffix("_headless")}
    mixers = sum(hasattr(module, "A_log") for module in model.modules())
    assert len(scans) == mixers
    for scan in scans:
        assert scan.tokens_in is not None
        assert scan.tokens_in.shape == (2, ids.shape[1], model.config.hidden_size)


@pytest.mark.parametrize("order", [None, "hard", "reversed"])
def test_own_layers(order: str | None) -> None:
    model, ids = small(3, order=order)
    model = model.double()
    plain = _output(model, ids)
    with capture(model) as scans:
        watched = _output(model, ids)
    assert torch.equal(plain, watched)
    assert [scan.layer for scan in scans] == [f"layers.{i}.mixer" for i in range(3)]
    _expect_reconstruction(scans, 1e-10)
    assert any("orders its tokens" in note for note in scans[0].notes) == (order is not None)


def test_structures_of_mamba_ssm_and_mambavision() -> None:
    """By their structure: these packages need a GPU to run."""
    torch.manual_seed(4)
    ids = torch.randint(VOCABULARY, (2, 33))
    for mixers in ((SlowPathMamba(16), SlowPathMamba(16)), (PublicVisionMixer(16),)):
        model = Tiny(*mixers).double()
        plain = _output(model, ids)
        with capture(model) as scans:
            watched = _output(model, ids)
        assert torch.equal(plain, watched)
        assert torch.equal(plain, _output(model, ids))
        assert len(scans) == len(mixers)
        _expect_reconstruction(scans, 1e-7)  # A is made in float32 there
        for mixer, scan in zip(mixers, scans, strict=True):
            if hasattr(mixer, "use_fast_path"):  # seen beside the fused path, which ran as it is
                assert mixer.use_fast_path
                assert scan.fused is not None
                assert 0 < scan.fused < 1e-12  # another order of the same sums
            else:
                assert scan.fused is None


def test_a_fused_path_is_watched_in_training_too() -> None:
    """Gradients and modes are what they would be, and hooks of the user's see the mixer once."""
    torch.manual_seed(14)
    model = Tiny(SlowPathMamba(16)).double()
    ids = torch.randint(VOCABULARY, (2, 20))
    calls: list[int] = []
    model.layers[0].mixer.register_forward_hook(lambda *_: calls.append(1))

    def gradients() -> list[Any]:
        model.zero_grad()
        model(ids).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    with capture(model) as scans:
        watched = gradients()
    assert len(scans) == 1
    assert len(calls) == 2
    assert model.layers[0].mixer.training
    assert not scans[0].y.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_a_path_that_shows_nothing_is_no_capture() -> None:
    class Opaque(SlowPathMamba):
        def forward(self, hidden_states: Any) -> Any:
            self.use_fast_path = True
            return super().forward(hidden_states)

    model, ids = Tiny(Opaque(16)), torch.randint(VOCABULARY, (1, 9))
    plain = _output(model, ids)
    with capture(model) as scans:
        assert torch.equal(plain, _output(model, ids))
    assert scans == []
    with pytest.raises(ValueError, match="none of the 1 selective layers"):
        tokendyn.diagnose(model, ids)


@pytest.mark.parametrize("parity", ["clean", "published"])
def test_own_mambavision(parity: str) -> None:
    torch.manual_seed(5)
    model = Tiny(MambaVisionMixer(16, parity=parity)).double()
    ids = torch.randint(VOCABULARY, (2, 40))
    plain = _output(model, ids)
    with capture(model) as scans:
        assert torch.equal(plain, _output(model, ids))
    _expect_reconstruction(scans, 1e-10)


def test_a_whole_mambavision() -> None:
    torch.manual_seed(6)
    model = models.mambavision_16px(num_classes=3).eval()
    images = torch.randn(1, 3, 16, 16)
    plain = _output(model, images)
    with capture(model) as scans:
        assert torch.equal(plain, _output(model, images))
    assert scans
    _expect_reconstruction(scans, 1e-4)


def test_attention_of_a_channel_is_the_operation() -> None:
    model, ids = small(7)
    with capture(model.double()) as scans:
        _output(model, ids)
    scan = scans[1]
    for channel in (0, 5, 31):
        wanted = tokendyn.hidden_attention(scan.delta, scan.A, scan.B, scan.C, channel=channel)
        for sequence in range(2):
            assert float((scan.attention(channel, sequence) - wanted[sequence]).abs().max()) < 1e-14
    with pytest.raises(ValueError, match="channel is 99"):
        scan.attention(99)


def test_long_range_neither_overflows_nor_vanishes() -> None:
    """Where ratios of cumulative products give NaN."""
    model, _ = small(8, layers=1)
    ids = torch.randint(VOCABULARY, (1, 400))
    with torch.no_grad():
        model.layers[0].mixer.dt_proj.bias.fill_(3.0)
    with capture(model.double()) as scans:
        _output(model, ids)
    attention = scans[0].attention(2)
    assert torch.isfinite(attention).all()
    wanted = tokendyn.hidden_attention(scans[0].delta, scans[0].A, scans[0].B, scans[0].C, channel=2)[0]
    assert float((attention - wanted).abs().max()) < 1e-13
    _expect_reconstruction(scans, 1e-10)


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    from tokendyn.backends.torch import ops

    model, ids = small(9)
    plain = ops.selective_scan
    with pytest.raises(KeyError), capture(model):
        raise KeyError
    assert ops.selective_scan is plain
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    with capture(model) as scans, pytest.raises((IndexError, ValueError)):
        model(ids + VOCABULARY)
    assert scans == []
    with capture(model) as scans:
        _output(model, ids)
    assert len(scans) == 3


def test_another_models_scans_are_not_seen() -> None:
    model, ids = small(10)
    other, _ = small(11)
    with capture(model) as scans:
        _output(other, ids)
    assert scans == []


def test_gradients_are_untouched() -> None:
    model, ids = small(12)

    def gradients() -> list[Any]:
        model.zero_grad()
        model(ids).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    with capture(model):
        watched = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_scalar_rates_are_read() -> None:
    torch.manual_seed(13)
    model = Tiny(Mamba(16, 4, scalar_A=True)).double()
    ids = torch.randint(VOCABULARY, (1, 50))
    with capture(model) as scans:
        _output(model, ids)
    assert scans[0].A.shape == (32, 4)
    _expect_reconstruction(scans, 1e-10)
