"""Which heads, how many, how removed (stage 9): tables and what came out, every sentence by rule.

The paper removes two numbers of heads, by one score, in three ways. Here each of these choices is
varied. What the stage expected was written down before it was measured, and stays.

Example
-------
>>> run = icl.run_at("runs/icl-tiny")
>>> Markdown(what_came_out(run))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from icl_helpers.analysis.bias import answer_table, at_most, skill_change
from icl_helpers.analysis.dose_response import permutation_p, rank_correlation, set_stability
from icl_helpers.analysis.measured import (
    dose_response,
    removal_kinds,
    shapley,
    side_effects,
    single_heads,
)
from icl_helpers.attention.heads import Head, heads_in_words
from icl_helpers.book.came_out import measured_section, not_above_chance
from icl_helpers.evaluation.store import keyed
from icl_helpers.results.outcomes import CONDITION_NAMES, Said, listed, predicted, side
from icl_helpers.results.statistics import LEVEL, Interval, finite_interval
from icl_helpers.results.tables import bounds_in_words
from icl_helpers.tasks.specs import task_name, task_title

__all__ = [
    "bias_said", "dose_by_heads", "dose_said", "dose_table", "effects_said", "effects_table",
    "kinds_by_task", "kinds_said", "kinds_table", "losses_alone", "points_alt", "proxy_said",
    "proxy_table", "shapley_table", "stability_said", "stability_table", "what_came_out",
]  # fmt: skip

# Jaccard index from which on a set of heads is said to stay.
_STAYS = 0.9


def dose_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Sum up :func:`icl_helpers.analysis.measured.dose_response`, a row a task and number of heads.

    Columns: ``loss`` of mean margin in nats without the heads of highest score, with the bounds
    ``low`` and ``high`` over documents; ``lowest``, the loss without those of lowest score, and
    ``more low`` and ``more high``, bounds of how much more the highest cost on the same documents;
    the random sets' median loss and largest; how many sets, and how many there are; ``p`` by margin
    and ``p_accuracy``, the share of sets, the highest scores among them, that cost at least as
    much.
    """
    full = frame[frame["chosen_by"] == "none"].set_index("task")
    rows = []
    for (task, heads), dose in frame[frame["heads"] > 0].groupby(["task", "heads"], sort=False):
        whole, by_choice = full.loc[task], dose.set_index("chosen_by")
        highest, lowest = by_choice.loc["highest"], by_choice.loc["lowest"]
        draws = by_choice.loc[["random"]]
        loss = finite_interval(whole["margins"] - highest["margins"])
        more = finite_interval(lowest["margins"] - highest["margins"])
        fall, random = (
            {name: whole[name] - left[name] for name in ("margin", "accuracy")}
            for left in (highest, draws)
        )
        rows.append(
            {
                "task": task, "heads": heads, "loss": loss.mean, "low": loss.low,
                "high": loss.high, "accuracy": highest["accuracy"],
                "lowest": whole["margin"] - lowest["margin"],
                "more low": more.low, "more high": more.high,
                "random median": random["margin"].median(),
                "random largest": random["margin"].max(), "random sets": len(draws),
                "distinct sets": draws["distinct"].iloc[0],
                "p": permutation_p(fall["margin"], list(random["margin"])),
                "p_accuracy": permutation_p(fall["accuracy"], list(random["accuracy"])),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def dose_by_heads(table: pd.DataFrame) -> pd.DataFrame:
    """Lay out :func:`dose_table` for a page: a row a task and number of heads."""
    bounds = bounds_in_words(table["low"], table["high"], "{:+.1f}")
    loss = table["loss"].map("{:+.1f}".format) + bounds
    medians = table["random median"].map("{:+.1f}".format)
    shown = {
        "without the highest scores": loss,
        "without the lowest": table["lowest"].map("{:+.1f}".format),
        "random sets, median and most": medians + table["random largest"].map(", {:+.1f}".format),
        "p (sets)": table["p"].map("{:.2f}".format) + table["random sets"].map(" ({})".format),
    }
    index = [table["task"].map(task_name), table["heads"]]
    return pd.DataFrame(shown).set_axis(pd.MultiIndex.from_arrays(index, names=["task", "heads"]))


def dose_said(table: pd.DataFrame, removed: int) -> Said:
    """Say from how many heads on the highest scores cost more than every random set.

    And whether those do that a run removes, at most ``removed``; and more than those of lowest
    score.
    """
    said = []
    random: dict[str, tuple[int, str]] = {}
    lowest: dict[str, tuple[int, str]] = {}
    for task, part in table.groupby("task", sort=False):
        counts = list(part.loc[(part["p"] <= 1 - LEVEL) & (part["low"] > 0), "heads"])
        every = counts == list(part["heads"])[-len(counts) :]
        when = (
            "with no number of heads removed" if not counts
            else f"with {counts[0]} or more heads removed" if every and len(counts) > 1
            else f"with {listed([str(count) for count in counts])} heads removed"
        )  # fmt: skip
        largest = part.iloc[-1]
        sets = part.loc[part["heads"].isin(counts), "random sets"].min()
        rivals = "random sets of the same layers"
        rivals = f"{sets} {rivals} (p = 1/{sets + 1}, uncorrected)" if counts else rivals
        said.append(
            f"{task_title(str(task))}: {when} the heads of highest score cost more margin than all "
            f"{rivals} and than nothing. {largest['heads']} heads cost {largest['loss']:+.1f} nats "
            f"({largest['low']:+.1f} to {largest['high']:+.1f}), the random sets at most "
            f"{largest['random largest']:+.1f}, the {largest['heads']} of lowest score, which may "
            f"lie in other layers, {largest['lowest']:+.1f}."
        )
        row = part[part["heads"] <= removed].iloc[-1]
        sign = 1 if row["heads"] in counts else -1 if row["loss"] <= row["random median"] else 0
        random[str(task)] = sign, f"p = {row['p']:.2f}, {row['loss']:+.1f} nats"
        lowest[str(task)] = (
            side(row["more low"], row["more high"]),
            f"{row['loss']:+.1f} and {row['lowest']:+.1f} nats, difference {row['more low']:+.1f} "
            f"to {row['more high']:+.1f}",
        )
    heads = int(table.loc[table["heads"] <= removed, "heads"].max())
    best, worst = (f"{heads} {it}" if heads > 1 else it for it in ("highest", "lowest"))
    claim = f"Without the {best} score{'s'[: heads - 1]} more margin is lost than without"
    return said, [
        predicted(f"{claim} any of the random sets", random),
        predicted(f"{claim} the {worst}, in whatever layers", lowest),
    ]


def proxy_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Correlate heads' scores with what each alone costs, a row a task.

    ``frame`` is :func:`icl_helpers.analysis.measured.single_heads`. Columns: Spearman's correlation
    with its bounds over documents, and the score's rank of the head that costs most.
    """
    rows = {}
    for task, part in frame.groupby("task", sort=False):
        whole = part.loc[part["chosen_by"] == "none", "margins"].item()
        alone = part[part["chosen_by"] == "alone"]
        effects = np.stack([whole - margins for margins in alone["margins"]])
        effects = effects[:, np.isfinite(effects).all(axis=0)]
        scores = alone["score"].to_numpy(np.float64)
        correlation, low, high = rank_correlation(scores, effects)
        worst = int(effects.mean(axis=1).argmax())
        rows[task] = {
            "correlation": correlation, "low": low, "high": high,
            "costs most": str(Head(*alone[["layer", "head"]].iloc[worst].astype(int))),
            "nats": effects.mean(axis=1).max(),
            "rank by score": int((scores > scores[worst]).sum()) + 1,
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("task")


def proxy_said(table: pd.DataFrame, worth: pd.DataFrame) -> Said:
    """Say how far the score tells what a head's removal costs, alone and beside others.

    ``worth`` is :func:`icl_helpers.analysis.measured.shapley`.
    """
    said, tasks = [], {}
    for task, row in table.iterrows():
        bounds = f"{row['low']:+.2f} to {row['high']:+.2f}"
        said.append(
            f"{task_title(str(task))}: Spearman's correlation of score and loss "
            f"{row['correlation']:+.2f} ({bounds}); head {row['costs most']} costs most, "
            f"{row['nats']:+.1f} nats, and has rank {row['rank by score']} by score."
        )
        why = f"rank correlation {bounds}"
        tasks[str(task)] = side(row["low"], row["high"]), why
    if len(worth):
        correlation = worth["score"].corr(worth["value"], method="spearman")
        best = [set(worth.nlargest(10, column).index) for column in ("value", "score")]
        said.append(
            f"{task_title(worth['task'].iloc[0])}: Spearman's correlation of score and Shapley "
            f"value {correlation:+.2f}; of the ten heads worth most, {len(best[0] & best[1])} are "
            f"among the ten of highest score."
        )
    claim = "A head with a higher score costs more when it alone is removed"
    return said, [predicted(claim, tasks)]


def losses_alone(frame: pd.DataFrame) -> pd.DataFrame:
    """Return what each head's removal alone costs: task, layer, head, score, ``loss`` (nats)."""
    whole = frame[frame["chosen_by"] == "none"].set_index("task")["margin"]
    alone = frame[frame["chosen_by"] == "alone"].astype({"layer": int, "head": int})
    loss = alone["task"].map(whole) - alone["margin"]
    return alone[["task", "score", "layer", "head"]].assign(loss=loss)


def points_alt(points: pd.DataFrame) -> str:
    """Write the alternative text of a figure of :func:`losses_alone`: each task's five largest."""
    most = points.sort_values("loss", ascending=False, kind="stable").groupby("task").head(5)
    said = []
    for task in points["task"].unique():
        heads = [
            f"{row.layer}.{row.head} {row.loss:+.2f} at score {row.score:.2f}"
            for row in most[most["task"] == task].itertuples()
        ]
        said.append(f"{task_name(task)}: {', '.join(heads)}")
    return f"Points of margin lost over score. The heads that cost most: {'; '.join(said)}."


def shapley_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Select the ten heads of highest Shapley value, with their score and its rank.

    ``frame`` is :func:`icl_helpers.analysis.measured.shapley`.
    """
    ranks = frame["score"].rank(ascending=False, method="min").astype(int)
    best = frame.assign(**{"rank by score": ranks}).nlargest(10, "value")
    names = best["layer"].astype(str) + "." + best["head"].astype(str)
    return best.set_index(pd.Index(names, name="head"))[["value", "score", "rank by score"]]


def stability_table(scores: Any, fractions: Sequence[float], n_heads: int) -> pd.DataFrame:
    """Say how much of each set stays when other sequences are drawn, a row a number of heads."""
    names = pd.Index([heads_in_words(fraction, n_heads) for fraction in fractions], name="heads")
    stays = [set_stability(scores, fraction) for fraction in fractions]
    return pd.DataFrame(stays, index=names, columns=["mean", "low", "high"])


def stability_said(table: pd.DataFrame) -> Said:
    """Say how much of each set stays, and whether it is much the same in the mean of the draws."""
    said = [
        f"{heads}: {row['mean']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        for heads, row in table.iterrows()
    ]
    stays = {
        str(heads): (1 if mean >= _STAYS else -1, f"{mean:.2f}")
        for heads, mean in table["mean"].items()
    }
    claim = f"The index is {_STAYS} or more, in the mean of the draws"
    return (
        [f"Jaccard index of the set with sets from sequences drawn again: {'; '.join(said)}."],
        [predicted(claim, stays, of="sets")],
    )


_PAPER = (
    "The paper removes 1 % and 3 % of the heads by their score, beside three random draws of as "
    "many in the same layers."
)


def what_came_out(run: Any) -> str:
    """Say what came out of the stage, as Markdown; ``run`` is an :class:`icl_helpers.Run`.

    Of an imported run whose bundle lacks a measurement it says that in its place.
    """
    parts = [
        lambda: dose_said(dose_table(dose_response(run)), len(run.induction_heads())),
        lambda: proxy_said(proxy_table(single_heads(run)), shapley(run)),
        lambda: kinds_said(kinds_table(removal_kinds(run))),
        lambda: effects_said(effects_table(side_effects(run))),
        lambda: bias_said(at_most(run.documents().query("ablation != 'zero'"))),
        lambda: stability_said(
            stability_table(run.prefix_scores(), run.plan.fractions, run.n_heads)
        ),
    ]
    tasks = [prompts.task for prompts in run.plan.analysis_sets()]
    number = len(tasks)
    sure = (
        f"At most {run.parameters.analysis_limit} documents "
        f"{f'of each of {number} tasks' if number > 1 else 'of one task'} and one demonstration "
        f"seed: intervals are over documents alone, and other demonstrations are not tried here."
    )
    return measured_section([_PAPER], parts, [sure, *not_above_chance(run, tasks)])


# What each kind of removal is held against, by the column that says so.
_HEADS, _POSITIONS = "more than in random heads", "more than at random positions"
_CONTROLS = {
    "zero": {_HEADS: "zero, random heads"},
    "mean of inputs": {_HEADS: "mean of inputs, random heads"},
    "mean of outputs": {_HEADS: "mean of inputs, random heads"},
    "resample": {_HEADS: "mean of inputs, random heads"},
    "knockout": {_HEADS: "knockout, random heads", _POSITIONS: "knockout, random positions"},
}


def kinds_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Sum up :func:`icl_helpers.analysis.measured.removal_kinds`, a row a task and kind of removal.

    Columns: ``loss`` of margin (nats) with the bounds over documents, draws averaged; accuracy;
    ``costs``: whether that interval lies above zero; and the same of the difference to each control
    of the kind, on the same documents.
    """
    rows = []
    for task, part in frame.groupby("task", sort=False):
        margins = {
            str(kind): np.stack(list(drawn)).mean(axis=0)
            for kind, drawn in part.groupby("kind", sort=False)["margins"]
        }
        accuracy = part.groupby("kind")["accuracy"].mean()
        whole = margins.pop("none")
        for kind, left in margins.items():
            loss = finite_interval(whole - left)
            costs = {
                column: _costs(finite_interval(margins[control] - left))
                for column, control in _CONTROLS.get(kind, {}).items()
            }
            rows.append(
                {
                    "task": task, "kind": kind, "loss": loss.mean, "low": loss.low,
                    "high": loss.high, "accuracy": accuracy[kind], "costs": _costs(loss),
                    _HEADS: "", _POSITIONS: "", **costs,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


_SIGNS = {"yes": 1, "less": -1, "not decided": 0}


def _costs(loss: Interval) -> str:
    return next(word for word, sign in _SIGNS.items() if sign == side(loss.low, loss.high))


def kinds_by_task(table: pd.DataFrame) -> pd.DataFrame:
    """Lay out :func:`kinds_table` as conclusion by kind of removal, a column a task."""
    bounds = bounds_in_words(table["low"], table["high"], "{:+.1f}")
    said = table["loss"].map("{:+.1f}".format) + bounds
    for column in (_HEADS, _POSITIONS):
        said += (f"; {column}: " + table[column]).where(table[column] != "", "")
    wide = table.assign(said=said).pivot(index="kind", columns="task", values="said")
    return wide.loc[table["kind"].unique(), table["task"].unique()].rename_axis(columns=None)


def kinds_said(table: pd.DataFrame) -> Said:
    """Say what each kind of removal costs, and whether the knockout does more than its controls."""
    said = []
    every: dict[str, tuple[int, str]] = {}
    controls: dict[str, dict[str, tuple[int, str]]] = {_POSITIONS: {}, _HEADS: {}}
    for task, part in table.groupby("task", sort=False):
        rows = part.set_index("kind")
        each = [f"{kind} {loss:+.1f}" for kind, loss in rows["loss"].items()]
        said.append(
            f"{task_title(str(task))}, nats of margin lost by kind of removal: {'; '.join(each)}."
        )
        kinds = rows.loc[list(_CONTROLS)]
        other = [
            f"{kind} {loss:+.1f} nats"
            for kind, loss in kinds.loc[kinds["costs"] != "yes", "loss"].items()
        ]
        least = min(map(_SIGNS.__getitem__, kinds["costs"]))
        every[str(task)] = least, listed(other) if other else ""
        for column, tasks in controls.items():
            control = rows.loc[_CONTROLS["knockout"][column], "loss"]
            why = f"{rows.loc['knockout', 'loss']:+.1f} nats, control {control:+.1f}"
            tasks[str(task)] = _SIGNS[rows.loc["knockout", column]], why
    return said, [
        predicted("Every kind of removal costs margin", every),
        *(
            predicted(f"Blocking the pattern costs {column}", controls[column])
            for column in controls
        ),
    ]


_TRUE, _SHUFFLED, _GAP = (
    "margin with examples", "margin with shuffled labels", "true minus shuffled labels",
)  # fmt: skip


def effects_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Sum up :func:`icl_helpers.analysis.measured.side_effects`, a row a measure and task.

    Columns: value of the full model, change without the run's heads with the bounds over sequences
    or documents, and the smallest and largest change without the random sets; and the ``gap``
    between true and shuffled labels as a measure of its own.
    """
    keys = ["task", "condition", "draw"]
    true, shuffled = (frame[frame["measure"] == measure] for measure in (_TRUE, _SHUFFLED))
    both = true.merge(shuffled, on=keys, suffixes=("", "_shuffled"))
    gap = both[keys].assign(measure=_GAP, values=both["values"] - both["values_shuffled"])
    rows = []
    measures = pd.concat([frame, gap]).groupby(["measure", "task"], sort=False)
    for (measure, task), part in measures:
        values = part.set_index("condition")["values"]
        whole = values["none"]
        change = finite_interval(values["highest"] - whole)
        random = [float(np.nanmean(drawn - whole)) for drawn in values[["random"]]]
        rows.append(
            {
                "measure": measure, "task": task, "full model": float(np.nanmean(whole)),
                "change": change.mean, "low": change.low, "high": change.high,
                "random smallest": min(random), "random largest": max(random),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def effects_said(table: pd.DataFrame) -> Said:
    """Say how much losses and gaps change, and whether removal breaks copying and labels alone.

    The margins that the gaps are made of stand in the table.
    """
    said: dict[str, list[str]] = {}
    changes: dict[str, dict[str, tuple[dict[Any, Any], str]]] = {}
    for row in table.to_dict("records"):
        measure, task = row["measure"], row["task"]
        random = f"{row['random smallest']:+.2f} to {row['random largest']:+.2f}"
        if not measure.startswith("margin"):
            said.setdefault(measure, []).append(
                f"{task_name(task) + ' ' if task else ''}{row['full model']:.2f} nats, "
                f"{row['change']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f}) without the "
                f"heads, {random} without random sets"
            )
        why = f"{row['change']:+.2f}, random sets {random}"
        changes.setdefault(measure, {})[task or measure] = row, why

    def check(claim: str, sign: Callable[[Any], int], *measures: str, of: str = "tasks") -> str:
        rows = [item for measure in measures for item in changes.get(measure, {}).items()]
        return predicted(claim, {name: (sign(row), why) for name, (row, why) in rows}, of=of)

    lines = [
        f"{measure[:1].upper() + measure[1:]}: {'; '.join(parts)}."
        for measure, parts in said.items()
    ]
    return lines, [
        check("Tokens seen for the first time are predicted as well as without random sets",
              _as_random, "loss on random tokens", "loss on text", of="kinds of text"),
        check("Copies are predicted worse than without any random set",
              lambda row: side(row["low"], row["high"], row["random largest"]),
              "loss on their copies", "loss on text read again", of="kinds of text"),
        check(f"The margin without examples moves by less than {_STILL} nats",
              lambda row: int(max(-row["low"], row["high"]) < _STILL)
              - int(row["low"] > _STILL or row["high"] < -_STILL), "margin without examples"),
        check("The gap between true and shuffled labels shrinks",
              lambda row: -side(row["low"], row["high"]), _GAP),
    ]  # fmt: skip


# A margin that moves by less, in nats, is said not to move.
_STILL = 0.5


def _as_random(row: Mapping[str, Any]) -> int:
    """1 for a change between none and those of random sets, -1 for one wholly outside, or 0."""
    least, most = min(0.0, row["random smallest"]), max(0.0, row["random largest"])
    outside = row["low"] > most or row["high"] < least
    return int(least <= round(row["change"], 2) <= most) - int(outside)


# Points by which one label has to be said more often for the bias to be said to grow.
_MORE_BIAS = 10


def bias_said(documents: pd.DataFrame) -> Said:
    """Say of each task whether removal and knockout take skill, add bias, or turn it around.

    ``documents`` has one number of examples and of heads, and one kind of ablation.
    """
    keys = ["task", "labels", "condition"]
    cells = dict(iter(keyed(documents).groupby(keys, sort=False)))
    answers = answer_table(documents).drop_duplicates(keys).set_index(keys)
    said: list[str] = []
    tasks: dict[str, tuple[int, str]] = {}
    for task, labels, condition in cells:
        full = cells.get((task, labels, "full"))
        if condition not in ("induction_heads", "induction_pattern") or full is None:
            continue
        change = skill_change(full, cells[task, labels, condition])
        if change is None:
            continue
        drawn = cells.get((task, labels, "random_heads"), full.iloc[:0])
        drawn = drawn[drawn["control"] == "strict"]
        beside = ""
        if condition == "induction_heads" and len(drawn) and (it := skill_change(full, drawn)):
            beside = f"; {it.measure} {it.after:.0f} without random heads (strict)"
        whole, left = answers.loc[(task, labels, "full")], answers.loc[(task, labels, condition)]
        more = left["share"] - whole["share"]
        said.append(
            f"{task_title(str(task))}, {CONDITION_NAMES[condition]}: accuracy "
            f"{whole['accuracy']:.0f} to {left['accuracy']:.0f} %, balanced "
            f"{whole['balanced']:.0f} to {left['balanced']:.0f} %; one label is said to "
            f"{left['share']:.0f} % of the documents ({more:+.0f} points); {change.in_words}"
            f"{', and the bias grows' if more >= _MORE_BIAS else ''}{beside}."
        )
        if condition == "induction_heads" and change.before_low > change.chance:
            why = f"{change.measure} {change.before:.0f} to {change.after:.0f}"
            tasks[str(task)] = int(change.lost) - int(change.turned), why
    claim = "Without the heads the model is less able to tell the labels apart, whatever its bias"
    return said, [predicted(claim, tasks)] if tasks else []
