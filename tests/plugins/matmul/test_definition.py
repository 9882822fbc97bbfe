"""The matmuls with quantised matrices, in torch and as ONNX functions, against float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from gta_edge.errors import BackendError
from gta_edge.libraries.optional import optional
from gta_edge.plugins.domain import DOMAIN, OPSET, VERSION
from gta_edge.plugins.matmul import definition as op
from gta_edge.plugins.matmul import packing
from gta_edge.plugins.matmul import torch as matmul_torch
from tests.helpers import reference
from tests.helpers.host_memory import STREAM, memory, pretend_gpu

onnxruntime = optional("onnxruntime", "ort")  # a version that knows opset 24 needs Python 3.11

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
TOLERANCE = 1e-5  # largest error over the results' standard deviation
KINDS = [(4, 32), (4, 64), (4, 128), (8, 0), (8, 32), (8, 64), (8, 128)]
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
BOUNDS = {"float32": TOLERANCE, "float16": 4e-3, "bfloat16": 3e-2}  # a unit in the last place of the largest results
every_kind = pytest.mark.parametrize(("bits", "block_size"), KINDS)


@dataclass(frozen=True)
class Case:
    """One call of an op."""

    bits: int = 4
    block_size: int = 32
    in_features: int = 96
    output_sizes: tuple[int, ...] = (32, 16, 21)
    bias: bool = True
    rows: tuple[int, ...] = (2, 3)
    dtype: str = "float32"
    seed: int = 0

    @property
    def attributes(self):
        return self.bits, self.block_size, list(self.output_sizes)


def codes_and_scales(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Codes [K, N] and scales [K / block, N] or [N]."""
    rng = np.random.default_rng(case.seed)
    k, n = case.in_features, sum(case.output_sizes)
    codes = rng.integers(-8, 7, (k, n), np.int8, endpoint=True)
    if case.bits == 8:
        codes = rng.integers(-127, 127, (k, n), np.int8, endpoint=True)
    scales = rng.uniform(0.01, 0.1, (k // case.block_size, n) if case.block_size else (n,))
    return codes, scales.astype(np.float16)


def arrays(case: Case) -> dict[str, np.ndarray]:
    """The op's inputs by name."""
    rng = np.random.default_rng(case.seed + 1)
    dtype = getattr(ml_dtypes, case.dtype, None) or np.dtype(case.dtype)
    packed = packing.pack(*codes_and_scales(case), case.bits, case.block_size)
    x = rng.standard_normal((*case.rows, case.in_features)).astype(dtype)
    inputs = {"x": x, "weight": packed.weight, "scale": packed.scale}
    if case.bias:
        inputs["bias"] = rng.standard_normal(sum(case.output_sizes)).astype(dtype)
    return inputs


def matrix(case: Case) -> np.ndarray:
    """What is multiplied by, float64 [K, N], from codes and scales that were never packed."""
    codes, scales = (array.astype(np.float64) for array in codes_and_scales(case))
    return codes * (np.repeat(scales, case.block_size, axis=0) if case.block_size else scales)


def spread(case: Case) -> float:
    """The standard deviation that matmuls with a normal x have."""
    return float(np.sqrt(case.in_features * np.square(matrix(case)).mean()))


def expected(case: Case, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs in float64."""
    whole = inputs["x"].astype(np.float64) @ matrix(case)
    if case.bias:
        whole = whole + inputs["bias"].astype(np.float64)
    return np.split(whole, np.cumsum(case.output_sizes)[:-1], axis=-1)


# --- the implementations, each as a function of the case and the inputs by name --------------------------------------


def in_torch(case: Case, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    dtype = getattr(torch, case.dtype)
    tensors = {
        name: torch.from_numpy(array.astype(np.float32)).to(dtype) if name in ("x", "bias") else torch.from_numpy(array)
        for name, array in inputs.items()
    }
    arguments = (*tensors.values(), *([] if case.bias else [None]))
    results = torch.ops.gta.blockwise_matmul(*arguments, *case.attributes)
    assert {result.dtype for result in results} == {dtype}
    return [result.float().numpy() for result in results]


def model(case: Case, *, static: bool = False) -> onnx.ModelProto:
    """The op in a model of one node; rows by name, or all sizes as numbers."""
    sizes = op.Sizes(case.in_features, case.output_sizes, case.bits, case.block_size)
    names = op.INPUTS if case.bias else op.INPUTS[:-1]
    outputs = op.output_names(len(case.output_sizes))
    lead = list(case.rows) if static else [f"D{i}" for i in range(len(case.rows))]
    shapes = {
        "x": (TYPES[case.dtype], [*lead, case.in_features]),
        "weight": (TensorProto.INT32, sizes.weight_shape),
        "scale": (TensorProto.FLOAT16, sizes.scale_shape),
        "bias": (TYPES[case.dtype], [sizes.out_features]),
    }
    overload = op.overload(len(outputs), case.bias)
    attributes = op.attributes(case.block_size, case.output_sizes)
    node = helper.make_node(op.OPS[case.bits], names, outputs, domain=DOMAIN, overload=overload, **attributes)
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info(name, *shapes[name]) for name in names],
        [
            helper.make_tensor_value_info(name, TYPES[case.dtype], [*lead, size])
            for name, size in zip(outputs, case.output_sizes, strict=True)
        ],
    )
    return helper.make_model(
        graph,
        functions=[onnx.parser.parse_function(op.function(case.bits, len(outputs), case.bias))],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )


@lru_cache
def ort_session(case: Case) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model(case).SerializeToString(), options, providers=["CPUExecutionProvider"])


def in_onnxruntime(case: Case, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    pytest.importorskip("onnxruntime")
    return ort_session(replace(case, seed=0)).run(None, inputs)


def in_onnx_reference(case: Case, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ReferenceEvaluator(model(case)).run(None, inputs)


Implementation = Callable[[Case, dict[str, np.ndarray]], list[np.ndarray]]
IMPLEMENTATIONS: dict[str, Implementation] = {
    "torch": in_torch,
    "onnxruntime": in_onnxruntime,
    "onnx reference": in_onnx_reference,
}
implementations = pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


def assert_right(run: Implementation, case: Case) -> None:
    inputs = arrays(case)
    found = run(case, inputs)
    wanted = expected(case, inputs)
    assert [array.shape for array in found] == [array.shape for array in wanted]
    for array, exact in zip(found, wanted, strict=True):
        assert np.abs(array.astype(np.float64) - exact).max() <= BOUNDS[case.dtype] * spread(case)


@st.composite
def cases(draw) -> Case:
    bits, block_size = draw(st.sampled_from(KINDS))
    *first, last = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    return Case(
        bits=bits,
        block_size=block_size,
        in_features=draw(st.integers(1, 300 // (block_size or 1))) * (block_size or 1),
        output_sizes=(*(16 * -(-size // 16) for size in first), last),
        bias=draw(st.booleans()),
        rows=tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))),
        seed=draw(st.integers(0, 2**16)),
    )


@implementations
@SETTINGS
@given(case=cases())
def test_against_float64(run, case):
    assert_right(run, case)


@implementations
@every_kind
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("output_sizes", [(16,), (7,), (32, 1), (16, 16, 16, 100)], ids=str)
def test_every_kind(run, bits, block_size, bias, output_sizes):
    assert_right(run, Case(bits, block_size, 256, output_sizes, bias))


@implementations
@every_kind
def test_products_that_are_padded(run, bits, block_size):
    assert_right(run, Case(bits, block_size, in_features=3 * 128 + (block_size or 5), output_sizes=(19,)))


@pytest.mark.parametrize(  # onnxruntime takes no numpy array of bfloat16
    ("run", "dtype"),
    [(in_torch, "float16"), (in_torch, "bfloat16"), (in_onnxruntime, "float16"), (in_onnx_reference, "bfloat16")],
)
@every_kind
def test_types_of_16_bits_are_rounded_once(run, dtype, bits, block_size):
    case = Case(bits, block_size, in_features=256, dtype=dtype)
    assert_right(run, case)
    inputs = arrays(case)
    for found, exact in zip(run(case, inputs), expected(case, inputs), strict=True):
        digits = 11 if dtype == "float16" else 8
        half_a_unit = np.exp2(np.floor(np.log2(np.abs(exact))) - digits)
        sums = 1e-5 * spread(case)  # of the float32 sums
        assert (np.abs(found.astype(np.float64) - exact) <= half_a_unit * 1.001 + sums).all()


@implementations
def test_every_input_matters(run):
    case = Case()
    inputs = arrays(case)
    before = np.concatenate(run(case, inputs), axis=-1)
    for name in op.INPUTS:
        after = np.concatenate(run(case, inputs | {name: inputs[name][..., ::-1].copy()}), axis=-1)
        assert reference.relative_error(after, before) > 0.01, name


@implementations
def test_rows_do_not_see_each_other(run):
    case = Case(rows=(3,))
    inputs = arrays(case)
    changed = inputs | {"x": inputs["x"].copy()}
    changed["x"][1] += 1
    for before, after in zip(run(case, inputs), run(case, changed), strict=True):
        np.testing.assert_array_equal(before[[0, 2]], after[[0, 2]])
        assert (before[1] != after[1]).all()


# --- ONNX ------------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_checker_accepts_the_functions(bits, block_size, static, dtype):
    for outputs in range(1, op.MAX_OUTPUTS + 1):
        for bias in (False, True):
            case = Case(bits, block_size, 128, (*[16] * (outputs - 1), 5), bias, dtype=dtype)
            onnx.checker.check_model(model(case, static=static), full_check=True)


@pytest.mark.parametrize("bits", op.OPS)
@pytest.mark.parametrize("outputs", [1, 2, 3, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_the_functions_take_and_give_what_the_op_says(bits, outputs, bias):
    function = onnx.parser.parse_function(op.function(bits, outputs, bias))
    assert (function.domain, function.name) == ("gta", f"BlockwiseInt{bits}MatMul")
    assert function.overload == op.overload(outputs, bias)
    assert tuple(function.input) == ("x", "weight", "scale", "bias")[: 4 if bias else 3]
    assert tuple(function.output) == ("y_0", "y_1", "y_2", "y_3")[:outputs]
    given_defaults = {attribute.name: helper.get_attribute_value(attribute) for attribute in function.attribute_proto}
    assert {*function.attribute, *given_defaults} == set(op.ATTRIBUTES)
    assert given_defaults == {"plugin_namespace": b"gta", "plugin_version": b"1"}
    assert {node.domain for node in function.node} == {""}  # standard operators only
    assert [(opset.domain, opset.version) for opset in function.opset_import] == [("", 24)]


def test_overloads_are_all_different():
    assert len({op.overload(outputs, bias) for outputs in range(1, 5) for bias in (False, True)}) == 8


def test_calls_of_several_kinds_stand_in_one_model():
    """The functions share their name; nodes find the right one."""
    pytest.importorskip("onnxruntime")
    one = replace(Case(), in_features=64, output_sizes=(64, 32), bias=True)
    two = replace(one, output_sizes=(48,), bias=False, seed=5)
    inputs, others = arrays(one), arrays(two)
    first, second = model(one), model(two)
    node = second.graph.node[0]
    node.input[:] = ["y_0", "other_weight", "other_scale"]
    node.output[:] = ["z"]
    first.graph.node.append(node)
    first.functions.extend(second.functions)
    for name in ("weight", "scale"):
        first.graph.input.extend([value for value in second.graph.input if value.name == name])
        first.graph.input[-1].name = f"other_{name}"
    first.graph.output.extend(second.graph.output)
    first.graph.output[-1].name = "z"
    onnx.checker.check_model(first, full_check=True)
    session = onnxruntime.InferenceSession(first.SerializeToString(), providers=["CPUExecutionProvider"])
    _, y_1, z = session.run(None, inputs | {f"other_{name}": others[name] for name in ("weight", "scale")})
    wanted = expected(one, inputs)
    assert reference.relative_error(y_1, wanted[1]) <= TOLERANCE
    assert reference.relative_error(z, expected(two, {"x": wanted[0]})[0]) <= TOLERANCE


def test_the_attributes_of_a_node():
    assert op.attributes(64, (16, 5)) == {
        "block_size": 64,
        "output_sizes": [16, 5],
        "plugin_namespace": "gta",
        "plugin_version": "1",
    }


@pytest.mark.parametrize(("bits", "outputs"), [(5, 1), (4, 0), (4, 5)])
def test_there_is_no_function_for_other_cases(bits, outputs):
    with pytest.raises(ValueError, match=f"int{bits} with {outputs} outputs"):
        op.function(bits, outputs)


# --- torch -----------------------------------------------------------------------------------------------------------


def tensors(case: Case) -> list[torch.Tensor | None]:
    found: list[torch.Tensor | None] = [torch.from_numpy(array) for array in arrays(case).values()]
    return found if case.bias else [*found, None]


@pytest.mark.parametrize("case", [Case(), Case(bias=False, output_sizes=(5,)), Case(8, 0)], ids=str)
def test_torch_accepts_the_op(case):
    torch.library.opcheck(torch.ops.gta.blockwise_matmul.default, (*tensors(case), *case.attributes))


def test_outputs_are_contiguous_and_apart():
    results = torch.ops.gta.blockwise_matmul(*tensors(Case()), *Case().attributes)
    assert all(result.is_contiguous() for result in results)
    assert len({result.untyped_storage().data_ptr() for result in results}) == len(results)


def test_no_rows_give_no_rows():
    x, *others = tensors(Case())
    results = torch.ops.gta.blockwise_matmul(x[:, :0], *others, *Case().attributes)
    assert [result.shape for result in results] == [(2, 0, size) for size in Case().output_sizes]


def test_an_input_that_is_a_view_is_as_good():
    case = Case(rows=(4, 6))
    x, *others = tensors(case)
    wanted = torch.ops.gta.blockwise_matmul(x.transpose(0, 1).contiguous(), *others, *case.attributes)
    found = torch.ops.gta.blockwise_matmul(x.transpose(0, 1), *others, *case.attributes)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@every_kind
def test_slices_do_not_show(bits, block_size, monkeypatch):
    case = Case(bits, block_size, in_features=256, output_sizes=(64, 32, 21))
    monkeypatch.setattr(matmul_torch, "_SLICE_VALUES", 3 * 16 * 256)  # three tiles of eight, in the end one
    assert_right(in_torch, case)


@settings(SETTINGS, max_examples=60)
@given(case=cases())
def test_rows_of_a_table_are_the_matrix_transposed(case):
    """Every output's weights, as an embedding that is tied to the head looks them up."""
    table = matrix(case).T.astype(np.float32)  # exact in float32
    packed = packing.pack(*codes_and_scales(case), case.bits, case.block_size)
    n = len(table)
    ids = np.random.default_rng(case.seed).integers(0, n, (3, 2))
    ids.flat[0], ids.flat[1] = 0, n - 1
    weight, scale = torch.from_numpy(packed.weight), torch.from_numpy(packed.scale)
    found = matmul_torch.dequantised_rows(weight, scale, torch.from_numpy(ids), case.bits, case.in_features)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), table[ids])


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda x: x.int(), r"x is torch.int32 \[2, 3, 96\]; expected floating point"),
        (0, lambda x: x[..., :90], "in_features 90 is not a multiple of block_size 32"),
        (0, lambda x: torch.cat((x, x), -1), r"weight is .* expected torch.int32 \[5, 4, 32, 4\] for 192 inputs"),
        (1, lambda weight: weight.float(), "weight is torch.float32"),
        (1, lambda weight: weight[:4], r"weight is torch.int32 \[4, 2, 32, 4\]; expected torch.int32 \[5, 2, 32, 4\]"),
        (2, lambda scale: scale.float(), "scale is torch.float32"),
        (2, lambda scale: scale[:, :, :, :2], r"scale is .* expected torch.float16 \[5, 1, 8, 4, 2\]"),
        (3, lambda bias: bias.half(), "bias is torch.float16"),
        (3, lambda bias: bias[:-1], r"bias is torch.float32 \[68\]; expected torch.float32 \[69\]"),
        (4, lambda bits: 5, "weights of 5 bits"),
        (5, lambda block_size: 0, "int4 in blocks of 0"),
        (6, lambda sizes: [], "0 output_sizes; expected 1 to 4"),
        (6, lambda sizes: [16] * 4 + [5], "5 output_sizes; expected 1 to 4"),
        (6, lambda sizes: [21, 48], "expected multiples of 16 but for the last"),
        (6, lambda sizes: [64, 5, 0], "expected at least 1 each"),
        (6, lambda sizes: [64, 32], r"weight is .* expected torch.int32 \[6, 2, 32, 4\]"),
    ],
)
def test_torch_refuses_what_does_not_fit(place, change, message):
    arguments = [*tensors(Case()), *Case().attributes]
    arguments[place] = change(arguments[place])
    with pytest.raises(ValueError, match=message) as caught:
        torch.ops.gta.blockwise_matmul(*arguments)
    assert len(str(caught.value).splitlines()) == 1


