"""The decoder with its quantised matrices left in codes: what an int8 or int4 bundle runs as on a GPU.

It is ``model.py``'s decoder, some of its modules replaced. Matrices that share their input lie side by side and are one
call of ``torch.ops.gta.blockwise_matmul``: query, key, latent or value, and gate of a layer; gate and up of its MLP.
The embedding is looked up in codes, in the head's own where the two are tied, so it takes no memory of its own then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import BundleError
from gta_edge.libraries.optional import optional
from gta_edge.model.config import ModelConfig
from gta_edge.model.decoder import Decoder
from gta_edge.numerics.quantization import QuantizedMatrix
from gta_edge.plugins.matmul.definition import MAX_OUTPUTS
from gta_edge.plugins.matmul.packing import BLOCK_SIZES, OUTPUTS_MULTIPLE, Packed, pack
from gta_edge.plugins.matmul.torch import ALIGNED_INPUTS, dequantised_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = optional("torch", "export")
    Tensor, nn = torch.Tensor, torch.nn

__all__ = ["PackedEmbedding", "QuantizedLinear", "QuantizedLinears", "build_packed_decoder", "is_packable"]

_GROUPS = {"self_attn": ("q_proj", "k_proj", "v_proj", "g_proj"), "mlp": ("gate_proj", "up_proj")}
"""Linear layers of a block that share their input; only GTA has a g_proj."""

_SINGLE = {"self_attn": "o_proj", "mlp": "down_proj"}


@dataclass(frozen=True)
class _Matrix:
    """One packed matrix, with the bias that belongs to it."""

    packed: Packed
    in_features: int
    out_features: int
    bits: int
    block_size: int
    bias: Tensor | None = None

    @property
    def kind(self) -> tuple[int, int, int]:
        """What matrices of one call have in common."""
        return self.in_features, self.bits, self.block_size


def _joined(parts: Sequence[npt.NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts) if len(parts) > 1 else parts[0])


class _Call(nn.Module):
    """One call of the op: Linear layers of one input, their matrices side by side."""

    weight: Tensor
    _scale: Tensor
    bias: Tensor | None

    def __init__(self, matrices: Sequence[_Matrix]) -> None:
        super().__init__()
        self.in_features, self.bits, self.block_size = matrices[0].kind
        self.output_sizes = [matrix.out_features for matrix in matrices]
        weights, scales = ([getattr(m.packed, name) for m in matrices] for name in ("weight", "scale"))
        self.register_buffer("weight", _joined(weights))
        # as integers, which a change of the model's type leaves alone
        self.register_buffer("_scale", _joined(scales).view(torch.int16))
        some = any(matrix.bias is not None for matrix in matrices)
        # without their gradient, and where they all are: the call is moved to the GPU as a whole
        biases = [torch.zeros(m.out_features) if m.bias is None else m.bias.detach().cpu() for m in matrices]
        self.register_buffer("bias", torch.cat(biases) if some else None)

    @property
    def scale(self) -> Tensor:
        """The packed scales, float16."""
        return self._scale.view(torch.float16)

    def forward(self, x: Tensor) -> list[Tensor]:
        results: list[Tensor] = torch.ops.gta.blockwise_matmul.default(
            x, self.weight, self.scale, self.bias, self.bits, self.block_size, self.output_sizes
        )
        return results


class QuantizedLinears(nn.Module):
    """Linear layers that share their input, in as few calls as they take.

    Args:
        layers: packed matrices, or Linear layers that stay as they are.
    """

    def __init__(self, layers: Sequence[_Matrix | nn.Linear]) -> None:
        super().__init__()
        runs: list[list[_Matrix]] = []
        self.calls = nn.ModuleList()
        for layer in layers:
            if isinstance(layer, nn.Linear):
                self._close(runs)
                self.calls.append(layer)
                continue
            run = runs[-1] if runs else []
            # all but the last of a call end where a tile does
            joins = run and len(run) < MAX_OUTPUTS and run[-1].kind == layer.kind
            if joins and run[-1].out_features % OUTPUTS_MULTIPLE == 0:
                run.append(layer)
            else:
                self._close(runs)
                runs.append([layer])
        self._close(runs)

    def _close(self, runs: list[list[_Matrix]]) -> None:
        if runs:
            self.calls.append(_Call(runs.pop()))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the layers' outputs for x [..., K], in order."""
        results: list[Tensor] = []
        for call in self.calls:
            found = call(x)
            results += found if isinstance(call, _Call) else [found]
        return results


