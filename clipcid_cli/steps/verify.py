"""`verify`: whether each file is what its sidecar says, without changing anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset, open_described
from clipcid_cli.formats.data.shard import Shard
from clipcid_cli.formats.data.shard_cache import ShardCache
from clipcid_cli.formats.embeddings.manifest import ShardRecord, read_manifest
from clipcid_cli.formats.embeddings.recorded_rows import open_recorded
from clipcid_cli.formats.embeddings.sidecar import EmbedSidecar
from clipcid_cli.formats.memo import Memo
from clipcid_cli.formats.sidecar import read_sidecar
from clipcid_cli.formats.skipped import SKIPPED, read_shards
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.user_cache import cache_folder
from clipcid_cli.formats.verification import Fault, RecordedFile, find_outputs, find_problem, read_output
from clipcid_cli.formats.work_directory import WorkDirectory
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
    outputs = find_outputs(root)
    if not outputs.sidecars and not outputs.unfinished and not outputs.faults:
        raise ClipcidError(f"{root} holds no output of clipcid.", "Name a work directory, or the folder of an output.")
    result = VerifyResult(len(outputs.sidecars), 0, 0, None, list(map(str, outputs.unfinished)), [])
    for fault in outputs.faults:
        _report(result, fault)
    files = dict(_read_outputs(outputs.sidecars, root, result))
    at_fault = _verify_files([file for recorded in files.values() for file in recorded], root, result)
    for sidecar in files:
        if sidecar.name == "embed.json" and sidecar not in at_fault:
            _verify_embeddings(sidecar, result, settings)
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


def _as_fault(path: Path | str, error: ClipcidError) -> Fault:
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


def _verify_embeddings(path: Path, result: VerifyResult, settings: VerifySettings) -> None:
    """Compare the rows of files that are what was written with the manifest, and the data with what was embedded."""
    folder = path.parent
    try:
        open_recorded(folder, Memo(), "")
        if settings.read_data:
            sidecar = read_sidecar(path, EmbedSidecar)
            assert sidecar is not None
            dataset = open_described(sidecar.data, _find_indexes(settings), **settings.trust)
            _verify_data(dataset, path, result)
            _verify_copies(dataset, result)
    except ClipcidError as error:
        _report(result, _as_fault(path, error))


def _find_indexes(settings: VerifySettings) -> Path:
    """Return the folder of indexes, by which copies of shards are named: in the folder that is verified, if it has one."""
    own = WorkDirectory(settings.folder or settings.work).indexes
    return own if own.is_dir() else WorkDirectory(settings.work).indexes


def _verify_data(dataset: Dataset, path: Path, result: VerifyResult) -> None:
    result.samples = result.samples or 0
    records = {record.input.shard: record for record in read_manifest(path.parent, "")}
    skipped = {name: set(table["key"].to_pylist()) for name, table in read_shards(path.parent / SKIPPED)}
    with reporting.progress("data", len(dataset.shards), "shards") as bar:
        for shard in dataset.shards:
            bar.advance()
            record = records.pop(shard.name, None)
            if record is None:
                continue  # added since
            try:
                problem = _find_problem_of_data(shard, record, skipped.get(shard.name, set()), result)
            except ClipcidError as error:
                _report(result, _as_fault(shard.source, error))
                continue
            if problem is not None:
                _report(result, Fault(shard.source, problem))
    for name in records:
        _report(result, Fault(str(path), f"was made from shard {name}, which the data no longer has"))


def _find_problem_of_data(shard: Shard, record: ShardRecord, skipped: Set[str], result: VerifyResult) -> str | None:
    """Compare a shard with what was embedded of it; images that were skipped then need not be there now."""
    now = shard.fingerprint()
    if now.content[:2] != record.input.content[:2]:
        before = f"{record.input.size:,} bytes ({record.input.hash})"
        return f"has changed since it was embedded: {before} then, {now.size:,} bytes ({now.hash}) now"
    skips = Skips()
    unread = samples = 0
    for sample in shard.stream(skips):
        samples += 1
        try:
            if sample.key not in skipped:
                sample.image.read()
        except OSError:
            unread += 1
    # By this run's limit, which may be smaller.
    too_large = {key for key, _, reason in shard.locate(skips).listed if reason == "too_many_bytes"}
    unread += len(too_large - skipped)
    assert result.samples is not None
    result.samples += samples
    if samples + skips.total != record.read:
        return f"holds {samples + skips.total:,} samples in {shard.name}; {record.read:,} were embedded"
    return f"has {unread:,} images in {shard.name} that cannot be read" if unread else None


def _verify_copies(dataset: Dataset, result: VerifyResult) -> None:
    """Compare the copies of shards that are in the cache with what was fetched."""
    if dataset.index is None:
        return
    index = dataclasses.replace(dataset.index, cache=ShardCache(cache_folder(), 0))
    for copy in filter(None, map(index.copy, range(len(index.shards)))):
        problem = copy.find_problem()
        if problem is not None:
            _report(result, Fault(str(copy.local), problem))
