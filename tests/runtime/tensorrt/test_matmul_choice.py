"""Who multiplies by quantised matrices: the rule, and what is timed."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.cuda import session as runtime_cuda
from gta_edge.plugins.matmul.definition import OPS
from gta_edge.plugins.matmul.packing import BLOCK_SIZES
from gta_edge.runtime.tensorrt import matmul_timing
from gta_edge.runtime.tensorrt.builder import Target, build_plan
from gta_edge.runtime.tensorrt.engine import IMPLEMENTATIONS, EngineSpec
from gta_edge.runtime.tensorrt.matmul_choice import (
    PHASES,
    SLOWER_PREFILL,
    Choice,
    MatMulCall,
    Timing,
    choose,
)
from gta_edge.runtime.tensorrt.matmul_timing import copies_of, matmul_model, time_matmuls
from tests.helpers.packed_matmuls import attach_functions, run
from tests.helpers.tensorrt_simulator import Driver
from tests.helpers.tensorrt_simulator import _module as simulated_module

SETTINGS = settings(max_examples=200, deadline=None, derandomize=True)
CALL, HEAD = MatMulCall(4, 32, 128, (128, 64), False), MatMulCall(4, 32, 128, (61,), False, head=True)


def timings(decode: Mapping[str, float], prefill: Mapping[str, float], count: int = 1) -> list[Timing]:
    return [Timing(CALL, count, phase, each) for phase, each in (("decode", decode), ("prefill", prefill))]


# --- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decode", "prefill", "chosen"),
    [
        ({"plugin": 9, "native": 10}, {"plugin": 100, "native": 100}, "plugin"),
        ({"plugin": 10, "native": 9}, {"plugin": 100, "native": 100}, "native"),
        ({"plugin": 10, "native": 10}, {"plugin": 100, "native": 100}, "native"),  # without ours if it gains nothing
        ({"plugin": 9, "native": 10}, {"plugin": 200, "native": 100}, "plugin"),  # twice, not more
        ({"plugin": 9, "native": 10}, {"plugin": 201, "native": 100}, "native"),
        ({"plugin": 1, "native": 10}, {"plugin": 201, "native": 100}, "native"),
        ({"plugin": 10, "native": 9}, {"plugin": 100, "native": 200}, "native"),
        ({"plugin": 10, "native": 9}, {"plugin": 100, "native": 201}, "plugin"),
    ],
)
def test_tokens_decide_unless_prompts_pay_for_them(
    decode: dict[str, float], prefill: dict[str, float], chosen: str
) -> None:
    assert choose(timings(decode, prefill)) == Choice(chosen, {"decode": decode, "prefill": prefill})


def test_products_weigh_as_often_as_a_step_has_them() -> None:
    often = timings({"plugin": 2, "native": 1}, {"plugin": 1, "native": 1}, count=10)
    once = timings({"plugin": 1, "native": 9}, {"plugin": 1, "native": 1})
    made = choose(often + once)
    assert made.matmul == "native"
    assert made.microseconds == {"decode": {"plugin": 21, "native": 19}, "prefill": {"plugin": 11, "native": 11}}
    assert choose(often[:2] + [Timing(HEAD, 2, t.phase, t.microseconds) for t in once]).matmul == "plugin"


def test_where_nothing_is_quantised_there_is_nothing_to_choose() -> None:
    assert choose([]) == Choice("native", {})


TIMES = st.floats(0.1, 1e5)


@given(st.lists(st.tuples(st.integers(1, 60), TIMES, TIMES, TIMES, TIMES), min_size=1, max_size=6))
@SETTINGS
def test_the_chosen_one_is_never_slower_at_both(measured: list[tuple[int, float, float, float, float]]) -> None:
    made = []
    for count, *times in measured:
        made += timings(*({"plugin": a, "native": b} for a, b in (times[:2], times[2:])), count=count)
    choice = choose(made)
    (other,) = set(IMPLEMENTATIONS) - {choice.matmul}
    decode, prefill = (choice.microseconds[phase] for phase in PHASES)
    assert decode[choice.matmul] <= decode[other] or prefill[choice.matmul] * SLOWER_PREFILL < prefill[other]
    assert prefill[choice.matmul] <= SLOWER_PREFILL * prefill[other]


# --- what is timed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "block"), [(bits, block) for bits, blocks in BLOCK_SIZES.items() for block in blocks])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("newer_ops", [False, True])
def test_both_models_compute_the_same_in_the_form_that_is_named(
    bits: int, block: int, bias: bool, newer_ops: bool
) -> None:
    call, results = MatMulCall(bits, block, 128, (48, 7), bias), {}
    x = np.random.default_rng(0).standard_normal((1, 3, 128)).astype(np.float16)
    for who in IMPLEMENTATIONS:
        model = matmul_model(call, who, "fp16", copies=2, newer_ops=newer_ops)
        counted = [node.op_type for node in model.graph]
        expected = {"DequantizeLinear": 4, "MatMul": 4, "Add": 4} if bias else {"DequantizeLinear": 4, "MatMul": 4}
        if who == "plugin":
            expected = {OPS[bits]: 2}
        assert {name: counted.count(name) for name in counted} == expected
        assert model.graph.opset_imports[""] == 24 if newer_ops else model.graph.opset_imports[""] in (20, 21)
        assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} == {ir.DataType.FLOAT16}
        model.graph.opset_imports[""], model.ir_version = 24, 11
        onnx.checker.check_model(ir.to_proto(model))
        results[who] = run(model, {f"x.{copy}": x for copy in range(2)})
    assert results["plugin"].keys() == results["native"].keys()
    for name, native in results["native"].items():
        assert np.abs(results["plugin"][name] - native).max() <= 2e-3 * np.abs(native).max()
    first, second = (results["plugin"][f"present_y.{copy}.0"] for copy in range(2))
    assert not np.allclose(first, second)  # every copy has a matrix of its own


@pytest.mark.parametrize("call", [MatMulCall(4, 32, 256, (48, 7), True), MatMulCall(8, 0, 256, (64,), False)])
@pytest.mark.parametrize("newer_ops", [True, False])
def test_tensorrt_builds_the_native_one(tmp_path: Path, call: MatMulCall, newer_ops: bool) -> None:
    """TensorRT-RTX, which needs no GPU for it."""
    pytest.importorskip("tensorrt_rtx", reason="the package tensorrt-rtx is needed")
    ir.save(matmul_model(call, "native", "bf16", 2, newer_ops=newer_ops), tmp_path / "m.onnx", external_data="data")
    shapes = [{f"x.{copy}": ((1, rows, 256),) * 3 for copy in range(2)} for rows in (1, 64)]
    spec = EngineSpec("tensorrt-rtx", "bf16", "bf16", max_length=64, max_batch=1, chunk_size=64)
    plan = build_plan(tmp_path / "m.onnx", spec, shapes, Target.choose("tensorrt-rtx", ["8.6"]))
    assert len(plan) > 1000


def test_in_bf16_scales_stay_fp16_for_the_plugin_only() -> None:
    for who, expected in (("plugin", ir.DataType.FLOAT16), ("native", ir.DataType.BFLOAT16)):
        model = matmul_model(CALL, who, "bf16", copies=1)
        scales = [value for name, value in model.graph.initializers.items() if name.endswith("scale")]
        assert {value.dtype for value in scales} == {expected}
        assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} == {ir.DataType.BFLOAT16}


@pytest.mark.parametrize(
    ("call", "on_a_board", "on_an_h200"),
    [
        (MatMulCall(4, 32, 1280, (128256,), False, head=True), 1, 2),
        (MatMulCall(4, 32, 1280, (3584, 3584), False), 3, 35),
        (MatMulCall(8, 0, 3584, (1280,), False), 3, 35),
        (MatMulCall(4, 32, 1280, (1280,), False), 16, 64),
        (CALL, 64, 64),
    ],
)
def test_a_run_reads_more_than_a_cache_holds(call: MatMulCall, on_a_board: int, on_an_h200: int) -> None:
    assert (copies_of(call, 4 * 2**20), copies_of(call, 50 * 2**20)) == (on_a_board, on_an_h200)


class Builder:
    """Stands for TensorRT's builder: keeps a model, with its functions, for the simulated runtime to run."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.plans = directory, 0
        self.profiles: list[Any] = []

    def build_plan(self, model: Path, spec: EngineSpec, profiles: Any, target: object) -> memoryview:
        self.plans += 1
        self.profiles.append(profiles)
        kept, loaded = self.directory / f"{self.plans}.onnx", ir.load(model)
        attach_functions(loaded)
        ir.save(loaded, kept, external_data=f"{self.plans}.data")
        document = {"model": str(kept), "profiles": profiles, "plugin": False, "capturable": True, "captures": True}
        return memoryview(json.dumps(document).encode())


