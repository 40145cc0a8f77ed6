"""A sidecar with an entry of another type, without one, or of another version is refused where it is read."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sidecars import make_sidecar

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats import sidecar as formats
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.sidecar import Run, read_sidecar

EMBED = formats.EmbedSidecar


def write(path: Path, kind: Any = EMBED, **entries: Any) -> dict[str, Any]:
    content = make_sidecar(kind, **entries)
    path.write_text(json.dumps(content))
    return content


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("checksum"),
        lambda content: content.pop("model"),
        lambda content: content["counts"].update(images=4),
        lambda content: content["counts"].update(skipped={"no_image": 1e300}),
        lambda content: content["model"]["config"].update(text_cfg=None),
        lambda content: content.update(more=1),
    ],
)
def test_one_that_was_edited_at_any_depth_is_refused(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "embed.json"
    content = write(path)
    assert read_sidecar(path, EMBED) is not None
    path.write_text(json.dumps(dict(reversed(content.items())), indent=8))
    assert read_sidecar(path, EMBED) is not None
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ClipcidError, match=r"embed\.json cannot be read as a sidecar .* it was edited") as found:
        read_sidecar(path, EMBED, "Make it again.")
    assert found.value.fix == "Make it again."


def test_what_is_written_is_read_with_plain_numbers_and_seconds_rounded(tmp_path: Path) -> None:
    made = formats.make_sidecar(
        formats.ForestSidecar,
        "forest",
        Run(settings={"a": (1, 0.1 + 0.2)}, inputs=[FileRecord("ä\udc80", 1, "h")]),
        {"counts": {"z": np.int64(1), "a": ("é", np.float32(0.1))}, "seconds": {"read": 0.12345}, "cutoff": 1e-7},
    )
    formats.write_sidecar(tmp_path / "forest.json", made)
    found = read_sidecar(tmp_path / "forest.json", formats.ForestSidecar)
    assert found is not None
    assert (found.inputs, found.cutoff, found.seconds) == (made.inputs, 1e-7, {"read": 0.123})
    assert found.counts == {"z": 1, "a": ["é", float(np.float32(0.1))]}


def test_entries_are_attributes_and_unknown_ones_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "embed.json"
    assert read_sidecar(path, EMBED) is None
    write(path, new=1)
    found = read_sidecar(path, EMBED)
    assert found is not None
    assert (found.model.spec, found.data.spec, found.made.keys, found.counts["images"]) == ("tiny", "data", "sample", 3)
    assert pickle.loads(pickle.dumps(found)) == found


@pytest.mark.parametrize(("version", "said"), [(1, "written by an earlier clipcid"), (99, "knows up to 2")])
def test_another_version_says_what_to_do(tmp_path: Path, version: int, said: str) -> None:
    (tmp_path / "embed.json").write_text(json.dumps({"format_version": version}))
    with pytest.raises(ClipcidError, match=said) as found:
        read_sidecar(tmp_path / "embed.json", EMBED)
    assert "--overwrite" in found.value.fix if version == 1 else "Upgrade" in found.value.fix
