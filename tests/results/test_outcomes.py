"""Facts and sentences about runs made up so that a careful reader knows what is to be said."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

import icl_helpers as icl
from icl_helpers.results.outcomes import (
    KindOutcome,
    TaskOutcome,
    doubts,
    kind_outcomes,
    outcome_sentence,
    task_outcomes,
    training_seed_doubts,
)
from icl_helpers.results.statistics import comparisons
from icl_helpers.tasks.specs import task_kind

N = 200
HEADS = "4 of 64 heads (6.3 %)"
LETTERS = ("repetition", "recursion", "centre_embedding")
WORDS = ("wordseq1_binary", "wordseq2_binary")
FULL, REMOVED, BLOCKED, CONTROL = (
    ("full", "none"), ("induction_heads", "mean"), ("induction_pattern", "knockout"),
    ("random_heads", "mean"),
)  # fmt: skip


def rows(
    task: str, condition: tuple[str, str], right: float, *, shots: int = 10, seed: int = 42,
    draw: int | None = None, n: int = N, one_label: bool = False, margin: float = 1.0,
) -> pd.DataFrame:  # fmt: skip
    """Documents, half of each label, of which the first ``right`` percent (or so) are right."""
    doc = np.arange(n)
    target = doc % 2
    # Right answers are the same documents everywhere, spread over both labels.
    correct = (doc // 2 * 7 + 3) % (n // 2) < right / 100 * (n // 2)
    chosen = np.zeros(n, dtype=int) if one_label else np.where(correct, target, 1 - target)
    correct = chosen == target
    return pd.DataFrame(
        {"task": task, "labels": "unrelated", "shots": shots, "condition": condition[0],
         "ablation": condition[1], "fraction": 0.0 if condition[0] == "full" else 0.0625,
         "ablation_seed": draw, "demonstration_seed": seed, "doc_id": doc, "correct": correct,
         "margin": np.where(correct, 1.0, -1.0) * margin, "valid": True, "target": target,
         "chosen": chosen}
    ).astype({"ablation_seed": "Int64", "chosen": "Int64"})  # fmt: skip


def run(
    accuracy: dict[str, tuple[float, float, float, float]], *, seeds=(42, 43, 44),
    draws=(42, 43, 44), blocked_is_zero_shot: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """A run of tasks with these accuracies: full, removed, blocked, random heads."""
    parts = []
    for task, (full, removed, blocked, control) in accuracy.items():
        parts.append(rows(task, FULL, 50, shots=0, one_label=True))
        for seed in seeds:
            parts.append(rows(task, FULL, full, seed=seed))
            parts.append(rows(task, REMOVED, removed, seed=seed))
            parts.append(rows(task, BLOCKED, blocked, seed=seed, one_label=blocked_is_zero_shot))
            parts += [rows(task, CONTROL, control, seed=seed, draw=draw) for draw in draws]
    return pd.concat(parts, ignore_index=True)


def found(documents: pd.DataFrame, kind: str, condition: str, **options) -> KindOutcome:
    (outcome,) = (
        outcome
        for outcome in kind_outcomes(documents, **options)
        if (outcome.kind, outcome.condition) == (kind, condition)
    )
    return outcome


def only(outcome: KindOutcome, task: str) -> TaskOutcome:
    (one,) = (one for one in outcome.tasks if one.task == task)
    return one


def test_tasks_are_summed_up_with_their_kind_alone():
    assert {task: task_kind(task, "unrelated") for task in icl.task_names()} == {
        **dict.fromkeys(LETTERS, "letters"),
        **dict.fromkeys(WORDS, "words, two labels"),
        **dict.fromkeys(("wordseq1_4way", "wordseq2_4way"), "words, four labels"),
    }
    assert task_kind("sst2", "semantic") == "text, semantic labels"
    assert task_kind("sst2", "unrelated") == "text, unrelated labels"


def test_equal_tasks_have_one_number_and_the_same_is_said_of_all():
    documents = run(dict.fromkeys(LETTERS, (90, 60, 60, 90)))
    removed = found(documents, "letters", "induction_heads")
    assert removed.agree
    assert removed.accuracy == pytest.approx((60, 60, 60))
    assert [task.to_full.points for task in removed.tasks] == pytest.approx([-30] * 3)
    assert {task.to_full.sign for task in removed.tasks} == {-1}
    text = outcome_sentence(removed, heads=HEADS)
    assert "60 % (chance 50 %)" in text
    assert HEADS in text
    assert "distinguishably below the full model;" in text
    assert text.endswith("distinguishably below the random control.")
    assert doubts(removed) == []
    control = outcome_sentence(found(documents, "letters", "random_heads"), heads=HEADS)
    assert "not distinguishable from the full model" in control


def test_opposite_tasks_have_no_mean_and_are_named():
    documents = run(
        {
            "repetition": (99, 92, 50, 99), "recursion": (99, 40, 50, 99),
            "wordseq1_binary": (99, 6, 50, 99), "wordseq2_binary": (99, 1, 50, 99),
        }
    )  # fmt: skip
    letters, words = (
        found(documents, kind, "induction_heads") for kind in ("letters", "words, two labels")
    )
    assert [task.level for task in letters.tasks] == ["above chance", "below chance"]
    assert not letters.agree
    text = outcome_sentence(letters, heads=HEADS)
    assert "repetition 92 %, recursion 40 %" in text
    assert "66" not in text
    assert "below chance on recursion" in text
    assert words.agree
    text = outcome_sentence(words, heads=HEADS)
    assert "1 to 6 % (chance 50 %); below chance; " in text
    assert "nats" in text
    assert words.margin.high < 0
    # No number of one kind is mixed with another's: no mean of 92, 40, 6 and 1 anywhere.
    everything = " ".join(outcome_sentence(one, heads=HEADS) for one in kind_outcomes(documents))
    assert "35 %" not in everything


def test_blocked_pattern_that_brings_back_the_zero_shot_answer_is_named():
    documents = run(dict.fromkeys(WORDS, (99, 6, 50, 99)), blocked_is_zero_shot=True)
    blocked = found(documents, "words, two labels", "induction_pattern")
    assert [task.zero_shot_answers for task in blocked.tasks] == [100, 100]
    assert {task.level for task in blocked.tasks} == {"one label"}
    text = outcome_sentence(blocked, heads=HEADS)
    assert "nearly always the answer that it gives without examples" in text
    full = found(documents, "words, two labels", "full")
    assert max(task.zero_shot_answers for task in full.tasks) < 60
    assert "without examples" not in outcome_sentence(full, heads=HEADS)
    zero = found(documents, "words, two labels", "full", shots="none")
    assert "one label for nearly all documents" in outcome_sentence(zero, heads=HEADS)
    assert "no examples" in outcome_sentence(zero, heads=HEADS)


def test_one_label_on_unbalanced_documents_is_not_called_below_chance():
    documents = run(dict.fromkeys(LETTERS, (90, 60, 60, 90)))
    # Of the documents left, 40 in 140 have the label that is always given.
    kept = documents[(documents["target"] == 1) | (documents["doc_id"] < 80)]
    zero = found(kept, "letters", "full", shots="none")
    assert zero.accuracy.mean == pytest.approx(100 * 40 / 140)
    assert only(zero, "recursion").level == "one label"
    assert "below chance" not in outcome_sentence(zero, heads=HEADS)


def test_one_control_draw_of_three_that_deviates_is_said_and_not_called_a_loss():
    documents = run({"centre_embedding": (98, 60, 50, 98)})
    drawn = (documents["condition"] == "random_heads") & (documents["ablation_seed"] == 44)
    parts = [rows("centre_embedding", CONTROL, 86, seed=s, draw=44) for s in (42, 43, 44)]
    documents = pd.concat([documents[~drawn], *parts], ignore_index=True)
    control = found(documents, "letters", "random_heads")
    (task,) = control.tasks
    assert task.draws_disagree
    assert not task.seeds_disagree
    assert task.by_draw == pytest.approx({42: 98, 43: 98, 44: 86})
    # The documents alone would have it: without the draws' spread the test is clear.
    (test,) = comparisons(documents).query("condition == 'random_heads'").to_dict("records")
    assert test["p_holm"] < 0.001
    assert task.to_full.sign == 0
    assert test["distinguishable"] == task.to_full.distinguishable
    (line,) = doubts(control)
    assert line == (
        "Control draws disagree on centre embedding (random heads removed, mean ablation): "
        "98, 98 and 86 % (seeds 42, 43, 44)."
    )
    removed = found(documents, "letters", "induction_heads")
    assert only(removed, "centre_embedding").to_full.sign == -1


def test_demonstration_seeds_that_disagree_are_said():
    documents = run({"repetition": (98, 60, 50, 98)})
    removed = documents["condition"] == "induction_heads"
    kept = documents[~(removed & (documents["demonstration_seed"] == 44))]
    documents = pd.concat([kept, rows("repetition", REMOVED, 98, seed=44)], ignore_index=True)
    outcome = found(documents, "letters", "induction_heads")
    assert only(outcome, "repetition").seeds_disagree
    assert doubts(outcome)[0].startswith("Demonstration seeds disagree on repetition")
    assert "60, 60 and 98 % (seeds 42, 43, 44)" in doubts(outcome)[0]


def test_a_model_that_learnt_nothing_has_nothing_to_lose():
    documents = run(dict.fromkeys(WORDS, (50, 50, 50, 50)))
    for outcome in kind_outcomes(documents):
        assert {task.level for task in outcome.tasks} == {"at chance"}
        assert all(found.sign == 0 for task in outcome.tasks for found in task.differences)
        text = outcome_sentence(outcome, heads=HEADS)
        assert "not distinguishable from chance" in text
        assert "distinguishably" not in text
        assert doubts(outcome) == []


def test_everything_at_100_percent_is_certain_of_nothing():
    documents = run(dict.fromkeys(LETTERS, (100, 100, 100, 100)))
    for outcome in kind_outcomes(documents):
        assert outcome.accuracy == (100, 100, 100)
        for task in outcome.tasks:
            assert task.accuracy.low < 100
            for difference in task.differences:
                assert difference.low < 0 < difference.high
                assert difference.sign == 0
        if outcome.condition != "full":
            text = outcome_sentence(outcome, heads=HEADS)
            assert "not distinguishable from the full model" in text


def test_documents_that_gave_nan_are_left_out_and_counted():
    documents = run({"repetition": (98, 60, 50, 98)})
    bad = (documents["doc_id"] < 7) & (documents["condition"] == "induction_heads")
    documents = documents.assign(
        valid=~bad, margin=documents["margin"].mask(bad), chosen=documents["chosen"].mask(bad)
    )
    outcome = found(documents, "letters", "induction_heads")
    (task,) = outcome.tasks
    assert (task.left_out, task.documents) == (7, N - 7)
    assert np.isfinite([task.margin, task.one_label, *task.accuracy]).all()
    assert doubts(outcome)[-1].startswith("7 documents of repetition (heads removed, mean ")
    # Where all of them are, nothing is said of the condition, and the rest stands.
    nothing = documents.assign(valid=documents["condition"] != "induction_heads")
    conditions = {one.condition for one in kind_outcomes(nothing)}
    assert conditions == {"full", "induction_pattern", "random_heads"}


def test_one_seed_and_one_draw_are_said_to_be_one():
    documents = run({"repetition": (98, 60, 50, 90)}, seeds=(42,), draws=(42,))
    lines = doubts(found(documents, "letters", "random_heads"))
    assert [line.split(" on ")[0] for line in lines] == [
        "One demonstration seed only", "One control draw only",
    ]  # fmt: skip
    control = only(found(documents, "letters", "random_heads"), "repetition")
    # Eight points that another draw might not lose.
    assert control.to_full.points == pytest.approx(-8)
    assert control.to_full.sign == 0
    removed = only(found(documents, "letters", "induction_heads"), "repetition")
    assert removed.to_full.sign == -1


def test_both_controls_stand_beside_each_other():
    documents = run({"repetition": (98, 60, 50, 98)})
    drawn = documents["condition"] == "random_heads"
    documents = documents.assign(control=np.where(drawn, "published", ""))
    strict = [
        rows("repetition", CONTROL, 97, seed=seed, draw=draw).assign(control="strict")
        for seed, draw in itertools.product((42, 43, 44), repeat=2)
    ]
    documents = pd.concat([documents, *strict], ignore_index=True)
    outcomes = [one for one in kind_outcomes(documents) if one.condition == "random_heads"]
    assert [(one.control, one.accuracy.mean) for one in outcomes] == [
        ("published", 98), ("strict", 97),
    ]  # fmt: skip
    removed = found(documents, "letters", "induction_heads")
    against = [(one.against, one.control) for one in removed.tasks[0].differences]
    assert sorted(against) == [
        ("full", ""), ("random_heads", "published"), ("random_heads", "strict"),
    ]  # fmt: skip


def test_training_seeds_disagree_where_intervals_lie_apart_with_other_conclusions():
    def row(seed, task, condition, accuracy):
        return {"training_seed": seed, "task": task, "labels": "unrelated", "shots": 10,
                "condition": condition, "accuracy": accuracy, "low": accuracy - 3,
                "high": accuracy + 3}  # fmt: skip

    effect = pd.DataFrame(
        [row(seed, task, "full", 97) for seed in (0, 1) for task in LETTERS]
        + [row(0, "repetition", "induction_heads", 86), row(1, "repetition", "induction_heads", 52),
           row(0, "recursion", "induction_heads", 66), row(1, "recursion", "induction_heads", 62)]
    )  # fmt: skip
    (line,) = training_seed_doubts(effect)
    assert line == (
        "Training seeds, on all documents, disagree on repetition (heads removed): 86 and 52 % "
        "(seeds 0, 1)."
    )


def test_what_cannot_be_told_is_refused():
    with pytest.raises(icl.InputError, match="'most' or 'none'"):
        task_outcomes(run({"repetition": (98, 60, 50, 98)}), shots="all")
