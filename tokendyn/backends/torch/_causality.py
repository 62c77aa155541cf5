"""Does a model read the future? Measured, not assumed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokendyn import _checks as check
from tokendyn._causality import (
    Causality,
    Leak,
    declares_causal,
    expect_declared_causal,
    expect_no_leak,
    perturbed_places,
)
from tokendyn._dispatch import describe
from tokendyn.backends.torch.ops._scan_plain import sequence_starts
from tokendyn.errors import DTypeError, NonFiniteError, OptionError, ShapeError


def causality(
    model: nn.Module,
    length: int,
    *,
    tokens: Tensor | None = None,
    perturbed: Iterable[int] | None = None,
    seq_idx: Tensor | None = None,
    modes: Sequence[Literal["train", "eval"]] = ("train", "eval"),
    seed: int = 0,
) -> Causality:
    """Perturb one token after another, and see which outputs change::

        token t changes        =>  y_l the same to the last bit   for every l < t
        d y_l / d x_t          =   0 exactly                      for every l < t

    on a copy of the model in float64. With ``seq_idx`` also for every l in another packed sequence, later ones too.
    Every random state is set back between calls, so dropout draws the same masks.

    Args:
        model: token ids (b, L) → (b, L, ...), or features (b, L, D) → (b, L, ...), called as ``model(tokens)``, or
            ``model(tokens, seq_idx=seq_idx)`` where that is given.
        length: L, tokens in the sequence; take more than one chunk of what the model computes in chunks.
        tokens: (b, L) integers or (b, L, D) floats to start from. By default ids drawn for the model's first
            ``nn.Embedding``.
        perturbed: places to perturb. By default all up to 160 tokens; in longer sequences the first, the last, and
            those at, before and after every multiple of 16.
        seq_idx: (b, L) integers, optional: packed sequences, the same places in every row.
        modes: of the model.
        seed: of the ids, the perturbations and the model's own randomness.

    Returns:
        The leaks found.

    Raises:
        DTypeError: the model is no PyTorch module.
        OptionError: no output changed with any token, so there is nothing to check; or no embedding was found.
        NonFiniteError: the model's output is NaN or infinite.
        ShapeError: the output has not one entry for each token.

    Cost:
        One forward and one backward pass for each token perturbed and mode, and a copy of the model in float64.
    """
    if not isinstance(model, nn.Module):
        raise DTypeError(f"causality: model is {describe(model)}, expected a torch.nn.Module")
    check.expect_size("causality", "length", length)
    for mode in modes:
        check.expect_choice("causality", "modes", mode, ("train", "eval"))
    declared = declares_causal(model)
    model = copy.deepcopy(model).double()
    draw = torch.Generator().manual_seed(seed)
    tokens = _start(model, length, tokens, draw)
    places = perturbed_places(length, perturbed)
    changes = {t: _changed(model, tokens, t, draw) for t in places}
    hidden = {t: _hidden(length, t, seq_idx) for t in places}

    leaks: list[Leak] = []
    comparisons, responds = 0, False
    for mode in modes:
        model.train(mode == "train")
        run = _Run(model, seq_idx, seed)
        before = run.outputs(tokens)
        for t in places:
            after = run.outputs(changes[t])
            difference = (after - before).abs().transpose(0, 1).flatten(1).amax(1)  # (L,)
            responds = responds or bool(difference.any())
            seen = torch.where(hidden[t], difference.cpu(), 0.0)
            if seen.any():
                leaks.append(Leak(mode, "value", t, int(seen.nonzero()[0]), float(seen.max())))
        if not responds:
            raise OptionError("causality: no output changed with any token; give a model that responds to its tokens")
        derivatives = run.derivatives(tokens, places, hidden, draw)
        leaks += [Leak(mode, "gradient", t, None, size) for t, size in derivatives.items() if size]
        comparisons += len(places) + len(derivatives)
    return Causality(tuple(leaks), length, tuple(places), comparisons, declared)


def expect_causal(model: nn.Module, length: int, **options: Any) -> Causality:
    """:func:`causality`, which must find no leak.

    Args:
        model, length, options: see :func:`causality`.

    Returns:
        What :func:`causality` found.

    Raises:
        CausalityError: the model declares ``causal = False``, or a leak was found.
        DTypeError, OptionError, NonFiniteError, ShapeError: see :func:`causality`.

    Cost:
        As :func:`causality`.
    """
    expect_declared_causal(model)
    found = causality(model, length, **options)
    expect_no_leak(model, found)
    return found


class _Run:
    """Calls of one model, each from the same random state."""

    def __init__(self, model: nn.Module, seq_idx: Tensor | None, seed: int) -> None:
        self.model, self.seed = model, seed
        self.options = {} if seq_idx is None else {"seq_idx": seq_idx}

    def call(self, tokens: Tensor) -> Tensor:
        devices = [tokens.device] if tokens.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            y = self.model(tokens, **self.options)
        if y.ndim < 2 or y.shape[:2] != tokens.shape[:2]:
            raise ShapeError(
                f"causality: the model's output has shape {tuple(y.shape)} for tokens {tuple(tokens.shape)}, expected "
                f"(b, L, ...) with the same b and L"
            )
        return y

    @torch.no_grad()
    def outputs(self, tokens: Tensor) -> Tensor:
        y = self.call(tokens)
        if not torch.isfinite(y).all():
            raise NonFiniteError("causality: the model's output is NaN or infinite; there is nothing to compare")
        return y

    def derivatives(
        self, tokens: Tensor, places: list[int], hidden: dict[int, Tensor], draw: torch.Generator
    ) -> dict[int, float]:
        """For each place t the largest derivative by token t of the outputs that must not see it.

        One backward pass a place: a random weighting of all outputs that must not see t, so a derivative of exactly 0
        means that none does.
        """
        features: list[Tensor] = []
        if tokens.is_floating_point():
            features.append(tokens.clone().requires_grad_())
            y = self.call(features[0])
        else:

            def keep(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
                features.append(out)

            with _embedding(self.model).register_forward_hook(keep):
                y = self.call(tokens)
        weights = torch.randn(y.shape, generator=draw, dtype=y.dtype).to(y.device)
        found = {}
        for t in places:
            if not hidden[t].any():
                continue
            mask = hidden[t].to(y).reshape(1, -1, *(1,) * (y.ndim - 2))
            gradients = torch.autograd.grad((y * weights * mask).sum(), features, retain_graph=True, allow_unused=True)
            found[t] = max((float(g[:, t].abs().max()) for g in gradients if g is not None), default=0.0)
        return found


def _hidden(length: int, t: int, seq_idx: Tensor | None) -> Tensor:
    """(L,) the outputs that must not see token t."""
    earlier = torch.arange(length) < t
    if seq_idx is None:
        return earlier
    row = seq_idx[0].cpu()
    if seq_idx.shape[-1] != length or not (seq_idx.cpu() == row).all():
        raise ShapeError(f"causality: seq_idx has shape {tuple(seq_idx.shape)}, expected equal rows of length {length}")
    sequence = sequence_starts(row[None])[0].cumsum(0)
    return earlier | (sequence != sequence[t])


def _start(model: nn.Module, length: int, tokens: Tensor | None, draw: torch.Generator) -> Tensor:
    if tokens is None:
        embedding = _embedding(model)
        device = embedding.weight.device
        return torch.randint(_ids(model), (2, length), generator=draw).to(device)
    if tokens.ndim not in (2, 3) or tokens.shape[1] != length or tokens.is_floating_point() != (tokens.ndim == 3):
        raise ShapeError(
            f"causality: tokens have shape {tuple(tokens.shape)} and dtype {tokens.dtype}, expected integers (b, L) or "
            f"floats (b, L, D) with L = {length}"
        )
    return tokens.double() if tokens.is_floating_point() else tokens


def _changed(model: nn.Module, tokens: Tensor, t: int, draw: torch.Generator) -> Tensor:
    """``tokens`` with another token at place t in every row."""
    changed = tokens.clone()
    if tokens.is_floating_point():
        changed[:, t] += torch.randn(tokens[:, t].shape, generator=draw, dtype=tokens.dtype).to(tokens.device)
    else:
        ids = _ids(model)
        shift = torch.randint(1, ids, tokens[:, t].shape, generator=draw).to(tokens.device)
        changed[:, t] = (tokens[:, t] + shift) % ids
    return changed


def _ids(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    ids = size if isinstance(size, int) else _embedding(model).num_embeddings
    if ids < 2:
        raise OptionError(f"causality: the model knows {ids} token, expected at least 2")
    return ids


def _embedding(model: nn.Module) -> nn.Embedding:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module
    raise OptionError("causality: the model has no nn.Embedding; give tokens, floats (b, L, D)")
