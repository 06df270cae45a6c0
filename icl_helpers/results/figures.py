"""Figures of the book, and alternative texts of those with bars. A figure draws nothing else.

Every figure has a second drawing for the screen of a phone, ``narrow``, with the same content.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl_helpers.attention.heads import Head, heads_in_words
from icl_helpers.evaluation.store import CELL, keyed
from icl_helpers.tasks.specs import chance_level, task_name

__all__ = [
    "accuracy_bars", "accuracy_lines", "attention_over_prompt", "bars_alt", "benefit_alt",
    "benefit_bars", "dose_alt", "dose_lines", "effect_points", "heatmap_alt", "intervention_lines",
    "loss_lines", "margin_alt", "margin_bars", "named_conditions", "ranked_heads", "rise_lines",
    "score_heatmap", "score_lines",
]  # fmt: skip

# Inches: what a phone shows at its own size.
_NARROW = 4.0

_FULL, _INDUCTION, _RANDOM, _OTHER, _GUIDE = "#444444", "#b2182b", "#2166ac", "#bbbbbb", "#999999"
# In the order of the bars; the controls other than the paper's are hatched as well.
_COLOURS = {
    "full": (_FULL, ""), "induction heads": (_INDUCTION, ""), "induction pattern": ("#ef8a62", ""),
    "random heads": (_RANDOM, ""), "random heads, strict": ("#7fbf7b", "///"),
    "random heads, any layer": ("#af8dc3", "..."),
}  # fmt: skip
_TASK_STYLES = (
    ("#1b7837", "o"), ("#762a83", "s"), ("#e08214", "^"), (_RANDOM, "D"), (_INDUCTION, "v"),
)  # fmt: skip
_NOTHING_EVALUATED, _NO_BENEFIT = "nothing was evaluated", "no task has a benefit to lose"


def _new_figure(width: float, height: float, rows: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure of so many inches, with its axes from top to bottom."""
    figure, grid = plt.subplots(
        rows, figsize=(width, height), layout="constrained", sharex=True, squeeze=False
    )
    return figure, grid[:, 0]


def _closed(figure: Figure) -> Figure:
    # A closed figure is shown once, where its cell returns it, and not again by the notebook.
    plt.close(figure)
    return figure


def score_heatmap(
    values: Float[torch.Tensor, "layers heads"], *, label: str, upper: float | None = 1.0,
    narrow: bool = False,
) -> Figure:  # fmt: skip
    """Draw a heatmap layers x heads, layer 0 at the bottom (paper, Figures 2 and 8)."""
    layers, heads = values.shape
    width = _NARROW if narrow else min(10, 2.2 + 0.28 * heads)
    figure, (axes,) = _new_figure(width, min(9, 1.6 + 0.28 * layers))
    sns.heatmap(
        values.numpy(), vmin=0, vmax=upper, cmap="rocket_r", ax=axes, cbar_kws={"label": label},
        linewidths=0.4 if layers * heads <= 256 else 0,
    )  # fmt: skip
    axes.invert_yaxis()
    axes.set(xlabel="head", ylabel="layer")
    axes.tick_params(rotation=0)
    return _closed(figure)


def heatmap_alt(values: Float[torch.Tensor, "layers heads"], *, label: str) -> str:
    """Write the alternative text of :func:`score_heatmap`: its size, range and five highest."""
    layers, heads = values.shape
    scores, ranks = values.flatten().sort(descending=True, stable=True)
    named = ", ".join(
        f"layer {index // heads} head {index % heads} {score:.3g}"
        for score, index in zip(scores[:5], ranks[:5].tolist(), strict=True)
    )
    return (
        f"Heatmap of the {label}, {layers} layers by {heads} heads, from {values.min():.3g} to "
        f"{values.max():.3g}. Highest: {named}."
    )


def ranked_heads(
    scores: Float[torch.Tensor, "layers heads"], *, counts: Sequence[int], narrow: bool = False
) -> Figure:
    """Draw all heads by score, highest first, with the head counts that are removed marked."""
    ordered = scores.flatten().sort(descending=True).values.numpy()
    figure, (axes,) = _new_figure(_NARROW if narrow else 7, 3)
    axes.plot(np.arange(1, len(ordered) + 1), ordered, marker="o", markersize=3, color=_FULL)
    for count, style in zip(sorted(counts), itertools.cycle(("--", "-.", ":")), strict=False):
        label = f"top {count} of {len(ordered):,}"
        axes.axvline(count + 0.5, color=_INDUCTION, linestyle=style, linewidth=1, label=label)
    axes.legend(loc="upper right", frameon=False)
    axes.axhline(0.3, color=_GUIDE, linewidth=0.8)
    axes.set(xlabel="rank of the head", ylabel="prefix-matching score", ylim=(0, 1))
    return _closed(figure)


