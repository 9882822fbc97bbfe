"""Bundles in TensorRT's parser and builder, which need no GPU: are they taken, and do weights stay as they are stored?

An engine holds weights in the form in which its kernels read them. What the builder cannot keep in codes it unpacks to
float32 without a word; only the size of the engine tells.
"""

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from gta_edge.bundle import Bundle
from gta_edge.config import ModelConfig
from gta_edge.export.initialise import initialise
from gta_edge.export.pipeline import export
from gta_edge.presets import preset
from gta_edge.quantization import BITS, BLOCK_SIZES

trt = pytest.importorskip("tensorrt_rtx", reason="the parser and the builder of the package tensorrt-rtx are needed")

CAPACITY, TOKENS, BATCH = 64, 32, 2
MODELS = {
    name: preset("gta1-160m").replace(
        num_hidden_layers=1, vocab_size=2048, max_position_embeddings=CAPACITY, tie_word_embeddings=tied
    )
    for name, tied in (("tied", True), ("untied", False))
}


class Messages(trt.ILogger):
    """Keeps the errors that TensorRT logs; it raises none."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.ERROR:
            self.errors.append(message)


def specialised(bundle: Bundle, directory: Path) -> Path:
    """Write a bundle's graph for one capacity, which KVCacheUpdate must know; batch and tokens stay dynamic."""
    model = ir.load(bundle.model_path)
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape([CAPACITY if size == "capacity" else size for size in value.shape])
    directory.mkdir()
    ir.save(model, directory / "model.onnx", external_data="model.onnx.data")
    return directory / "model.onnx"


def engine_bytes(path: Path) -> int:
    """Build an engine for prefill and decode, and return its size."""
    messages = Messages()
    builder = trt.Builder(messages)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, messages)
    assert parser.parse_from_file(str(path)), messages.errors
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    for value in (network.get_input(i) for i in range(network.num_inputs)):
        least = [1 if size < 0 else size for size in value.shape]
        most = [(BATCH, TOKENS)[axis] if size < 0 else size for axis, size in enumerate(value.shape)]
        profile.set_shape(value.name, least, least, most)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None, messages.errors
    return int(engine.nbytes)


def weights(config: ModelConfig) -> int:
    """Count the weights that int8 and int4 quantise: all matrices but the value decoder."""
    shapes = config.parameter_shapes()
    return sum(prod(shape) for name, shape in shapes.items() if len(shape) == 2 and "v_b_proj" not in name)


Size = Callable[[str, str, int | None], int]


@pytest.fixture(scope="module")
def size(tmp_path_factory: pytest.TempPathFactory) -> Size:
    """``size("tied", precision, block_size)`` returns the bytes of an engine."""
    directory = tmp_path_factory.mktemp("tensorrt")
    for model, config in MODELS.items():
        initialise(config, directory / model)

    def engine(model: str, precision: str, block_size: int | None) -> int:
        bundle = directory / f"{model}-{precision}-{block_size}"
        exported = export(directory / model, bundle, precision=precision, block_size=block_size, verify=False)
        return engine_bytes(specialised(exported.bundle, bundle / "specialised"))

    return engine


@pytest.fixture(scope="module")
def rest(size: Size) -> int:
    """The bytes of an engine beside the weights that are counted."""
    return size("tied", "fp32", None) - 4 * weights(MODELS["tied"])


@pytest.mark.parametrize(
    ("model", "precision", "block_size"),
    [
        *(("tied", "int4", block) for block in BLOCK_SIZES),
        ("untied", "int4", 32),
        ("tied", "int8", None),
        ("untied", "int8", None),
        pytest.param(
            "tied",
            "int8",
            32,
            marks=pytest.mark.xfail(
                raises=AssertionError, reason="matrices that share an input are merged, and for that unpacked"
            ),
        ),
    ],
)
def test_codes_stay_codes(size: Size, rest: int, model: str, precision: str, block_size: int | None) -> None:
    config = MODELS[model]
    # a tied table lies in a bundle twice: as the head's matrix, and packed for the lookup
    stored = weights(config) + config.tie_word_embeddings * config.vocab_size * config.hidden_size
    codes = BITS[precision] / 8
    scales = 4 / (block_size or config.hidden_size)  # the builder computes their Cast to float32
    assert codes < (size(model, precision, block_size) - rest) / stored < 1.02 * (codes + scales)


def test_an_engine_can_unpack_weights(size: Size, rest: int) -> None:
    """What the test above would see of codes that are not kept: here two bytes become four."""
    assert (size("tied", "bf16", None) - rest) / weights(MODELS["tied"]) > 2
