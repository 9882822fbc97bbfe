"""How the lowered graph is cached in a bundle: what the record says, damage, and another bundle in its place.

Whatever is there, damaged or outdated: a session gives the right logits.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.formats import integrity
from gta_edge.formats.bundle import MANIFEST, MODEL, WEIGHTS, Bundle
from gta_edge.libraries.install import install_command
from gta_edge.runtime.onnxruntime import lowered
from gta_edge.runtime.onnxruntime.lowered import lower
from gta_edge.runtime.registry import load
from scripts.structure import import_graph, modules
from tests.helpers import reference
from tests.helpers.commands import environment, listing
from tests.helpers.lowered_bundles import (
    EXACT,
    EXACT_GRAPH,
    GRAPH,
    KEPT,
    KEPT_FILES,
    PACKED,
    RECORD,
    assert_kept,
    assert_right,
    flip,
    identities,
    logits,
    record_of,
)
from tests.helpers.records import edit
from tests.helpers.small_models import IDS, formula_logits, write_bundle

# --- keeping ---------------------------------------------------------------------------------------------------------


def test_the_first_session_keeps_the_graph_and_leaves_the_bundle_as_it_is(bundle: Path) -> None:
    before = identities(bundle)
    assert not [name for name in before if name.startswith("engines")]
    load(bundle, "onnxruntime").close()
    after = identities(bundle)
    assert {name: value for name, value in after.items() if not name.startswith("engines/")} == before
    assert sorted(after.keys() - before.keys()) == [f"{KEPT}/{name}" for name in KEPT_FILES]
    Bundle.open(bundle, verify_hashes=True)
    assert_kept(bundle)


def test_what_the_record_says(kept: Path) -> None:
    record = record_of(kept)
    files = json.loads((kept / MANIFEST).read_text())["files"]
    assert record["content"]["made_from"] == {name: files[name]["sha256"] for name in (MODEL, WEIGHTS)}
    for name in (GRAPH, EXACT_GRAPH, PACKED):
        content = (kept / KEPT / name).read_bytes()
        assert record["files"][name]["sha256"] == sha256(content).hexdigest()
        assert record["files"][name]["bytes"] == len(content)


def test_weights_are_repacked_once(bundle: Path) -> None:
    told: list[tuple[str, int, int]] = []
    logits(bundle, progress=lambda *step: told.append(step))
    first = told.copy()
    logits(bundle, exact=True, progress=lambda *step: told.append(step))
    assert told == first
    what, done, total = zip(*sorted(first, key=lambda step: step[1]), strict=True)
    assert set(what) == {"writing weights"}
    assert list(done) == list(range(1, total[0] + 1))


def in_a_process(script: str, *arguments: object) -> str:
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


FORWARD = """
import sys
import numpy as np
{first}
from gta_edge.runtime.registry import load
from scripts.structure import import_graph, modules
with load(sys.argv[1], "onnxruntime", exact=True) as session:
    np.save(sys.argv[2], session.forward(np.load(sys.argv[3]), all_logits=True))
print(*(name for name in ("onnx", "onnx_ir", "torch", "gta_edge.runtime.onnxruntime.lower") if sys.modules.get(name)))
"""


@pytest.mark.parametrize("first", ["", "sys.modules['onnx_ir'] = sys.modules['onnx'] = None"], ids=["there", "absent"])
def test_a_graph_that_is_kept_needs_no_onnx_ir(kept: Path, tmp_path: Path, first: str) -> None:
    np.save(tmp_path / "ids.npy", IDS)
    before = identities(kept)
    out = in_a_process(FORWARD.format(first=first), kept, tmp_path / "logits.npy", tmp_path / "ids.npy")
    assert out.split() == []
    assert identities(kept) == before
    assert reference.relative_error(np.load(tmp_path / "logits.npy"), formula_logits(kept)) <= EXACT


def test_without_onnx_ir_and_without_a_graph(bundle: Path) -> None:
    script = """
