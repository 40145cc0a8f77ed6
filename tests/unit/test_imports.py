"""Each module imports what it uses: tests run in processes that have imported everything, where nothing would be missing."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "clipcid_cli"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def list_imports(tree: ast.AST, *, at_once: bool = False) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield a module's imports; if `at_once`, those that happen when it is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not at_once:
            yield from list_imports(node)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from list_imports(node, at_once=True)


def list_imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """List the names that an import may load as modules: of `from a import b`, both a and a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]


def test_modules_can_be_imported_in_any_order() -> None:
    graph = {
        name: {
            module
            for node in list_imports(ast.parse(path.read_bytes()), at_once=True)
            for module in list_imported(node)
            if module in FILES and module != name
        }
        for name, path in FILES.items()
    }
    assert len(graph["clipcid_cli.cli"]) > 3
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"which is imported first decides whether this works: {' ← '.join(error.args[1])}")
