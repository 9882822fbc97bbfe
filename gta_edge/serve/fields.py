"""Fields of a JSON object: which there may be and of what type, checked by a table. What is not in it is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from gta_edge.serve.request_error import RequestError
from gta_edge.support.text import brief, one_line

__all__ = [
    "Check",
    "anything",
    "either",
    "flag",
    "json_object",
    "list_of",
    "mapping",
    "number",
    "one_of",
    "read",
    "text",
]
__all__ += ["whole"]

Check = Callable[[Any, str], Any]
"""Takes a value and the name of its field; returns the value, or raises ``RequestError``."""


def json_object(body: bytes) -> dict[str, Any]:
    """Return the object that a request's body holds.

    Raises:
        RequestError: it is no JSON (RFC 8259: no NaN, no infinity), or no object.
    """
    try:
        content = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # of numbers with thousands of digits too
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise RequestError(400, f"the body is not JSON ({reason})", "send one JSON object, in UTF-8") from error
    if not isinstance(content, dict):
        raise RequestError(400, f"the body is {brief(content)}", "expected a JSON object")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def read(content: Mapping[str, Any], fields: Mapping[str, Check], within: str = "") -> dict[str, Any]:
    """Return the fields of an object that have a value, checked; null is no value.

    Args:
        content: the object.
        fields: what it may have, by name.
        within: name of the field that it is the value of.

    Raises:
        RequestError: a field that is unknown, or of another type.
    """
    found = {}
    for name, value in content.items():
        where = f"{within}.{name}" if within else name
        if name not in fields:
            known = ", ".join(fields)
            raise RequestError(
                400,
                f"the field {brief(where)} is unknown",
                f"there are {known}",
                param=where[:200],
                code="unknown_field",
            )
        if value is not None:
            found[name] = fields[name](value, where)
    return found


def _wrong(value: Any, name: str, expected: str) -> RequestError:
    return RequestError(400, f"{name} is {brief(value)}", f"expected {expected}", param=name, code="invalid_value")


def anything(value: Any, name: str) -> Any:
    """Accept a value of any type."""
    return value


def text(value: Any, name: str) -> str:
    """Accept text."""
    if not isinstance(value, str):
        raise _wrong(value, name, "text")
    return value


def flag(value: Any, name: str) -> bool:
    """Accept true and false."""
    if not isinstance(value, bool):
        raise _wrong(value, name, "true or false")
    return value


def whole(low: int, high: int | None = None) -> Check:
    """Accept whole numbers in a range."""
    expected = f"a whole number from {low} {'up' if high is None else f'to {high}'}"

    def check(value: Any, name: str) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON knows numbers only
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            raise _wrong(value, name, expected)
        return value

    return check


def number(low: float, high: float = math.inf) -> Check:
    """Accept finite numbers in a range."""
    expected = f"a number from {low:g} {'up' if high == math.inf else f'to {high:g}'}"

    def check(value: Any, name: str) -> float:
        try:
            fits = not isinstance(value, bool) and isinstance(value, (int, float)) and low <= float(value) <= high
            fits = fits and math.isfinite(float(value))
        except OverflowError:  # a whole number that is beyond a float
            fits = False
        if not fits:
            raise _wrong(value, name, expected)
        return float(value)

    return check


def one_of(*values: Any) -> Check:
    """Accept some values only."""
    expected = " or ".join(json.dumps(value) for value in values)

    def check(value: Any, name: str) -> Any:
        if not any(type(value) is type(allowed) and value == allowed for allowed in values):
            raise _wrong(value, name, expected)
        return value

    return check


def list_of(check: Check, least: int = 0, most: int | None = None) -> Check:
    """Accept lists, of a number of entries that are all accepted."""
    bounds = f"at least {least}" if most is None else f"{least} to {most}"

    def check_all(value: Any, name: str) -> list[Any]:
        if not isinstance(value, list) or len(value) < least or (most is not None and len(value) > most):
            raise _wrong(value, name, f"a list of {bounds} entries")
        return [check(entry, f"{name}[{i}]") for i, entry in enumerate(value)]

    return check_all


def mapping(check: Check, most: int) -> Check:
    """Accept objects with any names, of at most a number of values that are all accepted."""

    def check_all(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > most:
            raise _wrong(value, name, f"an object of at most {most} entries")
        return {key: check(entry, f"{name}.{key[:64]}") for key, entry in value.items()}

    return check_all


def either(expected: str, *checks: Check) -> Check:
    """Accept what any of several checks does."""

    def check(value: Any, name: str) -> Any:
        for each in checks:
            try:
                return each(value, name)
            except RequestError:
                continue
        raise _wrong(value, name, expected)

    return check
