"""`verify`: whether each file is what its sidecar says, without changing anything."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import open_described
from clipcid_cli.formats.data.shard import Shard
from clipcid_cli.formats.embeddings.manifest import ShardRecord, open_recorded, read_manifest
from clipcid_cli.formats.fingerprint import Memo
from clipcid_cli.formats.sidecar import EmbedSidecar, read_sidecar
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.verification import Fault, RecordedFile, find_outputs, find_problem, read_output
from clipcid_cli.steps import reporting
from clipcid_cli.steps.settings.verify import VerifySettings

_THREADS = 16  # hashing waits for the disk


class VerifyResult(msgspec.Struct):
    """What was looked at, and what is wrong."""

    outputs: int
    files: int
    bytes: int  # of the files, as recorded
    samples: int | None  # whose bytes were read, with --read-data
    unfinished: list[str]  # folders of runs that have not ended, which are no fault
    faults: list[Fault]

    @property
    def exit_code(self) -> int:
        return 1 if self.faults else 0


def run(settings: VerifySettings) -> VerifyResult:
    """Compare all files with what is recorded of them; each fault is told as soon as it is known."""
    root = settings.folder or settings.work
    if not root.is_dir():
        raise ClipcidError(f"There is no folder {root}.", "Name a work directory, or the folder of an output.")
    found = find_outputs(root)
    if not found.sidecars and not found.unfinished and not found.faults:
        raise ClipcidError(f"{root} holds no output of clipcid.", "Name a work directory, or the folder of an output.")
    result = VerifyResult(len(found.sidecars), 0, 0, None, list(map(str, found.unfinished)), [])
    for fault in found.faults:
        _report(result, fault)
    outputs = dict(_read_outputs(found.sidecars, root, result))
    at_fault = _verify_files([file for files in outputs.values() for file in files], root, result)
    for sidecar in outputs:
        if sidecar.name == "embed.json" and sidecar not in at_fault:
            _verify_embeddings(sidecar, result, read_data=settings.read_data)
    return result


def _report(result: VerifyResult, fault: Fault) -> None:
    result.faults.append(fault)
    reporting.warn(f"{fault.path} {fault.problem}.")


def _read_outputs(sidecars: list[Path], root: Path, result: VerifyResult) -> Iterator[tuple[Path, list[RecordedFile]]]:
    """Yield each sidecar with its files; one that cannot be read is a fault."""
    for sidecar in sidecars:
        try:
            yield sidecar, read_output(sidecar, root)
        except ClipcidError as error:
            _report(result, _as_fault(sidecar, error))


def _as_fault(path: Path, error: ClipcidError) -> Fault:
    return Fault(str(path), " ".join(error.message.split()).removeprefix(f"{path} ").rstrip("."))


def _verify_files(files: list[RecordedFile], root: Path, result: VerifyResult) -> set[Path]:
    """Compare files with what is recorded of them; return the sidecars of those that differ."""
    at_fault = set[Path]()
    with reporting.progress("verify", len(files), "files") as bar, ThreadPoolExecutor(_THREADS) as pool:
        for file, problem in zip(files, pool.map(lambda file: find_problem(file, root), files), strict=True):
            bar.advance()
            if problem is not None:
                _report(result, Fault(str(file.path), problem))
                at_fault.add(file.sidecar)
    result.files = len(files)
    result.bytes = sum(file.record.size for file in files)
    return at_fault


def _verify_embeddings(path: Path, result: VerifyResult, *, read_data: bool) -> None:
    """Compare the rows of files that are what was written with the manifest, and the data with what was embedded."""
    folder = path.parent
    try:
        open_recorded(folder, Memo(), "")
        if read_data:
            sidecar = read_sidecar(path, EmbedSidecar)
            assert sidecar is not None
            dataset = open_described(sidecar.data)
            records = {record.input.shard: record for record in read_manifest(folder, "")}
            _verify_data(dataset.shards, records, path, result)
    except ClipcidError as error:
        _report(result, _as_fault(path, error))


def _verify_data(
    shards: tuple[Shard, ...], records: dict[str | None, ShardRecord], path: Path, result: VerifyResult
) -> None:
    result.samples = result.samples or 0
    with reporting.progress("data", len(shards), "shards") as bar:
        for shard in shards:
            bar.advance()
            record = records.pop(shard.name, None)
            if record is None:
                continue  # added since
            try:
                problem = _find_problem_of_data(shard, record, result)
            except ClipcidError as error:
                _report(result, _as_fault(Path(shard.source), error))
                continue
            if problem is not None:
                _report(result, Fault(shard.source, problem))
    for name in records:
        _report(result, Fault(str(path), f"was made from shard {name}, which the data no longer has"))


def _find_problem_of_data(shard: Shard, record: ShardRecord, result: VerifyResult) -> str | None:
    now = shard.fingerprint()
    if now.content[:2] != record.input.content[:2]:
        before = f"{record.input.size:,} bytes ({record.input.hash})"
        return f"has changed since it was embedded: {before} then, {now.size:,} bytes ({now.hash}) now"
    skips = Skips()
    unread = samples = 0
    for sample in shard.stream(skips):
        samples += 1
        try:
            if sample.image is not None:
                sample.image.read()
        except OSError:
            unread += 1
    assert result.samples is not None
    result.samples += samples
    if samples + skips.total != record.read:
        return f"holds {samples + skips.total:,} samples in {shard.name}; {record.read:,} were embedded"
    return f"has {unread:,} images in {shard.name} that cannot be read" if unread else None
