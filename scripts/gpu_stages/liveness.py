"""The stage that asks whether a captured step reads memory that is no longer its own.

    python -m scripts.gpu_stages.liveness

A step is captured after one prompt and replayed after others, with the allocator's small blocks handed out in between.
All prompts are the same, so all answers must be, bit for bit.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from gta_edge.model.decoder import Decoder
from gta_edge.model.presets import preset
from gta_edge.runtime.torch.session import TorchSession
from scripts.gpu_stages.figures import REHEARSAL, Verdict


def main() -> int:
    """Ask the same several times.

    Returns:
        the status: 0 if all answers are the same.
    """
    device, prompt = ("cpu", 20) if REHEARSAL else ("cuda", 4200)
    config = preset("gta1-160m").replace(num_hidden_layers=2, vocab_size=512, max_position_embeddings=8192)
    torch.manual_seed(0)
    ids = np.random.default_rng(0).integers(0, 512, (1, prompt + 1))
    verdict = Verdict()
    with TorchSession(Decoder(config), device=device, compute="bf16", capacity_step=8192) as session:

        def answer() -> np.ndarray:
            session.reset()
            session.forward(ids[:, :prompt])
            return session.forward(ids[:, prompt:])

        first = answer()
        for turn in range(3):
            # of the size of the step's inputs, with values that would be wrong there
            others = [torch.full((1,), prompt - 100, dtype=torch.int64, device=device) for _ in range(600)]
            found = answer()
            del others
            difference = float(np.abs(first - found).max())
            verdict.tell("liveness", np.array_equal(first, found), turn=turn, difference=difference)
    return verdict.end()


if __name__ == "__main__":
    sys.exit(main())
