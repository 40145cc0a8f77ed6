"""The commands of fixes can be pasted: they name the model, the data, the work directory, and no flag at its default."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest
from sidecars import DATA, make_sidecar

from clipcid_cli.errors import DEFAULT_WORK, ClipcidError, command_line
from clipcid_cli.formats.atomic import write_json, write_text
from clipcid_cli.formats.embeddings.command import DEFAULTS, data_command, texts_command
from clipcid_cli.formats.sidecar import BalanceSidecar, ClusterSidecar, DataSpec, EmbedSidecar
from clipcid_cli.formats.work_directory import WorkDirectory, remake_clusters
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.models import cluster_with, embed_with
from clipcid_cli.steps.settings.balance import BalanceSettings
from clipcid_cli.steps.settings.cluster import ClusterSettings
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.embed import EmbedSettings
from clipcid_cli.steps.settings.shared import given_flags

PLACE = Path("some where")
SHARED = "--model ViT-B-32:laion2b_s34b_b79k --precision fp32 --batch-size 64 --out 'some where' --overwrite"
LIST = {"spec": "my list.csv", "keys": "sample", "image": "url", "caption": "title", "key": "id"}
VIEWS = {"views": 4, "view_kind": ["crop"], "crop_scale": 0.9, "color_jitter": 0.0, "gray_probability": 0.0, "seed": 0}


def sidecar(data: dict | None = None, **settings: object) -> EmbedSidecar:
    plain = make_sidecar(EmbedSidecar)
    entries = {
        "settings": plain["settings"] | settings,
        "data": data or DATA | {"keys": settings.get("keys", "sample")},
        "model": plain["model"] | {"spec": "ViT-B-32:laion2b_s34b_b79k"},
    }
    return msgspec.convert(plain | entries, EmbedSidecar)


def clusters(**entries: object) -> ClusterSidecar:
    return msgspec.convert(make_sidecar(ClusterSidecar, **entries), ClusterSidecar)


def assert_says(command: str, expected: str) -> None:
    """Compare commands but for the order of their flags."""
    assert sorted(command.split(" --")) == sorted(expected.split(" --"))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (data_command(PLACE, sidecar()), f"data {SHARED}"),
        (
            data_command(PLACE, sidecar(keys="shard", fast_decode=True, text=False)),
            f"data {SHARED} --no-text --fast-decode --keys shard",
        ),
        (data_command(PLACE, sidecar(**VIEWS)), f"data {SHARED} --views 4"),
        (
            data_command(PLACE, sidecar(**VIEWS | {"view_kind": ["strong", "mix"], "seed": 3})),
            f"data {SHARED} --views 4 --view-kind strong,mix --seed 3",
        ),
        (data_command(PLACE, sidecar(**VIEWS), text_variants=8), f"data {SHARED} --views 4 --text-variants 8"),
        (
            data_command(PLACE, sidecar(text_variants=2, seed=5, text_variant_rules=1), text_variants=8),
            f"data {SHARED} --text-variants 8 --seed 5",
        ),
        (data_command(PLACE, sidecar(LIST)), f"'my list.csv' {SHARED} --image-column url --key-column id"),
        (
            data_command(PLACE, sidecar(LIST), "my list.csv"),
            f"'my list.csv' {SHARED} --image-column url --key-column id",
        ),
        (
            data_command(PLACE, sidecar(LIST), "other.csv", key_column="number"),
            f"other.csv {SHARED} --key-column number",
        ),
        # What clipcid did not make is not replaced.
        (data_command(PLACE, None, text_variants=8), "DATA --model MODEL --text-variants 8"),
        (texts_command(None), "--texts FILE --model MODEL"),
        (
            texts_command("ViT-L-14", work=Path("w"), overwrite=True),
            "--texts FILE --model ViT-L-14 --work w --overwrite",
        ),
    ],
)
def test_a_command_has_what_was_made_and_what_is_missing(found: str, expected: str) -> None:
    assert_says(found, f"clipcid embed {expected}")


def test_the_data_of_a_run_is_embedded_with_another_model_as_the_run_reads_it() -> None:
    run = DistillSettings(data="list.csv", student="s", keys="shard", image_column="url", work=Path("w"))
    model = parse_model("ViT-B-32:laion2b_s34b_b79k")
    expected = f"clipcid embed list.csv --model {model.spec} --keys shard --image-column url --work w"
    assert embed_with(model, run) == expected
    assert f"Run: {expected}\n" in cluster_with(model, run)
    made = DataSpec("list.csv", "shard", "url", "title", "key")
    assert_says(embed_with(model, DistillSettings(student="s", work=Path("w")), made), expected)


def test_the_values_that_need_no_flag_are_the_defaults() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(EmbedSettings)} | {"view_kind": ("crop",)}
    assert {name: defaults[name] for name in DEFAULTS} == DEFAULTS


def test_what_a_command_needs_to_make_the_same_again_is_recorded() -> None:
    given = BalanceSettings(
        data="d", keep=0.5, linkage="star", against=("a", "b"), against_threshold=0.1, embeddings=Path("e"), quiet=True
    )
    assert given_flags(given) == {
        "keep": 0.5,
        "against": ["a", "b"],
        "against_threshold": 0.1,
        "linkage": "star",
        "embeddings": "e",
    }
    assert given_flags(ClusterSettings(work=Path("w"), workers=0, overwrite=True)) == {}
    assert command_line("cluster", work=DEFAULT_WORK) == "clipcid cluster"


@pytest.mark.parametrize(
    ("recorded", "flag"),
    [
        (None, " --keep-list none"),  # a list that exists by now would take other images
        ({"path": "my lists/a.parquet", "size": 1, "hash": "h"}, " --keep-list 'my lists/a.parquet'"),
        ({"path": "w/balance/keep.parquet", "size": 1, "hash": "h"}, ""),
    ],
)
def test_clusters_are_made_again_as_they_were_of_the_same_images(recorded: dict | None, flag: str) -> None:
    flags = {"num_clusters": 3, "features": "joint", "keep_list": "other", "embeddings": "other"}
    found = remake_clusters(Path("w/clusters"), clusters(flags=flags, keep_list=recorded), Path("w"))
    assert found == (
        "Run: clipcid cluster --num-clusters 3 --features joint --embeddings w/embeddings/tiny --work w"
        f"{flag} --overwrite"
    )
    assert "clipcid cluster" not in remake_clusters(Path("backup/clusters-2024"), clusters(), Path("w"))


def test_an_edited_keep_list_is_made_again_as_it_was(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / "my work")
    write_text(work.balance / "keep.parquet", "edited")
    output = {"path": "keep.parquet", "size": 1, "time": 1, "hash": "blake2b:1"}
    flags = {"keep": 0.5, "against": ["a"], "linkage": "star", "max_per_cluster": 3, "clusters": "other"}
    write_json(work.balance / "balance.json", make_sidecar(BalanceSidecar, flags=flags, outputs=[output]))
    with pytest.raises(ClipcidError) as found:
        work.find_keep_list()
    named, again = found.value.fix.split("\n")
    assert named == f"Name the list as it is now: --keep-list '{work.balance / 'keep.parquet'}'"
    told = "--keep 0.5 --against a --linkage star --max-per-cluster 3 --clusters other"
    place = f"--embeddings '{work.path / 'embeddings/tiny'}' --work '{work.path}'"
    assert again == f"Or make it again: clipcid balance {told} {place} --overwrite"
