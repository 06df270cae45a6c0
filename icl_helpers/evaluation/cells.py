"""Cells: one set of prompts scored under one condition, and groups of them that share prompts.

A group is what one worker takes: its prompts are built and tokenised once, every condition is
scored on them, and each finished cell goes to the store at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, cast

from icl_helpers.errors import InputError
from icl_helpers.evaluation.conditions import FULL, Condition
from icl_helpers.evaluation.shared_work import Encoded
from icl_helpers.evaluation.store import CellStore
from icl_helpers.files import content_key, file_name
from icl_helpers.tasks.lm_eval_task import load_task
from icl_helpers.tasks.prompts import Prompt, PromptSet, sample_documents

__all__ = [
    "Cell", "CellGroup", "Prompts", "Scorer", "build", "score_documents", "score_group",
    "stored_cells",
]  # fmt: skip

# What is counted in each document's prompt.
COUNTS = ("n_demonstrations", "n_leaked", "n_dropped")
# A finished cell: everything that decides it, and its documents' columns.
Cell = tuple[dict[str, Any], dict[str, list[Any]]]


class Scorer(Protocol):
    """What scores prompts: :class:`icl_helpers.evaluation.scorer.InterventionLM`."""

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]: ...

    def share(self, conditions: Sequence[Condition]) -> None: ...

    def forget(self) -> None: ...

    def under(self, condition: Condition) -> AbstractContextManager[Any]: ...

    def _loglikelihood_tokens(self, requests: Sequence[Encoded]) -> list[tuple[float, bool]]: ...

    def blocked_pairs(self, requests: Sequence[Encoded], of: tuple[str, ...]) -> list[int]: ...


@dataclass(frozen=True)
class CellGroup(PromptSet):
    """Cells of one task x labels x shots x demonstration seed, a cell per condition."""

    limit: int | None
    conditions: tuple[Condition, ...]

    @property
    def seed(self) -> int:
        """The demonstration seed; of several, which then show nothing, the first."""
        return self.seeds[0]

    def split(self, size: int) -> list[CellGroup]:
        """The same cells in groups of at most ``size``."""
        starts = range(0, len(self.conditions), size)
        return [replace(self, conditions=self.conditions[i : i + size]) for i in starts]

    def spec(self) -> dict[str, Any]:
        """What decides the prompts."""
        spec = {
            "task": self.task, "labels": self.labels, "shots": self.shots,
            "limit": self.limit, "data": file_name(self.data),
        }  # fmt: skip
        # What came later is named only where it is not the default: finished cells stay good.
        sampled = {} if self.limit is None else {"sampling": self.sampling}
        ruled = {} if self.demonstrations is None else {"demonstrations": self.demonstrations}
        return spec | sampled | ruled

    @classmethod
    def of_spec(cls, spec: Mapping[str, Any], *, seed: int, data: str) -> CellGroup:
        """The group, without conditions, of a finished cell; its spec has no seed and no place."""
        values: dict[str, Any] = {f.name: spec[f.name] for f in fields(cls) if f.name in spec}
        # Without a limit, how one takes documents is nowhere.
        values = {"sampling": "", "demonstrations": None} | values
        return cls(**values | {"seeds": (seed,), "data": data, "conditions": ()})

    def prompts_name(self) -> str:
        """What an imported run finds the key of the group's prompts by."""
        return content_key([self.spec(), self.seed])

    def describe(self) -> dict[str, Any]:
        """What is evaluated, as JSON values, without the heads."""
        return {
            "task": self.task, "labels": self.labels, "shots": self.shots,
            "demonstration_seed": self.seed, "conditions": [list(c.row) for c in self.conditions],
        }  # fmt: skip


