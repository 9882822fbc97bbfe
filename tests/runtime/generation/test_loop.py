"""Whole generations: against a plain loop over the model, and over scripted tokens."""

import numpy as np
import pytest
import torch

from gta_edge.errors import BackendError, CapacityError, InputError
from gta_edge.model.decoder import Decoder, empty_cache
from gta_edge.runtime.generation.incremental_decoder import Tokenizer
from gta_edge.runtime.generation.loop import generate
from gta_edge.runtime.generation.sampling import Sampler, Sampling
from gta_edge.runtime.torch.session import TorchSession
from tests.helpers.generation import BOS, CONFIG, EOS, ScriptedSession, byte_level

MODEL_CONFIG = CONFIG.replace(tie_word_embeddings=False)  # a random tied head would repeat the last token
PROMPT = [BOS, 1, 2, 3]
BYTES = Tokenizer(byte_level())
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}>"


def said(text, *ids):
    """A session that says the bytes of a text, then ids."""
    return ScriptedSession([*text.encode(), *ids], BYTES)


def run(session, prompt=PROMPT, **options):
    """Return a finished generation, its pieces checked against its text."""
    generation = generate(session, prompt, **options)
    pieces = list(generation)
    assert list(generation) == []
    assert generation.text == ("".join(pieces) if session.tokenizer else None)
    return generation


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Decoder(MODEL_CONFIG)


def plain_loop(model, ids, count, sampler):
    """Generate by running everything again for each token, without chunks or a cache that lives on."""
    ids = list(ids)
    for _ in range(count):
        tokens = torch.tensor([ids])
        caches = empty_cache(MODEL_CONFIG, 1, len(ids))
        with torch.inference_mode():
            logits, _ = model(tokens, torch.zeros(1, dtype=torch.long), torch.tensor([[len(ids) - 1]]), caches)
        ids.append(sampler.sample(logits[0, 0].numpy(), np.array(ids)))
    return ids


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.9, "top_k": 40, "seed": 3}, {"top_p": 0.8, "repetition_penalty": 1.4, "seed": 1}]
)
def test_tokens_are_those_of_a_plain_loop(model, options):
    prompt = list(range(20, 30))
    expected = plain_loop(copy_of(model), prompt, 12, Sampler(Sampling(**options)))[10:]
    session = TorchSession(copy_of(model), chunk_size=4)
    session.end_token_ids = frozenset()
    session.forward([[5, 6, 7]])  # what an earlier use left in the cache does not matter
    generation = run(session, prompt, max_new_tokens=12, **options)
    assert generation.ids == expected
    assert session.length.tolist() == [10 + 11]  # the last token was not run


def copy_of(model):
    """A model of its own, since a session switches the attention."""
    copy = Decoder(MODEL_CONFIG)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def test_same_seed_same_text(model):
    session = TorchSession(copy_of(model))
    session.tokenizer = BYTES
    first = run(session, "Hi", temperature=1.0, max_new_tokens=20)
    again = run(session, "Hi", temperature=1.0, max_new_tokens=20, seed=first.seed)
    assert (first.ids, first.text) == (again.ids, again.text)
    assert run(session, "Hi", temperature=1.0, max_new_tokens=20).ids != first.ids


# --- where it ends ---------------------------------------------------------------------------------------------------


def test_end_token():
    generation = run(said("Hello", EOS, 1))
    assert (generation.text, generation.finish_reason) == ("Hello", "stop")
    assert generation.ids == [*b"Hello"]


@pytest.mark.parametrize("end", [7, 299])
def test_several_end_tokens(end):
    session = said("Hello", end)
    session.end_token_ids = frozenset({7, 299})
    assert run(session).ids == [*b"Hello"]


def test_end_token_at_once():
    generation = run(said("", EOS))
    assert (generation.ids, generation.text, generation.finish_reason) == ([], "", "stop")


def test_end_tokens_can_be_ignored():
    generation = run(said("ab", EOS, *b"c"), ignore_eos=True, max_new_tokens=4)
    assert (generation.ids, generation.text, generation.finish_reason) == ([*b"ab", EOS, *b"c"], "abc", "length")


def test_stop_text_across_tokens():
    session = said("one\nUsher\nUser: two")
    generation = run(session, stop=["\nUser:", "XX"])
    assert (generation.text, generation.finish_reason) == ("one\nUsher", "stop")
    assert generation.ids == [*b"one\nUsher\nUser:"]
    assert session.script == [*b" two"]


