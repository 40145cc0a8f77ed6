"""Steps that run a model on a GPU, simulated or real: every number format, every preset, resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import shard_members, write_tar
from distill_data import losses
from simulation import KINDS, run_all, total

from clipcid_cli.algorithms.losses.registry import PRESETS
from clipcid_cli.formats.embeddings.folder import open_embeddings
from clipcid_cli.formats.embeddings.rows import Kind

WORK = "clipcid-work"
TRAIN = ("distill", "--student", "student.json", "--batch-size", 8, "--val-fraction", 0.2, "--device", "cuda")
BOTH = ("--cluster-towers", "both")
CID = (*TRAIN, "--preset", "cid")
# Where a gradient is 0 but for rounding, Adam moves a weight by the whole rate, in either direction.
SLOW = ("--lr", 1e-4)
FORMS = {
    "fp16": ("--precision", "fp16", "--accum-freq", 2, "--grad-checkpointing"),
    "online": ("--online-teacher",),
}


@pytest.fixture(scope="module", params=KINDS)
def trained(
    request: pytest.FixtureRequest, distill_prepared: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Runs with every preset, and in other forms; the tiny teacher's embeddings and clusters were made on the CPU."""
    place = tmp_path_factory.mktemp("trained")
    shutil.copytree(distill_prepared, place, dirs_exist_ok=True)
    commands: list[tuple[object, ...]] = [
        (*TRAIN, "--steps", 4, "--preset", preset, "--name", preset, *(BOTH if "cluster" in PRESETS[preset] else ()))
        for preset in PRESETS
    ]
    commands += [
        (*CID, "--steps", 4, "--teacher", tiny_model, "--name", name, *options) for name, options in FORMS.items()
    ]
    commands += [
        (*CID, *SLOW, "--steps", 4, "--precision", "fp32", "--name", f"fp32-{device}", "--device", device)
        for device in ("cpu", "cuda")
    ]
    run_all(request.param, place, commands)
    return place


@pytest.mark.parametrize("name", [*PRESETS, *FORMS])
def test_every_form_trains(name: str, trained: Path) -> None:
    lines = losses(trained / WORK / "distill" / name)
    assert [line["step"] for line in lines][-1] == 4
    for line in lines:
        assert all(np.isfinite(value) for value in line.values() if isinstance(value, float))


def test_fp32_losses_are_those_of_a_cpu(trained: Path, request: pytest.FixtureRequest) -> None:
    # A GPU adds in another order.
    tolerance = 1e-5 if request.node.callspec.params["trained"] == "simulated" else 1e-4
    there, here = (losses(trained / WORK / "distill" / f"fp32-{device}") for device in ("cpu", "cuda"))
    for one, other in zip(there, here, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, float):
                assert other[name] == pytest.approx(value, rel=tolerance), name


# A cluster loss near its optimum is the difference of two large terms. Each centroid has three others beside it, and the
# features lie at centroids.
FITTED = """
import math
import torch
from torch.nn.functional import normalize
from clipcid_cli.algorithms.losses import batch
from clipcid_cli.algorithms.losses.batch import ClusterTargets
from clipcid_cli.algorithms.losses.cluster import soft_label_cross_entropy

batch.BLOCK_ENTRIES = batch._GPU_BLOCK_ENTRIES = 16 * 1_500  # three blocks
random = torch.Generator().manual_seed(0)
alone = normalize(torch.randn(1024, 256, generator=random), dim=1)
beside = [normalize(alone + 0.4 * normalize(torch.randn(1024, 256, generator=random), dim=1), dim=1) for _ in range(3)]
centroids = torch.cat([alone, *beside])
correction = (torch.arange(4096) >= 2048) * math.log(9.0)
label = torch.arange(0, 1024, 64)

def gradient(device, dtype):
    columns = (centroids, correction, centroids[label])
    targets = ClusterTargets(*(column.to(device, dtype) for column in columns))
    features = centroids[label].to(device, dtype).requires_grad_()
    loss = soft_label_cross_entropy(features, targets, torch.tensor(100.0).to(device, dtype))
    (loss / 16).backward()
    return loss.detach().cpu().double() / 16, features.grad.cpu().double()

factors, multiply = set(), torch.mm

def watched(left, right, **options):
    factors.update([left.dtype, right.dtype])
    return multiply(left, right, **options)

loss, exact = gradient("cpu", torch.float64)
torch.mm = watched
assert loss < 0.05
computed, found = gradient("cuda", torch.float32)
assert abs(computed - loss) < 1e-3
assert (found - exact).norm() < 0.002 * exact.norm()
assert factors == {torch.float16}
"""


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_a_fitted_cluster_loss(kind: str, tmp_path: Path) -> None:
    run_all(kind, tmp_path, [("-c", FITTED)])


