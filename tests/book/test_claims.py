"""Claims are judged by their rules: on runs made up so that the verdict is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from icl_helpers.book.claims import VERDICTS, Evidence, Finding, claims
from icl_helpers.files import assets_dir
from icl_helpers.results.statistics import holm, paired_difference, paired_test
from tests.results.test_outcomes import LETTERS, WORDS, rows
from tests.results.test_outcomes import run as made_up

SCORES = np.zeros((4, 16))
SCORES[1, 2] = 0.95
TASKS = (*LETTERS, *WORDS)


def evidence(documents: pd.DataFrame, **other) -> Evidence:
    """A run with zero-shot rows under the removal too, which moves nothing there."""
    extra = [
        rows(task, ("induction_heads", "mean"), 50, shots=0, one_label=True)
        for task in dict.fromkeys(documents["task"])
    ]
    every = pd.concat([documents, *extra], ignore_index=True)
    drawn = every["condition"] == "random_heads"
    every["control"] = np.where(drawn, "published", "")
    given = {"text": every.iloc[:0], "scores": SCORES, "followers": None} | other
    return Evidence(every, **given)


def verdicts(found: Evidence) -> dict[str, str]:
    return {claim.name: claim.judge(found).verdict for claim in claims()}


def test_claims_are_many_and_each_says_where_it_stands_and_how_it_is_judged():
    assert len(claims()) >= 15
    for claim in claims():
        assert all([claim.text, claim.place, claim.rule, claim.published]), claim.name
        assert "{" not in claim.rule
        assert 1 <= claim.stage <= 8


def test_no_verdict_is_typed():
    text = (assets_dir() / "claims.yaml").read_text()
    assert not [word for word in VERDICTS if f": {word}" in text]


def test_a_run_like_the_papers_reproduces_its_claims():
    found = verdicts(evidence(made_up(dict.fromkeys(TASKS, (90, 51, 51, 88)))))
    for name in ("few-heads", "best-head", "few-shot", "three-percent", "random-control",
                  "near-chance", "knockout", "knockout-as-removal"):  # fmt: skip
        assert found[name] == "reproduced", name
    # One share of heads, one kind of removal, one number of examples, no text, no attention.
    for name in ("one-percent", "more-heads", "more-examples", "zero-ablation", "zero-as-mean",
                 "strict-control", "text-removal", "text-benefit", "looks-at-labels"):  # fmt: skip
        assert found[name] == "not testable here", name


def test_one_label_for_all_documents_is_no_evidence_of_chance_without_examples():
    documents = made_up(dict.fromkeys(TASKS, (90, 51, 51, 88)))
    assert verdicts(evidence(documents))["zero-shot-chance"] == "not testable here"
    few = documents[(documents["condition"] != "full") | (documents["shots"] > 0)]
    spread = [rows(task, ("full", "none"), 50, shots=0) for task in TASKS]
    assert verdicts(evidence(pd.concat([few, *spread])))["zero-shot-chance"] == "reproduced"


def test_tasks_that_behave_in_opposite_ways_are_partly():
    accuracy = dict.fromkeys(LETTERS, (90, 90, 90, 90)) | dict.fromkeys(WORDS, (90, 5, 50, 90))
    found = evidence(made_up(accuracy))
    assert verdicts(found)["three-percent"] == "partly"
    (claim,) = (it for it in claims() if it.name == "three-percent")
    effects = claim.judge(found).effects
    assert [effect.split(":")[0] for effect in effects] == [
        "repetition", "recursion", "centre embedding", "word sequences 1", "word sequences 2",
    ]  # fmt: skip
    assert "+0 points" in effects[0]
    assert "not distinguishable" in effects[0]
    assert "-85 points" in effects[3]
    # Far below chance is not close to it, and blocking is far from removing there.
    assert verdicts(found)["near-chance"] == "not reproduced"
    assert verdicts(found)["knockout-as-removal"] == "not reproduced"


def test_nothing_learnt_cannot_test_what_examples_teach():
    found = verdicts(evidence(made_up(dict.fromkeys(TASKS, (50, 50, 50, 50)))))
    assert found["few-shot"] == "not reproduced"
    for name in ("three-percent", "random-control", "knockout", "near-chance"):
        assert found[name] == "not testable here", name


def test_heads_without_effect_are_undecided_not_wrong():
    found = verdicts(evidence(made_up(dict.fromkeys(TASKS, (90, 90, 90, 90)))))
    assert found["three-percent"] == "undecided"
    assert found["knockout"] == "undecided"


def test_heads_whose_removal_helps_contradict_the_claim():
    found = verdicts(evidence(made_up(dict.fromkeys(TASKS, (70, 95, 70, 70)))))
    assert found["three-percent"] == "not reproduced"
    assert found["random-control"] == "not reproduced"


@pytest.mark.parametrize(
    ("scores", "few", "best"),
    [
        (np.zeros((4, 16)), "not reproduced", "not reproduced"),
        (np.full((4, 16), 0.5), "not reproduced", "not reproduced"),
        (np.where(np.arange(64).reshape(4, 16) < 6, 0.92, 0), "reproduced", "reproduced"),
    ],
)
def test_scores_decide_the_claims_about_heads(scores, few, best):
    found = verdicts(evidence(made_up({"repetition": (90, 50, 50, 90)}), scores=scores))
    assert (found["few-heads"], found["best-head"]) == (few, best)


def test_attention_decides_the_claims_about_where_heads_look():
    run = made_up({"repetition": (90, 50, 50, 90)})
    prompts = {
        "repetition, 5 examples": {"colons": [0.9, 0.1], "words": [0.9, 0.9]},
        "wordseq1 binary, 5 examples": {"colons": [0.8, 0.6], "words": [0.4, 0.9]},
    }
    found = judged(evidence(run, followers=prompts))
    assert found["looks-at-labels"].verdict == "reproduced"
    # A letter is no word.
    assert found["looks-at-followers"].verdict == "not reproduced"
    (said,) = found["looks-at-followers"].effects
    assert "best head 40 %, 1 of 2 heads" in said
    prompts["wordseq2 binary, 5 examples"] = {"colons": [0.3, 0.6], "words": [0.7, 0.9]}
    found = judged(evidence(run, followers=prompts))
    assert found["looks-at-labels"].verdict == "partly"
    assert found["looks-at-followers"].verdict == "partly"


def judged(of: Evidence) -> dict[str, Finding]:
    return {claim.name: claim.judge(of) for claim in claims()}


def test_what_cannot_fail_is_not_reproduced():
    # The full model gives one label without examples, and so it does without the heads.
    found = judged(evidence(made_up(dict.fromkeys(TASKS, (90, 51, 51, 88)))))
    assert found["zero-shot-unmoved"].verdict == "not testable here"
    assert "one label" in found["zero-shot-unmoved"].reason
    # Heads that cost nothing: accuracy near chance before and after says nothing of them.
    found = judged(evidence(made_up(dict.fromkeys(TASKS, (64, 60, 60, 64)))))
    for name in ("near-chance", "knockout-as-removal"):
        assert found[name].verdict == "not testable here", name
        assert "left out: repetition" in found[name].reason, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("one-percent", "one number of heads was removed"),
        ("more-examples", "one number of examples was run"),
        ("strict-control", "this control was not run"),
        ("zero-ablation", "zero ablation was not run"),
        ("text-removal", "no text task was run"),
        ("looks-at-labels", "no prompt that was looked at has such places"),
    ],
)
def test_a_claim_that_is_not_testable_says_why(name, why):
    found = judged(evidence(made_up(dict.fromkeys(TASKS, (90, 51, 51, 88)))))[name]
    assert (found.verdict, found.reason) == ("not testable here", why)


def test_text_from_templates_says_nothing_about_the_papers_text():
    run = made_up({"review_sentiment": (90, 51, 51, 88)})
    found = judged(Evidence(text=run))
    for claim in claims():
        if claim.stage == 6:
            assert found[claim.name].verdict == "not testable here", claim.name
            assert "templates" in found[claim.name].reason


def test_paired_difference_is_that_of_the_answers():
    first = rows("repetition", ("full", "none"), 90)
    second = rows("repetition", ("induction_heads", "mean"), 60)
    found, p = paired_difference(first, second)
    gap = first["correct"].to_numpy(int) - second["correct"].to_numpy(int)
    assert found.mean == pytest.approx(100 * gap.mean())
    assert found.low < found.mean < found.high
    assert p == paired_test(first["correct"].to_numpy(int), second["correct"].to_numpy(int))
    assert holm([p, 1.0])[0] == pytest.approx(2 * p)
