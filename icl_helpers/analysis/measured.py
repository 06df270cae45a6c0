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
import torch
from tqdm import tqdm

from icl_helpers.analysis.dose_response import (
    Answers,
    ChosenHeads,
    dose_sets,
    group_answers,
    judged,
    shapley_orders,
    shapley_values,
)
from icl_helpers.analysis.removals import (
    KINDS,
    Removals,
    blocked_attention,
    score_prompts,
    sequence_losses,
)
from icl_helpers.attention.heads import Head, doses, strict_sets
from icl_helpers.attention.induction_pattern import induction_patterns
from icl_helpers.attention.interventions import Intervention, MeanAblation
from icl_helpers.attention.means import mean_head_outputs
from icl_helpers.attention.scores import random_sequences, repeated_ids
from icl_helpers.errors import NotMeasuredError
from icl_helpers.evaluation.cells import CellGroup, build
from icl_helpers.evaluation.conditions import FULL, Condition
from icl_helpers.files import content_key
from icl_helpers.models.reference_text import PAPER_SAMPLES, reference_ids, reference_texts
from icl_helpers.tasks.prompts import Prompt, PromptSet, shuffled_labels
from icl_helpers.tasks.specs import TaskSpec, get_task_spec

__all__ = [
    "analysis_group", "analysis_groups", "attention_moved", "dose_response", "measured_answers",
    "prompts_of", "removal_kinds", "removals", "shapley", "side_effects", "single_heads",
]  # fmt: skip

# Conditions of a part: what is lost where a stage is interrupted.
_PART = 24
# Draws of what a kind of removal draws.
_DRAWS = 4
# Orders of removal for models with at most so many heads, and the documents they are tried on.
_ORDERS, _MOST_HEADS, _ORDERED_DOCUMENTS = 4, 64, 8
# Texts that are read twice, and the tokens of each.
_TEXTS, _TEXT_TOKENS = 8, 64


def analysis_group(run: Any, s: PromptSet, conditions: Sequence[Condition] = ()) -> CellGroup:
    """The prompts of a set that are looked at closely, to be scored under conditions."""
    limit = run.parameters.analysis_limit
    return CellGroup(**vars(s), limit=limit, conditions=tuple(conditions))


def analysis_groups(run: Any, conditions: Sequence[Condition] = ()) -> list[CellGroup]:
    """Those of every task that is looked at closely."""
    return [analysis_group(run, prompts, conditions) for prompts in run.plan.analysis_sets()]


def mean_ablated(run: Any, sets: Sequence[Sequence[Head]]) -> list[Condition]:
    """Conditions with sets of heads at their means, named and not there yet; FULL for none."""
    key = content_key(run.plan.means_parameters())
    return [
        Condition("random_heads", "mean", len(heads) / run.n_heads, None, tuple(heads),
                  means_key=key) if heads else FULL
        for heads in sets
    ]  # fmt: skip


def measured_answers(run: Any, name: str, group: CellGroup) -> list[Answers]:
    """Answers under each of a group's conditions; raises as :meth:`icl_helpers.Run.measurement`."""

    def compute(part: CellGroup) -> list[dict[str, Any]]:
        needed = any(condition.ablation == "mean" for condition in part.conditions)
        means = run.mean_head_outputs() if needed else None
        filled = tuple(replace(condition, head_outputs=means) for condition in part.conditions)
        return list(map(_packed, group_answers(run.scorer(), replace(part, conditions=filled))))

    answers: list[Answers] = []
    parts = group.split(_PART)
    for part in tqdm(parts, desc=f"{name}, {group.task}", unit="part", leave=False):
        of = [part.spec(), part.seed, [c.identity() for c in part.conditions]]
        answers += map(_unpacked, run.measurement(name, of, compute, part))
    return answers


def _packed(answers: Answers) -> dict[str, Any]:
    return {"margins": answers.margins, "right": "".join(str(int(hit)) for hit in answers.right)}


