"""Writing embeddings shard by shard; see `folder` for the layout.

The schema of a shard's metadata file records the outcome of the shard and the identity of the run's plan, so that files of
another plan are never taken for this one's. Until the folder is finished, each shard also has a note, written last: size,
time and hash of its files, by which a resumed run tells whole files from damaged ones.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_json, write_npy, write_parquet
from clipcid_cli.formats.embeddings.text_folder import STEP as TEXTS
from clipcid_cli.formats.embeddings.text_folder import refuse_foreign_rows
from clipcid_cli.formats.fingerprint import FileRecord, find_changed, record
from clipcid_cli.formats.output import is_claimed, open_output, unfinished
from clipcid_cli.formats.sidecar import EmbedSidecar
from clipcid_cli.formats.skips import Skips

_RECORD = b"clipcid"
_NOTES = ".shards"
_FORMS = {
    "img_emb": "npy",
    "text_emb": "npy",
    "captions_emb": "npy",
    "view_emb": "npy",
    "view_params": "npy",
    "variant_emb": "npy",
    "metadata": "parquet",
}


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """The outcome of one shard.

    Attributes:
        read: Samples listed, usable or not.
        skips: Samples that could not be used.
        flattened: Images with transparent pixels, which were shown on white.
    """

    shard: str
    read: int
    rows: int
    skips: Skips
    flattened: int


@dataclasses.dataclass(frozen=True)
class ShardRows:
    """The rows of one shard.

    Attributes:
        images: float16 [n, D], unit rows.
        texts: float16 [n, D], unit rows of the first captions; None when texts are not embedded.
        caption_counts: Number of captions of each row, n numbers ≥ 1; None where no row has several.
        further: float16 [Σ (count − 1), D], unit rows of the captions after the first, row after row; None likewise.
        views: float16 [n, V, D], unit rows of augmented views; None without views.
        view_params: float32 [n, V, P], the numbers that reproduce each view; None likewise.
        variants: float16 [n, W, D], unit rows of variants of the captions; None without variants.
    """

    images: npt.NDArray[np.float16]
    texts: npt.NDArray[np.float16] | None = None
    caption_counts: Sequence[int] | None = None
    further: npt.NDArray[np.float16] | None = None
    views: npt.NDArray[np.float16] | None = None
    view_params: npt.NDArray[np.float32] | None = None
    variants: npt.NDArray[np.float16] | None = None

    def by_kind(self) -> dict[str, npt.NDArray[Any] | None]:
        """Return the arrays by the name of their folder."""
        return {
            "img_emb": self.images,
            "text_emb": self.texts,
            "captions_emb": self.further,
            "view_emb": self.views,
            "view_params": self.view_params,
            "variant_emb": self.variants,
        }


class EmbeddingWriter:
    """Writer of one folder; several processes may write different shards of it at once."""

    def __init__(self, folder: Path, plans: Sequence[str]) -> None:
        """Prepare to write.

        Args:
            plans: Identity of settings and input of each shard, see `identity_of`. Their number determines the number of
                digits in file names, at least four, unless the folder has files: added shards do not rename them.
        """
        self.folder = folder
        there = [path.stem.rpartition("_")[2] for path in (folder / "metadata").glob("metadata_*.parquet")]
        first = [name for name in there if name.isdecimal() and int(name) == 0]
        self._digits = len(min(first)) if first else max(4, len(str(len(plans) - 1)))
        self._numbers = range(len(plans))
        self._plans = plans

    def reopen(self, outputs: Sequence[FileRecord]) -> None:
        """Write the notes of the shards of a finished folder again, so that those that are still wanted stay.

        Args:
            outputs: What its sidecar says of its files.
        """
        owners = {self._path(kind, number, form): number for number in self._numbers for kind, form in _FORMS.items()}
        notes: dict[int, list[FileRecord]] = {}
        for entry in outputs:
            number = owners.get(self.folder / entry.path)
            if number is not None:
                notes.setdefault(number, []).append(entry)
        for number, entries in notes.items():
            write_json(self._note(number), msgspec.to_builtins(entries))

    def write(
        self, number: int, outcome: ShardRecord, keys: Sequence[str], captions: Sequence[str], rows: ShardRows
    ) -> None:
        """Write one shard.

        Args:
            number: Number of the shard, from 0.
            rows: Embeddings of the same n samples.
        """
        # The commit mark of an earlier plan must never accompany rows of this one, even if the run is killed in between.
        self._note(number).unlink(missing_ok=True)
        self._path("metadata", number, "parquet").unlink(missing_ok=True)
        for kind, array in rows.by_kind().items():
            if array is None:
                self._path(kind, number, "npy").unlink(missing_ok=True)
            else:
                write_npy(self._path(kind, number, "npy"), array)
        content = dataclasses.asdict(outcome) | {"skips": outcome.skips.to_json(), "plan": self._plans[number]}
        try:
            columns = {
                "key": pa.array(keys, type=pa.string()),
                "shard": pa.array([outcome.shard] * len(keys), type=pa.string()),
                "caption": pa.array(captions, type=pa.string()),
            }
        except UnicodeEncodeError as error:
            raise ClipcidError(
                f"Shard {outcome.shard}: the name of a file is not UTF-8: {ascii(error.object)[1:-1]}.",
                "Rename the file; keys and names of shards are text.",
            ) from error
        if rows.caption_counts is not None:
            columns["captions"] = pa.array(rows.caption_counts, type=pa.int32())
        table = pa.table(columns).replace_schema_metadata({_RECORD: json.dumps(content, sort_keys=True)})
        write_parquet(self._path("metadata", number, "parquet"), table)
        kinds = [kind for kind, array in rows.by_kind().items() if array is not None]
        written = [self._path(kind, number, _FORMS[kind]) for kind in (*kinds, "metadata")]
        write_json(self._note(number), msgspec.to_builtins([record(path, self.folder) for path in written]))

    def read_record(self, number: int) -> ShardRecord | None:
        """Read the outcome of a shard; None when it is unfinished, was changed or damaged, or belongs to another plan."""
        files = self._read_note(number)
        if not files or find_changed(self.folder, files, self._note(number)):
            return None
        try:
            content = json.loads((pq.read_schema(self._path("metadata", number, "parquet")).metadata or {})[_RECORD])
            if content.pop("plan") != self._plans[number]:
                return None
            return ShardRecord(**(content | {"skips": Skips.from_json(content["skips"])}))
        except (OSError, pa.ArrowException, LookupError, TypeError, ValueError, AttributeError):
            return None

    def describe(self) -> list[FileRecord]:
        """Describe the files of all shards for the sidecar."""
        return [entry for number in self._numbers for entry in self._read_note(number)]

    def remove_notes(self) -> None:
        """Remove the notes of the shards, once the sidecar says the same."""
        shutil.rmtree(self.folder / _NOTES, ignore_errors=True)

    def _read_note(self, number: int) -> list[FileRecord]:
        try:
            return msgspec.json.decode(self._note(number).read_bytes(), type=list[FileRecord])
        except (OSError, msgspec.MsgspecError):
            return []

    def _note(self, number: int) -> Path:
        return self.folder / _NOTES / f"{number:0{self._digits}d}.json"

    def remove_others(self, with_texts: bool) -> None:
        """Remove files of earlier runs that do not belong to this one, such as those of shards that no longer exist."""
        self._remove_all_but([kind for kind in _FORMS if with_texts or kind != "text_emb"])

    def remove_all(self) -> None:
        """Remove every file, when no sample can be used."""
        self._remove_all_but([])
        self.remove_notes()

    def _remove_all_but(self, kinds: Sequence[str]) -> None:
        """Remove the files that are not of some shard, or not of one of these kinds."""
        for kind, form in _FORMS.items():
            keep = {self._path(kind, number, form).name for number in self._numbers} if kind in kinds else set()
            for path in (self.folder / kind).glob(f"{kind}_*.{form}"):
                if path.name not in keep:
                    path.unlink()

    def _path(self, kind: str, number: int, form: str) -> Path:
        return self.folder / kind / f"{kind}_{number:0{self._digits}d}.{form}"


def refuse_foreign_folder(folder: Path) -> None:
    """Refuse a folder with embeddings that `embed DATA` did not write, since it would replace and remove files there.

    Raises:
        ClipcidError: when there are any.
    """
    if is_claimed(folder, TEXTS):
        raise ClipcidError(
            f"{folder} holds embeddings of texts without images.",
            "Choose another folder for those of the data with --out.",
        )
    kinds = (kind for kind, form in _FORMS.items() if form == "npy")
    refuse_foreign_rows(folder, "embed", kinds)


def remove_leftovers(folder: Path, finished: EmbedSidecar) -> None:
    """Remove what a run left that was killed right after its sidecar, but not what one works with that goes on."""
    if unfinished(folder, "embed") is None and not (folder / _NOTES).exists():
        return
    wanted = {"settings": finished.settings, "inputs": finished.inputs, "overwrite": False}
    with suppress(ClipcidError), open_output(folder, "embed", EmbedSidecar, **wanted):
        shutil.rmtree(folder / _NOTES, ignore_errors=True)
