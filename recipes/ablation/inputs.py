"""What the students are trained and measured on, made once by clipcid's own subcommands from the shipped data."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipcid_cli.algorithms.kmeans import temperature_for_perplexity

QUICKSTART = Path(__file__).resolve().parent.parent / "quickstart"
DATA, TEACHER = QUICKSTART / "data", QUICKSTART / "teacher"
KEEP = "0.563"
# Share of the held-out concepts that settings are chosen on; figures are reported on the rest.
TUNING_SHARE = 0.4
# Trained pairs for the retrieval column "seen": one drawing per concept, no skin tones.
SEEN_PAIRS = 400


def clipcid(*arguments: object) -> dict[str, Any]:
    """Run a subcommand at low priority in one thread and return the object it prints.

    Raises:
        RuntimeError: with its messages, when it fails.
    """
    command = ["nice", "-n", "10", "clipcid", *map(str, arguments), "--workers", "0", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stderr}")
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


class Inputs:
    """The shared inputs in one work directory; each is made when first asked for and kept."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.embeddings = work / "embeddings" / "teacher"

    def prepare(self) -> None:
        """Embed with the teacher, balance both ways, draw the random subset, and cut the evaluation sets."""
        clipcid("embed", DATA / "pairs", "--model", TEACHER, "--work", self.work)
        for linkage in ("single", "star"):
            clipcid(
                "balance", "--embeddings", self.embeddings, "--keep", KEEP, "--linkage", linkage,
                "--work", self.work / "balanced" / linkage,
            )  # fmt: skip
        self._draw_random()
        cut_evaluation_sets(self.work / "sets")

    def keep_list(self, name: str) -> str:
        """Return what ``--keep-list`` is given for `all`, `single`, `star` or `random`."""
        if name == "all":
            return "none"
        if name == "random":
            return str(self.work / "balanced" / "random.parquet")
        return str(self.work / "balanced" / name / "balance" / "keep.parquet")

    def clusters(self, name: str, keep: str) -> Path:
        """Make clusters ``FEATURES-K`` of the images that `keep` keeps, where they are not there yet."""
        features, number, *perplexity = name.split("-")
        plain = self.work / "clustered" / f"{features}-{number}-{keep}"
        clipcid(
            "cluster", "--embeddings", self.embeddings, "--keep-list", self.keep_list(keep), "--features", features,
            "--num-clusters", number, "--work", plain,
        )  # fmt: skip
        if not perplexity:
            return plain / "clusters"
        return self._retempered(plain / "clusters", float(perplexity[0].removeprefix("p")))

    def _retempered(self, clusters: Path, perplexity: float) -> Path:
        """Copy clusters with another temperature of the teacher's distribution in their sidecar."""
        folder = clusters.parent / f"clusters-p{perplexity:g}"
        if (folder / "cluster.json").exists():
            return folder
        folder.mkdir(exist_ok=True)
        for name in ("centroids.npy", "clusters.parquet"):
            (folder / name).write_bytes((clusters / name).read_bytes())
        table = pq.read_table(clusters / "clusters.parquet")
        sidecar = json.loads((clusters / "cluster.json").read_text(encoding="utf-8"))
        for tower, column in (("image", "top_similarities"), ("caption", "caption_top_similarities")):
            similarities = np.stack(table[column].to_numpy())
            sidecar["temperatures"][tower] = temperature_for_perplexity(similarities, perplexity)
        (folder / "cluster.json").write_text(json.dumps(sidecar), encoding="utf-8")
        return folder

    def _draw_random(self) -> None:
        """Write a keep list that keeps as many images as `single` does, drawn blindly."""
        balanced = pq.read_table(self.keep_list("single"), columns=["key", "kept"])
        kept = np.zeros(len(balanced), dtype=bool)
        count = int(balanced["kept"].to_numpy().sum())
        kept[np.random.default_rng(0).choice(len(kept), size=count, replace=False)] = True
        pq.write_table(pa.table({"key": balanced["key"], "kept": kept}), self.keep_list("random"))


def concept(key: str) -> str:
    """Return the emoji that a key (vendor and code points) is a drawing of."""
    return key.split("-", 1)[1]


def is_for_tuning(key: str) -> bool:
    """Tell on which side of the split a held-out concept is; both its drawings are on the same side."""
    digest = hashlib.sha256(concept(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < TUNING_SHARE


def cut_evaluation_sets(folder: Path) -> None:
    """Cut the shipped held-out sets by concept in two, and choose trained pairs; images are copied byte for byte."""
    if (folder / "done").exists():
        return
    for kind in ("classification", "retrieval"):
        members = read_tar(DATA / kind / "test" / "0.tar")
        for side, wanted in (("tune", True), ("report", False)):
            chosen = {name: data for name, data in members.items() if is_for_tuning(name.split(".")[0]) == wanted}
            write_set(folder / f"{side}-{kind}", DATA / kind, chosen)
    members = {}
    for shard in sorted((DATA / "pairs").glob("*.tar")):
        members |= read_tar(shard)
    plain = sorted(
        name.removesuffix(".json")
        for name, data in members.items()
        if name.endswith(".json") and name.startswith("google-") and json.loads(data)["skin_tone"] is None
    )
    plain.sort(key=lambda key: hashlib.sha256(key.encode()).digest())
    chosen = {f"{key}{suffix}": members[f"{key}{suffix}"] for key in plain[:SEEN_PAIRS] for suffix in (".webp", ".txt")}
    write_set(folder / "seen", DATA / "retrieval", chosen)
    (folder / "done").touch()


def read_tar(path: Path) -> dict[str, bytes]:
    """Read a shard's files by name."""
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}  # type: ignore[union-attr]


def write_set(folder: Path, like: Path, members: dict[str, bytes]) -> None:
    """Write a CLIP_benchmark folder of one shard, with the text files of the folder it was cut from."""
    (folder / "test").mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "test" / "0.tar", "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    (folder / "test" / "nshards.txt").write_text("1\n", encoding="utf-8")
    for path in like.glob("*.txt"):
        (folder / path.name).write_bytes(path.read_bytes())
