"""The wheel as users get it, in an environment that has nothing but what the wheel itself asks for."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import gta_edge
from tests.helpers.commands import ROOT, Result

EXTRAS = {"export", "ort", "ort-gpu", "tensorrt", "tensorrt-rtx", "cuda12", "cuda13", "plot", "test", "dev"}
EXTRAS |= {"serve", "chat", "grammar"}
VERBS = ["init", "export", "build", "inspect", "plan", "verify", "eval", "generate", "chat", "serve", "doctor"]
OPTIONAL = ["torch", "onnx", "onnxruntime", "onnx_ir", "onnxscript", "tensorrt", "transformers"]
OFFLINE = re.compile(r"NewConnectionError|NameResolutionError|Temporary failure in name|ProxyError|ConnectTimeout")


@dataclass(frozen=True)
class Bare:
    """An environment with the wheel and its core dependencies, and a directory to work in."""

    directory: Path

    def run(self, program: str, *arguments: object) -> Result:
        variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        process = subprocess.run(
            [self.directory / "bin" / program, *map(str, arguments)],
            cwd=self.directory,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
        return Result(process.returncode, process.stdout, process.stderr)

    def command(self, *arguments: object) -> Result:
        return self.run("gta-edge", *arguments)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    # from a copy: what lies about in the working tree must make no difference, nor the build to it
    source = directory / "source"
    skipped = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "demo")
    shutil.copytree(ROOT, source, ignore=skipped)
    # with what this environment has, and not in one that pip makes from the index
    offline = {"PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1"}
    command = ["make", "-C", source, "wheel", f"VENV={sys.prefix}"]
    result = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="session")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    directory = tmp_path_factory.mktemp("bare") / "environment"
    assert ROOT not in directory.parents
    venv.create(directory, with_pip=True, symlinks=True)
    pip = [directory / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel]
    result = subprocess.run(pip, capture_output=True, text=True, check=False)
    if result.returncode != 0 and OFFLINE.search(result.stderr):
        pytest.skip("the package index cannot be reached")
    assert result.returncode == 0, result.stderr
    yield Bare(directory)
    shutil.rmtree(directory)  # it is large, and pytest keeps what tests leave


# --- the wheel -----------------------------------------------------------------------------------------------------


def test_what_is_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    package = {name for name in names if ".dist-info/" not in name}
    tree = {str(path.relative_to(ROOT)) for path in (ROOT / "gta_edge").rglob("*") if path.is_file()}
    assert package == {name for name in tree if "__pycache__" not in name}
    kernels = [name for name in package if name.startswith("gta_edge/plugins/kernels/")]
    assert {Path(name).suffix for name in kernels} == {".cu", ".cuh"}
    assert {"py.typed", "machine/devices.toml", "machine/jetpack.toml", "serve/page.html"} <= {
        name.removeprefix("gta_edge/") for name in package
    }
    assert wheel.name == f"gta_edge-{gta_edge.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 1e6
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_what_the_metadata_say(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
        (name,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "gta-edge = gta_edge.cli:main" in archive.read(name).decode()
    assert (metadata["Name"], metadata["Version"]) == ("gta-edge", gta_edge.__version__)
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra", [])) >= EXTRAS
    required = [entry for entry in metadata.get_all("Requires-Dist", []) if "extra ==" not in entry]
    assert required
    for module in OPTIONAL:
        assert not any(re.match(rf"{module.replace('_', '[-_]')}\b", entry) for entry in required)
    assert str(metadata.get_payload()).strip()  # the README, which is what the index shows


def test_what_a_board_without_torch_runs() -> None:
    script = (
        "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('scripts/board_tests.py', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "tests/runtime/tensorrt/test_session.py" in result.stdout.split()
    assert "tests/runtime/torch/test_gpu.py" not in result.stdout
    assert re.search(r"^left out: tests/runtime/torch/test_gpu.py \(.*torch.*\)$", result.stderr, re.MULTILINE)


# --- without any extra ---------------------------------------------------------------------------------------------


def test_the_environment_is_bare(bare: Bare) -> None:
    script = f"import importlib.util; print([n for n in {OPTIONAL!r} if importlib.util.find_spec(n)])"
    assert bare.run("python", "-c", script).out == "[]\n"
    script = "import gta_edge; print(gta_edge.__file__)"
    assert bare.run("python", "-c", script).out.startswith(str(bare.directory))


def test_every_module_imports(bare: Bare) -> None:
    script = """
