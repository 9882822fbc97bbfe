"""What a model costs, against figures worked out by hand and against what an export really writes."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gta_edge
from gta_edge.errors import InputError
from gta_edge.formats.bundle import Bundle
from gta_edge.formats.random_checkpoint import initialise
from gta_edge.formats.weights import Storage, block_size_for, storage_for
from gta_edge.model.config import GQAConfig, GTAConfig, ModelConfig
from gta_edge.model.presets import preset
from gta_edge.plan.cost import Execution, Step, operators, read_bytes, stored_bytes
from tests.helpers.commands import ROOT

EXAMPLE = ROOT / "examples" / "tiny-gta"
GPU = Execution("fp16", "fp16", chunk_size=512)
CPU = Execution("fp32", "fp32", chunk_size=256, writes_scores=True, cpu_kernels=True)

# H 1280, n_q 5 of d_k 64 and d_l 128, one key and one latent head, FFN 3584, 54 layers, 128256 words
GTA_1B_LAYER = {
    "q_proj": 320 * 1280,
    "k_proj": 64 * 1280,
    "v_proj": 128 * 1280,
    "g_proj": 1280 * 1280,
    "v_b_proj": 5 * 128 * 256,
    "o_proj": 1280 * 1280,
    "mlp.gate_proj": 3584 * 1280,
    "mlp.up_proj": 3584 * 1280,
    "mlp.down_proj": 3584 * 1280,
}


def by_name(config: ModelConfig, step: Step, execution: Execution = GPU, precision: str = "bf16") -> dict:
    storage = storage_for(config, precision)
    return {op.name: op for op in operators(config, storage, execution, step)}


# --- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_stored_bytes_are_those_of_an_export(precision: str, tmp_path: Path) -> None:
    options = {"precision": precision, "verify": False}
    if precision == "int4":
        options["calibrate"] = "none"  # which changes codes, not their number, and takes most of an export
    bundle: Bundle = gta_edge.export_model(EXAMPLE, tmp_path / "bundle", **options).bundle
    assert stored_bytes(bundle.config, bundle.storage) == bundle.weight_bytes
    assert bundle.weight_bytes == (tmp_path / "bundle" / "model.onnx.data").stat().st_size


SMALL = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("config", "precision", "block_size"),
    [
        (GQAConfig(**SMALL, num_key_value_heads=2), "int4", 16),
        (
            GTAConfig(**SMALL, num_query_heads=2, num_key_heads=1, key_dim=32, num_latent_heads=2, latent_dim=64),
            "int8",
            64,
        ),
    ],
    ids=["gqa", "gta"],
)
def test_stored_bytes_of_an_untied_model_in_blocks(
    config: ModelConfig, precision: str, block_size: int, tmp_path: Path
) -> None:
    initialise(config, tmp_path / "checkpoint")
    options = {"precision": precision, "block_size": block_size, "verify": False}
    bundle: Bundle = gta_edge.export_model(tmp_path / "checkpoint", tmp_path / "bundle", **options).bundle
    assert stored_bytes(config, storage_for(config, precision, block_size)) == bundle.weight_bytes


@pytest.mark.parametrize("embedding", ["int8", "int4"])
def test_stored_bytes_of_an_int4_model_by_its_embedding(embedding: str, tmp_path: Path) -> None:
    options = {"precision": "int4", "embedding_precision": embedding, "calibrate": "none", "verify": False}
    bundle: Bundle = gta_edge.export_model(EXAMPLE, tmp_path / "bundle", **options).bundle
    assert bundle.storage == storage_for(bundle.config, "int4", None, embedding)
    assert stored_bytes(bundle.config, bundle.storage) == bundle.weight_bytes


def test_a_layer_in_int8_costs_what_it_is() -> None:
    config, step = preset("gta-1b"), Step(1, 1, 100)
    plain = storage_for(config, "int4")
    wide = replace(plain, int8=plain.int8 | {"model.layers.3.mlp.up_proj.weight"})
    values, blocks = 3584 * 1280, 3584 * 40
    more = values // 2 + 2 * 3584 - 2 * blocks  # half a byte more, one scale for 40
    assert stored_bytes(config, wide) - stored_bytes(config, plain) == more
    costs = [{op.name: op.weight_bytes for op in operators(config, each, GPU, step)} for each in (plain, wide)]
    assert {name for name in costs[0] if costs[0][name] != costs[1][name]} == {"mlp.up_proj"}
    assert costs[1]["mlp.up_proj"] - costs[0]["mlp.up_proj"] == more


@pytest.mark.parametrize(
    ("precision", "embedding", "message"),
    [
        ("int8", "int8", "precision is int8; a precision of the embedding goes with int4"),
        ("int4", "fp16", "the embedding's precision is 'fp16'; expected one of int8, int4"),
    ],
)
def test_an_embedding_that_does_not_go(precision: str, embedding: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        storage_for(preset("gta-1b"), precision, None, embedding)


def test_an_absent_bias_is_not_stored() -> None:
    config = preset("gta-1b")
    names = [name for name in config.parameter_shapes() if not name.endswith("g_proj.bias")]
    assert stored_bytes(config, Storage("bf16")) - stored_bytes(config, Storage("bf16"), names) == 54 * 1280 * 4


@pytest.mark.parametrize(
    ("precision", "block_size", "message"),
    [
        ("int3", None, "precision is 'int3'; expected one of fp32, fp16, bf16, int8, int4"),
        ("bf16", 32, "has no blocks"),
        ("int4", 48, "block size is 48; expected one of 16, 32, 64, 128"),
    ],
)
def test_a_block_size_that_does_not_go(precision: str, block_size: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        block_size_for(preset("gta-1b"), precision, block_size)


def test_block_sizes_are_the_exports() -> None:
    assert [block_size_for(preset("gta-1b"), name) for name in ("fp32", "int8", "int4")] == [None, None, 32]


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "block", "execution", "expected"),
    [
        ("bf16", None, GPU, 2 * 128 * 256),
        ("fp32", None, CPU, 4 * 128 * 256),
        ("bf16", None, CPU, 4 * 128 * 256),
        ("int4", 32, GPU, 128 * 256 // 2 + 2 * 128 * 8),
        ("int8", None, GPU, 128 * 256 + 2 * 128),
        ("int4", 32, CPU, 128 * 256 // 2 + 8 * 128 * 8),  # three quarters of a byte
        ("int8", None, CPU, 128 * 256 + 8 * 128),  # one block of 256
    ],
)
def test_what_a_product_reads(precision: str, block: int | None, execution: Execution, expected: int) -> None:
    assert read_bytes((128, 256), precision, block, execution) == expected


def test_the_value_decoder_is_not_quantised() -> None:
    assert (
        read_bytes((256, 640), *Storage("int4", 32).of("model.layers.0.self_attn.v_b_proj.weight"), GPU)
        == 2 * 256 * 640
    )


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def test_attention_flops_are_the_papers() -> None:
    step = Step(1, 1, 999)
    gta, gqa = by_name(preset("gta-1b"), step)["attention"], by_name(preset("gqa-1b"), step)["attention"]
    assert gta.flops == 54 * 1000 * 2 * 5 * (64 + 128)
    assert gqa.flops == 54 * 1000 * 4 * 20 * 64
    assert 1 - gta.flops / gqa.flops == 0.625


def test_flops_of_every_product() -> None:
    found = by_name(preset("gta-1b"), Step(2, 3, 10))
    assert {name: found[name].flops for name in GTA_1B_LAYER} == {
        name: 2 * 6 * 54 * values for name, values in GTA_1B_LAYER.items()
    }
    assert found["lm_head"].flops == 2 * 2 * 128256 * 1280  # one position of each row


def test_a_prompt_sees_only_what_is_before_it() -> None:
    # 3 tokens after 10: they see 11, 12 and 13
    assert by_name(preset("gta-1b"), Step(2, 3, 10))["attention"].flops == 2 * 54 * 36 * 1920


@pytest.mark.parametrize("name", ["gta-1b", "gqa-500m", "gta4-500m", "mha-160m"])
@pytest.mark.parametrize("context", [1, 777])
def test_a_token_costs_what_the_config_says(name: str, context: int) -> None:
    found = operators(preset(name), Storage("bf16"), GPU, Step(1, 1, context - 1))
    assert sum(op.flops for op in found) == preset(name).flops_per_token(context)


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_a_token_reads_every_matrix_once() -> None:
    config = preset("gta-1b")
    found = by_name(config, Step(1, 1, 0))
    matmuls = 54 * sum(GTA_1B_LAYER.values()) + 128256 * 1280
    read = sum(op.weight_bytes for op in found.values())
    assert read == 2 * matmuls + 2 * 1280  # and one row of the embedding


def test_the_cache_is_read_and_the_new_tokens_written() -> None:
    found = by_name(preset("gta-1b"), Step(1, 1, 4095))["attention"]
    assert found.cache_bytes == (4096 + 1) * 20736


def test_a_fused_kernel_writes_no_scores() -> None:
    config = preset("gta-1b")
    short, long = (by_name(config, Step(1, 256, past))["attention"] for past in (0, 8192))
    assert short.activation_bytes == long.activation_bytes
    written = [by_name(config, Step(1, 256, past), CPU, "fp32")["attention"].activation_bytes for past in (0, 8192)]
    assert written[1] - written[0] == 54 * 6 * 4 * 5 * 256 * 8192


def test_onnxruntime_packs_the_cache_and_unpacks_codes() -> None:
    config = preset("gta-1b")
    found = by_name(config, Step(1, 1, 4095), CPU, "int4")
    assert found["attention"].cache_bytes == (2 * 4096 + 1) * 2 * 20736
    assert found["q_proj"].flops == (2 + 4) * 54 * GTA_1B_LAYER["q_proj"]
    assert found["v_b_proj"].flops == 2 * 54 * GTA_1B_LAYER["v_b_proj"]
    assert by_name(config, Step(1, 1, 0), CPU, "fp32")["q_proj"].flops == 2 * 54 * GTA_1B_LAYER["q_proj"]


def test_no_logits_no_head() -> None:
    found = by_name(preset("gta-1b"), Step(1, 512, 0, logits=0))["lm_head"]
    assert (found.flops, found.bytes) == (0, 0)


@given(
    batch=st.integers(1, 64),
    tokens=st.integers(1, 512),
    past=st.integers(0, 10**6),
    name=st.sampled_from(["gta-1b", "gqa-1b", "mha-160m"]),
)
def test_more_costs_more(batch: int, tokens: int, past: int, name: str) -> None:
    config = preset(name)

    def cost(step: Step) -> tuple[int, int]:
        found = operators(config, storage_for(config, "int4"), GPU, step)
        return sum(op.flops for op in found), sum(op.bytes for op in found)

    flops, size = cost(Step(batch, tokens, past))
    for more in (Step(batch + 1, tokens, past), Step(batch, tokens + 1, past), Step(batch, tokens, past + 1)):
        assert cost(more)[0] > flops
        assert cost(more)[1] > size


@given(tokens=st.integers(1, 2000), cut=st.integers(1, 1999))
def test_a_prompt_in_two_parts_computes_the_same(tokens: int, cut: int) -> None:
    """All but the head, which is asked for once."""
    config, cut = preset("gta1-160m"), min(cut, tokens)
    whole = operators(config, Storage("bf16"), GPU, Step(1, tokens, 0, 0))
    first = operators(config, Storage("bf16"), GPU, Step(1, cut, 0, 0))
    rest = operators(config, Storage("bf16"), GPU, Step(1, tokens - cut, cut, 0))
    assert math.fsum(op.flops for op in whole) == math.fsum(op.flops for op in (*first, *rest))
