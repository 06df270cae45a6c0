"""Bundles: a run as a small directory, from which its stages execute without model and data.

A bundle holds what was found (every document's log-probabilities, prefix-matching scores), what
stages show beside it, and the means of the ablated heads at the positions that a prompt reached,
since later ones cannot matter. A manifest lists the SHA-256 of each file. An imported run keeps
its bundle in ``RUN/bundle``.

Example
-------
>>> export_run(icl.Run(parameters), "bundles/llama-3-8b")
>>> import_bundle("bundles/llama-3-8b", "runs/llama-3-8b")
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from icl_helpers.attention.heads import CONTROLS, Head
from icl_helpers.errors import InputError
from icl_helpers.evaluation.conditions import conditions
from icl_helpers.evaluation.store import (
    KEYS,
    CellStore,
    document_frame,
    merge_into_run_tables,
    read_frame,
)
from icl_helpers.files import (
    atomic_directory,
    atomic_path,
    check_run_dir,
    content_key,
    file_name,
    files_digest,
    imported_dir,
    user_path,
    write_json,
)
from icl_helpers.parameters import about
from icl_helpers.redaction import check_leaks, redact
from icl_helpers.results.viewer import PromptView
from icl_helpers.run.plan import GROUPS, Plan, bundle_name, run_info

__all__ = [
    "FORMAT", "Bundle", "BundledCell", "export_run", "import_bundle", "open_bundle",
]  # fmt: skip

# Raised whenever an older version would read a bundle wrongly.
FORMAT = 1
_MANIFEST = "manifest.json"
_COPIED = ("heads.json", "prefix_scores.safetensors")
_FILES = (
    *_COPIED, "attention.parquet", "cells.parquet", "means.parquet", "prompts.json", "run.json",
    "shown.json",
)  # fmt: skip
# Shares of attention are kept in steps of 1/255.
_STEPS = 255


@dataclass(frozen=True)
class BundledCell:
    """A finished cell, one demonstration seed that gives its prompts, and its rows of the tables.

    ``rows`` has of each its place in the order of the tables, its seed and its ``setting``.
    ``seed`` is None where the prompts could not be built again when the bundle was made.
    """

    spec: dict[str, Any]
    documents: dict[str, list[Any]]
    seed: int | None
    rows: list[tuple[int, int, str]]


class Bundle:
    """What a bundle holds; :func:`open_bundle` checks it first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def json(self, name: str) -> Any:
        """Content of a JSON file; raises :class:`InputError` naming one that cannot be read."""
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _refusal(self.folder, name, f"cannot be read ({error})") from None

    def table(self, name: str) -> list[dict[str, Any]]:
        """Rows of a table; raises as :meth:`json` does."""
        try:
            rows: list[dict[str, Any]] = pq.read_table(self.folder / name).to_pylist()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise _refusal(self.folder, name, f"cannot be read ({error})") from None
        return rows

    @functools.cached_property
    def shown(self) -> dict[str, Any]:
        """What stages show that needs the model or the data."""
        return self.json("shown.json")

    def cells(self) -> list[BundledCell]:
        """Every cell."""
        return [
            BundledCell(
                spec=json.loads(row.pop("spec")),
                seed=row.pop("seed"),
                rows=[tuple(rows) for rows in json.loads(row.pop("rows"))],
                documents={name: values for name, values in row.items() if values is not None},
            )
            for row in self.table("cells.parquet")
        ]

    def means(self, heads: Iterable[Head]) -> tuple[torch.Tensor, str] | None:
        """Means of heads ablated together [layers, positions, heads, d_head], and their key.

        Zero for other heads; None where there are none.
        """
        pairs = sorted(list(head) for head in heads)
        key = self.shown["means"]["keys"].get(content_key(pairs))
        if key is None:
            return None
        outputs, reach = self._means
        return outputs[:, : min(reach[layer, head] for layer, head in pairs)], key

    @functools.cached_property
    def _means(self) -> tuple[torch.Tensor, dict[tuple[int, int], int]]:
        n_layers, n_heads, d_head = self.shown["means"]["shape"]
        rows = self.table("means.parquet")
        reach = {(row["layer"], row["head"]): len(row["values"]) // d_head for row in rows}
        outputs = torch.zeros(n_layers, max(reach.values(), default=0), n_heads, d_head)
        for row in rows:
            vectors = torch.tensor(row["values"]).view(-1, d_head)
            outputs[row["layer"], : len(vectors), row["head"]] = vectors
        return outputs, reach

    def views(self) -> dict[str, PromptView]:
        """Attention of every head over the viewer's prompts, to the nearest of 255 steps."""
        views = {}
        rows = self.table("attention.parquet")
        for name, prompt in self.shown["views"].items():
            kinds: dict[str, dict[Head, torch.Tensor]] = {"pattern": {}, "plain": {}, "blocked": {}}
            size = len(prompt["spans"])
            for row in (row for row in rows if row["prompt"] == name):
                square = torch.zeros(size, size)
                shares = np.frombuffer(row["values"], np.uint8) / _STEPS
                square[torch.tril_indices(size, size).unbind()] = torch.from_numpy(shares).float()
                kinds[row["kind"]][Head(row["layer"], row["head"])] = square
            (pattern,) = kinds.pop("pattern").values()
            spans = tuple((start, end) for start, end in prompt["spans"])
            views[name] = PromptView(prompt["text"], spans, pattern.bool(), **kinds)
        return views


def _refusal(folder: Path, name: str, why: str) -> InputError:
    return InputError(f"bundle {folder}: {name} {why}; get the bundle again from where it was made")


def open_bundle(directory: str | os.PathLike[str]) -> Bundle:
    """Check a bundle and return it.

    Raises :class:`InputError` naming the file that is damaged, edited, missing or not the bundle's,
    and for a bundle of a newer format.
    """
    folder = user_path(directory)
    if not (folder / _MANIFEST).is_file():
        raise InputError(f"{folder} is no bundle: it holds no {_MANIFEST}")
    manifest = Bundle(folder).json(_MANIFEST)
    stated = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(stated, int) or not isinstance(manifest.get("files"), dict):
        raise _refusal(folder, _MANIFEST, "is damaged: it lacks the format or the files")
    if stated > FORMAT:
        raise InputError(
            f"bundle {folder} has format {stated}, this version reads {FORMAT}: update icl-helpers"
        )
    here = {path.name for path in folder.iterdir()} - {_MANIFEST}
    for name in sorted({*_FILES, *manifest["files"], *here}):
        if name not in _FILES or name not in manifest["files"]:
            raise _refusal(folder, name, "is not part of it")
        path = folder / name
        if name not in here or not path.is_file() or path.is_symlink():
            raise _refusal(folder, name, "is missing")
        if files_digest(path) != manifest["files"][name]["sha256"]:
            raise _refusal(folder, name, "is damaged or was edited (its SHA-256 is another)")
    return Bundle(folder)


def import_bundle(directory: str | os.PathLike[str], run_dir: str | os.PathLike[str]) -> Path:
    """Make the run of a bundle below ``run_dir``, and return that directory.

    A run that was imported from this bundle stays as it is. Raises :class:`InputError` as
    :func:`open_bundle` does, and where another run lies there.
    """
    bundle = open_bundle(directory)
    target = check_run_dir(run_dir)
    digest = files_digest(bundle.folder / _MANIFEST)
    if (target / "run.json").is_file():
        if run_info(target).get("imported") == digest:
            return target
        raise InputError(f"{target} holds another run; give another run_dir, or remove that one")
    cells = bundle.cells()
    store = CellStore(target / "cells")
    for cell in cells:
        store.write(cell.spec, cell.documents)
    rows = sorted((*row, cell) for cell in cells for row in cell.rows)
    frames = [
        document_frame(cell.spec, cell.documents, seed, setting=lambda *_, it=setting: it)
        for _, seed, setting, cell in rows
    ]
    if frames:
        merge_into_run_tables(target, pd.concat(frames, ignore_index=True))
    for name in (*_FILES, _MANIFEST):
        for path in (target / "bundle" / name, *([target / name] if name in _COPIED else [])):
            with atomic_path(path) as temporary:
                temporary.write_bytes((bundle.folder / name).read_bytes())
    info = bundle.json("run.json")
    # What a bundle says may not run code, nor take hours.
    info["parameters"] |= {"run_dir": os.fspath(run_dir), "trust_remote_code": False}
    info["parameters"]["measure"] = False
    # Last: what was cut off before is imported anew.
    write_json(target / "run.json", info | {"imported": digest})
    return target


def export_run(run: Any, out: str | os.PathLike[str]) -> Path:
    """Write a run as a bundle into the new directory ``out``, and return that directory.

    ``run`` is a :class:`icl_helpers.Run` whose model and data are here: attention over the viewer's
    prompts is computed, and so are scores and means that are not there yet. Exported is every
    finished cell of the run's model; of mean ablation those with its present means. Of an imported
    run its bundle is written, with what was measured since.

    Raises :class:`InputError` where ``out`` exists or nothing was added to an imported run, and
    :class:`icl_helpers.LeakError` rather than publish a secret.
    """
    target = user_path(out)
    if target.exists():
        raise InputError(f"{target} exists; give a directory that does not, or remove it first")
    imported = imported_dir(run.directory)
    if imported is not None:
        return _with_measurements(run, open_bundle(imported), target)
    run.prefix_scores()
    means = run.mean_head_outputs()
    cells = _table_rows(run.directory, _cells(run, means))
    prompts, longest = _prompts(run, cells)
    views = run.views(every=True)
    keys = {content_key(c.spec["heads"]): c.spec["means"] for c in cells if "means" in c.spec}
    n_layers, _, n_heads, d_head = means.shape
    shown = {
        "views": {name: {"text": view.text, "spans": view.spans} for name, view in views.items()},
        "means": {
            "shape": [n_layers, n_heads, d_head], "keys": keys, "of": run.plan.means_parameters(),
        },
    }  # fmt: skip
    with atomic_directory(target) as folder:
        for name in _COPIED:
            (folder / name).write_bytes((run.directory / name).read_bytes())
        _write_cells(folder / "cells.parquet", cells)
        _write_means(folder / "means.parquet", means, cells, longest)
        _write_attention(folder / "attention.parquet", views)
        write_json(folder / "prompts.json", prompts)
        write_json(folder / "run.json", _published(run.info, run.directory.name))
        write_json(folder / "shown.json", {**run.showcase(), **shown})
        check_leaks(folder)
        missing = _missing_rows(run)
        manifest = {
            "format": FORMAT, "model": bundle_name(run.parameters.model),
            "finished": missing == 0, "rows_missing": missing, "cells": len(cells),
            "documents": sum(len(cell.documents["doc_id"]) for cell in cells),
            "versions": run.info["versions"], "files": _file_facts(folder),
        }  # fmt: skip
        write_json(folder / _MANIFEST, manifest)
    return target


def _with_measurements(run: Any, bundle: Bundle, target: Path) -> Path:
    """Write a bundle again, with what was measured in the run that was imported from it."""
    measured = run.measurements()
    if not measured:
        raise InputError(f"{run.directory} was imported; pass on its bundle, {bundle.folder}")
    manifest, shown, info = bundle.json(_MANIFEST), bundle.shown, bundle.json("run.json")
    # What was looked at is what the bundle's runs will look for.
    for name in ("analysis_tasks", "analysis_limit"):
        info["parameters"][name] = getattr(run.parameters, name)
    with atomic_directory(target) as folder:
        for name in _FILES:
            (folder / name).write_bytes((bundle.folder / name).read_bytes())
        write_json(folder / "run.json", info)
        write_json(folder / "shown.json", shown | {"values": {**shown["values"], **measured}})
        check_leaks(folder)
        write_json(folder / _MANIFEST, manifest | {"files": _file_facts(folder)})
    return target


def _file_facts(folder: Path) -> dict[str, Any]:
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": files_digest(folder / name)}
        for name in _FILES
    }


