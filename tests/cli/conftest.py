"""Commands that fail."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.commands import Result, listing

Command = Callable[..., Result]


@pytest.fixture
def failing(command: Command, tmp_path: Path) -> Callable[..., str]:
    """Run a command that fails, in an empty working directory; nothing may appear or vanish, there or beside it."""

    def run(*arguments: object) -> str:
        before = listing(tmp_path)
        message = command(*arguments).error
        assert listing(tmp_path) == before
        return message

    return run
