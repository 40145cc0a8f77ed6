"""What moved when images were dropped: the shares of classes, or of the words of captions where there are no classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clipcid_cli.algorithms.search.distances import IntArray
from clipcid_cli.algorithms.sets.composition import Change, Composition, compose_classes, compose_words
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark_folder import find_benchmark_folder
from clipcid_cli.formats.data.class_files import read_class_names
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.remote import is_url
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.steps.balance.samples import SampleFinder
from clipcid_cli.steps.balance.search import Survey

# Classes lie beside the images, so reading them reads the headers of every shard: some seconds for this many images.
_MOST_LABELS = 2**17
# Of more images than these the captions of every second, third, … are read; a share is then known within 0.2 points.
_MOST_CAPTIONS = 2**19
_CAPTIONS_AT_ONCE = 2**16
_SHOWN = 15

BoolArray = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class ClassBalance:
    """What moved most.

    Attributes:
        kind: ``class``, ``word``, or nothing where there are neither classes nor captions.
        note: What was looked at, and what was not.
        risen: What is a larger share of the kept images than of all, the largest change first.
        fallen: What is a smaller share of them.
    """

    kind: str
    note: str
    risen: list[Change]
    fallen: list[Change]


def compare_classes(data: Dataset | None, embeddings: Embeddings, survey: Survey, kept: BoolArray) -> ClassBalance:
    """Compare the kept images with all, by class where the data has classes, else by the words of the captions.

    Args:
        data: The data, where it can be opened. Its classes are read when it is local and has no more than `_MOST_LABELS`
            images; captions come from the embeddings' metadata.
        kept: Which of them are kept, bool [N].
    """
    unread = ""
    if data is not None and not is_url(data.spec):
        try:
            if any(sample.label is not None for sample in data.shards[0].samples()):
                if survey.num_rows <= _MOST_LABELS:
                    return _by_class(data, embeddings, survey, kept)
                unread = f" The classes of more than {_MOST_LABELS:,} images are not read for a report."
        except (ClipcidError, OSError) as error:
            unread = f" The classes cannot be read: {error}"
    step = -(-survey.num_rows // _MOST_CAPTIONS)
    composition = compose_words(_captions(embeddings, survey, kept, step))
    if not composition.num_before:
        return ClassBalance("", f"There are neither classes nor captions to compare.{unread}", [], [])
    sample = f", looking at one image in {step}" if step > 1 else ""
    note = (
        f"Share of images whose caption has the word, among {_of(composition)} that have a caption{sample}. Words of less "
        f"than three letters and common English ones are left out.{unread}"
    )
    return ClassBalance("word", note, *composition.largest_changes(_SHOWN))


def _by_class(data: Dataset, embeddings: Embeddings, survey: Survey, kept: BoolArray) -> ClassBalance:
    finder, numbers = SampleFinder(data), pa.array(survey.readable)
    names = zip(embeddings.shards.take(numbers).to_pylist(), embeddings.keys.take(numbers).to_pylist(), strict=True)
    samples = [finder.find(shard, key) for shard, key in names]
    labels = np.array([-1 if sample is None or sample.label is None else sample.label for sample in samples], np.int64)
    classes, position = np.unique(labels[labels >= 0], return_inverse=True)
    composition = compose_classes(position, kept[labels >= 0], _class_names(data, classes))
    note = f"Share of each of {len(classes):,} classes, among {_of(composition)} that have one."
    return ClassBalance("class", note, *composition.largest_changes(_SHOWN))


def _class_names(data: Dataset, classes: IntArray) -> list[str]:
    """Name the classes: by their folders, by the data set's list of names, or else by number."""
    path = find_benchmark_folder(data.spec).class_names if data.kind == "benchmark" else None
    names = data.classes if data.classes is not None else () if path is None else read_class_names(path)
    return [names[number] if number < len(names) else f"class {number}" for number in classes.tolist()]


def _captions(
    embeddings: Embeddings, survey: Survey, kept: BoolArray, step: int
) -> Iterator[tuple[pa.ChunkedArray, BoolArray]]:
    """Yield captions of every `step`-th row and whether it is kept."""
    rows = np.arange(0, survey.num_rows, step)
    numbers = survey.readable[rows]
    for file, captions in embeddings.captions_by_file():
        start, stop = np.searchsorted(numbers, [file.first, file.first + file.rows])
        for at in range(int(start), int(stop), _CAPTIONS_AT_ONCE):
            part = slice(at, min(at + _CAPTIONS_AT_ONCE, int(stop)))
            yield captions.take(pa.array(numbers[part] - file.first)).combine_chunks(), kept[rows[part]]


def _of(composition: Composition) -> str:
    return f"the {composition.num_before:,} images and the {composition.num_after:,} kept ones"
