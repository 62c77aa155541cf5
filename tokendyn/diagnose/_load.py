"""Models from a folder or a hub: safetensors only, no code from the model's side is ever run."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendyn import _checks as check
from tokendyn import _operations as ops
from tokendyn.backends.torch._tensor_files import PICKLE_SUFFIXES, read_tensors, refusal, write_tensors
from tokendyn.diagnose._words import printable
from tokendyn.errors import BackendMissing, CheckpointError, DataError, DTypeError, OptionError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
#: Of a layer in a folder of projections: entry -> (its shape, whether it must be there).
ENTRIES = {
    "S_B": ("N d", True),
    "S_C": ("N d", True),
    "S_delta": ("d d", False),
    "W_dt": ("d R", False),
    "W_r": ("R d", False),
    "A": ("d N", True),
    "B_bias": ("N", False),
    "C_bias": ("N", False),
    "delta_bias": ("d", False),
    "D": ("d", False),
    "x": ("b L d", False),
}


def load(path: str | Path, *, dtype: torch.dtype | None = None) -> tuple[nn.Module, Any]:
    """The model in a folder, a safetensors file or a hub repository, and inputs that come with it (or None).

    A folder with ``config.json`` holds a language model of ours, of mamba-ssm or of transformers (and what
    :meth:`Refinement.save` put beside it is put on again); one without holds projections (:func:`load_projections`). Of
    a hub name such as ``state-spaces/mamba-130m-hf`` the safetensors and their configuration are fetched, where the
    network allows it or they were before, and read as such a folder.

    Args:
        path: folder, file, or ``owner/name``.
        dtype: of the weights; that of the files unless given.

    Raises:
        CheckpointError: files are missing, cut short, pickles, or do not fit their configuration.
        DataError: there is neither such a path nor a hub name.
        BackendMissing: transformers or huggingface_hub is needed and not installed.
    """
    place = Path(path)
    if not place.exists() and _HUB_NAME.fullmatch(str(path)):
        from tokendyn.diagnose._hub import fetch

        place = fetch(str(path))
    if place.is_dir() or place.is_file():
        if place.is_dir() and (place / "config.json").exists():
            model = _language_model(place, dtype)
            if (place / "refinement.json").exists():
                from tokendyn.diagnose._refine import refine

                refine(model, saved=place)
            return model, None
        return load_projections(place, dtype=dtype)
    raise DataError(f"diagnose: there is no folder {place}; give the folder of a saved model or a hub name owner/name")


def _language_model(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    from tokendyn.backends.torch.models import MambaLM

    file = folder / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"{file} cannot be read ({cause}); get it again") from cause
    if isinstance(config, dict) and "experiment" in config:
        models = ", ".join(str(place) for place in sorted(folder.glob("models/*")))
        raise CheckpointError(
            f"{folder} is a run of the experiment {config['experiment']}; "
            + (f"give one of its models: {models}" if models else "it holds no saved model (models/ARM) to diagnose")
        )
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind in (None, "mamba"):
        return MambaLM.from_pretrained(folder, dtype=dtype)
    for stranger in sorted(folder.iterdir()):
        if stranger.suffix.lower() in PICKLE_SUFFIXES and not list(folder.glob("*.safetensors")):
            raise CheckpointError(refusal(stranger))
    for weights in sorted(folder.glob("*.safetensors")):
        read_tensors(weights)  # a file that was cut short is said to be so, before transformers is asked
    return _from_transformers(folder, dtype)


def _from_transformers(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    if importlib.util.find_spec("transformers") is None:
        raise BackendMissing(f"diagnose: {folder} is read by transformers; run: pip install 'tokendyn[diagnose]'")
    from transformers import AutoModelForCausalLM  # type: ignore[import-not-found]

    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except Exception as cause:
        said = str(cause).strip().splitlines() or [type(cause).__name__]
        raise CheckpointError(f"diagnose: transformers cannot read {folder}: {printable(said[0], 300)}") from cause
    model, report = loaded
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise CheckpointError(
            f"diagnose: the weights in {folder} do not fit config.json: {len(missing)} missing, first {missing[0]}"
        )
    return model.eval()


class ProjectedS6(nn.Module):
    """A selective layer given by its projections alone: Δ = softplus(S_Δ x + bias), B = S_B x + bias, C likewise."""

    def __init__(self, entries: Mapping[str, Tensor]) -> None:
        super().__init__()
        for entry, value in entries.items():
            self.register_buffer(entry, value)

    def io_matrices(self) -> tuple[Tensor, Tensor]:
        """S_B and S_C."""
        return self._entry("S_B"), self._entry("S_C")

    def s_delta(self) -> tuple[Tensor, ...]:
        """The factors of S_Δ."""
        if "S_delta" in self._buffers:
            return (self._entry("S_delta"),)
        return self._entry("W_dt"), self._entry("W_r")

    @property
    def biased(self) -> bool:
        """Whether B or C have a bias, which no spectrum shows."""
        return "B_bias" in self._buffers or "C_bias" in self._buffers

    def _entry(self, name: str) -> Tensor:
        return self.get_buffer(name)

    def forward(self, x: Tensor) -> Tensor:
        """(b, L, d) → (b, L, d): the scan of x, with the skip."""
        e = dict(self._buffers)
        delta = x
        for factor in reversed(self.s_delta()):
            delta = F.linear(delta, factor)
        B, C = F.linear(x, self._entry("S_B"), e.get("B_bias")), F.linear(x, self._entry("S_C"), e.get("C_bias"))
        return ops.selective_scan(
            x.mT,
            delta.mT,
            self._entry("A"),
            B.mT,
            C.mT,
            e.get("D"),
            delta_bias=e.get("delta_bias"),
            delta_softplus=True,
        ).mT


class ProjectedLayers(nn.Module):
    """Selective layers side by side, each on its own tokens: what is known of a model whose rest is not."""

    def __init__(self, layers: Mapping[str, ProjectedS6]) -> None:
        super().__init__()
        self.names = tuple(layers)
        for name, layer in layers.items():
            # A name is only a key here: whatever it holds, it never becomes an attribute of the module.
            self._modules[name] = layer

    def layer(self, name: str) -> ProjectedS6:
        """The layer of that name."""
        found = self._modules[name]
        assert isinstance(found, ProjectedS6)
        return found

    def forward(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tokens (b, L, d) of every layer by its name; the outputs likewise."""
        return {name: self.layer(name)(tokens[name]) for name in self.names if name in tokens}


