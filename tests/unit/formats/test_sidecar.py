"""A sidecar with an entry of another type, without one, or of another version is refused where it is read."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sidecars import DATA, MODEL, make_sidecar

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats import sidecar as formats
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.sidecar import Run, read_sidecar

EMBED, BALANCE, CLUSTER, DISTILL = (
    formats.EmbedSidecar,
    formats.BalanceSidecar,
    formats.ClusterSidecar,
    formats.DistillSidecar,
)
RESULT = make_sidecar(BALANCE)["result"]


@pytest.mark.parametrize(
    ("kind", "entry", "named"),
    [
        (EMBED, {"counts": {"skipped": []}}, "counts"),
        (EMBED, {"counts": {"images": 3, "skipped": {"no_image": "2"}}}, "counts"),
        (EMBED, {"data": {name: DATA[name] for name in DATA if name != "image"}}, "image"),
        (EMBED, {"data": DATA | {"key": 3}}, "key"),
        (EMBED, {"data": None}, "data"),
        (EMBED, {"images_per_second": "x"}, "images_per_second"),
        (EMBED, {"model": None}, "model"),
        (EMBED, {"model": MODEL | {"spec": 1}}, "spec"),
        (EMBED, {"model": MODEL | {"config": {"text_cfg": 1, "vision_cfg": {}}}}, "text_cfg"),
        (EMBED, {"seconds": {"read": "x"}}, "seconds"),
        (EMBED, {"inputs": [{"path": "a", "size": 1, "hash": 1}]}, "inputs"),
        (EMBED, {"outputs": [{"path": "a", "size": 1, "time": "1", "hash": "b"}]}, "outputs"),
        (EMBED, {"settings": {"text": True}}, "settings"),
        (BALANCE, {"pictures": []}, "pictures"),
        (BALANCE, {"pictures": {"shown": 1, "why": "", "unread": [["0"]]}}, "unread"),
        (BALANCE, {"flags": []}, "flags"),
        (BALANCE, {"result": []}, "result"),
        (BALANCE, {"result": RESULT | {"searched": 0}}, "searched"),
        (BALANCE, {"result": RESULT | {"threshold": "x"}}, "threshold"),
        (BALANCE, {"result": RESULT | {"audit": {"rate": None}}}, "result"),
        (CLUSTER, {"keep_list": "a"}, "keep_list"),
        (CLUSTER, {"temperatures": {}}, "temperatures"),
        (DISTILL, {"settings": {"val_fraction": 0.1, "losses": {"clip": {"value": {}}}}}, "settings"),
        (DISTILL, {"keep_list": {"path": "a", "kept": 3, "images": 0}}, "keep_list"),
    ],
)
def test_an_entry_of_another_type_is_named(tmp_path: Path, kind: Any, entry: dict[str, Any], named: str) -> None:
    path = tmp_path / "step.json"
    path.write_text(json.dumps(make_sidecar(kind)))
    assert read_sidecar(path, kind) is not None
    path.write_text(json.dumps(make_sidecar(kind) | entry))
    with pytest.raises(ClipcidError, match=rf"step\.json cannot be read as a sidecar of clipcid: .*{named}") as found:
        read_sidecar(path, kind, "Make it again.")
    assert found.value.fix == "Make it again."


def test_entries_are_attributes_and_unknown_ones_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "embed.json"
    assert read_sidecar(path, EMBED) is None
    path.write_text(json.dumps(make_sidecar(EMBED, inputs=[{"path": "a\udc80", "size": 1, "hash": "h"}]) | {"new": 1}))
    found = read_sidecar(path, EMBED)
    assert found is not None
    assert (found.model.spec, found.data.spec, found.made.keys, found.counts["images"]) == ("tiny", "data", "sample", 3)
    assert found.inputs == [FileRecord("a\udc80", 1, "h")]
    assert pickle.loads(pickle.dumps(found)) == found


def test_numbers_of_numpy_are_plain_and_seconds_rounded() -> None:
    made = formats.make_sidecar(
        formats.ForestSidecar,
        "forest",
        Run(settings={}, inputs=[]),
        {"counts": {"images": np.int64(3)}, "seconds": {"read": 0.12345}, "cutoff": np.float32(0.5)},
    )
    assert (made.counts, made.seconds, made.cutoff) == ({"images": 3}, {"read": 0.123}, 0.5)


@pytest.mark.parametrize(("version", "said"), [(1, "written by an earlier clipcid"), (99, "knows up to 2")])
def test_another_version_says_what_to_do(tmp_path: Path, version: int, said: str) -> None:
    (tmp_path / "embed.json").write_text(json.dumps({"format_version": version}))
    with pytest.raises(ClipcidError, match=said) as found:
        read_sidecar(tmp_path / "embed.json", EMBED)
    assert "--overwrite" in found.value.fix if version == 1 else "Upgrade" in found.value.fix


def test_what_is_no_json_is_named(tmp_path: Path) -> None:
    for content in ("{", "[]", "{}"):
        (tmp_path / "balance.json").write_text(content)
        with pytest.raises(ClipcidError, match=r"balance\.json cannot be read as a sidecar"):
            read_sidecar(tmp_path / "balance.json", BALANCE)
