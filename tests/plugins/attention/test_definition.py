"""The attention op, in torch and as an ONNX function, against the formula in float64."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from hypothesis import given, settings
from onnx import helper
from onnx.reference import ReferenceEvaluator

from gta_edge.errors import BackendError
from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.attention import torch as torch_ops
from gta_edge.plugins.attention.function import function
from tests.helpers import reference
from tests.helpers.attention_models import (
    TOLERANCE,
    Sizes,
    all_sizes,
    arrays,
    assert_cache,
    expected,
    model,
)
from tests.helpers.host_memory import STREAM, memory, pretend_gpu

try:
    import onnxruntime
except ImportError:  # a version that knows opset 24 needs Python 3.11
    onnxruntime = None

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)

# --- the implementations, each as a function of the inputs by name and of the sizes ----------------------------------


def tensors_of(inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor | None]:
    """All of the op's inputs in order, None for those that are absent."""
    return {name: torch.from_numpy(inputs[name].copy()) if name in inputs else None for name in op.MODEL_INPUTS}


def in_torch(inputs: dict[str, np.ndarray], sizes: Sizes) -> list[np.ndarray]:
    tensors = tensors_of(inputs).values()
    results = torch.ops.gta.grouped_latent_attention(*tensors, *sizes.heads, sizes.scale)
    return [result.numpy() for result in results]


def in_torch_in_place(inputs: dict[str, np.ndarray], sizes: Sizes) -> list[np.ndarray]:
    tensors = tensors_of(inputs)
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
def ort_session(sizes: Sizes) -> "onnxruntime.InferenceSession":
    return quiet_session(model(sizes))


def in_onnxruntime(inputs: dict[str, np.ndarray], sizes: Sizes) -> list[np.ndarray]:
    call = {"past": (), "tokens": 0, "capacity": 0, "positions": 0, "garbage": 0.0, "seed": 0}  # not of the model
    return ort_session(replace(sizes, **call)).run(None, inputs)


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

GQA = Sizes(n_c=2, gate=False, decoder=False)
FORMS = {"gta": Sizes(), "gqa": GQA}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


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
        Sizes(n_q=9, n_k=3, n_c=3, d_k=64, d_l=64, gate=False, decoder=False),  # SmolLM2-135M: grouped-query attention
        Sizes(n_q=4, n_k=4, n_c=4, d_k=96, d_l=96, gate=False, decoder=False),  # multi-head attention
        Sizes(n_q=4, n_k=1, n_c=1, d_k=16, d_l=32, gate=False, decoder=False),
        Sizes(n_q=4, n_k=2, n_c=2, d_k=16, d_l=24, decoder=False),
        Sizes(n_q=4, n_k=2, n_c=1, d_k=16, d_l=24, gate=False),
    ],
    ids=str,
)
def test_published_and_extreme_sizes(run, sizes):
    assert_right(run, sizes)


# --- what must not matter --------------------------------------------------------------------------------------------


@forms
@implementations
def test_what_stands_beyond_the_visible_rows_does_not_matter(run, form):
    clean = replace(form, past=(3, 0, 5), capacity=12)
    dirty = replace(clean, garbage=1e30)
    assert np.abs(arrays(dirty)["past_key"]).max() > 1e29
    np.testing.assert_array_equal(run(arrays(clean), clean)[0], run(arrays(dirty), dirty)[0])


@forms
@implementations
def test_slack_in_the_capacity_does_not_matter(run, form):
    tight = replace(form, past=(3, 1), tokens=4, capacity=7)
    wide = replace(tight, capacity=12)
    inputs = arrays(tight)
    widened = dict(inputs)
    for name in ("past_key", "past_latent"):
        widened[name] = np.pad(inputs[name], ((0, 0), (0, 0), (0, 5), (0, 0)))
    assert reference.relative_error(run(widened, wide)[0], run(inputs, tight)[0]) <= TOLERANCE


@forms
def test_padding_may_lie_beyond_the_last_position(form):
    sizes = replace(form, past=(8,), tokens=4, capacity=12, positions=9)
    inputs = arrays(sizes)
    outputs = [run(inputs, sizes)[0] for run in (in_torch, in_torch_in_place)]
    alone = {n: a[:, :1] if n in {"query", "key", "latent", "gate"} else a for n, a in inputs.items()}
    for output in outputs:
        np.testing.assert_allclose(output[:, :1], in_torch(alone, replace(sizes, tokens=1))[0], rtol=1e-5, atol=1e-6)


@forms
@implementations
def test_later_tokens_do_not_matter(run, form):
    inputs = arrays(form)
    changed = {name: array.copy() for name, array in inputs.items()}
    for name in {"query", "key", "latent", "gate"} & inputs.keys():
        changed[name][:, 2:] += 1.0
    before, after = run(inputs, form)[0], run(changed, form)[0]
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert reference.relative_error(after[:, 2:], before[:, 2:]) > 0.01


