"""Train the main presets in several worlds: python worlds.py --work DIRECTORY [--flickr …] [--clothes …].

A world is a set of pairs with a teacher; what the teacher knows and what the captions say differ from world to world.
Every student is at its preset's default rate and reads the pairs alone. Finished ones are in worlds.jsonl, with what each
reported item gave, and are not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from ablation import Log, as_folder, commit, machine, say
from inputs import DATA, QUICKSTART, TEACHER, clipcid, cut_sets, drawn
from photographs import FOREIGN
from PIL import Image
from safetensors.torch import load_file, save_file

from clipcid_cli.algorithms.pairing import Pairs
from clipcid_cli.algorithms.repair import fit_repair
from clipcid_cli.runtime.randomness import derive_seed

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
BATCH_SIZE = 64
PHOTOGRAPH_STEPS, DRAWING_STEPS = 400, 2_000
# Photographs of Flickr8k that nobody trains on: to tune on, and to report.
TUNING, REPORTED = 500, 1_000
# Students of 64 px read photographs cut to this shorter side: decoding larger ones took a fifth of the time.
SHORTER_SIDE = 128
# Ranks are logged up to here.
RANKS = 10


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to train a student: flags of `clipcid distill`."""

    name: str
    flags: tuple[str, ...]

    @property
    def is_taught(self) -> bool:
        """Whether it reads the teacher's embeddings."""
        return self.name != "clip"

    @property
    def has_clusters(self) -> bool:
        """Whether it reads clusters."""
        return "cid" in self.flags


BEFORE = ("--preset", "fd-instance")
# What the default has where the teacher is near chance; a typed preset would be kept there.
NEAR_CHANCE = {BEFORE: ("--preset", "clip", "--loss", "instance=1")}
CONTENDERS = (
    Contender("clip", ("--preset", "clip")),
    Contender("clip-kd, repair auto", ()),
    Contender("clip-kd", ("--preset", "clip-kd", "--repair", "none")),
    Contender("default without trust", BEFORE),
    Contender("fd-instance, clip=1", (*BEFORE, "--repair", "none")),
    Contender("cid", ("--preset", "cid", "--repair", "none")),
    Contender("default, crd=1", (*BEFORE, "--loss", "crd=1")),
    Contender("default, text tower kept", (*BEFORE, "--text-tower", "teacher")),
)
# The default before with one thing changed, tried where it was furthest behind.
IDEAS = (
    Contender("default, icl=1", (*BEFORE, "--loss", "icl=1")),
    Contender("default, instance=0", (*BEFORE, "--loss", "instance=0")),
    Contender("default, td=1", (*BEFORE, "--loss", "td=1", "--ema", "0.99")),
    Contender("default, instance=1", (*BEFORE, "--loss", "instance=1")),
)
TRIED_IN = "clothes, good teacher"


@dataclasses.dataclass(frozen=True)
class World:
    """Pairs, a teacher, and what students are measured on.

    Attributes:
        data: What the pairs are; worlds of the same data share the students that no teacher taught.
        pairs: What the teacher embeds.
        small: The same pairs, as students read them.
        read: Flags by which `clipcid` reads the captions of the pairs.
        tune: What ideas are chosen on, a CLIP_benchmark folder or a folder of classes.
        report: The evaluation set, like it.
    """

    name: str
    data: str
    pairs: Path
    small: Path
    teacher: Path
    student: Path
    tune: Path
    report: Path
    steps: int
    read: tuple[str, ...] = ()

    def run(self, contender: Contender, seed: int) -> str:
        """Return the name of a run."""
        return f"{self.name if contender.is_taught else self.data}/{contender.name}-s{seed}"


