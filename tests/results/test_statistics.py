"""Intervals by simulation, tests against statsmodels and enumeration, benefit by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import icl_helpers as icl
from icl_helpers.results.statistics import (
    accuracy_intervals,
    bootstrap_interval,
    cohens_g,
    comparisons,
    holm,
    icl_benefit,
    paired_test,
)


def coverage(seeds: int, document_spread: float, seed_spread: float) -> float:
    """How often, in 500 simulated runs, the interval holds the true accuracy of 0.6."""
    hits = 0
    for trial in range(500):
        rng = np.random.default_rng([11, trial])
        documents = rng.uniform(-document_spread, document_spread, (200, 1))
        chance = 0.6 + documents + rng.normal(0, seed_spread, (1, seeds))
        values = (rng.random((200, seeds)) < chance).astype(int)
        found = bootstrap_interval(values, resamples=500, seed=trial)
        hits += found.low <= 0.6 <= found.high
    return hits / 500


@pytest.mark.parametrize(
    ("seeds", "document_spread", "seed_spread"),
    [(1, 0.2, 0.0), (3, 0.25, 0.03), (5, 0.2, 0.04), (10, 0.2, 0.05)],
)
def test_interval_covers_the_true_accuracy_93_to_97_times_in_100(
    seeds, document_spread, seed_spread
):
    assert 0.93 <= coverage(seeds, document_spread, seed_spread) <= 0.97


@pytest.mark.parametrize("seed_spread", [0.0, 0.01, 0.1])
def test_three_seeds_keep_the_interval_at_its_level_at_either_extreme(seed_spread):
    assert 0.93 <= coverage(3, 0.25, seed_spread) <= 0.97


def test_interval_of_one_run_is_the_plain_bootstrap():
    values = (np.random.default_rng(0).random(400) < 0.7).astype(int)
    found = bootstrap_interval(values, resamples=20_000)
    error = values.std(ddof=1) / 20
    assert found.mean == values.mean()
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.03)


def test_seeds_that_differ_widen_the_interval_and_equal_ones_do_not():
    rng = np.random.default_rng(0)
    once = (rng.random((300, 1)) < 0.7).astype(int)
    repeated = bootstrap_interval(np.repeat(once, 3, axis=1))
    assert repeated == pytest.approx(bootstrap_interval(once))
    apart = (rng.random((300, 3)) < np.array([0.5, 0.7, 0.9])).astype(int)
    assert np.diff(bootstrap_interval(apart)[1:]) > 3 * np.diff(repeated[1:])


def test_interval_is_reproducible_and_bad_input_is_refused():
    values = np.eye(12)[:, :3]
    assert bootstrap_interval(values) == bootstrap_interval(values)
    with pytest.raises(icl.InputError, match="2 documents"):
        bootstrap_interval(np.ones((1, 3)))
    with pytest.raises(icl.InputError, match="level"):
        bootstrap_interval(values, level=95)


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


def documents_frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    conditions = [
        ("full", "none", 0.0, [None], 0.9),
        ("induction_heads", "mean", 0.1, [None], 0.5),
        ("random_heads", "mean", 0.1, [42, 43], 0.9),
    ]
    for condition, ablation, fraction, ablation_seeds, chance in conditions:
        for seed, ablation_seed, doc in itertools.product((42, 43), ablation_seeds, range(200)):
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
    assert table["runs"].to_dict() == {"full": 2, "induction_heads": 2, "random_heads": 4}
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
