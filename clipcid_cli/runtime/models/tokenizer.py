"""Texts to tokens, by open_clip's tokenizers, in bounded time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch

from clipcid_cli.errors import ClipcidError

Tokenizer = Callable[[list[str]], torch.Tensor]

LONGEST_TEXT = 8_192
"""Characters of a text that are tokenized: 100 for each of a CLIP's 77 tokens. What follows could hardly reach the model,
and a tokenizer's cleaning of a caption of megabytes takes minutes."""


@dataclasses.dataclass(frozen=True)
class BoundedTokenizer:
    """A tokenizer that reads the first `LONGEST_TEXT` characters of each text; picklable."""

    whole: Any  # open_clip's own

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Return int64 [B, L]."""
        return cast(torch.Tensor, self.whole([text[:LONGEST_TEXT] for text in texts]))


def load_tokenizer(spec: str, source: str) -> BoundedTokenizer:
    """Load the tokenizer of a model.

    Args:
        spec: The model's name, for the error.
        source: Architecture, hub name or ``local-dir:`` folder, as open_clip takes it.
    """
    from clipcid_cli.runtime.models.lean_open_clip import open_clip

    try:
        return BoundedTokenizer(open_clip.get_tokenizer(source))
    except Exception as error:  # transformers raises OSError, ValueError, ImportError and its own
        raise ClipcidError(
            f"The tokenizer of model {spec} could not be loaded: {' '.join(str(error).split())[:400]}",
            "Put its files (tokenizer.json, tokenizer_config.json, …) in the folder of the model's configuration.",
        ) from error
