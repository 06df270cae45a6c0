"""Few-shot accuracy of a model under every condition, through lm-eval's task objects.

Prompts are built and tokenised once per task, shots and seed, and reused by every condition. With
a run directory each finished cell is kept, and a later call computes only what is missing.

Example
-------
>>> results = icl.evaluate(model, tokenizer, tasks=["repetition"], shots=[5, 10],
...                        conditions=icl.conditions(scores, ablations=("zero",)))
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pandas as pd
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icl_helpers.attention import attention_layout, check_heads
from icl_helpers.cells import Cell, CellGroup, model_key, score_group
from icl_helpers.condition import FULL, Condition
from icl_helpers.errors import InputError
from icl_helpers.failures import describe_failures, record_failures
from icl_helpers.lm import InterventionLM
from icl_helpers.scheduling import (
    FailedCellsError,
    Failure,
    Workers,
    as_workers,
    chunk_size,
    run_jobs,
)
from icl_helpers.store import CellStore, atomic_path, check_run_dir, set_aside
from icl_helpers.task_registry import get_task_spec
from icl_helpers.worker import Job, ModelSource, pack

__all__ = [
    "KEYS",
    "EvaluationResults",
    "collect_results",
    "document_results",
    "evaluate",
    "resolve_shots",
]

KEYS = [
    "task",
    "labels",
    "shots",
    "condition",
    "ablation",
    "fraction",
    "ablation_seed",
    "demonstration_seed",
]

Shots = int | Sequence[int] | Mapping[str, Sequence[int]] | None


class EvaluationResults(pd.DataFrame):
    """A tidy frame of accuracies; ``documents`` is the per-document frame behind it."""

    _metadata = ["documents"]  # noqa: RUF012 - the name and form that pandas looks for
    documents: pd.DataFrame


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str],
    shots: Shots = None,
    conditions: Sequence[Condition | str] = (FULL,),
    seeds: Sequence[int] = (42, 43, 44),
    limit: int | None = None,
    batch_size: int | str = "auto",
    run_dir: str | os.PathLike[str] | None = None,
    labels: str | None = None,
    data: str = "synthetic",
    revision: str | None = None,
    executor: Executor | Workers | None = None,
    source: ModelSource | None = None,
) -> EvaluationResults:
    """Accuracy of every task x shots x condition x demonstration seed, as a tidy frame.

    Parameters
    ----------
    tasks
        Task names; see :func:`icl_helpers.task_names`.
    shots
        One number, several, or a mapping from task to numbers; None: each task's own.
    conditions
        From :func:`icl_helpers.conditions`; ``"full"`` is the untouched model.
    seeds
        Demonstration seeds. Zero-shot prompts have no demonstrations: they are scored once and the
        row repeats for every seed.
    limit
        Only the first documents of each task; None: all.
    run_dir
        Keeps every finished cell below ``run_dir/cells`` and writes ``results.parquet`` and
        ``documents.parquet``.
    labels, data
        See :func:`icl_helpers.build_prompts`.
    executor, source
        Score the cells elsewhere: any ``concurrent.futures.Executor``, or the workers of
        :mod:`icl_helpers.scheduling`, and where they load ``model`` from. The results are those of
        this process.

    Returns
    -------
    EvaluationResults
        A DataFrame with columns task, labels, shots, condition, ablation, fraction, ablation_seed,
        demonstration_seed, n, n_invalid, accuracy. ``n_invalid`` documents had logits that were not
        finite; they are left out of ``n`` and ``accuracy``. Its attribute ``documents`` is
        the per-document frame, as :func:`document_results` describes it.

    Raises
    ------
    InputError
        Anything that cannot be evaluated, before the first forward pass over a prompt.
    FailedCellsError
        Workers gave up cells; all others are finished, and written below ``run_dir``.
    """
    chosen = [_as_condition(condition) for condition in conditions]
    plan = _plan(tasks, shots, seeds, labels)
    directory = None if run_dir is None else check_run_dir(run_dir)
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InputError(f"limit must be a whole number >= 1 or None, got {limit!r}")
    layout = attention_layout(model)
    for condition in chosen:
        check_heads(condition.heads, layout)
    lm = InterventionLM(model, tokenizer, batch_size=batch_size)
    key = model_key(model, tokenizer, revision)
    groups = [
        CellGroup(task, task_labels, n_shots, task_seeds[0], limit, data, tuple(chosen))
        for task, task_labels, n_shots, task_seeds in plan
    ]
    failures: list[Failure] = []
    if executor is None:
        store = None if directory is None else CellStore(directory / "cells")
        cells = _score_here(lm, groups, key, store)
    else:
        if source is None:
            raise InputError("with an executor, evaluate() needs source=ModelSource(name, ...)")
        source = replace(source, batch_size=batch_size)
        cells, failures = _score_elsewhere(as_workers(executor), source, groups, key, directory)
    seeds_of = [task_seeds for *_, task_seeds in plan for _ in chosen]
    frames = [
        _document_frame(*cells[number], seed)
        for number, task_seeds in enumerate(seeds_of)
        for seed in task_seeds
        if number in cells
    ]
    found = _finish(pd.concat(frames, ignore_index=True), directory) if frames else None
    if failures:
        raise FailedCellsError(describe_failures(failures, directory))
    return cast("EvaluationResults", found)


def collect_results(run_dir: str | os.PathLike[str], documents: pd.DataFrame) -> pd.DataFrame:
    """Merge ``documents`` into a run's files and return the accuracies of the whole run.

    Rows with the same key are replaced, so that a frame never holds two generations of a cell.
    """
    directory = check_run_dir(run_dir)
    path = directory / "documents.parquet"
    if path.is_file():
        kept = _read_parquet(path)
        if kept is not None:
            new = pd.MultiIndex.from_frame(documents[KEYS].drop_duplicates())
            kept = kept[~pd.MultiIndex.from_frame(kept[KEYS]).isin(new)]
            documents = pd.concat([kept, documents], ignore_index=True)
    results = _accuracies(documents)
    for frame, name in ((documents, "documents"), (results, "results")):
        with atomic_path(directory / f"{name}.parquet") as temporary:
            frame.to_parquet(temporary, index=False)
    return results


def document_results(run_dir: str | os.PathLike[str]) -> pd.DataFrame:
    """Per-document results of a run: the key columns, doc_id, correct, margin, valid.

    ``margin`` is the log-probability of the right label minus that of the best wrong one, in nats.
    """
    path = check_run_dir(run_dir) / "documents.parquet"
    if not path.is_file():
        raise InputError(f"{path} does not exist: evaluate into this run directory first")
    return pd.read_parquet(path)


def resolve_shots(task: str, shots: Shots) -> list[int]:
    """Numbers of demonstrations for a task: those given, or the task's own."""
    given = shots.get(task) if isinstance(shots, Mapping) else shots
    if given is None:
        return list(get_task_spec(task).default_shots)
    values = [given] if isinstance(given, int) else list(given)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InputError(f"shots must be whole numbers >= 0, got {value!r} for {task}")
    return values