# Of a logged step of preset cid with AdamW, and towers of one layer: raising one of these numbers needs a reason.
# The pixels are copied beforehand, too. What Muon adds depends on how many shapes the matrices have, not on the number of
# layers.
# The device never runs out of work while the host waits: a step is read when the next one has been launched.
# Of the operators, 73 cut the factors of the cluster loss into parts, whose products take a fifth of the time of float32.
STEP = {"operators": 776, "waits": 0, "late_waits": 1, "prefetched": 15, "prefetch_waits": 0}
OPERATORS_OF_MUON = 435


# Products of the losses are in float32, also where TF32 is forced on.
WATCH = """
import torch
from clipcid_cli.steps.distill.objective import Objective
from clipcid_cli.training.train_state import TrainState

def watch(function):
    def watched(*arguments):
        assert not torch.backends.cuda.matmul.allow_tf32, function
        return function(*arguments)
    return watched

assert torch.backends.cuda.matmul.allow_tf32
Objective.gather, Objective.compare = watch(Objective.gather), watch(Objective.compare)
TrainState.backward = watch(TrainState.backward)
"""


def test_budget_of_a_step(distill_place: Path) -> None:
    rarely = ("--checkpoint-every", 100, "--eval-every", 100)
    forms = {
        "adamw": ("--optimizer", "adamw"),
        "muon": ("--optimizer", "muon"),
        "ema": ("--optimizer", "adamw", "--ema", 0.9),
    }
    trained = [
        (*CID, *rarely, *options, "--steps", steps, "--name", f"{form} {steps}")
        for form, options in forms.items()
        for steps in (2, 9)
    ]
    _, *counted = run_all("simulated", distill_place, [("-c", WATCH), *trained])
    # The average is one operator over all weights, and waits for nothing.
    for few, many, further in zip(counted[::2], counted[1::2], (0, OPERATORS_OF_MUON, 1), strict=True):
        for kind, allowed in STEP.items():
            budget = allowed + (further if kind == "operators" else 0)
            assert (total(many[kind]) - total(few[kind])) / 7 <= budget, kind
    assert counted[-1]["operators"]["aten::_foreach_lerp_"] == 9


@pytest.fixture(scope="module", params=KINDS)
def evaluated(
    request: pytest.FixtureRequest, tiny_model: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Embeddings in three number formats beside a CPU's, and the evaluations of the tiny model on both devices."""
    place = tmp_path_factory.mktemp("evaluated")
    for split, first in (("train", 0), ("test", 40)):
        write_tar(place / "labeled" / split / "00000.tar", shard_members(first, 40, captions=False, classes=4))
    (place / "names.txt").write_text("red\ngreen\nblue\npale\n")
    commands: list[tuple[object, ...]] = []
    for device, precision in (("cpu", "fp32"), ("cuda", "fp32"), ("cuda", "bf16"), ("cuda", "fp16")):
        form = ("--device", device, "--precision", precision)
        name = f"{device}-{precision}"
        commands.append(("embed", tiny_shards, "--model", tiny_model, *form, "--out", name, "--views", 1))
        commands.append(
            ("eval-zeroshot", tiny_model, "labeled/test", "--classnames", "names.txt", *form, "--work", name, "--json")
        )
        commands.append(("eval-linear", tiny_model, "labeled", *form, "--work", name, "--json"))
    results = run_all(request.param, place, commands)
    scores = {
        f"{result['command'][0]}-{result['command'][result['command'].index('--work') + 1]}": json.loads(
            result["stdout"]
        )
        for result in results
        if "--json" in result["command"]
    }
    (place / "scores.json").write_text(json.dumps(scores))
    return place


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_rows_agree_with_a_cpu(precision: str, evaluated: Path) -> None:
    there, here = open_embeddings(evaluated / "cpu-fp32"), open_embeddings(evaluated / f"cuda-{precision}")
    for one, other in (
        (there.rows(Kind.IMAGES), here.rows(Kind.IMAGES)),
        (there.rows(Kind.TEXTS), here.rows(Kind.TEXTS)),
    ):
        a, b = (rows.read(0, 24).astype(np.float64) for rows in (one, other))
        cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert cosine.min() > (0.99999 if precision == "fp32" else 0.999)


@pytest.mark.parametrize("step", ["eval-zeroshot", "eval-linear"])
def test_scores_agree_with_a_cpu(step: str, evaluated: Path) -> None:
    scores: dict[str, Any] = json.loads((evaluated / "scores.json").read_text())
    assert scores[f"{step}-cuda-fp32"]["metrics"] == scores[f"{step}-cpu-fp32"]["metrics"]
