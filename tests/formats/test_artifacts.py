"""Artifacts: only what this user made on this machine is run, and only as it was made."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.formats import artifacts
from gta_edge.formats.artifacts import Artifact, RefusedError, difference, open_artifact, write_record
from tests.helpers.records import edit

PLACE, RECORD = "engines/kind", "engine.json"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GTA_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path, cache: Path) -> Path:
    """A bundle's directory with an artifact."""
    directory = tmp_path / "bundle"
    make(directory)
    return directory


def make(root: Path) -> None:
    place = root / PLACE
    place.mkdir(parents=True)
    (place / "graph").write_bytes(b"a graph")
    (place / "weights").write_bytes(bytes(range(200)))
    write_record(place, RECORD, {"made_from": "abc"})


def opened(root: Path, **options: bool) -> Artifact:
    return open_artifact(root, PLACE, RECORD, read=("graph",), mapped=("weights", "none"), **options)


def refused(root: Path, **options: bool) -> RefusedError:
    with pytest.raises(RefusedError) as found:
        opened(root, **options)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 300
    return found.value


def test_what_was_made_here_is_read(root: Path) -> None:
    found = opened(root)
    assert found.content == {"made_from": "abc"}
    assert found.read == {"graph": b"a graph"}
    assert found.mapped == {"weights": bytes(range(200))}


def test_what_is_mapped_stays_what_it_is_when_another_takes_its_place(root: Path) -> None:
    found = opened(root)
    shutil.rmtree(root / PLACE)
    assert found.mapped["weights"] == bytes(range(200))


def test_a_copy_of_the_bundle_on_this_machine(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)  # without times
    assert opened(tmp_path / "copy").read == {"graph": b"a graph"}


def test_nothing_there(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "bundle").mkdir()
    assert refused(tmp_path / "bundle").kind == "absent"
    assert refused(tmp_path / "no bundle").kind == "absent"


def test_another_users_or_machines_is_not_opened(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = next(cache.glob("machine-*.key"))
    secret = key.read_bytes()
    key.unlink()
    assert refused(root).kind == "foreign"
    assert key.read_bytes() != secret
    key.write_bytes(secret)
    assert opened(root).content
    monkeypatch.setattr(artifacts, "_MACHINE_ID", cache / "another machine's id")
    (cache / "another machine's id").write_text("0123456789abcdef")
    assert refused(root).kind == "foreign"


def test_the_secret_is_its_users_alone(root: Path, cache: Path) -> None:
    key = next(cache.glob("machine-*.key"))
    assert key.stat().st_mode & 0o777 == 0o600
    assert len(key.read_bytes()) == 32
    assert [path.name for path in cache.iterdir()] == [key.name]
    before = key.read_bytes()
    key.chmod(0o644)  # somebody may have read it, and signed with it
    assert refused(root).kind == "foreign"
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.read_bytes() != before


@pytest.mark.parametrize("content", [b"", b"short", bytes(33)])
def test_a_damaged_secret_is_made_anew(root: Path, cache: Path, content: bytes) -> None:
    next(cache.glob("machine-*.key")).write_bytes(content)
    assert refused(root).kind == "foreign"
    shutil.rmtree(root)
    make(root)
    assert opened(root).content


DAMAGES: dict[str, Callable[[Path], object]] = {
    "another byte": lambda place: (place / "weights").write_bytes(bytes(range(1, 201))),
    "cut": lambda place: (place / "graph").write_bytes(b"a grap"),
    "empty": lambda place: (place / "weights").write_bytes(b""),
    "gone": lambda place: (place / "weights").unlink(),
    "a directory": lambda place: ((place / "graph").unlink(), (place / "graph").mkdir()),
    "a link": lambda place: ((place / "graph").rename(place / "g"), (place / "graph").symlink_to("g")),
    "a pipe": lambda place: ((place / "graph").unlink(), os.mkfifo(place / "graph")),
    "no record": lambda place: (place / RECORD).unlink(),
    "a record that is a pipe": lambda place: ((place / RECORD).unlink(), os.mkfifo(place / RECORD)),
    "a record of 3 GB": lambda place: os.truncate(place / RECORD, 3 * 2**30),
    "no JSON": lambda place: (place / RECORD).write_text("{"),
    "a newer version": lambda place: edit(place / RECORD, lambda d: d.update(format_version=2)),
    "another entry": lambda place: edit(place / RECORD, lambda d: d["files"].update(graph=[])),
    "not signed again": lambda place: edit(place / RECORD, lambda d: d.update(content={}), sign=False),
    "signed with nothing": lambda place: (place / RECORD).write_text(
        (place / RECORD).read_text().replace('"signature": "', '"signature": "é')
    ),
    "the directory a link": lambda place: (place.rename(place.with_name("k")), place.symlink_to("k")),
    "its parent a link": lambda place: (
        place.parent.rename(place.parents[1] / "e"),
        place.parent.symlink_to("e"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused(root: Path, damage: str) -> None:
    DAMAGES[damage](root / PLACE)
    refused(root)


def test_a_byte_of_the_same_time_and_size_is_found_when_that_is_asked_for(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gta_edge.formats.integrity._ALWAYS_HASHED_BYTES", 0)
    path = root / PLACE / "weights"
    times = path.stat()
    path.write_bytes(bytes(range(1, 201)))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert refused(root, verify_hashes=True).kind == "damaged"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_no_bit_of_a_record_can_be_changed(tmp_path_factory: pytest.TempPathFactory, at: int, bit: int) -> None:
    root = tmp_path_factory.mktemp("record")
    make(root)
    path = root / PLACE / RECORD
    before = json.loads(path.read_text())
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1 << bit
    path.write_bytes(content)
    try:
        found = opened(root)
    except RefusedError:
        return
    assert found.content == before["content"]  # white space
    assert json.loads(path.read_text()) == before


@pytest.mark.parametrize(
    ("now", "then", "told"),
    [
        ({"a": "1", "b": {"x": 1}}, {"b": {"x": 1}, "a": "1"}, None),
        ({"a": "2", "b": "2"}, {"a": "1", "b": "1"}, "a is '2' here and was '1'"),
        ({"files": {"x": 2}}, {"files": {"x": 1}}, "files are others"),
        ({"a": "1"}, {}, "a are others"),
        ({}, {"a": "1"}, "a are others"),
    ],
)
def test_what_is_another_than_recorded(now: dict[str, object], then: dict[str, object], told: str | None) -> None:
    assert difference(now, then) == told
