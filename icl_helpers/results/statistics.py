"""How sure an accuracy or a difference is: intervals, paired tests, ICL benefit (paper, section 8).

Correctness is an array [documents, demonstration seeds, ablation seeds]. An interval has to reflect
that other documents *and* other seeds might have been drawn; a test of two conditions compares them
document by document. The benefit of examples is the accuracy with the most of them minus that
without any, on the same documents (Figures 4 and 9).

Three seeds say little about the spread over seeds: where seeds matter, intervals are wide, and
rightly so. Tests treat the seeds as given and speak about other documents only.

Example
-------
>>> documents = icl.document_results("runs/icl-tiny")
>>> accuracy_intervals(documents)
>>> comparisons(documents).query("distinguishable")
>>> simulate_coverage(seeds=3, documents=100, seed_spread=0.02)
0.96
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from icl_helpers.errors import InputError
from icl_helpers.evaluation.store import CELL

__all__ = [
    "Cube",
    "Interval",
    "accuracy_intervals",
    "aligned",
    "benefit_changes",
    "bootstrap_interval",
    "cohens_g",
    "comparisons",
    "coverage_table",
    "cubes",
    "holm",
    "icl_benefit",
    "left_out_tasks",
    "paired_test",
    "simulate_coverage",
]


class Interval(NamedTuple):
    """An estimate with the bounds of its interval, all in the unit of the values."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: np.ndarray, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Interval of the mean over documents (first axis) and seeds (any further axes).

    A hierarchical bootstrap for crossed factors. The documents' mean effects are resampled with
    replacement. Three seeds are too few to resample, so the contribution of each kind of seed is
    drawn from Student's t distribution with their observed spread. That spread holds the noise of
    single answers as well, and so does the documents'; it is counted once, with the seeds, where
    the wide tails of t allow for having seen few of them.

    :func:`simulate_coverage` measures how often the interval holds the true value.

    Parameters
    ----------
    values
        Correctness (0 or 1), or differences of it, [documents] or [documents, seeds, ...].
    """
    if values.ndim < 1 or values.shape[0] < 2 or not 0 < level < 1 or resamples < 1:
        raise InputError(
            f"an interval needs at least 2 documents, a level inside (0, 1) and resamples, got "
            f"values of shape {values.shape}, level {level}, resamples {resamples}"
        )
    data = values.astype(np.float64)
    mean = float(data.mean())
    rng = np.random.default_rng(seed)
    documents, *seeds = _effects(data)
    picks = rng.integers(len(documents), size=(resamples, len(documents)))
    draws = mean + documents[picks].mean(axis=1)
    for effects in seeds:
        levels = len(effects)
        error = np.sqrt((effects**2).mean() / levels)
        draws += error * rng.standard_t(levels - 1, size=resamples)
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(mean, float(low), float(high))


def _effects(data: np.ndarray) -> Iterator[np.ndarray]:
    """Effects of documents, then of each kind of seed that there are several of.

    Scaled so that their mean square over their number is the variance of their mean.
    """
    centred = data - data.mean()
    axes = [axis for axis in range(data.ndim) if data.shape[axis] > 1]
    marginal = {
        axis: centred.mean(axis=tuple(a for a in range(data.ndim) if a != axis)) for axis in axes
    }
    residual = centred.copy()
    for axis, effects in marginal.items():
        shape = [1] * data.ndim
        shape[axis] = -1
        residual -= effects.reshape(shape)
    freedom = data.size - 1 - sum(data.shape[axis] - 1 for axis in axes)
    noise = float((residual**2).sum()) / freedom if freedom > 0 else 0.0
    for axis, effects in marginal.items():
        levels = data.shape[axis]
        scale = levels / (levels - 1)
        if axis == 0:
            # Mean square of the documents: their own spread plus the noise of single answers.
            square = float((effects**2).sum()) * (data.size / levels) / (levels - 1)
            kinds = len(axes) - 1
            scale *= max(0.0, 1 - kinds * noise / square) if square > 0 else 0.0
        yield effects * np.sqrt(scale)


def paired_test(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p-value that two conditions do equally well on the same documents.

    Exact sign-flip test of the documents' summed differences: under the null hypothesis a
    document's difference is as likely to have either sign. With one run per document this is the
    exact McNemar test; with several, a document's runs stay together, since they are not
    independent. Arrays are [documents] or [documents, runs], 0 or 1.
    """
    if first.shape != second.shape:
        raise InputError(f"paired arrays must have one shape, got {first.shape}, {second.shape}")
    gap = first.astype(np.int64) - second.astype(np.int64)
    gap = gap.reshape(len(gap), -1).sum(axis=1)
    sizes, counts = np.unique(np.abs(gap[gap != 0]), return_counts=True)
    # Distribution of the signed sum: one binomial for each size of difference, convolved.
    chances = np.ones(1)
    for size, count in zip(sizes, counts, strict=True):
        spaced = np.zeros(2 * size * count + 1)
        spaced[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, spaced)
    sums = np.arange(len(chances)) - len(chances) // 2
    return float(min(1.0, chances[np.abs(sums) >= abs(int(gap.sum()))].sum()))


