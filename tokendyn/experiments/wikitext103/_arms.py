"""The arms that a language study can compare: each a model with some options changed, by name.

On a command line an arm is a name, or a name with changes: ``positive``, ``positive:io_form=paper``,
``free:norm=none,n_layer=6``.
"""

from __future__ import annotations

from typing import Any, get_type_hints

from tokendyn.backends.torch.models import H3LM, LanguageModel, MambaLM, TransformerLM
from tokendyn.errors import OptionError
from tokendyn.experiments._arms import find_arm, read_changes


def _regime(regime: str, form: str) -> dict[str, Any]:
    return {"io_regime": regime, "io_form": form}


def _causal_order(scope: str) -> dict[str, Any]:
    """A permutation by scores of unit deviation, with the gradient of SoftSort."""
    return {"order": {"method": "straight_through", "tau": 0.1, "normalize": True}, "order_scope": scope}


# At first |q| is 1.39 in negative, positive and mixed_matched, 0.69 in mixed, negative_paper and positive_paper: six
# arms are three regimes at two scales. "published_code" is (negative, mixed, positive): the scales differ there.
ARMS: dict[str, tuple[type[LanguageModel[Any]], dict[str, Any]]] = {
    "free": (MambaLM, {}),
    "negative": (MambaLM, _regime("negative", "published_code")),
    "mixed": (MambaLM, _regime("mixed", "published_code")),
    "positive": (MambaLM, _regime("positive", "published_code")),
    "negative_matched": (MambaLM, _regime("negative", "scale_matched")),  # the same as negative
    "mixed_matched": (MambaLM, _regime("mixed", "scale_matched")),
    "positive_matched": (MambaLM, _regime("positive", "scale_matched")),  # the same as positive
    "negative_paper": (MambaLM, _regime("negative", "paper")),
    "mixed_paper": (MambaLM, _regime("mixed", "paper")),  # the same as mixed
    "positive_paper": (MambaLM, _regime("positive", "paper")),
    "shared_layers": (MambaLM, {"share_layers": True}),
    "no_norm": (MambaLM, {"norm": "none"}),
    "no_convolution": (MambaLM, {"d_conv": None}),
    "h3": (H3LM, {}),
    "transformer": (TransformerLM, {}),
    # All tokens of the sequence sorted before the mixer, as published: these read the future.
    "mamba_published_order": (MambaLM, {"order": "published"}),
    "h3_published_order": (H3LM, {"order": "published"}),
    "transformer_published_order": (TransformerLM, {"order": "published"}),
    # Orders that are causal.
    "chunk_order": (MambaLM, _causal_order("chunks")),
    "group_order": (MambaLM, _causal_order("groups")),
    "window_order": (MambaLM, _causal_order("window")),
}
ABLATIONS = ("shared_layers", "no_norm", "no_convolution")  # paper 1's Table 10
ARMS |= {
    f"{order}_{ablation}": (MambaLM, ARMS[order][1] | ARMS[ablation][1])
    for order in ("chunk_order", "group_order")
    for ablation in ABLATIONS
}
_FUTURE = "_published_order"
#: Arms without an order, each with the one that has the published order.
PUBLISHED = tuple(
    (base, name + _FUTURE) for base, name in (("free", "mamba"), ("h3", "h3"), ("transformer", "transformer"))
)

# Orders of arms that are asked after, each a row of (name, worse, better): perplexity falls from negative to positive.
ORDERS = (
    ("as published", ("negative", "mixed", "positive")),
    ("scales matched at 1.39", ("negative", "mixed_matched", "positive")),
    ("scales matched at 0.69", ("negative_paper", "mixed", "positive_paper")),
)

# What an order changes, each a row of (name, without, with).
PAIRS = (
    *(("reading the future", *pair) for pair in PUBLISHED),
    *(
        (f"causal order, {ablation}", ablation, f"{order}_{ablation}")
        for ablation in ABLATIONS
        for order in ("chunk_order", "group_order")
    ),
)


def reads_future(text: str) -> bool:
    """Whether the outputs of this arm see later tokens: its name says so."""
    return text.partition(":")[0].endswith(_FUTURE)


def resolve_arm(text: str, common: dict[str, Any]) -> tuple[type[LanguageModel[Any]], dict[str, Any]]:
    """The model and its options: those ``common`` to all arms that it has, then the arm's own, then the changes.

    Raises:
        OptionError: an unknown name or field, or a value that the field does not take.
    """
    _, (kind, own), changes = find_arm(text, ARMS)
    fields = get_type_hints(kind.config_type)
    options = {key: value for key, value in common.items() if key in fields} | own
    options |= read_changes(changes, fields, text)
    if options.get("order") is not None and options.get("order_scope", "sequence") == "sequence":
        if not reads_future(text):
            raise OptionError(
                f"--arms: {text!r} sorts whole sequences, so it would read the tokens that it has to predict; such "
                f"arms are called {', '.join(name for name in ARMS if reads_future(name))}"
            )
    elif reads_future(text):
        raise OptionError(f"--arms: {text!r} sorts no whole sequence; change another arm")
    return kind, options