def _unpacked(packed: dict[str, Any]) -> Answers:
    return Answers(packed["margins"], [mark == "1" for mark in packed["right"]])


def dose_response(run: Any) -> pd.DataFrame:
    """Measure what removing more and more heads costs: a row a task and set of heads.

    Columns: task, heads (how many), chosen_by, draw and distinct (as of
    :class:`icl_helpers.analysis.dose_response.ChosenHeads`; ``none`` for the full model), margin
    (nats) and accuracy (percent), means over the documents, and of each document ``margins``.
    """
    scores = run.prefix_scores().mean(0)
    sets = dose_sets(scores, doses(len(run.induction_heads()), run.n_heads))
    return removals(run, "dose and response", [ChosenHeads((), "none"), *sets])


def single_heads(run: Any) -> pd.DataFrame:
    """Measure what each head's removal costs: rows as of :func:`dose_response`, with ``score``."""
    scores = run.prefix_scores().mean(0)
    heads = [Head(*head) for head in np.ndindex(*scores.shape)]
    sets = [ChosenHeads((), "none"), *(ChosenHeads((head,), "alone") for head in heads)]
    frame = removals(run, "each head alone", sets)
    removed = [None, *heads] * (len(frame) // len(sets))
    places = pd.DataFrame([head or (None, None) for head in removed], columns=["layer", "head"])
    score = [float("nan") if head is None else float(scores[head]) for head in removed]
    return frame.join(places.astype("Int64")).assign(score=score)


def removals(run: Any, name: str, sets: Sequence[ChosenHeads]) -> pd.DataFrame:
    """Measure what mean ablation of each set costs: rows as of :func:`dose_response`."""
    conditions = mean_ablated(run, [chosen.heads for chosen in sets])
    rows = [
        {"task": group.task, **chosen._asdict(), "heads": len(chosen.heads), **_summed(answers)}
        for group in analysis_groups(run, conditions)
        for chosen, answers in zip(sets, measured_answers(run, name, group), strict=True)
    ]
    return pd.DataFrame(rows).astype({"draw": "Int64", "distinct": "Int64"})


def _summed(answers: Answers) -> dict[str, Any]:
    margins = np.array(answers.margins, dtype=np.float64)
    valid = np.isfinite(margins)
    right = np.array(answers.right)[valid]
    return {"margin": margins[valid].mean(), "accuracy": 100 * right.mean(), "margins": margins}


def shapley(run: Any) -> pd.DataFrame:
    """Measure each head's Shapley value on the first task, over a few orders of removal.

    Columns: task, layer, head, prefix-matching score and ``value`` (nats of margin, over all
    companies that the head can be removed in), on eight documents. Empty for a model with more
    than 64 heads.
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
    few = min(_ORDERED_DOCUMENTS, run.parameters.analysis_limit)
    answers = measured_answers(run, "Shapley values", replace(group, limit=few))
    margins = np.array([_summed(of_set)["margin"] for of_set in answers]).reshape(len(orders), -1)
    return pd.DataFrame(heads).assign(
        task=group.task, score=[float(scores[head]) for head in heads],
        value=shapley_values(orders, margins[:, :1] - margins),
    )  # fmt: skip


def _abstract(run: Any) -> list[CellGroup]:
    """Groups of the tasks whose prompts have an induction pattern; raises where there is none."""
    groups = [g for g in analysis_groups(run) if isinstance(get_task_spec(g.task), TaskSpec)]
    if not groups:
        raise NotMeasuredError(
            "This needs prompts with an induction pattern, and no abstract task is looked at "
            "closely here (analysis_tasks)."
        )
    return groups


def prompts_of(group: CellGroup) -> list[Prompt]:
    """The prompts of the documents that a group has."""
    built = build(group)
    documents = dict.fromkeys(instance.doc["doc_id"] for instance in built.task.instances)
    return [built.prompts[doc_id] for doc_id in documents]


def _random_sets(run: Any, draws: int) -> list[tuple[Head, ...]]:
    scores = run.prefix_scores()[0]
    return strict_sets(run.induction_heads(), *scores.shape, draws=draws)[0][:draws]


def removal_kinds(run: Any) -> pd.DataFrame:
    """Measure what each kind of removal of the run's induction heads costs, and its control.

    A row a task, kind and draw: task, ``kind`` (of :data:`icl_helpers.analysis.removals.KINDS`, or
    ``none`` for the full model), draw, and the columns of :func:`dose_response` on margins.
    """
    rows = []
    heads, random = run.induction_heads(), _random_sets(run, _DRAWS)
    p = run.parameters

    @functools.cache
    def both_means() -> dict[str, torch.Tensor]:
        """By both readings; the one that the run does not use as far as needed."""
        wholes = [q.context + c for g in _abstract(run) for q in prompts_of(g) for c in q.choices]
        longest = max(map(len, run.tokenizer(wholes, add_special_tokens=False).input_ids))
        other: Any = "head_output" if p.average == "attention_input" else "attention_input"
        texts = reference_texts(p.model, reference=p.reference)
        ids = reference_ids(run.tokenizer, texts, n_samples=PAPER_SAMPLES, n_positions=longest)
        means = mean_head_outputs(run.model, ids, average=other, batch_size=4)
        return {p.average: run.mean_head_outputs(), other: means}

    @functools.lru_cache(maxsize=1)
    def removals_of(group: CellGroup) -> Removals:
        means, prompts = both_means(), prompts_of(group)
        return Removals(
            run.model, run.tokenizer, prompts, heads, random, means["attention_input"],
            means["head_output"], p.categories,
        )  # fmt: skip

    def compute(group: CellGroup, kind: str, draws: Sequence[int]) -> list[dict[str, Any]]:
        of = removals_of(group)
        targets = [prompt.target for prompt in of.prompts]
        if kind == "none":
            return [_packed(judged(score_prompts(of.model, of.tokenizer, of.prompts), targets))]
        return [_packed(judged(of.scores(kind, draw), targets)) for draw in draws]

    for group in tqdm(_abstract(run), desc="kinds of removal", unit="task", leave=False):
        for kind in ("none", *KINDS):
            draws = range(_DRAWS if kind == "resample" or "random" in kind else 1)
            of = [kind, len(draws), *_decided(run, group), heads, random, p.categories]
            answers = run.measurement("kinds of removal", of, compute, group, kind, draws)
            rows += [
                {"task": group.task, "kind": kind, "draw": draw, **_summed(_unpacked(of_draw))}
                for draw, of_draw in enumerate(answers)
            ]
    return pd.DataFrame(rows)


def _decided(run: Any, group: CellGroup) -> list[Any]:
    return [group.spec(), group.seed, run.plan.means_parameters()]


def attention_moved(run: Any) -> pd.DataFrame:
    """Measure where the attention goes that the knockout blocks, a row a task.

    Columns as of :func:`icl_helpers.analysis.removals.blocked_attention`, in percent of all
    attention of the heads at tokens from which something is blocked.
    """
    rows = {}
    heads, categories = run.induction_heads(), run.parameters.categories

    def compute(group: CellGroup) -> dict[str, float]:
        prompts = prompts_of(group)
        contexts = [prompt.context for prompt in prompts]
        patterns = induction_patterns(contexts, run.tokenizer, categories=categories)
        return blocked_attention(run.model, run.tokenizer, prompts, heads, patterns)

    for group in _abstract(run):
        of = [group.spec(), group.seed, heads, categories]
        rows[group.task] = run.measurement("blocked attention", of, compute, group)
    return 100 * pd.DataFrame.from_dict(rows, orient="index")


def side_effects(run: Any) -> pd.DataFrame:
    """Measure what else the removal of the run's induction heads breaks, beside random sets.

    A row a measure, task, condition and draw: ``measure`` is loss (nats a token) on the first or
    later copies of random tokens, or on text read once or again, or margin (nats) without
    examples, with them, and with their labels shuffled; ``condition`` none, highest or random;
    ``values`` those of single sequences or documents, ``value`` their mean.
    """
    heads = run.induction_heads()
    sets = [ChosenHeads((), "none"), ChosenHeads(tuple(heads), "highest")]
    sets += [ChosenHeads(s, "random", n) for n, s in enumerate(_random_sets(run, _DRAWS))]

    def shuffled(group: CellGroup, heads: Sequence[Head]) -> dict[str, Any]:
        prompts = [shuffled_labels(prompt, seed=group.seed) for prompt in prompts_of(group)]
        edits = _ablation(run, heads)
        scores = score_prompts(run.model, run.tokenizer, prompts, lambda number: edits)
        return _packed(judged(scores, [prompt.target for prompt in prompts]))

    rows = []
    for chosen in tqdm(sets, desc="loss on sequences", unit="set", leave=False):
        of = ["losses", run.plan.means_parameters(), chosen.heads, _TEXTS, _TEXT_TOKENS]
        losses = run.measurement("losses", of, _losses, run, chosen.heads)
        rows += [(name, "", chosen.chosen_by, chosen.draw, each) for name, each in losses.items()]
    conditions = tuple(mean_ablated(run, [chosen.heads for chosen in sets]))
    for group in _abstract(run):
        bare = replace(group, shots=0)
        for measure, shown in (("margin without examples", bare), ("margin with examples", group)):
            by_set = measured_answers(run, measure, replace(shown, conditions=conditions))
            rows += [
                (measure, group.task, chosen.chosen_by, chosen.draw, answers.margins)
                for chosen, answers in zip(sets, by_set, strict=True)
            ]
        measure = "margin with shuffled labels"
        for chosen in sets:
            of = [*_decided(run, group), chosen.heads]
            margins = run.measurement(measure, of, shuffled, group, chosen.heads)["margins"]
            rows.append((measure, group.task, chosen.chosen_by, chosen.draw, margins))
    names = ["measure", "task", "condition", "draw", "values"]
    frame = pd.DataFrame(rows, columns=names).astype({"draw": "Int64"})
    frame["values"] = [np.array(values, dtype=np.float64) for values in frame["values"]]
    return frame.assign(value=frame["values"].map(np.nanmean))


def _ablation(run: Any, heads: Sequence[Head]) -> list[Intervention]:
    return [MeanAblation(heads, run.mean_head_outputs())] if heads else []


def _losses(run: Any, heads: Sequence[Head]) -> dict[str, list[float]]:
    """Mean loss of each random sequence and text, when it comes first and when it comes again."""
    p = run.parameters
    sequences = random_sequences(run.tokenizer)
    ids, start = repeated_ids(run.model, sequences)
    texts = reference_texts(p.model, reference=p.reference)
    once = reference_ids(run.tokenizer, texts, n_samples=_TEXTS, n_positions=_TEXT_TOKENS)
    of_each: dict[str, list[float]] = {}
    length = sequences.shape[1]
    for names, tokens, first in (
        (("loss on random tokens", "loss on their copies"), ids, start + length),
        (("loss on text", "loss on text read again"), once.repeat(1, 2), _TEXT_TOKENS),
    ):
        # The means may end before the sequences do.
        reach = tokens[:, : run.mean_head_outputs().shape[1]]
        losses = sequence_losses(run.model, reach, _ablation(run, heads))
        # A first token cannot be known from what came before it, nor the first of a copy.
        for name, part in zip(names, (losses[:, : first - 1], losses[:, first:]), strict=True):
            of_each[name] = part.mean(1).tolist()
    return of_each
