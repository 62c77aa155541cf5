"""Language models: public checkpoints, decoding, options, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tokendyn.torch as tt
from tokendyn.backends.torch.models._token_losses import KeptGradient
from tokendyn.errors import CheckpointError, DataError, OptionError, ShapeError
from tokendyn.torch.models import H3LM, MambaLM, MambaLMConfig, TransformerLM, mamba_lm_130m

SIZES: dict[str, Any] = {"vocab_size": 61, "d_model": 16, "n_layer": 3}
MODELS: dict[str, Any] = {
    "mamba": lambda **options: MambaLM(**{**SIZES, "d_state": 4, **options}),
    "h3": lambda **options: H3LM(**{**SIZES, "d_state": 6, "d_shift": 3, **options}),
    "transformer": lambda **options: TransformerLM(**{**SIZES, "n_head": 4, **options}),
}


def ids(b: int, L: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], (b, L), generator=torch.Generator().manual_seed(seed))


def lively(model: Any, seed: int = 1) -> Any:
    """``model`` in float64 with all parameters moved, so that nothing is 0 or 1 by initialisation."""
    torch.manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def reference_logits(model: MambaLM, tokens: torch.Tensor) -> torch.Tensor:
    """The whole model from its state, token by token, in mamba-ssm's names."""
    from .test_layers_mamba import equations

    def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    state = model.state_dict()
    x = state["backbone.embedding.weight"][tokens]
    for i, block in enumerate(model.backbone.layers):
        x = x + equations(block.mixer, rms(x, state[f"backbone.layers.{i}.norm.weight"]))
    return rms(x, state["backbone.norm_f.weight"]) @ state["lm_head.weight"].T


def test_equals_the_equations() -> None:
    model = lively(MODELS["mamba"]())
    tokens = ids(2, 9)
    torch.testing.assert_close(model(tokens), reference_logits(model, tokens), rtol=1e-11, atol=1e-11)


def test_h3_equals_its_recurrence() -> None:
    """SSM_shift and SSM_diag as loops over tokens in complex numbers, against the convolutions."""
    torch.manual_seed(0)
    layer = tt.H3(5, 6, 3).double()
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    q, k, v = (x @ layer.in_proj.weight.T + layer.in_proj.bias).split(5, dim=-1)
    A = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
    moved = torch.exp(layer.log_dt.exp()[:, None] * A)
    state, outs = torch.zeros(2, 5, 3, dtype=torch.complex128), []
    for t in range(9):
        shifted = sum(layer.shift[:, i] * k[:, t - i] for i in range(3) if t >= i)
        u = shifted * v[:, t]
        state = moved * state + (moved - 1) / A * u[..., None]
        y = 2 * (torch.complex(layer.C[..., 0], layer.C[..., 1]) * state).sum(-1).real + layer.D * u
        outs.append((q[:, t] * y) @ layer.out_proj.weight.T + layer.out_proj.bias)
    torch.testing.assert_close(layer(x), torch.stack(outs, 1), rtol=1e-11, atol=1e-12)


def test_attention_equals_its_definition_and_turns_by_distance_only() -> None:
    torch.manual_seed(0)
    layer = tt.CausalAttention(8, 2).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (2, 4)) for part in layer.in_proj(x).split(8, dim=-1))

    def turned(u: torch.Tensor, place: int) -> torch.Tensor:
        both = torch.complex(u[..., :2], u[..., 2:]) * torch.exp(1j * place * torch.tensor([1.0, 1e-2]).double())
        return torch.cat([both.real, both.imag], -1)

    outs = []
    for t in range(6):
        # Only the distance t - j enters, so q is turned by 7 + t and k by 7 + j here.
        scores = [(turned(q[:, t], 7 + t) * turned(k[:, j], 7 + j)).sum(-1) / 2 for j in range(t + 1)]
        weights = torch.stack(scores, -1).softmax(-1)
        outs.append(torch.einsum("bhj,bjhd->bhd", weights, v[:, : t + 1]).flatten(1))
    torch.testing.assert_close(layer(x), layer.out_proj(torch.stack(outs, 1)), rtol=1e-10, atol=1e-10)


