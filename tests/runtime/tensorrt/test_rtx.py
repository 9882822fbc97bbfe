"""Bundles in TensorRT's parser and builder, which need no GPU: are they taken, and do weights stay as they are stored?

An engine holds weights in the form in which its kernels read them. What the builder cannot keep in codes it unpacks
without a word; only the size of the engine tells. Engines here have both profiles of a session, for single tokens and
for chunks of a prompt, so their size also tells whether the two share the weights.
"""

import functools
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest

from gta_edge.export.pipeline import export_model
from gta_edge.formats.bundle import Bundle
from gta_edge.formats.random_checkpoint import initialise
from gta_edge.libraries.tensorrt import load
from gta_edge.model.config import ModelConfig
from gta_edge.model.presets import PRESETS, preset
from gta_edge.numerics.quantization import BITS, BLOCK_SIZES
from gta_edge.runtime.tensorrt.build import profile_shapes
from gta_edge.runtime.tensorrt.builder import Target, build_plan
from gta_edge.runtime.tensorrt.engine import EngineSpec
from gta_edge.runtime.tensorrt.lower import lower

pytest.importorskip("tensorrt_rtx", reason="the parser and the builder of the package tensorrt-rtx are needed")

CAPACITY, TOKENS, BATCH = 64, 32, 2
SCALE_BYTES = 2 + 2 * 4
"""A float16 scale in the model; the engine has it in float32, in the worst case once for each profile."""


def spec(compute: str) -> EngineSpec:
    return EngineSpec("tensorrt-rtx", compute, compute, max_length=CAPACITY, max_batch=BATCH, chunk_size=TOKENS)


def engine_bytes(bundle: Bundle, directory: Path, compute: str) -> int:
    """Build an engine for decode and prefill, and return its size."""
    options = {"form": "function", "compute": compute, "capacity": CAPACITY}
    model = lower(bundle, directory, **options)
    target = Target(load("tensorrt-rtx"), ("8.6",), None)
    return build_plan(model, spec(compute), profile_shapes(bundle, spec(compute)), target).nbytes


def weights(config: ModelConfig) -> int:
    """Count the weights that int8 and int4 quantise: all matrices but the value decoder."""
    shapes = config.parameter_shapes()
    return sum(prod(shape) for name, shape in shapes.items() if len(shape) == 2 and "v_b_proj" not in name)


def per_code(engine: int, floats: int, config: ModelConfig) -> float:
    """Return the bytes of an engine per quantised weight, without all that an engine with 16-bit weights has too."""
    rest = floats - 2 * weights(config)
    # A tied table lies in a bundle twice if it is quantised: as the head's matrix, and packed for the lookup.
    return (engine - rest) / (weights(config) + config.tie_word_embeddings * config.vocab_size * config.hidden_size)


Size = Callable[..., int]


@pytest.fixture(scope="module")
def size(tmp_path_factory: pytest.TempPathFactory) -> Size:
    """``size("gta-1b", "int4", "fp16")`` returns the bytes of an engine of one layer of a preset."""
    directory = tmp_path_factory.mktemp("tensorrt")

    @functools.cache
    def engine(name: str, precision: str, compute: str, block_size: int | None = None) -> int:
        checkpoint, bundle = directory / name, directory / f"{name}-{precision}-{block_size}"
        if not checkpoint.exists():
            initialise(CONFIGS[name], checkpoint)
        if not bundle.exists():
            tables = "int4" if precision == "int4" else None  # as wide as all matrices, so that bytes can be told apart
            options = {"precision": precision, "block_size": block_size, "embedding_precision": tables}
            export_model(checkpoint, bundle, **options, verify=False)
        return engine_bytes(Bundle.open(bundle), bundle.with_name(f"{bundle.name}-{compute}"), compute)

    return engine


CONFIGS = {
    name: preset(name).replace(num_hidden_layers=1, vocab_size=512, max_position_embeddings=CAPACITY)
    for name in PRESETS
}


def stored() -> list[tuple[str, str]]:
    """Each preset in float16 and in one type that is quantised, in turn; the smallest of either kind in all four."""
    found = []
    for i, name in enumerate(CONFIGS):
        every = name in ("gta1-160m", "gqa-160m")
        found += [(name, precision) for precision in ("fp16", "bf16", "int8", "int4")
                  if every or precision in ("fp16", ("int4", "int8")[i % 2])]  # fmt: skip
    return found


@pytest.mark.parametrize(("name", "precision"), stored())
def test_every_preset_is_built_with_its_weights_as_they_are_stored(size: Size, name: str, precision: str) -> None:
    config = CONFIGS[name]
    if precision in BITS:
        found = per_code(size(name, precision, "fp16"), size(name, "fp16", "fp16"), config)
        codes, per_scale = BITS[precision] / 8, 32 if precision == "int4" else config.hidden_size
        assert codes * 0.99 < found < 1.02 * (codes + SCALE_BYTES / per_scale)
    else:  # once, not for each profile, but for small ones that one of them merges
        assert 2 < size(name, precision, precision) / weights(config) < 2.8


@pytest.mark.parametrize(
    ("precision", "block_size", "compute"),
    [
        *(("int4", block, ("fp16", "bf16")[i % 2]) for i, block in enumerate(BLOCK_SIZES)),
        pytest.param(
            "int8",
            32,
            "bf16",
            marks=pytest.mark.xfail(
                raises=AssertionError, reason="matrices that share an input are merged, and for that unpacked"
            ),
        ),
    ],
)
def test_blocks_of_every_size_stay_codes(size: Size, precision: str, block_size: int, compute: str) -> None:
    name, codes = "gta1-160m", BITS[precision] / 8
    found = per_code(size(name, precision, compute, block_size), size(name, compute, compute), CONFIGS[name])
    assert codes * 0.99 < found < codes + SCALE_BYTES / block_size


def test_an_engine_can_unpack_weights(size: Size) -> None:
    """What the tests above would see of codes that are not kept: here two bytes become four."""
    assert size("gta1-160m", "bf16", "fp32") / weights(CONFIGS["gta1-160m"]) > 4
