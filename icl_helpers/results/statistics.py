"""How sure an accuracy or a difference is: intervals, paired tests, ICL benefit (paper, section 8).

Correctness is an array [documents, demonstration seeds, control draws]. An interval has to reflect
that other documents, seeds *and* draws might have been taken: three say little about their spread,
so intervals over them are wide, and rightly so. A test of two conditions compares them document by
document and takes the seeds as given. A difference counts only where both agree
(:func:`is_distinguishable`). The benefit of examples is the accuracy with the most of them minus
that without any, on the same documents (Figures 4 and 9).

Example
-------
>>> documents = icl.document_results("runs/icl-tiny")
>>> accuracy_intervals(documents)
>>> comparisons(documents).query("distinguishable")
>>> simulate_coverage(documents=100, draws=3, loss=0.1, uneven=True)
0.976
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

from icl_helpers.errors import InputError
from icl_helpers.evaluation.store import CELL, KEYS, keyed
from icl_helpers.tasks.specs import get_task_spec

__all__ = [
    "Interval", "accuracy_interval", "accuracy_intervals", "benefit_changes", "cohens_g",
    "compare_documents", "comparisons", "coverage_table", "difference_interval", "filled_keys",
    "finite_interval", "holm", "icl_benefit", "is_distinguishable", "left_out_tasks",
    "mean_interval", "paired_difference", "paired_test", "simulate_coverage",
]  # fmt: skip

LEVEL = 0.95
# A control draw is one set of heads for every document, and few draws may agree by accident: their
# standard deviation is taken to be 2 points at least. The coverage table says what that achieves.
LEAST_DRAW_SPREAD = 0.02
# What stands for the full model, of whose heads no share is removed, in keys.
_FULL = ("full", "none", 0.0, "")
_TASK = ["task", "labels"]


class Interval(NamedTuple):
    """An estimate with the bounds of its interval, all in the unit of the values."""

    mean: float
    low: float
    high: float


def accuracy_interval(right: np.ndarray, *, drawn: bool = False) -> Interval:
    """Compute the interval of an accuracy over documents, and over seeds and draws where several.

    ``right`` [documents] or [documents, seeds] or [documents, seeds, draws] is 0 or 1; ``drawn``
    says that the last axis holds control draws, be it one.

    Over documents: the exact binomial interval for as many answers as the correlated ones of each
    document are worth (Korn & Graubard 1998), so neither 0 nor 100 % is taken for certain. Each
    kind of seed widens it by its observed spread times Student's t quantile, by squares (Zou &
    Donner 2008); :func:`simulate_coverage` measures how often the result holds the true value.
    """
    spread = _Spread(right, LEVEL)
    count, n = spread.data.mean() * spread.answers, spread.answers
    tail = (1 - LEVEL) / 2
    low = special.betaincinv(count, n - count + 1, tail) if count > 0 else 0.0
    high = special.betaincinv(count + 1, n - count, 1 - tail) if count < n else 1.0
    mean, low, high = spread.widened(float(low), float(high), drawn=drawn)
    return Interval(mean, max(0.0, low), min(1.0, high))


def difference_interval(
    first: np.ndarray, second: np.ndarray, *, level: float = LEVEL, drawn: bool = False
) -> Interval:
    """Compute the interval of the difference of two accuracies on the same documents.

    Arrays and ``drawn`` are as in :func:`accuracy_interval`. Over documents: the score interval
    for paired proportions (Tango 1998), which never leaves [-1, 1] and is not empty where nothing
    differs, or everything; it is widened over seeds and draws in the same way.
    """
    spread = _Spread(_gaps(first, second), level)
    n = spread.answers
    wins, losses = n * (spread.data > 0).mean(), n * (spread.data < 0).mean()
    quantile = float(special.stdtrit(len(first) - 1, (1 + level) / 2))
    bounds = _score_bound(wins, losses, n, quantile), -_score_bound(losses, wins, n, quantile)
    mean, low, high = spread.widened(*bounds, drawn=drawn)
    return Interval(mean, max(-1.0, low), min(1.0, high))


def finite_interval(gaps: np.ndarray) -> Interval:
    """Compute the interval of the mean over documents, of the values that are finite."""
    return mean_interval(gaps[np.isfinite(gaps)])


def mean_interval(values: np.ndarray, *, level: float = LEVEL, drawn: bool = False) -> Interval:
    """Compute the interval of the mean of any values; arguments as in :func:`accuracy_interval`."""
    spread = _Spread(values, level)
    margin = special.stdtrit(len(values) - 1, (1 + level) / 2) * math.sqrt(spread.variances[0])
    mean = float(spread.data.mean())
    return spread.widened(mean - margin, mean + margin, drawn=drawn)


class _Spread:
    """Variance of a mean over crossed factors: ``variances`` [axis], with the ``noise`` in each."""

    def __init__(self, values: np.ndarray, level: float) -> None:
        if values.ndim < 1 or values.shape[0] < 2 or not 0 < level < 1:
            raise InputError(
                f"an interval needs at least 2 documents and a level inside (0, 1), got values of "
                f"shape {values.shape}, level {level}"
            )
        self.data, self.level = values.astype(np.float64), level
        centred = self.data - self.data.mean()
        axes = range(self.data.ndim)
        effects = [centred.mean(tuple({*axes} - {axis}), keepdims=True) for axis in axes]
        residual = functools.reduce(operator.sub, effects, centred)
        freedom = self.data.size - 1 - sum(effect.size - 1 for effect in effects)
        square = float((residual**2).sum())
        self.noise = square / freedom / self.data.size if freedom else 0.0
        self.variances = [
            float((effect**2).sum()) / effect.size / max(effect.size - 1, 1) for effect in effects
        ]
        # How many independent answers the documents' correlated ones are worth: one each at least.
        self.answers = self._answers()

    def _answers(self) -> float:
        n, variance = len(self.data), self.data.var()
        if variance < 1e-15 or self.variances[0] < 1e-15:
            return float(n)
        rare = (self.data != np.median(self.data)).reshape(n, -1).any(axis=1).sum()
        # Few documents with a rare answer tell little about how alike a document's answers are:
        # four more are added whose answers are all alike.
        share = (rare * self.variances[0] / variance + 4 / n) / (rare + 4)
        return float(np.clip(1 / share, n, self.data.size))

    def widened(self, low: float, high: float, *, drawn: bool) -> Interval:
        """Widen an interval over documents by what seeds and draws vary beyond the noise in it."""
        tail = (1 + self.level) / 2
        extra = 0.0
        for axis, levels in enumerate(self.data.shape[1:], start=1):
            variance = self.variances[axis]
            if drawn and axis == self.data.ndim - 1:
                variance = max(variance, LEAST_DRAW_SPREAD**2 / levels)
            elif levels == 1:
                continue
            quantile = special.stdtrit(max(levels - 1, 1), tail)
            extra += max(0.0, quantile**2 * variance - special.ndtri(tail) ** 2 * self.noise)
        mean = float(self.data.mean())
        return Interval(
            mean,
            mean - math.sqrt((mean - low) ** 2 + extra),
            mean + math.sqrt((high - mean) ** 2 + extra),
        )


def _score_bound(wins: float, losses: float, n: float, quantile: float) -> float:
    """Return the lower bound of Tango's interval; numbers of answers need not be whole."""
    if losses >= n:
        return -1.0

    def excess(gap: float) -> float:
        # The share of losses that is likeliest given the difference, a root of a quadratic.
        linear = -wins - losses + (2 * n - wins + losses) * gap
        root = max(0.0, linear**2 + 8 * n * losses * gap * (1 - gap))
        share = (math.sqrt(root) - linear) / (4 * n)
        variance = max(0.0, n * (2 * share + gap * (1 - gap)))
        return wins - losses - n * gap - quantile * math.sqrt(variance)

    return float(optimize.brentq(excess, -1, (wins - losses) / n - 1e-12))


