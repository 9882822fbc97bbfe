"""What is timed beside plain decoding is what generation does, and its figures follow from the rounds."""

import numpy as np
import pytest

from gta_edge.errors import InputError
from gta_edge.evaluate.bench.beside import answered, speculated, summarise_beside
from gta_edge.evaluate.bench.settings import Settings
from gta_edge.runtime.generation.loop import generate
from tests.helpers.generation import TableSession

TABLE = (3 * np.random.default_rng(0).standard_normal((5, 5, 5))).astype(np.float32)


def test_guessed_tokens_are_those_of_generate() -> None:
    session = TableSession(TABLE)
    generation = generate(session, [1, 2, 3], max_new_tokens=21)
    list(generation)
    found = speculated(session, np.array([[1, 2, 3]]), 20)
    assert session.cached[0, 3:23].tolist() == generation.ids[:20]
    assert found["calls"] + found["accepted"] == 20
    assert found["drafted"] >= found["accepted"]


def test_answers_are_branches_of_one_prompt() -> None:
    session = TableSession(TABLE, trees=True)
    found = answered(session, np.array([[1, 2, 3]]), 6, 4)
    assert session.widths == [3, 4, 4, 4, 4, 4, 4]
    assert len(found["steps_ms"]) == 6


def test_figures_are_ratios_within_rounds() -> None:
    rounds = [
        {
            "steps_ms": [10.0 * k, 10.0 * k],
            "speculation": {"ms": 10.0 * k, "calls": 1, "drafted": 3, "accepted": 1},
            "answers": {"steps_ms": [20.0 * k, 20.0 * k], "cache_bytes": 7 * k},
        }
        for k in (1, 2, 3)
    ]
    found = summarise_beside(rounds, 2, 4)
    assert found["speculation"] == {
        "tpot_ms": 10.0,
        "tokens_per_step": 2.0,
        "drafted": 3,
        "accepted": 1,
        "speed": 2.0,
    }
    assert found["answers"] == {"n": 4, "step_ms": 40.0, "tokens_per_s": 100.0, "cache_bytes": 21, "speed": 2.0}
    assert summarise_beside([{"steps_ms": [1.0]}], 1, 1) == {}


@pytest.mark.parametrize("options", [{"batch": 2, "answers": 2}, {"batch": 2, "speculate": True}, {"answers": 0}])
def test_what_makes_no_sense_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"--batch is 2|--n is 0"):
        Settings(**options).check()
