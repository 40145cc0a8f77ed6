"""Whether an output was made from other embeddings or another keep list than the work directory holds now."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.sidecar import EmbedSidecar
from clipcid_cli.formats.fingerprint import FileRecord, record_together
from clipcid_cli.formats.results.clusters import ClusterSidecar
from clipcid_cli.formats.results.keep_list import BalanceSidecar
from clipcid_cli.formats.sidecar import Sidecar, read_sidecar, sidecar_path
from clipcid_cli.formats.work_directory import KEEP_LIST, WorkDirectory


def find_outdated(work: WorkDirectory, sidecar: Sidecar) -> list[str]:
    """Name what an output of `balance` or `cluster` was made from, where something else is there now."""
    if not isinstance(sidecar, BalanceSidecar | ClusterSidecar):
        return []
    made_from = {file.content for file in sidecar.inputs}
    images = list(map(_record_images, work.folders_of(sidecar.embeddings)))
    outdated = []
    if any(record is not None and record.content not in made_from for record in images):
        outdated.append("other embeddings")
    if isinstance(sidecar, ClusterSidecar) and _has_other_list(work, sidecar.keep_list):
        outdated.append("another keep list")
    return outdated


def _record_images(folder: Path) -> FileRecord | None:
    """Describe the image rows of a folder as `balance` and `cluster` do; None where their record cannot be read."""
    with suppress(ClipcidError):
        sidecar = read_sidecar(sidecar_path(folder, "embed"), EmbedSidecar)
        if sidecar is not None:
            files = sidecar.records(folder)
            return record_together("", (file for file in files if file.path.startswith(f"{Kind.IMAGES}/")))
    return None


def _has_other_list(work: WorkDirectory, made_from: FileRecord | None) -> bool:
    """Tell whether a keep list that was the work directory's has been replaced by another."""
    place = (work.path.resolve().name, work.balance.name, KEEP_LIST)
    if made_from is None or Path(made_from.path).absolute().parts[-3:] != place:
        return False
    balanced = read_sidecar(sidecar_path(work.balance, "balance"), BalanceSidecar)
    if balanced is None:
        return False
    return all(file.content != made_from.content for file in balanced.outputs if file.path == KEEP_LIST)