def _gaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    if first.shape != second.shape:
        raise InputError(f"paired arrays must have one shape, got {first.shape}, {second.shape}")
    return first.astype(np.int64) - second.astype(np.int64)


def paired_test(first: np.ndarray, second: np.ndarray) -> float:
    """Compute the two-sided p-value that two conditions do equally well on the same documents.

    Exact sign-flip test of the documents' summed differences: under the null hypothesis a
    document's difference is as likely to have either sign. With one run per document this is the
    exact McNemar test; with several, a document's runs stay together, since they are not
    independent. Arrays are [documents] or [documents, runs], 0 or 1.
    """
    gap = _gaps(first, second).reshape(len(first), -1).sum(axis=1)
    sizes, counts = np.unique(np.abs(gap[gap != 0]), return_counts=True)
    # Distribution of the signed sum: one binomial for each size of difference, convolved.
    chances = np.ones(1)
    for size, count in zip(sizes, counts, strict=True):
        spaced = np.zeros(2 * size * count + 1)
        spaced[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, spaced)
    sums = np.arange(len(chances)) - len(chances) // 2
    p = float(chances[np.abs(sums) >= abs(int(gap.sum()))].sum())
    # No p-value is zero; below the smallest double there is only that it is smaller still.
    return min(1.0, max(p, float(np.finfo(np.float64).tiny)))