import importlib, pkgutil, gta_edge

for module in pkgutil.walk_packages(gta_edge.__path__, "gta_edge."):
    importlib.import_module(module.name)
    print(module.name)
for name in gta_edge.__all__:
    getattr(gta_edge, name)
"""
    result = bare.run("python", "-W", "error::DeprecationWarning:gta_edge", "-c", script)
    assert (result.status, result.err) == (0, "")
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "gta_edge").rglob("*.py")
    }
    assert set(result.out.split()) == modules - {"gta_edge"}


def test_version_and_help(bare: Bare) -> None:
    assert bare.command("--version") == Result(0, f"gta-edge {gta_edge.__version__}\n", "")
    overview = bare.command("--help")
    assert (overview.status, overview.err) == (0, "")
    for verb in VERBS:
        assert verb in overview.out
        result = bare.command(verb, "--help")
        assert (result.status, result.err) == (0, "")
        assert f"Usage: gta-edge {verb}" in result.out


def test_inspect(bare: Bare, tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    assert bare.command("inspect", "gta-1b", "--json").document["layers"] == 54
    assert bare.command("inspect", tiny_checkpoint, "--json").document["kind"] == "checkpoint"
    assert bare.command("inspect", tiny_bundle, "--json").document["kind"] == "bundle"


def test_doctor_says_that_nothing_works_and_what_to_install(bare: Bare, wheel: Path) -> None:
    result = bare.command("doctor", "--json")
    assert result.status == 1
    document = json.loads(result.out)
    assert document["onnxruntime_providers"] == []
    backends: dict[str, dict[str, Any]] = document["backends"]
    for entry in backends.values():
        assert entry["works"] is False
        assert "not installed" in entry["reason"]
    assert backends["torch"]["remedy"] == f"pip install 'gta-edge[export] @ {wheel.as_uri()}'"
    if sys.version_info >= (3, 11):
        assert backends["onnxruntime"]["remedy"] == f"pip install 'gta-edge[ort] @ {wheel.as_uri()}'"
    features = document["features"]
    assert features["plot"]["reason"] == "matplotlib not installed"
    assert features["export"]["reason"] == "torch, onnx, onnx_ir, onnxscript not installed"
    assert [features[name]["remedy"] for name in ("export", "plot")] == [
        f"pip install 'gta-edge[{extra}] @ {wheel.as_uri()}'" for extra in ("export", "plot")
    ]
    # the status is 1, so there is one line that says why
    assert re.fullmatch(r"error: .*\n", result.err)


def test_init_needs_no_extra(bare: Bare, tmp_path: Path) -> None:
    options = ["--layers", 1, "--max-length", 64, "--json"]
    assert bare.command("init", "gta1-160m", tmp_path / "checkpoint", *options).document["seed"] == 0


@pytest.mark.parametrize(
    ("arguments", "extras"),
    [
        ("export {checkpoint} {out}", ["export"]),
        ("export {checkpoint} {out} --no-verify", ["export"]),
        ("generate {bundle} --ids 1", ["ort", "export"]),
        ("generate {bundle} --ids 1 --backend onnxruntime", ["ort"]),
        ("generate {bundle} --ids 1 --backend torch", ["export"]),
        ("verify {bundle} --checkpoint {checkpoint}", ["export"]),
        ("eval {bundle} --text {bundle}/config.json", ["ort", "export"]),
        ("serve {bundle}", ["serve"]),
    ],
)
def test_what_is_missing_is_named_with_the_line_that_installs_it(
    bare: Bare, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, arguments: str, extras: list[str]
) -> None:
    places = {"checkpoint": tiny_checkpoint, "bundle": tiny_bundle, "out": tmp_path / "out"}
    message = bare.command(*(word.format(**places) for word in arguments.split())).error
    assert re.findall(r"pip install 'gta-edge\[(\w+)\] @ file:///\S+\.whl'", message) == extras
    assert list(tmp_path.iterdir()) == []
