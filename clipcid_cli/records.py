"""What is both computed and stored."""

from __future__ import annotations

import hashlib
import json
import math
from statistics import fmean, stdev
from typing import Any

import msgspec


class ModelRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A model. Sidecars of embeddings record all; what they are compared by has no default."""

    spec: str  # the name it was loaded by, including the tag of its weights
    slug: str = ""  # the name for files and folders
    architecture: str | None = None  # open_clip's name; None for a folder or file, as is the tag
    tag: str | None = None
    weights_hash: str  # `blake2b:…` of the weights file's bytes; `fresh:SEED` for random weights
    preprocess: dict[str, Any] = {}  # open_clip's PreprocessCfg
    context_length: int = 0
    embed_dim: int = 0
    image_size: tuple[int, int] = (0, 0)
    parameters: int = 0
    tokenizer: str = ""  # its class and, where it has one, its Hugging Face name
    config: dict[str, Any]  # open_clip's `model_cfg`, from which the architecture can be built
    logit_scale: float | None = None  # by which cosines are multiplied, and what is then added; as loaded
    logit_bias: float | None = None

    @property
    def preprocess_hash(self) -> str:
        """Hash of everything that determines the pixels a model sees, without --fast-decode."""
        return hash_preprocess(self.preprocess, fast_decode=False)


def hash_preprocess(preprocess: dict[str, Any], *, fast_decode: bool) -> str:
    """Hash everything that determines the pixels a model sees."""
    text = json.dumps(
        {"preprocess": preprocess, "fast_decode": fast_decode, "alpha": "white", "exif": "ignored"}, sort_keys=True
    )
    return "blake2b:" + hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Pairing(msgspec.Struct, frozen=True, kw_only=True):
    """How well a teacher's captions find their own images among those of other captions, beside a guess."""

    pairs: int
    candidates: int  # images that a caption ranks, its own and those of other captions, in the mean
    median_rank: float  # 1 for the first
    chance_rank: float
    recall_at_1: float  # shares in [0, 1], as what follows
    chance_at_1: float
    recall_at_10: float
    chance_at_10: float
    near_chance: bool  # whether captions find their images hardly better than by a guess
    repaired: bool = False  # whether after the teacher's repair, of captions that it was not fitted to

    def describe(self) -> str:
        """Say how well a teacher knows the data, without a full stop."""
        state = ", after its repair" if self.repaired else ""
        ranks = f"median rank {self.median_rank:,.0f} of {self.candidates:,} (chance {self.chance_rank:,.0f})"
        recalls = ((1, self.recall_at_1, self.chance_at_1), (10, self.recall_at_10, self.chance_at_10))
        shares = [f"R@{k} {100 * recall:.1f}% (chance {100 * chance:.2g}%)" for k, recall, chance in recalls]
        return f"Teacher on these captions{state}: {ranks}, {', '.join(shares)}"


class Repair(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whether a teacher is repaired, and how pairs that the repair was not fitted to judge it."""

    repaired: bool  # whether the repair is taken
    steps: int  # of the fit, after which it was best; 0 for none
    # Mean of ln(1 + images of other captions nearer to the caption than its own), before and after.
    log_rank: tuple[float, float]
    standard_error: float  # of the difference of the two
    # Share of the images whose nearest caption of their fold is one of their own, before and after.
    recall_at_1: tuple[float, float]
    chance_at_1: float  # of a guess
    pairs: int  # pairs that it was fitted to and judged by
    captions: int  # different captions of those
    pairing: Pairing | None = None  # of the repaired teacher: captions of a fold and its images


class Draws(msgspec.Struct):
    """A metric of several random draws, or seeds; the standard deviation is None for one, and all are without a value."""

    mean: float | None
    std: float | None
    values: list[float | None]

    @classmethod
    def from_values(cls, values: list[float]) -> Draws:
        if any(math.isnan(value) for value in values):
            return cls(None, None, [None if math.isnan(value) else value for value in values])
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, [*values])