def cohens_g(first: np.ndarray, second: np.ndarray) -> float:
    """Share of the discordant pairs that ``first`` gets right, minus one half.

    From -0.5 to 0.5; conventionally 0.05 is small, 0.15 medium, 0.25 large. NaN without any
    discordant pair.
    """
    wins = int(((first == 1) & (second == 0)).sum())
    losses = int(((first == 0) & (second == 1)).sum())
    return wins / (wins + losses) - 0.5 if wins + losses else float("nan")


def holm(p_values: Sequence[float]) -> np.ndarray:
    """P-values corrected by Holm's method for all of them being looked at."""
    from statsmodels.stats.multitest import multipletests

    values = np.asarray(p_values, dtype=np.float64)
    return values if values.size == 0 else multipletests(values, method="holm")[1]


def accuracy_intervals(
    documents: pd.DataFrame, *, level: float = 0.95, resamples: int = 2000
) -> pd.DataFrame:
    """Accuracy in percent with its interval, per task, labels, shots and condition.

    ``documents`` is :func:`icl_helpers.document_results`. Columns of the result: the key, accuracy,
    low, high, documents, runs. Where every answer is right, or every one wrong, there is nothing to
    resample: the bounds are then the exact binomial ones for that many documents.
    """
    rows = []
    for key, cube in cubes(documents).items():
        found = bootstrap_interval(cube.values, level=level, resamples=resamples)
        if found.mean in (0.0, 1.0):
            n = len(cube.values)
            exact = stats.binomtest(round(n * found.mean), n).proportion_ci(level)
            found = Interval(found.mean, float(exact.low), float(exact.high))
        rows.append(
            dict(zip(CELL, key, strict=True))
            | {"accuracy": 100 * found.mean}
            # No accuracy lies beyond these ends, whatever the tails of an interval say.
            | {"low": max(0.0, 100 * found.low), "high": min(100.0, 100 * found.high)}
            | {"documents": len(cube.values), "runs": int(np.prod(cube.values.shape[1:]))}
        )
    return pd.DataFrame(rows)


