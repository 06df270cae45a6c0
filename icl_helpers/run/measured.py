"""What the closer stages measure of a run: parts that are kept as soon as they are there.

A part is a few conditions on the prompts of one task. It is found again by all that decides it, in
the run's directory or in its bundle, so an interrupted stage goes on where it stopped. A ``run`` is
an :class:`icl_helpers.Run`.

Example
-------
>>> run = icl.run_at("runs/icl-tiny")
>>> dose_response(run).groupby(["task", "heads", "chosen_by"])["margin"].mean()
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from icl_helpers.analysis.dose_response import (
    Answers,
    ChosenHeads,
    dose_sets,
    group_answers,
    shapley_orders,
    shapley_values,
)
from icl_helpers.attention.heads import Head, doses
from icl_helpers.evaluation.cells import CellGroup
from icl_helpers.evaluation.conditions import FULL, Condition
from icl_helpers.files import content_key
from icl_helpers.tasks.prompts import resolve_sampling

__all__ = [
    "analysis_groups",
    "dose_response",
    "measured_answers",
    "removals",
    "shapley",
    "single_heads",
]

# Conditions of a part: what is lost where a stage is interrupted.
_PART = 24
# Orders of removal, for models with at most so many heads.
_ORDERS, _MOST_HEADS = 6, 64


def analysis_groups(run: Any, conditions: Sequence[Condition] = ()) -> list[CellGroup]:
    """The prompts that are looked at closely, a group a task, to be scored under conditions."""
    p = run.parameters
    return [
        CellGroup(
            s.task, s.labels, s.shots, s.seeds[0], p.analysis_limit,
            resolve_sampling(s.task, s.data, p.sampling), s.data, tuple(conditions),
            s.demonstrations,
        )
        for s in run.plan.analysis_sets()
    ]  # fmt: skip


def mean_ablated(run: Any, sets: Sequence[Sequence[Head]]) -> list[Condition]:
    """Conditions with each of these sets of heads replaced by their means; FULL for an empty one.

    The means are named and not there yet: :func:`measured_answers` puts them in place.
    """
    key = content_key(run.plan.means_parameters())
    return [
        Condition("random_heads", "mean", len(heads) / run.n_heads, None, tuple(heads),
                  means_key=key) if heads else FULL
        for heads in sets
    ]  # fmt: skip


def measured_answers(run: Any, name: str, group: CellGroup) -> list[Answers]:
    """Answers of a group under each of its conditions, measured in parts that are kept.

    Raises :class:`icl_helpers.NotMeasuredError` as :meth:`icl_helpers.Run.measurement` does.
    """
    found: list[Answers] = []
    parts = group.split(_PART)
    for part in tqdm(parts, desc=f"{name}, {group.task}", unit="part", leave=False):
        of = [part.spec(), part.seed, [c.identity() for c in part.conditions]]
        kept = run.measurement(name, of, functools.partial(_answers, run, part))
        found += [_unpacked(one) for one in kept]
    return found


def _answers(run: Any, group: CellGroup) -> list[dict[str, Any]]:
    means = run.mean_head_outputs() if any(c.ablation == "mean" for c in group.conditions) else None
    filled = tuple(replace(c, head_outputs=means) for c in group.conditions)
    answers = group_answers(run.scorer(), replace(group, conditions=filled))
    return [_packed(one) for one in answers]


def _packed(answers: Answers) -> dict[str, Any]:
    return {
        "margins": answers.margins,
        "right": "".join(str(int(hit)) for hit in answers.right),
    }


def _unpacked(kept: dict[str, Any]) -> Answers:
    return Answers(kept["margins"], [mark == "1" for mark in kept["right"]])


def dose_response(run: Any) -> pd.DataFrame:
    """Measure what removing more and more heads costs: a row a task and set of heads.

    Columns: task, heads (how many), chosen_by, draw and distinct (as of
    :class:`icl_helpers.analysis.dose_response.ChosenHeads`; ``none`` for the full model), margin
    (nats) and accuracy (percent), means over the documents, and of each document ``margins``.
    """
    scores = run.prefix_scores().mean(0)
    chosen = dose_sets(scores, doses(len(run.induction_heads()), run.n_heads))
    return removals(run, "dose and response", [ChosenHeads((), "none"), *chosen])


def single_heads(run: Any) -> pd.DataFrame:
    """Measure what removing each head alone costs: rows as of :func:`dose_response`.

    With layer and head, and its prefix-matching ``score``; the full model has none.
    """
    scores = run.prefix_scores().mean(0)
    heads = [Head(*head) for head in np.ndindex(*scores.shape)]
    sets = [ChosenHeads((), "none"), *(ChosenHeads((head,), "alone") for head in heads)]
    found = removals(run, "each head alone", sets)
    own = [None, *heads] * (len(found) // len(sets))
    places = pd.DataFrame([head or (None, None) for head in own], columns=["layer", "head"])
    score = [float("nan") if head is None else float(scores[head]) for head in own]
    return found.join(places.astype("Int64")).assign(score=score)


def removals(run: Any, name: str, sets: Sequence[ChosenHeads]) -> pd.DataFrame:
    """Measure what mean ablation of each set costs: rows as of :func:`dose_response`."""
    conditions = mean_ablated(run, [one.heads for one in sets])
    rows = [
        {
            "task": group.task, "heads": len(one.heads), "chosen_by": one.chosen_by,
            "draw": one.draw, "distinct": one.distinct, **_summed(answers),
        }
        for group in analysis_groups(run, conditions)
        for one, answers in zip(sets, measured_answers(run, name, group), strict=True)
    ]  # fmt: skip
    return pd.DataFrame(rows).astype({"draw": "Int64", "distinct": "Int64"})


def _summed(answers: Answers) -> dict[str, Any]:
    margins = np.array(answers.margins, dtype=np.float64)
    valid = np.isfinite(margins)
    right = np.array(answers.right)[valid]
    return {"margin": margins[valid].mean(), "accuracy": 100 * right.mean(), "margins": margins}


def shapley(run: Any) -> pd.DataFrame:
    """Measure each head's Shapley value on the first task, over a few orders of removal.

    Columns: task, layer, head, prefix-matching score and ``value`` (nats of margin, over all
    companies that the head can be removed in). Empty for a model with more than 64 heads.
    """
    if run.n_heads > _MOST_HEADS:
        return pd.DataFrame(columns=["task", "layer", "head", "score", "value"])
    scores = run.prefix_scores().mean(0)
    heads = [Head(*head) for head in np.ndindex(*scores.shape)]
    orders = shapley_orders(len(heads), _ORDERS)
    sets = [
        [heads[at] for at in order[:count]] for order in orders for count in range(len(heads) + 1)
    ]
    group = analysis_groups(run, mean_ablated(run, sets))[0]
    answers = measured_answers(run, "Shapley values", group)
    margins = np.array([_summed(one)["margin"] for one in answers]).reshape(len(orders), -1)
    return pd.DataFrame(heads).assign(
        task=group.task, score=[float(scores[head]) for head in heads],
        value=shapley_values(orders, margins[:, :1] - margins),
    )  # fmt: skip
