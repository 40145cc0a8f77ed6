"""What share of small faults the suite sees: mutants of the package, drawn by a seed, each run with the tests that reach it.

    python tests/mutants.py OUT [--tests DIR] [--under FOLDER] [--number 100] [--seed 0] [--seconds 60]

One run under `coverage` says which tests reach which lines, also in the processes that tests start. Then each mutant is
written into a copy of the package, and its tests run until one fails. OUT holds the copy, what was measured, and the answer,
`mutants.md`; the same command again continues. As a plugin of pytest (`-p mutants`) this file does what runs need there.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import copy
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "clipcid_cli"

# Changed lines that no user and no test can tell from what they were, and why.
UNSEEN = {
    "signs = np.random.default_rng(0).integers((1), 2, size=width) * 2.0 - 1.0": "any rotation serves",
    "if looked_at == (1):  # the likeliest is decided first: few others can be nearer than that": "only slower",
    "means_SD[sets] += np.add.reduceat(rows_BD, begins)": "0 is the default",
    "degree = (copies + 1)": "all degrees grow by the same, and only their order counts",
    "ROWS_IN_CACHE = (513)": "only slower",
    "ROUNDING_MARGIN = (1.0)**-22": "only slower: bounds are wider",
    "return torch.where(gap_B > 0, count_B, torch.where(now_B > before_B, self.moved_K.sum(), len(self.order_K)))": (
        "only slower: more are compared"
    ),
    "weights = torch.from_numpy(np.asarray(top_similarities) / np.float32(temperature)).softmax(dim=1)": (
        "float32 either way: they are stored in float16"
    ),
    "return SampleRows(folder, part, np.load(_column_path(folder, part, 'sizes')))": "False is the default",
}

_ASSERTION = "strict"  # of zip: true in every run that is right

_PAIRS = (
    (ast.Lt, ast.LtE),
    (ast.Gt, ast.GtE),
    (ast.Eq, ast.NotEq),
    (ast.Is, ast.IsNot),
    (ast.In, ast.NotIn),
    (ast.And, ast.Or),
    (ast.Add, ast.Sub),
    (ast.Mult, ast.Div),
    (ast.BitOr, ast.BitAnd),
)
_SWAPS: dict[type, Any] = {ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult}
_SWAPS |= {one: other for pair in _PAIRS for one, other in (pair, pair[::-1])}

# Coverage starts itself in every process that Python starts. The name of the test is read there, after each fork, and with
# each folder that a process of many command lines goes to.
_FOLLOW = """
import os
from pathlib import Path

import coverage

CURRENT = Path(os.environ["MUTANTS_CURRENT"])


def follow(go=lambda: None, *where):
    go(*where)
    coverage.Coverage.current().switch_context(CURRENT.read_text())


if coverage.Coverage.current():
    follow()
    os.register_at_fork(after_in_child=follow)
    chdir = os.chdir
    os.chdir = lambda where: follow(chdir, where)
"""
_MEASURED = """
[run]
source_pkgs = clipcid_cli
data_file = {out}/lines
parallel = true
patch =
    _exit
    fork
disable_warnings = no-data-collected, module-not-imported, module-not-measured, already-imported
"""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of the text of one file.

    Attributes:
        start, end: The bytes that are replaced.
        lines: First and last line of the statement; None where it runs at import, and every test of the file counts.
    """

    file: str
    line: int
    before: str
    after: str
    start: int
    end: int
    lines: tuple[int, int] | None

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.after.encode() + source[self.end :]

    def changed_line(self, source: bytes) -> str:
        return self.apply(source).decode().splitlines()[self.line - 1].strip()


def draw_mutants(root: Path, under: str, number: int, seed: int) -> list[Mutant]:
    """Return mutants of the files in a folder, in the order drawn: a larger number begins with the smaller one's."""
    found = [mutant for path in sorted((root / under).rglob("*.py")) for mutant in _list_mutants(path, root)]
    random.Random(seed).shuffle(found)
    drawn = []
    for mutant in found:
        with contextlib.suppress(SyntaxError):
            ast.parse(mutant.apply((root / mutant.file).read_bytes()))
            drawn.append(mutant)
        if len(drawn) == number:
            break
    return drawn