def attention_over_prompt(
    attention: Float[torch.Tensor, "heads tokens"], tokens: Sequence[str], heads: Sequence[Head],
    *, narrow: bool = False,
) -> Figure:  # fmt: skip
    """Draw attention of a few heads from one position over a prompt (paper, Figures 6 and 7).

    A narrow drawing has the tokens below each other.
    """
    shown = [token.replace("\n", "\\n") for token in tokens]
    names = [str(head) for head in heads]
    length, breadth = min(16, 2 + 0.16 * len(shown)), 1.4 + 0.45 * len(heads)
    figure, (axes,) = _new_figure(*((_NARROW, length) if narrow else (length, breadth)))
    sns.heatmap(
        (attention.T if narrow else attention).numpy(), vmin=0, vmax=1, cmap="rocket_r", ax=axes,
        cbar_kws={"label": "attention"},
    )  # fmt: skip
    along, across = axes.set_xticks, axes.set_yticks
    if narrow:
        along, across = across, along
    along(np.arange(len(shown)) + 0.5, shown, rotation=0 if narrow else 90, fontsize=7)
    across(np.arange(len(heads)) + 0.5, names, rotation=0)
    (axes.set_xlabel if narrow else axes.set_ylabel)("layer.head")
    return _closed(figure)


def accuracy_bars(
    results: pd.DataFrame, *, ablations: Sequence[str], n_heads: int, shots: str = "most",
    narrow: bool = False,
) -> Figure:  # fmt: skip
    """Draw accuracy per task and condition with most heads removed; lines span the runs' range.

    ``n_heads`` is how many heads the model has; ``shots`` is ``"most"`` (each task's largest
    number) or ``"none"`` (zero-shot). Results with several sets of labels get a panel each.
    """
    bars, title = _accuracies(results, ablations, shots, n_heads)
    several = bars["labels"].nunique() > 1
    titles = {labels: f"{labels} labels" if several else "" for labels in bars["labels"]}
    label, limits = "accuracy (%)", (0, 105)
    return _bar_panels(bars, "labels", titles, label, limits, title=title, narrow=narrow)


def bars_alt(
    results: pd.DataFrame, *, ablations: Sequence[str], n_heads: int, shots: str = "most"
) -> str:
    """Write the alternative text of :func:`accuracy_bars`: title and every bar's height."""
    bars, title = _accuracies(results, ablations, shots, n_heads)
    if bars.empty:
        return f"Empty figure: {_NOTHING_EVALUATED}."
    several = bars["labels"].nunique() > 1
    names = bars["task"] + (" with " + bars["labels"] + " labels" if several else "")
    heights = bars["condition"] + bars["height"].map(" {:.0f}".format)
    return f"Bars of accuracy in percent, {title}. {_in_words(names, heights)}."


def _accuracies(
    results: pd.DataFrame, ablations: Sequence[str], shots: str, n_heads: int
) -> tuple[pd.DataFrame, str]:
    """Return bars (percent) at one number of shots and the larger fraction, and their title."""
    rows, title = _shown_rows(results, ablations, shots, n_heads)
    runs = keyed(rows).groupby(CELL, sort=False, dropna=False)["accuracy"]
    bars = (100 * runs.agg(height="mean", low="min", high="max")).reset_index()
    return named_conditions(bars.assign(chance=bars["task"].map(chance_level))), title


def _shown_rows(
    rows: pd.DataFrame, ablations: Sequence[str], shots: str, n_heads: int
) -> tuple[pd.DataFrame, str]:
    """Return the rows of one number of shots a task and the larger fraction, and their title."""
    rows = rows[rows["ablation"].isin(["none", *ablations])]
    share = rows["fraction"].max()
    rows = rows[(rows["fraction"] == share) | (rows["condition"] == "full")]
    task_shots = rows.groupby("task")["shots"].transform("max" if shots == "most" else "min")
    rows = rows[rows["shots"] == task_shots]
    heads = f", {heads_in_words(share, n_heads)}" if share > 0 else ""
    return rows, f"{_numbers(rows['shots'])} examples{heads}"


