"""Recipes run for minutes or hours; what they take from the package is checked without running them."""

from __future__ import annotations

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_name_that_a_recipe_imports_from_the_package_exists(script: str) -> None:
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clipcid_cli"):
            module = importlib.import_module(str(node.module))
            # A package has its modules as attributes only once they are imported.
            missing = [
                name.name
                for name in node.names
                if not hasattr(module, name.name) and find_spec(f"{node.module}.{name.name}") is None
            ]
            assert not missing, f"{node.module} has no {', '.join(missing)}"


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "ablation"))
    return importlib.import_module("plan")


def test_trials_of_the_ablation_differ_in_rate_or_in_the_ratio_of_weights(plan: Any) -> None:
    for name in plan.RECIPES:
        trials = plan.trials(name, {})
        ratios = [[weight / next(iter(each.weights.values())) for weight in each.weights.values()] for each in trials]
        tried = {(each.lr, *(round(ratio, 9) for ratio in of)) for each, of in zip(trials, ratios, strict=True)}
        assert len(trials) == len(tried) == 5, name
        assert len({each.name for each in trials}) == 5
        held = "clip" if "clip" in trials[0].weights and name != "fd-instance" else "fd"
        assert next(iter(trials[0].weights)) == held


def test_the_ablation_tries_weights_at_the_best_rate(plan: Any) -> None:
    log: dict[str, Any] = {}
    rate = {"muon": 1.2e-2, "adamw": 6e-3}
    phases = plan.phases(log)
    first = next(phases)
    assert len(first) == 3 * len(plan.MAIN)
    for run in first:
        score = float(run.setting.lr == rate[run.setting.optimizer])
        log[run.name] = {"metrics": {"tune x": score, "report x": 1 - score}}
    second = [run for run in next(phases) if run.name not in log]
    assert len(second) == 2 * len(plan.MAIN)
    for run in second:
        if len(run.setting.weights) > 1:
            assert run.setting.lr == rate[run.setting.optimizer]


def test_contenders_get_five_seeds_and_all_else_three(plan: Any) -> None:
    seeds: dict[str, set[int]] = {}
    for phase in plan.phases({}):
        for run in phase:
            seeds.setdefault(run.setting.name, set()).add(run.seed)
    contenders = {plan.tuned(name, {}).name for name in plan.CONTENDERS}
    assert {name for name, of in seeds.items() if len(of) == 5} == contenders
    three = [
        *map(plan.tuned, plan.MAIN + plan.REST, [{}] * len(plan.RECIPES)),
        *plan.left_out({}),
        *plan.cid_variants({}),
    ]
    assert all(seeds[setting.name] >= {0, 1, 2} for setting in three)
