"""The fingerprint of a data set's images: any image, class or vector of classes that changes changes it, a move does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from conftest import make_image, write_tar
from PIL import Image

from clipcid_cli.formats.data.dataset import fingerprint_images, open_dataset


def digest(data: Path) -> str:
    return fingerprint_images(open_dataset(data)).hash


def test_images_of_the_same_size_are_told_apart_in_folders_and_lists(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        (folder / name / "0.png").write_bytes(make_image(1))
    listed = folder / "list.csv"
    listed.write_text("filepath,label\ncat/0.png,0\ndog/0.png,1\n")
    before = [digest(folder), digest(listed)]
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert [digest(moved), digest(moved / "list.csv")] == before

    (folder / "dog" / "0.png").write_bytes(make_image(1)[:-1] + b"\0")
    assert digest(folder) != before[0]
    assert digest(listed) != before[1]
    (folder / "dog" / "0.png").write_bytes(make_image(1))
    assert [digest(folder), digest(listed)] == before
    listed.write_text("filepath,label\ncat/0.png,0\ndog/0.png,0\n")
    relabelled = digest(listed)
    (folder / "dog" / "0.png").unlink()
    assert len({before[1], relabelled, digest(listed)}) == 3


def test_images_that_are_not_compressed_count_whole(tmp_path: Path) -> None:
    def write(middle: int) -> str:
        image = np.full((80, 80, 3), 255, np.uint8)
        image[40, 40] = middle
        Image.fromarray(image).save(tmp_path / "0.bmp")
        return digest(tmp_path)

    assert write(0) == write(0) != write(1)


def test_a_member_in_the_midst_of_a_tar_counts(tmp_path: Path) -> None:
    def write(image: bytes, label: bytes, classes: bytes) -> str:
        filler = [(f"{number:03d}.png", make_image(0).ljust(70_000, b"\0")) for number in range(8)]
        middle = [("004a.png", image), ("004a.cls", label), ("004b.png", make_image(3)), ("004b.npy", classes)]
        write_tar(tmp_path / "0.tar", [*filler[:4], *middle, *filler[4:]])
        return digest(tmp_path / "0.tar")

    image = make_image(1)
    before = write(image, b"1", b"a vector")
    assert write(image, b"1", b"a vector") == before
    assert write(image[:-1] + b"\0", b"1", b"a vector") != before
    assert write(image, b"2", b"a vector") != before
    assert write(image, b"1", b"anothers") != before
