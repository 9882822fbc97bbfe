"""A graph and its weights in ONNX Runtime: where they lie, and what can go wrong with that.

ONNX Runtime maps weights from files of one folder, which takes the least memory. It refuses a file that has several
hard links or is a link out of that folder, as copies by links, package stores, container layers and the Hugging Face
cache have; and a graph may have weights in two places. Such files it is given in memory, mapped by us while it opens
the model: it copies what it needs of them. It takes all files of a model in one of the two ways.
"""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gta_edge.errors import BundleError
from gta_edge.formats.bundle import WEIGHTS, Bundle
from gta_edge.libraries.onnxruntime import WEIGHTS_FOLDER
from gta_edge.runtime.onnxruntime.lowered import PACKED
from gta_edge.support.files import bundle_file
from gta_edge.support.text import printable

__all__ = ["OpenModel", "model_files", "open_model"]


def model_files(bundle: Bundle, cached: str | None) -> dict[str, Path]:
    """Return the files that a graph for ONNX Runtime has its weights in, links followed, by what it calls them.

    Args:
        bundle: the model.
        cached: the directory, from the bundle's, of a cached form; None for a graph that has the bundle's alone.

    Raises:
        BundleError: the bundle's weights do not lie in it.
    """
    files = {WEIGHTS: bundle_file(bundle.directory, WEIGHTS)} if WEIGHTS in bundle.file_bytes else {}
    if cached is not None and (packed := bundle.directory / cached / PACKED).exists():
        files[f"{cached}/{PACKED}"] = packed
    return {name: path.resolve() for name, path in files.items() if path.stat().st_size}


class OpenModel:
    """An inference session, and the files that it has mapped.

    Attributes:
        session: ONNX Runtime's.
    """

    def __init__(self, session: Any, mapped: Mapping[Path, io.BufferedReader]) -> None:
        self.session = session
        self._mapped = mapped
        self._states = {path: _state(file) for path, file in mapped.items()}

    def check(self) -> None:
        """Raise BundleError if a file that is mapped was changed or cut short: what is read from it is something else.

        Cut short, reading it would end the process.
        """
        for path, file in self._mapped.items():
            if _state(file) != self._states[path]:
                raise BundleError(
                    f"{printable(str(path))}: was changed while it was in use",
                    "leave it as it is, and load the bundle again",
                )

    def close(self) -> None:
        """Give the session up."""
        self.session = None
        for file in self._mapped.values():
            file.close()
        self._mapped = {}


def open_model(
    onnxruntime: Any, graph: bytes, files: Mapping[str, Path], settings: Any, providers: list[Any]
) -> OpenModel:
    """Return an open model.

    Args:
        onnxruntime: the module.
        graph: the model, serialised.
        files: where the files lie that its weights are in, links followed, by what the graph calls them; none is empty.
        settings: the session's options; where the weights are is added.
        providers: of ONNX Runtime, with their options.

    Raises:
        OSError: a file cannot be read.
        Exception: whatever ONNX Runtime raises.
    """
    folder = _folder(files)
    opened: dict[Path, io.BufferedReader] = {}
    contents: list[mmap.mmap] = []
    try:
        if folder is not None:
            settings.add_session_config_entry(WEIGHTS_FOLDER, str(folder))
            opened = {path: path.open("rb") for path in files.values()}
        else:
            for path in files.values():
                with path.open("rb") as file:
                    contents.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            sizes = [len(each) for each in contents]
            settings.add_external_initializers_from_files_in_memory(list(files), contents, sizes)
        # without a fallback: it would say so on stdout, and there is no other provider to fall back to
        session = onnxruntime.InferenceSession(graph, settings, providers=providers, enable_fallback=0)
        return OpenModel(session, opened)
    except BaseException:
        for file in opened.values():
            file.close()
        raise
    finally:
        for content in contents:
            with suppress(BufferError):  # still referred to by an error on its way: closed with it
                content.close()


def _folder(files: Mapping[str, Path]) -> Path | None:
    """Return the one folder that ONNX Runtime takes all of the files from, None if there is none."""
    folders = set()
    for name, path in files.items():
        folder = Path(str(path).removesuffix(f"/{name}") or "/")
        own = folder / name == path and path.stat().st_nlink == 1 and path.resolve() == path and _is_utf8(folder)
        folders.add(folder if own else None)
    return folders.pop() if len(folders) == 1 else None


def _is_utf8(path: Path) -> bool:
    """Tell whether a path can be handed to ONNX Runtime as text."""
    try:
        str(path).encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8 are surrogates in Python
        return False
    return True


def _state(file: io.BufferedReader) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns
