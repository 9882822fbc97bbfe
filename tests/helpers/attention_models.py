"""Models of one attention op: sizes, arrays, and what it ought to compute."""

from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx.parser
from hypothesis import strategies as st
from onnx import TensorProto, helper

from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.attention.function import function
from gta_edge.plugins.domain import DOMAIN, OPSET, VERSION
from tests.helpers import reference
from tests.helpers.managed_reference import Attended, managed_attention

TOLERANCE = 1e-5  # largest error over the standard deviation of the exact result


NO_FEATURES = op.Features()


@dataclass(frozen=True)
class Sizes:
    """One call of the op. `capacity` and `positions` are S and P, `words` is W."""

    n_q: int = 4
    n_k: int = 2
    n_c: int = 1
    d_k: int = 16
    d_l: int = 24
    e: int = 2
    past: tuple[int, ...] = (3, 0)
    tokens: int = 4
    capacity: int = 9
    positions: int = 12
    garbage: float = 0.0  # magnitude of what stands in the caches beyond each row's past
    seed: int = 0
    gate: bool = True
    decoder: bool = True
    features: op.Features = NO_FEATURES
    words: int = 6

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the op's inputs that there are."""
        absent = {"gate": not self.gate, "value_decoder": not self.decoder}
        model = tuple(name for name in op.MODEL_INPUTS if not absent.get(name, False))
        return model + self.features.inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.features.outputs

    @property
    def hidden(self) -> int:
        return self.n_q * self.d_l * (self.e if self.decoder else 1)

    @property
    def scale(self):
        return self.d_k**-0.5

    @property
    def heads(self):
        return self.n_q, self.n_k, self.n_c


