"""Bias or skill: what a model's answers say beside how many of them are right.

A model that says one label to everything is right on its share of the documents, and one that tells
the labels apart with the wrong threshold may be no better: accuracy mixes both. Whether it tells
them apart is in the log-probabilities of the labels, which a run keeps of every document.

Example
-------
>>> log_probabilities = np.log([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
>>> answer_measures(log_probabilities, np.array([0, 0, 1]))["auc"]
array([1.])
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import special, stats

from icl_helpers.errors import InputError
from icl_helpers.evaluation.store import CELL, keyed

__all__ = [
    "SkillChange", "answer_measures", "answer_table", "at_most", "skill_change",
    "smallest_detectable",
]  # fmt: skip

# Of a two-sided test at 5 %, and of a difference that it is to find in four of five cases.
_QUANTILES = float(stats.norm.ppf(0.975) + stats.norm.ppf(0.8))
# Fewer discordant documents of one sign never make an exact paired test significant at 5 %.
_LEAST_DISCORDANT = 6


def answer_measures(
    log_probabilities: Float[np.ndarray, "documents labels"],
    targets: Int[np.ndarray, " documents"],
    weights: Float[np.ndarray, "samples documents"] | None = None,
) -> dict[str, np.ndarray]:
    """Compute accuracy and what it hides, a value a sample of the documents.

    Parameters
    ----------
    log_probabilities
        Of every label after the prompt, in nats.
    targets
        Index of the right label.
    weights
        How often each document is in a sample; None: all of them, once.

    Returns
    -------
    dict
        Arrays [samples], all from 0 to 1: ``accuracy``; ``balanced``, the mean over the labels of
        the accuracy on their documents; ``calibrated``, accuracy after each label's probability is
        divided by its mean over the documents, as contextual calibration does with that of an empty
        input (Zhao et al. 2021); ``auc``, the chance that a document of the second label gets a
        higher log-odds of it than one of the first, 0.5 for a coin (NaN unless there are two labels
        and documents of both); and ``shares`` [samples, labels], how often each label is said.
    """
    n_labels = log_probabilities.shape[1]
    if weights is None:
        weights = np.ones((1, len(targets)))
    labels = np.eye(n_labels)[targets]
    normalised = special.log_softmax(log_probabilities, axis=1)
    said = np.eye(n_labels)[log_probabilities.argmax(axis=1)]
    total, by_label = weights.sum(axis=1), weights @ labels
    with np.errstate(divide="ignore", invalid="ignore"):
        recalls = weights @ (labels * said) / by_label
        typical = np.log(weights @ np.exp(normalised) / total[:, None])
        again = (normalised - typical[:, None]).argmax(axis=2)
        return {
            "accuracy": (weights @ (labels * said)).sum(axis=1) / total,
            "balanced": np.nanmean(recalls, axis=1),
            "calibrated": (weights * (again == targets)).sum(axis=1) / total,
            "auc": _auc(normalised, labels, weights),
            "shares": weights @ said / total[:, None],
        }


def _auc(normalised: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    if labels.shape[1] != 2:
        return np.full(len(weights), np.nan)
    odds = normalised[:, 1] - normalised[:, 0]
    first, second = (labels[:, label] > 0 for label in (0, 1))
    wins = (odds[second][:, None] > odds[first]) + 0.5 * (odds[second][:, None] == odds[first])
    pairs = weights[:, second].sum(axis=1) * weights[:, first].sum(axis=1)
    return np.asarray(((weights[:, second] @ wins) * weights[:, first]).sum(axis=1) / pairs)


def smallest_detectable(gaps: Float[np.ndarray, " documents"]) -> float:
    """Return the size from which on a difference would be found on so many documents.

    ``gaps`` are differences of two conditions, document by document. Found is what a two-sided test
    at 5 % finds in four of five cases at the spread of these gaps; where hardly a document differs,
    what six documents of one sign are, since fewer never suffice. In the unit of the gaps.
    """
    if len(gaps) < 2:
        raise InputError(f"a difference needs at least 2 documents, got {len(gaps)}")
    return max(_QUANTILES * gaps.std(ddof=1) / len(gaps) ** 0.5, _LEAST_DISCORDANT / len(gaps))


def at_most(documents: pd.DataFrame) -> pd.DataFrame:
    """Select the rows of each task's most examples, with the largest share of heads removed."""
    most = documents.groupby(["task", "labels"])["shots"].transform("max")
    share = documents["fraction"]
    return documents[(documents["shots"] == most) & (share.isna() | (share == share.max()))]


def answer_table(
    documents: pd.DataFrame, *, resamples: int = 200, seed: int = 0, level: float = 0.95
) -> pd.DataFrame:
    """Compute :func:`answer_measures` of every task, number of examples and condition.

    ``documents`` is :func:`icl_helpers.document_results`. Columns: the key; accuracy, balanced,
    calibrated and auc in percent, means over seeds and draws, with ``_low`` and ``_high``, bounds
    of the interval over resampled documents; ``said``, index of the label that is said most, and
    ``share``, how often, in percent; ``detectable``, :func:`smallest_detectable` beside the full
    model, in points (NaN for that itself). Rows without kept log-probabilities are left out.
    """
    rows = _with_log_probabilities(documents)
    rows = rows.assign(fraction=rows["fraction"].fillna(0.0))
    table = []
    right: dict[tuple[Any, ...], pd.Series] = {}
    for key, cell in rows.groupby(CELL, sort=False):
        shared = _documents_of_every_run(cell)
        if len(shared) < 2:
            continue
        measured = _measures(cell, shared, _samples(len(shared), resamples, seed))
        right[key] = cell.groupby("doc_id")["correct"].mean().loc[shared]
        values: dict[str, Any] = dict(zip(CELL, key, strict=True))
        for name in ("accuracy", "balanced", "calibrated", "auc"):
            mean = 100 * np.mean([run[name] for run in measured], axis=0)
            values[name] = mean[0]
            values[f"{name}_low"], values[f"{name}_high"] = _bounds(mean, level)
        shares = np.mean([run["shares"][0] for run in measured], axis=0)
        table.append(values | {"said": int(shares.argmax()), "share": 100 * float(shares.max())})
    detectable = []
    for key, answers in right.items():
        whole = right.get((*key[:3], "full", "none", 0.0, ""))
        gaps = np.array([]) if whole is None else (answers - whole).dropna().to_numpy(np.float64)
        known = key[3] != "full" and len(gaps) > 1
        detectable.append(100 * smallest_detectable(gaps) if known else np.nan)
    frame = pd.DataFrame(table, columns=None if table else CELL).assign(detectable=detectable)
    return frame.assign(fraction=frame["fraction"].where(frame["fraction"] > 0))


