"""Runs are kept while there is room for them, and room that is given back is used again."""

from __future__ import annotations

import torch

from clipcid_cli.algorithms.kmeans.kept_runs import KeptRuns, Room
from clipcid_cli.algorithms.kmeans.start import CodedRows


def test_kinds_of_runs_share_their_room_and_give_it_back() -> None:
    made: list[tuple[int, int]] = []

    def coded(kind: int, first: int) -> CodedRows:
        made.append((kind, first))
        return CodedRows(torch.full((5, 6), kind, dtype=torch.int8), torch.ones(5))  # 50 bytes

    room = Room(120)
    ones, twos = KeptRuns(lambda first: coded(1, first), room), KeptRuns(lambda first: coded(2, first), room)
    for _ in range(2):
        for first in (0, 5, 10):
            assert int(ones.get(first).codes_Bd[0, 0]) == 1
    assert made == [(1, 0), (1, 5), (1, 10), (1, 10)]  # two fit
    assert [first in ones for first in (0, 5, 10)] == [True, True, False]
    twos.get(0)
    assert 0 not in twos
    for first in (0, 10):  # one that was kept, and one that was not
        ones.get_last(first)
    for first in (0, 5):
        twos.get(first)
    assert [first in runs for runs in (ones, twos) for first in (0, 5)] == [False, True, True, False]
    assert made[4:] == [(2, 0), (1, 10), (2, 0), (2, 5)]
