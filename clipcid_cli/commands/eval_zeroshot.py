"""`clipcid eval-zeroshot`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from clipcid_cli.commands.command import step_command
from clipcid_cli.commands.scores import show_tables
from clipcid_cli.commands.summary import count, format_percent, print_facts, print_table, shorten_metric
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings

if TYPE_CHECKING:
    from clipcid_cli.steps.evaluate.result import ComparisonResult
    from clipcid_cli.steps.evaluate.zeroshot import Answer


def show(answer: Answer, console: Console) -> None:
    """Print one line for each model on each data set, and where the files are; of a comparison its verdicts."""
    from clipcid_cli.steps.evaluate.result import ComparisonResult, Preview, Previews, ZeroshotResults

    if isinstance(answer, ComparisonResult):
        _show_comparison(answer, console)
        return
    results = answer.results if isinstance(answer, ZeroshotResults | Previews) else [answer]
    show_tables([one for one in results if not isinstance(one, Preview)], console)
    kinds = ("metrics", "predictions")
    files = {kind: "\n".join(one.files[kind] for one in results if kind in one.files) for kind in kinds}
    if not isinstance(answer, Previews):
        files |= {name: path for name, path in answer.files.items() if name not in kinds}
    print_facts(console, "", {}, {name: paths for name, paths in files.items() if paths})


def _show_comparison(answer: ComparisonResult, console: Console) -> None:
    """Print the files, whether their class names and templates are the same, and a table of the differences."""
    print_facts(console, "", dict(zip("AB", answer.compared, strict=True)))
    prompts = {
        kind.replace("_", " "): str(sides.first) if sides.same else "not the same"
        for kind, sides in (answer.prompts or {}).items()
    }
    print_facts(console, "", prompts)
    rows = [
        (
            shorten_metric(name),
            format_percent(judged.first),
            format_percent(judged.second),
            f"{100 * judged.difference:+.2f}",
            " … ".join(f"{100 * bound:+.2f}" for bound in judged.interval),
            "–" if judged.p_value is None else f"{judged.p_value:.2g}",
            "yes" if judged.real else "no",
        )
        for name, judged in answer.differences.items()
    ]
    title = f"B against A on {answer.dataset}, {count(answer.images, 'image')}"
    columns = ("metric", "A", "B", "B − A", "95% interval", "McNemar p", "significant")
    print_table(console, title, columns, rows)


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
