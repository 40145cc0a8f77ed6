"""What a command line is refused with: exit code, sentence, and nothing written.

The most common of these errors are among the screens, word for word. All lines run in one folder: with a model, data,
embeddings and clusters that are in order, and some that are not.
"""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from balance_data import make_rows, write_embeddings
from conftest import (
    TINY_CONFIG,
    make_image,
    run_clipcid,
    shard_members,
    write_class_folders,
    write_tar,
    write_tiny_model,
)

DISTILL = "distill --student student.json"
LINEAR = "eval-linear model --train three --test three"
COMPARE = "eval-zeroshot --compare a.json"

CASES: tuple[tuple[str, int, str], ...] = (
    ("balance --keep 0", 2, "0.0 is not in the range 0<x<=1"),
    ("balance --keep 56.3", 2, "56.3 is not in the range 0<x<=1. Did you mean 0.563?"),
    ("balance --keep 56.3%", 2, "'56.3%' is not a valid number. Did you mean 0.563?"),
    ("balance --keep nan", 2, "nan is not in the range 0<x<=1"),
    ("balance --keep 0.5 --embeddings nowhere", 1, "nowhere contains no embeddings"),
    ("balance foreign --keep 0.5 --model model", 1, "foreign holds embeddings, and no images. Name it with"),
    (f"balance {300 * 'x'}.tar --keep 0.5 --model model", 1, "There is no data at"),  # no path can be so long
    ("balance /etc/passwd /etc/hosts /etc/group --keep 0.5", 2, "Got 2 more arguments than DATA, such as /etc/hosts"),
    ("balance a.tar b.tar c.tar --keep 0.5", 2, "Got unexpected extra arguments (b.tar c.tar)"),
    ("balance --keep 0.5 --against-threshold 0.1", 2, "--against-threshold was given without --against"),
    (
        "balance --keep 0.5 --near nowhere --near-keep 0.3 --model model",
        1,
        "--near nowhere: There is no data at",
    ),
    ("balance --keep 0.5 --min-caption-similarity 0.3 --max-caption-similarity 0.2", 2, "0.3 is above --max-caption"),
    ("balance --keep 0.5 --max-per-cluster 3 --select medoid", 2, "--select medoid chooses one image of a set"),
    ("balance --keep 0.5 --clusters x", 2, "--clusters was given without --max-per-cluster"),
    ("balance --keep 0.5 --write-pairs p.txt", 2, "neither a .parquet nor a .csv file"),
    # Said before the embeddings are looked for.
    ("balance --keep 0.5 --embeddings nowhere --write-keys pairs", 1, "Could not write pairs"),
    ("balance --keep 0.5 --embeddings nowhere --write-pairs names.txt/in.csv", 1, "Could not write names.txt/in.csv"),
    ("balance --keep 0.5 --embeddings nowhere --write-uids names.txt/in/it.csv", 1, "Could not write names.txt/in/it"),
    ("balance --config pipe.toml", 2, "not a file"),
    ("balance --config pairs", 2, "not a file"),
    (
        "balance --config outside.toml",
        2,
        "keep is outside the tables. Write it below the name of its command, e.g. [balance].",
    ),
    ("embed pairs --model damaged --work w", 1, "open_clip_model.safetensors has 2,000 bytes"),
    ("embed pairs --model student.json --work w", 1, "without weights"),
    ("embed untitled.csv --model model --work w", 1, "the list has the columns filepath, text."),
    ("cluster --embeddings foreign --features joint --work w", 1, "needs text embeddings"),
    ("cluster --embeddings foreign --keep-list nobody.parquet --work w", 1, "Nothing is left to cluster"),
    ("cluster --embeddings foreign --keep-list others.parquet --work w", 1, "lacks 40 of the 40 rows"),
    ("cluster --embeddings foreign --num-clusters 20 --train-rows 19 --work w", 1, "20 is more than --train-rows 19"),
    ("embed pairs --model model --views 2 --view-kind mix,strong", 2, "--view-kind cannot be 'strong'"),
    ("embed pairs --view-kind mix", 2, "--view-kind was given, but no --views"),
    ("embed pairs --crop-scale 0.3", 2, "--crop-scale was given, but no --views"),
    ("embed pairs --color-jitter 0.3 --text-variants 8", 2, "--color-jitter was given, but no --views"),
    ("embed pairs --part 8/8", 2, "--part cannot be '8/8'"),
    ("embed pairs --part 0/8 --dry-run", 2, "--dry-run estimates what all data takes"),
    ("embed pairs --out s3://bucket/emb", 2, "--out is a URL, s3://bucket/emb, to which only parts are written"),
    ("embed pairs --part 0/8 --out https://host/emb", 2, "--out is https://host/emb, which is no object store"),
    ("embed pairs --join emb", 2, "--join takes no DATA"),
    ("embed pairs --text-variants 2 --no-text", 2, "--text-variants embeds captions, --no-text does not"),
    (f"{DISTILL} --loss clip=-1", 2, "clip=-1"),
    (f"{DISTILL} --steps 5 --epochs 2", 2, "--epochs and --steps were both given"),
    (f"{DISTILL} --clusters nowhere", 2, "--clusters: only for the cluster loss"),
    (f"{DISTILL} --keep-list nowhere.parquet", 1, "There is no keep list nowhere.parquet"),
    (f"{DISTILL} --resume latest --batch-size 8", 1, "no checkpoint"),
    (f"{DISTILL} --resume latest --overwrite", 2, "--overwrite discards"),
    (f"{DISTILL} --name ..", 2, "--name '..' is not"),
    (f"{DISTILL} --name lr/1e-3", 2, "--name 'lr/1e-3' is not the name of one folder"),
    (f"{DISTILL} --freeze-image --freeze-text", 2, "nothing to train"),
    (f"{DISTILL} --batch-size 8 --accum-freq 3", 2, "multiple"),
    (f"{DISTILL} --init-from nowhere/", 1, "nowhere"),
    (f"{DISTILL} --teacher ViT-L-99 --embeddings no/rows", 1, "Model ViT-L-99"),
    (
        f"{DISTILL} pairs --teacher ViT-B-32 --embeddings foreign",
        1,
        "foreign have width 32; those of the teacher ViT-B-32:laion2b_s34b_b79k have 512",
    ),
    (f"{DISTILL} --teacher none --views stored", 2, "no loss of the run needs a teacher"),
    (f"{DISTILL} --teacher none --clusters x", 2, "Omit --clusters."),
    (f"{DISTILL} --preset clip --online-teacher", 2, "no loss of the run needs a teacher"),
    (f"{DISTILL} pairs --preset clip-kd --online-teacher --work w", 1, "ViT-L-14:laion2b_s32b_b82k"),
    (f"{DISTILL} --preset clip-kd --online-teacher --views stored", 2, "but --online-teacher reads none"),
    (f"{DISTILL} --preset clip-kd --online-teacher --extra-texts 4", 2, "not with --online-teacher"),
    (f"{DISTILL} --preset clip-kd --freeze-text --extra-texts 4", 2, "not with --freeze-text"),
    (f"{DISTILL} --preset clip-kd --extra-texts 4", 1, "--extra-texts 4, but there are no texts"),
    (f"{DISTILL} --preset cid --extra-texts 4", 2, "no loss of the run takes texts without images"),
    (f"{DISTILL} unlabelled --teacher model --work w", 1, "Or put captions next to the images"),
    (f"{DISTILL} --caption-dropout 0.5", 2, "--caption-dropout"),
    (
        f"{DISTILL} --cluster-towers both --label-share 0 --no-candidate-correction",
        2,
        "Omit --cluster-towers, --label-share, --candidate-correction, or use --preset cid",
    ),
    ("eval-zeroshot model unlabelled", 1, "neither a class nor a caption"),
    ("eval-zeroshot model unnamed", 1, "has no class names"),
    ("eval-zeroshot model unnamed --classnames names.txt --templates names.txt", 1, "has no placeholder for the class"),
    ("eval-zeroshot model pairs --classnames names.txt", 2, "--classnames would have no effect: "),
    ("eval-zeroshot NoSuchModel unnamed", 1, "no architecture NoSuchModel"),
    ("eval-zeroshot NoSuchModel unnamed", 1, "was read as the model"),
    ("eval-zeroshot model three three", 2, "same metrics file"),
    ("eval-zeroshot model three pairs --groups names.txt", 2, "--groups is a table of the images of one data set"),
    (f"{COMPARE} b.json c.json", 2, "3 were given"),
    (f"{COMPARE} b.json --bootstrap 0", 2, "--bootstrap is 0"),
    (f"{COMPARE} b.json --predictions", 2, "--predictions has no effect with --compare"),
    (f"{COMPARE} b.json --model x --templates simple", 2, "--model, --templates have no effect with --compare"),
    (f"{COMPARE} b.json --precision bf16", 2, "--precision has no effect"),
    ("eval-linear --config single.toml", 2, "There is no data to evaluate on"),  # a single value stands for a list
    ("eval-linear test", 2, "--train and --test are missing. test was read as the model"),
    ("eval-linear model --train three", 2, "--test is missing"),
    ("eval-linear model --train two --test three", 1, "1 class that"),
    ("eval-linear model --train lonely --test three", 1, "none can be held out"),
    ("eval-linear three three", 1, "first positional argument is the model"),
    ("eval-linear no-such-model three", 1, "first positional argument is the model"),
    (f"{LINEAR} --val-fraction 0", 2, "--val-fraction"),
    (f"{LINEAR} --shots 0", 2, "--shots is '0'"),
    (f"{LINEAR} --knn '10;20'", 2, "--knn is '10;20'"),
    (f"{LINEAR} --knn 3,97", 1, "--knn 97: there are only 18 training images"),
    (f"{LINEAR} --metric mean_average_precision", 2, "an image has one class"),
    ("export --config single.toml", 1, "No model was named"),
    ("export model --data nowhere --dry-run", 1, "nowhere"),
    ("export nowhere/model", 1, "no architecture nowhere/model"),
    ("export damaged", 1, "open_clip_model.safetensors has 2,000 bytes"),
    ("export coded", 1, "text_cfg.tokenizer_kwargs has trust_remote_code, which a model may not ask for"),
    ("export model --work linked", 1, "linked/export is a link out of the work directory"),
    ("export unfit --format onnx", 1, "unfit cannot encode a text of 12 tokens"),
    ("export model --format onnx --format onnx", 2, "given twice"),
    ("export model --format onnx --precision fp16", 2, "cannot be combined with --format onnx"),
    ("export model --templates names.txt", 2, "Add --classnames FILE"),
    ("export model --classnames names.txt", 2, "--classnames applies only to ONNX files"),
    ("runs --work clipcid-work/clusters", 1, "clipcid-work/clusters lies inside the work directory "),
    ("export model --device cpu", 2, "This command runs on the CPU."),
    ("export model --opset 19", 2, "--opset applies only to ONNX files"),
    ("export model --npm-packages pairs", 2, "Add --format web"),
    ("export model --search-images pairs", 2, "--search-images applies only to the page"),
    ("export model --format web --npm-packages pairs --dry-run", 1, "pairs has no onnxruntime-web-1.30.0.tgz and no"),
    ("export model --format onnx --classnames nowhere.txt", 1, "or a folder that has a folder of images per class"),
    ("export model --format onnx --quantize int8 --work w", 1, "needs images with classes or captions"),
    ("export wide --format open-clip --format hf", 1, "vision_cfg.image_size is [16, 32], not square"),
    ("export wide --format onnx --classnames names.txt", 1, "preprocess_cfg.size is [16, 32], which the graph cannot"),
)


