"""The life of an output folder: lock, plan, sidecar, differences."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from clipcid_cli.formats.differences import list_differences
from clipcid_cli.formats.listing import is_as_listed, list_recorded

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.output import (
    describe_outputs,
    find_changed,
    fingerprint_file,
    open_output,
    read_sidecar,
)

SETTINGS = {"keep": 0.5, "seed": 0}


def open_it(
    folder: Path, settings: dict[str, Any] = SETTINGS, inputs: Any = (), overwrite: bool = False, **more: Any
) -> Any:
    return open_output(folder, "balance", settings=settings, inputs=list(inputs), overwrite=overwrite, **more)


def test_a_new_folder_is_neither_finished_nor_resumed(tmp_path: Path) -> None:
    with open_it(tmp_path / "out") as output:
        assert output.finished is None
        assert not output.resumed


def test_what_was_committed_is_found_finished(tmp_path: Path) -> None:
    with open_it(tmp_path) as output:
        written = output.commit(counts={"images": 3}, seconds={"read": 0.12345}, result={"kept": 2})
    assert written["seconds"] == {"read": 0.123}
    with open_it(tmp_path) as output:
        assert output.finished == written
    assert not list(tmp_path.glob("*.partial"))
    assert not (tmp_path / ".balance.plan.json").exists()


def test_the_plan_of_a_run_killed_right_after_its_sidecar_is_removed_by_the_next(tmp_path: Path) -> None:
    with open_it(tmp_path):
        plan = (tmp_path / ".balance.plan.json").read_bytes()
    with open_it(tmp_path) as output:
        output.commit(counts={}, seconds={})
    (tmp_path / ".balance.plan.json").write_bytes(plan)
    with open_it(tmp_path) as output:
        assert output.finished is not None
        assert not (tmp_path / ".balance.plan.json").exists()


def test_a_folder_in_the_place_of_a_lock_is_one_error(tmp_path: Path) -> None:
    (tmp_path / ".balance.lock").mkdir()
    with pytest.raises(ClipcidError, match=r"Could not write .*\.balance\.lock") as found, open_it(tmp_path):
        pytest.fail("it was locked")
    assert found.value.fix


def test_what_was_not_committed_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"), open_it(tmp_path):
        raise RuntimeError("killed")
    with open_it(tmp_path) as output:
        assert output.resumed
        assert output.finished is None


@pytest.mark.parametrize("commit", [True, False])
def test_other_settings_are_an_error_that_names_them(tmp_path: Path, commit: bool) -> None:
    with open_it(tmp_path) as output:
        if commit:
            output.commit(counts={}, seconds={})
    with pytest.raises(ClipcidError, match=r"settings\.keep: 0\.5 there, 0\.6 now") as caught:
        open_it(tmp_path, {"keep": 0.6, "seed": 0}).__enter__()
    assert "--overwrite" in caught.value.fix
    # Nothing was lost by asking.
    with open_it(tmp_path) as output:
        assert (output.finished is not None) == commit


def test_overwrite_starts_anew(tmp_path: Path) -> None:
    with open_it(tmp_path) as output:
        output.commit(counts={}, seconds={})
    with open_it(tmp_path, {"keep": 0.6, "seed": 0}, overwrite=True) as output:
        assert output.finished is None
        assert not output.resumed
        assert read_sidecar(tmp_path / "balance.json") is None


def test_replaceable_settings_need_no_overwrite(tmp_path: Path) -> None:
    with open_it(tmp_path) as output:
        output.commit(counts={}, seconds={})
    with open_it(tmp_path, {"keep": 0.6, "seed": 0}, replaceable=frozenset({"keep"})) as output:
        assert output.finished is None
    with pytest.raises(ClipcidError, match="seed"):
        open_it(tmp_path, {"keep": 0.6, "seed": 1}, replaceable=frozenset({"keep"})).__enter__()


def test_a_changed_input_is_named(tmp_path: Path) -> None:
    data = tmp_path / "data.tar"
    data.write_bytes(b"a" * 10)
    with open_it(tmp_path / "out", inputs=[fingerprint_file(data)]) as output:
        output.commit(counts={}, seconds={})
    data.write_bytes(b"b" * 11)
    with pytest.raises(ClipcidError, match=r"data\.tar: 10 bytes .* there, 11 bytes .* now"):
        open_it(tmp_path / "out", inputs=[fingerprint_file(data)]).__enter__()


def test_a_moved_input_is_the_same_input(tmp_path: Path) -> None:
    old, new = tmp_path / "old.tar", tmp_path / "new.tar"
    old.write_bytes(b"same")
    new.write_bytes(b"same")
    existing = {"settings": SETTINGS, "inputs": [fingerprint_file(old)]}
    assert list_differences(existing, {"settings": SETTINGS, "inputs": [fingerprint_file(new)]}) == {}


def test_a_sidecar_without_inputs_has_other_inputs(tmp_path: Path) -> None:
    data = tmp_path / "data.tar"
    data.write_bytes(b"data")
    with open_it(tmp_path / "out", inputs=[fingerprint_file(data)]) as output:
        output.commit(counts={}, seconds={})
    path = tmp_path / "out" / "balance.json"
    path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "inputs"})
    )
    with pytest.raises(ClipcidError, match="inputs: 0 files there, 1 now"):
        open_it(tmp_path / "out", inputs=[fingerprint_file(data)]).__enter__()


def test_large_files_are_told_apart_by_their_middle(tmp_path: Path) -> None:
    size = 70 * 2**20
    path = tmp_path / "large.tar"
    with path.open("wb") as file:
        file.truncate(size)
    before = fingerprint_file(path)
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"x")
    after = fingerprint_file(path)
    assert before["hash"].startswith("blake2b-sampled:")
    assert before["hash"] != after["hash"]


def hold(folder: Path, held: Any, release: Any) -> None:
    with open_it(folder):
        held.set()
        release.wait(30)


def test_a_second_run_is_refused_while_the_first_lives_and_admitted_when_it_is_killed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, held, release))
    process.start()
    assert held.wait(30)
    with pytest.raises(ClipcidError, match=f"process {process.pid}"):
        open_it(tmp_path).__enter__()
    process.kill()
    process.join()
    with open_it(tmp_path) as output:
        assert output.resumed


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "balance.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(ClipcidError, match=r"format version 99; this clipcid .* knows up to 1"):
        open_it(tmp_path).__enter__()


def test_a_sidecar_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "balance.json").write_text("{")
    with pytest.raises(ClipcidError, match=r"balance\.json cannot be read as a sidecar"):
        open_it(tmp_path).__enter__()


def test_what_an_earlier_plan_left_is_cleared_before_the_new_plan_says_so(tmp_path: Path) -> None:
    with open_it(tmp_path) as output:
        (tmp_path / "half").write_text("old")
        output.commit(counts={}, seconds={})

    def die() -> None:
        raise RuntimeError("killed")

    other = {"keep": 0.6, "seed": 0}
    with pytest.raises(RuntimeError, match="killed"):
        open_it(tmp_path, other, overwrite=True, clear=die).__enter__()
    # The same command again, even without --overwrite, must not take the old files for its own.
    with open_it(tmp_path, other, clear=(tmp_path / "half").unlink) as output:
        assert not output.resumed
        assert not (tmp_path / "half").exists()
    with open_it(tmp_path, other, clear=die) as output:
        assert output.resumed


def test_an_output_that_is_never_resumed_stays_until_it_is_replaced(tmp_path: Path) -> None:
    once: dict[str, Any] = {"resumable": False, "replaceable": frozenset({"seed"})}
    with open_it(tmp_path, **once) as output:
        written = output.commit(counts={}, seconds={})
    drawn = {"keep": 0.5, "seed": 1}
    # Runs that end before they write anything.
    with open_it(tmp_path, drawn, **once) as output:
        assert (output.finished, output.earlier) == (None, written)
    with open_it(tmp_path, {"keep": 0.6}, overwrite=True, **once) as output:
        assert (output.finished, output.earlier, output.resumed) == (None, None, False)
    with open_it(tmp_path, **once) as output:
        assert output.finished == written
    (tmp_path / "content").write_text("old")
    with open_it(tmp_path, drawn, **once) as output:
        output.drop_earlier(tmp_path / "content")
        assert not (tmp_path / "content").exists()
        assert read_sidecar(tmp_path / "balance.json") is None


def test_an_output_that_is_kept_until_it_is_replaced_can_be_resumed_where_there_was_none(tmp_path: Path) -> None:
    once: dict[str, Any] = {"keeps_earlier": True, "replaceable": frozenset({"seed"}), "may_grow": True}
    old, new = ({"path": name, "size": 1, "hash": name} for name in "ab")
    with open_it(tmp_path, inputs=[old], **once):
        pass
    with open_it(tmp_path, inputs=[old], **once) as output:
        assert output.resumed
        written = output.commit(counts={}, seconds={})
    for settings, inputs in (({"keep": 0.5, "seed": 1}, [old]), (SETTINGS, [old, new])):
        with open_it(tmp_path, settings, inputs, **once) as output:
            assert (output.finished, output.earlier, output.resumed) == (None, written, False)
    with open_it(tmp_path, inputs=[old], **once) as output:
        assert output.finished == written
    with open_it(tmp_path, inputs=[new], overwrite=True, **once) as output:
        assert (output.finished, output.earlier) == (None, None)
    assert read_sidecar(tmp_path / "balance.json") is None


def test_a_finished_output_is_not_cleared(tmp_path: Path) -> None:
    with open_it(tmp_path) as output:
        output.commit(counts={}, seconds={})

    def never() -> None:
        raise AssertionError("cleared a finished output")

    with open_it(tmp_path, clear=never) as output:
        assert output.finished is not None


def test_of_nested_settings_the_innermost_difference_is_told() -> None:
    def sidecar(weight: float, **more: float) -> dict[str, Any]:
        losses = {
            "clip": {"value": 1.0},
            "cluster": {"value": weight},
            **{name: {"value": v} for name, v in more.items()},
        }
        return {"settings": {"losses": losses, "steps": 5}, "inputs": []}

    assert list_differences(sidecar(0.25), sidecar(0.5)) == {"settings.losses.cluster.value": "0.25 there, 0.5 now"}
    assert list_differences(sidecar(0.5, fd=2.0), sidecar(0.5)) == {
        "settings.losses.fd": '{"value": 2.0} there, null now'
    }
    assert list_differences(sidecar(0.5), sidecar(0.5)) == {}


@pytest.mark.parametrize("change", ["edited", "same size", "removed", "folder removed", "touched", "copied link"])
def test_of_many_files_one_that_changed_is_found(tmp_path: Path, change: str) -> None:
    """Many files are compared with a listing of their folders; a file of another time by its hash."""
    files = [tmp_path / kind / f"{number}.bin" for kind in ("a", "b") for number in range(50)]
    for number, path in enumerate(files):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([number]) * 9)
    sidecar = {"outputs": describe_outputs(tmp_path, files)}
    assert find_changed(tmp_path, "embed", sidecar) is None
    victim = files[70]
    if change == "edited":
        victim.write_bytes(b"longer than it was")
    elif change == "same size":
        victim.write_bytes(b"unlike it")
        os.utime(victim, ns=(0, 0))
    elif change == "removed":
        victim.unlink()
    elif change == "folder removed":
        shutil.rmtree(victim.parent)
        victim = files[50]
    elif change == "touched":
        os.utime(victim, ns=(0, 0))
    else:
        victim.rename(tmp_path / "elsewhere")
        victim.symlink_to(tmp_path / "elsewhere")
    found = find_changed(tmp_path, "embed", sidecar)
    if change in ("touched", "copied link"):
        assert found is None
    else:
        assert found is not None
        assert found.startswith(f"{victim} {'is missing' if 'removed' in change else 'has changed'}")


def test_many_files_of_the_current_folder_are_known_by_a_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / kind / f"{number}.bin" for kind in ("a", ".") for number in range(50)]
    for path in files:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"content")
    sidecar = {"outputs": describe_outputs(tmp_path, files)}
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, Path(".")):
        stats = list_recorded(folder, sidecar["outputs"])
        assert all(is_as_listed(stats.get(entry["path"]), entry) for entry in sidecar["outputs"])
