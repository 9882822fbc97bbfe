"""Sampling against transformers' logits processors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gta_edge.errors import BackendError, InputError
from gta_edge.runtime.generation.sampling import Sampler, Sampling, draw

NO_IDS = np.zeros(0, np.int64)


def reference(logits, ids, *, temperature=None, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0):
    """The distribution of transformers' processors in its order, in float64."""
    seen, scores = torch.tensor(ids)[None], torch.tensor(logits, dtype=torch.float64)[None]
    if repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(repetition_penalty)(seen, scores)
    for warper in (
        temperature and TemperatureLogitsWarper(temperature),
        top_k and TopKLogitsWarper(top_k),
        top_p and top_p < 1 and TopPLogitsWarper(top_p),
        min_p is not None and MinPLogitsWarper(min_p),
    ):
        if warper:
            scores = warper(seen, scores)
    return scores.softmax(-1)[0].numpy()


# multiples of 1/8 in a small range: ties everywhere
logit_lists = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=60)
# odd fractions, so that no sum of probabilities lands on a threshold but for rounding
fractions = st.integers(1, 96).map(lambda n: n / 97)


@settings(deadline=None, max_examples=150)
@given(
    logits=logit_lists,
    picks=st.lists(st.integers(0, 10**6), max_size=8),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.none() | st.integers(1, 70),
    top_p=st.none() | fractions | st.just(1.0),
    min_p=st.none() | fractions | st.sampled_from([0.0, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
)
def test_distribution_is_that_of_transformers(logits, picks, **options):
    logits = np.array(logits, np.float32)
    ids = np.array([pick % len(logits) for pick in picks], np.int64)
    ours = Sampler(Sampling(**options)).probabilities(logits, ids)
    expected = reference(logits, ids, **options)
    if options["top_p"] is not None:  # which of equal tokens it drops depends on torch's sort, which is not stable
        ours, expected = np.sort(ours), np.sort(expected)
    assert ((ours > 0) == (expected > 0)).all()
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-12)  # exponentials are float32


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("top_k", [None, 50])
def test_distribution_over_a_large_vocabulary(top_p, top_k):
    logits = (np.random.default_rng(0).standard_normal(128256) * 4).astype(np.float32)
    ours = Sampler(Sampling(top_p=top_p, top_k=top_k)).probabilities(logits, NO_IDS)
    expected = reference(logits, NO_IDS, top_p=top_p, top_k=top_k)
    assert ((ours > 0) == (expected > 0)).all()
    np.testing.assert_allclose(ours, expected, rtol=2e-5)


def test_ties_with_the_kth_are_kept():
    probabilities = Sampler(Sampling(top_k=2)).probabilities(np.array([1, 3, 2, 2, 0], np.float32), NO_IDS)
    assert (probabilities > 0).tolist() == [False, True, True, True, False]


def test_top_p_keeps_the_last_of_equal_tokens():
    probabilities = Sampler(Sampling(top_p=0.6)).probabilities(np.zeros(4, np.float32), NO_IDS)
    assert (probabilities > 0).tolist() == [False, True, True, True]
    probabilities = Sampler(Sampling(top_p=0.5)).probabilities(np.zeros(4, np.float32), NO_IDS)
    assert (probabilities > 0).tolist() == [False, False, True, True]  # a sum that is just reached suffices


def test_draws_follow_the_distribution():
    logits = np.random.default_rng(1).standard_normal(12).astype(np.float32)
    sampler = Sampler(Sampling(temperature=0.8, top_p=0.9, seed=5))
    expected = sampler.probabilities(logits, NO_IDS)
    draws = 20000
    counts = np.bincount([sampler.sample(logits, NO_IDS) for _ in range(draws)], minlength=12)
    possible = expected > 0
    assert not counts[~possible].any()
    chi_square = ((counts - draws * expected)[possible] ** 2 / (draws * expected[possible])).sum()
    assert chi_square < 35  # at most 11 degrees of freedom: passed by 99.97% of seeds


def test_same_seed_same_draws_and_an_unknown_seed_is_told():
    logits = np.zeros(1000, np.float32)

    def draws(sampler):
        return [sampler.sample(logits, NO_IDS) for _ in range(20)]

    sampler = Sampler(Sampling(temperature=1))
    drawn = draws(sampler)
    assert drawn == draws(Sampler(Sampling(temperature=1, seed=sampler.seed)))
    assert drawn != draws(Sampler(Sampling(temperature=1)))


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"temperature": 0, "top_k": 5, "top_p": 0.5}])
def test_greedy_takes_the_first_of_the_largest(options):
    sampler = Sampler(Sampling(**options))
    logits = np.array([1, 5, 5, 4], np.float32)
    assert sampler.sample(logits, NO_IDS) == 1
    assert sampler.probabilities(logits, NO_IDS).tolist() == [0, 1, 0, 0]


