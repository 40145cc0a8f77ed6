"""The work directory: the folder of each step's output, and how a later step finds it.

Nothing here creates files. A ``find_…`` method returns a complete output, or raises an error with the flag to point
elsewhere and the command to make it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from clipcid_cli.errors import ClipcidError, command_line, flag_words
from clipcid_cli.formats.fingerprint import hash_json, validate_unchanged
from clipcid_cli.formats.output import unfinished
from clipcid_cli.formats.sidecar import Sidecar, read_sidecar, run_again, sidecar_path

KEEP_LIST = "keep.parquet"
"""Name of the keep list in its folder."""
CLUSTERS = "clusters.parquet"
"""Name of the table of clusters in its folder."""
FolderName = str | list[str]
"""The name of embeddings in a sidecar; of joined ones those of their folders."""


# The sidecars of finished outputs, by the folder of a work directory that holds them.
_SIDECARS = {
    "embeddings": "*/embed.json",
    "balance": "balance.json",
    "clusters": "cluster.json",
    "distill": "*/distill.json",
    "eval": "sidecars/*.json",
    "export": "*/export.json",
}


def validate_outermost(work: Path) -> None:
    """Refuse a folder of a work directory as one of its own, in which nothing would be found."""
    place = Path(os.path.abspath(work.expanduser()))  # without a `..`
    for folder in (place, place.parent):
        pattern = _SIDECARS.get(folder.name)
        if pattern is not None and next(folder.glob(pattern), None) is not None:
            raise ClipcidError(
                f"{work} lies inside the work directory {folder.parent}.",
                f"Name the work directory itself: {flag_words(work=folder.parent)}",
            )


class _Balanced(Sidecar, kw_only=True):
    """What a sidecar of `balance` says of the embeddings: where they are, relative to the work directory."""

    embeddings: str


class WorkDirectory:
    """Names of the folders in a work directory, which need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.indexes = path / "index"  # of data sets
        self.references = path / "references"  # embeddings of images that `balance` compares others with
        self.balance = path / "balance"
        self.clusters = path / "clusters"
        self.eval = path / "eval"  # metrics files and nothing else
        self.eval_summary = path / "eval-zeroshot"  # table and report of the last `eval-zeroshot`
        self.index_page = path / "index.html"  # of `runs`
        self.features = path / "features"  # frozen ones, of `eval-linear`

    def embeddings(self, model_slug: str) -> Path:
        return self.path / "embeddings" / model_slug

    def sending(self, url: str, part: Sequence[int]) -> Path:
        """Return the folder in which the shards of a part are made that are sent to an object store."""
        return self.path / ".sending" / hash_json([url, *part])

    def second_moment(self, identity: str) -> Path:
        """Return the file of the second moment of embeddings, in which `distill` finds principal axes."""
        return self.path / ".second-moments" / f"{identity}.npy"

    def distill(self, name: str) -> Path:
        return self.path / "distill" / name

    def export(self, name: str) -> Path:
        return self.path / "export" / name

    def name_of(self, folder: Path) -> str:
        """Return a folder's name for sidecars: relative if it is inside, so that a copied work directory finds its own."""
        folder = folder.resolve()
        here = self.path.resolve()
        return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)

    def folders_of(self, name: FolderName) -> list[Path]:
        """Return the folders of embeddings that a sidecar names."""
        return [self.path / folder for folder in ([name] if isinstance(name, str) else name)]

    def has_embeddings(self) -> bool:
        """Whether there are finished embeddings, or a `balance` that used some of another place."""
        return self._balanced() is not None or bool(self._embedded())

    def find_embeddings(self) -> Path:
        """Find the finished embeddings that `balance` used, or else the only ones."""
        if (balanced := self._balanced()) is not None:
            return balanced
        folders = self._embedded()
        if not folders:
            raise self._missing("embeddings", self.path / "embeddings", "--embeddings", "embed", "DATA")
        if len(folders) > 1:
            raise ClipcidError(
                f"{self.path / 'embeddings'} has embeddings of {len(folders)} models: "
                f"{', '.join(path.name for path in folders)}.",
                "Choose one with --embeddings.",
            )
        return folders[0]

    def _embedded(self) -> list[Path]:
        return sorted(path.parent for path in (self.path / "embeddings").glob("*/embed.json"))

    def _balanced(self) -> Path | None:
        with suppress(ClipcidError):  # of an earlier version, or damaged: `balance --overwrite` replaces it
            balanced = read_sidecar(sidecar_path(self.balance, "balance"), _Balanced)
            folder = None if balanced is None else self.path / balanced.embeddings
            return folder if folder is not None and folder.exists() else None
        return None

    def find_keep_list(self) -> Path | None:
        """Find the keep list of a finished `balance`; None when there was no `balance` here.

        An unfinished one is refused: to go on without its list would take all images. So is a list that was edited since, or
        that is gone.
        """
        path = self.balance / KEEP_LIST
        record = sidecar_path(self.balance, "balance")
        sidecar = read_sidecar(record, Sidecar)
        if sidecar is not None:
            fix = f"Or use the list as it is now: {flag_words(keep_list=path)}"
            if not path.exists():
                fix = "Or take all images: --keep-list none"
            validate_unchanged(self.balance, sidecar.outputs, record, run_again("balance", sidecar, fix))
            return path
        if path.exists() or unfinished(self.balance, "balance") is not None:
            raise ClipcidError(
                f"The output of balance in {self.balance} is unfinished.",
                "Run its command again, which finishes it, or give --keep-list none to take all images.",
            )
        return None

    def find_clusters(self, **flags: Any) -> Path:
        """Find the folder of a finished `cluster`; `flags` are those of the command that makes it, for the error."""
        record = sidecar_path(self.clusters, "cluster")
        sidecar = read_sidecar(record, Sidecar)
        if sidecar is None or not (self.clusters / CLUSTERS).exists():
            raise self._missing("clusters", self.clusters, "--clusters", "cluster", **flags)
        table = [file for file in sidecar.outputs if file.path == CLUSTERS]
        validate_unchanged(self.clusters, table, record, run_again("cluster", sidecar))
        return self.clusters

    def find_student(self) -> Path:
        """Find the student of the training run that finished last."""
        runs = sorted((self.path / "distill").glob("*/distill.json"), key=lambda path: (path.stat().st_mtime_ns, path))
        if not runs:
            raise ClipcidError(
                f"No model was named, and there is no trained student in {self.path / 'distill'}.",
                "Name a model (an architecture:tag or a folder), or run: "
                + command_line("distill", teacher="M", student="M", work=self.path),
            )
        run = runs[-1].parent
        student = run / "student"
        fix = f"Use the model as it is now, by its path: {student}; or train it again: its command, with --overwrite."
        sidecar = read_sidecar(runs[-1], Sidecar, fix)
        validate_unchanged(run, [] if sidecar is None else sidecar.outputs, runs[-1], fix)
        return student

    def _missing(self, what: str, folder: Path, flag: str, *words: str, **flags: Any) -> ClipcidError:
        some = " (only unfinished ones)" if folder.is_dir() and any(folder.iterdir()) else ""
        command = command_line(*words, **flags, work=self.path)
        return ClipcidError(f"There are no {what} in {folder}{some}.", f"Give {flag}, or run: {command}")
