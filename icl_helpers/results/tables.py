"""The paper's tables from a run's results, with how sure each number is (Tables 1, 3, 4, 5).

Rows are tasks and shots; columns are the full model, induction heads, induction pattern and each
control of random heads, at each number of heads. :data:`LEGEND` says what stands in a cell. A
second table compares induction heads with each control on the same documents.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from icl_helpers.attention.heads import heads_in_words
from icl_helpers.errors import InputError
from icl_helpers.evaluation.store import CELL, ROW
from icl_helpers.files import atomic_path
from icl_helpers.results.statistics import accuracy_intervals, comparisons, filled_keys
from icl_helpers.tasks.specs import task_names

__all__ = [
    "CONDITION_TITLES", "LEGEND", "MARK", "AnnotatedTable", "abstract_results", "annotated_table",
    "bounds_in_words", "cell_frame", "markdown_table", "name_heads", "published_accuracy",
    "published_gaps", "published_more", "published_ranges", "published_rows", "range_of_gaps",
    "read_published", "table_rows", "unsigned_zeros", "write_table",
]  # fmt: skip

# In the paper's order of columns.
CONDITION_TITLES = {
    "full": "full model", "induction_heads": "induction heads",
    "induction_pattern": "induction pattern", "random_heads": "random heads",
}  # fmt: skip
_GAP = "induction minus random heads"
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
    ablations = ["none", "mean" if number in (1, 3) else "zero"]
    ablations += ["knockout"] if abstract else []
    tasks = frame[frame["task"].isin(task_names("abstract")) == abstract]
    if tasks.empty:
        kind = "abstract" if abstract else "text classification"
        raise InputError(f"table {number} is about {kind} tasks; the results hold none")
    return tasks[tasks["ablation"].isin(ablations)]


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
    return flat.to_latex(index=False, escape=True, na_rep="nan")


def unsigned_zeros(text: str) -> str:
    """Give what rounds to nothing no minus: ``-0.0`` is ``+0.0``."""
    return re.sub(r"(?<![\w.-])-(0(?:\.0+)?)(?!\w|\.\d)", r"+\1", text)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write a Markdown table; bars in cells are escaped, missing values left empty."""

    def line(cells: Sequence[Any]) -> str:
        texts = ("" if cell is None else str(cell).replace("|", r"\|") for cell in cells)
        return f"| {' | '.join(texts)} |"

    return unsigned_zeros("\n".join(map(line, [header, ["---"] * len(header), *rows])))


MARK = "*"
LEGEND = (
    "Each cell: accuracy in percent; in parentheses the difference to the full model in points; in "
    "brackets the 95 % interval of the accuracy, over documents, demonstration seeds and control "
    "draws. *Random heads* are the paper's control, which may draw induction heads again; *random "
    "heads, strict* never those removed beside it. The last table holds induction heads minus "
    "either, with the interval of that difference. A star marks a difference that is "
    "distinguishable from noise. "
    "Two things must say so: an exact paired test on the same documents, below 5 % after Holm's "
    "correction for all tests of the table's rows with examples (those without are corrected by "
    "themselves, and counted once, since seeds cannot differ there); and the difference's own 95 % "
    "interval over documents, seeds and draws, which must not hold zero. What has no star may "
    "differ or not: these documents, seeds and draws do not tell."
)


class AnnotatedTable(NamedTuple):
    """``cells`` and ``gaps``: text, in the paper's layout; ``tests``: numbers, a row a comparison.

    ``gaps`` is induction heads minus random heads, a column each control and number of heads.
    """

    cells: pd.DataFrame
    gaps: pd.DataFrame
    tests: pd.DataFrame


def annotated_table(documents: pd.DataFrame, number: int, *, n_heads: int) -> AnnotatedTable:
    """Compute Table 1, 3, 4 or 5 of a run from its per-document results.

    ``n_heads`` is how many heads the model has. ``cells`` is indexed by task, labels and shots,
    with columns (condition, heads). ``tests`` has the columns of
    :func:`icl_helpers.results.statistics.comparisons`, corrected over this table alone, with heads
    in place of their fraction, and where the documents say so (``drawn_again``) how many heads of
    each random draw are induction heads. Raises :class:`InputError` when the run holds none of the
    table's rows or no full model.
    """
    rows = table_rows(documents, number)
    if not (rows["condition"] == "full").any():
        raise InputError("the results hold no full model to compare with; evaluate 'full' first")
    tests = comparisons(rows)
    change = tests["difference"].map("{:+.1f}".format)
    mark = tests["distinguishable"].map({True: MARK, False: ""})
    bounds = bounds_in_words(tests["low"], tests["high"], "{:+.1f}")
    gaps = tests.assign(
        condition=_GAP, control=tests["against_control"], text=change + mark + bounds
    )
    to_full = tests[CELL].assign(change=" (" + change + ")" + mark)[tests["against"] == "full"]
    cells = accuracy_intervals(rows).merge(to_full, how="left", on=CELL)
    accuracy = cells["accuracy"].map("{:.1f}".format) + cells["change"].fillna("")
    bounds = bounds_in_words(cells["low"], cells["high"], "{:.1f}")
    cells = cells.assign(text=accuracy + bounds)
    columns = ["against", "against_control", "difference", "low", "high", "p", "p_holm"]
    columns += ["cohens_g", "distinguishable"]
    tests = _with_draws(tests[[*CELL, *columns]], rows)
    gaps = gaps[gaps["against"] == "random_heads"]
    return AnnotatedTable(
        cell_frame(cells, n_heads=n_heads),
        pd.DataFrame() if gaps.empty else cell_frame(gaps, n_heads=n_heads),
        name_heads(tests, n_heads),
    )


