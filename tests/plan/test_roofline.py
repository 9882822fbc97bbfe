"""What a plan says of a device: memory, the edges of what fits, and time from a roofline worked out by hand."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gta_edge.cuda.gpu import current_gpu
from gta_edge.errors import BackendError, InputError
from gta_edge.machine.devices import MEASURED, Device, device, device_names
from gta_edge.machine.probe import measure_cpu, measure_gpu
from gta_edge.model.presets import PRESETS, preset
from gta_edge.plan.roofline import LARGEST_BATCH, Model, Plan, largest, make_plan
from gta_edge.runtime.registry import fastest_on

BOARD = Device(
    name="board",
    title="a board",
    kind="gpu",
    memory_bytes=4_000_000_000,
    system_bytes=1_000_000_000,
    runtime_bytes=100_000_000,
    bandwidth=50e9,
    rates={"fp32": 1e12, "fp16": 8e12, "int8": 16e12},
    efficiency=0.5,
)
CPU = replace(BOARD, name="cpu", kind="cpu", rates=dict.fromkeys(("fp32", "fp16", "int8"), 3e11))
NAMES = (
    "orin-nano-4gb, orin-nano-8gb, orin-nano-8gb-super, orin-nx-8gb, orin-nx-8gb-super, orin-nx-16gb, "
    "orin-nx-16gb-super, agx-orin-32gb, agx-orin-64gb, thor-t4000, agx-thor, gb10, rtx-3060-12gb, h100"
)


def planned(
    name: str = "gta-1b",
    on: Device = BOARD,
    precision: str = "int4",
    cache_dtype: str | None = None,
    **options: Any,
) -> Plan:
    config = preset(name)
    execution = fastest_on(on.kind).execution(config, precision, cache_dtype)
    execution = replace(execution, chunk_size=512, logit_positions=1)
    return make_plan(Model.of(name, config, precision), on, execution, **options)


# --- devices ---------------------------------------------------------------------------------------------------------


def test_the_devices() -> None:
    assert device_names() == (*NAMES.split(", "), *MEASURED)


@pytest.mark.parametrize("name", NAMES.split(", "))
def test_every_device_is_plausible_and_says_where_its_figures_are_from(name: str) -> None:
    found = device(name)
    assert found.name == name
    assert 30e9 < found.bandwidth < 4e12
    assert 3e9 < found.memory_bytes < 140e9
    assert found.system_bytes + found.runtime_bytes < found.memory_bytes
    assert found.rates["fp32"] < found.rates["fp16"] < found.rates["int8"]
    assert 0 < found.efficiency <= 1
    assert found.source
    # what is assumed says so
    assert any("assumed" in sentence for sentence in found.assumptions)


def test_memory_is_below_what_the_name_says() -> None:
    for name in NAMES.split(", "):
        if size := re.search(r"-(\d+)gb", name):
            assert device(name).memory_bytes <= int(size[1]) * 2**30


@pytest.mark.parametrize(("name", "multiprocessors", "mhz"), [("orin-nx-8gb", 8, 765), ("orin-nx-16gb", 8, 918)])
def test_super_mode_is_a_higher_clock(name: str, multiprocessors: int, mhz: int) -> None:
    plain, faster = device(name), device(f"{name}-super")
    assert (faster.bandwidth, faster.memory_bytes) == (plain.bandwidth, plain.memory_bytes)
    for found, clock in ((plain, mhz), (faster, 1173)):
        assert found.rates["int8"] == pytest.approx(multiprocessors * clock * 1e6 * 4096, rel=0.005)
    assert faster.rates["fp16"] / plain.rates["fp16"] == pytest.approx(1173 / mhz, rel=0.005)


def test_an_unknown_device() -> None:
    with pytest.raises(InputError, match=r"no device is called 'orin'; there are orin-nano-4gb, .*, this, this-cpu"):
        device("orin")


def test_the_machine_measures_itself() -> None:
    found = measure_cpu()
    assert found.kind == "cpu"
    assert 1e8 < found.bandwidth < 1e13
    assert 1e8 < found.rates["fp32"] < 1e15
    assert 0 < found.available_bytes <= found.memory_bytes


@pytest.mark.gpu
def test_the_gpu_measures_itself() -> None:
    try:
        current_gpu()
    except BackendError as error:
        pytest.skip(str(error))
    found = measure_gpu()
    assert found.kind == "gpu"
    assert 1e10 < found.bandwidth < 1e13
    assert 1e11 < found.rates["fp32"] < found.rates["fp16"]
    assert 0 < found.available_bytes <= found.memory_bytes


# --- memory ----------------------------------------------------------------------------------------------------------


def test_memory_on_a_gpu() -> None:
    memory = planned(precision="bf16", context=1000, batch=2).memory
    config = preset("gta-1b")
    # all in 16 bits, norms and biases too, and tables of 32768 x 32 cosines and sines
    assert memory.weights == 2 * config.parameters + 2 * 2 * 32768 * 32
    assert memory.cache == 2 * 1000 * 20736
    assert memory.peak == memory.weights + memory.cache + memory.activations + 100_000_000


def test_int4_on_a_gpu_is_what_is_stored_but_for_norms_and_tables() -> None:
    model = planned(context=1)
    stored = model.model.weight_bytes + 128256 * 1280  # an engine looks the table up in words of its own
    assert 0.97 * stored < model.memory.weights < stored


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_cpu_holds_16_bits_as_float32(precision: str) -> None:
    memory = planned(on=CPU, precision=precision, context=64).memory
    matmuls = preset("gta-1b").parameters * 4
    assert matmuls < memory.weights < 1.01 * matmuls
    assert memory.loading == 4 * 128256 * 1280


def test_a_cpu_reads_a_tied_table_in_float32_twice() -> None:
    weights = [planned(on=CPU, precision=precision, context=1).memory.weights for precision in ("fp32", "bf16")]
    assert weights[0] - weights[1] == pytest.approx(4 * 128256 * 1280, rel=1e-3)


def test_the_peak_is_while_loading_where_that_takes_more() -> None:
    memory = planned(on=CPU, precision="bf16", context=1).memory
    assert memory.loading > memory.cache + memory.activations
    assert memory.peak == memory.runtime + memory.weights + memory.loading


# --- what fits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", [BOARD, CPU], ids=["gpu", "cpu"])
@pytest.mark.parametrize("batch", [1, 3, 40])
@pytest.mark.parametrize("name", ["gta-1b", "gqa-1b"])
def test_the_longest_context_is_exactly_the_edge(name: str, batch: int, on: Device) -> None:
    found = planned(name, on, batch=batch, context=1).max_context
    assert 1 <= found < 32768 or (name, batch) in {("gta-1b", 1), ("gta-1b", 3), ("gqa-1b", 1)}
    assert planned(name, on, batch=batch, context=found).fits
    if found < 32768:
        beyond = planned(name, on, batch=batch, context=found + 1)
        assert not beyond.fits
        assert beyond.left_bytes < 0


def test_the_largest_batch_is_exactly_the_edge() -> None:
    found = planned(context=8192).max_batch
    assert 1 < found < LARGEST_BATCH
    assert planned(context=8192, batch=found).fits
    assert not planned(context=8192, batch=found + 1).fits


def test_nothing_fits() -> None:
    small = planned(on=replace(BOARD, memory_bytes=1_100_000_000))
    assert (small.fits, small.max_context, small.max_batch) == (False, 0, 0)


def test_all_positions_fit() -> None:
    large = planned(on=replace(BOARD, memory_bytes=10**12))
    assert (large.fits, large.max_context, large.max_batch) == (True, 32768, LARGEST_BATCH)


@given(limit=st.integers(1, 10**6), edge=st.integers(0, 10**6))
def test_largest(limit: int, edge: int) -> None:
    assert largest(limit, lambda n: n <= edge) == min(limit, edge)


@given(
    name=st.sampled_from(PRESETS),
    precision=st.sampled_from(["fp32", "bf16", "int8", "int4"]),
    context=st.integers(1, 32767),
    batch=st.integers(1, LARGEST_BATCH - 1),
    on=st.sampled_from([BOARD, CPU]),
)
def test_more_takes_more(name: str, precision: str, context: int, batch: int, on: Device) -> None:
    here = planned(name, on, precision, context=context, batch=batch, prompt=1)
    for longer in (here.at(context + 1), replace(here, batch=batch + 1)):
        assert longer.memory.peak >= here.memory.peak
        assert longer.memory.cache > here.memory.cache
        assert longer.decode.seconds > here.decode.seconds


@given(context=st.integers(1, 32768))
def test_gta_never_takes_more_cache_than_gqa(context: int) -> None:
    gta, gqa = planned("gta-1b", context=context), planned("gqa-1b", context=context)
    assert gta.memory.cache * 640 == gqa.memory.cache * 192


def test_answers_to_one_prompt_hold_and_read_it_once() -> None:
    one, four = planned(context=2176, prompt=2048), planned(context=2176, prompt=2048, answers=4)
    held = 2048 + 4 * 128
    assert four.memory.cache == planned(context=held).memory.cache
    assert four.memory.cache < 0.35 * planned(context=2176, batch=4).memory.cache
    assert four.prefill.seconds == one.prefill.seconds
    weights, caches = (
        [sum(timed.operator.__getattribute__(kind) for timed in plan.decode.operators) for plan in (one, four)]
        for kind in ("weight_bytes", "cache_bytes")
    )
    assert weights[0] == pytest.approx(weights[1], rel=1e-4)  # but for rows of the embedding
    assert caches[1] / caches[0] == pytest.approx(held / 2176, rel=0.01)
    assert 2176 < four.max_context < one.max_context


def test_a_cache_of_8_bits_takes_less() -> None:
    caches = [planned(cache_dtype=cache).memory.cache for cache in ("fp16", "int8", "fp8")]
    assert caches[0] > caches[1] == caches[2]


# --- time ------------------------------------------------------------------------------------------------------------


def test_a_token_at_half_of_50_gb_per_second() -> None:
    plan = planned("gqa-1b", precision="fp16", context=1000)
    # every weight once but for the table's other rows, a cache of 1000 and a new token; activations are below 1%
    size = 2 * preset("gqa-1b").parameters + 1001 * 69120
    assert plan.decode.seconds == pytest.approx(size / 25e9, rel=0.01)
    assert plan.decode.bound == "bandwidth"


def test_a_prompt_at_half_of_8_teraflops() -> None:
    plan = planned("gqa-1b", replace(BOARD, bandwidth=1e18), "fp16", context=2048)
    config = preset("gqa-1b")
    per_token = 2 * (config.parameters - 128256 * 1280 - 109 * 1280)  # no norms, and the head for the last position
    flops = 2048 * per_token + 2 * 128256 * 1280 + 54 * 5120 * 2048 * 2049 // 2
    assert plan.prefill.seconds == pytest.approx(flops / 4e12, rel=1e-6)
    assert plan.prefill.bound == "compute"


def test_an_operator_takes_the_longer_of_bytes_and_flops() -> None:
    phase = planned(context=4096).prefill
    kinds = {timed.bound for timed in phase.operators}
    assert kinds == {"bandwidth", "compute"}
    longer = math.fsum(max(t.bandwidth_s, t.compute_s) for t in phase.operators)
    assert phase.seconds == pytest.approx(longer, rel=1e-12)


def test_operators_that_take_time_by_themselves() -> None:
    slow = planned(on=replace(BOARD, operator_s=1.0), context=1024)
    assert slow.decode.overhead_s == 36 * 54
    assert slow.prefill.overhead_s == 2 * 36 * 54  # two chunks of 512
    assert slow.decode.bound == slow.prefill.bound == "overhead"


def test_efficiency_scales_time() -> None:
    half, full = planned(context=4096), planned(on=replace(BOARD, efficiency=1.0), context=4096)
    assert half.decode.seconds == pytest.approx(2 * full.decode.seconds)
    assert half.prefill.seconds == pytest.approx(2 * full.prefill.seconds)


def test_the_gap_between_gta_and_gqa_opens_with_the_context() -> None:
    ratios = [
        planned("gqa-1b", context=n, prompt=1).decode.seconds / planned("gta-1b", context=n, prompt=1).decode.seconds
        for n in (128, 2048, 32768)
    ]
    assert ratios[0] == pytest.approx(1, abs=0.02)
    assert ratios == sorted(ratios)
    assert ratios[2] > 2


# --- what makes no sense ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 32769}, "--context is 32769; gta-1b has positions for 1 to 32768"),
        ({"context": 0}, "--context is 0"),
        ({"batch": 0}, "--batch is 0; expected 1 to 256"),
        ({"batch": 257}, "--batch is 257"),
        ({"context": 10, "prompt": 11}, "--prompt is 11; expected 1 to the context, 10"),
        ({"prompt": 0}, "--prompt is 0"),
        ({"answers": 0}, "--n is 0; expected 1 to 256"),
        ({"answers": 2}, "--n is 2 with a prompt as long as the context, 4096; give --prompt"),
        (
            {"answers": 2, "prompt": 9, "cache_dtype": "int4"},
            "answers are branches, and a cache of int4 has none; take",
        ),
    ],
)
def test_options_that_make_no_plan(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned(**options)


@pytest.mark.parametrize(
    ("name", "on", "precision", "cache_dtype", "allowed"),
    [
        ("gta-1b", CPU, "int4", "fp16", "fp32 or int8"),
        ("gqa-1b", BOARD, "int4", "bf16", "fp16 or int8 or fp8 or int4 or int4v2"),
        ("gta-1b", BOARD, "bf16", "fp16", "bf16 or int8 or fp8 or int4 or int4v2"),
    ],
)
def test_a_cache_that_is_not_possible(name: str, on: Device, precision: str, cache_dtype: str, allowed: str) -> None:
    with pytest.raises(InputError, match=f"a cache of {cache_dtype} is not possible .* expected {allowed}$"):
        planned(name, on, precision, cache_dtype)


def test_defaults() -> None:
    assert (planned().context, planned().prompt, planned().batch) == (4096, 4096, 1)
    short = preset("gta-1b").replace(max_position_embeddings=2048)
    execution = fastest_on("gpu").execution(short, "bf16")
    assert make_plan(Model.of("short", short, "bf16"), BOARD, execution).context == 2048
