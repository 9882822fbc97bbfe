"""What holds for every policy, whatever it scores by."""

import re
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gta_edge.errors import InputError
from gta_edge.runtime.cache_policies import COMMON, OPTIONS, POLICIES, policy
from gta_edge.runtime.cache_policies.base import DROPPED, CachePolicy, Rows
from tests.helpers.policy_rows import kept, permuted

NAMES = sorted(POLICIES)
OWN = [name for name in NAMES if name != "measured"]  # which decides nothing itself


def make(name: str, rows: int, residual_rows: int = 0) -> CachePolicy:
    """A policy with as few sinks as there may be, so that it takes any number of rows."""
    sinks = {"sinks": 0} if "sinks" in POLICIES[name].options else {}
    return policy(name, rows=rows, residual_rows=residual_rows, **sinks)


@st.composite
def a_case(draw: st.DrawFn) -> tuple[CachePolicy, Rows]:
    """A policy, and rows with many equal scores, some of them residual rows."""
    residual_rows = draw(st.integers(0, 3))
    budget = draw(st.integers(residual_rows + 1, 12))
    n = draw(st.integers(1, 30))
    length = n + draw(st.integers(0, 20))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    older = generator.choice(length - 1, n - 1, replace=False) if n > 1 else np.zeros(0, np.int64)
    positions = np.append(older, length - 1).astype(np.int64)
    counts = np.ones(n, np.float32)
    counts[: min(residual_rows, n - 1)] = 3
    chosen = make(draw(st.sampled_from(OWN)), budget, residual_rows)
    budgets = chosen.budgets(1)
    values = generator.integers(-1, 3, n) if chosen.observe == "mass" else generator.integers(-1, length, n)
    scores = None if chosen.observe is None else values.astype(np.float32)
    rows = Rows(0, None if budgets is None else int(budgets[0]), length, positions, scores, counts)
    return chosen, permuted(rows, generator.permutation(n))


@given(a_case())
@settings(deadline=None)
def test_budgets_are_held_and_the_newest_token_stays(case: tuple[CachePolicy, Rows]) -> None:
    chosen, rows = case
    decision = chosen.keep(rows)
    assert decision.keep.dtype == np.bool_ and decision.keep.shape == (len(rows),)
    assert rows.length - 1 in kept(rows, decision)
    assert decision.keep[rows.counts > 1].all()
    assert rows.budget is not None
    made = set() if decision.residual is None else set(decision.residual[~decision.keep].tolist()) - {DROPPED}
    existing = int((rows.counts > 1).sum())
    ordinary = int(decision.keep.sum()) - existing
    if len(rows) <= rows.budget:
        assert decision.keep.all() and decision.residual is None
    elif chosen.name != "corm":
        assert ordinary == min(rows.budget - chosen.residual_rows, len(rows) - existing)
    assert ordinary + max(existing, len(made)) <= rows.budget or len(rows) <= rows.budget