@pytest.fixture(scope="module")
def place(
    distill_prepared: Path, tiny_model: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    place = tmp_path_factory.mktemp("errors")
    shutil.copytree(distill_prepared, place, dirs_exist_ok=True)
    (place / "model").symlink_to(tiny_model)
    (place / "pairs").symlink_to(tiny_shards)
    (place / "names.txt").write_text("cat\ndog\n")
    os.mkfifo(place / "pipe.toml")
    (place / "outside.toml").write_text("keep = 0.5\n")
    (place / "single.toml").write_text('[eval-linear]\nshots = 4\n[export]\nformat = "onnx"\n')
    write_embeddings(place / "foreign", make_rows(40))
    keys = [f"{row:06d}" for row in range(40)]
    pq.write_table(pa.table({"key": keys, "kept": np.zeros(40, bool)}), place / "nobody.parquet")
    pq.write_table(pa.table({"key": ["a", "b"], "kept": [True, True]}), place / "others.parquet")
    write_tar(place / "unlabelled" / "0.tar", [("a.png", make_image(0)), ("b.png", make_image(1))])
    (place / "untitled.csv").write_text("filepath,text\nthree/a/0.png,a\n")
    write_tar(place / "unnamed" / "0.tar", [("a.png", make_image(0)), ("a.cls", b"0")])
    for folder, names, number in (("two", "ab", 6), ("three", "abc", 6), ("lonely", "abc", 1)):
        write_class_folders(place / folder, dict.fromkeys(names, range(number)))
    (place / "damaged").mkdir()
    for path in tiny_model.iterdir():
        (place / "damaged" / path.name).write_bytes(path.read_bytes()[:2000])
    wide = TINY_CONFIG | {"vision_cfg": TINY_CONFIG["vision_cfg"] | {"image_size": [16, 32]}}
    write_tiny_model(place / "wide", wide)
    asks = {"tokenizer_kwargs": {"trust_remote_code": True}}
    write_tiny_model(place / "coded", TINY_CONFIG | {"text_cfg": TINY_CONFIG["text_cfg"] | asks})
    (place / "linked").mkdir()
    (place / "linked" / "export").symlink_to(place / "three")
    write_tiny_model(place / "unfit", TINY_CONFIG | {"text_cfg": TINY_CONFIG["text_cfg"] | {"vocab_size": 100}})
    return place


def list_outputs(place: Path) -> set[Path]:
    """List what is there under a name of its own, but for caches: the index of the data, and features of images."""
    found = (path.relative_to(place) for path in place.rglob("*") if path.is_file())
    caches = {"index", "features"}
    return {path for path in found if not caches & {*path.parts} and not any(part[0] == "." for part in path.parts)}


@pytest.mark.parametrize(("line", "code", "sentence"), CASES, ids=[case[0] for case in CASES])
def test_a_line_is_refused(place: Path, line: str, code: int, sentence: str) -> None:
    before = list_outputs(place)
    found = run_clipcid(*shlex.split(line), cwd=place, check=False)
    assert (found.returncode, found.stdout, found.problems()) == (code, "", []), found
    assert sentence in found.said, found
    assert list_outputs(place) == before


@pytest.mark.parametrize(("line", "code"), {(line.split()[0], code): (line, code) for line, code, _ in CASES}.values())
def test_an_error_of_each_code_of_each_command_is_told_as_json(place: Path, line: str, code: int) -> None:
    before = list_outputs(place)
    assert run_clipcid(*shlex.split(line), "--json", cwd=place, code=code).json.keys() == {"error", "fix"}
    assert list_outputs(place) == before


def test_those_that_turn_a_flag_off_are_not_refused(place: Path) -> None:
    off = "--views none --extra-texts 0 --steps 1 --batch-size 8 --preset clip --report-to wandb --dry-run --json"
    found = run_clipcid(*shlex.split(f"{DISTILL} --teacher none {off}"), cwd=place)
    assert found.json["steps"] == 1


# How each subcommand is told its data.
READERS = (
    "embed {} --model model",
    "balance {} --model model --keep 0.5",
    "distill {} --teacher none --student student.json --steps 2 --batch-size 4",
    "eval-zeroshot model {} --task retrieval",
    "eval-linear model --train {} --test {}",
)
# Words that the error says of a folder, and whether that is found when the data is read, not when it is opened: what was
# listed or embedded by then stays, and none of it has the name of a result. All others leave nothing.
BAD_DATA = {
    "nowhere": ("nowhere", False),
    "empty": ("empty", False),
    "text-named-tar": ("00000.tar", False),
    "truncated": ("00000.tar", False),
    "without-images": ("image", False),
    "keys-across-shards": ("--keys shard", False),
    "unreadable": ("6", True),
    "keys-within-a-shard": ("3 of 6 samples", True),
    "unlabelled": ("", True),
}


@pytest.fixture(scope="module")
def bad(place: Path) -> Path:
    """The place, with a folder of each kind of bad data."""
    samples = shard_members(0, 6, classes=1)
    half = samples[: len(samples) // 2]
    broken = [(name, data[:60] if name.endswith(".png") else data) for name, data in samples]
    (place / "empty").mkdir()
    write_tar(place / "text-named-tar" / "00000.tar", []).write_text("this is not an archive\n" * 100)
    cut = write_tar(place / "truncated" / "00000.tar", samples)
    cut.write_bytes(cut.read_bytes()[:7000])
    write_tar(place / "without-images" / "00000.tar", [member for member in samples if not member[0].endswith(".png")])
    write_tar(place / "unreadable" / "00000.tar", broken)
    for shard in ("00000.tar", "00001.tar"):
        write_tar(place / "keys-across-shards" / shard, samples)
    write_tar(place / "keys-within-a-shard" / "00000.tar", [*half, *half])
    return place


@pytest.mark.parametrize("folder", BAD_DATA)
@pytest.mark.parametrize("line", READERS, ids=[line.partition(" ")[0] for line in READERS])
def test_bad_data_is_one_error(bad: Path, line: str, folder: str) -> None:
    word, stays = BAD_DATA[folder]
    work = bad / f"work-{line.partition(' ')[0]}-{folder}"
    found = run_clipcid(*line.replace("{}", folder).split(), "--work", work.name, cwd=bad, check=False)
    if folder == "unlabelled" and line.startswith("balance"):  # an image needs no caption to be balanced
        assert found.returncode == 0, found
        return
    assert found.returncode in (1, 2), found
    assert found.problems() == [], found
    assert word in found.stderr, found
    assert list_outputs(work) == set()
    assert stays or not work.exists()
