"""Matrices that a checkpoint has in integers, against packing that is written out value by value."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from gta_edge.errors import CheckpointError, ConfigError
from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.quantized_checkpoint import QuantizedTensor, gather_quantized, reblocked
from gta_edge.formats.safetensors_files import read_headers
from gta_edge.model.weight_scheme import weight_scheme
from tests.helpers import quantized_checkpoints as made
from tests.helpers import reference

WIDTHS = [("gptq", 4), ("gptq", 8), ("gptq_v2", 4), ("gptq_v2", 8), ("awq", 4)]
WIDTHS += [("compressed-tensors", 4), ("compressed-tensors", 8), ("int-quantized", 8)]
every_layout = pytest.mark.parametrize(("layout", "bits"), WIDTHS)


def tensor_of(directory: Path, codes: made.Codes, layout: str) -> QuantizedTensor:
    """The matrix as it is found in a file of its own."""
    save_file(
        {f"a.b.{part}": array for part, array in made.PACKERS[layout](codes).items()}, directory / "model.safetensors"
    )
    scheme = weight_scheme({"quantization_config": made.config_of(layout, codes.bits)})
    (found,) = gather_quantized(read_headers(directory, lambda name: False), scheme).items()
    assert found[0] == "a.b.weight"
    assert isinstance(found[1], QuantizedTensor)
    return found[1]


# --- what is read ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(WIDTHS),
    rows=st.sampled_from([8, 16, 40]),
    group=st.sampled_from([8, 16, 32]),
    groups=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 9),
    scale_type=st.sampled_from([np.float16, np.float32, ml_dtypes.bfloat16]),
)
def test_codes_and_values_are_the_checkpoints_own(
    tmp_path_factory: pytest.TempPathFactory,
    kind: tuple[str, int],
    rows: int,
    group: int,
    groups: int,
    seed: int,
    scale_type: Any,
) -> None:
    layout, bits = kind
    codes = made.random_codes(rows, group * groups, bits, groups, seed)
    codes = replace(codes, scales=codes.scales.astype(ml_dtypes.bfloat16).astype(scale_type))  # float16 has all of them
    tensor = tensor_of(tmp_path_factory.mktemp("checkpoint"), codes, layout)
    assert (tensor.shape, tensor.bits, tensor.groups) == ((rows, group * groups), bits, groups)
    np.testing.assert_array_equal(tensor.values(), codes.values)
    matrix = tensor.matrix(bits)
    assert (matrix.bits, matrix.block_size) == (bits, 0 if groups == 1 else group)
    np.testing.assert_array_equal(matrix.codes, codes.codes - 2 ** (bits - 1))
    np.testing.assert_array_equal(matrix.scales.astype(np.float64), codes.scales.astype(np.float64))
    np.testing.assert_array_equal(matrix.values, codes.values)


@pytest.mark.parametrize(
    ("layout", "change"),
    [
        *((layout, made.asymmetric) for layout in ("gptq", "gptq_v2", "awq", "compressed-tensors")),
        *((layout, made.act_order) for layout in ("gptq", "gptq_v2", "compressed-tensors")),  # AWQ has no such
    ],
)
def test_what_is_no_matrix_of_ours_has_its_values_all_the_same(
    layout: str, change: Callable[[made.Codes], made.Codes], tmp_path: Path
) -> None:
    codes = change(made.random_codes(16, 96, 4, 3))
    tensor = tensor_of(tmp_path, codes, layout)
    np.testing.assert_array_equal(tensor.values(), codes.values)
    what = (
        "is asymmetric: the zero point of output 1, group 0 is 11 and not 8"
        if change is made.asymmetric
        else "act-order"
    )
    for read in (tensor.check, tensor.matrix):
        with pytest.raises(CheckpointError, match=what):
            read(4)
    if change is made.asymmetric:
        matrix = tensor.matrix(8)
        assert (matrix.bits, matrix.block_size, matrix.codes.min()) == (8, 32, -11)
        np.testing.assert_array_equal(matrix.values, codes.values)


def test_codes_of_a_width_that_fills_no_word(tmp_path: Path) -> None:
    """compressed-tensors fills the last word of a row with nothing, and says the true width."""
    codes = made.random_codes(3, 36, 4, 3)
    np.testing.assert_array_equal(tensor_of(tmp_path, codes, "compressed-tensors").values(), codes.values)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_a_whole_matrix(shape: tuple[int, ...], tmp_path: Path) -> None:
    codes = made.random_codes(8, 32, 8, 1)
    codes = replace(codes, scales=np.full((8, 1), 0.5, np.float16))
    parts = {**made.int_quantized(codes), "weight_scale": np.full(shape, 0.5, np.float16)}
    save_file({f"a.{part}": array for part, array in parts.items()}, tmp_path / "model.safetensors")
    scheme = weight_scheme({"quantization_config": made.config_of("int-quantized", 8)})
    tensor: Any = gather_quantized(read_headers(tmp_path, lambda name: False), scheme)["a.weight"]
    np.testing.assert_array_equal(tensor.matrix(8).values, codes.values)


def test_groups_of_zeros(tmp_path: Path) -> None:
    """A scale of 0 means zeros, whatever the codes; a scale of ours is positive."""
    codes = made.random_codes(8, 64, 4, 2)
    codes.scales[3, 1] = 0
    matrix = tensor_of(tmp_path, codes, "gptq").matrix(4)
    assert (matrix.scales > 0).all()
    np.testing.assert_array_equal(matrix.values, codes.values)


def test_finer_blocks_mean_the_same(tmp_path: Path) -> None:
    codes = made.random_codes(8, 192, 4, 3)
    matrix = tensor_of(tmp_path, codes, "awq").matrix(4)
    for size in (16, 32, 64):
        np.testing.assert_array_equal(reblocked(matrix, size).values, codes.values)
    for size in (128, 48, 0):
        if size != 48:
            with pytest.raises(ValueError, match="64 inputs"):
                reblocked(matrix, size)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (np.nan, "has scales: nan at .* 1 of 16 values are not finite"),
        (np.inf, "has scales: inf at .* 1 of 16 values are not finite"),
        (-0.25, "has negative scales"),
        (1e-7, "has scales that float16 does not hold"),
        (1e6, "has scales that float16 does not hold"),
    ],
)
@every_layout
def test_scales_that_are_none(layout: str, bits: int, value: float, what: str, tmp_path: Path) -> None:
    codes = made.random_codes(8, 64, bits, 2)
    codes = replace(codes, scales=codes.scales.astype(np.float32))
    codes.scales[2, 1] = value
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: a\.b\.weight {what}"):
        tensor_of(tmp_path, codes, layout).matrix(bits)


Parts = dict[str, np.ndarray]
DAMAGES: dict[str, tuple[str, Callable[[Parts], Any], str]] = {
    "gptq: no scales": ("gptq", lambda parts: parts.pop("scales"), "has qweight and no scales"),
    "gptq: no zeros": ("gptq", lambda parts: parts.pop("qzeros"), "has qweight and no qzeros"),
    "awq: no scales": ("awq", lambda parts: parts.pop("scales"), "has qweight and no scales"),
    "packed: no scales": (
        "compressed-tensors",
        lambda parts: parts.pop("weight_scale"),
        "has weight_packed and no weight_scale",
    ),
    "packed: no shape": (
        "compressed-tensors",
        lambda parts: parts.pop("weight_shape"),
        "has weight_packed and no weight_shape",
    ),
    "gptq: zeros that overflow": (
        "gptq",
        lambda parts: parts.update(qzeros=np.full_like(parts["qzeros"], -1)),
        "has zero points that GPTQ's first format does not say",
    ),
    "int8: no scales": ("int-quantized", lambda parts: parts.pop("weight_scale"), "has weight and no weight_scale"),
    "gptq: too few scales": (
        "gptq",
        lambda parts: parts.update(scales=parts["scales"][:, :-1].copy()),
        r"has scales F16 \[2, 15\]; expected .* \[2, 16\]",
    ),
    "gptq: zeros of other groups": (
        "gptq",
        lambda parts: parts.update(qzeros=parts["qzeros"][:1].copy()),
        r"has qzeros I32 \[1, 2\]; expected I32 \[2, 2\]",
    ),
    "gptq: an order of other inputs": (
        "gptq",
        lambda parts: parts.update(g_idx=parts["g_idx"][:-1].copy()),
        r"has g_idx I32 \[63\]",
    ),
    "gptq: codes of another type": (
        "gptq",
        lambda parts: parts.update(qweight=parts["qweight"].astype(np.int64)),
        r"has qweight I64 \[8, 16\]; expected I32",
    ),
    "gptq: codes in a row": (
        "gptq",
        lambda parts: parts.update(qweight=parts["qweight"].reshape(-1)),
        r"has qweight I32 \[128\]; expected I32 of two",
    ),
    "gptq: scales of integers": (
        "gptq",
        lambda parts: parts.update(scales=parts["scales"].astype(np.int32)),
        "has scales I32",
    ),
    "gptq: groups that are no equal ones": (
        "gptq",
        lambda parts: parts.update(scales=np.ones((3, 16), np.float16), qzeros=np.zeros((3, 2), np.int32)),
        "has 3 groups of 64 inputs",
    ),
    "awq: zeros of another width": (
        "awq",
        lambda parts: parts.update(qzeros=parts["qzeros"][:, :1].copy()),
        r"has qzeros I32 \[2, 1\]; expected I32 \[2, 2\]",
    ),
    "packed: another shape": (
        "compressed-tensors",
        lambda parts: parts.update(weight_shape=np.array([16, 65], np.int64)),
        r"has weight_packed \[16, 8\] and weight_shape \[16, 65\]",
    ),
    "packed: a shape of nothing": (
        "compressed-tensors",
        lambda parts: parts.update(weight_shape=np.array([16, -1], np.int64)),
        r"has weight_packed \[16, 8\] and weight_shape \[16, -1\]",
    ),
    "packed: a shape of three": (
        "compressed-tensors",
        lambda parts: parts.update(weight_shape=np.array([16, 64, 1], np.int64)),
        r"has weight_shape I64 \[3\]",
    ),
    "packed: scales of other outputs": (
        "compressed-tensors",
        lambda parts: parts.update(weight_scale=parts["weight_scale"][:-1].copy()),
        r"has weight_scale F16 \[15, 2\]",
    ),
    "packed: activations of its own": (
        "compressed-tensors",
        lambda parts: parts.update(input_scale=np.ones(1, np.float16)),
        "has input_scale, which is not read",
    ),
}


def values_in(directory: Path, scheme: Any) -> np.ndarray:
    tensor: Any = gather_quantized(read_headers(directory, lambda name: False), scheme)["a.b.weight"]
    return tensor.values()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_matrix_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    layout, change, expected = DAMAGES[damage]
    parts = made.PACKERS[layout](made.random_codes(16, 64, 8 if layout == "int-quantized" else 4, 2))
    change(parts)
    save_file({f"a.b.{part}": array for part, array in parts.items()}, tmp_path / "model.safetensors")
    scheme = weight_scheme({"quantization_config": made.config_of(layout, 8 if layout == "int-quantized" else 4)})
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: a\.b\.weight {expected}") as caught:
        values_in(tmp_path, scheme)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


@settings(max_examples=80, deadline=None, derandomize=True)
@given(kind=st.sampled_from(WIDTHS), data=st.data())
def test_any_damage_is_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, kind: tuple[str, int], data: st.DataObject
) -> None:
    """Or none at all: then there are values of the shape that the codes have."""
    layout, bits = kind
    parts = made.PACKERS[layout](made.random_codes(16, 64, bits, 2))
    for _ in range(data.draw(st.integers(1, 2))):
        part = data.draw(st.sampled_from(sorted(parts)))
        dtype = data.draw(st.sampled_from([np.int8, np.int32, np.int64, np.float16, np.float32, np.uint8]))
        shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 8, 16, 64]), max_size=3))
        values = data.draw(st.sampled_from([0, 1, -1, 127]))
        parts[part] = np.full(shape, values).astype(dtype)
    directory = tmp_path_factory.mktemp("checkpoint")
    save_file({f"a.{part}": array for part, array in parts.items()}, directory / "model.safetensors")
    scheme = weight_scheme({"quantization_config": made.config_of(layout, bits)})
    try:
        tensor = gather_quantized(read_headers(directory, lambda name: False), scheme)["a.weight"]
        if isinstance(tensor, QuantizedTensor):  # an int8 matrix of another type is a tensor like any other
            assert tensor.values().shape == tensor.shape
            assert tensor.matrix(tensor.bits).values.shape == tensor.shape
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017  most damage is one, and some is none
        assert error.remedy  # noqa: PT017  likewise


def test_an_order_beyond_the_groups(tmp_path: Path) -> None:
    codes = made.random_codes(8, 64, 4, 2)
    parts = made.gptq(codes)
    parts["g_idx"][5] = 2
    save_file({f"a.b.{part}": array for part, array in parts.items()}, tmp_path / "model.safetensors")
    scheme = weight_scheme({"quantization_config": made.config_of("gptq", 4)})
    tensor: Any = gather_quantized(read_headers(tmp_path, lambda name: False), scheme)["a.b.weight"]
    for read in (tensor.values, lambda: tensor.matrix(4)):
        with pytest.raises(CheckpointError, match=r"a\.b\.weight has groups from 0 to 2; expected 0 to 1"):
            read()


def group(**changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **changes}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


REFUSED = {
    "no method": ("gptq", {"quant_method": None}, r" is \{"),
    "bitsandbytes": ("gptq", {"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'"),
    "fp8": ("gptq", {"quant_method": "fp8"}, "quant_method is 'fp8'"),
    "3 bits": ("gptq", {"bits": 3}, r"bits is 3; weights of 4 or 8 bits are read"),
    "2 bits": ("gptq", {"bits": 2}, "bits is 2"),
    "no bits": ("gptq", {"bits": None}, "bits is "),
    "bits that are true": ("gptq", {"bits": True}, "bits is "),
    "marlin": ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    "words of 16 bits": ("gptq", {"pack_dtype": "int16"}, "pack_dtype is 'int16'"),
    "widths that differ": ("gptq", {"dynamic": {"-:lm_head": {}}}, "dynamic is "),
    "AWQ in 8 bits": ("awq", {"bits": 8}, "bits is 8; weights of 4 bits are read"),
    "marlin by an old name": ("gptq", {"is_marlin_format": True}, "is_marlin_format is True"),
    "planes": ("gptq", {"format": "gptq_p"}, "format is 'gptq_p'; read is gptq, gptq_v2"),
    "two formats": ("gptq_v2", {"format": "gptq"}, "checkpoint_format and format that differ"),
    "AWQ in GPTQ's words": ("awq", {"format": "llm-awq"}, "format is 'llm-awq'; read is gemm"),
    "gemv": ("awq", {"version": "gemv"}, "version is 'gemv'"),
    "floats": ("compressed-tensors", {"format": "float-quantized"}, "format is 'float-quantized'"),
    "marlin-24": ("compressed-tensors", {"format": "marlin-24"}, "format is 'marlin-24'"),
    "a cache": ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is "),
    "rotations": ("compressed-tensors", {"transform_config": {"config_groups": {}}}, "transform_config is "),
    "sparse": ("compressed-tensors", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is "),
    "frozen": ("compressed-tensors", {"quantization_status": "frozen"}, "quantization_status is 'frozen'"),
    "6 bits": ("compressed-tensors", group(num_bits=6), r"config_groups\..group_0.\.weights\.num_bits is 6"),
    "floats in a group": ("compressed-tensors", group(type="float"), "weights.type is 'float'"),
    "blocks of two dimensions": ("compressed-tensors", group(strategy="block"), "weights.strategy is 'block'"),
    "dynamic": ("compressed-tensors", group(dynamic=True), "weights.dynamic is "),
    "groups in a list": ("compressed-tensors", {"config_groups": [1]}, "config_groups is "),
    "a group that is none": ("compressed-tensors", {"config_groups": {"a": 1}}, "config_groups is "),
    "weights that are none": ("compressed-tensors", {"config_groups": {"a": {"weights": 4}}}, "weights is 4"),
    "static activations": (
        "compressed-tensors",
        {"config_groups": {"a": {"weights": None, "input_activations": {"num_bits": 8, "dynamic": False}}}},
        "input_activations is ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_scheme_that_is_not_read_is_refused_by_name(case: str) -> None:
    layout, changes, expected = REFUSED[case]
    with pytest.raises(ConfigError, match=f"quantization_config.*{expected}") as caught:
        weight_scheme({"quantization_config": {**made.CONFIGS[layout], **changes}})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("entries", [{"format": "gptq_v2"}, {"checkpoint_format": "gptq_v2", "format": "gptq_v2"}])
def test_the_format_by_the_name_of_either_release(entries: dict[str, str]) -> None:
    found = weight_scheme({"quantization_config": {**made.CONFIGS["gptq"], **entries}})
    assert found == weight_scheme({"quantization_config": made.CONFIGS["gptq_v2"]})
    assert found is not None and found.zero_offset == 0


@pytest.mark.parametrize("value", [[], {}, None, 0, ""])
def test_no_scheme(value: object) -> None:
    assert weight_scheme({"quantization_config": value}) is None


# --- a whole checkpoint ----------------------------------------------------------------------------------------------

ENTRIES = reference.llama_entries(vocab_size=61, max_position_embeddings=32, intermediate_size=96)


def matrices(bits: int, entries: dict[str, Any] = ENTRIES) -> dict[str, made.Codes]:
    """Every matrix of the layers, in integers."""
    shapes = {
        name: shape for name, shape in reference.shapes(entries).items() if ".layers." in name and len(shape) == 2
    }
    return {
        name: made.random_codes(*shape, bits, shape[1] // 32, seed) for seed, (name, shape) in enumerate(shapes.items())
    }


@every_layout
def test_a_whole_checkpoint(layout: str, bits: int, tmp_path: Path) -> None:
    weights, own = reference.random_weights(ENTRIES), matrices(bits)
    weights = {name: weight.astype(np.float16) for name, weight in weights.items()}
    made.write(tmp_path, ENTRIES, weights, own, layout)
    source = Checkpoint.open(tmp_path)
    assert set(source.names) == set(weights)
    assert source.quantized.keys() == own.keys()
    assert source.precisions == ("fp16", f"int{bits}")
    assert source.own_precision == f"int{bits}"
    assert source.weight_bytes == sum(array.nbytes for array in load_file(tmp_path / "model.safetensors").values())
    for name in source.names:
        wanted = own[name].values if name in own else weights[name]
        np.testing.assert_array_equal(source.read(name), wanted)
        assert source.read(name).dtype.name == source.dtype_of(name)


def test_widths_may_differ_between_groups(tmp_path: Path) -> None:
    """compressed-tensors says of each matrix which group it is in by patterns; its shapes say so too."""
    own = matrices(4)
    wide = {name: codes for name, codes in matrices(8).items() if "down_proj" in name}
    own |= wide
    made.write(tmp_path, ENTRIES, reference.random_weights(ENTRIES), own, "compressed-tensors")
    config = json.loads((tmp_path / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_0"]["weights"]["num_bits"] = 8
    groups["group_1"] = group()["config_groups"]["group_0"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = Checkpoint.open(tmp_path)
    assert {name: each.bits for name, each in source.quantized.items()} == {name: own[name].bits for name in own}
    assert source.own_precision == "int4"


@pytest.mark.parametrize("layout", ["gptq", "awq", "compressed-tensors"])
def test_a_matrix_of_another_shape_is_refused(layout: str, tmp_path: Path) -> None:
    own = matrices(4)
    name = "model.layers.1.mlp.up_proj.weight"
    own[name] = made.random_codes(96, 96, 4, 3)
    made.write(tmp_path, ENTRIES, reference.random_weights(ENTRIES), own, layout)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight has the shape \[96, 96\]"):
        Checkpoint.open(tmp_path)


def test_parts_without_codes_are_surplus(tmp_path: Path) -> None:
    own = matrices(4)
    made.write(tmp_path, ENTRIES, reference.random_weights(ENTRIES), own, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.qweight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 of the tensors .*up_proj\.weight.*holds 3 that no Llama"):
        Checkpoint.open(tmp_path)
