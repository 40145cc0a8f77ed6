"""Each module imports what it uses: tests run in processes that have imported everything, where nothing would be missing."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "clipcid_cli"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# Their modules are loaded when they are first used, and both have types: mypy knows which there are.
LOADED_WHEN_USED = ("numpy", "torch")


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


def find_package(name: str) -> list[Path]:
    """Return the places of an installed package's modules; none is imported for it."""
    top, *inner = name.split(".")
    spec = importlib.util.find_spec(top)
    return [Path(place, *inner) for place in (spec and spec.submodule_search_locations) or []]


def has_to_be_imported(name: str) -> bool:
    """Tell whether an installed module has this name, and the text of its package does not import it."""
    package, _, last = name.rpartition(".")
    for place in find_package(package):
        if (place / f"{last}.py").is_file() or (place / last / "__init__.py").is_file():
            imports = list_imports(ast.parse((place / "__init__.py").read_bytes()), at_once=True)
            words = {word for node in imports for module in list_imported(node) for word in module.split(".")}
            return last not in words
    return False


def find_unimported(text: str) -> set[str]:
    """Find the modules that a text takes as attributes of their packages, though nothing in it imports them."""
    tree = ast.parse(text)
    loaded = set[str]()
    bound: dict[str, str] = {}
    for node in list_imports(tree):
        loaded |= set(list_imported(node))
        for alias in node.names:
            if isinstance(node, ast.ImportFrom):
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            elif alias.asname:
                bound[alias.asname] = alias.name
            else:  # `import a.b` binds a
                top = alias.name.partition(".")[0]
                bound[top] = top
    used = {
        f"{bound[node.value.id]}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound
    }
    return {
        name for name in used - loaded if name.partition(".")[0] not in LOADED_WHEN_USED and has_to_be_imported(name)
    }


def test_modules_are_imported_where_they_are_used() -> None:
    assert find_unimported("import pyarrow as pa\npa.dataset.dataset(1)") == {"pyarrow.dataset"}
    assert find_unimported("import matplotlib\ndef f():\n    matplotlib.figure.Figure()") == {"matplotlib.figure"}
    assert find_unimported("from clipcid_cli import formats\nformats.atomic.f()") == {"clipcid_cli.formats.atomic"}
    assert find_unimported("import pyarrow as pa\nimport pyarrow.dataset\npa.dataset.dataset(pa.table({}))") == set()
    assert find_unimported("import pyarrow as pa\npa.ipc.open_file(1)") == set(), "pyarrow imports it"
    found = {name: find_unimported(path.read_text()) for name, path in FILES.items()}
    assert {name: modules for name, modules in found.items() if modules} == {}
