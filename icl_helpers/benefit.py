"""What the examples gain, and how much of it each ablation takes away (Figures 4 and 9).

The benefit is the accuracy with the most examples minus that without any, on the same documents.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from icl_helpers.errors import InputError
from icl_helpers.statistics import Cube, aligned, bootstrap_interval, cubes, icl_benefit

__all__ = ["benefit_changes", "left_out_tasks"]

_PAIR = ["task", "labels"]
_CONDITION = ["condition", "ablation", "fraction"]


def benefit_changes(results: pd.DataFrame, documents: pd.DataFrame) -> pd.DataFrame:
    """Relative change of the benefit under each condition, with its 95 % interval.

    ``results`` and ``documents`` are a run's. Each task is taken at its largest number of examples.
    Columns: those of :func:`icl_helpers.statistics.icl_benefit`, shots, low and high (percent; NaN
    where the task is left out). The interval is that of the ratio, linearised about its estimate,
    and resamples documents and seeds together in all four accuracies. Beside the tasks that the
    paper leaves out, those are whose benefit is within noise (its 95 % interval reaches zero): a
    ratio to it would mean nothing. Raises :class:`InputError` where no task has rows both with and
    without examples.
    """
    frames = [
        icl_benefit(group, shots=shots).assign(shots=shots)
        for shots, group in _by_most_shots(results)
    ]
    if not frames:
        raise InputError("no task was evaluated both with and without examples")
    table = pd.concat(frames, ignore_index=True)
    found = cubes(documents)
    noisy = [_within_noise(row, found) for row in table.to_dict("records")]
    table["left_out"] = table["left_out"].mask(
        pd.Series(noisy) & (table["left_out"] == ""), "benefit within noise"
    )
    table["relative_change"] = table["relative_change"].where(table["left_out"] == "")
    bounds = [_bounds(row, found) for row in table.to_dict("records")]
    return table.assign(low=[low for low, _ in bounds], high=[high for _, high in bounds])


def _by_most_shots(results: pd.DataFrame) -> list[tuple[int, pd.DataFrame]]:
    """(largest number of examples, rows of the tasks that have it and zero-shot rows)."""
    shots = results.groupby(_PAIR)["shots"]
    most = shots.transform("max")
    usable = results.assign(most=most)[(shots.transform("min") == 0) & (most > 0)]
    return [(int(str(n)), group) for n, group in usable.groupby("most", sort=False)]


def _within_noise(row: dict[Any, Any], found: dict[tuple[Any, ...], Cube]) -> bool:
    """Whether the full model's benefit on the row's task cannot be told from none."""
    pair = tuple(row[name] for name in _PAIR)
    keys = [(*pair, shots, "full", "none", 0.0) for shots in (row["shots"], 0)]
    few, zero = aligned(*(found[key] for key in keys))
    return bootstrap_interval(few - zero).low <= 0


def _bounds(row: dict[Any, Any], found: dict[tuple[Any, ...], Cube]) -> tuple[float, float]:
    if not np.isfinite(row["relative_change"]) or row["condition"] == "full":
        return float("nan"), float("nan")
    pair = tuple(row[name] for name in _PAIR)
    ablated = tuple(row[name] for name in _CONDITION)
    keys = [
        (*pair, shots, *condition)
        for condition in (ablated, ("full", "none", 0.0))
        for shots in (row["shots"], 0)
    ]
    few, zero, full_few, full_zero = aligned(*(found[key] for key in keys))
    benefit = (full_few - full_zero).mean()
    ratio = (few - zero).mean() / benefit
    slopes = ((few - zero) - ratio * (full_few - full_zero)) / benefit
    change = bootstrap_interval(slopes)
    centre = 100 * (ratio - 1)
    return centre + 100 * change.low, centre + 100 * change.high


def left_out_tasks(changes: pd.DataFrame) -> pd.DataFrame:
    """Tasks without a relative change and why: no benefit, or at chance with examples."""
    full = changes[(changes["condition"] == "full") & (changes["left_out"] != "")]
    columns = ["task", "labels", "shots", "zero_shot", "few_shot", "left_out"]
    return full[columns].rename(columns={"left_out": "why"}).reset_index(drop=True)
