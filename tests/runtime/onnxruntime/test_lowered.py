"""The graph that is made for ONNX Runtime: what sessions on it compute, and how it is kept in the bundle.

Whatever is kept there, damaged, outdated or not to be had: a session gives the right logits.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.errors import BackendError, BundleError
from gta_edge.formats import integrity
from gta_edge.formats.bundle import MANIFEST, MODEL, WEIGHTS, Bundle
from gta_edge.libraries.install import install_command
from gta_edge.runtime.onnxruntime.lowered import lower
from gta_edge.runtime.registry import load
from tests.helpers import reference
from tests.helpers.commands import environment, listing
from tests.helpers.limits import largest_file
from tests.helpers.records import edit
from tests.helpers.small_models import IDS, MODELS, formula_logits, write_bundle, write_bundle_of

EXACT, ROUNDED = 1e-4, 0.5  # bounds for the largest error over the standard deviation of the exact logits
KEPT = "engines/onnxruntime"
RECORD, GRAPH, EXACT_GRAPH, PACKED = "graph.json", "model.onnx", "exact.onnx", "weights.data"
KEPT_FILES = [EXACT_GRAPH, RECORD, GRAPH, PACKED]  # in order


# --- bundles ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that no session has seen; not to be changed."""
    return write_bundle(tmp_path_factory.mktemp("prepared") / "bundle", "more keys", "int4")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with other weights; not to be changed."""
    return write_bundle(tmp_path_factory.mktemp("other") / "bundle", "more keys", "int4", seed=1)


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    """A copy that no session has seen, to do anything to."""
    return shutil.copytree(pristine, tmp_path / "bundle")


@pytest.fixture(scope="module")
def lowered_once(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which a session has kept its graph; not to be changed."""
    directory = shutil.copytree(pristine, tmp_path_factory.mktemp("kept") / "bundle")
    load(directory, "onnxruntime").close()
    return directory


@pytest.fixture
def kept(lowered_once: Path, tmp_path: Path) -> Path:
    """A copy in which a session has kept its graph, times of files included, to do anything to."""
    return shutil.copytree(lowered_once, tmp_path / "kept")


# --- logits ----------------------------------------------------------------------------------------------------------


def logits(directory: Path, **options: Any) -> np.ndarray:
    """Logits [2, 10, V] of a prompt and single tokens after it."""
    with load(directory, "onnxruntime", threads=1, **options) as session:
        parts = [session.forward(IDS[:, :7], all_logits=True)]
        parts += [session.forward(IDS[:, i : i + 1], all_logits=True) for i in range(7, 10)]
    return np.concatenate(parts, axis=1)


def assert_right(directory: Path) -> None:
    """Sessions of both arithmetics give the right logits."""
    wanted = formula_logits(directory)
    assert reference.relative_error(logits(directory, exact=True), wanted) <= EXACT
    assert reference.relative_error(logits(directory), wanted) <= ROUNDED


