"""A library that is there and cannot be used is told from one that is not installed, with its own reason."""

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gta_edge.errors import BackendError
from gta_edge.libraries import optional as module
from gta_edge.libraries.install import install_command
from gta_edge.libraries.optional import UnusableError, find_module, installed, optional
from tests.helpers.commands import Result, environment

NAME = "gta_edge_made_up"
DISTRIBUTION = "gta-edge-made-up"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose modules can be imported, of a distribution that is required from 1.2 on."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "_failures", {})
    monkeypatch.setattr(module, "floors", lambda *extras: {DISTRIBUTION: "1.2"})
    for name in [name for name in sys.modules if name.startswith(NAME)]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def write(directory: Path, source: str, part: str = "__init__") -> Path:
    path = directory / NAME / f"{part}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    return path


def refusal(name: str = NAME) -> str:
    """What using it says, which is one line."""
    found = optional(name, "plot")
    assert not installed(found)
    with pytest.raises(BackendError) as caught:
        found.some.thing()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_that_works(library: Path) -> None:
    write(library, "__version__ = '1.2.0+local'")
    write(library, "answer = 42", "inner")
    assert installed(optional(NAME, "plot"))
    assert optional(f"{NAME}.inner", "plot").answer == 42


@pytest.mark.parametrize("name", [NAME, f"{NAME}.inner"])
def test_one_that_is_not_installed(library: Path, name: str) -> None:
    assert find_module(name) is None
    assert refusal(name) == f"the Python module {name} is needed and not installed; run: {install_command('plot')}"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "raise ImportError('numpy.core.multiarray failed to import')",
            "ImportError: numpy.core.multiarray failed to ",
        ),
        ("raise ImportError('libx.so.1: cannot open;\\n  no file')", "ImportError: libx.so.1: cannot open, no file"),
        ("import gta_edge_not_there", "ModuleNotFoundError: No module named 'gta_edge_not_there'"),
        ("raise RuntimeError", "RuntimeError: RuntimeError"),
        ("raise SystemError('initialization failed')", "SystemError: initialization failed"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("class Panic(BaseException): pass\nraise Panic('panicked')", "Panic: panicked"),
        ("raise ValueError('\\x1b[31m' + 'x' * 100_000)", r"ValueError: \x1b[31mxxx"),
        ("def (", "SyntaxError: "),
    ],
)
def test_one_whose_import_fails(library: Path, source: str, reason: str) -> None:
    write(library, source)
    said = refusal()
    assert said.startswith(f"the Python module {NAME} is installed and cannot be loaded ({reason}")
    assert said.endswith(f"; run: pip install --upgrade --force-reinstall {DISTRIBUTION}")
    assert len(said) < 800


def test_the_first_failure_is_the_cause(library: Path) -> None:
    """Many libraries fail in another way when they are imported again."""
    write(library, "import sys\nsys.tries = getattr(sys, 'tries', 0) + 1\nraise ImportError(f'try {sys.tries}')")
    assert "(ImportError: try 1)" in refusal()
    assert "(ImportError: try 1)" in refusal()


def test_an_interrupt_that_a_module_makes_an_error_of_is_one(library: Path) -> None:
    write(library, "try:\n    raise KeyboardInterrupt\nexcept BaseException as e:\n    raise ImportError('no') from e")
    for _ in range(2):  # the library is not to blame, and may be asked for again
        with pytest.raises(KeyboardInterrupt):
            find_module(NAME)


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "MemoryError"])
def test_what_is_not_the_librarys_fault(library: Path, error: str) -> None:
    write(library, f"raise {error}")
    with pytest.raises((KeyboardInterrupt, MemoryError)):
        find_module(NAME)


@pytest.mark.parametrize("name", [NAME, f"{NAME}.inner"])
def test_a_directory_that_was_left(library: Path, name: str) -> None:
    (library / NAME).mkdir()
    assert refusal(name) == (
        f"the Python module {name} is only a directory, {library / NAME}, which a removed package has left; "
        f"remove {library / NAME}, and install it again"
    )


def test_one_that_is_half_removed(library: Path) -> None:
    path = write(library, "")
    assert f"is not whole: {path} is what a removed package has left" in refusal()


@pytest.mark.parametrize("name", [NAME, f"{NAME}.inner"])
def test_a_file_that_hides_it(library: Path, name: str) -> None:
    path = library / f"{NAME}.py"
    path.write_text("__version__ = '9'")
    assert refusal(name) == (
        f"the Python module {name} is hidden by {path}, which is something else of that name; remove or rename {path}"
    )


def test_a_part_that_is_missing(library: Path) -> None:
    path = write(library, "__version__ = '1.2'")
    assert f"the Python module {NAME}.inner is missing from {path}; run: pip install" in refusal(f"{NAME}.inner")


