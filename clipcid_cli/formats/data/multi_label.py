"""Classes of images with several each: a list of numbers, or a vector with a 1 for each class of the image.

In tars the vector is the sample's ``.npy``, as in CLIP_benchmark's folders of ``dataset_type.txt`` multilabel; in
lists the ``label`` column holds the numbers (see `formats.data.sample_list`).

Source: LAION-AI/CLIP_benchmark 1.6.2, datasets/builder.py, build_wds_dataset.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.samples import Sample


def read_classes(sample: Sample, num_classes: int) -> tuple[int, ...] | None:
    """Read the classes of a sample, also of one with a single class.

    Args:
        num_classes: Number of class names there are.

    Returns:
        Their numbers, ascending, possibly none; None when the sample has no class information.

    Raises:
        ClipcidError: when its vector is not zeros and ones for each class, or a number is out of range.
    """
    if sample.multi_hot is not None:
        return _read_vector(sample, num_classes)
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
    """Read the length of a sample's vector, the number of classes.

    Raises:
        ClipcidError: when it is not a vector of zeros and ones.
    """
    vector = _load(sample)
    if vector.ndim != 1 or not np.isin(vector, (0, 1)).all():
        raise ClipcidError(
            f"The .npy of sample {sample.key} is {vector.dtype} {list(vector.shape)}, not a vector of zeros and ones.",
            "Write a vector with a 1 for each class the image has and 0 for the others.",
        )
    return len(vector)


def _read_vector(sample: Sample, num_classes: int) -> tuple[int, ...]:
    vector = _load(sample)
    if vector.shape != (num_classes,) or not np.isin(vector, (0, 1)).all():
        raise ClipcidError(
            f"The .npy of sample {sample.key} is {vector.dtype} {list(vector.shape)}, not zeros and ones for "
            f"{num_classes} classes.",
            "Give the matching list of class names with --classnames, and write a 1 for each class the image has.",
        )
    return tuple(int(number) for number in np.flatnonzero(vector))


def _load(sample: Sample) -> npt.NDArray[Any]:
    assert sample.multi_hot is not None
    try:
        vector: npt.NDArray[Any] = np.load(io.BytesIO(sample.multi_hot.read()), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ClipcidError(
            f"The .npy of sample {sample.key} cannot be read: {error}.",
            "Write a vector with a 1 for each class the image has and 0 for the others.",
        ) from error
    return vector
