"""Servers that lie while they are read: other content in the middle, damaged copies, silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import STUDENT, make_caption, make_image, write_tar
from hostile_place import Outcome, Place
from hostile_server import Server, changing, serve_lies, silent, trickle, whole

from clipcid_cli.formats.data.web import FILE_SECONDS

_DISTILL = ("distill", "--student", "student.json", "--preset", "clip-kd", "--steps", "2", "--batch-size", "4")
_DISTILL += ("--val-fraction", "0")
_PADDING = 1_200_000  # after each image, so that a shard takes two requests


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path / "place")
    (place.work / "student.json").write_text(json.dumps(STUDENT))
    return place


def make_shard(place: Place, letter: bytes, padding: int = _PADDING) -> bytes:
    """Make a shard of eight pairs, with a letter many times after each image."""
    members = []
    for index in range(8):
        members.append((f"{index}.png", make_image(index) + letter * padding))
        members.append((f"{index}.txt", make_caption(index).encode()))
    return write_tar(place.root / "shard.tar", members).read_bytes()


def train(place: Place, server: Server, model: Path, name: str) -> Outcome:
    words = (*_DISTILL, "--name", name, "--cache-size", "0.2")
    return place.run(words[0], f"{server.url}/0.tar", "--teacher", model, *words[1:], hosts=[server.address])


def test_a_shard_that_changes_while_it_is_read_is_no_splice_of_two(place: Place, tiny_model: Path) -> None:
    one, other = (make_shard(place, letter) for letter in (b"1", b"2"))
    assert len(one) == len(other) > 2**23
    with serve_lies() as server:
        server.answers["/0.tar"] = changing(one)
        embedded = place.run("embed", f"{server.url}/0.tar", "--model", tiny_model, hosts=[server.address])
        assert not embedded.problems(), embedded
        server.answers["/0.tar"] = changing(one, other)
        outcome = train(place, server, tiny_model, "one")
    assert not outcome.problems(), outcome
    copies = [path.read_bytes() for path in place.cache.rglob("*") if path.is_file()]
    assert not any(b"1" * 1000 in copy and b"2" * 1000 in copy for copy in copies), outcome


def test_a_copy_that_was_cut_is_not_believed(place: Place, tiny_model: Path) -> None:
    with serve_lies() as server:
        server.answers["/0.tar"] = changing(make_shard(place, b"1", 10))
        embedded = place.run("embed", f"{server.url}/0.tar", "--model", tiny_model, hosts=[server.address])
        assert not embedded.problems(), embedded
        outcome = train(place, server, tiny_model, "one")
        assert not outcome.problems(), outcome
        (copy,) = place.cache.rglob("*.tar")
        size = copy.stat().st_size
        copy.write_bytes(copy.read_bytes()[:7])
        outcome = train(place, server, tiny_model, "two")
    assert not outcome.problems(), outcome
    assert outcome.run.returncode == 0, outcome
    assert copy.stat().st_size == size, outcome


@pytest.mark.slow
def test_a_copy_that_was_changed_is_not_believed(place: Place, tiny_model: Path) -> None:
    """Of the same size: the images of someone else."""
    with serve_lies() as server:
        server.answers["/0.tar"] = changing(make_shard(place, b"1", 10))
        embedded = place.run("embed", f"{server.url}/0.tar", "--model", tiny_model, hosts=[server.address])
        assert not embedded.problems(), embedded
        outcome = train(place, server, tiny_model, "one")
        assert not outcome.problems(), outcome
        (copy,) = place.cache.rglob("*.tar")
        whole_copy = copy.read_bytes()
        copy.write_bytes(whole_copy.replace(b"1" * 10, b"2" * 10))
        outcome = train(place, server, tiny_model, "two")
    assert not outcome.problems(), outcome
    assert copy.read_bytes() == whole_copy or outcome.run.returncode == 1, outcome


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "count"), [("silent", 6), ("trickle", 1)])  # images wait for one another
def test_a_server_that_does_not_answer_is_given_up(place: Place, tiny_model: Path, answer: str, count: int) -> None:
    with serve_lies() as server:
        for index in range(count):
            server.answers[f"/{index}.png"] = silent if answer == "silent" else trickle(make_image(index)[:20])
        server.answers["/honest.png"] = whole(make_image(9))
        path = place.data / "list.csv"
        cells = [f"{server.url}/honest.png", *(f"{server.url}/{index}.png" for index in range(count))]
        path.write_text("\n".join(("filepath", *cells, "")))
        words = ("embed", path, "--model", tiny_model, "--no-text", "--max-bad-fraction", 1)
        outcome = place.run(*words, hosts=[server.address], seconds=FILE_SECONDS + 240)
    assert not outcome.problems(), outcome
