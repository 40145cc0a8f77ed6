"""What steps take on GPUs that are not there: figures that follow from one another, and those of LAION400M."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from clipcid_cli.commands.gpu_plan import show
from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.devices import DEVICES, Device
from clipcid_cli.steps.gpu_plan import GpuPlan, run
from clipcid_cli.steps.settings.balance import BalanceSettings
from clipcid_cli.steps.settings.cluster import ClusterSettings
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.embed import EmbedSettings
from clipcid_cli.steps.training_time import describe_model, step_seconds

LAION, KEPT = 400_000_000, 225_200_000


def plan_training(**settings: Any) -> GpuPlan:
    given = {"student": "ViT-B-32", "teacher": ("ViT-L-14",), "images": KEPT, "gpus": "8xH100", "dry_run": True}
    return run(DistillSettings(**given | settings))


def test_figures_of_a_training_follow_from_one_another() -> None:
    plan = plan_training(price=2.5, batch_size=8192, epochs=2)
    assert plan.steps is not None
    assert plan.seconds_per_step is not None
    assert plan.images_per_second is not None
    assert plan.decode_cores is not None
    shown = plan.steps * 8192
    assert shown <= 2 * 0.99 * KEPT < shown + 8192
    assert plan.hours * 3600 == pytest.approx(plan.steps * plan.seconds_per_step)
    assert plan.images_per_second == pytest.approx(8192 / plan.seconds_per_step)
    assert plan.cost == pytest.approx(8 * 2.5 * plan.hours)
    assert plan.bytes_read == pytest.approx(shown * (25_000 + 2 * 2 * 768))
    assert plan.read_bytes_per_second == pytest.approx(plan.bytes_read / plan.hours / 3600)
    assert 500 < plan.images_per_second / plan.decode_cores < 550
    assert plan.peak_share == pytest.approx(plan.operations / plan.hours / 3600 / (8 * 989e12))


def test_the_size_of_images_is_called_assumed_on_screen() -> None:
    console = Console(file=io.StringIO(), width=120)
    show(run(EmbedSettings(model="ViT-B-32", images=1000, gpus="8xH100", dry_run=True)), console)
    assert "25 MB read at 25 kB an image (assumed)" in console.file.getvalue()


def test_the_batch_that_fits_fits_and_a_larger_one_does_not() -> None:
    fitting = plan_training().largest_batch_per_gpu
    assert fitting is not None
    assert 1_000 < fitting < 5_000
    assert plan_training(batch_size=8 * fitting).memory_bytes <= 0.9 * 80e9
    assert plan_training(batch_size=8 * fitting + 8).memory_bytes > 0.9 * 80e9
    accumulated = plan_training(accum_freq=4).largest_batch_per_gpu
    assert accumulated is not None
    assert 3.8 * fitting < accumulated < 4 * fitting  # all pixels are there, whatever the parts
    recomputed = plan_training(grad_checkpointing=True).largest_batch_per_gpu
    assert recomputed is not None
    assert recomputed > 4 * fitting


def test_the_teachers_text_tower_is_held_and_not_trained() -> None:
    whole, image = plan_training(), plan_training(text_tower="teacher")
    assert image.steps == whole.steps
    assert 0.7 * whole.operations < image.operations < 0.9 * whole.operations
    # The text towers of ViT-L-14 and ViT-B-32 have 123.7 and 63.4 M parameters.
    assert image.disk_bytes == pytest.approx(whole.disk_bytes + 3 * (4 * 123.7e6 - 12 * 63.4e6), rel=0.01)


@pytest.mark.parametrize(
    ("longer", "shorter"),
    [
        ({"gpus": "8xA100"}, {"gpus": "8xH100"}),
        ({"gpus": "8xH100"}, {"gpus": "8xH200"}),
        ({"student": "ViT-B-16"}, {"student": "ViT-B-32"}),
        ({"preset": "cid"}, {"preset": "clip"}),  # a million centroids are compared
        ({"batch_size": 512}, {"batch_size": 4096}),  # Muon's work is each step's
        ({"online_teacher": True}, {}),
        ({"grad_checkpointing": True}, {}),
    ],
)
def test_what_takes_longer(longer: dict[str, Any], shorter: dict[str, Any]) -> None:
    assert plan_training(**longer).hours > 1.01 * plan_training(**shorter).hours
    assert plan_training(**longer, images=KEPT * 2).hours == pytest.approx(2 * plan_training(**longer).hours, rel=0.01)


def test_the_cluster_loss_costs_a_gpu_less_than_float32() -> None:
    clip = describe_model("ViT-B-32")

    def added(device: Device) -> float:
        with_centroids = step_seconds(clip, device, 4096, 32_768, candidates=100_000)
        return with_centroids - step_seconds(clip, device, 4096, 32_768)

    h100 = DEVICES["H100"]
    assert added(h100) < 0.7 * added(dataclasses.replace(h100, is_gpu=False))


def test_laion400m_takes_about_what_the_page_on_scale_says() -> None:
    gpus: dict[str, Any] = {"gpus": "8xH100", "dry_run": True}
    training = plan_training()
    embedding = run(EmbedSettings(model="ViT-L-14", images=LAION, **gpus))
    clusters = run(ClusterSettings(num_clusters=1_000_000, images=KEPT, **gpus))
    search = run(BalanceSettings(keep=0.563, images=LAION, **gpus))
    assert 24 < training.hours < 40
    assert 5 < embedding.hours < 9
    assert embedding.disk_bytes == pytest.approx(1.23e12, rel=0.01)
    assert 1 < clusters.hours < 2.5
    assert 6 < search.hours < 10
    assert search.operations == pytest.approx(1.2e20, rel=0.03)
    views = run(EmbedSettings(model="ViT-L-14", views=4, view_kind=("mix",), text_variants=4, images=LAION, **gpus))
    assert views.hours == pytest.approx(5 * embedding.hours)
    assert 6.0e12 < views.disk_bytes < 6.6e12


def test_images_and_width_are_those_of_the_work_directory(distill_prepared: Path) -> None:
    work = distill_prepared / "clipcid-work"
    assert plan_training(images=None, work=work, teacher=()).images == 24
    search = run(BalanceSettings(keep=0.5, gpus="H100", dry_run=True, work=work))
    assert search.operations == 32 * 24 * 23  # rows of width 32


def test_the_model_is_that_of_the_embeddings_and_the_batch_that_of_the_run(distill_prepared: Path) -> None:
    embedding = run(EmbedSettings(gpus="H100", dry_run=True, work=distill_prepared / "clipcid-work"))
    assert embedding.disk_bytes == 24 * 2 * 2 * 32  # rows of width 32, of images and texts
    assert plan_training(images=1_000_000, val_fraction=0).batch_size == 1024, "20,000 steps are left"


def test_data_is_counted_where_there_is_no_work(tiny_shards: Path) -> None:
    assert run(EmbedSettings(data=str(tiny_shards), gpus="H100", dry_run=True)).images == 24


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dry_run": False}, "--gpus 8xH100 plans a run"),
        ({"gpus": None}, "--images was given, but no --gpus"),
        ({"gpus": "8xH99"}, "--gpus cannot be '8xH99'"),
        ({"images": None}, "does not say how many images"),
        ({"student": "RN50"}, "operations of this model are not known"),
        ({"student": "hf-hub:org/name"}, "not known before it is downloaded"),
    ],
)
def test_what_cannot_be_planned_is_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ClipcidError, match=message):
        plan_training(**settings)


def test_without_a_teacher_no_rows_are_read() -> None:
    plan = plan_training(teacher=("none",), steps=100, batch_size=4096)
    assert plan.bytes_read == 100 * 4096 * 25_000


def test_partitions_leave_gpus_a_minute_of_products_and_the_host_less_than_ten() -> None:
    settings: dict[str, Any] = {"keep": 0.563, "gpus": "8xH100", "images": 330_000_000, "dry_run": True}
    partitioned, exact = (run(BalanceSettings(neighbors=kind, **settings)) for kind in ("partitioned", "exact"))
    assert partitioned.operations < exact.operations / 1000
    assert partitioned.operations / (8 * 0.6 * 989e12) < 60
    assert 7 < 60 * partitioned.hours < 10
    assert partitioned.host_hours is not None
    assert 0 < partitioned.hours - partitioned.host_hours < 60 / 3600
    assert exact.host_hours is None