def _cells(run: Any, means: torch.Tensor) -> list[BundledCell]:
    """Finished cells of the run's model, by what decides them."""
    key, scores = run.identity["key"], run.prefix_scores().mean(0)

    @functools.cache
    def present(fraction: float, seed: int | None) -> set[str]:
        """Keys of the present means of the heads at a fraction, by whichever control."""
        seeds = [] if seed is None else [seed]
        ablated = conditions(
            scores, fractions=[fraction], ablations=["mean"], head_outputs=means,
            ablation_seeds=seeds, control=CONTROLS, full=False,
        )  # fmt: skip
        return {condition.identity()["means"] for condition in ablated}

    cells = {}
    for spec, documents in CellStore(run.directory / "cells").cells():
        if any(spec.get(name) != value for name, value in key.items()):
            continue
        drawn = spec.get("fraction"), spec.get("ablation_seed")
        if "means" in spec and spec["means"] not in present(*drawn):
            continue
        # Where data lay is nobody's business; cells of earlier versions say it.
        spec = spec | {"data": file_name(spec["data"])}
        cells[content_key(spec)] = BundledCell(spec, documents, None, [])
    return list(cells.values())


def _table_rows(directory: Path, cells: list[BundledCell]) -> list[BundledCell]:
    """The cells with their places in the run's table of documents."""
    by_key = {_row_key(document_frame(cell.spec, cell.documents, 0)): cell for cell in cells}
    if (directory / "documents.parquet").is_file():
        frame = read_frame(directory / "documents.parquet")
        groups = frame.groupby([*KEYS, "setting"], dropna=False, sort=False)
        for place, (_, group) in enumerate(groups):
            if (cell := by_key.get(_row_key(group))) is not None:
                first = group.iloc[0]
                row = place, int(first["demonstration_seed"]), str(first["setting"])
                cell.rows.append(row)
    return cells