def cohens_g(first: np.ndarray, second: np.ndarray) -> float:
    """Compute the share of the discordant pairs that ``first`` gets right, minus one half.

    From -0.5 to 0.5; conventionally 0.05 is small, 0.15 medium, 0.25 large. NaN without any
    discordant pair.
    """
    wins = int(((first == 1) & (second == 0)).sum())
    losses = int(((first == 0) & (second == 1)).sum())
    return wins / (wins + losses) - 0.5 if wins + losses else float("nan")


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Correct p-values by Holm's method for all of them being looked at."""
    values = np.asarray(p_values, dtype=np.float64)
    order = values.argsort()
    corrected = np.empty_like(values)
    corrected[order] = np.maximum.accumulate(np.arange(len(values), 0, -1) * values[order])
    return corrected.clip(max=1.0)


def is_distinguishable(p: pd.Series, low: pd.Series, high: pd.Series) -> pd.Series:
    """Tell which differences are distinguishable from none: the one rule of tables and sentences.

    The corrected exact test (``p``) and the interval over documents, seeds and draws must both
    say so.
    """
    return (p < 1 - LEVEL) & ((low > 0) | (high < 0))


def accuracy_intervals(documents: pd.DataFrame, *, over_draws: bool = True) -> pd.DataFrame:
    """Compute accuracies in percent with their intervals, per task, labels, shots and condition.

    ``documents`` is :func:`icl_helpers.document_results`. Columns of the result: the key,
    accuracy, low, high, documents, runs. Without examples seeds do not differ:
    one is counted. ``over_draws`` False takes the control's draws as given.
    """
    rows = []
    for key, answers in _answers(documents).items():
        drawn = over_draws and _is_drawn(key)
        interval = accuracy_interval(_once(_array(answers), key), drawn=drawn)
        rows.append((*key, *(100 * value for value in interval), *answers.shape))
    columns = [*CELL, "accuracy", "low", "high", "documents", "runs"]
    return _fraction_of_some(pd.DataFrame(rows, columns=columns))


def comparisons(documents: pd.DataFrame, *, over_draws: bool = True) -> pd.DataFrame:
    """Compare each condition with the full model, and induction with random heads.

    Columns: the key of the first condition, ``against`` and ``against_control``, difference
    (percentage points, first minus against), low, high, p, p_holm, cohens_g, and distinguishable
    (:func:`is_distinguishable`). p is corrected over the frame's rows with examples, and apart from
    these over those without. ``over_draws`` is as in :func:`accuracy_intervals`.
    """
    answers = _answers(documents)
    controls = dict.fromkeys(other[-1] for other in answers)
    rows = []
    for key in answers:
        row, (condition, ablation, fraction, _) = key[:3], key[3:]
        rivals = [(*row, *_FULL)] if condition != "full" else []
        if condition == "induction_heads":
            rivals += [(*row, "random_heads", ablation, fraction, it) for it in controls]
        for rival in (rival for rival in rivals if rival in answers):
            first, second = (_once(it, key) for it in _aligned(answers[key], answers[rival]))
            drawn = over_draws and (_is_drawn(key) or _is_drawn(rival))
            gap = _compared(first, second, drawn=drawn)
            rows.append((*key, rival[3], rival[-1], *gap, cohens_g(first, second)))
    columns = [*CELL, "against", "against_control", "difference", "low", "high", "p", "cohens_g"]
    frame = pd.DataFrame(rows, columns=columns)
    return _told(frame, frame.groupby(frame["shots"] == 0)["p"].transform(holm))


