"""The batches of an evaluated data set: the same from a disk and from a server that drops connections."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_image, write_tar
from PIL import Image
from shard_server import serve

from clipcid_cli.formats.data.dataset import Dataset, fingerprint_images, open_dataset
from clipcid_cli.formats.results.metrics import CLASSIFICATION, RETRIEVAL
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.distributed import open_dist_context
from clipcid_cli.steps.data_index import ensure_index
from clipcid_cli.steps.encode import Batch, Decoder, decode, list_batches
from clipcid_cli.steps.evaluate.tasks import ZeroshotTask


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three shards of seven images; one has no class, one no image, one key is repeated, one image is damaged."""
    for shard in range(3):
        members = [("odd.cls", b"1"), ("odd.txt", b"no image")] if shard == 1 else []
        for number in range(shard * 7, shard * 7 + 7):
            members.append((f"{number}.png", make_image(number)[: 99 if number == 9 else None]))
            members += [(f"{number}.cls", b"%d" % (number % 2))] if number != 16 else []
        members += [("14.png", make_image(1)), ("14.cls", b"0")] if shard == 2 else []
        write_tar(tmp_path / "data" / f"{shard}.tar", members)
    return tmp_path / "data"


def read(spec: str) -> tuple[list[list[tuple[object, ...]]], int, Skips]:
    """List the batches of four samples: keys, classes and bytes; and count what was read and what was skipped."""
    task = ZeroshotTask("data", CLASSIFICATION, open_dataset(spec), ("no", "yes"))
    found, total, skips = [], 0, Skips()
    for batch in list_batches(task.dataset, range(3), task.stream, 4, task.reject):
        found.append([(sample.key, sample.label, sample.image.read()) for sample in batch.samples])
        total += batch.read or 0
        skips.merge(batch.skipped)
    return found, total, skips


@pytest.mark.parametrize("workers", [0, 1])
def test_bytes_of_images_are_dropped_once_they_are_decoded(data: Path, workers: int) -> None:
    with serve(data) as server:
        samples = list(open_dataset(f"{server.url}/{{0..2}}.tar").shards[1].stream())
        decoder = Decoder((32, 32), first_pixels, None)
        ((batch, decoded),) = decode([Batch(1, samples)], decoder, workers)
    assert [sample.key for sample in batch.samples] == [str(number) for number in range(7, 14)]
    assert decoded.failures == {2: "unreadable_image"}
    assert decoded.pixels is not None
    assert decoded.pixels.flatten(1).any(dim=1).tolist() == [True, True, False, True, True, True, True]
    assert all(sample.image.data is None for sample in batch.samples)
    assert all(sample.image.data is not None for sample in samples)


def first_pixels(image: Image.Image) -> torch.Tensor:
    """Return an image without its preprocessing."""
    return torch.from_numpy(np.array(image.resize((32, 32))))


def test_images_behind_a_url_are_identified_without_reading_them(data: Path) -> None:
    with serve(data) as server:
        dataset = open_dataset(f"{server.url}/{{0..2}}.tar")
        sent = server.bytes_sent.total()
        before = fingerprint_images(dataset)
        assert server.bytes_sent.total() == sent
        assert fingerprint_images(dataset) == before
        write_tar(data / "2.tar", [("14.png", make_image(2)), ("14.cls", b"0")])
        assert fingerprint_images(dataset).hash != before.hash


def read_part(dataset: Dataset) -> tuple[list[str], list[bytes], Skips]:
    skips = Skips()
    held_out = frozenset(str(number) for number in range(0, 21, 2))
    task = ZeroshotTask("part", RETRIEVAL, dataset, held_out=held_out)
    used = [sample for number in range(3) for sample in task.stream(number, skips)]
    return [sample.key for sample in used], [sample.image.read() for sample in used], skips


def test_a_held_out_part_is_read_from_the_index_alone(data: Path, tmp_path: Path) -> None:
    expected = read_part(open_dataset(data))
    assert 4 < len(expected[0]) < 14
    with open_dist_context("cpu") as context, serve(data) as server:
        for spec in (str(data), f"{server.url}/{{0..2}}.tar"):
            dataset = ensure_index(open_dataset(spec, index_root=tmp_path / "index"), context, 0)
            before = server.bytes_sent.total()
            assert read_part(dataset) == expected
        assert server.bytes_sent.total() - before == sum(map(len, expected[1]))
