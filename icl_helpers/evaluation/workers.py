"""Spreading cells over workers: processes on this machine, or a dask cluster.

Workers are any ``concurrent.futures.Executor``. A worker that dies is replaced; a job that keeps
killing its worker, or keeps failing, is given up after a few attempts and recorded, and the rest
is finished.

Example
-------
>>> with process_workers(4) as workers:
...     icl.evaluate(model, tokenizer, tasks=["repetition"], executor=workers,
...                  source=ModelSource("icl-tiny"))
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from multiprocessing import connection, parent_process
from typing import Any

import torch

from icl_helpers.errors import ICLError, InputError, MissingArtefactError
from icl_helpers.evaluation.cells import Cell, Job, run_job
from icl_helpers.redaction import redact

__all__ = [
    "FailedCellsError",
    "Failure",
    "Workers",
    "as_workers",
    "chunk_size",
    "dask_workers",
    "process_workers",
    "run_jobs",
    "start_worker",
    "workers_from_environment",
]


# Attempts per cell before it is given up.
_ATTEMPTS = 3
# Deaths of workers, before any job has succeeded, after which nothing more is tried.
_DEATHS = 12
# Groups per worker to aim for: few build prompts twice, many keep all workers busy to the end.
_GROUPS_PER_WORKER = 4


class FailedCellsError(ICLError, RuntimeError):
    """Some cells could not be computed; all others are finished and kept."""


@dataclass(frozen=True)
class Failure:
    """Cells that were given up, and why."""

    job: Job
    reason: str


@dataclass
class Workers:
    """An executor, how many workers it has, and how to replace it when it breaks.

    ``width`` None: jobs are all handed over at once, and the executor itself tells which job
    killed a worker, as dask does.
    """

    executor: Executor
    count: int
    width: int | None = None
    renew: Callable[[], Executor] | None = None
    attempts: int = _ATTEMPTS


@contextmanager
def process_workers(count: int) -> Iterator[Workers]:
    """Processes on this machine, a GPU each where there are any.

    They end when the block is left, at once when it is left by an exception, and when this process
    is killed. Raises :class:`InputError` for an impossible number.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1024:
        raise InputError(f"workers must be a whole number from 1 to 1024, got {count!r}")
    context = multiprocessing.get_context("spawn")

    def pool() -> ProcessPoolExecutor:
        counter = context.Value("i", 0)
        return ProcessPoolExecutor(
            count, mp_context=context, initializer=start_worker, initargs=(counter,)
        )

    def renew() -> Executor:
        _end(workers.executor)
        return pool()

    workers = Workers(pool(), count, width=count, renew=renew)
    try:
        yield workers
    except BaseException:
        _end(workers.executor)
        raise
    workers.executor.shutdown()


