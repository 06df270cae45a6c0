"""Rows of the text tasks: from the hub, from local JSON Lines files, or embedded.

Local files lie at ``DIRECTORY/<task>/train.jsonl`` and ``validation.jsonl`` (``test.jsonl`` where
the task is evaluated on its test split) and have the columns of the data set on the hub.
"""

from __future__ import annotations

import functools
import json
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icl_helpers._paths import synthetic_dir, user_path
from icl_helpers.errors import InputError, MissingArtefactError
from icl_helpers.hub import use_cache_where_hub_is_silent
from icl_helpers.nlp_tasks import NLP_TASKS, HubSource, TextTaskSpec

__all__ = ["HOLD_OUT_SEED", "TextSplits", "check_local", "hold_out", "load_splits"]

HOLD_OUT_SEED = 42
Row = dict[str, Any]


@dataclass(frozen=True)
class TextSplits:
    """Checked rows: demonstrations come from ``train``, documents from ``validation``.

    Each row's ``label`` is 0 or 1.
    """

    train: tuple[Row, ...]
    validation: tuple[Row, ...]


def load_splits(spec: TextTaskSpec, *, data: str | os.PathLike[str] = "synthetic") -> TextSplits:
    """Both splits of a text task.

    Parameters
    ----------
    data
        ``"synthetic"`` or ``"original"``: from the hub, or embedded for a stand-in; else a
        directory of local files.

    Raises
    ------
    InputError
        No such directory, or a malformed row, naming the file and the row.
    MissingArtefactError
        The hub cannot be reached or a file is not there, naming where to put it.
    """
    if os.fspath(data) not in ("synthetic", "original"):
        return _read(spec, *_local_files(spec, _directory(data, spec.name)))
    if spec.hub is None:
        return _read(spec, *_local_files(spec, synthetic_dir() / "text" / spec.name))
    return _from_hub(spec, spec.hub)


def hold_out(rows: list[Row], *, seed: int = HOLD_OUT_SEED) -> tuple[list[Row], list[Row]]:
    """Split rows into four fifths and one fifth, both in their old order.

    The indices are shuffled by ``random.Random(seed)`` and the first ``len(rows) * 4 // 5`` of them
    are the training split.
    """
    indices = list(range(len(rows)))
    random.Random(seed).shuffle(indices)
    cut = len(rows) * 4 // 5
    return [rows[i] for i in sorted(indices[:cut])], [rows[i] for i in sorted(indices[cut:])]


def check_local(data_dir: str | os.PathLike[str], tasks: Iterable[str]) -> None:
    """Check that the files of these tasks are there; abstract tasks and stand-ins need none.

    Raises as :func:`load_splits` does.
    """
    if not user_path(data_dir).is_dir():
        raise InputError(
            f"data_dir must be a directory that holds TASK/train.jsonl and TASK/validation.jsonl "
            f"for each NLP task, got {os.fspath(data_dir)!r}"
        )
    for name in tasks:
        if name in NLP_TASKS:
            _local_files(NLP_TASKS[name], _directory(data_dir, name))


def _directory(data: str | os.PathLike[str], task: str) -> Path:
    directory = user_path(data)
    if not directory.is_dir():
        raise InputError(
            f"data must be 'synthetic', 'original' or a directory that holds {task}/train.jsonl "
            f"and {task}/validation.jsonl, got {os.fspath(data)!r}"
        )
    return directory / task


def _local_files(spec: TextTaskSpec, folder: Path) -> list[tuple[Path, int]]:
    """The files of a task's splits with the times of their last change."""
    train = folder / "train.jsonl"
    names = ["validation", (spec.hub and spec.hub.validation) or "validation"]
    found = [path for name in names if (path := folder / f"{name}.jsonl").is_file()]
    needs_split = spec.hub is not None and spec.hub.validation is None
    if not train.is_file() or not (found or needs_split):
        missing = folder / "validation.jsonl" if train.is_file() else train
        raise MissingArtefactError(
            f"{missing} is missing; task {spec.name} needs one JSON Lines file per split, "
            f"train.jsonl and validation.jsonl, in {folder}"
        )
    return [(path, path.stat().st_mtime_ns) for path in (train, *found[:1])]


@functools.lru_cache(maxsize=8)
def _read(spec: TextTaskSpec, *files: tuple[Path, int]) -> TextSplits:
    """Splits of local files; the times are there so that a changed file is read again."""
    splits = [_checked(spec, _json_lines(path), str(path)) for path, _ in files]
    return _as_splits(*(splits if len(splits) == 2 else hold_out(splits[0])))


def _as_splits(train: list[Row], validation: list[Row]) -> TextSplits:
    return TextSplits(tuple(train), tuple(validation))


def _json_lines(path: Path) -> list[Any]:
    rows = []
    # Not str.splitlines: a text may hold other line separators.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise InputError(f"{path}, line {number + 1}: not valid JSON ({error})") from error
    return rows


@functools.lru_cache(maxsize=8)
def _from_hub(spec: TextTaskSpec, hub: HubSource) -> TextSplits:
    from datasets import load_dataset

    use_cache_where_hub_is_silent()
    where = f"{hub.path}{f' ({hub.config})' if hub.config else ''}"
    splits = []
    for split in filter(None, (hub.train, hub.validation)):
        try:
            rows = load_dataset(hub.path, hub.config, split=split, revision=hub.revision).to_list()
        # The hub's client raises errors of several libraries; each means the same to the user.
        except Exception as error:
            raise MissingArtefactError(
                f"the {split} split of {where} cannot be loaded from the Hugging Face hub "
                f"({type(error).__name__}: {error}). Load it once with a connection, give "
                f"data_dir=DIRECTORY with {spec.name}/train.jsonl and "
                f"{spec.name}/validation.jsonl, or leave the text tasks out: nlp_tasks=[]"
            ) from error
        splits.append(_checked(spec, rows, f"{where}, {split}"))
    return _as_splits(*(splits if len(splits) == 2 else hold_out(splits[0])))


def _checked(spec: TextTaskSpec, rows: list[Any], where: str) -> list[Row]:
    if not rows:
        raise InputError(f"{where} holds no rows")
    return [_checked_row(spec, row, f"{where}, row {index}") for index, row in enumerate(rows)]


def _checked_row(spec: TextTaskSpec, row: Any, where: str) -> Row:
    wanted = ", ".join(f"{name} ({kind.__name__})" for name, kind in spec.columns)
    if not isinstance(row, dict) or any(
        not isinstance(row.get(name), kind) or isinstance(row.get(name), bool)
        for name, kind in spec.columns
    ):
        raise InputError(f"{where}: expected the columns {wanted} and label, got {row!r}")
    label = row.get("label")
    if isinstance(label, bool):
        label = str(label)
    if label in spec.label_names:
        label = spec.label_names.index(label)
    if label not in (0, 1):
        raise InputError(
            f"{where}: label must be 0 ({spec.label_names[0]}) or 1 ({spec.label_names[1]}), got "
            f"{row.get('label')!r}"
        )
    return {**row, "label": int(label)}
