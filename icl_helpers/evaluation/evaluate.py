"""Few-shot accuracy of a model under every condition, through lm-eval's task objects.

Prompts are built and tokenised once per task, shots and seed, and reused by every condition. With
a run directory each finished cell is kept, a later call computes only what is missing, and cells
that workers gave up are recorded one by one below ``run_dir/failed``.

Example
-------
>>> results = icl.evaluate(model, tokenizer, tasks=["repetition"], shots=[5, 10],
...                        conditions=icl.conditions(scores, ablations=("zero",)))
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from safetensors.torch import load, save
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from icl_helpers.attention.hook import attention_layout, check_heads
from icl_helpers.errors import InputError
from icl_helpers.evaluation.cells import Cell, CellGroup, score_group, stored_cells
from icl_helpers.evaluation.conditions import FULL, Condition
from icl_helpers.evaluation.scorer import InterventionLM
from icl_helpers.evaluation.store import CellStore, EvaluationResults, document_frame, write_results
from icl_helpers.evaluation.workers import (
    FailedCellsError,
    Failure,
    Workers,
    as_workers,
    chunk_size,
    run_jobs,
)
from icl_helpers.files import check_run_dir, content_key, user_path, write_json
from icl_helpers.models.fingerprint import model_key, model_name
from icl_helpers.models.loading import load_model
from icl_helpers.tasks.data import rows_digest
from icl_helpers.tasks.demonstrations import Rule, check_rule
from icl_helpers.tasks.prompts import (
    PromptSet,
    Shots,
    prompt_sets,
    resolve_sampling,
    resolve_shots,
)
from icl_helpers.tasks.specs import TextTaskSpec, get_task_spec

__all__ = [
    "Job", "ModelSource", "evaluate", "evaluate_groups", "pack", "plan_groups", "run_job",
]  # fmt: skip


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str],
    shots: Shots = None,
    conditions: Sequence[Condition | str] = (FULL,),
    seeds: Sequence[int] = (42, 43, 44),
    limit: int | None = None,
    sampling: str | None = None,
    batch_size: int | str = "auto",
    run_dir: str | os.PathLike[str] | None = None,
    labels: str | None = None,
    data: str = "synthetic",
    demonstrations: Rule | None = None,
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
    limit, sampling
        At most so many documents of each task; None: all. ``"balanced"`` over the labels, or the
        ``"first"``; None: see :func:`icl_helpers.tasks.prompts.resolve_sampling`.
    run_dir
        Keeps every finished cell below ``run_dir/cells`` and writes ``results.parquet`` and
        ``documents.parquet``.
    labels, data, demonstrations
        See :func:`icl_helpers.build_prompts`.
    executor, source
        Score the cells elsewhere: any ``concurrent.futures.Executor``, or the workers of
        :mod:`icl_helpers.evaluation.workers`, and where they load ``model`` from. The
        results are those of this process.

    Returns
    -------
    EvaluationResults
        A DataFrame with columns task, labels, shots, condition, ablation, fraction, control,
        ablation_seed, demonstration_seed, n, n_invalid, accuracy. ``n_invalid`` documents had
        logits that were not finite; they are left out of ``n`` and ``accuracy``.
        ``n_demonstrations`` and ``n_blocked`` are means over the documents of what their prompts
        show and a knockout blocks, ``n_leaked`` and ``n_dropped`` sums. Its attribute ``documents``
        is the per-document frame, as :func:`document_results` describes it.

    Raises
    ------
    InputError
        Anything that cannot be evaluated, before the first forward pass over a prompt.
    FailedCellsError
        Workers gave up cells; all others are finished, and written below ``run_dir``.
    """
    if isinstance(tasks, str) or not tasks:
        raise InputError(f"tasks must be a list of task names, got {tasks!r}")
    check_rule(demonstrations)
    sets = [
        prompts
        for task in dict.fromkeys(tasks)
        for prompts in prompt_sets(
            task, labels or get_task_spec(task).default_labels, resolve_shots(task, shots), seeds,
            data, demonstrations, resolve_sampling(task, rows_digest(task, data=data), sampling),
        )
    ]  # fmt: skip
    groups = plan_groups(sets, conditions=conditions, limit=limit)
    directory = None if run_dir is None else check_run_dir(run_dir)
    layout = attention_layout(model)
    for condition in groups[0].conditions:
        check_heads(condition.heads, layout)
    lm = InterventionLM(model, tokenizer, batch_size=batch_size)
    if source is not None:
        source = replace(source, batch_size=batch_size)
    key = model_key(model, tokenizer, revision)
    return evaluate_groups(groups, key, directory, lambda: lm, executor=executor, source=source)


