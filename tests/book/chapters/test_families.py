"""What the chapter on function vectors says, on measurements made up so that it is known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import icl_helpers as icl
from icl_helpers.book.chapters import families as outcomes
from icl_helpers.book.chapters import families_measured as measured
from icl_helpers.results.statistics import mean_interval
from icl_helpers.tasks.prompts import PromptSet

DOCUMENTS = 12


def margins(mean: float, *, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 0.2, DOCUMENTS)
    return mean + noise - noise.mean()


def removals(task: str, losses: dict[str, float], *, heads: int = 4) -> pd.DataFrame:
    rows = [{"task": task, "heads": 0, "chosen_by": "none", "margins": margins(5)}]
    rows += [
        {"task": task, "heads": heads, "chosen_by": family, "margins": margins(5 - loss, seed=1)}
        for family, loss in losses.items()
    ]
    return pd.DataFrame(rows)


def test_families_keep_out_the_others_best_and_are_matched_in_number():
    prefix, vectors = torch.linspace(1, 0, 64).view(4, 16), torch.linspace(0, 1, 64).view(4, 16)
    vectors[0, 1] = 2
    found = measured.family_sets(prefix, vectors, [1, 3])
    # The best two of either, 2 % of 64 rounded up, are not the other's.
    assert [(one.chosen_by, one.heads) for one in found] == [
        ("induction", ((0, 0),)), ("induction", ((0, 0), (0, 2), (0, 3))),
        ("function vectors", ((3, 15),)), ("function vectors", ((3, 15), (3, 14), (3, 13))),
    ]  # fmt: skip


def test_overlap_is_counted_beside_chance():
    prefix, vectors = torch.zeros(2, 10), torch.zeros(2, 10)
    prefix[1, :4] = torch.tensor([4.0, 3, 2, 1])
    vectors[1, :2] = torch.tensor([4.0, 3])
    vectors[0, :2] = torch.tensor([2.0, 1])
    table = outcomes.overlap_table(prefix, vectors, [0.05, 0.2])
    assert table["shared"].tolist() == [1, 2]
    assert table["by chance"].tolist() == pytest.approx([0.05, 0.8])
    assert table["mean layer, induction"].tolist() == [1, 1]
    assert table["mean layer, function vectors"].tolist() == [1, 0.5]
    (sentence,), (prediction,) = outcomes.overlap_said(table)
    assert "2 of the best 4 of each (chance: 0.8)" in sentence
    # Half is not mostly, however many heads there are.
    assert "**did not hold**; shared are 1 of 1 and 2 of 4." in prediction
    apart = table.assign(shared=[0, 1])
    assert "**held**; shared are 0 of 1 and 1 of 4." in outcomes.overlap_said(apart)[1][0]
    assert "**held in part**" in outcomes.overlap_said(table.assign(shared=[1, 1]))[1][0]


def test_families_are_compared_on_the_same_documents():
    frame = pd.concat(
        [
            removals("repetition", {"induction": 1, "function vectors": 3}),
            removals("recursion", {"induction": 3, "function vectors": 1}),
            removals("wordseq1_binary", {"induction": 2, "function vectors": 2}),
        ]
    )
    table = outcomes.family_table(frame)
    assert [row.mean for row in table["difference"]] == pytest.approx([2, -2, 0])
    (first, second, third), (said,) = outcomes.family_said(table, 5)
    assert "induction +1.00 (" in first
    assert first.endswith("function-vector heads cost more, by the interval over documents.")
    assert second.endswith("induction heads cost more, by the interval over documents.")
    assert third.endswith("which of the two cost more is not decided.")
    assert "**held in part**, on 1 of 3 tasks; contradicted: recursion (difference -2.00" in said
    assert "; not shown: word sequences 1 (" in said


def test_a_family_whose_removal_adds_to_the_margin_costs_no_more_than_the_other():
    frame = removals("repetition", {"induction": -3, "function vectors": -1})
    (sentence, kept), (said,) = outcomes.family_said(
        outcomes.family_table(frame), 5, [icl.Head(18, 6)]
    )
    assert sentence.endswith("neither is shown to cost anything.")
    assert "**was not shown**: repetition (difference +2.00" in said
    assert "best 2 % for function vectors: 18.6. Stage 9 removes them too" in kept


@pytest.mark.parametrize(
    ("gain", "induction", "vectors", "word"),
    [
        (2, 1, 0.1, "**held**."),
        (2, 0.1, 1, "**did not hold**."),
        (0, 1, 0.1, "**was not shown**: late tokens are not predicted better"),
    ],
)
def test_token_losses_decide_only_where_late_tokens_gain(gain, induction, vectors, word):
    rows = [
        (0, "none", margins(gain)),
        (4, "induction", margins(gain - induction, seed=1)),
        (4, "function vectors", margins(gain - vectors, seed=1)),
    ]
    table = outcomes.loss_table(pd.DataFrame(rows, columns=["heads", "chosen_by", "values"]))
    (sentence,), (said,) = outcomes.loss_said(table, 4)
    assert f"without 4 induction heads by {induction:+.2f}" in sentence
    assert word in said


def circuit(**changes) -> dict:
    return {
        "layer": 1, "head": 0, "prefix": 0.9, "vector": 0.0, "copying": 0.9, "logit": 1.0,
        "earlier": "0.0", "alone": 0.1, "together": 0.8, "control": 0.1, "n": 2,
        "composition": 0.2, "rank": 1, "of": 16,
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        ({}, None), ({"prefix": 0.2, "control": 0.0}, "behaves"), ({"copying": 0.4}, "copies"),
        ({"logit": -0.1}, "raises"), ({"together": 0.4}, "composes"),
        ({"control": 0.85}, "composes"), ({"control": 0.5}, "composes"),
    ],
)  # fmt: skip
def test_a_head_passes_where_behaviour_and_every_step_of_the_mechanism_do(changes, fails):
    table = outcomes.circuit_table(pd.DataFrame([circuit(**changes)]), 64)
    passed = table.iloc[0][["behaves", "copies", "raises", "composes"]]
    assert passed[~passed.astype(bool)].index.tolist() == ([fails] if fails else [])
    assert table["both"].item() == (fails is None)
    assert table["within"].item() == "1 %"


def test_circuits_are_summed_up_by_share_of_the_heads():
    frame = pd.DataFrame([circuit(head=n, copying=0.9 if n < 1 else 0.1) for n in range(4)])
    table = outcomes.circuit_table(frame, 64)
    assert table["within"].tolist() == ["1 %", "3 %", "more", "more"]
    (said,), (verdict,) = outcomes.circuit_said(table)
    assert "best 3 % (2), 2 with a score of 0.3 or more, 1 copying by the weights, 2 rais" in said
    assert "**held in part**, for 1 of 4 heads; not for 1.1, 1.2 and 1.3" in verdict
    low = outcomes.circuit_table(frame.assign(prefix=0.1), 64)
    assert "**was not shown**, for no head." in outcomes.circuit_said(low)[1][0]


def test_text_patterns_are_held_against_their_control():
    rows = [{"task": "sst2", "pattern": "none", "pairs": 0.0, "accuracy": 90.0,
             "margins": margins(3)}]  # fmt: skip
    for pattern, loss in zip(outcomes.PATTERNS, (2, 0, 1), strict=True):
        for name, lost in ((pattern, loss), (f"{pattern}, control", 0.5)):
            rows.append({"task": "sst2", "pattern": name, "pairs": 7.0, "accuracy": 60.0,
                         "margins": margins(3 - lost, seed=2)})  # fmt: skip
    table = outcomes.text_table(pd.DataFrame(rows))
    assert [row.mean for row in table["more"]] == pytest.approx([1.5, -0.5, 0.5])
    sentences, predictions = outcomes.text_said(table)
    words = [said.split("**")[1] for said in predictions]
    assert words == ["held", "did not hold", "held"]
    assert "same token +2.00" in sentences[0]


@pytest.mark.parametrize(
    ("direct", "total", "said", "word"),
    [
        (3, 1, "later layers repair part of it.", "held"),
        (1, 3, "later layers add to the loss.", "did not hold"),
        (-1, 3, "later layers add to the loss.", "did not hold"),
        (2, 2, "what later layers change is not distinguishable from nothing.", "was not shown"),
        (-1, -3, "later layers add to a margin not shown to be lost directly.", "was not shown"),
        # A mean above zero is no loss while its interval holds zero.
        (0.02, -3, "later layers add to a margin not shown to be lost directly.", "was not shown"),
    ],
)
def test_repair_is_the_direct_loss_that_the_total_lacks(direct, total, said, word):
    row = {"task": "sst2", "direct": margins(direct), "total": margins(total, seed=3)}
    table = outcomes.repair_table(pd.DataFrame([row]))
    assert table["later layers"].item().mean == pytest.approx(total - direct)
    (sentence,), (prediction,) = outcomes.repair_said(table)
    assert sentence.startswith("SST-2, ")
    assert sentence.endswith(said)
    assert prediction.split("**")[1] == word


def test_tables_show_intervals_as_text_and_no_negative_zero():
    interval = mean_interval(np.array([-0.001, -0.002, -0.001]), level=0.95)
    table = outcomes.shown(pd.DataFrame([{"task": "a", "pairs": 7.26, "loss": interval}]))
    assert table.iloc[0].tolist() == ["a", 7.3, "+0.00 (+0.00 to +0.00)"]


def test_what_a_bundle_lacks_is_said_once_in_place_of_it():
    def measurement(name, of, compute, *args):
        raise icl.NotMeasuredError("The bundle of this run does not hold it.")

    sets = [PromptSet("repetition", "unrelated", 10, (42,), "synthetic", None, "balanced")]
    plan = SimpleNamespace(
        analysis_sets=lambda: sets, fractions=[0.05], data=lambda task: "synthetic",
        tasks=lambda group: ["fact_opinion"], means_parameters=list, sampling=lambda task: "first",
    )  # fmt: skip
    run = SimpleNamespace(
        measurement=measurement, plan=plan, n_heads=64, induction_heads=lambda: [icl.Head(3, 9)],
        prefix_scores=lambda: torch.rand(5, 4, 16), identity={"context": 512},
        parameters=icl.stage_parameters(),
        documents=lambda group: pd.DataFrame(columns=["condition", "task"]),
    )  # fmt: skip
    said = measured.what_came_out(run)
    assert said.count("does not hold it") == 1
    assert "**Predictions" not in said
