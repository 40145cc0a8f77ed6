"""The output folder of a step: its lock, its plan and its sidecar.

The life of an output:

1. ``open_output`` takes a lock that dies with the process, so a second run in the same folder is refused at once.
2. Is there a sidecar ``<step>.json``? Then the output is finished: it is reused when settings and inputs are the same, and
   an error names the difference when they are not.
3. Otherwise the plan ``.<step>.plan.json`` records what an unfinished run was making. With the same settings and inputs the
   step resumes from the existing files; with others an error names the difference. The files of an earlier plan are removed
   before the new plan is marked as cleared, so that a run killed in between cannot leave old files as its own.
   A step that never resumes writes no plan: an earlier output stays whole until the step calls ``Output.drop_earlier``
   right before it writes its own, so a failed run loses nothing.
4. ``Output.commit`` writes the sidecar last; it marks everything before it as complete.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipcid_cli import __version__
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_error, write_json

FORMAT_VERSION = 1

# Files up to this size are hashed whole, larger ones at the head, the middle and the tail: reading a petabyte of shards to
# start a run would cost more than the run.
_WHOLE_FILE = 64 * 2**20
_WINDOW = 2**20


def fingerprint_file(path: Path) -> dict[str, Any]:
    """Describe an input file such that a later run can detect a change.

    Returns:
        ``{"path": str, "size": bytes, "hash": "blake2b:…"}``; the hash of a file above 64 MiB is ``blake2b-sampled:…``,
        of its size and three windows of 1 MiB.
    """
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
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


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """Read a sidecar; None when there is none.

    Raises:
        ClipcidError: when it is not JSON, or of a newer format than this version knows.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        sidecar = json.loads(text)
        version = sidecar["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ClipcidError(f"{path} is not a sidecar of clipcid.", "Remove it, or choose another folder.") from error
    if version > FORMAT_VERSION:
        raise ClipcidError(
            f"{path} has format version {version}; this clipcid {__version__} knows up to {FORMAT_VERSION}.",
            "Upgrade clipcid, or choose another folder.",
        )
    assert isinstance(sidecar, dict)
    return sidecar


@dataclasses.dataclass
class Output:
    """A locked output folder.

    Attributes:
        step: Name of the step; the sidecar is ``<step>.json``.
        settings: Settings that determine the content, as JSON values.
        inputs: Fingerprints of the input files.
        finished: The sidecar when the output is complete and of the same settings and inputs, else None.
        resumed: Whether the folder holds an unfinished run of the same settings and inputs.
        earlier: The sidecar of an existing complete output that differs in replaceable settings only.
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

    def commit(self, *, counts: dict[str, Any], seconds: dict[str, float], **more: Any) -> dict[str, Any]:
        """Write the sidecar, which marks the output as complete, and return its content.

        Args:
            counts: Numbers of samples or rows read, used and skipped by reason.
            seconds: Time by phase.
            more: Further entries, such as ``model`` or ``result``.
        """
        sidecar = {
            "format_version": FORMAT_VERSION,
            "tool": "clipcid",
            "tool_version": __version__,
            "step": self.step,
            "settings": self.settings,
            "inputs": self.inputs,
            "counts": counts,
            "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
            **more,
        }
        write_json(sidecar_path(self.folder, self.step), sidecar)
        plan_path(self.folder, self.step).unlink(missing_ok=True)
        return sidecar


def sidecar_path(folder: Path, step: str) -> Path:
    """Return the path of the sidecar of a step's output."""
    return folder / f"{step}.json"


def plan_path(folder: Path, step: str) -> Path:
    """Return the path of the plan of an unfinished output."""
    return folder / f".{step}.plan.json"


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

    Raises:
        ClipcidError: when another run holds the folder, or it holds an output of other settings or inputs.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    with _lock(folder, step):
        sidecar, plan = sidecar_path(folder, step), plan_path(folder, step)
        identity = {"format_version": FORMAT_VERSION, "settings": settings, "inputs": inputs}
        finished, begun = read_sidecar(sidecar), read_sidecar(plan) if resumable else None
        existing = finished or begun
        earlier, resumed = None, False
        if existing is not None:
            differences = list_differences(existing, identity)
            serious = [name for name in differences if name.removeprefix("settings.").split(".")[0] not in replaceable]
            if serious and not overwrite:
                state = "holds" if finished else "holds unfinished"
                raise ClipcidError(
                    f"{folder} {state} {step} output made with other settings or inputs:\n"
                    + "\n".join(f"  {name}: {differences[name]}" for name in serious[:8])
                    + (f"\n  … and {len(serious) - 8} more" if len(serious) > 8 else ""),
                    "Add --overwrite to replace it, or write elsewhere (--work, or --out where the command has it).",
                )
            if differences:
                earlier = finished if not resumable and not serious else None
                finished = None
            resumed = finished is None and not differences and existing.get("cleared", False)
        if resumable and finished is None and not resumed:
            write_json(plan, identity | {"cleared": False})
            sidecar.unlink(missing_ok=True)
            clear()
            write_json(plan, identity | {"cleared": True})
        yield Output(folder, step, settings, inputs, finished, resumed, earlier)


def list_differences(existing: dict[str, Any], identity: dict[str, Any]) -> dict[str, str]:
    """Compare the settings and inputs of an existing sidecar or plan with those of a new run.

    Returns:
        For each entry that differs, how: ``{"settings.keep": "0.5 there, 0.6 now"}``; of nested ones, the innermost.
    """
    found = _value_differences("settings", existing.get("settings", {}), identity["settings"])
    # Inputs are compared by content: a folder that was moved, or is reached by another path, is still the same input.
    old_inputs = [(entry.get("size"), entry.get("hash")) for entry in existing.get("inputs", [])]
    new_inputs = [(entry.get("size"), entry.get("hash")) for entry in identity["inputs"]]
    if len(old_inputs) != len(new_inputs):
        found["inputs"] = f"{len(old_inputs)} files there, {len(new_inputs)} now"
    else:
        for old, new, entry in zip(old_inputs, new_inputs, identity["inputs"], strict=True):
            if old != new:
                found[f"input {entry['path']}"] = f"{old[0]} bytes ({old[1]}) there, {new[0]} bytes ({new[1]}) now"
    return found


def _value_differences(name: str, old: Any, new: Any) -> dict[str, str]:
    if old == new:
        return {}
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {name: f"{_short(old)} there, {_short(new)} now"}
    found: dict[str, str] = {}
    for key in [*new, *(key for key in old if key not in new)]:
        found |= _value_differences(f"{name}.{key}", old.get(key), new.get(key))
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"


@contextmanager
def _lock(folder: Path, step: str) -> Iterator[None]:
    """Hold the folder for one run; the kernel drops the lock when the process ends, however it ends."""
    path = folder / f".{step}.lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 64, 0).decode(errors="replace").strip()
            raise ClipcidError(
                f"Another run ({holder or 'of unknown process number'}) is writing to {folder}.",
                "Wait for it, stop it, or work elsewhere (--work, or --out where the command has it).",
            ) from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)
