"""What the paper published, in the words of the pages: ranges over tasks, by model or by kind.

Example
-------
>>> published_ranges(1)()
'InternLM2-20B -33 to -4 points (Table 1); Llama-3-8B -32 to -7 points (Table 1)'
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from icl_helpers.results.outcomes import Span, range_in_words
from icl_helpers.results.tables import published_accuracy

__all__ = [
    "published_gaps", "published_levels", "published_more", "published_ranges", "range_of_gaps",
]  # fmt: skip


def published_gaps(
    number: int, condition: str, *, fraction: float = 0.03, against: str = "full",
    shots: str = "most",
) -> pd.DataFrame:  # fmt: skip
    """Return what a published table says of a condition beside another one of the same row.

    Columns: model, task, labels, shots (each task's ``most``, or ``none``) and gap, in points.
    """
    rows, key = published_accuracy().query("table == @number"), ["model", "task", "labels"]
    most = rows.groupby(key)["shots"].transform("max")
    rows = rows[rows["shots"] == (most if shots == "most" else 0)]
    value = rows[(rows["condition"] == condition) & (rows["fraction"] == fraction)]
    rival = rows[(rows["condition"] == against) & rows["fraction"].isin([fraction, 0])]
    both = value.merge(rival, on=[*key, "shots"], suffixes=("", "_against"))
    return both[[*key, "shots"]].assign(gap=both["accuracy"] - both["accuracy_against"])


def range_of_gaps(gaps: pd.Series, by: pd.Series) -> dict[str, str]:
    """Word the range of differences, in points, by a key in the order of its appearance."""
    bounds = gaps.groupby(by, sort=False).agg(["min", "max"]).round()
    return {
        str(name): f"{low or 0:+.0f} to {high or 0:+.0f}" for name, low, high in bounds.itertuples()
    }


def published_ranges(
    number: int, condition: str = "induction_heads", *, labels: str | None = None,
    small: float | None = None, **options: Any,
) -> Callable[[], str]:  # fmt: skip
    """Word the published differences of a condition as a range over tasks, by model.

    With ``small`` how many of them lie within so many points.
    """

    def say() -> str:
        gaps = published_gaps(number, condition, **options)
        gaps = gaps[gaps["labels"] == labels] if labels else gaps
        ranges = sorted(range_of_gaps(gaps["gap"], gaps["model"]).items())
        said = "; ".join(f"{model} {of} points (Table {number})" for model, of in ranges)
        if small is None:
            return said
        count = int((gaps["gap"].abs() <= small).sum())
        return f"{said}; within {small:.0f} points in {count} of {len(gaps)} rows"

    return say


def published_levels(
    condition: str, *, shots: str = "most", fraction: float = 0.0, close: float | None = None
) -> Callable[[], str]:
    """Word the published accuracies of a condition on the abstract tasks, by number of labels.

    With ``close`` how many of them lie within so many points of chance.
    """

    def say() -> str:
        rows = published_accuracy().query("table == 1")
        most = rows.groupby(["model", "task"])["shots"].transform("max")
        rows = rows[rows["shots"] == (most if shots == "most" else 0)]
        rows = rows[(rows["condition"] == condition) & (rows["fraction"] == fraction)]
        said = []
        for (model, four), part in rows.groupby(["model", rows["task"].str.contains("4way")]):
            span = Span.of(list(part["accuracy"]))
            said.append(f"{model}, {'four' if four else 'two'} labels, {range_in_words(span)} %")
        if close is None:
            return f"{'; '.join(said)} (Table 1)"
        chance = rows["task"].str.contains("4way").map({True: 25.0, False: 50.0})
        near = int(((rows["accuracy"] - chance).abs() <= close).sum())
        within = f"within {close:.0f} points of chance in {near} of {len(rows)} rows"
        return f"{'; '.join(said)} (Table 1); {within}"

    return say


def published_more() -> str:
    rows = published_accuracy().query("table == 1 and condition == 'full' and shots in (5, 10)")
    wide = rows.pivot(index=["model", "task"], columns="shots", values="accuracy").dropna()
    gaps = (wide[10] - wide[5]).groupby("model").agg(["min", "max"]).round()
    said = [f"{model} {low:+.0f} to {high:+.0f} points" for model, (low, high) in gaps.T.items()]
    return f"{'; '.join(said)} from 5 to 10 examples (Table 1)"
