"""The backend ``torch``, described."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gta_edge.numerics.cache_codes import WORD_BITS
from gta_edge.numerics.dtypes import BLOCK_CACHE_TYPES, CACHES, FLOAT_TYPES, ROW_CACHE_TYPES
from gta_edge.runtime.backend import Asked, Backend, Importing

if TYPE_CHECKING:
    from gta_edge.formats.bundle import Bundle
    from gta_edge.model.config import ModelConfig
    from gta_edge.runtime.session import Session

__all__ = ["TORCH"]


class _Torch(Backend):
    name = "torch"
    extra = "export"
    distribution = "torch"
    modules = ("torch", "onnx_ir", "tokenizers")
    device = "either"
    compute_types = FLOAT_TYPES
    fallback_compute = "bf16"
    manages_cache = True
    has_trees = has_free_trees = True
    reference = True

    def cache_types(self, config: ModelConfig, compute: str) -> tuple[str, ...]:
        width = config.attention.latent_dim
        blocks = [name for name in BLOCK_CACHE_TYPES if width * CACHES[name].value_bits % WORD_BITS == 0]
        return (compute, *ROW_CACHE_TYPES, *blocks)

    def _check(self, found: dict[str, Any], importing: Importing) -> None:
        from gta_edge.libraries.optional import require_modules

        require_modules(self.modules, self.extra, importing)
        from gta_edge.runtime.torch.session import default_device

        if default_device() == "cuda":
            import torch

            torch.ones(1, device="cuda").add_(1).cpu()  # fails where it has no code for this GPU, or no memory

    def _open(self, bundle: Bundle, asked: Asked, **options: Any) -> Session:
        from gta_edge.plan.host_memory import require_memory_for_torch

        require_memory_for_torch(bundle.config, "fp32", "PyTorch")  # the model's, ``load_decoder`` asks for
        asked.progress("loading PyTorch", 0, 0)
        from gta_edge.runtime.torch.session import TorchSession, default_device, load_decoder, multiplies_codes

        device = default_device()
        compute = self.compute_for(asked.compute, bundle.precision, device)
        options["cache_dtype"] = self.cache_for(asked.cache_dtype, bundle.config, compute)
        model = load_decoder(bundle, device, compute)
        session = TorchSession(model, device=device, compute=compute, threads=asked.threads, **options)
        session.weights_as_stored = multiplies_codes(bundle.precision, device, compute)
        return session


TORCH: Backend = _Torch()
