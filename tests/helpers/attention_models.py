"""Models of one attention op: sizes, arrays, and what it ought to compute."""

from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser
from hypothesis import strategies as st
from onnx import TensorProto, helper

from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.attention.function import function
from gta_edge.plugins.domain import DOMAIN, OPSET, VERSION
from tests.helpers import reference

TOLERANCE = 1e-5  # largest error over the standard deviation of the exact result


@dataclass(frozen=True)
class Sizes:
    """One call of the op. `capacity` and `positions` are S and P."""

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

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the op's inputs that there are."""
        absent = {"gate": not self.gate, "value_decoder": not self.decoder}
        return tuple(name for name in op.MODEL_INPUTS if not absent.get(name, False))

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
    return {name: inputs[name] for name in sizes.inputs}


def wrap(
    function: str, name: str, inputs: dict[str, list], outputs: dict[str, list], attributes: dict
) -> onnx.ModelProto:
    """A model of one node that calls the function; the shapes are those of its inputs and outputs."""

    def value(key, shape):
        return helper.make_tensor_value_info(
            key, TensorProto.INT64 if key == "past_length" else TensorProto.FLOAT, shape
        )

    given = [key if key in inputs else "" for key in op.MODEL_INPUTS]
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
    }
    outputs = {"output": shapes["gate"], "present_key": shapes["past_key"], "present_latent": shapes["past_latent"]}
    given = {name: shapes[name] for name in sizes.inputs}
    return wrap(function(sizes.gate, sizes.decoder), op.OP, given, outputs, op.attributes(n_q, n_k, n_c, sizes.scale))


def expected(inputs: dict[str, np.ndarray], sizes: Sizes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n_q, n_k, n_c = sizes.heads
    heads = {"num_query_heads": n_q, "num_key_heads": n_k, "num_latent_heads": n_c}
    return reference.grouped_latent_attention(**dict.fromkeys(op.MODEL_INPUTS) | inputs, **heads, scale=sizes.scale)


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
