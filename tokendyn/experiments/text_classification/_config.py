"""The configuration of a text classification study, and its presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
from tokendyn.experiments._order_arms import resolve_arm


@dataclass(frozen=True)
class DataConfig:
    """Labelled texts: JSON lines, a Hugging Face data set, or without one 4,000 news."""

    data: str | None = None
    """A folder with one file named train and one named test, or the file of training texts: JSON lines with text, label
    and maybe title, plain or packed (.jsonl.xz, .jsonl.gz); or hf:NAME or hf:NAME:CONFIGURATION."""
    test: str | None = None
    """The file of test texts; by default the one beside --data whose name has test instead of train."""
    vocabulary: int = 20_000
    """Words that have an id of their own: the most frequent of the training texts."""
    max_length: int = 512
    """Words of a text that are read, from its first."""
    word_dropout: float = 0.1
    """Part of the words of a training text that are replaced by the unknown word."""

    def __post_init__(self) -> None:
        expect_at_least(self, 1, "vocabulary", "max_length")
        expect_within(self, 0, 0.9, "word_dropout")


@dataclass(frozen=True)
class ModelConfig:
    """The classifier; orders apply to all of its blocks."""

    d_model: int = 128
    """Width."""
    n_layer: int = 4
    """Blocks."""
    d_state: int = 16
    """State size."""
    dropout: float = 0.1
    """Dropout of every branch before it is added to the residual stream."""
    head_dropout: float = 0.3
    """Dropout of the mean of the tokens."""

    def __post_init__(self) -> None:
        expect_at_least(self, 1, "d_model", "n_layer", "d_state")
        expect_within(self, 0, 0.99, "dropout", "head_dropout")


@dataclass(frozen=True)
class TextConfig:
    """A text classification study: arms times seeds."""

    arms: tuple[str, ...] = ("baseline", "published", "published_restored", "straight_through", "sorted")
    """Orders to compare, the first being the reference: baseline, sorted, annealed, published, published_restored,
    straight_through, random, mean, reversed; with changes as in sorted:tau=0.3,restore=false."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of every arm for each; runs of one seed share data order and initial weights."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        expect_arms_and_seeds(self)
        self.orders()

    def orders(self) -> dict[str, Any]:
        """The settings of every arm's order, resolved, for ``config.json``."""
        return {arm: resolve_arm(arm).to_json() for arm in self.arms}

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be continued: all but where things lie and how they are fetched."""
        config = to_json(self)
        del config["run"], config["data"]["data"], config["data"]["test"]
        return {"config": config, "orders": self.orders()}


PRESETS = Presets[TextConfig]()
preset = PRESETS.enter


@preset
def demo() -> TextConfig:
    """4,000 news of AG's corpus, four kinds: five orders, minutes on two cores."""
    return TextConfig(
        data=DataConfig(vocabulary=4_000, max_length=48, word_dropout=0.5),
        model=ModelConfig(d_model=64, n_layer=1, d_state=8, dropout=0.3, head_dropout=0.5),
        train=TrainConfig(
            epochs=6,
            batch_size=32,
            learning_rate=2e-3,
            weight_decay=1.0,
            log_every=31,
            evaluate_every=93,
            checkpoint_every=186,
        ),
        compute=ComputeConfig(threads=1),
        run=RunConfig(jobs=2),
    )


def _on_gpu(max_length: int, train: TrainConfig) -> TextConfig:
    return TextConfig(
        seeds=(0, 1, 2, 3, 4),
        data=DataConfig(vocabulary=20_000, max_length=max_length, word_dropout=0.5),
        model=ModelConfig(d_model=128, n_layer=2, d_state=16, dropout=0.3, head_dropout=0.5),
        train=train,
        compute=ComputeConfig(threads=1, precision="bfloat16", deterministic=False),
        run=RunConfig(jobs=5),
    )


@preset
def imdb() -> TextConfig:
    """Table 7's film reviews (--data), 25,000 for training and as many for test: for one GPU."""
    return _on_gpu(
        512,
        TrainConfig(
            epochs=6,
            batch_size=64,
            learning_rate=2e-3,
            warmup=0.1,
            weight_decay=1.0,
            log_every=65,
            evaluate_every=780,
            checkpoint_every=780,
        ),
    )


@preset
def ag_news() -> TextConfig:
    """Table 7's news of four kinds (--data), 7,600 for test: for one GPU."""
    return _on_gpu(
        128,
        TrainConfig(
            steps=2_000,
            batch_size=128,
            learning_rate=2e-3,
            warmup=0.1,
            weight_decay=1.0,
            log_every=50,
            evaluate_every=500,
            checkpoint_every=1_000,
        ),
    )
