"""Rows for each layer under one total: sharing them out, and what was measured for a bundle.

    engines/cache-budgets/budgets.json          what ``gta-edge calibrate-cache`` found, in the bundle
    engines/cache-budgets/cache_budgets.json    its record, as every artifact has one (``formats.artifacts``)

The first of these may be copied elsewhere and given by name. It says itself which model it is of.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gta_edge.errors import InputError
from gta_edge.formats.artifacts import RefusedError, made_from, new_artifact, open_artifact, write_record
from gta_edge.formats.bundle import Bundle
from gta_edge.support.json_files import parse_json, read_json
from gta_edge.support.ownership import ARTIFACTS
from gta_edge.support.text import brief, one_line, printable

__all__ = [
    "FILE",
    "PLACE",
    "LayerBudgets",
    "budgets_output",
    "has_budgets",
    "read_budgets",
    "shared_out",
    "write_budgets",
]

PLACE = f"{ARTIFACTS}/cache-budgets"
FILE, _RECORD = "budgets.json", "cache_budgets.json"

_FORMAT, _FORMAT_VERSION = "gta-edge-cache-budgets", 1
_MAX_BYTES = 2**20
_MAX_ROWS = 2**31


@dataclass(frozen=True)
class LayerBudgets:
    """How many rows each layer of a model should have, in proportion.

    Attributes:
        rows: of each layer, where the cost was measured; at least 1.
        measured: how, and what each layer costs: JSON, for people.
    """

    rows: tuple[int, ...]
    measured: Mapping[str, Any] = field(default_factory=dict)


def shared_out(total: int, shares: Sequence[float], least: int) -> npt.NDArray[np.int64]:
    """Share out rows among layers, as near in proportion as whole numbers come.

    Args:
        total: rows of all layers together; ``least`` for each of them at least.
        shares: of the layers, in any unit.
        least: rows of each layer.

    Returns:
        int64 [L], whose sum is ``total``. Of rows that are left over by rounding down, the layers with the largest
        remainder have one more, of equal ones the first.
    """
    weights = np.asarray(shares, np.float64)
    exact = np.full(len(weights), float(least))
    free = np.ones(len(weights), np.bool_)
    while free.any():
        rest = total - least * int((~free).sum())
        wanted = weights[free].sum()
        exact[free] = rest * weights[free] / wanted if wanted else rest / free.sum()
        short = free & (exact < least)
        if not short.any():
            break
        exact[short] = least
        free &= ~short
    rows = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(-(exact - rows), kind="stable")
    rows[order[: total - int(rows.sum())]] += 1
    return rows


# --- files -----------------------------------------------------------------------------------------------------------


def budgets_output(bundle: Bundle, *, force: bool = False) -> AbstractContextManager[Path]:
    """Return a context manager of the directory to write a bundle's budgets into, as ``new_artifact`` does.

    Budgets that cannot be used here are replaced in any case.

    Raises:
        OutputError: there are some already and not ``force``, or the bundle cannot be written to.
    """
    return new_artifact(bundle, PLACE, force=force or not has_budgets(bundle))


def write_budgets(directory: Path, bundle: Bundle, budgets: LayerBudgets) -> None:
    """Write a bundle's budgets and their record.

    Args:
        directory: as ``budgets_output`` yields it.
        bundle: what they were measured on.
        budgets: one number for each of its layers.
    """
    document = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "made_from": made_from(bundle),
        "budgets": list(budgets.rows),
        "measured": dict(budgets.measured),
    }
    (directory / FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    write_record(directory, _RECORD, {"made_from": document["made_from"]})


def has_budgets(bundle: Bundle) -> bool:
    """Tell whether a bundle has budgets of its own that can be used."""
    try:
        read_budgets(bundle)
    except InputError:
        return False
    return True


def read_budgets(bundle: Bundle, path: str | Path | None = None) -> LayerBudgets:
    """Return the budgets that were measured for a bundle.

    Args:
        bundle: they have to be of this one.
        path: the file; by default what ``write_budgets`` has left in the bundle.

    Raises:
        InputError: there are none, they are of another model, or the file is none of budgets.
    """
    command = f"gta-edge calibrate-cache {shlex.quote(str(bundle.directory))} --text FILE"  # replaces what is unusable
    if path is not None:
        command += " --force"  # the bundle may have budgets of its own
        name = printable(str(path))
        document = read_json(Path(path), InputError, "give a file that calibrate-cache wrote", max_bytes=_MAX_BYTES)
    else:
        name = printable(str(bundle.directory / PLACE / FILE))
        try:
            found = open_artifact(bundle.directory, PLACE, _RECORD, read=(FILE,), verify_hashes=True)
            document = parse_json(found.read[FILE])
        except RefusedError as refused:
            said = "there are no budgets" if refused.kind == "absent" else f"the budgets are not used ({refused})"
            raise InputError(f"{name}: {said}", f"run: {command}") from refused
        except ValueError as error:
            raise InputError(f"{name}: is not valid JSON ({one_line(error)})", f"run: {command}") from error
    return _parsed(bundle, name, document, command)


def _parsed(bundle: Bundle, name: str, document: Any, command: str) -> LayerBudgets:
    remedy = f"run: {command}"
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise InputError(f"{name}: holds no budgets of a cache (no format {_FORMAT!r})", remedy)
    if document.get("format_version") != _FORMAT_VERSION:
        found = brief(document.get("format_version"))
        raise InputError(f"{name}: format_version is {found}; expected {_FORMAT_VERSION}", remedy)
    if document.get("made_from") != made_from(bundle):
        raise InputError(f"{name}: the budgets are of another model than {printable(str(bundle.directory))}", remedy)
    rows, layers = document.get("budgets"), bundle.config.num_hidden_layers
    if not isinstance(rows, list) or len(rows) != layers:
        raise InputError(f"{name}: budgets is {brief(rows)}; expected a list of {layers} numbers", remedy)
    if not all(type(entry) is int and 1 <= entry <= _MAX_ROWS for entry in rows):
        raise InputError(f"{name}: budgets is {brief(rows)}; expected whole numbers of at least 1", remedy)
    measured = document.get("measured")
    return LayerBudgets(tuple(rows), measured if isinstance(measured, dict) else {})
