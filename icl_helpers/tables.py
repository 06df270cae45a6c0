"""The paper's tables from a run's results, with the published value beside each recomputed one.

Rows are tasks and shots; columns are the full model, induction heads, induction pattern and random
heads at each fraction. Every cell shows the accuracy in percent and, in parentheses, its difference
to the full model in points.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from icl_helpers.errors import InputError
from icl_helpers.published import PAPER_MODELS, published_accuracy
from icl_helpers.store import atomic_path

__all__ = [
    "CONDITION_TITLES",
    "ROW",
    "accuracy_means",
    "compare_published",
    "layout",
    "published_name",
    "published_table",
    "share_text",
    "table1",
    "table3",
    "table4",
    "table5",
    "table_rows",
    "write_table",
]

ROW = ["task", "labels", "shots"]
# In the paper's order of columns.
CONDITION_TITLES = {
    "full": "full model",
    "induction_heads": "induction heads",
    "induction_pattern": "induction pattern",
    "random_heads": "random heads",
}
_GROUP = ["task", "labels", "shots", "condition", "ablation", "fraction"]


def accuracy_means(results: pd.DataFrame) -> pd.DataFrame:
    """Accuracy in percent, averaged over demonstration seeds and ablation seeds, as in the paper.

    Columns task, labels, shots, condition, ablation, fraction, accuracy, sd (over the runs that
    were averaged, in points), runs.
    """
    grouped = results.groupby(_GROUP, sort=False)["accuracy"]
    means = grouped.agg(accuracy="mean", sd="std", runs="size").reset_index()
    return means.assign(accuracy=means["accuracy"] * 100, sd=means["sd"] * 100)


def layout(results: pd.DataFrame, *, ablation: str = "mean") -> pd.DataFrame:
    """A run's accuracies in the layout of Table 1 (``ablation="mean"``) or 4 (``"zero"``).

    Rows are indexed by task and shots (and labels, where the results hold both kinds), columns by
    condition and share of heads. Knockout has a column in both, as in the paper. Raises
    :class:`InputError` when the run lacks the full model.
    """
    index = ["task", "shots"] if results["labels"].nunique() <= 1 else ROW
    means = accuracy_means(results)
    return _titled(_cells(means[means["ablation"].isin(["none", "knockout", ablation])], index))


def _titled(cells: pd.DataFrame) -> pd.DataFrame:
    pairs: list[Any] = cells.columns.tolist()
    titles = [(CONDITION_TITLES[name], share_text(share)) for name, share in pairs]
    return cells.set_axis(pd.MultiIndex.from_tuples(titles), axis="columns")


def share_text(fraction: float) -> str:
    """A fraction of heads in percent; nothing for none."""
    return f"{fraction:.1%}" if fraction else ""


def _cells(wanted: pd.DataFrame, index: list[str]) -> pd.DataFrame:
    """Text of each cell; columns (condition, fraction) in the paper's order, "" where absent."""
    if not (wanted["condition"] == "full").any():
        raise InputError("the results hold no full model to compare with; evaluate 'full' first")
    full = wanted[wanted["condition"] == "full"].set_index(index)["accuracy"]
    rows: dict[tuple[Any, ...], dict[tuple[str, float], str]] = {}
    for entry in wanted.to_dict("records"):
        key = tuple(entry[name] for name in index)
        cell = f"{entry['accuracy']:.1f}"
        if entry["condition"] != "full" and key in full.index:
            cell += f" ({entry['accuracy'] - full[key]:+.1f})"
        rows.setdefault(key, {})[entry["condition"], float(entry["fraction"])] = cell
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index = pd.MultiIndex.from_tuples(list(rows), names=index)
    columns = sorted(
        frame.columns, key=lambda column: (list(CONDITION_TITLES).index(column[0]), column[1])
    )
    return frame.reindex(columns=pd.MultiIndex.from_tuples(columns)).fillna("")


def table1(results: pd.DataFrame, *, published_model: str | None = None) -> pd.DataFrame:
    """Table 1: abstract tasks, mean ablation and knockout.

    Rows: task, labels, shots. Columns: source, condition, share of heads; the source is "this run",
    and with a ``published_model``, one of the paper's two names such as :func:`published_name`
    gives, also "published, NAME". The paper's 1 % and 3 % then stand beside the run's smaller and
    larger share, each under its own heading. Raises :class:`InputError` when the run holds none of
    the table's rows or no full model.
    """
    return _paper_table(results, 1, published_model)


def table3(results: pd.DataFrame, *, published_model: str | None = None) -> pd.DataFrame:
    """Table 3: text classification, mean ablation; otherwise as :func:`table1`."""
    return _paper_table(results, 3, published_model)


def table4(results: pd.DataFrame, *, published_model: str | None = None) -> pd.DataFrame:
    """Table 4: abstract tasks, zero ablation and knockout; otherwise as :func:`table1`."""
    return _paper_table(results, 4, published_model)


def table5(results: pd.DataFrame, *, published_model: str | None = None) -> pd.DataFrame:
    """Table 5: text classification, zero ablation; otherwise as :func:`table1`."""
    return _paper_table(results, 5, published_model)


