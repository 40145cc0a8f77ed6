"""How close an export must be to the original, by the number format of its weights."""

from __future__ import annotations

import math

from clipcid_cli.algorithms.metrics.parity import RowDifference
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.export_sidecar import Parity, RowParity
from clipcid_cli.steps.settings.export import ExportSettings

# Largest differences allowed on unit rows. fp32: the order of summation. fp16, bf16: weights rounded to 11 or 8 bits in
# every layer. int8: only what is broken; its limit is the measured loss of accuracy.
LIMITS = {
    "fp32": RowDifference(max_difference=1e-4, min_cosine=0.99999),
    "fp16": RowDifference(max_difference=5e-3, min_cosine=0.9999),
    "bf16": RowDifference(max_difference=2e-2, min_cosine=0.999),
    "int8": RowDifference(max_difference=math.inf, min_cosine=0.9),
}
# Largest difference allowed of the cosine of an image with a class of a classifier, or with a text of the search. fp32: of
# the classifier about one byte in 10,000 is resized to a neighbouring value. int8 is judged by its predictions.
_COSINE_LIMITS = {"fp32": 1e-3, "fp16": 5e-3, "int8": math.inf}
# Name of the search of images in `parity.json`.
SEARCH = "search"

# Outputs that are compared row by row, by their names in `parity.json`.
OUTPUTS = {"image": "the image encoder", "text": "the text encoder", "dense": "the grid of patches"}


def find_limit(kind: str, settings: ExportSettings) -> RowDifference:
    """Return the largest difference allowed for a number format; ``--max-difference`` is of all but int8."""
    asked = settings.max_difference
    return LIMITS[kind] if asked is None or kind == "int8" else LIMITS[kind]._replace(max_difference=asked)


def validate_parity(name: str, parity: Parity, spec: str, settings: ExportSettings) -> None:
    """Refuse an entry of `parity.json`, of this run or an earlier one, that is over a limit of this run.

    Args:
        name: Of the exported form.
        spec: The original model.
    """
    kind = parity.precision
    limit = find_limit(kind, settings)
    for output, words in OUTPUTS.items():
        rows: RowParity | None = getattr(parity, output)
        if rows is None or (rows.max_difference <= limit.max_difference and rows.min_cosine >= limit.min_cosine):
            continue
        allowed = f" (allowed {limit.max_difference:.0e})" if math.isfinite(limit.max_difference) else ""
        raise ClipcidError(
            f"{name}: {words} differs from {spec} by up to {rows.max_difference:.2e}{allowed}, cosine down to "
            f"{rows.min_cosine:.7f} (allowed {limit.min_cosine}). Nothing was written.",
            "Omit this number format, or allow more with --max-difference."
            if kind != "fp32"
            else "Allow more with --max-difference, or check the model: its values may overflow.",
        )
    cosine = parity.max_cosine_difference
    if cosine is not None and not cosine <= _COSINE_LIMITS[kind]:  # nor when it is no number
        what, flag = ("text", "--search-images") if name == SEARCH else ("class", "--classnames")
        raise ClipcidError(
            f"{name}: a cosine of image and {what} differs by {cosine:.2e} from {spec} (allowed "
            f"{_COSINE_LIMITS[kind]:.0e}). Nothing was written.",
            f"Omit {flag}." if kind == "fp32" else f"Omit --quantize {kind}.",
        )
    zeroshot, max_drop = parity.zeroshot, settings.max_accuracy_drop
    if zeroshot is not None and zeroshot.gated and zeroshot.drop > max_drop:
        raise ClipcidError(
            f"{name}: {zeroshot.measure} falls from {zeroshot.pytorch:.4f} to {zeroshot.value:.4f} on "
            f"{zeroshot.images:,} images, by {100 * zeroshot.drop:.2f} points (allowed {100 * max_drop:.2f}). "
            "Nothing was written.",
            "Omit this number format from --quantize, or allow more with --max-accuracy-drop.",
        )
