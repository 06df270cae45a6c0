"""Intervals by simulation and brute force, tests against statsmodels and enumeration, benefit by hand."""

from __future__ import annotations

import itertools
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

import icl_helpers as icl
from icl_helpers.results.statistics import (
    accuracy_interval,
    accuracy_intervals,
    cohens_g,
    comparisons,
    difference_interval,
    holm,
    icl_benefit,
    is_distinguishable,
    mean_interval,
    paired_test,
)


def simulated(seeds: int, document_spread: float, seed_spread: float) -> float:
    """How often, in 500 runs made here, the interval holds the true accuracy of 0.6."""
    hits = 0
    for trial in range(500):
        rng = np.random.default_rng([11, trial])
        documents = rng.uniform(-document_spread, document_spread, (200, 1))
        chance = 0.6 + documents + rng.normal(0, seed_spread, (1, seeds))
        found = accuracy_interval((rng.random((200, seeds)) < chance).astype(int))
        hits += found.low <= 0.6 <= found.high
    return hits / 500


@pytest.mark.parametrize(
    ("seeds", "document_spread", "seed_spread"),
    [(1, 0.2, 0.0), (3, 0.25, 0.0), (3, 0.25, 0.03), (3, 0.25, 0.1), (5, 0.2, 0.04),
     (10, 0.2, 0.05)],
)  # fmt: skip
def test_interval_covers_the_true_accuracy_at_least_93_times_in_100(
    seeds, document_spread, seed_spread
):
    assert simulated(seeds, document_spread, seed_spread) >= 0.93


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 60))
def test_interval_of_a_paired_difference_is_tangos_by_brute_force(wins, losses, ties):
    """The bounds are where the score test, its likelihood maximised on a grid, just accepts."""
    n = wins + losses + ties
    first = np.array([1] * wins + [0] * losses + [1] * ties)
    second = np.array([0] * wins + [1] * losses + [1] * ties)
    if n < 5:
        return
    found = difference_interval(first, second)
    quantile = scipy.stats.t.ppf(0.975, n - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        for bound in (found.low, found.high):
            if abs(bound) > 0.9999:
                continue
            # Share of losses q; of wins q + bound. What fits best under that difference?
            q = np.linspace(max(0, -bound), (1 - bound) / 2, 200_001)[1:-1]
            likelihood = (
                scipy.special.xlogy(wins, q + bound) + scipy.special.xlogy(losses, q)
                + scipy.special.xlogy(ties, 1 - 2 * q - bound)
            )  # fmt: skip
            best = q[likelihood.argmax()]
            error = np.sqrt(n * (2 * best + bound - bound**2))
            assert abs(wins - losses - n * bound) / error == pytest.approx(quantile, rel=2e-3)


def test_interval_of_a_paired_difference_agrees_with_a_published_example():
    """Airway hyper-responsiveness of 21 children: 1 and 7 discordant (Fagerland et al. 2014)."""
    pairs = [(1, 1)] + [(1, 0)] + [(0, 1)] * 7 + [(0, 0)] * 12
    first, second = np.array(pairs).T
    wide = difference_interval(first, second)
    # Published for the normal quantile; the level that gives it with 20 degrees of freedom.
    level = 2 * scipy.stats.t.cdf(1.959964, 20) - 1
    found = difference_interval(first, second, level=level)
    assert found == pytest.approx((-0.286, -0.517, -0.026), abs=5e-4)
    assert wide.low < found.low
    assert wide.high > found.high


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(1, 3), st.integers(1, 3),
       st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]), st.sampled_from([0.0, 0.5, 1.0]))  # fmt: skip
def test_no_interval_leaves_its_range_or_is_empty(seed, documents, seeds, draws, one, other):
    rng = np.random.default_rng(seed)
    shape = (documents, seeds, draws)
    first, second = (rng.random(shape) < chance for chance in (one, other))
    for drawn in (False, True):
        accuracy = accuracy_interval(first, drawn=drawn)
        assert 0 <= accuracy.low <= accuracy.mean <= accuracy.high <= 1
        assert accuracy.high - accuracy.low > 0
        found = difference_interval(first, second, drawn=drawn)
        assert -1 <= found.low <= found.mean <= found.high <= 1
        assert found.high - found.low > 0


def test_interval_of_one_run_is_about_the_plain_bootstrap():
    rng = np.random.default_rng(0)
    values = (rng.random(400) < 0.7).astype(int)
    low, high = np.quantile(rng.choice(values, (20_000, 400)).mean(axis=1), [0.025, 0.975])
    for found in (accuracy_interval(values), mean_interval(values)):
        assert found.mean == values.mean()
        assert found.low == pytest.approx(low, abs=0.005)
        assert found.high == pytest.approx(high, abs=0.005)


