"""Few-shot prompts of the abstract pattern and text tasks (paper, sections 6 to 8).

Example
-------
>>> prompt = icl.build_prompts("repetition", shots=5, seed=42)[0]
>>> prompt.context.endswith(":"), prompt.choices
(True, ('Foo', 'Bar'))
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from icl_helpers.errors import InputError
from icl_helpers.tasks.data import data_file, is_published, load_rows, load_splits, rows_digest
from icl_helpers.tasks.demonstrations import Pool, Rule, check_rule, draw_demonstrations
from icl_helpers.tasks.specs import SAMPLINGS, Sampler, TaskSpec, TextTaskSpec, get_task_spec

__all__ = [
    "Prompt", "PromptSet", "Shots", "build_prompts", "demonstration_spans", "prompt_sets",
    "resolve_sampling", "resolve_shots", "sample_documents", "shuffled_labels",
]  # fmt: skip

Shots = int | Sequence[int] | Mapping[str, Sequence[int]] | None


@dataclass(frozen=True)
class Prompt:
    """One prompt: ``context`` + a choice is exactly the text that is scored.

    ``target`` is the index of the right choice, ``doc_id`` the row's place in its data set.
    ``n_demonstrations`` are shown; ``n_leaked`` of them are the document itself, by content, and
    ``n_dropped`` more were drawn and left out for that reason.
    """

    context: str
    choices: tuple[str, ...]
    target: int
    doc_id: int
    n_demonstrations: int = 0
    n_leaked: int = 0
    n_dropped: int = 0


@dataclass(frozen=True)
class PromptSet:
    """Prompts that are evaluated together, and the demonstration seeds for which they stand.

    Zero-shot prompts have no demonstrations: one set stands for all seeds. ``sampling`` is how a
    limit takes documents.
    """

    task: str
    labels: str
    shots: int
    seeds: tuple[int, ...]
    data: str
    demonstrations: Rule | None
    sampling: str


def prompt_sets(
    task: str,
    labels: str,
    shots: Sequence[int],
    seeds: Sequence[int],
    data: str,
    demonstrations: Rule | None,
    sampling: str,
) -> list[PromptSet]:
    """A task's prompts in sets, one a number of shots and seed; what is asked for twice is once."""
    if not seeds:
        raise InputError(
            "seeds must hold at least one demonstration seed, for example [42, 43, 44]"
        )
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise InputError(f"seeds must be whole numbers, got {seed!r}")
    drawn = tuple(dict.fromkeys(seeds))
    return [
        PromptSet(task, labels, n_shots, of, data, demonstrations, sampling)
        for n_shots in dict.fromkeys(shots)
        for of in ([drawn] if n_shots == 0 else [(seed,) for seed in drawn])
    ]


def resolve_shots(task: str, shots: Shots) -> list[int]:
    """Numbers of demonstrations for a task: those given, or the task's own."""
    of_task = shots.get(task) if isinstance(shots, Mapping) else shots
    if of_task is None:
        return list(get_task_spec(task).default_shots)
    values = [of_task] if isinstance(of_task, int) else list(of_task)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InputError(f"shots must be whole numbers >= 0, got {value!r} for {task}")
    return values


def resolve_sampling(task: str, digest: str | None, sampling: str | None) -> str:
    """How a limit takes documents: as given, else ``balanced`` over the labels.

    Of the abstract tasks' published files it takes the ``first``, as the published code does.
    """
    if sampling is None:
        return "first" if is_published(task, digest) else "balanced"
    if sampling not in SAMPLINGS:
        raise InputError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {sampling!r}")
    return sampling


def sample_documents(
    targets: Sequence[int], limit: int, *, sampling: str = "balanced", seed: int = 0
) -> list[int]:
    """Places of at most ``limit`` documents, in order.

    ``balanced``: as many of each label as of any other, so that one that is always said is right as
    often as chance has it. Each label's documents are shuffled by ``random.Random(seed)`` and taken
    in turn; where a label has too few, the others make up for it, and where the labels do not
    divide the limit, the first ones have one more. A smaller limit takes a part of a larger one's.
    """
    if sampling == "first":
        return list(range(min(limit, len(targets))))
    rng = random.Random(seed)
    by_label = []
    for label in sorted(set(targets)):
        places = [place for place, target in enumerate(targets) if target == label]
        rng.shuffle(places)
        by_label.append(places)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_label))
    return sorted(itertools.islice((place for place in turns if place is not None), limit))


