"""A small batch, and every loss of the registry as a formula over it, written with NumPy and loops alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from clipcid_cli.algorithms.losses.batch import ClusterTargets, LossBatch
from clipcid_cli.algorithms.losses.cluster import ProjectedCentroids, draw_candidates, mean_centroids, soft_labels
from clipcid_cli.algorithms.losses.registry import LOSSES, load_loss

B, D, K, M = 7, 5, 12, 6
SCALE, BIAS, STUDENT_SCALE, TEACHER_SCALE, TAU, ALPHA = 9.0, -1.5, 14.0, 10.0, 0.2, 0.5
TEACHER_BIAS, AFFINITY_SCALE = -2.0, 60.0

# Student s, v and teacher t, u [B, D]; centroids C; stored clusters and similarities; the loss's own σ, the student's σ and
# bias; layers F of images and captions that join student and teacher, [D, 2D], and what they add, [D].
Numbers = dict[str, np.ndarray]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def make_numbers(seed: int = 3) -> Numbers:
    random = np.random.default_rng(seed)
    found = {name: unit(random.normal(size=(B, D))) for name in "svtu"}
    found["C"] = unit(random.normal(size=(K, D)))
    found["top"] = np.stack([random.permutation(K)[:M] for _ in range(B)])
    found["similarity"] = -np.sort(-random.uniform(0, 1, (B, M)), axis=1)
    found["caption_top"] = np.stack([random.permutation(K)[:M] for _ in range(B)])
    found["F"], found["added"] = random.normal(size=(2, D, 2 * D)), random.normal(size=(2, D))
    return found | {"scale": np.array(SCALE), "bias": np.array(BIAS), "student_scale": np.array(STUDENT_SCALE)}


def make_batch(
    numbers: Numbers,
    towers: str = "tu",
    cluster_towers: str = "s",
    own: slice = slice(None),
    teacher_bias: float | None = None,
) -> LossBatch:
    """Make a float64 batch of a teacher with the given towers, and cluster targets for the given student towers."""
    tensors = {name: torch.from_numpy(numbers[name]) for name in "svtu"}

    def targets(top: np.ndarray) -> ClusterTargets:
        candidates = draw_candidates(top[:1], K, ratio=1.0, minimum=1, seed=0)
        weights = np.array([target_weights(row) for row in numbers["similarity"]])
        means = np.einsum("bm,bmd->bd", weights, numbers["C"][top])
        stored = ProjectedCentroids(numbers["C"].astype(np.float32), None, torch.device("cpu"))
        q_Bm = soft_labels(numbers["similarity"], temperature=TAU, label_share=ALPHA)
        made = mean_centroids(stored, top, q_Bm)
        # Means are float32 by construction: near enough to their formula, which takes their place to be compared closely.
        np.testing.assert_allclose(made.numpy(), means, rtol=1e-6, atol=1e-6)
        correction = torch.from_numpy(candidates.log_correction_S).double()
        return ClusterTargets(torch.from_numpy(numbers["C"][candidates.ids]), correction, torch.from_numpy(means[own]))

    return LossBatch(
        **student_rows(tensors["s"], tensors["v"], own),
        student_scale=torch.from_numpy(numbers["student_scale"]),
        teacher_image_BD=tensors["t"] if "t" in towers else None,
        teacher_text_BD=tensors["u"] if "u" in towers else None,
        student_bias=torch.from_numpy(numbers["bias"]),
        teacher_scale=TEACHER_SCALE,
        teacher_bias=teacher_bias,
        affinity_scale=AFFINITY_SCALE,
        image_clusters=targets(numbers["top"]) if "s" in cluster_towers else None,
        text_clusters=targets(numbers["caption_top"]) if "v" in cluster_towers else None,
        own=own,
    )


def student_rows(s: torch.Tensor, v: torch.Tensor, own: slice) -> dict[str, torch.Tensor]:
    """All that a batch has of the student; masked images are stood for by other unit rows that move with s."""
    tokens = {"image_tokens_bLD": tokens_of(s)[own], "text_tokens_bLD": tokens_of(v)[own]}
    return {"image_Bd": s, "text_Bd": v, "image_BD": s, "text_BD": v, "masked_image_BD": s.flip(1), **tokens}


def tokens_of(rows: torch.Tensor) -> torch.Tensor:
    """Stand for the features of five patches or tokens: other unit rows, that move with these; some samples have fewer."""
    tokens = torch.stack([rows.roll(shift, 1) for shift in range(5)], dim=1)
    return tokens * torch.from_numpy(token_exists())[:, :, None]


def token_exists() -> np.ndarray:
    return np.arange(5) < np.array([5, 4, 1, 5, 3, 2, 5])[:, None]


def layer(weights: np.ndarray, added: np.ndarray) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda rows: rows @ torch.from_numpy(weights).to(rows).T + torch.from_numpy(added).to(rows)


def learned(name: str, scale: torch.Tensor) -> dict[str, Any]:
    """What a loss is called with beside its batch."""
    entry, numbers = LOSSES[name], make_numbers()
    found: dict[str, Any] = {} if entry.scale is None else {"scale": scale}
    if entry.fuses:
        found["fusion"] = [layer(*of_side) for of_side in zip(numbers["F"], numbers["added"], strict=True)]
    return found


def compute(name: str, batch: LossBatch, scale: torch.Tensor) -> torch.Tensor:
    value = load_loss(name)(batch, **learned(name, scale))
    assert isinstance(value, torch.Tensor)
    return value


def with_gradients(name: str, batch: LossBatch) -> tuple[float, list[np.ndarray]]:
    """Return a loss and its gradients by s, v, the loss's scale, the student's bias and scale (0 where it has none)."""
    s, v = batch.image_Bd.detach().clone().requires_grad_(), batch.text_Bd.detach().clone().requires_grad_()
    scale, bias = (torch.tensor(number, dtype=s.dtype, requires_grad=True) for number in (SCALE, BIAS))
    student_scale = batch.student_scale.detach().clone().requires_grad_()
    live = dataclasses.replace(batch, student_scale=student_scale, student_bias=bias, **student_rows(s, v, batch.own))
    value = compute(name, live, scale)
    value.backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in (s, v, scale, bias, student_scale)]
    return float(value.detach()), [gradient.numpy() for gradient in gradients]


def target_weights(similarities: np.ndarray) -> np.ndarray:
    share = np.exp(similarities / TAU)
    weights = (1 - ALPHA) * share / share.sum()
    weights[0] += ALPHA
    return weights


def log_softmax(row: np.ndarray) -> np.ndarray:
    top = max(row)
    return row - top - np.log(sum(np.exp(value - top) for value in row))


def cross_entropy(row: np.ndarray, own: int) -> float:
    return -float(log_softmax(row)[own])


def divergence(target: np.ndarray, row: np.ndarray) -> float:
    """KL(softmax(target) ‖ softmax(row))."""
    q, p = log_softmax(target), log_softmax(row)
    return float(sum(np.exp(q[j]) * (q[j] - p[j]) for j in range(len(row))))


def soft_cross_entropy(target: np.ndarray, row: np.ndarray) -> float:
    q, p = log_softmax(target), log_softmax(row)
    return float(-sum(np.exp(q[j]) * p[j] for j in range(len(row))))


def contrast_gradient(a: np.ndarray, b: np.ndarray, sigma: float, i: int) -> np.ndarray:
    """Derivative by a[i] of the sum over the batch of ½[cross-entropy of a_j among b + of b_j among a]."""
    total = -sigma * b[i]
    for j in range(len(b)):
        as_query, as_key = log_softmax(sigma * b @ a[i])[j], log_softmax(sigma * a @ b[j])[i]
        total = total + sigma * (np.exp(as_query) + np.exp(as_key)) / 2 * b[j]
    return total


def formula_rows(  # one branch a loss
    name: str,
    n: Numbers,
    towers: str = "tu",
    cluster_towers: str = "s",
    fixed: Numbers | None = None,
    teacher_bias: float | None = None,
) -> np.ndarray:
    """What each row of the batch, as query, adds to B times the loss, float64 [B].

    Args:
        name: The loss.
        n: Its numbers.
        towers: The teacher's.
        cluster_towers: The student's towers that the cluster loss teaches.
        teacher_bias: None for a teacher trained with a softmax.
        fixed: The numbers that fixed targets are made of, where they are not those that gradients are taken by.
    """
    f = n if fixed is None else fixed
    s, v, t, u = (n[key] for key in "svtu")
    scale, student_scale = float(n["scale"]), float(n["student_scale"])
    across = [pair for pair, tower in (((s, u), "u"), ((v, t), "t")) if tower in towers]
    beside = [pair for pair, tower in (((s, t), "t"), ((v, u), "u")) if tower in towers]

    def both_ways(i: int, a: np.ndarray, b: np.ndarray, sigma: float) -> float:
        return (cross_entropy(sigma * b @ a[i], i) + cross_entropy(sigma * a @ b[i], i)) / 2

    def row(i: int) -> float:
        match name:
            case "clip":
                return both_ways(i, s, v, student_scale)
            case "siglip":
                logits = student_scale * v @ s[i] + n["bias"]
                return float(sum(np.log1p(np.exp(-x if j == i else x)) for j, x in enumerate(logits)))
            case "siglip-kd":
                to_text, to_image = TEACHER_SCALE * u @ t[i], TEACHER_SCALE * t @ u[i]
                if teacher_bias is None:
                    targets = np.exp(log_softmax(to_text)), np.exp(log_softmax(to_image))
                else:
                    targets = tuple(1 / (1 + np.exp(-row - teacher_bias)) for row in (to_text, to_image))
                total = 0.0
                for target, row in zip(targets, (student_scale * v @ s[i], student_scale * s @ v[i]), strict=True):
                    misses, hits = (np.log1p(np.exp(sign * (row + n["bias"]))) for sign in (1, -1))
                    total += float(target @ hits + (1 - target) @ misses)
                return total / 2
            case "instance":
                return float(np.mean([both_ways(i, a, b, scale) for a, b in across]))
            case "instance-intra":
                return float(np.mean([both_ways(i, a, b, scale) for a, b in beside]))
            case "icl":
                return float(np.mean([cross_entropy(scale * b @ a[i], i) for a, b in across]))
            case "fd":
                return float(sum(sum((a[i] - b[i]) ** 2) for a, b in beside))
            case "mfd":
                image, text = (s[i][::-1] - t[i]) ** 2, (v[i] - u[i]) ** 2
                return float(sum(image) * ("t" in towers) + sum(text) * ("u" in towers))
            case "crd":
                image = divergence(TEACHER_SCALE * u @ t[i], student_scale * v @ s[i])
                return (image + divergence(TEACHER_SCALE * t @ u[i], student_scale * s @ v[i])) / 2
            case "gd":
                image = contrast_gradient(s, v, student_fixed, i) - contrast_gradient(t, u, TEACHER_SCALE, i)
                text = contrast_gradient(v, s, student_fixed, i) - contrast_gradient(u, t, TEACHER_SCALE, i)
                return float(sum(image**2) + sum(text**2))
            case "afd":
                joined = (np.hstack([s, t]), np.hstack([v, u]))
                fused = [unit(rows @ n["F"][k].T + n["added"][k]) for k, rows in enumerate(joined)]
                return both_ways(i, *fused, scale)
            case "td":
                to_text, to_image = TEACHER_SCALE * u @ t[i], TEACHER_SCALE * t @ u[i]
                confidence = (np.exp(log_softmax(to_text)[i]) + np.exp(log_softmax(to_image)[i])) / 2
                total = 0.0
                for rows, target, other in ((s, t, u), (v, u, t)):
                    tokens = [np.roll(rows[i], shift) for shift in range(token_exists()[i].sum())]
                    tokens.sort(key=lambda token: -float(token @ other[i]))  # used at once
                    chosen = tokens[: -(-len(tokens) // 4)]
                    total += sum(float(abs(token - target[i]).sum()) for token in chosen) / len(chosen)
                return confidence * total / 2
            case "affinity":
                image = soft_cross_entropy(AFFINITY_SCALE * u @ t[i], student_scale * v @ s[i])
                return (image + soft_cross_entropy(AFFINITY_SCALE * t @ u[i], student_scale * s @ v[i])) / 2
            case "vrd":
                teacher_first = divergence(scale_fixed * f["v"] @ u[i], scale * s @ t[i])
                student_first = divergence(scale_fixed * u @ f["v"][i], scale * t @ s[i])
                return (teacher_first + student_first) / 2 + both_ways(i, t, s, scale) + both_ways(i, u, v, scale)
            case "xrd":
                p, q = student_fixed * v @ t[i], student_fixed * s @ u[i]
                fixed_p, fixed_q = student_fixed * f["v"] @ t[i], student_fixed * f["s"] @ u[i]
                total = divergence(fixed_q, p) + divergence(fixed_p, q)
                p, q = student_fixed * t @ v[i], student_fixed * u @ s[i]
                fixed_p, fixed_q = student_fixed * t @ f["v"][i], student_fixed * u @ f["s"][i]
                return (total + divergence(fixed_q, p) + divergence(fixed_p, q)) / 4
            case "cluster":
                taught = {"s": (s, "top"), "v": (v, "caption_top")}
                losses = []
                for features, top in (taught[tower] for tower in cluster_towers):
                    log_p = log_softmax(scale * n["C"] @ features[i])
                    losses.append(-float(target_weights(n["similarity"][i]) @ log_p[n[top][i]]))
                return float(np.mean(losses))
        raise AssertionError(f"{name} has no formula here: every loss of the registry needs one")

    scale_fixed, student_fixed = float(f["scale"]), float(f["student_scale"])
    return np.array([row(i) for i in range(len(s))])


def formula(name: str, n: Numbers, own: slice = slice(None), **options: object) -> float:
    """The share of the own rows."""
    rows = formula_rows(name, n, **options)  # type: ignore[arg-type]
    return float(rows[own].sum() / len(rows))


def slopes(name: str, n: Numbers) -> list[np.ndarray]:
    """Derivatives of `formula_rows` by s, v, scale, the student's bias and scale, [..., B] each; fixed targets held."""
    step, found = 1e-6, []
    for key in ("s", "v", "scale", "bias", "student_scale"):
        slope = np.zeros((*n[key].shape, len(n["s"])))
        for place in np.ndindex(n[key].shape):
            ends = []
            for sign in (1, -1):
                moved = n[key].copy()
                moved[place] += sign * step
                ends.append(formula_rows(name, n | {key: moved}, fixed=n))
            slope[place] = (ends[0] - ends[1]) / (2 * step)
        found.append(slope)
    return found