# --- what the kernels are given --------------------------------------------------------------------------------------


class OnHostMemory:
    """In the place of the kernels: computes in float64 from addresses in host memory, fp16 alone."""

    def __init__(self, variant: Any, gpu: Any) -> None:
        assert variant.compute == "fp16"
        self.variant = variant

    def launch(
        self,
        stream: int,
        *,
        x: int,
        weight: int,
        scale: int,
        bias: int,
        outputs: list[int],
        **numbers: Any,
    ) -> None:
        rows, k, output_sizes = numbers["rows"], numbers["in_features"], numbers["output_sizes"]
        assert (stream, x % 16) == (STREAM, 0)
        bits, block_size = self.variant.bits, self.variant.block_size
        sizes = op.Sizes(k, output_sizes, bits, block_size)
        packed = packing.Packed(
            memory(weight, sizes.weight_shape, np.int32), memory(scale, sizes.scale_shape, np.float16)
        )
        codes, scales = packing.unpack(packed, k, sizes.out_features, bits, block_size)
        factors = np.repeat(scales, block_size, axis=0) if block_size else scales
        whole = memory(x, (rows, k), np.float16).astype(np.float64) @ (codes * factors.astype(np.float64))
        if bias:
            whole = whole + memory(bias, (sizes.out_features,), np.float16)
        parts = np.split(whole.astype(np.float16), np.cumsum(output_sizes)[:-1], axis=-1)
        for address, part in zip(outputs, parts, strict=True):
            ctypes.memmove(address, np.ascontiguousarray(part).ctypes.data, part.nbytes)


