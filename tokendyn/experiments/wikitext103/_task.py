"""Language modelling as a task of the trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokendyn.backends.torch.models import LanguageModel
from tokendyn.errors import OptionError
from tokendyn.experiments._task import Batch
from tokendyn.experiments._text._perplexity import perplexity
from tokendyn.experiments._text._sources import default_cache, encoded, published_text, read_split_text
from tokendyn.experiments._text._streams import TokenStream, training_windows, windows_per_epoch
from tokendyn.experiments._text._tokenizers import load_tokenizer
from tokendyn.experiments.wikitext103._arms import resolve_arm
from tokendyn.experiments.wikitext103._config import DataConfig, LanguageConfig
from tokendyn.experiments.wikitext103._measures import measure_blocks


@dataclass(frozen=True)
class Texts:
    """The streams of a study; ``zero_shot`` is a text of another kind."""

    train: TokenStream
    held_out: TokenStream
    test: TokenStream | None
    zero_shot: TokenStream | None

    @property
    def vocab_size(self) -> int:
        return self.train.header["vocab_size"]

    def named(self) -> dict[str, TokenStream]:
        """Those that there are, by name."""
        return {name: stream for name, stream in vars(self).items() if stream is not None}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a run to be continued."""
        return {name: stream.fingerprint for name, stream in self.named().items()}


def load_texts(data: DataConfig) -> Texts:
    """The streams that ``data`` names, encoded unless the cache holds them.

    Raises:
        DataError: a text or the tokenizer cannot be read, or the cache not be written.
    """
    tokenizer = load_tokenizer(data.tokenizer, data.tokenizer_dir)
    cache = default_cache() if data.cache_dir is None else Path(data.cache_dir)
    splits = read_split_text(data.text, data.held_out_part)
    zero_shot = None if data.zero_shot is None else published_text(Path(data.zero_shot), wikitext=True)
    return Texts(
        encoded(splits["train"], tokenizer, cache),
        encoded(splits["held_out"], tokenizer, cache),
        encoded(splits["test"], tokenizer, cache) if "test" in splits else None,
        None if zero_shot is None else encoded(zero_shot, tokenizer, cache),
    )


class LanguageTask:
    """A language model on a stream of tokens, with one arm and one seed (:class:`~.._trainer.Task`).

    Args:
        texts: the data.
        config: the study's configuration.
        arm: which model.
        seed: decides the windows and their order.
    """

    def __init__(self, texts: Texts, config: LanguageConfig, arm: str, seed: int) -> None:
        self.texts, self.config, self.arm, self.seed = texts, config, arm, seed
        length, batch = config.data.sequence_length, config.train.batch_size
        if self.steps_per_epoch < 1:
            raise OptionError(
                f"{batch} sequences (--batch-size) of {length} tokens (--sequence-length) are more than the "
                f"{len(texts.train):,} training tokens hold; choose fewer or shorter ones"
            )

    @property
    def steps_per_epoch(self) -> int:
        windows = windows_per_epoch(len(self.texts.train), self.config.data.sequence_length)
        return windows // self.config.train.batch_size

    def build_model(self) -> LanguageModel[Any]:
        kind, options = resolve_arm(self.arm, self.config.model.options())
        model = kind(vocab_size=self.texts.vocab_size, **options)
        model.backbone.recompute = self.config.model.recompute
        return model

    def batch(self, step: int) -> Batch:
        windows = training_windows(
            self.texts.train,
            step,
            length=self.config.data.sequence_length,
            batch_size=self.config.train.batch_size,
            seed=self.seed,
        )
        return Batch({"ids": torch.from_numpy(windows)})

    def loss(self, model: Callable[..., Any], tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        ids = tensors["ids"]
        return model(ids[:, :-1], ids[:, 1:]).mean(), {}

    def evaluate(self, model: nn.Module, device: torch.device) -> tuple[dict[str, Any], dict[str, str]]:
        """Perplexity on the held-out text and on the others that there are, and the measures of the blocks."""
        data = self.config.data
        found: dict[str, Any] = {}
        for name, stream in self.texts.named().items():
            if name == "train":
                continue
            values = perplexity(
                model,
                stream,
                length=data.sequence_length,
                stride=data.evaluation_stride or data.sequence_length,
                batch_size=self.config.train.batch_size,
                device=device,
                limit=data.evaluation_tokens,
            )
            found |= values if name == "held_out" else {f"{name}_{key}": value for key, value in values.items()}
        if data.measured_tokens:
            assert isinstance(model, LanguageModel)
            found["blocks"] = measure_blocks(model, self._measured().to(device))
        return found, {}

    def _measured(self) -> Tensor:
        """The held-out tokens on which the blocks are measured: as many whole windows, spread over the text."""
        length = min(self.config.data.sequence_length, self.config.data.measured_tokens, len(self.texts.held_out))
        count = max(1, self.config.data.measured_tokens // length)
        starts = np.linspace(0, len(self.texts.held_out) - length, count).astype(np.int64)
        return torch.from_numpy(self.texts.held_out.ids[starts[:, None] + np.arange(length)].astype(np.int64))


@dataclass(frozen=True)
class LanguageTasks:
    """The task of (arm, seed): what a study asks for. Can be pickled."""

    texts: Texts
    config: LanguageConfig

    def __call__(self, arm: str, seed: int) -> LanguageTask:
        return LanguageTask(self.texts, self.config, arm, seed)
