"""What tests of several modules share: one tiny model, exported once per run, and the command run in this process."""

import atexit
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from importlib.util import find_spec
from pathlib import Path

# Many tests import ONNX Runtime themselves, which must not write into a home directory nor ask a name server.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import pytest

from gta_edge.cli import main
from tests.helpers import real_model
from tests.helpers.commands import Result
from tests.helpers.tiny import TINY
from tests.helpers.torch_exports import read_library_once

# The same examples in every run, however slow the machine: what fails, fails again. ``make fuzz`` looks further.
if find_spec("hypothesis"):  # a board need not have it
    from hypothesis import settings

    settings.register_profile("tests", deadline=None, derandomize=True, database=None)
    settings.load_profile("tests")

# A shell starts background jobs with Ctrl-C ignored, and the commands that the tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A cache of the run's own, which processes that it starts share; some of them as another user.
if "GTA_EDGE_CACHE" not in os.environ:
    os.environ["GTA_EDGE_CACHE"] = tempfile.mkdtemp(prefix="gta-edge-tests-")
    Path(os.environ["GTA_EDGE_CACHE"]).chmod(0o1777)
    atexit.register(shutil.rmtree, os.environ["GTA_EDGE_CACHE"], ignore_errors=True)


def pytest_configure(config: pytest.Config) -> None:
    """Give each worker of xdist a core of its own: threads of one would only wait for those of the other."""
    worker, cores = os.environ.get("PYTEST_XDIST_WORKER"), sorted(os.sched_getaffinity(0))
    if worker is not None and int(os.environ["PYTEST_XDIST_WORKER_COUNT"]) >= len(cores):
        os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test that is to be skipped with all its parameters, keep one, which says why.

    Not with ``GTA_EDGE_REQUIRE_GPU=1``, where each of them is to have failed.
    """
    if os.environ.get("GTA_EDGE_REQUIRE_GPU") == "1":
        return
    told: set[tuple[Path, str, str]] = set()
    kept, left_out = [], []
    for item in items:
        why = next(
            (mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif") if mark.args[:1] == (True,)), None
        )
        test = item.path, getattr(item, "originalname", item.name), why or ""
        (left_out if why is not None and test in told else kept).append(item)
        if why is not None:
            told.add(test)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before fixtures: some export."""
    if "onnxscript._internal.values" in sys.modules:
        read_library_once()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With ``GTA_EDGE_REQUIRE_GPU=1`` a test that is marked ``gpu`` and skipped has failed: skips prove nothing."""
    report = yield
    required = os.environ.get("GTA_EDGE_REQUIRE_GPU") == "1" and item.get_closest_marker("gpu")
    if required and report.skipped and not hasattr(report, "wasxfail"):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: GTA_EDGE_REQUIRE_GPU=1 and this test was not run ({why})"
    return report


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in bf16 and a byte-level tokenizer; not to be changed."""
    from gta_edge.formats.random_checkpoint import initialise

    directory = tmp_path_factory.mktemp("tiny") / "checkpoint"
    initialise(TINY, directory)
    return directory


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path) -> Path:
    """The bundle of ``tiny_checkpoint``; not to be changed."""
    from gta_edge.export.pipeline import export_model  # and with it torch, which not every test needs

    directory = tiny_checkpoint.with_name("bundle")
    export_model(tiny_checkpoint, directory)
    return directory


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in bf16, for tests marked ``real_model``; not to be changed."""
    return real_model.checkpoint()


@pytest.fixture
def copied_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of ``tiny_checkpoint`` to do anything to."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


@pytest.fixture
def copied_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of ``tiny_bundle``, times of files included, to do anything to; without what sessions kept in it."""
    return shutil.copytree(tiny_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """pytest's, of our own loggers only: torch traces its first export in a process, whichever test that is in."""
    ours = logging.Filter("gta_edge")
    caplog.handler.addFilter(ours)
    yield caplog
    caplog.handler.removeFilter(ours)


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """``command("inspect", path)`` runs ``gta-edge inspect PATH`` in this process, which is fast.

    Output is captured where the operating system takes it, so that of libraries in C is seen too.
    """

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["gta-edge", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the command leaves it as a process that ends has it
        captured = capfd.readouterr()
        return Result(exit_.value.code or 0, captured.out, captured.err)

    return run
