"""The backends that there are, and how one is made from a bundle.

To add one, write a folder beside ``onnxruntime``, ``tensorrt`` and ``torch``: a ``Session``, and in ``backend.py`` the
descriptor that says what the backend is called, needs and can do. Then enter the descriptor in ``BACKENDS``, and its
name in ``cli/choices.py``, which a test holds to this table. Commands, plans, benchmarks and checks iterate over it and
compare no names.

Importing this module loads no library, and neither numpy nor the sessions.
"""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gta_edge.errors import (
    BackendError,
    BundleError,
    CheckpointError,
    ConfigError,
    GtaEdgeError,
    InputError,
)
from gta_edge.runtime.backend import Backend
from gta_edge.runtime.onnxruntime.backend import ONNXRUNTIME, ONNXRUNTIME_CUDA
from gta_edge.runtime.tensorrt.backend import TENSORRT, TENSORRT_RTX
from gta_edge.runtime.torch.backend import TORCH
from gta_edge.support.choices import unknown
from gta_edge.support.progress import Progress, silent
from gta_edge.support.text import brief, one_line

if TYPE_CHECKING:
    from gta_edge.formats.bundle import Bundle
    from gta_edge.runtime.cache_policies.base import CachePolicy
    from gta_edge.runtime.session import Session

__all__ = ["BACKENDS", "OF_THE_MODEL", "check_backend", "fastest_on", "load", "open_session", "reason_of"]

_log = logging.getLogger(__name__)

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        TENSORRT,
        TENSORRT_RTX,
        ONNXRUNTIME_CUDA,
        ONNXRUNTIME,
        TORCH,
    )
}
"""By name, the fastest first: the order in which ``auto`` tries them."""

OF_THE_MODEL = (BundleError, CheckpointError, ConfigError, InputError)
"""Errors that no other backend helps against: of the files, or of what was asked for."""

_MAX_REASON = 200
_MAX_REMEDY = 300  # a longer one is left out: a command that is cut does something else


def fastest_on(device: str) -> Backend:
    """Return the fastest backend that is made for a device, ``cpu`` or ``gpu``: the one that plans are for."""
    return next(backend for backend in BACKENDS.values() if backend.device == device)


def load(
    bundle: str | Path,
    backend: str = "auto",
    *,
    threads: int | None = None,
    chunk_size: int | None = None,
    exact: bool = False,
    compute: str | None = None,
    cache_dtype: str | None = None,
    cache: CachePolicy | None = None,
    trees: bool = False,
    verify_hashes: bool = False,
    progress: Progress = silent,
) -> Session:
    """Open a bundle and return a session that is ready to take tokens.

    Args:
        bundle: directory that ``export`` wrote.
        backend: a name from ``BACKENDS``, or ``auto`` for the fastest that works; ``session.backend`` says which, and
            ``session.skipped`` which others are there and did not work, and why.
        threads: threads for one operator; by default one for each core that this process may use.
        chunk_size: tokens of a prompt that are run at once; by default what suits the backend.
        exact: multiply by int8 and int4 weights in float32 where the backend would round activations to int8.
        compute: type that a GPU computes in, ``fp16``, ``bf16`` or ``fp32``; by default the bundle's own 16-bit type,
            or else bf16 (fp16 on ``onnxruntime-cuda``). A CPU computes in fp32.
        cache_dtype: type that keys and latents are cached in; by default the type to compute in, or what an engine was
            built with. ``onnxruntime`` takes ``int8`` too; ``torch`` takes ``int8``, ``fp8``, ``int4`` and ``int4v2``,
            for any of which an engine of ``tensorrt`` may have been built.
        cache: policy that says which rows of the KV cache stay (``gta_edge.runtime.cache_policies.policy``), so that it
            takes the same memory however long the text; by default every token stays.
        trees: whether the session can hold trees of tokens (``Session.tree``); not with a policy, nor with a cache in
            ``int4`` or ``int4v2``.
        verify_hashes: hash the weights even if their size and time are as recorded.
        progress: told of bytes hashed, and of weights repacked.

    Raises:
        BundleError: the bundle is damaged.
        InputError: more threads than could be of use, or a cache policy that makes no sense for the model, or trees
            beside one.
        BackendError: the backend is unknown, not installed, or refuses the model, the cache policy or trees.
        EngineError: there is no engine of the bundle, or it does not fit what is here.
    """
    from gta_edge.formats.bundle import Bundle

    options: dict[str, Any] = {"threads": threads, "exact": exact, "compute": compute, "progress": progress}
    options["cache_dtype"] = cache_dtype
    if chunk_size is not None:
        options["chunk_size"] = chunk_size
    if cache is not None:
        options["cache"] = cache
    if trees:
        options["trees"] = True
    while True:
        opened = Bundle.open(bundle, verify_hashes=verify_hashes, progress=progress)
        session = open_session(opened, backend, **options)
        if not opened.was_replaced:
            return session
        session.close()  # what it read may be of the bundle that is there now, and was not checked


