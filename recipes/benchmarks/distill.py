"""Is distillation from stored embeddings faster than open_clip's own? The same models, shards and steps.

    python recipes/benchmarks/distill.py --images DIR                  photographs: any data clipcid reads
    python recipes/benchmarks/distill.py --images DIR --peer VENV      a venv that has open_clip_torch and webdataset 0.2.86
    python recipes/benchmarks/distill.py --images DIR --folder OUT --rounds 1     again with --rounds 2, 3 … goes on there
    python recipes/benchmarks/distill.py --images DIR --folder OUT --tune         open_clip's settings, each once

Without --peer a venv is made (pip, some minutes, with this environment's torch, torchvision, open_clip and Pillow; its own
webdataset, since open_clip_train does not run with newer ones). Without --images the shipped drawings are enlarged.

The teacher (62 M) and the student (14 M) see 112 px and 77 tokens; the teacher's weights are random, since speed does not
depend on them, and both sides load the same file. The shards hold JPEGs of 256 px on the short side and captions of the
shipped pairs, as they are (10 to 23 tokens) or, with --captions web, joined to lengths that spread like those of web
pages' alternative texts (median 15 tokens, 2 % above the context).

Commands are run in turn, A B C … A B C …. Samples a second are those of the steps after the first --skip, from each side's
own log; whole seconds are from start to exit, with start, loading and the last checkpoint. Each image is seen at most once,
so nothing decoded is used twice. Every command finds the machine as a user's shell has it: GOMP_SPINCOUNT is unset. On Linux
a run during which other programs took more than --others of the processor is recorded but not counted; the
same command again makes it anew.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from balance import describe_machine
from PIL import Image

SHIPPED = Path(__file__).parents[1] / "quickstart" / "data" / "pairs"
SHORT_SIDE = 256
SHARDS = 8
TEXT = {"context_length": 77, "vocab_size": 49408}
STUDENT = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 112, "patch_size": 16, "width": 256, "layers": 6, "head_width": 64},
    "text_cfg": {**TEXT, "width": 160, "heads": 5, "layers": 4},
}
TEACHER = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 112, "patch_size": 16, "width": 512, "layers": 9, "head_width": 64},
    "text_cfg": {**TEXT, "width": 384, "heads": 6, "layers": 8},
}
# Registers the folder's configurations as open_clip's own, then is open_clip_train.main.
LAUNCHER = (
    "import sys, open_clip; open_clip.add_model_config(sys.argv.pop(1)); "
    "from open_clip_train.main import main; main(sys.argv[1:])"
)
PEER_LOG = re.compile(r"\[ *(\d+)/.*Batch \(t\): ([\d.]+)")
PEER_LOG_STEPS = 5
# Of Linux's prctl.h: descendants whose parents end become this process's children.
PR_SET_CHILD_SUBREAPER = 36
OWN = {
    "clipcid, clip + crd": ("--preset", "clip", "--loss", "crd=1"),
    "clipcid, dr": ("--preset", "dr"),
    "clipcid, cid": ("--preset", "cid"),
    "clipcid, no teacher": ("--preset", "clip", "--teacher", "none"),
}
PEER_TAUGHT, PEER_PLAIN = "open_clip, teacher in the loop", "open_clip, no teacher"


def main() -> None:
    """Run what is left to run and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", default=str(SHIPPED), help="photographs: any data clipcid reads")
    parser.add_argument("--captions", choices=("shipped", "web"), default="shipped")
    parser.add_argument("--peer", type=Path, help="venv with open_clip_torch and webdataset 0.2.86")
    parser.add_argument("--folder", type=Path, help="where models, shards and figures are kept; by default nowhere")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--skip", type=int, default=10, help="first steps that are not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, help="clipcid's; its default when not given")
    parser.add_argument("--peer-workers", type=int, default=1)
    parser.add_argument("--peer-precision", default="fp32")
    parser.add_argument("--others", type=float, default=0.1, help="largest share of the processor others may take")
    parser.add_argument("--tune", action="store_true", help="try open_clip's settings instead, each once")
    parser.add_argument("--without", nargs="*", default=[], help="forms to leave out, by the ends of their names")
    arguments = parser.parse_args()
    for flag, steps in (("--steps", arguments.steps), ("--skip", arguments.skip)):
        if steps % PEER_LOG_STEPS:
            parser.error(
                f"{flag} is {steps}; it must be a multiple of {PEER_LOG_STEPS}, as open_clip logs that many steps at a time."
            )
    print(describe_machine(os.cpu_count() or 1))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.folder or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder, arguments)
        if arguments.tune:
            bench.tune()
        else:
            bench.measure()
            bench.show()


