"""Text classification with Mamba."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokendyn import _checks as check
from tokendyn.backends.torch.models._language import Backbone, expect_token_ids, initialise, make_config
from tokendyn.backends.torch.models._mamba_lm import MambaLMConfig, mamba_block
from tokendyn.backends.torch.ops._scan_plain import valid_tokens


class MambaClassifier(nn.Module):
    """Mamba, the mean over the tokens of its normed features, and a linear head.

    The mean sees every token anyway, so ``order=`` may sort whole sequences without harm.

    Args:
        num_classes: classes.
        options: fields of :class:`MambaLMConfig`; those of the head (``tie_embeddings``) have no effect.

    Shapes:
        tokens (b, L), lengths (b,) or None → logits (b, num_classes).

    Raises:
        OptionError, RegimeError, ShapeError: an unknown option, a regime that the others exclude, an input that does
            not fit.

    Source:
        Paper 1, Section 5.2 and Table 7, which do not say how the tokens are brought together.
    """

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__()
        check.expect_size("MambaClassifier", "num_classes", num_classes)
        self.config = make_config("MambaClassifier", MambaLMConfig, options)
        self.backbone = Backbone(self.config, lambda index: mamba_block(self.config, index))
        self.head_dropout = nn.Dropout(self.config.head_dropout)
        self.head = nn.Linear(self.config.d_model, num_classes)
        initialise(self, self.backbone)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits (b, num_classes).

        Args:
            tokens: (b, L) ids.
            lengths: (b,) integers from 1 to L, optional: texts padded on the right. What the padding holds changes
                nothing.
        """
        expect_token_ids("MambaClassifier", tokens)
        features = self.backbone(tokens, lengths=lengths)
        if lengths is None:
            mean = features.mean(dim=1)
        else:
            valid = valid_tokens(lengths, tokens.shape[1])
            total = torch.where(valid.unsqueeze(-1), features, 0.0).sum(dim=1)
            mean = total / lengths.unsqueeze(1).to(total.dtype)
        return self.head(self.head_dropout(mean))
