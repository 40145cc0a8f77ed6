"""How much of a run's time its saves take."""

from __future__ import annotations

import pytest

from clipcid_cli.runtime.save_pace import SavePace


@pytest.mark.parametrize("growth", [0.0, 0.5])
@pytest.mark.parametrize("cost", [0.1, 2.0, 240.0])
def test_saves_are_at_most_one_a_minute_and_take_at_most_a_twentieth_of_the_time(cost: float, growth: float) -> None:
    now, spent, saved, longest = 0.0, 0.0, 0.0, 0.0
    pace = SavePace(cost, clock=lambda: now)
    while now < 40_000.0:
        now += 1.0
        if pace.is_due():
            assert now - saved > 60.0
            longest = max(longest, now - saved)
            with pace.saving():
                now += cost
                spent += cost
            saved, cost = now, cost * (1.0 + growth * (saved < 15_000.0 and cost < 400.0))
            assert spent <= 0.05 * now * (1.0 + growth)
    assert longest <= max(61.0, 21.0 * 1.5 * cost)
    assert spent > 0.0
