"""What a notebook shows of a run: figures with computed descriptions, tables to download.

A cell's caption and alternative text are fixed when the notebook is written, but what a figure
shows is known only after it ran. :func:`show_figure` stores both with the figure's output, under
the key :data:`DESCRIPTION`, and the book puts them in place of the cell's own; beside them lies a
second drawing, which the book shows on narrow screens.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from IPython.display import HTML, Markdown, display
from matplotlib.figure import Figure

from icl_helpers.attention.heads import heads_in_words
from icl_helpers.errors import InputError, NotMeasuredError
from icl_helpers.evaluation.store import CELL, ROW
from icl_helpers.results import comparison, figures
from icl_helpers.results.statistics import benefit_changes, left_out_tasks
from icl_helpers.results.tables import (
    annotated_table,
    bounds_in_words,
    name_heads,
    unsigned_zeros,
    write_table,
)
from icl_helpers.tasks.data import load_splits
from icl_helpers.tasks.specs import (
    STAND_IN_TASKS,
    TextTaskSpec,
    get_task_spec,
    task_name,
    text_spec,
)

__all__ = [
    "DESCRIPTION", "benefit_or_none", "describe_text_tasks", "said_where_not_measured",
    "show_answers", "show_bars", "show_benefit", "show_benefit_table", "show_drawing",
    "show_figure", "show_margins", "show_paper_table", "show_published", "show_published_scores",
    "show_table", "text_task_table",
]  # fmt: skip

DESCRIPTION = "icl_description"


def show_figure(figure: Figure, *, alt: str, caption: str, narrow: Figure | None = None) -> None:
    """Display a figure with its alternative text, caption, and drawing for narrow screens."""
    description = {"alt": unsigned_zeros(alt), "caption": unsigned_zeros(caption)}
    if narrow is not None:
        drawn = io.BytesIO()
        narrow.savefig(drawn, format="png", dpi=180)
        description["narrow"] = base64.b64encode(drawn.getvalue()).decode()
    display(figure, metadata={DESCRIPTION: description})  # type: ignore[no-untyped-call]


@contextmanager
def said_where_not_measured() -> Iterator[None]:
    """Leave the block where an imported run lacks a measurement, and say so in its place."""
    try:
        yield
    except NotMeasuredError as error:
        _say(f"**Not measured.** {error}")


def show_drawing(
    draw: Callable[..., Figure], *shown: Any, alt: str | Callable[..., str], caption: str,
    **options: Any,
) -> None:  # fmt: skip
    """Display a figure of :mod:`icl_helpers.results.figures`, with its narrow drawing.

    ``alt`` may be a function that is given what is drawn.
    """
    wide, narrow = (draw(*shown, **options, narrow=narrow) for narrow in (False, True))
    text = alt if isinstance(alt, str) else alt(*shown, **options)
    show_figure(wide, alt=text, caption=caption, narrow=narrow)


def show_bars(
    results: pd.DataFrame, *, ablations: Sequence[str], caption: str, n_heads: int,
    shots: str = "most",
) -> None:  # fmt: skip
    """Display a figure of :func:`accuracy_bars` with its heights as alternative text.

    Beside a knockout the caption says how many pairs it blocks.
    """
    if results.empty:
        _say(f"*Nothing to show. {caption}*")
        return
    seeds = ", ".join(map(str, sorted(set(results["demonstration_seed"]))))
    blocked = results["n_blocked"] if "n_blocked" in results else pd.Series(dtype=float)
    blocked = blocked[blocked > 0]
    if "knockout" in ablations and len(blocked):
        pairs = dict.fromkeys(map("{:,.0f}".format, (blocked.min(), blocked.max())))
        caption += (
            f" The knockout blocks {' to '.join(pairs)} pairs of a query and a key in a prompt, on "
            f"average over a task's documents."
        )
    most = int(results["n"].max())
    show_drawing(
        figures.accuracy_bars, results, alt=figures.bars_alt, ablations=ablations, n_heads=n_heads,
        shots=shots,
        caption=f"{caption} At most {most} documents a task, demonstration seeds {seeds}.",
    )  # fmt: skip


def show_margins(documents: pd.DataFrame, *, ablations: Sequence[str], n_heads: int) -> None:
    """Display :func:`icl_helpers.results.figures.margin_bars` with its heights as text."""
    show_drawing(
        figures.margin_bars, documents, alt=figures.margin_alt, ablations=ablations,
        n_heads=n_heads,
        caption=(
            "Median margin by which the right label leads the best wrong one, with the most "
            "examples per task; lines span the quartiles. Below zero the wrong label leads on most "
            "documents."
        ),
    )  # fmt: skip


def show_table(
    frame: pd.DataFrame, *, label: str, directory: Path | None = None, name: str = "",
    written: pd.DataFrame | None = None,
) -> None:  # fmt: skip
    """Display a table, ``label`` above it, in a frame that scrolls sideways on a narrow screen.

    With a directory the table, or ``written`` in its place, is also written there as ``name.csv``
    and ``name.tex``, and links to both follow it; they lead to ``tables/`` beside the page, where
    the book puts the run's files.
    """
    title = html.escape(label[:1].upper() + label[1:])
    shown = _labelled(frame) if isinstance(frame.index, pd.MultiIndex) else frame
    # An interval stands below its value and is not broken: columns stay narrow and readable.
    table = shown.to_html(border=0, na_rep="").replace("\n", " ").replace(" [", "<br>[")
    table = table.replace("<thead>", f"<caption>{title}</caption> <thead>", 1)
    height = "; max-height: 40rem" if len(frame) > 30 else ""
    region = (
        f'<div class="icl-table" role="region" aria-label="{title}" tabindex="0" '
        f'style="overflow-x: auto{height}">{table}</div>'
    )
    display(HTML(unsigned_zeros(region)))  # type: ignore[no-untyped-call]
    if directory is not None:
        _offer(frame if written is None else written, label, directory, name)


def _labelled(frame: pd.DataFrame) -> pd.DataFrame:
    """Join the levels of an index: a row has one head, which stays in sight on a phone."""
    joined = [", ".join(task_name(str(level)) for level in levels) for levels in frame.index]
    corner = ", ".join(map(str, frame.index.names))
    columns = ["", corner] if isinstance(frame.columns, pd.MultiIndex) else corner
    return frame.set_axis(pd.Index(joined), axis="index").rename_axis(columns=columns)


def _show_rows(shown: pd.DataFrame, rows: pd.DataFrame, label: str) -> None:
    """Display a table with the task, labels and shots of ``rows`` at its head."""
    index = pd.MultiIndex.from_frame(rows[ROW])
    show_table(_narrow(shown.set_axis(index, axis="index")), label=label)


def _offer(frame: pd.DataFrame, label: str, directory: Path, name: str) -> None:
    """Write a table into the run and link to it."""
    write_table(frame, directory, name)
    _say(f"Download {label}: {_links(name)}")


def _links(name: str) -> str:
    return f"[CSV](tables/{name}.csv), [LaTeX](tables/{name}.tex)"


_REMOVAL = {1: "mean ablation", 3: "mean ablation", 4: "zero ablation", 5: "zero ablation"}


def _say(text: str) -> None:
    """Display Markdown."""
    display(Markdown(text))  # type: ignore[no-untyped-call]


def show_paper_table(
    documents: pd.DataFrame, number: int, directory: Path, *, n_heads: int
) -> None:
    """Display a table of the paper for a run: accuracies, induction minus random heads, and tests.

    Accuracies have intervals and marks, and a table each number of heads: side by side they would
    be wider than a page. All are written into the directory as ``table-N``, ``table-N-gaps`` and
    ``table-N-tests``. Says so where the documents are of no task of the table.
    """
    try:
        table = annotated_table(documents, number, n_heads=n_heads)
    except InputError as error:
        _say(f"*Nothing to show: {error}.*")
        return
    name, title = f"table-{number}", f"table {number}, {_REMOVAL[number]}"
    cells = _narrow(table.cells)
    shares = cells.columns.get_level_values(1)
    for share in dict.fromkeys(filter(None, shares)):
        part = cells.loc[:, (shares == "") | (shares == share)].droplevel(1, axis="columns")
        show_table(part, label=f"{title}, {share} removed or blocked")
    _offer(cells, title, directory, name)
    if not table.gaps.empty:
        label = f"{title}: induction heads minus random heads, points"
        gaps = _narrow(table.gaps)
        show_table(gaps, label=label, directory=directory, name=f"{name}-gaps")
    # A p-value is never zero, however small: it keeps its exponent.
    exponents = {p: table.tests[p].map("{:.1e}".format) for p in ("p", "p_holm")}
    tests = table.tests.round(6).assign(**exponents)
    write_table(tests, directory, f"{name}-tests")
    _say(
        f"{int(tests['distinguishable'].sum())} of {len(tests)} comparisons are distinguishable "
        f"from noise. Differences, intervals, p-values before and after correction and effect "
        f"sizes (Cohen's g) of all of them: {_links(f'{name}-tests')}"
    )


def show_answers(rows: pd.DataFrame, directory: Path, *, n_heads: int, name: str) -> None:
    """Display what answers say beside accuracy; ``name`` is that of the written table.

    ``rows`` is :func:`icl_helpers.analysis.bias.answer_table`, with one number of heads.
    """
    if rows.empty:
        _say("*Nothing to show: there are no results with log-probabilities.*")
        return
    # A task's conditions together, the full model first.
    tasks = pd.factorize(rows["task"] + rows["labels"].fillna(""))[0]
    order = np.lexsort((rows["condition"] != "full", tasks))
    rows = rows.iloc[order].reset_index(drop=True)
    share = rows["fraction"].max()
    removed = f", {heads_in_words(share, n_heads)} removed or blocked" if share > 0 else ""
    label = f"bias or skill, percent, intervals over documents alone{removed}"
    columns = {}
    for measure in ("accuracy", "balanced", "calibrated", "auc"):
        bounds = bounds_in_words(rows[f"{measure}_low"], rows[f"{measure}_high"], "{:.0f}")
        percent = rows[measure].map("{:.0f}".format) + bounds
        columns[measure] = percent.where(rows[measure].notna(), "")
    words = []
    for task, labels, number in zip(rows["task"], rows["labels"], rows["said"], strict=True):
        spec = get_task_spec(task)
        names = spec.labels(labels) if isinstance(spec, TextTaskSpec) else spec.choices
        words.append(names[number])
    shown = pd.DataFrame(
        {
            "condition": _conditions(rows),
            **columns,
            "said most": words + rows["share"].map(" {:.0f} %".format),
            "detectable": rows["detectable"].map("{:.0f} points".format, na_action="ignore"),
        }
    )
    _show_rows(shown.rename(columns={"auc": "AUC"}).fillna(""), rows, label)
    _offer(name_heads(rows.round(2), n_heads), label, directory, name)


def _conditions(rows: pd.DataFrame) -> pd.Series:
    """Name each row's condition, with the kind of removal where there are two."""
    kinds = rows["ablation"].map({"mean": ", mean", "zero": ", zero"})
    return figures.named_conditions(rows)["condition"].str.cat(kinds, na_rep="")


