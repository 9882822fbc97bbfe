"""What an int8 or int4 bundle stores, read with ONNX and numpy alone."""

from pathlib import Path

import numpy as np
import onnx

MODEL, DATA = "model.onnx", "model.onnx.data"
TABLE = "model.embed_tokens.weight"

STORED_TYPES = {
    onnx.TensorProto.FLOAT: np.float32,
    onnx.TensorProto.FLOAT16: np.float16,
    onnx.TensorProto.INT8: np.int8,
    onnx.TensorProto.INT32: np.dtype("<i4"),
}


def content(tensor: onnx.TensorProto) -> np.ndarray:
    """The numbers of an initializer, from its bytes."""
    if tensor.data_type == onnx.TensorProto.INT4:
        pairs = np.frombuffer(tensor.raw_data, np.uint8).astype(np.int64)
        signed = np.stack([pairs % 16, pairs // 16], axis=1).reshape(-1)  # the low half comes first
        return np.where(signed > 7, signed - 16, signed).reshape(tensor.dims)
    return np.frombuffer(tensor.raw_data, STORED_TYPES[tensor.data_type]).reshape(tensor.dims)


def spread(scales: np.ndarray, width: int) -> np.ndarray:
    """A scale for each weight, [in, out] in float64, from one per block or per channel."""
    scales = scales.astype(np.float64)
    return scales.repeat(width // len(scales), axis=0) if scales.ndim == 2 else np.tile(scales, (width, 1))


class Stored:
    """A bundle's initializers."""

    def __init__(self, bundle: Path) -> None:
        self.model = onnx.load(bundle / MODEL)
        self.tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.arrays = {name: content(tensor) for name, tensor in self.tensors.items()}
        self.matrices = [name for name in self.arrays if name.endswith(".transposed")]

    def codes(self, name: str) -> np.ndarray:
        """[out, in]"""
        return self.arrays[name].T

    def table_codes(self) -> np.ndarray:
        """[V, H], without their offset."""
        if f"{TABLE}.packed" not in self.arrays:  # looked up in the head's matrix
            return self.codes(f"{TABLE}.transposed")
        words = self.arrays[f"{TABLE}.packed"].astype(np.int64) % 2**32
        width = self.scales(TABLE).shape[1]
        count = width // words.shape[1]  # codes in a word, the first in the lowest bits
        radix = 2 ** (32 // count)
        codes = np.empty((words.shape[0], width), np.int64)
        for i in range(count):
            codes[:, i::count] = words // radix**i % radix - radix // 2
        return codes

    def scales(self, parameter: str) -> np.ndarray:
        """One for each weight, [out, in]."""
        # an untied table, which is in bytes alone, is as wide as the model
        inputs = len(self.arrays.get(f"{parameter}.transposed", self.arrays["model.norm.weight"]))
        return spread(self.arrays[f"{parameter}.transposed.scale"], inputs).T

    def weights(self) -> dict[str, np.ndarray]:
        """What the graph computes with, by the checkpoint's names; a tied head too, since it has codes of its own."""
        found = {TABLE: self.table_codes() * self.scales(TABLE)}
        for name, array in self.arrays.items():
            parameter = name.removesuffix(".transposed")
            if parameter != name:
                found["lm_head.weight" if parameter == TABLE else parameter] = array.T * self.scales(parameter)
            elif name.endswith("v_b_proj.weight"):
                heads, latent, width = array.shape
                found[name] = array.astype(np.float64).reshape(width, heads * latent)
            elif array.ndim == 1 and not name.endswith(".scale"):
                found[name] = array.astype(np.float64)
        return found
