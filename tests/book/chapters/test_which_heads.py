"""What the chapter on which heads says, on measurements made up so that it is known what to say."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import icl_helpers as icl
from icl_helpers.book.chapters import which_heads

DOCUMENTS = 12


def margins(mean: float, *, spread: float = 0.2, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, spread, DOCUMENTS)
    return mean + noise - noise.mean()


def row(task: str, heads: int, chosen_by: str, mean: float, *, draw=None, distinct=None, **more):
    return {
        "task": task, "heads": heads, "chosen_by": chosen_by, "draw": draw, "distinct": distinct,
        "margin": mean, "accuracy": 100.0 if mean > 0 else 0.0,
        "margins": margins(mean, seed=heads + 10 * (draw or 0)), **more,
    }  # fmt: skip


def dose(task: str, highest: dict[int, float], random: float) -> pd.DataFrame:
    """A full model of margin 4, and what is left without heads; random sets lie around theirs."""
    rows = [row(task, 0, "none", 4.0)]
    for heads, mean in highest.items():
        rows += [row(task, heads, "highest", mean), row(task, heads, "lowest", 3.9)]
        rows += [row(task, heads, "random", random + 0.01 * n, draw=n, distinct=495)
                 for n in range(20)]  # fmt: skip
    return pd.DataFrame(rows).astype({"draw": "Int64", "distinct": "Int64"})


def test_loss_is_held_against_every_random_set_and_the_heads_themselves():
    table = which_heads.dose_table(dose("repetition", {1: 3.9, 2: 1.0, 4: -2.0}, 3.5))
    assert table["heads"].tolist() == [1, 2, 4]
    assert table["loss"].tolist() == pytest.approx([0.1, 3.0, 6.0])
    assert table["random largest"].tolist() == pytest.approx([0.5] * 3)
    # One head: all 20 random sets cost more. Then none does.
    assert table["p"].tolist() == pytest.approx([21 / 21, 1 / 21, 1 / 21])
    assert table["distinct sets"].tolist() == [495] * 3
    shown = which_heads.dose_by_heads(table)
    assert shown.loc[("repetition", 4), "without the highest scores"].startswith("+6.0 [")
    assert shown["random sets, median and most"].tolist() == ["+0.4, +0.5"] * 3
    assert shown["p (sets)"].tolist() == ["1.00 (20)", "0.05 (20)", "0.05 (20)"]
    (said,), (verdict, lowest) = which_heads.dose_said(table, 4)
    assert said.startswith("Repetition: with 2 or more heads removed the heads of highest score")
    assert "all 20 random sets of the same layers (p = 1/21, uncorrected)" in said
    assert "4 heads cost +6.0 nats" in said
    assert "the 4 of lowest score, which may lie in other layers, " in said
    assert said.endswith(f"{table['lowest'].iloc[-1]:+.1f}.")
    assert verdict.endswith("**held**.")
    assert lowest.endswith("the 4 lowest, in whatever layers*: **held**.")
    # As much as the median random set or less contradicts it.
    assert which_heads.dose_said(table, 1)[1][0].endswith(
        "**did not hold**: repetition (p = 1.00, +0.1 nats)."
    )


def test_heads_of_lowest_score_that_cost_as_much_are_said():
    frame = dose("repetition", {4: 1.0}, 3.5)
    same = frame["chosen_by"] == "lowest"
    frame.loc[same, ["margin"]] = 1.1
    frame.loc[same, "margins"] = pd.Series([margins(1.1, seed=9)], index=frame.index[same])
    (said,), (_, lowest) = which_heads.dose_said(which_heads.dose_table(frame), 4)
    assert said.endswith("which may lie in other layers, +2.9.")
    assert "**was not shown**: repetition (+3.0 and +2.9 nats" in lowest


def test_opposite_tasks_are_named_and_few_random_sets_prove_nothing():
    frame = pd.concat([dose("repetition", {2: 1.0}, 3.9), dose("wordseq1_binary", {2: 3.95}, 3.9)])
    table = which_heads.dose_table(frame)
    _, (said, _) = which_heads.dose_said(table, 3)
    assert "Without the 2 highest scores" in said
    assert "**held in part**, on 1 of 2 tasks; not shown: word sequences 1 (p = 0.33" in said
    few = dose("repetition", {2: 1.0}, 3.9)
    few = few[few["draw"].isna() | (few["draw"] < 5)]
    table = which_heads.dose_table(few)
    assert table["p"].tolist() == pytest.approx([1 / 6])
    assert "was not shown" in which_heads.dose_said(table, 2)[1][0]


def test_scores_that_follow_the_loss_are_a_good_proxy_and_others_are_not():
    scores = np.linspace(0.05, 0.9, 8)

    def alone(task: str, losses) -> pd.DataFrame:
        rows = [row(task, 0, "none", 4.0, layer=None, head=None, score=np.nan)]
        rows += [row(task, 1, "alone", 4.0 - loss, layer=0, head=n, score=score)
                 for n, (score, loss) in enumerate(zip(scores, losses, strict=True))]  # fmt: skip
        return pd.DataFrame(rows)

    frame = pd.concat([alone("repetition", 3 * scores), alone("recursion", -3 * scores)])
    table = which_heads.proxy_table(frame)
    assert table["correlation"].tolist() == pytest.approx([1.0, -1.0])
    assert table.loc["repetition", "costs most"] == "0.7"
    assert table["rank by score"].tolist() == [1, 8]
    sentences, (verdict,) = which_heads.proxy_said(table, pd.DataFrame())
    assert (
        "**held in part**, on 1 of 2 tasks; contradicted: recursion (rank correlation -1.00 to -1.00)"
        in verdict
    )
    assert "head 0.7 costs most, +2.7 nats, and has rank 1" in sentences[0]
    points = which_heads.losses_alone(frame)
    assert points["loss"].tolist() == pytest.approx([*3 * scores, *-3 * scores])
    assert "repetition: 0.7 +2.70 at score 0.90" in which_heads.points_alt(points)


def kinds(**left: float) -> pd.DataFrame:
    """What margin is left of 4 under each kind of removal; by default all of it."""
    from icl_helpers.analysis.removals import KINDS

    given = {name.replace("_", " ").replace("  ", ", "): mean for name, mean in left.items()}
    assert set(given) <= set(KINDS)
    rows = []
    for kind in ("none", *KINDS):
        for draw in range(2 if "random" in kind else 1):
            mean = given.get(kind, 4.0) if kind != "none" else 4.0
            rows.append({"task": "repetition", "kind": kind, "draw": draw, "accuracy": 100.0,
                         "margins": margins(mean, seed=len(rows))})  # fmt: skip
    return pd.DataFrame(rows)


def test_kinds_of_removal_that_agree_and_that_do_not():
    lost = dict.fromkeys(("zero", "mean_of_inputs", "mean_of_outputs", "resample", "knockout"), 1.0)
    table = which_heads.kinds_table(kinds(**lost))
    _, (every, positions, heads) = which_heads.kinds_said(table)
    assert all(said.endswith("**held**.") for said in (every, positions, heads))
    shown = which_heads.kinds_by_task(table).loc["knockout", "repetition"]
    assert shown.startswith("+3.0 [")
    assert "more than in random heads: yes; more than at random positions: yes" in shown
    # A knockout whose control costs as much, and a resampling that costs nothing.
    other = {**lost, "resample": 4.0, "knockout__random_positions": 1.0}
    _, (every, positions, heads) = which_heads.kinds_said(which_heads.kinds_table(kinds(**other)))
    assert "**was not shown**: repetition (resample +0.0 nats)" in every
    assert "**was not shown**" in positions
    assert "(+3.0 nats, control +3.0)" in positions
    assert "**held**" in heads


def effects(changes: dict[str, tuple[float, float]]) -> pd.DataFrame:
    """A value of 2 of every measure, and how it changes without the heads and without random sets."""
    rows = []
    for measure, (highest, random) in changes.items():
        task = "repetition" if measure.startswith("margin") else ""
        each = [("none", None, 0.0), ("highest", None, highest), ("random", 0, random),
                ("random", 1, random / 2)]  # fmt: skip
        for condition, draw, change in each:
            values = margins(2 + change, spread=0.01, seed=len(rows))
            rows.append((measure, task, condition, draw, values))
    names = ["measure", "task", "condition", "draw", "values"]
    return pd.DataFrame(rows, columns=names).astype({"draw": "Int64"})


def test_side_effects_of_copying_heads_and_of_others():
    copying = {
        "loss on random tokens": (0.0, 0.1), "loss on their copies": (5.0, 0.1),
        "loss on text": (0.0, 0.1), "loss on text read again": (3.0, 0.1),
        "margin without examples": (0.0, 0.1), "margin with examples": (-2.0, 0.0),
        "margin with shuffled labels": (0.0, 0.0),
    }  # fmt: skip
    table = which_heads.effects_table(effects(copying))
    gap = table.set_index("measure").loc["true minus shuffled labels"]
    assert (gap["full model"], gap["change"]) == (pytest.approx(0), pytest.approx(-2))
    assert (gap["random smallest"], gap["random largest"]) == (pytest.approx(0), pytest.approx(0))
    _, verdicts = which_heads.effects_said(table)
    assert ["**held**" in said for said in verdicts] == [True] * 4
    assert "loss on text, 0" not in " ".join(verdicts)
    other = {**copying, "loss on text": (4.0, 0.1), "loss on text read again": (0.0, 0.1),
             "margin without examples": (-1.0, 0.0), "margin with examples": (0.0, 0.0)}  # fmt: skip
    _, (first, copies, without, gap) = which_heads.effects_said(
        which_heads.effects_table(effects(other))
    )
    assert "**held in part**, on 1 of 2 kinds of text; contradicted: loss on text (+4.00" in first
    assert "contradicted: loss on text read again (" in copies
    assert "**did not hold**: repetition (-1.00, random sets" in without
    assert "**was not shown**" in gap
    # Better than expected is not as expected either.
    better = which_heads.effects_table(effects({**copying, "loss on text": (-2.0, 0.1)}))
    assert "contradicted: loss on text (-2.00" in which_heads.effects_said(better)[1][0]


def answers(condition: str, apart: float, bias: float = 0.0, *, labels: int = 2) -> pd.DataFrame:
    """Answers of a model that tells labels ``apart``, on the same documents for each condition."""
    targets = np.arange(120) % labels
    scores = np.random.default_rng(0).normal(size=(120, labels))
    scores[np.arange(120), targets] += apart
    scores[:, 0] += bias
    removed = {"full": "none", "induction_pattern": "knockout"}.get(condition, "mean")
    return pd.DataFrame(
        {
            "task": "wordseq1_binary" if labels == 2 else "wordseq1_4way", "labels": "unrelated",
            "shots": 10, "condition": condition, "ablation": removed,
            "fraction": np.nan if condition == "full" else 0.1, "control": "",
            "ablation_seed": pd.NA, "demonstration_seed": 42, "doc_id": np.arange(120),
            "correct": scores.argmax(1) == targets, "valid": True, "target": targets,
            "log_probabilities": list(scores),
        }
    )  # fmt: skip


@pytest.mark.parametrize("condition", ["induction_heads", "induction_pattern"])
@pytest.mark.parametrize(
    ("apart", "bias", "what", "ends", "word"),
    [
        (0.7, 3, "skill is lost, in part (AUC", ", and the bias grows.", "held"),
        (2, 4, "no loss of skill is distinguishable (AUC", ", and the bias grows.",
         "was not shown"),
        (0, 0, "skill is lost, and none is shown to be left (AUC", ").", "held"),
        (-2, 0, "the labels are still told apart, the other way round (AUC", ").", "did not hold"),
    ],
)  # fmt: skip
def test_bias_and_skill_are_told_apart(condition, apart, bias, what, ends, word):
    documents = pd.concat([answers("full", 2), answers(condition, apart, bias)])
    (sentence,), verdicts = which_heads.bias_said(documents)
    assert what in sentence
    assert sentence.endswith(ends)
    assert ("pattern blocked" in sentence) == (condition == "induction_pattern")
    # What was expected was expected of the removal.
    assert [verdict.split("**")[1] for verdict in verdicts] == (
        [word] if condition == "induction_heads" else []
    )


def test_skill_without_the_heads_stands_beside_that_without_random_ones():
    documents = pd.concat(
        [answers("full", 2), answers("induction_heads", 0), answers("random_heads", 2)]
    ).assign(control=lambda frame: np.where(frame["condition"] == "random_heads", "strict", ""))
    (sentence,), _ = which_heads.bias_said(documents)
    before = sentence.split("(AUC ")[1].split()[0]
    assert sentence.endswith(f"; AUC {before} without random heads (strict).")


def test_without_skill_there_is_none_to_lose_and_nothing_to_predict():
    documents = pd.concat([answers("full", 0), answers("induction_heads", 0, 3)])
    (sentence,), verdicts = which_heads.bias_said(documents)
    assert "there was no skill to lose" in sentence
    assert verdicts == []


def test_four_labels_are_judged_by_calibrated_accuracy_beside_a_chance_of_25_percent():
    full = answers("full", 2, labels=4)
    (said,), _ = which_heads.bias_said(
        pd.concat([full, answers("induction_heads", 1, 4, labels=4)])
    )
    assert "skill is lost, in part (calibrated accuracy" in said
    assert said.endswith(", and the bias grows.")
    # Four labels have no other way round.
    (said,), (verdict,) = which_heads.bias_said(
        pd.concat([full, answers("induction_heads", -2, labels=4)])
    )
    assert "the right label is chosen less often than by chance" in said
    assert "**held**" in verdict


def test_stability_is_said_for_each_number_of_heads():
    scores = torch.rand(1, 4, 8, generator=torch.Generator().manual_seed(0)).repeat(5, 1, 1)
    table = which_heads.stability_table(scores, [1 / 32, 4 / 32], 32)
    (said,), (verdict,) = which_heads.stability_said(table)
    assert "4 of 32 heads (12.5 %): 1.00 (1.00 to 1.00)" in said
    assert "**held**, on both sets." in verdict
    table.loc[table.index[0], "mean"] = 0.5
    assert (
        "**held in part**, on 1 of 2 sets; contradicted: "
        in which_heads.stability_said(table)[1][0]
    )


def test_missing_measurements_are_said_once_and_the_rest_stands(monkeypatch):
    def missing(run):
        raise icl.NotMeasuredError("The bundle does not hold this.")

    for name in ("dose_response", "single_heads", "removal_kinds", "side_effects"):
        monkeypatch.setattr(which_heads, name, missing)
    monkeypatch.setattr(which_heads, "answer_table", lambda documents: documents)
    monkeypatch.setattr(which_heads, "at_most", lambda documents: documents)
    monkeypatch.setattr(which_heads, "bias_said", lambda table: (["Said."], ["*P*: **held**."]))
    monkeypatch.setattr(which_heads, "stability_said", lambda table: ([], []))
    monkeypatch.setattr(which_heads, "not_above_chance", lambda run, tasks: [", ".join(tasks)])
    sets = [SimpleNamespace(task=name) for name in ("one", "two", "three")]
    run = SimpleNamespace(
        parameters=SimpleNamespace(analysis_limit=16),
        plan=SimpleNamespace(analysis_sets=lambda: sets, fractions=[]),
        documents=lambda: pd.DataFrame({"ablation": ["none"]}), prefix_scores=lambda: None,
        n_heads=64,
    )  # fmt: skip
    text = which_heads.what_came_out(run)
    assert text.count("The bundle does not hold this.") == 1
    assert "- Said." in text
    assert "- one, two, three" in text
    assert "How sure" in text
