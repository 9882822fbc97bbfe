"""The attention op with a managed cache, in torch and as an ONNX function: the formula, and what must hold of any."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from gta_edge.errors import BackendError
from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.attention import torch as torch_ops  # noqa: F401  # registers the op
from gta_edge.plugins.attention.function import function
from tests.helpers.attention_models import (
    TOLERANCE,
    Sizes,
    arrays,
    assert_cache,
    attended,
    managed_sizes,
    model,
)

onnxruntime: Any
try:
    import onnxruntime
except ImportError:  # a version that knows opset 24 needs Python 3.11
    onnxruntime = None

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
Arrays = dict[str, np.ndarray]
Results = dict[str, np.ndarray]
RECEIVED = ("past_received", "query_weight", "decay")


# --- the implementations ---------------------------------------------------------------------------------------------


def arguments_of(inputs: Arrays, sizes: Sizes) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """The arguments of torch's op, and its tensors by name, which are copies."""
    tensors = {name: torch.from_numpy(array.copy()) for name, array in inputs.items()}
    own, features = ([tensors.get(name) for name in names] for names in (op.MODEL_INPUTS, op.FEATURE_INPUTS))
    return [*own, *sizes.heads, sizes.scale, *features, sizes.features.observe or ""], tensors


def in_torch(inputs: Arrays, sizes: Sizes) -> Results:
    arguments, tensors = arguments_of(inputs, sizes)
    output = torch.ops.gta.grouped_latent_attention_(*arguments)
    caches = {name: tensors[name.replace("present", "past")] for name in sizes.outputs[1:]}
    return {name: tensor.numpy() for name, tensor in ({"output": output} | caches).items()}


@lru_cache
def ort_session(sizes: Sizes) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # a warning for every cache that is copied
    options.intra_op_num_threads = 1
    proto = model(sizes).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def in_onnxruntime(inputs: Arrays, sizes: Sizes) -> Results:
    if onnxruntime is None:
        pytest.skip("onnxruntime is not installed")
    call = {"past": (), "tokens": 0, "capacity": 0, "positions": 0, "garbage": 0.0, "seed": 0, "words": 0}
    session = ort_session(replace(sizes, **call))  # those are not of the model
    return dict(zip(sizes.outputs, session.run(None, inputs), strict=True))


def in_onnx_reference(inputs: Arrays, sizes: Sizes) -> Results:
    return dict(zip(sizes.outputs, ReferenceEvaluator(model(sizes)).run(None, inputs), strict=True))


Implementation = Callable[[Arrays, Sizes], Results]
IMPLEMENTATIONS: dict[str, Implementation] = {
    "torch": in_torch,
    "onnxruntime": in_onnxruntime,
    "onnx reference": in_onnx_reference,
}
implementations = pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)

GQA = {"n_c": 2, "gate": False, "decoder": False}
forms = pytest.mark.parametrize("form", [{}, GQA], ids=["gta", "gqa"])
observations = pytest.mark.parametrize("observe", op.OBSERVATIONS)


def near(found: np.ndarray, exact: np.ndarray) -> bool:
    return bool(np.abs(found - exact).max(initial=0) <= TOLERANCE * max(1.0, float(np.abs(exact).max(initial=0))))


def assert_received(found: np.ndarray, exact: np.ndarray, sizes: Sizes) -> None:
    """In the rows in use; what stands in the others is not specified."""
    assert found.dtype == np.float32
    for row, length in enumerate(sizes.past):
        assert near(found[row, : length + sizes.tokens], exact[row, : length + sizes.tokens])


# --- the formula -----------------------------------------------------------------------------------------------------


@implementations
@SETTINGS
@given(sizes=managed_sizes())
def test_against_the_formula(run, sizes):
    inputs = arrays(sizes)
    exact = attended(inputs, sizes)
    if sizes.features.observe == "last":  # float32 may round what is at the threshold to its other side
        importance = inputs["query_weight"][:, :, None, None] * exact.weights
        assume(np.abs(importance - 1).min() > 1e-4)
    found = run(inputs, sizes)
    assert tuple(found) == sizes.outputs
    assert near(found["output"], exact.output)
    for name in ("key", "latent"):
        present = getattr(exact, f"present_{name}")
        assert_cache(found[f"present_{name}"], inputs[f"past_{name}"], present, sizes.past, sizes.tokens)
    if sizes.features.observe:
        assert_received(found["present_received"], exact.received, sizes)