def _plan(
    tasks: Sequence[str], shots: Shots, seeds: Sequence[int], labels: str | None
) -> list[tuple[str, str, int, list[int]]]:
    """(task, labels, shots, seeds that share these prompts), in order; checks all of them."""
    if isinstance(tasks, str) or not tasks:
        raise InputError(f"tasks must be a list of task names, got {tasks!r}")
    if not seeds:
        raise InputError(
            "seeds must hold at least one demonstration seed, for example [42, 43, 44]"
        )
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise InputError(f"seeds must be whole numbers, got {seed!r}")
    plan = []
    for task in dict.fromkeys(tasks):
        spec = get_task_spec(task)
        for n_shots in dict.fromkeys(resolve_shots(task, shots)):
            groups = [list(seeds)] if n_shots == 0 else [[seed] for seed in seeds]
            plan += [(task, labels or spec.default_labels, n_shots, group) for group in groups]
    return plan


def _as_condition(condition: Condition | str) -> Condition:
    if isinstance(condition, Condition):
        return condition
    if condition == "full":
        return FULL
    raise InputError(
        f"conditions must be 'full' or come from icl_helpers.conditions(scores, ...), got "
        f"{condition!r}"
    )


def _score_here(
    lm: InterventionLM, groups: Sequence[CellGroup], key: dict[str, Any], store: CellStore | None
) -> dict[int, Cell]:
    """Cells by their number, scored one after another in this process."""
    cells: dict[int, Cell] = {}
    with tqdm(total=_count(groups), desc="cells", unit="cell") as progress:
        for group in groups:
            for cell in score_group(lm, group, key, store):
                cells[len(cells)] = cell
                progress.update()
    return cells