def test_130m_has_the_names_and_the_size_of_the_public_model() -> None:
    with torch.device("meta"):
        model = mamba_lm_130m()
    assert model.parameter_count() == 129_135_360
    assert model.parameter_count(embedding=False) == 129_135_360 - 50_280 * 768
    names = set(model.state_dict())
    mixer = "A_log D in_proj.weight conv1d.weight conv1d.bias x_proj.weight dt_proj.weight dt_proj.bias out_proj.weight"
    expected = {"backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight"}
    for i in range(24):
        expected |= {f"backbone.layers.{i}.mixer.{name}" for name in mixer.split()}
        expected.add(f"backbone.layers.{i}.norm.weight")
    assert names == expected
    assert model.lm_head.weight is model.backbone.embedding.weight
    with torch.device("meta"):
        assert mamba_lm_130m(vocab_size=50257, pad_vocab_size_multiple=8).lm_head.weight.shape == (50264, 768)


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' own MambaForCausalLM with random weights, and the folder it was saved to."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.MambaConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=3, state_size=8, use_mambapy=False, expand=2, use_bias=True
    )
    model = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("public")
    model.save_pretrained(folder)
    return model, folder


def test_a_public_checkpoint_gives_the_same_logits(public: Any) -> None:
    theirs, folder = public
    ours = MambaLM.from_pretrained(folder)
    tokens = ids(2, 40)
    with torch.no_grad():
        expected, found = theirs(tokens).logits, ours(tokens)
    assert expected.dtype == found.dtype == torch.float32
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt", [1, 3, 7])
def test_a_public_checkpoint_generates_the_same_tokens(public: Any, prompt: int) -> None:
    theirs, folder = public
    tokens = ids(2, prompt, seed=prompt)
    expected = theirs.generate(tokens, max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(MambaLM.from_pretrained(folder).generate(tokens, 30), expected)
    assert expected[:, prompt:].unique().numel() > 5  # no degenerate repetition would prove this


def test_transformers_reads_what_we_write(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = MambaLM(**SIZES, io_regime="mixed", share_layers=True, norm_eps=1e-4).eval()
    model.save_pretrained(tmp_path, layout="transformers")
    theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path).eval()
    tokens = ids(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["tokendyn", "mamba_ssm", "transformers"])
@pytest.mark.parametrize("options", [{}, {"io_regime": "negative", "tie_embeddings": False}, {"share_layers": True}])
def test_saved_and_loaded(layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MambaLM(**{**SIZES, "pad_vocab_size_multiple": 8, **options}).eval()
    model.save_pretrained(tmp_path, layout=layout)
    again = MambaLM.from_pretrained(tmp_path)
    tokens = ids(2, 12)
    torch.testing.assert_close(again(tokens), model(tokens), rtol=1e-6, atol=1e-6)
    if layout == "tokendyn":
        assert again.config == model.config
        assert torch.equal(again(tokens), model(tokens))
    else:
        described = json.loads((tmp_path / "config.json").read_text())
        assert ("ssm_cfg" in described) == (layout == "mamba_ssm")
        assert again.config.io_regime == "free"
    names = set(load_file(tmp_path / "model.safetensors"))
    assert ("lm_head.weight" in names) == (not model.config.tie_embeddings)
    assert ("backbone.embeddings.weight" in names) == (layout == "transformers")
    assert again.lm_head.weight is again.backbone.embedding.weight or not model.config.tie_embeddings


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_saved_and_loaded_whole(name: str, tmp_path: Path) -> None:
    model = MODELS[name](norm="layer", norm_eps=1e-6).eval()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(ids(2, 7)), model(ids(2, 7)))
    model.save_pretrained(tmp_path)  # over the files that `again` was read from
    assert torch.equal(again(ids(2, 7)), model(ids(2, 7)))
    other = next(kind for key, kind in MODELS.items() if key != name)
    with pytest.raises(CheckpointError, match=f"holds a {type(model).__name__}, expected a"):
        type(other()).from_pretrained(tmp_path)


def test_shards_and_half_precision_are_loaded_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS["mamba"]()
    model.save_pretrained(tmp_path, layout="mamba_ssm")
    weights = {
        name: value if name.endswith(("A_log", ".D")) else value.bfloat16()
        for name, value in load_file(tmp_path / "model.safetensors").items()
    }
    (tmp_path / "model.safetensors").unlink()
    index = {}
    for number, names in enumerate((list(weights)[:5], list(weights)[5:])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, tmp_path / file)
        index.update(dict.fromkeys(names, file))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    loaded = MambaLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert loaded.backbone.layers[0].mixer.A_log.dtype == torch.float32
    logits = loaded(ids(1, 8))
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert MambaLM.from_pretrained(tmp_path, dtype=torch.float32)(ids(1, 8)).dtype == torch.float32
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-00002-of-00002\.safetensors, which is not in the folder"):
        MambaLM.from_pretrained(tmp_path)


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pickle_in_disguise(folder: Path) -> None:
    only_a_pickle(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")


def change(**values: Any) -> Any:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return damage


def lose(name: str) -> Any:
    def damage(folder: Path) -> None:
        weights = {key: value.clone() for key, value in load_file(folder / "model.safetensors").items()}
        del weights[name]
        save_file(weights, folder / "model.safetensors")

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_short, r"model\.safetensors is no safetensors file, or was cut short \(\d+ bytes"),
        (only_a_pickle, r"pytorch_model\.bin is refused: it is a pickle .* convert it to safetensors first.*python -c"),
        (pickle_in_disguise, r"model\.safetensors is refused: it is a pickle"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
        (change(model_type="mamba2"), "of type 'mamba2'; read are those of .*Mamba-1"),
        (change(ssm_cfg={"layer": "Mamba2"}), "only Mamba-1 is read"),
        (change(attn_layer_idx=[1]), "attention layers"),
        (change(n_layer=2), r"backbone\.layers\.2\.\S+ is not of this model.* and \d+ more"),
        (change(d_model=24), r"has shape \(64, 16\), expected \(64, 24\)"),
        (change(d_model=-1), "describes no MambaLM .*d_model is -1"),
        (lose("backbone.layers.1.mixer.D"), r"backbone\.layers\.1\.mixer\.D is missing"),
    ],
)
def test_damaged_folders_are_named(damage: Any, words: str, tmp_path: Path) -> None:
    MODELS["mamba"](pad_vocab_size_multiple=64).save_pretrained(tmp_path, layout="mamba_ssm")
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        MambaLM.from_pretrained(tmp_path)


