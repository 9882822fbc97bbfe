"""What is said where a backend cannot be used."""

from typing import Any

import pytest

from gta_edge.errors import BackendError


def message(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(BackendError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)