class Worlds:
    """All worlds in one work directory; inputs are made when they are first needed."""

    def __init__(self, work: Path, log: Log, flickr: Path | None, clothes: Path | None) -> None:
        self.work, self.log = work, log
        self.about = {"commit": commit(), "machine": machine()}
        subprocess.run(["bash", FOREIGN / "teacher.sh"], check=True)
        self.worlds = [
            *(self.of_flickr(flickr) if flickr else ()),
            *(self.of_clothes(clothes) if clothes else ()),
            self.of_drawings(),
        ]

    def of_flickr(self, source: Path) -> Iterator[World]:
        """Yield the worlds of Flickr8k: the teacher as it is, one that is good, and one that does not know photographs."""
        out = self.work / "flickr"
        cut_flickr(source, out)
        pairs, small = out / "train", out / "small"
        shrink(pairs, small)
        foreign = FOREIGN / "teacher"
        student, sets = FOREIGN / "student.json", (out / "tune", out / "report")
        base = World("flickr", "flickr", pairs, small, foreign, student, *sets, PHOTOGRAPH_STEPS, ("--caption-lines",))
        yield base
        yield dataclasses.replace(base, name="flickr, good teacher", teacher=self.good_teacher(base))
        yield dataclasses.replace(base, name="flickr, teacher of drawings", teacher=TEACHER)

    def of_clothes(self, source: Path) -> Iterator[World]:
        """Yield the same three worlds of photographs of clothes, captioned by their classes' names."""
        out = self.work / "clothes"
        shrink(source / "train", out)
        lists = self.work / "clothes.csv", self.work / "clothes-small.csv"
        for folder, captions in zip((source / "train", out), lists, strict=True):
            subprocess.run([sys.executable, FOREIGN / "captions.py", folder, captions], check=True)
        foreign, student, sets = FOREIGN / "teacher", FOREIGN / "student.json", (source / "validation", source / "test")
        base = World("clothes", "clothes", *lists, foreign, student, *sets, PHOTOGRAPH_STEPS)
        yield dataclasses.replace(base, name="clothes, teacher of drawings", teacher=TEACHER)
        yield base
        yield dataclasses.replace(base, name="clothes, good teacher", teacher=self.good_teacher(base))

    def of_drawings(self) -> World:
        """Return the world of the ablation's drawings: the teacher was trained on those reported, students were not."""
        work = self.work / "drawings"
        cut_sets(work)
        pairs, student = work / "pairs", QUICKSTART / "student.json"
        sets = (work / "sets" / f"{side}-drawings-retrieval" for side in ("tune", "report"))
        return World("drawings", "drawings", pairs, pairs, TEACHER, student, *sets, DRAWING_STEPS)

    def good_teacher(self, world: World) -> Path:
        """Return the folder of a teacher that matches these images to captions well: its head is fitted to these pairs."""
        folder = self.work / "teachers" / world.name
        if not (folder / "done").exists():
            shutil.copytree(world.teacher, folder, dirs_exist_ok=True)
            tensors = load_file(folder / "open_clip_model.safetensors")
            head = "visual.head.proj.weight"
            tensors[head] = (fitted_map(self.embed(world)).T @ tensors[head].float()).contiguous()
            save_file(tensors, folder / "open_clip_model.safetensors")
            (folder / "done").touch()
        return folder

    def embed(self, world: World) -> Path:
        """Return the folder of the teacher's embeddings of a world's pairs, made where they are not there yet."""
        work = self.work / "embedded" / as_folder(world.name)
        if not (work / "done").exists():
            clipcid("embed", world.pairs, "--model", world.teacher, *world.read, "--work", work)
            (work / "done").touch()
        return work / "embeddings" / world.teacher.name

    def cluster(self, world: World) -> Path:
        """Return the folder of a world's clusters, made where they are not there yet."""
        work = self.work / "clustered" / as_folder(world.name)
        if not (work / "done").exists():
            clipcid(
                "cluster", "--embeddings", self.embed(world), "--keep-list", "none", "--features", "joint",
                "--num-clusters", 256, "--repair", "none", "--work", work,
            )  # fmt: skip
            (work / "done").touch()
        return work / "clusters"

    def run(self) -> None:
        """Train all contenders everywhere with one seed, measure the teachers, try the ideas, then take the next seed."""
        for seed in SEEDS:
            for world in self.worlds:
                for contender in CONTENDERS:
                    self.once(world.run(contender, seed), partial(self.train, world, contender, seed))
            for world in self.worlds:
                self.once(f"{world.name}/teacher", partial(self.measure_teacher, world))
            for world in (world for world in self.worlds if world.name == TRIED_IN):
                for idea in IDEAS:
                    self.once(world.run(idea, seed), partial(self.train, world, idea, seed))

    def measure_teacher(self, world: World) -> dict[str, Any]:
        """Measure a world's teacher."""
        return {"world": world.name} | measure(world.report, world.teacher, self.work)

    def once(self, run: str, do: Callable[[], dict[str, Any]]) -> None:
        """Do a run and log what it returns, unless the log has it."""
        if run not in self.log.entries:
            started = time.monotonic()
            entry = do()
            self.log.add({"run": run} | entry | {"took": round(time.monotonic() - started, 1)} | self.about)
            say(f"{run}: {entry['metrics']}")

    def train(self, world: World, contender: Contender, seed: int) -> dict[str, Any]:
        """Train and measure one student."""
        work = self.work / "trained" / as_folder(world.run(contender, seed))
        flags = contender.flags
        if world.teacher == TEACHER and world.data != "drawings":
            flags = NEAR_CHANCE.get(flags, flags)
        arguments: list[object] = [
            world.small, *world.read, "--student", world.student, *flags, "--steps", world.steps,
            "--batch-size", BATCH_SIZE, "--val-fraction", 0, "--checkpoint-every", world.steps, "--seed", seed,
            "--work", work, "--name", "run", "--keep-list", "none",
        ]  # fmt: skip
        if contender.is_taught:
            arguments += ["--teacher", world.teacher, "--embeddings", self.embed(world), "--extra-texts", 0]
        if contender.has_clusters:
            arguments += ["--clusters", self.cluster(world)]
        result = clipcid("distill", *arguments)
        student = work / "distill" / "run" / "student"
        return {
            "world": world.name if contender.is_taught else world.data,
            "contender": contender.name,
            "flags": list(flags),
            "seed": seed,
            "steps": world.steps,
            "repair": result.get("repair"),
            "pairing": result.get("pairing"),
            "losses": result["losses"],
            "seconds": result["seconds"],
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "tuning": measure(world.tune, student, self.work),
            **measure(world.report, student, self.work),
        }