@pytest.mark.parametrize("bias", [False, True])
@every_kind
def test_what_the_kernels_are_given(bits, block_size, bias, monkeypatch):
    """All between torch's tensors and the kernels, on host memory: addresses, sizes, views, and what is kept alive."""
    pretend_gpu(monkeypatch, matmul_torch)
    monkeypatch.setattr(matmul_torch, "matmul_kernels", OnHostMemory)
    case = Case(bits, block_size, 256, bias=bias, rows=(2, 3))
    packed = [tensor for tensor in tensors(case) if tensor is None or tensor.dtype != torch.float32]
    b = torch.randn(69).half() if bias else None
    flat = torch.randn(1 + 6 * 256).half()
    for x in (
        flat[:-1].view(2, 3, 256),
        flat[:-1].view(3, 2, 256).transpose(0, 1),
        flat[1:].view(2, 3, 256),  # contiguous, not aligned
        flat[:256].view(1, 256),
        torch.zeros(2, 0, 256).half(),
    ):
        found = matmul_torch._on_gpu(x, packed[0], packed[1], b, *case.attributes)
        inputs = {"x": x.numpy()} | ({} if b is None else {"bias": b.numpy()})
        for result, exact in zip(found, expected(case, inputs), strict=True):
            assert (result.dtype, tuple(result.shape)) == (torch.float16, exact.shape)
            assert np.abs(result.double().numpy() - exact).max(initial=0) <= BOUNDS["float16"] * spread(case)