def _end(executor: Executor) -> None:
    """End a pool's processes now; what they have finished is in the store."""
    for process in list((getattr(executor, "_processes", None) or {}).values()):
        process.kill()
    executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def dask_workers(scheduler: str | os.PathLike[str]) -> Iterator[Workers]:
    """Workers of a dask cluster: the address of its scheduler, or its scheduler file.

    Where workers advertise a resource ``GPU``, each job takes one. Raises :class:`InputError`
    without the extra ``[cluster]`` and :class:`MissingArtefactError` without a scheduler.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise InputError(
            "a dask scheduler needs the extra 'cluster': pip install 'icl-helpers[cluster]'"
        ) from error
    where = os.fspath(scheduler)
    given = {"address": where} if "://" in where else {"scheduler_file": where}
    if "scheduler_file" in given and not os.path.isfile(where):
        raise MissingArtefactError(
            f"scheduler file {where} does not exist; start 'dask scheduler --scheduler-file "
            f"{where}' first, or give an address such as tcp://host:8786"
        )
    try:
        client = Client(**given, timeout=20, set_as_default=False)
    except (OSError, ValueError) as error:
        raise MissingArtefactError(f"no dask scheduler answers at {where}: {error}") from error
    with client:
        if not client.scheduler_info(n_workers=-1)["workers"]:
            print(f"icl: waiting for the first worker of {where}", file=sys.stderr)
            client.wait_for_workers(1)
        found = client.scheduler_info(n_workers=-1)["workers"].values()
        gpus = any("GPU" in worker.get("resources", {}) for worker in found)
        executor = client.get_executor(
            pure=False, retries=_ATTEMPTS - 1, resources={"GPU": 1} if gpus else None
        )
        yield Workers(executor, len(found), attempts=1)


def workers_from_environment() -> Any:
    """Context of the workers that ``ICL_SCHEDULER`` or ``ICL_WORKERS`` ask for, or of None.

    The command line sets them, so that the notebooks' kernels find them.
    """
    if scheduler := os.environ.get("ICL_SCHEDULER"):
        return dask_workers(scheduler)
    if count := os.environ.get("ICL_WORKERS"):
        return process_workers(int(count))
    return nullcontext()


def as_workers(executor: Executor | Workers) -> Workers:
    """Workers of any executor; one that breaks for good cannot be replaced and ends the run."""
    if isinstance(executor, Workers):
        return executor
    if not isinstance(executor, Executor):
        raise InputError(
            f"executor must be a concurrent.futures.Executor or come from process_workers() or "
            f"dask_workers(), got {executor!r}"
        )
    return Workers(executor, getattr(executor, "_max_workers", 1))


def chunk_size(groups: int, conditions: int, workers: Workers) -> int:
    """Conditions per job, so that there are enough jobs for all workers."""
    return max(1, math.ceil(groups * conditions / (_GROUPS_PER_WORKER * workers.count)))


# A job and the number of the attempt.
_Entry = tuple[Job, int]


@dataclass
class _Queue:
    """Jobs that wait, those in the executor, and those that may have killed their worker."""

    waiting: deque[_Entry]
    suspects: deque[_Entry] = field(default_factory=deque)
    running: dict[Future[Any], _Entry] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    succeeded: bool = False
    deaths: int = 0


def run_jobs(
    jobs: Sequence[Job],
    workers: Workers,
    *,
    on_cells: Callable[[Job, list[Cell]], None],
    function: Callable[[Job], list[Cell]] = run_job,
) -> list[Failure]:
    """Run every job with ``function``; call ``on_cells`` with a job and its cells as it finishes.

    A job of several cells that fails is run again cell by cell, so that one cell costs no other.
    Errors of the user's making (:class:`ICLError`) end the run. Returns what was given up.
    """
    queue = _Queue(deque((job, 1) for job in jobs))
    while queue.waiting or queue.suspects or queue.running:
        _submit(queue, workers, function)
        dead = []
        for future in wait(queue.running, return_when=FIRST_COMPLETED).done:
            entry = queue.running.pop(future)
            error = future.exception()
            if error is None:
                queue.succeeded = True
                on_cells(entry[0], future.result())
            elif isinstance(error, ICLError):
                raise error
            elif isinstance(error, BrokenExecutor):
                dead.append(entry)
            else:
                reason = redact(f"{type(error).__name__}: {error}")
                _again(queue, queue.waiting, entry, reason, workers)
        if dead:
            _recover(queue, dead, workers)
    return queue.failures


def _submit(queue: _Queue, workers: Workers, function: Callable[[Job], list[Cell]]) -> None:
    """Hand over jobs; a suspect runs alone, so that a further death is known to be its own."""
    if queue.suspects:
        if not queue.running:
            _hand_over(queue, queue.suspects.popleft(), workers, function)
        return
    while queue.waiting and (workers.width is None or len(queue.running) < workers.width):
        _hand_over(queue, queue.waiting.popleft(), workers, function)


def _hand_over(
    queue: _Queue, entry: _Entry, workers: Workers, function: Callable[[Job], list[Cell]]
) -> None:
    try:
        future = workers.executor.submit(function, entry[0])
    except BrokenExecutor as error:
        # A worker died since the last job ended, or while others are still counted as running.
        future = Future()
        future.set_exception(error)
    queue.running[future] = entry


def _recover(queue: _Queue, dead: list[_Entry], workers: Workers) -> None:
    """Replace a broken pool; one job alone in it is to blame, of several each is suspect."""
    dead += queue.running.values()
    queue.running.clear()
    if workers.renew is None:
        raise FailedCellsError(
            "a worker died and this executor cannot be replaced; run again to go on"
        )
    workers.executor = workers.renew()
    queue.deaths += 1
    reason = "the worker died (killed, out of memory, or crashed)"
    if queue.deaths >= _DEATHS and not queue.succeeded:
        dead += [*queue.suspects, *queue.waiting]
        queue.failures += [Failure(job, f"{reason}, as every worker did") for job, _ in dead]
        queue.suspects.clear()
        queue.waiting.clear()
    elif len(dead) > 1:
        queue.suspects.extend(dead)
    else:
        _again(queue, queue.suspects, dead[0], reason, workers)


def _again(
    queue: _Queue, line: deque[_Entry], entry: _Entry, reason: str, workers: Workers
) -> None:
    """Put a failed job back in line: its cells apart, or the same cell until it is given up."""
    job, attempt = entry
    if len(job.places) > 1:
        line.extend((single, 1) for single in job.split())
    elif attempt < workers.attempts:
        line.append((job, attempt + 1))
    else:
        queue.failures.append(Failure(job, f"{reason} ({attempt} attempts)"))


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
        connection.wait([parent.sentinel])
        os._exit(1)
