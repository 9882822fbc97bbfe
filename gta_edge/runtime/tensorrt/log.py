"""What TensorRT says while it works, and how its objects are started, in one place for builds and for sessions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gta_edge.errors import BackendError
from gta_edge.plugins.plugin_base import take_failures
from gta_edge.support.text import one_line

__all__ = ["first_reason", "new_log", "started"]

_unusable: list[Any] = []
"""Objects whose start failed: freeing one ends the process (``tensorrt_lean`` 11.4, where the driver is too old)."""


def new_log(trt: Any) -> Any:
    """Return a logger for TensorRT that keeps errors, in ``errors``, and prints nothing: what matters is raised.

    What plugins had to say before is forgotten, so that it is not taken for the reason of what comes.

    Args:
        trt: the module.
    """
    take_failures()

    class Log(trt.ILogger):  # type: ignore[misc]  # the base class is known at run time only
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

    return Log()


def started(make: Callable[[Any], Any], log: Any, what: str) -> Any:
    """Return what ``make`` gives for a log: a ``Builder`` or a ``Runtime``, if it is of any use.

    Args:
        make: the class.
        log: a logger of ``new_log``.
        what: it is called.

    Raises:
        BackendError: CUDA cannot be started; with TensorRT's own words.
    """
    try:
        made = make(log)
    except TypeError:  # so the bindings say that there is none
        made = None
    if made is None or log.errors:
        if made is not None:
            _unusable.append(made)
        raise BackendError(f"TensorRT cannot start its {what} ({first_reason(log.errors)})", "run `gta-edge doctor`")
    return made


def first_reason(errors: list[str]) -> str:
    """Return what went wrong first, in one line: a plugin's words, which TensorRT does not pass on, or its own."""
    reasons = (*take_failures(), *errors)
    return next((one_line(reason) for reason in reasons if reason.strip()), "without a reason")
