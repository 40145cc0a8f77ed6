"""Damage to every kind of file that a step reads: one error of two sentences, or a result; no hang, no traceback.

The damage is drawn by a seed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_caption, make_image, run_clipcid, write_inputs
from sidecars import edit_sidecar, leave_work, unfinish

EMBEDDINGS = "clipcid-work/embeddings/model"
_SHORT = ("--steps", "2", "--batch-size", "4", "--val-fraction", "0")
_DISTILL = ("distill", "--student", "student.json", "--preset", "cid", *_SHORT)


@dataclasses.dataclass(frozen=True)
class Target:
    """A file and a command that reads it.

    Attributes:
        form: How its content is damaged, beside what any file's may be: `json`, `parquet`, `npy`, `text` or `bytes`.
        unrecorded: A sidecar from which `outputs` is taken first, so that the content itself has to be checked.
    """

    file: str
    command: tuple[str, ...]
    form: str = "bytes"
    unrecorded: str | None = None


EVERYDAY = range(3)
MANY = range(3, 148)
_EMBED = ("embed", "--model", "model", "--out", "made", "--batch-size", "8")
_BALANCE = ("balance", "--keep", "0.7", "--overwrite", "--embeddings")
_CLUSTER = ("cluster", "--num-clusters", "3", "--iterations", "2")
_BALANCED = "clipcid-work/balance"
_AGAIN = ("--overwrite",)
_SAVED = ("--checkpoint-every", "1")
_RUN_AGAIN = (*_DISTILL, "--name", "done", *_SAVED)
_EXPORT = ("export", "model", "--format", "open-clip", "--out", "exported")
_ZEROSHOT = ("eval-zeroshot", "model", "classified", "--predictions")
_COMPARE = ("eval-zeroshot", "--compare", "clipcid-work/eval/a.json", "clipcid-work/eval/b.json")
_LINEAR = ("eval-linear", "model", "--train", "classified", "--test", "classified", "--work", "linear")

TARGETS = {
    "tar": Target("data/00000.tar", (*_EMBED, "data")),
    "tar of an evaluation": Target("data/00000.tar", ("eval-zeroshot", "model", "data", "--task", "retrieval")),
    "image": Target("images/003.png", (*_EMBED, "images", "--max-bad-fraction", "1")),
    "caption": Target("images/003.txt", (*_EMBED, "images", "--max-bad-fraction", "1"), "text"),
    "csv": Target("list.csv", (*_EMBED, "list.csv"), "text"),
    "tsv": Target("list.tsv", (*_EMBED, "list.tsv"), "text"),
    "list": Target("list.parquet", (*_EMBED, "list.parquet"), "parquet"),
    "npy": Target("rows/img_emb/img_emb_0000.npy", (*_BALANCE, "rows"), "npy"),
    "npy of captions": Target("rows/text_emb/text_emb_0000.npy", (*_CLUSTER, "--embeddings", "rows", *_AGAIN), "npy"),
    "metadata": Target("rows/metadata/metadata_0000.parquet", (*_BALANCE, "rows"), "parquet"),
    "metadata of clusters": Target(
        "rows/metadata/metadata_0001.parquet", (*_CLUSTER, "--embeddings", "rows", *_AGAIN), "parquet"
    ),
    "npz": Target("npz/a.npz", (*_BALANCE, "npz")),
    "embed.json": Target(f"{EMBEDDINGS}/embed.json", ("balance", "--keep", "0.7"), "json"),
    "embed.json of distill": Target(f"{EMBEDDINGS}/embed.json", _DISTILL, "json"),
    "manifest": Target(f"{EMBEDDINGS}/manifest.parquet", (*_CLUSTER, *_AGAIN), "parquet", f"{EMBEDDINGS}/embed.json"),
    "own npy": Target(f"{EMBEDDINGS}/img_emb/img_emb_0000.npy", (*_CLUSTER, *_AGAIN), "npy"),
    "own metadata": Target(f"{EMBEDDINGS}/metadata/metadata_0000.parquet", _DISTILL, "parquet"),
    "balance.json": Target(f"{_BALANCED}/balance.json", ("balance", "--keep", "0.9"), "json"),
    "balance.json of clusters": Target(f"{_BALANCED}/balance.json", (*_CLUSTER, *_AGAIN), "json"),
    "forest.json": Target(f"{_BALANCED}/forest.json", ("balance", "--keep", "0.95"), "json"),
    "forest": Target(
        f"{_BALANCED}/forest.parquet", ("balance", "--keep", "0.95"), "parquet", f"{_BALANCED}/forest.json"
    ),
    "keep list": Target(f"{_BALANCED}/keep.parquet", (*_CLUSTER, *_AGAIN), "parquet", f"{_BALANCED}/balance.json"),
    "keep list of distill": Target(f"{_BALANCED}/keep.parquet", _DISTILL, "parquet", f"{_BALANCED}/balance.json"),
    "keep list of shards": Target(
        f"{_BALANCED}/keep.parquet",
        ("balance", "--keep", "0.8", "--write-shards", "made"),
        "parquet",
        f"{_BALANCED}/balance.json",
    ),
    "cluster.json": Target("clipcid-work/clusters/cluster.json", _DISTILL, "json"),
    "clusters": Target(
        "clipcid-work/clusters/clusters.parquet", _DISTILL, "parquet", "clipcid-work/clusters/cluster.json"
    ),
    "centroids": Target("clipcid-work/clusters/centroids.npy", _DISTILL, "npy", "clipcid-work/clusters/cluster.json"),
    "student": Target("student.json", _DISTILL, "json"),
    "checkpoint": Target(
        "clipcid-work/distill/run/checkpoints/step_00000002.pt", (*_DISTILL, "--name", "run", *_SAVED)
    ),
    "model": Target("model/open_clip_config.json", _EXPORT[:-2], "json"),
    "weights": Target("model/open_clip_model.safetensors", _EXPORT[:-2]),
    "metrics": Target("clipcid-work/eval/a.json", _COMPARE, "json"),
    "predictions": Target("clipcid-work/eval/sidecars/a.predictions.parquet", _COMPARE, "parquet"),
    "classes": Target(
        "classes.txt", ("eval-zeroshot", "model", "classified", "--classnames", "classes.txt", *_AGAIN), "text"
    ),
    "templates": Target(
        "templates.txt", ("eval-zeroshot", "model", "classified", "--templates", "templates.txt", *_AGAIN), "text"
    ),
    "labels": Target("classified/0.tar", ("eval-linear", "model", "--train", "classified", "--test", "classified")),
    "settings": Target("c.toml", ("balance", "--config", "c.toml"), "text"),
    "run": Target(f"{_BALANCED}/.balance-*/.run.json", ("balance", "--keep", "0.7"), "json"),
    "distill.json": Target("clipcid-work/distill/done/distill.json", _RUN_AGAIN, "json"),
    "distill.json of export": Target(
        "clipcid-work/distill/done/distill.json",
        ("export", "clipcid-work/distill/done/student", "--format", "open-clip"),
        "json",
    ),
    "log": Target("clipcid-work/distill/run/train.jsonl", (*_DISTILL, "--name", "run", *_SAVED), "text"),
    "export.json": Target("exported/export.json", _EXPORT, "json"),
    "sidecar of eval-zeroshot": Target("clipcid-work/eval/sidecars/*model*.json", _ZEROSHOT, "json"),
    "sidecar of eval-linear": Target("linear/eval/sidecars/*.json", _LINEAR, "json"),
    "matched samples": Target("clipcid-work/index/*/matched-*", _DISTILL, "folder"),
    "index": Target("clipcid-work/index", _DISTILL, "folder"),
}


def write_files(place: Path) -> None:
    """Write the data, a model, lists and embeddings of another tool."""
    write_inputs(place)
    (place / "images").mkdir()
    for number in range(8):
        (place / f"images/{number:03d}.png").write_bytes(make_image(number))
        (place / f"images/{number:03d}.txt").write_text(make_caption(number))
    frame = pd.DataFrame(
        {"filepath": [f"images/{number:03d}.png" for number in range(8)], "title": [make_caption(n) for n in range(8)]}
    )
    frame.to_csv(place / "list.csv", index=False)
    frame.to_csv(place / "list.tsv", index=False, sep="\t")
    frame.to_parquet(place / "list.parquet")
    (place / "classes.txt").write_text("one\ntwo\nthree\n")
    (place / "templates.txt").write_text("a photo of a {c}.\na {c}\n")
    (place / "c.toml").write_text('[balance]\nkeep = 0.7\nembeddings = "rows"\nseed = 3\nlinkage = "single"\n')
    rows = np.random.default_rng(0).normal(size=(9, 8)).astype(np.float32)
    (place / "npz").mkdir()
    np.savez(place / "npz/a.npz", x_img=rows, x_txt=rows[::-1])
    pq.write_table(pa.table({"uid": [f"{number:032x}" for number in range(9)]}), place / "npz/a.parquet")


def make_place(place: Path) -> None:
    """Write the files, and what every step makes of them, once."""
    write_files(place)
    steps = (
        ("embed", "data", "--model", "model"),
        ("balance", "--keep", "0.8"),
        _CLUSTER,
        _RUN_AGAIN,
        (*_DISTILL, "--name", "run", *_SAVED),
        _ZEROSHOT,
        _LINEAR,
        _EXPORT,
    )
    for step in steps:
        run_clipcid(*step, cwd=place)
    shutil.copytree(place / EMBEDDINGS, place / "rows")
    (place / "rows/embed.json").unlink()
    (record,) = (place / "clipcid-work/eval").glob("*.json")
    (table,) = (place / "clipcid-work/eval/sidecars").glob("*.parquet")
    for name in "ab":
        shutil.copy(record, record.with_name(f"{name}.json"))
        shutil.copy(table, table.with_name(f"{name}.predictions.parquet"))
    leave_work(place / "clipcid-work/balance", "balance")
    unfinish(place / "clipcid-work/distill/run", "distill")  # a run that was killed after its last checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make_place` makes."""
    place = tmp_path_factory.mktemp("whole") / "place"
    place.mkdir()
    make_place(place)
    return place


