"""The shape of the project in figures: modules, rooms, imports between rooms, circles, arrows that point up, lines.

    python scripts/structure.py [DIRECTORY ...]

A room is a folder of modules, or a module that lies in the package's own folder. An arrow is that a room imports from
another, however often. ``tests/test_light_imports.py`` holds the package to the floors that stand here.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

PACKAGE = "gta_edge"

# From the top down; who is on a floor may import from it and from those below. ``docs/architecture.md`` says what
# each is for.
FLOORS = (
    "cli",
    "serve",
    "evaluate",
    "export",
    "runtime",
    "accuracy",
    "graph",
    "plan",
    "formats",
    "model",
    "plugins",
    "machine",
    "cuda",
    "libraries",
    "numerics",
    "support",
    "errors",
    "version",
)
STRANGERS = {("export", "runtime")}
"""Floors of which the upper one has no business on the lower one."""

SIBLINGS = {
    "gta_edge.plugins": ("attention", "cache", "elementwise", "matmul"),
    "gta_edge.runtime": ("onnxruntime", "tensorrt", "torch"),
}
"""Folders that do not know each other: ops, and engines."""

PARTS = (PACKAGE, "benchmarks", "tests")
SOURCES = frozenset({".py", ".cu", ".cuh", ".cpp", ".h", ".sh", ".toml", ".jinja"})

Graph = Mapping[str, set[str]]
"""By module or room, those that it imports from."""


# --- reading ---------------------------------------------------------------------------------------------------------


def modules(package: Path) -> dict[str, Path]:
    """Return the files of every module of the package by the module's name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, names: Iterable[str]) -> Iterator[str]:
    """Yield what of the package this source imports, anywhere in it, by statement or by name.

    Args:
        source: Python.
        names: of the package's modules.
    """
    known = set(names)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            # what is imported is a module itself, or something in one
            found = [f if (f := f"{node.module}.{alias.name}") in known else str(node.module) for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = [node.value] if node.value in known and "." in node.value else []
        else:
            continue
        yield from (name for name in found if name.partition(".")[0] == PACKAGE)


def import_graph(package: Path) -> dict[str, set[str]]:
    """Return which module imports which; without the package's face, which reaches for anything."""
    found = modules(package)
    graph = {name: set(imports(path.read_text(encoding="utf-8"), found)) for name, path in found.items()}
    del graph[PACKAGE]
    return {name: (others & graph.keys()) - {name} for name, others in graph.items()}


# --- which module may import which -----------------------------------------------------------------------------------


def floor(module: str) -> str:
    """Return the part of the package that a module belongs to; ``cli`` for the command by another name."""
    parts = module.split(".")
    return "cli" if parts[1:] == ["__main__"] else parts[1] if len(parts) > 1 else ""


def may_import(module: str, other: str) -> bool:
    """Tell whether an import goes down; the package's own face reaches for anything, and only commands for it."""
    upper, lower = floor(module), floor(other)
    for parent, names in SIBLINGS.items():
        inside = [name for name in names if f"{module}.".startswith(f"{parent}.{name}.")]
        if any(f"{other}.".startswith(f"{parent}.{name}.") for name in names if inside and name not in inside):
            return False
    if not upper:
        return lower != "cli"
    if not lower:
        return upper == "cli"
    return FLOORS.index(upper) <= FLOORS.index(lower) and (upper, lower) not in STRANGERS


# --- rooms -----------------------------------------------------------------------------------------------------------


def room(module: str, package: Path) -> str:
    """Return the folder that a module lies in; the module itself where that is the package's own folder."""
    if package.parent.joinpath(*module.split(".")).is_dir():
        return module
    folder = module.rpartition(".")[0]
    return module if folder == PACKAGE else folder


def rooms(graph: Graph, package: Path) -> dict[str, set[str]]:
    """Return which room imports from which other."""
    found: dict[str, set[str]] = {}
    for module, others in graph.items():
        own = room(module, package)
        found.setdefault(own, set()).update({room(other, package) for other in others} - {own})
    return found


def circles(graph: Graph) -> list[set[str]]:
    """Return the largest groups of which each member reaches every other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            group = set(stack[at:])
            del stack[at:]
            if len(group) > 1:
                found.append(group)

    for name in graph:
        if name not in index:
            visit(name)
    return found


def lines(folder: Path) -> int:
    """Return the lines of all sources below a folder."""
    files = (path for path in folder.rglob("*") if path.suffix in SOURCES and path.is_file())
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


# --- the figures -----------------------------------------------------------------------------------------------------


def figures(root: Path) -> dict[str, int]:
    """Return everything that is counted, by what it is called."""
    package = root / PACKAGE
    graph = import_graph(package)
    arrows = [(module, other) for module, others in graph.items() for other in others]
    placed = [pair for pair in arrows if {floor(name) for name in pair} <= set(FLOORS)]
    between = rooms(graph, package)
    found = {
        "modules": len(graph) + 1,
        "rooms": len(between),
        "arrows between rooms": sum(map(len, between.values())),
        "circles of modules": len(circles(graph)),
        "circles of rooms": len(circles(between)),
        "imports of modules": len(arrows),
        "of these upward": sum(not may_import(*pair) for pair in placed),
        "of these without a floor": len(arrows) - len(placed),
    }
    return found | {f"lines of {part}": lines(root / part) for part in PARTS}


def main(words: list[str]) -> None:
    """Print a column of figures for each directory."""
    roots = [Path(word) for word in words] or [Path(__file__).parents[1]]
    for root in roots:
        if not (root / PACKAGE).is_dir():
            raise SystemExit(f"error: {root} has no folder {PACKAGE}; give the root of a working tree")
    columns = [figures(root) for root in roots]
    for name in columns[0]:
        print(f"{name:<26}" + "".join(f"{column[name]:>10,}" for column in columns))


if __name__ == "__main__":
    main(sys.argv[1:])
