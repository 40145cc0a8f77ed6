"""Validation parts and few-shot draws: every class in its share, seeded, nested."""

from __future__ import annotations

import torch

from clipcid_cli.algorithms.probe import draw_shots, split_by_class, stratum


def test_every_class_is_on_both_sides_of_the_split() -> None:
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 2 + [3])
    chosen = split_by_class(labels, 0.2, seed=3)
    counts = [int(chosen[labels == label].sum()) for label in range(4)]
    assert counts == [10, 1, 1, 0]
    assert torch.equal(chosen, split_by_class(labels, 0.2, seed=3))
    assert not torch.equal(chosen, split_by_class(labels, 0.2, seed=4))


def test_images_with_several_classes_are_split_by_their_rarest() -> None:
    labels = torch.zeros(60, 3, dtype=torch.bool)
    labels[:50, 0] = True
    labels[:10, 1] = True
    assert stratum(labels).tolist() == [1] * 10 + [0] * 40 + [-1] * 10
    chosen = split_by_class(labels, 0.2, seed=0)
    assert [int(chosen[part].sum()) for part in (slice(0, 10), slice(10, 50), slice(50, 60))] == [2, 8, 2]


def test_shots_are_so_many_of_every_class_and_nested() -> None:
    labels = torch.tensor([0] * 20 + [1] * 3 + [3] * 9)
    draws = {shots: draw_shots(labels, shots, seed=1) for shots in (1, 4, 8)}
    for shots, drawn in draws.items():
        counts = torch.bincount(labels[drawn], minlength=4).tolist()
        assert counts == [shots, min(shots, 3), 0, shots]
        assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert set(draws[1].tolist()) < set(draws[4].tolist()) < set(draws[8].tolist())
    assert torch.equal(draws[4], draw_shots(labels, 4, seed=1))
    assert not torch.equal(draws[4], draw_shots(labels, 4, seed=2))


def test_shots_of_images_with_several_classes_give_every_class_its_number() -> None:
    labels = torch.rand(200, 5, generator=torch.Generator().manual_seed(0)) < 0.2
    drawn = draw_shots(labels, 4, seed=0)
    assert (labels[drawn].sum(dim=0) >= 4).all()
    assert len(drawn) <= 20
