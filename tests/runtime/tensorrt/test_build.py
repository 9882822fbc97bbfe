"""Engines: what a build asks for, what it refuses, what is recorded of it, and what is checked before it is loaded."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from gta_edge.cuda.gpu import Gpu
from gta_edge.errors import BackendError, CapacityError, EngineError, InputError, OutputError
from gta_edge.formats import integrity
from gta_edge.formats.artifacts import made_from
from gta_edge.formats.bundle import Bundle
from gta_edge.libraries.cuda import driver_cuda_version
from gta_edge.model.kv_cache import cache_bytes
from gta_edge.runtime.tensorrt import build as building
from gta_edge.runtime.tensorrt.build import LOGIT_POSITIONS, build, lower_only, profile_shapes, requirement
from gta_edge.runtime.tensorrt.engine import EngineManifest, EngineSpec, Wanted, engine_directory, load_engine
from gta_edge.runtime.tensorrt.log import new_log, started
from gta_edge.support.memory import available_bytes
from tests.helpers.commands import COMMAND, Result, environment
from tests.helpers.engines import keep_engine
from tests.helpers.records import edit

RTX = EngineSpec("tensorrt-rtx", "fp16", "fp16", max_length=64, max_batch=2, chunk_size=32)
PLUGIN = replace(RTX, engine="tensorrt")
HERE = {"tensorrt": "10.3.0", "compute_capability": "8.7"}


@pytest.fixture
def bundle(copied_bundle: Path) -> Bundle:
    return Bundle.open(copied_bundle)


def message(error: type[Exception], call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(error) as raised:
        call(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- the record -------------------------------------------------------------------------------------------------------


def kept_record(bundle: Bundle, **changes: Any) -> EngineManifest:
    return replace(EngineManifest(PLUGIN, made_from(bundle), HERE["tensorrt"], ["8.0", "8.7"]), **changes)


def kept(bundle: Bundle, **changes: Any) -> EngineManifest:
    record = kept_record(bundle, **changes)
    keep_engine(bundle, record, b"the engine", force=True)
    return record


def test_an_engine_is_read_as_it_was_kept(bundle: Bundle) -> None:
    record = kept(bundle)
    assert load_engine(bundle, "tensorrt", **HERE) == (b"the engine", record)
    Bundle.open(bundle.directory, verify_hashes=True)  # an engine in it leaves a bundle what it is


@pytest.mark.parametrize(
    ("changes", "here", "told"),
    [
        ({"tensorrt": "10.13.2"}, {}, "TensorRT is '10.3.0' here and was '10.13.2'"),
        ({}, {"compute_capability": "11.0"}, "the GPU's compute capability is '11.0' here and was '8.0, 8.7'"),
        ({"gta_edge": "0.0.9"}, {}, "gta-edge is '0.1.0' here and was '0.0.9'"),
        ({"made_from": {"model.onnx": "0" * 64}}, {}, "the bundle's files are others"),
    ],
)
def test_what_does_not_fit_is_named_with_the_command_that_rebuilds(
    bundle: Bundle, changes: dict[str, Any], here: dict[str, str], told: str
) -> None:
    kept(bundle, **changes)
    text = message(EngineError, load_engine, bundle, "tensorrt", **HERE | here)
    assert told in text
    assert text.endswith(
        f"run: gta-edge build {bundle.directory} --engine tensorrt --compute fp16 --cache-dtype fp16 "
        "--max-length 64 --max-batch 2 --force"
    )


@pytest.mark.parametrize(
    ("wanted", "told", "types"),
    [
        (Wanted("bf16"), "computes in fp16, not in bf16", "--compute bf16 --cache-dtype bf16"),
        (Wanted(None, "int8"), "caches in fp16, not in int8", "--compute fp16 --cache-dtype int8"),
        (
            Wanted("bf16", "int8", "--cache-policy h2o"),
            "computes in fp16, not in bf16",
            "--compute bf16 --cache-dtype int8",
        ),
    ],
)
def test_an_engine_of_other_types(bundle: Bundle, wanted: Wanted, told: str, types: str) -> None:
    record = kept(bundle)
    text = message(EngineError, load_engine, bundle, "tensorrt", **HERE, wanted=wanted)
    policy = f" {wanted.policy}" if wanted.policy else ""
    assert text == (
        f"{bundle.directory}/engines/tensorrt: the engine {told}; run: gta-edge build {bundle.directory} "
        f"--engine tensorrt {types} --max-length 64 --max-batch 2{policy} --force"
    )
    assert load_engine(bundle, "tensorrt", **HERE, wanted=Wanted("fp16", "fp16"))[1] == record


def test_no_engine(bundle: Bundle) -> None:
    assert "there is no engine; run: gta-edge build" in message(EngineError, load_engine, bundle, "tensorrt", **HERE)


def damaged_plan(directory: Path) -> None:
    (directory / "engine.plan").write_bytes(b"the Engine")  # as long, and of another time


def empty_plan(directory: Path) -> None:
    (directory / "engine.plan").write_bytes(b"")


def shorter_plan(directory: Path) -> None:
    (directory / "engine.plan").write_bytes(b"the")


def no_plan(directory: Path) -> None:
    (directory / "engine.plan").unlink()


def linked_plan(directory: Path) -> None:
    (directory / "engine.plan").rename(directory.parents[1] / "elsewhere")
    (directory / "engine.plan").symlink_to(directory.parents[1] / "elsewhere")


def edited(change: Callable[[dict[str, Any]], Any], *, sign: bool = True) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        edit(directory / "engine.json", lambda document: (change(document), None)[1], sign=sign)

    return damage


def without_record(directory: Path) -> None:
    (directory / "engine.json").unlink()


DAMAGES = {
    "another plan": damaged_plan,
    "a shorter plan": shorter_plan,
    "an empty plan": empty_plan,
    "no plan": no_plan,
    "a link": linked_plan,
    "no JSON": lambda directory: (directory / "engine.json").write_text("{"),
    "nested without end": lambda directory: (directory / "engine.json").write_text("[" * 100_000),
    "not a record": lambda directory: (directory / "engine.json").write_text("[]"),
    "no record": without_record,
    "changed and not signed": edited(lambda d: d["content"].update(tensorrt="10.3.0"), sign=False),
    "a name too many": edited(lambda d: d["content"].update(more=1)),
    "no spec": edited(lambda d: d["content"].pop("spec")),
    "a list": edited(lambda d: d.update(content=[])),
    "a text for a number": edited(lambda d: d["content"]["spec"].update(max_length="64")),
    "a number for a text": edited(lambda d: d["content"].update(tensorrt=10)),
    "a text for a list": edited(lambda d: d["content"].update(compute_capabilities="8.7")),
    "numbers in a list": edited(lambda d: d["content"].update(compute_capabilities=[8.7])),
    "made from a list": edited(lambda d: d["content"].update(made_from=[])),
    "no time": edited(lambda d: d["files"]["engine.plan"].pop("mtime_ns")),
    "no files": edited(lambda d: d.update(files={})),
    "a type that there is not": edited(lambda d: d["content"]["spec"].update(cache_dtype="int3")),
    "no rows": edited(lambda d: d["content"]["spec"].update(max_batch=0)),
    "another engine's": edited(lambda d: d["content"]["spec"].update(engine="tensorrt-rtx")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_with_the_command_that_rebuilds(bundle: Bundle, damage: str) -> None:
    kept(bundle)
    DAMAGES[damage](engine_directory(bundle, "tensorrt"))
    text = message(EngineError, load_engine, bundle, "tensorrt", **HERE)
    assert "gta-edge build" in text
    # what is told to do leads on: such an engine is no engine, and is replaced without more ado
    keep_engine(bundle, kept_record(bundle), b"the engine")
    assert load_engine(bundle, "tensorrt", **HERE)[0] == b"the engine"


def test_an_engine_that_another_user_or_machine_made_is_not_run(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept(bundle)
    monkeypatch.setenv("GTA_EDGE_CACHE", str(tmp_path / "another cache"))
    text = message(EngineError, load_engine, bundle, "tensorrt", **HERE)
    assert "made by another user or on another machine" in text
    assert "gta-edge build" in text


def test_an_engine_of_another_board_of_the_same_kind_is_named(bundle: Bundle) -> None:
    kept(bundle, gpu="Orin Nano")
    assert load_engine(bundle, "tensorrt", **HERE, gpu="Orin Nano")[0] == b"the engine"
    text = message(EngineError, load_engine, bundle, "tensorrt", **HERE, gpu="AGX Orin")
    assert "the GPU is 'AGX Orin' here and was 'Orin Nano'" in text


def test_a_copied_engine_is_hashed_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "_ALWAYS_HASHED_BYTES", 4)
    hashed: list[str] = []
    sha256 = integrity.sha256
    kept(bundle)
    monkeypatch.setattr(integrity, "sha256", lambda file, name, *rest: hashed.append(name) or sha256(file, name, *rest))
    load_engine(bundle, "tensorrt", **HERE)
    assert hashed == []
    os.utime(engine_directory(bundle, "tensorrt") / "engine.plan", (1, 1))
    load_engine(bundle, "tensorrt", **HERE)
    load_engine(bundle, "tensorrt", **HERE)
    assert hashed == ["engine.plan"]


def test_an_engine_that_is_replaced_while_it_is_read_is_one_or_the_other(bundle: Bundle, tmp_path: Path) -> None:
    """Two plans of different sizes, so that the record of one with the plan of the other is found out."""
    script = """