# --- on a GPU --------------------------------------------------------------------------------------------------------

ON_GPU_BOUNDS = {"float16": 6e-3, "bfloat16": 4e-2}  # many rows: weights may be rounded to 16 bits


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs a GPU."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
    return pytest.mark.gpu(skip(test))


def on_cuda(case: Case) -> list[torch.Tensor | None]:
    """The op's tensors on a GPU, x and bias in the case's type."""
    dtype = getattr(torch, case.dtype)
    found = [tensor if tensor is None else tensor.cuda() for tensor in tensors(replace(case, dtype="float32"))]
    return [tensor.to(dtype) if i in (0, 3) and tensor is not None else tensor for i, tensor in enumerate(found)]


def assert_cuda_right(case: Case, x: torch.Tensor, results: list[torch.Tensor]) -> None:
    bias = on_cuda(case)[3]
    inputs = {"x": x.double().cpu().numpy()} | ({} if bias is None else {"bias": bias.double().cpu().numpy()})
    for found, exact in zip(results, expected(case, inputs), strict=True):
        assert found.dtype == x.dtype
        assert found.is_contiguous()
        error = np.abs(found.double().cpu().numpy() - exact).max()
        assert error <= ON_GPU_BOUNDS[case.dtype] * spread(case)


@on_gpu
@every_kind
@pytest.mark.parametrize("dtype", ON_GPU_BOUNDS)
@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (1, 7), (3, 40), (2, 300)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_the_kernels_against_float64(bits, block_size, dtype, rows, bias):
    for output_sizes in ((320, 64, 128, 1280), (1280,), (100,)):
        case = Case(bits, block_size, 1280, output_sizes, bias, rows, dtype)
        arguments = on_cuda(case)
        assert_cuda_right(case, arguments[0], torch.ops.gta.blockwise_matmul(*arguments, *case.attributes))


