"""The commands of fixes can be pasted: they name the model, the data, the work directory, and no flag at its default."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest

from clipcid_cli.errors import ClipcidError, command_line
from clipcid_cli.formats.atomic import write_json, write_text
from clipcid_cli.formats.embeddings.command import DEFAULTS, data_command, texts_command
from clipcid_cli.formats.work_directory import BALANCE_FLAGS, CLUSTER_FLAGS, WorkDirectory, remake_clusters
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.distill.augmented.requested import require_requested
from clipcid_cli.steps.embed.ensure import embed_images_first
from clipcid_cli.steps.model_identity import cluster_with, embed_with
from clipcid_cli.steps.settings.balance import BalanceSettings
from clipcid_cli.steps.settings.cluster import ClusterSettings
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.embed import EmbedSettings
from clipcid_cli.steps.settings.shared import DEFAULT_WORK


def sidecar(**settings: object) -> dict:
    made = {"text": True, "keys": "sample", "fast_decode": False, "batch_size": 64, "precision": "fp32"}
    return {"settings": made | settings, "model": {"spec": "ViT-B-32:laion2b_s34b_b79k"}}


VIEWS = {"views": 4, "view_kind": ["crop"], "crop_scale": 0.9, "color_jitter": 0.0, "gray_probability": 0.0, "seed": 0}


@pytest.mark.parametrize(
    ("made", "more", "flags"),
    [
        ({}, {}, ""),
        ({"keys": "shard", "fast_decode": True, "text": False}, {}, " --no-text --fast-decode --keys shard"),
        (VIEWS, {}, " --views 4"),
        (VIEWS | {"view_kind": ["strong", "mix"], "seed": 3}, {}, " --views 4 --view-kind strong,mix --seed 3"),
        (VIEWS, {"text_variants": 8}, " --views 4 --text-variants 8"),
        ({"text_variants": 2, "seed": 5, "text_variant_rules": 1}, {"text_variants": 8}, " --text-variants 8 --seed 5"),
    ],
)
def test_a_command_has_what_was_made_and_what_is_missing(made: dict, more: dict, flags: str) -> None:
    words = data_command(Path("some where"), sidecar(**made), **more).split(" --")
    assert words[0] == "clipcid embed DATA"
    shared = "--model ViT-B-32:laion2b_s34b_b79k --precision fp32 --batch-size 64"
    expected = f" {shared} --out 'some where'{flags} --overwrite".split(" --")[1:]
    assert sorted(words[1:]) == sorted(expected)


def test_others_are_not_replaced() -> None:
    assert data_command(Path("other"), None, text_variants=8) == "clipcid embed DATA --model MODEL --text-variants 8"


def test_texts() -> None:
    assert texts_command(None) == "clipcid embed --texts FILE --model MODEL"
    found = texts_command("ViT-L-14", work=Path("w"), overwrite=True)
    assert sorted(found.split(" --")) == sorted(
        ["clipcid embed", "texts FILE", "model ViT-L-14", "work w", "overwrite"]
    )


def test_the_data_and_its_columns_are_those_of_the_sidecar() -> None:
    described = {"spec": "my list.csv", "keys": "sample", "image": "url", "caption": "title", "key": "id"}
    words = data_command(Path("emb"), sidecar() | {"data": described})
    assert words == (
        "clipcid embed 'my list.csv' --model ViT-B-32:laion2b_s34b_b79k --precision fp32 --batch-size 64 "
        "--image-column url --key-column id --out emb --overwrite"
    )
    assert data_command(Path("emb"), sidecar() | {"data": described}, "my list.csv") == words
    other = data_command(Path("emb"), sidecar() | {"data": described}, "other.csv", key_column="number")
    assert other.startswith("clipcid embed other.csv --model")
    assert " --key-column number " in other
    assert "--image-column" not in other


def test_the_data_of_a_run_is_embedded_with_another_model_as_the_run_reads_it() -> None:
    run = DistillSettings(data="list.csv", student="s", keys="shard", image_column="url", work=Path("w"))
    model = parse_model("ViT-B-32:laion2b_s34b_b79k")
    expected = f"clipcid embed list.csv --model {model.spec} --keys shard --image-column url --work w"
    assert embed_with(model, run) == expected
    assert f"Run: {expected}\n" in cluster_with(model, run)
    made = {"data": {"spec": "list.csv", "keys": "shard", "image": "url", "caption": "title", "key": "key"}}
    found = embed_with(model, DistillSettings(student="s", work=Path("w")), made)
    assert sorted(found.split(" --")) == sorted(expected.split(" --"))


def test_a_run_whose_data_is_named_names_its_columns_in_the_command_for_what_is_missing() -> None:
    run = DistillSettings(data="list.csv", student="s", image_column="url", views="stored")
    with pytest.raises(ClipcidError, match="holds no views") as found:
        require_requested(run, Path("emb"), sidecar())
    assert "run: clipcid embed list.csv --model" in found.value.fix
    assert " --image-column url " in found.value.fix


def test_images_alone_are_embedded_by_a_command_of_its_own() -> None:
    request = EmbedSettings(data="a b.csv", image_column="url", caption_column="text", work=Path("w"))
    assert embed_images_first(request, parse_model("ViT-B-32:openai")).endswith(
        ": clipcid embed 'a b.csv' --model ViT-B-32:openai --image-column url --work w --no-text --overwrite"
    )


@pytest.mark.parametrize(
    ("flags", "settings"),
    [(DEFAULTS, EmbedSettings), (BALANCE_FLAGS, BalanceSettings), (CLUSTER_FLAGS, ClusterSettings)],
)
def test_the_values_that_need_no_flag_are_the_defaults(flags: dict, settings: type) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    for name, value in flags.items():
        assert value == (
            ("crop",)
            if name == "view_kind"
            else None
            if settings is BalanceSettings and name == "seed"  # recorded where the choice is random
            else defaults[name]
        )


def test_a_work_directory_is_named_unless_it_is_the_default_one() -> None:
    assert command_line("cluster", work=DEFAULT_WORK) == "clipcid cluster"
    assert (
        command_line("cluster", work=Path("my work"), overwrite=True) == "clipcid cluster --work 'my work' --overwrite"
    )


def test_clusters_are_made_again_as_they_were() -> None:
    made = {"features": "joint", "num_clusters": 3, "iterations": 20, "train_rows": None, "seed": 0, "images": 18}
    of = {"settings": made, "embeddings": "embeddings/m"}
    found = remake_clusters(Path("w/clusters"), of, Path("w"))
    assert found == (
        "Run: clipcid cluster --num-clusters 3 --features joint --embeddings w/embeddings/m --work w --overwrite"
    )
    of["flags"] = {"num_clusters": None, "keys": "shard", "npz_array": "l14_img"}
    flags = shlex.split(remake_clusters(Path("w/clusters"), of, Path("w")))
    assert "--num-clusters" not in flags
    assert {"--keys", "shard", "--npz-array", "l14_img"} < set(flags)
    assert remake_clusters(DEFAULT_WORK / "clusters", {}, DEFAULT_WORK) == "Run: clipcid cluster --overwrite"


@pytest.mark.parametrize(
    ("recorded", "flags"),
    [
        (None, " --keep-list none"),  # a list that exists by now would take other images
        ({"path": "my lists/a.parquet", "size": 1, "hash": "h"}, " --keep-list 'my lists/a.parquet'"),
        ({"path": "w/balance/keep.parquet", "size": 1, "hash": "h"}, ""),
    ],
)
def test_clusters_are_made_again_of_the_same_images(recorded: dict | None, flags: str) -> None:
    found = remake_clusters(Path("w/clusters"), {"keep_list": recorded}, Path("w"))
    assert found == f"Run: clipcid cluster --work w{flags} --overwrite"


def test_clusters_elsewhere_are_made_again_by_no_command() -> None:
    for work in (Path("w"), None):
        assert "clipcid cluster" not in remake_clusters(Path("backup/clusters-2024"), {}, work)


def test_an_edited_keep_list_is_made_again_as_it_was(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / "my work")
    write_text(work.balance / "keep.parquet", "edited")
    output = {"path": "keep.parquet", "size": 1, "time": 1, "hash": "blake2b:1"}
    settings = {
        "keep": 0.5,
        "threshold": None,
        "linkage": "star",
        "select": "central",
        "seed": None,
        "max_per_cluster": 3,
        "clusters": "a hash",
        "against": [["a", "1"]],
    }
    flags = {"clusters": "other", "keys": "sample", "npz_array": None}
    content = {"format_version": 1, "settings": settings, "flags": flags, "outputs": [output]}
    write_json(work.balance / "balance.json", content)
    with pytest.raises(ClipcidError) as found:
        work.find_keep_list()
    named, again = found.value.fix.split("\n")
    assert named == f"Name the list as it is now: --keep-list '{work.balance / 'keep.parquet'}'"
    flags = f"--keep 0.5 --max-per-cluster 3 --linkage star --clusters other --work '{work.path}' --against a"
    assert again == f"Or make it again: clipcid balance {flags} --overwrite"
