"""The work directory: the folder of each step's output, and how a later step finds it.

Nothing here creates files. A ``find_…`` method returns a complete output, or raises an error with the flag to point
elsewhere and the command to make it.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from clipcid_cli.errors import ClipcidError, command_line
from clipcid_cli.formats.output import plan_path, read_sidecar, refuse_changed, sidecar_path

KEEP_LIST = "keep.parquet"
"""Name of the keep list in its folder."""
# Flags by which an output is made again, and the values that need none.
BALANCE_FLAGS = {
    **dict.fromkeys(("keep", "threshold", "cosine_distance", "against_threshold", "max_per_cluster", "seed")),
    **dict.fromkeys(("min_caption_similarity", "max_caption_similarity")),
    "linkage": "single",
    "select": "central",
    "neighbors": "exact",
    "clusters": None,
    "keys": "sample",
    "npz_array": None,
}
CLUSTER_FLAGS = {
    **dict.fromkeys(("num_clusters", "train_rows", "npz_array")),
    "features": "image",
    "iterations": 20,
    "seed": 0,
    "keys": "sample",
}


@dataclasses.dataclass(frozen=True)
class WorkDirectory:
    """Names of the folders in a work directory.

    Attributes:
        path: The work directory itself; it need not exist yet.
    """

    path: Path

    def embeddings(self, model_slug: str) -> Path:
        """Return the folder of one model's embeddings."""
        return self.path / "embeddings" / model_slug

    def texts(self, model_slug: str) -> Path:
        """Return the folder of one model's embeddings of texts without images."""
        return self.path / "texts" / model_slug

    @property
    def balance(self) -> Path:
        """The folder of the keep list, forest, curve and report."""
        return self.path / "balance"

    @property
    def clusters(self) -> Path:
        """The folder of centroids and cluster labels."""
        return self.path / "clusters"

    @property
    def fingerprints(self) -> Path:
        """The table of fingerprints of files that were hashed before."""
        return self.path / ".fingerprints.parquet"

    @property
    def indexes(self) -> Path:
        """The folder of the indexes of data sets."""
        return self.path / "index"

    @property
    def references(self) -> Path:
        """The folder of embeddings of the images that `balance` compares others with."""
        return self.path / "references"

    def second_moment(self, identity: str) -> Path:
        """Return the file of the second moment of embeddings, in which `distill` finds principal axes."""
        return self.path / ".second-moments" / f"{identity}.npy"

    def distill(self, name: str) -> Path:
        """Return the folder of one training run."""
        return self.path / "distill" / name

    @property
    def eval(self) -> Path:
        """The folder of metrics files."""
        return self.path / "eval"

    @property
    def eval_summary(self) -> Path:
        """The folder of the table and report of the last `eval-zeroshot`; `eval` itself holds metrics files only."""
        return self.path / "eval-zeroshot"

    @property
    def features(self) -> Path:
        """The folder of frozen features that `eval-linear` keeps."""
        return self.path / "features"

    def export(self, name: str) -> Path:
        """Return the folder of one export."""
        return self.path / "export" / name

    def name_of(self, folder: Path) -> str:
        """Return a folder's name for sidecars: relative if it is inside, so that a copied work directory finds its own."""
        folder, here = folder.resolve(), self.path.resolve()
        return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)

    def has_embeddings(self) -> bool:
        """Whether there are finished embeddings, or a `balance` that used some of another place."""
        return self._balanced() is not None or any((self.path / "embeddings").glob("*/embed.json"))

    def find_embeddings(self, model_slug: str | None = None) -> Path:
        """Find finished embeddings.

        Args:
            model_slug: Slug of their model; None for the embeddings that `balance` used, or else the only ones.

        Raises:
            ClipcidError: when there are none, or several to choose from.
        """
        if model_slug is not None:
            folder = self.embeddings(model_slug)
            if read_sidecar(sidecar_path(folder, "embed")) is None:
                raise self._missing("embeddings", folder, "--embeddings", "embed", "DATA", model="MODEL")
            return folder
        if (balanced := self._balanced()) is not None:
            return balanced
        found = sorted(path.parent for path in (self.path / "embeddings").glob("*/embed.json"))
        if not found:
            raise self._missing("embeddings", self.path / "embeddings", "--embeddings", "embed", "DATA")
        if len(found) > 1:
            raise ClipcidError(
                f"{self.path / 'embeddings'} has those of {len(found)} models: {', '.join(path.name for path in found)}.",
                "Choose one with --embeddings.",
            )
        return found[0]

    def _balanced(self) -> Path | None:
        """Find the embeddings that `balance` used."""
        balanced = read_sidecar(sidecar_path(self.balance, "balance"))
        folder = None if balanced is None or "embeddings" not in balanced else self.path / str(balanced["embeddings"])
        return folder if folder is not None and folder.is_dir() else None

    def find_keep_list(self) -> Path | None:
        """Find the keep list of a finished `balance`; None when there was no `balance` here.

        Raises:
            ClipcidError: when a `balance` here is unfinished: continuing without its list would take all images. When the
            list was edited since: which of the two is meant, the user must say.
        """
        found = self._finished(self.balance, "balance", KEEP_LIST, self._balance_again)
        if found is None and (plan_path(self.balance, "balance").exists() or (self.balance / KEEP_LIST).exists()):
            raise ClipcidError(
                f"The balance in {self.balance} is unfinished.",
                "Run its command again, which finishes it, or give --keep-list none to take all images.",
            )
        return found

    def find_clusters(self, **flags: Any) -> Path:
        """Find the folder of a finished `cluster`.

        Args:
            flags: Those of the command that makes it, for the error.

        Raises:
            ClipcidError: when there is none.
        """
        remake = partial(remake_clusters, self.clusters, work=self.path)
        if self._finished(self.clusters, "cluster", "clusters.parquet", remake) is None:
            raise self._missing("clusters", self.clusters, "--clusters", "cluster", **flags)
        return self.clusters

    def find_student(self) -> Path:
        """Find the student of the training run that finished last.

        Raises:
            ClipcidError: when no run has finished, or the student was replaced or edited since.
        """
        runs = sorted((self.path / "distill").glob("*/distill.json"), key=lambda path: (path.stat().st_mtime_ns, path))
        if not runs:
            raise ClipcidError(
                f"No model was named, and there is no trained student in {self.path / 'distill'}.",
                "Name a model (an architecture:tag or a folder), or run: "
                + command_line("distill", teacher="M", student="M", work=self.path),
            )
        run, student = runs[-1].parent, runs[-1].parent / "student"
        fix = f"Name the model as it is now: {student}; or train it again, by its command and --overwrite."
        refuse_changed(run, "distill", read_sidecar(runs[-1]) or {}, lambda: fix)
        return student

    def find_run(self) -> Path:
        """Find the folder of the training run that finished last, as `find_student` does."""
        return self.find_student().parent

    def find_data(self, embeddings: Path | None = None) -> dict[str, Any]:
        """Find the data that embeddings were made from.

        Args:
            embeddings: Folder of the embeddings; None takes what `find_embeddings` finds.

        Returns:
            The ``data`` entry of their sidecar, for `open_described`.

        Raises:
            ClipcidError: when there are no embeddings, or they were made by another tool.
        """
        folder = embeddings if embeddings is not None else self.find_embeddings()
        sidecar = read_sidecar(sidecar_path(folder, "embed"))
        if sidecar is None or "data" not in sidecar:
            raise ClipcidError(
                f"{folder} does not record which data it was made from.",
                "Give the data as the first argument (a folder of shards, …).",
            )
        data: dict[str, Any] = sidecar["data"]
        return data

    def _finished(self, folder: Path, step: str, file: str, fix: Callable[[dict[str, Any]], str]) -> Path | None:
        path, sidecar = folder / file, read_sidecar(sidecar_path(folder, step))
        if sidecar is None or not path.exists():
            return None
        refuse_changed(folder, step, sidecar, lambda: fix(sidecar), names={file})
        return path

    def _balance_again(self, sidecar: dict[str, Any]) -> str:
        flags = _made_with(sidecar, self.path, BALANCE_FLAGS)
        against = tuple(each[0] for each in sidecar.get("settings", {}).get("against") or ())
        command = command_line("balance", **flags, against=against, overwrite=True)
        edited = shlex.join(["--keep-list", str(self.balance / KEEP_LIST)])
        return f"Name the list as it is now: {edited}\nOr make it again: {command}"

    def _missing(self, what: str, folder: Path, flag: str, *words: str, **flags: Any) -> ClipcidError:
        unfinished = " (only unfinished ones)" if folder.is_dir() and any(folder.iterdir()) else ""
        command = command_line(*words, **flags, work=self.path)
        return ClipcidError(f"There are no {what} in {folder}{unfinished}.", f"Give {flag}, or run: {command}")


