"""The stages of a whole model's logits: by the kernels, against torch's own operations with the same weights.

    python -m scripts.gpu_stages.agreement gta-1b/bf16 gta-1b/int4 ...

The reference computes in float32 on the same GPU, where no kernel of ours runs. Beside it stands what torch's own
operations are off by when they too compute in bf16 (on the CPU): of 54 layers of random weights that is much, and the
kernels may be off by twice as much, or by what ``verify`` allows.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import numpy as np
import torch
from gpu_models import float_decoder, packed_decoder, random_decoder

from gta_edge.accuracy.probes import probes
from gta_edge.accuracy.tolerance import COMPUTE_BOUNDS, difference
from gta_edge.model.decoder import Decoder
from gta_edge.numerics.quantization import BITS
from gta_edge.runtime.torch.session import TorchSession
from scripts.gpu_stages.figures import Verdict
from scripts.gpu_stages.models import DEVICE, config_of

_SLACK = 2
"""Times what torch's own operations are off by in the same type."""


def main(model_name: str) -> int:
    """Compare the logits of a prompt's last position and of the tokens after it.

    Args:
        model_name: a preset and the type of its weights, with a slash between.

    Returns:
        the status: 0 if they are as near as they should be.
    """
    name, _, precision = model_name.partition("/")
    config = config_of(name)
    asked = probes(config)[0]
    ids, prompt = asked.ids, asked.prefill
    if precision in BITS:
        ours = _logits(packed_decoder(config, BITS[precision], DEVICE), DEVICE, "bf16", ids, prompt)
        model = float_decoder(config, BITS[precision])
        reference = _logits(model, DEVICE, "fp32", ids, prompt)
        theirs = _logits(model, "cpu", "bf16", ids, prompt)  # last: it rounds what the int4 codes mean
    else:
        model = random_decoder(config, DEVICE)
        ours = _logits(model, DEVICE, "bf16", ids, prompt)
        theirs = _logits(model, "cpu", "bf16", ids, prompt)
        reference = _logits(model, DEVICE, "fp32", ids, prompt)
    found, peer = difference(ours, reference), difference(theirs, reference)
    bound = max(COMPUTE_BOUNDS["bf16"], _SLACK * peer.max_rel_error)
    verdict = Verdict()
    verdict.tell(
        "logits",
        found.max_rel_error <= bound,
        model=model_name,
        error=found.max_rel_error,
        torch_error=peer.max_rel_error,
        bound=bound,
        top1=found.top1_agreement,
        torch_top1=peer.top1_agreement,
    )
    return verdict.end()


def _logits(model: Decoder, device: str, compute: str, ids: np.ndarray, prompt: int) -> Any:
    """Return float32 logits [positions, V]."""
    with TorchSession(model, device=device, compute=compute) as session:
        found = [session.forward(ids[:, :prompt])]
        found += [session.forward(ids[:, i : i + 1]) for i in range(prompt, ids.shape[1])]
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return np.concatenate(found)


if __name__ == "__main__":
    sys.exit(max(map(main, sys.argv[1:])))
