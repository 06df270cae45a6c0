"""Real worker processes: any number gives the same tables, deaths are bounded, idle ones not started."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch

import icl_helpers as icl
from icl_helpers.cli import main
from icl_helpers.evaluation import workers as workers_module
from icl_helpers.evaluation.evaluate import ModelSource, evaluate
from icl_helpers.evaluation.store import KEYS
from icl_helpers.evaluation.workers import _start_worker, _take_number, process_workers, run_jobs
from tests.commands import FORKING, Command, in_a_process
from tests.evaluation.numbered_jobs import (
    Numbers,
    fail_oddly_on_one,
    kill_on_five,
    run_numbers,
    sleep_long,
)

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"limit": 3, "tasks": ["repetition"], "shots": [2], "seeds": [42], "ablation_seeds": [42]}


@pytest.fixture(scope="module")
def request_for():
    model, tokenizer = icl.load_model("icl-tiny")
    scores = torch.rand(model.config.num_hidden_layers, 16, generator=torch.manual_seed(0))
    conditions = icl.conditions(
        scores, fractions=(0.05,), ablations=("zero", "knockout"), ablation_seeds=(42,)
    )
    return {
        "model": model, "tokenizer": tokenizer, "tasks": ["repetition", "wordseq1_4way"],
        "shots": [2, 0], "conditions": conditions, "seeds": [42, 43], "limit": 3,
        "source": ModelSource("icl-tiny"),
    }  # fmt: skip


def in_order(frame: pd.DataFrame, *more: str) -> pd.DataFrame:
    return pd.DataFrame(frame).sort_values([*KEYS, *more]).reset_index(drop=True)


@pytest.mark.slow
def test_one_two_and_four_processes_in_any_order_give_the_tables_of_this_process(request_for):
    here = evaluate(**request_for)
    for count in (1, 2, 4):
        shuffled = dict(request_for)
        for name in ("tasks", "shots", "conditions", "seeds"):
            shuffled[name] = random.Random(count).sample(
                list(request_for[name]), k=len(request_for[name])
            )
        with process_workers(count) as workers:
            there = evaluate(**shuffled, executor=workers)
        pd.testing.assert_frame_equal(in_order(here), in_order(there), check_exact=True)
        pd.testing.assert_frame_equal(
            in_order(here.documents, "doc_id"), in_order(there.documents, "doc_id"),
            check_exact=True,
        )  # fmt: skip


# Ends a worker, and no other process, as soon as it opens the file of one cell.
DEADLY = """
import os, sys
if {"--multiprocessing-fork", "multiprocessing.forkserver"} & set(" ".join(sys.orig_argv).split()):
    def die(event, arguments):
        if event == "open" and "random_heads_zero" in str(arguments[0]):
            os._exit(9)
    sys.addaudithook(die)