def _list_mutants(path: Path, root: Path) -> Iterator[Mutant]:
    source = path.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node, after, lines in _walk(ast.parse(source), None, in_function=False):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        yield Mutant(str(path.relative_to(root)), node.lineno, source[start:end].decode(), after, start, end, lines)


def _walk(node: ast.AST, lines: tuple[int, int] | None, in_function: bool) -> Iterator[tuple[Any, str, Any]]:
    """Yield each node that can be replaced, its replacement, and the lines that run it."""
    if isinstance(node, ast.stmt) and in_function:
        body = getattr(node, "body", None)
        lines = (node.lineno, max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno)
    for after in _mutate(node):
        yield node, after, lines
    for field, value in ast.iter_fields(node):
        if field in {"annotation", "returns", "decorator_list"}:
            continue
        inside = in_function or (isinstance(node, ast.FunctionDef) and field == "body")
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr) and not _asserts(child):
                yield from _walk(child, lines, inside)


def _mutate(node: ast.AST) -> Iterator[str]:
    """Yield the texts that a node is replaced by."""
    match node:
        case ast.Compare(ops=ops):
            for place, operator in enumerate(ops):
                changed = copy.deepcopy(node)
                changed.ops[place] = _SWAPS[type(operator)]()
                yield ast.unparse(changed)
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _SWAPS:
            if not any(_is_text(side) for side in (left, right)):
                yield f"({ast.unparse(ast.BinOp(left, _SWAPS[type(operator)](), right))})"
            elif isinstance(operator, ast.Div) and isinstance(right, ast.Constant):
                yield f"({ast.unparse(ast.BinOp(left, operator, ast.Constant('')))})"
        case ast.BoolOp(op=operator, values=values):
            yield f"({ast.unparse(ast.BoolOp(_SWAPS[type(operator)](), values))})"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield f"({ast.unparse(operand)})"
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            yield f"({value + 1})"
            yield f"({value - 1})"
        case ast.Constant(value=bool() as value):
            yield str(not value)
        case ast.Subscript(slice=ast.Constant(value=str())):
            yield ast.unparse(ast.Subscript(node.value, ast.Constant(""), node.ctx))
        case ast.Dict(keys=keys):
            for place, key in enumerate(keys):
                if _is_text(key):
                    yield ast.unparse(ast.Dict([*keys[:place], ast.Constant(""), *keys[place + 1 :]], node.values))
        case ast.Call(keywords=keywords):
            for place, keyword in enumerate(keywords):
                if keyword.arg not in {None, _ASSERTION}:
                    rest = [*keywords[:place], *keywords[place + 1 :]]
                    yield ast.unparse(ast.Call(node.func, node.args, rest))
        case ast.Return(value=value) if value is not None and not _is_none(value):
            yield "return None"
        case ast.Break():
            yield "continue"
        case ast.Continue():
            yield "break"
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Delete():
            yield "pass"
        case ast.Assign(targets=targets) if all(isinstance(one, ast.Attribute | ast.Subscript) for one in targets):
            yield "pass"


def _asserts(node: ast.AST) -> bool:
    return isinstance(node, ast.keyword) and node.arg == _ASSERTION


def _is_text(node: ast.AST | None) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


