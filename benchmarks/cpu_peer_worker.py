"""One measurement of a comparison with another engine, in a process of its own, so that its peak of memory is its own.

    python benchmarks/cpu_peer_worker.py '{"engine": "peer", "model": …}'

The interpreter of any engine runs it: it imports numpy and, when it is used, the engine. The last line on stdout is
a JSON object with the figures.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["measure"]

Ids = npt.NDArray[np.int32]

_SPECIAL_IDS = 1000  # ids below are not drawn: the peer takes a padding token in a prompt for no token
_WARM_UP_TOKENS = 8


class Engine(Protocol):
    """A loaded model that continues one prompt greedily."""

    def warm_up(self, ids: Ids) -> None:
        """Run a few tokens, and forget them."""

    def prefill(self, ids: Ids) -> None:
        """Read a prompt and choose the token after it."""

    def step(self) -> None:
        """Append the chosen token and choose the next."""

    @property
    def length(self) -> int:
        """Tokens that were read or chosen."""

    @property
    def cache_bytes(self) -> int | None:
        """Bytes of the cache; None where the engine does not say."""

    def close(self) -> None:
        """Give up the model."""


class Ours:
    """A bundle on the backend ``onnxruntime``."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import gta_edge
        from gta_edge.runtime.cache_policies import policy

        cache = policy(**spec["cache"]) if spec.get("cache") else None
        options = {"threads": spec["threads"], "cache_dtype": spec.get("cache_dtype"), "cache": cache}
        self._session = gta_edge.load(spec["model"], backend="onnxruntime", **options)
        self._token = 0
        self.policy_ms = 0.0
        if cache is not None:
            for name in ("prepare", "append"):  # all that a policy does, evictions included
                setattr(self._session._cache, name, self._counted(getattr(self._session._cache, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a call whose time is added to ``policy_ms``."""

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self.policy_ms += 1e3 * (time.perf_counter() - start)

        return timed

    def warm_up(self, ids: Ids) -> None:
        self.prefill(ids)
        self.step()
        self._session.reset()

    def prefill(self, ids: Ids) -> None:
        self._token = int(self._session.forward(ids[None])[0].argmax())

    def step(self) -> None:
        self.prefill(np.array([self._token], np.int32))

    @property
    def length(self) -> int:
        return int(self._session.length[0]) + 1

    @property
    def cache_bytes(self) -> int | None:
        return self._session.cache_bytes

    def close(self) -> None:
        self._session.close()


class Peer:
    """A model of onnxruntime-genai's builder on its CPU provider."""

    cache_bytes = None

    def __init__(self, spec: dict[str, Any]) -> None:
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before its libraries are loaded; the call below comes too late
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        onnxruntime_genai.disable_telemetry_events()
        config = onnxruntime_genai.Config(spec["model"])
        if "threads" in spec:  # otherwise as it comes
            threads = {"decoder": {"session_options": {"intra_op_num_threads": spec["threads"]}}}
            config.overlay(json.dumps({"model": threads, "search": {"chunk_size": spec["chunk_size"]}}))
        self._model = onnxruntime_genai.Model(config)
        self._capacity = spec["context"] + 1 + spec["new_tokens"]
        self._generator: Any = None

    def warm_up(self, ids: Ids) -> None:
        # in a generator of its own: after rewind_to(0) the prompt is not read in chunks
        self._start(ids, len(ids) + 2)
        self.step()
        self._generator = None

    def prefill(self, ids: Ids) -> None:
        self._start(ids, self._capacity)

    def step(self) -> None:
        self._generator.generate_next_token()

    @property
    def length(self) -> int:
        return int(self._generator.token_count())

    def _start(self, ids: Ids, capacity: int) -> None:
        params = self._genai.GeneratorParams(self._model)
        # min_length: random weights may choose the end token, and generation would end there
        params.set_search_options(max_length=capacity, min_length=capacity, do_sample=False)
        self._generator = self._genai.Generator(self._model, params)
        self._generator.append_tokens(ids)
        self._generator.generate_next_token()  # chooses from the prompt's logits, runs nothing

    def close(self) -> None:
        del self._generator, self._model


class LlamaCpp:
    """A GGUF file on llama.cpp's CPU backend, as its own programs run it."""

    cache_bytes = None

    def __init__(self, spec: dict[str, Any]) -> None:
        import llama_cpp

        self._library = llama_cpp
        self._silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silent, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            spec["model"].encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = spec["context"] + 1 + spec["new_tokens"]
        params.n_threads = params.n_threads_batch = spec["threads"]
        self._context = self._model and llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot load {spec['model']}")
        self._batch = int(llama_cpp.llama_n_batch(self._context))
        self._vocabulary = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model)))
        self._token, self.length = 0, 0

    def warm_up(self, ids: Ids) -> None:
        self.prefill(ids)
        self.step()
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self.length = 0

    def prefill(self, ids: Ids) -> None:
        for start in range(0, len(ids), self._batch):
            part = np.ascontiguousarray(ids[start : start + self._batch], np.int32)
            pointer = part.ctypes.data_as(self._library.llama_token_p)
            status = self._library.llama_decode(self._context, self._library.llama_batch_get_one(pointer, len(part)))
            if status:
                raise RuntimeError(f"llama_decode failed with status {status}")
        logits = self._library.llama_get_logits_ith(self._context, -1)
        self._token = int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())
        self.length += len(ids) if self.length else len(ids) + 1

    def step(self) -> None:
        self.prefill(np.array([self._token], np.int32))

    def close(self) -> None:
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)


