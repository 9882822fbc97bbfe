"""Every error that the package raises on purpose.

    GtaEdgeError
    ├── ConfigError       a model config that is malformed, inconsistent or not supported
    ├── CheckpointError   a checkpoint directory that cannot be read, or does not fit its config
    ├── ExportError       an export that could not be made or did not pass its check
    ├── BundleError       a bundle that is damaged, too new, or not a bundle
    ├── BackendError      a backend that is unknown, missing or failed
    ├── EngineError       an engine that cannot be built, or was built for something else
    ├── CapacityError     more tokens or memory asked for than there is
    ├── InputError        ids, text or options that make no sense for this model
    └── OutputError       a result that cannot be written where it was asked for

A message is one line: what was found and what was expected, then what to do next.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "BundleError",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "EngineError",
    "ExportError",
    "GtaEdgeError",
    "InputError",
    "OutputError",
]


class GtaEdgeError(Exception):
    """Base of every error raised on purpose by gta_edge.

    Args:
        problem: what was found, and what was expected.
        remedy: what to do next; None where the problem says it.
    """

    def __init__(self, problem: str, remedy: str | None = None) -> None:
        super().__init__(problem, remedy)
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}" if self.remedy else self.problem


class ConfigError(GtaEdgeError):
    """A model config is malformed, inconsistent or not supported."""


class CheckpointError(GtaEdgeError):
    """A checkpoint cannot be read, or its tensors do not fit its config."""


class ExportError(GtaEdgeError):
    """An export could not be made, or its result did not pass the check."""


class BundleError(GtaEdgeError):
    """A bundle is damaged, of a newer format, or not a bundle at all."""


class BackendError(GtaEdgeError):
    """A backend is unknown, not installed, or failed while running."""


class EngineError(GtaEdgeError):
    """An engine cannot be built, or does not fit this machine or bundle."""


class CapacityError(GtaEdgeError):
    """More tokens or memory were asked for than there is room for."""


class InputError(GtaEdgeError):
    """Token ids, text or options make no sense for this model."""


class OutputError(GtaEdgeError):
    """A result cannot be written where it was asked for."""
