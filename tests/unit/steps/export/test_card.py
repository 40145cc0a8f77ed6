"""What a model card states: of the run, of the weights, and where from."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY_CONFIG
from sidecars import make_sidecar

from clipcid_cli.formats.results.metrics import SIDECARS, Metrics, write_metrics
from clipcid_cli.formats.sidecar import BalanceSidecar, EvaluationSidecar
from clipcid_cli.runtime.models.clip_model import ModelInfo, load_model
from clipcid_cli.runtime.models.names import ModelName, parse_model
from clipcid_cli.steps.distill.run import run as distill
from clipcid_cli.steps.export.card import render_card
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.export import ExportSettings


@pytest.fixture(scope="module")
def info(tiny_model: Path) -> ModelInfo:
    return load_model(parse_model(str(tiny_model))).info


def write_evaluation(work: Path, name: str, weights_hash: str, value: float, dataset: str | None = None) -> None:
    """Write what an evaluation leaves, as far as the card reads it."""
    (work / "eval" / SIDECARS).mkdir(parents=True, exist_ok=True)
    record = Metrics(
        dataset=dataset or name,
        model="m",
        pretrained="p",
        task="zeroshot_classification",
        language="en",
        metrics={"acc1": value},
    )
    write_metrics(work / "eval" / f"{name}.json", record)
    inputs = [{"path": "m", "size": 1, "hash": weights_hash}]
    lines = [{"source": "default", "number": 1, "hash": digest} for digest in ("aa01", "bb02")]
    prompts = dict(zip(("class_names", "templates"), lines, strict=True))
    sidecar = make_sidecar(EvaluationSidecar, inputs=inputs, prompts=prompts, counts={"images": 1234})
    (work / "eval" / SIDECARS / f"{name}.json").write_text(json.dumps(sidecar))


def render(info: ModelInfo, source: ModelName, **settings: Any) -> str:
    return render_card(info, source, ExportSettings(**settings), {}, [])


def test_metrics_are_those_of_the_whole_weights_file_however_the_model_is_named(
    info: ModelInfo, tiny_model: Path, tmp_path: Path
) -> None:
    write_evaluation(tmp_path, "own", "blake2b:aa", 0.5)
    write_evaluation(tmp_path, "others", "blake2b:bb", 0.25)
    write_evaluation(tmp_path, "sampled", "blake2b-sampled:aa", 0.75)
    own = dataclasses.replace(info, weights_hash="blake2b:aa")
    tagged = ModelName("ViT-B-32:laion2b_s34b_b79k", "tag", architecture="ViT-B-32", tag="laion2b_s34b_b79k")
    for source in (tagged, parse_model(str(tiny_model))):
        card = render(own, source, work=tmp_path)
        assert "| own | zeroshot_classification | acc1 | 1,234 | 0.5000 | aa01, bb02 |" in card
        assert "| others |" not in card
        assert "| sampled |" not in card


def test_metrics_of_other_weights_than_those_written_say_so(info: ModelInfo, tiny_model: Path, tmp_path: Path) -> None:
    write_evaluation(tmp_path, "own", info.weights_hash, 0.5)
    source = parse_model(str(tiny_model))
    for precision, said in (
        ("fp16", "Measured on the original model, not on the fp16 weights here;"),
        ("auto", "Measured on the original model;"),
    ):
        assert said in render(info, source, work=tmp_path, precision=precision)
    assert "Measured on" not in render(info, source, work=tmp_path / "empty")


def test_names_never_become_tags(info: ModelInfo, tiny_model: Path, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|\n<b>"
    write_evaluation(tmp_path, "own", info.weights_hash, 0.5, dataset=evil)
    named = dataclasses.replace(info, architecture=evil)
    card = render(named, parse_model(str(tiny_model)), work=tmp_path, license=evil)
    assert "<script" not in card
    assert "<b>" not in card
    assert "| &lt;script&gt;alert(1)&lt;/script&gt;\\| &lt;b&gt; | zeroshot_classification |" in card


def test_the_keep_ratio_is_of_the_list_that_the_run_applied(tiny_shards: Path, tmp_path: Path) -> None:
    work, keep_list = tmp_path / "work", tmp_path / "work" / "balance" / "keep.parquet"
    keep_list.parent.mkdir(parents=True)

    def balance(kept: int) -> None:
        keys = [f"{number:06d}" for number in range(24)]
        pq.write_table(pa.table({"key": keys, "kept": np.arange(24) < kept}), keep_list)
        (keep_list.parent / "balance.json").write_text(json.dumps(make_sidecar(BalanceSidecar)))

    (tmp_path / "student.json").write_text(json.dumps(TINY_CONFIG))
    balance(18)
    made = distill(
        DistillSettings(
            data=str(tiny_shards),
            student=str(tmp_path / "student.json"),
            teacher="none",
            keep_list=str(keep_list),
            work=work,
            steps=1,
            batch_size=8,
            workers=0,
            device="cpu",
        ),
    )
    balance(6)  # the work directory moves on
    student = parse_model(made.student)
    card = render(load_model(student).info, student, work=work)
    assert "| Keep ratio | 0.75 (18 of 24 images) |" in card
