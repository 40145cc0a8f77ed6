"""What the students are trained and measured on, made once by clipcid's own subcommands from the shipped data."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import plan
import pyarrow as pa
import pyarrow.parquet as pq

from clipcid_cli.algorithms.kmeans.kmeans import temperature_for_perplexity
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.results.clusters import read_cluster_sidecar, top_paths
from clipcid_cli.formats.sidecar import sidecar_path, write_sidecar

QUICKSTART = Path(__file__).resolve().parent.parent / "quickstart"
DATA, TEACHER = QUICKSTART / "data", QUICKSTART / "teacher"
KEEP = "0.563"
# Share of the concepts that settings are chosen on; figures are reported on the rest.
TUNING_SHARE = 0.4
# Share of the trained concepts of which students see one vendor's drawings only.
WITHHELD_SHARE = 0.5
VENDORS = ("google", "twitter")


def clipcid(*arguments: object) -> dict[str, Any]:
    """Run a subcommand at low priority in one thread and return the object it prints.

    Raises:
        RuntimeError: with its messages, when it fails.
    """
    workers = [] if arguments[0] == "cluster" else ["--workers", "0"]
    command = ["nice", "-n", "10", "clipcid", *map(str, arguments), *workers, "--json"]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stderr}")
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


class Inputs:
    """The shared inputs in one work directory; each is made when first asked for and kept.

    Attributes:
        pairs: What students are trained on.
        teacher: The teacher.
        sets: Names of the evaluation sets below ``sets``: side, what and task, joined by ``-``.
        probe_train, probe_test: Labelled images that linear probes are fitted on and measured on.
        probe_name: The probe's name among the metrics.
    """

    sets: tuple[str, ...] = tuple(
        f"{side}-{what}-{task}"
        for side in ("tune", "report")
        for what in ("concepts", "drawings")
        for task in ("retrieval", "classes")
    )
    probe_name = "report concepts probe"

    def __init__(self, work: Path) -> None:
        self.work = work
        self.pairs = work / "pairs"
        self.teacher = TEACHER
        self.probe_train = DATA / "classification" / "train"
        self.probe_test = work / "sets" / "report-concepts-classes" / "test"
        self.embeddings = work / "embeddings" / "teacher"
        self._clustered = set[Path]()
        self._embedded = set[Path]()

    def prepare(self) -> None:
        """Cut the data, embed what is trained on with the teacher, balance it both ways, and draw the random subset."""
        cut_sets(self.work)
        clipcid("embed", self.pairs, "--model", self.teacher, "--work", self.work)
        for linkage in ("single", "star"):
            clipcid(
                "balance", "--embeddings", self.embeddings, "--keep", KEEP, "--linkage", linkage,
                "--work", self.work / "balanced" / linkage,
            )  # fmt: skip
        self._draw_random()

    def probed(self, log: plan.Log) -> list[plan.Setting]:
        """Return the settings whose students get a linear probe."""
        return [plan.tuned(name, log) for name in plan.MAIN]

    def pairs_of(self, setting: plan.Setting) -> Path:
        """Return what a setting is trained on: the pairs, or those with some captions exchanged."""
        if not setting.noise:
            return self.pairs
        folder = self.work / f"exchanged-{round(100 * setting.noise)}"
        if not folder.exists():
            exchange_captions(self.pairs, folder, setting.noise)
        return folder

    def embeddings_of(self, setting: plan.Setting) -> Path:
        """Return the teacher's embeddings of what a setting reads; made where they are not there yet."""
        if not setting.extras and not setting.noise:
            return self.embeddings
        stored = sorted(setting.extras)
        pairs = self.pairs_of(setting)
        name = "+".join([pairs.stem, *stored, str(setting.stored)])
        flags: list[object] = []
        if "mix" in stored:
            flags += ["--views", setting.stored, "--view-kind", "mix"]
        if "texts" in stored:
            flags += ["--text-variants", setting.stored]
        work = self.work / "embedded" / name
        folder = work / "embeddings" / "teacher"
        if folder not in self._embedded:
            clipcid("embed", pairs, "--model", self.teacher, *flags, "--work", work)
            self._embedded.add(folder)
        return folder

    def keep_list(self, name: str) -> str:
        """Return what ``--keep-list`` is given for `all`, `single`, `star` or `random`."""
        if name == "all":
            return "none"
        if name == "random":
            return str(self.work / "balanced" / "random.parquet")
        return str(self.work / "balanced" / name / "balance" / "keep.parquet")

    def clusters(self, setting: plan.Setting) -> Path:
        """Make a setting's clusters, of the images that it keeps, where they are not there yet.

        K may be ``all``: then every image is a centroid, and the cluster loss compares with all stored rows of the teacher.
        """
        if setting.clusters is None:
            raise ValueError(f"{setting.name} has no clusters")
        embeddings = self.embeddings_of(dataclasses.replace(setting, extras=()))
        features, number, *change = setting.clusters.split("-")
        if number == "all":
            tables = (embeddings / "metadata").glob("*.parquet")
            number = str(sum(pq.read_metadata(table).num_rows for table in tables))
        pairs = self.pairs_of(setting).stem
        plain = self.work / "clustered" / f"{features}-{number}-{setting.keep}-{pairs}-{setting.repair}"
        if plain not in self._clustered:
            clipcid(
                "cluster", "--embeddings", embeddings, "--keep-list", self.keep_list(setting.keep),
                "--features", features, "--num-clusters", number, "--repair", setting.repair, "--work", plain,
            )  # fmt: skip
            self._clustered.add(plain)
        return changed_clusters(plain / "clusters", change[0]) if change else plain / "clusters"

    def _draw_random(self) -> None:
        """Write a keep list that keeps as many images as `single` does, drawn blindly."""
        balanced = pq.read_table(self.keep_list("single"), columns=["key", "kept"])
        kept = np.zeros(len(balanced), dtype=bool)
        count = int(balanced["kept"].to_numpy().sum())
        kept[np.random.default_rng(0).choice(len(kept), size=count, replace=False)] = True
        pq.write_table(pa.table({"key": balanced["key"], "kept": kept}), self.keep_list("random"))


