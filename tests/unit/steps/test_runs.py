"""What `runs` lists of a work directory, and the page it writes."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from balance_data import heard
from rich.console import Console
from sidecars import edit_sidecar, make_sidecar

from clipcid_cli.commands.runs import show
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.sidecar import EmbedSidecar
from clipcid_cli.formats.files import write_json
from clipcid_cli.formats.results.clusters import ClusterSidecar
from clipcid_cli.formats.results.evaluations import LinearSidecar, ZeroshotSidecar
from clipcid_cli.formats.results.keep_list import BalanceSidecar
from clipcid_cli.formats.results.run_folder import DistillSidecar
from clipcid_cli.records import Draws
from clipcid_cli.steps.runs import Contents, run
from clipcid_cli.steps.settings.runs import RunsSettings

R1 = "image_retrieval_recall@1"
HOSTILE = "<img src=x onerror=alert(1)>$x^$"


def write_run(work: Path, name: str, seed: int, recall: float, weight: float = 1.0, **entries: Any) -> None:
    folder = work / "distill" / name
    folder.mkdir(parents=True)
    settings = {"losses": {"clip": {"value": weight, "per_width": False}, "fd": {"value": 64, "per_width": True}}}
    settings |= {"seed": seed, "student": {"config": "c", "weights": f"w{seed}", "pixels": "p"}}
    result = {"steps": 20, "samples": 40, "samples_per_second": 1.0, "losses": {}}
    result |= {"metrics": {R1: recall, "things/acc1": 0.5}, "chance": {R1: 0.01}}
    entries = {"counts": {"held_out": 50}} | entries
    model = {"spec": "student.json", "parameters": 3, "embed_dim": 32}
    content = make_sidecar(DistillSidecar, settings=settings, result=result, model=model, **entries)
    write_json(folder / "distill.json", content)
    lines = [{"step": step, R1: recall * step / 20, "things/acc1": 0.5} for step in (0, 10, 20)]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "report.html").write_text("a report")


def write_evaluation(work: Path, run_name: str, acc1: float, variant: str = "") -> None:
    (work / "eval" / "sidecars").mkdir(parents=True, exist_ok=True)
    student = work / "distill" / run_name / "student"
    name = f"things_{run_name}-student_zeroshot_classification{variant}.json"
    about = {"dataset": "things", "model": f"{run_name}-student", "pretrained": str(student), "language": "en"}
    write_json(
        work / "eval" / name, about | {"task": "zeroshot_classification", "metrics": {"acc1": acc1, "acc5": None}}
    )
    measured = {"images_per_second": 1.0, "customary": "acc1", "intervals": {"acc1": [acc1 - 0.1, acc1 + 0.1]}}
    measured |= {"chance": {"acc1": 0.25}, "majority": 0.4, "per_class": [], "examples": []}
    sidecar = make_sidecar(ZeroshotSidecar, counts={"images": 9, "texts": 4, "skipped": {}}, **measured)
    write_json(work / "eval" / "sidecars" / name, sidecar)


def write_probe(work: Path, model: str, **result: Any) -> None:
    name = f"things_{model}_linear_probe.json"
    about = {"dataset": "things", "model": model, "pretrained": "openai", "language": "en"}
    write_json(work / "eval" / name, about | {"task": "linear_probe", "metrics": {"lp_acc1": 0.468}})
    result = {"metric": "acc1", "majority": 0.25, "images": 9} | result
    sidecar = make_sidecar(LinearSidecar, result=result, solution={}, sweep=[])
    write_json(work / "eval" / "sidecars" / name, sidecar)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A work directory of three seeds of one run, one run of other losses, one unfinished, and evaluations."""
    work = tmp_path / "work"
    for seed, recall in enumerate((0.1, 0.2, 0.3)):
        write_run(work, f"a-s{seed}", seed, recall)
        write_evaluation(work, f"a-s{seed}", 0.3 + recall)
    write_run(work, HOSTILE, 0, 0.4, weight=2.0)
    write_evaluation(work, "alone", 0.5)
    (work / "distill" / "stopped").mkdir()
    (work / "distill" / "stopped" / "results.jsonl").write_text(json.dumps({"step": 10, R1: 0.05}) + "\n")
    (work / "distill" / "stopped" / "train.jsonl").write_text(json.dumps({"step": 14, "loss": 3.0}) + "\n")
    begun = work / "distill" / "stopped" / f".distill-{'0' * 32}"
    begun.mkdir()
    write_json(begun / ".run.json", {"settings": {"steps": 40}, "inputs": []})
    (work / "embeddings" / "tiny").mkdir(parents=True)
    write_json(work / "embeddings" / "tiny" / "embed.json", make_sidecar(EmbedSidecar))
    return work


