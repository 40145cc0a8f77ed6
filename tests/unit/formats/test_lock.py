"""The lock of a file: who waits for it counts as at work, as the run does that holds it."""

import threading
from pathlib import Path

import pytest

from clipcid_cli.at_work import count_notes
from clipcid_cli.formats.files import lock


def test_who_waits_for_a_lock_counts_as_at_work(tmp_path: Path) -> None:
    path, waited = tmp_path / "lock", threading.Event()

    def wait() -> None:
        with lock(path):
            waited.set()

    with lock(path):
        with pytest.raises(BlockingIOError), lock(path, wait=False):
            pass
        noted = count_notes()
        thread = threading.Thread(target=wait)
        thread.start()
        while count_notes() == noted:
            assert not waited.wait(0.01)
    thread.join()
    assert waited.is_set()
