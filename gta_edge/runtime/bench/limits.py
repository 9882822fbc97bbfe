"""What a benchmark would take, before anything of it is started: to refuse what the system would end halfway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gta_edge.bundle import Bundle
from gta_edge.cost import Execution
from gta_edge.errors import CapacityError
from gta_edge.planning import activation_bytes
from gta_edge.plugins.compiler import driver_problem
from gta_edge.runtime.session import CHUNK_SIZE
from gta_edge.support.memory import available_bytes

__all__ = ["check_memory"]

_ID_BYTES = 8


def check_memory(bundles: Mapping[str, Bundle], contexts: Mapping[str, Sequence[int]], batch: int, steps: int) -> None:
    """Refuse a batch that no backend here can hold, whatever it computes in.

    Args:
        bundles: by name.
        contexts: of each, tokens of the prompts.
        batch: rows.
        steps: whose logits are compared, the prompt's included.

    Raises:
        CapacityError: one step of it takes more than is available.
    """
    free, on_cpu = available_bytes(), driver_problem() is not None
    for name, bundle in bundles.items():
        context = max(contexts[name])
        needed = _bytes(bundle, context, batch, steps, on_cpu=on_cpu)
        if free is not None and needed > free:
            fits = int(batch * free / needed)
            raise CapacityError(
                f"--batch {batch} takes at least {needed / 1e9:.2f} GB at a context of {context} tokens of {name}, and "
                f"{free / 1e9:.2f} GB are available; "
                + (f"give --batch {fits} or less, or a shorter context" if fits else "give a shorter context")
            )


def _bytes(bundle: Bundle, context: int, batch: int, steps: int, *, on_cpu: bool) -> int:
    """Return the least of the host's memory that a batch takes.

    That is its ids and logits, and where there is no GPU its cache and what one of its steps hands on, in float32.
    """
    config, width = bundle.config, min(CHUNK_SIZE, context)
    needed = batch * (_ID_BYTES * context + 4 * steps * config.vocab_size)
    if on_cpu:
        needed += batch * context * config.cache_bytes_per_token()
        needed += activation_bytes(config, Execution("onnxruntime", "fp32", "fp32", width), batch, width, context)
    return needed