def test_without_features_the_function_is_that_of_every_bundle():
    """Bundles hold this text; it changes with the op's version alone."""
    texts = "".join(function(*form) for form in product((True, False), repeat=2))
    assert (
        hashlib.sha256(texts.encode()).hexdigest() == "ef3b8048853dc727065dba64e810f04c60b163a2f80ae8e41562fa64b8e8acda"
    )
    assert function(True, True, op.Features()) == function()


@implementations
@forms
def test_inputs_that_say_what_absent_ones_mean_change_nothing(run, form):
    """Positions that are rows, no bias, branches that are causal."""
    plain = Sizes(past=(3, 0), tokens=4, capacity=9, **form)
    inputs = arrays(plain)
    full = replace(plain, features=op.Features(None, 2, True, True))
    rows, tokens = np.arange(9), np.arange(4)
    words = np.stack([(((rows[:, None] <= past + tokens) << tokens).sum(1)) for past in plain.past])
    spelled = inputs | {
        "positions": inputs["past_length"][:, None] + tokens,
        "row_bias": np.zeros((2, 2), np.float32),
        "branch_start": np.zeros(2, np.int64),
        "branches": words.astype(np.int64),
    }
    found, wanted = run(spelled, full), run(inputs, plain)
    for name in op.MODEL_OUTPUTS:
        assert near(found[name], wanted[name])


# --- what a managed cache relies on ----------------------------------------------------------------------------------


def moved(inputs: Arrays, order: np.ndarray) -> Arrays:
    """The first rows of every cache, and of a bias as long, in another order; one sequence."""
    changed = {name: array.copy() for name, array in inputs.items()}
    for name in ("past_key", "past_latent"):
        changed[name][:, :, : len(order)] = inputs[name][:, :, order]
    for name in {"past_received", "row_bias"} & inputs.keys():
        if inputs[name].shape[1] > order.max():
            changed[name][:, : len(order)] = inputs[name][:, order]
    return changed


@implementations
@forms
@observations
def test_the_order_of_rows_does_not_matter(run, form, observe):
    features = op.Features(observe, op.MAX_BIAS_ROWS, True)
    sizes = Sizes(past=(8,), tokens=3, capacity=12, positions=20, features=features, **form)
    inputs = arrays(sizes)
    order = np.random.default_rng(1).permutation(8)
    before, after = run(inputs, sizes), run(moved(inputs, order), sizes)
    assert near(after["output"], before["output"])
    assert near(after["present_received"][:, :8], before["present_received"][:, order])
    assert near(after["present_received"][:, 8:11], before["present_received"][:, 8:11])


@implementations
@forms
def test_evicting_from_the_middle_is_a_mask(run, form):
    """Holes are filled from the end; the new tokens keep their positions."""
    sizes = Sizes(past=(9,), tokens=2, capacity=12, positions=20, features=op.Features(has_positions=True), **form)
    inputs = arrays(sizes) | {"positions": np.array([[9, 10]])}
    kept = np.array([0, 7, 8, 3, 4, 5])  # 1, 2 and 6 go; 8 and 7 take the places of 1 and 2
    evicted = moved(inputs, kept) | {"past_length": np.array([6])}
    words = np.array([[0b11 if row in kept else 0 for row in range(9)] + [0b11, 0b10]])
    masked = inputs | {"branch_start": np.zeros(1, np.int64), "branches": words}
    tree = replace(sizes, features=op.Features(has_positions=True, has_branches=True))
    assert near(run(evicted, sizes)["output"], run(masked, tree)["output"])
    assert not near(run(inputs, sizes)["output"], run(masked, tree)["output"])
    rows_for_positions = {name: array for name, array in evicted.items() if name != "positions"}
    plain = run(rows_for_positions, replace(sizes, features=op.Features()))
    assert not near(plain["output"], run(masked, tree)["output"])  # as where position and fill are confused


