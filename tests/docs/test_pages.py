"""What the pages name exists: files, modules, other pages and their sections; and what they show works."""

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from gta_edge.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *(ROOT / "docs").rglob("*.md"))
FOLDERS = "gta_edge|tests|benchmarks|examples|scripts|docs"
FORMER = {"benchmarks/paper.py"}  # a command by which figures were measured, as it was then called

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# a file with its ending, or a folder with its slash; not in an address, nor below another folder
PATH = re.compile(rf"(?<![\w/.-])(?:{FOLDERS})/(?:[\w.-]+/)*(?:[\w-]+\.[a-z]\w*\b|(?<=/)(?![\w.*…-]))")
SOURCE = re.compile(r"`((?:[\w-]+/)*[\w-]+\.(?:py|cu|cuh|toml|sh))`")
COMMAND = re.compile(r"(?<![\w/.-])gta-edge ([a-z][a-z-]+)((?:[^`#&|\\\n]|\\\n)*)")
SCRIPT = re.compile(r"\b((?:benchmarks|scripts|examples)/[\w/]+\.py)((?:[^`#&|\\\n]|\\\n)*)")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
MODULE = re.compile(r"(?<![\w./-])(?:gta_edge|tests)(?!\.json\b)(?:\.\w+)+")  # gta_edge.json is a file


def slug(heading: str) -> str:
    """The anchor that is made of a heading: lower case, no punctuation, hyphens for spaces."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in HEADING.findall(FENCE.sub("", page.read_text(encoding="utf-8")))}


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """Links of a page to files of this repository, each with the anchor in it."""
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if not re.match(r"[a-z]+:", target):
            name, _, anchor = target.partition("#")
            yield (page.parent / name).resolve() if name else page, anchor


def broken_links(page: Path) -> list[str]:
    found = []
    for target, anchor in links(page):
        if not target.exists():
            found.append(str(target))
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            found.append(f"{target}#{anchor}")
    return found


def missing_paths(text: str) -> list[str]:
    return [path for path in PATH.findall(text) if not (ROOT / path).exists() and path not in FORMER]


def unknown_sources(text: str) -> list[str]:
    """Source files in code that no file is, wherever its folder: ``tiling.py``, ``graph/shapes.py``."""
    files = [f"/{path}" for folder in FOLDERS.split("|") for path in (ROOT / folder).rglob("*.*")]
    files += [f"/{path}" for path in ROOT.glob("*.*")]
    return [name for name in SOURCE.findall(text) if not any(path.endswith(f"/{name}") for path in files)]


def unknown_names(text: str) -> list[str]:
    """Dotted names that lead to no module, nor to a word of one."""
    found = []
    for name in MODULE.findall(text):
        place, rest = ROOT, name.split(".")
        while rest and (place / rest[0]).is_dir():
            place /= rest.pop(0)
        if rest and (place / f"{rest[0]}.py").is_file():
            place = place / f"{rest.pop(0)}.py"
        source = (place / "__init__.py" if place.is_dir() else place).read_text(encoding="utf-8")
        if rest and not re.search(rf"\b{rest[0]}\b", source):
            found.append(name)
    return found


def unknown_options(text: str) -> list[str]:
    """Commands that a page shows, with verbs or options that there are not."""
    group: Any = typer.main.get_command(
        app
    )  # of click, whose classes some versions of typer have as a part of their own
    commands = group.commands
    found = []
    for verb, words in COMMAND.findall(text):
        known = (
            {flag for p in commands[verb].params for flag in (*p.opts, *p.secondary_opts)} if verb in commands else {""}
        )
        found += [f"{verb} {flag}" for flag in OPTION.findall(words) if flag not in known]
    for script, words in SCRIPT.findall(text):
        if (ROOT / script).exists():  # or a former one
            folder = (ROOT / script).parent  # the modules that it is made of lie beside it
            sources = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
            found += [f"{script} {flag}" for flag in OPTION.findall(words) if f'"{flag}"' not in sources]
    return found


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_files_and_modules_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert missing_paths(text) == []
    assert unknown_sources(text) == []
    assert unknown_names(text) == []
    assert unknown_options(text) == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=title)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set[Path](), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached and page.suffix == ".md" and page.exists():
            reached.add(page)
            waiting += [target for target, _ in links(page)]
    assert sorted(map(title, set(PAGES) - reached)) == []


@pytest.mark.parametrize(
    "text",
    [
        "`gta_edge/runtime/nowhere.py`",
        "[the map](gta_edge/nowhere.toml)",
        "    bash benchmarks/nowhere.sh --quick",
        "`gta_edge/nowhere/` is a folder",
        "(tests/runtime/test_nowhere.py).",
    ],
)
def test_paths_that_would_be_missed(text: str) -> None:
    assert len(missing_paths(text)) == 1


@pytest.mark.parametrize(
    "text", ["https://x.org/docs/a.html", "`gta_edge/plugins/<op>/plugin.py`", "bundle/tests/x.py"]
)
def test_what_is_no_path_of_the_repository(text: str) -> None:
    assert missing_paths(text) == []


@pytest.mark.parametrize("name", ["nowhere.py", "runtime/bundle.py", "decode.cuh"])
def test_source_files_that_would_be_missed(name: str) -> None:
    assert unknown_sources(f"see `{name}`, `tiling.py` and `graph/shapes.py`") == [name]


@pytest.mark.parametrize("name", ["gta_edge.nowhere", "gta_edge.formats.weights.nowhere", "tests.helpers.nowhere"])
def test_names_that_would_be_missed(name: str) -> None:
    assert unknown_names(f"see `{name}`.") == [name]


@pytest.mark.parametrize(
    "text",
    [
        "gta-edge chat bundle --grammar x",
        "`gta-edge generate b \\\n    --no-such 1`",
        "`gta-edge nothing --json`",
        "    python scripts/structure.py --sideways",
    ],
)
def test_options_that_would_be_missed(text: str) -> None:
    assert len(unknown_options(text)) == 1


def test_links_that_would_be_missed(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# A title, and `code`\n")
    page = tmp_path / "a.md"
    page.write_text(
        "[1](b.md#a-title-and-code) [2](b.md#nothing) [3](c.md) [4](#there) [5](https://x.org/d.md)\n# There\n"
    )
    assert broken_links(page) == [f"{tmp_path / 'b.md'}#nothing", str(tmp_path / "c.md")]


def test_the_floors_are_those_of_the_package() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE)
    package = {path.stem for path in (ROOT / "gta_edge").glob("[a-z]*") if path.is_dir() or path.suffix == ".py"}
    assert set(rows) - {"onnxruntime", "torch", "tensorrt"} == package


# --- what is shown works -------------------------------------------------------------------------------------------


def test_the_page_of_the_api_is_made_from_the_docstrings() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "api_page.py"))
    written = script["PAGE"].read_text(encoding="utf-8")
    assert written == script["page"](), "run: python scripts/api_page.py"


def test_the_page_of_the_api_has_every_public_name() -> None:
    import gta_edge

    written = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert [name for name in gta_edge.__all__ if name != "__version__" and f"{name}`" not in written] == []


def test_the_readme_s_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example.py"])
    (tmp_path / "example.py").write_text(example)
    names = runpy.run_path("example.py")
    assert names["logits"].shape == (1, 2048)
    assert capsys.readouterr().out.strip()
