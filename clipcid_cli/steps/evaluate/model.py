"""A model under evaluation: what identifies it, and how it embeds, settled before its weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.results.metrics import make_metrics
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.models.clip_model import ClipModel, hash_weights, load_model
from clipcid_cli.runtime.models.names import ModelName, find_weights
from clipcid_cli.runtime.precision import choose_precision
from clipcid_cli.steps.evaluate.encode import TaskEncoder
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.shared import ReadingSettings

_BATCH_SIZES = {"cpu": 64, "cuda": 256}


class EvaluatedModel:
    """A model that is loaded only when something of it must be computed.

    Attributes:
        precision: Number format it computes in.
        batch_size: Images, or texts, that it embeds at once.
    """

    def __init__(self, name: ModelName, machine: Machine, settings: ReadingSettings, reporter: Reporter) -> None:
        self.name = name
        self.precision = choose_precision(settings.precision, machine.device, "evaluate", parameters=0)
        self.batch_size = settings.batch_size or _BATCH_SIZES[machine.device.type]
        self._machine, self._settings, self._reporter = machine, settings, reporter
        self._model: ClipModel | None = None
        self._fingerprints: list[FileRecord] | None = None

    def load(self) -> ClipModel:
        """Load the model, once."""
        if self._model is None:
            self._model = self._machine.on_all(lambda: load_model(self.name, self._machine.device))
        assert self._model is not None
        return self._model

    def encoder(self) -> TaskEncoder:
        """Load the model and return what embeds data sets with it; errors as `load`'s."""
        return TaskEncoder(
            model=self.load(),
            machine=self._machine,
            precision=self.precision,
            batch_size=self.batch_size,
            workers=self._settings.workers,
            max_bad_fraction=self._settings.max_bad_fraction,
            reporter=self._reporter,
        )

    def fingerprints(self) -> list[FileRecord]:
        """Describe weights and configuration, once; those of a folder without loading them.

        The hash covers the whole weights file and equals `ModelInfo.weights_hash`, by which an export finds the metrics
        that belong to its model.
        """
        if self._fingerprints is None:
            if self.name.kind == "folder":
                folder = self.name.path
                assert folder is not None
                self._fingerprints = self._machine.on_main(lambda: _fingerprint_folder(folder))
            else:
                info = self.load().info
                self._fingerprints = [FileRecord(info.spec, info.parameters, info.weights_hash)]
        return self._fingerprints

    def make_record(self, dataset: str, task: str, metrics: dict[str, float]) -> dict[str, Any]:
        """Put metrics of this model into CLIP_benchmark's fields, as `make_metrics` does."""
        return make_metrics(
            dataset=dataset,
            model=self.name.architecture or self.name.slug,
            pretrained=self.name.tag or self.name.spec,
            task=task,
            metrics=metrics,
        )


def _fingerprint_folder(folder: Path) -> list[FileRecord]:
    weights = find_weights(folder)
    assert weights is not None, "a folder without weights is not a model"
    described = FileRecord(str(weights), weights.stat().st_size, hash_weights(weights))
    return [record(folder / "open_clip_config.json"), described]
