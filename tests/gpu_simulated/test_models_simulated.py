"""Steps that run a model on a GPU, simulated or real: every number format, every preset, resuming."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import shard_members, write_tar
from distill_data import STUDENT, losses
from simulation import KINDS, run_all, total

from clipcid_cli.algorithms.costs import describe_clip
from clipcid_cli.algorithms.losses.registry import PRESETS
from clipcid_cli.formats.embeddings.folder import open_embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.sidecar import sidecar_path

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
from clipcid_cli.algorithms.accumulation import exact_accumulation
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
    with exact_accumulation(torch.device(device)):
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
STEP = {"operators": 777, "waits": 0, "late_waits": 1, "prefetched": 15, "prefetch_waits": 0}
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
Objective.make_loss_batch, Objective.compare = watch(Objective.make_loss_batch), watch(Objective.compare)
TrainState.backward = watch(TrainState.backward)
"""


# What towers of twelve layers keep under CUDA's autocast, beside weights in 16 bits; the probabilities of the simulated
# attention, which a GPU's kernels do not keep, are a tenth of it.
KEPT = """
import open_clip, torch
from clipcid_cli.algorithms.costs import describe_clip
from clipcid_cli.runtime.models.pruned_forward import PrunedForward

vision = {"image_size": 64, "layers": 12, "width": 64, "head_width": 32, "patch_size": 16}
text = {"context_length": 32, "vocab_size": 1000, "width": 96, "heads": 3, "layers": 12}
config = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}
module = open_clip.CLIP(**config).to("cuda")
weights = {shape for parameter in module.parameters() for shape in (parameter.shape, parameter.shape[::-1])}
tokens = torch.tensor([[5] * 15 + [999] + [0] * 16] * 5)
kept = {}

def keep(tensor):
    held = getattr(tensor, "held", tensor)
    if tensor.shape not in weights:
        kept[held.untyped_storage().data_ptr()] = held.untyped_storage()
    return tensor

hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
with hooks, torch.autocast("cuda", dtype=torch.bfloat16):
    features = PrunedForward(module)(torch.zeros(5, 3, 64, 64, device="cuda"), tokens)
taken = sum(storage.nbytes() for storage in kept.values())
assert 1.0 < taken / (5 * describe_clip(config, 16).kept_bytes()) < 1.2
"""

# On the device texts come in few sizes, and are what they are in their own.
SIZES = """
import open_clip, torch
from clipcid_cli.runtime.models.pruned_forward import PrunedForward

vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
text = {"context_length": 77, "vocab_size": 1000, "width": 32, "heads": 2, "layers": 2}
module = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text).to("cuda")
sizes = []
module.transformer.resblocks[0].mlp.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
random = torch.Generator().manual_seed(0)
with torch.no_grad():
    for _ in range(8):
        tokens = torch.randint(1, 900, (512, 77), generator=random)
        ends = torch.randint(7, 16, (512, 1), generator=random)
        tokens = tokens.where(torch.arange(77) < ends, 0).scatter(1, ends, 999)
        few, own = (PrunedForward(module, in_few_sizes=kind).encode_texts(tokens) for kind in (None, False))
        assert float((few - own).abs().max()) < 1e-6
assert len(set(sizes[1::2])) >= 6
assert len(set(sizes[::2])) <= 4, sizes
"""

# Numbers of steps between which a budget is counted, and further operators of a step in each form: the average is one over
# all weights.
COUNTED = (2, 9)
FURTHER = {"adamw": 0, "muon": OPERATORS_OF_MUON, "ema": 1}

MEMORY = """
import torch
from clipcid_cli import cli
from clipcid_cli.errors import ClipcidError
from clipcid_cli.steps.distill import run

class Properties:
    total_memory = {total}

def fail(*_):
    raise ClipcidError("The disk is full.", "Free some space.")

torch.cuda.get_device_properties = lambda *_: Properties
torch.cuda.mem_get_info = lambda *_: ({free}, {total})
write, run.write = run.write, fail
for command in {commands}:
    assert cli.run(command) == 1, command
run.write = write
"""