def test_text_held_for_a_stop_text_is_given_when_none_comes():
    for options, script in ({"max_new_tokens": 5}, []), ({}, [EOS]):
        generation = run(said("a\n\nUs", *script), stop=["\n\nUser:"], **options)
        assert generation.text == "a\n\nUs"


SPECIAL = byte_level()
SPECIAL.add_special_tokens(["<|im_end|>", "<|end|>"])
IM_END, END = (SPECIAL.token_to_id(name) for name in ("<|im_end|>", "<|end|>"))


@pytest.mark.parametrize(
    ("script", "options", "text", "ids"),
    [
        ([*b"Hi", IM_END, *b"no"], {"stop": ["<|im_end|>"]}, "Hi", [*b"Hi"]),  # as an end token
        ([*b"Hi", IM_END, *b"no"], {"stop": "<|im_end|>"}, "Hi", [*b"Hi"]),
        ([*b"Hi", IM_END, *b"no"], {"stop": ["<|end|>", "<|im_end|>"]}, "Hi", [*b"Hi"]),
        ([*b"Hi", IM_END, *b"no"], {"stop": ["<|im_end|>"], "ignore_eos": True}, "Hi", [*b"Hi"]),
        ([*b"Hi<|im_end|>no"], {"stop": ["<|im_end|>"]}, "Hi", [*b"Hi<|im_end|>"]),
        ([*b"Hi\n", IM_END, *b"no"], {"stop": ["\n<|im_end|>"]}, "Hi", [*b"Hi\n", IM_END]),
        ([*b"Hi", IM_END, *b"\nno"], {"stop": ["<|im_end|>\n"]}, "Hi", [*b"Hi", IM_END, *b"\n"]),
        ([*b"Hi", IM_END, END, *b"no"], {"stop": ["<|im_end|><|end|>"]}, "Hi", [*b"Hi", IM_END, END]),
        ([*b"a", IM_END, *b"b", EOS], {"stop": ["<|im_end|>\n"]}, "ab", [*b"a", IM_END, *b"b"]),
        ([*b"a", IM_END, *b"bc"], {"stop": ["ab"]}, "", [*b"a", IM_END, *b"b"]),
        ([*b"axy", IM_END], {"stop": ["xy<|im_end|>", "<|im_end|>"]}, "a", [*b"axy"]),  # the longest
        ([*b"axy", EOS], {"stop": ["xy</s>"]}, "a", [*b"axy"]),
        ([*b"axy", EOS], {"stop": {"yx</s>"}}, "axy", [*b"axy"]),
        ([*"é中".encode(), IM_END], {"stop": ["é", "中<|im_end|>"]}, "", [*"é".encode()]),
    ],
)
def test_stop_strings_that_name_special_tokens(script, options, text, ids):
    session = ScriptedSession(script, Tokenizer(SPECIAL))
    generation = run(session, **options)
    assert (generation.text, generation.ids, generation.finish_reason) == (text, ids, "stop")


PLAIN = byte_level()
PLAIN.add_tokens(["<|im_end|>", "ab"])
PLAIN_END, AB = PLAIN.token_to_id("<|im_end|>"), PLAIN.token_to_id("ab")


@pytest.mark.parametrize(
    ("script", "options", "text", "ids"),
    [
        ([*b"Hi", PLAIN_END, *b"no"], {"stop": ["<|im_end|>"]}, "Hi", [*b"Hi"]),
        ([*b"Hi\n", PLAIN_END, *b"no"], {"stop": ["\n<|im_end|>"]}, "Hi", [*b"Hi\n", PLAIN_END]),
        ([*b"Hi<|im_end|>no"], {"stop": ["<|im_end|>"]}, "Hi", [*b"Hi<|im_end|>"]),
        ([*b"x", AB, *b"y", PLAIN_END], {"stop": ["by", "<|im_end|>"]}, "xa", [*b"x", AB, *b"y"]),
        ([*b"x", AB, EOS], {"stop": ["<|im_end|>", "abc"]}, "xab", [*b"x", AB]),
    ],
)
def test_stop_strings_that_name_added_tokens_with_a_text(script, options, text, ids):
    generation = run(ScriptedSession(script, Tokenizer(PLAIN)), **options)
    assert (generation.text, generation.ids, generation.finish_reason) == (text, ids, "stop")


def test_max_new_tokens_1_runs_the_model_once():
    session = said("ab")
    generation = run(session, max_new_tokens=1)
    assert (generation.ids, generation.text, generation.finish_reason) == ([97], "a", "length")
    assert session.steps == [(0, PROMPT)]


