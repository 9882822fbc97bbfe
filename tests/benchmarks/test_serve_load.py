"""A service under a little load."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_what_is_measured(
    script: Callable[[str], ModuleType], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    serve_load = script("serve_load")
    arguments = ["serve_load.py", tiny_bundle, "--clients", "1,2", "--requests", "1", "--churn", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments), "--json"])
    serve_load.main()
    found = json.loads(capsys.readouterr().out)
    assert [(row["clients"], row["service"], row["requests"]) for row in found["rows"]] == [
        (1, "2 slots", 1),
        (1, "one at a time", 1),
        (2, "2 slots", 2),
        (2, "one at a time", 2),
    ]
    assert all(value > 0 for row in found["rows"] for value in row.values() if not isinstance(value, str))
    assert len(found["memory_bytes"]) == 21
    assert found["conversations"][0]["fit"] > found["conversations"][0]["gqa_fit"] > 0
    assert "| 2 | 2 slots |" in serve_load.table(found)
