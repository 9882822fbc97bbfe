"""The attention op, in torch and as an ONNX function, against the formula in float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator

from gta_edge.errors import BackendError
from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.attention import torch as torch_ops
from tests.helpers import reference
from tests.helpers.attention_models import (
    TOLERANCE,
    Sizes,
    all_sizes,
    arrays,
    assert_cache,
    divisors,
    expected,
    model,
    wrap,
)
from tests.helpers.host_memory import STREAM, memory, pretend_gpu

try:
    import onnxruntime
except ImportError:  # a version that knows opset 24 needs Python 3.11
    onnxruntime = None

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)

BASELINE_INPUTS = ("query", "key", "value", "past_key", "past_value", "past_length", "cos", "sin")


# --- the implementations, each as a function of the inputs by name and of the sizes ----------------------------------


def in_torch(inputs: dict[str, np.ndarray], sizes: Sizes) -> list[np.ndarray]:
    tensors = [torch.from_numpy(inputs[name].copy()) for name in op.INPUTS]
    results = torch.ops.gta.grouped_latent_attention(*tensors, *sizes.heads, sizes.scale)
    return [result.numpy() for result in results]


def in_torch_in_place(inputs: dict[str, np.ndarray], sizes: Sizes) -> list[np.ndarray]:
    tensors = {name: torch.from_numpy(inputs[name].copy()) for name in op.INPUTS}
    output = torch.ops.gta.grouped_latent_attention_(*tensors.values(), *sizes.heads, sizes.scale)
    return [result.numpy() for result in (output, tensors["past_key"], tensors["past_latent"])]


def quiet_session(proto: onnx.ModelProto) -> "onnxruntime.InferenceSession":
    if onnxruntime is None:
        pytest.skip("onnxruntime is not installed")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # a warning for every cache that is copied
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


@lru_cache
def ort_session(heads, d_k, d_l, e):
    n_q, n_k, n_c = heads
    return quiet_session(model(Sizes(n_q=n_q, n_k=n_k, n_c=n_c, d_k=d_k, d_l=d_l, e=e)))


def in_onnxruntime(inputs: dict[str, np.ndarray], sizes: Sizes) -> list[np.ndarray]:
    return ort_session(sizes.heads, sizes.d_k, sizes.d_l, sizes.e).run(None, inputs)


def in_onnx_reference(inputs: dict[str, np.ndarray], sizes: Sizes) -> list[np.ndarray]:
    return ReferenceEvaluator(model(sizes)).run(None, inputs)


Implementation = Callable[[dict[str, np.ndarray], Sizes], list[np.ndarray]]
IMPLEMENTATIONS: dict[str, Implementation] = {
    "torch": in_torch,
    "torch in place": in_torch_in_place,
    "onnxruntime": in_onnxruntime,
    "onnx reference": in_onnx_reference,
}
implementations = pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


def assert_right(run: Implementation, sizes: Sizes) -> None:
    inputs = arrays(sizes)
    output, key, latent = run(inputs, sizes)
    exact_output, exact_key, exact_latent = expected(inputs, sizes)
    assert output.dtype == key.dtype == latent.dtype == np.float32
    assert reference.relative_error(output, exact_output) <= TOLERANCE
    assert_cache(key, inputs["past_key"], exact_key, sizes.past, sizes.tokens)
    assert_cache(latent, inputs["past_latent"], exact_latent, sizes.past, sizes.tokens)


@implementations
@SETTINGS
@given(sizes=all_sizes())
def test_against_the_formula(run, sizes):
    assert_right(run, sizes)


@implementations
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(n_q=5, n_k=1, n_c=1, d_k=64, d_l=128, e=2),  # gta3-500m, gta-1b
        Sizes(n_q=10, n_k=1, n_c=2, d_k=64, d_l=128, e=1),  # gta4-500m
        Sizes(n_q=6, n_k=2, n_c=3),
        Sizes(n_q=6, n_k=3, n_c=2),
        Sizes(n_q=3, n_k=3, n_c=3, e=1),
        Sizes(past=(0,), tokens=1, capacity=1, positions=1),  # the smallest
        Sizes(past=(8,), tokens=1, capacity=9, positions=9),  # the last position
    ],
    ids=str,
)
def test_published_and_extreme_sizes(run, sizes):
    assert_right(run, sizes)


# --- what must not matter --------------------------------------------------------------------------------------------


@implementations
def test_what_stands_beyond_the_visible_rows_does_not_matter(run):
    clean, dirty = Sizes(past=(3, 0, 5), capacity=12), Sizes(past=(3, 0, 5), capacity=12, garbage=1e30)
    assert np.abs(arrays(dirty)["past_key"]).max() > 1e29
    np.testing.assert_array_equal(run(arrays(clean), clean)[0], run(arrays(dirty), dirty)[0])


@implementations
def test_slack_in_the_capacity_does_not_matter(run):
    tight, wide = Sizes(past=(3, 1), tokens=4, capacity=7), Sizes(past=(3, 1), tokens=4, capacity=12)
    inputs = arrays(tight)
    widened = dict(inputs)
    for name in ("past_key", "past_latent"):
        widened[name] = np.pad(inputs[name], ((0, 0), (0, 0), (0, 5), (0, 0)))
    assert reference.relative_error(run(widened, wide)[0], run(inputs, tight)[0]) <= TOLERANCE


@implementations
def test_later_tokens_do_not_matter(run):
    sizes = Sizes()
    inputs = arrays(sizes)
    changed = {name: array.copy() for name, array in inputs.items()}
    for name in ("query", "key", "latent", "gate"):
        changed[name][:, 2:] += 1.0
    before, after = run(inputs, sizes)[0], run(changed, sizes)[0]
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert reference.relative_error(after[:, 2:], before[:, 2:]) > 0.01


@implementations
def test_a_prompt_at_once_or_token_by_token(run):
    sizes = Sizes(past=(2, 0, 5), tokens=4)
    inputs = arrays(sizes)
    at_once = run(inputs, sizes)
    one, step, outputs = replace(sizes, tokens=1), dict(inputs), []
    for t in range(sizes.tokens):
        for name in ("query", "key", "latent", "gate"):
            step[name] = np.ascontiguousarray(inputs[name][:, t : t + 1])
        step["past_length"] = inputs["past_length"] + t
        output, step["past_key"], step["past_latent"] = run(step, one)
        outputs.append(output)
    assert reference.relative_error(np.concatenate(outputs, axis=1), at_once[0]) <= TOLERANCE
    assert reference.relative_error(step["past_key"], at_once[1]) <= TOLERANCE
    np.testing.assert_array_equal(step["past_latent"], at_once[2])


@implementations
def test_a_batch_or_its_rows_one_at_a_time(run):
    sizes = Sizes(past=(2, 0, 5), tokens=4)
    inputs = arrays(sizes)
    together = run(inputs, sizes)
    for row in range(3):
        alone = {
            name: array if name in ("cos", "sin", "value_decoder") else array[row : row + 1]
            for name, array in inputs.items()
        }
        found = run(alone, replace(sizes, past=sizes.past[row : row + 1]))
        assert reference.relative_error(found[0], together[0][row : row + 1]) <= TOLERANCE
        assert reference.relative_error(found[1], together[1][row : row + 1]) <= TOLERANCE
        np.testing.assert_array_equal(found[2], together[2][row : row + 1])


@implementations
def test_every_input_matters(run):
    """Each input, changed, changes the output: what agrees with the formula above does so with all of them."""
    sizes = Sizes()
    inputs = arrays(sizes)
    before = run(inputs, sizes)[0]
    for name in op.INPUTS:
        changed = {key: array.copy() for key, array in inputs.items()}
        changed[name] = np.array([2, 1], np.int64) if name == "past_length" else -changed[name]
        assert reference.relative_error(run(changed, sizes)[0], before) > 0.01, name


# --- torch -----------------------------------------------------------------------------------------------------------


@SETTINGS
@given(sizes=all_sizes())
def test_in_place_is_the_functional_form_to_the_bit(sizes):
    inputs = arrays(sizes)
    for found, wanted in zip(in_torch_in_place(inputs, sizes), in_torch(inputs, sizes), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_the_functional_form_leaves_its_inputs_alone():
    sizes = Sizes()
    tensors = [torch.from_numpy(arrays(sizes)[name]) for name in op.INPUTS]
    kept = [tensor.clone() for tensor in tensors]
    results = torch.ops.gta.grouped_latent_attention(*tensors, *sizes.heads, sizes.scale)
    for name, tensor, copy in zip(op.INPUTS, tensors, kept, strict=True):
        assert torch.equal(tensor, copy), name
        assert all(tensor.untyped_storage().data_ptr() != result.untyped_storage().data_ptr() for result in results)


def test_the_in_place_form_leaves_all_but_the_caches_alone():
    sizes = Sizes()
    tensors = {name: torch.from_numpy(arrays(sizes)[name]) for name in op.INPUTS}
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    torch.ops.gta.grouped_latent_attention_(*tensors.values(), *sizes.heads, sizes.scale)
    changed = {name for name in op.INPUTS if not torch.equal(tensors[name], kept[name])}
    assert changed == {"past_key", "past_latent"}


def test_a_view_of_a_larger_cache_is_updated_in_place():
    sizes = Sizes()
    inputs = arrays(sizes)
    tensors = {name: torch.from_numpy(inputs[name].copy()) for name in op.INPUTS}
    big = {name: torch.full((4, *tensors[name].shape[1:]), 7.0) for name in ("past_key", "past_latent")}
    for name, buffer in big.items():
        buffer[1:3] = tensors[name]
        tensors[name] = buffer[1:3]
    output = torch.ops.gta.grouped_latent_attention_(*tensors.values(), *sizes.heads, sizes.scale)
    exact = in_torch(inputs, sizes)
    np.testing.assert_array_equal(output.numpy(), exact[0])
    np.testing.assert_array_equal(big["past_key"][1:3].numpy(), exact[1])
    assert (big["past_key"][[0, 3]] == 7.0).all()
    assert (big["past_latent"][[0, 3]] == 7.0).all()


@pytest.mark.parametrize("past", [(3, 0), (0,)])
def test_torch_accepts_the_functional_op(past):
    sizes = Sizes(past=past)
    inputs = arrays(sizes)
    tensors = [torch.from_numpy(inputs[name]) for name in op.INPUTS]
    torch.library.opcheck(torch.ops.gta.grouped_latent_attention.default, (*tensors, *sizes.heads, sizes.scale))


def test_torch_accepts_the_in_place_op():
    sizes = Sizes()
    inputs = arrays(sizes)
    tensors = [torch.from_numpy(inputs[name]) for name in op.INPUTS]
    torch.library.opcheck(torch.ops.gta.grouped_latent_attention_.default, (*tensors, *sizes.heads, sizes.scale))


def test_autograd_learns_that_the_caches_changed():
    sizes = Sizes()
    tensors = {name: torch.from_numpy(arrays(sizes)[name]) for name in op.INPUTS}
    before = {name: tensor._version for name, tensor in tensors.items()}
    torch.ops.gta.grouped_latent_attention_(*tensors.values(), *sizes.heads, sizes.scale)
    assert {name for name, tensor in tensors.items() if tensor._version > before[name]} == {"past_key", "past_latent"}


@pytest.mark.parametrize("name", ["grouped_latent_attention", "grouped_latent_attention_"])
def test_a_derivative_is_refused(name):
    sizes = Sizes()
    tensors = {each: torch.from_numpy(arrays(sizes)[each]) for each in op.INPUTS}
    tensors["query"].requires_grad_()
    attention = getattr(torch.ops.gta, name)
    with pytest.raises(BackendError, match=rf"gta::{name} has no derivative; .*no_grad"):
        torch.utils._pytree.tree_leaves(attention(*tensors.values(), *sizes.heads, sizes.scale))[0].sum().backward()
    with torch.no_grad():
        attention(*tensors.values(), *sizes.heads, sizes.scale)


class OnHostMemory:
    """In the place of the kernels: computes in float64 from addresses in host memory, fp16 alone."""

    def __init__(self, variant: Any, gpu: Any) -> None:
        assert (variant.compute, variant.cache) == ("fp16", "fp16")
        self.sizes = variant.sizes

    def workspace_bytes(self, batch: int, tokens: int, capacity: int) -> int:
        return batch * tokens * capacity

    def launch(self, stream: int, buffers: Any, *, batch: int, tokens: int, capacity: int, **numbers: Any) -> None:
        assert (stream, buffers.key_scale, buffers.latent_scale, bool(buffers.workspace)) == (STREAM, 0, 0, True)
        n_q, n_k, n_c = self.sizes.num_query_heads, self.sizes.num_key_heads, self.sizes.num_latent_heads
        d_k, d_l, hidden = self.sizes.key_dim, self.sizes.latent_dim, self.sizes.hidden_size
        shapes = {
            "query": (batch, tokens, n_q * d_k),
            "key": (batch, tokens, n_k * d_k),
            "latent": (batch, tokens, n_c * d_l),
            "gate": (batch, tokens, hidden),
            "past_key": (batch, n_k, capacity, d_k),
            "past_latent": (batch, n_c, capacity, d_l),
            "past_length": (batch,),
            "cos": (numbers["positions"], d_k // 2),
            "sin": (numbers["positions"], d_k // 2),
            "value_decoder": (n_q, d_l, hidden // n_q),
        }
        addresses = {"past_key": buffers.key_cache, "past_latent": buffers.latent_cache}
        given = {
            name: memory(addresses.get(name, getattr(buffers, name, 0)), shape, self.dtype_of(name))
            for name, shape in shapes.items()
        }
        heads = {"num_query_heads": n_q, "num_key_heads": n_k, "num_latent_heads": n_c}
        output, *caches = reference.grouped_latent_attention(**given, **heads, scale=numbers["scale"])
        memory(buffers.output, output.shape, np.float16)[...] = output
        given["past_key"][...], given["past_latent"][...] = caches

    @staticmethod
    def dtype_of(name: str) -> Any:
        return np.int64 if name == "past_length" else np.float16


def stored_in(inputs: dict[str, np.ndarray], dtype: Any) -> dict[str, np.ndarray]:
    return {name: array if name == "past_length" else array.astype(dtype) for name, array in inputs.items()}


def test_what_the_kernels_are_given(monkeypatch):
    """All between torch's tensors and the kernels, on host memory: addresses, sizes, and views."""
    pretend_gpu(monkeypatch, torch_ops)
    monkeypatch.setattr(torch_ops, "attention_kernels", OnHostMemory)
    sizes = Sizes(d_l=32)
    inputs = stored_in(arrays(sizes), np.float16)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in inputs.items()}
    for name in ("query", "gate", "value_decoder"):
        tensors[name] = tensors[name].transpose(0, 1).contiguous().transpose(0, 1)
        assert not tensors[name].is_contiguous()
    output = torch_ops._latent_attention_on_gpu(*(tensors[name] for name in op.INPUTS), *sizes.heads, sizes.scale)
    assert (output.dtype, output.is_contiguous()) == (torch.float16, True)
    results = (output, tensors["past_key"], tensors["past_latent"])
    for found, exact in zip(results, expected(inputs, sizes), strict=True):
        assert reference.relative_error(found.double().numpy(), exact) <= 2e-3


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, two bytes beyond where kernels read."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    memory.copy_(tensor)
    assert memory.is_contiguous() and memory.data_ptr() % 16
    return memory


