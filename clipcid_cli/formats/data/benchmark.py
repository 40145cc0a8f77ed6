"""Data sets of evaluations, as CLIP_benchmark lays them out: folders, class names, templates, and the usual suite by name.

    food101/
      train/  nshards.txt 0.tar 1.tar …
      test/   nshards.txt 0.tar 1.tar …
      classnames.txt  zeroshot_classification_templates.txt  dataset_type.txt

A folder that contains nothing but splits (train/, test/, val/, …) is read the same way, whether they contain shards or one
folder of images per class. Folders of the suite are called as CLIP_benchmark's copies on the Hugging Face hub
(``clip-benchmark/wds_…``), or by the plain name.

Source: LAION-AI/CLIP_benchmark 1.6.2 (datasets/builder.py, build_wds_dataset; names); Radford et al. 2021 (CLIP), appendix A
and table 9 (metrics).
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.addresses import is_remote, without_query
from clipcid_cli.formats.data.shard_files import NUM_SHARDS, is_benchmark
from clipcid_cli.formats.files import LARGEST_TEXT, read_regular, reading
from clipcid_cli.shown import REDACTED, redact

CLASS_NAMES = "classnames.txt"
_TEMPLATES = "zeroshot_classification_templates.txt"
_DATASET_TYPE = "dataset_type.txt"
# Names of the folders of splits; a folder that contains any other folder has no splits.
_SPLITS = frozenset({"train", "trainval", "test", "val", "valid", "validation"})
_NUMBERED_SHARDS = re.compile(r"[\d{}.,-]+\.tar")

# Placeholders of the class name: CLIP_benchmark writes {c}, open_clip {}.
_PLACEHOLDERS = ("{c}", "{}")
# Names accepted in place of a file: open_clip's lists (see `runtime.models.prompts`).
BUILTIN_TEMPLATES = ("openai", "simple")
BUILTIN_CLASS_NAMES = ("imagenet",)
DEFAULT_TEMPLATES = ("a photo of a {c}.",)

ACCURACY = "acc1"
PER_CLASS = "mean_per_class_recall"
ELEVEN_POINT = "mean_average_precision_11_point"
RECALL = "image_retrieval_recall@5"
F1 = "F1-macro_all"
WORST_REGION = "acc_worst_region"
WORST_GROUP = "acc_wg"
WORST_GROUP_TOP5 = "acc_top5_wg"
JACCARD = "jaccard_score_10-12"


class MissingSplitError(ClipcidError):
    """A folder has splits, but not the one that was asked for."""


@dataclasses.dataclass(frozen=True)
class BenchmarkFolder:
    """A data set with the text files that describe it."""

    name: str
    data: str  # the folder of the split, or the data as given
    # ``classification``, ``retrieval`` or ``multilabel``; None where the data set does not say.
    dataset_type: str | None = None
    class_names: Path | None = None
    templates: Path | None = None
    plain_splits: tuple[str, ...] = ()  # all of a folder that holds nothing but splits, without CLIP_benchmark's files


def find_benchmark_folder(data: str, split: str = "test") -> BenchmarkFolder:
    """Find the split and the text files of a CLIP_benchmark folder or of one split's; other data is used as given.

    A folder that has splits, but not this one, is a MissingSplitError.
    """
    folder = Path(data)
    if is_remote(data) or not folder.is_dir():
        return BenchmarkFolder(name_data(data), data)
    if is_benchmark(data):
        # The folder of a split; its text files are next to it, or in it where a data set has no splits.
        if (folder / _DATASET_TYPE).is_file() or (folder / CLASS_NAMES).is_file():
            return _describe(name_data(data), data, folder)
        whole = folder.resolve().parent
        return _describe(f"{name_data(str(whole))}/{folder.resolve().name}", data, whole)
    listed = sorted(path.parent.name for path in folder.glob(f"*/{NUM_SHARDS}"))
    splits = listed or _plain_splits(folder)
    if splits and split not in splits:
        raise MissingSplitError(
            f"{data} has no split {split!r}; it has {', '.join(splits)}.",
            f"Choose one with --split, e.g. --split {splits[0]}.",
        )
    described = _describe(name_data(data), str(folder / split) if splits else data, folder)
    return dataclasses.replace(described, plain_splits=() if listed else tuple(splits))


def _plain_splits(folder: Path) -> list[str]:
    inner = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return inner if _SPLITS.issuperset(inner) else []


def _describe(name: str, data: str, about: Path) -> BenchmarkFolder:
    kind, class_names, templates = (
        about / file if (about / file).is_file() else None for file in (_DATASET_TYPE, CLASS_NAMES, _TEMPLATES)
    )
    dataset_type = None if kind is None else _read_text(kind, "Fix the file.").strip().lower()
    return BenchmarkFolder(name, data, dataset_type, class_names, templates)


def name_data(data: str) -> str:
    """Name data by the end of its path, from the first part that tells: ``cars/test``, ``pairs/{00000..00099}.tar``."""
    data = redact(without_query(data)).replace(f"{REDACTED}@", "") if is_remote(data) else str(Path(data).resolve())
    parts = data.rstrip("/").split("/")
    first = len(parts) - 1
    while first > 0 and (parts[first] in _SPLITS or _NUMBERED_SHARDS.fullmatch(parts[first])):
        first -= 1
    return "/".join(parts[first:])


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read class names, one per line; the number of the line, from 0, is the label."""
    return _read_lines(path, "class name")


