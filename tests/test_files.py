"""Outputs are complete or absent, and nothing that is not ours is ever replaced."""

import errno
import os
import resource
import tempfile
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gta_edge.errors import OutputError
from gta_edge.files import new_directory, new_file, plain_name


@contextmanager
def _umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def _unprivileged():
    """Root may do anything, so permissions are tested as somebody else."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def _largest_file(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _old(path):
    """A directory as a command may have made it earlier."""
    path.mkdir()
    (path / "config.json").write_text("old")
    return path


def _fail(path, error, opener=new_directory, **options):
    with opener(path, **options) as partial:
        if partial.is_dir():
            (partial / "deep").mkdir()
            (partial / "deep" / "file").write_text("half")
        else:
            partial.write_text("half")
        raise error


def _one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


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
        _fail(tmp_path / "out", error, opener)
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opener", [new_directory, new_file])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG])
def test_an_error_of_the_disk_becomes_ours(tmp_path, opener, number):
    with pytest.raises(OutputError, match=os.strerror(number)) as caught:
        _fail(tmp_path / "out", OSError(number, os.strerror(number)), opener)
    assert str(tmp_path / "out") in _one_line(caught)
    assert list(tmp_path.iterdir()) == []


def test_an_error_about_a_file_elsewhere_is_not_the_outputs(tmp_path):
    with pytest.raises(PermissionError):
        _fail(tmp_path / "out", PermissionError(errno.EACCES, "denied", str(tmp_path / "input")))
    with pytest.raises(OutputError), new_directory(tmp_path / "out") as partial:
        raise PermissionError(errno.EACCES, "denied", str(partial / "file"))


def test_a_disk_that_takes_no_more(tmp_path):
    with _largest_file(1000), pytest.raises(OutputError, match="File too large"), new_directory(tmp_path / "o") as d:
        (d / "file").write_bytes(bytes(10_000))
    with _largest_file(1000), pytest.raises(OutputError, match="File too large"), new_file(tmp_path / "o") as file:
        file.write_bytes(bytes(10_000))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_refused_without_force(tmp_path):
    _old(tmp_path / "out")
    with pytest.raises(OutputError, match=r"already exists.*--force") as caught, new_directory(tmp_path / "out"):
        pass
    _one_line(caught)
    assert (tmp_path / "out" / "config.json").read_text() == "old"


@pytest.mark.parametrize("content", [[], ["config.json"], ["gta_edge.json", "model.onnx"]])
def test_force_replaces_what_is_ours_or_empty(tmp_path, content):
    target = tmp_path / "out"
    target.mkdir()
    for name in content:
        (target / name).write_text("old")
    with new_directory(target, force=True) as partial:
        (partial / "new").write_text("new")
        assert sorted(p.name for p in target.iterdir()) == sorted(content)  # until the new one is complete
    assert [p.name for p in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_force_replaces_no_other_directory(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_text("x")
    (tmp_path / "photos" / "config.json").mkdir()  # the name alone does not make it ours
    with pytest.raises(OutputError, match="not replaced even with --force"):
        _fail(tmp_path / "photos", AssertionError("not reached"), force=True)
    assert (tmp_path / "photos" / "1.jpg").exists()


def test_an_error_keeps_the_old_directory(tmp_path):
    old = _old(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        _fail(old, KeyboardInterrupt(), force=True)
    assert (old / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_an_error_between_the_two_renames_brings_the_old_one_back(tmp_path, monkeypatch, error):
    old = _old(tmp_path / "out")
    rename = Path.rename
    calls = []

    def second_fails(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), new_directory(old, force=True):
        pass
    assert (old / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]


def test_a_directory_made_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(OutputError, match="already exists"), new_directory(tmp_path / "out"):
        _old(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_an_old_directory_that_cannot_be_removed_is_named(tmp_path, monkeypatch):
    def fails(path, **options):
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr("shutil.rmtree", fails)
    with pytest.raises(OutputError, match=r"is written, but .*busy"), new_directory(_old(tmp_path / "out"), force=True):
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
    real = _old(tmp_path / "real")
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
        _fail(target, ValueError("x"), new_file, force=True)
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
        _one_line(caught)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "loop"]


@pytest.mark.parametrize("opener", [new_directory, new_file])
def test_a_parent_that_is_read_only(opener):
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o555)
        path = Path(parent, "out")
        with _unprivileged(), pytest.raises(OutputError, match="Permission denied") as caught, opener(path):
            pytest.fail("the body must not run")
        _one_line(caught)
        Path(parent).chmod(0o755)


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "a", ".hidden", "...", "with space", "é.json", "x" * 255])
def test_plain_names(name):
    assert plain_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "/a",
        "a/",
        "../a",
        "a\\b",
        "\\\\host\\share",
        "C:a",
        "C:\\a",
        "a:b",
        "a\0b",
        "a\nb",
        "\ud800",
        None,
        3,
        b"a",
        ["a"],
    ],
)
def test_names_that_are_not_plain(name):
    assert not plain_name(name)


@given(st.text(alphabet=st.one_of(st.sampled_from("./\\:\0ab"), st.characters()), max_size=8))
def test_a_plain_name_stays_in_its_directory(name):
    if plain_name(name):
        assert PurePosixPath("/base", name).parent == PurePosixPath("/base")
        assert PurePosixPath(name).name == PureWindowsPath(name).name == name
        os.fsencode(name)
