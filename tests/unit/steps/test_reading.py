"""What steps share where they read: names of classes, batches, keep lists, and the look at the data before long work."""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from balance_data import heard, make_rows, write_embeddings
from conftest import make_image, shard_members, write_tar
from shard_server import serve

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark import match_class_names
from clipcid_cli.formats.data.dataset import Dataset, open_dataset
from clipcid_cli.formats.data.image_fingerprint import fingerprint_images
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.files import lock
from clipcid_cli.formats.output import find_differences
from clipcid_cli.formats.results.metrics import CLASSIFICATION, RETRIEVAL
from clipcid_cli.formats.sidecar import Provenance
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.distributed import DistContext, open_dist_context
from clipcid_cli.runtime.models.renderer import Renderer
from clipcid_cli.steps.balance.filters.references import validate_references
from clipcid_cli.steps.chosen_keep_list import ChosenKeepList
from clipcid_cli.steps.data_index import ensure_index
from clipcid_cli.steps.distill.samples import list_skipped
from clipcid_cli.steps.encode import Batch, Decoder, decode, list_batches
from clipcid_cli.steps.evaluate.probe_plan import make_plan
from clipcid_cli.steps.evaluate.tasks import ZeroshotTask
from clipcid_cli.steps.keep_list import choose_keep_list
from clipcid_cli.steps.models import choose_model
from clipcid_cli.steps.open_data import open_named
from clipcid_cli.steps.preflight import choose_order, choose_workers, validate_samples
from clipcid_cli.steps.settings.balance import BalanceSettings
from clipcid_cli.steps.settings.embed import EmbedSettings
from clipcid_cli.steps.settings.eval_linear import EvalLinearSettings
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings
from clipcid_cli.steps.settings.shared import ReadingSettings

KEYS = [f"{row:04d}" for row in range(100)]


@pytest.mark.parametrize(
    ("names", "folders", "labels", "by"),
    [
        (("tabby cat", "Dog"), ("dog", "tabby_cat"), (1, 0), "name"),
        (("cat", "dog", "cow"), ("cow", "dog"), (2, 1), "name"),  # of ten classes some may have no image
        (("2", "0", "1"), ("0", "1", "2"), (1, 2, 0), "name"),  # digits are names where the list holds them
        (("a", "b", "c", "d", "e", "f", "g", "h"), ("0", "5", "7"), (0, 5, 7), "number"),
        (tuple("abcdefghijk"), ("0", "1", "10", "2"), (0, 1, 10, 2), "number"),
        (("crane", "crane", "cat"), ("0", "1", "2"), (0, 1, 2), "number"),
        (("crane", "crane"), ("n1", "n2"), (0, 1), "order"),
        (("crane", "crane"), ("crane", "crane_"), (0, 1), "order"),
        (("x", "y"), ("1", "2"), (0, 1), "order"),  # no line has the number 2
    ],
)
def test_names_of_folders(names: tuple[str, ...], folders: tuple[str, ...], labels: tuple[int, ...], by: str) -> None:
    found = match_class_names(names, folders)
    assert (found.labels, found.by) == (labels, by)


