"""Several answers to one prompt: each as if alone; beam search as transformers has it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from gta_edge.errors import BackendError, InputError
from gta_edge.formats.tokenizer import Tokenizer
from gta_edge.model.decoder import Decoder
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.generation.loop import generate
from gta_edge.runtime.torch.session import TorchSession
from tests.helpers.generation import CONFIG, TableSession, byte_level

PROMPT = list(range(20, 30))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Decoder(CONFIG.replace(tie_word_embeddings=False)).eval()


def finished(generation):
    """Iterate to the end, and check the pieces against the texts."""
    pieces = [""] * len(generation.answers)
    for i, piece in generation:
        pieces[i] += piece
    for i, each in enumerate(generation.answers):
        assert each.text is None or each.text == pieces[i]
    return generation.answers


# --- n answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"temperature": 1.5}, {"temperature": 1.2, "top_k": 3, "repetition_penalty": 1.2}])
@pytest.mark.parametrize("trees", [True, False])
def test_each_answer_is_what_its_seed_gives_alone(model, trees, options):
    session = TorchSession(model, chunk_size=4, trees=trees)
    session.tokenizer = Tokenizer(byte_level())
    session.end_token_ids = frozenset(range(0, 300, 23))  # some end early
    generation = generate(session, PROMPT, n=5, max_new_tokens=16, seed=40, **options)
    answers = finished(generation)
    assert [each.seed for each in answers] == [40, 41, 42, 43, 44]
    assert len({tuple(each.ids) for each in answers}) > 3
    assert {each.finish_reason for each in answers} == {"stop", "length"}
    if trees:
        assert session.length.tolist() == [len(PROMPT)]
        assert session.rows.max() == len(PROMPT)
    alone = TorchSession(model, chunk_size=4)
    alone.tokenizer, alone.end_token_ids = session.tokenizer, session.end_token_ids
    for each in answers:
        one = generate(alone, PROMPT, max_new_tokens=16, seed=each.seed, **options)
        list(one)
        assert (each.ids, each.text, each.finish_reason) == (one.ids, one.text, one.finish_reason)


def test_the_prompt_is_read_once_and_what_is_said_twice_is_run_once(model):
    session = TorchSession(model, trees=True)
    widths, run = [], session._run

    def counted(ids, *arguments):
        widths.append(ids.shape[1])
        return run(ids, *arguments)

    session._run = counted
    finished(generate(session, PROMPT, n=4, max_new_tokens=6))
    assert widths == [10, 1, 1, 1, 1, 1]  # greedy, all say the same
    widths.clear()
    generation = generate(session, PROMPT, n=4, max_new_tokens=6, temperature=3.0, seed=1)
    finished(generation)
    assert widths == [10, 4, 4, 4, 4, 4]
    assert generation.timings["tokens_per_step"] == 4


@pytest.mark.parametrize("in_a_batch", [True, False])
def test_with_a_policy_the_prompt_is_read_once_or_where_it_has_dropped_it_again(model, in_a_batch, monkeypatch):
    session = TorchSession(model, cache=policy("window", rows=8, interval=4), chunk_size=4)
    monkeypatch.setattr(type(session), "max_batch", None if in_a_batch else 1)
    widths, run = [], session._run
    monkeypatch.setattr(session, "_run", lambda ids, *rest: widths.append(ids.shape[1]) or run(ids, *rest))
    generation = generate(session, PROMPT, n=3, max_new_tokens=12, temperature=1.5, seed=1)
    answers = finished(generation)
    assert widths == ([4, 4, 2] + [1] * 11 if in_a_batch else ([4, 4, 2] + [1] * 11) * 3)
    assert generation.timings["tokens_per_step"] == pytest.approx(3 if in_a_batch else 1)
    monkeypatch.undo()
    for each in answers:
        one = generate(session, PROMPT, max_new_tokens=12, temperature=1.5, seed=each.seed)
        list(one)
        assert each.ids == one.ids


def test_stop_strings_of_one_answer_end_it_alone():
    session = TableSession(np.zeros((60, 60, 60), np.float32), Tokenizer(byte_level()))
    answers = finished(generate(session, [1], n=6, max_new_tokens=40, temperature=1.0, seed=2, stop=["0", "1"]))
    assert all("0" not in each.text and "1" not in each.text for each in answers)
    assert len({len(each.ids) for each in answers}) > 2


def test_answers_can_be_stopped_and_fail_as_a_whole():
    session = TableSession(np.zeros((9, 9, 9), np.float32))
    generation = generate(session, [1], n=3, temperature=1.0, max_new_tokens=9)
    assert generation.timings["ttft_ms"] is None
    assert next(generation)[0] == 0
    generation.close()
    assert list(generation) == []
    assert {each.finish_reason for each in generation.answers} == {"interrupted"}
    session.table[:] = np.nan
    generation = generate(session, [1], n=3, temperature=1.0)
    with pytest.raises(BackendError, match="NaN"):
        next(generation)
    assert {each.finish_reason for each in generation.answers} == {"error"}
    session.table[:] = 0
    generation = generate(session, [1], n=2, temperature=1.0, max_new_tokens=9)
    next(generation)
    session.reset()
    with pytest.raises(InputError, match="something else used it"):
        list(generation)


def test_numbers_that_make_no_sense_are_refused():
    session = TableSession(np.zeros((9, 9, 9), np.float32))
    for options, message in (
        ({"n": 0}, "n is 0; expected a whole number from 1 to 256"),
        ({"n": 1.5}, "n is 1.5"),
        ({"beams": 10}, "beams is 10; expected a whole number from 1 to 9"),  # tokens that they can begin with
        ({"n": 4, "beams": 3}, "n is 4 and there are 3 beams"),
        ({"beams": 2, "length_penalty": "1"}, "length_penalty is '1'"),
        ({"length_penalty": 2.0}, "length_penalty is 2.0, and there is no search; give beams with it"),
        ({"beams": 2, "temperature": 1.0}, "beam search draws nothing"),
        ({"beams": 2}, "the session was loaded without; load it with trees=True"),
        ({"n": 2, "speculate": "lookup"}, "in a batch, and the session runs none"),
        ({"beams": 2, "speculate": "lookup"}, "a search guesses nothing"),
        ({"n": 2, "speculate": "draft"}, "a draft model is for one answer"),
        ({"n": 2, "speculate": "look"}, "speculate is 'look'"),
    ):
        with pytest.raises(InputError, match=message):
            generate(session, [1], **options)


# --- beam search -----------------------------------------------------------------------------------------------------


class TableModel(PreTrainedModel, GenerationMixin):
    """``TableSession``'s model for transformers."""

    config_class = PretrainedConfig

    def __init__(self, table):
        super().__init__(PretrainedConfig(vocab_size=len(table)))
        self.table = torch.nn.Parameter(torch.tensor(table))

    def forward(self, input_ids, **options):
        return CausalLMOutput(logits=self.table[input_ids[:, -2], input_ids[:, -1]][:, None])

    def prepare_inputs_for_generation(self, input_ids, **options):
        return {"input_ids": input_ids}


