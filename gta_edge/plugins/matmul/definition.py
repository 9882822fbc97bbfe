"""``gta::BlockwiseInt4MatMul`` and ``gta::BlockwiseInt8MatMul``, defined once: names, attributes, shapes, meaning.

The meaning is the ONNX function below, in standard operators; every other implementation (torch, kernels) is tested
against it and against the formula. This module imports nothing heavy.

A call multiplies by one matrix, or by up to four that share their input and stand side by side along N:

    y = x · W + bias                         x [..., K], W [K, N], sums in float32
    W[k, n] = quantised[k, n] · scale[k // block_size, n]
    y_0, y_1, ... = y, split after every ``output_sizes``

The layout of quantised weights and scales is that of ``packing.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gta_edge.plugins.domain import DOMAIN, OPSET, VERSION
from gta_edge.plugins.matmul.packing import BLOCK_SIZES, OUTPUTS_MULTIPLE, packed_shapes

__all__ = [
    "ATTRIBUTES",
    "DOMAIN",
    "INPUTS",
    "MAX_OUTPUTS",
    "OPS",
    "OPSET",
    "VERSION",
    "Sizes",
    "attributes",
    "function",
    "output_names",
    "overload",
]

OPS = {4: "BlockwiseInt4MatMul", 8: "BlockwiseInt8MatMul"}
"""The ops by the bits of a weight."""

INPUTS = (
    "x",  # float16, bfloat16 or float32 [..., K]
    "weight",  # int32, packed
    "scale",  # float16, packed
    "bias",  # x's type [N]; optional
)
MAX_OUTPUTS = 4
ATTRIBUTES = ("block_size", "output_sizes", "plugin_namespace", "plugin_version")


@dataclass(frozen=True)
class Sizes:
    """Widths, bits and block size of one matmul, fixed for a model.

    Attributes:
        in_features: K.
        output_sizes: widths of the outputs; their sum is N.
        bits: 4 or 8.
        block_size: inputs that share a scale; 0 is one scale per output channel, in int8.
    """

    in_features: int
    output_sizes: tuple[int, ...]
    bits: int
    block_size: int

    def __post_init__(self) -> None:
        if not 1 <= len(self.output_sizes) <= MAX_OUTPUTS:
            raise ValueError(f"{len(self.output_sizes)} output_sizes; expected 1 to {MAX_OUTPUTS}")
        if min(self.output_sizes) < 1:
            raise ValueError(f"output_sizes are {list(self.output_sizes)}; expected at least 1 each")
        if any(size % OUTPUTS_MULTIPLE for size in self.output_sizes[:-1]):
            raise ValueError(
                f"output_sizes are {list(self.output_sizes)}; expected multiples of {OUTPUTS_MULTIPLE} but for the last"
            )
        packed_shapes(self.in_features, self.out_features, self.bits, self.block_size)
        if self.block_size and self.in_features % self.block_size:
            raise ValueError(f"in_features {self.in_features} is not a multiple of block_size {self.block_size}")

    @property
    def out_features(self) -> int:
        """N, what all outputs have together."""
        return sum(self.output_sizes)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weights, int32."""
        return packed_shapes(self.in_features, self.out_features, self.bits, self.block_size)[0]

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the packed scales, float16."""
        return packed_shapes(self.in_features, self.out_features, self.bits, self.block_size)[1]

    def output_shapes(self, x: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the outputs' shapes for an input of shape ``x``."""
        return [(*x[:-1], size) for size in self.output_sizes]


def attributes(block_size: int, output_sizes: Sequence[int]) -> dict[str, int | str | list[int]]:
    """Return the node's attributes; the last two are how TensorRT before 10.10 finds the plugin."""
    values = (block_size, list(output_sizes), DOMAIN, str(VERSION))
    return dict(zip(ATTRIBUTES, values, strict=True))


def output_names(outputs: int) -> tuple[str, ...]:
    """Return the names of a function's outputs."""
    return tuple(f"y_{i}" for i in range(outputs))


def overload(outputs: int, bias: bool) -> str:
    """Return the ``overload`` of a node and of its function, which tells functions of one name apart."""
    return f"{outputs}_outputs{'_bias' if bias else ''}"


