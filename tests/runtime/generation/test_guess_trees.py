"""Trees of guesses: the same text and cache as without, and drawn tokens with the same probabilities."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.errors import InputError
from gta_edge.runtime.generation import draft_model
from gta_edge.runtime.generation.conversation import Conversation
from gta_edge.runtime.generation.guesses import TEXT, likeliest, nodes_that_pay
from gta_edge.runtime.generation.loop import generate
from gta_edge.runtime.generation.sampling import Guess, Sampler, Sampling
from gta_edge.runtime.generation.speculation import SpeculativeSteps
from gta_edge.runtime.step_costs import WIDTHS
from gta_edge.runtime.tree_cache import TreeCache
from tests.helpers.generation import TableSession
from tests.helpers.managed_sessions import open_session
from tests.helpers.speculation import (
    TreeOracle,
    chi_square,
    costs_of,
    nothing,
    probabilities_of_three,
    table,
    with_costs,
)

OPTIONS = [
    {},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 0.9, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 4},
]


class EveryThird:
    """A constraint: each third token is an even one."""

    def __init__(self):
        self.taken = 0

    def prepare(self):
        pass

    def apply(self, logits):
        if self.taken % 3 == 2:
            logits[1::2] = -np.inf

    def accept(self, token):
        self.taken += 1
        return False


def run(session, prompt, **options):
    """Generate, and return the generation with what the cache holds then."""
    generation = generate(session, prompt, **options)
    list(generation)
    length = int(session.length[0])
    assert (session.rows == length).all()  # no node is left
    return generation, session.cached[:, :length].tolist()


# --- the same text ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 10**6),
    prompt=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    options=st.sampled_from(OPTIONS),
    constrained=st.booleans(),
    count=st.integers(1, 40),
    end=st.integers(0, 12),
    slope=st.sampled_from([0.0, 0.05]),
    drafted=st.booleans(),
)
def test_text_and_cache_are_those_without_it(seed, prompt, options, constrained, count, end, slope, drafted):
    """Of greedy text with a draft model too, whose draws have a test of their own."""
    session = TableSession(table(seed, 5, 3.0), positions=60, trees=True)
    session.end_token_ids = frozenset({end})

    def begin():
        constraint = EveryThird() if constrained else None
        return {"max_new_tokens": count, "constraint": constraint, **options}

    plain, kept = run(session, prompt, **begin())
    guesses = {"speculate": "lookup"}
    if drafted and "seed" not in options:
        guesses = {"draft": TableSession(table(seed, 5, 3.0) + table(seed + 1, 5, 1.5))}
    found, kept_too = run(with_costs(session, slope), prompt, **guesses, **begin())
    assert (found.ids, found.finish_reason) == (plain.ids, plain.finish_reason)
    assert kept_too == kept
    session.truncate(len(kept[0]) - 1)
    session.forward([[1]])


def test_a_tree_accepts_what_a_chain_does_not():
    """1 2 was followed by 3 5 6, and then by 4 7 8; the model says 3 5 6 again."""
    values = np.zeros((10, 10, 10), np.float32)
    values[9, 1, 2] = values[1, 2, 3] = values[2, 3, 5] = values[3, 5, 6] = 9
    prompt, calls = [0, 1, 2, 3, 5, 6, 7, 1, 2, 4, 7, 8, 9, 1], {}
    for trees in (False, True):
        session = with_costs(TableSession(values, trees=trees), 0.0)
        generation = generate(session, prompt, speculate="lookup", max_new_tokens=20)
        list(itertools.islice(generation, 4))
        assert generation.ids == [2, 3, 5, 6]
        calls[trees] = len(session.widths) - 1
        assert set(session.widths[1:]) <= set(WIDTHS)
    assert calls == {False: 2, True: 1}


def test_where_there_is_no_room_for_a_tree_guesses_are_chains():
    """As in an engine, which was built for so many rows."""
    session, plain = TableSession(table(3, 5, 3.0), trees=True), TableSession(table(3, 5, 3.0))
    session._cache = TreeCache(session.config, max_rows=41, spare=24)
    prompt = [1, 2, 3, 1, 2, 4, 1, 2, 0, 1, 2]
    found, kept = run(with_costs(session, 0.0), prompt, speculate="lookup", max_new_tokens=30)
    assert session.tree_room() == 0
    assert max(session.widths[-12:]) > 1
    wanted, kept_too = run(plain, prompt, max_new_tokens=30)
    assert found.ids == wanted.ids
    assert kept == kept_too
    with pytest.raises(InputError, match="there is no sequence 1: the cache holds 1"):
        session.tree_room(1)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_models_cache_is_that_without_it(backend):
    """Rows of paths that lie apart are moved into place; up to rounding of wider calls they hold the same."""
    with open_session(backend, "gta", trees=True) as session:
        session.end_token_ids, prompt = frozenset(), list(range(10))
        plain = generate(session, prompt, max_new_tokens=24)
        list(plain)
        kept, more = session.export_cache(), session.forward([[1]])
        for oracle in (TreeOracle(plain.ids, 10, 4), TreeOracle(plain.ids, 10, 10**6)):
            guessed = generate(with_costs(session, 0.0), prompt, max_new_tokens=24)
            guessed._steps = SpeculativeSteps(session, oracle, 34)
            list(guessed)
            assert guessed.ids == plain.ids
            assert guessed.timings["tokens_per_step"] > 2.5
            found = session.export_cache()
            assert found.length == kept.length
            for name, array in kept.tensors.items():
                np.testing.assert_allclose(found.tensors[name], array, atol=1e-4)
            np.testing.assert_allclose(session.forward([[1]]), more, atol=1e-4)


def test_a_conversation_goes_on_after_trees_of_guesses():
    session = with_costs(TableSession(table(5, 5, 3.0), trees=True), 0.0)
    conversation, options = Conversation(session), {"speculate": "lookup", "max_new_tokens": 30}
    prompt = [1, 2, 3, 1, 2, 4, 1, 2]
    generation = conversation.generate(prompt, **options)
    for _ in generation:
        if session.rows[0, 0] > session.length[0] + 2:  # a tree was run, and nothing of it is accepted
            break
    said = generation.ids
    assert generation.finish_reason is None
    whole = [*prompt, *said, 3]
    again, kept = run(session, whole, conversation=conversation, **options)
    assert conversation.reused_tokens >= len(prompt)
    assert conversation.ids.tolist() == kept[0]
    with pytest.raises(InputError, match="another generation of the conversation began"):
        list(generation)
    fresh, _ = run(TableSession(table(5, 5, 3.0)), whole, max_new_tokens=30)
    assert again.ids == fresh.ids


# --- the same probabilities ------------------------------------------------------------------------------------------


class WithReplacement(Sampler):
    """A fault: the second guess is judged as if it could have been the first again."""

    def _sample_by(self, guess, wanted):
        for token in guess.tokens:
            if self._random.random() * guess.probabilities[token] < wanted[token]:
                return token
            rest = np.maximum(wanted - guess.probabilities, 0)
            wanted = rest / rest.sum()
        return self.draw_from(wanted)


class WithoutRest(Sampler):
    """A fault: the second guess is judged by the whole distribution."""

    def _sample_by(self, guess, wanted):
        for token in guess.tokens:
            if super()._sample_by(Guess([token], guess.probabilities), wanted) == token:
                return token
        return self.draw_from(wanted)


def test_a_token_drawn_by_several_guesses_has_its_probability():
    options = {"temperature": 1.0, "top_p": 0.95}
    rng, none = np.random.default_rng(5), np.zeros(0, np.int64)
    logits, others = rng.normal(0, 1.5, (2, 6)).astype(np.float32)
    statistics = []
    for kind in (Sampler, WithReplacement, WithoutRest):
        sampler, drafter = kind(Sampling(**options, seed=1)), Sampler(Sampling(**options, seed=2))
        wanted, drafted = (drafter.probabilities(each, none) for each in (logits, others))
        guesses = (Guess(drafter.draw_several(drafted, 3), drafted) for _ in range(1500))
        tokens = [sampler.sample(logits, none, guess) for guess in guesses]
        statistics.append(chi_square(np.bincount(tokens, minlength=6), wanted)[0])
    right, *faulty = statistics
    assert right < 23  # at most 5 degrees of freedom: passed by 99.97% of seeds
    assert min(faulty) > 60


def test_answers_drawn_with_a_tree_of_a_draft_model_have_their_probabilities(monkeypatch):
    """Of all three tokens together, so that what one of them leaves behind would show in the next."""
    monkeypatch.setattr(draft_model, "_EXPECTED", (0.4, 0.5, 0.3, 0.1))  # so that trees come at once
    options, prompt = {"temperature": 0.9, "top_p": 0.95}, [1, 2]
    target, draft = TableSession(table(1, 4, 1.2), trees=True), TableSession(table(2, 4, 1.0))
    with_costs(target, 0.0)
    wanted = probabilities_of_three(target.table, prompt, options)
    counts = np.zeros((4, 4, 4), int)
    for seed in range(1000):
        generation = generate(target, prompt, max_new_tokens=8, draft=draft, seed=seed, **options)
        list(itertools.islice(generation, 3))
        counts[tuple(generation.ids)] += 1
    assert {(True, 4), (True, 6)} & target.step_costs._used.keys()  # calls for trees
    statistic, freedom = chi_square(counts.ravel(), wanted.ravel())
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


# --- which tokens are guessed ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=2), min_size=2, max_size=2), st.integers(1, 4))
def test_the_first_of_what_is_offered_are_the_best_tree_of_their_number(chances, count):
    """Compared with all trees of up to 6 tokens, with chances that go by the depth."""

    def following(depth):
        return [(chance, depth + 1) for chance in chances[depth]] if depth < len(chances) else []

    whole = [candidate for candidate, _ in likeliest(100, 0, following)]
    assert [candidate for candidate, _ in likeliest(count, 0, following)] == whole[:count]
    assert len(whole) == len(chances[0]) * (1 + len(chances[1]))
    chosen = itertools.combinations(range(len(whole)), min(count, len(whole)))
    trees = [nodes for nodes in chosen if all(whole[node].parent in (TEXT, *nodes) for node in nodes)]
    best = max(sum(whole[node].likelihood for node in nodes) for nodes in trees)
    assert sum(candidate.likelihood for candidate in whole[:count]) == pytest.approx(best)


def test_a_tree_is_guessed_where_it_pays_and_a_chain_where_not():
    def offered(*chances):
        return [each for each, _ in likeliest(15, 0, lambda depth: [(chance, depth + 1) for chance in chances])]

    def is_chain(nodes, candidates):
        return [candidates[node].parent for node in nodes] == [TEXT, *nodes[:-1]]

    alike = offered(0.5, 0.9)
    free, steep, dear = costs_of(0.0), costs_of(0.3), costs_of(0.0)
    for _ in range(2):
        dear.add(8, 3.0, tree=True)  # trees cost three times as much, of other widths too
    assert len(nodes_that_pay(free, alike, nothing)) == 15
    assert not is_chain(nodes_that_pay(free, alike, nothing), alike)
    assert is_chain(nodes_that_pay(dear, alike, nothing), alike)
    assert dear.seconds(16, tree=True) == 3.0
    assert len(nodes_that_pay(steep, alike, nothing)) == 2
    assert is_chain(nodes_that_pay(free, sure := offered(0.99, 0.1), nothing), sure)
    branching = nodes_that_pay(free, alike, nothing)
    assert branching.index(0) == 0  # the likeliest path first, whose rows are then in place
    assert all(alike[node].parent in (TEXT, *branching[:at]) for at, node in enumerate(branching))