@on_gpu
@pytest.mark.parametrize("dtype", ON_GPU_BOUNDS)
def test_what_kernels_do_not_take_is_right_too(dtype):
    for case in (Case(8, 0, 132, rows=(2, 5), dtype=dtype), Case(8, 0, 1, rows=(1, 1), dtype=dtype)):
        arguments = on_cuda(case)
        assert_cuda_right(case, arguments[0], torch.ops.gta.blockwise_matmul(*arguments, *case.attributes))


@on_gpu
@pytest.mark.parametrize("dtype", ON_GPU_BOUNDS)
def test_inputs_that_are_views_on_the_gpu(dtype):
    case = Case(rows=(4, 6), dtype=dtype)
    _, *others = on_cuda(case)
    whole = torch.randn(6, 4, 100, device="cuda", dtype=getattr(torch, dtype))
    shifted = torch.randn(1 + 24 * 96, device="cuda", dtype=whole.dtype)[1:].view(4, 6, 96)  # contiguous, not aligned
    for x in (whole.transpose(0, 1)[..., 3:99], shifted):
        assert_cuda_right(case, x, torch.ops.gta.blockwise_matmul(x, *others, *case.attributes))


@on_gpu
@pytest.mark.parametrize("dtype", ON_GPU_BOUNDS)
@pytest.mark.parametrize("rows", [(1, 1), (1, 64)], ids=str)
def test_a_call_in_a_cuda_graph(dtype, rows):
    case = Case(in_features=1280, output_sizes=(320, 64, 128, 1280), rows=rows, dtype=dtype)
    x, *others = on_cuda(case)
    torch.ops.gta.blockwise_matmul(x, *others, *case.attributes)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = torch.ops.gta.blockwise_matmul(x, *others, *case.attributes)
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.cuda.synchronize()
        assert_cuda_right(case, x, results)


