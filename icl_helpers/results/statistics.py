"""How sure an accuracy or a difference is: intervals, paired tests, ICL benefit (paper, section 8).

Correctness is an array [documents, demonstration seeds, ablation seeds]. An interval has to reflect
that other documents *and* other seeds might have been drawn: three seeds say little about their
spread, so where seeds matter intervals are wide, and rightly so. A test of two conditions compares
them document by document, takes the seeds as given and speaks about other documents only. The
benefit of examples is the accuracy with the most of them minus that without any, on the same
documents (Figures 4 and 9).

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
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from icl_helpers.errors import InputError
from icl_helpers.evaluation.store import CELL, keyed
from icl_helpers.tasks.specs import get_task_spec

__all__ = [
    "Interval", "accuracy_intervals", "benefit_changes", "bootstrap_interval", "cohens_g",
    "comparisons", "coverage_table", "holm", "icl_benefit", "left_out_tasks", "paired_test",
    "simulate_coverage",
]  # fmt: skip

# What stands for the full model, of whose heads no share is removed, in keys.
_FULL = ("full", "none", 0.0, "")
_TASK = ["task", "labels"]


class Interval(NamedTuple):
    """An estimate with the bounds of its interval, all in the unit of the values."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: np.ndarray, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Compute the interval of the mean over documents (first axis) and seeds (any further axes).

    ``values`` [documents] or [documents, seeds, ...] is correctness, 0 or 1, or differences of it.

    A hierarchical bootstrap for crossed factors. The documents' mean effects are resampled with
    replacement. Three seeds are too few to resample, so the contribution of each kind of seed is
    drawn from Student's t distribution with their observed spread. That spread holds the noise of
    single answers as well, and so does the documents'; it is counted once, with the seeds, where
    the wide tails of t allow for having seen few of them. :func:`simulate_coverage` measures how
    often the interval holds the true value.
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
        error = np.sqrt((effects**2).mean() / len(effects))
        draws += error * rng.standard_t(len(effects) - 1, size=resamples)
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(mean, float(low), float(high))


def _effects(data: np.ndarray) -> Iterator[np.ndarray]:
    """Yield effects of documents, then of each kind of seed that there are several of.

    Scaled so that their mean square over their number is the variance of their mean.
    """
    centred = data - data.mean()
    marginal = {
        axis: centred.mean(axis=tuple({*range(data.ndim)} - {axis}), keepdims=True)
        for axis, levels in enumerate(data.shape)
        if levels > 1
    }
    residual = functools.reduce(operator.sub, marginal.values(), centred)
    freedom = data.size - 1 - sum(effects.size - 1 for effects in marginal.values())
    noise = float((residual**2).sum()) / freedom if freedom > 0 else 0.0
    for axis, effects in marginal.items():
        levels = effects.size
        scale = levels / (levels - 1)
        if axis == 0:
            # Mean square of the documents: their own spread plus the noise of single answers.
            square = float((effects**2).sum()) * (data.size / levels) / (levels - 1)
            kinds = len(marginal) - 1
            scale *= max(0.0, 1 - kinds * noise / square) if square > 0 else 0.0
        yield effects.ravel() * np.sqrt(scale)


def paired_test(first: np.ndarray, second: np.ndarray) -> float:
    """Compute the two-sided p-value that two conditions do equally well on the same documents.

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
    """Compute the share of the discordant pairs that ``first`` gets right, minus one half.

    From -0.5 to 0.5; conventionally 0.05 is small, 0.15 medium, 0.25 large. NaN without any
    discordant pair.
    """
    wins = int(((first == 1) & (second == 0)).sum())
    losses = int(((first == 0) & (second == 1)).sum())
    return wins / (wins + losses) - 0.5 if wins + losses else float("nan")


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Correct p-values by Holm's method for all of them being looked at."""
    from statsmodels.stats.multitest import multipletests

    values = np.asarray(p_values, dtype=np.float64)
    return values if values.size == 0 else multipletests(values, method="holm")[1]


