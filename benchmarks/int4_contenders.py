"""What ``int4.py`` compares: the matmuls of a model's step, and who multiplies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gta_edge.cuda.gpu import current_gpu
from gta_edge.errors import BackendError
from gta_edge.libraries.optional import optional
from gta_edge.model.config import GTAConfig, ModelConfig
from gta_edge.plugins.matmul.kernels import matmul_kernels
from gta_edge.plugins.matmul.packing import Packed, packed_shapes, unpack
from gta_edge.plugins.matmul.tiling import Variant

if TYPE_CHECKING:
    import torch
else:
    torch = optional("torch", "export")

__all__ = ["CONTENDERS", "OWN", "Fp16", "MatMul", "Ours", "Run", "TorchInt4", "matmuls"]

BLOCK = 32
TOLERANCE = 2e-3

Run = Callable[[int], object]
"""Multiplies by the matrix of that number."""


@dataclass(frozen=True)
class MatMul:
    """One call of a step: matrices that share their input, side by side."""

    name: str
    in_features: int
    output_sizes: tuple[int, ...]
    count: int
    """Of one step."""

    @property
    def out_features(self) -> int:
        """All outputs together."""
        return sum(self.output_sizes)

    def flops(self, rows: int) -> int:
        """Return the operations of a call."""
        return 2 * rows * self.in_features * self.out_features

    def io_bytes(self, rows: int) -> int:
        """Return the bytes of a call without those of its weights, in 16-bit types."""
        return 2 * rows * (self.in_features + self.out_features)


def matmuls(config: ModelConfig) -> list[MatMul]:
    """Return the matmuls of a model's step, those that share their input together."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    if isinstance(config, GTAConfig):
        query, key = config.num_query_heads * config.key_dim, config.num_key_heads * config.key_dim
        attention = (query, key, config.num_latent_heads * config.latent_dim, hidden)
    else:
        width = config.cache_values_per_token_per_layer // 2
        attention = (hidden, width, width)
    return [
        MatMul("attention, in", hidden, attention, layers),
        MatMul("attention, out", hidden, (hidden,), layers),
        MatMul("gate and up", hidden, (inner, inner), layers),
        MatMul("down", inner, (hidden,), layers),
        MatMul("head", hidden, (config.vocab_size,), 1),
    ]


# --- who multiplies ---------------------------------------------------------------------------------------------------


class Ours:
    """This package's kernels, in fp16.

    Args:
        bits: of a weight.
        block_size: inputs that share a scale; 0 is one for each output.
    """

    def __init__(self, bits: int, block_size: int) -> None:
        self.variant = Variant(bits, block_size, "fp16")
        self.label = f"gta-edge int{bits}, {f'blocks of {block_size}' if block_size else 'per channel'}"

    def weight_bytes(self, matmul: MatMul) -> int:
        """Return the bytes of a packed matrix and its scales."""
        weight, scale = self._shapes(matmul)
        return 4 * _size(weight) + 2 * _size(scale)

    def prepare(self, matmul: MatMul, rows: int, copies: int) -> Run:
        """Return what multiplies by each of so many random matrices."""
        weight_shape, scale_shape = self._shapes(matmul)
        weights = torch.randint(-(2**31), 2**31, (copies, *weight_shape), dtype=torch.int32, device="cuda")
        scales = torch.rand((copies, *scale_shape), dtype=torch.float16, device="cuda") * 0.01
        x = torch.randn(rows, matmul.in_features, dtype=torch.float16, device="cuda")
        outputs = [torch.empty(rows, size, dtype=torch.float16, device="cuda") for size in matmul.output_sizes]
        kernels = matmul_kernels(self.variant, current_gpu(torch.cuda.current_device()))
        sizes = {"rows": rows, "in_features": matmul.in_features, "output_sizes": matmul.output_sizes}

        def run(i: int) -> tuple[Any, ...]:
            kernels.launch(
                torch.cuda.current_stream().cuda_stream,
                x=x.data_ptr(),
                weight=weights[i].data_ptr(),
                scale=scales[i].data_ptr(),
                outputs=[output.data_ptr() for output in outputs],
                **sizes,
            )
            return x, weights[i], scales[i], outputs

        return run

    def check(self, matmul: MatMul, rows: int) -> None:
        """Compare with float32.

        Raises:
            BackendError: the result is wrong.
        """
        x, weight, scale, outputs = self.prepare(matmul, rows, 1)(0)
        packed = Packed(weight.cpu().numpy(), scale.cpu().numpy())
        bits, block = self.variant.bits, self.variant.block_size
        codes, scales = unpack(packed, matmul.in_features, matmul.out_features, bits, block)
        spread_scales = torch.from_numpy(scales).float().reshape(-1, matmul.out_features)
        repeats = block or matmul.in_features
        matrix = torch.from_numpy(codes).float() * spread_scales.repeat_interleave(repeats, 0)
        wanted = x.double().cpu() @ matrix.double()
        error = (torch.cat(outputs, dim=1).double().cpu() - wanted).abs().max() / wanted.abs().max()
        if not error <= TOLERANCE:
            raise BackendError(f"{self.label} is wrong: {matmul.name}, {rows} rows, is off by {error:.1e}")

    def _shapes(self, matmul: MatMul) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return packed_shapes(matmul.in_features, matmul.out_features, self.variant.bits, self.variant.block_size)


class Fp16:
    """The matmul of torch in fp16, which is cuBLAS's."""

    label = "cuBLAS fp16"

    def weight_bytes(self, matmul: MatMul) -> int:
        """Return the bytes of a matrix."""
        return 2 * matmul.in_features * matmul.out_features

    def prepare(self, matmul: MatMul, rows: int, copies: int) -> Run:
        """Return what multiplies by each of so many random matrices."""
        shape = (copies, matmul.out_features, matmul.in_features)
        weights = torch.empty(shape, dtype=torch.float16, device="cuda").normal_()
        x = torch.randn(rows, matmul.in_features, dtype=torch.float16, device="cuda")
        y = torch.empty(rows, matmul.out_features, dtype=torch.float16, device="cuda")
        return lambda i: torch.mm(x, weights[i].t(), out=y)


class TorchInt4:
    """``torch._weight_int4pack_mm``, in bf16, with a zero point beside each scale."""

    label = f"torch int4, blocks of {BLOCK}"

    def weight_bytes(self, matmul: MatMul) -> int:
        """Return the bytes of a packed matrix, its scales and zero points."""
        values = matmul.in_features * matmul.out_features
        return values // 2 + 4 * values // BLOCK

    def prepare(self, matmul: MatMul, rows: int, copies: int) -> Run:
        """Return what multiplies by each of so many random matrices."""
        k, n = matmul.in_features, matmul.out_features
        weights = [
            torch._convert_weight_to_int4pack(torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda"), 8)
            for _ in range(copies)
        ]
        scales = torch.rand(copies, k // BLOCK, n, 2, dtype=torch.bfloat16, device="cuda")
        x = torch.randn(rows, k, dtype=torch.bfloat16, device="cuda")
        return lambda i: torch._weight_int4pack_mm(x, weights[i], BLOCK, scales[i])


CONTENDERS: dict[str, Ours | Fp16 | TorchInt4] = {
    "int4": Ours(4, BLOCK),
    "int8": Ours(8, 0),
    "fp16": Fp16(),
    "torch-int4": TorchInt4(),
}
OWN = ("int4", "int8")


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
