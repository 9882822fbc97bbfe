"""The lowered graph where it cannot be cached, is interrupted on the way, or others make it at the same time.

A session gives the right logits all the same, or one error.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from gta_edge.errors import BackendError, BundleError
from gta_edge.formats import integrity
from gta_edge.formats.bundle import MANIFEST, MODEL, WEIGHTS
from gta_edge.runtime.registry import load
from tests.helpers import reference
from tests.helpers.commands import environment, listing
from tests.helpers.limits import largest_file
from tests.helpers.lowered_bundles import (
    EXACT,
    EXACT_GRAPH,
    GRAPH,
    KEPT,
    KEPT_FILES,
    PACKED,
    RECORD,
    ROUNDED,
    assert_kept,
    assert_right,
    flip,
    identities,
    logits,
    names,
)
from tests.helpers.records import edit
from tests.helpers.small_models import IDS, formula_logits, write_bundle

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
