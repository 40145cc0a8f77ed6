"""Parts of an output that are done: those that are torn or taken back are to be done again."""

from __future__ import annotations

from pathlib import Path

from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.journal import record_journal


def test_parts_that_are_torn_edited_or_forgotten_are_not_done(tmp_path: Path) -> None:
    journal = record_journal(tmp_path / "parts", FileRecord)
    assert list(journal.entries()) == []
    records = {name: FileRecord(name, size, "blake2b:0") for size, name in enumerate(("b", "a", "c"))}
    for name, record in records.items():
        journal.append(name, record)
    assert list(journal.entries()) == [(name, records[name]) for name in "abc"]
    whole = journal.path("a").read_bytes()
    journal.path("a").write_bytes(whole[:-9])
    journal.forget("b")
    assert [name for name, _ in journal.entries()] == ["c"]
    assert journal.read("a") is None
    for edited in (whole.replace(b'"size": 1', b'"size": 2'), b"[]", b"[" * 100_000, b'{"checksum": null}'):
        assert edited != whole
        journal.path("a").write_bytes(edited)
        assert journal.read("a") is None, edited[:99]
    journal.path("a").write_bytes(whole)
    assert journal.read("a") == records["a"]