def test_seeds_that_differ_widen_the_interval_and_equal_ones_do_not():
    rng = np.random.default_rng(0)
    once = (rng.random((300, 1)) < 0.7).astype(int)
    repeated = accuracy_interval(np.repeat(once, 3, axis=1))
    assert repeated == pytest.approx(accuracy_interval(once), abs=1e-3)
    apart = (rng.random((300, 3)) < np.array([0.5, 0.7, 0.9])).astype(int)
    assert np.diff(accuracy_interval(apart)[1:]) > 3 * np.diff(repeated[1:])


def test_draws_that_agree_leave_room_for_another_that_does_not():
    right = np.ones((300, 1, 20), dtype=int)
    margins = [
        -difference_interval(right[..., :n], np.ones_like(right[..., :n]), drawn=True).low
        for n in (1, 3, 20)
    ]
    # Student's t times the least spread, 2 points, over the root of the number of draws.
    assert margins == pytest.approx(
        [0.02 * t / n**0.5 for t, n in ((12.706, 1), (4.303, 3), (2.093, 20))], abs=0.01
    )
    assert margins[0] > margins[1] > margins[2]


def test_interval_is_reproducible_and_bad_input_is_refused():
    values = np.eye(12)[:, :3]
    assert accuracy_interval(values) == accuracy_interval(values)
    with pytest.raises(icl.InputError, match="2 documents"):
        accuracy_interval(np.ones((1, 3)))
    with pytest.raises(icl.InputError, match="level"):
        mean_interval(values, level=95)


@pytest.mark.parametrize(
    ("p", "low", "high", "expected"),
    [(0.01, 1, 5, True), (0.01, -5, -1, True), (0.01, -1, 5, False), (0.2, 1, 5, False)],
)
def test_a_difference_counts_where_test_and_interval_agree(p, low, high, expected):
    columns = (pd.Series([float(value)]) for value in (p, low, high))
    assert is_distinguishable(*columns).item() == expected


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=300))
def test_paired_test_of_one_run_is_the_exact_mcnemar_test(pairs):
    from statsmodels.stats.contingency_tables import mcnemar

    first, second = np.array(pairs, dtype=int).T
    table = [[((first == a) & (second == b)).sum() for b in (1, 0)] for a in (1, 0)]
    expected = 1.0 if table[0][1] + table[1][0] == 0 else mcnemar(table, exact=True).pvalue
    assert paired_test(first, second) == pytest.approx(min(1.0, expected), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9))
def test_paired_test_of_several_runs_equals_enumeration_of_all_signs(seed, documents):
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 2, (2, documents, 3))
    gaps = (first - second).sum(axis=1)
    sums = [
        abs(sum(s * g for s, g in zip(signs, gaps, strict=True)))
        for signs in itertools.product((-1, 1), repeat=documents)
    ]
    expected = np.mean([total >= abs(gaps.sum()) for total in sums])
    assert paired_test(first, second) == pytest.approx(expected, abs=1e-9)


def test_paired_test_rejects_a_true_null_hypothesis_at_most_at_its_level():
    rejected = 0
    for trial in range(500):
        rng = np.random.default_rng([5, trial])
        chance = rng.uniform(0.2, 0.9, (150, 1))
        first, second = (rng.random((2, 150, 3)) < chance).astype(int)
        rejected += paired_test(first, second) < 0.05
    assert 0.02 <= rejected / 500 <= 0.07


def test_effect_size_and_correction_by_hand():
    first, second = np.array([1, 1, 1, 0, 1]), np.array([0, 0, 0, 1, 1])
    assert cohens_g(first, second) == pytest.approx(0.25)
    assert np.isnan(cohens_g(first, first))
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]).size == 0


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_correction_is_that_of_statsmodels(p_values):
    from statsmodels.stats.multitest import multipletests

    # It collects garbage at each call, which takes longer here than all the rest.
    with mock.patch("gc.collect"):
        corrected = multipletests(p_values, method="holm")[1]
    assert holm(p_values) == pytest.approx(corrected)


def test_no_p_value_is_zero():
    assert 0 < paired_test(np.ones(4000), np.zeros(4000)) < 1e-300