def assert_kept(directory: Path) -> None:
    """All that belongs there is kept, nothing else, and it is what sessions take."""
    assert names(directory / "engines") == ["onnxruntime"]
    assert names(directory / KEPT) == KEPT_FILES
    before = identities(directory / KEPT)
    for name in (GRAPH, EXACT_GRAPH):
        assert lower(Bundle.open(directory), exact=name == EXACT_GRAPH).graph == before[name][2]
    assert identities(directory / KEPT) == before
    assert_right(directory)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def identities(directory: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file below a directory: what it is, when it was written, and its content."""
    return {
        str(path.relative_to(directory)): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def record_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / KEPT / RECORD).read_text())


CASES = [
    *(("more keys", precision) for precision in ("fp32", "bf16", "int8", "int4")),
    *(("as many", precision) for precision in ("int8 in blocks", "int4")),
    *(("more latents", "int4"), ("one of each", "int8")),
    *(("baseline", precision) for precision in ("int8", "int4")),
]


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_logits_are_those_of_the_formula(name: str, precision: str, tmp_path: Path) -> None:
    directory = write_bundle(tmp_path / "bundle", name, precision)
    wanted = formula_logits(directory)
    exact, default = logits(directory, exact=True), logits(directory)
    assert (directory / KEPT / GRAPH).exists()  # it ran that graph
    assert reference.relative_error(exact, wanted) <= EXACT
    if precision.startswith("int"):
        assert 1e-3 < reference.relative_error(default, wanted) <= ROUNDED
    else:
        np.testing.assert_array_equal(default, exact)


def test_logits_of_fp16(tmp_path: Path) -> None:
    """The value decoder, too, is float16 then, and has to be cast before the tile of the mix is folded into it."""
    directory = write_bundle(tmp_path / "bundle", "as many", "fp16")
    np.testing.assert_array_equal(logits(directory), logits(directory, exact=True))
    assert_right(directory)


# --- the graph -------------------------------------------------------------------------------------------------------


def op_types(directory: Path) -> Counter[str]:
    graph = onnx.load(directory / KEPT / GRAPH, load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def test_what_all_layers_share_is_there_once(tmp_path: Path) -> None:
    """The mask, positions and sizes do not depend on the layer; and each layer costs the same."""
    counts = []
    for layers in (1, 2, 4):
        entries = {**MODELS["as many"], "num_hidden_layers": layers}
        directory = write_bundle_of(tmp_path / f"{layers}", entries, reference.random_weights(entries), "int4")
        load(directory, "onnxruntime").close()
        counts.append(op_types(directory))
    one, two, four = counts
    layer = {kind: two[kind] - one[kind] for kind in two}
    assert {kind: four[kind] - two[kind] for kind in four} == {kind: 2 * number for kind, number in layer.items()}
    for kind in ("LessOrEqual", "Where", "Range", "Tile", "Shape"):
        assert one[kind] > 0
        assert layer[kind] == 0
    assert one["LessOrEqual"] == 1
    assert one["DequantizeLinear"] == one["GroupedLatentAttention"] == 0
    assert sum(layer.values()) - layer["Constant"] <= 40


def test_weights_that_stay_as_they_are_are_not_written_again(kept: Path) -> None:
    """The tables and norms lie in the bundle's own file; only matmuls with integers get a layout of their own."""
    graph = onnx.load(kept / KEPT / GRAPH, load_external_data=False).graph
    places: dict[str, set[str]] = {}
    for tensor in graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                places.setdefault(entry.value, set()).add(tensor.name)
    assert set(places) == {WEIGHTS, f"{KEPT}/{PACKED}"}
    assert "model.embed_tokens.weight.packed" in places[WEIGHTS]
    assert not {name for name in places[WEIGHTS] if name.endswith((".codes", ".scales", ".with_tile"))}
    assert not {name for name in places[f"{KEPT}/{PACKED}"] if not name.endswith((".codes", ".scales", ".with_tile"))}


def test_the_same_bundle_gives_the_same_graph(kept: Path, bundle: Path) -> None:
    """To the byte, so two processes that lower at once can use each other's files."""
    load(bundle, "onnxruntime").close()
    for name in (GRAPH, EXACT_GRAPH, PACKED):
        assert (bundle / KEPT / name).read_bytes() == (kept / KEPT / name).read_bytes()


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


def flip(path: Path) -> None:
    """Change one byte in the middle; the size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)


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


@pytest.mark.parametrize("field", ["gta_edge", "revision", "made_from"])
def test_a_graph_of_another_version_or_model_is_made_again(kept: Path, field: str) -> None:
    content = record_of(kept)["content"]
    changed = {"gta_edge": "0.0.1", "revision": 0, "made_from": content["made_from"] | {MODEL: "0" * 64}}
    edit(kept / KEPT / RECORD, lambda record: record["content"].update({field: changed[field]}))
    before = (kept / KEPT / GRAPH).stat().st_ino
    assert_right(kept)
    assert (kept / KEPT / GRAPH).stat().st_ino != before
    assert record_of(kept)["content"][field] == content[field]
    assert_kept(kept)


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


# --- where nothing can be kept ---------------------------------------------------------------------------------------


@contextmanager
def read_only(directory: Path, closed: Path | None = None) -> Iterator[None]:
    """Nobody may write there, nor even look into what is closed, and the process is nobody."""
    directories = [path for path in (directory, *directory.rglob("*")) if path.is_dir()]
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o555 if path in directories else 0o444)
    if closed is not None:
        closed.chmod(0)
    root = os.geteuid() == 0  # who may write anywhere
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in directories:
            path.chmod(0o755)


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that everybody may read, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary).chmod(0o755)
        yield Path(temporary)


@pytest.mark.parametrize("precision", ["int4", "fp32"])
def test_a_bundle_that_cannot_be_written_to(
    pristine: Path, public: Path, precision: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory = public / "bundle"
    if precision == "int4":
        shutil.copytree(pristine, directory)
    else:
        write_bundle(directory, "as many", precision)
    wanted = formula_logits(directory)
    with read_only(directory):
        before = listing(directory)
        exact, default = logits(directory, exact=True), logits(directory)
        assert listing(directory) == before
    assert caplog.records == []
    assert reference.relative_error(exact, wanted) <= EXACT
    assert reference.relative_error(default, wanted) <= ROUNDED
    assert np.array_equal(default, exact) == (precision == "fp32")


@pytest.mark.parametrize("outdated", [False, True])
def test_a_bundle_that_can_no_longer_be_written_to(lowered_once: Path, public: Path, outdated: bool) -> None:
    directory = shutil.copytree(lowered_once, public / "bundle")
    if outdated:
        flip(directory / KEPT / GRAPH)
    with read_only(directory):
        before = listing(directory)
        assert_right(directory)
        assert listing(directory) == before


@pytest.mark.parametrize("closed", ["engines", KEPT])
def test_what_somebody_else_kept_and_may_not_be_read(lowered_once: Path, public: Path, closed: str) -> None:
    directory = shutil.copytree(lowered_once, public / "bundle")
    with read_only(directory, closed=directory / closed):
        assert_right(directory)


@pytest.mark.parametrize("size", [0, 1000, 40_000])
def test_a_disk_that_takes_no_more(bundle: Path, size: int) -> None:
    before = listing(bundle)
    with largest_file(size):
        assert_right(bundle)
    assert listing(bundle) == before


def test_a_disk_that_takes_no_more_with_a_graph_that_is_out_of_date(kept: Path) -> None:
    flip(kept / KEPT / GRAPH)
    before = listing(kept)
    with largest_file(1000):
        assert_right(kept)
    assert listing(kept) == before


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_full_disk(pristine: Path, lowered_once: Path, tmp_path: Path, part: float) -> None:
    """A file system with room for the bundle, and for a part of what would be kept."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def kib(directory: Path) -> int:
        return sum(-(-path.stat().st_size // 4096) * 4 for path in directory.rglob("*") if path.is_file())

    size = kib(pristine) + int(part * kib(lowered_once / KEPT))
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    options = ["-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk]
    if not (mount and unmount) or subprocess.run([mount, *options], capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here, which takes root")
    try:
        directory = shutil.copytree(pristine, disk / "bundle")
        before = listing(directory)
        assert_right(directory)
        assert listing(directory) == before
    finally:
        subprocess.run([unmount, "--lazy", disk], check=True)  # files of a closed session may still be mapped


@pytest.mark.parametrize("where", ["engines", KEPT])
def test_a_file_where_a_directory_belongs(bundle: Path, where: str) -> None:
    (bundle / where).parent.mkdir(exist_ok=True)
    (bundle / where).write_text("mine")
    assert_right(bundle)
    assert (bundle / where).read_text() == "mine"


def test_what_is_not_ours_is_not_replaced(bundle: Path) -> None:
    (bundle / KEPT).mkdir(parents=True)
    (bundle / KEPT / "mine").write_text("mine")
    before = listing(bundle)
    assert_right(bundle)
    assert listing(bundle) == before


@pytest.mark.parametrize("what", ["a file of somebody's", "a file in the place", "a link", "a file above"])
def test_what_is_in_the_way_is_said_once(
    bundle: Path, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    place = bundle / KEPT
    if what == "a file above":
        place.parent.write_text("mine")
    else:
        place.parent.mkdir()
    if what == "a file of somebody's":
        place.mkdir()
        (place / "mine").write_text("mine")
    elif what == "a file in the place":
        place.write_text("mine")
    elif what == "a link":
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    for exact in (False, True):
        load(bundle, "onnxruntime", exact=exact).close()
    (record,) = caplog.records
    assert (record.name.split(".")[0], record.levelname) == ("gta_edge", "WARNING")
    text = record.getMessage()
    assert text.startswith(f"{place}: is made anew at every load (") and text.isprintable()
    assert ("mine" in text) is (what == "a file of somebody's")


def test_what_an_earlier_version_cached_is_replaced(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its record had another name."""
    (kept / KEPT / RECORD).rename(kept / KEPT / "prepared.json")
    assert_right(kept)
    assert_kept(kept)
    assert caplog.records == []


def test_what_is_kept_for_other_engines_stays(bundle: Path) -> None:
    (bundle / "engines" / "other").mkdir(parents=True)
    (bundle / "engines" / "other" / "plan").write_text("theirs")
    assert_right(bundle)
    assert (bundle / "engines" / "other" / "plan").read_text() == "theirs"
    assert names(bundle / KEPT) == KEPT_FILES


@pytest.mark.parametrize("holds", ["nothing", "a checkpoint"])
@pytest.mark.parametrize("where", ["engines", KEPT])
def test_a_link_that_leads_out_of_the_bundle(bundle: Path, tmp_path: Path, where: str, holds: str) -> None:
    """Nothing is written through it. What lies there may be anything, and weights must lie within the bundle."""
    outside = tmp_path / "outside"
    outside.mkdir()
    if holds == "a checkpoint":  # a directory with a config.json, which export --force would replace
        target = outside / ("onnxruntime" if where == "engines" else ".")
        target.mkdir(exist_ok=True)
        (target / "config.json").write_text("{}")
    (bundle / where).parent.mkdir(exist_ok=True)
    (bundle / where).symlink_to(outside)
    before = listing(outside)
    try:
        assert_right(bundle)
    finally:
        assert listing(outside) == before


# --- errors and interrupts on the way --------------------------------------------------------------------------------


def relist(directory: Path) -> None:
    """Make the manifest agree with the files, whatever is in them."""
    manifest = json.loads((directory / MANIFEST).read_text())
    del manifest["sha256"]
    for name, entry in manifest["files"].items():
        content = (directory / name).read_bytes()
        entry |= {"bytes": len(content), "sha256": sha256(content).hexdigest()}
        entry["mtime_ns"] = (directory / name).stat().st_mtime_ns
    digest = sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (directory / MANIFEST).write_text(json.dumps(manifest | {"sha256": digest}))


def test_a_graph_that_cannot_be_read_leaves_nothing(bundle: Path) -> None:
    (bundle / MODEL).write_bytes(b"no graph at all" * 1000)
    relist(bundle)
    before = listing(bundle)
    with pytest.raises(BundleError, match=r"is no graph that gta-edge writes \(.*\); export the bundle again"):
        load(bundle, "onnxruntime")
    assert listing(bundle) == before


def rewrite(path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    proto = onnx.load(path, load_external_data=False)
    change(proto)
    path.write_bytes(proto.SerializeToString())


def relocate(old: str, new: str) -> Callable[[onnx.ModelProto], None]:
    """Let weights of one file be read from another."""

    def change(proto: onnx.ModelProto) -> None:
        found = [e for t in proto.graph.initializer for e in t.external_data if (e.key, e.value) == ("location", old)]
        assert found
        for entry in found:
            entry.value = new

    return change


def test_a_decoder_that_is_no_stored_tensor_is_one_of_our_errors(bundle: Path) -> None:
    """Such a graph is no export's; it is refused by name."""

    def compute(proto: onnx.ModelProto) -> None:
        (first, *_) = (node for node in proto.graph.node if node.op_type == "GroupedLatentAttention")
        sizes = onnx.helper.make_node("Constant", [], ["decoder_shape"], value_ints=[4, 8, 16])
        zeros = onnx.helper.make_node("Expand", ["nought", "decoder_shape"], ["decoder"])
        nought = onnx.helper.make_node("Constant", [], ["nought"], value_float=0.0)
        first.input[9] = "decoder"
        for node in (zeros, sizes, nought):
            proto.graph.node.insert(0, node)

    rewrite(bundle / MODEL, compute)
    relist(bundle)
    before = listing(bundle)
    with pytest.raises((BackendError, BundleError), match="decoder"):
        load(bundle, "onnxruntime")
    assert listing(bundle) == before


@pytest.mark.parametrize("location", ["../outside.data", "link.data", "/outside.data"])
def test_weights_outside_the_bundle_are_refused(bundle: Path, location: str) -> None:
    shutil.copyfile(bundle / WEIGHTS, bundle.parent / "outside.data")
    (bundle / "link.data").symlink_to("../outside.data")
    rewrite(bundle / MODEL, relocate(WEIGHTS, location))
    relist(bundle)
    before = listing(bundle)
    with pytest.raises(BundleError, match="lies outside the bundle"):
        load(bundle, "onnxruntime")
    assert listing(bundle) == before


@pytest.mark.parametrize("location", ["../outside.data", "link.data", "/outside.data", f"{KEPT}/../../../outside.data"])
def test_packed_weights_outside_the_bundle_are_not_read(kept: Path, location: str) -> None:
    """Also where the record was made to agree with the graph. Other weights lie there, so reading them would show."""
    (kept.parent / "outside.data").write_bytes(bytes(byte ^ 0x11 for byte in (kept / KEPT / PACKED).read_bytes()))
    (kept / "link.data").symlink_to("../outside.data")
    files = {}
    for name in (GRAPH, EXACT_GRAPH):
        rewrite(kept / KEPT / name, relocate(f"{KEPT}/{PACKED}", location))
        files[name] = integrity.describe_file(kept / KEPT / name)
    edit(kept / KEPT / RECORD, lambda record: record["files"].update(files))
    assert_right(kept)


def test_packed_weights_that_are_a_link(kept: Path) -> None:
    """Of the right size and time, but to another place, with other content."""
    packed, outside = kept / KEPT / PACKED, kept.parent / "outside.data"
    status = packed.stat()
    outside.write_bytes(bytes(byte ^ 0x11 for byte in packed.read_bytes()))
    os.utime(outside, ns=(status.st_atime_ns, status.st_mtime_ns))
    packed.unlink()
    packed.symlink_to(outside)
    assert_right(kept)


# When Ctrl-C comes, onnx-ir leaves a file that it writes to the garbage collector, which pytest would take for ours.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("outdated", [False, True])
@pytest.mark.parametrize("how", ["raised", "signal", "another error"])
def test_an_interrupt_leaves_what_was_there(bundle: Path, kept: Path, how: str, outdated: bool) -> None:
    if outdated:
        flip(kept / KEPT / GRAPH)
    directory = kept if outdated else bundle
    before = identities(directory), listing(directory)
    sent: list[int] = []

    def interrupt(what: str, done: int, total: int) -> None:
        if how == "signal":
            if not sent:
                sent.append(done)
                os.kill(os.getpid(), signal.SIGINT)
        else:
            raise KeyboardInterrupt if how == "raised" else ZeroDivisionError

    with pytest.raises(BundleError if how == "another error" else KeyboardInterrupt):
        load(directory, "onnxruntime", progress=interrupt)
    assert (identities(directory), listing(directory)) == before
    assert_right(directory)
    assert_kept(directory)


# --- others at the same time -----------------------------------------------------------------------------------------


def test_another_session_keeps_its_graph_meanwhile(bundle: Path) -> None:
    found: list[np.ndarray] = []

    def meanwhile(what: str, done: int, total: int) -> None:
        if not found:
            found.append(logits(bundle, exact=True))

    found.append(logits(bundle, exact=True, progress=meanwhile))
    assert len(found) == 2
    for result in found:
        assert reference.relative_error(result, formula_logits(bundle)) <= EXACT
    assert_kept(bundle)


def test_a_graph_that_is_replaced_while_it_is_opened(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a moment in which the old directory has gone and the new one is not yet there."""
    original = onnxruntime.InferenceSession

    def at_that_moment(*arguments: Any, **options: Any) -> Any:
        (kept / KEPT).rename(kept / "away")
        try:
            return original(*arguments, **options)
        finally:
            (kept / "away").rename(kept / KEPT)

    monkeypatch.setattr(onnxruntime, "InferenceSession", at_that_moment)
    assert reference.relative_error(logits(kept, exact=True), formula_logits(kept)) <= EXACT


def test_processes_at_the_same_time(pristine: Path, tmp_path: Path) -> None:
    script = """
import sys
import numpy as np
import onnxruntime
import gta_edge.runtime.onnxruntime.lower
from gta_edge.runtime.registry import load

print("ready", flush=True)
sys.stdin.readline()
with load(sys.argv[1], "onnxruntime", exact=True, threads=1) as session:
    np.save(sys.argv[2], session.forward(np.load(sys.argv[3]), all_logits=True))
"""
    directory = shutil.copytree(pristine, tmp_path / "bundle")
    np.save(tmp_path / "ids.npy", IDS)
    results = [tmp_path / "one.npy", tmp_path / "two.npy"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", script, directory, result, tmp_path / "ids.npy"],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for result in results
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            _, err = process.communicate(timeout=60)
            assert (process.returncode, err) == (0, "")
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    for result in results:
        assert reference.relative_error(np.load(result), formula_logits(directory)) <= EXACT
    assert_kept(directory)