def half_tensors(sizes: Sizes) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in stored_in(arrays(sizes), np.float16).items()}


def test_what_does_not_begin_where_kernels_read_is_copied(monkeypatch):
    pretend_gpu(monkeypatch, torch_ops)
    monkeypatch.setattr(torch_ops, "attention_kernels", OnHostMemory)
    sizes = Sizes(d_l=32)
    results = []
    for moved in (lambda tensor: tensor, unaligned):
        tensors = {n: t if n.startswith("past_") else moved(t) for n, t in half_tensors(sizes).items()}
        output = torch_ops._latent_attention_on_gpu(*tensors.values(), *sizes.heads, sizes.scale)
        results.append((output, tensors["past_key"], tensors["past_latent"]))
    assert all(torch.equal(found, wanted) for found, wanted in zip(*results, strict=True))


@pytest.mark.parametrize("cache", ["past_key", "past_latent"])
def test_a_cache_that_kernels_cannot_write_is_refused(cache, monkeypatch):
    """A copy of it would take what the call appends."""
    pretend_gpu(monkeypatch, torch_ops)
    monkeypatch.delattr(torch_ops, "attention_kernels")  # nothing is launched
    sizes = Sizes(d_l=32)
    tensors = half_tensors(sizes)
    tensors[cache] = unaligned(tensors[cache])
    with pytest.raises(BackendError, match=f"{cache} is written in place and begins at address 0x.*; expected a multi"):
        torch_ops._latent_attention_on_gpu(*tensors.values(), *sizes.heads, sizes.scale)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [(Sizes(d_l=24), np.float16), (Sizes(d_l=32, d_k=8), np.float16), (Sizes(d_l=32), np.float32)],
    ids=["latent width", "key width", "type"],
)
def test_what_no_kernels_are_made_for_is_left_to_torch(sizes, dtype, monkeypatch):
    pretend_gpu(monkeypatch, torch_ops)
    monkeypatch.delattr(torch_ops, "attention_kernels")  # whoever asks for some fails
    inputs = stored_in(arrays(sizes), dtype)
    tensors, again = ([torch.from_numpy(inputs[name].copy()) for name in op.INPUTS] for _ in range(2))
    output = torch_ops._latent_attention_on_gpu(*tensors, *sizes.heads, sizes.scale)
    assert torch.equal(output, torch.ops.gta.grouped_latent_attention_(*again, *sizes.heads, sizes.scale))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 8e-2), (torch.float16, 2e-2)])