class Bench:
    """Both sides on one folder of models and shards."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder, self.arguments = folder, arguments
        self.peer = (arguments.peer or make_peer(folder / "venv")).resolve() / "bin" / "python"
        self.models, self.shards = folder / "models", folder / f"shards-{arguments.captions}"
        self.work, self.records = folder / f"work-{arguments.captions}", folder / "runs.jsonl"
        if not self.models.exists():
            make_models(self.models)
        if not self.shards.exists():
            make_shards(arguments.images, arguments.captions, self.shards)
        self.samples = json.loads((self.shards / "about.json").read_text())
        print("shards: {samples:,} JPEGs, captions of {median:.0f} tokens (longest {longest})".format(**self.samples))
        needed = arguments.steps * arguments.batch_size
        if needed > self.samples["samples"]:
            raise SystemExit(
                f"{arguments.steps} steps of {arguments.batch_size} need {needed:,} samples, so that none is seen twice; "
                f"the shards hold {self.samples['samples']:,}. Give more --images, or fewer --steps."
            )
        self.embed_seconds = self.prepare()

    def prepare(self) -> float:
        """Let clipcid embed and cluster; seconds of the whole `embed` command."""
        path = self.work / "embed_seconds.json"
        if not path.exists():
            teacher = self.models / "teacher"
            embedded = self.run_clipcid("embed", self.shards, "--model", teacher)
            self.run_clipcid("cluster", "--num-clusters", 256)
            path.write_text(json.dumps(embedded["seconds"]))
        seconds: float = json.loads(path.read_text())
        return seconds

    def measure(self) -> None:
        """Run every form in turn, as many times as are left."""
        forms = [PEER_TAUGHT, "clipcid, clip + crd", PEER_PLAIN, "clipcid, no teacher", "clipcid, dr", "clipcid, cid"]
        forms = [form for form in forms if not form.endswith(tuple(self.arguments.without))]
        for number in range(self.arguments.rounds):
            for form in forms:
                if sum(record["form"] == form for record in self.done()) <= number:
                    found = {"form": form, **self.conditions(), **self.run_form(form)}
                    print(json.dumps(found), file=sys.stderr, flush=True)
                    with self.records.open("a") as file:
                        file.write(json.dumps(found) + "\n")

    def conditions(self) -> dict[str, Any]:
        """What runs must share to be compared."""
        names = ("captions", "batch_size", "steps", "skip", "workers", "peer_workers", "peer_precision")
        return {name: getattr(self.arguments, name) for name in names}

    def done(self) -> list[dict[str, Any]]:
        """The runs of these conditions that were made."""
        if not self.records.exists():
            return []
        records = [json.loads(line) for line in self.records.read_text().splitlines()]
        return [
            record
            for record in records
            if self.conditions().items() <= record.items() and record["others"] <= self.arguments.others
        ]

    def run_form(self, form: str) -> dict[str, float]:
        """Run one form once: samples a second after the first steps, and whole seconds."""
        if form in OWN:
            return self.run_own(OWN[form])
        return self.run_peer(form == PEER_TAUGHT, self.arguments.peer_precision, self.arguments.peer_workers)

    def run_own(self, options: tuple[str, ...]) -> dict[str, float]:
        """Train with clipcid."""
        given, name = self.arguments, "run"
        shutil.rmtree(self.work / "distill" / name, ignore_errors=True)  # a finished run would not be made again
        workers = () if given.workers is None else ("--workers", given.workers)
        run = self.run_clipcid(
            "distill", self.shards, "--student", self.models / "student.json", "--name", name,
            "--keep-list", "none", "--val-fraction", 0, "--steps", given.steps, "--batch-size", given.batch_size,
            "--lr", 1e-4, "--warmup", 10, "--checkpoint-every", given.steps, "--eval-every", given.steps,
            *workers, *options,
        )  # fmt: skip
        lines = [json.loads(line) for line in (self.work / "distill" / name / "train.jsonl").read_text().splitlines()]
        ends = {line["step"]: line["step"] * given.batch_size / line["samples_per_second"] for line in lines}
        counted = (given.steps - given.skip) * given.batch_size
        return {"samples_per_second": counted / (ends[given.steps] - ends[given.skip]), **run}

    def run_peer(self, taught: bool, precision: str, workers: int, spins: str | None = None) -> dict[str, float]:
        """Train with open_clip."""
        given = self.arguments
        logs = Path(tempfile.mkdtemp(dir=self.folder, prefix="open_clip-"))
        command = [
            self.peer, "-c", LAUNCHER, self.models, "--model", "student", "--logs", logs, "--name", "run",
            "--train-data", str(self.shards / f"{{000..{SHARDS - 1:03d}}}.tar"), "--dataset-type", "webdataset",
            "--train-num-samples", given.steps * given.batch_size, "--epochs", 1, "--batch-size", given.batch_size,
            "--lr", 1e-4, "--warmup", 10, "--beta1", 0.9, "--beta2", 0.98, "--eps", 1e-6, "--wd", 0.2,
            "--grad-clip-norm", 1.0, "--precision", precision, "--workers", workers,
            "--log-every-n-steps", PEER_LOG_STEPS,
        ]  # fmt: skip
        if taught:
            weights = self.models / "teacher" / "open_clip_model.safetensors"
            command += ["--distill-model", "teacher", "--distill-pretrained", weights]
        run = timed(command, self.folder, without={"PYTHONPATH"}, spins=spins)
        # A line tells the mean of the steps since the one before, the first line of one step.
        done, counted, spent = 0, 0, 0.0
        for samples, mean in PEER_LOG.findall((logs / "run" / "out.log").read_text()):
            step = int(samples) // given.batch_size
            if done >= given.skip:
                counted, spent = counted + step - done, spent + (step - done) * float(mean)
            done = step
        if done != given.steps:
            raise SystemExit(f"open_clip logged {done} of {given.steps} steps; its log is in {logs}.")
        return {"samples_per_second": counted * given.batch_size / spent, **run}

    def run_clipcid(self, *words: Any) -> dict[str, float]:
        """Run one of clipcid's commands; what `timed` says of it."""
        program = Path(sys.executable).with_name("clipcid")
        return timed([program, *words, "--work", self.work, "--quiet"], self.folder, without=set())

    def tune(self) -> None:
        """Print open_clip's speed with each of its settings that may matter on a CPU, each once."""
        for taught, precision, workers, spins in (
            *((False, "fp32", workers, None) for workers in (0, 1, 2)),
            *((False, "fp32", 1, spins) for spins in ("0", "10000")),
            *((taught, "amp_bf16", 1, None) for taught in (False, True)),
        ):
            found = self.run_peer(taught, precision, workers, spins)
            print(
                f"{PEER_TAUGHT if taught else PEER_PLAIN:>30}, {precision:>8}, {workers} workers, spins {spins}: "
                f"{found['samples_per_second']:6.1f} samples/s, {found['seconds']:5.1f} s in all, "
                f"others {found['others']:.0%}",
                flush=True,
            )

    def show(self) -> None:
        """Print medians, ratios, the price of embedding and when it is earned back."""
        given, found = self.arguments, dict[str, list[dict[str, Any]]]()
        for record in self.done():
            found.setdefault(record["form"], []).append(record)
        speed = {form: median(run["samples_per_second"] for run in runs) for form, runs in found.items()}
        print(
            f"batch {given.batch_size}, {given.steps} steps, the first {given.skip} not counted; open_clip "
            f"{given.peer_precision}, {given.peer_workers} workers"
        )
        print(f"{'':>30} {'samples/s':>9} {'(least … most)':>18} {'whole s':>8} {'× open_clip':>11} runs")
        for form, runs in found.items():
            rates = sorted(run["samples_per_second"] for run in runs)
            base = PEER_PLAIN if "no teacher" in form else PEER_TAUGHT
            ratio = f"{speed[form] / speed[base]:.2f}" if base in speed else ""
            print(
                f"{form:>30} {speed[form]:>9.1f} {f'({rates[0]:.1f} … {rates[-1]:.1f})':>18} "
                f"{median(run['seconds'] for run in runs):>8.1f} {ratio:>11} {len(runs):>4}"
            )
        number = self.samples["samples"]
        print(f"embed, whole command: {self.embed_seconds:.1f} s for {number:,} pairs, once per teacher and data")
        for form in ("clipcid, clip + crd", "clipcid, cid"):
            if form in speed and PEER_TAUGHT in speed:
                saved = number / speed[PEER_TAUGHT] - number / speed[form]
                epochs = math.ceil(self.embed_seconds / saved) if saved > 0 else math.inf
                print(
                    f"{form}: with embedding, ahead of open_clip from epoch {epochs} on ({saved:.1f} s saved an epoch)"
                )