def test_rows_without_examples_are_counted_once_and_leave_the_others_family():
    few = documents_frame()
    zero = few.assign(shots=0, correct=few["doc_id"] % 2 == 0)
    alone = comparisons(few).set_index(["condition", "against"])
    beside = comparisons(pd.concat([few, zero], ignore_index=True))
    with_examples = beside[beside["shots"] == 10].set_index(["condition", "against"])
    assert with_examples["p_holm"].to_dict() == pytest.approx(alone["p_holm"].to_dict())
    table = accuracy_intervals(zero).set_index("condition")
    # One seed of 200 documents, not two seeds of them.
    once = accuracy_interval(np.arange(200) % 2)
    assert tuple(table.loc["full", ["low", "high"]] / 100) == pytest.approx(once[1:])


def documents_frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    conditions = [
        ("full", "none", 0.0, [None], 0.9),
        ("induction_heads", "mean", 0.1, [None], 0.5),
        ("random_heads", "mean", 0.1, [42, 43, 44], 0.9),
    ]
    for condition, ablation, fraction, ablation_seeds, chance in conditions:
        for seed, ablation_seed, doc in itertools.product((42, 43, 44), ablation_seeds, range(200)):
            rows.append(
                {"task": "repetition", "labels": "unrelated", "shots": 10, "condition": condition,
                 "ablation": ablation, "fraction": fraction, "ablation_seed": ablation_seed,
                 "demonstration_seed": seed, "doc_id": doc, "correct": rng.random() < chance,
                 "margin": 0.0, "valid": True}
            )  # fmt: skip
    frame = pd.DataFrame(rows).sample(frac=1, random_state=0)
    return frame.assign(ablation_seed=frame["ablation_seed"].astype("Int64"))


def test_intervals_and_comparisons_of_a_run():
    documents = documents_frame()
    table = accuracy_intervals(documents).set_index("condition")
    plain = documents.groupby("condition")["correct"].mean() * 100
    assert table["accuracy"].to_dict() == pytest.approx(plain.to_dict())
    assert table["runs"].to_dict() == {"full": 3, "induction_heads": 3, "random_heads": 9}
    assert (table["low"] < table["accuracy"]).all()
    assert (table["accuracy"] < table["high"]).all()
    found = comparisons(documents).set_index(["condition", "against"])
    assert set(found.index) == {
        ("induction_heads", "full"), ("induction_heads", "random_heads"), ("random_heads", "full"),
    }  # fmt: skip
    for (condition, against), row in found.iterrows():
        assert row["difference"] == pytest.approx(plain[condition] - plain[against])
        assert row["distinguishable"] == (condition == "induction_heads")
        assert row["p_holm"] >= row["p"]


def test_a_faultless_condition_still_has_an_interval_and_nothing_to_compare():
    documents = documents_frame().query("condition == 'full'").assign(correct=True)
    row = accuracy_intervals(documents).iloc[0]
    assert row["high"] == 100
    assert row["low"] == pytest.approx(100 * 0.025 ** (1 / 200))
    found = comparisons(documents)
    assert found.empty
    assert "distinguishable" in found


def test_documents_that_a_run_lacks_are_left_out():
    documents = documents_frame()
    kept = documents[(documents["doc_id"] != 7) | (documents["demonstration_seed"] != 42)]
    assert set(accuracy_intervals(kept)["documents"]) == {199}


def test_benefit_and_its_relative_change_by_hand():
    def row(task, condition, shots, accuracy):
        return {"task": task, "labels": "unrelated", "shots": shots, "condition": condition,
                "ablation": "none" if condition == "full" else "mean",
                "fraction": 0.0 if condition == "full" else 0.03, "n": 500, "accuracy": accuracy}  # fmt: skip

    results = pd.DataFrame(
        [
            row("repetition", "full", 0, 0.5), row("repetition", "full", 10, 0.9),
            row("repetition", "induction_heads", 0, 0.5),
            row("repetition", "induction_heads", 10, 0.6),
            row("recursion", "full", 0, 0.5), row("recursion", "full", 10, 0.45),
            row("centre_embedding", "full", 0, 0.48), row("centre_embedding", "full", 10, 0.51),
        ]
    )  # fmt: skip
    found = icl_benefit(results).set_index(["task", "condition"])
    ablated = found.loc[("repetition", "induction_heads")]
    assert ablated["benefit"] == pytest.approx(10)
    assert ablated["relative_change"] == pytest.approx(-75)
    assert found.loc[("recursion", "full"), "left_out"] == "no benefit"
    assert found.loc[("centre_embedding", "full"), "left_out"] == "at chance"
    assert np.isnan(found.loc[("recursion", "full"), "relative_change"])
