"""The GPU campaign without a GPU: its rehearsal, what it says where there is none, and stages that fail."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gta_edge.plugins.attention import launches as attention
from gta_edge.plugins.matmul import launches as matmul
from scripts.board_tests import NEEDS_GPU
from scripts.gpu_stages import campaign, cases, exactness
from scripts.gpu_stages.catalogue import STAGES, Stage
from scripts.gpu_stages.process import Record
from scripts.gpu_stages.profile import figures
from scripts.gpu_stages.report import table
from tests.helpers.benchmarks import BENCHMARKS
from tests.helpers.kernel_simulator import available

ROOT = Path(__file__).parents[2]
WITHOUT_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
REHEARSED = [stage.name for stage in STAGES if stage.rehearsal is not None]


def call(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/gpu_campaign.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=WITHOUT_GPU, capture_output=True, text=True, check=False, **options)


def rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]


# --- the rehearsal ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not available(), reason="no g++ with sanitizers")
def test_the_rehearsal_passes(tmp_path: Path) -> None:
    """Every stage that has something to run without a GPU, as CI and whoever changes a kernel or a session see it."""
    done = call("--rehearse", "--output", str(tmp_path))
    assert done.returncode == 0, (tmp_path / "log.txt").read_text()[-6000:]
    found = rows(tmp_path)
    outcomes = {row["stage"]: row["outcome"] for row in found if "outcome" in row}
    assert outcomes == {stage.name: "passed" if stage.rehearsal else "left out" for stage in STAGES}
    told = {row["what"] for row in found if "what" in row}
    assert told == {
        *("campaign", "versions", "constants", "program", "launch", "exact", "load", "model", "token", "prompt"),
        *("kernel", "width", "speculation", "logits", "liveness", "shipped", "ran"),
    }
    exact = [row for row in found if row.get("what") == "exact"]
    gta, gqa, int8 = "attention gta-1b bf16/bf16", "attention gqa-1b bf16/bf16", "matmul int8/0 bf16"
    assert [row["group"] for row in exact] == [gta, gqa, int8, gta, "attention gqa-1b bf16/int4", int8]
    models = {row["model"] for row in found if row.get("what") == "model"}
    assert models == {row["model"] for row in found if row.get("what") == "logits"}
    assert models == {"gta-1b/bf16", "gta-1b/int4", "gqa-1b/bf16"}
    assert all(row["ok"] and 0 < row["error"] <= row["bound"] for row in exact)
    passed = {row["stage"]: row["tests"]["passed"] for row in found if "tests" in row}
    of_attention = {"tests-attention": 2, "tests-block-attention": 1, "tests-managed-attention": 1, "tests-cache": 3}
    assert passed == {**of_attention, "tests-matmul": 9, "tests-elementwise": 4}
    page = (tmp_path / "table.md").read_text()
    assert page.strip() in done.stdout
    assert page.startswith("A rehearsal without a GPU.")
    for block in page.split("\n\n"):
        lines = block.strip().splitlines()
        if lines[0].startswith("|"):
            assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("group", ["decode", "few"])
def test_kernels_that_compute_nothing_fail_their_stage(group: str) -> None:
    program = f"""
import sys
from tests.helpers.simulated_gpu import SimulatedCuda
SimulatedCuda.launch = lambda *arguments: None
from scripts.gpu_stages import exactness
sys.exit(exactness.main({group!r}))
"""
    environment = {**WITHOUT_GPU, "GTA_EDGE_REHEARSAL": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    told = [line[3:] for line in done.stdout.splitlines() if line.startswith("@@ ")]
    assert told
    for line in told:
        row = json.loads(line, parse_constant=pytest.fail)
        assert (row["ok"], row["error"]) in ((False, "inf"), (False, "nan"))


# --- where there is no GPU -------------------------------------------------------------------------------------------

no_gpu = pytest.mark.skipif(campaign.gpu_problem() is None, reason="there is a GPU")


@no_gpu
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = call("--output", str(tmp_path / "results"))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: .*GPU.*--rehearse\n", done.stderr)
    assert not list(tmp_path.iterdir())


@no_gpu
def test_make_gpu_takes_the_machine_as_it_is() -> None:
    """No virtual environment is made; make adds its own line, that the target failed."""
    make = ["make", "gpu", f"PYTHON={sys.executable}"]
    own = {name: value for name, value in WITHOUT_GPU.items() if not name.startswith(("MAKE", "MFLAGS"))}  # make test's
    done = subprocess.run(make, cwd=ROOT, env=own, capture_output=True, text=True, check=False)
    first, last = done.stderr.splitlines()
    assert first.startswith("error: ")
    assert re.search(r"gpu\] Error 1$", last)
    assert done.stdout == ""


def test_the_orchestrator_needs_nothing_but_python() -> None:
    """``-S`` and ``-I``: no site-packages, no paths of the user's."""
    script = ROOT / "scripts" / "gpu_campaign.py"
    bare = [sys.executable, "-I", "-S", str(script), "--list"]
    done = subprocess.run(bare, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == [stage.name for stage in STAGES]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--only", "all"], "no stage is called 'all'"),
        (["--budget", "long"], "--budget"),
        (["--budget", "nan"], "nan is not above 0"),
        (["--limits", "0"], "0 is not above 0"),
    ],
)
def test_wrong_usage(arguments: list[str], expected: str, tmp_path: Path) -> None:
    done = call(*arguments, "--output", str(tmp_path / "results"))
    assert done.returncode == 2
    assert expected in done.stderr
    assert not list(tmp_path.iterdir())


