"""``export.json`` and ``parity.json``: what an export wrote, and how close each form is to the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from clipcid_cli.formats.sidecar import Sidecar


class RowParity(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How close the rows of an exported tower are to the original's, over samples in batches of several sizes.

    Of patches the shape is ``["batch", h, w, D]``.
    """

    batch_sizes: tuple[int, ...]
    samples: int
    max_difference: float
    min_cosine: float
    shape: list[str | int] | None = None


class PredictionParity(msgspec.Struct, kw_only=True):
    """Whether an export finds the class or the caption of images as the original does."""

    measure: str  # ``acc1`` or ``text_retrieval_recall@1``; `value` is the export's, `pytorch` the original's
    images: int
    candidates: int
    agreement: float  # fraction of the images with the same answer
    value: float
    pytorch: float
    drop: float
    gated: bool  # whether a drop over the limit is an error

    def __str__(self) -> str:
        return f"{100 * self.pytorch:.1f} → {100 * self.value:.1f}"


class Latency(msgspec.Struct):
    """Milliseconds that single images take: the median, and what one in twenty exceeds."""

    p50: float
    p95: float

    def __str__(self) -> str:
        return f"{self.p50:.1f} / {self.p95:.1f}"


class Parity(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How close one exported form is to the original, its size and speed: an entry of `parity.json`.

    Encoders have `image`, `text` and maybe `dense`; a classifier has what follows them up to `agreement`, as the search of
    images, where `agreement` is the fraction of the texts with the same nearest image.
    """

    precision: str
    image: RowParity | None = None
    text: RowParity | None = None
    dense: RowParity | None = None
    images: int | None = None
    max_cosine_difference: float | None = None
    agreement: float | None = None
    bytes: int
    images_per_second: float | None = None
    latency_ms: Latency | None = None
    pytorch_images_per_second: float | None = None
    zeroshot: PredictionParity | None
    opset: int | None = None
    engine: str | None = None
    processor: dict[str, int | float] | None = None
    tokenizer: dict[str, int] | None = None

    @property
    def same_answers(self) -> float | None:
        """Fraction of the images with the same answer, where there are answers."""
        return self.agreement if self.zeroshot is None else self.zeroshot.agreement

    @property
    def min_cosine(self) -> float | None:
        """The smallest cosine of any output with the original's; None of a classifier, which has none."""
        return min((rows.min_cosine for rows in (self.image, self.text, self.dense) if rows is not None), default=None)


class ExportSidecar(Sidecar, kw_only=True):
    """``export.json``; `written` names all files, `parity` is by form."""

    model: dict[str, Any]
    written: list[str]
    parity: dict[str, Parity]

    def files(self, folder: Path) -> set[str]:
        return set(self.written)
