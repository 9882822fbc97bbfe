"""The benchmark's processes: what they see, what confuses them not, and that they end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gta_edge.errors import BackendError, CapacityError, OutputError
from gta_edge.evaluate.bench import settings as bench_settings
from gta_edge.evaluate.bench.case import Case
from gta_edge.evaluate.bench.process import Worker, WorkerError, environment_for, last_words
from gta_edge.evaluate.bench.run import Settings, bench
from gta_edge.evaluate.bench.targets import Target
from gta_edge.formats.bundle import Bundle
from tests.helpers.bench_interpreters import interpreter
from tests.helpers.commands import COMMAND, ROOT, environment

START = "from gta_edge.evaluate.bench.worker import main; main()"
REPORT = "print(json.dumps(sys.path)); print(json.dumps(sys.flags.safe_path if hasattr(sys.flags, 'safe_path') else 0))"


def asked_nothing(target: Target, directory: Path) -> None:
    """Start a worker; it must answer that nothing is open yet."""
    assert environment_for(target, directory)
    with Worker(target.python, environment_for(target, directory), directory, target.arguments) as worker:
        for _ in range(2):
            with pytest.raises(BackendError, match="nothing is open"):
                worker.ask(do="measure", prompt="none.npy", new_tokens=1, warm_up=True)


# --- the same modules ---------------------------------------------------------------------------------------------


def seen(tmp_path: Path, options: list[str], **changes: str) -> tuple[list[str], list[str]]:
    """``sys.path`` of a process that is started so, and of a worker of its."""
    script = f"""