@on_gpu
def test_no_rows_on_the_gpu():
    case = Case(dtype="float16")
    x, *others = on_cuda(case)
    results = torch.ops.gta.blockwise_matmul(x[:, :0], *others, *case.attributes)
    assert [result.shape for result in results] == [(2, 0, size) for size in case.output_sizes]


@on_gpu
def test_tensors_on_different_devices_are_refused():
    x, weight, scale, bias = on_cuda(Case(dtype="float16"))
    with pytest.raises(BackendError, match="move them to one device"):
        torch.ops.gta.blockwise_matmul(x, weight.cpu(), scale, bias, *Case().attributes)


# --- shape rules -----------------------------------------------------------------------------------------------------


def test_shapes_of_a_call():
    sizes = op.Sizes(1280, (320, 64, 128, 1280), 4, 32)
    assert sizes.out_features == 1792
    assert sizes.weight_shape == (112, 20, 32, 4)
    assert sizes.scale_shape == (112, 10, 8, 4, 2)
    assert sizes.output_shapes((2, 7, 1280)) == [(2, 7, 320), (2, 7, 64), (2, 7, 128), (2, 7, 1280)]
    assert op.Sizes(3584, (1280,), 8, 0).weight_shape == (80, 112, 32, 4)
    assert op.Sizes(3584, (1280,), 8, 0).scale_shape == (80, 1, 8, 1, 2)
