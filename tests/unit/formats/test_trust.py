"""Whose work directory is written to without being asked, and which links in it are not followed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.trust import validate_work

OWNER = os.getuid() or 4242
GROUP = os.getgid() or 4242


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A work directory of an ordinary user."""
    work = tmp_path / "work"
    work.mkdir(mode=0o755)
    if os.getuid() == 0:
        os.chown(work, OWNER, GROUP)
    return work


def act_as(monkeypatch: pytest.MonkeyPatch, user: int, group: int) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(os, "getegid", lambda: group)
    monkeypatch.setattr(os, "getgroups", lambda: [group])


def test_the_work_directory_of_another_user_is_refused(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    act_as(monkeypatch, OWNER + 1, GROUP)
    with pytest.raises(ClipcidError, match=rf"The work directory {theirs} belongs to another user \(") as found:
        validate_work(theirs)
    assert "--trust-work" in found.value.fix


@pytest.mark.parametrize(
    ("user", "group", "mode"),
    [
        (OWNER, GROUP, 0o700),
        (0, 0, 0o700),  # root, in a container with the folder of a user mounted
        (OWNER + 1, GROUP, 0o775),  # of a group that shares it
    ],
)
def test_ones_own_and_a_shared_work_directory_is_not_asked_about(
    theirs: Path, monkeypatch: pytest.MonkeyPatch, user: int, group: int, mode: int
) -> None:
    theirs.chmod(mode)
    act_as(monkeypatch, user, group)
    validate_work(theirs)
    validate_work(theirs / "missing")


def test_a_folder_that_all_may_write_to_is_not_shared_by_that(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs.chmod(0o777)
    act_as(monkeypatch, OWNER + 1, GROUP + 1)
    with pytest.raises(ClipcidError, match="belongs to another user"):
        validate_work(theirs)


@pytest.mark.parametrize("place", ["balance", "embeddings/teacher", "distill/run/checkpoints"])
def test_a_linked_folder_inside_may_not_lead_out(tmp_path: Path, place: str) -> None:
    work, others = tmp_path / "work", tmp_path / "others"
    link = work / place
    link.parent.mkdir(parents=True)
    others.mkdir()
    link.symlink_to(others)
    with pytest.raises(ClipcidError, match=rf"{link} is a link out of the work directory, to {others}\.") as found:
        validate_work(work)
    assert found.value.fix == "Add --trust-work to write there, or replace the link by a folder."


def test_links_that_stay_inside_or_are_the_work_directory_itself_are_followed(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    (disk / "embeddings" / "teacher").mkdir(parents=True)
    (disk / "embeddings" / "same").symlink_to(disk / "embeddings" / "teacher")
    (disk / "notes.txt").symlink_to("/etc/hostname")  # a file is replaced, not written through
    (tmp_path / "work").symlink_to(disk)
    validate_work(tmp_path / "work")
