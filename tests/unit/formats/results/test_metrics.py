"""Metrics files: what is none is refused, and names are safe."""

from pathlib import Path

import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.results.metrics import metrics_stem, read_metrics


def test_stem_is_one_safe_name() -> None:
    assert metrics_stem("food101/test", "ViT-B-32", "linear_probe") == "food101-test_ViT-B-32_linear_probe"
    assert metrics_stem("../..", "hf-hub:org/name", "t") == "unnamed_hf-hub-org-name_t"


@pytest.mark.parametrize("text", ["[]", "{}", '{"dataset": "a"', '{"dataset": "a", "metrics": {}}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ClipcidError, match=r"a\.json cannot be read as metrics, a JSON object with dataset"):
        read_metrics(path)