"""


@pytest.mark.slow
def test_cell_that_kills_its_process_is_given_up_and_the_command_fails(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DEADLY)
    run = tmp_path / "run"
    command = [
        "evaluate", "--tasks", "repetition", "--shots", "2", "--seeds", "42", "--ablation-seeds",
        "42", "--fractions", "0.05", "--limit", "3", "--conditions", "full,zero", "--control",
        "strict", "--run-dir", str(run),
    ]  # fmt: skip
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    begun = Command(*command, "--workers", "2", errors=tmp_path / "errors", PYTHONPATH=path)
    assert begun.wait() == 2, begun.errors[-2000:]
    assert "1 cells failed, the others are finished and kept" in begun.errors
    assert "Traceback" not in begun.errors
    (record,) = [json.loads(path.read_text()) for path in (run / "failed").iterdir()]
    assert record["conditions"][0][0] == "random_heads"
    assert "the worker died" in record["reason"]
    assert "(3 attempts)" in record["reason"]
    found = pd.read_parquet(run / "results.parquet")
    assert sorted(found["condition"]) == ["full", "induction_heads"]
    # The same command where nothing dies computes the missing cell and takes the record back.
    before = {path: path.stat().st_mtime_ns for path in run.glob("cells/*.json")}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(run.glob("cells/*.json"))) == 3
    assert not list((run / "failed").iterdir())


def test_finished_cells_start_no_worker(request_for, tmp_path):
    here = evaluate(**request_for, run_dir=tmp_path)
    with process_workers(2) as workers:
        again = evaluate(**request_for, run_dir=tmp_path, executor=workers)
        assert not multiprocessing.active_children()
    pd.testing.assert_frame_equal(pd.DataFrame(here), pd.DataFrame(again), check_exact=True)


@pytest.mark.parametrize("workers", [None, "2"])
def test_finished_run_loads_no_model(tmp_path, monkeypatch, workers):
    parameters = icl.stage_parameters(**SMALL, run_dir=str(tmp_path))
    first = icl.Run(parameters).evaluate("full", "zero", "knockout")
    monkeypatch.setattr("icl_helpers.run.run.load_model", lambda *a, **k: pytest.fail("loaded"))
    if workers:
        monkeypatch.setenv("ICL_WORKERS", workers)
    run = icl.Run(parameters)
    pd.testing.assert_frame_equal(run.evaluate("full", "zero", "knockout"), first)
    assert run.tokenizer("Foo").input_ids
    assert run._loaded is None


@pytest.mark.slow
def test_model_is_not_held_twice_while_workers_have_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ICL_WORKERS", "1")
    run = icl.Run(icl.stage_parameters(**SMALL, run_dir=str(tmp_path)))
    found = run.evaluate("full", "zero")
    assert run._loaded is None
    monkeypatch.delenv("ICL_WORKERS")
    here = icl.Run(icl.stage_parameters(**SMALL, run_dir=str(tmp_path / "here")))
    pd.testing.assert_frame_equal(found, here.evaluate("full", "zero"))


@pytest.mark.slow
def test_processes_have_the_environment_of_their_start(monkeypatch):
    for value in ("one", "another"):
        monkeypatch.setenv("OF_TEST", value)
        with process_workers(1) as workers:
            assert workers.submit(os.getenv, "OF_TEST").result() == value


def begin_offline() -> None:
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = False
    _start_worker(FORKING.Array("i", 1), {"HF_HUB_OFFLINE": "1"})
    assert constants.is_offline_mode()


@pytest.mark.slow
def test_process_is_offline_where_what_it_is_forked_from_was_not_yet():
    in_a_process(begin_offline)


def work_beside_a_module(folder: Path) -> None:
    os.chdir(folder)
    os.environ.pop("PYTHONSAFEPATH", None)
    sys.path.insert(0, "")
    with process_workers(1) as workers:
        (folder / "answer").write_text(str(workers.submit(os.getenv, "PYTHONSAFEPATH").result()))


@pytest.mark.slow
def test_modules_of_the_current_directory_are_not_in_the_way_of_processes(tmp_path):
    (tmp_path / "yaml.py").write_text("raise RuntimeError('a module of the user')")
    in_a_process(work_beside_a_module, tmp_path)
    assert (tmp_path / "answer").read_text() == "None"


def children_in_state(state: str) -> list[str]:
    own = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = [pid for path in own for pid in path.read_text().split()]
    states = {
        pid: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] for pid in pids
    }
    return [pid for pid, found in states.items() if found == state]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_process_fails_its_own_job_only_and_is_replaced_and_reaped(tmp_path):
    found: list[int] = []
    jobs = [Numbers(tmp_path, tuple(range(i, i + 4)), kill_on_five) for i in range(0, 24, 4)]
    with process_workers(2) as workers:
        failures = run_jobs(
            jobs, workers, function=run_numbers, on_cells=lambda _, cells: found.extend(cells)
        )
        assert not children_in_state("Z")
        assert len(multiprocessing.active_children()) <= 2
    assert not multiprocessing.active_children()
    assert [(failure.job.cell_indices, failure.reason) for failure in failures] == [
        ((5,), "the worker died (killed, out of memory, or crashed) (3 attempts)")
    ]
    assert sorted(found) == [index for index in range(24) if index != 5]
    runs = Counter(path.name.split("-", 2)[2] for path in tmp_path.iterdir())
    assert runs.pop("5-1") == 3
    assert set(runs.values()) == {1}


@pytest.mark.slow
def test_error_that_cannot_be_unpickled_costs_its_own_job_only(tmp_path):
    found: list[int] = []
    with process_workers(1) as workers:
        failures = run_jobs(
            [Numbers(tmp_path, (index,), fail_oddly_on_one) for index in range(3)], workers,
            function=run_numbers, on_cells=lambda _, cells: found.extend(cells),
        )  # fmt: skip
    (failure,) = failures
    assert failure.job.cell_indices == (1,)
    assert "OddError: in the model's own code (3 attempts)" in failure.reason
    assert sorted(found) == [0, 2]
    assert len({path.name.split("-")[1] for path in tmp_path.iterdir()}) == 1


# Ends a worker as it starts, until the file DEATHS has more than MANY lines.
STILLBORN = """
import os, sys
def die():
    with open(os.environ["DEATHS"], "a+") as file:
        file.write("died\\n")
        file.flush()
        file.seek(0)
        if len(file.readlines()) <= int(os.environ["MANY"]):
            os._exit(9)