def _row_key(rows: pd.DataFrame) -> tuple[Any, ...]:
    """Rows of one cell as they are told apart whatever their seed is, by their scores too."""
    keys = [name for name in KEYS if name != "demonstration_seed"]
    scores = np.concatenate(rows["log_probabilities"].tolist()).tobytes()
    return *map(str, rows.iloc[0][keys]), hashlib.sha256(scores).hexdigest()


def _prompts(run: Any, cells: list[BundledCell]) -> tuple[dict[str, str], dict[str, int | None]]:
    """Keys of prompts by their group's name, and the longest in tokens; notes cells' seeds."""
    drawn = [seed for cell in cells for _, seed, _ in cell.rows]
    seeds = list(dict.fromkeys([*run.parameters.seeds, *drawn]))
    names: dict[str, str] = {}
    longest: dict[str, int | None] = {}
    first: dict[str, int | None] = {}
    for number, cell in enumerate(cells):
        key = cell.spec["prompts"]
        if key not in first:
            by_name, longest[key] = run.seeds_of(cell.spec, seeds)
            names |= dict.fromkeys(by_name, key)
            first[key] = next(iter(by_name.values()), None)
        cells[number] = replace(cell, seed=first[key])
    return names, longest


def _write_cells(path: Path, cells: list[BundledCell]) -> None:
    columns: dict[str, list[Any]] = {
        "spec": [json.dumps(cell.spec, sort_keys=True) for cell in cells],
        "seed": [cell.seed for cell in cells],
        "rows": [json.dumps(cell.rows) for cell in cells],
    }
    for name in dict.fromkeys(name for cell in cells for name in cell.documents):
        columns[name] = [cell.documents.get(name) for cell in cells]
    _write_table(path, columns)


