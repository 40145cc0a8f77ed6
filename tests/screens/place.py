"""The folder that the screens are made in: a little of the shipped data, the shipped teacher, and data that is broken."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"
_PAIRS, _CLASSES = 150, 8


def make_place(folder: Path) -> Path:
    """Fill a folder with what the commands of the screens are given."""
    data = QUICKSTART / "data"
    for number in range(2):
        name = f"{number:05d}.tar"
        _copy(data / "pairs" / name, folder / "pairs" / name, lambda key, _: True, _PAIRS)
    for split in ("train", "test"):
        tar = folder / "classes" / split / "0.tar"
        _copy(data / "classification" / split / "0.tar", tar, lambda _, files: int(files["cls"]) < _CLASSES)
        (tar.parent / "nshards.txt").write_text("1\n")
    names = (data / "classification" / "classnames.txt").read_text().splitlines()[:_CLASSES]
    (folder / "classes" / "classnames.txt").write_text("\n".join(names) + "\n")
    for name in ("dataset_type.txt", "zeroshot_classification_templates.txt"):
        shutil.copy(data / "classification" / name, folder / "classes" / name)
    shutil.copytree(data / "retrieval", folder / "retrieval")
    (folder / "teacher").symlink_to(QUICKSTART / "teacher", target_is_directory=True)
    shutil.copy(QUICKSTART / "student.json", folder / "student.json")
    _break_data(folder)
    return folder


def _copy(source: Path, target: Path, wanted, most: int | None = None) -> None:  # type: ignore[no-untyped-def]
    """Copy the samples of a tar that are wanted, `most` at most."""
    target.parent.mkdir(parents=True, exist_ok=True)
    samples: dict[str, list[tuple[tarfile.TarInfo, bytes]]] = {}
    with tarfile.open(source) as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            samples.setdefault(member.name.partition(".")[0], []).append((member, file.read()))
    with tarfile.open(target, "w") as archive:
        copied = 0
        for key, members in samples.items():
            files = {member.name.rpartition(".")[2]: data for member, data in members}
            if wanted(key, files) and copied != most:
                copied += 1
                for member, content in members:
                    archive.addfile(member, io.BytesIO(content))


def _break_data(folder: Path) -> None:
    """Make data with each fault a user meets."""
    whole = (folder / "pairs" / "00000.tar").read_bytes()
    (folder / "broken").mkdir()
    (folder / "broken" / "00000.tar").write_bytes(whole[: len(whole) // 2 + 100])  # a download that stopped
    (folder / "photos").mkdir()
    for number in range(3):
        (folder / "photos" / f"{number}.jpg").write_bytes(b"<html>404 Not Found</html>")
    (folder / "config.toml").write_text("[balance]\nkep = 0.5\n")