def make_models(folder: Path) -> None:
    """Write the configurations, and the teacher with random weights."""
    from clipcid_cli.formats.models.open_clip_folder import write_model_folder
    from clipcid_cli.runtime.models.load import load_model
    from clipcid_cli.runtime.models.names import parse_model

    folder.mkdir()
    for name, config in (("student", STUDENT), ("teacher", TEACHER)):
        (folder / f"{name}.json").write_text(json.dumps(config))
        model = load_model(parse_model(str(folder / f"{name}.json")), fresh_seed=0)
        print(f"{name}: {model.info.parameters / 1e6:.1f} M parameters")
    write_model_folder(folder / "teacher", model.info.config, model.info.preprocess, model.module.state_dict())


def make_shards(images: str, captions: str, folder: Path) -> None:
    """Write the images as JPEGs with captions into shards; JPEGs of the right size are copied."""
    from open_clip import SimpleTokenizer

    from clipcid_cli.formats.data.dataset import open_dataset
    from clipcid_cli.runtime.models.decode import decode_image

    def samples(data: str) -> list[Any]:
        return [sample for shard in open_dataset(data).shards for sample in shard.samples()]

    random, tokenizer = np.random.default_rng(0), SimpleTokenizer()
    shipped = [sample.captions[0] for sample in samples(str(SHIPPED))]
    pictures = samples(images)
    order = random.permutation(len(pictures))
    lengths = []
    folder.mkdir()
    for number, part in enumerate(np.array_split(order, SHARDS)):
        with tarfile.open(folder / f"{number:03d}.tar", "w") as archive:
            for place in part:
                caption = shipped[int(random.integers(len(shipped)))]
                if captions == "web":
                    words = " ".join(random.choice(shipped, 12)).split()
                    caption = " ".join(words[: max(1, round(float(random.lognormal(math.log(11), 0.75))))])
                lengths.append(min(TEXT["context_length"], len(tokenizer.encode(caption)) + 2))
                add_member(archive, f"{place:06d}.jpg", to_jpeg(pictures[place].image.read(), decode_image))
                add_member(archive, f"{place:06d}.txt", caption.encode())
    about = {"samples": len(order), "median": float(np.median(lengths)), "longest": max(lengths)}
    (folder / "about.json").write_text(json.dumps(about))


