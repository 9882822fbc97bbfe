"""Outputs are complete or absent, and nothing that is not ours is ever replaced."""

import errno
import fcntl
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from gta_edge.errors import OutputError
from gta_edge.formats import integrity
from gta_edge.support.files import cache_directory, new_directory, new_file, scratch_directory
from tests.helpers.limits import largest_file, unprivileged
from tests.helpers.outputs import fail_within, old_directory, one_line


@contextmanager
def _umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


# --- directories ---------------------------------------------------------------------------------------------------


def test_a_directory_appears_when_complete(tmp_path):
    target = tmp_path / "out"
    with new_directory(target) as partial:
        assert partial.parent == tmp_path
        assert not target.exists()
        (partial / "file").write_text("x")
    assert (target / "file").read_text() == "x"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("opener", [new_directory, new_file])
def test_permissions_are_those_of_the_umask(tmp_path, opener):
    with _umask(0o027), opener(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode & 0o777 == (0o750 if opener is new_directory else 0o640)


@pytest.mark.parametrize("opener", [new_directory, new_file])
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), OSError(errno.EIO, "disk")])
def test_an_error_leaves_nothing_and_passes_unchanged(tmp_path, opener, error):
    with pytest.raises(type(error)) as caught:
        fail_within(tmp_path / "out", error, opener)
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opener", [new_directory, new_file])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG])
def test_an_error_of_the_disk_becomes_ours(tmp_path, opener, number):
    with pytest.raises(OutputError, match=os.strerror(number)) as caught:
        fail_within(tmp_path / "out", OSError(number, os.strerror(number)), opener)
    assert str(tmp_path / "out") in one_line(caught)
    assert list(tmp_path.iterdir()) == []


def test_an_error_about_a_file_elsewhere_is_not_the_outputs(tmp_path):
    with pytest.raises(PermissionError):
        fail_within(tmp_path / "out", PermissionError(errno.EACCES, "denied", str(tmp_path / "input")))
    with pytest.raises(OutputError), new_directory(tmp_path / "out") as partial:
        raise PermissionError(errno.EACCES, "denied", str(partial / "file"))