def test_narrow_types_stay_narrow_and_near(dtype, tolerance):
    sizes = Sizes(past=(5, 2), tokens=4)
    inputs = arrays(sizes)
    tensors = [torch.from_numpy(inputs[name]) for name in op.INPUTS]
    narrow = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
    results = torch.ops.gta.grouped_latent_attention(*narrow, *sizes.heads, sizes.scale)
    assert {result.dtype for result in results} == {dtype}
    rounded = {name: tensor.double().numpy() for name, tensor in zip(op.INPUTS, narrow, strict=True)}
    rounded["past_length"] = inputs["past_length"]
    assert reference.relative_error(results[0].float().numpy(), expected(rounded, sizes)[0]) <= tolerance


# --- ONNX ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("sizes", [Sizes(), Sizes(n_q=5, n_k=1, n_c=1, d_k=64, d_l=128, past=(4,), tokens=1)], ids=str)
def test_the_checker_accepts_the_function(sizes, static):
    onnx.checker.check_model(model(sizes, static=static), full_check=True)


def test_the_function_takes_and_gives_what_the_op_says():
    function = onnx.parser.parse_function(op.FUNCTION)
    assert (function.domain, function.name) == ("gta", "GroupedLatentAttention")
    assert tuple(function.input) == op.INPUTS
    assert tuple(function.output) == op.OUTPUTS
    given_defaults = {attribute.name: helper.get_attribute_value(attribute) for attribute in function.attribute_proto}
    assert {*function.attribute, *given_defaults} == set(op.ATTRIBUTES)
    assert given_defaults == {"plugin_namespace": b"gta", "plugin_version": b"1"}
    assert {node.domain for node in function.node} == {""}  # standard operators only
    assert [(opset.domain, opset.version) for opset in function.opset_import] == [("", 24)]


