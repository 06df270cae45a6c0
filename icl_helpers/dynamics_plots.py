"""Figures of the training chapter. Each function returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["accuracy_lines", "intervention_lines", "loss_lines", "score_lines"]

_INDUCTION, _OTHER, _CONTROL = "#b2182b", "#bbbbbb", "#2166ac"
_TASK_COLOURS = ("#1b7837", "#762a83", "#e08214", "#2166ac", "#b2182b")
_MARKERS = ("o", "s", "^", "D", "v")


def score_lines(frame: pd.DataFrame, *, phases: Sequence[int], threshold: float) -> Figure:
    """Prefix-matching score of every head over training steps.

    ``frame`` is that of :func:`icl_helpers.dynamics.measure_training` for one training seed;
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
