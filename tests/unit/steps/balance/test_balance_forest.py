"""The forest: reused, extended, grown, resumed and searched in partitions; what processes share and hold of it."""

from __future__ import annotations

import functools
import os
import pickle
import shutil
import signal
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pandas as pd
import pytest
import torch.distributed as dist
from balance_data import balance, begun, check_keep_list, distance_matrix, make_rows, read_keep, write_embeddings
from conftest import run_in_two, start_clipcid

from clipcid_cli.algorithms.near import jobs as planning
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats import arrays, parquet
from clipcid_cli.formats import arrays as formats_arrays
from clipcid_cli.formats.embeddings.rows import MAPS_KEPT
from clipcid_cli.runtime.distributed import open_dist_context
from clipcid_cli.steps.balance import keep_list, partition, write
from clipcid_cli.steps.balance import saved_search as searching
from clipcid_cli.steps.balance.keep_list import read_names
from clipcid_cli.steps.balance.run import run
from clipcid_cli.steps.balance.shared_arrays import SharedArrays
from clipcid_cli.steps.settings.balance import BalanceSettings

FILES = ("keep.parquet", "forest.parquet", "curve.csv", "sets.parquet")
NUM_JOBS = 10 * 11 // 2  # of ten panels
CUTOFF = 0.6  # of a search in partitions
FEW, MANY = 6_000, 30_000  # rows whose memory is compared


