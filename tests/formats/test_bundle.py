"""A bundle opens when it is what was written, wherever it lies, and is refused with a BundleError otherwise."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gta_edge
from gta_edge.errors import BackendError, BundleError, InputError
from gta_edge.formats import integrity
from gta_edge.formats.bundle import Bundle
from tests.helpers.bundle_files import (
    CONFIG,
    MANIFEST,
    MODEL,
    WEIGHTS,
    edit_model,
    forge,
    manifest_of,
    refused,
    relist,
    write,
)
from tests.helpers.commands import environment
from tests.helpers.limits import unprivileged
from tests.helpers.tiny import TINY

FILES = [CONFIG, MANIFEST, MODEL, WEIGHTS, "tokenizer.json", "tokenizer_config.json"]
LISTED = [name for name in FILES if name != MANIFEST]
BACKENDS = ["onnxruntime", "torch"]


def replace_bytes(path: Path, content: bytes) -> None:
    """Change a file but not its time."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# Lets whoever opens a pipe go, and tells of it. A process, since a library that waits may hold the interpreter.
WATCH = """
import os, sys, time
while True:
    time.sleep(0.005)
    try:
        os.close(os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK))
    except OSError:  # nobody reads
        continue
    print("opened", flush=True)
"""


@contextmanager
def pipe_that_nobody_opens(path: Path) -> Iterator[None]:
    """Put a named pipe there, which must not be opened: that waits for ever."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with subprocess.Popen([sys.executable, "-S", "-c", WATCH, path], stdout=subprocess.PIPE) as watcher:
        try:
            yield
        finally:
            time.sleep(0.02)
            watcher.terminate()
        assert watcher.stdout is not None
        assert watcher.stdout.read() == b"", f"{path} was opened"


# --- good bundles --------------------------------------------------------------------------------------------------


def test_a_bundle_tells_what_it_holds(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert bundle.config == TINY.replace(eos_token_ids=(256,))
    assert bundle.precision == "bf16"
    assert bundle.model_path == tiny_bundle / MODEL
    assert bundle.file_bytes == {name: (tiny_bundle / name).stat().st_size for name in LISTED}
    assert bundle.weight_bytes == (tiny_bundle / WEIGHTS).stat().st_size
    assert sorted(path.name for path in tiny_bundle.iterdir() if path.is_file()) == FILES
    assert Bundle.open(tiny_bundle, verify_hashes=True) == replace(bundle, verified=True)


def test_the_manifest_is_as_documented(tiny_bundle: Path) -> None:
    manifest = manifest_of(tiny_bundle)
    assert (manifest["format_version"], manifest["precision"]) == (1, "bf16")
    assert manifest["cache"] == [
        {"name": "key", "heads": 1, "width": 8, "dtype": "float32"},
        {"name": "latent", "heads": 1, "width": 16, "dtype": "float32"},
    ]
    assert manifest["made_with"].keys() == {"gta-edge", "python", "torch", "onnx", "onnx-ir", "onnxscript"}
    for name, entry in manifest["files"].items():
        content = (tiny_bundle / name).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_moved_copied_and_linked(copied_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = copied_bundle.rename(tmp_path / "moved")
    Bundle.open(moved)
    shutil.copytree(moved, tmp_path / "copied", copy_function=shutil.copyfile)  # with new times
    Bundle.open(tmp_path / "copied")
    (tmp_path / "link").symlink_to(moved)
    Bundle.open(tmp_path / "link")
    monkeypatch.chdir(moved)
    Bundle.open(".")
    Bundle.open("../copied")


def test_files_that_are_not_listed_do_not_matter(copied_bundle: Path) -> None:
    (copied_bundle / "README.md").write_text("notes")
    (copied_bundle / "engines").mkdir()
    assert Bundle.open(copied_bundle).file_bytes.keys() == set(LISTED)


def test_a_link_within_the_bundle_is_followed(copied_bundle: Path) -> None:
    (copied_bundle / MODEL).rename(copied_bundle / "graph")
    (copied_bundle / MODEL).symlink_to("graph")
    Bundle.open(copied_bundle)


# --- what is no bundle ---------------------------------------------------------------------------------------------


def test_paths_that_are_no_bundle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    assert "does not exist" in refused(tmp_path / "none")
    assert "does not exist" in refused(tmp_path / "dangling")
    assert "is a file" in refused(tmp_path / "file")
    assert "has no gta_edge.json" in refused(tmp_path / "empty")
    assert "run `gta-edge export` first" in refused(tiny_checkpoint)


def test_a_path_that_the_system_refuses(tmp_path: Path) -> None:
    refused(tmp_path / ("x" * 300))
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        b"\xff\xfe",
        b"{",
        b"nonsense",
        b"null",
        b"[]",
        b'"gta-edge-bundle"',
        b"1e999",
        b"1" * 5000,
        b"{}",
        b'{"format": "gta-edge-bundle"}',
        b'{"format": "gta-edge-bundle", "format_version": 1}',
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000,
    ],
    ids=lambda content: repr(content[:50]),
)
def test_manifests_that_are_none(copied_bundle: Path, content: bytes) -> None:
    (copied_bundle / MANIFEST).write_bytes(content)
    refused(copied_bundle)


@pytest.mark.parametrize("checksum", ["none", "wrong", "right"])
def test_deeply_nested_manifests(copied_bundle: Path, checksum: str) -> None:
    manifest = manifest_of(copied_bundle)
    limits = [100, *range(900, 1100, 4), 3000]  # Python's own limit on nesting is somewhere here
    for depth in limits:
        nested: list[Any] = []
        for _ in range(depth):
            nested = [nested]
        changed = manifest | {"cache": nested}
        if checksum == "right":
            try:
                write(copied_bundle, changed)
            except RecursionError:
                continue
        else:
            text = json.dumps(manifest | ({"sha256": "0" * 64} if checksum == "wrong" else {}) | {"cache": "here"})
            (copied_bundle / MANIFEST).write_text(text.replace('"here"', "[" * depth + "]" * depth))
        refused(copied_bundle)


def test_a_huge_manifest(copied_bundle: Path) -> None:
    forge(copied_bundle, padding="x" * 2**20)
    assert "expected at most 1048576" in refused(copied_bundle)
    (copied_bundle / MANIFEST).write_bytes(b"")
    os.truncate(copied_bundle / MANIFEST, 2**40)  # a terabyte of nothing
    assert "expected at most 1048576" in refused(copied_bundle)


# --- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_cut_or_longer(copied_bundle: Path, name: str) -> None:
    path = copied_bundle / name
    content = path.read_bytes()
    for changed in (content[: len(content) // 2], content[:1], b"", content + b"x", bytes(len(content))):
        replace_bytes(path, changed)
        refused(copied_bundle)
    path.unlink()
    assert name in refused(copied_bundle)
    path.write_bytes(content)
    Bundle.open(copied_bundle)


@pytest.mark.parametrize("name", FILES)
def test_one_changed_bit_anywhere(copied_bundle: Path, name: str) -> None:
    path = copied_bundle / name
    content = path.read_bytes()
    chosen = random.Random(name)
    for position in [0, len(content) - 1, *(chosen.randrange(len(content)) for _ in range(100))]:
        changed = bytearray(content)
        changed[position] ^= 1 << chosen.randrange(8)
        replace_bytes(path, changed)
        refused(copied_bundle)


def test_files_that_changed_places(copied_bundle: Path) -> None:
    (copied_bundle / MODEL).rename(copied_bundle / "other")
    (copied_bundle / WEIGHTS).rename(copied_bundle / MODEL)
    (copied_bundle / "other").rename(copied_bundle / WEIGHTS)
    refused(copied_bundle)


@pytest.mark.parametrize("name", FILES)
def test_a_directory_in_the_place_of_a_file(copied_bundle: Path, name: str) -> None:
    (copied_bundle / name).unlink()
    (copied_bundle / name).mkdir()
    assert name in refused(copied_bundle)


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_in_the_place_of_a_file(copied_bundle: Path, name: str) -> None:
    with pipe_that_nobody_opens(copied_bundle / name):
        assert name in refused(copied_bundle)
        assert name in refused(copied_bundle, verify_hashes=True)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
)
def test_a_pipe_that_the_manifest_does_not_list(copied_bundle: Path, name: str) -> None:
    (copied_bundle / name).unlink(missing_ok=True)
    relist(copied_bundle)
    with pipe_that_nobody_opens(copied_bundle / name):
        try:
            gta_edge.load(copied_bundle, "onnxruntime").close()
        except BundleError as error:
            assert name in str(error)  # noqa: PT017  to be refused is fine, and so is to be left alone


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", '{"eos_token_id": 7}'),
        ("chat_template.jinja", "secret"),
    ],
)
def test_a_file_outside_is_not_read_through_a_link_that_is_not_listed(
    copied_bundle: Path, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / "outside").write_text(content)
    (copied_bundle / name).symlink_to(tmp_path / "outside")
    try:
        session = gta_edge.load(copied_bundle, "onnxruntime")
    except BundleError as error:
        assert name in str(error)  # noqa: PT017
        return
    with session:
        assert 7 not in session.end_token_ids
        assert session.tokenizer is not None
        assert session.tokenizer.chat_template is None


# --- links that lead outside ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LISTED)
def test_a_link_that_leads_outside(copied_bundle: Path, tmp_path: Path, name: str) -> None:
    (copied_bundle / name).rename(tmp_path / "outside")  # the right content in the wrong place
    for target in (tmp_path / "outside", Path("../outside"), Path("/dev/zero"), Path(name), Path("nowhere")):
        (copied_bundle / name).unlink(missing_ok=True)
        (copied_bundle / name).symlink_to(target)
        assert name in refused(copied_bundle)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "a/b", "..", ".", "", "C:b", "a\\b", "a\0b", "a\nb", "\ud800", "x" * 300]
)
def test_names_that_lead_outside(copied_bundle: Path, tmp_path: Path, name: str) -> None:
    files = manifest_of(copied_bundle)["files"]
    shutil.copy2(copied_bundle / CONFIG, tmp_path / "outside")
    forge(copied_bundle, files=files | {name: files[CONFIG]})
    refused(copied_bundle)


# --- forged manifests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3, 10**9, 0, -1, 1.0, 1.5, "1", None, True, [1], {}])
def test_other_format_versions(copied_bundle: Path, version: Any) -> None:
    forge(copied_bundle, format_version=version)
    assert f"format_version is {version!r}" in refused(copied_bundle)


def test_a_newer_version_is_told_to_upgrade_whatever_else_it_holds(copied_bundle: Path) -> None:
    write(copied_bundle, {"format": "gta-edge-bundle", "format_version": 2, "anything": "else"})
    assert refused(copied_bundle).endswith("upgrade it")


@pytest.mark.parametrize("key", ["format", "format_version", "precision", "cache", "files"])
def test_an_entry_that_is_missing(copied_bundle: Path, key: str) -> None:
    manifest = manifest_of(copied_bundle)
    del manifest[key]
    write(copied_bundle, manifest)
    refused(copied_bundle)


@pytest.mark.parametrize("name", [MODEL, CONFIG])
def test_a_manifest_without_a_file_that_is_needed(copied_bundle: Path, name: str) -> None:
    (copied_bundle / name).unlink()
    relist(copied_bundle)
    assert name in refused(copied_bundle)


def places(entry: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a JSON document there is something."""
    items = entry.items() if isinstance(entry, dict) else enumerate(entry) if isinstance(entry, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([10**30, 2**63, -(2**63)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)

# What no reader relies on; a time that is not as recorded only costs a hash.
FREE = {"architecture", "made_with", "mtime_ns"}


@settings(max_examples=200, deadline=None)
@given(data=st.data(), value=JSON)
def test_any_json_in_the_place_of_any_entry(tiny_bundle: Path, data: st.DataObject, value: Any) -> None:
    manifest = manifest_of(tiny_bundle)
    *parents, key = data.draw(st.sampled_from(list(places(manifest))))
    holder = manifest
    for parent in parents:
        holder = holder[parent]
    with tempfile.TemporaryDirectory() as temporary:
        ignore = shutil.ignore_patterns("engines")
        directory = shutil.copytree(tiny_bundle, Path(temporary, "bundle"), ignore=ignore)
        before, holder[key] = holder[key], value
        write(directory, manifest)
        if value == before or FREE & {key, *parents}:
            try:
                Bundle.open(directory)
            except BundleError as error:
                assert "\n" not in str(error)  # noqa: PT017
        else:
            refused(directory)


@settings(max_examples=100, deadline=None)
@given(manifest=st.dictionaries(st.sampled_from(["format", "format_version", "files", "cache", "precision"]), JSON))
@example({"precision": [], "files": {}})
def test_any_json_in_a_manifest(tiny_bundle: Path, manifest: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary), {"format": "gta-edge-bundle", "format_version": 1} | manifest)
        refused(Path(temporary))


def test_a_config_of_another_model(copied_bundle: Path) -> None:
    entries = json.loads((copied_bundle / CONFIG).read_text())
    for change, message in (
        ({"value_dim": 8}, "the cache layout"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"vocab_size": "300"}, "vocab_size"),
    ):
        (copied_bundle / CONFIG).write_text(json.dumps(entries | change))
        relist(copied_bundle)
        assert message in refused(copied_bundle)