def _write_means(
    path: Path, means: torch.Tensor, cells: list[BundledCell], longest: Mapping[str, int | None]
) -> None:
    # Of each head that was ablated to its mean the positions that a prompt reached.
    reach: dict[Head, int] = {}
    for cell in (cell for cell in cells if "means" in cell.spec):
        length = longest[cell.spec["prompts"]] or means.shape[1]
        for head in (Head(*head) for head in cell.spec["heads"]):
            reach[head] = min(means.shape[1], max(length, reach.get(head, 0)))
    heads = sorted(reach)
    vectors = [means[head.layer, : reach[head], head.head] for head in heads]
    columns: dict[str, list[Any]] = {
        "layer": [head.layer for head in heads], "head": [head.head for head in heads],
        "values": [of_head.float().flatten().tolist() for of_head in vectors],
    }  # fmt: skip
    _write_table(path, columns)


def _write_attention(path: Path, views: Mapping[str, PromptView]) -> None:
    rows = []
    for name, view in views.items():
        kinds = {"pattern": {Head(0, 0): view.pattern / _STEPS}, "plain": view.plain}
        for kind, squares in {**kinds, "blocked": view.blocked}.items():
            for head, square in squares.items():
                triangle = square[torch.tril_indices(*square.shape).unbind()].float() * _STEPS
                steps = triangle.round().to(torch.uint8).numpy().tobytes()
                rows.append((name, kind, *head, steps))
    names = ("prompt", "kind", "layer", "head", "values")
    _write_table(path, dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))