OLD = f"is of {DISTRIBUTION} 1.1.9, which is too old; expected 1.2 or later; run: pip install '{DISTRIBUTION}>=1.2'"


@pytest.mark.parametrize("name", [NAME, f"{NAME}.inner"])
def test_one_that_is_too_old(library: Path, name: str) -> None:
    write(library, "__version__ = '1.1.9'")
    assert refusal(name) == f"the Python module {name} {OLD}"


def test_one_that_is_too_old_for_another_one(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda-core cannot be imported with an old cuda-bindings, and only says which of its modules is missing."""
    write(library, "__version__ = '1.1.9'")
    (library / "gta_edge_user.py").write_text(f"import {NAME}.inner")
    assert refusal("gta_edge_user") == f"the Python module {NAME}.inner {OLD}"


def test_what_is_too_old_of_all_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.too_old() is None
    monkeypatch.setattr(
        module, "floors", lambda *extras: {DISTRIBUTION: "1", "numpy": "0.1", "pytest": "999.5", "rich": ""}
    )
    said = module.too_old()
    assert said
    assert re.fullmatch(r"pytest [\d.]+ is too old; expected 999\.5 or later: run: pip install 'pytest>=999\.5'", said)


def test_an_unexpected_error_with_something_that_is_too_old(
    command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str) -> None:
        raise AttributeError("module 'numpy' has no attribute 'new'")

    monkeypatch.setattr("gta_edge.cli.inspect.Path.exists", fails)
    assert command("inspect", "gta-1b").err.startswith("error: unexpected AttributeError")
    monkeypatch.setattr(module, "floors", lambda *extras: {"pytest": "999.5"})
    assert re.match(r"pytest [\d.]+ is too old; .*\(AttributeError: ", command("inspect", "gta-1b").error)


def test_what_a_module_is_of() -> None:
    assert set(module.floors()) >= {"numpy", "onnx", "onnx-ir", "onnxruntime", "cuda-bindings", "cuda-core", "torch"}
    assert module._distribution_of("cuda.bindings.driver") == "cuda-bindings"
    assert module._distribution_of("onnx_ir.passes.common") == "onnx-ir"
    assert module._distribution_of("cuda") is None


def test_what_is_always_needed_is_looked_at_before_what_an_extra_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy and the like are imported plainly, so nothing else asks for their release."""
    monkeypatch.setattr(module, "floors", lambda *extras: {"numpy": "999.5"} if extras in ((), ("",)) else {})
    with pytest.raises(BackendError) as caught:
        module.require_modules(["json"], "ort", lambda name: None)
    assert re.fullmatch(r"numpy [\d.]+ is too old; expected 999\.5 or later", caught.value.problem)
    assert caught.value.remedy == "run: pip install 'numpy>=999.5'"


def test_a_stand_in_can_be_named_and_subclassed(library: Path) -> None:
    absent: Any = optional(NAME, "plot")

    class Ours(absent.Module):
        pass

    with pytest.raises(BackendError, match="not installed"):
        Ours()


def test_a_failure_says_which_module_it_is_of(library: Path) -> None:
    write(library, "raise ImportError")
    with pytest.raises(UnusableError) as caught:
        find_module(NAME)
    assert caught.value.name == NAME


# --- CUDA, whose modules lie in a directory that is nobody's ---------------------------------------------------------


def test_a_file_called_cuda(tmp_path: Path) -> None:
    (tmp_path / "cuda.py").write_text("")
    script = """
from gta_edge.libraries.optional import UnusableError, find_module
for name in ("cuda.bindings", "cuda.bindings.driver", "cuda.core"):
    try:
        print(find_module(name))
    except UnusableError as error:
        print(error)
"""
    path = os.pathsep.join((str(tmp_path), environment()["PYTHONPATH"]))
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=environment() | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert all(f"is hidden by {tmp_path / 'cuda.py'}, which is something else" in line for line in lines), lines


def test_two_threads_that_import_leave_stdout_as_it_is(library: Path) -> None:
    """Each import is silenced; of two that overlap, neither may restore what it found redirected."""
    meeting = "import tests.libraries.test_optional as t; t.meet()"
    for name in ("first", "second"):
        write(library, meeting, f"{name}_of_two")
    write(library, "__version__ = '1.2'")
    find_module(NAME)
    before = sys.stdout
    threads = [threading.Thread(target=find_module, args=(f"{NAME}.{name}_of_two",)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sys.stdout is before


_both = threading.Barrier(2)


def meet() -> None:
    """Wait for the other thread, which does not come where imports are silenced one at a time."""
    with contextlib.suppress(threading.BrokenBarrierError):
        _both.wait(0.5)
