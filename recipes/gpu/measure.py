"""Measure one part of the package on this machine, beside what it competes with; a line of JSON a figure.

    python recipes/gpu/measure.py balance --scratch DIR --figures FILE            on the first GPU
    python recipes/gpu/measure.py balance --scratch DIR --figures FILE --cpu      in small, to see that it runs

Parts: product, balance, cluster, embed, distill, distill-large, distill-b16, distill-compile, distill-all, loss, evaluate.
Those of `distill` and `evaluate` use the images, models and embeddings of `embed`, and make those that are missing. Each
figure has its own unit; `ratio` is the figure beside the peer's, or its share of the rate of plain matrix products,
measured by `product` in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from balance import make_rows, write_rows

PARTS = ("product", "balance", "cluster", "embed", "distill", "loss", "evaluate")
# Further forms of `distill`: larger batches, a student of four times as many patches, compiled towers, all GPUs.
TRAININGS = ("distill-large", "distill-b16", "distill-compile", "distill-all")
WORDS = ("a", "photo", "of", "the", "red", "small", "old", "wooden", "boat", "river", "dogs", "trees", "night")
CLASSES = 40
# Images that are drawn; shards hold them again and again, under other keys.
DRAWN = 256


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured, by device.

    Attributes:
        product: Side of the square matrices.
        search_rows: Rows of `balance`, 512 wide.
        cluster_rows: Rows of `cluster`, and its number of clusters.
        images: Images that are embedded, of `side` pixels.
        models: Models that are embedded with; the last one teaches.
        student: Trained for `steps` steps of `batch` samples, of `large_batch` in `distill-large`.
        larger: A student of smaller patches, trained with `larger_batch` samples.
        centroids: Number of centroids of the loss alone.
    """

    product: int
    search_rows: int
    cluster_rows: tuple[int, int]
    images: int
    side: int
    models: tuple[str, ...]
    student: str
    steps: int
    batch: int
    large_batch: int
    larger: str
    larger_batch: int
    centroids: int


GPU = Sizes(
    product=16_384,
    search_rows=600_000,
    cluster_rows=(500_000, 8_192),
    images=16_384,
    side=256,
    models=("ViT-B-32", "ViT-L-14"),
    student="ViT-B-32",
    steps=60,
    batch=1_024,
    large_batch=2_048,
    larger="ViT-B-16",
    larger_batch=512,
    centroids=1_000_000,
)
CPU = Sizes(
    product=512,
    search_rows=8_192,
    cluster_rows=(20_000, 256),
    images=256,
    side=64,
    models=("ViT-S-32-alt",),
    student="ViT-S-32-alt",
    steps=6,
    batch=64,
    large_batch=128,
    larger="ViT-S-16-alt",
    larger_batch=16,
    centroids=20_000,
)


class Bench:
    """A device, its sizes, and the folder that everything is in."""

    def __init__(self, scratch: Path, figures: Path, cpu: bool) -> None:
        self.scratch, self.figures = scratch, figures
        self.sizes = CPU if cpu else GPU
        self.device = torch.device("cpu" if cpu else "cuda")
        self.precision = torch.float32 if cpu else torch.float16

    def report(
        self, part: str, what: str, value: float, unit: str, beside: str = "", ratio: float | None = None
    ) -> None:
        """Add a figure to the file, at once: what ends this program later leaves it there. A later one may take its place.

        Args:
            beside: What it is compared with, and that one's figure.
        """
        figure = {"part": part, "what": what, "value": value, "unit": unit, "beside": beside, "ratio": ratio}
        with self.figures.open("a") as file:
            file.write(json.dumps(figure) + "\n")

    def clipcid(self, *words: object, processes: int = 1) -> dict[str, Any]:
        """Run a command in the scratch folder, in several processes by torchrun; return its JSON."""
        several = ["torchrun", "--standalone", "--nproc-per-node", str(processes), "-m", "clipcid_cli"]
        command = ["clipcid"] if processes == 1 else several
        command += [*map(str, words), "--device", self.device.type, "--work", "work", "--json", "--quiet"]
        done = subprocess.run(command, cwd=self.scratch, stdout=subprocess.PIPE, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stdout.decode()}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def time(self, action: Callable[[], object], repeats: int) -> float:
        """Return the seconds one call takes, without the first two."""
        for _ in range(2):
            action()
        self.wait()
        started = time.perf_counter()
        for _ in range(repeats):
            action()
        self.wait()
        return (time.perf_counter() - started) / repeats

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def report_rate(self, part: str, what: str, value: float, rates: dict[str, float]) -> None:
        """Report operations a second, beside the quickest of some rates of plain products; alone where there is none."""
        if not rates:
            self.report(part, what, value / 1e12, "TFLOP/s")
            return
        name = max(rates, key=lambda each: rates[each])
        beside = f"{name} product, {rates[name] / 1e12:.3g} TFLOP/s"
        self.report(part, what, value / 1e12, "TFLOP/s", beside, value / rates[name])

    def rates(self, *names: str) -> dict[str, float]:
        """Return the operations a second of plain products in number formats, those that `product` has measured."""
        path = self.scratch / "rates.json"
        rates: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        return {name: rates[name] for name in names if name in rates}