# --- models that are not what they should be -------------------------------------------------------------------------


def set_external(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    """Return an edit that says of all weights that they lie elsewhere."""

    def edit(model: onnx.ModelProto) -> None:
        entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == key]
        assert entries
        for entry in entries:
            entry.value = value

    return edit


def does_not_load(directory: Path, backend: str) -> str:
    """What is said of a bundle that opens, but whose model no backend should take."""
    with pytest.raises((BundleError, BackendError)) as caught, gta_edge.load(directory, backend) as session:
        session.forward(np.array([[1, 2]]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "location", ["../outside", "{}/outside", "engines/../../outside", "link", "/dev/zero", "", "."]
)
def test_weights_outside_the_bundle(copied_bundle: Path, tmp_path: Path, location: str, backend: str) -> None:
    shutil.copy(copied_bundle / WEIGHTS, tmp_path / "outside")  # which would fit
    (copied_bundle / "engines").mkdir()
    (copied_bundle / "link").symlink_to(tmp_path / "outside")
    edit_model(copied_bundle, set_external("location", location.format(tmp_path)))
    assert str(copied_bundle) in does_not_load(copied_bundle, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_beyond_the_end_of_their_file(copied_bundle: Path, backend: str) -> None:
    edit_model(copied_bundle, set_external("offset", "999999999"))
    does_not_load(copied_bundle, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("content", [b"", b"garbage" * 100, None])
def test_a_model_that_is_none(copied_bundle: Path, content: bytes | None, backend: str) -> None:
    model = copied_bundle / MODEL
    model.write_bytes(model.read_bytes()[:5000] if content is None else content)
    relist(copied_bundle)
    does_not_load(copied_bundle, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_of_another_kind(copied_bundle: Path, backend: str) -> None:
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["a"], ["b"])], "other", [value("a", 1, [1])], [value("b", 1, [1])]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=10)
    onnx.save(model, copied_bundle / MODEL)
    relist(copied_bundle)
    does_not_load(copied_bundle, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"vocab_size": 299}])
