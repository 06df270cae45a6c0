"""Spreading jobs over workers: processes on this machine, or a dask cluster.

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

import gc
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from typing import Any, Generic, Protocol, TypeVar

import torch
from pebble import ProcessExpired, ProcessPool

from icl_helpers.errors import ICLError, InputError, MissingArtefactError
from icl_helpers.kernels import can_fork, default_environment, take_environment
from icl_helpers.redaction import redact

__all__ = [
    "FailedCellsError", "Failure", "SplittableJob", "Workers", "as_workers", "chunk_size",
    "dask_workers", "process_workers", "run_jobs", "workers_from_environment",
]  # fmt: skip

# Attempts per cell before it is given up.
_ATTEMPTS = 3
_DEATH = "the worker died (killed, out of memory, or crashed)"
# Groups per worker to aim for: few build prompts twice, many keep all workers busy to the end.
_GROUPS_PER_WORKER = 4

JobT = TypeVar("JobT", bound="SplittableJob")
ResultT = TypeVar("ResultT")


class SplittableJob(Protocol):
    """A job of one or several cells."""

    @property
    def cell_indices(self) -> Sequence[int]:
        """The caller's number of each cell."""

    def split(self: JobT) -> Sequence[JobT]:
        """A job per cell."""


class FailedCellsError(ICLError, RuntimeError):
    """Some cells could not be computed; all others are finished and kept."""


@dataclass(frozen=True)
class Failure(Generic[JobT]):
    """A job that was given up, and why."""

    job: JobT
    reason: str


@dataclass(frozen=True)
class Workers:
    """How to hand over a job, how many workers there are, and what they are trusted with.

    At most ``max_in_flight`` jobs are handed over at a time (None: all at once), each cell at most
    ``attempts`` times, and nothing more when ``max_deaths`` workers died without any success.
    Jobs under way when ``is_alive`` gives False, and that ended in no way, have been forgotten.
    """

    submit: Callable[..., Future[Any]]
    count: int
    max_in_flight: int | None = None
    attempts: int = _ATTEMPTS
    max_deaths: float = math.inf
    is_alive: Callable[[], bool] = lambda: True


@contextmanager
def process_workers(count: int) -> Iterator[Workers]:
    """Processes on this machine, a GPU each where there are any.

    They end at once when the block is left, and when this process is killed. What they are copies
    of, where they are, ends with this process. Raises :class:`InputError` for an impossible number.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1024:
        raise InputError(f"workers must be a whole number from 1 to 1024, got {count!r}")
    context = multiprocessing.get_context(_start_method())
    shared = context.Array("i", count), dict(os.environ)

    def new_pool() -> ProcessPool:
        return ProcessPool(count, initializer=_start_worker, initargs=shared, context=context)

    pool, left = new_pool(), False

    def submit(function: Callable[..., Any], job: Any) -> Future[Any]:
        nonlocal pool
        try:
            return pool.schedule(_call, (function, job))
        except RuntimeError:
            if left:
                raise
        # It broke, as pools do when a worker dies while none has a job (while they start, say).
        pool.join()
        pool = new_pool()
        return pool.schedule(_call, (function, job))

    try:
        deaths = _ATTEMPTS * max(4, count)
        yield Workers(submit, count, count, max_deaths=deaths, is_alive=lambda: pool.active)
    finally:
        left = True
        pool.stop()
        pool.join()


def _start_method() -> str:
    """Copies of one process that has imported, where they can be, need not import it all again."""
    # Before, modules of the current directory could not be kept out of that process.
    if not can_fork() or sys.version_info < (3, 11):
        return "spawn"
    from multiprocessing import forkserver

    forkserver.set_forkserver_preload(["icl_helpers.evaluation.cells"])
    with default_environment("PYTHONSAFEPATH", "1"):
        forkserver.ensure_running()
    return "forkserver"


def _call(function: Callable[[Any], ResultT], job: Any) -> ResultT:
    """Run a job in a process; an error that its parent may not know how to unpickle is text."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    try:
        return function(job)
    except Exception as error:
        if isinstance(error, ICLError) or type(error).__module__ == "builtins":
            raise
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