def product(bench: Bench) -> None:
    """Plain matrix products: what the other parts are a share of."""
    size, rates = bench.sizes.product, {}
    for name in ("float32", "bfloat16", "float16"):
        a, b = (torch.randn(size, size, device=bench.device).to(getattr(torch, name)) for _ in range(2))
        seconds = bench.time(lambda a=a, b=b: a @ b, 10)
        rates[name] = 2 * size**3 / seconds
        bench.report("product", f"{name}, {size:,} x {size:,}", rates[name] / 1e12, "TFLOP/s")
        # Each at once: a format that this machine multiplies slowly may reach the limit of the part.
        (bench.scratch / "rates.json").write_text(json.dumps(rates))


def balance(bench: Bench) -> None:
    """The exact search among all pairs."""
    num_rows = bench.sizes.search_rows
    rows = make_rows(num_rows, None, 0)
    write_rows(bench.scratch / "rows", rows)
    answer = bench.clipcid("balance", "--embeddings", "rows", "--threshold", 0.4)
    seconds, name = answer["seconds"]["search"], str(bench.precision).removeprefix("torch.")
    rate = num_rows**2 * rows.shape[1] / seconds
    bench.report_rate("balance", f"search of {num_rows:,} rows", rate, bench.rates(name))


def cluster(bench: Bench) -> None:
    """k-means beside faiss, where that is installed, on its GPU where this build has one."""
    num_rows, num_clusters = bench.sizes.cluster_rows
    rows = make_rows(num_rows, None, 1)
    write_rows(bench.scratch / "cluster-rows", rows)
    options = ("--num-clusters", num_clusters, "--iterations", 10, "--keep-list", "none", "--overwrite")
    answer = bench.clipcid("cluster", "--embeddings", "cluster-rows", *options)
    own = answer["seconds"]["kmeans"]
    what = f"{num_rows:,} rows, {num_clusters:,} clusters, at most 10 iterations"
    bench.report("cluster", what, own, "s")
    if importlib.util.find_spec("faiss") is None:
        return
    import faiss

    on_gpu = bench.device.type == "cuda" and faiss.get_num_gpus() > 0
    peer = faiss.Kmeans(
        rows.shape[1], num_clusters, niter=10, spherical=True, gpu=on_gpu, max_points_per_centroid=num_rows
    )
    wide = rows.astype(np.float32)
    started = time.perf_counter()
    peer.train(wide)
    seconds = time.perf_counter() - started
    where = "GPU" if on_gpu else "CPU"
    bench.report("cluster", what, own, "s", f"faiss on its {where}, {seconds:.2f} s", seconds / own)


def embed(bench: Bench) -> None:
    """Images and captions, beside a plain loop of open_clip with as many workers."""
    from peer import embed_with_open_clip, write_random_model

    write_shards(bench)
    for name in bench.sizes.models:
        flops = write_random_model(name, bench.scratch / name)
        own = bench.clipcid("embed", "shards", "--model", name, "--overwrite")["images_per_second"]
        what = f"{name}, {bench.sizes.images:,} pairs"
        bench.report("embed", what, own, "pairs/s")
        bench.report_rate("embed", f"{name}: operations", own * flops, bench.rates("bfloat16", "float32"))
        theirs = embed_with_open_clip(bench.scratch / name, bench.scratch / "shards", bench.device)
        bench.report("embed", what, own, "pairs/s", f"open_clip, {theirs:,.0f}", own / theirs)


