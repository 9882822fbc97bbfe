"""What streamed pieces add to a prompt: together with it, the text of all ids, whatever the decoder does."""

import itertools

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from gta_edge.runtime.generation.incremental_decoder import IncrementalDecoder, Tokenizer
from gta_edge.runtime.generation.loop import generate
from tests.helpers.generation import CONFIG, ScriptedSession, byte_level, sentencepiece

WORDS = ["▁", "▁▁", "▁Hello", "▁world", "a", "b", "▁a", ".", "é", "▁é"]
CHAT = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"


def metaspace(scheme):
    """A tokenizer of today's sentencepiece conversions: a decoder that drops the first space, and byte tokens."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    vocab |= {word: len(vocab) + i for i, word in enumerate(WORDS)}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library


def words(decoder, vocab):
    library = tokenizers.Tokenizer(models.WordLevel(vocab={w: i for i, w in enumerate(vocab)}, unk_token=vocab[0]))
    library.decoder = decoder
    library.add_special_tokens([vocab[0]])
    return library


def trained(make_model, make_trainer, pre_tokenizer, decoder, normalizer=None):
    """A tokenizer trained on a little text, as published ones are."""
    library = tokenizers.Tokenizer(make_model())
    library.pre_tokenizer, library.decoder = pre_tokenizer, decoder
    if normalizer:
        library.normalizer = normalizer
    text = ["Hello world, hello there. naïve 中文 😀 the quick brown fox isn't here.", "  two  spaces\n\tand more"] * 3
    library.train_from_iterator(text, make_trainer())
    return library


def made():
    special = ["<unk>", "<s>", "</s>"]
    yield "bytes", byte_level(["<think>", " and"])
    yield "sentencepiece", sentencepiece(WORDS)
    for scheme in ("always", "first", "never"):
        yield f"metaspace {scheme}", metaspace(scheme)
    yield "wordpiece", words(decoders.WordPiece(), ["[UNK]", "Hello", "##s", "world", ".", "'", "##é", "中"])
    yield "wordpiece as it is", words(decoders.WordPiece(cleanup=False), ["[UNK]", "Hello", "##s", "world", "."])
    yield "bpe suffix", words(decoders.BPEDecoder(), ["<unk>", "Hello</w>", "wor", "ld</w>", ".</w>"])
    yield "no decoder", words(None, ["<unk>", "Hello", "world", "."])
    yield "trained bytes", trained(
        models.BPE, lambda: tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special),
        pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    )  # fmt: skip
    yield "trained unigram", trained(
        models.Unigram,
        lambda: tokenizers.trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>"),
        pre_tokenizers.Metaspace(), decoders.Metaspace(), normalizers.NFKC()
    )  # fmt: skip
    yield "trained wordpiece", trained(
        lambda: models.WordPiece(unk_token="<unk>"),
        lambda: tokenizers.trainers.WordPieceTrainer(vocab_size=150, special_tokens=special),
        pre_tokenizers.Whitespace(), decoders.WordPiece()
    )  # fmt: skip


MADE = {name: (library, Tokenizer(library)) for name, library in made()}


def is_whole(tokenizer, ids):
    """Whether no character is left unfinished at the end, nor byte tokens that are no UTF-8, which the library gives
    another number of U+FFFD for."""
    return "\ufffd" not in tokenizer.decode(ids)


@pytest.mark.parametrize("name", MADE)
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_prompt_and_pieces_are_the_text_of_all_ids(name, data):
    library, tokenizer = MADE[name]
    some = st.lists(st.integers(0, library.get_vocab_size() + 2), max_size=24)  # special and unknown ones too
    texts = st.text("Helo wrd.é中😀▁\n", max_size=12).map(lambda text: library.encode(text).ids)
    prompt = data.draw(some | texts, label="prompt")
    new = data.draw(some | texts, label="new")
    decoder = IncrementalDecoder(tokenizer, prompt)
    pieces = [decoder.push(token) for token in new]
    if is_whole(tokenizer, prompt) and is_whole(tokenizer, [*prompt, *new]):
        assert tokenizer.decode(prompt) + "".join(pieces) == tokenizer.decode([*prompt, *new])
    assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in tokenizer.decode([*prompt, *new]))


@settings(deadline=None, max_examples=100)
@given(
    text=st.text("a é中😀👩‍👩‍👧", min_size=1, max_size=12),
    at=st.integers(0, 40),
    name=st.sampled_from(["bytes", "sentencepiece"]),
)
def test_a_prompt_may_end_within_a_character(text, at, name):
    _, tokenizer = MADE[name]
    data = text.encode()
    ids = list(data) if name == "bytes" else [3 + b for b in data]
    at = at % (len(ids) + 1)
    decoder = IncrementalDecoder(tokenizer, ids[:at])
    pieces = "".join(decoder.push(token) for token in ids[at:])
    prompt = data[:at].decode(errors="ignore")
    expected = text.removeprefix(prompt)
    # sentencepiece's decoders drop one space at the very beginning
    assert pieces == (expected.removeprefix(" ") if name == "sentencepiece" and not at and expected else expected)


def generated(tokenizer, prompt, ids, **options):
    session = ScriptedSession([*ids], tokenizer, CONFIG.replace(vocab_size=600))
    generation = generate(session, prompt, max_new_tokens=len(ids), **options)
    pieces = list(generation)
    assert "".join(pieces) == generation.text
    return generation


SPACED = ["sentencepiece", "metaspace always", "metaspace first"]


@pytest.mark.parametrize("name", SPACED)
@pytest.mark.parametrize("chat", [False, True])
def test_the_space_after_the_prompt(name, chat):
    library, _ = MADE[name]
    tokenizer = Tokenizer(library, CHAT)
    new = [library.token_to_id(word) for word in ("▁Hello", "▁world", ".")]
    assert generated(tokenizer, "Hello", new, chat=chat).text == " Hello world."
    assert generated(tokenizer, [library.token_to_id("▁Hello"), 2], new).text == " Hello world."
    assert generated(tokenizer, [1], new).text == "Hello world."  # it is the beginning


@pytest.mark.parametrize("name", SPACED)
@pytest.mark.parametrize(
    ("stop", "text"), [(" world", " Hello"), (" Hello", ""), ("Hello", " "), (". ", " Hello world.")]
)
def test_stop_strings_that_begin_with_a_space(name, stop, text):
    library, tokenizer = MADE[name]
    new = [library.token_to_id(word) for word in ("▁Hello", "▁world", ".")]
    generation = generated(tokenizer, "a", new, stop=[stop])
    assert (generation.text, generation.finish_reason) == (text, "length" if stop == ". " else "stop")


def test_the_same_for_every_way_to_split_ids_between_prompt_and_answer():
    for library, tokenizer in MADE.values():
        ids = list(range(0, min(library.get_vocab_size(), 700), 7))[:20]
        ids = [i for i in ids if "\ufffd" not in tokenizer.decode([i])]
        for at in range(1, len(ids)):
            decoder = IncrementalDecoder(tokenizer, ids[:at])
            pieces = list(itertools.chain(decoder.push(token) for token in ids[at:]))
            assert tokenizer.decode(ids[:at]) + "".join(pieces) == tokenizer.decode(ids)