def measure(data: Path, model: Path, work: Path) -> dict[str, Any]:
    """Return a model's metrics on an evaluation set, and what each item gave."""
    folder = work / "evaluated"
    answer = clipcid("eval-zeroshot", model, data, "--bootstrap", 0, "--predictions", "--overwrite", "--work", folder)
    entry = {"metrics": answer["metrics"], "items": read_items(Path(answer["files"]["predictions"]))}
    shutil.rmtree(folder)
    return entry


def read_items(path: Path) -> str:
    """Write what each item gave, in the order of the keys: whether its first class was right, or the ranks of a retrieval.

    A retrieval's item is the rank of its first right caption, then each of its captions' rank of the image; ``-`` is a rank
    beyond the tenth.
    """
    table = pq.read_table(path).sort_by("key")
    if "text_rank" not in table.column_names:
        return "".join(str(int(row["label"] == row["predicted"])) for row in table.to_pylist())
    ranks = [[row["text_rank"], *row["image_ranks"]] for row in table.to_pylist()]
    return " ".join("".join(str(rank) if rank < RANKS else "-" for rank in item) for item in ranks)


def fitted_map(embeddings: Path) -> torch.Tensor:
    """Return the map of image rows, float32 [D, D], that a repair fits to these rows and their first captions."""
    images, texts = (
        torch.from_numpy(np.concatenate([np.load(path) for path in sorted((embeddings / kind).glob("*.npy"))])).float()
        for kind in ("img_emb", "text_emb")
    )
    tables = [pq.read_table(path, columns=["caption"]) for path in sorted((embeddings / "metadata").glob("*.parquet"))]
    hashes = torch.tensor([derive_seed(caption) for table in tables for caption in table["caption"].to_pylist()])
    pairs = Pairs(torch.nn.functional.normalize(images), torch.nn.functional.normalize(texts), hashes)
    _, map_DD = fit_repair(pairs, 16.0, 0)
    assert map_DD is not None, "a clear gain"
    return map_DD


def cut_flickr(source: Path, out: Path) -> None:
    """Cut photographs, each with a ``.txt`` of five captions, into a part to train on and two CLIP_benchmark folders."""
    if (out / "done").exists():
        return
    names = sorted((path.stem for path in source.glob("*.jpg")), key=lambda name: drawn("flickr", name))
    held = {"report": names[:REPORTED], "tune": names[REPORTED : REPORTED + TUNING]}
    (out / "train").mkdir(parents=True, exist_ok=True)
    for name in sorted(names[REPORTED + TUNING :]):
        for suffix in (".jpg", ".txt"):
            shutil.copy(source / f"{name}{suffix}", out / "train" / f"{name}{suffix}")
    for side, members in held.items():
        folder = out / side / "test"
        folder.mkdir(parents=True, exist_ok=True)
        listed = [f"{name}{suffix}" for name in sorted(members) for suffix in (".jpg", ".txt")]
        subprocess.run(["tar", "cf", folder / "0.tar", "-C", source, *listed], check=True)
        (folder / "nshards.txt").write_text("1\n", encoding="utf-8")
        for path in (DATA / "retrieval").glob("*.txt"):
            shutil.copy(path, out / side / path.name)
    (out / "done").touch()


def shrink(source: Path, out: Path) -> None:
    """Copy photographs at the shorter side that students read, with the ``.txt`` beside each if there is one."""
    for path in sorted(source.rglob("*.jpg")):
        copy = out / path.relative_to(source)
        if copy.exists():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.with_suffix(".txt").exists():
            shutil.copy(path.with_suffix(".txt"), copy.with_suffix(".txt"))
        with Image.open(path) as image:
            scale = SHORTER_SIDE / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(copy, quality=95)


def main() -> None:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--log", type=Path, default=HERE / "worlds.jsonl")
    parser.add_argument("--flickr", type=Path, help="photographs (.jpg), each with a .txt of five captions beside it")
    parser.add_argument("--clothes", type=Path, help="folders train, validation and test of a folder per class")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    flickr, clothes = (path.resolve() if path else None for path in (given.flickr, given.clothes))
    Worlds(given.work.resolve(), Log(given.log), flickr, clothes).run()


if __name__ == "__main__":
    main()
