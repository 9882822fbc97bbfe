"""Texts that every installation of the same Python has, for perplexity: prose and code.

Prose is the language reference that ``help()`` shows (``pydoc_data.topics``). Code is what the small example model was
not trained on (``examples/corpus.py``): calibration may use the rest of the standard library's sources.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

__all__ = ["code", "prose"]

EXAMPLES = Path(__file__).parents[1] / "examples"


def prose() -> str:
    """Return the topics of the language reference, in the order of their names."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def code(*, held_out: bool = True) -> str:
    """Return the sources of one part of the standard library: modules kept from training, or all others."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return "\n".join(importlib.import_module("corpus").read(held_out=held_out))
    finally:
        sys.path.remove(str(EXAMPLES))