def test_a_disk_that_takes_no_more(tmp_path):
    with largest_file(1000), pytest.raises(OutputError, match="File too large"), new_directory(tmp_path / "o") as d:
        (d / "file").write_bytes(bytes(10_000))
    with largest_file(1000), pytest.raises(OutputError, match="File too large"), new_file(tmp_path / "o") as file:
        file.write_bytes(bytes(10_000))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_refused_without_force(tmp_path):
    old_directory(tmp_path / "out")
    with pytest.raises(OutputError, match=r"already exists.*--force") as caught, new_directory(tmp_path / "out"):
        pass
    one_line(caught)
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def held(path):
    """Lock what another process works on."""
    lock = os.open(next(path.glob(".gta-edge-*")), os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    LOCKS.append(lock)


LOCKS = []


def test_force_replaces_what_is_empty(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    with new_directory(target, force=True) as partial:
        (partial / "new").write_text("new")
    assert [p.name for p in target.iterdir()] == ["new"]


def test_force_replaces_what_is_ours_once_the_new_one_is_complete(tmp_path):
    target = old_directory(tmp_path / "out")
    with new_directory(target, force=True) as partial:
        (partial / "new").write_text("new")
        assert (target / "config.json").read_text() == "old"
    assert [p.name for p in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    "add",
    [
        lambda path: (path / "thesis.tex").write_text("x"),
        lambda path: (path / ".git").mkdir(),
        lambda path: (path / "config.json.bak").write_text("x"),
        lambda path: (path / "gta_edge_checkpoint.json").unlink(),
        lambda path: (path / "gta_edge_checkpoint.json").write_text("{}"),
        lambda path: (path / "gta_edge_checkpoint.json").write_text("not JSON"),
        lambda path: (path / "gta_edge_checkpoint.json").write_text('{"format": ["gta-edge-checkpoint"], "files": {}}'),
        lambda path: (path / "gta_edge_checkpoint.json").write_text('{"format": "gta-edge-checkpoint", "files": []}'),
        lambda path: ((path / "config.json").unlink(), (path / "config.json").mkdir()),
        lambda path: (path / "config.json").write_text("changed"),  # by training, or by hand
        lambda path: (path / "engine.json").write_text("{}"),
        lambda path: (path / f".gta-edge-{os.getpid()}-0123456789ab.partial").mkdir() or held(path),
        lambda path: ((path / "engines").mkdir(), (path / "engines" / "model.onnx").write_text("x")),
        lambda path: ((path / "engines").mkdir(), (path / "engines" / "notes.txt").write_text("x")),
        lambda path: ((path / "engines" / "mine").mkdir(parents=True), (path / "engines" / "mine" / "a.py").touch()),
        lambda path: (path / "engines").symlink_to(path.parent),
    ],
)
def test_force_replaces_nothing_with_anything_else_in_it(tmp_path, add):
    target = old_directory(tmp_path / "out")
    add(target)
    before = sorted(str(path) for path in target.rglob("*"))
    with pytest.raises(OutputError, match="not replaced even with --force") as caught:
        fail_within(target, AssertionError("not reached"), force=True)
    one_line(caught)
    assert sorted(str(path) for path in target.rglob("*")) == before
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_that_is_as_long_as_it_was_and_another_is_somebodys(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "weights").write_text("trained for an hour")
    files = {"weights": integrity.describe_file(target / "weights")}
    (target / "gta_edge_checkpoint.json").write_text(json.dumps({"format": "gta-edge-checkpoint", "files": files}))
    os.utime(target / "weights", (1, 1))  # a copy without times is still ours
    with new_directory(target, force=True) as partial:
        shutil.copytree(target, partial, dirs_exist_ok=True)
    (target / "weights").write_text("trained for a month")
    with pytest.raises(OutputError, match="weights, changed since it was written"), new_directory(target, force=True):
        pass
    assert (target / "weights").read_text() == "trained for a month"


def test_force_replaces_its_own_kind(tmp_path):
    target = old_directory(tmp_path / "out")
    with (
        pytest.raises(OutputError, match="no record of a gta-edge-bundle"),
        new_directory(target, force=True, kind="gta-edge-bundle"),
    ):
        pass
    with new_directory(target, force=True, kind="gta-edge-checkpoint"):
        pass


def test_an_artifact_that_lost_its_record_is_replaced_and_what_a_user_put_there_is_not(tmp_path):
    target = tmp_path / "tensorrt"
    target.mkdir()
    (target / "engine.plan").touch()
    with pytest.raises(OutputError, match="not replaced"), new_directory(target, force=True):
        pass
    with new_directory(target, force=True, artifact=True) as partial:
        (partial / "engine.plan").write_text("new")
    assert (target / "engine.plan").read_text() == "new"
    (target / "notes.txt").touch()
    with pytest.raises(OutputError, match=r"notes\.txt"), new_directory(target, force=True, artifact=True):
        pass


# --- inputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opener", [new_directory, new_file])
def test_no_output_is_holds_or_lies_in_an_input(tmp_path, opener):
    given = old_directory(tmp_path / "models" / "in") if (tmp_path / "models").mkdir() is None else None
    (tmp_path / "link").symlink_to(given)
    (given / "sub").mkdir()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "weights").touch()
    (given / "weights").symlink_to(tmp_path / "blobs" / "weights")
    for output in (
        given,
        given.parent,
        given / "out",
        given / "sub" / "out",
        tmp_path / "link",
        tmp_path / "link" / "out",
        tmp_path / "blobs",  # what it reads lies there
        tmp_path / "blobs" / "weights",
        given / ".." / "in" / "out",
    ):
        for source in (given, tmp_path / "link"):
            with pytest.raises(OutputError, match="the input") as caught, opener(output, force=True, inputs=[source]):
                pytest.fail("the body must not run")
            one_line(caught)
    assert (given / "config.json").read_text() == "old"


def test_an_output_beside_an_input_or_a_file_that_is_read(tmp_path):
    given = old_directory(tmp_path / "in")
    (tmp_path / "text").touch()
    for name in ("in2", "out"):
        with new_directory(tmp_path / name, inputs=[given, tmp_path / "text"]):
            pass
    with (
        pytest.raises(OutputError, match="is the input"),
        new_file(tmp_path / "text", force=True, inputs=[tmp_path / "text"]),
    ):
        pass


# --- scratch -------------------------------------------------------------------------------------------------------


def test_a_scratch_directory_is_private_and_vanishes(tmp_path):
    with scratch_directory(tmp_path) as scratch:
        assert scratch.stat().st_mode & 0o777 == 0o700
        (scratch / "deep").mkdir()
    with pytest.raises(KeyboardInterrupt), scratch_directory(tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_no_place_for_temporary_files(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(OutputError, match=r"missing: no directory can be made.*TMPDIR"), scratch_directory():
        pass
    with pytest.raises(OutputError, match="file: no directory can be made"), scratch_directory(tmp_path / "file"):
        pass


# --- space ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opener", [new_directory, new_file])
def test_what_cannot_fit_is_refused_before_it_is_made(tmp_path, opener):
    with (
        pytest.raises(OutputError, match=r"takes about .* GB are free") as caught,
        opener(tmp_path / "out", needed_bytes=10**18),
    ):
        pytest.fail("the body must not run")
    one_line(caught)
    assert list(tmp_path.iterdir()) == []


# --- the cache -----------------------------------------------------------------------------------------------------


def test_the_cache_of_a_user(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GTA_EDGE_CACHE", "~/x")
    assert cache_directory() == tmp_path / "x"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GTA_EDGE_CACHE", "relative")
    assert cache_directory() == tmp_path / "relative"
    monkeypatch.setenv("GTA_EDGE_CACHE", "~nobody-of-that-name/x")
    assert cache_directory() is None


# --- what is replaced ------------------------------------------------------------------------------------------------


def test_an_error_keeps_the_old_directory(tmp_path):
    old = old_directory(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        fail_within(old, KeyboardInterrupt(), force=True)
    assert (old / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_an_error_between_the_two_renames_brings_the_old_one_back(tmp_path, monkeypatch, error):
    old = old_directory(tmp_path / "out")
    rename = Path.rename
    calls = []

    def second_fails(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise error
        return rename(self, target)

    monkeypatch.setattr("gta_edge.support.partials._exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", second_fails)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), new_directory(old, force=True):
        pass
    assert (old / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]


def test_a_directory_made_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(OutputError, match="already exists"), new_directory(tmp_path / "out"):
        old_directory(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_an_old_directory_that_cannot_be_removed_is_named(tmp_path, monkeypatch):
    def fails(path, **options):
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr("shutil.rmtree", fails)
    with (
        pytest.raises(OutputError, match=r"is written, but .*busy"),
        new_directory(old_directory(tmp_path / "out"), force=True),
    ):
        pass
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("force", [False, True])
def test_root_home_and_working_directory_are_never_replaced(tmp_path, monkeypatch, force):
    work = tmp_path / "a" / "work"
    home = tmp_path / "b" / "home"
    for path in (work, home):
        path.mkdir(parents=True)
        (path / "config.json").write_text("{}")
        (path.parent / "config.json").write_text("{}")
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    for path in ("/", ".", "", "..", work, work.parent, home, home.parent, "../work"):
        with pytest.raises(OutputError, match="never replaced"), new_directory(path, force=force):
            pass
    assert (work / "config.json").exists()
    assert (home / "config.json").exists()


def test_a_working_directory_that_is_gone_does_not_matter(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with new_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out").is_dir()
    with pytest.raises(OutputError, match="no usable path"), new_directory("out"):
        pass


def test_a_link_is_followed(tmp_path):
    real = old_directory(tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    with new_directory(tmp_path / "link", force=True) as partial:
        (partial / "new").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert [p.name for p in real.iterdir()] == ["new"]


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_file_appears_when_complete(tmp_path):
    target = tmp_path / "out.json"
    with new_file(target) as partial:
        assert not target.exists()
        partial.write_text("x")
    assert target.read_text() == "x"
    assert list(tmp_path.iterdir()) == [target]


def test_an_existing_file_needs_force(tmp_path):
    target = tmp_path / "out.json"
    target.write_text("old")
    with pytest.raises(OutputError, match=r"already exists.*--force"), new_file(target):
        pass
    with pytest.raises(ValueError, match="x"):
        fail_within(target, ValueError("x"), new_file, force=True)
    assert target.read_text() == "old"
    with new_file(target, force=True) as partial:
        partial.write_text("new")
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_only_a_regular_file_is_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/null"):
        with pytest.raises(OutputError, match="no regular file"), new_file(path, force=True):
            pass
    (tmp_path / "file").touch()
    for path in (tmp_path / "pipe", tmp_path / "file"):
        with pytest.raises(OutputError, match="no directory"), new_directory(path, force=True):
            pass


# --- places that cannot be written to --------------------------------------------------------------------------------


@pytest.mark.parametrize("opener", [new_directory, new_file])
def test_places_that_cannot_be_written_to(tmp_path, opener):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, reason in (
        (tmp_path / "missing" / "out", "parent directory does not exist"),
        (tmp_path / "file" / "out", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "loop" / "out", "loop|levels of symbolic links"),
        ("a\0b", "no usable path"),
        ("/proc/out", "cannot be written"),
    ):
        with pytest.raises(OutputError, match=reason) as caught, opener(path):
            pytest.fail("the body must not run")
        one_line(caught)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "loop"]


@pytest.mark.parametrize("opener", [new_directory, new_file])
def test_a_parent_that_is_read_only(opener):
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o555)
        path = Path(parent, "out")
        with unprivileged(), pytest.raises(OutputError, match="Permission denied") as caught, opener(path):
            pytest.fail("the body must not run")
        one_line(caught)
        Path(parent).chmod(0o755)
