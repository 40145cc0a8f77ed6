"""What a program must know of encoders in a file: how inputs are made, and what the outputs are."""

from __future__ import annotations

from typing import Any

from clipcid_cli.runtime.models.clip_model import ClipModel


def describe_encoders(model: ClipModel) -> dict[str, Any]:
    """Return JSON values by name."""
    return {
        "model": model.info.spec,
        "weights_hash": model.info.weights_hash,
        "preprocess": model.info.preprocess,
        "tokenizer": model.info.tokenizer,
        "context_length": model.info.context_length,
        "logit_scale": model.logit_scale,
        "logit_bias": model.logit_bias or 0.0,
        "output": "unit rows",
    }
