"""A model under evaluation: what identifies it, and its rows of a data set, made by all processes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from clipcid_cli.algorithms.metrics.classification import class_weights
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.output import OutputSpec
from clipcid_cli.formats.results.metrics import RETRIEVAL, SIDECARS, EvaluationSidecar, Metrics
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import CONFIG_NAME, ModelName, find_weights, hash_weights
from clipcid_cli.runtime.models.towers import Towers
from clipcid_cli.runtime.pipeline import start_worker_server
from clipcid_cli.runtime.precision import choose_precision
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.encode import BATCH_SIZES, Batch, Decoder, Encoded, encode, encode_batch, join, list_batches
from clipcid_cli.steps.evaluate.tasks import ZeroshotTask
from clipcid_cli.steps.preflight import choose_workers
from clipcid_cli.steps.settings.shared import ReadingSettings

AnyEvaluation = TypeVar("AnyEvaluation", bound=EvaluationSidecar)


@dataclasses.dataclass(frozen=True)
class TaskRows:
    """What a model makes of a data set, on every process."""

    task: ZeroshotTask
    encoded: Encoded  # all samples that can be used, in order: ``img_emb``, and for retrieval ``text_emb``
    weights: torch.Tensor | None  # class weights, float32 [C, D], unit rows; None without prompts
    skips: Skips
    seconds: dict[str, float]

    @cached_property
    def labels(self) -> torch.Tensor:
        """Classes of the images, int64 [N], or bool [N, C] where an image may have several."""
        return self.task.labels(self.encoded.samples)

    @property
    def keys(self) -> list[str]:
        return [sample.key for sample in self.encoded.samples]


def warn_of_skips(name: str, skips: Skips) -> None:
    """Name the samples of a data set that could not be used, if any."""
    if skips.total:
        reporting.warn(f"{name}, samples skipped: {skips.total:,}\n{skips.describe()}")


@dataclasses.dataclass
class EvaluatedModel:
    """A model under evaluation, loaded when something of it must be computed; called alike on every process."""

    name: ModelName
    context: DistContext
    settings: ReadingSettings
    loaded: ClipModel | None = None  # the model itself, where it is loaded already

    def __post_init__(self) -> None:
        device = self.context.device
        self.precision = choose_precision(self.settings.precision, device, "evaluate", parameters=0)
        self.batch_size = self.settings.batch_size or BATCH_SIZES[device.type]
        # Processes that decode; None decodes by the threads that compute, as on a CPU where nothing is asked for.
        self.workers = self.settings.workers
        if self.workers is None and device.type == "cuda":
            self.workers = choose_workers(None, device)
        if self.workers:
            start_worker_server()  # its imports run while the model loads

    @cached_property
    def model(self) -> ClipModel:
        return self.loaded or self.context.on_all(load_model, self.name, self.context.device)

    @cached_property
    def fingerprints(self) -> list[FileRecord]:
        """Describe the model's weights, by `ModelRecord.weights_hash`, and its configuration; a folder is not loaded for it.

        By that hash an export finds the metrics that belong to its model.
        """
        folder = self.name.path
        if folder is None or self.name.kind != "folder":
            info = self.model.info
            return [FileRecord(info.spec, info.parameters, info.weights_hash)]

        def describe() -> list[FileRecord]:
            weights = find_weights(folder)
            assert weights is not None, "a folder without weights is not a model"
            described = FileRecord(str(weights), weights.stat().st_size, hash_weights(weights))
            return [record(folder / CONFIG_NAME), described]

        return self.context.on_rank0(describe)

    def specify(
        self,
        path: Path,
        kind: type[AnyEvaluation],
        identity: dict[str, Any],
        data: list[FileRecord],
        may_differ: Collection[str],
    ) -> OutputSpec[AnyEvaluation]:
        """Specify a metrics file, whose sidecar lies in a folder of its own; model, `identity` and `data` decide it.

        Args:
            may_differ: Settings that do not decide all metrics.
        """
        of_model = {"model": self.name.slug, "precision": self.precision.name, "batch_size": self.batch_size}
        return OutputSpec(
            path.parent / SIDECARS,
            path.stem,
            kind,
            top=path.parent,
            settings=identity | of_model,
            inputs=self.fingerprints + data,
            overwrite=self.settings.overwrite,
            may_differ=may_differ,
            resumes=False,
        )

    def encode(self, task: ZeroshotTask) -> TaskRows:
        """Encode a data set, and the prompts of its classes where it has templates."""
        seconds: dict[str, float] = {}
        with timed(seconds, "classes"):
            towers = Towers.from_model(self.model, self.precision, self.batch_size)
            weights = class_weights(self._encode_classes(task, towers)) if task.templates else None
        with timed(seconds, "encode"):
            encoded, skips = self._encode_samples(task, towers)
        return TaskRows(task, encoded, weights, skips, seconds)

    def _encode_classes(self, task: ZeroshotTask, towers: Towers) -> torch.Tensor:
        rows = towers.encode_prompts([task.prompts(name) for name in task.class_names], self.context)
        bad = ~torch.isfinite(rows).flatten(1).all(dim=1)
        if bool(bad.any()):
            first = task.class_names[int(bad.int().argmax())]
            raise ClipcidError(
                f"{task.name}: the prompts of {int(bad.sum()):,} of {len(bad):,} classes have embeddings that are not "
                f"finite, first those of {first!r}.",
                "Use --precision fp32, or another model.",
            )
        return rows

    def _encode_samples(self, task: ZeroshotTask, towers: Towers) -> tuple[Encoded, Skips]:
        """Encode all batches, dealt to the processes in turn."""
        context = self.context
        dataset = task.dataset
        skips = Skips()
        sizes = list[int]()
        read = 0
        decoder = Decoder.from_model(self.model, captions=task.kind == RETRIEVAL)

        batches = list_batches(dataset, range(len(dataset.shards)), task.stream, self.batch_size, task.reject)

        def is_mine(batch: Batch) -> bool:
            """Count a batch, and tell whether this process decodes it: every one lists all samples."""
            nonlocal read
            skips.merge(batch.skipped)
            read += batch.read or 0
            sizes.append(len(batch.samples))
            return (len(sizes) - 1) % context.size == context.rank

        encoder = partial(encode_batch, towers)
        mine = list[tuple[Encoded, Skips]]()
        shown = 0
        with reporting.progress(f"{self.model.info.slug} on {task.name}", None, "images") as progress:
            with context.agreeing():
                for batch, encoded in encode(filter(is_mine, batches), decoder, encoder, context.device, self.workers):
                    mine.append((encoded.usable(), encoded.count_skips(dataset.shards[batch.shard])))
                    # The other processes are about as far: count every batch up to this one.
                    done = (len(mine) - 1) * context.size + context.rank + 1
                    progress.advance(sum(sizes[shown:done]))
                    shown = done
                progress.advance(sum(sizes[shown:]))
            dealt = context.gather(mine)
            parts = [dealt[turn % context.size][turn // context.size] for turn in range(len(sizes))]
            for _, unread in parts:
                skips.merge(unread)
            encoded = join(part for part, _ in parts)
            self.validate_usable(task, read, len(encoded.samples), skips)
        return encoded, skips

    def validate_usable(self, task: ZeroshotTask, read: int, usable: int, skips: Skips) -> None:
        """Refuse a data set of whose samples too many, or all, cannot be used."""
        need = "Classification needs an image and a class (a .cls, a `label` column or a folder) for each sample."
        if task.kind == RETRIEVAL:
            need = "Retrieval needs an image and at least one caption (a .txt or a caption column) for each sample."
        skips.check(task.read or read, self.settings.max_bad_fraction, task.dataset.spec, need)
        if not usable:
            raise ClipcidError(f"{task.dataset.spec}: no sample can be used.\n{skips.describe()}", need)

    def make_metrics(self, dataset: str, task: str, metrics: dict[str, float]) -> Metrics:
        """Put metrics of this model into CLIP_benchmark's fields; NaN becomes null, since JSON has none."""
        return Metrics(
            dataset=dataset,
            model=self.name.architecture or self.name.slug,
            pretrained=self.name.tag or self.name.spec,
            task=task,
            language="en",
            metrics={name: None if math.isnan(value) else value for name, value in metrics.items()},
        )
