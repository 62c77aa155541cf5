"""S6, the bare selective layer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import tokendyn
import tokendyn.torch as tt
from tokendyn.backends.torch.layers import _s6
from tokendyn.errors import DTypeError, OptionError, RegimeError, ShapeError

from .layers_reference import randomize, recurrence, softplus, tokens

VARIANTS = {
    "ordinary": {},
    "dense S_delta": {"dt_rank": None},
    "rank 3": {"dt_rank": 3},
    "scalar A": {"scalar_A": True},
    "no bias": {"dt_bias": False},
    "no skip": {"skip": False},
    "positive": {"io_regime": "positive"},
    "negative": {"io_regime": "negative", "io_form": "published_code"},
    "mixed": {"io_regime": "mixed", "io_form": "scale_matched"},
}


def equations(layer: tt.S6, x: torch.Tensor) -> torch.Tensor:
    """Eqs. (1) to (3), from the layer's parameters."""
    rank, N = layer.dt_rank or 0, layer.d_state
    W = layer.x_proj.weight
    S_delta = layer.dt_proj.weight if layer.dt_rank is None else layer.dt_proj.weight @ W[:rank]
    if layer.io_regime == "free":
        S_B, S_C = W[rank : rank + N], W[rank + N :]
    else:
        raw = W[rank:]
        U = torch.triu(raw, diagonal=1)
        U = U + torch.cat([torch.eye(N), torch.zeros(N, raw.shape[1] - N)], 1)
        half = math.ceil(N / 2)
        sign = {"positive": 1.0, "negative": -1.0, "mixed": torch.tensor([1.0] * half + [-1.0] * (N - half))}
        offset = {"paper": 0.0, "published_code": 0.0 if layer.io_regime == "mixed" else 0.7, "scale_matched": 0.7}
        q = sign[layer.io_regime] * (softplus(layer.io_diagonal) + offset[layer.io_form])
        S_B, S_C = q[:, None] * U, U
    bias = 0.0 if layer.dt_proj.bias is None else layer.dt_proj.bias
    A = -torch.exp(layer.A_log if layer.A_log.ndim == 2 else layer.A_log[:, None])
    D = torch.zeros(x.shape[-1]) if layer.D is None else layer.D
    return recurrence(x, softplus(x @ S_delta.T + bias), A, x @ S_B.T, x @ S_C.T, D)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_the_equations(options: dict) -> None:
    layer = randomize(tt.S6(6, 4, **options), seed=3)
    x = tokens(2, 9, 6)
    torch.testing.assert_close(layer(x), equations(layer, x), rtol=1e-12, atol=1e-12)


def test_a_split_sequence_with_the_state_carried_is_one_pass() -> None:
    layer = randomize(tt.S6(6, 4), seed=4)
    x = tokens(2, 11, 6)
    whole, last = layer(x, return_last_state=True)
    first, state = layer(x[:, :4], return_last_state=True)
    second, end = layer(x[:, 4:], initial_state=state, return_last_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end, last, rtol=1e-12, atol=1e-12)


def test_packed_and_padded_sequences_are_those_by_themselves() -> None:
    layer = randomize(tt.S6(6, 4), seed=5)
    x = tokens(1, 9, 6)
    packed = layer(x, seq_idx=torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]]))
    alone = torch.cat([layer(x[:, :4]), layer(x[:, 4:])], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)
    padded = layer(x, lengths=torch.tensor([4]))
    torch.testing.assert_close(padded[:, :4], layer(x[:, :4]), rtol=1e-12, atol=1e-12)
    assert (padded[:, 4:] == 0).all()


@pytest.mark.parametrize("form", ["paper", "published_code", "scale_matched"])
@pytest.mark.parametrize(("regime", "positive"), [("positive", 4), ("negative", 0), ("mixed", 2)])
def test_the_regime_is_in_the_spectrum(regime: str, positive: int, form: str) -> None:
    layer = randomize(tt.S6(9, 4, io_regime=regime, io_form=form), seed=6)
    S_B, S_C = layer.io_matrices()
    eigenvalues = np.linalg.eigvals((S_C.T @ S_B).detach().numpy())
    nonzero = eigenvalues[np.argsort(-np.abs(eigenvalues))[:4]]
    assert np.abs(nonzero.imag).max() < 1e-9
    assert (nonzero.real > 1e-6).sum() == positive
    assert (nonzero.real < -1e-6).sum() == 4 - positive
    ours = tokendyn.io_spectrum(S_B, S_C).eigenvalues.detach().numpy()
    np.testing.assert_allclose(np.sort(ours.real), np.sort(nonzero.real), rtol=1e-9)


