"""Every architecture, from the checkpoint that transformers writes to tokens: the logits are those of its class."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest

from gta_edge.accuracy.reference import build_decoder, reference_logits
from gta_edge.export.pipeline import export_model
from gta_edge.formats.bundle import Bundle
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.weights import storage_for
from gta_edge.graph.weights import read_stored, read_weights
from gta_edge.model.architectures import ARCHITECTURES
from gta_edge.model.config import parse_config
from gta_edge.model.quantized_decoder import build_packed_decoder
from gta_edge.plan.cost import stored_bytes
from gta_edge.plugins.domain import DOMAIN
from gta_edge.runtime.onnxruntime.cuda_lower import cuda_model
from gta_edge.runtime.registry import load
from gta_edge.runtime.tensorrt.lower import lower as lower_for_tensorrt
from tests.helpers.architectures import CASES, IDS, entries_of, write
from tests.helpers.exported_graphs import empty_feeds, run

TOLERANCE = 1e-4  # largest error over the standard deviation of the logits
SLICES = [slice(0, 7), *(slice(i, i + 1) for i in range(7, IDS.shape[1]))]


class Written(NamedTuple):
    checkpoint: Path
    bundle: Path
    logits: np.ndarray


@pytest.fixture(scope="module", params=CASES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A checkpoint, its bundle in fp32, checked, and transformers' logits."""
    directory = tmp_path_factory.mktemp("architecture")
    logits = write(directory / "checkpoint", request.param)
    export_model(directory / "checkpoint", directory / "bundle", precision="fp32")
    return Written(directory / "checkpoint", directory / "bundle", logits)


def assert_near(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= TOLERANCE * expected.std()


def session_logits(bundle: Path, backend: str, **options: object) -> np.ndarray:
    """Logits of a prompt, and of single tokens after it."""
    with load(bundle, backend, threads=1, **options) as session:
        return np.concatenate([session.forward(IDS[:, each], all_logits=True) for each in SLICES], axis=1)


def test_there_is_a_case_of_every_architecture() -> None:
    assert {f"{family}ForCausalLM" for family, _ in CASES.values()} == set(ARCHITECTURES)


def test_the_decoder_gives_transformers_logits(written: Written) -> None:
    source = Checkpoint.open(written.checkpoint)
    model = build_decoder(source.config, ((name, source.read(name)) for name in source.names))
    assert_near(reference_logits(model, IDS), written.logits)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_a_prompt_and_single_tokens_give_transformers_logits(written: Written, backend: str) -> None:
    assert_near(session_logits(written.bundle, backend), written.logits)


def test_rows_of_different_length(written: Written) -> None:
    with load(written.bundle, "onnxruntime", threads=1) as session:
        session.forward(IDS[:, :8], lengths=np.array([8, 3]))
        found = session.forward(IDS[:, 8:10], all_logits=True)
    with load(written.bundle, "torch", threads=1) as session:
        alone = np.concatenate([IDS[1, :3], IDS[1, 8:10]])[None]
        expected = session.forward(alone, all_logits=True)[0, 3:]
    assert_near(found[0], written.logits[0, 8:10])
    assert_near(found[1], expected)


def test_what_is_stored_is_what_was_counted(written: Written) -> None:
    source, bundle = Checkpoint.open(written.checkpoint), Bundle.open(written.bundle)
    counted = stored_bytes(source.config, storage_for(source.config, "fp32"), source.names)
    assert abs(bundle.file_bytes["model.onnx.data"] - counted) <= 0.05 * counted  # tensors begin at whole pages
    assert dict(read_weights(bundle.model_path, bundle.config)).keys() == set(source.names)


@pytest.mark.parametrize("name", ["Llama, biased", "Qwen3, biased", "SmolLM3"])
def test_in_int4(name: str, tmp_path: Path) -> None:
    """With the weights that the bundle holds: the lowered graph, and the decoder whose matrices stay packed."""
    write(tmp_path / "checkpoint", name)
    bundle = export_model(tmp_path / "checkpoint", tmp_path / "bundle", precision="int4", verify=False).bundle
    expected = reference_logits(build_decoder(bundle.config, read_weights(bundle.model_path, bundle.config)), IDS)
    assert_near(session_logits(bundle.directory, "onnxruntime", exact=True), expected)
    packed = build_packed_decoder(bundle.config, read_stored(bundle.model_path, bundle.config))
    assert_near(reference_logits(packed, IDS), expected)


def test_engines_get_the_same_model(written: Written, tmp_path: Path) -> None:
    """What TensorRT-RTX parses, run by ONNX Runtime; and what TensorRT and CUDA get is well formed."""
    bundle = Bundle.open(written.bundle)
    path = lower_for_tensorrt(bundle, tmp_path / "function", form="function", compute="fp32", capacity=16)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert_near(run(session, empty_feeds(session, 2, 16), IDS, np.zeros(2, np.int64)), written.logits)
    path = lower_for_tensorrt(bundle, tmp_path / "plugin", compute="fp16", cache_dtype="int8", capacity=16)
    onnx.checker.check_model(path)
    nodes = [node for node in onnx.load(path, load_external_data=False).graph.node if node.domain == DOMAIN]
    assert len(nodes) == bundle.config.num_hidden_layers
    assert cuda_model(bundle, "fp16").graph.num_nodes() > 0


@pytest.mark.parametrize("name", CASES)
def test_the_config_is_written_as_it_is_read(name: str) -> None:
    config = parse_config(entries_of(name))
    assert parse_config(json.loads(json.dumps(config.to_dict()))) == config
