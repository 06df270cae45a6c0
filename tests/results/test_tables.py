"""The paper's tables: every published cell in its place, and tables as files."""

from __future__ import annotations

import csv

import pandas as pd
import pytest

import icl_helpers as icl
from icl_helpers.results.comparison import published_table
from icl_helpers.results.tables import (
    markdown_table,
    range_of_gaps,
    table_rows,
    unsigned_zeros,
    write_table,
)

NUMBERS = (1, 3, 4, 5)
# How many heads the paper removes: one and three percent of 32 x 32 and of 48 x 48, rounded up.
HEADS = {
    "Llama-3-8B": {
        0: "", 0.01: "11 of 1,024 heads (1.1 %)", 0.03: "31 of 1,024 heads (3.0 %)",
    },
    "InternLM2-20B": {
        0: "", 0.01: "24 of 2,304 heads (1.0 %)", 0.03: "70 of 2,304 heads (3.0 %)",
    },
}  # fmt: skip
TITLES = {
    "full": "full model", "induction_heads": "induction heads",
    "induction_pattern": "induction pattern", "random_heads": "random heads",
}  # fmt: skip


def published_rows(number: int, model: str) -> pd.DataFrame:
    published = icl.published_accuracy()
    return published[(published["table"] == number) & (published["model"] == model)]


@pytest.mark.parametrize("model", ["Llama-3-8B", "InternLM2-20B"])
@pytest.mark.parametrize("number", NUMBERS)
def test_published_table_shows_every_published_cell_and_no_other(number, model):
    table = published_table(number, model)
    rows = published_rows(number, model)
    full = rows[rows["condition"] == "full"].set_index(["task", "labels", "shots"])["accuracy"]
    for row in rows.itertuples():
        key = (row.task, row.labels, row.shots)
        share = HEADS[model][row.fraction]
        expected = f"{row.accuracy:.1f}"
        if row.fraction:
            expected += f" ({row.accuracy - full[key]:+.1f})"
        assert table.loc[key, (TITLES[row.condition], share)] == expected
    assert sum((table != "").sum()) == len(rows)
    assert table.index.names == ["task", "labels", "shots"]
    assert table.index.is_unique


def test_columns_are_in_the_papers_order_with_their_share_of_heads():
    assert list(published_table(1, "Llama-3-8B").columns) == [
        ("full model", ""),
        *(
            (title, share)
            for title in list(TITLES.values())[1:]
            for share in list(HEADS["Llama-3-8B"].values())[1:]
        ),
    ]


def test_a_table_takes_its_own_tasks_and_ablation_only():
    results = pd.concat([published_rows(1, "Llama-3-8B"), published_rows(5, "Llama-3-8B")])
    assert set(table_rows(results, 1)["task"]) == set(icl.task_names())
    assert not set(table_rows(results, 5)["task"]) & set(icl.task_names())
    assert set(table_rows(results, 3)["condition"]) == {"full"}


def test_what_cannot_be_tabulated_is_refused():
    with pytest.raises(icl.InputError, match="text classification"):
        table_rows(published_rows(1, "Llama-3-8B"), 3)
    with pytest.raises(icl.InputError, match="1, 3, 4 and 5, got 2"):
        table_rows(published_rows(1, "Llama-3-8B"), 2)
    with pytest.raises(icl.InputError, match="InternLM2-20B, Llama-3-8B"):
        published_table(1, "gpt2")


def test_a_table_is_written_as_csv_and_latex(tmp_path):
    table = published_table(1, "Llama-3-8B")
    files = write_table(table, tmp_path / "tables", "table-1")
    assert [path.name for path in files] == ["table-1.csv", "table-1.tex"]
    with files[0].open(newline="") as file:
        lines = list(csv.reader(file))
    assert [*table.iloc[0]] == lines[-len(table)][3:]
    latex = files[1].read_text()
    assert latex.count(" \\\\\n") == len(table) + 1
    assert "centre\\_embedding" in latex
    assert "31 of 1,024 heads (3.0 \\%)" in latex


def test_what_rounds_to_nothing_has_no_minus():
    said = "lost -0.0, -0 to +3, -0.05, -0.00. layer 3-0.00, 2026-0, [-0.0, 1], top -0.4"
    right = "lost +0.0, +0 to +3, -0.05, +0.00. layer 3-0.00, 2026-0, [+0.0, 1], top -0.4"
    assert unsigned_zeros(said) == right
    assert "| +0.0 |" in markdown_table(["change"], [["-0.0"]])


def test_a_range_of_one_value_is_that_value_and_what_rounds_to_nothing_has_no_minus():
    gaps = pd.Series([-2.2, -1.8, 3.0, 5.0, -0.4, -0.3])
    by = pd.Series(["one", "one", "two", "two", "none", "none"])
    assert range_of_gaps(gaps, by) == {"one": "-2", "two": "+3 to +5", "none": "+0"}
