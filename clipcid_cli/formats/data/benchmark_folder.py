"""CLIP_benchmark's webdataset folders: shards by split, and text files that describe the task.

    food101/
      train/  nshards.txt 0.tar 1.tar …
      test/   nshards.txt 0.tar 1.tar …
      classnames.txt  zeroshot_classification_templates.txt  dataset_type.txt

A folder that contains nothing but splits (train/, test/, val/, …) is read the same way, whether they contain shards or one
folder of images per class.

Source: LAION-AI/CLIP_benchmark 1.6.2, datasets/builder.py, build_wds_dataset.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.remote import is_remote

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
DATASET_TYPE = "dataset_type.txt"
NUM_SHARDS = "nshards.txt"
# Names of the folders of splits; a folder that contains any other folder has no splits.
SPLITS = frozenset({"train", "trainval", "test", "val", "valid", "validation"})


class MissingSplitError(ClipcidError):
    """A folder has splits, but not the one that was asked for."""


@dataclasses.dataclass(frozen=True)
class BenchmarkFolder:
    """A data set with the text files that describe it.

    Attributes:
        data: The folder of the split, or the data as given.
        dataset_type: ``classification``, ``retrieval`` or ``multilabel``; None where the data set does not say.
    """

    name: str
    data: str
    dataset_type: str | None = None
    class_names: Path | None = None
    templates: Path | None = None


def find_benchmark_folder(data: str, split: str = "test") -> BenchmarkFolder:
    """Find the split and the text files of a data set.

    Args:
        data: A CLIP_benchmark folder, the folder of one of its splits, or any other data, which is used as given.

    Raises:
        MissingSplitError: when the folder has splits, but not this one.
    """
    folder = Path(data)
    if is_remote(data) or not folder.is_dir():
        return BenchmarkFolder(_last_parts(data, 1), data)
    if is_benchmark(data):
        # The folder of a split; its text files are next to it, or in it where a data set has no splits.
        if (folder / DATASET_TYPE).is_file() or (folder / CLASS_NAMES).is_file():
            return _describe(_last_parts(data, 1), data, folder)
        return _describe(_last_parts(data, 2), data, folder.resolve().parent)
    splits = sorted(path.parent.name for path in folder.glob(f"*/{NUM_SHARDS}")) or _plain_splits(folder)
    if splits and split not in splits:
        raise MissingSplitError(
            f"{data} has no split {split!r}; it has {', '.join(splits)}.",
            f"Choose one with --split, e.g. --split {splits[0]}.",
        )
    return _describe(_last_parts(data, 1), str(folder / split) if splits else data, folder)


def is_benchmark(spec: str) -> bool:
    """Tell whether this is the folder of a split, with shards."""
    return not is_remote(spec) and Path(spec, NUM_SHARDS).is_file()


def list_benchmark_tars(folder: Path) -> list[str]:
    """List the shards of a split, all of which must be there."""
    text = (folder / NUM_SHARDS).read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdigit() or int(text) == 0:
        raise ClipcidError(f"{folder / NUM_SHARDS} contains {text[:40]!r}, not a number of shards.", "Fix the file.")
    tars = [folder / f"{number}.tar" for number in range(int(text))]
    missing = [tar.name for tar in tars if not tar.is_file()]
    if missing:
        raise ClipcidError(
            f"{folder} should contain {len(tars)} shards ({NUM_SHARDS}); {len(missing)} are missing, first {missing[0]}.",
            f"Copy them there, or fix {NUM_SHARDS}.",
        )
    return [str(tar) for tar in tars]


def _plain_splits(folder: Path) -> list[str]:
    inner = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return inner if SPLITS.issuperset(inner) else []


def _describe(name: str, data: str, about: Path) -> BenchmarkFolder:
    kind, class_names, templates = (
        about / file if (about / file).is_file() else None for file in (DATASET_TYPE, CLASS_NAMES, TEMPLATES)
    )
    dataset_type = None if kind is None else kind.read_text(encoding="utf-8").strip().lower()
    return BenchmarkFolder(name, data, dataset_type, class_names, templates)


def _last_parts(data: str, number: int) -> str:
    if not is_remote(data):
        data = str(Path(data).resolve())
    return "/".join(data.rstrip("/").split("/")[-number:])