def remake_clusters(folder: Path, sidecar: dict[str, Any], work: Path | None, **more: Any) -> str:
    """Return the fix that makes clusters again: a command where they are those of the step's work directory.

    Args:
        folder: Their folder.
        sidecar: Theirs.
        work: The work directory of the step; None where it is not known.
        more: Flags in which the new ones differ.
    """
    if work is None or folder.resolve() != WorkDirectory(work).clusters.resolve():
        again = "" if more else ", or give the command that made these again, with --overwrite"
        return f"Name other clusters with --clusters{again}."
    flags = _made_with(sidecar, work, CLUSTER_FLAGS) | {"keep_list": _keep_list_of(sidecar, WorkDirectory(work))} | more
    return f"Run: {command_line('cluster', **flags, overwrite=True)}"


def _made_with(sidecar: dict[str, Any], work: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """Return the flags of the command that made an output of a work directory, as far as their defaults differ."""
    # The settings of `balance` have the hash of its clusters by that name.
    made = {**sidecar.get("settings", {}), "clusters": None, **sidecar.get("flags", {})}
    embeddings = sidecar.get("embeddings")
    found = {name: made[name] for name, default in flags.items() if made.get(name, default) != default}
    return found | {"embeddings": work / embeddings if isinstance(embeddings, str) else None, "work": work}


def _keep_list_of(sidecar: dict[str, Any], work: WorkDirectory) -> str | None:
    """Return the flag by which clusters are made of the same images again; None for the work directory's own list."""
    if "keep_list" not in sidecar:
        return None
    if sidecar["keep_list"] is None:
        return "none"  # there may be a list by now
    path = str(sidecar["keep_list"]["path"])
    return None if Path(path).resolve() == (work.balance / KEEP_LIST).resolve() else path
