"""How a service is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """What the app of a service is told.

    Attributes:
        model: name of the model, as clients give it.
        api_keys: any of them opens the service; none leaves it open to all who reach it.
        local: whether it is reached from this machine only.
        sampling: options where a request leaves them open, by ``Sampling``'s names.
        max_tokens: of an answer, also where a request asks for more; None for as many as there is room for.
        max_body_bytes: of a request.
        max_requests: requests that are read or answered at a time.
        answer_seconds: after which an answer ends as it is.
        body_seconds: after which a request that has not arrived is given up.
    """

    model: str
    api_keys: tuple[bytes, ...] = field(default=(), repr=False)
    local: bool = True
    sampling: Mapping[str, float] = field(default_factory=dict)
    max_tokens: int | None = None
    max_body_bytes: int = 4 * 2**20
    max_requests: int = 80
    answer_seconds: float = 600.0
    body_seconds: float = 30.0
