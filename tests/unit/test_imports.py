"""Importing a module without another that it takes along where it can."""

import sys
from pathlib import Path

import pytest

from clipcid_cli.runtime.imports import import_without

USER = "try:\n    import clipcid_test_taken\nexcept ImportError:\n    clipcid_test_taken = None\n"


def test_the_other_is_left_out_and_can_be_imported_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clipcid_test_user.py").write_text(USER)
    (tmp_path / "clipcid_test_again.py").write_text(USER)
    (tmp_path / "clipcid_test_taken.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    import_without("clipcid_test_user", "clipcid_test_taken")
    assert sys.modules["clipcid_test_user"].clipcid_test_taken is None
    assert "clipcid_test_taken" not in sys.modules

    import clipcid_test_taken  # type: ignore[import-not-found]

    # What is there already stays, and is found.
    import_without("clipcid_test_again", "clipcid_test_taken")
    assert sys.modules["clipcid_test_again"].clipcid_test_taken is clipcid_test_taken
    assert sys.modules["clipcid_test_taken"] is clipcid_test_taken
    for name in ("user", "again", "taken"):
        del sys.modules[f"clipcid_test_{name}"]


def test_a_failing_import_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clipcid_test_broken.py").write_text("raise RuntimeError('broken')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match="broken"):
        import_without("clipcid_test_broken", "clipcid_test_other")
    assert "clipcid_test_other" not in sys.modules
