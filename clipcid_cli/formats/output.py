"""The output of a step: one lock, an identity, a work folder, the sidecar last.

Each file appears whole in the work folder (`files.atomic_file`), and all files together in their places (`Output.place`).
The identity is a hash of the settings and of what the inputs hold. Unfinished work lies in ``.<step>-<identity>/`` in the
output's folder, with settings and inputs in ``.run.json``: a killed run resumes where that folder exists, and another
identity there is another run's. A finished output stays whole meanwhile. With its sidecar in the work folder the new one is
complete: everything moves from there to its place, the sidecar last, and where a run is killed on the way, the next one
goes on. Folders are synced before each of the two sidecars, so that it stands for files that outlast a power cut too.

`distill` writes in place, from its first step on: checkpoints, logs and students lie in the output's folder, and its work
folder holds ``.run.json`` alone, until the sidecar.

    Most outputs                        An evaluation, whose metrics lie above its sidecar
    clusters/           folder          eval/                   top
      cluster.json      the sidecar       NAME.json             the metrics
      …                 its files         sidecars/             folder
      .cluster-ID/      work_top            NAME.json           the sidecar
        …               = work              .NAME-ID/           work_top, as `top` will be
                                              sidecars/         work, as `folder` will be

Nothing moves through a link, and nothing is removed beyond one: an unpacked folder may hold links that lead anywhere.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Generic

import msgspec

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.files import lock, read_regular, reading, sync_folder, write_error, write_json
from clipcid_cli.formats.fingerprint import FileRecord, find_changed, find_lost, identity_of
from clipcid_cli.formats.sidecar import (
    LARGEST_SIDECAR,
    AnySidecar,
    Provenance,
    Sidecar,
    make_sidecar,
    read_sidecar,
    sidecar_path,
    write_sidecar,
)
from clipcid_cli.shown import redact_all

WORK = "--work"

RUN_FILE = ".run.json"
"""Settings and inputs of unfinished work, in its folder."""
# What a setting holds of a file's content.
_HASH = re.compile(r"(?:blake2b(?:-sampled)?:)?[0-9a-f]{12,}")
_TOLD = 8
# Settings by which data is read: rows and samples follow from them.
_READING = frozenset(
    (
        *("keys", "columns", "image_column", "caption_column", "key_column", "caption_lines"),
        *("caption_key", "student_caption_key", "list_format", "list_root", "list_separator", "list_encoding"),
    )
)


@dataclasses.dataclass(frozen=True)
class OutputSpec(Generic[AnySidecar]):
    """An output that a step asks for: where it lies, and what decides it."""

    folder: Path  # where the sidecar and most of the files lie
    step: str
    kind: type[AnySidecar]
    _: dataclasses.KW_ONLY
    settings: dict[str, Any]
    inputs: Sequence[FileRecord]
    overwrite: bool = False  # whether one of other settings or inputs counts as missing
    may_differ: Collection[str] = ()  # settings, and ``inputs``, in which one that is there may differ without an error
    resumes: bool = True
    begun_may_differ: Collection[str] = ()  # further settings in which unfinished work may differ
    # Pattern of the files of finished parts in a work folder: unfinished work without one, of other settings or inputs, is
    # dropped. Empty where all work counts.
    parts: str = ""
    elsewhere: str = WORK  # the flags that choose another place, for the error
    top: Path | None = None  # a folder above, where further files lie

    @property
    def provenance(self) -> Provenance:
        return Provenance(settings=redact_all(json.loads(json.dumps(self.settings))), inputs=[*self.inputs])

    @property
    def work_top(self) -> Path:
        """The work folder; files lie in it as they will below `top`."""
        return self.folder / f".{self.step}-{identity_of(redact_all(self.settings), self.inputs)}"


@dataclasses.dataclass
class Output(Generic[AnySidecar]):
    """A locked output."""

    spec: OutputSpec[AnySidecar]
    # The work folder: the spec's own, or one that a killed run has left. It differs from `work` only where `spec.top` is set
    # (evaluations, whose metrics files lie above their sidecars).
    work_top: Path
    finished: AnySidecar | None = None  # the sidecar when the output is complete and of the same settings and inputs
    earlier: AnySidecar | None = None  # the sidecar of a complete output that differs only as it may
    # How the complete output that is there differs, by setting and input.
    differences: dict[str, str] = dataclasses.field(default_factory=dict)
    begun: Path | None = None  # unfinished work to continue from: `work_top`, or of a run that differs only as it may

    @property
    def folder(self) -> Path:
        return self.spec.folder

    @property
    def work(self) -> Path:
        """The folder for unfinished files, named as they will be in `folder`; names that begin with a dot are scratch."""
        return self.work_top / self.folder.relative_to(self.spec.top or self.folder)

    @property
    def resumed(self) -> bool:
        """Whether there is unfinished work to continue from."""
        return self.begun is not None

    def begin_work(self, clear: Callable[[], None] | None = None) -> None:
        """Take over unfinished work, remove all other, make the folder; call it on one process before anything is written.

        Args:
            clear: Removes the files of earlier runs that are written in place, once there is no sidecar that stands for
                them; None where this run goes on with them.
        """
        try:
            for work in find_works(self.folder, self.spec.step):
                if work not in (self.begun, self.work_top):
                    shutil.rmtree(work, ignore_errors=True)
            if self.begun is not None and not self.work_top.exists():
                self.begun.rename(self.work_top)
            if clear is not None:
                sidecar_path(self.folder, self.spec.step).unlink(missing_ok=True)
                clear()
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.work_top, error) from error
        write_json(self.work_top / RUN_FILE, msgspec.to_builtins(self.spec.provenance))

    def commit(self, **entries: Any) -> AnySidecar:
        """Write the sidecar with these entries, which makes the output complete, and move everything to its place."""
        sidecar = make_sidecar(self.spec.kind, self.spec.step, self.spec.provenance, entries)
        for folder, _, _ in os.walk(self.work_top):
            sync_folder(Path(folder))
        write_sidecar(sidecar_path(self.work, self.spec.step), sidecar)
        sync_folder(self.work)
        self.place()
        return sidecar

    def discard(self) -> None:
        shutil.rmtree(self.work_top, ignore_errors=True)

    def place(self) -> None:
        """Move the files of a complete output to their places; also where a killed run has begun to."""
        spec = self.spec
        top = spec.top or spec.folder
        earlier = sidecar_path(spec.folder, spec.step)
        complete = sidecar_path(self.work, spec.step)
        new = read_sidecar(complete, spec.kind)
        assert new is not None, "the output is complete"
        with suppress(ClipcidError):  # of an earlier version, or damaged
            old = read_sidecar(earlier, spec.kind)
            for name in set() if old is None else old.files(spec.folder) - new.files(self.work):
                with suppress(OSError, ValueError):  # of a name that is none
                    # An edited sidecar names what it likes, also beyond a link.
                    path = (spec.folder / name).parent.resolve() / Path(name).name
                    if path.is_relative_to(top.resolve()):
                        path.unlink()
                        path.parent.rmdir()  # which fails where it holds anything else
        try:
            earlier.unlink(missing_ok=True)
        except OSError as error:
            raise write_error(earlier, error) from error
        _move(self.work_top, top, complete)
        _rename(complete, earlier)
        sync_folder(spec.folder)
        self.discard()


def _move(source: Path, target: Path, last: Path) -> None:
    """Move what is in a folder to another, but for `last` and scratch; where a folder is not there yet, it is one piece.

    The names are then on the disk.
    """
    for piece in sorted(source.iterdir()):
        place = target / piece.name
        if piece == last or piece.name.startswith("."):
            continue
        is_there = place.is_dir() and not place.is_symlink()
        if piece.is_dir() and not piece.is_symlink() and (is_there or last.is_relative_to(piece)):
            if not is_there:
                _make(place)
            _move(piece, place, last)
        else:
            _rename(piece, place)
    sync_folder(target)


def _make(folder: Path) -> None:
    try:
        folder.mkdir()
    except OSError as error:  # also of a link in its place
        raise write_error(folder, error) from error


def _rename(source: Path, target: Path) -> None:
    try:
        source.replace(target)
    except OSError as error:
        raise write_error(target, error) from error


@contextmanager
def open_output(spec: OutputSpec[AnySidecar], *, waits: bool = False) -> Iterator[Output[AnySidecar]]:
    """Lock an output and determine whether it is finished, unfinished or new.

    Args:
        waits: Whether to wait for another run that writes it; if not, that is an error.
    """
    folder, step = spec.folder, spec.step
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    for created in missing:
        sync_folder(created.parent)
    with _removing_empty(missing), _lock_output(spec, waits):
        works = find_works(folder, step)
        for work in works:
            _validate_no_links(work)
        for work in works:
            killed = Output(spec, work)
            if sidecar_path(killed.work, step).exists():
                killed.place()
        output = find_output(spec)
        for work in works:  # nothing to resume, or left by a run that was killed while it removed its folder
            if not spec.resumes or (
                output.finished is not None and (work == output.work_top or not (work / RUN_FILE).exists())
            ):
                shutil.rmtree(work, ignore_errors=True)
        try:
            yield output
        except BaseException:
            if not spec.resumes and not sidecar_path(output.work, step).exists():
                output.discard()
            raise


@contextmanager
def _removing_empty(folders: Iterable[Path]) -> Iterator[None]:
    """After an error remove the folders, inner ones first, that were made for what it ended and are empty."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # of one that holds anything
            for folder in folders:
                folder.rmdir()
        raise