@pytest.mark.parametrize("numbers", [EVERYDAY, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("name", TARGETS)
def test_damage(whole: Path, tmp_path: Path, name: str, numbers: range) -> None:
    target = TARGETS[name]
    losses = []
    for number in numbers:
        chance = random.Random(13 + number * 1_000_003 + zlib.crc32(name.encode()))
        place = tmp_path / "place"
        shutil.copytree(whole, place, copy_function=os.link, symlinks=True)
        done = damage(place, target, chance)
        found = run_clipcid(*target.command, cwd=place, check=False, timeout=60)
        problems = found.problems()
        problems += [f"left {path.name}" for path in place.rglob("*.partial")]
        if problems:
            losses.append(f"{name}, case {number}: {done}: {', '.join(problems)}{found!r}")
        shutil.rmtree(place)
    assert not losses, "\n".join(losses)


def damage(place: Path, target: Target, chance: random.Random) -> str:
    """Damage a target's file in one way.

    Returns:
        What was done, for the message of a failure.
    """
    if target.unrecorded is not None and chance.random() < 0.8:
        edit_sidecar(place / target.unrecorded, lambda sidecar: sidecar.pop("outputs", None))
    path = next(place.glob(target.file))
    if target.form == "folder":
        folders = place.glob(target.file)
        path = chance.choice(sorted(found for folder in folders for found in folder.rglob("*") if found.is_file()))
    own: list[Callable[[Path, random.Random], str]] = {
        "json": [_change_json] * 5,
        "parquet": [_change_parquet] * 3,
        "npy": [_change_npy] * 2,
        "text": [_change_text] * 2,
    }.get(target.form, [])
    return chance.choice([_change_bytes, _change_bytes, _change_bytes, _change_file, *own])(path, chance)


def _replace(path: Path, content: bytes) -> None:
    """Write anew: the file may be a hard link to the one all cases share."""
    path.unlink()
    path.write_bytes(content)


def _change_bytes(path: Path, chance: random.Random) -> str:
    content = bytearray(path.read_bytes())
    size = len(content)
    kind = chance.choice(("cut", "flip", "zero", "insert", "repeat", "empty", "swap") if size else ("insert",))
    start = chance.randrange(size + 1)
    stop = min(size, start + chance.choice((1, 8, 100, 512, 5000)))
    if kind == "cut":
        del content[start:]
    elif kind == "flip":
        for _ in range(chance.choice((1, 3, 30))):
            place = chance.randrange(size) if chance.random() < 0.5 else chance.randrange(min(size, 600))
            content[place] ^= 1 << chance.randrange(8)
    elif kind == "zero":
        content[start:stop] = bytes(stop - start)
    elif kind == "insert":
        content[start:start] = chance.randbytes(chance.choice((1, 7, 512)))
    elif kind == "repeat":
        content[start:start] = content[start:stop]
    elif kind == "swap":
        content[start:stop] = content[start:stop][::-1]
    else:
        content.clear()
    _replace(path, bytes(content))
    return f"{kind} at {start:,}"


def _change_file(path: Path, chance: random.Random) -> str:
    path.unlink()
    kind = chance.choice(("folder", "pipe", "dangling link", "missing", "text", "link to itself", "zeros"))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "text":
        path.write_bytes(b"\xff\xfe\x00not what it was\n" * 40)
    elif kind == "zeros":
        path.write_bytes(bytes(4096))
    return kind


_ODD_VALUES: tuple[Any, ...] = (None, [], {}, "x", "", -1, 0, 10**30, 1e308, True, [[]], {"a": 1}, "\0", [None], 0.5)


def _change_json(path: Path, chance: random.Random) -> str:
    """Give an entry at whatever depth another value, or take it away."""
    value = json.loads(path.read_text())
    entries: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        entries += [(holder, key) for key in keys]
        waiting += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
    holder, key = chance.choice(entries)
    if chance.random() < 0.5:
        del holder[key]
        done = "without"
    else:
        holder[key] = chance.choice(_ODD_VALUES)
        done = f"{holder[key]!r} for"
    _replace(path, json.dumps(value).encode())
    return f"{done} {key}"


def _change_parquet(path: Path, chance: random.Random) -> str:
    """Give a column another type or other values, or take it or rows away."""
    table = pq.read_table(path)
    place = chance.randrange(table.num_columns)
    name, rows = table.column_names[place], len(table)
    kinds = ("drop", "null", "number", "text", "list", "bool", "huge", "nan", "shorter", "twice", "bytes", "none")
    kind = chance.choice(kinds)
    columns: dict[str, Any] = {
        "null": pa.nulls(rows),
        "number": pa.array(range(rows), pa.int64()),
        "text": pa.array(["x"] * rows),
        "list": pa.array([[1]] * rows),
        "bool": pa.array([True] * rows),
        "huge": pa.array([2**62] * rows, pa.int64()),
        "nan": pa.array([float("nan")] * rows),
        "bytes": pa.array([b"\xff\xfe"] * rows),
    }
    if kind in columns:
        table = table.set_column(place, name, columns[kind])
    elif kind == "drop":
        table = table.remove_column(place)
    elif kind == "shorter":
        table = table.slice(0, rows // 2)
    elif kind == "none":
        table = table.slice(0, 0)
    else:
        table = pa.concat_tables([table, table])
    path.unlink()
    pq.write_table(table, path)
    return f"{kind}, column {name}"


def _change_npy(path: Path, chance: random.Random) -> str:
    """Give the rows other values, types and shapes, or the header others than the rows."""
    rows = np.load(path)
    path.unlink()
    kind = chance.choice(("nan", "zero", "inf", "type", "shape", "header", "order", "object"))
    if kind in ("nan", "zero", "inf"):
        rows[chance.randrange(len(rows))] = {"nan": np.nan, "zero": 0, "inf": np.inf}[kind]
    elif kind == "type":
        rows = rows.astype(chance.choice(("i4", "c8", "?", "S3", ">f2", "f8", "M8[s]", "V8")))
    elif kind == "shape":
        rows = chance.choice((rows[0], rows[:, :0], rows[:0], rows[None], rows[:-1], rows.T, rows[:, :-1]))
    elif kind == "order":
        rows = np.asfortranarray(rows)
    if kind == "object":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
        return kind
    if kind != "header":
        np.save(path, rows)
        return kind
    shape = chance.choice(((-1, 8), (10**15, 8), (2**62, 2**62), (3,), (), (0, 0), ("x", 8)))
    header = repr({"descr": chance.choice(("<f2", "|O", "<f9", "x", "<f4")), "fortran_order": False, "shape": shape})
    padded = header.ljust(117) + "\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode() + rows.tobytes())
    return f"header {header}"


def _change_text(path: Path, chance: random.Random) -> str:
    """Change lines, or put in characters that are no text."""
    lines = path.read_bytes().split(b"\n")
    place = chance.randrange(len(lines))
    odd = chance.choice(
        (b"", b"\0", b"\xff\xfe", b'"', b"'", b"," * 30, b"\t", b"\r", b"[", b"=", b"{c}{c}", b"{", b"%s", b"../../x",
         b"9" * 5000,
         "\u2028".encode(), "٣".encode(), b"x" * 200_000)
    )  # fmt: skip
    kind = chance.choice(("line", "end", "begin", "drop", "twice"))
    if kind == "line":
        lines[place] = odd
    elif kind == "end":
        lines[place] += odd
    elif kind == "begin":
        lines[place] = odd + lines[place]
    elif kind == "drop":
        del lines[place]
    else:
        lines[place:place] = [lines[place]] * 2
    _replace(path, b"\n".join(lines))
    return f"{kind} {place}, {odd[:20]!r}"
