"""Numbers of each sample that losses read beside features; computed by workers, in runs with a loss that reads them.

A new one is a function of the sample and its decoded image, here, and its name in `SAMPLE_INPUTS` of the table of losses.
It is called at every showing of a sample, and reads no file: a size that it needs may be unknown (`ByteRange.size` is
None). It returns a finite number for every sample; what it raises, an OSError too, is no skipped sample but ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from PIL import Image

from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.runtime.models.decode import full_size


def _width(_: Sample, image: Image.Image) -> float:
    return full_size(image)[0]


def _height(_: Sample, image: Image.Image) -> float:
    return full_size(image)[1]


COMPUTE: Mapping[str, Callable[[Sample, Image.Image], float]] = {
    "width": _width,  # of the image in its file, in pixels
    "height": _height,
}
"""By name. An image that cannot be read is white."""
