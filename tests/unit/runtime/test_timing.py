"""Timing a trial: what is counted, and how often work is run."""

from __future__ import annotations

import pytest

from clipcid_cli.runtime import timing
from clipcid_cli.runtime.timing import time_trial


class Clock:
    """A clock that work moves forward."""

    def __init__(self, durations: list[float]) -> None:
        self.now, self._durations = 0.0, iter(durations)

    def work(self) -> float:
        duration = next(self._durations)
        self.now += duration
        return duration


def timed(monkeypatch: pytest.MonkeyPatch, durations: list[float]) -> Clock:
    clock = Clock(durations)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


def test_the_median_of_the_runs_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = timed(monkeypatch, [50.0, 2.0, 9.0, 3.0])
    assert time_trial(clock.work, repeats=3) == (3.0, 3.0)


def test_without_a_warm_up_the_first_run_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = timed(monkeypatch, [50.0])
    assert time_trial(clock.work, warm_up=0) == (50.0, 50.0)


def test_short_work_is_repeated_until_the_time_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = timed(monkeypatch, [0.5] * 9)
    trial = time_trial(clock.work, at_least=2.0)
    assert trial.seconds == 0.5
    assert clock.now == 0.5 * (1 + 4)


def test_the_result_is_that_of_the_last_run() -> None:
    found = iter(range(10))
    assert time_trial(lambda: next(found), repeats=2).result == 2
