"""Leave the attention to the plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gta_edge.errors import EngineError
from gta_edge.libraries.optional import optional
from gta_edge.plugins.attention import definition as op
from gta_edge.plugins.domain import DOMAIN, VERSION

if TYPE_CHECKING:
    import onnx_ir as ir
else:
    ir = optional("onnx_ir", "tensorrt")

__all__ = ["KeepPluginNodesPass"]


class KeepPluginNodesPass(ir.passes.InPlacePass):
    """Remove the functions that give our nodes their meaning in standard operators.

    TensorRT's parser takes the function where there is one, plugin or not. It finds the plugin by the node's domain
    or, before 10.10, by two attributes.

    Afterwards every such node has the attributes ``plugin_namespace`` and ``plugin_version``.

    Raises:
        EngineError: the model has functions or nodes that no plugin stands for.
    """

    def requires(self, model: ir.Model) -> None:
        """The plugin implements every function, and every node of our domain."""
        nodes = [(node.domain, node.op_type) for node in model.graph if node.domain == DOMAIN]
        for domain, name in [*(key[:2] for key in model.functions), *nodes]:
            if (domain, name) != (DOMAIN, op.OP):
                raise EngineError(f"no plugin implements {domain}::{name}, only {DOMAIN}::{op.OP}", "export it again")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove the functions of ``model``."""
        modified = bool(model.functions)
        model.functions.clear()
        for node in [node for node in model.graph if node.domain == DOMAIN]:
            for name, text in (("plugin_namespace", DOMAIN), ("plugin_version", str(VERSION))):
                if node.attributes.get_string(name, "") != text:
                    node.attributes[name] = ir.AttrString(name, text)
                    modified = True
        return ir.passes.PassResult(model, modified)