def comparisons(
    documents: pd.DataFrame, *, level: float = 0.95, resamples: int = 2000
) -> pd.DataFrame:
    """Each condition against the full model, and induction against random heads.

    Columns: the key of the first condition, ``against``, difference (percentage points, first minus
    against), low, high, p, p_holm (corrected over the whole frame), cohens_g, and distinguishable:
    p_holm below ``1 - level``.
    """
    found_cubes = cubes(documents)
    rows = []
    for key, cube in found_cubes.items():
        entry = dict(zip(CELL, key, strict=True))
        rivals = {"full": (*key[:3], "full", "none", 0.0)}
        if entry["condition"] == "induction_heads":
            rivals["random_heads"] = (*key[:3], "random_heads", *key[4:])
        for against, rival in rivals.items():
            if entry["condition"] == "full" or rival not in found_cubes:
                continue
            first, second = aligned(cube, found_cubes[rival])
            found = bootstrap_interval(first - second, level=level, resamples=resamples)
            rows.append(
                entry
                | {"against": against, "difference": 100 * found.mean, "low": 100 * found.low}
                | {"high": 100 * found.high, "p": paired_test(first, second)}
                | {"cohens_g": cohens_g(first, second)}
            )
    columns = [*CELL, "against", "difference", "low", "high", "p", "cohens_g"]
    frame = pd.DataFrame(rows, columns=columns)
    frame["p_holm"] = holm(frame["p"].to_numpy())
    return frame.assign(distinguishable=frame["p_holm"] < 1 - level)


class Cube(NamedTuple):
    """One cell's answers: ``values`` and what its first two axes stand for, both ascending."""

    values: np.ndarray  # [documents, demonstration seeds, ablation seeds], 0 or 1
    documents: np.ndarray  # ids
    seeds: np.ndarray  # demonstration seeds


def cubes(documents: pd.DataFrame) -> dict[tuple[Any, ...], Cube]:
    """Correctness by (task, labels, shots, condition, ablation, fraction).

    Documents that some run of the cell lacks are left out.
    """
    if "valid" in documents:
        documents = documents[documents["valid"]]
    return {key: _cube(group) for key, group in documents.groupby(CELL, sort=False)}


def _cube(group: pd.DataFrame) -> Cube:
    codes, levels = [], []
    for column, missing in (("doc_id", -1), ("demonstration_seed", -1), ("ablation_seed", -1)):
        known = group[column] if column in group else pd.Series(missing, index=group.index)
        filled = known.astype("Int64").fillna(missing).to_numpy(dtype=np.int64)
        unique, code = np.unique(filled, return_inverse=True)
        codes.append(code)
        levels.append(unique)
    values = np.full([len(level) for level in levels], -1, dtype=np.int64)
    values[tuple(codes)] = group["correct"].to_numpy(dtype=np.int64)
    whole = (values >= 0).all(axis=(1, 2))
    return Cube(values[whole], levels[0][whole], levels[1])


def aligned(*parts: Cube) -> list[np.ndarray]:
    """Conditions on the documents and seeds that all of them have, as arrays of one shape.

    A condition without ablation seeds (the full model) is repeated beside one that has several.
    Raises :class:`InputError` when nothing is shared.
    """
    rows = functools.reduce(np.intersect1d, [part.documents for part in parts])
    seeds = functools.reduce(np.intersect1d, [part.seeds for part in parts])
    if not len(rows) or not len(seeds):
        raise InputError("the conditions to compare share no documents or demonstration seeds")
    chosen = [
        part.values[
            np.ix_(np.searchsorted(part.documents, rows), np.searchsorted(part.seeds, seeds))
        ]
        for part in parts
    ]
    shape = np.broadcast_shapes(*(values.shape for values in chosen))
    return [np.broadcast_to(values, shape) for values in chosen]


