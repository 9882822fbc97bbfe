"""What PyTorch's exports to ONNX have in common in one process."""

import functools
import sys


@functools.cache
def read_library_once() -> None:
    """Let onnxscript keep the signatures of its 500 functions, where it is loaded.

    PyTorch asks for all of them in every export, and each time their sources are read and parsed anew, which takes a
    third of the export.
    """
    for each in vars(sys.modules["onnxscript._internal.values"]).values():
        found = vars(each).get("function_ir") if isinstance(each, type) else None
        if isinstance(found, property) and found.fget is not None:
            each.function_ir = property(functools.cache(found.fget))
