"""Samples matched with the files of earlier steps, and how many make a batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from balance_data import write_embeddings
from conftest import make_caption, make_image, shard_members, write_tar
from distill_data import train
from teaching_data import embed_data, index_data, read_keys, write_student

from clipcid_cli.algorithms.costs import describe_clip
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset, open_dataset
from clipcid_cli.formats.embeddings.folder import open_embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.results.matched_samples import SampleRows, open_rows
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.names import find_config, parse_model
from clipcid_cli.runtime.randomness import key_fractions
from clipcid_cli.steps.distill import samples
from clipcid_cli.steps.distill.plan import validate_batch_size
from clipcid_cli.steps.distill.samples import Sources, match_samples
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.training_memory import SHARE_OF_DEFAULT, planned_states, training_memory

HELD_OUT = 0.3


@pytest.fixture(scope="module")
def dataset(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return index_data(open_dataset(str(tiny_shards)), tmp_path_factory.mktemp("index"))


def list_keys(dataset: Dataset) -> list[str]:
    assert dataset.index is not None
    return [key for number in range(len(dataset.shards)) for key in dataset.index.part(number).keys.to_pylist()]


def list_samples(dataset: Dataset, rows: SampleRows) -> list[str]:
    """Return the keys of samples by shard and place."""
    assert dataset.index is not None
    shards = np.repeat(np.arange(len(rows.sizes)), rows.sizes)
    return [
        dataset.index.part(int(shard)).sample(int(place)).key
        for shard, place in zip(shards, rows.column("places"), strict=True)
    ]


@pytest.mark.parametrize("keys", ["sample", "shard"])
def test_all_skipped_samples_are_named_in_one_form(keys: str, tmp_path: Path) -> None:
    members = [*shard_members(0, 3), ("mute.png", make_image(9)), ("bad.png", b"no image"), ("bad.txt", b"x")]
    write_tar(tmp_path / "data/a.tar", members)
    data = index_data(open_dataset(str(tmp_path / "data"), keys), tmp_path / "index")
    skips = samples.count_usable(data, max_bad_fraction=0.5).skips
    skips.merge(samples.count_unreadable(data, {"a/bad" if keys == "shard" else "bad": "unreadable_image"}))
    assert skips.examples == {"no_caption": ["a/mute"], "unreadable_image": ["a/bad"]}


@pytest.mark.parametrize("is_shuffled", [False, True])
def test_rows_are_found_in_any_order(is_shuffled: bool, dataset: Dataset, tmp_path: Path) -> None:
    keys = list_keys(dataset)
    numbers = np.random.default_rng(0).permutation(24) if is_shuffled else np.arange(24)
    listed = [keys[number] for number in numbers if number % 8 != 3]
    embedded = [keys[number] for number in numbers if number % 12 != 7]
    pq.write_table(pa.table({"key": listed, "kept": [key < keys[20] for key in listed]}), tmp_path / "keep.parquet")
    embeddings = open_embeddings(
        write_embeddings(tmp_path / "foreign", np.eye(len(embedded), 32, dtype=np.float16), keys=embedded)
    )
    counts = match_samples(dataset, Sources(tmp_path / "keep.parquet", embeddings), HELD_OUT, tmp_path)
    training, held_out = (open_rows(tmp_path, part) for part in ("training", "held_out"))
    kept = [key for key in keys if key in listed and key < keys[20]]
    held = [key for key in kept if key_fractions([key])[0] < HELD_OUT]
    assert 0 < len(held) < (key_fractions(keys) < HELD_OUT).sum()
    assert list_samples(dataset, held_out) == held
    candidates = [key for key in kept if key not in held]
    expected = [key for key in candidates if key in embedded]
    assert list_samples(dataset, training) == expected
    assert training.column("embeddings").tolist() == [embedded.index(key) for key in expected]
    assert held_out.column("embeddings").tolist() == [embedded.index(key) if key in embedded else -1 for key in held]
    assert counts.listed == len(listed)
    assert counts.kept == len(kept)
    assert (counts.candidates, counts.selected) == (len(candidates), len(expected))
    assert counts.without_embedding == len(candidates) - len(expected)
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name != "foreign"]


def find_matched(work: Path) -> list[Path]:
    return sorted(work.glob("index/*/matched-*"))


def test_samples_are_matched_once(
    tiny_shards: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    embed_data(tiny_shards, tiny_model, work / "embeddings" / "tiny")
    settings = {"student": str(write_student(tmp_path)), "preset": "clip-kd", "steps": 1}
    dry = settings | {"dry_run": True, "val_fraction": 0.3}
    before = sorted(work.rglob("*"))
    with pytest.raises(KeyError):  # nothing was trained, so that there is no log
        train(work, tiny_shards, **dry)
    assert sorted(work.rglob("*")) == before
    first, _ = train(work, tiny_shards, **settings)
    (matched,) = find_matched(work)
    # A run that was killed while it matched left a folder.
    shutil.rmtree(matched)
    (matched / f".matched-{'0' * 16}").mkdir(parents=True)
    assert train(work, tiny_shards, name="again", **settings)[0] == first
    assert find_matched(work) == [matched]
    assert not list(matched.glob(".*"))
    (matched / "training.places.npy").unlink()  # a map of it goes on
    (matched / "training.places.npy").write_bytes(b"damaged")
    assert train(work, tiny_shards, name="damaged", **settings)[0] == first

    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("matched again")

    monkeypatch.setattr(samples, "match_samples", refuse)
    assert train(work, tiny_shards, name="once more", **settings)[0] == first
    train(work, tiny_shards, name="another", lr=1e-4, **settings)
    with pytest.raises(AssertionError, match="matched again"):
        train(work, tiny_shards, name="other", **settings | {"val_fraction": 0.3})


def test_captions_that_changed_are_matched_anew(tmp_path: Path) -> None:
    data, work = tmp_path / "data", tmp_path / "work"
    data.mkdir()
    for number in range(24):
        (data / f"{number}.png").write_bytes(make_image(number))
        (data / f"{number}.txt").write_text(make_caption(number))
    settings = {"student": str(write_student(tmp_path)), "preset": "clip", "steps": 1}
    settings |= {"max_bad_fraction": 0.1, "val_fraction": 0}
    train(work, data, **settings)
    (data / "3.txt").unlink()
    train(work, data, name="again", **settings)
    used = [json.loads((path / "matched.json").read_text())["counts"]["selected"] for path in find_matched(work)]
    assert sorted(used) == [23, 24]


def test_the_same_files_under_names_that_are_in_the_keys_are_matched_anew(tmp_path: Path) -> None:
    settings = {"student": str(write_student(tmp_path)), "preset": "clip", "steps": 1, "keys": "shard"}
    for number, names in enumerate((("a", "b"), ("x", "y"))):
        for folder, old in zip(names, ("a", "b"), strict=True):
            if number:
                (tmp_path / old).rename(tmp_path / folder)
            else:
                write_tar(tmp_path / folder / "0.tar", shard_members(0, 24))
        data = f"{tmp_path / names[0]}::{tmp_path / names[1]}"
        train(tmp_path / "work", data, name=str(number), val_fraction=0.3, **settings)
        assert len(find_matched(tmp_path / "work")) == number + 1


def test_bad_rows_are_told_on_each_start(tiny_shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    embed_data(tiny_shards, tiny_model, tmp_path / "own")
    own, work = open_embeddings(tmp_path / "own"), tmp_path / "work"
    rows, texts = own.rows(Kind.IMAGES).read(0, 24), own.rows(Kind.TEXTS).read(0, 24)
    settings = {"student": str(write_student(tmp_path)), "preset": "clip-kd", "steps": 1, "max_bad_fraction": 0.2}
    for name, bad, matched in (("first", 1, 1), ("again", 1, 1), ("other", 2, 2)):
        texts[:bad] = 0
        shutil.rmtree(tmp_path / "foreign", ignore_errors=True)
        folder = write_embeddings(tmp_path / "foreign", rows, keys=read_keys(own), texts=texts)
        _, told = train(work, tiny_shards, name=name, embeddings=(folder,), **settings)
        assert f"{bad} rows of the embeddings are zero or not finite" in told
        assert len(find_matched(work)) == matched


@pytest.mark.parametrize(
    ("memory", "gpus", "samples", "settings", "expected"),
    [
        (None, 1, 400_000_000, {}, 256),
        (None, 1, 100, {}, 100),
        (None, 3, 100, {"accum_freq": 2}, 96),
        (80e9, 8, 400_000_000, {}, 16_384),
        (80e9, 1, 400_000_000, {}, 2048),
        (40e9, 1, 400_000_000, {}, 1024),
        (24e9, 1, 400_000_000, {}, 512),
        (4e9, 1, 400_000_000, {}, 16),
        (1e9, 1, 400_000_000, {}, 1),  # not even the weights fit: the run says so
        (80e9, 1, 400_000_000, {"student": "ViT-B-16"}, 512),
        (80e9, 1, 400_000_000, {"student": "ViT-L-14"}, 128),
        (80e9, 1, 400_000_000, {"grad_checkpointing": True}, 8192),
        (80e9, 1, 400_000_000, {"accum_freq": 4}, 8192),
        (80e9, 64, 400_000_000, {}, 32_768),  # CLIP's
        (80e9, 8, 400_000_000, {"steps": 1000}, 2048),
        (4e9, 8, 400_000_000, {"steps": 1000}, 168),
        (80e9, 8, 640_000, {}, 1024),  # 32 epochs are 20,000 steps of 1,024
        (80e9, 8, 639_999, {}, 512),
        (80e9, 8, 640_000, {"epochs": 16}, 512),
        (80e9, 6, 400_000_000, {}, 16_380),  # as many for each process
    ],
)
def test_batches_grow_with_data_and_memory(
    memory: float | None, gpus: int, samples: int, settings: dict[str, Any], expected: int
) -> None:
    chosen = DistillSettings(**{"student": "ViT-B-32"} | settings)
    fitting = None
    if memory is not None:
        clip = describe_clip(find_config(parse_model(str(chosen.student))) or {})
        needs = training_memory(chosen, clip, planned_states(chosen, clip, memory, 0), mixed=True)
        fitting = needs.largest(SHARE_OF_DEFAULT * memory)
    batch_size = chosen.default_batch_size(samples, gpus, fitting)
    assert batch_size == expected
    if memory is not None and batch_size > gpus:
        assert needs.needed(batch_size // gpus) <= 0.8 * memory


@pytest.mark.parametrize(
    ("processes", "samples", "settings", "fix"),
    [
        (1, 3, {"batch_size": 8}, "Lower --batch-size, or give more data."),
        (4, 3, {}, "Use fewer processes or a lower --accum-freq, or give more data."),
        (1, 0, {}, "Give more data."),
    ],
)
def test_too_few_samples_for_a_batch(processes: int, samples: int, settings: dict[str, Any], fix: str) -> None:
    context = DistContext(0, processes, 0, torch.device("cpu"))
    chosen = DistillSettings(student="ViT-B-32", **settings)
    batch_size = chosen.batch_size or chosen.default_batch_size(samples, processes, None)
    with pytest.raises(ClipcidError, match="fewer than one batch") as refused:
        validate_batch_size(chosen, batch_size, samples, context)
    assert refused.value.fix == fix
