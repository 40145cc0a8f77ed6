"""A sidecar that was edited or is of another version is refused where it is read."""

import json
from pathlib import Path
from typing import Any

import pytest
from sidecars import make_sidecar

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats import sidecar as formats
from clipcid_cli.formats.sidecar import read_sidecar

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


@pytest.mark.parametrize(("version", "said"), [(1, "written by an earlier clipcid"), (99, "knows up to 2")])
def test_another_version_says_what_to_do(tmp_path: Path, version: int, said: str) -> None:
    (tmp_path / "embed.json").write_text(json.dumps({"format_version": version}))
    with pytest.raises(ClipcidError, match=said) as found:
        read_sidecar(tmp_path / "embed.json", EMBED)
    assert "--overwrite" in found.value.fix if version == 1 else "Upgrade" in found.value.fix
