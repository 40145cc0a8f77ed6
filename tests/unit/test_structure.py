"""What is true of the package's modules: names, what folders say, and that any can be imported first."""

from __future__ import annotations

import ast
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "clipcid_cli"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def test_every_folder_says_what_it_is_and_nothing_is_called_utils() -> None:
    for path in FILES.values():
        assert not {path.stem, path.parent.name} & {"utils", "util", "helpers", "misc", "common"}, path
        assert (path.parent / "__init__.py").read_text(encoding="utf-8").startswith('"""'), path


def test_no_two_test_files_have_the_same_name() -> None:
    # pytest imports them by name; a run of one folder alone would not notice.
    names = [path.name for path in (PACKAGE.parent / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_images_are_opened_in_one_place() -> None:
    # Which says what is decoded of forty formats; anything else would take what comes.
    opening = [name for name, path in FILES.items() if "Image.open(" in path.read_text(encoding="utf-8")]
    assert opening == ["clipcid_cli.runtime.models.decode"]


def list_imported_at_once(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a module's import may load as modules: of `from a import b`, both a and a.b."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from list_imported_at_once(node)


@functools.cache
def find_imports() -> dict[str, set[str]]:
    """Return, for each module, those of the package that its import loads at once."""
    return {
        name: (set(list_imported_at_once(ast.parse(path.read_bytes()))) & FILES.keys()) - {name}
        for name, path in FILES.items()
    }


# What only some runs of a command use, as parts of the names of modules.
FEW_USE = {
    "steps.balance.run": (
        "steps.balance.filters.a",
        "steps.balance.filters.c",
        "steps.balance.filters.near",
        "steps.balance.filters.reference",
        "steps.balance.cost",
        "steps.balance.merge",
        "steps.balance.partition",
        "steps.balance.saved",
        "steps.balance.write_data",
        "steps.embed.",
        "formats.data.benchmark",
        "formats.data.remote",
    ),
    "steps.distill.run": (
        "formats.data.distant",
        "formats.data.remote",
        "formats.data.shard_cache",
        "formats.models.export",
        "formats.results.boards",
        "formats.results.keep_list",
        "steps.chosen_keep_list",
        "steps.distill.clusters",
        "steps.distill.extra_texts",
        "steps.distill.kept_text",
        "steps.distill.named_data",
        "steps.distill.online_teacher",
        "steps.distill.own_losses",
        "steps.embed.run",
        "steps.several_teachers",
        "steps.shard_copies",
    ),
}


@pytest.mark.parametrize("command", FEW_USE)
def test_a_command_loads_at_once_no_room_that_only_some_of_its_runs_use(command: str) -> None:
    imports = find_imports()
    loaded: set[str] = set()
    left = {f"clipcid_cli.{command}"}
    while left:
        loaded |= left
        left = set[str]().union(*(imports[name] for name in left)) - loaded
    assert len(loaded) > 50
    unused = tuple(f"clipcid_cli.{name}" for name in FEW_USE[command])
    assert [name for name in sorted(loaded) if name.startswith(unused)] == []


def test_modules_can_be_imported_in_any_order() -> None:
    graph = find_imports()
    assert len(graph["clipcid_cli.cli"]) > 3
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"which is imported first decides whether this works: {' ← '.join(error.args[1])}")