import json, os, subprocess, sys
sys.path.insert(0, {str(ROOT)!r})
sys.path.insert(1, "relative")
from gta_edge.evaluate.bench.targets import Target
target = Target("onnxruntime")
arguments = [each.replace({START!r}, {REPORT!r}) for each in target.arguments]
os.chdir("/")
print(json.dumps([os.path.abspath(os.path.join({str(tmp_path)!r}, each)) for each in sys.path]))
sys.stdout.flush()
subprocess.run([target.python, *arguments], env=target.environment(with_source=True), check=True)
"""
    process = subprocess.run(
        [sys.executable, *options, "-c", script],
        cwd=tmp_path,
        env={**os.environ, **changes},
        capture_output=True,
        text=True,
        check=True,
    )
    own, workers = map(json.loads, process.stdout.splitlines()[:2])
    return list(dict.fromkeys(own)), workers


@pytest.mark.parametrize("options", [[], ["-P"], ["-s"], ["-E"], ["-I"], ["-B"]], ids=" ".join)
def test_a_worker_sees_what_its_parent_sees(tmp_path: Path, options: list[str]) -> None:
    if "-P" in options and sys.version_info < (3, 11):
        pytest.skip("this Python has no such option")
    paths = os.pathsep.join([str(tmp_path / "first"), "second", str(tmp_path / "third")])
    own, workers = seen(tmp_path, options, PYTHONPATH=paths)
    assert workers == own
    assert workers[:2] == [str(ROOT), str(tmp_path / "relative")]
    if not {"-E", "-I"} & set(options):
        order = [workers.index(str(tmp_path / name)) for name in ("first", "second", "third")]
        assert order == sorted(order)


def test_a_module_that_the_parent_shadows_is_shadowed(tmp_path: Path, tiny_bundle: Path) -> None:
    (tmp_path / "first" / "onnxruntime").mkdir(parents=True)
    (tmp_path / "first" / "onnxruntime" / "__init__.py").write_text("__version__ = '0.1'\n")
    script = f"import sys; sys.path.insert(0, {str(tmp_path / 'first')!r}); from gta_edge.cli import main; main()"
    arguments = ["bench", str(tiny_bundle), "--backend", "onnxruntime", "--json"]
    process = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment(), capture_output=True, text=True, check=False
    )
    (entry,) = json.loads(process.stdout)["absent"]
    assert "0.1 is too old" in entry["reason"]


def test_a_cache_directory_is_the_parents_though_a_worker_runs_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given, meant in (("kept", tmp_path / "kept"), ("~/kept", tmp_path / "home" / "kept"), ("", None)):
        monkeypatch.setenv("GTA_EDGE_CACHE", given)
        for target in (Target("torch"), Target("torch", sys.executable)):
            assert target.environment(with_source=True)["GTA_EDGE_CACHE"] == ("" if meant is None else str(meant))


# --- interpreters that have something to say ------------------------------------------------------------------------

BANNERS = {
    "a line": "print('Welcome')",
    "no line": "sys.stdout.write('Welcome')",
    "not flushed": "os.write(1, b'half a line'); sys.stdout.write('and more')",
    "json": "print('{}'); print('[]'); print('null'); print('{\"ok\": \"no\"}'); print('7')",
    "bytes": "os.write(1, bytes(range(128, 256)))",
    "many lines": "print('x\\n' * 5000)",
    "on stderr": "print('Warning: something', file=sys.stderr)",
    "deep": "print('[' * 100000)",
}


@pytest.mark.parametrize("banner", BANNERS)
def test_a_site_that_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, banner: str) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(f"import os, sys\n{BANNERS[banner]}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    asked_nothing(Target("onnxruntime"), tmp_path)


def test_an_interpreter_that_prints(tmp_path: Path) -> None:
    python = interpreter(tmp_path / "python", 'echo Welcome; printf \'to this\'; echo so >&2\nexec "$PYTHON" "$@"')
    asked_nothing(Target("onnxruntime", str(python)), tmp_path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("yes", "gave no answer that this program understands|ended by SIG"),
        ("exec cat /dev/zero | head -c 1000000", "the process ended with status 0"),
    ],
)
def test_what_is_no_worker_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str) -> None:
    monkeypatch.setattr("gta_edge.evaluate.bench.process._SECONDS_TO_END", 0.2)
    python = interpreter(tmp_path / "python", body)
    with Worker(str(python), dict(os.environ), tmp_path) as worker, pytest.raises(BackendError, match=message):
        worker.ask(do="open")


@pytest.mark.parametrize("body", ["exec sleep 60", "read line; exit 1"])
def test_an_interpreter_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    monkeypatch.setattr("gta_edge.evaluate.bench.process._SECONDS_TO_IMPORT", 0.5)
    python = interpreter(tmp_path / "python", body)
    with pytest.raises(BackendError, match=r"did not end|cannot import gta_edge"):
        environment_for(Target("torch", str(python)), tmp_path)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (b"Traceback\n  line\nImportError: no module\nbye, says atexit\n", "ImportError: no module"),
        (b"one\n\ntwo\n\n", "two"),
        (b"", "it wrote no message"),
        (b"\xff\x1b[31m" + b"x" * 10**6, "x"),
    ],
)
def test_the_reason_is_the_error_and_not_what_comes_after(output: bytes, words: str) -> None:
    found = last_words(output)
    assert words in found
    assert found.isprintable()
    assert len(found) < 400


# --- the first load -------------------------------------------------------------------------------------------------


def test_the_first_load_of_a_bundle_is_in_no_figure(tiny_bundle: Path, tmp_path: Path) -> None:
    """It lowers the graph, which takes memory that no later load takes: what is measured is a process without that."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))
    target = Target("onnxruntime")
    variables = environment_for(target, tmp_path)
    request: dict[str, Any] = {"do": "open", "bundle": str(bundle), "backend": "onnxruntime"}
    request |= {"threads": 1, "exact": False, "cache_dtype": None}
    with Worker(target.python, variables, tmp_path, target.arguments) as worker:
        assert worker.ask(**request)["lowered"]
    shutil.rmtree(bundle / "engines")
    case = Case("it", Bundle.open(bundle), target, variables, tmp_path, threads=1)
    try:
        case.open()
        assert case.opened is not None
        assert not case.opened["lowered"]
    finally:
        case.release()


# --- the end ----------------------------------------------------------------------------------------------------------


