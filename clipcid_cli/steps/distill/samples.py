"""The samples of a run: which can be trained on, which are held out, and where each is in the files of earlier steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.index import DataIndex, Part
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.join import Listing, Values, join, parquet_listing
from clipcid_cli.formats.output import OutputSpec, find_output, open_output, remove_leftovers
from clipcid_cli.formats.results.matched_samples import HELD_OUT, STEP, TRAINING, matched_folder, writing_rows
from clipcid_cli.formats.sidecar import Sidecar
from clipcid_cli.formats.skipped import list_rows, make_table
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.work_directory import CLUSTERS
from clipcid_cli.runtime.randomness import key_fractions
from clipcid_cli.steps import reporting
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings

if TYPE_CHECKING:
    from clipcid_cli.formats.results.clusters import Clusters

BoolArray = npt.NDArray[np.bool_]

# Captionless samples that are named.
_NAMED = 5
# Fewer shards than this are matched in a second or two.
_FEW_SHARDS = 100


@dataclasses.dataclass(frozen=True)
class UsableSamples:
    """How many samples of those read have an image and, where they are needed, a caption; the others are skipped."""

    total: int
    skips: Skips
    read: int


def index_of(dataset: Dataset) -> DataIndex:
    """Return the index of data for which `ensure_index` was called."""
    assert dataset.index is not None, "ensure_index was called"
    return dataset.index


def count_usable(
    dataset: Dataset,
    max_bad_fraction: float,
    *,
    captions: bool = True,
    may_lack_captions: bool = False,
    without_captions: str = "",
) -> UsableSamples:
    """Count the samples that can be trained on, with `captions` or without, from the records of the data's index.

    Args:
        may_lack_captions: Whether any number of samples may have none.
        without_captions: How to train on images alone, for the error; empty where that cannot be.
    """
    index = index_of(dataset)
    skips = Skips()
    without_caption = Skips()
    for shard, listed in enumerate(index.records):
        skips.merge(listed.skips)
        if captions and listed.with_captions < listed.samples:
            part = index.part(shard)
            places = np.flatnonzero(part.num_captions == 0)
            named = list(map(dataset.shards[shard].describe, part.keys.take(pa.array(places[:_NAMED])).to_pylist()))
            without_caption.merge(Skips({"no_caption": len(places)}, {"no_caption": named}))
    if not may_lack_captions:
        skips.merge(without_caption)
    total = sum(listed.with_captions if captions else listed.samples for listed in index.records)
    read = sum(listed.read for listed in index.records)
    if not total:
        where = f" {' or '.join(dataset.caption_keys)}" if dataset.caption_keys else ""
        fix = "Training needs captions: a .txt file next to each image, or what --caption-key names."
        if may_lack_captions:
            fix = "Check --student-caption-key: it names what holds the captions that the student reads."
        fixes = "\n".join(filter(None, [fix, without_captions]))
        raise ClipcidError(f"{dataset.spec}: none of {read:,} samples has a caption{where}.", fixes)
    skips.check(read, max_bad_fraction, dataset.spec)
    if may_lack_captions:
        skips.merge(without_caption)
    return UsableSamples(total, skips, read)


def list_skipped(dataset: Dataset, unreadable: Mapping[str, str], *, captions: bool = True) -> Iterator[pa.Table]:
    """List, shard by shard, the samples that cannot be trained on; of unreadable images the reason is given by key.

    With `captions` so are those without one.
    """
    index = index_of(dataset)
    reasons = {key: reason.partition(": ")[0] for key, reason in unreadable.items()}
    for shard, listed in enumerate(index.records):
        lacks_captions = captions and listed.with_captions < listed.samples
        if listed.skips.total == 0 and not lacks_captions and not reasons:
            continue  # its part need not be read
        part = index.part(shard)
        name = dataset.shards[shard].name
        yield make_table(part.skipped)
        keys = part.keys.combine_chunks()
        if lacks_captions:
            yield list_rows(keys.filter(pa.array(part.num_captions == 0)), name, "no_caption")
        yield make_table([(key, name, reasons[key]) for key in _select(keys, reasons)])


def count_unreadable(dataset: Dataset, unreadable: Mapping[str, str]) -> Skips:
    """Count unreadable images by the reason that is given of each key, and name them as other skipped samples are."""
    index = index_of(dataset)
    skips = Skips()
    for shard, opened in enumerate(dataset.shards if unreadable else ()):
        for key in _select(index.part(shard).keys.combine_chunks(), unreadable):
            skips.add(unreadable[key], opened.describe(key))
    return skips


def _select(keys: pa.Array, some: Mapping[str, str]) -> list[str]:
    """Return the keys that are among `some`."""
    chosen: list[str] = keys.filter(pc.is_in(keys, value_set=pa.array(some, pa.string()))).to_pylist()
    return chosen


@dataclasses.dataclass(frozen=True)
class Sources:
    """The files that the data is matched with, and what a sample must have to be trained on."""

    keep_list: Path | None = None
    embeddings: Embeddings | None = None
    required: bool = True  # whether it needs an embedding
    clusters: Clusters | None = None
    captions: bool = True  # whether it needs a caption

    def listings(self) -> dict[str, Listing]:
        """Return the keys of each file, with what is looked up by them."""
        listings: dict[str, Listing] = {}
        if self.keep_list is not None:
            listings["keep_list"] = parquet_listing(self.keep_list, "kept")
        if self.embeddings is not None:
            listings["embeddings"] = self.embeddings.listing()
        if self.clusters is not None:
            listings["clusters"] = parquet_listing(self.clusters.folder / CLUSTERS)
        return listings

    def limits(self, index: DataIndex) -> dict[str, int]:
        """Return the columns that are written, with a number that no value reaches."""
        limits = {"places": int(index.sizes.max())}
        if self.embeddings is not None:
            limits["embeddings"] = self.embeddings.num_rows
            if Kind.FURTHER in self.embeddings.kinds:
                limits["captions"] = len(self.embeddings.rows(Kind.FURTHER)) + 1
        if self.clusters is not None:
            limits["clusters"] = len(self.clusters.labels)
        return limits

    def fingerprints(self) -> list[FileRecord]:
        """Describe what the keys come from, beside the data and the keep list."""
        files: list[FileRecord] = []
        if self.embeddings is not None:
            files += self.embeddings.fingerprints([Kind.TEXTS, Kind.FURTHER])
        if self.clusters is not None:
            files.append(record(self.clusters.folder / CLUSTERS))
        return files


@dataclasses.dataclass
class MatchCounts:
    """How many samples the data shares with the files that it is matched with."""

    listed: int = 0  # usable samples in the keep list
    kept: int = 0  # usable samples that it keeps
    candidates: int = 0  # samples to train on, before those without an embedding or clusters are left out
    without_embedding: int = 0
    # Those of them with an embedding, where one is required, that are not in the clusters' table.
    without_cluster: int = 0
    selected: int = 0  # samples to train on
    several_captions: int = 0  # those of them that have several captions
    captions: int = 0  # all their captions
    bad_rows: int = 0  # rows of the embeddings that are zero or not finite
    # The first whose number of captions differs from what was embedded: key, captions, captions embedded.
    changed: tuple[str, int, int] | None = None


def find_samples(
    settings: DistillSettings,
    dataset: Dataset,
    sources: Sources,
    data_records: list[FileRecord],
    scratch: Path | None,
) -> tuple[Path, MatchCounts]:
    """Find the folder of the run's samples, matched by an earlier start or run of the same inputs; else match them now."""
    assert dataset.index_folder is not None, "opened with a folder for the index"
    identity = {
        # Keys of foreign embeddings may be made of the files' names.
        "files": [[Path(file.path).name, file.size, file.hash] for file in data_records + sources.fingerprints()],
        # Captions in files of their own change without a shard's file; with `--keys shard` the names are in the keys.
        "shards": [
            [shard.name, *listed.stamp, listed.samples, listed.with_captions]
            for shard, listed in zip(dataset.shards, index_of(dataset).records, strict=True)
        ],
        "kinds": [sources.keep_list is not None, sources.embeddings is not None, sources.clusters is not None],
        "required": sources.required,
        "captions": sources.captions,
        "keys": settings.keys,
        "val_fraction": settings.val_fraction,
    }
    folder = matched_folder(dataset.index_folder, identity)
    spec = OutputSpec(folder, STEP, Sidecar, settings={"matched": folder.name}, inputs=[], overwrite=True)
    matched = find_output(spec).finished
    if matched is None:
        if scratch is not None:
            folder = matched_folder(scratch, identity)
            spec = dataclasses.replace(spec, folder=folder)
        with open_output(spec, waits=True) as output:
            matched = output.finished  # another run may just have made it
            if matched is None:
                output.begin_work()
                counts = match_samples(dataset, sources, settings.val_fraction, output.work)
                outputs = [record(path, output.work) for path in sorted(output.work.glob("*.npy"))]
                matched = output.commit(counts=dataclasses.asdict(counts), seconds={}, outputs=outputs)
    elif scratch is None:
        remove_leftovers(spec)
    return folder, MatchCounts(**matched.counts)


