"""What the stages say came out, on runs made up so that a careful reader knows what is to be said."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from icl_helpers.attention.heads import Head
from icl_helpers.book import came_out
from icl_helpers.results.viewer import PromptView
from tests.results.test_outcomes import CONTROL, LETTERS, REMOVED, WORDS, rows, run

OPPOSITE = {
    "repetition": (99, 92, 50, 99), "recursion": (99, 40, 50, 99),
    "wordseq1_binary": (99, 6, 50, 99), "wordseq2_binary": (99, 1, 50, 99),
}  # fmt: skip


def said(parts) -> str:
    return came_out.section(*parts)


def line(text: str, start: str) -> str:
    (found,) = (one for one in text.splitlines() if one.startswith(f"- *{start}"))
    return found


def with_zero_shots(documents: pd.DataFrame, removed: float) -> pd.DataFrame:
    """Add answers without examples that are at chance, and without the heads ``removed`` right."""
    documents = documents[documents["shots"] > 0]
    parts = [documents]
    for task in documents["task"].unique():
        parts.append(rows(task, ("full", "none"), 50, shots=0))
        parts.append(rows(task, REMOVED, removed, shots=0))
        parts += [rows(task, CONTROL, 50, shots=0, draw=draw) for draw in (42, 43, 44)]
    return pd.concat(parts, ignore_index=True)


def test_predictions_that_hold_are_said_to_hold_on_all_tasks():
    documents = with_zero_shots(run(dict.fromkeys(WORDS, (95, 60, 60, 94))), 50)
    removal = said(came_out.removal_parts(documents, 64, numbers=(1, 4)))
    held = "**held**, on all 2 tasks."
    assert line(removal, "Accuracy falls without the induction heads (mean").endswith(held)
    assert line(removal, "It falls more than without random heads (mean").endswith(held)
    assert line(removal, "Accuracy without examples hardly moves (mean").endswith(held)
    # Zero ablation was not evaluated, and nothing is made up about it.
    assert line(removal, "Accuracy falls without the induction heads (zero").endswith(
        "was not evaluated here."
    )
    knockout = said(came_out.knockout_parts(documents, 64))
    assert line(knockout, "Blocking the pattern").endswith(held)
    full = said(came_out.full_parts(documents))
    assert line(full, "Without examples accuracy lies at chance").endswith(held)
    assert line(full, "With examples accuracy is above chance").endswith(held)


def test_predictions_that_fail_name_the_tasks_and_why():
    documents = with_zero_shots(run(OPPOSITE), 80)
    knockout = line(said(came_out.knockout_parts(documents, 64)), "Blocking the pattern")
    assert "**held in part**, on 1 of 4 tasks" in knockout
    assert "repetition (costs more: 50 % blocked, 92 % removed)" in knockout
    assert "word sequences 2 (costs less: 50 % blocked, 1 % removed)" in knockout
    removal = said(came_out.removal_parts(documents, 64))
    moved = line(removal, "Accuracy without examples hardly moves (mean")
    assert "**did not hold**, on 0 of 4 tasks" in moved
    assert "recursion (+30 points" in moved


def test_zero_shot_answers_of_one_label_are_not_called_chance():
    full = said(came_out.full_parts(run(OPPOSITE)))
    found = line(full, "Without examples accuracy lies at chance")
    assert "**was not shown**" in found
    assert "repetition (50 %: one label for nearly all documents)" in found


def test_nothing_learnt_and_everything_at_100_percent_show_no_loss():
    for level in (50, 100):
        text = said(came_out.result_parts(run(dict.fromkeys(LETTERS, (level,) * 4)), 64))
        assert "distinguishably lower on 0 of 3" in text
        # No loss was seen, which is not to say that there is none.
        assert "**was not shown**, on 0 of 3 tasks" in line(text, "Accuracy falls without the")
        assert "not distinguishable" in text


def test_opposite_tasks_are_named_in_headline_and_lines_and_never_averaged():
    text = said(came_out.result_parts(run(OPPOSITE, blocked_is_zero_shot=True), 64))
    assert "distinguishably lower on 4 of 4; below chance on 3" in text
    assert "**Words, two labels** (2 tasks, chance 50 %): Full model 99 %." in text
    assert "Heads removed 1 to 6 %; below chance" in text
    assert "Heads removed repetition 92 %, recursion 40 %; below chance on recursion" in text
    assert "35 %" not in text
    caption = came_out.removal_caption(run(OPPOSITE))
    assert "words, two labels 1 to 6 %; below chance" in caption
    assert came_out.removal_caption(run(OPPOSITE).query("condition == 'full'")) == ""


def test_seeds_and_draws_that_disagree_come_first():
    documents = run({"centre_embedding": (98, 60, 50, 98)})
    drawn = (documents["condition"] == "random_heads") & (documents["ablation_seed"] == 44)
    parts = [rows("centre_embedding", CONTROL, 86, seed=s, draw=44) for s in (42, 43, 44)]
    documents = pd.concat([documents[~drawn], *parts], ignore_index=True)
    text = said(came_out.result_parts(documents, 64))
    assert text.startswith("**Seeds or draws disagree**\n\n- Control draws disagree on centre")
    tiny = said(came_out.result_parts(run({"repetition": (98, 60, 50, 98)}), 64, "icl-tiny"))
    assert tiny.startswith("**Seeds or draws disagree**\n\n- Training seeds disagree")
    other = said(came_out.result_parts(run({"repetition": (98, 60, 50, 98)}), 64, "some/model"))
    assert "disagree on" not in other
    one = said(came_out.result_parts(run({"repetition": (98, 60, 50, 98)}, seeds=(42,)), 64))
    assert "One demonstration seed only" in one.split("**How sure**")[1]


@pytest.mark.parametrize(
    ("high", "count", "verdict"),
    [
        (0, "None of 64 heads", "**did not hold**: no head"),
        (4, "4 of 64 heads (6.3 %)", "**held**"),
        (20, "20 of 64 heads (31.3 %)", "**did not hold**: more than 10 %"),
    ],
)
def test_scores_are_counted(high, count, verdict):
    scores = torch.full((5, 4, 16), 0.05)
    scores.view(5, 64)[:, :high] = 0.9
    scores[:, 0, 0] += 0.05
    text = said(came_out.score_parts(scores, [2 / 64, 4 / 64]))
    assert f"- {count} score 0.3 or more" in text
    assert verdict in text
    assert "layer 0 head 0" in text
    assert "4 of 64 heads (6.3 %)" in text


def view(attended: str) -> PromptView:
    text = "A list.\n\npear cat:Foo\n\nsofa nurse:Bar\n\nplum dog:"
    spans, start = [], 0
    for token in ("A list.", "\n\n", "pear", " cat", ":", "Foo", "\n\n", "sofa", " nurse", ":",
                  "Bar", "\n\n", "plum", " dog", ":"):  # fmt: skip
        spans.append((start, start + len(token)))
        start += len(token)
    assert start == len(text)
    plain = torch.zeros(len(spans), len(spans))
    key = [text[a:b].strip() for a, b in spans].index(attended)
    plain[:, key] = 0.9
    heads = {Head(3, head): plain for head in (1, 2)}
    return PromptView(text, tuple(spans), torch.zeros(15, 15, dtype=torch.bool), heads, heads)


def test_where_heads_look_is_read_off_the_numbers():
    on_label = said(came_out.pattern_parts(view("Foo")))
    assert (
        "From the final colon: 2 of 2 heads put most, 90 %, on *Foo* (token 6, after *:*)"
        in on_label
    )
    assert "**held**, 2 of 2" in line(on_label, "From the final colon")
    assert "**did not hold**, 0 of 2" in line(on_label, "From *plum*")
    wrong = said(came_out.pattern_parts(view("nurse")))
    assert "on *nurse* (token 9, after *sofa*)" in wrong
    assert "**did not hold**, 0 of 2" in line(wrong, "From *plum*")
    right = said(came_out.pattern_parts(view("cat")))
    assert "**held**, 2 of 2" in line(right, "From *plum*")


def test_norms_of_means_are_placed_beside_the_others():
    norms = torch.ones(2, 4)
    norms[1, 3] = 5.0
    text = said(came_out.mean_parts(norms, [Head(1, 3)]))
    assert "norms are 1.00 to 5.00, with a median of 1.00" in text
    assert "removed are 5.00, above the median for 1 of 1" in text


def test_text_tasks_are_told_apart_by_their_labels():
    parts = [
        rows("sst2", condition, right, shots=shots, draw=42 if condition == CONTROL else None)
        .assign(labels=labels)
        for labels, fall in (("semantic", 0), ("unrelated", 35))
        for shots in (0, 10)
        for condition, right in (
            (("full", "none"), 90 if shots else 50), (REMOVED, 90 - fall if shots else 50),
            (CONTROL, 90 if shots else 50),
        )
    ]  # fmt: skip
    text = said(came_out.text_parts(pd.concat(parts, ignore_index=True), 64))
    found = line(text, "Accuracy falls without the induction heads (mean")
    assert "**held in part**, on 1 of 2 tasks; not on sst2, semantic labels" in found
    assert "No text task" in said(came_out.text_parts(pd.DataFrame(), 64))
