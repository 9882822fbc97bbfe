"""Cases of ``test_fuzz_graph``, run in a process of their own, which a case may end: crashed, stuck, out of memory.

    python -m tests.fuzz.graph_cases DIRECTORY CASE …

DIRECTORY has a bundle in each directory below ``bundles``. Of each case one line of JSON is written when it begins, and
one when it ended.
"""

import json
import os
import resource
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Message

from gta_edge.formats.bundle import MANIFEST, MODEL, Bundle
from gta_edge.graph.weights import read_stored
from gta_edge.runtime.onnxruntime.cuda_lower import cuda_graph
from gta_edge.runtime.onnxruntime.session import OnnxRuntimeSession
from gta_edge.runtime.tensorrt.lower import load_model, lower
from gta_edge.runtime.tensorrt.matmul_choice import calls_of
from tests.helpers.fuzz import ends_well, rng

MEMORY_BYTES = 6 * 2**30
ALL_PATHS_EVERY = 8
NUMBERS = [0, 1, -1, 2, 3, 7, 8, 16, 24, 64, 255, 2**16, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63)]
FLOATS = [0.0, -1.0, 1e-45, 3.4e38, float("inf"), float("-inf"), float("nan")]
TEXTS = [
    *(
        "",
        "x",
        "../x",
        "/dev/zero",
        ".",
        "model.onnx",
        "model.onnx.data",
        "\x1b[31m",
        "a\nb",
        "ü" * 300,
        "0",
        "-1",
        "9" * 30,
    ),
    *(
        "Loop",
        "If",
        "Scan",
        "Expand",
        "ConstantOfShape",
        "Tile",
        "MatMul",
        "Add",
        "Reshape",
        "Range",
        "Identity",
        "Shape",
    ),
    *("com.microsoft", "ai.onnx.ml", "gta", "GroupedLatentAttention", "MatMulNBits", "location", "offset", "length"),
    *("batch", "tokens", "capacity", "positions", "logits", "input_ids", "past_length", "past_key.0", "present_key.0"),
]


# --- damage ----------------------------------------------------------------------------------------------------------


class Damage:
    """Changes somewhere in a message: of a field, of an element, of what lies below."""

    def __init__(self, name: str, case: int, model: onnx.ModelProto) -> None:
        self.random = rng(name, case)
        self.names = [name for node in model.graph.node for name in (*node.input, *node.output)]
        self.names += [tensor.name for tensor in model.graph.initializer]
        self.done: list[str] = []
        for _ in range(self.random.choice([1, 1, 1, 2, 3])):
            part = self.random.choices(["node", "initializer", "value_info", "graph", ""], [50, 15, 10, 15, 10])[0]
            if part in ("graph", ""):
                self.somewhere(model.graph if part else model, part)
            else:
                self.repeated(getattr(model.graph, part), model.graph.DESCRIPTOR.fields_by_name[part], part)

    def somewhere(self, message: Message, path: str) -> None:
        """Change a field of a message, one that is set as a rule, or something within."""
        fields = message.DESCRIPTOR.fields if self.random.random() < 0.15 else [f for f, _ in message.ListFields()]
        if not fields:
            return
        field = self.random.choice(list(fields))
        path = f"{path}.{field.name}"
        if field.is_repeated:
            self.repeated(getattr(message, field.name), field, path)
        elif self.random.random() < 0.1:
            message.ClearField(field.name)
            self.done.append(f"clear {path}")
        elif field.message_type:
            self.somewhere(getattr(message, field.name), path)
        else:
            self.assign(message, field, path)

    def repeated(self, values: Any, field: Any, path: str) -> None:
        if not len(values) or self.random.random() < 0.05:
            self.append(values, field, path)
            return
        at, other = (self.random.randrange(len(values)) for _ in range(2))
        how = self.random.random()
        if how < 0.12:
            del values[at]
            self.done.append(f"delete {path}[{at}]")
        elif how < 0.2:
            self.append(values, field, path, values[at])
        elif how < 0.3:
            self.swap(values, at, other, path)
        elif field.message_type:
            self.somewhere(values[at], f"{path}[{at}]")
        else:
            values[at] = self.scalar(field, values[at])
            self.done.append(f"set {path}[{at}] = {values[at]!r:.60}")

    def append(self, values: Any, field: Any, path: str, value: Any = None) -> None:
        if field.message_type:
            made = values.add()
            if value is not None:
                made.CopyFrom(value)
            else:
                self.somewhere(made, path)
        else:
            values.append(self.scalar(field, None) if value is None else value)
        self.done.append(f"append to {path}")

    def swap(self, values: Any, at: int, other: int, path: str) -> None:
        if isinstance(values[at], Message):
            first, second = type(values[at])(), type(values[at])()
            first.CopyFrom(values[at])
            second.CopyFrom(values[other])
            values[at].CopyFrom(second)
            values[other].CopyFrom(first)
        else:
            values[at], values[other] = values[other], values[at]
        self.done.append(f"swap {path}[{at}] and [{other}]")

    def assign(self, message: Message, field: Any, path: str) -> None:
        setattr(message, field.name, self.scalar(field, getattr(message, field.name)))
        self.done.append(f"set {path} = {getattr(message, field.name)!r:.60}")

    def scalar(self, field: Any, old: Any) -> Any:
        """Another value for a field."""
        kind = field.cpp_type
        if kind == field.CPPTYPE_STRING and field.type == field.TYPE_BYTES:
            return self.bytes(old or b"")
        if kind == field.CPPTYPE_STRING:
            return self.random.choice(self.names if self.random.random() < 0.5 else TEXTS)
        if kind in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
            return self.random.choice(FLOATS)
        if kind == field.CPPTYPE_ENUM:
            return self.random.choice([value.number for value in field.enum_type.values])
        number = self.random.choice([*NUMBERS, (old or 0) + 1, (old or 0) - 1, (old or 0) * 2])
        if kind == field.CPPTYPE_INT32:
            return max(-(2**31), min(number, 2**31 - 1))
        if kind in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64):
            return abs(number) % 2**32
        return max(-(2**63), min(number, 2**63 - 1))

    def bytes(self, old: bytes) -> bytes:
        how = self.random.randrange(4)
        if how == 0:
            return old[: self.random.randrange(len(old) + 1)]
        if how == 1:
            return old + bytes(self.random.randrange(1, 9))
        return bytes(self.random.randrange(256) if self.random.random() < 0.2 else byte for byte in old) or b"x"


# --- a case ----------------------------------------------------------------------------------------------------------


def damaged(bundles: Path, case: int, directory: Path) -> list[str]:
    """Write a bundle with a damaged graph, whose manifest fits it; say what was done."""
    sources = sorted(path for path in bundles.iterdir() if path.is_dir())
    source = sources[case % len(sources)]
    shutil.copytree(source, directory)
    model = onnx.load(directory / MODEL, load_external_data=False)
    damage = Damage("graph", case, model)
    (directory / MODEL).write_bytes(model.SerializeToString())
    relist(directory)
    return [source.name, *damage.done]


def relist(directory: Path) -> None:
    """Make the manifest agree with the graph, whatever is in it."""
    manifest = json.loads((directory / MANIFEST).read_text())
    del manifest["sha256"]
    content = (directory / MODEL).read_bytes()
    manifest["files"][MODEL] |= {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    manifest["files"][MODEL]["mtime_ns"] = (directory / MODEL).stat().st_mtime_ns
    digest = sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (directory / MANIFEST).write_text(json.dumps(manifest | {"sha256": digest}))


def paths(directory: Path, scratch: Path) -> dict[str, Callable[[], object]]:
    """Every way on which a bundle's graph is read, by name."""

    def run() -> None:
        with OnnxRuntimeSession(Bundle.open(directory), threads=1, chunk_size=4, capacity_step=16) as session:
            session.forward(np.array([[1, 2, 3, 4, 5]]))
            session.forward(np.array([[6]]), all_logits=True)

    def engine(form: str, **options: Any) -> Callable[[], object]:
        at = scratch / form
        return lambda: lower(Bundle.open(directory), at, form=form, compute="fp16", capacity=16, **options)

    def cuda() -> None:
        cuda_graph(Bundle.open(directory), "fp16", scratch / "cuda.data", "cuda.data")

    def stored() -> None:
        bundle = Bundle.open(directory)
        for _ in read_stored(bundle.model_path, bundle.config):
            pass

    return {
        "stored weights": stored,
        "onnxruntime": run,
        "plugin form": engine("plugin", matmul="plugin"),
        "function form": engine("function", newer_ops=False),
        "CUDA form": cuda,
        "matmuls": lambda: calls_of(load_model(Bundle.open(directory))),
    }


def run_case(bundles: Path, case: int) -> dict[str, Any]:
    """Run a case on every path; return what was done, the ends, and what was no good end."""
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        done = damaged(bundles, case, scratch / "bundle")
        before = {path.name for path in scratch.parent.iterdir()}
        ends, faults = {}, {}
        for name, call in paths(scratch / "bundle", scratch).items():
            # all paths read with one reader, and what it refuses once it refuses again: looked at now and then
            if any(ends.values()) and case % ALL_PATHS_EVERY:
                break
            try:
                error = ends_well(call)
                ends[name] = "" if error is None else f"{type(error).__name__}: {error}"
            except BaseException:  # whatever it is, it is to be reported
                faults[name] = traceback.format_exc()
        if {path.name for path in scratch.parent.iterdir()} != before:
            faults["files"] = "something was written outside of the bundle"
    return {"case": case, "damage": done, "ends": ends, "faults": faults}


def main(directory: Path, cases: list[int]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    report, said = os.fdopen(os.dup(1), "w"), os.open(directory / "said", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(said, stream)
    (directory / "scratch").mkdir(exist_ok=True)
    tempfile.tempdir = str(directory / "scratch")
    for case in cases:
        print(json.dumps({"begins": case}), file=report, flush=True)
        os.ftruncate(said, 0)
        found = run_case(directory / "bundles", case)
        sys.stdout.flush()
        sys.stderr.flush()
        if os.fstat(said).st_size:
            found["faults"]["said"] = os.pread(said, 2000, 0).decode(errors="replace")
        print(json.dumps(found), file=report, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), list(map(int, sys.argv[2:])))