def _write_table(path: Path, columns: Mapping[str, list[Any]]) -> None:
    table = pa.table(dict(columns))
    table = pa.table({name: _narrowed(table[name]) for name in table.column_names})
    # Signs and exponents of floats beside each other compress; their digits never repeat.
    floats = {name: leaf for name in table.column_names if (leaf := _float_leaf(table[name].type))}
    pq.write_table(
        table, path, compression="zstd", compression_level=19,
        use_dictionary=[name for name in table.column_names if name not in floats],
        use_byte_stream_split=[f"{name}{leaf}" for name, leaf in floats.items()],
    )  # fmt: skip


def _float_leaf(kind: pa.DataType) -> str:
    """Path below a column of numbers in nested lists; empty for any other."""
    path = ""
    while pa.types.is_list(kind):
        kind, path = kind.value_type, f"{path}.list.element"
    return path if pa.types.is_floating(kind) else ""


def _narrowed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers in 32 bits where that is exact, as it is for models of up to 32 bits."""

    def half(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_list(kind):
            return pa.list_(half(kind.value_type))
        return pa.float32() if pa.types.is_float64(kind) else kind

    narrow = column.cast(half(column.type), safe=False)
    return narrow if narrow.cast(column.type).equals(column) else column


def _published(info: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What ``run.json`` says, without where anything lay on this machine."""
    values = info["parameters"] | {"run_dir": f"runs/{name}"}
    values |= {name: file_name(values[name]) for name, *_, it in about() if it.path}
    values["model"] = bundle_name(values["model"])
    said = dict(info) | {"model": values["model"], "parameters": values}
    said["identity"] = info["identity"] | {"state": None}
    # Of a run that was evaluated without its stages there are none.
    said["seconds"] = info.get("seconds", {})
    return json.loads(redact(json.dumps(said)))


def _missing_rows(run: Any) -> int:
    """Number of rows that the results of the run's plan lack."""
    plan: Plan = run.plan
    path = run.directory / "documents.parquet"
    frame = read_frame(path) if path.is_file() else pd.DataFrame(columns=[*KEYS, "setting"])
    missing = 0
    for group in GROUPS:
        conditions = sum(plan.condition_count(kind) for kind in plan.kinds(group))
        wanted = conditions * sum(len(prompts.seeds) for prompts in plan.prompt_sets(group))
        rows = plan.selected(frame, group, run.identity["key"])
        missing += wanted - len(rows[KEYS].drop_duplicates())
    return missing
