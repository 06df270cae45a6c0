"""The record of cells that workers gave up: one file each, below ``run_dir/failed``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from icl_helpers.cells import CellGroup
from icl_helpers.scheduling import Failure
from icl_helpers.store import content_key, write_json

__all__ = ["describe_failures", "record_failures"]


def record_failures(
    directory: Path,
    groups: Sequence[CellGroup],
    key: dict[str, Any],
    failures: Sequence[Failure],
) -> None:
    """Write what failed and why; take back the record of what has succeeded since."""
    records = {
        _path(directory, single, key): {**single.describe(), "reason": failure.reason}
        for failure in failures
        for single in failure.job.group.split(1)
    }
    if (directory / "failed").is_dir():
        for group in groups:
            for single in group.split(1):
                if (path := _path(directory, single, key)) not in records:
                    path.unlink(missing_ok=True)
    for path, record in records.items():
        write_json(path, record)


def describe_failures(failures: Sequence[Failure], directory: Path | None) -> str:
    """One sentence with the first failure, and where the others are."""
    count = sum(len(failure.job.places) for failure in failures)
    cell = failures[0].job.group.describe()
    where = "" if directory is None else f" (all of them in {directory / 'failed'})"
    return (
        f"{count} cells failed, the others are finished and kept{where}. The first is "
        f"{cell['task']}, {cell['shots']} shots, seed {cell['demonstration_seed']}, "
        f"{cell['conditions'][0]}: {failures[0].reason}"
    )


def _path(directory: Path, group: CellGroup, key: dict[str, Any]) -> Path:
    content = [group.describe(), group.limit, group.data, key]
    return directory / "failed" / f"{group.task}_{content_key(content)}.json"
