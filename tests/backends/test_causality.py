"""The causality check: that it passes what is causal, and finds every kind of leak."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokendyn.torch as tt
from tokendyn.errors import CausalityError, DTypeError, NonFiniteError, OptionError, ShapeError

SIZES: dict[str, Any] = {"vocab_size": 29, "d_model": 8, "n_layer": 2}
MODELS: dict[str, Any] = {
    "mamba": lambda **options: tt.MambaLM(**SIZES, d_state=4, **options),
    "mamba, scalar A": lambda **options: tt.MambaLM(**SIZES, d_state=4, scalar_A=True, **options),
    "mamba, positive": lambda **options: tt.MambaLM(**SIZES, d_state=4, io_regime="positive", **options),
    "h3": lambda **options: tt.H3LM(**SIZES, d_state=4, **options),
    "transformer": lambda **options: tt.TransformerLM(**SIZES, n_head=2, **options),
}


def made(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[name](**options)


@pytest.mark.parametrize("name", MODELS)
def test_language_models_are_causal(name: str) -> None:
    found = tt.expect_causal(made(name, dropout=0.2), 33)
    assert found.causal
    assert found.tokens == tuple(range(33))
    assert found.comparisons == 2 * (33 + 32)  # nothing is before the first token


@pytest.mark.parametrize("options", [{"share_layers": True}, {"norm": "none"}, {"norm": "layer"}, {"d_conv": None}])
def test_what_is_left_out_leaves_them_causal(options: dict[str, Any]) -> None:
    tt.expect_causal(made("mamba", **options), 9)


@pytest.mark.parametrize("name", ["mamba", "h3", "transformer"])
def test_at_the_boundaries_of_chunks(name: str) -> None:
    found = tt.expect_causal(made(name), 200, modes=("eval",), perturbed=[0, 63, 64, 65, 127, 128, 129, 199])
    assert found.length == 200


SORTED = tt.OrderConfig("straight_through", tau=0.1, normalize=True)
ORDERED: dict[str, dict[str, Any]] = {
    "chunks": {"order": SORTED, "order_scope": "chunks", "order_chunk": 5},
    "chunks, soft": {"order": "softsort", "order_scope": "chunks", "order_chunk": 5, "scalar_A": True},
    "groups": {"order": SORTED, "order_scope": "groups", "order_groups": 4},
    "groups, soft": {"order": "published", "order_scope": "groups", "order_groups": 4},
    "window": {"order": SORTED, "order_scope": "window"},
    "window, at random": {"order": "random", "order_scope": "window"},
}
PACKED = torch.tensor([3] * 6 + [0] * 9 + [3] * 1 + [5] * 3).expand(2, -1)


def lively(model: nn.Module) -> Any:
    """``model`` with all parameters moved, so that its orders do something."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", ORDERED)
def test_orders_within_the_past_are_causal(name: str) -> None:
    model = lively(made("mamba", dropout=0.1, **ORDERED[name]))
    assert model.causal
    tt.expect_causal(model, 17, perturbed=[0, 3, 4, 5, 6, 9, 10, 11, 16])
    tt.expect_causal(model, 19, seq_idx=PACKED, perturbed=[0, 4, 5, 6, 11, 14, 15, 16])
    plain = made("mamba", scalar_A=model.config.scalar_A).eval()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "order" not in key})
    ids = torch.arange(17)[None]
    assert (model(ids) - plain(ids)).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{"share_layers": True}, {"norm": "none"}, {"d_conv": None}])
@pytest.mark.parametrize("name", ["chunks", "groups"])
def test_what_is_left_out_leaves_ordered_ones_causal(name: str, options: dict[str, Any]) -> None:
    tt.expect_causal(lively(made("mamba", **ORDERED[name], **options)), 12, perturbed=[4, 5, 6, 9, 10, 11])


