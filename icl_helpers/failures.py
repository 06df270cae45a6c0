"""The record of cells that workers gave up: one file each, below ``run_dir/failed``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from icl_helpers.scheduling import Failure
from icl_helpers.store import content_key, write_json
from icl_helpers.worker import Job

__all__ = ["describe_failures", "record_failures"]


def record_failures(directory: Path, jobs: Sequence[Job], failures: Sequence[Failure]) -> None:
    """Write what failed and why; take back the record of what has succeeded since."""
    records = {
        _path(directory, single): {**single.group.describe(), "reason": failure.reason}
        for failure in failures
        for single in failure.job.split()
    }
    for job in jobs:
        for single in job.split():
            if (path := _path(directory, single)) not in records:
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


def _path(directory: Path, job: Job) -> Path:
    content = [job.group.describe(), job.group.limit, job.group.data, job.key]
    return directory / "failed" / f"{job.group.task}_{content_key(content)}.json"
