"""The real model's tokenizer: rebuilt from GGUF, it must cut texts as llama.cpp's rules say.

The rules are written down a second time here, plainly: control tokens first, then single digits, then the pattern of
GPT-2, then merges by rank over the bytes.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from gta_edge.formats.tokenizer import Tokenizer
from tests.helpers.real_model import CHAT

pytestmark = pytest.mark.real_model

# of llama.cpp's pre-tokenizer "smollm", one after the other
DIGIT = regex.compile(r"\p{N}")
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  ",
    "In 1969, 12,345.678 people; ½ and ² and Ⅷ are numbers too, ٣ as well",
    "I'm sure they'll say it's what we've 'done', don't they'd?",
    "def f(x):\n    return {\n\t'a': x[1:20],\r\n    }\n\n\n",
    "a  5   b    ",
    "Ünïcödé — naïve café, 東京は日本の首都です。 Привет, мир! שלום",
    "👩‍👩‍👧‍👦 🇫🇷 e\u0301 \u200b \xa0x\u3000y",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|> <|im_start |>",
    "x" * 300,
    '$E = mc^2$ & <html lang="en"></html> http://example.org/?q=1&r=2',
]


class Plain:
    """Byte-level BPE by its definition, with the vocabulary and merges of a ``tokenizer.json``."""

    def __init__(self, directory: Path) -> None:
        entries = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
        self.vocabulary = entries["model"]["vocab"]
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(entries["model"]["merges"])}
        self.control = [token["content"] for token in entries["added_tokens"]]
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in visible]
        self.alphabet = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(others)}

    def encode(self, text: str) -> list[int]:
        tokens = []
        for part in regex.split(f"({'|'.join(map(regex.escape, self.control))})", text):
            if part in self.control:
                tokens.append(part)
                continue
            for piece in regex.splititer(f"({DIGIT.pattern})", part):
                tokens += [token for word in WORD.findall(piece) for token in self.merged(word)]
        return [self.vocabulary[token] for token in tokens]

    def merged(self, word: str) -> list[str]:
        tokens = [self.alphabet[byte] for byte in word.encode()]
        while len(tokens) > 1:
            rank, at = min((self.ranks.get(pair, np.inf), i) for i, pair in enumerate(itertools.pairwise(tokens)))
            if rank == np.inf:
                break
            tokens[at : at + 2] = ["".join(tokens[at : at + 2])]
        return tokens

    def knows(self, text: str) -> bool:
        """Whether there is a token for every byte: there is none for some that hardly any text has."""
        return all(self.alphabet[byte] in self.vocabulary for byte in text.encode())


@pytest.fixture(scope="module")
def plain(smollm2: Path) -> Plain:
    return Plain(smollm2)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_cut_by_the_rules(tokenizer: Tokenizer, plain: Plain, text: str) -> None:
    assert plain.knows(text)
    assert tokenizer.encode(text) == plain.encode(text)


@given(text=st.text(st.sampled_from("aZé東 \t\n1٣²'s.,!<|_>\u0301\U0001f600"), max_size=40) | st.text(max_size=20))
def test_any_text_is_cut_by_the_rules(tokenizer: Tokenizer, plain: Plain, text: str) -> None:
    if plain.knows(text):
        ids = tokenizer.encode(text)
        assert ids == plain.encode(text)
        assert tokenizer._library.decode(ids, skip_special_tokens=False) == text


def test_texts_come_back(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        without = regex.sub(r"<\|\w+\|>", "", text)
        assert tokenizer.decode(tokenizer.encode(text)) == without


def test_control_tokens_have_the_ids_of_the_model(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>") == [0, 1, 2]
    assert sorted(tokenizer.whole_tokens) == list(range(17))
    assert tokenizer.end_token_id == 2


def test_transformers_reads_the_same_files_alike(smollm2: Path, tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(smollm2)
    for text in TEXTS:
        assert theirs(text).input_ids == tokenizer.encode(text)
    chat = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(CHAT) == chat
    assert chat.endswith("<|im_start|>assistant\n")