@pytest.mark.parametrize("name", ["mamba", "h3", "transformer"])
@pytest.mark.parametrize("order", ["published", "straight_through", "mean"])
def test_orders_of_whole_sequences_are_refused(name: str, order: str) -> None:
    model = lively(made(name, order=order))
    assert not model.causal
    with pytest.raises(CausalityError, match="declares causal = False"):
        tt.expect_causal(model, 9)
    found = tt.causality(model, 9, perturbed=[8])
    assert not found.causal
    assert not found.declared
    with pytest.raises(OptionError, match="order"):
        model(torch.zeros(1, 4, dtype=torch.long), seq_idx=torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(OptionError, match="sees later tokens and cannot decode"):
        model.generate(torch.zeros(1, 4, dtype=torch.long), 2)


def trained_on_noise(model: Any, letters: int, length: int) -> tuple[float, float]:
    """Held-out loss in nats a token, and the deviation of its mean, after 110 steps on tokens drawn at random."""
    draw = torch.Generator().manual_seed(letters)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(110):
        ids = torch.randint(letters, (32, length + 1), generator=draw)
        model(ids[:, :-1], ids[:, 1:]).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    ids = torch.randint(letters, (512, length + 1), generator=draw)
    with torch.no_grad():
        losses = model.eval()(ids[:, :-1], ids[:, 1:]).double()
    return losses.mean().item(), losses.std().item() / math.sqrt(losses.numel())


@pytest.mark.parametrize("name", ["mamba", "h3", "transformer"])
def test_the_published_order_beats_the_entropy_of_noise(name: str) -> None:
    """Independent uniform tokens: no prediction from the past has a loss below ln 32. Sorting the sequence has."""
    torch.manual_seed(4)
    sizes: dict[str, Any] = {"vocab_size": 32, "d_model": 32, "n_layer": 1}
    kind = {"mamba": tt.MambaLM, "h3": tt.H3LM, "transformer": tt.TransformerLM}[name]
    options: dict[str, Any] = {"n_head": 2} if name == "transformer" else {"d_state": 4}
    loss, deviation = trained_on_noise(kind(**sizes, **options, order="published"), 32, 8)
    assert loss < math.log(32) - 0.1 - 5 * deviation
    loss, deviation = trained_on_noise(kind(**sizes, **options), 32, 8)
    assert loss > math.log(32) - 5 * deviation


@pytest.mark.parametrize("name", ["chunks", "groups", "window"])
def test_orders_within_the_past_do_not(name: str) -> None:
    torch.manual_seed(4)
    model = tt.MambaLM(vocab_size=32, d_model=32, n_layer=1, d_state=4, **{**ORDERED[name], "order_chunk": 3})
    loss, deviation = trained_on_noise(model, 32, 8)
    assert math.log(32) - 5 * deviation < loss < math.log(32) + 0.2


class Leaky(nn.Module):
    """A causal mean, and beside it whatever ``also`` makes of all tokens."""

    def __init__(self, also: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.also = also

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return x.cumsum(1) + self.also(self, x)


LEAKS: dict[str, Any] = {
    "the mean of all": lambda model, x: x.mean(1, keepdim=True),
    "the next token": lambda model, x: torch.roll(x, -1, dims=1),
    "1e-30 of the last": lambda model, x: 1e-12 * x[:, -1:] * torch.ones_like(x),
    "in training only": lambda model, x: x.flip(1) if model.training else 0 * x,
    "sorted by score": lambda model, x: x.gather(1, x.mean(-1, keepdim=True).argsort(1).expand_as(x)),
}


@pytest.mark.parametrize("name", LEAKS)
def test_leaks_are_found(name: str) -> None:
    torch.manual_seed(1)
    found = tt.causality(Leaky(LEAKS[name]), 12)
    assert not found.causal
    assert {leak.kind for leak in found.leaks} == {"value", "gradient"}
    assert "reads the future" in found.explain()
    assert {leak.mode for leak in found.leaks} == ({"train"} if name == "in training only" else {"train", "eval"})
    if name == "the next token":
        assert {(leak.token, leak.output) for leak in found.leaks if leak.kind == "value"} == {
            (t, t - 1) for t in range(1, 12)
        }
    with pytest.raises(CausalityError, match=r"Leaky: The model reads the future: in \w+ mode "):
        tt.expect_causal(Leaky(LEAKS[name]), 12)


def test_a_value_without_a_gradient_and_a_gradient_without_a_value() -> None:
    by_value = tt.causality(Leaky(lambda model, x: x.detach().mean(1, keepdim=True)), 6)
    assert {leak.kind for leak in by_value.leaks} == {"value"}
    mean = Leaky(lambda model, x: (later := x.mean(1, keepdim=True)) - later.detach())
    by_gradient = tt.causality(mean, 6)
    assert {leak.kind for leak in by_gradient.leaks} == {"gradient"}


class Packed(nn.Module):
    """A selective scan on features; ``resets`` or not between packed sequences."""

    def __init__(self, resets: bool) -> None:
        super().__init__()
        self.mixer, self.resets = tt.S6(6, d_state=3), resets

    def forward(self, x: Tensor, seq_idx: Tensor) -> Tensor:
        return self.mixer(x, seq_idx=seq_idx if self.resets else None)


def test_packed_sequences_do_not_see_one_another() -> None:
    torch.manual_seed(2)
    x = torch.randn(2, 20, 6, dtype=torch.float64)
    seq_idx = torch.tensor([0] * 7 + [1] * 9 + [0] * 4).expand(2, -1)
    assert tt.causality(Packed(True), 20, tokens=x, seq_idx=seq_idx).causal
    found = tt.causality(Packed(False), 20, tokens=x, seq_idx=seq_idx)
    assert {leak.token for leak in found.leaks} == set(range(16))  # seen by the sequences after them
    assert min(leak.output for leak in found.leaks if leak.output is not None) == 7


PACKED_MODELS = {name: make for name, make in MODELS.items() if name != "mamba, positive"} | {
    "mamba, no convolution": lambda **options: tt.MambaLM(**SIZES, d_state=4, d_conv=None, **options)
}


@pytest.mark.parametrize("name", PACKED_MODELS)
def test_packed_language_models_read_each_sequence_by_itself(name: str) -> None:
    torch.manual_seed(3)
    model = lively(PACKED_MODELS[name](dropout=0.1)).double()
    tt.expect_causal(model, 19, seq_idx=PACKED, perturbed=[0, 5, 6, 7, 14, 15, 16, 18])
    model.eval()
    ids = torch.arange(19)[None] * 5 % 29
    alone = torch.cat([model(ids[:, start:stop]) for start, stop in ((0, 6), (6, 15), (15, 16), (16, 19))], dim=1)
    torch.testing.assert_close(model(ids, seq_idx=PACKED[:1]), alone, rtol=1e-12, atol=1e-12)
    targets = ids.flip(1)
    losses = model(ids, targets, seq_idx=PACKED[:1])
    torch.testing.assert_close(losses, -alone.log_softmax(-1).gather(-1, targets[..., None])[..., 0].float())


def test_the_model_is_left_as_it_was() -> None:
    model = made("mamba").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    tt.causality(model, 5)
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        value.dtype == torch.float32 and torch.equal(value, before[n]) for n, value in model.state_dict().items()
    )


def test_a_model_may_declare_itself_not_causal() -> None:
    model = made("mamba")
    model.causal = False  # type: ignore[assignment]
    assert not tt.causality(model, 5).declared
    with pytest.raises(CausalityError, match="MambaLM declares causal = False"):
        tt.expect_causal(model, 5)


def test_long_sequences_are_perturbed_around_chunks() -> None:
    found = tt.causality(Leaky(lambda model, x: 0 * x), 161, modes=("eval",))
    assert found.tokens[:5] == (0, 15, 16, 17, 31)
    assert found.tokens[-3:] == (145, 159, 160)
    assert {k + s for k in range(16, 160, 16) for s in (-1, 0, 1)} <= set(found.tokens)


class Deaf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


def test_errors() -> None:
    with pytest.raises(ShapeError, match=r"seq_idx has shape \(1, 3\)"):
        made("h3")(torch.zeros(1, 4, dtype=torch.long), seq_idx=torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(OptionError, match="no output changed with any token"):
        tt.causality(Deaf(), 4, tokens=torch.zeros(1, 4, 2))
    with pytest.raises(OptionError, match=r"no nn\.Embedding"):
        tt.causality(nn.Linear(2, 2), 4)
    with pytest.raises(ShapeError, match=r"tokens have shape \(1, 4, 2\).*L = 5"):
        tt.causality(nn.Linear(2, 2), 5, tokens=torch.zeros(1, 4, 2))
    with pytest.raises(DTypeError, match=r"causality: model is builtins.function, expected a torch.nn.Module"):
        tt.causality(lambda tokens: tokens, 5)
    with pytest.raises(OptionError, match="places from 0 to 4"):
        tt.causality(made("mamba"), 5, perturbed=[5])
    with pytest.raises(OptionError, match="modes is 'test'"):
        tt.causality(made("mamba"), 5, modes=("test",))  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        tt.causality(Leaky(lambda model, x: x / 0), 4)
    with pytest.raises(ShapeError, match=r"output has shape \(2, 4\) for tokens"):
        tt.causality(nn.Sequential(nn.Embedding(5, 4), nn.Flatten(1), nn.Linear(20, 4)), 5)