def show_published(model: str, documents: pd.DataFrame, number: int, directory: Path) -> None:
    """Display what is published in a table: beside a paper's model's run, else on its own.

    For one of the paper's models: the published value, the run's and their difference, row by row.
    For any other the published table of both models, under their names, since a difference would
    compare models.
    """
    title = f"table {number}, {{}}, {_REMOVAL[number]}, published"
    beside = comparison.overlay(model, documents)
    if beside is not None:
        rows = beside[beside["table"] == number].drop(columns="table").round(1)
        label = f"{title.format(comparison.published_name(model))} and recomputed"
        bounds = bounds_in_words(rows["low"], rows["high"], "{:.1f}")
        shown = pd.DataFrame(
            {
                "condition": figures.named_conditions(rows)["condition"],
                "heads": rows["heads"],
                "published": rows["published"],
                "this run": rows["accuracy"].map("{:.1f}".format) + bounds,
                "difference": rows["difference"].map("{:+.1f}".format),
                "inside": rows["inside"].map({True: "yes", False: "no"}),
            }
        )
        _show_rows(shown, rows, label)
        _offer(rows, label, directory, f"published-{number}")
        return
    for model_name in comparison.PAPER_MODELS.values():
        cells = _narrow(comparison.published_table(number, model_name))
        name = f"published-{number}-{model_name.lower()}"
        show_table(cells, label=title.format(model_name), directory=directory, name=name)


