"""The life of an output: lock, identity, work folder, sidecar; and by which rule a file is still the one it was."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sidecars import edit_sidecar

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats import memo
from clipcid_cli.formats.fingerprint import FileRecord, find_changed, record
from clipcid_cli.formats.memo import Memo, memo_table
from clipcid_cli.formats.output import Output, OutputSpec, find_output, is_claimed, open_output, remove_leftovers
from clipcid_cli.formats.sidecar import Sidecar

SETTINGS = {"keep": 0.5, "seed": 0}
OTHER = {"keep": 0.6, "seed": 0}
OLD, NEW = (FileRecord(name, 1, name) for name in "ab")


class KilledError(Exception):
    """A kill."""


def open_it(
    folder: Path, settings: dict[str, Any] = SETTINGS, inputs: Any = (), overwrite: bool = False, **more: Any
) -> Any:
    spec = OutputSpec(folder, "balance", Sidecar, settings=settings, inputs=inputs, overwrite=overwrite, **more)
    return open_output(spec)


def finish(output: Output[Sidecar], **files: str) -> Sidecar:
    output.begin_work()
    for name, content in files.items():
        (output.work / name).parent.mkdir(exist_ok=True)
        (output.work / name).write_text(content)
    return output.commit(counts={}, seconds={}, outputs=[record(output.work / name, output.work) for name in files])


def begin(folder: Path, settings: dict[str, Any] = SETTINGS, inputs: Any = (), **more: Any) -> Path:
    """Leave what a killed run leaves, with one unfinished file."""
    with contextlib.suppress(KilledError), open_it(folder, settings, inputs, **more) as output:
        output.begin_work()
        (output.work / "half").write_text("of it")
        raise KilledError
    return Path(output.work)


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_opening_writes_nothing_and_what_was_committed_is_found_finished(tmp_path: Path) -> None:
    with open_it(tmp_path / "out") as output:
        assert (output.finished, output.earlier, output.resumed) == (None, None, False)
    assert left(tmp_path / "out") == set()
    assert not is_claimed(tmp_path / "out", "balance")
    with open_it(tmp_path / "out") as output:
        written = finish(output, a="content")
    assert left(tmp_path / "out") == {"balance.json", "a"}
    with open_it(tmp_path / "out") as output:
        assert output.finished == written
    assert is_claimed(tmp_path / "out", "balance")


def test_what_was_killed_after_its_sidecar_leaves_nothing_in_the_end(tmp_path: Path) -> None:
    with open_it(tmp_path) as output:
        finish(output, a="content")
        remove_leftovers(output.spec)  # of a run that goes on
        assert (tmp_path / ".balance.lock").exists()
    (tmp_path / ".balance-0123456789abcdef").mkdir()
    (tmp_path / ".balance.lock").touch()
    remove_leftovers(output.spec)
    assert {path.name for path in tmp_path.iterdir()} == {"balance.json", "a"}


@pytest.mark.parametrize("make", [Path.mkdir, lambda lock: lock.symlink_to(lock.parent / "nowhere" / "lock")])
def test_a_folder_or_a_broken_link_in_the_place_of_a_lock_is_one_error(tmp_path: Path, make: Any) -> None:
    make(tmp_path / ".balance.lock")
    with pytest.raises(ClipcidError, match=r"Could not write .*\.balance\.lock") as found, open_it(tmp_path):
        pytest.fail("it was locked")
    assert found.value.fix


def test_another_run_is_refused_by_the_number_of_its_process(tmp_path: Path) -> None:
    refused = pytest.raises(ClipcidError, match=rf"^Another run \(process {os.getpid()}\) is writing to {tmp_path}\.")
    with open_it(tmp_path), refused as found, open_it(tmp_path, elsewhere="--out"):
        pytest.fail("it was locked")
    assert found.value.fix == "Wait for it, stop it, or write elsewhere (--out)."


def test_a_step_that_does_not_resume_leaves_nothing_unfinished(tmp_path: Path) -> None:
    begin(tmp_path, resumes=False)
    assert left(tmp_path) == set()
    begin(tmp_path, OTHER)
    with open_it(tmp_path, resumes=False) as output:
        assert not output.resumed
    assert left(tmp_path) == set()


@pytest.mark.parametrize("commit", [True, False])
def test_other_settings_are_an_error_that_names_them(tmp_path: Path, commit: bool) -> None:
    if commit:
        with open_it(tmp_path) as output:
            finish(output)
    else:
        begin(tmp_path)
    before = left(tmp_path)
    found = OutputSpec(tmp_path, "balance", Sidecar, settings=OTHER, inputs=[])
    for look in (open_it(tmp_path, OTHER).__enter__, lambda: find_output(found)):
        with pytest.raises(ClipcidError, match=r"settings\.keep: 0\.5 there, 0\.6 now") as caught:
            look()
        assert "--overwrite" in caught.value.fix
    assert left(tmp_path) == before
    with open_it(tmp_path) as output:
        assert (output.finished is not None, output.resumed) == (commit, not commit)


def test_unfinished_work_of_other_settings_without_a_finished_part_is_no_error(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(ClipcidError, match="unfinished balance output"), open_it(tmp_path, OTHER, parts="half"):
        pass
    with open_it(tmp_path, OTHER, parts="*.done") as output:
        assert not output.resumed
        output.begin_work()
        assert left(tmp_path) == {output.work_top.name}
        assert not (output.work / "half").exists()


def test_an_output_stays_whole_until_the_one_that_replaces_it_is_complete(tmp_path: Path) -> None:
    with open_it(tmp_path) as output:
        written = finish(output, a="old", b="old", **{"alone/c": "old", "shared/d": "old"})
    (tmp_path / "shared" / "mine").write_text("not the step's")
    begin(tmp_path, OTHER, overwrite=True)
    with open_it(tmp_path) as output:
        assert output.finished == written
    assert (tmp_path / "a").read_text() == "old"
    # What was begun with --overwrite is finished without.
    with open_it(tmp_path, OTHER) as output:
        assert output.resumed
        (output.work / "half").unlink()
        finish(output, a="new")
    assert left(tmp_path) == {"balance.json", "a", "shared"}
    assert left(tmp_path / "shared") == {"mine"}
    assert (tmp_path / "a").read_text() == "new"


def test_an_edited_sidecar_removes_nothing_of_others(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("not the step's")
    with open_it(tmp_path / "out") as output:
        finish(output, a="old", b="old")

    def rename(content: dict[str, Any]) -> None:
        for entry, name in zip(content["outputs"], ("\0", "../mine"), strict=True):
            entry["path"] = name

    edit_sidecar(tmp_path / "out" / "balance.json", rename)
    with pytest.raises(ClipcidError, match="is missing"):
        open_it(tmp_path / "out").__enter__()
    with open_it(tmp_path / "out", OTHER, overwrite=True) as output:
        finish(output, a="new")
    assert left(tmp_path) == {"mine", "out"}


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_lock_that_leads_to_another_file_is_refused_and_that_file_stays(tmp_path: Path, link: Any) -> None:
    profile = tmp_path / "profile"
    profile.write_text("export PATH")
    (tmp_path / "out").mkdir()
    link(tmp_path / "out" / ".balance.lock", profile)
    with (
        pytest.raises(ClipcidError, match=r"Could not write .*\.balance\.lock: it is ") as found,
        open_it(tmp_path / "out"),
    ):
        pytest.fail("it was locked")
    assert found.value.fix.startswith("Remove or rename what is in its place")
    assert profile.read_text() == "export PATH"


def test_nothing_moves_through_a_link_and_nothing_beyond_one_is_removed(tmp_path: Path) -> None:
    others, out = tmp_path / "others", tmp_path / "out"
    others.mkdir()
    (others / "key").write_text("mine")
    with open_it(out) as output:
        finish(output, **{"folder/key": "old", "a": "old"})
    shutil.rmtree(out / "folder")
    (out / "folder").symlink_to(others)
    refused = pytest.raises(ClipcidError, match=r"Could not write .*/out/folder: Not a directory")
    with refused as found, open_it(out, OTHER, overwrite=True) as output:
        finish(output, **{"folder/new": "new"})
    assert "Remove or rename what is in its place" in found.value.fix
    assert left(others) == {"key"}
    (out / "folder").unlink()
    with open_it(out, OTHER) as output:
        assert output.finished is not None, "it was complete, and only had to be moved"
    assert left(out) == {"balance.json", "folder"}


def test_a_folder_that_the_user_names_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for settings in (SETTINGS, OTHER):
        with open_it(tmp_path / "out", settings, overwrite=True) as output:
            finish(output, **{"folder/b": str(settings)})
    assert left(tmp_path / "disk") == {"balance.json", "folder"}


@pytest.mark.parametrize("place", ["", "half", "folder/half"])
def test_unfinished_work_with_a_link_is_not_continued(tmp_path: Path, place: str) -> None:
    others = tmp_path / "others"
    others.mkdir()
    work = begin(tmp_path / "out")
    if place:
        (work / place).parent.mkdir(exist_ok=True)
        (work / place).unlink(missing_ok=True)
        (work / place).symlink_to(others)
    else:
        work.rename(tmp_path / "moved")
        work.symlink_to(tmp_path / "moved")
    with pytest.raises(ClipcidError, match=rf"{work / place} is a link in the folder of an unfinished run") as found:
        open_it(tmp_path / "out").__enter__()
    assert found.value.fix == f"Remove {work}, then run the same command again."
    assert left(others) == set()


def test_settings_and_inputs_that_may_differ_need_no_overwrite_and_unfinished_work_of_others_is_continued(
    tmp_path: Path,
) -> None:
    with open_it(tmp_path / "done") as output:
        written = finish(output)
    with open_it(tmp_path / "done", OTHER, may_differ={"keep"}) as output:
        assert (output.finished, output.earlier) == (None, written)
    with pytest.raises(ClipcidError, match="seed"):
        open_it(tmp_path / "done", {"keep": 0.6, "seed": 1}, may_differ={"keep"}).__enter__()
    folder = tmp_path / "begun"
    begin(folder, inputs=[OLD])
    for settings, inputs in ((OTHER, [OLD]), (OTHER, [NEW, OLD])):
        with open_it(folder, settings, inputs, may_differ={"keep", "inputs"}) as output:
            assert output.resumed
            output.begin_work()
            assert (output.work / "half").read_text() == "of it"
        assert len(left(folder)) == 1
    with pytest.raises(ClipcidError, match="inputs: 2 files before, 1 now; changed or gone: a"):
        open_it(folder, OTHER, [NEW]).__enter__()
    others = [FileRecord("/others/c", 1, "c")]
    with pytest.raises(ClipcidError, match="2 files before, 1 now; other data: b before, /others/c now"):
        open_it(folder, OTHER, others).__enter__()
    with pytest.raises(ClipcidError, match="2 files before, 3 now; changed or gone: b"):
        open_it(folder, OTHER, [OLD, *others, FileRecord("/others/d", 1, "d")]).__enter__()
    with open_it(folder, overwrite=True) as output:
        assert not output.resumed
        assert len(left(folder)) == 1
        output.begin_work()
        assert not (output.work / "half").exists()


@pytest.mark.parametrize("at", range(20))
def test_a_run_killed_while_it_moves_its_files_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    def write(output: Output[Sidecar]) -> None:
        output.begin_work()
        (output.work / "new").mkdir(exist_ok=True)
        (output.work / "new" / "c").write_text("new")
        finish(output, **{"a": "new", "folder/b": "new"})

    with open_it(tmp_path, OTHER) as output:
        finish(output, **{"a": "old", "folder/b": "old", "folder/gone": "old"})
    (tmp_path / "folder" / "foreign").write_text("mine")
    count = iter(range(100))
    for name in ("replace", "rename", "unlink", "rmdir"):
        real = getattr(os, name)

        def act(*given: Any, real: Any = real, **named: Any) -> Any:
            if next(count) == at:
                raise KilledError
            return real(*given, **named)

        monkeypatch.setattr(os, name, act)
    with contextlib.suppress(KilledError), open_it(tmp_path, overwrite=True) as output:
        write(output)
    monkeypatch.undo()
    with open_it(tmp_path, overwrite=True) as output:
        if output.finished is None:
            write(output)
    files = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    del files["balance.json"]
    assert files == {"a": "new", "folder/b": "new", "folder/foreign": "mine", "new/c": "new"}
    assert left(tmp_path) == {"balance.json", "a", "folder", "new"}


def test_every_name_is_on_the_disk_before_the_sidecar_and_the_sidecars_own_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_sync, real_replace = os.fsync, os.replace
    events: list[tuple[str, Path]] = []
    folders: dict[int, Path] = {}

    def sync(descriptor: int) -> None:
        folders.update({path.stat().st_ino: path for path in (tmp_path, *tmp_path.rglob("*")) if path.is_dir()})
        events.append(("sync", folders.get(os.fstat(descriptor).st_ino, Path())))
        real_sync(descriptor)

    def replace(source: Any, target: Any, **more: Any) -> None:
        events.append(("move", Path(target)))
        real_replace(source, target, **more)

    with open_it(tmp_path / "out") as output:
        finish(output, **{"folder/b": "old"})
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    with open_it(tmp_path / "out", OTHER, overwrite=True) as output:
        finish(output, **{"a": "new", "folder/b": "new", "alone/c": "new"})
    out = tmp_path / "out"
    moves = [path for kind, path in events if kind == "move" and output.work_top not in path.parents]
    assert moves == [out / "a", out / "alone", out / "folder" / "b", out / "balance.json"]
    commit = events.index(("move", out / "balance.json"))
    for path in moves[:-1]:
        assert ("sync", path.parent) in events[events.index(("move", path)) : commit]
    assert ("sync", out) in events[commit:]
    # What moves as one piece was synced where it was made.
    assert ("sync", output.work / "alone") in events[: events.index(("move", out / "alone"))]


def test_an_output_made_in_place_is_cleared_before_its_work_appears(tmp_path: Path) -> None:
    with open_it(tmp_path) as output:
        finish(output)
    (tmp_path / "log").write_text("old")

    def die() -> None:
        raise KilledError

    with pytest.raises(KilledError), open_it(tmp_path, OTHER, overwrite=True) as output:
        output.begin_work(die)
    # Neither a finished output nor one to resume: the old file is nobody's.
    with open_it(tmp_path, OTHER) as output:
        assert (output.finished, output.resumed) == (None, False)
        output.begin_work((tmp_path / "log").unlink)
    with open_it(tmp_path, OTHER) as output:
        assert output.resumed
        output.begin_work((tmp_path / "log").touch)
    assert (tmp_path / "log").exists(), "who writes in place decides what it goes on with"


def test_large_files_are_told_apart_by_their_middle(tmp_path: Path) -> None:
    size = 70 * 2**20
    path = tmp_path / "large.tar"
    with path.open("wb") as file:
        file.truncate(size)
    before = record(path)
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"x")
    assert before.hash.startswith("blake2b-sampled:")
    assert before.hash != record(path).hash


def test_a_file_is_hashed_again_only_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        file.write_text(f"content of {file.name}")
    expected = [record(file) for file in files]
    time.sleep(0.15)  # a file that was just written may change again within the tick of its clock
    first = Memo(tmp_path / "table")
    assert first.record_all(files) == expected
    first.save()

    hashed: list[Path] = []
    monkeypatch.setattr(memo, "record", lambda path: hashed.append(path) or record(path))
    again = Memo(tmp_path / "table")
    assert again.record_all(files) == expected
    assert hashed == []
    files[1].write_text("content of c")  # as long as before
    os.utime(files[1], ns=(1, 1))
    assert again.record(files[1]) == record(files[1]) != expected[1]
    assert hashed == [files[1]]


def test_another_file_of_the_same_size_and_time_is_hashed_again(tmp_path: Path) -> None:
    """Archives that can be reproduced all have time 0."""
    one, other = tmp_path / "one", tmp_path / "other"
    for file in (one, other):
        file.write_text(file.name.ljust(9))
        os.utime(file, ns=(0, 0))
    time.sleep(0.15)
    memo = Memo(tmp_path / "table")
    assert memo.record(one) == record(one)
    memo.save()
    other.replace(one)
    assert Memo(tmp_path / "table").record(one) == record(one)


def test_the_hash_of_a_file_that_may_still_change_unseen_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    memo = Memo(tmp_path / "table")
    memo.record(tmp_path / "a")
    memo.save()
    assert not (tmp_path / "table").exists()
    time.sleep(0.15)
    memo.record(tmp_path / "a")
    memo.save()
    assert len(json.loads((tmp_path / "table").read_text())) == 1


def test_hashes_are_kept_in_the_users_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPCID_CACHE", str(tmp_path / "cache"))
    before = os.umask(0)
    try:
        (tmp_path / "rows").mkdir()
        (tmp_path / "rows" / "a").write_text("a")
        time.sleep(0.15)
        memo = Memo(memo_table(tmp_path / "rows"))
        memo.record(tmp_path / "rows" / "a")
        memo.save()
    finally:
        os.umask(before)
    (table,) = (tmp_path / "cache" / "fingerprints").iterdir()
    assert memo.table == table
    assert stat.S_IMODE(table.parent.stat().st_mode) == 0o700
    assert os.listdir(tmp_path / "rows") == ["a"]


@pytest.mark.parametrize("content", [b"", b"[{", b"[1]"])
def test_a_damaged_table_only_costs_time(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "table").write_bytes(content)
    (tmp_path / "a").write_text("a")
    memo = Memo(tmp_path / "table")
    assert memo.record(tmp_path / "a") == record(tmp_path / "a")
    memo.save()
    assert Memo(tmp_path / "table").record(tmp_path / "a") == record(tmp_path / "a")


def copy_elsewhere(path: Path) -> None:
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))


@pytest.mark.parametrize("number", [3, 100])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.write_bytes(b"longer than it was"), "has changed"),
        (lambda path: path.write_bytes(b"unlike it"), "has changed"),  # of the same size
        (Path.unlink, "is missing"),
        (lambda path: os.utime(path, ns=(0, 0)), None),
        (copy_elsewhere, None),
    ],
)
def test_of_files_one_that_changed_is_found(
    tmp_path: Path, change: Callable[[Path], object], said: str | None, number: int
) -> None:
    """Many files are compared with a listing of their folders; a file of another time by its hash."""
    files = [tmp_path / kind / f"{each}.bin" for kind in ("a", "b") for each in range(number // 2 + 1)]
    for each, path in enumerate(files):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([each]) * 9)
        os.utime(path, ns=(1, 1))
    records, since = [record(file, tmp_path) for file in files], tmp_path / "embed.json"
    assert find_changed(tmp_path, records, since) is None
    change(files[-1])
    found = find_changed(tmp_path, records, since)
    assert (found is None) == (said is None)
    assert found is None or found.startswith(f"{files[-1]} {said}")
    shutil.rmtree(files[0].parent)
    assert str(find_changed(tmp_path, records, since)).startswith(f"{files[0]} is missing")


def test_settings_with_a_secret_are_those_with_another(tmp_path: Path) -> None:
    def name(word: str, host: str = "h") -> dict[str, Any]:
        return {"data": [f"https://ann:{word}@{host}/a.tar"]}

    begin(tmp_path, name("x"))
    with open_it(tmp_path, name("y")) as output:
        assert output.begun == output.work_top
        finish(output)
    with open_it(tmp_path, name("x")) as output:
        assert output.finished is not None
        assert output.finished.settings == {"data": ["https://REDACTED@h/a.tar"]}
    differ = r"REDACTED@h/a\.tar.* there, .*REDACTED@i/a\.tar.* now"
    with pytest.raises(ClipcidError, match=differ), open_it(tmp_path, name("x", "i")):
        pass


def test_a_hash_that_differs_is_told_as_other_content(tmp_path: Path) -> None:
    begin(tmp_path, {"classes": "blake2b:" + 32 * "a"})
    with (
        pytest.raises(ClipcidError, match=r"settings\.classes: other content\n"),
        open_it(tmp_path, {"classes": "blake2b:" + 32 * "b"}),
    ):
        pass
    with pytest.raises(ClipcidError, match="given there, null now"), open_it(tmp_path, {"classes": None}):
        pass


def test_inputs_come_first_and_by_their_names_alone(tmp_path: Path) -> None:
    begin(tmp_path, {"against": [["eval", 32 * "a"]]}, inputs=[OLD])
    told = rf"inputs:\n  input {NEW.path}: {OLD.path} before\n  settings\.against: \[\"eval\"\] there, null now\n"
    with (
        pytest.raises(ClipcidError, match=told),
        open_it(tmp_path, {"against": None}, [NEW], may_differ={"inputs"}),
    ):
        pass
    with pytest.raises(ClipcidError, match=r"against: other content\n"):
        open_it(tmp_path, {"against": [["eval", 32 * "b"]]}, [OLD]).__enter__()