def changed_clusters(clusters: Path, change: str) -> Path:
    """Copy clusters with one thing changed.

    Args:
        change: ``p8`` for the temperatures at which the teacher's distribution has that median perplexity; ``m4`` for only
            so many of the nearest centroids, at the temperatures as they were.
    """
    folder = clusters.parent / f"clusters-{change}"
    if (folder / "cluster.json").exists():
        return folder
    folder.mkdir(exist_ok=True)
    sidecar = read_cluster_sidecar(clusters)
    for written in sidecar.outputs:
        (folder / written.path).write_bytes((clusters / written.path).read_bytes())
    temperatures = sidecar.temperatures
    for tower in temperatures:
        numbers, similarities = (np.load(path) for path in top_paths(clusters, tower))
        if change.startswith("p"):
            temperatures[tower] = temperature_for_perplexity(similarities, float(change[1:]))
        else:
            for path, array in zip(top_paths(folder, tower), (numbers, similarities), strict=True):
                np.save(path, array[:, : int(change[1:])])
    outputs = [record(folder / written.path, folder) for written in sidecar.outputs]
    write_sidecar(sidecar_path(folder, "cluster"), msgspec.structs.replace(sidecar, outputs=outputs))
    return folder


def drawn(what: str, name: str) -> float:
    """Return a number in [0, 1) that depends on `name` alone, another for each `what`."""
    digest = hashlib.sha256(f"{what}{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def is_for_tuning(key: str) -> bool:
    """Tell on which side of the split a concept is; both its drawings are on the same side."""
    return drawn("", plan.concept(key)) < TUNING_SHARE


def withheld(samples: Mapping[str, Sample]) -> set[str]:
    """Choose the pairs that students are not trained on: of every other concept one vendor's drawing, in all its skin tones.

    Whatever else has the same picture, byte for byte, is withheld with them.
    """

    def is_chosen(vendor: str, base: str) -> bool:
        return drawn("withheld", base) < WITHHELD_SHARE and vendor == VENDORS[int(drawn("vendor", base) < 0.5)]

    chosen = {key for key, sample in samples.items() if is_chosen(sample.about["vendor"], sample.about["base"])}
    pictures = {samples[key].members[".webp"] for key in chosen}
    return {key for key, sample in samples.items() if sample.members[".webp"] in pictures}


@dataclasses.dataclass(frozen=True)
class Sample:
    """A shard's sample: its files by suffix."""

    members: Mapping[str, bytes]

    @property
    def about(self) -> dict[str, Any]:
        """The fields of its .json."""
        fields: dict[str, Any] = json.loads(self.members[".json"])
        return fields


def cut_sets(work: Path) -> None:
    """Cut the shipped pairs and held-out sets into what is trained on, tuned on and reported; bytes stay as they are."""
    if (work / "sets" / "done").exists():
        return
    shards = {path.name: read_samples(path) for path in sorted((DATA / "pairs").glob("*.tar"))}
    pairs = {key: sample for shard in shards.values() for key, sample in shard.items()}
    away = withheld(pairs)
    (work / "pairs").mkdir(parents=True, exist_ok=True)
    for name, shard in shards.items():
        write_shard(work / "pairs" / name, {key: sample for key, sample in shard.items() if key not in away})
    labels = read_samples(DATA / "classification" / "train" / "0.tar")
    classes = {plan.concept(key): sample.members[".cls"] for key, sample in labels.items()}
    plain = {key: pairs[key].members for key in sorted(away) if pairs[key].about["skin_tone"] is None}
    found = {
        "concepts-retrieval": read_samples(DATA / "retrieval" / "test" / "0.tar"),
        "concepts-classes": read_samples(DATA / "classification" / "test" / "0.tar"),
        "drawings-retrieval": {
            key: Sample({suffix: members[suffix] for suffix in (".webp", ".txt")}) for key, members in plain.items()
        },
        "drawings-classes": {
            key: Sample({".webp": members[".webp"], ".cls": classes[plan.concept(key)]})
            for key, members in plain.items()
            if plan.concept(key) in classes
        },
    }
    for name, samples in found.items():
        like = DATA / ("retrieval" if name.endswith("retrieval") else "classification")
        for side, wanted in (("tune", True), ("report", False)):
            chosen = {key: sample for key, sample in samples.items() if is_for_tuning(key) == wanted}
            write_set(work / "sets" / f"{side}-{name}", like, chosen)
    (work / "sets" / "done").touch()


def exchange_captions(pairs: Path, out: Path, share: float) -> None:
    """Write the shards of `pairs` with the captions of a share of all samples exchanged with one another."""
    shards = {path.name: read_samples(path) for path in sorted(pairs.glob("*.tar"))}
    captions = {key: sample.members[".txt"] for shard in shards.values() for key, sample in shard.items()}
    draw = np.random.default_rng(0)
    keys = np.array(list(captions))
    chosen = draw.choice(keys, size=round(share * len(keys)), replace=False)
    others = draw.permutation(chosen)
    exchanged = captions | {key: captions[other] for key, other in zip(chosen, others, strict=True)}
    out.mkdir(parents=True)
    for name, shard in shards.items():
        samples = {key: Sample({**sample.members, ".txt": exchanged[key]}) for key, sample in shard.items()}
        write_shard(out / name, samples)


def read_samples(path: Path) -> dict[str, Sample]:
    """Read a shard's samples by key, in its order."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile():
                key, suffix = member.name.split(".", 1)
                found.setdefault(key, {})[f".{suffix}"] = archive.extractfile(member).read()  # type: ignore[union-attr]
    return {key: Sample(members) for key, members in found.items()}


def write_shard(path: Path, samples: Mapping[str, Sample]) -> None:
    """Write a shard."""
    with tarfile.open(path, "w") as archive:
        for key, sample in samples.items():
            for suffix, data in sample.members.items():
                entry = tarfile.TarInfo(f"{key}{suffix}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))


def write_set(folder: Path, like: Path, samples: Mapping[str, Sample]) -> None:
    """Write a CLIP_benchmark folder of one shard, with the text files of the folder it was cut from."""
    (folder / "test").mkdir(parents=True, exist_ok=True)
    write_shard(folder / "test" / "0.tar", samples)
    (folder / "test" / "nshards.txt").write_text("1\n", encoding="utf-8")
    for path in like.glob("*.txt"):
        (folder / path.name).write_bytes(path.read_bytes())
