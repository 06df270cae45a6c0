"""Cells: one set of prompts scored under one condition, and groups of them that share prompts.

A group is what one worker takes: its prompts are built and tokenised once, every condition is
scored on them, and each finished cell goes to the store at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from icl_helpers.errors import InputError
from icl_helpers.evaluation.conditions import FULL, Condition
from icl_helpers.evaluation.shared_work import Encoded
from icl_helpers.evaluation.store import CellStore
from icl_helpers.files import content_key
from icl_helpers.tasks.demonstrations import Rule
from icl_helpers.tasks.lm_eval_task import load_task
from icl_helpers.tasks.prompts import Prompt

__all__ = ["Cell", "CellGroup", "Scorer", "score_group", "stored_cells"]

# A finished cell: everything that decides it, and its documents' columns.
Cell = tuple[dict[str, Any], dict[str, list[Any]]]


class Scorer(Protocol):
    """What scores prompts: :class:`icl_helpers.evaluation.scorer.InterventionLM`."""

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Tokenise (context, label) pairs."""

    def share(self, conditions: Sequence[Condition]) -> None:
        """Keep what these conditions share, until :meth:`forget`."""

    def forget(self) -> None:
        """Drop what is kept."""

    def under(self, condition: Condition) -> AbstractContextManager[Any]:
        """Score under the condition inside the block."""

    def _loglikelihood_tokens(self, requests: Sequence[Encoded]) -> list[tuple[float, bool]]:
        """Log-probability and greediness of each label."""

    def blocked_pairs(self, requests: Sequence[Encoded]) -> list[int]:
        """How many query-key pairs the knockout blocks in each request's prompt."""


@dataclass(frozen=True)
class CellGroup:
    """Cells of one task x labels x shots x demonstration seed, a cell per condition."""

    task: str
    labels: str
    shots: int
    seed: int
    limit: int | None
    data: str
    conditions: tuple[Condition, ...]
    demonstrations: Rule | None = None

    def split(self, size: int) -> list[CellGroup]:
        """The same cells in groups of at most ``size``."""
        starts = range(0, len(self.conditions), size)
        return [replace(self, conditions=self.conditions[i : i + size]) for i in starts]

    def spec(self) -> dict[str, Any]:
        """What decides the prompts."""
        # What came later is named only where it is not the default: finished cells stay good.
        rule = {} if self.demonstrations is None else {"demonstrations": self.demonstrations}
        return {
            "task": self.task, "labels": self.labels, "shots": self.shots,
            "limit": self.limit, "data": self.data, **rule,
        }  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """What is evaluated, as JSON values, without the heads."""
        return {
            "task": self.task,
            "labels": self.labels,
            "shots": self.shots,
            "demonstration_seed": self.seed,
            "conditions": [
                [c.name, c.ablation, c.fraction, c.ablation_seed] for c in self.conditions
            ],
        }


