"""Calls of every session in any order, and those that Ctrl-C ends."""

import dis
import itertools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.errors import CapacityError
from tests.helpers.sessions import INTEGERS, MODELS, SESSIONS, P, assert_same, exact_logits, open_session, prompt

# --- everything together ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "models"),
    [*((name, [*MODELS]) for name in SESSIONS), ("onnxruntime", [*INTEGERS]), ("tensorrt", [*INTEGERS])],
    ids=[*SESSIONS, "onnxruntime in integers", "tensorrt in integers"],
)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_sequence_of_calls_gives_what_the_tokens_in_the_cache_give(name, models, data):
    model = data.draw(st.sampled_from(models))
    rows = data.draw(st.integers(1, 3))
    session = open_session(
        name,
        model,
        chunk_size=data.draw(st.integers(1, 6)),
        capacity_step=data.draw(st.integers(1, 6)),
    )
    held: list[list[int]] = [[] for _ in range(rows)]
    with session:
        for step in range(data.draw(st.integers(1, 6))):
            # an empty cache learns the number of its rows from the first call
            action = data.draw(st.sampled_from(["forward", "forward", "truncate", "reset"])) if step else "forward"
            if action == "reset":
                session.reset()
                held = [[] for _ in range(rows)]
            elif action == "truncate":
                keep = [data.draw(st.integers(0, len(row))) for row in held]
                session.truncate(keep)
                held = [row[:length] for row, length in zip(held, keep, strict=True)]
            else:
                width = data.draw(st.integers(1, 9))
                lengths = [data.draw(st.integers(1, width)) for _ in range(rows)]
                ids = prompt(rows, width, seed=data.draw(st.integers(0, 99)))
                longer = [row + ids[i, : lengths[i]].tolist() for i, row in enumerate(held)]
                try:
                    found = session.forward(ids, lengths=lengths)
                except CapacityError:
                    assert max(len(row) for row in held) + width > P
                else:
                    held = longer
                    for i, row in enumerate(held):
                        assert_same(found[i], exact_logits(model, row)[-1])
            np.testing.assert_array_equal(session.length, [len(row) for row in held])
            assert max(len(row) for row in held) <= session.capacity <= P


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def leaves_with(frame: FrameType) -> bool:
    """Tell whether a ``with`` calls ``__exit__`` next: its line comes once more, and no signal is looked for before."""
    ahead = frame.f_code.co_code[frame.f_lasti : frame.f_lasti + 8 : 2]
    names = [dis.opname[code] for code in ahead]
    return names[names[0] == "SWAP" :][:3] == ["LOAD_CONST"] * 3 or names[:2] == ["PUSH_EXC_INFO", "WITH_EXCEPT_START"]


def interrupted(call: Callable[[], Any], line: int) -> bool:
    """Let Ctrl-C come before the given line that runs in a session's own modules; tell whether there were so many."""
    left = line

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        if "/gta_edge/runtime/" not in frame.f_code.co_filename:
            return None
        if event != "line" or leaves_with(frame):
            return trace
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize(("backend", "model"), [(backend, "gta") for backend in SESSIONS], indirect=True)
def test_ctrl_c_at_any_line_leaves_what_was_appended(start, model):
    """In the middle of a prompt's chunks, of growth, of a step: the length is of what is there, and it goes on."""
    ids = prompt(2, 14)
    exact = np.stack([exact_logits(model, row)[-1] for row in ids])
    lengths = set()
    for line in itertools.count(1, 23):
        session = start(chunk_size=4, capacity_step=5)
        stopped = interrupted(lambda session=session: session.forward(ids), line)
        there = set(session.length.tolist())
        assert len(there) == 1
        (length,) = there
        lengths.add(length)
        if length == 14:
            session.truncate(13)
            length = 13
        assert_same(session.forward(ids[:, length:]), exact)
        session.close()
        if not stopped:
            break
    assert lengths >= {0, 14}
    assert len(lengths) > 2
