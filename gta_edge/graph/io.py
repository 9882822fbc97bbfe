"""A bundle's graph, lowered for a backend: loaded, run through passes, and stored.

Every path to a session or an engine goes through here.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gta_edge.errors import BundleError, CapacityError, GtaEdgeError
from gta_edge.formats.bundle import WEIGHTS
from gta_edge.graph.attention import attention_nodes, node_features
from gta_edge.graph.stored import StoredTensor
from gta_edge.graph.validate import check_model
from gta_edge.libraries.optional import installed, optional
from gta_edge.model.config import ModelConfig
from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.attention.function import function
from gta_edge.support.files import bundle_file
from gta_edge.support.progress import Progress
from gta_edge.support.text import one_line, printable

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from onnx_ir.passes import common
else:
    onnx, ir = optional("onnx", "ort"), optional("onnx_ir", "ort")
    common = optional("onnx_ir.passes.common", "ort")

__all__ = [
    "add_attention_function",
    "load_graph",
    "reuse_weights",
    "rewriting",
    "run_passes",
    "serialised",
    "store_weights",
]

_FIXED_BYTES, _LAYER_BYTES, _MAX_BYTES = 2**18, 2**16, 2**24
"""Of a graph's file: a layer takes a third of that at most, and parsed it may take eighty times its size."""
_INLINE_BYTES = 1024  # tensors of no more stay in the graph's own file, as in a bundle
_MERGED_VALUES = 64  # of constants that are compared: one for each bit of a word of branches
_REMEDY = "export the bundle again, or copy it anew"


def load_graph(model_path: Path, config: ModelConfig, extra: str = "ort") -> ir.Model:
    """Return a bundle's graph, whose weights are read when they are asked for.

    The file may be anybody's; see ``validate``. What the attention's function means is written down in this package,
    and its own definition takes the place of the file's.

    Args:
        model_path: the bundle's ONNX file.
        config: of the bundle.
        extra: of this package that brings onnx-ir, for what the error says where it is missing.

    Raises:
        BundleError: it is not a graph that export writes for this config, or its weights do not lie in the bundle.
        BackendError: onnx-ir is not installed.
    """
    if not installed(ir):
        optional("onnx_ir", extra)()  # says what to install
    directory = model_path.parent
    content = _content(model_path, config)
    weights = directory / WEIGHTS
    try:
        file = bundle_file(directory, WEIGHTS) if weights.exists() or weights.is_symlink() else None
        file_bytes = {} if file is None else {WEIGHTS: file.stat().st_size}
        proto = onnx.ModelProto.FromString(content)
        check_model(proto, config, file_bytes)
        del proto.functions[:]
        model: ir.Model = ir.from_proto(proto)
    except GtaEdgeError:
        raise
    except MemoryError as error:
        raise CapacityError(f"{printable(str(model_path))}: no memory to read it", "close other programs") from error
    except Exception as error:  # the parser's errors have no common base
        raise BundleError(
            f"{printable(str(model_path))}: is no graph that gta-edge writes ({one_line(error, 250)})", _REMEDY
        ) from error
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            assert file is not None  # check_model found it there
            value.const_value = StoredTensor(file, value.const_value)
    add_attention_function(model)
    return model


def add_attention_function(model: ir.Model) -> None:
    """Add the attention's function, in the form of the model's nodes, which are all of one."""
    import onnx.parser

    nodes = attention_nodes(model.graph)
    if not nodes:
        return
    node = nodes[0]
    given = op.given_inputs(node.inputs)
    text = function("gate" in given, "value_decoder" in given, node_features(node))
    meaning = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    model.functions[meaning.identifier()] = meaning


def _content(path: Path, config: ModelConfig) -> bytes:
    most = min(_FIXED_BYTES + _LAYER_BYTES * config.num_hidden_layers, _MAX_BYTES)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BundleError(f"{printable(str(path))}: is not a regular file", _REMEDY)
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise BundleError(f"{printable(str(path))}: cannot be read ({error.strerror})", _REMEDY) from error
    if len(content) > most:
        raise BundleError(
            f"{printable(str(path))}: has more than {most} bytes, too many for a graph of "
            f"{config.num_hidden_layers} layers",
            f"{_REMEDY}",
        )
    return content