@pytest.fixture(scope="module")
def alone(distill_prepared: Path, tiny_shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What runs did on the simulated device, by name: those whose operators are counted, and those short of memory."""
    place = tmp_path_factory.mktemp("alone")
    shutil.copytree(distill_prepared, place, dirs_exist_ok=True)
    rarely = ("--checkpoint-every", 100, "--eval-every", 100)
    forms = {
        "adamw": ("--optimizer", "adamw"),
        "muon": ("--optimizer", "muon"),
        "ema": ("--optimizer", "adamw", "--ema", 0.9),
    }
    commands: dict[str, tuple[object, ...]] = {"watch": ("-c", WATCH)}
    for form, options in forms.items():
        for steps in COUNTED:
            name = f"{form} {steps}"
            commands[name] = (*CID, *rarely, *options, "--steps", steps, "--name", name)
    chosen = ("distill", "--student", "student.json", "--preset", "clip", "--epochs", 1, "--device", "cuda")
    small = [str(word) for word in (*chosen, "--name", "small")]
    embedding = ["embed", str(tiny_shards), "--model", str(tiny_model), "--device", "cuda", "--out", "refused"]
    few = [[*embedding, "--views", "1"], [*small[:-1], "refused", "--batch-size", "8"]]
    commands["kept"] = ("-c", KEPT)
    commands["sizes"] = ("-c", SIZES)
    commands["grows"] = ("-c", "import os\nassert os.environ['PYTORCH_ALLOC_CONF'] == 'expandable_segments:True'")
    commands["refused"] = ("-c", MEMORY.format(total=20_000_000, free=100_000, commands=few))
    commands["small"] = ("-c", MEMORY.format(total=20_000_000, free=20_000_000, commands=[small]))
    commands["large"] = ("-c", MEMORY.format(total=80 * 2**30, free=80 * 2**30, commands=[]))
    commands["resumed"] = tuple(small)
    commands["new"] = (*chosen, "--name", "new")
    results = run_all("simulated", place, list(commands.values()))
    return place, dict(zip(commands, results, strict=True))


def test_budget_of_a_step(alone: Any) -> None:
    _, did = alone
    few, many = COUNTED
    for form, further in FURTHER.items():
        for kind, allowed in STEP.items():
            budget = allowed + (further if kind == "operators" else 0)
            taken = total(did[f"{form} {many}"][kind]) - total(did[f"{form} {few}"][kind])
            assert taken / (many - few) <= budget, (form, kind)
    assert did["ema 9"]["operators"]["aten::_foreach_lerp_"] == 9


def test_a_step_is_timed_on_the_device_and_compared_with_its_data_sheet(alone: Any) -> None:
    place, _ = alone
    lines = (place / WORK / "distill" / "adamw 9" / "train.jsonl").read_text().splitlines()
    clip = describe_clip(STUDENT)
    for line in map(json.loads, lines):
        assert line["seconds_forward_backward"] > line["seconds_optimizer"] > 0
        assert line["mfu"] == pytest.approx(line["samples_per_second"] * clip.training_operations / 989e12, rel=0.01)


def test_what_does_not_fit_is_refused_before_the_work(alone: Any) -> None:
    place, did = alone
    told = " ".join(did["refused"]["stderr"].split())
    assert re.search(r"Encoding 256 images at once takes 0\.\d+ GB at least, and this GPU has 0\.0001 GB free", told)
    assert re.search(r"Training on 8 samples a GPU takes 0\.\d+ GB at least, and this GPU has 0\.0001 GB free", told)
    assert not list((place / WORK / "distill" / "refused").glob("**/*.pt"))


def test_the_batch_follows_the_memory_and_stays_on_another_gpu(alone: Any) -> None:
    place, _ = alone
    sizes = {}
    for name in ("small", "new"):
        sidecar = sidecar_path(place / WORK / "distill" / name, "distill")
        sizes[name] = json.loads(sidecar.read_text())["settings"]["batch_size"]
    assert sizes == {"small": 16, "new": 24}


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
