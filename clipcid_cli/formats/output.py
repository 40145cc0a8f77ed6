"""The output folder of a step: its lock, its plan and its sidecar.

The life of an output:

1. ``open_output`` takes a lock that dies with the process, so a second run in the same folder is refused at once.
2. Is there a sidecar ``<step>.json``? Then the output is finished: it is reused when settings and inputs are the same, and
   an error names the difference when they are not.
3. Otherwise the plan ``.<step>.plan.json`` records what an unfinished run was making. With the same settings and inputs the
   step resumes from the existing files; with others an error names the difference. The files of an earlier plan are removed
   before the new plan is marked as cleared, so that a run killed in between cannot leave old files as its own.
   A step that never resumes, or replaces an output without an error, may write no plan: the earlier output stays whole
   until the step calls ``Output.drop_earlier`` right before it writes its own.
4. ``Output.commit`` writes the sidecar last; it marks everything before it as complete.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clipcid_cli import __version__
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_error, write_json
from clipcid_cli.formats.differences import content_of, describe, list_differences, serious_of
from clipcid_cli.formats.listing import Stat, is_as_listed, list_recorded
from clipcid_cli.formats.reading import Entries, open_regular, reading
from clipcid_cli.formats.sidecar_entries import check_entries

FORMAT_VERSION = 1

# Files up to this size are hashed whole, larger ones at the head, the middle and the tail: a petabyte would take too long.
_WHOLE_FILE = 64 * 2**20
_WINDOW = 2**20
# More files than this are compared with a listing of their folders.
_FEW_FILES = 64

WORK_OR_OUT = "--work, or --out where the command has it"


def fingerprint_file(path: Path) -> dict[str, Any]:
    """Describe an input file such that a later run can detect a change.

    Returns:
        ``{"path": str, "size": bytes, "hash": "blake2b:…"}``; the hash of a file above 64 MiB is ``blake2b-sampled:…``,
        of its size and three windows of 1 MiB.
    """
    digest = hashlib.blake2b(digest_size=16)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _WHOLE_FILE:
            digest.update(file.read())
            kind = "blake2b"
        else:
            digest.update(str(size).encode())
            for start in (0, (size - _WINDOW) // 2, size - _WINDOW):
                file.seek(start)
                digest.update(file.read(_WINDOW))
            kind = "blake2b-sampled"
    return {"path": str(path), "size": size, "hash": f"{kind}:{digest.hexdigest()}"}


def read_sidecar(path: Path, fix: str = "Remove it, or choose another folder.") -> dict[str, Any] | None:
    """Read a sidecar; None when there is none.

    Args:
        fix: What to do about one that is damaged.

    Returns:
        Its entries: reading one that is missing raises a ClipcidError with this fix.

    Raises:
        ClipcidError: when it is not JSON, or of a newer format than this version knows.
    """
    if not path.exists():
        return None
    with reading(path, "a sidecar of clipcid", fix):
        sidecar = json.loads(path.read_bytes())
        if not isinstance(sidecar, dict):
            raise TypeError("it is no JSON object")
        version = sidecar["format_version"]
        check_entries(sidecar)
    if version > FORMAT_VERSION:
        raise ClipcidError(
            f"{path} has format version {version}; this clipcid {__version__} knows up to {FORMAT_VERSION}.",
            "Upgrade clipcid, or choose another folder.",
        )
    return Entries(sidecar, str(path), fix)


@dataclasses.dataclass
class Output:
    """A locked output folder.

    Attributes:
        step: Name of the step; the sidecar is ``<step>.json``.
        settings: Settings that determine the content, as JSON values.
        inputs: Fingerprints of the input files.
        finished: The sidecar when the output is complete and of the same settings and inputs, else None.
        resumed: Whether the folder holds an unfinished run of the same settings and inputs.
        earlier: The sidecar of an existing complete output that differs in what may differ only, and is there until
            ``drop_earlier``.
    """

    folder: Path
    step: str
    settings: dict[str, Any]
    inputs: list[dict[str, Any]]
    finished: dict[str, Any] | None
    resumed: bool
    earlier: dict[str, Any] | None = None

    def drop_earlier(self, *files: Path) -> None:
        """Remove an earlier output: its sidecar first, so that a run killed in between leaves it unfinished.

        Args:
            files: Its other files.
        """
        for path in (sidecar_path(self.folder, self.step), *files):
            path.unlink(missing_ok=True)

    def commit(
        self,
        *,
        counts: dict[str, Any],
        seconds: dict[str, float],
        outputs: Sequence[dict[str, Any]] = (),
        **more: Any,
    ) -> dict[str, Any]:
        """Write the sidecar, which marks the output as complete, and return its content.

        Args:
            counts: Numbers of samples or rows read, used and skipped by reason.
            seconds: Time by phase.
            outputs: The files it stands for, as `describe_outputs` describes them: `refuse_changed` compares.
            more: Further entries, such as ``model`` or ``result``.
        """
        sidecar = {
            "format_version": FORMAT_VERSION,
            "tool": "clipcid",
            "tool_version": __version__,
            "step": self.step,
            "settings": self.settings,
            "inputs": self.inputs,
            **({"outputs": list(outputs)} if outputs else {}),
            "counts": counts,
            "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
            **more,
        }
        write_json(sidecar_path(self.folder, self.step), sidecar)
        drop_plan(self.folder, self.step)
        return sidecar


def sidecar_path(folder: Path, step: str) -> Path:
    """Return the path of the sidecar of a step's output."""
    return folder / f"{step}.json"