def margin_bars(
    documents: pd.DataFrame, *, ablations: Sequence[str], n_heads: int, narrow: bool = False
) -> Figure:
    """Draw the median margin of the right label per task and condition; lines span the quartiles.

    ``documents`` is :func:`icl_helpers.document_results`, with the most examples and the larger
    share of heads. Below zero, the wrong label leads on most documents.
    """
    bars, title = _margins(documents, ablations, n_heads)
    label = "margin of the right label (nats)"
    return _bar_panels(bars, "panel", {"": ""}, label, title=title, narrow=narrow)


def margin_alt(documents: pd.DataFrame, *, ablations: Sequence[str], n_heads: int) -> str:
    """Write the alternative text of :func:`margin_bars`: title and every bar's height."""
    bars, title = _margins(documents, ablations, n_heads)
    if bars.empty:
        return f"Empty figure: {_NOTHING_EVALUATED}."
    heights = bars["condition"] + bars["height"].map(" {:+.1f}".format)
    return f"Median margin in nats, {title}. {_in_words(bars['task'], heights)}."


def _margins(
    documents: pd.DataFrame, ablations: Sequence[str], n_heads: int
) -> tuple[pd.DataFrame, str]:
    """Return bars (nats) from quartile to quartile, and their title."""
    rows, title = _shown_rows(documents, ablations, "most", n_heads)
    margins = keyed(rows).groupby(CELL, sort=False, dropna=False)["margin"]
    bars = margins.quantile(np.array([0.25, 0.5, 0.75])).unstack()
    bars.columns = pd.Index(["low", "height", "high"])
    return named_conditions(bars.reset_index().assign(panel="")), title


def named_conditions(rows: pd.DataFrame) -> pd.DataFrame:
    """Name tasks and conditions as they are shown; a control where it is not the paper's."""
    control = rows["control"].map(lambda name: "" if name in ("", "published") else f", {name}")
    conditions = (rows["condition"] + control).str.replace("_", " ")
    return rows.assign(condition=conditions, task=rows["task"].map(task_name))


def benefit_bars(
    changes: pd.DataFrame, *, ablation: str, n_heads: int, narrow: bool = False
) -> Figure:
    """Draw the relative change of the benefit of examples under an ablation (Figures 4 and 9).

    ``changes`` comes from :func:`icl_helpers.results.statistics.benefit_changes`. A panel each
    number of heads; lines are 95 % intervals. Tasks that are left out have no bars.
    """
    bars, title = _changes(changes, ablation)
    titles = {share: heads_in_words(share, n_heads) for share in set(bars["fraction"])}
    ends = bars[["height", "low", "high"]]
    low, high = min(0.0, ends.min(axis=None)), max(0.0, ends.max(axis=None))
    limits = low - 0.05 * (high - low), high + 0.05 * (high - low)
    return _bar_panels(
        bars, "fraction", titles, "change of benefit (%)", limits, title=title, narrow=narrow,
        height=1.2 if bars.empty else 2.6, nothing=_NO_BENEFIT,
    )  # fmt: skip


def benefit_alt(changes: pd.DataFrame, *, ablation: str, n_heads: int) -> str:
    """Write the alternative text of :func:`benefit_bars`: title and every bar's height."""
    bars, title = _changes(changes, ablation)
    if bars.empty:
        return f"Empty figure: {_NO_BENEFIT}."
    heads = bars["fraction"].map(lambda share: heads_in_words(share, n_heads))
    heights = bars["condition"] + " at " + heads + bars["height"].map(" {:+.0f}".format)
    return f"Bars, in percent. {title}. {_in_words(bars['task'], heights)}."


def _changes(changes: pd.DataFrame, ablation: str) -> tuple[pd.DataFrame, str]:
    """Return bars (percent), with the labels in the name of a task that has several, and title."""
    rows = changes[(changes["ablation"] == ablation) & changes["relative_change"].notna()]
    several = changes.groupby("task")["labels"].transform("nunique")[rows.index] > 1
    title = f"Accuracy gained by {_numbers(rows['shots'])} examples: relative change under"
    bars = named_conditions(rows.assign(height=rows["relative_change"]))
    names = bars["task"].where(~several, bars["task"] + " " + rows["labels"])
    return bars.assign(task=names), f"{title} {ablation} ablation"


