"""The tokenizer of a directory: text and ids, streamed text, chat templates, end tokens."""

import codecs
import json
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from gta_edge.errors import BundleError, InputError
from gta_edge.formats.generation_config import GenerationConfig
from gta_edge.runtime.generation.incremental_decoder import Tokenizer
from tests.helpers.generation import BOS, CONFIG, EOS, byte_level, save, sentencepiece, stream

TEXT = "naïve 中文 😀👩‍👩‍👧 né\n"
WORDS = ["▁", "▁Hello", "▁world", "a", "b", "▁a", "."]

BYTES = Tokenizer(byte_level(["<think>"]))
PIECES = Tokenizer(sentencepiece(WORDS))
FIRST_WORD = 3 + 256


def piece_ids(*items):
    """Ids of the sentencepiece tokenizer: words by name, bytes as byte tokens."""
    return [
        token
        for item in items
        for token in ([3 + b for b in item] if isinstance(item, bytes) else [FIRST_WORD + WORDS.index(item)])
    ]


# --- files -----------------------------------------------------------------------------------------------------------


def test_encode_adds_special_tokens_and_decode_skips_them(tmp_path):
    tokenizer = save(tmp_path, byte_level())
    assert tokenizer.encode("hé") == [BOS, *"hé".encode()]
    assert tokenizer.encode("hé", add_special_tokens=False) == list("hé".encode())
    assert tokenizer.decode([BOS, *TEXT.encode(), EOS]) == TEXT


def test_a_directory_without_tokenizer(tmp_path):
    assert Tokenizer.load(tmp_path) is None


def test_saved_truncation_and_padding_do_not_apply(tmp_path):
    library = byte_level()
    library.enable_truncation(4)
    library.enable_padding(length=50)
    assert save(tmp_path, library).encode("0123456789") == [BOS, *b"0123456789"]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"\xff\xfe", b"{}", b'{"version": "1.0", "model": {"type": "None"}}',
        # the library panics over this one
        b'{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{"a":0,"b":1},"merges":["a b"]}}',
    ],
)  # fmt: skip
def test_a_damaged_tokenizer_is_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(
        BundleError, match=r"tokenizer\.json: is not a tokenizer \(.+\); copy the file anew, or correct it in .*$"
    ) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b'{"chat_template": 3}'])
def test_damaged_settings_are_refused(tmp_path, content):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer_config\.json: "):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("text", ["\udc80", 3, None])
def test_text_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="cannot be tokenized"):
        BYTES.encode(text)


# --- streamed text ---------------------------------------------------------------------------------------------------


def test_byte_level_characters_are_whole():
    pieces = stream(BYTES, TEXT.encode())
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream(BYTES, "中a".encode()) == ["", "", "中", "a"]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from([b"a", b"\xff", b"\x80", b"\xe4", b"\xf0\x9f", "中".encode(), "😀".encode()])))
def test_byte_level_any_bytes(parts):
    data = b"".join(parts)
    text = data.decode(errors="replace")
    # at most one unfinished character at the end is missing
    assert "".join(stream(BYTES, data)) in (text, text.removesuffix("\ufffd"))


@settings(deadline=None, max_examples=100)
@given(st.text())
def test_byte_level_any_text(text):
    streamed = "".join(stream(BYTES, text.encode()))
    # a true U+FFFD at the very end looks like an unfinished character
    assert streamed == (text[:-1] if text.endswith("\ufffd") else text)


def test_tokens_of_several_bytes_that_split_characters():
    alphabet = byte_level().get_vocab()
    spelled = {token: character for character, token in alphabet.items()}
    chunks = [b"a\xf0", b"\x9f\x98", b"\x80b\xe4", b"\xb8\xad", b"c"]
    vocab = {"".join(spelled[b] for b in chunk): i for i, chunk in enumerate(chunks)}
    library = tokenizers.Tokenizer(models.WordLevel(vocab=vocab, unk_token="c"))
    library.decoder = decoders.ByteLevel()
    assert stream(Tokenizer(library), range(5)) == ["a", "", "😀b", "中", "c"]


def test_special_and_unknown_ids_have_no_text():
    ids = [BOS, *b"a", 999, 0xE4, 999, EOS, 0xB8, 0xAD, 299, *b"b", EOS]
    assert "".join(stream(BYTES, ids)) == BYTES.decode(ids) == "a中b"


def test_added_tokens_that_are_not_special_have_text():
    think = BYTES.encode("<think>")[-1]
    assert stream(BYTES, [*b"a", think, *b"b"]) == ["a", "<think>", "b"]


def test_invalid_bytes_do_not_hold_text_back_and_cost_no_more_with_time():
    started = time.perf_counter()
    pieces = stream(BYTES, [*b"a", *[0xFF] * 5000, *b"bc"])
    assert time.perf_counter() - started < 10
    assert pieces[2:5001] == ["\ufffd"] * 4999  # one token late
    assert "".join(pieces) == "a" + "\ufffd" * 5000 + "bc"


def test_an_unfinished_character_at_the_end_is_dropped():
    assert "".join(stream(BYTES, b"ab\xf0\x9f\x98")) == "ab"
    assert "".join(stream(PIECES, piece_ids("a", b"\xf0\x9f\x98"))) == "a"


def test_sentencepiece_spaces():
    ids = piece_ids("▁Hello", "▁world", "▁", "▁", "a", "▁a", ".")
    assert stream(PIECES, ids) == ["Hello", " world", " ", " ", "a", " a", "."]
    assert "".join(stream(PIECES, [1, *ids, 2])) == PIECES.decode(ids)