def plan_path(folder: Path, step: str) -> Path:
    """Return the path of the plan of an unfinished output."""
    return folder / f".{step}.plan.json"


def is_claimed(folder: Path, step: str) -> bool:
    """Tell whether a folder holds a step's output, finished or begun."""
    return sidecar_path(folder, step).exists() or plan_path(folder, step).exists()


def drop_plan(folder: Path, step: str) -> None:
    """Remove the plan of an output that is finished; a run that is killed right after its sidecar leaves it."""
    with suppress(OSError):  # it is ignored in any case
        plan_path(folder, step).unlink(missing_ok=True)


def describe_outputs(folder: Path, files: Iterable[Path]) -> list[dict[str, Any]]:
    """Describe finished files of an output for its sidecar, such that `refuse_changed` recognises them.

    Returns:
        For each ``{"path": relative to the folder, "size", "time": of modification in ns, "hash"}``.
    """
    found = []
    for path in files:
        entry, place = fingerprint_file(path), os.path.relpath(path, folder)
        found.append({"path": place, "size": entry["size"], "time": path.stat().st_mtime_ns, "hash": entry["hash"]})
    return found


def is_unchanged(folder: Path, recorded: dict[str, Any], fingerprint: Callable[[Path], dict[str, Any]]) -> bool:
    """Tell whether a file is still the one that was recorded.

    The same size and time are enough; of another time, as in a copy, the hash decides.

    Args:
        recorded: An entry of `describe_outputs`.
        fingerprint: `fingerprint_file`, or one that remembers.
    """
    path = folder / recorded["path"]
    try:
        stat = path.stat()
        if stat.st_size != recorded["size"]:
            return False
        return stat.st_mtime_ns == recorded["time"] or bool(fingerprint(path)["hash"] == recorded["hash"])
    except OSError:
        return False


def find_changed(
    folder: Path,
    step: str,
    sidecar: dict[str, Any],
    names: Collection[str] | None = None,
    fingerprint: Callable[[Path], dict[str, Any]] = fingerprint_file,
    stats: Mapping[str, Stat] | None = None,
) -> str | None:
    """Find files of a finished output that were removed, replaced or edited since its sidecar was written.

    Args:
        names: The files to look at, relative to the folder; None for all.
        fingerprint: `fingerprint_file`, or one that remembers.
        stats: What `list_recorded` found; None to look now.

    Returns:
        What is wrong with the first of them, a sentence; None where none changed, or the sidecar does not record them.
    """
    entries = sidecar.get("outputs", [])
    chosen = [entry for entry in entries if names is None or entry["path"] in names]
    if stats is None and len(chosen) > _FEW_FILES:
        stats = list_recorded(folder, chosen)
    if stats is not None:
        chosen = [entry for entry in chosen if not is_as_listed(stats.get(entry["path"]), entry)]
    with ThreadPoolExecutor(16) as pool:  # hashing waits for the disk
        same = pool.map(lambda entry: is_unchanged(folder, entry, fingerprint), chosen)
        changed = next((entry for entry, found in zip(chosen, same, strict=True) if not found), None)
    if changed is None:
        return None
    path, record = folder / changed["path"], sidecar_path(folder, step)
    if not path.is_file():
        return f"{path} is missing, which {record} says was written."
    now = fingerprint(path)
    return (
        f"{path} has changed since {record} was written: {changed['size']:,} bytes ({changed['hash']}) then, "
        f"{now['size']:,} bytes ({now['hash']}) now."
    )


def refuse_changed(
    folder: Path, step: str, sidecar: dict[str, Any], fix: Callable[[], str], names: Collection[str] | None = None
) -> None:
    """Raise what `find_changed` finds.

    Args:
        fix: Says what to run to make the output again; called where something has changed.
    """
    changed = find_changed(folder, step, sidecar, names)
    if changed is not None:
        raise ClipcidError(changed, fix())