import sys
from gta_edge.formats.bundle import Bundle
from gta_edge.runtime.tensorrt.engine import load_engine
from tests.helpers.engines import keep_engine
bundle = Bundle.open(sys.argv[1])
record = load_engine(bundle, "tensorrt", tensorrt="10.3.0", compute_capability="8.7")[1]
for i in range(10**6):
    keep_engine(bundle, record, bytes(1 + i % 7), force=True)
"""
    kept(bundle)
    with subprocess.Popen([sys.executable, "-c", script, bundle.directory], env=environment()) as writer:
        try:
            seen = set()
            while len(seen) < 7:
                assert writer.poll() is None
                plan, _ = load_engine(bundle, "tensorrt", **HERE)
                seen.add(len(plan))
        finally:
            writer.kill()


def test_engines_that_are_a_link_are_refused_by_build_as_by_load(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.directory / "engines").symlink_to(tmp_path)
    assert "remove the link" in message(OutputError, keep_engine, bundle, kept_record(bundle), b"x")
    assert "remove the link" in message(EngineError, load_engine, bundle, "tensorrt", **HERE)


def test_a_copy_of_an_engine_is_hashed_and_taken(bundle: Bundle) -> None:
    record, plan = kept(bundle), engine_directory(bundle, "tensorrt") / "engine.plan"
    os.utime(plan, (1, 1))
    assert load_engine(bundle, "tensorrt", **HERE) == (b"the engine", record)


def test_another_engine_is_replaced_only_on_demand(bundle: Bundle) -> None:
    record = kept(bundle)
    assert "--force" in message(OutputError, keep_engine, bundle, record, b"another")
    assert load_engine(bundle, "tensorrt", **HERE)[0] == b"the engine"
    keep_engine(bundle, record, b"another", force=True)
    assert load_engine(bundle, "tensorrt", **HERE)[0] == b"another"


# --- before a build ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"engine": "tensorflow"}, "no engine is called 'tensorflow'"),
        ({"compute": "int8"}, "tensorrt-rtx does not compute in 'int8'; expected fp32, fp16, bf16"),
        ({"engine": "tensorrt", "compute": "fp32"}, "tensorrt does not compute in 'fp32'; expected fp16, bf16"),
        ({"cache_dtype": "int8"}, "a cache of 'int8' is not possible with --engine tensorrt-rtx"),
        ({"engine": "tensorrt", "cache_dtype": "bf16"}, "a cache of 'bf16' is not possible with --engine tensorrt and"),
        ({"max_length": 129}, "--max-length is 129; the model has positions for 1 to 128"),
        ({"max_batch": 0}, "--max-batch is 0"),
        ({"chunk_size": 65}, "a chunk has 65 tokens; expected 1 to the 64"),
    ],
)
def test_purposes_that_are_refused(bundle: Bundle, changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    spec = replace(RTX, **changes)
    assert told in message(InputError, build, bundle, spec)
    assert told in message(InputError, lower_only, bundle, spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_build_that_memory_is_too_short_for_is_refused_with_both_numbers(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = requirement(bundle, RTX)
    monkeypatch.setattr(building, "available_bytes", lambda: needed.peak - 1)
    text = message(CapacityError, build, bundle, RTX)
    assert f"{needed.peak / 1e9:.2f} GB at its peak" in text
    assert f"{(needed.peak - 1) / 1e9:.2f} GB are free" in text
    assert "int4" in text or "--max-length" in text
    assert not engine_directory(bundle, RTX.engine).exists()


def test_what_a_build_takes_grows_with_the_cache_and_not_with_the_length_of_a_prompt(bundle: Bundle) -> None:
    small, large = requirement(bundle, RTX), requirement(bundle, replace(RTX, max_batch=8, max_length=128))
    tokens = 8 * 128 - 2 * 64
    assert large.cache - small.cache == 2 * cache_bytes(bundle.config, "fp16", tokens)
    short = requirement(bundle, replace(RTX, chunk_size=16))
    assert replace(short, buffers=small.buffers) == small  # of which ids have a little
    values = bundle.config.cache_values_per_token_per_layer
    heads = sum(cache.heads for cache in bundle.config.caches)
    narrow = requirement(bundle, replace(PLUGIN, cache_dtype="int8")).cache
    assert narrow / small.cache == pytest.approx((values + 4 * heads) / (2 * values))


def test_a_gpu_with_memory_of_its_own_is_asked_too(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the package tensorrt-rtx is needed")
    from gta_edge.runtime.tensorrt import builder as tensorrt_builder

    needed = requirement(bundle, RTX)
    monkeypatch.setattr(tensorrt_builder, "current_gpu", lambda: Gpu(0, "a small GPU", "sm_86", 4))
    monkeypatch.setattr(building, "free_gpu_bytes", lambda: needed.on_gpu - 1)
    text = message(CapacityError, build, bundle, RTX)
    assert f"{needed.on_gpu / 1e9:.2f} GB at its peak" in text
    assert "are free on a small GPU" in text
    assert not engine_directory(bundle, RTX.engine).exists()


def test_free_memory_is_what_the_system_says(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  7845612 kB\nMemFree:  200 kB\nMemAvailable:    5242880 kB\n")
    assert available_bytes(meminfo) == 5 * 2**30
    meminfo.write_text("MemTotal: 1 kB\n")
    assert available_bytes(meminfo) is None
    assert available_bytes(tmp_path / "absent") is None


RTX_KNOWS = ["8.0", "8.6", "8.9", "12.0", "12.1"]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the package tensorrt-rtx is needed")
    from gta_edge.runtime.tensorrt import builder as tensorrt_builder

    def none() -> None:
        raise BackendError("there is no driver")

    monkeypatch.setattr(tensorrt_builder, "current_gpu", none)


def test_gpus_that_tensorrt_rtx_does_not_build_for(
    bundle: Bundle, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gta_edge.runtime.tensorrt import builder as tensorrt_builder

    told = f"does not build for compute capability '8.7'; expected {', '.join(RTX_KNOWS)}"
    assert told in message(BackendError, build, bundle, RTX, compute_capabilities=["8.6", "8.7"])
    assert "capability '7.5'; expected 8.0" in message(BackendError, build, bundle, RTX, compute_capabilities=["7.5"])
    monkeypatch.setattr(tensorrt_builder, "current_gpu", lambda: Gpu(0, "Orin", "sm_87", 8))
    assert told in message(BackendError, build, bundle, RTX)
    assert not engine_directory(bundle, RTX.engine).exists()


# --- a build, with TensorRT-RTX, which needs no GPU -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compute", "asked", "built"), [("fp16", [], RTX_KNOWS), ("bf16", ["8.6"], ["8.6"]), ("fp32", ["8.9"], ["8.9"])]
)
def test_an_engine_with_both_profiles(
    bundle: Bundle, no_gpu: None, compute: str, asked: list[str], built: list[str]
) -> None:
    told: list[tuple[str, int, int]] = []
    spec = replace(RTX, compute=compute, cache_dtype=compute)
    directory = build(bundle, spec, compute_capabilities=asked, progress=lambda *step: told.append(step))
    import tensorrt_rtx as trt

    plan, record = load_engine(bundle, "tensorrt-rtx", tensorrt=trt.__version__, compute_capability=built[-1])
    assert record == EngineManifest(spec, made_from(bundle), trt.__version__, built)
    assert len(plan) > 1000
    assert {path.name for path in directory.iterdir()} == {"engine.plan", "engine.json"}
    assert {path.name for path in directory.parent.iterdir()} == {"tensorrt-rtx"}
    assert all(0 < done <= total for _, done, total in told)
    assert len({what for what, *_ in told}) >= 2  # writing weights, and TensorRT's own
    assert "give --force" in message(EngineError, build, bundle, spec)


@pytest.mark.parametrize("after", ["writing weights", "TensorRT"])
def test_an_interrupted_build_leaves_nothing(bundle: Bundle, no_gpu: None, after: str) -> None:
    """Ctrl-C arrives where Python runs, in the midst of TensorRT too: when it tells of its progress."""
    seen = []

    def interrupt(what: str, done: int, total: int) -> None:
        seen.append(what)
        if (what == "writing weights") == (after == "writing weights"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(bundle, RTX, progress=interrupt)
    assert (set(seen) == {"writing weights"}) == (after == "writing weights")
    assert not (bundle.directory / "engines").exists()
    build(bundle, RTX)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("content", [None, b"", b"not a cache of timings"])
def test_timings_are_kept_for_the_next_build(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the package tensorrt-rtx is needed")
    from gta_edge.libraries.tensorrt import load
    from gta_edge.runtime.tensorrt.builder import Target, build_plan
    from gta_edge.runtime.tensorrt.lower import lower

    monkeypatch.setenv("GTA_EDGE_CACHE", str(tmp_path / "cache"))
    trt = replace(load("tensorrt-rtx"), times_kernels=True)  # it has the calls, and no use for them
    target = Target(trt, ("8.6",), "a GPU / of 8.6")
    model = lower(bundle, tmp_path / "model", form="function", compute="fp16", capacity=RTX.max_length)
    version = trt.version_text.replace(".", "-")
    kept = tmp_path / "cache" / "timings" / f"tensorrt-rtx-{version}-a-GPU---of-8-6.cache"
    if content is not None:
        kept.parent.mkdir(parents=True)
        kept.write_bytes(content)
    assert len(build_plan(model, RTX, profile_shapes(bundle, RTX), target)) > 1000
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    assert kept.stat().st_size > 0
    assert kept.read_bytes() != content


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_timings_that_tensorrt_does_not_take_cost_no_engine(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="the package tensorrt-rtx is needed")
    from gta_edge.libraries.tensorrt import load
    from gta_edge.runtime.tensorrt.builder import Target, build_plan
    from gta_edge.runtime.tensorrt.lower import lower

    monkeypatch.setenv("GTA_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trt.IBuilderConfig, "set_timing_cache", lambda *arguments, **options: False)
    monkeypatch.setattr(trt.IBuilderConfig, "get_timing_cache", lambda config: None)
    target = Target(replace(load("tensorrt-rtx"), times_kernels=True), ("8.6",), "a GPU")
    model = lower(bundle, tmp_path / "model", form="function", compute="fp16", capacity=RTX.max_length)
    assert len(build_plan(model, RTX, profile_shapes(bundle, RTX), target)) > 1000
    assert not [*(tmp_path / "cache" / "timings").iterdir()]


def test_ctrl_c_in_the_midst_of_tensorrt(copied_bundle: Path, no_gpu: None) -> None:
    arguments = [*COMMAND, "build", copied_bundle, "--engine", "tensorrt-rtx", "--compute-capability", "8.6"]
    engines = copied_bundle / "engines"
    with subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not [*engines.glob(".gta-edge-*.partial/model/lowered.json")]:
            time.sleep(0.01)
        time.sleep(0.4)  # TensorRT parses now, or builds
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"")
    assert not engines.exists()


def test_tensorrt_without_a_driver_that_it_takes() -> None:
    """Its runtime says so in its log only, gives an object of no use, and ends the process when that is freed."""
    lean = pytest.importorskip("tensorrt_lean_bindings", reason="the package tensorrt-lean-cu13-bindings is needed")
    if driver_cuda_version() is not None:
        pytest.skip("there is a driver here")
    text = message(BackendError, started, lean.Runtime, new_log(lean), "runtime")
    assert re.fullmatch(
        r"TensorRT cannot start its runtime \(.*CUDA initialization failure .*\); run `gta-edge doctor`", text
    )


def test_a_model_that_tensorrt_refuses(bundle: Bundle, no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bundle: Bundle, spec: EngineSpec, directory: Path, *rest: object) -> Path:
        directory.mkdir()
        (directory / "model.onnx").write_bytes(b"no model")
        return directory / "model.onnx"

    monkeypatch.setattr(building, "_lowered", broken)
    assert "refuses the model (" in message(EngineError, build, bundle, RTX)
    assert not engine_directory(bundle, RTX.engine).exists()


def test_profiles_cover_what_sessions_run(bundle: Bundle) -> None:
    decode, prefill, few = profile_shapes(bundle, replace(PLUGIN, cache_dtype="int8"))
    assert decode["input_ids"] == ((1, 1), (1, 1), (2, 1))
    assert prefill["input_ids"] == ((1, 1), (1, 32), (2, 32))
    assert prefill["logit_positions"][2] == (2, LOGIT_POSITIONS)
    first, second = bundle.config.caches
    assert few["input_ids"] == few["logit_positions"] == ((1, 2), (1, 8), (2, 16))
    for profile in (decode, prefill, few):
        assert profile["past_key.1"][2] == (2, first.heads, 64, first.width)
        assert profile["past_latent_scale.0"] == tuple((n, second.heads, 64) for n in (1, 1, 2))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_model_alone_for_other_tools(
    bundles: Callable[[str, str], Bundle], tmp_path: Path, command: Callable[..., Result]
) -> None:
    """Of a model whose widths the kernels are made for."""
    bundle = Path(shutil.copytree(bundles("gqa, tied", "int8").directory, tmp_path / "bundle"))
    out = tmp_path / "model"
    options = ("--max-length", 20, "--cache-dtype", "int8")
    document = command("build", bundle, "--onnx-only", "--output", out, *options, "--json").document
    assert document["written"] == str(out / "model.onnx")
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    shapes = {i.name: [d.dim_value or d.dim_param for d in i.type.tensor_type.shape.dim] for i in graph.input}
    assert shapes["past_key.0"][2] == 20
    assert "GroupedLatentAttention" in {node.op_type for node in graph.node if node.domain == "gta"}
    assert "already exists" in command("build", bundle, "--onnx-only", "--output", out).error
    assert command("build", bundle, "--onnx-only", "--output", out, "--older-parser", "--force").status == 0


def test_the_model_alone_lies_among_the_engines_by_default(copied_bundle: Path, command: Callable[..., Result]) -> None:
    document = command("build", copied_bundle, "--engine", "tensorrt-rtx", "--onnx-only", "--json").document
    assert document["written"] == str(copied_bundle / "engines" / "tensorrt-rtx-onnx" / "model.onnx")
    onnx.checker.check_model(document["written"], full_check=True)
    Bundle.open(copied_bundle)


def test_wrong_usage(copied_bundle: Path, command: Callable[..., Result], tmp_path: Path) -> None:
    assert command("build", copied_bundle, "--output", tmp_path / "out").status == 2
    assert command("build", copied_bundle, "--older-parser").status == 2
    shutil.rmtree(copied_bundle)
    assert "does not exist" in command("build", copied_bundle).error


def test_an_engine_by_command(
    copied_bundle: Path, no_gpu: None, command: Callable[..., Result], tmp_path: Path
) -> None:
    options = ("--engine", "tensorrt-rtx", "--max-length", 64)
    document = command("build", copied_bundle, *options, "--compute-capability", "8.6, 8.9", "--json").document
    written = json.loads((copied_bundle / "engines" / "tensorrt-rtx" / "engine.json").read_text())
    assert written["content"]["compute_capabilities"] == ["8.6", "8.9"]
    assert document["written"] == str(copied_bundle / "engines" / "tensorrt-rtx")
    assert document["estimated_peak_bytes"] > 0
    assert "--force" in command("build", copied_bundle, *options).error


def test_a_bundle_that_cannot_be_written_to(copied_bundle: Path, no_gpu: None, command: Callable[..., Result]) -> None:
    (copied_bundle / "engines").write_text("a file in the way")
    assert "engines: cannot be made" in command("build", copied_bundle, "--engine", "tensorrt-rtx").error


def test_a_purpose_is_a_command(bundle: Bundle, command: Callable[..., Result], tmp_path: Path) -> None:
    """What an error tells to run is what `build` understands."""
    words = replace(PLUGIN, max_length=33).command(bundle.directory).split()
    out = tmp_path / "out"
    document = command(*words[1:], "--onnx-only", "--output", out, "--json").document
    expected = asdict(replace(PLUGIN, max_length=33, chunk_size=33))
    del expected["matmul"]  # there it is what multiplies in the end: nothing, where no weights are quantised
    assert expected.pop("managed") is None  # without a cache policy the document does not name it
    assert {name: document[name] for name in expected} == expected
