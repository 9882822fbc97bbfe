"""The benchmark: its settings, its processes, and whole runs on a tiny model."""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gta_edge.accuracy.tolerance import COMPUTE_BOUNDS
from gta_edge.errors import BackendError, InputError
from gta_edge.evaluate.bench import process, report, run, worker
from gta_edge.evaluate.bench.case import Case
from gta_edge.evaluate.bench.process import Worker, WorkerError, environment_for
from gta_edge.evaluate.bench.run import Settings, bench
from gta_edge.evaluate.bench.targets import Target, parse_targets
from gta_edge.export.pipeline import export_model
from gta_edge.formats import bundle as bundles
from gta_edge.formats.bundle import Bundle
from gta_edge.libraries.install import install_command
from gta_edge.model.kv_cache import bytes_per_token, cache_bytes
from gta_edge.runtime.session import Session
from tests.helpers.bench_bundles import damaged
from tests.helpers.bench_interpreters import dying, interpreter, wrong
from tests.helpers.tiny import TINY

QUICK = {"new_tokens": 3, "rounds": 2}


# --- settings and targets ------------------------------------------------------------------------------------------


def test_contexts_by_default(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert Settings().contexts_for("it", bundle) == (TINY.max_position_embeddings - 32,)
    assert Settings(prompt=(1, 2, 3)).contexts_for("it", bundle) == (3,)
    assert Settings(contexts=(9, 4, 9)).contexts_for("it", bundle) == (4, 9)


def test_new_tokens_end_with_the_positions(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    last = TINY.max_position_embeddings - 1
    assert [Settings().new_tokens_at(context, bundle) for context in (16, last - 4, last)] == [32, 5, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "--batch is 0"),
        ({"new_tokens": 0}, "--new-tokens is 0"),
        ({"rounds": 0}, "--rounds is 0"),
        ({"rounds": 10**9}, "--rounds is 1000000000; expected 1 to"),
        ({"answers": 10**5}, "--n is 100000; expected 1 to 256"),
        ({"threads": 0}, "0 threads were asked for"),
        ({"threads": 100_000}, "100000 threads were asked for"),
        ({"contexts": (16, 0)}, "--contexts has 0"),
        ({"contexts": (TINY.max_position_embeddings,)}, "leaves no room for a new token"),
        ({"contexts": (4,), "prompt": (1, 2)}, "the prompt has 2 tokens"),
        ({"prompt": ()}, "the prompt is empty"),
        ({"prompt": (1, TINY.vocab_size)}, "outside the vocabulary"),
    ],
)
def test_settings_that_make_no_sense(tiny_bundle: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench([tiny_bundle], [Target("onnxruntime")], Settings(**options))


def test_targets() -> None:
    found = parse_targets("torch, onnxruntime@/usr/bin/python3,torch")
    assert found == [Target("torch"), Target("onnxruntime", "/usr/bin/python3")]
    assert [target.label for target in found] == ["torch", "onnxruntime@/usr/bin/python3"]
    assert {"torch", "onnxruntime", "tensorrt"} <= {target.backend for target in parse_targets(None)}
    for text in ("", "nonsense", "torch,,onnxruntime", "torch@", "auto"):
        with pytest.raises(BackendError):
            parse_targets(text)


def test_the_environment_of_another_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
        monkeypatch.setenv(name, "/somewhere")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/libraries")
    other = Target("torch", sys.executable).environment(with_source=False)
    assert not {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"} & other.keys()
    assert other["LD_LIBRARY_PATH"] == "/libraries"
    assert Target("torch").environment(with_source=True)["PYTHONPATH"] == "/somewhere"


def test_a_link_to_an_interpreter_stays_one(tmp_path: Path) -> None:
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    assert Target("torch", str(link)).python == str(link)


# --- the process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("kill -9 $$", "SIGKILL, probably for lack of memory"),
        ("kill -SEGV $$", "SIGSEGV"),
        ("echo one >&2; echo 'the reason' >&2; exit 3", r"ended with status 3 \(the reason\)"),
        ("exit 0", "it wrote no message"),
        ("echo hello; exec sleep 0.1", "ended with status 0"),
    ],
)
def test_a_worker_that_ends(tmp_path: Path, body: str, reason: str) -> None:
    python = interpreter(tmp_path / "python", body)
    with Worker(str(python), dict(os.environ), tmp_path) as ended, pytest.raises(WorkerError, match=reason):
        ended.ask(do="open")