def plan_groups(
    sets: Sequence[PromptSet], *, conditions: Sequence[Condition | str], limit: int | None
) -> list[CellGroup]:
    """Check the arguments of :func:`evaluate` that need no model, and divide them into groups."""
    distinct = _distinct(conditions)
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InputError(f"limit must be a whole number >= 1 or None, got {limit!r}")
    texts = [s.task for s in sets if isinstance(get_task_spec(s.task), TextTaskSpec)]
    if texts and any(condition.ablation == "knockout" for condition in distinct):
        raise InputError(
            f"task {texts[0]!r} is a text task, for whose prompts the paper defines no induction "
            f"pattern; leave out the knockout, or the task"
        )
    return [CellGroup(**vars(prompts), limit=limit, conditions=distinct) for prompts in sets]


def evaluate_groups(
    groups: Sequence[CellGroup],
    key: dict[str, Any],
    directory: Path | None,
    load: Callable[[], InterventionLM],
    *,
    setting: Callable[[str, str, str], str] = lambda *_: "",
    executor: Executor | Workers | None = None,
    source: ModelSource | None = None,
) -> EvaluationResults:
    """Results of groups for the model of ``key``, which ``load`` gives if a cell is missing here.

    Workers take it from ``source``. ``setting`` says, for a task and the name and ablation of a
    condition, what stands in that column: :meth:`icl_helpers.run.plan.Plan.row_key`. Raises as
    :func:`evaluate` does.
    """
    store = None if directory is None else CellStore(directory / "cells")
    failures: list[Failure[Job]] = []
    if executor is None:
        cells = _score_here(load, groups, key, store)
    else:
        if source is None:
            raise InputError("with an executor, evaluate() needs source=ModelSource(name, ...)")
        cells, failures = _score_elsewhere(as_workers(executor), source, groups, key, store)
    if directory is not None:
        _record_failures(directory, groups, key, failures)
    seeds_of = [group.seeds for group in groups for _ in group.conditions]
    frames = [
        document_frame(*cells[number], seed, setting=setting)
        for number in sorted(cells)
        for seed in seeds_of[number]
    ]
    results = write_results(pd.concat(frames, ignore_index=True), directory) if frames else None
    if failures:
        count = sum(len(failure.job.cell_indices) for failure in failures)
        cell = failures[0].job.group.describe()
        where = "" if directory is None else f" (all of them in {directory / 'failed'})"
        raise FailedCellsError(
            f"{count} cells failed, the others are finished and kept{where}. The first is "
            f"{cell['task']}, {cell['shots']} shots, seed {cell['demonstration_seed']}, "
            f"{cell['conditions'][0]}: {failures[0].reason}"
        )
    return cast("EvaluationResults", results)


