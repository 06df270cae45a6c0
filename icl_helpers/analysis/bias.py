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

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import special, stats

from icl_helpers.errors import InputError
from icl_helpers.evaluation.store import CELL, keyed

__all__ = ["answer_measures", "answer_table", "at_most", "smallest_detectable"]

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
    rows = keyed(documents)
    if "log_probabilities" not in rows:
        rows = rows.iloc[:0].assign(log_probabilities=None)
    rows = rows[rows["valid"].astype(bool) & rows["log_probabilities"].notna()]
    rows = rows.assign(fraction=rows["fraction"].fillna(0.0))
    table = []
    right: dict[tuple[Any, ...], pd.Series] = {}
    for key, cell in rows.groupby(CELL, sort=False):
        by_seeds = cell.groupby(["ablation_seed", "demonstration_seed"], dropna=False)
        runs = [run for _, run in by_seeds]
        shared = set.intersection(*(set(run["doc_id"]) for run in runs))
        if len(shared) < 2:
            continue
        sampled = np.random.default_rng(seed).multinomial(
            len(shared), [1 / len(shared)] * len(shared), size=resamples
        )
        weights = np.concatenate([np.ones((1, len(shared))), sampled])
        measured = []
        for run in runs:
            common = run[run["doc_id"].isin(shared)].sort_values("doc_id")
            scores = np.stack(common["log_probabilities"].to_list()).astype(np.float64)
            measured.append(answer_measures(scores, common["target"].to_numpy(np.int64), weights))
        right[key] = cell.groupby("doc_id")["correct"].mean().loc[sorted(shared)]
        values: dict[str, Any] = dict(zip(CELL, key, strict=True))
        for name in ("accuracy", "balanced", "calibrated", "auc"):
            # The first sample is all documents, the others are resampled.
            mean = 100 * np.mean([run[name] for run in measured], axis=0)
            values[name] = mean[0]
            bounds = np.nanquantile(mean[1:], [(1 - level) / 2, (1 + level) / 2])
            values[f"{name}_low"], values[f"{name}_high"] = bounds
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
