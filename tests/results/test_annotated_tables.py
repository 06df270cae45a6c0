"""Tables with intervals and marks, benefit of the examples, coverage: against known answers."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

import icl_helpers as icl
from icl_helpers.evaluation.store import accuracies
from icl_helpers.results import statistics
from icl_helpers.results.figures import bars_alt, benefit_alt, benefit_bars
from icl_helpers.results.statistics import (
    accuracy_intervals,
    benefit_changes,
    coverage_table,
    holm,
    left_out_tasks,
    paired_test,
    simulate_coverage,
)
from icl_helpers.results.tables import MARK, annotated_table
from tests.results.test_outcomes import rows

SHARE = 0.06


def answers(task: str, labels: str, chances: dict[tuple[str, str, int], float]) -> pd.DataFrame:
    """200 documents with three seeds; chances by (condition, ablation, shots)."""
    rng = np.random.default_rng(1)
    rows = []
    for (condition, ablation, shots), chance in chances.items():
        draws = [42, 43, 44] if condition == "random_heads" else [None]
        right = rng.random((3, len(draws), 200)) < chance
        # Without examples seeds do not differ.
        right = right if shots else np.broadcast_to(right[:1], right.shape)
        for at, draw, doc in itertools.product(range(3), range(len(draws)), range(200)):
            rows.append(
                {"task": task, "labels": labels, "shots": shots, "condition": condition,
                 "ablation": ablation, "fraction": 0.0 if condition == "full" else SHARE,
                 "ablation_seed": draws[draw], "demonstration_seed": 42 + at, "doc_id": doc,
                 "correct": right[at, draw, doc], "margin": 0.0, "valid": True}
            )  # fmt: skip
    return pd.DataFrame(rows).astype({"ablation_seed": "Int64"})


FULL, IND, RND, PATTERN = (
    ("full", "none"), ("induction_heads", "mean"), ("random_heads", "mean"),
    ("induction_pattern", "knockout"),
)  # fmt: skip


@pytest.fixture(scope="module")
def documents() -> pd.DataFrame:
    abstract = {
        (*FULL, 10): 0.95, (*IND, 10): 0.5, (*RND, 10): 0.95, (*PATTERN, 10): 0.6,
        (*FULL, 0): 0.5, (*IND, 0): 0.5, (*RND, 0): 0.5, (*PATTERN, 0): 0.5,
        ("induction_heads", "zero", 10): 0.4,
    }  # fmt: skip
    text = {(*FULL, 10): 0.9, (*IND, 10): 0.7, (*FULL, 0): 0.93, (*IND, 0): 0.93}
    return pd.concat([answers("repetition", "unrelated", abstract),
                      answers("sst2", "semantic", text)], ignore_index=True)  # fmt: skip


def test_table_1_shows_accuracy_difference_mark_and_interval(documents):
    cells, gaps, tests = annotated_table(documents, 1, n_heads=50)
    row = cells.loc[("repetition", "unrelated", 10)]
    rows = documents[(documents["task"] == "repetition") & (documents["shots"] == 10)]
    plain = 100 * rows.groupby(["condition", "ablation"])["correct"].mean()
    full, removed = plain["full", "none"], plain["induction_heads", "mean"]
    shown = row[("induction heads", "3 of 50 heads (6.0 %)")]
    assert shown.startswith(f"{removed:.1f} ({removed - full:+.1f}){MARK} [")
    assert row[("full model", "")].startswith(f"{full:.1f} [")
    random = row[("random heads", "3 of 50 heads (6.0 %)")]
    assert MARK not in random
    gap = gaps.loc[
        ("repetition", "unrelated", 10), ("induction minus random heads", "3 of 50 heads (6.0 %)")
    ]
    assert gap.startswith(f"{removed - plain['random_heads', 'mean']:+.1f}{MARK} [")
    assert set(tests["ablation"]) == {"mean", "knockout"}
    assert set(tests["task"]) == {"repetition"}


def test_marks_follow_holm_over_the_table_alone_and_the_interval(documents):
    cells, gaps, tests = annotated_table(documents, 1, n_heads=50)
    no_examples = tests["shots"] == 0
    for family in (tests[no_examples], tests[~no_examples]):
        assert family["p_holm"].to_numpy() == pytest.approx(holm(family["p"].to_numpy()))
    apart = (tests["low"] > 0) | (tests["high"] < 0)
    assert (tests["distinguishable"] == ((tests["p_holm"] < 0.05) & apart)).all()
    assert not tests.loc[no_examples, "distinguishable"].any()
    # Every star of the cells is one of the tests', and none is left out.
    stars = sum(part.map(lambda text: text.count(MARK)).to_numpy().sum() for part in (cells, gaps))
    assert stars == tests["distinguishable"].sum() > 0


def test_a_test_of_the_table_is_the_paired_test_on_the_same_documents(documents):
    _, _, tests = annotated_table(documents, 3, n_heads=50)
    row = tests[(tests["shots"] == 10) & (tests["against"] == "full")].iloc[0]
    wide = documents[(documents["task"] == "sst2") & (documents["shots"] == 10)].pivot_table(
        index="doc_id", columns=["condition", "demonstration_seed"], values="correct"
    )
    expected = paired_test(wide["induction_heads"].to_numpy(), wide["full"].to_numpy())
    assert row["p"] == pytest.approx(expected)


def test_table_4_takes_zero_ablation_and_text_tables_have_no_knockout(documents):
    cells, _, tests = annotated_table(documents, 4, n_heads=50)
    assert set(tests["ablation"]) == {"zero", "knockout"}
    assert ("random heads", "3 of 50 heads (6.0 %)") not in cells.columns
    assert {name for name, _ in annotated_table(documents, 3, n_heads=50).cells.columns} == {
        "full model", "induction heads",
    }  # fmt: skip
    with pytest.raises(icl.InputError, match="1, 3, 4 and 5"):
        annotated_table(documents, 2, n_heads=50)
    with pytest.raises(icl.InputError, match="text classification"):
        annotated_table(documents[documents["task"] == "repetition"], 5, n_heads=50)


def test_no_interval_of_an_accuracy_leaves_0_to_100():
    few = answers("repetition", "unrelated", {(*FULL, 5): 0.97})
    table = accuracy_intervals(few[few["doc_id"] < 12])
    assert table["low"].min() >= 0
    assert table["high"].max() <= 100


def test_relative_change_of_the_benefit_has_an_interval_that_holds_the_truth(documents):
    results = accuracies(documents)
    changes = benefit_changes(results, documents)
    row = changes[(changes["task"] == "repetition") & (changes["condition"] == "induction_heads")]
    row = row[row["ablation"] == "mean"].iloc[0]
    accuracy = results.groupby(["task", "condition", "ablation", "shots"])["accuracy"].mean()
    task = accuracy["repetition"]
    gain = task["full", "none", 10] - task["full", "none", 0]
    left = task["induction_heads", "mean", 10] - task["induction_heads", "mean", 0]
    assert row["relative_change"] == pytest.approx(100 * (left / gain - 1))
    assert row["low"] <= -100 <= row["high"]
    assert row["low"] > -150
    random = changes[(changes["condition"] == "random_heads") & (changes["shots"] == 10)].iloc[0]
    assert random["low"] <= 0 <= random["high"]


def test_interval_of_the_relative_change_agrees_with_resampling_the_ratio(documents):
    """One seed: the linearised interval beside a plain bootstrap of the ratio itself."""
    one = documents[(documents["demonstration_seed"] == 42) & (documents["task"] == "repetition")]
    changes = benefit_changes(accuracies(one), one)
    row = changes[(changes["condition"] == "induction_heads") & (changes["ablation"] == "mean")]
    wide = one[one["ablation"].isin(["none", "mean"])].pivot_table(
        index="doc_id", columns=["condition", "shots"], values="correct"
    )
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(2000):
        mean = wide.iloc[rng.integers(len(wide), size=len(wide))].mean()
        gain = mean["full", 10] - mean["full", 0]
        ratios.append((mean["induction_heads", 10] - mean["induction_heads", 0]) / gain)
    low, high = 100 * (np.quantile(ratios, [0.025, 0.975]) - 1)
    assert row["low"].item() == pytest.approx(low, abs=6)
    assert row["high"].item() == pytest.approx(high, abs=6)


def test_tasks_without_benefit_are_left_out_of_the_figure_and_listed(documents):
    changes = benefit_changes(accuracies(documents), documents)
    out = left_out_tasks(changes)
    (row,) = out.to_dict("records")
    assert row["task"] == "sst2"
    assert row["why"] == "no benefit"
    text = benefit_alt(changes, ablation="mean", n_heads=50)
    assert "repetition" in text
    assert "SST-2" not in text
    assert len(benefit_bars(changes, ablation="mean", n_heads=50).axes) == 1
    with pytest.raises(icl.InputError, match="with and without"):
        few = documents[documents["shots"] == 10]
        benefit_changes(accuracies(few), few)


def test_alternative_text_names_every_bar(documents):
    text = bars_alt(accuracies(documents), ablations=["mean", "knockout"], n_heads=50)
    assert "3 of 50 heads (6.0 %)" in text
    assert "repetition with unrelated labels: full 9" in text
    assert "SST-2 with semantic labels: full 9" in text
    empty = accuracies(documents).iloc[:0]
    assert "nothing was evaluated" in bars_alt(empty, ablations=["mean"], n_heads=50)


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.05])
@pytest.mark.parametrize("accuracy", [0.02, 0.6, 0.98])
def test_simulated_coverage_of_three_seeds_is_at_least_93_percent(spread, accuracy):
    found = simulate_coverage(documents=200, accuracy=accuracy, seed_spread=spread)
    assert found >= 0.93


@pytest.mark.parametrize("draws", [3, 20])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("accuracy", [0.02, 0.5, 0.98])
def test_simulated_coverage_over_control_draws_is_at_least_93_percent(draws, uneven, accuracy):
    loss = 0.1 if uneven else 0.05
    found = simulate_coverage(
        documents=100, accuracy=accuracy, draws=draws, loss=loss, uneven=uneven, seed_spread=0.02
    )
    assert found >= 0.93


def test_coverage_falls_when_the_spread_over_seeds_or_draws_is_ignored(monkeypatch):
    """One seed cannot know of the spread over seeds, and draws may agree: it must be noticed."""
    assert simulate_coverage(seeds=1, documents=300, seed_spread=0.08) < 0.75
    monkeypatch.setattr(statistics, "LEAST_DRAW_SPREAD", 0.0)
    uneven = {"documents": 300, "draws": 3, "loss": 0.1, "uneven": True, "accuracy": 0.9}
    assert simulate_coverage(**uneven, trials=300) < 0.9


def test_table_of_coverage_names_what_was_simulated():
    table = coverage_table(documents=100, draws=(3,), accuracies=(0.98,), trials=40)
    assert list(table) == ["98 %"]
    assert len(table) == 5
    assert table.to_numpy().min() > 85
    with pytest.raises(icl.InputError, match="trials"):
        simulate_coverage(seeds=0, documents=100, seed_spread=0.0)


def test_a_benefit_within_noise_has_no_relative_change():
    chances = {(*FULL, 10): 0.52, (*IND, 10): 0.5, (*FULL, 0): 0.5, (*IND, 0): 0.5}
    documents = answers("boolq", "semantic", chances)
    results = accuracies(documents)
    # Above chance and above zero-shot, but by little: made so here whatever was drawn.
    results.loc[(results["condition"] == "full") & (results["shots"] == 10), "accuracy"] = 0.62
    out = left_out_tasks(benefit_changes(results, documents))
    assert list(out["why"]) == ["benefit within noise"]


def test_a_benefit_that_goes_whole_is_not_certain_to():
    parts = [
        rows("sst2", condition, right, shots=shots)
        for shots, removed in ((0, 50), (10, 50))
        for condition, right in (
            (("full", "none"), 50 if shots == 0 else 100), (("induction_heads", "mean"), removed),
        )
    ]  # fmt: skip
    documents = pd.concat(parts, ignore_index=True)
    changes = benefit_changes(accuracies(documents), documents)
    (change,) = changes[changes["condition"] == "induction_heads"].itertuples()
    assert change.relative_change == -100
    # Nobody lost or won with the examples: of 200 documents, the score interval of no difference
    # is +-1.9 points, of a benefit of 50.
    assert change.low == pytest.approx(-103.8, abs=0.2)
    assert change.high == pytest.approx(-96.2, abs=0.2)