def _with_log_probabilities(documents: pd.DataFrame) -> pd.DataFrame:
    rows = keyed(documents)
    if "log_probabilities" not in rows:
        return rows.iloc[:0].assign(log_probabilities=None)
    return rows[rows["valid"].astype(bool) & rows["log_probabilities"].notna()]


def _runs(cell: pd.DataFrame) -> list[pd.DataFrame]:
    seeds = cell.groupby(["ablation_seed", "demonstration_seed"], dropna=False)
    return [run for _, run in seeds]


def _documents_of_every_run(*cells: pd.DataFrame) -> list[Any]:
    return sorted(set.intersection(*(set(run["doc_id"]) for cell in cells for run in _runs(cell))))


def _samples(documents: int, resamples: int, seed: int) -> Float[np.ndarray, "samples documents"]:
    """How often each document is in a sample: first all of them once, then resampled."""
    shares = [1 / documents] * documents
    sampled = np.random.default_rng(seed).multinomial(documents, shares, size=resamples)
    return np.concatenate([np.ones((1, documents)), sampled])


def _bounds(samples: Float[np.ndarray, " samples"], level: float) -> list[float]:
    """Bounds of the resampled values; the first sample is all documents."""
    if np.isnan(samples).all():
        return [math.nan, math.nan]
    return np.nanquantile(samples[1:], [(1 - level) / 2, (1 + level) / 2]).tolist()


def _measures(
    cell: pd.DataFrame, shared: list[Any], weights: Float[np.ndarray, "samples documents"]
) -> list[dict[str, np.ndarray]]:
    """:func:`answer_measures` of every seed and draw of a cell, on documents that all have."""
    measures = []
    for run in _runs(cell):
        rows = run[run["doc_id"].isin(shared)].sort_values("doc_id")
        scores = np.stack(rows["log_probabilities"].to_list()).astype(np.float64)
        measures.append(answer_measures(scores, rows["target"].to_numpy(np.int64), weights))
    return measures


class SkillChange(NamedTuple):
    """How well labels are told apart under one condition and under another, in percent.

    ``measure`` is ``AUC``, or ``calibrated accuracy`` unless there are two labels. ``low`` and
    ``high`` bound the change, over documents that both have.
    """

    measure: str
    chance: float
    before: float
    before_low: float
    after: float
    after_low: float
    after_high: float
    low: float
    high: float

    @property
    def lost(self) -> bool:
        """Whether labels are told apart distinguishably worse, on whichever side of chance."""
        return self.high < 0 and not self.turned

    @property
    def turned(self) -> bool:
        """Whether labels are still told apart, with the wrong one preferred."""
        return self.measure == "AUC" and self.after_high < self.chance

    @property
    def in_words(self) -> str:
        """What became of the skill."""
        if self.before_low <= self.chance:
            what = "there was no skill to lose"
        elif self.turned:
            what = "the labels are still told apart, the other way round"
        elif not self.lost:
            what = "no loss of skill is distinguishable"
        elif self.after_high < self.chance:
            what = "the right label is chosen less often than by chance"
        else:
            left = self.after_low > self.chance
            what = f"skill is lost, {'in part' if left else 'and none is shown to be left'}"
        change = (
            f"{self.before:.0f} to {self.after:.0f}, change {self.low:+.0f} to {self.high:+.0f}"
        )
        return f"{what} ({self.measure} {change})"


def skill_change(
    before: pd.DataFrame, after: pd.DataFrame, *, resamples: int = 400, seed: int = 0,
    level: float = 0.95,
) -> SkillChange | None:  # fmt: skip
    """Compare how well two cells of a task tell its labels apart, whatever label they prefer.

    Each frame has the rows of one cell of :func:`icl_helpers.document_results`. The measure is a
    mean over seeds and draws; intervals are over resampled documents, the same on both sides. None
    without log-probabilities of two documents or more.
    """
    cells = [_with_log_probabilities(rows) for rows in (before, after)]
    shared = _documents_of_every_run(*cells) if all(map(len, cells)) else []
    if len(shared) < 2:
        return None
    weights = _samples(len(shared), resamples, seed)
    labels = len(cells[0]["log_probabilities"].iloc[0])
    name = "auc" if labels == 2 else "calibrated"
    values = [
        100 * np.mean([run[name] for run in _measures(cell, shared, weights)], axis=0)
        for cell in cells
    ]
    if any(np.isnan(value[0]) for value in values):
        return None
    first, second = values
    return SkillChange(
        "AUC" if name == "auc" else "calibrated accuracy", 100 / labels,
        float(first[0]), _bounds(first, level)[0], float(second[0]), *_bounds(second, level),
        *_bounds(second - first, level),
    )  # fmt: skip
