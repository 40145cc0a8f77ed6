"""Class names and templates: what is read, and what is refused because it would shift labels in silence."""

import hashlib
from pathlib import Path

import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark import fill_template, hash_lines, read_class_names, read_templates


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_class_names_are_stripped_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "names.txt", "\ufeffapple pie\r\n  baby back ribs \nbaklava\n\n\n")
    assert read_class_names(path) == ("apple pie", "baby back ribs", "baklava")


@pytest.mark.parametrize(
    ("text", "message"), [("", "contains no class name"), ("a\n\nb\n", "line 2 is empty"), ("\na\n", "line 1 is empty")]
)
def test_class_names_that_would_shift_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ClipcidError, match=message):
        read_class_names(write(tmp_path / "names.txt", text))


def test_the_hash_of_lines_is_that_of_their_file(tmp_path: Path) -> None:
    path = write(tmp_path / "names.txt", "apple pie\ncafé\n")
    assert hash_lines(read_class_names(path)) == hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest()
    hashes = [hash_lines(lines) for lines in (("ab", "c"), ("a", "bc"), ("c", "ab"), ("abc",), ("ab", "c", ""), ())]
    assert len(set(hashes)) == len(hashes)


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ClipcidError, match="No such file"):
        read_class_names(tmp_path / "none.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ClipcidError, match="cannot be read as UTF-8 text"):
        read_class_names(tmp_path / "binary.txt")


def test_both_spellings_of_a_template(tmp_path: Path) -> None:
    path = write(tmp_path / "templates.txt", "a photo of a {c}.\na drawing of {}.\n")
    filled = [fill_template(template, "{x} cat") for template in read_templates(path)]
    assert filled == ["a photo of a {x} cat.", "a drawing of {x} cat."]


def test_template_without_a_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClipcidError, match=r"line 2: 'a cat' has no placeholder"):
        read_templates(write(tmp_path / "templates.txt", "a {c}\na cat\n"))


def test_template_is_never_a_format_string() -> None:
    assert fill_template("{c} {c.__class__} {0}", "cat") == "cat {c.__class__} {0}"
