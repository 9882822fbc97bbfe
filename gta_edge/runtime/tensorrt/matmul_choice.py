"""Who multiplies by the quantised matrices of an engine, our plugin or TensorRT itself: the rule, given what they take.

Nothing proves that TensorRT makes one fast kernel of DequantizeLinear and MatMul on a given GPU, nor that our kernels
are the faster ones there. So both are timed on the GPU that the engine is for (``matmul_timing.py``), with the model's
own sizes, and this module decides by the times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gta_edge.graph.io import rewriting
from gta_edge.runtime.tensorrt.engine import IMPLEMENTATIONS
from gta_edge.runtime.tensorrt.passes.pack_matmuls import plan_calls

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["PHASES", "SLOWER_PREFILL", "Choice", "MatMulCall", "Timing", "calls_of", "choose"]

PHASES = ("decode", "prefill")

SLOWER_PREFILL = 2.0
"""How many times as long a chunk of a prompt may take for the sake of faster tokens."""


@dataclass(frozen=True)
class MatMulCall:
    """One kind of matmul in a model, as the plugin makes one call of it.

    Attributes:
        bits: of a code.
        block_size: inputs that share a scale; 0 is one scale per output channel.
        in_features: K.
        output_sizes: widths of the matrices that share the input.
        bias: whether there is one.
        head: whether it gives the logits, which a chunk wants of one position.
    """

    bits: int
    block_size: int
    in_features: int
    output_sizes: tuple[int, ...]
    bias: bool
    head: bool = False

    def rows(self, phase: str, chunk_size: int) -> int:
        """Return the rows of a call in a step of one token, or of a chunk."""
        return chunk_size if phase == "prefill" and not self.head else 1


@dataclass(frozen=True)
class Timing:
    """What one kind of matmul takes.

    Attributes:
        call: the matmul.
        count: how often a step has it.
        phase: ``decode`` or ``prefill``.
        microseconds: of one, by who multiplies.
    """

    call: MatMulCall
    count: int
    phase: str
    microseconds: Mapping[str, float]

    def document(self) -> dict[str, Any]:
        """Return it as it is written down."""
        call = {**vars(self.call), "output_sizes": list(self.call.output_sizes)}
        return {**call, "count": self.count, "phase": self.phase, "microseconds": dict(self.microseconds)}


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why.

    Attributes:
        matmul: ``plugin`` or ``native``.
        microseconds: of all matmuls of a step, by phase and by who multiplies; empty where nothing was timed.
    """

    matmul: str
    microseconds: Mapping[str, Mapping[str, float]]


def calls_of(model: ir.Model) -> Counter[MatMulCall]:
    """Return the matmuls of a bundle's model that the plugin can take, and how often there is each of them.

    Args:
        model: its weights are not read.

    Raises:
        BundleError: the graph is none that export writes.
    """
    with rewriting("the bundle's graph"):
        calls, _ = plan_calls(model.graph)
    return Counter(
        MatMulCall(
            bits=call[0].bits,
            block_size=call[0].block_size,
            in_features=call[0].in_features,
            output_sizes=tuple(matmul.out_features for matmul in call),
            bias=any(matmul.bias is not None for matmul in call),
            head=any(matmul.last.outputs[0].is_graph_output() for matmul in call),
        )
        for call in sorted(calls, key=lambda call: min(matmul.place for matmul in call))
    )


def choose(timings: Sequence[Timing]) -> Choice:
    """Return who multiplies in the whole engine: who takes less for a token, unless prompts pay for it.

    The one whose matmuls of a decode step take less time in all wins, TensorRT where they take the same. But where its
    chunk of a prompt takes more than ``SLOWER_PREFILL`` times as long as the other's, the other wins.

    Args:
        timings: of every kind of matmul in the model, in both phases; if there is none, TensorRT multiplies.
    """
    if not timings:
        return Choice("native", {})
    totals = {
        phase: {
            who: sum(each.count * each.microseconds[who] for each in timings if each.phase == phase)
            for who in IMPLEMENTATIONS
        }
        for phase in PHASES
    }
    decode, prefill = totals["decode"], totals["prefill"]
    faster, other = ("plugin", "native") if decode["plugin"] < decode["native"] else ("native", "plugin")
    return Choice(other if prefill[faster] > SLOWER_PREFILL * prefill[other] else faster, totals)