def run_passes(model: ir.Model, where: Path | str, *passes: ir.passes.PassBase) -> None:
    """Run passes over a bundle's graph, and those that tidy up after any; ``where`` is the file that it comes from.

    Common subexpressions are merged, what nothing uses is removed, and names are made unique.

    Raises:
        GtaEdgeError: as ``rewriting`` has it.
    """
    merging = common.CommonSubexpressionEliminationPass(size_limit=_MERGED_VALUES)
    tidying = merging, common.RemoveUnusedNodesPass(), common.NameFixPass()
    with rewriting(where):
        ir.passes.Sequential(*passes, *tidying)(model)


def store_weights(
    model: ir.Model,
    where: Path | str,
    weights: Path,
    location: str,
    progress: Progress,
    *,
    everything: bool = True,
    workers: int = 1,
) -> None:
    """Write weights to a file, and let the model refer to them there; what is small stays in the graph.

    Args:
        model: whose weights are read and made now, one for each worker at a time.
        where: the file that the model comes from.
        weights: the file to write.
        location: what the model calls it.
        progress: told of each tensor.
        everything: write all weights; otherwise those alone that passes have made, and the others stay where they are.
        workers: threads that make and write tensors.

    Raises:
        GtaEdgeError: as ``rewriting`` has it.
        OSError: the file cannot be written.
    """
    found = [
        (value, tensor)
        for value in model.graph.initializers.values()
        if (tensor := value.const_value) is not None
        and (everything or isinstance(tensor, ir.LazyTensor))
        and (isinstance(tensor, ir.ExternalTensor) or tensor.nbytes > _INLINE_BYTES)
    ]

    def wrote(_: Any, info: Any) -> None:
        progress("writing weights", info.index + 1, info.total)

    if not found:
        return
    with rewriting(where):
        written = ir.external_data.convert_tensors_to_external(
            [tensor for _, tensor in found], weights.parent, weights.name, callback=wrote, max_workers=workers
        )
    for (value, _), tensor in zip(found, written, strict=True):
        value.const_value = ir.ExternalTensor(
            location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=str(value.name)
        )


def reuse_weights(model: ir.Model, where: Path | str, other: bytes) -> None:
    """Let a model's new weights be those that ``store_weights`` wrote for another; what is small stays in the graph.

    Args:
        model: whose weights that passes have made need not be made.
        where: the file that the model comes from.
        other: a model of the same bundle, serialised.

    Raises:
        BundleError: a weight was not written for the other model.
    """
    written = {tensor.name: tensor for tensor in onnx.ModelProto.FromString(other).graph.initializer}
    for name, value in model.graph.initializers.items():
        new = value.const_value
        if not isinstance(new, ir.LazyTensor) or new.nbytes <= _INLINE_BYTES:
            continue
        found = written.get(name)
        if found is None or (tuple(found.dims), found.data_type) != (new.shape.numpy(), int(new.dtype)):
            raise BundleError(f"{printable(str(where))}: {name} was not written for the graph beside it", _REMEDY)
        value.const_value = ir.from_proto(found)


def serialised(model: ir.Model, where: Path | str) -> bytes:
    """Return a model as its file holds it; weights that were put off and stay in it are made now.

    Raises:
        GtaEdgeError: as ``rewriting`` has it.
    """
    with rewriting(where):
        return bytes(ir.to_proto(model).SerializeToString())


@contextmanager
def rewriting(where: Path | str) -> Iterator[None]:
    """Turn whatever passes, and the making of weights that they have put off, meet in a graph into an error of ours.

    An error of ours from within one passes as it is, and so does an OSError, which is of the place written to.

    Raises:
        BundleError: the graph is not as a pass relies on.
        CapacityError: there is not enough memory.
    """
    try:
        yield
    except (GtaEdgeError, OSError):
        raise
    except Exception as error:  # a pass may meet anything, and onnx-ir wraps it in errors of its own
        cause: BaseException = error
        while not isinstance(cause, (GtaEdgeError, MemoryError, OSError)) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, (GtaEdgeError, OSError)):
            raise cause from error
        name = printable(str(where))
        if isinstance(cause, MemoryError):
            raise CapacityError(f"{name}: no memory to lay out its weights", "close other programs") from error
        raise BundleError(f"{name}: is no graph that gta-edge writes ({one_line(cause, 250)})", _REMEDY) from error