@pytest.mark.parametrize("patient", [True, False])
def test_nothing_outlives_a_worker(tmp_path: Path, patient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_SECONDS_TO_END", 0.2)
    python = interpreter(tmp_path / "python", f"sleep 60 & echo $! > {tmp_path / 'pid'}; echo '{{\"ok\": true}}'; wait")
    worker = Worker(str(python), dict(os.environ), tmp_path)
    worker.ask(do="anything")
    child = int((tmp_path / "pid").read_text())
    worker.close(patient=patient)
    worker.close(patient=False)  # again does no harm
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(child)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_error_of_a_backend_leaves_the_worker_alive(tmp_path: Path) -> None:
    target = Target("onnxruntime")
    with Worker(target.python, environment_for(target, tmp_path), tmp_path, target.arguments) as worker:
        for _ in range(2):
            with pytest.raises(BackendError, match="nothing is open"):
                worker.ask(do="measure", prompt="none.npy", new_tokens=1, warm_up=True)
        with pytest.raises(BackendError, match="does not exist"):
            worker.ask(do="open", bundle=str(tmp_path / "missing"), backend="onnxruntime", threads=None, exact=False)


@pytest.mark.parametrize("name", ["{missing}/python", "no-such-command"])
def test_an_interpreter_that_does_not_exist(tmp_path: Path, name: str) -> None:
    with pytest.raises(BackendError, match="is no program that can be run"):
        environment_for(Target("torch", name.format(missing=tmp_path / "missing")), tmp_path)


def test_an_interpreter_without_the_package(tmp_path: Path) -> None:
    python = interpreter(tmp_path / "python", "echo 'ModuleNotFoundError: No module named numpy' >&2; exit 1")
    remedy = re.escape(install_command("export", pip=f"{python} -m pip"))
    with pytest.raises(BackendError, match=rf"No module named numpy.*; .*{remedy}"):
        environment_for(Target("torch", str(python)), tmp_path)


# --- whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of another model of the same sizes: one matrix has its rows in another order."""
    return damaged(tiny_checkpoint, tmp_path_factory.mktemp("other"), "layers.0.mlp.down_proj", lambda rows: rows[::-1])


@pytest.fixture(scope="module")
def whole(tiny_bundle: Path, other_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A report with all there can be: backends that agree, one that is wrong, one that dies, some that are absent."""
    directory = tmp_path_factory.mktemp("interpreters")
    pythons = {
        "wrong": wrong(directory / "wrong", tiny_bundle.resolve(), other_bundle.resolve()),
        "dying": dying(directory / "dying", 5),  # open, check and two rounds at 9, check at 20
        "same": Path(sys.executable),
        "absent": directory / "absent",
    }
    targets = [Target("onnxruntime"), *(Target("onnxruntime", str(python)) for python in pythons.values())]
    found = bench([tiny_bundle], [*targets, Target("tensorrt")], Settings(contexts=(20, 9), batch=2, **QUICK))
    found["labels"] = {name: f"onnxruntime@{python}" for name, python in pythons.items()} | {"own": "onnxruntime"}
    return found


def rows(whole: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [row for row in whole["results"] if row["backend"] == whole["labels"][name]]


def missing(document: dict[str, Any], prefix: str = "") -> list[str]:
    """Names of the figures that are null."""
    found = [f"{prefix}{key}" for key, value in document.items() if value is None]
    inner = (missing(value, f"{key}.") for key, value in document.items() if isinstance(value, dict) and key != "notes")
    return [*found, *itertools.chain(*inner)]


def test_a_figure_that_is_missing_has_its_reason(whole: dict[str, Any]) -> None:
    assert json.loads(json.dumps(whole)) == whole
    for row in [*whole["results"], *whole["backends"]]:
        for name in missing(row):
            assert len(row["notes"][name]) > 5, name


def test_figures(whole: dict[str, Any], tiny_bundle: Path) -> None:
    for row in rows(whole, "own"):
        assert (row["bundle"], row["precision"], row["batch"], row["new_tokens"]) == (str(tiny_bundle), "bf16", 2, 3)
        assert (row["rounds"], row["steps"]) == (2, 6)
        assert row["tpot_ms"]["p50"] <= row["tpot_ms"]["p90"] <= row["tpot_ms"]["p99"]
        assert row["ttft_ms"] > 0
        assert row["others_busy_cores"] >= 0
        assert row["peak_memory_bytes"] == row["peak_host_bytes"] > 2**24
        capacity = TINY.max_position_embeddings  # less than a step of the cache's growth
        assert row["cache_bytes"] == cache_bytes(TINY, "fp32", capacity, batch=2)
        assert row["cache_bytes_per_step"] == cache_bytes(TINY, "fp32", row["context"], batch=2)
        assert row["times_floor"] * row["bandwidth_fraction"] == pytest.approx(1)
        assert row["floor_ms"] == pytest.approx(row["bandwidth_fraction"] * row["tpot_ms"]["p50"])
        assert "each read once" in row["notes"]["bandwidth_fraction"]


def test_peaks_are_of_a_process_each(whole: dict[str, Any]) -> None:
    """This process holds torch and more; a worker's peak is its own, and does not shrink with the context."""
    for name in ("own", "same"):
        peaks = [row["peak_host_bytes"] for row in rows(whole, name)]
        assert peaks == sorted(peaks)
        assert peaks[-1] < 300e6


def test_backends_that_agree_are_ranked_and_wrong_ones_are_not(whole: dict[str, Any]) -> None:
    for row in (*rows(whole, "own"), *rows(whole, "same")):
        assert row["agrees"] is True
        assert row["max_rel_error"] < row["bound"] == COMPUTE_BOUNDS["fp32"]
        assert row["same_tokens"] == row["compared_tokens"] == 2 * 4
    for row in rows(whole, "wrong"):
        assert row["agrees"] is False
        assert row["tpot_ms"]["p50"] > 0
        assert row["max_rel_error"] > 100 * row["bound"]
        assert "not those of onnxruntime" in row["notes"]["rank"]
    for context in (9, 20):
        here = [row for row in whole["results"] if row["context"] == context]
        ranks = [row["rank"] for row in here]
        good = [row for row in here if row["rank"]]
        assert ranks == [*range(1, len(good) + 1), *[None] * (len(here) - len(good))]
        assert [row["tpot_ms"]["p50"] for row in good] == sorted(row["tpot_ms"]["p50"] for row in good)
        assert good[0]["times_first"]["tpot"] == {"median": 1, "low": 1, "high": 1}
        for row in here:
            if row["tpot_ms"]:
                pairs = zip(row["per_round"]["tpot_ms"], good[0]["per_round"]["tpot_ms"], strict=True)
                found = row["times_first"]["tpot"]
                assert [found["low"], found["high"]] == pytest.approx(sorted(a / b for a, b in pairs))
    assert [row["context"] for row in whole["results"]] == sorted(row["context"] for row in whole["results"])


def test_a_worker_that_dies_keeps_what_it_measured(whole: dict[str, Any]) -> None:
    before, after = rows(whole, "dying")
    assert before["context"] == 9
    assert (before["rounds"], before["agrees"]) == (2, True)
    assert "it failed later: the process ended" in before["notes"]["rounds"]
    assert (after["tpot_ms"], after["rank"], after["peak_memory_bytes"]) == (None, None, None)
    assert "the process ended" in after["notes"]["tpot_ms"]


def test_who_is_absent_is_listed(whole: dict[str, Any], tiny_bundle: Path) -> None:
    found = {entry["backend"]: entry for entry in whole["absent"]}
    assert found.keys() == {whole["labels"]["absent"], "tensorrt"}
    assert "is no program" in found[whole["labels"]["absent"]]["reason"]
    for entry in found.values():
        assert entry["bundle"] == str(tiny_bundle)
        assert entry["remedy"]
    assert "gta-edge build" in found["tensorrt"]["remedy"]


def test_what_was_measured_on(whole: dict[str, Any]) -> None:
    found = whole["machine"]
    assert found["usable_cores"] >= 1
    assert found["bandwidth_bytes_per_s"]["cpu"][0] > 1e8
    assert {entry["backend"] for entry in whole["backends"]} == {row["backend"] for row in whole["results"]}
    for entry in whole["backends"]:
        assert entry["versions"]["onnxruntime"]
        assert entry["cache_bytes_per_token"] == bytes_per_token(TINY)
        assert (entry["cuda_graph"], entry["notes"]["cuda_graph"]) == (None, "no CUDA graph on this backend")


@pytest.mark.parametrize(
    ("rounds", "failure", "said", "reason"),
    [
        ([{"cuda_graph": True}, {"cuda_graph": False}], None, False, None),  # a session may go on without
        ([{"cuda_graph": True}, {"cuda_graph": None}], None, True, None),
        ([{"cuda_graph": None}], "it was ended", None, "no CUDA graph on this backend"),
        ([], "it was ended", None, "it was ended"),
        ([], None, None, "not measured"),
        ([{"ttft_ms": 1.0}], None, None, "not measured"),  # of a version that does not know of it
    ],
)
def test_whether_tokens_are_replays_or_why_it_is_not_known(
    tiny_bundle: Path, rounds: list[dict[str, Any]], failure: str | None, said: bool | None, reason: str | None
) -> None:
    case = Case("it", Bundle.open(tiny_bundle), Target("torch"), {}, tiny_bundle, failure=failure)
    case.rounds = {8: rounds} if rounds else {}
    notes: dict[str, str] = {}
    assert report._replays(case, notes) is said
    assert notes == ({} if reason is None else {"cuda_graph": reason})


def test_a_lone_backend_that_rounds_is_compared_with_exact_arithmetic(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export_model(tiny_checkpoint, tmp_path / "int8", precision="int8", verify=False)
    found = bench([tmp_path / "int8"], [Target("onnxruntime")], Settings(contexts=(8,), new_tokens=2, rounds=1))
    (row,) = found["results"]
    assert row["reference"] == "onnxruntime, exact"
    assert row["agrees"] is True
    assert 0 < row["max_rel_error"] < row["bound"]
    assert (row["spread"]["tpot"], row["notes"]["spread.tpot"]) == (None, "one round has no spread")
    # the first load laid weights out anew, in a process whose memory is not what is reported
    (entry,) = found["backends"]
    assert entry["rounds_activations"] is True


def test_without_room_for_two_processes_there_is_one(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most, started = 0, list[int]()
    ask, start = Worker.ask, Worker.__init__

    def counted(worker: Worker, **request: Any) -> dict[str, Any]:
        nonlocal most
        if request["do"] != "bandwidth":  # which loads nothing
            most = max(most, sum(is_alive(pid) for pid in started))
        return ask(worker, **request)

    def remembered(worker: Worker, *args: Any) -> None:
        start(worker, *args)
        started.append(worker._process.pid)

    monkeypatch.setattr(Worker, "ask", counted)
    monkeypatch.setattr(Worker, "__init__", remembered)
    monkeypatch.setattr(run, "available_bytes", lambda: 0)  # a machine that is full
    targets = [Target("onnxruntime"), Target("onnxruntime", sys.executable)]
    found = bench([tiny_bundle], targets, Settings(contexts=(8,), new_tokens=2, rounds=1, prompt=tuple(range(8))))
    assert [row["agrees"] for row in found["results"]] == [True, True]
    assert most == 1


@pytest.mark.parametrize(
    ("medians", "warned"),
    [
        ([10.0, 13.0, 10.0], True),
        ([10.0, 12.5] * 8, False),  # as far apart, but so many that their median holds
        ([10.0, 10.1, 10.0], False),
    ],
)
def test_rounds_far_apart_are_warned_of_until_they_are_many(
    tiny_bundle: Path, medians: list[float], warned: bool
) -> None:
    case = Case("it", Bundle.open(tiny_bundle), Target("torch"), {}, tiny_bundle)
    memory = {"peak_host_bytes": 3, "gpu_bytes": None, "shares_memory": False, "cache_bytes": 1}
    one = {"ttft_ms": 100.0, "others_busy_s": None, **memory}
    case.rounds = {8: [one | {"steps_ms": [median]} for median in medians]}
    static = {"device": "cpu", "compute": "fp32", "cache_dtype": "fp32", "weight_bytes_per_step": 1, "notes": {}}
    row = report._row(case, static | {"bandwidth_bytes_per_s": 1e9}, 8, 1, 1, {"cpu_cache_bytes": None})
    assert ("not settled" in row["notes"].get("spread.tpot", "")) is warned
    assert "spread.ttft" not in row["notes"]


def test_a_gpu_that_shares_memory_has_one_figure() -> None:
    notes: dict[str, str] = {}
    one = {"peak_host_bytes": 3, "gpu_bytes": 7, "shares_memory": True, "cache_bytes": 1}
    found = report._memory([one, one | {"gpu_bytes": 8}], "gpu", notes)
    assert (found["peak_memory_bytes"], found["peak_host_bytes"], found["peak_gpu_bytes"]) == (8, 3, None)
    assert "share memory" in notes["peak_gpu_bytes"]
    found = report._memory([one | {"shares_memory": False}], "gpu", notes)
    assert (found["peak_memory_bytes"], found["peak_gpu_bytes"]) == (10, 7)


def test_what_other_programs_take_is_seen() -> None:
    script = "import time\nend = time.monotonic() + 30\nwhile time.monotonic() < end: pass"
    other = subprocess.Popen([sys.executable, "-c", script])
    try:
        taken = worker._Others()
        time.sleep(1)
        found = taken.busy()
    finally:
        other.kill()
        other.wait()
    assert found is not None
    busy, wall = found
    assert 1 <= wall < 30
    assert busy > 0.3  # on a busy machine a program gets less than a core


def test_what_others_took_is_summed_before_it_is_divided() -> None:
    rounds = [{"others_busy_s": taken} for taken in ((0.02, 0.1), (-0.01, 0.1), None, (0.05, 0.2))]
    assert report._mean_busy(rounds) == pytest.approx(0.06 / 0.4)
    assert report._mean_busy(rounds[1:3]) == 0  # less than nothing is the ticks' error
    assert report._mean_busy(rounds[2:3]) is None


@pytest.mark.parametrize("warm_up", [True, False])
def test_answers_that_are_not_asked_for(tiny_bundle: Path, warm_up: bool) -> None:
    settings = Settings(contexts=(8,), new_tokens=2, rounds=1, compare=False, warm_up=warm_up)
    (row,) = bench([tiny_bundle], [Target("onnxruntime")], settings)["results"]
    assert row["tpot_ms"]["p50"] > 0
    assert (row["agrees"], row["rank"]) == (None, 1)
    assert row["notes"]["agrees"] == "answers were not asked for"


@pytest.mark.parametrize("warm_up", [True, False])
def test_a_long_prompt_is_warmed_up_in_full_only_if_that_is_asked_for(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_up: bool
) -> None:
    appended = []
    forward = Session.forward

    def note(self: Session, ids: Any, **options: Any) -> Any:
        appended.append(ids.shape[1])
        return forward(self, ids, **options)

    monkeypatch.setattr(Session, "forward", note)
    np.save(tmp_path / "prompt.npy", np.arange(30, dtype=np.int64)[None] % TINY.vocab_size)
    measurer = worker.Measurer()
    options = {"bundle": str(tiny_bundle), "backend": "torch", "threads": None, "exact": False, "cache_dtype": None}
    measurer.answer({"do": "open", **options})
    measurer._session._cache.chunk_size = 4
    for _ in range(2):
        measurer.answer({"do": "measure", "prompt": str(tmp_path / "prompt.npy"), "new_tokens": 3, "warm_up": warm_up})
    # each round's own prompt, and what comes before the first one's
    assert [n for n in appended if n > 4] == ([30, 30, 30] if warm_up else [8, 30, 30])


def test_a_damaged_bundle_is_an_error_before_anything_runs(copied_bundle: Path) -> None:
    (copied_bundle / bundles.MODEL).unlink()
    with pytest.raises(bundles.BundleError, match="is missing"):
        bench([copied_bundle], [Target("onnxruntime")], Settings())