def write_shards(bench: Bench) -> None:
    """Write shards of random JPEGs with captions, and labelled ones for the evaluations, unless an earlier part has."""
    random, written = np.random.default_rng(0), bench.scratch / "written"
    if written.exists():
        return
    pictures = []
    for _ in range(DRAWN):
        small = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small).resize((bench.sizes.side, bench.sizes.side), Image.Resampling.BICUBIC).save(
            buffer, "JPEG"
        )
        pictures.append(buffer.getvalue())
    places = {"shards": range(bench.sizes.images)}
    places |= {f"labeled/{split}": range(bench.sizes.images // 4) for split in ("train", "test")}
    for name, numbers in places.items():
        folder = bench.scratch / name
        folder.mkdir(parents=True, exist_ok=True)
        for shard in range(8):
            with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
                for number in numbers[shard::8]:
                    caption = " ".join(random.choice(WORDS, 8))
                    extra = (".txt", caption) if name == "shards" else (".cls", str(number % CLASSES))
                    for suffix, content in ((".jpg", pictures[number % DRAWN]), (extra[0], extra[1].encode())):
                        member = tarfile.TarInfo(f"{number:08d}{suffix}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
    written.touch()


def distill(bench: Bench) -> None:
    """Training from the last model's embeddings, preset cid."""
    sizes = bench.sizes
    line = train(bench, "distill", sizes.student, sizes.batch)
    (bench.scratch / "step.json").write_text(json.dumps(line["seconds"]))
    bench.report("distill", "share of the time spent waiting for data", line["data_wait_share"], "")
    if "mfu" in line:
        bench.report("distill", "share of the data sheet's products, MFU", line["mfu"], "")


def distill_large(bench: Bench) -> None:
    """The same with larger batches."""
    train(bench, "distill-large", bench.sizes.student, bench.sizes.large_batch)


def distill_b16(bench: Bench) -> None:
    """The same with a student of smaller patches."""
    train(bench, "distill-b16", bench.sizes.larger, bench.sizes.larger_batch)


def distill_compile(bench: Bench) -> None:
    """The same with compiled towers."""
    train(bench, "distill-compile", bench.sizes.student, bench.sizes.batch, "--torchcompile")


def distill_all(bench: Bench) -> None:
    """The same on all GPUs of this host, as many samples on each; on a CPU in two processes."""
    processes = torch.cuda.device_count() if bench.device.type == "cuda" else 2
    if processes == 1:
        print("This host has one GPU.")
        return
    train(bench, "distill-all", bench.sizes.student, processes * bench.sizes.batch, processes=processes)


def train(bench: Bench, part: str, student: str, batch: int, *flags: str, processes: int = 1) -> dict[str, float]:
    """Train for some steps and report the speed, beside the one that is computed from this device's measured rates.

    Returns:
        The last line of the log, with the `seconds` of a step.
    """
    from peer import count_flops, write_random_model

    sizes, teacher = bench.sizes, bench.sizes.models[-1]
    write_shards(bench)
    write_random_model(teacher, bench.scratch / teacher)
    bench.clipcid("embed", "shards", "--model", teacher)  # at once where an earlier part has
    options = ("--embeddings", f"work/embeddings/{teacher}", "--keep-list", "none")
    bench.clipcid("cluster", *options, "--num-clusters", sizes.images // 16, "--iterations", 5, "--overwrite")
    schedule = ("--preset", "cid", "--steps", sizes.steps, "--batch-size", batch, "--eval-every", sizes.steps)
    run = ("distill", "--student", student, *options, *schedule, *flags, "--name", part)
    plan = bench.clipcid(*run, "--dry-run", "--gpus", f"{processes}xthis")
    bench.clipcid(*run, "--overwrite", processes=processes)
    lines = (bench.scratch / "work" / "distill" / part / "train.jsonl").read_text().splitlines()
    first, last = json.loads(lines[sizes.steps // 3]), json.loads(lines[-1])
    # Both are means since the start: the first third warms up.
    seconds = last["step"] / last["samples_per_second"] - first["step"] / first["samples_per_second"]
    speed = (last["step"] - first["step"]) / seconds
    what = f"{student} from {teacher}, steps of {batch:,}{''.join(f', {flag}' for flag in flags)}"
    what += f", {processes} processes" * (processes > 1)
    computed = plan["images_per_second"]
    bench.report(part, what, speed, "samples/s", f"computed, {computed:,.0f}", speed / computed)
    rate = 3 * count_flops(student) * speed / processes
    bench.report_rate(part, f"{student}: operations of a process", rate, bench.rates("bfloat16", "float32"))
    seconds_of_step: dict[str, float] = {"seconds": batch / speed}
    return last | seconds_of_step


def loss(bench: Bench) -> None:
    """The cluster loss alone: what `distill` prepares during the step before, then forward and backward."""
    from clipcid_cli.algorithms.losses.batch import ClusterTargets, LossBatch
    from clipcid_cli.algorithms.losses.cluster import ProjectedCentroids, draw_candidates, mean_centroids, soft_labels
    from clipcid_cli.algorithms.losses.cluster import cluster as cluster_loss

    width, batch, total = 512, bench.sizes.batch, bench.sizes.centroids
    random, draws = np.random.default_rng(0), torch.Generator(bench.device).manual_seed(0)

    def unit(rows: int) -> torch.Tensor:
        return F.normalize(torch.randn(rows, width, device=bench.device, generator=draws), dim=1)

    centroids = ProjectedCentroids(F.normalize(torch.randn(total, width), dim=1).numpy(), None, bench.device)
    top = random.integers(0, total, (batch, 16), dtype=np.int32)
    similarities = -np.sort(-random.uniform(size=top.shape)).astype(np.float16)
    features = [unit(batch).requires_grad_() for _ in range(2)]
    scale = torch.tensor(14.0, device=bench.device, requires_grad=True)

    def prepare() -> ClusterTargets:
        candidates = draw_candidates(top, total, ratio=0.1, minimum=4096, seed=0)
        correction = torch.from_numpy(candidates.log_correction_S).to(bench.device)
        means = mean_centroids(centroids, top, soft_labels(similarities, temperature=0.05, label_share=0.5))
        return ClusterTargets(centroids.take(candidates.ids), correction, means)

    targets = prepare()

    def step() -> None:
        batch = LossBatch(features[0], features[1], scale, features[0], features[1], image_clusters=targets)
        cluster_loss(batch, scale).backward()

    what = f"batch {batch:,}, {total:,} centroids, a tenth of them candidates"
    seconds, whole = bench.time(step, 3), bench.scratch / "step.json"
    beside, ratio = "", None
    if whole.exists():
        ratio = seconds / json.loads(whole.read_text())
        beside = f"a step of distill, {1000 * seconds / ratio:,.0f} ms"
    bench.report("loss", what, 1000 * seconds, "ms a step", beside, ratio)
    bench.report("loss", "its candidates, prepared during the step before", 1000 * bench.time(prepare, 3), "ms a step")


def evaluate(bench: Bench) -> None:
    """Zero-shot classification and the linear probe."""
    from peer import write_random_model

    name = bench.sizes.models[0]
    write_shards(bench)
    write_random_model(name, bench.scratch / name)
    (bench.scratch / "names.txt").write_text("".join(f"thing {number}\n" for number in range(CLASSES)))
    found = bench.clipcid("eval-zeroshot", name, "labeled/test", "--classnames", "names.txt", "--overwrite")
    bench.report("evaluate", f"zero-shot, {name}", found["images_per_second"], "images/s")
    found = bench.clipcid("eval-linear", name, "labeled", "--overwrite")
    bench.report("evaluate", f"probe of {found['train_images']:,} images, sweep", found["seconds"]["sweep"], "s")


def main() -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=(*PARTS, *TRAININGS))
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--figures", type=Path, required=True, help="file that the figures are added to")
    parser.add_argument("--cpu", action="store_true", help="small sizes, on the CPU")
    arguments = parser.parse_args()
    globals()[arguments.part.replace("-", "_")](Bench(arguments.scratch, arguments.figures, arguments.cpu))


if __name__ == "__main__":
    main()
