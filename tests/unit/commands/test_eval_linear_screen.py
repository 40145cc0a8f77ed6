"""What `eval-linear` shows of the sweep over C: the chosen value has the highest bar, and what is as good is counted."""

import io

import msgspec
import pytest
from rich.console import Console

from clipcid_cli.commands.eval_linear import show
from clipcid_cli.steps.evaluate.probe_result import LinearResult


def show_sweep(scores: list[float], chosen: int) -> list[str]:
    answer = {"dataset": "flags", "model": "m", "pretrained": "p", "task": "linear_probe", "language": "en"}
    answer |= {"metrics": {"lp_acc1": 0.5}, "metric": "acc1", "c": 10.0 ** (chosen - 3), "shots": [], "skipped": {}}
    answer |= {"validation_score": scores[chosen], "reused": False, "seconds": {}, "files": {}}
    answer |= dict.fromkeys(("images", "train_images", "validation_images", "classes"), 8) | {"folds": 1}
    answer |= {"sweep": {"c": [10.0 ** (index - 3) for index in range(len(scores))], "score": scores}}
    shown = io.StringIO()
    show(msgspec.convert(answer, LinearResult), Console(file=shown, width=80))
    return shown.getvalue().splitlines()


@pytest.mark.parametrize(
    ("scores", "bars", "ties"),
    [
        ([0.0, 0.0, 0.2, 0.8, 0.4, 0.4, 0.2], "▁█▅▃", ""),
        ([0.0, 0.0, 0.2, 0.8, 0.8, 0.4, 0.2], "▁██▃", "; 1 larger one is as good"),
        ([0.0, 0.2, 0.2, 0.8, 0.8, 0.2, 0.8], "▃███", "; 2 larger ones are as good"),
    ],
)
def test_the_chosen_value_has_the_highest_bar(scores: list[float], bars: str, ties: str) -> None:
    lines = show_sweep(scores, chosen=3)
    assert f"C            1, best of 7 by acc1 on held-out images{ties}" in lines
    assert f"by C         1e-03 {bars} 1e+03, best of 2 per bar" in lines
