"""int8 and int4 bundles on the `torch` backend: read from their files, in codes or dequantised."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
import torch

import gta_edge
from gta_edge.accuracy.reference import build_decoder
from gta_edge.accuracy.tolerance import COMPUTE_BOUNDS, difference
from gta_edge.export.pipeline import export_model
from gta_edge.formats.bundle import Bundle
from gta_edge.graph.weights import read_stored, read_weights
from gta_edge.model.decoder import Decoder
from gta_edge.model.quantized_decoder import QuantizedLinears, build_packed_decoder
from gta_edge.numerics.quantization import QuantizedMatrix
from gta_edge.runtime.torch.session import TorchSession, load_decoder
from tests.helpers import reference
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.stored_models import StoredModel

VOCAB = 89
SMALL = {"vocab_size": VOCAB, "max_position_embeddings": 100, "intermediate_size": 256}
ENTRIES = reference.gta_entries(heads=4, n_q=4, n_k=2, n_c=1, d_k=16, d_l=16, e=2, **SMALL)
UNTIED = reference.llama_entries(heads=4, n_kv=4, d_h=32, tie_word_embeddings=False, **SMALL)
CASES = {"gta, int4": (ENTRIES, "int4", None), "gta, int8": (ENTRIES, "int8", None), "mha, int8": (UNTIED, "int8", 128)}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """The bundle of a case; not to be changed."""

    @lru_cache
    def bundle_of(name: str) -> Bundle:
        (entries, precision, block_size), directory = CASES[name], tmp_path_factory.mktemp("packed")
        write_checkpoint(directory / "checkpoint", entries, reference.random_weights(entries))
        options = {"precision": precision, "block_size": block_size, "verify": False}
        return export_model(directory / "checkpoint", directory / "bundle", **options).bundle

    return bundle_of


@pytest.fixture
def bundle(case: str, bundles: Callable[[str], Bundle]) -> Bundle:
    return bundles(case)


def packed(bundle: Bundle) -> Decoder:
    return build_packed_decoder(bundle.config, read_stored(bundle.model_path, bundle.config))


def prompt(tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (1, tokens))


def assert_right(session: TorchSession, bundle: Bundle, compute: str) -> None:
    """Near to the bundle dequantised, in float32 on the CPU."""
    ids = prompt(30)
    with TorchSession(build_decoder(bundle.config, read_weights(bundle.model_path, bundle.config))) as peer:
        wanted = peer.forward(ids, all_logits=True)
    assert difference(session.forward(ids, all_logits=True), wanted).max_rel_error <= COMPUTE_BOUNDS[compute]


@every_case
def test_a_bundle_holds_what_its_quantised_parameters_are(bundle, case):
    """So what is tested of them without a bundle is true of bundles."""
    entries, precision, block_size = CASES[case]
    wanted = dict(StoredModel(entries, reference.random_weights(entries), precision, block_size).stored())
    found = dict(read_stored(bundle.model_path, bundle.config))
    assert found.keys() == wanted.keys()
    for name, stored in found.items():
        peer = wanted[name]
        if not isinstance(stored, QuantizedMatrix):
            np.testing.assert_array_equal(stored, peer)
            continue
        assert (stored.bits, stored.block_size) == (peer.bits, peer.block_size)
        np.testing.assert_array_equal(stored.codes, peer.codes)
        np.testing.assert_array_equal(stored.scales, peer.scales)


@every_case
def test_a_bundle_in_codes_is_the_bundle(bundle):
    with TorchSession(packed(bundle)) as session:
        assert_right(session, bundle, "fp32")


def test_loading_holds_one_dequantised_matrix_at_most(tmp_path):
    """What numpy takes while the model is built, beside the codes: less than its largest matrix in float32."""
    entries = reference.gta_entries(heads=4, n_q=4, n_k=1, n_c=1, d_k=32, d_l=64, e=1, **SMALL)
    entries |= {"num_hidden_layers": 8, "vocab_size": 2048, "intermediate_size": 512}
    write_checkpoint(tmp_path / "checkpoint", entries, reference.random_weights(entries))
    bundle = export_model(tmp_path / "checkpoint", tmp_path / "bundle", precision="int4", verify=False).bundle
    packed(bundle)  # what is imported and cached at first is so now
    tracemalloc.start()
    model = packed(bundle)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert model.config.vocab_size == 2048
    shapes = bundle.config.parameter_shapes().values()
    largest = max(4 * int(np.prod(shape)) for shape in shapes)
    whole = sum(4 * int(np.prod(shape)) for shape in shapes)
    bound = 1.2 * packed_bytes(bundle) + 1.5 * largest + 2**21  # and the graph's own objects
    assert bound < whole / 2  # or it would say nothing
    assert peak <= bound


def packed_bytes(bundle: Bundle) -> int:
    """Bytes of the bundle's parameters: codes and scales once, all else in 16 bits."""
    total = 0
    for _, stored in read_stored(bundle.model_path, bundle.config):
        if isinstance(stored, QuantizedMatrix):
            total += stored.codes.size * stored.bits // 8 + stored.scales.nbytes
        else:
            total += 2 * stored.size
    return total


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_blocks_that_kernels_do_not_take_are_dequantised(tmp_path, precision):
    write_checkpoint(tmp_path / "checkpoint", ENTRIES, reference.random_weights(ENTRIES))
    options = {"precision": precision, "block_size": 16, "verify": False}
    bundle = export_model(tmp_path / "checkpoint", tmp_path / "bundle", **options).bundle
    model = packed(bundle)
    left = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinears)]
    assert left == (["packed_head"] if precision == "int4" else [])  # which is in int8, by channel
    with TorchSession(model) as session:
        assert_right(session, bundle, "fp32")


@every_case
def test_the_cpu_computes_with_dequantised_weights(bundle):
    model = load_decoder(bundle, "cpu", "fp32")
    assert not any(isinstance(module, QuantizedLinears) for module in model.modules())


# --- on a GPU --------------------------------------------------------------------------------------------------------

on_gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


@on_gpu
@needs_gpu
@every_case
def test_load_takes_codes_by_itself(bundle):
    with gta_edge.load(bundle.directory, backend="torch") as session:
        assert isinstance(session._model.packed_head, QuantizedLinears)
        assert_right(session, bundle, session.compute)


@on_gpu
@needs_gpu
@every_case
def test_in_float32_a_gpu_dequantises(bundle):
    with gta_edge.load(bundle.directory, backend="torch", compute="fp32") as session:
        assert session._model.packed_head is None
        assert_right(session, bundle, "fp32")
