"""Sessions of an engine whose cache is in int4 or int4v2, on the simulation of TensorRT and CUDA.

What the plugin computes is NumPy's here (``block_engine``); all else is as on a GPU: capacities, which tokens a step is
given, where the tensors of the cache lie, and what truncate and rows that are taken out and put back do to them.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from gta_edge.errors import BackendError, CapacityError, EngineError, InputError
from gta_edge.export.pipeline import export_model
from gta_edge.formats.bundle import Bundle
from gta_edge.model.config import parse_config
from gta_edge.model.decoder import Decoder
from gta_edge.plugins.attention.definition import Features
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.registry import open_session
from gta_edge.runtime.tensorrt.build import check_spec, lower_only, managed_spec
from gta_edge.runtime.tensorrt.engine import EngineSpec
from gta_edge.runtime.tensorrt.lower import lower
from gta_edge.runtime.tensorrt.session import TensorRTSession
from gta_edge.runtime.torch.session import TorchSession
from tests.helpers import reference
from tests.helpers import tensorrt_simulator as simulator
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.tensorrt_simulator import open_simulated

LENGTH, ROWS, CHUNK, VOCAB = 100, 3, 40, 61
SIZES = {"vocab_size": VOCAB, "max_position_embeddings": 120, "intermediate_size": 48, "num_hidden_layers": 2}
MODELS = {
    "gta": reference.gta_entries(heads=4, n_q=2, n_k=2, n_c=1, d_k=16, d_l=64, e=1, **SIZES),
    "gqa": reference.llama_entries(heads=2, n_kv=2, d_h=64, **SIZES),
}
KINDS = [("gta", "int4"), ("gqa", "int4v2")]
SPEC = EngineSpec("tensorrt", "fp16", "int4", max_length=LENGTH, max_batch=ROWS, chunk_size=CHUNK)


@functools.cache
def weights_of(model: str) -> dict[str, np.ndarray]:
    return reference.random_weights(MODELS[model])


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``engines("gta", "int4")`` is a bundle with an engine; made once."""

    @functools.cache
    def built(model: str, cache: str) -> Bundle:
        directory = tmp_path_factory.mktemp("blocks")
        write_checkpoint(directory / "checkpoint", MODELS[model], weights_of(model))
        bundle = export_model(directory / "checkpoint", directory / "bundle", verify=False).bundle
        simulator.build(bundle, replace(SPEC, cache_dtype=cache), directory / "lowered")
        return bundle

    return built


def opened(bundle: Bundle, **options: Any) -> TensorRTSession:
    return open_simulated(bundle, "tensorrt", **options)


def prompt(rows: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCAB, (rows, tokens))


@pytest.mark.parametrize(("model", "cache"), KINDS)
def test_how_tokens_come_changes_no_bit(engines: Any, model: str, cache: str) -> None:
    """At once, in chunks of any size and one by one, alone and beside others: the same logits and the same cache."""
    ids = prompt(ROWS, 75)
    lengths = np.array([75, 40, 62])
    with opened(engines(model, cache)) as session:
        assert session.cache_dtype == cache
        together = session.forward(ids, lengths=lengths, all_logits=True)
        saved = [session.export_cache(row) for row in range(ROWS)]
    for row, parts in ((0, (31, 1, 1, 30, 12)), (1, (40,)), (2, (1,) * 62)):
        with opened(engines(model, cache), chunk_size=25) as session:
            ends = np.cumsum(parts)
            alone = [
                session.forward(ids[row : row + 1, end - count : end], all_logits=True)[0]
                for count, end in zip(parts, ends, strict=True)
            ]
            np.testing.assert_array_equal(np.concatenate(alone), together[row, : lengths[row]])
            again = session.export_cache()
            for name, array in saved[row].tensors.items():
                np.testing.assert_array_equal(again.tensors[name], array, err_msg=name)


@pytest.mark.parametrize(("model", "cache"), KINDS)
def test_logits_are_those_of_pytorchs_cache(engines: Any, model: str, cache: str) -> None:
    """But for float16: PyTorch computes in float32, so that a few codes are others by one."""
    weights = weights_of(model)
    decoder = Decoder(parse_config(MODELS[model]), biases={name for name in weights if name.endswith(".bias")})
    decoder.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()}, strict=True)
    ids = prompt(2, 90)
    sessions = opened(engines(model, cache)), TorchSession(decoder, cache_dtype=cache), TorchSession(decoder)
    found, expected, unrounded = (each.forward(ids, all_logits=True) for each in sessions)
    assert reference.relative_error(found[:, :32], expected[:, :32]) <= 1e-2  # every key and value as it is
    quantised = np.square((expected - unrounded)[:, 32:]).mean()
    assert np.square((found - expected)[:, 32:]).mean() <= 0.05 * quantised
    for each in sessions:
        each.close()


