"""What is looked at: for each subcommand, its commands in the order a user meets their screens."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

STUDENT = "clipcid-work/distill/taught/student"


@dataclasses.dataclass(frozen=True)
class Scene:
    """One command and what is done around it.

    A command that ends in ``2> FILE`` shows the file: what is kept where stderr is no terminal.

    Attributes:
        about: What the screen shows, as its heading.
        command: The line typed.
        exact: Whether every character is compared: the screen has no time, speed or measured value.
        before: Done in the folder before the command.
        interrupt_at: The command is interrupted, as by Ctrl-C, once a file of this pattern is there.
    """

    about: str
    command: str
    exact: bool = False
    before: Callable[[Path], None] | None = None
    interrupt_at: str | None = None


def _forget_balance(place: Path) -> None:
    shutil.rmtree(place / "clipcid-work" / "balance", ignore_errors=True)


def _forget_filters(place: Path) -> None:
    for name in ("balance", "clusters", "references"):
        shutil.rmtree(place / "clipcid-work" / name)


def _damage_clusters(place: Path) -> None:
    (place / "clipcid-work" / "clusters" / "clusters.parquet").unlink()
    (place / "clipcid-work" / "clusters" / ".cluster-0123456789abcdef").mkdir()


_EMBEDDINGS = "clipcid-work/embeddings/teacher"
_AGAINST = "clipcid balance --keep 0.8 --against retrieval/test --against-threshold 0.6"
_WINDOW = "--min-caption-similarity 0.7 --max-caption-similarity 0.9"
_DISTILL = "clipcid distill --student student.json --name taught --steps 40 --batch-size 32 --val-fraction 0.1"
_EVAL = f"clipcid eval-zeroshot {STUDENT} classes retrieval --model teacher --predictions"
_METRICS = "clipcid-work/eval/classes_{}_zeroshot_classification.json"
_SIMPLE = _METRICS.replace(".json", "_templates-simple.json")
_COMPARE_TEMPLATES = f"clipcid eval-zeroshot --compare {_METRICS.format('teacher')} {_SIMPLE.format('teacher')}"
_COMPARE = f"clipcid eval-zeroshot --compare {_METRICS.format('taught-student')} {_METRICS.format('teacher')}"

_PLAN = "clipcid distill --student ViT-B-32 --images 225200000 --gpus 8xH100 --price 2.5 --work none --dry-run"

SCENES: dict[str, tuple[Scene, ...]] = {
    "clipcid": (
        Scene("help", "clipcid --help", exact=True),
        Scene("usage: no command", "clipcid", exact=True),
        Scene("usage: unknown command", "clipcid balanse", exact=True),
        Scene("version", "clipcid --version", exact=True),
    ),
    "embed": (
        Scene("help", "clipcid embed --help", exact=True),
        Scene("usage: unknown option", "clipcid embed pairs --modle teacher", exact=True),
        Scene("usage: out of range", "clipcid embed pairs --views 2 --crop-scale 1.5", exact=True),
        Scene("usage: two options that exclude each other", "clipcid embed pairs --views 2 --fast-decode", exact=True),
        Scene("missing input: no data given", "clipcid embed", exact=True),
        Scene("missing input: no such folder", "clipcid embed nowhere", exact=True),
        Scene("wrong model: no such architecture", "clipcid embed pairs --model ViT-B-33", exact=True),
        Scene("wrong model: a folder without a model", "clipcid embed pairs --model photos", exact=True),
        Scene("wrong model: weights that cannot be downloaded", "clipcid embed pairs", exact=True),
        Scene("bad data: a tar that ends too early", "clipcid embed broken --model teacher --work bad", exact=True),
        Scene("bad data: not images", "clipcid embed photos --model teacher --no-text --work bad"),
        Scene("dry run", "clipcid embed pairs --model teacher --dry-run"),
        Scene(
            "interrupted", "clipcid embed pairs --model teacher", interrupt_at=f"{_EMBEDDINGS}/.embed-*/.shards/*0.json"
        ),
        Scene("resumed, result", "clipcid embed pairs --model teacher"),
        Scene("result, to a file", "clipcid embed pairs --model teacher --work again 2> embed.log"),
        Scene("nothing to do", "clipcid embed pairs --model teacher"),
        Scene("other settings", "clipcid embed pairs --model teacher --no-text", exact=True),
    ),
    "balance": (
        Scene("help", "clipcid balance --help", exact=True),
        Scene("usage: no amount", "clipcid balance", exact=True),
        Scene("usage: two amounts", "clipcid balance --keep 0.5 --threshold 0.3", exact=True),
        Scene("usage: out of range", "clipcid balance --keep 1.5", exact=True),
        Scene("usage: not a number", "clipcid balance --keep half", exact=True),
        Scene("usage: unknown choice", "clipcid balance --keep 0.5 --select best", exact=True),
        Scene(
            "usage: two options that exclude each other",
            "clipcid balance --keep 0.5 --linkage star --select first",
            exact=True,
        ),
        Scene("usage: unknown key in the configuration", "clipcid balance --config config.toml", exact=True),
        Scene("missing input: no embeddings", "clipcid balance --keep 0.5 --work empty", exact=True),
        Scene("wrong model: embeddings of another one", "clipcid balance --keep 0.5 --model ViT-B-33", exact=True),
        Scene("dry run", "clipcid balance --keep 0.5 --dry-run"),
        Scene(
            "usage: references without a distance", "clipcid balance --keep 0.8 --against retrieval/test", exact=True
        ),
        Scene("missing input: no such reference", f"{_AGAINST.replace('retrieval/test', 'nowhere')}", exact=True),
        Scene("missing input: no clusters to cap", "clipcid balance --keep 0.8 --max-per-cluster 9", exact=True),
        Scene("dry run with filters", f"{_AGAINST} --min-caption-similarity 0.7 --dry-run"),
        Scene("dropped against references", _AGAINST),
        Scene("dropped by caption similarity", f"clipcid balance --keep 0.8 {_WINDOW}"),
        Scene("all images clustered, to cap clusters", "clipcid cluster --num-clusters 16 --keep-list none"),
        Scene("capped clusters", "clipcid balance --keep 0.8 --max-per-cluster 9"),
        Scene("all filters and the cap", f"{_AGAINST} {_WINDOW} --max-per-cluster 9"),
        Scene("result", "clipcid balance --keep 0.5", before=_forget_filters),
        Scene("nothing to do", "clipcid balance --keep 0.5"),
        Scene("another amount to keep", "clipcid balance --threshold 0.6 --linkage star --write-keys kept.txt"),
        Scene("searched in partitions", "clipcid balance --keep 0.6 --neighbors partitioned", before=_forget_balance),
        Scene("new shards", "clipcid balance --keep 0.5 --write-shards smaller"),
        Scene("other settings: shards of another list", "clipcid balance --keep 0.6 --write-shards smaller"),
    ),
    "cluster": (
        Scene("help", "clipcid cluster --help", exact=True),
        Scene("usage: out of range", "clipcid cluster --num-clusters 0", exact=True),
        Scene("missing input: no embeddings", "clipcid cluster --work empty", exact=True),
        Scene("missing input: no keep list", "clipcid cluster --keep-list nowhere.parquet", exact=True),
        Scene("bad data: more clusters than images", "clipcid cluster --num-clusters 5000", exact=True),
        Scene("the same as JSON", "clipcid cluster --num-clusters 5000 --json --quiet", exact=True),
        Scene("dry run", "clipcid cluster --num-clusters 16 --features joint --dry-run"),
        Scene("result", "clipcid cluster --num-clusters 16 --features joint"),
        Scene("nothing to do", "clipcid cluster --num-clusters 16 --features joint"),
        Scene("other settings", "clipcid cluster --num-clusters 8", exact=True),
    ),
    "distill": (
        Scene("help", "clipcid distill --help", exact=True),
        Scene("usage: no student", "clipcid distill", exact=True),
        Scene("usage: unknown loss", "clipcid distill --student student.json --loss clp=1", exact=True),
        Scene("usage: not a whole number", "clipcid distill --student student.json --steps 1e3", exact=True),
        Scene(
            "usage: a loss without its teacher",
            "clipcid distill --student student.json --teacher none --preset cid",
            exact=True,
        ),
        Scene("missing input: no embeddings", "clipcid distill --student student.json --work empty", exact=True),
        Scene(
            "missing input: no clusters",
            "clipcid distill --student student.json --preset cid --clusters nowhere",
            exact=True,
        ),
        Scene(
            "wrong model: embeddings of another teacher", "clipcid distill --student student.json --teacher ViT-B-32"
        ),
        Scene("wrong model: no such student", "clipcid distill --student nowhere.json", exact=True),
        Scene("bad data: a batch larger than the data", "clipcid distill --student student.json --batch-size 5000"),
        Scene("dry run", f"{_DISTILL} --dry-run"),
        Scene("a plan for GPUs", _PLAN, exact=True),
        Scene(
            "interrupted", f"{_DISTILL} --checkpoint-every 5", interrupt_at="clipcid-work/distill/taught/checkpoints/*"
        ),
        Scene("other settings", f"{_DISTILL} --lr 0.01"),
        Scene("resumed, result", f"{_DISTILL} --checkpoint-every 5"),
        Scene("an average of the weights", f"{_DISTILL} --name averaged --steps 10 --preset clip --ema 0.9"),
        Scene("result, to a file", f"{_DISTILL} --name other --steps 10 --preset clip 2> distill.log"),
        Scene("nothing to do", f"{_DISTILL} --checkpoint-every 5"),
        Scene("usage: an average out of range", "clipcid distill --student student.json --ema 1", exact=True),
        Scene("a data set to measure", f"{_DISTILL} --name other --steps 10 --preset clip --eval-data classes"),
    ),
    "eval-zeroshot": (
        Scene("help", "clipcid eval-zeroshot --help", exact=True),
        Scene("usage: unknown choice", "clipcid eval-zeroshot teacher classes --task detection", exact=True),
        Scene("usage: one file to compare", "clipcid eval-zeroshot --compare a.json", exact=True),
        Scene("missing input: no student", "clipcid eval-zeroshot --work empty", exact=True),
        Scene("missing input: no such data", "clipcid eval-zeroshot teacher nowhere", exact=True),
        Scene("missing input: no such results", "clipcid eval-zeroshot --compare a.json b.json", exact=True),
        Scene("wrong model: data in its place", "clipcid eval-zeroshot classes", exact=True),
        Scene("bad data: no captions", "clipcid eval-zeroshot teacher classes --task retrieval"),
        Scene("dry run", f"{_EVAL} --dry-run", exact=True),
        Scene("result of two models", _EVAL),
        Scene("nothing to do", _EVAL),
        Scene("other settings", "clipcid eval-zeroshot teacher classes --batch-size 32", exact=True),
        Scene("result on the held-out samples", "clipcid eval-zeroshot"),
        Scene("comparison", _COMPARE),
        Scene("other templates", "clipcid eval-zeroshot teacher classes --templates simple --predictions"),
        Scene("comparison across templates", _COMPARE_TEMPLATES),
    ),
    "eval-linear": (
        Scene("help", "clipcid eval-linear --help", exact=True),
        Scene("usage: no data", "clipcid eval-linear", exact=True),
        Scene("usage: not numbers", "clipcid eval-linear teacher classes --shots few", exact=True),
        Scene("missing input: no such folder", "clipcid eval-linear teacher nowhere", exact=True),
        Scene("wrong model: data in its place", "clipcid eval-linear classes classes", exact=True),
        Scene("bad data: no classes", "clipcid eval-linear teacher --train pairs --test pairs"),
        Scene("dry run", "clipcid eval-linear teacher classes --dry-run", exact=True),
        Scene("result", "clipcid eval-linear teacher classes --shots 1,2 --shot-repeats 2"),
        Scene("nothing to do", "clipcid eval-linear teacher classes --shots 1,2 --shot-repeats 2"),
        Scene("other settings", "clipcid eval-linear teacher classes --val-fraction 0.3", exact=True),
    ),
    "export": (
        Scene("help", "clipcid export --help", exact=True),
        Scene("usage: unknown choice", "clipcid export --format tflite", exact=True),
        Scene("usage: an option of another format", "clipcid export --quantize int8", exact=True),
        Scene("missing input: no student", "clipcid export --work empty", exact=True),
        Scene("missing input: no such data", "clipcid export teacher --data nowhere", exact=True),
        Scene("wrong model: a folder without a model", "clipcid export photos", exact=True),
        Scene("dry run", "clipcid export --format open-clip --format hf --dry-run", exact=True),
        Scene("result", "clipcid export --format open-clip --format hf"),
        Scene("nothing to do", "clipcid export --format open-clip --format hf"),
        Scene("other settings", "clipcid export", exact=True),
        Scene("average of the weights", "clipcid export clipcid-work/distill/averaged/student --ema"),
        Scene("average: a run without", "clipcid export clipcid-work/distill/taught/student --ema", exact=True),
    ),
    "verify": (
        Scene("help", "clipcid verify --help", exact=True),
        Scene("missing input: no such folder", "clipcid verify nowhere", exact=True),
        Scene("result", f"clipcid verify {_EMBEDDINGS} --read-data"),
        Scene("faults", "clipcid verify clipcid-work/clusters", before=_damage_clusters),
    ),
    "doctor": (
        Scene("help", "clipcid doctor --help", exact=True),
        Scene("usage: no such GPU", "clipcid doctor --gpus 8xH99", exact=True),
        Scene("missing input: no such data", "clipcid doctor --data nowhere", exact=True),
    ),
}
