"""Finished cells, one file each, and the tables of a run that are made from them.

A cell is one task x labels x shots x demonstration seed x condition. Its file's name and content
carry a key: a hash of everything that decides the number. The tables hold a row per document under
its key, and the accuracies made from them.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from icl_helpers.errors import InputError
from icl_helpers.files import (
    atomic_path,
    check_run_dir,
    content_key,
    imported_dir,
    quarantine,
    write_json,
)

__all__ = [
    "CELL", "KEYS", "ROW", "CellStore", "EvaluationResults", "accuracies", "document_frame",
    "document_results", "keyed", "merge_into_run_tables", "read_frame", "write_parquet",
    "write_results",
]  # fmt: skip

# Part of a cell's name: a file of another format is never in the way, and never read.
_FORMAT = 2


class CellStore:
    """Finished cells below one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @functools.cached_property
    def known_prompts(self) -> dict[str, str]:
        """Of an imported run: keys of sets of prompts, by :meth:`CellGroup.prompts_name`."""
        folder = imported_dir(self.directory.parent)
        if folder is None:
            return {}
        return json.loads((folder / "prompts.json").read_text(encoding="utf-8"))

    def path(self, spec: dict[str, Any]) -> Path:
        """File of the cell that ``spec`` describes."""
        return self.directory / f"{self.stem(spec)}_{content_key([_FORMAT, spec])}.json"

    def stem(self, spec: dict[str, Any]) -> str:
        """Start of the file's name, without the key; cells of other models share it."""
        parts = [spec["task"], spec["labels"], f"{spec['shots']}shot", spec["condition"]]
        parts += [spec["ablation"], f"{spec['fraction']:.4g}"]
        parts += [spec.get("control", ""), f"a{spec['ablation_seed']}"]
        return re.sub(r"[^A-Za-z0-9._-]", "-", "_".join(map(str, parts)))[:120]

    def stems(self) -> set[str]:
        """Starts of the names of all files."""
        return {path.name.rpartition("_")[0] for path in self.directory.glob("*.json")}

    def read(self, spec: dict[str, Any]) -> dict[str, Any] | None:
        """The cell's documents, or None when it is not there or damaged (then set aside)."""
        cell = _read_checked(self.path(spec), spec)
        return None if cell is None else cell["documents"]

    def write(self, spec: dict[str, Any], documents: dict[str, Any]) -> None:
        """Write a finished cell."""
        body = {"format": _FORMAT, "spec": spec, "documents": documents}
        write_json(self.path(spec), {**body, "checksum": content_key(body)})

    def cells(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Every valid cell of this format in the directory: its spec and its documents."""
        for path in sorted(self.directory.glob("*.json")):
            if (cell := _read_checked(path)) is not None:
                yield cell["spec"], cell["documents"]


def _read_checked(path: Path, spec: dict[str, Any] | None = None) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop("checksum")
        if checksum != content_key(content):
            raise ValueError("checksum differs")
        if content["format"] != _FORMAT:
            return None
        if spec not in (None, content["spec"]):
            raise ValueError("another cell's file")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        quarantine(path, f"is damaged ({type(error).__name__})")
        return None
    return content


# What a row of the tables is found by: of one set of prompts, under one condition, at its seeds.
ROW = ["task", "labels", "shots"]
CELL = [*ROW, "condition", "ablation", "fraction", "control"]
KEYS = [*CELL, "ablation_seed", "demonstration_seed"]


def keyed(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows whose keys are all there: those of earlier versions had no control."""
    return frame if "control" in frame else frame.assign(control="")


def _total(values: pd.Series) -> float:
    return float(values.sum(min_count=1))


# What is counted in each document's prompt, and how a row of the results sums it up.
_COUNTED: dict[str, Any] = {
    "n_demonstrations": "mean", "n_leaked": _total, "n_dropped": _total, "n_blocked": "mean",
}  # fmt: skip


class EvaluationResults(pd.DataFrame):
    """A tidy frame of accuracies; ``documents`` is the per-document frame behind it."""

    _metadata = ["documents"]  # noqa: RUF012 - the name and form that pandas looks for
    documents: pd.DataFrame


def document_frame(
    spec: dict[str, Any],
    documents: dict[str, Any],
    seed: int,
    *,
    setting: Callable[[str, str, str], str] = lambda *_: "",
) -> pd.DataFrame:
    """A cell's documents under its key, at one demonstration seed; see :func:`document_results`."""
    # In a cell's file a number that is not finite is null. Arrays are what a table on disk gives.
    scores = [np.array(values, dtype=np.float64) for values in documents["log_probabilities"]]
    valid = [bool(np.isfinite(values).all()) for values in scores]
    # As in lm-eval's accuracy, the first of equal labels.
    said = [int(v.argmax()) if ok else None for v, ok in zip(scores, valid, strict=True)]
    margins = [
        values[target] - np.delete(values, target).max() if ok else np.nan
        for values, target, ok in zip(scores, documents["target"], valid, strict=True)
    ]
    values: dict[str, Any] = {**{key: spec.get(key) for key in KEYS}, "demonstration_seed": seed}
    # Of the full model no share of the heads is removed, not a share of 0.
    values |= {"fraction": spec["fraction"] or np.nan, "control": spec.get("control", "")}
    frame = pd.DataFrame(
        {
            **values,
            "doc_id": documents["doc_id"],
            "correct": [c == target for c, target in zip(said, documents["target"], strict=True)],
            "margin": np.array(margins, dtype=np.float64),
            "valid": valid,
            "target": documents["target"],
            "chosen": said,
            "log_probabilities": scores,
            "n_tokens": [np.array(numbers) for numbers in documents["n_tokens"]],
            "greedy": [np.array(flags) for flags in documents["greedy"]],
            # Whole numbers that may be missing: rows of an earlier version have none.
            **{name: documents.get(name, pd.NA) for name in _COUNTED},
            "setting": setting(spec["task"], spec["condition"], spec["ablation"]),
        },
        index=range(len(valid)),
    )
    whole = ("ablation_seed", "demonstration_seed", "target", "chosen", *_COUNTED)
    return frame.astype({**dict.fromkeys(whole, "Int64"), "shots": "int64"})


def accuracies(documents: pd.DataFrame) -> pd.DataFrame:
    """One row per key: n, n_invalid, the accuracy of the valid documents, and their setting."""
    documents = keyed(documents)
    counts = {
        name: documents[name].astype("float64") if name in documents else np.nan
        for name in _COUNTED
    }
    documents = documents.assign(
        **counts,
        right=documents["correct"].where(documents["valid"]).astype("float64"),
        # Rows written outside a run, or before there were settings, have none.
        setting=documents["setting"].fillna("") if "setting" in documents else "",
    )
    grouped = documents.groupby(KEYS, dropna=False, sort=False)
    results = grouped.agg(
        n=("valid", "sum"), total=("valid", "size"), accuracy=("right", "mean"),
        setting=("setting", "first"), **{name: (name, how) for name, how in _COUNTED.items()},
    ).reset_index()  # fmt: skip
    results["n_invalid"] = results.pop("total") - results["n"]
    return results[[*KEYS, "n", "n_invalid", "accuracy", *_COUNTED, "setting"]]


def write_results(documents: pd.DataFrame, directory: Path | None) -> EvaluationResults:
    """The results of these documents, kept below the run directory; warns of invalid ones."""
    results = accuracies(documents)
    invalid = int(results["n_invalid"].sum())
    if invalid:
        warnings.warn(
            f"{invalid} documents had logits that were not finite; they are counted in n_invalid "
            f"and left out of the accuracies",
            stacklevel=3,
        )
    if directory is not None:
        merge_into_run_tables(directory, documents)
    shown = EvaluationResults(results.drop(columns="setting"))
    shown.documents = documents
    return shown


def merge_into_run_tables(run_dir: str | os.PathLike[str], documents: pd.DataFrame) -> pd.DataFrame:
    """Add ``documents`` to a run's tables and return the accuracies of the whole run.

    Rows with the same key are replaced. Each writer leaves its rows in a file of its own below
    ``parts``, of which the tables are assembled: several at once lose nothing and need no locks.
    """
    directory = check_run_dir(run_dir)
    folder = directory / "parts"
    # A part is named by its keys and the time; earlier ones with the same keys go.
    keys = keyed(documents)[KEYS].drop_duplicates().astype(object)
    name = content_key(sorted(map(str, keys.itertuples(index=False, name=None))))
    earlier = list(folder.glob(f"*-{name}.parquet"))
    write_parquet(folder / f"{time.time_ns():020}-{name}.parquet", documents)
    for path in earlier:
        path.unlink(missing_ok=True)
    parts: list[Path] | None = None
    # Whoever adds a part later sees this one; what was added meanwhile is not in these tables.
    while (newest := sorted(folder.glob("*.parquet"), reverse=True)) != parts:
        parts = newest
        # These rows count as the oldest: another writer may replace their part while it is read.
        frames = [documents, *map(_read_parquet, reversed(parts))]
        filled = [keyed(frame) for frame in frames if frame is not None and len(frame)]
        rows = pd.concat(filled, ignore_index=True)
        part = pd.Series(np.repeat(range(len(filled)), list(map(len, filled))))
        newest_of_key = part.groupby([rows[key] for key in KEYS], dropna=False).transform("max")
        whole = rows[part == newest_of_key].reset_index(drop=True)
        results = accuracies(whole)
        write_parquet(directory / "documents.parquet", whole)
        write_parquet(directory / "results.parquet", results)
    return results


def write_parquet(path: Path, frame: pd.DataFrame) -> None:
    """Write a table atomically, without its index."""
    with atomic_path(path) as temporary:
        frame.to_parquet(temporary, index=False)


def document_results(run_dir: str | os.PathLike[str]) -> pd.DataFrame:
    """Per-document results of a run: a row per document under its key.

    Columns: the key (task, labels, shots, condition, ablation, fraction, control, ablation_seed,
    demonstration_seed; fraction is missing for the full model, control empty but for random heads),
    and

    doc_id
        The document's place in its task.
    correct
        Whether the right label is the one chosen; False where ``valid`` is.
    margin
        Log-probability of the right label minus that of the best wrong one, in nats; NaN where
        ``valid`` is False.
    valid
        Whether the log-probabilities of all labels are finite.
    target, chosen
        Index of the right label, and of the one with the highest log-probability (of equal ones
        the first), which is lm-eval's ``acc``; ``chosen`` is missing where ``valid`` is False.
    log_probabilities
        Array: each label's log-probability after the prompt, summed over its tokens, in nats; NaN
        where it is not finite.
    n_tokens
        Array: the number of tokens of each label.
    greedy
        Array: whether each of the label's tokens is the most probable one at its place.
    n_demonstrations, n_leaked, n_dropped
        Demonstrations in the prompt; how many of them are the document itself, by content; and how
        many more were drawn and left out for that reason.
    n_blocked
        Query-key pairs that the knockout blocks in the prompt; missing under other conditions.

    Arrays are in the order of the task's labels, to which ``target`` and ``chosen`` are indices.
    Rows written by a version that did not keep them have nothing from ``target`` on, or no counts.
    """
    return read_frame(check_run_dir(run_dir) / "documents.parquet")


def read_frame(path: Path) -> pd.DataFrame:
    """A run's table; raises :class:`InputError` when it is not there or damaged."""
    if not path.is_file():
        raise InputError(
            f"{path} does not exist: run the stages before this one first, with this run_dir "
            f"(notebooks 1 to 6, or: icl run --run-dir {path.parent}), or make the run of a "
            f"bundle, which needs no model: icl import BUNDLE --run-dir {path.parent}"
        )
    frame = _read_parquet(path)
    if frame is None:
        raise InputError(
            f"{path} was damaged; run the evaluation again, which makes it anew from the finished "
            f"cells"
        )
    return frame


def _read_parquet(path: Path) -> pd.DataFrame | None:
    try:
        return pd.read_parquet(path)
    except Exception as error:
        quarantine(path, f"is damaged ({type(error).__name__})")
        return None