def arrays(sizes: Sizes) -> dict[str, np.ndarray]:
    """The op's inputs by name, float32, without those that are absent."""
    rng = np.random.default_rng(sizes.seed)
    batch, tokens, hidden = len(sizes.past), sizes.tokens, sizes.hidden

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    cos, sin = reference.rope_tables(sizes.d_k, sizes.positions)
    inputs = {
        "query": normal(batch, tokens, sizes.n_q * sizes.d_k),
        "key": normal(batch, tokens, sizes.n_k * sizes.d_k),
        "latent": normal(batch, tokens, sizes.n_c * sizes.d_l),
        "gate": normal(batch, tokens, hidden),
        "past_key": normal(batch, sizes.n_k, sizes.capacity, sizes.d_k),
        "past_latent": normal(batch, sizes.n_c, sizes.capacity, sizes.d_l),
        "past_length": np.array(sizes.past, np.int64),
        "cos": cos.astype(np.float32),
        "sin": sin.astype(np.float32),
        "value_decoder": normal(sizes.n_q, sizes.d_l, hidden // sizes.n_q) / np.float32(np.sqrt(sizes.d_l)),
    }
    for name in ("past_key", "past_latent"):
        for row, length in enumerate(sizes.past):
            beyond = inputs[name][row, :, length:]
            beyond[...] = np.sign(beyond) * np.float32(sizes.garbage)
    inputs |= _managed(sizes, rng)
    return {name: inputs[name] for name in sizes.inputs}


def _managed(sizes: Sizes, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The inputs of a managed cache: positions in any order, words of any bits."""
    batch, tokens = len(sizes.past), sizes.tokens
    mass = sizes.features.observe != "last"
    past_received = (
        rng.uniform(0, 3, (batch, sizes.capacity)) if mass else rng.integers(-1, 50, (batch, sizes.capacity))
    )
    past_received = past_received.astype(np.float32)
    for row, length in enumerate(sizes.past):
        past_received[row, length:] = sizes.garbage
    return {
        "positions": rng.integers(0, sizes.positions, (batch, tokens)),
        "row_bias": rng.normal(0, 2, (batch, sizes.features.bias_rows)).astype(np.float32),
        "branch_start": rng.integers(0, np.array(sizes.past) + tokens + 3),
        "branches": rng.integers(-(2**63), 2**63, (batch, sizes.words), endpoint=False),
        "past_received": past_received,
        "query_weight": (rng.uniform(0, 1 if mass else sizes.capacity, (batch, tokens))).astype(np.float32),
        "decay": rng.uniform(0, 1, batch).astype(np.float32),
    }


def wrap(
    function: str, name: str, inputs: dict[str, list], outputs: dict[str, list], attributes: dict
) -> onnx.ModelProto:
    """A model of one node that calls the function; the shapes are those of its inputs and outputs."""

    def value(key, shape):
        return helper.make_tensor_value_info(
            key, TensorProto.INT64 if key in op.INT64_INPUTS else TensorProto.FLOAT, shape
        )

    given = [key if key in inputs else "" for key in op.INPUTS]
    while not given[-1]:  # as files have it
        given.pop()
    graph = helper.make_graph(
        [helper.make_node(name, given, list(outputs), domain=DOMAIN, **attributes)],
        "one_node",
        [value(key, shape) for key, shape in inputs.items()],
        [value(key, shape) for key, shape in outputs.items()],
    )
    return helper.make_model(
        graph,
        functions=[onnx.parser.parse_function(function)],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )


def model(sizes: Sizes, *, static: bool = False) -> onnx.ModelProto:
    """The op in a model: batch, tokens, capacity and positions by name, or all sizes as numbers."""
    n_q, n_k, n_c = sizes.heads
    hidden = sizes.hidden
    b, t, s, p = (len(sizes.past), sizes.tokens, sizes.capacity, sizes.positions) if static else "BTSP"
    shapes = {
        "query": [b, t, n_q * sizes.d_k],
        "key": [b, t, n_k * sizes.d_k],
        "latent": [b, t, n_c * sizes.d_l],
        "gate": [b, t, hidden],
        "past_key": [b, n_k, s, sizes.d_k],
        "past_latent": [b, n_c, s, sizes.d_l],
        "past_length": [b],
        "cos": [p, sizes.d_k // 2],
        "sin": [p, sizes.d_k // 2],
        "value_decoder": [n_q, sizes.d_l, hidden // n_q],
        "positions": [b, t],
        "row_bias": [b, sizes.features.bias_rows],
        "branch_start": [b],
        "branches": [b, sizes.words if static else "W"],
        "past_received": [b, s],
        "query_weight": [b, t],
        "decay": [b],
    }
    past = {"output": "gate"} | {name: name.replace("present", "past") for name in op.OUTPUTS[1:]}
    outputs = {name: shapes[past[name]] for name in sizes.outputs}
    given = {name: shapes[name] for name in sizes.inputs}
    attributes = op.attributes(n_q, n_k, n_c, sizes.scale, sizes.features.observe)
    return wrap(function(sizes.gate, sizes.decoder, sizes.features), op.OP, given, outputs, attributes)


def expected(inputs: dict[str, np.ndarray], sizes: Sizes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n_q, n_k, n_c = sizes.heads
    heads = {"num_query_heads": n_q, "num_key_heads": n_k, "num_latent_heads": n_c}
    return reference.grouped_latent_attention(**dict.fromkeys(op.MODEL_INPUTS) | inputs, **heads, scale=sizes.scale)


def attended(inputs: dict[str, np.ndarray], sizes: Sizes) -> Attended:
    """What a call with a managed cache ought to compute."""
    n_q, n_k, n_c = sizes.heads
    heads = {"num_query_heads": n_q, "num_key_heads": n_k, "num_latent_heads": n_c}
    given = dict.fromkeys(op.INPUTS) | inputs
    return managed_attention(**given, **heads, scale=sizes.scale, observe=sizes.features.observe)


def assert_cache(found, past, exact, lengths, tokens):
    """New rows are what they should be, and no other row has changed by a bit."""
    assert found.shape == past.shape
    new_found, new_exact = [], []
    for row, length in enumerate(lengths):
        new = slice(length, length + tokens)
        new_found.append(found[row, :, new])
        new_exact.append(exact[row, :, new])
        np.testing.assert_array_equal(np.delete(found[row], new, axis=1), np.delete(past[row], new, axis=1))
    assert reference.relative_error(np.stack(new_found), np.stack(new_exact)) <= TOLERANCE


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def all_sizes(draw) -> Sizes:
    gate, decoder = draw(st.sampled_from([(True, True), (False, False), (True, False), (False, True)]))
    n_q = draw(st.sampled_from([1, 2, 3, 4, 6]))
    n_k = draw(st.sampled_from(divisors(n_q)))
    past = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    tokens = draw(st.integers(1, 9))
    capacity = max(past) + tokens + draw(st.integers(0, 3))
    return Sizes(
        n_q=n_q,
        n_k=n_k,
        n_c=draw(st.sampled_from(divisors(n_q))) if decoder else n_k,
        d_k=draw(st.sampled_from([16, 24, 32, 48, 64])),
        d_l=draw(st.sampled_from([8, 16, 20, 40, 64])),
        e=draw(st.integers(1, 3)),
        past=past,
        tokens=tokens,
        capacity=capacity,
        positions=capacity + draw(st.integers(0, 3)),
        garbage=draw(st.sampled_from([0.0, 1e30])),
        seed=draw(st.integers(0, 2**16)),
        gate=gate,
        decoder=decoder,
    )


@st.composite
def all_features(draw, *, trees: bool | None = None) -> op.Features:
    """Any combination of features but none; with branches or without where `trees` is given."""
    features = op.Features(
        observe=draw(st.sampled_from([None, *op.OBSERVATIONS])),
        bias_rows=draw(st.sampled_from([0, 1, 3, op.MAX_BIAS_ROWS])),
        has_positions=draw(st.booleans()),
        has_branches=draw(st.booleans()) if trees is None else trees,
    )
    return features if features.inputs else replace(features, has_positions=True)


@st.composite
def managed_sizes(draw) -> Sizes:
    """Small sizes, with features; branches shorter and longer than what is in use."""
    sizes, features = draw(all_sizes()), draw(all_features())
    words = draw(st.integers(0, sizes.capacity + 2))
    capacity = max(sizes.capacity, features.bias_rows)
    return replace(sizes, features=features, words=words, capacity=capacity, positions=capacity + 3)
