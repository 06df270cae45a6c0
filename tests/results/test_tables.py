"""The paper's tables: a run of published numbers must reproduce them, cell by cell."""

from __future__ import annotations

import csv

import pandas as pd
import pytest

import icl_helpers as icl
from icl_helpers.results.comparison import published_table, table1, table3, table4, table5
from icl_helpers.results.tables import layout, write_table

MAKERS = {1: table1, 3: table3, 4: table4, 5: table5}
TITLES = {
    "full": "full model", "induction_heads": "induction heads",
    "induction_pattern": "induction pattern", "random_heads": "random heads",
}  # fmt: skip


def run_of(number: int, model: str, *, fractions=(0.01, 0.03)) -> pd.DataFrame:
    """Results as evaluate() gives them, with the published accuracies plus and minus a point."""
    published = icl.published_accuracy()
    rows = published[(published["table"] == number) & (published["model"] == model)]
    share = {0.0: 0.0, 0.01: fractions[0], 0.03: fractions[1]}
    runs = [
        rows.assign(
            accuracy=rows["accuracy"] / 100 + change, demonstration_seed=seed, n=500,
            fraction=rows["fraction"].map(share),
            ablation_seed=pd.Series([pd.NA] * len(rows), index=rows.index, dtype="Int64"),
        ).drop(columns=["table", "model"])
        for seed, change in ((42, -0.01), (43, 0.01))
    ]  # fmt: skip
    return pd.concat(runs, ignore_index=True)


@pytest.mark.parametrize("model", ["Llama-3-8B", "InternLM2-20B"])
@pytest.mark.parametrize("number", MAKERS)
def test_a_run_with_the_published_accuracies_shows_every_published_cell(number, model):
    found = MAKERS[number](run_of(number, model), published_model=model)
    pd.testing.assert_frame_equal(
        found["this run"], found[f"published, {model}"], check_names=False
    )
    published = icl.published_accuracy()
    rows = published[(published["table"] == number) & (published["model"] == model)]
    full = rows[rows["condition"] == "full"].set_index(["task", "labels", "shots"])["accuracy"]
    for row in rows.itertuples():
        key = (row.task, row.labels, row.shots)
        share = f"{row.fraction:.1%}" if row.fraction else ""
        expected = f"{row.accuracy:.1f}"
        if row.fraction:
            expected += f" ({row.accuracy - full[key]:+.1f})"
        assert found.loc[key, ("this run", TITLES[row.condition], share)] == expected
    filled = sum((found["this run"] != "").sum())
    assert filled == len(rows)


def test_columns_name_their_own_share_of_heads_and_their_source():
    results = run_of(1, "InternLM2-20B", fractions=(0.02, 0.06))
    found = table1(results, published_model="Llama-3-8B")
    assert list(found.columns)[:4] == [
        ("this run", "full model", ""),
        ("published, Llama-3-8B", "full model", ""),
        ("this run", "induction heads", "2.0%"),
        ("published, Llama-3-8B", "induction heads", "1.0%"),
    ]
    assert ("this run", "induction pattern", "6.0%") in found.columns
    assert set(table1(results).columns.get_level_values(0)) == {"this run"}


@pytest.mark.parametrize("number", MAKERS)
def test_published_table_has_every_published_cell(number):
    found = published_table(number, "InternLM2-20B")
    beside = MAKERS[number](run_of(number, "InternLM2-20B"), published_model="InternLM2-20B")
    pd.testing.assert_frame_equal(
        found, beside["published, InternLM2-20B"], check_names=False, check_like=True
    )


def test_a_table_takes_its_own_tasks_and_ablation_only():
    results = pd.concat([run_of(1, "Llama-3-8B"), run_of(5, "Llama-3-8B")])
    assert set(table1(results).reset_index()["task"]) == set(icl.task_names())
    assert not set(table5(results).reset_index()["task"]) & set(icl.task_names())
    text = table3(results)["this run"]
    assert list(text.columns) == [("full model", "")]
    both = layout(results, ablation="zero")
    assert both.index.names == ["task", "labels", "shots"]
    assert both.index.is_unique


def test_what_cannot_be_tabulated_is_refused():
    results = run_of(1, "Llama-3-8B")
    with pytest.raises(icl.InputError, match="text classification"):
        table3(results)
    with pytest.raises(icl.InputError, match="full"):
        table1(results[results["condition"] != "full"])
    with pytest.raises(icl.InputError, match="InternLM2-20B, Llama-3-8B"):
        table1(results, published_model="gpt2")


def test_a_table_is_written_as_csv_and_latex(tmp_path):
    table = table1(run_of(1, "Llama-3-8B"))
    files = write_table(table, tmp_path / "tables", "table-1")
    assert [path.name for path in files] == ["table-1.csv", "table-1.tex"]
    with files[0].open(newline="") as file:
        lines = list(csv.reader(file))
    assert [*table.iloc[0]] == lines[-len(table)][3:]
    latex = files[1].read_text()
    assert latex.count(" \\\\\n") == len(table) + 1
    assert "centre\\_embedding" in latex
    assert "1.0\\%" in latex