def find_output(spec: OutputSpec[AnySidecar]) -> Output[AnySidecar]:
    """Determine whether an output is finished, unfinished or new; without a lock and writing nothing, as a dry run asks.

    | what is there                                  | without `overwrite`             | with it    |
    |------------------------------------------------|---------------------------------|------------|
    | an output of these settings and inputs         | `finished`                      | `finished` |
    | such an output, a file of which was changed    | error                           | made anew  |
    | an output that differs only in `may_differ`    | `earlier`; made anew            | the same   |
    | an output that differs otherwise               | error                           | made anew  |
    | unfinished work of these settings and inputs   | `begun`, also in place of error | `begun`    |
    | work that differs only as work that began may  | `begun`, if there is no other   | the same   |
    | work that differs otherwise                    | error                           | removed    |
    | such work without a file of `parts`            | removed                         | removed    |
    """
    folder, step, run = spec.folder, spec.step, spec.provenance
    output = Output(spec, spec.work_top)
    works = find_works(folder, step) if spec.resumes else []
    begun = output.work_top in works
    lenient = suppress(ClipcidError) if spec.overwrite else nullcontext()  # what is replaced need not be readable

    path = sidecar_path(folder, step)
    existing = None
    with lenient:
        fix = f"Add --overwrite to redo the output, or write elsewhere ({spec.elsewhere})."
        existing = read_sidecar(path, spec.kind, fix)
    if existing is not None:
        differences, serious = _compare(existing, run, spec.may_differ)
        if serious and not (spec.overwrite or begun):
            raise other_run_error(f"{folder} holds {step} output", _with_inputs(serious, differences), spec.elsewhere)
        changed = None if differences else _find_changed(existing, folder, path, spec.resumes)
        if changed is not None and not (spec.overwrite or begun):
            raise ClipcidError(changed, "Add --overwrite to replace it.")
        if not differences and changed is None:
            output.finished = existing
            return output
        output.earlier = None if serious or changed is not None else existing
        output.differences = differences

    output.begun = output.work_top if begun else None
    for work in works:
        if work == output.work_top:
            continue
        other = None
        with lenient:
            other = _read_run(work)
        if other is not None:
            differences, serious = _compare(other, run, {*spec.may_differ, *spec.begun_may_differ})
            is_empty = bool(spec.parts) and next(work.glob(spec.parts), None) is None
            if serious and not spec.overwrite and not is_empty:
                shown = _with_inputs(serious, differences)
                raise other_run_error(f"{folder} holds unfinished {step} output", shown, spec.elsewhere)
            output.begun = output.begun or (None if serious else work)
    return output