@implementations
@forms
def test_copies_of_a_row_are_that_row_once_with_a_bias(run, form):
    copies, sizes = (
        5,
        Sizes(past=(8,), tokens=2, capacity=12, positions=20, features=op.Features(None, 2, True), **form),
    )
    inputs = arrays(sizes) | {"positions": np.array([[8, 9]]), "row_bias": np.zeros((1, 2), np.float32)}
    many = moved(inputs, np.array([0, 1, 1, 1, 1, 1, 6, 7]))
    once = moved(inputs, np.array([0, 1, 6, 7])) | {"past_length": np.array([4])}
    once["row_bias"] = np.array([[0, np.log(copies)]], np.float32)
    assert near(run(once, sizes)["output"], run(many, sizes)["output"])
    assert not near(run(once | {"row_bias": inputs["row_bias"]}, sizes)["output"], run(many, sizes)["output"])


@implementations
@SETTINGS
@given(sizes=managed_sizes())
def test_received_sums_to_the_queries_weights(run, sizes):
    sizes = replace(sizes, features=replace(sizes.features, observe="mass", has_branches=False))
    inputs = arrays(sizes)
    found = run(inputs | {"decay": np.zeros(len(sizes.past), np.float32)}, sizes)["present_received"]
    for row, past in enumerate(sizes.past):
        total = sizes.n_q * inputs["query_weight"][row].sum()
        assert near(found[row, : past + sizes.tokens].sum(), total)


@st.composite
def trees(draw) -> tuple[int, ...]:
    """The parent of each of some new tokens, -1 for the cache; parents come first."""
    size = draw(st.integers(1, 8))
    return tuple(draw(st.integers(-1, token - 1)) for token in range(size))


def path(parents: tuple[int, ...], token: int) -> list[int]:
    """From the root to a token."""
    found = []
    while token >= 0:
        found.append(token)
        token = parents[token]
    return found[::-1]


@implementations
@SETTINGS
@given(parents=trees(), past=st.integers(0, 5), form=st.sampled_from([{}, GQA]))
def test_each_leaf_of_a_tree_is_its_path_alone(run, parents, past, form):
    tokens = len(parents)
    paths = [path(parents, token) for token in range(tokens)]
    features = op.Features(has_positions=True, has_branches=True)
    sizes = Sizes(past=(past,), tokens=tokens, capacity=past + tokens, positions=20, features=features, **form)
    words = np.array([[sum(1 << t for t in range(tokens) if row in paths[t]) for row in range(tokens)]])
    inputs = arrays(sizes) | {
        "positions": np.array([[past + len(each) - 1 for each in paths]]),
        "branch_start": np.array([past]),
        "branches": words,
    }
    tree = run(inputs, sizes)["output"]
    for token in set(range(tokens)) - set(parents):
        own = {name: array for name, array in inputs.items() if name not in op.FEATURE_INPUTS}
        for name in {"query", "key", "latent", "gate"} & inputs.keys():
            own[name] = np.ascontiguousarray(inputs[name][:, paths[token]])
        alone = run(own, replace(sizes, tokens=len(paths[token]), features=op.Features()))["output"]
        assert near(tree[:, paths[token]], alone)


@implementations
@forms
@observations
def test_a_query_that_sees_nothing_gives_zeros_and_receives_nothing(run, form, observe):
    features = op.Features(observe, 1, True, True)
    sizes = Sizes(past=(3, 0), tokens=4, capacity=9, garbage=1e30, features=features, **form)
    inputs = arrays(sizes) | {"branch_start": np.zeros(2, np.int64), "branches": np.full((2, 9), 0b1010)}
    inputs["past_received"][...] = 0
    inputs["query_weight"] = np.array([[1e6, 0, 1e6, 0]] * 2, np.float32)  # of those that see nothing
    found = run(inputs, sizes)
    assert (found["output"][:, [0, 2]] == 0).all()
    assert (found["output"][:, [1, 3]] != 0).any(-1).all()
    for row, past in enumerate(sizes.past):
        nothing = np.full(past + 4, 0.0 if observe == "mass" else -1.0)
        nothing[:past] = 0.0
        np.testing.assert_array_equal(found["present_received"][row, : past + 4], nothing)


