"""Writes ``docs/python.md``, the page of the Python API, from signatures and docstrings.

    python scripts/api_page.py

A test holds the page to them.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gta_edge
from gta_edge import errors
from gta_edge.export.pipeline import Export
from gta_edge.model.model_config import CacheSpec, ModelConfig
from gta_edge.plugins import register
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.cache_policies.base import CachePolicy, Decision, Rows
from gta_edge.runtime.generation.answers import Alternative, Answers
from gta_edge.runtime.generation.loop import Generation
from gta_edge.runtime.generation.sampling import Sampling
from gta_edge.runtime.saved_cache import SavedCache
from gta_edge.runtime.session_exports import SessionExports
from gta_edge.runtime.token_tree import TokenTree

PAGE = Path(__file__).parents[1] / "docs" / "python.md"

INTRODUCTION = """\
# Python API

Made by `python scripts/api_page.py` from the docstrings: change those, not this page.

```python
import numpy as np
import gta_edge

gta_edge.export_model("checkpoint", "bundle", precision="int4")
with gta_edge.load("bundle", backend="onnxruntime") as session:
    for piece in gta_edge.generate(session, "def main():", max_new_tokens=64):
        print(piece, end="", flush=True)
    session.reset()
    ids = np.array([[5, 6, 7], [8, 9, 0]])  # two sequences, the second one token shorter
    logits = session.forward(ids, lengths=np.array([3, 2]))  # float32 [2, V]: after each sequence's last token
    session.truncate(1)  # forget all but the first token of each
```

`import gta_edge` loads neither torch, onnx, onnxruntime nor tensorrt; what needs them imports them when it is used. In
shapes, B is the number of sequences (rows of a batch), T of new tokens, V the vocabulary, P the maximum context.
"""

SECTIONS: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = (
    (
        "Functions",
        (
            ("gta_edge.export_model", gta_edge.export_model),
            ("gta_edge.load", gta_edge.load),
            ("gta_edge.generate", gta_edge.generate),
            ("gta_edge.preset", gta_edge.preset),
            ("gta_edge.runtime.cache_policies.policy", policy),
            ("gta_edge.plugins.register", register),
        ),
    ),
    (
        "Sessions",
        (
            ("gta_edge.Session", gta_edge.Session),
            ("gta_edge.runtime.token_tree.TokenTree", TokenTree),
            ("gta_edge.runtime.session_exports.SessionExports", SessionExports),
            ("gta_edge.Conversation", gta_edge.Conversation),
            ("gta_edge.runtime.saved_cache.SavedCache", SavedCache),
        ),
    ),
    (
        "Cache policies of one's own",
        (
            ("gta_edge.runtime.cache_policies.base.CachePolicy", CachePolicy),
            ("gta_edge.runtime.cache_policies.base.Rows", Rows),
            ("gta_edge.runtime.cache_policies.base.Decision", Decision),
        ),
    ),
    (
        "What the functions take and return",
        (
            ("gta_edge.export.pipeline.Export", Export),
            ("gta_edge.runtime.generation.loop.Generation", Generation),
            ("gta_edge.runtime.generation.answers.Answers", Answers),
            ("gta_edge.runtime.generation.answers.Alternative", Alternative),
            ("gta_edge.runtime.generation.sampling.Sampling", Sampling),
        ),
    ),
    (
        "Model configs",
        (
            ("gta_edge.model.config.ModelConfig", ModelConfig),
            ("gta_edge.GTAConfig", gta_edge.GTAConfig),
            ("gta_edge.GQAConfig", gta_edge.GQAConfig),
            ("gta_edge.model.config.CacheSpec", CacheSpec),
        ),
    ),
)

_HEADING = re.compile(r"(Args|Attributes|Raises|Returns):")
_ENTRY = re.compile(r"^(\w+): (.*)$", re.DOTALL)


def page() -> str:
    """Return the page."""
    parts = [INTRODUCTION]
    for title, members in SECTIONS:
        parts.append(f"## {title}\n")
        for name, member in members:
            parts.append(f"### `{name}`\n")
            parts += class_parts(member) if isinstance(member, type) else function_parts(member)
    parts.append("## Errors\n")
    parts.append(error_table())
    return "\n".join(parts)


# --- functions and classes -----------------------------------------------------------------------------------------


def function_parts(function: Callable[..., Any]) -> Iterator[str]:
    """Signature and docstring."""
    yield f"```python\n{signature(function.__name__, function)}\n```\n"
    yield documentation(function)


def class_parts(cls: type) -> Iterator[str]:
    """Signature where people make one, docstring, attributes, and its own public methods and properties."""
    if not inspect.isabstract(cls) and "__dataclass_fields__" in vars(cls):
        yield f"```python\n{signature(cls.__name__, cls)}\n```\n"
    yield documentation(cls)
    entries = [f"- `{name}`: {text}" for name, text in (*attributes(cls), *properties(cls))]
    if entries:
        yield "**Members**\n\n" + "\n".join(entries) + "\n"
    for name, member in vars(cls).items():
        function = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
        if inspect.isfunction(function) and function.__doc__ and not name.startswith("_"):
            yield f"#### `{cls.__name__}.{name}`\n"
            yield f"```python\n{signature(name, function)}\n```\n"
            yield documentation(function)


def attributes(cls: type) -> Iterator[tuple[str, str]]:
    """Annotated attributes with a docstring below them."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    for entry, below in zip(definition.body, definition.body[1:], strict=False):
        if not (isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            yield entry.target.id, joined(str(below.value.value))


def properties(cls: type) -> Iterator[tuple[str, str]]:
    """Its own public properties; one that only fills in an abstract one says nothing of its own."""
    for name, member in vars(cls).items():
        if isinstance(member, property) and member.__doc__ and not name.startswith("_"):
            yield name, joined(member.__doc__)


def signature(name: str, function: Callable[..., Any]) -> str:
    """A call with its parameters, in one line where that fits."""
    found = inspect.signature(function)
    parameters = [parameter for key, parameter in found.parameters.items() if key != "self"]
    words: list[str] = []
    for position, parameter in enumerate(parameters):
        before = parameters[position - 1].kind if position else None
        if parameter.kind is parameter.KEYWORD_ONLY and before is not parameter.KEYWORD_ONLY:
            words.append("*")
        words.append(described(parameter))
    returned = "" if isinstance(function, type) else f" -> {found.return_annotation}"
    line = f"{name}({', '.join(words)}){returned}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {word},\n" for word in words) + f"){returned}"


