"""DataComp's suite on made-up copies in its layouts: what its own evaluation scores, what is missing, what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from balance_data import heard
from conftest import make_image
from rich.console import Console
from suite_data import FLICKR, write_classified, write_suite, write_table, write_winogavil

from clipcid_cli.commands.suite import show_suite
from clipcid_cli.errors import ClipcidError
from clipcid_cli.steps.evaluate import measure
from clipcid_cli.steps.evaluate.suite import run_suite
from clipcid_cli.steps.evaluate.suite_result import SuiteResult
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings

TEACHER = Path(__file__).parents[4] / "recipes" / "quickstart" / "teacher"
# Printed by mlfoundations/datacomp's evaluation (commit 4a8df19; wilds 2.0.0, webdataset 0.2.31, LAION-AI/CLIP_benchmark
# without autocast) and aggregate_scores.py on these very folders, with the shipped teacher, in fp32.
SCORES = json.loads(Path(__file__).with_name("datacomp_scores.json").read_text())


def choose(model: Path, root: Path, work: Path, **settings: Any) -> EvalZeroshotSettings:
    return EvalZeroshotSettings(
        model=str(model), data=(str(root),), suite="datacomp", work=work, device="cpu", bootstrap=0, **settings
    )


def suite(model: Path, root: Path, work: Path, **settings: Any) -> SuiteResult:
    result = run_suite(choose(model, root, work, **settings))
    assert isinstance(result, SuiteResult)
    return result


def plain(result: SuiteResult) -> dict[str, Any]:
    return dict(msgspec.to_builtins(result))


@pytest.mark.slow
def test_all_38_score_as_datacomp_scores_them(tmp_path: Path) -> None:
    write_suite(tmp_path / "root")
    result = plain(suite(TEACHER, tmp_path / "root", tmp_path / "work"))
    assert (result["datasets"], result["measured"], result["missing"]) == (38, 38, [])
    (scored,) = result["models"]
    assert scored["scores"] == pytest.approx(SCORES["scores"], abs=1e-6)
    groups = scored["groups"] | {"Average": scored["average"]}
    assert groups == pytest.approx(SCORES["groups"], abs=1e-6)


def test_where_some_are_missing_there_is_no_average(tmp_path: Path, tiny_model: Path) -> None:
    root = tmp_path / "root"
    write_classified(root, "geode", 40, seed=1)
    write_classified(root, "voc2007", 8, seed=2)
    rows = [{"image": {"bytes": make_image(row), "path": None}, "caption": [f"a dog {row}"]} for row in range(12)]
    kinds = {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "caption": pa.list_(pa.string())}
    write_table(root, FLICKR, rows, kinds)
    write_winogavil(root)
    result = plain(suite(tiny_model, root, tmp_path / "work"))
    (scored,) = result["models"]
    counted = {
        "Flickr": "mean_recall@1",
        "WinoGAViL": "jaccard_score_10-12",
        "GeoDE": "acc_wg",
        "Pascal VOC 2007": "acc1",
    }
    assert result["counted"] == counted
    assert (result["measured"], len(result["missing"]), scored["average"]) == (4, 34, None)
    assert scored["mean_of_measured"] == pytest.approx(sum(scored["scores"].values()) / 4)
    assert set(scored["groups"].values()) == {None}
    by_name = {one["dataset"]: one["metrics"] for one in result["results"]}
    assert scored["scores"]["GeoDE"] == by_name["geode"]["acc_wg"] <= by_name["geode"]["acc1"]
    recalls = [by_name["flickr30k"][f"{kind}_retrieval_recall@1"] for kind in ("image", "text")]
    assert scored["scores"]["Flickr"] == pytest.approx(sum(recalls) / 2)

    with heard() as told, io.StringIO() as text:
        show_suite(suite(tiny_model, root, tmp_path / "work"), Console(file=text, width=80))
        shown = text.getvalue()
    assert sum("already holds" in line for line in told) == 4
    with heard() as told:
        run_suite(choose(tiny_model, root, tmp_path / "work", dry_run=True))
    assert sum("already holds" in line for line in told) == 4
    assert not any("Would measure" in line for line in told)
    assert "mean of these 4" in shown
    assert "4 of 38; missing: Caltech-101, CIFAR-10," in shown
    assert "average of all" not in shown


def test_what_a_copy_lacks_is_named(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClipcidError, match="holds none of the 38 data sets of datacomp"):
        suite(tiny_model, tmp_path, tmp_path / "work")
    write_classified(tmp_path / "a", "geode", 6, seed=1)
    (tmp_path / "a" / "wds_geode_test").rename(tmp_path / "a" / "wds_wilds-camelyon17_test")  # it has no slide 5
    write_classified(tmp_path / "b", "pets", 6, seed=1)
    (tmp_path / "b" / "wds_pets_test").rename(tmp_path / "b" / "wds_geode_test")
    with pytest.raises(
        ClipcidError, match=r"The \.npy of sample s0000000, of which number 0 is its group, cannot be read"
    ):
        suite(tiny_model, tmp_path / "b", tmp_path / "work")
    monkeypatch.setattr(measure, "_MOST_GROUPS", 1)
    with pytest.raises(ClipcidError, match=r"camelyon17: the images are of \d groups by their \.npy; at most 1 are"):
        suite(tiny_model, tmp_path / "a", tmp_path / "work")
    monkeypatch.undo()
    write_winogavil(tmp_path / "a", most=6)  # the metric that counts is of cues with 10 to 12
    result = suite(tiny_model, tmp_path / "a", tmp_path / "work")
    (scored,) = result.models
    assert (result.measured, result.without_metric, scored.scores["WinoGAViL"]) == (2, ["WinoGAViL"], None)
    assert scored.mean_of_measured == scored.scores["Camelyon17"]
    with io.StringIO() as text:
        show_suite(result, Console(file=text, width=300))
        assert "without the metric that counts: WinoGAViL. Without them there is no average" in text.getvalue()


def test_tables_name_no_files_outside_and_are_not_compressed(tmp_path: Path, tiny_model: Path) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret.png"
    secret.write_bytes(make_image(1))
    table = write_winogavil(root)
    rows = pa.ipc.open_stream(table.read_bytes()).read_all()
    records = rows.to_pylist()
    records[2]["candidate_images"][0] = {"bytes": None, "path": str(root / ".." / "secret.png")}
    named = pa.Table.from_pylist(records, rows.schema)
    for compression, message in (("zstd", "it is compressed"), (None, "")):
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with pa.OSFile(str(table), "wb") as file, pa.ipc.new_stream(file, rows.schema, options=options) as writer:
            writer.write_table(named)
        if message:
            with pytest.raises(ClipcidError, match=message):
                suite(tiny_model, root, tmp_path / "work")
    with heard() as told:
        result = suite(tiny_model, root, tmp_path / "work", max_bad_fraction=0.1)
    assert result.results[0].skipped == {"no_image": 1}
    assert "winogavil: cues left out, since an image of theirs cannot be used: 1." in told
    table.write_bytes(table.read_bytes()[:3000])
    with pytest.raises(ClipcidError, match="cannot be read as a table of the library datasets"):
        suite(tiny_model, root, tmp_path / "other")
