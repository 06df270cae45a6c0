"""What others published, as it is shipped and shown, against counting by hand."""

from __future__ import annotations

import json
import re

import pandas as pd
import pyarrow.parquet
import pytest

from icl_helpers.results import notebook
from icl_helpers.results.comparison import count_induction_heads, published_head_scores
from tests import published_data
from tests.conftest import SHARED

WHOLE = SHARED / "published" / "head_scores.parquet"
REFERENCE = SHARED / "reference" / "smollm2.json"
PUBLISHED = published_data.PUBLISHED


def by_hand() -> dict[tuple[str, str], dict[tuple[int, int], float]]:
    """Every model and checkpoint's score by layer and head, read row by row without pandas."""
    grids: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
    for row in pyarrow.parquet.read_table(PUBLISHED / "head_scores.parquet").to_pylist():
        grid = grids.setdefault((row["model"], row["checkpoint"]), {})
        assert (row["layer"], row["head"]) not in grid
        grid[row["layer"], row["head"]] = row["score"]
    return grids


@pytest.fixture
def shown(monkeypatch):
    """Alternative texts and captions of the figures that are displayed."""
    texts: list[str] = []
    monkeypatch.setattr(
        notebook,
        "show_figure",
        lambda figure, *, alt, caption, narrow=None: texts.extend([alt, caption]),
    )
    return texts


@pytest.mark.skipif(not WHOLE.is_file(), reason="the whole of the published scores is not here")
def test_shipped_scores_are_those_published_for_random_tokens():
    grids = by_hand()
    count = 0
    for row in pyarrow.parquet.read_table(WHOLE).to_pylist():
        if (row["measure"], row["text"]) == ("next_tok_attn", "random_tokens"):
            grid = grids[row["model"], row["checkpoint"]]
            assert grid[row["layer"], row["head"]] == row["score"]
            count += 1
    assert count == sum(map(len, grids.values()))
    cut = published_data.head_scores(pd.read_parquet(WHOLE))
    pd.testing.assert_frame_equal(cut, pd.read_parquet(PUBLISHED / "head_scores.parquet"))


def test_llama_3_8b_beside_the_claim_is_what_counting_gives(shown):
    grid = by_hand()["Meta-Llama-3-8B", "final"]
    assert sorted(grid) == [(layer, head) for layer in range(32) for head in range(32)]
    high = sum(score >= 0.3 for score in grid.values())
    layer, head = max(grid, key=grid.__getitem__)
    # The paper says about 3 %, layer 15, head 30, and 0.98.
    assert (high, layer, head, round(grid[15, 30], 2)) == (30, 15, 30, 0.98)
    notebook.show_published_scores()
    alt, caption = shown
    for text in shown:
        assert f"{high} of 1,024 heads ({100 * high / 1024:.1f} %) score 0.3 or more" in text
        assert f"layer {layer}, head {head}, with {grid[layer, head]:.2f}, the same head" in text
        assert "as published by Feucht et al." in text
    assert "not measured here" in caption
    assert "Llama-3-8B" in alt


def test_another_best_head_is_called_another(shown, monkeypatch):
    scores = published_head_scores()
    there = (scores["model"] == "Meta-Llama-3-8B") & (scores["layer"] == 3) & (scores["head"] == 7)
    scores.loc[there, "score"] = 0.99
    monkeypatch.setattr(notebook.comparison, "published_head_scores", lambda: scores)
    notebook.show_published_scores()
    assert "31 of 1,024" in shown[-1]
    assert "layer 3, head 7, with 0.99, another head than in the paper" in shown[-1]


def test_heads_are_counted_by_model_and_step_with_the_final_weights_last():
    found = count_induction_heads(published_head_scores())
    grids = by_hand()
    assert len(found) == len(grids) == 18
    for _, rows in found.groupby("model"):
        steps = rows["step"].tolist()
        assert pd.isna(steps[-1])
        assert steps[:-1] == sorted(steps[:-1])
    for (model, checkpoint), grid in grids.items():
        number = re.search(r"step(\d+)", checkpoint)
        assert (number is None) == (checkpoint == "final")
        step = found["step"].isna() if number is None else found["step"] == int(number[1])
        row = found[(found["model"] == model) & step].iloc[0]
        best = max(grid, key=grid.__getitem__)
        assert (row["layer"], row["head"], row["score"]) == (*best, grid[best])
        assert row["heads"] == len(grid)
        assert row["induction"] == sum(score >= 0.3 for score in grid.values())


@pytest.mark.skipif(not REFERENCE.is_file(), reason="the published code's values are not here")
def test_shipped_readings_of_the_knockout_are_those_of_the_published_code():
    reference = json.loads(REFERENCE.read_text())
    shipped = pd.read_csv(PUBLISHED / "knockout_readings.csv")
    pd.testing.assert_frame_equal(published_data.knockout_readings(reference), shipped)
    names = {"first token": "knock", "whole blank line": "knockfix"}
    task = reference["tasks"]["wordseq1_binary"]
    assert len(shipped) == 4 * len(task["targets"])
    for row in shipped.itertuples():
        given = task["conditions"][f"{names[row.blocked]}_{row.fraction}"]
        assert given["logprobs"][row.doc_id] == [row.Foo, row.Bar]
        assert given["chosen"][row.doc_id] == ("Foo" if row.Foo > row.Bar else "Bar")