def to_jpeg(data: bytes, decode: Any) -> bytes:
    """Return a JPEG of 256 px on the short side, `data` itself if it is one."""
    given = Image.open(io.BytesIO(data))
    if given.format == "JPEG" and min(given.size) == SHORT_SIDE:
        return data
    image = decode(data)
    scale = SHORT_SIDE / min(image.size)
    target = io.BytesIO()
    size = (max(SHORT_SIDE, round(image.width * scale)), max(SHORT_SIDE, round(image.height * scale)))
    image.resize(size, Image.Resampling.BICUBIC).save(target, "JPEG", quality=90)
    return target.getvalue()


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add one file to a tar."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    archive.addfile(header, io.BytesIO(data))


def timed(command: list[Any], folder: Path, *, without: set[str], spins: str | None = None) -> dict[str, float]:
    """Run a command offline, in silence and without some variables.

    Returns:
        Seconds from start to exit, and the share of the processor that other programs took meanwhile.
    """
    environment = {name: value for name, value in os.environ.items() if name not in without | {"GOMP_SPINCOUNT"}}
    if spins is not None:
        environment["GOMP_SPINCOUNT"] = spins
    started, busy = time.perf_counter(), busy_seconds()
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - started
    if sys.platform == "linux":
        # Grandchildren that outlived their parent are this process's now; waiting for them counts their time as ours.
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    others = max(0.0, busy_seconds() - busy) / seconds / (os.cpu_count() or 1)
    return {"seconds": seconds, "others": others}


def busy_seconds() -> float:
    """Return the time that programs other than this one's children have computed since the machine started."""
    if sys.platform != "linux":
        return 0.0
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - own.ru_utime - own.ru_stime


def make_peer(folder: Path) -> Path:
    """Make a venv with open_clip's trainer and this environment's torch, torchvision, open_clip and Pillow."""
    if not folder.exists():
        same = [f"{name}=={version(name)}" for name in ("torch", "torchvision", "open_clip_torch", "pillow")]
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        packages = ["webdataset==0.2.86", "pandas"]
        subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", *packages, *same], check=True)
    return folder


if __name__ == "__main__":
    main()
