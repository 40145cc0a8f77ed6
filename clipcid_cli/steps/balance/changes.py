"""The classes, or words of captions, whose share of the images changed most: what the report of `balance` says of them."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.algorithms.near.exact import BoolArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.addresses import is_remote
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.steps.balance.rows import BalanceRows
from clipcid_cli.steps.balance.samples import take_texts

# Classes are stored with the images, so reading them reads the headers of every shard: some seconds for this many images.
_MAX_LABELS = 2**17
# Beyond this many images, the captions of every second, third, … are read; a share is then known within 0.2 points.
_MAX_CAPTIONS = 2**19
_CAPTIONS_AT_ONCE = 2**16
_CHANGES_SHOWN = 15
_MIN_WORD = 3
# English words of three letters and more that do not describe an image.
_ENGLISH = (
    "about above after again all also and any are because been before being below between both but can could did does "
    "doing down during each few for from further had has have having her here hers him his how into its itself just may "
    "might more most much must nor not now off once only other our out over own per same she should some such than that "
    "the their them then there these they this those through too under until upon very via was were what when where which "
    "while who whom why will with within without would you your"
)


@dataclasses.dataclass(frozen=True)
class LargestChanges:
    """The classes or words whose share changed most, the largest change first, and what was counted and what was not."""

    kind: str  # ``class``, ``word``, or empty where there are neither classes nor captions
    note: str
    # Those with a larger share of the kept images than of all: ``name``, the images ``before`` and ``after``,
    # ``share_before`` and ``share_after``.
    risen: list[dict[Any, Any]]
    fallen: list[dict[Any, Any]]  # those with a smaller share


def compare_classes(data: Dataset | None, embeddings: Embeddings, rows: BalanceRows, kept: BoolArray) -> LargestChanges:
    """Compare the kept images, bool [N], with all: by class where the data has classes, else by the words of captions.

    Classes are read where the data is local and has at most `_MAX_LABELS` images; captions are in the metadata.
    """
    unread = ""
    if data is not None and not any(is_remote(shard.file) for shard in data.shards):
        try:
            if _has_classes(data):
                labels = _read_labels(data) if len(rows) <= _MAX_LABELS else None
                if labels is not None:
                    return _compare_labels(data, labels, embeddings, rows, kept)
                unread = f" The classes of more than {_MAX_LABELS:,} images are not read for a report."
        except (ClipcidError, OSError) as error:
            unread = f" The classes cannot be read: {error}"
    step = max(1, -(-len(rows) // _MAX_CAPTIONS))
    pieces = embeddings.take_column(embeddings.captions_of, rows.numbers[::step])
    captions = pa.chunked_array(pieces, pa.large_string()).combine_chunks()
    kept = kept[::step]
    has_caption = pc.not_equal(captions, "").to_numpy(zero_copy_only=False)
    before, after = (int(np.count_nonzero(mask)) for mask in (has_caption, has_caption & kept))
    if not before:
        return LargestChanges("", f"There are neither classes nor captions to compare.{unread}", [], [])
    sample = f" (a sample of one image in {step})" if step > 1 else ""
    note = (
        f"Share of images whose caption has the word, among the {before:,} images and the {after:,} kept ones that have a "
        f"caption{sample}. Words of fewer than three letters and common English words are omitted.{unread}"
    )
    return LargestChanges("word", note, *_find_changes(count_words(captions, kept), before, after))


def _has_classes(data: Dataset) -> bool:
    """Tell whether an image of the first shard has a class: its index says so, else the shard is listed."""
    if data.index is not None:
        return data.index.records[0].with_labels > 0
    return any(sample.label is not None for sample in data.shards[0].samples())


def _read_labels(data: Dataset) -> dict[str, int | None] | None:
    """Read the class of each image by its key; None where there are more than `_MAX_LABELS`."""
    samples = itertools.chain.from_iterable(shard.samples() for shard in data.shards)
    labels = {sample.key: sample.label for sample in itertools.islice(samples, _MAX_LABELS + 1)}
    return labels if len(labels) <= _MAX_LABELS else None


def _compare_labels(
    data: Dataset, label_of: dict[str, int | None], embeddings: Embeddings, rows: BalanceRows, kept: BoolArray
) -> LargestChanges:
    labels = pd.Series(map(label_of.get, take_texts(embeddings, embeddings.keys_of, rows.numbers)), dtype="Int64")
    grouped = pd.DataFrame({"label": labels, "kept": kept}).groupby("label")["kept"]
    counts = pd.DataFrame({"before": grouped.size(), "after": grouped.sum()})
    counts["name"] = _name_classes(data, counts.index.tolist())
    before, after = (int(counts[column].sum()) for column in ("before", "after"))
    note = (
        f"Share of each of {len(counts):,} classes, among the {before:,} images and the {after:,} kept ones that have "
    )
    return LargestChanges("class", f"{note}one.", *_find_changes(counts, before, after))


def _name_classes(data: Dataset, labels: list[int]) -> list[str]:
    """Name the classes by their folders, by the data set's list of names, or else by number."""
    from clipcid_cli.formats.data.benchmark import find_benchmark_folder, read_class_names

    path = find_benchmark_folder(data.spec).class_names if data.kind == "benchmark" else None
    names = data.classes if data.classes is not None else () if path is None else read_class_names(path)
    return [names[label] if label < len(names) else f"class {label}" for label in labels]


def count_words(captions: pa.LargeStringArray, kept: BoolArray) -> pd.DataFrame:
    """Count the images whose caption has a word, runs of letters of any script in lower case; the omitted ones left out.

    Returns:
        For each word, in the order of their characters, its ``name``, and the images ``before`` and, of the kept, ``after``.
    """
    counts = list[pd.DataFrame]()
    for at in range(0, len(captions), _CAPTIONS_AT_ONCE):
        lists = pc.split_pattern_regex(pc.utf8_lower(captions.slice(at, _CAPTIONS_AT_ONCE)), r"[^\p{L}\p{M}]+")
        words = pc.list_flatten(lists).dictionary_encode()
        names = np.array(words.dictionary.to_pylist(), object)
        # Each pair of a caption and a word once, however often the word occurs in it.
        pairs = pd.unique(pc.list_parent_indices(lists).to_numpy() * len(names) + words.indices.to_numpy())
        caption, word = np.divmod(pairs, len(names))
        before, after = (np.bincount(words_of, minlength=len(names)) for words_of in (word, word[kept[at + caption]]))
        counts.append(pd.DataFrame({"before": before, "after": after}, names))
    totals = pd.concat(counts).groupby(level=0).sum().rename_axis("name").reset_index()
    is_counted = (totals["name"].str.len() >= _MIN_WORD) & ~totals["name"].isin(_ENGLISH.split())
    return totals.loc[is_counted]


def _find_changes(counts: pd.DataFrame, before: int, after: int) -> list[list[dict[Any, Any]]]:
    """Return what rose most and what fell most in its share of the images with a class or caption, ties in order."""
    shares = counts.assign(share_before=counts["before"] / before, share_after=counts["after"] / max(1, after))
    rise = shares["share_after"] - shares["share_before"]
    risen = rise[rise > 0].sort_values(ascending=False, kind="stable")
    fallen = rise[rise < 0].sort_values(kind="stable")
    return [shares.loc[changes.index[:_CHANGES_SHOWN]].to_dict("records") for changes in (risen, fallen)]
