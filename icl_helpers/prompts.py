"""Few-shot prompts of the abstract pattern and text tasks (paper, sections 6 to 8).

Example
-------
>>> prompt = icl.build_prompts("repetition", shots=5, seed=42)[0]
>>> prompt.context.endswith(":"), prompt.choices
(True, ('Foo', 'Bar'))
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icl_helpers._paths import synthetic_dir, user_path
from icl_helpers.errors import InputError, MissingArtefactError
from icl_helpers.nlp_tasks import TextTaskSpec
from icl_helpers.sampling import Pool, Sampler, draw_demonstrations
from icl_helpers.task_registry import TaskSpec, get_task_spec, pattern_spec
from icl_helpers.text_prompts import text_contexts

__all__ = ["Prompt", "build_prompts", "data_file", "load_rows"]


@dataclass(frozen=True)
class Prompt:
    """One prompt: ``context`` + a choice is exactly the text that is scored.

    ``target`` is the index of the right choice, ``doc_id`` the row's place in its data set.
    """

    context: str
    choices: tuple[str, ...]
    target: int
    doc_id: int


def build_prompts(
    task: str, *, shots: int, seed: int, labels: str | None = None, data: str = "synthetic"
) -> list[Prompt]:
    """Prompts of all documents of a task, in order.

    Parameters
    ----------
    task
        A name from :func:`icl_helpers.task_names`.
    shots
        Demonstrations per prompt; 0 leaves the description and the query.
    seed
        Demonstration seed; the paper's are 42, 43 and 44.
    labels
        ``"semantic"`` or ``"unrelated"``; None: the task's default. The abstract tasks have
        unrelated labels only. A text task's choices carry the space before the label.
    data
        ``"synthetic"``: the data sets of this project; ``"original"``: the published repository's,
        fetched by ``icl data original``; or a directory that holds those files. NLP tasks come from
        the hub in the first two cases, and from ``<directory>/<task>/train.jsonl`` and
        ``validation.jsonl`` in the third.

    Raises
    ------
    InputError
        An unknown task or label set, shots that the pool cannot give, or rows that are malformed.
    MissingArtefactError
        The data are not there.
    """
    spec = get_task_spec(task)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"seed must be a whole number, got {seed!r}")
    if isinstance(spec, TextTaskSpec):
        choices = tuple(f" {word}" for word in spec.labels(labels))
        contexts = text_contexts(spec, shots=shots, seed=seed, labels=labels, data=data)
        return [
            Prompt(context, choices, target, doc_id)
            for doc_id, (context, target) in enumerate(contexts)
        ]
    if labels not in (None, spec.default_labels):
        raise InputError(f"task {task} has {spec.default_labels!r} labels only, got {labels!r}")
    return _pattern_prompts(spec, shots=shots, seed=seed, data=data)


def _pattern_prompts(spec: TaskSpec, *, shots: int, seed: int, data: str) -> list[Prompt]:
    rows = load_rows(spec.name, data=data)
    pool = _pool(tuple(rows), spec.sampler)
    drawn = draw_demonstrations(pool, rows, shots=shots, seed=seed)
    blocks = [f"{text}:{label}\n\n" for text, label in rows]
    target = {label: index for index, label in enumerate(spec.choices)}
    start = spec.description + "\n\n"
    return [
        Prompt(
            start + "".join(blocks[i] for i in demonstrations) + f"{text}:",
            spec.choices,
            target[label],
            doc_id,
        )
        for doc_id, ((text, label), demonstrations) in enumerate(zip(rows, drawn, strict=True))
    ]


@functools.lru_cache(maxsize=8)
def _pool(rows: tuple[tuple[str, str], ...], sampler: Sampler) -> Pool[str]:
    """The demonstrations' pool, kept for the other seeds: it remembers what it has looked up."""
    return Pool([text for text, _ in rows], [label for _, label in rows], sampler=sampler)


def data_file(task: str, *, data: str | os.PathLike[str] = "synthetic") -> Path:
    """File that holds an abstract task's rows."""
    spec = pattern_spec(task)
    if os.fspath(data) == "synthetic":
        return synthetic_dir() / f"{task}.json"
    if os.fspath(data) == "original":
        from icl_helpers.original_data import original_data_dir

        return original_data_dir() / spec.original_file
    directory = user_path(data)
    if not directory.is_dir():
        raise InputError(
            f"data must be 'synthetic', 'original' or a directory that holds the published JSON "
            f"files, got {os.fspath(data)!r}"
        )
    return directory / spec.original_file


def load_rows(task: str, *, data: str | os.PathLike[str] = "synthetic") -> list[tuple[str, str]]:
    """(text, label) of every row of an abstract task, checked."""
    path = data_file(task, data=data)
    if not path.is_file():
        raise MissingArtefactError(
            f"{path} is missing, which holds the rows of task {task}; put the published "
            f"repository's file there, or use data='synthetic'"
        )
    return list(_checked_rows(pattern_spec(task), path, path.stat().st_mtime_ns))


@functools.lru_cache(maxsize=32)
def _checked_rows(spec: TaskSpec, path: Path, modified: int) -> tuple[tuple[str, str], ...]:
    """Rows of a file; ``modified`` is there so that a changed file is read again."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, list) or not content:
        raise InputError(f"{path} must hold a list of rows, at least one")
    return tuple(_checked_row(spec, path, index, row) for index, row in enumerate(content))


def _checked_row(spec: TaskSpec, path: Path, index: int, row: Any) -> tuple[str, str]:
    text = row.get(spec.field) if isinstance(row, dict) else None
    label = row.get("label") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip() or label not in spec.choices:
        raise InputError(
            f"{path}, row {index}: expected {{'{spec.field}': text, 'label': one of "
            f"{', '.join(spec.choices)}}}, got {row!r}"
        )
    if spec.sampler == "disjoint_words" and len(text.split()) < 2:
        raise InputError(f"{path}, row {index}: expected two words, got {text!r}")
    return text, label
