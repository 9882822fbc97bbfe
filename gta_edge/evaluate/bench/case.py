"""A bundle on a backend, as the benchmark sees it: its process while there is one, and what it said."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gta_edge.errors import BackendError, GtaEdgeError
from gta_edge.evaluate.bench.agreement import Answers
from gta_edge.evaluate.bench.process import Worker, temporary_files
from gta_edge.evaluate.bench.targets import Target
from gta_edge.formats.bundle import Bundle
from gta_edge.model.kv_cache import bytes_per_token

__all__ = ["Case"]

Document = dict[str, Any]


@dataclass(eq=False)
class Case:
    """One bundle on one target. Its process is started when it is first asked, and again after it was put away.

    Attributes:
        name: the bundle, as it was given.
        bundle: opened.
        target: backend and interpreter.
        environment: variables of its process.
        directory: what its process runs in.
        threads: for one operator; None for the backend's own choice.
        cache_dtype: type of the cache; None for the backend's own choice.
        cache: policy that says which rows of the cache stay, as ``Settings`` has it.
        speculate: whether prompt lookup is timed beside plain decoding.
        answers: so many to each prompt are timed beside it, where there are more than one.
        exact: multiply by integers in float32.
        opened: what the process said of its session; None before it was open.
        failure: why it cannot be asked any more.
        rounds: what it measured, by context.
    """

    name: str
    bundle: Bundle
    target: Target
    environment: dict[str, str]
    directory: Path
    threads: int | None = None
    cache_dtype: str | None = None
    cache: Mapping[str, Any] | None = None
    speculate: bool = False
    answers: int = 1
    exact: bool = False
    opened: Document | None = None
    failure: str | None = None
    rounds: dict[int, list[Document]] = field(default_factory=dict)
    _worker: Worker | None = None
    _last: Document = field(default_factory=dict)

    def open(self) -> None:
        """Start the process and load the bundle.

        The first load of a bundle may lower its graph, which takes memory that no later load takes: then it is loaded a
        second time, in a new process.

        Raises:
            GtaEdgeError: it cannot be measured; why.
        """
        if self._start().get("lowered"):  # another release may not say
            self.release()
            self._start()

    def check(self, prompt: Path, shape: tuple[int, int, int]) -> Answers:
        """Return the logits after a prompt and after each of the next greedy steps, ``shape`` [1 + steps, B, V].

        Raises:
            GtaEdgeError: the backend failed.
        """
        path = self.directory / "logits"
        answer = self._ask(do="check", prompt=str(prompt), steps=shape[0] - 1, logits=str(path))
        with temporary_files(self.directory):
            logits = np.fromfile(path, np.float32).reshape(shape)
            path.unlink()
        assert self.opened is not None  # it was asked
        compute = self.opened["compute"]
        quantised = answer["cache_bytes_per_token"] < bytes_per_token(self.bundle.config, compute)
        cache = self.opened.get("cache_dtype", "")  # another release may not say
        return Answers(logits, self.target.backend, compute, self.opened["rounds_activations"], quantised, cache)

    def measure(self, context: int, prompt: Path, new_tokens: int, *, warm_up: bool = True) -> None:
        """Add one round; see ``Settings.warm_up``.

        Raises:
            GtaEdgeError: the backend failed.
        """
        asked = {"speculate": self.speculate, "answers": self.answers}
        answer = self._ask(do="measure", prompt=str(prompt), new_tokens=new_tokens, warm_up=warm_up, **asked)
        self.rounds.setdefault(context, []).append(answer)

    @property
    def running(self) -> bool:
        """Whether there is a process, which holds the weights."""
        return self._worker is not None

    @property
    def needed_bytes(self) -> tuple[int, int]:
        """Bytes of host and GPU memory that it took last, or may take: its weights in float32."""
        if self._last:
            return int(self._last["peak_host_bytes"] or 0), int(self._last["gpu_bytes"] or 0)
        most = 4 * self.bundle.config.parameters
        return most, most if self.opened is None or self.opened["device"] == "gpu" else 0

    @property
    def gpu_free_bytes(self) -> int | None:
        """What its GPU had left when it was asked last."""
        return self._last.get("gpu_free_bytes")

    def release(self, *, patient: bool = True) -> None:
        """End the process, which frees its memory."""
        if self._worker:
            self._worker.close(patient=patient)  # interrupted here, it is still ours to end
            self._worker = None

    def _ask(self, **request: Any) -> Document:
        if self._worker is None:
            self._start()
        assert self._worker is not None
        try:
            answer = self._worker.ask(**request)
        except BackendError as error:
            self.failure = str(error)
            self.release()
            raise
        self._last = answer
        return answer

    def _start(self) -> Document:
        """Start the process and load the bundle into it."""
        target = self.target
        self._worker = Worker(target.python, self.environment, self.directory, target.arguments)
        try:
            self.opened = self._worker.ask(
                do="open",
                bundle=str(self.bundle.directory.resolve()),
                backend=self.target.backend,
                threads=self.threads,
                cache_dtype=self.cache_dtype,
                cache=None if self.cache is None else dict(self.cache),
                exact=self.exact,
                answers=self.answers,
                speculate=self.speculate,
            )
        except GtaEdgeError as error:
            self.failure = str(error)
            with suppress(OSError):
                self.release()
            raise
        return self.opened
