"""Classes of samples: numbers of a `.cls`, a column or a folder, vectors of zeros and ones, and metadata of groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import parse_npy
from clipcid_cli.formats.data.samples import Sample

_VECTOR = "a vector with a 1 for each class the image has and 0 for the others."


def read_classes(sample: Sample, num_classes: int) -> tuple[int, ...] | None:
    """Return the numbers of a sample's classes in [0, `num_classes`), ascending, none or more; None where nothing says."""
    if sample.multi_hot is not None:
        return tuple(np.flatnonzero(_read_vector(sample, num_classes)).tolist())
    classes = sample.labels
    if classes is None:
        if sample.label is None:
            return None
        classes = (sample.label,)
    wrong = next((label for label in classes if not 0 <= label < num_classes), None)
    if wrong is not None:
        raise ClipcidError(
            f"Sample {sample.key} has class {wrong}; there are {num_classes} class names (0 … {num_classes - 1}).",
            "Give the matching list of class names with --classnames.",
        )
    return tuple(sorted(classes))


def read_vector_length(sample: Sample) -> int:
    """Read the length of a sample's vector, the number of classes."""
    return len(_read_vector(sample, None))


def _read_vector(sample: Sample, length: int | None) -> npt.NDArray[Any]:
    """Read a vector of zeros and ones, of any length where `length` is None."""
    assert sample.multi_hot is not None
    try:
        vector = parse_npy(sample.multi_hot.read())
    except (OSError, ValueError) as error:
        raise ClipcidError(f"The .npy of sample {sample.key} cannot be read: {error}.", f"Write {_VECTOR}") from error
    if vector.ndim != 1 or length not in (None, len(vector)) or not np.isin(vector, (0, 1)).all():
        wanted = "a vector of zeros and ones" if length is None else f"zeros and ones for {length} classes"
        raise ClipcidError(
            f"The .npy of sample {sample.key} is {vector.dtype} {list(vector.shape)}, not {wanted}.",
            ("Write " if length is None else "Give the matching list of class names with --classnames, or write ")
            + _VECTOR,
        )
    return vector


def read_metadata(sample: Sample, place: int) -> int:
    """Return one number, 0 or more, of the vector of metadata that a sample has in its ``.npy``, as of WILDS."""
    try:
        if sample.multi_hot is None:
            raise ValueError("it has none")
        numbers = parse_npy(sample.multi_hot.read())
        if numbers.ndim != 1 or numbers.dtype.kind not in "iuf" or not 0 <= numbers[place] < 2**31:
            raise ValueError(f"it is {numbers.dtype} {list(numbers.shape)}")
    except (OSError, ValueError, IndexError) as error:
        raise ClipcidError(
            f"The .npy of sample {sample.key}, of which number {place} is its group, cannot be read: {error}.",
            "Get the copy of the data set that DataComp evaluates: its shards have a .npy beside each image.",
        ) from error
    return int(numbers[place])