def icl_benefit(results: pd.DataFrame, *, shots: int = 10) -> pd.DataFrame:
    """Few-shot minus zero-shot accuracy and its relative change under each condition.

    ``results`` is the frame of :func:`icl_helpers.evaluate`. Columns: task, labels, condition,
    ablation, fraction, zero_shot, few_shot, benefit (percent and points), relative_change (percent
    of the full model's benefit; NaN where left out) and ``left_out``: empty, ``no benefit`` (the
    full model gains nothing) or ``at chance`` (its few-shot accuracy is within 1.96 standard
    errors of guessing), the cases that the paper leaves out.
    """
    key = ["task", "labels", "condition", "ablation", "fraction"]
    means = (results["accuracy"] * 100).groupby([results[c] for c in [*key, "shots"]]).mean()
    table = means.unstack("shots")
    if 0 not in table or shots not in table:
        raise InputError(f"the results need 0-shot and {shots}-shot rows to compare")
    pairs = table[[0, shots]].dropna()
    pairs.columns = pd.Index(["zero_shot", "few_shot"])
    frame = pairs.reset_index()
    frame["benefit"] = frame["few_shot"] - frame["zero_shot"]
    full = frame[frame["condition"] == "full"].set_index(["task", "labels"])
    frame = frame.join(full["benefit"].rename("reference"), on=["task", "labels"])
    sizes = results.groupby("task")["n"].max()
    reasons = {index: _left_out(row, int(sizes[index[0]])) for index, row in full.iterrows()}
    frame["left_out"] = [
        reasons.get(pair, "no full model")
        for pair in zip(frame["task"], frame["labels"], strict=True)
    ]
    change = 100 * (frame["benefit"] / frame["reference"] - 1)
    frame["relative_change"] = change.where(frame["left_out"] == "")
    return frame.drop(columns="reference")


def _left_out(row: pd.Series, documents: int) -> str:
    from icl_helpers.tasks.specs import get_task_spec

    if row["benefit"] <= 0:
        return "no benefit"
    spec = get_task_spec(row.name[0])  # type: ignore[index]
    chance = 1 / len(getattr(spec, "choices", (0, 1)))
    error = np.sqrt(chance * (1 - chance) / documents)
    return "at chance" if row["few_shot"] / 100 <= chance + 1.96 * error else ""


_PAIR = ["task", "labels"]
_CONDITION = ["condition", "ablation", "fraction"]


def benefit_changes(results: pd.DataFrame, documents: pd.DataFrame) -> pd.DataFrame:
    """Relative change of the benefit under each condition, with its 95 % interval.

    ``results`` and ``documents`` are a run's. Each task is taken at its largest number of examples.
    Columns: those of :func:`icl_benefit`, shots, low and high (percent; NaN
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


_ACCURACY = 0.6


def simulate_coverage(
    *,
    seeds: int,
    documents: int,
    seed_spread: float,
    document_spread: float = 0.25,
    trials: int = 500,
    resamples: int = 400,
    level: float = 0.95,
    seed: int = 0,
) -> float:
    """Share of simulated runs whose interval holds the true accuracy, 0.6.

    A document's chance of a right answer is 0.6, plus its own difficulty, uniform between minus and
    plus ``document_spread``, plus the effect of the demonstration seed, normal with standard
    deviation ``seed_spread``; documents and seeds are drawn anew in every trial.
    """
    if trials < 1 or seeds < 1 or min(document_spread, seed_spread) < 0:
        raise InputError(
            f"trials and seeds must be >= 1 and spreads >= 0, got {trials}, {seeds}, "
            f"{document_spread}, {seed_spread}"
        )
    held = 0
    for trial in range(trials):
        rng = np.random.default_rng([seed, trial])
        difficulty = rng.uniform(-document_spread, document_spread, (documents, 1))
        chance = _ACCURACY + difficulty + rng.normal(0, seed_spread, (1, seeds))
        right = (rng.random((documents, seeds)) < chance).astype(np.int64)
        found = bootstrap_interval(right, level=level, resamples=resamples, seed=trial)
        held += found.low <= _ACCURACY <= found.high
    return held / trials


def coverage_table(
    *, documents: int, seeds: int = 3, spreads: tuple[float, ...] = (0.0, 0.02, 0.05)
) -> pd.DataFrame:
    """Coverage in percent over 500 simulations for several spreads over seeds, in points."""
    rows = [
        {
            "spread over seeds, points": 100 * spread,
            "95 % interval holds the truth, %": 100
            * simulate_coverage(seeds=seeds, documents=documents, seed_spread=spread),
        }
        for spread in spreads
    ]
    return pd.DataFrame(rows).set_index("spread over seeds, points")
