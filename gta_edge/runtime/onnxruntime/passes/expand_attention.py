"""Write grouped latent attention out for ONNX Runtime's CPU kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gta_edge.errors import BackendError
from gta_edge.graph.builder import Nodes, lazy_initializer, static_size, take_place
from gta_edge.libraries.optional import optional
from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.domain import DOMAIN
from gta_edge.runtime.onnxruntime.passes.attention_nodes import CONTRIB, Attended, Layer, by_head
from gta_edge.runtime.onnxruntime.passes.int8_attention import attend_in_int8
from gta_edge.runtime.onnxruntime.passes.managed_nodes import mask_of, positions_of

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "ort")

__all__ = ["ExpandAttentionPass"]


class ExpandAttentionPass(ir.passes.InPlacePass):
    """Replace every ``GroupedLatentAttention`` by fewer nodes than its function has, with the same meaning.

    A step of one token runs some 30 small nodes per layer, and each costs a microsecond or two whatever it does. So:
    query and key are rotated together and split where they need no further reshaping; the scale is a factor of the
    matmul; query heads stay rows of one matmul from scores to mix when key and latent heads are as many; the mask
    is laid out for those rows, once for all layers; and the tile of the mix is folded into the value decoder, where
    there is one, which costs nothing in float32.

    The graph computes in float32. A value decoder may be stored in another type, behind a Cast.

    Args:
        int8: whether the cache is of int8, as ``int8_attention`` has it; otherwise it is the graph's own, of float32.

    Raises:
        BackendError: a value decoder is not stored.
    """

    def __init__(self, *, int8: bool = False) -> None:
        super().__init__()
        self.int8 = int8

    def requires(self, model: ir.Model) -> None:
        """Every value decoder is an initializer, maybe behind a Cast."""
        for node in _attention(model.graph):
            given = op.given_inputs(node.inputs).get("value_decoder")
            if given is not None and _stored(given) is None:
                raise BackendError(f"the value decoder {given.name} is no stored tensor", "export the bundle again")

    def ensures(self, model: ir.Model) -> None:
        """No such node is left, and no function of it."""
        if _attention(model.graph) or any(key[:2] == (DOMAIN, op.OP) for key in model.functions):
            raise ir.passes.PostconditionError(f"{op.OP} is still there")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Expand every such node of ``model``."""
        graph = model.graph
        found = _attention(graph)
        for node in found:
            outputs, made = _expanded(graph, node, int8=self.int8)
            graph.insert_before(node, made)
            for old, new in zip(node.outputs, outputs, strict=True):
                take_place(old, new)
            graph.remove(node, safe=True)
        for identifier in [key for key in model.functions if key[:2] == (DOMAIN, op.OP)]:
            del model.functions[identifier]
        if found:
            model.opset_imports[CONTRIB] = 1
        return ir.passes.PassResult(model, modified=bool(found))


def _attention(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if (node.domain, node.op_type) == (DOMAIN, op.OP)]


def _stored(decoder: ir.Value) -> ir.Value | None:
    """Return the initializer that a value decoder is stored in, None where it is computed."""
    cast = decoder.producer()
    stored = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else decoder
    known = stored is not None and stored.is_initializer() and stored.shape is not None and len(stored.shape) == 3
    return stored if known else None


def _expanded(graph: ir.Graph, node: ir.Node, *, int8: bool) -> tuple[list[ir.Value], list[ir.Node]]:
    """Return the node's outputs, and the nodes that make them."""
    given = op.given_inputs(node.inputs)
    query, past_key, past_latent, length = (given[k] for k in ("query", "past_key", "past_latent", "past_length"))
    n_q, n_k, n_c = (node.attributes.get_int(name) for name in op.ATTRIBUTES[:3])
    d_k, d_l = static_size(past_key, 3), static_size(past_latent, 3)
    nodes = Nodes()
    tokens = nodes("Shape", query, start=1, end=2)
    capacity = nodes("Shape", past_latent, start=2, end=3)
    places = positions_of(nodes, given, tokens)

    turned = nodes("Concat", query, given["key"], axis=-1)
    turned = nodes("RotaryEmbedding", turned, given["cos"], given["sin"], places, num_heads=n_q + n_k)
    turned = nodes("Reshape", turned, nodes.constant(0, 0, n_q + n_k, d_k))
    layer = Layer(
        rotated=nodes("Transpose", turned, perm=[0, 2, 1, 3]),
        latents=by_head(nodes, given["latent"], n_c),
        past_key=past_key,
        past_latent=past_latent,
        length=length,
        heads=(n_q, n_k, n_c),
        scale=node.attributes.get_float("scale"),
        tokens=tokens,
        mask=mask_of(nodes, node, (n_q, n_k, n_c), places, tokens, capacity),
    )
    if int8:
        attended = attend_in_int8(nodes, graph, layer, (node.outputs[1], node.outputs[2]))
    else:
        attended = _attend(nodes, layer)

    width = d_l  # of a head's output
    values = layer.mask.mixed(nodes, nodes("Reshape", attended.mix, nodes.constant(0, n_q, -1, d_l)))
    if "value_decoder" in given:
        decoder = _decoder(graph, given["value_decoder"])
        values = nodes("MatMul", values, decoder)  # [B, n_q, T, e·d_l]
        width = static_size(decoder, 2)
    values = nodes("Transpose", values, perm=[0, 2, 1, 3])
    output = nodes("Reshape", values, nodes.constant(0, 0, n_q * width))
    if "gate" in given:
        output = nodes("Mul", nodes("Sigmoid", given["gate"]), output)
    outputs = [output, attended.present_key, attended.present_latent]
    if attended.received is not None:
        outputs.append(attended.received)
    return outputs, nodes.made


def _attend(nodes: Nodes, layer: Layer) -> Attended:
    """Append to a layer's cache and attend to it, in float32."""
    n_q, n_k, _ = layer.heads
    queries = nodes("Split", layer.rotated, nodes.constant(n_q, n_k), axis=1, outputs=2)  # [B, n_q, T, d_k]
    keys = nodes.outputs[1]  # [B, n_k, T, d_k]
    shape = nodes.constant(0, n_k, -1, static_size(layer.past_key, 3))
    queries = nodes("Reshape", queries, shape)  # [B, n_k, (n_q / n_k)·T, d_k]
    present_key = nodes("TensorScatter", layer.past_key, keys, layer.length, axis=2)
    present_latent = nodes("TensorScatter", layer.past_latent, layer.latents, layer.length, axis=2)
    scores = nodes("FusedMatMul", queries, present_key, domain=CONTRIB, transB=1, alpha=layer.scale)
    weights = layer.mask.softmax(nodes, scores)
    mix = nodes("MatMul", weights, present_latent)  # [B, n_c, (n_q / n_c)·T, d_l]
    return Attended(mix, present_key, present_latent, layer.mask.received(nodes, weights))


def _decoder(graph: ir.Graph, given: ir.Value) -> ir.Value:
    """Return the value decoder with the tile of the mix folded in: W_P + [I I …], float32 [n_q, d_l, e·d_l]."""
    stored = _stored(given)
    assert stored is not None and stored.shape is not None  # it is required
    shape = stored.shape.numpy()
    name = f"{stored.name}.with_tile"

    def data() -> ir.TensorProtocol:
        assert stored.const_value is not None
        tile = np.tile(np.eye(shape[1], dtype=np.float32), shape[2] // shape[1])
        return ir.tensor(stored.const_value.numpy().astype(np.float32) + tile)

    return lazy_initializer(graph, name, ir.DataType.FLOAT, shape, data)