def match_samples(dataset: Dataset, sources: Sources, val_fraction: float, folder: Path) -> MatchCounts:
    """Match the data with other files, and write down the samples to train on and those held out, shard by shard."""
    index = index_of(dataset)
    shards = range(len(index.records))

    def read_keys() -> Iterator[pa.ChunkedArray]:
        for shard in shards:
            yield index.part(shard).keys

    joined = dict[str, Values]()
    for name, listing in sources.listings().items():
        joined[name] = join(read_keys, int(index.sizes.sum()), listing, folder)
    bad = np.empty(0, np.int64) if sources.embeddings is None else sources.embeddings.find_bad_rows(texts=True)
    counts = MatchCounts(bad_rows=len(bad))
    show = reporting.progress if len(shards) > _FEW_SHARDS else Reporter().progress
    limits = sources.limits(index)
    first = 0
    with (
        writing_rows(folder, TRAINING, limits) as train,
        writing_rows(folder, HELD_OUT, limits) as hold_out,
        show("match", len(shards), "shards") as progress,
    ):
        for shard in shards:
            part = index.part(shard)
            matches = {name: values[first : first + len(part)] for name, values in joined.items()}
            if "embeddings" in matches and len(bad):
                is_bad = np.isin(matches["embeddings"][:, 0], bad)
                matches["embeddings"][is_bad, 0] = -1
            columns, selected, held_out = _match_shard(part, matches, sources, val_fraction, counts)
            train({name: values[selected] for name, values in columns.items()})
            hold_out({name: values[held_out] for name, values in columns.items()})
            first += len(part)
            progress.advance()
    return counts