def test_the_kept_gradient_of_the_logits_is_that_of_the_losses() -> None:
    """On a GPU it takes the place of logits that are made again."""
    features, weight = (torch.randn(size, 5, dtype=torch.float64, requires_grad=True) for size in (9, 7))
    targets, upstream = torch.randint(7, (9,)), torch.rand(9)
    losses = KeptGradient.apply(features, weight, targets)
    expected = torch.nn.functional.cross_entropy(features @ weight.T, targets, reduction="none")
    assert torch.allclose(losses.double(), expected, rtol=1e-6)
    ours = torch.autograd.grad(losses, (features, weight), upstream)
    for one, other in zip(ours, torch.autograd.grad(expected, (features, weight), upstream.double()), strict=True):
        assert (one - other).norm() < 1e-6 * other.norm()


def test_a_name_of_a_hub_is_no_folder() -> None:
    with pytest.raises(CheckpointError, match="no folder state-spaces/mamba-130m-hf, and nothing is fetched"):
        MambaLM.from_pretrained("state-spaces/mamba-130m-hf")


def test_unknown_and_missing_options_name_the_model() -> None:
    with pytest.raises(TypeError, match="MambaLM has no option depth; it has vocab_size, d_model, n_layer"):
        MambaLM(vocab_size=8, d_model=4, n_layer=1, depth=2)
    with pytest.raises(TypeError, match="TransformerLM needs vocab_size, n_layer too"):
        TransformerLM(d_model=4)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"norm": "none"}, "norm='none'"), ({"d_conv": None}, "d_conv=None"), ({"scalar_A": True}, "scalar_A=True")],
)
def test_layouts_without_a_word_for_an_option_refuse_it(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"mamba_ssm has no model with {words}"):
        MODELS["mamba"](**options).save_pretrained(tmp_path, layout="mamba_ssm")
    assert not list(tmp_path.iterdir())