def test_a_model_that_does_not_fit_its_config(copied_bundle: Path, change: dict[str, int], backend: str) -> None:
    entries = json.loads((copied_bundle / CONFIG).read_text())
    (copied_bundle / CONFIG).write_text(json.dumps(entries | change))
    relist(copied_bundle)
    does_not_load(copied_bundle, backend)


# --- a bundle that is replaced while it is opened ---------------------------------------------------------------------


def test_a_bundle_that_is_replaced_while_it_is_opened_is_one_or_the_other(copied_bundle: Path) -> None:
    """Two bundles that differ in a small file take turns at one place."""
    other = shutil.copytree(copied_bundle, copied_bundle.with_name("other"))
    forge(other, made_with={"other": "1"})
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    manifest = manifest_of(other)
    forge(other, files=manifest["files"] | {"config.json": integrity.describe_file(other / "config.json")})
    script = """
import sys, time
from pathlib import Path
from gta_edge.support.partials import _exchange
while True:
    time.sleep(0.05)
    _exchange(Path(sys.argv[1]), Path(sys.argv[2]))
"""
    with subprocess.Popen([sys.executable, "-c", script, str(copied_bundle), str(other)], env=environment()) as writer:
        try:
            seen = {"other" in Bundle.open(copied_bundle).manifest["made_with"] for _ in range(60)}
            assert writer.poll() is None
        finally:
            writer.kill()
    assert seen <= {True, False}
    assert seen


