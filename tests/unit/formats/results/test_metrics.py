"""Names of metrics files, made of those of data sets and models."""

from clipcid_cli.formats.results.metrics import metrics_stem


def test_stem_is_one_safe_name() -> None:
    assert metrics_stem("food101/test", "ViT-B-32", "linear_probe") == "food101-test_ViT-B-32_linear_probe"
    assert metrics_stem("../..", "hf-hub:org/name", "t") == "unnamed_hf-hub-org-name_t"
