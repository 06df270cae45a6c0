"""Several runs side by side, and a run of one of the paper's models over the published values.

Example
-------
>>> compare_runs(["runs/icl-tiny", "runs/pythia-410m"])
>>> overlay("runs/llama-3-8b")
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from icl_helpers.errors import InputError
from icl_helpers.published import published_accuracy
from icl_helpers.statistics import accuracy_intervals
from icl_helpers.store import check_run_dir
from icl_helpers.tables import accuracy_means, published_name

__all__ = ["compare_runs", "overlay"]

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