class _Recorder:
    """The plugin of the run under coverage: names tests and shared fixtures, and notes what each test uses and takes."""

    def __init__(self) -> None:
        self._current = Path(os.environ["MUTANTS_CURRENT"])
        self._tests: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Generator[None, object, object]:
        shared = [each[-1] for each in item._fixtureinfo.name2fixturedefs.values() if each[-1].scope != "function"]
        names = [item.nodeid, *map(_name_fixture, shared)]
        self._tests[item.nodeid] = {"names": names, "seconds": 0.0, "passed": True}
        self._switch(item.nodeid)
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, object, object]:
        before = self._current.read_text()
        if fixturedef.scope != "function":
            self._switch(_name_fixture(fixturedef))
        try:
            return (yield)
        finally:
            self._switch(before)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._tests[report.nodeid]["seconds"] += report.duration
        self._tests[report.nodeid]["passed"] &= report.outcome == "passed"

    def pytest_sessionfinish(self) -> None:
        Path(os.environ["MUTANTS_TESTS"]).write_text(json.dumps(self._tests))

    def _switch(self, name: str) -> None:
        import coverage

        self._current.write_text(name)
        measured = coverage.Coverage.current()
        assert measured is not None
        measured.switch_context(name)


class _Chooser:
    """The plugin of the run of one mutant: only its tests, in their order."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        wanted = json.loads(Path(os.environ["MUTANTS_TESTS"]).read_text())
        places = {name: place for place, name in enumerate(wanted)}
        items[:] = sorted((item for item in items if item.nodeid in places), key=lambda item: places[item.nodeid])


def pytest_configure(config: pytest.Config) -> None:
    """Take part in the runs that this file starts."""
    config.pluginmanager.register(_Recorder() if "MUTANTS_CURRENT" in os.environ else _Chooser())


def _name_fixture(fixture: Any) -> str:
    return f"fixture {fixture.baseid} {fixture.argname}"


def copy_checkout(out: Path, tests: Path) -> Path:
    """Copy what git knows of this checkout, with the given tests; a run that was killed leaves a mutant there."""
    place = out / "copy"
    for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
        if not name.startswith("tests/"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    if not (place / "tests").exists():
        shutil.copytree(tests, place / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    return place


def run_tests(place: Path, arguments: list[str], seconds: float | None, **environment: str) -> str | None:
    """Run tests in the copy; return what pytest printed if one failed, "" if none did, None if they took too long."""
    paths = [str(place), str(Path(__file__).parent), *filter(None, [environment.pop("PYTHONPATH", "")])]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not gpu", "-p", "mutants"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    settings = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths), "GOMP_SPINCOUNT": "0"}
    with (place.parent / "pytest.log").open("w+") as log:
        run = subprocess.Popen(
            command, cwd=place, env=settings, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = run.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)  # and what tests have left running
            run.wait()
        log.seek(0)
        return "" if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) else log.read()


def measure(place: Path) -> tuple[dict[str, Any], Any]:
    """Run the suite under coverage, once; return the tests and the data of coverage."""
    import coverage

    out = place.parent
    tests = out / "tests.json"
    settings = out / "coveragerc"
    if not tests.exists():
        settings.write_text(_MEASURED.format(out=out))
        (out / "sitecustomize.py").write_text(_FOLLOW)
        (out / "current").write_text("collection")
        run_tests(
            place,
            ["tests"],
            None,
            PYTHONPATH=str(out),
            COVERAGE_PROCESS_START=str(settings),
            MUTANTS_CURRENT=str(out / "current"),
            MUTANTS_TESTS=str(tests),
        )
        shutil.copy(out / "pytest.log", out / "measured.log")
    measured = coverage.Coverage(config_file=str(settings), data_suffix=False)
    if not (out / "lines").exists():
        measured.combine([str(out)], strict=True)
        measured.save()
    measured.load()
    with (out / "coverage.txt").open("w") as report:
        measured.report(file=report, ignore_errors=True)
    return json.loads(tests.read_text()), measured.get_data()


def choose_tests(
    mutant: Mutant, place: Path, tests: dict[str, Any], data: Any, seconds: float
) -> tuple[list[str], float]:
    """Return the tests that reach a mutant, the fastest of each file first, as many as the time allows, and their time."""
    lines = data.contexts_by_lineno(str(place / mutant.file))
    first, last = mutant.lines or (0, sys.maxsize)
    reached = {name for line, names in lines.items() if first <= line <= last for name in names}
    chosen = [name for name, test in tests.items() if test["passed"] and reached.intersection(test["names"])]
    chosen.sort(key=lambda name: tests[name]["seconds"])
    rounds: collections.Counter[str] = collections.Counter()
    order = {}
    for name in chosen:
        file = name.partition("::")[0]
        order[name] = rounds[file]
        rounds[file] += 1
    chosen.sort(key=lambda name: (order[name], tests[name]["seconds"]))
    taken = []
    total = 0.0
    for name in chosen:
        if total + tests[name]["seconds"] <= seconds or not taken:
            taken.append(name)
            total += tests[name]["seconds"]
    return taken, total


def judge(mutant: Mutant, place: Path, tests: list[str], seconds: float) -> str:
    """Say what becomes of a mutant: killed by which test, timeout, or survived."""
    path = place / mutant.file
    source = path.read_bytes()
    if (changed := mutant.changed_line(source)) in UNSEEN:
        return f"unseen: {UNSEEN[changed]}"
    if not tests:
        return "survived: no test reaches it"
    wanted = place.parent / "wanted.json"
    wanted.write_text(json.dumps(tests))
    files = sorted({name.partition("::")[0] for name in tests})
    try:
        _write_source(path, mutant.apply(source))
        answer = run_tests(place, ["-x", *files], 5 * seconds + 120, MUTANTS_TESTS=str(wanted))
    finally:
        _write_source(path, source)
    if answer is None:
        return "killed: timeout"
    if answer == "":
        return f"survived {len(tests)} tests"
    failed = [line for line in answer.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return f"killed: {failed[0].partition(' - ')[0].partition(' ')[2] if failed else 'no test starts'}"


def _write_source(path: Path, source: bytes) -> None:
    """Write a file of the package, so that no process takes what was compiled of it before."""
    path.write_bytes(source)
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


def write_table(path: Path, answers: list[tuple[Mutant, str, float]]) -> None:
    """Write the share killed, and a row a mutant."""
    killed = sum(answer.startswith("killed") for _, answer, _ in answers)
    seen = sum(not answer.startswith("unseen") for _, answer, _ in answers)
    lines = [f"{killed} of {seen} mutants killed ({killed / max(seen, 1):.0%}).", ""]
    lines += ["| | where | before | after | | s |", "|---|---|---|---|---|---|"]
    for number, (mutant, answer, seconds) in enumerate(answers):
        before, after = (" ".join(text.split()).replace("|", "\\|")[:120] for text in (mutant.before, mutant.after))
        place = f"{mutant.file}:{mutant.line}"
        lines.append(f"| {number} | {place} | `{before}` | `{after}` | {answer} | {seconds:.0f} |")
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Draw, run and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tests", type=Path, default=ROOT / "tests", help="the suite that is judged")
    parser.add_argument("--under", default=PACKAGE, help="folder of the package that mutants are drawn from")
    parser.add_argument("--number", type=int, default=100, help="of mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60, help="of tests for one mutant, by their measured times")
    options = parser.parse_args()
    out = options.out.resolve()
    place = copy_checkout(out, options.tests)
    tests, data = measure(place)
    print(f"Lines: {(out / 'coverage.txt').read_text().splitlines()[-1]}")
    known = out / f"answers-{options.seed}-{options.under.replace('/', '.')}.json"
    answers: dict[str, Any] = json.loads(known.read_text()) if known.exists() else {}
    table = []
    for number, mutant in enumerate(draw_mutants(place, options.under, options.number, options.seed)):
        if str(number) not in answers:
            began = time.monotonic()
            chosen, seconds = choose_tests(mutant, place, tests, data, options.seconds)
            answers[str(number)] = [judge(mutant, place, chosen, seconds), time.monotonic() - began]
            known.write_text(json.dumps(answers))
        table.append((mutant, *answers[str(number)]))
        print(f"{number} {mutant.file}:{mutant.line} {answers[str(number)][0]}", flush=True)
        write_table(out / "mutants.md", table)


if __name__ == "__main__":
    main()
