"""What runs inside a worker process: it loads the model once and scores groups of cells.

Everything that is sent to a worker is a :class:`Job`. Means travel as the vectors of the heads
that are ablated, so that a job stays small whatever the model's size.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from icl_helpers.attention import attention_layout
from icl_helpers.cells import Cell, CellGroup, model_key, score_group
from icl_helpers.condition import Condition
from icl_helpers.errors import InputError
from icl_helpers.lm import InterventionLM
from icl_helpers.models import load_model
from icl_helpers.parameters import StageParameters
from icl_helpers.store import CellStore

__all__ = ["Job", "ModelSource", "pack", "run_job", "source_of", "start_worker"]


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
    batch_size: int | str = "auto"
    gguf_file: str | None = None


def source_of(parameters: StageParameters) -> ModelSource:
    """Where workers get the model of a run."""
    values = parameters.as_dict()
    return ModelSource(
        values.pop("model"),
        **{f.name: values[f.name] for f in fields(ModelSource) if f.name in values},
    )


@dataclass(frozen=True)
class Job:
    """A group of cells, the model they are scored with, and where finished cells are kept.

    ``means`` has, per condition, the safetensors bytes of [heads, positions, d_head], or None;
    ``places`` the number by which the caller knows each cell.
    """

    group: CellGroup
    source: ModelSource
    key: dict[str, Any]
    cells_dir: str | None
    means: tuple[bytes | None, ...]
    places: tuple[int, ...]

    def split(self, size: int = 1) -> list[Job]:
        """The same cells in jobs of at most ``size``."""
        return [
            replace(
                self, group=group, means=self.means[start : start + size],
                places=self.places[start : start + size],
            )
            for start, group in zip(
                range(0, len(self.places), size), self.group.split(size), strict=True
            )
        ]  # fmt: skip


def pack(
    group: CellGroup,
    *,
    source: ModelSource,
    key: dict[str, Any],
    cells_dir: Path | None,
    places: Sequence[int],
) -> Job:
    """The job of scoring a group whose cells have these numbers."""
    means = tuple(_pack_means(condition) for condition in group.conditions)
    bare = tuple(replace(condition, head_outputs=None) for condition in group.conditions)
    directory = None if cells_dir is None else str(cells_dir.resolve())
    return Job(replace(group, conditions=bare), source, key, directory, means, tuple(places))


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


def start_worker(counter: Any) -> None:
    """Prepare a process of a pool: a GPU of its own, one CPU thread, an end with its parent.

    With one thread in every process, sums are rounded alike whatever the number of processes.
    """
    # Ctrl-C reaches the whole process group; the parent alone decides what to do about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


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