def _distinct(conditions: Sequence[Condition | str]) -> tuple[Condition, ...]:
    """Conditions, each of them told apart by what the results say of it."""
    # What is asked for twice counts once, whether by name or by object. An identity hashes means.
    by_identity: dict[str, Condition] = {}
    for condition in conditions:
        if condition == "full":
            condition = FULL
        if not isinstance(condition, Condition):
            raise InputError(
                f"conditions must be 'full' or come from icl_helpers.conditions(scores, ...), got "
                f"{condition!r}"
            )
        by_identity.setdefault(content_key(condition.identity()), condition)
    distinct = tuple(by_identity.values())
    rows = Counter(condition.row for condition in distinct)
    twice = next((row for row, count in rows.items() if count > 1), None)
    if twice is not None:
        raise InputError(
            f"two conditions have the name, ablation, fraction, control and ablation_seed {twice}, "
            f"by which results are told apart; give one of them another ablation_seed, or evaluate "
            f"them in two calls"
        )
    return distinct


def _score_here(
    load: Callable[[], InterventionLM],
    groups: Sequence[CellGroup],
    key: dict[str, Any],
    store: CellStore | None,
) -> dict[int, Cell]:
    """Cells by their number, scored one after another in this process."""
    cells: dict[int, Cell] = {}
    total = sum(len(group.conditions) for group in groups)
    with tqdm(total=total, desc="cells", unit="cell") as progress:
        for group in groups:
            for cell in score_group(load, group, key, store):
                cells[len(cells)] = cell
                progress.update()
    return cells


def _score_elsewhere(
    workers: Workers,
    source: ModelSource,
    groups: Sequence[CellGroup],
    key: dict[str, Any],
    store: CellStore | None,
) -> tuple[dict[int, Cell], list[Failure[Job]]]:
    """The same by workers, which are given only what the store lacks."""
    size = chunk_size(len(groups), len(groups[0].conditions), workers)
    jobs: list[Job] = []
    cells: dict[int, Cell] = {}
    first = 0
    for group in groups:
        stored = {} if store is None else stored_cells(group, key, store)
        cells |= {first + number: cell for number, cell in stored.items()}
        missing = [number for number in range(len(group.conditions)) if number not in stored]
        if missing:
            where = None if store is None else store.directory
            rest = replace(group, conditions=tuple(group.conditions[number] for number in missing))
            indices = [first + number for number in missing]
            job = pack(rest, source=source, key=key, cells_dir=where, cell_indices=indices)
            jobs += job.split(size)
        first += len(group.conditions)
    with tqdm(total=first, initial=len(cells), desc="cells", unit="cell") as progress:

        def keep(job: Job, scored: list[Cell]) -> None:
            cells.update(zip(job.cell_indices, scored, strict=True))
            progress.update(len(scored))
            # Workers may not share the directory; where they do, the file is there already.
            for spec, documents in scored:
                if store is not None and not store.path(spec).is_file():
                    store.write(spec, documents)

        failures = run_jobs(jobs, workers, function=run_job, on_cells=keep)
    return cells, failures


def _record_failures(
    directory: Path,
    groups: Sequence[CellGroup],
    key: dict[str, Any],
    failures: Sequence[Failure[Job]],
) -> None:
    """Write what failed and why; take back the record of what has succeeded since."""

    def path(cell: CellGroup) -> Path:
        content = content_key([cell.describe(), cell.limit, cell.data, key])
        return directory / "failed" / f"{cell.task}_{content}.json"

    records = {
        path(cell): {**cell.describe(), "reason": failure.reason}
        for failure in failures
        for cell in failure.job.group.split(1)
    }
    if (directory / "failed").is_dir():
        for succeeded in {path(cell) for group in groups for cell in group.split(1)} - {*records}:
            succeeded.unlink(missing_ok=True)
    for failed, record in records.items():
        write_json(failed, record)


@dataclass(frozen=True)
class ModelSource:
    """Where a worker gets the model; the arguments of :func:`icl_helpers.load_model`.

    ``batch_size`` is that of :func:`icl_helpers.evaluate`.
    """

    name: str = "icl-tiny"
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    quantization: str | None = None
    trust_remote_code: bool = False
    gguf_file: str | None = None
    batch_size: int | str = "auto"

    def __post_init__(self) -> None:
        # A worker may stand in another folder.
        if user_path(self.name).exists():
            object.__setattr__(self, "name", model_name(self.name))


