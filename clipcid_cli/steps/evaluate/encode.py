"""Embeddings of a data set for `eval-zeroshot`.

Batches never cross shards, are dealt to the processes, and come back in order: any number of processes and workers sees the
same batches, and so measures the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import torch
from PIL import Image

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Location, Sample
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.loading import default_workers, load_batches
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.models.clip_model import ClipModel, Tokenizer
from clipcid_cli.runtime.models.decode import SkippedImage, read_image
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.runtime.threads import map_threads, threads_for_batches
from clipcid_cli.steps.evaluate.tasks import CLASSIFICATION, ZeroshotTask
from clipcid_cli.steps.reporting import Progress


@dataclasses.dataclass(frozen=True)
class PreparedBatch:
    """One batch as a worker hands it over.

    Attributes:
        samples: The samples whose image could be read.
        pixels: uint8 [B, H, W, 3]; None when no image could be read.
        tokens: Captions of all samples one after another, int64 [M, L]; None for classification.
        skips: Images that could not be read.
    """

    samples: list[Sample]
    pixels: torch.Tensor | None
    tokens: torch.Tensor | None
    skips: Skips


@dataclasses.dataclass(frozen=True)
class PrepareBatch:
    """Decodes and tokenises one batch, in a worker.

    Attributes:
        transform: RGB image to uint8 [H, W, 3].
        tokenizer: Texts to int64 [M, L]; None where captions are not needed.
    """

    transform: Callable[[Image.Image], torch.Tensor]
    tokenizer: Tokenizer | None

    def __call__(self, samples: Sequence[Sample]) -> PreparedBatch:
        """Prepare the readable ones of `samples`."""
        skips, readable, pixels = Skips(), list[Sample](), list[torch.Tensor]()
        for sample in samples:
            image = read_image(sample.image)
            if isinstance(image, SkippedImage):
                skips.add(image.reason, sample.key)
                continue
            pixels.append(self.transform(image))
            readable.append(sample)
        tokens = None
        if self.tokenizer is not None and readable:
            tokens = self.tokenizer([caption for sample in readable for caption in sample.captions])
        return PreparedBatch(readable, torch.stack(pixels) if pixels else None, tokens, skips)


@dataclasses.dataclass(frozen=True)
class EncodedBatch:
    """One batch after the model, on the CPU.

    Attributes:
        number: Its place among all batches of the data set.
        images: float32 [B, D], unit rows.
        labels: int64 [B], or bool [B, C] where an image may have several classes; None for retrieval.
        texts: float32 [M, D], unit rows; None for classification.
        captions_per_image: Number of captions of each sample.
    """

    number: int
    keys: list[str]
    locations: list[Location]
    images: torch.Tensor
    labels: torch.Tensor | None
    texts: torch.Tensor | None
    captions_per_image: list[int]


class TaskReader:
    """Lists the batches of a task and counts what cannot be used.

    Attributes:
        skips: Samples without an image, a label or a caption; complete when all batches were listed.
    """

    def __init__(self, task: ZeroshotTask, batch_size: int) -> None:
        self.task, self.batch_size = task, batch_size
        self.skips, self.read = Skips(), 0

    def batches(self) -> Iterator[list[Sample]]:
        """Yield the batches of all shards in order."""
        for shard in self.task.dataset.shards:
            before = self.skips.total
            samples = [sample for sample in shard.samples(self.skips) if self.task.uses(sample)]
            self.read += len(samples) + self.skips.total - before
            usable = iter([sample for sample in samples if self._is_usable(sample)])
            while batch := list(islice(usable, self.batch_size)):
                yield batch

    def _is_usable(self, sample: Sample) -> bool:
        if self.task.task == CLASSIFICATION:
            if not self.task.has_label(sample):
                self.skips.add("no_label", sample.key)
                return False
        elif not sample.captions:
            self.skips.add("no_caption", sample.key)
            return False
        return True


def encode_task(
    model: ClipModel,
    task: ZeroshotTask,
    machine: Machine,
    precision: Precision,
    *,
    batch_size: int,
    workers: int | None,
    max_bad_fraction: float,
    progress: Progress,
) -> tuple[list[EncodedBatch], Skips]:
    """Embed a data set with all processes.

    Args:
        task: The data set and what is measured on it.
        precision: Number format of the products.
        workers: Processes that decode, 0 for none; None decodes on a GPU by `default_workers` processes, and on a CPU by the
            threads that compute.
        max_bad_fraction: Largest share of samples that may be unusable.

    Returns:
        All batches in order and what was skipped, on every process.

    Raises:
        ClipcidError: on every process, when the data is damaged, nothing in it is usable, or too much is not.
    """
    reader = TaskReader(task, batch_size)
    numbers: list[int] = []  # of this process's batches
    sizes: list[int] = []  # of all batches

    def mine() -> Iterator[list[Sample]]:
        for number, batch in enumerate(reader.batches()):
            sizes.append(len(batch))
            if number % machine.size == machine.rank:
                numbers.append(number)
                yield batch

    classify = task.task == CLASSIFICATION
    prepare = PrepareBatch(model.pixel_transform(), None if classify else model.tokenizer)
    encode = partial(_encode, model, task, precision)
    threads = threads_for_batches(machine.device)
    if workers is None and machine.device.type == "cpu":
        batches = map_threads(mine(), lambda samples: encode(prepare(samples)), threads)
    else:
        loaded = load_batches(mine(), prepare, default_workers() if workers is None else workers)
        batches = map_threads(loaded, encode, threads)
    encoded, unreadable, failure, shown = list[EncodedBatch](), Skips(), None, 0
    try:
        for place, (batch, skips) in enumerate(batches):
            unreadable.merge(skips)
            if batch is not None:
                encoded.append(dataclasses.replace(batch, number=numbers[place]))
            # The other processes are about as far: count every batch up to this one.
            progress.advance(sum(sizes[shown : numbers[place] + 1]))
            shown = numbers[place] + 1
    except ClipcidError as error:
        failure = error
    machine.agree(failure)
    progress.advance(sum(sizes[shown:]))
    skips = reader.skips  # every process lists all samples, but decodes only its own
    for other in machine.gather(unreadable):
        skips.merge(other)
    skips.check(reader.read, max_bad_fraction, task.dataset.spec, _fix(task))
    everything = sorted((batch for part in machine.gather(encoded) for batch in part), key=lambda batch: batch.number)
    if not everything:
        raise ClipcidError(f"{task.dataset.spec}: no sample can be used.\n{skips.describe()}", _fix(task))
    return everything, skips


def _fix(task: ZeroshotTask) -> str:
    if task.task == CLASSIFICATION:
        return "Classification needs an image and a class (a .cls, a `label` column or a folder) for each sample."
    return "Retrieval needs an image and at least one caption (a .txt or a caption column) for each sample."


def _encode(
    model: ClipModel, task: ZeroshotTask, precision: Precision, batch: PreparedBatch
) -> tuple[EncodedBatch | None, Skips]:
    """Embed one batch, whose number the caller knows; None when no image of it could be read."""
    if batch.pixels is None:
        return None, batch.skips
    encoded = EncodedBatch(
        number=-1,
        keys=[sample.key for sample in batch.samples],
        locations=[sample.image for sample in batch.samples],
        images=model.encode_images(batch.pixels, precision).cpu(),
        labels=task.labels(batch.samples) if task.task == CLASSIFICATION else None,
        texts=model.encode_texts(batch.tokens, precision).cpu() if batch.tokens is not None else None,
        captions_per_image=[len(sample.captions) for sample in batch.samples],
    )
    return encoded, batch.skips


def encode_classes(
    model: ClipModel, task: ZeroshotTask, machine: Machine, precision: Precision, batch_size: int
) -> torch.Tensor:
    """Embed the prompts of all classes, dealt to the processes by class.

    Returns:
        float32 [C, T, D], unit rows, on the CPU of every process.
    """
    classes_a_batch = max(1, batch_size // len(task.templates))
    starts = list(enumerate(range(0, len(task.class_names), classes_a_batch)))[machine.rank :: machine.size]

    def encode(place: tuple[int, int]) -> tuple[int, torch.Tensor]:
        number, start = place
        names = task.class_names[start : start + classes_a_batch]
        tokens = model.tokenizer([prompt for name in names for prompt in task.prompts(name)])
        parts = [model.encode_texts(part, precision).cpu() for part in torch.split(tokens, batch_size)]
        return number, torch.cat(parts).view(len(names), len(task.templates), -1)

    mine = list(map_threads(starts, encode, threads_for_batches(machine.device)))
    everything = sorted((part for parts in machine.gather(mine) for part in parts), key=lambda part: part[0])
    return torch.cat([prompts for _, prompts in everything])
