"""One call at a time, and none that Ctrl-C has ended stays in."""

import random
import signal
from types import FrameType

import pytest

from gta_edge.errors import InputError
from gta_edge.support.exclusive import Exclusive


def test_a_call_from_within_a_call_is_refused() -> None:
    exclusive = Exclusive("it", "wait")
    with exclusive.held():
        assert exclusive.mine
        for wait in (False, True):
            with pytest.raises(InputError, match=r"^it is called from within one of its own calls; wait$"):
                exclusive.held(wait=wait).__enter__()
    assert not exclusive.mine
    with pytest.raises(ZeroDivisionError), exclusive.held():
        raise ZeroDivisionError
    assert not exclusive.mine


@pytest.mark.parametrize("wait", [False, True])
def test_an_interrupt_anywhere_leaves_it_free(wait: bool) -> None:
    """Of a context manager that is a generator, one interrupt in six would leave it held for ever."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    draw = random.Random(0)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(1000):
            exclusive = Exclusive("it", "wait")
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012  the interrupt may come anywhere in the loop
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(2e-6, 6e-5))
                while True:
                    with exclusive.held(wait=wait):
                        pass
            assert not exclusive.mine
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
