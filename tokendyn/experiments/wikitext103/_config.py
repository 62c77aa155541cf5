"""The configuration of a language study, and its presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from tokendyn.errors import OptionError
from tokendyn.experiments._config import (
    ComputeConfig,
    Presets,
    RunConfig,
    TrainConfig,
    expect_arms_and_seeds,
    expect_at_least,
    expect_within,
    to_json,
)
from tokendyn.experiments.wikitext103._arms import ABLATIONS, PUBLISHED, resolve_arm


@dataclass(frozen=True)
class DataConfig:
    """Text: a folder, a file, a Hugging Face data set, or without one 43 articles of Wikipedia."""

    text: str | None = None
    """Folder with text files named train and valid (and test), one text file, hf:NAME:CONFIGURATION, or random:
    letters drawn at random, which nobody can predict."""
    held_out_part: float = 0.1
    """Part of a single text that is held out, at its end."""
    tokenizer: Literal["bytes", "gpt2"] = "gpt2"
    """An id for each byte, or GPT-2's byte pair encoding."""
    tokenizer_dir: str | None = None
    """Folder with GPT-2's vocab.json and merges.txt."""
    sequence_length: int = 1024
    """Tokens of a training example."""
    zero_shot: str | None = None
    """A text to be measured on as well, in the spacing of WikiText, which is undone; for example wiki.test.raw."""
    evaluation_stride: int | None = None
    """Tokens scored in one window of sequence_length; by default all, so that windows do not overlap."""
    evaluation_tokens: int | None = None
    """Score only so many tokens of a text, from its first; by default all."""
    measured_tokens: int = 1024
    """Held-out tokens on which norms and signs are measured; 0 does without."""
    cache_dir: str | None = None
    """Where encoded texts are kept; by default tokendyn/tokens in the user's cache."""

    def __post_init__(self) -> None:
        expect_at_least(self, 1, "sequence_length", "evaluation_stride", "evaluation_tokens")
        expect_at_least(self, 0, "measured_tokens")
        expect_within(self, 0.001, 0.9, "held_out_part")
        if self.evaluation_stride is not None and self.evaluation_stride > self.sequence_length:
            raise OptionError(
                f"--evaluation-stride is {self.evaluation_stride}, expected at most --sequence-length, "
                f"{self.sequence_length}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """What all arms have in common; an arm takes the fields that its model has."""

    d_model: int = 768
    """Width."""
    n_layer: int = 24
    """Blocks."""
    d_state: int = 16
    """State size of Mamba; of H3's diagonal model as well."""
    n_head: int = 12
    """Heads of a Transformer."""
    dropout: float = 0.0
    """Dropout of every branch before it is added to the residual stream."""
    head_dropout: float = 0.0
    """Dropout once, before the head."""
    pad_vocab_size_multiple: int = 8
    """Round the rows of the embedding up to a multiple of it: GPUs multiply by odd numbers more slowly."""
    recompute: bool = False
    """Compute activations again in the backward pass instead of keeping them."""

    def __post_init__(self) -> None:
        expect_at_least(self, 1, "d_model", "n_layer", "d_state", "n_head", "pad_vocab_size_multiple")
        expect_within(self, 0, 0.99, "dropout", "head_dropout")

    def options(self) -> dict[str, Any]:
        """The fields that describe a model."""
        options = to_json(self)
        del options["recompute"]
        return options


@dataclass(frozen=True)
class LanguageConfig:
    """A language study: arms times seeds."""

    arms: tuple[str, ...] = ("free", "negative", "mixed", "positive")
    """Models to compare, the first being the reference: free, negative, mixed, positive (with _matched or _paper),
    shared_layers, no_norm, no_convolution, h3, transformer; ordered: chunk_order, group_order, window_order, the first
    two also with _shared_layers, _no_norm, _no_convolution; mamba_published_order, h3_published_order and
    transformer_published_order, which read the future; with changes as in positive:io_form=paper."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of every arm for each; runs of one seed share data order and initial weights."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        expect_arms_and_seeds(self)
        self.models()

    def models(self) -> dict[str, Any]:
        """The model of every arm and its options, resolved, for ``config.json``."""
        resolved = {arm: resolve_arm(arm, self.model.options()) for arm in self.arms}
        return {arm: {"model": kind.__name__, **options} for arm, (kind, options) in resolved.items()}

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be continued: all but where things lie and how they are fetched."""
        config = to_json(self)
        del config["run"]
        for place in ("text", "tokenizer_dir", "zero_shot", "cache_dir"):
            del config["data"][place]
        return {"config": config, "models": self.models()}


PRESETS = Presets[LanguageConfig]()
preset = PRESETS.enter


@preset
def demo() -> LanguageConfig:
    """43 articles of Wikipedia, byte by byte; a tiny Mamba with four spectra: minutes on two cores."""
    return LanguageConfig(
        arms=("free", "negative", "mixed", "positive"),
        seeds=(0, 1, 2),
        data=DataConfig(tokenizer="bytes", sequence_length=128, evaluation_tokens=8_192, measured_tokens=512),
        model=ModelConfig(d_model=48, n_layer=4, d_state=8, n_head=4),
        train=TrainConfig(
            steps=120,
            batch_size=16,
            learning_rate=6e-3,
            final_learning_rate=6e-4,
            weight_decay=0.1,
            log_every=10,
            evaluate_every=40,
            checkpoint_every=40,
        ),
        compute=ComputeConfig(threads=1),
        run=RunConfig(jobs=2),
    )


def _table2(arm: str, **model: Any) -> LanguageConfig:
    """Settings of paper 1's Tables 2 and 4: Mamba 130M, 25 epochs of WikiText-103, 128 sequences of 1,024 tokens."""
    return LanguageConfig(
        arms=(arm,),
        seeds=(0, 1, 2),
        data=DataConfig(tokenizer="gpt2", sequence_length=1024),
        model=ModelConfig(**{"d_model": 768, "n_layer": 24, "d_state": 16, "recompute": True, **model}),
        train=TrainConfig(
            epochs=25,
            batch_size=128,
            learning_rate=1.5e-3,
            final_learning_rate=1.5e-4,
            warmup=0.01,
            weight_decay=0.25,
            beta1=0.9,
            beta2=0.999,
            clip_norm=1.0,
            log_every=50,
            evaluate_every=900,
            checkpoint_every=900,
        ),
        compute=ComputeConfig(precision="bfloat16"),
    )


@preset
def table2_negative() -> LanguageConfig:
    """Table 2, all eigenvalues negative (--text, --tokenizer-dir): Mamba 130M, WikiText-103, 25 epochs."""
    return _table2("negative", dropout=0.25)


@preset
def table2_mixed() -> LanguageConfig:
    """Table 2, eigenvalues of both signs (--text, --tokenizer-dir): Mamba 130M, WikiText-103, 25 epochs."""
    return _table2("mixed", dropout=0.25)


@preset
def table2_positive() -> LanguageConfig:
    """Table 2, all eigenvalues positive (--text, --tokenizer-dir): Mamba 130M, WikiText-103, 25 epochs."""
    return _table2("positive", dropout=0.25)


@preset
def table2_free() -> LanguageConfig:
    """Table 2, the free spectrum, Mamba as in Tables 6 and 10 (--text, --tokenizer-dir): Mamba 130M, 25 epochs."""
    return _table2("free", dropout=0.25)


def _middle(*arms: str) -> LanguageConfig:
    """12 blocks of width 384, 24.6 M tokens a run: 11.6 M parameters of Mamba, and 19.3 M of the embedding."""
    return LanguageConfig(
        arms=arms,
        seeds=(0, 1, 2),
        data=DataConfig(tokenizer="gpt2", sequence_length=512, measured_tokens=2048),
        model=ModelConfig(d_model=384, n_layer=12, d_state=16, head_dropout=0.1),
        train=TrainConfig(
            steps=1500,  # of 32 x 512 tokens: 24.6 M
            batch_size=32,
            learning_rate=1.5e-3,
            final_learning_rate=1.5e-4,
            warmup=0.02,
            weight_decay=0.1,
            log_every=25,
            evaluate_every=250,
            checkpoint_every=250,
        ),
        compute=ComputeConfig(precision="bfloat16"),
        run=RunConfig(jobs=3),
    )


@preset
def spectrum() -> LanguageConfig:
    """Three regimes at two scales and the free spectrum (--text, --tokenizer-dir): 11.6 M parameters besides 19.3 M."""
    return _middle("free", "negative", "mixed", "positive", "mixed_matched", "negative_paper", "positive_paper")


@preset
def order() -> LanguageConfig:
    """Orders that are causal (--text, --tokenizer-dir), at the size of spectrum."""
    return _middle("free", "chunk_order", "group_order", "window_order")


@preset
def table6() -> LanguageConfig:
    """Table 6 as published, reading the future (--text, --tokenizer-dir), at the size of spectrum."""
    return _middle(*(arm for pair in PUBLISHED for arm in pair))


@preset
def table10() -> LanguageConfig:
    """Table 10's ablations with and without a causal order (--text, --tokenizer-dir), at the size of spectrum."""
    bases = ("free", *ABLATIONS)
    return _middle(*(arm for base in bases for arm in (base, f"chunk_order_{base}".removesuffix("_free"))))


@preset
def orders() -> LanguageConfig:
    """All arms of order, table6 and table10, and signs with and without norm, in one study of smaller models that see
    their text once (--text, --tokenizer-dir): 8 blocks of width 256, 4.1 M tokens a run."""
    arms = [arm for made in (order, table6, table10) for arm in made().arms]
    arms += [arm for sign in ("negative", "positive") for arm in (sign, f"{sign}:norm=none")]
    same = _middle(*dict.fromkeys(arms))
    return dataclasses.replace(
        same,
        model=ModelConfig(d_model=256, n_layer=8, d_state=16, n_head=8),
        train=dataclasses.replace(
            same.train, steps=500, batch_size=16, warmup=0.05, evaluate_every=250, checkpoint_every=500
        ),
    )


@preset
def leak() -> LanguageConfig:
    """Letters drawn at random, which only a model that reads the future can predict: minutes on two cores."""
    return LanguageConfig(
        arms=(
            *(arm for pair in PUBLISHED for arm in pair),
            *("chunk_order:order_chunk=4", "group_order", "window_order"),
        ),
        seeds=(0, 1, 2),
        data=DataConfig(
            text="random", tokenizer="bytes", sequence_length=16, evaluation_tokens=16_384, measured_tokens=0
        ),
        model=ModelConfig(d_model=48, n_layer=1, d_state=8, n_head=4),
        train=TrainConfig(
            steps=240,
            batch_size=32,
            learning_rate=1e-2,
            final_learning_rate=1e-4,
            weight_decay=0.0,
            log_every=20,
            evaluate_every=60,
            checkpoint_every=120,
        ),
        compute=ComputeConfig(threads=1),
        run=RunConfig(jobs=2),
    )