# --- the catalogue ---------------------------------------------------------------------------------------------------


def test_every_module_with_tests_for_a_gpu_is_in_a_stage() -> None:
    modules = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    needing = {str(path.relative_to(ROOT)) for path in modules if NEEDS_GPU.search(path.read_text())}
    named = {part for stage in STAGES for part in stage.command if part.startswith("tests/")}
    assert needing == named


@pytest.mark.parametrize("group", ["decode", "prefill", "few", "many"])
def test_the_calls_of_a_stage_are_calls_that_kernels_take(group: str) -> None:
    planned = 0
    for case in exactness.cases_of(group):
        if isinstance(case, cases.AttentionCase):
            programs = attention.programs_for(case.variant, "sm_90")
            sizes = {"batch": len(case.past), "tokens": case.tokens, "capacity": case.capacity}
            names = {each.kernel for each in attention.plan_attention(programs, 132, **sizes).launches}
            assert ("gta_prefill" in names) == (group == "prefill")
            assert max(case.past) < case.capacity
        else:
            kernels = matmul.programs_for(case.variant, "sm_90")
            plan = matmul.plan_matmul(kernels, 132, case.rows, case.in_features, case.output_sizes)
            assert (plan.program.source == "matmul_few.cu") == (group == "few")
        planned += 1
    assert planned > 20


def test_names_are_unique_and_limits_leave_time_for_the_first() -> None:
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    assert all(campaign.LEAST_S < stage.limit_s <= campaign.BUDGET_S / 4 for stage in STAGES)


def test_what_is_compared_with_peers_is_an_option_of_the_benchmarks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import int4
    import kernels

    parsers = {"benchmarks/int4.py": int4.parse, "benchmarks/kernels.py": kernels.parse}
    commands = [stage.command for stage in STAGES if stage.command[1] in parsers]
    assert {command[1] for command in commands} == set(parsers)
    for command in commands:
        options = parsers[command[1]]([part.replace("{output}", str(tmp_path)) for part in command[2:]])
        assert options.rounds == 3
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_the_simulators_choice_is_one_of_the_tests() -> None:
    """Stages that are not rehearsed would hide a renamed test; pytest's own status says that nothing was chosen."""
    rehearsed = {stage.name for stage in STAGES if stage.is_test and stage.rehearsal}
    assert rehearsed == {
        "tests-attention",
        "tests-block-attention",
        "tests-cache",
        "tests-elementwise",
        "tests-managed-attention",
        "tests-matmul",
    }


# --- stages that fail ------------------------------------------------------------------------------------------------


def stage(name: str, program: str, *, limit_s: int = 60, is_test: bool = False) -> Stage:
    command = ("{python}", "-c", program)
    return Stage(name, "", limit_s, command, rehearsal=command, is_test=is_test)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, dict[str, Any]]]:
    def run(*stages: Stage, budget: float = 60) -> dict[str, dict[str, Any]]:
        record = Record(tmp_path)
        campaign.Campaign(record, True, time.monotonic() + budget).run(stages)
        return {row["stage"]: row for row in record.rows() if "outcome" in row}

    return run


