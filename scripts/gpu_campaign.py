"""Proves and measures this project on a GPU: one command, a quarter of an hour. ``make gpu`` runs it.

    python scripts/gpu_campaign.py [--budget SECONDS] [--only STAGE,...] [--resume] [--output DIR] [--rehearse] [--list]

It runs from the repository's root with what the machine has; nothing of this project need be installed. Every stage is
a process of its own with a time limit of its own, so what one breaks, a device-side assert too, ends with it. Figures
are appended to ``DIR/results.jsonl`` while they come, all output to ``DIR/log.txt``; last comes ``DIR/table.md``, which
is printed too. ``--rehearse`` needs no GPU: the kernels run in the host simulation, the model stages on a tiny model.

The status is 0 if every stage that ran passed, 1 if not or if there is no GPU. What to do with the results:
``docs/gpu.md``.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Run the campaign."""
    sys.path.insert(0, str(ROOT))
    from scripts.gpu_stages import campaign

    return campaign.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