def test_the_attributes_of_a_node():
    assert op.attributes(6, 2, 3, 0.125) == {
        "num_query_heads": 6,
        "num_key_heads": 2,
        "num_latent_heads": 3,
        "scale": 0.125,
        "plugin_namespace": "gta",
        "plugin_version": "1",
    }


@pytest.mark.parametrize("scale", [0.5, 0.01])
@implementations
def test_the_scale_is_the_attribute_and_not_the_width(run, scale):
    class Scaled(Sizes):
        @property
        def scale(self):
            return scale

    sizes = Scaled()
    inputs = arrays(sizes)
    found = quiet_session(model(sizes)).run(None, inputs) if run is in_onnxruntime else run(inputs, sizes)
    assert reference.relative_error(found[0], expected(inputs, sizes)[0]) <= TOLERANCE


# --- shape rules -----------------------------------------------------------------------------------------------------


def test_output_shapes_are_those_of_the_outputs():
    sizes = Sizes(n_q=6, n_k=2, n_c=3)
    inputs = arrays(sizes)
    shapes = op.output_shapes({name: array.shape for name, array in inputs.items()})
    assert tuple(shapes) == op.OUTPUTS
    assert list(shapes.values()) == [result.shape for result in expected(inputs, sizes)]


GOOD = {
    "num_query_heads": 6,
    "num_key_heads": 2,
    "num_latent_heads": 3,
    "key_dim": 16,
    "latent_dim": 24,
    "hidden_size": 288,
}


