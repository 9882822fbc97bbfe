"""The `torch` backend on matrices that stay in codes: with the kernels on a GPU, without them on the CPU.

What it must be near to is the same model dequantised, in float32 on the CPU; how near is what
``gta_edge/accuracy/tolerance.py`` says of a backend that computes in this type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gta_edge.accuracy.reference import build_decoder
from gta_edge.accuracy.tolerance import COMPUTE_BOUNDS, difference
from gta_edge.errors import BundleError
from gta_edge.model.config import parse_config
from gta_edge.model.decoder import Decoder
from gta_edge.model.quantized_decoder import (
    PackedEmbedding,
    QuantizedLinear,
    QuantizedLinears,
    build_packed_decoder,
    is_packable,
)
from gta_edge.numerics.quantization import QuantizedMatrix
from gta_edge.runtime.torch.session import TorchSession, multiplies_codes
from tests.helpers import reference
from tests.helpers.stored_models import StoredModel
from tests.helpers.torch_graphs import WithoutGraph

P = 400
VOCAB = 89
SMALL = {"vocab_size": VOCAB, "max_position_embeddings": P, "intermediate_size": 256}


@dataclass(frozen=True)
class Case:
    """A model, how it is stored, and the widths of the matmuls in a layer's attention that take x."""

    entries: dict[str, Any]
    precision: str
    block_size: int | None
    calls: list[list[int]]
    biases: bool = True


ENTRIES: dict[str, dict[str, Any]] = {
    "gta": reference.gta_entries(heads=4, n_q=4, n_k=2, n_c=1, d_k=16, d_l=16, e=2, **SMALL),
    "untied": reference.gta_entries(
        heads=6, n_q=6, n_k=2, n_c=3, d_k=48, d_l=32, tie_word_embeddings=False, **{**SMALL, "intermediate_size": 192}
    ),
    "other widths": reference.gta_entries(heads=4, n_q=4, n_k=1, n_c=2, d_k=24, d_l=8, e=2, **SMALL),
    "as in gta-1b": reference.gta_entries(heads=20, n_q=5, n_k=1, n_c=1, d_k=64, d_l=128, e=2, **SMALL),
    "gqa": reference.llama_entries(heads=4, n_kv=2, d_h=16, **SMALL),
    "mha": reference.llama_entries(heads=4, n_kv=4, d_h=32, tie_word_embeddings=False, **SMALL),
}
CASES = {
    "gta, int4": Case(ENTRIES["gta"], "int4", None, [[64, 32, 16, 128]]),
    "gta, int8 per channel": Case(ENTRIES["gta"], "int8", None, [[64, 32, 16, 128]]),
    "untied, int4 without biases": Case(ENTRIES["untied"], "int4", 64, [[288, 96, 96, 192]], biases=False),
    # a call's parts end where a tile of 16 does, all but the last
    "other widths, int8": Case(ENTRIES["other widths"], "int8", 32, [[96, 24], [16, 64]]),
    "as in gta-1b, int4": Case(ENTRIES["as in gta-1b"], "int4", None, [[320, 64, 128, 1280]]),
    "gqa, int4": Case(ENTRIES["gqa"], "int4", 32, [[64, 32, 32]]),
    "mha, int8": Case(ENTRIES["mha"], "int8", 128, [[128, 128, 128]]),
}
HALVES = ("fp16", "bf16")
every_case = pytest.mark.parametrize("case", CASES)
in_halves = pytest.mark.parametrize("compute", HALVES)


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs a GPU."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
    return pytest.mark.gpu(skip(test))


@lru_cache
def model_of(name: str) -> StoredModel:
    """The parameters of a case; not to be changed."""
    case = CASES[name]
    weights = reference.random_weights(case.entries)
    weights = {n: w for n, w in weights.items() if case.biases or not n.endswith(".bias")}
    return StoredModel(case.entries, weights, case.precision, case.block_size)


@pytest.fixture
def quantised(case: str) -> StoredModel:
    return model_of(case)


def packed(quantised: StoredModel, device: str = "cpu") -> Decoder:
    return build_packed_decoder(quantised.config, quantised.stored(), device)


def dequantised(quantised: StoredModel) -> Decoder:
    return build_decoder(quantised.config, quantised.values())


def prompt(rows: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, tokens))


