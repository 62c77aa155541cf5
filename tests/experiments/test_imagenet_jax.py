"""The JAX training's parts against the torch trainer's: optimiser, schedule, input; and mistakes in its command."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import tokendyn.jax as tj
import tokendyn.torch as tt
from tokendyn.errors import OptionError
from tokendyn.experiments._config import TrainConfig
from tokendyn.experiments._optim import learning_rate, make_optimizer
from tokendyn.experiments.imagenet import _jax as study
from tokendyn.experiments.imagenet import _task
from tokendyn.experiments.imagenet import jax as jax_command

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_updates_are_those_of_the_torch_trainer() -> None:
    """Clipping, warm-up and decay, and which parameters decay: four updates with gradients given."""
    config = TrainConfig(learning_rate=0.1, weight_decay=0.3, clip_norm=1.0, warmup=0.5)
    mine, theirs = tt.Mamba(4, 2), tj.Mamba(4, 2, rngs=nnx.Rngs(0))
    tj.load_state_dict(theirs, mine.state_dict())
    torch_optimizer = make_optimizer(mine, config)
    optimizer = study.make_optimizer(config, 4)
    params = nnx.state(theirs, nnx.Param)
    state = optimizer.init(params)

    @jax.jit
    def updated(params: nnx.State, state: optax.OptState, gradients: nnx.State) -> tuple[nnx.State, optax.OptState]:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(0)
    for step in range(4):
        gradients = {name: rng.normal(size=p.shape).astype(np.float32) for name, p in mine.named_parameters()}
        for name, parameter in mine.named_parameters():
            parameter.grad = torch.from_numpy(gradients[name].copy())
        torch.nn.utils.clip_grad_norm_(mine.parameters(), config.clip_norm)
        for group in torch_optimizer.param_groups:
            group["lr"] = learning_rate(step, 4, config)
        torch_optimizer.step()
        flat = nnx.to_flat_state(params)
        given = nnx.from_flat_state([(p, v.replace(jnp.asarray(gradients[".".join(p)]))) for p, v in flat])
        params, state = updated(params, state, given)
    nnx.update(theirs, params)
    for name, value in tj.state_dict(theirs).items():
        np.testing.assert_allclose(value, mine.state_dict()[name].numpy(), rtol=2e-5, atol=2e-6, err_msg=name)


def test_images_are_scaled_as_for_torch() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    wanted = _task.to_input(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(study.to_input(jnp.asarray(pixels)), wanted, atol=1e-6)


def test_evaluation_batches_have_one_size() -> None:
    count = _task.EVALUATION_BATCH + 3
    pixels = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1)

    class Images(SimpleNamespace):
        def __len__(self) -> int:
            return count

    images = Images(labels=np.arange(count), read=lambda indices: (pixels[indices], {}))
    found = list(study.batches(images))  # type: ignore[arg-type]
    assert [len(p) for p, _ in found] == [_task.EVALUATION_BATCH] * 2
    assert np.concatenate([labels for _, labels in found]).tolist() == list(range(count))
    assert set(found[1][0][3:].ravel()) == {pixels[-1, 0, 0, 0]}


def test_mistakes_are_told() -> None:
    with pytest.raises(OptionError, match="--devices is 99, expected 1 to"):
        study.command(["--devices", "99"])
    with pytest.raises(OptionError, match="a schedule of tau is not for JAX"):
        study.command(["--arms", "baseline", "annealed"])  # before the baseline is trained
    with pytest.raises(OptionError, match="did you mean 'sorted'"):
        study.command(["--arms", "baseline", "srted"])


def test_a_missing_jax_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    assert jax_command.main(["--help"]) == 2
    assert capsys.readouterr().err == "error: not installed: jax; run: pip install 'tokendyn[experiments,jax]'\n"