def test_runs_keep_the_rules_of_cuda_and_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the simulated driver, which knows when a graph may be captured and whose memory an address is."""
    driver, builder = Driver(), Builder(tmp_path)
    module = simulated_module(driver)
    target: Any = SimpleNamespace(trt=SimpleNamespace(module=module), newer_ops=True)
    monkeypatch.setattr(matmul_timing, "build_plan", builder.build_plan)
    monkeypatch.setattr(matmul_timing, "_ROUND_SECONDS", 1e-4)
    monkeypatch.setattr(matmul_timing, "_MIN_BYTES", 4 * 128 * 96)
    monkeypatch.setattr(runtime_cuda, "optional", lambda *_: driver)
    told: list[tuple[str, int, int]] = []
    spec = EngineSpec("tensorrt", "fp16", "fp16", max_length=64, max_batch=1, chunk_size=16)
    calls = {replace(CALL, output_sizes=(48, 7), bias=True): 3, HEAD: 1}
    found = time_matmuls(calls, spec, target, tmp_path, lambda *step: told.append(step))
    assert [(each.call, each.count, each.phase) for each in found] == [
        (call, count, phase) for call, count in calls.items() for phase in PHASES
    ]
    assert all(value > 0 for each in found for value in each.microseconds.values())
    assert all(each.microseconds.keys() == set(IMPLEMENTATIONS) for each in found)
    assert driver.calls.count("capture") == len(calls) * len(IMPLEMENTATIONS) * len(PHASES)
    assert driver.calls.count("run") == 2 * driver.calls.count("capture")
    assert driver.calls.count("retain") == driver.calls.count("release")
    assert not driver.live
    assert [len(profile) for profiles in builder.profiles for profile in profiles] == [14] * 4 + [13] * 4
    chunks = [profiles[1]["x.0"][0] for profiles in builder.profiles]
    assert chunks == [(1, 16, 128)] * 2 + [(1, 1, 128)] * 2  # of the head, one row
    assert told == [("timing matmuls", done, 2) for done in (1, 2)]
    assert time_matmuls({}, spec, target, tmp_path) == []
