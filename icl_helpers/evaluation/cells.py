"""Cells: one set of prompts scored under one condition, and groups of them that share prompts.

A group is what one worker takes: its prompts are built and tokenised once, every condition is
scored on them, and each finished cell goes to the store at once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load, save

from icl_helpers.attention.hook import attention_layout
from icl_helpers.errors import InputError
from icl_helpers.evaluation.conditions import Condition
from icl_helpers.evaluation.scorer import Encoded, InterventionLM
from icl_helpers.evaluation.store import CellStore
from icl_helpers.files import content_key
from icl_helpers.models.fingerprint import model_key
from icl_helpers.models.loading import load_model
from icl_helpers.tasks.lm_eval_task import load_task

__all__ = [
    "Cell",
    "CellGroup",
    "Job",
    "ModelSource",
    "pack",
    "run_job",
    "score_group",
    "stored_cells",
]


# A finished cell: everything that decides it, and its documents' columns.
Cell = tuple[dict[str, Any], dict[str, list[Any]]]


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

    def split(self, size: int) -> list[CellGroup]:
        """The same cells in groups of at most ``size``."""
        starts = range(0, len(self.conditions), size)
        return [replace(self, conditions=self.conditions[i : i + size]) for i in starts]

    def spec(self) -> dict[str, Any]:
        """What decides the prompts."""
        return {
            "task": self.task, "labels": self.labels, "shots": self.shots,
            "limit": self.limit, "data": self.data,
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


def score_group(
    load: Callable[[], InterventionLM],
    group: CellGroup,
    key: dict[str, Any],
    store: CellStore | None,
) -> list[Cell]:
    """Score the cells of a group in order, taking from the store what it has.

    ``key`` is :func:`model_key` of the model that ``load`` gives; it is asked for when the first
    cell is missing.
    """
    prompts = _prompt_set(group)
    lm: InterventionLM | None = None
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
            with lm.under(condition):
                documents = _score(lm, prompts.task, encoded)
            if store is not None:
                store.write(spec, documents)
        cells.append((spec, documents))
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
            found[place] = spec, documents
    return found


def _spec(
    group: CellGroup, condition: Condition, prompts: _PromptSet, key: dict[str, Any]
) -> dict[str, Any]:
    """Everything that decides a cell."""
    return {**group.spec(), "prompts": prompts.key, **key, **condition.identity()}


def _prompt_set(group: CellGroup) -> _PromptSet:
    loaded = load_task(
        group.task, shots=group.shots, seed=group.seed, labels=group.labels, data=group.data
    )
    loaded.build_all_requests(limit=group.limit, rank=0, world_size=1)
    pairs = [cast("tuple[str, str]", instance.args) for instance in loaded.instances]
    if not pairs:
        raise InputError(
            f"task {group.task} has no documents to evaluate; check its data ({group.data})"
        )
    # Without demonstrations a row's label is in no prompt, but it decides what is right.
    targets = [int(loaded.doc_to_target(instance.doc)) for instance in loaded.instances]
    return _PromptSet(loaded, pairs, content_key([pairs, targets]))


def _score(lm: InterventionLM, task: Any, encoded: Sequence[Encoded]) -> dict[str, list[Any]]:
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
        return [
            replace(
                self, group=group, means=self.means[start : start + size],
                cell_indices=self.cell_indices[start : start + size],
            )
            for start, group in zip(
                range(0, len(self.cell_indices), size), self.group.split(size), strict=True
            )
        ]  # fmt: skip


def pack(
    group: CellGroup,
    *,
    source: ModelSource,
    key: dict[str, Any],
    cells_dir: Path | None,
    cell_indices: Sequence[int],
) -> Job:
    """The job of scoring a group whose cells have these numbers."""
    means = tuple(_pack_means(condition) for condition in group.conditions)
    bare = tuple(replace(condition, head_outputs=None) for condition in group.conditions)
    directory = None if cells_dir is None else str(cells_dir.resolve())
    return Job(replace(group, conditions=bare), source, key, directory, means, tuple(cell_indices))


def run_job(job: Job) -> list[Cell]:
    """Score a job's cells; the model is loaded on a worker's first job and kept.

    One job at a time: the model is edited while it is scored. Raises :class:`InputError` when the
    worker's model is not the caller's.
    """
    with _BUSY:
        return _run(job)


def _run(job: Job) -> list[Cell]:
    lm, key = _loaded(job.source)
    if key != job.key:
        different = sorted(name for name in key if key[name] != job.key.get(name))
        raise InputError(
            f"the worker's model differs from the caller's in {', '.join(different)}; give every "
            f"machine the same package version and the same files of {job.source.name!r}"
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
        model, tokenizer = load_model(
            source.name, revision=source.revision, dtype=source.dtype, device=source.device,
            device_map=source.device_map, quantization=source.quantization,
            trust_remote_code=source.trust_remote_code, gguf_file=source.gguf_file,
        )  # fmt: skip
        lm = InterventionLM(model, tokenizer, batch_size=source.batch_size)
        _KEPT[source] = lm, model_key(model, tokenizer, source.revision)
    return _KEPT[source]


def _pack_means(condition: Condition) -> bytes | None:
    if condition.head_outputs is None:
        return None
    vectors = [condition.head_outputs[head.layer, :, head.head] for head in condition.heads]
    return save({"means": torch.stack(vectors).contiguous().cpu()})


def _with_means(condition: Condition, means: bytes, lm: InterventionLM) -> Condition:
    """The condition with means [layers, positions, heads, d_head]; zero for other heads."""
    vectors = load(means)["means"]
    layout = attention_layout(lm.model)
    full = vectors.new_zeros(layout.n_layers, vectors.shape[1], layout.n_heads, vectors.shape[2])
    for head, vector in zip(condition.heads, vectors, strict=True):
        full[head.layer, :, head.head] = vector
    return replace(condition, head_outputs=full)