def test_what_one_breaks_ends_with_it(run: Callable[..., Any], tmp_path: Path) -> None:
    found = run(
        stage("aborts", "import os; print('an assert', flush=True); os.abort()"),
        stage("raises", "raise ValueError('of no use')"),
        stage("works", 'print(\'@@ {"what": "exact", "x": 1}\'); print(\'done\')'),
    )
    assert {name: row["outcome"] for name, row in found.items()} == {
        "aborts": "failed",
        "raises": "failed",
        "works": "passed",
    }
    assert (found["aborts"]["status"], found["aborts"]["last"]) == (-signal.SIGABRT, "an assert")
    assert found["raises"]["last"] == "ValueError: of no use"
    assert {"stage": "works", "what": "exact", "x": 1} in rows(tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert "an assert" in log
    assert "Traceback" in log


def test_a_stage_that_hangs_is_ended_with_its_children_and_its_figures_are_kept(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    child = "import time; time.sleep(1000)"
    program = (
        f"import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        'print(\'@@ {"what": "child", "pid": %d}\' % child.pid, flush=True); time.sleep(1000)'
    )
    found = run(stage("hangs", program, limit_s=3), stage("next", "pass"))
    assert (found["hangs"]["outcome"], found["next"]["outcome"]) == ("timed out", "passed")
    (row,) = [row for row in rows(tmp_path) if row.get("what") == "child"]
    deadline = time.monotonic() + 20
    while alive(row["pid"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(row["pid"])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_when_the_budget_is_over_the_rest_is_left_out(run: Callable[..., Any]) -> None:
    found = run(stage("first", "pass"), budget=campaign.LEAST_S - 1)
    assert (found["first"]["outcome"], found["first"]["last"]) == ("left out", "no time left")


@pytest.mark.parametrize(
    ("last", "outcome", "counts"),
    [
        ("2 passed, 1 deselected in 3.20s", "passed", {"passed": 2, "deselected": 1}),
        ("3 skipped in 0.10s", "failed", {"skipped": 3}),
        ("no tests ran in 0.01s", "failed", {}),
    ],
)
def test_tests_that_were_skipped_prove_nothing(run: Callable[..., Any], last: str, outcome: str, counts: Any) -> None:
    found = run(stage("tests", f"print({last!r})", is_test=True))["tests"]
    assert (found["outcome"], found["tests"]) == (outcome, counts)


def test_failed_tests_are_named(run: Callable[..., Any]) -> None:
    lines = ("FAILED tests/a.py::test_b[1] - assert 1 == 2", "1 failed, 2 passed in 1.00s")
    program = f"print({lines[0]!r}); print({lines[1]!r}); raise SystemExit(1)"
    found = run(stage("tests", program, is_test=True))["tests"]
    assert found["outcome"] == "failed"
    assert found["tests"] == {"failed": 1, "passed": 2, "failures": ["tests/a.py::test_b[1]"]}


def test_a_program_that_is_not_here_leaves_its_stage_out(run: Callable[..., Any]) -> None:
    missing = Stage("tool", "", 60, (), rehearsal=("{program:no-such-tool}",))
    assert run(missing)["tool"]["outcome"] == "left out"


def test_a_module_that_is_not_here_leaves_its_stage_out(tmp_path: Path) -> None:
    found = campaign.Campaign(Record(tmp_path), False, time.monotonic() + 60)
    needs = ("json", "no_such_module", "no_such.module", "distribution:pytest", "distribution:no-such-thing")
    found.run([Stage("lacks", "", 60, ("{python}", "-c", "pass"), needs)])
    (row,) = rows(tmp_path)
    assert row["last"] == "no_such_module, no_such.module, distribution:no-such-thing not installed"
    assert (found.ran, found.failed) == (0, 0)


def test_a_module_that_is_too_old_leaves_its_stage_out(tmp_path: Path) -> None:
    """By the floors of ``pyproject.toml``: a release of onnx-ir before 1.1, as an image for training had it."""
    site = tmp_path / "site"
    (site / "onnx_ir").mkdir(parents=True)
    (site / "onnx_ir" / "__init__.py").write_text("raise SystemExit('this is not to be imported')\n")
    (site / "onnx_ir-1.0.0.dist-info").mkdir()
    (site / "onnx_ir-1.0.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: onnx-ir\nVersion: 1.0.0\n")
    program = f"""
import sys, time
sys.path.insert(0, {str(site)!r})
from pathlib import Path
from scripts.gpu_stages import campaign
from scripts.gpu_stages.catalogue import Stage
from scripts.gpu_stages.process import Record
found = campaign.Campaign(Record(Path({str(tmp_path)!r})), False, time.monotonic() + 60)
found.run([Stage(name, "", 60, ("{{python}}", "-c", "pass"), needs) for name, needs in
           (("old", ("numpy", "onnx_ir")), ("new", ("numpy",)))])
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=WITHOUT_GPU, check=True)
    assert [(row["stage"], row["outcome"], row["last"]) for row in rows(tmp_path)] == [
        ("old", "left out", "onnx-ir 1.0.0 is too old; expected 1.1 or later"),
        ("new", "passed", ""),
    ]


def test_ctrl_c_ends_the_stages_and_the_table_is_written(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/gpu_campaign.py", "--rehearse", "--only", "shipped", "--output", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env=WITHOUT_GPU, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "shipped …\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert (tmp_path / "table.md").exists()


# --- the table -------------------------------------------------------------------------------------------------------


def test_what_is_done_again_counts() -> None:
    first, second = (
        {"stage": "exact-few", "outcome": outcome, "seconds": 1.0, "last": last, "tests": {}}
        for outcome, last in (("failed", "RuntimeError: assert"), ("passed", ""))
    )
    assert "| exact-few | failed | 1 | RuntimeError: assert |" in table([first])
    assert "| exact-few | passed | 1 |  |" in table([first, second])
    assert "RuntimeError" not in table([first, second])


def test_a_wrong_result_is_in_the_table() -> None:
    row = {"stage": "exact-few", "what": "exact", "group": "matmul int4", "case": "int4, 3 x 8 x 9", "bound": 0.01}
    page = table(
        [
            row | {"ok": False, "error": 0.5, "why": "x was | written to"},
            row | {"case": "b", "ok": True, "error": 0.001},
        ]
    )
    assert "| matmul int4 | 2 | 0.5 | 0.01 | 1 |" in page
    assert "wrong: int4, 3 x 8 x 9: x was | written to" in page


def test_the_tables_of_benchmarks_are_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "matmuls.md").write_text("| matmul | us |\n")
    (tmp_path / "table.md").write_text("an older one")
    page = table([], tmp_path)
    assert "| matmul | us |" in page
    assert "older" not in page


def test_the_kernels_of_a_token_and_of_prompts_are_told_apart() -> None:
    def kernel(of: str, context: int, us: float) -> dict[str, Any]:
        return {"what": "kernel", "model": "m", "of": of, "context": context, "name": "gta", "launches": 2, "us": us}

    def total(of: str, context: int, **whole: float | None) -> dict[str, Any]:
        return {"what": of, "model": "m", "context": context, "launches": 2, "busy_us": 5.0, **whole}

    page = table(
        [
            *(total("token", 8, gpu_ms=0.5, wall_ms=None), kernel("token", 8, 1.0)),
            *(total("prompt", 8, gpu_ms=None, wall_ms=2.0), kernel("prompt", 8, 3.0)),
            *(total("prompt", 9, gpu_ms=None, wall_ms=None), kernel("prompt", 9, 4.0)),
        ]
    )
    found = [line for line in page.splitlines() if line.startswith(("A ", "| gta"))]
    assert found == [
        *("A token of m at context 8: 2 launches, 5 us busy of 500 us.", "| gta | 2 |  | 1 |"),
        *("A prompt of m at context 8: 2 launches, 5 us busy of 2000 us.", "| gta | 2 |  | 3 |"),
        *("A prompt of m at context 9: 2 launches, 5 us busy of  us.", "| gta | 2 |  | 4 |"),
    ]


def test_a_line_that_was_not_finished_is_left_out(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.add(stage="a", outcome="passed")
    with record.results.open("a") as file:
        file.write('{"stage": "b", "outc')
    assert record.rows() == [{"stage": "a", "outcome": "passed"}]


HEADS = ("ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size", "Grid Size")
HEADS += ("Device", "CC", "Section Name", "Metric Name", "Metric Unit", "Metric Value")


def ncu_line(number: int, kernel: str, *metric: str) -> str:
    where = (str(number), "7", "python", "localhost", kernel, "1", "7", "(128, 1, 1)", "(1, 2, 1)", "0", "9.0", "Some")
    return ",".join(f'"{value}"' for value in (*where, *metric))


def test_figures_of_nsight_compute() -> None:
    lines = ["==PROF== Connected to process 7", "ran attention", ",".join(f'"{head}"' for head in HEADS)]
    lines.append(ncu_line(0, "gta_append", "Duration", "us", "3.10"))
    lines.append(ncu_line(0, "gta_append", "SM Frequency", "Ghz", "1.5"))
    lines.append(ncu_line(1, "gta_prefill", "Registers Per Thread", "register/thread", "242"))
    assert figures("\n".join(lines)) == {
        "0": ("gta_append", {"Duration [us]": "3.10"}),
        "1": ("gta_prefill", {"Registers Per Thread [register/thread]": "242"}),
    }
    assert figures("==ERROR== ERR_NVGPUCTRPERM - no permission\n") == {}