def read_templates(path: Path) -> tuple[str, ...]:
    """Read prompt templates, one per line, each with ``{c}`` or ``{}`` for the class name."""
    templates = _read_lines(path, "template")
    for line, template in enumerate(templates, start=1):
        if not any(placeholder in template for placeholder in _PLACEHOLDERS):
            raise ClipcidError(
                f"{path}, line {line}: {template!r} has no placeholder for the class name.",
                "Write {c} (as CLIP_benchmark does) or {} where it goes.",
            )
    return templates


def fill_template(template: str, class_name: str) -> str:
    """Insert a class name into a template. Other braces stay: a template is text, never a format string."""
    for placeholder in _PLACEHOLDERS:
        template = template.replace(placeholder, class_name)
    return template


def hash_lines(lines: Iterable[str]) -> str:
    """Return what ``b2sum -l 48 FILE`` prints of a file with these lines."""
    text = "".join(f"{line}\n" for line in lines)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _read_text(path: Path, fix: str) -> str:
    with reading(path, "UTF-8 text", fix):
        return read_regular(path, LARGEST_TEXT).decode("utf-8-sig")


def _read_lines(path: Path, what: str) -> tuple[str, ...]:
    text = _read_text(path, f"Give a text file with one {what} per line.")
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if not lines:
        raise ClipcidError(f"{path} contains no {what}.", f"Write one {what} per line.")
    if "" in lines:
        raise ClipcidError(
            f"{path}, line {lines.index('') + 1} is empty, with more lines after it.",
            f"Write one {what} per line; an empty line would shift the ones after it.",
        )
    return tuple(lines)


@dataclasses.dataclass(frozen=True)
class KnownDataset:
    """A data set of the usual suite."""

    name: str  # also in tables and metrics files
    folder: str | None  # of CLIP_benchmark's copy
    metric: str = ACCURACY
    class_names: str | None = None  # built-in ones, for a copy without its own; likewise the templates
    templates: str | None = None
    source: str | None = None  # where else to get it
    owner: str = "clip-benchmark"  # who publishes the copy on the Hugging Face hub


_imagenet = partial(KnownDataset, class_names="imagenet", templates="openai")
_datacomp = partial(KnownDataset, owner="djghosh")

KNOWN_DATASETS = {
    known.name: known
    for known in (
        _imagenet("imagenet", "wds_imagenet1k"),
        _imagenet("imagenetv2", "wds_imagenetv2"),
        _imagenet("imagenet-a", "wds_imagenet-a"),
        _imagenet("imagenet-o", "wds_imagenet-o"),
        _imagenet("imagenet-r", "wds_imagenet-r"),
        _imagenet("imagenet-sketch", "wds_imagenet_sketch"),
        KnownDataset("objectnet", "wds_objectnet", templates="openai"),
        KnownDataset("food101", "wds_food101"),
        KnownDataset("cifar10", "wds_vtab-cifar10"),
        KnownDataset("cifar100", "wds_vtab-cifar100"),
        KnownDataset(
            "birdsnap",
            None,
            source="Birdsnap is published as a list of addresses (thomasberg.org): download them into one folder per class",
        ),
        KnownDataset("sun397", "wds_sun397"),
        KnownDataset("cars", "wds_cars"),
        KnownDataset("aircraft", "wds_fgvc_aircraft", metric=PER_CLASS),
        KnownDataset("voc2007", "wds_voc2007_multilabel", metric=ELEVEN_POINT),
        KnownDataset("dtd", "wds_vtab-dtd"),
        KnownDataset("pets", "wds_vtab-pets", metric=PER_CLASS),
        KnownDataset("caltech101", "wds_vtab-caltech101", metric=PER_CLASS),
        KnownDataset("flowers", "wds_vtab-flowers", metric=PER_CLASS),
        KnownDataset("eurosat", "wds_vtab-eurosat"),
        KnownDataset("resisc45", "wds_vtab-resisc45"),
        KnownDataset("mnist", "wds_mnist"),
        KnownDataset("svhn", "wds_vtab-svhn"),
        KnownDataset("stl10", "wds_stl10"),
        KnownDataset("gtsrb", "wds_gtsrb"),
        KnownDataset("country211", "wds_country211"),
        KnownDataset("fer2013", "wds_fer2013"),
        KnownDataset("pcam", "wds_vtab-pcam"),
        KnownDataset("sst2", "wds_renderedsst2"),
        KnownDataset("clevr-counts", "wds_vtab-clevr_count_all"),
        KnownDataset("clevr-distance", "wds_vtab-clevr_closest_object_distance"),
        KnownDataset("kitti", "wds_vtab-kitti_closest_vehicle_distance"),
        _datacomp("iwildcam", "wds_wilds-iwildcam_test", F1),
        _datacomp("camelyon17", "wds_wilds-camelyon17_test", ACCURACY),
        _datacomp("fmow", "wds_wilds-fmow_test", WORST_REGION),
        _datacomp("dollar-street", "wds_dollar_street_test", WORST_GROUP_TOP5),
        _datacomp("geode", "wds_geode_test", WORST_GROUP),
        KnownDataset("flickr30k", "wds_flickr30k", metric=RECALL),
        KnownDataset("mscoco", "wds_mscoco_captions", metric=RECALL),
    )
}


