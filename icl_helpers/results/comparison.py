"""Published accuracies and scores of heads, and runs beside them and beside each other.

Example
-------
>>> published_table(1, "Llama-3-8B")
>>> compare_runs({"a": ("icl-tiny", results, 64), "b": ("gpt2", other_results, 144)})
>>> overlay("meta-llama/Meta-Llama-3-8B", documents)
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from icl_helpers.attention.heads import SCORE_THRESHOLD
from icl_helpers.errors import InputError
from icl_helpers.evaluation.store import CELL, ROW, keyed
from icl_helpers.results.statistics import accuracy_intervals
from icl_helpers.results.tables import (
    cell_frame,
    name_heads,
    published_accuracy,
    read_published,
)

__all__ = [
    "PAPER_MODELS", "compare_runs", "count_induction_heads", "overlay", "published_accuracy",
    "published_head_scores", "published_name", "published_table", "read_published",
]  # fmt: skip

# Published name of each of the paper's models, by the last part of its hub id, and their heads.
PAPER_MODELS = {"meta-llama-3-8b": "Llama-3-8B", "internlm2-20b": "InternLM2-20B"}
_PAPER_HEADS = {"Llama-3-8B": 32 * 32, "InternLM2-20B": 48 * 48}


def published_head_scores() -> pd.DataFrame:
    """Read the scores of single heads that Feucht et al. (2025) published.

    Columns: model, checkpoint, layer, head, score (0 to 1), step (of training; missing for the
    final weights).
    """
    scores = read_published("head_scores.parquet")
    steps = scores["checkpoint"].str.extract(r"step(\d+)")[0]
    return scores.assign(step=pd.to_numeric(steps).astype("Int64"))


def count_induction_heads(scores: pd.DataFrame) -> pd.DataFrame:
    """Count the heads that score 0.3 or more, for every model and training step.

    ``scores`` has the columns model, step, layer, head and score. Columns: model, step (final
    weights last), heads (all of the model), induction (those of 0.3 or more), and the highest score
    with its layer and head.
    """
    ranked = scores.sort_values("score", ascending=False, kind="stable")
    ranked["induction"] = ranked["score"] >= SCORE_THRESHOLD
    groups = ranked.groupby(["model", "step"], dropna=False)
    return groups.agg(
        heads=("score", "size"), induction=("induction", "sum"), score=("score", "first"),
        layer=("layer", "first"), head=("head", "first"),
    ).reset_index()  # fmt: skip


def _published_rows(model: str) -> pd.DataFrame:
    """Return a model's published accuracies under the keys of a run's rows."""
    frame = published_accuracy().query("model == @model")
    drawn = {True: "published", False: ""}
    return frame.assign(
        fraction=frame["fraction"].where(frame["fraction"] > 0),
        control=(frame["condition"] == "random_heads").map(drawn),
    )


def published_name(model: str) -> str | None:
    """Return the paper's name of a model, when it is one of the paper's two."""
    return PAPER_MODELS.get(model.lower().rstrip("/").split("/")[-1])


def published_table(number: int, model: str) -> pd.DataFrame:
    """Return a table as it was published for one of the paper's models, in the paper's layout.

    Rows are indexed by task, labels and shots, columns by condition and heads; a cell is
    the accuracy in percent and, in parentheses, its difference to the full model in points. Raises
    :class:`InputError` for another model.
    """
    rows = _published_rows(model).query("table == @number")
    if rows.empty:
        names = ", ".join(sorted(set(published_accuracy()["model"])))
        raise InputError(f"nothing is published for {model!r}; the paper's models are {names}")
    rows = _with_change(rows)
    change = rows["change"].map(" ({:+.1f})".format).mask(rows["condition"] == "full", "")
    text = rows["accuracy"].map("{:.1f}".format) + change
    return cell_frame(rows.assign(text=text), n_heads=_PAPER_HEADS[model])


def _with_change(rows: pd.DataFrame) -> pd.DataFrame:
    """Add ``change``, the accuracy minus that of the full model in the same row of the table."""
    full = rows[rows["condition"] == "full"].set_index(ROW)["accuracy"].rename("full")
    return rows.assign(change=rows["accuracy"] - rows.join(full, on=ROW)["full"])


def compare_runs(runs: Mapping[str, tuple[str, pd.DataFrame, int]]) -> pd.DataFrame:
    """Compute the accuracies of several runs, one row a run, task, labels, shots and condition.

    ``runs`` has, by its name, the model of each run, its results and how many heads the model has.
    Columns: run, model, task, labels, shots, condition, ablation, heads (in words), share
    (``smaller`` or ``larger`` of the run's fractions, ``""`` for the full model), documents (of
    each task), accuracy (percent, averaged over seeds), change (points, to the full model of the
    same run; 0 for that itself). Runs differ in how many heads they remove, so compare by share.
    Raises :class:`InputError` without runs.
    """
    if not runs:
        raise InputError("runs is empty; give at least one run")
    frames = []
    for name, (model, results, n_heads) in runs.items():
        means = 100 * keyed(results).groupby(CELL, sort=False, dropna=False)["accuracy"].mean()
        means = _with_change(means.reset_index()).assign(run=name, model=model)
        fractions = means.loc[means["condition"] != "full", "fraction"]
        share = dict.fromkeys(fractions, "smaller") | {fractions.max(): "larger"}
        means["share"] = means["fraction"].map(share).fillna("")
        means["documents"] = means["task"].map(results.groupby("task")["n"].max())
        frames.append(name_heads(means, n_heads))
    cell = [{"fraction": "heads"}.get(column, column) for column in CELL]
    columns = ["run", "model", *cell, "share", "documents", "accuracy", "change"]
    return pd.concat(frames, ignore_index=True)[columns]


def overlay(model: str, documents: pd.DataFrame) -> pd.DataFrame | None:
    """Return published and recomputed accuracies of a paper's model, or None for any other.

    Columns: table (number in the paper), task, labels, shots, condition, ablation, heads, control,
    published, accuracy, low, high (percent; the run's 95 % interval), difference (points, the run's
    minus the published) and inside (whether the published value lies in the interval). Only rows
    that the run evaluated at the published fraction are there.
    """
    name = published_name(model)
    if name is None:
        return None
    published = _published_rows(name).rename(columns={"accuracy": "published"})
    merged = published.merge(accuracy_intervals(documents), on=CELL, how="inner")
    merged["difference"] = merged["accuracy"] - merged["published"]
    merged["inside"] = merged["published"].between(merged["low"], merged["high"])
    columns = ["table", *CELL, "published", "accuracy", "low", "high", "difference", "inside"]
    return name_heads(merged[columns], _PAPER_HEADS[name])