@dataclass(frozen=True)
class Prompts:
    """lm-eval's task object, the text of its requests, and a hash of it and the answers."""

    task: Any
    pairs: list[tuple[str, str]]
    key: str
    prompts: list[Prompt]

    def counted(self, documents: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The documents of a cell, and what stands in the prompt of each."""
        shown = [self.prompts[doc_id] for doc_id in documents["doc_id"]]
        return documents | {name: [getattr(prompt, name) for prompt in shown] for name in COUNTS}


def score_group(
    load: Callable[[], Scorer], group: CellGroup, key: dict[str, Any], store: CellStore | None
) -> list[Cell]:
    """Score a group's cells in order but for those in the store; ``key`` is the model's."""
    known = {} if store is None else _known_cells(group, key, store)
    if len(known) == len(group.conditions):
        return list(known.values())
    prompts = build(group)
    lm: Scorer | None = None
    encoded: list[Encoded] = []
    cells = []
    for condition in group.conditions:
        spec = _spec(group, condition, prompts.key, key)
        documents = None if store is None else _read(store, prompts, spec)
        if documents is None:
            if lm is None:
                lm = load()
                encoded = lm.encode(prompts.pairs)
                lm.share(group.conditions)
            # Without demonstrations an induction pattern has no pairs.
            bare = group.shots == 0
            scored = _score(lm, condition, prompts.task.instances, encoded, none_blocked=bare)
            documents = prompts.counted(scored)
            if store is not None:
                store.write(spec, documents)
        cells.append((spec, documents))
    if lm is not None:
        lm.forget()
    return cells


def stored_cells(group: CellGroup, key: dict[str, Any], store: CellStore) -> dict[int, Cell]:
    """The cells of a group that the store has, by the place of their condition."""
    stems = [store.stem(group.spec() | condition.identity()) for condition in group.conditions]
    # Building the prompts takes longer than looking whether there is any file for them.
    if not store.stems().intersection(stems):
        return {}
    known = _known_cells(group, key, store)
    if len(known) == len(group.conditions):
        return known
    prompts = build(group)
    return _read_all(group, prompts.key, key, lambda spec: _read(store, prompts, spec))


def _read(store: CellStore, prompts: Prompts, spec: dict[str, Any]) -> dict[str, Any] | None:
    """A stored cell's documents; one of an earlier version gets its counts."""
    documents = store.read(spec)
    if documents is None or set(COUNTS) <= set(documents):
        return documents
    documents = prompts.counted(documents)
    store.write(spec, documents)
    return documents


def _known_cells(group: CellGroup, key: dict[str, Any], store: CellStore) -> dict[int, Cell]:
    """Cells of an imported run, whose prompts are known by name: their data may not be here."""
    known = store.known_prompts.get(group.prompts_name())
    return {} if known is None else _read_all(group, known, key, store.read)


def _read_all(
    group: CellGroup,
    prompts: str,
    key: dict[str, Any],
    read: Callable[[dict[str, Any]], dict[str, Any] | None],
) -> dict[int, Cell]:
    cells = {}
    for number, condition in enumerate(group.conditions):
        spec = _spec(group, condition, prompts, key)
        if (documents := read(spec)) is not None:
            cells[number] = spec, documents
    return cells


def _spec(
    group: CellGroup, condition: Condition, prompts: str, key: dict[str, Any]
) -> dict[str, Any]:
    """Everything that decides a cell."""
    return {**group.spec(), "prompts": prompts, **key, **condition.identity()}


def build(group: CellGroup) -> Prompts:
    """Build the group's prompts. Raises as :func:`icl_helpers.build_prompts` does."""
    loaded = load_task(
        group.task, shots=group.shots, seed=group.seed, labels=group.labels, data=group.data,
        demonstrations=group.demonstrations,
    )  # fmt: skip
    samples = None
    if group.limit is not None:
        labels = [int(doc["target"]) for doc in loaded.eval_docs]
        samples = sample_documents(labels, group.limit, sampling=group.sampling)
    loaded.build_all_requests(samples=samples, rank=0, world_size=1)
    pairs = [cast("tuple[str, str]", instance.args) for instance in loaded.instances]
    if not pairs:
        raise InputError(
            f"task {group.task} has no documents to evaluate; check its data ({group.data})"
        )
    # Without demonstrations a row's label is in no prompt, but it decides what is right.
    targets = [int(instance.doc["target"]) for instance in loaded.instances]
    return Prompts(loaded, pairs, content_key([pairs, targets]), loaded.prompts(group.shots))


def score_documents(
    lm: Scorer, condition: Condition, prompts: Prompts, doc_ids: Collection[int]
) -> dict[str, list[Any]]:
    """Score some of the documents under a condition; columns as in a cell."""
    instances = [it for it in prompts.task.instances if it.doc["doc_id"] in doc_ids]
    encoded = lm.encode([instance.args for instance in instances])
    # Of a cell whose prompts have something to block, a few may have nothing.
    return _score(lm, condition, instances, encoded, none_blocked=True)


def _score(
    lm: Scorer, condition: Condition, instances: Sequence[Any], encoded: Sequence[Encoded], *,
    none_blocked: bool,
) -> dict[str, list[Any]]:  # fmt: skip
    """Columns of a cell; ``none_blocked`` allows a knockout of pairs that no prompt has."""
    knockout = condition.ablation == "knockout"
    blocked = lm.blocked_pairs(encoded, condition.categories) if knockout else []
    with lm.under(FULL if knockout and none_blocked and not any(blocked) else condition):
        scored = lm._loglikelihood_tokens(encoded)
    by_document: dict[int, list[tuple[Any, Encoded, tuple[float, bool]]]] = {}
    for instance, request, result in zip(instances, encoded, scored, strict=True):
        # lm-eval numbers the documents of a sample anew.
        by_document.setdefault(instance.doc["doc_id"], []).append((instance, request, result))
    documents: dict[str, list[Any]] = {
        "doc_id": [], "target": [], "log_probabilities": [], "n_tokens": [], "greedy": [],
    }  # fmt: skip
    for doc_id, choices in by_document.items():
        choices.sort(key=lambda choice: choice[0].idx)
        documents["doc_id"].append(doc_id)
        documents["target"].append(int(choices[0][0].doc["target"]))
        # JSON has no word for what is not finite.
        documents["log_probabilities"].append(
            [value if math.isfinite(value) else None for *_, (value, _) in choices]
        )
        documents["n_tokens"].append([len(label) for _, (_, _, label), _ in choices])
        documents["greedy"].append([greedy for *_, (_, greedy) in choices])
    if knockout:
        pairs = {it.doc["doc_id"]: n for it, n in zip(instances, blocked, strict=True)}
        documents["n_blocked"] = [pairs[doc_id] for doc_id in documents["doc_id"]]
    return documents