import sys
sys.modules["onnx_ir"] = None
from gta_edge import BackendError
from gta_edge.runtime.registry import load
from scripts.structure import import_graph, modules
try:
    load(sys.argv[1], "onnxruntime")
except BackendError as error:
    print(error)
"""
    before = listing(bundle)
    out = in_a_process(script, bundle)
    assert out == f"the Python module onnx_ir is needed and not installed; run: {install_command('ort')}\n"
    assert listing(bundle) == before


@pytest.mark.parametrize("place", ["moved", "a link", "relative"])
def test_a_bundle_may_lie_anywhere(kept: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    wanted, before = formula_logits(kept), identities(kept)
    directory = kept.with_name("elsewhere")
    if place == "moved":
        kept.rename(directory)
    elif place == "a link":
        directory.symlink_to(kept)
    else:
        monkeypatch.chdir(kept.parent)
        directory = Path(kept.name)
    assert reference.relative_error(logits(directory, exact=True), wanted) <= EXACT
    assert identities(directory) == before


# --- damage, and what is out of date ---------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def into_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def into_a_link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


def touch(path: Path) -> None:
    later = path.stat().st_mtime_ns + 1_000_000
    os.utime(path, ns=(later, later))


@pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", KEPT_FILES)
def test_what_is_damaged_is_made_again(kept: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(kept / KEPT / name)
    assert_right(kept)
    assert_kept(kept)


@pytest.mark.parametrize("damage", [into_a_directory, into_a_link_to_nothing], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", KEPT_FILES)
def test_what_is_no_file(kept: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(kept / KEPT / name)
    assert_right(kept)


def test_packed_weights_that_were_touched_are_hashed_and_taken(kept: Path) -> None:
    before = (kept / KEPT / PACKED).stat().st_ino
    touch(kept / KEPT / PACKED)
    assert_right(kept)
    assert (kept / KEPT / PACKED).stat().st_ino == before
    assert_kept(kept)


def test_what_somebody_else_kept_is_made_again(kept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every byte of it is as its record says, and the record was signed elsewhere: the graph may compute anything."""
    before = (kept / KEPT / GRAPH).stat().st_ino
    monkeypatch.setenv("GTA_EDGE_CACHE", str(tmp_path / "another machine's"))
    assert_right(kept)
    assert (kept / KEPT / GRAPH).stat().st_ino != before
    assert_kept(kept)