def _with_draws(tests: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Add how many heads of the compared random draws are induction heads, draw by draw."""
    if "drawn_again" not in rows:
        return tests
    key = ["fraction", "control"]
    draws = rows.dropna(subset="drawn_again").sort_values("ablation_seed")
    draws = draws.drop_duplicates([*key, "ablation_seed"]).astype({"drawn_again": str})
    again = draws.groupby(key)["drawn_again"].agg(", ".join).to_dict()
    control = tests["control"].where(tests["control"] != "", tests["against_control"])
    keys = zip(tests["fraction"], control, strict=True)
    return tests.assign(induction_heads_in_draws=[again.get(key, "") for key in keys])


def bounds_in_words(low: pd.Series, high: pd.Series, form: str) -> pd.Series:
    """Write intervals to stand behind their values, each bound in this format."""
    return " [" + low.map(form.format) + ", " + high.map(form.format) + "]"


def name_heads(frame: pd.DataFrame, n_heads: int) -> pd.DataFrame:
    """Put in place of the column ``fraction`` how many of the model's heads it is, in words."""
    words = [heads_in_words(share, n_heads) if share > 0 else "" for share in frame["fraction"]]
    return frame.assign(fraction=words).rename(columns={"fraction": "heads"})


def cell_frame(cells: pd.DataFrame, *, n_heads: int) -> pd.DataFrame:
    """Lay out cells in the paper's order and words: a row a task, labels and shots.

    ``cells`` has those columns, condition, fraction, control and ``text``; ``n_heads`` is how many
    heads the model has.
    """
    filled = filled_keys(cells)
    wide = filled.pivot(index=ROW, columns=["condition", "control", "fraction"], values="text")
    order = [*CONDITION_TITLES, _GAP]
    columns = sorted(wide, key=lambda column: (order.index(column[0]), *column[1:]))
    wide = wide.reindex(pd.MultiIndex.from_frame(cells[ROW].drop_duplicates()))[columns]
    wide.columns = pd.MultiIndex.from_tuples(
        (
            CONDITION_TITLES.get(name, name) + ("" if control in _PLAIN else f", {control}"),
            heads_in_words(share, n_heads) if share else "",
        )
        for name, control, share in wide
    )
    return wide.fillna("")


def abstract_results(results: pd.DataFrame) -> pd.DataFrame:
    """Select the rows of the abstract tasks, or all of them where there is no such task."""
    rows = results[results["task"].isin(task_names("abstract"))]
    return results if rows.empty else rows


def read_published(name: str) -> pd.DataFrame:
    """Read a table of the folder ``published``, whose ``README.md`` has columns and sources."""
    path = Path(__file__).parents[1] / "published" / name
    return pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)


def published_accuracy() -> pd.DataFrame:
    """Read every accuracy that the paper published, in percent."""
    return read_published("accuracy.csv")


def published_rows(
    number: int, condition: str, *, fraction: float = 0.0, shots: str = "most"
) -> pd.DataFrame:
    """Select a published table's rows of a condition at each task's ``most`` or ``none`` shots."""
    rows = published_accuracy().query("table == @number")
    most = rows.groupby(["model", "task", "labels"])["shots"].transform("max")
    rows = rows[rows["shots"] == (most if shots == "most" else 0)]
    return rows[(rows["condition"] == condition) & (rows["fraction"] == fraction)]


def published_gaps(
    number: int, condition: str, *, fraction: float = 0.03, against: str = "full",
    shots: str = "most",
) -> pd.DataFrame:  # fmt: skip
    """Return what a published table says of a condition beside another one of the same row.

    Columns: model, task, labels, shots (each task's ``most``, or ``none``) and gap, in points.
    """
    key = ["model", "task", "labels", "shots"]
    value = published_rows(number, condition, fraction=fraction, shots=shots)
    beside = 0.0 if against == "full" else fraction
    rival = published_rows(number, against, fraction=beside, shots=shots)
    both = value.merge(rival, on=key, suffixes=("", "_against"))
    return both[key].assign(gap=both["accuracy"] - both["accuracy_against"])


def range_of_gaps(gaps: pd.Series, by: pd.Series) -> dict[str, str]:
    """Word the range of differences, in points, by a key in the order of its appearance."""
    bounds = gaps.groupby(by, sort=False).agg(["min", "max"]).round()
    # A bound that rounds to minus zero is plus zero, and one value is no range.
    return {
        str(name): " to ".join(dict.fromkeys(f"{bound or 0:+.0f}" for bound in ends))
        for name, *ends in bounds.itertuples()
    }


def published_ranges(
    number: int = 1, condition: str = "induction_heads", *, labels: str | None = None,
    small: float | None = None, **options: Any,
) -> str:  # fmt: skip
    """Word the published differences of a condition as a range over tasks, by model.

    With ``small`` how many of them lie within so many points.
    """
    gaps = published_gaps(number, condition, **options)
    gaps = gaps[gaps["labels"] == labels] if labels else gaps
    ranges = sorted(range_of_gaps(gaps["gap"], gaps["model"]).items())
    said = "; ".join(f"{model} {of} points (Table {number})" for model, of in ranges)
    if small is None:
        return said
    count = int((gaps["gap"].abs() <= small).sum())
    return f"{said}; within {small:.0f} points in {count} of {len(gaps)} rows"


def published_more() -> str:
    rows = published_accuracy().query("table == 1 and condition == 'full' and shots in (5, 10)")
    wide = rows.pivot(index=["model", "task"], columns="shots", values="accuracy").dropna()
    gaps = wide[10] - wide[5]
    ranges = range_of_gaps(gaps, gaps.index.get_level_values("model")).items()
    said = "; ".join(f"{model} {of} points" for model, of in sorted(ranges))
    return f"{said} from 5 to 10 examples (Table 1)"
