"""What a process leaves that is killed while it writes goes with the next run, and nothing is lost."""

import fcntl
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from gta_edge.errors import OutputError
from gta_edge.support.files import new_directory, new_file
from tests.helpers.commands import environment
from tests.helpers.outputs import old_directory

_KILLED = """
import os, signal, sys
from gta_edge.support.files import new_directory, new_file, scratch_directory
opener = {"directory": new_directory, "file": new_file, "scratch": scratch_directory}[sys.argv[1]]
with opener(sys.argv[2]) as partial:
    if partial.is_dir():
        (partial / "weights").write_text("half")
    print(flush=True)
    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[3] == "kill" else sys.stdin.read()
"""


def _start(kind, path, how):
    return subprocess.Popen(
        [sys.executable, "-c", _KILLED, kind, str(path), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    )


@pytest.mark.parametrize("kind", ["directory", "file", "scratch"])
def test_what_a_killed_process_left_goes_with_the_next_run(tmp_path, kind):
    with _start(kind, tmp_path if kind == "scratch" else tmp_path / "out", "kill") as process:
        process.communicate(timeout=60)
    assert [p.name for p in tmp_path.iterdir()] != []
    with new_file(tmp_path / "other") as partial:
        partial.write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_what_another_process_is_working_on_stays(tmp_path):
    with _start("directory", tmp_path / "out", "wait") as process:
        assert process.stdout.readline()
        with new_file(tmp_path / "other"):
            pass
        assert len(list(tmp_path.iterdir())) == 2
        process.communicate(b"", timeout=60)
    assert (tmp_path / "out" / "weights").read_text() == "half"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out"]


def test_a_lock_keeps_what_belongs_to_a_process_that_cannot_be_seen(tmp_path):
    """Another container's processes have other numbers; the lock is held all the same."""
    left = tmp_path / f".gta-edge-{2**22 - 1}-0123456789ab.partial"  # above what Linux numbers processes with
    left.mkdir()
    lock = os.open(left, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with new_file(tmp_path / "a"):
        pass
    assert left.exists()
    os.close(lock)
    with new_file(tmp_path / "b"):
        pass
    assert not left.exists()


def test_what_a_process_of_the_same_number_left_goes(tmp_path):
    """In a container every run is process 1, or another small number."""
    left = tmp_path / f".gta-edge-{os.getpid()}-0123456789ab.partial"
    left.mkdir()
    with new_directory(tmp_path / "out") as working, new_file(tmp_path / "other"):
        assert not left.exists()
        assert working.exists()


def test_hidden_files_of_others_stay(tmp_path):
    names = [".gta-edge-notes", ".gta-edge-1-xyz.partial", ".hidden", ".gta-edge-0123456789ab.partial"]
    for name in names:
        (tmp_path / name).touch()
    with new_file(tmp_path / "out"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, "out"])  # the last may be in use


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_kill_while_a_directory_is_replaced_loses_nothing(tmp_path, exchanges):
    """Killed before and after every step; on file systems that can exchange two names and on others."""
    script = """
import os, signal, sys
from pathlib import Path
from gta_edge.support import files
from gta_edge.support import partials

step = 0
def counted(function):
    def call(*arguments, **options):
        global step
        step += 1
        if step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

partials._exchange = counted(partials._exchange if sys.argv[3] == "True" else lambda one, other: False)
Path.rename = counted(Path.rename)
partials._sync = counted(partials._sync)
files.shutil.rmtree = counted(files.shutil.rmtree)
with files.new_directory(sys.argv[1], force=True) as partial:
    (partial / "new").write_text("new")
"""
    for step in range(1, 20):
        target = old_directory(tmp_path / f"out{step}")
        arguments = [str(target), str(step), str(exchanges)]
        done = subprocess.run([sys.executable, "-c", script, *arguments], env=environment(), check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        with suppress(OutputError), new_directory(target):  # any command that would write there
            pass
        names = {p.name for p in target.iterdir()}
        assert names in ({"config.json", "gta_edge_checkpoint.json"}, {"new"})
        if exchanges:
            assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    else:
        pytest.fail("it was never finished")
    assert step > 4


@pytest.mark.parametrize("exchanges", [True, False])
def test_both_ways_to_replace_a_directory(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr("gta_edge.support.partials._exchange", lambda one, other: False)
    target = old_directory(tmp_path / "out")
    with new_directory(target, force=True) as partial:
        (partial / "new").write_text("new")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_content_is_on_the_disk_before_its_name_and_the_name_before_all_is_done(tmp_path, monkeypatch):
    synced = []
    sync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: synced.append(str(Path(f"/proc/self/fd/{number}").readlink())) or sync(number)
    )
    with new_directory(tmp_path / "out") as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "file").write_text("x")
    assert synced == [str(partial / "deep" / "file"), str(partial / "deep"), str(partial), str(tmp_path)]
    synced.clear()
    with new_file(tmp_path / "file") as partial:
        pass
    assert synced == [str(partial), str(tmp_path)]
