"""The paper's tables from a run's results, with how sure each number is (Tables 1, 3, 4, 5).

Rows are tasks and shots; columns are the full model, induction heads, induction pattern and random
heads at each fraction. :data:`LEGEND` says what stands in a cell. The last columns compare
induction heads with random heads on the same documents.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from icl_helpers.errors import InputError, MissingArtefactError
from icl_helpers.evaluation.store import CELL, ROW, keyed
from icl_helpers.files import atomic_path, embedded_dir
from icl_helpers.results.statistics import accuracy_intervals, comparisons
from icl_helpers.tasks.specs import task_names

__all__ = [
    "CONDITION_TITLES", "LEGEND", "MARK", "AnnotatedTable", "abstract_results", "annotated_table",
    "cell_frame", "markdown_table", "published_accuracy", "read_measurements", "read_published",
    "table_rows", "write_table",
]  # fmt: skip

# In the paper's order of columns.
CONDITION_TITLES = {
    "full": "full model", "induction_heads": "induction heads",
    "induction_pattern": "induction pattern", "random_heads": "random heads",
}  # fmt: skip
_GAP = "induction minus random"
# The paper's control needs no name.
_PLAIN = ("", "published")


def table_rows(frame: pd.DataFrame, number: int) -> pd.DataFrame:
    """Select the rows of results or documents that one of the paper's tables is about.

    Raises :class:`InputError` for a table that there is not, or when the frame holds no such task.
    """
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


def write_table(frame: pd.DataFrame, directory: str | os.PathLike[str], name: str) -> list[Path]:
    """Write a table as ``name.csv`` and ``name.tex``; return the files."""
    files = [Path(directory) / f"{name}.{suffix}" for suffix in ("csv", "tex")]
    for path, text in zip(files, (frame.to_csv(), _latex(frame)), strict=True):
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return files


def _latex(frame: pd.DataFrame) -> str:
    """Return a LaTeX tabular (with booktabs' rules) of the values as they are shown."""
    flat = frame.reset_index().astype(str)
    flat.columns = pd.Index(
        [" ".join(filter(None, map(str, c))) if isinstance(c, tuple) else str(c) for c in flat]
    )
    style = flat.style.hide(axis="index").format(escape="latex")
    return style.format_index(escape="latex", axis="columns").to_latex(hrules=True)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write a Markdown table; bars in cells are escaped, missing values left empty."""

    def line(cells: Sequence[Any]) -> str:
        texts = ("" if cell is None else str(cell).replace("|", r"\|") for cell in cells)
        return f"| {' | '.join(texts)} |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


MARK = "*"
LEGEND = (
    "Each cell: accuracy in percent; in parentheses the difference to the full model in points; in "
    "brackets the 95 % interval of the accuracy, over documents and seeds. The columns *induction "
    "minus random* hold the difference between the two, with its own interval. A star marks a "
    "difference that is distinguishable from noise: the probability of one as large without any "
    "effect, by an exact paired test on the same documents and corrected by Holm's method for all "
    "tests of the table, is below 5 %. What has no star may differ or not: these documents do not "
    "tell."
)


class AnnotatedTable(NamedTuple):
    """``cells``: text, in the paper's layout; ``tests``: one row per comparison, as numbers."""

    cells: pd.DataFrame
    tests: pd.DataFrame


def annotated_table(documents: pd.DataFrame, number: int) -> AnnotatedTable:
    """Compute Table 1, 3, 4 or 5 of a run from its per-document results.

    ``cells`` is indexed by task, labels and shots, with columns (condition, share of heads).
    ``tests`` has the columns of :func:`icl_helpers.results.statistics.comparisons`, corrected
    over this table alone. Raises :class:`InputError` when the run holds none of the table's rows or
    no full model.
    """
    rows = table_rows(documents, number)
    if not (rows["condition"] == "full").any():
        raise InputError("the results hold no full model to compare with; evaluate 'full' first")
    tests = comparisons(rows)
    change = tests["difference"].map("{:+.1f}".format)
    mark = tests["distinguishable"].map({True: MARK, False: ""})
    tests["change"] = " (" + change + ")" + mark
    gaps = tests.assign(
        condition=_GAP, control=tests["against_control"],
        text=change + mark + _bounds(tests, "{:+.1f}"),
    )  # fmt: skip
    to_full = tests.loc[tests["against"] == "full", [*CELL, "change"]]
    cells = accuracy_intervals(rows).merge(to_full, how="left", on=CELL)
    accuracy = cells["accuracy"].map("{:.1f}".format)
    cells["text"] = accuracy + cells["change"].fillna("") + _bounds(cells, "{:.1f}")
    columns = [
        "against",
        "against_control",
        "difference",
        "low",
        "high",
        "p",
        "p_holm",
        "cohens_g",
        "distinguishable",
    ]
    return AnnotatedTable(
        cell_frame(pd.concat([cells, gaps[gaps["against"] == "random_heads"]])),
        tests[[*CELL, *columns]],
    )


def _bounds(frame: pd.DataFrame, form: str) -> pd.Series:
    return " [" + frame["low"].map(form.format) + ", " + frame["high"].map(form.format) + "]"


def cell_frame(cells: pd.DataFrame) -> pd.DataFrame:
    """Lay out cells in the paper's order and words: a row a task, labels and shots.

    ``cells`` has those columns, condition, fraction, control and ``text``.
    """
    filled = keyed(cells).assign(fraction=cells["fraction"].fillna(0.0))
    wide = filled.pivot(index=ROW, columns=["condition", "control", "fraction"], values="text")
    order = [*CONDITION_TITLES, _GAP]
    columns = sorted(wide, key=lambda column: (order.index(column[0]), *column[1:]))
    wide = wide.reindex(pd.MultiIndex.from_frame(cells[ROW].drop_duplicates()))[columns]
    wide.columns = pd.MultiIndex.from_tuples(
        (
            CONDITION_TITLES.get(name, name) + ("" if control in _PLAIN else f", {control}"),
            f"{share:.1%}" if share else "",
        )
        for name, control, share in wide
    )
    return wide.fillna("")


def abstract_results(results: pd.DataFrame) -> pd.DataFrame:
    """Select the rows of the abstract tasks, or all of them where there is no such task."""
    rows = results[results["task"].isin(task_names("abstract"))]
    return results if rows.empty else rows


def read_measurements(name: str, *, model: str = "icl-tiny") -> pd.DataFrame:
    """Read the shipped measurements of an embedded model: ``effect`` or ``dynamics``.

    Raises :class:`MissingArtefactError` when the model has none.
    """
    path = embedded_dir() / model / f"{name}.parquet"
    if not path.is_file():
        raise MissingArtefactError(
            f"{model!r} has no measurements {name!r}: only an embedded model's training is known; "
            f"the measurements come from `synthetic.training measure`"
        )
    return pd.read_parquet(path)


def read_published(name: str) -> pd.DataFrame:
    """Read a table of the folder ``published``, whose ``README.md`` has columns and sources."""
    path = Path(__file__).parents[1] / "published" / name
    return pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)


def published_accuracy() -> pd.DataFrame:
    """Read every accuracy that the paper published, in percent."""
    return read_published("accuracy.csv")
