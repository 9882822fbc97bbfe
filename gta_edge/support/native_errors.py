"""Errors of libraries in Rust and C: what they raise becomes ours, and what they print on the way stays unseen."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gta_edge.errors import GtaEdgeError
from gta_edge.support.text import one_line

__all__ = ["quiet_when_failing", "translated"]

_STDERR = 2
_turn = threading.Lock()


@contextmanager
def translated(translate: Callable[[str], GtaEdgeError]) -> Iterator[None]:
    """Turn whatever a library raises into our error, made from its message on one line."""
    try:
        yield
    except (GtaEdgeError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        raise translate(one_line(error)) from error


@contextmanager
def quiet_when_failing() -> Iterator[None]:
    """Hold back what is written to the process's stderr; give it out at the end, but not after an exception.

    A panic in Rust reports itself there before it becomes the exception that we translate. What other threads write
    meanwhile is held back as well.
    """
    with _turn:
        try:
            saved = os.dup(_STDERR)
        except OSError:  # there is none
            yield
            return
        try:
            held = os.memfd_create("stderr")
            try:
                os.dup2(held, _STDERR)
                try:
                    yield
                finally:
                    os.dup2(saved, _STDERR)
                if written := os.pread(held, os.fstat(held).st_size, 0):
                    os.write(_STDERR, written)
            finally:
                os.close(held)
        finally:
            os.close(saved)
