"""Refinements of an existing model: the nearest spectrum of a regime, or an order of the tokens; both can be undone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokendyn import _checks as check
from tokendyn._layers import OrderConfig
from tokendyn.backends.torch._tensor_files import read_tensors, write_tensors
from tokendyn.diagnose._adapters import find_sites
from tokendyn.diagnose._inputs import model_arguments, run_model
from tokendyn.diagnose._refine._order import reorder
from tokendyn.diagnose._refine._spectrum import REGIMES, constrain
from tokendyn.errors import CheckpointError, OptionError

_SAID, _TENSORS = "refinement.json", "refinement.safetensors"


@dataclass
class Refinement:
    """What :func:`refine` did, and the way back.

    Attributes:
        layers: names of the layers changed.
        asked: the refinement: ``{"io_regime": ...}`` or ``{"order": {...}}``.
        matrix_change: by layer ‖M' - M‖_F / ‖M‖_F, the change of the input-output matrix.
        function_change: relative change ‖f'(x) - f(x)‖ / ‖f(x)‖ of the model's output on the inputs given, or None.
        notes: what to know before using the model.
    """

    layers: tuple[str, ...]
    asked: dict[str, Any] = field(default_factory=dict)
    matrix_change: dict[str, float] = field(default_factory=dict)
    function_change: float | None = None
    notes: tuple[str, ...] = ()
    _model: nn.Module | None = field(default=None, repr=False)
    _held: dict[str, nn.Module] = field(default_factory=dict, repr=False)  # modules that it put into the model, by name
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)
    _bake: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put everything back: weights bit for bit, hooks and parameters of orders removed."""
        for step in reversed(self._undo):
            step()
        self._forget()

    def bake(self) -> None:
        """Write the refined projections out as ordinary weights, so that the model saves in its own format.

        Training then no longer keeps the regime; refining the saved model again changes its function by nothing but
        rounding, and keeps the regime from there on.

        Raises:
            OptionError: the refinement is an order, which no weight of the model can hold; see :meth:`save`.
        """
        if "order" in self.asked:
            raise OptionError("bake: an order is no weight of the model; keep it with save(folder)")
        for step in self._bake:
            step()
        self._forget()

    def save(self, folder: str | Path) -> Path:
        """Save the model by its own ``save_pretrained``, and what the refinement added beside it; the folder.

        The model's files are of its own format, with a regime written out as ordinary projections and without the
        parameters of an order: anything that reads the format reads them. ``refinement.json`` and
        ``refinement.safetensors`` hold the rest; ``refine(model, saved=folder)`` puts it back on, bit for bit, and so
        does :func:`tokendyn.diagnose.load`. The model at hand stays refined, its parameters the same objects.

        Raises:
            OptionError: the model has no ``save_pretrained``, or the refinement was undone or baked.
        """
        model = self._model
        if model is None:
            raise OptionError("save: this refinement was undone or baked; save the model itself")
        write = getattr(model, "save_pretrained", None)
        if write is None:
            raise OptionError(f"save: {type(model).__name__} has no save_pretrained; bake() and save it your own way")
        handle = model.register_state_dict_post_hook(lambda _model, state, *_: self._plainly(state))
        try:
            write(folder)
        finally:
            handle.remove()
        path = Path(folder)
        tensors = {f"{name}.{key}": t for name, held in self._held.items() for key, t in held.state_dict().items()}
        write_tensors(path / _TENSORS, tensors)
        (path / _SAID).write_text(json.dumps({**self.asked, "layers": list(self.layers)}, indent=1) + "\n")
        return path

    def _plainly(self, state: dict[str, Any]) -> None:
        """Of the state dict: what the refinement put in taken out, the weights that it makes put in."""
        for name, held in self._held.items():
            for key in held.state_dict():
                state.pop(f"{name}.{key}", None)
            owner, parametrised, _ = name.rpartition(".parametrizations")
            if parametrised and self._model is not None:
                weight = self._model.get_submodule(owner).weight
                assert isinstance(weight, Tensor)
                state[f"{owner}.weight"] = weight.detach()

    def _forget(self) -> None:
        self._model = None
        for kept in (self._undo, self._bake, self._held):
            kept.clear()