@pytest.mark.parametrize("changes", [{}, {"num_key_heads": 6, "num_latent_heads": 1}, {"hidden_size": 144}])
def test_sizes_that_fit_are_kept(changes):
    sizes = op.Sizes(**GOOD | changes)
    assert {name: getattr(sizes, name) for name in GOOD} == GOOD | changes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_key_heads", value) for value in (4, 0, -1, 12)),
        *(("num_latent_heads", value) for value in (4, 0, -1, 12)),
        ("key_dim", 15),
        ("hidden_size", 290),
        ("hidden_size", 72),
        ("latent_dim", 25),
        ("num_query_heads", 0),
        ("num_query_heads", -6),
        ("key_dim", 0),
        ("latent_dim", 0),
        ("hidden_size", 0),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        op.Sizes(**GOOD | {name: value})


PLAIN = GOOD | {"num_latent_heads": 2, "hidden_size": 144, "has_gate": False, "has_value_decoder": False}


@pytest.mark.parametrize(
    "changes",
    [{}, {"has_gate": True}, {"num_key_heads": 6, "num_latent_heads": 6}, {"latent_dim": 16, "hidden_size": 96}],
)
def test_sizes_without_a_value_decoder_are_those_of_grouped_query_attention(changes):
    sizes = op.Sizes(**PLAIN | changes)
    assert sizes.hidden_size == sizes.num_query_heads * sizes.latent_dim
    assert sizes != replace(sizes, has_gate=not sizes.has_gate)