def open_session(bundle: Bundle, backend: str = "auto", **options: Any) -> Session:
    """Return a session for a bundle that is already open; otherwise as ``load``."""
    from gta_edge.formats.text_files import TextFiles
    from gta_edge.support.cores import check_threads

    check_threads(options.get("threads"))  # also where a backend has no use for them
    text = TextFiles.load(bundle.directory, bundle.config)  # small files first: a model may take a minute
    if options.get("cache") is not None:
        options["cache"] = _policy(options["cache"]).for_bundle(bundle)
    if backend == "auto":
        session = _first_that_works(bundle, options)
    else:
        check_backend(backend, ("auto",))
        session = BACKENDS[backend].open(bundle, **options)
    session.bundle_hash = bundle.hash
    session.tokenizer = text.tokenizer
    session.end_token_ids = text.generation.end_token_ids
    session.chat_end_token_ids = text.generation.chat_end_token_ids
    session.chat_sampling = text.generation.sampling
    return session


def _policy(cache: object) -> CachePolicy:
    """Return what was given as a cache policy, if it is one."""
    from gta_edge.runtime.cache_policies.base import CachePolicy

    if not isinstance(cache, CachePolicy):
        raise InputError(
            f"cache is {brief(cache)}; expected a cache policy",
            'make one: gta_edge.runtime.cache_policies.policy("window", rows=1024)',
        )
    return cache


def check_backend(name: str, more: tuple[str, ...] = ()) -> None:
    """Refuse the name of a backend that there is not.

    Args:
        name: as it was given.
        more: other names that are allowed.

    Raises:
        BackendError: it is unknown; those that there are.
    """
    if name not in (*BACKENDS, *more):  # which any object may be asked of
        raise BackendError(*unknown("no backend is called {}; there are {}", name, (*BACKENDS, *more)))


def _first_that_works(bundle: Bundle, options: dict[str, Any]) -> Session:
    """Try backends in order; whatever one of them dies of is no reason not to try the next."""
    skipped: dict[str, str] = {}
    absent: dict[str, str] = {}
    for name, backend in BACKENDS.items():
        session, reason = _tried(backend, bundle, options)
        if session is None:
            if backend.is_here(bundle):
                gc.collect()  # what was loaded so far goes before the next one comes
                skipped[name] = reason
            else:
                absent[name] = reason
            continue
        session.skipped = skipped
        for other, why in skipped.items():
            _log.warning("%s is there and was passed over for %s: %s", other, name, why)
        return session
    reasons = "; ".join(f"{name}: {reason}" for name, reason in (skipped or absent).items())
    others = f"; not here: {', '.join(absent)}" if skipped and absent else ""
    raise BackendError(f"no backend works here ({reasons}{others})", "run `gta-edge doctor`")


def _tried(backend: Backend, bundle: Bundle, options: dict[str, Any]) -> tuple[Session | None, str]:
    """Return a session, or why there is none; in a function of its own, which an error's traceback does not outlive."""
    try:
        return backend.open(bundle, **options), ""
    except OF_THE_MODEL:
        raise
    except Exception as error:  # a library's own errors have no common base, and a full GPU is some of them
        return None, reason_of(error)


def reason_of(error: Exception) -> str:
    """Return in one line of bounded length why a backend does not work."""
    if isinstance(error, GtaEdgeError):
        problem, remedy = one_line(error.problem, _MAX_REASON), error.remedy or ""
        return f"{problem}; {one_line(remedy)}" if 0 < len(remedy) <= _MAX_REMEDY else problem
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, OSError) and error.filename is not None:
        return one_line(f"{error.filename}: {error.strerror or error}", _MAX_REASON)
    return one_line(f"{type(error).__name__}: {error}", _MAX_REASON)
