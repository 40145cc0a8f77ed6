"""Whether a written tokenizer gives the tokens that open_clip's does."""

from __future__ import annotations

from collections.abc import Callable

import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.hf_folder import EOS_ID
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
    mended = _find_different(texts, tokenizer(texts), tokenize(texts))
    if mended:
        cleaned = tokenize([tokenizer.whole.clean_fn(text) for text in mended])
        if different := _find_different(mended, tokenizer(mended), cleaned):
            raise ClipcidError(
                f"{form}: the tokenizer gives other tokens for {different[0][:60]!r} than open_clip's.",
                "Report this text; --format open-clip is not affected.",
            )
    return {"texts": len(texts), "same": len(texts) - len(mended), "same_once_mended": len(mended)}


def _find_different(texts: list[str], ours: torch.Tensor, theirs: torch.Tensor) -> list[str]:
    """Return the texts whose tokens differ before the end of the text; the text tower does not see the padding."""
    padding = (ours == EOS_ID).cumsum(dim=1) - (ours == EOS_ID).int() > 0
    same = ((ours == theirs) | padding).all(dim=1)
    return [text for text, equal in zip(texts, same.tolist(), strict=True) if not equal]