def _score_elsewhere(
    workers: Workers,
    source: ModelSource,
    groups: Sequence[CellGroup],
    key: dict[str, Any],
    directory: Path | None,
) -> tuple[dict[int, Cell], list[Failure]]:
    """The same by workers; what they give up is recorded below the run directory."""
    store = None if directory is None else CellStore(directory / "cells")
    size = chunk_size(len(groups), len(groups[0].conditions), workers)
    jobs: list[Job] = []
    for group in groups:
        first = sum(len(job.places) for job in jobs)
        where = None if store is None else store.directory
        jobs += pack(group, source=source, key=key, cells_dir=where, first=first).split(size)
    cells: dict[int, Cell] = {}
    with tqdm(total=_count(groups), desc="cells", unit="cell") as progress:

        def keep(job: Job, found: list[Cell]) -> None:
            cells.update(zip(job.places, found, strict=True))
            progress.update(len(found))
            # Workers may not share the directory; where they do, the file is there already.
            for spec, documents in found:
                if store is not None and not store.path(spec).is_file():
                    store.write(spec, documents)

        failures = run_jobs(jobs, workers, on_cells=keep)
    if directory is not None:
        record_failures(directory, jobs, failures)
    return cells, failures


def _count(groups: Sequence[CellGroup]) -> int:
    return sum(len(group.conditions) for group in groups)


def _document_frame(spec: dict[str, Any], documents: dict[str, Any], seed: int) -> pd.DataFrame:
    # A cell read back from its file has its keys in another order.
    frame = pd.DataFrame(documents)[["doc_id", "correct", "margin", "valid"]]
    frame["margin"] = frame["margin"].astype("float64")
    values: dict[str, Any] = {**{key: spec.get(key) for key in KEYS}, "demonstration_seed": seed}
    for position, key in enumerate(KEYS):
        frame.insert(position, key, values[key])
    return frame.astype({"ablation_seed": "Int64", "demonstration_seed": "Int64", "shots": "int64"})


def _accuracies(documents: pd.DataFrame) -> pd.DataFrame:
    documents = documents.assign(
        right=documents["correct"].where(documents["valid"]).astype("float64")
    )
    grouped = documents.groupby(KEYS, dropna=False, sort=False)
    results = grouped.agg(
        n=("valid", "sum"), total=("valid", "size"), accuracy=("right", "mean")
    ).reset_index()
    results["n_invalid"] = results.pop("total") - results["n"]
    return results[[*KEYS, "n", "n_invalid", "accuracy"]]


def _finish(documents: pd.DataFrame, directory: Path | None) -> EvaluationResults:
    results = _accuracies(documents)
    invalid = int(results["n_invalid"].sum())
    if invalid:
        warnings.warn(
            f"{invalid} documents had logits that were not finite; they are counted in n_invalid "
            f"and left out of the accuracies",
            stacklevel=3,
        )
    if directory is not None:
        collect_results(directory, documents)
    found = EvaluationResults(results)
    found.documents = documents
    return found


def _read_parquet(path: Path) -> pd.DataFrame | None:
    try:
        return pd.read_parquet(path)
    except Exception as error:
        set_aside(path, f"is damaged ({type(error).__name__})")
        return None