def table_rows(frame: pd.DataFrame, number: int) -> pd.DataFrame:
    """The rows of results or documents that one of the paper's tables is about.

    Raises :class:`InputError` for a table that there is not, or when the frame holds no such task.
    """
    from icl_helpers.task_registry import task_names

    if number not in (1, 3, 4, 5):
        raise InputError(f"the paper's tables are 1, 3, 4 and 5, got {number!r}")
    abstract = number in (1, 4)
    # The paper ran no knockout on text; a run that did shows it in its own results.
    kept = ["none", "mean" if number in (1, 3) else "zero", *(["knockout"] if abstract else [])]
    tasks = frame[frame["task"].isin(task_names("abstract")) == abstract]
    if tasks.empty:
        kind = "abstract" if abstract else "text classification"
        raise InputError(f"table {number} is about {kind} tasks; the results hold none")
    return tasks[tasks["ablation"].isin(kept)]


def published_table(number: int, model: str) -> pd.DataFrame:
    """A table as it was published for one of the paper's models, in the layout of :func:`layout`.

    Raises :class:`InputError` for another model.
    """
    return _titled(_cells(_published_rows(number, model), ROW))


def _paper_table(results: pd.DataFrame, number: int, published_model: str | None) -> pd.DataFrame:
    ours = _cells(accuracy_means(table_rows(results, number)), ROW)
    theirs = None
    if published_model is not None:
        theirs = _cells(_published_rows(number, published_model), ROW)
        theirs = theirs.reindex(ours.index).fillna("")
    columns: dict[tuple[str, str, str], pd.Series] = {}
    for condition, title in CONDITION_TITLES.items():
        published: Any = [] if theirs is None else theirs.get(condition, [])
        pairs = itertools.zip_longest(ours.get(condition, []), published)
        for fraction, published_fraction in pairs:
            for source, frame, share in (
                ("this run", ours, fraction),
                (f"published, {published_model}", theirs, published_fraction),
            ):
                if share is not None and frame is not None:
                    columns[source, title, share_text(share)] = frame[condition, share]
    return pd.DataFrame(columns)


def _published_rows(number: int, model: str) -> pd.DataFrame:
    published = published_accuracy()
    chosen = published[(published["table"] == number) & (published["model"] == model)]
    if chosen.empty:
        names = ", ".join(sorted(set(published["model"])))
        raise InputError(f"nothing is published for {model!r}; the paper's models are {names}")
    return chosen


def published_name(model: str) -> str | None:
    """The paper's name of a model, when it is one of the paper's two."""
    return PAPER_MODELS.get(model.lower().rstrip("/").split("/")[-1])


def compare_published(
    results: pd.DataFrame,
    *,
    table: int = 1,
    published_model: str = "Llama-3-8B",
    fractions: Sequence[float],
) -> pd.DataFrame:
    """Published accuracy, the run's accuracy and their difference, row by row (percent).

    The run's smaller and larger fraction stand beside the paper's 1 % and 3 %, whatever they are;
    both are shown. Rows that the run did not evaluate are left out.
    """
    chosen = _published_rows(table, published_model)
    match = {0.0: 0.0, 0.01: min(fractions), 0.03: max(fractions)}
    chosen = chosen.assign(
        published_fraction=chosen["fraction"], fraction=chosen["fraction"].map(match)
    ).rename(columns={"accuracy": "published"})
    ours = accuracy_means(results).rename(columns={"accuracy": "this run"})
    merged = chosen.merge(ours, on=_GROUP, how="inner")
    merged["difference"] = merged["this run"] - merged["published"]
    columns = ["task", "shots", "condition", "ablation", "published_fraction", "fraction"]
    return merged[[*columns, "published", "this run", "difference"]]


def write_table(frame: pd.DataFrame, directory: str | os.PathLike[str], name: str) -> list[Path]:
    """Write a table as ``name.csv`` and ``name.tex``; returns the files."""
    files = []
    for suffix in ("csv", "tex"):
        path = Path(directory) / f"{name}.{suffix}"
        with atomic_path(path) as temporary:
            if suffix == "csv":
                frame.to_csv(temporary)
            else:
                temporary.write_text(_latex(frame))
        files.append(path)
    return files


def _latex(frame: pd.DataFrame) -> str:
    """A plain LaTeX tabular; written here so that Jinja2 styling is not needed."""
    flat = frame.reset_index()
    heads = [" ".join(filter(None, map(str, c))) if isinstance(c, tuple) else str(c) for c in flat]
    lines = [f"\\begin{{tabular}}{{{'l' * len(heads)}}}", "\\hline", _latex_row(heads), "\\hline"]
    lines += [_latex_row([str(value) for value in row]) for row in flat.itertuples(index=False)]
    return "\n".join([*lines, "\\hline", "\\end{tabular}", ""])


def _latex_row(cells: Sequence[str]) -> str:
    escaped = [cell.replace("_", "\\_").replace("%", "\\%") for cell in cells]
    return " & ".join(escaped) + " \\\\"