class QuantizedLinear(QuantizedLinears):
    """One Linear layer."""

    def __init__(self, layer: _Matrix | nn.Linear) -> None:
        super().__init__([layer])

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # one where the base has several
        """Return the layer's output for x [..., K]."""
        return self.calls[0](x)[0]  # type: ignore[no-any-return]  # nn.Module's call is untyped


class PackedEmbedding(nn.Module):
    """Rows of a table that lies as the matrix [H, V] of a head does, looked up in its codes.

    Args:
        table: the call that multiplies by that matrix; the head's own, or one made for this.
    """

    _like: Tensor

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table
        self.register_buffer("_like", torch.empty(0), persistent=False)  # has the model's type

    def forward(self, ids: Tensor) -> Tensor:
        """Return rows [..., H] of the model's type for ids int64 [...]."""
        table: Any = self.table
        rows = dequantised_rows(table.weight, table.scale, ids, table.bits, table.in_features)
        return rows.to(self._like.dtype)


def is_packable(matrix: QuantizedMatrix) -> bool:
    """Tell whether kernels multiply by this matrix as it is."""
    return matrix.block_size in BLOCK_SIZES.get(matrix.bits, ()) and matrix.codes.shape[1] % ALIGNED_INPUTS == 0


def build_packed_decoder(
    config: ModelConfig, weights: Iterable[tuple[str, npt.NDArray[Any] | QuantizedMatrix]], device: str = "cpu"
) -> Decoder:
    """Return a ``Decoder`` whose quantised matrices stay in codes, and whose other parameters are in float32.

    A matrix is packed before the next one is read, and given up on the host when it is on the device. What kernels
    cannot take (``is_packable``) is dequantised.

    Args:
        config: the model's sizes.
        weights: checkpoint names and parameters (``weights.read_stored``); biases that are not among them are absent.
        device: where the parameters go.

    Raises:
        BundleError: a parameter is missing.
    """
    tensors: dict[str, Tensor] = {}
    matrices: dict[str, _Matrix] = {}
    for name, stored in weights:
        if isinstance(stored, QuantizedMatrix) and is_packable(stored):
            packed = pack(stored.stored_codes, stored.stored_scales, stored.bits, stored.block_size)
            outputs, inputs = stored.codes.shape
            matrices[name] = _Matrix(packed, inputs, outputs, stored.bits, stored.block_size)
        else:
            values = stored.values if isinstance(stored, QuantizedMatrix) else stored.astype(np.float32, copy=False)
            tensors[name] = torch.from_numpy(values).to(device)
        del stored
    found = tensors.keys() | matrices.keys()
    missing = [n for n in config.parameter_shapes() if n not in found and not config.is_optional(n)]
    if missing:
        raise BundleError(f"the weights lack {missing[0]} and {len(missing) - 1} more", "export the bundle again")
    with torch.device("meta"):
        model = Decoder(config, tensors.keys())
    model.load_state_dict(tensors, strict=False, assign=True)
    _replace(model, matrices, device)
    return model.eval().requires_grad_(False).to(device)


def _replace(model: Decoder, matrices: dict[str, _Matrix], device: str) -> None:
    """Put packed matmuls in the place of the layers whose matrices are given, which are taken out of the dict."""
    for i, layer in enumerate(model.model.layers):
        for block, names in _GROUPS.items():
            prefix, module = f"model.layers.{i}.{block}.", getattr(layer, block)
            own = [name for name in names if hasattr(module, name)]
            if any(f"{prefix}{name}.weight" in matrices for name in own):
                module.projections = QuantizedLinears([_taken(module, prefix, name, matrices) for name in own]).to(
                    device
                )
            single = _SINGLE[block]
            if f"{prefix}{single}.weight" in matrices:
                setattr(module, single, QuantizedLinear(_taken(module, prefix, single, matrices)).to(device))
    head = matrices.pop("lm_head.weight", None)
    table = matrices.pop("model.embed_tokens.weight", None)
    if head is not None:
        del model.lm_head
        model.packed_head = QuantizedLinears([head]).to(device)
    if table is not None:
        packed = QuantizedLinears([table]).to(device)
        if model.config.tie_word_embeddings:
            model.packed_head = packed
        model.model.embed_tokens = PackedEmbedding(packed.calls[0])  # type: ignore[assignment]  # called likewise


def _taken(module: nn.Module, prefix: str, name: str, matrices: dict[str, _Matrix]) -> _Matrix | nn.Linear:
    """Take a Linear layer off its module: as a packed matrix with its bias, or as it is."""
    linear: nn.Linear = getattr(module, name)
    delattr(module, name)
    matrix = matrices.pop(f"{prefix}{name}.weight", None)
    return linear if matrix is None else replace(matrix, bias=linear.bias)
