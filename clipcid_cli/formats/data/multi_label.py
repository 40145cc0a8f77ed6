"""Classes of images with several each: a list of numbers, or a vector with a 1 for each class of the image.

In tars the vector is the sample's ``.npy``, as in CLIP_benchmark's folders of ``dataset_type.txt`` multilabel; in
lists the ``label`` column holds the numbers (see `formats.data.folders_and_lists`).

Source: LAION-AI/CLIP_benchmark 1.6.2, datasets/builder.py, build_wds_dataset.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.samples import Sample

_WRITE = "rite a vector with a 1 for each class the image has and 0 for the others."


def read_classes(sample: Sample, num_classes: int) -> tuple[int, ...] | None:
    """Read the classes of a sample, also of one with a single class.

    Returns:
        Their numbers in [0, `num_classes`), ascending, possibly none; None when the sample has no class information.
    """
    if sample.multi_hot is not None:
        return tuple(np.flatnonzero(_read_vector(sample, num_classes)).tolist())
    classes = sample.labels if sample.labels is not None else (sample.label,) if sample.label is not None else None
    if classes is None:
        return None
    wrong = next((number for number in classes if not 0 <= number < num_classes), None)
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
        vector: npt.NDArray[Any] = np.load(io.BytesIO(sample.multi_hot.read()), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ClipcidError(f"The .npy of sample {sample.key} cannot be read: {error}.", f"W{_WRITE}") from error
    if vector.ndim != 1 or length not in (None, len(vector)) or not np.isin(vector, (0, 1)).all():
        wanted = "a vector of zeros and ones" if length is None else f"zeros and ones for {length} classes"
        raise ClipcidError(
            f"The .npy of sample {sample.key} is {vector.dtype} {list(vector.shape)}, not {wanted}.",
            f"{'W' if length is None else 'Give the matching list of class names with --classnames, and w'}{_WRITE}",
        )
    return vector
