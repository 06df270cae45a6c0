"""Dose and response: what removing one head, or more and more of them, costs on the same documents.

The heads with the highest prefix-matching score are held against the lowest, and against random
sets with as many heads in every layer that hold none of the highest (the strict control).

Example
-------
>>> scores = icl.prefix_matching_scores(model, icl.random_sequences(tokenizer)).mean(0)
>>> dose_sets(scores, doses(4))
>>> permutation_p(0.7, [0.1, 0.2, 0.1])
0.25
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats

from icl_helpers.attention.heads import DRAWS, Head, strict_sets, top_heads
from icl_helpers.errors import InputError
from icl_helpers.evaluation.cells import CellGroup, Scorer, score_group

__all__ = [
    "Answers", "ChosenHeads", "dose_sets", "group_answers", "judged", "permutation_p",
    "rank_correlation", "set_stability", "shapley_orders", "shapley_values",
]  # fmt: skip


class ChosenHeads(NamedTuple):
    """A set of heads and how it was chosen: ``highest`` or ``lowest`` score, or ``random``.

    Of a random set ``draw`` is its number, and ``distinct`` how many such sets there are; None
    where layers without enough heads borrow from their neighbours, which is not counted.
    """

    heads: tuple[Head, ...]
    chosen_by: str
    draw: int | None = None
    distinct: int | None = None


class Answers(NamedTuple):
    """Answers to a set of prompts, a document an entry.

    ``margins``: log-probability of the right label minus that of the best wrong one, in nats, None
    where one is not finite; ``right``: whether the right label is chosen.
    """

    margins: list[float | None]
    right: list[bool]


def dose_sets(
    scores: Float[torch.Tensor, "layers heads"], counts: Sequence[int], *, draws: int = DRAWS
) -> list[ChosenHeads]:
    """Sets of heads for every dose: the highest scores, the lowest, and the random sets."""
    ranked = top_heads(scores, 1.0)
    sets = []
    for count in counts:
        highest, lowest = tuple(ranked[:count]), tuple(reversed(ranked[-count:]))
        sets += [ChosenHeads(highest, "highest"), ChosenHeads(lowest, "lowest")]
        drawn, distinct = strict_sets(highest, *scores.shape, draws=draws)
        sets += [ChosenHeads(heads, "random", draw, distinct) for draw, heads in enumerate(drawn)]
    return sets


def group_answers(lm: Scorer, group: CellGroup) -> list[Answers]:
    """Answers to a group's prompts under each of its conditions, in order; nothing is stored."""
    return [
        judged(documents["log_probabilities"], documents["target"])
        for _, documents in score_group(lambda: lm, group, {}, None)
    ]


def judged(scores: Sequence[Sequence[float | None]], targets: Sequence[int]) -> Answers:
    """Margins and correctness of log-probabilities of the labels, None where not finite."""
    margins: list[float | None] = []
    right = []
    for values, target in zip(scores, targets, strict=True):
        known = [value for value in values if value is not None and math.isfinite(value)]
        if valid := len(known) == len(values):
            wrong = max(value for label, value in enumerate(known) if label != target)
        margins.append(round(known[target] - wrong, 5) if valid else None)
        # As in lm-eval's accuracy, the first of equal labels.
        right.append(valid and known.index(max(known)) == target)
    return Answers(margins, right)


def permutation_p(effect: float, draws: Sequence[float]) -> float:
    """Return the chance of a random set that harms at least as much: (1 + those) / (1 + draws)."""
    if not draws:
        raise InputError("draws is empty; a permutation test needs at least one random set")
    return (1 + sum(draw >= effect for draw in draws)) / (1 + len(draws))


def rank_correlation(
    scores: Float[np.ndarray, " heads"], effects: Float[np.ndarray, "heads documents"], *,
    level: float = 0.95, resamples: int = 1000, seed: int = 0,
) -> tuple[float, float, float]:  # fmt: skip
    """Compute Spearman's correlation of heads' scores with their mean effects, and its interval.

    The interval resamples documents: the heads are all that the model has. NaN where one of the two
    is the same for every head.
    """
    if effects.ndim != 2 or len(scores) != len(effects) or effects.shape[1] < 2:
        raise InputError(
            f"effects must be [heads, documents] with at least 2 documents and a row a score, got "
            f"{list(effects.shape)} and {len(scores)} scores"
        )
    rng = np.random.default_rng(seed)
    n = effects.shape[1]
    counts = rng.multinomial(n, [1 / n] * n, size=resamples)
    means = np.concatenate([effects.mean(axis=1)[None], counts @ effects.T / n])
    # Pearson's correlation of the ranks of the scores with those of each row of means.
    ranks, rows = stats.rankdata(scores), stats.rankdata(means, axis=1)
    ranks, rows = ranks - ranks.mean(), rows - rows.mean(axis=1, keepdims=True)
    scale = np.sqrt((ranks**2).sum() * (rows**2).sum(axis=1))
    correlations = np.divide(rows @ ranks, scale, out=np.full(len(rows), np.nan), where=scale > 0)
    if np.isnan(correlations[0]):
        return (float("nan"),) * 3
    low, high = np.nanquantile(correlations[1:], [(1 - level) / 2, (1 + level) / 2])
    return float(correlations[0]), float(low), float(high)


def shapley_orders(n_heads: int, n_orders: int, *, seed: int = 0) -> list[list[int]]:
    """Orders of removing all heads one by one; every second one is the reverse of the first."""
    rng = np.random.default_rng(seed)
    drawn = (rng.permutation(n_heads).tolist() for _ in range((n_orders + 1) // 2))
    return [order for there in drawn for order in (there, there[::-1])][:n_orders]


def shapley_values(
    orders: Sequence[Sequence[int]], losses: Float[np.ndarray, "orders removed"]
) -> Float[np.ndarray, " heads"]:
    """Compute each head's mean share of the loss, over orders of removal.

    ``losses`` [orders, heads + 1] is what is lost once the first 0, 1, 2, ... heads of an order are
    gone. Over all orders these are the Shapley values: they add up to the whole loss.
    """
    steps = np.diff(losses, axis=1)
    if steps.shape != np.shape(orders):
        raise InputError(
            f"losses must be [orders, heads + 1] for orders {list(np.shape(orders))}, got "
            f"{list(losses.shape)}"
        )
    values = np.zeros(steps.shape[1])
    for order, step in zip(orders, steps, strict=True):
        values[list(order)] += step
    return values / len(orders)


def set_stability(
    scores: Float[torch.Tensor, "sequences layers heads"], fraction: float, *,
    resamples: int = 1000, seed: int = 0, level: float = 0.95,
) -> tuple[float, float, float]:  # fmt: skip
    """Compute how much of the top heads stays when other sequences are drawn: mean, low, high.

    That is the Jaccard index (shared heads over heads in either) of the heads chosen from all
    sequences with those chosen from as many drawn again among them; low and high bound the middle
    95 % of the draws.
    """
    n = len(scores)
    if n < 2:
        raise InputError(f"the sequences' scores must be of at least 2 sequences, got {n}")
    rng = np.random.default_rng(seed)
    heads = set(top_heads(scores.mean(0), fraction))
    indices = []
    for drawn in rng.integers(0, n, (resamples, n)):
        again = set(top_heads(scores[torch.from_numpy(drawn)].mean(0), fraction))
        indices.append(len(heads & again) / len(heads | again))
    low, high = np.quantile(indices, [(1 - level) / 2, (1 + level) / 2])
    return float(np.mean(indices)), float(low), float(high)
