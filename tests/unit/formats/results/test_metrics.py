"""Metrics files: CLIP_benchmark's fields, valid JSON, and names that are safe and distinct."""

import json
from pathlib import Path

import msgspec
import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.results.metrics import (
    Metrics,
    metrics_stem,
    read_metrics,
    write_metrics,
)


def test_round_trip(tmp_path: Path) -> None:
    entries = {
        "dataset": "food101",
        "model": "ViT-B-32",
        "pretrained": "laion2b_s34b_b79k",
        "task": "zeroshot_classification",
        "language": "en",
        "metrics": {"acc1": 0.5, "acc5": None, "mean_per_class_recall": 0.25},
    }
    metrics = msgspec.convert(entries, Metrics)
    path = tmp_path / "eval" / "a.json"
    write_metrics(path, metrics)
    assert json.loads(path.read_text()) == entries
    assert read_metrics(path) == metrics


def test_stem_is_one_safe_name() -> None:
    assert metrics_stem("food101/test", "ViT-B-32", "linear_probe") == "food101-test_ViT-B-32_linear_probe"
    assert metrics_stem("../..", "hf-hub:org/name", "t") == "unnamed_hf-hub-org-name_t"


@pytest.mark.parametrize("text", ["[]", "{}", '{"dataset": "a"', '{"dataset": "a", "metrics": {}}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ClipcidError, match=r"a\.json cannot be read as metrics, a JSON object with dataset"):
        read_metrics(path)