def test_a_bundle_knows_that_it_was_replaced(copied_bundle: Path) -> None:
    bundle = Bundle.open(copied_bundle)
    assert not bundle.was_replaced
    copied_bundle.rename(copied_bundle.with_name("old"))
    assert bundle.was_replaced
    shutil.copytree(copied_bundle.with_name("old"), copied_bundle)
    assert bundle.was_replaced


@pytest.mark.parametrize("name", [CONFIG, MODEL, "tokenizer.json"])
def test_a_sparse_file_of_terabytes_is_refused_unread(copied_bundle: Path, name: str) -> None:
    os.truncate(copied_bundle / name, 2**40)
    files = manifest_of(copied_bundle)["files"]
    files[name] |= {"bytes": 2**40, "mtime_ns": (copied_bundle / name).stat().st_mtime_ns}
    forge(copied_bundle, files=files)
    assert "expected at most" in refused(copied_bundle)


# --- when weights are hashed -----------------------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Make the weights large, and return a function that opens a bundle and tells which large files were hashed."""
    monkeypatch.setattr(integrity, "_ALWAYS_HASHED_BYTES", 50_000)

    def opened(directory: Path, **options: Any) -> list[str]:
        seen: list[str] = []
        Bundle.open(directory, progress=lambda what, done, total: seen.append(what), **options)
        return sorted({what.removeprefix("hashing ") for what in seen})

    return opened


