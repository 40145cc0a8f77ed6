"""The figures in the documents are those of the logs; a changed figure does not pass."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def claims() -> Iterator[ModuleType]:
    """The recipe that checks them."""
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "recipes"))
    yield importlib.import_module("check_claims")
    sys.path[:] = before


def test_every_figure_from_a_log_is_the_logs(claims: ModuleType) -> None:
    assert not claims.problems(claims.read_documents())


@pytest.mark.parametrize(
    ("document", "before", "after", "said"),
    [
        ("README.md", "| 73.9 [", "| 74.9 [", "log has"),
        ("README.md", "3.9 times as fast", "4.9171 times as fast", "not in recipes/benchmarks/RESULTS.md: 4.9171"),
        ("recipes/ablation/README.md", "| `fd` | +42.9", "| `fd` | +43.9", "log has"),
        ("recipes/ablation/README.md", "<!-- figures: ablation_taken_away -->", "", "a table of figures without a log"),
        ("recipes/ablation/README.md", "ablation_taken_away", "forgotten", "has no forgotten"),
        ("recipes/ablation/README.md", "+9.4 (6.1…12.8)", "+9.4 (6.5…12.2)", "in no table made from a log"),
        ("recipes/ablation/README.md", "outside the plan, so no log:", "", "a table of figures without a log"),
        ("recipes/benchmarks/RESULTS.md", "there is no log beside this", "", "a table of figures without a log"),
        ("recipes/claim/table.md", "| all | 19,683 |", "| all | 19,684 |", "log has"),
    ],
)
def test_a_changed_figure_is_reported(document: str, before: str, after: str, said: str, claims: ModuleType) -> None:
    texts = claims.read_documents()
    assert before in texts[document]
    # Other documents are right, which the test above shows, and so are not made anew.
    changed = {document: texts[document].replace(before, after, 1)}
    found = "\n".join(claims.problems(texts | changed, only=document))
    assert said in found