@dataclass(frozen=True)
class _Words:
    """How weights are unpacked from words [tile_n, tile_k, lane, word]."""

    shifts: range
    split: tuple[int, ...]  # lane to g, t; word and place to w, odd, k8, h (int4), or s, k8, h, odd (int8)
    order: tuple[int, ...]  # to tile_k, w, k8, t, odd, tile_n, h, g

    @property
    def bits(self) -> int:
        return self.shifts.step


_WORDS = {
    4: _Words(range(0, 32, 4), (8, 4, 4, 2, 2, 2), (1, 4, 6, 3, 5, 0, 7, 2)),
    8: _Words(range(0, 32, 8), (8, 4, 2, 2, 2, 2), (1, 4, 5, 3, 7, 0, 6, 2)),
}


def function(bits: int, outputs: int = 1, bias: bool = False) -> str:
    """Return the op's meaning, in ONNX's text form (``onnx.parser.parse_function`` reads it).

    A function has a fixed number of inputs and outputs, so there is one for each case, all of the op's name; nodes and
    functions find each other by ``overload``. All arithmetic is in float32, and a result is rounded once, to x's type.

    Raises:
        ValueError: the op has no such case.
    """
    if bits not in BLOCK_SIZES or not 1 <= outputs <= MAX_OUTPUTS:
        raise ValueError(f"int{bits} with {outputs} outputs; expected int4 or int8, and 1 to {MAX_OUTPUTS}")
    words = _WORDS[bits]
    shifts = ", ".join(map(str, words.shifts))
    split = ", ".join(map(str, (0, 0, *words.split)))
    order = ", ".join(map(str, words.order))
    inputs, results = INPUTS if bias else INPUTS[:-1], output_names(outputs)
    return f"""<domain: "{DOMAIN}", overload: "{overload(outputs, bias)}", opset_import: ["" : {OPSET}]>
{OPS[bits]}
    <block_size, output_sizes, plugin_namespace: string = "{DOMAIN}", plugin_version: string = "{VERSION}">
    ({", ".join(inputs)}) => ({", ".join(results)})
{{
    first = Constant <value_ints = [0]> ()
    last = Constant <value_ints = [-1]> ()
    sizes = Constant <value_ints: ints = @output_sizes> ()
    in_features = Shape <start = -1> (x)
    out_features = ReduceSum <keepdims = 1> (sizes)
    tile = Constant <value_ints = [{OUTPUTS_MULTIPLE}]> ()
    tiles = Shape <start = 0, end = 1> (weight)
    padded_out = Mul (tiles, tile)

    words = Cast <to = 12> (weight)
    words_column = Unsqueeze (words, last)
    shifts = Constant <value = uint32[{len(words.shifts)}] {{{shifts}}}> ()
    mask = Constant <value = uint32 {{{(1 << bits) - 1}}}> ()
    shifted = BitShift <direction = "RIGHT"> (words_column, shifts)
    digits = BitwiseAnd (shifted, mask)
    places = Constant <value_ints = [{split}]> ()
    digits_places = Reshape (digits, places)
    digits_lying = Transpose <perm = [{order}]> (digits_places)

    scale_f32 = Cast <to = 1> (scale)
    scale_lying = Transpose <perm = [1, 3, 0, 4, 2]> (scale_f32)
    one = Constant <value_ints = [1]> ()
    scale_matrix = Concat <axis = 0> (last, one, padded_out)
    scales = Reshape (scale_lying, scale_matrix)
    blocks = Shape <start = 0, end = 1> (scales)
    by_block = Concat <axis = 0> (blocks, last, padded_out)
    digits_blocks = Reshape (digits_lying, by_block)
    digits_f32 = Cast <to = 1> (digits_blocks)
    offset = Constant <value_float = {float(1 << bits - 1)}> ()
    codes = Sub (digits_f32, offset)
    values = Mul (codes, scales)
    matrix = Concat <axis = 0> (last, padded_out)
    values_matrix = Reshape (values, matrix)
    begin = Concat <axis = 0> (first, first)
    end = Concat <axis = 0> (in_features, out_features)
    dequantised = Slice (values_matrix, begin, end)

    x_f32 = Cast <to = 1> (x)
    matmul = MatMul (x_f32, dequantised)
    {"bias_f32 = Cast <to = 1> (bias)" if bias else ""}
    {"whole = Add (matmul, bias_f32)" if bias else "whole = Identity (matmul)"}
    rounded = CastLike (whole, x)
    {", ".join(results)} = Split <axis = -1> (rounded, sizes)
}}"""