def _find_changed(sidecar: Sidecar, folder: Path, path: Path, resumes: bool) -> str | None:
    """Find the first file of an output that was changed since, as `fingerprint.find_changed` does."""
    try:
        recorded = sidecar.records(folder)
    except ClipcidError as error:
        return error.message
    # A step that does not resume makes a removed file again.
    return find_changed(folder, [file for file in recorded if resumes or (folder / file.path).exists()], path)


def unfinished(folder: Path, step: str) -> Provenance | None:
    """Return settings and inputs of an unfinished run; None when there is none."""
    return next((run for work in find_works(folder, step) if (run := _read_run(work)) is not None), None)


def remove_leftovers(spec: OutputSpec[Any]) -> None:
    """Remove what a run left beside a finished output when it was killed right after its sidecar.

    A lock that is held stays, as does the work folder of a run that goes on.
    """
    if (spec.folder / _lock_name(spec.step)).exists() or find_works(spec.folder, spec.step):
        with suppress(ClipcidError), open_output(spec):
            pass


def is_claimed(folder: Path, step: str) -> bool:
    """Tell whether a folder holds a step's output, finished or begun."""
    return sidecar_path(folder, step).exists() or bool(find_works(folder, step))


def find_works(folder: Path, step: str) -> list[Path]:
    """Return the work folders of a step's output: of unfinished runs, or left by one that was killed at its end."""
    digits = ("[0-9a-f]" * 16, "[0-9a-f]" * 32)  # the former of an earlier version
    return sorted(path for pattern in digits for path in folder.glob(f".{glob.escape(step)}-{pattern}"))