@contextmanager
def open_output(
    folder: Path,
    step: str,
    *,
    settings: dict[str, Any],
    inputs: list[dict[str, Any]],
    overwrite: bool,
    replaceable: frozenset[str] = frozenset(),
    clear: Callable[[], None] = lambda: None,
    resumable: bool = True,
    may_grow: bool = False,
    keeps_earlier: bool = False,
    elsewhere: str = WORK_OR_OUT,
) -> Iterator[Output]:
    """Lock an output folder and determine whether it is finished, unfinished or new.

    Args:
        folder: The output folder; created when missing.
        settings: Settings that determine the content, as JSON values.
        inputs: Fingerprints of the input files.
        overwrite: Treat an output of other settings or inputs as missing.
        replaceable: Names of settings in which an existing output may differ without an error: it is then made again
            (``finished`` is None and ``resumed`` False).
        clear: Removes files that the step would otherwise take for its own unfinished work; called unless the output is
            finished or resumed.
        resumable: Whether the step continues from an unfinished run. When not, nothing is written or removed here.
        may_grow: Whether inputs may have been added without an error, as settings that are replaceable may differ.
        keeps_earlier: Whether a finished output that is replaced without an error stays until ``drop_earlier``; then no plan
            is written.
        elsewhere: The flags that choose another place, for the error.

    Raises:
        ClipcidError: when another run holds the folder, or it holds an output of other settings or inputs, or one whose
            files have changed since.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    with lock_output(folder, step):
        sidecar, plan = sidecar_path(folder, step), plan_path(folder, step)
        identity = {"format_version": FORMAT_VERSION, "settings": settings, "inputs": inputs}
        finished, begun = read_sidecar(sidecar), read_sidecar(plan) if resumable else None
        existing = finished or begun
        earlier, resumed = None, False
        if existing is not None:
            differences = list_differences(existing, identity)
            serious = serious_of(differences, existing, inputs, replaceable, may_grow=may_grow)
            if serious and not overwrite:
                raise _other_output(folder, step, "holds" if finished else "holds unfinished", serious, elsewhere)
            if differences:
                earlier = finished if (keeps_earlier or not resumable) and not serious else None
                finished = None
            resumed = finished is None and not differences and existing.get("cleared", False)
            # A step that does not resume makes a removed file again.
            names = (entry["path"] for entry in existing.get("outputs", []))
            there = [name for name in names if resumable or (folder / name).exists()]
            changed = None if finished is None else find_changed(folder, step, finished, there)
            if changed is not None and not overwrite:
                raise ClipcidError(changed, "Add --overwrite to make it again.")
            finished = finished if changed is None else None
        if resumable and finished is None and earlier is None and not resumed:
            write_json(plan, identity | {"cleared": False})
            sidecar.unlink(missing_ok=True)
            clear()
            write_json(plan, identity | {"cleared": True})
        if begun is not None and finished is not None:
            drop_plan(folder, step)
        yield Output(folder, step, settings, inputs, finished, resumed, earlier)


def refuse_other_output(
    folder: Path,
    step: str,
    *,
    settings: dict[str, Any],
    inputs: list[dict[str, Any]],
    overwrite: bool,
    may_grow: bool = False,
    elsewhere: str = WORK_OR_OUT,
) -> None:
    """Refuse an output of other settings or inputs as `open_output` does (ClipcidError); writes nothing, for a dry run."""
    finished = read_sidecar(sidecar_path(folder, step))
    existing = finished or read_sidecar(plan_path(folder, step))
    if existing is not None and not overwrite:
        differences = list_differences(existing, {"settings": settings, "inputs": inputs})
        if serious := serious_of(differences, existing, inputs, may_grow=may_grow):
            raise _other_output(folder, step, "holds" if finished else "holds unfinished", serious, elsewhere)


def _other_output(folder: Path, step: str, holds: str, found: dict[str, str], elsewhere: str) -> ClipcidError:
    fix = f"Add --overwrite to replace it, or write elsewhere ({elsewhere})."
    return ClipcidError(f"{folder} {holds} {step} output made with other settings or inputs:\n{describe(found)}", fix)


def plan_identity(settings: dict[str, Any], inputs: list[dict[str, Any]]) -> str:
    """Hash settings and the content of inputs, independent of their paths."""
    content = [settings, [[part for part in content_of(entry) if part is not None] for entry in inputs]]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


@contextmanager
def lock_output(folder: Path, step: str) -> Iterator[None]:
    """Hold the folder for one run; the kernel drops the lock when the process ends, however it ends.

    Raises:
        ClipcidError: when another run holds it, or the lock cannot be written.
    """
    path = folder / f".{step}.lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
    except OSError as error:
        raise write_error(path, error) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 64, 0).decode(errors="replace").strip()
            raise ClipcidError(
                f"Another run ({holder or 'of unknown process number'}) is writing to {folder}.",
                "Wait for it, stop it, or work elsewhere (--work, or --out where the command has it).",
            ) from error
        except OSError as error:  # a file system without locks
            raise write_error(path, error) from error
        with suppress(OSError):  # a full disk; the name only serves the message above
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)