if "--multiprocessing-fork" in sys.orig_argv:
    die()
if "multiprocessing.forkserver" in " ".join(sys.orig_argv):
    os.register_at_fork(after_in_child=die)
"""


def with_stillborn_workers(folder: Path, forked: bool, environment: dict[str, str]) -> None:
    os.environ |= environment
    workers_module.can_fork = lambda: forked
    found: list[int] = []
    # More than a pipe holds, so that some jobs are still on their way when the pool breaks.
    jobs = [Numbers(folder / "jobs", (index,), load=bytes(10**6)) for index in range(40)]
    with process_workers(2) as workers:
        failures = run_jobs(
            jobs, workers, function=run_numbers, on_cells=lambda _, cells: found.extend(cells)
        )
    given_up = [(failure.job.cell_indices[0], failure.reason) for failure in failures]
    (folder / "answer").write_text(json.dumps([found, given_up]))


@pytest.mark.slow
@pytest.mark.parametrize("deaths", [3, 1000])
@pytest.mark.parametrize("forked", [True, False])
def test_processes_that_die_as_they_start_are_replaced_a_bounded_number_of_times(
    tmp_path, forked, deaths
):
    (tmp_path / "site").mkdir()
    (tmp_path / "jobs").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(STILLBORN)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)]),
        "DEATHS": str(tmp_path / "deaths"), "MANY": str(deaths),
    }  # fmt: skip
    in_a_process(with_stillborn_workers, tmp_path, forked, environment)
    found, given_up = json.loads((tmp_path / "answer").read_text())
    assert sorted(found + [index for index, _ in given_up]) == list(range(40))
    died = len((tmp_path / "deaths").read_text().splitlines())
    if deaths == 3:
        assert not given_up
        assert died > 3
    else:
        assert not found
        assert "the worker died" in given_up[0][1]
        assert "as every worker did" in given_up[-1][1]
        assert died <= 40


@pytest.mark.slow
def test_busy_processes_end_at_once_when_the_block_is_left_by_an_exception(tmp_path):
    with pytest.raises(KeyError), process_workers(1) as workers:
        job = Numbers(tmp_path, (0,), sleep_long)
        workers.submit(run_numbers, job)
        while not list(tmp_path.iterdir()):
            time.sleep(0.05)
        start = time.monotonic()
        raise KeyError
    assert time.monotonic() - start < 5
    assert not multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="not active"):
        workers.submit(run_numbers, job)


def test_process_that_replaces_a_dead_one_takes_its_number():
    dead = subprocess.Popen([sys.executable, "-S", "-c", ""])
    dead.wait()
    pids = multiprocessing.get_context("spawn").Array("i", [os.getppid(), dead.pid, 0])
    assert _take_number(pids) == 1
    assert _take_number(pids) == 2
    assert list(pids) == [os.getppid(), os.getpid(), os.getpid()]
