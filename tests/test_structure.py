"""Rules for the whole source tree: unique class names, short functions and no import cycles."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PACKAGES = ("tofu", "client", "server", "attacks", "deploy")
MAX_LINES = 60


def definitions(*folders: str) -> Iterator[tuple[str, ast.AST]]:
    """(path, node) of everything in the Python files of some folders."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                yield path.relative_to(ROOT).as_posix(), node


def test_no_two_classes_share_a_name() -> None:
    files = defaultdict(list)
    for path, node in definitions(*PACKAGES):
        if isinstance(node, ast.ClassDef):
            files[node.name].append(path)
    shared = {name: paths for name, paths in files.items() if len(paths) > 1}
    assert not shared


def test_functions_are_short() -> None:
    too_long = {
        f"{path}:{node.name}": lines
        for path, node in definitions(*PACKAGES)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_LINES
    }
    assert not too_long


def test_imports_have_no_cycle() -> None:
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert "tofu.plugins" in imports["tofu.settings"]  # an import within a function counts, too
    TopologicalSorter(imports).prepare()  # raises CycleError with the modules of a cycle