def list_contents(work: Path, **settings: Any) -> tuple[Contents, str]:
    with heard() as told:
        contents = run(RunsSettings(work=work, **settings))
    return contents, "\n".join(told)


def test_a_run_that_has_logged_nothing_is_listed(work: Path) -> None:
    killed = work / "distill" / "killed" / f".distill-{'0' * 32}"
    killed.mkdir(parents=True)
    write_json(killed / ".run.json", {"settings": {"steps": 300}, "inputs": []})
    (work / "distill" / "no run").mkdir()
    unfinished = [row for row in list_contents(work)[0].runs if not row.finished]
    assert [(row.name, row.steps, row.planned) for row in unfinished] == [("killed", 0, 300), ("stopped", 14, 40)]


def test_seeds_are_one_row_and_evaluations_follow_their_runs(work: Path) -> None:
    contents, told = list_contents(work)
    assert told == ""
    hostile, seeds, stopped = contents.runs
    assert (seeds.name, seeds.names, seeds.seeds) == ("a-s*", ["a-s0", "a-s1", "a-s2"], [0, 1, 2])
    assert seeds.losses == {"clip": "1", "fd": "64/D"}
    assert seeds.metrics[R1].mean == pytest.approx(0.2)
    assert seeds.metrics[R1].std == pytest.approx(0.1)
    assert hostile.losses["clip"] == "2"
    assert hostile.metrics[R1].std is None
    # Steps are those trained, of those planned; not those of the last evaluation.
    assert (stopped.finished, stopped.steps, stopped.planned) == (False, 14, 40)
    assert (seeds.held_out, hostile.held_out, stopped.held_out) == (50, 50, None)
    several, alone = contents.evaluations
    assert (several.models, several.images) == ([f"a-s{seed}-student" for seed in range(3)], 9)
    assert several.metrics["acc1"].values == pytest.approx([0.4, 0.5, 0.6])
    assert several.intervals == {}
    assert alone.intervals == {"acc1": (0.4, 0.6)}
    assert (alone.chance, alone.majority, alone.customary) == ({"acc1": 0.25}, 0.4, "acc1")
    assert [(each.step, each.name) for each in contents.made] == [("embed", "embeddings/tiny")]


def test_clusters_of_another_keep_list_say_so(work: Path) -> None:
    for folder in ("balance", "clusters"):
        (work / folder).mkdir()
    now, before = ({"path": str(work / "balance" / "keep.parquet"), "size": 9, "hash": text} for text in "ab")
    listed = {"outputs": [now | {"path": "keep.parquet"}]}
    write_json(work / "balance" / "balance.json", make_sidecar(BalanceSidecar, **listed))
    for keep_list, outdated in ((now, []), (before, ["another keep list"])):
        write_json(work / "clusters" / "cluster.json", make_sidecar(ClusterSidecar, keep_list=keep_list))
        clusters = list_contents(work)[0].made[-1]
        assert (clusters.step, clusters.outdated) == ("cluster", outdated)
    assert clusters.about.endswith("; outdated: made from another keep list than lies there now")


def test_runs_without_captions_are_listed_by_what_is_measured_of_them(work: Path) -> None:
    contents, _ = list_contents(work)
    contents.runs[0].metrics = {"teacher_retrieval_recall@1": Draws.from_values([0.571])}
    printed = io.StringIO()
    show(contents, Console(file=printed, width=120))
    assert "teacher R@1" in printed.getvalue()
    assert "57.1" in printed.getvalue()