def refine(
    model: nn.Module,
    *,
    io_regime: str | None = None,
    order: OrderConfig | str | None = None,
    saved: str | Path | None = None,
    inputs: Any = None,
) -> Refinement:
    """Turn the projections of a trained model into a spectrum regime, or let its layers reorder their tokens. In place.

    ``io_regime="positive"``: every layer's input-output matrix M = S_Cᵀ S_B is replaced by the nearest one (Frobenius
    norm) that is symmetric positive semidefinite of rank N: the N largest positive eigenvalues of (M + Mᵀ)/2 with their
    eigenvectors, written as ``S_C = Lᵀ``, ``S_B = diag(q) Lᵀ`` with L unit lower triangular and q > 0, as in paper 1's
    App. C.1. ``"negative"`` likewise. ``"mixed"``: the nearest symmetric one with ⌈N/2⌉ positive and ⌊N/2⌋ negative
    eigenvalues, the largest of each sign, written as two such triangles side by side, one a sign. (The paper has one
    triangle for both signs; not every matrix of a mixed spectrum has that form, and the nearest one need not. By
    Sylvester's law the two together hold the spectrum as well.)

    L and q are then what is trained, through a parametrisation of ``x_proj.weight``, so training keeps the regime. A
    free model has N eigenvalues of each sign, so half of its spectrum is given up: the change of the function is
    reported, and fine-tuning is meant to follow.

    Where RMS norms follow B and C (Falcon-Mamba, Jamba), ⟨C_l, B_j⟩ is x_lᵀ S_Cᵀ diag(g) S_B x_j over positive
    numbers, g the product of their gains. A regime of that matrix is put on: every sign that theory asks of x_lᵀ M x_l
    then holds at the scan, while sizes are the norms' to choose; and it holds as long as training keeps the gains
    positive. ``notes`` says so.

    Args:
        model: with layers as :func:`tokendyn.diagnose` finds them.
        io_regime: ``"positive"``, ``"negative"`` or ``"mixed"``.
        order: as of :class:`tokendyn.torch.Mamba`. tokendyn's own layers order inside the mixer; others are wrapped by
            hooks that order before it by the score ⟨K, x⟩ and restore after it, K being a new parameter
            ``token_order.K`` of the mixer.
        saved: a folder of :meth:`Refinement.save`, to put on what it holds.
        inputs: as of :func:`tokendyn.diagnose`, to measure the change of the function on.

    Returns:
        :class:`Refinement`, with ``undo()``, ``bake()`` and ``save(folder)``.

    Raises:
        OptionError: none or several of ``io_regime``, ``order`` and ``saved`` are given, there is no layer, or an
            option is unknown.
        RegimeError: a layer has N > d, a norm of B or C that is no RMS norm or has gains that are not positive, or its
            spectrum is held by a parametrisation of its own.
        CheckpointError: the folder holds no refinement, or one of another model.

    Cost:
        O(N² d) a layer.

    Source:
        Paper 1, App. C.1 and Eq. (14); Higham (1988) for the nearest semidefinite matrix.
    """
    if sum(asked is not None for asked in (io_regime, order, saved)) != 1:
        raise OptionError("refine: expected one of io_regime, order and saved")
    tensors: dict[str, Tensor] = {}
    if saved is not None:
        io_regime, order, tensors = _read(Path(saved))
    if io_regime is not None:
        check.expect_choice("refine", "io_regime", io_regime, REGIMES)
    config = OrderConfig.of(order)
    sites = find_sites(model)
    if not sites:
        raise OptionError(f"refine: no selective (S6) layer found in {type(model).__name__}")
    before = None if inputs is None else _outputs(model, inputs)
    asked = {"io_regime": io_regime} if config is None else {"order": dataclasses.asdict(config)}
    done = Refinement(tuple(site.name for site in sites), asked, _model=model)
    paths = {module: f"{name}." if name else "" for name, module in model.named_modules()}
    normed = False
    try:
        for site in sites:
            path = paths[site.module]
            if config is not None:
                entry, held, remove = reorder(site.name, site.module, config)
                done._held[path + entry] = held
                done._undo.append(remove)
            else:
                assert io_regime is not None
                change, put_back, write_out, has_norms = constrain(site.name, site.module, io_regime)
                done._undo.append(put_back)
                done._bake.append(write_out)
                done.matrix_change[site.name] = change
                done._held[f"{site.name}.x_proj.parametrizations"] = site.module.get_submodule(
                    "x_proj.parametrizations"
                )
                normed = normed or has_norms
        if saved is not None:
            _fill(done, tensors, Path(saved))
    except Exception:
        done.undo()
        raise
    if config is not None:
        done.notes = ("a model that orders its tokens is not causal: outputs depend on later tokens",)
    elif normed:
        done.notes = (
            "norms follow B and C: the regime is one of signs, sizes are the norms' own, and it holds while the gains "
            "of these norms stay positive",
        )
    if before is not None:
        after = _outputs(model, inputs)
        done.function_change = float((after - before).norm() / before.norm().clamp_min(1e-300))
    return done


def _read(folder: Path) -> tuple[str | None, OrderConfig | None, dict[str, Tensor]]:
    """What a folder of :meth:`Refinement.save` asks for, and its tensors."""
    try:
        said = json.loads((folder / _SAID).read_bytes())
        order = None if said.get("order") is None else OrderConfig(**said["order"])
    except FileNotFoundError as cause:
        raise CheckpointError(f"refine: {folder} holds no {_SAID}; give a folder of Refinement.save") from cause
    except (OSError, TypeError, ValueError, AttributeError) as cause:
        raise CheckpointError(
            f"refine: {folder / _SAID} cannot be read ({cause}); save the refinement again"
        ) from cause
    return said.get("io_regime"), order, read_tensors(folder / _TENSORS)


def _fill(done: Refinement, tensors: dict[str, Tensor], folder: Path) -> None:
    wanted = {f"{name}.{key}" for name, held in done._held.items() for key in held.state_dict()}
    if wanted != tensors.keys():
        other = sorted(wanted ^ tensors.keys())[0]
        raise CheckpointError(f"refine: the refinement in {folder} is of another model: {other} is in one of them only")
    for name, held in done._held.items():
        own = {key: tensors[f"{name}.{key}"] for key in held.state_dict()}
        try:
            held.load_state_dict(own)
        except RuntimeError as cause:
            said = str(cause).splitlines()[-1].strip()
            raise CheckpointError(f"refine: the refinement in {folder} is of another model: {name}: {said}") from cause


def _outputs(model: nn.Module, inputs: Any) -> Tensor:
    out = run_model(model, *model_arguments(inputs))
    for candidate in (out, getattr(out, "logits", None), getattr(out, "last_hidden_state", None)):
        if isinstance(candidate, Tensor):
            return candidate.detach().double()
    if isinstance(out, dict):
        return torch.cat([value.flatten().double() for value in out.values() if isinstance(value, Tensor)])
    raise OptionError(f"refine: the model returns {type(out).__name__}, expected a tensor, logits or a hidden state")
