"""MambaVision: names and counts of the public model, its computation read anew, small models, orders by stage."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import tokendyn.torch as tt
from tokendyn.backends.torch.models._mambavision_blocks import Attention, DropPath, from_windows, to_windows
from tokendyn.errors import OptionError, ShapeError
from tokendyn.torch import OrderConfig
from tokendyn.torch.models import (
    MambaVision,
    MambaVisionMixer,
    mambavision_16px,
    mambavision_32px,
    mambavision_64px,
    mambavision_t,
)

from .layers_reference import dense_softsort, depthwise, randomize, recurrence, sigmoid_gate, softplus, tokens

PARAMETERS_T = 31_794_248
TINY = {
    "dims": (4, 8, 12, 16),
    "in_dim": 4,
    "depths": (1, 1, 3, 2),
    "num_heads": (3, 4),
    "window_size": (3, 2),
    "num_classes": 5,
    "drop_path_rate": 0.0,
}


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# -------------------------------------------------------------------------------------- names, shapes and counts


@pytest.mark.parametrize("parity", ["clean", "published"])
def test_mambavision_t_has_the_public_names_and_shapes(parity: str) -> None:
    """The list was read from the state of the public MambaVision-T (mambavision 1.2.0 on PyPI), not from ours."""
    public = json.loads((Path(__file__).parents[1] / "data" / "mambavision_t_parameters.json").read_text())
    with torch.device("meta"):
        model = mambavision_t(parity=parity)
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == public
    assert count(model) == PARAMETERS_T


def test_an_order_adds_k_in_the_first_block_of_stages_3_and_4() -> None:
    with torch.device("meta"):
        model, plain = mambavision_t(order="published"), mambavision_t()
    assert count(model) - count(plain) == 480
    more = {name: tuple(p.shape) for name, p in model.named_parameters() if name not in plain.state_dict()}
    assert more == {"levels.2.blocks.0.mixer.order.K": (160,), "levels.3.blocks.0.mixer.order.K": (320,)}
    with torch.device("meta"):
        assert count(mambavision_t(order="random")) == PARAMETERS_T
        assert count(mambavision_t(order="hard", order_blocks=(0, 1))) == PARAMETERS_T + 960


# --------------------------------------------------------------------- the published computation, read once more


def published_mixer(p: dict[str, torch.Tensor], prefix: str, h: torch.Tensor, ordered: bool) -> torch.Tensor:
    """Selective mixer of tokens h (b, L, d): the bias of Δ added by the projection and again by the scan."""

    def get(name: str) -> torch.Tensor:
        return p[f"{prefix}.{name}"]

    both = h @ get("in_proj.weight").T
    half = both.shape[-1] // 2
    reach = get("conv1d_x.weight").shape[-1] // 2
    x = sigmoid_gate(depthwise(both[..., :half], get("conv1d_x.weight"), None, before=reach))
    z = sigmoid_gate(depthwise(both[..., half:], get("conv1d_z.weight"), None, before=reach))
    rank, N = get("dt_proj.weight").shape[1], get("A_log").shape[1]

    def project(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        made = x @ get("x_proj.weight").T
        return made[..., :rank] @ get("dt_proj.weight").T + get("dt_proj.bias"), *made[..., rank:].split(N, -1)

    delta, B, C = project(x)
    if ordered:
        x = dense_softsort(delta @ get("order.K"), tau=1.0) @ x
        delta, B, C = project(x)
    y = recurrence(x, softplus(delta + get("dt_proj.bias")), -torch.exp(get("A_log")), B, C, get("D"))
    return torch.cat([y, z], -1) @ get("out_proj.weight").T


def published_attention(p: dict[str, torch.Tensor], prefix: str, h: torch.Tensor, heads: int) -> torch.Tensor:
    d = h.shape[-1]
    out = torch.zeros_like(h)
    qkv = h @ p[f"{prefix}.qkv.weight"].T + p[f"{prefix}.qkv.bias"]
    width = d // heads
    for head in range(heads):
        q, k, v = (qkv[..., part * d + head * width : part * d + (head + 1) * width] for part in range(3))
        out[..., head * width : (head + 1) * width] = torch.softmax(q @ k.mT / math.sqrt(width), -1) @ v
    return out @ p[f"{prefix}.proj.weight"].T + p[f"{prefix}.proj.bias"]


def published_forward(
    model: MambaVision, images: torch.Tensor, heads: tuple[int, int], sides: tuple[int, int], ordered: bool
) -> torch.Tensor:
    """The whole published model in evaluation from its state: windows cut one by one, no module of ours is called."""
    p = model.state_dict()

    def batch_norm(x: torch.Tensor, name: str, eps: float = 1e-5) -> torch.Tensor:
        mean, var, weight, bias = (
            p[f"{name}.{part}"][None, :, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + eps) * weight + bias

    def layer_norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    x = images
    for i in (0, 3):
        x = F.conv2d(x, p[f"patch_embed.conv_down.{i}.weight"], stride=2, padding=1)
        x = batch_norm(x, f"patch_embed.conv_down.{i + 1}", 1e-4).clamp(min=0)
    for stage in range(4):
        depth = 1 + max(int(key.split(".")[3]) for key in p if key.startswith(f"levels.{stage}.blocks."))
        height, width = x.shape[2:]
        if stage >= 2:
            side = sides[stage - 2]
            x = F.pad(x, (0, -width % side, 0, -height % side))
        for i in range(depth):
            at = f"levels.{stage}.blocks.{i}"
            if stage < 2:
                r = batch_norm(F.conv2d(x, p[f"{at}.conv1.weight"], p[f"{at}.conv1.bias"], padding=1), f"{at}.norm1")
                r = 0.5 * r * (1 + torch.tanh(math.sqrt(2 / math.pi) * (r + 0.044715 * r**3)))
                r = F.conv2d(r, p[f"{at}.conv2.weight"], p[f"{at}.conv2.bias"], padding=1)
                x = x + batch_norm(r, f"{at}.norm2")
                continue
            out = torch.zeros_like(x)
            for top in range(0, x.shape[2], side):
                for left in range(0, x.shape[3], side):
                    cut = (slice(None), slice(None), slice(top, top + side), slice(left, left + side))
                    t = x[cut].flatten(2).mT
                    inner = layer_norm(t, f"{at}.norm1")
                    if i < math.ceil(depth / 2):
                        t = t + published_mixer(p, f"{at}.mixer", inner, ordered and i == 0)
                    else:
                        t = t + published_attention(p, f"{at}.mixer", inner, heads[stage - 2])
                    r = linear(layer_norm(t, f"{at}.norm2"), f"{at}.mlp.fc1")
                    t = t + linear(0.5 * r * (1 + torch.erf(r / math.sqrt(2))), f"{at}.mlp.fc2")
                    out[cut] = t.mT.unflatten(2, (side, side))
            x = out
        x = x[:, :, :height, :width]
        if stage < 3:
            x = F.conv2d(x, p[f"levels.{stage}.downsample.reduction.0.weight"], stride=2, padding=1)
    return linear(batch_norm(x, "norm").mean((2, 3)), "head")


@pytest.mark.parametrize("order", [None, "published"])
def test_published_parity_is_the_published_computation(order: str | None) -> None:
    model = randomize(MambaVision(**TINY, parity="published", order=order), seed=1).eval()
    images = tokens(2, 3, 52, 75)  # windows of 3 on 7 x 10 places: padding on both sides
    with torch.no_grad():
        out = model(images)
        expected = published_forward(model, images, TINY["num_heads"], TINY["window_size"], order is not None)
    assert out.shape == (2, 5)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [None, "published"])
def test_clean_parity_is_the_published_one_with_the_bias_doubled(order: str | None) -> None:
    published = randomize(MambaVision(**TINY, parity="published", order=order), seed=2).eval()
    clean = MambaVision(**TINY, order=order).double().eval()
    images = tokens(1, 3, 40, 40)
    clean.load_state_dict(published.state_dict())
    assert (clean(images) - published(images)).abs().max() > 1e-6
    state = {k: 2 * v if k.endswith("dt_proj.bias") else v for k, v in published.state_dict().items()}
    clean.load_state_dict(state)
    torch.testing.assert_close(clean(images), published(images), rtol=1e-12, atol=1e-12)


def test_initialization_by_parity() -> None:
    torch.manual_seed(0)
    options = {"dims": (4, 8, 96, 96), "num_heads": (4, 4), "depths": (1, 1, 2, 2)}
    for parity in ("clean", "published"):
        model = MambaVision(**options, order="published", parity=parity)
        mixer = model.levels[2].blocks[0].mixer
        assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert mixer.order.K.std().item() == pytest.approx(0.02, rel=0.4)
        assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert torch.equal(model.head.bias, torch.zeros(1000))
        step = softplus(mixer.dt_proj.bias)
        if parity == "clean":
            assert step.min() >= 0.99e-3
            assert step.max() <= 0.101
            assert mixer.dt_proj.weight.abs().max().item() > 0.2
        else:
            torch.testing.assert_close(step, torch.full_like(step, math.log(2)))
            assert mixer.dt_proj.weight.std().item() == pytest.approx(0.02, rel=0.2)


# --------------------------------------------------------------------------------------------- the mixer's orders


@pytest.mark.parametrize("flags", [(True, False), (False, True), (False, False)])
def test_the_mixer_orders_what_it_says(flags: tuple[bool, bool]) -> None:
    config = OrderConfig("hard", restore=flags[0], reorder_gate=flags[1])
    mixer = randomize(MambaVisionMixer(12, order=config), seed=3)
    plain = MambaVisionMixer(12).double()
    plain.load_state_dict(mixer.state_dict(), strict=False)
    h = tokens(2, 9, 12)
    # By hand: the scan of a plain mixer, run on the tokens behind its convolution in sorted order.
    x, z = (h @ plain.in_proj.weight.T).split(6, -1)
    x = sigmoid_gate(depthwise(x, plain.conv1d_x.weight, None, before=1))
    z = sigmoid_gate(depthwise(z, plain.conv1d_z.weight, None, before=1))
    scores = (x @ (plain.dt_proj.weight @ plain.x_proj.weight[:1]).T) @ mixer.order.K
    P = torch.eye(9, dtype=torch.float64)[torch.sort(scores, stable=True).indices]
    y = plain.scan(P @ x)
    y = P.mT @ y if flags[0] else y
    z = P @ z if flags[1] else z
    expected = torch.cat([y, z], -1) @ plain.out_proj.weight.T
    torch.testing.assert_close(mixer(h), expected, rtol=1e-11, atol=1e-11)
    assert (mixer(h) - plain(h)).norm() > 0.01 * plain(h).norm()


@pytest.mark.parametrize("method", ["softsort", "straight_through"])
def test_gradients_reach_k_from_the_loss(method: str) -> None:
    torch.manual_seed(0)
    model = mambavision_16px(in_chans=1, order=OrderConfig(method, tau=0.1, normalize=True))
    F.cross_entropy(model(torch.randn(4, 1, 16, 16)), torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert model.levels[2].blocks[0].mixer.order.K.grad.abs().sum() > 0
    assert model.levels[3].blocks[0].mixer.order.K.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "side", "most"),
    [(mambavision_16px, 16, 300_000), (mambavision_32px, 32, 5_000_000), (mambavision_64px, 64, 7_000_000)],
)
def test_small_models_reorder_at_least_49_tokens(make, side: int, most: int) -> None:
    torch.manual_seed(0)
    model = make(order="published")
    assert count(model) <= most
    with tt.record_orders(model) as orders, torch.no_grad():
        assert model(torch.randn(2, 3, side, side)).shape == (2, 10)
    assert list(orders) == ["levels.2.blocks.0.mixer.order", "levels.3.blocks.0.mixer.order"]
    for records in orders.values():
        assert records[0].order.indices.shape == (2, 64)
    assert make(num_classes=3, in_chans=1)(torch.randn(1, 1, side, side)).shape == (1, 3)


# ---------------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize(("height", "width", "side"), [(6, 6, 3), (7, 10, 3), (2, 2, 4), (5, 1, 1)])
def test_windows_hold_their_patch_and_come_back(height: int, width: int, side: int) -> None:
    x = tokens(2, 3, height, width)
    windows = to_windows(x, side)
    rows, columns = -(-height // side), -(-width // side)
    assert windows.shape == (2 * rows * columns, side * side, 3)
    padded = torch.zeros(2, 3, rows * side, columns * side, dtype=x.dtype)
    padded[:, :, :height, :width] = x
    for index, window in enumerate(windows):
        b, place = divmod(index, rows * columns)
        i, j = divmod(place, columns)
        patch = padded[b, :, i * side : (i + 1) * side, j * side : (j + 1) * side]
        assert torch.equal(window, patch.flatten(1).T)
    assert torch.equal(from_windows(windows, side, height, width), x)


def test_drop_path_keeps_the_mean_and_drops_whole_samples() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    out = drop(torch.ones(4000, 3, 2))
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (out == out[:, :1, :1]).all()
    assert (out[:, 0, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))
    assert torch.equal(drop.eval()(out), out)


def test_stochastic_depth_grows_from_block_to_block() -> None:
    with torch.device("meta"):
        model = mambavision_t()
    rates = [m.p for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.2 * i / 15 for i in range(16)])


def test_attention_dropout_is_off_in_evaluation() -> None:
    torch.manual_seed(0)
    attention = Attention(8, 2, qkv_bias=True, qk_norm=True, attn_drop=0.5, proj_drop=0.0)
    x = torch.randn(2, 5, 8)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))


def test_layer_scale_multiplies_the_branches() -> None:
    torch.manual_seed(0)
    model = randomize(MambaVision(**TINY, layer_scale=1e-5, layer_scale_conv=1e-5), seed=4).eval()
    block = model.levels[2].blocks[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                parameter.zero_()
    x = tokens(2, 9, 12)
    assert torch.equal(block(x), x)
    names = {name.rsplit(".", 1)[1] for name, _ in model.named_parameters() if "gamma" in name}
    assert names == {"gamma", "gamma_1", "gamma_2"}


def test_io_regimes_reach_every_mixer() -> None:
    model = MambaVision(**{**TINY, "dims": (4, 8, 24, 24)}, io_regime="negative", d_state=4)
    mixers = [m for m in model.modules() if isinstance(m, MambaVisionMixer)]
    assert len(mixers) == 3
    for mixer in mixers:
        S_B, S_C = mixer.io_matrices()
        assert (torch.linalg.eigvals(S_B @ S_C.T).real < 0).all()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


# --------------------------------------------------------------------------------------------- running a model


def test_channels_last_stays_so_and_changes_nothing() -> None:
    model = randomize(MambaVision(**TINY), seed=5).eval()
    images = tokens(2, 3, 48, 48)
    layouts = []
    for level in model.levels:
        level.register_forward_hook(lambda m, i, o: layouts.append(o.is_contiguous(memory_format=torch.channels_last)))
    expected = model(images)
    layouts.clear()
    model.to(memory_format=torch.channels_last)
    out = model(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    assert layouts == [True] * 4


@pytest.mark.parametrize("order", [None, "published"])
def test_half_precision_is_close_to_single(order: str | None) -> None:
    torch.manual_seed(0)
    model = mambavision_16px(in_chans=1, order=order)
    images = torch.randn(2, 1, 16, 16)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images)
        F.cross_entropy(out.float(), torch.arange(2)).backward()
    assert (out.float() - exact).norm() / exact.norm() < 16 * torch.finfo(torch.bfloat16).eps
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())


def test_saved_and_loaded_through_safetensors(tmp_path) -> None:
    torch.manual_seed(0)
    model, other = (mambavision_16px(in_chans=1, order="hard") for _ in range(2))
    images = torch.randn(2, 1, 16, 16)
    model(images)  # moves the running statistics
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(model.eval()(images), other.eval()(images))


def test_a_training_step_is_deterministic() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        model = mambavision_16px(in_chans=1, order="softsort", drop_path_rate=0.3)
        F.cross_entropy(model(torch.randn(4, 1, 16, 16)), torch.arange(4)).backward()
        results.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Dynamo itself makes an instance of every autograd.Function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("order", [None, "published"])
def test_compiles_into_one_graph(order: str | None) -> None:
    torch._dynamo.reset()
    model = randomize(MambaVision(**{**TINY, "depths": (1, 1, 1, 2)}, order=order), seed=6).eval()
    images = tokens(1, 3, 48, 48)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
    compiled.sum().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    eager = model(images)
    eager.sum().backward()
    torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)
    for one, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": (5, 4)}, "a stage of width 12 with num_heads = 5, expected a divisor"),
        ({"num_heads": (2, 4, 8, 16)}, r"num_heads is \(2, 4, 8, 16\), expected 2 values"),
        ({"window_size": (7,)}, "window_size is"),
        ({"window_size": (0, 2)}, "an entry of window_size is 0"),
        ({"dims": (4, 8, 12)}, "dims is"),
        ({"dims": (4, 8, 13, 16), "num_heads": (1, 4)}, "d_model = 13, expand = 1.*even"),
        ({"d_conv": 4}, "odd d_conv"),
        ({"stem_stride": 3}, "stem_stride is 3, expected 1, 2 or 4"),
        ({"parity": "exact"}, "parity is 'exact', expected one of 'clean', 'published'"),
        ({"order": "soft"}, "'published', 'softsort'"),
        ({"order": "hard", "order_blocks": (1,)}, r"order_blocks holds 1.*these are 0 to 0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        ({"io_regime": "hot"}, "io_regime"),
    ],
)
def test_wrong_options_are_told(options: dict, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        MambaVision(**{**TINY, **options})


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (3, 32, 32), (2, 32, 32, 3)])
def test_wrong_images_are_told(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"expected \(b, 3, H, W\)"):
        MambaVision(**TINY)(torch.ones(shape))
