"""Whether a teacher of stored rows knows their captions and images, told by pairs from everywhere in the data."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from clipcid_cli.algorithms.pairing import MAX_PAIRS, Pairs, are_enough, rank_pairs
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.records import Pairing
from clipcid_cli.runtime.randomness import derive_seed, key_fractions

MAX_SCALE = 100.0
"""The scale at which CLIP training ends; taken where another tool's embeddings do not record it."""
# Pairs are drawn from so many rows, in so many stretches: a disk reads a stretch at once, and few files are opened.
_ROWS_CONSIDERED = 40_000
_STRETCHES = 40
# `distill` holds out this share by default, those of the lowest fractions.
_HELD_OUT_BY_RUNS = 0.01


def judge_pairing(embeddings: Embeddings) -> Pairing | None:
    """Measure whether the teacher of stored rows knows their captions and images.

    Call it on the first process. None where there are no captions, or too few.
    """
    if not embeddings.has_texts:
        return None
    pairs = read_pairs(embeddings, MAX_PAIRS)
    if not are_enough(pairs):
        return None
    return rank_pairs(pairs.images_ND, pairs.texts_ND, pairs.captions_N)


def teacher_scale(embeddings: Embeddings) -> float:
    """Return the logit scale of the model, exp(logit_scale), as recorded, else the usual one."""
    recorded = None if embeddings.model is None else embeddings.model.logit_scale
    return MAX_SCALE if recorded is None else float(recorded)


def read_pairs(embeddings: Embeddings, most: int) -> Pairs:
    """Read pairs, at most so many, from everywhere in the data: those of the highest key fractions of some rows.

    None that runs hold out is read, and where there are more pairs than are needed, none that any ``--val-fraction`` holds
    out.
    """
    row_S = consider_rows(embeddings.num_rows)
    keys = pa.chunked_array(list(embeddings.take_column(embeddings.keys_of, row_S)))
    caption_S = pa.chunked_array(list(embeddings.take_column(embeddings.captions_of, row_S)))
    fraction_S = key_fractions(keys.to_pylist())
    usable_S = (fraction_S >= _HELD_OUT_BY_RUNS) & (pc.utf8_length(caption_S).to_numpy() > 0)
    places = np.flatnonzero(usable_S)
    places = np.sort(places[np.argsort(-fraction_S[places], kind="stable")[:most]])
    images = torch.from_numpy(embeddings.rows(Kind.IMAGES).take(row_S[places])).float()
    texts = torch.from_numpy(embeddings.rows(Kind.TEXTS).take(row_S[places])).float()
    hashes = torch.tensor([derive_seed(caption) for caption in caption_S.take(places).to_pylist()])
    is_finite = images.isfinite().all(dim=1) & texts.isfinite().all(dim=1)
    pairs = Pairs(torch.nn.functional.normalize(images), torch.nn.functional.normalize(texts), hashes)
    return pairs.take(is_finite.nonzero()[:, 0])


def consider_rows(num_rows: int) -> npt.NDArray[np.int64]:
    """Choose rows to draw pairs from, int64, ascending: all, or of many as long stretches in equal distances."""
    if num_rows <= _ROWS_CONSIDERED:
        return np.arange(num_rows)
    starts = np.arange(_STRETCHES) * num_rows // _STRETCHES
    return (starts[:, None] + np.arange(_ROWS_CONSIDERED // _STRETCHES)).ravel()
