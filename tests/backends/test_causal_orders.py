"""Orders that a language model may have, against their definitions; padding behind tokens that are ordered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tokendyn.torch as tt
from tokendyn.backends.torch.layers._chunk_order import ChunkOrderMamba
from tokendyn.backends.torch.layers._group_order import GroupOrderMamba
from tokendyn.backends.torch.layers._window_order import WindowOrderMamba
from tokendyn.errors import OptionError
from tokendyn.torch import OrderConfig

SORTED = OrderConfig("straight_through", tau=0.1, normalize=True)
SMALL: dict[str, Any] = {"vocab_size": 5, "d_model": 4, "n_layer": 1}
SCOPES: dict[str, dict[str, Any]] = {
    "chunks": {"order_chunk": 5},
    "groups": {"order_groups": 4},
    "window": {},
}


def lively(module: Any, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def language_model(scope: str, order: OrderConfig | str = SORTED, **options: Any) -> tt.MambaLM:
    sizes = {"vocab_size": 31, "d_model": 8, "n_layer": 2, "d_state": 3}
    return tt.MambaLM(**sizes, order=order, order_scope=scope, **SCOPES[scope], **options)  # type: ignore[return-value]


def scores(layer: Any, x: Tensor) -> Tensor:
    """(14) by its formula."""
    return (x @ layer.x_proj.weight[: layer.dt_rank].T @ layer.dt_proj.weight.T) @ layer.order.K


def test_a_chunk_is_remembered_in_its_order() -> None:
    layer = lively(ChunkOrderMamba(4, chunk=3, order="hard", d_state=2))
    hidden = torch.randn(2, 11, 4, dtype=torch.float64)
    x, z = layer.in_proj(hidden).chunk(2, dim=-1)
    x = layer.convolve(x)
    outs, memory = [], torch.zeros(2, 8, 2, dtype=torch.float64)
    for start in range(0, 11, 3):
        chunk = x[:, start : start + 3]
        outs.append(layer.scan(chunk, z[:, start : start + 3], initial_state=memory))
        places = scores(layer, chunk).argsort(dim=1)[..., None].expand_as(chunk)
        memory = layer.scan(chunk.gather(1, places), initial_state=memory, return_last_state=True)[1]
    expected = layer.out_proj(torch.cat(outs, dim=1))
    torch.testing.assert_close(layer(hidden), expected, rtol=1e-12, atol=1e-12)
    in_order = layer.out_proj(layer.scan(x, z))
    torch.testing.assert_close(in_order[:, :3], expected[:, :3], rtol=1e-12, atol=1e-12)
    assert (in_order[:, 3:] - expected[:, 3:]).abs().max() > 1e-5


def test_a_window_is_convolved_in_its_order() -> None:
    layer = lively(WindowOrderMamba(4, order="hard", d_state=2, d_conv=3))
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 2, 0))
    for l in range(7):
        window = padded[:, l : l + 3]
        places = scores(layer, window).argsort(dim=1, stable=True)[..., None].expand_as(window)
        taps = layer.conv1d.weight[:, 0].T
        expected = F.silu((window.gather(1, places) * taps).sum(1) + layer.conv1d.bias)
        torch.testing.assert_close(layer.convolve(x)[:, l], expected, rtol=1e-12, atol=1e-12)


def test_groups_of_channels_go_to_the_place_of_their_rank_and_back() -> None:
    layer = lively(GroupOrderMamba(4, groups=4, order="hard", d_state=2, d_conv=None))
    hidden = torch.randn(2, 6, 4, dtype=torch.float64)
    x, z = layer.in_proj(hidden).chunk(2, dim=-1)
    x = F.silu(x).unflatten(-1, (4, 2))
    places = (x @ layer.order.K).argsort(dim=-1)[..., None].expand_as(x)
    y = layer.scan(x.gather(2, places).flatten(2)).unflatten(-1, (4, 2))
    back = torch.zeros_like(y).scatter(2, places, y).flatten(2)
    expected = layer.out_proj(back * F.silu(z))
    torch.testing.assert_close(layer(hidden), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [SORTED, "softsort"])
@pytest.mark.parametrize("scope", SCOPES)
def test_decoding_is_the_whole_pass(scope: str, order: OrderConfig | str) -> None:
    model = lively(language_model(scope, order, scalar_A=scope == "chunks"))
    ids = torch.randint(31, (2, 17), generator=torch.Generator().manual_seed(5))
    whole = model(ids)
    for prompt in (1, 5, 8, 10):
        cache = model.allocate_inference_cache(2, 17)
        outs = [model.prefill(ids[:, :prompt], cache), *(model.step(ids[:, t], cache) for t in range(prompt, 17))]
        torch.testing.assert_close(torch.stack(outs, dim=1), whole[:, prompt - 1 :], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("scope", SCOPES)
def test_orders_are_learned_saved_and_run_in_half_precision(scope: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = language_model(scope, OrderConfig("softsort", tau=0.5, normalize=True))  # a hard one may flip by rounding
    ids = torch.randint(31, (2, 21), generator=torch.Generator().manual_seed(6))
    exact = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids)
        model(ids, ids).mean().backward()
    directions = {name: value.grad for name, value in model.named_parameters() if name.endswith("order.K")}
    assert len(directions) == 2
    assert all(g is not None and g.isfinite().all() and g.abs().max() > 0 for g in directions.values())
    assert (rounded.float() - exact).norm() / exact.norm() < 8 * torch.finfo(torch.bfloat16).eps
    model.save_pretrained(tmp_path)
    again = tt.MambaLM.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(ids), model.eval()(ids))
    with pytest.raises(OptionError, match=r"mamba_ssm has no model with order=OrderConfig"):
        model.save_pretrained(tmp_path, layout="mamba_ssm")


@pytest.mark.parametrize(
    "order",
    [
        *("softsort", "hard", "straight_through", "reversed", "mean", "published", SORTED),
        OrderConfig("softsort", tau=0.05, ascending=False, normalize=True),
        OrderConfig("softsort", power=2.0, tau=1e-3, restore=False, reorder_gate=True),
    ],
)
def test_padding_behind_ordered_tokens_changes_nothing(order: Any) -> None:
    """Each sequence as if it were alone, whatever the padding holds; no gradient reaches it."""
    layer = lively(tt.Mamba(6, 3, order=order))
    lengths = torch.tensor([9, 4, 1])
    hidden = torch.randn(3, 9, 6, dtype=torch.float64)
    hidden[1, 4:] *= 1e3
    hidden.requires_grad_()
    y = layer(hidden, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = layer(hidden[row : row + 1, :length])[0]
        torch.testing.assert_close(y[row, :length], alone, rtol=1e-11, atol=1e-11)
    valid = torch.arange(9) < lengths[:, None]
    (gradient,) = torch.autograd.grad(y[valid].square().sum(), hidden)
    assert (gradient[~valid] == 0).all()
    assert (gradient[valid] != 0).any(-1).all()


@pytest.mark.parametrize("order", ["softsort", "published", SORTED])
def test_padding_behind_an_ordered_s6(order: Any) -> None:
    layer = lively(tt.S6(6, 3, order=order))
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    y, state = layer(x, lengths=torch.tensor([7, 4]), return_last_state=True)
    alone, last = layer(x[1:, :4], return_last_state=True)
    torch.testing.assert_close(y[1:, :4], alone, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state[1:], last, rtol=1e-11, atol=1e-11)


def test_random_orders_leave_padding_behind() -> None:
    order = lively(tt.Mamba(6, 3, order="random")).order.train()
    found = order(torch.zeros(50, 9, 12), lengths=torch.full((50,), 4))
    assert torch.equal(found.indices[:, :4].sort(dim=1).values, torch.arange(4).expand(50, -1))
    assert found.indices[:, :4].unique(dim=0).shape[0] > 15


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tt.H3LM(**SMALL, order="hard", order_scope="chunks"), "MambaLM alone"),
        (lambda: tt.MambaLM(**SMALL, order="hard", order_scope="all"), "order_scope is 'all'"),
        (lambda: GroupOrderMamba(4, groups=3, order="hard"), "groups is 3, expected a divisor of the 8 channels"),
        (lambda: WindowOrderMamba(4, order="hard", d_conv=None), "d_conv is None, expected a convolution"),
        (lambda: ChunkOrderMamba(4, chunk=0, order="hard"), "chunk is 0"),
        (lambda: tt.Mamba(4)(torch.ones(1, 2, 4), object(), lengths=torch.tensor([2])), "decode whole sequences only"),
    ],
)
def test_wrong_use_is_told(make: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        make()
