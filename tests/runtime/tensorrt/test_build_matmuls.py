"""``gta-edge build --matmul``: who multiplies in an engine, what is asked for that, and what is recorded."""

import collections
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from gta_edge.errors import EngineError, InputError
from gta_edge.formats.bundle import Bundle
from gta_edge.runtime.tensorrt import build as building
from gta_edge.runtime.tensorrt import builder as tensorrt_builder
from gta_edge.runtime.tensorrt import matmul_timing
from gta_edge.runtime.tensorrt.build import build, lower_only
from gta_edge.runtime.tensorrt.engine import EngineSpec, load_engine
from gta_edge.runtime.tensorrt.lower import lower
from gta_edge.runtime.tensorrt.matmul_choice import PHASES, MatMulCall, Timing
from tests.helpers.commands import Result
from tests.helpers.records import edit

SPEC = EngineSpec("tensorrt", "bf16", "bf16", max_length=64, max_batch=2, chunk_size=32)
HERE = {"tensorrt": "10.3.0", "compute_capability": "8.7"}
LAYERS = 2


@pytest.fixture(scope="module")
def int4_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gta_edge.export.pipeline import export_model

    directory = tmp_path_factory.mktemp("int4") / "bundle"
    export_model(tiny_checkpoint, directory, precision="int4", verify=False)
    return directory


@pytest.fixture
def bundle(int4_bundle: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(int4_bundle, tmp_path / "bundle"))


def op_types(model: Path) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in onnx.load(model, load_external_data=False).graph.node)


# The head is in int8.
# Two for the attention's inputs: queries and keys are no multiples of 16 wide, and each must be the last of its call.
PACKED = {"BlockwiseInt4MatMul": 5 * LAYERS, "BlockwiseInt8MatMul": 1}
NATIVE = {"DequantizeLinear": 8 * LAYERS + 1}


def matmuls(found: collections.Counter[str]) -> dict[str, int]:
    return {name: found[name] for name in (*PACKED, *NATIVE) if found[name]}


# --- the model for other tools ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "int4", "expected", "who"),
    [
        ("tensorrt", "auto", PACKED, "plugin"),
        ("tensorrt", "plugin", PACKED, "plugin"),
        ("tensorrt", "native", NATIVE, "native"),
        ("tensorrt-rtx", "auto", NATIVE, "native"),
        ("tensorrt-rtx", "native", NATIVE, "native"),
    ],
)
@pytest.mark.parametrize("newer_ops", [True, False])
def test_the_model_alone_has_the_products_that_were_asked_for(
    bundle: Bundle, tmp_path: Path, engine: str, int4: str, expected: dict[str, int], who: str, newer_ops: bool
) -> None:
    spec = replace(SPEC, engine=engine, matmul=int4)
    written = lower_only(bundle, spec, tmp_path / "model", newer_ops=newer_ops)
    assert matmuls(op_types(written)) == expected
    record = json.loads((written.parent / "lowered.json").read_text())
    packed = 8 * LAYERS + 1 if who == "plugin" else 0
    assert (record["matmul"], record["packed"], record["not_packed"]) == (who, packed, {})


def test_by_command(bundle: Bundle, tmp_path: Path, command: Callable[..., Result]) -> None:
    found = {}
    for int4 in ("auto", "plugin", "native"):
        words = ("build", bundle.directory, "--onnx-only", "--output", tmp_path / int4, "--matmul", int4)
        found[int4] = command(*words, "--json").document["matmul"]
        assert matmuls(op_types(tmp_path / int4 / "model.onnx")) == (NATIVE if int4 == "native" else PACKED)
    assert found == {"auto": "plugin", "plugin": "plugin", "native": "native"}
    printed = command("build", bundle.directory, "--onnx-only", "--output", tmp_path / "auto", "--force").out
    assert printed.endswith("in fp16, plugin matmuls\n")


def test_where_nothing_is_quantised_nothing_is_said(
    copied_bundle: Path, tmp_path: Path, command: Callable[..., Result]
) -> None:
    words = ("build", copied_bundle, "--onnx-only", "--output", tmp_path / "model")
    assert command(*words, "--json").document["matmul"] is None
    assert "matmuls" not in command(*words, "--force").out
    assert "DequantizeLinear" not in op_types(tmp_path / "model" / "model.onnx")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"matmul": "both"}, "--matmul is 'both'; expected auto, plugin, native"),
        (
            {"engine": "tensorrt-rtx", "matmul": "plugin"},
            "tensorrt-rtx takes no plugins; leave out --matmul plugin, or build with --engine tensorrt",
        ),
    ],
)
def test_what_is_refused(bundle: Bundle, changes: dict[str, str], text: str) -> None:
    for call in (build, lower_only):
        with pytest.raises(InputError) as raised:
            call(bundle, replace(SPEC, **changes))
        assert str(raised.value) == text