@pytest.mark.parametrize("room", [0, 1, 5])
def test_context_full(room):
    session = ScriptedSession([9] * 70)
    generation = run(session, [1] * (CONFIG.max_position_embeddings - room))
    assert generation.finish_reason == "context"
    assert len(generation.ids) == room + 1
    assert session.length.tolist() == [CONFIG.max_position_embeddings]


def test_length_is_told_where_both_limits_meet():
    assert run(ScriptedSession([9] * 9), [1] * 60, max_new_tokens=5).finish_reason == "length"


# --- pieces ----------------------------------------------------------------------------------------------------------


def test_characters_are_whole():
    text = "né 中文 😀!"
    pieces = list(generate(said(text, EOS), PROMPT))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) == len(text.encode())


def test_a_character_cut_by_the_limit_is_dropped():
    assert run(said("a😀"), max_new_tokens=4).text == "a"


def test_without_tokenizer_ids_only():
    generation = generate(ScriptedSession([5, 6, EOS]), np.array(PROMPT))
    assert generation.text is None
    assert list(generation) == ["", ""]
    assert (generation.ids, generation.text, generation.prompt_tokens) == ([5, 6], None, 4)


def test_everything_can_be_read_at_any_time():
    generation = generate(said("abc", EOS), PROMPT, seed=11)
    assert (generation.text, generation.ids, generation.finish_reason, generation.seed) == ("", [], None, 11)
    assert generation.timings["ttft_ms"] is None
    assert next(generation) == "a"
    assert (generation.text, generation.ids, generation.finish_reason) == ("a", [97], None)
    assert generation.timings["tpot_ms"] is None
    assert generation.timings["ttft_ms"] == generation.timings["total_ms"] > 0
    list(generation)
    timings = generation.timings
    assert timings["decode_tokens_per_s"] == pytest.approx(1e3 / timings["tpot_ms"])
    assert timings["prompt_tokens_per_s"] == pytest.approx(4e3 / timings["ttft_ms"])
    assert timings["total_ms"] == pytest.approx(timings["ttft_ms"] + 3 * timings["tpot_ms"])


# --- interruption and errors -----------------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_there_is():
    generation = generate(said("ab\nU", KeyboardInterrupt()), PROMPT, stop=["\nUser"])
    pieces = []
    with pytest.raises(KeyboardInterrupt):
        pieces.extend(generation)
    assert (generation.text, generation.finish_reason, generation.ids) == ("ab\nU", "interrupted", [*b"ab\nU"])
    assert list(generation) == []


def test_close():
    generation = generate(said("ab\nUser"), PROMPT, stop=["\nUser"])
    assert [next(generation) for _ in range(4)] == ["a", "b", "", ""]
    generation.close()
    assert (generation.text, generation.finish_reason) == ("ab\nU", "interrupted")
    assert list(generation) == []
    done = run(said("a", EOS))
    done.close()
    assert done.finish_reason == "stop"


def test_an_error_ends_it():
    generation = generate(said("a", BackendError("the device is gone")), PROMPT)
    assert next(generation) == "a"
    with pytest.raises(BackendError, match="the device is gone"):
        next(generation)
    assert generation.finish_reason == "error"
    assert list(generation) == []


