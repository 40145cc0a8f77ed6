"""What `eval-zeroshot` measures where no data set is named: retrieval on what training held out."""

from __future__ import annotations

from collections.abc import Sequence

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark import RECALL, find_benchmark_folder
from clipcid_cli.formats.data.dataset import open_described
from clipcid_cli.formats.results.metrics import RETRIEVAL
from clipcid_cli.formats.results.run_folder import DistillSidecar, read_held_out
from clipcid_cli.formats.sidecar import read_sidecar, sidecar_path
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.names import ModelName
from clipcid_cli.steps import reporting
from clipcid_cli.steps.evaluate.tasks import ZeroshotTask
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings

_NAME_ONE = "Name one: clipcid eval-zeroshot MODEL DATA"


def plan_held_out(settings: EvalZeroshotSettings, models: Sequence[ModelName]) -> ZeroshotTask:
    """Retrieval on what all the models' training runs held out, else on what the newest one did."""
    folders = [name.path.resolve().parent for name in models if name.path is not None]
    runs = [folder for folder in folders if sidecar_path(folder, "distill").exists()]
    sidecars = {
        run: sidecar
        for run in runs or [WorkDirectory(settings.work).find_student().parent]
        if (sidecar := read_sidecar(sidecar_path(run, "distill"), DistillSidecar)) is not None
    }
    run, trained = next(iter(sidecars.items()))
    if any(other.data != trained.data for other in sidecars.values()):
        raise ClipcidError("The models were trained on different data, and no data set was named.", _NAME_ONE)
    held_out = frozenset.intersection(*map(read_held_out, sidecars))
    named = str(run) if len(sidecars) == 1 else f"all {len(sidecars)} runs"
    if not held_out:
        raise ClipcidError(
            f"There is no sample that {named} held out, and no data set was named.",
            f"{_NAME_ONE}\nOr train with a larger --val-fraction.",
        )
    dataset = open_described(trained.data, WorkDirectory(settings.work).indexes, **settings.trust)
    samples = "sample" if len(held_out) == 1 else "samples"
    reporting.note(f"Data: the {len(held_out):,} {samples} of {dataset.spec} that {named} held out.")
    name = f"{find_benchmark_folder(dataset.spec).name}-held-out"
    return ZeroshotTask(name, RETRIEVAL, dataset, held_out=held_out, read=int(trained.counts["read"]), customary=RECALL)