def accuracy_intervals(
    documents: pd.DataFrame, *, level: float = 0.95, resamples: int = 2000
) -> pd.DataFrame:
    """Compute accuracies in percent with their intervals, per task, labels, shots and condition.

    ``documents`` is :func:`icl_helpers.document_results`. Columns of the result: the key, accuracy,
    low, high, documents, runs. Where every answer is right, or every one wrong, there is nothing to
    resample: the bounds are then the exact binomial ones for that many documents.
    """
    rows = []
    for key, answers in _answers(documents).items():
        n, runs = answers.shape
        mean, low, high = bootstrap_interval(_array(answers), level=level, resamples=resamples)
        if mean in (0.0, 1.0):
            low, high = stats.binomtest(round(n * mean), n).proportion_ci(level)
        # No accuracy lies beyond these ends, whatever the tails of an interval say.
        bounds = max(0.0, 100 * low), min(100.0, 100 * high)
        rows.append((*key, 100 * mean, *bounds, n, runs))
    columns = [*CELL, "accuracy", "low", "high", "documents", "runs"]
    return _fraction_of_some(pd.DataFrame(rows, columns=columns))


def comparisons(
    documents: pd.DataFrame, *, level: float = 0.95, resamples: int = 2000
) -> pd.DataFrame:
    """Compare each condition with the full model, and induction with random heads.

    Columns: the key of the first condition, ``against`` and ``against_control``, difference
    (percentage points, first minus against), low, high, p, p_holm (corrected over the whole frame),
    cohens_g, and distinguishable: p_holm below ``1 - level``.
    """
    answers = _answers(documents)
    rows = []
    for key, first_answers in answers.items():
        row, (condition, ablation, fraction, _) = key[:3], key[3:]
        rivals = [(*row, *_FULL)] if condition != "full" else []
        if condition == "induction_heads":
            rivals += [
                (*row, "random_heads", ablation, fraction, control)
                for control in dict.fromkeys(other[-1] for other in answers)
            ]
        for rival in rivals:
            if rival not in answers:
                continue
            first, second = _aligned(first_answers, answers[rival])
            interval = bootstrap_interval(first - second, level=level, resamples=resamples)
            tests = paired_test(first, second), cohens_g(first, second)
            rows.append((*key, rival[3], rival[-1], *(100 * bound for bound in interval), *tests))
    columns = [*CELL, "against", "against_control", "difference", "low", "high", "p", "cohens_g"]
    frame = pd.DataFrame(rows, columns=columns)
    frame["p_holm"] = holm(frame["p"].to_numpy())
    return _fraction_of_some(frame).assign(distinguishable=frame["p_holm"] < 1 - level)


def _answers(documents: pd.DataFrame) -> dict[tuple[Any, ...], pd.DataFrame]:
    """Return correctness by (task, labels, shots, condition, ablation, fraction).

    One row a document, one column a demonstration seed and ablation seed (-1 without one), all
    ascending. Documents that some run of the cell lacks are left out.
    """
    if "valid" in documents:
        documents = documents[documents["valid"]]
    seeds = ["demonstration_seed", "ablation_seed"]
    known = documents.reindex(columns=seeds).astype("Int64").fillna(-1).astype("int64")
    documents = documents.assign(**known, correct=documents["correct"].astype("float64"))
    answers = {}
    for key, rows in _keyed(documents).groupby(CELL, sort=False):
        wide = rows.pivot(index="doc_id", columns=seeds, values="correct")
        every_run = pd.MultiIndex.from_product(wide.columns.levels)
        answers[key] = wide.reindex(columns=every_run).dropna().astype("int64")
    return answers


def _keyed(frame: pd.DataFrame) -> pd.DataFrame:
    """Return rows whose columns of the key are all there, as groups need them."""
    return keyed(frame).assign(fraction=frame["fraction"].fillna(0.0))


def _fraction_of_some(frame: pd.DataFrame) -> pd.DataFrame:
    """Take a full model's fraction away again; the inverse of :func:`_keyed`."""
    return frame.assign(fraction=frame["fraction"].where(frame["fraction"] > 0))