def _bar_panels(
    bars: pd.DataFrame, by: str, titles: Mapping[Any, str], label: str,
    limits: tuple[float, float] | None = None, *, title: str, narrow: bool, height: float = 3,
    nothing: str = _NOTHING_EVALUATED,
) -> Figure:  # fmt: skip
    """Draw bars with lines from ``low`` to ``high``, a panel each ``by``, or say ``nothing``.

    A dotted line marks each task's ``chance``, where the bars have one.
    """
    if bars.empty:
        figure, (axes,) = _new_figure(9, 0.8 + height)
        axes.text(0.5, 0.5, nothing, ha="center")
        return _closed(figure)
    panels = list(bars.groupby(by))
    tasks = list(dict.fromkeys(bars["task"]))
    conditions = [name for name in _COLOURS if name in set(bars["condition"])]
    width = 0.8 / len(conditions)
    if narrow:
        height = 0.6 + 0.16 * len(conditions) * len(tasks)
    figure, grid = _new_figure(
        _NARROW if narrow else 9, 0.8 + height * len(panels), rows=len(panels)
    )
    for axes, (key, panel) in zip(grid, panels, strict=True):
        for index, condition in enumerate(conditions):
            part = panel[panel["condition"] == condition].set_index("task").reindex(tasks)
            centres = np.arange(len(tasks)) + (index - (len(conditions) - 1) / 2) * width
            lines = [part["height"] - part["low"], part["high"] - part["height"]]
            colour, hatch = _COLOURS[condition]
            (axes.barh if narrow else axes.bar)(
                centres, part["height"], width, color=colour, hatch=hatch, edgecolor="white",
                linewidth=0, label=condition, error_kw={"linewidth": 1},
                **{"xerr" if narrow else "yerr": np.clip(lines, 0, None)},
            )  # fmt: skip
        axes.set_title(titles[key], loc="left", fontsize="medium")
        ticks = axes.set_yticks if narrow else axes.set_xticks
        letters = 16 if narrow else max(8, 84 // len(tasks))
        ticks(range(len(tasks)), [textwrap.fill(task, letters) for task in tasks])
        if narrow:
            axes.set_ylim(len(tasks) - 0.5, -0.5)
        if "chance" in panel:
            levels, left = panel.groupby("task")["chance"].first(), np.arange(len(tasks)) - 0.5
            across = axes.vlines if narrow else axes.hlines
            across(levels.reindex(tasks), left, left + 1, _GUIDE, ":", linewidth=0.8)
        _mark(axes, label, limits, along="x" if narrow else "y")
    _legend(figure, grid[0], "lower", 2 if narrow else 5)
    figure.suptitle(title, fontsize="medium", wrap=True)
    return _closed(figure)


def _in_words(names: pd.Series, heights: pd.Series) -> str:
    """Return "name: height, height; name: height", each name once."""
    by_name = heights.groupby(names, sort=False).agg(", ".join)
    return "; ".join(by_name.index + ": " + by_name)


def _numbers(shots: pd.Series) -> str:
    return " or ".join(map(str, sorted(set(shots))))


# How sets of heads were chosen, in the order of the lines: name, colour, marker.
_CHOSEN = {
    "highest": ("highest scores", _INDUCTION, "o"), "lowest": ("lowest scores", "#1b7837", "s"),
    "random": ("random draws, median and range", _RANDOM, "D"),
    "induction": ("induction heads", _INDUCTION, "o"),
    "function vectors": ("function-vector heads", "#762a83", "^"),
}  # fmt: skip


def dose_lines(frame: pd.DataFrame, *, narrow: bool = False) -> Figure:
    """Draw ``margin`` (nats) against the number of heads removed, a panel a task.

    ``frame`` is :func:`icl_helpers.analysis.measured.dose_response`.
    """
    tasks = list(frame.groupby("task", sort=False))
    figure, grid = _new_figure(_NARROW if narrow else 7, 0.9 + 2.1 * len(tasks), rows=len(tasks))
    for (task, part), axes in zip(tasks, grid, strict=True):
        whole, margins = _doses(part)
        axes.axhline(whole, color=_FULL, linestyle=":", linewidth=1, label="full model")
        for chosen_by, rows in margins.items():
            name, colour, marker = _CHOSEN[chosen_by]
            line = rows.median()
            axes.plot(line, color=colour, marker=marker, markersize=4, label=name)
            if chosen_by == "random":
                axes.fill_between(line.index, rows.min(), rows.max(), color=colour, alpha=0.2)
        counts = sorted(set(part["heads"]) - {0})
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_title(task_name(str(task)), loc="left", fontsize="medium")
        axes.set(ylabel="margin (nats)")
    grid[-1].set_xlabel("heads removed")
    _legend(figure, grid[0], "upper", 1 if narrow else 2)
    return _closed(figure)


def _doses(part: pd.DataFrame) -> tuple[float, dict[str, Any]]:
    """Return the full model's margin, and the margins by number of heads of each kind of sets."""
    by_choice = dict(list(part.groupby("chosen_by")))
    whole = by_choice["none"]["margin"].item()
    return whole, {
        name: by_choice[name].groupby("heads")["margin"] for name in _CHOSEN if name in by_choice
    }


def _legend(figure: Figure, axes: Axes, side: str, columns: int) -> None:
    """Put what one of the panels names beyond all of them."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc=f"outside {side} center", ncols=columns, frameon=False)


def dose_alt(frame: pd.DataFrame) -> str:
    """Write the alternative text of :func:`dose_lines`: every point of its lines."""
    said = []
    for task, part in frame.groupby("task", sort=False):
        whole, margins = _doses(part)
        lines = [f"full model {whole:.1f}"]
        for chosen_by, rows in margins.items():
            points = (f"{line:.1f} without {count}" for count, line in rows.median().items())
            lines.append(f"{_CHOSEN[chosen_by][0]} {', '.join(points)}")
        said.append(f"{task_name(str(task))}: {'; '.join(lines)}")
    return f"Lines of margin in nats over heads removed. {'. '.join(said)}."


def effect_points(frame: pd.DataFrame, *, value: str, label: str, narrow: bool = False) -> Figure:
    """Draw a value of each head against its prefix-matching score, a panel a task.

    ``frame`` has the columns task, score and ``value``.
    """
    tasks = list(frame.groupby("task", sort=False))
    figure, grid = _new_figure(_NARROW if narrow else 7, 0.5 + 2 * len(tasks), rows=len(tasks))
    for (task, part), axes in zip(tasks, grid, strict=True):
        axes.axhline(0, color=_GUIDE, linewidth=0.8)
        axes.plot(part["score"], part[value], "o", color=_FULL, markersize=3.5, alpha=0.7)
        axes.set_title(task_name(str(task)), loc="left", fontsize="medium")
        axes.set(ylabel=label)
    grid[-1].set(xlabel="prefix-matching score", xlim=(-0.02, 1.02))
    return _closed(figure)


def score_lines(
    frame: pd.DataFrame, *, phases: Sequence[int], threshold: float, narrow: bool = False
) -> Figure:
    """Draw the prefix-matching score of every head over training steps.

    ``frame`` is that of :func:`synthetic.training.measure.measure_training` for one training seed;
    ``phases`` holds the steps at which a phase of training begins, the first left out.
    """
    scores = frame[frame["measure"] == "prefix_score"]
    wide = scores.pivot(index="step", columns=["layer", "head"], values="value")
    figure, axes = _step_axes(phases, narrow)
    heads = wide.columns[wide.iloc[-1] >= threshold]
    axes.plot(wide.drop(columns=heads), color=_OTHER, linewidth=0.8)
    axes.plot(wide[heads], color=_INDUCTION, marker="o", markersize=2.5)
    axes.axhline(threshold, color=_GUIDE, linewidth=0.8)
    axes.set(ylabel="prefix-matching score", ylim=(-0.02, 1.02))
    return _closed(figure)


def rise_lines(counts: pd.DataFrame, *, threshold: float, narrow: bool = False) -> Figure:
    """Draw each model's highest score and share of heads at the threshold over training steps.

    ``counts`` is that of :func:`icl_helpers.results.comparison.count_induction_heads`; rows without
    a step, and the step 0, have no place on the axis and are left out.
    """
    figure, (highest, share) = _new_figure(_NARROW if narrow else 8, 5, rows=2)
    rows = counts[counts["step"].fillna(0) > 0]
    styles = itertools.cycle(_TASK_STYLES)
    for (name, part), (colour, marker) in zip(rows.groupby("model"), styles, strict=False):
        steps, percent = part["step"].astype(int), 100 * part["induction"] / part["heads"]
        for axes, values in ((highest, part["score"]), (share, percent)):
            axes.plot(steps, values, label=name, color=colour, marker=marker, markersize=3.5)
    highest.axhline(threshold, color=_GUIDE, linewidth=0.8)
    highest.set(ylabel="highest score", ylim=(0, 1.02), xscale="log")
    share.set(xlabel="training step", ylabel=f"heads at {threshold} or more (%)", ylim=(0, None))
    _legend(figure, share, "upper", 1 if narrow else 2)
    return _closed(figure)


def loss_lines(frame: pd.DataFrame, *, phases: Sequence[int], narrow: bool = False) -> Figure:
    """Draw the loss in the first and the last copy of repeated sequences over training steps."""
    figure, axes = _step_axes(phases, narrow)
    means = frame.groupby(["measure", "step"])["value"].mean()
    axes.plot(means["loss_first_copy"], label="first copy", color=_FULL, linestyle="--")
    last = means["loss_last_copy"]
    axes.plot(last, label="last copy", color=_INDUCTION, marker="o", markersize=2.5)
    axes.set(ylabel="loss (nats per token)", ylim=(0, None))
    axes.legend(frameon=False)
    return _closed(figure)


def accuracy_lines(frame: pd.DataFrame, *, phases: Sequence[int], narrow: bool = False) -> Figure:
    """Draw the few-shot accuracy of every task over training steps, in percent."""
    tasks = frame[frame["measure"] == "accuracy"].groupby("task", sort=False)
    lines = {task_name(str(task)): rows.groupby("step")["value"].mean() for task, rows in tasks}
    return _percent_lines(lines, _TASK_STYLES, phases, narrow)


def intervention_lines(
    frame: pd.DataFrame, *, phases: Sequence[int], narrow: bool = False
) -> Figure:
    """Draw accuracy, averaged over the tasks, with and without heads over training steps."""
    means = frame.groupby(["measure", "step"])["value"].mean()
    lines = {
        "full model": means["accuracy"],
        "without random heads": means["accuracy_without_random_heads"],
        "without induction heads": means["accuracy_without_induction_heads"],
    }
    styles = ((_FULL, "o"), (_RANDOM, "s"), (_INDUCTION, "^"))
    return _percent_lines(lines, styles, phases, narrow)


def _percent_lines(
    lines: Mapping[str, pd.Series], styles: Iterable[tuple[str, str]], phases: Sequence[int],
    narrow: bool,
) -> Figure:  # fmt: skip
    """Draw accuracies (shares by step) in percent, in cycles of colours and markers."""
    figure, axes = _step_axes(phases, narrow)
    for (name, line), (colour, marker) in zip(lines.items(), itertools.cycle(styles), strict=False):
        axes.plot(
            100 * line, label=name, color=colour, marker=marker, markersize=3.5, linewidth=1.3
        )
    _mark(axes, "accuracy (%)", (0, 105), 50)
    figure.legend(ncols=1 if narrow else 3, loc="outside upper center", frameon=False)
    return _closed(figure)


def _step_axes(phases: Sequence[int], narrow: bool) -> tuple[Figure, Axes]:
    figure, (axes,) = _new_figure(*((_NARROW, 4.2) if narrow else (8, 3.2)))
    for step in phases:
        axes.axvline(step, color=_GUIDE, linestyle=":", linewidth=1)
    axes.set(xlabel="training step")
    return figure, axes


def _mark(
    axes: Axes, label: str, limits: tuple[float, float] | None, mark: float = 0, *, along: str = "y"
) -> None:
    """Name and limit an axis, and mark zero on it, or chance for two labels."""
    style: dict[str, Any] = {"color": _GUIDE, "linestyle": ":"} if mark else {"color": _FULL}
    (axes.axhline if along == "y" else axes.axvline)(mark, linewidth=0.8, **style)
    axes.set(**{f"{along}label": label})
    if limits is not None:
        axes.set(**{f"{along}lim": limits})