def test_only_models_that_differ_in_their_seed_are_averaged(work: Path) -> None:
    for seed in range(2):
        write_evaluation(work, f"a-s{seed}", 0.1 + seed / 10, variant="_caption-lines")
    shutil.copy(work / "eval" / "things_a-s0-student_zeroshot_classification.json", work / "eval" / "a copy.json")
    for model in ("ViT-B-32", "ViT-L-14"):
        about = {"dataset": "things", "model": model, "pretrained": "openai", "language": "en"}
        content = about | {"task": "zeroshot_classification", "metrics": {"acc1": 0.7, "acc5": None}}
        write_json(work / "eval" / f"{model}.json", content)
    rows = list_contents(work)[0].evaluations
    assert [(row.variant, row.models, row.metrics["acc1"].values) for row in rows] == [
        ("", ["ViT-B-32 openai"], [0.7]),
        ("", ["ViT-L-14 openai"], [0.7]),
        ("", ["a-s0-student"], [0.4]),
        ("", ["a-s0-student", "a-s1-student", "a-s2-student"], pytest.approx([0.4, 0.5, 0.6])),
        ("", ["alone-student"], [0.5]),
        ("caption-lines", ["a-s0-student", "a-s1-student"], pytest.approx([0.1, 0.2])),
    ]
    printed = io.StringIO()
    show(list_contents(work)[0], Console(file=printed, width=80))
    assert "things, caption-lines" in printed.getvalue()


def test_a_run_of_seed_0_is_not_shown_as_one_of_no_seeds(work: Path) -> None:
    contents, _ = list_contents(work, dry_run=True)
    printed = io.StringIO()
    show(contents, Console(file=printed, width=120))
    lines = [line.split() for line in printed.getvalue().splitlines()]
    assert ["run", "seed", "steps"] in [cells[:3] for cells in lines]
    assert ["a-s*", "0,", "1,", "2", "20"] in [cells[:5] for cells in lines]
    assert [*HOSTILE.split(), "0", "20"] in [cells[:5] for cells in lines]


def test_a_probe_has_the_interval_of_its_sidecar(work: Path) -> None:
    write_probe(work, "new", intervals={"lp_acc1": [0.404, 0.528]})
    write_probe(work, "old")
    write_probe(work, "odd", intervals={"lp_acc1": "wide"})
    contents, _ = list_contents(work, dry_run=True)
    probes = {row.models[0]: row.intervals for row in contents.evaluations if row.task == "linear_probe"}
    assert probes == {"new openai": {"lp_acc1": (0.404, 0.528)}, "old openai": {}}
    assert [left_out.path for left_out in contents.unreadable] == ["eval/things_odd_linear_probe.json"]
    printed = io.StringIO()
    show(contents, Console(file=printed, width=120))
    lines = [line.split() for line in printed.getvalue().splitlines()]
    assert ["things", "new", "openai", "probe", "acc1", "46.8", "±6.2", "–", "25.0"] in lines


def test_the_page_stands_alone_and_runs_nothing_of_others(work: Path) -> None:
    assert not list_contents(work, dry_run=True)[0].files
    assert not (work / "index.html").exists()
    contents, _ = list_contents(work)
    page = (work / "index.html").read_text()
    assert contents.files == {"index": str(work / "index.html")}
    policy = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == [
        "default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    ]
    assert "<img" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;$x^$" in page
    assert page.count("<script") == 1
    assert not re.search(r'(?:src|href)="(?!distill/|#)', page)
    assert 'href="distill/a-s2/report.html"' in page
    assert 'href="distill/%3Cimg%20src%3Dx%20onerror%3Dalert%281%29%3E%24x%5E%24/report.html"' in page
    assert page.count("<svg") == 2  # what the logs have: R@1 of images, and the data set's acc1
    assert "things: always the largest class" in page


def test_what_cannot_be_read_is_listed_and_ends_nothing(work: Path) -> None:
    (work / "distill" / "a-s1" / "distill.json").write_text("{}")
    edit_sidecar(work / "distill" / HOSTILE / "distill.json", lambda content: content["settings"].pop("seed"))
    (work / "eval" / "broken.json").write_text("[")
    (work / "balance").mkdir()
    write_json(work / "balance" / "balance.json", make_sidecar(BalanceSidecar, result={}))
    contents, told = list_contents(work)
    left_out = [each.path for each in contents.unreadable]
    assert left_out == [
        "balance",
        f"distill/{HOSTILE}/distill.json",
        "distill/a-s1/distill.json",
        "eval/broken.json",
    ]
    assert told.count("is left out:") == 4
    assert [row.names for row in contents.runs] == [["a-s0", "a-s2"], ["a-s1"], ["stopped"]]
    assert "Left out" in (work / "index.html").read_text()


def test_no_work_directory_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ClipcidError, match="There is no work directory"):
        list_contents(tmp_path / "nowhere")