def _array(answers: pd.DataFrame) -> np.ndarray:
    """Return answers as an array [documents, demonstration seeds, ablation seeds]."""
    n_seeds = answers.columns.get_level_values(0).nunique()
    return answers.to_numpy().reshape(len(answers), n_seeds, answers.shape[1] // n_seeds)


def _aligned(*parts: pd.DataFrame) -> list[np.ndarray]:
    """Cut answers to the documents and seeds that all of them have: arrays of one shape.

    A condition without ablation seeds (the full model) is repeated beside one that has several.
    Raises :class:`InputError` when nothing is shared.
    """
    rows = functools.reduce(pd.Index.intersection, (part.index for part in parts))
    first_level = (part.columns.get_level_values(0).unique() for part in parts)
    seeds = functools.reduce(pd.Index.intersection, first_level)
    if rows.empty or seeds.empty:
        raise InputError("the conditions to compare share no documents or demonstration seeds")
    return list(np.broadcast_arrays(*(_array(part.loc[rows, list(seeds)]) for part in parts)))


def icl_benefit(results: pd.DataFrame, *, shots: int = 10) -> pd.DataFrame:
    """Compute few-shot minus zero-shot accuracy and its relative change under each condition.

    ``results`` is the frame of :func:`icl_helpers.evaluate`. Columns: task, labels, condition,
    ablation, fraction, zero_shot, few_shot, benefit (percent and points), relative_change (percent
    of the full model's benefit; NaN where left out) and ``left_out``: empty, ``no benefit`` (the
    full model gains nothing) or ``at chance`` (its few-shot accuracy is within 1.96 standard
    errors of guessing), the cases that the paper leaves out.
    """
    means = 100 * _keyed(results).groupby(CELL)["accuracy"].mean()
    table = means.unstack("shots")
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
        if bootstrap_interval(few - zero).low <= 0:
            table.loc[rows.index, ["left_out", "relative_change"]] = "benefit within noise", np.nan
            continue
        ablated = rows.loc[rows["condition"] != "full", CELL[3:]]
        for index, *condition in ablated.itertuples(name=None):
            pairs = [(task, labels, n, *condition) for n in (shots, 0)] + keys
            few, zero, full_few, full_zero = _aligned(*(answers[key] for key in pairs))
            table.loc[index, ["low", "high"]] = _change_interval(few - zero, full_few - full_zero)
    return table


def _change_interval(benefit: np.ndarray, full: np.ndarray) -> tuple[float, float]:
    """Return the bounds, in percent, of the change from the full model's benefit."""
    ratio = benefit.mean() / full.mean()
    change = bootstrap_interval((benefit - ratio * full) / full.mean())
    centre = 100 * (ratio - 1)
    return centre + 100 * change.low, centre + 100 * change.high


def left_out_tasks(changes: pd.DataFrame) -> pd.DataFrame:
    """List the tasks without a relative change and why, as in ``left_out``."""
    full = changes[(changes["condition"] == "full") & (changes["left_out"] != "")]
    columns = ["task", "labels", "shots", "zero_shot", "few_shot", "left_out"]
    return full[columns].rename(columns={"left_out": "why"}).reset_index(drop=True)


_ACCURACY = 0.6


def simulate_coverage(
    *, seeds: int, documents: int, seed_spread: float, document_spread: float = 0.25,
    trials: int = 500, resamples: int = 400, level: float = 0.95, seed: int = 0,
) -> float:  # fmt: skip
    """Return the share of simulated runs whose interval holds the true accuracy, 0.6.

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
        interval = bootstrap_interval(right, level=level, resamples=resamples, seed=trial)
        held += interval.low <= _ACCURACY <= interval.high
    return held / trials


def coverage_table(
    *, documents: int, seeds: int = 3, spreads: tuple[float, ...] = (0.0, 0.02, 0.05)
) -> pd.DataFrame:
    """Return coverage in percent over 500 simulations for several spreads over seeds, in points."""
    coverage = [
        100 * simulate_coverage(seeds=seeds, documents=documents, seed_spread=spread)
        for spread in spreads
    ]
    index = pd.Index([100 * spread for spread in spreads], name="spread over seeds, points")
    return pd.DataFrame({"95 % interval holds the truth, %": coverage}, index=index)