def _match_shard(
    samples: Part, matches: dict[str, Values], sources: Sources, val_fraction: float, counts: MatchCounts
) -> tuple[dict[str, npt.NDArray[Any]], BoolArray, BoolArray]:
    """Return the columns of a shard's n samples, which are trained on and which are held out, bool [n]; count them."""
    keys, num_captions = samples.keys, samples.num_captions
    required = sources.required
    usable = num_captions > 0 if sources.captions else np.ones(len(keys), bool)
    columns: dict[str, npt.NDArray[Any]] = {"places": np.arange(len(keys))}
    if "keep_list" in matches:
        kept = matches["keep_list"][:, 0]
        counts.listed += int(np.count_nonzero(usable & (kept >= 0)))
        # A dropped image may be a copy of one that is trained on: it is not held out either.
        usable &= kept > 0
        counts.kept += int(np.count_nonzero(usable))
    held_out = usable & (key_fractions(keys.to_pylist()) < val_fraction)
    selected = usable & ~held_out
    counts.candidates += int(np.count_nonzero(selected))
    if "embeddings" in matches:
        columns["embeddings"] = rows = matches["embeddings"][:, 0]
        counts.without_embedding += int(np.count_nonzero(selected & (rows < 0)))
        selected &= (rows >= 0) | (not required)
        embedded = np.ones_like(rows)  # captions of each, unless they are counted
        if matches["embeddings"].shape[1] > 1:
            columns["captions"], embedded = matches["embeddings"][:, 1], matches["embeddings"][:, 2]
        for place in np.flatnonzero(selected & (rows >= 0) & (embedded != num_captions))[:1].tolist():
            counts.changed = counts.changed or (keys[place].as_py(), int(num_captions[place]), int(embedded[place]))
    if "clusters" in matches:
        columns["clusters"] = matches["clusters"][:, 0]
        counts.without_cluster += int(np.count_nonzero(selected & (columns["clusters"] < 0)))
        # Samples that could not be embedded have no cluster, and are left out. Where stored embeddings are required, the
        # others all have one: what lacks it stays, for `choose_clusters` to refuse.
        selected &= (columns["clusters"] >= 0) | required
    counts.selected += int(np.count_nonzero(selected))
    counts.several_captions += int(np.count_nonzero(num_captions[selected] > 1))
    counts.captions += int(num_captions[selected].sum())
    return columns, selected, held_out
