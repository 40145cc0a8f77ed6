"""Every loss against a float64 formula written with NumPy alone, its gradient, and its behaviour at known points."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from clipcid_cli.algorithms.losses import row_blocks
from clipcid_cli.algorithms.losses.batch import ClusterTargets, LossBatch
from clipcid_cli.algorithms.losses.cluster import cluster_targets, draw_candidates, soft_label_cross_entropy
from clipcid_cli.algorithms.losses.registry import LOSSES, PRESETS, load_loss, select_losses

B, D, K, M = 7, 5, 12, 3
SCALE, STUDENT_SCALE, TEACHER_SCALE = 9.0, 14.0, 40.0
NAMES = tuple(LOSSES)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture
def rows() -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    names = ("s", "v", "t", "u")
    found = {name: unit(random.normal(size=(B, D))) for name in names}
    found["C"] = unit(random.normal(size=(K, D)))
    found["top"] = np.stack([random.permutation(K)[:M] for _ in range(B)])
    found["similarity"] = -np.sort(-random.uniform(0, 1, (B, M)), axis=1)
    found["caption_top"] = np.stack([random.permutation(K)[:M] for _ in range(B)])
    return found


def make_batch(rows: dict[str, np.ndarray], both: bool = False) -> LossBatch:
    tensors = {name: torch.from_numpy(rows[name]) for name in "svtu"}

    def targets(top: np.ndarray) -> ClusterTargets:
        candidates = draw_candidates(np.arange(K), K, ratio=0.1, minimum=K, seed=0)
        made = cluster_targets(
            candidates, torch.from_numpy(rows["C"]), top, rows["similarity"], temperature=0.2, label_share=0.5
        )
        return dataclasses.replace(
            made, log_correction_S=made.log_correction_S.double(), weights_Bm=made.weights_Bm.double()
        )

    return LossBatch(
        image_Bd=tensors["s"],
        text_Bd=tensors["v"],
        student_scale=torch.tensor(STUDENT_SCALE, dtype=torch.float64),
        image_BD=tensors["s"],
        text_BD=tensors["v"],
        teacher_image_BD=tensors["t"],
        teacher_text_BD=tensors["u"],
        teacher_scale=TEACHER_SCALE,
        image_clusters=targets(rows["top"]),
        text_clusters=targets(rows["caption_top"]) if both else None,
    )


def compute(name: str, batch: LossBatch, scale: torch.Tensor) -> torch.Tensor:
    function = load_loss(name)
    value = function(batch, scale) if LOSSES[name].own_scale else function(batch)
    assert isinstance(value, torch.Tensor)
    return value


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return np.array([row - np.log(sum(np.exp(value) for value in row)) for row in logits])


def one_way(a: np.ndarray, b: np.ndarray, scale: float) -> float:
    return float(-np.mean([log_softmax(scale * a @ b.T)[i, i] for i in range(len(a))]))


def both_ways(a: np.ndarray, b: np.ndarray, scale: float) -> float:
    return (one_way(a, b, scale) + one_way(b, a, scale)) / 2


def cluster_formula(features: np.ndarray, rows: dict[str, np.ndarray], top: np.ndarray) -> float:
    total = 0.0
    log_p = log_softmax(SCALE * features @ rows["C"].T)
    for i in range(B):
        share = np.exp(rows["similarity"][i] / 0.2)
        target = np.zeros(K)
        target[top[i]] = 0.5 * share / share.sum()
        target[top[i, 0]] += 0.5
        total -= float(target @ log_p[i])
    return total / B


def formula(name: str, r: dict[str, np.ndarray]) -> float:
    s, v, t, u = (r[key] for key in "svtu")
    student, teacher = STUDENT_SCALE * s @ v.T, TEACHER_SCALE * t @ u.T
    sharp = 100 * t @ u.T
    match name:
        case "clip":
            return both_ways(s, v, STUDENT_SCALE)
        case "instance":
            return (both_ways(s, u, SCALE) + both_ways(v, t, SCALE)) / 2
        case "instance-intra":
            return (both_ways(s, t, SCALE) + both_ways(v, u, SCALE)) / 2
        case "icl":
            return (one_way(s, u, SCALE) + one_way(v, t, SCALE)) / 2
        case "fd":
            return float(np.mean([sum((s[i] - t[i]) ** 2) + sum((v[i] - u[i]) ** 2) for i in range(B)]))
        case "crd":
            return sum(
                float(np.mean([np.exp(q[i]) @ (q[i] - p[i]) for i in range(B)])) / 2
                for q, p in (
                    (log_softmax(teacher), log_softmax(student)),
                    (log_softmax(teacher.T), log_softmax(student.T)),
                )
            )
        case "affinity":
            return sum(
                -float(np.mean([np.exp(q[i]) @ p[i] for i in range(B)])) / 2
                for q, p in ((log_softmax(sharp), log_softmax(student)), (log_softmax(sharp.T), log_softmax(student.T)))
            )
        case "cluster":
            return cluster_formula(s, r, r["top"])
    raise AssertionError(f"{name} has no formula here: every loss of the registry needs one")


@pytest.mark.parametrize("name", NAMES)
def test_equals_its_formula(name: str, rows: dict[str, np.ndarray]) -> None:
    value = compute(name, make_batch(rows), torch.tensor(SCALE, dtype=torch.float64))
    # Weights of the soft targets are float32 by construction.
    assert float(value) == pytest.approx(formula(name, rows), rel=1e-6 if name == "cluster" else 1e-12)


def test_cluster_loss_of_both_towers_is_their_mean(rows: dict[str, np.ndarray]) -> None:
    value = compute("cluster", make_batch(rows, both=True), torch.tensor(SCALE, dtype=torch.float64))
    expected = (
        cluster_formula(rows["s"], rows, rows["top"]) + cluster_formula(rows["v"], rows, rows["caption_top"])
    ) / 2
    assert float(value) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_right(name: str, rows: dict[str, np.ndarray]) -> None:
    batch = make_batch(rows)

    def loss(s: torch.Tensor, v: torch.Tensor, scale: torch.Tensor, student_scale: torch.Tensor) -> torch.Tensor:
        changed = dataclasses.replace(batch, image_Bd=s, text_Bd=v, image_BD=s, text_BD=v, student_scale=student_scale)
        return compute(name, changed, scale)

    inputs = [
        batch.image_Bd.clone().requires_grad_(),
        batch.text_Bd.clone().requires_grad_(),
        torch.tensor(SCALE, dtype=torch.float64, requires_grad=True),
        torch.tensor(STUDENT_SCALE, dtype=torch.float64, requires_grad=True),
    ]
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_teacher_gets_no_gradient(name: str, rows: dict[str, np.ndarray]) -> None:
    batch = make_batch(rows)
    assert not any(
        tensor.requires_grad for tensor in (batch.teacher_image_BD, batch.teacher_text_BD) if tensor is not None
    )
    student = batch.image_Bd.clone().requires_grad_()
    value = compute(name, dataclasses.replace(batch, image_Bd=student, image_BD=student), torch.tensor(SCALE))
    value.backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


def test_losses_vanish_where_student_equals_teacher(rows: dict[str, np.ndarray]) -> None:
    same = rows | {"s": rows["t"], "v": rows["u"]}
    batch = dataclasses.replace(make_batch(same), student_scale=torch.tensor(TEACHER_SCALE, dtype=torch.float64))
    scale = torch.tensor(SCALE, dtype=torch.float64)
    assert float(compute("fd", batch, scale)) == 0
    assert float(compute("crd", batch, scale)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("chunk", [1, 4 * K, 1000 * K])
def test_chunked_cluster_loss_equals_plain(
    chunk: int, rows: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = make_batch(rows).image_clusters
    assert targets is not None
    values, gradients = [], []
    for entries in (chunk, 10**9):
        features = torch.from_numpy(rows["s"]).requires_grad_()
        scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
        monkeypatch.setattr(row_blocks, "BLOCK_ENTRIES", entries)
        value = soft_label_cross_entropy(features, targets, scale)
        value.backward()
        assert features.grad is not None
        assert scale.grad is not None
        values.append(float(value.detach()))
        gradients.append(torch.cat([features.grad.reshape(-1), scale.grad.reshape(1)]))
        features.grad = None
    assert values[0] == pytest.approx(values[1], rel=1e-14)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)


def test_presets_name_known_losses_and_overrides_change_them() -> None:
    for losses in PRESETS.values():
        assert set(losses) <= set(LOSSES)
    chosen = select_losses("clip-kd", {"crd": 0.5, "icl": 0.0, "affinity": 2.0})
    assert list(chosen) == ["clip", "fd", "crd", "affinity"]
    assert chosen["crd"].at(10) == 0.5
    assert chosen["fd"].at(500) == 4.0


def test_registry_is_read_without_torch() -> None:
    code = "import sys; import clipcid_cli.steps.settings.distill; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
