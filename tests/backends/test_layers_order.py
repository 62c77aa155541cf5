"""The order inside the mixers: what is sorted, what is not, what comes back, and what is told about it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import tokendyn
import tokendyn.torch as tt
from tokendyn.backends.torch.layers._ordering import unit_deviation
from tokendyn.errors import OptionError
from tokendyn.torch import OrderConfig

from .layers_reference import dense_softsort, depthwise, randomize, recurrence, sigmoid_gate, softplus, tokens

TAU = 0.3


def parts(m: tt.Mamba, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x behind the convolution, z, and the scores (14): s_l = (S_Δ x_l)ᵀ K with the dense S_Δ."""
    d, rank = m.d_inner, m.dt_rank
    both = h @ m.in_proj.weight.T
    x = sigmoid_gate(depthwise(both[..., :d], m.conv1d.weight, m.conv1d.bias, before=m.d_conv - 1))
    S_delta = m.dt_proj.weight @ m.x_proj.weight[:rank]
    return x, both[..., d:], (x @ S_delta.T) @ m.order.K


def scan(m: tt.Mamba, x: torch.Tensor) -> torch.Tensor:
    """The selective scan of tokens x in the order in which they come."""
    made = x @ m.x_proj.weight.T
    B, C = made[..., m.dt_rank : m.dt_rank + m.d_state], made[..., m.dt_rank + m.d_state :]
    step = softplus(made[..., : m.dt_rank] @ m.dt_proj.weight.T + m.dt_proj.bias)
    return recurrence(x, step, -torch.exp(m.A_log), B, C, m.D)


def block(order: OrderConfig | str | None, seed: int = 1) -> tt.Mamba:
    """One state for every order; K apart, so that the scores spread about as far as TAU."""
    made = tt.Mamba(6, 4, order=order)
    made.load_state_dict(randomize(tt.Mamba(6, 4), seed).state_dict(), strict=False)
    made = made.double()
    if hasattr(made.order, "K"):
        with torch.no_grad():
            made.order.K.copy_(tokens(12, seed=9))
    return made


def matrix(m: tt.Mamba, scores: torch.Tensor) -> torch.Tensor:
    """What multiplies the tokens: SoftSort's P, or the permutation matrix."""
    config = m.order.config
    if config.method == "softsort":
        return dense_softsort(scores, TAU, config.power)
    return torch.eye(scores.shape[1], dtype=scores.dtype)[torch.sort(scores, stable=True).indices]


@pytest.mark.parametrize("method", ["softsort", "hard", "straight_through"])
@pytest.mark.parametrize("after", ["restored", "sorted, gate too", "sorted, gate not"])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_everything_is_in_the_order_that_it_says(method: str, after: str, power: float) -> None:
    flags = {"restore": after == "restored", "reorder_gate": after == "sorted, gate too"}
    m = block(OrderConfig(method, tau=TAU, power=power, **flags))
    h = tokens(2, 9, 6)
    x, z, scores = parts(m, h)
    P = matrix(m, scores)
    y = scan(m, P @ x)
    if after == "restored":
        y = (P.mT @ y) / P.sum(1).unsqueeze(-1)
    elif after == "sorted, gate too":
        z = P @ z
    expected = (y * sigmoid_gate(z)) @ m.out_proj.weight.T
    torch.testing.assert_close(m(h), expected, rtol=1e-11, atol=1e-11)


def test_the_treatments_of_the_gate_differ() -> None:
    """Without this, a gate left in the wrong order could hide behind inputs for which the order does not matter."""
    h = tokens(2, 9, 6)
    outs = [
        block(OrderConfig("hard", restore=restore, reorder_gate=gate))(h)
        for restore, gate in ((True, False), (False, True), (False, False))
    ]
    outs.append(block(None)(h))
    for i, one in enumerate(outs):
        for other in outs[:i]:
            assert (one - other).norm() > 0.05 * one.norm()


