"""Few-shot accuracy of a model under every condition, through lm-eval's task objects.

Prompts are built and tokenised once per task, shots and seed, and reused by every condition. With
a run directory each finished cell is kept, and a later call computes only what is missing.

Example
-------
>>> results = icl.evaluate(model, tokenizer, tasks=["repetition"], shots=[5, 10],
...                        conditions=icl.conditions(scores, ablations=("zero",)))
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import icl_helpers
from icl_helpers.attention import attention_layout, check_heads
from icl_helpers.condition import FULL, Condition
from icl_helpers.errors import InputError
from icl_helpers.lm import Encoded, InterventionLM
from icl_helpers.lm_eval_tasks import load_task
from icl_helpers.models import weights_fingerprint
from icl_helpers.store import CellStore, atomic_path, check_run_dir, set_aside
from icl_helpers.task_registry import get_task_spec

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


@dataclass(frozen=True)
class _PromptSet:
    """One task x labels x shots x seed: lm-eval's task object and its tokenised requests."""

    task: Any
    encoded: list[Encoded]
    key: str


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
    model_key = {
        "fingerprint": weights_fingerprint(model),
        "revision": revision,
        "dtype": str(model.dtype),
        "tokenizer": _tokenizer_key(tokenizer),
        "version": icl_helpers.__version__,
    }
    store = None if directory is None else CellStore(directory / "cells")
    frames: list[pd.DataFrame] = []
    with tqdm(total=len(plan) * len(chosen), desc="cells", unit="cell") as progress:
        for task, task_labels, n_shots, task_seeds in plan:
            prompts = _prompt_set(lm, task, task_labels, n_shots, task_seeds[0], limit, data)
            for condition in chosen:
                spec = {
                    "task": task, "labels": task_labels, "shots": n_shots, "limit": limit,
                    "data": data, "prompts": prompts.key, **model_key, **condition.identity(),
                }  # fmt: skip
                documents = None if store is None else store.read(spec)
                if documents is None:
                    with lm.under(condition):
                        documents = _score(lm, prompts)
                    if store is not None:
                        store.write(spec, documents)
                frames += [_document_frame(spec, seed, documents) for seed in task_seeds]
                progress.update()
            lm.forget_patterns()
    found = pd.concat(frames, ignore_index=True)
    return _finish(found, directory)


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


def _prompt_set(
    lm: InterventionLM, task: str, labels: str, shots: int, seed: int, limit: int | None, data: str
) -> _PromptSet:
    loaded = load_task(task, shots=shots, seed=seed, labels=labels, data=data)
    loaded.build_all_requests(limit=limit, rank=0, world_size=1)
    pairs = [cast("tuple[str, str]", instance.args) for instance in loaded.instances]
    if not pairs:
        raise InputError(f"task {task} has no documents to evaluate; check its data ({data})")
    digest = hashlib.sha256("\0".join(part for pair in pairs for part in pair).encode())
    return _PromptSet(loaded, lm.encode(pairs), digest.hexdigest()[:24])


def _tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _score(lm: InterventionLM, prompts: _PromptSet) -> dict[str, list[Any]]:
    """Score one cell and let lm-eval's task judge each document."""
    scored = lm._loglikelihood_tokens(prompts.encoded)
    by_document: dict[int, list[tuple[int, Any]]] = {}
    for instance, result in zip(prompts.task.instances, scored, strict=True):
        by_document.setdefault(instance.doc_id, []).append((instance.idx, (instance, result)))
    documents: dict[str, list[Any]] = {"doc_id": [], "correct": [], "margin": [], "valid": []}
    for doc_id, choices in by_document.items():
        choices.sort(key=lambda choice: choice[0])
        results = [result for _, (_, result) in choices]
        doc = choices[0][1][0].doc
        valid = all(math.isfinite(log_probability) for log_probability, _ in results)
        correct = bool(prompts.task.process_results(doc, results)["acc"]) if valid else False
        target = int(prompts.task.doc_to_target(doc))
        documents["doc_id"].append(doc_id)
        documents["correct"].append(correct)
        documents["margin"].append(_margin(results, target) if valid else None)
        documents["valid"].append(valid)
    return documents


def _margin(results: Sequence[tuple[float, bool]], target: int) -> float:
    wrong = [result[0] for index, result in enumerate(results) if index != target]
    return results[target][0] - max(wrong)


def _document_frame(spec: dict[str, Any], seed: int, documents: dict[str, Any]) -> pd.DataFrame:
    frame = pd.DataFrame(documents)
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
