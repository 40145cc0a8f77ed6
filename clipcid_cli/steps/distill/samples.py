"""The samples of a run: which can be trained on, which are held out, and where each is in the files of earlier steps."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.index import DataIndex
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.sample_rows import sample_keys
from clipcid_cli.formats.key_streams import JoinedMatch, KeyStream, OrderedMatch, Values, join_stream, parquet_keys
from clipcid_cli.formats.results.clusters import TABLE, Clusters
from clipcid_cli.formats.results.matched_samples import HELD_OUT, TRAINING, SampleRows, SampleRowsWriter, open_rows
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.randomness import key_fractions
from clipcid_cli.steps.reporting import Reporter, SilentReporter

# Captionless samples that are named.
_NAMED = 5
# Fewer shards than this are matched in a second or two.
_FEW_SHARDS = 100


@dataclasses.dataclass(frozen=True)
class UsableSamples:
    """How many samples have an image and a caption.

    Attributes:
        total: Their number.
        skips: Samples that are not usable, by reason.
        read: Samples that were listed, usable or not.
    """

    total: int
    skips: Skips
    read: int


def count_usable(dataset: Dataset, max_bad_fraction: float) -> UsableSamples:
    """Count the samples that can be trained on, from the records of the data's index.

    Raises:
        ClipcidError: when too many have no image or no caption.
    """
    index = index_of(dataset)
    skips, without_caption = Skips(), Skips()
    for number, record in enumerate(index.records):
        skips.merge(record.skips)
        if record.with_captions < record.samples:
            without_caption.merge(_find_captionless(index, number))
    skips.merge(without_caption)
    total, read = sum(record.with_captions for record in index.records), sum(record.read for record in index.records)
    if not total:
        raise ClipcidError(
            f"{dataset.spec}: none of {read:,} samples has a caption.",
            "Training needs captions: a .txt file next to each image, or --caption-column for a list.",
        )
    skips.check(read, max_bad_fraction, dataset.spec)
    return UsableSamples(total, skips, read)


def _find_captionless(index: DataIndex, number: int) -> Skips:
    part = index.part(number)
    places = np.flatnonzero(part.num_captions == 0)
    return Skips({"no_caption": len(places)}, {"no_caption": part.keys.take(pa.array(places[:_NAMED])).to_pylist()})


def index_of(dataset: Dataset) -> DataIndex:
    """Return the index of data for which `ensure_index` was called."""
    assert dataset.index is not None, "ensure_index was called"
    return dataset.index


@dataclasses.dataclass(frozen=True)
class Sources:
    """The files that the data is matched with.

    Attributes:
        keep_list: The keep list; None where all samples are used.
        embeddings: The teacher's; None where there are none.
        required: Whether a sample without an embedding is left out of training.
        clusters: Clusters; None where no loss needs them.
    """

    keep_list: Path | None = None
    embeddings: Embeddings | None = None
    required: bool = True
    clusters: Clusters | None = None

    def streams(self) -> dict[str, tuple[KeyStream, int, Path]]:
        """Return the keys of each file with their numbers, how many numbers a key has, and the file."""
        found: dict[str, tuple[KeyStream, int, Path]] = {}
        if self.keep_list is not None:
            found["keep_list"] = parquet_keys(self.keep_list, "kept"), 1, self.keep_list
        if self.embeddings is not None:
            found["embeddings"] = *sample_keys(self.embeddings), self.embeddings.folder
        if self.clusters is not None:
            found["clusters"] = parquet_keys(self.clusters.folder / TABLE), 1, self.clusters.folder / TABLE
        return found


@dataclasses.dataclass
class MatchCounts:
    """What matching found.

    Attributes:
        listed: Usable samples in the keep list.
        kept: Usable samples that it keeps.
        candidates: Samples to train on, before those without an embedding or clusters are left out.
        without_embedding: Those of them without an embedding.
        without_cluster: Those of them with an embedding, where one is required, that are not in the clusters' table.
        selected: Samples to train on.
        several_captions: Those of them that have several captions.
        captions: All their captions.
        bad_rows: Rows of the embeddings that are zero or not finite.
        changed: The first whose number of captions differs from what was embedded: key, captions, captions embedded.
    """

    listed: int = 0
    kept: int = 0
    candidates: int = 0
    without_embedding: int = 0
    without_cluster: int = 0
    selected: int = 0
    several_captions: int = 0
    captions: int = 0
    bad_rows: int = 0
    changed: tuple[str, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class MatchedSamples:
    """The samples of a run; `counts` are those of their making."""

    training: SampleRows
    held_out: SampleRows
    counts: MatchCounts

    @classmethod
    def open(cls, folder: Path, counts: dict[str, Any]) -> MatchedSamples:
        """Open finished files."""
        return cls(open_rows(folder, TRAINING), open_rows(folder, HELD_OUT), MatchCounts(**counts))


def match_samples(
    dataset: Dataset, sources: Sources, val_fraction: float, folder: Path, reporter: Reporter
) -> MatchedSamples:
    """Match the data with other files, shard by shard, and write down the samples to train on and those held out.

    A file in the data's order is read in step with the shards; one that turns out not to be is joined, and all begins anew.

    Args:
        val_fraction: Share of the samples held out: the keys whose hash falls below it.
    """
    index, joined = index_of(dataset), dict[str, Values]()
    bad = np.empty(0, np.int64) if sources.embeddings is None else sources.embeddings.find_bad_rows(texts=True)
    while True:
        matches = {
            name: JoinedMatch(joined[name]) if name in joined else OrderedMatch(stream, width)
            for name, (stream, width, _) in sources.streams().items()
        }
        counts, bar = MatchCounts(bad_rows=len(bad)), reporter if len(index.records) > _FEW_SHARDS else SilentReporter()
        with (
            _open_writers(index, sources, folder) as writers,
            bar.progress("match", len(index.records), "shards") as progress,
        ):
            for number in range(len(index.records)):
                part = index.part(number)
                keys = part.keys.combine_chunks().cast(pa.large_string())
                found = {name: match.match(keys) for name, match in matches.items()}
                if "embeddings" in found and len(bad):
                    found["embeddings"][np.isin(found["embeddings"][:, 0], bad), 0] = -1
                _match_shard(keys, part.num_captions, found, sources, val_fraction, writers, counts)
                progress.advance()
            unordered = [name for name, match in matches.items() if not match.is_complete()]
            if not unordered:
                return MatchedSamples(writers[TRAINING].finish(), writers[HELD_OUT].finish(), counts)
        for name in unordered:
            stream, width, source = sources.streams()[name]
            shards = (index.part(number).keys.combine_chunks() for number in range(len(index.records)))
            # The result stays mapped without its name, which NFS keeps until it is closed.
            with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
                joined[name] = join_stream(shards, int(index.sizes.sum()), stream, width, Path(scratch), source)


@contextmanager
def _open_writers(index: DataIndex, sources: Sources, folder: Path) -> Iterator[dict[str, SampleRowsWriter]]:
    """Begin the columns of both parts; they are closed in the end."""
    limits, embeddings, clusters = {"places": int(index.sizes.max())}, sources.embeddings, sources.clusters
    if embeddings is not None:
        limits["embeddings"] = embeddings.num_rows
        if Kind.FURTHER in embeddings.kinds:
            limits["captions"] = len(embeddings.rows(Kind.FURTHER)) + 1
    if clusters is not None:
        limits["clusters"] = len(clusters.labels)
    with ExitStack() as stack:
        yield {
            part: stack.enter_context(closing(SampleRowsWriter(folder, part, limits))) for part in (TRAINING, HELD_OUT)
        }


def _match_shard(
    keys: pa.Array,
    num_captions: npt.NDArray[np.int32],
    found: dict[str, Values],
    sources: Sources,
    val_fraction: float,
    writers: dict[str, SampleRowsWriter],
    counts: MatchCounts,
) -> None:
    """Decide which samples of a shard are trained on and held out, write them down and count them."""
    usable = num_captions > 0
    held_out = usable & (key_fractions(keys.to_pylist()) < val_fraction)
    selected = usable & ~held_out
    columns: dict[str, npt.NDArray[Any]] = {"places": np.arange(len(keys))}
    if "keep_list" in found:
        kept = found["keep_list"][:, 0]
        counts.listed += int(np.count_nonzero(usable & (kept >= 0)))
        counts.kept += int(np.count_nonzero(usable & (kept > 0)))
        selected &= kept > 0
    counts.candidates += int(np.count_nonzero(selected))
    if "embeddings" in found:
        columns["embeddings"] = rows = found["embeddings"][:, 0]
        counts.without_embedding += int(np.count_nonzero(selected & (rows < 0)))
        selected &= (rows >= 0) | (not sources.required)
        embedded = np.ones_like(rows)  # captions of each, unless they are counted
        if found["embeddings"].shape[1] > 1:
            columns["captions"], embedded = found["embeddings"][:, 1], found["embeddings"][:, 2]
        for place in np.flatnonzero(selected & (rows >= 0) & (embedded != num_captions))[:1].tolist():
            counts.changed = counts.changed or (keys[place].as_py(), int(num_captions[place]), int(embedded[place]))
    if "clusters" in found:
        columns["clusters"] = found["clusters"][:, 0]
        counts.without_cluster += int(np.count_nonzero(selected & (columns["clusters"] < 0)))
        selected &= (columns["clusters"] >= 0) | sources.required
    counts.selected += int(np.count_nonzero(selected))
    counts.several_captions += int(np.count_nonzero(num_captions[selected] > 1))
    counts.captions += int(num_captions[selected].sum())
    for part, chosen in ((TRAINING, selected), (HELD_OUT, held_out)):
        writers[part].append({name: values[chosen] for name, values in columns.items()})