def show_published_scores() -> None:
    """Display the scores of Llama-3-8B that Feucht et al. published, to stand beside the paper's.

    The caption says how many heads score 0.3 or more and whether the best is the paper's.
    """
    scores = comparison.published_head_scores().query("model == 'Meta-Llama-3-8B'")
    count: Any = next(comparison.count_induction_heads(scores).itertuples())
    same = (count.layer, count.head) == (15, 30)
    facts = (
        f"{heads_in_words(count.induction / count.heads, count.heads)} "
        f"score 0.3 or more; the best is layer {count.layer}, head "
        f"{count.head}, with {count.score:.2f}, "
        f"{'the same head as' if same else 'another head than'} in the paper"
    )
    grid = scores.pivot(index="layer", columns="head", values="score")
    show_drawing(
        figures.score_heatmap, torch.tensor(grid.to_numpy()), label="next-token matching score",
        alt=f"Heatmap of layers by heads of Llama-3-8B, as published by Feucht et al.: {facts}.",
        caption=f"Llama-3-8B, as published by Feucht et al. (2025), not measured here: {facts}.",
    )  # fmt: skip


def _narrow(cells: pd.DataFrame) -> pd.DataFrame:
    """Drop the level of labels from a table where there is one kind only."""
    labels = cells.index.get_level_values("labels")
    return cells.droplevel("labels") if labels.nunique() == 1 else cells


