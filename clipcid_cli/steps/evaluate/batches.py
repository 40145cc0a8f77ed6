"""The batches of an evaluated data set: which samples they hold, and how they are decoded.

Batches never cross shards, so any number of processes and workers sees the same batches and measures the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from PIL import Image

from clipcid_cli.formats.data.dataset import Sample
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.models.decode import SkippedImage, read_image
from clipcid_cli.runtime.models.tokenizer import Tokenizer
from clipcid_cli.steps.evaluate.tasks import CLASSIFICATION, ZeroshotTask


@dataclasses.dataclass(frozen=True)
class DecodedBatch:
    """One batch as a worker returns it.

    Attributes:
        samples: The samples whose image could be decoded.
        pixels: uint8 [B, H, W, 3]; None when no image could be decoded.
        tokens: Captions of all samples one after another, int64 [M, L]; None for classification.
        skips: Images that could not be decoded.
    """

    samples: list[Sample]
    pixels: torch.Tensor | None
    tokens: torch.Tensor | None
    skips: Skips


@dataclasses.dataclass(frozen=True)
class BatchDecoder:
    """Decodes and tokenises batches, in a worker.

    Attributes:
        transform: RGB image to uint8 [H, W, 3].
        tokenizer: Texts to int64 [M, L]; None where captions are not needed.
    """

    transform: Callable[[Image.Image], torch.Tensor]
    tokenizer: Tokenizer | None

    def __call__(self, samples: Sequence[Sample]) -> DecodedBatch:
        """Decode the readable ones of `samples`."""
        skips, readable, pixels = Skips(), list[Sample](), list[torch.Tensor]()
        for sample in samples:
            image = read_image(sample.image)
            if isinstance(image, SkippedImage):
                skips.add(image.reason, sample.key)
                continue
            pixels.append(self.transform(image))
            readable.append(sample.without_image_data())
        tokens = None
        if self.tokenizer is not None and readable:
            tokens = self.tokenizer([caption for sample in readable for caption in sample.captions])
        return DecodedBatch(readable, torch.stack(pixels) if pixels else None, tokens, skips)


class TaskReader:
    """Lists the batches of a task and counts the samples that cannot be used.

    Attributes:
        skips: Samples without an image, a label or a caption; complete once all batches have been listed.
        read: Samples of the task so far, usable or not.
    """

    def __init__(self, task: ZeroshotTask, batch_size: int) -> None:
        self.task, self.batch_size = task, batch_size
        self.skips, self.read = Skips(), 0

    def batches(self) -> Iterator[list[Sample]]:
        """Yield the batches of all shards in order."""
        listed = Skips()
        for samples in self.task.samples(listed):
            usable = filter(self._is_usable, samples)
            while batch := list(islice(usable, self.batch_size)):
                yield batch
        self.read += listed.total
        self.skips.merge(listed)

    def _is_usable(self, sample: Sample) -> bool:
        self.read += 1
        if self.task.task == CLASSIFICATION:
            if not self.task.has_label(sample):
                self.skips.add("no_label", sample.key)
                return False
        elif not sample.captions:
            self.skips.add("no_caption", sample.key)
            return False
        return True
