"""The entries of a sidecar: one of another type, or one that is missing, is refused where it is read."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.output import read_sidecar

DATA = {"spec": "a", "keys": "sample", "image": "i", "caption": "c", "key": "k"}


@pytest.mark.parametrize(
    "entry",
    [
        {"counts": {"skipped": []}},
        {"counts": {"skipped": {"no_image": "2"}}},
        {"counts": {"skipped": {"train": {"no_image": None}}}},
        {"data": {name: DATA[name] for name in DATA if name != "image"}},
        {"data": DATA | {"key": 3}},
        {"data": "a"},
        {"data": None},
        {"pictures": []},
        {"counts": {"images": ""}},
        {"calibration": 1.5},
        {"images_per_second": "x"},
        {"texts_per_second": []},
        {"model": None},
        {"intervals": []},
        {"intervals": {"acc1": [0.5]}},
        {"intervals": {"acc1": [0.5, None]}},
        {"parity": []},
        {"parity": {"onnx": 1.5}},
        {"seconds": {"read": "x"}},
        {"model": {"spec": 1}},
        {"model": {"config": []}},
        {"model": {"config": {"text_cfg": 1}}},
        {"pictures": {"unread": [["0"]]}},
        {"inputs": [{"size": 1, "hash": 1}]},
        {"settings": {"against": 5}},
        {"settings": {"against": [[5, "hash"]]}},
        {"settings": {"view_kind": 5}},
        {"settings": {"view_kind": [5]}},
        {"keep_list": "a"},
        {"counts": {"used": {"a": 1}, "read": 3}},
        {"counts": {"read": None}},
        {"settings": {"losses": {"clip": {"value": {"a": 1}}}}},
        {"settings": {"losses": ["clip"]}},
        {"written": True},
        {"examples": 1e308},
        {"examples": [{"label": 5}]},
        {"per_class": [{"images": "x"}]},
        {"keep_list": {"path": 5}},
        {"keep_list": {"path": "a", "kept": 3, "images": {"a": 1}}},
        {"keep_list": {"path": "a", "kept": 3, "images": 0}},
        {"flags": []},
        {"inputs": [{"hash": "a"}]},
        {"outputs": [{"path": "a", "size": 1, "time": "1", "hash": "b"}]},
        {"result": []},
        {"result": {"validation_images": {"a": 1}}},
        {"result": {"searched": 0}},
        {"result": {"skipped": {"no_image": []}}},
        {"result": {"seconds": {"fit": None}}},
        {"result": {"sweep": []}},
        {"result": {"sweep": {"c": []}}},
        {"result": {"sweep": {"score": [0.5, None]}}},
        {"result": {"shots": [None]}},
        {"result": {"shots": [{"c": "x"}]}},
        {"result": {"shots": [{"metrics": {"lp_acc1": {"mean": "x"}}}]}},
        {"result": {"threshold": "x"}},
        {"result": {"other_linkage": {"kept": []}}},
        {"result": {"audit": {"rate": None}}},
        {"result": {"against": {"references": [{"name": "a", "nearest": "x"}]}}},
    ],
)
def test_a_sidecar_with_entries_of_other_types_is_refused_where_it_is_read(tmp_path: Path, entry: Any) -> None:
    model = {"spec": "a", "weights_hash": "b", "config": {"text_cfg": {}}}
    whole = {
        "format_version": 1,
        "counts": {"skipped": {"train": {"no_image": 1}, "val": {}}},
        "data": DATA,
        "model": model,
        "result": {"threshold": None, "audit": None, "shots": [{"metrics": {"lp_acc1": {"mean": 0.5, "std": None}}}]},
    }
    path = tmp_path / "embed.json"
    path.write_text(json.dumps(whole))
    assert read_sidecar(path) == whole
    path.write_text(json.dumps(whole | entry))
    with pytest.raises(ClipcidError, match=r"embed\.json cannot be read as a sidecar of clipcid: its entry"):
        read_sidecar(path)


def test_an_entry_that_a_sidecar_lacks_is_named_where_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "embed.json").write_text(
        json.dumps({"format_version": 1, "settings": {"view": {"kind": "crop"}}, "examples": [{}]})
    )
    sidecar = read_sidecar(tmp_path / "embed.json")
    assert sidecar is not None
    assert sidecar == pickle.loads(pickle.dumps(sidecar)) == json.loads(json.dumps(sidecar))
    result = {"first": 1} | sidecar["settings"] | {"last": 2}
    assert list(result) == ["first", "view", "last"]
    for read, name in (
        (lambda: sidecar["model"], "model"),
        (lambda: sidecar["settings"]["precision"], "settings.precision"),
        (lambda: sidecar["settings"]["view"]["scale"], "settings.view.scale"),
        (lambda: result["precision"], "settings.precision"),
        (lambda: sidecar["examples"][0]["path"], "examples.path"),
    ):
        with pytest.raises(ClipcidError, match=rf"embed\.json has no entry '{re.escape(name)}'\.") as found:
            read()
        assert found.value.fix
    assert sidecar.get("model") is None
