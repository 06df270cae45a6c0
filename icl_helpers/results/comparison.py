"""Published accuracies and scores of heads; runs beside them, and runs or logs beside each other.

Example
-------
>>> print(compare_logs("out/base", "out/edited"))
>>> published_table(1, "Llama-3-8B")
>>> compare_runs({"a": ("icl-tiny", results, 64), "b": ("gpt2", other_results, 144)})
>>> overlay("meta-llama/Meta-Llama-3-8B", documents)
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from icl_helpers.attention.heads import SCORE_THRESHOLD
from icl_helpers.errors import InputError
from icl_helpers.evaluation.store import CELL, KEYS, ROW, document_results, keyed
from icl_helpers.files import read_text, user_path
from icl_helpers.results.statistics import accuracy_intervals, compare_documents
from icl_helpers.results.tables import (
    bounds_in_words,
    cell_frame,
    name_heads,
    published_accuracy,
    read_published,
)

__all__ = [
    "PAPER_MODELS", "LogComparison", "compare_logs", "compare_runs", "count_induction_heads",
    "overlay", "published_accuracy", "published_head_scores", "published_name", "published_table",
    "read_published",
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
    counts = groups.agg(heads=("score", "size"), induction=("induction", "sum"))
    return counts.join(groups[["score", "layer", "head"]].first()).reset_index()


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
    merged = published.merge(accuracy_intervals(documents), on=CELL)
    merged["difference"] = merged["accuracy"] - merged["published"]
    merged["inside"] = merged["published"].between(merged["low"], merged["high"])
    columns = ["table", *CELL, "published", "accuracy", "low", "high", "difference", "inside"]
    return name_heads(merged[columns], _PAPER_HEADS[name])


@dataclass(frozen=True)
class LogComparison:
    """Two logs or runs, task by task: ``table`` is :func:`compare_documents` of what both have.

    ``left_out`` names what only one of them has.
    """

    first: str
    second: str
    table: pd.DataFrame
    left_out: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        rows = json.loads(self.table.to_json(orient="records", double_precision=15))
        names = {"first": self.first, "second": self.second}
        return {**names, "rows": rows, "left_out": list(self.left_out)}

    def __str__(self) -> str:
        shown = self.table.rename(columns={"first": "A", "second": "B", "documents": "n"})
        bounds = bounds_in_words(shown["low"], shown["high"], "{:+.1f}")
        shown["B - A"] = shown["difference"].map("{:+.1f}".format) + bounds
        shown[["A", "B"]] = shown[["A", "B"]].map("{:.1f}".format)
        for p in ("p", "p_holm"):
            shown[p] = shown[p].map("{:.2g}".format)
        shown["distinguishable"] = shown["distinguishable"].map({True: "yes", False: "no"})
        keys = [name for name in CELL if name in shown and shown[name].notna().any()]
        columns = [*keys, "n", "runs", "A", "B", "B - A", "p", "p_holm", "distinguishable"]
        table = shown[columns].to_string(index=False, na_rep="")
        said = "Accuracy in percent; differences in points with 95 % intervals; p by Holm's method."
        return "\n".join([f"A  {self.first}", f"B  {self.second}", table, said, *self.left_out])


def compare_logs(
    first: str | os.PathLike[str], second: str | os.PathLike[str], *, metric: str | None = None
) -> LogComparison:
    """Compare two sample logs of lm-eval, or two runs, on the documents that both have.

    Documents are matched by their content, lm-eval's ``doc_hash``, in logs; in runs by their place,
    and their right labels must agree. Several logs of a task are draws of its demonstrations and
    crossed with the documents. Those with the same prompts belong together, where there are such;
    else they do in their order. Of logs of one side with the same prompts the latest counts. Tasks
    named ``TASK_seedN`` are draws of TASK.

    Parameters
    ----------
    first, second
        A ``samples_*.jsonl`` of ``--log_samples``, a folder that holds such files of one model, or
        the directory of a run.
    metric
        Of the logs: ``NAME`` or ``NAME,FILTER``, of values 0 and 1. Default: the first such.

    Raises
    ------
    InputError
        Files that are no sample logs, logs of several models in one folder, a metric that is not 0
        or 1, other documents, or nothing that can be compared.
    """
    sources = [user_path(source) for source in (first, second)]
    runs = [(source / "documents.parquet").is_file() for source in sources]
    if runs[0] != runs[1]:
        raise InputError(f"compare two logs or two runs: of {first} and {second} one is a run")
    if runs[0]:
        documents = [document_results(source) for source in sources]
        _check_targets(*documents)
    else:
        documents = _seeded(*(_logs(source, metric) for source in sources))
    table = compare_documents(*documents)
    if not runs[0]:
        table = table.drop(columns=CELL[1:])
    return LogComparison(str(first), str(second), table, tuple(_left_out(*documents)))


def _check_targets(first: pd.DataFrame, second: pd.DataFrame) -> None:
    """Refuse runs on other rows of a task."""
    columns = ["task", "labels", "doc_id", "target"]
    if "target" not in first or "target" not in second:
        return
    both = first[columns].drop_duplicates().merge(second[columns].drop_duplicates(), on=columns[:3])
    other = both[(both["target_x"] != both["target_y"]).fillna(False)]
    if len(other):
        raise InputError(
            f"document {other['doc_id'].iloc[0]} of {other['task'].iloc[0]} has another right "
            f"label in the second run: the runs are on other rows and cannot be compared"
        )


_LOG = re.compile(r"samples_(?P<task>.+?)(_seed\d+)?(_\d{4}-\d\d-\d\dT[^_]*)?\.jsonl")


def _logs(source: Path, metric: str | None) -> dict[str, list[pd.DataFrame]]:
    """Read sample logs by task, in the order of their names, which end in their dates."""
    files = [source] if source.is_file() else sorted(source.rglob("samples_*.jsonl"))
    if not files:
        raise InputError(
            f"{source} is no sample log, holds none (samples_*.jsonl, which lm-eval writes with "
            f"--log_samples and --output_path), and is not the directory of a run"
        )
    folders = sorted({str(file.parent) for file in files})
    if len(folders) > 1:
        raise InputError(f"{source} holds logs of several models; name one: {', '.join(folders)}")
    logs: defaultdict[str, list[pd.DataFrame]] = defaultdict(list)
    for file in files:
        named = _LOG.fullmatch(file.name)
        log, of = _read_log(file, metric), logs[named["task"] if named else file.stem]
        of[:] = [other for other in of if not _same_prompts(other, log)] + [log]
    return logs


def _read_log(file: Path, metric: str | None) -> pd.DataFrame:
    """Read of every document, under its hash, whether it is right and its prompt's hash."""
    rows, seen = {}, Counter[str]()
    # Not splitlines: a text may hold other ends of lines than this one.
    for number, line in enumerate(read_text(file).rstrip("\n").split("\n"), start=1):
        try:
            sample = json.loads(line)
            document, prompt, of = (sample[k] for k in ("doc_hash", "prompt_hash", "filter"))
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"line {number} of {file} is no sample of lm-eval: it needs doc_hash, prompt_hash "
                f"and filter, as --log_samples writes them"
            ) from None
        metric = metric or _first_metric(sample, file)
        name, _, wanted = metric.partition(",")
        if wanted and of != wanted:
            continue
        if sample.get(name) not in (0, 1):
            raise InputError(
                f"line {number} of {file}: {name} is {sample.get(name)!r}, neither 0 nor 1; name a "
                f"metric that is, of {', '.join(sample.get('metrics', ()))}"
            )
        # The same content twice is two documents.
        key = document if not seen[document] else f"{document}-{seen[document]}"
        seen[document] += 1
        rows[key] = {"correct": bool(sample[name]), "prompt": prompt}
    if not rows:
        raise InputError(f"{file} has no sample of {metric}")
    return pd.DataFrame.from_dict(rows, orient="index")