@forms
@implementations
def test_a_prompt_at_once_or_token_by_token(run, form):
    sizes = replace(form, past=(2, 0, 5), tokens=4)
    inputs = arrays(sizes)
    at_once = run(inputs, sizes)
    one, step, outputs = replace(sizes, tokens=1), dict(inputs), []
    for t in range(sizes.tokens):
        for name in {"query", "key", "latent", "gate"} & inputs.keys():
            step[name] = np.ascontiguousarray(inputs[name][:, t : t + 1])
        step["past_length"] = inputs["past_length"] + t
        output, step["past_key"], step["past_latent"] = run(step, one)
        outputs.append(output)
    assert reference.relative_error(np.concatenate(outputs, axis=1), at_once[0]) <= TOLERANCE
    assert reference.relative_error(step["past_key"], at_once[1]) <= TOLERANCE
    np.testing.assert_array_equal(step["past_latent"], at_once[2])


@forms
@implementations
def test_a_batch_or_its_rows_one_at_a_time(run, form):
    sizes = replace(form, past=(2, 0, 5), tokens=4)
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


@forms
@implementations
def test_every_input_matters(run, form):
    """Each input, changed, changes the output: what agrees with the formula above does so with all of them."""
    inputs = arrays(form)
    before = run(inputs, form)[0]
    for name in inputs:
        changed = {key: array.copy() for key, array in inputs.items()}
        changed[name] = np.array([2, 1], np.int64) if name == "past_length" else -changed[name]
        assert reference.relative_error(run(changed, form)[0], before) > 0.01, name


# --- torch -----------------------------------------------------------------------------------------------------------


@SETTINGS
@given(sizes=all_sizes())
def test_in_place_is_the_functional_form_to_the_bit(sizes):
    inputs = arrays(sizes)
    for found, wanted in zip(in_torch_in_place(inputs, sizes), in_torch(inputs, sizes), strict=True):
        np.testing.assert_array_equal(found, wanted)


@forms
def test_the_functional_form_leaves_its_inputs_alone(form):
    tensors = tensors_of(arrays(form))
    kept = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
    results = torch.ops.gta.grouped_latent_attention(*tensors.values(), *form.heads, form.scale)
    for name, copy in kept.items():
        tensor = tensors[name]
        assert torch.equal(tensor, copy), name
        assert all(tensor.untyped_storage().data_ptr() != result.untyped_storage().data_ptr() for result in results)


@forms
def test_the_in_place_form_leaves_all_but_the_caches_alone(form):
    tensors = tensors_of(arrays(form))
    kept = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
    torch.ops.gta.grouped_latent_attention_(*tensors.values(), *form.heads, form.scale)
    assert {name for name in kept if not torch.equal(tensors[name], kept[name])} == {"past_key", "past_latent"}


def test_a_view_of_a_larger_cache_is_updated_in_place():
    sizes = Sizes()
    inputs = arrays(sizes)
    tensors = {name: torch.from_numpy(inputs[name].copy()) for name in op.MODEL_INPUTS}
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


@forms
@pytest.mark.parametrize("past", [(3, 0), (0,)])
def test_torch_accepts_the_functional_op(past, form):
    sizes = replace(form, past=past)
    tensors = tensors_of(arrays(sizes)).values()
    torch.library.opcheck(torch.ops.gta.grouped_latent_attention.default, (*tensors, *sizes.heads, sizes.scale))


@forms
def test_torch_accepts_the_in_place_op(form):
    arguments = (*tensors_of(arrays(form)).values(), *form.heads, form.scale)
    torch.library.opcheck(torch.ops.gta.grouped_latent_attention_.default, arguments)


@forms
def test_autograd_learns_that_the_caches_changed(form):
    tensors = tensors_of(arrays(form))
    before = {name: tensor._version for name, tensor in tensors.items() if tensor is not None}
    torch.ops.gta.grouped_latent_attention_(*tensors.values(), *form.heads, form.scale)
    assert {name for name in before if tensors[name]._version > before[name]} == {"past_key", "past_latent"}


@forms
@pytest.mark.parametrize("name", ["grouped_latent_attention", "grouped_latent_attention_"])
def test_a_derivative_is_refused(name, form):
    tensors = tensors_of(arrays(form))
    tensors["query"].requires_grad_()
    attention = getattr(torch.ops.gta, name)
    with pytest.raises(BackendError, match=rf"gta::{name} has no derivative; .*no_grad"):
        torch.utils._pytree.tree_leaves(attention(*tensors.values(), *form.heads, form.scale))[0].sum().backward()
    with torch.no_grad():
        attention(*tensors.values(), *form.heads, form.scale)


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
            if getattr(buffers, name, 1)
        }
        heads = {"num_query_heads": n_q, "num_key_heads": n_k, "num_latent_heads": n_c}
        absent = {"gate": not self.sizes.has_gate, "value_decoder": not self.sizes.has_value_decoder}
        assert {name for name in absent if not getattr(buffers, name)} == {name for name in absent if absent[name]}
        given |= {name: None for name in absent if absent[name]}
        output, *caches = reference.grouped_latent_attention(**given, **heads, scale=numbers["scale"])
        memory(buffers.output, output.shape, np.float16)[...] = output
        given["past_key"][...], given["past_latent"][...] = caches

    @staticmethod
    def dtype_of(name: str) -> Any:
        return np.int64 if name == "past_length" else np.float16


