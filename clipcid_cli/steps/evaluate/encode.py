"""Embeddings of a data set: its batches are dealt to the processes and return in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import ByteRange, Sample
from clipcid_cli.formats.data.remote import is_remote
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.pipeline import (
    default_workers,
    ordered_map,
    read_ahead,
    start_worker_server,
    thread_map,
    threads_for_batches,
)
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.steps.evaluate.batches import BatchDecoder, DecodedBatch, TaskReader
from clipcid_cli.steps.evaluate.tasks import CLASSIFICATION, ZeroshotTask
from clipcid_cli.steps.reporting import Progress, Reporter


@dataclasses.dataclass(frozen=True)
class EmbeddedBatch:
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
    locations: list[ByteRange]
    images: torch.Tensor
    labels: torch.Tensor | None
    texts: torch.Tensor | None
    captions_per_image: list[int]


def start_workers(machine: Machine, workers: int | None) -> None:
    """Start the server of the workers that `TaskEncoder` will use, if any, so that its imports run while a model loads."""
    if workers or (workers is None and machine.device.type == "cuda"):
        start_worker_server()


@dataclasses.dataclass(frozen=True)
class TaskEncoder:
    """Embeds data sets and class prompts with one model, on all processes.

    Attributes:
        precision: Number format of the products.
        batch_size: Images, or texts, embedded at once.
        workers: Processes that decode, 0 for none; None decodes on a GPU by `default_workers` processes, and on a CPU by the
            threads that compute.
        max_bad_fraction: Largest share of samples that may be unusable.
    """

    model: ClipModel
    machine: Machine
    precision: Precision
    batch_size: int
    workers: int | None
    max_bad_fraction: float
    reporter: Reporter

    def encode(self, task: ZeroshotTask) -> tuple[list[EmbeddedBatch], Skips]:
        """Embed a data set.

        Returns:
            All batches in order and what was skipped, on every process.
        """
        with self.reporter.progress(f"{self.model.info.slug} on {task.name}", None, "images") as progress:
            return self._encode(task, progress)

    def _encode(self, task: ZeroshotTask, progress: Progress) -> tuple[list[EmbeddedBatch], Skips]:
        machine = self.machine
        reader = TaskReader(task, self.batch_size)
        numbers: list[int] = []  # of this process's batches
        sizes: list[int] = []  # of all batches

        def mine() -> Iterator[list[Sample]]:
            for number, batch in enumerate(reader.batches()):
                sizes.append(len(batch))
                if number % machine.size == machine.rank:
                    numbers.append(number)
                    yield batch

        encoded, unreadable, failure, shown = list[EmbeddedBatch](), Skips(), None, 0
        try:
            for place, (batch, skips) in enumerate(self._embed_batches(task, mine())):
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
        skips.check(reader.read, self.max_bad_fraction, task.dataset.spec, _describe_need(task))
        everything = sorted(
            (batch for part in machine.gather(encoded) for batch in part), key=lambda batch: batch.number
        )
        if not everything and not reader.read and task.held_out is not None:
            raise ClipcidError(
                f"Of {task.dataset.spec} the {task.held_out:.2%} held out are no sample.",
                "Name a data set (clipcid eval-zeroshot MODEL DATA), or train with a larger --val-fraction.",
            )
        if not everything:
            raise ClipcidError(f"{task.dataset.spec}: no sample can be used.\n{skips.describe()}", _describe_need(task))
        return everything, skips

    def _embed_batches(
        self, task: ZeroshotTask, batches: Iterator[list[Sample]]
    ) -> Iterator[tuple[EmbeddedBatch | None, Skips]]:
        """Decode and embed batches in order, by worker processes or by the threads that compute."""
        device, workers = self.machine.device, self.workers
        decode = BatchDecoder(
            self.model.pixel_transform(), None if task.task == CLASSIFICATION else self.model.tokenizer
        )
        threads = threads_for_batches(device)
        if any(is_remote(shard.file) for shard in task.dataset.shards):
            batches = read_ahead(batches, threads)
        if workers is None and device.type == "cpu":
            return thread_map(lambda samples: self._embed(task, decode(samples)), batches, threads)
        decoded = ordered_map(decode, batches, default_workers(device) if workers is None else workers)
        return thread_map(lambda batch: self._embed(task, batch), decoded, threads)

    def _embed(self, task: ZeroshotTask, batch: DecodedBatch) -> tuple[EmbeddedBatch | None, Skips]:
        """Embed one batch, whose number the caller knows; None when no image of it can be used."""
        if batch.pixels is None:
            return None, batch.skips
        model, precision, samples = self.model, self.precision, batch.samples
        images = model.encode_images(batch.pixels, precision).cpu()
        texts = model.encode_texts(batch.tokens, precision).cpu() if batch.tokens is not None else None
        finite_B = torch.isfinite(images).all(dim=1)
        if texts is not None:
            captions_B = torch.tensor([len(sample.captions) for sample in samples])
            owners_M = torch.repeat_interleave(torch.arange(len(samples)), captions_B)
            finite_B[owners_M[~torch.isfinite(texts).all(dim=1)]] = False
            texts = texts[finite_B[owners_M]]
        for sample, finite in zip(samples, finite_B.tolist(), strict=True):
            if not finite:
                batch.skips.add("nan_row", sample.key)
        samples = [sample for sample, finite in zip(samples, finite_B.tolist(), strict=True) if finite]
        if not samples:
            return None, batch.skips
        embedded = EmbeddedBatch(
            number=-1,
            keys=[sample.key for sample in samples],
            locations=[sample.image for sample in samples],
            images=images[finite_B],
            labels=task.labels(samples) if task.task == CLASSIFICATION else None,
            texts=texts,
            captions_per_image=[len(sample.captions) for sample in samples],
        )
        return embedded, batch.skips

    def encode_classes(self, task: ZeroshotTask) -> torch.Tensor:
        """Embed the prompts of all classes, which are dealt to the processes by class.

        Returns:
            float32 [C, T, D], unit rows, on the CPU of every process.
        """
        machine = self.machine
        classes_per_batch = max(1, self.batch_size // len(task.templates))
        starts = list(enumerate(range(0, len(task.class_names), classes_per_batch)))[machine.rank :: machine.size]

        def encode(place: tuple[int, int]) -> tuple[int, torch.Tensor]:
            number, start = place
            names = task.class_names[start : start + classes_per_batch]
            tokens = self.model.tokenizer([prompt for name in names for prompt in task.prompts(name)])
            parts = [
                self.model.encode_texts(part, self.precision).cpu() for part in torch.split(tokens, self.batch_size)
            ]
            return number, torch.cat(parts).view(len(names), len(task.templates), -1)

        mine = list(thread_map(encode, starts, threads_for_batches(machine.device)))
        everything = sorted((part for parts in machine.gather(mine) for part in parts), key=lambda part: part[0])
        prompts_CTD = torch.cat([prompts for _, prompts in everything])
        bad_C = ~torch.isfinite(prompts_CTD).all(dim=2).all(dim=1)
        if bool(bad_C.any()):
            first = task.class_names[int(bad_C.int().argmax())]
            raise ClipcidError(
                f"{task.name}: the prompts of {int(bad_C.sum()):,} of {len(bad_C):,} classes have embeddings that are not "
                f"finite, first those of {first!r}.",
                "Use --precision fp32, or another model.",
            )
        return prompts_CTD


def warn_of_skips(task: ZeroshotTask, skips: Skips, reporter: Reporter) -> None:
    """Name the samples of a task that could not be used, if any."""
    if skips.total:
        reporter.warn(f"{task.name}: {skips.total} samples were skipped.\n{skips.describe()}")


def _describe_need(task: ZeroshotTask) -> str:
    """Say what a sample must have, as the fix of an error."""
    if task.task == CLASSIFICATION:
        return "Classification needs an image and a class (a .cls, a `label` column or a folder) for each sample."
    return "Retrieval needs an image and at least one caption (a .txt or a caption column) for each sample."
