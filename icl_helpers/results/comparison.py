"""The paper's published accuracies, and runs beside them and beside each other.

Example
-------
>>> compare_runs(["runs/icl-tiny", "runs/pythia-410m"])
>>> overlay("runs/llama-3-8b")
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from icl_helpers.errors import InputError
from icl_helpers.files import check_run_dir
from icl_helpers.results.statistics import accuracy_intervals
from icl_helpers.results.tables import (
    _GROUP,
    CONDITION_TITLES,
    ROW,
    _cells,
    _titled,
    accuracy_means,
    share_text,
    table_rows,
)

__all__ = [
    "PAPER_MODELS",
    "compare_published",
    "compare_runs",
    "overlay",
    "published_accuracy",
    "published_name",
    "published_table",
    "table1",
    "table3",
    "table4",
    "table5",
]


# Published name of each of the paper's models, by the last part of its hub id.
PAPER_MODELS = {"meta-llama-3-8b": "Llama-3-8B", "internlm2-20b": "InternLM2-20B"}


def published_accuracy() -> pd.DataFrame:
    """Every published accuracy, in percent, one row each; columns as in ``published/README.md``."""
    return pd.read_csv(Path(__file__).parents[1] / "published" / "accuracy.csv")


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


_ROW = ["task", "labels", "shots"]
_CELL = [*_ROW, "condition", "ablation", "fraction"]


def compare_runs(run_dirs: Sequence[str | os.PathLike[str]]) -> pd.DataFrame:
    """Accuracies of several runs, one row per run, task, labels, shots and condition.

    Columns: run (name of the directory), model, task, labels, shots, condition, ablation, fraction
    (of the model's heads), share (``smaller`` or ``larger`` of the run's fractions, ``""`` for the
    full model), documents (of each task), accuracy (percent, averaged over seeds), change (points,
    to the full model of the same run; 0 for that itself). Runs differ in which heads a fraction is,
    so compare by share rather than by fraction. Raises :class:`InputError` for a directory without
    results.
    """
    frames = [_accuracies(check_run_dir(run_dir)) for run_dir in run_dirs]
    if not frames:
        raise InputError("run_dirs is empty; give at least one run directory")
    return pd.concat(frames, ignore_index=True)


def _accuracies(run_dir: Path) -> pd.DataFrame:
    info = _info(run_dir)
    results = _selected(_parquet(run_dir, "results"), info)
    means = accuracy_means(results)
    full = means[means["condition"] == "full"].set_index(_ROW)["accuracy"].rename("full")
    means = means.join(full, on=_ROW)
    sizes = results.groupby("task")["n"].max().rename("documents")
    means = means.join(sizes, on="task")
    fractions = means.loc[means["fraction"] > 0, "fraction"]
    share = {0.0: ""} | dict.fromkeys(fractions, "smaller") | {fractions.max(): "larger"}
    means = means.assign(
        run=run_dir.name,
        model=info["model"],
        share=means["fraction"].map(share),
        change=means["accuracy"] - means["full"],
    )
    return means[["run", "model", *_CELL, "share", "documents", "accuracy", "change"]]


def overlay(run_dir: str | os.PathLike[str]) -> pd.DataFrame | None:
    """Published and recomputed accuracies of one of the paper's models, or None for any other.

    Columns: table (number in the paper), task, labels, shots, condition, ablation, fraction,
    published, accuracy, low, high (percent; the run's 95 % interval), difference (points, the run's
    minus the published) and inside (whether the published value lies in the interval). Only rows
    that the run evaluated at the published fraction are there.
    """
    directory = check_run_dir(run_dir)
    info = _info(directory)
    name = published_name(info["model"])
    if name is None:
        return None
    published = published_accuracy()
    published = published[published["model"] == name].rename(columns={"accuracy": "published"})
    ours = accuracy_intervals(_selected(_parquet(directory, "documents"), info))
    merged = published.merge(ours, on=_CELL, how="inner")
    merged["difference"] = merged["accuracy"] - merged["published"]
    merged["inside"] = merged["published"].between(merged["low"], merged["high"])
    columns = ["table", *_CELL, "published", "accuracy", "low", "high", "difference", "inside"]
    return merged[columns]


def _info(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "run.json"
    if not path.is_file():
        raise InputError(f"{path} does not exist; {run_dir} is not the directory of a run")
    info: dict[str, Any] = json.loads(path.read_text())
    return info


def _parquet(run_dir: Path, name: str) -> pd.DataFrame:
    path = run_dir / f"{name}.parquet"
    if not path.is_file():
        raise InputError(f"{path} does not exist: run the evaluation stages first (icl run)")
    return pd.read_parquet(path)


def _selected(frame: pd.DataFrame, info: dict[str, Any]) -> pd.DataFrame:
    """Rows of the run's last parameters: a directory may hold those of earlier ones too."""
    parameters = info.get("parameters", {})
    kept = frame["demonstration_seed"].isin(parameters.get("seeds", frame["demonstration_seed"]))
    if parameters.get("fractions"):
        kept &= frame["fraction"].isin([0.0, *parameters["fractions"]])
    return frame[kept]
