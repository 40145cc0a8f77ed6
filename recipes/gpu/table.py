"""Print the figures of `run.sh` as a table in Markdown, under the machine they are of.

python recipes/gpu/table.py FIGURES --describe      add what machine this is to the figures
python recipes/gpu/table.py FIGURES                 print the table, on any machine
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from balance import describe_machine


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path)
    parser.add_argument("--describe", action="store_true")
    arguments = parser.parse_args()
    if arguments.describe:
        with arguments.figures.open("a") as file:
            file.write(json.dumps({"machine": f"{describe_card()}  \n{describe_versions()}"}) + "\n")
        return
    lines = [json.loads(line) for line in arguments.figures.read_text().splitlines()]
    print("\n".join(line.pop("machine") for line in lines if "machine" in line) + "\n")
    found = {(line["part"], line["what"]): line for line in lines if "value" in line}  # the last of each
    print("| part | what | figure | beside | ratio |\n|---|---|---|---|---|")
    for line in found.values():
        ratio = "" if line["ratio"] is None else f"{line['ratio']:.2f}"
        value = f"{line['value']:,.3g}" if line["value"] < 1000 else f"{line['value']:,.0f}"
        print(f"| {line['part']} | {line['what']} | {value} {line['unit']} | {line['beside']} | {ratio} |")
    ends = (f"{line['part']} {line['seconds']} s" + explain(line["exit"]) for line in lines if "exit" in line)
    print(f"\nTime: {', '.join(ends)}.")


def explain(code: int) -> str:
    """Say how a part ended, unless it went well."""
    return "" if code == 0 else " (**too slow**)" if code == 124 else f" (**failed**, exit {code})"


def describe_card() -> str:
    """Name the GPU, or the processor where there is none."""
    import torch

    if not torch.cuda.is_available():
        return describe_machine(torch.get_num_threads())
    properties = torch.cuda.get_device_properties(0)
    memory = properties.total_memory / 2**30
    return f"{time.strftime('%Y-%m-%d')}, {properties.name}, {memory:.0f} GiB, {os.cpu_count()} processor cores"


def describe_versions() -> str:
    """Name the versions of what was measured."""
    import open_clip
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return (
        f"clipcid {commit.stdout.strip() or 'without git'}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"open_clip {open_clip.__version__}, Python {sys.version.split()[0]}"
    )


if __name__ == "__main__":
    main()
