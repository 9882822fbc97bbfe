"""What is loaded when, what is public, and which module may import which."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gta_edge
from gta_edge import errors
from scripts.structure import circles, figures, import_graph, imports, may_import, modules
from tests.helpers.commands import ROOT, environment

PACKAGE = Path(gta_edge.__file__).parent
MODULES = modules(PACKAGE)
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


# --- which module may import which ---------------------------------------------------------------------------------


def forbidden(module: str, source: str) -> list[str]:
    return [name for name in imports(source, MODULES) if not may_import(module, name)]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    assert forbidden(module, MODULES[module].read_text()) == []


def test_no_module_reaches_itself() -> None:
    """Through imports at any place, in functions too."""
    assert circles(import_graph(PACKAGE)) == []


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
    assert forbidden(module, source)


def test_the_figures_of_a_tree(tmp_path: Path) -> None:
    """Two modules of the ground that import each other, and one that reaches up."""
    sources = {
        "gta_edge/__init__.py": "",
        "gta_edge/errors.py": "from gta_edge.cli import app",
        "gta_edge/cli/__init__.py": "",
        "gta_edge/cli/app.py": "import gta_edge.errors\n\nfrom gta_edge.support.files import read",
        "gta_edge/support/__init__.py": "",
        "gta_edge/support/files.py": "def read():\n    return 1",
        "tests/test_app.py": "\n\n",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert figures(tmp_path) == {
        "modules": 6,
        "rooms": 3,
        "arrows between rooms": 3,
        "circles of modules": 1,
        "circles of rooms": 1,
        "imports of modules": 3,
        "of these upward": 1,
        "of these without a floor": 0,
        "lines of gta_edge": 6,
        "lines of benchmarks": 0,
        "lines of tests": 2,
    }


# --- the tests themselves ------------------------------------------------------------------------------------------


def imported_tests(source: str) -> list[str]:
    """Test modules that this source imports; of what they share, ``tests.helpers`` is the place."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in found if re.match(r"tests\b.*\.(test_|conftest\b)", name)]


def test_no_test_module_is_imported() -> None:
    found = {path: imported_tests(path.read_text()) for path in (ROOT / "tests").rglob("*.py")}
    assert len(found) > 100
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from tests.model.test_config import SIZES",
        "from tests.model import test_config",
        "def f():\n    import tests.model.test_config as other",
        "from tests.conftest import TINY",
    ],
)
def test_imports_of_tests_that_would_be_found(source: str) -> None:
    assert imported_tests(source)
