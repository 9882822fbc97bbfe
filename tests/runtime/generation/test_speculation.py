"""Speculative decoding: the same text as without it, and drawn tokens with the same probabilities."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.errors import InputError
from gta_edge.formats.tokenizer import Tokenizer
from gta_edge.model.decoder import Decoder
from gta_edge.runtime.cache_policies import policy
from gta_edge.runtime.generation.batch_guesses import width_that_pays
from gta_edge.runtime.generation.guesses import TEXT, nodes_that_pay
from gta_edge.runtime.generation.lookup import PromptLookup
from gta_edge.runtime.generation.loop import generate
from gta_edge.runtime.generation.sampling import Guess, Sampler, Sampling
from gta_edge.runtime.generation.speculation import SpeculativeSteps
from gta_edge.runtime.step_costs import WIDTHS, StepCosts
from gta_edge.runtime.torch.session import TorchSession
from tests.helpers.generation import CONFIG, TableSession, byte_level
from tests.helpers.speculation import (
    Oracle,
    chain,
    chi_square,
    costs_of,
    nothing,
    probabilities_of_three,
    table,
    with_costs,
)

OPTIONS = [
    {},
    {"repetition_penalty": 1.3},
    {"temperature": 0.7, "top_k": 5, "seed": 3},
    {"temperature": 1.3, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 4},
]


# --- the same text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("wrong_every", [2, 3, 10**6])
def test_text_and_cache_are_those_without_it_whatever_is_guessed(options, wrong_every):
    """Of a real model, whose calls of other widths round otherwise: by far less than its logits lie apart."""
    prompt, model = list(range(20, 30)), Decoder(CONFIG.replace(tie_word_embeddings=False))
    session = TorchSession(model.eval(), chunk_size=4)
    session.end_token_ids = frozenset()
    plain = generate(session, prompt, max_new_tokens=20, **options)
    list(plain)
    length, kept = session.length, session.forward([[1]])
    with_costs(session)
    speculative = generate(session, prompt, max_new_tokens=20, **options)
    speculative._steps = SpeculativeSteps(session, Oracle(plain.ids, 10, wrong_every), 30)
    list(speculative)
    assert (speculative.ids, speculative.finish_reason) == (plain.ids, plain.finish_reason)
    assert session.length.tolist() == length.tolist()
    np.testing.assert_allclose(session.forward([[1]]), kept, atol=1e-4)
    timings = speculative.timings
    assert timings["accepted"] <= timings["drafted"]
    assert timings["tokens_per_step"] == pytest.approx(19 / speculative._steps.counts.calls)
    if wrong_every > 20:
        assert timings["tokens_per_step"] > 6


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    prompt=st.lists(st.integers(0, 5), min_size=1, max_size=30),
    options=st.sampled_from(OPTIONS),
    count=st.integers(1, 40),
    end=st.integers(0, 20),
    slope=st.sampled_from([0.0, 0.1, 0.4]),
)
def test_lookup_gives_the_same_text(seed, prompt, options, count, end, slope):
    session = TableSession(table(seed, 6, 3.0))
    session.end_token_ids = frozenset({end})
    plain = generate(session, prompt, max_new_tokens=count, **options)
    list(plain)
    length, calls = session.length, len(session.widths)
    speculative = generate(with_costs(session, slope), prompt, max_new_tokens=count, speculate="lookup", **options)
    pieces = [next(speculative, None) for _ in range(count + 1)]
    assert pieces[-1] is None
    assert (speculative.ids, speculative.finish_reason) == (plain.ids, plain.finish_reason)
    assert session.length.tolist() == length.tolist()
    assert len(session.widths) <= 2 * calls


def test_a_loop_is_guessed_whole():
    """Logits that make 0 1 2 3 0 1 2 3 follow each other."""
    values = np.zeros((8, 8, 8), np.float32)
    for token in range(4):
        values[:, token, (token + 1) % 4] = 9
    session = with_costs(TableSession(values))
    generation = generate(session, [0], max_new_tokens=100, speculate="lookup")
    list(generation)
    assert generation.ids == [i % 4 for i in range(1, 101)]
    assert generation.timings["tokens_per_step"] > 5
    assert set(session.widths) <= set(WIDTHS)


def test_a_draft_model_that_is_as_good_is_followed():
    target, draft = TableSession(table(1)), TableSession(table(1))
    plain = generate(target, [1, 2], max_new_tokens=60)
    list(plain)
    generation = generate(with_costs(target), [1, 2], max_new_tokens=60, draft=draft)
    list(generation)
    assert generation.ids == plain.ids
    assert generation.timings["tokens_per_step"] > 5
    assert generation.timings["accepted"] == generation.timings["drafted"]


def test_a_draft_model_of_no_use_is_hardly_asked():
    target, draft = TableSession(table(1)), TableSession(table(2))
    plain = generate(target, [1, 2], max_new_tokens=300)
    list(plain)
    before = len(target.widths)
    generation = generate(with_costs(target, 0.3), [1, 2], max_new_tokens=300, speculate="draft", draft=draft)
    list(generation)
    assert generation.ids == plain.ids
    assert sum(width - 1 for width in target.widths[before + 1 :]) < 40
    assert len(draft.widths) < 60


def test_a_draft_model_may_have_fewer_positions_and_ids():
    target, draft = TableSession(table(1, 12)), TableSession(table(1, 12)[:9, :9, :9], positions=20)
    target.tokenizer = draft.tokenizer = Tokenizer(byte_level())
    target.tokenizer.encode = lambda text: [ord(c) % 9 for c in text]
    for options in ({"top_k": 3, "seed": 1}, {}, {"top_k": 3, "seed": 2, "repetition_penalty": 1.1}):
        generation = generate(with_costs(target), [1, 2, 3], max_new_tokens=40, draft=draft, **options)
        list(generation)
        assert len(generation.ids) == 40
        generation = generate(target, [1] * 30, max_new_tokens=5, draft=draft, **options)
        list(generation)
        assert generation.timings["drafted"] == 0


# --- the same probabilities ------------------------------------------------------------------------------------------


class WithoutRest(Sampler):
    """A fault: after a guess was not taken, a draw as if there had been none."""

    def _sample_by(self, guess, wanted):
        for token in guess.tokens:
            if self._random.random() * guess.probabilities[token] < wanted[token]:
                return token
        return self.draw_from(wanted)


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.6, "top_p": 0.8}, {"top_k": 3}])
def test_a_token_drawn_by_a_guess_has_its_probability(options):
    rng, nothing = np.random.default_rng(7), np.zeros(0, np.int64)
    logits, others = rng.normal(0, 0.7, (2, 8)).astype(np.float32)
    statistics = []
    for kind in (Sampler, WithoutRest):
        sampler, drafter = kind(Sampling(**options, seed=1)), Sampler(Sampling(**options, seed=2))
        wanted, drafted = (drafter.probabilities(each, nothing) for each in (logits, others))
        guesses = (Guess([drafter.draw_from(drafted)], drafted) for _ in range(4000))
        tokens = [sampler.sample(logits, nothing, guess) for guess in guesses]
        statistics.append(chi_square(np.bincount(tokens, minlength=8), wanted)[0])
    right, faulty = statistics
    assert right < 26  # at most 7 degrees of freedom: passed by 99.95% of seeds
    assert faulty > 100


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 2}])
def test_answers_drawn_with_a_draft_model_have_their_probabilities(options):
    """Of all three tokens together, so that what one of them leaves behind would show in the next."""
    target, draft, prompt = TableSession(table(1, 4, 1.0)), TableSession(table(2, 4, 1.0)), [1, 2]
    with_costs(target, 0.0)
    wanted = probabilities_of_three(target.table, prompt, options)
    counts, accepted, drafted = np.zeros((4, 4, 4), int), 0, 0
    for seed in range(1500):
        generation = generate(target, prompt, max_new_tokens=3, draft=draft, seed=seed, **options)
        list(generation)
        counts[tuple(generation.ids)] += 1
        accepted, drafted = accepted + generation._steps.counts.accepted, drafted + generation._steps.counts.drafted
    assert 0.2 * drafted < accepted < 0.9 * drafted  # both cases happened
    statistic, freedom = chi_square(counts.ravel(), wanted.ravel())
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


# --- how much is guessed ---------------------------------------------------------------------------------------------


def test_the_width_of_a_call_is_the_one_of_which_a_token_costs_least():
    for slope, chance in itertools.product([0.0, 0.05, 0.2, 0.5, 1.0], [0.05, 0.5, 0.8, 0.99]):
        found = 1 + len(nodes_that_pay(costs_of(slope), chain([chance] * 15), nothing))
        per_token = {w: (1 + slope * (w - 1)) / sum(chance**i for i in range(w)) for w in WIDTHS}
        assert per_token[found] <= 1.02 * min(per_token.values())
        assert not nodes_that_pay(costs_of(slope), chain([chance] * 15), lambda chosen: 2.0 * len(chosen))
    assert len(nodes_that_pay(costs_of(0.0), chain([1.0] * 4), nothing)) == 3  # of the widths that are used
    assert not nodes_that_pay(costs_of(0.0), [], nothing)
    assert not nodes_that_pay(StepCosts(), chain([1.0] * 15), nothing)  # nothing was measured


def test_costs_are_those_measured_and_straight_lines_between():
    costs = StepCosts()
    for width, seconds in ((1, 9.0), (1, 1.0), (1, 1.2), (1, 1.1), (4, 50.0), (4, 2.0)):
        costs.add(width, seconds)
    assert [costs.seconds(w) for w in (1, 2, 4, 8)] == pytest.approx([1.1, 1.4, 2.0, 3.2])
    for _ in range(200):
        costs.add(1, 1.0)
    costs.add(2, 7.0)
    costs.add(2, 1.1)
    assert costs.seconds(4) == pytest.approx(1.3)  # what 4 took is too long ago


def test_a_single_token_is_measured_anew_where_all_calls_are_wider():
    """Where something else had the machine while single tokens were measured, guesses seem to pay that do not."""
    costs, offered = costs_of(1.0), chain([0.5] * 15)
    assert not nodes_that_pay(costs, offered, nothing)
    for _ in range(9):
        costs.add(1, 50.0)
    widths = []
    for _ in range(150):
        assert width_that_pays(costs, [offered]) == 1 or not costs.due
        widths.append(1 if costs.due else 1 + len(nodes_that_pay(costs, offered, nothing)))
        costs.add(widths[-1], float(widths[-1]))
    assert min(widths[:40]) > 1
    assert set(widths[-10:]) == {1}
    assert not nodes_that_pay(costs, offered, nothing)
    session = with_costs(TableSession(np.eye(8, dtype=np.float32)[None].repeat(8, 0)))  # it says the same for ever
    for _ in range(2):
        session.step_costs.add(1, 1.0)
    list(generate(session, [1, 1, 1], max_new_tokens=1200, speculate="lookup"))
    assert 1 not in session.widths[1:40]
    assert 1 in session.widths[40:60]


@settings(deadline=None, max_examples=100)
@given(ids=st.lists(st.integers(0, 2), min_size=1, max_size=60), limit=st.integers(0, 6))
def test_lookup_finds_what_followed_the_longest_match(ids, limit):
    """And with branches what followed the other matches too, after what the same chain begins with."""
    chains, trees = PromptLookup(), PromptLookup()
    for end in range(1, len(ids) + 1):
        offered = chains.offer(np.array(ids[:end]), limit, branches=False)
        offered_too = trees.offer(np.array(ids[:end]), limit, branches=True)
    matches = {}  # by their length, at most 16, the last place that follows one
    places = {
        count: [p for p in range(count, end) if ids[p - count : p] == ids[end - count :]][-16:] for count in (1, 2)
    }
    for place in places[2] or places[1][-1:]:
        length = next(n for n in range(16, 0, -1) if n <= place and ids[place - n : place] == ids[end - n :])
        matches[length] = place
    expected = []
    if matches:
        source = matches[max(matches)]
        whole = list(ids)
        for i in range(limit):
            whole.append(whole[source + i])
        expected = whole[end:]
    draft = chains.draft(range(len(offered)))
    assert draft.ids.tolist() == expected
    assert draft.is_chain
    assert all(0 < candidate.likelihood < 1 for candidate in [*offered, *offered_too])
    tree, node = trees.draft(range(len(offered_too))), TEXT
    for token in expected:
        following = tree.after(node)
        if not following:  # others are likelier
            break
        node = following[0]
        assert tree.ids[node] == token
    first = [int(tree.ids[node]) for node in tree.after(TEXT)]
    assert len(first) == len(set(first))
    assert set(first) <= {ids[place] for place in places[1] + places[2]}


def test_guesses_that_are_not_run_are_judged_too():
    lookup, rng = PromptLookup(), np.random.default_rng(0)
    ids = rng.integers(0, 6, 600)  # pairs come again and again, and what follows is by chance
    offered = [lookup.offer(ids[:n], 15, branches=True) for n in range(1, 600)]
    assert np.mean([each[0].likelihood for each in offered[-100:] if each]) < 0.3


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused():
    session, draft = TableSession(table(1)), TableSession(table(1))
    for options, message in (
        ({"speculate": "lookups"}, "speculate is 'lookups'; expected one of lookup, draft, off"),
        ({"speculate": "draft"}, "speculate is 'draft' with no draft model; give draft="),
        ({"speculate": "lookup", "draft": draft}, "speculate is 'lookup' with a draft model"),
        ({"draft": "bundle"}, "the draft model is 'bundle'; expected a session: load its bundle"),
        ({"draft": session}, "the draft model is the model itself"),
        ({"draft": TableSession(table(1, 9))}, "the draft model has 9 token ids and the model 12"),
    ):
        with pytest.raises(InputError, match=message):
            generate(session, [1], **options)
    session.tokenizer = Tokenizer(byte_level())
    with pytest.raises(InputError, match="the draft model has no tokenizer"):
        generate(session, [1], draft=draft)
    draft.tokenizer = Tokenizer(byte_level(["more"]))
    with pytest.raises(InputError, match="another tokenizer"):
        generate(session, [1], draft=draft)


# --- cache policies --------------------------------------------------------------------------------------------------


def test_with_a_policy_rows_go_when_they_would_go_one_by_one():
    torch.manual_seed(1)
    model = Decoder(CONFIG.replace(tie_word_embeddings=False)).eval()
    for options in ({"rows": 12, "sinks": 2, "interval": 7}, {"rows": 12, "interval": 5, "rotate": True}):
        session = TorchSession(model, chunk_size=8, cache=policy("window", **options))
        session.end_token_ids = frozenset()
        plain = generate(session, list(range(20, 40)), max_new_tokens=30)
        list(plain)
        rows = session.rows
        with_costs(session)
        speculative = generate(session, list(range(20, 40)), max_new_tokens=30)
        speculative._steps = SpeculativeSteps(session, Oracle(plain.ids, 20, 5), 50)
        list(speculative)
        assert speculative.ids == plain.ids
        assert session.rows.tolist() == rows.tolist()
        assert speculative.timings["tokens_per_step"] > 1.5


def test_a_policy_that_observes_is_refused():
    session = TorchSession(Decoder(CONFIG), cache=policy("tova", rows=12))
    with pytest.raises(InputError, match="cache policy tova observes attention"):
        generate(session, [1], speculate="lookup")