@given(a_case(), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_the_order_of_rows_changes_nothing(case: tuple[CachePolicy, Rows], seed: int) -> None:
    """Rows with equal scores too."""
    chosen, rows = case
    order = np.random.default_rng(seed).permutation(len(rows))
    first, second = chosen.keep(rows), chosen.keep(permuted(rows, order))
    assert second.keep.tolist() == first.keep[order].tolist()
    if first.residual is None:
        assert second.residual is None
    else:
        assert second.residual is not None
        assert second.residual[~second.keep].tolist() == first.residual[order][~second.keep].tolist()


@given(a_case())
@settings(deadline=None)
def test_what_is_evicted_goes_into_residual_rows_oldest_first(case: tuple[CachePolicy, Rows]) -> None:
    chosen, rows = case
    decision = chosen.keep(rows)
    evicted = ~decision.keep
    if not chosen.residual_rows or not evicted.any():
        assert decision.residual is None
        return
    assert decision.residual is not None and decision.residual.dtype == np.int64
    into = decision.residual[evicted][np.argsort(rows.positions[evicted])].tolist()
    assert into == sorted(into) and set(into) <= set(range(chosen.residual_rows))
    sizes = [into.count(i) for i in range(chosen.residual_rows)]
    assert max(sizes) - min(sizes) <= 1


# --- the table of names and options ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
def test_the_table_has_the_fields_of_the_classes(name: str) -> None:
    chosen = make(name, rows=100)
    assert chosen.name == name
    assert {field.name for field in fields(chosen)} | {"budgets"} == {*COMMON, *POLICIES[name].options}
    for field in fields(chosen):
        default = getattr(type(chosen), field.name)
        assert default is None or isinstance(default, OPTIONS[field.name].kind)


def test_the_table_has_no_option_that_no_policy_takes() -> None:
    assert set(OPTIONS) == set(COMMON).union(*(entry.options for entry in POLICIES.values()))
    assert all(len(entry.summary) <= 45 for entry in POLICIES.values())


def test_no_row_too_many_where_budgets_differ() -> None:
    for name in OWN:
        budgets = make(name, rows=100).budgets(7)
        assert budgets is not None and budgets.dtype == np.int64 and budgets.sum() == 700
    assert policy("corm").budgets(7) is None


@pytest.mark.parametrize("entry", [*OPTIONS.values()])
def test_help_is_one_line(entry: object) -> None:
    assert re.fullmatch(r"[^\n]{10,80}\.", getattr(entry, "help", ""))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("H2O", {}, "no cache policy is called 'H2O'; there are .*did you mean h2o"),
        ("measured", {"rows": 9, "rule": "lru"}, "no cache policy is called 'lru'; there are window, h2o"),
        ("measured", {"rows": 9, "rule": "measured"}, "rule is 'measured'; give the policy that decides"),
        ("measured", {"rows": 9, "sinks": 4}, "cache policy zsmerge has no option 'sinks'; it has rows"),
        ("measured", {"rule": "corm"}, "cache policy measured needs rows; say how many"),
        ("measured", {}, "cache policy measured needs rows; say how many"),
        ("measured", {"rule": ["h2o"], "rows": 9}, "no cache policy is called .'h2o'.; there are window"),
        ("h2o", {"rows": 9, "budgets": [1, 2]}, r"budgets is \[1, 2\]; give the path of a file"),
        ("window", {"rows": 9, "rotate": "no"}, "rotate is 'no'; give True or False"),
        ("window", {"rows": 9, "rotate": 1}, "rotate is 1; give True or False"),
        ("h2o", {"sinks": 4, "rows": 8}, "cache policy h2o has no option 'sinks'; it has rows, interval"),
        ("h2o", {"rule": "window", "rows": 8}, "cache policy h2o has no option 'rule'"),
        ("h2o", {}, "cache policy h2o needs rows; say how many of each layer stay"),
        ("h2o", {"rows": True}, "rows is True; give a whole number of at least 1"),
        ("h2o", {"rows": 1.5}, "rows is 1.5; give a whole number"),
        ("h2o", {"rows": 0}, "rows is 0; give a whole number of at least 1"),
        ("h2o", {"rows": 2, "residual_rows": 2}, "rows is 2; give a whole number of at least 3"),
        ("h2o", {"rows": 20, "residual_rows": 9}, "residual_rows is 9; give a whole number from 0 to 8"),
        ("h2o", {"rows": 20, "interval": 0}, "interval is 0; give a whole number of at least 1"),
        ("h2o", {"rows": 20, "recent": float("nan")}, "recent is nan; give a number from 0 to 1"),
        ("h2o", {"rows": 20, "recent": -0.1}, "recent is -0.1; give a number from 0 to 1"),
        ("window", {"rows": 4}, "rows is 4; give a whole number of at least 5"),
        ("window", {"rows": 4, "sinks": -1}, "sinks is -1; give a whole number of at least 0"),
        ("snapkv", {"rows": 40, "pooling": 4}, "pooling is 4; give an odd number of at least 1"),
        ("snapkv", {"rows": 40, "window": 0}, "window is 0; give a whole number of at least 1"),
        ("corm", {"window": "16"}, "window is '16'; give a whole number of at least 1"),
        ("corm", {"rows": 1}, "rows is 1; give a whole number of at least 2"),
        ("zsmerge", {"rows": 40, "decay": 1.01}, "decay is 1.01; give a number from 0 to 1"),
        ("pyramid", {"rows": 40, "shrink": "much"}, "shrink is 'much'; give a number from 0 to 1"),
        ("pyramid", {"rows": 40, "schedule": "cosin"}, "give one of cosine, linear, constant .did you mean cosine"),
        ("pyramid", {"rows": 4}, "rows is 4; give a whole number of at least 5"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(name: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        policy(name, **options)
    assert "\n" not in str(error.value)


def test_none_leaves_the_default() -> None:
    assert policy("window", rows=10, sinks=None) == policy("window", rows=10)
