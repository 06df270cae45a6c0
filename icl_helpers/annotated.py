"""The paper's tables with how sure each number is: intervals, tests, marks (Tables 1, 3, 4, 5).

One cell holds the accuracy, its difference to the full model, a mark where that difference is
distinguishable from noise, and the 95 % interval of the accuracy. The last columns compare
induction heads with random heads on the same documents.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pandas as pd

from icl_helpers.errors import InputError
from icl_helpers.statistics import accuracy_intervals, comparisons
from icl_helpers.tables import CONDITION_TITLES, ROW, share_text, table_rows

__all__ = ["LEGEND", "MARK", "AnnotatedTable", "annotated_table"]

MARK = "*"
LEGEND = (
    "Each cell: accuracy in percent; in parentheses the difference to the full model in points; in "
    "brackets the 95 % interval of the accuracy, over documents and seeds. The columns *induction "
    "minus random* hold the difference between the two, with its own interval. A star marks a "
    "difference that is distinguishable from noise: the probability of one as large without any "
    "effect, by an exact paired test on the same documents and corrected by Holm's method for all "
    "tests of the table, is below 5 %. What has no star may differ or not: these documents do not "
    "tell."
)
_TESTED = [
    *ROW, "condition", "ablation", "fraction", "against", "difference", "low", "high", "p",
    "p_holm", "cohens_g", "distinguishable",
]  # fmt: skip


class AnnotatedTable(NamedTuple):
    """``cells``: text, in the paper's layout; ``tests``: one row per comparison, as numbers."""

    cells: pd.DataFrame
    tests: pd.DataFrame


def annotated_table(documents: pd.DataFrame, number: int) -> AnnotatedTable:
    """Table 1, 3, 4 or 5 of a run from its per-document results.

    ``cells`` is indexed by task, labels and shots, with columns (condition, share of heads).
    ``tests`` has the columns of :func:`icl_helpers.statistics.comparisons`, corrected over this
    table alone. Raises :class:`InputError` when the run holds none of the table's rows or no full
    model.
    """
    rows = table_rows(documents, number)
    if not (rows["condition"] == "full").any():
        raise InputError("the results hold no full model to compare with; evaluate 'full' first")
    accuracies = accuracy_intervals(rows)
    tests = comparisons(rows)
    found: dict[tuple[Any, ...], dict[tuple[str, float], str]] = {}
    to_full = _indexed(tests[tests["against"] == "full"])
    for cell in accuracies.to_dict("records"):
        row = found.setdefault(tuple(cell[name] for name in ROW), {})
        row[cell["condition"], cell["fraction"]] = _accuracy_text(cell, to_full)
    for test in tests[tests["against"] == "random_heads"].to_dict("records"):
        row = found[tuple(test[name] for name in ROW)]
        row["induction minus random", test["fraction"]] = (
            f"{_points(test)} [{test['low']:+.1f}, {test['high']:+.1f}]"
        )
    return AnnotatedTable(_frame(found), tests[_TESTED])


def _indexed(tests: pd.DataFrame) -> dict[tuple[Any, ...], dict[Any, Any]]:
    return {
        (*(test[name] for name in ROW), test["condition"], test["fraction"]): test
        for test in tests.to_dict("records")
    }


def _accuracy_text(cell: dict[Any, Any], to_full: dict[tuple[Any, ...], dict[Any, Any]]) -> str:
    test = to_full.get((*(cell[name] for name in ROW), cell["condition"], cell["fraction"]))
    difference = f" ({test['difference']:+.1f}){_mark(test)}" if test else ""
    return f"{cell['accuracy']:.1f}{difference} [{cell['low']:.1f}, {cell['high']:.1f}]"


def _points(test: dict[Any, Any]) -> str:
    return f"{test['difference']:+.1f}{_mark(test)}"


def _mark(test: dict[Any, Any]) -> str:
    return MARK if test["distinguishable"] else ""


def _frame(found: dict[tuple[Any, ...], dict[tuple[str, float], str]]) -> pd.DataFrame:
    order = [*CONDITION_TITLES, "induction minus random"]
    columns = sorted(
        {column for row in found.values() for column in row},
        key=lambda column: (order.index(column[0]), column[1]),
    )
    frame = pd.DataFrame.from_dict(found, orient="index").reindex(
        columns=pd.MultiIndex.from_tuples(columns)
    )
    frame.index = pd.MultiIndex.from_tuples(list(found), names=ROW)
    frame.columns = pd.MultiIndex.from_tuples(
        [(CONDITION_TITLES.get(name, name), share_text(share)) for name, share in columns]
    )
    return frame.fillna("")
