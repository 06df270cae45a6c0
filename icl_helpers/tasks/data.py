"""Rows of the tasks: made for this project, published, from the hub, or from local files.

The published repository's files are not part of this project: ``icl data original`` downloads them
from the commit that the published results belong to, checks their hashes and caches them. Local
files of text tasks lie at ``DIRECTORY/<task>/train.jsonl`` and ``validation.jsonl`` (``test.jsonl``
where the task is evaluated on its test split) and have the columns of the data set on the hub.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from icl_helpers.errors import InputError, MissingArtefactError
from icl_helpers.files import (
    atomic_path,
    cache_dir,
    file_state,
    files_digest,
    read_text,
    synthetic_dir,
    user_path,
)
from icl_helpers.models.hub import go_offline_if_hub_unreachable
from icl_helpers.tasks.specs import (
    NLP_TASKS,
    HubSource,
    TaskSpec,
    TextTaskSpec,
    get_task_spec,
    pattern_spec,
)

__all__ = [
    "COMMIT", "HASHES", "HOLD_OUT_SEED", "TextSplits", "check_local", "check_rows", "data_file",
    "fetch_original", "hold_out", "is_published", "load_rows", "load_splits", "original_data_dir",
    "rows_digest",
]  # fmt: skip

HOLD_OUT_SEED = 42
Row = dict[str, Any]


class TextSplits(NamedTuple):
    """Rows, ``label`` 0 or 1: demonstrations come from ``train``, documents from ``validation``."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...]


def load_splits(spec: TextTaskSpec, *, data: str | os.PathLike[str] = "synthetic") -> TextSplits:
    """Both splits of a text task.

    ``data``: ``"synthetic"`` or ``"original"``, from the hub, or embedded for a stand-in; else a
    directory of local files. Raises :class:`InputError` for no directory and for a malformed row,
    naming file and row, and :class:`MissingArtefactError` where the hub cannot be reached or a file
    is not there, naming where to put it.
    """
    if os.fspath(data) not in ("synthetic", "original"):
        holds = f"{spec.name}/train.jsonl and {spec.name}/validation.jsonl"
        files = _local_files(spec, _directory(data, holds) / spec.name)
    elif spec.hub is None:
        files = _local_files(spec, synthetic_dir() / "text" / spec.name)
    else:
        return _from_hub(spec, spec.hub)
    return _from_files(spec, tuple(files), tuple(map(file_state, files)))


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
    """Check that the files that these tasks need are there; raises as :func:`load_splits`."""
    directory = user_path(data_dir)
    if not directory.is_dir():
        raise InputError(
            f"data_dir must be a directory that holds TASK/train.jsonl and TASK/validation.jsonl "
            f"for each NLP task, got {os.fspath(data_dir)!r}"
        )
    for name in tasks:
        if name in NLP_TASKS:
            _local_files(NLP_TASKS[name], directory / name)


def _directory(data: str | os.PathLike[str], holds: str) -> Path:
    directory = user_path(data)
    if not directory.is_dir():
        raise InputError(
            f"data must be 'synthetic', 'original' or a directory that holds {holds}, got "
            f"{os.fspath(data)!r}"
        )
    return directory


def _local_files(spec: TextTaskSpec, folder: Path) -> list[Path]:
    """The files of a task's splits."""
    train = folder / "train.jsonl"
    names = ["validation", (spec.hub and spec.hub.validation) or "validation"]
    others = [path for name in names if (path := folder / f"{name}.jsonl").is_file()]
    needs_split = spec.hub is not None and spec.hub.validation is None
    if not train.is_file() or not (others or needs_split):
        missing = folder / "validation.jsonl" if train.is_file() else train
        raise MissingArtefactError(
            f"{missing} is missing; task {spec.name} needs one JSON Lines file per split, "
            f"train.jsonl and validation.jsonl, in {folder}"
        )
    return [train, *others[:1]]