def transformers_beams(table, prompt, beams, ends, **options):
    """Return the answers that transformers finds, the end token included, and their scores."""
    config = GenerationConfig(
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=99,
        use_cache=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    found = TableModel(table).generate(torch.tensor([prompt]), generation_config=config)
    answers = [[token for token in each[len(prompt) :] if token != 99] for each in found.sequences.tolist()]
    return list(zip(answers, found.sequences_scores.tolist(), strict=True))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    beams=st.integers(2, 3),
    length_penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]),
    ends=st.sets(st.integers(0, 6), max_size=3).map(sorted),
    count=st.integers(1, 8),
    penalty=st.sampled_from([1.0, 1.4]),
)
def test_beams_are_those_of_transformers(seed, beams, length_penalty, ends, count, penalty):
    table = (2 * np.random.default_rng(seed).standard_normal((7, 7, 7))).astype(np.float32)
    session = TableSession(table, trees=True)
    session.end_token_ids = frozenset(ends)
    options = {"length_penalty": length_penalty, "max_new_tokens": count, "repetition_penalty": penalty}
    expected = transformers_beams(table, [1, 2], beams, ends, **options)
    answers = finished(generate(session, [1, 2], n=beams, beams=beams, **options))
    for each, (ids, score) in zip(answers, expected, strict=True):
        assert each.ids == (ids[:-1] if ids[-1] in ends else ids)
        assert each.finish_reason == ("stop" if ids[-1] in ends else "length")
        assert each.score == pytest.approx(score, rel=2e-5, abs=1e-5)
    assert session.length.tolist() == [2]


def test_beams_of_a_real_model_are_those_of_its_paths(model):
    """Against running every path alone, and every answer there is against the best that was found."""
    session, alone = TorchSession(model, trees=True), TorchSession(model)
    session.end_token_ids = frozenset(range(0, 300, 7))
    answers = finished(generate(session, PROMPT, n=3, beams=3, max_new_tokens=8, length_penalty=0.5))
    scores = [each.score for each in answers]
    assert scores == sorted(scores, reverse=True)
    for each in answers:
        alone.reset()
        logits = alone.forward([PROMPT + each.ids], all_logits=True)[0, len(PROMPT) - 1 :].astype(np.float64)
        after = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total = sum(after[i, token] for i, token in enumerate(each.ids))
        ended = each.finish_reason == "stop"
        ends = [after[-1, token] for token in session.end_token_ids] if ended else [0.0]
        score = [(total + end) / (len(each.ids) + ended) ** 0.5 for end in ends]
        assert min(abs(each.score - one) for one in score) < 1e-4