@implementations
def test_more_tokens_than_a_word_has_bits_are_causal(run):
    sizes = Sizes(past=(3, 0), tokens=65, capacity=70, positions=90, features=op.Features(None, 0, True, True))
    inputs = arrays(sizes)
    causal = replace(sizes, features=op.Features(has_positions=True))
    plain = {name: array for name, array in inputs.items() if name not in ("branch_start", "branches")}
    assert near(run(inputs, sizes)["output"], run(plain, causal)["output"])


@implementations
def test_the_last_of_64_tokens_has_the_sign_bit(run):
    features = op.Features(has_positions=True, has_branches=True)
    sizes = Sizes(past=(1,), tokens=64, capacity=65, positions=65, features=features)
    causal = [sum(1 << query for query in range(row, 64)) for row in range(64)]
    words = np.array([causal], np.uint64).view(np.int64)
    positions = np.arange(1, 65)[None]
    inputs = arrays(sizes) | {"branch_start": np.array([1]), "branches": words, "positions": positions}
    plain = {name: array for name, array in inputs.items() if name not in op.FEATURE_INPUTS}
    assert near(run(inputs, sizes)["output"], run(plain, replace(sizes, features=op.Features()))["output"])


@implementations
@observations
def test_a_batch_or_its_rows_one_at_a_time(run, observe):
    sizes = Sizes(past=(2, 0, 5), tokens=4, capacity=12, features=op.Features(observe, 3, True, True))
    inputs = arrays(sizes)
    together = run(inputs, sizes)
    for row in range(3):
        shared = {"cos", "sin", "value_decoder"}
        alone = {name: x if name in shared else np.ascontiguousarray(x[row : row + 1]) for name, x in inputs.items()}
        own = replace(sizes, past=sizes.past[row : row + 1])
        found = run(alone, own)
        assert near(found["output"], together["output"][row : row + 1])
        assert_received(found["present_received"], together["present_received"][row : row + 1], own)


@implementations
@pytest.mark.parametrize("observe", [None, *op.OBSERVATIONS])
def test_every_input_matters(run, observe):
    """What agrees with the formula above does so with all of them."""
    sizes = Sizes(past=(5, 4), capacity=12, features=op.Features(observe, 3, True, True), words=9)
    inputs = arrays(sizes)
    if observe:
        inputs["past_received"][...] = 1.5
    before = run(inputs, sizes)
    changes = {"positions": 1, "row_bias": 1, "branch_start": -1, "branches": 3, "past_received": 7, "query_weight": 9}
    for name in set(sizes.features.inputs) - ({"decay"} if observe == "last" else set()):
        changed = {key: array.copy() for key, array in inputs.items()}
        if name == "branches":
            changed[name] = ~changed[name]
        elif name == "positions":
            changed[name] = changed[name][:, ::-1].copy()
        else:
            changed[name] = (changed[name] + changes.get(name, 1)).astype(changed[name].dtype)
        after = run(changed, sizes)
        output = "present_received" if name in RECEIVED else "output"
        assert not near(after[output][:, :4], before[output][:, :4]), name


# --- torch -----------------------------------------------------------------------------------------------------------


FULL = op.Features("mass", 3, True, True)


@pytest.mark.parametrize("features", [op.Features(has_positions=True), op.Features("last"), FULL], ids=str)
def test_torch_accepts_the_op(features):
    sizes = Sizes(features=features)
    torch.library.opcheck(torch.ops.gta.grouped_latent_attention_.default, tuple(arguments_of(arrays(sizes), sizes)[0]))


def test_autograd_learns_what_changed():
    sizes = Sizes(features=FULL)
    arguments, tensors = arguments_of(arrays(sizes), sizes)
    before = {name: tensor._version for name, tensor in tensors.items()}
    torch.ops.gta.grouped_latent_attention_(*arguments)
    changed = {name for name in before if tensors[name]._version > before[name]}
    assert changed == {"past_key", "past_latent", "past_received"}


