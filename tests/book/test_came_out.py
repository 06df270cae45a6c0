"""What the stages say came out, on runs made up so that a careful reader knows what is to be said."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

from icl_helpers.attention.heads import Head
from icl_helpers.book import came_out
from icl_helpers.results.outcomes import removal_caption
from icl_helpers.results.viewer import PromptView, query_followers, query_word
from tests.results.test_outcomes import CONTROL, LETTERS, REMOVED, rows, run

OPPOSITE = {
    "repetition": (99, 92, 50, 99), "recursion": (99, 40, 50, 99),
    "wordseq1_binary": (99, 6, 50, 99), "wordseq2_binary": (99, 1, 50, 99),
}  # fmt: skip


def said(parts) -> str:
    return came_out.section(*parts)


def test_nothing_learnt_and_everything_at_100_percent_show_no_loss():
    for level in (50, 100):
        text = said(came_out.result_parts(run(dict.fromkeys(LETTERS, (level,) * 4)), 64))
        assert "distinguishably lower on 0 of 3" in text
        assert "not distinguishable" in text


def test_opposite_tasks_are_named_in_headline_and_lines_and_never_averaged():
    text = said(came_out.result_parts(run(OPPOSITE, blocked_is_zero_shot=True), 64))
    assert "distinguishably lower on 4 of 4; below chance on 3" in text
    assert "**Words, two labels** (2 tasks, chance 50 %): Full model 99 %." in text
    assert "Heads removed 1 to 6 %; below chance" in text
    assert "Heads removed repetition 92 %, recursion 40 %; below chance on recursion" in text
    assert "35 %" not in text
    caption = removal_caption(run(OPPOSITE))
    assert "words, two labels 1 to 6 %; below chance" in caption
    assert removal_caption(run(OPPOSITE).query("condition == 'full'")) == ""


def test_seeds_and_draws_that_disagree_come_first():
    documents = run({"centre_embedding": (98, 60, 50, 98)})
    drawn = (documents["condition"] == "random_heads") & (documents["ablation_seed"] == 44)
    parts = [rows("centre_embedding", CONTROL, 86, seed=s, draw=44) for s in (42, 43, 44)]
    documents = pd.concat([documents[~drawn], *parts], ignore_index=True)
    text = said(came_out.result_parts(documents, 64))
    assert text.startswith("**Seeds or draws disagree**\n\n- Control draws disagree on centre")
    tiny = said(came_out.result_parts(run({"repetition": (98, 60, 50, 98)}), 64, "icl-tiny"))
    assert tiny.startswith(
        "**Seeds or draws disagree**\n\n- Training seeds, on all documents, disagree"
    )
    other = said(came_out.result_parts(run({"repetition": (98, 60, 50, 98)}), 64, "some/model"))
    assert "disagree on" not in other
    one = said(came_out.result_parts(run({"repetition": (98, 60, 50, 98)}, seeds=(42,)), 64))
    assert "One demonstration seed only" in one.split("**How sure**")[1]


@pytest.mark.parametrize(
    ("high", "count"),
    [(0, "None of 64 heads"), (4, "4 of 64 heads (6.3 %)"), (20, "20 of 64 heads (31.3 %)")],
)
def test_scores_are_counted(high, count):
    scores = torch.full((5, 4, 16), 0.05)
    scores.view(5, 64)[:, :high] = 0.9
    scores[:, 0, 0] += 0.05
    text = said(came_out.score_parts(scores, [2 / 64, 4 / 64]))
    assert f"- {count} score 0.3 or more" in text
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
    assert "2 of 2 heads put more than half of their attention on earlier labels" in on_label
    assert "0 of 2 heads put more than half of their attention on what followed" in on_label
    wrong = said(came_out.pattern_parts(view("nurse")))
    assert "on *nurse* (token 9, after *sofa*)" in wrong
    assert "0 of 2 heads put more than half of their attention on what followed" in wrong
    right = said(came_out.pattern_parts(view("cat")))
    assert "2 of 2 heads put more than half of their attention on what followed" in right


def test_a_word_of_several_tokens_is_looked_from_at_its_end():
    text = "A list.\n\ngrape cat:Foo\n\nplum dog:"
    tokens = ["A list.", "\n\n", "gra", "pe", " cat", ":", "Foo", "\n\n", "pl", "um", " dog", ":"]
    starts = np.cumsum([0, *map(len, tokens)]).tolist()
    spans = tuple(itertools.pairwise(starts))
    blocked = torch.zeros(12, 12, dtype=torch.bool)
    # The last token of the word attends to what followed the other fruit, the first to the start.
    plain = torch.zeros(12, 12)
    plain[8, 0], plain[9, 4] = 1.0, 1.0
    view = PromptView(text, spans, blocked, {Head(0, 0): plain}, {Head(0, 0): plain})
    assert query_word(view) == ("plum", 9)
    assert query_followers(view)["words"] == [1.0]
    assert "From the end of *plum*, the query's first word: 1 of 1 heads put most, 100 %, on" in (
        said(came_out.pattern_parts(view))
    )


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
    assert "Mean ablation. Text, semantic labels, 10 examples, without" in text
    assert "Mean ablation. Text, unrelated labels, 10 examples, without" in text
    assert "No text task" in said(came_out.text_parts(pd.DataFrame(), 64))


class MadeUpRun:
    """What :func:`what_came_out` asks of a run."""

    parameters = type("parameters", (), {"model": "some/model"})
    plan = type("plan", (), {"fractions": [2 / 64, 4 / 64]})
    n_heads = 64

    def __init__(self, documents: pd.DataFrame) -> None:
        self._documents = documents

    def documents(self, group: str = "tasks") -> pd.DataFrame:
        return self._documents if group == "tasks" else self._documents.iloc[:0]

    def prefix_scores(self) -> torch.Tensor:
        scores = torch.full((5, 4, 16), 0.05)
        scores[:, 1, 2] = 0.95
        return scores


@pytest.mark.slow
def test_every_stage_judges_the_claims_that_it_measures():
    made_up = MadeUpRun(run(OPPOSITE, blocked_is_zero_shot=True))
    first = came_out.what_came_out(made_up, 1)
    assert "*A few per cent of the heads do induction.* **Reproduced** (1 of 64 heads" in first
    full = came_out.what_came_out(made_up, 3)
    assert "*With examples every abstract task is above chance.* **Reproduced**" in full
    removed = came_out.what_came_out(made_up, 4)
    assert (
        "*Without the heads few-shot accuracy is close to chance.* **Partly** (in 1 of 4; not in"
        in removed
    )
    # Nothing is made up about what was not evaluated.
    assert (
        "*Zero ablation costs few-shot accuracy too.* **Not testable here** (zero ablation was"
        in removed
    )
    blocked = came_out.what_came_out(made_up, 5)
    assert "*Blocking only the induction pattern costs few-shot accuracy.* **Repro" in blocked
    assert "about as much as removing the heads.* **Not reproduced** (in none of 4;" in blocked
    assert "Blocking" in came_out.what_came_out(made_up, 8)
    assert "Which claims hold" not in came_out.section(["p"], ["m"], ["s"])


def test_what_rounds_to_nothing_has_no_sign():
    text = came_out.section([], ["lost -0.0 nats (-0.04 to +0.00)", "layer 3-0.00"], [])
    assert "lost +0.0 nats (-0.04 to +0.00)" in text


def test_tasks_at_chance_are_named_beside_what_removal_changes_there():
    made_up = MadeUpRun(run({"repetition": (98, 60, 50, 98), "recursion": (51, 50, 50, 50)}))
    (line,) = came_out.not_above_chance(made_up, ["repetition", "recursion"])
    assert "above chance, in accuracy, on recursion: what removal changes" in line
    assert came_out.not_above_chance(made_up, ["repetition"]) == []
