"""What the ops share in torch: how they are registered, and memory and streams as kernels take them.

An op that is called for every layer of every token is registered with ``torch.library.Library`` itself:
``torch.library.custom_op`` wraps each call in Python of its own, which costs more than the launch. For the same reason
what follows from shapes and types alone is computed once, and kept by each tensor's ``Kind``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

from gta_edge.cuda.gpu import OLDEST
from gta_edge.errors import BackendError
from gta_edge.libraries.optional import installed, optional
from gta_edge.numerics.dtypes import COMPUTE_TYPES, DTYPES
from gta_edge.plugins.domain import DOMAIN

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = optional("torch", "export")
    Tensor = torch.Tensor

__all__ = [
    "ALIGNMENT_BYTES",
    "CALLS_CACHED",
    "Kind",
    "aligned",
    "compute_type",
    "kind",
    "making_current",
    "register_op",
    "require_aligned",
    "runs_kernels",
    "stream_handle",
]

ALIGNMENT_BYTES = 16
"""What the kernels read and write at once begins at a multiple of this."""

CALLS_CACHED = 1024
"""Calls of an op, different in shapes or types, of which it is kept what they launch."""

Kind: TypeAlias = "tuple[torch.Size, torch.dtype]"
"""A tensor's shape and type. Caches hold these and no tensors, whose memory they would keep."""

_NOTHING = nullcontext()

_library: Any = None
if installed(torch):
    _library = torch.library.Library(DOMAIN, "FRAGMENT")  # type: ignore[no-untyped-call]  # as torch has it


def register_op(
    name: str,
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    mutates: Sequence[int] = (),
    on_gpu: Callable[..., Any] | None = None,
) -> Any:
    """Register ``torch.ops.gta.NAME`` and return it, as what is called fastest (an ``OpOverload``).

    It has no derivative, and says so in the backward pass; one that writes in place says so where it is called.

    Args:
        name: of the op.
        schema: arguments and results, as torch writes them.
        function: what it does, on any device.
        fake: results with shapes and types alone, for ``torch.compile`` and export.
        mutates: places of the arguments that it writes into, where they are given.
        on_gpu: what it does on CUDA tensors, if that is something else.
    """
    _library.define(name + schema)
    op = getattr(getattr(torch.ops, DOMAIN), name).default
    no_derivative = BackendError(f"{DOMAIN}::{name} has no derivative", "call it under torch.no_grad()")

    def backward(context: Any, *gradients: Any) -> Any:
        raise no_derivative

    def in_place(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            raise no_derivative
        with torch._C._AutoDispatchBelowAutograd():
            results = op(*arguments)
        # what autograd may have kept of them is no longer theirs
        written = [arguments[place] for place in mutates if place < len(arguments)]
        torch.autograd.graph.increment_version([tensor for tensor in written if tensor is not None])
        return results

    _library.impl(name, function, "CompositeExplicitAutograd")
    if on_gpu is not None:
        _library.impl(name, on_gpu, "CUDA")
    if mutates:  # for which torch has no ready form; inference mode passes either by
        _library.impl(name, in_place, "Autograd")
    else:
        torch.library.register_autograd(f"{DOMAIN}::{name}", backward, lib=_library)
    torch.library.register_fake(f"{DOMAIN}::{name}", fake, lib=_library)
    return op


def kind(tensor: Tensor | None) -> Kind | None:
    """Return a tensor's shape and type, None of none."""
    return None if tensor is None else (tensor.shape, tensor.dtype)


@cache
def compute_type(dtype: torch.dtype) -> str | None:
    """Return our name of a type that the kernels compute in, ``fp16`` or ``bf16``; None of another."""
    return {getattr(torch, DTYPES[name].array): name for name in COMPUTE_TYPES}.get(dtype)


@cache
def runs_kernels(device: torch.device) -> bool:
    """Tell whether the kernels run on a GPU, which is not older than Ampere."""
    return torch.cuda.get_device_capability(device) >= OLDEST


def making_current(index: int) -> AbstractContextManager[Any]:
    """Return a context in which a GPU is the current one, as the meaning of the default stream's handle requires."""
    return _NOTHING if torch.cuda.current_device() == index else torch.cuda.device(index)


def stream_handle(index: int) -> int:
    """Return the handle of a GPU's current stream, without the object that ``torch.cuda.current_stream`` makes."""
    return torch._C._cuda_getCurrentRawStream(index)


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy that is contiguous and begins where kernels can read it."""
    whole = tensor.contiguous()
    return whole.clone() if whole.data_ptr() % ALIGNMENT_BYTES else whole


def require_aligned(name: str, tensor: Tensor) -> None:
    """Refuse memory that is written in place, of which a copy would be of no use, where kernels cannot write.

    Raises:
        BackendError: it does not begin where kernels can write.
    """
    if tensor.data_ptr() % ALIGNMENT_BYTES:
        raise BackendError(
            f"{name} is written in place and begins at address {tensor.data_ptr():#x}",
            f"expected a multiple of {ALIGNMENT_BYTES}: give it memory of its own",
        )
