"""Matrices that a checkpoint holds in integers already, in the layouts of ``model.weight_scheme``, and what they mean.

Each layout has several tensors for one matrix [out, in], packed in int32 words, the first value in the lowest bits.
Codes are unsigned, a zero point stands for 0:

====================  ==================================================================================================
``gptq``              ``qweight`` [in·bits/32, out], packed along in; ``qzeros`` [groups, out·bits/32], packed along
                      out, less 1 in the first format; ``scales`` [groups, out]; ``g_idx`` [in], each input's group
``awq``               ``qweight`` [in, out/8] and ``qzeros`` [groups, out/8], packed along out in the order
                      0, 2, 4, 6, 1, 3, 5, 7; ``scales`` [groups, out]
``compressed-tensors``  ``weight_packed`` [out, in·bits/32], packed along in; ``weight_scale`` [out, groups] or [1];
                      ``weight_shape`` (out, in); ``weight_zero_point`` [out·bits/32, groups], packed along out;
                      ``weight_g_idx`` [in]; or ``weight`` int8 as it is with ``weight_scale``
====================  ==================================================================================================

Sources: AutoGPTQ 0.7.1 and GPTQModel 7.7.0, AutoAWQ 0.2.9, compressed-tensors 0.20.0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import CheckpointError
from gta_edge.formats.safetensors_files import StoredTensor, first_names, quote, read_tensor
from gta_edge.model.weight_scheme import AWQ, COMPRESSED, GPTQ, WeightScheme
from gta_edge.numerics.dtypes import DTYPES
from gta_edge.numerics.quantization import QuantizedMatrix
from gta_edge.support.floats import all_finite, first_not_finite
from gta_edge.support.text import brief

__all__ = ["QuantizedTensor", "gather_quantized", "reblocked"]

Array = npt.NDArray[Any]

_WORD = 32  # bits
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FLOATS = {dtype.safetensors: dtype.numpy for dtype in DTYPES.values() if dtype.safetensors}
_TYPES: dict[str, np.dtype[Any]] = {
    **_FLOATS,
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
_COPY = "it is damaged, or of another tool: copy the checkpoint anew"
_WIDER = "no int4 or int8 bundle holds that as it is: use --precision fp16 or bf16, or another checkpoint"
_INTO_INT8 = "no int4 bundle holds that: use --precision int8, which holds it as it is, fp16 or bf16"

_PARTS = {
    GPTQ: ("qweight", "qzeros", "scales", "g_idx"),
    AWQ: ("qweight", "qzeros", "scales"),
    COMPRESSED: (
        *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
        *("weight_global_scale", "input_scale", "input_zero_point"),  # of what is not read, refused by name
    ),
}
_NEEDED = {GPTQ: ("qzeros", "scales"), AWQ: ("qzeros", "scales"), COMPRESSED: ("weight_scale",)}


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """One matrix, where its parts lie; made by ``gather_quantized``, which has checked their shapes.

    Attributes:
        name: of the parameter, ``model.layers.0.mlp.up_proj.weight``.
        scheme: how it is stored.
        bits: width of a code.
        shape: ``(out, in)``.
        groups: sets of inputs that share a scale.
        parts: its tensors by their last name.
    """

    name: str
    scheme: WeightScheme
    bits: int
    shape: tuple[int, int]
    groups: int
    parts: Mapping[str, StoredTensor]

    @property
    def file(self) -> Any:
        """The file that its codes lie in."""
        return next(iter(self.parts.values())).file

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return sum(part.size for part in self.parts.values())

    @property
    def block_size(self) -> int:
        """Inputs that share a scale; 0 where all of them do."""
        return 0 if self.groups == 1 else self.shape[1] // self.groups

    def values(self) -> npt.NDArray[np.float32]:
        """Return what is meant, float32 [out, in], without rounding.

        Raises:
            CheckpointError: a part is damaged, or its file has changed.
        """
        scales, zeros, order = self._scales().astype(np.float32), self._zeros(), self._order()
        values = self._codes().astype(np.float32)  # [out, in]
        with np.errstate(over="ignore"):  # who reads it looks for what is not finite
            return self._scaled(values, scales, zeros, order)

    def _scaled(self, values: Array, scales: Array, zeros: Array, order: Array | None) -> npt.NDArray[np.float32]:
        if order is None:
            split = values.reshape(self.shape[0], self.groups, -1)
            split -= zeros[:, :, None]
            split *= scales[:, :, None]
        else:
            values -= zeros[:, order]
            values *= scales[:, order]
        return values

    def matrix(self, bits: int) -> QuantizedMatrix:
        """Return its codes and scales as they are.

        Args:
            bits: width of the codes to return, 4 or 8, no less than its own. Where it is more, zero points may be any:
                what a code is above or below its own fits.

        Raises:
            CheckpointError: what it means is no such matrix, and why; a part is damaged, or its file has changed.
        """
        scales, zeros = self._own_scales(bits), self._zeros()
        split = self._codes().reshape(*scales.shape, -1)
        codes = (split - zeros[:, :, None]).view(np.int8)  # wraps, as it should
        if (scales == 0).any():  # groups of zeros, however they are written
            codes[scales == 0] = 0
            scales = np.maximum(scales, np.finfo(np.float16).smallest_subnormal)
        return QuantizedMatrix(codes.reshape(self.shape), scales, bits, self.block_size)

    def check(self, bits: int) -> None:
        """Raise where ``matrix`` would, but for its codes, which are not read."""
        self._own_scales(bits)

    def _own_scales(self, bits: int) -> npt.NDArray[np.float16]:
        """Return scales [out, groups] of a matrix in ``bits``, symmetric and of groups that are inputs side by side."""
        if self._order() is not None:
            raise self._error("has groups of scattered inputs (act-order, desc_act)", _WIDER)
        middle, zeros = 1 << self.bits - 1, self._zeros()
        if bits == self.bits and (zeros != middle).any():
            row, group = (int(each[0]) for each in np.nonzero(zeros != middle))
            raise self._error(
                f"is asymmetric: the zero point of output {row}, group {group} is {int(zeros[row, group])} and not "
                f"{middle}",
                _INTO_INT8 if self.bits == 4 else _WIDER,
            )
        stored = self._scales()
        with np.errstate(over="ignore"):
            scales: npt.NDArray[np.float16] = stored.astype(np.float16)
        if (scales.astype(np.float32) != stored.astype(np.float32)).any():
            raise self._error("has scales that float16 does not hold", _WIDER)
        if (scales < 0).any():
            raise self._error("has negative scales", _WIDER)
        return scales

    # --- parts -------------------------------------------------------------------------------------------------------

    def _codes(self) -> npt.NDArray[np.uint8]:
        """Return unsigned codes [out, in], of an array of its own."""
        layout, (rows, columns) = self.scheme.layout, self.shape
        if "weight" in self.parts:
            return (self._read("weight").view(np.uint8) + np.uint8(128)).reshape(rows, columns)
        if layout == COMPRESSED:
            return np.ascontiguousarray(_unpacked(self._read("weight_packed"), self.bits)[:, :columns])
        words = self._read("qweight")
        if layout == AWQ:
            return np.ascontiguousarray(_unpacked(words, self.bits, _AWQ_ORDER).T)
        return _unpacked(np.ascontiguousarray(words.T), self.bits)

    def _zeros(self) -> npt.NDArray[np.uint8]:
        """Return unsigned zero points [out, groups]."""
        rows, layout = self.shape[0], self.scheme.layout
        if layout == COMPRESSED:
            if "weight_zero_point" not in self.parts:
                return np.full((rows, self.groups), 1 << self.bits - 1, np.uint8)
            words = np.ascontiguousarray(self._read("weight_zero_point").T)  # [groups, words]
            return np.ascontiguousarray(_unpacked(words, self.bits)[:, :rows].T)
        found = _unpacked(self._read("qzeros"), self.bits, _AWQ_ORDER if layout == AWQ else None)[:, :rows].T
        if self.scheme.zero_offset and (found == (1 << self.bits) - 1).any():  # of which its readers make 0 or 2^bits
            raise self._error("has zero points that GPTQ's first format does not say", _COPY)
        return np.ascontiguousarray(found + np.uint8(self.scheme.zero_offset))

    def _scales(self) -> Array:
        """Return scales [out, groups] as they are stored; every one is finite."""
        part = "weight_scale" if self.scheme.layout == COMPRESSED else "scales"
        scales = self._read(part)
        if not all_finite(scales):
            raise self._error(f"has scales: {first_not_finite(scales)} are not finite", _COPY)
        if self.scheme.layout != COMPRESSED:
            scales = scales.T
        elif scales.size == 1:  # one for the whole matrix
            scales = np.broadcast_to(scales.reshape(1, 1), (self.shape[0], 1))
        return np.ascontiguousarray(scales)

    def _order(self) -> npt.NDArray[np.int64] | None:
        """Return the group of each input [in], None where groups are inputs side by side."""
        part = next((name for name in ("g_idx", "weight_g_idx") if name in self.parts), None)
        if part is None:
            return None
        order = self._read(part).astype(np.int64)
        if (order < 0).any() or (order >= self.groups).any():
            raise self._error(f"has groups from {order.min()} to {order.max()}", f"expected 0 to {self.groups - 1}")
        return None if (order == np.arange(len(order)) // (self.shape[1] // self.groups)).all() else order

    def _read(self, part: str) -> Array:
        tensor = self.parts[part]
        return read_tensor(f"{self.name} ({part})", tensor, _TYPES[tensor.dtype])

    def _error(self, problem: str, remedy: str) -> CheckpointError:
        return CheckpointError(f"{quote(self.file.path)}: {first_names([self.name])} {problem}", remedy)


def _unpacked(words: Array, bits: int, order: tuple[int, ...] | None = None) -> npt.NDArray[np.uint8]:
    """Return the unsigned numbers [rows, words·32/bits] of int32 words [rows, words], C-contiguous.

    Args:
        words: packed along the last axis.
        bits: width of a number.
        order: place of each number of a word among those of the word; as they come, by default.
    """
    rows, columns = words.shape
    unsigned, mask = words.view(np.uint32), np.uint32((1 << bits) - 1)
    numbers = np.empty((rows, columns, _WORD // bits), np.uint8)
    for i, place in enumerate(order or range(_WORD // bits)):
        numbers[:, :, place] = (unsigned >> np.uint32(bits * i)) & mask
    return numbers.reshape(rows, -1)


def reblocked(matrix: QuantizedMatrix, block_size: int) -> QuantizedMatrix:
    """Return the same matrix with a scale for each ``block_size`` inputs; 0 for one per output channel.

    Raises:
        ValueError: its own scales are for fewer inputs, or for no multiple of them.
    """
    own = matrix.block_size or matrix.codes.shape[1]
    wanted = block_size or matrix.codes.shape[1]
    if own % wanted:
        raise ValueError(f"a scale for {own} inputs is none for {wanted}")
    scales = np.repeat(matrix.scales, own // wanted, axis=1)
    return QuantizedMatrix(matrix.codes, scales, matrix.bits, block_size)


# --- which tensors are one matrix ------------------------------------------------------------------------------------


def gather_quantized(
    found: Mapping[str, StoredTensor], scheme: WeightScheme | None
) -> dict[str, StoredTensor | QuantizedTensor]:
    """Return a checkpoint's tensors with the parts of each quantised matrix as one, under the matrix's name.

    What belongs to no matrix stays under its own name.

    Args:
        found: tensors by name.
        scheme: how matrices may be quantised.

    Raises:
        CheckpointError: a part is missing, of another type or shape than the others ask for, or not read.
    """
    if scheme is None:
        return dict(found)
    tensors: dict[str, StoredTensor | QuantizedTensor] = {}
    parts: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in found.items():
        module, _, last = name.rpartition(".")
        is_codes = last == "weight" and tensor.dtype == "I8" and scheme.layout == COMPRESSED
        if is_codes or last in _PARTS[scheme.layout]:
            parts.setdefault(module, {})[last] = tensor
        else:
            tensors[name] = tensor
    for module, own in parts.items():
        codes = next((name for name in ("qweight", "weight_packed", "weight") if name in own), None)
        if codes is None:  # reported as what no model has
            tensors |= {f"{module}.{name}": tensor for name, tensor in own.items()}
        else:
            tensors[f"{module}.weight"] = _checked(f"{module}.weight", scheme, {codes: own[codes], **own})
    return tensors


def _checked(name: str, scheme: WeightScheme, parts: dict[str, StoredTensor]) -> QuantizedTensor:
    codes = next(iter(parts))
    file = quote(parts[codes].file.path)
    for part in (*_NEEDED[scheme.layout], *(("weight_shape",) if codes == "weight_packed" else ())):
        if part not in parts:
            raise CheckpointError(f"{file}: {first_names([name])} has {codes} and no {part}", _COPY)
    for part in ("weight_global_scale", "input_scale", "input_zero_point"):
        if part in parts:
            raise CheckpointError(
                f"{file}: {first_names([name])} has {part}, which is not read", "use another checkpoint"
            )
    shape, bits = _shape(name, scheme, parts, codes)
    scales = parts["weight_scale" if scheme.layout == COMPRESSED else "scales"]
    groups = _groups(scheme, scales)
    wanted = _wanted(scheme, codes, shape, bits, groups)
    for part, tensor in parts.items():
        types, shapes = wanted[part]
        if tensor.dtype not in types or tensor.shape not in shapes:
            raise CheckpointError(
                f"{file}: {first_names([name])} has {part} {tensor.dtype} {brief(list(tensor.shape))}",
                f"expected {' or '.join(types)} {' or '.join(str(list(each)) for each in shapes)} for {shape[0]} "
                f"outputs and {shape[1]} inputs in {bits} bits: {_COPY}",
            )
    if not groups or shape[1] % groups:
        raise CheckpointError(
            f"{file}: {first_names([name])} has {groups} groups of {shape[1]} inputs", "expected equal ones"
        )
    return QuantizedTensor(name, scheme, bits, shape, groups, parts)


def _shape(
    name: str, scheme: WeightScheme, parts: Mapping[str, StoredTensor], codes: str
) -> tuple[tuple[int, int], int]:
    """Return ``(out, in)`` and the width of a code, as the codes' shape has it."""
    tensor = parts[codes]
    wanted = "I8" if codes == "weight" else "I32"
    if len(tensor.shape) != 2 or 0 in tensor.shape or tensor.dtype != wanted:
        raise CheckpointError(
            f"{quote(tensor.file.path)}: {first_names([name])} has {codes} {tensor.dtype} {brief(list(tensor.shape))}",
            f"expected {wanted} of two dimensions: {_COPY}",
        )
    first, second = tensor.shape
    if codes == "weight":
        return (first, second), 8
    if scheme.layout != COMPRESSED:
        (bits,) = scheme.bits
        values = _WORD // bits
        return ((second, first * values) if scheme.layout == GPTQ else (second * values, first)), bits
    said = parts["weight_shape"]
    if said.shape != (2,) or said.dtype not in ("I32", "I64"):
        raise CheckpointError(
            f"{quote(said.file.path)}: {first_names([name])} has weight_shape {said.dtype} {brief(list(said.shape))}",
            f"expected I64 [2]: {_COPY}",
        )
    rows, columns = (int(each) for each in read_tensor(f"{name} (weight_shape)", said, _TYPES[said.dtype]))
    bits = next((each for each in scheme.bits if second == -(-columns * each // _WORD)), 0)
    if rows != first or not bits or columns < 1:
        raise CheckpointError(
            f"{quote(said.file.path)}: {first_names([name])} has weight_packed {brief(list(tensor.shape))} and "
            f"weight_shape {[rows, columns]}",
            f"expected codes of {' or '.join(map(str, scheme.bits))} bits: {_COPY}",
        )
    return (rows, columns), bits


def _groups(scheme: WeightScheme, scales: StoredTensor) -> int:
    if scheme.layout != COMPRESSED:
        return scales.shape[0] if scales.shape else 0
    return 1 if math.prod(scales.shape) == 1 else scales.shape[-1]


def _wanted(
    scheme: WeightScheme, codes: str, shape: tuple[int, int], bits: int, groups: int
) -> dict[str, tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]]:
    """Return the types and shapes that each part may have."""
    rows, columns = shape
    floats, words = tuple(_FLOATS), -(-rows * bits // _WORD)
    order = (("I32", "I64"), ((columns,),))
    if scheme.layout == COMPRESSED:
        single: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1)) if groups == 1 else ()  # for the whole matrix
        in_words = (rows, -(-columns * bits // _WORD))
        return {
            codes: (("I32",), (in_words,)) if codes == "weight_packed" else (("I8",), (shape,)),
            "weight_scale": (floats, ((rows, groups), *single)),
            "weight_shape": (("I32", "I64"), ((2,),)),
            "weight_zero_point": (("I32",), ((words, groups),)),
            "weight_g_idx": order,
        }
    gptq = scheme.layout == GPTQ
    return {
        codes: (("I32",), ((columns * bits // _WORD, rows) if gptq else (columns, rows * bits // _WORD),)),
        "qzeros": (("I32",), ((groups, words),)),
        "scales": (floats, ((groups, rows),)),
        "g_idx": order,
    }