def test_a_sorted_output_with_its_gate_is_the_restored_one_permuted() -> None:
    h = tokens(2, 9, 6)
    sorted_too = block(OrderConfig("hard", restore=False, reorder_gate=True))
    restored = block(OrderConfig("hard"))
    indices = torch.sort(parts(restored, h)[2], stable=True).indices
    torch.testing.assert_close(sorted_too(h), tokendyn.take_tokens(restored(h), indices), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("method", ["hard", "straight_through"])
def test_the_identity_order_changes_nothing(method: str, restore: bool) -> None:
    m = block(OrderConfig(method, restore=restore))
    with torch.no_grad():
        m.order.K.zero_()  # all scores equal, and equal scores keep their order
    h = tokens(2, 9, 6)
    torch.testing.assert_close(m(h), block(None)(h), rtol=1e-13, atol=1e-13)


def test_soft_order_tends_to_the_hard_one() -> None:
    h = tokens(2, 9, 6)
    hard = block("hard")(h)
    errors = [(block(OrderConfig("softsort", tau=tau))(h) - hard).norm().item() for tau in (1e-1, 1e-2, 1e-3, 1e-5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9 * hard.norm()


def test_the_temperature_can_be_set_at_any_time() -> None:
    h = tokens(2, 9, 6)
    m = block(OrderConfig("softsort", tau=5.0))
    m.order.tau = TAU
    assert torch.equal(m(h), block(OrderConfig("softsort", tau=TAU))(h))


def test_descending_order() -> None:
    m, h = block(OrderConfig("hard", ascending=False, restore=False)), tokens(2, 9, 6)
    x, z, scores = parts(m, h)
    y = scan(m, tokendyn.take_tokens(x, torch.sort(-scores, stable=True).indices))
    torch.testing.assert_close(m(h), (y * sigmoid_gate(z)) @ m.out_proj.weight.T, rtol=1e-11, atol=1e-11)


def test_gradients_reach_k_through_soft_orders_only() -> None:
    h = tokens(2, 9, 6)
    gradients = {}
    for method in ("softsort", "straight_through", "hard"):
        m = block(OrderConfig(method, tau=TAU))
        m(h).square().sum().backward()
        gradients[method] = m.order.K.grad
        assert m.x_proj.weight.grad.abs().sum() > 0
    assert gradients["hard"] is None
    for method in ("softsort", "straight_through"):
        assert gradients[method].abs().min() > 0
    # Straight through has the values of the hard order.
    through = block(OrderConfig("straight_through", tau=TAU))(h)
    torch.testing.assert_close(through, block("hard")(h), rtol=1e-13, atol=1e-13)


def test_the_gradient_of_k_is_that_of_finite_differences() -> None:
    m, h = block(OrderConfig("softsort", tau=TAU)), tokens(1, 6, 6)

    def loss(K: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(m, {"order.K": K}, (h,)).sin().sum()

    K = m.order.K.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (K,), eps=1e-6, atol=1e-8)


def test_normalized_scores_do_not_depend_on_their_scale() -> None:
    h = tokens(2, 9, 6)
    m = block(OrderConfig("softsort", tau=TAU, normalize=True))
    before = m(h)
    with torch.no_grad():
        m.order.K.mul_(1e-6)
    torch.testing.assert_close(m(h), before, rtol=1e-8, atol=1e-8)
    plain = block(OrderConfig("softsort", tau=TAU))
    assert (plain(h) - before).norm() > 0.01 * before.norm()


def test_unit_deviation() -> None:
    scores = tokens(3, 17).requires_grad_()
    unit = unit_deviation(scores)
    torch.testing.assert_close(unit.std(1, correction=0), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(unit.mean(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(unit_deviation, (scores,))
    for value in (0.0, 0.1, 1e30):
        flat = torch.full((2, 9), value, requires_grad=True)
        out = unit_deviation(flat)
        assert out.abs().max() <= 1e-6 * value
        out.square().sum().backward()
        assert torch.isfinite(flat.grad).all()
    # Differences that are rounding only are not blown up into an order.
    noisy = torch.full((1, 8), 3.0) + torch.tensor([[0.0, 1, 0, 1, 0, 0, 1, 0]]) * 2.4e-7
    assert unit_deviation(noisy).abs().max() < 1e-6


def test_random_order_is_fresh_in_training_and_absent_in_evaluation() -> None:
    m, h = block("random"), tokens(2, 9, 6)
    torch.manual_seed(0)
    first, second = m(h), m(h)
    torch.manual_seed(0)
    assert torch.equal(m(h), first)
    assert not torch.allclose(first, second)
    assert torch.equal(m.eval()(h), block(None)(h))
    assert not list(m.order.parameters())
    seen = set()
    with tt.record_orders(m.train()) as orders:
        for _ in range(50):
            m(h)
    for record in orders["order"]:
        seen.update(map(tuple, record.order.indices.tolist()))
        assert torch.equal(record.order.indices.sort().values, torch.arange(9).expand(2, 9))
    assert len(seen) == 100


def test_reversed_order_scans_from_the_last_token() -> None:
    m, h = block("reversed"), tokens(2, 9, 6)
    plain = block(None)
    x, z = plain.in_proj(h).chunk(2, -1)
    x = sigmoid_gate(depthwise(x, plain.conv1d.weight, plain.conv1d.bias, before=3))
    expected = (scan(plain, x.flip(1)).flip(1) * sigmoid_gate(z)) @ plain.out_proj.weight.T
    torch.testing.assert_close(m(h), expected, rtol=1e-11, atol=1e-11)


def test_scores_are_made_in_single_precision_at_least() -> None:
    torch.manual_seed(0)
    m = tt.Mamba(16, 4, order=OrderConfig("softsort", tau=1e-4))
    h = tokens(2, 40, 16, dtype=torch.float32)
    with tt.record_orders(m) as orders, torch.autocast("cpu", torch.bfloat16):
        out = m(h)
        out.float().sum().backward()
    scores = orders["order"][0].order.scores
    assert out.dtype == torch.bfloat16
    assert scores.dtype == torch.float32
    assert m.order.K.grad.abs().sum() > 0
    # Not rounded to bfloat16 on the way: nearly all scores have bits that it lacks.
    assert (scores != scores.bfloat16().float()).float().mean() > 0.9


def test_recording_changes_nothing_and_tells_what_the_order_did() -> None:
    h = tokens(2, 9, 6)
    m = block(OrderConfig("softsort", tau=TAU))
    before = m(h)
    with tt.record_orders(m) as orders:
        assert torch.equal(m(h), before)
        m(h)
    m(h)
    assert list(orders) == ["order"]
    assert len(orders["order"]) == 2
    record = orders["order"][0]
    x, _, scores = parts(m, h)
    P = matrix(m, scores)
    torch.testing.assert_close(record.order.scores, scores.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(record.order.indices, torch.sort(scores, stable=True).indices)
    torch.testing.assert_close(record.effective_tokens, 1 / P.square().sum(-1).detach(), rtol=1e-10, atol=0)
    kept = (P @ x).var(1).sum(-1) / x.var(1).sum(-1)
    torch.testing.assert_close(record.variance_kept, kept.detach(), rtol=1e-10, atol=0)
    assert not record.order.scores.requires_grad


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_recording_sees_into_a_compiled_model() -> None:
    torch._dynamo.reset()
    m = tt.TokenReorder(Cumulative(), 3, "hard")
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    x = tokens(1, 4, 3, dtype=torch.float32)
    expected = compiled(x)
    with tt.record_orders(compiled) as orders:
        torch.testing.assert_close(compiled(x), expected)
    assert len(orders["order"]) == 1
    with tt.record_orders(m) as orders:
        m.compile(fullgraph=True, backend="aot_eager")
        m(x)
    assert len(orders["order"]) == 1
    assert not m.order._forward_hooks


def test_what_temperature_one_does_to_small_scores() -> None:
    """At the published settings and a fresh layer's scores, sorting is averaging; a hard order keeps every token."""
    torch.manual_seed(0)
    h = tokens(4, 49, 16, dtype=torch.float32)
    kept = {}
    for name, order in {
        "published": OrderConfig.published(),
        "hard": OrderConfig("hard"),
        "straight through": OrderConfig("straight_through"),
        "normalized": OrderConfig("softsort", tau=0.01, normalize=True),
    }.items():
        m = tt.Mamba(16, 4, order=order)
        with tt.record_orders(m) as orders:
            m(h)
        record = orders["order"][0]
        kept[name] = record.variance_kept.mean().item(), record.effective_tokens.mean().item()
    assert kept["published"][0] < 1e-4
    assert kept["published"][1] > 48.9
    assert kept["hard"] == pytest.approx((1.0, 1.0), rel=1e-5)
    assert kept["straight through"] == pytest.approx((1.0, 1.0), rel=1e-5)
    assert kept["normalized"][0] > 0.5
    assert kept["normalized"][1] < 3


def test_no_variance_to_keep_is_told_as_one() -> None:
    reorder = tt.TokenReorder(torch.nn.Identity(), 4, "hard")
    with tt.record_orders(reorder) as orders:
        reorder(torch.ones(1, 5, 4))
    assert orders["order"][0].variance_kept.tolist() == [1.0]


# -------------------------------------------------------------------------------------------------- TokenReorder


class Cumulative(torch.nn.Module):
    """A mixer that sees the order: running sums, times a factor."""

    def forward(self, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        return x.cumsum(1) * factor


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("method", ["softsort", "hard", "straight_through"])
def test_token_reorder_around_any_mixer(method: str, restore: bool) -> None:
    x = tokens(2, 9, 5)
    layer = tt.TokenReorder(Cumulative(), 5, OrderConfig(method, tau=TAU, restore=restore)).double()
    with torch.no_grad():
        layer.order.K.copy_(tokens(5, seed=3))
    P = matrix(layer, x @ layer.order.K)
    expected = (P @ x).cumsum(1) * 2.0
    if restore:
        expected = (P.mT @ expected) / P.sum(1).unsqueeze(-1)
    torch.testing.assert_close(layer(x, factor=2.0), expected, rtol=1e-11, atol=1e-11)


def test_token_reorder_restores_exactly() -> None:
    x = tokens(2, 9, 5, dtype=torch.float32)
    assert torch.equal(tt.TokenReorder(torch.nn.Identity(), 5, "hard")(x), x)
    assert torch.equal(tt.TokenReorder(torch.nn.Identity(), 5, "reversed")(x), x)
    assert torch.equal(tt.TokenReorder(Cumulative(), 5, "random").eval()(x), x.cumsum(1))


# ------------------------------------------------------------------------------------------------- configuration


def test_a_configuration_is_had_without_any_framework() -> None:
    program = (
        "import sys, tokendyn; tokendyn.OrderConfig.published(); print(sorted({'torch', 'jax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_published_order() -> None:
    published = OrderConfig.published()
    assert (published.method, published.tau, published.power, published.ascending) == ("softsort", 1.0, 1.0, True)
    assert (published.restore, published.reorder_gate, published.normalize) == (False, False, False)
    assert OrderConfig.of("published") == published
    assert OrderConfig.of("hard") == OrderConfig("hard")
    assert OrderConfig.of(published) is published
    assert OrderConfig.of(None) is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OrderConfig("sort"), "method is 'sort', expected one of 'softsort', 'hard'"),
        (lambda: OrderConfig(tau=0), "tau is 0, expected a finite Python number above 0"),
        (lambda: OrderConfig(power=-1), "power is -1"),
        (lambda: OrderConfig(reorder_gate=True), "restore and reorder_gate are both True"),
        (lambda: tt.Mamba(8, order="soft"), "'published', 'softsort'"),
        (lambda: tt.TokenReorder(torch.nn.Identity(), 0), "d_model is 0"),
        (lambda: tt.TokenReorder(torch.nn.Identity(), 4, None), "expected an order"),
        (
            lambda: tt.TokenReorder(torch.nn.Identity(), 4, OrderConfig(restore=False, reorder_gate=True)),
            "without reorder_gate",
        ),
    ],
)
def test_wrong_orders_are_told(make, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        make()


def test_a_temperature_that_a_schedule_drove_to_zero_is_told() -> None:
    m = tt.Mamba(4, 2, order="softsort")
    m.order.tau = 0.0
    with pytest.raises(OptionError, match=r"tau is 0\.0"):
        m(torch.ones(1, 3, 4))
