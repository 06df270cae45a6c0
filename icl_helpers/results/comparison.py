"""The paper's published accuracies, and runs beside them and beside each other.

Example
-------
>>> published_table(1, "Llama-3-8B")
>>> compare_runs({"a": ("icl-tiny", results), "b": ("EleutherAI/pythia-410m", other_results)})
>>> overlay("meta-llama/Meta-Llama-3-8B", documents)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from icl_helpers.errors import InputError
from icl_helpers.evaluation.store import CELL, ROW
from icl_helpers.results.statistics import accuracy_intervals
from icl_helpers.results.tables import accuracy_means, cell_frame

__all__ = [
    "PAPER_MODELS",
    "compare_runs",
    "overlay",
    "published_accuracy",
    "published_name",
    "published_table",
]

# Published name of each of the paper's models, by the last part of its hub id.
PAPER_MODELS = {"meta-llama-3-8b": "Llama-3-8B", "internlm2-20b": "InternLM2-20B"}


def published_accuracy() -> pd.DataFrame:
    """Every published accuracy, in percent, one row each; columns as in ``published/README.md``."""
    return pd.read_csv(Path(__file__).parents[1] / "published" / "accuracy.csv")


def published_name(model: str) -> str | None:
    """The paper's name of a model, when it is one of the paper's two."""
    return PAPER_MODELS.get(model.lower().rstrip("/").split("/")[-1])


def published_table(number: int, model: str) -> pd.DataFrame:
    """A table as it was published for one of the paper's models, in the paper's layout.

    Rows are indexed by task, labels and shots, columns by condition and share of heads; a cell is
    the accuracy in percent and, in parentheses, its difference to the full model in points. Raises
    :class:`InputError` for another model.
    """
    published = published_accuracy()
    chosen = published[(published["table"] == number) & (published["model"] == model)]
    if chosen.empty:
        names = ", ".join(sorted(set(published["model"])))
        raise InputError(f"nothing is published for {model!r}; the paper's models are {names}")
    full = chosen[chosen["condition"] == "full"].set_index(ROW)["accuracy"]
    cells: dict[tuple[Any, ...], dict[tuple[str, float], str]] = {}
    for entry in chosen.to_dict("records"):
        key = tuple(entry[name] for name in ROW)
        cell = f"{entry['accuracy']:.1f}"
        if entry["condition"] != "full":
            cell += f" ({entry['accuracy'] - full[key]:+.1f})"
        cells.setdefault(key, {})[entry["condition"], float(entry["fraction"])] = cell
    return cell_frame(cells)


def compare_runs(runs: Mapping[str, tuple[str, pd.DataFrame]]) -> pd.DataFrame:
    """Accuracies of several runs, one row per run, task, labels, shots and condition.

    ``runs`` has, by its name, the model and the results of each run. Columns: run, model, task,
    labels, shots, condition, ablation, fraction (of the model's heads), share (``smaller`` or
    ``larger`` of the run's fractions, ``""`` for the full model), documents (of each task),
    accuracy (percent, averaged over seeds), change (points, to the full model of the same run; 0
    for that itself). Runs differ in which heads a fraction is, so compare by share rather than by
    fraction. Raises :class:`InputError` without runs.
    """
    if not runs:
        raise InputError("runs is empty; give at least one run")
    frames = [_accuracies(name, model, results) for name, (model, results) in runs.items()]
    return pd.concat(frames, ignore_index=True)


def _accuracies(name: str, model: str, results: pd.DataFrame) -> pd.DataFrame:
    means = accuracy_means(results)
    full = means[means["condition"] == "full"].set_index(ROW)["accuracy"].rename("full")
    sizes = results.groupby("task")["n"].max().rename("documents")
    means = means.join(full, on=ROW).join(sizes, on="task")
    fractions = means.loc[means["fraction"] > 0, "fraction"]
    share = {0.0: ""} | dict.fromkeys(fractions, "smaller") | {fractions.max(): "larger"}
    means = means.assign(
        run=name,
        model=model,
        share=means["fraction"].map(share),
        change=means["accuracy"] - means["full"],
    )
    return means[["run", "model", *CELL, "share", "documents", "accuracy", "change"]]


def overlay(model: str, documents: pd.DataFrame) -> pd.DataFrame | None:
    """Published and recomputed accuracies of one of the paper's models, or None for any other.

    Columns: table (number in the paper), task, labels, shots, condition, ablation, fraction,
    published, accuracy, low, high (percent; the run's 95 % interval), difference (points, the run's
    minus the published) and inside (whether the published value lies in the interval). Only rows
    that the run evaluated at the published fraction are there.
    """
    name = published_name(model)
    if name is None:
        return None
    published = published_accuracy()
    published = published[published["model"] == name].rename(columns={"accuracy": "published"})
    merged = published.merge(accuracy_intervals(documents), on=CELL, how="inner")
    merged["difference"] = merged["accuracy"] - merged["published"]
    merged["inside"] = merged["published"].between(merged["low"], merged["high"])
    columns = ["table", *CELL, "published", "accuracy", "low", "high", "difference", "inside"]
    return merged[columns]