@pytest.mark.parametrize(("name", "value"), [("num_latent_heads", 3), ("num_latent_heads", 1), ("hidden_size", 288)])
def test_only_a_value_decoder_widens_heads_and_groups_latents_in_another_way(name, value):
    assert op.Sizes(**PLAIN | {name: value, "has_value_decoder": True})
    with pytest.raises(ValueError, match=f"{name} .*there is no value_decoder"):
        op.Sizes(**PLAIN | {name: value})


# --- the baselines' attention ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaselineSizes:
    """One call of the baselines' op."""

    n_h: int = 4
    n_kv: int = 2
    d: int = 16
    past: tuple[int, ...] = (3, 0)
    tokens: int = 4
    capacity: int = 9
    positions: int = 12
    garbage: float = 0.0
    seed: int = 0


def baseline_arrays(sizes: BaselineSizes) -> dict[str, np.ndarray]:
    whole = arrays(
        Sizes(
            n_q=sizes.n_h,
            n_k=sizes.n_kv,
            n_c=sizes.n_kv,
            d_k=sizes.d,
            d_l=sizes.d,
            past=sizes.past,
            tokens=sizes.tokens,
            capacity=sizes.capacity,
            positions=sizes.positions,
            garbage=sizes.garbage,
            seed=sizes.seed,
        )
    )
    whole |= {"value": whole["latent"], "past_value": whole["past_latent"]}
    return {name: whole[name] for name in BASELINE_INPUTS}


def baseline_in_torch(inputs: dict[str, np.ndarray], sizes: BaselineSizes) -> list[np.ndarray]:
    tensors = [torch.from_numpy(inputs[name].copy()) for name in BASELINE_INPUTS]
    results = torch.ops.gta.grouped_query_attention(*tensors, sizes.n_h, sizes.n_kv, sizes.d**-0.5)
    return [result.numpy() for result in results]


def baseline_in_torch_in_place(inputs: dict[str, np.ndarray], sizes: BaselineSizes) -> list[np.ndarray]:
    tensors = {name: torch.from_numpy(inputs[name].copy()) for name in BASELINE_INPUTS}
    output = torch.ops.gta.grouped_query_attention_(*tensors.values(), sizes.n_h, sizes.n_kv, sizes.d**-0.5)
    return [result.numpy() for result in (output, tensors["past_key"], tensors["past_value"])]