def benefit_or_none(results: pd.DataFrame, documents: pd.DataFrame) -> pd.DataFrame:
    """Return :func:`benefit_changes`, or no rows and say so where no task is fit for it."""
    by_task = results.groupby(["task", "labels"])["shots"]
    if ((by_task.min() == 0) & (by_task.max() > 0)).any():
        return benefit_changes(results, documents)
    _say(
        "**No task was evaluated both with and without examples** (`shots` needs 0 and another "
        "number), so there is no benefit to show."
    )
    names = ("zero_shot", "few_shot", "benefit", "left_out", "relative_change", "low", "high")
    return pd.DataFrame(columns=[*CELL, *names])


def show_benefit(changes: pd.DataFrame, *, ablation: str, n_heads: int) -> None:
    """Display :func:`icl_helpers.results.figures.benefit_bars` with a computed caption."""
    out = left_out_tasks(changes)
    names = out["task"] + " (" + out["labels"] + ": " + out["why"] + ")"
    show_drawing(
        figures.benefit_bars, changes, ablation=ablation, n_heads=n_heads, alt=figures.benefit_alt,
        caption=(
            f"Relative change of the benefit of examples under {ablation} ablation; -100 % means "
            f"that examples help no more. Lines are 95 % intervals. Left out: "
            f"{', '.join(names) or 'none'}."
        ),
    )  # fmt: skip


def show_benefit_table(changes: pd.DataFrame, *, n_heads: int, directory: Path) -> None:
    """Display the benefit under every condition; the whole is written as ``benefit``."""
    label = "the benefit of examples, percent and points"
    bounds = bounds_in_words(changes["low"], changes["high"], "{:.0f}")
    change = changes["relative_change"].map("{:+.0f}".format) + bounds
    shown = pd.DataFrame(
        {
            "condition": _conditions(changes),
            "heads": name_heads(changes, n_heads)["heads"],
            **{name: changes[name].map("{:.1f}".format) for name in ("zero_shot", "few_shot")},
            "benefit": changes["benefit"].map("{:+.1f}".format),
            "change, %": change.where(
                changes["relative_change"].notna() & (changes["condition"] != "full"), ""
            ),
        }
    )
    _show_rows(shown.rename(columns=lambda name: name.replace("_", " ")), changes, label)
    _offer(name_heads(changes.round(2), n_heads), label, directory, "benefit")


def describe_text_tasks(tasks: Sequence[str]) -> str:
    """Say in Markdown what the text tasks of a run are: the paper's, or stand-ins for them."""
    if not tasks:
        return "**This run has no text tasks:** `nlp_tasks` is empty."
    stand_ins = [f"`{task}`" for task in tasks if task in STAND_IN_TASKS]
    if not stand_ins:
        return "These are tasks of the paper, on the rows of their data sets."
    return (
        f"**Stand-ins.** {' and '.join(stand_ins)} are not the paper's: their sentences were made "
        f"from templates for this project, so that this stage runs offline and on a model that "
        f"knows no English beyond them. They take the form of SST-2 and Subj, and nothing on this "
        f"page says how a model does on the real data sets. With `nlp_tasks` naming those, the "
        f"stage runs as it is."
    )


def text_task_table(data: Mapping[str, str]) -> pd.DataFrame:
    """Describe text tasks, given where each is read from: data, sizes and labels by task."""
    rows = {}
    for task, source in data.items():
        spec = text_spec(task)
        splits = load_splits(spec, data=source)
        rows[task] = {
            "data": spec.hub.path if spec.hub else "made from templates (stand-in)",
            "rows to draw examples from": len(splits.train),
            "rows to judge": len(splits.validation),
            "semantic labels": ", ".join(spec.labels("semantic")),
            "unrelated labels": ", ".join(spec.labels("unrelated")),
        }
    return pd.DataFrame.from_dict(rows, orient="index")
