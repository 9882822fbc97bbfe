"""What the package requires is read where it is said, in the source or in what pip wrote down."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from gta_edge.errors import BackendError
from gta_edge.libraries import optional, requirements
from tests.helpers.commands import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NOWHERE = Path("/nonexistent/pyproject.toml")


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    requirements.floors.cache_clear()
    yield
    requirements.floors.cache_clear()


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_floor_of_the_project_is_one_here() -> None:
    """So no library that has a floor can be older without a word."""
    entries = [*project()["dependencies"]]
    for extra, wanted in project()["optional-dependencies"].items():
        entries += wanted if extra not in ("dev", "test") else []
    named = {re.match(r"[\w.-]+", entry)[0].lower().replace("_", "-"): entry for entry in entries if ">=" in entry}
    floors = requirements.floors()
    missing = {name for name, entry in named.items() if not floors[name] and "python_version" not in entry}
    assert missing == set()
    assert set(named) >= {"numpy", "onnx", "onnx-ir", "onnxscript", "torch", "tokenizers", "safetensors"}
    assert not {"pytest", "ruff", "mypy"} & set(floors)


def test_what_is_always_required_is_no_extras() -> None:
    floors = requirements.floors(requirements.ALWAYS)
    assert {"numpy", "safetensors", "tokenizers"} <= set(floors)
    assert not {"torch", "onnx-ir", "matplotlib"} & set(floors)
    assert set(requirements.floors("plot")) == {"matplotlib"}


def test_the_source_counts_before_what_pip_wrote_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip writes when the source is installed; afterwards the source may come to require more."""
    monkeypatch.setattr(requirements, "requires", lambda name: ["numpy>=0.1", "onnx-ir>=0.1; extra == 'ort'"])
    assert (
        requirements.floors()["onnx-ir"]
        == re.search(r"onnx-ir>=([\d.]+)", str(project()["optional-dependencies"]["ort"]))[1]
    )


def test_a_wheel_has_what_pip_wrote_down(monkeypatch: pytest.MonkeyPatch) -> None:
    written = ["numpy>=1.24", 'Onnx_IR>=1.1; extra == "ort"', "pytest>=8; extra == 'test'", "x[y]>=2,<3 ; extra == 'z'"]
    monkeypatch.setattr(requirements, "requires", lambda name: written)
    monkeypatch.setattr(requirements, "_of_source", lambda path: {})
    assert requirements.floors() == {"numpy": "1.24", "onnx-ir": "1.1", "x": "2"}
    assert requirements.floors("") == {"numpy": "1.24"}


def test_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(requirements, "requires", requires)
    assert requirements.requirements(NOWHERE) == {}


@pytest.mark.parametrize(
    "content",
    [b"", b"[project", b"\xff", b"[project]\nname = 'gta-edge'", b"[project]\nname = 'another'\n", b"project=1"],
)
def test_a_project_that_is_not_this_one(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path := tmp_path / "pyproject.toml").write_bytes(content)
    monkeypatch.setattr(requirements, "requires", lambda name: ["numpy>=1.24"])
    assert requirements.requirements(path) == {"": ["numpy>=1.24"]}


def test_a_library_that_is_too_old_for_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the package is run from a clone that was never installed."""

    def requires(name: str) -> None:
        raise PackageNotFoundError(name)

    import onnx_ir

    monkeypatch.setattr(requirements, "requires", requires)
    monkeypatch.setattr(onnx_ir, "__version__", "0.1.9")
    with pytest.raises(BackendError) as caught:
        optional.optional("onnx_ir", "ort").load("x")
    assert re.fullmatch(
        r"the Python module onnx_ir is of onnx-ir 0\.1\.9, which is too old; expected [\d.]+ or later; "
        r"run: pip install 'onnx-ir>=[\d.]+'",
        str(caught.value),
    )