def _first_metric(sample: Mapping[str, Any], file: Path) -> str:
    for name in sample.get("metrics", ("acc", "exact_match")):
        if sample.get(name) in (0, 1):
            return f"{name},{sample['filter']}"
    raise InputError(f"{file} has no metric that is 0 or 1 in its first sample; name one")


def _same_prompts(first: pd.DataFrame, second: pd.DataFrame) -> bool:
    shared = first.index.intersection(second.index)
    return len(shared) > 0 and first.loc[shared, "prompt"].equals(second.loc[shared, "prompt"])


def _seeded(
    first: Mapping[str, Sequence[pd.DataFrame]], second: Mapping[str, Sequence[pd.DataFrame]]
) -> list[pd.DataFrame]:
    """Lay out both sides' logs as documents of runs, those that belong together under one seed."""
    sides: list[list[pd.DataFrame]] = [[], []]
    for task in dict.fromkeys([*first, *second]):
        ours, theirs = list(first.get(task, ())), list(second.get(task, ()))
        groups: list[tuple[pd.DataFrame | None, ...]] = [
            (a, b) for a in ours for b in theirs if _same_prompts(a, b)
        ]
        if not groups and ours and theirs:
            if len(ours) != len(theirs):
                raise InputError(
                    f"of {task} there are {len(ours)} and {len(theirs)} logs, and no two of them "
                    f"have the same prompts: which belong together cannot be told"
                )
            groups = list(zip(ours, theirs, strict=True))
        taken = {id(log) for group in groups for log in group}
        groups += [(log, None) for log in ours if id(log) not in taken]
        groups += [(None, log) for log in theirs if id(log) not in taken]
        for seed, group in enumerate(groups):
            for side, log in zip(sides, group, strict=True):
                if log is not None:
                    side.append(_as_documents(log, task, seed))
    return [pd.concat(side, ignore_index=True) for side in sides]


def _as_documents(log: pd.DataFrame, task: str, seed: int) -> pd.DataFrame:
    """Lay out a log as documents of a run; of its shots and heads it says nothing."""
    values = dict.fromkeys(KEYS, "") | {"task": task, "shots": -1, "fraction": float("nan")}
    values |= {"ablation_seed": -1, "demonstration_seed": seed}
    frame = log.rename_axis("doc_id").reset_index().assign(**values, valid=True)
    return frame[[*KEYS, "doc_id", "correct", "valid"]]


def _left_out(first: pd.DataFrame, second: pd.DataFrame) -> list[str]:
    """Name what only one side has, a line for each set of prompts under one condition."""
    keys = [*KEYS, "doc_id"]
    merged = keyed(first)[keys].merge(keyed(second)[keys], how="outer", on=keys, indicator=True)
    lines = []
    for side, kind in (("A", "left_only"), ("B", "right_only")):
        rows = merged[merged["_merge"] == kind]
        for key, column in rows.groupby(CELL, dropna=False, sort=False)["doc_id"]:
            cell = [str(part) for part in key if not pd.isna(part) and part not in ("", -1)]
            missing = column.unique()
            what = f"{len(missing)} documents of {', '.join(cell)}"
            some = ", ".join(str(document)[:12] for document in missing[:3])
            lines.append(f"only in {side}: {what} ({some}, ...)")
    return lines