def test_sentencepiece_byte_tokens():
    ids = piece_ids("▁Hello", "😀中".encode(), "▁a", "é".encode(), "b")
    assert stream(PIECES, ids) == ["Hello", "", "", "", "😀", "", "", "中", " a", "", "é", "b"]


def test_sentencepiece_invalid_byte_after_a_character():
    ids = piece_ids("a", "é".encode(), b"\xe4", "b", "▁world")
    assert stream(PIECES, ids) == ["a", "", "é", "", "\ufffdb", " world"]


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.sampled_from([*WORDS, b"\n", b"\xff", b"\x80", b"\xe4", b"\xf0\x9f", "中".encode(), "😀é".encode()]),
        max_size=12,
    )
)
def test_sentencepiece_any_tokens(items):
    spelled = b"".join(item if isinstance(item, bytes) else item.replace("▁", " ").encode() for item in items)
    expected = codecs.getincrementaldecoder("utf-8")(errors="replace").decode(spelled)
    assert "".join(stream(PIECES, piece_ids(*items))) == expected.removeprefix(" ")


@pytest.mark.parametrize("decoder", [decoders.Metaspace(), decoders.WordPiece(), decoders.BPEDecoder(), None])
def test_other_decoders_stream_what_they_decode(decoder):
    words = ["▁Hello", "world</w>", "##s", "."]
    library = tokenizers.Tokenizer(models.WordLevel(vocab={w: i for i, w in enumerate(words)}, unk_token="."))
    if decoder is not None:
        library.decoder = decoder
    tokenizer = Tokenizer(library)
    ids = [0, 1, 2, 3, 0, 1, 3, 1, 1]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


# --- chat templates --------------------------------------------------------------------------------------------------

TEMPLATE = """{{ bos_token }}
{% for message in messages %}
    {% if loop.index > 9 %}{% break %}{% endif %}
<|{{ message['role'] }}|>{{ message.content }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
MESSAGES = [{"role": "system", "content": "Be <b>brief</b> & kind."}, {"role": "user", "content": "Hi 😀"}]


def render(template, messages=MESSAGES, **variables):
    return Tokenizer(byte_level(), template, variables).apply_chat_template(messages)


def test_template_as_transformers_renders_it():
    from transformers.utils.chat_template_utils import render_jinja_template

    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    for template in (
        TEMPLATE,
        "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
        "{% if tools is not none %}tools{% endif %}{% if documents is defined %}documents{% endif %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ unk_token }}{{ messages[-1]['missing'] }}",
    ):
        expected = render_jinja_template([MESSAGES], chat_template=template, add_generation_prompt=True, **variables)
        assert render(template, **variables) == expected[0][0]


def test_strftime_now():
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('no\nsystem role') }}", "no system role"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    ],
)
def test_a_template_that_fails_is_one_line(template, reason):
    with pytest.raises(InputError, match=f"^the chat template failed: .*{reason}.*; check it") as caught:
        render(template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("messages", [[], "Hi", [{}], [{"role": "user"}], [{"role": "user", "content": 3}], ["Hi"], 3])
def test_messages_of_another_form_are_refused(messages):
    with pytest.raises(InputError, match=r"expected .*\{'role': …, 'content': …\}"):
        render(TEMPLATE, messages)


def test_no_template(tmp_path):
    for template in (None, [{"name": "rag", "template": "x"}]):
        tokenizer = save(tmp_path, byte_level(), chat_template=template)
        with pytest.raises(InputError, match=r"no chat template.*chat_template\.jinja"):
            tokenizer.apply_chat_template(MESSAGES)


def test_where_templates_and_special_tokens_are_read_from(tmp_path):
    messages = [{"role": "user", "content": "Hi"}]
    plain = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    tokens = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "add_bos_token": True}
    tokenizer = save(tmp_path, byte_level(), chat_template=plain, **tokens)
    assert tokenizer.apply_chat_template(messages) == "<s>Hi</s>"

    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes {{ eos_token }}"}]
    assert save(tmp_path, byte_level(), chat_template=named, **tokens).apply_chat_template(messages) == "yes </s>"

    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}", encoding="utf-8")
    assert save(tmp_path, byte_level(), chat_template=plain, **tokens).apply_chat_template(messages) == "file <s>"


# --- end tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, {EOS}),
        ({}, {EOS}),
        ({"eos_token_id": None}, {EOS}),
        ({"eos_token_id": 0}, {0}),
        ({"eos_token_id": [1, 299]}, {1, 299}),
        ({"eos_token_id": -1}, set()),
        ({"eos_token_id": [-1, 1]}, {1}),
        ({"eos_token_id": [1, 300]}, {1}),  # what can never be produced ends nothing
    ],
)
def test_end_tokens(tmp_path: Path, content, expected):
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert GenerationConfig.load(tmp_path, CONFIG, None).end_token_ids == expected


@pytest.mark.parametrize("value", [300, [-2, 300], "2", 1.0, True, [-1, 300], [True, 300], [[1]], {}])
def test_end_tokens_outside_the_vocabulary_are_refused(tmp_path, value):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(BundleError, match=r"generation_config\.json: eos_token_id is .*expected ids from 0 to 299"):
        GenerationConfig.load(tmp_path, CONFIG, None)
