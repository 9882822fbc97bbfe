"""What is loaded when, what is public, and which module may import which."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gta_edge
from gta_edge import errors
from tests.cli import environment

PACKAGE = Path(gta_edge.__file__).parent
HEAVY = (
    "cuda",
    "tensorrt_lean_bindings",
    "torch",
    "onnx",
    "onnxruntime",
    "onnx_ir",
    "onnxscript",
    "tensorrt",
    "tensorrt_rtx",
    "transformers",
)


def run_python(script: str) -> str:
    """Run a script in an interpreter of its own and return what it printed."""
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], env=environment(), capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


# --- what an import loads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        "gta_edge",
        "gta_edge.plugins",
        "gta_edge.runtime",
        "gta_edge.runtime.registry",
        "gta_edge.export",
        "gta_edge.cli",
    ],
)
def test_a_package_loads_nothing_heavy(module: str) -> None:
    loaded = json.loads(run_python(f"import json, sys, {module}; print(json.dumps(list(sys.modules)))"))
    assert module in loaded
    assert sorted(set(HEAVY) & set(loaded)) == []


def test_commands_learn_names_without_loading_numpy() -> None:
    script = "import sys, gta_edge.runtime.registry, gta_edge.numerics.dtypes; print('numpy' in sys.modules)"
    assert run_python(script).split() == ["False"]


def test_what_would_be_seen() -> None:
    assert "onnx" in run_python("import sys, onnx; print(list(sys.modules))")


# --- what is public ------------------------------------------------------------------------------------------------


def imported_names(statements: list[ast.stmt]) -> Iterator[str]:
    """Names that these statements take from the package's own modules, also those for type checkers only."""
    for statement in statements:
        if isinstance(statement, ast.ImportFrom) and str(statement.module).startswith("gta_edge."):
            yield from (alias.asname or alias.name for alias in statement.names)
        elif isinstance(statement, ast.If):
            yield from imported_names(statement.body)


def test_all_is_exact() -> None:
    assert len(set(gta_edge.__all__)) == len(gta_edge.__all__)
    for name in gta_edge.__all__:
        assert getattr(gta_edge, name) is not None
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assert set(imported_names(tree.body)) == set(gta_edge.__all__)
    assert dir(gta_edge) == sorted(gta_edge.__all__)


def test_every_error_is_public_and_in_the_tree() -> None:
    assert set(errors.__all__) <= set(gta_edge.__all__)
    drawn = str(errors.__doc__)
    for name in errors.__all__:
        error = getattr(gta_edge, name)
        assert issubclass(error, gta_edge.GtaEdgeError)
        assert name in drawn
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert classes == set(errors.__all__)


def test_what_users_rely_on() -> None:
    assert {"export_model", "load", "generate", "GtaEdgeError", "__version__"} <= set(gta_edge.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        gta_edge.nonsense  # noqa: B018


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package, by name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


# --- which module may import which ---------------------------------------------------------------------------------

# From the top down; who is on a floor may import from it and from those below. ``docs/architecture.md`` says what
# each is for.
FLOORS = (
    "cli",
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
    "gta_edge.plugins": ("attention", "matmul"),
    "gta_edge.runtime": ("onnxruntime", "tensorrt", "torch"),
}
"""Folders that do not know each other: ops, and engines."""


def floor(module: str) -> str:
    """The part of the package that a module belongs to; ``cli`` for the command by another name."""
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


def imports(source: str, names: set[str]) -> Iterator[str]:
    """Modules of the package that this source imports, anywhere in it, by statement or by name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            # what is imported is a module itself, or something in one
            found = [f if (f := f"{node.module}.{alias.name}") in names else str(node.module) for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = [node.value] if node.value in names and "." in node.value else []
        else:
            continue
        yield from (name for name in found if name.partition(".")[0] == "gta_edge")


def forbidden(module: str, source: str, names: set[str]) -> list[str]:
    return [name for name in imports(source, names) if not may_import(module, name)]


@pytest.mark.parametrize("module", [name for name, _ in modules()])
def test_imports_go_one_way(module: str) -> None:
    found = dict(modules())
    assert forbidden(module, found[module].read_text(), set(found)) == []


def test_no_module_reaches_itself() -> None:
    """Through imports at any place, in functions too."""
    found = dict(modules())
    graph = {name: {each for each in imports(path.read_text(), set(found)) if each} for name, path in found.items()}
    del graph["gta_edge"]  # the face reaches for anything, and only commands for it
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gta_edge.plugins.matmul.torch", "from gta_edge.plugins.attention.kernels import Buffers"),
        ("gta_edge.runtime.torch.session", "from gta_edge.runtime.onnxruntime import session"),
        ("gta_edge.runtime.session", "from gta_edge.export import pipeline"),
        ("gta_edge.export.trace", "def f():\n    from gta_edge.runtime.session import Session"),
        ("gta_edge.export.trace", "from gta_edge import load"),
        ("gta_edge.export.passes.tie_head", "import gta_edge.runtime"),
        ("gta_edge.plugins.attention.torch", "from gta_edge.runtime import session"),
        ("gta_edge.model.config", "from gta_edge import cli"),
        ("gta_edge.model.config", "from gta_edge.cli.output import current"),
        ("gta_edge.formats.bundle", "import_module('gta_edge.runtime.session')"),
        ("gta_edge.formats.bundle", "import gta_edge"),
    ],
)
def test_imports_that_would_be_found(module: str, source: str) -> None:
    assert forbidden(module, source, {name for name, _ in modules()})
