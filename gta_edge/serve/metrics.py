"""What ``/metrics`` tells, in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gta_edge.libraries.optional import optional
from gta_edge.machine.power import power_watts

__all__ = ["Metrics"]

_FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

_TOTALS = {
    "prompt_tokens_total": "Tokens of prompts.",
    "cached_tokens_total": "Of these, those that were in the cache already.",
    "generation_tokens_total": "Tokens generated.",
    "drafted_tokens_total": "Tokens that were guessed, and run before they were known.",
    "accepted_tokens_total": "Of these, those that came.",
    "steps_total": "Steps of the model, each of a token of every running request.",
    "prompt_parts_total": "Parts of prompts that were read, each in a step.",
}
_NOW = {
    "requests_running": "Requests whose tokens are generated.",
    "requests_waiting": "Requests that wait for a slot.",
    "slots": "Requests that can run at a time.",
    "cache_rows_used": "Rows of the KV cache in use, a token of a sequence each.",
    "cache_rows": "Rows of the KV cache that there may be.",
    "cache_bytes": "Memory of the KV cache.",
    "kept_caches": "Texts that have ended and whose cache is kept for what begins like them.",
    "kept_cache_bytes": "Memory of those.",
}


class Metrics:
    """Counts requests and their times, and asks the scheduler for the rest when it is asked.

    Args:
        scheduler: returns the scheduler's figures.
    """

    def __init__(self, scheduler: Callable[[], Mapping[str, float]]) -> None:
        self._library = library = optional("prometheus_client", "serve")
        self._registry = library.CollectorRegistry()
        library.ProcessCollector(registry=self._registry)  # memory and computing time
        self._registry.register(_Figures(library, scheduler))
        self._requests = library.Counter(
            "gta_edge_requests", "Requests answered, by path and status.", ["path", "status"], registry=self._registry
        )
        self._first = self._histogram(
            "time_to_first_token_seconds", "From a request to its first token.", _FIRST_TOKEN_SECONDS
        )
        self._token = self._histogram("time_per_output_token_seconds", "Per token after the first.", _TOKEN_SECONDS)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Any:
        return self._library.Histogram(f"gta_edge_{name}", what, buckets=buckets, registry=self._registry)

    def answered(self, path: str, status: int) -> None:
        """Count a response."""
        self._requests.labels(path, str(status)).inc()

    def first_token(self, seconds: float) -> None:
        """Note how long an answer's first token took."""
        self._first.observe(seconds)

    def further_tokens(self, count: int, seconds: float) -> None:
        """Note how long an answer took from its first to its last token."""
        if count:
            self._token.observe(seconds / count)

    def text(self) -> tuple[bytes, str]:
        """Return all figures, and the type of that content."""
        content: bytes = self._library.generate_latest(self._registry)
        return content, str(self._library.CONTENT_TYPE_LATEST)


class _Figures:
    """What is read when it is asked for, as the library's registries take it."""

    def __init__(self, library: Any, scheduler: Callable[[], Mapping[str, float]]) -> None:
        self._families = library.metrics_core
        self._scheduler = scheduler

    def collect(self) -> Iterator[Any]:
        found = self._scheduler()
        for name, what in _TOTALS.items():
            if name in found:
                yield self._families.CounterMetricFamily(f"gta_edge_{name}", what, value=found[name])
        for name, what in _NOW.items():
            if name in found:
                yield self._families.GaugeMetricFamily(f"gta_edge_{name}", what, value=found[name])
        if (watts := power_watts()) is not None:
            yield self._families.GaugeMetricFamily("gta_edge_power_watts", "What the board draws.", value=watts)