def test_another_number_of_names_is_refused() -> None:
    with pytest.raises(ClipcidError, match=r"3 class names .* 2 class folders"):
        match_class_names(("a", "b", "c"), ("n1", "n2"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three shards of seven images; one has a bad class, one no image, one key is repeated, one image is damaged."""
    for shard in range(3):
        members = [("odd.cls", b"1"), ("odd.txt", b"no image")] if shard == 1 else []
        for number in range(shard * 7, shard * 7 + 7):
            members.append((f"{number}.png", make_image(number)[: 99 if number == 9 else None]))
            members.append((f"{number}.cls", b"cat" if number == 16 else b"%d" % (number % 2)))
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
        decoder = Decoder(Renderer({"size": 32}), None)
        ((batch, decoded),) = decode([Batch(1, samples)], decoder, workers)
    assert [sample.key for sample in batch.samples] == [str(number) for number in range(7, 14)]
    assert decoded.failures == {2: "unreadable_image"}
    assert decoded.pixels is not None
    assert decoded.pixels.flatten(1).any(dim=1).tolist() == [True, True, False, True, True, True, True]
    assert all(sample.image.data is None for sample in batch.samples)
    assert all(sample.image.data is not None for sample in samples)


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
    used = list[Sample]()
    for number, shard in enumerate(dataset.shards):
        part = Skips()
        used += task.stream(number, part)
        skips.merge(shard.locate(part))
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


@pytest.fixture
def keep_list(tmp_path: Path) -> Path:
    path = tmp_path / "keep.parquet"
    kept = [row % 3 == 0 for row in range(100)]
    pq.write_table(pa.table({"key": KEYS[::-1], "kept": kept[::-1]}), path)
    return path


def apply(keep_list: Path, work: Path, dry_run: bool) -> list[bool]:
    def keys() -> list[pa.ChunkedArray]:
        return [pa.chunked_array([KEYS[:60]]), pa.chunked_array([KEYS[60:]])]

    chosen = choose_keep_list(str(keep_list), WorkDirectory(work), "rows", 0.0)
    assert chosen is not None
    found = chosen.find_kept(keys, 100, None if dry_run else work, "here")
    return list(found)


def test_it_is_joined_in_the_work_directory(keep_list: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file" / "no such folder"))
    work = tmp_path / "work"
    assert apply(keep_list, work, dry_run=False) == list(np.arange(100) % 3 == 0)
    assert not work.exists()
    with pytest.raises(ClipcidError, match=r"Could not write .*no such folder"):
        apply(keep_list, work, dry_run=True)


def test_folders_of_killed_runs_are_removed(keep_list: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    killed = work / ".clipcid-join-killed"
    killed.mkdir(parents=True)
    killed.with_suffix(".lock").touch()
    other = work / ".clipcid-join-other"
    other.mkdir()
    with lock(other.with_suffix(".lock")):
        assert apply(keep_list, work, dry_run=False) == list(np.arange(100) % 3 == 0)
        assert sorted(work.iterdir()) == [other, other.with_suffix(".lock")]


@pytest.mark.parametrize(
    ("missing", "said", "fix"),
    [
        (
            5,
            "lacks 5 of the 300 samples of data, more than the allowed 1.0%",
            "run clipcid balance again. If they are images that could not be used, allow them: --max-bad-fraction 0.017",
        ),
        (
            200,
            "lacks 200 of the 300 samples of data: it was made from other data. One of its keys is '7.jpg', .* '7'",
            "none to use",
        ),
    ],
)
def test_a_list_that_lacks_samples_is_refused_with_what_allows_them(missing: int, said: str, fix: str) -> None:
    pq.write_table(pa.table({"key": ["7.jpg"]}), "keep.parquet")
    keep_list = ChosenKeepList(Path("keep.parquet"), 200, 300 - missing, "samples", 0.01)
    with pytest.raises(ClipcidError, match=said) as refused:
        keep_list.report("data", 300, kept=200, missing=missing, key="7")
    assert re.search(fix, refused.value.fix)


@pytest.mark.parametrize(("missing", "said"), [(0, "kept."), (2, "kept; 2 not in it.")])
def test_the_samples_that_a_list_lacks_are_counted(missing: int, said: str) -> None:
    keep_list = ChosenKeepList(Path("keep.parquet"), 200, 300 - missing, "samples", 0.01)
    with heard() as told:
        keep_list.report("data", 300, kept=200, missing=missing, key="7")
    assert told == [f"Keep list: keep.parquet, 200 of 300 samples {said}"]


@pytest.fixture(scope="module")
def context() -> DistContext:
    with open_dist_context("cpu") as opened:
        return opened


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of five samples; the last image of the fifth is cut off."""
    folder = tmp_path_factory.mktemp("data") / "pairs"
    for number in range(6):
        members = shard_members(10 * number, 5)
        if number == 4:
            members = [(name, make_image(1)[:60] if name == "000044.png" else data) for name, data in members]
        write_tar(folder / f"{number:05d}.tar", members)
    return folder


def check(dataset: Dataset, context: DistContext, *, dry_run: bool = True) -> list[str]:
    with heard() as told:
        validate_samples(dataset, context, ReadingSettings(), dry_run=dry_run)
    return told


def test_all_shards_are_looked_at(shards: Path, context: DistContext, tmp_path: Path) -> None:
    dataset = open_dataset(shards, index_root=tmp_path)
    told = check(dataset, context)  # the first three samples of each: the cut image is the fifth
    assert told == [f"{shards}: checked 6 of 6 shards, 18 samples: all can be decoded."]
    assert check(dataset, context, dry_run=False) == []

    indexed = ensure_index(dataset, context, 0)
    said = f"{shards}: checked 6 of 6 shards, 18 samples: 1 cannot be decoded."  # first, middle and last of each
    assert check(indexed, context) == [f"{said}\n  1 × unreadable image: 00004/000044"]
    assert check(indexed, context, dry_run=False) == [said]  # the run names them at its end


def test_what_is_missing_of_a_truncated_shard_is_told(context: DistContext, tmp_path: Path) -> None:
    for number in range(4):
        path = write_tar(tmp_path / f"data/{number}.tar", shard_members(4 * number, 4))
    os.truncate(path, path.read_bytes().index(b"000014.png") + 600)
    dataset = open_dataset(tmp_path / "data", index_root=tmp_path / "index", max_bad_fraction=0.2)
    for opened in (dataset, ensure_index(dataset, context, 0)):
        first, *_ = check(opened, context, dry_run=False)
        assert first.startswith(f"Shard {path} is truncated: 000014.png should end at byte ")
        assert re.search(
            r"; up to about \d+\.\d% of the data is missing; its samples before the end are used\.$", first
        )
    again = open_dataset(tmp_path / "data", index_root=tmp_path / "index", max_bad_fraction=0.2)
    assert again.index is not None
    assert again.truncation is not None
    assert dataset.truncation is not None
    assert again.truncation.fraction == dataset.truncation.fraction


@pytest.mark.parametrize("keys", ["sample", "shard"])
def test_samples_that_training_skips_are_listed(context: DistContext, tmp_path: Path, keys: str) -> None:
    members = [*shard_members(0, 3), ("alone.txt", b"a"), ("mute.png", make_image(9))]
    write_tar(tmp_path / "data/a.tar", [*members, *shard_members(2, 1)])
    write_tar(tmp_path / "data/b.tar", shard_members(3, 2))
    dataset = ensure_index(open_dataset(tmp_path / "data", keys, index_root=tmp_path / "index"), context, 0)
    prefix = {"a": "", "b": ""} if keys == "sample" else {"a": "a/", "b": "b/"}
    unread = {f"{prefix['b']}000004": "http_error: HTTP 403"}
    listed = pa.concat_tables(list_skipped(dataset, unread)).to_pylist()
    skipped = [("a", "alone", "no_image"), ("a", "000002", "duplicate_key"), ("a", "mute", "no_caption")]
    skipped += [("b", "000004", "http_error")]
    assert [tuple(row.values()) for row in listed] == [(prefix[shard] + key, shard, why) for shard, key, why in skipped]
    assert [table.num_rows for table in list_skipped(dataset, {})] == [2, 1, 0]  # the second shard is not looked into


@pytest.mark.parametrize("dry_run", [True, False])
def test_samples_of_which_none_can_be_used_end_a_run(context: DistContext, tmp_path: Path, dry_run: bool) -> None:
    (tmp_path / "list.csv").write_text("filepath,title\n" + "".join(f"{number}.png,a\n" for number in range(20)))
    dataset = open_dataset(tmp_path / "list.csv")
    with pytest.raises(ClipcidError, match=r"15 samples: none can be used\.\n  15 × file not found: 0\.png, ") as told:
        check(dataset, context, dry_run=dry_run)
    assert f"looked for in {tmp_path}, or where --list-root DIR says" in told.value.fix
    with heard() as notes:
        validate_samples(dataset, context, ReadingSettings(max_bad_fraction=0.9), dry_run=False)
    assert "15 cannot be used, 15 × file not found." in notes[0]
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(make_image(number) if number == 3 else b"no image")
    assert "14 cannot be decoded" in check(dataset, context, dry_run=dry_run)[0]


def test_data_in_place_of_a_model_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("test classes").mkdir()
    with pytest.raises(ClipcidError, match="was read as the model") as refused:
        choose_model("test classes", tmp_path, positional_of="eval-zeroshot")
    assert refused.value.fix == "Put the model first: clipcid eval-zeroshot MODEL 'test classes'"


def test_an_empty_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_embeddings(tmp_path / "e", make_rows(4)))
    near = BalanceSettings(keep=0.5, near=(" ",), near_keep=0.5)
    probe = EvalLinearSettings(model="ViT-B-32", data="")
    for read in (
        lambda: open_named(ReadingSettings(), ""),
        lambda: validate_references(near, None),
        lambda: make_plan(probe),
    ):
        with pytest.raises(ClipcidError, match=r"^(--near  : )?The path of the data is empty\.\n"):
            read()


def write_french_list(folder: Path) -> str:
    """Write a folder of an image, and a list of it that is not UTF-8; return the list."""
    (folder / "photos").mkdir()
    (folder / "photos" / "1.png").write_bytes(make_image(1))
    path = folder / "list.csv"
    path.write_text("filepath,title,other\nphotos/1.png,café,au lait\n", encoding="latin-1")
    return str(path)


def test_flags_of_lists_apply_to_those_of_several_data_sets_that_are_lists(tmp_path: Path) -> None:
    listed, folder = write_french_list(tmp_path), str(tmp_path / "photos")
    flags: dict[str, Any] = {"list_encoding": "latin-1", "list_root": tmp_path, "work": tmp_path / "work"}
    balance = BalanceSettings(threshold=0.2, data=listed, against=(folder,), **flags)
    validate_references(balance, None)
    assert EmbedSettings.asked_by(balance, data=folder).list_encoding is None
    assert EmbedSettings.asked_by(balance, data=listed).list_encoding == "latin-1"
    for settings in (
        balance,
        EvalLinearSettings(train=folder, test=listed, **flags),
        EvalZeroshotSettings(data=(listed, folder), **flags),
    ):
        kinds = {data: open_named(settings, data).kind for data in (folder, listed)}
        assert kinds == {folder: "images", listed: "list"}
    probe = EvalLinearSettings(train=folder, test=folder, **flags)
    for settings in (probe, EmbedSettings.asked_by(probe, data=folder)):
        with pytest.raises(ClipcidError, match="say how a list is read"):
            open_named(settings, folder)


def test_samples_that_other_flags_read_are_not_called_changed(tmp_path: Path) -> None:
    listed = write_french_list(tmp_path)

    def describe(**flags: Any) -> Provenance:
        dataset = open_named(ReadingSettings(**{"list_encoding": "latin-1"} | flags), listed)
        task = ZeroshotTask("list", RETRIEVAL, dataset)
        return Provenance(settings=task.describe(), inputs=task.fingerprints())

    there = describe()
    for flags, difference in (
        ({"caption_column": "other"}, {"settings.columns.caption": '"title" there, "other" now'}),
        ({"caption_key": ("other",)}, {"settings.caption_key": 'null there, ["other"] now'}),
        ({"list_encoding": "cp1250"}, {"settings.list_format.encoding": '"latin-1" there, "cp1250" now'}),
    ):
        assert find_differences(there, describe(**flags)) == difference
    (tmp_path / "photos" / "1.png").write_bytes(make_image(2))
    assert list(find_differences(there, describe())) == [f"input {listed}#images"]


def test_paths_of_a_windows_machine_are_told_as_such(context: DistContext, tmp_path: Path) -> None:
    rows = "".join(f"C:\\Users\\me\\photos\\{number}.png,a,{number}\n" for number in range(3))
    (tmp_path / "list.csv").write_text(f"filepath,title,key\n{rows}")
    with pytest.raises(ClipcidError, match="none can be used") as told:
        check(open_dataset(tmp_path / "list.csv"), context)
    tried = ", ".join(f"{number} ({tmp_path}/C:/Users/me/photos/{number}.png)" for number in range(3))
    assert told.value.message.endswith(f"3 × file not found: {tried}")  # the keys alone say nothing of the cause
    assert told.value.fix.startswith("C:/Users/me/photos/0.png is a path of a Windows machine, which cannot exist here")
    assert "--list-root DIR" in told.value.fix


def test_a_dry_run_says_what_servers_answer(context: DistContext, tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        (tmp_path / "list.csv").write_text(f"filepath,title\n{server.url}/absent.png,a\n")
        dataset = open_dataset(tmp_path / "list.csv")
        with pytest.raises(
            ClipcidError, match=r"1 × image that its server did not send: http\S+absent\.png \(HTTP 404\)"
        ):
            check(dataset, context)
        assert check(dataset, context, dry_run=False) == []  # a run does not ask twice


def test_of_remote_data_a_dry_run_looks_at_few_shards_and_a_run_at_none(shards: Path) -> None:
    dataset = open_dataset(shards)
    for prefix, looked_at in (("https://example.org/", 4), ("pipe:cat ", 0)):
        remote = dataclasses.replace(
            dataset,
            shards=tuple(dataclasses.replace(shard, source=f"{prefix}{shard.file}") for shard in dataset.shards),
        )
        assert len(choose_order(remote, 0, dry_run=True)) == looked_at
        assert choose_order(remote, 0, dry_run=False) == []


def test_too_few_cores_for_a_gpu_are_told_and_under_slurm_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    with heard() as said:
        assert choose_workers(None, gpu) == 1
        assert choose_workers(None, torch.device("cpu")) == 1
    [warning] = said
    assert "may use 1 of the host's cores" in warning
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert choose_workers(5, gpu) == 5
    with pytest.raises(ClipcidError, match="SRUN_CPUS_PER_TASK"):
        choose_workers(None, gpu)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert choose_workers(None, gpu) == 7