def baseline_model(n_h: int, n_kv: int, d: int) -> onnx.ModelProto:
    shapes = {
        "query": ["B", "T", n_h * d],
        "key": ["B", "T", n_kv * d],
        "value": ["B", "T", n_kv * d],
        "past_key": ["B", n_kv, "S", d],
        "past_value": ["B", n_kv, "S", d],
        "past_length": ["B"],
        "cos": ["P", d // 2],
        "sin": ["P", d // 2],
    }
    outputs = {"output": shapes["query"], "present_key": shapes["past_key"], "present_value": shapes["past_value"]}
    attributes = {"num_query_heads": n_h, "num_key_heads": n_kv, "scale": d**-0.5}
    return wrap(op.BASELINE_FUNCTION, op.BASELINE_OP, shapes, outputs, attributes)


@lru_cache
def baseline_ort_session(n_h, n_kv, d):
    return quiet_session(baseline_model(n_h, n_kv, d))


def baseline_in_onnxruntime(inputs: dict[str, np.ndarray], sizes: BaselineSizes) -> list[np.ndarray]:
    return baseline_ort_session(sizes.n_h, sizes.n_kv, sizes.d).run(None, inputs)


def baseline_in_onnx_reference(inputs: dict[str, np.ndarray], sizes: BaselineSizes) -> list[np.ndarray]:
    return ReferenceEvaluator(baseline_model(sizes.n_h, sizes.n_kv, sizes.d)).run(None, inputs)


BASELINES = {
    "torch": baseline_in_torch,
    "torch in place": baseline_in_torch_in_place,
    "onnxruntime": baseline_in_onnxruntime,
    "onnx reference": baseline_in_onnx_reference,
}
baselines = pytest.mark.parametrize("run", BASELINES.values(), ids=BASELINES)


@st.composite
def all_baseline_sizes(draw) -> BaselineSizes:
    n_h = draw(st.sampled_from([1, 2, 3, 4, 6]))
    past = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    tokens = draw(st.integers(1, 9))
    capacity = max(past) + tokens + draw(st.integers(0, 3))
    return BaselineSizes(
        n_h=n_h,
        n_kv=draw(st.sampled_from(divisors(n_h))),
        d=draw(st.sampled_from([16, 24, 32, 64])),
        past=past,
        tokens=tokens,
        capacity=capacity,
        positions=capacity + draw(st.integers(0, 3)),
        garbage=draw(st.sampled_from([0.0, 1e30])),
        seed=draw(st.integers(0, 2**16)),
    )


@baselines
@settings(SETTINGS, max_examples=30)
@given(sizes=all_baseline_sizes())
def test_the_baseline_against_the_formula(run, sizes):
    inputs = baseline_arrays(sizes)
    output, key, value = run(inputs, sizes)
    exact_output, exact_key, exact_value = reference.grouped_query_attention(
        **inputs, num_heads=sizes.n_h, num_key_value_heads=sizes.n_kv, scale=sizes.d**-0.5
    )
    assert reference.relative_error(output, exact_output) <= TOLERANCE
    assert_cache(key, inputs["past_key"], exact_key, sizes.past, sizes.tokens)
    assert_cache(value, inputs["past_value"], exact_value, sizes.past, sizes.tokens)


def test_the_checker_accepts_the_baseline_function():
    onnx.checker.check_model(baseline_model(6, 3, 16), full_check=True)
    assert {node.domain for node in onnx.parser.parse_function(op.BASELINE_FUNCTION).node} == {""}


def test_torch_accepts_the_functional_baseline_op():
    sizes = BaselineSizes()
    inputs = baseline_arrays(sizes)
    tensors = [torch.from_numpy(inputs[name]) for name in BASELINE_INPUTS]
    kept = [tensor.clone() for tensor in tensors]
    torch.library.opcheck(
        torch.ops.gta.grouped_query_attention.default, (*tensors, sizes.n_h, sizes.n_kv, sizes.d**-0.5)
    )
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, kept, strict=True))


def test_torch_accepts_the_in_place_baseline_op():
    sizes = BaselineSizes()
    inputs = baseline_arrays(sizes)
    tensors = [torch.from_numpy(inputs[name]) for name in BASELINE_INPUTS]
    torch.library.opcheck(
        torch.ops.gta.grouped_query_attention_.default, (*tensors, sizes.n_h, sizes.n_kv, sizes.d**-0.5)
    )


@pytest.mark.parametrize("name", ["grouped_latent_attention", "grouped_query_attention"])
def test_the_ops_are_importable_by_name(name):
    for each in (name, f"{name}_"):
        assert getattr(torch_ops, each) is getattr(torch.ops.gta, each).default
