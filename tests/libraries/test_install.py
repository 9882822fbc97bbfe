"""The line that installs an extra: pip writes down how the package came, and takes the line that is made of it."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gta_edge.libraries import install
from gta_edge.libraries.install import install_command, reinstall_command, requirement
from tests.helpers.commands import environment

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "gta-edge"
version = "7.0"
optional-dependencies = { plot = [] }

[tool.hatch.build]
dev-mode-dirs = ["."]

[tool.hatch.build.targets.wheel]
packages = ["other"]
"""
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from gta_edge.libraries.install import install_command
print(install_command("plot", pip="python -m pip"))
"""


def pip(*words: object) -> str:
    command = [sys.executable, "-m", "pip", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


OFFLINE = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A distribution of this name, in a directory that a shell would take apart."""
    directory = tmp_path / "it's [a] clone; $(touch x)"
    (directory / "other").mkdir(parents=True)
    (directory / "other" / "__init__.py").write_text("")
    (directory / "pyproject.toml").write_text(PROJECT)
    return directory


@pytest.mark.parametrize("form", ["editable", "directory", "wheel"])
def test_pip_takes_the_line_that_is_made_of_what_it_wrote_down(project: Path, tmp_path: Path, form: str) -> None:
    pytest.importorskip("hatchling", reason="builds a wheel")
    source: tuple[object, ...] = (f"gta-edge @ {project.as_uri()}",)
    if form == "editable":
        source = ("--editable", project)
    if form == "wheel":
        pip("wheel", *OFFLINE, "--wheel-dir", tmp_path / "wheels of mine", *source)
        source = tuple((tmp_path / "wheels of mine").glob("*.whl"))
    pip("install", *OFFLINE, "--target", tmp_path / "target", *source)

    said = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "target"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    words = shlex.split(said)
    assert words[:4] == ["python", "-m", "pip", "install"]
    assert said.count("\n") == 1
    assert ("-e" in words) == (form == "editable")
    assert ".whl" in said or form != "wheel"
    assert pip("install", *OFFLINE, "--dry-run", "--ignore-installed", *words[4:]).splitlines()[-1] == (
        "Would install gta-edge-7.0"
    )


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (None, ["gta-edge[ort]"]),
        ({"url": "file://{there}", "dir_info": {"editable": True}}, ["-e", "{there}[ort]"]),
        ({"url": "file://{there}", "dir_info": {}}, ["gta-edge[ort] @ file://{there}"]),
        ({"url": "file://{there}/a.whl", "archive_info": {}}, ["gta-edge[ort] @ file://{there}/a.whl"]),
        ({"url": "https://x.org/a.whl", "archive_info": {}}, ["gta-edge[ort] @ https://x.org/a.whl"]),
        (
            {"url": "https://x.org/a", "vcs_info": {"vcs": "git", "requested_revision": "v1", "commit_id": "ab12"}},
            ["gta-edge[ort] @ git+https://x.org/a@v1"],
        ),
        (
            {"url": "https://x.org/a", "vcs_info": {"vcs": "git", "commit_id": "ab12"}, "subdirectory": "python"},
            ["gta-edge[ort] @ git+https://x.org/a@ab12#subdirectory=python"],
        ),
        (
            {"url": "https://x.org/a b%20c\x1b[31m", "vcs_info": {"vcs": "git", "commit_id": "a\n"}},
            ["gta-edge[ort] @ git+https://x.org/a%20b%20c%1B%5B31m@a%0A"],
        ),
    ],
)
def test_every_form(tmp_path: Path, document: object, expected: list[str]) -> None:
    (tmp_path / "a.whl").write_text("")
    text = json.dumps(document).replace("{there}", str(tmp_path)) if document else None
    assert requirement(text, "ort") == [word.replace("{there}", str(tmp_path)) for word in expected]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        "7",
        '"file:///"',
        "{}",
        '{"url": 7, "dir_info": {}}',
        '{"url": "https://x.org/a"}',
        '{"url": "https://x.org/a", "dir_info": {"editable": true}}',
        '{"url": "file:///", "dir_info": 7}',
        '{"url": "file:///gone/for/good", "dir_info": {"editable": true}}',
        '{"url": "file:///gone/for/good.whl", "archive_info": {}}',
        '{"url": "file:///%00", "dir_info": {}}',
        '{"url": "file:///%ff", "dir_info": {}}',
        '{"url": "https://[x", "archive_info": {}}',
        '{"url": "https://x.org/a", "vcs_info": {"vcs": "sh -c x", "commit_id": "a"}}',
        '{"url": "https://x.org/a", "vcs_info": {"vcs": ["git"], "commit_id": "a"}}',
        '{"url": "https://x.org/a", "vcs_info": {"vcs": "git"}}',
        '{"url": "file:///", "vcs_info": {"vcs": "git", "commit_id": "a"}}',
    ],
)
def test_what_is_damaged_gives_the_name_alone(text: str) -> None:
    assert requirement(text, "ort") == ["gta-edge[ort]"]


@pytest.mark.parametrize(("name", "quoted"), [("a\nb\x1b[31m", "a%0Ab%1B%5B31m"), ("a  b", "a%20%20b")])
def test_a_path_that_no_message_can_hold_is_in_none(tmp_path: Path, name: str, quoted: str) -> None:
    directory = tmp_path / name
    directory.mkdir()
    document = {"url": directory.as_uri(), "dir_info": {"editable": True}}
    assert requirement(json.dumps(document), "ort") == ["gta-edge[ort]"]
    (word,) = requirement(json.dumps(document | {"dir_info": {}}), "ort")
    assert word.isprintable()
    assert word.endswith(f"/{quoted}")


def test_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "_direct_url", lambda: None)
    assert install_command("ort") == "pip install 'gta-edge[ort]'"
    assert install_command("ort,plot", pip="py -m pip") == "py -m pip install 'gta-edge[ort,plot]'"
    assert install_command("cuda13", upgrade="nvidia-cuda-nvrtc") == (
        "pip install --upgrade 'gta-edge[cuda13]' nvidia-cuda-nvrtc"
    )
    assert reinstall_command() == "pip install --upgrade --force-reinstall gta-edge"
    monkeypatch.setattr(install, "_direct_url", lambda: json.dumps({"url": "file:///", "dir_info": {"editable": True}}))
    assert install_command("ort") == "pip install -e '/[ort]'"


def test_a_source_that_is_not_installed(tmp_path: Path) -> None:
    """Python without its site finds no distribution."""
    root = Path(install.__file__).parents[2]
    said = subprocess.run(
        [sys.executable, "-S", "-c", SCRIPT, tmp_path],
        env=environment() | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said == f"python -m pip install -e {shlex.quote(f'{root}[plot]')}\n"
