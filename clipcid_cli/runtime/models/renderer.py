"""The one way from an image to the pixels that a model takes: whole, as evaluation shows it, or as a view does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipcid_cli.runtime.models.decode import full_size

if TYPE_CHECKING:
    from clipcid_cli.runtime.models.clip_model import ClipModel
    from clipcid_cli.runtime.models.tokenizers import Tokenizer
    from clipcid_cli.runtime.models.views import Box, View


@dataclasses.dataclass(frozen=True)
class Renderer:
    """Makes the pixels that a model takes of an image: as evaluation shows it, or as a view does; picklable."""

    preprocess: dict[str, Any]  # open_clip's PreprocessCfg

    def __call__(self, image: Image.Image, view: View | None = None) -> npt.NDArray[np.uint8]:
        """Return uint8 [H, W, 3] of an RGB image of any size; the colours of a view are left as they are."""
        if view is not None:
            return self._crop(image, view)
        for step in self._steps:
            image = step(image)
        return np.asarray(image)

    @cached_property
    def _steps(self) -> list[Callable[[Image.Image], Image.Image]]:
        """Resize and crop; with the normalisation after them, open_clip's evaluation transform bit for bit."""
        from clipcid_cli.runtime.models.guarded_open_clip import open_clip

        preprocess = open_clip.transform.PreprocessCfg(**self.preprocess)
        transform = open_clip.transform.image_transform_v2(preprocess, is_train=False)
        return list(transform.transforms[:-2])  # without its last two, ToTensor and Normalize

    def _crop(self, image: Image.Image, view: View) -> npt.NDArray[np.uint8]:
        """Crop, and resize to the model's size, whatever the crop's shape."""
        name = self.preprocess.get("interpolation", "bicubic").upper()  # open_clip also knows "random"
        resampling = getattr(Image.Resampling, name, Image.Resampling.BICUBIC)
        box, full = view.box, full_size(image)
        if full != image.size:
            sides = zip(box, full * 2, image.size * 2, strict=True)
            box = cast("Box", tuple(min(edge * here / there, here) for edge, there, here in sides))
        return np.asarray(image.resize(self.size, resampling, box=box))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the pixels."""
        size = self.preprocess["size"]
        height, width = (size, size) if isinstance(size, int) else size
        return width, height

    def draft_size(self, crop_scale: float = 1.0) -> tuple[int, int]:
        """Return the least width and height to decode, so that a crop of this share has twice the model's size."""
        width, height = (math.ceil(2 * side / math.sqrt(crop_scale)) for side in self.size)
        return width, height


@dataclasses.dataclass(frozen=True)
class Processor:
    """How one model takes images and captions; picklable."""

    render: Renderer
    tokenizer: Tokenizer

    @classmethod
    def from_model(cls, model: ClipModel) -> Processor:
        return cls(Renderer(model.info.preprocess), model.tokenizer)