def _told(frame: pd.DataFrame, p_holm: Sequence[float] | np.ndarray | pd.Series) -> pd.DataFrame:
    """Add corrected p-values and which differences are distinguishable."""
    frame = _fraction_of_some(frame).assign(p_holm=p_holm)
    told = is_distinguishable(frame["p_holm"], frame["low"], frame["high"])
    return frame.assign(distinguishable=told)


def paired_difference(first: pd.DataFrame, second: pd.DataFrame) -> tuple[Interval, float]:
    """Compare two cells of one task: their difference in points, first minus second, and exact p.

    Each frame has the rows of one cell of :func:`icl_helpers.document_results`; any two may be
    compared, of other numbers of examples or kinds of removal too. p is not corrected. Raises
    :class:`InputError` where a frame holds several cells, or they share no documents.
    """
    parts = [_answers(rows) for rows in (first, second)]
    if any(len(part) != 1 for part in parts):
        raise InputError(f"each side must be one cell, got {[len(part) for part in parts]}")
    (keys, answers) = zip(*(next(iter(part.items())) for part in parts), strict=True)
    most = max(keys, key=lambda key: key[2])
    pair = [_once(array, most) for array in _aligned(*answers)]
    *bounds, p = _compared(*pair, drawn=any(map(_is_drawn, keys)))
    return Interval(*bounds), p