def test_nan_yields_no_token(model):
    broken = copy_of(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(BackendError, match="NaN"):
        list(generate(TorchSession(broken), [1]))


def test_two_generations_at_once_on_one_session_are_an_error():
    session = said("abcdef")
    first, second = generate(session, PROMPT), generate(session, PROMPT)
    next(first)
    next(second)
    next(second)
    with pytest.raises(InputError, match="something else used it"):
        next(first)


# --- prompts and options ---------------------------------------------------------------------------------------------


def test_text_prompt():
    session = said("!", EOS)
    assert run(session, "Hé").prompt_tokens == 4
    assert session.steps[0] == (0, [BOS, *"Hé".encode()])


def test_chat_prompt():
    chatty = Tokenizer(byte_level(), CHAT, {"bos_token": "<s>"})
    messages = [{"role": "user", "content": "Hi"}]
    for prompt, options in ("Hi", {"chat": True}), (messages, {}), (messages, {"chat": True}):
        session = ScriptedSession([EOS], chatty)
        run(session, prompt, **options)
        assert session.steps[0] == (0, [BOS, *b"[user]Hi>"])  # one <s>, not two


def test_a_prompt_loses_its_byte_order_mark():
    for prompt in "Hi", "\ufeffHi":
        session = ScriptedSession([EOS], Tokenizer(byte_level(), CHAT))
        run(session, prompt)
        assert session.steps[0] == (0, [BOS, *b"Hi"])
        session = ScriptedSession([EOS], Tokenizer(byte_level(), CHAT))
        run(session, prompt, chat=True)
        assert session.steps[0] == (0, [*b"[user]Hi>"])
    session = ScriptedSession([EOS], Tokenizer(byte_level()))
    run(session, "a\ufeff")  # elsewhere it is a character
    assert session.steps[0] == (0, [BOS, *"a\ufeff".encode()])


def chat_session(script, sampling=None):
    session = ScriptedSession(script, Tokenizer(SPECIAL, CHAT, {"bos_token": "<s>"}))
    session.chat_end_token_ids = frozenset({IM_END})
    session.chat_sampling = sampling or {}
    return session


def test_a_chat_also_ends_at_its_own_end_tokens():
    for end in (IM_END, EOS):
        generation = run(chat_session([*b"Hi", end, *b"no"]), "a", chat=True)
        assert (generation.text, generation.finish_reason) == ("Hi", "stop")
    plain = run(chat_session([*b"Hi", IM_END, EOS]), "a")
    assert plain.ids == [*b"Hi", IM_END]
    assert run(chat_session([IM_END, EOS]), "a", chat=True, ignore_eos=True, max_new_tokens=2).ids == [IM_END, EOS]


SAMPLING = {"temperature": 0.6, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, SAMPLING),
        ({"temperature": 1.0}, {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1}),
        ({"temperature": 0}, {"repetition_penalty": 1.1}),
        ({"top_k": 0, "top_p": 1, "repetition_penalty": 1}, {"temperature": 0.6}),
        ({"min_p": 0.1}, SAMPLING),
    ],
)
def test_a_chat_takes_the_models_sampling_where_it_is_left_open(options, taken):
    for prompt, chat in ("a", {"chat": True}), ([{"role": "user", "content": "a"}], {}):
        generation = generate(chat_session([], SAMPLING), prompt, **options, **chat)
        assert generation.defaults == taken
        assert generation._sampler.sampling == Sampling(**{**taken, **options})
    assert generate(chat_session([], SAMPLING), "a").defaults == {}
    assert generate(chat_session([], SAMPLING), "a")._sampler.sampling.greedy


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt has no tokens; give text"),
        ([1, 300], {}, "token id 300; expected 0 to 299"),
        ([-1], {}, "token id -1"),
        ([1.5], {}, "the prompt is float64"),
        ([True], {}, "the prompt is bool"),
        (np.array([[1, 2]]), {}, r"of shape \[1, 2\]"),
        ([[[1], [1, 2]]], {}, "cannot be read as token ids"),
        (b"text", {}, "expected text"),
        (None, {}, "expected text"),
        ([2**80], {}, "the prompt has token id a whole number of more than 20 digits"),
        ([1], {"chat": True}, "chat needs a prompt of text or messages"),
        ("Hi", {"chat": True}, "no chat template"),
        ([{"role": "user", "content": "Hi"}], {}, "no chat template"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0; expected a whole number from 1 up"),
        ([1], {"max_new_tokens": True}, "max_new_tokens is True"),
        ([1], {"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ([1], {"temperature": -1}, "temperature is -1"),
        ([1], {"stop": ["a", ""]}, "a stop string is ''"),
        ([1], {"stop": 3}, "stop is 3; expected a list of texts"),
        ([1], {"stop": [b"a"]}, "a stop string is b'a'"),
    ],
)  # fmt: skip
def test_input_that_makes_no_sense_is_refused_before_anything_runs(prompt, options, message):
    session = said("a")
    with pytest.raises(InputError, match=message):
        generate(session, prompt, **options)
    assert session.steps == []


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("Hi", {}, "no tokenizer; give token ids"),
        ([{"role": "user", "content": "Hi"}], {}, "no tokenizer; give token ids"),
        ([1], {"stop": ["a"]}, "stop strings need a tokenizer"),
    ],
)
def test_text_needs_a_tokenizer(prompt, options, message):
    with pytest.raises(InputError, match=message):
        generate(ScriptedSession([]), prompt, **options)


def test_empty_text_without_begin_token():
    library = byte_level()
    library.post_processor = None
    with pytest.raises(InputError, match="the prompt has no tokens"):
        generate(ScriptedSession([], Tokenizer(library)), "")


def test_prompt_that_is_too_long():
    with pytest.raises(CapacityError, match="the prompt has 65 tokens and the model 64 positions"):
        generate(ScriptedSession([]), [1] * 65)