@dataclass(frozen=True)
class _PromptSet:
    """lm-eval's task object, the text of its requests, and a hash of it and the answers."""

    task: Any
    pairs: list[tuple[str, str]]
    key: str
    prompts: list[Prompt]

    def counted(self, documents: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The documents of a cell, and what stands in the prompt of each."""
        shown = [self.prompts[doc_id] for doc_id in documents["doc_id"]]
        names = ("n_demonstrations", "n_leaked", "n_dropped")
        return documents | {name: [getattr(prompt, name) for prompt in shown] for name in names}


def score_group(
    load: Callable[[], Scorer],
    group: CellGroup,
    key: dict[str, Any],
    store: CellStore | None,
) -> list[Cell]:
    """Score the cells of a group in order, taking from the store what it has.

    ``key`` is :func:`model_key` of the model that ``load`` gives; it is asked for when the first
    cell is missing.
    """
    prompts = _prompt_set(group)
    lm: Scorer | None = None
    encoded: list[Encoded] = []
    cells = []
    for condition in group.conditions:
        spec = _spec(group, condition, prompts, key)
        documents = None if store is None else store.read(spec)
        if documents is None:
            if lm is None:
                lm = load()
                encoded = lm.encode(prompts.pairs)
                lm.share(group.conditions)
            # A prompt without demonstrations has an induction pattern of no pairs.
            unblocked = condition.ablation == "knockout" and group.shots == 0
            with lm.under(FULL if unblocked else condition):
                documents = _score(lm, prompts.task, encoded)
                if condition.ablation == "knockout":
                    first = {
                        i.doc_id: r for i, r in zip(prompts.task.instances, encoded, strict=True)
                    }
                    pairs = (
                        [0] * len(first) if unblocked else lm.blocked_pairs(list(first.values()))
                    )
                    documents["n_blocked"] = pairs
            if store is not None:
                store.write(spec, documents)
        cells.append((spec, prompts.counted(documents)))
    if lm is not None:
        lm.forget()
    return cells


def stored_cells(group: CellGroup, key: dict[str, Any], store: CellStore) -> dict[int, Cell]:
    """The cells of a group that the store has, by the place of their condition."""
    stems = [store.stem({**group.spec(), **condition.identity()}) for condition in group.conditions]
    # Building the prompts takes longer than looking whether there is any file for them.
    if not store.stems().intersection(stems):
        return {}
    prompts = _prompt_set(group)
    found = {}
    for place, condition in enumerate(group.conditions):
        spec = _spec(group, condition, prompts, key)
        documents = store.read(spec)
        if documents is not None:
            found[place] = spec, prompts.counted(documents)
    return found


def _spec(
    group: CellGroup, condition: Condition, prompts: _PromptSet, key: dict[str, Any]
) -> dict[str, Any]:
    """Everything that decides a cell."""
    return {**group.spec(), "prompts": prompts.key, **key, **condition.identity()}


def _prompt_set(group: CellGroup) -> _PromptSet:
    loaded = load_task(
        group.task, shots=group.shots, seed=group.seed, labels=group.labels, data=group.data,
        demonstrations=group.demonstrations,
    )  # fmt: skip
    loaded.build_all_requests(limit=group.limit, rank=0, world_size=1)
    pairs = [cast("tuple[str, str]", instance.args) for instance in loaded.instances]
    if not pairs:
        raise InputError(
            f"task {group.task} has no documents to evaluate; check its data ({group.data})"
        )
    # Without demonstrations a row's label is in no prompt, but it decides what is right.
    targets = [int(loaded.doc_to_target(instance.doc)) for instance in loaded.instances]
    return _PromptSet(loaded, pairs, content_key([pairs, targets]), loaded.prompts(group.shots))


def _score(lm: Scorer, task: Any, encoded: Sequence[Encoded]) -> dict[str, list[Any]]:
    """Score one cell: of each document the target, and of each of its labels what was found."""
    scored = lm._loglikelihood_tokens(encoded)
    by_document: dict[int, list[tuple[Any, Encoded, tuple[float, bool]]]] = {}
    for instance, request, result in zip(task.instances, encoded, scored, strict=True):
        by_document.setdefault(instance.doc_id, []).append((instance, request, result))
    documents: dict[str, list[Any]] = {
        "doc_id": [], "target": [], "log_probabilities": [], "n_tokens": [], "greedy": [],
    }  # fmt: skip
    for doc_id, choices in by_document.items():
        choices.sort(key=lambda choice: choice[0].idx)
        documents["doc_id"].append(doc_id)
        documents["target"].append(int(task.doc_to_target(choices[0][0].doc)))
        # JSON has no word for what is not finite.
        documents["log_probabilities"].append(
            [value if math.isfinite(value) else None for *_, (value, _) in choices]
        )
        documents["n_tokens"].append([len(label) for _, (_, _, label), _ in choices])
        documents["greedy"].append([greedy for *_, (_, greedy) in choices])
    return documents
