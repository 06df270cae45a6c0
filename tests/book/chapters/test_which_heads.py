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
    (said,), (verdict,) = which_heads.dose_said(table, 4)
    assert said.startswith("Repetition: with 2 heads removed or more do the highest scores cost")
    assert "4 heads cost +6.0 nats" in said
    assert "the 4 of lowest score, which may lie in other layers, " in said
    assert said.endswith(f"{table['lowest'].iloc[-1]:+.1f}.")
    assert "**held**, on 1 of 1 tasks." in verdict
    assert which_heads.dose_said(table, 1)[1][0].endswith(
        "**did not hold**, on 0 of 1 tasks; not on repetition (p = 1.00, +0.1 nats)."
    )


def test_opposite_tasks_are_named_and_few_random_sets_prove_nothing():
    frame = pd.concat([dose("repetition", {2: 1.0}, 3.9), dose("wordseq1_binary", {2: 3.95}, 3.9)])
    table = which_heads.dose_table(frame)
    _, (said,) = which_heads.dose_said(table, 3)
    assert "Without the 2 highest scores" in said
    assert "**held in part**, on 1 of 2 tasks; not on word sequences 1 (p = 0.33" in said
    few = dose("repetition", {2: 1.0}, 3.9)
    few = few[few["draw"].isna() | (few["draw"] < 5)]
    table = which_heads.dose_table(few)
    assert table["p"].tolist() == pytest.approx([1 / 6])
    assert "did not hold" in which_heads.dose_said(table, 2)[1][0]


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
    assert "**held in part**, on 1 of 2 tasks; not on recursion (-1.00 to -1.00)" in verdict
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
    assert all("**held**, on 1 of 1 tasks" in said for said in (every, positions, heads))
    shown = which_heads.kinds_by_task(table).loc["knockout", "repetition"]
    assert shown.startswith("+3.0 [")
    assert "more than in random heads: yes; more than at random positions: yes" in shown
    # A knockout whose control costs as much, and a resampling that costs nothing.
    other = {**lost, "resample": 4.0, "knockout__random_positions": 1.0}
    _, (every, positions, heads) = which_heads.kinds_said(which_heads.kinds_table(kinds(**other)))
    assert "not on repetition (resample +0.0 nats)" in every
    assert "**did not hold**" in positions
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
    assert "**held in part**, on 1 of 2 kinds of text; not on loss on text (+4.00" in first
    assert "not on loss on text read again (" in copies
    assert "not on repetition (-1.00, random sets" in without
    assert "**did not hold**" in gap


def answers(accuracy, auc, share, *, condition="full", calibrated=None) -> dict:
    fraction = np.nan if condition == "full" else 0.1
    found = {
        "task": "repetition", "labels": "unrelated", "shots": 10, "condition": condition,
        "ablation": "none" if condition == "full" else "mean", "fraction": fraction, "control": "",
        "said": 0, "share": share, "detectable": 10.0,
    }  # fmt: skip
    values = {"accuracy": accuracy, "balanced": accuracy, "calibrated": calibrated or accuracy,
              "auc": auc}  # fmt: skip
    for name, value in values.items():
        found |= {name: value, f"{name}_low": value - 5, f"{name}_high": value + 5}
    return found


@pytest.mark.parametrize(
    ("removed", "said", "held"),
    [
        ((61, 60, 96), "skill is lost, and the bias grows.", True),
        ((61, 91, 96), "no loss of skill is distinguishable, and the bias grows.", False),
        ((50, 51, 55), "no skill is left that these documents show.", True),
        ((5, 4, 52), "the labels are still told apart, and turned around.", True),
    ],
)
def test_bias_and_skill_are_told_apart(removed, said, held):
    table = pd.DataFrame([answers(84, 92, 50), answers(*removed, condition="induction_heads")])
    (sentence,), (verdict,) = which_heads.bias_said(table)
    assert sentence.endswith(said)
    assert f"accuracy 84 to {removed[0]} %" in sentence
    assert f"AUC 92 to {removed[1]}" in sentence
    assert ("**held**" in verdict) == held
    unable = pd.DataFrame([answers(52, 52, 50), answers(50, 50, 50, condition="induction_heads")])
    assert which_heads.bias_said(unable)[0][0].endswith("there was no skill to lose.")


def test_four_labels_are_judged_by_calibrated_accuracy_beside_a_chance_of_25_percent():
    rows = [answers(80, np.nan, 30, calibrated=85),
            answers(30, np.nan, 90, condition="induction_heads", calibrated=45)]  # fmt: skip
    table = pd.DataFrame(rows).assign(task="wordseq1_4way")
    (said,), _ = which_heads.bias_said(table)
    assert "calibrated accuracy 85 to 45 (40 to 50)" in said
    assert said.endswith("skill is lost, and the bias grows.")


def test_stability_is_said_for_each_number_of_heads():
    scores = torch.rand(1, 4, 8, generator=torch.Generator().manual_seed(0)).repeat(5, 1, 1)
    table = which_heads.stability_table(scores, [1 / 32, 4 / 32], 32)
    (said,), (verdict,) = which_heads.stability_said(table)
    assert "4 of 32 heads (12.5 %): 1.00 (1.00 to 1.00)" in said
    assert "**held**, for 2 of 2 sets" in verdict
    table.loc[table.index[0], "mean"] = 0.5
    assert "**held in part**, for 1 of 2 sets" in which_heads.stability_said(table)[1][0]


def test_missing_measurements_are_said_once_and_the_rest_stands(monkeypatch):
    def missing(run):
        raise icl.NotMeasuredError("The bundle does not hold this.")

    for name in ("dose_response", "single_heads", "removal_kinds", "side_effects"):
        monkeypatch.setattr(which_heads, name, missing)
    monkeypatch.setattr(which_heads, "answer_table", lambda documents: documents)
    monkeypatch.setattr(which_heads, "at_most", lambda documents: documents)
    monkeypatch.setattr(which_heads, "bias_said", lambda table: (["Said."], ["*P*: **held**."]))
    monkeypatch.setattr(which_heads, "stability_said", lambda table: ([], []))
    run = SimpleNamespace(
        parameters=SimpleNamespace(analysis_limit=16),
        plan=SimpleNamespace(analysis_sets=lambda: [1, 2, 3], fractions=[]),
        documents=lambda: pd.DataFrame({"ablation": ["none"]}), prefix_scores=lambda: None,
        n_heads=64,
    )  # fmt: skip
    text = which_heads.what_came_out(run)
    assert text.count("The bundle does not hold this.") == 1
    assert "- Said." in text
    assert "How sure" in text
