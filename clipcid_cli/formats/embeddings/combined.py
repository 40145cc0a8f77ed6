"""Embeddings of several teachers as those of one: rows side by side, whose cosines are weighted means of the teachers'.

Row i is [√w₁·a_i ; √w₂·b_i ; …], of unit rows a, b of teachers whose weights w add up to 1. Rows of texts have zeros for a
teacher without captions, and the weights of the others, divided by their sum W, in place of w.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import METADATA, Kind
from clipcid_cli.formats.embeddings.rows import EmbeddingFile, Float16, Numbers, Rows
from clipcid_cli.formats.fingerprint import FileRecord, hash_json
from clipcid_cli.formats.join import join
from clipcid_cli.formats.memo import Memo
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.records import ModelRecord

if TYPE_CHECKING:
    from clipcid_cli.formats.data.dataset import Dataset

_OF_TEXTS = frozenset({Kind.TEXTS, Kind.FURTHER, Kind.VARIANTS})
# What decides the variants of captions, in the settings of `embed`.
_VARIANTS = ("text_variants", "text_variant_rules", "seed")


class CombinedEmbeddings(Embeddings):
    """Joined by key; keys, metadata and order are those of the first teacher that has captions."""

    unusable = "zero or not finite, or missing from those of a teacher"

    def __init__(self, members: Sequence[Embeddings], weights: Sequence[float], scratch: Path | None) -> None:
        """Join the members, whose keys are unique; `scratch` is as `folder` of `join`."""
        first = next((member for member in members if member.has_texts), members[0])
        super().__init__(first.folder, first.files, first.sidecar, Memo())
        self._first = first
        self.members = tuple(members)
        self.weights = tuple(weights)
        self.width = sum(member.width for member in members)
        self._places = [None if member is first else _find_places(first, member, scratch) for member in members]
        # How many of the rows each of them has not.
        self.lacking = tuple(0 if places is None else int(np.sum(places < 0)) for places in self._places)
        self.kinds = self._find_kinds()

    @property
    def flags(self) -> dict[str, Any]:
        return {"embeddings": tuple(member.folder for member in self.members), "teacher_weight": self.weights}

    def name_in(self, work: WorkDirectory) -> list[str]:
        return [work.name_of(member.folder) for member in self.members]

    def slug_in(self, work: WorkDirectory) -> str:
        names = self.name_in(work)
        label = "+".join(Path(name).name for name in names)
        return f"{label}-{hash_json([names, self.weights])[:8]}"

    def listed(self) -> list[tuple[str, str]]:
        return [line for member in self.members for line in member.listed()]

    def skipped(self) -> dict[Path, int]:
        return {path: count for member in self.members for path, count in member.skipped().items()}

    def part_that_lacks(self, samples: int) -> Embeddings:
        missing, member = max(zip(self.lacking, self.members, strict=True), key=lambda pair: pair[0])
        return member if 2 * missing >= samples else self

    @property
    def model_name(self) -> str | None:
        names = [member.model_name for member in self.members]
        return " + ".join(name for name in names if name is not None) or None

    @property
    def model(self) -> ModelRecord:
        """What stands for the teachers in a sidecar; no model has its name."""
        models = [member.model for member in self.members]
        names = [member.model.spec if member.model else str(member.folder) for member in self.members]
        if len(set(self.weights)) > 1:
            names = [f"{weight:.3g}·{name}" for weight, name in zip(self.weights, names, strict=True)]
        hashes = ["unrecorded" if model is None else model.weights_hash for model in models]
        scale = self._mean("logit_scale")
        return ModelRecord(
            spec=" + ".join(names),
            weights_hash=" ".join([*hashes, *map(str, self.weights)]),
            config={},
            # An image's cosine with a text is √W times the mean of those of the teachers with captions.
            logit_scale=None if scale is None else scale / math.sqrt(self._weight_of_texts),
            logit_bias=self._mean("logit_bias"),
        )

    @property
    def shards(self) -> list[str]:
        return self._first.shards

    @property
    def key_column(self) -> str | None:
        return self._first.key_column

    @property
    def key_rule(self) -> str | None:
        return self._first.key_rule

    def keys_of(self, file: EmbeddingFile) -> pa.ChunkedArray:
        return self._first.keys_of(file)

    def contents(self, part: str) -> list[FileRecord]:
        return self._first.contents(part)

    def embed_again(self, **flags: Any) -> str:
        return self._first.embed_again(**flags)

    def validate_unique_keys(self) -> None:
        for member in self.members:
            member.validate_unique_keys()

    def validate_made_as(self, dataset: Dataset, *, captions: bool = True) -> None:
        for member in self.members:
            member.validate_made_as(dataset, captions=captions)

    def _mean(self, name: str) -> float | None:
        """Return the weighted mean of a number of the teachers with captions; None where one does not record it."""
        pairing = [
            (weight, member) for weight, member in zip(self.weights, self.members, strict=True) if member.has_texts
        ]
        terms = [(weight, getattr(member.model, name, None)) for weight, member in pairing]
        known = [weight * value for weight, value in terms if value is not None]
        return sum(known) / self._weight_of_texts if known and len(known) == len(terms) else None

    @property
    def _weight_of_texts(self) -> float:
        return sum(weight for weight, member in zip(self.weights, self.members, strict=True) if member.has_texts)

    def _open_rows(self, kind: Kind) -> Rows:
        if kind is Kind.VIEW_PARAMS or kind not in self.kinds:
            return super()._open_rows(kind)
        whole = self._weight_of_texts if kind in _OF_TEXTS else 1.0
        blocks = [
            _Block(
                member.rows(kind) if kind in member.kinds else None,
                math.sqrt(weight / whole),
                places if kind in (Kind.IMAGES, Kind.TEXTS) else None,
                member.width,
            )
            for member, weight, places in zip(self.members, self.weights, self._places, strict=True)
        ]
        count = next(len(block.rows) for block in blocks if block.rows is not None and block.places is None)
        return _CombinedRows(blocks, count)

    def _describe_files(self, kinds: Collection[Kind]) -> list[FileRecord]:
        files = [file for member in self.members for file in member.fingerprints(kinds)]
        files.append(FileRecord("weights of the teachers", len(self.weights), " ".join(map(str, self.weights))))
        return files

    def find_bad_rows(self, *, texts: bool) -> Numbers:
        """Find rows that are not usable of one teacher, or that one lacks."""
        is_bad = np.zeros(self.num_rows, np.bool_)
        for member, places in zip(self.members, self._places, strict=True):
            bad = member.find_bad_rows(texts=texts)
            if places is None:
                is_bad[bad] = True
            else:
                is_bad |= np.isin(places, bad) | (places < 0)
        return np.flatnonzero(is_bad)

    def _find_kinds(self) -> frozenset[Kind]:
        """Find the kinds of rows that all teachers have of the same views and texts."""
        kinds = {Kind.IMAGES}
        pairing = [member for member in self.members if member.has_texts]
        if pairing:
            kinds |= {kind for kind in _OF_TEXTS if all(kind in member.kinds for member in pairing)}
            if not _have_same(pairing, METADATA):
                kinds -= {Kind.FURTHER, Kind.VARIANTS}
            if len({repr([_setting(member, name) for name in _VARIANTS]) for member in pairing}) > 1:
                kinds -= {Kind.VARIANTS}
        views = {Kind.VIEWS, Kind.VIEW_PARAMS}
        if all(views <= member.kinds for member in self.members) and all(
            _have_same(self.members, part) for part in (METADATA, Kind.VIEW_PARAMS)
        ):
            kinds |= views
        return frozenset(kinds)


def _find_places(first: Embeddings, other: Embeddings, scratch: Path | None) -> Numbers | None:
    """Find where the rows of one are in another: int64 [N], −1 for none; None where both have the same rows.

    In another order each start joins them anew, and each process has the places, 8 N bytes, in memory of its own.
    """
    places = join(lambda: map(first.keys_of, first.files), first.num_rows, other.listing(), scratch)[:, 0]
    is_same = first.num_rows == other.num_rows and np.array_equal(places, np.arange(first.num_rows))
    return None if is_same else places


def _have_same(members: Sequence[Embeddings], part: str) -> bool:
    return len({tuple(file.hash for file in member.contents(part)) for member in members}) == 1


def _setting(embeddings: Embeddings, name: str) -> Any:
    return None if embeddings.sidecar is None else embeddings.sidecar.settings.get(name)


class _Block(NamedTuple):
    """The columns of one teacher: √w times its rows, at these places, or zeros."""

    rows: Rows | None
    factor: float
    places: Numbers | None
    width: int


class _CombinedRows(Rows):
    """Rows of several teachers, side by side."""

    def __init__(self, blocks: Sequence[_Block], count: int) -> None:
        self._blocks = blocks
        self.shape = (count, sum(block.width for block in blocks))

    @property
    def stay_mapped(self) -> bool:
        return all(block.rows.stay_mapped for block in self._blocks if block.rows is not None)

    def read(self, start: int, stop: int) -> Float16:
        return self.take(np.arange(start, min(stop, len(self))))

    def take(self, positions: Numbers) -> Float16:
        """Return rows as `Rows.take`; those that a teacher lacks are NaN."""
        columns = list[Float16]()
        for rows, factor, places, width in self._blocks:
            block = np.zeros((len(positions), width), np.float16)
            if rows is not None:
                wanted = positions if places is None else places[positions]
                block[:] = np.float32(factor) * rows.take(np.maximum(wanted, 0))
                block[wanted < 0] = np.nan
            columns.append(block)
        return np.concatenate(columns, axis=1)