def test_gradients_reach_every_parameter() -> None:
    for options in VARIANTS.values():
        layer = randomize(tt.S6(6, 4, **options), seed=7)
        layer(tokens(2, 5, 6)).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_starts_as_mamba_does() -> None:
    torch.manual_seed(0)
    layer = tt.S6(512, 16, dt_min=0.01, dt_max=0.5)
    assert torch.equal(layer.A_log, torch.arange(1.0, 17).log().expand(512, 16))
    assert torch.equal(layer.D, torch.ones(512))
    step = softplus(layer.dt_proj.bias.double())
    assert step.min() >= 0.01 * (1 - 1e-5)
    assert step.max() <= 0.5 * (1 + 1e-5)
    # Log-uniform: a quarter of the steps in every quarter of the logarithm, give or take four deviations.
    share = torch.log(step / 0.01) / math.log(50)
    counts = torch.histc(share, 4, 0, 1)
    assert (counts - 128).abs().max() < 4 * math.sqrt(512 * 3 / 16)
    assert layer.dt_proj.weight.abs().max() <= 32**-0.5
    assert layer.dt_proj.weight.std().item() == pytest.approx(32**-0.5 / math.sqrt(3), rel=0.05)
    assert layer.A_log._no_weight_decay
    assert layer.D._no_weight_decay
    assert layer.dt_proj.bias._no_reinit
    floored = tt.S6(64, dt_min=1e-6, dt_max=1e-5, dt_init_floor=1e-4)
    torch.testing.assert_close(softplus(floored.dt_proj.bias), torch.full((64,), 1e-4), rtol=1e-4, atol=0)
    constant = tt.S6(64, dt_init="constant", dt_scale=2.0, dt_rank=4)
    assert torch.equal(constant.dt_proj.weight, torch.ones(64, 4))
    assert torch.equal(tt.S6(8, scalar_A=True).A_log, torch.zeros(8))


def test_the_rank_of_s_delta() -> None:
    assert tt.S6(40).dt_rank == 3
    assert [tuple(w.shape) for w in tt.S6(40).s_delta()] == [(40, 3), (3, 40)]
    assert [tuple(w.shape) for w in tt.S6(40, dt_rank=None).s_delta()] == [(40, 40)]
    assert tuple(tt.S6(40, 5, dt_rank=None).x_proj.weight.shape) == (10, 40)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_parameters_of_the_scan_stay_exact(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    scan = _s6.ops.selective_scan

    def spy(u, delta, A, B, C, D, z, bias, *args, **options):
        seen.update(u=u.dtype, delta=delta.dtype, B=B.dtype, C=C.dtype, A=A.dtype, D=D.dtype, bias=bias.dtype)
        return scan(u, delta, A, B, C, D, z, bias, *args, **options)

    monkeypatch.setattr(_s6.ops, "selective_scan", spy)
    exact = torch.promote_types(dtype, torch.float32)
    layer = tt.S6(8, 4, dtype=dtype)
    assert layer.A_log.dtype == layer.D.dtype == exact
    assert layer(tokens(2, 5, 8, dtype=dtype)).dtype == dtype
    assert seen == {**dict.fromkeys(("u", "delta", "B", "C"), dtype), **dict.fromkeys(("A", "D", "bias"), exact)}
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            assert tt.S6(8, 4)(tokens(2, 5, 8, dtype=torch.float32)).dtype == dtype
        assert seen["u"] == seen["B"] == dtype
        assert seen["A"] == seen["bias"] == torch.float32


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: tt.S6(0), OptionError, "d_model is 0, expected an integer of at least 1"),
        (lambda: tt.S6(8, 2.5), OptionError, "d_state is 2.5"),
        (lambda: tt.S6(8, dt_rank="full"), OptionError, "dt_rank is 'full'"),
        (lambda: tt.S6(8, dt_init="zeros"), OptionError, "'random', 'constant'"),
        (lambda: tt.S6(8, io_regime="hot"), OptionError, "'free', 'positive', 'negative', 'mixed'"),
        (lambda: tt.S6(8, io_form="mine"), OptionError, "scale_matched"),
        (lambda: tt.S6(8, 9, io_regime="mixed"), RegimeError, "d_state = 9 exceeds the 8 channels"),
        (lambda: tt.S6(8, order="sorted"), OptionError, "'published', 'softsort'"),
        (
            lambda: tt.S6(8)(torch.ones(2, 5, 7)),
            ShapeError,
            r"x has shape \(2, 5, 7\), expected \(b, L, D\) with D = 8",
        ),
        (lambda: tt.S6(8)(torch.ones(5, 8)), ShapeError, "expected"),
        *(
            (
                lambda make=make: make(8)(torch.ones(2, 5, 8, dtype=torch.float64)),
                DTypeError,
                rf"{make.__name__}: x has dtype float64, expected float32, .* x.to\(torch.float32\), or layer.to\(t",
            )
            for make in (tt.S6, tt.Mamba, tt.H3)
        ),
        (lambda: tt.S6(8).double()(torch.ones(2, 5, 8)), DTypeError, "x has dtype float32, expected float64"),
        (lambda: tt.S6(8)(torch.ones(2, 5, 8, dtype=int)), DTypeError, r"dtype int64.*x.to\(torch.float32\)"),
        (
            lambda: tt.S6(8, order="hard")(torch.ones(1, 5, 8), seq_idx=torch.tensor([[0, 0, 0, 1, 1]])),
            OptionError,
            "order each sequence by itself",
        ),
    ],
)
def test_wrong_use_is_told(make, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_constructors_follow_the_chosen_backend() -> None:
    with pytest.raises(
        tokendyn.errors.NotImplementedForBackend, match=r"S6 is not implemented.*'numpy'.*use\('torch'\)"
    ):
        tokendyn.S6(8)
    with tokendyn.backend("torch"):
        assert isinstance(tokendyn.S6(8), tt.S6)
        assert isinstance(tokendyn.TokenReorder(torch.nn.Identity(), 8), tt.TokenReorder)
    tokendyn.use("torch")
    assert isinstance(tokendyn.Mamba(8), tt.Mamba)
    assert isinstance(tokendyn.MambaVision(dims=(4, 4, 16, 16), num_heads=(2, 2)), tt.MambaVision)
    assert tokendyn.OrderConfig is tt.OrderConfig
