"""What work takes of the host's memory at the least, so that what has no room is refused, and not ended by the system.

Every figure is a lower bound: what is refused could not have worked. What libraries take was measured in control
groups on Linux (x86-64, torch 2 for CPUs, ONNX Runtime 1); builds for GPUs take more. Nothing here loads them, and of
one that is loaded already only its work counts.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection

from gta_edge.formats.checkpoint import Checkpoint
from gta_edge.formats.weights import EMBEDDING, Storage, is_kept
from gta_edge.model.config import ModelConfig
from gta_edge.numerics.dtypes import CHECKPOINT_DTYPES
from gta_edge.numerics.quantization import BITS
from gta_edge.plan import cost
from gta_edge.support.memory import require_bytes

__all__ = [
    "require_memory_for_export",
    "require_memory_for_lowering",
    "require_memory_for_onnxruntime",
    "require_memory_for_own_text",
    "require_memory_for_reference",
    "require_memory_for_torch",
]

_MIB = 2**20
_TORCH = 200 * _MIB  # to load it and run a model
_TRACING = 40 * _MIB  # to trace a layer and to write the graph, beside that
_CHECKING = 28 * _MIB  # a run in ONNX Runtime and one in torch, beside both
_ONNXRUNTIME = 8 * _MIB  # to load it
_ONNX_IR = 56 * _MIB  # to load it, change a graph and run it
_FLOAT_BYTES = 4
_MOMENT_BYTES = 4 + 2 * 8  # of matmuls of inputs: in float32 and, while they are inverted, twice in float64
_CLOSE = "close other programs"
_MORE = f"{_CLOSE}, or use a machine with more memory"
_NARROWER = f"{_CLOSE}, or export with --precision int4"


def require_memory_for_export(source: Checkpoint, precision: str, *, calibrated: bool, verify: bool) -> None:
    """Refuse an export for which there is no room.

    Args:
        source: the checkpoint.
        precision: that it is exported in.
        calibrated: whether for a text.
        verify: whether it is checked against PyTorch.

    Raises:
        CapacityError: there is none; how much it takes, and what takes less.
    """
    base = _unless_loaded("torch", _TORCH + _TRACING)
    require_bytes(base + _tensor(source, precision), "the export", _MORE)
    if calibrated:
        require_bytes(base + _calibration(source.config), "calibrating", f"give --calibrate none, or {_MORE}")
    if verify:
        loaded = 0 if precision in BITS else _decoder(source.config, source.names, precision)  # in ONNX Runtime
        needed = base + _unless_loaded("torch", _CHECKING) + max(loaded, _reference(source.config))
        require_bytes(needed, "checking the export against PyTorch", f"give --no-verify, or {_MORE}")


def require_memory_for_own_text(source: Checkpoint) -> None:
    """Refuse to hold a checkpoint's whole model in float32, as it is for the text that the model itself writes.

    Raises:
        CapacityError: there is no room for it.
    """
    needed = _unless_loaded("torch", _TORCH) + _FLOAT_BYTES * source.config.parameters
    remedy = f"give --calibrate FILE, which takes a layer at a time, or --calibrate none, or {_MORE}"
    require_bytes(needed, "writing a text to calibrate with", remedy)


def require_memory_for_torch(config: ModelConfig, precision: str, what: str) -> None:
    """Refuse ``what`` where there is no room for torch and PyTorch's model of a bundle in floats.

    Raises:
        CapacityError: there is none.
    """
    needed = _unless_loaded("torch", _TORCH) + _decoder(config, cost.matrices(config), precision)
    require_bytes(needed, what, _MORE)


def require_memory_for_reference(config: ModelConfig, what: str) -> None:
    """Refuse ``what`` where there is no room for torch and a layer of PyTorch's model in float64.

    Raises:
        CapacityError: there is none.
    """
    require_bytes(_unless_loaded("torch", _TORCH) + _reference(config), what, _MORE)


def require_memory_for_onnxruntime(config: ModelConfig, storage: Storage) -> None:
    """Refuse to load a bundle on a CPU where there is no room: matmuls have a copy of their matrix, as it is run.

    Raises:
        CapacityError: there is none.
    """
    execution = cost.Execution("fp32", "fp32", 1, cpu_kernels=True)
    needed = _unless_loaded("onnxruntime", _ONNXRUNTIME)
    for name, shape in cost.matrices(config).items():
        if name != EMBEDDING and not is_kept(name):  # those are read from the file
            needed += cost.read_bytes(shape, *storage.of(name), execution)
    require_bytes(needed, "loading the model in ONNX Runtime", _MORE if storage.precision == "int4" else _NARROWER)


def require_memory_for_lowering() -> None:
    """Refuse to make the graph that ONNX Runtime runs where there is no room for what makes it.

    Raises:
        CapacityError: there is none.
    """
    needed = _unless_loaded("onnx_ir", _ONNX_IR)
    require_bytes(needed, "loading the model for the first time", f"{_CLOSE}: what it makes is kept in the bundle")


def _unless_loaded(library: str, size: int) -> int:
    return 0 if library in sys.modules else size


def _tensor(source: Checkpoint, precision: str) -> int:
    """Return the least bytes of converting the largest tensor: it is read as a whole, and quantised beside that."""
    shapes = source.config.parameter_shapes()
    extra = precision in BITS
    sizes = {name: CHECKPOINT_DTYPES[source.dtype_of(name)].bytes + extra for name in source.names}
    return max(math.prod(shapes[name]) * size for name, size in sizes.items())


def _decoder(config: ModelConfig, names: Collection[str], precision: str) -> int:
    """Return the least bytes of a model in float32, in PyTorch or ONNX Runtime; one in fp32 lies in its file."""
    shapes = config.parameter_shapes()
    return 0 if precision == "fp32" else _FLOAT_BYTES * sum(math.prod(shapes[name]) for name in names)


def _reference(config: ModelConfig) -> int:
    """Return the least bytes of running a model layer by layer: the table, or a layer in float32 and float64."""
    layer = sum(math.prod(shape) for shape in config.layer_shapes().values())
    return max(_FLOAT_BYTES * config.vocab_size * config.hidden_size, 3 * _FLOAT_BYTES * layer)


def _calibration(config: ModelConfig) -> int:
    """Return the least bytes of calibrating: the table that is looked up, or a layer and its widest inputs' moments."""
    matrices = [shape for shape in config.layer_shapes().values() if len(shape) == 2]
    layer = _FLOAT_BYTES * sum(math.prod(shape) for shape in matrices)
    table = _FLOAT_BYTES * config.vocab_size * config.hidden_size
    return max(table, layer + _MOMENT_BYTES * max(shape[1] for shape in matrices) ** 2)
