"""Writing embeddings shard by shard; see `embeddings` for the layout.

The metadata file of a shard is written last and is its commit mark. Its schema's metadata records what became of the shard,
and the identity of the run's plan, so that files left by another plan are never taken for this one's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_npy, write_parquet
from clipcid_cli.formats.skips import Skips

_RECORD = b"clipcid"
_FORMS = {"img_emb": "npy", "text_emb": "npy", "metadata": "parquet"}


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """What became of one shard.

    Attributes:
        shard: Its name.
        read: Samples looked at, usable or not.
        rows: Samples embedded.
        skips: Samples that could not be used.
        flattened: Images whose transparent pixels were laid on white.
    """

    shard: str
    read: int
    rows: int
    skips: Skips
    flattened: int


class EmbeddingWriter:
    """Writer of one folder; several processes may write different shards of it at once.

    Attributes:
        folder: The folder.
    """

    def __init__(self, folder: Path, num_shards: int, plan: str) -> None:
        """Prepare to write.

        Args:
            folder: The folder.
            num_shards: Number of shards; sets the width of the numbers in file names, four digits at least.
            plan: Identity of settings and inputs, see `plan_identity`.
        """
        self.folder = folder
        self._digits = max(4, len(str(num_shards - 1)))
        self._numbers = range(num_shards)
        self._plan = plan

    def write(
        self,
        number: int,
        record: ShardRecord,
        keys: Sequence[str],
        captions: Sequence[str],
        images: npt.NDArray[np.float16],
        texts: npt.NDArray[np.float16] | None,
    ) -> None:
        """Write one shard.

        Args:
            number: Number of the shard, from 0.
            record: What became of it.
            keys: Keys, n.
            captions: Captions, n.
            images: float16 [n, D], unit rows.
            texts: float16 [n, D], unit rows, or None when texts are not embedded.
        """
        # The mark of an earlier plan must not stand beside rows of this one, not even for the moment of a kill.
        self._path("metadata", number, "parquet").unlink(missing_ok=True)
        write_npy(self._path("img_emb", number, "npy"), images)
        if texts is not None:
            write_npy(self._path("text_emb", number, "npy"), texts)
        content = dataclasses.asdict(record) | {"skips": record.skips.to_json(), "plan": self._plan}
        table = pa.table(
            {
                "key": pa.array(keys, type=pa.string()),
                "shard": pa.array([record.shard] * len(keys), type=pa.string()),
                "caption": pa.array(captions, type=pa.string()),
            }
        ).replace_schema_metadata({_RECORD: json.dumps(content, sort_keys=True)})
        write_parquet(self._path("metadata", number, "parquet"), table)

    def read_record(self, number: int) -> ShardRecord | None:
        """Read what became of a shard; None when it is not finished, or was made under another plan."""
        path = self._path("metadata", number, "parquet")
        if not path.is_file() or not self._path("img_emb", number, "npy").is_file():
            return None
        try:
            content = json.loads((pq.read_schema(path).metadata or {})[_RECORD])
        except (pa.ArrowInvalid, KeyError, ValueError):
            return None
        if content.pop("plan") != self._plan:
            return None
        return ShardRecord(**(content | {"skips": Skips.from_json(content["skips"])}))

    def read_column(self, name: str) -> pa.ChunkedArray:
        """Read a column of the metadata of all shards, in order of rows."""
        tables = [pq.read_table(self._path("metadata", number, "parquet"), columns=[name]) for number in self._numbers]
        return pa.concat_tables([table.replace_schema_metadata() for table in tables])[name]

    def remove_others(self, with_texts: bool) -> None:
        """Remove files of earlier runs that do not belong to this one, such as those of shards that are no more."""
        kinds = {"img_emb", "metadata"} | ({"text_emb"} if with_texts else set())
        self._remove_all_but({self._path(kind, number, _FORMS[kind]) for kind in kinds for number in self._numbers})

    def remove_all(self) -> None:
        """Remove every file: nothing that was read can be used."""
        self._remove_all_but(set())

    def _remove_all_but(self, keep: set[Path]) -> None:
        for kind, form in _FORMS.items():
            for path in (self.folder / kind).glob(f"{kind}_*.{form}"):
                if path not in keep:
                    path.unlink()

    def _path(self, kind: str, number: int, form: str) -> Path:
        return self.folder / kind / f"{kind}_{number:0{self._digits}d}.{form}"


def refuse_foreign_folder(folder: Path) -> None:
    """Refuse to write where embeddings lie that `embed` did not make, since it replaces and removes files there.

    Raises:
        ClipcidError: when there are any.
    """
    ours = (folder / "embed.json").exists() or (folder / ".embed.plan.json").exists()
    if not ours and any((folder / "img_emb").glob("*.npy")):
        raise ClipcidError(
            f"{folder} holds embeddings that clipcid did not write.", "Give another folder with --out, or remove them."
        )


def plan_identity(settings: dict[str, Any], inputs: list[dict[str, Any]]) -> str:
    """Hash settings and the content of inputs, wherever those lie."""
    content = [settings, [(entry["size"], entry["hash"]) for entry in inputs]]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
