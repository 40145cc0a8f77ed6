"""`clipcid eval-zeroshot`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.scores.comparison import show_comparison
from clipcid_cli.commands.scores.tables import show_tables
from clipcid_cli.commands.summary import file_facts, print_facts
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings

if TYPE_CHECKING:
    from rich.console import Console


def show(result: dict[str, Any], console: Console) -> None:
    """Print one line for each model on each data set, and where the files are; of a comparison its verdicts."""
    if "differences" in result:
        show_comparison(result, console)
        return
    results = result.get("results", [result])
    show_tables([one for one in results if "metrics" in one], console)
    kinds = ("metrics", "predictions")
    files = {kind: "\n".join(one["files"][kind] for one in results if kind in one["files"]) for kind in kinds}
    files |= {name: path for name, path in file_facts(result.get("files", {})).items() if name not in kinds}
    print_facts(console, "", {name: paths for name, paths in files.items() if paths})


command = step_command(
    "eval-zeroshot",
    EvalZeroshotSettings,
    step="clipcid_cli.steps.evaluate.zeroshot",
    show=show,
    page="""
Measure models without training: zero-shot classification, and retrieval between images and captions. Metrics, names
and files follow CLIP_benchmark.

\b
Examples:
  clipcid eval-zeroshot
  clipcid eval-zeroshot ViT-B-32 food101/ mscoco/
  clipcid eval-zeroshot small/student photos/ --classnames names.txt \\
      --templates templates.txt
  clipcid eval-zeroshot ViT-B-32 food101/ --model ViT-L-14 --json
  clipcid eval-zeroshot ViT-B-32 imagenet pets voc2007 \\
      --data-root /data/clip_benchmark --predictions
  clipcid eval-zeroshot --compare A.json B.json
""",
)
