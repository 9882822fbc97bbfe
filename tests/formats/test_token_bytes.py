"""What each token adds to a text, in bytes: joined they are the text, however it was cut."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.generation import EOS, byte_level, save, sentencepiece

TEXTS = st.text(st.sampled_from("ab tea ▁é日𝄞\n!"), max_size=20)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {
        "byte-level": save(tmp_path_factory.mktemp("a"), byte_level(["tea", "a b"])),
        "sentencepiece": save(tmp_path_factory.mktemp("b"), sentencepiece(["a", "b", "▁", "▁a", "tea"])),
    }


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@settings(deadline=None, max_examples=60)
@given(text=TEXTS)
def test_the_tokens_of_a_text_are_its_bytes(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected = text if kind == "byte-level" else text.replace("▁", " ")
    assert b"".join(map(tokenizer.token_bytes, ids)) == expected.encode()


def test_special_and_unknown_tokens(tokenizers):
    assert tokenizers["byte-level"].token_bytes(EOS) == b"</s>"
    assert tokenizers["byte-level"].token_bytes(0xC3) == b"\xc3"
    assert tokenizers["byte-level"].token_bytes(10**6) == b""
    assert tokenizers["sentencepiece"].token_bytes(3 + 0xC3) == b"\xc3"


def test_other_threads_run_while_a_long_text_is_tokenized(tokenizers):
    turns, over = 0, threading.Event()

    def take_turns():
        nonlocal turns
        while not over.wait(0.001):
            turns += 1

    thread = threading.Thread(target=take_turns)
    thread.start()
    try:
        while not turns:
            time.sleep(0.001)
        text, before = "a tea" * 2**14, turns
        ids = tokenizers["byte-level"].encode(text, add_special_tokens=False)
        assert turns > before + 2
    finally:
        over.set()
        thread.join()
    assert b"".join(map(tokenizers["byte-level"].token_bytes, ids)) == text.encode()