def running_in(directory: Path) -> list[int]:
    """Processes that run in a directory, or below it."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            here = (path / "cwd").readlink()
        except OSError:
            continue
        if state != "Z" and str(here).startswith(f"{directory}{os.sep}"):
            found.append(int(path.name))
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize(
    ("number", "wrapped"),
    [(signal.SIGKILL, False), (signal.SIGTERM, False), (signal.SIGHUP, False), (signal.SIGKILL, True)],
)
def test_workers_end_with_their_parent(
    tiny_bundle: Path, tmp_path: Path, number: signal.Signals, wrapped: bool
) -> None:
    """While they compute; also where a shell, which outlives its parent, is between them."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    python = interpreter(tmp_path / "python", '"$PYTHON" "$@"; exit $?')
    backend = f"onnxruntime@{python}" if wrapped else "onnxruntime"
    arguments = ["bench", str(tiny_bundle), "--backend", backend, "--contexts", "8", "--rounds", "100000"]
    with subprocess.Popen(
        [*COMMAND, *arguments],
        env=environment(TMPDIR=str(scratch)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            assert wait_for(lambda: bool(list(scratch.rglob("prompt.npy"))))  # it measures
            assert running_in(scratch)
            process.send_signal(number)
            process.wait(60)
        finally:
            process.kill()
    assert wait_for(lambda: not running_in(scratch), 15)


# --- temporary files ------------------------------------------------------------------------------------------------


def test_no_place_for_temporary_files(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(OutputError, match=r"/missing: no directory can be made in it .*; set TMPDIR to "):
        bench([tiny_bundle], [Target("onnxruntime")], Settings(contexts=(8,)))


def test_too_little_place_is_said_before_anything_starts(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    monkeypatch.setattr("gta_edge.evaluate.bench.case.Worker", None)  # starting a process would fail
    with pytest.raises(OutputError, match=rf"{re.escape(str(tmp_path))}: has 0\.0 MB free, and .*; set TMPDIR to"):
        bench([tiny_bundle], [Target("onnxruntime")], Settings(contexts=(8,)))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_is_one_message_with_its_place(tiny_bundle: Path, tmp_path: Path) -> None:
    """A limit on files is what a test can have of a full disk: here of what workers write."""
    script = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)); "
    script += "import sys; sys.argv[0] = 'gta-edge'; from gta_edge.cli import main; main()"
    arguments = ["bench", str(tiny_bundle), "--backend", "onnxruntime,onnxruntime", "--contexts", "100"]
    process = subprocess.run(
        [sys.executable, "-B", "-c", script, *arguments, "--batch", "2", "--json"],
        env=environment(TMPDIR=str(tmp_path), GTA_EDGE_CACHE=str(tmp_path / "cache")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stdout) == (1, "")
    assert re.fullmatch(
        rf"error: {re.escape(str(tmp_path))}/\.gta-edge-\S+: temporary files cannot be written there "
        r"\(File too large\); free some space, or set TMPDIR to another directory\n",
        process.stderr,
    )
    assert [path.name for path in tmp_path.iterdir()] in ([], ["cache"])


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "batch", "fits"),
    [
        ("onnxruntime", 100_000, False),
        ("onnxruntime", 10, True),
        ("tensorrt", 100_000, False),
        ("tensorrt", 1000, True),
    ],
)
def test_rows_that_there_is_no_memory_for(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, backend: str, batch: int, fits: bool
) -> None:
    monkeypatch.setattr(bench_settings, "available_bytes", lambda: 500_000_000)
    monkeypatch.setattr("gta_edge.evaluate.bench.case.Worker", None)  # starting a process would fail
    with pytest.raises(
        TypeError if fits else CapacityError, match="not callable" if fits else r"takes .* and 0\.50 GB are free"
    ):
        bench([tiny_bundle], [Target(backend)], Settings(contexts=(100,), batch=batch))


def test_a_worker_that_ended_is_an_error_whatever_it_wrote(tmp_path: Path) -> None:
    python = interpreter(tmp_path / "python", "echo 'RuntimeError: the reason' >&2; echo bye >&2; exit 3")
    reason = r"status 3 \(RuntimeError: the reason\)"
    with Worker(str(python), dict(os.environ), tmp_path) as ended, pytest.raises(WorkerError, match=reason):
        ended.ask(do="open")
