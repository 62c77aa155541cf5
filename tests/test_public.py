"""The public names, frozen: to add or remove one is a decision, and this file is where it shows."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from typing import Any

import pytest

import tokendyn
from tokendyn._operations import OPERATIONS

OPERATION_NAMES = [
    "attention_flow",
    "autoregressive_flow",
    "effective_tokens",
    "flow_rhs",
    "hard_order",
    "hidden_attention",
    "importance_score",
    "io_projections",
    "io_spectrum",
    "put_tokens",
    "selective_scan",
    "selective_state_update",
    "softsort",
    "softsort_matrix",
    "softsort_restore",
    "sphere_flow",
    "take_tokens",
]

MODELS = [
    "H3LM",
    "H3LMConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "MambaClassifier",
    "TransformerLM",
    "TransformerLMConfig",
    "MambaLM",
    "MambaLMConfig",
    "mamba_lm_130m",
    "MambaVision",
    "MambaVisionMixer",
    "mambavision_16px",
    "mambavision_32px",
    "mambavision_64px",
    "mambavision_t",
]

PUBLIC: dict[str, list[str]] = {
    "tokendyn": [
        *OPERATION_NAMES,
        *("IOSpectrum", "Order", "OrderConfig", "token_order", "random_inputs", "backend", "use", "citation"),
        *("Mamba", "MambaLM", "MambaVision", "S6", "TokenReorder", "mamba_lm_130m", "mambavision_t"),
        *("CausalAttention", "H3", "H3LM", "TransformerLM"),
        *("Regime", "SphereRegime", "Trajectory", "classify", "classify_sphere", "simulate", "simulate_sphere"),
        *("core", "causality", "diagnose", "errors", "expect_causal", "jax", "refine", "torch", "__version__"),
    ],
    "tokendyn.torch": [
        *OPERATION_NAMES,
        *("token_order", "models", "OrderConfig", "OrderRecord", "TokenOrdering", "record_orders"),
        *("Causality", "Leak", "causality", "expect_causal"),
        *("Mamba", "MambaLM", "MambaVision", "S6", "TokenReorder", "mamba_lm_130m", "mambavision_t"),
        *("CausalAttention", "H3", "H3LM", "TransformerLM"),
    ],
    "tokendyn.torch.models": MODELS,
    "tokendyn.jax": [
        *OPERATION_NAMES,
        *("token_order", "models", "OrderConfig", "TokenOrdering"),
        *("Causality", "Leak", "causality", "expect_causal"),
        *("load_state_dict", "load_weights", "save_weights", "state_dict"),
        *("Mamba", "MambaLM", "MambaVision", "S6", "TokenReorder", "mamba_lm_130m", "mambavision_t"),
    ],
    "tokendyn.jax.models": [
        *("MambaLM", "MambaVision", "MambaVisionMixer", "mamba_lm_130m"),
        *("mambavision_16px", "mambavision_32px", "mambavision_64px", "mambavision_t"),
    ],
    "tokendyn.errors": [
        "BackendBroken",
        "BackendError",
        "BackendMissing",
        "BackendUnknown",
        "CausalityError",
        "CheckpointError",
        "DTypeError",
        "DataError",
        "EngineError",
        "NonFiniteError",
        "NotImplementedForBackend",
        "OptionError",
        "RegimeError",
        "ShapeError",
        "TokendynError",
    ],
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_these_and_all_are_there(module: str) -> None:
    found = importlib.import_module(module)
    assert sorted(found.__all__) == sorted(PUBLIC[module])
    assert len(set(found.__all__)) == len(found.__all__)
    for name in found.__all__:
        assert getattr(found, name) is not None


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_have_docstrings(module: str) -> None:
    found = importlib.import_module(module)
    for name in set(found.__all__) - {"__version__"}:
        assert inspect.getdoc(getattr(found, name)), name


#: Functions in which nothing can go wrong that is not a mistake in their type.
NEVER_RAISE = {"record_orders", "save_weights", "state_dict"}
#: Of which nobody makes an instance.
BASES = {"LanguageModel", "TokenOrdering"}


def sections(text: str) -> set[str]:
    return set(re.findall(r"^(\w+):$", text, re.MULTILINE))


def unnamed(function: Any, text: str) -> list[str]:
    """Parameters that ``text`` does not name; those with a leading underscore are taken for others' sake."""
    names = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    return [name for name in names if name[0] != "_" and not re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text)]


def check_function(function: Any) -> None:
    name, text = function.__name__, inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    assert not unnamed(function, text), name
    assert "Args" in sections(text) or not signature.parameters, name
    if signature.return_annotation not in (None, "None"):
        assert sections(text) & {"Returns", "Yields"} or "contextmanager" in inspect.getsource(function), name
    assert "Raises" in sections(text) or name in NEVER_RAISE, name