def stored_in(inputs: dict[str, np.ndarray], dtype: Any) -> dict[str, np.ndarray]:
    return {name: array if name == "past_length" else array.astype(dtype) for name, array in inputs.items()}


@pytest.mark.parametrize(("gate", "decoder"), [(True, True), (False, False), (True, False), (False, True)])
def test_what_the_kernels_are_given(gate, decoder, monkeypatch):
    """All between torch's tensors and the kernels, on host memory: addresses, sizes, and views."""
    pretend_gpu(monkeypatch, torch_ops)
    monkeypatch.setattr(torch_ops, "attention_kernels", OnHostMemory)
    sizes = Sizes(d_l=32, n_c=1 if decoder else 2, gate=gate, decoder=decoder)
    inputs = stored_in(arrays(sizes), np.float16)
    tensors = tensors_of(inputs)
    for name in {"query", "gate", "value_decoder"} & inputs.keys():
        tensors[name] = tensors[name].transpose(0, 1).contiguous().transpose(0, 1)
        assert not tensors[name].is_contiguous()
    output = torch_ops._latent_attention_on_gpu(*tensors.values(), *sizes.heads, sizes.scale)
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
    tensors, again = ([torch.from_numpy(inputs[name].copy()) for name in op.MODEL_INPUTS] for _ in range(2))
    output = torch_ops._latent_attention_on_gpu(*tensors, *sizes.heads, sizes.scale)
    assert torch.equal(output, torch.ops.gta.grouped_latent_attention_(*again, *sizes.heads, sizes.scale))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 8e-2), (torch.float16, 2e-2)])
def test_narrow_types_stay_narrow_and_near(dtype, tolerance):
    sizes = Sizes(past=(5, 2), tokens=4)
    inputs = arrays(sizes)
    tensors = [torch.from_numpy(inputs[name]) for name in op.MODEL_INPUTS]
    narrow = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
    results = torch.ops.gta.grouped_latent_attention(*narrow, *sizes.heads, sizes.scale)
    assert {result.dtype for result in results} == {dtype}
    rounded = {name: tensor.double().numpy() for name, tensor in zip(op.MODEL_INPUTS, narrow, strict=True)}
    rounded["past_length"] = inputs["past_length"]
    assert reference.relative_error(results[0].float().numpy(), expected(rounded, sizes)[0]) <= tolerance


# --- ONNX ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    "sizes", [*FORMS.values(), Sizes(n_q=5, n_k=1, n_c=1, d_k=64, d_l=128, past=(4,), tokens=1)], ids=str
)
def test_the_checker_accepts_the_function(sizes, static):
    onnx.checker.check_model(model(sizes, static=static), full_check=True)


@pytest.mark.parametrize("form", [(True, True), (True, False), (False, True), (False, False)])
def test_the_function_takes_and_gives_what_the_op_says(form):
    parsed = onnx.parser.parse_function(function(*form))
    assert (parsed.domain, parsed.name) == ("gta", "GroupedLatentAttention")
    assert tuple(parsed.input) == (op.MODEL_INPUTS if form[1] else op.MODEL_INPUTS[:-1])
    assert tuple(parsed.output) == op.MODEL_OUTPUTS
    given_defaults = {attribute.name: helper.get_attribute_value(attribute) for attribute in parsed.attribute_proto}
    assert {*parsed.attribute, *given_defaults} == set(op.ATTRIBUTES)
    assert given_defaults == {"plugin_namespace": b"gta", "plugin_version": b"1"}
    assert {node.domain for node in parsed.node} == {""}  # standard operators only
    assert [(opset.domain, opset.version) for opset in parsed.opset_import] == [("", 24)]


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
    kernel_sizes = op.Sizes(6, 2, 3, sizes.d_k, sizes.d_l, sizes.hidden)
    shapes = op.output_shapes(kernel_sizes, {name: array.shape for name, array in inputs.items()})
    assert tuple(shapes) == op.MODEL_OUTPUTS
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


# --- grouped-query attention -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "cached"), [(4, 2), (6, 1), (3, 3)])
def test_without_gate_and_decoder_it_is_grouped_query_attention(heads, cached):
    """The formula of GQA is written down once more, and the op's reference is that one."""
    sizes = Sizes(n_q=heads, n_k=cached, n_c=cached, d_k=16, d_l=16, gate=False, decoder=False)
    inputs = arrays(sizes)
    renamed = {name.replace("latent", "value"): array for name, array in inputs.items()}
    exact = reference.grouped_query_attention(**renamed, num_heads=heads, num_key_value_heads=cached, scale=sizes.scale)
    for found, wanted in zip(expected(inputs, sizes), exact, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-13, atol=1e-13)


def test_the_ops_are_importable_by_name():
    assert torch_ops.grouped_latent_attention is torch.ops.gta.grouped_latent_attention.default
    assert torch_ops.grouped_latent_attention_ is torch.ops.gta.grouped_latent_attention_.default