def _validate_no_links(work: Path) -> None:
    """Refuse unfinished work with a link in it: clipcid makes none, and would write to where it leads."""
    link = work if work.is_symlink() else _find_link(work)
    if link is not None:
        raise ClipcidError(
            f"{link} is a link in the folder of an unfinished run, which clipcid does not make.",
            f"Remove {work}, then run the same command again.",
        )


def _find_link(folder: Path) -> Path | None:
    with os.scandir(folder) as entries:
        for entry in entries:
            link = Path(entry.path) if entry.is_symlink() else None
            if entry.is_dir(follow_symlinks=False):
                link = _find_link(Path(entry.path))
            if link is not None:
                return link
    return None


def _read_run(work: Path) -> Provenance | None:
    if not (work / RUN_FILE).exists():  # killed right after it was made
        return None
    with reading(work / RUN_FILE, "the settings of an unfinished run", f"Remove {work}."):
        return msgspec.convert(json.loads(read_regular(work / RUN_FILE, LARGEST_SIDECAR)), Provenance)


def other_run_error(holds: str, serious: dict[str, str], elsewhere: str = WORK) -> ClipcidError:
    """Return the error for what is there of other settings or inputs."""
    return ClipcidError(
        f"{holds} made with other settings or inputs:\n{list_differences(serious)}",
        f"Add --overwrite to replace it, or write elsewhere ({elsewhere}).",
    )


def list_differences(differences: dict[str, str]) -> str:
    """Write differences of settings and inputs, a line each."""
    lines = [f"  {name}: {difference}" for name, difference in differences.items()]
    lines[_TOLD:] = [f"  … and {len(lines) - _TOLD} more"] if len(lines) > _TOLD else []
    return "\n".join(lines)