def test_a_plugin_for_matrices_that_are_not_quantised(copied_bundle: Path) -> None:
    with pytest.raises(InputError, match=r"for matrices of int4 or int8, and the bundle's are bf16; leave it out, or"):
        lower_only(Bundle.open(copied_bundle), replace(SPEC, matmul="plugin"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"matmul": "auto"}, "matmul is 'auto'; expected plugin or native"),
        (
            {"matmul": "plugin", "compute": "fp32", "form": "function"},
            "the plugin multiplies in fp16 or bf16",
        ),
    ],
)
def test_a_form_that_there_is_not(bundle: Bundle, tmp_path: Path, options: dict[str, str], text: str) -> None:
    with pytest.raises(InputError) as raised:
        lower(bundle, tmp_path / "model", **{"compute": "fp16", "capacity": 16, **options})
    assert str(raised.value).startswith(text)


# --- an engine, its building and timing stood in for -----------------------------------------------------------------


class Gpu:
    """Stands for TensorRT on a GPU: takes what is built, and has times for matmuls."""

    def __init__(self, decode: Mapping[str, float], prefill: Mapping[str, float]) -> None:
        self.microseconds = {"decode": decode, "prefill": prefill}
        self.asked: dict[MatMulCall, int] = {}
        self.built: collections.Counter[str] = collections.Counter()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "Gpu":
        target = SimpleNamespace(
            gpu=None, gpu_name="", newer_ops=True, compute_capabilities=("8.7",), tensorrt=HERE["tensorrt"]
        )
        monkeypatch.setattr(building, "available_bytes", lambda: None)
        monkeypatch.setattr(tensorrt_builder.Target, "choose", lambda *arguments, **options: target)
        monkeypatch.setattr(tensorrt_builder, "build_plan", self.build_plan)
        monkeypatch.setattr(matmul_timing, "time_matmuls", self.time_matmuls)
        return self

    def build_plan(self, model: Path, *rest: object) -> bytes:
        self.built = op_types(model)
        return b"the engine"

    def time_matmuls(self, calls: Mapping[MatMulCall, int], *rest: object) -> list[Timing]:
        self.asked = dict(calls)
        return [Timing(call, n, phase, self.microseconds[phase]) for call, n in calls.items() for phase in PHASES]


FASTER = {"plugin": 1.0, "native": 2.0}
SLOWER = {"plugin": 2.5, "native": 1.0}


@pytest.mark.parametrize(
    ("decode", "prefill", "expected"),
    [(FASTER, FASTER, "plugin"), (FASTER, SLOWER, "native"), (SLOWER, FASTER, "native")],
)
def test_an_engine_has_the_products_that_were_faster(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, decode: dict[str, float], prefill: dict[str, float], expected: str
) -> None:
    gpu = Gpu(decode, prefill).install(monkeypatch)
    build(bundle, SPEC)
    assert matmuls(gpu.built) == (PACKED if expected == "plugin" else NATIVE)
    assert sorted(gpu.asked.values()) == [1] + [LAYERS] * 5
    _, record = load_engine(bundle, "tensorrt", **HERE)
    assert (record.spec, record.matmul) == (SPEC, expected)
    assert len(record.matmul_timings) == 2 * len(gpu.asked)
    head = next(each for each in record.matmul_timings if each["head"])
    assert head == {
        "bits": 8,
        "block_size": 0,
        "in_features": 96,
        "output_sizes": [300],
        "bias": False,
        "head": True,
        "count": 1,
        "phase": "decode",
        "microseconds": decode,
    }


@pytest.mark.parametrize(("who", "other"), [("plugin", "native"), ("native", "plugin")])
def test_who_cannot_multiply_has_lost(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, who: str, other: str) -> None:
    gpu = Gpu(FASTER, FASTER).install(monkeypatch)

    def unable(*arguments: object) -> list[Timing]:
        raise matmul_timing.UnableError(who, EngineError("there is no kernel for int4 in blocks"))

    monkeypatch.setattr(matmul_timing, "time_matmuls", unable)
    build(bundle, SPEC)
    assert matmuls(gpu.built) == (PACKED if other == "plugin" else NATIVE)
    _, record = load_engine(bundle, "tensorrt", **HERE)
    assert record.matmul == other
    assert record.matmul_timings == [{"unable": who, "reason": "there is no kernel for int4 in blocks"}]


@pytest.mark.parametrize("int4", ["plugin", "native"])
def test_what_was_asked_for_is_not_timed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, int4: str) -> None:
    gpu = Gpu(FASTER, SLOWER).install(monkeypatch)
    build(bundle, replace(SPEC, matmul=int4))
    assert gpu.asked == {}
    assert matmuls(gpu.built) == (PACKED if int4 == "plugin" else NATIVE)
    _, record = load_engine(bundle, "tensorrt", **HERE)
    assert (record.matmul, record.matmul_timings) == (int4, [])
    with pytest.raises(EngineError, match=rf"--max-batch 2 --matmul {int4} --force$"):
        load_engine(bundle, "tensorrt", **HERE | {"tensorrt": "10.4.0"})


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record.update(matmul=1),
        lambda record: record.update(matmul_timings="none"),
        lambda record: record["spec"].update(matmul=4),
    ],
)
def test_a_damaged_record(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Any], None]) -> None:
    Gpu(FASTER, FASTER).install(monkeypatch)
    path = build(bundle, SPEC) / "engine.json"
    edit(path, lambda document: damage(document["content"]))
    with pytest.raises(EngineError, match="is not the record of an engine"):
        load_engine(bundle, "tensorrt", **HERE)
