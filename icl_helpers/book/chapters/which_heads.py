"""Which heads, how many, how removed (stage 9): tables and what came out, every sentence by rule.

The paper removes two numbers of heads, by one score, in three ways. Here each of these choices is
varied. What the stage expected was written down before it was measured, and stays.

Example
-------
>>> run = icl.run_at("runs/icl-tiny")
>>> Markdown(what_came_out(run))
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from icl_helpers.analysis.bias import answer_table, at_most
from icl_helpers.analysis.dose_response import permutation_p, rank_correlation, set_stability
from icl_helpers.analysis.measured import (
    dose_response,
    removal_kinds,
    shapley,
    side_effects,
    single_heads,
)
from icl_helpers.attention.heads import Head, heads_in_words
from icl_helpers.book.came_out import measured_section
from icl_helpers.results.outcomes import listed, predicted, task_name, verdict
from icl_helpers.results.statistics import LEVEL, Interval, finite_interval
from icl_helpers.tasks.specs import get_task_spec

__all__ = [
    "bias_sentences", "bias_verdict", "dose_sentences", "dose_table",
    "dose_verdict", "effects_sentences", "effects_table", "effects_verdicts", "kinds_by_task",
    "kinds_sentences", "kinds_table", "kinds_verdicts", "losses_alone", "points_alt",
    "proxy_sentences", "proxy_table", "proxy_verdict", "shapley_table", "stability_sentence",
    "stability_table", "stability_verdict", "what_came_out",
]  # fmt: skip

# Jaccard index from which on a set of heads is said to stay.
_STAYS = 0.9


def dose_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Sum up :func:`icl_helpers.analysis.measured.dose_response`, a row a task and number of heads.

    Columns: ``loss`` of mean margin in nats without the heads of highest score, with the bounds
    ``low`` and ``high`` over documents; ``lowest``, the loss without those of lowest score; the
    random sets' median loss and largest; how many sets, and how many there are; ``p`` by margin and
    ``p_accuracy``, the share of sets, the highest scores among them, that cost at least as much.
    """
    rows = []
    for task, part in frame.groupby("task", sort=False):
        whole = part[part["chosen_by"] == "none"].iloc[0]
        for heads, dose in part[part["heads"] > 0].groupby("heads"):
            highest, lowest = (
                dose[dose["chosen_by"] == way].iloc[0] for way in ("highest", "lowest")
            )
            draws = dose[dose["chosen_by"] == "random"]
            loss = finite_interval(whole["margins"] - highest["margins"])
            random = whole["margin"] - draws["margin"]
            fell = whole["accuracy"] - draws["accuracy"]
            rows.append(
                {
                    "task": task, "heads": heads, "loss": loss.mean, "low": loss.low,
                    "high": loss.high, "accuracy": highest["accuracy"],
                    "lowest": whole["margin"] - lowest["margin"],
                    "random median": random.median(), "random largest": random.max(),
                    "random sets": len(draws), "distinct sets": draws["distinct"].iloc[0],
                    "p": permutation_p(whole["margin"] - highest["margin"], list(random)),
                    "p_accuracy": permutation_p(
                        whole["accuracy"] - highest["accuracy"], list(fell)
                    ),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def dose_sentences(table: pd.DataFrame) -> list[str]:
    """Say of each task from how many heads on the highest scores cost more than random sets."""
    said = []
    for task, part in table.groupby("task", sort=False):
        found = part[(part["p"] <= 1 - LEVEL) & (part["low"] > 0)]
        largest = part.iloc[-1]
        ends = (
            f"{largest['heads']} heads cost {largest['loss']:+.1f} nats "
            f"({largest['low']:+.1f} to {largest['high']:+.1f}), random sets at most "
            f"{largest['random largest']:+.1f}, the {largest['heads']} of lowest score, which may "
            f"lie in other layers, {largest['lowest']:+.1f}"
        )
        counts = list(found["heads"])
        every = counts == list(part["heads"])[-len(counts) :]
        first = (
            "with no number of heads removed" if not counts
            else f"with {counts[0]} heads removed or more" if every and len(counts) > 1
            else f"with {listed([str(count) for count in counts])} heads removed"
        )  # fmt: skip
        said.append(
            f"{_name(task)}: {first} do the highest scores cost distinguishably more margin than "
            f"random sets of the same layers; {ends}."
        )
    return said


def _name(task: Any) -> str:
    name = task_name(str(task))
    return name[:1].upper() + name[1:]


def proxy_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Correlate heads' scores with what each alone costs, a row a task.

    ``frame`` is :func:`icl_helpers.analysis.measured.single_heads`. Columns: Spearman's correlation
    with its bounds over documents, and the score's rank of the head that costs most.
    """
    rows = {}
    for task, part in frame.groupby("task", sort=False):
        whole = part[part["chosen_by"] == "none"].iloc[0]
        alone = part[part["chosen_by"] == "alone"]
        effects = np.stack([whole["margins"] - margins for margins in alone["margins"]])
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


def proxy_sentences(table: pd.DataFrame) -> list[str]:
    """Say of each task how far the score tells what a head's removal costs."""
    return [
        f"{_name(task)}: Spearman's correlation of score and loss {row['correlation']:+.2f} "
        f"({row['low']:+.2f} to {row['high']:+.2f}); head {row['costs most']} costs most, "
        f"{row['nats']:+.1f} nats, and has rank {row['rank by score']} by score."
        for task, row in table.iterrows()
    ]


def losses_alone(frame: pd.DataFrame) -> pd.DataFrame:
    """Margin that each head's removal alone costs: task, layer, head, score and ``loss`` (nats)."""
    whole = frame[frame["chosen_by"] == "none"].set_index("task")["margin"]
    alone = frame[frame["chosen_by"] == "alone"]
    loss = alone["task"].map(whole) - alone["margin"]
    places = {name: alone[name].astype(int) for name in ("layer", "head")}
    return alone[["task", "score"]].assign(**places, loss=loss)


def points_alt(points: pd.DataFrame) -> str:
    """Write the alternative text of a figure of :func:`losses_alone`: each task's five largest."""
    said = []
    for task, part in points.groupby("task", sort=False):
        most = part.sort_values("loss", ascending=False, kind="stable").head(5)
        heads = [
            f"{row.layer}.{row.head} {row.loss:+.2f} at score {row.score:.2f}"
            for row in most.itertuples()
        ]
        said.append(f"{task_name(str(task))}: {', '.join(heads)}")
    return f"Points of margin lost over score. The heads that cost most: {'; '.join(said)}."


def shapley_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The ten heads of highest Shapley value, with their score and its rank.

    ``frame`` is :func:`icl_helpers.analysis.measured.shapley`.
    """
    ranks = frame["score"].rank(ascending=False, method="min").astype(int)
    best = frame.assign(**{"rank by score": ranks}).nlargest(10, "value")
    names = best["layer"].astype(str) + "." + best["head"].astype(str)
    return best.set_index(pd.Index(names, name="head"))[["value", "score", "rank by score"]]


def shapley_sentence(frame: pd.DataFrame) -> str:
    """Say how far the score tells what a head is worth in all companies."""
    correlation = frame["score"].corr(frame["value"], method="spearman")
    best = set(frame.nlargest(10, "value").index) & set(frame.nlargest(10, "score").index)
    return (
        f"{_name(frame['task'].iloc[0])}: Spearman's correlation of score and Shapley value "
        f"{correlation:+.2f}; of the ten heads worth most, {len(best)} are among the ten of "
        f"highest score."
    )


def stability_table(scores: Any, fractions: Sequence[float], n_heads: int) -> pd.DataFrame:
    """Say how much of each set stays when other sequences are drawn, a row a number of heads."""
    rows = {
        heads_in_words(fraction, n_heads): dict(
            zip(("mean", "low", "high"), set_stability(scores, fraction), strict=True)
        )
        for fraction in fractions
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("heads")


def stability_sentence(table: pd.DataFrame) -> str:
    """Say how much of each set stays."""
    said = [
        f"{heads}: {row['mean']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        for heads, row in table.iterrows()
    ]
    return f"Jaccard index of the set with sets from sequences drawn again: {'; '.join(said)}."


def stability_verdict(table: pd.DataFrame) -> str:
    """Say whether the sets stay much the same, in the mean of the draws."""
    held = [bool(mean >= _STAYS) for mean in table["mean"]]
    return (
        f"*The index is {_STAYS} or more, in the mean of the draws*: "
        f"**{verdict(held, [True])}**, for {sum(held)} of {len(table)} sets."
    )


def what_came_out(run: Any) -> str:
    """Say what came out of the stage, as Markdown; ``run`` is an :class:`icl_helpers.Run`.

    Of an imported run whose bundle lacks a measurement it says that in its place.
    """
    sure = [
        f"At most {run.parameters.analysis_limit} documents of each of "
        f"{len(run.plan.analysis_sets())} tasks and one demonstration seed: intervals are over "
        f"documents alone, and other demonstrations are not tried here."
    ]
    parts = (_dose_part, _proxy_part, _kinds_part, _effects_part, _bias_part, _stability_part)
    return measured_section([_PAPER], [functools.partial(part, run) for part in parts], sure)


_PAPER = (
    "The paper removes 1 % and 3 % of the heads by their score, beside three random draws of as "
    "many in the same layers."
)


def _dose_part(run: Any) -> tuple[list[str], list[str]]:
    table = dose_table(dose_response(run))
    return dose_sentences(table), [dose_verdict(table, len(run.induction_heads()))]


def dose_verdict(table: pd.DataFrame, removed: int) -> str:
    """Say whether the heads that a run removes cost more than every random set."""
    tasks = {}
    for task, part in table.groupby("task", sort=False):
        row = part[part["heads"] <= removed].iloc[-1]
        held = row["p"] <= 1 - LEVEL and row["low"] > 0
        tasks[str(task)] = bool(held), f"p = {row['p']:.2f}, {row['loss']:+.1f} nats"
    heads = int(table.loc[table["heads"] <= removed, "heads"].max())
    return predicted(f"Without the {heads} highest scores more margin is lost than without any of "
                   f"the random sets", tasks)  # fmt: skip


def _proxy_part(run: Any) -> tuple[list[str], list[str]]:
    table = proxy_table(single_heads(run))
    values = shapley(run)
    worth = [shapley_sentence(values)] if len(values) else []
    return [*proxy_sentences(table), *worth], [proxy_verdict(table)]


def proxy_verdict(table: pd.DataFrame) -> str:
    """Say whether scores and losses of single heads go together."""
    tasks = {
        str(task): (bool(row["low"] > 0), f"{row['low']:+.2f} to {row['high']:+.2f}")
        for task, row in table.iterrows()
    }
    return predicted("A head with a higher score costs more when it alone is removed", tasks)


def _stability_part(run: Any) -> tuple[list[str], list[str]]:
    table = stability_table(run.prefix_scores(), run.plan.fractions, run.n_heads)
    return [stability_sentence(table)], [stability_verdict(table)]


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
            kind: np.stack(list(drawn["margins"])).mean(axis=0)
            for kind, drawn in part.groupby("kind", sort=False)
        }
        accuracy = part.groupby("kind")["accuracy"].mean()
        whole = margins.pop("none")
        for kind, own in margins.items():
            loss = finite_interval(whole - own)
            row = {
                "task": task, "kind": kind, "loss": loss.mean, "low": loss.low, "high": loss.high,
                "accuracy": accuracy[kind], "costs": _costs(loss), _HEADS: "", _POSITIONS: "",
            }  # fmt: skip
            for column, control in _CONTROLS.get(str(kind), {}).items():
                row[column] = _costs(finite_interval(margins[control] - own))
            rows.append(row)
    return pd.DataFrame(rows)


def _costs(loss: Interval) -> str:
    return "yes" if loss.low > 0 else "less" if loss.high < 0 else "not decided"


def kinds_by_task(table: pd.DataFrame) -> pd.DataFrame:
    """Lay out :func:`kinds_table` as conclusion by kind of removal, a column a task."""
    bounds = table["low"].map(" [{:+.1f}, ".format) + table["high"].map("{:+.1f}]".format)
    said = table["loss"].map("{:+.1f}".format) + bounds
    for column in (_HEADS, _POSITIONS):
        known = table[column] != ""
        said += (f"; {column}: " + table[column]).where(known, "")
    wide = table.assign(said=said).pivot(index="kind", columns="task", values="said")
    return wide.loc[table["kind"].unique(), table["task"].unique()].rename_axis(columns=None)


def kinds_verdicts(table: pd.DataFrame) -> list[str]:
    """Say whether every kind of removal costs margin, and the knockout more than its controls."""
    every: dict[str, tuple[bool, str]] = {}
    controls: dict[str, dict[str, tuple[bool, str]]] = {_POSITIONS: {}, _HEADS: {}}
    for task, part in table.groupby("task", sort=False):
        rows = part.set_index("kind")
        kinds = rows.loc[list(_CONTROLS)]
        other = [f"{kind} {loss:+.1f} nats" for kind, loss in
                 kinds.loc[kinds["costs"] != "yes", "loss"].items()]  # fmt: skip
        every[str(task)] = not other, listed(other) if other else ""
        for column, verdicts in controls.items():
            control = rows.loc[_CONTROLS["knockout"][column], "loss"]
            why = f"{rows.loc['knockout', 'loss']:+.1f} nats, control {control:+.1f}"
            verdicts[str(task)] = rows.loc["knockout", column] == "yes", why
    return [
        predicted("Every kind of removal costs margin", every),
        *(predicted(f"Blocking the pattern costs {column}", verdicts)
          for column, verdicts in controls.items()),
    ]  # fmt: skip


def kinds_sentences(table: pd.DataFrame) -> list[str]:
    """Say of each task what each kind of removal costs."""
    said = []
    for task, part in table.groupby("task", sort=False):
        rows = part.set_index("kind")
        each = [f"{kind} {rows.loc[kind, 'loss']:+.1f}" for kind in rows.index]
        said.append(f"{_name(task)}, nats of margin lost by kind of removal: {'; '.join(each)}.")
    return said


def _kinds_part(run: Any) -> tuple[list[str], list[str]]:
    table = kinds_table(removal_kinds(run))
    return kinds_sentences(table), kinds_verdicts(table)


def effects_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Sum up :func:`icl_helpers.analysis.measured.side_effects`, a row a measure and task.

    Columns: value of the full model, change without the run's heads with the bounds over sequences
    or documents, and the smallest and largest change without the random sets; and the ``gap``
    between true and shuffled labels as a measure of its own.
    """
    rows = []
    for (measure, task), part in _with_gap(frame).groupby(["measure", "task"], sort=False):
        values = {key: one["values"].iloc[0] for key, one in
                  part.groupby(["condition", part["draw"].fillna(-1)], sort=False)}  # fmt: skip
        whole = values[("none", -1)]
        change = finite_interval(values[("highest", -1)] - whole)
        random = [float(np.nanmean(one - whole)) for (way, _), one in values.items()
                  if way == "random"]  # fmt: skip
        rows.append(
            {
                "measure": measure, "task": task, "full model": float(np.nanmean(whole)),
                "change": change.mean, "low": change.low, "high": change.high,
                "random smallest": min(random), "random largest": max(random),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


_TRUE, _SHUFFLED, _GAP = (
    "margin with examples", "margin with shuffled labels", "true minus shuffled labels",
)  # fmt: skip


def _with_gap(frame: pd.DataFrame) -> pd.DataFrame:
    """Add the gap between true and shuffled labels, document by document."""
    keys = ["task", "condition", "draw"]
    true, shuffled = (
        frame[frame["measure"] == measure].reset_index(drop=True) for measure in (_TRUE, _SHUFFLED)
    )
    both = true.merge(shuffled, on=keys, suffixes=("", "_shuffled"))
    gap = both[keys].assign(measure=_GAP, values=both["values"] - both["values_shuffled"])
    return pd.concat([frame, gap], ignore_index=True)


def effects_verdicts(table: pd.DataFrame) -> list[str]:
    """Say whether the removal breaks copying and the use of labels, and nothing else."""
    changes = {(row["measure"], row["task"]): row for row in table.to_dict("records")}

    def check(measure: str, holds: Callable[[Any], bool]) -> dict[str, tuple[bool, str]]:
        return {
            task or measure: (bool(holds(row)), f"{row['change']:+.2f}, random sets "
                              f"{row['random smallest']:+.2f} to {row['random largest']:+.2f}")
            for (name, task), row in changes.items() if name == measure
        }  # fmt: skip

    return [
        predicted("Tokens seen for the first time are predicted as well as without random sets",
                check("loss on random tokens", lambda row: row["low"] <= row["random largest"])
                | check("loss on text", lambda row: row["low"] <= row["random largest"]),
                of="kinds of text"),
        predicted("Copies are predicted worse than without any random set",
                check("loss on their copies", lambda row: row["low"] > row["random largest"])
                | check("loss on text read again", lambda row: row["low"] > row["random largest"]),
                of="kinds of text"),
        predicted("The margin without examples does not move",
                check("margin without examples", lambda row: row["low"] <= 0 <= row["high"])),
        predicted("The gap between true and shuffled labels shrinks",
                check(_GAP, lambda row: row["high"] < 0)),
    ]  # fmt: skip


def effects_sentences(table: pd.DataFrame) -> list[str]:
    """Say how much each measure changes without the heads."""
    return [
        f"{row['measure'][:1].upper() + row['measure'][1:]}"
        f"{', ' + task_name(row['task']) if row['task'] else ''}: {row['full model']:.2f} nats, "
        f"{row['change']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f}) without the heads, "
        f"{row['random smallest']:+.2f} to {row['random largest']:+.2f} without random sets."
        for row in table.to_dict("records")
    ]


def _effects_part(run: Any) -> tuple[list[str], list[str]]:
    table = effects_table(side_effects(run))
    return effects_sentences(table), effects_verdicts(table)


def _skill(row: Mapping[str, Any]) -> tuple[str, float, float, float, float]:
    """What tells skill from bias, with bounds and chance: the AUC where there are two labels."""
    name = "calibrated" if np.isnan(row["auc"]) else "auc"
    chance = 50.0 if name == "auc" else 100 / len(get_task_spec(row["task"]).choices)
    return name, row[name], row[f"{name}_low"], row[f"{name}_high"], chance


def bias_sentences(table: pd.DataFrame) -> list[str]:
    """Say of each task whether the removal takes skill, adds bias, or turns the skill around."""
    said = []
    for whole, removed in _pairs(table):
        name, skill, low, high, chance = _skill(removed)
        _, before, *_ = _skill(whole)
        what = (
            "there was no skill to lose" if _skill(whole)[2] <= chance
            else "the labels are still told apart, and turned around" if high < chance
            else "no skill is left that these documents show" if low <= chance
            else "skill is lost" if high < _skill(whole)[2]
            else "no loss of skill is distinguishable"
        )  # fmt: skip
        more = removed["share"] - whole["share"]
        said.append(
            f"{_name(removed['task'])}: accuracy {whole['accuracy']:.0f} to "
            f"{removed['accuracy']:.0f} %, balanced {whole['balanced']:.0f} to "
            f"{removed['balanced']:.0f} %, {_MEASURES[name]} {before:.0f} to {skill:.0f} "
            f"({low:.0f} to {high:.0f}); one label is said to {removed['share']:.0f} % of the "
            f"documents ({more:+.0f} points): {what}"
            f"{', and the bias grows' if more >= _MORE_BIAS else ''}."
        )
    return said


_MEASURES = {"auc": "AUC", "calibrated": "calibrated accuracy"}
# Points by which one label has to be said more often for the bias to be said to grow.
_MORE_BIAS = 10


def _pairs(table: pd.DataFrame) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    """Each task's row of the full model and of the induction heads' removal."""
    rows = {(row["task"], row["labels"], row["condition"]): row for row in table.to_dict("records")}
    return [
        (rows[task, labels, "full"], row)
        for (task, labels, condition), row in rows.items()
        if condition == "induction_heads" and (task, labels, "full") in rows
    ]


def bias_verdict(table: pd.DataFrame) -> str:
    """Say whether the removal takes skill away on each task."""
    tasks = {}
    for whole, removed in _pairs(table):
        name, skill, _, high, _ = _skill(removed)
        why = f"{_MEASURES[name]} {_skill(whole)[1]:.0f} to {skill:.0f}"
        tasks[str(removed["task"])] = bool(high < _skill(whole)[2]), why
    return predicted("Without the heads the model is less able to tell the labels apart, whatever "
                   "its bias", tasks)  # fmt: skip


def _bias_part(run: Any) -> tuple[list[str], list[str]]:
    documents = run.documents()
    table = answer_table(at_most(documents[documents["ablation"].isin(["none", "mean"])]))
    return bias_sentences(table), [bias_verdict(table)]
