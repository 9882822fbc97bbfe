"""Texts that are generated at once: each is what it is alone, however they come and go."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.errors import BackendError, InputError
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.generation import batch as batches
from gta_edge.runtime.generation.batch import Batch
from gta_edge.runtime.generation.conversation import Conversation
from gta_edge.runtime.generation.kept_caches import KeptCaches
from gta_edge.runtime.generation.loop import generate
from gta_edge.runtime.generation.sampling import Sampling
from gta_edge.runtime.registry import load
from gta_edge.runtime.saved_cache import SavedCache
from tests.helpers.batches import Heard, run
from tests.helpers.managed_sessions import VOCAB, open_session

SAMPLING = {
    "greedy": {},
    "drawn": {"temperature": 1.3, "top_k": 20},
    "penalties": {"temperature": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7},
}


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_texts_that_come_and_go_are_each_as_alone(backend: str, data: st.DataObject) -> None:
    exact = {"exact": True} if backend == "onnxruntime" else {}
    random = np.random.default_rng(data.draw(st.integers(0, 999)))
    count, rows = data.draw(st.integers(2, 7)), data.draw(st.integers(1, 4))
    asked = []
    for _ in range(count):
        name = data.draw(st.sampled_from(sorted(SAMPLING)))
        begin = asked[int(random.integers(len(asked)))][0] if asked and random.random() < 0.5 else []
        ids = [*begin[: random.integers(0, 60)], *random.integers(0, VOCAB, random.integers(1, 50)).tolist()]
        sampling = {**SAMPLING[name], "seed": int(random.integers(99))}
        asked.append((ids, sampling, int(random.integers(1, 40)), int(random.integers(0, 30))))
    with open_session(backend, "gta", **exact, chunk_size=24, capacity_step=16) as session:
        kept = KeptCaches(data.draw(st.sampled_from([0, 60_000, 10**8])))
        batch = Batch(session, rows, stall_seconds=data.draw(st.sampled_from([0.0, 10.0])), kept=kept)
        texts: list[Heard] = []
        for step in range(400):
            for ids, sampling, tokens, arrives in asked:
                if arrives == step:
                    texts.append(Heard(session, ids, sampling=Sampling(**sampling), max_new_tokens=tokens))
                    batch.add(texts[-1].text)
            if not batch.step() and len(texts) == count:
                break
        assert batch.running == batch.waiting == 0
        assert batch.figures.generated_tokens == sum(len(text.said[0]) for text in texts)
        assert batch.figures.prompt_tokens == sum(text.text.answer.prompt_tokens for text in texts)
        assert batch.figures.cached_tokens == sum(text.text.cached_tokens for text in texts)
        asked.sort(key=lambda each: each[3])
        for text, (ids, sampling, tokens, _) in zip(texts, asked, strict=True):
            sampling = dict(sampling)
            penalties = {
                name: sampling.pop(name) for name in list(sampling) if name in ("presence_penalty", "frequency_penalty")
            }
            if penalties:
                alone = Heard(session, ids, sampling=Sampling(**sampling, **penalties), max_new_tokens=tokens)
                own = Batch(session, 1)
                own.add(alone.text)
                run(own)
                assert text.said == alone.said
            else:
                generation = generate(session, ids, max_new_tokens=tokens, ignore_eos=True, **sampling)
                list(generation)
                assert text.said[0] == generation.ids
                assert text.said[2] == generation.finish_reason


def test_text_stop_strings_and_end_tokens_are_those_of_generate(talker) -> None:
    prompts = [list(talker.tokenizer.encode(text)) for text in ("one", "two and more", "3", "four")]
    alone = [generate(talker, ids, max_new_tokens=30) for ids in prompts]
    whole = ["".join(each) for each in alone]
    ends = frozenset({alone[0].ids[7]})
    stop = (whole[1][5:8],)
    expected = []
    for ids in prompts:
        talker.end_token_ids = ends
        generation = generate(talker, ids, max_new_tokens=30, stop=stop)
        expected.append(("".join(generation), generation.ids, generation.finish_reason))
    batch = Batch(talker, 3, kept=KeptCaches(10**7))
    texts = [Heard(talker, ids, max_new_tokens=30, stop=stop, end_token_ids=ends, logprobs=3) for ids in prompts]
    for text in texts:
        batch.add(text.text)
    run(batch)
    assert [(text.said[1], text.said[0], text.said[2]) for text in texts] == expected
    assert "stop" in {text.said[2] for text in texts}
    for text in texts:  # an end token has its probability, though it is none of the ids
        ended = text.said[0] != [each.token for event in text.events for each in event.logprobs]
        assert text.text.completion_tokens == len(text.said[0]) + ended


def test_a_prompt_that_fills_the_context_ends_there(talker) -> None:
    batch = Batch(talker, 2)
    full, beside = Heard(talker, list(range(64))), Heard(talker, list(range(60)), max_new_tokens=3)
    for text in (full, beside):
        batch.add(text.text)
    run(batch)
    assert (len(full.said[0]), full.said[2]) == (1, "context")
    assert (len(beside.said[0]), beside.said[2]) == (3, "length")


def test_log_probabilities_are_those_of_the_models_own_distribution(talker) -> None:
    prompt = list(range(20, 40))
    drawn = Sampling(temperature=0.3, top_k=5, logit_bias={7: 100.0}, seed=1)
    text = Heard(talker, prompt, sampling=drawn, max_new_tokens=4, logprobs=4, prompt_logprobs=2)
    read = Heard(talker, prompt, max_new_tokens=0, prompt_logprobs=0)
    batch = Batch(talker, 2)
    for each in (text, read):
        batch.add(each.text)
    run(batch)
    assert text.said[0] == [7] * 4
    talker.reset()
    logits = talker.forward([prompt + [7] * 3], all_logits=True)[0].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert text.events[0].prompt_logprobs[0] is None
    assert len(text.events[0].prompt_logprobs) == 20
    assert not any(event.prompt_logprobs for event in text.events[1:])
    new = [each for event in text.events for each in event.logprobs]
    for row, found in enumerate([*text.events[0].prompt_logprobs[1:], *new]):
        assert found.token == (prompt + [7] * 4)[row + 1]
        assert found.logprob == pytest.approx(expected[row, found.token], abs=1e-4)
        top = np.argsort(-expected[row])[: len(found.top)]
        assert [token for token, _ in found.top] == top.tolist()
        assert [logprob for _, logprob in found.top] == pytest.approx(expected[row, top].tolist(), abs=1e-4)
    assert {len(each.top) for each in new} == {4}
    (only,) = read.events
    assert (only.ids, only.text, only.finish_reason) == ((), "", "length")
    assert [each and each.token for each in only.prompt_logprobs] == [None, *prompt[1:]]


@pytest.mark.parametrize("kind", ["texts", "ids", "chats"])
def test_a_list_of_prompts_is_answered_as_each_alone(talker, kind, monkeypatch) -> None:
    texts = ["one", "two and a little more", "3", "four", "five", "one", "seven", "eight", "nine", "ten"]
    prompts: Any = texts
    if kind == "ids":
        prompts = [talker.tokenizer.encode(text) for text in texts]
    if kind == "chats":
        prompts = [[{"role": "user", "content": text}] for text in texts]
        monkeypatch.setattr(type(talker.tokenizer), "apply_chat_template", lambda self, chat: f"[{chat[0]['content']}]")
        talker.chat_sampling = {"top_p": 0.9}
    options = {"max_new_tokens": 12, "seed": 3, "temperature": 1.0, "frequency_penalty": 0.5, "logit_bias": {65: 5.0}}
    answers = generate(talker, prompts, **options)
    heard = [""] * len(texts)
    for i, piece in answers:
        heard[i] += piece
    assert answers.prompt_tokens == sum(len(generate(talker, each, **options)._answer.all_ids) for each in prompts)
    assert answers.timings["tokens_per_step"] > 1.5
    for i, each in enumerate(prompts):
        alone = generate(talker, each, **options)
        assert heard[i] == "".join(alone) == answers.answers[i].text
        assert (answers.answers[i].ids, answers.answers[i].seed) == (alone.ids, 3)
        assert answers.defaults == alone.defaults


def test_lists_of_prompts_that_make_no_sense_are_refused(talker, monkeypatch) -> None:
    monkeypatch.setattr(type(talker.tokenizer), "apply_chat_template", lambda self, chat: "a chat")
    for prompts, options, message in [
        (["a", [{"role": "user", "content": "b"}]], {}, "some of the prompts are chats and some are not"),
        (["a", "b"], {"n": 2}, "several answers were asked for, and to several prompts"),
        (["a", "b"], {"speculate": "draft"}, "a draft model is for one answer"),
        (["a", "b"], {"conversation": Conversation(talker)}, "a conversation goes on with one answer"),
        ([[1], []], {}, r"^prompt\[1\] has no tokens"),
        ([[1], [300]], {}, r"^prompt\[1\] has token id 300"),
        (["a"], {"logit_bias": {300: 1.0}}, "logit_bias has token id 300"),
    ]:
        with pytest.raises(InputError, match=message):
            generate(talker, prompts, **options)


def test_a_failure_among_prompts_ends_them_all(talker, monkeypatch) -> None:
    answers = generate(talker, [[1, 2], [3]], max_new_tokens=9)
    next(answers)
    monkeypatch.setattr(talker, "_run", lambda *arguments: (_ for _ in ()).throw(BackendError("planted")))
    with pytest.raises(BackendError, match="planted"):
        list(answers)
    assert {each.finish_reason for each in answers.answers} == {"error"}
    assert list(answers) == []


@given(st.floats(1, 1000), st.floats(0, 0.05), st.lists(st.booleans(), max_size=30))
def test_parts_of_prompts_take_about_as_long_as_others_may_wait(rate, fixed, disturbed) -> None:
    """Whatever the machine does, and however long it was disturbed before."""
    pace = batches._Pace(0.1)
    for slow in disturbed:
        pace.note(pace.tokens, 100 * (fixed + pace.tokens / rate) if slow else fixed + pace.tokens / rate)
    for _ in range(20):
        pace.note(pace.tokens, fixed + pace.tokens / rate)
        pace.note(1, 10.0)  # a prompt's last part
    taken = fixed + pace.tokens / rate
    assert taken < 0.11 or pace.tokens == 16
    assert taken > 0.08


# --- what is not read again ------------------------------------------------------------------------------------------


def test_a_turn_of_a_chat_costs_its_own_tokens(talker) -> None:
    batch = Batch(talker, 2, kept=KeptCaches(10**7))
    first = Heard(talker, list(range(30)), max_new_tokens=8)
    batch.add(first.text)
    run(batch)
    turn = [*range(30), *first.said[0], 5, 6, 7]
    second, other = Heard(talker, turn, max_new_tokens=6), Heard(talker, [9] * 40, max_new_tokens=6)
    for each in (other, second):
        batch.add(each.text)
    run(batch)
    assert second.text.cached_tokens == 30 + 7  # the last token of an answer has not been run
    assert other.text.cached_tokens == 0
    assert batch.figures.cached_tokens == 37
    generation = generate(talker, turn, max_new_tokens=6)
    list(generation)
    assert second.said[0] == generation.ids


def test_texts_with_one_prompt_share_what_is_read_of_it(talker) -> None:
    prompt, batch = list(range(40)), Batch(talker, 3)
    options = {"max_new_tokens": 5, "prompt_logprobs": 1}
    texts = [Heard(talker, prompt, sampling=Sampling(temperature=1.0, seed=i), **options) for i in range(3)]
    for text in texts:
        batch.add(text.text)
    run(batch)
    assert [text.text.cached_tokens for text in texts] == [0, 40, 40]
    assert len(texts[0].events[0].prompt_logprobs) == 40
    assert all(text.events[0].prompt_logprobs == texts[0].events[0].prompt_logprobs for text in texts)
    for i, text in enumerate(texts):
        generation = generate(talker, prompt, temperature=1.0, seed=i, max_new_tokens=5)
        list(generation)
        assert text.said[0] == generation.ids


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=6), st.integers(1, 4)), max_size=12))
def test_kept_caches_stay_within_their_bytes_and_find_the_longest_prefix(texts) -> None:
    kept, most = KeptCaches(9), 9
    for ids, size in texts:
        kept.put(np.array(ids), SavedCache(len(ids), "fp32", {"key.0": np.full(size, len(ids), np.uint8)}))
        assert kept.nbytes <= most
        found = kept.find(np.array([*ids, 2]))  # what was put last is there, or what begins with it
        assert found is not None
        assert found[1] == len(ids)
    assert kept.find(np.array([2, 2])) is None
    before = len(kept), kept.nbytes
    kept.put(np.array([0, 2]), SavedCache(2, "fp32", {"key.0": np.zeros(most + 1, np.uint8)}))
    assert (len(kept), kept.nbytes) == before  # what never has room drives nothing out
    everything = KeptCaches(10**6)
    for ids, size in texts:
        everything.put(np.array(ids), SavedCache(len(ids), "fp32", {"key.0": np.zeros(size, np.uint8)}))
    maximal = {tuple(one) for one, _ in texts if not any(one == other[: len(one)] != other for other, _ in texts)}
    assert len(everything) == len(maximal)
    kept.flush()
    assert (len(kept), kept.nbytes) == (0, 0)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_what_is_reused_of_a_quantised_cache_is_as_if_it_had_been_read(tiny_bundle, dtype) -> None:
    """Of a block of 4 bits that has been closed, nothing is: it would be rounded twice."""
    random = np.random.default_rng(6)
    first = random.integers(0, 256, 90).tolist()
    with load(tiny_bundle, "torch", cache_dtype=dtype) as session:
        session.forward([[*first[:70], *first[:20]]])
        for tokens in (89, 65, 64, 50, 32, 20):
            saved, count = session.export_cache(), session.reusable(90, tokens)
            assert tokens - 32 < count <= tokens
            assert count == tokens or dtype == "int4"
            if count:
                session.truncate(0)
                session.forward([first[:70][:count] + first[:20][: max(count - 70, 0)]])
                expected = session.forward([first[20:40]], all_logits=True)
                session.import_cache(saved, 0, count)
                np.testing.assert_array_equal(session.forward([first[20:40]], all_logits=True), expected)
            session.import_cache(saved)
        batch, asked = Batch(session, 2, kept=KeptCaches(10**7)), [first, [*first[:75], 1, 2], first[:40], [*first, 7]]
        for ids in asked:
            text = Heard(session, ids, max_new_tokens=8)
            batch.add(text.text)
            run(batch)
            generation = generate(session, ids, max_new_tokens=8, ignore_eos=True)
            list(generation)
            assert text.said[0] == generation.ids
        assert batch.figures.cached_tokens >= 32 + 32 + 64


@pytest.mark.parametrize("options", [{"cache": policy("window", rows=24, interval=4)}, {"trees": True}], ids=str)
def test_other_caches_have_texts_at_once_too(options) -> None:
    random = np.random.default_rng(5)
    asked = [random.integers(0, VOCAB, n).tolist() for n in (30, 4, 50, 17, 9)]
    with open_session("onnxruntime", "gta", exact=True, chunk_size=16, **options) as session:
        batch = Batch(session, 3, kept=KeptCaches(10**7))
        texts = [Heard(session, ids, max_new_tokens=12 + 5 * i) for i, ids in enumerate(asked)]
        for each in texts:
            batch.add(each.text)
            batch.step()
        run(batch)
        for i, (each, ids) in enumerate(zip(texts, asked, strict=True)):
            generation = generate(session, ids, max_new_tokens=12 + 5 * i)
            list(generation)
            assert each.said[0] == generation.ids
