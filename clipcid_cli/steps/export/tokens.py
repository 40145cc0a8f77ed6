"""Whether a written tokenizer gives the tokens that open_clip's does."""

from __future__ import annotations

from collections.abc import Callable

import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.hf_clip import EOS_ID
from clipcid_cli.steps.export.check import Checker
from clipcid_cli.steps.export.inputs import SENTENCES

TOKENIZER_TEXTS = ["a photo of a cat.", "two DOGS & 3 birds — naïve café", "word " * 200]


def compare_tokens(form: str, tokenize: Callable[[list[str]], torch.Tensor], checker: Checker) -> dict[str, int]:
    """Compare the tokens of a written tokenizer with open_clip's.

    open_clip first cleans a text (curly quotes, HTML entities, broken encodings), which others do not: texts that this
    changes are counted, and must give the same tokens once they are cleaned.
    """
    tokenizer = checker.model.tokenizer
    prompts = [text for texts in checker.inputs.prompts for text in texts]
    texts = list(dict.fromkeys([*TOKENIZER_TEXTS, *SENTENCES, *checker.inputs.texts, *prompts]))
    # CLIP's text tower does not see what follows the end of a text; others may.
    end = None if hasattr(tokenizer.whole, "tokenizer") else EOS_ID
    mended = _find_different(texts, tokenizer(texts), tokenize(texts), end)
    if mended:
        cleaned = tokenize([tokenizer.whole.clean_fn(text) for text in mended])
        if different := _find_different(mended, tokenizer(mended), cleaned, end):
            raise ClipcidError(
                f"{form}: the tokenizer gives other tokens for {different[0][:60]!r} than open_clip's.",
                "Report this text; --format open-clip is not affected.",
            )
    return {"texts": len(texts), "same": len(texts) - len(mended), "same_once_mended": len(mended)}


def _find_different(texts: list[str], ours: torch.Tensor, theirs: torch.Tensor, end: int | None) -> list[str]:
    """Return the texts whose tokens differ, before the first of the token `end` if there is one."""
    equal = ours == theirs
    if end is not None:
        ended = ours == end
        equal |= ended.cumsum(dim=1) - ended.int() > 0
    return [text for text, same in zip(texts, equal.all(dim=1).tolist(), strict=True) if not same]