def _compare(there: Provenance, now: Provenance, may_differ: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return all differences of two runs, and those that are errors."""
    differences = find_differences(there, now)
    serious = {
        name: difference
        for name, difference in differences.items()
        if ("inputs" if name.startswith("input") else name.split(".")[1]) not in may_differ
    }
    return differences, serious


def _with_inputs(serious: dict[str, str], differences: dict[str, str]) -> dict[str, str]:
    """Return the differences that are errors, after those of inputs, from which settings may follow."""
    return {name: value for name, value in differences.items() if name in serious or name.startswith("input")}


def compare_settings(there: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Return for each setting that differs how: ``{"settings.keep": "0.5 there, 0.6 now"}``."""
    return _compare_values("settings", there, now)


def find_differences(there: Provenance, now: Provenance) -> dict[str, str]:
    """Return for each input and setting that differs how, inputs first, settings as `compare_settings` does.

    Where data is read by other settings, samples that follow from these are not named.
    """
    differences: dict[str, str] = {}
    settings = compare_settings(there.settings, now.settings)
    before, after = there.inputs, now.inputs
    if any(name.split(".")[1] in _READING for name in settings):
        before, after = _leave_out_samples(before, after), _leave_out_samples(after, before)
    if len(before) == len(after):
        for old, new in zip(before, after, strict=True):
            if old.content != new.content:
                differences[f"input {new.path}"] = _describe_change(old, new)
    else:
        more = f"{len(before)} files before, {len(after)} now"
        differences["inputs"] = find_lost(before, after) or more
    return differences | settings


def _leave_out_samples(files: Sequence[FileRecord], others: Sequence[FileRecord]) -> list[FileRecord]:
    """Return files without the samples of data that the other files are of, too."""
    paths = {file.path for file in others}
    return [file for file in files if not (file.is_of_samples and file.path in paths)]


def _describe_change(old: FileRecord, new: FileRecord) -> str:
    if old.path != new.path:
        return f"{old.path} before"
    if old.content[:2] == new.content[:2]:
        return f"shard {old.shard} before, shard {new.shard} now"
    return "changed since"


def _compare_values(name: str, old: Any, new: Any) -> dict[str, str]:
    """Compare two JSON values; of nested ones, the innermost that differ are told."""
    if old == new:
        return {}
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if isinstance(old, str) and isinstance(new, str) and _HASH.fullmatch(old) and _HASH.fullmatch(new):
            return {name: "other content"}
        before, after = _short(old), _short(new)
        return {name: "other content" if before == after else f"{before} there, {after} now"}
    differences: dict[str, str] = {}
    for key in dict.fromkeys([*new, *old]):
        differences |= _compare_values(f"{name}.{key}", old.get(key), new.get(key))
    return differences


def _short(value: Any) -> str:
    if isinstance(value, str) and _HASH.fullmatch(value):
        return "given"  # by a file, whose hash tells a person nothing
    text = json.dumps(_without_hashes(value), ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"


def _without_hashes(value: Any) -> Any:
    """Leave out the hashes that stand in lists beside the names of files."""
    if not isinstance(value, list):
        return value
    plain = [_without_hashes(item) for item in value if not (isinstance(item, str) and _HASH.fullmatch(item))]
    return plain[0] if len(plain) == 1 < len(value) else plain


def _lock_name(step: str) -> str:
    return f".{step}.lock"


@contextmanager
def _lock_output(spec: OutputSpec[Any], waits: bool) -> Iterator[None]:
    path = spec.folder / _lock_name(spec.step)
    with ExitStack() as stack:
        try:
            held = stack.enter_context(lock(path, wait=waits))
        except BlockingIOError as error:
            holder = ""
            with suppress(OSError):  # it has ended since
                holder = path.read_text(errors="replace").strip()
            raise ClipcidError(
                f"Another run ({holder or 'process number unknown'}) is writing to {spec.folder}.",
                f"Wait for it, stop it, or write elsewhere ({spec.elsewhere}).",
            ) from error
        except OSError as error:  # also of a file system without locks
            raise write_error(path, error) from error
        with suppress(OSError):  # a full disk; the name only serves the message above
            os.ftruncate(held, 0)
            os.pwrite(held, f"process {os.getpid()}\n".encode(), 0)
        try:
            yield
        finally:
            with suppress(OSError):  # whoever waits for it sees that it is gone, and makes it anew
                path.unlink()