def load_projections(path: str | Path, *, dtype: torch.dtype | None = None) -> tuple[ProjectedLayers, dict[str, Any]]:
    """Selective layers from safetensors that hold ``LAYER.S_B``, ``LAYER.S_C``, ... and inputs for them.

    ===================  =========  =================================================
    entry                shape      meaning
    ===================  =========  =================================================
    ``S_B``, ``S_C``     (N, d)     the projections of B and C
    ``S_delta``          (d, d)     S_Δ; or ``W_dt`` (d, R) and ``W_r`` (R, d), S_Δ = W_dt W_r
    ``A``                (d, N)     decay rates, negative
    ``B_bias, C_bias``   (N,)       optional
    ``delta_bias``       (d,)       optional
    ``D``                (d,)       optional skip
    ``x``                (b, L, d)  optional: tokens recorded before the scan
    ===================  =========  =================================================

    Args:
        path: a folder with one or more ``.safetensors``, or one such file.
        dtype: of the computation; the widest of a layer's own entries unless given.

    Returns:
        the layers, and ``{"tokens": {layer: x}}``; without recorded tokens normal ones (2 sequences of 128, seed 0).

    Raises:
        CheckpointError: no such entries, a pickle, a file cut short.
        ShapeError: shapes that contradict each other; DTypeError: entries that are no floating numbers.
    """
    place = Path(path)
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    if not files:
        for stranger in sorted(place.iterdir()):
            if stranger.suffix.lower() in PICKLE_SUFFIXES:
                raise CheckpointError(refusal(stranger))
        raise CheckpointError(f"{place} holds neither config.json nor safetensors; give the folder of a saved model")
    layers: dict[str, dict[str, Tensor]] = {}
    for file in files:
        for key, value in read_tensors(file).items():
            layer, _, entry = key.rpartition(".")
            if entry in ENTRIES:
                layers.setdefault(layer or file.stem, {})[entry] = value
    if not layers:
        raise CheckpointError(
            f"{place} holds no selective (S6) layer, expected entries LAYER.S_B, LAYER.S_C, LAYER.S_delta, LAYER.A"
        )
    modules, tokens = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, entries in layers.items():
        _check_layer(name, entries)
        kept = dtype or reduce(torch.promote_types, (value.dtype for value in entries.values()))
        entries = {entry: value.to(kept) for entry, value in entries.items()}
        x = entries.pop("x", None)
        if x is None:
            A = entries["A"]
            x = torch.randn(2, 128, A.shape[0], generator=generator, dtype=A.dtype)
        modules[name], tokens[name] = ProjectedS6(entries), x
    return ProjectedLayers(modules), {"tokens": tokens}


def _check_layer(name: str, entries: Mapping[str, Tensor]) -> None:
    wanted = [entry for entry, (_, needed) in ENTRIES.items() if needed and entry not in entries]
    if "S_delta" not in entries and not {"W_dt", "W_r"} <= entries.keys():
        wanted.append("S_delta (or W_dt and W_r)")
    if wanted:
        raise CheckpointError(f"the layer {name!r} lacks {', '.join(wanted)}")
    shapes = check.Shapes(f"the layer {name!r}")
    for entry, value in entries.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise DTypeError(f"the layer {name!r}: {entry} is {kind}, expected a tensor of floating numbers")
        shapes.expect(entry, value, ENTRIES[entry][0])


def save_projections(folder: str | Path, layers: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write layers as :func:`load_projections` reads them.

    Args:
        folder: made if it is not there; ``layers.safetensors`` is written into it.
        layers: ``{layer: {"S_B": ..., "A": ..., "x": ...}}``, with shapes as :func:`load_projections` has them.

    Returns:
        The folder.

    Raises:
        OptionError: an entry of another name; CheckpointError: one that is missing; ShapeError, DTypeError.
    """
    path = Path(folder)
    for name, entries in layers.items():
        unknown = sorted(set(entries) - set(ENTRIES))
        if unknown:
            raise OptionError(f"save_projections: {name} has {unknown}, expected some of {', '.join(ENTRIES)}")
        _check_layer(name, entries)
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(
        path / "layers.safetensors", {f"{n}.{e}": value for n, layer in layers.items() for e, value in layer.items()}
    )
    return path
