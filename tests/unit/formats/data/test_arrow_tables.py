"""Tables of the library `datasets` that a stranger made: whatever they hold is read, skipped, or one error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.arrow_tables import open_captioned
from clipcid_cli.formats.skips import Skips

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
INSIDE = {"bytes": b"1", "path": None}


def read(folder: Path, kinds: dict[str, pa.DataType], row: dict[str, Any]) -> Skips:
    table = pa.Table.from_pylist([row], pa.schema(kinds))
    with pa.OSFile(str(folder / "a-test.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    skips = Skips()
    for shard in open_captioned(folder, folder, 1000).shards:
        list(shard.stream(skips))
    return skips


@pytest.mark.parametrize(
    ("image", "caption", "row"),
    [
        (pa.string(), pa.string(), {"image": "a.png", "caption": "a cat"}),
        (pa.struct({"bytes": pa.binary()}), pa.string(), {"image": {"bytes": b"1"}, "caption": "a cat"}),
        (IMAGE, pa.list_(pa.null()), {"image": INSIDE, "caption": [None] * 1000}),
        (IMAGE, pa.struct({"x": pa.int32()}), {"image": INSIDE, "caption": {"x": 1}}),
    ],
)
def test_columns_of_other_types_are_refused(
    tmp_path: Path, image: pa.DataType, caption: pa.DataType, row: dict[str, Any]
) -> None:
    with pytest.raises(ClipcidError, match=r"cannot be read as a table .*: its column '(image|caption)' is of "):
        read(tmp_path, {"image": image, "caption": caption}, row)


@pytest.mark.parametrize("path", ["a\0b.png", "../outside.png", "/outside.png"])
def test_a_path_that_is_none_or_leads_out_is_no_image(tmp_path: Path, path: str) -> None:
    row = {"image": {"bytes": None, "path": path}, "caption": ["a cat"]}
    assert read(tmp_path, {"image": IMAGE, "caption": pa.list_(pa.string())}, row).counts == {"no_image": 1}