@settings(deadline=None, max_examples=60)
@given(
    logits=logit_lists,
    prompt=st.lists(st.integers(0, 10**6), max_size=4),
    answer=st.lists(st.integers(0, 10**6), max_size=8),
    biases=st.dictionaries(st.integers(0, 10**6), st.integers(-100, 100), max_size=4),
    presence=st.sampled_from([0.0, 0.5, -2.0]),
    frequency=st.sampled_from([0.0, 0.25, -1.0]),
    repetition=st.sampled_from([1.0, 1.3]),
)
def test_biases_and_penalties_are_those_of_openai(logits, prompt, answer, biases, presence, frequency, repetition):
    size = len(logits)
    prompt, answer = [p % size for p in prompt], [a % size for a in answer]
    biases = {token % size: bias / 2 for token, bias in biases.items()}
    scores = [x + biases.get(token, 0) for token, x in enumerate(logits)]
    for token in set(prompt + answer):
        scores[token] = scores[token] * repetition if scores[token] < 0 else scores[token] / repetition
    for token in set(answer):
        scores[token] -= presence + frequency * answer.count(token)
    options = {"presence_penalty": presence, "frequency_penalty": frequency, "repetition_penalty": repetition}
    sampler = Sampler(Sampling(temperature=1, logit_bias=biases, **options), prompt_tokens=len(prompt))
    ours = sampler.probabilities(np.array(logits, np.float32), np.array(prompt + answer, np.int64))
    expected = torch.tensor(scores, dtype=torch.float64).softmax(-1).numpy()
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-12)


def test_greedy_heeds_a_bias():
    sampler = Sampler(Sampling(logit_bias={0: 4.5}))
    assert sampler.sample(np.array([1, 5, 5, 4], np.float32), NO_IDS) == 0


@pytest.mark.parametrize("bias", [{-1: 1}, {True: 1}, {1: 101}, {1: float("nan")}, {1: "1"}])
def test_biases_out_of_range_are_refused(bias):
    with pytest.raises(InputError, match="logit_bias"):
        Sampling(logit_bias=bias)


def test_greedy_heeds_the_repetition_penalty():
    sampler = Sampler(Sampling(repetition_penalty=2))
    assert sampler.sample(np.array([-1, -3, -1.5], np.float32), np.array([0, 0])) == 2
    assert sampler.sample(np.array([4, 3, 1], np.float32), np.array([0])) == 1


@pytest.mark.parametrize("option", ["top_k", "top_p", "min_p"])
def test_a_filter_alone_means_temperature_1(option):
    assert Sampling(**{option: 1}).effective_temperature == 1
    assert Sampling().greedy


def test_extreme_options_stay_finite():
    logits = np.array([3e38, -3e38, 1, -np.inf], np.float32)
    for options in (
        {"temperature": 5e-324},
        {"temperature": 1e308},
        {"temperature": 1, "repetition_penalty": 1e-308},
        {"temperature": 1, "repetition_penalty": 1e308},
        {"top_p": 1e-300},
        {"min_p": 1.0},
    ):
        probabilities = Sampler(Sampling(**options)).probabilities(logits, np.arange(3))
        assert np.isfinite(probabilities).all()
        assert probabilities.sum() == pytest.approx(1)


@pytest.mark.parametrize("options", [{}, {"temperature": 1}, {"top_k": 1}, {"repetition_penalty": 1.1}])
@pytest.mark.parametrize(
    ("value", "named"), [([0, np.nan, 1], "NaN at token id 1"), ([0, 1, np.inf], "inf"), ([-np.inf] * 3, "-inf")]
)
def test_broken_logits_yield_no_token(options, value, named):
    with pytest.raises(BackendError, match=named):
        Sampler(Sampling(**options)).sample(np.array(value, np.float32), NO_IDS)


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": value} for value in (-0.1, float("nan"), float("inf"), True, "1", 10**400)
    ]
    + [{"top_k": value} for value in (-1, 1.5, True)]
    + [{"top_p": value} for value in (0, 1.01, float("nan"), True)]
    + [{"min_p": value} for value in (-0.1, 1.01, float("nan"), False)]
    + [{"repetition_penalty": value} for value in (0, -1, float("nan"), float("inf"), True, None)]
    + [{"presence_penalty": value} for value in (-2.1, 2.1, float("nan"), None)]
    + [{"frequency_penalty": value} for value in (2.1, "1")]
    + [{"seed": value} for value in (-1, 2**63, 0.5, True)],
)  # fmt: skip
def test_options_out_of_range_are_refused(option):
    (name,) = option
    with pytest.raises(InputError, match=f"^{name} is "):
        Sampling(**option)


def test_numpy_numbers_are_numbers():
    sampling = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.int64(7))
    assert sampling.effective_temperature == 0.5
    assert Sampler(sampling).seed == 7


@settings(deadline=None, max_examples=80)
@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 0.25, 1.0]), min_size=1, max_size=40),
    uniform=st.floats(0, 1 - 2**-53),
)
def test_a_draw_is_where_the_running_sum_passes_the_number(weights, uniform):
    """Found by sums of blocks, which must come to the same, and never to a token without a probability."""
    weights = np.array([*weights, 1.0], np.float32)
    drawn = draw(weights, uniform)
    sums = np.concatenate([[0.0], weights.cumsum(dtype=np.float64)])
    assert weights[drawn] > 0
    slack = 1e-12 * sums[-1]
    assert sums[drawn] - slack <= uniform * sums[-1] <= sums[drawn + 1] + slack