def test_nothing_but_the_caches_is_written():
    sizes = Sizes(features=FULL)
    inputs = arrays(sizes)
    arguments, tensors = arguments_of(inputs, sizes)
    torch.ops.gta.grouped_latent_attention_(*arguments)
    for name in inputs.keys() - {"past_key", "past_latent", "past_received"}:
        np.testing.assert_array_equal(tensors[name].numpy(), inputs[name], err_msg=name)


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        ("branches", "branch_start without the others of branch_start, branches; expected all or none"),
        ("branch_start", "branches without the others"),
        ("decay", "past_received and query_weight without the others"),
        ("past_received", "query_weight and decay without the others"),
        (RECEIVED, "observe is given without past_received; expected both or neither"),
    ],
)
def test_inputs_that_go_together_are_not_given_alone(lacks, message):
    sizes = Sizes(features=FULL)
    inputs = arrays(sizes)
    for name in [lacks] if isinstance(lacks, str) else lacks:
        del inputs[name]
    with pytest.raises(BackendError, match=message):
        torch.ops.gta.grouped_latent_attention_(*arguments_of(inputs, sizes)[0])


def test_sizes_beyond_what_there_can_be_are_refused():
    sizes = Sizes(past=(0,), tokens=1, capacity=2, features=op.Features(bias_rows=3))
    with pytest.raises(BackendError, match="row_bias has 3 rows; expected at most the capacity 2"):
        in_torch(arrays(sizes), sizes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_observe_in_float32(dtype):
    sizes = Sizes(features=FULL)
    arguments, tensors = arguments_of(arrays(sizes), sizes)
    narrow = [
        x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and i < len(op.MODEL_INPUTS) else x
        for i, x in enumerate(arguments)
    ]
    assert torch.ops.gta.grouped_latent_attention_(*narrow).dtype == dtype
    exact = attended(arrays(sizes), sizes)
    received, wanted = tensors["past_received"].numpy(), exact.received
    for row, length in enumerate(sizes.past):
        assert np.abs(received - wanted)[row, : length + sizes.tokens].max() < 0.05 * np.nanmax(wanted)


# --- the definition --------------------------------------------------------------------------------------------------


ALL_FEATURES = [
    op.Features(*values) for values in product((None, *op.OBSERVATIONS), (0, 1, 8), (False, True), (False, True))
]


@pytest.mark.parametrize("form", list(product((True, False), repeat=2)))
def test_every_combination_has_a_function_that_the_checker_accepts(form):
    gate, decoder = form
    for features in ALL_FEATURES:
        sizes = Sizes(n_c=1 if decoder else 2, gate=gate, decoder=decoder, features=features)
        onnx.checker.check_model(model(sizes), full_check=True)
        parsed = onnx.parser.parse_function(function(gate, decoder, features))
        assert tuple(parsed.output) == features.outputs
        assert {node.domain for node in parsed.node} == {""}


@pytest.mark.parametrize("features", ALL_FEATURES, ids=str)
def test_features_are_read_off_a_node(features):
    sizes = Sizes(features=features)
    shapes = {name: array.shape for name, array in arrays(sizes).items()}
    assert op.given_features(shapes, features.observe) == features
    assert tuple(op.output_shapes(op.Sizes(*sizes.heads, 16, 24, sizes.hidden), shapes)) == features.outputs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observe": "sum"}, "observe is 'sum'; expected one of mass, last"),
        ({"bias_rows": 9}, "bias_rows is 9; expected 0 to 8"),
        ({"bias_rows": -1}, "bias_rows is -1"),
    ],
)
def test_features_that_there_are_not_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        op.Features(**changes)


@pytest.mark.parametrize("shape", [(1, 0), (1,), (1, None)])
def test_the_rows_of_a_bias_are_a_number(shape):
    with pytest.raises(ValueError, match="row_bias has the shape"):
        op.given_features({"row_bias": shape}, None)