OPTIONS: list[dict[str, Any]] = [
    {},
    {"share_layers": True},
    {"norm": "none"},
    {"norm": "layer", "tie_embeddings": False},
]
CASES = [(name, options) for name in MODELS for options in OPTIONS] + [
    ("mamba", {"d_conv": None}),
    ("mamba", {"io_regime": "positive", "io_form": "scale_matched"}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_decoding_is_the_whole_pass(name: str, options: dict[str, Any]) -> None:
    model = lively(MODELS[name](**options), seed=2)
    tokens = ids(2, 11)
    whole = model(tokens)
    for prompt in (1, 6):
        cache = model.allocate_inference_cache(2, 11)
        found = [model.prefill(tokens[:, :prompt], cache)]
        found += [model.step(tokens[:, t], cache) for t in range(prompt, 11)]
        torch.testing.assert_close(torch.stack(found, 1), whole[:, prompt - 1 :], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_no_output_sees_a_later_token(name: str, options: dict[str, Any]) -> None:
    model = lively(MODELS[name](**options), seed=4)
    tokens = ids(1, 10)
    changed = tokens.clone()
    changed[0, 6] = (tokens[0, 6] + 1) % 61
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=1e-12, atol=1e-12)
    assert (before[:, 6:] - after[:, 6:]).abs().amax(-1).min() > 1e-9
    embedded = model.backbone.embedding.weight
    (gradient,) = torch.autograd.grad(model(torch.arange(10)[None])[0, 4].sum(), embedded)
    if not model.config.tie_embeddings:
        # Exactly nothing reaches a later token; in H3 the rounding of the FFT, which mixes all places, does.
        rounding = 1e-14 * gradient.abs().max() if name == "h3" else 0.0
        assert gradient[5:10].abs().max() <= rounding
        assert (gradient[:5] != 0).any()


@pytest.mark.parametrize("name", MODELS)
def test_loss_is_the_cross_entropy_of_the_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokendyn.backends.torch.models import _token_losses

    model = lively(MODELS[name](head_dropout=0.0))
    tokens, targets = ids(3, 8), ids(3, 8, seed=5)
    logits = model(tokens)
    expected = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(model(tokens, targets), expected.float())
    expected.mean().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr(_token_losses, "_TOKENS", 5)  # 24 tokens in five pieces, made again in the backward pass
    losses = model(tokens, targets)
    torch.testing.assert_close(losses, expected.float())
    losses.mean().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_recomputed_blocks_have_the_same_gradients(name: str) -> None:
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = MODELS[name](dropout=0.2)
        model.backbone.recompute = recompute
        torch.manual_seed(1)
        loss = model(ids(2, 9), ids(2, 9, seed=1)).mean()
        loss.backward()
        results.append([loss, *[parameter.grad for parameter in model.parameters()]])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_generation_stops_and_draws_as_told() -> None:
    model = lively(MODELS["mamba"](pad_vocab_size_multiple=32), seed=5)
    prompt = ids(2, 4)
    greedy = model.generate(prompt, 12)
    assert greedy.shape == (2, 16)
    assert (greedy < 61).all()  # never a row that only fills up the embedding
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(model.generate(prompt, 12, temperature=0.7, top_k=1, generator=generator), greedy)
    draws = [
        model.generate(prompt, 12, temperature=1.0, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    stop = int(greedy[0, 6])
    stopped = model.generate(prompt, 12, stop_token=stop)
    place = int((greedy[0, 4:] == stop).nonzero()[0])
    assert torch.equal(stopped[0, : 5 + place], greedy[0, : 5 + place])
    assert (stopped[0, 5 + place :] == stop).all()
    model.train()
    model.generate(prompt, 1)
    assert model.training


def test_sharing_is_one_block_for_all_layers() -> None:
    shared, own = MODELS["mamba"](share_layers=True), MODELS["mamba"]()
    per_block = sum(p.numel() for p in own.backbone.layers[0].parameters())
    assert own.parameter_count() - shared.parameter_count() == 2 * per_block
    torch.manual_seed(0)
    with torch.no_grad():
        for block in own.backbone.layers:
            block.load_state_dict(shared.backbone.layers[0].state_dict())
        own.backbone.embedding.weight.copy_(shared.backbone.embedding.weight)
    torch.testing.assert_close(own(ids(2, 9)), shared(ids(2, 9)))


def test_residual_branches_start_smaller_with_depth() -> None:
    torch.manual_seed(0)
    deviations = [MODELS["mamba"](n_layer=n).backbone.layers[0].mixer.out_proj.weight.std().item() for n in (1, 16)]
    assert deviations[0] / deviations[1] == pytest.approx(4, rel=0.15)
    bias = MODELS["mamba"]().backbone.layers[0].mixer.dt_proj.bias
    assert 1e-4 < torch.nn.functional.softplus(bias).min() < 0.1  # Mamba's own start was kept


@pytest.mark.parametrize("residual_in_fp32", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_autocast_is_close_to_single(name: str, residual_in_fp32: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[name](residual_in_fp32=residual_in_fp32)
    tokens = ids(2, 30)
    exact = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, tokens)
        rounded = model(tokens)
    loss.mean().backward()
    assert loss.dtype == torch.float32
    assert (rounded.float() - exact).norm() / exact.norm() < 8 * torch.finfo(torch.bfloat16).eps
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: MambaLM(**{**SIZES, "n_layer": 0}), OptionError, "n_layer is 0"),
        (lambda: MambaLM(MambaLMConfig(**SIZES), d_state=4), OptionError, "either a MambaLMConfig or its fields"),
        (lambda: MambaLM(**SIZES, norm="batch"), OptionError, "norm is 'batch'"),
        (lambda: MambaLM(**SIZES, dropout=1.0), OptionError, "dropout is 1.0"),
        (lambda: MambaLM(**SIZES)(torch.ones(2, 3)), ShapeError, "expected ids"),
        (lambda: MambaLM(**SIZES)(ids(2, 3), ids(2, 4)), ShapeError, r"targets have shape \(2, 4\)"),
        (
            lambda: MambaLM(**SIZES)(ids(2, 3) + 61),
            DataError,
            "tokens hold the id .*, expected ids from 0 to 60; does the",
        ),
        (lambda: MambaLM(**SIZES).generate(-1 - ids(1, 2), 1), DataError, "expected ids from 0 to 60"),
        (lambda: TransformerLM(**SIZES, n_head=3), OptionError, "d_model is 16 and n_head 3"),
        (lambda: H3LM(**SIZES, d_state=5), OptionError, "d_state is 5, expected an even number"),
        (lambda: MambaLM(**SIZES).generate(ids(1, 2), 0), OptionError, "max_new_tokens is 0"),
        (lambda: MambaLM(**SIZES).generate(ids(1, 2), 1, temperature=-1.0), OptionError, "temperature is -1.0"),
    ],
)
def test_wrong_use_is_told(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_importing_the_models_needs_no_safetensors() -> None:
    import subprocess
    import sys

    code = "import sys; sys.modules['safetensors'] = None; import tokendyn.torch.models"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert tt.models.MambaLM is MambaLM
