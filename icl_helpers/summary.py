"""The few numbers that prose and front page quote, computed from results."""

from __future__ import annotations

from typing import Any

import pandas as pd

from icl_helpers.task_registry import task_names

__all__ = ["abstract_results", "summarise"]


def abstract_results(results: pd.DataFrame) -> pd.DataFrame:
    """The rows of the abstract tasks, or all of them where there is no such task."""
    rows = results[results["task"].isin(task_names("abstract"))]
    return results if rows.empty else rows


def _mean(rows: pd.DataFrame) -> float | None:
    """Mean accuracy in percent: over the runs of each task, then over tasks."""
    return None if rows.empty else float(rows.groupby("task")["accuracy"].mean().mean() * 100)


def summarise(results: pd.DataFrame, *, ablation: str = "mean") -> dict[str, Any]:
    """Average accuracies over the abstract tasks with two labels, in percent.

    Keys: ``full``, ``induction_heads``, ``induction_pattern``, ``random_heads`` at each task's
    largest number of shots and the run's larger fraction; ``zero_shot`` and
    ``zero_shot_induction_heads``; ``shots``, ``fraction``, ``tasks``. None where not evaluated.
    """
    rows = abstract_results(results)
    rows = rows[~rows["task"].str.endswith("4way")]
    larger = float(rows["fraction"].max())
    rows = rows[rows["fraction"].isin([0.0, larger])]
    rows = rows[rows["ablation"].isin(["none", "knockout", ablation])]
    few = rows[rows["shots"] == rows.groupby("task")["shots"].transform("max")]
    zero = rows[rows["shots"] == 0]
    names = ("full", "induction_heads", "induction_pattern", "random_heads")
    return {
        **{name: _mean(few[few["condition"] == name]) for name in names},
        "zero_shot": _mean(zero[zero["condition"] == "full"]),
        "zero_shot_induction_heads": _mean(zero[zero["condition"] == "induction_heads"]),
        "shots": int(few["shots"].max()),
        "fraction": larger,
        "tasks": sorted(set(few["task"])),
    }