def described(parameter: inspect.Parameter) -> str:
    """Name, type and default of a parameter."""
    text = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "") + parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {parameter.annotation}"
    if parameter.default is parameter.empty:
        return text
    shown = getattr(parameter.default, "__name__", repr(parameter.default))
    return f"{text} = {'...' if shown.startswith('<') else shown}"


# --- docstrings ----------------------------------------------------------------------------------------------------


def documentation(member: Any) -> str:
    """A docstring in Google's form, as Markdown."""
    parts: list[str] = []
    for heading, body in blocks(inspect.cleandoc(member.__doc__)):
        if not heading:
            parts.append(body + "\n")
        elif heading == "Returns":
            parts.append(f"**Returns** {joined(body)}\n")
        else:
            entries = "\n".join(f"- {entry}" for entry in section_entries(body))
            parts.append(f"**{heading}**\n\n{entries}\n")
    return "\n".join(parts)


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Parts of a docstring: its text under no heading, and its sections, which are indented below theirs."""
    heading, lines = "", list[str]()
    for line in text.splitlines():
        starts = _HEADING.fullmatch(line)
        if starts or (heading and line and not line.startswith(" ")):
            yield from [(heading, "\n".join(lines).strip("\n"))] if lines else []
            heading, lines = starts[1] if starts else "", [] if starts else [line]
        else:
            lines.append(line)
    yield heading, "\n".join(lines).strip("\n")


def section_entries(body: str) -> Iterator[str]:
    """Entries of a section, each with its name as code."""
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(body)):
        match = _ENTRY.match(joined(entry))
        yield f"`{match[1]}`: {match[2]}" if match else joined(entry)


def joined(text: str) -> str:
    """Text as one line: what Markdown makes of it anyway."""
    return " ".join(text.split())


def error_table() -> str:
    """Every error, by what it says of itself."""
    names = [name for name in errors.__all__ if name != "GtaEdgeError"]
    rows = "\n".join(f"| `{name}` | {joined(getattr(errors, name).__doc__)} |" for name in names)
    table = f"| error | |\n|---|---|\n{rows}\n"
    base = documentation(gta_edge.GtaEdgeError)
    return f"### `gta_edge.GtaEdgeError`\n\n{base}\nDerived from it, all in `gta_edge`:\n\n{table}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