def write_shards(folder: Path, rows: np.ndarray, shards: dict[int, range]) -> Path:
    """Write numbered files of some rows, named by their numbers among all rows."""
    for number, part in shards.items():
        for name in ("img_emb", "metadata"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        np.save(folder / "img_emb" / f"img_emb_{number:04d}.npy", rows[part.start : part.stop])
        keys = pd.DataFrame({"key": [f"{row:06d}" for row in part]})
        keys.to_parquet(folder / "metadata" / f"metadata_{number:04d}.parquet")
    return folder


@pytest.fixture
def rows() -> np.ndarray:
    found = make_rows(900, width=16)
    found[400] = found[700]  # the first of its kind is new where rows 300 … 599 are added
    found[10] = np.nan
    return found


def read_outputs(work: Path) -> dict[str, bytes]:
    return {name: (work / "balance" / name).read_bytes() for name in FILES}


def test_another_keep_ratio_reuses_the_forest_and_a_smaller_one_extends_it(tmp_path: Path) -> None:
    folder, work = write_embeddings(tmp_path / "e", make_rows(300)), tmp_path / "work"
    sizes = []
    for keep, is_there in ((0.6, False), (0.7, True), (0.05, False)):
        result, said = balance(work, folder, keep=keep)
        assert ("forest of these embeddings exists" in said) == is_there
        sizes.append(len((work / "balance" / "forest.parquet").read_bytes()))
        balance(tmp_path / str(keep), folder, keep=keep)
        assert (work / "balance" / "keep.parquet").read_bytes() == read_outputs(tmp_path / str(keep))["keep.parquet"]
    assert sizes[0] == sizes[1] < sizes[2]
    again, said = balance(work, folder, keep=0.05)
    assert "already holds this result" in said
    assert again == result
    assert "holds this result already, finished" in balance(work, folder, keep=0.05, dry_run=True)[1]
    other = balance(work, folder, keep=0.6, dry_run=True)[1]
    assert "settings.keep: 0.05 there, 0.6 now" in other
    _, told = balance(work, folder, keep=0.05, keys="shard")
    assert "The forest of these embeddings exists" in told
    assert read_keep(work)["key"][0] == "img_emb_0/000000"

    other = write_embeddings(tmp_path / "other", make_rows(300)[::-1].copy())
    with pytest.raises(ClipcidError, match="made with other settings or inputs") as refused:
        balance(work, other, keep=0.5)
    assert "--overwrite" in refused.value.fix
    balance(work, other, keep=0.5, overwrite=True)
    balance(tmp_path / "fresh", other, keep=0.5)
    assert read_outputs(work) == read_outputs(tmp_path / "fresh")


def test_a_dry_run_states_pairs_memory_and_disk(tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "e", make_rows(300))
    result, said = balance(tmp_path / "w", folder, keep=0.5, dry_run=True)
    assert (result["images"], result["pairs"]) == (300, 300 * 299 // 2)
    assert "exact: 44,850 pairs" in said
    assert {**result["exact"], "neighbors": "exact"}.items() <= result.items()
    assert (result["flop"], result["memory"]["mapped"]) == (2 * 32 * result["pairs"], 300 * 32 * 2)
    assert result["memory"]["resident"] > 0 < result["disk"]
    many = write_embeddings(tmp_path / "many", make_rows(300), num_files=MAPS_KEPT + 1)
    copied, _ = balance(tmp_path / "w", many, keep=0.5, dry_run=True)
    assert copied["disk"] - result["disk"] == 300 * 32 * 2  # of more files rows in sets are copied
    parts, _ = balance(tmp_path / "w", folder, threshold=0.5, neighbors="partitioned", dry_run=True)
    assert {**parts["partitioned"], "neighbors": "partitioned"}.items() <= parts.items()
    assert parts["pairs"] == round(6.4 * 300 * 17)  # with 17 centroids, and 5.4 times as many rows (measured)
    assert parts["memory"]["resident"] > result["memory"]["resident"]  # rows visit other partitions
    for cost in (parts["exact"], parts["partitioned"]):
        assert cost["pairs"] > 0
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(("added", "linkage"), [((2,), "single"), ((1, 3), "star"), ((1, 2, 3), "single")], ids=str)
def test_added_files_alone_are_compared(
    tmp_path: Path, rows: np.ndarray, added: tuple[int, ...], linkage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_MAX_PANEL", "_MIN_PANEL"):
        monkeypatch.setattr(planning, name, 64)
    call = {"threshold": 0.5, "linkage": linkage}
    shards = {1: range(250), 2: range(250, 600), 3: range(600, 850), 4: range(850, 900)}
    whole = write_shards(tmp_path / "whole", rows, shards)
    part = write_shards(tmp_path / "part", rows, {each: shards[each] for each in shards if each not in added})
    balance(tmp_path / "work", part, **call)
    write_shards(part, rows, shards)
    _, told = balance(tmp_path / "work", part, **call)
    old = sum(len(shards[each]) - (each == 1) for each in shards if each not in added)
    assert f"A forest of {old:,} of the 899 images exists: only the others are compared." in told
    balance(tmp_path / "new", whole, **call)
    assert read_outputs(tmp_path / "work") == read_outputs(tmp_path / "new")
    # What was merged is a forest like any other.
    _, told = balance(tmp_path / "work", part, threshold=0.45)
    assert "The forest of these embeddings exists" in told


def test_changed_and_removed_files_are_named_and_nothing_of_theirs_is_used(tmp_path: Path, rows: np.ndarray) -> None:
    shards = {1: range(300), 2: range(300, 600), 3: range(600, 900)}
    folder = write_shards(tmp_path / "e", rows, shards)
    balance(tmp_path / "work", folder, threshold=0.5)
    shutil.move(folder / "img_emb" / "img_emb_0002.npy", tmp_path)
    shutil.move(folder / "metadata" / "metadata_0002.parquet", tmp_path)
    with pytest.raises(ClipcidError, match=r"6 files before, 4 now; changed or gone: img_emb_0002\.npy, metadata_0002"):
        balance(tmp_path / "work", folder, threshold=0.5)
    _, told = balance(tmp_path / "work", folder, threshold=0.5, overwrite=True)
    assert "(3 files before, 2 now; changed or gone: img_emb_0002.npy)" in told
    balance(tmp_path / "new", folder, threshold=0.5)
    assert read_outputs(tmp_path / "work") == read_outputs(tmp_path / "new")
    # Shards in another order.
    other = write_shards(tmp_path / "e", rows, {1: shards[3], 3: shards[1], 4: shards[2]})
    _, told = balance(tmp_path / "work", other, threshold=0.5, overwrite=True)
    assert "unchanged and in the same order (2 files before, 3 now): all pairs are compared" in told
    # A larger cut-off than the forest was searched to.
    write_shards(folder, rows, {5: range(10)})
    _, told = balance(tmp_path / "work", folder, threshold=0.6, keys="shard")
    assert "The existing forest ends at distance 0.5000: all pairs are compared." in told


class Disk:
    """Saves what a search has found, and what is merged of that, and stops after a number of saves, as a kill would."""

    def __init__(self) -> None:
        self.saves = self.merges = 0
        self.stop_after = self.stop_merging_after = 10**6
        self._save = formats_arrays.save_arrays

    def save(self, path: Path, arrays: dict[str, Any]) -> None:
        is_merged = len(arrays["chunks"]) > 1
        if (self.saves, self.merges)[is_merged] == (self.stop_after, self.stop_merging_after)[is_merged]:
            raise KeyboardInterrupt
        self.merges += is_merged
        self.saves += not is_merged
        self._save(path, arrays)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Panels are small, and each pair of them is saved on its own."""
    monkeypatch.setattr(planning, "_MIN_PANEL", 40)
    monkeypatch.setattr(planning, "_MAX_PANEL", 40)
    monkeypatch.setattr(searching.SavePace, "is_due", lambda pace: True)
    disk = Disk()
    monkeypatch.setattr(formats_arrays, "save_arrays", disk.save)
    return disk


@pytest.fixture
def distinct(tmp_path: Path) -> Path:
    return write_embeddings(tmp_path / "e", np.unique(make_rows(500), axis=0)[:400])


def search(embeddings: Path, work: Path, threshold: float = 0.9) -> tuple[bytes, str]:
    """Balance; returns the forest and what was said."""
    _, told = balance(work, embeddings, threshold=threshold)
    return (work / "balance" / "forest.parquet").read_bytes(), told


def test_it_ends_with_the_same_forest_however_often_it_is_stopped(disk: Disk, distinct: Path, tmp_path: Path) -> None:
    whole, _ = search(distinct, tmp_path / "whole")
    num_saves, disk.saves = disk.saves, 0  # the other linkage is searched for the report, too
    for disk.stop_after in (1, 4, 24, 29):
        with pytest.raises(KeyboardInterrupt):
            search(distinct, tmp_path / "stopped")
    disk.stop_after = 10**6
    found, told = search(distinct, tmp_path / "stopped")
    assert f"Resuming the search: 29 of {NUM_JOBS} parts are done." in told
    assert found == whole
    assert disk.saves == num_saves, "nothing is searched twice"


def test_what_is_merged_is_not_merged_again(disk: Disk, distinct: Path, tmp_path: Path) -> None:
    whole, _ = search(distinct, tmp_path / "whole")
    num_saves, num_merges, disk.saves, disk.merges = disk.saves, disk.merges, 0, 0
    for disk.stop_merging_after in (10, 35):
        with pytest.raises(KeyboardInterrupt):
            search(distinct, tmp_path / "stopped")
        # Each merge saved stands for one file more than the one before.
        assert len(list((tmp_path / "stopped").rglob(".search/*/*.npz"))) == NUM_JOBS - disk.stop_merging_after
    disk.stop_merging_after = 10**6
    found, _ = search(distinct, tmp_path / "stopped")
    assert found == whole
    assert (disk.saves, disk.merges) == (num_saves, num_merges)


def stop_merging(number: int) -> None:
    """Let a command line save each pair of its small panels, and each merge; a signal comes when one is saved."""
    planning._MIN_PANEL = planning._MAX_PANEL = 40
    searching.SavePace.is_due = lambda pace: True  # type: ignore[method-assign]
    forks.after_naming("[0-9]-20.npz", functools.partial(signal.raise_signal, number))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_two_processes_that_are_stopped_as_they_merge_go_on_there(number: int, distinct: Path, tmp_path: Path) -> None:
    whole, _ = search(distinct, tmp_path / "whole")
    command = ("balance", "--embeddings", distinct, "--threshold", 0.9, "--work", tmp_path / "stopped")
    hook = functools.partial(stop_merging, number)
    stopped = start_clipcid(*command, cwd=tmp_path, processes=2, hook=hook)
    assert stopped.wait() == (-number if number == signal.SIGKILL else 128 + number), stopped.read()
    assert len(list((tmp_path / "stopped").rglob(".search/*/*.npz"))) <= NUM_JOBS - 19
    again = start_clipcid(*command, cwd=tmp_path, processes=2, hook=functools.partial(stop_merging, 0))
    assert again.wait() == 0, again.read()
    assert "All comparisons were made before." in again.read()[1]
    assert (tmp_path / "stopped" / "balance" / "forest.parquet").read_bytes() == whole


def test_parts_that_are_lost_damaged_or_edited_are_searched_again(disk: Disk, distinct: Path, tmp_path: Path) -> None:
    whole, _ = search(distinct, tmp_path / "whole")
    num_saves, disk.saves, disk.stop_after = disk.saves, 0, 40
    with pytest.raises(KeyboardInterrupt):
        search(distinct, tmp_path / "stopped")
    parts = sorted((tmp_path / "stopped").rglob(".search/*/*.npz"), key=lambda path: path.stat().st_size)[-5:]
    parts[0].unlink()
    for path, size in ((parts[1], 0), (parts[2], 200)):
        path.write_bytes(path.read_bytes()[:size])
    for path, edit in ((parts[3], lambda array: array[::-1]), (parts[4], lambda array: array[:-1])):
        with np.load(path) as saved:
            arrays = dict(saved)
        np.savez(path, **arrays | {"b": edit(arrays["b"])})
    disk.stop_after = 10**6
    found, _ = search(distinct, tmp_path / "stopped")
    assert found == whole
    assert disk.saves == num_saves + len(parts)


def test_edges_of_partitions_are_true_and_few_are_missing(tmp_path: Path) -> None:
    rows = make_rows(3000, width=64)
    embeddings = write_embeddings(tmp_path / "e", rows)
    result, said = balance(tmp_path / "parts", embeddings, threshold=CUTOFF, neighbors="partitioned")
    exact, _ = balance(tmp_path / "exact", embeddings, threshold=CUTOFF)
    assert "partitions; rows within" in said
    assert ".grouped" not in Path("/proc/self/maps").read_text(), "a map of a removed file keeps its space on the disk"
    found = pd.read_parquet(tmp_path / "parts" / "balance" / "forest-partitioned.parquet")
    true = pd.read_parquet(tmp_path / "exact" / "balance" / "forest.parquet")
    distances = distance_matrix(rows)
    np.testing.assert_array_equal(found["distance"], distances[found["a"], found["b"]])
    assert (found["a"] < found["b"]).all()
    assert len(true) > 1000
    assert 0.998 * len(true) <= len(found) <= len(true)
    keep = read_keep(tmp_path / "parts")
    check_keep_list(keep, rows)
    assert result["kept"] == len(rows) - len(found) >= exact["kept"]
    assert (exact["audit"], exact["neighbors"], result["neighbors"]) == (None, "exact", "partitioned")


def test_an_audit_counts_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second row taken for kept."""
    unique = np.unique(make_rows(3000, width=64), axis=0)
    folder = write_embeddings(tmp_path / "unique", unique)
    monkeypatch.setattr(planning, "_PANEL", 700)
    near = distance_matrix(unique) <= np.float32(CUTOFF)
    np.fill_diagonal(near, False)
    kept = np.arange(0, len(unique), 2)
    expected = near[np.ix_(kept, kept)].any(axis=1)
    with begun(tmp_path, folder, threshold=CUTOFF) as run:
        whole = partition.audit_kept(run, kept, CUTOFF)
        assert 100 < whole.near == np.count_nonzero(expected) < len(kept)
        monkeypatch.setattr(partition, "AUDIT_SAMPLE", 900)
        part = partition.audit_kept(run, kept, CUTOFF)
    assert (part.sampled, part.kept) == (900, len(kept))
    assert part.low < whole.rate < part.high
    assert part.low < part.rate < part.high
    sample = np.random.default_rng(0).permutation(kept)[:900]
    assert part.near == np.count_nonzero(expected[np.searchsorted(kept, sample)])


def count_files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def check_shares(rank: int, folder: Path) -> None:
    """Check that each process reads its share of the keys, and makes its share of the lists of partitions."""
    with begun(folder / "shares", folder / "embeddings", keep=0.5) as run:
        read = list[str]()
        keys_of = run.embeddings.keys_of

        def watched(file: Any) -> Any:
            read.append(file.name)
            return keys_of(file)

        run.embeddings.keys_of = watched  # type: ignore[method-assign]
        assert read_names(run).keys.to_pylist() == [f"{row:06d}" for row in range(60)]
        assert read == [f"img_emb_{rank}"]
        # Of each process two entries of each of four lists.
        parts = run.shared.exchange(lambda: (np.arange(8) % 4, np.arange(8) + 10 * rank, np.empty(0)))
        listed, lengths = partition._group(run, parts, 4)
        assert listed.tolist() == [[0, 4, 10, 14, 1, 5, 11, 15], [2, 6, 12, 16, 3, 7, 13, 17]][rank]
        assert lengths.tolist() == [4, 4]


@contextmanager
def sent_sizes() -> Iterator[list[int]]:
    """Note the bytes of each object that is broadcast."""
    sizes, send = list[int](), dist.broadcast_object_list

    def noting(objects: list[Any], *given: Any, **more: Any) -> None:
        sizes.append(len(pickle.dumps(objects)))
        send(objects, *given, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dist, "broadcast_object_list", noting)
        yield sizes


def share(rank: int, folder: Path) -> dict[str, int]:
    """Share arrays as processes on one host, then on two; then balance. Returns how many files are left after each."""
    left, found = {}, []
    for local_size in ("2", "1"):
        os.environ["LOCAL_WORLD_SIZE"] = local_size
        place = folder / local_size
        with open_dist_context("cpu") as context:
            shared = SharedArrays(context, place)
            for value in (3, 5):
                found += shared.publish(lambda value=value: (np.full(4, value),))
                parts = shared.collect(lambda: (np.full(2, rank),))
                assert [part[0].tolist() for part in parts] == ([[0, 0], [1, 1]] if rank == 0 else [])
            with sent_sizes() as sizes:
                (whole,) = shared.assemble(lambda: (np.full(10_000 * (rank + 1), rank),))
            exchanged = shared.exchange(lambda: (np.full(rank, 3),))
            assert whole.tolist() == [0] * 10_000 + [1] * 20_000
            assert max(sizes) < 10_000, "arrays go through files alone"
            assert [part.tolist() for (part,) in exchanged] == [[], [3]]
            context.barrier()
            left[local_size] = count_files(place)
    assert [array.tolist() for array in found] == [[3] * 4, [5] * 4] * 2
    check_shares(rank, folder)
    balance(folder / "work", folder / "embeddings", keep=0.5)
    left["balance"] = count_files(folder / "work" / "balance" / ".shared")
    return left


def test_the_lists_are_written_while_the_report_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report_has_begun = threading.Event()
    written = list[bool]()

    def write_list(*given: Any) -> None:
        written.append(report_has_begun.wait(20))
        keep_list.write_list(*given)

    def write_report(*given: Any) -> dict[str, Any]:
        report_has_begun.set()
        return {"shown": 0, "unread": [], "why": ""}

    monkeypatch.setattr(write, "write_list", write_list)
    folder = write_embeddings(tmp_path / "e", make_rows(60))
    monkeypatch.setattr(write, "write_report", write_report)
    run(BalanceSettings(work=tmp_path / "w", embeddings=folder, device="cpu", keep=0.5))
    assert written == [True]


def test_processes_share_arrays_and_files_stay_while_another_host_may_read_them(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "embeddings", make_rows(60))
    # Four arrays of a file each, one of them made of parts; none where processes share a host, and none after a run.
    assert run_in_two(share, tmp_path, tmp_path) == [{"2": 0, "1": 4, "balance": 0}] * 2


def peak_of_balance(folder: Path, num_rows: int) -> int:
    """The most bytes that Python and numpy hold at a time, if they are traced, with all that is dropped before repeats.

    There is no report: its templates would take more than the rows of so few.
    """
    texts, near = make_rows(num_rows, 8, seed=1), str(write_embeddings(folder / "r", make_rows(500, 8, seed=2)))
    embeddings = write_embeddings(folder / "e", make_rows(num_rows, 8), texts=texts, captions=["x"] * num_rows)
    filters = {"against": (near, near), "against_threshold": 0.3, "min_caption_similarity": -0.5}
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    balance(folder / "w", embeddings, threshold=0.05, precision="fp32", **filters)
    return tracemalloc.get_traced_memory()[1] - before


def test_the_first_process_holds_at_most_128_bytes_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of larger data these are buffers of fixed size.
    monkeypatch.setattr(parquet, "ROWS_AT_ONCE", 2**11)
    monkeypatch.setattr(arrays, "_STRINGS_AT_ONCE", 2**11)
    peak_of_balance(tmp_path / "first", 500)  # it imports what is not to be counted
    tracemalloc.start()
    try:
        few, many = (peak_of_balance(tmp_path / str(number), number) for number in (FEW, MANY))
    finally:
        tracemalloc.stop()
    assert 0 < (many - few) / (MANY - FEW) <= 128