def build_prompts(
    task: str,
    *,
    shots: int,
    seed: int,
    labels: str | None = None,
    data: str = "synthetic",
    demonstrations: Rule | None = None,
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
    demonstrations
        ``"exact"``: as many as asked for, never the document itself, or an error, also where a
        class has no rows for an even share. ``"fewer"``: fewer where a class has too few rows.
        ``"published"``: as the published code, which shows fewer without a word and takes a
        document's copy under another id for another row. None: ``"published"`` on the published
        repository's own files, else ``"exact"``.

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
    check_rule(demonstrations)
    if isinstance(spec, TextTaskSpec):
        return _text_prompts(spec, shots, seed, labels, data, demonstrations or "exact")
    if labels not in (None, spec.default_labels):
        raise InputError(f"task {task} has {spec.default_labels!r} labels only, got {labels!r}")
    return _pattern_prompts(spec, shots, seed, data, demonstrations)


def _pattern_prompts(
    spec: TaskSpec, shots: int, seed: int, data: str, rule: Rule | None
) -> list[Prompt]:
    rows = load_rows(spec.name, data=data)
    if rule is None:
        digest = rows_digest(spec.name, data=data)
        rule = "published" if is_published(spec.name, digest) else "exact"
    pool = _pool(tuple(rows), spec.sampler, f"task {spec.name}, {data_file(spec.name, data=data)}")
    drawn = draw_demonstrations(pool, rows, shots=shots, seed=seed, rule=rule)
    blocks = [f"{text}:{label}\n\n" for text, label in rows]
    target = {label: index for index, label in enumerate(spec.choices)}
    start = spec.description + "\n\n"
    return [
        Prompt(
            start + "".join(blocks[i] for i in shown.rows) + f"{text}:", spec.choices,
            target[label], doc_id, len(shown.rows), shown.n_leaked, shown.n_dropped,
        )
        for doc_id, ((text, label), shown) in enumerate(zip(rows, drawn, strict=True))
    ]  # fmt: skip


@functools.lru_cache(maxsize=8)
def _pool(rows: tuple[tuple[str, str], ...], sampler: Sampler, name: str) -> Pool:
    """The demonstrations' pool, kept for the other seeds: it remembers what it has looked up."""
    texts, labels = zip(*rows, strict=True)
    return Pool(texts, labels, sampler=sampler, name=name)


def _text_prompts(
    spec: TextTaskSpec,
    shots: int,
    seed: int,
    labels: str | None,
    data: str | os.PathLike[str],
    rule: Rule,
) -> list[Prompt]:
    """Prompts of every row of the validation split, in order; the choices carry a space."""
    words = spec.labels(labels)
    train, validation = load_splits(spec, data=data)
    documents = [spec.render(row) for row in train]
    pool = Pool(
        [_key(row) for row in train], [str(row["label"]) for row in train], sampler=spec.sampler,
        contents=documents, name=f"task {spec.name}, training split ({os.fspath(data)})",
    )  # fmt: skip
    queries = [(_key(row), str(row["label"])) for row in validation]
    asked = [spec.render(row) for row in validation]
    drawn = draw_demonstrations(
        pool, queries, shots=shots, seed=seed, same_split=False, contents=asked, rule=rule
    )
    blocks = [
        f"{text} {words[row['label']]}\n\n" for text, row in zip(documents, train, strict=True)
    ]
    return [
        Prompt(
            f"{spec.description}\n\n{''.join(blocks[i] for i in shown.rows)}{text}",
            tuple(f" {word}" for word in words), row["label"], doc_id,
            len(shown.rows), shown.n_leaked, shown.n_dropped,
        )
        for doc_id, (row, text, shown) in enumerate(zip(validation, asked, drawn, strict=True))
    ]  # fmt: skip


def _key(row: dict[str, object]) -> str:
    """A row's every column as text: equal for equal rows."""
    return json.dumps(row, sort_keys=True, default=str)


def demonstration_spans(prompt: Prompt) -> list[tuple[int, int]]:
    """Characters [start, end) of each demonstration, its blank line included, and of the query.

    Raises :class:`InputError` for a context that :func:`build_prompts` did not make.
    """
    start = prompt.context.find("\n\n") + 2
    ends = [label.end() + 2 for label in _shown_labels(prompt)]
    return list(itertools.pairwise([start, *ends, len(prompt.context)]))


def shuffled_labels(prompt: Prompt, *, seed: int) -> Prompt:
    """The prompt with its demonstrations' labels in another order; the query's stays as it is.

    As many demonstrations as before show each label. The order is drawn by ``random.Random`` from
    the seed and the document.
    """
    matches = _shown_labels(prompt)
    labels = [match[0] for match in matches]
    random.Random(f"{seed} {prompt.doc_id}").shuffle(labels)
    ends = [0, *(match.end() for match in matches)]
    pieces = [
        prompt.context[end : match.start()] + label
        for end, match, label in zip(ends, matches, labels, strict=False)
    ]
    return replace(prompt, context="".join(pieces) + prompt.context[ends[-1] :])


def _shown_labels(prompt: Prompt) -> list[re.Match[str]]:
    """The demonstrations' labels: what stands between a colon and a blank line."""
    names = "|".join(re.escape(choice) for choice in prompt.choices)
    labels = list(re.finditer(f"(?<=:)(?:{names})(?=\n\n)", prompt.context))
    if len(labels) != prompt.n_demonstrations:
        raise InputError(
            f"{len(labels)} labels stand in a prompt of {prompt.n_demonstrations} demonstrations, "
            f"which begins {prompt.context[:60]!r}; pass prompts of build_prompts()"
        )
    return labels
