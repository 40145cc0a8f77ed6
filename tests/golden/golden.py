"""The golden net: what today's commands answer, so that nothing of it changes unseen while the code behind it does.

It speaks through the command line and the files that files.md describes, and knows no name inside the package. Answers
lie in ``answers/``: a JSON object, and an npz of arrays, for each case. They are recorded anew only on request, after
which ``git diff`` and the reason for it belong in the same commit:

    CLIPCID_GOLDEN=record pytest tests/golden [-k CASE]

``answers/rows/`` is more than an answer: the embeddings of the first two shards of the quickstart by its teacher, in
clip-retrieval's layout (``answers/references/``: those of its retrieval images). All that follows embedding starts from
them, so that its answers do not depend on the processor an encoder runs on. CLIPCID_GOLDEN=rows records these two anew,
which should never be needed.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import run_clipcid

RECORDING = os.environ.get("CLIPCID_GOLDEN") == "record"
RECORDING_ROWS = os.environ.get("CLIPCID_GOLDEN") == "rows"
ANSWERS = Path(__file__).with_name("answers")
ROWS = ANSWERS / "rows"
REFERENCES = ANSWERS / "references"
QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"

SHARDS = "data/pairs/{00000..00001}.tar"
FLAGS = ("--device", "cpu", "--precision", "fp32", "--workers", 0, "--json")
# Of commands that decode no images, or run on the CPU alone.
FEWER_FLAGS = {"export": ("--precision", "fp32", "--json"), "cluster": ("--device", "cpu", "--json")}

Arrays = dict[str, np.ndarray]


def make_place(folder: Path) -> Path:
    """Fill a folder with what commands are given, under names that do not differ from machine to machine."""
    for name in ("data", "teacher", "student.json"):
        (folder / name).symlink_to(QUICKSTART / name)
    for fixed in (ROWS, REFERENCES):
        (folder / fixed.name).symlink_to(fixed)
    return folder


def ask(place: Path, *arguments: object, **options: Any) -> Any:
    """Run a command line in the place and return its JSON object; `options` are those of `run_clipcid`."""
    flags = FEWER_FLAGS.get(str(arguments[0]), FLAGS)
    return run_clipcid(*arguments, *flags, cwd=place, **options).json


def read_samples(number: int) -> list[tuple[str, bytes]]:
    """Read the members of the first samples of the first shard."""
    with tarfile.open(QUICKSTART / "data" / "pairs" / "00000.tar") as archive:
        members = [(member.name, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
    keys = list(dict.fromkeys(name.partition(".")[0] for name, _ in members))[:number]
    return [(name, data) for name, data in members if name.partition(".")[0] in set(keys)]


def read_table(path: Path, columns: list[str] | None = None) -> Arrays:
    """Read columns of a parquet file: strings as such, an empty one for null; other nulls as NaN."""
    table = pq.read_table(path, columns=columns)
    found = {}
    for name in table.column_names:
        values = table[name].to_pandas()
        found[name] = values.fillna("").to_numpy(dtype="U") if values.dtype in ("object", "str") else values.to_numpy()
    return found


def read_rows(folder: Path, kind: str) -> np.ndarray:
    """Read the rows of one kind, such as ``img_emb``, of all files of a folder of embeddings."""
    return np.concatenate([np.load(path, allow_pickle=False) for path in sorted((folder / kind).glob("*.npy"))])


def read_metadata(folder: Path) -> Arrays:
    """Read key, shard and caption of each row of a folder of embeddings."""
    parts = [read_table(path, ["key", "shard", "caption"]) for path in sorted((folder / "metadata").glob("*.parquet"))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def plain(value: Any, name: str = "") -> Any:
    """Replace what differs from run to run in an answer of ``--json``: times, sizes, hashes, versions, paths."""
    if name in {"seconds", "files"} and isinstance(value, dict):
        return sorted(value)
    if name in {"seconds", "hash", "bytes", "free_bytes", "engine"} or name.endswith(("_per_second", "_memory_bytes")):
        return "…"
    if isinstance(value, dict):
        return {key: plain(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return "a path" if isinstance(value, str) and "/" in value else value


def check(
    name: str, found: Mapping[str, Any], *, rel: float = 1e-6, within: float = 0.0, arrays_within: float = 0.0
) -> None:
    """Compare with a recorded answer, or record it where that was asked for; a missing one is a failure.

    Args:
        name: Of the answer's files.
        found: Arrays, compared exactly, or within `arrays_within`; and values of JSON.
        rel, within: Allowed difference of each number of the JSON that is no whole number.
    """
    arrays = {key: value for key, value in found.items() if isinstance(value, np.ndarray)}
    values = {key: value for key, value in found.items() if key not in arrays}
    if RECORDING:
        if arrays:
            np.savez_compressed(ANSWERS / f"{name}.npz", **arrays)
        if values:
            text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
            (ANSWERS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        return
    recorded: dict[str, Any] = {}
    if arrays:
        with np.load(ANSWERS / f"{name}.npz", allow_pickle=False) as file:
            recorded.update(file)
    if values:
        recorded.update(json.loads((ANSWERS / f"{name}.json").read_text(encoding="utf-8")))
    wrong = list_differences({**values, **arrays}, recorded, rel=rel, within=within, arrays_within=arrays_within)
    if wrong:
        pytest.fail(f"{name} is not as recorded:\n  " + "\n  ".join(wrong), pytrace=False)


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any], *, arrays_within: float = 0.0) -> None:
    """Fail with each difference of two answers."""
    wrong = list_differences(found, expected, arrays_within=arrays_within)
    assert not wrong, "\n  ".join(["the two are not the same:", *wrong])


def list_differences(
    found: Any, expected: Any, where: str = "", *, rel: float = 1e-6, within: float = 0.0, arrays_within: float = 0.0
) -> list[str]:
    """Say where and how two answers differ."""
    more = {"rel": rel, "within": within, "arrays_within": arrays_within}
    if isinstance(found, dict) and isinstance(expected, dict):
        wrong = [f"{where}{key} is new" for key in found.keys() - expected.keys()]
        wrong += [f"{where}{key} is gone" for key in expected.keys() - found.keys()]
        for key in expected.keys() & found.keys():
            wrong += list_differences(found[key], expected[key], f"{where}{key}.", **more)
        return sorted(wrong)
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [line for at, pair in pairs for line in list_differences(*pair, f"{where}{at}.", **more)]
    if isinstance(found, np.ndarray):
        return _list_array_differences(found, np.asarray(expected), where.rstrip("."), arrays_within)
    if (
        isinstance(found, float)
        and isinstance(expected, float)
        and found == pytest.approx(expected, rel=rel, abs=within)
    ):
        return []
    if type(found) is type(expected) and found == expected:
        return []
    return [f"{where.rstrip('.')}: {expected!r} expected, {found!r} found"]


def _list_array_differences(found: np.ndarray, expected: np.ndarray, where: str, tolerance: float) -> list[str]:
    if found.shape != expected.shape or found.dtype.kind != expected.dtype.kind:
        return [f"{where}: {expected.dtype}{expected.shape} expected, {found.dtype}{found.shape} found"]
    if found.dtype.kind != "U" and found.dtype != expected.dtype:
        return [f"{where}: {expected.dtype} expected, {found.dtype} found"]
    if found.dtype.kind == "f":
        distance = np.abs(found.astype(np.float64) - expected.astype(np.float64))
        wrong = ~((distance <= tolerance) | (np.isnan(found) & np.isnan(expected)))
    else:
        wrong = found != expected
    if not wrong.any():
        return []
    first = [
        f"{tuple(map(int, at))}: {expected[tuple(at)]} expected, {found[tuple(at)]} found"
        for at in np.argwhere(wrong)[:4]
    ]
    return [f"{where}: {wrong.sum()} of {wrong.size} entries differ, at {'; '.join(first)}"]
