"""Perplexity of a language model on a stream of tokens."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from tokendyn.errors import NonFiniteError
from tokendyn.experiments._text._streams import TokenStream


def perplexity(
    model: nn.Module,
    stream: TokenStream,
    *,
    length: int,
    stride: int,
    batch_size: int,
    device: torch.device,
    limit: int | None = None,
) -> dict[str, float]:
    """Measures of ``model(ids, targets)``, the negative log-likelihoods, on ``stream``.

    The stream is cut into pieces of ``stride`` tokens. A piece is scored after as many tokens before it as fit with it
    into ``length``: with ``stride = length`` none, so the pieces are independent; with a smaller one every token but
    the first few is scored after at least ``length - stride`` others. The stream's first token is not scored.

    Args:
        limit: score only so many tokens, from the first.

    Returns:
        ``loss``, nats a token; ``perplexity`` = e^loss; ``bits_per_byte`` of the text; ``word_perplexity``, a word of
        :func:`._sources.count_words` (of the text as published, where its spacing was undone). The last two compare
        models with different tokenizers.

    Raises:
        NonFiniteError: a likelihood is NaN or infinite.
    """
    last = min(len(stream) - 1, limit or len(stream))
    total, scored, ids = 0.0, 0, stream.ids
    batch: list[np.ndarray] = []
    counts: list[int] = []

    def score() -> None:
        nonlocal total, scored
        if not batch:
            return
        tokens = torch.from_numpy(np.stack(batch).astype(np.int64)).to(device)
        losses = model(tokens[:, :-1], tokens[:, 1:]).double()
        for row, count in zip(losses, counts, strict=True):
            total += row[-count:].sum().item()
            scored += count
        batch.clear()
        counts.clear()

    for start in range(0, last, stride):
        stop = min(start + stride, last)
        window = np.asarray(ids[max(0, stop - length) : stop + 1])
        if batch and len(window) != len(batch[0]):
            score()
        batch.append(window)
        counts.append(stop - start)
        if len(batch) == batch_size:
            score()
    score()
    if not math.isfinite(total):
        raise NonFiniteError(f"the loss on {stream.header['source']['name']} is {total}")
    share = scored / len(stream)  # of the text, where only its beginning was scored
    loss = total / scored
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": total / math.log(2) / (share * stream.header["text_bytes"]),
        "word_perplexity": math.exp(min(total / (share * stream.header["words"]), 700.0)),
    }
