"""Print the customary metric of each data set, and their mean, of every model and task measured in a work directory.

    python recipes/paper/mean.py clipcid-work/eval

The metrics of the linear probe have the names of classification, after `lp_`.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from clipcid_cli.formats.data.benchmark import customary_metric


def main() -> None:
    """Read the metrics files of one folder."""
    tables = defaultdict[tuple[str, str], dict[str, float]](dict)
    for path in sorted(Path(sys.argv[1]).glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        metrics = {name.removeprefix("lp_"): value for name, value in result["metrics"].items()}
        metric = customary_metric(result["dataset"], list(metrics))
        tables[result["pretrained"], result["task"]][f"{result['dataset']} ({metric})"] = metrics[metric]
    for (model, task), scores in tables.items():
        print(f"{model}, {task}")
        for name, value in scores.items():
            print(f"  {name:40} {value:.3f}")
        print(f"  {'mean':40} {statistics.mean(scores.values()):.3f}")


if __name__ == "__main__":
    main()