@dataclass(frozen=True)
class Job:
    """A group of cells, the model they are scored with, and where finished cells are kept.

    ``means`` has, per condition, the safetensors bytes of [heads, positions, d_head], or None;
    ``cell_indices`` the number by which the caller knows each cell.
    """

    group: CellGroup
    source: ModelSource
    key: dict[str, Any]
    cells_dir: str | None
    means: tuple[bytes | None, ...]
    cell_indices: tuple[int, ...]

    def split(self, size: int = 1) -> list[Job]:
        """The same cells in jobs of at most ``size``."""
        jobs = []
        for number, group in enumerate(self.group.split(size)):
            part = slice(number * size, (number + 1) * size)
            means, indices = self.means[part], self.cell_indices[part]
            jobs.append(replace(self, group=group, means=means, cell_indices=indices))
        return jobs


def pack(
    group: CellGroup,
    *,
    source: ModelSource,
    key: dict[str, Any],
    cells_dir: Path | None,
    cell_indices: Sequence[int],
) -> Job:
    """The job of scoring a group whose cells have these numbers."""
    means: list[bytes | None] = []
    for condition in group.conditions:
        outputs = condition.head_outputs
        vectors = () if outputs is None else [outputs[h.layer, :, h.head] for h in condition.heads]
        packed = save({"means": torch.stack(vectors).contiguous().cpu()}) if vectors else None
        means.append(packed)
    bare = tuple(replace(condition, head_outputs=None) for condition in group.conditions)
    directory = None if cells_dir is None else str(cells_dir.resolve())
    # A worker may stand in another folder.
    named = group.data in ("synthetic", "original")
    data = group.data if named else os.path.abspath(user_path(group.data))
    group = replace(group, conditions=bare, data=data)
    return Job(group, source, key, directory, tuple(means), tuple(cell_indices))


def run_job(job: Job) -> list[Cell]:
    """Score a job's cells, one job at a time; the model is loaded on a worker's first one.

    Raises :class:`InputError` when the worker's model is not the caller's.
    """
    with _BUSY:
        lm, key = _loaded(job.source)
        if key != job.key:
            different = sorted(name for name in key if key[name] != job.key.get(name))
            raise InputError(
                f"the worker's model differs from the caller's in {', '.join(different)}; give "
                f"every machine the same package version and the same files of {job.source.name!r}"
            )
        conditions = tuple(
            condition if means is None else _with_means(condition, means, lm)
            for condition, means in zip(job.group.conditions, job.means, strict=True)
        )
        store = None if job.cells_dir is None else CellStore(Path(job.cells_dir))
        return score_group(lambda: lm, replace(job.group, conditions=conditions), key, store)


# The one model of this process and its key; a dask worker may serve several runs in turn.
_KEPT: dict[ModelSource, tuple[InterventionLM, dict[str, Any]]] = {}
_BUSY = threading.Lock()


def _loaded(source: ModelSource) -> tuple[InterventionLM, dict[str, Any]]:
    if source not in _KEPT:
        _KEPT.clear()
        loading = asdict(source)
        batch_size = loading.pop("batch_size")
        model, tokenizer = load_model(**loading)
        lm = InterventionLM(model, tokenizer, batch_size=batch_size)
        _KEPT[source] = lm, model_key(model, tokenizer, source.revision)
    return _KEPT[source]


def _with_means(condition: Condition, means: bytes, lm: InterventionLM) -> Condition:
    """The condition with means [layers, positions, heads, d_head]; zero for other heads."""
    vectors = load(means)["means"]
    layout = attention_layout(lm.model)
    full = vectors.new_zeros(layout.n_layers, vectors.shape[1], layout.n_heads, vectors.shape[2])
    for head, vector in zip(condition.heads, vectors, strict=True):
        full[head.layer, :, head.head] = vector
    return replace(condition, head_outputs=full)
