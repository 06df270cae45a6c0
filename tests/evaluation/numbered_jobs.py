"""Small jobs for worker processes, in a file of their own that a process imports in no time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Numbers:
    """A job that leaves word of every run in a folder, and then acts on its numbers."""

    folder: Path
    cell_indices: tuple[int, ...]
    act: Callable[[tuple[int, ...]], None] | None = None
    load: bytes = b""

    def split(self) -> list[Numbers]:
        return [Numbers(self.folder, (index,), self.act) for index in self.cell_indices]


def run_numbers(job: Numbers) -> list[int]:
    number = len(list(job.folder.iterdir()))
    (job.folder / f"{number}-{os.getpid()}-{min(job.cell_indices)}-{len(job.cell_indices)}").touch()
    if job.act is not None:
        job.act(job.cell_indices)
    return list(job.cell_indices)


def kill_on_five(indices: tuple[int, ...]) -> None:
    if 5 in indices:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)


class OddError(Exception):
    def __init__(self, *, where: str) -> None:
        super().__init__(where)


def fail_oddly_on_one(indices: tuple[int, ...]) -> None:
    if 1 in indices:
        raise OddError(where="in the model's own code")


def sleep_long(_: tuple[int, ...]) -> None:
    time.sleep(600)
