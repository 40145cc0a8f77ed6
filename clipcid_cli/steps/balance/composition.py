"""How the shares of classes, or else of words in captions, changed when images were dropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.algorithms.sets.composition import CaptionWords, Change, Composition, compose_classes, compose_words
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark_folder import find_benchmark_folder
from clipcid_cli.formats.data.caption_words import split_words
from clipcid_cli.formats.data.class_files import read_class_names
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.remote import is_remote
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.steps.balance.rows import BalanceRows, BoolArray, take_column
from clipcid_cli.steps.balance.samples import SampleFinder

# Classes are stored with the images, so reading them reads the headers of every shard: some seconds for this many images.
_MOST_LABELS = 2**17
# Beyond this many images, the captions of every second, third, … are read; a share is then known within 0.2 points.
_MOST_CAPTIONS = 2**19
_CAPTIONS_AT_ONCE = 2**16
_SHOWN = 15


@dataclasses.dataclass(frozen=True)
class ShareChanges:
    """The classes or words whose share changed most.

    Attributes:
        kind: ``class``, ``word``, or empty where there are neither classes nor captions.
        note: What was counted, and what was not.
        risen: Those with a larger share of the kept images than of all, the largest change first.
        fallen: Those with a smaller share.
    """

    kind: str
    note: str
    risen: list[Change]
    fallen: list[Change]


def compare_classes(data: Dataset | None, embeddings: Embeddings, rows: BalanceRows, kept: BoolArray) -> ShareChanges:
    """Compare the kept images with all, by class where the data has classes, else by the words of the captions.

    Args:
        data: The data, where it can be opened. Its classes are read when it is local and has at most `_MOST_LABELS` images;
            captions come from the embeddings' metadata.
        kept: Which of the rows are kept, bool [N].
    """
    unread = ""
    if data is not None and not any(is_remote(shard.file) for shard in data.shards):
        try:
            if any(sample.label is not None for sample in data.shards[0].samples()):
                if len(rows) <= _MOST_LABELS:
                    return _by_class(data, embeddings, rows, kept)
                unread = f" The classes of more than {_MOST_LABELS:,} images are not read for a report."
        except (ClipcidError, OSError) as error:
            unread = f" The classes cannot be read: {error}"
    step = -(-len(rows) // _MOST_CAPTIONS)
    composition = compose_words(_split_captions(embeddings, rows, kept, step))
    if not composition.num_before:
        return ShareChanges("", f"There are neither classes nor captions to compare.{unread}", [], [])
    sample = f" (a sample of one image in {step})" if step > 1 else ""
    note = (
        f"Share of images whose caption has the word, among {_of(composition)} that have a caption{sample}. Words of "
        f"fewer than three letters and common English words are omitted.{unread}"
    )
    return ShareChanges("word", note, *composition.largest_changes(_SHOWN))


def _by_class(data: Dataset, embeddings: Embeddings, rows: BalanceRows, kept: BoolArray) -> ShareChanges:
    # The index does not hold classes.
    samples = SampleFinder(dataclasses.replace(data, index=None)).find_rows(embeddings, rows.numbers)
    labels = np.array([-1 if sample is None or sample.label is None else sample.label for sample in samples], np.int64)
    classes, position = np.unique(labels[labels >= 0], return_inverse=True)
    composition = compose_classes(position, kept[labels >= 0], _class_names(data, classes))
    note = f"Share of each of {len(classes):,} classes, among {_of(composition)} that have one."
    return ShareChanges("class", note, *composition.largest_changes(_SHOWN))


def _class_names(data: Dataset, classes: IntArray) -> list[str]:
    """Name the classes by their folders, by the data set's list of names, or else by number."""
    path = find_benchmark_folder(data.spec).class_names if data.kind == "benchmark" else None
    names = data.classes if data.classes is not None else () if path is None else read_class_names(path)
    return [names[number] if number < len(names) else f"class {number}" for number in classes.tolist()]


def _split_captions(embeddings: Embeddings, rows: BalanceRows, kept: BoolArray, step: int) -> Iterator[CaptionWords]:
    """Yield the words in the captions of every `step`-th row."""
    pieces = take_column(embeddings, embeddings.captions_of, rows.numbers[::step])
    captions = pa.chunked_array(pieces, pa.large_string()).combine_chunks()
    for at in range(0, len(captions), _CAPTIONS_AT_ONCE):
        part = captions.slice(at, _CAPTIONS_AT_ONCE)
        has_caption = pc.not_equal(part, "").to_numpy(zero_copy_only=False)
        yield CaptionWords(*split_words(part), has_caption, kept[::step][at : at + len(part)])


def _of(composition: Composition) -> str:
    return f"the {composition.num_before:,} images and the {composition.num_after:,} kept ones"