def test_without_a_place_for_the_secret_nothing_is_kept_or_believed(
    kept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GTA_EDGE_CACHE", str(tmp_path / "file"))
    before = listing(kept)
    assert not lower(Bundle.open(kept)).cached
    assert listing(kept) == before


def test_large_files_are_hashed_when_that_is_asked_for(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "_ALWAYS_HASHED_BYTES", 0)
    path = kept / KEPT / PACKED
    times = path.stat()
    flip(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    before = path.stat().st_ino
    lower(Bundle.open(kept, verify_hashes=True))
    assert path.stat().st_ino != before
    assert_right(kept)


def test_packed_weights_of_the_same_size(kept: Path) -> None:
    path = kept / KEPT / PACKED
    path.write_bytes(bytes(byte ^ 0x11 for byte in path.read_bytes()))
    assert_right(kept)
    assert_kept(kept)


@pytest.mark.parametrize("field", ["gta_edge", "sources", "made_from"])
def test_a_graph_of_another_version_or_model_is_made_again(kept: Path, field: str) -> None:
    content = record_of(kept)["content"]
    changed = {"gta_edge": "0.0.1", "sources": "0" * 64, "made_from": content["made_from"] | {MODEL: "0" * 64}}
    edit(kept / KEPT / RECORD, lambda record: record["content"].update({field: changed[field]}))
    before = (kept / KEPT / GRAPH).stat().st_ino
    assert_right(kept)
    assert (kept / KEPT / GRAPH).stat().st_ino != before
    assert record_of(kept)["content"][field] == content[field]
    assert_kept(kept)


def test_all_code_that_shapes_a_graph_is_in_its_key() -> None:
    """Whatever lowering imports, but for what only reads, checks and reports."""
    package = Path(lowered.__file__).parents[2]
    graph, files = import_graph(package), modules(package)
    seen, waiting = set(), ["gta_edge.runtime.onnxruntime.lower", "gta_edge.runtime.onnxruntime.cuda_lower"]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += graph[module]
    others = ("errors", "formats", "libraries", "support")
    shaping = {files[name] for name in seen if name.split(".")[1] not in others} | {package / "formats/weights.py"}
    assert len(shaping) > 20
    assert shaping <= {path for pattern in lowered.SOURCES for path in package.glob(pattern)}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ["format", "format_version", "content", "files"]


@st.composite
def records(draw: Any) -> Callable[[dict[str, Any]], Any]:
    """Changes to a record: anything in its place, or in that of its fields, or of theirs."""
    anything, kind = draw(JSON), draw(st.sampled_from(["whole", "field", "entry", "gone"]))
    field = draw(st.sampled_from(FIELDS))

    def change(record: dict[str, Any]) -> Any:
        if kind == "whole":
            return anything
        if kind == "gone":
            return {key: value for key, value in record.items() if key != field}
        inner = record[field]
        if kind == "field" or not isinstance(inner, dict):
            return record | {field: anything}
        return record | {field: inner | {GRAPH if field == "files" else "made_from": anything}}

    return change


@settings(max_examples=25, deadline=None, derandomize=True)
@given(change=records())
def test_a_record_of_any_json(lowered_once: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        directory = shutil.copytree(lowered_once, Path(temporary, "bundle"))
        original = record_of(directory)
        wanted = (directory / KEPT / GRAPH).read_bytes()
        edit(directory / KEPT / RECORD, change)
        assert lower(Bundle.open(directory)).graph == wanted
        found = record_of(directory)
        assert found["content"] == original["content"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "\ufeff{}", "1" * 5000, "[" * 100_000, '{"sha256":' * 100_000, "\x00"],
    ids=lambda text: repr(text[:12]),
)
def test_a_record_of_any_text(kept: Path, text: str) -> None:
    (kept / KEPT / RECORD).write_text(text, encoding="utf-8")
    assert_right(kept)
    assert_kept(kept)


def test_a_record_in_no_encoding(kept: Path) -> None:
    (kept / KEPT / RECORD).write_bytes(b'{"sha256": "\xff\xfe"}')
    assert_right(kept)
    assert_kept(kept)


@pytest.fixture
def not_for_ever() -> Iterator[None]:
    """Whoever waits for a pipe is told after three seconds."""

    def give_up(*_: Any) -> None:
        raise AssertionError("it waits for ever")  # and no OSError, which may be taken for one of the file's

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(3)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("not_for_ever")
@pytest.mark.parametrize("name", [RECORD, GRAPH])
def test_a_pipe_in_the_place_of_a_file(kept: Path, name: str) -> None:
    (kept / KEPT / name).unlink()
    os.mkfifo(kept / KEPT / name)
    assert_right(kept)


# --- another bundle in its place -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int4", "int8", "fp32"])
def test_a_bundle_that_is_exported_anew(kept: Path, precision: str) -> None:
    before = formula_logits(kept)
    write_bundle(kept, "more keys", precision, seed=1, force=True)
    assert not (kept / "engines").exists()
    assert reference.relative_error(formula_logits(kept), before) > 1
    assert_right(kept)


def test_files_of_another_bundle_copied_over(kept: Path, other: Path) -> None:
    """Also where the graph is the same to the byte, and the weights differ."""
    before = formula_logits(kept)
    for path in other.iterdir():
        shutil.copy2(path, kept / path.name)
    assert (kept / KEPT / RECORD).exists()
    assert reference.relative_error(formula_logits(kept), before) > 1
    assert_right(kept)
    assert_kept(kept)


def test_what_another_bundle_kept(bundle: Path, other: Path, tmp_path: Path) -> None:
    source = shutil.copytree(other, tmp_path / "other")
    load(source, "onnxruntime").close()
    shutil.copytree(source / "engines", bundle / "engines")
    assert_right(bundle)
    assert_kept(bundle)
