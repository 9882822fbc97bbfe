"""What the operators of a bundle's graph make of shapes: the sizes of every value, before anything is run.

A graph of few nodes can ask for any amount of memory (a tensor joined to itself forty times over). So each operator
that a bundle's graph may have has a rule here, and whatever a rule does not cover is refused. Integers that shapes are
computed from are followed too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.numerics.dtypes import DTYPES, PRECISIONS
from gta_edge.plugins.attention import definition as op

__all__ = ["ATTRIBUTES", "INPUTS", "Known", "outputs_of"]

FLOAT, FLOAT16, BFLOAT16, INT8, INT4 = (DTYPES[name].onnx_number for name in PRECISIONS)
INT32, INT64, BOOL = 6, 7, 9
"""ONNX's numbers of element types (``onnx.TensorProto``); those that a bundle's graph has."""

_MAX_VALUES = 4096
_MAX_AXES = 8
_MAX_SIZE = 2**40


@dataclass(frozen=True)
class Known:
    """What is known of a value.

    Attributes:
        dtype: ONNX's number of its element type.
        shape: sizes of its axes.
        numbers: its content, where it is made of few int64 that follow from constants and sizes alone.
    """

    dtype: int
    shape: tuple[int, ...]
    numbers: npt.NDArray[np.int64] | None = None

    @property
    def elements(self) -> int:
        """How many it holds."""
        return math.prod(self.shape)


Attributes = Mapping[str, Any]
Rule = Callable[[Sequence[Known], Attributes], "list[Known]"]


def outputs_of(op_type: str, inputs: Sequence[Known | None], attributes: Attributes) -> list[Known]:
    """Return what is known of a node's outputs.

    Args:
        op_type: an operator with a rule (``INPUTS``).
        inputs: what is known of its inputs, None of one that the attention lacks; as many as ``INPUTS`` says.
        attributes: of the types that ``ATTRIBUTES`` says.

    Raises:
        ValueError: the operator does not take such inputs, or what it makes of them is not known beforehand.
    """
    try:
        with np.errstate(all="ignore"):
            if op_type == op.OP:
                results = _attention(inputs, attributes)
            else:
                results = _RULES[op_type]([value for value in inputs if value is not None], attributes)
    except (IndexError, OverflowError, KeyError) as error:  # an axis that is not there, a number beyond int64
        raise ValueError(f"its inputs or attributes do not go together ({type(error).__name__})") from error
    for result in results:
        _require(len(result.shape) <= _MAX_AXES and all(0 <= size <= _MAX_SIZE for size in result.shape), "its size")
    return results


def _require(condition: object, what: str) -> None:
    if not condition:
        raise ValueError(f"{what} is none that it takes")


def _known(dtype: int, shape: Sequence[int], numbers: Any = None) -> list[Known]:
    shape = tuple(int(size) for size in shape)
    if numbers is None or dtype != INT64 or math.prod(shape) > _MAX_VALUES:
        return [Known(dtype, shape)]
    return [Known(dtype, shape, np.asarray(numbers, np.int64).reshape(shape))]


def _numbers(value: Known) -> npt.NDArray[np.int64]:
    """Return the content of an input that must be known: axes, or a shape."""
    if value.numbers is None:
        raise ValueError("a shape or an axis is computed from data")
    return value.numbers


def _axis(axis: int, axes: int) -> int:
    _require(-axes <= axis < axes, "its axis")
    return axis % axes


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    axes = max(map(len, shapes))
    columns = zip(*((1,) * (axes - len(shape)) + shape for shape in shapes), strict=True)
    result = []
    for sizes in columns:
        wide = set(sizes) - {1}
        _require(len(wide) <= 1, "the shape of one of its inputs")
        result.append(wide.pop() if wide else 1)
    return tuple(result)


# --- rules -----------------------------------------------------------------------------------------------------------


def _arithmetic(inputs: Sequence[Known], attributes: Attributes) -> list[Known]:
    a, b = inputs
    _require(a.dtype == b.dtype, "the type of one of its inputs")
    return _known(a.dtype, _broadcast(a.shape, b.shape))


def _computed(compute: Callable[[Any, Any], Any]) -> Rule:
    """Arithmetic whose integers are followed."""

    def rule(inputs: Sequence[Known], attributes: Attributes) -> list[Known]:
        (result,) = _arithmetic(inputs, attributes)
        a, b = (value.numbers for value in inputs)
        followed = a is not None and b is not None and result.elements <= _MAX_VALUES
        return _known(result.dtype, result.shape, compute(a, b) if followed else None)

    return rule


def _comparison(inputs: Sequence[Known], attributes: Attributes) -> list[Known]:
    (result,) = _arithmetic(inputs, attributes)
    return _known(BOOL, result.shape)


def _where(inputs: Sequence[Known], attributes: Attributes) -> list[Known]:
    condition, a, b = inputs
    _require(condition.dtype == BOOL and a.dtype == b.dtype, "the type of one of its inputs")
    return _known(a.dtype, _broadcast(condition.shape, a.shape, b.shape))


def _same(inputs: Sequence[Known], attributes: Attributes) -> list[Known]:
    return [inputs[0]]


def _cast(inputs: Sequence[Known], attributes: Attributes) -> list[Known]:
    dtype = attributes["to"]
    _require(dtype in (FLOAT, FLOAT16, BFLOAT16, INT32, INT64), "the type it casts to")
    return _known(dtype, inputs[0].shape, inputs[0].numbers)


def _constant(inputs: Sequence[Known], attributes: Attributes) -> list[Known]:
    ((name, value),) = attributes.items()
    if name == "value":  # what the tensor is has been found out before
        return [value]
    _require(name != "value_int" or -(2**63) <= value < 2**63, "its number")
    return _known(FLOAT if name == "value_float" else INT64, np.shape(value), value)


def _shape(inputs: Sequence[Known], attributes: Attributes) -> list[Known]:
    sizes = inputs[0].shape[attributes.get("start", 0) : attributes.get("end")]
    return _known(INT64, (len(sizes),), sizes)


def _concat(inputs: Sequence[Known], attributes: Attributes) -> list[Known]:
    first = inputs[0]
    axis = _axis(attributes["axis"], len(first.shape))
    rests = {(value.dtype, len(value.shape), value.shape[:axis], value.shape[axis + 1 :]) for value in inputs}
    _require(len(rests) == 1, "one of its inputs")
    shape = [*first.shape[:axis], sum(value.shape[axis] for value in inputs), *first.shape[axis + 1 :]]
    parts = [value.numbers for value in inputs if value.numbers is not None]
    followed = math.prod(shape) <= _MAX_VALUES and len(parts) == len(inputs)
    return _known(first.dtype, shape, np.concatenate(parts, axis) if followed else None)


def _unsqueeze(inputs: Sequence[Known], attributes: Attributes) -> list[Known]:
    x, given = inputs[0], _numbers(inputs[1])
    rank = len(x.shape) + given.size
    _require(given.ndim <= 1 and rank <= _MAX_AXES, "its number of axes")
    axes = {_axis(int(axis), rank) for axis in given.reshape(-1)}
    _require(len(axes) == given.size, "one of its axes")
    sizes = iter(x.shape)
    return _known(x.dtype, [1 if axis in axes else next(sizes) for axis in range(rank)], x.numbers)


def _squeeze(inputs: Sequence[Known], attributes: Attributes) -> list[Known]:
    x = inputs[0]
    given = _numbers(inputs[1]).reshape(-1) if len(inputs) > 1 else [i for i, size in enumerate(x.shape) if size == 1]
    axes = {_axis(int(axis), len(x.shape)) for axis in given}
    _require(all(x.shape[axis] == 1 for axis in axes), "one of its axes")
    return _known(x.dtype, [size for axis, size in enumerate(x.shape) if axis not in axes], x.numbers)


def _reshape(inputs: Sequence[Known], attributes: Attributes) -> list[Known]:
    x, wanted = inputs[0], _numbers(inputs[1])
    _require(wanted.ndim == 1 and wanted.size <= _MAX_AXES, "the shape it is given")
    copies = not attributes.get("allowzero", 0)
    shape = [x.shape[i] if size == 0 and copies else int(size) for i, size in enumerate(wanted.tolist())]
    if -1 in shape:
        known = math.prod(size for size in shape if size != -1)
        _require(known > 0 and x.elements % known == 0, "the shape it is given")
        shape[shape.index(-1)] = x.elements // known
    _require(min(shape, default=0) >= 0 and math.prod(shape) == x.elements, "the shape it is given")
    return _known(x.dtype, shape, x.numbers)


def _transpose(inputs: Sequence[Known], attributes: Attributes) -> list[Known]:
    x, order = inputs[0], attributes["perm"]
    _require(sorted(order) == list(range(len(x.shape))), "its order of axes")
    return _known(x.dtype, [x.shape[axis] for axis in order])


def _expand(inputs: Sequence[Known], attributes: Attributes) -> list[Known]:
    wanted = _numbers(inputs[1])
    _require(wanted.ndim == 1 and wanted.size <= _MAX_AXES and (wanted >= 0).all(), "the shape it is given")
    return _known(inputs[0].dtype, _broadcast(inputs[0].shape, tuple(map(int, wanted))))


def _gather(inputs: Sequence[Known], attributes: Attributes) -> list[Known]:
    x, indices = inputs
    _require(indices.dtype == INT64, "the type of its indices")
    axis = _axis(attributes.get("axis", 0), len(x.shape))
    return _known(x.dtype, [*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def _gather_elements(inputs: Sequence[Known], attributes: Attributes) -> list[Known]:
    x, indices = inputs
    axis = _axis(attributes.get("axis", 0), len(x.shape))
    _require(indices.dtype == INT64 and len(x.shape) == len(indices.shape), "the type or shape of its indices")
    fits = all(i == axis or found <= size for i, (found, size) in enumerate(zip(indices.shape, x.shape, strict=True)))
    _require(fits, "the shape of its indices")
    return _known(x.dtype, indices.shape)


def _slice(inputs: Sequence[Known], attributes: Attributes) -> list[Known]:
    x, (starts, ends, axes, steps) = inputs[0], (_numbers(value).reshape(-1).tolist() for value in inputs[1:])
    shape = list(x.shape)
    _require(len({_axis(axis, len(shape)) for axis in axes}) == len(axes), "one of its axes")
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        _require(step != 0, "its step")
        shape[axis] = len(range(*slice(start, end, step).indices(shape[axis])))
    return _known(x.dtype, shape)


def _matmul(inputs: Sequence[Known], attributes: Attributes) -> list[Known]:
    a, b = inputs
    _require(a.dtype == b.dtype == FLOAT, "the type of one of its inputs")
    _require(len(a.shape) >= 2 <= len(b.shape) and a.shape[-1] == b.shape[-2], "the shape of one of its inputs")
    return _known(a.dtype, [*_broadcast(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]])


def _gemm(inputs: Sequence[Known], attributes: Attributes) -> list[Known]:
    a, b = inputs
    _require(a.dtype == b.dtype == FLOAT and attributes.get("transB", 0) == 1, "the type or order of one of its inputs")
    _require(len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[1], "the shape of one of its inputs")
    return _known(a.dtype, [a.shape[0], b.shape[0]])


def _dequantize(inputs: Sequence[Known], attributes: Attributes) -> list[Known]:
    codes, scales = inputs
    _require(codes.dtype in (INT4, INT8) and scales.dtype == FLOAT, "the type of one of its inputs")
    _require(len(codes.shape) == 2 and min(codes.shape) > 0, "the shape of its codes")
    block, axis = attributes.get("block_size", 0), attributes.get("axis", 1)
    _require(block >= 0 and axis == (0 if block else 1), "its axis or block size")
    wanted = (-(-codes.shape[0] // block), codes.shape[1]) if block else (codes.shape[1],)
    _require(scales.shape == wanted, "the shape of its scales")
    return _known(FLOAT, codes.shape)


def _norm(inputs: Sequence[Known], attributes: Attributes) -> list[Known]:
    x, weight = inputs
    _require(x.dtype == weight.dtype == FLOAT and weight.shape == x.shape[-1:], "its weight")
    last = attributes.get("axis", -1) in (-1, len(x.shape) - 1)
    _require(last and attributes.get("stash_type", 1) == FLOAT, "its axis or the type of its sums")
    return _known(x.dtype, x.shape)


def _attention(inputs: Sequence[Known | None], attributes: Attributes) -> list[Known]:
    given = op.given_inputs(inputs)
    _require(set(op.MODEL_INPUTS) - set(op.MODEL_OPTIONAL_INPUTS) <= given.keys(), "its number of inputs")
    n_q, n_k, n_c = (attributes[name] for name in op.ATTRIBUTES[:3])
    (batch, tokens, _), (_, _, capacity, d_k) = given["query"].shape, given["past_key"].shape
    d_l, positions = given["past_latent"].shape[3], given["cos"].shape[0]
    width = given["value_decoder"].shape[2] if "value_decoder" in given else d_l
    sizes = op.Sizes(n_q, n_k, n_c, d_k, d_l, n_q * width, *(name in given for name in op.MODEL_OPTIONAL_INPUTS))
    wanted = {
        "query": (batch, tokens, n_q * d_k),
        "key": (batch, tokens, n_k * d_k),
        "latent": (batch, tokens, n_c * d_l),
        "gate": (batch, tokens, sizes.hidden_size),
        "past_key": (batch, n_k, capacity, d_k),
        "past_latent": (batch, n_c, capacity, d_l),
        "past_length": (batch,),
        "cos": (positions, d_k // 2),
        "sin": (positions, d_k // 2),
        "value_decoder": (n_q, d_l, width),
    }
    for name, value in given.items():
        _require(value.shape == wanted[name] and value.dtype == (INT64 if name == "past_length" else FLOAT), name)
    return [_known(FLOAT, shape)[0] for shape in op.output_shapes(sizes, wanted).values()]


_RULES: dict[str, Rule] = {
    "Add": _computed(np.add),
    "Cast": _cast,
    "Concat": _concat,
    "Constant": _constant,
    "DequantizeLinear": _dequantize,
    "Div": _arithmetic,
    "Expand": _expand,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Gemm": _gemm,
    "Less": _comparison,
    "MatMul": _matmul,
    "Mod": _arithmetic,
    "Mul": _computed(np.multiply),
    "RMSNormalization": _norm,
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": _same,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _computed(np.subtract),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}

INPUTS: dict[str, tuple[int, int]] = dict.fromkeys(_RULES, (2, 2)) | {
    "Cast": (1, 1),
    "Concat": (1, 16),
    "Constant": (0, 0),
    op.OP: (len(op.MODEL_INPUTS) - 1, len(op.MODEL_INPUTS)),  # the last, where it is absent, is left off
    "Shape": (1, 1),
    "Sigmoid": (1, 1),
    "Slice": (5, 5),
    "Squeeze": (1, 2),
    "Transpose": (1, 1),
    "Where": (3, 3),
}
"""Of every operator that a bundle's graph may have, the least and the greatest number of inputs."""

ATTRIBUTES: dict[str, dict[str, str]] = {
    "Cast": {"to": "i"},
    "Concat": {"axis": "i"},
    "Constant": {"value": "t", "value_float": "f", "value_int": "i", "value_ints": "ints"},
    "DequantizeLinear": {"axis": "i", "block_size": "i"},
    "Gather": {"axis": "i"},
    "GatherElements": {"axis": "i"},
    "Gemm": {"transB": "i"},
    op.OP: dict(zip(op.ATTRIBUTES, ("i", "i", "i", "f", "s", "s"), strict=True)),
    "RMSNormalization": {"axis": "i", "epsilon": "f", "stash_type": "i"},
    "Reshape": {"allowzero": "i"},
    "Shape": {"start": "i", "end": "i"},
    "Transpose": {"perm": "ints"},
}
"""By operator, the attributes that it may have, each with the field of ``onnx.AttributeProto`` that holds it."""
