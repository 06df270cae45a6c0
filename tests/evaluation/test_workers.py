"""Cells scored by workers: the same numbers, bounded retries, no orphans."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from collections import Counter
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from pebble import ProcessExpired

import icl_helpers as icl
from icl_helpers.evaluation.cells import CellGroup
from icl_helpers.evaluation.evaluate import Job, ModelSource, evaluate, pack, run_job
from icl_helpers.evaluation.workers import (
    FailedCellsError,
    Workers,
    as_workers,
    chunk_size,
    dask_workers,
    run_jobs,
)
from tests.commands import FORKING, Command, children, still_there, wait_for

ROOT = Path(__file__).resolve().parents[2]


def job(first: int, cells: int, *, task: str = "repetition") -> Job:
    group = CellGroup(
        task, "unrelated", 5, (42,), "synthetic", None, "first", 4, (icl.Condition("full"),) * cells
    )
    indices = range(first, first + cells)
    return pack(group, source=ModelSource(), key={}, cells_dir=None, cell_indices=indices)


class DyingWorkers:
    """Workers that a poisoned cell kills, each with the job that it has and no other."""

    def __init__(self, poisoned: set[int]) -> None:
        self.poisoned, self.runs = poisoned, Counter()

    def submit(self, function, job):
        self.runs.update(job.cell_indices)
        future: Future = Future()
        if self.poisoned & set(job.cell_indices):
            future.set_exception(ProcessExpired("Abnormal termination", code=-9))
        else:
            future.set_result(function(job))
        return future


class BreakingPool:
    """A pool that breaks at first with all that it has, and tells of one job only."""

    def __init__(self) -> None:
        self.held: list[Future] = []

    def submit(self, function, job):
        future: Future = Future()
        self.held.append(future)
        if len(self.held) == 3:
            self.held[1].set_exception(BrokenProcessPool("All workers expired"))
        elif len(self.held) > 3:
            future.set_result(function(job))
        return future


def test_cell_that_kills_its_worker_is_given_up_after_three_deaths_and_the_rest_is_finished():
    dying = DyingWorkers({5})
    found: dict[int, int] = {}
    jobs = [job(0, 4), job(4, 4), job(8, 4)]
    failures = run_jobs(
        jobs, Workers(dying.submit, 2, max_in_flight=2), function=lambda j: list(j.cell_indices),
        on_cells=lambda j, cells: found.update(zip(j.cell_indices, cells, strict=True)),
    )  # fmt: skip
    assert [failure.job.cell_indices for failure in failures] == [(5,)]
    assert "died" in failures[0].reason
    assert sorted(found) == [index for index in range(12) if index != 5]
    assert dying.runs[5] == 4  # once with its group, three times alone
    assert {dying.runs[index] for index in (0, 1, 2, 3, 8, 9, 10, 11)} == {1}


def test_nothing_more_is_tried_when_every_worker_dies():
    dying = DyingWorkers(set(range(400)))
    failures = run_jobs(
        [job(i, 1) for i in range(400)], Workers(dying.submit, 2, max_in_flight=2, max_deaths=12),
        function=lambda j: list(j.cell_indices), on_cells=lambda *_: None,
    )  # fmt: skip
    indices = sorted(index for failure in failures for index in failure.job.cell_indices)
    assert indices == list(range(400))
    assert sum(dying.runs.values()) <= 40
    assert "as every worker did" in failures[-1].reason


def test_jobs_of_a_pool_that_breaks_are_all_run_again():
    found: list[int] = []
    failures = run_jobs(
        [job(0, 2), job(2, 1), job(3, 1), job(4, 2)],
        Workers(BreakingPool().submit, 3, max_in_flight=3, max_deaths=12),
        function=lambda j: list(j.cell_indices), on_cells=lambda _, cells: found.extend(cells),
    )  # fmt: skip
    assert not failures
    assert sorted(found) == list(range(6))


def test_executor_that_breaks_for_good_ends_the_run():
    def break_it(*_):
        raise BrokenProcessPool

    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(FailedCellsError, match="a worker died and this executor cannot be replaced"),
    ):
        pool.submit = break_it
        run_jobs([job(0, 1)], as_workers(pool), function=run_job, on_cells=lambda *_: None)


def test_cell_that_raises_is_tried_three_times_and_costs_no_other():
    runs: Counter = Counter()
    found: list[int] = []

    def score(given: Job) -> list:
        runs.update(given.cell_indices)
        if 2 in given.cell_indices:
            raise RuntimeError("out of luck")
        return list(given.cell_indices)

    with ThreadPoolExecutor(2) as pool:
        failures = run_jobs(
            [job(0, 4), job(4, 4)], Workers(pool.submit, 2), function=score,
            on_cells=lambda _, cells: found.extend(cells),
        )  # fmt: skip
    assert [(f.job.cell_indices, f.reason) for f in failures] == [
        ((2,), "RuntimeError: out of luck (3 attempts)")
    ]
    assert sorted(found) == [0, 1, 3, 4, 5, 6, 7]
    assert runs[2] == 4


def test_error_of_the_users_making_ends_the_run():
    def refuse(given: Job) -> list:
        raise icl.InputError("too long")

    with ThreadPoolExecutor(1) as pool, pytest.raises(icl.InputError, match="too long"):
        run_jobs([job(0, 1)], Workers(pool.submit, 1), function=refuse, on_cells=lambda *_: None)


@pytest.mark.parametrize("count", [1, 2, 4, 64])
def test_there_are_jobs_for_all_workers_but_no_more_than_cells(count):
    size = chunk_size(3, 10, Workers(ThreadPoolExecutor(1).submit, count))
    jobs = [part for first in (0, 10, 20) for part in job(first, 10).split(size)]
    assert [index for part in jobs for index in part.cell_indices] == list(range(30))
    assert min(30, 2 * count) <= len(jobs)


@pytest.fixture(scope="module")
def request_for():
    model, tokenizer = icl.load_model("icl-tiny")
    scores = torch.rand(model.config.num_hidden_layers, 16, generator=torch.manual_seed(0))
    means = torch.randn(model.config.num_hidden_layers, 300, 16, 16) * 0.1
    conditions = icl.conditions(
        scores, fractions=(0.05,), ablations=("mean", "knockout"), head_outputs=means,
        ablation_seeds=(42,),
    )  # fmt: skip
    return {
        "model": model, "tokenizer": tokenizer, "tasks": ["repetition"], "shots": [0, 3],
        "conditions": conditions, "seeds": [42, 43], "limit": 4, "source": ModelSource("icl-tiny"),
    }  # fmt: skip


class Shuffled(Executor):
    """Runs what it is given in another order than it was given."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(2)
        self.waiting: list = []
        self._max_workers = 4

    def submit(self, function, given):
        self.waiting.insert(len(self.waiting) // 2, (future := Future(), given))
        self.pool.submit(self.one, function)
        return future

    def one(self, function):
        future, given = self.waiting.pop()
        try:
            future.set_result(function(given))
        except Exception as error:
            future.set_exception(error)


def test_shuffled_workers_give_the_tables_and_files_of_this_process(request_for, tmp_path):
    here = evaluate(**request_for, run_dir=tmp_path / "here")
    there = evaluate(**request_for, run_dir=tmp_path / "there", executor=Shuffled())
    pd.testing.assert_frame_equal(pd.DataFrame(here), pd.DataFrame(there), check_exact=True)
    pd.testing.assert_frame_equal(here.documents, there.documents, check_exact=True)
    files = [
        {p.name: p.read_bytes() for p in (tmp_path / run / "cells").iterdir()}
        for run in ("here", "there")
    ]
    assert files[0] == files[1]


def test_failed_cells_are_recorded_and_the_record_goes_when_they_succeed(
    request_for, tmp_path, monkeypatch
):
    from icl_helpers.evaluation import evaluate as worker

    whole = worker.score_group

    def unlucky(lm, group, key, store):
        if group.shots == 3 and any(c.name == "random_heads" for c in group.conditions):
            raise MemoryError("no memory left")
        return whole(lm, group, key, store)

    monkeypatch.setattr(worker, "score_group", unlucky)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(FailedCellsError, match="2 cells failed.*no memory left"):
            evaluate(**request_for, run_dir=tmp_path, executor=pool)
        records = [json.loads(p.read_text()) for p in (tmp_path / "failed").iterdir()]
        assert [r["conditions"][0][0] for r in records] == ["random_heads"] * 2
        assert all("no memory left (3 attempts)" in r["reason"] for r in records)
        assert len(pd.read_parquet(tmp_path / "results.parquet")) == 4 * 4 - 2
        monkeypatch.setattr(worker, "score_group", whole)
        evaluate(**request_for, run_dir=tmp_path, executor=pool)
    assert not list((tmp_path / "failed").iterdir())
    assert len(pd.read_parquet(tmp_path / "results.parquet")) == 4 * 4


def test_worker_with_another_model_is_refused(request_for):
    given = {**request_for, "source": replace(request_for["source"], dtype="bfloat16")}
    with ThreadPoolExecutor(1) as pool, pytest.raises(icl.InputError, match="differs.*fingerprint"):
        evaluate(**given, executor=pool)


def test_missing_scheduler_is_named(tmp_path):
    with (
        pytest.raises(icl.MissingArtefactError, match="scheduler file .*none.json"),
        dask_workers(tmp_path / "none.json"),
    ):
        pass


def descendants(pid: int) -> list[int]:
    """Processes that descend from this one."""
    direct = children(pid)
    return direct + [below for child in direct for below in descendants(child)]


ARGUMENTS = [
    "evaluate", "--tasks", "repetition", "--shots", "5", "--seeds", "42,43", "--limit", "20",
    "--conditions", "full,zero",
]  # fmt: skip


def start(run: Path, *more: str) -> Command:
    return Command(*ARGUMENTS, "--run-dir", str(run), *more, errors=run.with_name("errors"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_command_leaves_no_worker_and_keeps_what_is_finished(tmp_path, how):
    run = tmp_path / "run"
    process = start(run, "--workers", "2")
    wait_for(lambda: list(run.glob("cells/*.json")), process)
    workers = descendants(process.pid)
    assert len(workers) >= 2
    process.send_signal(how)
    assert process.wait(60) != 0
    assert still_there(*workers) == []
    assert list(run.glob("cells/*.json"))


@pytest.fixture
def cluster(tmp_path):
    """A scheduler and two worker processes without a nanny, as on two machines."""
    file = tmp_path / "scheduler.json"
    begun = [
        FORKING.Process(target=begin_dask, args=arguments)
        for arguments in (
            ("scheduler", "--scheduler-file", str(file), "--port", "0", "--no-dashboard"),
            *2 * [(
                "worker", "--scheduler-file", str(file), "--nworkers", "1", "--nthreads", "1",
                "--no-nanny", "--no-dashboard", "--local-directory", str(tmp_path / "dask"),
            )],
        )
    ]  # fmt: skip
    for process in begun:
        process.start()
        wait_for(file.exists, process)
    yield file, begun[1:]
    for process in begun:
        process.kill()
        process.join()


def begin_dask(*arguments: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(ROOT)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    sys.argv[1:] = arguments
    runpy.run_module("dask", run_name="__main__")


@pytest.mark.slow
def test_dask_cluster_that_loses_a_worker_gives_the_same_tables(tmp_path, cluster):
    file, workers = cluster
    process = start(tmp_path / "dask-run", "--scheduler", str(file))
    wait_for(lambda: list((tmp_path / "dask-run").glob("cells/*.json")), process)
    workers[0].kill()
    assert process.wait() == 0, process.errors[-2000:]
    here = start(tmp_path / "here")
    assert here.wait() == 0
    frames = [pd.read_parquet(tmp_path / run / "documents.parquet") for run in ("dask-run", "here")]
    pd.testing.assert_frame_equal(*frames, check_exact=True)


def test_jobs_that_a_broken_pool_forgot_are_handed_over_again():
    """It broke while they were on their way: none of their futures ends, and no error says so."""
    forgotten: list[Future] = [Future(), Future()]

    def submit(function, job):
        if forgotten:
            return forgotten.pop()
        future: Future = Future()
        future.set_result(function(job))
        return future

    found: list[int] = []
    failures = run_jobs(
        [job(0, 1), job(1, 1), job(2, 1)], Workers(submit, 2, 2, is_alive=lambda: False),
        function=lambda job: job.cell_indices, on_cells=lambda _, cells: found.extend(cells),
    )  # fmt: skip
    assert (sorted(found), failures) == ([0, 1, 2], [])