@lru_cache
def _expected(quantised: StoredModel, ids: bytes) -> np.ndarray:
    with TorchSession(dequantised(quantised)) as session:
        logits: np.ndarray = session.forward(np.frombuffer(ids, np.int64)[None], all_logits=True)[0]
    return logits


def expected(quantised: StoredModel, ids: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one row by the dequantised model in float32 on the CPU."""
    return _expected(quantised, np.asarray(ids, np.int64).tobytes())


def assert_near(found: np.ndarray, wanted: np.ndarray, compute: str) -> None:
    assert found.dtype == np.float32
    assert found.shape == wanted.shape
    assert difference(found, wanted).max_rel_error <= COMPUTE_BOUNDS[compute]


def assert_a_session_is_right(start: Callable[..., TorchSession], quantised: StoredModel, compute: str) -> None:
    """A prompt at once, in chunks and by token; rows of different length; truncated and filled again."""
    ids, lengths, more = prompt(3, 40), [40, 1, 20], prompt(3, 6, seed=1)
    wanted = np.stack([expected(quantised, row) for row in ids])
    session = start()
    assert_near(session.forward(ids, all_logits=True), wanted, compute)
    session.truncate(30)
    for t in range(30, 40):
        assert_near(session.forward(ids[:, t : t + 1]), wanted[:, t], compute)
    assert_near(start(chunk_size=7).forward(ids, all_logits=True), wanted, compute)
    by_token = start()
    found = np.stack([by_token.forward(ids[:, t : t + 1]) for t in range(12)], axis=1)
    assert_near(found, wanted[:, :12], compute)
    ragged = start(chunk_size=16)
    steps = [ragged.forward(ids, lengths=lengths)] + [ragged.forward(more[:, t : t + 1]) for t in range(6)]
    for row, length in enumerate(lengths):
        exact = expected(quantised, np.concatenate([ids[row, :length], more[row]]))
        assert_near(np.stack([logits[row] for logits in steps]), exact[length - 1 :], compute)


# --- on the CPU ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "compute"), [(case, each) for i, case in enumerate(CASES) for each in ("fp32", HALVES[i % len(HALVES)])]
)
def test_codes_give_the_logits_of_the_dequantised_model(quantised, compute):
    def start(**options: Any) -> TorchSession:
        return TorchSession(packed(quantised), compute=compute, **options)

    assert_a_session_is_right(start, quantised, compute)


@every_case
def test_what_becomes_one_call(quantised, case):
    model = packed(quantised)
    for layer in model.model.layers:
        for block, calls in (
            (layer.self_attn, CASES[case].calls),
            (layer.mlp, [[quantised.config.intermediate_size] * 2]),
        ):
            assert isinstance(block.projections, QuantizedLinears)
            assert [call.output_sizes for call in block.projections.calls] == calls
        for single in (layer.self_attn.o_proj, layer.mlp.down_proj):
            assert isinstance(single, QuantizedLinear)
            assert [call.output_sizes for call in single.calls] == [[quantised.config.hidden_size]]
    assert isinstance(model.packed_head, QuantizedLinears)
    assert [call.output_sizes for call in model.packed_head.calls] == [[VOCAB]]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert {name.rpartition(".")[2] for name in linear} <= {"v_b_proj"}  # which is never quantised


def tensors_of(model: Decoder) -> dict[int, torch.Tensor]:
    """Parameters and buffers by address: what is shared counts once."""
    every = [*model.parameters(), *(b for name, b in model.named_buffers() if name not in ("cos", "sin"))]
    return {tensor.data_ptr(): tensor for tensor in every if tensor.numel()}


def packed_bytes(quantised: StoredModel) -> int:
    """Bytes of the parameters: codes and scales once, all else in 16 bits."""
    total = 0
    for _, stored in quantised.stored():
        if isinstance(stored, QuantizedMatrix):
            total += stored.codes.size * stored.bits // 8 + stored.scales.nbytes
        else:
            total += 2 * stored.size
    return total


@pytest.mark.parametrize("case", ["as in gta-1b, int4"])
def test_weights_take_little_more_than_their_codes(quantised):
    model = TorchSession(packed(quantised), compute="bf16")._model
    assert sum(tensor.nbytes for tensor in tensors_of(model).values()) <= 1.1 * packed_bytes(quantised)


@every_case
def test_a_tied_embedding_is_the_heads_own_codes(quantised):
    model = packed(quantised).to(torch.bfloat16)  # a change of type copies what is converted
    embedding = model.model.embed_tokens
    assert isinstance(embedding, PackedEmbedding)
    (head,) = model.packed_head.calls
    tied = quantised.config.tie_word_embeddings
    assert (embedding.table.weight.data_ptr() == head.weight.data_ptr()) == tied
    table = dict(quantised.values())["model.embed_tokens.weight"]
    found = embedding(torch.arange(VOCAB)[None])[0]
    assert torch.equal(found, torch.from_numpy(table).bfloat16())


@every_case
def test_a_change_of_type_leaves_codes_and_scales_alone(quantised):
    before = {
        name: tensor.clone() for name, tensor in packed(quantised).named_buffers() if not tensor.is_floating_point()
    }
    after = dict(packed(quantised).to(torch.bfloat16).named_buffers())
    assert before
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def coded(inputs: int, outputs: int, bits: int, block_size: int) -> QuantizedMatrix:
    scales = np.ones((outputs, inputs // block_size if block_size else 1), np.float16)
    return QuantizedMatrix(np.ones((outputs, inputs), np.int8), scales, bits, block_size)


@pytest.mark.parametrize(
    ("matrix", "packable"),
    [
        (coded(64, 20, 4, 32), True),
        (coded(256, 3, 8, 128), True),
        (coded(72, 20, 8, 0), True),
        (coded(64, 20, 4, 16), False),
        (coded(64, 20, 8, 16), False),
        (coded(64, 20, 4, 0), False),
        (coded(76, 20, 8, 0), False),  # rows of x that are not aligned
    ],
)
def test_what_kernels_take(matrix, packable):
    assert is_packable(matrix) == packable


@pytest.mark.parametrize("case", ["gta, int4", "untied, int4 without biases"])
@pytest.mark.parametrize(
    "apart",
    [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_one_matrix_that_is_not_in_codes(quantised, apart):
    """A Linear layer stays among the others, in its place."""

    def weights() -> Iterator[tuple[str, Any]]:
        for name, stored in quantised.stored():
            yield name, stored.values if name == apart and isinstance(stored, QuantizedMatrix) else stored

    ids = prompt(2, 20)
    with TorchSession(build_packed_decoder(quantised.config, weights())) as session:
        found = session.forward(ids, all_logits=True)
    for row in range(2):
        assert_near(found[row], expected(quantised, ids[row]), "fp32")


@pytest.mark.parametrize("eight", [("q_proj", "up_proj"), ("k_proj", "g_proj", "embed_tokens"), ("v_proj",)])
def test_matrices_of_different_kinds_are_different_calls(eight):
    four, other = model_of("gta, int4"), model_of("gta, int8 per channel")

    def mixed(read: Callable[[StoredModel], Any]) -> Iterator[tuple[str, Any]]:
        for (name, stored), (same, wide) in zip(read(four), read(other), strict=True):
            assert name == same
            yield name, wide if any(part in name for part in eight) else stored

    ids = prompt(1, 20)
    model = build_packed_decoder(four.config, mixed(StoredModel.stored))
    kinds = [(call.bits, call.output_sizes) for call in model.model.layers[0].self_attn.projections.calls]
    assert {bits for bits, _ in kinds} == {4, 8}
    assert [size for _, sizes in kinds for size in sizes] == [64, 32, 16, 128]
    with TorchSession(model) as session:
        found = session.forward(ids, all_logits=True)
    with TorchSession(build_decoder(four.config, mixed(StoredModel.values))) as session:
        assert_near(found, session.forward(ids, all_logits=True), "fp32")


@pytest.mark.parametrize("case", ["gta, int4"])
def test_logits_on_the_cpu_are_not_rounded(quantised):
    with TorchSession(packed(quantised), compute="bf16") as session:
        logits = torch.from_numpy(session.forward(prompt(1, 5)))
    assert (logits != logits.bfloat16().float()).sum() > VOCAB / 2


@pytest.mark.parametrize("case", ["gta, int4"])
@pytest.mark.parametrize("kept", ["q_proj", "k_proj", "g_proj"])
def test_biases_that_only_some_matrices_have(quantised, kept):
    def without(weights: Any) -> Iterator[tuple[str, Any]]:
        return ((name, stored) for name, stored in weights if not name.endswith(".bias") or kept in name)

    ids = prompt(1, 20)
    config = quantised.config
    with TorchSession(build_packed_decoder(config, without(quantised.stored()))) as session:
        found = session.forward(ids, all_logits=True)
    with TorchSession(build_decoder(config, without(quantised.values()))) as session:
        assert_near(found, session.forward(ids, all_logits=True), "fp32")


@pytest.mark.parametrize("case", ["gta, int4"])
def test_nothing_wants_a_gradient(quantised):
    model = build_packed_decoder(quantised.config, quantised.stored())
    model.eval().requires_grad_(False)
    assert not any(tensor.requires_grad for tensor in (*model.buffers(), *model.parameters()))


@pytest.mark.parametrize("case", ["gta, int4", "mha, int8"])
def test_a_parameter_that_is_missing_is_named(quantised):
    name = "model.layers.1.mlp.up_proj.weight"
    weights = [pair for pair in quantised.stored() if pair[0] != name]
    with pytest.raises(BundleError, match=f"lack {name} and 0 more") as caught:
        build_packed_decoder(quantised.config, weights)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("precision", "device", "compute"),
    [("int4", "cpu", "fp32"), ("int4", "cpu", "bf16"), ("bf16", "cuda", "bf16"), ("int8", "cuda", "fp32")],
)
def test_where_there_are_no_kernels(precision, device, compute):
    assert not multiplies_codes(precision, device, compute)


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(quantised: StoredModel, compute: str) -> Iterator[Callable[..., TorchSession]]:
    """Start a session of the model at hand on the GPU."""
    started: list[TorchSession] = []

    def begin(**options: Any) -> TorchSession:
        model = packed(quantised, "cuda")
        session = TorchSession(model, device="cuda", compute=compute, **options)
        started.append(session)
        return session

    yield begin
    for session in started:
        session.close()


@on_gpu
@every_case
@in_halves
def test_a_session_on_the_gpu(start, quantised, compute):
    assert_a_session_is_right(start, quantised, compute)


@on_gpu
@every_case
@in_halves
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_kernels_do_the_products(start, quantised, case, compute, tokens, monkeypatch):
    from gta_edge.plugins.matmul import torch as matmul_torch

    variants = []
    real = matmul_torch.matmul_kernels

    def noted(variant: Any, gpu: Any) -> Any:
        variants.append(variant)
        return real(variant, gpu)

    monkeypatch.setattr(matmul_torch, "matmul_kernels", noted)
    start().forward(prompt(2, tokens))
    assert {variant.compute for variant in variants} == {compute, "fp16"}  # the head's
    assert {f"int{variant.bits}" for variant in variants} == {CASES[case].precision, "int8"}  # the tables'
    calls_per_layer = len(CASES[case].calls) + 3
    assert len(variants) >= calls_per_layer * quantised.config.num_hidden_layers + 1


@on_gpu
@every_case
@in_halves
def test_the_graph_is_the_step_without_it(start, quantised, compute, monkeypatch):
    ids = prompt(2, 200)

    def steps() -> np.ndarray:
        session = start()
        session.forward(ids[:, :40])
        return np.stack([session.forward(ids[:, t : t + 1]) for t in range(40, 200)], axis=1)

    graphed = steps()
    monkeypatch.setattr("gta_edge.runtime.torch.step_graphs.DecodeGraph", WithoutGraph)
    eager = steps()
    assert difference(graphed, eager).max_rel_error <= COMPUTE_BOUNDS[compute] / 2
    for row in range(2):
        assert_near(graphed[row], expected(quantised, ids[row])[40:], compute)


@on_gpu
@pytest.mark.parametrize("case", ["as in gta-1b, int4"])
@in_halves
def test_memory_on_the_gpu(start, quantised, compute):
    """Only codes, scales and what is never quantised lie there, and nothing dequantised is left of loading."""
    before = torch.cuda.memory_allocated()
    session = start()
    tables = sum(2 * table.nbytes for table in (session._model.cos, session._model.sin))
    assert torch.cuda.memory_allocated() - before <= 1.1 * packed_bytes(quantised) + tables
    assert {tensor.device.type for tensor in tensors_of(session._model).values()} == {"cuda"}


def test_the_cases_are_models():
    for case in CASES.values():
        assert parse_config(case.entries).hidden_size % 8 == 0
