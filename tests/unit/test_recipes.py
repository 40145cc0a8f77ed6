"""Recipes run for minutes or hours; what they take from the package is checked without running them."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import clipcid_command

from clipcid_cli import __version__
from clipcid_cli.commands.embed import command as embed_command
from clipcid_cli.runtime.array_task import choose_task

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


def test_the_ablation_tries_weights_at_the_best_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "ablation"))
    plan = importlib.import_module("plan")
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


def submit(folder: Path, srun: str, **variables: str) -> tuple[int, list[str]]:
    """Run the job's script with programs that stand for SLURM's; its exit code, and what was asked of `scontrol`."""
    scontrol = f'if [ "$1" = show ]; then echo node1; else echo "$@" >> {folder}/asked; fi'
    for name, script in (("srun", srun), ("scontrol", scontrol)):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)
    (folder / "asked").touch()
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    job |= {"SLURM_CPUS_PER_TASK": "8"}
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "CLIPCID_VENV": str(folder)} | job | variables
    script = ROOT / "recipes" / "many-hosts" / "clipcid.sbatch"
    done = subprocess.run(["bash", str(script)], env=environment, check=False)
    return done.returncode, (folder / "asked").read_text().split()


@pytest.mark.parametrize(
    ("srun", "variables", "expected"),
    [
        ("exit 0", {}, (0, [])),
        ("exit 3", {"QUICK": "0"}, (3, ["requeue", "7"])),
        ("exit 3", {"QUICK": "0", "SLURM_RESTART_COUNT": "9"}, (3, [])),
        ("exit 3", {}, (3, [])),  # at once: it would fail again
    ],
)
def test_a_job_that_fails_goes_back_to_the_queue_a_limited_number_of_times(
    srun: str, variables: dict[str, str], expected: tuple[int, list[str]], tmp_path: Path
) -> None:
    assert submit(tmp_path, srun, **variables) == expected


# As srun: a task has one core unless SRUN_CPUS_PER_TASK says more, all its processes get the signal, and srun leaves with
# what the task left with. The signal is sent once torchrun has started.
SRUN = """
shift
[ -n "${SRUN_CPUS_PER_TASK:-}" ] || one_core="taskset --cpu-list 0"
setsid ${one_core:-} "$@" &
task=$!
until [ -e "$STARTED" ]; do sleep 0.02; done
kill -TERM -- -$task
code=0
wait $task || code=$?
exit $code
"""
# As torchrun: its processes save, and it leaves with 1 because a signal ended it.
TORCHRUN = """
trap 'echo saved >> "$STARTED"; exit 1' TERM
python3 -c 'import os; print(len(os.sched_getaffinity(0)))' > "$STARTED.part" && mv "$STARTED.part" "$STARTED"
while true; do sleep 0.02; done
"""


def test_a_job_whose_time_is_over_saves_and_goes_back_to_the_queue(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "torchrun").write_text(f"#!/usr/bin/env bash\n{TORCHRUN}")
    (tmp_path / "bin" / "torchrun").chmod(0o755)
    settings = {"DATA": "d", "TEACHER": "t", "STUDENT": "s", "CLIPCID_WORK": "w", "STARTED": str(tmp_path / "started")}
    code, asked = submit(tmp_path, SRUN, **settings, SLURM_CPUS_PER_TASK="64")
    assert (code, asked) == (143, ["requeue", "7"])
    cores, *saved = (tmp_path / "started").read_text().split()
    assert int(cores) == len(os.sched_getaffinity(0))
    assert set(saved) == {"saved"}  # SLURM and host.sh both tell it


def test_the_manifest_starts_what_every_host_runs_with_variables_it_reads() -> None:
    yaml = pytest.importorskip("yaml")
    folder = ROOT / "recipes" / "many-hosts"
    runtime, job = yaml.safe_load_all((folder / "trainjob.yaml").read_text())
    assert job["spec"]["runtimeRef"] == {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    host = (folder / "host.sh").read_text()
    for replica in runtime["spec"]["template"]["spec"]["replicatedJobs"]:
        (container,) = replica["template"]["spec"]["template"]["spec"]["containers"]
        assert (ROOT / container["command"][-1].split()[-1]).is_file()
        given = {each["name"] for each in container["env"]} | {"HEAD", "HOSTS"}
        assert given - {"HF_HUB_OFFLINE"} <= set(re.findall(r"^#   ([A-Z ]+)  ", host, re.MULTILINE)) | set(
            re.findall(r"\$\{([A-Z_]+):?", host)
        )


def test_parts_are_run_by_lines_that_embed_reads(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    folder = ROOT / "recipes" / "anywhere"
    (container,) = yaml.safe_load((folder / "indexed-job.yaml").read_text())["spec"]["template"]["spec"]["containers"]
    task = yaml.safe_load((folder / "sky.yaml").read_text())
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, does in {"srun": '"$@"', "clipcid": 'printf "%s\\n" "$@" > "$SAID"'}.items():
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(0o755)

    def run(words: list[str], **variables: str) -> list[str]:
        said = tmp_path / "said"
        path = f"{programs}:{os.environ['PATH']}"
        subprocess.run(
            words, env={"PATH": path, "SAID": str(said), "CLIPCID_VENV": str(tmp_path)} | variables, check=True
        )
        return said.read_text().splitlines()

    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_PER_TASK": "8"}
    given = {"DATA": "laion", "TEACHER": "ViT-L-14", "OUT": "emb"}
    array = ["bash", str(folder / "parts.sbatch")]
    lines = [
        run(array, **slurm, **given),
        run(array, **slurm, **given, PARTS="8"),
        run(["bash", "-c", task["run"]], **task["envs"]),
        [*container["command"][1:], *container["args"]],
    ]
    tasks = [
        {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "0"},
        {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "2"},
        {"SKYPILOT_JOB_RANK": "5", "SKYPILOT_NUM_JOBS": "8"},
        {"JOB_COMPLETION_INDEX": "5"},
    ]
    for line, variables in zip(lines, tasks, strict=True):
        context = embed_command.make_context("embed", line[1:])
        assert choose_task(context.params["part"], variables) == (5, 8)


def test_an_environment_without_pip_runs_the_checkout_on_this_pythons_packages(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "only_there-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("only_there.py", "found = True\n")
    with zipfile.ZipFile(wheels / "not_for_this-1-cp38-cp38-manylinux_2_28_x86_64.whl", "w") as wheel:
        wheel.writestr("not_for_this.py", "")
    offline = [sys.executable, str(ROOT / "recipes" / "gpu" / "offline.py"), "install"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*offline, str(wheels), str(tmp_path / "venv")], env=environment, check=True)
    programs = tmp_path / "venv" / "bin"
    said = subprocess.run(
        [programs / "python", "-c", "import only_there, clipcid_cli, torch; print(clipcid_cli.__file__)"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(said.stdout.strip()).is_relative_to(ROOT)
    assert not list((tmp_path / "venv").rglob("not_for_this.py"))
    subprocess.run([programs / "clipcid", "--version"], env=environment, cwd=tmp_path, check=True)

    # Of a Python that has nothing, what is missing is named.
    done = subprocess.run(
        [sys.executable, "-S", *offline[1:], str(wheels), str(tmp_path / "bare")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "open_clip_torch>=3.3,<5" in done.stderr
    assert "faiss" not in done.stderr
    assert "recipes/gpu/run.sh --prepare" in done.stderr


@pytest.mark.slow
def test_a_pilot_names_the_command_to_go_on_with(tmp_path: Path, tiny_model: Path, tiny_shards: Path) -> None:
    student = tmp_path / "student.json"
    student.write_text(json.dumps(json.loads((tiny_model / "open_clip_config.json").read_text())["model_cfg"]))
    pilot = [sys.executable, str(ROOT / "recipes" / "pilot" / "pilot.py"), "--steps", "40"]
    trials = ["--presets", "clip", "cid", "--factors", "2", "--launch", clipcid_command()[0]]
    flags = f"{tiny_shards} --student {student} --teacher none --batch-size 8 --val-fraction 0.2 --workers 0".split()
    done = subprocess.run([*pilot, *trials, *flags], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| clip \| \S+ \(× \S\) \| \d+\.\d\d \| – \| \d+\.\d\d \| – \|", done.stdout), "the best"
    assert re.search(r"\| [+-]\d+\.\d\d \([+-]\d+\.\d\d … [+-]\d+\.\d\d\) \|", done.stdout), "beside it the other"
    assert "(× 2)" in done.stdout
    assert "| cid |" not in done.stdout, "it needs a teacher, and says so"
    assert "preset cid" in " ".join(done.stderr.split())
    command = done.stdout.splitlines()[-1]
    assert command.startswith("Go on with: ")
    assert "--preset clip --lr" in command
    assert command.endswith("--steps 40")


def test_a_release_has_one_version_and_a_dated_heading_in_the_changelog() -> None:
    def refuse(version: str) -> str:
        done = subprocess.run([ROOT / ".ci/wheel", version], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        return done.stderr

    assert "clipcid_cli/__init__.py has another version than 0.0.9" in refuse("0.0.9")
    if f"## [{__version__}] - " not in (ROOT / "CHANGELOG.md").read_text():
        assert f'CHANGELOG.md has no heading "## [{__version__}] - YYYY-MM-DD"' in refuse(__version__)


def test_what_is_installed_comes_from_one_place() -> None:
    """Actions are named by commit, and no package may come from the one of two indexes that has the larger number."""
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    actions = [line for path in workflows for line in re.findall(r"uses: (.+)", path.read_text())]
    assert len(actions) >= 6
    for action in actions:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
    scripts = [
        path for name in ("recipes", ".ci", "tests") for path in (ROOT / name).rglob("*") if path.suffix == ".sh"
    ]
    for path in (*workflows, *scripts, ROOT / "README.md", *(ROOT / "recipes").rglob("README.md")):
        assert not re.search(r"extra[-_]index", path.read_text(), re.IGNORECASE), path
