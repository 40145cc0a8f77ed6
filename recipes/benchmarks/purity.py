"""Do the sets of repeats mean something? On drawings of which the emoji is known: `balance` beside SemDeDup and chance.

    clipcid embed recipes/quickstart/data/pairs --model recipes/quickstart/teacher --work W
    python recipes/benchmarks/purity.py W/embeddings/teacher

Two images of one base emoji are repeats: close ones when one vendor drew both (skin tones), far ones when two did. For each
share to keep and each method it prints

- sets: sets of two images or more,
- purity: of the images in those, the share that show their set's most frequent emoji (never less than 0.5 for a pair, so
  compare it only where sets are equally many),
- right: of the dropped images, the share whose kept image shows the same emoji,
- close, far: of all close and far pairs, the share whose two images are in one set,
- emoji left: of all emoji, the share that still have an image.

SemDeDup (Abbas et al. 2023, facebookresearch/SemDeDup): k-means; within a cluster, from the image least similar to the
centroid on, an image goes when it is more similar than a cut-off to an earlier one. Its set is that of the most similar
earlier one. The cut-off is the one that keeps the share asked for. Random removal keeps a random share; each dropped image
is counted to the set of its most similar kept one, which is more than a random remover knows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import faiss
import numpy as np
import pandas as pd

KEEP_RATIOS = (0.25, 0.5, 0.563, 0.8)
PAIRS = Path(__file__).resolve().parents[1] / "quickstart" / "data" / "pairs"
# Images a cluster of SemDeDup's k-means, on average.
CLUSTER_SIZE = 100


def main() -> None:
    """Print the table for a folder of embeddings of the shipped pairs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("embeddings", type=Path, help="folder that `clipcid embed` made of the shipped pairs")
    parser.add_argument("--pairs", type=Path, default=PAIRS, help="the shards that were embedded")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    keys, rows = read_embeddings(arguments.embeddings)
    attributes = read_attributes(arguments.pairs)
    emoji = np.array([attributes[key]["base"] for key in keys])
    vendor = np.array([attributes[key]["vendor"] for key in keys])
    print(f"{len(keys):,} images of {len(set(emoji)):,} emoji, width {rows.shape[1]}, {arguments.embeddings}")
    columns = {"kept": 7, "sets": 7, "purity": 8, "right": 8, "close": 8, "far": 8, "emoji left": 12}
    print(f"{'keep':>5}  {'method':<15}" + "".join(f"{name:>{wide}}" for name, wide in columns.items()))
    for ratio in KEEP_RATIOS:
        kept_by: dict[str, np.ndarray] = {}
        for linkage in ("single", "star"):
            kept_by[f"balance {linkage}"] = run_balance(arguments.embeddings, ratio, linkage, keys)
        num_kept = round(ratio * len(keys))
        kept_by["SemDeDup"] = semdedup(rows, num_kept, arguments.seed)
        kept_by["random"] = remove_randomly(rows, num_kept, arguments.seed)
        for name, stands_for in kept_by.items():
            check_partition(stands_for)
            values = measure(stands_for, emoji, vendor)
            print(f"{ratio:>5}  {name:<15}" + "".join(values))
    print("checked each time: one image of each set is kept, and every image is in one set")


def read_embeddings(folder: Path) -> tuple[list[str], np.ndarray]:
    """Read keys and image rows, float32 [N, D], in the order of the files."""
    images = sorted((folder / "img_emb").glob("*.npy"))
    tables = sorted((folder / "metadata").glob("*.parquet"))
    keys = pd.concat([pd.read_parquet(path, columns=["key"]) for path in tables])["key"].tolist()
    return keys, np.concatenate([np.load(path) for path in images]).astype(np.float32)


