"""Language models in folders of ``config.json`` and safetensors: our own layout, mamba-ssm's and transformers'."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokendyn.backends.torch._tensor_files import PICKLE_SUFFIXES, read_tensors, refusal, write_tensors
from tokendyn.backends.torch.models._language import LanguageModel
from tokendyn.errors import CheckpointError, OptionError

M = TypeVar("M", bound=LanguageModel[Any])

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Of the transformers' configuration: our field, their key, their default.
_TRANSFORMERS = {
    "vocab_size": ("vocab_size", 50280),
    "d_model": ("hidden_size", 768),
    "n_layer": ("num_hidden_layers", 32),
    "d_state": ("state_size", 16),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "dt_rank": ("time_step_rank", "auto"),
    "conv_bias": ("use_conv_bias", True),
    "bias": ("use_bias", False),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "residual_in_fp32": ("residual_in_fp32", True),
    "tie_embeddings": ("tie_word_embeddings", True),
}
_SSM_OPTIONS = ("d_state", "d_conv", "expand", "dt_rank", "conv_bias", "bias")
# Arguments of mamba-ssm's layer that matter at the start of a training only, or to its kernels.
_SSM_WITHOUT_EFFECT = {"layer", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path"}


def save_own(model: LanguageModel[Any], folder: Any) -> None:
    """Write ``model`` with its whole configuration, from which :func:`load_own` makes it again."""
    config = {"tokendyn_model": type(model).__name__, **dataclasses.asdict(model.config)}
    _write(Path(folder), config, _once(model.state_dict(), model.config.tie_embeddings))


def load_own(kind: type[M], folder: Any) -> M:
    """The model that :func:`save_own` wrote to ``folder``."""
    folder = Path(folder)
    given = _read_config(folder)
    written = given.pop("tokendyn_model", None)
    if written != kind.__name__:
        raise CheckpointError(
            f"{folder} holds {'a ' + written if written else 'another kind of model'}, expected a {kind.__name__}"
        )
    return _fill(kind, folder, given, _read_weights(folder))


def load_mamba(kind: type[M], folder: Any) -> M:
    """A Mamba language model in any of the three layouts."""
    folder = Path(folder)
    given = _read_config(folder)
    if "tokendyn_model" in given:
        return load_own(kind, folder)
    if given.get("model_type") == "mamba":
        options = _from_transformers(folder, given)
    elif "model_type" not in given and "d_model" in given and "n_layer" in given:
        options = _from_mamba_ssm(folder, given)
    else:
        raise CheckpointError(
            f"{folder / 'config.json'} describes a model of type {given.get('model_type', 'unknown')!r}; read are "
            f"those of mamba-ssm's and transformers' Mamba-1 (model_type 'mamba'), and our own"
        )
    weights = {
        name.replace("backbone.embeddings.", "backbone.embedding."): value
        for name, value in _read_weights(folder).items()
    }
    return _fill(kind, folder, options, weights)


def save_mamba(model: LanguageModel[Any], folder: Any, layout: str) -> None:
    """Write a :class:`~tokendyn.torch.models.MambaLM` as mamba-ssm or transformers reads it."""
    config = model.config
    if layout not in ("mamba_ssm", "transformers"):
        raise OptionError(f"save_pretrained: layout is {layout!r}, expected tokendyn, mamba_ssm or transformers")
    unsaid = {
        "norm": config.norm == "none" or (layout == "transformers" and config.norm != "rms"),
        "d_conv": config.d_conv is None,
        "scalar_A": config.scalar_A,
        "dt_rank": config.dt_rank is None,
        "order": config.order is not None,
        "norm_eps": layout == "mamba_ssm" and config.norm_eps != 1e-5,
    }
    if any(unsaid.values()):
        field = next(name for name, is_so in unsaid.items() if is_so)
        raise OptionError(
            f"save_pretrained: {layout} has no model with {field}={getattr(config, field)!r}; save with "
            f"layout='tokendyn'"
        )
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not name.startswith("backbone.layers."):
            weights[name] = value
    for index, block in enumerate(model.backbone.blocks()):
        own = block.state_dict()
        rank = block.mixer.dt_rank
        own.pop("mixer.io_diagonal", None)
        own["mixer.x_proj.weight"] = torch.cat([own["mixer.x_proj.weight"][:rank], *block.mixer.io_matrices()])
        weights.update({f"backbone.layers.{index}.{name}": value for name, value in own.items()})
    if layout == "mamba_ssm":
        described = {
            "d_model": config.d_model,
            "n_layer": config.n_layer,
            "vocab_size": config.vocab_size,
            "ssm_cfg": {"layer": "Mamba1", **{name: getattr(config, name) for name in _SSM_OPTIONS}},
            "rms_norm": config.norm == "rms",
            "residual_in_fp32": config.residual_in_fp32,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": config.pad_vocab_size_multiple,
            "tie_embeddings": config.tie_embeddings,
        }
    else:
        described = {
            "model_type": "mamba",
            "architectures": ["MambaForCausalLM"],
            "hidden_act": "silu",
            **{theirs: getattr(config, ours) for ours, (theirs, _) in _TRANSFORMERS.items()},
            "vocab_size": config.rows,
            "time_step_rank": model.backbone.blocks()[0].mixer.dt_rank,
            "intermediate_size": model.backbone.blocks()[0].mixer.d_inner,
        }
        weights = {
            name.replace("backbone.embedding.", "backbone.embeddings."): value for name, value in weights.items()
        }
    _write(Path(folder), described, _once(weights, config.tie_embeddings))


def _from_transformers(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    if given.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"{folder / 'config.json'}: hidden_act is {given['hidden_act']!r}, expected 'silu'")
    return {ours: given.get(theirs, default) for ours, (theirs, default) in _TRANSFORMERS.items()}


def _from_mamba_ssm(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    ssm = given.get("ssm_cfg") or {}
    unknown = sorted(set(ssm) - set(_SSM_OPTIONS) - _SSM_WITHOUT_EFFECT)
    if ssm.get("layer", "Mamba1") != "Mamba1" or unknown:
        raise CheckpointError(
            f"{folder / 'config.json'}: ssm_cfg is {ssm!r}; only Mamba-1 is read, with the options "
            f"{', '.join(_SSM_OPTIONS)}"
        )
    if given.get("attn_layer_idx") or given.get("d_intermediate"):
        raise CheckpointError(f"{folder / 'config.json'} has attention layers or MLPs, which MambaLM has not")
    return {
        "vocab_size": given["vocab_size"],
        "d_model": given["d_model"],
        "n_layer": given["n_layer"],
        "norm": "rms" if given.get("rms_norm", True) else "layer",
        "residual_in_fp32": given.get("residual_in_fp32", True),
        "pad_vocab_size_multiple": given.get("pad_vocab_size_multiple", 8),
        "tie_embeddings": given.get("tie_embeddings", True),
        **{name: ssm[name] for name in _SSM_OPTIONS if name in ssm},
    }


def _fill(kind: type[M], folder: Path, options: dict[str, Any], weights: dict[str, Tensor]) -> M:
    try:
        model = kind(**options)
    except (TypeError, ValueError) as cause:
        raise CheckpointError(f"{folder / 'config.json'} describes no {kind.__name__} ({cause})") from cause
    if options.get("tie_embeddings", True) and "backbone.embedding.weight" in weights:
        weights.setdefault("lm_head.weight", weights["backbone.embedding.weight"])
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is not of this model" for name in weights if name not in expected]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"the weights in {folder} do not fit config.json: {'; '.join(problems[:3])}{more}")
    model.to(weights["backbone.embedding.weight"].dtype)
    for name, parameter in model.named_parameters():  # in the dtype of the file each: some are kept in float32
        parameter.data = weights[name].clone()  # the tensors read are pages of the file
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError as cause:
        if not folder.exists():
            raise CheckpointError(
                f"there is no folder {folder}, and nothing is fetched from a hub; give the folder of a saved model, as "
                f"made by: hf download NAME --local-dir FOLDER"
            ) from cause
        raise CheckpointError(f"{folder} holds no config.json; give the folder of a saved model") from cause
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"{file} cannot be read ({cause}); get it again") from cause
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds no JSON object; get it again")
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).is_file():
        return read_tensors(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        try:
            shards = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as cause:
            raise CheckpointError(f"{folder / INDEX} cannot be read ({cause!r}); get it again") from cause
        tensors: dict[str, Tensor] = {}
        for shard in shards:
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise CheckpointError(f"{folder / INDEX} names {shard}, which is not in the folder; get it too")
            tensors.update(read_tensors(folder / shard))
        return tensors
    for stranger in sorted(folder.iterdir()):
        if stranger.suffix.lower() in PICKLE_SUFFIXES:
            raise CheckpointError(refusal(stranger))
    raise CheckpointError(f"{folder} holds no {WEIGHTS}; give the folder of a saved model")


def _write(folder: Path, config: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, weights, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _once(weights: Mapping[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """``weights`` without the head where it is the embedding."""
    return {name: value for name, value in weights.items() if not (tied and name == "lm_head.weight")}
