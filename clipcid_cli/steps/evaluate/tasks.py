"""A data set, and what is measured on it: classification among its classes, retrieval of its captions, or associations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from clipcid_cli.algorithms.metrics.associations import ASSOCIATION_METRICS
from clipcid_cli.algorithms.metrics.classification import MULTI_LABEL_METRICS, SINGLE_LABEL_METRICS
from clipcid_cli.algorithms.metrics.groups import OwnMetric
from clipcid_cli.algorithms.metrics.retrieval import RETRIEVAL_METRICS
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark import ACCURACY, fill_template
from clipcid_cli.formats.data.classes import read_classes
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.image_fingerprint import fingerprint_images
from clipcid_cli.formats.data.samples import ListFormat, Sample
from clipcid_cli.formats.fingerprint import FileRecord, hash_json
from clipcid_cli.formats.results.metrics import ASSOCIATION, CLASSIFICATION, MULTI_LABEL, RETRIEVAL, LinesRecord
from clipcid_cli.formats.skips import Skips

# As CLIP_benchmark calls them: images with several classes are a classification, too.
TASKS = {
    CLASSIFICATION: "zeroshot_classification",
    MULTI_LABEL: "zeroshot_classification",
    RETRIEVAL: "zeroshot_retrieval",
    ASSOCIATION: "zeroshot_association",
}
_METRICS = {
    CLASSIFICATION: SINGLE_LABEL_METRICS,
    MULTI_LABEL: MULTI_LABEL_METRICS,
    RETRIEVAL: RETRIEVAL_METRICS,
    ASSOCIATION: ASSOCIATION_METRICS,
}


@dataclasses.dataclass(frozen=True)
class ZeroshotTask:
    """One data set and what is measured on it."""

    name: str
    # ``classification``, ``multilabel`` where an image may have any number of classes, ``retrieval``, or ``association``,
    # whose classes are the cues that images are candidates of.
    kind: str
    dataset: Dataset
    class_names: tuple[str, ...] = ()  # in order of the labels; none for retrieval, as templates
    templates: tuple[str, ...] = ()
    held_out: frozenset[str] | None = None  # keys of the samples that are used: what training held out; None uses all
    # Of a held-out part: samples of the whole data, to which the limit on unusable ones belongs.
    read: int | None = None
    # Label of each class folder, where folders and class names are in different orders; else None.
    label_of: tuple[int, ...] | None = None
    customary: str = ACCURACY
    own: OwnMetric | None = None  # a metric of this data set alone
    candidates: tuple[int, ...] = ()  # of an association: how many images are candidates of each cue
    # Which ``class_names`` and ``templates`` a score is of; None without prompts.
    prompt_lines: dict[str, LinesRecord] | None = None
    # Ends the names of the files, where flags replace the data set's own prompts, or captions: ``templates-openai``.
    variant: tuple[str, ...] = ()

    @property
    def task(self) -> str:
        """CLIP_benchmark's name of the task."""
        return TASKS[self.kind]

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The names of all metrics that are measured on it."""
        return _METRICS[self.kind] + (() if self.own is None else (self.own.name,))

    @property
    def multi_label(self) -> bool:
        return self.kind == MULTI_LABEL

    def prompts(self, class_name: str) -> list[str]:
        return [fill_template(template, class_name) for template in self.templates]

    def stream(self, shard_index: int, skips: Skips) -> Iterator[Sample]:
        """Yield the samples of a shard that are used; where there is an index, no others are read.

        What is wrong with others than those held out is not counted.
        """
        if self.held_out is None:
            return self.dataset.shards[shard_index].stream(skips)
        return self._stream_held_out(shard_index, self.held_out)

    def _stream_held_out(self, shard_index: int, held_out: frozenset[str]) -> Iterator[Sample]:
        index = self.dataset.index
        if index is None:
            yield from (sample for sample in self.dataset.shards[shard_index].stream() if sample.key in held_out)
            return
        part = index.part(shard_index)
        for place, key in enumerate(part.keys.to_pylist()):
            if key in held_out:
                yield part.sample(place)

    def fingerprints(self) -> list[FileRecord]:
        """Describe the files, and the images, classes and captions of the samples that are used."""
        shards = range(len(self.dataset.shards))
        samples = (sample for shard_index in shards for sample in self.stream(shard_index, Skips()))
        return [*self.dataset.fingerprints(), fingerprint_images(self.dataset, samples)]

    def reject(self, sample: Sample) -> str | None:
        """Say why a sample cannot be used: it has no class, or no caption; None where it can."""
        if self.kind == RETRIEVAL:
            return None if sample.captions else "no_caption"
        if self.multi_label:
            listed = sample.multi_hot is not None or sample.labels is not None or sample.label is not None
        else:
            listed = self.label(sample) is not None
        return None if listed else "no_label"

    def label(self, sample: Sample) -> int | None:
        if sample.label is None:
            return None
        count = len(self.class_names if self.label_of is None else self.label_of)
        if not 0 <= sample.label < count:
            raise ClipcidError(
                f"{self.dataset.spec}: sample {sample.key} has class {sample.label}, and there are "
                f"{count} class names (0 … {count - 1}).",
                "Give the matching list of class names with --classnames.",
            )
        return self.label_of[sample.label] if self.label_of is not None else sample.label

    def labels(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Return the classes of samples that have one: int64 [B], or bool [B, C] where an image may have several."""
        if not self.multi_label:
            return torch.tensor([self.label(sample) for sample in samples], dtype=torch.int64)
        positive = torch.zeros(len(samples), len(self.class_names), dtype=torch.bool)
        for row, sample in enumerate(samples):
            positive[row, list(read_classes(sample, len(self.class_names)) or ())] = True
        return positive

    def describe(self) -> dict[str, Any]:
        """Return the settings that determine the metrics of a model on the data."""
        described = {
            "dataset": self.name,
            "task": self.task,
            "class_names": list(self.class_names),
            "templates": list(self.templates),
            "multi_label": self.multi_label,
            "held_out": None if self.held_out is None else hash_json(sorted(self.held_out)),
            **self.describe_reading(),
        }
        if self.own is not None:
            described["own"] = self.own.name
        return described

    def describe_reading(self) -> dict[str, Any]:
        """Return the settings by which the data is read, those that have no default only where they are given."""
        dataset = self.dataset
        described: dict[str, Any] = {"keys": dataset.keys, "columns": dataclasses.asdict(dataset.columns)}
        if self.kind == RETRIEVAL and dataset.caption_lines:
            described["caption_lines"] = True
        # The rows of a list hold captions also where these are not measured.
        if dataset.caption_keys and (self.kind == RETRIEVAL or dataset.kind == "list"):
            described["caption_key"] = list(dataset.caption_keys)
        if dataset.list_format != ListFormat():
            described["list_format"] = dataclasses.asdict(dataset.list_format)
        return described
