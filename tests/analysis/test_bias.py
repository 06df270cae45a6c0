"""What answers say beside accuracy: every measure against a slow loop over documents."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import icl_helpers as icl
from icl_helpers.analysis.bias import answer_measures, answer_table, at_most, smallest_detectable


def slow(rows: list[tuple[list[float], int]]) -> dict[str, object]:
    """The measures of (log-probabilities, target) rows, document by document."""
    labels = range(len(rows[0][0]))
    said = [values.index(max(values)) for values, _ in rows]
    right = [s == t for s, (_, t) in zip(said, rows, strict=True)]
    recalls = []
    for label in labels:
        of = [r for r, (_, t) in zip(right, rows, strict=True) if t == label]
        if of:
            recalls.append(sum(of) / len(of))
    chances = []
    for values, _ in rows:
        total = sum(math.exp(v) for v in values)
        chances.append([math.exp(v) / total for v in values])
    typical = [sum(c[label] for c in chances) / len(chances) for label in labels]
    again = []
    for chance, (_, target) in zip(chances, rows, strict=True):
        shifted = [chance[label] / typical[label] for label in labels]
        again.append(shifted.index(max(shifted)) == target)
    won, pairs = 0.0, 0
    for a, ta in rows:
        for b, tb in rows:
            if ta == 1 and tb == 0:
                pairs += 1
                first, second = a[1] - a[0], b[1] - b[0]
                won += 1.0 if first > second else 0.5 if first == second else 0.0
    return {
        "accuracy": sum(right) / len(rows), "balanced": sum(recalls) / len(recalls),
        "calibrated": sum(again) / len(rows),
        "auc": won / pairs if len(labels) == 2 and pairs else float("nan"),
        "shares": [said.count(label) / len(rows) for label in labels],
    }  # fmt: skip


@pytest.mark.parametrize("n_labels", [2, 4])
def test_measures_equal_a_loop_on_all_documents_and_on_every_sample(n_labels):
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(30, n_labels)) + 0.7 * np.eye(n_labels)[0]
    scores[4] = scores[5]  # a tie between documents
    targets = rng.integers(0, n_labels, 30)
    weights = rng.multinomial(30, [1 / 30] * 30, size=5)
    found = answer_measures(scores, targets, np.concatenate([np.ones((1, 30)), weights]))
    for at, counts in enumerate([[1] * 30, *weights.tolist()]):
        rows = [
            (scores[place].tolist(), int(targets[place]))
            for place, count in enumerate(counts)
            for _ in range(count)
        ]
        for name, value in slow(rows).items():
            assert found[name][at] == pytest.approx(value, nan_ok=True, abs=1e-12), (name, at)


def test_one_label_said_to_everything_is_bias_and_not_lack_of_skill():
    # The odds tell the labels apart, but never reach zero.
    odds = np.linspace(-3, -1, 20)
    scores = np.stack([np.zeros(20), odds], axis=1)
    found = answer_measures(scores, np.repeat([0, 1], 10))
    assert found["accuracy"] == found["balanced"] == 0.5
    assert found["shares"].tolist() == [[1.0, 0.0]]
    assert found["auc"] == 1.0
    assert found["calibrated"] >= 0.9


def test_smallest_detectable_difference_is_found_in_about_four_of_five_simulations():
    rng = np.random.default_rng(0)
    n, spread = 60, 0.5
    size = smallest_detectable(rng.normal(0, spread, 200_000)) * (200_000 / n) ** 0.5
    drawn = rng.normal(size, spread, (2000, n))
    assert np.mean(stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05) == pytest.approx(
        0.8, abs=0.04
    )


def test_where_nothing_differs_six_documents_of_one_sign_are_the_least():
    assert smallest_detectable(np.zeros(50)) == 6 / 50
    # Exact sign test: five of one sign are not enough, six are.
    assert stats.binomtest(5, 5).pvalue > 0.05 > stats.binomtest(6, 6).pvalue
    with pytest.raises(icl.InputError, match="at least 2 documents"):
        smallest_detectable(np.zeros(1))


def frame(condition, scores, targets, *, seed, fraction=np.nan) -> pd.DataFrame:
    chosen = scores.argmax(axis=1)
    return pd.DataFrame(
        {
            "task": "wordseq1_binary", "labels": "unrelated", "shots": 10, "condition": condition,
            "ablation": "none" if condition == "full" else "mean", "fraction": fraction,
            "control": "", "ablation_seed": pd.NA, "demonstration_seed": seed,
            "doc_id": np.arange(len(targets)), "correct": chosen == targets, "valid": True,
            "target": targets, "log_probabilities": list(scores),
        }
    )  # fmt: skip


def test_table_averages_the_seeds_and_resamples_documents():
    rng = np.random.default_rng(1)
    targets = np.tile([0, 1], 20)
    rows, expected = [], {}
    for condition, fraction in (("full", np.nan), ("induction_heads", 0.1)):
        each = []
        for seed in (42, 43):
            scores = rng.normal(size=(40, 2))
            scores[np.arange(40), targets] += 1.5 if condition == "full" else 0.2
            rows.append(frame(condition, scores, targets, seed=seed, fraction=fraction))
            each.append(slow([(s.tolist(), int(t)) for s, t in zip(scores, targets, strict=True)]))
        expected[condition] = each
    documents = pd.concat(rows, ignore_index=True)
    found = answer_table(documents).set_index("condition")
    for condition, each in expected.items():
        for name in ("accuracy", "balanced", "calibrated", "auc"):
            value = 100 * np.mean([one[name] for one in each])
            row = found.loc[condition]
            assert row[name] == pytest.approx(value)
            assert row[f"{name}_low"] < value < row[f"{name}_high"]
        shares = np.mean([one["shares"] for one in each], axis=0)
        assert (found.loc[condition, "said"], found.loc[condition, "share"]) == (
            shares.argmax(), pytest.approx(100 * shares.max())
        )  # fmt: skip
    by_document = documents.groupby(["condition", "doc_id"])["correct"].mean().unstack("condition")
    gaps = (by_document["induction_heads"] - by_document["full"]).to_numpy()
    assert found.loc["induction_heads", "detectable"] == pytest.approx(
        100 * smallest_detectable(gaps)
    )
    assert np.isnan(found.loc["full", "detectable"])
    assert np.isnan(found.loc["full", "fraction"])


def test_rows_of_a_version_that_kept_no_log_probabilities_are_left_out():
    bare = frame("full", np.zeros((4, 2)), np.array([0, 1, 0, 1]), seed=42)
    assert answer_table(bare.drop(columns="log_probabilities")).empty
    assert answer_table(bare.assign(log_probabilities=None)).empty


def test_rows_of_most_examples_and_most_heads_are_selected():
    targets = np.array([0, 1, 0, 1])
    scores = np.zeros((4, 2))
    parts = [frame("full", scores, targets, seed=42)]
    parts += [frame("induction_heads", scores, targets, seed=42, fraction=f) for f in (0.1, 0.2)]
    documents = pd.concat([part.assign(shots=shots) for shots in (0, 10) for part in parts])
    found = at_most(documents)
    assert set(found["shots"]) == {10}
    assert found["fraction"].dropna().unique().tolist() == [0.2]
    assert len(found) == 8