def read_attributes(pairs: Path) -> dict[str, dict[str, str]]:
    """Read the `.json` of each sample."""
    found = {}
    for shard in sorted(pairs.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, suffix = member.name.partition(".")
                if suffix == "json":
                    content = archive.extractfile(member)
                    assert content is not None, member.name
                    found[key] = json.load(content)
    return found


def run_balance(embeddings: Path, ratio: float, linkage: str, keys: list[str]) -> np.ndarray:
    """Run the command as a user would, and read its keep list."""
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(
            [
                "clipcid",
                "balance",
                "--embeddings",
                embeddings,
                "--keep",
                str(ratio),
                "--linkage",
                linkage,
                "--work",
                work,
                "--quiet",
                "--json",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        keep = pd.read_parquet(Path(work) / "balance" / "keep.parquet")
    if keep["key"].tolist() != keys:
        raise SystemExit("The keep list does not have every image once, in the order of the embeddings.")
    if not keep.groupby("component")["kept"].sum().eq(1).all():
        raise SystemExit("The keep list does not keep one image of each set.")
    row_of = {key: row for row, key in enumerate(keys)}
    stands_for = keep["representative"].map(row_of).to_numpy()
    if not (keep["component"].to_numpy()[stands_for] == keep["component"].to_numpy()).all():
        raise SystemExit("The keep list has images whose representative is of another set.")
    return stands_for


def semdedup_clusters(rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cluster as SemDeDup does; similarity to the centroid, float32 [N], and cluster of each row, int64 [N]."""
    kmeans = faiss.Kmeans(rows.shape[1], max(1, len(rows) // CLUSTER_SIZE), niter=20, spherical=True, seed=seed)
    kmeans.train(rows)
    similarity, cluster = kmeans.index.search(rows, 1)
    return similarity[:, 0], cluster[:, 0]


def prune(rows: np.ndarray, similarity_to_centroid: np.ndarray, cluster: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find each row's most similar earlier row of its cluster, itself where there is none, and how similar it is."""
    nearest = np.arange(len(rows))
    similarity = np.full(len(rows), -np.inf)
    order = np.lexsort((similarity_to_centroid, cluster))
    for members in np.split(order, np.flatnonzero(np.diff(cluster[order])) + 1):
        if len(members) < 2:
            continue
        earlier = np.triu(rows[members] @ rows[members].T + 2.0, 1) - 2.0
        nearest[members[1:]] = members[np.argmax(earlier, axis=0)[1:]]
        similarity[members[1:]] = earlier.max(axis=0)[1:]
    return nearest, similarity


def semdedup(rows: np.ndarray, num_kept: int, seed: int) -> np.ndarray:
    """Remove by SemDeDup's rule until `num_kept` rows are left."""
    nearest, similarity = prune(rows, *semdedup_clusters(rows, seed))
    dropped = np.argsort(-similarity, kind="stable")[: len(rows) - num_kept]
    stands_for = np.arange(len(rows))
    stands_for[dropped] = nearest[dropped]
    while not np.array_equal(stands_for, stands_for[stands_for]):
        stands_for = stands_for[stands_for]
    return stands_for


def remove_randomly(rows: np.ndarray, num_kept: int, seed: int) -> np.ndarray:
    """Keep random rows, and count each other one to its most similar kept row."""
    kept = np.sort(np.random.default_rng(seed).choice(len(rows), num_kept, replace=False))
    stands_for = kept[np.argmax(rows @ rows[kept].T, axis=1)]
    stands_for[kept] = kept
    return stands_for


def check_partition(stands_for: np.ndarray) -> None:
    """Every row is in the set of exactly one kept row, and kept rows are in their own."""
    if not np.array_equal(stands_for[stands_for], stands_for):
        raise SystemExit("Some rows stand for others that are not kept.")


def measure(stands_for: np.ndarray, emoji: np.ndarray, vendor: np.ndarray) -> list[str]:
    """Return the columns of one line of the table."""
    members = defaultdict(list)
    for row, keeper in enumerate(stands_for.tolist()):
        members[keeper].append(row)
    sets = [rows for rows in members.values() if len(rows) > 1]
    most = sum(Counter(emoji[rows].tolist()).most_common(1)[0][1] for rows in sets)
    together, total = Counter[str](), Counter[str]()
    by_emoji = defaultdict(list)
    for row, name in enumerate(emoji.tolist()):
        by_emoji[name].append(row)
    for rows in by_emoji.values():
        first, second = (np.array(rows)[index] for index in np.triu_indices(len(rows), 1))
        for name, chosen in (("close", vendor[first] == vendor[second]), ("far", vendor[first] != vendor[second])):
            total[name] += int(chosen.sum())
            together[name] += int((stands_for[first] == stands_for[second])[chosen].sum())
    emoji_left = len(set(emoji[list(members)].tolist())) / len(by_emoji)
    purity = most / sum(map(len, sets)) if sets else 1.0
    dropped = stands_for != np.arange(len(stands_for))
    right = float((emoji[stands_for] == emoji)[dropped].mean()) if dropped.any() else 1.0
    shares = [purity, right, *(together[name] / max(1, total[name]) for name in ("close", "far"))]
    return [f"{len(members):>7,}", f"{len(sets):>7,}", *(f"{share:>8.3f}" for share in shares), f"{emoji_left:>12.3f}"]


if __name__ == "__main__":
    sys.exit(main())