@functools.lru_cache(maxsize=8)
def _from_files(spec: TextTaskSpec, files: tuple[Path, ...], states: tuple[Any, ...]) -> TextSplits:
    """Splits of local files; their states are there so that a changed file is read again."""
    splits: list[tuple[str, list[Any]]] = []
    for path in files:
        rows = []
        # Not str.splitlines: a text may hold other line separators.
        for number, line in enumerate(read_text(path).split("\n"), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise InputError(f"{path}, line {number}: not valid JSON ({error})") from error
        splits.append((str(path), rows))
    return _as_splits(spec, splits)


@functools.lru_cache(maxsize=8)
def _from_hub(spec: TextTaskSpec, hub: HubSource) -> TextSplits:
    from datasets import load_dataset

    go_offline_if_hub_unreachable()
    where = f"{hub.path}{f' ({hub.config})' if hub.config else ''}"
    splits: list[tuple[str, list[Any]]] = []
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
        splits.append((f"{where}, {split}", rows))
    return _as_splits(spec, splits)


def _as_splits(spec: TextTaskSpec, splits: list[tuple[str, list[Any]]]) -> TextSplits:
    """The rows that were found where it is said, checked; of a single split a part is held out."""
    checked = []
    for where, rows in splits:
        if not rows:
            raise InputError(f"{where} holds no rows")
        checked.append([_checked_row(spec, row, f"{where}, row {i}") for i, row in enumerate(rows)])
    train, validation = checked if len(checked) == 2 else hold_out(checked[0])
    return TextSplits(tuple(train), tuple(validation))


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


COMMIT = "dbd3743"
_FOLDER = "lm-evaluation-harness/synthetic"
_URL = f"https://raw.githubusercontent.com/JoyC177/Induction_Heads_ICL/{COMMIT}/{_FOLDER}"
_TIMEOUT = 20

_LISTED = (Path(__file__).parent / "original.sha256").read_text().splitlines()
HASHES = {name: digest for digest, name in map(str.split, _LISTED)}


def original_data_dir() -> Path:
    """The cache: ``$ICL_CACHE_DIR/original`` or ``~/.cache/icl_helpers/original``."""
    return cache_dir() / "original"


def fetch_original(
    *,
    source: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Put the seven files into a directory and return it; None: :func:`original_data_dir`.

    Files that are there already and match their SHA-256 are kept. ``source`` is a clone of the
    published repository, or the directory of the files. Raises :class:`MissingArtefactError`,
    naming the file and where to put it by hand, when one cannot be had or does not match; a file is
    written only when it is whole.
    """
    target = original_data_dir() if cache_dir is None else user_path(cache_dir)
    files: dict[str, Path] = {}
    # A wrong source is an error even if nothing is missing any more.
    for name in () if source is None else HASHES:
        clone = Path(source or "")
        places = [folder / name for folder in (user_path(clone), user_path(clone) / _FOLDER)]
        if not any(place.is_file() for place in places):
            raise MissingArtefactError(f"{name} is neither in {clone} nor in {clone / _FOLDER}")
        files[name] = next(place for place in places if place.is_file())
    for name in tqdm(HASHES, desc="original data", unit="file"):
        path = target / name
        if path.is_file() and files_digest(path) == HASHES[name]:
            continue
        by_hand = (
            f"Get {_FOLDER}/{name} of github.com/JoyC177/Induction_Heads_ICL at commit {COMMIT} "
            f"and put it into {target}, or run: icl data original --from CLONE"
        )
        if source is not None:
            content = files[name].read_bytes()
        else:
            try:
                with urllib.request.urlopen(f"{_URL}/{name}", timeout=_TIMEOUT) as response:
                    content = response.read()
            except OSError as error:
                raise MissingArtefactError(
                    f"{name} cannot be downloaded ({error}). {by_hand}"
                ) from error
        if hashlib.sha256(content).hexdigest() != HASHES[name]:
            raise MissingArtefactError(
                f"{name} does not match its SHA-256 ({HASHES[name][:12]}...): not the file of "
                f"commit {COMMIT}. {by_hand}"
            )
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return target


def data_file(task: str, *, data: str | os.PathLike[str] = "synthetic") -> Path:
    """File that holds an abstract task's rows."""
    spec = pattern_spec(task)
    if os.fspath(data) == "synthetic":
        return synthetic_dir() / f"{task}.json"
    if os.fspath(data) == "original":
        return original_data_dir() / spec.original_file
    return _directory(data, "the published JSON files") / spec.original_file


def rows_digest(task: str, *, data: str | os.PathLike[str] = "synthetic") -> str | None:
    """SHA-256 of the files of a task's rows; None for this project's, the hub's and absent ones."""
    spec = get_task_spec(task)
    try:
        if os.fspath(data) == "synthetic":
            return None
        if isinstance(spec, TaskSpec):
            files = [data_file(task, data=data)]
        else:
            files = _local_files(spec, user_path(data) / task)
        return files_digest(*files)
    except (InputError, OSError):
        return None


def is_published(task: str, digest: str | None) -> bool:
    """Whether rows of this :func:`rows_digest` are an abstract task's own of the published code."""
    spec = get_task_spec(task)
    return isinstance(spec, TaskSpec) and digest == HASHES[spec.original_file]


def check_rows(task: str, *, data: str | os.PathLike[str] = "synthetic") -> None:
    """Read a task's rows, abstract or text. Raises as :func:`icl_helpers.build_prompts` does."""
    spec = get_task_spec(task)
    if isinstance(spec, TextTaskSpec):
        load_splits(spec, data=data)
    else:
        load_rows(task, data=data)


def load_rows(task: str, *, data: str | os.PathLike[str] = "synthetic") -> list[tuple[str, str]]:
    """(text, label) of every row of an abstract task, checked."""
    path = data_file(task, data=data)
    if not path.is_file():
        raise MissingArtefactError(
            f"{path} is missing, which holds the rows of task {task}; put the published "
            f"repository's file there, or use data='synthetic'"
        )
    return list(_checked_rows(pattern_spec(task), path, file_state(path)))


@functools.lru_cache(maxsize=32)
def _checked_rows(
    spec: TaskSpec, path: Path, state: tuple[Any, ...]
) -> tuple[tuple[str, str], ...]:
    """Rows of a file; its state is there so that a changed file is read again."""
    try:
        content: Any = json.loads(read_text(path))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, list) or not content:
        raise InputError(f"{path} must hold a list of rows, at least one")
    rows = []
    for index, row in enumerate(content):
        columns = row if isinstance(row, dict) else {}
        text, label = columns.get(spec.field), columns.get("label")
        if not isinstance(text, str) or not text.strip() or label not in spec.choices:
            raise InputError(
                f"{path}, row {index}: expected {{'{spec.field}': text, 'label': one of "
                f"{', '.join(spec.choices)}}}, got {row!r}"
            )
        if spec.sampler == "disjoint_words" and len(text.split()) < 2:
            raise InputError(f"{path}, row {index}: expected two words, got {text!r}")
        rows.append((text, label))
    return tuple(rows)
