"""Zero-shot, comparison and linear probe: what the shipped teacher, and a part of it, make of data nobody trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import run_clipcid
from golden import ANSWERS, RECORDING, ask, check, make_place, plain
from safetensors.numpy import load_file, save_file

MODELS = ("teacher", "part")
TASKS = {"classification": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a second model that any machine has: the teacher without half of its blocks."""
    place = make_place(tmp_path_factory.mktemp("evaluate"))
    config = json.loads((place / "teacher" / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["layers"] = 3
    config["model_cfg"]["text_cfg"]["layers"] = 1
    weights = load_file(place / "teacher" / "open_clip_model.safetensors")
    left_out = ("visual.transformer.resblocks.3.", "transformer.resblocks.1.")
    (place / "part").mkdir()
    (place / "part" / "open_clip_config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor for name, tensor in weights.items() if not name.startswith(left_out)},
        place / "part" / "open_clip_model.safetensors",
    )
    return place


@pytest.fixture(scope="module")
def results(place: Path) -> dict[tuple[str, str], Any]:
    """The answer of each model on each data set."""
    data = ("data/classification", "data/retrieval")
    answer = ask(place, "eval-zeroshot", MODELS[0], *data, "--model", MODELS[1], "--predictions", "--work", "work")
    return {(one["model"], one["dataset"]): one for one in answer["results"]}


def read_predictions(place: Path, result: Any) -> pd.DataFrame:
    return pq.read_table(place / result["files"]["predictions"]).to_pandas()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dataset", TASKS)
def test_zero_shot(place: Path, results: dict[tuple[str, str], Any], model: str, dataset: str) -> None:
    """At most one image is answered otherwise, and the metrics are those of the answers."""
    result = results[model, dataset]
    # Of 644 or 344 images; intervals are of random draws of them.
    check(f"zeroshot-{model}-{dataset}", {"json": plain(result)}, rel=0.02, within=0.01)
    written = json.loads((place / result["files"]["metrics"]).read_text())
    for field in ("dataset", "model", "task", "language", "metrics"):
        assert written[field] == result[field]
    found = read_predictions(place, result)
    metrics = result["metrics"]
    if dataset == "classification":
        right = found["label"] == found["predicted"]
        among = [label in top for label, top in zip(found["label"], found["top"], strict=True)]
        per_class = right.groupby(found["label"]).mean().mean()
        expected = {"acc1": right.mean(), "acc5": np.mean(among), "mean_per_class_recall": per_class}
        answers = found["predicted"].to_numpy()
    else:
        ranks = found["image_ranks"].map(lambda ranks: ranks[0]).to_numpy()
        texts = found["text_rank"].to_numpy()
        recalls = {"image": ranks, "text": texts}
        expected = {f"{of}_retrieval_recall@{k}": (rank < k).mean() for of, rank in recalls.items() for k in (1, 5, 10)}
        answers = np.stack([ranks, texts], axis=1)
    assert metrics == pytest.approx(expected, abs=1e-9)
    keys = found["key"].to_numpy(dtype="U")
    check(f"zeroshot-{dataset}-keys", {"key": keys})
    assert_answers(f"zeroshot-{model}-{dataset}-answers", answers)


def assert_answers(case: str, answers: np.ndarray) -> None:
    """Compare answers with those recorded: of one image they may differ, a rank by one."""
    if RECORDING:
        check(case, {"answers": answers})
        return
    with np.load(ANSWERS / f"{case}.npz") as file:
        recorded = file["answers"]
    assert answers.shape == recorded.shape
    apart = np.abs(answers - recorded).reshape(len(answers), -1).max(axis=1)
    limit = 1 if answers.ndim == 2 else 0
    assert (apart > limit).sum() <= 1, np.flatnonzero(apart > limit)


@pytest.mark.parametrize("dataset", TASKS)
def test_comparison(place: Path, results: dict[tuple[str, str], Any], dataset: str) -> None:
    files = [results[model, dataset]["files"]["metrics"] for model in MODELS]
    answer = run_clipcid("eval-zeroshot", "--compare", *files, "--json", cwd=place).json
    check(f"compare-{dataset}", {"json": plain(answer)}, rel=0.05, within=0.01)


def test_linear_probe(place: Path) -> None:
    answer = ask(place, "eval-linear", "teacher", "data/classification", "--work", "work")
    json_ = plain(answer)
    sweep = json_.pop("sweep")
    check("probe", {"json": json_, "metrics": answer["metrics"], "c": sweep["c"]}, within=0.005)
    # Of 1,126 images: the whole curve over C moves by no more than ten of them.
    check("probe-sweep", {"score": sweep["score"]}, within=0.0091)
