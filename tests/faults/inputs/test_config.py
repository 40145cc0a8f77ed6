"""Settings of the configuration file that are of another type than the flag's: a usage error that names the key."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from one_process import OneProcess


@pytest.fixture(scope="module")
def clipcid() -> Iterator[OneProcess]:
    process = OneProcess()
    yield process
    process.close()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("work = []", "[balance] work is [], not a path"),
        ("work = 3", "[balance] work is 3, not a path"),
        ("json = 1", "[balance] json is 1, not true or false"),
        ('quiet = "yes"', "[balance] quiet is 'yes', not true or false"),
        ("keep = true", "[balance] keep is True, not a number"),
        ("keep = [0.5]", "[balance] keep is [0.5], not a number"),
        ("keep = {}", "[balance] keep is {}, not a number"),
        ("seed = 1979-05-27", "[balance] seed is datetime.date(1979, 5, 27), not a number"),
        ("linkage = ['star']", "[balance] linkage is ['star'], not text"),
        ("data = {a = 1}", "[balance] data is {'a': 1}, not text"),
        ('data = "a\\u0000b"', "DATA holds a NUL character"),
        ("keep = inf", "'--keep' in c.toml: inf is not in the range 0<x<=1"),
        ("keep = nan", "--keep nan is not in the range 0<x<=1"),
        ("seed = 0.5", "'--seed' in c.toml: '0.5' is not a valid whole number"),
        ("linkage = 'double'", "'--linkage' in c.toml: 'double' is not one of"),
        ("keep = 0.5.5", "is not TOML"),
        ("keep = [" + "[" * 5000, "is not TOML"),
        ("seed = " + "9" * 5000, "is not TOML"),
    ],
)
def test_a_value_of_another_type_is_a_usage_error(
    clipcid: OneProcess, tmp_path: Path, line: str, expected: str
) -> None:
    (tmp_path / "c.toml").write_text(f"[balance]\n{line}\n")
    found = clipcid("balance", "--config", "c.toml", cwd=tmp_path)
    assert found.code == 2, found
    assert not found.problems(), found
    assert expected in " ".join(found.err.split())
    assert os.listdir(tmp_path) == ["c.toml"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[balance]\n\xe9 = 1", b"\0" * 100])
def test_a_file_that_is_no_text_is_a_usage_error(clipcid: OneProcess, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.toml").write_bytes(content)
    found = clipcid("balance", "--config", "c.toml", cwd=tmp_path)
    assert found.code == 2, found
    assert not found.problems(), found


def test_a_pipe_or_a_folder_is_not_read(clipcid: OneProcess, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.toml")
    (tmp_path / "d.toml").mkdir()
    for name in ("c.toml", "d.toml"):
        found = clipcid("balance", "--config", name, cwd=tmp_path)
        assert found.code == 2, found
        assert "not a file" in found.err or "Is a directory" in found.err


def test_one_item_stands_for_a_list_and_a_number_for_text(clipcid: OneProcess, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[eval-linear]\nshots = 4\n[export]\nformat = "onnx"\n')
    found = clipcid("eval-linear", "--config", "c.toml", cwd=tmp_path)
    assert "There is no data to evaluate on" in found.err, found
    found = clipcid("export", "--config", "c.toml", cwd=tmp_path)
    assert "No model was named" in found.err, found
