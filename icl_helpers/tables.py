"""The paper's tables from a run's results, with the published value beside each recomputed one.

Rows are tasks and shots; columns are the full model, induction heads, induction pattern and random
heads at each fraction. Every cell shows the accuracy in percent and, in parentheses, its difference
to the full model in points.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from icl_helpers.errors import InputError
from icl_helpers.published import PAPER_MODELS, published_accuracy
from icl_helpers.store import atomic_path

__all__ = ["accuracy_means", "compare_published", "layout", "published_name", "write_table"]

_ORDER = ["full", "induction_heads", "induction_pattern", "random_heads"]
_TITLES = {
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
    """Table 1 (``ablation="mean"``) or Table 4 (``"zero"``) for a run.

    Rows are indexed by task and shots, columns by condition and share of heads. Knockout has a
    column in both, as in the paper. Raises :class:`InputError` when the run lacks the full model.
    """
    means = accuracy_means(results)
    wanted = means[means["ablation"].isin(["none", "knockout", ablation])]
    if not (wanted["condition"] == "full").any():
        raise InputError("the results hold no full model to compare with; evaluate 'full' first")
    full = wanted[wanted["condition"] == "full"].set_index(["task", "shots"])["accuracy"]
    rows: dict[tuple[str, int], dict[tuple[str, str], str]] = {}
    for entry in wanted.itertuples(index=False):
        key = (entry.task, entry.shots)
        cell = f"{entry.accuracy:.1f}"
        if entry.condition != "full":
            cell += f" ({entry.accuracy - full[key]:+.1f})"
        share = "" if entry.condition == "full" else f"{entry.fraction:.1%}"
        rows.setdefault(key, {})[_TITLES[entry.condition], share] = cell
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index = pd.MultiIndex.from_tuples(frame.index, names=["task", "shots"])
    shares = [f"{f:.1%}" for f in sorted(set(wanted["fraction"]) - {0.0})]
    columns = [("full model", "")]
    columns += [(_TITLES[name], share) for name in _ORDER[1:] for share in shares]
    found = [column for column in columns if column in set(frame.columns)]
    return frame[pd.MultiIndex.from_tuples(found)].fillna("")


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
    published = published_accuracy()
    chosen = published[(published["table"] == table) & (published["model"] == published_model)]
    if chosen.empty:
        raise InputError(f"nothing is published in table {table} for {published_model!r}")
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
