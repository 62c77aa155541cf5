"""The Mamba block: mamba-ssm's names and calls, its equations, decoding, compilation."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import tokendyn.torch as tt
from tokendyn.errors import OptionError, ShapeError

from .layers_reference import depthwise, randomize, recurrence, sigmoid_gate, softplus, tokens


def equations(m: tt.Mamba, h: torch.Tensor) -> torch.Tensor:
    """The whole block from its state, token by token."""
    p = m.state_dict()
    rank, N, d = p["dt_proj.weight"].shape[1], p["A_log"].shape[1], p["D"].shape[0]
    both = h @ p["in_proj.weight"].T + p.get("in_proj.bias", torch.zeros(2 * d))
    x, z = both[..., :d], both[..., d:]
    taps = p["conv1d.weight"].shape[-1]
    x = sigmoid_gate(depthwise(x, p["conv1d.weight"], p.get("conv1d.bias"), before=taps - 1))
    made = x @ p["x_proj.weight"].T
    step = softplus(made[..., :rank] @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    B, C = made[..., rank : rank + N], made[..., rank + N :]
    y = recurrence(x, step, -torch.exp(p["A_log"]), B, C, p["D"]) * sigmoid_gate(z)
    return y @ p["out_proj.weight"].T + p.get("out_proj.bias", torch.zeros(h.shape[-1]))


@pytest.mark.parametrize("options", [{}, {"bias": True, "conv_bias": False, "d_conv": 2}, {"expand": 3, "dt_rank": 5}])
def test_equals_the_equations(options: dict) -> None:
    block = randomize(tt.Mamba(6, 4, **options), seed=1)
    h = tokens(2, 9, 6)
    torch.testing.assert_close(block(h), equations(block, h), rtol=1e-12, atol=1e-12)


def test_state_has_the_names_and_shapes_of_mamba_ssm() -> None:
    # mamba_ssm.Mamba(48): d_inner 96, dt_rank 3, d_state 16, d_conv 4
    expected = {
        "A_log": (96, 16),
        "D": (96,),
        "in_proj.weight": (192, 48),
        "conv1d.weight": (96, 1, 4),
        "conv1d.bias": (96,),
        "x_proj.weight": (35, 96),
        "dt_proj.weight": (96, 3),
        "dt_proj.bias": (96,),
        "out_proj.weight": (48, 96),
    }
    assert {name: tuple(value.shape) for name, value in tt.Mamba(48).state_dict().items()} == expected
    biased = tt.Mamba(48, bias=True, conv_bias=False).state_dict().keys()
    assert biased == expected.keys() - {"conv1d.bias"} | {"in_proj.bias", "out_proj.bias"}
    ordered = {name: tuple(value.shape) for name, value in tt.Mamba(48, order="published").state_dict().items()}
    assert ordered == expected | {"order.K": (96,)}
    regime = {name: tuple(value.shape) for name, value in tt.Mamba(48, io_regime="positive").state_dict().items()}
    assert regime == expected | {"x_proj.weight": (19, 96), "io_diagonal": (16,)}


def test_a_call_written_for_mamba_ssm_runs_unchanged() -> None:
    names = (
        "d_model d_state d_conv expand dt_rank dt_min dt_max dt_init dt_scale dt_init_floor conv_bias bias "
        "use_fast_path layer_idx device dtype"
    )
    positional = [
        name
        for name, parameter in inspect.signature(tt.Mamba).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    assert positional == names.split()
    block = tt.Mamba(
        16, 8, 4, 2, "auto", 0.001, 0.1, "random", 1.0, 1e-4, True, False, False, 3, torch.device("cpu"), torch.bfloat16
    )
    assert block.in_proj.weight.dtype == torch.bfloat16
    assert block.A_log.dtype == block.D.dtype == torch.float32
    assert block.layer_idx == 3
    out = block(tokens(2, 5, 16, dtype=torch.bfloat16), inference_params=None)
    assert out.dtype == torch.bfloat16


def test_is_causal_without_an_order_only() -> None:
    h = tokens(1, 12, 6)
    changed = h.clone()
    changed[:, 8] += 1
    block = randomize(tt.Mamba(6, 4), seed=2)
    assert torch.equal(block(h)[:, :8], block(changed)[:, :8])
    assert not torch.equal(block(h)[:, 8:], block(changed)[:, 8:])
    ordered = randomize(tt.Mamba(6, 4, order="softsort"), seed=2)
    assert not torch.equal(ordered(h)[:, :8], ordered(changed)[:, :8])


@pytest.mark.parametrize("prompt", [1, 2, 7])
def test_decoding_token_by_token_is_the_whole_pass(prompt: int) -> None:
    block = randomize(tt.Mamba(6, 4, layer_idx=2), seed=3)
    h = tokens(2, 10, 6)
    params = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
    outs = [block(h[:, :prompt], inference_params=params)]
    for t in range(prompt, 10):
        params.seqlen_offset = t
        outs.append(block(h[:, t : t + 1], inference_params=params))
    torch.testing.assert_close(torch.cat(outs, 1), block(h), rtol=1e-12, atol=1e-12)
    conv_state, ssm_state = block.allocate_inference_cache(2, 10)
    steps = []
    for t in range(10):
        out, conv_state, ssm_state = block.step(h[:, t : t + 1], conv_state, ssm_state)
        steps.append(out)
    torch.testing.assert_close(torch.cat(steps, 1), block(h), rtol=1e-12, atol=1e-12)


def test_half_precision_is_close_to_single() -> None:
    torch.manual_seed(0)
    block = tt.Mamba(32, 8)
    h = tokens(2, 40, 32, dtype=torch.float32)
    exact = block(h)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(h)
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() / exact.norm() < 8 * torch.finfo(torch.bfloat16).eps
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())


def test_saved_and_loaded_through_safetensors(tmp_path) -> None:
    block, other = tt.Mamba(6, 4, order="hard"), tt.Mamba(6, 4, order="hard")
    h = tokens(2, 9, 6, dtype=torch.float32)
    assert not torch.equal(block(h), other(h))
    save_file(block.state_dict(), tmp_path / "block.safetensors")
    other.load_state_dict(load_file(tmp_path / "block.safetensors"))
    assert torch.equal(block(h), other(h))


def test_is_deterministic() -> None:
    h = tokens(2, 9, 6, dtype=torch.float32)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        block = tt.Mamba(6, 4, order="softsort")
        block(h).square().sum().backward()
        results.append([block(h), *[p.grad for p in block.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Dynamo itself makes an instance of every autograd.Function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("order", [None, "softsort", "hard", "straight_through", "random", "reversed", "mean"])
def test_compiles_into_one_graph(order: str | None) -> None:
    torch._dynamo.reset()
    block = randomize(tt.Mamba(4, 2, order=order), seed=4)
    h = tokens(2, 5, 4).requires_grad_()
    torch.manual_seed(0)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(h)
    compiled.square().sum().backward()
    gradients = [h.grad, *[p.grad for p in block.parameters()]]
    h.grad = None
    block.zero_grad()
    torch.manual_seed(0)
    eager = block(h)
    eager.square().sum().backward()
    torch.testing.assert_close(compiled, eager, rtol=1e-13, atol=1e-13)
    for one, other in zip(gradients, [h.grad, *[p.grad for p in block.parameters()]], strict=True):
        if one is None or other is None:
            assert one is other is None
        else:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_schedule_of_tau_recompiles_once_at_most() -> None:
    torch._dynamo.reset()
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    block = randomize(tt.Mamba(4, 2, order="softsort"), seed=4)
    h = tokens(2, 5, 4)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    with torch.no_grad():
        for tau in (1.0, 0.7, 0.4, 0.2, 0.1):
            block.order.tau = tau
            torch.testing.assert_close(compiled(h), block(h), rtol=1e-12, atol=1e-12)
    assert len(compilations) <= 2
    assert "order.tau" not in block.state_dict()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: tt.Mamba(8, d_conv=0), OptionError, "d_conv is 0"),
        (lambda: tt.Mamba(-8), OptionError, "d_model is -8"),
        (lambda: tt.Mamba(8)(torch.ones(2, 5, 16)), ShapeError, r"Mamba: x has shape \(2, 5, 16\).*D = 8"),
        (
            lambda: tt.Mamba(8, order="hard", layer_idx=0)(torch.ones(1, 1, 8), inference_params=SimpleNamespace()),
            OptionError,
            "cannot be decoded",
        ),
        (lambda: tt.Mamba(8)(torch.ones(1, 1, 8), inference_params=SimpleNamespace()), OptionError, "layer_idx"),
        (lambda: tt.Mamba(8).step(torch.ones(1, 2, 8), torch.ones(1), torch.ones(1)), ShapeError, "one token"),
    ],
)
def test_wrong_use_is_told(make, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