def later(path: Path, seconds: int = 1) -> None:
    """Touch a file."""
    info = path.stat()
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + seconds * 10**9))


def test_large_files_are_hashed_when_their_time_changed(copied_bundle: Path, hashed: Callable[..., list[str]]) -> None:
    assert [n for n, size in Bundle.open(copied_bundle).file_bytes.items() if size > 50_000] == [WEIGHTS]
    assert hashed(copied_bundle) == []
    assert hashed(copied_bundle, verify_hashes=True) == [WEIGHTS]
    before = manifest_of(copied_bundle)
    later(copied_bundle / WEIGHTS, -1000)  # any other time, not only a later one
    assert hashed(copied_bundle) == [WEIGHTS]
    assert hashed(copied_bundle) == []  # what was hashed once is remembered
    assert manifest_of(copied_bundle) == before  # and not in the bundle
    assert sorted(path.name for path in copied_bundle.iterdir()) == FILES


def test_changed_weights_with_the_recorded_time(copied_bundle: Path, hashed: Callable[..., list[str]]) -> None:
    content = (copied_bundle / WEIGHTS).read_bytes()
    replace_bytes(copied_bundle / WEIGHTS, content[:-1] + bytes([content[-1] ^ 1]))
    assert hashed(copied_bundle) == []  # the price of opening fast
    assert "SHA-256 differs" in refused(copied_bundle, verify_hashes=True)
    later(copied_bundle / WEIGHTS)
    before = (copied_bundle / MANIFEST).read_bytes()
    assert "SHA-256 differs" in refused(copied_bundle)
    assert "SHA-256 differs" in refused(copied_bundle)  # the time of what is wrong is not recorded
    assert (copied_bundle / MANIFEST).read_bytes() == before


@pytest.mark.usefixtures("hashed")
def test_large_files_of_another_size(copied_bundle: Path) -> None:
    replace_bytes(copied_bundle / WEIGHTS, (copied_bundle / WEIGHTS).read_bytes() + b"x")
    assert "bytes, recorded were" in refused(copied_bundle)


def test_small_files_are_always_hashed_and_the_manifest_stays(copied_bundle: Path) -> None:
    before = (copied_bundle / MANIFEST).read_bytes()
    for name in LISTED:
        later(copied_bundle / name)
    Bundle.open(copied_bundle)
    assert (copied_bundle / MANIFEST).read_bytes() == before


def test_a_bundle_that_cannot_be_written_to_opens(
    tiny_bundle: Path, hashed: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary).chmod(0o777)
        monkeypatch.setenv("GTA_EDGE_CACHE", str(Path(temporary, "cache")))
        ignore = shutil.ignore_patterns("engines")
        directory = shutil.copytree(tiny_bundle, Path(temporary, "bundle"), ignore=ignore)
        later(directory / WEIGHTS)
        before = (directory / MANIFEST).read_bytes()
        for path in directory.iterdir():
            path.chmod(0o444)
        directory.chmod(0o555)
        with unprivileged():
            assert hashed(directory) == [WEIGHTS]
            assert hashed(directory) == []
        directory.chmod(0o755)
        assert (directory / MANIFEST).read_bytes() == before
        assert sorted(path.name for path in directory.iterdir()) == FILES


# --- without a tokenizer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_in_and_ids_out_without_a_tokenizer(copied_bundle: Path, tiny_bundle: Path, backend: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied_bundle / name).unlink()
    relist(copied_bundle)
    with gta_edge.load(copied_bundle, backend) as session:
        assert session.tokenizer is None
        generation = gta_edge.generate(session, [1, 2, 3], max_new_tokens=5, ignore_eos=True)
        assert list(generation) == [""] * 5
        assert generation.text is None
        with pytest.raises(InputError, match="no tokenizer"):
            gta_edge.generate(session, "text")
    with gta_edge.load(tiny_bundle, backend) as session:
        same = gta_edge.generate(session, [1, 2, 3], max_new_tokens=5, ignore_eos=True)
        assert "".join(same) == same.text
        assert same.ids == generation.ids