def _start_worker(pids: Any, environment: dict[str, str]) -> None:
    """Prepare a process: a GPU of its own, one CPU thread, an end with its parent."""
    take_environment(environment)
    # Until it has imported what its first job needs.
    gc.disable()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
    number = _take_number(pids)
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def _take_number(pids: Any) -> int:
    """The first number that no living worker has: who replaces a dead one gets its GPU."""
    with pids.get_lock():
        number = next((n for n, pid in enumerate(pids) if not _is_alive(pid)), 0)
        pids[number] = os.getpid()
    return number


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return pid != 0


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


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
    address = {"address": where} if "://" in where else {"scheduler_file": where}
    if "scheduler_file" in address and not os.path.isfile(where):
        raise MissingArtefactError(
            f"scheduler file {where} does not exist; start 'dask scheduler --scheduler-file "
            f"{where}' first, or give an address such as tcp://host:8786"
        )
    try:
        client = Client(**address, timeout=20, set_as_default=False)
    except (OSError, ValueError) as error:
        raise MissingArtefactError(f"no dask scheduler answers at {where}: {error}") from error
    with client:
        if not client.scheduler_info(n_workers=-1)["workers"]:
            print(f"icl: waiting for the first worker of {where}", file=sys.stderr)
            client.wait_for_workers(1)
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        gpus = any("GPU" in worker.get("resources", {}) for worker in workers)
        executor = client.get_executor(
            pure=False, retries=_ATTEMPTS - 1, resources={"GPU": 1} if gpus else None
        )
        yield Workers(executor.submit, len(workers), attempts=1)


def workers_from_environment() -> Any:
    """Context of the workers that ``ICL_SCHEDULER`` or ``ICL_WORKERS`` ask for, or of None."""
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
    return Workers(executor.submit, getattr(executor, "_max_workers", 1))


def chunk_size(groups: int, conditions: int, workers: Workers) -> int:
    """Conditions per job, so that there are enough jobs for all workers."""
    return max(1, math.ceil(groups * conditions / (_GROUPS_PER_WORKER * workers.count)))


def run_jobs(
    jobs: Sequence[JobT], workers: Workers, *, function: Callable[[JobT], ResultT],
    on_cells: Callable[[JobT, ResultT], None],
) -> list[Failure[JobT]]:  # fmt: skip
    """Run every job with ``function``; call ``on_cells`` with a job and its cells as it finishes.

    A job of several cells that fails is run again cell by cell, so that one cell costs no other.
    Errors of the user's making (:class:`ICLError`) end the run. Returns what was given up.
    """
    waiting = deque((job, 1) for job in jobs)
    running: dict[Future[ResultT], tuple[JobT, int]] = {}
    failures: list[Failure[JobT]] = []
    deaths_left = workers.max_deaths
    while waiting or running:
        while waiting and len(running) < (workers.max_in_flight or math.inf):
            job, attempt = waiting.popleft()
            try:
                running[workers.submit(function, job)] = job, attempt
            except BrokenExecutor as broke:
                raise FailedCellsError(
                    "a worker died and this executor cannot be replaced; run again to go on"
                ) from broke
        ended = wait(running, timeout=1, return_when=FIRST_COMPLETED).done
        broken = next((e for f in ended if isinstance(e := f.exception(), BrokenExecutor)), None)
        # A pool that breaks forgets the jobs that no worker has asked for: their futures never end.
        if not (ended or workers.is_alive()):
            broken = BrokenExecutor()
        for future in list(running) if broken else ended:
            job, attempt = running.pop(future)
            error = future.exception() if future.done() else broken
            if error is None:
                deaths_left = math.inf
                on_cells(job, future.result())
                continue
            if isinstance(error, ICLError):
                raise error
            reason = redact(f"{type(error).__name__}: {error}")
            if isinstance(error, (ProcessExpired, BrokenExecutor)):
                reason = _DEATH
                deaths_left -= 1
            if len(job.cell_indices) > 1:
                waiting.extend((single, 1) for single in job.split())
            elif attempt < workers.attempts:
                waiting.append((job, attempt + 1))
            else:
                failures.append(Failure(job, f"{reason} ({attempt} attempts)"))
        if deaths_left <= 0:
            reason = f"{_DEATH}, as every worker did"
            return failures + [Failure(job, reason) for job, _ in (*running.values(), *waiting)]
    return failures