ENGINES = {"ours": Ours, "peer": Peer, "llama.cpp": LlamaCpp}


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Load a model, read a random prompt, continue it token by token; return what it took.

    Args:
        spec: ``engine`` (of ``ENGINES``), ``model`` (directory or file), ``context``, ``new_tokens``, ``vocab_size``;
            ``threads`` and ``chunk_size``, which the peer may lack: then it runs as it comes; ``cache``, name and
            options of our cache policy, or none.

    Returns:
        seconds, milliseconds per token, tokens/s, bytes; ``policy_share``, the part of all steps' time in which a cache
        policy prepared them, noted what they gave, and moved rows.
    """
    ids = np.random.default_rng(0).integers(_SPECIAL_IDS, spec["vocab_size"], spec["context"]).astype(np.int32)
    start = time.perf_counter()
    engine: Engine = ENGINES[spec["engine"]](spec)
    load_s = time.perf_counter() - start
    with contextlib.closing(engine):
        return {"load_s": load_s, **_measured(engine, ids, spec)}


def _measured(engine: Engine, ids: Ids, spec: dict[str, Any]) -> dict[str, Any]:
    engine.warm_up(ids[:_WARM_UP_TOKENS])
    loaded = memory("VmRSS")
    start = time.perf_counter()
    engine.prefill(ids)
    prefill_s = time.perf_counter() - start
    filled, cache_before = memory("VmRSS"), engine.cache_bytes
    before = getattr(engine, "policy_ms", 0.0)
    steps = [_timed_ms(engine) for _ in range(spec["new_tokens"])]
    if engine.length != spec["context"] + 1 + spec["new_tokens"]:
        raise RuntimeError(f"generation ended after {engine.length - spec['context']} tokens")
    return {
        "prefill_s": prefill_s,
        "prefill_tokens_per_s": spec["context"] / prefill_s,
        **summary(steps),
        "steps_ms": steps,
        "policy_share": (getattr(engine, "policy_ms", 0.0) - before) / sum(steps),
        "peak_bytes": memory("VmHWM"),
        "loaded_bytes": loaded,
        "prefilled_bytes": filled,
        "end_bytes": memory("VmRSS"),
        "growth_bytes": memory("VmRSS") - filled,
        "cache_before_bytes": cache_before,
        "cache_bytes": engine.cache_bytes,
    }


def summary(steps_ms: list[float]) -> dict[str, float]:
    """Return median, 90th percentile and maximum of the times of single tokens, and the median as tokens/s."""
    ordered = sorted(steps_ms)
    median = statistics.median(ordered)
    return {
        "decode_ms": median,
        "decode_p90_ms": ordered[math.ceil(0.9 * len(ordered)) - 1],
        "decode_max_ms": ordered[-1],
        "decode_tokens_per_s": 1e3 / median,
    }


def memory(entry: str) -> int:
    """Return an entry of this process's status in bytes: VmRSS is now, VmHWM the peak.

    The peak of ``getrusage`` would be the parent's where that was larger: it survives fork and exec.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {entry}")


def _timed_ms(engine: Engine) -> float:
    start = time.perf_counter()
    engine.step()
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
