"""What is installed as TensorRT, and what it can do: with modules that are really there, and with made-up ones."""

import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gta_edge.errors import BackendError
from gta_edge.formats.bundle import WEIGHTS, Bundle
from gta_edge.libraries import optional
from gta_edge.libraries import tensorrt as module
from gta_edge.libraries.install import install_command
from gta_edge.libraries.tensorrt import FLAVOURS, TensorRT, describe, load
from gta_edge.model.presets import preset
from gta_edge.runtime.tensorrt.build import build
from gta_edge.runtime.tensorrt.engine import EngineSpec


def fake(name: str = "tensorrt", version: str = "10.3.0", *missing: str, **attributes: Any) -> ModuleType:
    """A module with what is looked at, full TensorRT's if not said else."""
    made = ModuleType(name)
    names = ("Builder", "OnnxParser", "IPluginV3", "get_plugin_registry")
    for each in names:
        setattr(made, each, object)
    made.INetworkDefinition = type("INetworkDefinition", (), {"add_plugin_v3": None})
    made.__version__ = version
    for each, value in attributes.items():
        setattr(made, each, value)
    for each in missing:
        delattr(made, each)
    return made


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As on a machine without any TensorRT, and not a Jetson."""

    def find(name: str) -> Any:
        if (found := sys.modules.get(name)) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return found

    for name in [name for names in FLAVOURS.values() for name in names]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(optional, "import_module", find)
    monkeypatch.setattr(module, "_on_jetson", lambda: False)
    return monkeypatch


def message(call: Any, *arguments: Any) -> str:
    with pytest.raises(BackendError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- capabilities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "by_domain", "flag", "newer_ops"),
    [
        ("10.3.0", False, True, False),
        ("10.9.0.34", False, True, False),
        ("10.10.0.31", True, True, False),
        ("10.13.2.6", True, True, False),
        ("10.15.1.29.post1", True, True, True),
        ("10.16.0", True, True, True),
        ("11.4.0.106", True, False, True),
    ],
)
def test_what_versions_of_tensorrt_can_do(version: str, by_domain: bool, flag: bool, newer_ops: bool) -> None:
    found = describe(fake(version=version))
    assert (found.flavour, found.version_text, found.builds, found.plugins) == ("tensorrt", version, True, True)
    assert found.version == tuple(int(part) for part in version.removesuffix(".post1").split("."))
    assert (found.namespace_by_domain, found.strongly_typed_flag, found.parses_newer_ops) == (
        by_domain,
        flag,
        newer_ops,
    )


@pytest.mark.parametrize(
    ("name", "flavour"),
    [
        ("tensorrt", "tensorrt"),
        ("tensorrt_bindings", "tensorrt"),
        ("tensorrt_lean_bindings", "tensorrt-lean"),
        ("tensorrt_lean", "tensorrt-lean"),
        ("tensorrt_rtx", "tensorrt-rtx"),
        ("tensorrt_rtx_bindings", "tensorrt-rtx"),
    ],
)
def test_the_flavour_is_the_modules_name(name: str, flavour: str) -> None:
    assert describe(fake(name, "11.0.0")).flavour == flavour


def test_the_real_lean_runtime() -> None:
    lean = pytest.importorskip("tensorrt_lean_bindings", reason="needs tensorrt-lean-cu13-bindings")
    found = load("tensorrt-lean")
    assert found == describe(lean)
    assert found.module is lean
    assert (found.plugins, found.builds) == (True, False)


def test_the_real_tensorrt_for_rtx() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    found = load("tensorrt-rtx")
    assert found == describe(rtx)
    assert (found.plugins, found.builds, found.strongly_typed_flag, found.parses_newer_ops) == (
        False,
        True,
        False,
        True,
    )


# --- what is looked for ----------------------------------------------------------------------------------------------


def test_full_tensorrt_comes_first(nothing_installed: pytest.MonkeyPatch) -> None:
    for names in reversed(FLAVOURS.values()):
        nothing_installed.setitem(sys.modules, names[-1], fake(names[-1], "11.0.0"))
        assert load().module is sys.modules[names[-1]]


def test_only_what_is_asked_for(nothing_installed: pytest.MonkeyPatch) -> None:
    nothing_installed.setitem(sys.modules, "tensorrt_rtx", fake("tensorrt_rtx", "1.7.0"))
    assert isinstance(load("tensorrt-rtx"), TensorRT)
    assert "tensorrt is needed and not installed" in message(load, "tensorrt")


# --- what is refused -------------------------------------------------------------------------------------------------

PIP = "run: pip install --upgrade tensorrt"
RTX = f"run: {install_command('tensorrt-rtx', upgrade='tensorrt-rtx')}"
JETPACK = (
    "it comes with JetPack 6.2 and later: run sudo apt install python3-libnvinfer, and make the environment with "
    f"--system-site-packages from JetPack's own Python (this one is {platform.python_version()})"
)


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(
    ("flavour", "text"),
    [
        (None, f"the Python module tensorrt is needed and not installed; {PIP}"),
        ("tensorrt", f"the Python module tensorrt is needed and not installed; {PIP}"),
        ("tensorrt-rtx", f"the Python module tensorrt_rtx is needed and not installed; {RTX}"),
        ("nonsense", "there is no TensorRT called 'nonsense'; expected one of tensorrt, tensorrt-lean, tensorrt-rtx"),
    ],
)
def test_none_is_installed(flavour: str | None, text: str) -> None:
    assert message(load, flavour) == text


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(
    ("changes", "would_do"),
    [
        ({}, True),
        ({"compute": "bf16", "cache_dtype": "bf16"}, True),
        ({"cache_dtype": "int4"}, False),
        ({"cache_dtype": "int8"}, False),
        ({"tree_rows": 8}, False),
    ],
)
def test_a_build_names_the_other_engine_where_that_would_do(
    tmp_path: Path, changes: dict[str, Any], would_do: bool
) -> None:
    manifest = {"files": {WEIGHTS: {"bytes": 1}}, "block_size": None, "int8": []}
    bundle = Bundle(tmp_path, preset("gta1-160m"), "bf16", manifest)  # only sizes are asked for
    options: dict[str, Any] = {"engine": "tensorrt", "compute": "fp16", "cache_dtype": "fp16", "max_length": 64}
    options |= {"max_batch": 1, "chunk_size": 32}
    other = f", or use the engine tensorrt-rtx, which needs no plugin: {install_command('tensorrt-rtx')}"
    said = message(build, bundle, EngineSpec(**options | changes))
    assert said == f"the Python module tensorrt is needed and not installed; {PIP}{other if would_do else ''}"


def test_none_is_installed_on_a_jetson(nothing_installed: pytest.MonkeyPatch) -> None:
    nothing_installed.setattr(module, "_on_jetson", lambda: True)
    assert message(load, "tensorrt") == f"the Python module tensorrt is needed and not installed; {JETPACK}"
    assert message(load, "tensorrt-rtx").endswith(RTX)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ImportError("libnvinfer.so.10: cannot open\n  shared object file"), "libnvinfer.so.10: cannot open shared "),
        (OSError("no libcudart"), "no libcudart"),
        (RuntimeError(), "RuntimeError"),
        (
            ModuleNotFoundError("No module named 'tensorrt_libs'", name="tensorrt_libs"),
            "No module named 'tensorrt_libs'",
        ),
    ],
)
def test_one_that_is_broken(monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    def fails(name: str) -> Any:
        raise error

    monkeypatch.setattr(optional, "import_module", fails)
    monkeypatch.setattr(optional, "_failures", {})
    monkeypatch.setattr(module, "_on_jetson", lambda: False)
    text = message(load, "tensorrt")
    reason = f"{type(error).__name__}: {reason}"
    assert text.startswith(f"the Python module tensorrt is installed and cannot be loaded ({reason}")
    assert text.endswith(PIP)


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (fake(version="10.2.0.19"), f"tensorrt 10.2.0.19 is too old; expected 10.3 or later: {PIP}"),
        (fake("tensorrt_rtx", "1.6.2"), f"tensorrt-rtx 1.6.2 is too old; expected 1.7 or later: {RTX}"),
        (ModuleType("tensorrt"), f"the Python module tensorrt is not a whole TensorRT; {PIP}"),
        (
            fake("tensorrt", "10.3.0", "get_plugin_registry"),
            f"the Python module tensorrt is not a whole TensorRT; {PIP}",
        ),
        (fake(version="unknown"), f"the Python module tensorrt is not a whole TensorRT; {PIP}"),
    ],
)
def test_one_that_is_too_old_or_not_whole(monkeypatch: pytest.MonkeyPatch, made: ModuleType, text: str) -> None:
    monkeypatch.setattr(module, "_on_jetson", lambda: False)
    assert message(describe, made) == text


@pytest.fixture
def no_jetson_file(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(Path, "exists", lambda path: False)
    return monkeypatch


@pytest.mark.parametrize(("release", "jetson"), [("5.15.148-tegra", True), ("6.8.0-45-generic", False)])
def test_a_jetson_is_known_by_its_kernel(no_jetson_file: pytest.MonkeyPatch, release: str, jetson: bool) -> None:
    no_jetson_file.setattr(platform, "release", lambda: release)
    assert module._on_jetson() is jetson