def find_known_dataset(name: str, root: Path) -> tuple[KnownDataset, Path] | None:
    """Find the local copy of a data set of the usual suite; None for a name that is not in it.

    A name of the suite means its data set even where a folder has that name too; a path is written ``./name``.
    """
    known = KNOWN_DATASETS.get(name)
    if known is None:
        close = [] if os.path.exists(name) else difflib.get_close_matches(name, KNOWN_DATASETS, n=1, cutoff=0.75)
        if close:
            raise ClipcidError(
                f"There is neither a file or folder {name} nor a data set of that name.", f"Did you mean {close[0]}?"
            )
        return None
    places = [root / folder for folder in (known.folder, known.name) if folder is not None]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is not None:
        return known, folder
    if known.folder is None:
        expected = ""
        get = f"{known.source}, in {places[-1] / 'test'}."
    else:
        expected = f"{places[0]} (CLIP_benchmark's shards) or "
        get = f"hf download {known.owner}/{known.folder} --repo-type dataset --local-dir {places[0]}"
    raise ClipcidError(
        f"There is no local copy of {name}: expected in {expected}{places[-1]} (one folder of images per class).",
        f"Name the folder of your copies with --data-root, or get it: {get}"
        + (f"\nThe path of that name is ./{name}." if Path(name).exists() else ""),
    )


def customary_metric(name: str, possible: Sequence[str]) -> str:
    """Return the metric a data set is usually reported by, or the first possible one where that is not known.

    Its name is that in the suite or that of its folder, with or without ``/`` and a split.
    """
    folder = name.partition("/")[0]
    metrics = [known.metric for known in KNOWN_DATASETS.values() if folder in (known.name, known.folder)]
    return next((metric for metric in metrics if metric in possible), possible[0])


class ClassMatch(NamedTuple):
    """A class name for each folder of a class."""

    labels: tuple[int, ...]  # for each folder, the number of its class name
    # Whether folders have the names of the classes; their names 0, 1, … are line numbers of the list; or the lines of the
    # list are in the order of the folders' names.
    by: Literal["name", "number", "order"]


def match_class_names(names: Sequence[str], folders: Sequence[str]) -> ClassMatch:
    """Find the class name of each folder: `names` are in the order of their labels, `folders` sorted."""
    # Names come first: the class names themselves may be digits, in any order.
    by_name = {plain_name(name).casefold(): label for label, name in enumerate(names)}
    labels = [by_name.get(plain_name(folder).casefold()) for folder in folders]
    named = tuple(label for label in labels if label is not None)
    if len(by_name) == len(names) and len(set(named)) == len(folders):
        return ClassMatch(named, "name")
    numbers = read_folder_numbers(folders, len(names))
    if numbers is not None:
        return ClassMatch(numbers, "number")
    if len(names) != len(folders):
        raise ClipcidError(
            f"{len(names)} class names were given; the data has {len(folders)} class folders.",
            "Write one class name per folder, in the order of the folders' names.",
        )
    return ClassMatch(tuple(range(len(folders))), "order")


def read_folder_numbers(folders: Sequence[str], num_classes: int) -> tuple[int, ...] | None:
    """Read folder names 0, 1, … as labels (sorted as text, 10 would precede 2); None when they are not such numbers."""
    if not all(re.fullmatch(r"\d+", name) for name in folders):
        return None
    numbers = tuple(int(name) for name in folders)
    return numbers if len(set(numbers)) == len(numbers) and max(numbers) < num_classes else None


def plain_name(name: str) -> str:
    """Return a class's name for prompts: the name of its folder, with spaces for underscores."""
    return name.replace("_", " ").strip()
