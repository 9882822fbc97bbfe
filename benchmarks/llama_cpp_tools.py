"""What ``llama_cpp_quality.py`` and ``llama_cpp.py`` let llama.cpp do, in the environment that has it.

    python -P benchmarks/llama_cpp_tools.py '{"job": "quantize", "source": FILE, "target": FILE, "type": "Q4_0"}'
    python -P benchmarks/llama_cpp_tools.py '{"job": "evaluate", "model": FILE, "ids": FILE.npy, "window": 512, …}'

-P keeps this directory, which has a ``llama_cpp.py``, from being searched. The last line on stdout is a JSON object.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

BATCH = 512


def quantize(job: dict[str, Any]) -> dict[str, Any]:
    """Let llama.cpp's quantizer write a file of the given type."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job['type']}")
    params.nthread = job["threads"]
    status = llama_cpp.llama_model_quantize(job["source"].encode(), job["target"].encode(), ctypes.byref(params))
    if status:
        raise RuntimeError(f"llama_model_quantize failed with status {status}")
    return {"bytes": Path(job["target"]).stat().st_size}


def evaluate(job: dict[str, Any]) -> dict[str, Any]:
    """Return the mean loss of ids in windows that follow each other, as ``gta_edge.evaluate.perplexity`` has them."""
    ids, window = np.load(job["ids"], allow_pickle=False), job["window"]
    total, predicted = 0.0, len(ids) - 1
    with _context(job["model"], window, job["threads"]) as (context, vocabulary):
        for start in range(0, predicted, window):
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            stop = min(start + window, predicted)
            for at in range(start, stop, BATCH):
                end = min(at + BATCH, stop)
                logits = _logits(context, ids[at:end], at - start, vocabulary)
                total += _negative_log_likelihood(logits, ids[at + 1 : end + 1])
    return {"loss": total / predicted, "tokens": predicted}


@contextlib.contextmanager
def _context(path: str, length: int, threads: int) -> Iterator[tuple[Any, int]]:
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = length, BATCH, BATCH
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"llama.cpp has no context of {length} tokens for {path}")
    try:
        yield context, llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def _logits(context: Any, ids: npt.NDArray[Any], position: int, vocabulary: int) -> npt.NDArray[np.float32]:
    """Append tokens; return the logits [T, V] after each."""
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    try:
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = int(token), position + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if status := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode failed with status {status}")
        pointer = llama_cpp.llama_get_logits(context)
        return np.ctypeslib.as_array(pointer, (len(ids), vocabulary)).copy()
    finally:
        llama_cpp.llama_batch_free(batch)


def _negative_log_likelihood(logits: npt.NDArray[np.float32], targets: npt.NDArray[Any]) -> float:
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=-1, keepdims=True)
    chosen = exact[np.arange(len(targets)), targets]
    return float((np.log(np.exp(exact).sum(axis=-1)) - chosen).sum())


if __name__ == "__main__":
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    spec = json.loads(sys.argv[1])
    print(json.dumps({"quantize": quantize, "evaluate": evaluate}[spec["job"]](spec)))
