"""What a program must know of encoders in a file: how inputs are made, and what the outputs are."""

from __future__ import annotations

import json

from clipcid_cli.runtime.models.clip_model import ClipModel


def describe_encoders(model: ClipModel) -> dict[str, str]:
    """Return texts by name; some are JSON or numbers, since the metadata of an ONNX file are texts."""
    return {
        "model": model.info.spec,
        "weights_hash": model.info.weights_hash,
        "preprocess": json.dumps(model.info.preprocess),
        "tokenizer": model.info.tokenizer,
        "context_length": str(model.info.context_length),
        "logit_scale": repr(model.logit_scale),
        "logit_bias": repr(model.logit_bias or 0.0),
        "output": "unit rows",
    }
