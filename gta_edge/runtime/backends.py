"""Which backends there are, and how one is made from a bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gta_edge.bundle import Bundle
from gta_edge.errors import BackendError, EngineError
from gta_edge.formats.text_files import TextFiles
from gta_edge.progress import Progress, silent
from gta_edge.runtime.session import Session
from gta_edge.support.cores import check_threads

__all__ = ["BACKENDS", "load", "open_session"]


def _onnxruntime(bundle: Bundle, *, compute: str | None = None, **options: Any) -> Session:
    from gta_edge.runtime.onnxruntime import OnnxRuntimeSession

    if compute not in (None, "fp32"):
        raise BackendError(f"onnxruntime computes in fp32 on a CPU, not in {compute}; leave the type to compute in out")
    return OnnxRuntimeSession(bundle, **options)


def _onnxruntime_cuda(
    bundle: Bundle, *, threads: int | None = None, exact: bool = True, compute: str | None = None, **options: Any
) -> Session:
    from gta_edge.runtime.onnxruntime_cuda import OnnxRuntimeCudaSession

    return OnnxRuntimeCudaSession(bundle, compute=compute, **options)


def _torch(
    bundle: Bundle,
    *,
    threads: int | None = None,
    exact: bool = True,
    compute: str | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Session:
    from gta_edge.runtime.torch import TorchSession, default_compute, default_device, load_decoder

    device = default_device()
    compute = compute or default_compute(bundle.precision, device)
    model = load_decoder(bundle, device, compute)
    return TorchSession(model, device=device, compute=compute, threads=threads, **options)


def _engine(name: str) -> Callable[..., Session]:
    def open_engine(
        bundle: Bundle,
        *,
        threads: int | None = None,
        exact: bool = True,
        compute: str | None = None,
        progress: Progress = silent,
        **options: Any,
    ) -> Session:
        from gta_edge.runtime.tensorrt import TensorRTSession

        session = TensorRTSession(bundle, engine=name, **options)
        if compute not in (None, session.compute):
            session.close()
            raise BackendError(
                f"the engine computes in {session.compute}, not in {compute}; build another with --compute {compute}"
            )
        return session

    return open_engine


BACKENDS: dict[str, Callable[..., Session]] = {
    "tensorrt": _engine("tensorrt"),
    "tensorrt-rtx": _engine("tensorrt-rtx"),
    "onnxruntime-cuda": _onnxruntime_cuda,
    "onnxruntime": _onnxruntime,
    "torch": _torch,
}
"""By name, the fastest first: the order in which ``auto`` tries them."""


def load(
    bundle: str | Path,
    backend: str = "auto",
    *,
    threads: int | None = None,
    chunk_size: int | None = None,
    exact: bool = False,
    compute: str | None = None,
    verify_hashes: bool = False,
    progress: Progress = silent,
) -> Session:
    """Open a bundle and return a session that is ready to take tokens.

    Args:
        bundle: directory that ``export`` wrote.
        backend: a name from ``BACKENDS``, or ``auto`` for the fastest that works; ``session.backend`` says which.
        threads: threads for one operator; by default one for each core that this process may use.
        chunk_size: tokens of a prompt that are run at once; by default what suits the backend.
        exact: multiply by int8 and int4 weights in float32 where the backend would round activations to int8.
        compute: type that a GPU computes in, ``fp16``, ``bf16`` or ``fp32``; by default the bundle's own 16-bit type,
            or else bf16 (fp16 on ``onnxruntime-cuda``). A CPU computes in fp32.
        verify_hashes: hash the weights even if their size and time are as recorded.
        progress: told of bytes hashed, and of weights laid out anew.

    Raises:
        BundleError: the bundle is damaged.
        InputError: more threads than could be of use.
        BackendError: the backend is unknown, not installed, or refuses the model.
        EngineError: there is no engine of the bundle, or it does not fit what is here.
    """
    opened = Bundle.open(bundle, verify_hashes=verify_hashes, progress=progress)
    options: dict[str, Any] = {"threads": threads, "exact": exact, "compute": compute, "progress": progress}
    if chunk_size is not None:
        options["chunk_size"] = chunk_size
    return open_session(opened, backend, **options)


def open_session(bundle: Bundle, backend: str = "auto", **options: Any) -> Session:
    """Return a session for a bundle that is already open; otherwise as ``load``."""
    check_threads(options.get("threads"))  # also where a backend has no use for them
    text = TextFiles.load(bundle.directory, bundle.config)  # small files first: a model may take a minute
    if backend == "auto":
        session = _first_that_works(bundle, options)
    elif backend in BACKENDS:
        session = BACKENDS[backend](bundle, **options)
    else:
        raise BackendError(f"no backend is called {backend!r}; there are {', '.join(BACKENDS)} and auto")
    session.tokenizer = text.tokenizer
    session.end_token_ids = text.generation.end_token_ids
    session.chat_end_token_ids = text.generation.chat_end_token_ids
    session.chat_sampling = text.generation.sampling
    return session


def _first_that_works(bundle: Bundle, options: dict[str, Any]) -> Session:
    reasons = []
    for name, make in BACKENDS.items():
        try:
            return make(bundle, **options)
        except (BackendError, EngineError) as error:
            reasons.append(f"{name}: {error}")
    raise BackendError(f"no backend works here ({'; '.join(reasons)})")