@pytest.mark.parametrize(("model", "cache"), KINDS)
def test_truncate(engines: Any, model: str, cache: str) -> None:
    """Within the open block without a trace; in a closed one, its rows are what its codes stand for."""
    ids = prompt(2, 80)
    with opened(engines(model, cache)) as session:
        session.forward(ids)
        session.truncate(70)
        again = session.forward(ids[:, 70:80], all_logits=True)
        session.reset()
        np.testing.assert_array_equal(session.forward(ids, all_logits=True)[:, 70:], again)

        before = session.export_cache(0)
        session.truncate([45, 80])
        reopened, other = session.export_cache(0), session.export_cache(1)
        values = reopened.tensors["key_open.1"].astype(np.float64)[0, :, :13]
        codes, scales = (before.tensors[name][0, :, 1] for name in ("key.1", "key_scale.1"))
        scale, minimum = scales.astype(np.float64)[:, :1], scales.astype(np.float64)[:, 1:]
        word = np.ascontiguousarray(codes).view("<u2")  # [n, d, 8]: token 8 n + w in bits 4 n of word w
        for token in range(13):
            code = word[..., token % 8] >> 4 * (token // 8) & 15
            expected = (code * scale[:, 0] + minimum[:, 0]).astype(np.float16)
            np.testing.assert_array_equal(values[:, token], expected)
        assert not np.array_equal(values, before.tensors["key_open.1"][0, :, :13])
        session.forward(ids[:, 45:50], lengths=[5, 0])
        for name, array in other.tensors.items():  # the other sequence is as it was
            np.testing.assert_array_equal(session.export_cache(1).tensors[name], array)


def test_a_row_of_a_batch_whose_last_piece_is_a_token(engines: Any) -> None:
    """A step of one token is a graph of the rows from the first on; this one is not."""
    ids = prompt(2, 33)
    with opened(engines("gta", "int4")) as session:
        expected = session.forward(ids, all_logits=True)
        session.reset()
        session.forward(ids[:, :10], lengths=[10, 0])
        np.testing.assert_array_equal(session.forward(ids, lengths=[0, 33], all_logits=True)[1], expected[1])
        found = session.forward(ids[:, 10:], lengths=[23, 0], all_logits=True)
        np.testing.assert_array_equal(found[0], expected[0, 10:])


def test_a_sequence_is_taken_out_and_put_back(engines: Any) -> None:
    ids = prompt(2, 90)
    with opened(engines("gta", "int4")) as session:
        session.forward(ids[:, :70])
        saved = session.export_cache(1)
        expected = session.forward(ids[:, 70:], all_logits=True)[1]
        session.reset()
        session.forward(ids[:, :1])
        session.import_cache(saved, 0)
        session.truncate([70, 0])
        found = session.forward(ids[[1, 1], 70:], lengths=[20, 1], all_logits=True)[0]
        np.testing.assert_array_equal(found, expected)


def test_memory_is_whole_blocks(engines: Any) -> None:
    bundle = engines("gta", "int4")
    with opened(bundle) as session:
        keys, latents = 2 * 128 * (16 // 2) + 2 * 4 * 2 * 16 * 2, 128 * (64 // 2) + 128 * 2 * 2  # of 4 blocks
        assert session.cache_bytes == 2 * ROWS * (keys + latents + 2 * 32 * (2 * 16 + 64))
        assert session.cache_bytes == session._spec.cache_bytes(bundle.config)
        assert session.max_length == LENGTH


def test_what_is_refused(engines: Any) -> None:
    bundle = engines("gta", "int4")
    with pytest.raises(EngineError, match=r"caches in int4, not in int8; run: gta-edge build .* --cache-dtype int8 "):
        opened(bundle, cache_dtype="int8")
    for asked in ({}, {"cache_dtype": "int4"}):
        with pytest.raises(InputError, match="h2o moves rows one by one, and a cache of int4 is quantised in blocks"):
            opened(bundle, cache=policy("h2o", rows=20), **asked)
    with pytest.raises(BackendError, match=r"tensorrt-rtx has no cache of int4 for GTAForCausalLM in .*; expected "):
        open_session(bundle, "tensorrt-rtx", cache_dtype="int4")
    with pytest.raises(
        InputError, match=r"a cache of 'int4' is not possible with --engine tensorrt-rtx .* expected fp16"
    ):
        check_spec(bundle, replace(SPEC, engine="tensorrt-rtx"))
    with pytest.raises(InputError, match="h2o moves rows one by one"):
        managed_spec(bundle, SPEC, policy("h2o", rows=20))


def test_a_graph_is_of_whole_blocks(engines: Any, tmp_path: Path) -> None:
    bundle = engines("gta", "int4")
    graph = onnx.load(lower_only(bundle, SPEC, tmp_path / "model"), load_external_data=False).graph
    shapes = {each.name: [size.dim_value for size in each.type.tensor_type.shape.dim] for each in graph.input}
    expected = SPEC.input_shapes(bundle.config, batch=0, tokens=0, positions=0)
    assert shapes["past_latent.1"] == list(expected["past_latent.1"]) == [0, 1, 128, 32]
    assert shapes["past_key.0"] == list(expected["past_key.0"]) == [0, 2, 4, 16, 16]
    with pytest.raises(CapacityError, match="the capacity is 100 tokens; expected whole blocks of 32 in int4"):
        lower(bundle, tmp_path / "other", compute="fp16", cache_dtype="int4", capacity=100)
    features = Features(has_positions=True)
    with pytest.raises(InputError, match="a cache in int4 is not managed"):
        lower(bundle, tmp_path / "other", compute="fp16", cache_dtype="int4", capacity=96, features=features)
