"""Figures of the book. Each function returns a matplotlib figure and draws nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl_helpers.attention.heads import Head
from icl_helpers.results.tables import accuracy_means

__all__ = [
    "accuracy_bars",
    "accuracy_lines",
    "attention_over_prompt",
    "bar_rows",
    "bars_alt",
    "benefit_alt",
    "benefit_bars",
    "benefit_rows",
    "intervention_lines",
    "loss_lines",
    "ranked_heads",
    "score_heatmap",
    "score_lines",
]


_COLOURS = {
    "full": "#444444",
    "induction_heads": "#b2182b",
    "induction_pattern": "#ef8a62",
    "random_heads": "#2166ac",
}


def score_heatmap(
    values: Float[torch.Tensor, "layers heads"], *, label: str, upper: float | None = 1.0
) -> Figure:
    """Heatmap layers x heads, layer 0 at the bottom (paper, Figures 2 and 8)."""
    n_layers, n_heads = values.shape
    figure, axes = plt.subplots(
        figsize=(min(10, 2.2 + 0.28 * n_heads), min(9, 1.6 + 0.28 * n_layers)), layout="constrained"
    )
    sns.heatmap(
        values.numpy(), vmin=0, vmax=upper, cmap="rocket_r", ax=axes, cbar_kws={"label": label},
        linewidths=0.4 if n_layers * n_heads <= 256 else 0,
    )  # fmt: skip
    axes.invert_yaxis()
    axes.set(xlabel="head", ylabel="layer")
    axes.tick_params(rotation=0)
    return _finished(figure)


def ranked_heads(scores: Float[torch.Tensor, "layers heads"], *, counts: Sequence[int]) -> Figure:
    """All heads by score, highest first, with the head counts that are removed marked."""
    ordered = scores.flatten().sort(descending=True).values.numpy()
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    axes.plot(np.arange(1, len(ordered) + 1), ordered, marker="o", markersize=3, color="#444444")
    for count, style in zip(sorted(counts), itertools.cycle(("--", "-.", ":")), strict=False):
        colour = _COLOURS["induction_heads"]
        axes.axvline(count + 0.5, color=colour, linestyle=style, linewidth=1, label=f"top {count}")
    axes.legend(loc="upper right", frameon=False)
    axes.axhline(0.3, color="#999999", linewidth=0.8)
    axes.set(xlabel="rank of the head", ylabel="prefix-matching score", ylim=(0, 1))
    return _finished(figure)


def bar_rows(
    results: pd.DataFrame, *, ablations: Sequence[str], shots: str = "most"
) -> pd.DataFrame:
    """The rows that :func:`accuracy_bars` draws: one number of shots, the larger fraction."""
    rows = results[results["ablation"].isin(["none", *ablations])]
    largest = rows[rows["fraction"] > 0]["fraction"].max()
    rows = rows[(rows["fraction"] == 0) | (rows["fraction"] == largest)]
    picked = rows.groupby("task")["shots"].transform("max" if shots == "most" else "min")
    return rows[rows["shots"] == picked]


def accuracy_bars(
    results: pd.DataFrame, *, ablations: Sequence[str], shots: str = "most"
) -> Figure:
    """Accuracy per task under each condition at the larger fraction; lines span the runs' range.

    ``shots`` is ``"most"`` (each task's largest number) or ``"none"`` (zero-shot). Results with
    several sets of labels get a panel each.
    """
    rows = bar_rows(results, ablations=ablations, shots=shots)
    panels = list(dict.fromkeys(rows["labels"]))
    figure, grid = plt.subplots(
        max(1, len(panels)), 1, figsize=(9, 0.8 + 3 * max(1, len(panels))), layout="constrained",
        sharex=True, squeeze=False,
    )  # fmt: skip
    for axes, labels in zip(grid[:, 0], panels, strict=False):
        _draw_bars(axes, rows[rows["labels"] == labels])
        if len(panels) > 1:
            axes.set_title(f"{labels} labels", loc="left", fontsize="medium")
    if panels:
        handles, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(_title(rows), fontsize="medium")
    else:
        grid[0, 0].text(0.5, 0.5, "nothing was evaluated", ha="center")
    return _finished(figure)


def _draw_bars(axes: Axes, rows: pd.DataFrame) -> None:
    means = accuracy_means(rows)
    tasks = list(dict.fromkeys(means["task"]))
    names = [name for name in _COLOURS if name in set(means["condition"])]
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        part = means[means["condition"] == name].set_index("task").reindex(tasks)
        runs = rows[rows["condition"] == name].groupby("task")["accuracy"]
        low, high = runs.min().reindex(tasks) * 100, runs.max().reindex(tasks) * 100
        centre = np.arange(len(tasks)) + (index - (len(names) - 1) / 2) * width
        spread = np.clip([part["accuracy"] - low, high - part["accuracy"]], 0, None)
        axes.bar(
            centre, part["accuracy"], width, yerr=spread, color=_COLOURS[name],
            label=name.replace("_", " "), error_kw={"linewidth": 1},
        )  # fmt: skip
    axes.axhline(50, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(tasks)), [task.replace("_", "\n", 1) for task in tasks])
    axes.set(ylabel="accuracy (%)", ylim=(0, 105))


def _title(rows: pd.DataFrame) -> str:
    """Number of examples and share of heads that the rows are about."""
    shots = sorted(set(rows["shots"]))
    share = rows["fraction"].max()
    heads = f", {share:.1%} of the heads" if share else ""
    return f"{' or '.join(map(str, shots))} examples{heads}"


def bars_alt(results: pd.DataFrame, *, ablations: Sequence[str], shots: str = "most") -> str:
    """Alternative text of :func:`accuracy_bars`: its title and every bar's height in percent."""
    rows = bar_rows(results, ablations=ablations, shots=shots)
    if rows.empty:
        return "Empty figure: nothing was evaluated."
    parts = []
    for (task, labels), group in accuracy_means(rows).groupby(["task", "labels"], sort=False):
        bars = (
            f"{str(r['condition']).replace('_', ' ')} {r['accuracy']:.0f}"
            for r in group.to_dict("records")
        )
        kind = f" with {labels} labels" if rows["labels"].nunique() > 1 else ""
        parts.append(f"{str(task).replace('_', ' ')}{kind}: {', '.join(bars)}")
    return f"Bars of accuracy in percent, {_title(rows)}. {'; '.join(parts)}."


def benefit_bars(changes: pd.DataFrame, *, ablation: str) -> Figure:
    """Relative change of the benefit of examples under an ablation (paper, Figures 4 and 9).

    ``changes`` comes from :func:`icl_helpers.results.statistics.benefit_changes`. A panel per
    fraction of heads; lines are 95 % intervals, cut at the edges of the panel. Tasks that are left
    out have no bars.
    """
    rows = benefit_rows(changes, ablation=ablation)
    if rows.empty:
        figure, axes = plt.subplots(figsize=(9, 2), layout="constrained")
        axes.text(0.5, 0.5, "no task has a benefit to lose", ha="center")
        return _finished(figure)
    fractions = sorted(set(rows["fraction"]))
    tasks = list(dict.fromkeys(rows["name"]))
    figure, grid = plt.subplots(
        len(fractions), 1, figsize=(9, 0.8 + 2.6 * len(fractions)), layout="constrained",
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    for axes, fraction in zip(grid[:, 0], fractions, strict=True):
        for index, name in enumerate(("induction_heads", "random_heads")):
            part = rows[(rows["fraction"] == fraction) & (rows["condition"] == name)]
            part = part.set_index("name").reindex(tasks)
            heights = part["relative_change"]
            spread = np.clip([heights - part["low"], part["high"] - heights], 0, None)
            axes.bar(
                np.arange(len(tasks)) + (index - 0.5) * 0.38, heights, 0.38, yerr=spread,
                color=_COLOURS[name], label=name.replace("_", " "), error_kw={"linewidth": 1},
            )  # fmt: skip
        axes.axhline(0, color="#444444", linewidth=0.8)
        axes.set_title(f"{fraction:.1%} of the heads", loc="left", fontsize="medium")
        axes.set(ylabel="change of benefit (%)", ylim=(-160, 60))
        axes.set_xticks(range(len(tasks)), [task.replace("_", "\n", 1) for task in tasks])
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(_benefit_title(rows, ablation), fontsize="medium")
    return _finished(figure)


def benefit_rows(changes: pd.DataFrame, *, ablation: str) -> pd.DataFrame:
    """The rows that :func:`benefit_bars` draws, with the ``name`` of task and labels."""
    rows = changes[(changes["ablation"] == ablation) & changes["relative_change"].notna()]
    several = changes.groupby("task")["labels"].transform("nunique").reindex(rows.index) > 1
    return rows.assign(name=rows["task"].where(~several, rows["task"] + " " + rows["labels"]))


def _benefit_title(rows: pd.DataFrame, ablation: str) -> str:
    shots = " or ".join(map(str, sorted(set(rows["shots"]))))
    return f"Accuracy gained by {shots} examples: relative change under {ablation} ablation"


def benefit_alt(changes: pd.DataFrame, *, ablation: str) -> str:
    """Alternative text of :func:`benefit_bars`: its title and every bar's height in percent."""
    rows = benefit_rows(changes, ablation=ablation)
    if rows.empty:
        return "Empty figure: no task has a benefit to lose."
    parts = [
        f"{str(name).replace('_', ' ')}: "
        + ", ".join(
            f"{str(r['condition']).replace('_', ' ')} at {r['fraction']:.1%} "
            f"{r['relative_change']:+.0f}"
            for r in group.to_dict("records")
        )
        for name, group in rows.groupby("name", sort=False)
    ]
    return f"Bars, in percent. {_benefit_title(rows, ablation)}. {'; '.join(parts)}."


def attention_over_prompt(
    attention: Float[torch.Tensor, "heads tokens"], tokens: Sequence[str], heads: Sequence[Head]
) -> Figure:
    """Attention of a few heads from one position over a prompt (paper, Figures 6 and 7)."""
    shown = [token.replace("\n", "\\n") for token in tokens]
    figure, axes = plt.subplots(
        figsize=(min(16, 2 + 0.16 * len(shown)), 1.4 + 0.45 * len(heads)), layout="constrained"
    )
    sns.heatmap(
        attention.numpy(), vmin=0, vmax=1, cmap="rocket_r", ax=axes, cbar_kws={"label": "attention"}
    )
    axes.set_xticks(np.arange(len(shown)) + 0.5, shown, rotation=90, fontsize=7)
    axes.set_yticks(np.arange(len(heads)) + 0.5, [str(head) for head in heads], rotation=0)
    axes.set(ylabel="layer.head")
    return _finished(figure)


def _finished(figure: Figure) -> Figure:
    # A closed figure is shown once, where its cell returns it, and not again by the notebook.
    plt.close(figure)
    return figure


_INDUCTION, _OTHER, _CONTROL = "#b2182b", "#bbbbbb", "#2166ac"
_TASK_COLOURS = ("#1b7837", "#762a83", "#e08214", "#2166ac", "#b2182b")
_MARKERS = ("o", "s", "^", "D", "v")


def score_lines(frame: pd.DataFrame, *, phases: Sequence[int], threshold: float) -> Figure:
    """Prefix-matching score of every head over training steps.

    ``frame`` is that of :func:`synthetic.training.measure.measure_training` for one training seed;
    ``phases`` holds the steps at which a phase of training begins, the first left out.
    """
    scores = frame[frame["measure"] == "prefix_score"]
    wide = scores.pivot(index="step", columns=["layer", "head"], values="value")
    figure, axes = _axes(phases)
    chosen = wide.columns[wide.iloc[-1] >= threshold]
    axes.plot(wide.index, wide.drop(columns=chosen), color=_OTHER, linewidth=0.8)
    axes.plot(wide.index, wide[chosen], color=_INDUCTION, marker="o", markersize=2.5)
    axes.axhline(threshold, color="#999999", linewidth=0.8)
    axes.set(ylabel="prefix-matching score", ylim=(-0.02, 1.02))
    return _closed(figure)


def loss_lines(frame: pd.DataFrame, *, phases: Sequence[int]) -> Figure:
    """Loss in the first and in the last copy of repeated random sequences over training steps."""
    figure, axes = _axes(phases)
    for measure, label, style in (
        ("loss_first_copy", "first copy", {"color": "#444444", "linestyle": "--"}),
        ("loss_last_copy", "last copy", {"color": _INDUCTION, "marker": "o", "markersize": 2.5}),
    ):
        part = frame[frame["measure"] == measure].sort_values("step")
        axes.plot(part["step"], part["value"], label=label, **style)
    axes.set(ylabel="loss (nats per token)", ylim=(0, None))
    axes.legend(frameon=False)
    return _closed(figure)


def accuracy_lines(frame: pd.DataFrame, *, phases: Sequence[int]) -> Figure:
    """Few-shot accuracy of every task over training steps, in percent."""
    figure, axes = _axes(phases)
    rows = frame[frame["measure"] == "accuracy"]
    for index, (task, part) in enumerate(rows.groupby("task", sort=False)):
        part = part.sort_values("step")
        axes.plot(
            part["step"], 100 * part["value"], label=str(task).replace("_", " "), linewidth=1.2,
            color=_TASK_COLOURS[index % 5], marker=_MARKERS[index % 5], markersize=3.5,
        )  # fmt: skip
    return _percent(figure, axes)


def intervention_lines(frame: pd.DataFrame, *, phases: Sequence[int]) -> Figure:
    """Accuracy, averaged over the tasks, with and without heads over training steps, in percent."""
    figure, axes = _axes(phases)
    for measure, label, colour, marker in (
        ("accuracy", "full model", "#444444", "o"),
        ("accuracy_without_random_heads", "without random heads", _CONTROL, "s"),
        ("accuracy_without_induction_heads", "without induction heads", _INDUCTION, "^"),
    ):
        mean = frame[frame["measure"] == measure].groupby("step")["value"].mean()
        axes.plot(mean.index, 100 * mean, label=label, color=colour, marker=marker, markersize=3.5)
    return _percent(figure, axes)


def _axes(phases: Sequence[int]) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for step in phases:
        axes.axvline(step, color="#999999", linestyle=":", linewidth=1)
    axes.set(xlabel="training step")
    return figure, axes


def _percent(figure: Figure, axes: Axes) -> Figure:
    axes.axhline(50, color="#999999", linewidth=0.8, linestyle=":")
    axes.set(ylabel="accuracy (%)", ylim=(0, 105))
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.28), frameon=False)
    return _closed(figure)


def _closed(figure: Figure) -> Figure:
    # A closed figure is shown once, where its cell returns it, and not again by the notebook.
    plt.close(figure)
    return figure
