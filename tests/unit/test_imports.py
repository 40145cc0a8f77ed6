"""Each module imports what it uses: tests run in processes that have imported everything, where nothing would be missing."""

from __future__ import annotations

import ast
import functools
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


def read_imports(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports that happen when the module is imported, in its order."""
    rest: list[ast.AST] = list(tree.body)
    while rest:
        node = rest.pop(0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            rest = [*node.orelse, *rest]
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            rest = [*ast.iter_child_nodes(node), *rest]


def list_imported(node: ast.Import | ast.ImportFrom, package: str = "") -> list[str]:
    """List the names that an import may load as modules: of `from a import b`, both a and a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
    module = ".".join(filter(None, (parent, node.module)))
    return [module, *(f"{module}.{alias.name}" for alias in node.names)]


def test_modules_can_be_imported_in_any_order() -> None:
    graph = {
        name: {
            module
            for node in read_imports(ast.parse(path.read_bytes()))
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


@functools.cache
def find_package(name: str) -> Path | None:
    """Return the folder of an installed package, which is not imported; None of a module that is a single file."""
    top, *inner = name.split(".")
    spec = importlib.util.find_spec(top)
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        if (folder := Path(place, *inner)).is_dir():
            return folder
    return None


def is_module(name: str) -> bool:
    """Tell whether an installed module has this name."""
    package, _, last = name.rpartition(".")
    folder = find_package(package) if package else None
    return folder is not None and ((folder / f"{last}.py").is_file() or (folder / last / "__init__.py").is_file())


@functools.cache
def loads_itself(package: str) -> frozenset[str]:
    """Return the modules that a package imports when it is imported, as its own text says."""
    folder = find_package(package)
    if folder is None or not (folder / "__init__.py").is_file():
        return frozenset()
    tree = ast.parse((folder / "__init__.py").read_bytes())
    return frozenset(name for node in read_imports(tree) for name in list_imported(node, package))


def find_unimported(text: str) -> list[str]:
    """List the modules that a text takes as attributes of their packages, though nothing in it imports them."""
    tree = ast.parse(text)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    loaded = {name for node in imports for name in list_imported(node)}
    bound: dict[str, str] = {}
    for node in imports:
        for alias in node.names:
            if isinstance(node, ast.ImportFrom):
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            elif alias.asname:
                bound[alias.asname] = alias.name
            else:  # `import a.b` binds a
                top = alias.name.partition(".")[0]
                bound[top] = top
    found = set()
    for used in ast.walk(tree):
        if not (isinstance(used, ast.Attribute) and isinstance(used.value, ast.Name) and used.value.id in bound):
            continue
        package = bound[used.value.id]
        name = f"{package}.{used.attr}"
        if package.partition(".")[0] not in LOADED_WHEN_USED and is_module(name):
            there = loaded | loads_itself(package)
            if not any(each == name or each.startswith(f"{name}.") for each in there):
                found.add(name)
    return sorted(found)


def test_a_module_that_is_not_imported_is_found() -> None:
    assert find_unimported("import pyarrow as pa\npa.dataset.dataset(1)") == ["pyarrow.dataset"]
    assert find_unimported("import matplotlib\ndef f():\n    matplotlib.figure.Figure()") == ["matplotlib.figure"]
    assert find_unimported("from clipcid_cli import formats\nformats.atomic.f()") == ["clipcid_cli.formats.atomic"]
    assert find_unimported("import pyarrow as pa\nimport pyarrow.dataset\npa.dataset.dataset(pa.table({}))") == []
    assert find_unimported("import pyarrow as pa\npa.ipc.open_file(1)") == [], "pyarrow imports it"


def test_modules_are_imported_where_they_are_used() -> None:
    found = {name: find_unimported(path.read_text()) for name, path in FILES.items()}
    assert {name: modules for name, modules in found.items() if modules} == {}