def check_class(kind: type) -> None:
    name, text = kind.__name__, inspect.getdoc(kind) or ""
    whole = "\n".join(inspect.getdoc(base) or "" for base in kind.__mro__ if base.__module__.startswith("tokendyn"))
    made_by = kind.__new__ if issubclass(kind, tuple) else kind.__init__
    assert not unnamed(made_by, whole), name
    assert sections(whole) & {"Args", "Attributes"}, name
    record = dataclasses.is_dataclass(kind) or issubclass(kind, tuple)
    if not record and name not in BASES:  # a layer or a model
        assert {"Raises", "Source"} <= sections(text), name
        assert "Shapes" in sections(text) or name == "TokenReorder", name  # as its mixer has them
    for attribute, value in vars(kind).items():
        if attribute.startswith("_") and attribute != "__call__":
            continue
        function = getattr(value, "__func__", None) or getattr(value, "fget", None) or getattr(value, "func", value)
        if not inspect.isfunction(function):
            continue
        told = inspect.getdoc(getattr(kind, attribute) if function is value else function) or ""
        assert told, f"{name}.{attribute}"
        assert not unnamed(function, told), f"{name}.{attribute}"


@pytest.mark.parametrize("module", PUBLIC)
def test_docstrings_are_whole(module: str) -> None:
    """Sections, and every argument by its name: of functions, classes, their methods and properties."""
    found = importlib.import_module(module)
    for name in set(found.__all__) - {"__version__"}:
        value = getattr(found, name)
        if inspect.isfunction(value):
            check_function(value)
        elif inspect.isclass(value) and not issubclass(value, BaseException):
            check_class(value)


def test_every_operation_is_public_everywhere() -> None:
    assert sorted(OPERATIONS) == sorted(OPERATION_NAMES)
    for name, row in OPERATIONS.items():
        assert getattr(tokendyn, name) is row.function
        for backend in row.backends:
            if backend != "numpy":
                explicit = getattr(getattr(tokendyn, backend), name)
                assert inspect.signature(explicit) == inspect.signature(row.function)
                assert explicit.__doc__ == row.function.__doc__


def test_every_operation_has_its_spec_and_the_spec_its_gradient() -> None:
    from tokendyn import core

    wanted = set(OPERATIONS) | {f"{name}_vjp" for name, row in OPERATIONS.items() if row.differentiable}
    assert wanted <= set(core.__all__)
    for name, row in OPERATIONS.items():
        public = [p for p in inspect.signature(row.function).parameters if p != "engine"]
        assert list(inspect.signature(getattr(core, name)).parameters) == public
        if row.differentiable:
            assert list(inspect.signature(getattr(core, f"{name}_vjp")).parameters) == ["dout", *public]


def test_directory_is_the_public_list() -> None:
    assert dir(tokendyn) == sorted(tokendyn.__all__)


@pytest.mark.parametrize(
    "name", [*OPERATION_NAMES, "token_order", "simulate", "simulate_sphere", "classify", "classify_sphere"]
)
def test_docstring_says_what_a_caller_must_know(name: str) -> None:
    function = getattr(tokendyn, name)
    text = inspect.getdoc(function) or ""
    sections = re.findall(r"^(\w+):$", text, re.MULTILINE)
    for section in ("Args", "Returns", "Raises", "Cost"):
        assert section in sections, f"{name} has no section {section}"
    # Where the formula stands: a section of its own, or the row of the table, which the docs print.
    if name in OPERATIONS:
        assert "Source" in sections or OPERATIONS[name].source
    arguments = text.partition("Args:")[2].partition("Returns:")[0]
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"(?<![\w.]){re.escape(parameter)}(?!\w)", arguments), f"{name}: {parameter} is not described"


def test_signatures_of_the_scan_are_those_of_mamba_ssm() -> None:
    """Users' calls run unchanged: the first nine parameters, in this order, with these defaults."""
    parameters = list(inspect.signature(tokendyn.selective_scan).parameters.values())[:9]
    assert [p.name for p in parameters] == ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus"]
    assert [p.default for p in parameters[5:]] == [None, None, None, False]


def test_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert version("tokendyn") == tokendyn.__version__


def test_errors_are_also_the_errors_of_python() -> None:
    from tokendyn import errors

    for name in errors.__all__:
        error = getattr(errors, name)
        assert issubclass(error, errors.TokendynError)
        if name not in ("TokendynError", "BackendError"):
            assert issubclass(error, (ValueError, TypeError, RuntimeError, ImportError, OSError)), name