def compare_documents(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Compare two runs cell by cell, on the documents, seeds and draws that both have.

    Both are as :func:`icl_helpers.document_results` gives them. Columns: the key, documents, runs
    (of each document), first and second (accuracies, percent), difference (points, second minus
    first), low, high, p, p_holm (corrected over all rows) and distinguishable
    (:func:`is_distinguishable`). Raises :class:`InputError` where they share no cell of two
    documents.
    """
    both = keyed(first).merge(keyed(second), on=[*KEYS, "doc_id"], suffixes=("_first", "_second"))
    valid = both["valid_first"] & both["valid_second"]
    sides = [
        _answers(both[[*KEYS, "doc_id"]].assign(valid=valid, correct=both[f"correct_{side}"]))
        for side in ("first", "second")
    ]
    rows = []
    for key in sides[0]:
        pair = [_once(_array(side[key]), key) for side in sides]
        gap = _compared(*reversed(pair), drawn=_is_drawn(key))
        means = (100 * right.mean() for right in pair)
        rows.append((*key, len(pair[0]), pair[0][0].size, *means, *gap))
    if not rows:
        raise InputError(
            "the two share no cell (task, labels, shots, condition, heads, seeds) of two documents"
        )
    columns = ["documents", "runs", "first", "second", "difference", "low", "high", "p"]
    frame = pd.DataFrame(rows, columns=[*CELL, *columns])
    return _told(frame, holm(frame["p"].to_list()))


def _compared(
    first: np.ndarray, second: np.ndarray, *, drawn: bool
) -> tuple[float, float, float, float]:
    """Return the interval of two aligned cells' difference in points, first minus second, and p."""
    mean, low, high = difference_interval(first, second, drawn=drawn)
    return 100 * mean, 100 * low, 100 * high, paired_test(first, second)


def _is_drawn(key: tuple[Any, ...]) -> bool:
    return bool(key[3] == "random_heads")


def _once(array: np.ndarray, key: tuple[Any, ...]) -> np.ndarray:
    """Keep one demonstration seed of answers without demonstrations: they do not differ."""
    return array[:, :1] if key[2] == 0 else array


def _answers(documents: pd.DataFrame) -> dict[tuple[Any, ...], pd.DataFrame]:
    """Return answers by cell: a row a document that all its runs have, a column a pair of seeds."""
    if "valid" in documents:
        documents = documents[documents["valid"]]
    seeds = ["demonstration_seed", "ablation_seed"]
    known = documents.reindex(columns=seeds).astype("Int64").fillna(-1).astype("int64")
    documents = documents.assign(**known, correct=documents["correct"].astype("float64"))
    answers = {}
    for key, rows in filled_keys(documents).groupby(CELL, sort=False):
        wide = _wide(rows, ["doc_id", *seeds])
        # Of fewer than two documents there is no interval.
        if len(wide) > 1:
            answers[key] = wide
    return answers


def _wide(rows: pd.DataFrame, axes: Sequence[str]) -> pd.DataFrame:
    """Return one cell's answers, a row a document that every run has; pandas' pivot is slow."""
    levels, places = zip(
        *(np.unique(rows[name], return_inverse=True) for name in axes), strict=True
    )
    values = np.full([len(level) for level in levels], np.nan)
    values[places] = rows["correct"]
    if (~np.isnan(values)).sum() < len(rows):
        raise InputError("a cell holds a document twice under one pair of seeds")
    whole = ~np.isnan(values).any(axis=(1, 2))
    columns = pd.MultiIndex.from_product(levels[1:], names=list(axes[1:]))
    answers = values[whole].reshape(whole.sum(), -1).astype(np.int64)
    return pd.DataFrame(answers, index=pd.Index(levels[0][whole], name=axes[0]), columns=columns)


def filled_keys(frame: pd.DataFrame) -> pd.DataFrame:
    """Return rows whose columns of the key are all there, as groups and comparisons need them."""
    return keyed(frame).assign(fraction=frame["fraction"].fillna(0.0))


def _fraction_of_some(frame: pd.DataFrame) -> pd.DataFrame:
    """Take a full model's fraction away again; the inverse of :func:`filled_keys`."""
    return frame.assign(fraction=frame["fraction"].where(frame["fraction"] > 0))


def _array(answers: pd.DataFrame) -> np.ndarray:
    """Return answers as an array [documents, demonstration seeds, ablation seeds]."""
    n_seeds = answers.columns.get_level_values(0).nunique()
    return answers.to_numpy().reshape(len(answers), n_seeds, answers.shape[1] // n_seeds)


def _aligned(*parts: pd.DataFrame) -> list[np.ndarray]:
    """Cut answers to documents and seeds that all of them have, and repeat single draws."""
    rows = functools.reduce(pd.Index.intersection, (part.index for part in parts))
    first_level = (part.columns.get_level_values(0).unique() for part in parts)
    seeds = functools.reduce(pd.Index.intersection, first_level)
    if rows.empty or seeds.empty:
        raise InputError("the conditions to compare share no documents or demonstration seeds")
    cut = [
        part if part.index.equals(rows) and set(part.columns.get_level_values(0)) == set(seeds)
        else part.loc[rows, list(seeds)]
        for part in parts
    ]  # fmt: skip
    return list(np.broadcast_arrays(*map(_array, cut)))


def icl_benefit(results: pd.DataFrame, *, shots: int = 10) -> pd.DataFrame:
    """Compute few-shot minus zero-shot accuracy and its relative change under each condition.

    ``results`` is the frame of :func:`icl_helpers.evaluate`. Columns: task, labels, condition,
    ablation, fraction, zero_shot, few_shot, benefit (percent and points), relative_change (percent
    of the full model's benefit; NaN where left out) and ``left_out``: empty, ``no benefit`` (the
    full model gains nothing) or ``at chance`` (its few-shot accuracy is within 1.96 standard
    errors of guessing), the cases that the paper leaves out.
    """
    table = 100 * filled_keys(results).groupby(CELL)["accuracy"].mean().unstack("shots")
    if 0 not in table or shots not in table:
        raise InputError(f"the results need 0-shot and {shots}-shot rows to compare")
    pairs = table[[0, shots]].dropna().set_axis(["zero_shot", "few_shot"], axis="columns")
    frame = pairs.reset_index()
    frame["benefit"] = frame["few_shot"] - frame["zero_shot"]
    full = frame[frame["condition"] == "full"].set_index(_TASK)
    tasks = full.index.get_level_values("task")
    chance = 1 / np.array([len(get_task_spec(task).choices) for task in tasks], dtype=np.float64)
    sizes = results.groupby("task")["n"].max().reindex(tasks).to_numpy()
    error = np.sqrt(chance * (1 - chance) / sizes)
    guessed = full["few_shot"] / 100 <= chance + 1.96 * error
    full["left_out"] = np.select([full["benefit"] <= 0, guessed], ["no benefit", "at chance"], "")
    reference = frame[_TASK].join(full[["benefit", "left_out"]], on=_TASK)
    frame["left_out"] = reference["left_out"].fillna("no full model")
    change = 100 * (frame["benefit"] / reference["benefit"] - 1)
    frame["relative_change"] = change.where(frame["left_out"] == "")
    return _fraction_of_some(frame)


def benefit_changes(results: pd.DataFrame, documents: pd.DataFrame) -> pd.DataFrame:
    """Compute the relative change of the benefit under each condition, with its 95 % interval.

    ``results`` and ``documents`` are a run's. Each task is taken at its largest number of examples.
    Columns: those of :func:`icl_benefit`, shots, low and high (percent; NaN where the task is left
    out). The interval is that of the ratio, linearised about its estimate, and resamples documents
    and seeds together in all four accuracies. Beside the tasks that the paper leaves out, those are
    whose benefit is within noise (its 95 % interval reaches zero): a ratio to it means nothing.
    Raises :class:`InputError` where no task has rows both with and without examples.
    """
    by_task = results.groupby(_TASK)["shots"]
    most = by_task.transform("max").rename("most")
    usable = results[(by_task.transform("min") == 0) & (most > 0)]
    frames = [
        icl_benefit(rows, shots=int(shots)).assign(shots=shots)
        for shots, rows in usable.groupby(most, sort=False)
    ]
    if not frames:
        raise InputError("no task was evaluated both with and without examples")
    table = pd.concat(frames, ignore_index=True).assign(low=np.nan, high=np.nan)
    answers = _answers(documents)
    for (task, labels, shots), rows in table[table["left_out"] == ""].groupby([*_TASK, "shots"]):
        keys = [(task, labels, n, *_FULL) for n in (shots, 0)]
        few, zero = _aligned(*(answers[key] for key in keys))
        if difference_interval(few, zero).low <= 0:
            table.loc[rows.index, ["left_out", "relative_change"]] = "benefit within noise", np.nan
            continue
        ablated = rows.loc[rows["condition"] != "full", CELL[3:]]
        for index, *condition in ablated.itertuples(name=None):
            pairs = [(task, labels, n, *condition) for n in (shots, 0)]
            few, zero, full_few, full_zero = _aligned(*(answers[key] for key in [*pairs, *keys]))
            bounds = _change_interval(few, zero, full_few - full_zero, drawn=_is_drawn(pairs[0]))
            table.loc[index, ["low", "high"]] = bounds
    return table


def _change_interval(
    few: np.ndarray, zero: np.ndarray, full: np.ndarray, *, drawn: bool
) -> tuple[float, float]:
    """Return the bounds, in percent, of the change from the full model's benefit."""
    # Where answers hardly vary a linearised interval is empty and claims certainty: it is never
    # narrower than the score interval of the benefit alone.
    benefit = few.astype(np.int64) - zero
    ratio = benefit.mean() / full.mean()
    change = mean_interval((benefit - ratio * full) / full.mean(), drawn=drawn)
    alone = difference_interval(few, zero, drawn=drawn)
    low = min(ratio + change.low, alone.low / full.mean())
    high = max(ratio + change.high, alone.high / full.mean())
    return 100 * (low - 1), 100 * (high - 1)


def left_out_tasks(changes: pd.DataFrame) -> pd.DataFrame:
    """List the tasks without a relative change and why, as in ``left_out``."""
    full = changes[(changes["condition"] == "full") & (changes["left_out"] != "")]
    columns = ["task", "labels", "shots", "zero_shot", "few_shot", "left_out"]
    return full[columns].rename(columns={"left_out": "why"}).reset_index(drop=True)


def simulate_coverage(
    *, documents: int, accuracy: float = 0.6, seeds: int = 3, seed_spread: float = 0.0,
    draws: int = 0, loss: float = 0.0, uneven: bool = False, trials: int = 500, seed: int = 0,
) -> float:  # fmt: skip
    """Return the share of simulated runs whose 95 % interval holds the true value.

    Without ``draws`` that is of ``accuracy``: documents differ in their chance of a right answer
    (by a beta distribution), and so do seeds, with standard deviation ``seed_spread``, or less
    where there is no room for it below 0 and above 1. With ``draws`` it is of the difference of a
    control to the full model: one answer in twenty is given anew, and each draw loses (where the
    accuracy is below one half, gains) up to twice ``loss``, every size as likely; with ``uneven``,
    one draw in three loses the whole of ``loss`` and the others nothing.
    """
    if trials < 1 or seeds < 1 or not 0 < accuracy < 1 or min(seed_spread, loss, draws) < 0:
        raise InputError(
            f"trials and seeds must be >= 1, the accuracy inside (0, 1) and the rest >= 0, got "
            f"{trials}, {seeds}, {accuracy}, {seed_spread}, {loss}, {draws}"
        )
    often = max(accuracy, 1 - accuracy)
    room = 2 / 3 * often * (1 - often)
    held = 0
    for trial in range(trials):
        rng = np.random.default_rng([seed, trial])
        chance = rng.beta(2 * often, 2 - 2 * often, (documents, 1))
        shift = rng.normal(0, min(seed_spread, room / 2), seeds).clip(-room, room)
        full = rng.random((documents, seeds)) < chance + shift / room * chance * (1 - chance)
        full = full if accuracy == often else ~full
        if draws == 0:
            truth, interval = accuracy, accuracy_interval(full)
        else:
            some = loss * (rng.random(draws) < 1 / 3)
            changed = some if uneven else rng.uniform(0, 2 * loss, draws)
            truth = (loss / 3 if uneven else loss) * (-1 if accuracy == often else 1)
            shape = (documents, seeds, draws)
            anew = rng.random(shape) < 0.05
            control = np.where(anew, rng.random(shape) < accuracy, full[..., None])
            # The same documents in all seeds: what a draw loses is a matter of its heads.
            hit = rng.random((documents, 1, draws)) < changed / often
            control = np.where(hit, accuracy != often, control)
            whole = np.broadcast_to(full[..., None], shape)
            interval = difference_interval(control, whole, drawn=True)
        held += interval.low <= truth <= interval.high
    return held / trials


def coverage_table(
    *, documents: int, seeds: int = 3, draws: Sequence[int] = (3, 20),
    accuracies: Sequence[float] = (0.02, 0.1, 0.5, 0.9, 0.98), trials: int = 500,
) -> pd.DataFrame:  # fmt: skip
    """Return coverage in percent of 95 % intervals, a row a setting, a column an accuracy."""
    settings: dict[str, dict[str, Any]] = {
        f"accuracy, seeds {100 * spread:.0f} points apart": {"seed_spread": spread}
        for spread in (0.0, 0.02, 0.05)
    }
    for count in draws:
        for what, loss in (
            ("each losing up to 10 points", {"loss": 0.05}),
            ("one in three losing 10 points", {"loss": 0.1, "uneven": True}),
        ):
            name = f"difference to the control, {count} draws, {what}"
            settings[name] = {"draws": count, "seed_spread": 0.02, **loss}
    table = pd.DataFrame(index=pd.Index(settings, name="simulated"))
    for accuracy in accuracies:
        table[f"{100 * accuracy:.0f} %"] = [
            100 * simulate_coverage(
                documents=documents, seeds=seeds, accuracy=accuracy, trials=trials, **setting
            )
            for setting in settings.values()
        ]  # fmt: skip
    return table
